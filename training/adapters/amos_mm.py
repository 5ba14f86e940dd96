"""AMOS-MM 2024: chest, abdomen and pelvis findings, and questions with four options.

Layout as published: `imagesTr/amos_NNNN.nii.gz` (1,287 with a report), `imagesVa/` (400), and
`report_generation_train_val.json` and `vqa_train_val.json`, or both in `dataset.json`. Each holds lists under "training" and
"validation" of {"image": "./imagesTr/...", "meta": ..., "labels": {"report": {"findings": {region: text}}, "qa": [...]}}.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.data import Case, ManifestError

SOURCE = "amos-mm"
REGIONS = ("chest", "abdomen", "pelvis")
FILES = ("dataset.json", "report_generation_train_val.json", "vqa_train_val.json")
SPLIT_OF = {"training": "train", "validation": "test"}
"""The published validation part is what scores are published on; validation is cut from training by the caller."""


def read(root: Path) -> Iterator[Case]:
    """Cases of an AMOS-MM folder: one per body region with findings, one per question with options."""
    present = [root / name for name in FILES if (root / name).is_file()]
    if not present:
        raise ManifestError(f"{root} is not AMOS-MM: none of {', '.join(FILES)} is there")
    told: set[str] = set()
    for file in present:
        document = json.loads(file.read_text(encoding="utf-8"))
        for part, split in SPLIT_OF.items():
            for record in document.get(part, []):
                # Whoever has dataset.json beside the two files it was made from has every record twice.
                for case in _cases(record, root, split):
                    if case.to_json() not in told:
                        told.add(case.to_json())
                        yield case


def _cases(record: dict[str, Any], root: Path, split: str) -> Iterator[Case]:
    image = root / record["image"]
    name = image.name.split(".")[0]
    labels = record.get("labels", {})
    shared = {"image": str(image), "split": split, "patient_id": name, "study_id": name, "source": SOURCE}
    findings = labels.get("report", {}).get("findings", {})
    for region in REGIONS:
        text = findings.get(region)
        if isinstance(text, str) and text.strip():
            question = f"Describe the findings of the {region} in this CT."
            yield Case(case_id=f"{name}-{region}", question=question, answer=text.strip(), **shared)
    for number, asked in enumerate(labels.get("qa", []), start=1):
        options = asked["options"]
        listed = " ".join(f"{letter}. {options[letter]}" for letter in sorted(options))
        answer = f"{asked['answer']}. {options[asked['answer']]}"
        question = f"{asked['question'].strip()} Choices: {listed}"
        yield Case(case_id=f"{name}-qa{number}", question=question, answer=answer, **shared)
