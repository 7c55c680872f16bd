"""A comparison as a CSV file and as the tables a person reads."""

import csv
import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from safesteer.evaluation.compared_summaries import Figure
from safesteer.evaluation.markdown_tables import markdown_table

if TYPE_CHECKING:
    from safesteer.evaluation.compare import ComparedModel, Comparison

HEADINGS: Mapping[str, str] = {
    "attack_success": "attack success % ↓",
    "under_attack": "under attack % ↓",
    "over_refusal": "over-refusal % ↓",
    "capability": "capability % ↑",
    "kl": "KL from base, nats/token ↓",
    "top1_agreement": "top-1 agreement % ↑",
}
"""Measure to the head of its column; the arrow points to where it is better."""


def figure_of(model: "ComparedModel", measure: str) -> Figure | None:
    """Return one of the measures in `HEADINGS`."""
    figures: Mapping[str, Figure | None] = {
        "attack_success": model.attack_success,
        "under_attack": model.under_attack,
        "over_refusal": model.over_refusal,
        "capability": model.capability,
        "kl": model.kl,
        "top1_agreement": model.top1_agreement,
    }
    return figures[measure]


def shown_measures(comparison: "Comparison") -> list[str]:
    """Return the measures that any model has."""
    return [
        measure
        for measure in HEADINGS
        if any(figure_of(model, measure) is not None for model in comparison.models)
    ]


def main_rows(comparison: "Comparison") -> list[list[str]]:
    """Return the main table's cells: the model, its measures, whether it is on the Pareto front."""
    measures = shown_measures(comparison)
    return [
        [
            model.name,
            *(figure_text(figure_of(model, measure), 3 if measure == "kl" else 1) for measure in measures),
            {True: "●", False: "", None: "–"}[model.on_front],
        ]
        for model in comparison.models
    ]


def figure_text(figure: Figure | None, digits: int = 1) -> str:
    """Write a figure with its interval: "12.5 (8.0–19.1)"."""
    if figure is None or math.isnan(figure.value):
        return "–"
    if math.isnan(figure.low) or math.isnan(figure.high):
        return f"{figure.value:.{digits}f}"
    return f"{figure.value:.{digits}f} ({figure.low:.{digits}f}–{figure.high:.{digits}f})"


def markdown_text(comparison: "Comparison") -> str:
    """Return the tables in Markdown."""
    measures = shown_measures(comparison)
    lines = [
        "# Comparison",
        "",
        *markdown_table(
            ["model"], [*(HEADINGS[measure] for measure in measures), "Pareto front"], main_rows(comparison)
        ),
        *_explanation(comparison),
        "",
    ]
    for title, names, values in (
        ("Benchmarks", (*comparison.harmful, *comparison.attacks, *comparison.harmless), "benchmarks"),
        ("Capability", comparison.tasks, "tasks"),
    ):
        if names:
            rows = [
                [
                    name,
                    *(
                        figure_text((model.benchmarks if values == "benchmarks" else model.tasks).get(name))
                        for model in comparison.models
                    ),
                ]
                for name in names
            ]
            head = "benchmark" if values == "benchmarks" else "task"
            lines += [
                f"## {title}",
                "",
                *markdown_table([head], [model.name for model in comparison.models], rows),
            ]
    if comparison.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in comparison.notes), ""]
    return "\n".join(lines)


def csv_text(comparison: "Comparison") -> str:
    """Return one row per model and measure: the means, every benchmark and every task."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("model", "measure", "name", "value", "low", "high", "on_front"))
    for model in comparison.models:
        rows = [(measure, "", figure_of(model, measure)) for measure in HEADINGS]
        rows += [("benchmark", name, figure) for name, figure in model.benchmarks.items()]
        rows += [("task", name, figure) for name, figure in model.tasks.items()]
        front = {True: "yes", False: "no", None: ""}[model.on_front]
        for measure, name, figure in rows:
            if figure is not None:
                numbers = (
                    "" if math.isnan(number) else f"{number:.6g}"
                    for number in (figure.value, figure.low, figure.high)
                )
                writer.writerow((model.name, measure, name, *numbers, front))
    return out.getvalue()


def _explanation(comparison: "Comparison") -> list[str]:
    """Say what the columns are."""
    told = [f"Verdicts of {comparison.judge}; unweighted means, with 95 % intervals."]
    for names, what in (
        (comparison.harmful, "Attack success: unsafe answers to"),
        (comparison.attacks, "Under attack: unsafe answers to"),
        (comparison.harmless, "Over-refusal: refusals of"),
        (comparison.tasks, "Capability:"),
    ):
        if names:
            told.append(f"{what} {', '.join(names)}.")
    if comparison.axis is not None:
        other = "capability" if comparison.axis == "capability" else "over-refusal"
        told.append(
            f"● on the Pareto front of attack success and {other}: no other model is as good in both and better in one."
        )
    return told
