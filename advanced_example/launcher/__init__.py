"""The machinery that starts, watches and stops a run; nothing here has to be read to learn federated learning."""

import os
import tempfile
from pathlib import Path

DATASETS = ("auto", "cifar10", "synthetic")


def data_dir() -> Path:
    """The folder that holds the prepared data sets: DATA_DIR, else flower-cifar10 in the user's cache."""
    if os.environ.get("DATA_DIR"):
        return Path(os.environ["DATA_DIR"]).expanduser().absolute()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flower-cifar10"
    except RuntimeError:  # no HOME, and no entry in the user database
        return Path(tempfile.gettempdir()) / "flower-cifar10"
