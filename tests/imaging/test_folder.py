"""Plain folders: links, packed files, objects without identifiers, and what is no DICOM object at all."""

import bz2
import gzip
import io
import lzma
import os
import random
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pydicom.uid import JPEGLSLossless

from tests.imaging import synthetic
from tests.imaging.synthetic import Field, Scan
from worker.core.errors import InvalidObjectError
from worker.imaging import folder, study
from worker.imaging.headers import read_header
from worker.imaging.rules import ImagingRules

RULES = ImagingRules(decode_threads=2)


def volumes(path: Path) -> study.StudyVolumes:
    return study.assemble(study.examine_folder(path, RULES), RULES)


def test_links_to_files_and_folders_are_followed_and_a_circle_ends(tmp_path: Path) -> None:
    files = synthetic.write(Scan(), tmp_path / "elsewhere")
    plain = tmp_path / "in"
    (plain / "deep").mkdir(parents=True)
    (plain / "circle").symlink_to(plain)
    (plain / "deep" / "linked").symlink_to(tmp_path / "elsewhere")
    (plain / "again").symlink_to(tmp_path / "elsewhere")

    assert len(list(folder.files_below(plain))) == len(files)
    assert volumes(plain).volumes[0].repairs == ()
    assert volumes(plain / "again").volumes[0].hu.shape == (14, 16, 20)


def test_a_link_to_nothing_is_named_and_stops_nothing(tmp_path: Path) -> None:
    synthetic.write(Scan(), tmp_path)
    (tmp_path / "annexed").symlink_to(tmp_path / "never fetched")
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    found = volumes(tmp_path)

    assert len(found.volumes) == 1
    assert [(bad.path.name, bad.reason) for bad in found.unreadable] == [
        ("annexed", "The file is a link to nothing. Fetch what it points to.")
    ]


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("slice", data)
    return file.getvalue()


def tarred(data: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("slice")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zip": zipped,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "tar": tarred,
}


@pytest.mark.parametrize("name", sorted(PACKERS))
def test_a_packed_object_is_refused_with_what_to_do(name: str, tmp_path: Path) -> None:
    path = synthetic.write(Scan(depths=(0.0,)), tmp_path)[0]
    path.write_bytes(PACKERS[name](path.read_bytes()))
    with pytest.raises(InvalidObjectError, match=rf"The file is packed \({name}\)\. Unpack it\."):
        read_header(path)


def test_an_empty_file_is_refused_as_such(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(InvalidObjectError, match=r"The file is empty\. Send the object again\."):
        read_header(tmp_path / "empty")


def without_prefix(data: bytes) -> bytes:
    return data[132:]


def without_meta(data: bytes) -> bytes:
    """A file whose prefix the dataset follows at once; the first element of file meta says how long the rest of it is."""
    return data[:132] + data[144 + int.from_bytes(data[140:144], "little") :]


def without_either(data: bytes) -> bytes:
    return without_meta(data)[132:]


def without_syntax(data: bytes) -> bytes:
    """A file whose transfer syntax is empty."""
    at = data.index(b"\x02\x00\x10\x00UI") + 8
    length = int.from_bytes(data[at - 2 : at], "little")
    return data[:at] + bytes(length) + data[at + length :]


STRIPPED = [
    (strip, syntax)
    for strip in (without_prefix, without_meta, without_either, without_syntax)
    for syntax in (synthetic.ExplicitVRLittleEndian, synthetic.ImplicitVRLittleEndian, synthetic.ExplicitVRBigEndian)
    if (strip, syntax)
    != (without_syntax, synthetic.ExplicitVRBigEndian)  # pydicom takes an empty syntax as little endian
]


@pytest.mark.filterwarnings("ignore:Expected explicit VR, but found implicit VR")
@pytest.mark.parametrize(("strip", "syntax"), STRIPPED)
def test_objects_without_the_head_of_dicom_files_are_read_as_any_other(
    strip: Callable[[bytes], bytes], syntax: str, tmp_path: Path
) -> None:
    scan = Scan(syntax=syntax)
    for path in synthetic.write(scan, tmp_path):
        path.write_bytes(strip(path.read_bytes()))
    found = volumes(tmp_path)

    assert found.unreadable == ()
    assert synthetic.largest_error(found.volumes[0], scan.known) <= 0.51


@pytest.mark.parametrize("strip", [without_meta, without_either, without_syntax])
def test_compressed_pixels_without_a_transfer_syntax_are_refused_and_not_guessed(
    strip: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = synthetic.write(Scan(depths=(0.0,), syntax=JPEGLSLossless), tmp_path)[0]
    path.write_bytes(strip(path.read_bytes()))
    with pytest.raises(InvalidObjectError, match="names no transfer syntax for its compressed pixels"):
        read_header(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("start", [b"\x08\x00", b"\x02\x00", b"\x00\x08"])
def test_a_file_that_only_begins_like_a_dicom_object_is_none(start: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other"
    chance = random.Random(5)
    for length in (2, 6, 40, 3000):
        for _ in range(20):
            path.write_bytes(start + chance.randbytes(length))
            with pytest.raises(InvalidObjectError):
                read_header(path)


IDENTIFIERS = (
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "PatientID",
    "SeriesNumber",
    "AcquisitionNumber",
    "SeriesDescription",
    "AcquisitionDate",
    "AcquisitionTime",
)
NAMELESS = Scan(attributes=dict.fromkeys(IDENTIFIERS))


def test_series_that_only_their_folders_tell_apart_are_two(tmp_path: Path) -> None:
    synthetic.write(NAMELESS, tmp_path / "a")
    synthetic.write(replace(NAMELESS, known=Field(offset=-280.0)), tmp_path / "b")
    found = volumes(tmp_path)

    assert [(verdict.part, verdict.images) for verdict in found.verdicts] == [
        ("part 1 (folder 1)", 14),
        ("part 2 (folder 2)", 14),
    ]
    assert len(found.volumes) == 1
    assert synthetic.largest_error(found.volumes[0], NAMELESS.known) <= 0.51


def test_a_series_without_identifiers_that_lies_in_several_folders_is_one(tmp_path: Path) -> None:
    chance = random.Random(3)
    for path in synthetic.write(NAMELESS, tmp_path):  # discs hold a hundred files a folder, in any order
        target = tmp_path / f"DIR{chance.randrange(3)}"
        target.mkdir(exist_ok=True)
        path.rename(target / path.name)
    found = volumes(tmp_path)

    assert [(verdict.part, verdict.images) for verdict in found.verdicts] == [("", 14)]
    assert synthetic.largest_error(found.volumes[0], NAMELESS.known) <= 0.51


def test_series_with_identifiers_are_not_split_by_folder(tmp_path: Path) -> None:
    uids = synthetic.new_uids()
    for name in "ab":
        synthetic.write(Scan(), tmp_path / name, uids)

    assert volumes(tmp_path).volumes[0].repairs == ("14 slices sent more than once were used once",)
