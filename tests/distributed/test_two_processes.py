"""Two processes give the loss, the gradients and the logged averages of one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from train_worker import VARIANTS, train
from two_processes import AVERAGES, results_of

WORKER = Path(__file__).with_name("train_worker.py")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gradients and log by variant, from two processes."""
    return results_of(WORKER, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_are_one(tmp_path: Path, two_processes: Any, variant: str) -> None:
    one, log = train(tmp_path, variant)
    two, other_log = two_processes[variant]
    assert one.keys() == two.keys()
    assert len(one) > 10
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    assert sum("loss" in entry for entry in log) == 2
    for entry, other in zip(log, other_log, strict=True):
        for name in AVERAGES:
            assert (name in entry) == (name in other), name
            if name in entry:
                assert other[name] == pytest.approx(entry[name], rel=1e-4, abs=1e-7), name
