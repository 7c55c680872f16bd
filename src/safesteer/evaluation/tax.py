"""The distributional tax of alignment: how far the aligned model's next-token distributions moved on harmless prompts.

On the base model's own greedy answers, token by token: KL(base ‖ aligned), how often both models would say the same next
token, and the perplexity of the answers under each. All of it moves long before a benchmark's score does.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from safesteer.errors import SafeSteerError
from safesteer.modeling import Head, language_head
from safesteer.next_token import Batch, NextTokenReader, Progress, evaluating, float64, no_progress
from safesteer.teacher import completion_hidden_states

if TYPE_CHECKING:
    from safesteer.evaluation.subjects import Subject

_DRAWS = 2000
# Rows of logits at a time: 64 rows of a vocabulary of 150,000 in float64 take 80 MB, and there are a few of them.
_ROWS = 64


@dataclass(frozen=True)
class Tax:
    """What alignment changed on harmless prompts.

    Attributes:
        kl_per_token: KL(base ‖ aligned) in nats, mean over the tokens of the answers.
        kl_low: Lower end of its 95 % bootstrap interval over prompts.
        kl_high: Upper end.
        top1_agreement: Share of tokens at which both models' likeliest next token is the same, 0 to 1.
        top1_low: Lower end of its interval.
        top1_high: Upper end.
        perplexity_base: Of the answers under the base model.
        perplexity_aligned: Of the answers under the aligned model.
        prompts: How many prompts.
        tokens: How many tokens of answers, the ends of turn included.
    """

    kl_per_token: float
    kl_low: float
    kl_high: float
    top1_agreement: float
    top1_low: float
    top1_high: float
    perplexity_base: float
    perplexity_aligned: float
    prompts: int
    tokens: int

    def record(self) -> dict[str, Any]:
        """Return the figures for a summary."""
        return asdict(self)


def distributional_tax(
    base: "Subject",
    aligned: "Subject",
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Tax:
    """Measure how far a model moved on harmless prompts.

    The two may share their weights, as a model with and without its adapter does: each is run inside its own
    `Subject.steering`.

    Args:
        base: Who answers, greedily.
        aligned: Who is compared.
        prompts: Harmless ones.
        max_new_tokens: Longest answer.
        batch_size: Prompts at a time.
        seed: Of the bootstrap.
        progress: Called as it gets on.

    Raises:
        SafeSteerError: If there are no prompts, or the two models' tokenizers or chat templates differ.
    """
    if not prompts:
        raise SafeSteerError("the distributional tax needs at least one harmless prompt.")
    if base.chat.fingerprint != aligned.chat.fingerprint:
        raise SafeSteerError(
            f"{base.name} and {aligned.name} have different tokenizers or chat templates, so that their next-token "
            "distributions cannot be compared; give both the same."
        )
    reader = NextTokenReader(base.model, base.chat, batch_size)
    # Per prompt: tokens, summed KL, agreements, and negative log-likelihoods under base and aligned.
    sums = np.zeros((len(prompts), 5))
    done = 0
    for batch in reader.batches(prompts, passes=max_new_tokens):
        progress(f"tax of {aligned.name}", done, len(prompts))
        with base.steering(), evaluating(base.model):
            ids, mask = _answers(reader, batch, max_new_tokens)
            hidden_base, head_base = _scored(base.model, batch, ids, mask)
        with aligned.steering(), evaluating(aligned.model):
            hidden_aligned, head_aligned = _scored(aligned.model, batch, ids, mask)
        chosen = ids[mask.bool()]
        figures = torch.cat(
            [
                _per_token(
                    head_base.logits(hidden_base[start : start + _ROWS]),
                    head_aligned.logits(hidden_aligned[start : start + _ROWS]),
                    chosen[start : start + _ROWS],
                )
                for start in range(0, len(chosen), _ROWS)
            ]
        )
        rows = torch.tensor(batch.rows).repeat_interleave(mask.sum(1).cpu())
        np.add.at(sums, rows.numpy(), figures.numpy())
        done += len(batch.rows)
    progress(f"tax of {aligned.name}", done, len(prompts))
    return _tax(sums, seed)


def _answers(reader: NextTokenReader, batch: Batch, max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """Answer greedily.

    Returns:
        The answers' tokens [B, C], and a mask that ends after each one's first end of turn.
    """
    ids_BC = reader.sample(batch, max_new_tokens, temperature=0.0)
    ends = torch.isin(ids_BC, torch.tensor(reader.end_ids, dtype=torch.int64, device=ids_BC.device))
    # An end of turn is itself scored; what follows the first one is not part of the answer.
    mask_BC = (ends.long().cumsum(1) - ends.long()) == 0
    width = int(mask_BC.sum(1).max())
    return ids_BC[:, :width], mask_BC[:, :width].long()


def _scored(model: PreTrainedModel, batch: Batch, ids: Tensor, mask: Tensor) -> tuple[Tensor, Head]:
    """Return the hidden states [N, H] that predict the answers' N tokens, and the head that reads them."""
    hidden_BCH = completion_hidden_states(model, batch.input_ids, batch.mask, ids, mask)
    return hidden_BCH[mask.bool()], language_head(model)


@torch.no_grad()
def _per_token(logits_base: Tensor, logits_aligned: Tensor, chosen: Tensor) -> Tensor:
    """Compare two next-token distributions.

    Args:
        logits_base: [N, V].
        logits_aligned: [N, V].
        chosen: The token that came next, [N].

    Returns:
        [N, 5] float64 on the CPU: 1, KL(base ‖ aligned), same likeliest token, −log p under base and aligned.
    """
    log_p, log_q = (float64(logits).log_softmax(-1) for logits in (logits_base, logits_aligned))
    log_q = log_q.to(log_p.device)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    same = (logits_base.argmax(-1).cpu() == logits_aligned.argmax(-1).cpu()).double()
    index = chosen.to(log_p.device).unsqueeze(-1)
    losses = [-log.gather(-1, index).squeeze(-1).cpu() for log in (log_p, log_q)]
    return torch.stack([torch.ones_like(same), kl.cpu(), same, *losses], dim=-1)


def _tax(sums: NDArray[np.float64], seed: int) -> Tax:
    """Turn the sums per prompt [P, 5] into means per token, with intervals that resample prompts."""
    tokens, kl, same, loss_base, loss_aligned = (float(total) for total in sums.sum(0))
    rng = np.random.default_rng(seed)
    draws = np.stack([sums[rng.integers(len(sums), size=len(sums))].sum(0) for _ in range(_DRAWS)])
    kl_low, kl_high = np.quantile(draws[:, 1] / draws[:, 0], (0.025, 0.975))
    top1_low, top1_high = np.quantile(draws[:, 2] / draws[:, 0], (0.025, 0.975))
    return Tax(
        # Rounding leaves −1e-17 where nothing changed.
        kl_per_token=max(0.0, kl / tokens),
        kl_low=max(0.0, float(kl_low)),
        kl_high=max(0.0, float(kl_high)),
        top1_agreement=same / tokens,
        top1_low=float(top1_low),
        top1_high=float(top1_high),
        perplexity_base=math.exp(loss_base / tokens),
        perplexity_aligned=math.exp(loss_aligned / tokens),
        prompts=len(sums),
        tokens=int(tokens),
    )
