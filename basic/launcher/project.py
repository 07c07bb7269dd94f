"""Reads pyproject.toml, and words of the command line as values of the types and ranges that it names."""

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEYS = ("min-clients", "sampled-clients", "num-server-rounds")  # of the run config, that numbers alone can set


class UsageError(ValueError):
    """An argument is wrong; nothing has been started."""


def read_project(folder: Path) -> dict[str, Any]:
    """Read pyproject.toml. Raises UsageError where it can't be read or lacks what a run needs."""
    path = folder / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8"))
        config, launcher = run_config(project), project["tool"]["launcher"]
        whole = {"clients": launcher["clients"], **{key: config[key] for key in KEYS}}
        names = [project["project"]["name"], *(launcher[key] for key in ("engine", "dataset"))]
        names.append(launcher.get("extension", ""))
        for key, value in config.items():
            if not isinstance(value, str | int | float):
                raise ValueError(f"{key} must be text, a number, true or false, not {value}")
        for key, allowed in ranges(project).items():
            convert(key, text(config[key]), config[key], allowed)
    except (OSError, ValueError, TypeError, AttributeError, IndexError) as error:  # TOML's own errors are ValueErrors
        raise UsageError(f"{path} can't be read: {error}") from None
    except KeyError as error:
        raise UsageError(f"{path} lacks {error}: compare it with the one of `basic`") from None
    for key, value in whole.items():
        if type(value) is not int or value < 1:
            raise UsageError(f"{path}: {key} must be a whole number from 1 on, not {value!r}")
    if not all(isinstance(name, str) for name in names):
        raise UsageError(f"{path}: name, engine, dataset and extension must be text, not {names}")
    return project


def run_config(project: dict[str, Any]) -> dict[str, Any]:
    """Return [tool.flwr.app.config] as Flower gives it to the app: a table `opt` with a key `lr` is `opt.lr`."""
    return flat(project["tool"]["flwr"]["app"]["config"])


def ranges(project: dict[str, Any]) -> dict[str, Any]:
    """Return what keys of the run config may be, from [tool.launcher.values]."""
    return flat(project["tool"]["launcher"].get("values", {}))


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


# --- Words as values -------------------------------------------------------------------------------------------------


def split_pairs(words: list[str], defaults: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = [(key, value) for key, _, value in (word.partition("=") for word in words)]
    for key, _ in pairs:
        if key not in defaults:
            raise UsageError(f"unknown key {shorten(key)!r}; there are {', '.join(defaults)}")
        if [name for name, _ in pairs].count(key) > 1:
            raise UsageError(f"{key} is given twice")
    return pairs


def convert(key: str, word: str, default: Any, allowed: list[Any] | None) -> Any:
    """Return a word with the type of its default, within what is allowed: [least, most], or a list of names."""
    kind = type(default)
    try:
        value = {"true": True, "false": False}[word.lower()] if kind is bool else kind(word)
        word.encode()  # bytes that are no UTF-8 could not be written down
        if kind is float and not math.isfinite(value):
            raise ValueError
    except (KeyError, ValueError, TypeError):
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text in UTF-8"}
        like = f", such as {text(default)}" if default != "" else ""
        raise UsageError(f"{key} must be {names.get(kind, kind.__name__)}{like}, not {shorten(word)!r}") from None
    if allowed and isinstance(value, str):
        choice(key, value, allowed)
    elif allowed and not allowed[0] <= value <= allowed[1]:
        raise UsageError(f"{key} must be from {allowed[0]} to {allowed[1]}, not {text(value)}")
    return value


def choice(name: str, word: str, allowed: Any) -> str:
    if word not in allowed:
        raise UsageError(f"{name} must be one of {', '.join(dict.fromkeys(allowed))}, not {shorten(word)!r}")
    return word


def positive(word: str, name: str) -> int:
    if not (word.isascii() and word.isdecimal() and len(word) < 8 and 0 < int(word) <= 1_000_000):
        raise UsageError(f"{name} must be a whole number from 1 to 1000000, not {shorten(word)!r}")
    return int(word)


def text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def shorten(word: str) -> str:
    return word if len(word) <= 50 else f"{word[:47]}..."
