"""The pipeline: a run aligns, resumes, keeps what is valid and makes anew what is not."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline_runs import run_settings
from planted_model import ANSWERED, HARMLESS, REFUSED, planted_chat, planted_model, token_id
from safesteer.artifacts import read_json
from safesteer.chat import generate
from safesteer.console import RunConsole
from safesteer.direction import RefusalDirection
from safesteer.errors import SafeSteerError
from safesteer.evaluation.subjects import subjects_of
from safesteer.loading import load_model, load_tokenizer
from safesteer.modeling import model_fingerprint
from safesteer.pipeline import align, run_direction, run_distillation, run_tokens
from safesteer.recipes import build_settings, load_recipe
from safesteer.refusals import is_refusal
from safesteer.safety_tokens import SafetyTokens
from safesteer.settings import Settings

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a LoRA adapter; tests work on copies."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    align(run_settings(inputs, folder))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def _aligned(settings: Settings) -> tuple[set[str], str]:
    """Align, and say which stages were computed rather than kept, and all that was printed."""
    folder = Path(settings.run.output)
    watched = {"direction": "direction.json", "tokens": "safety_tokens.json", "model": "model/safesteer.json"}
    before = {
        stage: (folder / name).stat().st_mtime_ns
        for stage, name in watched.items()
        if (folder / name).exists()
    }
    printed = io.StringIO()
    align(settings, RunConsole(console=Console(file=printed, soft_wrap=True)))
    computed = {
        stage for stage, name in watched.items() if (folder / name).stat().st_mtime_ns != before.get(stage)
    }
    return computed, printed.getvalue()


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "model").glob("*.safetensors")
    return load_file(file)


def _refused(model: Any, prompts: tuple[str, ...]) -> list[bool]:
    return [is_refusal(answer) for answer in generate(model, planted_chat(), prompts, max_new_tokens=10)]


def test_full_fine_tuning_teaches_refusal_of_what_was_answered_and_leaves_the_rest(
    inputs: Path, tmp_path: Path
) -> None:
    base = planted_model()
    assert not any(_refused(base, ANSWERED)) and all(_refused(base, REFUSED))
    assert not any(_refused(base, HARMLESS))
    training = {
        "lora": False,
        "batch_size": 8,
        "micro_batch_size": 8,
        "steps": 12,
        "learning_rate": 0.01,
        "max_completion_length": 8,
        "probe_steps": 6,
        "probe_size": 4,
        "checkpoint_steps": 6,
    }
    settings = run_settings(
        inputs, tmp_path / "run", distillation=training, run={"report_to": ["tensorboard"]}
    )
    result = align(settings)
    aligned = load_model(str(tmp_path / "run" / "model"), device="cpu")
    assert all(_refused(aligned, ANSWERED)) and all(_refused(aligned, REFUSED))
    kept = generate(aligned, planted_chat(), HARMLESS, max_new_tokens=10)
    assert kept == generate(base, planted_chat(), HARMLESS, max_new_tokens=10)
    # The openers were found, not given; they lead the safety tokens.
    assert set(result.direction.openers.ids) == {token_id("I"), token_id("Sorry")}
    assert set(result.safety_tokens.ids[:2]) == {token_id("I"), token_id("Sorry")}
    # The tracker has every step's loss and mass on S.
    (events,) = (tmp_path / "run").glob("**/events.out.tfevents.*")
    tracker = EventAccumulator(str(events.parent)).Reload()
    steps = [entry for entry in result.model.log if "loss" in entry]
    assert len(steps) == 12
    for name in ("loss", "student_mass"):
        logged = [event.value for event in tracker.Scalars(f"train/{name}")]
        assert logged == pytest.approx([entry[name] for entry in steps], rel=1e-5)


def test_a_run_holds_what_was_asked_where_it_ran_and_what_came_out(finished: Path, inputs: Path) -> None:
    assert build_settings(load_recipe(finished / "config.yaml")) == run_settings(inputs, finished)
    environment = read_json(finished / "environment.json")
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["seed"] == 42
    direction, tokens = RefusalDirection.load(finished), SafetyTokens.load(finished)
    base = model_fingerprint(planted_model())
    assert direction.model_fingerprint == tokens.model_fingerprint == base
    record = read_json(finished / "model" / "safesteer.json")
    assert (record["steps"], record["model_fingerprint"]) == (4, base)
    card = (finished / "model" / "README.md").read_text(encoding="utf-8")
    assert f"base_model: {inputs / 'model'}" in card and "## Limits" in card
    assert f"layer {direction.layer}, position {direction.position}" in card
    # Nothing half-written and no pickle is handed on.
    assert not [path for path in finished.iterdir() if path.name.startswith(".")]
    assert not [path for path in (finished / "model").iterdir() if path.suffix in (".bin", ".pt", ".pth")]


def test_the_adapter_loads_on_its_base_and_changes_it(finished: Path, inputs: Path) -> None:
    aligned = load_model(str(finished / "model"), device="cpu")
    assert model_fingerprint(aligned) == model_fingerprint(planted_model())
    ids = torch.tensor(planted_chat().encode(ANSWERED[:1]))
    with torch.no_grad():
        change = (aligned(ids).logits - planted_model()(ids).logits).abs().max()
        with aligned.disable_adapter():
            assert torch.equal(aligned(ids).logits, planted_model()(ids).logits)
    assert change > 1e-4
    assert load_tokenizer(str(finished / "model")).chat_template == planted_chat().tokenizer.chat_template


def test_a_finished_run_computes_nothing_again(run: Path, inputs: Path) -> None:
    computed, printed = _aligned(run_settings(inputs, run))
    assert computed == set()
    assert printed.count("kept") == 3


@pytest.mark.parametrize(
    ("change", "recomputed"),
    [
        ({"distillation": {"micro_batch_size": 1, "gradient_checkpointing": True}}, set()),
        ({"run": {"logging_steps": 2}}, set()),
        ({"distillation": {"steps": 2}}, {"model"}),
        ({"safety_tokens": {"size": 5}}, {"tokens", "model"}),
        ({"direction": {"coefficient": 2.0}}, {"direction", "tokens", "model"}),
        ({"model": {"drop_date_lines": False}}, {"direction", "tokens", "model"}),
    ],
    ids=["memory", "logging", "steps", "tokens", "direction", "chat"],
)
def test_a_changed_setting_makes_anew_what_depends_on_it(
    change: dict[str, dict[str, Any]], recomputed: set[str], run: Path, inputs: Path
) -> None:
    computed, _ = _aligned(run_settings(inputs, run, **change))
    assert computed == recomputed


def test_changed_prompts_and_changed_models_make_everything_anew(
    run: Path, inputs: Path, tmp_path: Path
) -> None:
    # The same prompts elsewhere are the same input; one prompt less is another.
    (tmp_path / "harmful.json").write_text(json.dumps([*REFUSED, *ANSWERED]))
    prompts = {"harmful": str(tmp_path / "harmful.json")}
    assert _aligned(run_settings(inputs, run, prompts=prompts))[0] == set()
    (tmp_path / "harmful.json").write_text(json.dumps([*REFUSED[1:], *ANSWERED]))
    assert _aligned(run_settings(inputs, run, prompts=prompts))[0] == {"direction", "tokens", "model"}
    other = tmp_path / "model"
    changed = load_model(str(inputs / "model"), device="cpu")
    with torch.no_grad():
        changed.get_output_embeddings().weight.mul_(1.01)
    changed.save_pretrained(other)
    planted_chat().tokenizer.save_pretrained(other)
    computed, printed = _aligned(run_settings(inputs, run, prompts=prompts, model={"name": str(other)}))
    assert computed == {"direction", "tokens", "model"}
    assert printed.count("made anew") == 4  # the three stages and the checkpoints


def test_stages_run_alone_give_what_align_gives(finished: Path, inputs: Path, tmp_path: Path) -> None:
    settings = run_settings(inputs, tmp_path / "run")
    with pytest.raises(
        SafeSteerError, match=r"direction.json: no such file; run `safesteer direction --output"
    ):
        run_tokens(settings)
    direction = run_direction(settings)
    with pytest.raises(
        SafeSteerError, match=r"safety_tokens.json: no such file; run `safesteer tokens --output"
    ):
        run_distillation(settings)
    tokens = run_tokens(settings)
    run_distillation(settings)
    assert torch.equal(direction.vector, RefusalDirection.load(finished).vector)
    assert tokens == SafetyTokens.load(finished)
    alone, together = _weights(tmp_path / "run"), _weights(finished)
    assert alone.keys() == together.keys()
    assert all(torch.equal(alone[name], together[name]) for name in together)


def test_tokens_of_another_direction_are_told(run: Path, inputs: Path) -> None:
    shutil.rmtree(run / "model")
    settings, printed = run_settings(inputs, run), io.StringIO()
    console = RunConsole(console=Console(file=printed, soft_wrap=True))
    run_distillation(settings, console)
    assert "found with another direction" not in printed.getvalue()
    changed = run_settings(inputs, run, direction={"coefficient": 3.0})
    run_direction(changed)
    run_distillation(changed, console)
    assert "safety_tokens.json: found with another direction than direction.json" in printed.getvalue()


def test_safety_tokens_that_the_teacher_does_not_say_are_told_once(run: Path, inputs: Path) -> None:
    shutil.rmtree(run / "model")
    settings, printed = run_settings(inputs, run), io.StringIO()
    console = RunConsole(console=Console(file=printed, soft_wrap=True))
    run_distillation(settings, console)
    assert "next to nothing to learn" not in printed.getvalue()
    tokens = SafetyTokens.load(run)
    never_said = dataclasses.replace(tokens.tokens[0], id=token_id(" house"))
    dataclasses.replace(tokens, tokens=(never_said,), fingerprint="").save(run)
    run_distillation(settings, console)
    assert printed.getvalue().count("next to nothing to learn") == 1


def test_a_damaged_checkpoint_is_not_continued_from(run: Path, inputs: Path) -> None:
    shutil.rmtree(run / "model")
    last = run / "checkpoints" / "checkpoint-4"
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        kept = (last / name).read_bytes()
        (last / name).write_bytes(kept[: len(kept) // 2])
        _, printed = _aligned(run_settings(inputs, run))
        assert f"{name}: is damaged" in printed
        assert "continuing" not in printed
        shutil.rmtree(run / "model")


KILLED_RUN = """
import os, signal, sys
from pathlib import Path
import torch
from pipeline_runs import run_settings
from safesteer import training_stage
from safesteer.pipeline import align

