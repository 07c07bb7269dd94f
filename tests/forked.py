"""Runs a Python script as a command would, but forked from a process that has imported what takes seconds to import."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from runs import CORE, ROOT

processes = multiprocessing.get_context("forkserver")  # a server for each worker of pytest's, when first asked for
processes.set_forkserver_preload(
    [
        *("pytest", "torch", "torch._dynamo", "torchvision.datasets", "matplotlib.figure", "jinja2"),
        *("flwr.serverapp.strategy", "flwr.cli.build"),
    ]
)


def start(script: Path | str, *words: object, env: Mapping[str, str], out: str = os.devnull, err: str) -> BaseProcess:
    """Start `python SCRIPT WORDS`, and write what it says to two files."""
    process = processes.Process(target=become, args=(str(script), [*map(str, words)], dict(env), out, err))
    process.start()
    return process


def become(script: str, words: list[str], env: dict[str, str], out: str, err: str) -> None:
    if CORE is not None:
        os.sched_setaffinity(0, {CORE})  # a round that it runs, in a simulation, has one Ray actor then
    sys.modules["torch"].set_num_threads(1)
    os.environ.clear()
    os.environ.update(env)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), descriptor)
    sys.argv = [script, *words]
    ours = [path for path in sys.path if Path(path) == ROOT or Path(path).parent == ROOT]  # what pytest has added
    sys.path[:] = [str(Path(script).parent), *(path for path in sys.path if path not in ours)]
    runpy.run_path(script, run_name="__main__")


def run(script: Path, *words: object, env: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[str]:
    """Run to the end, as subprocess.run does with `capture_output` and `text`."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start(script, *words, env=env, out=str(out), err=str(err))
        process.join()
        return subprocess.CompletedProcess([script, *words], process.exitcode, out.read_text(), err.read_text())
