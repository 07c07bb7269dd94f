"""CIFAR-10 from a server on this machine, in its real format, and every way in which a download can go wrong."""

import hashlib
import http.server
import io
import pickle
import shutil
import socket
import tarfile
import threading

import numpy as np
import pytest
from data_helpers import assert_whole, command, drawn_stand_in, empty_data_dir, listing

from launcher import dataset

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
    """Serves the archive, whole from /good, a part of it from /cut, and nothing else; it counts the requests."""

    requests = 0

    def do_GET(self):
        type(self).requests += 1
        if self.path not in ("/good", "/cut"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(ARCHIVE)))
        self.end_headers()
        self.wfile.write(ARCHIVE if self.path == "/good" else ARCHIVE[: len(ARCHIVE) // 2])

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def site():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
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


@pytest.fixture(params=["no server", "wrong checksum", "cut", "not found", "not an address"])
def bad_url(request, site, torchvision_cifar10, monkeypatch):
    """An address that does not give CIFAR-10, and the words that tell why."""
    url, reason = {
        "no server": (f"http://127.0.0.1:{closed_port()}/", "refused"),
        "wrong checksum": (f"{site}/good", "corrupted"),
        "cut": (f"{site}/cut", "corrupted"),
        "not found": (f"{site}/none", "404"),
        "not an address": ("cifar.tar.gz", "unknown url type"),
    }[request.param]
    monkeypatch.setenv("CIFAR10_URL", url)
    return url, reason


def test_a_bad_download_is_one_clear_line(bad_url, data_dir):
    url, reason = bad_url
    with pytest.raises(RuntimeError) as error:
        dataset.prepare("cifar10")
    said = str(error.value)
    assert url in said
    assert reason in said
    assert "DATASET=synthetic" in said
    assert "\n" not in said
    assert [path.name for path in data_dir.iterdir()] in ([".lock"], [])


def test_auto_takes_the_stand_in_after_a_bad_download_and_remembers(bad_url, data_dir, stand_in):
    shutil.copytree(stand_in, data_dir / "synthetic")
    first = dataset.prepare("auto")
    asked = Site.requests
    second = dataset.prepare("auto")

    assert first == second
    assert Site.requests == asked  # the second call asks nobody
    assert first["name"] == "synthetic"
    assert all(words in first["reason"] for words in bad_url)
    assert {path.name for path in data_dir.iterdir()} <= {"synthetic", "cifar10.failed", ".lock"}


def test_the_command_fails_or_says_loudly_that_it_stands_in(data_dir):
    environment = {"CIFAR10_URL": f"http://127.0.0.1:{closed_port()}/", "NO_PROXY": "127.0.0.1"}
    failed = command("cifar10", **environment)
    assert failed.returncode == 1
    (line,) = failed.stderr.splitlines()
    assert line.startswith("error: CIFAR-10 could not be downloaded from http://127.0.0.1:")
    assert "DATASET=synthetic does without" in line

    auto = command("auto", **environment)
    assert auto.returncode == 0
    assert "synthetic is ready" in auto.stdout
    assert "WARNING: this is not CIFAR-10. CIFAR-10 could not be downloaded from http://127.0.0.1:" in auto.stdout
    assert_whole(data_dir / "synthetic")


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
    found = dataset.prepare(name)
    assert found == {"name": "cifar10", "source": "torchvision", "folder": str(data_dir / "cifar10"), "reason": ""}
    assert_whole(data_dir / "cifar10")
    for split, names in {"train": TRAIN, "test": ["test_batch"]}.items():
        images, labels = dataset.load_split(split)
        packed = np.concatenate([BATCHES[name]["data"] for name in names])
        assert np.array_equal(images, packed.reshape(-1, 3, 32, 32))
        assert labels.tolist() == [label for name in names for label in BATCHES[name]["labels"]]
    assert {path.name for path in data_dir.iterdir()} <= {"cifar10", ".lock"}


def test_a_good_download_is_made_once(good_site, data_dir):
    dataset.prepare("auto")
    asked, made = Site.requests, listing(data_dir)
    assert dataset.prepare("auto") == dataset.prepare("cifar10")
    assert Site.requests == asked
    assert listing(data_dir) == made


def test_cifar10_is_tried_again_where_it_is_asked_for(good_site, site, data_dir, stand_in, monkeypatch):
    shutil.copytree(stand_in, data_dir / "synthetic")
    monkeypatch.setenv("CIFAR10_URL", f"{site}/none")
    assert dataset.prepare("auto")["name"] == "synthetic"
    monkeypatch.setenv("CIFAR10_URL", f"{site}/good")
    assert dataset.prepare("auto")["name"] == "synthetic"  # remembered for a day
    assert dataset.prepare("cifar10")["name"] == "cifar10"
    assert dataset.prepare("auto")["name"] == "cifar10"
