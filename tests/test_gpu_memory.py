"""benchmarks/gpu_memory.py, on a machine without a GPU: what it refuses, and, on a pretence, what it finds."""

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu_memory.py"
# A GPU with 40,000 MiB, of which each process that has it open takes 400.
NVIDIA_SMI = """#!{python} -IS
import glob, os
found = set()
for link in glob.glob("/proc/[0-9]*/fd/*"):
    try:
        if os.readlink(link) == "{folder}/nvidia0":
            found.add(link.split("/")[2])
    except OSError:
        pass
print(40000 - 400 * len(found))
"""


@pytest.fixture
def pretence(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "nvidia0").touch()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "nvidia-smi"
    program.write_text(NVIDIA_SMI.format(python=sys.executable, folder=tmp_path))
    program.chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if key not in ("CUDA_VISIBLE_DEVICES",)}
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    return {**clean, "PATH": path, "GPU_MEMORY_PRETENCE": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]


@pytest.mark.slow
def test_it_shows_what_stays_and_what_is_given_back(pretence: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--clients", "4", "--workers", "2", "--out", tmp_path]
    done = subprocess.run(command, env=pretence, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("as promised\n")
    found = rows((tmp_path / "gpu_memory.md").read_text())
    assert found[1:5] == [[str(i), str(400 * min(i, 2)), "0"] for i in (1, 2, 3, 4)]
    (in_place, isolated) = found[6:]
    assert int(in_place[5]) >= 2  # links of the two workers, and of the fork server
    assert (isolated[5], isolated[6]) == ("0", "0")
    assert in_place[7] == "38976 MiB can't be had: out of memory"  # all but 1024 of 40,000
    assert isolated[7] == "38976 MiB can be had"
    assert all(float(seconds) >= 0 for seconds in in_place[1:5] + isolated[1:5])
    ElementTree.parse(tmp_path / "gpu_memory.svg")


def test_without_a_gpu_it_is_refused(tmp_path: Path) -> None:
    """A child finds that out: this process must not start CUDA."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no GPU that PyTorch can use: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("in_place", "isolated", "kept"), [(101, 16, True), (100, 0, False), (2000, 17, False), (0, 0, False)]
)
def test_what_counts_as_kept(in_place: float, isolated: float, kept: bool) -> None:
    spec: Any = importlib.util.spec_from_file_location("gpu_memory", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(script)
    sys.path[:] = path
    assert script.kept_its_promise({"in place": {"used": [9, in_place]}, "isolated": {"used": [900, isolated]}}) is kept


def imported(*names: str) -> set[str]:
    """Return all modules that these bring with them."""
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import {', '.join(names)}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split())


def test_it_needs_nothing_but_pytorch_and_numpy() -> None:
    """And its own process not even these: fork server, workers and children import what they need."""
    found = imported("gpu_memory", "work", "cifar_utils")
    assert found >= {"torch", "numpy", "work", "cifar_utils"}
    assert not {"flwr", "ray", "torchvision", "matplotlib"} & found
    assert not {"torch", "numpy"} & imported("gpu_memory")
