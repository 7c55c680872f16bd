"""`align`: the stages in order, in one run directory that resumes (method §1–§4).

    prompts → refusal direction → safety tokens → distillation → aligned model

Each stage can be run alone on the same directory. Under `accelerate launch` the first process finds direction
and tokens, the others wait and read them, and all of them train.
"""

from dataclasses import dataclass
from pathlib import Path

from safesteer.artifacts import write_json
from safesteer.console import RunConsole
from safesteer.direction import RefusalDirection
from safesteer.environment import describe_environment
from safesteer.safety_tokens import SafetyTokens
from safesteer.settings import Settings
from safesteer.stages import direction_stage, saved_direction, saved_tokens, tokens_stage
from safesteer.training_stage import AlignedModel, training_stage
from safesteer.workspace import Workspace


@dataclass(frozen=True)
class AlignmentRun:
    """A finished run.

    Attributes:
        folder: Of the run.
        direction: The refusal direction.
        safety_tokens: The safety tokens.
        model: The aligned model or its adapter, in `folder / "model"`.
    """

    folder: Path
    direction: RefusalDirection
    safety_tokens: SafetyTokens
    model: AlignedModel


def align(settings: Settings, console: RunConsole | None = None) -> AlignmentRun:
    """Align a model: direction, safety tokens, distillation; what is there already and still valid is kept.

    Args:
        settings: At least the model's name, harmful prompts and the run's folder.
        console: What the run says; silent by default.

    Raises:
        SafeSteerError: For whatever the user can mend.
    """
    work = _workspace(settings, console, trains=True)
    with work.main_process_first():
        direction = direction_stage(work)
        tokens = tokens_stage(work, direction)
    return AlignmentRun(work.folder, direction, tokens, training_stage(work, direction, tokens))


def run_direction(settings: Settings, console: RunConsole | None = None) -> RefusalDirection:
    """Run the first stage alone: find the refusal direction and save it in the run."""
    work = _workspace(settings, console)
    with work.main_process_first():
        return direction_stage(work)


def run_tokens(settings: Settings, console: RunConsole | None = None) -> SafetyTokens:
    """Run the second stage alone, on the direction that is in the run.

    Raises:
        SafeSteerError: If the run has no direction, or it was found on another model.
    """
    work = _workspace(settings, console)
    with work.main_process_first():
        return tokens_stage(work, saved_direction(work))


def run_distillation(settings: Settings, console: RunConsole | None = None) -> AlignedModel:
    """Run the last stage alone, on the direction and the tokens that are in the run.

    Raises:
        SafeSteerError: If the run lacks either, or they were found on another model.
    """
    work = _workspace(settings, console, trains=True)
    direction = saved_direction(work)
    return training_stage(work, direction, saved_tokens(work, direction))


def _workspace(settings: Settings, console: RunConsole | None, *, trains: bool = False) -> Workspace:
    """Check what can be checked before anything is computed, then note in the run's folder what was asked."""
    work = Workspace(settings, console or RunConsole(quiet=True))
    if not work.is_main:
        work.console.console.quiet = True
    _ = work.chat, work.direction_harmful, work.harmless
    if trains:
        _ = work.harmful
        work.require_trainable()
    if not work.is_main:
        return work
    work.folder.mkdir(parents=True, exist_ok=True)
    temporary = work.folder / ".config.yaml.tmp"
    temporary.write_text(settings.yaml(), encoding="utf-8")
    temporary.replace(work.folder / "config.yaml")
    write_json(work.folder / "environment.json", describe_environment(settings.run.seed))
    return work
