"""Values of settings, from text (flags, environment) and from TOML, checked against the type of their field."""

from __future__ import annotations

import enum
import types
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

TRUE = ("true", "1", "yes", "on")
FALSE = ("false", "0", "no", "off")


class BadValue(ValueError):
    """The message says what is allowed; the caller adds the key and the value."""


def strip_optional(annotation: object) -> tuple[object, bool]:
    """`X | None` -> (X, True); any other type -> (itself, False)."""
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [part for part in get_args(annotation) if part is not types.NoneType]
        if len(inner) != 1:
            raise TypeError(f"a setting has one type, optionally None; not {annotation}")
        return inner[0], True
    return annotation, False


def element_type(annotation: object) -> object | None:
    """`tuple[X, ...]` -> X; None for a type that is no list."""
    base, _ = strip_optional(annotation)
    if get_origin(base) is tuple:
        element: object
        element, ellipsis = get_args(base)
        if ellipsis is not Ellipsis:
            raise TypeError(f"a list of settings is tuple[X, ...]; not {annotation}")
        return element
    return None


def choices(annotation: object) -> tuple[object, ...]:
    """The allowed values of a Literal or an Enum, as written in a file; empty for an open type."""
    base, _ = strip_optional(annotation)
    if get_origin(base) is Literal:
        return get_args(base)
    if isinstance(base, type) and issubclass(base, enum.Enum):
        return tuple(member.value for member in base)
    return ()


def describe(annotation: object) -> str:
    """What is allowed, for errors and `--help`."""
    if (element := element_type(annotation)) is not None:
        return f"a list of {describe(element).removeprefix('a ').removeprefix('an ')}s"
    if options := choices(annotation):
        return "one of " + ", ".join(str(option) for option in options)
    base, _ = strip_optional(annotation)
    names = {str: "a text", int: "an integer", float: "a number", bool: "true or false", Path: "a path"}
    for kind, name in names.items():
        if base is kind:
            return name
    raise TypeError(f"settings of type {annotation} are not supported")


def from_text(text: str, annotation: object) -> object:
    """The value that a flag or an environment variable means; lists are separated by commas.

    Raises:
        BadValue: the text is not a value of that type.
    """
    base, optional = strip_optional(annotation)
    if optional and text == "":
        return None
    if (element := element_type(base)) is not None:
        return tuple(from_text(part.strip(), element) for part in text.split(",") if part.strip())
    if options := choices(base):
        return _choose(next((option for option in options if str(option) == text), text), base)
    if base is bool:
        if text.lower() in TRUE + FALSE:
            return text.lower() in TRUE
        raise BadValue(f"allowed: {describe(base)}")
    if base is int or base is float:
        try:
            return int(text) if base is int else float(text)
        except ValueError:
            raise BadValue(f"allowed: {describe(base)}") from None
    return Path(text) if base is Path else text


def from_toml(value: object, annotation: object) -> object:
    """The value of a TOML key; an integer passes for a number, nothing else is converted.

    Raises:
        BadValue: the value is not of that type.
    """
    base, _ = strip_optional(annotation)
    if (element := element_type(base)) is not None:
        if not isinstance(value, list):
            raise BadValue(f"allowed: {describe(base)}")
        return tuple(from_toml(part, element) for part in value)
    if choices(base):
        return _choose(value, base)
    if base is Path and isinstance(value, str):
        return Path(value)
    if base is float and type(value) is int:
        return float(value)
    if isinstance(base, type) and type(value) is base:
        return value
    raise BadValue(f"allowed: {describe(base)}")


def to_text(value: object) -> str:
    """The text that from_text() reads back as this value; for lists, of one element."""
    if isinstance(value, enum.Enum):
        return str(value.value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _choose(value: object, annotation: object) -> object:
    if value not in choices(annotation):
        raise BadValue(f"allowed: {describe(annotation)}")
    return annotation(value) if isinstance(annotation, type) and issubclass(annotation, enum.Enum) else value
