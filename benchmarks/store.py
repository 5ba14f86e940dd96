"""C-STORE: instances a second of the listener beside dcmtk's storescp, Orthanc and pynetdicom's storescp.

    python benchmarks/store.py [--repeats 5] [--instances 150] [--places tmpfs,disk] [--streams 1,4] [--processes 1]
    python benchmarks/store.py --flat 20000        the listener's memory over so many instances

Every receiver is started empty, takes the same 512 x 512 CT instances (525 kB, uncompressed) from dcmtk's `storescu`, one
process a stream, and is stopped; the receivers take turns within each repeat, so that a slow minute of the machine falls
on all of them. Ours and Orthanc fsync before they answer; `storescp --fork` and pynetdicom's do not. `TCP_NODELAY=1` is set
for dcmtk and Orthanc, without which they are several times slower on a loopback. The processor time of each stands beside
its rate: where the disk takes more than the cores can send and receive, no order of flushes reaches it. Everything runs in
a network namespace of its own, because two of the receivers cannot be bound to the loopback alone.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PORT = 11112
ENVIRONMENT = {**os.environ, "TCP_NODELAY": "1", "PYTHONPATH": str(ROOT)}
OURS = "mu2 listener"
PROCESSES = "STORE_BENCH_PROCESSES"
ORTHANC_SETTINGS = {
    "Name": "bench",
    "DicomAet": "MU2",
    "DicomPort": PORT,
    "HttpServerEnabled": False,
    "DicomCheckCalledAet": False,
    "DicomAlwaysAllowStore": True,
    "SyncStorageArea": True,
    "StorageCompression": False,
    "ConcurrentJobs": 0,
    "Plugins": [],
}


@dataclass(frozen=True)
class Receiver:
    """A C-STORE receiver that can be started in an empty folder."""

    name: str
    durable: bool
    command: Callable[[Path], list[str]]


def _ours(home: Path) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--serve", str(home), "--processes", os.environ[PROCESSES]]


def _storescp(home: Path) -> list[str]:
    return ["storescp", "--fork", "-q", "-od", str(home), "-aet", "MU2", str(PORT)]


def _storescp_large_pdus(home: Path) -> list[str]:
    return ["storescp", "-pdu", "131072", *_storescp(home)[1:]]


def _orthanc(home: Path) -> list[str]:
    settings = {**ORTHANC_SETTINGS, "StorageDirectory": str(home / "db"), "IndexDirectory": str(home / "db")}
    (home / "orthanc.json").write_text(json.dumps(settings))
    return ["Orthanc", str(home / "orthanc.json")]


def _pynetdicom(home: Path) -> list[str]:
    return [sys.executable, "-m", "pynetdicom", "storescp", str(PORT), "-od", str(home), "-aet", "MU2"]


RECEIVERS = [
    Receiver(OURS, True, _ours),
    Receiver("dcmtk storescp --fork", False, _storescp),
    Receiver("dcmtk storescp --fork, 128 KiB PDUs", False, _storescp_large_pdus),
    Receiver("Orthanc", True, _orthanc),
    Receiver("pynetdicom storescp", False, _pynetdicom),
]
COLUMNS = (
    "where",
    "associations",
    "receiver",
    "durable before success",
    "instances/s: median (range)",
    "MB/s",
    "processor ms an instance, with its sender",
    "ours ÷ this: median (range)",
)
PROGRAMS = {
    "dcmtk storescp --fork": "storescp",
    "dcmtk storescp --fork, 128 KiB PDUs": "storescp",
    "Orthanc": "Orthanc",
}


def serve(home: Path, processes: int) -> None:
    """The listener with settings for this benchmark: any peer, a quiet period that never comes to pass."""
    from dicom_listener.server import serve as serve_listener
    from worker.core import logs, schema
    from worker.core.database import Database
    from worker.core.settings import DicomSettings, Settings, StoreSettings

    logs.configure("listener", "warning")
    dicom = DicomSettings(port=PORT, metrics_port=0, quiet_seconds=3600.0, processes=processes)
    settings = Settings(home=home, dicom=dicom, store=StoreSettings(floor_bytes=0))
    database = Database.from_settings(settings)
    schema.upgrade(database)
    database.close()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    serve_listener(settings, stop, lambda study_id: None)


def make_instances(folder: Path, streams: int, count: int) -> list[Path]:
    """`count` CT instances for each stream, one study a stream; returns the streams' folders."""
    import numpy as np
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    pixels = np.random.default_rng(0).integers(0, 4096, (512, 512), dtype=np.uint16)
    folders = []
    for stream in range(streams):
        target = folder / f"stream-{stream}"
        target.mkdir(parents=True)
        study, series = generate_uid(), generate_uid()
        for number in range(count):
            meta = FileMetaDataset()
            meta.MediaStorageSOPClassUID = CTImageStorage
            meta.MediaStorageSOPInstanceUID = generate_uid()
            meta.TransferSyntaxUID = ExplicitVRLittleEndian
            image = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
            image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
            image.StudyInstanceUID, image.SeriesInstanceUID = study, series
            image.PatientID, image.PatientName, image.Modality = f"BENCH{stream}", "Bench^Mark", "CT"
            image.StudyDate, image.StudyTime, image.AccessionNumber = "20250101", "101010", f"A{stream}"
            image.InstanceNumber, image.SeriesNumber = number + 1, 2
            image.ImagePositionPatient, image.ImageOrientationPatient = [0, 0, number], [1, 0, 0, 0, 1, 0]
            image.PixelSpacing, image.SliceThickness = [0.7, 0.7], 1
            image.Rows = image.Columns = 512
            image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
            image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
            image.RescaleSlope, image.RescaleIntercept = 1, -1024
            pixels[0, 0] = number
            image.PixelData = pixels.tobytes()
            image.save_as(target / f"{number:05}.dcm", enforce_file_format=True)
        folders.append(target)
    return folders


