"""CIFAR-10 from a server on this machine, in its real format, and every way in which a download can go wrong."""

import hashlib
import http.server
import io
import os
import pickle
import shutil
import signal
import socket
import tarfile
import threading
import time

import forked
import numpy as np
import pytest
from data_helpers import PREPARE, assert_whole, command, drawn_stand_in, empty_data_dir, listing

import cifar_data.prepare
from cifar_data import find, load_split
from cifar_data.prepare import prepare

data_dir = pytest.fixture(empty_data_dir)
stand_in = pytest.fixture(scope="module")(drawn_stand_in)
PER_BATCH = 20  # pictures in each file of the small archive


def batch(seed):
    """What is in one of CIFAR-10's files: rows of 3,072 bytes, red, then green, then blue, each row by row."""
    rng = np.random.default_rng(seed)
    return {
        "data": rng.integers(0, 256, (PER_BATCH, 3072), np.uint8),
        "labels": rng.integers(0, 10, PER_BATCH).tolist(),
    }


TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
BATCHES = {name: batch(seed) for seed, name in enumerate([*TRAIN, "test_batch"])}


def small_archive():
    """CIFAR-10's archive, but for the number of pictures; with the MD5 of each file in it."""
    files = BATCHES | {"batches.meta": {"label_names": [f"class {i}" for i in range(10)]}}
    packed, sums = io.BytesIO(), {}
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in files.items():
            pickled = pickle.dumps(content, protocol=2)
            sums[name] = hashlib.md5(pickled).hexdigest()
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(pickled)
            archive.addfile(entry, io.BytesIO(pickled))
    return packed.getvalue(), sums


ARCHIVE, SUMS = small_archive()


