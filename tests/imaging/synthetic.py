"""Small CT series cut out of a field that is known at every point of the patient.

The field is linear in patient coordinates, so linear interpolation reproduces it exactly: a rebuilt volume can be checked
voxel by voxel through its own affine, whatever order, tilt, spacing or encoding the slices had.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEGLossless,
    generate_uid,
)

from worker.imaging.volume import Volume

Array = NDArray[np.float64]
ENCODERS: dict[str, Callable[[NDArray[np.generic]], bytes]] = {
    JPEGLossless: imagecodecs.ljpeg_encode,
    HTJ2KLossless: imagecodecs.htj2k_encode,
}
"""Transfer syntaxes that pydicom cannot write."""
NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)


@dataclass(frozen=True)
class Field:
    """Hounsfield units at a point (LPS mm): offset + gradient · point."""

    offset: float = -300.0
    gradient: tuple[float, float, float] = (3.0, 5.0, -7.0)

    def at(self, points: Array) -> Array:
        return points @ np.array(self.gradient) + self.offset


@dataclass(frozen=True)
class Scan:
    """How slices lie in the patient and how their values are stored. Lengths in mm, LPS."""

    known: Field = Field()
    rows: int = 16
    columns: int = 20
    spacing: tuple[float, float] = (2.0, 1.5)
    column_axis: tuple[float, float, float] = (1.0, 0.0, 0.0)
    row_axis: tuple[float, float, float] = (0.0, 1.0, 0.0)
    corner: tuple[float, float, float] = (-15.0, -16.0, -15.0)
    depths: tuple[float, ...] = tuple(2.5 * index for index in range(14))
    """Distance of each slice from the corner along the normal."""
    shear: tuple[float, float] = (0.0, 0.0)
    """Sideways step for each mm along the normal, along rows and along columns: the tangent of a gantry tilt."""
    slope: float = 1.0
    intercept: float = -1024.0
    signed: bool = False
    bits_stored: int = 16
    padding: int | None = None
    syntax: str = ExplicitVRLittleEndian
    attributes: dict[str, object] = field(default_factory=dict)

    @property
    def normal(self) -> Array:
        return np.cross(self.column_axis, self.row_axis)

    def position(self, depth: float) -> Array:
        return (
            np.array(self.corner)
            + depth * self.normal
            + depth * self.shear[0] * np.array(self.row_axis)
            + depth * self.shear[1] * np.array(self.column_axis)
        )

    def points(self, depth: float) -> Array:
        """LPS coordinates of every pixel of a slice: (rows, columns, 3)."""
        down = np.arange(self.rows)[:, None, None] * self.spacing[0] * np.array(self.row_axis)
        right = np.arange(self.columns)[None, :, None] * self.spacing[1] * np.array(self.column_axis)
        return self.position(depth) + down + right

    def stored(self, depth: float) -> NDArray[np.generic]:
        values = np.rint((self.known.at(self.points(depth)) - self.intercept) / self.slope)
        low, high = (
            (-(1 << self.bits_stored - 1), (1 << self.bits_stored - 1) - 1)
            if self.signed
            else (0, (1 << self.bits_stored) - 1)
        )
        assert values.min() >= low and values.max() <= high, "the field does not fit the stored type"
        array = values.astype(np.int16 if self.signed else np.uint16)
        if self.padding is not None:
            array[:2, :3] = self.padding
        return array


def dataset(scan: Scan, depth: float, uids: dict[str, str], number: int) -> Dataset:
    """One CT image as a pydicom dataset."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = uids["study"], uids["series"], uids["frame"]
    ds.Modality = "CT"
    ds.PatientID = "SYNTHETIC"
    ds.SeriesNumber, ds.AcquisitionNumber, ds.InstanceNumber = 2, 1, number
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.SeriesDescription = "CHEST 2.5"
    ds.BodyPartExamined = "CHEST"
    ds.ConvolutionKernel = "STANDARD"
    ds.AcquisitionDate, ds.AcquisitionTime = "20240101", "120000"
    ds.SliceThickness = 2.5
    ds.ImageOrientationPatient = [f"{value:.9g}" for value in (*scan.column_axis, *scan.row_axis)]
    ds.ImagePositionPatient = [f"{value:.9g}" for value in scan.position(depth)]
    ds.PixelSpacing = list(scan.spacing)
    ds.RescaleSlope, ds.RescaleIntercept = scan.slope, scan.intercept
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = scan.rows, scan.columns
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, scan.bits_stored, scan.bits_stored - 1
    ds.PixelRepresentation = int(scan.signed)
    if scan.padding is not None:
        ds.add_new("PixelPaddingValue", "SS" if scan.signed else "US", scan.padding)
    for keyword, value in scan.attributes.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    array = scan.stored(depth)
    big = scan.syntax == ExplicitVRBigEndian
    ds.PixelData = array.astype(array.dtype.newbyteorder(">" if big else "<")).tobytes()
    ds["PixelData"].VR = "OW"
    return ds


