"""`safesteer demo`."""

from pathlib import Path
from typing import Annotated

import typer

from safesteer.cli.options import settings_command
from safesteer.console import RunConsole
from safesteer.settings import Settings

app = typer.Typer(add_completion=False, rich_markup_mode="rich")
RECIPE = Path(__file__).parents[1] / "testbed" / "recipe.yaml"


@settings_command(app, ("distillation", "direction", "safety_tokens", "run"), default_recipe=RECIPE)
def demo(
    settings: Settings,
    console: RunConsole,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.", metavar="FILE")
    ] = None,
    split: Annotated[
        str, typer.Option("--split", help="Measure on the prompts of this split: test or validation.")
    ] = "test",
) -> None:
    """Align the bundled testbed, a tiny chat model, with 100 harmful prompts, and show that it worked.

    Prints refusals, skills and perplexity before and after, and of the safety teacher in between. With
    [bold]--vocabulary full[/] the same run takes the loss on the whole vocabulary: see what localization buys.
    """
    from safesteer.artifacts import read_json
    from safesteer.cli.show_demo import show_demo
    from safesteer.errors import SafeSteerError
    from safesteer.testbed.demo import run_demo, testbed_folder
    from safesteer.testbed.splits import SPLITS

    if split not in SPLITS:
        raise SafeSteerError(f"--split is {split!r}; give one of {', '.join(SPLITS)}.")
    millions = read_json(testbed_folder() / "model" / "recipe.json")["parameters"] / 1e6
    console.note(
        f"Aligning the testbed: a {millions:.1f}-million-parameter test instrument, not a model to rely on."
    )
    result = run_demo(settings, console, split)
    show_demo(console, result)
    if json is not None:
        from safesteer.artifacts import write_json

        write_json(json, result.record())
