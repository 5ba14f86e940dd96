"""From the stored objects of a study to the series to report and, for every other, why not."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from pydicom.uid import UID

from worker.core.errors import GeometryError, NothingToReportError, PatientMismatchError, PixelDataError, StudyError
from worker.imaging import geometry
from worker.imaging.headers import CT_CLASSES, Header
from worker.imaging.rules import ImagingRules
from worker.imaging.slices import Slice
from worker.imaging.stacks import Stack, split


class Cause(StrEnum):
    """Why a series, or a part of one, is or is not reported."""

    CHOSEN = "chosen"
    KIND = "kind"  # never an axial CT: another class, a localizer, a MIP
    SIZE = "size"  # too few slices
    REGION = "region"  # shows nothing this site reports
    GEOMETRY = "geometry"  # its slices make no trustworthy volume
    PIXELS = "pixels"  # its pixels do not decode or are not in Hounsfield units
    SECOND = "second"  # reportable, but another series of the same region is preferred


@dataclass(frozen=True)
class Verdict:
    """What was decided about one series, or one part of a mixed series."""

    series_uid: str
    series_number: int | None
    part: str
    """What tells this part from the others of its series; empty for a whole series."""
    images: int
    """Slices of a CT part, objects of anything else."""
    regions: tuple[str, ...]
    cause: Cause
    reason: str
    """One sentence without anything a sender wrote."""
    description: str = field(default="", repr=False)
    """Series Description as sent; may name a patient, so it goes to the database and the page only."""

    @property
    def chosen(self) -> bool:
        """Whether it is reported."""
        return self.cause is Cause.CHOSEN


@dataclass(frozen=True)
class Choice:
    """The stacks to report, main one first, and a verdict on every series of the study."""

    selected: tuple[Stack, ...]
    verdicts: tuple[Verdict, ...]

    def refusal(self) -> StudyError:
        """The error that fits a choice without any selected stack.

        A series that could have been reported but for its geometry or pixels makes the study fail; else there is nothing to
        report in it.
        """
        for cause, error in ((Cause.GEOMETRY, GeometryError), (Cause.PIXELS, PixelDataError)):
            doubtful = [verdict for verdict in self.verdicts if verdict.cause is cause]
            if doubtful:
                return error(max(doubtful, key=lambda verdict: verdict.images).reason)
        if not self.verdicts:
            return NothingToReportError("The study holds no readable DICOM object.")
        reasons = "; ".join(
            f"series {_name(verdict.series_number, verdict.part)}: {verdict.reason}" for verdict in self.verdicts[:8]
        )
        more = f"; and {len(self.verdicts) - 8} more" if len(self.verdicts) > 8 else ""
        return NothingToReportError(f"No CT series to report. {reasons}{more}")


def choose(
    headers: Iterable[Header], rules: ImagingRules, refused: Mapping[str, tuple[Cause, str]] | None = None
) -> Choice:
    """Decide which stacks of a study to report; the order of the headers never changes the result.

    `refused` holds stacks, by key, that turned out not to build, with cause and reason; the next best takes their place.

    Raises PatientMismatchError when objects carry the ids of two patients.
    """
    headers = sorted(headers, key=lambda header: (header.sop_instance_uid, str(header.path)))
    _check_one_patient(headers)
    verdicts: list[Verdict] = []
    eligible: list[tuple[Stack, geometry.Grid]] = []
    for stack in split(headers, rules):
        problem = (refused or {}).get(stack.key) or _unfit(stack, rules)
        if problem is None:
            try:
                eligible.append((stack, geometry.plan(stack.slices, rules)))
            except GeometryError as error:
                problem = (Cause.GEOMETRY, str(error))
        if problem is not None:
            verdicts.append(_verdict(stack, *problem))
    ranks = {stack.key: _rank(stack, grid, rules) for stack, grid in eligible}
    eligible.sort(key=lambda pair: ranks[pair[0].key])
    selected: list[Stack] = []
    for stack, grid in eligible:
        better = _already_shown(stack, selected)
        if better is None:
            selected.append(stack)
            verdicts.append(_verdict(stack, Cause.CHOSEN, _describe(stack, grid)))
        else:
            why = _difference(ranks[better.key], ranks[stack.key], rules)
            name = _name(better.header.series_number, better.part)
            verdicts.append(_verdict(stack, Cause.SECOND, f"reportable, but series {name} is preferred: {why}."))
    verdicts.sort(key=lambda verdict: _series_order(verdict.series_number, verdict.series_uid, verdict.part))
    return Choice(tuple(selected), tuple(verdicts))


def studies(headers: Iterable[Header]) -> list[tuple[str, list[Header]]]:
    """Study Instance UID and headers of each study, in the order of the UIDs; without a UID, one study a patient."""
    by_study: dict[tuple[str, str], list[Header]] = {}
    for header in headers:
        by_study.setdefault((header.study_uid, "" if header.study_uid else header.patient_id), []).append(header)
    return [(study_uid, by_study[study_uid, patient]) for study_uid, patient in sorted(by_study)]


def _check_one_patient(headers: Sequence[Header]) -> None:
    patients: dict[str, set[str]] = {}
    for header in headers:
        if header.patient_id:
            patients.setdefault(header.study_uid, set()).add(header.patient_id)
    if any(len(ids) > 1 for ids in patients.values()):
        raise PatientMismatchError(
            "Objects of one study carry different patient ids. Correct the ids at the sender, then send the study again."
        )


def _unfit(stack: Stack, rules: ImagingRules) -> tuple[Cause, str] | None:
    """Why a stack is never reported; None when it may be."""
    kind = _wrong_kind(stack, rules)
    if kind:
        return Cause.KIND, kind
    if len(stack.slices) < rules.minimum_slices:
        return Cause.SIZE, f"too few slices: {len(stack.slices)} of at least {rules.minimum_slices}."
    if stack.lacking:
        return Cause.GEOMETRY, stack.lacking
    try:
        normal, _, _ = geometry.slice_axes(stack.slices)
        geometry.positions_mm(stack.slices, normal)
    except GeometryError as error:
        return Cause.GEOMETRY, str(error)
    lean = math.degrees(math.acos(min(1.0, abs(float(normal[2])))))
    if lean > rules.maximum_plane_degrees:
        plane = ("sagittal", "coronal")[int(np.argmax(np.abs(normal[:2])))]
        return Cause.KIND, f"{plane} or oblique, not axial ({lean:.0f} degrees off)."
    units = _wrong_units(stack.slices)
    if units:
        return Cause.PIXELS, units
    if stack.regions and not set(stack.regions) & set(rules.reported_regions):
        return Cause.REGION, f"shows {', '.join(stack.regions)}, which this site does not report."
    return None


def _wrong_kind(stack: Stack, rules: ImagingRules) -> str:
    header = stack.header
    if header.sop_class_uid not in CT_CLASSES:
        uid = UID(header.sop_class_uid)
        name = uid.name if uid.name != header.sop_class_uid else "an object of a private or unknown class"
        return f"not a CT image but {name}."
    if header.modality not in ("CT", ""):
        return "a CT object of another modality than CT."
    if header.samples != 1 or header.photometric not in ("MONOCHROME1", "MONOCHROME2", ""):
        return "a colour picture, not CT values."
    never = rules.never_in(stack.slices[0].image_type if stack.slices else ())
    if never:
        return f"image type {never}."
    for pattern in rules.never_descriptions:
        if re.search(pattern, header.series_description, re.IGNORECASE):
            return "its description names a localizer, dose report, projection, rendering or monitoring scan."
    return ""


def _wrong_units(pieces: Sequence[Slice]) -> str:
    """Why values are not Hounsfield units, by their headers; empty when they may be.

    Rescale Type US is "unspecified" (PS3.3 C.11.1.1.2): converters write it for original images whose type nobody stated.
    """
    if any(piece.slope is None or piece.intercept is None for piece in pieces):
        return (
            "Slices carry no Rescale Slope or Intercept (0028,1053 and 0028,1052); their unit is unknown. "
            "Send the series with them."
        )
    if any(piece.slope == 0 for piece in pieces):
        return "The Rescale Slope of the slices is 0; their values are lost. Correct (0028,1053) at the sender."
    for piece in pieces:
        unspecified = piece.rescale_type.upper() == "US" and piece.image_type[:1] == ("ORIGINAL",)
        if piece.rescale_type.upper() not in ("", "HU") and not unspecified:
            return "Values are not Hounsfield units, by their Rescale Type (0028,1054). Send a series that is."
    return ""


def _rank(stack: Stack, grid: geometry.Grid, rules: ImagingRules) -> tuple[object, ...]:
    """Sort key of a reportable stack: smaller is better, in the order of `rules.preferences`."""
    off = abs(stack.thickness_mm - rules.wanted_slice_mm)
    newest = max(piece.acquired for piece in stack.slices)
    values: dict[str, object] = {
        "coverage": -len(set(stack.regions) & set(rules.reported_regions)),
        "kernel": rules.kernels.index(stack.kernel_class)
        if stack.kernel_class in rules.kernels
        else len(rules.kernels),
        "complete": grid.missing > 0,
        "thickness": (round(off, 2), round(stack.thickness_mm, 2)),
        "original": stack.slices[0].image_type[:1] != ("ORIGINAL",),
        "latest": (not newest, tuple(-ord(letter) for letter in newest.ljust(len("YYYYMMDDHHMMSS.ffffff"), "0"))),
        "most_slices": -len(stack.slices),
    }
    header = stack.header
    return (
        *(values[name] for name in rules.preferences),
        _series_order(header.series_number, header.series_uid, stack.part),
    )


def _series_order(number: int | None, uid: str, part: str) -> tuple[float, str, str]:
    return (math.inf if number is None else float(number), uid, part)


_BETTER = {
    "kernel": "its kernel suits better",
    "coverage": "it shows more of what is reported here",
    "complete": "it has no missing slices",
    "thickness": "its slices are nearer the wanted thickness",
    "original": "it is original, not derived",
    "latest": "it was acquired later",
    "most_slices": "it has more slices",
}
"""What a preference found better about the series that won."""


def _difference(better: tuple[object, ...], worse: tuple[object, ...], rules: ImagingRules) -> str:
    """The first preference by which two ranks differ, in words."""
    for name, ours, theirs in zip(rules.preferences, better, worse, strict=False):  # ranks end in a tie-break
        if ours != theirs:
            return _BETTER[name]
    return "nothing but its number tells them apart"


def _already_shown(stack: Stack, selected: Sequence[Stack]) -> Stack | None:
    """The selected stack that shows what this one shows; None when it adds tissue or a region."""
    if not selected:
        return None
    nearest = max(selected, key=lambda other: (_overlap(stack, other), len(set(stack.regions) & set(other.regions))))
    overlap = _overlap(stack, nearest)
    if 0 <= overlap < 0.2:
        return None
    covered = {region for other in selected for region in other.regions}
    if overlap < 0.8 and not covered.issuperset(stack.regions):
        return None
    return nearest


def _overlap(stack: Stack, other: Stack) -> float:
    """Share of a stack's length that another of the same frame of reference also shows; -1 when they cannot be compared."""
    if stack.header.frame_of_reference != other.header.frame_of_reference or not stack.header.frame_of_reference:
        return -1.0
    low = max(stack.extent_mm[0], other.extent_mm[0])
    high = min(stack.extent_mm[1], other.extent_mm[1])
    return max(0.0, high - low) / max(stack.length_mm, 1e-6)


def _describe(stack: Stack, grid: geometry.Grid) -> str:
    kernel = {"soft": "soft-tissue kernel", "unknown": "kernel of unknown purpose"}.get(
        stack.kernel_class, f"{stack.kernel_class} kernel"
    )
    shows = f", shows {', '.join(stack.regions)}" if stack.regions else ""
    return f"axial, {kernel}, {stack.thickness_mm:g} mm thick every {grid.spacing_mm[0]:.2f} mm{shows}."


def _verdict(stack: Stack, cause: Cause, reason: str) -> Verdict:
    header = stack.header
    return Verdict(
        series_uid=header.series_uid,
        series_number=header.series_number,
        part=stack.part,
        images=len(stack.slices) or stack.objects,
        regions=stack.regions,
        cause=cause,
        reason=reason,
        description=header.series_description,
    )


def _name(number: int | None, part: str) -> str:
    return f"{'without number' if number is None else number} {part}".strip()
