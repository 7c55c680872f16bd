"""The benchmarks of whole pipelines, at a size for tests: what docs/cost.md gives as commands for a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("options", [(), ("--full",)])
def test_a_whole_pipeline_runs_on_random_weights(options: tuple[str, ...]) -> None:
    command = [sys.executable, "end_to_end.py", "--shape", "tiny", "--completion", "2", "--only", "ours"]
    done = subprocess.run(
        [*command, *options], cwd=BENCHMARKS, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seconds, megabytes = done.stdout.split("ours: ")[1].split(" s, ")
    assert float(seconds) > 0 and float(megabytes.split()[0]) > 0
