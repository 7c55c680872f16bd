"""`safesteer align`."""

from typing import Annotated

import typer

from safesteer.cli.options import PANELS, settings_command
from safesteer.cli.show import show_plan, show_run
from safesteer.console import RunConsole
from safesteer.settings import Settings

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@settings_command(app, tuple(PANELS))
def align(
    settings: Settings,
    console: RunConsole,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print plan, settings, memory and steps; load and write nothing."),
    ] = False,
) -> None:
    """Align a chat model: find its refusal direction and safety tokens, distil the steered teacher into it.

    A run that is in --output already continues: stages whose inputs are unchanged are kept, a changed input
    makes a stage and those after it run anew, and an interrupted training goes on from its last checkpoint.

    [dim]safesteer align --model Qwen/Qwen3-4B-Instruct-2507 --harmful harmful.jsonl --output runs/qwen3[/]
    """
    if dry_run:
        from safesteer.plan import make_plan

        show_plan(console, settings, make_plan(settings, console))
        return
    from safesteer.pipeline import align as run

    show_run(console, run(settings, console))
