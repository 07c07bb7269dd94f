"""What CONTRIBUTING.md says: a new example by its steps, hooks that pass, one version of Flower, several Pythons."""

import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from runs import ROOT, environment
from test_readme import EXAMPLES, blocks, shell

LEFT_OUT = shutil.ignore_patterns("runs", ".venv*", "__pycache__", ".git", ".*_cache")


def test_the_steps_make_an_example(tmp_path: Path, data_dir: Path) -> None:
    """As they stand in the text, but for the rounds, which would take a minute."""
    (steps,) = [lines for _, lines in blocks(ROOT / "CONTRIBUTING.md") if lines[0].startswith("cp -r basic")]
    script = "\n".join(steps).replace("./run.sh my_example", "./run.sh my_example --dry-run")
    assert script.count("--dry-run") == 1
    clone = shutil.copytree(ROOT, tmp_path / "collection", ignore=LEFT_OUT)
    done = shell(f"set -e\n{script} --quick", clone, **environment(data_dir))
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'name = "my-example"' in (clone / "my_example" / "pyproject.toml").read_text()
    assert shell("python tools/sync.py --check", clone, **environment(data_dir)).returncode == 0
    assert (
        "my_example" in shell("./run.sh nothing", clone, **environment(data_dir)).stderr
    )  # it is one of those there are


def hooks() -> list[dict]:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"  # nothing that has to be downloaded
    return repository["hooks"]


@pytest.mark.parametrize("hook", hooks(), ids=lambda hook: hook["id"])
def test_each_hook_passes(hook: dict) -> None:
    done = subprocess.run(
        [sys.executable if word == "python3" else word for word in shlex.split(hook["entry"])],
        cwd=ROOT,
        env=environment(ROOT),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_flower_is_pinned_to_one_version_everywhere() -> None:
    found = {
        file: re.findall(r"flwr\[simulation\]==([\d.]+)", file.read_text())
        for folder in EXAMPLES
        for file in (folder / "requirements.txt", folder / "pyproject.toml")
    }
    assert {file: pins for file, pins in found.items() if pins != [version("flwr")]} == {}


def interpreter(minor: int) -> str | None:
    """A Python 3.`minor` that starts; pyenv has stand-ins on PATH for those that are not active."""
    installed = Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python")
    for python in filter(None, [shutil.which(f"python3.{minor}"), *map(str, installed)]):
        asked = subprocess.run([python, "-c", "import sys; print(sys.version_info[1])"], capture_output=True, text=True)
        if asked.stdout.strip() == str(minor):
            return python
    return None


@pytest.mark.slow
@pytest.mark.parametrize("minor", [11, 12, 13, 14])
def test_other_pythons(minor: int, tmp_path: Path) -> None:
    """They compile everything, and come as far as they can without the packages: to what would be started."""
    python = interpreter(minor)
    if python is None:
        pytest.skip(f"there is no Python 3.{minor} here")
    clone = shutil.copytree(ROOT, tmp_path / "collection", ignore=LEFT_OUT)
    compiled = subprocess.run([python, "-W", "error", "-m", "compileall", "-q", clone], capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stdout + compiled.stderr
    env = environment(tmp_path, PYTHON=python)
    packages = subprocess.run([python, "-c", "import tomli_w"], capture_output=True).returncode == 0
    for example in EXAMPLES:
        for words, status in (
            ("--help", 0),
            ("--dry-run", 0 if packages else 1),  # it needs the packages
            ("1 2", 2),
            ("no-such-key=1", 2),
        ):
            done = shell(f"./run.sh {example.name} {words}", clone, **env)
            assert done.returncode == status, f"{example.name} {words}: {done.stdout}{done.stderr}"
    done = shell("./run.sh advanced_example --dry-run", clone, **env)
    if not packages:
        assert re.match(r"error: PYTHON=\S+ lacks flwr\[simulation\]==.*: `pip install -r ", done.stderr)
    assert shell(f"{python} tools/sync.py --check", clone, **env).returncode == 0
