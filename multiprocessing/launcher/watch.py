"""Watches a run until it ends, and ends it where it can't go on: a part has died, or too few clients are left."""

import contextlib
import json
import re
import time
import zipfile
from pathlib import Path

from launcher import commands, screen
from launcher.arguments import Settings
from launcher.processes import Failed, Processes
from launcher.screen import say
from rounds import history

POLL = 0.1
OUTCOME_TIMEOUT = 60.0  # seconds for the SuperLink to tell how the run ended


class Watched:
    """The half of a `Run` that looks on."""

    settings: Settings
    run_dir: Path
    processes: Processes | None = None

    def __init__(self) -> None:
        self.needed = {"superlink": "SuperLink"}  # processes without which the run can't go on, and what to call them
        self.partition_of: dict[int, int] = {}  # by node id
        self.lost: set[int] = set()  # partition ids of clients whose process has ended
        self.slept = 0.0  # the longest time between two looks, in seconds
        self.position = 0  # in the run's log, up to which -v has printed it

    def watch(self) -> None:
        """Print a line for each round until `flwr run` has ended. Raises Failed where the run has not completed."""
        printer, looked = screen.Printer(self.run_dir, self.settings.rounds), time.time()
        with screen.bar(self.run_dir, self.settings.rounds) as show_bar:
            while (status := self.processes.status("run")) is None:
                time.sleep(POLL)
                self.slept, looked = max(self.slept, time.time() - looked - POLL), time.time()
                show_bar(printer.show())
                self.follow()
                for name, called in self.needed.items():
                    if (ended := self.processes.status(name)) is not None:
                        raise Failed(f"the {called} ended with status {ended}", name)
                self.note_clients()
            printer.show()
            self.follow()
        if status != 0:
            raise Failed(f"`flwr run` ended with status {status}", "run")
        if self.drop_part_of_model():
            raise Failed("model.pt was cut off, as a full disk does it", "run")
        self.processes.start("outcome", commands.outcome())
        self.processes.wait("outcome", OUTCOME_TIMEOUT)
        said = self.processes.log("outcome").read_text()
        try:
            run = json.loads(said)["runs"][0]
        except (ValueError, LookupError):
            raise Failed(f"the SuperLink does not tell how the run ended: {said}", "superlink") from None
        if run["status"] != "finished:completed":
            raise Failed(run.get("status-details") or run["status"], "run")

    def drop_part_of_model(self) -> bool:
        """Remove a model.pt that was cut off, by a signal or a full disk; return whether it was."""
        model = self.run_dir / "model.pt"
        with contextlib.suppress(FileNotFoundError), model.open("rb") as file:
            if file.read(4) in (b"", b"PK\3\4") and not zipfile.is_zipfile(file):  # nothing, or a zip without its end
                model.unlink()
                return True
        return False

    def follow(self) -> None:
        """With -v, print what has come to the run's log."""
        if self.settings.verbose:
            with contextlib.suppress(FileNotFoundError), self.processes.log("run").open(errors="replace") as log:
                log.seek(self.position)
                if text := log.read().rstrip("\n"):
                    say(text)
                self.position = log.tell()

    def note_clients(self) -> None:
        """Tell the server which node is which client, and who has died. Raises Failed where too few are left."""
        before = len(self.partition_of), len(self.lost)
        for i in range(self.settings.clients if self.settings.engine == "deployment" else 0):
            if i not in self.partition_of.values() and i not in self.lost:
                with contextlib.suppress(OSError):
                    if said := re.search(r"SuperNode ID: (\d+)", self.processes.log(f"client-{i}").read_text()):
                        self.partition_of[int(said[1])] = i
            for name in (f"client-{i}", f"client-{i}-superexec"):
                if i not in self.lost and (status := self.processes.status(name)) is not None:
                    self.lost.add(i)
                    alive, least = self.settings.clients - len(self.lost), self.settings.min_clients
                    said = f"{name} ended with status {status}; {alive} of {self.settings.clients} clients are left"
                    if alive < least:
                        raise Failed(f"{said}, and a round needs {least}", name)
                    say(f"WARNING: {said}, which is enough", error=True)
        if before != (len(self.partition_of), len(self.lost)):
            history.tell_clients(self.run_dir, self.partition_of, self.lost)
