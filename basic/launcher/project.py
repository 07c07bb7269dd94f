"""Reads pyproject.toml, and words of the command line as values of the types and ranges that it names."""

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KEYS = ("min-clients", "sampled-clients", "num-server-rounds")  # of the run config, that numbers alone can set
TYPES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


class UsageError(ValueError):
    """An argument is wrong; nothing has been started."""


def read_project(folder: Path) -> dict[str, Any]:
    """Read pyproject.toml. Raises UsageError where it can't be read or lacks what a run needs."""
    path = folder / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8"))
        config, launcher = run_config(project), project["tool"]["launcher"]
        for key, value in (("clients", launcher["clients"]), *((key, config[key]) for key in KEYS)):
            positive(repr(value), key)  # text has quotes there
        for key in {**config, **ranges(project)}:
            convert(key, text(config[key]), project)
        names = project["project"]["name"], launcher["engine"], launcher["dataset"], launcher.get("extension", "")
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"name, engine, dataset and extension must be text, not {names}")
    except KeyError as error:
        raise UsageError(f"{path} lacks {error}: compare it with the one of `basic`") from None
    except (OSError, ValueError, TypeError, AttributeError, IndexError) as error:  # TOML's own errors are ValueErrors
        raise UsageError(f"{path} can't be read: {error}") from None
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


def convert(key: str, word: str, project: dict[str, Any]) -> Any:
    """Return a word as a value of the run config: with the type of its default, in its range or among its names."""
    defaults, allowed = run_config(project), ranges(project).get(key)
    if key not in defaults:
        raise UsageError(f"unknown key {shorten(key)!r}; there are {', '.join(defaults)}")
    if key in KEYS:
        return positive(word, key)
    kind = type(defaults[key])
    if kind not in TYPES:
        raise UsageError(f"{key} must be {', '.join(TYPES.values())}, not {shorten(word)}")
    try:
        value = {"true": True, "false": False}[word.lower()] if kind is bool else kind(word)
        word.encode()  # bytes that are no UTF-8 could not be written down
    except (KeyError, ValueError):
        raise UsageError(f"{key} must be {TYPES[kind]}, such as {text(defaults[key])}, not {shorten(word)!r}") from None
    if allowed and kind is str:
        return choice(key, value, allowed)
    if allowed and not allowed[0] <= value <= allowed[1]:
        raise UsageError(f"{key} must be from {allowed[0]} to {allowed[1]}, not {shorten(word)}")
    return value


def choice(name: str, word: str, allowed: Iterable[str]) -> str:
    if word not in allowed:
        raise UsageError(f"{name} must be one of {', '.join(dict.fromkeys(allowed))}, not {shorten(word)!r}")
    return word


def positive(word: str, name: str, most: int = 1_000_000) -> int:
    if not re.fullmatch("[0-9]{1,7}", word) or not 0 < int(word) <= most:
        raise UsageError(f"{name} must be a whole number from 1 to {most}, not {shorten(word)!r}")
    return int(word)


def text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def shorten(word: str) -> str:
    return word if len(word) <= 50 else f"{word[:47]}..."
