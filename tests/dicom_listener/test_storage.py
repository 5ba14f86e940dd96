"""The store: whole, durable files under names of our own, and what happens when the disk is full."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydicom import dcmread
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from dicom_listener import part10, storage
from dicom_listener.committer import LocalRows
from dicom_listener.statuses import Status
from dicom_listener.storage import Incoming, Store
from tests.dicom_listener.conftest import Running
from tests.dicom_listener.sending import ct, echo, send
from worker.core.arrivals import Arrival, Recorded
from worker.core.errors import InvalidObjectError, StoreUnavailableError
from worker.core.records import Instance
from worker.core.settings import StoreSettings


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "store", 0)
    opened.open()
    yield opened
    opened.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def receive(store: Store, content: bytes, instance: str = "1.2.3") -> Incoming:
    incoming = store.receive(CTImageStorage, instance, ExplicitVRLittleEndian)
    incoming.add(memoryview(content))
    return incoming


def place(store: Store, content: bytes, study: str = "1.2", instance: str = "1.2.3") -> Path:
    incoming = receive(store, content, instance)
    name = store.name(incoming.seal(), study, instance)
    incoming.place(name)
    incoming.discard()
    return store.path(name)


def test_file_header_is_valid_and_names_what_was_sent(tmp_path: Path) -> None:
    path = tmp_path / "file.dcm"
    path.write_bytes(part10.file_meta(CTImageStorage, "1.2.3.45", ExplicitVRLittleEndian, "ER_CT"))
    meta = dcmread(path).file_meta
    assert (meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID) == (CTImageStorage, "1.2.3.45")
    assert meta.SourceApplicationEntityTitle == "ER_CT"
    assert meta.FileMetaInformationGroupLength == path.stat().st_size - 144


def test_names_hold_nothing_that_was_sent(store: Store) -> None:
    path = place(store, b"content", "1.2.3", "4.5.6")
    relative = path.relative_to(store.root)
    assert relative.parts[0] == "instances"
    assert all(set(part) <= set("0123456789abcdef-.dcm") for part in relative.parts[1:])
    assert "1.2.3" not in str(relative)


def test_same_content_has_one_name_and_other_content_another(store: Store) -> None:
    first, again, other = (place(store, content) for content in (b"one", b"one", b"two"))
    assert first == again
    assert first != other
    assert len(list(first.parent.iterdir())) == 2


def test_file_is_not_in_its_place_before_it_is_whole(store: Store) -> None:
    incoming = store.receive(CTImageStorage, "1.2.3", ExplicitVRLittleEndian)
    incoming.add(memoryview(b"half"))
    assert len(list((store.root / "incoming").rglob("*.part"))) == 1
    assert not list((store.root / "instances").rglob("*.dcm"))
    incoming.discard()
    assert not list((store.root / "incoming").rglob("*.part"))


def test_stored_file_is_read_back_as_it_was_received(store: Store) -> None:
    incoming = receive(store, b"content" * 5000)
    held = incoming.seal()
    incoming.place(store.name(held, "1.2", "1.2.3"))
    again = part10.read_file(store.path(store.name(held, "1.2", "1.2.3")))
    assert (again.sha256, again.size_bytes, again.offset) == (held.sha256, held.size_bytes, held.offset)
    assert (again.transfer_syntax, again.head) == (held.transfer_syntax, held.head)


def test_file_that_a_power_cut_tore_is_mended_by_sending_it_again(store: Store) -> None:
    path = place(store, b"content" * 100)
    whole = path.read_bytes()
    path.write_bytes(whole[:300])
    assert place(store, b"content" * 100) == path
    assert path.read_bytes() == whole
    assert not list((store.root / "incoming").rglob("*.part"))


@pytest.mark.parametrize("content", [b"", bytes(200), bytes(128) + b"DICM" + b"\xff" * 100])
def test_foreign_file_in_the_store_is_named_as_such(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.dcm"
    path.write_bytes(content)
    with pytest.raises(InvalidObjectError):
        part10.read_file(path)


def test_leftovers_of_dead_processes_are_swept_and_those_of_living_ones_are_not(store: Store) -> None:
    alive = store.receive(CTImageStorage, "1.2.3", ExplicitVRLittleEndian)
    dead = store.root / "incoming" / "dead"
    dead.mkdir()
    (dead / "lock").touch()
    (dead / "7.part").write_bytes(b"half")
    second = Store(store.root, 0)
    second.open()
    assert not dead.exists()
    alive.add(memoryview(b"goes on"))
    assert Path(alive.seal().path).exists()
    second.close()


@pytest.mark.parametrize("slow", [False, True])
def test_folder_and_its_parents_are_synced_when_they_are_new_or_made_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(storage, "SLOW_SYNC_SECONDS", -1.0 if slow else 60.0)

    def noted(fd: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        fsync(fd)

    for number in range(storage.SLOW_IN_A_ROW + 1):  # they tell how slow the disk is; the last but asks again
        place(store, bytes([number]), "9.9")
    monkeypatch.setattr(os, "fsync", noted)
    folders = [str(p) for p in list(place(store, b"one").parents)[:3]]
    assert set(folders) < set(synced)
    synced.clear()
    place(store, b"two")
    assert [s for s in synced if s in folders] == folders[:1]
    path = place(store, b"one")
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()
    synced.clear()
    place(store, b"one")
    assert set(folders) < set(synced)


def test_write_that_the_disk_takes_in_parts_is_finished(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_write = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, parts: whole_write(fd, [memoryview(parts[0])[:3]]))
    assert place(store, b"0123456789" * 20).read_bytes().endswith(b"0123456789" * 20)


@pytest.mark.parametrize("times", [1, 100], ids=["once", "always"])
def test_file_that_goes_before_its_row_is_committed_is_placed_again_or_not_acknowledged(
    running: Running, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    image = ct()
    assert send(running.port, [image]) == [Status.SUCCESS]
    (path,) = running.sent.files()
    commit = LocalRows.commit
    left = [times]

    def after_retention(self: LocalRows, arrival: Arrival) -> Recorded:
        left[0] -= 1
        if left[0] >= 0:
            path.unlink()
            with running.sent.database.write() as session:
                session.execute(sa.update(Instance).values(removed_at=arrival.received_at))
        return commit(self, arrival)

    with monkeypatch.context() as race:
        race.setattr(LocalRows, "commit", after_retention)
        assert send(running.port, [image]) == [Status.SUCCESS if times == 1 else Status.OUT_OF_RESOURCES]
    assert path.is_file() == (times == 1)
    assert not list((running.sent.root / "incoming").rglob("*.part"))
    if times == 1:
        assert running.sent.instances()[0].removed_at is None


def test_disk_below_its_floor_refuses_with_its_status_and_echo_still_answers(start: Callable[..., Running]) -> None:
    running = start(store=StoreSettings(floor_bytes=1 << 60))
    assert send(running.port, [ct(), ct()]) == [Status.OUT_OF_RESOURCES] * 2
    assert echo(running.port)
    assert not running.sent.files()


def test_full_disk_refuses_in_the_middle_of_a_data_set_and_goes_on_when_there_is_room(
    start: Callable[..., Running], small_disk: Path
) -> None:
    running = start(store=StoreSettings(url=str(small_disk / "store"), floor_bytes=0))
    large, small = ct(PixelData=bytes(6_000_000)), ct()
    assert send(running.port, [small, large, ct()]) == [Status.SUCCESS, Status.OUT_OF_RESOURCES, Status.SUCCESS]
    assert len(running.sent.instances()) == len(running.sent.files()) == 2
    assert not list((small_disk / "store" / "incoming").rglob("*.part"))


@pytest.mark.parametrize("step", ["fsync", "link", "open", "writev"])
def test_failing_disk_is_answered_with_out_of_resources_and_no_row(
    running: Running, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as broken:
        broken.setattr(f"dicom_listener.storage.os.{step}", fail)
        statuses = send(running.port, [ct()])
    assert statuses == [Status.OUT_OF_RESOURCES]
    assert not running.sent.instances()
    assert send(running.port, [ct()]) == [Status.SUCCESS]


def test_missing_store_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailableError, match="look at its disk and its rights"):
        Store(tmp_path / "file" / "store", 0).open()
