"""A run of a plain Flower app: basic's work, as tutorials write it and as `flwr run` starts it, without ./run.sh.

    python benchmarks/plain_app.py 3 3                # clients, rounds; prints its seconds

Simulation engine, Flower's own settings: threads as PyTorch takes them, a loader per picture (benchmarks/plain).
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT

sys.path.insert(0, str(ROOT / "basic"))

from launcher.commands import answers

SUPERLINK = ["flower-superlink", "--insecure", "--simulation", "--disable-runtime-dependency-installation", "--port"]


def run(clients: int, rounds: int) -> float:
    """Seconds from the first command until the run has ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="plain-") as folder:
        home, app = Path(folder, "home"), Path(folder, "app")
        shutil.copytree(ROOT / "basic", app, ignore=shutil.ignore_patterns("runs", ".venv*", "__pycache__"))
        shutil.copytree(ROOT / "benchmarks/plain", app, dirs_exist_ok=True)
        home.mkdir()
        connection = f'address = "127.0.0.1:{port}"\ninsecure = true\n'
        (home / "config.toml").write_text(f'[superlink]\ndefault = "local"\n\n[superlink.local]\n{connection}')
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "FLWR_HOME": str(home), "RAY_TMPDIR": folder}
        environment["FLWR_TELEMETRY_ENABLED"] = "0"
        began = time.monotonic()
        with (
            Path(folder, "log").open("wb") as log,
            subprocess.Popen([*SUPERLINK, str(port)], env=environment, stdout=log, stderr=log) as superlink,
        ):
            try:
                while not answers(port) and superlink.poll() is None:
                    time.sleep(0.1)
                command = ["flwr", "run", str(app), "local", "--stream"]
                command += ["--run-config", f"num-server-rounds={rounds} min-clients={clients}"]
                command += ["--federation-config", f"num-supernodes={clients}"]
                subprocess.run(command, env=environment, stdout=log, stderr=log)
                seconds = time.monotonic() - began
                command = ["flwr", "ls", "local", "--format", "json"]
                listing = subprocess.run(command, env=environment, capture_output=True)
            finally:
                superlink.terminate()
        if b'"finished:completed"' not in listing.stdout:
            sys.exit(Path(folder, "log").read_text())
    return seconds


if __name__ == "__main__":
    print(f"{run(*map(int, sys.argv[1:])):.1f} s")
