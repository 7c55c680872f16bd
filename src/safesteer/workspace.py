"""What the stages of one run share: folder, model, chat and prompts, each loaded when first asked for."""

import importlib.resources
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel

from safesteer.chat import Chat
from safesteer.console import RunConsole
from safesteer.errors import SafeSteerError
from safesteer.loading import adapter_config, load_model, load_tokenizer
from safesteer.modeling import model_fingerprint
from safesteer.prompts import PromptSet, load_prompts
from safesteer.settings import Settings
from safesteer.trainer_config import SafeSteerConfig
from safesteer.training_arguments import require_lora_targets, training_arguments

BUNDLED_HARMLESS = ("testbed/prompts/harmless_train.jsonl", "testbed/prompts/alarming_train.jsonl")
"""The project's own harmless prompts, inside the package: everyday ones, and ones that only sound harmful."""


class Workspace:
    """One run: settings in, models and prompts on demand.

    Args:
        settings: Of the run.
        console: What the run says.

    Raises:
        SafeSteerError: If the settings name no model, no folder, or something the trainer refuses.
    """

    def __init__(self, settings: Settings, console: RunConsole) -> None:
        for value, flag, setting in [
            (settings.model.name, "--model", "model.name"),
            (settings.run.output, "--output", "run.output"),
        ]:
            if not value:
                raise SafeSteerError(
                    f"no {flag.strip('-')} was named; give {flag}, or {setting} in a recipe."
                )
        self.settings = settings
        self.console = console
        self.folder = Path(settings.run.output)
        self.args: SafeSteerConfig = training_arguments(settings)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return bool(self.args.process_index == 0)

    def main_process_first(self) -> AbstractContextManager[None]:
        """Let the main process through a block before the others, which then find its artifacts."""
        context: AbstractContextManager[None] = self.args.main_process_first(local=False)
        return context

    @cached_property
    def chat(self) -> Chat:
        """How prompts are put to the model."""
        model = self.settings.model
        tokenizer = load_tokenizer(
            model.name,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            chat_template=model.chat_template,
        )
        return Chat(
            tokenizer, model.system_prompt, model.thinking, model.template_kwargs, model.drop_date_lines
        )

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base model; an adapter that it came with is merged into its weights, as a part of the base."""
        settings = self.settings.model
        with self.console.working("loading the model"):
            loaded: Any = load_model(
                settings.name,
                revision=settings.revision,
                dtype=settings.dtype,
                device=settings.device,
                trust_remote_code=settings.trust_remote_code,
                attn_implementation=settings.attn_implementation,
            )
        return cast(PreTrainedModel, loaded.merge_and_unload() if isinstance(loaded, PeftModel) else loaded)

    def require_trainable(self) -> None:
        """Check that there is something to train, and that what would be saved can be loaded again.

        Raises:
            SafeSteerError: If the model is an adapter and another adapter is to be trained on it, or if the adapter is to
                go to modules that the model does not have.
        """
        model = self.settings.model
        if self.settings.distillation.lora and adapter_config(model.name, model.revision) is not None:
            raise SafeSteerError(
                f"{model.name}: is an adapter, and a second one trained on it could not be loaded alone; "
                "merge it into its base model (merge_and_unload) and name the result, or train all weights "
                "with --full."
            )
        require_lora_targets(self.model, self.settings.distillation)

    @cached_property
    def model_fingerprint(self) -> str:
        """Identity of the base model, as it was loaded."""
        return model_fingerprint(self.model)

    @cached_property
    def harmful(self) -> PromptSet:
        """The harmful prompts that are trained on."""
        prompts = self.settings.prompts
        if not prompts.harmful:
            raise SafeSteerError(
                "no harmful prompts were named; give --harmful, or prompts.harmful in a recipe."
            )
        return self._load(prompts.harmful, prompts.prompt_field, prompts.harmful_count)

    @cached_property
    def direction_harmful(self) -> PromptSet:
        """The harmful prompts that the direction is found on."""
        prompts = self.settings.prompts
        if prompts.direction_harmful is None:
            return self.harmful
        return self._load(prompts.direction_harmful, prompts.prompt_field, None)

    @cached_property
    def harmless(self) -> PromptSet:
        """The harmless prompts of all stages."""
        prompts = self.settings.prompts
        if prompts.harmless is not None:
            return self._load(prompts.harmless, prompts.prompt_field, prompts.harmless_count)
        package = importlib.resources.files("safesteer")
        with ExitStack() as stack:
            paths = [
                stack.enter_context(importlib.resources.as_file(package / name)) for name in BUNDLED_HARMLESS
            ]
            if not all(path.is_file() for path in paths):
                raise SafeSteerError(
                    "this installation has no bundled harmless prompts; name a file with --harmless."
                )
            everyday, alarming = (self._load(str(path), None, None) for path in paths)
        bundled = PromptSet(
            prompts=everyday.prompts + alarming.prompts,
            source="bundled with safesteer",
            categories=everyday.categories + alarming.categories,
        )
        count = prompts.harmless_count
        return bundled if count is None else bundled.take(count, self.settings.run.seed)

    def _load(self, source: str, field: str | None, count: int | None) -> PromptSet:
        settings = self.settings
        prompts = load_prompts(
            source,
            field=field,
            count=count,
            seed=settings.run.seed,
            max_characters=settings.prompts.max_characters,
            split=settings.prompts.split,
        )
        if prompts.duplicates or prompts.overlong:
            self.console.note(
                f"{source}: left out {prompts.duplicates} repeated and {prompts.overlong} overlong prompts, "
                f"kept {len(prompts)}."
            )
        return prompts
