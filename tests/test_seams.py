"""Tests what warm.py relies on in Flower: where a SuperNode sleeps, and that a superexec starts apps by bare name."""

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
import warm
old, new, copy = sys.argv[1:]
if new and not old:
    sys.modules[warm.SUPERNODE] = None  # as if there were none
elif old:
    source = Path(importlib.util.find_spec(warm.SUPERNODE).origin).read_text()
    assert old in source
    Path(copy).write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(warm.SUPERNODE, copy)
    sys.modules[warm.SUPERNODE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[warm.SUPERNODE])
print(warm.replace_sleep())
"""
HOW = 'print("started as", *sys.orig_argv)\n'


@pytest.mark.parametrize(
    ("old", "new", "replaced"),
    [
        ("", "", True),
        ("", "none", False),
        ("time.sleep(3)", "time.sleep(1)", False),
        ("def start_client_internal(", "def start_client(", False),
    ],
    ids=["installed", "module", "seconds", "function"],
)
def test_a_sleep_that_has_moved_is_noticed(old: str, new: str, replaced: bool, tmp_path: Path) -> None:
    command = [sys.executable, "-c", REPLACE, old, new, str(tmp_path / "moved.py")]
    done = subprocess.run(command, cwd=BASIC / "launcher", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(replaced)


def test_apps_are_forked(tmp_path: Path, data_dir: Path) -> None:
    """Also in a run whose SuperNodes sleep in another way, which says so once."""
    folder = copy_example("basic", tmp_path / "basic")
    edit(folder / "client.py", ("\nimport cifar_utils\n", f"\nimport sys\n\nimport cifar_utils\n\n{HOW}"))
    edit(folder / "launcher" / "warm.py", ('"time.sleep(3)"', '"sleep(9)"'))
    run = finished(folder, 1, 1, 1, 1, data_dir=data_dir)
    assert run.process.returncode == 0, run.stdout + run.stderr
    assert run.stderr.count("WARNING: this version of Flower waits in another way: rounds take longer") == 1
    started = [line for line in run.log("client-0-superexec").splitlines() if line.startswith("started as")]
    assert len(started) >= 2  # once to train, once to evaluate
    assert all("launcher/warm.py" in line for line in started)
    assert run.nothing_left()
