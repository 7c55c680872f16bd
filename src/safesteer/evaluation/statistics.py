"""How sure a number is: Wilson intervals, the paired bootstrap, Cohen's kappa, and a sentence for each."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np

# A smaller effect than this, in points, is not worth a warning that too few prompts were asked.
_WORTH_RULING_OUT = 5.0


class Interval(NamedTuple):
    """A confidence interval of a proportion, both ends in [0, 1]."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """After minus before, in percentage points.

    Attributes:
        estimate: The observed difference.
        low: Lower end of its confidence interval.
        high: Upper end.
        n: How many pairs it rests on.
        confidence: Of the interval.
    """

    estimate: float
    low: float
    high: float
    n: int
    confidence: float = 0.95

    @property
    def is_certain(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Return Wilson's score interval of a proportion (Wilson 1927, JASA 22:209).

    Unlike the normal approximation it stays within [0, 1] and keeps its coverage near 0 and 1, where attack
    success rates and over-refusals lie.

    Args:
        successes: How many of the trials; of scores between 0 and 1 their sum, for which the interval is on the wide
            side, because such scores vary no more than yes and no with the same mean.
        n: How many trials; 0 gives [0, 1], because nothing is known.
        confidence: Such as 0.95.

    Raises:
        ValueError: If `successes` is not between 0 and `n`, or `confidence` not between 0 and 1.
    """
    _check_confidence(confidence)
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials")
    if n == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Exact at the ends, where rounding would leave 1e-17 or 1 - 1e-16.
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == n else min(1.0, center + half)
    return Interval(low, high)


def paired_bootstrap(
    before: Sequence[bool],
    after: Sequence[bool],
    *,
    draws: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Difference:
    """Estimate the change of a rate over the same prompts, with a percentile bootstrap interval over prompts.

    A pair contributes −1, 0 or +1, so that resampling the pairs is a draw of three counts from a multinomial
    distribution: the same distribution as resampling one by one, at a cost that does not grow with `n`.

    Where all pairs contribute the same, no resample differs from another. The interval then reaches as far as
    the Clopper–Pearson bound of the contributions that did not occur, 1 − (α/2)^(1/n), so that "no change in
    20 prompts" is not told as certainty.

    Args:
        before: A flag per prompt, such as whether it was refused.
        after: The flags of the same prompts in the same order.
        draws: How many resamples.
        seed: Of the resampling; the global random state is left alone.
        confidence: Such as 0.95.

    Returns:
        The difference in points; NaN with the interval −100 to 100 if there is no pair.

    Raises:
        ValueError: If the sequences differ in length, or `draws` or `confidence` make no sense.
    """
    _check_confidence(confidence)
    if len(before) != len(after):
        raise ValueError(f"{len(before)} prompts before and {len(after)} after are no pairs")
    if draws < 1:
        raise ValueError(f"{draws} draws")
    n = len(before)
    if n == 0:
        return Difference(math.nan, -100.0, 100.0, 0, confidence)
    rose = sum(1 for old, new in zip(before, after, strict=True) if new and not old)
    fell = sum(1 for old, new in zip(before, after, strict=True) if old and not new)
    estimate = 100 * (rose - fell) / n
    if max(rose, fell, n - rose - fell) == n:
        unseen = 100 * (1 - ((1 - confidence) / 2) ** (1 / n))
        low, high = max(-100.0, estimate - unseen), min(100.0, estimate + unseen)
        return Difference(estimate, low, high, n, confidence)
    shares = np.array([rose, fell, n - rose - fell]) / n
    counts = np.random.default_rng(seed).multinomial(n, shares, size=draws)
    resampled = 100 * (counts[:, 0] - counts[:, 1]) / n
    tail = (1 - confidence) / 2
    low, high = (float(bound) for bound in np.quantile(resampled, [tail, 1 - tail]))
    return Difference(estimate, low, high, n, confidence)


def cohens_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """Return the agreement of two judges beyond chance (Cohen 1960): (p_o − p_e) / (1 − p_e).

    Args:
        a: One judge's verdict per record.
        b: The other's, of the same records in the same order.

    Returns:
        1 for full agreement, 0 for what chance would give; NaN where it is undefined: no record, or both judges
        say the same of every record.

    Raises:
        ValueError: If the sequences differ in length.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} verdicts are not of the same records")
    n = len(a)
    if n == 0:
        return math.nan
    agreed = sum(1 for one, other in zip(a, b, strict=True) if one == other)
    of_a, of_b = Counter(a), Counter(b)
    # In integers, so that "undefined" is exact.
    by_chance = sum(count * of_b[label] for label, count in of_a.items())
    if by_chance == n * n:
        return math.nan
    return (agreed * n - by_chance) / (n * n - by_chance)


def sentence(
    name: str,
    difference: Difference,
    *,
    higher_is: Literal["worse", "better"],
    concern: str = "harm",
    gain: str = "improvement",
) -> str:
    """Say in plain words what a difference shows and what it does not.

    Args:
        name: What was counted, in the plural: "harmless refusals".
        difference: Of its rate, after minus before.
        higher_is: Whether a rise of the rate is bad or good news.
        concern: What the bad direction would be evidence of: "over-refusal".
        gain: What the good direction would be evidence of.

    Returns:
        Such as "harmless refusals rose by 0.4 points, 95 % interval −0.6 to 1.5: no evidence of over-refusal".
        Where so few prompts were asked that a change for the worse of more than 5 points stays possible, the
        sentence says so.
    """
    if difference.n == 0:
        return f"{name}: no prompt was answered both before and after, so nothing can be said"
    estimate = round(difference.estimate, 1)
    direction = "rose" if estimate > 0 else "fell"
    change = f"{direction} by {points(abs(estimate))}" if estimate else "did not change"
    confidence = f"{100 * difference.confidence:g} %"
    interval = f"{confidence} interval {signed(difference.low)} to {signed(difference.high)}"
    worsening = difference.high if higher_is == "worse" else -difference.low
    if difference.is_certain:
        went_worse = (difference.estimate > 0) == (higher_is == "worse")
        finding = f"evidence of {concern if went_worse else gain}"
    else:
        finding = f"no evidence of {concern}"
        if worsening > _WORTH_RULING_OUT:
            finding += f", but {difference.n} prompts cannot rule out {points(worsening)}"
    return f"{name} {change}, {interval}: {finding}"


def points(value: float) -> str:
    """Write a number of percentage points: "1.0 point", "0.4 points"."""
    return f"{value:.1f} point{'' if f'{value:.1f}' == '1.0' else 's'}"


def signed(value: float) -> str:
    """Write a number with one decimal and a minus sign proper; never "−0.0"."""
    text = f"{abs(value):.1f}"
    return f"−{text}" if value < 0 and text != "0.0" else text


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence}")
