"""Reads pyproject.toml, and words of the command line as values of the types and ranges that it names."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KEYS = ("min-clients", "sampled-clients", "num-server-rounds")  # of the run config, that numbers alone can set
COUNT = (1, 1_000_000)  # the least and the most that they may be
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
            convert(key, repr(value), 1, COUNT)  # text has quotes there
        limits = ranges(project)
        for key in {**config, **limits}:
            convert(key, text(config[key]), config[key], limits.get(key))
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
    return {**dict.fromkeys(KEYS, COUNT), **flat(project["tool"]["launcher"].get("values", {}))}


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def convert(name: str, word: str, default: Any, allowed: Sequence[Any] | None = None) -> Any:
    """Return a word with the type of a default, if it is allowed: (least, most), or names. Raises UsageError."""
    kind = type(default)
    try:
        value = {"true": True, "false": False}[word.lower()] if kind is bool else kind(word)
        word.encode()  # bytes that are no UTF-8 could not be written down
    except (KeyError, ValueError, TypeError):
        value = None
    wanted, good = TYPES.get(kind, "text, a number, true or false"), kind in TYPES and value is not None
    if allowed and kind is str:
        wanted, good = f"one of {', '.join(dict.fromkeys(allowed))}", value in allowed
    elif allowed:
        wanted, good = f"{wanted} from {allowed[0]} to {allowed[1]}", good and allowed[0] <= value <= allowed[1]
    if not good:
        raise UsageError(f"{name} must be {wanted}, not {shorten(word)!r}")
    return value


def text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def shorten(word: str) -> str:
    return word if len(word) <= 50 else f"{word[:47]}..."
