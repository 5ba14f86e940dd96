"""What the rules take out of a report, what they leave in it, and the names that a site lists."""

import pytest

from training.deidentify import deidentify
from training.phantoms import report
from training.phantoms.disease import draw_case

DATES = (
    *(
        "12-03-2024",
        "2023/03/12",
        "12-Mar-2024",
        "Mar-12-2024",
        "12MAR2024",
        "03/2024",
        "03.2024",
        "2024-03",
        "March 2023",
    ),
    *("12.3.", "12. 3. 2024", "12.03.24", "12-03-24", "12 March 24", "March 3, 2021", "3 March 2021", "March 3rd"),
    *(
        "the 12th of May",
        "9 Dec",
        "Mar '23",
        "12/Mar/2024",
        "5 MAY 2024",
        "3. März 2024",
        "12. Mai",
        "2024-03-12T14:35:22Z",
    ),
)
TIMES = ("14:35", "14:35:22", "2:35 pm", "3 p.m.", "1435 hrs", "14.35 Uhr")
IDENTIFIERS = (
    *("MRN is 12345", "MRN no. 12345", "MRN number 12345", "MRN12345", "Acc. No. 12345", "accession no. A123"),
    *("Pat-ID 12345", "Patient No 77", "ID 12345", "Fall-Nr. 4711", "UID 1.3.6.1.4", "1.2.840.10008", "Order #55"),
    *("1.2.840.113619.2.55.3", "Study UID: 1.2.3", "SSN 123-45-6789", "NHS 943 476 5919", "A1234567", "2024-03-1234"),
    *("Acc. No. 2024-03-1234", "DOB 12.3.1960"),
)
PHONES = (
    *(
        "+1.555.123.4567",
        "+41 44 123 45 67",
        "+49 30 1234567",
        "+49 (0)30 1234567",
        "(030) 12345-67",
        "0041 44 123 45 67",
    ),
    *("555.123.4567", "555-1234", "030/1234567", "06 12 34 56 78", "030 1234-567"),
)
NAMES = (
    *("DR. JONES", "Dr. van der Berg", "Dr. med. Meier", "Jones, MD", "John A. Smith, M.D., Ph.D.", "Prof. Dr. Meier"),
    *("dr. jones", "dr jones", "Dr. J.", "Dr. Anna Maria Canary", "PD Dr. h.c. Şahin", "Dr. de la Cruz", "Dr. O'Neil"),
    *(
        "Mr. Al-Hassan",
        "MR. SMITH",
        "MRS SMITH",
        "Frau Meier",
        "Mr. von und zu Stein",
        "Dr.Meier",
        "Prof. K. Müller-Lüdenscheidt",
    ),
)


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        *((text, "[date]") for text in DATES),
        *((text, "[time]") for text in TIMES),
        *((text, "[identifier]") for text in IDENTIFIERS),
        *((text, "[phone]") for text in PHONES),
        *((text, "[name]") for text in NAMES),
        ("a.b@c.de", "[email]"),
        ("https://pacs.example/7", "[link]"),
    ],
)
def test_what_points_to_a_person_goes_whole_and_the_words_around_it_stay(told: str, kind: str) -> None:
    kind = f"the {kind}" if told.startswith("the ") else kind
    assert deidentify(told) == kind
    assert deidentify(f"Seen with {told} and a nodule of 12 mm.") == f"Seen with {kind} and a nodule of 12 mm."
    assert deidentify(f"(see {told})\nNo effusion.") == f"(see {kind})\nNo effusion."


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("At 14:35 Ms. Jones called.", "At [time] [name] called."),
        ("Images of 12.3. and series of 03/2024.", "Images of [date] and series of [date]."),
        ("Compared with 12/03, as in March.", "Compared with [date], as in [date]."),
        ("Tel. 555 12 34, pager 4711", "Tel. [phone], pager [phone]"),
        ("Call 555-1234. 12 mm nodule.", "Call [phone]. 12 mm nodule."),
        ("Tel. 555 12 34 12 mm nodule", "Tel. [phone] 12 mm nodule"),
        ("Call 555-1234 x12", "Call [phone] x12"),
        ("MRN 4711-0815 on 12.03.2024.", "[identifier] on [date]."),
        ("Signed by Anna Canary", "Signed by [name]"),
        ("Patient: John Smith", "Patient: [name]"),
        ("Drs. Smith, Jones and Meier agree.", "[name] agree."),
        ("1/2/2024-3/4/2024", "[date]-[date]"),
        ("READ BY JONES, MD", "READ BY [name]"),
        ("DR. JONES REPORTS NO EFFUSION.", "[name] REPORTS NO EFFUSION."),
    ],
)
def test_rules_know_the_words_that_stand_beside(text: str, clean: str) -> None:
    assert deidentify(text) == clean


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("aged 94", "aged [age]"),
        ("age: 94", "age: [age]"),
        ("94yo", "[age]yo"),
        ("94 y.o.", "[age] y.o."),
        ("94F", "[age]F"),
        ("94 years", "[age] years"),
        ("ninety-four-year-old", "[age]-year-old"),
        ("A 92-year-old, not an 89-year-old.", "A [age]-year-old, not an 89-year-old."),
    ],
)
def test_ages_over_89_go(text: str, clean: str) -> None:
    assert deidentify(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "120-130 HU",
        "HU 100-200",
        "density of 120-130",
        "1200-1400 ml of ascites",
        "120 110 mm, volume 120 150 ml",
        "120-130 x 80 and 120-130 x 140 mm, 512 x 512",
        "between 120-130 and 140-150 HU",
        "T12 and L1, L1/2, L4/5, T11/12",
        "image 45, images 120-130, series 3 image 4/120, segment 4/8, segment IVa",
        "12.3 mm, 12 x 15 mm, 12.3 x 4.5 x 6.7 cm, 10-12-14 mm",
        "SUVmax 12.3. A ratio of 12.3. No lesion.",
        "40 HU, +40 HU, -100 to -50 HU, 120 kVp, 200-300 mAs",
        "Segment 7 may hold a cyst. It may 3 mm grow.",
        "A cyst of segment 7. May be a lesion.",
        "In this case no 12 mm nodule.",
        "Stable 2019-2021, ratio 2:1, at 3 o'clock, grade 3/5.",
        "Further work-up by MR. No effusion. MR angiography of MS plaques.",
        "Extension of 12 cm, 94 mm, 94 degrees.",
        "The 2nd and 3rd rib, 1. liver, 2. spleen.",
    ],
)
def test_measurements_levels_and_image_numbers_stay(text: str) -> None:
    assert deidentify(text) == text


