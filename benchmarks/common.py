"""What the benchmarks share: a run of an example, the set-up in one line, and a table."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run_example(
    name: str,
    *arguments: object,
    engine: str = "simulation",
    resume: Path | None = None,
    may_fail: bool = False,
    **environment: str,
) -> dict[str, Any]:
    """Run an example's ./run.sh, and return the history that it left; where it fails, show what it said, and end.

    `resume` is the folder of a run to go on with.
    """
    folder = ROOT / name
    before = set(folder.glob("runs/2*")) - {resume}
    words = [*map(str, arguments), *([f"resume={resume.name}"] if resume else [])]
    done = subprocess.run(
        [folder / "run.sh", *words],
        env={**os.environ, "ENGINE": engine, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0 and not may_fail:
        sys.exit(done.stdout + done.stderr)
    (run,) = set(folder.glob("runs/2*")) - before
    return json.loads((run / "history.json").read_text())


def set_up(history: dict[str, Any]) -> str:
    """Data, machine and versions of a run, which belong beside each figure."""
    versions = ", ".join(f"{name} {version}" for name, version in history["versions"].items())
    data = f"{history['dataset']} ({history['dataset_source']})"
    return f"{data}; {os.cpu_count()} cores, {platform.system()} {platform.machine()}; {versions}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))
