"""The stand-in, made once by whoever comes first; and folders that can't be used as they should."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from data_helpers import assert_whole, command, drawn_stand_in, empty_data_dir, listing
from paths import BASIC

from launcher import dataset
from launcher.standin import draw_shapes

data_dir = pytest.fixture(empty_data_dir)
stand_in = pytest.fixture(scope="module")(drawn_stand_in)

# --- The stand-in ----------------------------------------------------------------------------------------------------


def test_drawing_is_deterministic():
    images, labels = draw_shapes(200, seed=0)
    again, same_labels = draw_shapes(200, seed=0)
    other, _ = draw_shapes(200, seed=1)
    assert np.array_equal(images, again)
    assert np.array_equal(labels, same_labels)
    assert not np.array_equal(images, other)
    assert (images.dtype, images.shape, labels.dtype, labels.shape) == (np.uint8, (200, 3, 32, 32), np.int64, (200,))


def test_the_stand_in_has_ten_classes_of_one_size(stand_in):
    assert_whole(stand_in)
    for split in ("train", "test"):
        labels = np.load(stand_in / f"{split}_labels.npy")
        assert set(np.bincount(labels)) == {len(labels) // 10}
        assert len(set(labels[:100])) == 10  # not sorted


def test_no_test_picture_is_a_training_picture(stand_in):
    training, test = (
        {picture.tobytes() for picture in np.load(stand_in / f"{split}_images.npy")} for split in ("train", "test")
    )
    assert not training & test


def test_the_command_prepares_once_and_says_what_it_is(data_dir):
    first = command("synthetic")
    made = listing(data_dir)
    second = command("synthetic")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout.splitlines()[-1].startswith(f"synthetic is ready in {data_dir / 'synthetic'} (drawn shapes")
    assert "CIFAR" not in first.stdout
    assert second.stdout == first.stdout
    assert listing(data_dir) == made
    assert_whole(data_dir / "synthetic")


def test_an_unknown_name_is_a_clear_error(data_dir):
    with pytest.raises(ValueError, match="unknown data set 'cifar100': there are auto, cifar10, synthetic"):
        dataset.prepare("cifar100")
    assert not data_dir.exists()


def test_four_processes_at_once(data_dir):
    code = "from launcher.dataset import prepare; print(prepare('synthetic')['name'])"
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=BASIC, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    assert [(process.communicate()[0], process.returncode) for process in started] == [("synthetic\n", 0)] * 4
    assert_whole(data_dir / "synthetic")
    assert {path.name for path in data_dir.iterdir()} <= {"synthetic", ".lock"}


@pytest.mark.parametrize("meta", [None, "", '{"name": "synth', "[]", "null"])
def test_a_half_written_folder_is_replaced(data_dir, meta):
    (data_dir / "synthetic").mkdir(parents=True)
    (data_dir / "synthetic" / "train_images.npy").write_bytes(b"half a pict")
    if meta is not None:
        (data_dir / "synthetic" / "meta.json").write_text(meta)
    assert dataset.prepare("synthetic")["name"] == "synthetic"
    assert_whole(data_dir / "synthetic")


def test_what_a_killed_preparation_left_is_removed(data_dir):
    (data_dir / ".synthetic-abc123").mkdir(parents=True)
    (data_dir / ".synthetic-abc123" / "half").write_bytes(b"163 MB")
    dataset.prepare("synthetic")
    assert {path.name for path in data_dir.iterdir()} <= {"synthetic", ".lock"}


# --- Folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_folder_that_cannot_be_made_is_a_clear_error():
    done = command("synthetic", DATA_DIR="/proc/nope")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: can't prepare the data in /proc/nope: ")
    assert "DATA_DIR=... takes another folder" in done.stderr


def test_a_file_in_the_way_is_a_clear_error(data_dir):
    data_dir.write_text("a file")
    with pytest.raises(RuntimeError, match=r"can't prepare the data in .* takes another folder"):
        dataset.prepare("synthetic")


AS_NOBODY = """\
import os, sys
from launcher.dataset import load_split, prepare
import filelock, mmap  # while they can still be read
if os.geteuid() == 0:  # whom no permission stops
    os.setgid(65534), os.setuid(65534)
try:
    print(prepare(sys.argv[1])['name'], len(load_split('train')[1]))
except RuntimeError as error:
    print(error)
"""


@pytest.fixture
def read_only(stand_in, monkeypatch):
    """A folder, which everybody can enter, with the stand-in in it and no permission to write."""
    root = Path(tempfile.mkdtemp(prefix="read-only-"))
    monkeypatch.setenv("DATA_DIR", str(root))
    shutil.copytree(stand_in, root / "synthetic")
    for path in (*root.rglob("*"), root):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield root
    for path in (root, root / "synthetic"):
        path.chmod(0o755)
    shutil.rmtree(root)


def as_nobody(name):
    done = subprocess.run([sys.executable, "-c", AS_NOBODY, name], cwd=BASIC, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_ready_data_set_in_a_read_only_folder_is_used(read_only):
    before = listing(read_only)
    assert as_nobody("synthetic") == "synthetic 12000"
    assert listing(read_only) == before


def test_a_read_only_folder_without_the_data_is_a_clear_error(read_only):
    before = listing(read_only)
    assert "takes another folder" in as_nobody("cifar10")
    assert listing(read_only) == before


def test_a_folder_that_cannot_be_entered_is_a_clear_error(read_only):
    read_only.chmod(0o000)
    assert "takes another folder" in as_nobody("auto")
