"""SECURE=1: only registered clients get in, and clients talk to no other server; with real processes."""

import contextlib
import datetime
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from runs import ROOT, Launch, copy_example, finished

from certificates import LIFETIME
from launcher.commands import answers
from security import check_keys, make_keys

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


# What a stranger is refused with.
STRANGERS = {
    "no-registered-key": "Failed to activate SuperNode",
    "other-authority": "certificate verify failed",
    "plain-text": "Server disconnected without sending a response",
    "false-server": "certificate verify failed",
}


def false_server(start, keys: Path) -> int:
    """Start a SuperLink with another authority's certificate, and return its port."""
    port, own = free_port(), [*("--ssl-ca-certfile", keys / "ca.crt"), *("--ssl-certfile", keys / "server.crt")]
    own += ["--ssl-keyfile", keys / "server.key", "--enable-supernode-auth", "--host", "127.0.0.1", "--port", port]
    process, _ = start("false-server", "flower-superlink", *own)
    while not answers(port):
        assert process.poll() is None
        time.sleep(0.1)
    return port


@pytest.mark.parametrize("kinds", [[*STRANGERS][:1], pytest.param([*STRANGERS][1:], marks=pytest.mark.slow)], ids=len)
def test_strangers_are_turned_away(kinds: list, advanced: Path, data_dir: Path, tmp_path: Path, start) -> None:
    """While clients train; the run completes without them, and its keys are gone."""
    hold, reached = advanced / "hold", advanced / "reached"
    client = advanced / "client.py"
    line = "    # 2. Plain PyTorch.\n"
    wait = f"""    while __import__("os").path.exists({str(hold)!r}):
        open({str(reached)!r}, "w").close()
        __import__("time").sleep(0.05)
"""
    assert client.read_text().count(line) == 1
    client.write_text(client.read_text().replace(line, wait + line))
    hold.touch()
    other = tmp_path / "other"  # another authority's
    make_keys(other, 1)
    with Launch(advanced, 2, 2, 2, 1, "toy=true", data_dir=data_dir, SECURE="1") as run:
        run.wait_until(reached.exists, timeout=150)
        keys = keys_of(run)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [keys, *keys.iterdir()]}
        port = int(re.search(r"flower-superlink .*--port (\d+)", run.stdout)[1])
        key, own = "--auth-supernode-private-key", ["--root-certificates", keys / "ca.crt"]
        said = {}
        for name in kinds:
            if name == "no-registered-key":
                command = supernode(port, *own, key, other / "client-0")
            elif name == "other-authority":
                command = supernode(port, "--root-certificates", other / "ca.crt", key, keys / "client-0")
            elif name == "plain-text":
                command = supernode(port, "--insecure")
            else:
                command = supernode(false_server(start, other), *own, key, keys / "client-0")
            process, log = start(f"client-of-{name}", *command)
            run.wait_until(lambda p=process: p.poll() is not None, timeout=60)
            assert process.returncode != 0
            said[name] = log.read_text()
        hold.unlink()
        assert run.wait() == 0, run.stdout + run.stderr
    assert {name for name in kinds if STRANGERS[name] not in said[name]} == set(), said
    refusal = "No SuperNode found with the given public key"
    assert (refusal in run.log("superlink")) == ("no-registered-key" in kinds)
    assert run.history["secure"] is True
    trained = run.history["rounds"][-1]["train"]
    assert [row["partition-id"] for row in trained["by_client"]] == [0, 1]
    assert trained["failures"] == []
    secrets = {name: mode for name, mode in modes.items() if re.fullmatch(r"server\.key|client-\d", name)}
    assert secrets == dict.fromkeys(["server.key", "client-0", "client-1"], 0o600)
    assert modes["keys"] == 0o700
    assert not keys.exists()
    assert not any((run.run_dir / "keys").glob("*"))
    assert run.nothing_left()


def keys_of(run: Launch) -> Path:
    """Where a run's keys are: its commands say it."""
    return Path(run.wait_until(lambda: re.findall(r"--ssl-ca-certfile (\S+)/ca.crt", run.stdout)[0]))


def test_keys_are_gone_when_the_launcher_was_killed(advanced: Path, data_dir: Path) -> None:
    with Launch(advanced, 2, 2, 2, 1, "toy=true", data_dir=data_dir, SECURE="1") as run:
        keys = keys_of(run)
        assert (keys / "server.key").exists()
        run.process.kill()
        run.wait()
        assert run.nothing_left(within=20)
    assert not keys.parent.exists()
    assert not (run.run_dir / "keys").exists()


# --- security.py by itself -------------------------------------------------------------------------------------------


def security(*words: object) -> subprocess.CompletedProcess[str]:
    """Type `python security.py ...`."""
    command = [sys.executable, ROOT / "advanced_example/security.py", *words]
    return subprocess.run([*map(str, command)], capture_output=True, text=True)


