"""The floors: what can be said without looking, and from a histogram alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from tests.training.conftest import write_cases
from training import fitted_floors, floors, tables
from training.data import MANIFEST, Case, read_manifest, write_manifest
from training.evaluation_commands import mount
from training.fitted_floors import FittedFloors, FloorError
from training.metrics.findings import Stated
from training.model_card import SCORES_FILE
from training.phantoms.disease import draw_case
from training.provenance import collect


def truths(first: int, count: int, *, full: bool) -> list[list[Stated]]:
    cases = (draw_case(first + number, full=full) for number in range(count))
    return [[Stated(f.kind.value, f.side.value, f.place, f.size_mm) for f in case.findings] for case in cases]


@pytest.mark.parametrize("full", [False, True], ids=["core", "full"])
def test_the_best_answer_without_an_image_stays_below_the_floor(full: bool) -> None:
    train, held_out = truths(0, 500, full=full), truths(700_000, 300, full=full)
    model = floors.fit_text_only(["report"] * len(train), train)
    assert 0.0 < floors.score(held_out, model.predict(["report"] * len(held_out))) < 0.6


def test_text_only_answers_each_question_with_what_is_frequent_for_it() -> None:
    model = floors.fit_text_only(["a", "a", "b"], [[Stated("ascites")], [Stated("ascites")], []])
    assert model.predict(["a", "b", "c"]) == [(("ascites", ""),), (), ()]


def test_logistic_regression_separates_what_a_line_separates() -> None:
    rng = np.random.default_rng(0)
    features = np.hstack([rng.normal(size=(300, 2)), np.ones((300, 1))])
    present = features[:, 0] - 0.5 * features[:, 1] > 0.2
    weights = floors.fit_logistic(features, present, ridge=0.1)
    assert ((features @ weights > 0) == present).mean() > 0.97


def test_histogram_model_finds_what_changes_the_histogram_and_not_its_side() -> None:
    rng = np.random.default_rng(1)
    volumes, known = [], []
    for number in range(160):
        volume = rng.normal(0.0, 20.0, size=4000)
        side = "left" if number % 4 == 1 else "right"
        if number % 2:
            volume[:400] = 900.0
        volumes.append(floors.histogram(volume.astype(np.int16)))
        known.append([Stated("renal_calculus", side)] if number % 2 else [])
    histograms = np.array(volumes)
    model = floors.fit_histogram_model(histograms[:120], known[:120])
    said = model.predict(histograms[120:])
    assert all(bool(keys) == bool(truth) for keys, truth in zip(said, known[120:], strict=True))
    assert floors.score(known[120:], said) < 0.75


def test_too_few_cases_are_refused() -> None:
    with pytest.raises(ValueError, match="8 cases or more"):
        floors.fit_histogram_model(np.zeros((3, len(floors.BIN_EDGES_HU) - 1)), [[], [], []])


def test_a_histogram_counts_every_voxel_in_its_bin() -> None:
    hu = np.random.default_rng(2).normal(0, 250, (20, 30, 40))
    plain, _ = np.histogram(hu, bins=floors.BIN_EDGES_HU)
    assert np.allclose(floors.histogram(hu), np.log10(plain / hu.size + 1e-6))
    beyond = floors.histogram(np.array([-3000, 9000], dtype=np.int16))
    assert beyond[0] == beyond[-1] == pytest.approx(np.log10(0.5 + 1e-6))


@pytest.fixture(scope="module")
def phantoms(cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen volumes to learn from, every second with a ball, asked about twice; four more to score on."""
    folder = tmp_path_factory.mktemp("phantoms")
    made = write_cases(folder, cases[0], ["train"] * 16 + ["test"] * 4, slices=(8,), sides=("left",))
    for number, case in enumerate(made):
        if number % 2 == 0:
            with np.load(case.image) as stored:
                np.savez_compressed(case.image, hu=np.minimum(stored["hu"], 90), affine=stored["affine"])
            made[number] = replace(case, findings=())
    again = [
        replace(case, case_id=f"{case.case_id}-region", question="And the abdomen?", findings=())
        for case in made
        if case.split == "train"
    ]
    write_manifest([*made, *again], folder / MANIFEST)
    return folder


@pytest.fixture
def checkpoint(world: Path, phantoms: Path, tmp_path: Path) -> Path:
    """An untrained checkpoint whose record says that it learned from the phantoms."""
    folder = tmp_path / "model"
    shutil.copytree(world / "init", folder)
    learned = read_manifest(phantoms, "train")
    collect("sft", 0, learned, {"data": [str(phantoms)]}, world / "init").write(folder)
    return folder


