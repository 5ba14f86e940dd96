"""Writes a phantom as a DICOM series of CT Image Storage (PS3.3 A.3) with identifiers that nobody can mistake for a patient's."""

import uuid
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, JPEGLSLossless

from training.phantoms.canvas import Grid
from training.phantoms.case import Case
from training.phantoms.phantom import Phantom
from training.phantoms.scanner import LOWEST_HU
from training.phantoms.tissue import Phase

UID_NAMESPACE = uuid.UUID("6f1d7c0e-9a53-4b55-8c56-70a9e4d2c713")
"""All UIDs are UUIDs of version 5 in this namespace, written under the root 2.25 (PS3.5 B.2)."""

BODY_PARTS = {
    "chest": "CHEST",
    "abdomen": "ABDOMEN",
    "pelvis": "PELVIS",
    "abdomen_pelvis": "ABDOMENPELVIS",
    "chest_abdomen": "CHESTABDOMEN",
    "whole": "CHESTABDPELVIS",
}
"""Defined terms of Body Part Examined (PS3.16 annex L)."""

DESCRIPTIONS = {
    "chest": "CT chest",
    "abdomen": "CT abdomen",
    "pelvis": "CT pelvis",
    "abdomen_pelvis": "CT abdomen and pelvis",
    "chest_abdomen": "CT chest and abdomen",
    "whole": "CT chest, abdomen and pelvis",
}


def uid(case: Case, *role: str | int) -> str:
    """The UID of one object of a case, the same whenever it is asked for.

    A phantom at another grid is another acquisition, so the grid is part of the name.
    """
    grid = case.scan.grid
    name = [case.seed, "full" if case.full else "core", grid.slices, grid.rows, grid.slice_mm, grid.pixel_mm, *role]
    return f"2.25.{uuid.uuid5(UID_NAMESPACE, '/'.join(str(part) for part in name)).int}"


def patient_id(case: Case) -> str:
    """Patient ID of a case."""
    return f"PHANTOM-{case.seed:04d}"


def accession_number(case: Case) -> str:
    """Accession Number of a case; 16 characters hold seeds up to ten million million."""
    return f"PH{case.seed:06d}"


def _describe_study(ds: Dataset, case: Case) -> None:
    day = date(2020, 1, 1) + timedelta(days=case.seed % 1461)
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = day.strftime("%Y%m%d")
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = "120000"
    ds.AccessionNumber = accession_number(case)
    ds.Modality = "CT"
    ds.Manufacturer = "PhantomCT"
    ds.ManufacturerModelName = "PhantomCT-full" if case.full else "PhantomCT-core"
    ds.SoftwareVersions = "1"
    ds.ReferringPhysicianName = "PHANTOM^REFERRER"
    ds.StudyDescription = f"{DESCRIPTIONS[case.scan.crop]} (synthetic)"
    contrast = "unenhanced" if case.scan.phase is Phase.NONE else case.scan.phase.value
    ds.SeriesDescription = f"Axial {case.scan.grid.slice_mm:g} mm {contrast}"
    ds.PatientName = "PHANTOM^CT"
    ds.PatientID = patient_id(case)
    ds.PatientBirthDate = "19600101"
    ds.PatientSex = "M" if case.habitus.male else "F"
    ds.PatientComments = "Synthetic image, not of a patient"
    ds.StudyInstanceUID = uid(case, "study")
    ds.SeriesInstanceUID = uid(case, "series")
    ds.FrameOfReferenceUID = uid(case, "frame")
    ds.StudyID = "1"
    ds.SeriesNumber = 1
    ds.AcquisitionNumber = 1
    ds.PositionReferenceIndicator = None
    ds.BodyPartExamined = BODY_PARTS[case.scan.crop]
    ds.PatientPosition = "HFS"


def _describe_scan(ds: Dataset, case: Case, grid: Grid) -> None:
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.KVP = 120
    ds.GantryDetectorTilt = 0
    ds.ConvolutionKernel = "STANDARD"
    ds.ReconstructionDiameter = round(grid.pixel_mm * grid.columns, 3)
    if case.scan.phase is not Phase.NONE:
        ds.ContrastBolusAgent = "Synthetic"
    ds.SliceThickness = grid.slice_mm
    ds.SpacingBetweenSlices = grid.slice_mm
    ds.PixelSpacing = [grid.pixel_mm, grid.pixel_mm]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = grid.rows, grid.columns
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, LOWEST_HU, "HU"
    ds.WindowCenter, ds.WindowWidth = 40, 400


def dataset(case: Case, number: int, hu: NDArray[np.int16], *, compress: bool) -> Dataset:
    """The object of slice `number` (0 is the lowest) with pixels in Hounsfield units (rows, columns).

    Instance Number counts from the head; the pixels are JPEG-LS lossless when `compress`, else explicit little endian.
    """
    grid = case.scan.grid
    ds = Dataset()
    ds.SOPClassUID = CTImageStorage
    ds.SOPInstanceUID = uid(case, "slice", number)
    _describe_study(ds, case)
    _describe_scan(ds, case, grid)
    ds.InstanceNumber = grid.slices - number
    z = round(grid.origin[2] + number * grid.slice_mm, 3)
    ds.ImagePositionPatient = [grid.origin[0], grid.origin[1], z]
    ds.SliceLocation = z
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ds.SOPClassUID
    meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    # Our own, so that the bytes do not change with the version of the library that writes them.
    meta.ImplementationClassUID = UID(f"2.25.{UID_NAMESPACE.int}")
    meta.ImplementationVersionName = "PHANTOMCT_1"
    ds.file_meta = meta
    stored = (hu.astype(np.int32) - LOWEST_HU).astype(np.uint16)
    if compress:
        ds.compress(JPEGLSLossless, stored, generate_instance_uid=False)
    else:
        ds.PixelData = stored.tobytes()
        ds["PixelData"].VR = "OW"
    return ds


def datasets(phantom: Phantom, *, compress: bool = True) -> Iterator[Dataset]:
    """The objects of a whole phantom, from the head down, as Instance Number counts."""
    for number in reversed(range(phantom.case.scan.grid.slices)):
        yield dataset(phantom.case, number, phantom.hu[number], compress=compress)


def write_series(phantom: Phantom, folder: Path, *, compress: bool = True) -> list[Path]:
    """Write a phantom as `IM0001.dcm` onwards into a folder, which is made; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for ds in datasets(phantom, compress=compress):
        path = folder / f"IM{int(ds.InstanceNumber):04d}.dcm"
        dcmwrite(path, ds, enforce_file_format=True)
        written.append(path)
    return written
