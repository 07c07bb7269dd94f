"""SECURE=1: only registered clients get in, and clients talk to no other server; with real processes."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from runs import ROOT, Launch, copy_example, finished

from launcher.engine import answers
from security import make_keys

SCRIPTS = Path(sys.executable).parent


@pytest.fixture
def advanced(tmp_path: Path) -> Path:
    return copy_example("advanced_example", tmp_path / "advanced_example")


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    """Starts a process of Flower's that is not the run's, and returns (process, its log)."""
    started = []

    def start(name: str, *command: object) -> tuple[subprocess.Popen, Path]:
        log = tmp_path / f"{name}.log"
        environment = {
            **os.environ,
            "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(tmp_path / name),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }
        with log.open("wb") as file:
            process = subprocess.Popen(
                list(map(str, command)), env=environment, stdout=file, stderr=file, start_new_session=True
            )
        started.append(process)
        return process, log

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def supernode(port: int, *security: object) -> list[object]:
    node = ["--node-config", "partition-id=2 num-partitions=3"]
    address = ["--superlink", f"127.0.0.1:{port}", "--port", free_port(), "--max-retries", 1, "--max-wait-time", 5]
    return ["flower-supernode", *security, *address, *node]


def test_strangers_are_turned_away(advanced: Path, data_dir: Path, tmp_path: Path, start) -> None:
    """Four of them, while clients train; the run completes without them, and its keys are gone."""
    hold, reached = advanced / "hold", advanced / "reached"
    client = advanced / "client.py"
    line = '    config = message.content["config"]\n'
    wait = f"""    while __import__("os").path.exists({str(hold)!r}):
        open({str(reached)!r}, "w").close()
        time.sleep(0.05)
"""
    client.write_text(client.read_text().replace(line, line + wait))
    hold.touch()
    make_keys(tmp_path / "other", 1)  # another authority's
    with Launch(advanced, 2, 2, 2, 1, "toy=true", data_dir=data_dir, SECURE="1") as run:
        run.wait_until(reached.exists, timeout=150)
        keys = run.run_dir / "keys"
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [keys, *keys.iterdir()]}
        port = int(re.search(r"flower-superlink .*--port (\d+)", run.stdout)[1])

        own = ["--root-certificates", keys / "ca.crt", "--auth-supernode-private-key"]
        strangers = {
            "no-registered-key": supernode(port, *own, tmp_path / "other/client-0"),
            "other-authority": supernode(
                port,
                *("--root-certificates", tmp_path / "other/ca.crt"),
                *("--auth-supernode-private-key", keys / "client-0"),
            ),
            "plain-text": supernode(port, "--insecure"),
        }
        false_port = free_port()
        certificates = [
            ("--ssl-ca-certfile", "ca.crt"),
            ("--ssl-certfile", "server.crt"),
            ("--ssl-keyfile", "server.key"),
        ]
        server, _ = start(
            "false-server",
            "flower-superlink",
            *[word for option, file in certificates for word in (option, tmp_path / "other" / file)],
            *("--enable-supernode-auth", "--host", "127.0.0.1", "--port", false_port),
        )
        run.wait_until(lambda: answers(false_port))
        strangers["false-server"] = supernode(false_port, *own, keys / "client-0")
        said = {}
        for name, command in strangers.items():
            process, log = start(f"client-of-{name}" if name == "false-server" else name, *command)
            run.wait_until(lambda p=process: p.poll() is not None, timeout=60)
            assert process.returncode != 0
            said[name] = log.read_text()
        assert server.poll() is None
        hold.unlink()
        assert run.wait() == 0, run.stdout + run.stderr
    assert "Failed to activate SuperNode" in said["no-registered-key"]
    assert "No SuperNode found with the given public key" in run.log("superlink")
    assert "certificate verify failed" in said["other-authority"]
    assert "certificate verify failed" in said["false-server"]
    assert "Server disconnected without sending a response" in said["plain-text"]
    assert run.history["secure"] is True
    trained = run.history["rounds"][-1]["train"]
    assert [row["partition-id"] for row in trained["by_client"]] == [0, 1]
    assert trained["failures"] == []
    assert {mode for name, mode in modes.items() if re.fullmatch(r"server.key|client-\d", name)} == {0o600}
    assert modes["keys"] == 0o700
    assert not keys.exists()
    assert run.nothing_left()


def test_the_certificate_is_for_the_addresses_that_were_given(tmp_path: Path) -> None:
    """And the authority signed it, whose own key is nowhere."""
    script = ROOT / "advanced_example/security.py"
    command = [sys.executable, script, tmp_path / "keys", "2", "192.0.2.7", "server.example"]
    subprocess.run(command, check=True)
    files = {path.name: path.read_bytes() for path in (tmp_path / "keys").iterdir()}
    keys = ["client-0", "client-1"]
    assert sorted(files) == sorted(["ca.crt", "server.crt", "server.key", *keys, *(f"{key}.pub" for key in keys)])
    authority, server = (x509.load_pem_x509_certificate(files[name]) for name in ("ca.crt", "server.crt"))
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "server.example"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "192.0.2.7"]
    own = load_pem_private_key(files["server.key"], password=None).public_key()
    assert own == server.public_key() != authority.public_key()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode != 0  # keys in use are not overwritten
    assert {path.name: path.read_bytes() for path in (tmp_path / "keys").iterdir()} == files


@pytest.mark.slow
def test_keys_may_be_kept(advanced: Path, data_dir: Path) -> None:
    run = finished(advanced, 2, 2, 2, 1, "toy=true", data_dir=data_dir, SECURE="1", KEEP_KEYS="1")
    assert run.process.returncode == 0, run.stdout + run.stderr
    assert (run.run_dir / "keys/client-1").exists()
