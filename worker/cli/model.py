"""`mu2 model`: thin over `mu2_model`, which stands alone. No database is needed and no study is stored."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.terminal import Json, note, print_facts, print_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mu2_model.draft import Draft
    from mu2_model.drafter import ReportDrafter
    from worker.inference.reporter import Question

app = typer.Typer(
    name="model", help="The model: look at it, convert published weights, draft from one file.", no_args_is_help=True
)

_NIFTI = (".nii", ".nii.gz")
_CheckpointOption = Annotated[
    Path | None, typer.Option(help="Checkpoint folder; without it that of the settings.", metavar="DIR")
]


@dataclass(frozen=True)
class _Volume:
    """A volume of a file, as a reporter reads one."""

    hu: "NDArray[np.float32]"
    affine: "NDArray[np.float64]"
    regions: tuple[str, ...]
    notes: tuple[str, ...] = ()


@app.command()
def info(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Checkpoint folder; without it that of the settings.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Volumes of the memory estimate.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; without it as stored.")] = None,
    as_json: Json = False,
) -> None:
    """Shows a checkpoint: parameters by part, hash of the weights, memory estimate for a batch.

    `mu2 model draft` loads float32 on a CPU and bfloat16 on a GPU: name that --dtype for its estimate.
    """
    from mu2_model.inspection import BYTES_PER_VALUE, model_info

    if dtype is not None and dtype not in BYTES_PER_VALUE:
        raise typer.BadParameter(f"a dtype is one of {', '.join(BYTES_PER_VALUE)}")
    with _model_errors():
        facts = model_info(_checkpoint(checkpoint), batch, dtype)
    if as_json:
        print_json(facts)
        return
    parts = {f"parameters, {name.replace('_', ' ')}": f"{count:,}" for name, count in facts.pop("parameters").items()}
    memory = facts.pop("memory_bytes")
    needed = {
        "memory, loaded as": memory["dtype"],
        "memory, longest volume": f"{memory['chunks']} chunks, {memory['prompt_tokens']} + {memory['new_tokens']} tokens",
        "memory, weights": f"{memory['weights'] / 1e9:.2f} GB",
        f"memory, peak for {memory['batch']}": f"{memory['peak'] / 1e9:.2f} GB",
        "memory, peak with evidence": f"{memory['peak_with_evidence'] / 1e9:.2f} GB",
        **{f"memory, free on {device}": f"{free / 1e9:.2f} GB" for device, free in memory["free"].items()},
    }
    print_facts({**facts, **parts, **needed})
    if memory["free"] and memory["peak"] > max(memory["free"].values()):
        note(f"A batch of {memory['batch']} does not fit the memory that is free now.")


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", exists=True, help="Published folder, or pretrained_ViT.bin.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    question_padding: Annotated[
        int | None, typer.Option(min=1, help="768 or 1024 for checkpoints on Llama of 2025, none for Qwen3.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Converts published weights, strictly: a tensor that is unexpected, missing or mis-shaped is an error that names it."""
    from mu2_model.convert_weights import convert_checkpoint

    with _model_errors():
        config = convert_checkpoint(source, target, question_padding)
    if as_json:
        print_json({"folder": target, "model_type": config.model_type})
    else:
        print(f"{target} holds a {config.model_type} model; `mu2 model info {target}` shows it.")


