"""Tests what warm.py relies on in Flower: where a SuperNode sleeps. That apps are forked is in test_optional.py."""

import subprocess
import sys
from pathlib import Path

from paths import BASIC

# Loads a module of Flower from copies of its file, in which a text is another, then replaces what warm.py replaces.
REPLACE = """
import importlib.util, sys
from pathlib import Path
from launcher import warm
source = Path(importlib.util.find_spec(warm.SUPERNODE).origin).read_text()
print("installed", warm.replace_sleep())
sys.modules[warm.SUPERNODE] = None  # as if there were none
print("module", warm.replace_sleep())
moved = {"seconds": ("time.sleep(3)", "time.sleep(1)")}
moved["function"] = ("def start_client_internal(", "def start_client(")
for name, change in moved.items():
    assert change[0] in source
    Path(sys.argv[1]).write_text(source.replace(*change))
    spec = importlib.util.spec_from_file_location(warm.SUPERNODE, sys.argv[1])
    sys.modules[warm.SUPERNODE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[warm.SUPERNODE])
    print(name, warm.replace_sleep())
"""


def test_a_sleep_that_has_moved_is_noticed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", REPLACE, str(tmp_path / "moved.py")]
    done = subprocess.run(command, cwd=BASIC, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["installed True", "module False", "seconds False", "function False", ""]
