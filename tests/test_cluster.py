"""multiprocessing on a Ray cluster: two network namespaces stand for two machines, each with a /tmp of its own."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from edits import edit
from paths import ROOT
from runs import Launch, copy_example, environment, finished
from test_commands import ask

NODES = ROOT / "multiprocessing" / "nodes.py"
HEAD, WORKER = "192.0.2.1", "192.0.2.2"  # of a network that is for examples (RFC 5737)
PORT = 6379
PATIENCE = 180.0  # seconds
EACH = ("--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats", "--block")  # of the nodes
WORDS = (6, 6, 4, 3, "local-epochs=1")


# --- Without a cluster -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:9", "RAY_ADDRESS=127.0.0.1:9: nobody answers ("),
        ("ray://127.0.0.1:10001", "RAY_ADDRESS=ray://127.0.0.1:10001: write HOST:PORT"),
        ("auto", "RAY_ADDRESS=auto: write HOST:PORT"),
    ],
)
def test_an_address_where_no_cluster_is(address: str, said: str) -> None:
    status, _, error = ask("multiprocessing", "2", "--dry-run", RAY_ADDRESS=address, DATASET="synthetic")
    assert status == 2
    assert error.startswith(f"error: {said}")


def test_the_address_is_for_simulations_of_this_example_alone() -> None:
    for example, engine in (("multiprocessing", "deployment"), ("basic", "simulation")):
        status, _, error = ask(example, "2", "--dry-run", RAY_ADDRESS="127.0.0.1:9", ENGINE=engine, DATASET="synthetic")
        assert (status, error) == (0, "")


# --- With one --------------------------------------------------------------------------------------------------------


def until(condition: Callable[[], Any], timeout: float = PATIENCE) -> Any:
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.1)
    return value


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def variables_of(pid: int) -> dict[str, str]:
    """Return the environment with which a process was started; nothing where it has gone."""
    with contextlib.suppress(OSError):
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return dict(os.fsdecode(pair).split("=", 1) for pair in pairs if b"=" in pair)
    return {}


class Machines:
    """A head and a worker of one core each. They share all files but those in /tmp, where the code and the data are."""

    def __init__(self, root: Path, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.hosts = {name: f"fl{os.getpid()}-{name}" for name in ("head", "worker")}
        self.log = root / "ray.log"
        self.temporary = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets need a short path
        self.before = set(Path("/tmp").glob("fl-*-node"))  # of others
        self.shared = Path(tempfile.mkdtemp(prefix="fl-test-", dir="/dev/shm"))

    def build(self) -> None:
        for name in self.hosts.values():
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        head, worker = self.hosts.values()
        ip("-n", head, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", worker)
        for name, address in ((head, HEAD), (worker, WORKER)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")

    def remove(self) -> None:
        for name, host in self.hosts.items():
            with contextlib.suppress(subprocess.CalledProcessError):  # it may not have been made
                self.end(name)
                ip("netns", "delete", host)
        for folder in (self.temporary, self.shared):
            shutil.rmtree(folder, ignore_errors=True)

    def pids(self, name: str) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.hosts[name]).split()]

    def disk(self, name: str) -> Path:
        """Return the files of a machine, with its own /tmp."""
        return Path("/proc", str(self.pids(name)[0]), "root")

    def end(self, name: str, word: str = "") -> None:
        """End all that runs on a machine at once, as where its power goes; or what has a word in its command line."""

        def named(pid: int) -> bool:
            with contextlib.suppress(OSError):
                return word in Path(f"/proc/{pid}/cmdline").read_text()
            return False

        while pids := [pid for pid in self.pids(name) if named(pid)]:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def start(self, name: str, *command: str, **variables: str) -> None:
        """Start a command on a machine, without DATA_DIR."""
        clean = environment(self.data_dir)
        del clean["DATA_DIR"]
        with self.log.open("ab") as log:
            through = ["ip", "netns", "exec", self.hosts[name], *command]
            files = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            subprocess.Popen(through, env={**clean, **variables}, cwd="/", start_new_session=True, **files)

    def start_head(self, port: int = PORT, claimed: str = "") -> None:
        program = (
            "import ray, sys; ray.__version__ = sys.argv.pop(1) or ray.__version__; import ray.scripts.scripts as ray;"
        )
        program += "ray.main()"
        options = [
            "--head",
            f"--node-ip-address={HEAD}",
            f"--port={port}",
            f"--temp-dir={self.temporary}/{port}",
            "--include-dashboard=false",
        ]
        self.start("head", sys.executable, "-c", program, claimed, "start", *options, *EACH)

    def start_worker(self, data_dir: Path | None) -> None:
        """Start the worker with a copy of `data_dir`, or without data."""
        script = (
            'mount -t tmpfs none /mnt; [ -z "$1" ] || cp -r "$1" /mnt/data; mount --move /mnt /tmp; shift; exec "$@"'
        )
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={HEAD}:{PORT}"]
        words = ["unshare", "--mount", "bash", "-ec", script, "-", str(data_dir or "")]
        self.start("worker", *words, *ray, f"--node-ip-address={WORKER}", *EACH, DATA_DIR="/tmp/data")
        until(lambda: len(self.nodes()) == 2)

    def nodes(self) -> list[str]:
        """Ask the head for the addresses of the living nodes."""
        words = [
            "ip",
            "netns",
            "exec",
            self.hosts["head"],
            sys.executable,
            str(ROOT / "multiprocessing" / "nodes.py"),
            "describe",
        ]
        variables = {**os.environ, "RAY_ADDRESS": f"{HEAD}:{PORT}"}
        said = subprocess.run(words, capture_output=True, text=True, env=variables).stdout
        found = [json.loads(line) for line in said.splitlines() if line.startswith("[{")]  # Ray may have a say, too
        return sorted(node["address"] for nodes in found for node in nodes)

    def options(self, port: int = PORT) -> dict[str, Any]:
        """Return how to start a run on the head."""
        through = ("ip", "netns", "exec", self.hosts["head"])
        return {"through": through, "data_dir": self.data_dir, "RAY_ADDRESS": f"{HEAD}:{port}"}

    def of_run(self, run: Launch, name: str) -> list[int]:
        """Return the processes of a run on a machine."""
        ours = str(run.run_dir)
        return [pid for pid in self.pids(name) if variables_of(pid).get("FLOWER_EXAMPLE_RUN") == ours]

    def left_by(self, run: Launch) -> bool:
        """Whether anything of a run is there, a process, or a folder of its fork servers."""
        folders = set(Path("/tmp").glob("fl-*-node")) - self.before
        with contextlib.suppress(OSError, LookupError):
            folders |= set((self.disk("worker") / "tmp").glob("fl-*"))
        return bool(folders or any(self.of_run(run, name) for name in self.hosts))


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Iterator[Machines]:
    if not shutil.which("ip"):
        pytest.skip("there is no `ip` to make network namespaces with: install iproute2")
    if any(Path(place).is_relative_to("/tmp") for place in (sys.prefix, ROOT)):
        pytest.skip("Python or this folder is in /tmp, and the worker has a /tmp of its own")
    found = Machines(tmp_path_factory.mktemp("machines"), data_dir)
    try:
        try:
            found.build()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"may not make network namespaces here: {error.stderr}")
        found.start_head()
        until(lambda: found.nodes() == [HEAD])
        found.start_worker(data_dir)
        yield found
    finally:
        found.remove()


@pytest.fixture
def folder_of_run(tmp_path: Path) -> Path:
    return copy_example("multiprocessing", tmp_path / "multiprocessing")


@pytest.fixture(scope="module")
def run(machines: Machines, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    folder = copy_example("multiprocessing", tmp_path_factory.mktemp("run") / "multiprocessing")
    done = finished(folder, *WORDS, **machines.options())
    assert done.process.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_both_nodes_work(run: Launch) -> None:
    """The worker has neither the folder of the run nor FLWR_HOME: its code came through Ray."""
    assert run.history["ray"] == {"address": f"{HEAD}:{PORT}", "nodes": 2, "cpus": 2, "gpus": 0}
    assert run.history["at_once"] == 2
    counts = [entry["nodes"] for entry in run.history["rounds"][1:]]
    assert [sum(count.values()) for count in counts] == [4, 4, 4]
    assert all(count.keys() == {HEAD, WORKER} for count in counts)
    assert f"on 2 nodes of the Ray cluster at {HEAD}:{PORT} (2 cores, 0 GPUs)" in run.stdout.splitlines()[-1]
    assert run.history["command"].startswith(f"RAY_ADDRESS={HEAD}:{PORT} ")


@pytest.mark.slow
def test_the_model_is_that_of_one_machine(run: Launch, folder_of_run: Path, data_dir: Path) -> None:
    alone = finished(folder_of_run, *WORDS, data_dir=data_dir)
    assert alone.history["model_sha256"] == run.history["model_sha256"]
    assert "ray" not in alone.history


@pytest.mark.slow
def test_the_cluster_stays_and_nothing_else(run: Launch, machines: Machines) -> None:
    until(lambda: not machines.left_by(run), 20)
    assert machines.nodes() == [HEAD, WORKER]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_nothing_on_any_node(
    number: signal.Signals, machines: Machines, folder_of_run: Path
) -> None:
    with Launch(folder_of_run, 4, 4, 4, 3, "local-epochs=1000", **machines.options()) as launched:
        launched.wait_until(lambda: len(machines.of_run(launched, "worker")) >= 4)  # host, fork server, actor, child
        launched.process.send_signal(number)
        launched.wait(60)
    until(lambda: not machines.left_by(launched), 30)
    assert machines.nodes() == [HEAD, WORKER]


@pytest.mark.slow
def test_another_version_is_refused(machines: Machines, folder_of_run: Path) -> None:
    machines.start_head(PORT + 1, claimed="2.0.0")
    done = until(lambda: answered(machines, folder_of_run))
    machines.end("head", f"{machines.temporary}/{PORT + 1}")
    assert done.process.returncode == 2
    assert "Version mismatch: The cluster was started with: Ray: 2.0.0 Python: " in done.stderr
    assert f"was started with: Ray: {version('ray')} Python: " in done.stderr
    assert not done.run_folders()


def answered(machines: Machines, folder: Path) -> Launch | None:
    done = finished(folder, 2, 2, 2, 1, **machines.options(PORT + 1))
    return None if "nobody answers" in done.stderr else done


@pytest.mark.slow
def test_a_node_dies_in_a_round(machines: Machines, folder_of_run: Path) -> None:
    """The client that it had fails, by name, and no other: the head's actor does the work of the worker's."""
    mark = machines.shared / "reached"
    hold = f"""    if os.environ.get("FLOWER_EXAMPLE_NODE") == "{WORKER}":
        Path("{mark}").touch()
        __import__("time").sleep(600)
