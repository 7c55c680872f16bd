"""`safesteer testbed`."""

from pathlib import Path
from typing import Annotated

import typer

from safesteer.cli.failures import reported

app = typer.Typer(add_completion=False, rich_markup_mode="rich", no_args_is_help=True)


@app.callback()
def _testbed() -> None:
    """The testbed: a tiny chat model that this package trains from scratch, as a test instrument."""


@app.command()
def build(
    output: Annotated[
        Path, typer.Option("--output", help="Working folder; a training that is there continues.")
    ],
    data_dir: Annotated[
        Path | None,
        typer.Option(
            "--data-dir",
            help="Folder with the real prompts to add to the mix; none by default.",
            metavar="DIR",
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Model folder of a built testbed to go on from, with an optimizer and a schedule of its own; "
            "random weights by default.",
            metavar="DIR",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimizer steps instead of the recipe's.")
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the layers first: passes take a third less. Needs a C++ compiler on a CPU.",
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train the testbed. Takes an hour or two on two cores; run the same command again to continue."""
    with reported(debug=debug):
        from safesteer.testbed.build import BuildSettings, build

        settings = BuildSettings() if steps is None else BuildSettings(steps=steps)
        typer.echo(f"The testbed is in {build(output, data_dir, settings, start, compiled)}")
