"""Summaries of evaluations as `safesteer compare` reads them, checked field by field."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safesteer.artifacts import read_json
from safesteer.errors import SafeSteerError
from safesteer.evaluation.records import Kind

_IN_A_RUN = ("evaluation", "demo")
"""Where a run's folder may hold a summary: that of `safesteer evaluate`, or else that of `safesteer demo`."""


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval; NaN bounds where none is known."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def __eq__(self, other: object) -> bool:
        """Compare with NaN equal to NaN, so that unknown bounds do not make figures differ."""
        if not isinstance(other, Figure):
            return NotImplemented
        return repr((self.value, self.low, self.high)) == repr((other.value, other.low, other.high))

    def __hash__(self) -> int:
        return hash(repr((self.value, self.low, self.high)))


@dataclass(frozen=True)
class JudgedBenchmark:
    """What one judge says of one model on one benchmark.

    Attributes:
        figure: Percentage of unsafe answers to harmful prompts, of refusals of harmless ones; None if the judge
            does not tell, or could read nothing.
        unparsed: How many verdicts could not be read.
    """

    figure: Figure | None
    unparsed: int


@dataclass(frozen=True)
class TaxFigures:
    """The distributional tax of one model."""

    kl: Figure | None = None
    top1_agreement: Figure | None = None


@dataclass(frozen=True)
class ComparedSummary:
    """What is compared of one evaluation.

    Attributes:
        label: Of the run.
        subjects: Its models.
        rates: Model and judge, then benchmark.
        kinds: Benchmark to its kind.
        capability: Model to task to score in percent.
        tax: Model to its tax.
        settings: Of the evaluation.
    """

    label: str
    subjects: tuple[str, ...]
    rates: Mapping[tuple[str, str], Mapping[str, JudgedBenchmark]]
    kinds: Mapping[str, Kind]
    capability: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)
    tax: Mapping[str, TaxFigures] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_summary(run: str | Path) -> ComparedSummary:
    """Read the summary of an evaluation.

    Args:
        run: The evaluation's folder, a run's folder with an evaluation in it, or the file itself; perhaps with
            "LABEL=" before it.

    Raises:
        SafeSteerError: If there is none, or it is not what `safesteer evaluate` writes.
    """
    label, path = _split(run)
    file = _file(path)
    try:
        values = read_json(file)
    except RecursionError:
        raise SafeSteerError(
            f"{file}: is nested too deeply to be an evaluation's summary; give another."
        ) from None
    try:
        return _summary(label or _label(file), values)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise SafeSteerError(
            f"{file}: is not the summary of an evaluation ({type(error).__name__} at {error}); run safesteer "
            "evaluate again, which keeps the responses."
        ) from None


def _split(run: str | Path) -> tuple[str, Path]:
    label, equals, rest = str(run).partition("=")
    if equals and label.strip() and rest and not _exists(Path(run)):
        return label.strip(), Path(rest)
    return "", Path(run)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a NUL in it
        return False


def _file(path: Path) -> Path:
    for candidate in (path, path / "summary.json", *(path / name / "summary.json" for name in _IN_A_RUN)):
        if _exists(candidate) and candidate.is_file():
            return candidate
    raise SafeSteerError(
        f"{path}: holds no summary.json of an evaluation; run safesteer evaluate first, or give its --output."
    )


def _label(file: Path) -> str:
    folder = file.resolve().parent
    return (folder.parent if folder.name in _IN_A_RUN and folder.parent.name else folder).name or "run"


def _summary(label: str, values: Mapping[str, Any]) -> ComparedSummary:
    rates: dict[tuple[str, str], dict[str, JudgedBenchmark]] = {}
    kinds: dict[str, Kind] = {}
    subjects = tuple(_text(subject) for subject in values["subjects"])
    for entry in values["rates"]:
        benchmark, kind = _text(entry["benchmark"]), entry["kind"]
        if kind not in ("harmful", "harmless"):
            raise ValueError(f"kind {kind!r}")
        kinds[benchmark] = kind
        counted = entry["rates"]
        rate = counted["unsafe"] if kind == "harmful" else counted["refused"]
        judged = JudgedBenchmark(_percentage(rate), int(counted["unparsed"]))
        rates.setdefault((_text(entry["subject"]), _text(entry["judge"])), {})[benchmark] = judged
    return ComparedSummary(
        label=label,
        subjects=subjects,
        rates=rates,
        kinds=kinds,
        capability={
            subject: {task: score for task, value in scores.items() if (score := _score(value)) is not None}
            for subject, scores in values.get("capability", {}).items()
        },
        tax={subject: _tax(tax) for subject, tax in values.get("tax", {}).items()},
        settings=dict(values.get("settings", {})),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(repr(value))
    return value


def _number(value: Any) -> float:
    """Read a number; null is what JSON has for NaN."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(repr(value))
    return float(value)


def _figure(value: Any, low: Any, high: Any, scale: float = 1.0) -> Figure | None:
    """Read a number and its interval; None if it is not known."""
    number = scale * _number(value)
    return None if math.isnan(number) else Figure(number, scale * _number(low), scale * _number(high))


def _percentage(rate: Any) -> Figure | None:
    return None if rate is None else _figure(rate["percent"], rate["low"], rate["high"])


def _score(score: Any) -> Figure | None:
    return _figure(score["value"], score.get("low"), score.get("high"), 100.0)


def _tax(tax: Any) -> TaxFigures:
    return TaxFigures(
        kl=_figure(tax.get("kl_per_token"), tax.get("kl_low"), tax.get("kl_high")),
        top1_agreement=_figure(tax.get("top1_agreement"), tax.get("top1_low"), tax.get("top1_high"), 100.0),
    )
