"""Tells which GPUs a run may use and how full they are, from outside: nvidia-smi is asked, and CUDA stays untouched."""

import os
import subprocess
from collections.abc import Mapping

Free = dict[str, float | None]  # MiB by the name of a GPU in CUDA_VISIBLE_DEVICES; None where nobody tells


def visible() -> Free:
    """Return the free memory of each GPU that CUDA_VISIBLE_DEVICES leaves, in its order; {} where there is none.

    A GPU goes by its number, or by the UUID that stands there. Of a part of one (MIG-...) the memory isn't known.
    """
    free, chosen = [_number(word) for word in _ask("memory.free")], os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return {str(i): mib for i, mib in enumerate(free)}
    uuids = _ask("uuid") if free and "GPU-" in chosen else []
    found: Free = {}
    for word in (word.strip() for word in chosen.split(",") if free):
        by_uuid = zip(uuids if word.startswith("GPU-") else (), free, strict=False)
        same = [mib for uuid, mib in by_uuid if uuid.startswith(word)]
        if word.isdecimal() and int(word) < len(free):
            found[word] = free[int(word)]
        elif word.startswith("MIG-") or len(same) == 1:
            found[word] = same[0] if same else None
        else:  # CUDA, too, stops at the first that there is not
            break
    return found


def in_use(before: Mapping[str, float | None]) -> float | None:
    """Return the MiB that are in use beyond those `before`, on the GPU where they are most; None if nobody tells."""
    now = visible()
    taken = [mib - now[name] for name, mib in before.items() if mib is not None and now.get(name) is not None]
    return max(taken, default=None)


def _ask(what: str) -> list[str]:
    """Return what nvidia-smi says of each GPU, in the order of their numbers."""
    query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):  # there is none, or no driver
        return []
    lines = [line.strip() for line in said.stdout.splitlines()]
    return [] if lines[:1] == ["No devices were found"] else lines


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:  # [N/A], where GPU and CPU share their memory
        return None
