"""A 300-slice CT series from files to an array in memory: seconds and peak memory beside three other readers.

    python benchmarks/volume.py [--slices 300] [--repeats 5] [--only "JPEG-LS"] [--json OUT]

The series is synthetic (a body with organs and 15 HU of noise, 512 x 512), written uncompressed, as JPEG 2000 and as JPEG-LS,
both lossless. Each reader starts in a process of its own, imports what it needs, and is then timed from the folder's name to
the array; its peak is what the process grew by in that time. Readers take turns, so that a busy machine is busy for all, and
files are in the page cache. All arrays are checked to hold the same values. On a machine with other work the processor
seconds say more than the clock: what this reader gains by decoding in parallel shows only where processors are free.

Needs the `dev` extra, SimpleITK, dicom2nifti and monai; a reader that is not installed is left out and said.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, generate_uid

SIDE = 512
SYNTAXES = {"uncompressed": ExplicitVRLittleEndian, "JPEG 2000": JPEG2000Lossless, "JPEG-LS": JPEGLSLossless}
READERS = {"mu2": None, "SimpleITK": "SimpleITK", "dicom2nifti": "dicom2nifti", "MONAI PydicomReader": "monai"}
"""Name and the package it needs."""
MIB = 1 << 20


def slice_hu(index: int, slices: int) -> np.ndarray:
    """One slice of the body in HU, int16."""
    chance = np.random.default_rng(index)
    row, column = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    height = 2 * index / slices - 1
    hu = np.full((SIDE, SIDE), -1000.0)
    hu[(row / 0.6) ** 2 + (column / 0.85) ** 2 < 1] = 40
    for centre in (-0.4, 0.4):
        hu[(row / 0.4) ** 2 + ((column - centre) / 0.28) ** 2 + (height / 0.8) ** 2 < 1] = -850
    hu[(row - 0.42) ** 2 + column**2 < 0.01] = 700
    return np.clip(hu + chance.normal(0, 15, hu.shape), -1024, 3071).astype(np.int16)


def write_series(folder: Path, name: str, slices: int) -> None:
    """Write the series in one transfer syntax."""
    uids = {keyword: generate_uid() for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}

    def write_slice(index: int) -> None:
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = SYNTAXES[name]
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, generate_uid()
        for keyword, value in uids.items():
            setattr(ds, keyword, value)
        ds.Modality, ds.Manufacturer, ds.ImageType = "CT", "NONE", ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.PatientID, ds.SeriesNumber, ds.InstanceNumber, ds.BodyPartExamined = "SYNTHETIC", 1, index + 1, "CHEST"
        ds.ImageOrientationPatient, ds.PixelSpacing = [1, 0, 0, 0, 1, 0], [0.75, 0.75]
        ds.ImagePositionPatient, ds.SliceThickness = [-192, -192, 1.25 * index], 1.25
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.Rows = ds.Columns = SIDE
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.RescaleIntercept, ds.RescaleSlope = -1024, 1
        stored = (slice_hu(index, slices) + 1024).astype(np.uint16)
        if name == "uncompressed":
            ds.PixelData = stored.tobytes()
        elif name == "JPEG-LS":
            ds.PixelData = encapsulate([imagecodecs.jpegls_encode(stored)])
        else:
            ds.PixelData = encapsulate(
                [imagecodecs.jpeg2k_encode(stored, level=0, codecformat="j2k", bitspersample=12)]
            )
        ds["PixelData"].VR = "OW" if name == "uncompressed" else "OB"
        ds["PixelData"].is_undefined_length = name != "uncompressed"
        number = (index * 7919) % slices  # files in an order that is not the anatomy's
        pydicom.dcmwrite(folder / f"{number:04d}.dcm", ds, enforce_file_format=True)

    folder.mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write_slice, range(slices)))


def mu2_reader() -> Callable[[str], np.ndarray]:
    from worker.imaging import study
    from worker.imaging.rules import ImagingRules

    return lambda folder: study.build_study(Path(folder).iterdir(), ImagingRules()).volumes[0].hu


def simpleitk_reader() -> Callable[[str], np.ndarray]:
    import SimpleITK as sitk  # noqa: N813

    def read(folder: str) -> np.ndarray:
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(folder))
        return sitk.GetArrayFromImage(reader.Execute())

    return read


def dicom2nifti_reader() -> Callable[[str], np.ndarray]:
    from dicom2nifti import convert_dicom

    def read(folder: str) -> np.ndarray:
        image = convert_dicom.dicom_series_to_nifti(folder, None, reorient_nifti=False)["NII"]
        return np.asanyarray(image.dataobj).transpose(2, 1, 0)

    return read


def monai_reader() -> Callable[[str], np.ndarray]:
    from monai.data import PydicomReader

    def read(folder: str) -> np.ndarray:
        reader = PydicomReader()
        array, _ = reader.get_data(reader.read(folder))
        return array.transpose(2, 1, 0)

    return read


MAKERS = {
    "mu2": mu2_reader,
    "SimpleITK": simpleitk_reader,
    "dicom2nifti": dicom2nifti_reader,
    "MONAI PydicomReader": monai_reader,
}


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def child(reader: str, folder: str) -> None:
    """Read once in this process; print seconds, growth of the peak, and what the array holds."""
    read = MAKERS[reader]()
    before = resident_bytes()
    started, cpu = time.perf_counter(), time.process_time()
    array = read(folder)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": cpu,
                "peak_mib": peak / MIB,
                "array_mib": array.nbytes / MIB,
                "shape": array.shape,
                "sum": float(array.sum(dtype=np.float64)),
                "absolute_sum": float(sum(np.abs(plane.astype(np.float64)).sum() for plane in array)),
            }
        )
    )


def run(reader: str, folder: Path) -> dict[str, float]:
    """One reading in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", reader, "--folder", str(folder)],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=sorted(SYNTAXES), action="append", help="only this row; may be given twice")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    parser.add_argument("--child", choices=sorted(MAKERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.folder)
        return
    readers = [name for name, package in READERS.items() if package is None or importlib.util.find_spec(package)]
    for missing in sorted(set(READERS) - set(readers)):
        print(f"left out: {missing} is not installed", file=sys.stderr)
    measured: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as root:
        for name in arguments.only or SYNTAXES:
            folder = Path(root) / name.replace(" ", "_")
            write_series(folder, name, arguments.slices)
            rows = measured[name] = {reader: [] for reader in readers}
            for _ in range(arguments.repeats):
                for reader in readers:
                    rows[reader].append(run(reader, folder))
            sums = {(tuple(row["shape"]), row["sum"], row["absolute_sum"]) for runs in rows.values() for row in runs}
            if len(sums) != 1:
                raise SystemExit(f"{name}: the readers do not agree on the values: {sums}")
            tell(name, rows)
            print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f} of which about 1 is this script's")
    if arguments.json:
        arguments.json.write_text(json.dumps({"processors": os.cpu_count(), "measured": measured}, indent=2))


def tell(name: str, rows: dict[str, list[dict[str, float]]]) -> None:
    """Print one syntax's table: medians, range, and how many times slower than ours in the same round."""
    print(f"\n{name}\n{'reader':<22}{'seconds (range)':>24}{'CPU s':>8}{'peak MiB':>10}{'x array':>9}{'x ours':>8}")
    for reader, runs in rows.items():
        seconds = [row["seconds"] for row in runs]
        ratios = [row["seconds"] / ours["seconds"] for row, ours in zip(runs, rows["mu2"], strict=True)]
        peak = statistics.median(row["peak_mib"] for row in runs)
        print(
            f"{reader:<22}{statistics.median(seconds):>10.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
            f"{statistics.median(row['cpu_seconds'] for row in runs):>8.2f}{peak:>10.0f}"
            f"{peak / runs[0]['array_mib']:>9.2f}{statistics.median(ratios):>8.2f}"
        )


if __name__ == "__main__":
    main()
