"""What goes wrong in a run ends in a clear error, an honest exit status and an empty process table, or is survived."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
from runs import Launch, copy_example, finished

from launcher.processes import end, marked

WORKERS = {"deployment": r"flwr-clientapp", "simulation": r"ray::ClientAppActor\.run"}


@pytest.fixture
def basic(tmp_path: Path) -> Path:
    return copy_example("basic", tmp_path / "basic")


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, f"{old!r} is not once in {file.name}"
    file.write_text(text.replace(old, new))


def slow_training(folder: Path) -> None:
    """Let each client take its time, so that a test can act in the middle of a round."""
    edit(
        folder / "client.py",
        "    net = load_model(message)\n    batches, _",
        "    __import__('time').sleep(60)\n    net = load_model(message)\n    batches, _",
    )


def wait_for_training(run: Launch, engine: str = "deployment") -> None:
    run.wait_until(lambda: "configure_train: Sampled" in run.log("run") and run.pids(WORKERS[engine]))


# --- Things that are killed ------------------------------------------------------------------------------------------


def test_a_client_is_killed_and_the_rest_are_enough(basic: Path, data_dir: Path) -> None:
    with Launch(basic, 3, 2, 2, 2, data_dir=data_dir) as run:
        wait_for_training(run)
        run.kill(r"flower-supernode.*partition-id=1")
        assert run.wait() == 0, run.stdout + run.stderr
    assert "client-1 ended with status -9; 2 of 3 clients are left, which is enough" in run.stderr
    assert len(run.history["rounds"]) == 2
    assert run.history["rounds"][-1]["train"]["clients"] == 2
    assert run.nothing_left()


def test_a_client_is_killed_and_too_few_are_left(basic: Path, data_dir: Path) -> None:
    slow_training(basic)
    with Launch(basic, 2, 2, 2, 2, data_dir=data_dir) as run:
        wait_for_training(run)
        run.kill(r"flower-supernode.*partition-id=1")
        assert run.wait(20) == 1
    assert "client-1 ended with status -9; 1 of 2 clients are left, and a round needs 2" in run.stderr
    assert "logs/client-1.log" in run.stderr
    assert run.history["status"] == "failed"
    assert run.nothing_left()


def test_the_superlink_is_killed(basic: Path, data_dir: Path) -> None:
    slow_training(basic)
    with Launch(basic, 2, 2, 2, 2, data_dir=data_dir) as run:
        wait_for_training(run)
        run.kill(r"flower-superlink")
        assert run.wait(20) == 1
    assert "the SuperLink ended with status -9" in run.stderr
    assert run.nothing_left()


@pytest.mark.parametrize("engine", ["deployment", "simulation"])
def test_the_launcher_is_killed(engine: str, basic: Path, data_dir: Path) -> None:
    slow_training(basic)
    with Launch(basic, 2, 2, 2, 2, data_dir=data_dir, ENGINE=engine) as run:
        wait_for_training(run, engine)
        run.process.kill()
        run.process.wait()
    assert run.nothing_left(within=15)


# --- Signals ---------------------------------------------------------------------------------------------------------

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


def stop(run: Launch, number: int, status: int) -> None:
    """Send a signal as a terminal does, to the whole foreground group; all must be gone within ten seconds."""
    os.killpg(run.process.pid, number)
    sent = time.monotonic()
    assert run.wait(15) == status
    assert time.monotonic() - sent < 10
    assert run.nothing_left()


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_a_signal_at_the_start(number: int, status: int, basic: Path, data_dir: Path) -> None:
    with Launch(basic, data_dir=data_dir) as run:
        run.wait_until(lambda: run.pids("flower-superlink"))
        stop(run, number, status)
    assert run.history["status"] == "stopped"


@pytest.mark.parametrize("engine", ["deployment", "simulation"])
def test_a_signal_in_a_round(engine: str, basic: Path, data_dir: Path) -> None:
    slow_training(basic)
    with Launch(basic, 2, 2, 2, 2, data_dir=data_dir, ENGINE=engine) as run:
        wait_for_training(run, engine)
        stop(run, signal.SIGINT, 130)


def test_a_signal_while_the_data_is_prepared(basic: Path, tmp_path: Path) -> None:
    """A server that never sends a byte holds the download up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/cifar.tar.gz"
        data = tmp_path / "data"
        with Launch(basic, data_dir=data, DATASET="cifar10", CIFAR10_URL=url) as run:
            server.accept()
            stop(run, signal.SIGINT, 130)
    assert not (data / "cifar10").exists()


