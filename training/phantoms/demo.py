"""The one study that ships with the project: a chest and abdomen with three findings, as `mu2 demo` sends it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from training.phantoms import dicom, report
from training.phantoms.case import Case, Scan, draw_habitus, scan_grid
from training.phantoms.disease import with_findings
from training.phantoms.phantom import render
from training.phantoms.tissue import Phase
from training.phantoms.vocabulary import FindingType, Side

DEMO_SEED = 1
DEMO_STREAM = 900
DEMO_FINDINGS = [
    (FindingType.LUNG_NODULE, Side.RIGHT),
    (FindingType.PLEURAL_EFFUSION, Side.LEFT),
    (FindingType.HEPATIC_CYST, Side.NONE),
]


def demo_case() -> Case:
    """The case of the demo study; its kinds of finding are those of PhantomCT-core."""
    rng = np.random.default_rng([DEMO_SEED, DEMO_STREAM])
    habitus = replace(draw_habitus(rng), male=True, fat_mm=14.0)
    scan = Scan(
        crop="chest_abdomen",
        phase=Phase.PORTAL,
        noise_hu=10.0,
        sharpness=0.2,
        table=True,
        grid=scan_grid("chest_abdomen", habitus.build, (0.0, 8.0, 0.0), 5.0, 1.5, 256),
    )
    case = Case(DEMO_SEED, False, habitus, scan, liver_hu=110.0)
    return with_findings(case, rng, DEMO_FINDINGS)


def truth(case: Case) -> dict[str, Any]:
    """What is stored beside the images: the findings and the report that the writer makes of them."""
    return {
        "about": "Synthetic CT (PhantomCT). It says nothing about patients.",
        "seed": case.seed,
        "regions": [region.value for region in case.scan.regions],
        "findings": [finding.to_dict() for finding in case.findings],
        "report": report.write(case),
    }


def write_demo(folder: Path) -> list[Path]:
    """Write the demo study's objects and `truth.json` into a folder; the same bytes every time."""
    case = demo_case()
    written = dicom.write_series(render(case), folder)
    path = folder / "truth.json"
    path.write_text(json.dumps(truth(case), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [*written, path]
