"""One forward pass for teacher and student below the steered layer (method §6.2).

When only the layers from the steered one on are trained, teacher and student agree on everything below it:
the teacher's pass computes it and the student's takes it over.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from safesteer.modeling import decoder_layers


class LowerLayers:
    """What the layers below a given one made of a batch, kept from one model's pass for another's.

    Args:
        count: How many layers, from the first on, are shared.
        layer_path: Where the decoder layers are, if they cannot be found.
    """

    def __init__(self, count: int, layer_path: str | None = None) -> None:
        self.count = count
        self.layer_path = layer_path
        self._output: Any = None

    @contextlib.contextmanager
    def recorded(self, model: nn.Module) -> Iterator[None]:
        """Keep what the last shared layer returns when `model` runs in the block."""
        if self.count == 0:
            yield
            return

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._output = output

        handle = decoder_layers(model, self.layer_path)[self.count - 1].register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def reused(self, model: nn.Module) -> Iterator[None]:
        """Let the shared layers return what was recorded, uncomputed, when `model` runs on the same batch."""
        output, self._output = self._output, None

        def recorded_output(*_: Any, **__: Any) -> Any:
            return output

        shared = list(decoder_layers(model, self.layer_path))[: self.count]
        own = [vars(layer).get("forward") for layer in shared]
        for layer in shared:
            layer.forward = recorded_output
        try:
            yield
        finally:
            for layer, forward in zip(shared, own, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward


def can_share(model: nn.Module) -> bool:
    """Tell whether a model's layers hand nothing but their output to the layers above.

    Gemma 3n's later layers read keys and values that earlier ones left aside.
    """
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return not getattr(text_config, "num_kv_shared_layers", 0)
