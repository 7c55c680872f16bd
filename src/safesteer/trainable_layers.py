"""Depth localization: train only the layers from the steered one on (method §6.2, §6.7).

Below the steered layer teacher and base model compute the same, so what the student must learn can be learnt
above it, and the frozen part needs no backward pass.
"""

import copy
from typing import Any, cast

from peft import PeftConfig
from torch import nn

from safesteer.errors import SafeSteerError
from safesteer.modeling import backbone, decoder_layers, language_head


def freeze_below(model: nn.Module, layer: int, layer_path: str | None = None) -> None:
    """Freeze everything below a layer, for full fine-tuning.

    What stays trainable: the layers from `layer` on, the final norm, and the language-model head unless it is
    tied to the embeddings (training it would then change the model's input).

    Args:
        model: A causal language model without adapter.
        layer: Index of the first layer to train.
        layer_path: Where the decoder layers are, if they cannot be found.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    trained = [
        parameter
        for kept in list(decoder_layers(model, layer_path))[layer:]
        for parameter in kept.parameters()
    ]
    for parent in (backbone(model), *backbone(model).children()):
        for name, child in parent.named_children():
            if ("norm" in name or name == "ln_f") and "embed" not in name:
                trained += child.parameters()
    head = language_head(model)
    trained += [tensor for tensor in (head.weight, head.bias) if isinstance(tensor, nn.Parameter)]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(id(parameter) not in embeddings)


def adapter_from(
    config: PeftConfig, model: nn.Module, layer: int, layer_path: str | None = None
) -> PeftConfig:
    """Restrict a LoRA config to the layers from a given one on.

    Args:
        config: The adapter asked for; left as it is.
        model: The model without adapter.
        layer: Index of the first layer that gets an adapter.
        layer_path: Where the decoder layers are, if they cannot be found.

    Returns:
        A copy with `layers_to_transform` set to `layer … L-1`, or to those of them that were asked for.

    Raises:
        SafeSteerError: If the config names its modules by a regular expression, which PEFT cannot combine
            with layers, has no such setting, or asks for none of these layers.
    """
    if not hasattr(config, "layers_to_transform"):
        raise SafeSteerError(
            f"train_layers from_steered cannot restrict a {type(config).__name__}; use a LoraConfig or "
            "train all layers."
        )
    restricted: Any = copy.copy(config)
    if isinstance(restricted.target_modules, str) and restricted.target_modules != "all-linear":
        raise SafeSteerError(
            "train_layers from_steered cannot restrict an adapter whose target_modules is a regular "
            'expression; give a list of module names or "all-linear".'
        )
    layers = decoder_layers(model, layer_path)
    asked = restricted.layers_to_transform
    wanted = range(len(layers)) if asked is None else [asked] if isinstance(asked, int) else asked
    kept = [index for index in wanted if index >= layer]
    if not kept:
        raise SafeSteerError(
            f"the adapter's layers_to_transform {asked} leave none from the steered layer {layer} on; "
            "widen them or set train_layers to all."
        )
    restricted.layers_to_transform = kept
    # Named, because PEFT could otherwise take another number in a module's name for its layer (an expert's).
    restricted.layers_pattern = [_list_name(model, layers)]
    return cast(PeftConfig, restricted)


def _list_name(model: nn.Module, layers: nn.ModuleList) -> str:
    path: str = next(name for name, module in model.named_modules() if module is layers)
    return path.rpartition(".")[2]
