"""The command line: what it shows, what it passes on, how it fails."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from pipeline_runs import run_settings
from safesteer import __version__
from safesteer.cli import COMMANDS, app
from safesteer.cli.failures import explanation, reported
from safesteer.errors import SafeSteerError
from safesteer.recipes import build_settings, load_recipe, setting_fields

SECTIONS = {
    "align": {"model", "prompts", "direction", "safety_tokens", "distillation", "run"},
    "direction": {"model", "prompts", "direction", "run"},
    "tokens": {"model", "prompts", "safety_tokens", "run"},
    "distill": {"model", "prompts", "distillation", "run"},
}


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "300", "TERM": "dumb"})


@pytest.fixture
def recipe(inputs: Path, tmp_path: Path) -> Path:
    """A recipe of a run of seconds, in the folder `run` beside it."""
    path = tmp_path / "recipe.yaml"
    path.write_text(run_settings(inputs, tmp_path / "run").yaml())
    return path


def test_the_first_help_lists_every_command_without_loading_pytorch() -> None:
    code = (
        "import sys, safesteer.cli as c\ntry:\n c.main(args=['--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    ).stdout
    assert shown.strip().endswith("False")
    for command, help in COMMANDS.items():
        assert re.search(rf"{command}\s+{help[:20]}", shown)


def test_the_version_is_the_package_s() -> None:
    assert invoke("--version").output.strip() == __version__


@pytest.mark.parametrize("command", SECTIONS)
def test_help_shows_every_setting_of_the_command_with_its_default(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())
    for entry in setting_fields():
        flag = "--full" if entry.name == "lora" else entry.flag
        is_shown = re.search(rf"{flag}(?![\w-])", shown) is not None
        assert is_shown == (entry.section in SECTIONS[command]), entry.flag
        if is_shown and isinstance(entry.default, (int, float)) and not isinstance(entry.default, bool):
            assert f"{entry.help.split('. ')[-1]} [default: {entry.default}]" in shown, entry.flag


def test_flags_win_over_the_recipe_and_reach_the_run(recipe: Path, inputs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    flags = ["--coefficient", "2", "--output", str(other), "--no-filter-prompts", "--quiet"]
    result = invoke("direction", "--recipe", recipe, *flags)
    assert (result.exit_code, result.output) == (0, "")
    saved = build_settings(load_recipe(other / "config.yaml"))
    wanted = run_settings(
        inputs, other, direction={"coefficient": 2.0, "filter_prompts": False}, run={"output": str(other)}
    )
    assert saved == wanted


def test_stages_continue_a_run_from_its_own_settings(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = invoke("direction", "--recipe", recipe)
    assert first.exit_code == 0, first.output
    assert "Best candidates" in first.output and "Refusals open with: 'I' 'Sorry'" in first.output
    second = invoke("tokens", "--output", run, "--tokens-size", "4")
    assert second.exit_code == 0, second.output
    assert re.search(r"'Sorry'\s+│\s+\d+\s+│", second.output)
    third = invoke("distill", "--output", run, "--steps", "1")
    assert third.exit_code == 0, third.output
    assert f"The aligned model is in {run / 'model'}" in third.output
    settings = build_settings(load_recipe(run / "config.yaml"))
    assert (settings.safety_tokens.size, settings.distillation.steps) == (4, 1)


def test_every_stage_is_summed_up_in_two_lines(recipe: Path) -> None:
    result = invoke("align", "--recipe", recipe, "--steps", "1")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    starts = [
        index for index, line in enumerate(lines) if re.match("(direction|safety tokens|distillation) ", line)
    ]
    assert starts == [0, 2, 4]
    for start, artifact in zip(starts, ("direction.json", "safety_tokens.json", "model"), strict=True):
        assert re.match(rf" {{15}}\d+ s · .*{artifact}", lines[start + 1])


def test_a_dry_run_shows_plan_settings_memory_and_steps_and_writes_nothing(
    recipe: Path, tmp_path: Path
) -> None:
    result = invoke("align", "--recipe", recipe, "--dry-run", "--learning-rate", "3e-4")
    assert result.exit_code == 0, result.output
    assert "learning_rate: 0.0003" in result.output
    assert (
        "up to 15 candidates (3 layers × 5 positions) from 20 harmful and 16 harmless prompts"
        in result.output
    )
    assert "4 steps of 4 prompts, 2 of them harmless" in result.output
    assert "most at a time" in result.output and "4 optimizer steps" in result.output
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_one_sentence_and_exit_code_2(recipe: Path) -> None:
    result = invoke("align", "--recipe", recipe, "--support", "trunkated")
    assert result.exit_code == 2
    assert result.stdout == ""
    wanted = "Error: --support is 'trunkated' (did you mean 'truncated'?); give one of truncated, tail,"
    assert result.stderr.startswith(wanted)
    assert result.stderr.count("\n") == 1


def test_debug_shows_the_traceback(recipe: Path) -> None:
    result = invoke("align", "--recipe", recipe, "--support", "trunkated", "--debug")
    assert isinstance(result.exception, SafeSteerError)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (SafeSteerError("x: rule; remedy."), 2, "Error: x: rule; remedy.\n"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 2, "lower --micro-batch-size"),
        (FileNotFoundError(2, "No such file", "a.txt"), 2, "a.txt: no such file"),
        (PermissionError(13, "denied", "/x"), 2, "/x: may not be read or written"),
        (OSError(28, "No space left on device", "w.bin"), 2, "the disk is full (w.bin)"),
        (NotADirectoryError(20, "Not a directory", "f"), 2, "f: is a file where a folder is needed"),
        (
            ZeroDivisionError("division\nby zero"),
            1,
            "unexpected ZeroDivisionError: division by zero (run again",
        ),
        (KeyboardInterrupt(), 130, "interrupted; the same command continues the run."),
    ],
)
def test_errors_of_other_libraries_become_sentences(
    error: BaseException, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as exit, reported(debug=False):
        raise error
    assert exit.value.exit_code == code
    stderr = capsys.readouterr().err
    assert told in stderr
    assert stderr.count("\n") == 1
    with pytest.raises(type(error)), reported(debug=True):
        raise error


def test_a_hub_that_cannot_be_reached_is_told() -> None:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    assert issubclass(HfHubHTTPError, OSError)
    told = explanation(OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled."))
    assert told is not None and "the hub could not be reached (Cannot reach the hub" in told
