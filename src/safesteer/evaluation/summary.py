"""What an evaluation comes to: rates with their intervals, changes since the base model, judges' agreement."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from safesteer.artifacts import write_json
from safesteer.evaluation.records import Kind, Record, Verdict
from safesteer.evaluation.statistics import (
    Difference,
    cohens_kappa,
    paired_bootstrap,
    sentence,
    wilson_interval,
)
from safesteer.evaluation.summary_tables import csv_text, markdown_text

Measure = Literal["unsafe", "refused", "correct", "preferred"]
"""Of harmful prompts what counts is "unsafe" (attack success), of harmless ones "refused" (over-refusal), of
capability tasks "correct", of AlpacaEval "preferred" (to the reference's answer)."""


@dataclass(frozen=True)
class Rate:
    """A share of responses, with Wilson's 95 % interval.

    Attributes:
        count: How many.
        n: Of how many that the judge could say it of; what it left open counts neither way.
        percent: `count / n`; NaN if `n` is 0.
        low: Lower end of the interval, in percent.
        high: Upper end.
    """

    count: int
    n: int
    percent: float
    low: float
    high: float

    @classmethod
    def of(cls, flags: Iterable[bool]) -> "Rate":
        """Count true flags."""
        values = list(flags)
        count, n = sum(values), len(values)
        low, high = wilson_interval(count, n)
        return cls(count, n, 100 * count / n if n else math.nan, 100 * low, 100 * high)


@dataclass(frozen=True)
class MeanScore:
    """The mean of a judge's grades, each between 0 (harmless) and 1.

    Attributes:
        mean: Such as the StrongREJECT score; NaN if `n` is 0.
        low: Lower end of a 95 % interval on the wide side (see `wilson_interval`).
        high: Upper end.
        n: How many responses were graded.
    """

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, scores: Sequence[float]) -> "MeanScore":
        """Average grades."""
        low, high = wilson_interval(math.fsum(scores), len(scores))
        return cls(math.fsum(scores) / len(scores) if scores else math.nan, low, high, len(scores))


@dataclass(frozen=True)
class Rates:
    """What one judge says of some responses.

    Attributes:
        n: How many responses.
        unparsed: Of how many of them the judge's output could not be read.
        unsafe: Share of unsafe responses among those judged safe or unsafe.
        refused: Share of refusals; None if the judge does not tell refusals.
        score: Mean grade, where the judge grades (StrongREJECT's rubric does); None otherwise.
    """

    n: int
    unparsed: int
    unsafe: Rate
    refused: Rate | None
    score: MeanScore | None = None

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> "Rates":
        """Count verdicts."""
        parsed = [verdict for verdict in verdicts if verdict.verdict != "unparsed"]
        told = [verdict.refused for verdict in verdicts if verdict.refused is not None]
        grades = [verdict.score for verdict in verdicts if verdict.score is not None]
        return cls(
            n=len(verdicts),
            unparsed=len(verdicts) - len(parsed),
            unsafe=Rate.of(verdict.verdict == "unsafe" for verdict in parsed),
            refused=Rate.of(told) if told else None,
            score=MeanScore.of(grades) if grades else None,
        )


@dataclass(frozen=True)
class BenchmarkRates:
    """What one judge says of one subject on one benchmark, in all and by category."""

    subject: str
    benchmark: str
    kind: Kind
    judge: str
    rates: Rates
    categories: Mapping[str, Rates] = field(default_factory=dict)

    @property
    def headline(self) -> Rate | None:
        """Attack success on harmful prompts, over-refusal on harmless ones (None if the judge does not tell)."""
        return self._headline(self.rates)

    def headline_of(self, category: str) -> Rate | None:
        """Return the same of one category.

        Raises:
            KeyError: If there is no such category.
        """
        return self._headline(self.categories[category])

    def _headline(self, rates: Rates) -> Rate | None:
        return rates.unsafe if self.kind == "harmful" else rates.refused


