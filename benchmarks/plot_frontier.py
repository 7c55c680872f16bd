"""Plot the frontier of the testbed's sweep into docs/images/: safety against over-refusal, and the truncated sum's drift.

python benchmarks/plot_frontier.py      (needs the extra `report`)
"""

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "testbed_sweep.json"
IMAGES = ROOT / "docs" / "images"


def frontier(rows: dict[str, Any], path: Path) -> None:
    """Attack success against over-refusal, one point a setting; the corner to be in is bottom left."""
    points = {
        name.split("/")[0]: row
        for name, row in rows.items()
        if name.endswith("/0") and not name.startswith("long-")
    }
    base = next(row["base"] for row in rows.values() if "base" in row)
    fig, axes = plt.subplots(1, 2, figsize=(12, 5.2), sharey=True)
    panels = (
        ("harmless_refusal", "harmless prompts refused, %"),
        ("alarming_refusal", "harmless but alarming prompts refused, %"),
    )
    shown = {"base": base, **{name: row["aligned"] for name, row in points.items()}}
    for axis, (key, label) in zip(axes, panels, strict=True):
        for (name, figures), marker in zip(shown.items(), cycle("sovD^<>pP*Xhd"), strict=False):
            axis.scatter(figures[key], figures["attack_success"], marker=marker, s=55, label=name, zorder=3)
        # What matters lies within a few points of the corner, and some settings lie ninety away.
        axis.set_xscale("symlog", linthresh=5)
        axis.set_yscale("symlog", linthresh=5)
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_locator(FixedLocator([0, 1, 2, 3, 5, 10, 20, 50, 100]))
            scale.set_major_formatter("{x:g}")
        axis.set_xlim(-0.3, 110)
        axis.set_ylim(-0.3, 110)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[1].legend(fontsize=8, loc="upper right")
    axes[0].set_ylabel("attack success, %")
    fig.suptitle("Testbed, validation prompts, 100 harmful training prompts, seed 0")
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def drift(rows: dict[str, Any], path: Path) -> None:
    """Student's and teacher's mass on S over long training, by support."""
    fig, axis = plt.subplots(figsize=(7, 4.2))
    for name, row in rows.items():
        if not name.startswith("long-") or not name.endswith("/0"):
            continue
        steps, student, teacher = zip(*row["mass"], strict=True)
        (line,) = axis.plot(steps, [s / t for s, t in zip(student, teacher, strict=True)], label=name[5:-2])
        del line
    axis.axhline(1, color="black", lw=0.8)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("student's mass on S / teacher's")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.25)
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main() -> None:
    """Read the sweep and write both plots."""
    rows = json.loads(RESULTS.read_text())
    IMAGES.mkdir(parents=True, exist_ok=True)
    frontier(rows, IMAGES / "frontier.png")
    if any(name.startswith("long-") for name in rows):
        drift(rows, IMAGES / "truncated-sum.png")


if __name__ == "__main__":
    main()
