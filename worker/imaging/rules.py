"""What makes a series worth reporting and a geometry trustworthy, as data."""

import re
from dataclasses import dataclass

from worker.core.errors import SettingsError

PREFERENCES = (
    "kernel",
    "coverage",
    "complete",
    "thickness",
    "original",
    "latest",
    "most_slices",
)
"""Names a preference table may hold; `series.py` has one comparison for each."""

KERNELS = ("soft", "unknown", "lung", "bone")
"""Classes of reconstruction kernel, as `kernels.kernel_class` names them."""

REGIONS = ("head", "neck", "chest", "abdomen", "pelvis", "spine", "limb")
"""Body regions, from head to foot."""


@dataclass(frozen=True)
class ImagingRules:
    """The choice of a series and the limits of repair, each with the default a general hospital needs.

    The tables of words are matched without regard to case. Lengths are millimetres, angles degrees.

    Raises SettingsError for a limit or a name that makes no sense.
    """

    minimum_slices: int = 12
    """Fewer slices than this are no volume to report."""
    wanted_slice_mm: float = 3.0
    """The series whose slice thickness is nearest wins; of two equally near, the thinner."""
    preferences: tuple[str, ...] = PREFERENCES
    """What decides between two series of one region, most important first."""
    kernels: tuple[str, ...] = KERNELS
    """Classes of reconstruction kernel, best first."""
    reported_regions: tuple[str, ...] = REGIONS
    """Regions this site reports; a series known to show none of them is not chosen."""
    never_image_types: tuple[str, ...] = (
        "LOCALIZER",
        "SCOUT",
        "TOPOGRAM",
        "DOSE_INFO",
        "PATIENT_INFO",
        "REF_SURVIEW",
        "RESULTS",
        "SCREEN SAVE",
        "SCREENSAVE",
        "PROJECTION IMAGE",
        "MIP",
        "MINIP",
        "MINIMUM",
        "MAXIMUM",
        "VRT",
        "VOLUME RENDERING",
        "SSD",
        "PERFUSION",
        "IODINE",
        "OVERLAY",
        "SEGMENTATION",
    )
    """Values of Image Type (or Frame Type), or words of them, that no axial CT series carries: "CT_SOM5 MIP" has two."""
    never_descriptions: tuple[str, ...] = (
        r"\bscouts?\b",
        r"\btopogram",
        r"\blocali[sz]er",
        r"\bsurview",
        r"\bscanogram",
        r"\bdos(e|is)\W?(report|info|record|summary|sheet|page|protocol|bericht)",
        r"^\W*((ct|radiation|exam|patient)\W)?dos(e|is)\W*$",
        r"\bpatient protocol\b",
        r"\bexam summary\b",
        r"\bscreen ?(save|capture|shot)",
        r"\b(t|thick |thin )?(mip|minip)s?\b",
        r"\bvrt?\b",
        r"(?<!aidr.)(?<!for.)\b3d\b",
        r"\bbolus ?(track|trigger|timing)",
        r"\bsmart ?prep",
        r"\bpre-?monitoring\b",
        r"\bmonitoring\b",
        r"\btest ?bolus\b",
        r"\bperfusion\b",
    )
    """Regular expressions over Series Description; a match is never reported.

    Low dose is no dose report, and AIDR 3D (Canon) and "for 3D" name axial slices: such series are reported.
    """
    maximum_plane_degrees: float = 35.0
    """Farthest that a slice's normal may lean from the patient's long axis for the series to count as axial."""
    uniform_mm: float = 0.1
    """How far a slice may stand from the regular grid before the series counts as irregular."""
    same_position_mm: float = 0.01
    """Two slices nearer than this along the normal stand at one position."""
    maximum_gap_mm: float = 12.0
    """Two neighbouring slices farther apart than this leave tissue unseen; nothing is interpolated across it."""
    maximum_missing_in_a_row: int = 3
    """Missing slices next to each other that interpolation may fill."""
    maximum_missing_fraction: float = 0.1
    """Share of a volume's slices that interpolation of missing ones may make up."""
    maximum_turn_mm: float = 1.0
    """How far one common orientation may move a corner of a slice whose own orientation differs a little."""
    maximum_tilt_degrees: float = 35.0
    """Largest gantry tilt that is corrected by shearing."""
    maximum_voxels: int = 2_000_000_000
    """More than this (8 GB) is no scan of a patient but a wrong or hostile header."""
    lowest_hu_at_most: float = -50.0
    """A CT shows air or at least fat: a volume without one measured voxel this low is not in Hounsfield units."""
    highest_hu: float = 32767.0
    """No scanner's scale goes beyond; more than `impossible_fraction` of voxels that do were stored with another sign."""
    impossible_fraction: float = 0.01
    padding_hu_at_most: float = -1500.0
    """No tissue or air is this low: such voxels are marked as padding even without a Pixel Padding Value."""
    decode_threads: int = 0
    """Threads that decode slices; 0 means one a processor core."""

    def never_in(self, image_type: tuple[str, ...]) -> str:
        """The first value or word of an Image Type that is never reported; empty when there is none."""
        never = {value.upper() for value in self.never_image_types}
        for value in image_type:
            for word in (value.upper(), *value.upper().split()):
                if word in never:
                    return word
        return ""

    def __post_init__(self) -> None:
        unknown = [name for name in self.preferences if name not in PREFERENCES]
        if unknown:
            raise SettingsError(f"preferences: {unknown} unknown; allowed are {list(PREFERENCES)}")
        unknown = [name for name in self.reported_regions if name not in REGIONS]
        if unknown:
            raise SettingsError(f"reported_regions: {unknown} unknown; allowed are {list(REGIONS)}")
        unknown = [name for name in self.kernels if name not in KERNELS]
        if unknown:
            raise SettingsError(f"kernels: {unknown} unknown; allowed are {list(KERNELS)}")
        for pattern in self.never_descriptions:
            try:
                re.compile(pattern)
            except re.error as error:
                raise SettingsError(f"never_descriptions: {pattern!r} is no regular expression: {error}") from None
        if self.minimum_slices < 2:
            raise SettingsError("minimum_slices: a volume has at least 2 slices")
        if self.uniform_mm <= self.same_position_mm or self.same_position_mm <= 0:
            raise SettingsError("same_position_mm must be above 0 and below uniform_mm")
        if self.maximum_gap_mm <= 0 or self.decode_threads < 0:
            raise SettingsError("maximum_gap_mm must be above 0 and decode_threads not below it")
