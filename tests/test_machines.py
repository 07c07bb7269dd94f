"""Several machines: network namespaces, each a host of its own, on which what `--dry-run` prints is typed."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from runs import copy_example, environment
from test_commands import ask

SERVER = "192.0.2.1"  # of a network that is for examples (RFC 5737)
CLIENTS = 3
PATIENCE = 900.0  # seconds, of which a busy machine may need many
SEED = 1  # with it, client 1 is among the two of three that train first


def blocks(printed: str) -> dict[str, str]:
    """What is to be pasted, by the first words of the comment over it."""
    parts = printed.split("# --- On several machines")[1].split("\n# ")[1:]
    return {part.splitlines()[0]: "\n".join(part.splitlines()[1:]).replace("SERVER", SERVER) for part in parts}


class Network:
    """A server and clients, each in a network namespace, in a folder and with processes of its own."""

    def __init__(self, root: Path, data_dir: Path) -> None:
        self.root = root
        self.environment = environment(data_dir)
        self.environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.hosts = {name: f"fl{os.getpid()}-{name}" for name in ("server", *map(str, range(CLIENTS)))}
        self.folders = {name: copy_example("advanced_example", root / name) for name in self.hosts}

    def build(self) -> None:
        for name in self.hosts.values():
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        server = self.hosts["server"]
        ip("-n", server, "link", "add", "bridge0", "type", "bridge")
        ip("-n", server, "address", "add", f"{SERVER}/24", "dev", "bridge0")
        ip("-n", server, "link", "set", "bridge0", "up")
        for i in range(CLIENTS):
            host = self.hosts[str(i)]
            ip("-n", server, "link", "add", f"to{i}", "type", "veth", "peer", "name", "eth0", "netns", host)
            ip("-n", server, "link", "set", f"to{i}", "master", "bridge0", "up")
            ip("-n", host, "address", "add", f"192.0.2.{i + 2}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "eth0", "up")

    def remove(self) -> None:
        for name in self.hosts.values():
            listing = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in listing.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)  # may not have been made

    def type(self, host: str, block: str, log: str = "log") -> subprocess.Popen:
        """Start a block in a shell on a host, in its copy of the folder."""
        folder = self.folders[host]
        shell = f'export DATASET=synthetic FLWR_HOME="$PWD/flwr-home"\nset -e\n{block}'
        with (folder / log).open("wb") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.hosts[host], "bash", "-c", shell],
                cwd=folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )

    def done(self, host: str, block: str) -> str:
        """Type a block, wait until it has ended well, and return what it said."""
        assert self.type(host, block, "done").wait(PATIENCE) == 0, self.log(host, "done")
        return self.log(host, "done")

    def log(self, host: str, name: str = "log") -> str:
        return (self.folders[host] / name).read_text()

    @contextlib.contextmanager
    def cut(self, client: int) -> Iterator[None]:
        """Without the link to a client's host."""
        ip("-n", self.hosts["server"], "link", "set", f"to{client}", "down")
        yield
        ip("-n", self.hosts["server"], "link", "set", f"to{client}", "up")

    def run(self, **config: Any) -> subprocess.Popen:
        """Start a run, with another config than the one that was printed."""
        file = self.folders["server"] / "run-config.toml"
        lines = dict(line.split(" = ") for line in file.read_text().splitlines())
        lines |= {key.replace("_", "-"): json.dumps(value) for key, value in config.items()}
        file.write_text("".join(f"{key} = {value}\n" for key, value in lines.items()))
        return self.type("server", self.blocks["3"], "run")

    def outcome(self) -> tuple[str, dict[str, Any]]:
        """How the newest run ended, and its history."""
        runs = json.loads(self.done("server", "flwr ls --format json"))["runs"]
        return runs[0]["status"], json.loads((self.folders["server"] / "runs/latest/history.json").read_text())


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def until(condition: Callable[[], Any], timeout: float = PATIENCE) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.1)


