"""The instance store: files that are whole, durable and named by hashes, so that no sender's string becomes a path.

    <root>/incoming/<process>/<n>.part                                    what is being received; swept when its process is dead
    <root>/instances/<hh>/<study hash>/<sop hash>-<content hash>.dcm      what was received
    <root>/torn/                                                          what a power cut left half written
    <root>/recovered                                                      its mtime: since when folders must be looked through

The name holds a hash of the content, so equal bytes of one instance have one name (sending them again changes nothing),
other bytes under the same SOP Instance UID never overwrite the first (the rows say which of them counts), and a file that a
power cut tore is known by its name.

Order of safety: the whole file gets its name, then file and folder (and new parents) are fsynced, side by side where that
takes milliseconds; the row is the caller's next step, and only then may a sender hear "success".
"""

import fcntl
import hashlib
import itertools
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from dicom_listener import attributes
from dicom_listener.part10 import Held, file_meta, is_whole
from worker.core.errors import StoreUnavailableError

FLOOR_CHECK_BYTES = 64 << 20  # the disk's floor is looked at again after each of these
_INSTANCES = "instances"
SLOW_SYNC_SECONDS = 0.001
SLOW_IN_A_ROW = 8  # fewer may be a busy processor
PROBE_EVERY = 64  # so often the disk is asked again whether it is slow
SYNC_THREADS = 16
MOST_REMEMBERED_FOLDERS = 4_096
_MOST_PIECES = 512  # below the system's limit of buffers in one write
_RECOVERY_MARGIN_SECONDS = 86_400.0


class Incoming:
    """One data set on its way to the disk. Any failure to write is a `StoreUnavailableError`; nothing is left behind.

    Pieces are kept as views of the receiver's buffer until `flush`.
    """

    def __init__(self, store: "Store", path: str, header: bytes, transfer_syntax: str) -> None:
        self._store = store
        self._path = path
        self._transfer_syntax = transfer_syntax
        self._digest = hashlib.sha256()
        self._offset = len(header)
        self._size = len(header)
        self._next_floor_check = FLOOR_CHECK_BYTES
        self._head = bytearray()  # first bytes of the data set, which say whose it is
        self._kept: list[bytes | memoryview] = [header]
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise _unavailable(error) from error

    @property
    def data_set_bytes(self) -> int:
        """Bytes of the data set so far."""
        return self._size - self._offset

    def add(self, piece: memoryview) -> None:
        """Takes the next piece of the data set; it must stay as it is until `flush`."""
        self._kept.append(piece)
        if (room := attributes.HEAD_BYTES - len(self._head)) > 0:
            self._head += piece[:room]
        self._digest.update(piece)
        self._size += len(piece)
        if len(self._kept) >= _MOST_PIECES:
            self.flush()

    def flush(self) -> None:
        """Writes what is kept."""
        kept, self._kept = self._kept, []
        left = sum(map(len, kept))
        try:
            while left:
                written = os.writev(self._fd, kept)
                left -= written
                while kept and written >= len(kept[0]):
                    written -= len(kept.pop(0))
                if written:
                    kept[0] = memoryview(kept[0])[written:]
        except OSError as error:
            raise _unavailable(error) from error
        if self._size > self._next_floor_check:
            self._next_floor_check = self._size + FLOOR_CHECK_BYTES
            self._store.check_floor()

    def seal(self) -> Held:
        """Writes what is kept: the data set is whole."""
        self.flush()
        digest, head = self._digest.hexdigest(), bytes(self._head)
        return Held(self._path, self._size, self._offset, digest, head, self._transfer_syntax)

    def place(self, name: str) -> None:
        """Gives the sealed file its name in the store and makes both durable; it can be placed again until `discard`."""
        try:
            self._store.link(self._path, self._fd, name, self._digest.hexdigest())
        except OSError as error:
            raise _unavailable(error) from error

    def discard(self) -> None:
        """Removes the incoming file; what was placed stays. Harmless the second time."""
        self._kept.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        with suppress(FileNotFoundError):
            os.unlink(self._path)  # noqa: PTH108