# --- Code that fails -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["deployment", pytest.param("simulation", marks=pytest.mark.slow)])
def test_server_py_raises(engine: str, basic: Path, data_dir: Path) -> None:
    edit(basic / "server.py", "    config = context.run_config\n", "    raise ValueError('a bad server')\n")
    run = finished(basic, 2, 2, 2, 1, data_dir=data_dir, ENGINE=engine)
    assert run.process.returncode == 1
    assert "a bad server" in run.stderr
    assert "server.py" in run.stderr
    assert run.history["status"] == "failed"
    assert "a bad server" in run.history["reason"]
    assert run.nothing_left()


@pytest.mark.parametrize("engine", ["deployment", pytest.param("simulation", marks=pytest.mark.slow)])
def test_every_client_raises(engine: str, basic: Path, data_dir: Path) -> None:
    edit(
        basic / "client.py",
        "    train_loss = cifar_utils.train(",
        "    raise ValueError('a bad client')\n    train_loss = cifar_utils.train(",
    )
    run = finished(basic, 2, 2, 2, 1, data_dir=data_dir, ENGINE=engine)
    assert run.process.returncode == 1
    assert "no client could train" in run.stderr
    assert "a bad client" in run.stderr
    assert [failure["partition-id"] for failure in run.history["rounds"][0]["train"]["failures"]] == [0, 1]
    assert not (run.run_dir / "model.pt").exists()
    assert run.nothing_left()


BAD = {
    0: 'reply["arrays"]["fc3.bias"] = Array(np.full(10, np.nan, np.float32))',
    1: 'reply["arrays"]["fc3.bias"] = Array(np.ones(1, np.float32))',
    2: 'del reply["arrays"]["fc3.bias"]',
    3: 'reply["metrics"]["num-examples"] = 0',
    4: 'raise ValueError("a bad client")',
    5: 'reply["metrics"]["num-examples"] = 1_000_000',
}


@pytest.mark.parametrize("engine", ["simulation", pytest.param("deployment", marks=pytest.mark.slow)])
def test_bad_replies_are_refused_and_the_round_goes_on(engine: str, basic: Path, data_dir: Path) -> None:
    cases = "".join(f"    if context.node_config['partition-id'] == {i}:\n        {code}\n" for i, code in BAD.items())
    imports = "    import numpy as np\n    from flwr.app import Array\n"
    line = "    return Message(content=reply, reply_to=message)\n"
    edit(basic / "client.py", line, imports + cases + line)
    run = finished(basic, 7, 7, 7, 1, data_dir=data_dir, ENGINE=engine)
    assert run.process.returncode == 0, run.stdout + run.stderr
    (entry,) = run.history["rounds"]
    reasons = {failure["partition-id"]: failure["reason"] for failure in entry["train"]["failures"]}
    assert entry["train"]["clients"] == 1
    assert sorted(reasons) == sorted(BAD)
    for partition, words in {
        0: "NaN",
        1: "shape (1,)",
        2: "fc3.bias",
        3: "num-examples",
        4: "a bad client",
        5: "the whole data set has 600",
    }.items():
        assert words in reasons[partition]
        assert reasons[partition] in run.log("run")
    assert entry["evaluate"]["clients"] == 7


