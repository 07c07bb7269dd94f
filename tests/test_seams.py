"""Tests that a version of Flower which has moved a part that warm.py replaces is noticed, and that runs go on."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from edits import edit
from paths import BASIC
from runs import copy_example, finished

# Loads a module of Flower from a copy of its file, in which a text is another, then replaces what warm.py replaces.
REPLACE = """
import importlib.util, sys
from pathlib import Path
name, old, new, copy = sys.argv[1:]
if name and not old:
    sys.modules[name] = None  # as if there were none
elif name:
    source = Path(importlib.util.find_spec(name).origin).read_text()
    assert old in source
    Path(copy).write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(name, copy)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
import warm
print(*warm.replace_parts(), sep="; ")
"""
WARM = (BASIC / "launcher" / "warm.py").read_text()
EXECUTOR, SUPERNODE = (re.search(rf'^{name} = "(.*)"', WARM, re.MULTILINE)[1] for name in ("EXECUTOR", "SUPERNODE"))
LAUNCHES, SLEEPS = "how a superexec launches an app", "how long a SuperNode sleeps"


@pytest.mark.parametrize(
    ("name", "old", "new", "missing"),
    [
        ("", "", "", ""),
        (EXECUTOR, "subprocess.Popen(args)", "subprocess.run(args)", LAUNCHES),
        (EXECUTOR, "", "", LAUNCHES),
        (EXECUTOR, "class SubprocessExecutor", "class ForkExecutor", LAUNCHES),
        (EXECUTOR, "def launch(", "def start(", LAUNCHES),
        (SUPERNODE, "time.sleep(3)", "time.sleep(1)", SLEEPS),
        (SUPERNODE, "def start_client_internal(", "def start_client(", SLEEPS),
    ],
    ids=["installed", "call", "module", "class", "method", "seconds", "function"],
)
def test_a_part_that_has_moved_is_named(name: str, old: str, new: str, missing: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", REPLACE, name, old, new, str(tmp_path / "moved.py")]
    done = subprocess.run(command, cwd=BASIC / "launcher", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == missing


@pytest.mark.slow
def test_a_run_goes_on_without_what_has_moved(tmp_path: Path, data_dir: Path) -> None:
    folder = copy_example("basic", tmp_path / "basic")
    edit(folder / "launcher/warm.py", ('"subprocess.Popen(args"', '"Popen(argv"'), ('"time.sleep(3)"', '"sleep(9)"'))
    run = finished(folder, 1, 1, 1, 1, data_dir=data_dir)
    assert run.process.returncode == 0, run.stdout + run.stderr
    for part in (LAUNCHES, SLEEPS):
        assert run.stderr.count(f"WARNING: this version of Flower has changed {part}: ") == 1
    assert run.nothing_left()
