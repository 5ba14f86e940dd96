"""What somebody gets wrong on the command line is told in one line, not in a traceback."""

import sys
from pathlib import Path

import pytest
import typer

from training import __main__ as command_line
from training.data import ManifestError
from training.evaluation_commands import make_judge
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


def test_pairs_that_are_not_there_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="python -m training preferences"):
        read_pairs(tmp_path / "pairs.jsonl")
