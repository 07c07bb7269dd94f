"""Where things are; importing this lets a test import the modules of `basic` as the example itself does."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
BASIC = ROOT / "basic"
ADVANCED = ROOT / "advanced_example"

if str(BASIC) not in sys.path:
    sys.path.insert(0, str(BASIC))


def advanced(name: str) -> ModuleType:
    """Import a module of advanced_example that `basic` has under the same name."""
    spec = importlib.util.spec_from_file_location(f"advanced_{name}", ADVANCED / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
