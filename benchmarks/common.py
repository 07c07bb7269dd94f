"""What the benchmarks share: a run of an example and its memory, the set-up in one line, and a table."""

import io
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "basic"))

from rounds import history

ROOT = Path(__file__).resolve().parents[1]
INTERVAL = 0.5  # seconds at least between two looks at a run


class Memory:
    """The largest sum of the memory of all processes of a run, and how many there were at that moment. Linux only.

    Run it as root: some of Flower's processes hide their memory from other users, and count as nothing then.
    """

    def __init__(self) -> None:
        self.peak = 0.0  # MiB
        self.processes = 0

    def look(self, launcher: int) -> None:
        found = processes(launcher)
        total = sum(own_share(pid) for pid in found)
        if total > self.peak:
            self.peak, self.processes = total, len(found)


def processes(launcher: int) -> list[int]:
    """Return a run's living processes: its launcher, and all that descend from it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended in the meantime
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(path.parent.name))
    family = [launcher]
    for process in family:
        family += children.get(process, [])
    return family


def own_share(pid: int) -> float:
    """MiB of a process, in which a page that n processes share counts as an nth; 0 where it is gone."""
    with suppress(OSError):
        if found := re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE):
            return int(found[1]) / 1024
    return 0


def run_example(
    name: str,
    *arguments: object,
    engine: str = "simulation",
    resume: Path | None = None,
    may_fail: bool = False,
    memory: Memory | None = None,
    limit: float = float("inf"),
    **environment: str,
) -> dict[str, Any]:
    """Run an example's ./run.sh; return the history that it left, and its folder. Where it fails, show why, and end.

    `resume` is the folder of a run to go on with. After `limit` seconds the run is stopped, and counts as failed. A
    `memory` looks at it all the time, which slows it down a little.
    """
    folder = ROOT / name
    before = set(folder.glob("runs/2*"))  # one of them may have the same process id in its name
    command = [folder / "run.sh", *map(str, arguments), *([f"resume={resume.name}"] if resume else [])]
    environment = {**os.environ, "ENGINE": engine, "PYTHON": sys.executable, **environment}
    with tempfile.TemporaryFile("w+") as output:
        began, late = time.monotonic(), False
        with subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT) as launcher:
            while launcher.poll() is None:
                looked = time.monotonic()
                if memory:
                    memory.look(launcher.pid)
                if looked - began > limit and not late:
                    launcher.terminate()
                    late = True
                time.sleep(max(INTERVAL, 4 * (time.monotonic() - looked)))
        output.seek(0)
        said = output.read()
    if launcher.returncode != 0 and not may_fail:
        sys.exit(said)
    found = [resume] if resume else [*set(folder.glob(f"runs/2*-{launcher.pid}")) - before]
    if not found:  # the launcher has refused it
        return {"status": "failed", "reason": said.strip().rpartition("\n")[2], "rounds": []}
    record = {**history.load(found[0]), "folder": found[0]}
    return {**record, "reason": f"not done within {limit:.0f} s"} if late else record


def set_up(record: dict[str, Any]) -> str:
    """Data, machine and versions of a run, which belong beside each figure."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    data = f"{record['dataset']} ({record['dataset_source']})"
    return f"{data}; {os.cpu_count()} cores, {platform.system()} {platform.machine()}; {versions}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def write_picture(path: Path, figure: Any) -> None:
    """Write a picture whole, so that a crash leaves the old one."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=90)
    history.write_whole(path, drawn.getvalue())
