"""What a run would do and need, before anything is loaded: `--dry-run`."""

from dataclasses import dataclass

from safesteer.console import RunConsole
from safesteer.memory_estimate import MemoryEstimate, model_shape, planned_memory
from safesteer.settings import Settings
from safesteer.training_arguments import number_of_processes
from safesteer.training_data import anchors_per_step, number_of_steps
from safesteer.workspace import Workspace

_ARTIFACTS = ("direction.json", "safety_tokens.json", "checkpoints", "model")


@dataclass(frozen=True)
class Plan:
    """What `align` would do.

    Attributes:
        stages: Name of each stage, and what it would compute.
        steps: Optimizer steps.
        memory: Of the distillation, on each device.
        advice: What to do about the memory; None if there is enough.
        present: Artifacts that are in the run's folder already; each is kept if its inputs turn out
            unchanged.
    """

    stages: tuple[tuple[str, str], ...]
    steps: int
    memory: MemoryEstimate
    advice: str | None
    present: tuple[str, ...]


def make_plan(settings: Settings, console: RunConsole) -> Plan:
    """Say what a run would do, from prompts, tokenizer and configuration but no weights; nothing is written.

    Args:
        settings: Of the run.
        console: For what is noted about the prompts.

    Raises:
        SafeSteerError: For everything that would stop the run before the model is loaded.
    """
    work = Workspace(settings, console)
    direction, tokens, distillation = settings.direction, settings.safety_tokens, settings.distillation
    processes = number_of_processes()
    shape = model_shape(settings.model, distillation)
    steps = distillation.steps or number_of_steps(
        len(work.harmful.prompts), distillation.batch_size, distillation.anchor_fraction, distillation.epochs
    )
    memory, advice = planned_memory(work, shape)
    positions = len(work.chat.post_instruction_ids)
    layers = int(direction.prune_layers_above * shape.layers)
    auto = " (auto)" if distillation.micro_batch_size == "auto" else ""
    anchors = anchors_per_step(distillation.batch_size, distillation.anchor_fraction)
    trained = "a LoRA adapter" if distillation.lora else "all weights"
    on = f" on {processes} devices" if processes > 1 else ""
    return Plan(
        stages=(
            (
                "direction",
                f"up to {layers * positions} candidates ({layers} layers × {positions} positions) from "
                f"{len(work.direction_harmful)} harmful and {len(work.harmless)} harmless prompts",
            ),
            (
                "safety tokens",
                f"{tokens.samples} responses of {tokens.horizon} tokens each to "
                f"up to {direction.validation_harmless} {tokens.prompts} prompts; "
                f"{tokens.size} tokens by {tokens.selection}",
            ),
            (
                "distillation",
                f"{steps} steps of {distillation.batch_size} prompts, {anchors} of them harmless, "
                f"{memory.micro_batch} at a time{auto}{on}; trains {trained}, "
                f"learning rate {distillation.peak_learning_rate:g}",
            ),
        ),
        steps=steps,
        memory=memory,
        advice=advice,
        present=tuple(name for name in _ARTIFACTS if (work.folder / name).exists()),
    )
