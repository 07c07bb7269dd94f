"""Puts together the commands of a run in each of Flower's two engines, with their files and environment.

Of a Run, only `settings`, `extension` and `run_dir` are used here.
"""

import contextlib
import os
import socket
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import cifar_data
from launcher.arguments import Settings
from launcher.checks import cores
from launcher.warm import POLL
from rounds import history

HOST = "127.0.0.1"
LOOKS = 40  # for messages per second, by all clients together; more would cost more than they save
LOCAL = (39091, 39093)  # ports of the SuperLink that `flwr run` starts by itself: it must not find ours there
# What would point Ray or Flower outside this run.
STRANGE = {"RAY_ADDRESS", "RAY_NAMESPACE", "RAY_RUNTIME_ENV", "RAY_JOB_CONFIG_JSON_ENV_VAR", "FLWR_APP_DIR"}


def ports(settings: Settings) -> list[int]:
    """Return ports that nobody listens on: the SuperLink's, which PORT may set, and one for each SuperNode."""
    count = 1 + (settings.clients if settings.engine == "deployment" else 0)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count + len(LOCAL))]
        found = [one.getsockname()[1] for one in sockets]
    first, *others = [port for port in found if port not in LOCAL][:count]
    return [settings.port or first, *others]


def answers(port: int) -> bool:
    """Whether somebody listens on a port."""
    with socket.socket() as one:
        one.settimeout(1)
        return one.connect_ex((HOST, port)) == 0


def in_order(run: Any, port: int, client_ports: list[int]) -> dict[str, list[str]]:
    """Return all commands of a run, by name, as they are started: the SuperLink, the clients, the run."""
    clients = {f"client-{i}": supernode(run, i, port, own_port) for i, own_port in enumerate(client_ports)}
    return {"superlink": superlink(run, port), **clients, "run": flwr_run(run)}


def superlink(run: Any, port: int, host: str = HOST) -> list[str]:
    """The server's side: it passes messages on, and starts server.py (by a process of its own, `flower-superexec`)."""
    simulation = ["--simulation"] if run.settings.engine == "simulation" else []
    address = ["--host", host, "--port", str(port), "--disable-runtime-dependency-installation"]
    return ["flower-superlink", *run.extension.superlink_arguments(run), *address, *simulation]


def supernode(run: Any, partition_id: int, port: int, own_port: int, host: str = HOST) -> list[str]:
    """A client's side: it asks the SuperLink for messages, and starts client.py for each, in the same way."""
    node = f"partition-id={partition_id} num-partitions={run.settings.clients}"
    address = ["--superlink", f"{host}:{port}", "--port", str(own_port), "--node-config", node]
    return ["flower-supernode", *run.extension.supernode_arguments(run, partition_id), *address]


def at_once(settings: Settings) -> int:
    """How many clients of a simulation work at once, each in a Ray actor: one per core."""
    return max(1, min(settings.sampled, cores()))


def flwr_run(run: Any) -> list[str]:
    """Sends the app to the SuperLink, and shows what server.py prints."""
    settings, config = run.settings, f"{run.run_dir}/run-config.toml"
    command = ["flwr", "run", str(settings.folder), "local", "--stream", "--run-config", config]
    if settings.engine == "simulation":
        pairs = {"num-supernodes": settings.clients, "client-resources-num-cpus": 1}
        pairs = {**pairs, "init-args-num-cpus": at_once(settings), **run.extension.federation(run)}
        said = [f"{key}={value}" for key, value in pairs.items() if value is not None]
        command += ["--federation-config", " ".join(said)]
    return command


def files(run: Any, port: int) -> dict[Path, dict[str, Any]]:
    """What Flower reads, as tables for TOML: the run config, and where the SuperLink is."""
    local = {"address": f"{HOST}:{port}", **run.extension.connection(run)}
    return {
        run.run_dir / "run-config.toml": run.settings.config,
        run.run_dir / "flwr-home" / "config.toml": {"superlink": {"default": "local", "local": local}},
    }


def set_environment(settings: Settings, run_dir: Path, temporary: Path) -> MutableMapping[str, str]:
    """Set what all processes of a run find in their environment, and return it."""
    scripts = Path(sys.executable).parent  # Flower starts its parts by bare name
    no_proxy = ",".join(filter(None, [os.environ.get("NO_PROXY"), os.environ.get("no_proxy"), "localhost", HOST]))
    poll = max(0.25, settings.clients / LOOKS if settings.engine == "deployment" else 0)
    for name in STRANGE & os.environ.keys():
        del os.environ[name]
    os.environ |= {
        "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        history.RUN_FOLDER: str(run_dir),
        "FLWR_HOME": str(run_dir / "flwr-home"),
        "DATA_DIR": str(cifar_data.data_dir()),
        "DATASET": settings.dataset,
        "RAY_TMPDIR": str(temporary),  # Ray's sockets need a short path
        POLL: str(poll),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(min(poll, 60)),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        **dict.fromkeys(("NO_PROXY", "no_proxy"), no_proxy),
        "PYTHONIOENCODING": "utf-8",  # Flower prints characters that other encodings lack
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "",  # if set, a script can't import what is beside it
    }
    return os.environ
