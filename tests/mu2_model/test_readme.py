"""The package's README does what it says."""

import re
from pathlib import Path

import pytest

from mu2_model.configuration_mu2 import Mu2Config, Mu2TokenizerConfig
from mu2_model.nifti import save_nifti
from mu2_model.untrained import make_untrained
from tests.mu2_model.small_volumes import affine, body

PACKAGE = Path(__file__).parents[2] / "mu2_model"
README = (PACKAGE / "README.md").read_text()


def test_the_five_lines_draft_from_a_nifti(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_untrained(tmp_path / "model")
    save_nifti(tmp_path / "ct.nii.gz", body(), affine())
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = code.replace("path/to/checkpoint", str(tmp_path / "model")).replace("ct.nii.gz", str(tmp_path / "ct.nii.gz"))
    assert len([line for line in code.splitlines() if line]) == 5
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_every_field_in_the_table_of_corrections_exists_and_differs_between_the_presets() -> None:
    rows = re.findall(r"^\|[^|]+\|[^|]+\| ((?:`\w+`(?:, )?)+) \|$", README, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    legacy, default = Mu2Config.legacy({"model_type": "llama"}), Mu2Config()
    assert len(names) >= 11
    for name in names:
        owner = "tokenizer" if name in Mu2TokenizerConfig.__annotations__ else None
        first, second = ((getattr(config, owner) if owner else config) for config in (legacy, default))
        assert getattr(first, name) != getattr(second, name), name
