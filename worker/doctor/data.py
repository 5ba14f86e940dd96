"""Where things are kept: MU2_HOME, the database, the instance store."""

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from worker.core import schema
from worker.core.database import Database
from worker.core.errors import DatabaseUnavailableError
from worker.core.settings import Settings
from worker.doctor import Check, fail, ok, warn

GB = 1_000_000_000
SCARCE = 3  # times the floor: time to act before instances are refused
SLOW_DATABASE_SECONDS = 0.5


def home(settings: Settings) -> Iterator[Check]:
    """MU2_HOME is there, ours alone, and can be written."""
    folder = settings.home.resolve()
    if not folder.is_dir():
        yield warn("home", f"{folder} is not there yet", "`mu2 up` makes it; or set MU2_HOME")
        return
    if not os.access(folder, os.W_OK):
        yield fail("home", f"{folder} cannot be written", "mend its rights or set MU2_HOME")
        return
    others = stat.S_IMODE(folder.stat().st_mode) & 0o077
    if others:
        yield warn("home", f"{folder} can be read by other accounts", f"it holds patients' data: chmod 700 {folder}")
        return
    yield ok("home", str(folder))


def database(settings: Settings) -> Iterator[Check]:
    """The database answers and is at this code's revision."""
    if _is_missing_file(settings):
        yield fail("database", "there is no SQLite file yet", "start `mu2 up` once, or run `mu2 db upgrade`")
        return
    opened = Database.from_settings(settings)
    kind = "SQLite" if opened.is_sqlite else opened.url.get_backend_name()
    try:
        began = time.monotonic()
        found, needed = schema.current(opened), schema.head()
        seconds = time.monotonic() - began
    except DatabaseUnavailableError as error:
        yield fail("database", str(error), "start the database, or mend MU2_DATABASE__URL and the way to it")
        return
    finally:
        opened.close()
    if seconds > SLOW_DATABASE_SECONDS:
        yield warn("database", f"{kind} took {seconds:.1f} s to answer", "look at its load and the network between")
    else:
        yield ok("database", f"{kind} answers in {seconds * 1000:.0f} ms")
    if found != needed:
        yield fail("migrations", f"at revision {found or 'none'}, this code needs {needed}", "run `mu2 db upgrade`")
    else:
        yield ok("migrations", f"at head, revision {needed}")


def store(settings: Settings) -> Iterator[Check]:
    """The store can be written durably and has room above its floor."""
    root = settings.store_root
    nearest = next(p for p in (root, *root.parents) if p.is_dir())
    usage = shutil.disk_usage(nearest)
    floor = settings.store.floor_bytes
    room = f"{usage.free / GB:.1f} GB free at {root}, floor {floor / GB:.1f} GB"
    if usage.free < floor:
        yield fail("disk", room, "instances are refused (0xA700): make room, `mu2 retention run`, or lower the floor")
    elif usage.free < SCARCE * floor:
        yield warn("disk", room, "make room soon: `mu2 retention run --dry-run` says what may go")
    else:
        yield ok("disk", room)
    if not root.is_dir():
        yield warn("store", f"{root} is not there yet", "the listener makes it")
        return
    yield _durable_write(root)


def _is_missing_file(settings: Settings) -> bool:
    return not settings.database.url.get_secret_value() and not (settings.home / "mu2.sqlite").exists()


def _durable_write(root: Path) -> Check:
    began = time.monotonic()
    try:
        with tempfile.NamedTemporaryFile(dir=root, prefix=".doctor-") as file:
            file.write(b"mu2")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        advice = "mend the folder's rights or the share; the listener refuses instances until then"
        return fail("store", f"cannot be written ({error.strerror})", advice)
    return ok("store", f"a durable write takes {(time.monotonic() - began) * 1000:.1f} ms")
