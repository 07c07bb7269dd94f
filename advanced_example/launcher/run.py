"""Starts the server and the clients of a run, has them watched, and stops them."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launcher import DATASETS, arguments, dataset, engine, progress, results
from launcher.processes import SIGNALS, Failed, Processes, Stopped, tail
from launcher.watch import watch

START_TIMEOUT = 60.0  # seconds for the SuperLink to answer
POLL = 0.1


class Run:
    """One run, from the data to the summary line."""

    def __init__(self, settings: arguments.Settings) -> None:
        self.settings = settings
        self.run_dir = run_dir = settings.run_dir or results.make_run_folder(settings.folder / "runs")
        scratch = Path(tempfile.mkdtemp(prefix="fl-"))
        temporary = [scratch] if os.environ.get("KEEP_KEYS", "") not in ("", "0") else [scratch, run_dir / "keys"]
        self.processes = Processes(run_dir, temporary, engine.environment(settings, run_dir, scratch))
        self.history: results.History = {
            "schema": 1,
            "example": settings.example,
            "engine": settings.engine,
            "dataset": settings.dataset,
            "clients": settings.clients,
            "min_clients": settings.min_clients,
            "sampled": settings.sampled,
            "config": settings.config,
            "rounds": [],
        }
        if settings.secure:
            self.history["secure"] = True
        if settings.run_dir:  # it goes on: with the rounds that are there, and without the end that it came to
            self.history = {**results.load_history(run_dir), "config": settings.config}
            for key in ("reason", "log"):
                self.history.pop(key, None)
        self.history.update(status="running", started=round(time.time(), 2))

    def go(self) -> int:
        """Return the exit status. Whatever happens, no process is left, and the history says how it ended."""
        started = time.monotonic()
        outcome: dict[str, str] = {"status": "completed"}
        code, failure = 0, None
        try:
            self.prepare_data()
            self.start()
            with progress.bar(self.settings.config["num-server-rounds"], self.processes.log("progress")) as show_bar:
                watch(self.settings, self.processes, show_bar)
        except Failed as error:
            code, failure, outcome = 1, error, {"status": "failed", "reason": str(error)}
            if error.log:
                outcome["log"] = error.log
        except OSError as error:
            code, failure, outcome = 1, Failed(str(error)), {"status": "failed", "reason": str(error)}
        except Stopped as signalled:
            name = signal.Signals(signalled.args[0]).name
            code, outcome = 128 + signalled.args[0], {"status": "stopped", "reason": name}
            with contextlib.suppress(OSError):  # after a SIGHUP there may be no terminal to print to
                print(f"\n{name}: stopping", file=sys.stderr)
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # what follows takes seconds, and must be whole
            self.processes.stop()
        self.finish(outcome, time.monotonic() - started)
        if failure:
            self.explain(failure)
        self.report()
        return code

    # --- The steps ---------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Before any client starts, so that they don't all download at once."""
        name = self.settings.dataset
        if name in DATASETS:
            if not dataset.find(name):
                self.command("data", [sys.executable, str(self.settings.folder / "cifar_utils.py"), name], quiet=False)
                if self.processes.running["data"].wait() != 0:
                    raise Failed("the data could not be made ready")
            data = dataset.find(name)
            if data is None:
                raise Failed(f"{name} is not in {dataset.data_dir()}, though cifar_utils.py has ended well")
            try:
                examples, _ = (len(dataset.load_split(split, data["name"])[1]) for split in dataset.SPLITS)
            except (OSError, ValueError) as error:
                raise Failed(str(error)) from error
            self.history.update(dataset=data["name"], dataset_source=data["source"], examples=examples)
            self.processes.environment["DATASET"] = data["name"]
            print(f"Data: {results.STAND_IN if data['name'] == 'synthetic' else data['name']}, from {data['source']}")
            if data["reason"] and "data" not in self.processes.running:  # who has made it ready has said so
                print(f"WARNING: this is not CIFAR-10. {data['reason']}")
        self.history["command"] = arguments.command(self.settings, self.history["dataset"])
        results.save_history(self.run_dir, self.history)

    def start(self) -> None:
        """Start the SuperLink, wait until it answers, then start the clients and the run."""
        port, *client_ports = engine.ports(self.settings)
        if engine.answers(port):
            raise Failed(f"port {port} is in use: stop what listens there, or leave PORT out and a free one is taken")
        for path, content in engine.files(self.settings, self.run_dir, port).items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
        if children := engine.fork_server(self.settings, self.processes.environment):
            self.command("fork-server", children)  # the first of all, since it has the most to import
        if (script := self.settings.folder / "partitions.py").is_file():  # where the example shows who holds what
            self.command("partitions", [sys.executable, str(script), str(self.run_dir)], quiet=False)
        if self.settings.secure and not (self.run_dir / "keys").exists():  # a run that goes on may have them
            from security import make_keys  # the example's, where it has one

            make_keys(self.run_dir / "keys", self.settings.clients)
        server = self.command("superlink", engine.superlink(self.settings, self.run_dir, port))
        deadline = time.monotonic() + START_TIMEOUT
        while not engine.answers(port):
            if server.poll() is not None:
                raise Failed(f"the SuperLink ended with status {server.returncode} before it answered", "superlink")
            if time.monotonic() > deadline:
                raise Failed(f"the SuperLink did not answer within {START_TIMEOUT:.0f} s", "superlink")
            time.sleep(POLL)
        if "partitions" in self.processes.running and self.processes.running["partitions"].wait() != 0:
            raise Failed("the data can't be split like that")
        for name, command in engine.registrations(self.settings, self.run_dir).items():
            if self.command(name, command).wait() != 0:
                raise Failed("the SuperLink does not take a client's key", name)
        for name, command in engine.supernodes(self.settings, self.run_dir, port, client_ports).items():
            self.command(name, command)
        self.command("run", engine.run(self.settings, self.run_dir))

    # --- What is shown, and what is left -----------------------------------------------------------------------------

    def command(self, name: str, command: list[str], quiet: bool = True) -> subprocess.Popen[bytes]:
        print(f"+ {shlex.join(command)}", flush=True)
        return self.processes.start(name, command, quiet)

    def finish(self, outcome: dict[str, str], seconds: float) -> None:
        """Write the outcome down, print the summary line under the rounds, and draw the picture."""
        with contextlib.suppress(OSError, ValueError):  # the server has written the rounds into it
            self.history = results.load_history(self.run_dir)
        self.history = {**self.history, **outcome, "seconds": round(seconds, 1)}
        results.save_history(self.run_dir, self.history)
        if outcome["status"] == "completed":
            print(results.summary(self.history, self.run_dir), flush=True)
        if self.history["rounds"]:  # last: matplotlib takes most of a second to import
            from launcher.picture import draw

            draw(self.history, self.run_dir / "history.png")

    def report(self) -> None:
        """Hand the run's folder to the script AFTER_RUN, which the collection sets; how that ends changes nothing."""
        if script := os.environ.get("AFTER_RUN"):
            with contextlib.suppress(OSError):  # after a SIGHUP there may be no terminal to print to
                done = subprocess.run([sys.executable, script, str(self.run_dir)], stdin=subprocess.DEVNULL)
                if done.returncode != 0:
                    print(f"WARNING: {script} ended with status {done.returncode}", file=sys.stderr)

    def explain(self, failure: Failed) -> None:
        print(f"error: {failure}", file=sys.stderr)
        if failure.log:
            log = self.processes.log(failure.log)
            print(f"--- the end of {log}:\n{tail(log)}", file=sys.stderr)
