import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from training.endpoint import Endpoint
from training.evaluation_commands import make_judge, read_phantom_report
from training.green import EndpointJudge, PhantomJudge, Verdict, make_prompt, parse
from training.metrics.findings import Stated
from training.phantoms import report
from training.phantoms.disease import draw_case

ANSWER = """[Explanation]:
The candidate misses one finding.

[Clinically Significant Errors]:
(a) False report of a finding in the candidate: 1. Nodule in the left lung
(b) Missing a finding present in the reference: 2. Effusion; ascites
(c) Misidentification of a finding's anatomic location/position: 0.
(d) Misassessment of the severity of a finding: 0.
(e) Mentioning a comparison that isn't in the reference: 0.
(f) Omitting a comparison detailing a change from a prior study: 0.

[Clinically Insignificant Errors]:
(a) False report of a finding in the candidate: 0.
(d) Misassessment of the severity of a finding: 1. 12 mm instead of 11 mm

[Matched Findings]:
3. Cyst; splenomegaly; fracture
"""


def test_the_prompt_is_the_published_one() -> None:
    prompt = make_prompt("R", "C")
    assert len(prompt) == 1846
    assert hashlib.sha256(prompt.encode()).hexdigest().startswith("386063ef7003190f")


def test_a_whole_answer_is_read() -> None:
    verdict = parse(ANSWER)
    assert verdict == Verdict((1, 2, 0, 0, 0, 0), (0, 0, 0, 1, 0, 0), 3)
    assert verdict.score == 0.5


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (ANSWER.replace("3. Cyst; splenomegaly; fracture", "0."), 0.0),
        (ANSWER.replace("3. Cyst; splenomegaly; fracture", "No matched findings"), 0.0),
        (ANSWER.replace("(a)", "(1)").replace("(b)", "(2)"), 0.5),
        (ANSWER.split("[Clinically Insignificant")[0] + "[Matched Findings]:\n3. A; B; C", 0.5),
        ("[Clinically Significant Errors]:\nNone\n[Matched Findings]:\n2. A; B", 1.0),
        ("```\n[Clinically Significant Errors]:\n\n\n[Matched Findings]:\n1. A\n```", 1.0),
        ("[Clinically Significant Errors]:\n(a) False report: none.\n\n[Matched Findings]:\n(2) A; B", 1.0),
        (ANSWER.split("[Matched")[0], None),
        ("The reports agree well.", None),
        ("[Clinically Significant Errors]:\nsome\n[Matched Findings]:\n2. A", None),
        ("[Clinically Significant Errors]:\nNo\n[Matched Findings]:\nmany", None),
        ("", None),
    ],
)
def test_answers_are_scored_or_said_to_be_unreadable(answer: str, score: float | None) -> None:
    verdict = parse(answer)
    assert (None if verdict is None else verdict.score) == score


def significant(lines: str, matched: str = "3. A; B; C") -> str:
    return f"[Clinically Significant Errors]:\n{lines}\n\n[Matched Findings]:\n{matched}"


@pytest.mark.parametrize(
    ("lines", "counts"),
    [
        ("(A) False report: 1\n(c) Place: 0.", (1, 0, 0, 0, 0, 0)),
        ("a) False report: 1. nodule\nb) Missing: none", (1, 0, 0, 0, 0, 0)),
        ("- **(a)** False report: **2**. nodule", (2, 0, 0, 0, 0, 0)),
        ("(a) False report: 1. left nodule\n(a) False report: 2. cysts", (3, 0, 0, 0, 0, 0)),
        ("(a) F: 1. (b) G: 2.", (1, 2, 0, 0, 0, 0)),
        ("(a) F: 1 (b) G: 2", (1, 2, 0, 0, 0, 0)),
        ("(a) F: 0. (b) G: nodule", None),
        ("No errors of type (b), but:\n(a) False report: 4", (4, 0, 0, 0, 0, 0)),
        ("(b) Missing: 2.\n(1) nodule\n(2) effusion", (0, 2, 0, 0, 0, 0)),
        ("(a) False report: No invented findings\n(b) Missing: N/A", (0, 0, 0, 0, 0, 0)),
        ("(a) False report: One. nodule\n(c) Place: 0", None),
        ("(a) False report: nodule in the left lung\n(c) Place: 0", None),
        ("(a) False report: nodule in the lung: 3\n(c) Place: 0", None),
        ("(a) False report: 12 mm nodule\n(c) Place: 0", None),
        ("(a) False report:\n 2. nodule, effusion\n(c) Place: 0", None),
        ("(a) False report: None of the two nodules is there\n(c) Place: 0", None),
        ("(1) nodule\n(2) effusion", None),
        ("None, but two nodules were missed.", None),
    ],
)
def test_a_kind_of_error_is_counted_or_the_answer_is_unreadable(lines: str, counts: tuple[int, ...] | None) -> None:
    verdict = parse(significant(lines))
    assert (None if verdict is None else verdict.significant) == counts