def _wait_for_port(process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + 30
    while time.monotonic() < limit:
        if process.poll() is not None:
            raise SystemExit(f"{process.args} ended at once with {process.returncode}")
        try:
            socket.create_connection(("127.0.0.1", PORT), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise SystemExit(f"{process.args} opened no port")


class Running:
    """A started receiver in an empty folder."""

    def __init__(self, receiver: Receiver, place: Path) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="store-", dir=place))
        self.process = subprocess.Popen(
            receiver.command(self.home),
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.home,
        )

    def __enter__(self) -> "Running":
        _wait_for_port(self.process)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.home, ignore_errors=True)


@dataclass(frozen=True)
class Pace:
    """How one run went."""

    rate: float  # instances a second
    processor_ms: float  # user and system time an instance, of receiver and senders together


def send(folders: list[Path]) -> float:
    """Seconds until every stream has sent its folder; raises when a sender fails."""
    began = time.perf_counter()
    command = ["storescu", "-q", "-aec", "MU2", "--scan-directories", "127.0.0.1", str(PORT)]
    senders = [subprocess.Popen([*command, str(folder)], env=ENVIRONMENT) for folder in folders]
    codes = [sender.wait() for sender in senders]
    if any(codes):
        raise SystemExit("storescu failed")
    return time.perf_counter() - began


def receive(receiver: Receiver, place: Path, folders: list[Path], count: int) -> Pace:
    """One run of a receiver, started for it alone."""
    with Running(receiver, place) as running:
        before = _processor_seconds(running.process.pid)
        rate = count / send(folders)
        return Pace(rate, (_processor_seconds(running.process.pid) - before) / count * 1e3)


