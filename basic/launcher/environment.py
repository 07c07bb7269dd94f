"""Finds a Python environment with the packages of a requirements file, or makes one: .venv, once.

`python launcher/environment.py REQUIREMENTS [ARGUMENT ...]` then runs that environment's Python with the arguments.
"""

import contextlib
import fcntl
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

STATE = "state"  # in .venv: "unfinished", or the only place where it works; empty or no file: it can be moved
SIZE = "about 0.4 GB to download and 1.5 GB on disk, with an NVIDIA GPU 3.2 and 6 GB"
UV = ("/usr/bin/env", "uv")  # with a status, and no exception, where there is none
INDEXES = ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX")  # the user's settings for pip, which uv follows
REQUIREMENT = re.compile(r"([A-Za-z0-9][\w.-]*)(?=$|[\s\[=<>~!@])(?:\[.*?\])?\s*(?:(==|>=)\s*([\d.]+)(?=$|[\s,]))?")
quietly = functools.partial(subprocess.run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


class SetupError(RuntimeError):
    """There is no environment to run in; the text says what to do."""


def ensure(folder: Path, requirements: str = "requirements.txt") -> None:
    """Return if this interpreter has the packages; else run the same command again with one that has them.

    That is .venv, in the collection or, where it stands alone, in `folder`; made if it is missing or can't be used.
    """
    home = folder.parent if (folder.parent / "tools" / "sync.py").is_file() else folder
    venv, wanted = home / ".venv", home / requirements
    if not (lacking := missing(wanted)):
        return
    if os.environ.get("PYTHON"):
        raise SetupError(f"PYTHON={sys.executable} lacks {', '.join(lacking)}: `pip install -r {wanted}` there")
    inside = Path(sys.prefix).resolve() == venv.resolve()  # of another version of Python than what is installed there
    if inside or not usable(venv) or missing(wanted, venv):
        if not os.access(home, os.W_OK):
            raise SetupError(f"can't write to {home}: copy it to a place of your own, and start it there")
        with (home / ".venv.lock").open("w") as lock:
            with contextlib.suppress(OSError):  # some network disks have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)  # a second command waits here until the first has installed
            if not usable(venv):
                create(venv)
            if inside or missing(wanted, venv):
                install(venv, wanted)
        if lacking := missing(wanted, venv):
            raise SetupError(f"{wanted} is installed, but .venv still lacks {', '.join(lacking)}: is it spelled so?")
    os.execv(venv / "bin" / "python", [venv / "bin" / "python", *sys.argv])


def usable(venv: Path) -> bool:
    """Tell if .venv is whole, and works where it is."""
    state = venv / STATE
    return os.access(venv / "bin" / "python", os.X_OK) and (not state.exists() or state.read_text() in ("", str(venv)))


def missing(requirements: Path, venv: Path | None = None) -> list[str]:
    """Return the lines that an environment, else this one, does not meet, as far as names, == and >= tell."""
    lacking, where = [], [str(path) for path in venv.glob("lib/*/site-packages")] if venv else sys.path
    for line in (text.split("#")[0].strip() for text in requirements.read_text().splitlines()):
        if line.startswith("-r "):
            lacking += missing(requirements.parent / line[3:].strip(), venv)
        elif (found := REQUIREMENT.match(line)) and ";" not in line:
            name, operator, bound = found.groups()
            here = next((found.version for found in importlib.metadata.distributions(name=name, path=where)), None)
            low = not here or (operator and numbers(here) < numbers(bound))
            if low or (operator == "==" and numbers(here) > numbers(bound)):
                lacking.append(line)
    return lacking


def numbers(version: str) -> list[int]:
    """Return [2, 9, 0] for 2.9.0+cpu, as for 2.9."""
    return [int(part) for part in re.findall(r"\d+", version.split("+")[0] + ".0.0")[:3]]


def create(venv: Path) -> None:
    """Make an empty environment that can be moved, with the uv on PATH, else with one that pip puts into it."""
    print(f"Setting up {venv}, once: {SIZE}", flush=True)
    base = os.path.realpath(sys.executable)  # not the one in .venv
    shutil.rmtree(venv, ignore_errors=True)
    venv.mkdir(exist_ok=True)
    (venv / STATE).write_text("unfinished")
    movable = ["venv", "--relocatable", "--allow-existing", "--python", base, venv]
    if quietly([*UV, *movable]).returncode != 0:
        if (made := quietly([base, "-m", "venv", venv])).returncode != 0:
            raise SetupError(f"{made.stdout}can't make {venv}, for the reason above (Debian: install python3-venv)")
        quietly([venv / "bin" / "python", "-m", "pip", "install", "--only-binary=:all:", "uv"])
        quietly(["/usr/bin/env", venv / "bin" / "uv", *movable])


def install(venv: Path, requirements: Path) -> None:
    """Install with uv, if it can the PyTorch build that fits this machine; else with pip. Raises SetupError."""
    environ = {f"UV_{name}": os.environ[f"PIP_{name}"] for name in INDEXES if f"PIP_{name}" in os.environ}
    environ["UV_HTTP_CONNECT_TIMEOUT"] = "5"  # seconds; a slow download may take longer
    environ |= {**os.environ, "PATH": os.pathsep.join([str(venv / "bin"), *os.get_exec_path()])}
    asked = environ.get("TORCH_BACKEND") or environ.pop("UV_TORCH_BACKEND", "") or "auto"
    python, what = venv / "bin" / "python", ["-r", requirements, *([] if sys.stdout.isatty() else ["--quiet"])]
    uv = [*UV, "pip", "install", "--compile-bytecode", "--python", python, *what]
    fitting = [f"--torch-backend={asked}"]
    if (plan := quietly([*uv, *fitting, "--dry-run"], env=environ | {"UV_HTTP_RETRIES": "1"})).returncode != 0:
        if asked != "auto":
            raise SetupError(f"can't install with TORCH_BACKEND={asked}:\n{plan.stdout.rstrip()}")
        print("uv can't use PyTorch's own index: taking the usual build (on Linux, the one for GPUs)", flush=True)
        fitting = []
    print(f"Installing {requirements}", flush=True)
    if subprocess.run([*uv, *fitting], env=environ).returncode == 0:
        (venv / STATE).write_text("")
        return
    print("uv can't do it: pip tries, for minutes", flush=True)
    pip = [python, "-m", "pip", "install", "--retries=1", "--force-reinstall", *what]  # anew what is half-done
    if quietly([python, "-m", "ensurepip"]).returncode != 0 or subprocess.run(pip, env=environ).returncode != 0:
        raise SetupError(f"can't install {requirements}, for the reason above")
    (venv / STATE).write_text(str(venv))  # pip's scripts name their Python


if __name__ == "__main__":
    try:
        ensure(Path(__file__).resolve().parents[1], sys.argv[1])
    except (OSError, SetupError, KeyboardInterrupt) as error:
        sys.exit(f"error: {str(error) or 'interrupted'}")
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