@pytest.mark.parametrize("title", ["**[{}]:**", "**[{}]**:", "### [{}]", "[{}]:", "***[{}]:***"])
def test_titles_may_be_bold_or_headings(title: str) -> None:
    lines = significant("(b) Missing: 1. nodule")
    for name in ("Clinically Significant Errors", "Matched Findings"):
        lines = lines.replace(f"[{name}]:", title.format(name))
    verdict = parse(lines)
    assert verdict is not None
    assert verdict.score == 0.75


@pytest.mark.parametrize("quote", ["I write [Clinically Significant Errors]: none there.", significant("none", "9. A")])
def test_the_section_counts_and_not_its_quotation_in_the_explanation(quote: str) -> None:
    verdict = parse(f"[Explanation]:\n{quote}\n\n{significant('(a) False report: 1. nodule')}")
    assert verdict == Verdict((1, 0, 0, 0, 0, 0), (0,) * 6, 3)


def test_a_section_is_not_ended_by_a_quotation_of_its_title() -> None:
    verdict = parse(significant("(a) False report: 1. nodule", "3. A; as [Clinically Significant Errors]: none says"))
    assert verdict == Verdict((1, 0, 0, 0, 0, 0), (0,) * 6, 3)


@pytest.mark.parametrize(("matched", "count"), [("1. A\n2. B\n3. C", 3), ("3. A\nB\nC", 3), ("12 mm nodule", None)])
def test_matched_findings_in_a_list_are_all_counted(matched: str, count: int | None) -> None:
    verdict = parse(significant("none", matched))
    assert (None if verdict is None else verdict.matched) == count


NODULE = Stated("lung_nodule", "left", "upper lobe", 12)
CYST = Stated("hepatic_cyst", "", "segment IV", 30)


@pytest.mark.parametrize(
    ("truth", "said", "score"),
    [
        ([NODULE, CYST], [NODULE, CYST], 1.0),
        ([NODULE, CYST], [NODULE], 0.5),
        ([NODULE], [NODULE, CYST], 0.5),
        ([NODULE], [Stated("lung_nodule", "right", "upper lobe", 12)], 0.0),
        ([NODULE, CYST], [Stated("lung_nodule", "right"), CYST], 0.5),
        ([NODULE], [Stated("lung_nodule", "left", "lower lobe", 12)], 0.5),
        ([NODULE], [Stated("lung_nodule", "left", "upper lobe", 20)], 0.5),
        ([NODULE], [], 0.0),
        ([], [], 1.0),
        ([], [NODULE], 0.0),
    ],
)
def test_the_phantom_judge_counts_by_structured_truth(truth: list[Stated], said: list[Stated], score: float) -> None:
    judge = PhantomJudge(read_phantom_report)
    verdict = parse(judge.answer(truth, said))
    assert verdict is not None
    assert verdict.score == score


def test_the_phantom_judge_reads_reports() -> None:
    judge = PhantomJudge(read_phantom_report)
    cases = [draw_case(seed) for seed in range(950_000_000, 950_000_012)]
    reports = [report.write(case) for case in cases]
    abnormal = next(text for case, text in zip(cases, reports, strict=True) if case.findings)
    normal = next(text for case, text in zip(cases, reports, strict=True) if not case.findings)
    same, other = judge.judge(abnormal, abnormal), judge.judge(abnormal, normal)
    assert same is not None
    assert other is not None
    assert (same.score, other.score) == (1.0, 0.0)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert "Candidate Report:\n    a cyst" in body["messages"][0]["content"]
            answer = json.dumps({"choices": [{"message": {"content": ANSWER}}]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Be silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "any")
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_endpoint_can_judge(endpoint: Endpoint) -> None:
    verdict = EndpointJudge(endpoint).judge("a cyst and a nodule", "a cyst")
    assert verdict is not None
    assert verdict.score == 0.5


def test_judges_are_made_by_name() -> None:
    assert make_judge("none") is None
    assert isinstance(make_judge("phantom"), PhantomJudge)
    judge = make_judge("http://127.0.0.1:9/v1#llama")
    assert judge is not None
    assert judge.name == "endpoint:llama"
