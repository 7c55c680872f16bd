"""The models under test: one model, or the base, steered teacher and aligned model of a run, or a served model."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from safesteer.artifacts import fingerprint
from safesteer.chat import Chat
from safesteer.direction import RefusalDirection
from safesteer.errors import SafeSteerError
from safesteer.loading import adapter_config, load_model, load_tokenizer
from safesteer.modeling import model_fingerprint
from safesteer.teacher import adapter_off

Role = Literal["base", "teacher", "aligned"]
ROLES: tuple[Role, ...] = ("base", "teacher", "aligned")
"""What a run offers to evaluate, in the order of the tables."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model under test, in this process.

    Attributes:
        name: In tables and folders.
        model: A causal language model. Subjects of one run may share it: what tells them apart is `steering`.
        chat: How it is asked.
        identity: What its responses depend on, decoding aside.
        steering: Returns the context in which `model` is this subject: steered, adapter switched off, or as it is.
    """

    name: str
    model: PreTrainedModel
    chat: Chat
    identity: str
    steering: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext


@dataclass(frozen=True)
class ServedSubject:
    """A model under test behind one of Inspect's providers.

    Attributes:
        name: In tables and folders.
        model: As Inspect names it: "openai/NAME", "vllm/NAME", "hf/NAME" ….
        base_url: Of an OpenAI-compatible server.
        model_args: For the provider.
    """

    name: str
    model: str
    base_url: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """What its responses depend on, as far as can be known."""
        return fingerprint({"served": self.model, "base_url": self.base_url})


AnySubject = Subject | ServedSubject


def subjects_of(
    model_or_run: str | Path,
    which: Sequence[Role] | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    thinking: Literal["off", "on"] | None = None,
) -> tuple[Subject, ...]:
    """Load what there is to evaluate.

    A LoRA adapter and its base model share one copy of the weights.

    Args:
        model_or_run: A run folder (with config.yaml), a folder or hub id of a model, or of an adapter (which
            gives the base model and the aligned one).
        which: Of a run or an adapter; all that there are by default.
        device: Instead of the run's; the best there is by default.
        dtype: Instead of the run's.
        thinking: Instead of the run's.

    Raises:
        SafeSteerError: If it cannot be loaded, or has no such part.
    """
    name = str(model_or_run)
    changed = {
        key: value
        for key, value in {"device": device, "dtype": dtype, "thinking": thinking}.items()
        if value is not None
    }
    folder = Path(name)
    if (folder / "config.yaml").is_file():
        return _of_run(folder, which, changed)
    if folder.is_dir() and not ((folder / "config.json").is_file() or _is_adapter(folder)):
        raise SafeSteerError(
            f"{name}: is neither a run (no config.yaml) nor a model (no config.json); give a run's folder, a "
            "model's folder or a hub id."
        )
    settings = {"name": name, **changed}
    if adapter_config(name, None) is not None:
        return _of_adapter(settings, which)
    if which is not None and tuple(which) != ("base",):
        raise SafeSteerError(
            f"{name}: is a single model, and has no {' or '.join(role for role in which if role != 'base')}; give a "
            "run's folder, or leave --model out."
        )
    model = _model(settings)
    return (Subject(slug(name), model, _chat(settings), _identity(model)),)


def served(model: str, base_url: str | None = None) -> ServedSubject:
    """Name a model behind one of Inspect's providers, such as "openai/NAME" or "vllm/NAME".

    Raises:
        SafeSteerError: If no provider is named.
    """
    provider, _, name = model.partition("/")
    if not provider or not name:
        raise SafeSteerError(f"{model}: names no provider; write it as openai/NAME, vllm/NAME or hf/NAME.")
    return ServedSubject(slug(name), model, base_url)


def slug(name: str) -> str:
    """Make a model's name fit for a folder: its last part, without what file systems dislike."""
    last = re.sub(r"[^A-Za-z0-9._-]+", "-", name.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]).strip(
        "-."
    )
    return last or "model"


