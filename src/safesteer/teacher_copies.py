"""Second copies of the base model that take little of the device's memory, for full fine-tuning.

Both are made layer by layer from the student, while it still is the base model, so that a second copy in
full precision never exists on the device. Weights that are not trained are not copied but shared with the
student: below the steered layer, that is all of them when `train_layers` is `from_steered`.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from safesteer.choices import TeacherCopy
from safesteer.errors import SafeSteerError
from safesteer.int8_linear import Int8Linear
from safesteer.layer_offload import LayerOffload, host_copy
from safesteer.modeling import decoder_layers


def copy_of_kind(
    kind: TeacherCopy, model: nn.Module, device: torch.device, layer_path: str | None, *, sharded: bool
) -> nn.Module:
    """Copy a model: whole, offloaded or quantized.

    Args:
        kind: Of copy.
        model: A causal language model; it is left as it is.
        device: Where it runs.
        layer_path: Where the decoder layers are, if they cannot be found.
        sharded: Whether FSDP or DeepSpeed divides it among devices.

    Raises:
        SafeSteerError: If a copy of that kind cannot be made of a model that is divided.
    """
    if kind == "same":
        return copy.deepcopy(model)
    if sharded or len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise SafeSteerError(
            f"teacher_copy {kind} cannot be made of a model that FSDP, DeepSpeed or a device map divides "
            "among devices; leave it at same, which divides the copy too."
        )
    return offloaded_copy(model, device, layer_path) if kind == "cpu" else quantized_copy(model, layer_path)


def offloaded_copy(model: nn.Module, device: torch.device, layer_path: str | None = None) -> nn.Module:
    """Copy a model so that its decoder layers wait in host memory and run on the device, one at a time.

    Its hidden states are those of the model, bit by bit. Embeddings, final norm and head are copied to the
    device: the divergence reads the head in every step.

    Args:
        model: A causal language model that no wrapper has sharded, on `device`; it is left as it is.
        device: Where it runs.
        layer_path: Where the decoder layers are, if they cannot be found.
    """
    stand_ins: dict[int, Any] = {}
    weights = []
    for layer in decoder_layers(model, layer_path):
        trained = {name: weight for name, weight in layer.named_parameters() if weight.requires_grad}
        weights.append({name: host_copy(weight, device.type == "cuda") for name, weight in trained.items()})
        for weight in trained.values():
            stand_ins[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
    second = _copy(model, stand_ins)
    LayerOffload(decoder_layers(second, layer_path), weights, device)  # its hooks on the layers keep it
    return second


def quantized_copy(model: nn.Module, layer_path: str | None = None) -> nn.Module:
    """Copy a model with its decoder layers' linear maps in eight bits (see `Int8Linear`).

    Everything else keeps its precision: embeddings, norms, head, and experts that are held in one parameter
    rather than in linear maps.

    Args:
        model: A causal language model that no wrapper has sharded; it is left as it is.
        layer_path: Where the decoder layers are, if they cannot be found.
    """
    return _copy(
        model,
        {
            id(module): Int8Linear(module)
            for layer in decoder_layers(model, layer_path)
            for module in layer.modules()
            if type(module) is nn.Linear and module.weight.requires_grad
        },
    )


def _copy(model: nn.Module, stand_ins: Mapping[int, Any]) -> nn.Module:
    """Copy a model; weights that are not trained are shared, and stand-ins go where the originals' ids are."""
    shared = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
    second = copy.deepcopy(model, {**shared, **stand_ins})
    return second.eval().requires_grad_(False)
