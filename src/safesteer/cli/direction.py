"""`safesteer direction`."""

import typer

from safesteer.cli.options import settings_command
from safesteer.cli.show import show_direction
from safesteer.console import RunConsole
from safesteer.settings import Settings

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@settings_command(app, ("model", "prompts", "direction", "run"), continues_run=True)
def direction(settings: Settings, console: RunConsole) -> None:
    """Find the refusal direction of a model, and how strongly to add it."""
    from safesteer.pipeline import run_direction

    show_direction(console, run_direction(settings, console))