"""
    line = '    return _arrays(net), {"train_loss"'
    edit(folder_of_run / "work.py", (line, hold + line))
    with Launch(folder_of_run, *WORDS, **machines.options()) as launched:
        launched.wait_until(mark.exists)
        machines.end("worker")
        assert launched.wait() == 0, launched.stdout + launched.stderr
    first, *others = (entry["train"] for entry in launched.history["rounds"][1:])
    (failure,) = first["failures"]
    assert first["clients"] == 3
    assert failure["partition-id"] in range(6)
    assert "what played this client has died" in failure["reason"]
    assert [(entry["clients"], entry["failures"]) for entry in others] == [(4, []), (4, [])]
    assert [entry["nodes"] for entry in launched.history["rounds"][1:]] == [{HEAD: 3}, {HEAD: 4}, {HEAD: 4}]


@pytest.mark.slow
def test_a_node_makes_its_data_ready_and_other_data_is_refused(machines: Machines, folder_of_run: Path) -> None:
    machines.end("worker")
    until(lambda: machines.nodes() == [HEAD])
    machines.start_worker(None)
    done = finished(folder_of_run, *WORDS, **machines.options())
    assert done.process.returncode == 1
    said = "the data there is drawn shapes, seeds 1 and 2, and here made by the tests"
    assert done.stderr.splitlines()[0] == f"error: node {WORKER}: {said}"
    data = machines.disk("worker") / "tmp" / "data" / "synthetic" / "meta.json"
    assert json.loads(data.read_text())["name"] == "synthetic"
