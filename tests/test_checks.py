"""What would make a run fail later is said before anything starts, in one line with what to type."""

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from paths import BASIC
from runs import UNPRIVILEGED, Launch, copy_example, finished

from launcher import arguments, checks
from launcher.ending import tail
from launcher.environment import SetupError

MIB = 2**20


@pytest.fixture
def basic(tmp_path: Path) -> Path:
    return copy_example("basic", tmp_path / "basic")


def refused(folder: Path, *words: object, **options) -> str:
    """The one line that is said in place of a run."""
    run = finished(folder, *words, **options)
    assert (run.process.returncode, run.stdout) == (1, "")
    assert not run.run_folders()
    (line,) = run.stderr.splitlines()
    return line.removeprefix("error: ")


def settings(*words: object, **variables: str) -> arguments.Settings:
    return arguments.parse([str(word) for word in words], BASIC, variables)


# --- Packages and ports ----------------------------------------------------------------------------------------------


def test_it_imports_no_pytorch() -> None:
    code = "import sys; from launcher import checks; sys.exit('torch' in sys.modules or 'flwr' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=BASIC, check=True)


def test_a_port_that_is_in_use_is_refused(basic: Path, data_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        line = refused(basic, data_dir=data_dir, PORT=str(port))
    assert line.startswith(f"port {port} can't be used (Address already in use): leave PORT out")
    checks.check(settings(PORT=str(port)))  # it is free again


# --- Limits of the machine or container ------------------------------------------------------------------------------


def test_the_limit_on_open_files_is_raised(tmp_path: Path) -> None:
    code = "import test_checks as t, resource; t.checks.check(t.settings()); print(*resource.getrlimit(7))"
    command = f"ulimit -Sn 100; exec {sys.executable} -c '{code}'"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=BASIC,
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parent}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert resource.RLIMIT_NOFILE == 7
    soft, most = map(int, done.stdout.split())
    assert soft == (most if most > 0 else 2**16)


def written(root: Path, **files: str) -> Path:
    """A file system's root with some of what Linux shows in /proc and /sys."""
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


MEMINFO = "MemTotal: 8192000 kB\nMemFree: 1 kB\nMemAvailable: 4096000 kB\nSwapTotal: 1024000 kB\nSwapFree: 512000 kB\n"
WHOLE = (9000.0, 4500.0)
V1, V2 = "9:pids:/a\n4:memory:/a/b\n3:cpu,cpuacct:/a/b\n1:name=systemd:/\n", "0::/a/b\n"


def cgroup(root: Path, group: str, version: int, **files: str) -> Path:
    """A control group, or the one above it, with some files; those of memory say how much is in use, too."""
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/meminfo").write_text(MEMINFO)
    (root / "proc/self/cgroup").write_text(V1 if version == 1 else V2)
    for name, content in files.items():
        controller = ("cpu" if name.startswith("cpu") else "memory") if version == 1 else ""
        path = root / "sys/fs/cgroup" / controller / group / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def used(version: int, limit: str, megabytes: int, stale: int) -> dict[str, str]:
    """The files of a control group of memory that takes some, of which some are copies of files."""
    limit_in, usage_in = ("memory__max", "memory__current")
    stat = f"active_file 5\ninactive_file {stale * MIB}\n"
    if version == 1:
        limit_in, usage_in = "memory__limit_in_bytes", "memory__usage_in_bytes"
        stat = f"inactive_file 0\nactive_file 5\ntotal_inactive_file {stale * MIB}\n"  # with the groups below
    return {limit_in: limit, usage_in: str(megabytes * MIB), "memory__stat": stat}


@pytest.mark.parametrize("version", [1, 2])
def test_memory_is_what_the_machine_has_and_the_container_may_take(tmp_path: Path, version: int) -> None:
    none = {1: str(2**63 - 4096), 2: "max"}[version]
    root = cgroup(tmp_path, "a/b", version, **used(version, none, 100, 50))
    assert checks.machine_memory(root) == WHOLE
    cgroup(tmp_path, "a/b", version, **used(version, str(900 * MIB), 300, 100))
    assert checks.machine_memory(root) == (900, 900 - 300 + 100)
    cgroup(tmp_path, "", version, **used(version, str(700 * MIB), 650, 0))  # the group's parents' limits hold, too
    assert checks.machine_memory(root) == (700, 50)
    cgroup(tmp_path, "", version, **used(version, str(700 * MIB), 800, 0))
    assert checks.machine_memory(root) == (700, 0)


