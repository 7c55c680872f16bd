"""`safesteer tokens`."""

import typer

from safesteer.cli.options import settings_command
from safesteer.cli.show import show_tokens
from safesteer.console import RunConsole
from safesteer.settings import Settings

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@settings_command(app, ("model", "prompts", "safety_tokens", "run"), continues_run=True)
def tokens(settings: Settings, console: RunConsole) -> None:
    """Find the safety tokens of a model, from the refusal direction that is in the run."""
    from safesteer.pipeline import run_tokens

    show_tokens(console, run_tokens(settings, console))