def _of_run(folder: Path, which: Sequence[Role] | None, changed: Mapping[str, Any]) -> tuple[Subject, ...]:
    # Imported here: the settings of a training know the trainer, which takes seconds to import.
    from safesteer.recipes import build_settings, load_recipe

    settings = build_settings(load_recipe(folder / "config.yaml"), {"model": changed})
    config = vars(settings.model)
    present = {
        "base": True,
        # A teacher with a system prompt is not steered, and is none of these.
        "teacher": (folder / "direction.json").is_file() and settings.distillation.teacher != "system_prompt",
        "aligned": (folder / "model").is_dir(),
    }
    wanted = _wanted(folder, which, present)
    aligned = str(folder / "model")
    shares_weights = "aligned" in wanted and _is_adapter(Path(aligned))
    model: Any = _model(config)
    if isinstance(model, PeftModel):  # an adapter that the run started from is a part of its base model
        model = model.merge_and_unload()
    chat = _chat(config)
    base_identity = _identity(model)
    # `load_model` of the adapter's folder would load the base model a second time.
    full: Any = PeftModel.from_pretrained(model, aligned) if shares_weights else model
    full.eval()
    subjects: list[Subject] = []
    for role in wanted:
        if role == "base":
            subjects.append(Subject(role, full, chat, base_identity, lambda: adapter_off(full)))
        elif role == "teacher":
            direction = RefusalDirection.load(folder)
            direction.require_model(model_fingerprint(full))

            @contextlib.contextmanager
            def steered(direction: RefusalDirection = direction) -> Iterator[None]:
                with adapter_off(full), direction.steering.applied(full, config["layer_path"]):
                    yield

            identity = fingerprint({"base": base_identity, "steering": direction.steering})
            subjects.append(Subject(role, full, chat, identity, steered))
        elif shares_weights:
            subjects.append(Subject(role, full, chat, _identity(full)))
        else:
            own = _model({**config, "name": aligned, "revision": None})
            subjects.append(Subject(role, own, chat, _identity(own)))
    return tuple(subjects)


def _of_adapter(settings: Mapping[str, Any], which: Sequence[Role] | None) -> tuple[Subject, ...]:
    wanted = _wanted(Path(settings["name"]), which, {"base": True, "teacher": False, "aligned": True})
    model, chat = _model(settings), _chat(settings)
    made = {
        "base": lambda: Subject(
            "base", model, chat, _identity(model, adapter=False), lambda: adapter_off(model)
        ),
        "aligned": lambda: Subject("aligned", model, chat, _identity(model)),
    }
    return tuple(made[role]() for role in wanted)


def _wanted(folder: Path, which: Sequence[Role] | None, present: Mapping[str, bool]) -> tuple[Role, ...]:
    """Check what is asked for, in the order of `ROLES`."""
    if which is None:
        return tuple(role for role in ROLES if present[role])
    unknown = [role for role in which if role not in ROLES]
    if unknown:
        raise SafeSteerError(f"--model {unknown[0]}: is none of {', '.join(ROLES)}; give one of these.")
    missing = [role for role in which if not present[role]]
    if missing:
        remedy = "run `safesteer align` to the end, or leave --model out"
        raise SafeSteerError(f"{folder}: has no {missing[0]} model; {remedy}.")
    return tuple(role for role in ROLES if role in which)


def _model(settings: Mapping[str, Any]) -> PreTrainedModel:
    return load_model(
        settings["name"],
        revision=settings.get("revision"),
        dtype=settings.get("dtype", "auto"),
        device=settings.get("device"),
        trust_remote_code=settings.get("trust_remote_code", False),
        attn_implementation=settings.get("attn_implementation"),
    )


def _chat(settings: Mapping[str, Any]) -> Chat:
    tokenizer = load_tokenizer(
        settings["name"],
        revision=settings.get("revision"),
        trust_remote_code=settings.get("trust_remote_code", False),
        chat_template=settings.get("chat_template"),
    )
    return Chat(
        tokenizer,
        settings.get("system_prompt"),
        settings.get("thinking", "off"),
        settings.get("template_kwargs", {}),
        settings.get("drop_date_lines", True),
    )


def _identity(model: nn.Module, *, adapter: bool = True) -> str:
    """Identify a model by its weights, those of its adapter included."""
    of_base = model_fingerprint(model)
    if not adapter or not isinstance(model, PeftModel):
        return of_base
    weights = {
        name: weight
        for name, weight in model.named_parameters()
        if "lora_" in name or "modules_to_save" in name
    }
    return fingerprint({"base": of_base, "adapter": weights})


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()
