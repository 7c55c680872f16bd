"""Find the parts of a model: decoder layers, attention, MLP, backbone, language-model head.

Everything here works on any decoder-only model of transformers, bare or under a `PeftModel`.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from safesteer.artifacts import fingerprint
from safesteer.errors import SafeSteerError
from safesteer.few_rows import few_rows_linear

_ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention", "linear_attn", "mamba", "conv")
_MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "moe")
_SAMPLES_PER_WEIGHT = 64


def decoder_layers(model: nn.Module, path: str | None = None) -> nn.ModuleList:
    """Find the decoder layers, the modules that read and write the residual stream in turn.

    Args:
        model: A causal language model, also under a `PeftModel`, also the text part of a multimodal one.
        path: Where they are, counted from the model without PEFT, such as "model.layers" or "transformer.h".
            Without it they are the one list of as many modules as the config has layers.

    Raises:
        SafeSteerError: If there is no such list, or more than one.
    """
    inner = unwrapped(model)
    if path is not None:
        try:
            layers = inner.get_submodule(path)
        except AttributeError:
            layers = None
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            raise SafeSteerError(
                f"the layer path {path!r} of {type(inner).__name__} leads to "
                f"{'nothing' if layers is None else type(layers).__name__}, not to a list of layers; "
                f"try one of: {', '.join(_module_lists(inner)) or 'none found'}."
            )
        return layers
    count = _text_config_number(inner, "num_hidden_layers")
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
    lists = _module_lists(decoder)
    # Only the outermost lists: a mixture of experts may have as many experts as the model has layers.
    outermost = {
        name: found
        for name, found in lists.items()
        if len(found) == count and not any(name.startswith(f"{other}.") for other in lists if other != name)
    }
    if len(outermost) != 1:
        raise SafeSteerError(
            f"{type(inner).__name__}: found {len(outermost)} lists of {count} decoder layers instead of one; "
            f"name it with --layer-path, one of: {', '.join(_module_lists(inner)) or 'none found'}."
        )
    return next(iter(outermost.values()))


def attention_and_mlp(layer: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Find a decoder layer's attention (or whatever mixes positions) and its MLP (or mixture of experts).

    Returns:
        The two modules, None where the layer has no module of its own for it.
    """
    children = dict(layer.named_children())
    attention = next((children[name] for name in _ATTENTION_NAMES if name in children), None)
    mlp = next((children[name] for name in _MLP_NAMES if name in children), None)
    return attention, mlp


def backbone(model: nn.Module) -> nn.Module:
    """Return the model below its language-model head.

    Called with `input_ids` and `attention_mask` it returns an object whose `last_hidden_state` [B, T, H] is
    what the head reads, the final norm applied. Under a `PeftModel` the adapters stay in effect, since they
    live inside it.

    Raises:
        SafeSteerError: If the model does not tell its backbone from its head.
    """
    inner = unwrapped(model)
    found = getattr(inner, "base_model", inner)
    if found is inner or not isinstance(found, nn.Module):
        raise SafeSteerError(
            f"{type(inner).__name__} does not tell its backbone from its head (no base_model); "
            "load the model as a causal language model of transformers."
        )
    return found


