"""The five stages against a local server that speaks the protocol and misbehaves on demand."""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from training.data import Case, read_manifest, write_manifest
from training.endpoint import Completion, Endpoint, EndpointError, Price
from training.synthesize import QUESTIONS_A_REPORT, REPORT_WORDS, AnswerStore, Synthesizer
from training.synthesize_command import app

REPORT = "Dr. Anna Canary read MRN 4711-0815 on 12.03.2024: a 35 mm cyst in the left kidney."
REQUESTS_A_REPORT = 2 + 3 * QUESTIONS_A_REPORT


class Provider:
    """A chat endpoint: answers every stage; `faults` are served first, one a request."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.prompts: list[str] = []
        self.served: Counter[str] = Counter()
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                prompt = body["messages"][-1]["content"]
                provider.prompts.append(prompt)
                fault = provider.faults.pop(0) if provider.faults else ""
                provider.served[fault or "answer"] += 1
                if fault == "hang":
                    time.sleep(0.6)
                status = int(fault) if fault.isdigit() else 200
                answer = provider.answer(prompt)
                content = b'{"choices": [' if fault == "malformed" else json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    if status == 429:
                        self.send_header("retry-after", "0.05")
                    self.send_header("content-length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # The client gave up, as it should after a hang.

            def log_message(self, format: str, *args: object) -> None:
                """Be silent."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def answer(self, prompt: str) -> dict[str, Any]:
        if "JSON list" in prompt:
            text = json.dumps([f"Is there a cyst, version {n}?" for n in range(QUESTIONS_A_REPORT)])
        elif "step by step" in prompt:
            version = re.search(r"version \d", prompt)
            assert version is not None
            text = f"<thinking>A dark area, {version[0]}.</thinking><answer>A cyst of the left kidney.</answer>"
        elif "yes or no" in prompt:
            text = "No." if "version 3" in prompt else "Yes."
        elif "Rewrite the reasoning" in prompt:
            text = "A round dark area is seen in the left kidney."
        else:
            text = "There is a 35 mm cyst in the left kidney."
        return {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 100, "completion_tokens": 20}}

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def provider() -> Iterator[Provider]:
    running = Provider()
    yield running
    running.stop()


def endpoint(provider: Provider, **changes: Any) -> Endpoint:
    settings = {"timeout_seconds": 0.3, "backoff_seconds": 0.01, "requests_per_second": 1000.0, **changes}
    return Endpoint(provider.url, "local", **settings)


def case(number: int = 0) -> Case:
    return Case(
        f"c{number}", f"/v{number}.nii.gz", "Report?", f"{REPORT} Case {number}.", "train", f"p{number}", f"s{number}"
    )


def synthesizer(provider: Provider, tmp_path: Path, **changes: Any) -> Synthesizer:
    return Synthesizer(endpoint(provider, **changes), AnswerStore(tmp_path / "answers"), ["Canary"])


def test_a_report_becomes_questions_with_thinking_and_one_narrative(provider: Provider, tmp_path: Path) -> None:
    worker = synthesizer(provider, tmp_path)
    made = worker.synthesize(case())
    assert [new.case_id for new in made] == ["c0-syn1", "c0-syn2", "c0-syn3", "c0-narrative"]
    assert made[0].answer == (
        "<think>\nA round dark area is seen in the left kidney.\n</think>\nA cyst of the left kidney."
    )
    assert made[0].image == case().image
    assert worker.spent.dropped == {"filter: not supported by the report": 1}
    assert worker.spent.prompt_tokens == 100 * worker.spent.requests


def test_faults_are_waited_out_and_nothing_is_lost(provider: Provider, tmp_path: Path) -> None:
    provider.faults = ["429", "500", "malformed", "hang", "503", "429"]
    assert len(synthesizer(provider, tmp_path, attempts=8).synthesize(case())) == 4
    assert {"429", "500", "malformed", "hang", "503"} <= set(provider.served)


def test_an_endpoint_that_keeps_failing_is_an_error_that_says_how(provider: Provider) -> None:
    provider.faults = ["500"] * 3
    with pytest.raises(EndpointError, match="failed 3 times, last with HTTP 500"):
        endpoint(provider, attempts=3).complete("Hm?")


def test_a_refusal_is_final_at_once(provider: Provider) -> None:
    provider.faults = ["401"]
    with pytest.raises(EndpointError, match="HTTP 401"):
        endpoint(provider).complete("Hm?")
    assert len(provider.prompts) == 1


def test_a_stopped_run_goes_on_without_asking_twice(provider: Provider, tmp_path: Path) -> None:
    provider.faults = ["", "", "", "400"]
    with pytest.raises(EndpointError):
        synthesizer(provider, tmp_path).synthesize(case())
    asked = len(provider.prompts)
    again = synthesizer(provider, tmp_path)
    assert len(again.synthesize(case())) == 4
    assert again.spent.stored == 3
    last = synthesizer(provider, tmp_path)
    last.synthesize(case())
    assert last.spent.requests == 0
    # The refused request is the only one that was sent twice.
    assert len(provider.prompts) == asked + again.spent.requests