class Store:
    """The folder of one store, opened by one process. Safe for threads."""

    def __init__(self, root: Path, floor_bytes: int) -> None:
        self.root = root
        self._floor_bytes = floor_bytes
        self._prefix = f"{root}/"
        self._instances = root / _INSTANCES
        self._incoming = root / "incoming" / secrets.token_hex(8)
        self._numbers = itertools.count()
        self._lock_fd = -1
        self._durable: set[str] = set()  # study folders whose own entries this process has synced
        self._slow_in_a_row = 0  # times that syncing one after the other took long enough to be worth another thread
        self._syncs = itertools.count()
        self._syncers = ThreadPoolExecutor(SYNC_THREADS, "sync")  # starts threads when they are needed

    def open(self) -> None:
        """Creates the folders, claims one for incoming files and sweeps those of dead processes."""
        try:
            for folder in (self.root, self._instances, self._incoming.parent, self._incoming):
                folder.mkdir(mode=0o750, parents=True, exist_ok=True)
            self._lock_fd = os.open(self._incoming / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
            for folder in (self.root.parent, self.root):
                _sync_folder(folder)
            self._sweep()
        except OSError as error:
            raise _unavailable(error) from error

    def close(self) -> None:
        """Gives the incoming folder up."""
        self._syncers.shutdown()
        if self._lock_fd >= 0:
            shutil.rmtree(self._incoming, ignore_errors=True)
            os.close(self._lock_fd)
            self._lock_fd = -1

    def check_floor(self) -> None:
        """Raises `StoreUnavailableError` when less than the floor is free."""
        try:
            status = os.statvfs(self.root)
        except OSError as error:
            raise _unavailable(error) from error
        if status.f_bavail * status.f_frsize < self._floor_bytes:
            raise StoreUnavailableError("free disk is below MU2_STORE__FLOOR_BYTES; make room or lower the floor")

    def receive(
        self, sop_class_uid: str, sop_instance_uid: str, transfer_syntax: str, calling_ae_title: str = ""
    ) -> Incoming:
        """A new incoming file with its header written; raises `StoreUnavailableError`."""
        self.check_floor()
        header = file_meta(sop_class_uid, sop_instance_uid, transfer_syntax, calling_ae_title)
        return Incoming(self, f"{self._incoming}/{next(self._numbers)}.part", header, transfer_syntax)

    def name(self, held: Held, study_uid: str, sop_instance_uid: str) -> str:
        """The path, below the root, under which a file belongs."""
        study = _hash(study_uid, 34)
        content = _hash(held.transfer_syntax + held.sha256, 16)
        return f"{_INSTANCES}/{study[:2]}/{study[2:]}/{_hash(sop_instance_uid, 24)}-{content}.dcm"

    def link(self, path: str, fd: int, name: str, sha256: str) -> None:
        """Gives the whole, open file at `path` its name and makes file and entries durable. Raises `OSError`."""
        target = f"{self._prefix}{name}"  # strings, not `Path`: this runs for every instance
        folder = target.rpartition("/")[0]
        try:
            try:
                os.link(path, target)
            except FileNotFoundError:
                self._durable.discard(folder)
                Path(folder).mkdir(mode=0o750, parents=True, exist_ok=True)
                os.link(path, target)
        except FileExistsError:
            self._keep_or_mend(path, fd, name, sha256)
        else:
            try:
                self._sync(fd, folder)
            except OSError:
                Path(target).unlink(missing_ok=True)  # an fsync that failed once may report success the next time
                raise

    def settle(self, name: str) -> None:
        """Makes a file durable that is in its place already. Raises `OSError`."""
        target = f"{self._prefix}{name}"
        fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._sync(fd, target.rpartition("/")[0])
        finally:
            os.close(fd)

    def _keep_or_mend(self, path: str, fd: int, name: str, sha256: str) -> None:
        """The name is taken: by these very bytes, which stay, or by what a power cut left of them."""
        if not is_whole(self.root / name, sha256):
            os.fsync(fd)
            os.link(path, f"{path}.whole")  # the incoming file keeps its own name: it may have to be placed again
            os.rename(f"{path}.whole", self.root / name)  # noqa: PTH104
        self.settle(name)  # whoever placed it may not have come to its fsync yet

    def _sync(self, fd: int, folder: str) -> None:
        """Syncs a file and its folder; the folder's parents too when this process has not seen to them before."""
        folders = [folder]
        if folder not in self._durable:  # made now, or by another process that may not have synced it yet
            folders = [f"{self._prefix}{_INSTANCES}", folder.rpartition("/")[0], folder]
        if self._slow_in_a_row >= SLOW_IN_A_ROW and next(self._syncs) % PROBE_EVERY:
            beside = [self._syncers.submit(_sync_folder, one) for one in folders]
            os.fsync(fd)
            for future in beside:
                future.result()
        else:
            began = time.monotonic()
            os.fsync(fd)
            for one in folders:
                _sync_folder(one)
            slow = time.monotonic() - began > SLOW_SYNC_SECONDS
            self._slow_in_a_row = self._slow_in_a_row + 1 if slow else 0
        if len(self._durable) > MOST_REMEMBERED_FOLDERS:
            self._durable.clear()
        self._durable.update(folders)

    def set_aside(self, name: str) -> None:
        """Moves a torn file out of the instances. Raises `OSError`."""
        folder = self.root / "torn"
        folder.mkdir(mode=0o750, exist_ok=True)
        (self.root / name).rename(folder / Path(name).name)

    def holds(self, name: str) -> bool:
        """Whether the file is in its place."""
        return os.path.isfile(f"{self._prefix}{name}")  # noqa: PTH113

    def path(self, relative: str) -> Path:
        """The file of a row's path."""
        return self.root / relative

    def stored_since(self, since: float) -> Iterator[str]:
        """Paths, relative to the root, of all files in folders that changed after `since` (seconds, epoch).

        Within a study they come in the order of their arrival: of two contents under one UID the first counts.
        """
        for shelf in _folders(self._instances):
            for folder in _folders(shelf):
                if folder.stat().st_mtime >= since:
                    yield from (str(f.relative_to(self.root)) for f in sorted(folder.glob("*.dcm"), key=_written_at))

    def recovered_at(self) -> float:
        """Since when folders must be looked through: a day before the last whole recovery began, 0 before the first."""
        try:
            return (self.root / "recovered").stat().st_mtime - _RECOVERY_MARGIN_SECONDS
        except FileNotFoundError:
            return 0.0

    def note_recovery(self, began: float) -> None:
        """Notes that a recovery which began at `began` looked through everything."""
        marker = self.root / "recovered"
        marker.touch(mode=0o640)
        os.utime(marker, (began, began))

    def _sweep(self) -> None:
        for folder in _folders(self._incoming.parent):
            if folder == self._incoming:
                continue
            try:
                fd = os.open(folder / "lock", os.O_RDWR)
            except FileNotFoundError:
                continue  # between mkdir and its lock: alive
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            except BlockingIOError:
                continue  # its process is alive
            finally:
                os.close(fd)


def _hash(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def _folders(parent: Path) -> Iterator[Path]:
    with os.scandir(parent) as entries:
        yield from sorted(Path(e.path) for e in entries if e.is_dir(follow_symlinks=False))


def _written_at(path: Path) -> int:
    return path.stat().st_mtime_ns


def _sync_folder(folder: Path | str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unavailable(error: OSError) -> StoreUnavailableError:
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    return StoreUnavailableError(f"the instance store cannot be written ({reason}); look at its disk and its rights")
