"""Finds a Python environment that has what a requirements file names, or makes one: .venv, once.

`python launcher/environment.py REQUIREMENTS [ARGUMENT ...]` then runs that environment's Python with the arguments.
"""

import fcntl
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

NOTE = """\
Setting up {venv}, once: it installs {requirements}, about 6 GB on Linux, where PyTorch comes with CUDA, in minutes,
by the network's speed. Without a GPU, a CPU-only PyTorch is far smaller: make an environment with it as
https://pytorch.org/get-started/locally says, then: PYTHON=/that/environment/bin/python ./run.sh"""

REQUIREMENT = re.compile(r"([A-Za-z0-9][\w.-]*)(?=$|[\s\[=<>~!@])(?:\[.*?\])?\s*(?:(==|>=)\s*([\d.]+)(?=$|[\s,]))?")


class SetupError(RuntimeError):
    """There is no environment to run in; the text says what to do."""


def ensure(folder: Path, requirements: str = "requirements.txt") -> None:
    """Return where this interpreter has the packages; else run the same command again with one that has them.

    PYTHON, and an active environment, are used as they are. Else it is .venv in the collection, or in `folder` where
    that stands alone; it is made where it is missing, and made again where that was broken off.
    """
    collection = folder.parent
    home = collection if (collection / "tools" / "sync.py").is_file() else folder
    wanted = (home if (home / requirements).is_file() else folder) / requirements
    lacking = missing(wanted)
    if not lacking:
        return
    if os.environ.get("PYTHON"):
        raise SetupError(f"PYTHON={sys.executable} lacks {', '.join(lacking)}: `pip install -r {wanted}` there")
    venv, unfinished = home / ".venv", home / ".venv.unfinished"
    python = venv / "bin" / "python"
    if unfinished.exists() or not python.exists() or Path(sys.prefix) == venv:
        lock = os.open(home, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second run waits here until the first has installed
        make(venv, unfinished, wanted)
        os.close(lock)
        if Path(sys.prefix) == venv and (lacking := missing(wanted)):
            raise SetupError(
                f"pip has installed {wanted}, but {venv} still lacks {', '.join(lacking)}: is it spelled so?"
            )
    os.execv(python, [str(python), *sys.argv])


def make(venv: Path, unfinished: Path, requirements: Path) -> None:
    python = venv / "bin" / "python"
    if unfinished.exists() or not python.exists():
        print(NOTE.format(venv=venv, requirements=requirements), flush=True)
        unfinished.touch()
        command = [sys.executable, "-m", "venv", "--clear", str(venv)]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode != 0:
            raise SetupError(
                f"{sys.executable} can't make environments: install its venv module (Debian: python3-venv)"
            )
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-r", str(requirements)]
    said: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        try:
            for line in pip.stdout or ():
                said.append(line)
                if re.match(r"\s*(Downloading .*[MG]B\)|Installing)", line):
                    print(f"  {line.strip()[:100]}", flush=True)
        except BaseException:
            pip.terminate()
            raise
    if pip.returncode != 0:
        raise SetupError(
            f"{''.join(said[-10:])}pip could not install {requirements}, for the reason above. It needs a "
            "network, or a folder of packages (PIP_FIND_LINKS), and 7 GB of disk; the same command again starts anew"
        )
    unfinished.unlink(missing_ok=True)


def missing(requirements: Path) -> list[str]:
    """The requirements that this interpreter does not meet, as far as names, == and >= tell; pip knows the rest."""
    lacking = []
    for line in requirements.read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            lacking += missing(requirements.parent / line[3:].strip())
        elif (found := REQUIREMENT.match(line)) and ";" not in line:
            name, operator, bound = found.groups()
            try:
                here = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                lacking.append(line)
                continue
            if operator and (numbers(here) < numbers(bound) or (operator == "==" and numbers(here) != numbers(bound))):
                lacking.append(line)
    return lacking


def numbers(version: str) -> list[int]:
    """2.9.0+cpu is [2, 9], as 2.9 is."""
    found = [int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3]]
    while found and found[-1] == 0:
        found.pop()
    return found


def main() -> NoReturn:
    folder = Path(__file__).resolve().parents[1]
    try:
        ensure(folder, sys.argv[1])
    except (OSError, SetupError) as error:
        sys.exit(f"error: {error}")
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])


if __name__ == "__main__":
    main()
