"""Edits of the residual stream while a model runs: add a vector at a layer, ablate a direction everywhere.

Both are context managers over PyTorch hooks. Nothing is left on the model when the block ends, exceptions
included. A layer's hooks run outside transformers' gradient checkpointing, those of its attention and MLP
inside it; so under checkpointing `ablate_direction` must still be active during the backward pass,
`add_vector` need not.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safesteer.errors import SafeSteerError
from safesteer.modeling import attention_and_mlp, decoder_layers, unwrapped

_PreHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


@contextlib.contextmanager
def add_vector(
    layer: nn.Module,
    vector: Tensor,
    coefficient: float | Tensor = 1.0,
    where: Callable[[], Tensor] | None = None,
) -> Iterator[None]:
    """Steer: `h ← h + c·r` at a layer's input.

    Method §2; activation addition is Turner et al. 2023, arXiv 2308.10248.

    Args:
        layer: A decoder layer (see `decoder_layers`).
        vector: `r`, shape [H]; or one per row, shape [B, H], for batches whose rows are steered differently.
        coefficient: `c`; or one per row, shape [B].
        where: Returns the positions of the running pass that are steered, [B, T] bool (see `last_occurrence`); all of
            them by default.

    Raises:
        SafeSteerError: While the model runs, if `vector` is not as wide as the residual stream, or what is per row
            meets a batch of another size.
    """
    c = torch.as_tensor(coefficient, dtype=torch.float32)
    if vector.dim() not in (1, 2) or c.dim() > 1:
        raise SafeSteerError(
            f"the steering vector has shape {list(vector.shape)} and its coefficient {list(c.shape)}, but "
            "they must be [H] and a number, or one of each per row, [B, H] and [B]."
        )

    def add(hidden_BTH: Tensor) -> Tensor:
        _check_width(vector, hidden_BTH)
        if c.dim() == 1:
            _check_rows("steering coefficient", c, hidden_BTH)
        if vector.dim() == 2:
            _check_rows("steering vector", vector, hidden_BTH)
        # The product in float32: c·r rounded once, not c and r rounded each.
        shift = c.to(hidden_BTH.device)[..., None] * vector.detach().to(hidden_BTH.device, torch.float32)
        if shift.dim() == 2:
            shift = shift[:, None]
        if where is not None:
            shift = shift * where().to(hidden_BTH.device)[..., None]
        return hidden_BTH + shift.to(hidden_BTH.dtype)

    handle = layer.register_forward_pre_hook(_edit_input(add), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def last_occurrence(input_ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """Mark where some tokens stand, one after the other, for the last time in each row.

    Args:
        input_ids: [B, T].
        tokens: One or more token ids.

    Returns:
        [B, T] bool; nothing is marked in a row without them.
    """
    length, width = len(tokens), input_ids.size(1)
    if width < length:
        return torch.zeros_like(input_ids, dtype=torch.bool)
    found_BW = (input_ids.unfold(1, length, 1) == torch.tensor(tokens, device=input_ids.device)).all(-1)
    starts_W = torch.arange(found_BW.size(1), device=input_ids.device)
    start_B1 = torch.where(found_BW, starts_W, -length).amax(-1, keepdim=True)
    since_start_BT = torch.arange(width, device=input_ids.device) - start_B1
    return (since_start_BT >= 0) & (since_start_BT < length)


@contextlib.contextmanager
def ablate_direction(layers: Iterable[nn.Module], direction: Tensor) -> Iterator[None]:
    """Ablate: `h ← h − r̂ r̂ᵀ h` wherever a layer reads from or writes to the residual stream.

    That is at every layer's input, attention output and MLP output (method §1; Arditi et al. 2024, §2.4).
    Where a layer has no attention or MLP module of its own (OPT keeps its MLP in the layer), its output is
    projected instead, which is the same for a residual stream that was clean at the layer's input.

    Args:
        layers: The decoder layers, usually all of them.
        direction: `r`, shape [H], of any length but zero; it is normalised here. Or one per row, shape [B, H], for
            batches whose rows are ablated differently.

    Raises:
        SafeSteerError: If `direction` is zero or not finite, or (while the model runs) not as wide as the
            stream, or per row of another batch size.
    """
    norm = direction.detach().float().norm(dim=-1, keepdim=True)
    if direction.dim() not in (1, 2) or not torch.isfinite(norm).all() or (norm == 0).any():
        raise SafeSteerError(
            f"the direction to ablate has shape {list(direction.shape)} and length {norm.min().item():g}, but must "
            "be a finite vector [H] other than zero, or one per row; choose another layer or position."
        )
    unit = direction.detach().float() / norm

    def project(hidden_BTH: Tensor) -> Tensor:
        _check_width(unit, hidden_BTH)
        # float32, because a bfloat16 projection leaves enough of r̂ behind to see.
        unit_H = unit.to(hidden_BTH.device)
        hidden = hidden_BTH.float()
        if unit_H.dim() == 1:
            along = (hidden @ unit_H).unsqueeze(-1)
        else:
            _check_rows("direction to ablate", unit_H, hidden_BTH)
            unit_H = unit_H.unsqueeze(1)
            along = hidden @ unit_H.mT
        ablated: Tensor = hidden - along * unit_H
        return ablated.to(hidden_BTH.dtype)

    with contextlib.ExitStack() as stack:
        for layer in layers:
            handle = layer.register_forward_pre_hook(_edit_input(project), with_kwargs=True)
            stack.callback(handle.remove)
            attention, mlp = attention_and_mlp(layer)
            writers = [module for module in (attention, mlp) if module is not None]
            for module in writers if len(writers) == 2 else [*writers, layer]:
                stack.callback(module.register_forward_hook(_edit_output(project)).remove)
        yield


@dataclass(frozen=True)
class Steering:
    """A steered model: which vector, at which layer's input, how strongly, and where (method §2).

    Attributes:
        vector: `r`, shape [H], unnormalised.
        layer: Index of the decoder layer at whose input it is added.
        coefficient: `c`.
        at: The ids of the post-instruction tokens, if only they are steered; empty for every position, the method's way.
            What is generated after them reads their keys and values, so steering lasts. Text without them is not steered.
    """

    vector: Tensor
    layer: int
    coefficient: float = 1.0
    at: tuple[int, ...] = ()

    @contextlib.contextmanager
    def applied(
        self, model: nn.Module, layer_path: str | None = None, rows: Tensor | None = None
    ) -> Iterator[None]:
        """Steer a model for the length of a block.

        Args:
            model: A causal language model, also under a `PeftModel`.
            layer_path: Where its decoder layers are, if they cannot be found (see `decoder_layers`).
            rows: Shape [B]; which rows of the batch are steered (bool), or how strongly relative to
                `coefficient`.

        Raises:
            SafeSteerError: If the model has no such layer.
        """
        layers = decoder_layers(model, layer_path)
        if not 0 <= self.layer < len(layers):
            raise SafeSteerError(
                f"the steering vector belongs to layer {self.layer} but {type(model).__name__} has "
                f"{len(layers)} layers; use the direction that was found on this model."
            )
        coefficient = self.coefficient if rows is None else self.coefficient * rows.float()
        positions = _running_positions(model, self.at) if self.at else contextlib.nullcontext()
        with positions as where, add_vector(layers[self.layer], self.vector, coefficient, where):
            yield


@contextlib.contextmanager
def _running_positions(model: nn.Module, tokens: Sequence[int]) -> Iterator[Callable[[], Tensor]]:
    """Give what tells where `tokens` stand in the pass that the model is making (see `last_occurrence`)."""
    ids: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids[:] = [args[0] if args else kwargs["input"]]

    handle = unwrapped(model).get_input_embeddings().register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield lambda: last_occurrence(ids[0], tokens)
    finally:
        handle.remove()


def _edit_input(edit: Callable[[Tensor], Tensor]) -> _PreHook:
    """Build a pre-hook that edits a layer's hidden states, passed first or by keyword."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args and isinstance(args[0], Tensor):
            return (edit(args[0]), *args[1:]), kwargs
        if isinstance(kwargs.get("hidden_states"), Tensor):
            return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}
        raise SafeSteerError(
            f"{type(module).__name__} takes its hidden states neither first nor as hidden_states=, so it "
            "cannot be steered; give the path of the decoder layers with --layer-path."
        )

    return hook


def _edit_output(edit: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any, Any], Any]:
    """Build a hook that edits a module's output: a tensor, or a tuple that starts with it."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return edit(output)
        return (edit(output[0]), *output[1:])

    return hook


def _check_width(vector: Tensor, hidden: Tensor) -> None:
    if vector.shape[-1] != hidden.shape[-1]:
        raise SafeSteerError(
            f"the vector has {vector.shape[-1]} components but the residual stream has {hidden.shape[-1]}; "
            "use a direction that was found on this model."
        )


def _check_rows(what: str, rows: Tensor, hidden: Tensor) -> None:
    if rows.shape[0] != hidden.shape[0] or hidden.dim() != 3:
        raise SafeSteerError(
            f"the {what} has {rows.shape[0]} rows but the hidden states have shape {list(hidden.shape)}; give one per "
            "row of the batch."
        )
