"""`mu2 model`: what goes wrong is one sentence, and costs nothing that is finished."""

import json
from pathlib import Path

import pytest

from mu2_model.nifti import save_nifti
from mu2_model.untrained import make_untrained
from tests.cli.conftest import Terminal
from tests.mu2_model.small_volumes import affine, body


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
