"""Lists the functions with which an example can add to a run. It defines those it needs in a module of its own.

`[tool.launcher] extension = "launch"` in pyproject.toml names that module. What it lacks is done as here. `run` is the
Run of run.py: its `command` starts a process, `needed` holds the names of those that must live to the end. A run's
processes are forked from the one that calls these functions: leave no thread in it, and no GPU in use.
"""

import importlib
from types import SimpleNamespace
from typing import Any

from launcher.project import UsageError


def check(settings: Any) -> Any:
    """Refuse settings (UsageError), or return them, completed. Nothing has been started."""
    return settings


def dry_run(run: Any) -> None:
    """Print more for --dry-run."""


def prepare(run: Any) -> None:
    """Start or write what is needed before anything else; the data is ready."""


def superlink_arguments(run: Any) -> list[str]:
    return ["--insecure"]


def supernode_arguments(run: Any, partition_id: int) -> list[str]:
    return ["--insecure"]


def connection(run: Any) -> dict[str, Any]:
    """Tell `flwr` how to trust the SuperLink: keys of its block in config.toml."""
    return {"insecure": True}


def federation(run: Any) -> dict[str, Any]:
    """Change the simulation's federation config; None leaves a key out."""
    return {}


def after_superlink(run: Any) -> None:
    """Do what needs the SuperLink and comes before the clients."""


def cleanup(run: Any) -> None:
    """The run is over and its processes are gone; `run.history` says how it ended."""


Extension = SimpleNamespace


def load(project: dict[str, Any]) -> Extension:
    """Return the functions above, with those of the example's own module in their place. Raises UsageError."""
    functions = {name: value for name, value in globals().items() if callable(value)}
    if name := project["tool"]["launcher"].get("extension"):
        try:
            functions.update(vars(importlib.import_module(name)))
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise UsageError(f"pyproject.toml asks for the extension {name!r}, and there is no {name}.py") from None
    return Extension(**functions)
