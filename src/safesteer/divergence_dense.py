"""The localized divergence as equations over whole logits, to be read with a pencil.

Notation: `p` the student's and `q` the teacher's next-token distribution over the vocabulary `V`, both after
the temperature; `S ⊆ V` the tokens the loss looks at; `K = |S|`; `rest = V∖S`.

Every support looks at the *cells* `(S_1, …, S_K, rest)`, with logits `(z_v for v ∈ S, log Σ_{v∉S} exp z_v)`:
their softmax is exactly `p` on S and the mass `1 − p(S)` on the rest, without subtracting from one. With
`d_β` the divergence between two lists of numbers (method §4; `beta` as in TRL's `DistillationConfig`):

    β = 1        reverse KL       d(p, q) = Σ p log(p/q)
    β = 0        forward KL       d(p, q) = Σ q log(q/p)
    0 < β < 1    generalized JSD  d(p, q) = Σ β q log(q/m) + (1−β) p log(p/m),   m = (1−β) p + β q

(Agarwal et al. 2024, "GKD"; the JSD goes to 0, not to a KL, as β goes to an end), a support is

    truncated     d_β over S alone, p and q as they are (the paper). Not a divergence at β = 0 and β = 1.
    generalized   the same with `Σ_S (q − p)` added at β = 1 and `Σ_S (p − q)` at β = 0, which makes it ≥ 0.
                  For 0 < β < 1 the correction is `β(m − q) + (1−β)(m − p) = 0`: equal to truncated.
    tail          d_β over S and the rest as one more cell: a divergence between coarse distributions.
    renormalized  d_β between p/p(S) and q/q(S) on S: blind to the mass on S.

`docs/notes/truncated-sum.md` derives the minima and the gradients.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from safesteer.choices import Support, Vocabulary
from safesteer.errors import SafeSteerError

EMPTY = -1e30
"""The logit of "no token here". Finite, so that `0 · (EMPTY − EMPTY)` is 0 and not NaN."""


def dense_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    token_ids: Tensor | None = None,
    vocabulary: Vocabulary = "safety_tokens",
    support: Support = "tail",
    beta: float = 1.0,
    top_k: int = 50,
    temperature: float = 1.0,
) -> Tensor:
    """Return the localized divergence of each position from whole logits (method §4 and §6.1).

    For reading, testing and small models; `localized_divergence` gives the same numbers without whole logits.
    Differentiable by autograd in both arguments.

    Args:
        student_logits: [..., V], before the temperature.
        teacher_logits: [..., V], before the temperature.
        token_ids: [K] ids of S; needed by `vocabulary="safety_tokens"`, ignored by the others.
        vocabulary: What S is: the safety tokens, the `top_k` tokens the teacher finds likeliest at each
            position (a different S at each position, same `support` on it), or every token. With every token
            the rest is empty, the four supports are the same number, and `support` is ignored.
        support: How the divergence is restricted to S (see the module).
        beta: 1 reverse KL(p‖q), 0 forward KL(q‖p), between them the generalized JSD.
        top_k: K of `vocabulary="teacher_top_k"`.
        temperature: Divides both models' logits.

    Returns:
        [...], in nats, in the dtype of the logits but at least float32.

    Raises:
        SafeSteerError: When an option is out of its range.
    """
    check_options(vocabulary, support, beta, top_k, temperature, token_ids, student_logits.shape[-1])
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    z_p = student_logits.to(dtype) / temperature
    z_q = teacher_logits.to(dtype) / temperature
    if vocabulary == "full":
        return terms(z_p.log_softmax(-1), z_q.log_softmax(-1), beta, unnormalised=False).sum(-1)

    if vocabulary == "teacher_top_k":
        ids = z_q.topk(top_k, dim=-1).indices
    else:
        assert token_ids is not None  # check_options said so
        ids = token_ids.to(z_p.device).expand(*z_p.shape[:-1], -1)

    log_p, log_q = _cells(z_p, ids).log_softmax(-1), _cells(z_q, ids).log_softmax(-1)
    if support == "renormalized":
        log_p, log_q = log_p[..., :-1].log_softmax(-1), log_q[..., :-1].log_softmax(-1)
    elif support != "tail":
        log_p, log_q = log_p[..., :-1], log_q[..., :-1]
    return terms(log_p, log_q, beta, unnormalised=support == "generalized").sum(-1)


def terms(log_p: Tensor, log_q: Tensor, beta: float, *, unnormalised: bool) -> Tensor:
    """Return the summands of `d_β`, elementwise.

    Args:
        log_p: [..., C] log-probabilities of the student.
        log_q: [..., C] log-probabilities of the teacher.
        beta: 1, 0 or between.
        unnormalised: Add the correction that keeps each summand ≥ 0 where p and q need not sum to one.
    """
    if beta == 1:
        p = log_p.exp()
        reverse = p * (log_p - log_q)
        return reverse - p + log_q.exp() if unnormalised else reverse
    if beta == 0:
        q = log_q.exp()
        forward = q * (log_q - log_p)
        return forward - q + log_p.exp() if unnormalised else forward
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * log_q.exp() * (log_q - log_m) + (1 - beta) * log_p.exp() * (log_p - log_m)


def slopes(log_p: Tensor, log_q: Tensor, beta: float, *, unnormalised: bool) -> Tensor:
    """Return `∂ terms / ∂ log p`, elementwise: the hand-written derivative of `terms`.

    For 0 < β < 1 the chain rule leaves only `(1−β) p log(p/m)`: what the logarithms' arguments contribute,
    `(1−β) p [1 − (β q + (1−β) p)/m]`, is zero.
    """
    if beta == 1:
        p = log_p.exp()
        return p * (log_p - log_q) if unnormalised else p * (log_p - log_q + 1)
    if beta == 0:
        return log_p.exp() - log_q.exp() if unnormalised else -log_q.exp()
    return (1 - beta) * log_p.exp() * (log_p - _log_mixture(log_p, log_q, beta))


def value_and_gradient(
    log_p: Tensor, log_q: Tensor, support: Support | Literal["all"], beta: float
) -> tuple[Tensor, Tensor]:
    """Return the divergence over cells and its gradient with respect to the cells' logits.

    With `a = ∂L/∂ log p` (`slopes`) on the counted cells and 0 on the others, `log p = log_softmax(cells)`
    gives `∂L/∂ cells = a − p Σa`.

    Args:
        log_p: [n, C] the student's log-probabilities of the cells, the rest last.
        log_q: [n, C] the teacher's.
        support: Which cells count and how; "all" when every token is a cell of its own (no rest).
        beta: 1, 0 or between.

    Returns:
        [n] divergences and [n, C] gradients, each summing to zero over the cells.
    """
    if support == "renormalized":
        value, on = value_and_gradient(
            log_p[:, :-1].log_softmax(-1), log_q[:, :-1].log_softmax(-1), "all", beta
        )
        return value, torch.nn.functional.pad(on, (0, 1))

    counted = slice(None) if support in ("tail", "all") else slice(-1)
    value = terms(log_p[:, counted], log_q[:, counted], beta, unnormalised=support == "generalized").sum(-1)
    # Over cells that sum to one, the correction adds nothing to the gradient and saves it from cancellation.
    slope = slopes(log_p[:, counted], log_q[:, counted], beta, unnormalised=support != "truncated")
    gradient = log_p.exp().mul_(-slope.sum(-1, keepdim=True))
    gradient[:, counted] += slope
    return value, gradient


def check_options(
    vocabulary: str,
    support: str,
    beta: float,
    top_k: int,
    temperature: float,
    token_ids: Tensor | None,
    size: int,
) -> None:
    """Raise `SafeSteerError` when an option is out of its range; `size` is the vocabulary's."""
    if vocabulary not in get_args(Vocabulary):
        raise SafeSteerError(
            f"vocabulary is {vocabulary!r}, which is not a vocabulary; choose one of "
            f"{', '.join(get_args(Vocabulary))}."
        )
    if support not in get_args(Support):
        raise SafeSteerError(
            f"support is {support!r}, which is not a support; choose one of {', '.join(get_args(Support))}."
        )
    if not 0 <= beta <= 1:
        raise SafeSteerError(f"beta is {beta}, outside [0, 1]; use 1 for reverse KL or 0 for forward KL.")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise SafeSteerError(
            f"temperature is {temperature}, but must be above 0; use 1 for the plain logits."
        )
    if vocabulary == "teacher_top_k" and not 1 <= top_k <= size:
        raise SafeSteerError(f"top_k is {top_k}, outside [1, {size}] (the vocabulary); use 50, for example.")
    if token_ids is not None:
        _check_token_ids(token_ids, size)
    elif vocabulary == "safety_tokens":
        raise SafeSteerError(
            "token_ids is missing, which vocabulary 'safety_tokens' needs; give the ids or choose 'full'."
        )


def _check_token_ids(token_ids: Tensor, size: int) -> None:
    if token_ids.ndim != 1 or token_ids.dtype not in (torch.int32, torch.int64):
        raise SafeSteerError(
            f"token_ids has shape {list(token_ids.shape)} and dtype {token_ids.dtype}, "
            "but must be a flat list of integers; give one id per safety token."
        )
    if token_ids.numel() == 0:
        raise SafeSteerError("token_ids is empty, so there is nothing to distil; select safety tokens again.")
    ids = token_ids.tolist()
    if min(ids) < 0 or max(ids) >= size:
        raise SafeSteerError(
            f"token_ids goes from {min(ids)} to {max(ids)}, outside the vocabulary of {size}; "
            "select safety tokens with this model's tokenizer."
        )
    if len(set(ids)) < len(ids):
        raise SafeSteerError("token_ids names a token twice, which counts its mass twice; name each once.")


def _cells(logits: Tensor, ids: Tensor) -> Tensor:
    """Logits [..., V] and ids [..., K] → the cells' logits [..., K+1], the rest last."""
    rest = logits.scatter(-1, ids, EMPTY).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, ids), rest], dim=-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
