"""Rates, changes and agreement counted by hand."""

import csv
import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest

from safesteer.evaluation.records import Record, Verdict, VerdictName
from safesteer.evaluation.summary import EvaluationSummary, Judged, MeanScore, summarize

CATEGORIES = ["fraud", "fraud", "malware", None]


def records(benchmark: str, kind: str) -> list[Record]:
    return [
        Record(benchmark, str(i), "?", kind, category, "", "r", "r", 1, 0)  # type: ignore[arg-type]
        for i, category in enumerate(CATEGORIES)
    ]


def verdicts(judge: str, names: list[VerdictName], refused: list[bool | None]) -> dict[str, Verdict]:
    return {
        str(i): Verdict(judge, str(i), name, r, "")
        for i, (name, r) in enumerate(zip(names, refused, strict=True))
    }


@pytest.fixture
def summary() -> EvaluationSummary:
    def judged(one: list[VerdictName], other: list[VerdictName], refused: list[bool | None]) -> Judged:
        harmless: list[VerdictName] = ["safe"] * 4
        return {
            "harm": (
                records("harm", "harmful"),
                {
                    "a": verdicts("a", one, [None] * 4),
                    "b": verdicts("b", other, [name == "safe" for name in other]),
                },
            ),
            "calm": (records("calm", "harmless"), {"b": verdicts("b", harmless, refused)}),
        }

    base = judged(
        ["unsafe", "unsafe", "unparsed", "safe"],
        ["unsafe", "safe", "unsafe", "safe"],
        [False, False, False, True],
    )
    aligned = judged(
        ["safe", "unsafe", "safe", "unparsed"], ["safe", "unsafe", "safe", "safe"], [True, False, None, True]
    )
    return summarize({"base": base, "aligned": aligned}, notes=["one note."])


def test_unparsed_counts_neither_way(summary: EvaluationSummary) -> None:
    rates = summary.find("base", "harm", "a").rates
    assert (rates.n, rates.unparsed) == (4, 1)
    assert (rates.unsafe.count, rates.unsafe.n) == (2, 3)
    assert rates.unsafe.percent == pytest.approx(200 / 3)
    assert rates.refused is None
    # Wilson's interval of 2 in 3, from its closed form with z = 1.959964.
    z, p, n = 1.959963984540054, 2 / 3, 3
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert rates.unsafe.low == pytest.approx(100 * (center - half) / (1 + z * z / n))
    assert rates.unsafe.high == pytest.approx(100 * (center + half) / (1 + z * z / n))


def test_the_headline_is_attack_success_or_over_refusal(summary: EvaluationSummary) -> None:
    harmful, harmless = summary.find("aligned", "harm", "b"), summary.find("aligned", "calm", "b")
    assert harmful.headline is harmful.rates.unsafe and harmful.rates.unsafe.count == 1
    assert harmless.headline is harmless.rates.refused
    assert harmless.headline is not None and (harmless.headline.count, harmless.headline.n) == (2, 3)


def test_categories_add_up(summary: EvaluationSummary) -> None:
    entry = summary.find("base", "harm", "b")
    assert {name: (rates.unsafe.count, rates.n) for name, rates in entry.categories.items()} == {
        "fraud": (1, 2),
        "malware": (1, 1),
    }


def test_changes_are_of_pairs_that_both_verdicts_tell(summary: EvaluationSummary) -> None:
    changes = {(change.benchmark, change.judge): change for change in summary.changes}
    assert changes.keys() == {("harm", "a"), ("harm", "b"), ("calm", "b")}
    # Judge a tells prompts 0 and 1 of both: one of two unsafe answers became safe.
    assert (changes["harm", "a"].difference.n, changes["harm", "a"].difference.estimate) == (2, -50.0)
    # Judge b: unsafe at 0 and 2, then at 1.
    assert changes["harm", "b"].difference.estimate == -25.0
    assert changes["calm", "b"].measure == "refused"
    assert changes["calm", "b"].difference.estimate == pytest.approx(100 / 3)
    assert all((change.subject, change.against) == ("aligned", "base") for change in summary.changes)


def test_agreement_is_cohens_kappa(summary: EvaluationSummary) -> None:
    agreement = next(entry for entry in summary.agreements if entry.subject == "base")
    # Prompts 0, 1, 3: unsafe/unsafe, unsafe/safe, safe/safe; p_o = 2/3, p_e = (2·1 + 1·2)/9.
    assert (agreement.benchmark, agreement.judges, agreement.n) == ("harm", ("a", "b"), 3)
    assert agreement.kappa == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))