class Site(http.server.BaseHTTPRequestHandler):
    """Serves the archive, whole from /good, a part of it from /cut and /stall, and nothing else; counts the requests.

    After its part, /cut closes the connection, and /stall says no more; /silent says nothing at all.
    """

    requests = 0
    closing = threading.Event()

    def do_GET(self):
        type(self).requests += 1
        if self.path == "/silent":
            self.closing.wait()
        elif self.path not in ("/good", "/cut", "/stall"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(ARCHIVE)))
        self.end_headers()
        self.wfile.write(ARCHIVE if self.path == "/good" else ARCHIVE[: len(ARCHIVE) // 2])
        if self.path == "/stall":
            self.wfile.flush()
            self.closing.wait()

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def site():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        Site.closing.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def torchvision_cifar10(monkeypatch):
    """torchvision's class, which the code gives an address; it is as before after the test."""
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", CIFAR10.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield CIFAR10
    socket.setdefaulttimeout(None)


def closed_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(params=["no server", "wrong checksum", "cut", "stalled", "silent", "not found", "not an address"])
def bad_url(request, site, torchvision_cifar10, monkeypatch):
    """An address that does not give CIFAR-10, and the words that tell why."""
    url, reason = {
        "no server": (f"http://127.0.0.1:{closed_port()}/", "refused"),
        "wrong checksum": (f"{site}/good", "corrupted"),
        "cut": (f"{site}/cut", "corrupted"),
        "stalled": (f"{site}/stall", "timed out"),
        "silent": (f"{site}/silent", "TimeoutError"),
        "not found": (f"{site}/none", "404"),
        "not an address": ("cifar.tar.gz", "unknown url type"),
    }[request.param]
    monkeypatch.setenv("CIFAR10_URL", url)
    monkeypatch.setattr(cifar_data.prepare, "ANSWER", 1.0)
    monkeypatch.setattr(cifar_data.prepare, "SILENCE", 2.0)
    return url, reason


def test_a_bad_download_is_one_clear_line(bad_url, data_dir):
    url, reason = bad_url
    with pytest.raises(RuntimeError) as error:
        prepare("cifar10")
    said = str(error.value)
    assert url in said
    assert reason in said
    assert "DATASET=synthetic" in said
    assert "\n" not in said
    assert [path.name for path in data_dir.iterdir()] in ([".lock"], [])


def test_auto_takes_the_stand_in_after_a_bad_download(bad_url, data_dir, stand_in):
    shutil.copytree(stand_in, data_dir / "synthetic")
    data = prepare("auto")
    assert data["name"] == "synthetic"
    assert all(words in data["reason"] for words in bad_url)
    assert {path.name for path in data_dir.iterdir()} <= {"synthetic", ".lock"}
    assert find("auto") is None


def test_a_name_that_nobody_looks_up_is_not_waited_for(data_dir, stand_in, torchvision_cifar10, monkeypatch):
    shutil.copytree(stand_in, data_dir / "synthetic")
    end = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: end.wait(60))
    monkeypatch.setattr(cifar_data.prepare, "ANSWER", 0.5)
    began = time.monotonic()
    assert "TimeoutError" in prepare("auto")["reason"]
    assert time.monotonic() - began < 10
    end.set()


def test_how_long_a_server_may_take():
    assert cifar_data.prepare.ANSWER <= 5
    assert cifar_data.prepare.SILENCE == 20


def test_the_command_fails_or_says_loudly_that_it_stands_in(data_dir):
    environment = {"CIFAR10_URL": f"http://127.0.0.1:{closed_port()}/", "NO_PROXY": "127.0.0.1"}
    failed = command("cifar10", **environment)
    assert failed.returncode == 1
    (line,) = failed.stderr.splitlines()
    assert line.startswith("error: CIFAR-10 could not be downloaded from http://127.0.0.1:")
    assert "DATASET=synthetic avoids the download" in line

    auto = command("auto", **environment)
    assert auto.returncode == 0
    assert "synthetic is ready" in auto.stdout
    assert "WARNING: this is not CIFAR-10. CIFAR-10 could not be downloaded from http://127.0.0.1:" in auto.stdout
    assert_whole(data_dir / "synthetic")
    assert line.removeprefix("error: ").split(" (")[1] in auto.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_download_that_is_cut_off_leaves_nothing(site, data_dir, monkeypatch, tmp_path, number):
    monkeypatch.setenv("CIFAR10_URL", f"{site}/stall")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    said = tmp_path / "said"
    process = forked.start(PREPARE[1], "auto", env=os.environ, err=str(said))
    deadline = time.monotonic() + 60
    while not list(data_dir.glob(".cifar10-*/*.tar.gz")):
        assert process.is_alive(), said.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.join(10)
    assert process.exitcode == 128 + number
    assert "Traceback" not in said.read_text()
    assert [path.name for path in data_dir.iterdir()] == [".lock"]


@pytest.fixture
def good_site(site, torchvision_cifar10, monkeypatch):
    """The small archive passes for CIFAR-10's: torchvision looks for its MD5s."""
    train = [[name, SUMS[name]] for name in TRAIN]
    monkeypatch.setattr(torchvision_cifar10, "tgz_md5", hashlib.md5(ARCHIVE).hexdigest())
    monkeypatch.setattr(torchvision_cifar10, "train_list", train)
    monkeypatch.setattr(torchvision_cifar10, "test_list", [["test_batch", SUMS["test_batch"]]])
    monkeypatch.setattr(torchvision_cifar10, "meta", {**torchvision_cifar10.meta, "md5": SUMS["batches.meta"]})
    monkeypatch.setenv("CIFAR10_URL", f"{site}/good")


@pytest.mark.parametrize("name", ["cifar10", "auto"])
def test_a_good_download_is_what_was_packed(good_site, data_dir, name):
    found = prepare(name)
    assert found == {"name": "cifar10", "source": "torchvision", "folder": str(data_dir / "cifar10"), "reason": ""}
    assert_whole(data_dir / "cifar10")
    for split, names in {"train": TRAIN, "test": ["test_batch"]}.items():
        images, labels = load_split(split)
        packed = np.concatenate([BATCHES[name]["data"] for name in names])
        assert np.array_equal(images, packed.reshape(-1, 3, 32, 32))
        assert labels.tolist() == [label for name in names for label in BATCHES[name]["labels"]]
    assert {path.name for path in data_dir.iterdir()} <= {"cifar10", ".lock"}


def test_a_good_download_is_made_once(good_site, data_dir):
    prepare("auto")
    asked, made = Site.requests, listing(data_dir)
    assert prepare("auto") == prepare("cifar10")
    assert Site.requests == asked
    assert listing(data_dir) == made


def test_auto_tries_again_at_each_start(good_site, site, data_dir, stand_in, monkeypatch):
    shutil.copytree(stand_in, data_dir / "synthetic")
    monkeypatch.setenv("CIFAR10_URL", f"{site}/none")
    assert prepare("auto")["name"] == "synthetic"
    monkeypatch.setenv("CIFAR10_URL", f"{site}/good")
    assert prepare("auto")["name"] == "cifar10"
