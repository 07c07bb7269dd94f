"""A copy of `basic` for tests of its environment, whose packages are wheels of a few lines."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from paths import BASIC

LINE = "tiny-thing==1.0"  # what requirements.txt says to begin with
SHOW = "import sys, tiny_thing; print(tiny_thing.__name__, sys.prefix, *sys.argv[1:])"
COMMAND = "import sys\n\n\ndef main():\n    print(sys.prefix)\n"  # what the console script of each package runs
UV = shutil.which("uv", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}")  # comes with Flower
USERS = re.compile(r"(PIP|UV)_|(PYTHON|PYTHONPATH|TORCH_BACKEND|(all|https?)_proxy)$", re.IGNORECASE)


def make_wheel(folder, version, name="tiny-thing", content=COMMAND, needs=(), files=()):
    """Make the smallest thing that can be installed, and return its path."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    files = {
        f"{module}.py": content,
        f"{info}/METADATA": "\n".join(
            [
                "Metadata-Version: 2.1",
                f"Name: {name}",
                f"Version: {version}",
                *(f"Requires-Dist: {need}" for need in needs),
            ]
        ),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[console_scripts]\n{name} = {module}:main\n",
        **dict(files),
        f"{info}/RECORD": "",
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (0o100755 if "scripts" in name else 0o100644) << 16
            wheel.writestr(entry, text, zipfile.ZIP_DEFLATED)
    return path


class Copy:
    """A copy of `basic`, alone in a path with a space, whose requirements are in a folder of wheels."""

    def __init__(self, root: Path, disk: Path | None = None) -> None:
        self.root = root
        self.folder = (disk or root) / "my project" / "basic"
        self.wheels = root / "wheels"
        self.path = root / "path"  # nothing but uv
        self.path.mkdir()
        (self.path / "uv").symlink_to(UV)
        shutil.copytree(BASIC / "launcher", self.folder / "launcher", ignore=shutil.ignore_patterns("__pycache__"))
        make_wheel(self.wheels, "1.0")
        self.require(LINE)

    @property
    def venv(self):
        return self.folder / ".venv"

    def require(self, *lines):
        (self.folder / "requirements.txt").write_text("\n".join(["# what the example needs", "", *lines, ""]))

    def without_uv(self):
        (self.path / "uv").unlink()

    def patch(self, code):
        """Run a line in each Python before anything else."""
        (self.root / "patch").mkdir()
        (self.root / "patch" / "sitecustomize.py").write_text(code)
        return {"PYTHONPATH": str(self.root / "patch")}

    def start(self, code=SHOW, wheels=None, python=sys.executable, stdout=subprocess.PIPE, **environment):
        """Start `python launcher/environment.py requirements.txt -c CODE word`, from another folder."""
        settings = {key: value for key, value in os.environ.items() if not USERS.match(key)}
        settings |= {"PATH": str(self.path), "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1"}
        settings |= {"UV_NO_CONFIG": "1", "UV_CACHE_DIR": str(self.root / "cache"), "UV_LINK_MODE": "copy"}
        if "PIP_INDEX_URL" not in environment and "UV_DEFAULT_INDEX" not in environment:
            settings |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels or self.wheels)}
        return subprocess.Popen(
            [python, self.folder / "launcher" / "environment.py", "requirements.txt", "-c", code, "word"],
            env=settings | environment,
            cwd=self.folder.parent,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments, **options):
        process = self.start(*arguments, **options)
        out, err = process.communicate()
        return process.returncode, out, err

    def offline(self, *arguments, **options):
        """As `run`, but nothing would be found."""
        return self.run(*arguments, wheels=self.root / "nowhere", **options)

    def script(self, name="tiny-thing"):
        """What a package's command prints."""
        done = subprocess.run([self.venv / "bin" / name], capture_output=True, text=True)
        return done.stdout.strip() or done.stderr

    def works(self):
        """What `start` prints in the copy's environment."""
        return f"tiny_thing {self.venv} word"
