"""Recipes: settings in YAML files and on the command line, laid over each other."""

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from safesteer.coercion import closest, coerce
from safesteer.errors import SafeSteerError, one_line
from safesteer.settings import SECTIONS, Settings

Layer = Mapping[str, Mapping[str, Any]]
"""Some settings, by section and field; what a recipe holds."""

# The safety tokens' settings have names that say little alone.
_FLAG_PREFIXES = {"safety_tokens": "tokens-"}
# Settings of the direction that share their name with another section's.
_PREFIXED = {("direction", "batch_size"): "direction-", ("direction", "seed"): "direction-"}


@dataclass(frozen=True)
class SettingField:
    """One setting, as recipes and the command line see it.

    Attributes:
        section: Of a recipe.
        name: In its section.
        annotation: Its type.
        default: Its value if nothing is said.
        help: What it does.
        flag: On the command line, e.g. `--tokens-size`.
        is_path: Whether it may name a file, which a recipe may give relative to itself.
    """

    section: str
    name: str
    annotation: Any
    default: Any
    help: str
    flag: str
    is_path: bool


def setting_fields(section: str | None = None) -> Iterator[SettingField]:
    """List every setting, or those of one section, in the order of declaration."""
    for name, kind in SECTIONS.items():
        if section not in (None, name):
            continue
        hints = typing.get_type_hints(kind)
        for entry in dataclasses.fields(kind):
            factory = entry.default_factory
            yield SettingField(
                section=name,
                name=entry.name,
                annotation=hints[entry.name],
                default=entry.default if factory is dataclasses.MISSING else factory(),
                help=entry.metadata["help"],
                flag=_flag(name, entry.name, entry.metadata.get("flag")),
                is_path=entry.metadata.get("path", False),
            )


def build_settings(*layers: Layer) -> Settings:
    """Lay settings over each other, later ones on top, on the defaults.

    Args:
        *layers: What `load_recipe` returns, or the like. A seed given for the run is the seed of every stage
            that has none of its own in any layer.

    Raises:
        SafeSteerError: If a section or field does not exist, or a value is of the wrong type or out of range.
    """
    merged: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for layer in layers:
        for section, name, value in _checked(layer):
            merged[section][name] = value
    if "seed" in merged["run"]:
        for section in ("direction", "safety_tokens"):
            merged[section].setdefault("seed", merged["run"]["seed"])
    return Settings(**{section: SECTIONS[section](**values) for section, values in merged.items()})


def load_recipe(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read a YAML recipe.

    A path in it that begins with ./ or ../ counts from the recipe's folder, any other from the working
    directory.

    Returns:
        Section to field to value, checked.

    Raises:
        SafeSteerError: If the file is missing or not YAML, or holds a key that is no setting (with the
            closest one).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except FileNotFoundError:
        raise SafeSteerError(f"{path}: no such recipe; name a YAML file, e.g. one of recipes/.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SafeSteerError(
            f"{path}: cannot be read as YAML ({one_line(error)}); mend it or name another recipe."
        ) from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise SafeSteerError(
            f"{path}: holds no sections; write settings as `section:` with `field: value` below it."
        )
    lines = _line_numbers(text)
    layer: dict[str, dict[str, Any]] = {}
    for section, name, value in _checked(content, lambda *key: f"{path} line {lines[key]}: "):
        is_path = SECTIONS[section].__dataclass_fields__[name].metadata.get("path")
        if is_path and value and value.startswith(("./", "../")):
            value = str(path.parent / value)
        layer.setdefault(section, {})[name] = value
    return layer


def _flag(section: str, name: str, own: str | None) -> str:
    prefix = _FLAG_PREFIXES.get(section) or _PREFIXED.get((section, name), "")
    return "--" + (own or prefix + name).replace("_", "-")


def _checked(
    layer: Mapping[str, Any], place: Callable[..., str] = lambda *key: ""
) -> Iterator[tuple[str, str, Any]]:
    """Walk through a layer's settings, each made its field's type; `place` says where a key stands."""
    for section, values in layer.items():
        if section not in SECTIONS:
            raise SafeSteerError(
                f"{place(section)}{section!r} is no section of a recipe{closest(str(section), SECTIONS)}; "
                f"the sections are {', '.join(SECTIONS)}."
            )
        if values is None:
            continue
        if not isinstance(values, Mapping):
            raise SafeSteerError(
                f"{place(section)}section {section!r} holds {values!r}; write `field: value` lines below it."
            )
        known = {entry.name: entry for entry in setting_fields(section)}
        for name, value in values.items():
            if name not in known:
                raise SafeSteerError(
                    f"{place(section, name)}{section}.{name} is no setting{closest(str(name), known)}; "
                    "recipes/template.yaml lists them all."
                )
            yield (
                section,
                name,
                coerce(value, known[name].annotation, f"{place(section, name)}{section}.{name}"),
            )


def _line_numbers(text: str) -> dict[tuple[Any, ...], int]:
    """Find the lines that a recipe's sections and fields stand in, by (section,) and (section, field)."""
    loader = yaml.SafeLoader(text)
    lines: dict[tuple[Any, ...], int] = {}
    root = loader.get_single_node()
    for section, fields in root.value if isinstance(root, yaml.MappingNode) else ():
        key = loader.construct_object(section)
        lines[(key,)] = section.start_mark.line + 1
        for name, _ in fields.value if isinstance(fields, yaml.MappingNode) else ():
            lines[key, loader.construct_object(name)] = name.start_mark.line + 1
    return lines
