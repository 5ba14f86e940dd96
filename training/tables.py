"""Tables of results in the shape of the publication's two, with its figures beside ours where they may be compared."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = tuple[str, ...]

TABLE_1_KEYS = ("rouge1", "green", "meteor", "bertscore")
TABLE_2_KEYS = ("bleu4", "rouge1", "green", "meteor", "bertscore")
DASH = "—"

# Published figures (arXiv 2507.00316), never ours: ROUGE-1, GREEN, METEOR, BERTScore.
PUBLISHED_TABLE_1: dict[str, dict[str, tuple[float | None, ...]]] = {
    "CT-RATE": {
        "CT-CHAT-8B": (0.294, 0.113, 0.221, 0.815),
        "LaMed-Phi-3-4B": (0.130, 0.002, 0.050, 0.814),
        "LaMed-Llama-2-7B": (0.103, 0.001, 0.048, 0.815),
        "RadFM-14B": (0.054, 0.014, 0.017, 0.812),
        "μ²LLM-1B (SFT)": (0.517, 0.384, 0.330, 0.879),
        "μ²LLM-1B (SFT + DPO)": (0.539, 0.429, 0.359, 0.890),
    },
    "AMOS-MM": {
        "LaMed-Phi-3-4B": (0.126, 0.009, 0.047, 0.821),
        "LaMed-Llama-2-7B": (0.163, 0.009, 0.065, 0.823),
        "RadFM-14B": (0.046, 0.001, 0.015, 0.812),
        "μ²LLM-1B (SFT)": (0.421, 0.339, 0.249, 0.881),
        "μ²LLM-1B (SFT + DPO)": (0.459, 0.400, None, 0.881),
    },
    "Abdomen Atlas 3.0": {
        "RadGPT-N": (0.247, None, 0.112, None),
        "LaMed-Phi-3-4B": (0.136, 0.011, 0.058, 0.807),
        "LaMed-Llama-2-7B": (0.139, 0.009, 0.060, 0.810),
        "RadFM-14B": (0.037, 0.000, 0.013, 0.794),
        "μ²LLM-1B (SFT)": (0.529, 0.281, 0.295, 0.891),
        "μ²LLM-1B (SFT + DPO)": (0.567, 0.346, 0.319, 0.895),
    },
}
# AMOS-MM: BLEU, ROUGE-1, GREEN, METEOR, BERTScore. The published .876 METEOR of the last row is a misprint and left out.
PUBLISHED_TABLE_2: dict[str, tuple[float | None, ...]] = {
    "baseline": (0.190, 0.405, 0.204, 0.210, 0.864),
    "+RPE": (0.281, 0.421, 0.277, 0.236, 0.880),
    "+DTS": (0.271, 0.411, 0.299, 0.240, 0.888),
    "+DMTP": (0.254, 0.401, 0.233, 0.220, 0.874),
    "full": (0.279, 0.421, 0.339, 0.249, 0.881),
    "+DPO": (0.336, 0.459, 0.400, None, 0.881),
}
GROUPS = ("finding_f1_by_type", "finding_f1_by_size", "recall_by_size", "ct_label_f1")
EXTRA_KEYS = ("finding_micro_f1", "finding_macro_f1", "shuffled_finding_micro_f1", "normal_false_positive_rate")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def shown(value: Any, interval: Sequence[float] | None = None) -> str:
    """A score as a cell: three digits, its interval behind it, a dash for none."""
    if value is None:
        return DASH
    cell = f"{value:.3f}" if isinstance(value, float) else str(value)
    return cell if interval is None else f"{cell} ({interval[0]:.3f}–{interval[1]:.3f})"


def _row(figures: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    return [_cell(figures, key) for key in keys]


def floor_rows(systems: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The floors of all systems, each once: systems that were trained on the same cases share them."""
    told: list[Mapping[str, Any]] = []
    for system in systems:
        told += [floor for floor in system.get("floors", ()) if floor not in told]
    return told


def floor_note(systems: Sequence[Mapping[str, Any]]) -> str:
    """Why a table has no floors, for each system that has none; empty when all have them."""
    missing = [(system["name"], system["floors_missing"]) for system in systems if system.get("floors_missing")]
    return "".join(f"\n\nNo floors for {name}: {reason}." for name, reason in missing)


def table_1(systems: Sequence[Mapping[str, Any]], published: str | None = None) -> str:
    """Systems and their floors against text scores; with a public set's name its published rows follow, marked as such."""
    keys = (*TABLE_1_KEYS, *EXTRA_KEYS)
    rows = [[str(system["name"]), *_row(system, keys)] for system in [*systems, *floor_rows(systems)]]
    for name, values in PUBLISHED_TABLE_1.get(published or "", {}).items():
        rows.append([f"{name}, published", *(shown(value) for value in values), *[DASH] * len(EXTRA_KEYS)])
    return markdown(["system", *keys], rows) + floor_note(systems)


def table_2(arms: Sequence[Mapping[str, Any]]) -> str:
    """Ablation arms, or systems, on our data; published arms stand beside their namesakes, on AMOS-MM, for the order alone."""
    keys = (*TABLE_2_KEYS, "finding_micro_f1")
    shown_rows = [*arms, *floor_rows(arms)]
    known = [PUBLISHED_TABLE_2.get(str(row["name"])) for row in shown_rows]
    rows = [[str(row["name"]), *_row(row, keys)] for row in shown_rows]
    if not any(known):
        return markdown(["arm", *keys], rows) + floor_note(arms)
    for cells, published in zip(rows, known, strict=True):
        cells += [shown(value) for value in published or (None,) * len(TABLE_2_KEYS)]
    header = ["arm", *keys, *(f"{key}, published (AMOS-MM)" for key in TABLE_2_KEYS)]
    return markdown(header, rows) + floor_note(arms)


def full_table(figures: Mapping[str, Any]) -> str:
    """Every score of one system with its interval, and beside it what its floors reach."""
    floors: Sequence[Mapping[str, Any]] = figures.get("floors", ())
    skipped = {"intervals", "notes", "command", "name", "floors", "floors_missing", *GROUPS}
    rows = [[key, *(_cell(told, key) for told in (figures, *floors))] for key in figures if key not in skipped]
    for group in GROUPS:
        rows += [
            [f"{group}: {name}", *(shown(told.get(group, {}).get(name)) for told in (figures, *floors))]
            for name in figures.get(group, {})
        ]
    header = ["score", f"{figures['name']} (95 % interval)", *(str(floor["name"]) for floor in floors)]
    return markdown(header, rows) + floor_note([figures])


def _cell(figures: Mapping[str, Any], key: str) -> str:
    return shown(figures.get(key), figures.get("intervals", {}).get(key))
