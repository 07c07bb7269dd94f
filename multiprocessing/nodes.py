"""Talks to the Ray cluster that RAY_ADDRESS names: describes it, and keeps its nodes ready while a run lasts.

    python nodes.py describe                          # prints the nodes as JSON
    python nodes.py serve DATASET DEVICE FORK FILE    # writes to FILE how it went, and stays

On each node, `serve` makes the data ready and, where FORK is 1, starts the fork server that all clients there share.
When it ends, by whatever signal, Ray ends what it started.
"""

import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import cifar_data
import work
from cifar_data.prepare import prepare
from cluster import HOOK, NODE, RUNTIME_ENV, USUAL_DATA_DIR
from isolation import FORK_SERVER, run_isolated
from rounds import history

SAME = ("flwr", "torch", "numpy")  # packages of the same version everywhere; Ray checks itself and Python
FAREWELL = 3.0  # seconds for the nodes to clean up


def set_up() -> None:
    """Ray calls this in each process that it starts for the run on a node, before anything else."""
    here = ray.get_runtime_context().get_node_id()
    os.environ[NODE] = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here)
    if folder := os.environ.get(USUAL_DATA_DIR):
        os.environ.setdefault("DATA_DIR", folder)


def described(dataset: str) -> dict[str, str]:
    """Make the data ready on this machine; return what must be the same on all of them."""
    found = {"python": platform.python_version(), **{name: version(name).partition("+")[0] for name in SAME}}
    if dataset in cifar_data.DATASETS:
        found["the data"] = prepare(dataset)["source"]
        _, labels = cifar_data.load_split("train", dataset)
        found["the hash of the labels"] = hashlib.sha256(labels.tobytes()).hexdigest()[:16]
    return found


@ray.remote(num_cpus=0)
class Host:
    """What the run has on a node beside the clients."""

    def make_ready(self, dataset: str, device: str, fork: bool) -> dict[str, str]:
        """Make the data ready, start the fork server, and try it; return what `described` does."""
        self.folder, self.server = None, None
        found = described(dataset)
        if fork:
            address = Path(os.environ[FORK_SERVER])
            try:
                address.parent.mkdir(mode=0o700)
            except FileExistsError:
                pass  # another of Ray's nodes on this machine has it
            else:
                self.folder = address.parent
                command = [sys.executable, str(Path("fork_server.py").absolute()), "0", str(address)]
                self.server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            run_isolated(work.try_device, device)
        return found

    def close(self) -> None:
        if self.server:
            self.server.terminate()
            self.server.wait()
            shutil.rmtree(self.folder, ignore_errors=True)


def alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def describe() -> None:
    """Print the nodes. Exits with one line that says what to do."""
    try:
        ray.init(logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        said = " ".join(str(error.__cause__ or error).split())
        if "No node info found" in said or "find any running Ray" in said:
            said = f"Ray isn't running on this machine: `ray start --address={os.environ['RAY_ADDRESS']}` joins it"
        sys.exit(said)
    nodes = []
    for node in alive():
        has = node["Resources"]
        memory = (has.get("memory", 0) + has.get("object_store_memory", 0)) / 2**20
        counts = {"cpus": int(has.get("CPU", 0)), "gpus": int(has.get("GPU", 0))}
        nodes.append({"address": node["NodeManagerAddress"], **counts, "memory": memory})
    print(json.dumps(nodes))


def make_all_ready(dataset: str, device: str, fork: bool, hosts: dict[str, Any]) -> None:
    """Start a host on each node, and wait until all are ready. Exits with the node and the reason where one isn't."""
    here = described(dataset)
    asked = []
    for node in alive():
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        host = hosts[node["NodeID"]] = Host.options(scheduling_strategy=there).remote()
        asked.append((node["NodeManagerAddress"], host.make_ready.remote(dataset, device, fork)))
    for address, answer in asked:
        try:
            found = ray.get(answer)
        except Exception as error:
            said = " ".join(str(getattr(error, "cause", None) or error).split())
            sys.exit(f"node {address}: {said}")
        for what, ours in here.items():
            if found[what] != ours:
                sys.exit(f"node {address}: {what} there is {found[what]}, and here {ours}")


def serve(dataset: str, device: str, fork: str, file: str) -> None:
    """Keep the nodes ready until SIGTERM, for which Ray has a handler that exits."""
    ray.init(runtime_env=json.loads(os.environ[RUNTIME_ENV]), logging_level="ERROR")
    hosts: dict[str, Any] = {}
    try:
        try:
            make_all_ready(dataset, device, fork == "1", hosts)
        except SystemExit as error:
            history.write_whole(Path(file), json.dumps({"error": str(error)}).encode())
            raise
        history.write_whole(Path(file), b"{}")
        signal.pause()
    finally:
        if hosts:
            ray.wait([host.close.remote() for host in hosts.values()], num_returns=len(hosts), timeout=FAREWELL)


if __name__ == "__main__":
    os.environ.pop(HOOK, None)  # which is for Flower's own connection
    {"describe": describe, "serve": serve}[sys.argv[1]](*sys.argv[2:])
