"""`mu2 volume`: any folder of DICOM files to Hounsfield volumes, without a database."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.terminal import Json, note, print_facts, print_json, print_table, show

if TYPE_CHECKING:
    from worker.core.errors import FinalError
    from worker.imaging.headers import Header
    from worker.imaging.rules import ImagingRules
    from worker.imaging.series import Verdict
    from worker.imaging.study import StudyVolumes
    from worker.imaging.volume import Volume

_ENDINGS = (".nii.gz", ".nii")
_MOST_NOTES = 20


def volume_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", exists=True, file_okay=False, help="Folder of DICOM files.")],
    out: Annotated[Path | None, typer.Argument(metavar="OUT.nii.gz", help="NIfTI file to write.")] = None,
    as_json: Json = False,
) -> None:
    """Chooses the series to report in a folder and builds its volume: choice, repairs, refusals, and NIfTI if asked for.

    With several volumes each file gets a number, the main one 1. Exit code 1 when a study of the folder gives no volume.
    """
    from worker import pipeline
    from worker.core import logs, settings
    from worker.imaging import series
    from worker.imaging.folder import read

    if out is not None and not out.name.endswith(_ENDINGS):
        raise typer.BadParameter("the file's name ends in .nii or .nii.gz", param_hint="OUT")
    if out is not None and out.is_dir():
        raise typer.BadParameter("it is a folder; name a file", param_hint="OUT")
    if out is not None and not out.parent.is_dir():
        raise typer.BadParameter("the folder it shall lie in is not there; make it first", param_hint="OUT")
    logs.configure("cli", "error")  # pydicom's warnings quote the bytes they stumble over
    rules = pipeline.rules(settings.current().imaging)
    found, unreadable = read(folder)
    volumes: list[dict[str, Any]] = []
    verdicts: list[dict[str, Any]] = []
    refusals: list[dict[str, Any]] = [] if found else [_refusal("", series.choose([], rules).refusal())]
    with _staged(out) as unfinished:
        for study_uid, members in series.studies(found):
            made, facts = _made(members, rules, unfinished, first=len(volumes) + 1)
            verdicts.extend({"study_uid": study_uid, **_told(verdict)} for verdict in made.verdicts)
            volumes.extend({"study_uid": study_uid, **fact} for fact in facts)
            if made.refusal is not None:
                refusals.append(_refusal(study_uid, made.refusal))
        if out is not None:
            _name_files(volumes, out)
    report = {
        "volumes": volumes,
        "series": verdicts,
        "refusals": refusals,
        "unreadable": [{"file": _legible(bad.path.relative_to(folder)), "reason": bad.reason} for bad in unreadable],
    }
    _tell(report, as_json)
    if refusals:
        raise typer.Exit(1)


@contextmanager
def _staged(out: Path | None) -> Iterator[Path | None]:
    """A name in a folder beside OUT for what is under way: how many volumes there are decides the names, and comes last."""
    if out is None:
        yield None
        return
    from worker.core.errors import StoreUnavailableError

    try:
        folder = tempfile.TemporaryDirectory(dir=out.parent, prefix=".volumes-")
    except OSError as error:
        raise StoreUnavailableError.of("the NIfTI file cannot be written", error) from error
    with folder as name:
        yield Path(name, out.name)


def _name_files(volumes: list[dict[str, Any]], out: Path) -> None:
    """Gives finished files their names: OUT itself, or OUT with a number each."""
    from worker.imaging import nifti

    for number, volume in enumerate(volumes, 1):
        volume["file"] = volume["file"].replace(out if len(volumes) == 1 else nifti.numbered(out, number))


def _legible(path: Path) -> str:
    """A file's name as text, whatever bytes it is made of."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def _made(
    headers: "list[Header]", rules: "ImagingRules", out: Path | None, first: int
) -> "tuple[StudyVolumes, list[dict[str, Any]]]":
    """What was decided about one study, and its volumes' facts and files; the volumes themselves are let go."""
    made = _build(headers, rules)
    facts = [
        {**_facts(volume), "file": _write(volume, out, number)} for number, volume in enumerate(made.volumes, first)
    ]
    return replace(made, volumes=()), facts


def _build(headers: "list[Header]", rules: "ImagingRules") -> "StudyVolumes":
    """The volumes of one study; a study of two patients is a refusal like any other here."""
    from worker.core.errors import PatientMismatchError
    from worker.imaging import series, study

    try:
        return study.assemble(study.Examination(tuple(headers), series.choose(headers, rules), ()), rules)
    except PatientMismatchError as error:
        return study.StudyVolumes((), (), (), error)


def _refusal(study_uid: str, error: "FinalError") -> dict[str, str]:
    return {"study_uid": study_uid, "error": type(error).__name__, "reason": str(error)}


def _write(volume: "Volume", out: Path | None, number: int) -> Path | None:
    """Writes a volume to OUT with its number; returns the file, or None without OUT."""
    if out is None:
        return None
    from worker.imaging import nifti

    target = nifti.numbered(out, number)
    nifti.write(volume, target)
    return target


def _told(verdict: "Verdict") -> dict[str, Any]:
    """A verdict without the sender's description, which may name a patient."""
    return {name: value for name, value in asdict(verdict).items() if name != "description"}


def _facts(volume: "Volume") -> dict[str, Any]:
    return {
        "series_uid": volume.series_uid,
        "series_number": volume.series_number,
        "part": volume.part,
        "regions": volume.regions,
        "shape": volume.hu.shape,
        "spacing_mm": [round(mm, 4) for mm in volume.spacing_mm],
        "affine": volume.affine.round(6).tolist(),
        "hu_lowest": float(volume.hu.min()),
        "hu_highest": float(volume.hu.max()),
        "padding_share": 0.0 if volume.padding is None else round(float(volume.padding.mean()), 4),
        "repairs": volume.repairs,
    }


def _tell(report: dict[str, list[dict[str, Any]]], as_json: bool) -> None:
    """The report as JSON, or as tables on stdout with notes on stderr."""
    if as_json:
        print_json(report)
        return
    print_table(
        ["series", "part", "images", "chosen", "why"],
        [
            [
                row["series_number"],
                row["part"],
                row["images"],
                "yes" if row["cause"] == "chosen" else "no",
                row["reason"],
            ]
            for row in report["series"]
        ],
    )
    for number, row in enumerate(report["volumes"], 1):
        print()
        print_facts(
            {
                f"volume {number}": f"series {row['series_number']} {row['part']}".strip(),
                "regions": ", ".join(row["regions"]),
                "slices x rows x columns": " x ".join(map(str, row["shape"])),
                "mm": " x ".join(f"{mm:g}" for mm in row["spacing_mm"]),
                "HU": f"{row['hu_lowest']:g} to {row['hu_highest']:g}",
                "repairs": "; ".join(row["repairs"]) or "none",
                "file": row["file"],
            }
        )
    for bad in report["unreadable"][:_MOST_NOTES]:
        note(f"{show(bad['file'])}: {bad['reason']}")
    if len(report["unreadable"]) > _MOST_NOTES:
        note(
            f"and {len(report['unreadable']) - _MOST_NOTES} more files that are no objects of a study; --json names them"
        )
    for refusal in report["refusals"]:
        note(f"No volume ({refusal['error']}): {refusal['reason']}")
