"""Two processes give the loss, the gradients and the logged averages of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("train_worker.py")


def launch(
    folder: Path, processes: int, *arguments: str
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Run the worker under torchrun; return the first step's gradients and the log."""
    folder.mkdir()
    tests = WORKER.parents[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(tests), str(tests.parent / "src"), os.environ.get("PYTHONPATH", "")]
        ),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    finished = subprocess.run(
        [*command, str(WORKER), str(folder), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    gradients = torch.load(folder / "gradients.pt", weights_only=True)
    return gradients, json.loads((folder / "log.json").read_text())


@pytest.mark.parametrize("variant", ["full-response", "lora-token"])
def test_two_processes_are_one(tmp_path: Path, variant: str) -> None:
    one, log = launch(tmp_path / "one", 1, variant)
    two, other_log = launch(tmp_path / "two", 2, variant)
    assert one.keys() == two.keys()
    assert len(one) > 10
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    names = ("loss", "divergence", "student_mass", "teacher_mass", "kl_on", "entropy", "anchor/divergence")
    probes = ("probe/harmful_refusal_rate", "probe/harmless_refusal_rate")
    for entry, other in zip(log, other_log, strict=True):
        for name in (*names, *probes, "completions/mean_length"):
            assert (name in entry) == (name in other), name
            if name in entry:
                assert other[name] == pytest.approx(entry[name], rel=1e-4, abs=1e-7), name
    assert sum("loss" in entry for entry in log) == 2
