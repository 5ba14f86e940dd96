"""Reports as PDF, A4: who, what, the text as it was signed, and a watermark on every page that nobody signed.

DejaVu Sans (in `fonts/`, under its own licence) writes Latin, Greek, Cyrillic, Arabic and Hebrew letters; for Chinese,
Japanese and Korean ones a font of the machine is taken (`pdf_fonts`). A letter that no font has is drawn as an empty box
and the page says which letter it was. Indic and other scripts that neither font has are such letters.
"""

from collections.abc import Iterator
from datetime import date, datetime

from fpdf import FPDF
from fpdf.enums import XPos, YPos

from worker.core.report import Report, ReportState, Section, section_lines
from worker.results import pdf_fonts

__all__ = ["write"]

FAMILY = "DejaVu"
FALLBACK = "Machine"
MARGIN_MM = 18
LINE_MM = 5.4
LABEL_MM = 30
MISSING = "\u25a1"  # stands for a letter that no font has
WATERMARKS = {ReportState.REJECTED: "REJECTED", ReportState.RETRACTED: "RETRACTED"}


def write(report: Report) -> bytes:
    """One version of a report as PDF bytes; equal reports give equal bytes.

    The document's own title and author name no patient, because viewers list them.
    """
    page = _Page(report)
    page.add_page()
    page.write_head()
    page.write_text()
    page.write_foot()
    return bytes(page.output())


class _Page(FPDF):
    """The document under construction."""

    def __init__(self, report: Report) -> None:
        super().__init__(format="A4")
        self._report = report
        self.set_title("CT report")
        self.set_creator("mu2")
        self.set_creation_date(report.status_time)
        self.set_margin(MARGIN_MM)
        self.set_auto_page_break(True, margin=MARGIN_MM + 6)
        self.add_font(FAMILY, "", pdf_fonts.REGULAR)
        self.add_font(FAMILY, "B", pdf_fonts.BOLD)
        self._fonts_of = pdf_fonts.choose(_texts(report))
        families = [FAMILY]  # its regular face stands in for what the bold one lacks
        for number, face in enumerate(self._fonts_of.faces):
            families.append(f"{FALLBACK}{number}")
            self.add_font(families[-1], "", face.path, collection_font_number=face.number)
        self.set_fallback_fonts(families, exact_match=False)
        if self._fonts_of.shaped:
            self.set_text_shaping(True)

    def header(self) -> None:
        """Draws the watermark of a text that nobody's signature stands behind."""
        mark = _watermark(self._report)
        if not mark:
            return
        with self.local_context():
            self.set_font(FAMILY, "B", 76)
            self.set_text_color(244, 208, 205)
            width = self.get_string_width(mark)
            middle_x, middle_y = self.w / 2, self.h / 2
            with self.rotation(35, middle_x, middle_y):
                self.text(middle_x - width / 2, middle_y + 12, mark)

    def footer(self) -> None:
        """Numbers the page, and repeats what the text is and whose it is: pages of two patients must not be mixed."""
        self.set_y(-MARGIN_MM)
        self.set_font(FAMILY, "", 8)
        patient = self._report.patient
        whose = ", ".join(filter(None, (patient.family_name, patient.given_name, patient.identifier)))
        told = f"{self._report.disclosure}\n{whose}  Page {self.page_no()} of {{nb}}".strip()
        self.multi_cell(0, 4, self._with_boxes(told), align="C")

    def write_head(self) -> None:
        """Title, disclosure, patient and order."""
        report = self._report
        self.set_font(FAMILY, "B", 15)
        self._line(f"CT report ({report.state.value.replace('_', ' ')})", 8)
        if report.disclosure:
            self.set_font(FAMILY, "B", 9)
            self._line(report.disclosure)
        self.ln(2)
        patient = report.patient
        names = " ".join(filter(None, (patient.given_name, patient.middle_name)))
        for label, value in (
            ("Patient", ", ".join(filter(None, (patient.family_name, names)))),
            ("Id", patient.identifier),
            ("Born", f"{_day(patient.birth_date)} {patient.sex}".strip()),
            ("Accession", report.order.accession),
            ("Procedure", report.order.procedure_text),
            ("Study time", _clock(report.study_time)),
            ("Version", f"{report.version}, {_clock(report.status_time)}"),
        ):
            self.set_font(FAMILY, "B", 9.5)
            self.cell(LABEL_MM, LINE_MM, label)
            self.set_font(FAMILY, "", 9.5)
            self._line(value or "-")
        self._name_missing_letters()
        self.ln(1)
        self.line(MARGIN_MM, self.get_y(), self.w - MARGIN_MM, self.get_y())

    def _name_missing_letters(self) -> None:
        if not self._fonts_of.missing:
            return
        codes = ", ".join(f"U+{ord(letter):04X}" for letter in self._fonts_of.missing)
        self.set_font(FAMILY, "B", 9.5)
        self.set_text_color(170, 0, 0)
        self._line(f"{MISSING} stands for letters that no font of this system has ({codes}): do not identify by them.")
        self.set_text_color(0, 0, 0)

    def write_text(self) -> None:
        """The sections, exactly the lines that a signature covers."""
        for section in Section:
            lines = section_lines(self._report.sentences, section)
            if not lines:
                continue
            self.ln(3)
            self.set_font(FAMILY, "B", 11)
            self._line(section.heading, 6.5)
            self.set_font(FAMILY, "", 10)
            for line in lines:
                self._line(line)

    def write_foot(self) -> None:
        """Who signed, or that nobody did."""
        report = self._report
        self.ln(5)
        self.set_font(FAMILY, "B", 10)
        if report.signer is None:
            self._line("Not signed.")
        else:
            name = f"{report.signer.given_name} {report.signer.family_name}".strip() or report.signer.identifier
            verb = "Was signed" if report.state is ReportState.RETRACTED else "Signed"
            self._line(f"{verb} by {name} ({report.signer.identifier}), {_clock(report.status_time)}")
        if report.reason:
            self.set_font(FAMILY, "", 10)
            self._line(f"Reason: {report.reason}")

    def _line(self, text: str, height: float = LINE_MM) -> None:
        self.multi_cell(0, height, self._with_boxes(text), align="L", new_x=XPos.LMARGIN, new_y=YPos.NEXT)

    def _with_boxes(self, text: str) -> str:
        return "".join(MISSING if c in self._fonts_of.missing else c for c in text)


def _texts(report: Report) -> Iterator[str]:
    """Everything on the page that people wrote."""
    patient, order = report.patient, report.order
    yield from (patient.family_name, patient.given_name, patient.middle_name, patient.identifier, patient.sex)
    yield from (order.accession, order.procedure_text, report.reason)
    yield from (sentence.text for sentence in report.sentences)
    if report.signer is not None:
        yield from (report.signer.given_name, report.signer.family_name, report.signer.identifier)


def _watermark(report: Report) -> str:
    if report.state in WATERMARKS:
        return WATERMARKS[report.state]
    return "" if report.signer is not None else "DRAFT"


def _day(value: date | None) -> str:
    return value.isoformat() if value else ""


def _clock(value: datetime | None) -> str:
    return value.strftime("%Y-%m-%d %H:%M %Z").strip() if value else ""