def test_a_cut_line_of_a_killed_run_is_asked_again(provider: Provider, tmp_path: Path) -> None:
    synthesizer(provider, tmp_path).synthesize(case())
    file = tmp_path / "answers" / "narrative.jsonl"
    file.write_text(file.read_text()[:-20])
    again = synthesizer(provider, tmp_path)
    again.synthesize(case())
    assert again.spent.requests == 1


def test_an_answer_after_a_cut_line_is_kept(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path)
    store.put("narrative", "a", Completion("Zyste, 3 mm groß", 1, 1))
    file = tmp_path / "narrative.jsonl"
    file.write_bytes(file.read_bytes()[: file.read_bytes().index("ß".encode()) + 1])
    store = AnswerStore(tmp_path)
    store.put("narrative", "b", Completion("A cyst.", 1, 1))
    store.put("narrative", "c", Completion("A stone.", 1, 1))
    again = AnswerStore(tmp_path)
    assert [again.get(key) for key in "abc"] == [None, "A cyst.", "A stone."]


@pytest.mark.parametrize("end", ["\x85", "\u2028", "\u2029", "\x0b", "\x1c"])
def test_an_answer_may_hold_any_end_of_line(tmp_path: Path, end: str) -> None:
    AnswerStore(tmp_path).put("narrative", "a", Completion(f"A cyst.{end}A stone.", 1, 1))
    assert AnswerStore(tmp_path).get("a") == f"A cyst.{end}A stone."


def test_no_name_number_or_date_leaves_the_machine(provider: Provider, tmp_path: Path) -> None:
    synthesizer(provider, tmp_path).synthesize(case())
    sent = "\n".join(provider.prompts)
    assert "35 mm cyst" in sent
    assert not re.search(r"Canary|Anna|4711|12\.03\.2024", sent)