@pytest.mark.parametrize("kind", ["dtype", "shape", "count", "truncated", "no array"])
def test_data_that_is_not_as_it_should_be(kind: str, basic: Path, tmp_path: Path, data_dir: Path) -> None:
    """Said before anything starts."""
    data = shutil.copytree(data_dir, tmp_path / "data")
    images = data / "synthetic/train_images.npy"
    whole = np.load(images)
    if kind == "truncated":
        images.write_bytes(images.read_bytes()[:-1000])
    elif kind == "no array":
        images.write_text("no array")
    else:
        broken = {"dtype": whole.astype(np.float32), "shape": whole[:, :1], "count": whole[:-1]}
        np.save(images, broken[kind])
    run = finished(basic, data_dir=data)
    assert run.process.returncode == 1
    assert run.stderr.startswith("error: ")
    assert "synthetic" in run.stderr
    assert "flower-superlink" not in run.stdout


def test_a_process_that_hides_its_environment_is_ended_too(tmp_path: Path) -> None:
    """As Ray's agents do, which write their title over it, and stay for a minute after a run that was cut off."""
    hidden = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'], env={})"
    mark = {**os.environ, "RUN_DIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", hidden], env=mark, stdin=PIPE, stdout=PIPE, start_new_session=True
    ) as parent:
        assert parent.stdout.readline() == b"1\n"  # both are there, and hold the pipe
        assert marked(tmp_path) == [parent.pid]
        end(tmp_path)
        assert parent.stdout.read() == b""  # nobody holds it any more
        assert parent.wait() == -signal.SIGTERM


# --- The surroundings ------------------------------------------------------------------------------------------------


def test_a_port_in_use(basic: Path, data_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = finished(basic, data_dir=data_dir, PORT=str(port))
        taken.getsockname()  # still ours
    assert run.process.returncode == 1
    assert f"port {port} is in use" in run.stderr
    assert "flower-superlink" not in run.stdout


def test_each_run_says_once_that_cifar_10_could_not_be_had(basic: Path, tmp_path: Path, data_dir: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(data_dir / "synthetic", data / "synthetic")
    no_site = {"CIFAR10_URL": "http://127.0.0.1:1/", "NO_PROXY": "127.0.0.1"}
    runs = []
    for _ in range(2):
        with Launch(basic, data_dir=data, DATASET="auto", **no_site) as run:
            run.wait_until(lambda run=run: "+ flower-superlink" in run.stdout)  # what is said of the data comes before
            run.process.send_signal(signal.SIGTERM)
            assert run.wait() == 128 + signal.SIGTERM
        runs.append(run)
    for run in runs:
        assert run.stdout.count("CIFAR-10 could not be downloaded") == 1
        assert run.stdout.count("WARNING: this is not CIFAR-10. CIFAR-10 could not be downloaded") == 1
    assert ["Downloading" in run.stdout for run in runs] == [True, False]


@pytest.mark.slow
def test_a_client_never_comes(basic: Path, data_dir: Path) -> None:
    """Killed before it connects, with MIN_CLIENTS below CLIENTS: round 1 goes on with those who are there."""
    with Launch(basic, 3, 2, 1, 1, data_dir=data_dir) as run:
        run.kill(r"flower-supernode.*partition-id=2")
        assert run.wait() == 0, run.stdout + run.stderr
    assert run.history["rounds"][0]["train"]["clients"] == 1


@pytest.mark.slow
def test_a_full_disk(small_disk: Path, data_dir: Path) -> None:
    """The rounds that were completed stay, the model is absent rather than a part of one, and the reason is said."""
    folder = copy_example("basic", small_disk / "basic")
    with Launch(folder, 2, 2, 2, 2, data_dir=data_dir, ENGINE="simulation") as run:
        run.wait_until(lambda: run.pids("flower-superlink"))
        free = shutil.disk_usage(small_disk).free
        (small_disk / "filler").write_bytes(bytes(free - 360 * 1024))  # enough for app and history, not for a model
        assert run.wait() == 1
    assert "No space left on device" in run.stderr
    assert [entry["round"] for entry in run.history["rounds"]] == [1, 2]
    assert run.history["status"] == "failed"
    assert not (run.run_dir / "model.pt").exists()
    assert run.nothing_left()
