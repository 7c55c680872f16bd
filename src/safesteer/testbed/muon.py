"""Muon for the testbed's matrices, AdamW for the rest of its weights, as one optimizer.

A momentum step is replaced by the nearest orthogonal matrix, found by five Newton–Schulz iterations (K. Jordan et al., 2024). The
arithmetic of `torch.optim.Muon`, which works a matrix at a time in bfloat16: a CPU without such units spends more time there than
on the model. Here matrices of one shape go together, in their own precision.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """The orthogonal factor of each of `matrices` [n, rows, columns], roughly: singular values between 0.7 and 1.2."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """AdamW, but parameter groups with `orthogonal=True` take Muon's step, scaled to the size of AdamW's."""

    def __init__(self, model: nn.Module, lr: float, momentum: float = 0.95, **adamw: Any) -> None:
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        chosen = set(matrices)
        others = [p for p in model.parameters() if p not in chosen]
        groups = [
            {"params": matrices, "orthogonal": True, "momentum": momentum},
            {"params": others, "orthogonal": False, "momentum": momentum},
        ]
        super().__init__(groups, lr=lr, **adamw)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step; `closure` as in `torch.optim.Optimizer`."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            if group["orthogonal"]:
                self._orthogonal_step(group)
        # AdamW passes over the matrices: they have no gradient any more.
        super().step()
        return loss

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        alike: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for weight in group["params"]:
            gradient, weight.grad = weight.grad, None
            if gradient is None:
                continue
            if not self.state[weight]:
                # AdamW, which loads this state again when a training is resumed, looks for a step in it.
                self.state[weight] = {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(weight)}
            average = self.state[weight]["momentum_buffer"].lerp_(gradient, 1 - momentum)
            alike[weight.shape].append((weight, gradient.lerp(average, momentum)))
        for shape, pairs in alike.items():
            steps = orthogonalized(torch.stack([direction for _, direction in pairs]))
            for (weight, _), step in zip(pairs, steps, strict=True):
                weight.mul_(1 - lr * group["weight_decay"])
                weight.add_(step, alpha=-0.2 * lr * max(shape) ** 0.5)
