"""Lists the functions with which an example can add to a run. It defines those it needs in a module of its own.

`[tool.launcher] extension = "launch"` in pyproject.toml names that module. What it lacks is done as here. `run` is the
Run of run.py: its `command` starts a process, `needed` holds the names of those that must live to the end. A run's
processes are forked from the one that calls these functions: leave no thread in it, and no GPU in use.
"""

import importlib
from types import SimpleNamespace
from typing import Any

from launcher.project import UsageError

Extension = SimpleNamespace


def nothing(run: Any) -> None:
    """Do nothing."""


FUNCTIONS = {
    # Before anything starts: refuse settings (UsageError), or return them, completed.
    "check": lambda settings: settings,
    # Print more for --dry-run.
    "dry_run": nothing,
    # The data is ready: start or write what is needed before anything else.
    "prepare": nothing,
    # Options for Flower's commands: how SuperLink and SuperNodes trust each other.
    "superlink_arguments": lambda run: ["--insecure"],
    "supernode_arguments": lambda run, partition_id: ["--insecure"],
    # How `flwr` trusts the SuperLink: keys of its block in config.toml.
    "connection": lambda run: {"insecure": True},
    # Changes of a simulation's federation config; None leaves a key out.
    "federation": lambda run: {},
    # The SuperLink answers: do what comes before the clients.
    "after_superlink": nothing,
    # The run is over and its processes are gone: `run.history` says how it ended.
    "cleanup": nothing,
}


def load(project: dict[str, Any]) -> Extension:
    """Return the functions above, with those of the example's own module in their place. Raises UsageError."""
    functions = dict(FUNCTIONS)
    if name := project["tool"]["launcher"].get("extension"):
        try:
            functions.update(vars(importlib.import_module(name)))
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise UsageError(f"pyproject.toml asks for the extension {name!r}, and there is no {name}.py") from None
    return Extension(**functions)
