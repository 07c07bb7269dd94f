"""Finds a Python environment with the packages of a requirements file, or makes one: .venv, once.

`python launcher/environment.py REQUIREMENTS [ARGUMENT ...]` then runs that environment's Python with the arguments.
"""

import fcntl
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

UV = ("/usr/bin/env", "uv")  # with a status, and no exception, where there is none
SIZES = {  # what is found in uv's plan: what that means
    r"(?s)Would download \d\d.*(nvidia-|\+rocm)": "about 3.2 GB to download, 6 GB on disk, 5 minutes at 100 Mbit/s",
    r"Would download \d\d": "about 0.4 GB to download, 1.5 GB on disk, a minute at 100 Mbit/s",
    "": "little to download, seconds",
}
INDEXES = ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS")  # of the user: PIP_... where there is no UV_...
REQUIREMENT = re.compile(r"([A-Za-z0-9][\w.-]*)(?=$|[\s\[=<>~!@])(?:\[.*?\])?\s*(?:(==|>=)\s*([\d.]+)(?=$|[\s,]))?")
run = functools.partial(subprocess.run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


class SetupError(RuntimeError):
    """There is no environment to run in; the text says what to do."""


def ensure(folder: Path, requirements: str = "requirements.txt") -> None:
    """Return if this interpreter has the packages; else run the same command again with one that has them.

    That is .venv, in the collection or, where it stands alone, in `folder`; made if it is missing or can't be used.
    """
    home = folder.parent if (folder.parent / "tools" / "sync.py").is_file() else folder
    wanted = (home if (home / requirements).is_file() else folder) / requirements
    python, state = home / ".venv" / "bin" / "python", home / ".venv.lock"
    if not (lacking := missing(wanted)):
        return
    if os.environ.get("PYTHON"):
        raise SetupError(f"PYTHON={sys.executable} lacks {', '.join(lacking)}: `pip install -r {wanted}` there")
    inside = Path(sys.prefix).resolve() == (home / ".venv").resolve()
    if inside or not usable(python, state):
        if not os.access(home, os.W_OK):
            raise SetupError(f"can't write to {home}: copy it to a place of your own, and start it there")
        with state.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)  # a second command waits here until the first has installed
            except OSError as error:  # some network disks have no locks
                print(f"WARNING: can't lock {home} ({error.strerror}): start one command only", file=sys.stderr)
            if not usable(python, state):
                state.write_text("unfinished")
                create(home / ".venv")
            state.write_text(install(python, wanted) or state.read_text().removeprefix("unfinished"))
        if inside and (lacking := missing(wanted)):
            raise SetupError(f"{wanted} is installed, but .venv still lacks {', '.join(lacking)}: is it spelled so?")
    os.execv(python, [python, *sys.argv])


def usable(python: Path, state: Path) -> bool:
    """Tell if .venv is whole: nothing stands in its state, or the place that it can't be moved from."""
    return os.access(python, os.X_OK) and (not state.exists() or state.read_text() in ("", str(python)))


def create(venv: Path) -> None:
    """Make an empty environment that can be moved, with the uv on PATH, else with one that pip puts into it."""
    print(f"Setting up {venv}, once", flush=True)
    base = os.path.realpath(sys.executable)  # not the one in .venv
    shutil.rmtree(venv, ignore_errors=True)
    movable = ["venv", "--relocatable", "--allow-existing", "--python", base, venv]
    if run([*UV, *movable]).returncode != 0:
        if (made := run([base, "-m", "venv", "--clear", venv])).returncode != 0:
            raise SetupError(f"{made.stdout}can't make {venv}, for the reason above (Debian: install python3-venv)")
        run([venv / "bin" / "python", "-m", "pip", "install", "--only-binary=:all:", "uv"])
        run(["/usr/bin/env", venv / "bin" / "uv", *movable])


def install(python: Path, requirements: Path) -> str:
    """Install with uv, if it can the PyTorch build that fits this machine; else with pip. Return the state."""
    environ = {f"UV_{name}": os.environ[f"PIP_{name}"] for name in INDEXES if f"PIP_{name}" in os.environ}
    environ |= {**os.environ, "PATH": os.pathsep.join([str(python.parent), *os.get_exec_path()])}
    command = [*UV, "pip", "install", "--compile-bytecode", "--python", python, "-r", requirements]
    command += ["--no-index"] * ("PIP_NO_INDEX" in environ)
    command += [] if shutil.which("uv") else ["--reinstall-package", "uv"]  # as a link into its cache, for pip's 55 MB
    asked = (environ.get("TORCH_BACKEND") or environ.pop("UV_TORCH_BACKEND", "auto")).removeprefix("auto")
    fitting = {"UV_TORCH_BACKEND": asked or "auto"}
    reason = ""
    for choice in [fitting] if asked else [{}] if sys.platform == "darwin" else [fitting, {}]:
        quick = {"UV_HTTP_RETRIES": "0", "UV_HTTP_TIMEOUT": "10"} if choice else {}
        plan = run([*command, "--dry-run"], env=environ | choice | quick)
        if plan.returncode == 0:
            if reason:
                print(f"PyTorch's own index can't be used ({reason}): its usual build comes, on Linux the one for GPUs")
            size = next(size for sign, size in SIZES.items() if re.search(sign, plan.stdout))
            break
        reason = plan.stdout.strip().rpartition("\n")[2].strip().removeprefix("cause: ")
    else:
        if asked:
            raise SetupError(f"{plan.stdout}can't install with TORCH_BACKEND={asked}, for the reason above")
        size = f"with pip, in minutes, since uv can't ({reason})"
        run([python, "-m", "ensurepip"])
        command, choice = [python, "-m", "pip", "install", "--retries=1", "-r", requirements], {}
    print(f"Installing {requirements}: {size}", flush=True)
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    if subprocess.run([*command, *quiet], env=environ | choice).returncode != 0:
        free = shutil.disk_usage(python.parent).free / 1e9
        raise SetupError(f"can't install {requirements}, see above: no network, or no disk space ({free:.1f} GB free)?")
    return "" if "uv" in command else str(python)


def missing(requirements: Path) -> list[str]:
    """Return the lines that this interpreter does not meet, as far as names, == and >= tell; uv knows the rest."""
    lacking = []
    for line in (text.split("#")[0].strip() for text in requirements.read_text().splitlines()):
        if line.startswith("-r "):
            lacking += missing(requirements.parent / line[3:].strip())
        elif (found := REQUIREMENT.match(line)) and ";" not in line:
            name, operator, bound = found.groups()
            here = next((found.version for found in importlib.metadata.distributions(name=name)), None)
            low = not here or (operator and numbers(here) < numbers(bound))
            if low or (operator == "==" and numbers(here) > numbers(bound)):
                lacking.append(line)
    return lacking


def numbers(version: str) -> list[int]:
    """Return [2, 9, 0] for 2.9.0+cpu, as for 2.9."""
    return [int(part) for part in re.findall(r"\d+", version.split("+")[0] + ".0.0")[:3]]


if __name__ == "__main__":
    try:
        ensure(Path(__file__).resolve().parents[1], sys.argv[1])
    except (OSError, SetupError, KeyboardInterrupt) as error:
        sys.exit(f"error: {str(error) or 'interrupted'}")
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
