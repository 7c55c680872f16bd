"""Two processes in shards by FSDP2, as `recipes/distributed/fsdp2.yaml` sets it up, train what one process does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from fsdp2_worker import RESUMED, VARIANTS, train
from safetensors.torch import load_file
from torch import Tensor
from two_processes import AVERAGES, results_of

WORKER = Path(__file__).with_name("fsdp2_worker.py")
CONFIG = Path(__file__).parents[2] / "recipes" / "distributed" / "fsdp2.yaml"
LOGGED = ("grad_norm", *AVERAGES)


def launch_environment() -> dict[str, str]:
    """What `accelerate launch` sets from the config, in float32 and without GPUs."""
    arguments = ["--config_file", str(CONFIG), "--mixed_precision", "no", str(WORKER)]
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    return prepare_multi_gpu_env(parsed)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What two processes saved and logged."""
    folder = tmp_path_factory.mktemp("fsdp2")
    return folder, results_of(WORKER, folder, launch_environment())


def saved(folder: Path) -> dict[str, Tensor]:
    """The one weights file of a saved model or adapter."""
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shards_train_what_one_process_does(
    tmp_path: Path, two_processes: tuple[Path, Any], variant: str
) -> None:
    log, in_shards = train(tmp_path, variant)
    folder, results = two_processes
    other_log, other_in_shards = results[variant]
    assert (in_shards, other_in_shards) == (False, True)

    assert sum("loss" in entry for entry in log) == 2
    for entry, other in zip(log, other_log, strict=True):
        for name in LOGGED:
            assert (name in entry) == (name in other), name
            if name in entry:
                assert other[name] == pytest.approx(entry[name], rel=1e-4, abs=1e-7), name

    one, first = saved(tmp_path / "model"), saved(tmp_path / "checkpoint-1")
    versions = ["model", "resumed"] if variant in RESUMED else ["model"]
    for version in versions:
        two = saved(folder / variant / version)
        if variant == "tied":  # gathered one by one, the two are no longer one tensor
            torch.testing.assert_close(
                two.pop("lm_head.weight"), two["model.embed_tokens.weight"], rtol=0, atol=0
            )
        assert one.keys() == two.keys()
        for name, weight in one.items():
            # The second step moved it far more than that.
            torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5, msg=f"{version} {name}")
    moved = [float((one[name] - first[name]).abs().max()) for name in one]
    assert sum(distance > 1e-3 for distance in moved) > len(moved) // 2
