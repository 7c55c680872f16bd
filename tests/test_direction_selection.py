"""The selection rule on tables of scores, against the rule applied to all scores at once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safesteer.direction_scores import Candidate
from safesteer.direction_selection import Selection, select_candidate
from safesteer.errors import SafeSteerError
from safesteer.next_token import Progress, no_progress


@dataclass
class Table:
    """Scores written down: candidate to (induction, KL, ablation score). A vector is its candidate's name."""

    rows: dict[Candidate, tuple[float, float, float]]
    unsteered: float = -8.0
    asked: dict[str, list[Candidate]] = field(default_factory=lambda: {"kl": [], "ablation": []})

    @property
    def vectors(self) -> dict[Candidate, Tensor]:
        return {candidate: torch.tensor(candidate) for candidate in self.rows}

    def induction(self, vectors: Mapping[Candidate, Tensor], progress: Progress) -> dict[Candidate, float]:
        return {candidate: self.rows[candidate][0] for candidate in vectors}

    def kl(self, vectors: Mapping[Candidate, Tensor], progress: Progress) -> dict[Candidate, float]:
        self.asked["kl"] += vectors
        return {candidate: self.rows[candidate][1] for candidate in vectors}

    def ablation_refusal(
        self, vectors: Mapping[Candidate, Tensor], progress: Progress
    ) -> dict[Candidate, float]:
        self.asked["ablation"] += vectors
        return {candidate: self.rows[candidate][2] for candidate in vectors}


def select(
    table: Table,
    *,
    max_kl: float = 0.1,
    min_induction: float = 0.0,
    criterion: str = "ablation",
    coefficient: float = 1.0,
    relax: bool = False,
) -> Selection:
    return select_candidate(
        table,  # type: ignore[arg-type]
        table.vectors,
        {(9, -1): "layer ≥ 0.8 L"},
        max_kl=max_kl,
        min_induction=min_induction,
        criterion=criterion,
        coefficient=coefficient,
        relax=relax,
        progress=no_progress,
    )


_SCORES = st.tuples(
    st.one_of(st.floats(-3, 3), st.just(math.nan)),
    st.one_of(st.floats(0, 0.3), st.just(math.nan)),
    st.floats(-5, 5),
)


