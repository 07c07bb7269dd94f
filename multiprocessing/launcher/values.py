"""Words of the command line as values, each of the right type and within what is allowed for it."""

import math
from collections.abc import Mapping
from typing import Any


class UsageError(ValueError):
    """An argument is wrong; nothing has been started."""


def overrides(
    pairs: list[str], defaults: Mapping[str, Any], allowed: Mapping[str, list], given: tuple[str, ...]
) -> dict[str, Any]:
    """The key=value arguments, each with the type of its default and within what is allowed for it."""
    found: dict[str, Any] = {}
    for key, _, word in (pair.partition("=") for pair in pairs):
        if key not in defaults:
            raise UsageError(f"unknown key {shorten(key)!r}; there are {', '.join(defaults)}")
        if key in found or key in given:
            raise UsageError(f"{key} is given twice")
        found[key] = convert(key, word, defaults[key])
        if key in allowed:
            check_value(key, found[key], allowed[key])
    return found


def convert(key: str, word: str, default: Any) -> Any:
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "false": False}[word.lower()]
        word.encode()  # bytes that are no UTF-8 could not be written down
        value = kind(word)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, ValueError):
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text in UTF-8"}
        wanted = names[kind] + (f", such as {text(default)}" if default != "" else "")
        raise UsageError(f"{key} must be {wanted}, not {shorten(word)!r}") from None


def check_value(key: str, value: Any, allowed: list) -> None:
    if isinstance(value, str):
        if value not in allowed:
            raise UsageError(f"{key} must be one of {', '.join(allowed)}, not {shorten(value)!r}")
    elif not allowed[0] <= value <= allowed[1]:
        raise UsageError(f"{key} must be from {allowed[0]} to {allowed[1]}, not {text(value)}")


def positive(word: str, name: str) -> int:
    if not (is_whole(word) and 0 < int(word) <= 1_000_000):
        raise UsageError(f"{name} must be a whole number from 1 to 1000000, not {shorten(word)!r}")
    return int(word)


def is_whole(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) < 20  # Python gives up at some thousand digits


def is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def shorten(word: str) -> str:
    return word if len(word) <= 50 else f"{word[:47]}..."
