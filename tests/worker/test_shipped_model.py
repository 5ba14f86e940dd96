"""mu2-phantom as it ships: small, honest about what it knows, and right about the study of `mu2 demo`."""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mu2_model import shipped
from mu2_model.drafter import Draft, ReportDrafter
from mu2_model.errors import CheckpointError
from mu2_model.shipped import is_shipped, shipped_checkpoint
from training.phantoms import labeler
from training.ship import LARGEST_BYTES, folder_bytes
from worker import pipeline
from worker.core import notices
from worker.core.settings import ModelSettings, Settings
from worker.demo import study as demo_study
from worker.imaging import study
from worker.imaging.volume import Volume
from worker.inference import mu2
from worker.inference.reporter import questions

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "ct"
CHEST = DATA / "series" / "acrin_flt_thorax_49.tar.xz"

needs_checkpoint = pytest.mark.skipif(not is_shipped(), reason="mu2-phantom is not in this repository yet")


def volumes_of(folder: Path) -> tuple[Volume, ...]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != demo_study.TRUTH_NAME]
    return study.build_study(files, pipeline.rules(Settings().imaging)).volumes


def drafts_of(drafter: ReportDrafter, volumes: tuple[Volume, ...], **options: Any) -> list[Draft]:
    """As a worker asks with the default settings."""
    asked = questions(volumes, ModelSettings())
    return drafter.draft(
        [(volumes[q.volume].hu, volumes[q.volume].affine) for q in asked], [q.text for q in asked], **options
    )


@pytest.fixture(scope="module")
def drafter() -> ReportDrafter:
    return ReportDrafter.from_pretrained(shipped_checkpoint(), dtype=torch.float32)


@pytest.fixture(scope="module")
def demo(drafter: ReportDrafter) -> list[Draft]:
    return drafts_of(drafter, volumes_of(demo_study.FOLDER))


@needs_checkpoint
class TestShipped:
    def test_what_its_draft_names_is_what_the_demo_study_really_has(self, demo: list[Draft]) -> None:
        """Not yet all of it: the card says how much of a phantom it finds, the demo prints what it missed."""
        truth = demo_study.truth(demo_study.FOLDER)
        assert truth is not None
        named = {finding.key for draft in demo for finding in labeler.read(draft.text).findings}
        assert named
        assert named <= {(painted.kind, painted.side) for painted in truth}

    def test_its_draft_of_the_demo_study_ends_and_is_not_flagged(self, demo: list[Draft]) -> None:
        assert [(draft.truncated, draft.unlike_training) for draft in demo] == [(False, False)] * 2

    def test_noise_is_flagged(self, drafter: ReportDrafter) -> None:
        noise = np.random.default_rng(0).uniform(-1000, 1000, (60, 96, 96)).astype(np.float32)
        drafts = drafter.draft([(noise, np.diag([5.0, 4.0, 4.0, 1.0]))], ["Describe this CT."], max_new_tokens=2)
        assert drafts[0].unlike_training

    @pytest.mark.skipif(not CHEST.is_file(), reason="the real series lie outside the repository")
    def test_a_real_chest_is_flagged(self, drafter: ReportDrafter, tmp_path: Path) -> None:
        with tarfile.open(CHEST, "r:*") as archive:
            archive.extractall(tmp_path, filter="data")
        drafts = drafts_of(drafter, volumes_of(tmp_path), max_new_tokens=2)
        assert drafts
        assert all(draft.unlike_training for draft in drafts)

    def test_its_folder_fits_a_repository(self) -> None:
        assert folder_bytes(shipped_checkpoint()) <= LARGEST_BYTES

    def test_its_config_and_its_card_say_phantoms_only(self) -> None:
        config = json.loads((shipped_checkpoint() / "config.json").read_text(encoding="utf-8"))
        assert (config["model_name"], config["trained_on"]) == ("mu2-phantom", "phantoms")
        assert "PhantomCT phantoms only" in (shipped_checkpoint() / "README.md").read_text(encoding="utf-8")
        assert notices.of_draft(config["trained_on"], unlike_training=False) == [notices.SYNTHETIC_ONLY]

    def test_it_is_what_drafts_without_a_setting(self, tmp_path: Path) -> None:
        assert mu2.default_checkpoint(tmp_path) == shipped_checkpoint()


def test_an_installation_without_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    with pytest.raises(CheckpointError, match="python -m training mu2-phantom"):
        shipped_checkpoint()


def test_an_installation_without_it_drafts_with_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "nothing")
    assert mu2.default_checkpoint(tmp_path) == mu2.untrained_checkpoint(tmp_path)
