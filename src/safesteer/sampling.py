"""Sampling every response from a seed of its own, so that it does not depend on the batch it was made in."""

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

Seed = int | str
_BLOCK = 128  # tokens


class SeededSampling(LogitsProcessor):
    """Samples every row from its own seed.

    One uniform number per row and step, put through the inverse of the distribution function; all other tokens
    are ruled out, so that greedy decoding takes the sampled one. Without sampling's random number per token of the
    vocabulary it is several times faster than `torch.multinomial` on a CPU.

    Args:
        seeds: One per row.
        temperature: Divides the logits.
    """

    def __init__(self, seeds: Sequence[Seed], temperature: float) -> None:
        self._generators = [random.Random(seed) for seed in seeds]
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Rule out all but the sampled token; `scores` is [B, V]."""
        uniform = torch.tensor([[generator.random()] for generator in self._generators], dtype=torch.float64)
        chosen_B1 = inverse_distribution(scores / self._temperature, uniform)
        sampled = torch.full_like(scores, -torch.inf)
        return sampled.scatter_(1, chosen_B1.clamp(max=scores.shape[-1] - 1), 0.0)


def inverse_distribution(logits: Tensor, uniform: Tensor) -> Tensor:
    """Find the tokens at which the cumulative distributions pass given numbers.

    First the block of tokens, by the blocks' sums, then the token in it: of the vocabulary there is one exponential, no
    cumulative sum. Sums are in float64, where the device has it: over 150,000 tokens float32 loses digits.

    Args:
        logits: [B, V].
        uniform: Numbers from 0 to 1, [B, 1].

    Returns:
        Token ids, [B, 1]; never one of probability zero, and none in particular where logits are NaN.
    """
    rows, size = logits.shape
    narrow = torch.promote_types(logits.dtype, torch.float32)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    terms = logits.new_zeros(rows, -(-size // _BLOCK) * _BLOCK, dtype=narrow)
    terms[:, :size] = logits
    terms[:, :size].sub_(logits.amax(-1, keepdim=True)).exp_()
    blocks = terms.view(rows, -1, _BLOCK)
    sums = blocks.sum(-1, dtype=wide)
    block, below = _passed(sums, uniform.to(sums) * sums.sum(-1, keepdim=True))
    inside = blocks.gather(1, block[..., None].expand(-1, -1, _BLOCK))[:, 0].to(wide)
    token, _ = _passed(inside, below)
    return block * _BLOCK + token


def _passed(masses: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first index at which the cumulative mass is above the target, and what is left of the target there."""
    cumulative = masses.cumsum(-1)
    # A target that rounding has put at the whole mass or above stays below it, so no index without mass is found.
    below_all = torch.nextafter(cumulative[:, -1:], torch.zeros_like(target))
    target = torch.minimum(target, below_all)
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=masses.shape[-1] - 1)
    before = cumulative.gather(1, index) - masses.gather(1, index)
    return index, (target - before).clamp(min=0)


def sampling_options(temperature: float, seeds: Sequence[Seed]) -> dict[str, LogitsProcessorList]:
    """Return what greedy `model.generate` needs to sample every row from its own seed; nothing at temperature 0."""
    if temperature == 0:
        return {}
    return {"logits_processor": LogitsProcessorList([SeededSampling(seeds, temperature)])}


def samples_plainly(config: GenerationConfig, further: Mapping[str, Any] | None) -> bool:
    """Tell whether a generation config draws from the whole distribution at a temperature: no top-k and the like.

    Args:
        config: As a trainer made it.
        further: Options that its user added; only `remove_invalid_values` is known to leave the distribution whole.
    """
    return (
        not set(further or {}) - {"remove_invalid_values"}
        and config.top_k in (None, 0)
        and config.top_p in (None, 1.0)
        and config.repetition_penalty in (None, 1.0)
        and config.min_p is None
    )


@contextmanager
def sampling_by_row(model: nn.Module, temperature: float, seeds: Sequence[Seed]) -> Iterator[None]:
    """Let `model.generate` sample from the whole distribution, every row from its own seed.

    For callers that pass a generation config but no logits processors, as TRL's trainers do. What the config says of how to
    sample is set aside.

    Args:
        model: With a `generate` method.
        temperature: Above 0.
        seeds: One per row of the batches that are generated in the block.
    """
    whole: Callable[..., Tensor] = model.generate  # type: ignore[assignment]

    def generate(*args: Any, generation_config: GenerationConfig, **kwargs: Any) -> Tensor:
        config = copy.copy(generation_config)
        # NaN logits, which a model that training has broken gives, fail inside `multinomial` only.
        config.update(do_sample=False, temperature=None, top_p=None, top_k=None, remove_invalid_values=False)
        return whole(*args, generation_config=config, **sampling_options(temperature, seeds), **kwargs)

    model.generate = generate  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.generate
