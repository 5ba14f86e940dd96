"""Pictures of a run: loss, DTS entropy, selection temperature, gate weights, reward margins, one file each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

PLOTS: dict[str, tuple[str, ...]] = {
    "loss": ("loss", "eval_loss"),
    "dts_entropy": ("dts/entropy",),
    "dts_temperature": ("dts/temperature",),
    "dmtp_gates": ("dmtp/gate_0", "dmtp/gate_1", "dmtp/gate_2"),
    "reward_margins": ("rewards/margins", "rewards/chosen", "rewards/rejected"),
    "reward_accuracy": ("rewards/accuracies",),
    "cell_f1": ("micro_f1", "macro_f1", "organ_f1"),
}
"""File name: the logged figures that share its axes."""


def plot_history(history: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw every plot whose figures were logged (rows with "step") as PNG; returns the files."""
    files = []
    for name, keys in PLOTS.items():
        lines = {key: [(row["step"], row[key]) for row in history if key in row and "step" in row] for key in keys}
        lines = {key: points for key, points in lines.items() if points}
        if not lines:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        for key, points in lines.items():
            axes.plot([step for step, _ in points], [value for _, value in points], label=key, marker=".", markersize=3)
        axes.set_xlabel("step")
        axes.set_title(name.replace("_", " "))
        axes.grid(alpha=0.3)
        axes.legend()
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=110)
    return files
