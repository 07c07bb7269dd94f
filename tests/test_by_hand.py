"""`flwr run .` in an example's folder, without the launcher, as every Flower tutorial starts an app."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import copy_example, environment


def local_superlinks(home: Path) -> list[int]:
    """The ids of the SuperLinks that `flwr run` has left running for this FLWR_HOME."""
    said = subprocess.run(["pgrep", "-f", f"{home}/local-superlink/superlink.log"], capture_output=True, text=True)
    return [int(pid) for pid in said.stdout.split() if Path(f"/proc/{pid}").exists()]


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="needs pgrep to find Flower's local SuperLink")
@pytest.mark.parametrize(
    ("example", "clients"),
    [
        ("basic", 4),
        pytest.param("advanced_example", 5, marks=pytest.mark.slow),
        pytest.param("multiprocessing", 12, marks=pytest.mark.slow),
    ],
)
def test_flwr_run_leaves_a_whole_run(example: str, clients: int, tmp_path: Path, data_dir: Path) -> None:
    folder, home = copy_example(example, tmp_path / example), tmp_path / "flwr-home"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = environment(data_dir, PATH=path, FLWR_HOME=str(home), FLWR_TELEMETRY_ENABLED="0", DATASET="auto")
    with socket.create_server(("127.0.0.1", 0)) as server:  # another SuperLink than that of somebody else's run
        env["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"] = str(server.getsockname()[1])
    command = ["flwr", "run", ".", "--stream", "--federation-config", f"num-supernodes={clients}"]
    command += ["--run-config", "num-server-rounds=2 min-clients=3 sampled-clients=3"]
    try:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
        (run,) = (folder / "runs").glob("2*")
        assert f"The rounds are in {run}" in done.stdout, done.stdout + done.stderr
        history = json.loads((run / "history.json").read_text())
        assert (history["status"], history["clients"]) == ("completed", clients)
        assert [entry["round"] for entry in history["rounds"] if entry["round"]] == [1, 2]
        assert history["model_sha256"]
        assert (run / "model.pt").is_file()
    finally:
        for pid in local_superlinks(home):  # as the pages say: Flower keeps it running
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 30
    while local_superlinks(home):
        assert time.monotonic() < deadline
        time.sleep(0.1)
