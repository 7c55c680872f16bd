"""What is logged about the loss: averages over response tokens, harmful prompts and anchors apart."""

import torch
from accelerate import Accelerator
from torch import Tensor

from safesteer.divergence import DivergenceOutput

NAMES = ("divergence", "student_mass", "teacher_mass", "kl_on", "kl_off", "entropy")
"""The per-token quantities; the masses and the two KL parts are about S and the tokens outside it."""

_PREFIXES = ("", "anchor/")


def sum_by_kind(output: DivergenceOutput, steered: Tensor, counted: Tensor) -> Tensor:
    """Sum the per-token statistics over harmful prompts' tokens and over anchors' tokens.

    Args:
        output: The divergence at N positions.
        steered: [N] bool; whether the position's prompt is harmful.
        counted: [N] bool; False for positions that carry no weight.

    Returns:
        [2, 1 + len(NAMES)] float32: for harmful and for anchor rows the number of tokens, then the sums.
    """
    columns = (
        output.per_token,
        output.student_mass,
        output.teacher_mass,
        output.kl_on,
        output.kl_off,
        output.entropy,
    )
    values = torch.stack(
        [torch.ones_like(columns[0], dtype=torch.float32), *(column.float() for column in columns)]
    )
    kinds = torch.stack([steered & counted, ~steered & counted])
    # where() and not a product, so that a NaN stays with the rows it belongs to.
    return torch.where(kinds[:, None], values, 0.0).sum(-1)


def averages(sums: Tensor, accelerator: Accelerator) -> dict[str, float]:
    """Turn sums of `sum_by_kind`, added up over microbatches, into averages over all processes.

    Returns:
        Name to mean; anchors' names begin with "anchor/"; a kind without tokens is left out.
    """
    total = accelerator.reduce(sums, reduction="sum").tolist()
    return {
        prefix + name: value / row[0]
        for prefix, row in zip(_PREFIXES, total, strict=True)
        if row[0]
        for name, value in zip(NAMES, row[1:], strict=True)
    }
