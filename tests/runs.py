"""Runs an example as a user does, through run.sh, and looks at what it leaves."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
# A command that runs another one without root's privileges: what a folder's mode forbids is forbidden.
UNPRIVILEGED = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
CORE = CORES[WORKER % len(CORES)] if CORES else None
# A command that gives another one a single core: a simulation then has one Ray actor, and each takes 6 s of CPU.
ON_ONE_CORE = ("taskset", "--cpu-list", str(CORE)) if CORES and shutil.which("taskset") else ()
OURS = ("ENGINE", "DATASET", "PORT", "SECURE", "WARM", "RAY_ADDRESS")  # variables that would change what the tests run


def write_dataset(folder: Path, *splits: tuple[np.ndarray, np.ndarray], name: str = "synthetic") -> None:
    """Write (images, labels) of the training and the test split in the layout that the examples read."""
    folder.mkdir(parents=True)
    for split, (images, labels) in zip(("train", "test"), splits, strict=True):
        np.save(folder / f"{split}_images.npy", images)
        np.save(folder / f"{split}_labels.npy", labels)
    (folder / "meta.json").write_text(json.dumps({"name": name, "source": "made by the tests"}))


def copy_example(name: str, to: Path) -> Path:
    """Copy an example's folder, as somebody does who starts a project with it."""
    return shutil.copytree(ROOT / name, to, ignore=shutil.ignore_patterns("runs", ".venv*", "__pycache__"))


def environment(data_dir: Path, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in OURS}
    return {**kept, "PYTHON": sys.executable, "DATA_DIR": str(data_dir), "DATASET": "synthetic", **more}


def processes(run_dir: Path, sessions: set[int]) -> list[int]:
    """Return the living processes of a run, but this one: they name it, or are or have a file open in the folder.

    Their sessions are added to `sessions`, and whoever is in one of these counts, too: /proc hides from a user who
    isn't root where a process such as flower-superexec is. The tests' own look: no word of the launcher's is taken.
    """
    unknown, found = {}, []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended in the meantime
            state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
            if state in "ZX" or int(path.name) == os.getpid():
                continue
            ours = belongs(path, run_dir)
            if ours:
                found.append(int(path.name))
                sessions.add(int(session))
            elif ours is None:
                unknown[int(path.name)] = int(session)
    sessions.discard(os.getsid(0))
    return found + [pid for pid, session in unknown.items() if session in sessions]


def belongs(process: Path, run_dir: Path) -> bool | None:
    """Whether a process, a folder of /proc, is of this run; None where nothing tells."""
    with contextlib.suppress(OSError):
        said = re.search(rb"(?:^|\0)FLOWER_EXAMPLE_RUN=([^\0]*)", (process / "environ").read_bytes())
        if said:
            return os.fsdecode(said[1]) == str(run_dir)
    places = [process / "cwd"]
    with contextlib.suppress(OSError):
        places += (process / "fd").iterdir()
    for place in places:
        with contextlib.suppress(OSError):
            path = f"{place.readlink()}/"
            if path.startswith(f"{run_dir.parents[1]}/"):  # and not in the folder of another run of this example
                return path.startswith(f"{run_dir}/") or not path.startswith(f"{run_dir.parent}/") or None
    return None


class Launch:
    """A ./run.sh under way. Its output goes to files, so that nothing blocks on a full pipe.

    `through` is a command that starts it, such as nohup.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: object,
        data_dir: Path,
        cwd: Path | None = None,
        through: Sequence[object] = (),
        **env: str,
    ) -> None:
        self.folder = folder
        self.before = set(self.run_folders())
        self.found: Path | None = None
        self.sessions: set[int] = set()  # of the processes that were seen
        self.out, self.err = (folder.parent / f"{folder.name}.{kind}{time.monotonic_ns()}" for kind in ("out", "err"))
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [*map(str, through), str(folder / "run.sh"), *map(str, arguments)],
                cwd=cwd,
                env=environment(data_dir, **env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *_: object) -> None:
        """End what a failing test left."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(30)

    # --- What it does ------------------------------------------------------------------------------------------------

    def wait(self, timeout: float = 600) -> int:
        return self.process.wait(timeout)

    def wait_until(self, condition: Callable[[], Any], timeout: float = 300) -> Any:
        """Poll until a condition holds, and return its value."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError, LookupError):
                if value := condition():
                    return value
            assert self.process.poll() is None, f"run.sh ended early:\n{self.stdout}{self.stderr}"
            time.sleep(0.05)
        raise AssertionError(f"not within {timeout} s:\n{self.stdout}{self.stderr}")

    def kill(self, pattern: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to the one process of this run whose command line matches."""
        (pid,) = self.wait_until(lambda: self.pids(pattern))
        os.kill(pid, number)

    def pids(self, pattern: str) -> list[int]:
        """The run's processes whose command line matches."""
        found = []
        for pid in processes(self.run_dir, self.sessions):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if re.search(pattern, command):
                    found.append(pid)
        return found

    # --- What it says and leaves -------------------------------------------------------------------------------------

    @property
    def stdout(self) -> str:
        return self.out.read_text()

    @property
    def stderr(self) -> str:
        return self.err.read_text()

    def run_folders(self) -> list[Path]:
        return [path for path in (self.folder / "runs").glob("2*") if path.is_dir()]

    @property
    def run_dir(self) -> Path:
        if self.found is None:
            (self.found,) = set(self.run_folders()) - self.before
        return self.found

    @property
    def history(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "history.json").read_text())

    def log(self, name: str) -> str:
        return (self.run_dir / "logs" / f"{name}.log").read_text()

    def nothing_left(self, within: float = 0) -> bool:
        """Whether no process of the run is there, at the latest after some seconds."""
        deadline = time.monotonic() + within
        while processes(self.run_dir, self.sessions):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return True


def finished(folder: Path, *arguments: object, **options: Any) -> Launch:
    """Run to the end, with the options of a Launch."""
    with Launch(folder, *arguments, **options) as launch:
        launch.wait()
    return launch