def test_thinking_that_still_mentions_a_report_is_left_out(
    provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = provider.answer

    def careless(prompt: str) -> dict[str, Any]:
        told = honest(prompt)
        if "Rewrite the reasoning" in prompt:
            told["choices"][0]["message"]["content"] = "The report states a cyst."
        return told

    monkeypatch.setattr(provider, "answer", careless)
    worker = synthesizer(provider, tmp_path)
    assert [new.case_id for new in worker.synthesize(case())] == ["c0-narrative"]
    assert worker.spent.dropped["refine: still mentions a report"] == 3


@pytest.mark.parametrize(
    "thinking",
    [
        "The reports show a cyst.",
        "As reported, a cyst is seen.",
        "By the radiologist's note there is a cyst.",
        "The provided text names a cyst.",
        "A cyst is mentioned.",
    ],
)
def test_every_way_to_mention_a_report_is_known(thinking: str) -> None:
    assert REPORT_WORDS.search(thinking)


def test_words_of_what_is_seen_mention_no_report() -> None:
    assert not REPORT_WORDS.search(
        "A dark area with a thin wall is seen in the left kidney; its density is that of water."
    )


def spoiled(provider: Provider, monkeypatch: pytest.MonkeyPatch, word: str, text: str, finish: str = "stop") -> None:
    """One answer of the stage whose prompt holds the word is another; the next is as it should be."""
    honest, texts = provider.answer, [text]

    def answer(prompt: str) -> dict[str, Any]:
        told = honest(prompt)
        if word in prompt and texts:
            told["choices"][0] = {"message": {"content": texts.pop()}, "finish_reason": finish}
        return told

    monkeypatch.setattr(provider, "answer", answer)


@pytest.mark.parametrize(
    ("word", "text", "finish", "made"),
    [
        ("flowing narrative", "There is a 35 mm cyst in the", "length", 3),
        ("flowing narrative", " ", "stop", 3),
        ("JSON list", '["Is there a cyst', "stop", 1),
        ("JSON list", '["Is there a cyst, version 0?"]', "length", 1),
        ("step by step", "A cyst.", "stop", 3),
    ],
)
def test_an_answer_that_is_cut_or_none_is_left_out_and_asked_again_by_the_next_run(
    provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, text: str, finish: str, made: int
) -> None:
    spoiled(provider, monkeypatch, word, text, finish)
    first = synthesizer(provider, tmp_path)
    assert len(first.synthesize(case())) == made
    assert sum(first.spent.dropped.values()) >= 1
    assert len(synthesizer(provider, tmp_path).synthesize(case())) == 4


def test_a_rate_of_nothing_is_refused(provider: Provider, manifest: Path) -> None:
    with pytest.raises(ValueError, match="above 0"):
        endpoint(provider, requests_per_second=0.0)
    assert command(manifest, provider, "--rate", "0").exit_code == 2


@pytest.mark.parametrize("asked", ["²", "soon", "-1", "1e9", "nan", ".", ""])
def test_a_wait_that_is_no_number_is_not_obeyed(provider: Provider, asked: str) -> None:
    response = httpx.Response(429, headers={"retry-after": asked.encode()})
    start = time.monotonic()
    endpoint(provider)._obey(response)
    assert time.monotonic() - start < 1


def test_the_rate_is_bounded(provider: Provider) -> None:
    slow = endpoint(provider, requests_per_second=20.0)
    start = time.monotonic()
    for _ in range(4):
        slow.complete("Rewrite")
    assert time.monotonic() - start >= 3 / 20


@pytest.mark.parametrize(
    "usage",
    [
        *(None, [], "12", {"prompt_tokens": None}, {"completion_tokens": "many"}),
        {"prompt_tokens": -5, "completion_tokens": True},
    ],
)
def test_an_answer_whose_tokens_nobody_counted_is_an_answer(
    provider: Provider, monkeypatch: pytest.MonkeyPatch, usage: object
) -> None:
    honest = provider.answer
    monkeypatch.setattr(provider, "answer", lambda prompt: {**honest(prompt), "usage": usage})
    told = endpoint(provider).complete("Rewrite")
    assert told.text.startswith("There is a 35 mm cyst")
    assert (told.prompt_tokens, told.completion_tokens) == (0, 0)


@pytest.mark.parametrize("body", [[], "text", {"choices": []}, {"choices": [{"message": {"content": None}}]}, None])
def test_a_body_that_is_json_but_no_answer_is_asked_again(
    provider: Provider, monkeypatch: pytest.MonkeyPatch, body: Any
) -> None:
    honest, bodies = provider.answer, [body]
    monkeypatch.setattr(provider, "answer", lambda prompt: bodies.pop() if bodies else honest(prompt))
    assert endpoint(provider).complete("Rewrite").text.startswith("There is a 35 mm cyst")
    assert len(provider.prompts) == 2


def test_a_report_that_the_endpoint_refuses_is_left_out_and_the_others_made(provider: Provider, tmp_path: Path) -> None:
    provider.faults = ["400"]
    worker = synthesizer(provider, tmp_path)
    made = list(worker.run([case(0), case(1), case(2)], 1, lambda: None))
    assert {new.case_id.split("-")[0] for new in made} == {"c1", "c2"}
    assert worker.spent.dropped["endpoint: refused or kept failing"] == 1


def test_an_endpoint_that_refuses_everything_is_left_alone_soon(provider: Provider, tmp_path: Path) -> None:
    provider.faults = ["401"] * 100
    with pytest.raises(EndpointError, match="HTTP 401"):
        list(synthesizer(provider, tmp_path).run([case(number) for number in range(60)], 2, lambda: None))
    assert len(provider.prompts) < 20


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_manifest([case(0), case(1)], tmp_path / "manifest.jsonl")


def command(manifest: Path, provider: Provider, *more: str) -> Any:
    arguments = ["--data", str(manifest), "--out", str(manifest.parent / "new.jsonl"), "--base-url", provider.url]
    return CliRunner().invoke(app, [*arguments, "--endpoint-model", "local", "--rate", "1000", *more])


def test_a_dry_run_prices_and_asks_nothing(provider: Provider, manifest: Path) -> None:
    result = command(manifest, provider, "--dry-run")
    assert result.exit_code == 0, result.output
    assert f"{2 * REQUESTS_A_REPORT} requests" in result.output
    assert provider.prompts == []
    assert not (manifest.parent / "new.jsonl").exists()


def test_a_run_over_its_budget_does_not_start(provider: Provider, manifest: Path) -> None:
    result = command(manifest, provider, "--budget", "0.000001")
    assert result.exit_code == 1
    assert provider.prompts == []


def test_the_command_writes_a_manifest(provider: Provider, manifest: Path) -> None:
    result = command(manifest, provider)
    assert result.exit_code == 0, result.output
    assert len(read_manifest(manifest.parent / "new.jsonl")) == 8


def test_the_command_stops_with_words_and_the_next_goes_on(provider: Provider, manifest: Path) -> None:
    provider.faults = ["", "401", "401", "401", "401"]
    stopped = command(manifest, provider, "--threads", "1")
    assert stopped.exit_code == 1
    assert "HTTP 401" in stopped.output and "goes on from there" in stopped.output
    assert not (manifest.parent / "new.jsonl").exists()
    provider.faults = []
    assert f"about {2 * REQUESTS_A_REPORT - 1} requests" in command(manifest, provider, "--dry-run").output
    finished = command(manifest, provider)
    assert finished.exit_code == 0, finished.output
    assert "about 0 requests" in command(manifest, provider, "--dry-run").output


def test_price_of_gpt_4o_mini() -> None:
    assert Price().cost(2_000_000, 500_000) == pytest.approx(0.6)
