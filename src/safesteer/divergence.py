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
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from safesteer.divergence_dense import (
    EMPTY,
    Support,
    Vocabulary,
    check_options,
    dense_divergence,
    value_and_gradient,
)
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
"""Logits of one model in a default chunk, at most: 256 MiB in float32. Two tensors of that size live at once; with a
softcap or the teacher's top K three, with the full vocabulary about eight."""


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
        chunk_size: Tokens at a time; None for an eighth of the scored ones, at least 64 and at most about
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
    options = _Options(ids, vocabulary, support, beta, top_k, statistics)
    score = _score_all if vocabulary == "full" else _score_set
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
        columns = torch.zeros(len(_Columns._fields), len(weights), device=weights.device, dtype=exact)
        for rows in _chunks(weights, chunk_size, size):
            hidden_nH = student_hidden[rows]
            logits = _Logits(student, teacher, hidden_nH, teacher_hidden[rows], trained)
            scored, gradient_nV = score(logits, options)
            columns[:, rows] = torch.stack(scored)
            if trained:
                if logits.curve is not None:
                    gradient_nV.mul_(logits.curve)
                gradients.add(rows, weights[rows] * student.slope, gradient_nV, hidden_nH, student.weight)
            del gradient_nV, logits  # for the next chunk to take their place

        result = _Columns(*columns)
        loss = (weights * result.per_token).sum()
    if trained:
        formed = (gradients.hidden, gradients.weight, gradients.bias)
        loss = cast(Tensor, _WithGradient.apply(loss, formed, *inputs))  # type: ignore[no-untyped-call]
    return DivergenceOutput(loss, *result)


@dataclass(frozen=True)
class _Options:
    token_ids: Tensor | None
    vocabulary: Vocabulary
    support: Support
    beta: float
    top_k: int
    statistics: bool


class _Columns(NamedTuple):
    """One [n] or [N] tensor for each field of `DivergenceOutput` but the loss, in its order."""

    per_token: Tensor
    student_mass: Tensor
    teacher_mass: Tensor
    kl_on: Tensor
    kl_off: Tensor
    entropy: Tensor


class _Logits:
    """A chunk's logits, made when asked for: of the two models' only what is being looked at has to live."""

    def __init__(
        self,
        student: HeadProduct,
        teacher: HeadProduct,
        student_nH: Tensor,
        teacher_nH: Tensor,
        trained: bool,
    ) -> None:
        self._student, self._teacher = student, teacher
        self._student_nH, self._teacher_nH = student_nH, teacher_nH
        self._trained = trained
        self.curve: Tensor | None = None

    def of_student(self) -> Tensor:
        """Return [n, V], and note the curve that the gradient has to be multiplied by."""
        z_nV = self._student.logits(self._student_nH)
        self.curve = self._student.curve(z_nV) if self._trained else None
        return z_nV

    def of_teacher(self) -> Tensor:
        """Return [n, V]."""
        return self._teacher.logits(self._teacher_nH)


def _score_set(logits: _Logits, options: _Options) -> tuple[_Columns, Tensor]:
    """Score a chunk on S and the rest.

    Returns:
        The columns, and the gradient with respect to the student's logits [n, V].
    """
    z_q = measured_q = None
    if options.vocabulary == "teacher_top_k":
        z_q = logits.of_teacher()
        ids_nK = z_q.topk(options.top_k, dim=-1).indices
        measured_q = _at(z_q, options.token_ids)

    z_p = logits.of_student()
    if z_q is None:
        ids_nK = cast(Tensor, options.token_ids).expand(z_p.shape[0], -1)
    measured_p = _at(z_p, options.token_ids)
    on_p = _take_out(z_p, ids_nK)
    rho_nV, rest_p = _softmax_and_log_sum(z_p)
    # Over the rest, log p = log p(rest) + z_p − log Z_rest, so two means under ρ make `kl_off` and the entropy.
    mean_p = _mean(rho_nV, z_p) if options.statistics else None
    del z_p
    if z_q is None:
        z_q = logits.of_teacher()
    on_q = _take_out(z_q, ids_nK)
    mean_q = _mean(rho_nV, z_q) if options.statistics else None
    rest_q = _log_sum(z_q)
    del z_q

    cells_p, cells_q = torch.cat([on_p, rest_p], -1), torch.cat([on_q, rest_q], -1)
    log_p, log_q = cells_p.log_softmax(-1), cells_q.log_softmax(-1)
    per_token, gradient_nC = value_and_gradient(log_p, log_q, options.support, options.beta)

    kl_off = entropy = torch.full_like(per_token, torch.nan)
    kl_on = _reverse_kl(log_p[:, :-1], log_q[:, :-1])
    if mean_p is not None and mean_q is not None:
        log_z_gap = cells_q.logsumexp(-1) - cells_p.logsumexp(-1)
        p_rest = log_p[:, -1].exp()
        kl_off = p_rest * (log_z_gap - (mean_q - mean_p))
        entropy = p_rest * (rest_p.squeeze(-1) - mean_p) - (log_p.exp() * log_p).sum(-1)

    masses = log_p[:, :-1].exp().sum(-1), log_q[:, :-1].exp().sum(-1)
    if measured_p is not None and measured_q is not None:
        log_p = measured_p - cells_p.logsumexp(-1, keepdim=True)
        log_q = measured_q - cells_q.logsumexp(-1, keepdim=True)
        masses = log_p.exp().sum(-1), log_q.exp().sum(-1)
        kl_on, kl_all = _reverse_kl(log_p, log_q), kl_on + kl_off
        kl_off = kl_all - kl_on

    gradient_nV = rho_nV.mul_(gradient_nC[:, -1:]).scatter_(1, ids_nK, gradient_nC[:, :-1])
    return _Columns(per_token, *masses, kl_on, kl_off, entropy), gradient_nV


