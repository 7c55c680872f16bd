"""What happens around optimizer steps: gradients checked, teacher moved, refusal rates probed."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from trl.models import unwrap_model_for_generation

from safesteer.chat import generate
from safesteer.errors import SafeSteerError
from safesteer.modeling import evaluation_flags
from safesteer.refusals import is_refusal
from safesteer.steering import Steering
from safesteer.teacher_ema import EmaTeacher

if TYPE_CHECKING:
    from safesteer.trainer import SafeSteerTrainer

Refresh = Callable[[nn.Module], tuple[Steering, Sequence[int]]]
"""Given the teacher's model, find its direction and its safety tokens anew."""


@dataclass(frozen=True)
class ProbeSets:
    """Prompts whose refusal rates are watched during training; best not those trained on."""

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]


@dataclass(frozen=True)
class ProbeResult:
    """Refusal rates, between 0 and 1, after a number of optimizer steps; NaN for an empty set."""

    step: int
    harmful_refusal_rate: float
    harmless_refusal_rate: float


class ProbeCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Measure the student's refusal rates on the probe prompts.

    That is before training, every `probe_steps`, and after the last step. Responses are greedy and short; a
    refusal is what `is_refusal` matches. The rates are logged as `probe/harmful_refusal_rate` and
    `probe/harmless_refusal_rate` and kept in `results`.
    """

    def __init__(self, trainer: "SafeSteerTrainer", probe: ProbeSets) -> None:
        self.trainer = trainer
        self.probe = probe
        self.results: list[ProbeResult] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Measure the model as it is before training."""
        if state.global_step == 0:
            self.trainer.log(self._measure(0))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Measure when it is time, so that the step's own log entry carries the rates."""
        every = self.trainer.args.probe_steps
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            for name, rate in self._measure(state.global_step).items():
                self.trainer._metrics["train"][name].append(rate)

    def _measure(self, step: int) -> dict[str, float]:
        result = ProbeResult(
            step, self._refusal_rate(self.probe.harmful), self._refusal_rate(self.probe.harmless)
        )
        self.results.append(result)
        return {
            "probe/harmful_refusal_rate": result.harmful_refusal_rate,
            "probe/harmless_refusal_rate": result.harmless_refusal_rate,
        }

    def _refusal_rate(self, prompts: Sequence[str]) -> float:
        trainer, accelerator = self.trainer, self.trainer.accelerator
        mine = prompts[accelerator.process_index :: accelerator.num_processes]
        # Sharded weights are gathered by all processes together, so each samples as many responses.
        share = -(-len(prompts) // accelerator.num_processes)
        asked = [*mine, *prompts[: share - len(mine)]]
        refusals = 0
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped,
                accelerator,
                gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
            ) as student,
            evaluation_flags(student),
            sampling_seed(accelerator.device, 0),
            torch.no_grad(),
        ):
            if asked:
                answers = generate(student, trainer.chat, asked, max_new_tokens=trainer.args.probe_tokens)
                refusals = sum(map(is_refusal, answers[: len(mine)]))
        counted = accelerator.reduce(torch.tensor(refusals, device=accelerator.device), reduction="sum")
        return float(counted) / len(prompts) if prompts else float("nan")


class TeacherCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Move an EMA teacher after every optimizer step; refresh its direction and tokens when it is time."""

    def __init__(self, trainer: "SafeSteerTrainer", teacher: EmaTeacher, refresh: Refresh | None) -> None:
        self.trainer = trainer
        self.teacher = teacher
        self.refresh = refresh

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Update, and refresh every `refresh_steps`."""
        self.teacher.update(self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped))
        every = self.trainer.args.refresh_steps
        if self.refresh is not None and every and state.global_step % every == 0:
            with sampling_seed(self.trainer.accelerator.device, self.trainer.args.seed, state.global_step):
                self.teacher.steering, token_ids = self.refresh(self.teacher.model)
            self.trainer.set_token_ids(token_ids)


class FiniteGradients(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Stop before an optimizer step whose gradients are not finite would spoil the weights."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check all gradients; under fp16 the gradient scaler already skips such steps."""
        if args.fp16:
            return
        gradients = [
            parameter.grad for parameter in kwargs["model"].parameters() if parameter.grad is not None
        ]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not torch.isfinite(norm):
            raise not_finite("gradient norm", norm, state.global_step + 1, args.output_dir)


def not_finite(what: str, value: Tensor, step: int, output_dir: str | None) -> SafeSteerError:
    """Build the error for a loss or gradient that is not finite, naming step and last checkpoint."""
    found = get_last_checkpoint(output_dir) if output_dir and Path(output_dir).is_dir() else None
    last = f"the last good checkpoint is {found}" if found else "no checkpoint had been saved yet"
    return SafeSteerError(
        f"the {what} became {float(value)} at step {step} and training was stopped before the weights "
        f"changed; lower the learning rate or check the model's dtype; {last}."
    )


@contextmanager
def sampling_seed(device: torch.device, *seed: int) -> Iterator[None]:
    """Draw random numbers in a block from a seed of its own, and leave the global generators as they were.

    Args:
        device: Whose generator is used besides the CPU's.
        seed: Any numbers; each combination gives its own stream.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(random.Random("/".join(map(str, seed))).getrandbits(63))
        yield
