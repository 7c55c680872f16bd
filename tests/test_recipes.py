"""The recipes that come with the project: complete, valid, and the paper's where they say so."""

import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from safesteer.recipes import build_settings, load_recipe, setting_fields
from safesteer.settings import Settings
from safesteer.training_arguments import training_arguments

RECIPES = Path(__file__).parents[1] / "recipes"
PAPER = {
    # Method §4: learning rate, horizon, minimum probability, refusal token ids.
    "qwen3-4b-instruct-2507": ("Qwen/Qwen3-4B-Instruct-2507", 1e-5, 7, 1e-8, (40, 2121, 2753, 2132)),
    "qwen2.5-7b-instruct": ("Qwen/Qwen2.5-7B-Instruct", 1e-5, 7, 1e-8, (40, 2121)),
    "llama-3-8b-instruct": ("meta-llama/Meta-Llama-3-8B-Instruct", 1e-6, 5, 1e-7, (40,)),
    "llama-3.2-3b-instruct": ("meta-llama/Llama-3.2-3B-Instruct", 1e-6, 5, 1e-7, (40,)),
}


def _settings(name: str) -> Settings:
    return build_settings(load_recipe(RECIPES / f"{name}.yaml"))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_gives_settings_that_the_trainer_takes(path: Path) -> None:
    settings = build_settings(load_recipe(path), {"run": {"output": "run"}})
    args = training_arguments(settings)
    assert args.learning_rate == settings.distillation.peak_learning_rate
    assert (
        args.per_device_train_batch_size * args.gradient_accumulation_steps
        == settings.distillation.batch_size
    )


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_recipes_have_the_paper_s_numbers(name: str) -> None:
    settings = _settings(name)
    direction, tokens, distillation = settings.direction, settings.safety_tokens, settings.distillation
    assert (
        settings.model.name,
        distillation.learning_rate,
        tokens.horizon,
        tokens.minimum_probability,
        direction.refusal_token_ids,
    ) == PAPER[name]
    assert (tokens.size, tokens.votes_per_position, tokens.samples, tokens.selection) == (50, 200, 8, "vote")
    assert (direction.coefficient, direction.max_kl, direction.min_induction) == (1.0, 0.1, 0.0)
    assert (direction.prune_layers_above, direction.fallback) == (0.8, "error")
    assert (direction.train_harmful, direction.validation_harmful) == (128, 32)
    assert (distillation.lora, distillation.teacher) == (False, "frozen_copy")
    assert (distillation.vocabulary, distillation.support, distillation.beta) == (
        "safety_tokens",
        "truncated",
        1,
    )
    assert (distillation.batch_size, distillation.epochs, distillation.steps) == (32, 1, None)
    assert (distillation.schedule, distillation.warmup_ratio, distillation.max_grad_norm) == (
        "cosine",
        0.1,
        1,
    )
    assert (distillation.max_prompt_length, distillation.max_completion_length) == (512, 512)
    assert (distillation.temperature, distillation.reduction) == (1, "response")
    assert (distillation.anchor_fraction, distillation.train_layers) == (0, "all")
    assert settings.model.drop_date_lines


@pytest.mark.parametrize("name", PAPER)
def test_the_lora_variants_train_an_adapter_on_the_same_model(name: str) -> None:
    paper, lora = _settings(name), _settings(f"{name}-lora")
    assert lora.model == paper.model
    assert lora.direction.refusal_token_ids == paper.direction.refusal_token_ids
    assert lora.safety_tokens == paper.safety_tokens
    assert (lora.distillation.lora, lora.distillation.teacher) == (True, "adapter_off")
    assert lora.distillation.gradient_checkpointing
    defaults = Settings().distillation
    for setting in ("support", "vocabulary", "anchor_fraction", "train_layers", "learning_rate", "epochs"):
        assert getattr(lora.distillation, setting) == getattr(defaults, setting)


def test_qwen_s_refusal_ids_are_the_words_that_the_recipe_says(shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "qwen2.5")
    ids = PAPER["qwen3-4b-instruct-2507"][4]
    assert [tokenizer.decode([token]) for token in ids] == ["I", "As", "No", "It"]


def test_the_testbed_s_recipe_is_the_demo_s() -> None:
    bundled = RECIPES.parent / "src" / "safesteer" / "testbed" / "recipe.yaml"
    for_recipes, for_demo = _settings("testbed"), build_settings(load_recipe(bundled))
    for path in (for_recipes.model.name, for_recipes.prompts.harmful):
        assert Path(path).exists()
    assert Path(for_recipes.model.name).samefile(for_demo.model.name)
    assert Path(for_recipes.prompts.harmful).samefile(for_demo.prompts.harmful)
    assert for_recipes.prompts.harmless and for_demo.prompts.harmless
    assert Path(for_recipes.prompts.harmless).samefile(for_demo.prompts.harmless)
    assert for_recipes.prompts.harmful_count == for_demo.prompts.harmful_count == 100
    for section in ("direction", "safety_tokens", "distillation"):
        assert getattr(for_recipes, section) == getattr(for_demo, section)


def test_the_template_has_every_option_at_its_default_and_explained() -> None:
    text = (RECIPES / "template.yaml").read_text(encoding="utf-8")
    assert load_recipe(RECIPES / "template.yaml") == {}, "the template's options are to be commented out"
    uncommented = yaml.safe_load(re.sub(r"(?m)^  #(?! )", "  ", text).replace("\n  #  ", "\n    "))
    fields = list(setting_fields())
    in_template = [(section, name) for section, values in uncommented.items() for name in values]
    assert in_template == [(entry.section, entry.name) for entry in fields]
    assert build_settings(uncommented) == Settings()
    prose = " ".join(line.removeprefix("  # ") for line in text.splitlines() if line.startswith("  # "))
    missing = [entry.name for entry in fields if entry.help not in prose]
    assert not missing, f"recipes/template.yaml does not explain {missing} as their help texts do"
