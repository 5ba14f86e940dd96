"""`mu2 model`: what goes wrong is one sentence, and costs nothing that is finished."""

import json
from pathlib import Path

import pytest

from mu2_model.nifti import save_nifti
from mu2_model.untrained import make_untrained
from tests.cli.conftest import Terminal
from tests.mu2_model.small_volumes import affine, body
from worker.core.errors import ModelError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_untrained(tmp_path_factory.mktemp("untrained"))


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("ct") / "ct.nii"
    save_nifti(file, body(), affine())
    return file


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_draft_outlives_a_picture_that_cannot_be_written(
    terminal: Terminal, checkpoint: Path, ct: Path, tmp_path: Path, form: tuple[str, ...]
) -> None:
    (tmp_path / "look-01.png").mkdir()
    asked = ("model", "draft", str(ct), "--model", str(checkpoint), "--evidence", str(tmp_path / "look.png"))
    result = terminal.run(*asked, *form)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "The evidence could not be drawn" in result.stderr
    text = json.loads(result.stdout)["drafts"][0]["text"] if form else result.stdout
    assert len(text) > 20


def test_info_says_what_its_estimate_is_for(terminal: Terminal, checkpoint: Path) -> None:
    told = terminal.run("model", "info", str(checkpoint), "--dtype", "bfloat16").stdout
    facts = dict(line.split("  ", 1) for line in told.splitlines())
    assert facts["stored_dtype"].strip() == "float32"
    assert facts["memory, loaded as"].strip() == "bfloat16"
    assert facts["memory, longest volume"].strip() == "4 chunks, 272 + 512 tokens"


@pytest.mark.parametrize("device", ["mps", "meta"])
def test_a_device_that_nothing_is_drafted_on_is_one_sentence(
    terminal: Terminal, checkpoint: Path, ct: Path, device: str
) -> None:
    result = terminal.run("model", "draft", str(ct), "--model", str(checkpoint), "--device", device)
    assert isinstance(result.exception, ModelError) and f"'{device}'" in str(result.exception)


def test_questions_cannot_be_padded_to_nothing(terminal: Terminal, checkpoint: Path, tmp_path: Path) -> None:
    asked = ("model", "convert", str(checkpoint), str(tmp_path / "dst"), "--question-padding", "0")
    assert terminal.run(*asked).exit_code == 2
