"""The demo: align the bundled testbed, measure it before and after, beside its teacher."""

import hashlib
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from safesteer.artifacts import fingerprint, read_json, write_json
from safesteer.console import RunConsole
from safesteer.evaluation.subjects import ROLES, Role, Subject, subjects_of
from safesteer.pipeline import AlignmentRun, align
from safesteer.recipes import build_settings, load_recipe
from safesteer.settings import Settings
from safesteer.testbed.measure import Measurement, measure
from safesteer.testbed.splits import Split


@dataclass(frozen=True)
class DemoResult:
    """A finished demo.

    Attributes:
        run: The alignment and its artifacts.
        settings: What it was run with.
        measurements: Of the base model, of its safety teacher and of the aligned model.
        seconds: Wall-clock time, measuring included.
        peak_memory_mb: Most memory this process held, in MB.
    """

    run: AlignmentRun
    settings: Settings
    measurements: dict[str, Measurement]
    seconds: float
    peak_memory_mb: float

    def record(self) -> dict[str, Any]:
        """The figures as `safesteer demo --json` writes them; rates in percent."""
        return {
            **{name: measurement.figures() for name, measurement in self.measurements.items()},
            "settings": self.settings.layer(),
            "seed": self.settings.run.seed,
            "seconds": round(self.seconds, 1),
            "peak_memory_mb": round(self.peak_memory_mb),
        }


def testbed_folder() -> Path:
    """The folder of the bundled testbed: model, prompts, recipe."""
    return Path(str(files("safesteer.testbed")))


def demo_settings(
    output: str | Path, seed: int, overrides: dict[str, dict[str, Any]] | None = None
) -> Settings:
    """The testbed's recipe with a folder, a seed and whatever else is overridden."""
    recipe = load_recipe(testbed_folder() / "recipe.yaml")
    return build_settings(recipe, {"run": {"output": str(output), "seed": seed}}, overrides or {})


def run_demo(
    settings: Settings, console: RunConsole, split: Split = "test", measured: Sequence[Role] = ROLES
) -> DemoResult:
    """Align the testbed with `settings`, measure `measured` on `split` and keep it all in the run's demo/."""
    started = time.monotonic()
    run = align(settings, console)
    # Not evaluation/, which `safesteer evaluate` fills with other settings: records are never mixed.
    measured_in = run.folder / "demo"
    _clear_if_stale(measured_in, fingerprint([_sha256_of(run.folder / "model"), split]))
    with console.stage("measuring") as progress:
        subjects = subjects_of(run.folder, measured, device=settings.model.device)
        measurements = measure(
            [subject for subject in subjects if isinstance(subject, Subject)],
            split,
            measured_in,
            run.direction.openers.ids,
            progress=progress,
        )
    result = DemoResult(run, settings, measurements, time.monotonic() - started, peak_memory_mb())
    write_json(measured_in / "demo.json", result.record())
    return result


def _clear_if_stale(folder: Path, made_of: str) -> None:
    """Remove what an earlier model of this run answered: records are never mixed."""
    note = folder / "made_of.json"
    if note.exists() and read_json(note).get("fingerprint") == made_of:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(note, {"fingerprint": made_of})


def _sha256_of(folder: Path) -> str:
    """Hash the weights in a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def peak_memory_mb() -> float:
    """Most memory this process has held so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
