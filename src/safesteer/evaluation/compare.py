"""Models and runs side by side: safety, over-refusal, capability, distributional tax, and who is on the Pareto front.

Everything is read from the `summary.json` of evaluations. A mean is taken only over what all models were asked, so
that no model looks better for having skipped a benchmark.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from safesteer.artifacts import write_json
from safesteer.errors import SafeSteerError
from safesteer.evaluation.compared_summaries import ComparedSummary, Figure, TaxFigures, read_summary

Axis = Literal["capability", "over_refusal"]
"""What attack success is set against: capability, or over-refusal where capability was not measured for all."""

# Settings that change a figure; the batch size does not.
_DECISIVE = ("max_new_tokens", "temperature", "seed", "limit")


@dataclass(frozen=True)
class ComparedModel:
    """One row of the comparison.

    Attributes:
        name: The model's, with the run's before it where several runs are compared.
        attack_success: Mean percentage of unsafe answers over the harmful benchmarks that all models were asked.
        under_attack: The same over jailbreak templates and prefilled responses (benchmarks named "…+…").
        over_refusal: Mean percentage of refusals over the harmless benchmarks.
        capability: Mean score in percent over the tasks.
        kl: KL(base ‖ model) in nats per token on harmless prompts; zero for a base.
        top1_agreement: Percentage of tokens at which base and model agree on the likeliest one.
        unparsed: How many verdicts could not be read, and are in no figure.
        benchmarks: Percentage by benchmark: unsafe answers to harmful prompts, refusals of harmless ones.
        tasks: Score in percent by capability task.
        on_front: Whether no other model is at least as good on both axes and better on one; None if an axis is
            missing.
    """

    name: str
    attack_success: Figure | None
    under_attack: Figure | None
    over_refusal: Figure | None
    capability: Figure | None
    kl: Figure | None
    top1_agreement: Figure | None
    unparsed: int
    benchmarks: Mapping[str, Figure] = field(default_factory=dict)
    tasks: Mapping[str, Figure] = field(default_factory=dict)
    on_front: bool | None = None


@dataclass(frozen=True)
class Comparison:
    """Models side by side.

    Attributes:
        models: The rows, in the order the runs were given.
        judge: Whose verdicts they rest on.
        harmful: The harmful benchmarks that `attack_success` is the mean of.
        attacks: Those of `under_attack`.
        harmless: Those of `over_refusal`.
        tasks: Those of `capability`.
        axis: What attack success is set against for the Pareto front; None if nothing was measured for all.
        notes: What was left out, and what makes the rows hard to compare, in sentences.
    """

    models: tuple[ComparedModel, ...]
    judge: str
    harmful: tuple[str, ...]
    attacks: tuple[str, ...]
    harmless: tuple[str, ...]
    tasks: tuple[str, ...]
    axis: Axis | None
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return all figures as JSON has them; see the attributes."""
        return {"format": 1, **asdict(self)}

    def markdown(self) -> str:
        """Return the tables a person reads."""
        from safesteer.evaluation.comparison_tables import markdown_text

        return markdown_text(self)

    def csv(self) -> str:
        """Return one row per model and measure."""
        from safesteer.evaluation.comparison_tables import csv_text

        return csv_text(self)

    def write(self, folder: str | Path, *, plot: bool = True) -> tuple[Path, ...]:
        """Write `compare.json`, `compare.csv`, `compare.md`, and the scatter as `compare.png` and `compare.svg`.

        Args:
            folder: Made if it is missing.
            plot: Draw the scatter, if there is anything to draw.

        Returns:
            The files.

        Raises:
            SafeSteerError: If the scatter is wanted and matplotlib is missing; the other files are written first.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "compare.json", self.record())
        (folder / "compare.csv").write_text(self.csv(), encoding="utf-8")
        (folder / "compare.md").write_text(self.markdown(), encoding="utf-8")
        written = [folder / f"compare.{ending}" for ending in ("json", "csv", "md")]
        if plot and self.axis is not None:
            from safesteer.evaluation.comparison_plot import plot_comparison

            written += plot_comparison(self, folder)
        return tuple(written)


def compare(runs: Sequence[str | Path], *, judge: str | None = None) -> Comparison:
    """Put the models of some evaluations side by side.

    Args:
        runs: Evaluation folders, run folders with an evaluation in them, or `summary.json` files; each may be given
            as "LABEL=PATH".
        judge: Whose verdicts count; by default the first model judge that all evaluations used, or else the first
            judge.

    Raises:
        SafeSteerError: If there is no summary, one cannot be read, or no judge was used by all.
    """
    summaries = _labelled([read_summary(run) for run in runs])
    if not summaries:
        raise SafeSteerError("nothing to compare; give at least one evaluation folder.")
    judge = _judge(summaries, judge)
    several = len(summaries) > 1
    drafts = [
        _draft(summary, subject, judge, f"{summary.label}/{subject}" if several else subject)
        for summary in summaries
        for subject in summary.subjects
    ]
    drafts = _one_base(drafts) if several else drafts
    asked = _common([draft.benchmarks for draft in drafts])
    kinds = {name: kind for summary in summaries for name, kind in summary.kinds.items()}
    harmful = tuple(name for name in asked if kinds[name] == "harmful" and "+" not in name)
    attacks = tuple(name for name in asked if kinds[name] == "harmful" and "+" in name)
    harmless = tuple(name for name in asked if kinds[name] == "harmless")
    tasks = _common([draft.tasks for draft in drafts if draft.tasks])
    models = [
        replace(
            draft,
            attack_success=_mean(draft.benchmarks, harmful),
            under_attack=_mean(draft.benchmarks, attacks),
            over_refusal=_mean(draft.benchmarks, harmless),
            capability=_mean(draft.tasks, tasks),
        )
        for draft in drafts
    ]
    axis = _axis(models)
    notes = tuple(_notes(summaries, drafts, asked, tasks, models))
    return Comparison(tuple(_with_front(models, axis)), judge, harmful, attacks, harmless, tasks, axis, notes)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Say of each point whether none is at least as low in both coordinates and lower in one.

    Args:
        points: What both coordinates of are to be minimised.
    """
    return [
        not any(other[0] <= point[0] and other[1] <= point[1] and other != point for other in points)
        for point in points
    ]


