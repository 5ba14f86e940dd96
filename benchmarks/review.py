"""The review page: a slice's time with 50 readers at once, and a wheel through a CT in Chromium.

    python benchmarks/review.py [--readers 50] [--per-second 4] [--seconds 15] [--studies 10] [--json OUT]
    python benchmarks/review.py --part readers | wheel | both

Readers: `mu2 review` as a process of its own serves `--studies` synthetic CTs of 300 slices of 512 x 512 with a scanner's
noise; each reader is logged in, scrolls through one study and asks for `--per-second` slices a second. Time is taken from
the request to the last byte, decompressed. The readers run on the same cores as the page: a hospital's do not.

Wheel: 300 notches of a wheel, `--notches-per-second` of them, through such a CT in Chromium; the page itself measures
from the event to the end of the work of the frame that shows the slice. The viewer has had two seconds to fetch ahead.
"""

import argparse
import asyncio
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from isal import igzip

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.review.builders import Department, Reader, department  # noqa: E402
from worker.core import schema  # noqa: E402
from worker.core.database import Database  # noqa: E402
from worker.core.records import Role  # noqa: E402

SLICES = 300
SIZE = 512
START_SECONDS = 30.0


def main() -> None:
    """Runs the parts and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--part", choices=["readers", "wheel", "both"], default="both")
    parser.add_argument("--readers", type=int, default=50)
    parser.add_argument("--per-second", type=float, default=4.0)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--studies", type=int, default=10)
    parser.add_argument("--notches-per-second", type=float, default=30.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        here, studies = clinic(Path(folder), options.studies if options.part != "wheel" else 1)
        port = free_port()
        process = start(Path(folder), port)
        try:
            result: dict[str, Any] = {"cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
            if options.part != "wheel":
                spent = cpu_seconds(process.pid)
                result["readers"] = asyncio.run(read(port, studies, options))
                spent = cpu_seconds(process.pid) - spent
                result["readers"]["page_cpu_ms_per_slice"] = round(1000 * spent / result["readers"]["slices"], 2)
            if options.part != "readers":
                result["wheel"] = wheel(port, studies[0], options.notches_per_second)
        finally:
            process.terminate()
            process.wait(timeout=15)
            here.database.close()
    for part, figures in result.items():
        print(f"{part}: {figures}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


def clinic(folder: Path, count: int) -> tuple[Department, list[str]]:
    """A database with readers and drafted studies, their volumes in the store."""
    database = Database(f"sqlite:///{folder / 'mu2.sqlite'}")
    schema.upgrade(database)
    here = department(database, folder)
    here.user("reader", Role.RADIOLOGIST)
    return here, [here.drafted(slices=SLICES, size=SIZE, accession=f"A-{n}") for n in range(count)]


def start(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """`mu2 review` on a loopback port."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MU2_")}
    environment |= {
        "MU2_HOME": str(folder),
        "MU2_REVIEW__PORT": str(port),
        "MU2_REVIEW__METRICS_PORT": "0",
        "MU2_LOG__LEVEL": "error",
        "MU2_CONFIG": os.devnull,
        "PYTHONPATH": str(ROOT),
    }
    process = subprocess.Popen([sys.executable, "-m", "worker", "review"], env=environment, cwd=folder)
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            httpx.get(f"http://127.0.0.1:{port}/livez").raise_for_status()
            return process
        except httpx.HTTPError:
            if time.monotonic() > deadline or process.poll() is not None:
                raise
            time.sleep(0.1)


def cpu_seconds(pid: int) -> float:
    """Seconds that a process has had of the processors, by Linux's /proc: what a slice costs, however busy the machine."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def read(port: int, studies: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """All readers at once; percentiles in milliseconds."""
    address = f"http://127.0.0.1:{port}"
    with Reader(base_url=address) as reader:
        reader.log_in("reader")
        cookie = "; ".join(f"{name}={value}" for name, value in reader.cookies.items())
    times: list[float] = []
    wire: list[int] = []
    late = 0

    async def one(number: int) -> None:
        nonlocal late
        study = studies[number % len(studies)]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(secrets.randbelow(1000) / 1000 / options.per_second)
        place = secrets.randbelow(SLICES)
        due = time.perf_counter()
        end = due + options.seconds
        while due < end:
            began = time.perf_counter()
            path = f"/studies/{study}/volumes/1/axial/{place % SLICES}"
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nCookie: {cookie}\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert head.startswith(b"http/1.1 200"), head.split(b"\r\n")[0]
            length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
            body = igzip.decompress(await reader.readexactly(length))
            times.append(time.perf_counter() - began)
            assert len(body) == 2 * SIZE * SIZE
            wire.append(length)
            place += 1
            due += 1 / options.per_second
            wait = due - time.perf_counter()
            late += wait < 0
            await asyncio.sleep(max(0.0, wait))
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(options.readers)))
    elapsed = time.perf_counter() - began
    ordered = np.sort(np.array(times)) * 1000
    return {
        "readers": options.readers,
        "slices": len(times),
        "slices_per_second": round(len(times) / elapsed, 1),
        "p50_ms": round(float(np.percentile(ordered, 50)), 1),
        "p95_ms": round(float(np.percentile(ordered, 95)), 1),
        "p99_ms": round(float(np.percentile(ordered, 99)), 1),
        "longest_ms": round(float(ordered[-1]), 1),
        "mean_kilobytes_on_the_wire": round(statistics.mean(wire) / 1000),
        "requests_begun_late": late,
    }


def wheel(port: int, study: str, notches_per_second: float) -> dict[str, Any]:
    """300 notches; from each event to the frame that shows its slice, in milliseconds."""
    from tests.review.browser import chromium, log_in, wait_for_picture

    with chromium() as browser:
        page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
        log_in(page, f"http://127.0.0.1:{port}")
        page.goto(f"http://127.0.0.1:{port}/studies/{study}")
        wait_for_picture(page)
        page.click("#viewer canvas")
        page.keyboard.press("Home")
        page.wait_for_timeout(2000)
        page.mouse.move(300, 450)
        began = time.perf_counter()
        for notch in range(SLICES):
            page.mouse.wheel(0, 100)
            due = began + (notch + 1) / notches_per_second
            page.wait_for_timeout(max(0.0, (due - time.perf_counter()) * 1000))
        page.wait_for_timeout(1000)
        painted = page.evaluate("performance.getEntriesByName('slice-painted').map((entry) => entry.duration)")
        shown = page.get_attribute("#viewer", "data-painted")
    assert shown == str(SLICES - 1), f"the wheel ended at slice {shown}"
    ordered = sorted(painted)
    return {
        "notches": len(painted),
        "median_ms": round(statistics.median(ordered), 1),
        "p95_ms": round(ordered[int(0.95 * len(ordered))], 1),
        "longest_ms": round(ordered[-1], 1),
        "later_than_150_ms": sum(t > 150 for t in ordered),
    }


if __name__ == "__main__":
    main()
