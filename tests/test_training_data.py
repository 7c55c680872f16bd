"""The prompts of each optimizer step, and the response tokens that count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safesteer.errors import SafeSteerError
from safesteer.training_data import (
    anchors_per_step,
    arrange_training_prompts,
    counted_tokens,
    number_of_steps,
    without_padding,
)

HARMFUL = [f"harmful {i}" for i in range(10)]
HARMLESS = [f"harmless {i}" for i in range(7)]


@pytest.mark.parametrize(
    ("batch_size", "fraction", "anchors"),
    [(32, 0.5, 16), (32, 0.0, 0), (4, 0.3, 1), (5, 0.5, 3), (3, 0.1, 0)],
)
def test_anchors_are_the_rounded_share_of_a_step(batch_size: int, fraction: float, anchors: int) -> None:
    assert anchors_per_step(batch_size, fraction) == anchors


@pytest.mark.parametrize(
    ("batch_size", "fraction"), [(4, 1.0), (4, -0.1), (1, 0.5), (4, 0.9), (4, float("nan"))]
)
def test_a_step_needs_a_harmful_prompt(batch_size: int, fraction: float) -> None:
    with pytest.raises(SafeSteerError, match="anchor_fraction"):
        anchors_per_step(batch_size, fraction)


@pytest.mark.parametrize(
    ("harmful", "batch_size", "fraction", "epochs", "steps"),
    [
        (100, 32, 0.0, 1, 4),
        (96, 32, 0.0, 1, 3),
        (100, 32, 0.5, 1, 7),
        (32, 32, 0.0, 0.1 * 30, 3),
        (5, 32, 0.0, 1, 1),
    ],
)
def test_steps_of_some_epochs(
    harmful: int, batch_size: int, fraction: float, epochs: float, steps: int
) -> None:
    assert number_of_steps(harmful, batch_size, fraction, epochs) == steps


@settings(max_examples=40, deadline=None)
@given(
    batch_size=st.integers(1, 12),
    fraction=st.floats(0, 0.8),
    steps=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_every_step_has_the_same_composition_and_every_pass_every_prompt(
    batch_size: int, fraction: float, steps: int, seed: int
) -> None:
    try:
        anchors = anchors_per_step(batch_size, fraction)
    except SafeSteerError:
        return
    data = arrange_training_prompts(
        HARMFUL, HARMLESS, batch_size=batch_size, anchor_fraction=fraction, steps=steps, seed=seed
    )
    rows = list(zip(data["prompt"], data["steered"], strict=True))
    assert len(rows) == steps * batch_size
    for start in range(0, len(rows), batch_size):
        assert sum(not steered for _, steered in rows[start : start + batch_size]) == anchors
    for kind, pool in ((True, HARMFUL), (False, HARMLESS)):
        used = [prompt for prompt, steered in rows if steered == kind]
        assert set(used) <= set(pool)
        counts = [used.count(prompt) for prompt in pool]
        assert max(counts) - min(counts) <= 1


def test_same_seed_same_order_and_a_longer_run_continues_a_shorter_one() -> None:
    def rows(steps: int, seed: int) -> list[str]:
        data = arrange_training_prompts(
            HARMFUL, HARMLESS, batch_size=4, anchor_fraction=0.5, steps=steps, seed=seed
        )
        return list(data["prompt"])

    assert rows(20, 0)[: 4 * 9] == rows(9, 0)
    assert rows(20, 0) != rows(20, 1)


def test_every_pass_has_a_new_order() -> None:
    data = arrange_training_prompts(HARMFUL, None, batch_size=10, anchor_fraction=0, steps=3, seed=0)
    first, second, third = (tuple(data["prompt"][start : start + 10]) for start in (0, 10, 20))
    assert set(first) == set(second) == set(third) == set(HARMFUL)
    assert len({first, second, third}) == 3


def test_missing_prompts_are_named() -> None:
    with pytest.raises(SafeSteerError, match="no harmful prompts"):
        arrange_training_prompts([], HARMLESS, batch_size=4, anchor_fraction=0, steps=1, seed=0)
    with pytest.raises(SafeSteerError, match="2 harmless prompts a step"):
        arrange_training_prompts(HARMFUL, None, batch_size=4, anchor_fraction=0.5, steps=1, seed=0)


@pytest.mark.parametrize(
    ("first", "skip", "expected"),
    [
        (None, 0, [[1, 1, 1, 0], [1, 0, 0, 0]]),
        (2, 0, [[1, 1, 0, 0], [1, 0, 0, 0]]),
        (None, 1, [[0, 1, 1, 0], [0, 0, 0, 0]]),
        (2, 1, [[0, 1, 0, 0], [0, 0, 0, 0]]),
        (9, 0, [[1, 1, 1, 0], [1, 0, 0, 0]]),
    ],
)
def test_counted_tokens(first: int | None, skip: int, expected: list[list[int]]) -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    assert torch.equal(counted_tokens(mask, first, skip), torch.tensor(expected).bool())


def test_common_padding_is_dropped_and_nothing_else() -> None:
    prompt_ids = torch.tensor([[0, 0, 5, 6], [0, 7, 8, 9]])
    completion_ids = torch.tensor([[1, 2, 0, 0], [3, 0, 0, 0]])
    prompt_mask, completion_mask = (prompt_ids > 0).long(), (completion_ids > 0).long()
    narrow = without_padding(prompt_ids, prompt_mask, completion_ids, completion_mask)
    assert [tensor.tolist() for tensor in narrow] == [
        [[0, 5, 6], [7, 8, 9]],
        [[0, 1, 1], [1, 1, 1]],
        [[1, 2], [3, 0]],
        [[1, 1], [1, 0]],
    ]
