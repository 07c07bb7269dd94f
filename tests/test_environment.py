"""How an environment is found or made, with packages of a few lines, from a folder of wheels."""

import errno
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from environment_helpers import LINE, UV, Copy, make_wheel
from paths import BASIC, ROOT


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A copy whose environment is made, by its first command; with what that printed."""
    copy = Copy(tmp_path_factory.mktemp("made"))
    return copy, copy.run()


@pytest.fixture
def ready(made):
    """The copy with its environment, as it was after the first command."""
    copy, (status, _, err) = made
    assert status == 0, err
    copy.require(LINE)
    return copy


# --- Made once -------------------------------------------------------------------------------------------------------


def test_the_first_command_makes_it_and_says_so(made):
    copy, (status, out, err) = made
    assert (status, err) == (0, "")
    first, second, last = out.splitlines()
    assert re.match(rf"Setting up {re.escape(str(copy.venv))}, once: about [\d.]+ GB to download", first)
    assert second == f"Installing {copy.folder / 'requirements.txt'}"
    assert last == copy.works()
    assert list(copy.venv.glob("lib/python3*/site-packages/__pycache__/tiny_thing.*.pyc"))


def test_the_second_command_starts_at_once(ready):
    assert ready.offline() == (0, ready.works() + "\n", "")


def test_the_exit_status_is_the_command_s(ready):
    assert ready.offline("raise SystemExit(7)") == (7, "", "")


@pytest.mark.parametrize("named", [True, False], ids=["PYTHON", "active"])
def test_an_interpreter_that_has_the_packages_is_used_as_it_is(ready, named):
    """The scripts start whatever PYTHON or PATH name: an active environment's python3."""
    elsewhere = ready.venv.rename(ready.folder / "elsewhere")
    try:
        python = str(elsewhere / "bin" / "python3")
        status, out, _ = ready.offline(python=python, **({"PYTHON": python} if named else {}))
        assert (status, out) == (0, f"tiny_thing {elsewhere} word\n")
        assert not ready.venv.exists()
    finally:
        elsewhere.rename(ready.venv)


def test_an_active_environment_without_the_packages_is_left_alone(copy):
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, copy.root / "active"], check=True)
    before = sorted((copy.root / "active").rglob("*"))
    status, out, err = copy.run(python=copy.root / "active" / "bin" / "python3")
    assert (status, out.splitlines()[-1]) == (0, copy.works()), err
    assert sorted((copy.root / "active").rglob("*")) == before


def test_the_examples_of_a_collection_share_one(copy):
    root = copy.folder.parent
    (root / "tools").mkdir()
    (root / "tools" / "sync.py").touch()
    shutil.copytree(copy.folder, root / "another")
    shutil.copy(copy.folder / "requirements.txt", root)
    status, out, err = copy.run()
    assert (status, out.splitlines()[-1]) == (0, f"tiny_thing {root / '.venv'} word"), err
    copy.folder = root / "another"
    assert copy.offline() == (0, f"tiny_thing {root / '.venv'} word\n", "")


def test_a_changed_requirement_is_installed(ready):
    show = "import importlib.metadata; print(importlib.metadata.version('other-thing'))"
    for version, line in (("1.0", "other-thing"), ("1.10", "other-thing >= 1.9  # newer than 1.0")):
        make_wheel(ready.wheels, version, "other-thing")
        ready.require(LINE, line)
        status, out, err = ready.run(show)
        assert (status, out.splitlines()[-1], err) == (0, version, "")
        assert "Setting up" not in out  # it is added to what is there
        assert ready.offline(show) == (0, f"{version}\n", "")


@pytest.mark.parametrize(
    "line",
    [
        "tiny-thing==1.0.0",
        "tiny_thing",
        "Tiny.Thing>=1",
        "tiny-thing[extra]==1.*",
        "tiny-thing ~= 1.0",
        "tiny-thing>=0.9,<2",
        'nothing-like-it; python_version < "3"',
        "--no-index",
        "-i https://example.org/simple",
    ],
)
def test_ways_to_write_what_is_there(ready, line):
    """Each ends, and does not ask uv where it need not."""
    ready.require(line, "tiny-thing")
    assert ready.offline() == (0, ready.works() + "\n", "")


