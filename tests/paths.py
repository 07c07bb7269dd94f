"""Where things are; importing this lets a test import the modules of `basic` as the example itself does."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASIC = ROOT / "basic"
ADVANCED = ROOT / "advanced_example"

if str(BASIC) not in sys.path:
    sys.path.insert(0, str(BASIC))
