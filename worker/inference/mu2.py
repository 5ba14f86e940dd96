"""μ²LLM behind the `Reporter` protocol: loaded once per process, drafting together what arrives together.

One thread runs the model. Studies ask from other threads and wait; the thread takes the questions that are there, up to
`model.max_batch`, after a moment's wait for company. A batch that does not fit the memory is halved until it fits.
"""

import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from pathlib import Path

import structlog
import torch
from transformers.utils.logging import disable_progress_bar

from mu2_model.drafter import Draft, Progress, ReportDrafter
from mu2_model.errors import Mu2ModelError
from mu2_model.shipped import is_shipped, shipped_checkpoint
from mu2_model.untrained import make_untrained
from worker.core import notices
from worker.core.errors import ModelBusyError, ModelError
from worker.core.report import BestSlice, Provenance, Section, Sentence
from worker.core.settings import ModelSettings, Settings
from worker.inference.reporter import CtVolume, Deadline, Drafted, Explained, ModelMetrics, Question, questions

log = structlog.get_logger(__name__)

DECODING = "greedy"
LOOK_SECONDS = 0.25  # how often a waiting study looks at its deadline's flags
END_SECONDS = 10.0

_SECTIONS = {section.value: section for section in Section}


class _Caught:
    """Keeps what its block raised, as a `Future` does, for the thread that waits for the answer.

    Whatever a study makes the model raise belongs to that study: it must not end the thread that drafts the others.
    """

    error: Exception | None = None

    def __enter__(self) -> "_Caught":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        if not isinstance(error, ModelBusyError | Mu2ModelError):
            log.warning("model_raised", exc_info=error)  # says where, which the next line forgets
        self.error = error.with_traceback(None)  # whose frames would hold the memory of the failed run
        return True


@dataclass(frozen=True, eq=False)
class _Item:
    """One question about one volume on its way through the model."""

    volume: CtVolume
    question: str
    deadline: Deadline
    evidence: bool = False  # also where the model looked; such an item goes alone
    answer: "Future[Draft]" = field(default_factory=Future)


