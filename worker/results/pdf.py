"""Reports as PDF, A4: who, what, the text as it was signed, and a watermark on every page that nobody signed.

DejaVu Sans (in `fonts/`, under its own licence) writes Latin, Greek, Cyrillic, Arabic and Hebrew letters; a letter it
does not have is drawn as an empty box, never left out. Text is not shaped, so joined scripts stand letter by letter.
"""

from datetime import date, datetime
from pathlib import Path

from fpdf import FPDF
from fpdf.enums import XPos, YPos
from fpdf.fonts import TTFFont

from worker.core.report import Report, ReportState, Section, section_lines

__all__ = ["write"]

FONTS = Path(__file__).parent / "fonts"
FAMILY = "DejaVu"
MARGIN_MM = 18
LINE_MM = 5.4
LABEL_MM = 30
MISSING = "\u25a1"  # stands for a letter that the font does not have
WATERMARKS = {ReportState.REJECTED: "REJECTED", ReportState.RETRACTED: "RETRACTED"}
TITLES = {
    Section.FINDINGS: "Findings",
    Section.IMPRESSION: "Impression",
    Section.RECOMMENDATIONS: "Recommendations",
    Section.ADDENDUM: "Addendum",
}


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
        self.add_font(FAMILY, "", FONTS / "DejaVuSans.ttf")
        self.add_font(FAMILY, "B", FONTS / "DejaVuSans-Bold.ttf")

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
        """Numbers the page and repeats whose report it is not: an unsigned one says so again."""
        self.set_y(-MARGIN_MM)
        self.set_font(FAMILY, "", 8)
        told = self._report.disclosure or ""
        self.multi_cell(0, 4, f"{told}  Page {self.page_no()}".strip(), align="C")

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
        self.ln(1)
        self.line(MARGIN_MM, self.get_y(), self.w - MARGIN_MM, self.get_y())

    def write_text(self) -> None:
        """The sections, exactly the lines that a signature covers."""
        for section in Section:
            lines = section_lines(self._report.sentences, section)
            if not lines:
                continue
            self.ln(3)
            self.set_font(FAMILY, "B", 11)
            self._line(TITLES[section], 6.5)
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
        font = self.current_font
        if isinstance(font, TTFFont):
            text = "".join(c if ord(c) in font.cmap else MISSING for c in text)
        self.multi_cell(0, height, text, align="L", new_x=XPos.LMARGIN, new_y=YPos.NEXT)


def _watermark(report: Report) -> str:
    if report.state in WATERMARKS:
        return WATERMARKS[report.state]
    return "" if report.signer is not None else "DRAFT"


def _day(value: date | None) -> str:
    return value.isoformat() if value else ""


def _clock(value: datetime | None) -> str:
    return value.strftime("%Y-%m-%d %H:%M %Z").strip() if value else ""