def test_without_control_groups_it_is_the_machine_s(tmp_path: Path) -> None:
    written(tmp_path, proc__meminfo=MEMINFO)
    assert checks.machine_memory(tmp_path) == WHOLE
    total, free = checks.machine_memory(tmp_path / "nothing")  # as on macOS
    assert total == free == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / MIB


ALLOWED = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 0
QUOTAS = {"max 100000": None, "50000 100000": 1, "100000 100000": 1, "150000 100000": 2, "1000000000 100000": None}


@pytest.mark.skipif(ALLOWED < 2, reason="needs two cores")
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("quota", QUOTAS)
def test_cores_are_those_that_the_container_may_use(tmp_path: Path, version: int, quota: str) -> None:
    if version == 1:
        share, period = quota.replace("max", "-1").split()
        root = cgroup(tmp_path, "a/b", 1, cpu__cfs_quota_us=share, cpu__cfs_period_us=f"{period}\n")
    else:
        root = cgroup(tmp_path, "a/b", 2, cpu__max=f"{quota}\n")
    assert checks.cores(root) == min(QUOTAS[quota] or ALLOWED, ALLOWED)
    assert checks.cores(tmp_path / "nothing") == ALLOWED


@pytest.mark.skipif(not shutil.which("taskset"), reason="there is no taskset")
def test_cores_are_those_that_the_process_may_use() -> None:
    first = min(os.sched_getaffinity(0))
    code = "from launcher import checks, commands; print(checks.cores())"
    command = ["taskset", "--cpu-list", str(first), sys.executable, "-c", code]
    assert subprocess.run(command, cwd=BASIC, capture_output=True, text=True, check=True).stdout == "1\n"


def test_a_simulation_plays_one_client_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher import commands

    monkeypatch.setattr(commands, "cores", lambda: 4)
    assert commands.at_once(settings(9, 9, 9)) == 4
    assert commands.at_once(settings(9, 9, 2)) == 2


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="how much memory there is, is not known")
def test_too_little_memory_is_refused(basic: Path, data_dir: Path) -> None:
    line = refused(basic, 1_000_000, data_dir=data_dir)
    assert re.match(r"1000000 clients need about \d{8,} MiB of memory, and there are \d+: take fewer, ", line)
    assert "ENGINE=simulation" in line


def test_little_memory_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "machine_memory", lambda: (900.0, 100.0))
    with pytest.raises(SetupError, match=r"4 clients need about \d+ MiB of memory, and there are 900: "):
        checks.check(settings(4, 2, 2, 2, ENGINE="deployment"))
    monkeypatch.setattr(checks, "machine_memory", lambda: (9000.0, 100.0))
    assert re.fullmatch(r"4 clients need .*, and 100 are free now", checks.check(settings(4, 2, 2, 2)))
    monkeypatch.setattr(checks, "machine_memory", lambda: (9000.0, 9000.0))
    assert checks.check(settings(4, 2, 2, 2)) is None
    assert checks.check(settings(1_000_000, 2, 2, 2, ENGINE="simulation")) is None  # plays them in turn


# --- Folders ---------------------------------------------------------------------------------------------------------


def test_files_that_need_a_short_path_have_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Ray's sockets, the longest path may have 107 bytes, on macOS 103."""
    ray = "/fl-12345678/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
    short = tmp_path.anchor + "t" * (checks.SHORT - 1)
    assert len(short + ray) <= 107
    assert len(short + ray.replace("1234567", "12345")) <= 103  # the largest process id of macOS has 5 digits
    for place, expected in ((short, short), (f"{short}t", "/tmp"), ("/" + "ü" * (checks.SHORT - 1), "/tmp")):
        monkeypatch.setattr(checks.tempfile, "gettempdir", lambda place=place: place)
        monkeypatch.setattr(checks.os, "access", lambda *_: True)
        assert checks.temporary_place() == expected
    monkeypatch.setattr(checks.os, "access", lambda path, mode: path not in ("/tmp", "/var/tmp"))
    with pytest.raises(SetupError, match="too long a path for sockets: TMPDIR=/a/short/path"):
        checks.check(settings())


