"""Follows a run until it ends, and ends it where it can't go on: a part has died, or too few clients are left."""

import json
import subprocess
import sys
import time

from launcher import engine, progress, results
from launcher.arguments import Settings
from launcher.processes import Failed, Processes

POLL = 0.1
NEEDED = {"superlink": "SuperLink", "fork-server": "fork server"}


def watch(settings: Settings, processes: Processes, show_bar: progress.Show) -> None:
    """Print a line for each round, until `flwr run` has ended. Raises Failed where the run has not completed."""
    running, run_dir = processes.running, processes.run_dir
    rounds = progress.Rounds(run_dir, settings.config["num-server-rounds"])
    follow = progress.Follower(processes.log("run")) if settings.verbose else None
    lost: list[str] = []
    while running["run"].poll() is None:
        time.sleep(POLL)
        show_bar(rounds.show())
        if follow:
            follow.show()
        for name, said in NEEDED.items():
            if name in running and running[name].poll() is not None:
                raise Failed(f"the {said} ended with status {running[name].returncode}", name)
        note_lost_clients(settings, processes, lost)
    rounds.show()
    if follow:
        follow.show()
    if running["run"].returncode != 0:
        raise Failed("the run could not be started", "run")
    check_outcome(processes)


def note_lost_clients(settings: Settings, processes: Processes, lost: list[str]) -> None:
    """Warn of clients that have ended since, add them to `lost`, and tell the server. Raises Failed at too few."""
    clients = {name: process for name, process in processes.running.items() if name.startswith("client-")}
    for name, process in clients.items():
        if name in lost or process.poll() is None:
            continue
        lost.append(name)
        alive, least = len(clients) - len(lost), settings.min_clients
        said = f"{name} ended with status {process.returncode}; {alive} of {len(clients)} clients are left"
        if alive < least:
            raise Failed(f"{said}, and a round needs {least}", name)
        print(f"WARNING: {said}, which is enough", file=sys.stderr)
        gone = " ".join(lost).replace("client-", "").encode()
        results.write_whole(processes.run_dir / "lost-clients", lambda file, text=gone: file.write(text))


def check_outcome(processes: Processes) -> None:
    """Ask the SuperLink how the run ended, since `flwr run` does not tell."""
    listing = subprocess.run(
        engine.outcome(), env=processes.environment, cwd=processes.run_dir, capture_output=True, text=True
    )
    try:
        run = json.loads(listing.stdout)["runs"][0]
    except (ValueError, LookupError):
        raise Failed(f"the SuperLink does not tell how the run ended: {listing.stdout}{listing.stderr}") from None
    if run["status"] != "finished:completed":
        raise Failed(run.get("status-details") or run["status"], "run")
