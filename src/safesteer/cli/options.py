"""Flags made from the settings' fields, and what every command does around its work."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from safesteer.cli.failures import reported
from safesteer.coercion import coerce
from safesteer.console import RunConsole
from safesteer.settings import Layer, SettingField, Settings, load_recipe, setting_fields

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
    app: typer.Typer, sections: Sequence[str], *, continues_run: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command whose flags are the settings of some sections.

    The function is called with `settings` and `console` and the flags of its own signature. Before it runs, settings
    are laid over each other: defaults, recipe, flags.

    Args:
        app: To add the command to.
        sections: Which settings become flags.
        continues_run: Without --recipe, start from the config.yaml of the run in --output, if there is one.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        fields = [entry for section in sections for entry in setting_fields(section)]
        own = list(inspect.signature(function).parameters.values())[2:]

        def command(**values: Any) -> None:
            recipe: Path | None = values.pop("recipe")
            debug, quiet = values.pop("debug"), values.pop("quiet")
            given = {entry: values.pop(_parameter_name(entry)) for entry in fields}
            with reported(debug=debug):
                layers = [_layer(given)]
                folder = layers[0].get("run", {}).get("output", "")
                saved = Path(folder) / "config.yaml"
                if recipe is not None:
                    layers.insert(0, load_recipe(recipe))
                elif continues_run and folder and saved.is_file():
                    layers.insert(0, load_recipe(saved))
                function(Settings.from_layers(*layers), RunConsole(quiet=quiet), **values)

        common = [
            inspect.Parameter("recipe", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_RecipeOption),
            inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_DebugOption),
            inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_QuietOption),
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


def _layer(given: Mapping[SettingField, Any]) -> Layer:
    """Collect the flags that were given, each of its setting's type."""
    layer: dict[str, dict[str, Any]] = {}
    for entry, value in given.items():
        if value is not None:
            layer.setdefault(entry.section, {})[entry.name] = coerce(value, entry.annotation, entry.flag)
    return layer


def _parameter_name(entry: SettingField) -> str:
    return f"{entry.section}__{entry.name}"


def _parameter(entry: SettingField) -> inspect.Parameter:
    boolean = entry.annotation is bool
    option = typer.Option(
        _switch(entry) if boolean else entry.flag,
        help=entry.help,
        # A flag that was not given must be told from one given its default, because it hides the recipe's value.
        show_default=_shown(entry),
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


def _shown(entry: SettingField) -> str | bool:
    default = entry.default
    if isinstance(default, bool):
        return _switch(entry).split("/")[0 if default else 1].removeprefix("--")
    if default is None or default == "" or default == () or default == {}:
        return False
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _metavar(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _metavar(next(kind for kind in arguments if kind is not type(None)))
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is tuple:
        return f"{_metavar(arguments[0])},…"
    if origin is not None:
        return "JSON"
    return {int: "INT", float: "FLOAT"}.get(annotation, "TEXT")
