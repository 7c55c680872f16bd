"""The testbed's optimizer against PyTorch's own Muon and AdamW, and its orthogonal factors against the exact ones."""

import copy

import pytest
import torch
from torch import nn

from safesteer.testbed.muon import Muon, orthogonalized

LEARNING_RATE, BETAS, DECAY = 2e-3, (0.9, 0.98), 0.1


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 48), (2, 48, 16)])
def test_singular_values_are_near_one_and_directions_kept(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalized(matrices)
    # In the matrix's own singular basis what was found is diagonal, as the exact factor u v is.
    in_basis = u.mT @ found @ v.mT
    values = in_basis.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(in_basis, torch.diag_embed(values), atol=1e-9, rtol=0)


def network() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 48, bias=False), nn.Tanh(), nn.Linear(48, 16), nn.LayerNorm(16))
    model.add_module("embed", nn.Linear(16, 16, bias=False))
    return model


def train(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    """Five steps with gradients that do not depend on the weights."""
    torch.manual_seed(2)
    for _ in range(5):
        for weight in model.parameters():
            weight.grad = torch.randn_like(weight)
        for optimizer in optimizers:
            optimizer.step()


def test_steps_equal_those_of_pytorchs_muon_and_adamw() -> None:
    start = network()
    found, expected = copy.deepcopy(start), copy.deepcopy(start)
    train(found, Muon(found, LEARNING_RATE, betas=BETAS, weight_decay=DECAY))
    matrices = [expected.get_parameter(name) for name in ("0.weight", "2.weight")]
    others = [weight for weight in expected.parameters() if all(weight is not m for m in matrices)]
    train(
        expected,
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=BETAS, weight_decay=DECAY),
    )
    for name, weight in found.named_parameters():
        wanted = expected.get_parameter(name)
        moved = (wanted - start.get_parameter(name)).abs().max()
        assert moved > 1e-3
        # PyTorch finds its orthogonal factors in bfloat16, to some hundredths.
        tolerance = 0.05 if any(wanted is matrix for matrix in matrices) else 1e-5
        assert (weight - wanted).abs().max() < tolerance * moved, name
