"""The localized divergence from hidden states and language-model heads, never a [tokens, V] tensor.

`divergence_dense` has the equations. Here they are met a chunk of tokens at a time, with the gradient formed
on the same visit, because S needs little of the vocabulary. With `z` a token's logits, `ρ = softmax(z)` over
the rest alone and `Z_rest = Σ_{v∉S} exp z_v`,

    cells        = (z_v for v ∈ S, log Z_rest)      K+1 numbers per token: all that the loss depends on
    ∂L/∂z_v      = ∂L/∂cell_v            v ∈ S      closed form (`value_and_gradient`)
    ∂L/∂z_u      = ∂L/∂cell_rest · ρ_u   u ∉ S      because ∂ log Z_rest / ∂z_u = ρ_u
    ∂L/∂hidden   = (∂L/∂z) W

so a chunk costs one product with each model's head and one more for the gradient, the least there is for a
gradient that reaches every logit.

Shape suffixes: N scored tokens, n tokens of a chunk, V vocabulary, K tokens of S, C cells, H hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from safesteer.choices import Support, Vocabulary
from safesteer.divergence_chunks import Columns, Logits, Options, score_all, score_set, tiles_of
from safesteer.divergence_dense import check_options, dense_divergence
from safesteer.errors import SafeSteerError
from safesteer.head_products import HeadGradients, HeadProduct, factor_dtype
from safesteer.modeling import Head

__all__ = [
    "DivergenceOutput",
    "Support",
    "Vocabulary",
    "default_chunk_size",
    "dense_divergence",
    "localized_divergence",
]

LOGITS_PER_CHUNK = 2**26
"""Logits of one model in a default chunk, at most: 256 MiB in float32. One tensor of that size lives at a time; with a
softcap or the teacher's top K two, with the full vocabulary about eight."""


@dataclass(frozen=True)
class DivergenceOutput:
    """A localized divergence and what it saw. Everything but `loss` is detached.

    The statistics speak of the safety tokens wherever `token_ids` is given, whatever the loss looks at, so
    that runs with different vocabularies can be compared; otherwise of the loss's own S. Positions of weight
    0 are never scored and hold 0 in every tensor.

    Attributes:
        loss: [] Σ weights · per-token divergence, differentiable.
        per_token: [N] divergence, nats.
        student_mass: [N] p(S).
        teacher_mass: [N] q(S).
        kl_on: [N] Σ_{v∈S} p log(p/q), nats; the paper's sum, may be negative.
        kl_off: [N] Σ_{v∉S} p log(p/q), nats; NaN without `statistics`.
        entropy: [N] of the student over the whole vocabulary, nats; NaN without `statistics`.
    """

    loss: Tensor
    per_token: Tensor
    student_mass: Tensor
    teacher_mass: Tensor
    kl_on: Tensor
    kl_off: Tensor
    entropy: Tensor


