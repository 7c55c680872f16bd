"""Launching a worker in two gloo processes on the CPU."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

AVERAGES = (
    "loss",
    "divergence",
    "student_mass",
    "teacher_mass",
    "kl_on",
    "entropy",
    "anchor/divergence",
    "completions/mean_length",
    "probe/harmful_refusal_rate",
    "probe/harmless_refusal_rate",
)
"""What both log, averaged over processes."""


def results_of(worker: Path, folder: Path, environment: Mapping[str, str] | None = None) -> Any:
    """Run `worker` in two processes and return what the first saved as results.pt in `folder`."""
    tests = worker.parents[1]
    path = [str(tests), str(tests.parent / "src"), os.environ.get("PYTHONPATH", "")]
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker, folder],
        env={
            **(environment or os.environ),
            "PYTHONPATH": os.pathsep.join(path),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return torch.load(folder / "results.pt", weights_only=True)
