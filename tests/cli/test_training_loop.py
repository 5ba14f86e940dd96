"""The loop from a radiologist's corrections to the next checkpoint: export, check, SFT and DPO, by the commands themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from tests.cli.conftest import Terminal
from tests.cli.signed_studies import Archive
from tests.training.conftest import TINY
from training import commands
from training.data import read_manifest
from training.provenance import read_provenance
from training.recipes import make_initial

SIGNED = ("A nodule of 12 mm in the right lung.", "The lungs are clear.", "Pleural effusion on the left side.")


def trained(*arguments: object) -> Any:
    """What `python -m training` does with these arguments, in this process."""
    app = typer.Typer()
    commands.mount(app)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def exported(terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export of three signed studies, two of which correct their draft."""
    torch.set_num_threads(1)
    monkeypatch.setenv("MU2_TRAINING__EXPORT", "true")
    monkeypatch.setenv("MU2_TRAINING__PSEUDONYM_KEY", "k" * 32)
    archive = Archive(terminal.database, terminal.home / "store")
    for seed, text in enumerate(SIGNED):
        archive.signed(seed, "The lungs are clear.", text, patient_identifier=f"P-{seed}")
    out = tmp_path / "export"
    terminal.data("study", "export-training", str(out), "--validation", "0", "--test", "0")
    return out


def test_what_was_signed_trains_the_next_checkpoint_by_sft_and_dpo(exported: Path, tmp_path: Path) -> None:
    assert "no fault found" in trained("check", "--data", exported).output
    start = make_initial(TINY, read_manifest(exported), tmp_path / "init")
    shared = ("--cache", tmp_path / "cache", "--epochs", 1, "--batch", 2, "--threads", 1)
    trained("sft", "--model", start, "--data", exported, "--out", tmp_path / "sft", *shared)
    trained("dpo", "--model", tmp_path / "sft", "--pairs", exported / "pairs.jsonl", "--out", tmp_path / "dpo", *shared)
    told = read_provenance(tmp_path / "dpo")
    assert told is not None and [told["stage"], *(run["stage"] for run in told["before"])] == ["dpo", "sft"]
    assert (tmp_path / "dpo" / "model.safetensors").is_file()
