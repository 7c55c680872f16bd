"""The demo: align the bundled testbed, measure it before and after, beside its teacher."""

import json
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from safesteer.artifacts import write_json
from safesteer.chat import Chat
from safesteer.console import RunConsole
from safesteer.loading import load_model, load_tokenizer
from safesteer.pipeline import AlignmentRun, align
from safesteer.recipes import build_settings, load_recipe
from safesteer.settings import Settings
from safesteer.testbed.measure import Measurement, measure
from safesteer.testbed.requests import Split

MEASURED = ("base", "teacher", "aligned")


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
    settings: Settings, console: RunConsole, split: Split = "test", measured: Sequence[str] = MEASURED
) -> DemoResult:
    """Align the testbed with `settings`, measure `measured` on `split` and keep it all in the run's evaluation/."""
    started = time.monotonic()
    run = align(settings, console)
    chat = Chat(load_tokenizer(settings.model.name))
    measurements: dict[str, Measurement] = {}
    with console.stage("measuring") as progress:
        for number, name in enumerate(measured):
            progress(f"the {name} model", number, len(measured))
            folder = run.folder / "model" if name == "aligned" else settings.model.name
            model = load_model(str(folder), device=settings.model.device)
            steering = run.direction.steering.applied(model) if name == "teacher" else nullcontext()
            with steering:
                measurements[name] = measure(model, chat, split)
    result = DemoResult(run, settings, measurements, time.monotonic() - started, peak_memory_mb())
    _keep(result, run.folder / "evaluation")
    return result


def _keep(result: DemoResult, folder: Path) -> None:
    """Write the figures, and every answer with its verdict."""
    folder.mkdir(exist_ok=True)
    for name, measurement in result.measurements.items():
        rows = [
            {"prompt": a.request.prompt, "kind": a.request.kind, "response": a.response, "refused": a.refused}
            for a in measurement.answers
        ]
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    write_json(folder / "summary.json", result.record())


def peak_memory_mb() -> float:
    """Most memory this process has held so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
