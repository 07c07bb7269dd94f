"""Tests how runs end that are cut short, by kill -9 or a signal: nothing is left, and the history says how it ended."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from edits import edit
from runs import Launch, copy_example

NOBODY = 65534
HOLD = """    import pathlib, time
    pathlib.Path({folder!r}, f"training-{{context.node_config['partition-id']}}").touch()
    while pathlib.Path({folder!r}, "hold").exists():
        time.sleep(0.05)
    # 2. Plain PyTorch.
"""


def holding(folder: Path) -> Path:
    """Copy basic, so that its clients wait in the middle of a training message while a file `hold` is there."""
    copy_example("basic", folder)
    edit(folder / "client.py", ("    # 2. Plain PyTorch.\n", HOLD.format(folder=str(folder))))
    (folder / "hold").touch()
    return folder


@pytest.fixture
def basic(tmp_path: Path) -> Path:
    return holding(tmp_path / "basic")


def in_training(run: Launch, clients: int) -> list[int]:
    """Wait until so many clients are at work, and return their partition ids."""
    run.wait_until(lambda: len(list(run.folder.glob("training-*"))) == clients)
    return sorted(int(path.name.removeprefix("training-")) for path in run.folder.glob("training-*"))


# --- Things that are killed ------------------------------------------------------------------------------------------


def test_clients_die_and_the_rest_are_enough(basic: Path, data_dir: Path) -> None:
    """In the middle of a round, one's SuperNode and another's superexec, which answers for its SuperNode."""
    with Launch(basic, 5, 3, 3, 2, data_dir=data_dir) as run:
        first, second, third = in_training(run, 3)
        (node,) = run.pids(rf"flower-supernode.*partition-id={first} ")
        os.kill(node, signal.SIGKILL)
        (own_port,) = (word for word in command(run, rf"partition-id={second} ") if word.isdecimal())
        run.kill(rf"flower-superexec.*:{own_port}")
        run.wait_until(lambda: "3 of 5 clients are left" in run.stderr)  # else the second's reply may still count
        run.wait_until(lambda: not run.pids(rf"flwr-clientapp.*:{own_port}"))  # which might be sending its reply
        (basic / "hold").unlink()
        assert run.wait() == 0, run.stdout + run.stderr
    assert f"client-{first} ended with status -9; 4 of 5 clients are left, which is enough" in run.stderr
    assert f"client-{second}-superexec ended with status -9; 3 of 5 clients are left, which is enough" in run.stderr
    one, two = run.history["rounds"]
    assert one["train"]["failures"] == [
        {"partition-id": who, "reason": "no reply in time, or the client is gone"} for who in (first, second)
    ]
    assert [row["partition-id"] for row in one["train"]["by_client"]] == [third]
    for phase in (one["evaluate"], two["train"], two["evaluate"]):
        assert phase["clients"] == 3
        assert phase["failures"] == []
    assert run.nothing_left()


def command(run: Launch, pattern: str) -> list[str]:
    (pid,) = run.pids(pattern)
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").split()


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (r"flower-supernode.*partition-id=1", "client-1 ended with status -9; 1 of 2 clients are left"),
        (r"flower-superlink", "superlink ended with status -9"),
        pytest.param(r"flower-superexec.*:PORT", "superlink-superexec ended with status -9", marks=pytest.mark.slow),
    ],
    ids=["client", "SuperLink", "superexec"],
)
def test_what_the_run_needs_is_killed(pattern: str, said: str, basic: Path, data_dir: Path) -> None:
    clients = 2 if "supernode" in pattern else 1
    with Launch(basic, *[clients] * 3, 2, data_dir=data_dir) as run:
        in_training(run, clients)
        port = next(word for word in command(run, "flower-superlink") if word.isdecimal())
        run.kill(pattern.replace("PORT", port))
        assert run.wait(20) == 1
    assert f"error: {said}" in run.stderr
    assert run.history["status"] == "failed"
    assert run.history["reason"].startswith(said)
    assert run.nothing_left()


@pytest.mark.parametrize("engine", [pytest.param("deployment", marks=pytest.mark.slow), "simulation"])
def test_the_launcher_is_killed(engine: str, basic: Path, data_dir: Path) -> None:
    clients = 1 if engine == "simulation" else 2  # in one Ray actor
    with Launch(basic, *[clients] * 3, 2, data_dir=data_dir, ENGINE=engine) as run:
        in_training(run, clients)
        run.process.kill()
        run.process.wait()
        assert run.nothing_left(within=10)
    assert (run.history["status"], run.history["reason"]) == ("stopped", "the launcher was killed")


@pytest.mark.parametrize("engine", ["deployment", pytest.param("simulation", marks=pytest.mark.slow)])
def test_the_launcher_s_other_half_is_killed(engine: str, basic: Path, data_dir: Path) -> None:
    """That which does the work, and from which all processes are forked."""
    with Launch(basic, 1, 1, 1, 2, data_dir=data_dir, ENGINE=engine) as run:
        in_training(run, 1)
        (pid,) = set(run.pids("launcher/__main__")) - {run.process.pid}
        os.kill(pid, signal.SIGKILL)
        assert run.wait(15) == 1
        assert run.nothing_left()
    reason = "the launcher's working process was killed by SIGKILL"
    assert f"error: {reason}" in run.stderr
    assert (run.history["status"], run.history["reason"]) == ("failed", reason)


def test_an_orphan_leaves_no_zombie(basic: Path, data_dir: Path) -> None:
    """One whose parent has ended before it; the launcher waits for it."""
    orphan = "    __import__('os').system('sleep 0.2 & echo orphan $!')\n    import pathlib, time\n"
    edit(basic / "client.py", ("    import pathlib, time\n", orphan))
    with Launch(basic, 1, 1, 1, 1, data_dir=data_dir) as run:
        in_training(run, 1)
        said = run.wait_until(lambda: re.search(r"orphan (\d+)", run.log("client-0")))
        run.wait_until(lambda: not Path("/proc", said[1]).exists(), timeout=20)
        (basic / "hold").unlink()
        assert run.wait() == 0, run.stdout + run.stderr


@pytest.mark.slow  # the quick part has a run that is killed so, and resumed
@pytest.mark.parametrize("engine", ["deployment", "simulation"])
def test_everything_is_killed_at_once(engine: str, basic: Path, data_dir: Path) -> None:
    with Launch(basic, 2, 2, 2, 2, data_dir=data_dir, ENGINE=engine) as run:
        in_training(run, 2)
        for pid in run.pids(""):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert run.wait(10) == -signal.SIGKILL
        assert run.nothing_left(within=10)
    assert run.history["clients"] == 2  # the file is whole


# --- Signals ---------------------------------------------------------------------------------------------------------


def stop(run: Launch, number: int, status: int) -> None:
    """Send a signal as a terminal does, to the whole foreground group; all must be gone within ten seconds."""
    os.killpg(run.process.pid, number)
    sent = time.monotonic()
    assert run.wait(15) == status
    assert time.monotonic() - sent < 10
    assert run.nothing_left()
    assert run.history["status"] == "stopped"
    assert run.history["reason"] == signal.Signals(number).name


@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),  # the quick part has one, in test_faults.py
    ],
)
def test_a_signal_at_the_start(number: int, status: int, basic: Path, data_dir: Path) -> None:
    with Launch(basic, data_dir=data_dir) as run:
        run.wait_until(lambda: run.pids("flower-superlink"))
        stop(run, number, status)


@pytest.mark.slow  # the quick part has another user's run that is stopped so
@pytest.mark.parametrize("engine", ["deployment", "simulation"])
def test_a_signal_in_a_round(engine: str, basic: Path, data_dir: Path) -> None:
    with Launch(basic, 2, 2, 2, 2, data_dir=data_dir, ENGINE=engine) as run:
        in_training(run, 2)
        stop(run, signal.SIGINT, 130)


def test_a_signal_before_anything_is_started(basic: Path, data_dir: Path) -> None:
    """At any time in the first second; the shell and Python may end of it before the launcher is there."""
    for delay in (0.0, 0.1, 0.2, 0.4, 0.7, 1.0):
        with Launch(basic, data_dir=data_dir) as run:
            time.sleep(delay)
            os.killpg(run.process.pid, signal.SIGTERM)
            assert run.wait(15) in (143, -signal.SIGTERM), (delay, run.stderr)
        for folder in set(run.run_folders()) - run.before:
            run.found = folder
            assert run.nothing_left(), delay
            if (folder / "history.json").exists():
                assert run.history["status"] == "stopped", delay


def test_a_signal_as_the_leader_is_forked(basic: Path, data_dir: Path) -> None:
    """It waits until somebody can do what it asks for."""
    edit(
        basic / "launcher/guard.py", ("    run.open()\n", "    run.open()\n    os.kill(os.getpid(), signal.SIGTERM)\n")
    )
    with Launch(basic, data_dir=data_dir, TMPDIR=str(basic.parent)) as run:
        assert run.wait(30) == 143, run.stderr
    assert run.stderr == "\nSIGTERM: stopping\n"
    assert (run.history["status"], run.history["reason"]) == ("stopped", "SIGTERM")
    assert run.nothing_left()


def test_a_signal_when_the_run_is_over(basic: Path, data_dir: Path) -> None:
    """Ends what is only for show; what has come out stands."""
    (basic / "hold").unlink()
    edit(basic / "launcher/picture.py", ("    drawn = io.BytesIO()\n", "    import time\n    time.sleep(60)\n"))
    with Launch(basic, 1, 1, 1, 1, data_dir=data_dir) as run:
        run.wait_until(lambda: "basic: 1 rounds" in run.stdout)
        time.sleep(1)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(15) == 0
    assert run.history["status"] == "completed"
    assert "stopped before the picture and the report were made" in run.stderr
    assert run.nothing_left()


def test_a_signal_while_the_data_is_prepared(basic: Path, tmp_path: Path) -> None:
    """A server that never sends a byte holds the download up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/cifar.tar.gz"
        data = tmp_path / "data"
        with Launch(basic, data_dir=data, DATASET="cifar10", CIFAR10_URL=url) as run:
            server.accept()
            stop(run, signal.SIGINT, 130)
    assert [path.name for path in data.iterdir() if path.name != ".lock"] == []