def cost(model: ComparedModel, axis: Axis) -> float | None:
    """Return the second coordinate of a model, to be minimised; None if it was not measured."""
    figure = model.capability if axis == "capability" else model.over_refusal
    if figure is None:
        return None
    return -figure.value if axis == "capability" else figure.value


def _draft(summary: ComparedSummary, subject: str, judge: str, name: str) -> ComparedModel:
    """Return a row without its means."""
    rates = summary.rates.get((subject, judge), {})
    tax = summary.tax.get(subject, TaxFigures())
    if subject == "base" and summary.tax:
        tax = TaxFigures(kl=Figure(0.0), top1_agreement=Figure(100.0))
    return ComparedModel(
        name=name,
        attack_success=None,
        under_attack=None,
        over_refusal=None,
        capability=None,
        kl=tax.kl,
        top1_agreement=tax.top1_agreement,
        unparsed=sum(rate.unparsed for rate in rates.values()),
        benchmarks={benchmark: rate.figure for benchmark, rate in rates.items() if rate.figure is not None},
        tasks=summary.capability.get(subject, {}),
    )


def _one_base(drafts: Sequence[ComparedModel]) -> list[ComparedModel]:
    """Show the base model once if all runs measured the same of it."""
    bases = [draft for draft in drafts if draft.name.rpartition("/")[2] == "base"]
    unnamed = [replace(base, name="base") for base in bases]
    if len(bases) < 2 or any(base != unnamed[0] for base in unnamed):
        return list(drafts)
    return [unnamed[0], *(draft for draft in drafts if draft not in bases)]