@dataclass(frozen=True)
class Head:
    """A language-model head: hidden states to logits.

    Attributes:
        weight: [V, H].
        bias: [V] or None.
        logit_scale: Factor on the logits (Cohere, Granite, Falcon-H1 and others).
        softcap: `s` of `s·tanh(logits / s)`, applied after the scale (Gemma).
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states [..., H] to logits [..., V], in the head's dtype."""
        logits = few_rows_linear(hidden.to(self.weight.dtype), self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def language_head(model: nn.Module) -> Head:
    """Read the language-model head and what the model does to its logits.

    The scale and the cap are read from the config as `trl.DistillationTrainer` reads them. A head that
    FSDP2 or ZeRO-3 has sharded is to be read inside `head_gathered`; outside, FSDP2's is gathered for every
    call and gets no gradient. Under a `PeftModel` whose `modules_to_save` hold the head, the trained copy is
    returned while the adapter is on and the original while it is off.

    Raises:
        SafeSteerError: If the model has no output embeddings, or an adapter sits on them.
    """
    inner = unwrapped(model)
    module = _head_module(model)
    if isinstance(module, BaseTunerLayer) and module.active_adapters and not module.disable_adapters:
        raise SafeSteerError(
            "an adapter sits on the language-model head, which the divergence reads as one matrix; leave the "
            'head out of target_modules (target_modules="all-linear" does).'
        )
    config: Any = inner.config.get_text_config()
    bias = getattr(module, "bias", None)
    return Head(
        weight=_gathered(module.weight),
        bias=None if bias is None else _gathered(bias),
        logit_scale=_logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


@contextlib.contextmanager
def head_gathered(model: nn.Module) -> Iterator[None]:
    """Hold a model's head whole for a block where FSDP2 or ZeRO-3 keeps it in shards.

    The divergence reads the head without calling it, so their hooks need not have gathered it. The gradient
    to a trained head is reduced to the shards as any other, if the block runs inside the forward pass of the
    model's wrapper. Elsewhere, and for a head that is whole already, nothing happens.

    Raises:
        SafeSteerError: If the model has no output embeddings.
    """
    module = _head_module(model)
    weight, bias = module.weight, getattr(module, "bias", None)
    if isinstance(module, FSDPModule) and isinstance(weight, DTensor):
        module.unshard()
        try:
            yield
        finally:
            module.reshard()
    else:
        with _zero3_gathered(weight, bias):
            yield


def unwrapped(model: nn.Module) -> Any:
    """Return the transformers model under any `PeftModel`, `DistributedDataParallel` or compiled wrapper.

    Typed loosely, because transformers leaves the methods called on it here untyped.
    """
    inner: Any = model
    while True:
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        else:
            return inner


def hidden_size(model: nn.Module) -> int:
    """Return the width `H` of the residual stream."""
    return _text_config_number(unwrapped(model), "hidden_size")


def model_fingerprint(model: nn.Module) -> str:
    """Identify a base model by its config and weights, so that artifacts are never used with another model.

    It covers the config and every base weight's name, shape, dtype and a strided sample of its values: a few
    milliseconds per gigabyte, and full fine-tuning changes it. Adapters are left out, so a model has the same
    fingerprint bare and under a `PeftModel`.

    Returns:
        A SHA-256 in hexadecimal.
    """
    inner = unwrapped(model)
    config = inner.config.to_dict() if hasattr(inner, "config") else {}
    digest = hashlib.sha256(fingerprint(_identity(config)).encode())
    weights: dict[int, tuple[str, Tensor]] = {}
    for name, weight in _base_weights(inner):
        weights.setdefault(id(weight), (name, weight))  # tied weights count once
    samples: dict[torch.device, list[Tensor]] = {}
    for name, weight in sorted(weights.values(), key=lambda pair: pair[0]):
        with _zero3_gathered(weight):
            digest.update(f"{name} {list(weight.shape)} {weight.dtype}\n".encode())
            if weight.device.type != "meta":
                flat = _gathered(weight.detach()).reshape(-1)
                stride = max(1, flat.numel() // _SAMPLES_PER_WEIGHT)
                samples.setdefault(flat.device, []).append(flat[::stride][:_SAMPLES_PER_WEIGHT].float())
    for parts in samples.values():
        # One copy per device: a copy per weight would wait for the GPU hundreds of times.
        digest.update(torch.cat(parts).cpu().numpy().tobytes())
    return digest.hexdigest()


def _module_lists(module: nn.Module) -> dict[str, nn.ModuleList]:
    return {
        name: found
        for name, found in module.named_modules()
        if isinstance(found, nn.ModuleList) and len(found)
    }


def _text_config_number(model: nn.Module, name: str) -> int:
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    value = getattr(text_config, name, None)
    if not isinstance(value, int):
        raise SafeSteerError(
            f"the config of {type(model).__name__} has no {name}; load the model as a causal language model "
            "of transformers."
        )
    return value


def _logit_scale(config: Any) -> float:
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            return float(scale)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies.
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def _head_module(model: nn.Module) -> Any:
    inner = unwrapped(model)
    module = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if module is None:
        raise SafeSteerError(
            f"{type(inner).__name__} has no language-model head; load it as a causal language model of "
            "transformers."
        )
    return module


def _gathered(tensor: Tensor) -> Tensor:
    """Return a plain tensor: FSDP2 keeps sharded ones."""
    # Without gradient, since `full_tensor` would hand each shard its own process's instead of the average.
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


def _zero3_gathered(*weights: Tensor | None) -> contextlib.AbstractContextManager[None]:
    sharded = [weight for weight in weights if hasattr(weight, "ds_status")]  # DeepSpeed's mark
    if not sharded:
        return contextlib.nullcontext()
    from trl.trainer.utils import maybe_gather_lm_head_ctx  # here, because it is slow to import

    context: contextlib.AbstractContextManager[None] = maybe_gather_lm_head_ctx(*sharded)
    return context


# What a config says about how, not what, a model computes.
_NOT_IDENTITY = re.compile(
    r"^_|^(transformers_version|dtype|torch_dtype|use_cache|architectures|output_.*|return_dict)$"
)


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """Reduce a config to what decides the model's function, with string keys throughout."""
    return {
        str(key): _identity(value) if isinstance(value, dict) else repr(value)
        for key, value in config.items()
        if not _NOT_IDENTITY.match(str(key))
    }


def _base_weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters a model has without its adapters, under the names they have without them."""
    if isinstance(module, BaseTunerLayer) and isinstance(module.base_layer, nn.Module):
        yield from _base_weights(module.base_layer, prefix)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        yield from _base_weights(module.original_module, prefix)
    else:
        for name, weight in module.named_parameters(recurse=False):
            yield prefix + name, weight
        for name, child in module.named_children():
            yield from _base_weights(child, f"{prefix}{name}.")


@contextlib.contextmanager
def evaluation_flags(model: nn.Module) -> Iterator[None]:
    """Turn dropout off for a block, and give every submodule its own training flag back afterwards.

    A plain `.eval()` on a module that teacher and student share would leave the student without dropout.
    """
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = False
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
