"""Flags made from the settings' fields, and what every command does around its work."""

import inspect
import types
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from safesteer.cli.failures import reported
from safesteer.coercion import coerce
from safesteer.console import RunConsole
from safesteer.recipes import Layer, SettingField, build_settings, load_recipe, setting_fields

PANELS = {
    "model": "Model",
    "prompts": "Prompts",
    "direction": "Refusal direction",
    "safety_tokens": "Safety tokens",
    "distillation": "Distillation",
    "run": "Run",
}
"""Section of the settings to the panel of `--help` that its flags are shown in."""

_RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", help="YAML file of settings; flags win over it.", metavar="FILE")
]
_DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
_QuietOption = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]


def settings_command(
    app: typer.Typer,
    sections: Sequence[str],
    *,
    continues_run: bool = False,
    default_recipe: Path | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command whose flags are the settings of some sections.

    The function is called with `settings` and `console` and the flags of its own signature. Before it runs,
    settings are laid over each other: defaults, recipe, flags.

    Args:
        app: To add the command to.
        sections: Which settings become flags.
        continues_run: Without --recipe, start from the config.yaml of the run in --output, if there is one.
        default_recipe: What --recipe and flags are laid over.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        fields = [entry for section in sections for entry in setting_fields(section)]
        own = list(inspect.signature(function).parameters.values())[2:]

        def command(**values: Any) -> None:
            recipe: Path | None = values.pop("recipe")
            debug, quiet = values.pop("debug"), values.pop("quiet")
            given = [(entry, values.pop(_parameter_name(entry))) for entry in fields]
            with reported(debug=debug):
                flags = _layer(given)
                folder = flags.get("run", {}).get("output", "")
                saved = Path(folder) / "config.yaml"
                if recipe is None and continues_run and folder and saved.is_file():
                    recipe = saved
                layers = [load_recipe(path) for path in (default_recipe, recipe) if path is not None]
                if not debug:
                    quieten()
                function(build_settings(*layers, flags), RunConsole(quiet=quiet), **values)

        common = [
            inspect.Parameter(
                "recipe", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_RecipeOption
            ),
            inspect.Parameter(
                "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_DebugOption
            ),
            inspect.Parameter(
                "quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_QuietOption
            ),
        ]
        parameters = [*common, *own, *map(_parameter, fields)]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        vars(command).update(
            __name__=function.__name__,
            __doc__=function.__doc__,
            __signature__=inspect.Signature(parameters),
            __annotations__={parameter.name: parameter.annotation for parameter in parameters},
        )
        app.command()(command)
        return function

    return decorate


def quieten() -> None:
    """Keep other libraries' bars and deprecation warnings out of the run's own report."""
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _layer(given: Sequence[tuple[SettingField, Any]]) -> Layer:
    """Collect the flags that were given, each of its setting's type."""
    layer: dict[str, dict[str, Any]] = {}
    for entry, value in given:
        if value is not None:
            layer.setdefault(entry.section, {})[entry.name] = coerce(value, entry.annotation, entry.flag)
    return layer


def _parameter_name(entry: SettingField) -> str:
    return f"{entry.section}__{entry.name}"


def _parameter(entry: SettingField) -> inspect.Parameter:
    boolean = entry.annotation is bool
    option = typer.Option(
        _switch(entry) if boolean else entry.flag,
        # In the text, because the option's own default is None: a flag that was given hides the recipe's
        # value, even when it was given the setting's default.
        help=entry.help + _default_text(entry),
        show_default=False,
        metavar=None if boolean else _metavar(entry.annotation),
        rich_help_panel=PANELS[entry.section],
    )
    return inspect.Parameter(
        _parameter_name(entry),
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[bool | None, option] if boolean else Annotated[str | None, option],
    )


def _switch(entry: SettingField) -> str:
    return "--lora/--full" if entry.name == "lora" else f"{entry.flag}/--no-{entry.flag.removeprefix('--')}"


def _default_text(entry: SettingField) -> str:
    default = entry.default
    if default is None or default in ("", (), {}):
        return ""
    if isinstance(default, bool):
        text = _switch(entry).split("/")[0 if default else 1]
    else:
        text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f" [dim]\\[default: {escape(text)}][/]"


def _metavar(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return "|".join(_metavar(kind) for kind in arguments if kind is not type(None))
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is tuple:
        return f"{_metavar(arguments[0])},…"
    if origin is not None:
        return "JSON"
    return {int: "INT", float: "FLOAT"}.get(annotation, "TEXT")
