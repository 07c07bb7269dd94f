"""Runs an example once: makes the data ready, starts server and clients, watches them, and says how it ended."""

import contextlib
import json
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

import tomli_w

import cifar_data
from launcher import checks, commands, ending
from launcher.arguments import Settings
from launcher.extension import Extension
from launcher.processes import Failed, Processes, Stopped, heed, ignore, late
from launcher.screen import STAND_IN, say
from launcher.watch import Watched
from rounds import history

START_TIMEOUT = 60.0  # seconds for the SuperLink to answer
POLL = 0.1


class Run(Watched):
    """One run, from the data to the summary line."""

    def __init__(self, settings: Settings, extension: Extension) -> None:
        super().__init__()
        self.settings, self.extension = settings, extension
        if warning := checks.check(settings):
            say(f"WARNING: {warning}", error=True)
        self.run_dir = run_dir = settings.run_dir or history.make_run_folder(settings.folder / "runs")
        self.lock = settings.lock if settings.lock is not None else history.claim(run_dir)
        asked = {"clients": settings.clients, "min_clients": settings.min_clients, "sampled": settings.sampled}
        begun = history.load(run_dir) if settings.run_dir else {"rounds": []}
        for key in ("reason", "log"):
            begun.pop(key, None)
        self.history: history.History = {
            **{"schema": 1, "example": settings.example, "engine": settings.engine, "dataset": settings.dataset},
            **asked,
            **({"secure": True} if settings.secure else {}),
            **begun,
            **{"config": settings.config, "status": "running", "started": round(time.time(), 2)},
        }

    def go(self) -> int:
        """Return the exit status. However the run ends, no process is left, and the history says how it ended."""
        began = time.monotonic()
        outcome, code, failure = {"status": "completed"}, 0, None
        try:
            try:
                self.temporary = Path(tempfile.mkdtemp(prefix="fl-", dir=checks.temporary_place()))
                self.environment = commands.environment(self.settings, self.run_dir, self.temporary)
                with late():  # or nobody would know what to end
                    self.processes = Processes(self.run_dir, self.temporary, self.warm(), self.lock, self.environment)
                self.prepare()
                self.start()
                self.watch()
            finally:
                heed(ignore)  # what follows takes seconds, and must be whole
        except Stopped as stopped:
            name = signal.Signals(stopped.args[0]).name
            code, outcome = 128 + stopped.args[0], {"status": "stopped", "reason": name}
            say(f"\n{name}: stopping", error=True)
        except (Exception, SystemExit) as error:
            code, failure = 1, error
            outcome = {"status": "failed", "reason": str(error) or type(error).__name__}
            if getattr(error, "log", None):
                outcome["log"] = error.log
        if self.processes:
            self.processes.stop()
        self.drop_part_of_model()
        with contextlib.suppress(OSError, ValueError):  # the server has written the rounds into it
            self.history = history.load(self.run_dir)
        self.history = {**self.history, **outcome, "seconds": round(time.monotonic() - began, 1)}
        try:
            history.save(self.run_dir, self.history)
        except OSError as error:
            say(f"WARNING: history.json could not be written: {error}", error=True)
        if failure:
            ending.explain(self, failure)
        elif code == 0:
            say(ending.summary(self.history, self.run_dir))
        ending.report(self)
        return code

    def warm(self) -> str | None:
        """Return what the starter imports before it forks; None: nothing, each process is a fresh Python."""
        return {"deployment": "apps", "simulation": "flower"}[self.settings.engine] if self.settings.warm else None

    # --- The steps ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the data ready before any client starts, so that they don't all download at once."""
        name, folder = self.settings.dataset, self.settings.folder
        if name in cifar_data.DATASETS:
            data = cifar_data.find(name)
            if not data:
                found = self.run_dir / "data.json"
                command = [sys.executable, str(folder / "cifar_data" / "prepare.py"), name, str(found)]
                self.command("data", command, quiet=False)
                if self.processes.wait("data") != 0:
                    raise Failed("the data could not be made ready")
                data = json.loads(found.read_text())
            examples, _ = (len(cifar_data.load_split(split, data["name"])[1]) for split in ("train", "test"))
            self.history.update(dataset=data["name"], dataset_source=data["source"], examples=examples)
            self.environment["DATASET"] = data["name"]
            say(f"Data: {STAND_IN if data['name'] == 'synthetic' else data['name']}, from {data['source']}")
        self.history["command"] = self.settings.command
        history.save(self.run_dir, self.history)
        self.extension.prepare(self)

    def start(self) -> None:
        """Start the SuperLink, wait until it answers, then start the clients and the run."""
        settings = self.settings
        port, *client_ports = commands.ports(settings)
        for path, table in commands.files(self, port).items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(tomli_w.dumps(table), encoding="utf-8")
        self.command("superlink", commands.superlink(self, port))
        deadline = time.monotonic() + START_TIMEOUT
        while not commands.answers(port):
            if (status := self.processes.status("superlink")) is not None:
                raise Failed(f"the SuperLink ended with status {status} before it answered", "superlink")
            if time.monotonic() > deadline:
                raise Failed(f"the SuperLink did not answer within {START_TIMEOUT:.0f} s", "superlink")
            time.sleep(POLL)
        self.extension.after_superlink(self)
        if settings.warm:
            self.needed["server-superexec"] = "server's superexec"
            self.command("server-superexec", commands.superexec(self, None, port))
        if client_ports:
            history.tell_clients(self.run_dir, {}, set())  # from now on, the server can wait to be told who is who
        for i, own_port in enumerate(client_ports):
            self.command(f"client-{i}", commands.supernode(self, i, port, own_port))
            if settings.warm:
                self.command(f"client-{i}-superexec", commands.superexec(self, i, own_port))
        self.command("run", commands.flwr_run(self))

    def command(self, name: str, command: list[str], quiet: bool = True) -> None:
        """Print a command and start it; say only once what a client's superexec and a hundred clients look like."""
        shown = shlex.join(command).replace(f"{self.run_dir}/", "").replace(f"{self.settings.folder}", ".")
        if not name.startswith("client-") or name == "client-0":
            say(f"+ {shown}")
        elif name == "client-1":
            say(f"  (and so on, up to client {self.settings.clients - 1})")
        self.processes.start(name, command, quiet)
