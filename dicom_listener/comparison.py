"""The process that decodes two files and says by its exit code whether they show the same image; see `duplicates.py`.

`python -m dicom_listener.comparison FIRST SECOND`
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydicom import Dataset

EQUAL, DIFFERENT = 0, 3  # exit codes; any other means that it could not tell

# What must agree beside the pixels for two encodings to be one image: whose, where, and in what units.
COMPARED = (
    "PatientID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "RescaleSlope",
    "RescaleIntercept",
    "NumberOfFrames",
    "FrameOfReferenceUID",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)


def same_image(one: "Dataset", other: "Dataset") -> bool:
    """True when both data sets hold equal pixels, placed and scaled equally, of one patient and series."""
    import numpy as np  # not above: importing this module for its exit codes costs the listener nothing

    if any(one.get(keyword) != other.get(keyword) for keyword in COMPARED):
        return False
    if "PixelData" not in one and "PixelData" not in other:
        return bool(one == other)  # no image: the content alone counts
    return bool(np.array_equal(one.pixel_array, other.pixel_array))


def main(first: str, second: str) -> int:
    """Compares two files; returns an exit code."""
    from pydicom import dcmread

    return EQUAL if same_image(dcmread(first), dcmread(second)) else DIFFERENT


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
