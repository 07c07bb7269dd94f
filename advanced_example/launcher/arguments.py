"""Reads what is asked of a run, from the command line, the environment and pyproject.toml, and checks all of it."""

import argparse
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifar_data import DATASETS
from launcher.project import COUNT, KEYS, UsageError, convert, ranges, read_project, run_config, shorten, text

ENGINES = ("deployment", "simulation")
COUNTS = ("CLIENTS", "MIN_CLIENTS", "SAMPLED", "ROUNDS")
USAGE = "./run.sh [CLIENTS] [MIN_CLIENTS] [SAMPLED] [ROUNDS] [key=value ...] [--dry-run] [-v]"
HELP = """\
  CLIENTS      how many clients are started                                (default {})
  MIN_CLIENTS  a round starts once this many clients are connected         (default {})
  SAMPLED      how many clients train in a round, and how many evaluate    (default {})
  ROUNDS       how many rounds                                             (default {})
  key=value    changes the run config:
{}
environment: ENGINE=deployment|simulation (default {}), DATASET=auto|cifar10|synthetic, DATA_DIR, PORT, PYTHON,
TORCH_BACKEND, WARM=0, SECURE=1. README.md and REFERENCE.md of the collection say more.
exit status: 0 completed, 1 failed, 2 wrong arguments, 128+N ended by signal N
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
    secure: bool
    warm: bool
    command: str  # what the user has typed, to be pasted in the example's folder
    project: dict[str, Any] = field(repr=False)  # pyproject.toml
    given: frozenset[str]  # keys of the run config, and CLIENTS, ENGINE, DATASET, that the user has set
    run_dir: Path | None = None  # of a run that goes on, and the lock on it; else a new one
    lock: int | None = None

    @property
    def min_clients(self) -> int:
        return self.config["min-clients"]

    @property
    def sampled(self) -> int:
        return self.config["sampled-clients"]

    @property
    def rounds(self) -> int:
        return self.config["num-server-rounds"]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(f"{shorten(' '.join(message.split()))}; ./run.sh --help lists what there is")


def parse(words: list[str], folder: Path, environment: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings. Raises UsageError, which tells the fix; prints the help and exits where it is asked for."""
    project = read_project(folder)
    defaults, launcher = run_config(project), project["tool"]["launcher"]
    usual = [launcher["clients"], *(defaults[key] for key in KEYS)]
    keys = "\n".join(f"                 {key}={text(value)}" for key, value in defaults.items() if key not in KEYS)
    parser = Parser(
        usage=USAGE,
        description=str(project["project"].get("description", "")),
        epilog=HELP.format(*usual, keys, launcher["engine"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="print what would be started and written; start nothing")
    parser.add_argument("-v", dest="verbose", action="store_true", help="print all that Flower says")
    options = parser.parse_intermixed_args(words)

    numbers = [word for word in options.words if "=" not in word]
    if len(numbers) > len(COUNTS):
        raise UsageError(f"{len(numbers)} numbers, but there are {len(COUNTS)} to give: {' '.join(COUNTS)}")
    counts = [convert(name, word, 1, COUNT) for word, name in zip(numbers, COUNTS, strict=False)]
    given: dict[str, Any] = dict(zip(("CLIENTS", *KEYS), counts, strict=False))
    for key, word in (word.split("=", 1) for word in options.words if "=" in word):
        if key not in defaults:
            raise UsageError(f"unknown key {shorten(key)!r}; there are {', '.join(defaults)}")
        given[key] = convert(key, word, defaults[key], ranges(project).get(key))
    clients = given.get("CLIENTS", launcher["clients"])
    least = given.get("min-clients", min(defaults["min-clients"], clients))
    sampled = given.get("sampled-clients", min(defaults["sampled-clients"], least))
    if least > clients:
        raise UsageError(f"MIN_CLIENTS ({least}) is more than CLIENTS ({clients}): a round would wait for ever")
    if sampled > least:
        raise UsageError(f"SAMPLED ({sampled}) is more than MIN_CLIENTS ({least}): a round samples those it waits for")
    config = {key: given.get(key, value) for key, value in defaults.items()}

    asked = {name: value for name, value in environment.items() if value}  # empty means unset
    engine = convert("ENGINE", asked.get("ENGINE", launcher["engine"]), "", ENGINES)
    secure = asked.get("SECURE", "0") != "0"
    if secure and engine != "deployment":
        raise UsageError("SECURE=1 goes with ENGINE=deployment: a simulation has no connections to secure")
    variables = [f"{name}={asked[name]}" for name in ("ENGINE", "DATASET", "SECURE") if name in asked]
    return Settings(
        folder=folder,
        example=project["project"]["name"],
        engine=engine,
        clients=clients,
        config={**config, "min-clients": least, "sampled-clients": sampled},
        dataset=convert("DATASET", asked.get("DATASET", launcher["dataset"]), "", (*DATASETS, launcher["dataset"])),
        port=convert("PORT", asked["PORT"], 1, (1, 65535)) if "PORT" in asked else None,
        verbose=options.verbose,
        dry_run=options.dry_run,
        secure=secure,
        warm=environment.get("WARM") != "0" and sys.platform == "linux",  # macOS's frameworks don't survive a fork
        command=shlex.join([*variables, "./run.sh", *words]),
        project=project,
        given=frozenset({*given, *(name for name in ("ENGINE", "DATASET") if asked.get(name, "auto") != "auto")}),
    )
