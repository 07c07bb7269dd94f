"""Finds out why clients compute on the CPU where the machine has a GPU."""

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

ASK = """
import torch
try:
    torch.cuda.init()
    print("PyTorch can use it, and client.py does not")
except Exception as error:
    print(error)
"""


def idle_gpu(device: str, config: Mapping[str, Any]) -> str | None:
    """Return what PyTorch says of the GPU where nvidia-smi lists one and the clients' `device` is "cpu", unasked."""
    if device != "cpu" or config.get("device", "auto") not in ("auto", "cuda") or not (gpu := listed()):
        return None
    done = subprocess.run([sys.executable, "-c", ASK], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    reason = (done.stdout.strip() or "no reason was found").splitlines()[0]
    return f"nvidia-smi lists {gpu}, and the clients compute on the CPU: {reason}"


def listed() -> str | None:
    """Return the name of the first GPU that nvidia-smi lists, unless CUDA_VISIBLE_DEVICES hides them all."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    try:
        done = subprocess.run(query, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line for line in done.stdout.splitlines() if line not in ("", "No devices were found")), None)