def localized_divergence(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: Head,
    teacher_head: Head,
    weights: Tensor,
    *,
    token_ids: Tensor | None = None,
    vocabulary: Vocabulary = "safety_tokens",
    support: Support = "tail",
    beta: float = 1.0,
    top_k: int = 50,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    statistics: bool = True,
) -> DivergenceOutput:
    """Return `Σ_n weights_n · d(p_n, q_n)`, with gradients to the student (method §4 and §6.1).

    Equal to `dense_divergence` of both heads' logits. Log-sum-exps and probabilities are float32 (float64
    for float64 hidden states) whatever the dtype of the hidden states; products run in the hidden states' or
    autocast's dtype and are summed in float32. The gradient is formed during the call and kept until
    backward: one `student_hidden` in float32, plus one head in float32 when the head is trained.

    Args:
        student_hidden: [N, H] after the final norm; receives the gradient.
        teacher_hidden: [N, H'] of the same positions; H' may differ from H. No gradient.
        student_head: Weight [V, H] and bias receive gradients where they require them.
        teacher_head: Weight [V, H']. No gradient, also when it is the student's own tensor.
        weights: [N] factor of each position in the loss; no gradient. Rows of weight 0 are skipped.
        token_ids: [K] ids of S, without repeats; needed by `vocabulary="safety_tokens"`. With another
            vocabulary they only say what the statistics speak of.
        vocabulary: What S is: the safety tokens; the `top_k` tokens that the teacher finds likeliest at each
            position (S differs by position; a support means the same on it, "tail" for one has one cell for
            the V − top_k other tokens); or every token (no rest: the supports coincide, `support` is unread).
        support: How the divergence is restricted to S; see `divergence_dense`. With 0 < β < 1, "generalized"
            and "truncated" are the same number, because the generalized JSD's correction vanishes.
        beta: 1 reverse KL(student‖teacher), 0 forward KL(teacher‖student), between them the generalized JSD
            with mixture `(1−β) p + β q`, as in TRL.
        top_k: K of `vocabulary="teacher_top_k"`.
        temperature: Divides both models' logits, after scale and softcap.
        chunk_size: Tokens at a time; None for a quarter of the scored ones, at least 64 and at most about
            `LOGITS_PER_CHUNK / V`.
        statistics: Measure `kl_off` and `entropy` too, which costs more passes over each chunk's logits.

    Returns:
        The loss and, detached, the per-token divergence and statistics, in float32 (float64).

    Raises:
        SafeSteerError: When shapes disagree or an option is out of its range.
    """
    size = student_head.weight.shape[0]
    _check_shapes(student_hidden, teacher_hidden, student_head, teacher_head, weights)
    check_options(vocabulary, support, beta, top_k, temperature, token_ids, size)
    if chunk_size is not None and chunk_size < 1:
        raise SafeSteerError(
            f"chunk_size is {chunk_size}, but must be at least 1; leave it out for the default."
        )

    ids = None if token_ids is None else token_ids.to(student_hidden.device, torch.int64)
    tiles = tiles_of(size, ids if vocabulary == "safety_tokens" else None)
    options = Options(ids, tiles, vocabulary, support, beta, top_k, statistics)
    score = score_all if vocabulary == "full" else score_set
    exact = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
    weights = weights.detach().to(student_hidden.device, exact)
    inputs = (student_hidden, student_head.weight, student_head.bias)
    gradients = HeadGradients(*(_room_for_gradient(t, exact) for t in inputs))
    trained = any(t is not None for t in (gradients.hidden, gradients.weight, gradients.bias))

    # Read before autocast is switched off below, for products whose dtypes are given.
    student_factors, teacher_factors = (factor_dtype(h, exact) for h in (student_hidden, teacher_hidden))
    with torch.no_grad(), torch.autocast(student_hidden.device.type, enabled=False):
        student = HeadProduct.of(student_head, student_factors, exact, temperature)
        if teacher_head.weight is student_head.weight and teacher_factors == student_factors:
            teacher_head = replace(teacher_head, weight=student.weight)  # so that one cast serves both
        teacher = HeadProduct.of(teacher_head, teacher_factors, exact, temperature)
        columns = torch.zeros(len(Columns._fields), len(weights), device=weights.device, dtype=exact)
        for rows in _chunks(weights, chunk_size, size):
            hidden_nH = student_hidden[rows]
            logits = Logits(student, teacher, hidden_nH, teacher_hidden[rows], trained)
            scored, gradient_nV = score(logits, options)
            columns[:, rows] = torch.stack(scored)
            if trained:
                if logits.curve is not None:
                    gradient_nV.mul_(logits.curve)
                gradients.add(rows, weights[rows] * student.slope, gradient_nV, hidden_nH, student.weight)
            del gradient_nV, logits  # for the next chunk to take their place

        result = Columns(*columns)
        loss = (weights * result.per_token).sum()
    if trained:
        formed = (gradients.hidden, gradients.weight, gradients.bias)
        loss = cast(Tensor, _WithGradient.apply(loss, formed, *inputs))  # type: ignore[no-untyped-call]
    return DivergenceOutput(loss, *result)


def _chunks(weights: Tensor, chunk_size: int | None, vocabulary: int) -> Iterator[Tensor]:
    """Yield the indices of the rows to score, a chunk at a time."""
    rows = weights.nonzero().squeeze(-1)
    chunk_size = chunk_size or default_chunk_size(len(rows), vocabulary)
    for start in range(0, len(rows), chunk_size):
        yield rows[start : start + chunk_size]


def default_chunk_size(tokens: int, vocabulary: int) -> int:
    """Tokens at a time: a quarter, so that a chunk is little beside a dense [tokens, V], but whole tiles of the products.

    Args:
        tokens: Scored ones.
        vocabulary: V.
    """
    most = max(1, LOGITS_PER_CHUNK // vocabulary)
    wanted = max(64, tokens // 4)
    size = min(most, wanted)
    return size - size % 64 if size >= 64 else size


def _room_for_gradient(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or not (tensor.requires_grad and torch.is_grad_enabled()):
        return None
    return torch.zeros(tensor.shape, device=tensor.device, dtype=dtype)


def _check_shapes(
    student_hidden: Tensor, teacher_hidden: Tensor, student_head: Head, teacher_head: Head, weights: Tensor
) -> None:
    for name, hidden, head in (
        ("student", student_hidden, student_head),
        ("teacher", teacher_hidden, teacher_head),
    ):
        if hidden.ndim != 2 or hidden.shape[1] != head.weight.shape[1]:
            raise SafeSteerError(
                f"{name}_hidden has shape {list(hidden.shape)}, but its head needs "
                f"[N, {head.weight.shape[1]}]; give one row per position, from after the final norm."
            )
    if student_head.weight.shape[0] != teacher_head.weight.shape[0]:
        raise SafeSteerError(
            f"the student's head has {student_head.weight.shape[0]} tokens and the teacher's "
            f"{teacher_head.weight.shape[0]}; use models with one vocabulary."
        )
    tokens = student_hidden.shape[0]
    if teacher_hidden.shape[0] != tokens or weights.shape != (tokens,):
        raise SafeSteerError(
            f"student_hidden has {tokens} positions, teacher_hidden {teacher_hidden.shape[0]} and weights "
            f"shape {list(weights.shape)}; give one row and one weight per position."
        )


class _WithGradient(torch.autograd.Function):
    """Give a number the gradients that were formed along with it."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, gradients: tuple[Tensor | None, ...], *inputs: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if t is None else t.dtype for t in inputs]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            None if gradient is None else (gradient * grad_output).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return None, None, *scaled
