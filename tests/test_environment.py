"""How an environment is found or made, with a package of one line, from a folder instead of a network."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from paths import BASIC, ROOT

LINE = "tiny-thing==1.0"  # what requirements.txt says to begin with
SHOW = "import sys, tiny_thing; print(tiny_thing.__name__, sys.prefix, *sys.argv[1:])"


def make_wheel(folder, version, name="tiny-thing"):
    """The smallest thing that pip installs."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    files = {
        f"{module}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)


class Copy:
    """A copy of `basic`, alone in a path with a space, whose requirements are in a folder of wheels."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "my project" / "basic"
        self.wheels = root / "wheels"
        self.venv = self.folder / ".venv"
        shutil.copytree(BASIC, self.folder, ignore=shutil.ignore_patterns("runs", "__pycache__"))
        make_wheel(self.wheels, "1.0")
        self.require(LINE)

    def require(self, *lines):
        (self.folder / "requirements.txt").write_text("\n".join(["# what the example needs", "", *lines, ""]))

    def start(self, code=SHOW, wheels=None, python=sys.executable, **environment):
        """Start `python launcher/environment.py requirements.txt -c CODE word`, from another folder."""
        clean = {key: value for key, value in os.environ.items() if key != "PYTHON" and not key.startswith("PIP_")}
        pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels or self.wheels), "PIP_NO_CACHE_DIR": "1"}
        return subprocess.Popen(
            [python, self.folder / "launcher" / "environment.py", "requirements.txt", "-c", code, "word"],
            env={**clean, **pip, **environment},
            cwd=self.folder.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments, **options):
        process = self.start(*arguments, **options)
        out, err = process.communicate()
        return process.returncode, out, err

    def offline(self, *arguments, **options):
        """As `run`, but pip would find nothing."""
        return self.run(*arguments, wheels=self.folder / "nowhere", **options)


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


def works(copy):
    """What a command in the copy's environment prints."""
    return f"tiny_thing {copy.venv} word"


# --- Made once -------------------------------------------------------------------------------------------------------


def test_the_first_command_makes_it_and_says_so(made):
    copy, (status, out, err) = made
    assert (status, err) == (0, "")
    assert out.splitlines()[0].startswith(f"Setting up {copy.venv}, once")
    assert "GB" in out
    assert "CPU-only" in out
    assert out.splitlines()[-1] == works(copy)
    assert not (copy.folder / ".venv.unfinished").exists()


def test_the_second_command_starts_at_once(ready):
    assert ready.offline() == (0, works(ready) + "\n", "")


def test_the_exit_status_is_the_command_s(ready):
    assert ready.offline("raise SystemExit(7)") == (7, "", "")


def test_an_interpreter_that_has_the_packages_is_used_as_it_is(ready):
    shutil.move(ready.venv, ready.venv.with_name("elsewhere"))
    try:
        python = ready.folder / "elsewhere" / "bin" / "python"
        status, out, _ = ready.offline(python=python, PYTHON=str(python))
        assert (status, out) == (0, f"tiny_thing {ready.folder / 'elsewhere'} word\n")
        assert not ready.venv.exists()
    finally:
        shutil.move(ready.folder / "elsewhere", ready.venv)


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
    """Each ends, and does not ask pip where it need not."""
    ready.require(line, "tiny-thing")
    assert ready.offline() == (0, works(ready) + "\n", "")


def test_a_requirement_that_is_never_met_does_not_go_round_for_ever(ready):
    """pip takes it for a file, we for a name."""
    shutil.copy(ready.wheels / "tiny_thing-1.0-py3-none-any.whl", ready.folder.parent)
    ready.require("tiny_thing-1.0-py3-none-any.whl")
    status, _, err = ready.run()
    assert status == 1
    assert "still lacks tiny_thing-1.0-py3-none-any.whl" in err


# --- Broken off, or made twice at once -------------------------------------------------------------------------------


def test_what_was_broken_off_is_made_again(copy):
    status, _, err = copy.offline()
    assert status == 1
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("pip could not install")
    assert "needs a network" in err
    assert "tiny-thing" in err
    (copy.venv / "leftover").touch()
    assert (copy.folder / ".venv.unfinished").exists()

    status, out, err = copy.run()
    assert (status, out.splitlines()[-1]) == (0, works(copy)), err
    assert not (copy.venv / "leftover").exists()
    assert not (copy.folder / ".venv.unfinished").exists()


def test_two_at_once_where_the_old_python_is_gone(copy):
    (copy.venv / "bin").mkdir(parents=True)
    (copy.venv / "bin" / "python").symlink_to(copy.folder / "gone")
    ended = [(process.communicate(), process.returncode) for process in [copy.start(), copy.start()]]
    assert [status for _, status in ended] == [0, 0], ended
    assert [out.splitlines()[-1] for (out, _), _ in ended] == [works(copy)] * 2
    assert sum("Setting up" in out for (out, _), _ in ended) == 1


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
@pytest.mark.parametrize("python", ["old", "missing"])
def test_a_python_that_cannot_be_used_is_one_sentence(script, python):
    if python == "old" and not interpreters():
        pytest.skip("there is no Python before 3.11 here")
    named = interpreters()[0] if python == "old" else "/nowhere/python3"
    done = subprocess.run([script], env={**os.environ, "PYTHON": named}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {named} is missing or older than Python 3.11")


def test_a_python_without_venv_is_a_clear_error(copy, tmp_path):
    """As on a Debian without python3-venv: the module is there, and does not work."""
    (tmp_path / "broken" / "venv").mkdir(parents=True)
    (tmp_path / "broken" / "venv" / "__init__.py").write_text("raise ImportError('no ensurepip')\n")
    code, _, err = copy.run(PYTHONPATH=str(tmp_path / "broken"))
    assert code == 1
    assert "can't make environments: install its venv module" in err
    assert "Traceback" not in err.split("error:")[1]