def test_the_certificate_is_for_the_addresses_that_were_given(tmp_path: Path) -> None:
    """And the authority signed it, whose own key is nowhere."""
    words = [tmp_path / "keys", "2", "192.0.2.7", "server.example"]
    assert security(*words).returncode == 0
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
    again = security(*words)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.startswith(f"error: {tmp_path / 'keys'} exists, and keys in use are not overwritten")
    assert {path.name: path.read_bytes() for path in (tmp_path / "keys").iterdir()} == files


@pytest.mark.parametrize(
    "address",
    [
        "server:8000",
        "http://server",
        "b\N{LATIN SMALL LETTER U WITH DIAERESIS}cher.example",
        "",
        "300.1.1.1",
        "-a",
        "a b",
    ],
)
def test_a_bad_address_leaves_nothing_behind(address: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is neither an IP address nor a host name"):
        make_keys(tmp_path / "keys", 1, "192.0.2.7", address)
    assert list(tmp_path.iterdir()) == []


def test_nor_does_a_full_disk(small_disk: Path) -> None:
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(2**16))
    with pytest.raises(OSError, match="No space left on device"):
        make_keys(small_disk / "keys", 3, "192.0.2.7")
    assert list(small_disk.iterdir()) == [filler]


def test_a_bad_address_is_one_line(tmp_path: Path) -> None:
    done = security(tmp_path / "keys", 1, "server:8000")
    said = "error: 'server:8000' is neither an IP address nor a host name, such as 192.0.2.7\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys", 2, "127.0.0.2", "server.example")
    return tmp_path / "keys"


def test_whole_keys_pass_the_check(keys: Path, tmp_path: Path) -> None:
    check_keys(keys, "127.0.0.2", "localhost")
    client = tmp_path / "of-a-client"
    client.mkdir()
    for name in ("ca.crt", "client-1"):
        shutil.copy(keys / name, client)
    check_keys(client, "127.0.0.1")
    done = security(client, "127.0.0.1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["ca.crt", "server.crt", "server.key"])
def test_a_missing_file_is_named(name: str, keys: Path) -> None:
    (keys / name).unlink()
    with pytest.raises(ValueError, match=re.escape(f"{name} is missing")):
        check_keys(keys)


@pytest.mark.parametrize("name", ["ca.crt", "server.crt", "server.key", "client-0"])
def test_a_half_file_is_named(name: str, keys: Path) -> None:
    (keys / name).write_bytes((keys / name).read_bytes()[:100])
    with pytest.raises(ValueError, match=re.escape(f"{name}: ")):
        check_keys(keys)


def test_half_a_folder_does_not_pass(keys: Path, tmp_path: Path) -> None:
    """As security.py used to leave it on a bad address: a certificate authority, and nobody that it has signed."""
    for path in keys.iterdir():
        if path.name != "ca.crt":
            path.unlink()
    done = security(keys, "127.0.0.1")
    assert (done.returncode, done.stderr) == (1, f"error: {keys} has neither the server's keys nor a client's\n")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ca.crt", "server.crt was signed by another authority"),
        ("server.key", "server.crt: it is not for server.key"),
    ],
)
def test_what_does_not_belong_together_is_named(name: str, words: str, keys: Path, tmp_path: Path) -> None:
    make_keys(tmp_path / "other", 1)
    shutil.copy(tmp_path / "other" / name, keys)
    with pytest.raises(ValueError, match=re.escape(words)):
        check_keys(keys)


def test_another_address_and_another_time_are_refused(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"it is for 127.*, server\.example, not for 192\.0\.2\.9"):
        check_keys(keys, "192.0.2.9")
    with pytest.raises(ValueError, match=r"server\.example is not known here"):
        check_keys(keys, "server.example")
    for now in (datetime.datetime.now(datetime.UTC) + 2 * LIFETIME, datetime.datetime.now(datetime.UTC) - LIFETIME):
        clock = SimpleNamespace(now=lambda zone, now=now: now)
        monkeypatch.setattr("certificates.datetime", SimpleNamespace(datetime=clock, UTC=datetime.UTC))
        with pytest.raises(ValueError, match=r"ca\.crt: it is valid from"):
            check_keys(keys)


@pytest.mark.slow
def test_keys_may_be_kept(advanced: Path, data_dir: Path) -> None:
    """And are used again by a run that goes on."""
    run = finished(advanced, 2, 2, 2, 1, "toy=true", data_dir=data_dir, SECURE="1", KEEP_KEYS="1")
    assert run.process.returncode == 0, run.stdout + run.stderr
    key = (run.run_dir / "keys/client-1").read_bytes()
    words = (2, 2, 2, 2, "resume=latest")
    again = finished(advanced, *words, data_dir=data_dir, KEEP_KEYS="1", WARM="0")
    assert again.process.returncode == 0, again.stdout + again.stderr
    assert run.history["secure"] is True
    assert (run.run_dir / "keys/client-1").read_bytes() == key
