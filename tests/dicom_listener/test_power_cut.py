"""A power cut, played: of all that was written only what was synced is still there.

`kill -9` loses nothing that the system's cache holds, so it cannot show that a sync is missing. Here a disk is kept beside the
real one: a file's bytes reach it when the file is synced, a folder's entries when the folder is.
"""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from dicom_listener import storage
from dicom_listener.arrivals import Ranking, recover
from dicom_listener.metrics import Metrics
from dicom_listener.statuses import Status
from dicom_listener.storage import Store
from tests.dicom_listener.conftest import Running
from tests.dicom_listener.sending import connect, ct, send
from worker.core.database import Database


class SyncedDisk:
    """What a power cut would leave of everything below the folders that were synced."""

    def __init__(self) -> None:
        self._contents: dict[int, bytes] = {}  # inode → bytes at its last sync
        self._entries: dict[Path, dict[str, int]] = {}  # folder → names and inodes at its last sync
        self._fsync = os.fsync

    def fsync(self, fd: int) -> None:
        """Stands for `os.fsync`; what was written before the call is kept once it returns."""
        path = Path(f"/proc/self/fd/{fd}").readlink()
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            entries = {entry.name: entry.inode() for entry in os.scandir(path)}
            self._fsync(fd)
            self._entries[path] = entries
        else:
            content = os.pread(fd, status.st_size, 0)
            self._fsync(fd)
            self._contents[status.st_ino] = content

    def restore(self, folder: Path, target: Path) -> Path:
        """Writes what is left of `folder` to `target`: an entry without synced bytes is an empty file."""
        target.mkdir()
        for name, inode in self._entries.get(folder, {}).items():
            if (folder / name).is_dir():
                self.restore(folder / name, target / name)
            else:
                (target / name).write_bytes(self._contents.get(inode, b""))
        return target


@pytest.mark.parametrize("slow", [False, True], ids=["synced in turn", "synced side by side"])
def test_every_acknowledged_instance_outlives_a_power_cut_right_after_its_answer(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slow: bool
) -> None:
    disk = SyncedDisk()
    monkeypatch.setattr(os, "fsync", disk.fsync)
    monkeypatch.setattr(storage, "SLOW_SYNC_SECONDS", -1.0 if slow else 60.0)
    monkeypatch.setattr(storage, "SLOW_IN_A_ROW", 2)
    running = start()
    association = connect(running.port)
    first = ct()
    pixels: list[bytes] = []
    for number, image in enumerate([first, ct(first.StudyInstanceUID), ct(), ct(first.StudyInstanceUID), ct()]):
        assert association.send_c_store(image).Status == Status.SUCCESS
        pixels.append(image.PixelData)
        left = disk.restore(running.sent.root, tmp_path / f"cut-{number}")
        files = [file.read_bytes() for file in (left / "instances").rglob("*.dcm")]
        assert len(files) == len(pixels)
        assert all(any(own in file for file in files) for own in pixels)
    association.release()


def test_rows_of_a_disk_that_lost_its_database_are_made_again_from_what_was_synced(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sqlite_database: Database
) -> None:
    disk = SyncedDisk()
    monkeypatch.setattr(os, "fsync", disk.fsync)
    running = start()
    assert send(running.port, [ct(), ct(), ct()]) == [Status.SUCCESS] * 3
    store = Store(disk.restore(running.sent.root, tmp_path / "cut"), 0)
    assert recover(store, sqlite_database, Ranking({}), Metrics()) == 3


@pytest.mark.parametrize("left", [None, b"", b"half"], ids=["gone", "empty", "torn"])
def test_row_whose_bytes_are_lost_does_not_make_its_instance_a_duplicate(running: Running, left: bytes | None) -> None:
    image = ct()
    assert send(running.port, [image]) == [Status.SUCCESS]
    (path,) = running.sent.files()
    whole = path.read_bytes()
    path.unlink()
    if left is not None:
        path.write_bytes(left)
    assert send(running.port, [image]) == [Status.SUCCESS]
    assert path.read_bytes() == whole
    assert len(running.sent.instances()) == 1
