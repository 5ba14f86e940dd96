"""ORU^R01 by the profile: every field where it belongs, every status from the one table."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from tests.results.examples import DRAFT, RADIOLOGIST, SENT, destination, parsed, report, section_text
from worker.core.errors import ReportError, SignatureError
from worker.core.report import STATUS, Assessment, Order, Origin, Patient, ReportState, Section, Sentence
from worker.results import hl7


def test_header_carries_the_settings_of_the_destination():
    to = destination(
        sending_application="MU2^1.2.3^ISO",
        sending_facility="CITY",
        receiving_application="RIS",
        receiving_facility="NORTH",
        processing_id="P",
    )
    msh = parsed(report(), to).segment("MSH")
    assert [str(msh[n]) for n in range(3, 7)] == ["MU2^1.2.3^ISO", "CITY", "RIS", "NORTH"]
    assert [str(msh[n]) for n in (7, 9, 10)] == ["20260302093000+0000", "ORU^R01^ORU_R01", "C1"]
    assert [str(msh[n]) for n in (11, 12, 15, 16, 18)] == ["P", "2.5.1", "NE", "AL", "UNICODE UTF-8"]


def test_patient_and_visit_stand_in_pid_and_pv1():
    message = parsed(report())
    pid, pv1 = message.segment("PID"), message.segment("PV1")
    assert [str(pid[n]) for n in (3, 5, 7, 8)] == ["4711^^^CITY^MR", "Rossi^Maria^Luisa", "19610409", "F"]
    assert [str(pv1[2]), str(pv1[19])] == ["I", "V-9"]


def test_order_stands_in_orc_and_obr():
    message = parsed(report())
    orc, obr = message.segment("ORC"), message.segment("OBR")
    assert [str(orc[n]) for n in (1, 2, 3)] == ["RE", "P-1", "F-1"]
    assert [str(obr[n]) for n in (2, 3, 4, 18, 24)] == ["P-1", "F-1", "24627-2^CT Chest^LN", "A-100", "CT"]
    assert [str(obr[n]) for n in (7, 22)] == ["20260301140500", "20260301150000.2500+0100"]
    assert str(obr[16]) == "^Berg^Nils^O^Jr^Dr"
    assert message.unescape(str(obr[31])) == "^cough & fever"


def test_observations_are_the_study_and_the_sections_in_order():
    rows = [[str(obx[n]) for n in range(1, 5)] for obx in parsed(report()).segments("OBX")]
    assert rows == [
        ["1", "ST", "113014^DICOM Study^DCM", ""],
        ["2", "TX", "59776-5^Findings^LN", "1"],
        ["3", "TX", "19005-8^Impression^LN", "2"],
    ]


def test_sentences_are_lines_of_their_section():
    message = parsed(report())
    assert section_text(message, "59776-5") == "No pleural effusion.\nNodule of 5 mm in the left upper lobe."
    assert section_text(message, "113014") == "1.2.840.99.1"


def test_region_stands_before_its_sentences_as_in_the_signed_text():
    sentences = tuple(Sentence(Section.FINDINGS, text, region=text.lower()) for text in ("Chest", "Abdomen"))
    message = parsed(report(sentences=sentences))
    assert section_text(message, "59776-5") == "Chest:\nChest\nAbdomen:\nAbdomen"


def test_rejected_sentence_does_not_leave():
    rejected = Sentence(Section.FINDINGS, "Wrong.", assessment=Assessment.REJECTED)
    assert "Wrong" not in str(parsed(report(sentences=(*DRAFT.sentences, rejected))))


@pytest.mark.parametrize("state", list(ReportState))
def test_statuses_come_from_the_one_table(state):
    message = parsed(report(state))
    assert str(message.segment("OBR")[25]) == STATUS[state].obr_25
    assert {str(obx[11]) for obx in message.segments("OBX")} == {STATUS[state].obx_11}


def test_draft_is_p_where_the_destination_asks_for_p():
    message = parsed(report(), destination(drafts="P"))
    assert {str(message.segment("OBR")[25]), *(str(obx[11]) for obx in message.segments("OBX"))} == {"P"}


def test_draft_does_not_leave_to_a_destination_that_takes_none():
    with pytest.raises(ReportError, match="takes no machine drafts"):
        parsed(report(), destination(drafts="none"))


def test_preliminary_report_leaves_only_where_the_destination_opted_in():
    with pytest.raises(ReportError, match="takes no preliminary"):
        parsed(report(ReportState.PRELIMINARY), destination(preliminary=False))


def test_draft_never_follows_a_final_report():
    with pytest.raises(ReportError, match="was final"):
        parsed(report(supersedes_final=True))


@pytest.mark.parametrize(
    "state", [ReportState.FINAL, ReportState.CORRECTED, ReportState.ADDENDED, ReportState.RETRACTED]
)
def test_f_and_c_never_leave_without_a_signer(state):
    with pytest.raises(SignatureError):
        parsed(report(state, signer=None))


def test_signer_stands_in_obr_32_and_as_observer_of_a_signed_report():
    message = parsed(report(ReportState.FINAL))
    assert str(message.segment("OBR")[32]) == "r7&Okafor&Ada"
    assert {str(obx[16]) for obx in message.segments("OBX")} == {"r7^Okafor^Ada"}


def test_draft_names_no_person_and_the_model_as_method():
    message = parsed(report(signer=RADIOLOGIST))
    assert len(message.segment("OBR")) <= 32
    assert {str(obx[16]) for obx in message.segments("OBX")[1:]} == {""}
    assert {str(obx[17]) for obx in message.segments("OBX")[1:]} == {"AI^mu2LLM 1.0^L"}


def test_reader_of_a_preliminary_report_is_its_observer_and_not_its_signer():
    message = parsed(report(ReportState.PRELIMINARY, reader=RADIOLOGIST))
    assert len(message.segment("OBR")) <= 32
    assert {str(obx[16]) for obx in message.segments("OBX")} == {"r7^Okafor^Ada"}


def test_observations_carry_the_time_of_the_status():
    assert {str(obx[14]) for obx in parsed(report()).segments("OBX")} == {"20260301150000.2500+0100"}


def test_disclosure_is_the_note_while_machine_text_survives():
    notes = parsed(report()).segments("NTE")
    assert [str(note[3]) for note in notes] == [DRAFT.disclosure]


def test_machine_text_does_not_leave_without_its_disclosure():
    with pytest.raises(ReportError, match="disclosure"):
        parsed(report(disclosure=""))


def test_text_of_persons_alone_needs_no_note():
    own = tuple(replace(sentence, origin=Origin.PERSON) for sentence in DRAFT.sentences)
    assert "NTE" not in str(parsed(report(ReportState.FINAL, sentences=own, disclosure="")))


def test_addendum_follows_the_original_text():
    addendum = Sentence(Section.ADDENDUM, "Compared with 2024: unchanged.", Origin.PERSON)
    message = parsed(report(ReportState.ADDENDED, sentences=(*DRAFT.sentences, addendum)))
    codes = [str(obx[3]).split("^")[0] for obx in message.segments("OBX")]
    assert codes == ["113014", "59776-5", "19005-8", "55107-7"]
    assert section_text(message, "55107-7") == addendum.text


@pytest.mark.parametrize("state", [ReportState.REJECTED, ReportState.RETRACTED])
def test_withdrawn_report_says_so_in_every_section_and_repeats_no_finding(state):
    message = parsed(report(state, reason="wrong patient"))
    for code in ("59776-5", "19005-8"):
        assert section_text(message, code).endswith("do not use it. Reason: wrong patient")
    assert "nodule" not in str(message).lower()


def test_withdrawn_report_without_sections_still_tells_the_receiver():
    message = parsed(report(ReportState.REJECTED, sentences=()))
    assert "rejected" in section_text(message, "18748-4")


def test_what_is_not_known_is_left_out_or_said_to_be_unknown():
    bare = report(patient=Patient("1", sex="kitten"), order=Order(patient_class=""), study_time=None)
    message = parsed(bare)
    assert [str(message.segment("PID")[n]) for n in (3, 5, 8)] == ["1^^^^MR", "^^^^^^U", "U"]
    assert str(message.segment("PV1")[2]) == "U"
    assert [str(message.segment("OBR")[n]) for n in (4, 7)] == ["CT^CT study^L", ""]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"patient": Patient("  ")}, "no patient id"),
        ({"study_instance_uid": ""}, "names no study"),
        ({"sentences": ()}, "no text"),
        ({"status_time": datetime(2026, 3, 1)}, "need a zone"),
    ],
)
def test_report_that_no_receiver_could_file_is_refused_with_the_reason(changes, reason):
    with pytest.raises(ReportError, match=reason):
        parsed(report(**changes))


@pytest.mark.parametrize("control_id", ["", "x" * 21, "a|b", "a\r"])
def test_control_id_that_would_break_the_header_is_refused(control_id):
    with pytest.raises(ReportError, match="control id"):
        hl7.write(report(), destination(), control_id, SENT)


def test_same_report_gives_the_same_bytes():
    assert hl7.write(report(), destination(), "C1", SENT) == hl7.write(report(), destination(), "C1", SENT)


def test_later_status_time_is_a_later_obr_22():
    later = DRAFT.status_time + timedelta(microseconds=100)
    first, second = (str(parsed(report(status_time=t)).segment("OBR")[22]) for t in (DRAFT.status_time, later))
    assert first < second


def test_zone_west_of_greenwich_keeps_its_minutes():
    moment = datetime.fromisoformat("2026-03-01T15:00:00-03:30")
    assert hl7.timestamp(moment) == "20260301150000-0330"


def test_error_names_the_field_and_no_patient():
    with pytest.raises(ReportError) as caught:
        parsed(report(patient=replace(DRAFT.patient, identifier="")))
    assert "Rossi" not in str(caught.value)


def test_threads_of_one_worker_write_the_same_message():
    with ThreadPoolExecutor(4) as pool:
        written = set(pool.map(lambda _: hl7.write(report(), destination(), "C1", SENT), range(16)))
    assert written == {hl7.write(report(), destination(), "C1", SENT)}