def test_a_requirement_that_is_never_met_does_not_go_round_for_ever(ready):
    """uv takes it for a file, we for a name."""
    shutil.copy(ready.wheels / "tiny_thing-1.0-py3-none-any.whl", ready.folder.parent)
    ready.require("./tiny_thing-1.0-py3-none-any.whl", "tiny_thing-1.0-py3-none-any.whl")
    status, _, err = ready.run()
    assert status == 1
    assert "still lacks tiny_thing-1.0-py3-none-any.whl" in err


def test_a_terminal_shows_the_progress(copy):
    ours, theirs = pty.openpty()
    process = copy.start(stdout=theirs)
    os.close(theirs)
    _, err = process.communicate()
    os.close(ours)
    assert process.returncode == 0
    assert "Installed 1 package" in err  # uv's own display


# --- Where there is no uv --------------------------------------------------------------------------------------------


def test_pip_puts_uv_into_the_environment(copy):
    copy.without_uv()
    script = f'#!/bin/sh\nexec "{UV}" "$@"\n'
    make_wheel(
        copy.wheels, "1.0", "uv", files={"uv-1.0.data/scripts/uv": script, "uv-1.0.dist-info/entry_points.txt": ""}
    )
    status, out, err = copy.run()
    assert (status, out.splitlines()[-1], err) == (0, copy.works(), "")
    assert "pip tries" not in out
    check_moved(copy)


@pytest.mark.parametrize("uv", ["none", pytest.param("broken", marks=pytest.mark.slow)])
def test_pip_installs_where_uv_cannot(copy, uv):
    copy.without_uv()
    if uv == "broken":  # as pyenv's is, where another Python has it
        (copy.path / "uv").write_text("#!/bin/sh\necho 'error: not in this version of Python' >&2\nexit 127\n")
        (copy.path / "uv").chmod(0o755)
    status, out, err = copy.run()
    assert (status, out.splitlines()[-1]) == (0, copy.works()), err
    assert ("not in this version of Python" if uv == "broken" else "No such file") in err
    assert "uv can't do it: pip tries" in out
    assert copy.script() == str(copy.venv)
    assert copy.offline() == (0, copy.works() + "\n", "")
    copy.folder = copy.folder.rename(copy.folder.with_name("a new name"))
    status, out, err = copy.run()
    assert (status, out.splitlines()[-1]) == (0, copy.works()), err
    assert "Setting up" in out  # what pip has installed can't be moved
    assert copy.script() == str(copy.venv)


# --- Moved, broken off, or made twice at once ------------------------------------------------------------------------


def check_moved(copy):
    """Move the folder: its environment still works, and its scripts are those of the new place."""
    assert copy.script() == str(copy.venv)
    old = copy.folder
    copy.folder = old.rename(old.with_name("a new name"))
    assert copy.offline() == (0, copy.works() + "\n", "")
    assert copy.script() == str(copy.venv)
    shutil.copytree(copy.folder, old, symlinks=True)  # what is left at the old place is not used
    assert copy.script() == str(copy.venv)
    activate = 'PATH=/usr/bin:/bin && . "$1"/bin/activate && command -v python'
    shell = subprocess.run(["bash", "-c", activate, "bash", copy.venv], capture_output=True, text=True)
    assert shell.stdout.strip() == str(copy.venv / "bin" / "python"), shell.stderr


def test_a_folder_that_is_moved(copy):
    assert copy.run()[0] == 0
    check_moved(copy)


