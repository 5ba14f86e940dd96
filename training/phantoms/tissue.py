"""Hounsfield values of tissues by phase of contrast."""

from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """When the scan was made after the injection."""

    NONE = "none"  # no contrast medium
    ARTERIAL = "arterial"
    PORTAL = "portal venous"


@dataclass(frozen=True)
class Tissue:
    """Hounsfield values of what changes with contrast."""

    aorta: float
    vein: float
    cardiac_blood: float
    myocardium: float
    liver: float
    hepatic_vessel: float
    spleen: float
    renal_cortex: float
    renal_medulla: float
    pancreas: float
    muscle: float
    bowel_wall: float


AIR, LUNG, FAT = -1000.0, -865.0, -102.0
BILE, URINE, CORTICAL_BONE, SPONGY_BONE, DISC, CORD = 10.0, 4.0, 620.0, 190.0, 82.0, 32.0

BY_PHASE = {
    Phase.NONE: Tissue(42, 41, 42, 46, 58, 44, 48, 34, 32, 42, 54, 38),
    Phase.ARTERIAL: Tissue(300, 90, 240, 105, 74, 95, 105, 185, 95, 98, 60, 75),
    Phase.PORTAL: Tissue(155, 150, 150, 112, 108, 150, 120, 185, 172, 96, 64, 85),
}
