"""The reporters: the fake says what it is, μ²LLM batches, keeps deadlines and survives a batch that does not fit."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mu2_model.drafter import Draft, DraftSentence, Progress
from mu2_model.errors import VolumeError
from worker.core import notices
from worker.core.errors import ModelBusyError, ModelError
from worker.core.report import Section
from worker.core.settings import ModelSettings, Settings
from worker.inference import mu2, reporter
from worker.inference.fake import CANNED, FakeReporter
from worker.inference.reporter import Deadline, ModelMetrics
from worker.metrics import Metrics


@dataclass(frozen=True, eq=False)
class PlainVolume:
    hu: NDArray[np.float32]
    affine: NDArray[np.float64]
    regions: tuple[str, ...] = ("chest",)


def volume(slices: int = 12, regions: tuple[str, ...] = ("chest",)) -> PlainVolume:
    """A warm box in air."""
    hu = np.full((slices, 32, 32), -1000, np.float32)
    hu[:, 8:24, 8:24] = 40
    return PlainVolume(hu, np.diag([3.0, 1.0, 1.0, 1.0]), regions)


@dataclass
class ScriptedDrafter:
    """Stands where `ReportDrafter` stands: notes its batches and does what `on_batch` says."""

    on_batch: Callable[[list[int], Callable[[Progress], None]], None] = lambda sizes, progress: None
    batches: list[int] = field(default_factory=list)
    trained_on: str = "patients"
    novelty: float | None = None
    model_name: str = "scripted"
    model_version: str = "1"
    weights_hash: str = "0" * 64
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    model: Any = field(default_factory=lambda: SimpleNamespace(generation_config=SimpleNamespace(max_new_tokens=None)))

    def draft(
        self, volumes: Sequence[Any], questions: Sequence[str], *, progress: Callable[[Progress], None], **_: Any
    ) -> list[Draft]:
        sizes = [len(hu) for hu, _ in volumes]
        self.batches.append(len(sizes))
        self.on_batch(sizes, progress)
        said = [(DraftSentence("findings", f"{size} slices.", -0.1),) for size in sizes]
        return [Draft(sentences, "", 1, 1, False, novelty=self.novelty) for sentences in said]


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def made(metrics: Metrics) -> Iterator[Callable[..., mu2.Mu2Reporter]]:
    """Makes reporters over a scripted drafter and closes them."""
    all_made: list[mu2.Mu2Reporter] = []

    def make(drafter: ScriptedDrafter, **settings: Any) -> mu2.Mu2Reporter:
        counters = ModelMetrics(metrics.batch_size, metrics.out_of_memory)
        all_made.append(mu2.Mu2Reporter(drafter, ModelSettings(**settings), counters))  # type: ignore[arg-type]
        return all_made[-1]

    yield make
    for one in all_made:
        one.close()


def draft_together(model: mu2.Mu2Reporter, sizes: Sequence[int]) -> list[str]:
    """Asks from one thread a study; the first sentence of each."""
    with ThreadPoolExecutor(len(sizes)) as threads:
        waiting = [threads.submit(model.draft, [volume(size)], Deadline.after(20)) for size in sizes]
        return [future.result().sentences[0].text for future in waiting]


def test_fake_reporter_says_that_it_is_canned_and_repeats_itself() -> None:
    fake = FakeReporter(ModelSettings())
    first, second = (fake.draft([volume()], Deadline.after(5)) for _ in range(2))
    assert first == second
    assert first.sentences[0].text == CANNED


def test_untrained_model_says_so_in_its_first_findings_sentence(tmp_path: Path, metrics: Metrics) -> None:
    checkpoint = mu2.untrained_checkpoint(tmp_path)
    settings = Settings(home=tmp_path, model=ModelSettings(path=checkpoint, device="cpu", max_new_tokens=8))
    model = reporter.build(settings, ModelMetrics(metrics.batch_size, metrics.out_of_memory))
    drafted = model.draft([volume()], Deadline.after(30))
    model.close()
    assert drafted.sentences[0].section is Section.FINDINGS
    assert drafted.sentences[0].text == notices.UNTRAINED
    assert len(drafted.sentences) > 1
    assert drafted.provenance.decoding["trained_on"] == "nothing"
    assert len(drafted.provenance.weights_sha256) == 64


def test_drafted_sentences_name_their_best_slice_in_the_patient_and_what_the_system_adds_names_none(
    tmp_path: Path, metrics: Metrics
) -> None:
    checkpoint = mu2.untrained_checkpoint(tmp_path)
    settings = Settings(home=tmp_path, model=ModelSettings(path=checkpoint, device="cpu", max_new_tokens=8))
    model = reporter.build(settings, ModelMetrics(metrics.batch_size, metrics.out_of_memory))
    volumes = [volume(12, ("chest",)), volume(20, ("abdomen",))]
    drafted = model.draft(volumes, Deadline.after(60))
    model.close()
    notice, *sentences = drafted.sentences
    assert notice.best_slice is None and "slices" in drafted.provenance.stage_seconds
    for sentence in sentences:
        assert sentence.best_slice is not None
        assert sentence.best_slice.volume == {"chest": 1, "abdomen": 2}[sentence.region]
        shown = volumes[sentence.best_slice.volume - 1]
        index = np.linalg.solve(shown.affine, [*sentence.best_slice.ras_mm, 1.0])[0]
        assert -0.5 < index < len(shown.hu) - 0.5


@pytest.mark.parametrize(
    ("trained_on", "novelty", "said"),
    [
        ("patients", None, []),
        ("patients", 0.9, []),
        ("patients", 1.1, [notices.UNLIKE_TRAINING]),
        ("phantoms", 0.9, [notices.SYNTHETIC_ONLY]),
        ("phantoms", 7.0, [notices.SYNTHETIC_ONLY, notices.UNLIKE_TRAINING]),
    ],
)
def test_draft_says_first_what_its_model_knows_and_whether_the_ct_is_unlike_that(
    made: Callable[..., mu2.Mu2Reporter], trained_on: str, novelty: float | None, said: list[str]
) -> None:
    drafted = made(ScriptedDrafter(trained_on=trained_on, novelty=novelty)).draft([volume()], Deadline.after(5))
    assert [sentence.text for sentence in drafted.sentences] == [*said, "12 slices."]
    assert drafted.provenance.decoding["unlike_training"] is (notices.UNLIKE_TRAINING in said)
    assert drafted.provenance.decoding.get("novelty") == novelty


def test_untrained_checkpoint_is_made_once_by_many(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as threads:
        folders = {future.result() for future in [threads.submit(mu2.untrained_checkpoint, tmp_path) for _ in range(3)]}
    assert folders == {tmp_path / "models" / "untrained"}
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["untrained"]


def test_checkpoint_that_does_not_load_is_a_model_error(tmp_path: Path, metrics: Metrics) -> None:
    settings = Settings(home=tmp_path, model=ModelSettings(path=tmp_path, device="cpu"))
    with pytest.raises(ModelError, match="mu2 model info"):
        reporter.build(settings, ModelMetrics(metrics.batch_size, metrics.out_of_memory))


def test_studies_that_ask_together_are_drafted_in_one_batch(made: Callable[..., mu2.Mu2Reporter]) -> None:
    drafter = ScriptedDrafter()
    model = made(drafter, max_batch=4, batch_wait_seconds=2.0)
    assert draft_together(model, [12, 13, 14, 15]) == ["12 slices.", "13 slices.", "14 slices.", "15 slices."]
    assert drafter.batches == [4]


def test_batch_is_never_larger_than_the_setting(made: Callable[..., mu2.Mu2Reporter]) -> None:
    drafter = ScriptedDrafter()
    draft_together(made(drafter, max_batch=2, batch_wait_seconds=0.2), [12] * 5)
    assert sum(drafter.batches) == 5
    assert max(drafter.batches) == 2


def test_batch_that_does_not_fit_is_halved_until_it_does(
    made: Callable[..., mu2.Mu2Reporter], metrics: Metrics
) -> None:
    def at_most_one(sizes: list[int], _: Callable[[Progress], None]) -> None:
        if len(sizes) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    drafter = ScriptedDrafter(at_most_one)
    model = made(drafter, max_batch=4, batch_wait_seconds=2.0)
    assert draft_together(model, [12, 13, 14, 15]) == ["12 slices.", "13 slices.", "14 slices.", "15 slices."]
    assert drafter.batches == [4, 2, 1, 1, 2, 1, 1]
    assert metrics.registry.get_sample_value("mu2_model_out_of_memory_total") == 3


def test_one_volume_that_never_fits_is_busy_not_final(made: Callable[..., mu2.Mu2Reporter]) -> None:
    def never(sizes: list[int], _: Callable[[Progress], None]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ModelBusyError, match="out of memory"):
        made(ScriptedDrafter(never)).draft([volume()], Deadline.after(5))


def test_volume_that_the_model_refuses_spoils_no_other_of_its_batch(made: Callable[..., mu2.Mu2Reporter]) -> None:
    def refuse(sizes: list[int], _: Callable[[Progress], None]) -> None:
        if 13 in sizes:
            raise VolumeError("13 slices are unlucky")

    model = made(ScriptedDrafter(refuse), max_batch=3, batch_wait_seconds=2.0)
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(model.draft, [volume(size)], Deadline.after(20)) for size in (12, 13, 14)]
        assert waiting[0].result().sentences[0].text == "12 slices."
        assert waiting[2].result().sentences[0].text == "14 slices."
        with pytest.raises(ModelError, match="unlucky"):
            waiting[1].result()


def generate_for_ever(sizes: list[int], progress: Callable[[Progress], None]) -> None:
    """A generation that ends only when its watcher stops it."""
    while True:
        progress(Progress("generate", 1, 2))
        time.sleep(0.005)


def test_generation_stops_at_the_deadline(made: Callable[..., mu2.Mu2Reporter]) -> None:
    model = made(ScriptedDrafter(generate_for_ever))
    started = time.monotonic()
    with pytest.raises(ModelBusyError, match="deadline"):
        model.draft([volume()], Deadline.after(0.3))
    assert time.monotonic() - started < 5


def test_generation_stops_when_the_lease_is_lost_and_the_next_study_is_drafted(
    made: Callable[..., mu2.Mu2Reporter],
) -> None:
    drafter = ScriptedDrafter(generate_for_ever)
    model = made(drafter)
    lost = threading.Event()
    threading.Timer(0.2, lost.set).start()
    with pytest.raises(ModelBusyError):
        model.draft([volume()], Deadline.after(60, lost))
    drafter.on_batch = lambda sizes, progress: None
    assert draft_together(model, [12]) == ["12 slices."]


def test_study_that_asks_no_longer_does_not_stop_the_others_of_its_batch(made: Callable[..., mu2.Mu2Reporter]) -> None:
    both_in = threading.Event()

    def short(sizes: list[int], progress: Callable[[Progress], None]) -> None:
        both_in.set()
        for _ in range(60):
            progress(Progress("generate", 1, 2))
            time.sleep(0.01)

    model = made(ScriptedDrafter(short), max_batch=2, batch_wait_seconds=2.0)
    lost = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        gone = threads.submit(model.draft, [volume(12)], Deadline.after(60, lost))
        stays = threads.submit(model.draft, [volume(13)], Deadline.after(60))
        assert both_in.wait(10)
        lost.set()
        assert stays.result().sentences[0].text == "13 slices."
        with pytest.raises(ModelBusyError):
            gone.result()


def test_failed_accelerator_breaks_the_reporter_so_that_its_worker_leaves(made: Callable[..., mu2.Mu2Reporter]) -> None:
    def fail(sizes: list[int], _: Callable[[Progress], None]) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    model = made(ScriptedDrafter(fail))
    for _ in range(2):
        with pytest.raises(ModelBusyError):
            model.draft([volume()], Deadline.after(5))
    assert model.is_broken


@pytest.mark.parametrize("kind", [IndexError, KeyError, AssertionError, OSError])
def test_surprise_of_one_study_reaches_it_and_the_model_drafts_the_others(
    made: Callable[..., mu2.Mu2Reporter], kind: type[Exception]
) -> None:
    def surprise(sizes: list[int], _: Callable[[Progress], None]) -> None:
        if 13 in sizes:
            raise kind("an index of the thirteenth slice")

    model = made(ScriptedDrafter(surprise), max_batch=2, batch_wait_seconds=2.0)
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(model.draft, [volume(size)], Deadline.after(20)) for size in (12, 13)]
        assert waiting[0].result().sentences[0].text == "12 slices."
        with pytest.raises(kind):
            waiting[1].result()
    assert not model.is_broken
    assert draft_together(model, [14]) == ["14 slices."]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_death_of_the_models_thread_breaks_the_reporter_and_nobody_waits_in_vain(
    made: Callable[..., mu2.Mu2Reporter],
) -> None:
    class Killed(BaseException):
        """What no study raises."""

    def die(sizes: list[int], _: Callable[[Progress], None]) -> None:
        raise Killed

    model = made(ScriptedDrafter(die))
    started = time.monotonic()
    with pytest.raises(ModelBusyError):
        model.draft([volume()], Deadline.after(20))
    assert time.monotonic() - started < 5
    assert model.is_broken


def test_closing_gives_waiting_studies_back(made: Callable[..., mu2.Mu2Reporter]) -> None:
    model = made(ScriptedDrafter(generate_for_ever), max_batch=1)
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(model.draft, [volume()], Deadline.after(60)) for _ in range(2)]
        time.sleep(0.1)
        model.close()
        for future in waiting:
            with pytest.raises(ModelBusyError):
                future.result(timeout=5)


def test_each_region_is_asked_about_once_and_its_answer_stands_under_its_name(
    made: Callable[..., mu2.Mu2Reporter],
) -> None:
    drafter = ScriptedDrafter()
    model = made(drafter, max_batch=8)
    drafted = model.draft([volume(12, ("chest", "abdomen")), volume(13, ("abdomen", "pelvis"))], Deadline.after(5))
    assert [(s.region, s.text) for s in drafted.sentences] == [
        ("chest", "12 slices."),
        ("abdomen", "12 slices."),
        ("pelvis", "13 slices."),
    ]


def test_study_of_one_region_is_asked_the_plain_question() -> None:
    model = ModelSettings(question="Describe this CT.")
    assert reporter.questions([volume()], model) == [reporter.Question(0, "", "Describe this CT.")]
    assert reporter.questions([volume(regions=())], model) == [reporter.Question(0, "", "Describe this CT.")]