@pytest.mark.parametrize("secure", ["0", "1"])
def test_what_is_printed_is_for_any_machine(secure: str) -> None:
    status, printed, said = ask("advanced_example", "3", "seed=7", "--dry-run", SECURE=secure, DATASET="auto")
    assert (status, said) == (0, "")
    text = printed.partition("# --- On several machines")[2]
    assert str(ROOT) not in text
    assert not re.search(r"<[a-z]|<UTC", text)  # nothing to fill in
    assert "DATASET=cifar10" in text  # each by itself could find another data set
    assert "seed = 7" in text
    assert text.count("flwr supernode register keys/client-") == 3 * int(secure)
    assert ("--insecure" in text) == (secure == "0")
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Iterator[Network]:
    """The server and the clients are there, TLS is on, and only registered clients get in."""
    network = Network(tmp_path_factory.mktemp("machines"), data_dir)
    try:
        try:
            network.build()
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"may not make network namespaces here: {error}")
        words = ["advanced_example", CLIENTS, 3, 3, 2, "toy=true", "--dry-run"]
        status, printed, said = ask(*map(str, words), SECURE="1", DATASET="synthetic")
        assert (status, said) == (0, "")
        paste = blocks(printed)
        network.blocks = {title.partition(".")[0]: block for title, block in paste.items()}  # by their numbers
        for title, block in paste.items():
            if title.startswith("On each machine"):
                for host in network.hosts:
                    assert "synthetic" in network.done(host, block)
            elif title.startswith("On the server"):
                network.done("server", block)
        server = network.folders["server"]
        assert (server / "keys/ca.crt").exists()
        network.type("server", network.blocks["1"])
        until(lambda: "Uvicorn running" in network.log("server"))
        network.done("server", next(block for title, block in paste.items() if title.startswith("Whom")))
        for i in range(CLIENTS):
            keys = network.folders[str(i)] / "keys"
            keys.mkdir()
            for name in ("ca.crt", f"client-{i}"):
                (keys / name).write_bytes((server / "keys" / name).read_bytes())
            client = network.blocks["2"].replace("client-0", f"client-{i}").replace("-id=0", f"-id={i}")
            network.type(str(i), client)
        yield network
    finally:
        network.remove()


def in_training(network: Network) -> None:
    """Let client 1 wait in its first training until its folder has a file `go`, and touch a file `reached` there."""
    folder = network.folders["1"]
    client = network.folders["server"] / "client.py"  # what is sent to the clients
    line = "    # 2. Plain PyTorch.\n"
    wait = f"""    hold = __import__("pathlib").Path({str(folder)!r})
    if context.node_config["partition-id"] == 1 and not (hold / "go").exists():
        (hold / "reached").touch()
        while not (hold / "go").exists():
            __import__("time").sleep(0.05)
"""
    text = client.read_text()
    if wait not in text:
        assert text.count(line) == 1
        client.write_text(text.replace(line, wait + line))
    for name in ("go", "reached"):
        (folder / name).unlink(missing_ok=True)


@pytest.mark.slow
def test_a_run_completes(network: Network) -> None:
    run = network.run(min_clients=3, sampled_clients=3)
    assert run.wait(PATIENCE) == 0, network.log("server", "run")
    status, history = network.outcome()
    assert status == "finished:completed", network.log("server", "run")
    assert [row["partition-id"] for row in history["rounds"][-1]["train"]["by_client"]] == [0, 1, 2]
    assert (history["status"], history["example"]) == ("completed", "advanced-example")


@pytest.mark.slow
def test_a_link_is_cut_in_a_round_and_comes_back(network: Network) -> None:
    """The client finishes its training without a link, and its reply gets there once there is one."""
    in_training(network)
    folder = network.folders["1"]
    run = network.run(min_clients=3, sampled_clients=3)
    until((folder / "reached").exists)
    before = len(network.log("1"))
    with network.cut(1):
        (folder / "go").touch()
        until(lambda: "Sending: train message" in network.log("1")[before:])
    assert run.wait(PATIENCE) == 0, network.log("server", "run")
    status, history = network.outcome()
    assert status == "finished:completed", network.log("server", "run")
    assert [entry["train"]["clients"] for entry in history["rounds"][1:]] == [3, 3]
    assert [entry["train"]["failures"] for entry in history["rounds"][1:]] == [[], []]


@pytest.mark.slow
def test_a_host_never_comes_back(network: Network) -> None:
    """Its round goes on without it when its time is up, and later rounds do with those that are left."""
    in_training(network)
    run = network.run(min_clients=2, sampled_clients=2, num_server_rounds=4, round_timeout=90, seed=SEED)
    until((network.folders["1"] / "reached").exists)
    with network.cut(1):
        assert run.wait(PATIENCE) == 0, network.log("server", "run")
        status, history = network.outcome()
    assert status == "finished:completed", network.log("server", "run")
    trained = [entry["train"] for entry in history["rounds"][1:]]
    assert (trained[0]["clients"], [failure["partition-id"] for failure in trained[0]["failures"]]) == (1, [1])
    assert (trained[-1]["clients"], trained[-1]["failures"]) == (2, [])


@pytest.mark.slow
def test_who_reaches_the_port_has_control(network: Network) -> None:
    """Not what one would wish, but so it is, and the README says so: a client's host may register a key, for one."""
    server, client = network.folders["server"], network.folders["0"]
    config = (server / "flwr-home/config.toml").read_text().replace(str(server), str(client))
    (client / "flwr-home/config.toml").write_text(config)
    network.done("0", "python3 security.py other 1 127.0.0.1")
    network.done("0", "flwr supernode register other/client-0.pub")
    assert "runs" in json.loads(network.done("0", "flwr ls --format json"))