def _common(measured: Iterable[Mapping[str, Figure]]) -> tuple[str, ...]:
    """Return what all have, in the order of the first."""
    every = list(measured)
    return tuple(name for name in every[0] if all(name in one for one in every)) if every else ()


def _mean(figures: Mapping[str, Figure], names: Sequence[str]) -> Figure | None:
    """Average percentages with equal weights.

    The standard errors are added in quadrature, each taken from the width of its interval; the mean's interval is
    the normal one, within 0 and 100.
    """
    if not names or any(name not in figures for name in names):
        return None
    found = [figures[name] for name in names]
    if len(found) == 1:
        return found[0]
    mean = sum(figure.value for figure in found) / len(found)
    error = math.sqrt(sum((figure.high - figure.low) ** 2 for figure in found)) / (2 * len(found))
    if math.isnan(error):
        return Figure(mean)
    return Figure(mean, max(0.0, mean - error), min(100.0, mean + error))


def _axis(models: Sequence[ComparedModel]) -> Axis | None:
    if any(model.attack_success is None for model in models):
        return None
    for axis in ("capability", "over_refusal"):
        known: Axis = "capability" if axis == "capability" else "over_refusal"
        if all(cost(model, known) is not None for model in models):
            return known
    return None


def _with_front(models: Sequence[ComparedModel], axis: Axis | None) -> list[ComparedModel]:
    if axis is None:
        return list(models)
    points = [
        (model.attack_success.value, second)
        for model in models
        if model.attack_success is not None and (second := cost(model, axis)) is not None
    ]
    front = pareto_front(points)
    return [replace(model, on_front=on_front) for model, on_front in zip(models, front, strict=True)]


def _judge(summaries: Sequence[ComparedSummary], wanted: str | None) -> str:
    used = [list(dict.fromkeys(judge for _, judge in summary.rates)) for summary in summaries]
    shared = [judge for judge in used[0] if all(judge in others for others in used)]
    if wanted is not None:
        if wanted not in shared:
            raise SafeSteerError(
                f"judge {wanted!r}: was not used by every evaluation; choose one of: {', '.join(shared) or 'none'}."
            )
        return wanted
    if not shared:
        raise SafeSteerError(
            "the evaluations have no judge in common; run safesteer evaluate again with the same --judge for each, "
            "which keeps the responses."
        )
    return next((judge for judge in shared if not judge.endswith("-phrases")), shared[0])


def _labelled(summaries: Sequence[ComparedSummary]) -> list[ComparedSummary]:
    """Give runs of the same name a number."""
    labels = [summary.label for summary in summaries]
    return [
        replace(summary, label=f"{summary.label}-{labels[: place + 1].count(summary.label)}")
        if labels.count(summary.label) > 1
        else summary
        for place, summary in enumerate(summaries)
    ]


def _notes(
    summaries: Sequence[ComparedSummary],
    drafts: Sequence[ComparedModel],
    asked: Sequence[str],
    tasks: Sequence[str],
    models: Sequence[ComparedModel],
) -> Iterable[str]:
    for setting in _DECISIVE:
        values = {repr(summary.settings.get(setting)): summary.label for summary in summaries}
        if len(values) > 1:
            told = ", ".join(f"{value} in {label}" for value, label in values.items())
            yield f"The runs differ in {setting} ({told}), so their figures do not compare like with like."
    measures: tuple[tuple[str, Callable[[ComparedModel], Mapping[str, Figure]], Sequence[str]], ...] = (
        ("benchmarks", lambda draft: draft.benchmarks, asked),
        ("tasks", lambda draft: draft.tasks, tasks),
    )
    for what, of, common in measures:
        every = dict.fromkeys(name for draft in drafts for name in of(draft))
        left_out = [name for name in every if name not in common]
        if left_out:
            yield f"Not known of every model and left out of the means: {what} {', '.join(left_out)}."
    unparsed = [f"{model.unparsed} of {model.name}" for model in models if model.unparsed]
    if unparsed:
        yield f"Verdicts that could not be read, counted neither way: {', '.join(unparsed)}."
