"""`mu2 demo` as a newcomer runs it: its own process, no terminal, any folder of DICOM files."""

import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.running_services import run_mu2, write_study
from worker.demo import study as demo_study

FAKE = {"MU2_MODEL__REPORTER": "fake"}
DEADLINE_SECONDS = 100  # a demo takes a tenth of it


@pytest.fixture
def scratch() -> Iterator[dict[str, str]]:
    """Where the demo makes its temporary folder: a short path, as a newcomer's is."""
    with tempfile.TemporaryDirectory(prefix="mu2-", dir="/tmp") as folder:
        yield {**FAKE, "TMPDIR": folder}


def test_demo_shows_every_stage_the_draft_the_oru_and_its_acknowledgement(
    tmp_path: Path, scratch: dict[str, str]
) -> None:
    write_study(tmp_path / "study")
    (tmp_path / "study" / "notes.txt").write_text("no DICOM")
    result = run_mu2("demo", "--study", str(tmp_path / "study"), **scratch)

    assert result.returncode == 0, result.stdout + result.stderr
    stages = re.findall(r"^ +[\d.]+ s  (\w+)", result.stdout, re.MULTILINE)
    assert [s for s in dict.fromkeys(stages) if s in ("sending", "sent", "drafted")] == ["sending", "sent", "drafted"]
    assert "1 files that are no DICOM objects left out" in result.stdout
    assert "The volume has 12 slices of 16 by 16 voxels." in result.stdout
    assert re.search(r"^MSH\|\^~\\&\|MU2\|DEMO\|", result.stdout, re.MULTILINE)
    control_id = re.search(r"^MSH\|(?:[^|]*\|){8}([^|]+)\|", result.stdout, re.MULTILINE)
    assert control_id and f"MSA|AA|{control_id[1]}" in result.stdout
    assert "from complete to acknowledged" in result.stdout


def test_demo_leaves_nothing_behind(tmp_path: Path, scratch: dict[str, str]) -> None:
    write_study(tmp_path / "study", slices=3)
    result = run_mu2("demo", "--study", str(tmp_path / "study"), **scratch)

    assert result.returncode == 1
    assert re.search(r"No draft: the study is skipped.*\n.*12", result.stdout)
    assert list(Path(scratch["TMPDIR"]).iterdir()) == []
    assert not any(scratch["TMPDIR"] in line for line in _command_lines())


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_demo_waits_only_for_studies_of_which_something_was_accepted(tmp_path: Path, scratch: dict[str, str]) -> None:
    write_study(tmp_path / "study" / "good")
    write_study(tmp_path / "study" / "refused", slices=1, StudyInstanceUID="1.2.x.5")
    began = time.monotonic()
    result = run_mu2("demo", "--study", str(tmp_path / "study"), "--deadline", str(DEADLINE_SECONDS), **scratch)

    assert result.returncode == 1
    assert "1 objects: status 0xC212, Study or Series Instance UID is not a UID" in result.stdout
    assert "Draft, version 1" in result.stdout and "Not every study arrived; see the refusals above." in result.stdout
    assert time.monotonic() - began < DEADLINE_SECONDS


def test_demo_refuses_a_folder_without_dicom_before_it_starts_anything(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing here")
    result = run_mu2("demo", "--study", str(tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    assert "holds no DICOM object (1 other files)" in result.stderr


@pytest.mark.skipif(not demo_study.FOLDER.is_dir(), reason="the synthetic study is not in the repository yet")
def test_the_default_study_is_small_and_its_truth_is_shown_beside_the_draft(scratch: dict[str, str]) -> None:
    assert sum(path.stat().st_size for path in demo_study.FOLDER.rglob("*")) <= 5_000_000
    result = run_mu2("demo", **scratch)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "known truth" in result.stdout


def _command_lines() -> list[str]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return lines
