"""The words of PhantomCT: kinds of finding, sides, organs, body regions, and the truth of one case."""

from dataclasses import asdict, dataclass
from enum import IntEnum, StrEnum
from typing import Any


class FindingType(StrEnum):
    """The 25 kinds of finding of PhantomCT-full."""

    LUNG_NODULE = "lung_nodule"
    LUNG_MASS = "lung_mass"
    CONSOLIDATION = "consolidation"
    ATELECTASIS = "atelectasis"
    EMPHYSEMA = "emphysema"
    PLEURAL_EFFUSION = "pleural_effusion"
    PNEUMOTHORAX = "pneumothorax"
    PERICARDIAL_EFFUSION = "pericardial_effusion"
    CARDIOMEGALY = "cardiomegaly"
    CORONARY_CALCIFICATION = "coronary_calcification"
    AORTIC_ANEURYSM = "aortic_aneurysm"
    HEPATIC_CYST = "hepatic_cyst"
    HEPATIC_LESION = "hepatic_lesion"  # solid; density says hypo- or hyperdense
    STEATOSIS = "steatosis"
    GALLSTONES = "gallstones"
    SPLENOMEGALY = "splenomegaly"
    RENAL_CYST = "renal_cyst"
    RENAL_CALCULUS = "renal_calculus"
    HYDRONEPHROSIS = "hydronephrosis"
    PANCREATIC_MASS = "pancreatic_mass"
    ASCITES = "ascites"
    BLADDER_STONE = "bladder_stone"
    VERTEBRAL_FRACTURE = "vertebral_fracture"
    LYTIC_LESION = "lytic_lesion"
    LYMPHADENOPATHY = "lymphadenopathy"


CORE = (
    FindingType.LUNG_NODULE,
    FindingType.CONSOLIDATION,
    FindingType.PLEURAL_EFFUSION,
    FindingType.PNEUMOTHORAX,
    FindingType.CARDIOMEGALY,
    FindingType.HEPATIC_CYST,
    FindingType.HEPATIC_LESION,  # hyperdense only
    FindingType.SPLENOMEGALY,
    FindingType.RENAL_CALCULUS,
    FindingType.HYDRONEPHROSIS,
    FindingType.ASCITES,
    FindingType.VERTEBRAL_FRACTURE,
)
"""The twelve kinds of PhantomCT-core."""

FINDING_LABELS = {kind: number for number, kind in enumerate(FindingType, start=1)}
"""Voxel value of each kind in a finding label map; 0 is none."""


class Side(StrEnum):
    """Side of a paired organ; NONE for what has no side."""

    NONE = ""
    LEFT = "left"
    RIGHT = "right"


class Region(StrEnum):
    """Body regions that a report is written by, from head to foot."""

    CHEST = "chest"
    ABDOMEN = "abdomen"
    PELVIS = "pelvis"


class Organ(IntEnum):
    """Voxel values of the organ label map."""

    AIR = 0
    SKIN_FAT = 1
    MUSCLE = 2
    VISCERAL_FAT = 3
    BONE = 4
    LUNG_RIGHT = 5
    LUNG_LEFT = 6
    AIRWAY = 7
    LUNG_VESSEL = 8
    HEART = 9
    AORTA = 10
    VEIN = 11
    ESOPHAGUS = 12
    LIVER = 13
    GALLBLADDER = 14
    SPLEEN = 15
    STOMACH = 16
    PANCREAS = 17
    KIDNEY_RIGHT = 18
    KIDNEY_LEFT = 19
    COLON = 20
    SMALL_BOWEL = 21
    BLADDER = 22
    SPINAL_CANAL = 23
    PELVIC_ORGANS = 24
    TABLE = 25


@dataclass(frozen=True)
class Finding:
    """One finding as it was painted: the truth that a report is scored against."""

    kind: FindingType
    side: Side = Side.NONE
    place: str = ""
    """Lobe, segment, pole, vertebra or station; empty where the organ is the place."""
    size_mm: int | None = None
    """Diameter, length, depth or width, as `SIZE_MEANING` says for the kind; None for diffuse kinds."""
    density: str = ""
    """hypodense or hyperdense for hepatic lesions, else empty."""
    degree: str = ""
    """mild, moderate or severe for the kinds that are graded and not measured."""
    hu: float = 0.0
    """Hounsfield value it was painted with, before noise."""
    center: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Middle in the reference body, mm (DICOM axes)."""

    @property
    def key(self) -> tuple[str, str]:
        """(type, side): what finding F1 counts."""
        return self.kind.value, self.side.value

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "type": self.kind.value,
            **{key: value for key, value in asdict(self).items() if key not in ("kind", "center")},
            "side": self.side.value,
            "hu": round(self.hu),
        }


SIZE_MEANING = {
    FindingType.LUNG_NODULE: "diameter",
    FindingType.LUNG_MASS: "diameter",
    FindingType.CONSOLIDATION: "diameter",
    FindingType.PLEURAL_EFFUSION: "depth",
    FindingType.PNEUMOTHORAX: "depth",
    FindingType.PERICARDIAL_EFFUSION: "thickness",
    FindingType.CARDIOMEGALY: "transverse diameter of the heart",
    FindingType.AORTIC_ANEURYSM: "diameter",
    FindingType.HEPATIC_CYST: "diameter",
    FindingType.HEPATIC_LESION: "diameter",
    FindingType.GALLSTONES: "diameter of the largest",
    FindingType.SPLENOMEGALY: "craniocaudal length",
    FindingType.RENAL_CYST: "diameter",
    FindingType.RENAL_CALCULUS: "diameter",
    FindingType.HYDRONEPHROSIS: "diameter of the renal pelvis",
    FindingType.PANCREATIC_MASS: "diameter",
    FindingType.ASCITES: "depth",
    FindingType.BLADDER_STONE: "diameter",
    FindingType.LYTIC_LESION: "diameter",
    FindingType.LYMPHADENOPATHY: "short axis of the largest node",
}
"""What the size of each measured kind is; the others have a degree or nothing."""
