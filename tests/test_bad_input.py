"""What a person gets for bad input: one sentence, exit code 2, nothing half-written."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pipeline_runs import run_settings
from planted_model import ANSWERED, HARMLESS, REFUSED
from safesteer.artifacts import read_json
from safesteer.cli import app
from safesteer.pipeline import align
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    align(run_settings(inputs, folder, distillation={"steps": 1}))
    return folder


class Bench:
    """A run that would work, to be spoilt."""

    def __init__(self, inputs: Path, folder: Path) -> None:
        self.model = Path(shutil.copytree(inputs / "model", folder / "model"))
        self.harmful = Path(shutil.copy(inputs / "harmful.json", folder))
        self.harmless = Path(shutil.copy(inputs / "harmless.json", folder))
        self.output = folder / "run"
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(run_settings(folder, self.output).yaml())

    def align(self, *flags: str | Path, command: str = "align") -> str:
        """Run a command that must fail as it should, and return its sentence."""
        arguments = [command, "--recipe", str(self.recipe), "--output", str(self.output), *map(str, flags)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2, result.output
        assert re.fullmatch(r"Error: [^\n]+\n", result.stderr), result.stderr
        self.nothing_half_written()
        return result.stderr.removeprefix("Error: ").strip()

    def nothing_half_written(self) -> None:
        left = [path for path in self.output.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]
        assert not left
        assert not (self.output / "model").exists() or (self.output / "model" / "safesteer.json").exists()


@pytest.fixture
def bench(inputs: Path, tmp_path: Path) -> Bench:
    return Bench(inputs, tmp_path)


def test_the_bench_works_unspoilt_and_counts_what_it_left_out(bench: Bench) -> None:
    repeated = [*REFUSED, REFUSED[0].upper(), *ANSWERED, "x" * 5000]
    bench.harmful.write_text(json.dumps(repeated))
    result = CliRunner().invoke(app, ["direction", "--recipe", str(bench.recipe)])
    assert result.exit_code == 0, result.output
    assert f"{bench.harmful}: left out 1 repeated and 1 overlong prompts, kept 20." in result.output


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            '{"prompt": "a"}\n{"prompt": ""}\n',
            "harmful.jsonl line 2: field 'prompt' is empty; remove the line",
        ),
        ('{"prompt": "a"}\n{"category": "b"}\n', "harmful.jsonl line 2: field 'prompt' is missing"),
        ('{"prompt": "a"}\n{"prompt": \n', "harmful.jsonl line 2"),
        ('{"wish": "a"}\n', "choose one with --prompt-field"),
        ("", "holds no usable prompt"),
        ('{"prompt": ' + "9" * 5000 + "}\n", "harmful.jsonl line 1: cannot be read"),
        ('{"prompt": "a \\ud83d b"}\n', "line 1: field 'prompt' holds half a surrogate pair"),
        ('{"wish \\u001b[31m": "a"}\n', "(wish \\u001b[31m); choose one with --prompt-field"),
    ],
)
def test_faulty_prompts_are_told_by_file_and_line(bench: Bench, text: str, told: str) -> None:
    harmful = bench.harmful.with_suffix(".jsonl")
    harmful.write_text(text)
    assert told in bench.align("--harmful", harmful)
    assert not bench.output.exists()


def test_missing_inputs_are_told_before_anything_is_done(bench: Bench, tmp_path: Path) -> None:
    assert bench.align("--harmful", tmp_path / "none.json").startswith(
        f"{tmp_path / 'none.json'}: no such file"
    )
    assert "is no file name" in bench.align("--harmful", "x" * 5000)
    assert "no model was named; give --model" in bench.align("--model", "")
    assert "no harmful prompts were named; give --harmful" in bench.align("--harmful", "")
    assert "no such recipe" in bench.align("--recipe", tmp_path / "none.yaml")
    assert "its tokenizer cannot be loaded" in bench.align("--model", tmp_path / "none")
    assert "none.jinja: cannot be read" in bench.align("--chat-template", tmp_path / "none.jinja")
    assert not bench.output.exists()


def test_fewer_prompts_than_asked(bench: Bench) -> None:
    told = bench.align("--harmful-count", "21")
    assert told == (
        f"{bench.harmful}: 21 prompts were asked for but it has 20 usable ones; add prompts or ask for fewer."
    )
    bench.harmless.write_text(json.dumps(HARMLESS[:7]))
    assert "has 7 harmless prompts, too few to find a refusal direction" in bench.align()


def test_no_chat_template(bench: Bench) -> None:
    (bench.model / "chat_template.jinja").unlink(missing_ok=True)
    config = bench.model / "tokenizer_config.json"
    config.write_text(
        json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "chat_template"})
    )
    assert "has no chat template" in bench.align()
    assert not bench.output.exists()


def test_unknown_architecture(bench: Bench) -> None:
    config = bench.model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "nonesuch"}))
    told = bench.align("--dry-run")
    assert str(bench.model) in told and "nonesuch" in told
    assert str(bench.model) in bench.align()


def test_pickled_weights_are_never_loaded(bench: Bench) -> None:
    (bench.model / "model.safetensors").unlink()
    torch.save(tiny_model("qwen3").state_dict(), bench.model / "pytorch_model.bin")
    assert "cannot be loaded as a causal language model" in bench.align()


def test_code_that_comes_with_a_model_is_not_run(bench: Bench, tmp_path: Path) -> None:
    config = bench.model / "config.json"
    remote = {"model_type": "nonesuch", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | remote))
    (bench.model / "c.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    bench.align()
    bench.align("--dry-run")
    assert not (tmp_path / "ran").exists()


def test_harmful_prompts_that_the_model_never_refuses(bench: Bench) -> None:
    bench.harmful.write_text(json.dumps(ANSWERED))
    told = bench.align()
    assert "none of the" in told and "responses to the" in told and "was a refusal" in told
    told = bench.align("--refusal-token-ids", "40")
    assert "0 of 8 harmful prompts passed the filter" in told and "the model refuses too few of them" in told
    assert not (bench.output / "direction.json").exists()


def test_no_candidate_direction_survives(bench: Bench) -> None:
    # Which test the near-misses failed, and what may be relaxed.
    told = bench.align("--max-kl", "-1")
    assert "fail only KL ≤ -1" in told and "raise --max-kl" in told
    told = bench.align("--min-induction", "50", "--fallback", "error")
    assert "induction ≥ 50" in told and "--min-induction" in told
    assert not (bench.output / "direction.json").exists()


@pytest.mark.parametrize(
    ("spoil", "command", "told"),
    [
        (lambda run: _truncate(run / "direction.safetensors"), "tokens", "cannot be read as safetensors"),
        (lambda run: _truncate(run / "direction.json"), "tokens", "cannot be read as JSON"),
        (lambda run: _truncate(run / "safety_tokens.json"), "distill", "cannot be read as JSON"),
        (
            lambda run: (run / "safety_tokens.json").write_text("{}"),
            "distill",
            "is not a whole set of safety tokens",
        ),
        (lambda run: (run / "direction.safetensors").unlink(), "tokens", "no such file"),
        (lambda run: _truncate(run / "direction.json"), "align", "cannot be read as JSON"),
    ],
)
def test_damaged_artifacts(
    bench: Bench, finished: Path, spoil: Callable[[Path], object], command: str, told: str
) -> None:
    shutil.copytree(finished, bench.output)
    spoil(bench.output)
    assert told in bench.align(command=command)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_artifacts_of_another_model(bench: Bench, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, bench.output)
    other = tiny_model(
        "qwen3", vocab_size=json.loads((bench.model / "config.json").read_text())["vocab_size"]
    )
    other.save_pretrained(bench.model)
    assert "the refusal direction was found on another model" in bench.align(command="tokens")
    assert "the refusal direction was found on another model" in bench.align(command="distill")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    bench: Bench, finished: Path
) -> None:
    for name in ("direction.json", "direction.safetensors", "safety_tokens.json"):
        bench.output.mkdir(exist_ok=True)
        shutil.copy(finished / name, bench.output)
    told = bench.align("--learning-rate", "1e30", "--warmup-ratio", "0", "--full", command="distill")
    assert re.search(r"(loss|gradient norm) became (nan|inf|-inf) at step \d", told), told
    last = bench.output / "checkpoints" / "checkpoint-1"
    assert str(last) in told
    assert math.isfinite(read_json(last / "trainer_state.json")["log_history"][0]["loss"])
    assert not (bench.output / "model").exists()


def test_bad_flags_and_recipes(bench: Bench) -> None:
    assert "(did you mean 'adam_beta2'?)" in bench.align("--trainer-args", '{"adam_betta2": 0.9}')
    assert bench.align("--batch-size", "many") == "--batch-size is 'many'; give a whole number."
    assert bench.align("--report-to", "tensorbord").startswith(
        "--report-to: there is no tracker 'tensorbord' (did you mean 'tensorboard'?)"
    )
    for flags in ([], ["--dry-run"]):
        told = bench.align("--lora-targets", "q_pro", *flags)
        assert told.startswith("--lora-targets: the model has no linear map 'q_pro' (did you mean 'q_proj'?)")
    assert "no linear map 'mlp'" in bench.align("--lora-targets", "mlp")
    assert "skip_tokens must be below max_completion_length" in bench.align("--skip-tokens", "5000")
    assert not bench.output.exists()
    bench.recipe.write_text("distillation:\n  learnin_rate: 1e-4\n")
    assert bench.align() == (
        f"{bench.recipe} line 2: distillation.learnin_rate is no setting (did you mean 'learning_rate'?); "
        "recipes/template.yaml lists them all."
    )
    assert not bench.output.exists()


def test_an_output_that_is_a_file(bench: Bench) -> None:
    bench.output.write_text("here already")
    told = bench.align()
    assert told == f"{bench.output}: is a file where a folder is needed; choose another --output."
    assert bench.output.read_text() == "here already"
