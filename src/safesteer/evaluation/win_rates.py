"""Win rates from pairwise preferences, plain and corrected for the length of the answers (see `alpaca_eval`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from safesteer.errors import SafeSteerError, one_line
from safesteer.evaluation.pairwise_judge import Comparison
from safesteer.evaluation.statistics import Difference

Floats = NDArray[np.float64]

_RIDGE = 0.01
_DRAWS = 1000


@dataclass(frozen=True)
class AlpacaEvalScore:
    """The result of AlpacaEval 2.

    Attributes:
        win_rate: Mean preference, in percent.
        win_rate_low: Lower end of its 95 % bootstrap interval over instructions.
        win_rate_high: Upper end.
        length_controlled: The length-controlled win rate, in percent.
        length_controlled_low: Lower end of its 95 % bootstrap interval.
        length_controlled_high: Upper end.
        length_effect: φ: how much the judge's log-odds gain from greater length.
        mean_length: Of the model's answers, in characters.
        mean_reference_length: Of the reference's.
        n: Instructions with a verdict.
        unparsed: Instructions whose verdict could not be read; they count in no rate.
        judge: The judge's model and server.
        notes: How this differs from the leaderboard.
        comparisons: All of them; for paired comparisons of models.
    """

    win_rate: float
    win_rate_low: float
    win_rate_high: float
    length_controlled: float
    length_controlled_low: float
    length_controlled_high: float
    length_effect: float
    mean_length: float
    mean_reference_length: float
    n: int
    unparsed: int
    judge: str
    notes: str
    comparisons: tuple[Comparison, ...] = field(repr=False)


def win_rates(
    comparisons: Sequence[Comparison], difficulty: Floats | None = None, *, judge: str = "", seed: int = 0
) -> AlpacaEvalScore:
    """Compute the plain and the length-controlled win rate.

    Args:
        comparisons: One per instruction.
        difficulty: γ by the instruction's number (the comparison's id); None leaves ψ γ out.
        judge: For the record.
        seed: Of the bootstrap.

    Raises:
        SafeSteerError: If no comparison could be read.
    """
    judged = [comparison for comparison in comparisons if comparison.preference is not None]
    if not judged:
        raise SafeSteerError(
            f"the judge {judge} answered none of {len(comparisons)} comparisons with m or M, but with "
            f"{one_line(Exception(comparisons[0].raw), 80)!r}; choose another judge."
        )
    features, p = _data(judged, difficulty)
    theta = fit_preferences(features, p)
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(p), size=(_DRAWS, len(p)))
    plain = np.quantile(p[draws].mean(axis=1), (0.025, 0.975))
    controlled = [_length_controlled(features[rows], p[rows], theta) for rows in draws]
    low, high = np.quantile(controlled, (0.025, 0.975))
    fit = "length_controlled_minimal" if difficulty is None else "length_controlled_noreg"
    return AlpacaEvalScore(
        win_rate=100 * float(p.mean()),
        win_rate_low=100 * float(plain[0]),
        win_rate_high=100 * float(plain[1]),
        length_controlled=100 * _at_equal_length(features, theta),
        length_controlled_low=100 * float(low),
        length_controlled_high=100 * float(high),
        length_effect=float(theta[1]),
        mean_length=math.fsum(len(c.output) for c in judged) / len(judged),
        mean_reference_length=math.fsum(c.reference_length for c in judged) / len(judged),
        n=len(judged),
        unparsed=len(comparisons) - len(judged),
        judge=judge,
        notes=f"alpaca_eval's {fit} with a weak L2 penalty; not the leaderboard's length_controlled_v1",
        comparisons=tuple(comparisons),
    )


def length_controlled_change(
    before: Sequence[Comparison],
    after: Sequence[Comparison],
    difficulty: Floats | None = None,
    *,
    seed: int = 0,
) -> Difference:
    """Estimate the change of the length-controlled win rate by a paired bootstrap over instructions.

    Every resample is of instructions, the same ones for both models, each of which is fitted anew. Where no resample
    differs from another the interval is widened as `paired_bootstrap` does it.

    Args:
        before: One model's comparisons.
        after: The other's, under the same judge; those that only one of the two has a verdict on are left out.
        difficulty: As for `win_rates`.
        seed: Of the bootstrap.

    Returns:
        The difference in points; NaN with the interval −100 to 100 if no instruction has both verdicts.
    """
    newer = {comparison.id: comparison for comparison in after if comparison.preference is not None}
    pairs = [(old, newer[old.id]) for old in before if old.preference is not None and old.id in newer]
    n = len(pairs)
    if not n:
        return Difference(math.nan, -100.0, 100.0, 0)
    models = [_data([pair[place] for pair in pairs], difficulty) for place in (0, 1)]
    starts = [fit_preferences(features, p) for features, p in models]

    def change(rows: NDArray[np.int64]) -> float:
        old, new = (
            _length_controlled(features[rows], p[rows], start)
            for (features, p), start in zip(models, starts, strict=True)
        )
        return 100 * (new - old)

    estimate = change(np.arange(n))
    draws = np.random.default_rng(seed).integers(n, size=(_DRAWS, n))
    low, high = (float(bound) for bound in np.quantile([change(rows) for rows in draws], (0.025, 0.975)))
    if high - low < 1e-6:
        unseen = 100 * (1 - 0.025 ** (1 / n))
        low, high = max(-100.0, estimate - unseen), min(100.0, estimate + unseen)
    return Difference(estimate, low, high, n)


def fit_preferences(features: Floats, preferences: Floats, start: Floats | None = None) -> Floats:
    """Fit a logistic regression to preferences between 0 and 1 by Newton's method.

    Minimises `−Σ [p log q + (1−p) log(1−q)] + 0.005 |w|²` with `q = logistic(features · w)`: C = 100 in
    scikit-learn's terms. The penalty only matters where the data are separable.

    Args:
        features: [N, D].
        preferences: `p`, [N].
        start: Where to begin, [D].

    Returns:
        `w`, [D].
    """
    w = np.zeros(features.shape[1]) if start is None else start.copy()

    def loss(weights: Floats) -> float:
        z = features @ weights
        return float(np.sum(np.logaddexp(0, z) - preferences * z) + _RIDGE / 2 * weights @ weights)

    for _ in range(100):
        q = _logistic(features @ w)
        gradient = features.T @ (q - preferences) + _RIDGE * w
        hessian = (features * (q * (1 - q))[:, None]).T @ features + _RIDGE * np.eye(len(w))
        step = np.linalg.solve(hessian, gradient)
        size, before = 1.0, loss(w)
        while size > 1e-6 and loss(w - size * step) > before:
            size /= 2
        w = w - size * step
        if float(np.abs(gradient).max()) < 1e-9:
            break
    return w


def _data(judged: Sequence[Comparison], difficulty: Floats | None) -> tuple[Floats, Floats]:
    """Return the features, [N, 2] or [N, 3], and the preferences, [N]."""
    p = np.array([comparison.preference for comparison in judged], dtype=np.float64)
    delta = np.array([len(c.output) - c.reference_length for c in judged], dtype=np.float64)
    gamma = None if difficulty is None else difficulty[[int(c.id) for c in judged]]
    return _features(delta, gamma), p


def _length_controlled(features: Floats, preferences: Floats, start: Floats) -> float:
    """Fit and return the win rate at equal length, 0 to 1."""
    return _at_equal_length(features, fit_preferences(features, preferences, start))


def _features(delta: Floats, gamma: Floats | None) -> Floats:
    """Stack 1, tanh(Δ / sd Δ) and γ: [N, 2] or [N, 3]."""
    spread = float(delta.std(ddof=1)) if len(delta) > 1 else 0.0
    lengths = np.tanh(delta / spread) if spread > 0 else np.zeros_like(delta)
    return np.stack([np.ones_like(delta), lengths, *([] if gamma is None else [gamma])], axis=1)


def _at_equal_length(features: Floats, w: Floats) -> float:
    level = features.copy()
    level[:, 1] = 0.0
    return float(_logistic(level @ w).mean())


def _logistic(z: Floats) -> Floats:
    return np.asarray(np.exp(-np.logaddexp(0, -z)))
