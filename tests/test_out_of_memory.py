"""Memory that runs out, as the device would say it: the same results from smaller batches."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import tiny_training as tiny
from pipeline_runs import run_settings
from planted_model import ANSWERED, REFUSED, planted_chat, planted_model
from safesteer.artifacts import read_json
from safesteer.chat import generate
from safesteer.console import RunConsole
from safesteer.direction import RefusalDirection
from safesteer.errors import SafeSteerError
from safesteer.next_token import NextTokenReader, evaluating
from safesteer.out_of_memory import InParts, is_out_of_memory
from safesteer.pipeline import run_direction, run_distillation, run_tokens

TESTS = Path(__file__).parent
PROMPTS = (*REFUSED[:4], *ANSWERED[:3])


@dataclass
class Passes:
    """The rows of each pass, and whether the model that failed first was still there in a later one."""

    rows: list[int] = field(default_factory=list)
    still_held: list[bool] = field(default_factory=list)


@contextlib.contextmanager
def room_for(rows: int, *, training: bool = False, after: int = 0) -> Iterator[Passes]:
    """Let every model run out of memory on more rows than that: in all passes, or in those that are trained on.

    Args:
        rows: As many fit.
        training: Count only passes with gradients.
        after: So many passes are let through first.

    Yields:
        The passes so far.
    """
    passes = Passes()
    failed: list[weakref.ref[nn.Module]] = []

    def check(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not isinstance(module, nn.Embedding) or (training and not torch.is_grad_enabled()):
            return
        passes.rows.append(len(args[0]))
        passes.still_held += [failed[0]() is not None] if failed else []
        if len(args[0]) > rows and len(passes.rows) > after:
            failed.append(weakref.ref(module))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    handle = register_module_forward_pre_hook(check)
    try:
        yield passes
    finally:
        handle.remove()


def _console() -> tuple[RunConsole, io.StringIO]:
    printed = io.StringIO()
    return RunConsole(console=Console(file=printed, soft_wrap=True)), printed


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "model").glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def prepared(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with direction and safety tokens."""
    folder = tmp_path_factory.mktemp("runs") / "prepared"
    run_direction(run_settings(inputs, folder))
    run_tokens(run_settings(inputs, folder))
    return folder


def test_what_the_devices_say_is_known() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**50, dtype=torch.uint8)  # a pebibyte
    for error in (
        real.value,
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB)"),
        MemoryError(),
    ):
        assert is_out_of_memory(error)
    for other in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory.")):
        assert not is_out_of_memory(other)


def test_parts_are_halved_until_they_fit_and_stay_small() -> None:
    sizes: list[int] = []

    def squares(numbers: Sequence[int]) -> list[int]:
        sizes.append(len(numbers))
        if len(numbers) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [number**2 for number in numbers]

    in_parts = InParts()
    assert in_parts(squares, range(9)) == [number**2 for number in range(9)]
    assert sizes == [9, 4, 2, 2, 2, 2, 1]
    sizes.clear()
    assert in_parts(squares, range(3)) == [0, 1, 4]
    assert sizes == [2, 1]


def test_one_that_does_not_fit_and_other_errors_are_raised() -> None:
    def never(numbers: Sequence[int]) -> list[int]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        InParts()(never, [1, 2])
    with pytest.raises(ZeroDivisionError):
        InParts()(lambda numbers: [number / 0 for number in numbers], [1, 2])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_halves_its_batches_and_gives_the_same_texts(temperature: float) -> None:
    how = {"max_new_tokens": 8, "batch_size": 8, "temperature": temperature}
    wanted = generate(planted_model(), planted_chat(), PROMPTS, **how)
    assert len(set(wanted)) > 1
    with room_for(2) as passes:
        found = generate(planted_model(), planted_chat(), PROMPTS, **how)
    assert found == wanted
    assert passes.rows[:2] == [len(PROMPTS), 3] and max(passes.rows[2:]) == 1


def test_the_reader_s_samples_are_made_in_parts() -> None:
    reader = NextTokenReader(planted_model(), planted_chat(), 8)
    (batch,) = reader.batches(PROMPTS)
    with evaluating(reader.model):
        wanted = reader.sample(batch, 6)
        with room_for(3) as passes:
            found = reader.sample(batch, 6)
    assert torch.equal(found, wanted)
    assert passes.rows[0] == len(PROMPTS) and set(passes.rows[1:]) == {3, 1}


def test_direction_and_tokens_are_found_with_smaller_batches_and_kept(
    prepared: Path, inputs: Path, tmp_path: Path
) -> None:
    settings = run_settings(inputs, tmp_path / "run")
    console, printed = _console()
    with room_for(5):
        run_direction(settings, console)
        run_tokens(settings, console)
    assert "direction: out of memory with 32 prompts at a time; going on with 16." in printed.getvalue()
    found, wanted = RefusalDirection.load(tmp_path / "run"), RefusalDirection.load(prepared)
    assert (found.layer, found.position, found.fingerprint) == (
        wanted.layer,
        wanted.position,
        wanted.fingerprint,
    )
    torch.testing.assert_close(found.vector, wanted.vector)
    console, printed = _console()
    run_direction(settings, console)
    run_tokens(settings, console)
    assert printed.getvalue().count("kept") == 2


