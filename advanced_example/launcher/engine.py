"""The commands that make up a run, for each of Flower's two engines, and the files and environment that they need."""

import json
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher import DATASETS, data_dir
from launcher.arguments import Settings

HOST = "127.0.0.1"
TASK_POLL = "0.25"  # seconds between two looks of Flower for work; 0.05 costs more than it saves


def ports(settings: Settings) -> list[int]:
    """Ports that nobody listens on: the SuperLink's, which PORT may set, and one for each SuperNode."""
    sockets = [socket.socket() for _ in range(1 + (settings.clients if settings.engine == "deployment" else 0))]
    try:
        for one in sockets:
            one.bind((HOST, 0))
        first, *others = [one.getsockname()[1] for one in sockets]
        return [settings.port or first, *others]
    finally:
        for one in sockets:
            one.close()


def answers(port: int) -> bool:
    """Whether somebody listens on a port."""
    with socket.socket() as one:
        one.settimeout(1)
        return one.connect_ex((HOST, port)) == 0


def fork_server(settings: Settings, environment: Mapping[str, str]) -> list[str] | None:
    """What clients' children are forked from, in the example that has them, where they are asked for."""
    script = settings.folder / "fork_server.py"
    wanted = script.is_file() and settings.config.get("isolation")
    return [sys.executable, str(script), environment["FORK_SERVER"]] if wanted else None


def superlink(settings: Settings, run_dir: Path, port: int, host: str = HOST) -> list[str]:
    """The server's side: it passes messages on, and starts server.py."""
    keys = run_dir / "keys"
    security = ["--insecure"]
    if settings.secure:
        security = ["--ssl-ca-certfile", f"{keys}/ca.crt", "--ssl-certfile", f"{keys}/server.crt"]
        security += ["--ssl-keyfile", f"{keys}/server.key", "--enable-supernode-auth"]
    simulation = ["--simulation"] if settings.engine == "simulation" else []
    address = ["--host", host, "--port", str(port)]
    return ["flower-superlink", *security, *address, "--disable-runtime-dependency-installation", *simulation]


def registrations(settings: Settings, run_dir: Path) -> dict[str, list[str]]:
    """Tells the SuperLink the public key of each client that it may talk to."""
    clients = range(settings.clients if settings.secure else 0)
    return {f"register-{i}": ["flwr", "supernode", "register", str(run_dir / f"keys/client-{i}.pub")] for i in clients}


def supernodes(
    settings: Settings, run_dir: Path, port: int, ports: list[int], host: str = HOST
) -> dict[str, list[str]]:
    """A client's side each: it asks the SuperLink for messages, and starts client.py for each; none in a simulation."""
    keys = run_dir / "keys"
    commands = {}
    for i, own_port in enumerate(ports):
        security = ["--insecure"]
        if settings.secure:
            security = ["--root-certificates", f"{keys}/ca.crt", "--auth-supernode-private-key", f"{keys}/client-{i}"]
        address = ["--superlink", f"{host}:{port}", "--port", str(own_port)]
        node = ["--node-config", f"partition-id={i} num-partitions={settings.clients}"]
        commands[f"client-{i}"] = ["flower-supernode", *security, *address, *node]
    return commands


def at_once(settings: Settings) -> int:
    """How many clients of a simulation work at once, each in a Ray actor: one a core, and as the GPU has room for."""
    return max(1, min(settings.sampled, os.cpu_count() or 1, settings.gpu_slots or settings.sampled))


def run(settings: Settings, run_dir: Path) -> list[str]:
    """Sends the app to the SuperLink, and shows what server.py prints."""
    config = str(run_dir / "run-config.toml")
    command = ["flwr", "run", str(settings.folder), "local", "--stream", "--run-config", config]
    if settings.engine == "simulation":
        federation = f"num-supernodes={settings.clients} client-resources-num-cpus=1"
        federation += f" init-args-num-cpus={at_once(settings)}"
        if settings.gpu_slots and shutil.which("nvidia-smi"):  # a bit less than its share: Flower rounds what fits down
            federation += f" client-resources-num-gpus={int(9999 / settings.gpu_slots) / 10000}"
        command += ["--federation-config", federation]
    return command


def outcome() -> list[str]:
    """Tells how the run ended; `flwr run` itself exits with 0 whatever happened."""
    return ["flwr", "ls", "local", "--format", "json"]


def files(settings: Settings, run_dir: Path, port: int) -> dict[Path, str]:
    """What Flower reads: the run config, and where the SuperLink is."""
    trust = {"root-certificates": f"{run_dir}/keys/ca.crt"} if settings.secure else {"insecure": True}
    connection = toml({"address": f"{HOST}:{port}", **trust})
    return {
        run_dir / "run-config.toml": toml(settings.config),
        run_dir / "flwr-home/config.toml": f'[superlink]\ndefault = "local"\n\n[superlink.local]\n{connection}',
    }


def toml(table: dict[str, Any]) -> str:
    """Strings, numbers and booleans are written in TOML as in JSON, but that TOML wants DEL escaped."""
    text = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in table.items())
    return text.replace("\x7f", "\\u007f")


def environment(settings: Settings, run_dir: Path, scratch: Path) -> dict[str, str]:
    """What all processes of a run find in their environment."""
    scripts = Path(sys.executable).parent  # Flower starts its parts by bare name
    no_proxy = ",".join(filter(None, [os.environ.get("NO_PROXY"), os.environ.get("no_proxy"), "localhost", HOST]))
    return {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "FLWR_HOME": str(run_dir / "flwr-home"),
        "DATA_DIR": str(data_dir()),
        "DATASET": settings.dataset,
        "RAY_TMPDIR": str(scratch),  # not in the run's folder: its sockets need a short path
        "FORK_SERVER": str(scratch / "fork-server"),  # of multiprocessing/fork_server.py
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": TASK_POLL,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # One thread a client: several processes with a thread for each core slow one another down four times, and a
        # sum taken by another number of threads is not the same to the last bit.
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "PYTHONUNBUFFERED": "1",
    }


def dry_run(settings: Settings) -> int:
    """Print what a run would start and write."""
    run_dir = settings.run_dir or settings.folder / "runs" / "<UTC time>-<pid>"
    port, *client_ports = ports(settings)
    for path, content in files(settings, run_dir, port).items():
        print(f"# {path}\n{content}")
    if settings.dataset in DATASETS:
        print(f"# Where the data is not ready in {data_dir()}:")
        print(f"+ {shlex.join([sys.executable, str(settings.folder / 'cifar_utils.py'), settings.dataset])}")
    clients = {**registrations(settings, run_dir), **supernodes(settings, run_dir, port, client_ports)}
    for command in [superlink(settings, run_dir, port), *clients.values(), run(settings, run_dir)]:
        print(f"+ {shlex.join(command)}")
    if settings.engine == "deployment":
        from launcher.machines import commands  # which builds on this module

        print(f"\n{commands(settings)}", end="")
    return 0
