"""The last stage: distil the steered teacher into the model, from checkpoint to checkpoint (method §4)."""

import contextlib
import math
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safesteer.artifacts import fingerprint, new_directory, read_json, write_json
from safesteer.console import ProgressCallback
from safesteer.direction import RefusalDirection, find_refusal_direction
from safesteer.errors import SafeSteerError
from safesteer.memory_estimate import planned_micro_batch
from safesteer.model_card import model_card
from safesteer.out_of_memory import is_out_of_memory, with_smaller_batches
from safesteer.prompts import PromptSet
from safesteer.safety_tokens import SafetyTokens, find_safety_tokens
from safesteer.settings import DistillationSettings
from safesteer.stages import contrast_prompts, is_current, outcome
from safesteer.steering import Steering
from safesteer.trainer import SafeSteerTrainer
from safesteer.trainer_callbacks import ProbeSets, Refresh
from safesteer.training_arguments import (
    lora_config,
    memory_remedies,
    micro_batches,
    number_of_processes,
    training_arguments,
)
from safesteer.workspace import Workspace

RECORD_FILE = "safesteer.json"
"""In the model's folder and in the checkpoints': what they were made from."""

# What the trainer writes into a checkpoint last, so that a checkpoint without it was interrupted.
_LAST_FILE = "trainer_state.json"

# A teacher that is so unlikely to say a safety token, where the loss counts, teaches nothing.
_LITTLE_MASS = 0.01


@dataclass(frozen=True)
class AlignedModel:
    """The aligned model, or its LoRA adapter, in a folder.

    Attributes:
        folder: With the weights, the tokenizer, a model card and the record of this class.
        fingerprint: Of everything the training depended on.
        model_fingerprint: Of the base model.
        steps: Optimizer steps.
        seconds: The training took, since it was last continued.
        log: What was logged, step by step.
    """

    folder: Path
    fingerprint: str
    model_fingerprint: str
    steps: int
    seconds: float
    log: tuple[Mapping[str, Any], ...]

    @classmethod
    def load(cls, folder: Path) -> "AlignedModel":
        """Read the record of a finished training."""
        record = read_json(folder / RECORD_FILE)
        return cls(
            folder=folder,
            fingerprint=str(record["fingerprint"]),
            model_fingerprint=str(record["model_fingerprint"]),
            steps=int(record["steps"]),
            seconds=float(record["seconds"]),
            log=tuple(record["log"]),
        )


def training_stage(work: Workspace, direction: RefusalDirection, tokens: SafetyTokens) -> AlignedModel:
    """Load the run's aligned model's record if its inputs are unchanged, else train and save it.

    A training that was interrupted continues from its last whole checkpoint if its inputs are unchanged, and
    starts anew otherwise.
    """
    settings = work.settings
    wanted = fingerprint(
        {
            "stage": "distillation",
            "settings": settings.distillation.identity,
            "seed": settings.run.seed,
            "dtype": settings.model.dtype,
            "model": work.model_fingerprint,
            "layer_path": settings.model.layer_path,
            "chat": work.chat.fingerprint,
            "harmful": work.harmful.fingerprint,
            "harmless": work.harmless.fingerprint,
            "direction": direction.fingerprint,
            "safety_tokens": tokens.fingerprint,
        }
    )
    folder = work.folder / "model"
    started = time.monotonic()
    with work.main_process_first():
        kept = is_current(work, folder / RECORD_FILE, wanted)
    if not kept:
        _train(work, direction, tokens, folder, wanted)
    with work.main_process_first():
        aligned = AlignedModel.load(folder)
    work.console.summary("distillation", _told(aligned), outcome(folder, kept, started))
    return aligned


