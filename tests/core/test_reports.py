"""A version becomes the value that the writers take."""

import pytest

from tests.core.builders import drafted
from worker.core import reports, studies
from worker.core.arrivals import CodedProcedure
from worker.core.database import Database
from worker.core.records import ReportVersion


def value(database: Database, version_id: str, **options: object):
    """The report as the writers get it."""
    with database.read() as session:
        return reports.to_value(session, version_id, **options)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("DOE^JANE", ("DOE", "JANE", "", "", "")),
        ("Doe^John^Quincy^Dr^Jr", ("Doe", "John", "Quincy", "Dr", "Jr")),
        ("=王^小东=", ("王", "小东", "", "", "")),
        ("Yamada^Tarou=山田^太郎=やまだ^たろう", ("Yamada", "Tarou", "", "", "")),
        ("", ("", "", "", "", "")),
    ],
)
def test_patient_name_is_the_first_group_that_holds_anything(
    sqlite_database: Database, name: str, parts: tuple[str, ...]
) -> None:
    patient = value(sqlite_database, drafted(sqlite_database, patient_name=name)).patient
    assert (patient.family_name, patient.given_name, patient.middle_name, patient.prefix, patient.suffix) == parts


def test_accession_stands_for_a_filler_number_that_dicom_does_not_name(sqlite_database: Database) -> None:
    assert value(sqlite_database, drafted(sqlite_database, accession="A-7")).order.filler == "A-7"


def test_procedure_code_comes_from_the_description_else_from_the_regions(sqlite_database: Database) -> None:
    version_id = drafted(sqlite_database, study_description="CT Thorax")
    with sqlite_database.write() as session:
        study_id = session.get_one(ReportVersion, version_id).report.study_id
        studies.get(session, study_id).choice = {"volumes": [{"regions": ["chest"]}]}
    codes = {"chest": "24627-2^CT Chest^LN"}
    assert value(sqlite_database, version_id, procedure_codes=codes).order.procedure_code == "24627-2"
    codes["ct thorax"] = "X1^Site chest^L"
    assert value(sqlite_database, version_id, procedure_codes=codes).order.procedure_code == "X1"
    order = value(sqlite_database, version_id).order
    assert (order.procedure_code, order.procedure_text, order.procedure_system) == ("CT", "CT Thorax", "L")


CODED = CodedProcedure("3021-6", "CT THORAX W", "99SITE")


def test_procedure_code_of_dicom_comes_after_the_description_and_before_the_regions(sqlite_database: Database) -> None:
    version_id = drafted(sqlite_database, study_description="CT Thorax", procedure=CODED)
    with sqlite_database.write() as session:
        study_id = session.get_one(ReportVersion, version_id).report.study_id
        studies.get(session, study_id).choice = {"volumes": [{"regions": ["chest"]}]}
    codes = {"chest": "24627-2^CT Chest^LN"}
    order = value(sqlite_database, version_id, procedure_codes=codes).order
    assert (order.procedure_code, order.procedure_text, order.procedure_system) == ("3021-6", "CT THORAX W", "99SITE")
    codes["ct thorax"] = "X1^Site chest^L"
    assert value(sqlite_database, version_id, procedure_codes=codes).order.procedure_code == "X1"


def test_code_without_scheme_or_words_is_a_local_one_with_the_description(sqlite_database: Database) -> None:
    version_id = drafted(sqlite_database, study_description="CT Thorax", procedure=CodedProcedure("7"))
    order = value(sqlite_database, version_id).order
    assert (order.procedure_code, order.procedure_text, order.procedure_system) == ("7", "CT Thorax", "L")


def test_who_asked_for_the_study_is_the_provider_before_who_referred_the_patient(sqlite_database: Database) -> None:
    both = {"requesting_physician": "ASKS^ANN", "referring_physician": "REFERS^ROY"}
    order = value(sqlite_database, drafted(sqlite_database, procedure_reason="cough", visit="V-1", **both)).order
    assert (order.ordering_provider, order.reason, order.visit) == ("ASKS^ANN", "cough", "V-1")
    alone = drafted(sqlite_database, referring_physician="REFERS^ROY")
    assert value(sqlite_database, alone).order.ordering_provider == "REFERS^ROY"