@app.command()
def draft(
    path: Annotated[Path, typer.Argument(metavar="PATH", exists=True, help="NIfTI file or folder of DICOM files.")],
    model: _CheckpointOption = None,
    question: Annotated[str | None, typer.Option(help="What to ask; without it that of the settings.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N; without it that of the settings.")] = None,
    evidence: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Pictures of where the model looked, one a sentence.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Writes a draft for one CT on the terminal: machine-written, not reviewed, not for clinical use."""
    from worker.core import logs, notices, settings
    from worker.core.report import DISCLOSURE
    from worker.inference.reporter import questions

    logs.configure("model", "error")
    current = settings.current()
    chosen = current.model.model_copy(
        update={name: value for name, value in (("question", question), ("device", device)) if value is not None}
    )
    if evidence is not None and evidence.suffix != ".png":
        raise typer.BadParameter("the name of a picture ends in .png")
    if evidence is not None and not evidence.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {evidence.parent} to draw in")
    volumes = _read(path)
    asked = questions(volumes, chosen)
    with _model_errors():
        drafter = _load(_checkpoint(model), chosen.device)
        drafts = drafter.draft(
            [(volumes[q.volume].hu, volumes[q.volume].affine) for q in asked],
            [q.text for q in asked],
            max_new_tokens=chosen.max_new_tokens,
            deadline_seconds=chosen.deadline_seconds,
            evidence=evidence is not None,
        )
        pictures, undrawn = _draw(evidence, drafter, volumes, asked, drafts) if evidence is not None else ([], None)
    for notice in notices.of_draft(drafter.trained_on, any(made.unlike_training for made in drafts)):
        note(notice)
    if as_json:
        print_json(_document(drafter, volumes, asked, drafts, pictures))
    else:
        _print(asked, drafts)
        print(f"\n{DISCLOSURE}")
        for picture in pictures:
            note(f"Evidence: {picture}")
    if undrawn is not None:
        note(f"The evidence could not be drawn: {undrawn.strerror}: {undrawn.filename}")
        raise typer.Exit(1)


@contextmanager
def _model_errors() -> Iterator[None]:
    """The package's own errors as ours; the package knows nothing of this system."""
    from mu2_model.errors import Mu2ModelError
    from worker.core.errors import ModelError

    try:
        yield
    except Mu2ModelError as error:
        raise ModelError(str(error)) from error


def _checkpoint(given: Path | None) -> Path:
    from worker.core import settings
    from worker.inference import mu2

    if given is not None:
        return given
    current = settings.current()
    return current.model.path or mu2.default_checkpoint(current.home)


def _load(checkpoint: Path, device: str) -> "ReportDrafter":
    import torch
    from transformers.utils.logging import disable_progress_bar

    from mu2_model.drafter import ReportDrafter

    disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return ReportDrafter.from_pretrained(checkpoint, device, torch.bfloat16 if "cuda" in device else torch.float32)


def _read(path: Path) -> list[_Volume]:
    """The volumes of a NIfTI file or of a folder of DICOM files, the main one first."""
    if path.is_file():
        from mu2_model.nifti import load_nifti

        if not path.name.endswith(_NIFTI):
            raise typer.BadParameter("name a NIfTI file (.nii, .nii.gz) or a folder of DICOM files")
        with _model_errors():
            hu, affine = load_nifti(path)
        return [_Volume(hu, affine, ())]
    from worker import pipeline
    from worker.core import settings
    from worker.imaging import study

    rules = pipeline.rules(settings.current().imaging)
    found = study.build_examined(study.examine_folder(path, rules), rules)
    return [_Volume(v.hu, v.affine, tuple(v.regions), tuple(v.repairs)) for v in found.volumes]


def _draw(
    out: Path, drafter: "ReportDrafter", volumes: list[_Volume], asked: "list[Question]", drafts: "list[Draft]"
) -> tuple[list[Path], OSError | None]:
    """One picture a sentence, numbered over the whole draft, and what kept the rest from the disk: a draft is worth more."""
    from mu2_model.evidence_picture import draw_evidence

    pictures: list[Path] = []
    for q, made in zip(asked, drafts, strict=True):
        volume = volumes[q.volume]
        prepared = drafter.processor.image_processor.prepare(volume.hu, volume.affine, device=drafter.device)
        for sentence, shown in zip(made.sentences, made.evidence or (), strict=True):
            target = out.with_name(f"{out.stem}-{len(pictures) + 1:02d}.png")
            try:
                draw_evidence(target, prepared, shown, sentence.text)
            except OSError as error:
                return pictures, error
            pictures.append(target)
    return pictures, None


def _document(
    drafter: "ReportDrafter",
    volumes: list[_Volume],
    asked: "list[Question]",
    drafts: "list[Draft]",
    pictures: list[Path],
) -> dict[str, Any]:
    from worker.core.report import DISCLOSURE

    return {
        "model": drafter.model_name,
        "model_version": drafter.model_version,
        "weights_sha256": drafter.weights_hash,
        "trained_on": drafter.trained_on,
        "disclosure": DISCLOSURE,
        "volumes": [{"shape": v.hu.shape, "regions": v.regions, "notes": v.notes} for v in volumes],
        "drafts": [_facts(q, d) for q, d in zip(asked, drafts, strict=True)],
        "pictures": pictures,
    }


def _facts(question: "Question", made: "Draft") -> dict[str, Any]:
    evidence = made.evidence or (None,) * len(made.sentences)
    return {
        "question": question.text,
        "region": question.region,
        "text": made.text,
        "sentences": [
            {
                **asdict(sentence),
                **({"drop": shown.drop, "supported": shown.supported} if shown is not None else {}),
            }
            for sentence, shown in zip(made.sentences, evidence, strict=True)
        ],
        "truncated": made.truncated,
        "novelty": made.novelty,
        "unlike_training": made.unlike_training,
        "repairs": made.repairs,
        "seconds": made.stage_seconds,
    }


def _print(asked: "list[Question]", drafts: "list[Draft]") -> None:
    for question, made in zip(asked, drafts, strict=True):
        if question.region:
            print(f"\n{question.region.upper()}")
        section = ""
        for sentence in made.sentences:
            if sentence.section != section:
                section = sentence.section
                print(f"\n{section.upper()}")
            print(f"{sentence.text}  [{sentence.confidence:.2f}]")
        for repair in made.repairs:
            note(f"repaired: {repair}")
        if made.truncated:
            note("The draft was cut at its longest length (MU2_MODEL__MAX_NEW_TOKENS).")
