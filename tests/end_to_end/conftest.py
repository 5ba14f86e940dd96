"""Nothing of this machine's settings reaches an end-to-end test; what the services of a failed one said is shown."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.running_services import drop_environment
from worker.delivery.mllp_receiver import MllpReceiver

_TAIL_LINES = 40


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    drop_environment(monkeypatch)


@pytest.fixture
def receiver() -> Iterator[MllpReceiver]:
    """An HL7 receiver that acknowledges."""
    with MllpReceiver() as made:
        yield made


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Shows the ends of the services' logs."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    folder: Path | None = getattr(item, "funcargs", {}).get("tmp_path")
    if report.failed and folder is not None:
        for log in sorted(folder.rglob("logs/*.log")):
            lines = log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
            report.sections.append((f"{log.name}", "\n".join(lines)))