def _score_all(logits: _Logits, options: _Options) -> tuple[_Columns, Tensor]:
    """Score a chunk on every token. Same results as `_score_set`."""
    log_p, log_q = logits.of_student().log_softmax(-1), logits.of_teacher().log_softmax(-1)
    per_token, gradient_nV = value_and_gradient(log_p, log_q, "all", options.beta)
    on = [log if options.token_ids is None else log[:, options.token_ids] for log in (log_p, log_q)]
    kl_on = _reverse_kl(*on)
    kl_off = entropy = torch.full_like(per_token, torch.nan)
    if options.statistics:
        kl_off = _reverse_kl(log_p, log_q) - kl_on
        entropy = -(log_p.exp() * log_p).sum(-1)
    student_mass, teacher_mass = (log.exp().sum(-1) for log in on)
    return _Columns(per_token, student_mass, teacher_mass, kl_on, kl_off, entropy), gradient_nV


def _at(z_nV: Tensor, token_ids: Tensor | None) -> Tensor | None:
    return None if token_ids is None else z_nV[:, token_ids]


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _take_out(z_nV: Tensor, ids_nK: Tensor) -> Tensor:
    """Return the logits of S [n, K] and leave `EMPTY` in their place."""
    on_nK = z_nV.gather(1, ids_nK)
    z_nV.scatter_(1, ids_nK, EMPTY)
    return on_nK


def _softmax_and_log_sum(z_nV: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax(z) [n, V] and log Σ exp z [n, 1].

    The softmax at the largest logit, at least 1/V, tells the log-sum-exp: one fused pass and one maximum,
    where `logsumexp` would make four passes and throw the exponentials away.
    """
    rho_nV = z_nV.softmax(-1)
    largest, where = z_nV.max(-1, keepdim=True)
    return rho_nV, largest - rho_nV.gather(1, where).log_()


def _log_sum(z_nV: Tensor) -> Tensor:
    """Return log Σ exp z [n, 1] and leave something else in `z_nV`, where `logsumexp` would need another [n, V]."""
    largest = z_nV.amax(-1, keepdim=True)
    return z_nV.sub_(largest).exp_().sum(-1, keepdim=True).log_().add_(largest)


def _mean(rho_nV: Tensor, z_nV: Tensor) -> Tensor:
    """Return Σ_v ρ_v z_v [n] without an [n, V] of products, which `linalg.vecdot` would make."""
    return torch.bmm(rho_nV[:, None, :], z_nV[:, :, None]).flatten()


def _chunks(weights: Tensor, chunk_size: int | None, vocabulary: int) -> Iterator[Tensor]:
    """Yield the indices of the rows to score, a chunk at a time."""
    rows = weights.nonzero().squeeze(-1)
    chunk_size = chunk_size or default_chunk_size(len(rows), vocabulary)
    for start in range(0, len(rows), chunk_size):
        yield rows[start : start + chunk_size]


def default_chunk_size(tokens: int, vocabulary: int) -> int:
    """Tokens at a time: an eighth, so that a chunk is little beside a dense [tokens, V], but whole tiles of the products.

    Args:
        tokens: Scored ones.
        vocabulary: V.
    """
    most = max(1, LOGITS_PER_CHUNK // vocabulary)
    wanted = max(64, tokens // 8)
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
