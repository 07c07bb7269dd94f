"""Makes a data set ready on disk, once: downloads CIFAR-10, or draws the stand-in where it can't be had.

`python cifar_data/prepare.py [auto|cifar10|synthetic]` says which it is.
"""

import fcntl
import json
import os
import shutil
import signal
import socket
import sys
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

import numpy as np

if __name__ == "__main__":  # run by its path, Python looks for modules in this folder, not in the one above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cifar_data import data_dir, find
from cifar_data.shapes import draw_shapes

ANSWER, SILENCE = 5.0, 20.0  # seconds to wait for a server's first answer, and for its next byte


def prepare(name: str = "auto") -> dict[str, str]:
    """Make a data set ready and return what `find` says of it. Any number of processes may call it at once.

    "auto" takes the stand-in where CIFAR-10 can't be had, and gives the `reason`. Raises ValueError for an unknown
    name, and RuntimeError, with what to do, where the data can't be had or written.
    """
    if name == "auto":
        try:
            return prepare("cifar10")
        except RuntimeError as error:
            return {**prepare("synthetic"), "reason": str(error)}
    if data := find(name):  # before the lock: a folder that can't be written to can still be used
        return data
    root = data_dir()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".lock").open("w") as lock:  # one process at a time
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                for leftover in root.glob(f".{name}-*"):  # left by a process that was killed in here
                    shutil.rmtree(leftover, ignore_errors=True)
            except OSError as error:
                say(f"WARNING: {root} has no file locks ({error}): let one run at a time prepare data there")
            if not find(name):  # no other process has made it while this one waited
                if (root / name).exists() and any((root / name).iterdir()):  # not ours to remove
                    raise OSError(f"{root / name} holds something else")
                with TemporaryDirectory(prefix=f".{name}-", dir=root, ignore_cleanup_errors=True) as temporary:
                    _make(name, Path(temporary))
                    Path(temporary, name).rename(root / name)  # others see a whole one or none
    except OSError as error:
        raise RuntimeError(f"can't prepare the data in {root}: {error}. DATA_DIR=... takes another folder") from error
    return find(name)


def _make(name: str, temporary: Path) -> None:
    if name == "cifar10":
        splits, source = _download(temporary), "torchvision"
    else:
        splits = {"train": draw_shapes(12_000, seed=1), "test": draw_shapes(2_000, seed=2)}
        source = "drawn shapes, seeds 1 and 2"
    out = temporary / name
    out.mkdir()
    for split, (images, labels) in splits.items():
        np.save(out / f"{split}_images.npy", images)
        np.save(out / f"{split}_labels.npy", labels)
    (out / "meta.json").write_text(json.dumps({"name": name, "source": source}) + "\n")


def _download(temporary: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    from torchvision.datasets import CIFAR10  # takes 1.5 s to import, so only where it is needed

    CIFAR10.url = os.environ.get("CIFAR10_URL") or CIFAR10.url  # a mirror; the checksum stays CIFAR-10's
    say(f"Downloading CIFAR-10 (163 MiB, once) from {CIFAR10.url}")
    socket.setdefaulttimeout(SILENCE)
    try:
        # In a thread, which can be left behind: without a network, looking up a name may take a minute.
        ThreadPool(1).apply_async(lambda: urlopen(CIFAR10.url).close()).get(ANSWER)
        sets = {split: CIFAR10(temporary, train=split == "train", download=True) for split in ("train", "test")}
    except Exception as error:  # whatever urllib, tarfile or the checksum has to say
        raise RuntimeError(
            f"CIFAR-10 could not be downloaded from {CIFAR10.url} ({str(error) or type(error).__name__}); "
            "the next run tries again; CIFAR10_URL=... names a mirror; DATASET=synthetic avoids the download"
        ) from error
    return {split: (s.data.transpose(0, 3, 1, 2), np.asarray(s.targets, np.int64)) for split, s in sets.items()}


def say(text: str) -> None:
    """Print a line; a terminal or a pipe that has gone must not end the work."""
    with suppress(OSError):
        print(text, flush=True)


def main(arguments: list[str]) -> str | None:
    """Prepare the data set that the argument names and say which it is; return the error, if there is one."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, _: sys.exit(128 + number))  # removes the temporary folder
    try:
        data = prepare(*arguments)
    except (OSError, RuntimeError, ValueError) as error:
        return f"error: {error}"
    say(f"{data['name']} is ready in {data['folder']} ({data['source']})")
    if data["reason"]:
        say(f"WARNING: this is not CIFAR-10. {data['reason']}")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
