"""Settings: layers, types, flags, and how they become the trainer's arguments."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from safesteer import training_arguments as arguments_module
from safesteer.coercion import coerce
from safesteer.errors import SafeSteerError
from safesteer.recipes import build_settings, load_recipe, setting_fields
from safesteer.settings import SECTIONS, DistillationSettings, Settings
from safesteer.trainer_config import SafeSteerConfig
from safesteer.training_arguments import _SAME_NAMES, lora_config, micro_batches, training_arguments


def test_every_setting_has_a_help_text_and_a_flag_of_its_own() -> None:
    fields = list(setting_fields())
    assert len(fields) == sum(len(dataclasses.fields(kind)) for kind in SECTIONS.values())
    assert all(len(entry.help) > 10 and entry.help.endswith(("…", ".")) for entry in fields)
    flags = [entry.flag for entry in fields]
    assert len(set(flags)) == len(flags)
    assert not set(flags) & {"--recipe", "--debug", "--quiet", "--dry-run", "--help", "--json", "--split"}


def test_defaults_that_the_trainer_has_too_are_the_same() -> None:
    ours = {entry.name: entry.default for entry in setting_fields("distillation")}
    theirs = {entry.name: entry.default for entry in dataclasses.fields(SafeSteerConfig)}
    # The trainer alone needs no harmless prompts and no probes; a run has both.
    for name in set(_SAME_NAMES) - {"anchor_fraction", "probe_steps"}:
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize(
    ("given", "annotation", "wanted"),
    [
        ("1e-5", float, 1e-5),
        (1, float, 1.0),
        ("3", int, 3),
        (3.0, int, 3),
        ("1e3", int, 1000),
        ("none", float | None, None),
        (None, int | None, None),
        ("0.5", float | None, 0.5),
        ("40,2121", tuple[int, ...] | None, (40, 2121)),
        ("[40, 2121]", tuple[int, ...], (40, 2121)),
        ([1, 2.5], tuple[float, ...], (1.0, 2.5)),
        (40, tuple[int, ...], (40,)),
        ("", tuple[str, ...], ()),
        (False, Literal["off", "on"], "off"),
        ("tail", Literal["tail", "truncated"], "tail"),
        ("yes", bool, True),
        (False, bool, False),
        ('{"a": [1, 2]}', dict[str, Any], {"a": [1, 2]}),
        ("name", str | None, "name"),
        (8, str, "8"),
    ],
)
def test_values_take_their_settings_type(given: Any, annotation: Any, wanted: Any) -> None:
    value = coerce(given, annotation, "x")
    assert value == wanted
    assert type(value) is type(wanted)


@pytest.mark.parametrize(
    ("given", "annotation", "told"),
    [
        ("many", int, "give a whole number"),
        (1.5, int, "give a whole number"),
        (True, int, "give a whole number"),
        ("fast", float, "give a number"),
        ("maybe", bool, "give true or false"),
        ("trunkated", Literal["truncated", "tail"], "did you mean 'truncated'"),
        ("40,I", tuple[int, ...], "'I'; give a whole number"),
        ("[1, 2", dict[str, Any], "give a mapping"),
        ([1], str, "give a text"),
    ],
)
def test_values_of_another_type_are_refused_by_name(given: Any, annotation: Any, told: str) -> None:
    with pytest.raises(SafeSteerError) as error:
        coerce(given, annotation, "section.field")
    assert str(error.value).startswith("section.field is ")
    assert told in str(error.value)


def test_later_layers_win_and_the_rest_is_default() -> None:
    settings = build_settings(
        {"direction": {"max_kl": "0.2"}, "distillation": {"epochs": 2}}, {"distillation": {"epochs": 3}}
    )
    assert settings.direction.max_kl == 0.2
    assert settings.distillation.epochs == 3.0
    assert settings.safety_tokens == Settings().safety_tokens


def test_the_run_s_seed_is_every_stage_s_unless_it_has_its_own() -> None:
    settings = build_settings({"run": {"seed": 7}, "safety_tokens": {"seed": 8}})
    assert (settings.run.seed, settings.direction.seed, settings.safety_tokens.seed) == (7, 7, 8)
    assert build_settings({}).direction.seed == 42


@hypothesis_settings(deadline=None, max_examples=50)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "direction": st.fixed_dictionaries(
                {},
                optional={
                    "max_kl": st.floats(0, 10),
                    "coefficients": st.lists(st.floats(0.1, 5), min_size=1, max_size=3),
                    "refusal_token_ids": st.none() | st.lists(st.integers(0, 10**6), min_size=1, max_size=3),
                },
            ),
            "model": st.fixed_dictionaries(
                {},
                optional={
                    "name": st.text("abc/-. 1", min_size=1).filter(lambda name: not name.startswith(".")),
                    "thinking": st.sampled_from(["on", "off"]),
                    "template_kwargs": st.dictionaries(
                        st.text("ab", min_size=1), st.integers() | st.text("x1")
                    ),
                },
            ),
            "distillation": st.fixed_dictionaries(
                {},
                optional={
                    "learning_rate": st.none() | st.floats(1e-9, 1),
                    "lora": st.booleans(),
                    "steps": st.none() | st.integers(1, 10**6),
                },
            ),
        },
    )
)
def test_settings_written_as_yaml_come_back_the_same(layer: dict[str, Any]) -> None:
    settings = build_settings(layer)
    assert build_settings(yaml.safe_load(settings.yaml())) == settings


def test_a_recipe_s_relative_paths_count_from_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    recipe = folder / "mine.yaml"
    recipe.write_text("model: {name: ../models/tiny}\nprompts: {harmful: ./h.txt, harmless: other/h.txt}\n")
    settings = build_settings(load_recipe(recipe))
    assert Path(settings.model.name) == folder / ".." / "models" / "tiny"
    assert Path(settings.prompts.harmful) == folder / "h.txt"
    assert settings.prompts.harmless == "other/h.txt"


def test_relative_paths_do_not_change_their_meaning_in_a_run_s_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = build_settings({"model": {"name": "./tiny"}, "prompts": {"harmful": "h.txt"}})
    config = tmp_path / "runs" / "a" / "config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(settings.yaml())
    again = build_settings(load_recipe(config))
    assert again.model.name == str(tmp_path / "tiny")
    assert again.prompts.harmful == "h.txt"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "distillation:\n  epochs: 1\n  learningrate: 1e-5\n",
            "line 3: distillation.learningrate is no setting",
        ),
        ("distillation:\n  learningrate: 1e-5\n", "(did you mean 'learning_rate'?)"),
        (
            "model:\n  name: x\ndestillation:\n  epochs: 1\n",
            "line 3: 'destillation' is no section of a recipe",
        ),
        ("distillation: 5\n", "line 1: section 'distillation' holds 5"),
        ("direction:\n\n  max_kl: small\n", "line 3: direction.max_kl is 'small'; give a number."),
        ("model: [\n", "cannot be read as YAML"),
        ("- a\n- b\n", "holds no sections"),
    ],
)
def test_a_faulty_recipe_is_told_by_line(tmp_path: Path, text: str, told: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(SafeSteerError) as error:
        load_recipe(recipe)
    assert str(error.value).startswith(str(recipe))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_python_tags_in_a_recipe_run_nothing(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model:\n  name: !!python/object/apply:os.mkdir ['" + str(tmp_path / "made") + "']\n")
    with pytest.raises(SafeSteerError, match="cannot be read as YAML"):
        load_recipe(recipe)
    assert not (tmp_path / "made").exists()


def test_the_learning_rate_s_default_depends_on_what_is_trained() -> None:
    assert DistillationSettings().peak_learning_rate == 1e-4
    assert DistillationSettings(lora=False).peak_learning_rate == 1e-5
    assert DistillationSettings(lora=False, learning_rate=3e-6).peak_learning_rate == 3e-6


def test_what_costs_only_memory_or_time_is_no_part_of_a_training_s_identity() -> None:
    base = DistillationSettings()
    for name, value in [("micro_batch_size", 1), ("gradient_checkpointing", True), ("probe_steps", 0)]:
        assert dataclasses.replace(base, **{name: value}).identity == base.identity
    for name, value in [("learning_rate", 1e-3), ("support", "truncated"), ("batch_size", 8)]:
        assert dataclasses.replace(base, **{name: value}).identity != base.identity


@hypothesis_settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from([1, 2, 4, 8]))
def test_micro_batches_make_up_the_batch_exactly(share: int, micro: int, processes: int) -> None:
    settings = DistillationSettings(batch_size=share * processes, micro_batch_size=micro)
    size, passes = micro_batches(settings, processes)
    assert size * passes * processes == settings.batch_size
    assert size <= micro
    # The most that divide evenly: no larger size would do.
    assert not any(share % larger == 0 for larger in range(size + 1, min(micro, share) + 1))


def test_a_micro_batch_is_a_number_or_auto() -> None:
    def given(value: Any) -> int | str:
        return build_settings({"distillation": {"micro_batch_size": value}}).distillation.micro_batch_size

    assert [given(value) for value in ("auto", "Auto", "4", 4)] == ["auto", "auto", 4, 4]
    for value in ("many", None, 2.5):
        with pytest.raises(SafeSteerError, match=r"micro_batch_size is .*; give a whole number, or auto\."):
            given(value)
    with pytest.raises(SafeSteerError, match="--micro-batch-size is 0; give a number above 0"):
        given(0)


def test_a_batch_that_processes_cannot_share_is_refused() -> None:
    with pytest.raises(SafeSteerError, match="--batch-size is 10, which 4 processes cannot share"):
        micro_batches(DistillationSettings(batch_size=10), 4)


def test_settings_become_the_trainer_s_arguments(tmp_path: Path) -> None:
    args = training_arguments(
        build_settings(
            {
                "model": {"device": "cpu"},
                "run": {"output": str(tmp_path), "seed": 5},
                "distillation": {
                    "batch_size": 12,
                    "micro_batch_size": 5,
                    "learning_rate": 2e-4,
                    "warmup_ratio": 0.25,
                    "steps": 9,
                    "support": "generalized",
                    "checkpoint_steps": 0,
                    "trainer_args": {"adam_beta2": 0.95, "weight_decay": 0.5},
                },
            }
        )
    )
    assert Path(str(args.output_dir)) == tmp_path / "checkpoints"
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 3)
    assert (args.learning_rate, args.max_steps, args.seed) == (2e-4, 9, 5)
    assert args.get_warmup_steps(args.max_steps) == 2  # a quarter of nine, in whole steps
    assert args.support == "generalized"
    assert args.save_strategy == "no"
    assert (args.adam_beta2, args.weight_decay) == (0.95, 0.5)  # the last word is trainer_args'
    assert args.report_to == []
    assert not list(tmp_path.iterdir())


def test_unknown_trainer_arguments_are_told_with_the_closest() -> None:
    with pytest.raises(SafeSteerError, match=r"no 'adam_beta_2' \(did you mean 'adam_beta2'\?\)"):
        training_arguments(build_settings({"distillation": {"trainer_args": {"adam_beta_2": 0.9}}}))


def test_packages_that_are_not_installed_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments_module, "is_vllm_available", lambda: False)
    with pytest.raises(SafeSteerError, match="vLLM is not installed; run `pip install 'safesteer.vllm.'`"):
        training_arguments(build_settings({"distillation": {"use_vllm": True}}))
    monkeypatch.setattr(arguments_module, "get_available_reporting_integrations", list)
    with pytest.raises(SafeSteerError, match="--report-to wandb: is not installed"):
        training_arguments(build_settings({"run": {"report_to": ("wandb",)}}))


def test_the_trainer_s_refusals_are_sentences() -> None:
    with pytest.raises(SafeSteerError, match="beta must be between 0"):
        training_arguments(build_settings({"distillation": {"beta": 2}}))
    with pytest.raises(SafeSteerError, match="the trainer refuses its settings"):
        training_arguments(build_settings({"distillation": {"schedule": "zigzag"}}))


def test_lora_settings_become_an_adapter_or_none() -> None:
    adapter = lora_config(DistillationSettings(lora_rank=4, lora_alpha=12))
    assert adapter is not None
    assert (adapter.r, adapter.lora_alpha, adapter.target_modules) == (4, 12, "all-linear")
    named = lora_config(DistillationSettings(lora_targets=("q_proj", "v_proj")), revision="v2")
    assert named is not None and named.target_modules == {"q_proj", "v_proj"}
    assert named.revision == "v2"
    assert lora_config(DistillationSettings(lora=False)) is None


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        ("distillation", {"batch_size": 0}, "--batch-size is 0"),
        ("distillation", {"learning_rate": 0}, "--learning-rate is 0"),
        ("distillation", {"steps": 0}, "--steps is 0"),
        ("distillation", {"epochs": math.inf}, "--epochs is inf"),
        ("distillation", {"warmup_ratio": 1.0}, "--warmup-ratio is 1.0"),
        (
            "distillation",
            {"lora": False, "teacher": "adapter_off"},
            "--teacher adapter_off needs a LoRA adapter",
        ),
        ("model", {"device": "cuda:3"}, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_settings_that_cannot_work_are_refused(section: str, values: dict[str, Any], told: str) -> None:
    with pytest.raises(SafeSteerError) as error:
        build_settings({section: values})
    assert told in str(error.value)