def _processor_seconds(receiver: int) -> float:
    """User and system time of a receiver with all its processes, and of the senders that have ended."""
    ticks, waiting = 0, [receiver]
    while waiting:
        process = Path(f"/proc/{waiting.pop()}")
        with suppress(FileNotFoundError, ProcessLookupError):  # a process for one association ends with it
            ticks += sum(map(int, (process / "stat").read_text().rpartition(")")[2].split()[11:15]))
            for task in (process / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
    senders = os.times()
    return ticks / os.sysconf("SC_CLK_TCK") + senders.children_user + senders.children_system


def disk_rate(place: Path, folders: list[Path]) -> Pace:
    """Plain write + fsync of the same bytes, one thread a stream, nobody sending: a new file each, its folder not synced."""
    home = Path(tempfile.mkdtemp(prefix="disk-", dir=place))
    contents = [[file.read_bytes() for file in sorted(folder.iterdir())] for folder in folders]

    def write(stream: int) -> None:
        for number, content in enumerate(contents[stream]):
            fd = os.open(home / f"{stream}-{number}", os.O_WRONLY | os.O_CREAT)
            os.write(fd, content)
            os.fsync(fd)
            os.close(fd)

    threads = [threading.Thread(target=write, args=(stream,)) for stream in range(len(folders))]
    began, before = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, busy = time.perf_counter() - began, time.process_time() - before
    shutil.rmtree(home)
    count = sum(map(len, contents))
    return Pace(count / seconds, busy / count * 1e3)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    place: str
    streams: int
    name: str
    durable: bool
    rates: list[float]  # instances a second, one a repeat
    ratios: list[float]  # ours over this one, repeat by repeat
    megabytes: float  # MB/s at the median
    processor_ms: float  # median; the cores over this is the most that they could ever do

    def markdown(self) -> str:
        ratio = f"{statistics.median(self.ratios):.2f} ({min(self.ratios):.2f}–{max(self.ratios):.2f})"
        return (
            f"| {self.place} | {self.streams} | {self.name} | {'yes' if self.durable else 'no'} | "
            f"{statistics.median(self.rates):.0f} ({min(self.rates):.0f}–{max(self.rates):.0f}) | "
            f"{self.megabytes:.0f} | {self.processor_ms:.2f} | {ratio} |"
        )


def measure(place_name: str, place: Path, folders: list[Path], receivers: list[Receiver], repeats: int) -> list[Row]:
    files = [file for folder in folders for file in folder.iterdir()]
    size = sum(file.stat().st_size for file in files) / len(files)
    own = "write + fsync alone"
    paces: dict[str, list[Pace]] = {name: [] for name in [*(receiver.name for receiver in receivers), own]}
    for repeat in range(repeats):
        order = receivers[repeat % len(receivers) :] + receivers[: repeat % len(receivers)]
        for receiver in order:
            paces[receiver.name].append(receive(receiver, place, folders, len(files)))
        paces[own].append(disk_rate(place, folders))
    rates = {name: [pace.rate for pace in found] for name, found in paces.items()}
    ours = rates[OURS]
    return [
        Row(
            place_name,
            len(folders),
            name,
            name == own or next(r.durable for r in receivers if r.name == name),
            found,
            [mine / other for mine, other in zip(ours, found, strict=True)],
            statistics.median(found) * size / 1e6,
            statistics.median(pace.processor_ms for pace in paces[name]),
        )
        for name, found in rates.items()
    ]


def flat(count: int, place: Path) -> None:
    """Prints the listener's memory while `count` instances arrive on four associations at a time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch, Running(RECEIVERS[0], place) as ours:
        sent, samples = 0, []
        while sent < count:
            folders = make_instances(Path(scratch) / str(sent), 4, 250)
            send(folders)
            sent += 1000
            samples.append(_resident(ours.process.pid))
            shutil.rmtree(Path(scratch) / str(sent - 1000))
            shutil.rmtree(ours.home / "store" / "instances", ignore_errors=True)
            print(f"{sent} instances: {samples[-1]:.1f} MB resident", flush=True)
        settled = samples[0]
        print(
            f"| memory | {count} instances | {min(samples):.1f}–{max(samples):.1f} MB | "
            f"{max(samples) - settled:+.1f} MB after the first 1,000 |"
        )


def _resident(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def _in_own_network() -> None:
    """Runs this script again in a network namespace with a loopback of its own."""
    if os.environ.get("MU2_BENCH_NETWORK") == "own":
        del os.environ["MU2_BENCH_NETWORK"]
        return
    if not shutil.which("unshare"):
        raise SystemExit("`unshare` is missing (package util-linux); it keeps the receivers off the network")
    inside = 'ip link set lo up && exec "$@"'
    rights = [] if os.geteuid() == 0 else ["-r"]
    os.environ["MU2_BENCH_NETWORK"] = "own"
    os.execvp("unshare", ["unshare", *rights, "-n", "sh", "-c", inside, "sh", sys.executable, *sys.argv])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--instances", type=int, default=150, help="instances of each stream")
    parser.add_argument("--streams", default="1,4")
    parser.add_argument("--places", default="tmpfs,disk")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"), help="a folder on the disk to measure")
    parser.add_argument("--only", default="", help="receivers whose name contains one of these words, and ours")
    parser.add_argument("--processes", type=int, default=1, help="receiving processes of the listener")
    parser.add_argument("--flat", type=int, metavar="COUNT")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.processes)
        return
    os.environ[PROCESSES] = ENVIRONMENT[PROCESSES] = str(options.processes)
    _in_own_network()
    if not shutil.which("storescu"):
        raise SystemExit("dcmtk is missing (Debian package dcmtk); it is the sender")
    if options.flat:
        flat(options.flat, Path("/dev/shm"))
        return
    words = options.only.split(",") if options.only else [""]
    receivers = [r for r in RECEIVERS if r.name == OURS or any(word in r.name for word in words)]
    missing = [r for r in receivers if r.name in PROGRAMS and not shutil.which(PROGRAMS[r.name])]
    for receiver in missing:
        print(f"{receiver.name} is not installed and is left out", file=sys.stderr)
    receivers = [r for r in receivers if r not in missing]
    places = {"tmpfs": Path("/dev/shm"), "disk": options.disk}
    rows: list[Row] = []
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    for name in options.places.split(","):
        for streams in map(int, options.streams.split(",")):
            with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
                folders = make_instances(Path(scratch), streams, options.instances)
                for row in measure(name, places[name], folders, receivers, options.repeats):
                    print(row.markdown(), flush=True)
                    rows.append(row)
    if options.json:
        options.json.write_text(json.dumps([row.__dict__ for row in rows], indent=1))


if __name__ == "__main__":
    main()
