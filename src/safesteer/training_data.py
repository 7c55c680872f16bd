"""Which prompts make up each optimizer step, fixed before training starts, and which response tokens count.

The order is part of a run's definition: every step holds the same number of harmless anchors, and a resumed
run must see the prompts the interrupted one would have seen. So the whole run is laid out as one dataset,
step after step, and the trainer reads it in order (`shuffle_dataset=False`).
"""

import math
import random
from collections.abc import Iterator, Sequence

import torch
from datasets import Dataset
from torch import Tensor

from safesteer.errors import SafeSteerError


def anchors_per_step(batch_size: int, anchor_fraction: float) -> int:
    """Count the harmless anchors in each optimizer step: `batch_size · anchor_fraction`, rounded to nearest.

    Raises:
        SafeSteerError: If the fraction is outside [0, 1) or leaves no room for a harmful prompt.
    """
    if not 0.0 <= anchor_fraction < 1.0:
        raise SafeSteerError(
            f"anchor_fraction is {anchor_fraction:g}, but it is the share of harmless prompts in a step and "
            "must be at least 0 and below 1; 0.5 makes half of each step anchors."
        )
    anchors = math.floor(batch_size * anchor_fraction + 0.5)
    if anchors >= batch_size:
        raise SafeSteerError(
            f"anchor_fraction {anchor_fraction:g} of {batch_size} prompts a step leaves no harmful prompt; "
            "lower it or raise the prompts per step."
        )
    return anchors


def number_of_steps(harmful: int, batch_size: int, anchor_fraction: float, epochs: float) -> int:
    """Count the optimizer steps of `epochs` passes over the harmful prompts, the last step filled up.

    One epoch over 100 harmful prompts at 32 a step is 4 steps (method §4).
    """
    per_step = batch_size - anchors_per_step(batch_size, anchor_fraction)
    # The slack keeps 3 epochs of 32 prompts at 3 steps when epochs is a float such as 0.1 · 30.
    return max(1, math.ceil(harmful * epochs / per_step - 1e-9))


def arrange_training_prompts(
    harmful: Sequence[str],
    harmless: Sequence[str] | None,
    *,
    batch_size: int,
    anchor_fraction: float,
    steps: int,
    seed: int,
) -> Dataset:
    """Lay a run's prompts out in optimizer steps.

    Harmful and harmless prompts are each drawn in passes, a new random order every pass, so that no prompt is
    used a second time before all were used once. Within a step the two kinds are mixed.

    Args:
        harmful: The prompts to align on.
        harmless: The anchors' prompts; may be None when `anchor_fraction` gives no anchors.
        batch_size: Prompts per optimizer step, over all processes and accumulation steps.
        anchor_fraction: Share of each step that is harmless anchors.
        steps: Number of optimizer steps.
        seed: Same seed, same order. A longer run begins with a shorter one's steps.

    Returns:
        `steps · batch_size` rows with "prompt" (str) and "steered" (bool; False for anchors).

    Raises:
        SafeSteerError: If there are no harmful prompts, or anchors are asked for without harmless prompts.
    """
    anchors = anchors_per_step(batch_size, anchor_fraction)
    if not harmful:
        raise SafeSteerError(
            "there are no harmful prompts to train on; give at least one, better about a hundred."
        )
    if anchors and not harmless:
        raise SafeSteerError(
            f"anchor_fraction {anchor_fraction:g} asks for {anchors} harmless prompts a step but none were "
            "given; give harmless prompts or set anchor_fraction to 0."
        )
    harmful_stream = _passes(harmful, random.Random(f"{seed}/harmful"))
    harmless_stream = _passes(harmless or (), random.Random(f"{seed}/harmless"))
    mixing = random.Random(f"{seed}/mixing")
    rows: list[tuple[str, bool]] = []
    for _ in range(steps):
        step = [(next(harmful_stream), True) for _ in range(batch_size - anchors)]
        step += [(next(harmless_stream), False) for _ in range(anchors)]
        mixing.shuffle(step)
        rows += step
    return Dataset.from_dict(
        {"prompt": [prompt for prompt, _ in rows], "steered": [steered for _, steered in rows]}
    )


def counted_tokens(completion_mask: Tensor, first_tokens: int | None, skip_tokens: int) -> Tensor:
    """Choose the response tokens that the loss counts.

    Args:
        completion_mask: [B, C], 1 for response tokens (the end-of-turn token included).
        first_tokens: Count only tokens before this position, if given.
        skip_tokens: Count only tokens from this position on.

    Returns:
        [B, C] bool.
    """
    position_C = torch.arange(completion_mask.size(1), device=completion_mask.device)
    last = completion_mask.size(1) if first_tokens is None else first_tokens
    return completion_mask.bool() & (position_C >= skip_tokens) & (position_C < last)


def without_padding(
    prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Drop columns that are padding in every row: a microbatch is padded to its whole step's longest row.

    Args:
        prompt_ids: [B, P], left padded.
        prompt_mask: [B, P].
        completion_ids: [B, C], right padded.
        completion_mask: [B, C].

    Returns:
        The same four, narrower.
    """
    prompt_length = int(prompt_mask.sum(dim=1).max())
    completion_length = int(completion_mask.sum(dim=1).max())
    return (
        prompt_ids[:, -prompt_length:],
        prompt_mask[:, -prompt_length:],
        completion_ids[:, :completion_length],
        completion_mask[:, :completion_length],
    )


def _passes(prompts: Sequence[str], generator: random.Random) -> Iterator[str]:
    """Yield the prompts for ever, reshuffled for every pass."""
    while True:
        order = list(prompts)
        generator.shuffle(order)
        yield from order