def _train(
    work: Workspace, direction: RefusalDirection, tokens: SafetyTokens, folder: Path, wanted: str
) -> None:
    """Train, save, and begin again at the last checkpoint with half the micro batch if memory runs out."""
    started = time.monotonic()
    checkpoints = Path(str(work.args.output_dir))
    settings = work.settings.distillation
    remedies = memory_remedies(settings)

    def attempt(micro_batch: int) -> SafeSteerTrainer:
        with work.main_process_first():
            checkpoint = _checkpoint_to_continue(work, checkpoints, wanted)
        try:
            return _trained(work, direction, tokens, micro_batch, checkpoint)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if number_of_processes() > 1:
                # The others are waiting for this one's gradients, and know of no smaller batch.
                remedy = (
                    f"give --micro-batch-size {_half(settings, micro_batch)}" if micro_batch > 1 else remedies
                )
                raise SafeSteerError(
                    f"distillation: process {work.args.process_index} of {number_of_processes()} ran out of "
                    f"memory with {micro_batch} prompts at a time, which ends the run; {remedy} (the same "
                    "command continues from the last checkpoint)."
                ) from error
            # Its weights have changed since, so the next attempt loads it anew.
            vars(work).pop("model", None)
            raise

    trainer = with_smaller_batches(
        attempt,
        planned_micro_batch(work),
        what="distillation",
        note=work.console.note,
        remedies=remedies,
        smaller=lambda size: _half(settings, size),
    )
    _save(work, trainer, folder, wanted, direction, tokens, time.monotonic() - started)


