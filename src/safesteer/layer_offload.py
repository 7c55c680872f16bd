"""Decoder layers whose weights wait in host memory and come to the device while their layer runs.

`accelerate.cpu_offload` does the same, but blocks on every tensor and empties the CUDA cache after it, some
ten times per layer: the student, which trains in between, would lose its cached blocks each time.
"""

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

HostWeights = Mapping[str, tuple[Tensor, torch.dtype]]
"""By name in the layer: a weight in host memory, and the dtype that it is computed with."""


class LayerOffload:
    """Brings one layer's weights at a time to the device; with CUDA the next one's too, while it computes.

    Between its turns a layer's weights are on the meta device: shapes, but no memory.

    Args:
        layers: The decoder layers, in the order they run in.
        weights: Of each of them, as `host_copy` makes them; weights that are not named are left where they
            are.
        device: Where the layers run.
    """

    def __init__(
        self, layers: Iterable[nn.Module], weights: Iterable[HostWeights], device: torch.device
    ) -> None:
        self._layers, self._weights, self._device = list(layers), list(weights), device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call, unused-ignore]
        for index, layer in enumerate(self._layers):
            self._drop(index)
            layer.register_forward_pre_hook(lambda *_, index=index: self._before(index))
            layer.register_forward_hook(lambda *_, index=index: self._drop(index), always_call=True)

    def _before(self, index: int) -> None:
        if not self._is_present(index):
            self._fetch(index)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            if index + 1 < len(self._layers) and not self._is_present(index + 1):
                self._fetch(index + 1)

    def _fetch(self, index: int) -> None:
        on_stream: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self._stream is not None:
            # The memory of a layer that was dropped is this stream's to use again, but only when the layer
            # has been computed; waiting for that also keeps a fast host from fetching all layers at once.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            on_stream = torch.cuda.stream(self._stream)
        with on_stream:
            for name, (weight, dtype) in self._weights[index].items():
                there = weight.to(self._device, non_blocking=True).to(dtype)
                _set(self._layers[index], name, there)

    def _drop(self, index: int) -> None:
        for name, (weight, dtype) in self._weights[index].items():
            _set(self._layers[index], name, torch.empty(weight.shape, dtype=dtype, device="meta"))

    def _is_present(self, index: int) -> bool:
        layer = self._layers[index]
        return not any(layer.get_parameter(name).is_meta for name in self._weights[index])


def host_copy(weight: Tensor, pinned: bool) -> tuple[Tensor, torch.dtype]:
    """Copy a weight to host memory, in half the bytes where none of its bits are lost.

    float32 weights that were loaded from a bfloat16 checkpoint are bfloat16 numbers still.

    Args:
        weight: On any device.
        pinned: In page-locked memory, from which a GPU copies faster and without the host waiting.

    Returns:
        The copy, and the weight's own dtype.
    """
    value = weight.detach()
    if value.dtype == torch.float32:
        narrow = value.bfloat16()
        if torch.equal(narrow.float(), value):
            value = narrow
    host = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=pinned)
    return host.copy_(value), weight.dtype


def _set(layer: nn.Module, name: str, value: Tensor) -> None:
    path, _, last = name.rpartition(".")
    setattr(layer.get_submodule(path), last, nn.Parameter(value, requires_grad=False))
