"""`safesteer distill`."""

import typer

from safesteer.cli.options import settings_command
from safesteer.cli.show import show_model
from safesteer.console import RunConsole
from safesteer.settings import Settings

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@settings_command(app, ("model", "prompts", "distillation", "run"), continues_run=True)
def distill(settings: Settings, console: RunConsole) -> None:
    """Distil the steered teacher into the model, from the direction and the safety tokens in the run."""
    from safesteer.pipeline import run_distillation

    show_model(console, run_distillation(settings, console))
