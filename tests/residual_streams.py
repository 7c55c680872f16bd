"""Residual streams of tiny models: what the final norm returns, and the same with a layer's input edited by hand."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from safesteer.modeling import backbone, decoder_layers

HIDDEN = 32


def random_ids(batch: int = 3, length: int = 7) -> Tensor:
    """Token ids of a batch."""
    return torch.randint(3, 160, (batch, length))


def _final_norm(model: PreTrainedModel) -> nn.Module:
    inner = model.base_model
    return inner.final_layer_norm if hasattr(inner, "final_layer_norm") else inner.norm


@torch.no_grad()
def steered_by_hand(model: PreTrainedModel, ids: Tensor, layer: int, shift: Tensor) -> Tensor:
    """Run the layers one by one, adding `shift` to one layer's input, and return the final hidden states."""
    calls: list[tuple[Any, dict[str, Any]]] = []
    layers = decoder_layers(model)
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        for module in layers
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    hidden = calls[0][0][0]
    for index, (module, (args, kwargs)) in enumerate(zip(layers, calls, strict=True)):
        if index == layer:
            hidden = hidden + shift
        output = module(hidden, *args[1:], **kwargs)
        hidden = output if isinstance(output, Tensor) else output[0]
    return _final_norm(model)(hidden)


@torch.no_grad()
def final_hidden(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the final norm's output."""
    return backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
