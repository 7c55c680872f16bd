"""Scoring one chunk of tokens for `safesteer.divergence`: from two models' logits to columns and a gradient.

On S and the rest, all that lives of the size [n, V] is the student's softmax, where its gradient is formed. Of the teacher only
`log Z_rest`, the logits of S and one mean are wanted, which a pass over tiles of its head gives.

Shape suffixes: n tokens of a chunk, V vocabulary, v tokens of a tile, K tokens of S, C cells.
"""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from safesteer.choices import Support, Vocabulary
from safesteer.divergence_dense import EMPTY, value_and_gradient
from safesteer.head_products import HeadProduct

TILE = 8_192
"""Tokens of the vocabulary in a tile of the teacher's logits."""


class Tile(NamedTuple):
    """A stretch of the vocabulary.

    Attributes:
        tokens: Their ids.
        of_S: [j] places in the stretch of the safety tokens that are in it.
        in_S: [j] their places in S.
    """

    tokens: slice
    of_S: Tensor
    in_S: Tensor


def tiles_of(vocabulary: int, token_ids: Tensor | None) -> tuple[Tile, ...]:
    """Divide the vocabulary, and tell where the safety tokens [K] are, if they are S."""
    token_ids = torch.empty(0, dtype=torch.int64) if token_ids is None else token_ids
    tiles = []
    for start in range(0, vocabulary, TILE):
        stop = min(start + TILE, vocabulary)
        (places,) = ((token_ids >= start) & (token_ids < stop)).nonzero(as_tuple=True)
        tiles.append(Tile(slice(start, stop), token_ids[places] - start, places))
    return tuple(tiles)


@dataclass(frozen=True)
class Options:
    """What `safesteer.divergence.localized_divergence` was asked for.

    Attributes:
        token_ids: [K] or None.
        tiles: Of the vocabulary, with S where S is the safety tokens.
        vocabulary: What S is.
        support: How the divergence is restricted to it.
        beta: 1 reverse, 0 forward.
        top_k: Of the teacher's.
        statistics: Measure `kl_off` and `entropy` too.
    """

    token_ids: Tensor | None
    tiles: tuple[Tile, ...]
    vocabulary: Vocabulary
    support: Support
    beta: float
    top_k: int
    statistics: bool


class Columns(NamedTuple):
    """One [n] or [N] tensor for each field of `DivergenceOutput` but the loss, in its order."""

    per_token: Tensor
    student_mass: Tensor
    teacher_mass: Tensor
    kl_on: Tensor
    kl_off: Tensor
    entropy: Tensor


class Logits:
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

    def of_teacher(self, tokens: slice = slice(None)) -> Tensor:
        """Return [n, V], or the columns of some tokens."""
        return self._teacher.logits(self._teacher_nH, tokens)


