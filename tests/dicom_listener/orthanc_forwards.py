"""Run in a network namespace by `test_real_peers`: Orthanc takes files by HTTP and forwards the study to a listener.

The last line of stdout is a JSON object of what arrived.
"""

import json
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import sqlalchemy as sa

from dicom_listener.server import Listener, serve
from tests.dicom_listener.sending import data_set_bytes
from worker.core.database import Database
from worker.core.records import Instance, Study
from worker.core.settings import DicomSettings, Peer, Settings, StoreSettings

ORTHANC = "http://127.0.0.1:8042"


def ask(path: str, body: bytes | None = None) -> object:
    with urllib.request.urlopen(urllib.request.Request(ORTHANC + path, data=body), timeout=60) as answer:
        return json.load(answer)


def orthanc(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Orthanc with one remote modality, our listener; returns once it answers."""
    folder.mkdir()
    settings = {
        "StorageDirectory": str(folder),
        "IndexDirectory": str(folder),
        "DicomAet": "ORTHANC",
        "DicomPort": 4242,
        "HttpPort": 8042,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomModalities": {"mu2": ["MU2", "127.0.0.1", port]},
        "Plugins": [],
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    process = subprocess.Popen(["Orthanc", folder / "orthanc.json"], stdout=sys.stderr)
    limit = time.monotonic() + 30
    while True:
        try:
            ask("/system")
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > limit:
                raise
            time.sleep(0.2)
        else:
            return process


def main(home: Path, template: Path, files: list[Path]) -> None:
    shutil.copy(template, home / "mu2.sqlite")
    dicom = DicomSettings(port=0, metrics_port=0, peers=(Peer(ae_title="ORTHANC", address="127.0.0.1"),))
    settings = Settings(home=home, dicom=dicom, store=StoreSettings(floor_bytes=0))
    stop, started, ports = threading.Event(), threading.Event(), []

    def ready(listener: Listener) -> None:
        ports.append(listener.port)
        started.set()

    thread = threading.Thread(target=serve, args=(settings, stop, lambda _: None, ready))
    thread.start()
    started.wait(30)
    process = orthanc(home / "orthanc", ports[0])
    try:
        for file in files:
            ask("/instances", file.read_bytes())
        studies = ask("/studies")
        ask("/modalities/mu2/store", json.dumps({"Resources": studies, "Synchronous": True}).encode())
    finally:
        process.terminate()
        process.wait(20)
        stop.set()
        thread.join(20)
    with Database.from_settings(settings).read() as session:
        paths = session.scalars(sa.select(Instance.path)).all()
        count = session.scalar(sa.select(sa.func.count()).select_from(Study))
    arrived = {data_set_bytes(settings.store_root / path) for path in paths}
    identical = arrived == {data_set_bytes(file) for file in files}
    sys.stdout.write(json.dumps({"instances": len(paths), "studies": count, "identical": identical}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(argument) for argument in sys.argv[3:]])