def load(settings: Settings, metrics: ModelMetrics) -> "Mu2Reporter":
    """Loads the checkpoint and runs it once; raises `ModelError` when it cannot be used."""
    disable_progress_bar()  # a log is no terminal
    path = settings.model.path or default_checkpoint(settings.home)
    device = torch.device(_device(settings.model))
    started = time.monotonic()
    try:
        drafter = ReportDrafter.from_pretrained(path, device, _dtype(settings.model, device))
        drafter.warm_up()
        reporter = Mu2Reporter(drafter, settings.model, metrics)
    except Mu2ModelError as error:
        raise ModelError(
            f"the checkpoint does not load: {error}; check model.path, model.device and `mu2 model info`"
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ModelError(
            f"the checkpoint does not load ({type(error).__name__}); check model.path, model.device and `mu2 model info`"
        ) from error
    log.info(
        "model_loaded",
        model=reporter.name,
        model_version=reporter.version,
        device=str(device),
        seconds=round(time.monotonic() - started, 3),
    )
    return reporter


def default_checkpoint(home: Path) -> Path:
    """mu2-phantom, or a tiny untrained checkpoint in an installation that came without it."""
    return shipped_checkpoint() if is_shipped() else untrained_checkpoint(home)


def untrained_checkpoint(home: Path) -> Path:
    """The folder of the tiny untrained checkpoint under MU2_HOME, made when it is not there."""
    folder = home.resolve() / "models" / "untrained"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        make_untrained(made)
        made.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # else another worker made it meanwhile
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


class Mu2Reporter:
    """A loaded μ²LLM. Safe for threads; `close` ends its thread."""

    def __init__(self, drafter: ReportDrafter, settings: ModelSettings, metrics: ModelMetrics) -> None:
        self.name = drafter.model_name
        self.version = drafter.model_version
        self.weights_sha256 = drafter.weights_hash
        self._drafter = drafter
        self._settings = settings
        own_limit = drafter.model.generation_config.max_new_tokens
        self._max_new_tokens = min(settings.max_new_tokens, own_limit or settings.max_new_tokens)
        self._metrics = metrics
        self._waiting: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._broken = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def is_broken(self) -> bool:
        """Whether the accelerator failed, or the model's thread died: only a new process mends that."""
        return self._broken.is_set()

    def draft(self, volumes: Sequence[CtVolume], deadline: Deadline) -> Drafted:
        """Asks about every region of every volume; raises `ModelBusyError` or `ModelError`."""
        asked = questions(volumes, self._settings)
        return self._compose(asked, self._ask(volumes, asked, deadline))

    def explain(self, volumes: Sequence[CtVolume], deadline: Deadline) -> list[Explained]:
        """Drafts once more, which greedy decoding does alike, with evidence; raises `ModelBusyError` or `ModelError`."""
        asked = questions(volumes, self._settings)
        drafts = self._ask(volumes, asked, deadline, evidence=True)
        return [
            Explained(
                volume=question.volume + 1,
                region=question.region,
                text=_without_heading(sentence.text, question.region),
                heat=evidence.heat,
                affine=evidence.to_ras,
                support=evidence.drop,
                control=evidence.control_drop,
            )
            for question, draft in zip(asked, drafts, strict=True)
            for sentence, evidence in zip(draft.sentences, draft.evidence or (), strict=True)
            if evidence.to_ras is not None
        ]

    def _ask(
        self, volumes: Sequence[CtVolume], asked: Sequence[Question], deadline: Deadline, evidence: bool = False
    ) -> list[Draft]:
        if self._closed.is_set() or self._broken.is_set():
            raise ModelBusyError("the model is not available in this process any more; the study is tried again")
        items = [_Item(volumes[question.volume], question.text, deadline, evidence) for question in asked]
        for item in items:
            self._waiting.put(item)
        try:
            return [_await(item) for item in items]
        finally:
            for item in items:
                item.answer.cancel()  # one that was not begun is not needed any more

    def close(self) -> None:
        """Ends the thread after the token under way."""
        self._closed.set()
        self._waiting.put(None)
        self._thread.join(timeout=END_SECONDS)

    def _compose(self, asked: Sequence[Question], drafts: Sequence[Draft]) -> Drafted:
        sentences = [
            Sentence(
                _SECTIONS.get(s.section, Section.FINDINGS),
                _without_heading(s.text, question.region),
                confidence=s.confidence,
                region=question.region,
                best_slice=BestSlice(question.volume + 1, point) if point is not None else None,
            )
            for question, draft in zip(asked, drafts, strict=True)
            for s, point in zip(draft.sentences, draft.best_slices or [None] * len(draft.sentences), strict=True)
        ]
        if not sentences:
            raise ModelError("the model wrote no sentence about this study; requeue it or write the report by hand")
        unlike = any(draft.unlike_training for draft in drafts)
        said = notices.of_draft(self._drafter.trained_on, unlike)
        sentences[:0] = [Sentence(Section.FINDINGS, text) for text in said]
        seconds: dict[str, float] = {}
        for draft in drafts:
            for stage, value in draft.stage_seconds.items():
                seconds[stage] = max(seconds.get(stage, 0.0), round(value, 3))
        provenance = Provenance(
            model_name=self.name,
            model_version=self.version,
            weights_sha256=self.weights_sha256,
            prompt="\n".join(dict.fromkeys(question.text for question in asked)),
            decoding={
                "settings": DECODING,
                "max_new_tokens": self._max_new_tokens,
                "trained_on": self._drafter.trained_on,
                "unlike_training": unlike,
                **_novelty(drafts),
                "truncated": any(draft.truncated for draft in drafts),
                "repairs": "; ".join(dict.fromkeys(repair for draft in drafts for repair in draft.repairs)),
            },
            stage_seconds=seconds,
        )
        return Drafted(tuple(sentences), provenance)

    def _run(self) -> None:
        batch: list[_Item] = []
        try:
            while not self._closed.is_set():
                batch = [item for item in self._gather() if item.answer.set_running_or_notify_cancel()]
                self._answer([item for item in batch if not item.evidence])
                for item in batch:
                    if item.evidence:
                        self._answer([item])
        finally:  # however this thread ends, nobody waits for it in vain
            if not self._closed.is_set():
                self._broken.set()
            self._leave([item for item in batch if not item.answer.done()])

    def _leave(self, unanswered: list[_Item]) -> None:
        while not self._waiting.empty():
            left = self._waiting.get()
            if left is not None and left.answer.set_running_or_notify_cancel():
                unanswered.append(left)
        for item in unanswered:
            item.answer.set_exception(ModelBusyError("the model stops in this process; the study is tried again"))

    def _gather(self) -> list[_Item]:
        """The first question that comes, and what follows within `batch_wait_seconds`, up to `max_batch`."""
        item = self._waiting.get()
        batch: list[_Item] = []
        limit = time.monotonic() + self._settings.batch_wait_seconds
        while item is not None:
            batch.append(item)
            if len(batch) == self._settings.max_batch:
                break
            try:
                item = self._waiting.get(timeout=max(0.0, limit - time.monotonic()))
            except queue.Empty:
                break
        return batch

    def _answer(self, items: list[_Item]) -> None:
        """Answers every item: together, in halves when memory is short, one by one to find the one that is at fault."""
        if not items:
            return
        error = self._try(items)
        if error is None:
            return
        if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
            self._broken.set()
            log.critical("accelerator_failed", exc_info=error)
        elif _is_out_of_memory(error):
            self._metrics.out_of_memory.inc()
            log.warning("model_out_of_memory", batch=len(items))
            if self._drafter.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(items) > 1:
                half = len(items) // 2
                self._answer(items[:half])
                self._answer(items[half:])
                return
        elif len(items) > 1 and not isinstance(error, ModelBusyError):
            for item in items:
                self._answer([item])
            return
        for item in items:
            item.answer.set_exception(_translated(error))

    def _try(self, items: list[_Item]) -> Exception | None:
        """Drafts a batch; returns the error instead of raising it, so that no frame of the failed run holds memory."""

        def watch(_: Progress) -> None:
            if self._closed.is_set() or all(item.deadline.passed for item in items):
                raise ModelBusyError("the deadline passed before the draft was complete; it is tried again")

        started = time.monotonic()
        with _Caught() as caught:
            drafts = self._drafter.draft(
                [(item.volume.hu, item.volume.affine) for item in items],
                [item.question for item in items],
                max_new_tokens=self._max_new_tokens,
                settings=DECODING,
                evidence=items[0].evidence,
                best_slices=not items[0].evidence,
                progress=watch,
            )
            answers = list(zip(items, drafts, strict=True))
        if caught.error is not None:
            return caught.error
        self._metrics.batch_size.observe(len(items))
        log.info(
            "batch_drafted",
            batch=len(items),
            tokens=sum(draft.generated_tokens for _, draft in answers),
            seconds=round(time.monotonic() - started, 3),
        )
        for item, draft in answers:
            item.answer.set_result(draft)
        return None


def _novelty(drafts: Sequence[Draft]) -> dict[str, float]:
    """The score of the volume that is most unlike the training data, where the checkpoint knows it."""
    known = [draft.novelty for draft in drafts if draft.novelty is not None]
    return {"novelty": round(max(known), 3)} if known else {}


def _await(item: _Item) -> Draft:
    """The answer, or `ModelBusyError` when the deadline passes first."""
    while True:
        try:
            return item.answer.result(timeout=LOOK_SECONDS)
        except FutureTimeoutError:
            item.deadline.check()
        except CancelledError as error:
            raise ModelBusyError("the model was taken away; the study is tried again") from error


def _without_heading(text: str, region: str) -> str:
    """A sentence without the region before it, which the report prints above its sentences.

    >>> _without_heading("Chest: The lungs are clear.", "chest")
    'The lungs are clear.'
    """
    heading = f"{region}:"
    return text[len(heading) :].lstrip() if region and text.lower().startswith(heading) else text


def _is_out_of_memory(error: Exception) -> bool:
    """GPU memory, the estimate before it, or the allocator of the CPU, which raises a bare RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "alloc_cpu" in str(error)
    )


def _translated(error: Exception) -> Exception:
    """The error in the words of `worker.core.errors`; an unexpected one stays as it is, for the task's door."""
    if _is_out_of_memory(error):
        return ModelBusyError("the model ran out of memory even for one volume; it is tried again")
    if isinstance(error, torch.AcceleratorError):
        return ModelBusyError("the accelerator failed; the worker starts anew and the study is tried again")
    if isinstance(error, Mu2ModelError):
        return ModelError(f"the model refuses the study: {error}")
    return error


def _device(model: ModelSettings) -> str:
    if model.device != "auto":
        return model.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(model: ModelSettings, device: torch.device) -> torch.dtype:
    if model.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[model.dtype]
