"""`mu2 study` on real rows."""

import json

import numpy as np
import pytest
import sqlalchemy as sa

from tests.cli.conftest import Terminal
from tests.core import builders
from worker.core import studies
from worker.core.errors import InvalidObjectError, NotFoundError, StateError
from worker.core.records import AuditEvent, Instance, Stage, Study, StudyStatus

PATIENT = {"patient_name": "CANARY^ADA", "patient_identifier": "MRN-77", "accession": "ACC-9"}


def failed(terminal: Terminal, **changes: object) -> str:
    study_id = builders.completed(terminal.database, **changes)
    claim = builders.claimed(terminal.database, Stage.PREPARE)
    with terminal.database.write() as session:
        studies.fail(session, claim, InvalidObjectError("nothing can be read"))
    return study_id


def skipped(terminal: Terminal) -> str:
    study_id = builders.completed(terminal.database)
    claim = builders.claimed(terminal.database, Stage.PREPARE)
    with terminal.database.write() as session:
        studies.skip(session, claim, "no CT series", {"series": []})
    return study_id


def without_pixels(terminal: Terminal) -> str:
    """A skipped study whose files retention removed."""
    study_id = skipped(terminal)
    with terminal.database.write() as session:
        session.execute(sa.update(Instance).values(removed_at=studies.now()))
    return study_id


def status(terminal: Terminal, study_id: str) -> tuple[StudyStatus, int]:
    study = builders.study_of(terminal.database, study_id)
    return study.status, study.revision


def actions(terminal: Terminal) -> list[tuple[str, str | None]]:
    with terminal.database.read() as session:
        rows = session.scalars(sa.select(AuditEvent).order_by(AuditEvent.id)).all()
    return [(row.action, row.study_id) for row in rows]


def test_list_shows_states_and_reasons_and_no_patient(terminal: Terminal) -> None:
    study_id = failed(terminal, **PATIENT)
    result = terminal.run("study", "list")
    assert result.exit_code == 0
    assert study_id[:8] in result.stdout and "InvalidObjectError: nothing can be read" in result.stdout
    assert not any(value in terminal.run("study", "list", "--json").output for value in PATIENT.values())
    assert actions(terminal) == []


def test_list_by_state_and_age(terminal: Terminal) -> None:
    wanted = failed(terminal)
    builders.received(terminal.database)
    assert [line["id"] for line in terminal.data("study", "list", "--status", "failed")] == [wanted]
    assert len(terminal.data("study", "list", "--since", "1h")) == 2
    assert terminal.data("study", "list", "--since", "2099-01-01") == []


def test_a_patient_is_shown_only_when_asked_for_and_the_look_is_audited(terminal: Terminal) -> None:
    study_id = builders.received(terminal.database, **PATIENT)
    assert "patient_name" not in terminal.data("study", "show", study_id)
    assert actions(terminal) == []
    shown = terminal.data("study", "show", study_id, "--patient")
    assert {name: shown[name] for name in PATIENT} == PATIENT
    assert actions(terminal) == [("patient_shown", study_id)]


def test_show_finds_a_study_by_id_by_its_beginning_and_by_uid(terminal: Terminal) -> None:
    study_id = builders.received(terminal.database)
    uid = builders.study_of(terminal.database, study_id).study_instance_uid
    found = {terminal.data("study", "show", name)["id"] for name in (study_id, study_id[:8], study_id[:13], uid)}
    assert found == {study_id}


def test_show_does_not_print_what_senders_wrote_about_series(terminal: Terminal) -> None:
    claim = builders.drafting(terminal.database)
    verdict = {"series_uid": "1.2.3.4.5.6", "description": "Canary's axial", "series_number": 2, "reason": "chosen"}
    with terminal.database.write() as session:
        studies.get(session, claim.study_id).choice = {"series": [verdict], "volumes": [], "unreadable": 0}
    choice = terminal.data("study", "show", claim.study_id)["choice"]
    assert choice["series"] == [{"series_number": 2, "reason": "chosen"}]


@pytest.mark.parametrize("name", ["1.2.3", "ffffffff", "00000000-0000-4000-8000-000000000000"])
def test_an_unknown_study_is_one_sentence(terminal: Terminal, name: str) -> None:
    error = terminal.run("study", "show", name).exception
    assert isinstance(error, NotFoundError) and "mu2 study list" in str(error)


def test_requeue_takes_one_failed_study_back_to_work_in_a_new_revision(terminal: Terminal) -> None:
    study_id = failed(terminal)
    assert terminal.data("study", "requeue", study_id[:8]) == [{"id": study_id, "requeued": True, "reason": ""}]
    assert status(terminal, study_id) == (StudyStatus.COMPLETE, 2)
    assert actions(terminal) == [("requeue", study_id)]


def test_requeue_dry_run_changes_nothing(terminal: Terminal) -> None:
    study_id = failed(terminal)
    assert terminal.data("study", "requeue", "--failed", "--dry-run")[0]["id"] == study_id
    assert status(terminal, study_id) == (StudyStatus.FAILED, 1)


