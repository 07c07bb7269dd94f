"""Watches a run until it ends, and ends it where it can't go on: a part has died, or too few clients are left."""

import contextlib
import json
import re
import time
from typing import Any

from launcher.processes import Failed
from launcher.screen import Printer, say
from rounds import history

SLEPT = 20.0  # seconds; a longer gap between two looks means that the machine has slept
OUTCOME_TIMEOUT = 60.0  # seconds for the SuperLink to tell how the run ended


def watch(run: Any) -> None:
    """Print a line for each round until `flwr run` has ended. Raises Failed where the run has not completed."""
    processes, clients = run.processes, Clients(run)
    printer = Printer(run.run_dir, run.settings.rounds)
    status = None
    while status is None:
        looked = time.time()
        processes.pause(0.1)
        if (slept := time.time() - looked) > SLEPT:
            say(f"The machine was asleep for {slept:.0f} s; Flower gives a run up after a minute.", error=True)
        status = processes.statuses.get("run")
        if ended := sorted(run.needed & processes.statuses.keys()):
            raise Failed(f"{ended[0]} ended with status {processes.statuses[ended[0]]}", ended[0])
        printer.show()
        if not run.settings.verbose:
            printer.show_progress()
        clients.look()
    if status != 0:
        raise Failed(f"`flwr run` ended with status {status}", "run")
    processes.start(
        "outcome", ["flwr", "ls", "local", "--format", "json"]
    )  # `flwr run` exits with 0, whatever happened
    processes.wait("outcome", OUTCOME_TIMEOUT)
    said = processes.log("outcome").read_text(errors="replace")
    try:
        outcome = json.loads(said)["runs"][-1]  # the newest come first, and this SuperLink was made for the oldest
    except (ValueError, LookupError):
        raise Failed(f"the SuperLink does not tell how the run ended: {said}", "superlink") from None
    if outcome["status"] != "finished:completed":
        raise Failed(outcome.get("status-details") or outcome["status"], "run")


class Clients:
    """Which node is which client, and who has died, which the server would only notice a minute later."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.partition_of: dict[int, int] = {}  # by node id
        self.living = set(range(run.settings.clients if run.settings.engine == "deployment" else 0))
        self.lost: set[int] = set()

    def look(self) -> None:
        """Tell the server what is new. Raises Failed where too few clients are left."""
        settings, processes = self.run.settings, self.run.processes
        before = len(self.partition_of), len(self.lost)
        for i in self.living - set(self.partition_of.values()):
            with contextlib.suppress(OSError):
                if said := re.search(r"SuperNode ID: (\d+)", processes.log(f"client-{i}").read_text(errors="replace")):
                    self.partition_of[int(said[1])] = i
        for i in sorted(self.living):
            if ended := sorted({f"client-{i}", f"client-{i}-superexec"} & processes.statuses.keys()):
                self.living.discard(i)
                self.lost.add(i)
                left = f"{len(self.living)} of {settings.clients} clients are left"
                said = f"{ended[0]} ended with status {processes.statuses[ended[0]]}; {left}"
                if len(self.living) < settings.min_clients:
                    raise Failed(f"{said}, and a round needs {settings.min_clients}", ended[0])
                say(f"WARNING: {said}, which is enough", error=True)
        if before != (len(self.partition_of), len(self.lost)):
            history.tell_clients(self.run.run_dir, self.partition_of, self.lost)
