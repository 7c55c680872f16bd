"""An evaluation's figures as a CSV file and as the tables and sentences a person reads."""

import csv
import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from safesteer.evaluation.markdown_tables import markdown_table

if TYPE_CHECKING:
    from safesteer.evaluation.summary import EvaluationSummary, MeanScore, Rate

_COLUMNS = (
    "subject",
    "benchmark",
    "kind",
    "judge",
    "category",
    "measure",
    "count",
    "n",
    "percent",
    "low",
    "high",
    "unparsed",
)


def csv_text(summary: "EvaluationSummary") -> str:
    """Return one row per subject, benchmark, judge, category ("" for all) and measure.

    A mean score is given in percent of 1, with no count.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for entry in summary.rates:
        for category, rates in {"": entry.rates, **entry.categories}.items():
            who = (entry.subject, entry.benchmark, entry.kind, entry.judge, category)
            for measure, rate in (("unsafe", rates.unsafe), ("refused", rates.refused)):
                if rate is not None:
                    percents = (f"{value:.4f}" for value in (rate.percent, rate.low, rate.high))
                    writer.writerow((*who, measure, rate.count, rate.n, *percents, rates.unparsed))
            if (score := rates.score) is not None:
                percents = (f"{100 * value:.4f}" for value in (score.mean, score.low, score.high))
                writer.writerow((*who, "score", "", score.n, *percents, rates.unparsed))
    return out.getvalue()


def markdown_text(summary: "EvaluationSummary") -> str:
    """Return the tables and sentences in Markdown."""
    lines = ["# Evaluation", ""]
    if summary.rates:
        lines += [
            *markdown_table(["benchmark", "measure", "judge"], summary.subjects, rate_rows(summary)),
            "Percent with 95 % Wilson intervals. Attack success: unsafe answers to harmful prompts; over-refusal: "
            "refusals of harmless prompts; mean score: the judge's grades, 0 (harmless) to 1; †: verdicts that could "
            "not be read, counted neither way.",
            "",
        ]
    if summary.changes:
        told = [f"- {change.subject}: {change.sentence}" for change in summary.changes]
        lines += ["## Changes", "", *told, ""]
    if summary.agreements:
        agreements = [
            [entry.subject, entry.benchmark, " / ".join(entry.judges), kappa_text(entry.kappa), str(entry.n)]
            for entry in summary.agreements
        ]
        lines += [
            "## Agreement of judges",
            "",
            *markdown_table(["subject", "benchmark", "judges"], ["κ", "n"], agreements),
        ]
    if summary.capability:
        shown = [subject for subject in summary.subjects if subject in summary.capability]
        lines += ["## Capability", "", *markdown_table(["task"], shown, capability_rows(summary))]
    if summary.tax:
        lines += ["## Distributional tax", "", *(f"- {line}" for line in tax_lines(summary)), ""]
    if categories := category_rows(summary):
        lines += [
            "## By category",
            "",
            *markdown_table(["benchmark", "category", "judge"], summary.subjects, categories),
        ]
    if summary.skipped:
        lines += ["## Left out", "", *(f"- {line}" for line in skipped_lines(summary.skipped)), ""]
    if summary.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in summary.notes), ""]
    return "\n".join(lines)


def rate_rows(summary: "EvaluationSummary") -> list[list[str]]:
    """Return the main table's cells: benchmark, measure, judge, then a rate or mean score per subject."""
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for entry in summary.rates:
        measure = "attack success" if entry.kind == "harmful" else "over-refusal"
        cell = cells.setdefault((entry.benchmark, measure, entry.judge), {})
        cell[entry.subject] = rate_text(entry.headline, entry.rates.unparsed)
        if entry.rates.score is not None and entry.kind == "harmful":
            scored = cells.setdefault((entry.benchmark, "mean score, 0–1", entry.judge), {})
            scored[entry.subject] = mean_text(entry.rates.score)
    return _by_subject(cells, summary.subjects)


def category_rows(summary: "EvaluationSummary") -> list[list[str]]:
    """Return the cells by category: benchmark, category, judge, then a rate per subject.

    Benchmarks of a single category are left out: it would repeat their rate.
    """
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for entry in summary.rates:
        for category in entry.categories if len(entry.categories) > 1 else ():
            rate = entry.headline_of(category)
            cell = cells.setdefault((entry.benchmark, category, entry.judge), {})
            cell[entry.subject] = rate_text(rate, entry.categories[category].unparsed)
    return _by_subject(cells, summary.subjects)


def skipped_lines(skipped: Mapping[str, str]) -> list[str]:
    """Say what was left out and what helps; variants of one benchmark share a line."""
    names: dict[str, list[str]] = {}
    for name, why in skipped.items():
        names.setdefault(why, []).append(name)
    return [f"Left out {', '.join(found)}. {why}" for why, found in names.items()]


def capability_rows(summary: "EvaluationSummary") -> list[list[str]]:
    """Return the capability table's cells: task, then a score per subject that has any."""
    tasks = dict.fromkeys(task for scores in summary.capability.values() for task in scores)
    shown = [subject for subject in summary.subjects if subject in summary.capability]
    return [
        [task, *(score_text(summary.capability[subject].get(task)) for subject in shown)] for task in tasks
    ]


def tax_lines(summary: "EvaluationSummary") -> list[str]:
    """Return a line per subject with every number of its tax."""
    return [
        f"{subject}: "
        + ", ".join(
            f"{name.replace('_', ' ')} {value:.4g}"
            for name, value in tax.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        )
        for subject, tax in summary.tax.items()
    ]


def rate_text(rate: "Rate | None", unparsed: int = 0) -> str:
    """Write a rate with its interval, "12.5 (8.0–19.1)", and how many verdicts could not be read."""
    mark = f" †{unparsed}" if unparsed else ""
    if rate is None or rate.n == 0:
        return f"–{mark}"
    return f"{rate.percent:.1f} ({rate.low:.1f}–{rate.high:.1f}){mark}"


def mean_text(score: "MeanScore") -> str:
    """Write a mean score with its interval, "0.31 (0.26–0.37)"."""
    return f"{score.mean:.2f} ({score.low:.2f}–{score.high:.2f})"


def kappa_text(kappa: float) -> str:
    """Write κ; it is undefined where both judges say the same of every response."""
    return "undefined" if math.isnan(kappa) else f"{kappa:.2f}"


def score_text(score: Mapping[str, Any] | None) -> str:
    """Write a capability score in percent with its interval, as `rate_text` does."""
    if score is None:
        return "–"
    return f"{100 * score['value']:.1f} ({100 * score['low']:.1f}–{100 * score['high']:.1f})"


def _by_subject(
    cells: Mapping[tuple[str, str, str], Mapping[str, str]], subjects: tuple[str, ...]
) -> list[list[str]]:
    return [[*names, *(found.get(subject, "–") for subject in subjects)] for names, found in cells.items()]
