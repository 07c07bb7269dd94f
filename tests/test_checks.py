"""What would make a run fail later is said before anything starts, in one line with what to type."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ADVANCED, BASIC
from runs import copy_example, environment, finished

from launcher import arguments, checks

CLOSED = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture
def basic(tmp_path: Path) -> Path:
    return copy_example("basic", tmp_path / "basic")


def refused(folder: Path, *words: object, data_dir: Path, **variables: str) -> str:
    """The one line that is said in place of a run."""
    run = finished(folder, *words, data_dir=data_dir, **variables)
    assert (run.process.returncode, run.stdout) == (1, "")
    assert not (folder / "runs").exists()
    (line,) = run.stderr.splitlines()
    return line.removeprefix("error: ")


def settings(*words: object, **variables: str) -> arguments.Settings:
    parsed = arguments.parse([str(word) for word in words], BASIC, variables)
    assert isinstance(parsed, arguments.Settings)
    return parsed


# --- Packages --------------------------------------------------------------------------------------------------------


def test_another_version_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not of one that differs in its last number alone."""
    versions = {name: f"{version}9" for name, version in checks.TESTED.items()}
    for name, version in {**versions, "torch": "99.0.1"}.items():
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert checks.versions() == (
        f"not tested with torch 99.0.1; if something fails: pip install torch=={checks.TESTED['torch']}"
    )


def test_a_simulation_without_ray_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert 'pip install "flwr[simulation]==' in checks.packages(settings(ENGINE="simulation"))
    assert checks.packages(settings(ENGINE="deployment")) is None


def test_it_imports_no_pytorch() -> None:
    code = "import sys; from launcher import checks; sys.exit('torch' in sys.modules or 'flwr' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=BASIC, check=True)


# --- Proxies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["deployment", pytest.param("simulation", marks=pytest.mark.slow)])
def test_a_proxy_does_not_catch_localhost(engine: str, basic: Path, data_dir: Path) -> None:
    names = ["http_proxy", "https_proxy", "all_proxy", "grpc_proxy"]
    proxies = {spelled: CLOSED for name in names for spelled in (name, name.upper())}
    run = finished(basic, 2, 2, 2, 1, data_dir=data_dir, ENGINE=engine, NO_PROXY="example.org", **proxies)
    assert run.process.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "socks5://127.0.0.1:9"), ("http_proxy", "teapot://127.0.0.1:9"), ("no_proxy", "localhost,[::1]")],
)
def test_proxies_that_flower_can_t_start_with_are_refused(name: str, value: str, basic: Path, data_dir: Path) -> None:
    line = refused(basic, data_dir=data_dir, **{name: value})
    assert line.startswith(f"Flower can't work with {name} as they are")
    assert line.endswith(f"env -u {name} ./run.sh ...")


# --- The machine -----------------------------------------------------------------------------------------------------


def test_too_few_open_files(basic: Path, data_dir: Path) -> None:
    command = f"ulimit -n 100; exec '{basic}/run.sh' 50"
    done = subprocess.run(["bash", "-c", command], env=environment(data_dir), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: 50 clients need 164 open files, and 100 are allowed: ulimit -n 164\n"


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="how much memory there is, is not known")
def test_too_little_memory(basic: Path, data_dir: Path) -> None:
    line = refused(basic, 1_000_000, data_dir=data_dir)
    assert line.startswith("1000000 clients need about 180000700 MiB of memory, and there are ")
    assert line.endswith("take fewer, or ENGINE=simulation")
    free, total = checks.machine_memory("MemAvailable", "SwapFree"), checks.machine_memory("MemTotal", "SwapTotal")
    assert 0 < free < total
    some = settings(int((free + total) / 2 - checks.BASE_MEMORY) // checks.CLIENT_MEMORY, ENGINE="deployment")
    assert checks.memory(some) is None
    assert "are free now" in checks.crowd(some)
    assert checks.crowd(settings(3)) is None
    assert checks.memory(settings(1_000_000, ENGINE="simulation")) is None


@pytest.mark.parametrize("what", ["runs", "TMPDIR", "DATA_DIR"])
def test_too_little_disk(what: str, basic: Path, small_disk: Path, data_dir: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(10 * 2**20))
    if what == "runs":
        line = refused(copy_example("basic", small_disk / "basic"), data_dir=data_dir)
        where, words = small_disk / "basic", "16 are needed for the run"
    elif what == "TMPDIR":
        line = refused(basic, data_dir=data_dir, TMPDIR=str(small_disk))
        where, words = small_disk, "16 are needed for temporary files; TMPDIR=... takes another folder"
    else:
        line = refused(basic, data_dir=small_disk / "data", DATASET="synthetic")
        where, words = small_disk, "50 are needed for the data set synthetic; DATA_DIR=... takes another folder"
    assert f"MiB of disk are free in {where}, and {words}" in line


# --- Certificates ----------------------------------------------------------------------------------------------------


@pytest.fixture
def secured(tmp_path: Path) -> Path:
    """A copy of advanced_example whose certificates have expired as soon as they are made."""
    folder = copy_example("advanced_example", tmp_path / "advanced_example")
    security = folder / "security.py"
    security.write_text(security.read_text().replace("timedelta(days=30)", "timedelta(minutes=-30)"))
    return folder


def security(folder: Path, *words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, folder / "security.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_certificates_are_checked_against_clock_and_address(tmp_path: Path, secured: Path) -> None:
    old, good = tmp_path / "old", tmp_path / "good"
    assert security(secured, old, 1, "127.0.0.1").returncode == 0
    assert security(ADVANCED, good, 1, "nowhere.invalid").returncode == 0
    assert security(ADVANCED, good, "127.0.0.1").returncode == 0
    for words, said in {
        (old, "127.0.0.1"): "set the clock",
        (good, "192.0.2.7"): "is for 127.0.0.1, localhost, nowhere.invalid, not for 192.0.2.7",
        (good, "nowhere.invalid"): "nowhere.invalid is not known here",
        (good,): "usage: ",
        (tmp_path / "none", "127.0.0.1"): "usage: ",
    }.items():
        done = security(ADVANCED, *words)
        assert done.returncode == 1
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_resume_with_keys_that_are_too_old_is_refused(secured: Path, data_dir: Path) -> None:
    run = secured / "runs/20260101-000000-1"
    assert security(secured, run / "keys", 1, "127.0.0.1").returncode == 0
    (run / "logs").mkdir()
    history = {"example": "advanced-example", "engine": "deployment", "dataset": "synthetic", "clients": 5}
    (run / "history.json").write_text(json.dumps({**history, "status": "stopped", "secure": True, "config": {}}))
    before = sorted(os.listdir(run))
    done = finished(secured, f"resume={run.name}", data_dir=data_dir)
    assert done.process.returncode == 2
    assert done.stderr.startswith("error: resume: ")
    assert "set the clock" in done.stderr
    assert sorted({*os.listdir(run)} - {".lock"}) == before
