"""Finds the run that `resume` names, and takes it up where it was broken off."""

import itertools
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.arguments import Settings
from launcher.project import UsageError, shorten
from rounds import history
from trust import KEEP_KEYS

PATIENCE = 15.0  # seconds that the processes of a run that was killed have to leave


def resumed(settings: Settings) -> Settings:
    """Return the settings of the run that `resume` names. What is given now must agree; only ROUNDS may grow."""
    folder = find_run(settings)
    lock = None if settings.dry_run else take_over(folder)
    record = read_history(folder)
    if record["example"] != settings.example:
        raise UsageError(f"resume: {folder} is a run of {record['example']}")
    before: dict[str, Any] = {**settings.config, **record["config"]}
    for key in sorted(settings.given - {"resume", "num-server-rounds"}):
        now, then = settings.config.get(key), before.get(key)
        if key in ("CLIENTS", "ENGINE", "DATASET"):  # not of the run config
            now, then = getattr(settings, key.lower()), record[key.lower()]
        if now != then:
            raise UsageError(f"resume: {key} was {then} in {folder.name}, and can't be changed to {now}")
    asked, total = settings.config["num-server-rounds"], before["num-server-rounds"]
    if "num-server-rounds" not in settings.given:
        asked = total
    if asked < total:
        raise UsageError(f"resume: ROUNDS, the total, was {total} in {folder.name}, and can't be changed to {asked}")
    if asked == total and record["status"] == "completed":
        raise UsageError(f"resume: {folder.name} has completed its {total} rounds; it goes on if ROUNDS is more")
    secure = settings.secure or record.get("secure", False)
    if secure and record["engine"] != "deployment":
        raise UsageError(f"resume: {folder.name} is a simulation, which has no connections to secure: leave SECURE out")
    if secure and KEEP_KEYS and (folder / "keys").exists():
        from security import check_keys

        try:
            check_keys(folder / "keys")
        except ValueError as error:
            raise UsageError(f"resume: {error}") from error
    if not settings.dry_run:
        reopen(folder)
    return replace(
        settings,
        run_dir=folder,
        lock=lock,
        engine=record["engine"],
        dataset=record["dataset"],
        secure=secure,
        clients=record["clients"],
        command=record.get("command", settings.command),
        config={**before, "num-server-rounds": asked, "resume": ""},  # as if it had never been stopped
    )


def find_run(settings: Settings) -> Path:
    """Return the folder that `resume` names: "latest", a path as the user sees it, or the name of a folder in runs/."""
    runs, name = settings.folder / "runs", settings.config["resume"]
    latest = runs / "latest"
    if not latest.is_symlink():  # a copy that followed links has made a folder of it: the names are times, too
        latest = max(runs.glob("2*"), default=latest)
    for path in (latest,) if name == "latest" else (Path(os.path.expanduser(name)), runs / name):
        folder = Path(os.path.realpath(path))
        if os.path.isfile(folder / "history.json"):  # False, too, for a name that is too long to exist
            return folder
    raise UsageError(f"resume={shorten(name)}: there is no such run in {runs}; `ls` there shows which there are")


def read_history(folder: Path) -> history.History:
    """Return the history of a run that can go on. Raises UsageError."""
    try:
        record = history.load(folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"resume: {folder.name} has no whole history.json ({error}), and can't go on") from None
    kinds = {"example": str, "config": dict, "clients": int, "engine": str, "dataset": str, "status": str}
    if lacking := [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]:
        said = f"its history.json lacks {', '.join(lacking)}"
        raise UsageError(f"resume: {folder.name} was not started by ./run.sh, and can't go on: {said}")
    return record


def take_over(folder: Path) -> int | None:
    """Lock the run's folder. Raises UsageError where its launcher, or what it has started, still lives."""
    deadline = time.monotonic() + PATIENCE
    while (lock := history.claim(folder)) is None:  # where the launcher was killed just now, the rest is being ended
        if time.monotonic() > deadline:
            raise UsageError(f"resume: {folder.name} is still running")
        time.sleep(0.1)
    return lock


def reopen(folder: Path) -> None:
    """Clear away what belonged to the processes of a run that goes on; keep their logs under another name."""
    for leftover in (*folder.glob(".*-*"), *folder.glob("personal/.*-*")):  # what a killed writer left half-done
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.rmtree(folder / "flwr-home", ignore_errors=True)
    if (folder / "logs").exists():  # else somebody has tidied them away
        number = next(n for n in itertools.count(1) if not (folder / f"logs-{n}").exists())
        (folder / "logs").rename(folder / f"logs-{number}")
    (folder / "logs").mkdir()