def evaluated(checkpoint: Path, phantoms: Path, *more: str) -> tuple[dict[str, object], str]:
    out = checkpoint.parent / "scores"
    app = typer.Typer()
    mount(app)
    options = ["--model", str(checkpoint), "--out", str(out), "--cache", str(checkpoint.parent / "cache")]
    options += ["--data", str(phantoms), "--split", "test", "--resamples", "10", *more]
    result = CliRunner().invoke(app, ["evaluate", *options])
    assert result.exit_code == 0, result.output
    return json.loads((out / SCORES_FILE).read_text()), (out / "evaluation.md").read_text()


def test_both_floors_stand_in_every_table_of_an_evaluation(checkpoint: Path, phantoms: Path) -> None:
    told, markdown = evaluated(checkpoint, phantoms)
    rows = {row["name"]: row for row in told["floors"]}  # type: ignore[attr-defined]
    # Half of the cases have a ball: saying it everywhere has two right and two wrong.
    assert rows["no image (floor)"]["finding_micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 2))
    assert rows["HU histogram (floor)"]["finding_micro_f1"] > 0.7
    assert rows["no image (floor)"]["intervals"]["finding_micro_f1"]
    tables_told = markdown.split("\n\n")[:3]
    assert all("HU histogram (floor)" in table and "no image (floor)" in table for table in tables_told)
    assert any(line.startswith("| finding_f1_by_size: below_10_mm |") for line in markdown.splitlines())


def test_floors_ship_with_a_checkpoint_and_need_no_training_data_then(checkpoint: Path, phantoms: Path) -> None:
    first, _ = evaluated(checkpoint, phantoms, "--card")
    card = (checkpoint / "README.md").read_text()
    assert "| score | value | 95 % interval | no image (floor) | HU histogram (floor) |" in card
    fitted = fitted_floors.fit(read_manifest(phantoms, "train"), checkpoint.parent / "cache")
    stored = FittedFloors.load(checkpoint)
    assert stored is not None
    held_out = read_manifest(phantoms, "test")
    assert stored.predict(held_out, checkpoint.parent) == fitted.predict(held_out, checkpoint.parent)
    (checkpoint / "training_run.json").unlink()
    again, _ = evaluated(checkpoint, phantoms)
    assert again["floors"] == first["floors"]


def test_tables_without_floors_say_why(checkpoint: Path, phantoms: Path) -> None:
    (checkpoint / "training_run.json").unlink()
    told, markdown = evaluated(checkpoint, phantoms)
    assert told["floors"] == []
    assert markdown.count("No floors for model: the checkpoint does not say what it was trained on: name its") == 3
    given, _ = evaluated(checkpoint, phantoms, "--train", str(phantoms))
    assert len(given["floors"]) == 2  # type: ignore[arg-type]


def test_a_training_manifest_that_was_changed_is_not_taken_for_the_remembered_one(
    checkpoint: Path, phantoms: Path, cases: list[Case], tmp_path: Path
) -> None:
    record = json.loads((checkpoint / "training_run.json").read_text())
    record["settings"]["data"] = [str(write_manifest(cases, tmp_path / "other.jsonl"))]
    (checkpoint / "training_run.json").write_text(json.dumps(record))
    with pytest.raises(FloorError, match="is not what the checkpoint was trained on any more"):
        fitted_floors.find(checkpoint, [], tmp_path)
    record["settings"]["data"] = [str(tmp_path / "gone.jsonl")]
    (checkpoint / "training_run.json").write_text(json.dumps(record))
    with pytest.raises(FloorError, match="not where it was"):
        fitted_floors.find(checkpoint, [], tmp_path)


def test_cases_without_structured_truth_have_no_floor(cases: list[Case], tmp_path: Path) -> None:
    with pytest.raises(FloorError, match="no structured truth, case0 for one"):
        fitted_floors.fit([replace(case, findings=None) for case in cases], tmp_path)
    with pytest.raises(FloorError, match="6 training volumes are too few"):
        fitted_floors.fit(cases, tmp_path)


def test_systems_of_the_same_training_share_their_floors_in_a_table() -> None:
    floor = {"name": "no image (floor)", "finding_micro_f1": 0.2, "intervals": {}}
    arms = [{"name": name, "intervals": {}, "floors": [floor]} for name in ("baseline", "full")]
    assert tables.table_2(arms).count("no image (floor)") == 1
