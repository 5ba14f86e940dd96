"""Split the objects of a study into stacks: slices that may share one volume."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from pydicom.uid import UID

from worker.imaging import geometry, kernels, regions
from worker.imaging.headers import CT_CLASSES, Header
from worker.imaging.rules import ImagingRules
from worker.imaging.slices import Slice


@dataclass(frozen=True)
class Stack:
    """Slices of one size, orientation and phase that may make one volume."""

    header: Header
    """Of the object with the smallest SOP Instance UID."""
    slices: tuple[Slice, ...]
    part: str = ""
    lossy: bool = False
    objects: int = 1
    """Objects it was found in."""
    lacking: str = ""
    """Why a part of it never came, in a sentence; empty when nothing says so."""

    @property
    def key(self) -> str:
        """Tells the stack from every other of its study, equal in every run; by the file, since UIDs may be absent."""
        return f"{self.header.path}#{self.slices[0].frame if self.slices else 0}"

    @property
    def length_mm(self) -> float:
        """From the first slice's centre to the last one's, along the normal."""
        low, high = self.extent_mm
        return high - low

    @cached_property
    def extent_mm(self) -> tuple[float, float]:
        """Lowest and highest position along the patient's long axis, LPS; (0, 0) without geometry."""
        heights = [piece.position[2] for piece in self.slices if piece.position]
        return (min(heights), max(heights)) if heights else (0.0, 0.0)

    @cached_property
    def regions(self) -> tuple[str, ...]:
        """Body regions it shows; () when nothing tells."""
        header = self.header
        return regions.shown(
            header.body_part,
            header.series_description,
            (header.protocol_name, header.study_description),
            self.length_mm,
        )

    @property
    def kernel_class(self) -> str:
        """What the reconstruction kernel is made for."""
        return kernels.kernel_class(self.slices[0].kernel, self.header.series_description)

    @property
    def thickness_mm(self) -> float:
        """Median nominal thickness, else the mean distance between slices."""
        known = sorted(piece.thickness_mm for piece in self.slices if piece.thickness_mm)
        return known[len(known) // 2] if known else self.length_mm / max(1, len(self.slices) - 1)


def split(headers: Sequence[Header], rules: ImagingRules) -> list[Stack]:
    """Split objects into stacks: by series, then by what cannot share a volume, then by phase where positions repeat."""
    by_series: dict[tuple[str, ...], list[Header]] = {}
    for header in headers:
        by_series.setdefault(_series_key(header), []).append(header)
    found: list[Stack] = []
    for key in sorted(by_series):
        twins = [other for other in by_series if other[:-1] == key[:-1] and other[-1] in CT_CLASSES]
        kind = UID(key[-1]).name.removesuffix(" Storage") if len(twins) > 1 and key in twins else ""
        found.extend(_stacks_of_series(by_series[key], rules, kind))
    return found


def _series_key(header: Header) -> tuple[str, ...]:
    """Series Instance UID where there is one, else what the object has in common with its neighbours."""
    kind = header.sop_class_uid
    if header.series_uid:
        return ("", header.study_uid, header.series_uid, kind)
    number = "" if header.series_number is None else f"{header.series_number:012d}"
    return ("~", header.study_uid, header.frame_of_reference, number, header.series_description, kind)


def _stacks_of_series(headers: Sequence[Header], rules: ImagingRules, kind: str) -> list[Stack]:
    """Stacks of the objects of one class of one series; `kind` names the class where the series has CT objects of others."""
    first = headers[0]
    if first.sop_class_uid not in CT_CLASSES:
        return [Stack(first, (), objects=len(headers))]
    owners = {(piece.path, piece.frame): header for header in headers for piece in header.slices}
    incomplete = _incomplete_concatenations(headers)
    pieces = [piece for header in headers for piece in header.slices]
    groups: dict[tuple[object, ...], list[Slice]] = {}
    orientations: list[tuple[float, ...]] = []
    spacings: list[tuple[float, ...]] = []
    for piece in sorted(
        pieces, key=lambda piece: (piece.orientation or (), piece.spacing or (), piece.sop_instance_uid, piece.frame)
    ):
        key = (
            piece.pixels.rows,
            piece.pixels.columns,
            _nearest(piece.spacing, spacings, _SAME),
            _nearest(piece.orientation, orientations, _NEARLY_SAME),
            piece.position is None,
            piece.image_type[:3],
            not rules.never_in(piece.image_type),
            piece.kernel,
            owners[piece.path, piece.frame].frame_of_reference,
            owners[piece.path, piece.frame].photometric,
        )
        groups.setdefault(key, []).append(piece)
    turned = [part for group in groups.values() for part in _split_orientations(group)]
    parts = [(label, part) for group in turned for label, part in split_phases(group)]
    parts.sort(key=lambda pair: (-len(pair[1]), pair[0], pair[1][0].sop_instance_uid, pair[1][0].frame))
    found = []
    for index, (label, part) in enumerate(parts, 1):
        header = owners[part[0].path, part[0].frame]
        name = "" if len(parts) == 1 else f"part {index}" + (f" ({label})" if label else "")
        name = ", ".join(filter(None, (kind, name)))
        sources = {piece.path: owners[piece.path, piece.frame] for piece in part}
        lossy = any(source.lossy for source in sources.values())
        lacking = " ".join(sorted({incomplete.get(source.concatenation, "") for source in sources.values()} - {""}))
        found.append(Stack(header, tuple(part), name, lossy, len(sources), lacking))
    return found


def _incomplete_concatenations(headers: Sequence[Header]) -> dict[str, str]:
    """By its UID, what lacks of a multi-frame object that was sent in several (PS3.3 C.7.6.16.2.2.4)."""
    found: dict[str, str] = {}
    for uid in {header.concatenation for header in headers if header.concatenation}:
        members = [header for header in headers if header.concatenation == uid]
        numbers = {member.concatenation_number for member in members}
        total = max(*numbers, *(member.concatenation_total for member in members))
        if len(numbers) < total:
            found[uid] = (
                f"{len(numbers)} of the {total} objects of one concatenation arrived. "
                "Send the others and requeue the study."
            )
    return found


_SAME = 1e-3
"""Orientations and spacings that differ by no more in any component are one."""
_NEARLY_SAME = 0.01
"""Orientations that differ by no more (half a degree) may be one scan's, whose orientation jitters from slice to slice."""


def _nearest(values: tuple[float, ...] | None, seen: list[tuple[float, ...]], tolerance: float) -> int:
    """Index of an orientation or spacing among those seen so far, within a tolerance a component; -1 when absent."""
    if values is None:
        return -1
    for index, anchor in enumerate(seen):
        if max(abs(a - b) for a, b in zip(anchor, values, strict=True)) <= tolerance:
            return index
    seen.append(values)
    return len(seen) - 1


def _split_orientations(pieces: list[Slice]) -> list[list[Slice]]:
    """Split slices of nearly one orientation into scans that lie one above another, each of one orientation.

    Slices of several orientations that lie between each other are one scan. To take those of one orientation alone would
    report on a part of the slices as if it were all; `geometry.plan` averages the orientations or refuses them.
    """
    seen: list[tuple[float, ...]] = []
    parts: dict[int, list[Slice]] = {}
    for piece in pieces:
        parts.setdefault(_nearest(piece.orientation, seen, _SAME), []).append(piece)
    if len(parts) == 1 or min(map(len, parts.values())) < 3 or any(piece.position is None for piece in pieces):
        return [pieces]
    normal = _normal(pieces)
    ranges = sorted((depths[0], depths[-1]) for depths in (_depths(part, normal) for part in parts.values()))
    if any(after[0] < before[1] for before, after in pairwise(ranges)):
        return [pieces]
    return list(parts.values())


_MOST_ACQUISITIONS = 8
"""More than this are rotations of one scan, not scans."""
_SAME_STEP_MM = 0.1

_PHASES: tuple[tuple[str, str], ...] = (
    ("temporal_position", "temporal position"),
    ("cardiac_phase", "cardiac phase"),
    ("acquisition", "acquisition"),
    ("stack", "stack"),
    ("image_type", "image type"),
    ("kilovolts", "tube voltage"),
    ("acquired", "acquisition time"),
    ("dimensions", "dimension"),
    ("container", "multi-frame object"),
    ("folder", "folder"),
)
"""What may tell two images at one position, or two scans of one place, apart: field of a slice, words for it.

The first that does is taken; why each, and why in this order: docs/decisions/2026-11-24-stacks.md.
"""


_WITHIN_ONE_SCAN = "image_type"
"""May change from slice to slice of one scan: GE adds ADD to summed slices."""


def split_phases(pieces: Sequence[Slice]) -> list[tuple[str, list[Slice]]]:
    """Split slices that share positions by phase, acquisition, stack or energy; returns (label, slices) of each part.

    Slices that nothing tells apart stay together: they are copies, or an error that building the volume finds. A series
    that merely counts its rotations as acquisitions stays whole, since no position repeats and no two overlap.
    """
    pieces = sorted(pieces, key=lambda piece: (piece.sop_instance_uid, piece.frame, str(piece.path)))
    if any(piece.position is None or piece.orientation is None for piece in pieces):
        return [("", pieces)]
    normal = _normal(pieces)
    crowd = _most_at_one_position(pieces, normal)
    if crowd == 1:
        found = (_split_scans(pieces, normal, name, words) for name, words in _PHASES if name != _WITHIN_ONE_SCAN)
        return next(filter(None, found), [("", pieces)])
    for name, words in _PHASES:
        parts: dict[object, list[Slice]] = {}
        for piece in pieces:
            parts.setdefault(getattr(piece, name), []).append(piece)
        if not 1 < len(parts) <= max(2, crowd * 2):
            continue
        if all(_most_at_one_position(part, normal) < crowd for part in parts.values()):
            ordered = sorted(parts.items(), key=lambda item: str(item[0]))
            return [
                (f"{words} {index}" + (f", {label}" if label else ""), rest)
                for index, (_, part) in enumerate(ordered, 1)
                for label, rest in split_phases(part)
            ]
    return [("", pieces)]


def _most_at_one_position(pieces: Sequence[Slice], normal: geometry.Vector) -> int:
    depths = _depths(pieces, normal)
    starts = np.flatnonzero(np.diff(depths, prepend=-math.inf) > 0.01)
    return int(np.diff(starts, append=len(depths)).max())


def _depths(pieces: Sequence[Slice], normal: geometry.Vector) -> geometry.Vector:
    return np.sort(np.array([piece.position for piece in pieces]) @ normal)


def _normal(pieces: Sequence[Slice]) -> geometry.Vector:
    """Normal of the slices' mean orientation."""
    column_axis, row_axis = np.split(np.mean(sorted(piece.orientation or () for piece in pieces), axis=0), 2)
    return np.cross(column_axis, row_axis)


def _split_scans(pieces: list[Slice], normal: geometry.Vector, name: str, words: str) -> list[tuple[str, list[Slice]]]:
    """Split slices, none at one position, whose scans lie in each other's gaps or far apart; [] when they do not.

    `name` is the field of a slice that tells scans apart. Two breath-holds that overlap must not be interleaved into one
    anatomy, not even where their slices happen to alternate evenly; a scanner that counts each rotation of a
    step-and-shoot scan as an acquisition must not be split.
    """
    parts: dict[object, list[Slice]] = {}
    for piece in pieces:
        parts.setdefault(getattr(piece, name), []).append(piece)
    if not 1 < len(parts) <= _MOST_ACQUISITIONS or min(map(len, parts.values())) < 3:
        return []
    ranges = sorted((_depths(part, normal) for part in parts.values()), key=lambda depths: (depths[0], depths[-1]))
    overlap = any(after[0] < before[-1] for before, after in pairwise(ranges))
    regular = all(np.ptp(np.diff(depths)) <= _SAME_STEP_MM for depths in ranges)
    apart = max(float(after[0] - before[-1]) for before, after in pairwise(ranges))
    widest = max(float(np.diff(depths).max()) for depths in ranges)
    if (overlap and regular) or apart > 5 * widest:
        return [(f"{words} {index}", parts[value]) for index, value in enumerate(sorted(parts, key=str), 1)]
    return []
