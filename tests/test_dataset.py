"""The stand-in, made once by whoever comes first; how a data set is found and read; folders that can't be used."""

import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from data_helpers import FILES, PREPARE, assert_whole, command, drawn_stand_in, empty_data_dir, listing
from paths import BASIC

import cifar_data
from cifar_data.prepare import prepare
from cifar_data.shapes import draw_shapes

data_dir = pytest.fixture(empty_data_dir)
stand_in = pytest.fixture(scope="module")(drawn_stand_in)


@pytest.fixture
def few(monkeypatch):
    """The stand-in has a hundredth of its pictures, where it is drawn anew and how many there are doesn't matter."""
    monkeypatch.setattr(cifar_data.prepare, "draw_shapes", lambda count, seed: draw_shapes(count // 100, seed))


@pytest.fixture
def ready(stand_in, data_dir):
    """An own copy of the stand-in, to be damaged."""
    return Path(shutil.copytree(stand_in, data_dir / "synthetic"))


# --- The stand-in ----------------------------------------------------------------------------------------------------


def test_drawing_is_deterministic():
    images, labels = draw_shapes(200, seed=0)
    again, same_labels = draw_shapes(200, seed=0)
    other, _ = draw_shapes(200, seed=1)
    assert np.array_equal(images, again)
    assert np.array_equal(labels, same_labels)
    assert not np.array_equal(images, other)
    assert (images.dtype, images.shape, labels.dtype, labels.shape) == (np.uint8, (200, 3, 32, 32), np.int64, (200,))


def test_the_pictures_stay_what_they_were():
    images, labels = draw_shapes(200, seed=0)
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    assert digest.startswith("03ec2207bba9b39a"), "figures measured on the stand-in no longer hold"


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


@pytest.mark.parametrize("way", [["cifar_utils.py"], ["-m", "cifar_data.prepare"], ["-P", "cifar_data/prepare.py"]])
def test_other_ways_to_run_the_command(ready, way):
    done = subprocess.run([sys.executable, *way, "synthetic"], cwd=BASIC, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"synthetic is ready in {ready} (drawn shapes, seeds 1 and 2)\n"


def test_four_processes_at_once(data_dir):
    started = [subprocess.Popen([*PREPARE, "synthetic"], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    done = [(process.communicate()[0].split()[0], process.returncode) for process in started]
    assert done == [("synthetic", 0)] * 4
    assert_whole(data_dir / "synthetic")
    assert {path.name for path in data_dir.iterdir()} <= {"synthetic", ".lock"}


@pytest.mark.parametrize("meta", [None, "", '{"name": "synth', "[]", "null", "{}"])
def test_a_folder_with_something_else_in_it_is_left_alone(data_dir, meta, few):
    """Such as torchvision's own copy. What is made here is whole or not there."""
    (data_dir / "synthetic").mkdir(parents=True)
    (data_dir / "synthetic" / "mine").write_text("not to be lost")
    if meta is not None:
        (data_dir / "synthetic" / "meta.json").write_text(meta)
    with pytest.raises(RuntimeError, match=r"synthetic holds something else\. DATA_DIR=\.\.\. takes another folder"):
        prepare("synthetic")
    assert (data_dir / "synthetic" / "mine").read_text() == "not to be lost"


def test_an_empty_folder_is_filled(data_dir, few):
    (data_dir / "synthetic").mkdir(parents=True)
    assert prepare("synthetic")["name"] == "synthetic"
    assert_whole(data_dir / "synthetic")


def test_what_a_killed_preparation_left_is_removed(data_dir, few):
    (data_dir / ".synthetic-abc123").mkdir(parents=True)
    (data_dir / ".synthetic-abc123" / "half").write_bytes(b"163 MB")
    prepare("synthetic")
    assert {path.name for path in data_dir.iterdir()} <= {"synthetic", ".lock"}


# --- Names -----------------------------------------------------------------------------------------------------------


UNKNOWN = "unknown data set 'cifar01': there are auto, cifar10, synthetic"


def test_an_unknown_name_is_a_clear_error(data_dir, monkeypatch):
    for function in (prepare, cifar_data.find):
        with pytest.raises(ValueError, match=UNKNOWN):
            function("cifar01")
    with pytest.raises(ValueError, match=UNKNOWN):
        cifar_data.load_split("train", "cifar01")
    monkeypatch.setenv("DATASET", "cifar01")
    with pytest.raises(ValueError, match=UNKNOWN):
        cifar_data.load_split("train")
    done = command("cifar01")
    assert (done.returncode, done.stderr) == (1, f"error: {UNKNOWN}\n")
    assert not data_dir.exists()


@pytest.mark.parametrize("asked", [None, "", "auto"])
def test_what_auto_has_read_stays_for_the_process(ready, monkeypatch, asked):
    if asked is not None:
        monkeypatch.setenv("DATASET", asked)
    cifar_data.load_split("train")
    assert os.environ["DATASET"] == "synthetic"
    Path(shutil.copytree(ready, ready.parent / "cifar10"), "meta.json").write_text('{"name": "cifar10", "source": "?"}')
    assert cifar_data.load_split("test")[0].filename.parent == ready


def test_a_name_that_was_given_settles_nothing(ready):
    cifar_data.load_split("train", "synthetic")
    assert "DATASET" not in os.environ


def test_auto_reads_cifar10_where_there_is_both(ready):
    Path(shutil.copytree(ready, ready.parent / "cifar10"), "meta.json").write_text('{"name": "cifar10", "source": "?"}')
    assert cifar_data.load_split("test")[0].filename.parent == ready.parent / "cifar10"
    assert os.environ["DATASET"] == "cifar10"


def test_finding_needs_no_package(ready):
    code = "import cifar_data; print(cifar_data.find('synthetic')['folder'])"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=BASIC, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{ready}\n", "")


# --- Bad files -------------------------------------------------------------------------------------------------------


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("file", [name for name in FILES if name.startswith("test")])
@pytest.mark.parametrize("damage", [remove, empty, cut])
def test_a_reading_error_says_which_folder_to_remove(ready, damage, file):
    damage(ready / file)
    with pytest.raises(ValueError, match=f"can't read test: .*Remove {ready} to have it made again"):
        cifar_data.load_split("test")


# --- Folders ---------------------------------------------------------------------------------------------------------


def test_the_folder_of_the_data_sets(monkeypatch, tmp_path):
    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    in_the_cache = tmp_path / ".cache" / "flower-cifar10"

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cifar_data.data_dir() == in_the_cache
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cifar_data.data_dir() == Path("/var/cache/flower-cifar10")
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")  # the specification has a relative path ignored
    assert cifar_data.data_dir() == in_the_cache
    monkeypatch.setenv("DATA_DIR", "pictures")
    assert cifar_data.data_dir() == tmp_path / "pictures"
    monkeypatch.setenv("DATA_DIR", "~/pictures")
    assert cifar_data.data_dir() == tmp_path / "pictures"


def test_without_a_home_the_temporary_folder_is_taken(monkeypatch):
    for variable in ("DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # without HOME, and for a user without an entry
    assert cifar_data.data_dir() == Path(tempfile.gettempdir(), "flower-cifar10")


@pytest.mark.parametrize("name", ["auto", "synthetic"])
def test_the_home_of_an_unknown_user_is_a_clear_error(name):
    done = command(name, DATA_DIR="~nosuch/x")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: Could not determine home directory.\n"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_are_made_under_the_umask_of_the_user(data_dir, umask, few):
    before = os.umask(umask)
    try:
        prepare("synthetic")
    finally:
        os.umask(before)
    for path in (data_dir, *data_dir.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


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
        prepare("synthetic")


@pytest.fixture
def no_locks(monkeypatch, request):
    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("no_locks", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS], indirect=True)
def test_without_file_locks_it_warns_and_goes_on(no_locks, data_dir, capsys, few):
    others = data_dir / ".synthetic-abc123"  # perhaps of a process that is at work
    others.mkdir(parents=True)
    assert prepare("synthetic")["name"] == "synthetic"
    assert_whole(data_dir / "synthetic")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"WARNING: {data_dir} has no file locks (")
    assert others.exists()


AS_NOBODY = """\
import os, sys
from cifar_data import load_split
from cifar_data.prepare import prepare
import mmap  # while it can still be read
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


@pytest.mark.parametrize("name", ["synthetic", "auto"])
def test_a_ready_data_set_in_a_read_only_folder_is_used(read_only, name):
    before = listing(read_only)
    assert as_nobody(name) == "synthetic 12000"
    assert listing(read_only) == before


def test_a_read_only_folder_without_the_data_is_a_clear_error(read_only):
    before = listing(read_only)
    assert "takes another folder" in as_nobody("cifar10")
    assert listing(read_only) == before


def test_a_folder_that_cannot_be_entered_is_a_clear_error(read_only):
    read_only.chmod(0o000)
    assert "takes another folder" in as_nobody("auto")