def save(ds: Dataset, path: Path, syntax: str) -> Path:
    """Write a dataset in a transfer syntax, compressed by pydicom's own encoders or imagecodecs' where it is such a one."""
    ds.file_meta.TransferSyntaxUID = syntax if syntax in NATIVE else ExplicitVRLittleEndian
    if syntax in ENCODERS:
        frames = np.frombuffer(ds.PixelData, np.uint16).reshape(-1, ds.Rows, ds.Columns)
        ds.PixelData = encapsulate([ENCODERS[syntax](frame) for frame in frames])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
        ds.file_meta.TransferSyntaxUID = syntax
    elif syntax not in NATIVE:
        ds.compress(syntax, generate_instance_uid=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, ds, enforce_file_format=True)
    return path


def new_uids() -> dict[str, str]:
    return {name: generate_uid() for name in ("study", "series", "frame")}


def write(
    scan: Scan, folder: Path, uids: dict[str, str] | None = None, order: Sequence[int] | None = None
) -> list[Path]:
    """Write the slices of a scan in the given order of depths; instance numbers follow the order, not the anatomy."""
    uids = uids or new_uids()
    order = range(len(scan.depths)) if order is None else order
    return [
        save(dataset(scan, scan.depths[index], uids, number), folder / f"{number:03d}", scan.syntax)
        for number, index in enumerate(order, 1)
    ]


def multiframe(scan: Scan, order: Sequence[int] | None = None) -> Dataset:
    """The same slices as one Enhanced CT object: geometry and rescale in functional groups, nothing of it on top."""
    order = range(len(scan.depths)) if order is None else order
    ds = dataset(scan, scan.depths[0], new_uids(), 1)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    ds.NumberOfFrames = len(scan.depths)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(ds, keyword)
    del ds.RescaleSlope, ds.RescaleIntercept
    shared = Dataset()
    shared.PlaneOrientationSequence = [
        item(ImageOrientationPatient=[f"{v:.9g}" for v in (*scan.column_axis, *scan.row_axis)])
    ]
    shared.PixelMeasuresSequence = [item(PixelSpacing=list(scan.spacing), SliceThickness=2.5)]
    shared.CTImageFrameTypeSequence = [item(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])]
    ds.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for number, index in enumerate(order, 1):
        frame = Dataset()
        frame.FrameContentSequence = [item(FrameAcquisitionNumber=1, InStackPositionNumber=number, StackID="1")]
        position = [f"{value:.9g}" for value in scan.position(scan.depths[index])]
        frame.PlanePositionSequence = [item(ImagePositionPatient=position)]
        frame.PixelValueTransformationSequence = [
            item(RescaleSlope=scan.slope, RescaleIntercept=scan.intercept, RescaleType="HU")
        ]
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = frames
    end = ">" if scan.syntax == ExplicitVRBigEndian else "<"
    planes = [scan.stored(scan.depths[index]) for index in order]
    ds.PixelData = b"".join(plane.astype(plane.dtype.newbyteorder(end)).tobytes() for plane in planes)
    return ds


def item(**values: object) -> Dataset:
    """An item of a sequence; its elements by keyword."""
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


def points_of(volume: Volume) -> Array:
    """LPS coordinates of every voxel by the volume's affine: (slices, rows, columns, 3)."""
    index = np.stack(np.meshgrid(*map(np.arange, volume.hu.shape), indexing="ij"), axis=-1)
    ras = index @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    return ras * np.array([-1.0, -1.0, 1.0])


def largest_error(volume: Volume, known: Field) -> float:
    """Largest difference in HU between a volume and the field it was cut from, over voxels that hold data."""
    difference = np.abs(volume.hu - known.at(points_of(volume)))
    return float(difference[~volume.padding].max() if volume.padding is not None else difference.max())