torch.set_num_threads(1)

class Killer(training_stage._Progress):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

training_stage._Progress = Killer
align(run_settings(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def test_a_killed_training_continues_to_the_weights_of_an_uninterrupted_one(
    finished: Path, inputs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(inputs), str(folder)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-2000:]
    assert [path.name for path in (folder / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (folder / "model").exists()
    # What an interruption while a checkpoint is written would leave.
    shutil.copytree(folder / "checkpoints" / "checkpoint-2", folder / "checkpoints" / "checkpoint-3")
    (folder / "checkpoints" / "checkpoint-3" / "trainer_state.json").unlink()
    computed, printed = _aligned(run_settings(inputs, folder))
    assert computed == {"model"}
    assert f"continuing the training from {folder / 'checkpoints' / 'checkpoint-2'}" in printed
    resumed, uninterrupted = _weights(folder), _weights(finished)
    for name, weight in uninterrupted.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-5, atol=1e-7)
    logged = [
        entry["step"] for entry in read_json(folder / "model" / "safesteer.json")["log"] if "loss" in entry
    ]
    assert logged == [1, 2, 3, 4]


def test_a_training_with_other_settings_does_not_continue_from_the_old_checkpoints(
    run: Path, inputs: Path
) -> None:
    shutil.rmtree(run / "model")
    _, printed = _aligned(run_settings(inputs, run, distillation={"learning_rate": 2e-3, "steps": 2}))
    assert "continuing" not in printed
    assert [path.name for path in (run / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    assert read_json(run / "model" / "safesteer.json")["steps"] == 2


def test_two_processes_align_together(inputs: Path, tmp_path: Path) -> None:
    settings = run_settings(inputs, tmp_path / "run", distillation={"probe_steps": 2, "probe_size": 2})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(settings.yaml())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [*launch, "-m", "safesteer", "align", "--recipe", str(recipe)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.count("\ndistillation") == 1  # one process speaks
    assert read_json(tmp_path / "run" / "environment.json")["processes"] == 2
    record = read_json(tmp_path / "run" / "model" / "safesteer.json")
    assert record["steps"] == 4
    assert all(torch.isfinite(weight).all() for weight in _weights(tmp_path / "run").values())


def test_an_adapter_as_the_model_is_merged_and_aligned_as_a_base_of_its_own(
    finished: Path, inputs: Path, tmp_path: Path
) -> None:
    model = {"name": str(finished / "model")}
    with pytest.raises(SafeSteerError, match="is an adapter, and a second one trained on it"):
        align(run_settings(inputs, tmp_path / "run", model=model))
    assert not (tmp_path / "run").exists()
    result = align(
        run_settings(inputs, tmp_path / "run", model=model, distillation={"steps": 1, "lora": False})
    )
    merged = load_model(str(finished / "model"), device="cpu").merge_and_unload()
    assert result.model.model_fingerprint == model_fingerprint(merged)
    assert result.model.model_fingerprint != model_fingerprint(planted_model())
    assert len(_weights(tmp_path / "run")) == len(merged.state_dict())


@pytest.mark.parametrize("teacher", ["ema", "system_prompt", "frozen_copy"])
def test_other_teachers_run_from_settings_alone(teacher: str, run: Path, inputs: Path) -> None:
    training = {"teacher": teacher, "steps": 2, "refresh_steps": 1 if teacher == "ema" else 0}
    result = align(run_settings(inputs, run, distillation=training))
    losses = [entry["loss"] for entry in result.model.log if "loss" in entry]
    assert len(losses) == 2 and all(loss == loss for loss in losses)
    card = (result.model.folder / "README.md").read_text()
    assert ("from itself under a safety system prompt." in card) == (teacher == "system_prompt")
    assert f"of {result.direction.flip_answered} harmful validation prompts" in card
    # The steered teacher is not what a system prompt's student learnt from.
    roles = {subject.name for subject in subjects_of(run)}
    assert roles == {"base", "aligned"} | ({"teacher"} if teacher != "system_prompt" else set())


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().run.seed = 1  # type: ignore[misc]
