"""Adds to Flower's commands what SECURE=1 asks for: encryption, and clients that are known by their keys."""

import os
from pathlib import Path
from typing import Any

KEEP_KEYS = os.environ.get("KEEP_KEYS", "") not in ("", "0")


def keys(run: Any) -> Path:
    """Return the folder of the run's keys: a temporary one, gone when the run has ended, unless KEEP_KEYS=1."""
    if KEEP_KEYS or run.run_dir == Path():  # several machines, which have theirs in the folder that they start in
        return run.run_dir / "keys"
    return getattr(run, "temporary", Path("<temporary folder>")) / "keys"


def superlink_arguments(run: Any) -> list[str]:
    if not run.settings.secure:
        return ["--insecure"]
    certificates = ["--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.crt", "--ssl-keyfile", "server.key"]
    paths = [word if word.startswith("--") else f"{keys(run)}/{word}" for word in certificates]
    return [*paths, "--enable-supernode-auth"]


def supernode_arguments(run: Any, partition_id: int) -> list[str]:
    if not run.settings.secure:
        return ["--insecure"]
    trust = ["--root-certificates", f"{keys(run)}/ca.crt"]
    return [*trust, "--auth-supernode-private-key", f"{keys(run)}/client-{partition_id}"]


def connection(run: Any) -> dict[str, Any]:
    return {"root-certificates": f"{keys(run)}/ca.crt"} if run.settings.secure else {"insecure": True}


def registrations(run: Any) -> dict[str, list[str]]:
    """Tell the SuperLink the public key of each client that it may talk to."""
    clients = range(run.settings.clients if run.settings.secure else 0)
    return {f"register-{i}": ["flwr", "supernode", "register", f"{keys(run)}/client-{i}.pub"] for i in clients}
