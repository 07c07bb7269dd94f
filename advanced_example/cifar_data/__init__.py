"""Finds and reads the data sets that prepare.py makes: CIFAR-10, and the drawn stand-in for where it can't be had.

DATA_DIR/<name>/ holds {train,test}_images.npy, uint8 (N, 3, 32, 32), {train,test}_labels.npy, int64 (N,), meta.json.
"""

import json
import os
import tempfile
from pathlib import Path

DATASETS = ("auto", "cifar10", "synthetic")


def data_dir() -> Path:
    """Return DATA_DIR, else flower-cifar10 in the user's cache. Raises RuntimeError for the home of an unknown user."""
    if chosen := os.environ.get("DATA_DIR"):
        return Path(chosen).expanduser().absolute()
    # XDG says to ignore a relative path. Without HOME, "~" stays as it is.
    caches = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache"), tempfile.gettempdir()
    return Path(next(filter(os.path.isabs, caches)), "flower-cifar10")


def find(name: str) -> dict[str, str] | None:
    """Return the `name`, `source` and `folder` of a ready data set, and an empty `reason`; None if it isn't ready.

    "auto" finds CIFAR-10 only. Raises ValueError for an unknown name.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: there are {', '.join(DATASETS)}")
    folder = data_dir() / ("cifar10" if name == "auto" else name)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return {"name": meta["name"], "source": meta["source"], "folder": str(folder), "reason": ""}
    except (OSError, ValueError, TypeError, KeyError):  # not there, or not whole
        return None


def load_split(split: str, name: str = "") -> tuple:
    """Return the "train" or "test" split of a data set as arrays: images, uint8 (N, 3, 32, 32), and labels, int64 (N,).

    It is the data set `name`, else the one that DATASET names; by "auto", CIFAR-10 if it is ready, else the stand-in.
    Only images that are indexed are read. Raises FileNotFoundError if it isn't ready, ValueError for bad files.
    """
    import numpy as np  # here, since the launcher imports this file before any package is installed

    wanted = name or os.environ.get("DATASET") or "auto"
    data = find(wanted) or (find("synthetic") if wanted == "auto" else None)
    if data is None:
        raise FileNotFoundError(f"{wanted} is not ready in {data_dir()}: run `python cifar_utils.py {wanted}` first")
    if wanted == "auto":
        os.environ["DATASET"] = data["name"]  # this process reads no other from now on, and a reply can say which
    folder = Path(data["folder"])
    try:
        return np.load(folder / f"{split}_images.npy", mmap_mode="r"), np.load(folder / f"{split}_labels.npy")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"can't read {split}: {error}. Remove {folder} to have it made again") from error