@pytest.mark.parametrize(
    ("training", "steps_before", "resumed_at"),
    [
        # An adapter goes on from its checkpoint; weights without one begin again, as they were at first.
        ({"checkpoint_steps": 1}, 2, 2),
        ({"checkpoint_steps": 0, "lora": False}, 1, None),
    ],
    ids=["lora", "full"],
)
def test_a_training_that_runs_out_of_memory_ends_as_one_with_the_smaller_micro_batch(
    training: dict[str, Any],
    steps_before: int,
    resumed_at: int | None,
    prepared: Path,
    inputs: Path,
    tmp_path: Path,
) -> None:
    training = {"steps": 3, "batch_size": 4} | training
    for name in ("small", "halved"):
        shutil.copytree(prepared, tmp_path / name)
    small = run_settings(inputs, tmp_path / "small", distillation=training | {"micro_batch_size": 2})
    run_distillation(small)
    console, printed = _console()
    with room_for(2, training=True, after=steps_before) as passes:
        run_distillation(run_settings(inputs, tmp_path / "halved", distillation=training), console)
    # Whole steps, the one that failed, and then two passes for every step that is left.
    assert passes.rows == [4] * (steps_before + 1) + [2] * 2 * (3 - (resumed_at or 0))
    assert not any(passes.still_held), "the memory of the first attempt is not free"
    assert (
        printed.getvalue().count("distillation: out of memory with 4 prompts at a time; going on with 2.")
        == 1
    )
    continued = (
        f"continuing the training from {tmp_path / 'halved' / 'checkpoints' / f'checkpoint-{resumed_at}'}"
    )
    assert (continued in printed.getvalue()) == (resumed_at is not None)
    wanted, found = _weights(tmp_path / "small"), _weights(tmp_path / "halved")
    assert wanted.keys() == found.keys()
    for name, weight in wanted.items():
        if resumed_at is None:
            assert torch.equal(found[name], weight)
        else:
            # The first steps were made of larger micro batches, whose sums are rounded elsewhere.
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
    record = read_json(tmp_path / "halved" / "model" / "safesteer.json")
    assert [entry["step"] for entry in record["log"] if "loss" in entry] == [1, 2, 3]


def test_a_training_that_does_not_fit_at_all_ends_with_what_to_do(
    prepared: Path, inputs: Path, tmp_path: Path
) -> None:
    shutil.copytree(prepared, tmp_path / "run")
    settings = run_settings(
        inputs, tmp_path / "run", distillation={"micro_batch_size": "auto", "lora": False}
    )
    console, printed = _console()
    with room_for(0, training=True) as passes, pytest.raises(SafeSteerError) as told:
        run_distillation(settings, console)
    assert passes.rows == [4, 2, 1] and not any(passes.still_held)
    assert "training on 4 prompts at a time (micro_batch_size: auto)" in printed.getvalue()
    assert str(told.value).startswith(
        "distillation: the device's memory does not hold even one prompt at a time; train a LoRA adapter"
    )
    assert "--teacher-copy cpu" in str(told.value)
    assert not (tmp_path / "run" / "model").exists()


SHORT_OF_MEMORY = """
import os, sys
from pathlib import Path
import tiny_training as tiny
from pipeline_runs import run_settings
from safesteer.cli.failures import reported
from safesteer.pipeline import run_distillation
from test_out_of_memory import room_for

settings = run_settings(Path(sys.argv[1]), Path(sys.argv[2]))
with room_for(1 if os.environ["RANK"] == "1" else 99, training=True), reported(debug=False):
    run_distillation(settings)
"""


def test_one_of_several_processes_says_that_it_ran_out_of_memory(
    prepared: Path, inputs: Path, tmp_path: Path
) -> None:
    shutil.copytree(prepared, tmp_path / "run")
    (tmp_path / "script.py").write_text(SHORT_OF_MEMORY)
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.run(
        [*launch, str(tmp_path / "script.py"), str(inputs), str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode != 0
    wanted = (
        "distillation: process 1 of 2 ran out of memory with 2 prompts at a time, which ends the run; give"
    )
    assert f"{wanted} --micro-batch-size 1" in process.stderr, process.stderr[-2000:]


def test_rollouts_that_do_not_fit_are_sampled_in_parts_and_stay_the_same(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    prompts = tiny.chat().encode(tiny.HARMFUL[:4])
    whole = trainer._generate_single_turn(prompts, None, {})
    with room_for(2) as passes:
        responses = trainer._generate_single_turn(prompts, None, {})
    assert responses == whole
    assert len(set(map(tuple, responses))) == 4
    assert all(0 < len(response) <= trainer.args.max_completion_length for response in responses)
    assert passes.rows[:2] == [4, 2]
    assert set(passes.rows[1:]) == {2}
    with room_for(2) as passes:
        trainer._generate_single_turn(prompts, None, {})
    assert set(passes.rows) == {2}  # what did not fit once is not tried again
