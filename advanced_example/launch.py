"""Extends the launcher, by functions that launcher/extension.py lists; it says there when each is called.

They refuse what can't work, resume runs, show who holds what, make the keys for SECURE=1, and print what to type for
several machines.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.arguments import Settings
from launcher.processes import Failed
from launcher.project import UsageError
from launcher.screen import say
from machines import instructions
from refusals import check_model, check_personal, check_privacy, check_strategy, check_weights
from resume import resumed
from rounds import history
from trust import connection, keys, registrations, superlink_arguments, supernode_arguments  # noqa: F401, found here

CHECKPOINT = "checkpoint.pt"  # as checkpoint.py calls it, which imports torch


# --- Before anything starts ------------------------------------------------------------------------------------------


def check(settings: Settings) -> Settings:
    """Return the settings, with paths made absolute and, for a resume, those of the run. Raises UsageError."""
    if weights := settings.config["init-from"]:
        try:
            path = Path(weights).expanduser().resolve()  # what "latest" points to may change
        except RuntimeError as error:  # the home of a user that there is not
            raise UsageError(f"init-from: {error}") from None
        settings = replace(settings, config={**settings.config, "init-from": str(path)})
    if settings.config["resume"]:
        settings = resumed(settings)
    check_strategy(settings.config)
    settings = replace(settings, config=check_privacy(settings.config, settings.clients))
    config = settings.config
    for key in ("flaky-client", "poisoning-client"):
        if config[key] >= settings.clients:
            raise UsageError(f"{key}={config[key]}: the clients are 0 to {settings.clients - 1}")
    if "model" in settings.given:
        check_model(config["model"])
    if config["init-from"]:
        check_weights(config["init-from"], config["model"], config["personal-layers"])
    elif config["personal-layers"]:
        check_personal(config["model"], config["personal-layers"])
    return settings


def dry_run(run: Any) -> None:
    """Print how to run it on several machines."""
    if run.settings.engine == "deployment":
        print(f"\n{instructions(run)}", end="")


# --- The start -------------------------------------------------------------------------------------------------------


def prepare(run: Any) -> None:
    """Look at who holds what, in a process that works while the SuperLink starts; make the keys."""
    script = str(run.settings.folder / "partitions.py")
    run.command("partitions", [sys.executable, script, str(run.run_dir)])
    if run.settings.secure:
        from security import make_keys

        run.history["secure"] = True
        history.save(run.run_dir, run.history)
        if not keys(run).exists():  # a run that goes on may have them
            make_keys(keys(run), run.settings.clients)


def after_superlink(run: Any) -> None:
    """Show who holds what, and register the clients' public keys: the server talks to nobody else."""
    if run.processes.wait("partitions") != 0:
        raise Failed("the data can't be split like that", "partitions")
    say(run.processes.log("partitions").read_text(errors="replace").rstrip())
    for name, command in registrations(run).items():
        run.command(name, command)
        if run.processes.wait(name) != 0:
            raise Failed("the SuperLink does not take a client's key", name)


def cleanup(run: Any) -> None:
    """Say what privacy the run has spent, and how to go on with it where it was broken off."""
    if notes := [entry["note"] for entry in run.history["rounds"] if "note" in entry]:
        say(notes[-1])
    if run.history["status"] != "completed" and (run.run_dir / CHECKPOINT).exists():
        say(f"To go on after its last whole round: ./run.sh resume={run.run_dir.name}", error=True)
