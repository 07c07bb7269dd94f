"""The tree itself: the copies are the same, lint is clean, nothing of one machine is in it."""

import getpass
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

SYNC = Path("tools/sync.py")


def tracked(*patterns):
    """The files that git keeps, or would, where it is asked to add all; by their paths in the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *patterns]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("this is no git repository")
    return [name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def tool(*command, cwd=ROOT):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def sync(root, *arguments):
    return tool(sys.executable, root / SYNC, *arguments)


# --- The copies ------------------------------------------------------------------------------------------------------


def test_the_copies_are_the_same():
    assert sync(ROOT, "--check") == (0, "")


@pytest.fixture
def tree(tmp_path):
    """A small collection: `basic`, and one more example with its copies."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / SYNC, tmp_path / "tools")
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    for folder in ("basic", "another"):
        shutil.copytree(
            ROOT / "basic", tmp_path / folder, ignore=shutil.ignore_patterns("runs", "__pycache__", ".venv*")
        )
    (tmp_path / "another" / "server.py").write_text("# its own\n")
    assert sync(tmp_path, "--check") == (0, "")
    return tmp_path


def change_a_byte(path):
    path.write_bytes(path.read_bytes() + b"\n")


def change_the_mode(path):
    path.chmod(path.stat().st_mode ^ 0o100)


SHARED = ("cifar_utils.py", "run.sh", "requirements.txt", ".gitignore")
ROOMS = ("cifar_data/shapes.py", "rounds/guarded.py", "launcher/warm.py")


@pytest.mark.parametrize("name", [*SHARED, *ROOMS])
@pytest.mark.parametrize("change", [change_a_byte, change_the_mode, Path.unlink])
def test_a_difference_is_named_and_repaired(tree, name, change):
    change(tree / "another" / name)
    assert sync(tree, "--check") == (1, f"another/{name} differs from basic/{name}\n")
    assert sync(tree) == (0, f"copied another/{name}\n")
    assert sync(tree, "--check") == (0, "")
    assert sync(tree) == (0, "")


def test_a_link_is_a_difference(tree):
    """Flower leaves links out of what it sends to the clients, without a word."""
    link = tree / "another" / "cifar_utils.py"
    link.unlink()
    link.symlink_to(tree / "basic" / "cifar_utils.py")
    assert sync(tree, "--check") == (1, "another/cifar_utils.py differs from basic/cifar_utils.py\n")
    assert sync(tree)[0] == 0
    assert not link.is_symlink()
    assert sync(tree, "--check") == (0, "")


def test_the_collection_s_requirements_are_a_copy_too(tree):
    change_a_byte(tree / "requirements.txt")
    assert sync(tree, "--check") == (1, "requirements.txt differs from basic/requirements.txt\n")
    assert sync(tree)[0] == 0
    assert sync(tree, "--check") == (0, "")


def test_an_extra_file_is_named_and_removed(tree):
    for name in ("cifar_data/extra.py", "rounds/extra.py", "launcher/extra.py"):
        (tree / "another" / name).write_text("pass\n")
        assert sync(tree, "--check") == (1, f"another/{name} has no original in basic/\n")
        assert sync(tree) == (0, f"removed another/{name}\n")
        assert sync(tree, "--check") == (0, "")


def test_what_is_an_example_s_own_is_left_alone(tree):
    own = {"server.py": "# mine\n", "client.py": "# mine\n", "pyproject.toml": "# mine\n", "models.py": "# mine\n"}
    for name, text in own.items():
        (tree / "another" / name).write_text(text)
    (tree / "another" / "launcher" / "__pycache__").mkdir()
    (tree / "another" / "launcher" / "__pycache__" / "run.pyc").touch()
    assert sync(tree, "--check") == (0, "")
    change_a_byte(tree / "basic" / "launcher" / "run.py")
    assert sync(tree) == (0, "copied another/launcher/run.py\n")
    assert {name: (tree / "another" / name).read_text() for name in own} == own


# --- Lint ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_is_content(command):
    assert tool(sys.executable, "-m", "ruff", *command, "--quiet", *tracked("*.py")) == (0, "")


def test_shellcheck_is_content():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    scripts = [*tracked("*.sh"), *tracked(".ci/run")]
    assert scripts
    assert tool(shellcheck if shellcheck.exists() else "shellcheck", *scripts) == (0, "")


def test_scripts_can_be_executed():
    for name in tracked("*.sh", ".ci/run"):
        assert (ROOT / name).stat().st_mode & 0o111 == 0o111, name
        assert (ROOT / name).read_text().startswith("#!/usr/bin/env bash\n"), name


# --- Nothing of one machine ------------------------------------------------------------------------------------------


def test_no_file_names_a_path_of_this_machine():
    home, user = re.escape(str(Path.home())), re.escape(getpass.getuser())
    paths = re.compile(rf"{re.escape(str(ROOT))}\b|/(home|Users)/{user}\b|{home}/" r"|/(home|Users)/[a-z]\w*/|/root/")
    found = {}
    for name in tracked():
        try:
            text = (ROOT / name).read_text()
        except UnicodeDecodeError:  # a picture
            continue
        if hits := [match[0] for match in paths.finditer(text)]:
            found[name] = hits
    found.pop("tests/test_repository.py", None)
    assert found == {}


def test_no_file_is_large_or_left_over():
    for name in tracked():
        assert (ROOT / name).stat().st_size < 1_000_000, name
        assert not re.search(r"(^|/)(runs|__pycache__|\.venv)/|\.(pyc|pt|npy|log)$", name), name


def test_python_files_end_their_lines_in_the_same_way():
    for name in tracked("*.py", "*.sh", "*.toml", "*.md", "*.txt"):
        content = (ROOT / name).read_bytes()
        assert b"\r" not in content, name
        assert content == b"" or content.endswith(b"\n"), name
