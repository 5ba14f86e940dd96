"""How often each finding occurs and how large it is: the difficulty of PhantomCT, fixed and not chosen to please.

A third of the cases is normal, no case has more than five findings, each kind is in 3 to 15 % of the cases. In full, nodules
measure 4 to 30 mm and hepatic and renal lesions 8 to 60 mm; core has nothing below 10 mm. A solid lesion differs from its liver
by 15 to 80 HU (core: 40 to 80), from its pancreas by as much or down to water. Cysts are water, 0 to 14 HU, so they differ by
what their organ has: in a fatty liver without contrast medium by nothing, in an enhanced renal cortex by 185 HU.
"""

from training.phantoms.vocabulary import FindingType, Region

NORMAL_SHARE = 1.0 / 3.0
COUNTS = {"1": 0.36, "2": 0.3, "3": 0.2, "4": 0.09, "5": 0.05}
"""How many findings an abnormal case aims at."""
CROWDED_COUNTS = {"6": 0.25, "8": 0.35, "10": 0.4}
"""The same for a crowded case, which is made to teach a vision tower and never to score one: a finding is drawn five times as
often for the price of a phantom."""
BOTH_SIDES = 0.22
"""How often a paired kind is drawn on both sides."""

K = FindingType
SIDED = frozenset(
    {
        K.LUNG_NODULE, K.LUNG_MASS, K.CONSOLIDATION, K.ATELECTASIS, K.PLEURAL_EFFUSION, K.PNEUMOTHORAX,
        K.RENAL_CYST, K.RENAL_CALCULUS, K.HYDRONEPHROSIS,
    }
)  # fmt: skip
"""Kinds that are on a side."""

WEIGHTS: dict[FindingType, float] = {
    **dict.fromkeys(FindingType, 1.0),
    K.LUNG_MASS: 1.3,
    K.LUNG_NODULE: 1.1,
    K.VERTEBRAL_FRACTURE: 0.8,
    K.LYTIC_LESION: 0.6,
    K.LYMPHADENOPATHY: 0.6,
    K.AORTIC_ANEURYSM: 0.8,
}
"""How likely each kind is among those that the scan can show."""

REGIONS: dict[FindingType, tuple[Region, ...]] = {
    **dict.fromkeys(
        (K.LUNG_NODULE, K.LUNG_MASS, K.CONSOLIDATION, K.ATELECTASIS, K.EMPHYSEMA, K.PLEURAL_EFFUSION, K.PNEUMOTHORAX,
         K.PERICARDIAL_EFFUSION, K.CARDIOMEGALY, K.CORONARY_CALCIFICATION),
        (Region.CHEST,),
    ),
    **dict.fromkeys(
        (K.HEPATIC_CYST, K.HEPATIC_LESION, K.STEATOSIS, K.GALLSTONES, K.SPLENOMEGALY, K.RENAL_CYST, K.RENAL_CALCULUS,
         K.HYDRONEPHROSIS, K.PANCREATIC_MASS, K.ASCITES),
        (Region.ABDOMEN,),
    ),
    K.AORTIC_ANEURYSM: (Region.CHEST, Region.ABDOMEN),
    K.BLADDER_STONE: (Region.PELVIS,),
    K.VERTEBRAL_FRACTURE: (Region.CHEST, Region.ABDOMEN),
    K.LYTIC_LESION: (Region.CHEST, Region.ABDOMEN, Region.PELVIS),
    K.LYMPHADENOPATHY: (Region.CHEST, Region.ABDOMEN, Region.PELVIS),
}  # fmt: skip
"""Regions of which one must be scanned for the kind to be seen."""

SIZES: dict[FindingType, tuple[tuple[int, int], tuple[int, int]]] = {
    K.LUNG_NODULE: ((10, 30), (4, 30)),
    K.LUNG_MASS: ((32, 65), (32, 65)),
    K.CONSOLIDATION: ((30, 75), (20, 75)),
    K.ATELECTASIS: ((40, 80), (30, 80)),
    K.PLEURAL_EFFUSION: ((15, 60), (8, 65)),
    K.PNEUMOTHORAX: ((15, 45), (8, 45)),
    K.PERICARDIAL_EFFUSION: ((10, 25), (6, 25)),
    K.CARDIOMEGALY: ((146, 182), (140, 182)),
    K.AORTIC_ANEURYSM: ((45, 75), (38, 75)),
    K.HEPATIC_CYST: ((10, 60), (8, 60)),
    K.HEPATIC_LESION: ((10, 60), (8, 60)),
    K.GALLSTONES: ((10, 20), (4, 20)),
    K.SPLENOMEGALY: ((138, 190), (130, 190)),
    K.RENAL_CYST: ((10, 60), (8, 60)),
    K.RENAL_CALCULUS: ((10, 20), (3, 20)),
    K.HYDRONEPHROSIS: ((16, 34), (11, 34)),
    K.PANCREATIC_MASS: ((20, 45), (14, 45)),
    K.ASCITES: ((12, 32), (8, 32)),
    K.BLADDER_STONE: ((10, 25), (5, 25)),
    K.LYTIC_LESION: ((10, 22), (8, 22)),
    K.LYMPHADENOPATHY: ((14, 30), (12, 30)),
}
"""Smallest and largest size in mm: core, full."""

DEGREES = ("mild", "moderate", "severe")
FRACTURE_LOSS = {"mild": (0.2, 0.25), "moderate": (0.26, 0.4), "severe": (0.41, 0.62)}
"""Loss of front height by Genant's grades."""
