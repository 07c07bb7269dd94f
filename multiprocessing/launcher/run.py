"""Runs an example once: makes the data ready, starts server and clients, watches them, and says how it ended."""

import os
import shlex
import shutil
import signal
import sys
import time

import tomli_w

import cifar_data
from launcher import commands, ending, session
from launcher.arguments import Settings
from launcher.extension import Extension
from launcher.processes import GUARD_DIED, SIGNALS, Failed, Processes, Stopped, heed, ignore
from launcher.screen import STAND_IN, say
from launcher.warm import Warm
from launcher.watch import watch
from rounds import history

ONE_START_S = ("reason", "log", "startup_seconds", "accuracy", "model_sha256")  # keys of the history
KILLED = "the launcher was killed"
START_TIMEOUT = 60.0  # seconds for the SuperLink to answer


class Run:
    """One run, from the data to the summary line; what the functions of an extension are given."""

    def __init__(self, settings: Settings, extension: Extension) -> None:
        self.settings, self.extension = settings, extension
        self.run_dir = settings.run_dir or settings.folder / "runs" / "<UTC time>-<pid>"
        self.needed = {"superlink", "superlink-superexec"}  # names of the processes that must live to the end

    def show(self) -> int:
        """Print what `work` would start and write."""
        port, *client_ports = commands.ports(self.settings)
        for path, table in commands.files(self, port).items():
            say(f"# {path}\n{tomli_w.dumps(table)}")
        if self.settings.dataset in cifar_data.DATASETS:
            say(f"# If the data is not ready in {cifar_data.data_dir()}:\n+ {shlex.join(self.data_command())}")
        for command in commands.in_order(self, port, client_ports).values():
            say(f"+ {shlex.join(command)}")
        self.extension.dry_run(self)
        return 0

    def work(self) -> int:
        """Do all of it, in the process that leads the run's session, and return the exit status."""
        began = time.monotonic()
        outcome, code, failure = {"status": "completed"}, 0, None
        try:
            try:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                self.environment = commands.set_environment(self.settings, self.run_dir, self.temporary)
                self.processes = Warm(self.run_dir, self.temporary) if self.settings.warm else Processes(self.run_dir)
                self.prepare()
                self.start()
                watch(self)
            finally:
                heed(ignore)  # what follows takes seconds, and must be whole
        except Stopped as stopped:
            number = stopped.args[0]
            code, reason = 128 + number, KILLED if number == GUARD_DIED else signal.Signals(number).name
            outcome = {"status": "stopped", "reason": reason}
            say(f"\n{reason}: stopping", error=True)
        except (Exception, SystemExit) as error:
            code, failure = 1, error
            outcome = {"status": "failed", "reason": str(error) or type(error).__name__}
            if getattr(error, "log", None):
                outcome["log"] = error.log
        session.end(os.getpid())
        shutil.rmtree(self.temporary, ignore_errors=True)
        ending.close(self, {**outcome, "seconds": round(time.monotonic() - began, 1)})
        if failure:
            ending.explain(self, failure)
        elif code == 0:
            say(ending.summary(self.history, self.run_dir))
        ending.report(self)
        return code

    # --- The steps ---------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the run's folder, or take up that of a run that goes on, and begin its history."""
        settings = self.settings
        self.run_dir = settings.run_dir or history.make_run_folder(settings.folder / "runs")
        self.lock = settings.lock if settings.lock is not None else history.claim(self.run_dir)
        before = history.load(self.run_dir) if settings.run_dir else {"rounds": []}
        self.history: history.History = {
            **{"schema": 1, "example": settings.example, "engine": settings.engine, "dataset": settings.dataset},
            **{"clients": settings.clients, "min_clients": settings.min_clients, "sampled": settings.sampled},
            "command": settings.command,
            **{key: value for key, value in before.items() if key not in ONE_START_S},
            **{"config": settings.config, "status": "running", "started": round(time.time(), 2)},
        }

    def prepare(self) -> None:
        """Make the data ready before any client starts, so that they don't all download at once."""
        name = self.settings.dataset
        if name in cifar_data.DATASETS:
            data = cifar_data.find(name)
            if not data:
                self.command("data", self.data_command(), quiet=False)
                if self.processes.wait("data") != 0:
                    raise Failed("the data could not be prepared")
                data = cifar_data.find(name) or cifar_data.find("synthetic")
            examples, _ = (len(cifar_data.load_split(split, data["name"])[1]) for split in ("train", "test"))
            self.history.update(dataset=data["name"], dataset_source=data["source"], examples=examples)
            self.environment["DATASET"] = data["name"]
            say(f"Data: {STAND_IN if data['name'] == 'synthetic' else data['name']}, from {data['source']}")
        history.save(self.run_dir, self.history)
        self.extension.prepare(self)

    def data_command(self) -> list[str]:
        return [sys.executable, str(self.settings.folder / "cifar_data" / "prepare.py"), self.settings.dataset]

    def start(self) -> None:
        """Start the SuperLink, wait until it answers, then start the clients and the run."""
        port, *client_ports = commands.ports(self.settings)
        for path, table in commands.files(self, port).items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(tomli_w.dumps(table), encoding="utf-8")
        to_start = commands.in_order(self, port, client_ports)
        self.processes.load("flower")
        self.command("superlink", to_start.pop("superlink"))
        if self.settings.engine == "deployment":
            self.processes.load("apps")
        deadline = time.monotonic() + START_TIMEOUT
        while not commands.answers(port):
            if (status := self.processes.statuses.get("superlink")) is not None:
                raise Failed(f"the SuperLink ended with status {status} before it answered", "superlink")
            if time.monotonic() > deadline:
                raise Failed(f"the SuperLink did not answer within {START_TIMEOUT:.0f} s", "superlink")
            self.processes.pause(0.1)
        self.extension.after_superlink(self)
        for name, command in to_start.items():
            self.command(name, command)
        if self.settings.verbose:
            self.processes.log("run").touch()
            self.command("tail", ["tail", "-n", "+1", "-F", str(self.processes.log("run"))], quiet=False)

    def command(self, name: str, command: list[str], quiet: bool = True) -> None:
        """Print a command and start it; of the clients, only the first."""
        shown = shlex.join(command).replace(f"{self.run_dir}/", "").replace(f"{self.settings.folder}", ".")
        if not name.startswith("client-") or name == "client-0":
            say(f"+ {shown}")
        elif name == "client-1":
            say(f"  (and so on, up to client {self.settings.clients - 1})")
        self.processes.start(name, command, quiet)