@settings(deadline=None)  # the first call is slow on a busy machine
@given(st.lists(_SCORES, min_size=1, max_size=12))
def test_the_choice_is_the_rules(scores: list[tuple[float, float, float]]) -> None:
    table = Table({(number // 3, number % 3 - 3): row for number, row in enumerate(scores)})
    passing = {
        candidate: ablation
        for candidate, (induction, kl, ablation) in table.rows.items()
        if not math.isnan(induction + kl) and kl <= 0.1 and induction >= 0
    }
    if not passing:
        with pytest.raises(SafeSteerError, match=f"of {len(scores)} scored"):
            select(table)
        return
    selection = select(table)
    assert passing[selection.chosen] == min(passing.values())
    assert selection.relaxed is None
    verdicts = {(score.layer, score.position): score.verdict for score in selection.scores}
    assert {c for c, verdict in verdicts.items() if verdict in ("selected", "eligible")} == set(passing)
    assert [c for c, verdict in verdicts.items() if verdict == "selected"] == [selection.chosen]
    assert verdicts[9, -1] == "layer ≥ 0.8 L"
    # The dear test was made on those alone that passed the cheap ones.
    assert sorted(table.asked["ablation"]) == sorted(passing)


def test_by_induction_the_strongest_that_passes_is_taken_and_nothing_is_ablated() -> None:
    table = Table({(0, -1): (0.5, 0.01, -9.0), (1, -1): (2.0, 0.01, -1.0), (2, -1): (3.0, 0.2, -9.0)})
    selection = select(table, criterion="induction")
    assert selection.chosen == (1, -1)
    assert [score.verdict for score in selection.scores][:2] == ["eligible", "selected"]
    assert table.asked["ablation"] == []


class SaturatingTable(Table):
    """Adding c times a vector adds c times its log-odds; those of layer 1 fall again past c = 1."""

    def induction(self, vectors: Mapping[Candidate, Tensor], progress: Progress) -> dict[Candidate, float]:
        scores = {}
        for (layer, position), vector in vectors.items():
            c = float(vector[1] / position)
            scores[layer, position] = self.rows[layer, position][0] * (c if layer != 1 else 2 - c)
        return scores


def test_by_induction_candidates_are_ranked_as_strongly_as_the_teacher_adds_them() -> None:
    table = SaturatingTable(
        {(0, -1): (0.5, 0.01, -9.0), (1, -1): (2.0, 0.01, -1.0), (2, -1): (-1.0, 0.01, 0.0)}
    )
    assert select(table, criterion="induction").chosen == (1, -1)
    strong = select(table, criterion="induction", coefficient=3.0)
    assert strong.chosen == (0, -1)
    # The test itself is the method's, and so is the score that is told.
    assert [(score.induction, score.verdict) for score in strong.scores][:3] == [
        (0.5, "selected"),
        (2.0, "eligible"),
        (-1.0, "induction -1 < 0"),
    ]


def test_verdicts_say_which_test_was_failed() -> None:
    table = Table(
        {
            (0, -1): (-0.25, 0.01, -9.0),
            (1, -2): (1.0, 0.21, -9.0),
            (1, -1): (0.5, 0.05, -3.0),
            (2, -2): (2.0, 0.1, -4.0),
            (2, -1): (math.nan, 0.0, -9.0),
            (3, -1): (0.0, math.nan, -9.0),
        }
    )
    selection = select(table)
    assert selection.chosen == (2, -2)
    assert [(score.layer, score.position, score.verdict) for score in selection.scores] == [
        (0, -1, "induction -0.25 < 0"),
        (1, -2, "kl 0.21 > 0.1"),
        (1, -1, "eligible"),
        (2, -2, "selected"),
        (2, -1, "not a number"),
        (3, -1, "not a number"),
        (9, -1, "layer ≥ 0.8 L"),
    ]
    by_layer = {(score.layer, score.position): score for score in selection.scores}
    assert (by_layer[2, -2].ablation_refusal, by_layer[2, -2].induction, by_layer[2, -2].kl) == (
        -4.0,
        2.0,
        0.1,
    )
    assert math.isnan(by_layer[0, -1].kl) and math.isnan(by_layer[1, -2].ablation_refusal)
    assert table.asked["kl"] == [(1, -2), (1, -1), (2, -2), (3, -1)]


def test_relaxing_asks_for_nine_tenths_of_the_best_rise() -> None:
    """The best rises by 7 to −1, and by 0.9 of that to −1.7. The strongest fails KL and does not count."""
    table = Table(
        {
            (0, -1): (-0.1, 0.2, -9.0),
            (1, -1): (-1.0, 0.05, -2.0),
            (2, -2): (-1.69, 0.05, -5.0),
            (2, -1): (-1.71, 0.05, -7.0),
            (3, -1): (-6.0, 0.0, -9.0),
        }
    )
    selection = select(table, relax=True)
    assert selection.chosen == (2, -2)
    assert selection.relaxed == (
        "no candidate with KL ≤ 0.1 reaches induction ≥ 0, so induction ≥ -1.700 was asked for: 90% of the "
        "best one's rise from -8.000 (unsteered) to -1.000, which 2 of 4 reach"
    )
    assert [score.verdict for score in selection.scores][:5] == [
        "kl 0.2 > 0.1",
        "eligible",
        "selected",
        "induction -1.71 < -1.7 (relaxed)",
        "induction -6 < -1.7 (relaxed)",
    ]


def test_without_relaxing_the_near_misses_are_told() -> None:
    table = Table({(0, -1): (0.4, 0.31, 0.0), (1, -1): (-0.14, 0.05, 0.0), (2, -1): (-3.0, 0.5, 0.0)})
    with pytest.raises(SafeSteerError) as error:
        select(table)
    assert str(error.value) == (
        "no candidate refusal direction passes: of 3 scored, 1 fail only KL ≤ 0.1, the nearest being layer 0 "
        "position -1 with induction 0.400 and KL 0.310; 1 fail only induction ≥ 0, the nearest being layer 1 "
        "position -1 with induction -0.140 and KL 0.050; 1 fail both; raise --max-kl above 0.310, or lower "
        "--min-induction to -0.141, or allow --fallback relax, or give harmful prompts that the "
        "model refuses clearly and harmless ones that it answers."
    )


def test_relaxing_needs_a_candidate_that_induces_anything() -> None:
    table = Table({(0, -1): (-8.1, 0.05, 0.0), (1, -1): (-9.0, 0.0, 0.0)})
    with pytest.raises(
        SafeSteerError, match=r"where adding nothing has induction -8\.000; give harmful prompts"
    ):
        select(table, relax=True)


def test_relaxing_does_not_relax_kl() -> None:
    table = Table({(0, -1): (-1.0, 0.2, 0.0), (1, -1): (-2.0, 0.15, 0.0)})
    with pytest.raises(
        SafeSteerError, match=r"2 fail both; the nearest being layer 1 .*raise --max-kl above 0\.150"
    ):
        select(table, relax=True)


def test_an_ablation_score_that_is_no_number() -> None:
    table = Table({(0, -1): (1.0, 0.0, math.nan), (1, -1): (1.0, 0.0, math.nan)})
    with pytest.raises(SafeSteerError, match="all 2 candidate directions .* not a number"):
        select(table)
    table.rows[2, -1] = (1.0, 0.0, 4.0)
    assert select(table).chosen == (2, -1)
