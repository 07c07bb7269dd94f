"""Finds out why clients compute on the CPU where the machine has a GPU."""

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

LIST = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
TRY = [sys.executable, "-c", "import torch; torch.cuda.init()"]


def idle_gpu(device: str, config: Mapping[str, Any]) -> str | None:
    """Return what PyTorch says of the GPU where nvidia-smi lists one and the clients' `device` is "cpu", unasked."""
    asked = config.get("device", "auto") == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    try:
        listed = [] if asked or device != "cpu" else subprocess.check_output(LIST, text=True, timeout=20).splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    if not listed or listed[0] in ("", "No devices were found"):
        return None
    reason = subprocess.run(TRY, capture_output=True, text=True).stderr.strip().rpartition("\n")[2]
    reason = reason or "PyTorch can use it, and client.py does not"
    return f"nvidia-smi lists {listed[0]}, and the clients compute on the CPU: {reason}"
