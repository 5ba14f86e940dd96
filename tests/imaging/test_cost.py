"""What building a volume may cost: each byte of pixels once, and little more memory than the result."""

import os
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless

from tests.imaging import synthetic
from tests.imaging.synthetic import Field, Scan
from worker.imaging import headers, nifti, stored, volume
from worker.imaging.rules import ImagingRules
from worker.imaging.slices import Slice
from worker.imaging.volume import Volume

THREADS = 2
RULES = ImagingRules(decode_threads=THREADS)
BIG = Scan(
    rows=192,
    columns=192,
    spacing=(0.7, 0.7),
    depths=tuple(1.0 * index for index in range(40)),
    known=Field(gradient=(2.0, 2.0, -7.0)),
)


def slices_of(paths: list[Path]) -> list[Slice]:
    return [piece for path in paths for piece in headers.read_header(path).slices]


@pytest.fixture(autouse=True, scope="module")
def modules_loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A first build imports a megabyte of modules, which is no memory of the volume's."""
    gap = replace(Scan(), depths=BIG.depths[:5] + BIG.depths[6:14])
    volume.build(slices_of(synthetic.write(gap, tmp_path_factory.mktemp("first"))), RULES)


@pytest.mark.parametrize("padding", [None, 7])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, JPEGLSLossless])
@pytest.mark.parametrize("shear", [(0.0, 0.0), (0.3, 0.1)])
@pytest.mark.parametrize("count", [14, 40])
def test_peak_memory_is_at_most_one_and_a_half_times_the_result(
    syntax: str, padding: int | None, shear: tuple[float, float], count: int, tmp_path: Path
) -> None:
    depths = BIG.depths[:5] + BIG.depths[6:count]
    scan = replace(BIG, syntax=syntax, padding=padding, depths=depths, shear=shear)
    pieces = slices_of(synthetic.write(scan, tmp_path))
    tracemalloc.start()
    try:
        built = volume.build(pieces, RULES)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    slice_bytes = built.hu[0].nbytes
    assert peak <= 1.5 * built.hu.nbytes + THREADS * slice_bytes


@pytest.mark.parametrize("write", [stored.save, nifti.write])
def test_writing_a_volume_takes_no_second_copy_of_it(write: Callable[[Volume, Path], None], tmp_path: Path) -> None:
    built = volume.build(slices_of(synthetic.write(BIG, tmp_path / "in")), RULES)
    tracemalloc.start()
    try:
        write(built, tmp_path / "out.nii")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak <= 0.2 * built.hu.nbytes


def test_a_volume_too_large_for_the_host_says_so_and_may_be_tried_again(tmp_path: Path) -> None:
    pieces = slices_of(synthetic.write(replace(BIG, depths=BIG.depths[:14]), tmp_path))
    wide = [replace(piece, pixels=replace(piece.pixels, rows=8000, columns=8000)) for piece in pieces]
    program = """
import pickle, resource, sys
from worker.core.errors import RetryableError
from worker.imaging import volume
from worker.imaging.rules import ImagingRules
pieces = pickle.load(sys.stdin.buffer)
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
try:
    volume.build(pieces, ImagingRules(decode_threads=1))
except RetryableError as error:
    print(type(error).__name__, error)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(wide), capture_output=True, env=environment, timeout=60
    )

    assert done.stdout.decode().strip() == (
        "InsufficientMemoryError A volume of 14 x 8000 x 8000 voxels takes up to 5.4 GB, more than this host has free. "
        "Give the worker more memory or fewer tasks at a time."
    ), done.stderr.decode()


def test_every_byte_of_pixels_is_read_once_and_no_header_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = slices_of(synthetic.write(replace(BIG, depths=BIG.depths[:14]), tmp_path))
    seen: list[int] = []
    pread = os.pread

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        seen.append(length)
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", counted)
    built = volume.build(pieces, RULES)

    assert seen == [192 * 192 * 2] * 14
    assert built.hu.dtype == np.float32