@pytest.mark.parametrize("inside", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_was_broken_off_is_made_again(copy, inside):
    """Also where the half-made one is active."""
    status, _, err = copy.offline()
    assert status == 1
    assert "Traceback" not in err
    assert re.search(r"^error: can't install .*, for the reason above$", err, re.M)
    assert "tiny-thing" in err
    (copy.venv / "leftover").touch()

    status, out, err = copy.run(python=copy.venv / "bin" / "python" if inside else sys.executable)
    assert (status, out.splitlines()[-1]) == (0, copy.works()), err
    assert not (copy.venv / "leftover").exists()


def test_two_at_once_where_the_old_python_is_gone(copy):
    (copy.venv / "bin").mkdir(parents=True)
    (copy.venv / "bin" / "python").symlink_to(copy.folder / "gone")
    ended = [(process.communicate(), process.returncode) for process in [copy.start(), copy.start()]]
    assert [status for _, status in ended] == [0, 0], ended
    assert [out.splitlines()[-1] for (out, _), _ in ended] == [copy.works()] * 2
    assert sum("Setting up" in out for (out, _), _ in ended) == 1


def test_a_disk_without_locks(copy):
    no_locks = "import fcntl\ndef flock(*_): raise OSError(37, 'No locks available')\nfcntl.flock = flock\n"
    status, out, err = copy.run(**copy.patch(no_locks))
    assert (status, out.splitlines()[-1], err) == (0, copy.works(), "")


# --- Clear errors ----------------------------------------------------------------------------------------------------


def test_python_without_the_packages_is_a_clear_error(copy):
    status, out, err = copy.run(PYTHON=sys.executable)
    assert (status, out) == (1, "")
    assert err.startswith(f"error: PYTHON={sys.executable} lacks tiny-thing==1.0: `pip install -r ")
    assert not copy.venv.exists()


def interpreters():
    """Pythons on this machine that are older than 3.11."""
    installed = Path(sys.base_prefix).parent.glob("3.*/bin/python")  # where pyenv puts them side by side
    found = [str(path) for path in installed if re.search(r"/3\.([6-9]|10)\.", str(path))]
    return found or [path for minor in range(6, 11) if (path := shutil.which(f"python3.{minor}"))]


@pytest.mark.parametrize("script", [BASIC / "run.sh", ROOT / "run.sh", ROOT / "test.sh"])
@pytest.mark.parametrize("python", ["old", "missing", "not executable", "a folder"])
def test_a_python_that_cannot_be_used_is_one_sentence(script, python, tmp_path):
    if python == "old" and not interpreters():
        pytest.skip("there is no Python before 3.11 here")
    (tmp_path / "python").touch(mode=0o644)
    named = {"missing": "/nowhere/python3", "not executable": str(tmp_path / "python"), "a folder": str(tmp_path)}
    named = named.get(python) or interpreters()[0]
    done = subprocess.run([script], env={**os.environ, "PYTHON": named}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    fault = "is missing or older than Python 3.11" if python in ("old", "missing") else "can't be executed"
    assert line.startswith(f"error: {named} {fault}: ")


def test_a_python_without_venv_is_a_clear_error(copy, tmp_path):
    """As on a Debian without python3-venv: the module is there, and does not work."""
    copy.without_uv()
    (tmp_path / "broken" / "venv").mkdir(parents=True)
    (tmp_path / "broken" / "venv" / "__init__.py").write_text("raise ImportError('no ensurepip')\n")
    code, _, err = copy.run(PYTHONPATH=str(tmp_path / "broken"))
    assert code == 1
    assert f"can't make {copy.venv}, for the reason above" in err
    assert "python3-venv" in err


def test_a_folder_that_may_not_be_written_to(small_disk, tmp_path):
    copy = Copy(tmp_path, small_disk)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    status, out, err = copy.run()
    assert (status, out) == (1, "")
    assert err == f"error: can't write to {copy.folder}: copy it to a place of your own, and start it there\n"


def test_a_disk_that_is_full(small_disk, tmp_path):
    copy = Copy(tmp_path, small_disk)
    make_wheel(copy.wheels, "1.0", files={"big": "0" * 30_000_000})
    status, _, err = copy.run()
    assert status == 1
    assert os.strerror(errno.ENOSPC) in " ".join(err.split())  # uv breaks long lines
    assert err.splitlines()[-1].startswith("error: can't install")
    assert "Traceback" not in err
