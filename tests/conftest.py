"""Fixtures and settings that every test shares."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before transformers or datasets is imported, which read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from hypothesis import settings

# A busy machine is no failure.
settings.register_profile("safesteer", deadline=None)
settings.load_profile("safesteer")


def find_shared_data() -> Path | None:
    """Return the folder of benchmark data and tokenizers, None where there is none."""
    configured = os.environ.get("SAFESTEER_SHARED_DATA")
    folder = Path(configured) if configured else Path(__file__).parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of benchmark data and tokenizers; skips the test where there is none."""
    folder = find_shared_data()
    if folder is None:
        pytest.skip("no benchmark data: set SAFESTEER_SHARED_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that refuses, and prompts: `pipeline_runs.write_inputs`."""
    from pipeline_runs import write_inputs

    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Start every test from the same random state."""
    torch.manual_seed(0)
    yield
