"""What may be asked of a run: command line, environment and pyproject.toml, all checked before anything starts."""

import os
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import DATASETS
from launcher.values import UsageError, is_number, is_whole, overrides, positive, shorten, text

ENGINES = ("deployment", "simulation")
COUNTS = ("CLIENTS", "MIN_CLIENTS", "SAMPLED", "ROUNDS")
KEYS = ("min-clients", "sampled-clients", "num-server-rounds")  # of the run config, for COUNTS[1:]
HELP = """\
usage: ./run.sh [CLIENTS] [MIN_CLIENTS] [SAMPLED] [ROUNDS] [key=value ...] [--dry-run] [-v]

{description}.

  CLIENTS      how many clients are started                          (default {clients})
  MIN_CLIENTS  how many must be connected before a round starts      (default {min-clients})
  SAMPLED      how many train, and how many evaluate, in a round     (default {sampled-clients})
  ROUNDS       how many rounds                                       (default {num-server-rounds})
  key=value    changes the run config:
{keys}

  --dry-run    print what would be started and written; start nothing
  -v           print all that Flower says
  -h, --help   print this

Environment: ENGINE=deployment|simulation (default {engine}), DATASET=auto|cifar10|synthetic, DATA_DIR, PORT, PYTHON,
SECURE=1 (deployment only), GPU_SLOTS (simulation: how many clients share the GPU at once).
Exit status: 0 completed, 1 failed, 2 wrong arguments, 128+N ended by signal N.
"""


@dataclass(frozen=True)
class Settings:
    """A run that can be started."""

    folder: Path  # the example's
    example: str
    engine: str
    clients: int
    config: dict[str, Any]  # the whole run config
    dataset: str
    port: int | None
    verbose: bool
    dry_run: bool
    secure: bool = False  # TLS, and clients that are known by their keys
    given: frozenset[str] = frozenset()  # keys of the run config, and "clients", "engine", "dataset", that the user set
    gpu_slots: int | None = None  # how many clients of a simulation may share the GPU at once
    run_dir: Path | None = None  # of a run that goes on; else a new one

    @property
    def min_clients(self) -> int:
        return self.config["min-clients"]

    @property
    def sampled(self) -> int:
        return self.config["sampled-clients"]


def parse(arguments: list[str], folder: Path, environment: Mapping[str, str] = os.environ) -> Settings | str:
    """Return the settings, or the help text where it is asked for. Raises UsageError with the fix."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    defaults, launcher = project["tool"]["flwr"]["app"]["config"], project["tool"]["launcher"]
    if "--help" in arguments or "-h" in arguments:
        keys = "\n".join(f"                 {key}={text(value)}" for key, value in defaults.items() if key not in KEYS)
        return HELP.format(**defaults, **launcher, keys=keys, description=project["project"]["description"])

    options = [word for word in arguments if word.startswith("-") and not is_number(word)]
    pairs = [word for word in arguments if "=" in word and word not in options]
    numbers = [word for word in arguments if word not in options and word not in pairs]
    for option in options:
        if option not in ("--dry-run", "-v"):
            raise UsageError(f"unknown option {shorten(option)}; ./run.sh --help lists them")
    if len(numbers) > len(COUNTS):
        raise UsageError(f"{len(numbers)} numbers, but there are {len(COUNTS)} to give: {' '.join(COUNTS)}")
    counts = [positive(word, name) for word, name in zip(numbers, COUNTS, strict=False)]

    clients = counts[0] if counts else launcher["clients"]
    config = dict(defaults)
    for key, default in [(key, defaults[key]) for key in KEYS[:2]]:
        config[key] = min(default, clients)  # the defaults follow CLIENTS down
    config.update(zip(KEYS, counts[1:], strict=False))
    if len(counts) == 2:
        config["sampled-clients"] = min(config["sampled-clients"], counts[1])
    config.update(overrides(pairs, defaults, launcher.get("values", {}), given=KEYS[: max(len(counts) - 1, 0)]))
    check_counts(clients, config)

    engine = environment.get("ENGINE") or launcher["engine"]
    dataset = environment.get("DATASET") or launcher["dataset"]
    if engine not in ENGINES:
        raise UsageError(f"ENGINE={engine}: there are {' and '.join(ENGINES)}")
    if dataset not in DATASETS and dataset != launcher["dataset"]:
        raise UsageError(f"DATASET={dataset}: there are {', '.join(DATASETS)}")
    if secure := environment.get("SECURE", "") not in ("", "0"):
        if engine != "deployment":
            raise UsageError("SECURE=1 goes with ENGINE=deployment: a simulation has no connections to secure")
        if not (folder / "security.py").is_file():
            raise UsageError("SECURE=1 needs a security.py in this folder: copy the one of advanced_example")
    given = {word.partition("=")[0] for word in pairs} | set(("clients", *KEYS)[: len(counts)])
    given |= {name for name in ("engine", "dataset") if environment.get(name.upper(), "auto") not in ("", "auto")}
    port = environment.get("PORT")
    if port and not (is_whole(port) and 0 < int(port) < 65536):
        raise UsageError(f"PORT={shorten(port)}: a port is a number from 1 to 65535")
    return Settings(
        folder=folder,
        example=project["project"]["name"],
        engine=engine,
        clients=clients,
        config=config,
        dataset=dataset,
        port=int(port) if port else None,
        verbose="-v" in options,
        dry_run="--dry-run" in options,
        secure=secure,
        given=frozenset(given),
        gpu_slots=positive(environment["GPU_SLOTS"], "GPU_SLOTS") if environment.get("GPU_SLOTS") else None,
    )


def command(settings: Settings, dataset: str) -> str:
    """What to type, in the example's folder, for the same run: all that differs from the defaults of today."""
    defaults = tomllib.loads((settings.folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    counts = [settings.clients, *(settings.config[key] for key in KEYS)]
    pairs = [
        f"{key}={text(value)}"
        for key, value in settings.config.items()
        if key not in KEYS and value != defaults.get(key)
    ]
    secure = ["SECURE=1"] if settings.secure else []
    words = [f"ENGINE={settings.engine}", f"DATASET={dataset}", *secure, "./run.sh", *map(str, counts), *pairs]
    return shlex.join(words)


def check_counts(clients: int, config: Mapping[str, Any]) -> None:
    for key in KEYS:
        positive(str(config[key]), key)
    least, sampled = config["min-clients"], config["sampled-clients"]
    if least > clients:
        raise UsageError(f"MIN_CLIENTS ({least}) is more than CLIENTS ({clients}): a round would wait for ever")
    if sampled > least:
        raise UsageError(
            f"SAMPLED ({sampled}) is more than MIN_CLIENTS ({least}): a round can't sample clients it does not wait for"
        )
