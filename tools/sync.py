#!/usr/bin/env python3
"""Keep the copies in the example folders the same: basic/ holds the originals.

Usage:
    python tools/sync.py            # copy them to the other folders
    python tools/sync.py --check    # exit with 1 and name the files, where one byte differs
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ORIGINALS = ROOT / "basic"
SHARED = ("cifar_utils.py", "run.sh", "requirements.txt", ".gitignore", "cifar_data", "rounds", "launcher")


def shared_files(folder: Path) -> dict[str, Path]:
    """The files under the shared names, by their path in the folder."""
    found = [path for name in SHARED for path in [folder / name, *(folder / name).rglob("*")]]
    return {str(path.relative_to(folder)): path for path in found if path.is_file() and "__pycache__" not in path.parts}


def differences() -> list[tuple[Path | None, Path]]:
    """Pairs of (original, copy) that are not the same; the original is None where the copy has none."""
    originals = shared_files(ORIGINALS)
    pairs: list[tuple[Path | None, Path]] = [(originals["requirements.txt"], ROOT / "requirements.txt")]
    for folder in sorted(path.parent for path in ROOT.glob("*/server.py") if path.parent != ORIGINALS):
        pairs += [(path, folder / name) for name, path in originals.items()]
        pairs += [(None, path) for name, path in shared_files(folder).items() if name not in originals]
    return [(original, copy) for original, copy in pairs if original is None or not same(original, copy)]


def same(original: Path, copy: Path) -> bool:
    if copy.is_symlink() or not copy.is_file() or original.stat().st_mode != copy.stat().st_mode:
        return False
    return original.read_bytes() == copy.read_bytes()


def main() -> int:
    found = differences()
    if "--check" in sys.argv[1:]:
        for original, copy in found:
            fault = f"differs from {original.relative_to(ROOT)}" if original else "has no original in basic/"
            print(f"{copy.relative_to(ROOT)} {fault}", file=sys.stderr)
        return 1 if found else 0
    for original, copy in found:
        if original is None:
            copy.unlink()
        else:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.unlink(missing_ok=True)  # it may be a link
            shutil.copy2(original, copy)
        print(f"{'removed' if original is None else 'copied'} {copy.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
