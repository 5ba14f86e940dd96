"""A study under construction: series written as files, their headers read back."""

from dataclasses import dataclass, replace
from pathlib import Path

from tests.imaging import synthetic
from tests.imaging.synthetic import Scan
from worker.imaging import series
from worker.imaging.headers import Header, read_header
from worker.imaging.rules import ImagingRules
from worker.imaging.series import Choice

RULES = ImagingRules()


@dataclass
class Study:
    """Writes series of one study and reads their headers back."""

    folder: Path
    uids: dict[str, str]
    headers: list[Header]
    series_uids: list[str]

    def add(self, scan: Scan | None = None, **attributes: object) -> str:
        """One series; attributes are DICOM keywords. Returns its UID."""
        uids = {**self.uids, "series": synthetic.generate_uid()}
        number = len(self.series_uids) + 1
        scan = replace(scan or Scan(), attributes={"SeriesNumber": number, **attributes})
        paths = synthetic.write(scan, self.folder / str(number), uids)
        self.headers.extend(read_header(path) for path in paths)
        self.series_uids.append(uids["series"])
        return uids["series"]

    def choose(self, rules: ImagingRules = RULES) -> Choice:
        return series.choose(self.headers, rules)


def chosen(choice: Choice) -> list[str]:
    return [stack.header.series_uid for stack in choice.selected]


def reason(choice: Choice, series_uid: str) -> str:
    return next(verdict.reason for verdict in choice.verdicts if verdict.series_uid == series_uid)