def score_set(logits: Logits, options: Options) -> tuple[Columns, Tensor]:
    """Score a chunk on S and the rest.

    Returns:
        The columns, and the gradient with respect to the student's logits [n, V].
    """
    z_q = measured_q = None
    if options.vocabulary == "teacher_top_k":
        z_q = logits.of_teacher()
        ids_nK = z_q.topk(options.top_k, dim=-1).indices
        measured_q = _at(z_q, options.token_ids)
        on_q = _take_out(z_q, ids_nK)

    z_p = logits.of_student()
    if z_q is None:
        ids_nK = cast(Tensor, options.token_ids).expand(z_p.shape[0], -1)
        on_q = z_p.new_empty(ids_nK.shape)
    measured_p = _at(z_p, options.token_ids)
    on_p = _take_out(z_p, ids_nK)
    rho_nV, rest_p = _softmax_and_log_sum(z_p)

    rest_q = _LogSum()
    # Over the rest, log p = log p(rest) + log ρ, and two means under ρ make `kl_off` and the entropy.
    mean_p = mean_q = torch.zeros_like(on_p[:, 0])
    for tile in options.tiles:
        if z_q is None:
            tile_q = logits.of_teacher(tile.tokens)
            on_q[:, tile.in_S] = tile_q[:, tile.of_S]
            tile_q[:, tile.of_S] = EMPTY
        else:
            tile_q = z_q[:, tile.tokens]
        if options.statistics:
            tile_rho = rho_nV[:, tile.tokens]
            # Where ρ is 0 its logarithm does not matter; `xlogy`, which knows, is several times slower on a CPU.
            above_0 = tile_rho.clamp_min(torch.finfo(tile_rho.dtype).tiny)
            mean_p = mean_p + above_0.log_().mul_(tile_rho).sum(-1)
            del above_0
            mean_q = mean_q + (tile_rho * tile_q).sum(-1)
        rest_q.add(tile_q)
    del z_q

    cells_p, cells_q = torch.cat([on_p, rest_p], -1), torch.cat([on_q, rest_q.value()], -1)
    log_p, log_q = cells_p.log_softmax(-1), cells_q.log_softmax(-1)
    per_token, gradient_nC = value_and_gradient(log_p, log_q, options.support, options.beta)

    kl_off = entropy = torch.full_like(per_token, torch.nan)
    kl_on = _reverse_kl(log_p[:, :-1], log_q[:, :-1])
    if options.statistics:
        p_rest = log_p[:, -1].exp()
        kl_off = p_rest * (log_p[:, -1] + mean_p + cells_q.logsumexp(-1) - mean_q)
        entropy = -p_rest * mean_p - (log_p.exp() * log_p).sum(-1)

    masses = log_p[:, :-1].exp().sum(-1), log_q[:, :-1].exp().sum(-1)
    if measured_p is not None and measured_q is not None:
        log_p = measured_p - cells_p.logsumexp(-1, keepdim=True)
        log_q = measured_q - cells_q.logsumexp(-1, keepdim=True)
        masses = log_p.exp().sum(-1), log_q.exp().sum(-1)
        kl_on, kl_all = _reverse_kl(log_p, log_q), kl_on + kl_off
        kl_off = kl_all - kl_on

    gradient_nV = rho_nV.mul_(gradient_nC[:, -1:]).scatter_(1, ids_nK, gradient_nC[:, :-1])
    return Columns(per_token, *masses, kl_on, kl_off, entropy), gradient_nV


def score_all(logits: Logits, options: Options) -> tuple[Columns, Tensor]:
    """Score a chunk on every token. Same results as `score_set`."""
    log_p, log_q = logits.of_student().log_softmax(-1), logits.of_teacher().log_softmax(-1)
    per_token, gradient_nV = value_and_gradient(log_p, log_q, "all", options.beta)
    on = [log if options.token_ids is None else log[:, options.token_ids] for log in (log_p, log_q)]
    kl_on = _reverse_kl(*on)
    kl_off = entropy = torch.full_like(per_token, torch.nan)
    if options.statistics:
        kl_off = _reverse_kl(log_p, log_q) - kl_on
        entropy = -(log_p.exp() * log_p).sum(-1)
    student_mass, teacher_mass = (log.exp().sum(-1) for log in on)
    return Columns(per_token, student_mass, teacher_mass, kl_on, kl_off, entropy), gradient_nV


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
    """Return softmax(z) [n, V], in the place of `z_nV`, and log Σ exp z [n, 1].

    The softmax at the largest logit, at least 1/V, tells the log-sum-exp: one fused pass and one maximum,
    where `logsumexp` would make four passes and throw the exponentials away.
    """
    largest, where = z_nV.max(-1, keepdim=True)
    rho_nV = torch.softmax(z_nV, -1, out=z_nV)
    return rho_nV, largest - rho_nV.gather(1, where).log_()


class _LogSum:
    """log Σ exp over all tiles, each row relative to the largest logit so far."""

    def __init__(self) -> None:
        self._largest: Tensor | None = None
        self._sum: Tensor

    def add(self, z_nv: Tensor) -> None:
        """Add a tile [n, v], which is overwritten."""
        largest = z_nv.amax(-1, keepdim=True)
        if self._largest is None:
            self._largest, self._sum = largest, torch.zeros_like(largest)
        before, self._largest = self._largest, torch.maximum(self._largest, largest)
        self._sum.mul_((before - self._largest).exp_())
        self._sum.add_(z_nv.sub_(self._largest).exp_().sum(-1, keepdim=True))

    def value(self) -> Tensor:
        """Return [n, 1]."""
        return cast(Tensor, self._largest) + self._sum.log()