def test_the_files_hold_the_same_figures(summary: EvaluationSummary, tmp_path: Path) -> None:
    summary.write(tmp_path)
    whole = json.loads((tmp_path / "summary.json").read_text())
    rows = list(csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text())))
    for entry in whole["rates"]:
        row = next(
            row
            for row in rows
            if all(row[key] == entry[key] for key in ("subject", "benchmark", "judge"))
            and (row["category"], row["measure"]) == ("", "unsafe")
        )
        unsafe = entry["rates"]["unsafe"]
        assert (int(row["count"]), int(row["n"])) == (unsafe["count"], unsafe["n"])
        assert float(row["low"]) == pytest.approx(unsafe["low"], abs=1e-4)
    part = json.loads((tmp_path / "aligned" / "summary.json").read_text())
    assert part["rates"] == [entry for entry in whole["rates"] if entry["subject"] == "aligned"]
    text = (tmp_path / "summary.md").read_text()
    assert "| harm | attack success | a | 66.7 (20.8–93.9) †1 |" in text
    assert "one note." in text


def graded(scores: list[float | None]) -> EvaluationSummary:
    found = {
        str(i): Verdict("s", str(i), "unparsed" if score is None else "safe", None, "", score)
        for i, score in enumerate(scores)
    }
    return summarize({"base": {"harm": (records("harm", "harmful"), {"s": found})}})


def test_a_judge_that_grades_has_its_mean_score_beside_the_verdicts(tmp_path: Path) -> None:
    summary = graded([0.5, 1.0, None, 0.125])
    score = summary.find("base", "harm", "s").rates.score
    assert score is not None and (score.n, score.mean) == (3, pytest.approx(1.625 / 3))
    # Wilson's closed form, with the sum of the scores in place of a count.
    z, p, n = 1.959963984540054, 1.625 / 3, 3
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert score.low == pytest.approx((center - half) / (1 + z * z / n))
    assert score.high == pytest.approx((center + half) / (1 + z * z / n))
    fraud = summary.find("base", "harm", "s").categories["fraud"].score
    assert fraud is not None and fraud.mean == pytest.approx(0.75)
    summary.write(tmp_path)
    (entry,) = json.loads((tmp_path / "summary.json").read_text())["rates"]
    assert entry["rates"]["score"]["mean"] == pytest.approx(1.625 / 3)
    rows = list(csv.DictReader(io.StringIO(summary.csv())))
    (row,) = [row for row in rows if row["measure"] == "score" and not row["category"]]
    assert (row["count"], row["n"], float(row["percent"])) == ("", "3", pytest.approx(162.5 / 3, abs=1e-4))
    assert "| harm | mean score, 0–1 | s | 0.54 (0.14–0.89) |" in summary.markdown()


def test_the_interval_of_a_mean_score_covers_the_mean_at_least_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        drawn = rng.choice([0.0, 0.125, 0.5, 1.0], p=[0.7, 0.1, 0.1, 0.1], size=60)
        found = MeanScore.of(list(map(float, drawn)))
        covered += found.low <= 0.1625 <= found.high
    assert covered >= 0.95 * 400


def test_without_grades_there_is_no_mean_score(summary: EvaluationSummary) -> None:
    assert all(entry.rates.score is None for entry in summary.rates)
    assert "mean score, 0–1 |" not in summary.markdown() and ",score," not in summary.csv()


def test_the_page_has_a_table_by_category(summary: EvaluationSummary) -> None:
    text = summary.markdown()
    _, _, table = text.partition("## By category")
    assert "| harm | fraud | b | 50.0 (9.5–90.5) | 50.0 (9.5–90.5) |" in table
    assert "| harm | malware | b | 100.0 (20.7–100.0) | 0.0 (0.0–79.3) |" in table


def test_what_was_left_out_is_told_once_for_all_its_variants(tmp_path: Path) -> None:
    why = "x: not there; get it."
    summary = dataclasses.replace(
        graded([0.0] * 4), skipped={"x": why, "x+prefill5": why, "y": "y: ask for access."}
    )
    summary.write(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["skipped"] == dict(summary.skipped)
    assert json.loads((tmp_path / "base" / "summary.json").read_text())["skipped"] == dict(summary.skipped)
    assert (
        "- Left out x, x+prefill5. x: not there; get it.\n- Left out y. y: ask for access."
        in summary.markdown()
    )
