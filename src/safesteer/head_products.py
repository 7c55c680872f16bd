"""Products with a language-model head: wide sums from narrow factors, forward and backward.

Factors are in the dtype of the hidden states (bfloat16 in training), results in float32; float64 stays
float64.

Shape suffixes: n tokens of a chunk, V vocabulary, H hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from safesteer.modeling import Head

_FLOAT32_OUT = torch.__version__ >= "2.8"  # when torch.mm learned to write float32 from bfloat16 factors


@dataclass(frozen=True)
class HeadProduct:
    """A head made ready for products.

    Attributes:
        weight: [V, H] in the dtype to multiply in.
        bias: [V] in the dtype of the results, or None.
        logit_scale: As in `Head`.
        softcap: As in `Head`.
        temperature: Divides the logits, after scale and softcap.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: float

    @classmethod
    def of(cls, head: Head, factors: torch.dtype, results: torch.dtype, temperature: float) -> "HeadProduct":
        """Prepare a head; its weight is copied only when its dtype is not `factors`."""
        bias = None if head.bias is None else head.bias.to(results)
        return cls(head.weight.to(factors), bias, head.logit_scale, head.softcap, temperature)

    def logits(self, hidden_nH: Tensor, tokens: slice = slice(None)) -> Tensor:
        """Return `cap(scale · (h Wᵀ + b)) / temperature` [n, V]: `Head.logits`, wider and divided.

        Args:
            hidden_nH: [n, H].
            tokens: Only their columns.
        """
        z_nV = _product(hidden_nH.to(self.weight.dtype), self.weight[tokens].T)
        if self.bias is not None:
            z_nV.add_(self.bias[tokens])
        if self.softcap is None:
            return z_nV if self.slope == 1 else z_nV.mul_(self.slope)
        return z_nV.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    @property
    def slope(self) -> float:
        """`∂ logits / ∂ (h Wᵀ + b)`, but for `curve`."""
        return self.logit_scale / self.temperature

    def curve(self, z_nV: Tensor) -> Tensor | None:
        """Return a softcap's share of `∂ logits / ∂ (h Wᵀ + b)`, `1 − tanh²` [n, V], from the logits."""
        if self.softcap is None:
            return None
        tanh = z_nV * (self.temperature / self.softcap)
        return tanh.square_().neg_().add_(1)


@dataclass(frozen=True)
class HeadGradients:
    """Gradients of a weighted sum over tokens, in the dtype of the results; None where not wanted.

    Attributes:
        hidden: [N, H].
        weight: [V, H].
        bias: [V].
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def add(
        self, rows: Tensor, weights_n: Tensor, gradient_nV: Tensor, hidden_nH: Tensor, weight_VH: Tensor
    ) -> None:
        """Add a chunk.

        The weights enter on the [n, H] side: they may be as small as one over all tokens of a step, which
        float16 factors would lose.

        Args:
            rows: [n] the chunk's places in `hidden`.
            weights_n: [n] each token's factor in the sum, times `HeadProduct.slope`.
            gradient_nV: [n, V] with respect to the logits, times `HeadProduct.curve` where there is one.
            hidden_nH: [n, H].
            weight_VH: [V, H] in the dtype to multiply in.
        """
        if self.bias is not None:
            self.bias.add_(weights_n @ gradient_nV)
        factor_nV = gradient_nV.to(weight_VH.dtype)
        if self.hidden is not None:
            self.hidden[rows] = _product(factor_nV, weight_VH).mul_(weights_n[:, None])
        if self.weight is not None:
            weighted_nH = (hidden_nH * weights_n[:, None]).to(factor_nV.dtype)
            if factor_nV.dtype != self.weight.dtype and _FLOAT32_OUT:
                torch.addmm(
                    self.weight, factor_nV.T, weighted_nH, out_dtype=self.weight.dtype, out=self.weight
                )
            else:
                self.weight.addmm_(factor_nV.T.to(self.weight.dtype), weighted_nH.to(self.weight.dtype))


def factor_dtype(hidden: Tensor, results: torch.dtype) -> torch.dtype:
    """Return the dtype to multiply in: the hidden states' or autocast's where its sums can be kept wider.

    That is on CUDA. Elsewhere, and for float64, factors are as wide as results.
    """
    kind = hidden.device.type
    if kind != "cuda" or results == torch.float64:
        return results
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right` in float32 (float64), not rounded to the factors' dtype on the way."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32) if _FLOAT32_OUT else (left @ right).float()