def _half(settings: DistillationSettings, micro_batch: int) -> int:
    """Return half a micro batch, or the most below that divide the step's prompts."""
    return micro_batches(replace(settings, micro_batch_size=micro_batch // 2), number_of_processes())[0]


def _trained(
    work: Workspace,
    direction: RefusalDirection,
    tokens: SafetyTokens,
    micro_batch: int,
    checkpoint: str | None,
) -> SafeSteerTrainer:
    settings = replace(work.settings.distillation, micro_batch_size=micro_batch)
    if not settings.lora:
        model: nn.Module = work.model
        # A model that an adapter was merged into comes frozen.
        model.to(getattr(torch, settings.master_dtype)).requires_grad_(True)
    with work.console.stage("distillation") as progress:
        progress("preparing", 0, 0)
        trainer = SafeSteerTrainer(
            work.model,
            training_arguments(replace(work.settings, distillation=settings)),
            work.harmful.prompts,
            work.harmless.prompts,
            work.chat,
            direction,
            tokens,
            lora_config(settings, work.settings.model.revision),
            probe_sets(work),
            layer_path=work.settings.model.layer_path,
            refresh=_refresh(work) if settings.refresh_steps else None,
            callbacks=[_Progress(progress), _TeacherSays(work.console.note)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def probe_sets(work: Workspace) -> ProbeSets | None:
    """Choose the prompts whose refusal rates are watched; harmful ones not trained on, if there are any."""
    settings = work.settings.distillation
    if not settings.probe_steps:
        return None

    def sample(prompts: PromptSet) -> tuple[str, ...]:
        return prompts.take(min(settings.probe_size, len(prompts)), work.settings.run.seed).prompts

    trained = set(work.harmful.prompts)
    others = tuple(prompt for prompt in work.direction_harmful.prompts if prompt not in trained)
    unseen = PromptSet(others, work.direction_harmful.source) if others else work.harmful
    return ProbeSets(sample(unseen), sample(work.harmless))


def _refresh(work: Workspace) -> Refresh:
    """Build what an EMA teacher calls to find its direction and tokens anew (method §2)."""
    settings = work.settings

    def refresh(model: Any) -> tuple[Steering, Sequence[int]]:
        path = settings.model.layer_path
        direction = find_refusal_direction(
            model, work.chat, work.direction_harmful, work.harmless, settings.direction, layer_path=path
        )
        tokens = find_safety_tokens(
            model,
            work.chat,
            contrast_prompts(work, direction),
            direction.steering,
            settings.safety_tokens,
            layer_path=path,
        )
        return direction.steering, tokens.ids

    return refresh


def _checkpoint_to_continue(work: Workspace, checkpoints: Path, wanted: str) -> str | None:
    """Find the last whole checkpoint of this very training; checkpoints of any other are removed."""
    record = checkpoints / RECORD_FILE
    if not is_current(work, record, wanted):
        if work.is_main:
            shutil.rmtree(checkpoints, ignore_errors=True)
            write_json(record, {"fingerprint": wanted})
        return None
    whole = []
    for folder in (path.parent for path in checkpoints.glob(f"checkpoint-*/{_LAST_FILE}")):
        if damaged := _damaged_file(folder):
            work.console.note(f"{damaged}: is damaged; the training does not continue from there.")
        else:
            whole.append(folder)
    if not whole:
        return None
    last = max(whole, key=lambda path: int(path.name.rpartition("-")[2]))
    work.console.note(f"continuing the training from {last}")
    return str(last)


def _damaged_file(checkpoint: Path) -> Path | None:
    """Find a file of a checkpoint that was cut off: weights without their header's length, or no whole archive."""
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".pt" and not zipfile.is_zipfile(path):
            return path
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):
                    pass
            except (OSError, SafetensorError):
                return path
    return None


def _save(
    work: Workspace,
    trainer: SafeSteerTrainer,
    folder: Path,
    wanted: str,
    direction: RefusalDirection,
    tokens: SafetyTokens,
    seconds: float,
) -> None:
    """Write model, tokenizer, card and record; the folder appears when all of it is there."""
    aligned = AlignedModel(
        folder,
        wanted,
        direction.model_fingerprint,
        trainer.state.global_step,
        seconds,
        tuple(trainer.state.log_history),
    )
    # Every process takes part in gathering sharded weights, the main one alone writes.
    with new_directory(folder) if work.is_main else contextlib.nullcontext(folder) as target:
        trainer.save_model(str(target))
        if work.is_main:
            # The trainer's pickled arguments: nothing here loads pickle, so nothing here hands it on.
            (target / "training_args.bin").unlink(missing_ok=True)
            work.chat.tokenizer.save_pretrained(str(target))
            (target / "README.md").write_text(model_card(work, direction, tokens, aligned), encoding="utf-8")
            write_json(
                target / RECORD_FILE,
                {
                    "fingerprint": aligned.fingerprint,
                    "model_fingerprint": aligned.model_fingerprint,
                    "steps": aligned.steps,
                    "seconds": aligned.seconds,
                    "log": aligned.log,
                },
            )


class _Progress(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Shows the trainer's steps and loss on the run's console."""

    def __init__(self, progress: ProgressCallback) -> None:
        self.progress = progress
        self.loss = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.progress("sampling responses", state.global_step, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.progress(f"steps{self.loss}", state.global_step, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.loss = f": loss {float(logs['loss']):.4g}"


class _TeacherSays(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Says so after the first step if the teacher has next to no probability on `S`."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note = note
        self.looked = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        mass = (logs or {}).get("teacher_mass")
        if mass is None or self.looked:
            return
        self.looked = True
        if mass < _LITTLE_MASS:
            self.note(
                f"the teacher gives the safety tokens a probability of {mass:.1g} where the loss counts, so there is next to "
                "nothing to learn from it: see which they are (safety_tokens.json), find more (safety_tokens.size), or find "
                "and count them at the same tokens of a response (safety_tokens.horizon, distillation.first_tokens and "
                "skip_tokens)."
            )


def _told(aligned: AlignedModel) -> str:
    """Tell a training in a line: loss, mass on S and probed refusals, from first to last logged step."""

    def change(name: str, form: str) -> str | None:
        values = [float(entry[name]) for entry in aligned.log if entry.get(name) is not None]
        values = [value for value in values if math.isfinite(value)]
        return f"{values[0]:{form}} → {values[-1]:{form}}" if values else None

    parts = [f"{aligned.steps} steps"]
    for name, form, text in [
        ("loss", ".3g", "loss {}"),
        ("student_mass", ".2f", "mass on S {}"),
        ("probe/harmful_refusal_rate", ".0%", "refusals of harmful probes {}"),
        ("probe/harmless_refusal_rate", ".0%", "of harmless {}"),
    ]:
        told = change(name, form)
        if told is not None:
            parts.append(text.format(told))
    return "; ".join(parts)
