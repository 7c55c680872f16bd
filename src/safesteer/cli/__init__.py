"""The command line, `safesteer`: one file per command, which parses and prints and leaves the work to the library.

A command is imported when it is called, so that `safesteer --help` does not wait for PyTorch. To add one, write
`cli/NAME.py` with a `typer.Typer` called `app` and list it in `COMMANDS`.
"""

import importlib
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

COMMANDS = {
    "align": "Align a chat model end to end: direction, safety tokens, distillation.",
    "direction": "Find the refusal direction of a model.",
    "tokens": "Find the safety tokens of a model, from its refusal direction.",
    "distill": "Distil the steered teacher into the model, from direction and safety tokens.",
}
"""Command name to the line that `safesteer --help` shows; the code is in the module of that name."""


class _LazyGroup(TyperGroup):
    """Imports a command when it is called, not when it is listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return click.Command(cmd_name, help=COMMANDS[cmd_name]) if cmd_name in COMMANDS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, listed, rest = super().resolve_command(ctx, args)
        return name, listed and _load(str(name)), rest


def _load(name: str) -> click.Command:
    module = importlib.import_module(f"safesteer.cli.{name}")
    return typer.main.get_command(module.app)


def _show_version(wanted: bool) -> None:
    if wanted:
        from safesteer import __version__

        typer.echo(__version__)
        raise typer.Exit


app = typer.Typer(cls=_LazyGroup, no_args_is_help=True, add_completion=False, rich_markup_mode="rich")


@app.callback()
def _safesteer(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make an open-weights chat model refuse harmful requests without losing what it can do."""


def main(**kwargs: Any) -> None:
    """Run the command line; the entry point of the `safesteer` script."""
    app(prog_name="safesteer", **kwargs)
