"""Reads what is asked of a run, from the command line, the environment and pyproject.toml, and checks all of it."""

import argparse
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifar_data import DATASETS, data_dir
from launcher.project import (
    KEYS,
    UsageError,
    choice,
    convert,
    positive,
    ranges,
    read_project,
    run_config,
    shorten,
    split_pairs,
    text,
)

ENGINES = ("deployment", "simulation")
COUNTS = dict(zip(("CLIENTS", "MIN_CLIENTS", "SAMPLED", "ROUNDS"), ("", *KEYS), strict=True))  # and their config keys
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
    project: dict[str, Any] = field(repr=False)  # pyproject.toml
    given: frozenset[str] = frozenset()  # keys of the run config, and CLIENTS, ENGINE, DATASET, that the user has set
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

    @property
    def command(self) -> str:
        """What to type, in the example's folder, for the same run: all that differs from the defaults."""
        defaults = run_config(self.project)
        pairs = [f"{k}={text(v)}" for k, v in self.config.items() if k not in KEYS and v != defaults.get(k)]
        counts = [str(self.clients), *(str(self.config[key]) for key in KEYS)]
        variables = [f"ENGINE={self.engine}", f"DATASET={self.dataset}", *(["SECURE=1"] if self.secure else [])]
        return shlex.join([*variables, "./run.sh", *counts, *pairs])


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(f"{shorten(' '.join(message.split()))}; ./run.sh --help lists what there is")


def parse(words: list[str], folder: Path, environment: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings. Raises UsageError, which tells the fix; prints the help and exits where it is asked for."""
    project = read_project(folder)
    defaults, launcher = run_config(project), project["tool"]["launcher"]
    counts = [launcher["clients"], *(defaults[key] for key in KEYS)]
    keys = "\n".join(f"                 {key}={text(value)}" for key, value in defaults.items() if key not in KEYS)
    about = str(project["project"].get("description", ""))
    epilog = HELP.format(*counts, keys, launcher["engine"])
    as_written = argparse.RawDescriptionHelpFormatter
    parser = Parser(usage=USAGE, description=about, epilog=epilog, formatter_class=as_written, allow_abbrev=False)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="print what would be started and written; start nothing")
    parser.add_argument("-v", dest="verbose", action="store_true", help="print all that Flower says")
    options = parser.parse_intermixed_args(words)
    pairs = dict(split_pairs([word for word in options.words if "=" in word], defaults))
    numbers = [word for word in options.words if "=" not in word]
    if len(numbers) > len(COUNTS):
        raise UsageError(f"{len(numbers)} numbers, but there are {len(COUNTS)} to give: {' '.join(COUNTS)}")
    given = dict(zip(COUNTS, (positive(word, name) for word, name in zip(numbers, COUNTS, strict=False)), strict=False))

    clients = given.get("CLIENTS", launcher["clients"])
    config = {**defaults, "min-clients": given.get("MIN_CLIENTS", min(defaults["min-clients"], clients))}
    config["sampled-clients"] = given.get("SAMPLED", min(defaults["sampled-clients"], config["min-clients"]))
    config["num-server-rounds"] = given.get("ROUNDS", defaults["num-server-rounds"])
    for key, word in pairs.items():
        if key in [COUNTS[name] for name in given]:
            raise UsageError(f"{key} is given twice")
        config[key] = convert(key, word, defaults[key], ranges(project).get(key))
    check_counts(clients, config)

    engine = choice("ENGINE", environment.get("ENGINE") or launcher["engine"], ENGINES)
    dataset = choice("DATASET", environment.get("DATASET") or launcher["dataset"], (*DATASETS, launcher["dataset"]))
    try:
        data_dir()
    except RuntimeError as error:
        raise UsageError(str(error)) from None
    secure = environment.get("SECURE", "") not in ("", "0")
    if secure and engine != "deployment":
        raise UsageError("SECURE=1 goes with ENGINE=deployment: a simulation has no connections to secure")
    port = environment.get("PORT")
    if port and not (port.isascii() and port.isdecimal() and len(port) < 6 and 0 < int(port) < 65536):
        raise UsageError(f"PORT={shorten(port)}: a port is a number from 1 to 65535")
    named = {name for name in ("ENGINE", "DATASET") if environment.get(name, "auto") not in ("", "auto")}
    return Settings(
        folder=folder,
        example=project["project"]["name"],
        engine=engine,
        clients=clients,
        config=config,
        dataset=dataset,
        port=int(port) if port else None,
        verbose=options.verbose,
        dry_run=options.dry_run,
        secure=secure,
        # macOS's frameworks don't survive a fork; without the file, or the wish, each process is a fresh Python
        warm=environment.get("WARM") != "0" and sys.platform == "linux" and (folder / "launcher" / "warm.py").exists(),
        project=project,
        given=frozenset({*pairs, *(COUNTS[name] or name for name in given), *named}),
    )


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
