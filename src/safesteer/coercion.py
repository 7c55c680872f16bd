"""Turn what a recipe or the command line says into a value of a setting's type."""

import contextlib
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import yaml

from safesteer.errors import SafeSteerError


def coerce(value: Any, annotation: Any, where: str) -> Any:
    """Turn a YAML value or a command-line text into a value of a setting's type.

    Args:
        value: What was given. A text is read as the type demands: `1e-5` as a number (YAML takes it for a
            text), `40,2121` as a tuple, `none` as no value where that is allowed, `{"a": 1}` as a mapping.
        annotation: The field's type.
        where: What to call the setting in the error.

    Raises:
        SafeSteerError: If the value is not of that type.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _one_of_several(value, arguments, where)
    if origin is Literal:
        return _one_of(value, arguments, where)
    if origin is tuple:
        return tuple(coerce(item, arguments[0], where) for item in _items(value))
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(value, where)
    if annotation is bool:
        return _boolean(value, where)
    if annotation in (int, float):
        return _number(value, annotation, where)
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise SafeSteerError(f"{where} is {value!r}; give a text.")


def closest(name: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant: ` (did you mean …?)`, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _one_of_several(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    """Read a value of a type that may also be None, or one of some words: `int | Literal["auto"]`."""
    text = value.strip().lower() if isinstance(value, str) else value
    if type(None) in kinds and text in (None, "none", "null"):
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if len(kinds) == 1:
        return coerce(value, kinds[0], where)
    words = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
    if text in words:
        return text
    plain = next(kind for kind in kinds if typing.get_origin(kind) is not Literal)
    try:
        return coerce(value, plain, where)
    except SafeSteerError as error:
        raise SafeSteerError(", or ".join([str(error).removesuffix("."), *words]) + ".") from None


def _one_of(value: Any, allowed: tuple[Any, ...], where: str) -> Any:
    # YAML reads a bare off as False and on as True, which are the values of `thinking`.
    text = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
    if text not in allowed:
        names = ", ".join(map(str, allowed))
        raise SafeSteerError(
            f"{where} is {value!r}{closest(str(value), map(str, allowed))}; give one of {names}."
        )
    return text


def _boolean(value: Any, where: str) -> bool:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise SafeSteerError(f"{where} is {value!r}; give true or false.")


def _number(value: Any, kind: type, where: str) -> int | float:
    wanted = "a whole number" if kind is int else "a number"
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
            if kind is float:
                return number
            if number.is_integer():
                return int(number)
    raise SafeSteerError(f"{where} is {value!r}; give {wanted}.")


def _items(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [part.strip() for part in value.strip().strip("[]()").split(",") if part.strip()]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        with contextlib.suppress(yaml.YAMLError):
            value = yaml.safe_load(value)  # of which JSON is a part
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise SafeSteerError(
            f"{where} is {value!r}; give a mapping, as JSON on the command line: '{{\"name\": 1}}'."
        )
    return dict(value)