def test_reports_that_name_nobody_stay_as_they_are() -> None:
    for seed in range(950_000_000, 950_000_040):
        text = report.write(draw_case(seed))
        assert deidentify(text) == text


@pytest.mark.parametrize(
    ("listed", "written"),
    [
        ("Müller", "Mueller"),
        ("Mueller", "Müller"),
        ("Müller", "Mu\N{COMBINING DIAERESIS}ller"),
        ("Mu\N{COMBINING DIAERESIS}ller", "MÜLLER"),
        ("Muller", "Müller"),
        ("Müller", "Muller"),
        ("Strauß", "STRAUSS"),
        ("Strauss", "Strauß"),
        ("André", "Andre"),
        ("Andre", "Andre\N{COMBINING ACUTE ACCENT}"),
        ("Sørensen", "Soerensen"),
        ("Lukasz", "Łukasz"),
        ("O'Neil", "O’Neil"),
        ("Anne Marie", "Anne-Marie"),
        ("van  Berg", "van\nBerg"),
    ],
)
def test_a_listed_name_goes_however_it_is_spelled(listed: str, written: str) -> None:
    assert (
        deidentify(f"{written}: no effusion, asked for {written}.", [listed])
        == "[name]: no effusion, asked for [name]."
    )


def test_a_listed_name_is_not_cut_out_of_a_longer_word() -> None:
    assert deidentify("Muller, Mullerian, Mülle\N{COMBINING ACUTE ACCENT}", ["Mulle"]) == "Muller, Mullerian, [name]"
