"""The Ray cluster that RAY_ADDRESS names: whether it answers, what nodes it has, and what processes there must be told.

nodes.py and pool.py talk to Ray. This module is imported by all sides, so it needs nothing but Python.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADDRESS, HOOK = "RAY_ADDRESS", "RAY_RUNTIME_ENV_HOOK"  # Ray's own variables
RUNTIME_ENV = "FLOWER_EXAMPLE_RUNTIME_ENV"  # the variable with what `runtime_env` returns, as JSON
NODE = "FLOWER_EXAMPLE_NODE"  # set on each node: its address
USUAL_DATA_DIR = "FLOWER_EXAMPLE_DATA_DIR"  # DATA_DIR for a node that has none of its own
CONNECT, ANSWER = 5.0, 60.0  # seconds for the head to accept a connection, and for the cluster to describe itself


class NoCluster(RuntimeError):
    """No cluster that a run could use; the text says what to do."""


@dataclass(frozen=True)
class Node:
    """One machine of the cluster, as Ray describes it."""

    address: str
    cpus: int
    gpus: int
    memory: float  # MiB that were free when Ray started there


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    address: str
    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> int:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        return sum(node.gpus for node in self.nodes)

    def lacks(self, each: float) -> str | None:
        """Say which node has too little memory for a client, of `each` MiB, on each of its cores; None if none has."""
        for node in self.nodes:
            if node.cpus * each > node.memory:
                room = f"{node.memory / 1024:.1f} GiB of memory, room for {node.memory // each:.0f}"
                advice = "start Ray there with fewer --num-cpus"
                return f"node {node.address} would have {node.cpus} clients at once, and has {room}: {advice}"
        return None

    def record(self) -> dict[str, Any]:
        """Return what the history says of it."""
        return {"address": self.address, "nodes": len(self.nodes), "cpus": self.cpus, "gpus": self.gpus}

    def __str__(self) -> str:
        nodes = f"{len(self.nodes)} node{'s' * (len(self.nodes) != 1)}"
        return f"{nodes} of the Ray cluster at {self.address} ({self.cpus} cores, {self.gpus} GPUs)"


def find(address: str) -> Cluster:
    """Ask the cluster what it has. Raises NoCluster."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise NoCluster(f"RAY_ADDRESS={address}: write HOST:PORT, as in RAY_ADDRESS=192.0.2.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT).close()
    except (OSError, OverflowError) as error:
        advice = f"`ray start --head --port={port}` starts a cluster there"
        raise NoCluster(f"RAY_ADDRESS={address}: nobody answers ({error}); {advice}") from None
    command = [sys.executable, str(Path(__file__).with_name("nodes.py")), "describe"]
    environment = {**os.environ, ADDRESS: address, "RAY_gcs_server_request_timeout_seconds": f"{ANSWER / 3:.0f}"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=ANSWER)
    except subprocess.TimeoutExpired:
        raise NoCluster(f"RAY_ADDRESS={address}: what answers there is no Ray cluster, or a very slow one") from None
    if done.returncode != 0:
        _, _, reason = done.stderr.strip().rpartition("\n")
        raise NoCluster(f"RAY_ADDRESS={address}: {reason}")
    said = next(line for line in done.stdout.splitlines() if line.startswith("[{"))  # Ray may have a say, too
    return Cluster(address, tuple(Node(**node) for node in json.loads(said)))


def runtime_env(folder: Path, environment: Mapping[str, str], names: tuple[str, ...]) -> str:
    """Return, as JSON, what Ray brings to each node: the code in `folder`, and some variables of the run.

    Where the user has named a DATA_DIR for the run, it holds for nodes that were started without one.
    """
    variables = {name: environment[name] for name in names if name in environment}
    if os.environ.get("DATA_DIR"):
        variables[USUAL_DATA_DIR] = environment["DATA_DIR"]
    code = {"working_dir": str(folder), "excludes": ["/runs", "/.venv"]}  # as well as what .gitignore names
    return json.dumps({**code, "env_vars": variables, "worker_process_setup_hook": "nodes.set_up"})