@pytest.mark.parametrize("state", ["complete", "drafting", "removed"])
def test_requeue_dry_run_says_what_the_real_run_would_refuse(terminal: Terminal, state: str) -> None:
    make = {
        "complete": lambda: builders.completed(terminal.database),
        "drafting": lambda: builders.drafting(terminal.database).study_id,
        "removed": lambda: without_pixels(terminal),
    }
    study_id = make[state]()
    before = status(terminal, study_id)
    rehearsed = terminal.run("study", "requeue", study_id, "--dry-run", "--json")
    real = terminal.run("study", "requeue", study_id, "--json")
    assert rehearsed.exit_code == real.exit_code == 1
    (said,), (done,) = json.loads(rehearsed.stdout), json.loads(real.stdout)
    assert (said["would_be_requeued"], said["reason"]) == (False, done["reason"])
    assert status(terminal, study_id) == before and actions(terminal) == []


def test_requeue_dry_run_counts_only_what_would_be_taken(terminal: Terminal) -> None:
    gone, taken = without_pixels(terminal), skipped(terminal)
    result = terminal.run("study", "requeue", "--all-skipped", "--dry-run")
    assert result.exit_code == 1 and "1 of 2 would be put back to work" in result.stderr
    assert {status(terminal, study_id)[0] for study_id in (gone, taken)} == {StudyStatus.SKIPPED}


def test_requeue_of_many_asks_first(terminal: Terminal) -> None:
    ids = [failed(terminal), failed(terminal)]
    assert terminal.run("study", "requeue", "--failed", answer="n\n").exit_code == 1
    assert {status(terminal, study_id)[0] for study_id in ids} == {StudyStatus.FAILED}
    assert terminal.run("study", "requeue", "--failed", "--yes").exit_code == 0
    assert {status(terminal, study_id)[0] for study_id in ids} == {StudyStatus.COMPLETE}


def test_requeue_all_skipped_leaves_failed_ones(terminal: Terminal) -> None:
    left, taken = failed(terminal), skipped(terminal)
    assert [r["id"] for r in terminal.data("study", "requeue", "--all-skipped")] == [taken]
    assert status(terminal, left)[0] is StudyStatus.FAILED


def test_requeue_takes_a_study_from_its_worker_only_by_force(terminal: Terminal) -> None:
    study_id = builders.drafting(terminal.database).study_id
    refused = terminal.run("study", "requeue", study_id)
    assert refused.exit_code == 1 and "--force takes it from its worker" in refused.stdout
    assert terminal.run("study", "requeue", study_id, "--force").exit_code == 0
    assert status(terminal, study_id) == (StudyStatus.COMPLETE, 2)


def test_requeue_refuses_a_study_whose_pixels_are_gone(terminal: Terminal) -> None:
    study_id = failed(terminal)
    with terminal.database.write() as session:
        session.execute(sa.update(Instance).values(removed_at=studies.now()))
    refused = terminal.run("study", "requeue", study_id)
    assert refused.exit_code == 1 and "have the PACS send it again" in refused.stdout


@pytest.mark.parametrize("arguments", [[], ["x", "--failed"], ["x", "--since", "1h"]])
def test_requeue_of_nothing_or_of_two_things_is_wrong_usage(terminal: Terminal, arguments: list[str]) -> None:
    assert terminal.run("study", "requeue", *arguments).exit_code == 2


def test_export_writes_the_volume_that_the_model_saw(terminal: Terminal) -> None:
    import nibabel

    from worker.imaging import stored
    from worker.imaging.volume import Volume

    claim = builders.drafting(terminal.database)
    folder = terminal.home / "store" / "inputs" / "x"
    folder.mkdir(parents=True)
    hu = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    volume = Volume(
        hu=hu, affine=np.diag([3.0, 1.0, 1.0, 1.0])[:, [1, 2, 0, 3]], padding=None, repairs=("filled one slice",),
        regions=("chest",), series_uid="1.2", series_number=1, part="", instance_uids=("1.2.3",),
    )  # fmt: skip
    stored.save(volume, folder / "volume-01.npz")
    with terminal.database.write() as session:
        session.get_one(Study, claim.study_id).model_input = "inputs/x"
    out = terminal.home / "out.nii.gz"
    written = terminal.data("study", "export", claim.study_id, str(out))
    assert written == [{"file": str(out), "shape": [2, 3, 4], "repairs": ["filled one slice"]}]
    assert np.array_equal(nibabel.load(out).get_fdata().T, hu)
    assert actions(terminal) == [("study_export", claim.study_id)]


def test_export_of_two_volumes_numbers_the_files_the_main_one_first(terminal: Terminal) -> None:
    from worker.imaging import stored
    from worker.imaging.volume import Volume

    claim = builders.drafting(terminal.database)
    folder = terminal.home / "store" / "inputs" / "x"
    folder.mkdir(parents=True)
    for number in (1, 2):
        hu = np.full((2, 3, 3 + number), -1000, np.float32)
        stored.save(Volume(hu, np.eye(4)[:, [2, 1, 0, 3]], None), folder / f"volume-{number:02d}.npz")
    with terminal.database.write() as session:
        session.get_one(Study, claim.study_id).model_input = "inputs/x"
    written = terminal.data("study", "export", claim.study_id, str(terminal.home / "out.nii.gz"))
    assert [(entry["file"], entry["shape"]) for entry in written] == [
        (str(terminal.home / "out_1.nii.gz"), [2, 3, 4]),
        (str(terminal.home / "out_2.nii.gz"), [2, 3, 5]),
    ]
    assert (terminal.home / "out_2.nii.gz").stat().st_size > 0


def test_export_of_a_study_without_volume_says_why(terminal: Terminal) -> None:
    study_id = failed(terminal)
    error = terminal.run("study", "export", study_id, "out.nii").exception
    assert isinstance(error, StateError) and "is failed and has no volume" in str(error)
