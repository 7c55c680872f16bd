"""Depth localization: train only the layers from the steered one on (method §6.2, §6.7).

Below the steered layer teacher and base model compute the same, so what the student must learn can be learnt
above it, and the frozen part needs no backward pass.
"""

import copy
import re
from typing import Any, cast

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from safesteer.choices import from_steered_layer
from safesteer.errors import SafeSteerError
from safesteer.modeling import backbone, decoder_layers, language_head
from safesteer.steering import Steering
from safesteer.trainer_config import SafeSteerConfig


def first_trained_layer(
    model: nn.Module, args: SafeSteerConfig, steering: Steering | None, peft_config: PeftConfig | None
) -> int | None:
    """Return the index of the first layer to train, which is the steered one; None to train all there is.

    Args:
        model: The model as it was given.
        args: For `train_layers`; auto leaves alone what cannot be restricted: an adapter that the model has already, one of
            another kind than LoRA, or one that was asked for on lower layers only.
        steering: The teacher's steering, if it is steered.
        peft_config: The adapter asked for.
    """
    if steering is None or not from_steered_layer(args.train_layers, args.teacher, args.refresh_steps):
        return None
    if args.train_layers == "auto" and (
        isinstance(model, PeftModel)
        or not (peft_config is None or hasattr(peft_config, "exclude_modules"))
        or _asks_below_only(peft_config, steering.layer)
    ):
        return None
    return steering.layer


def _asks_below_only(config: PeftConfig | None, layer: int) -> bool:
    asked = getattr(config, "layers_to_transform", None)
    return asked is not None and max([asked] if isinstance(asked, int) else asked) < layer


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
    """Restrict an adapter to the layers from a given one on.

    Not by `layers_to_transform`: PEFT passes over that for modules it knows by their full names, which is how
    it reads "all-linear" on some models.

    Args:
        config: The adapter asked for; left as it is.
        model: The model without adapter.
        layer: Index of the first layer that gets an adapter.
        layer_path: Where the decoder layers are, if they cannot be found.

    Returns:
        A copy whose `exclude_modules` hold the layers below, besides what was excluded already.

    Raises:
        SafeSteerError: If the config cannot exclude modules, or asks for layers below only.
    """
    if not hasattr(config, "exclude_modules"):
        raise SafeSteerError(
            f"train_layers from_steered cannot restrict a {type(config).__name__}; use a LoraConfig or "
            "train all layers."
        )
    asked: Any = config
    if _asks_below_only(config, layer):
        raise SafeSteerError(
            f"the adapter's layers_to_transform {asked.layers_to_transform} leave none from the steered layer {layer} on; "
            "widen them or set train_layers to all."
        )
    if layer == 0:
        return config
    path = re.escape(_path_of_layers(model, layer_path))
    return _excluding(config, rf"{path}\.({'|'.join(map(str, range(layer)))})\..*")


def adapter_of_decoder(config: PeftConfig, model: nn.Module, layer_path: str | None = None) -> PeftConfig:
    """Keep an adapter for "all-linear" off a vision tower: no prompt here has an image.

    Args:
        config: The adapter asked for; left as it is.
        model: The model without adapter.
        layer_path: Where the decoder layers are, if they cannot be found.

    Returns:
        The config itself for models of text alone, and for modules that were named.
    """
    if getattr(config, "target_modules", None) != "all-linear":
        return config
    path = _path_of_layers(model, layer_path)
    decoder = path.removesuffix(path.rpartition(".")[2])
    head = language_head(model).weight
    outside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight is not head and not name.startswith(decoder)
    ]
    return _excluding(config, "|".join(map(re.escape, outside))) if outside else config


def _path_of_layers(model: nn.Module, layer_path: str | None) -> str:
    layers = decoder_layers(model, layer_path)
    path: str = next(name for name, module in model.named_modules() if module is layers)
    return path


def _excluding(config: PeftConfig, pattern: str) -> PeftConfig:
    """A copy that leaves out the modules whose whole names match `pattern`, besides those left out already."""
    restricted: Any = copy.copy(config)
    excluded = restricted.exclude_modules or []
    if not isinstance(excluded, str):
        excluded = "|".join(rf"(.*\.)?{re.escape(name)}" for name in sorted(excluded))
    restricted.exclude_modules = f"({excluded})|({pattern})" if excluded else pattern
    return cast(PeftConfig, restricted)


def remove_adapters_below(model: nn.Module, layer: int, layer_path: str | None = None) -> None:
    """Take adapters off the layers below a given one.

    What is left there after `adapter_from` are the adapters of a mixture's experts, which are parameters
    rather than modules and so cannot be excluded.
    """
    for lower in list(decoder_layers(model, layer_path))[:layer]:
        modules = dict(lower.named_modules())
        for path, module in modules.items():
            parent, _, name = path.rpartition(".")
            if isinstance(module, BaseTunerLayer) and not isinstance(modules[parent], BaseTunerLayer):
                setattr(modules[parent], name, module.get_base_layer())
