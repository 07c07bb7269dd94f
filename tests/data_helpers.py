"""What the tests of the data share; each makes fixtures of the first two functions."""

import os
import subprocess
import sys

import numpy as np
import pytest
from paths import BASIC

from cifar_data.prepare import prepare

FILES = ["meta.json", "test_images.npy", "test_labels.npy", "train_images.npy", "train_labels.npy"]


def empty_data_dir(tmp_path, monkeypatch):
    """An empty DATA_DIR, which is not made yet."""
    folder = tmp_path / "data"
    monkeypatch.setenv("DATA_DIR", str(folder))
    monkeypatch.setenv("DATASET", "auto")  # set first, so that what load_split sets is undone after the test
    monkeypatch.delenv("DATASET")
    return folder


def drawn_stand_in(tmp_path_factory):
    """The stand-in, drawn once for the tests that only need it to be there."""
    root = tmp_path_factory.mktemp("stand-in")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_DIR", str(root))
        prepare("synthetic")
    return root / "synthetic"


PREPARE = [sys.executable, str(BASIC / "cifar_data" / "prepare.py")]


def command(*arguments, **environment):
    """Run `python cifar_data/prepare.py ...` from elsewhere, as the launcher does."""
    return subprocess.run(
        [*PREPARE, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def listing(folder):
    """Every path below a folder, and when it was last changed."""
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*")}


def assert_whole(folder):
    assert sorted(path.name for path in folder.iterdir()) == FILES
    for split in ("train", "test"):
        images, labels = (np.load(folder / f"{split}_{part}.npy") for part in ("images", "labels"))
        assert images.dtype == np.uint8
        assert images.shape == (len(labels), 3, 32, 32)
        assert labels.dtype == np.int64