# --- A user who isn't root -------------------------------------------------------------------------------------------


# Root's Python may be in root's home, so this user may look everywhere, but do no more than any other.
LOOK = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *LOOK]


@pytest.fixture
def nobody(data_dir: Path) -> Iterator[Path]:
    """A folder that belongs to another user, with a copy of basic and the data in it."""
    if os.geteuid() != 0:
        pytest.skip("all tests are run by a user who isn't root")
    trial = [*AS_NOBODY, "sh", "-c", '"$0" -c "import json"', sys.executable]
    if not shutil.which("setpriv") or subprocess.run(trial, capture_output=True).returncode != 0:
        pytest.skip("no other user can use this Python")
    home = Path(tempfile.mkdtemp(prefix="nobody-"))  # pytest's own folders are root's alone
    holding(home / "basic")
    shutil.copytree(data_dir, home / "data")
    for path in (home, *home.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    yield home
    shutil.rmtree(home)


def launched(home: Path, engine: str) -> Launch:
    folder, data = home / "basic", home / "data"
    return Launch(folder, 2, 2, 2, 2, data_dir=data, through=AS_NOBODY, HOME=str(home), ENGINE=engine)


both = pytest.mark.parametrize("engine", ["deployment", pytest.param("simulation", marks=pytest.mark.slow)])


@both
def test_another_user_s_run_is_stopped(engine: str, nobody: Path) -> None:
    with launched(nobody, engine) as run:
        in_training(run, 2)
        assert {os.stat(f"/proc/{pid}").st_uid for pid in run.pids("flower-superlink")} == {NOBODY}
        stop(run, signal.SIGTERM, 143)


@both
def test_another_user_s_launcher_is_killed(engine: str, nobody: Path) -> None:
    with launched(nobody, engine) as run:
        in_training(run, 2)
        run.process.kill()
        run.process.wait()
        assert run.nothing_left(within=10)
    assert run.history["reason"] == "the launcher was killed"
