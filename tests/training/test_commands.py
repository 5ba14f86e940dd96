"""What somebody gets wrong on the command line is told in one line, not in a traceback."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from training import __main__ as command_line
from training.data import Case, ManifestError, read_manifest, write_manifest
from training.evaluation_commands import evaluate_command, judge_for, make_judge, preferences
from training.green import PhantomJudge
from training.model_card import SCORES_FILE
from training.preferences import read_pairs


def ended(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """What `python -m training` leaves: an exit status, or the line that it prints with status 1."""
    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    monkeypatch.setattr(command_line, "app", typer.Typer())
    with pytest.raises(SystemExit) as left:
        command_line.main()
    return left.value.code


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "--data", "/nowhere"], "no manifest at /nowhere: make one with"),
        (["import", "ct-rate", "/nowhere", "o.jsonl"], "/nowhere is not CT-RATE"),
        (["launch", "--config", "a200", "--", "sft"], "no config file a200; shipped are a100x4_fsdp2"),
        (["floors", "--train", "/nowhere", "--data", "/nowhere"], "no manifest at /nowhere"),
    ],
)
def test_what_can_be_mended_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    told = ended(monkeypatch, *arguments)
    assert str(told).startswith(f"python -m training: {said}")
    assert "\n" not in str(told)


@pytest.mark.parametrize("command", ["sft", "dpo", "vision", "preferences", "novelty", "ship", "evaluate"])
def test_a_folder_without_a_checkpoint_is_never_looked_up_on_a_hub(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], world: Path, command: str
) -> None:
    data = {"dpo": ["--pairs", "p.jsonl"], "ship": []}.get(command, ["--data", str(world)])
    out = [] if command == "novelty" else ["--out", str(world / "out")]
    assert ended(monkeypatch, command, "--model", "somebody/ct-model", *data, *out) == 2
    assert "no checkpoint in somebody/ct-model" in capsys.readouterr().err
    assert not (world / "out").exists()


def test_a_judge_without_a_model_is_never_looked_up_on_a_hub() -> None:
    with pytest.raises(typer.BadParameter, match="no checkpoint in somebody/judge"):
        make_judge("model:somebody/judge")


@pytest.fixture
def of_patients(world: Path, cases: list[Case], tmp_path: Path) -> Path:
    """A manifest whose last case is no phantom."""
    rows = [*cases[:-1], replace(cases[-1], source="hospital")]
    return write_manifest([replace(case, split="validation") for case in rows], tmp_path / "manifest.jsonl")


def test_the_phantom_judge_is_taken_for_phantoms_and_refused_for_patients(cases: list[Case], of_patients: Path) -> None:
    assert isinstance(judge_for(None, cases), PhantomJudge)
    others = read_manifest(of_patients)
    assert judge_for(None, others) is None
    with pytest.raises(typer.BadParameter, match="reads reports of phantoms alone, and case case5 is of hospital"):
        judge_for("phantom", others)


def test_preferences_on_patients_ask_for_a_judge(world: Path, of_patients: Path, tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="name one by --judge"):
        preferences(world / "init", [of_patients], tmp_path / "pairs.jsonl")


def test_an_evaluation_on_patients_says_why_it_has_no_green(
    world: Path, of_patients: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_command([of_patients], [world / "init"], tmp_path / "scores", tmp_path / "cache", limit=6, resamples=10)
    told = json.loads((tmp_path / "scores" / SCORES_FILE).read_text())
    assert told["green"] is None
    assert any("named by --judge" in note for note in told["notes"])
    assert "named by --judge" in capsys.readouterr().out


def test_pairs_that_are_not_there_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="python -m training preferences"):
        read_pairs(tmp_path / "pairs.jsonl")
