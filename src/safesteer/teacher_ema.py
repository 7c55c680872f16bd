"""A safety teacher that follows the student (method §2)."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

from safesteer.artifacts import read_tensors, write_tensors
from safesteer.steering import Steering
from safesteer.teacher import FrozenCopyTeacher, adapter_off

_FILE = "safesteer_teacher.safetensors"


class EmaTeacher(FrozenCopyTeacher):
    """A copy that follows the student: `θ ← (1−α)·θ + α·θs` after each optimizer step (method §2).

    With LoRA the copy carries the adapter, and the average runs over the adapter's two factors.

    Args:
        model: The copy.
        steering: What turns it into the safety teacher.
        rate: `α`.
        layer_path: Where the decoder layers are, if they cannot be found.
    """

    def __init__(
        self, model: nn.Module, steering: Steering | None, rate: float, layer_path: str | None = None
    ) -> None:
        super().__init__(model, steering, layer_path)
        self.rate = rate
        self._averages: dict[str, Tensor] = {}

    @torch.no_grad()
    def completion_hidden_states(
        self,
        student: nn.Module,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        steered: Tensor,
    ) -> Tensor:
        """Score responses with the copy, and anchors with its adapter off: by the base model (see `Teacher`).

        A fully trained copy has no base model left in it: there anchors are scored by the unsteered average.
        """
        inputs = (prompt_ids, prompt_mask, completion_ids, completion_mask, steered)
        copy = self.unwrapped()
        if not isinstance(copy, PeftModel) or bool(steered.all()):
            return super().completion_hidden_states(student, *inputs)
        with adapter_off(copy):
            anchors = super().completion_hidden_states(student, *(tensor[~steered] for tensor in inputs))
        if not steered.any():
            return anchors
        hidden = anchors.new_empty(len(steered), *anchors.shape[1:])
        hidden[~steered] = anchors
        hidden[steered] = super().completion_hidden_states(student, *(tensor[steered] for tensor in inputs))
        return hidden

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move the teacher towards the student.

        Args:
            student: The model in training, unwrapped; its trainable parameters are followed.
        """
        mine = dict(self.unwrapped().named_parameters())
        for name, theirs in student.named_parameters():
            if theirs.requires_grad:
                average = self._average(name, mine[name])
                mine[name].copy_(average.lerp_(theirs.detach().float(), self.rate))

    def averages(self, student: nn.Module) -> dict[str, Tensor]:
        """Return the averages in float32, by the names of the student's trainable parameters."""
        mine = dict(self.unwrapped().named_parameters())
        return {
            name: self._average(name, mine[name])
            for name, theirs in student.named_parameters()
            if theirs.requires_grad
        }

    @torch.no_grad()
    def load_averages(self, averages: Mapping[str, Tensor]) -> None:
        """Take up averages again that `averages` returned."""
        mine = dict(self.unwrapped().named_parameters())
        for name, value in averages.items():
            mine[name].copy_(self._average(name, mine[name]).copy_(value))

    def _average(self, name: str, parameter: nn.Parameter) -> Tensor:
        # In float32 (the parameter itself where it is float32): bfloat16 would round small steps away.
        return self._averages.setdefault(name, parameter.detach().float())


def save_teacher(folder: Path, teacher: EmaTeacher, student: nn.Module, token_ids: Tensor | None) -> None:
    """Save what an EMA teacher has become, beside the checkpoint of the student it follows.

    Args:
        folder: The checkpoint's folder.
        teacher: Its averages and its steering are saved.
        student: The model in training, unwrapped.
        token_ids: The safety tokens in use, [K]; None if there are none.
    """
    tensors = {f"average.{name}": value for name, value in teacher.averages(student).items()}
    metadata = {}
    if teacher.steering is not None:
        tensors["vector"] = teacher.steering.vector
        metadata = {
            "layer": str(teacher.steering.layer),
            "coefficient": repr(teacher.steering.coefficient),
            "at": json.dumps(teacher.steering.at),
        }
    if token_ids is not None:
        tensors["token_ids"] = token_ids
    write_tensors(folder / _FILE, tensors, metadata)


def load_teacher(folder: Path, teacher: EmaTeacher, device: torch.device) -> Tensor | None:
    """Take up again what `save_teacher` saved.

    Returns:
        The safety tokens that were in use, on `device`.

    Raises:
        SafeSteerError: If the checkpoint has no teacher, because a run with another kind saved it.
    """
    tensors, metadata = read_tensors(folder / _FILE)
    teacher.load_averages(
        {
            name.removeprefix("average."): value
            for name, value in tensors.items()
            if name.startswith("average.")
        }
    )
    if "vector" in tensors:
        teacher.steering = Steering(
            tensors["vector"],
            int(metadata["layer"]),
            float(metadata["coefficient"]),
            tuple(json.loads(metadata.get("at", "[]"))),
        )
    ids = tensors.get("token_ids")
    return None if ids is None else ids.to(device)
