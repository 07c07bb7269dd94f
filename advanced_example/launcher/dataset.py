"""Makes a data set ready on disk, once, and reads it: CIFAR-10, or the drawn stand-in where it can't be had.

DATA_DIR/<name>/ holds {train,test}_images.npy, uint8 (N, 3, 32, 32), {train,test}_labels.npy, int64 (N,), meta.json.
"""

import json
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

import numpy as np

from launcher import DATASETS, data_dir
from launcher.standin import draw_shapes

SPLITS = ("train", "test")
RETRY_AFTER = 24 * 3600.0  # seconds for which "auto" does not try a failed download again
Arrays = tuple[np.ndarray, np.ndarray]


def find(name: str) -> dict[str, str] | None:
    """A ready data set's `name`, `source`, `folder`, and, where it stands in for another, the `reason`; else None."""
    if name == "auto":
        if data := find("cifar10"):
            return data
        failure = data_dir() / "cifar10.failed"
        fresh = failure.is_file() and time.time() - failure.stat().st_mtime < RETRY_AFTER
        data = find("synthetic") if fresh else None
        return data and {**data, "reason": failure.read_text().strip()}
    folder = data_dir() / name
    try:
        return {**json.loads((folder / "meta.json").read_text()), "folder": str(folder), "reason": ""}
    except (OSError, ValueError, TypeError):  # not there, or not whole
        return None


def prepare(name: str = "auto") -> dict[str, str]:
    """Make a data set ready and return what `find` says of it. Any number of processes may call it at once.

    "auto" takes CIFAR-10 where it is on disk or can be downloaded, else the stand-in. Raises ValueError for an unknown
    name and RuntimeError, with what to do, where the data can't be had or written.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: there are {', '.join(DATASETS)}")
    from filelock import FileLock  # comes with torch

    root = data_dir()
    try:
        if data := find(name):  # before the lock: a folder that can't be written to can still be used
            return data
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".lock"):
            if name == "auto" and not find("auto"):
                try:
                    _make("cifar10", root)
                except RuntimeError as error:
                    _make("synthetic", root)
                    (root / "cifar10.failed").write_text(f"{error}\n")
            elif not find(name):
                _make(name, root)
    except OSError as error:
        raise RuntimeError(f"can't prepare the data in {root}: {error}. DATA_DIR=... takes another folder") from error
    return find(name)


def _make(name: str, root: Path) -> None:
    """Write everything into a temporary folder, then rename it: others see a whole data set or none."""
    if find(name):
        return
    for leftover in root.glob(f".{name}-*"):  # of a process that was killed: whoever is here has the lock
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    try:
        arrays, source = (_download if name == "cifar10" else _draw)(temporary)
        out = temporary / name
        out.mkdir()
        for split, (images, labels) in zip(SPLITS, arrays, strict=True):
            np.save(out / f"{split}_images.npy", images)
            np.save(out / f"{split}_labels.npy", labels)
        (out / "meta.json").write_text(json.dumps({"name": name, "source": source}) + "\n")
        shutil.rmtree(root / name, ignore_errors=True)  # what is there is not a whole data set
        out.rename(root / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _download(temporary: Path) -> tuple[tuple[Arrays, Arrays], str]:
    from torchvision.datasets import CIFAR10  # takes 1.5 s to import, so only where it is needed

    CIFAR10.url = os.environ.get("CIFAR10_URL") or CIFAR10.url  # a mirror; the checksum stays CIFAR-10's
    print(f"Downloading CIFAR-10 (163 MiB, once) from {CIFAR10.url}", flush=True)
    socket.setdefaulttimeout(20)  # seconds without a byte
    try:
        splits = [CIFAR10(temporary, train=split == "train", download=True) for split in SPLITS]
    except Exception as error:  # whatever urllib, tarfile or the checksum has to say
        if isinstance(error, OSError) and error.errno == 28:  # no space left: the stand-in would not fit either
            raise
        raise RuntimeError(
            f"CIFAR-10 could not be downloaded from {CIFAR10.url} ({str(error) or type(error).__name__}); "
            "DATASET=cifar10 tries again, CIFAR10_URL=... names a mirror, DATASET=synthetic does without"
        ) from error
    arrays = [(s.data.transpose(0, 3, 1, 2), np.asarray(s.targets, dtype=np.int64)) for s in splits]
    return tuple(arrays), "torchvision"


def _draw(temporary: Path) -> tuple[tuple[Arrays, Arrays], str]:
    return (draw_shapes(12_000, seed=1), draw_shapes(2_000, seed=2)), "drawn shapes, seeds 1 and 2"


def load_split(split: str, name: str = "") -> Arrays:
    """The "train" or "test" split: images uint8 (N, 3, 32, 32), labels int64 (N,).

    It is of the data set `name`, by default of the one that DATASET names; without either, of CIFAR-10 where it is
    ready, else of the stand-in. The images are mapped, not read: only the rows that are indexed leave the disk. Raises
    FileNotFoundError where nothing is ready, ValueError where a file is not as it should be.
    """
    wanted = name or os.environ.get("DATASET") or "auto"
    data = find(wanted) or (find("synthetic") if wanted == "auto" else None)
    if data is None:
        raise FileNotFoundError(f"{wanted} is not ready in {data_dir()}: run `python cifar_utils.py {wanted}` first")
    folder = Path(data["folder"])
    try:
        images = np.load(folder / f"{split}_images.npy", mmap_mode="r")
        labels = np.load(folder / f"{split}_labels.npy")
    except ValueError as error:
        raise ValueError(
            f"{folder}: {split} can't be read ({error}). Remove the folder, and it is made again"
        ) from error
    good = images.dtype == np.uint8 and images.shape[1:] == (3, 32, 32) and len(images) > 0
    if not (good and labels.dtype == np.int64 and labels.shape == images.shape[:1]):
        raise ValueError(
            f"{folder}: expected uint8 (N, 3, 32, 32) and int64 (N,); {split} has {images.dtype} {images.shape} and "
            f"{labels.dtype} {labels.shape}. Remove the folder, and it is made again"
        )
    return images, labels


def main(arguments: list[str]) -> str | None:
    """`python cifar_utils.py [NAME]`: make a data set ready, and say which it is; return the error, if there is one."""
    try:
        data = prepare(*arguments[:1])
    except (RuntimeError, ValueError) as error:
        return f"error: {error}"
    print(f"{data['name']} is ready in {data['folder']} ({data['source']})")
    if data["reason"]:
        print(f"WARNING: this is not CIFAR-10. {data['reason']}")
    return None
