"""The inverse of a distribution function over a vocabulary, against cumulative sums in float64."""

import math

import pytest
import torch

from safesteer.sampling import SeededSampling, inverse_distribution


@pytest.mark.parametrize("size", [5, 128, 1_000, 30_011])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_cumulative_distributions_inverse(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    logits = (3 * torch.randn(64, size)).to(dtype)
    logits[:, ::7] = -math.inf
    uniform = torch.rand(64, 1, dtype=torch.float64)
    terms = logits.double().softmax(-1)
    cumulative = terms.cumsum(-1)
    found = inverse_distribution(logits, uniform)
    before = torch.where(found > 0, cumulative.gather(1, (found - 1).clamp(min=0)), 0.0)
    # A single exponential in float32 is wrong by 1e-7 of itself.
    assert (before - 1e-6 <= uniform).all()
    assert (uniform <= cumulative.gather(1, found) + 1e-6).all()
    assert (terms.gather(1, found) > 0).all()


def test_the_ends_of_the_unit_interval_fall_on_possible_tokens() -> None:
    logits = torch.full((2, 300), -math.inf)
    logits[:, 130] = 1.0
    logits[:, 140] = -3.0
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    assert inverse_distribution(logits, ends).flatten().tolist() == [130, 140]


def test_nan_logits_give_some_token() -> None:
    sampled = SeededSampling([0, 1], 1.0)(torch.zeros(2, 1), torch.full((2, 300), math.nan))
    assert (sampled == 0).sum(-1).tolist() == [1, 1]


def test_shares_are_the_distributions() -> None:
    draws = 4_000
    logits = torch.linspace(-2, 2, 200)
    scores = SeededSampling([f"{row}" for row in range(draws)], 0.5)(
        torch.zeros(draws, 1), logits.expand(draws, -1)
    )
    share = torch.bincount(scores.argmax(-1), minlength=200) / draws
    expected = (logits / 0.5).softmax(-1)
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / draws).sqrt() + 2 / draws).all()


def test_a_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(3)
    scores = torch.randn(4, 500)
    together = SeededSampling(range(4), 0.7)(torch.zeros(4, 1), scores)
    alone = [SeededSampling([row], 0.7)(torch.zeros(1, 1), scores[row : row + 1]) for row in range(4)]
    assert torch.equal(together, torch.cat(alone))
