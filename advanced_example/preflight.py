"""What is refused before anything starts, since it could not work; and which run `resume` means.

The launcher calls `check` with the settings that it has read from the command line.
"""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.arguments import Settings
from launcher.processes import marked
from launcher.results import claim, load_history, reopen
from launcher.values import UsageError, shorten

PATIENCE = 15.0  # seconds that the processes of a run that was killed have to leave
SETTLE = 0.5  # seconds without one, after which nobody looks for them any more
Config = dict[str, Any]


def check(settings: Settings) -> Settings:
    """Return the settings, with paths made absolute and, for a resume, those of the run. Raises UsageError."""
    if weights := settings.config["init-from"]:
        path = Path(weights).expanduser().resolve()  # what "latest" points to may change
        settings = replace(settings, config={**settings.config, "init-from": str(path)})
    if settings.config["resume"]:
        settings = resumed(settings)
    config = settings.config
    check_strategy(config)
    for key in ("flaky-client", "poisoning-client"):
        if config[key] >= settings.clients:
            raise UsageError(f"{key}={config[key]}: the clients are 0 to {settings.clients - 1}")
    if "model" in settings.given:
        check_model(config["model"])
    if config["init-from"]:
        check_weights(config["init-from"], config["model"])
    return settings


def check_strategy(config: Config) -> None:
    """Refuse what a strategy can't do."""
    strategy, sampled, malicious = config["strategy"], config["sampled-clients"], config["malicious-clients"]
    if strategy == "krum" and sampled < 2 * malicious + 3:  # Blanchard et al., 2017: 2f + 2 < n
        raise UsageError(
            f"krum withstands {malicious} malicious clients only among at least {2 * malicious + 3}, and SAMPLED is "
            f"{sampled}: sample more, or lower malicious-clients"
        )
    if config["dp-noise"] > 0 and config["learning-rate"] == 0:
        raise UsageError("dp-noise needs a learning-rate above 0: Flower divides each update by its norm to clip it")
    if config["dp-noise"] > 0 and strategy != "fedavg":
        raise UsageError(f"dp-noise goes with strategy=fedavg alone, not with {strategy}: its noise fits a plain mean")


def check_model(name: str) -> None:
    from models import MODELS  # imports torch: only where it is needed

    if name not in MODELS:
        raise UsageError(f"model must be one of {', '.join(MODELS)}, not {name!r}")


def check_weights(path: str, model: str) -> None:
    """Refuse an `init-from` that is missing, is no file of weights, or holds another model's."""
    import torch

    from models import make_model

    if not os.path.isfile(path):
        raise UsageError(f"init-from: there is no file {path}")
    try:
        make_model(model).load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever unpickling a stranger's file has to say
        reason = str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
        raise UsageError(f"init-from: {path} does not hold the weights of model={model}: {reason}") from error


# --- Resume ----------------------------------------------------------------------------------------------------------


def resumed(settings: Settings) -> Settings:
    """The settings of the run that `resume` names, which what is given now must agree with; only ROUNDS may grow."""
    folder = find_run(settings)
    if not settings.dry_run:
        take_over(folder)
    history = load_history(folder)
    before: Config = {**settings.config, **history["config"]}
    for key in sorted(settings.given - {"resume", "num-server-rounds"}):
        now = getattr(settings, key) if hasattr(settings, key) else settings.config[key]
        then = history[key] if hasattr(settings, key) else before[key]
        if now != then:
            raise UsageError(f"resume: {key} was {then} in {folder.name}, and can't be changed to {now}")
    asked, total = settings.config["num-server-rounds"], before["num-server-rounds"]
    if "num-server-rounds" not in settings.given:
        asked = total
    if asked < total:
        raise UsageError(f"resume: ROUNDS, the total, was {total} in {folder.name}, and can't be changed to {asked}")
    if asked == total and history["status"] == "completed":
        raise UsageError(f"resume: {folder.name} has completed its {total} rounds; it goes on if ROUNDS is more")
    secure = settings.secure or history.get("secure", False)
    if secure and (folder / "keys").exists():
        check_kept_keys(folder / "keys")
    if not settings.dry_run:
        reopen(folder)
    return replace(
        settings,
        run_dir=folder,
        engine=history["engine"],
        dataset=history["dataset"],
        secure=secure,
        clients=history["clients"],
        config={**before, "num-server-rounds": asked, "resume": ""},  # as if it had never been stopped
    )


def check_kept_keys(keys: Path) -> None:
    """Refuse keys that KEEP_KEYS=1, or a kill, has left, and that are too old by now."""
    from security import check_keys

    try:
        check_keys(keys)
    except ValueError as error:
        raise UsageError(f"resume: {error}") from error


def find_run(settings: Settings) -> Path:
    """The folder that `resume` names: "latest", a path as the user sees it, or the name of a folder in runs/."""
    runs, name = settings.folder / "runs", settings.config["resume"]
    for path in (runs / "latest",) if name == "latest" else (Path(name).expanduser(), runs / name):
        folder = path.resolve()
        if os.path.isfile(folder / "history.json"):  # False, too, for a name that is too long to exist
            if load_history(folder).get("example") != settings.example:
                raise UsageError(f"resume: {folder} is a run of {load_history(folder).get('example')}")
            # spelled as its processes have it in their environment, by which they are found
            return runs / folder.name if folder.parent == runs.resolve() else folder
    raise UsageError(f"resume={shorten(name)}: there is no such run in {runs}; `ls` there shows which there are")


def take_over(folder: Path) -> None:
    """Hold the run's folder as its launcher did. Raises UsageError where that, or what it has started, still lives."""
    if not claim(folder):
        raise UsageError(f"resume: {folder.name} is still running")
    now = time.monotonic()
    deadline, settled = now + PATIENCE, now + SETTLE
    while now < settled:  # where the launcher was killed just now, its guard is ending what it had started
        if pids := marked(folder):
            if now > deadline:
                raise UsageError(f"resume: processes of {folder.name} are still there: {' '.join(map(str, pids))}")
            settled = now + SETTLE
        time.sleep(0.1)
        now = time.monotonic()