@dataclass(frozen=True)
class Change:
    """How a rate differs from another subject's on the same prompts.

    Attributes:
        subject: Whose rate.
        against: Since whom, usually "base".
        benchmark: On which prompts.
        judge: By whose verdicts ("lm-eval" for most of capability); prompts that either verdict leaves open are left out.
        measure: Which rate.
        difference: In points, with its paired bootstrap interval.
        sentence: The same in plain words.
    """

    subject: str
    against: str
    benchmark: str
    judge: str
    measure: Measure
    difference: Difference
    sentence: str


@dataclass(frozen=True)
class Agreement:
    """How far two judges agree on one subject's responses.

    Attributes:
        subject: Whose responses.
        benchmark: To which prompts.
        judges: Which two.
        measure: On what: "unsafe" of harmful prompts; "refused" of harmless ones, if both tell refusals.
        kappa: Cohen's κ; NaN where it is undefined.
        n: Over how many responses that both judged.
    """

    subject: str
    benchmark: str
    judges: tuple[str, str]
    measure: Measure
    kappa: float
    n: int


@dataclass(frozen=True)
class EvaluationSummary:
    """Every figure of an evaluation.

    Attributes:
        subjects: The models, in the order they were evaluated.
        rates: One per subject, benchmark and judge.
        changes: Since the base model, or the first one if none is called "base".
        agreements: One per subject, benchmark and pair of judges.
        settings: What was asked: decoding, limit, seed, judges.
        notes: What was left out and why, in sentences.
        capability: Subject to task to `safesteer.evaluation.capability.Score.record()`.
        tax: Subject to `safesteer.evaluation.tax.Tax.record()`.
        skipped: Benchmark of a suite that could not be had to why, and what helps.
    """

    subjects: tuple[str, ...]
    rates: tuple[BenchmarkRates, ...]
    changes: tuple[Change, ...] = ()
    agreements: tuple[Agreement, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    capability: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tax: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    def find(self, subject: str, benchmark: str, judge: str) -> BenchmarkRates:
        """Return one entry of `rates`.

        Raises:
            KeyError: If there is none.
        """
        for entry in self.rates:
            if (entry.subject, entry.benchmark, entry.judge) == (subject, benchmark, judge):
                return entry
        raise KeyError((subject, benchmark, judge))

    def record(self) -> dict[str, Any]:
        """Return all figures as JSON has them; see the attributes. Undefined numbers become null."""
        return {"format": 1, **asdict(self)}

    def write(self, folder: Path) -> None:
        """Write `summary.json`, `summary.csv` and `summary.md`, and each subject's part as its `summary.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "summary.json", self.record())
        (folder / "summary.csv").write_text(self.csv(), encoding="utf-8")
        (folder / "summary.md").write_text(self.markdown(), encoding="utf-8")
        for subject in self.subjects:
            write_json(folder / subject / "summary.json", self._only(subject).record())

    def csv(self) -> str:
        """Return one row per subject, benchmark, judge, category ("" for all) and measure."""
        return csv_text(self)

    def markdown(self) -> str:
        """Return the tables and sentences a person reads."""
        return markdown_text(self)

    def _only(self, subject: str) -> "EvaluationSummary":
        return EvaluationSummary(
            subjects=(subject,),
            rates=tuple(entry for entry in self.rates if entry.subject == subject),
            changes=tuple(entry for entry in self.changes if entry.subject == subject),
            agreements=tuple(entry for entry in self.agreements if entry.subject == subject),
            settings=self.settings,
            notes=self.notes,
            capability={name: value for name, value in self.capability.items() if name == subject},
            tax={name: value for name, value in self.tax.items() if name == subject},
            skipped=self.skipped,
        )


Judged = Mapping[str, tuple[Sequence[Record], Mapping[str, Mapping[str, Verdict]]]]
"""Of one subject: benchmark to its records, and judge to id to verdict."""

REFERENCE = "base"
"""Since which model changes are told, if one has this name; otherwise since the first."""


def summarize(
    judged: Mapping[str, Judged], *, settings: Mapping[str, Any] | None = None, notes: Sequence[str] = ()
) -> EvaluationSummary:
    """Turn records and verdicts into figures.

    Args:
        judged: Subject to what was judged of it; all subjects with the same prompts.
        settings: Kept as they are.
        notes: Kept as they are.
    """
    subjects = tuple(judged)
    reference = REFERENCE if REFERENCE in judged else next(iter(subjects), None)
    rates, changes, agreements = [], [], []
    for subject, benchmarks in judged.items():
        for benchmark, (records, by_judge) in benchmarks.items():
            for judge, verdicts in by_judge.items():
                rates.append(_rates(subject, benchmark, judge, records, verdicts))
            agreements += _agreements(subject, benchmark, _kind(records), by_judge)
            if reference is not None and subject != reference and benchmark in judged[reference]:
                before = judged[reference][benchmark][1]
                for judge in by_judge.keys() & before.keys():
                    change = _change(
                        subject, reference, benchmark, judge, records, before[judge], by_judge[judge]
                    )
                    changes += [change] if change is not None else []
    order = {judge: place for place, judge in enumerate(dict.fromkeys(entry.judge for entry in rates))}
    changes.sort(key=lambda change: (subjects.index(change.subject), order[change.judge]))
    return EvaluationSummary(
        subjects, tuple(rates), tuple(changes), tuple(agreements), dict(settings or {}), tuple(notes)
    )


def _rates(
    subject: str, benchmark: str, judge: str, records: Sequence[Record], verdicts: Mapping[str, Verdict]
) -> BenchmarkRates:
    categories: dict[str, list[Verdict]] = {}
    for record in records:
        if record.category is not None:
            categories.setdefault(record.category, []).append(verdicts[record.id])
    return BenchmarkRates(
        subject=subject,
        benchmark=benchmark,
        kind=_kind(records),
        judge=judge,
        rates=Rates.of([verdicts[record.id] for record in records]),
        categories={name: Rates.of(found) for name, found in sorted(categories.items())},
    )


def _change(
    subject: str,
    against: str,
    benchmark: str,
    judge: str,
    records: Sequence[Record],
    before: Mapping[str, Verdict],
    after: Mapping[str, Verdict],
) -> Change | None:
    harmful = _kind(records) == "harmful"
    measure: Measure = "unsafe" if harmful else "refused"
    pairs = [(_flag(before[r.id], measure), _flag(after[r.id], measure)) for r in records if r.id in before]
    known = [(old, new) for old, new in pairs if old is not None and new is not None]
    if not known and not harmful:
        return None  # this judge does not tell refusals
    difference = paired_bootstrap([old for old, _ in known], [new for _, new in known])
    told = (
        sentence(
            f"unsafe answers to {benchmark} ({judge})", difference, higher_is="worse", concern="lost safety"
        )
        if harmful
        else sentence(
            f"refusals of {benchmark} ({judge})", difference, higher_is="worse", concern="over-refusal"
        )
    )
    return Change(subject, against, benchmark, judge, measure, difference, told)


def _agreements(
    subject: str, benchmark: str, kind: Kind, by_judge: Mapping[str, Mapping[str, Verdict]]
) -> list[Agreement]:
    found = []
    for one, other in itertools.combinations(by_judge, 2):
        # Of harmless prompts the question is who refuses; judges that do not tell are compared on safety.
        both_tell = all(
            any(v.refused is not None for v in by_judge[judge].values()) for judge in (one, other)
        )
        measure: Measure = "refused" if kind == "harmless" and both_tell else "unsafe"
        pairs = [
            (_flag(by_judge[one][name], measure), _flag(by_judge[other][name], measure))
            for name in by_judge[one]
        ]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        kappa = cohens_kappa([a for a, _ in known], [b for _, b in known])
        found.append(Agreement(subject, benchmark, (one, other), measure, kappa, len(known)))
    return found


def _flag(verdict: Verdict, measure: Measure) -> bool | None:
    if measure == "refused":
        return verdict.refused
    return None if verdict.verdict == "unparsed" else verdict.verdict == "unsafe"


def _kind(records: Sequence[Record]) -> Kind:
    return records[0].kind if records else "harmful"