def test_a_folder_that_can_t_be_written_is_one_line(basic: Path, tmp_path: Path, data_dir: Path) -> None:
    basic.chmod(0o555)
    place = Path(checks.tempfile.mkdtemp(dir="/tmp", prefix="t"))  # short enough to be used
    line = refused(basic, 2, data_dir=data_dir, through=UNPRIVILEGED, TMPDIR=str(place))
    basic.chmod(0o755)
    assert line.startswith("[Errno 13] Permission denied: ")
    assert str(basic / "runs") in line
    assert list(place.iterdir()) == []
    (basic / "runs").write_text("not a folder")
    run = finished(basic, 2, data_dir=data_dir, TMPDIR=str(place))
    assert (run.process.returncode, run.stdout, len(run.stderr.splitlines())) == (1, "", 1)
    assert run.stderr.startswith("error: ")
    assert list(place.iterdir()) == []
    place.rmdir()


# --- The part of a log that tells why --------------------------------------------------------------------------------

OWN = "/runs/x/flwr-home/apps/"


def traceback(error: str, file: str = "/lib/ray/worker.py") -> str:
    return f'Traceback (most recent call last):\n  File "{file}", line 1, in f\n    f()\n{error}\n'


MINE = traceback("ValueError: mine", f"{OWN}me.basic.1/server.py")
CAUSE, WRAPPER = traceback("OSError: the cause"), traceback("RuntimeError: An error was encountered. Ending.")
BECAUSE = "\nThe above exception was the direct cause of the following exception:\n\n"
LOGGED = "\x1b[92mINFO \x1b[0m:     more\n" * 100


@pytest.mark.parametrize(
    ("log", "shown"),
    [
        ("", ""),
        ("one\ntwo\n", "one\ntwo"),
        (LOGGED, LOGGED[: 25 * len(LOGGED) // 100].rstrip()),
        (LOGGED + CAUSE + LOGGED, CAUSE),
        (LOGGED + CAUSE + BECAUSE + WRAPPER + LOGGED, CAUSE),
        (MINE + LOGGED + CAUSE + BECAUSE + WRAPPER, MINE),
        (MINE + BECAUSE + WRAPPER + BECAUSE + WRAPPER + LOGGED, MINE),
        (CAUSE + LOGGED + WRAPPER, WRAPPER),
        (CAUSE + BECAUSE + WRAPPER + LOGGED + WRAPPER, WRAPPER),
        (f"installed to {OWN}\n" + CAUSE + LOGGED + f"\x1b[0mlooked into {OWN}\n", CAUSE),
    ],
)
def test_the_cause_is_found_in_a_log(tmp_path: Path, log: str, shown: str) -> None:
    path = tmp_path / "run.log"
    path.write_text(log)
    assert tail(path, OWN) == shown.rstrip("\n")
    assert tail(tmp_path / "none", OWN) == ""


def test_the_cause_of_a_simulation_s_end_is_shown(basic: Path, data_dir: Path) -> None:
    """Ray does not start here; Flower wraps its error twice."""
    server = basic / "server.py"
    breaks = "import ray\n\n\ndef init(*_, **__):\n    raise OSError('no room for Ray')\n\n\nray.init = init\n"
    server.write_text(server.read_text().replace("app = ServerApp()", f"{breaks}app = ServerApp()"))
    with Launch(basic, 2, 2, 2, 1, data_dir=data_dir, ENGINE="simulation") as run:
        assert run.wait() == 1
    assert "OSError: no room for Ray" in run.stderr
    assert str(run.run_dir / "logs/run.log") in run.stderr
    assert run.history["status"] == "failed"
