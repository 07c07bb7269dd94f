"""How an environment is found or made, with packages of a few lines, from a folder or an index on localhost."""

import datetime
import errno
import http.server
import os
import pty
import re
import shutil
import ssl
import subprocess
import sys
import sysconfig
import threading
import zipfile
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from paths import BASIC, ROOT

LINE = "tiny-thing==1.0"  # what requirements.txt says to begin with
SHOW = "import sys, tiny_thing; print(tiny_thing.__name__, sys.prefix, *sys.argv[1:])"
BUILD = "import torch; print(torch.BUILD)"
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


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A copy whose environment is made, by its first command; with what that printed."""
    copy = Copy(tmp_path_factory.mktemp("made"))
    return copy, copy.run()


@pytest.fixture
def ready(made):
    """The copy with its environment, as it was after the first command."""
    copy, (status, _, err) = made
    assert status == 0, err
    copy.require(LINE)
    return copy


# --- Made once -------------------------------------------------------------------------------------------------------


def test_the_first_command_makes_it_and_says_so(made):
    copy, (status, out, err) = made
    assert (status, err) == (0, "")
    first, second, last = out.splitlines()
    assert first == f"Setting up {copy.venv}, once"
    assert second == f"Installing {copy.folder / 'requirements.txt'}: little to download, seconds"
    assert last == copy.works()
    assert (copy.folder / ".venv.lock").read_text() == ""
    assert list(copy.venv.glob("lib/python3*/site-packages/__pycache__/tiny_thing.*.pyc"))


def test_the_second_command_starts_at_once(ready):
    assert ready.offline() == (0, ready.works() + "\n", "")


def test_the_exit_status_is_the_command_s(ready):
    assert ready.offline("raise SystemExit(7)") == (7, "", "")


@pytest.mark.parametrize("named", [True, False], ids=["PYTHON", "active"])
def test_an_interpreter_that_has_the_packages_is_used_as_it_is(ready, named):
    """The scripts start whatever PYTHON or PATH name: an active environment's python3."""
    elsewhere = ready.venv.rename(ready.folder / "elsewhere")
    try:
        python = str(elsewhere / "bin" / "python3")
        status, out, _ = ready.offline(python=python, **({"PYTHON": python} if named else {}))
        assert (status, out) == (0, f"tiny_thing {elsewhere} word\n")
        assert not ready.venv.exists()
    finally:
        elsewhere.rename(ready.venv)


def test_an_active_environment_without_the_packages_is_left_alone(copy):
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, copy.root / "active"], check=True)
    before = sorted((copy.root / "active").rglob("*"))
    status, out, err = copy.run(python=copy.root / "active" / "bin" / "python3")
    assert (status, out.splitlines()[-1]) == (0, copy.works()), err
    assert sorted((copy.root / "active").rglob("*")) == before


def test_the_examples_of_a_collection_share_one(copy):
    root = copy.folder.parent
    (root / "tools").mkdir()
    (root / "tools" / "sync.py").touch()
    shutil.copytree(copy.folder, root / "another")
    shutil.copy(copy.folder / "requirements.txt", root)
    status, out, err = copy.run()
    assert (status, out.splitlines()[-1]) == (0, f"tiny_thing {root / '.venv'} word"), err
    copy.folder = root / "another"
    assert copy.offline() == (0, f"tiny_thing {root / '.venv'} word\n", "")


def test_a_changed_requirement_is_installed(ready):
    show = "import importlib.metadata; print(importlib.metadata.version('other-thing'))"
    for version, line in (("1.0", "other-thing"), ("1.10", "other-thing >= 1.9  # newer than 1.0")):
        make_wheel(ready.wheels, version, "other-thing")
        ready.require(LINE, line)
        status, out, err = ready.run(show)
        assert (status, out.splitlines()[-1], err) == (0, version, "")
        assert "Setting up" not in out  # it is added to what is there
        assert ready.offline(show) == (0, f"{version}\n", "")


@pytest.mark.parametrize(
    "line",
    [
        "tiny-thing==1.0.0",
        "tiny_thing",
        "Tiny.Thing>=1",
        "tiny-thing[extra]==1.*",
        "tiny-thing ~= 1.0",
        "tiny-thing>=0.9,<2",
        'nothing-like-it; python_version < "3"',
        "--no-index",
        "-i https://example.org/simple",
    ],
)
def test_ways_to_write_what_is_there(ready, line):
    """Each ends, and does not ask uv where it need not."""
    ready.require(line, "tiny-thing")
    assert ready.offline() == (0, ready.works() + "\n", "")


def test_a_requirement_that_is_never_met_does_not_go_round_for_ever(ready):
    """uv takes it for a file, we for a name."""
    shutil.copy(ready.wheels / "tiny_thing-1.0-py3-none-any.whl", ready.folder.parent)
    ready.require("./tiny_thing-1.0-py3-none-any.whl", "tiny_thing-1.0-py3-none-any.whl")
    status, _, err = ready.run()
    assert status == 1
    assert "still lacks tiny_thing-1.0-py3-none-any.whl" in err


def test_a_terminal_shows_the_progress(copy):
    ours, theirs = pty.openpty()
    process = copy.start(stdout=theirs)
    os.close(theirs)
    _, err = process.communicate()
    os.close(ours)
    assert process.returncode == 0
    assert "Installed 1 package" in err  # uv's own display


# --- Which PyTorch ---------------------------------------------------------------------------------------------------


on_linux = pytest.mark.skipif(sys.platform == "darwin", reason="macOS has one build")


class Index(http.server.ThreadingHTTPServer):
    """A proxy that answers for every host: as PyTorch's index, with a torch for each build, or as the usual index."""

    daemon_threads = True
    usual = "packages.example"
    pytorch = "answers"  # or "refuses", or "hangs"

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(certificate(folder))
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def settings(self):
        proxy = f"http://127.0.0.1:{self.server_port}"
        return {"HTTPS_PROXY": proxy, "UV_INSECURE_HOST": "*", "UV_DEFAULT_INDEX": f"https://{self.usual}/simple/usual"}

    def wheel(self, build, name):
        if name == "torch":
            version = "9.0" if build == "usual" else f"9.0+{build}"
            needs = [f"{'nvidia' if build == 'usual' else 'other'}-thing-{number}" for number in range(10)]
            return make_wheel(self.folder, version, "torch", f"BUILD = {build!r}\n", needs)
        return make_wheel(self.folder, "1.0", name)


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_CONNECT(self):
        if self.server.usual not in self.path and self.server.pytorch != "answers":
            if self.server.pytorch == "hangs":
                self.server.closing.wait(60)
            self.close_connection = True
            return
        self.send_response(200)
        self.end_headers()
        self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)

    def do_GET(self):
        """Answer /whl/BUILD/PACKAGE/ with a page that names a wheel, and /whl/BUILD/PACKAGE/FILE with the wheel."""
        _, _, build, name, file = self.path.split("/")
        path = self.server.wheel(build, name)
        page = f'<!DOCTYPE html><html><body><a href="{path.name.replace("+", "%2B")}">{path.name}</a></body></html>'
        body = path.read_bytes() if file else page.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/zip" if file else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


def certificate(folder):
    """Make a certificate that signs itself, with its key in the same file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a test")])
    today, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, today - day, today + day).sign(key, hashes.SHA256())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path = folder / "certificate.pem"
    path.write_bytes(made.public_bytes(pem) + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return path


@pytest.fixture
def index(tmp_path, copy):
    copy.require("torch>=9")  # newer than what the tests run with
    (tmp_path / "index").mkdir()
    with Index(tmp_path / "index") as index:
        yield index
        index.closing.set()
        index.shutdown()


@on_linux
@pytest.mark.parametrize(
    ("settings", "build"),
    [
        ({}, "cpu"),
        ({"UV_CUDA_DRIVER_VERSION": "580.1"}, "cu1.*"),  # as on a machine with a GPU
        ({"TORCH_BACKEND": "cu128"}, "cu128"),
        ({"TORCH_BACKEND": "cpu", "UV_CUDA_DRIVER_VERSION": "580.1"}, "cpu"),
        ({"UV_TORCH_BACKEND": "cu126"}, "cu126"),
    ],
)
def test_the_build_that_fits(copy, index, settings, build):
    if not settings and Path("/proc/driver/nvidia").exists():
        build = "cu1.*"
    status, out, err = copy.run(BUILD, **index.settings(), **settings)
    assert (status, err) == (0, "")
    assert re.fullmatch(build, out.splitlines()[-1])
    assert "1.5 GB on disk" in out


@on_linux
@pytest.mark.parametrize(
    ("pytorch", "settings"),
    [
        ("refuses", {}),
        ("refuses", {"TORCH_BACKEND": "auto"}),
        ("refuses", {"UV_TORCH_BACKEND": "auto"}),
        pytest.param("hangs", {}, marks=pytest.mark.slow),
    ],
)
def test_the_usual_build_where_pytorch_s_own_index_does_not_answer(copy, index, pytorch, settings):
    index.pytorch = pytorch
    status, out, err = copy.run(BUILD, **index.settings(), **settings)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert re.match(r"PyTorch's own index can't be used \(\w.*\): its usual build comes", lines[1])
    assert "6 GB on disk" in lines[2]
    assert lines[3:] == ["usual"]


def test_a_build_that_was_asked_for_is_not_replaced(copy, index):
    index.pytorch = "refuses"
    status, _, err = copy.run(BUILD, **index.settings(), TORCH_BACKEND="cpu")
    assert status == 1
    assert "Failed to fetch: https://" in err
    assert err.splitlines()[-1] == "can't install with TORCH_BACKEND=cpu, for the reason above"


def test_macos_has_no_choice_to_make(copy, index):
    status, out, err = copy.run(BUILD, **index.settings(), **copy.patch("import sys; sys.platform = 'darwin'"))
    assert (status, out.splitlines()[-1]) == (0, "usual"), err


def test_the_user_s_index_is_pip_s_too(copy, index):
    settings = index.settings()
    settings["PIP_INDEX_URL"] = settings.pop("UV_DEFAULT_INDEX")
    status, out, err = copy.run(BUILD, **settings)
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] != "usual"


# --- Where there is no uv --------------------------------------------------------------------------------------------


def test_pip_puts_uv_into_the_environment(copy):
    copy.without_uv()
    script = f'#!/bin/sh\nexec "{UV}" "$@"\n'
    make_wheel(
        copy.wheels, "1.0", "uv", files={"uv-1.0.data/scripts/uv": script, "uv-1.0.dist-info/entry_points.txt": ""}
    )
    status, out, err = copy.run()
    assert (status, out.splitlines()[-1], err) == (0, copy.works(), "")
    assert "with pip" not in out
    check_moved(copy)


@pytest.mark.parametrize("uv", ["none", pytest.param("broken", marks=pytest.mark.slow)])
def test_pip_installs_where_uv_cannot(copy, uv):
    copy.without_uv()
    if uv == "broken":  # as pyenv's is, where another Python has it
        (copy.path / "uv").write_text("#!/bin/sh\necho 'error: not in this version of Python' >&2\nexit 127\n")
        (copy.path / "uv").chmod(0o755)
    status, out, err = copy.run()
    assert (status, out.splitlines()[-1], err) == (0, copy.works(), "")
    assert "with pip, in minutes, since uv can't (" in out
    assert copy.script() == str(copy.venv)
    assert (copy.folder / ".venv.lock").read_text() == str(copy.venv / "bin" / "python")  # it can't be moved
    assert copy.offline() == (0, copy.works() + "\n", "")


# --- Moved, broken off, or made twice at once ------------------------------------------------------------------------


def check_moved(copy):
    """Move the folder: its environment still works, and its scripts are those of the new place."""
    assert copy.script() == str(copy.venv)
    old = copy.folder
    copy.folder = old.rename(old.with_name("a new name"))
    assert copy.offline() == (0, copy.works() + "\n", "")
    assert copy.script() == str(copy.venv)
    shutil.copytree(copy.folder, old, symlinks=True)  # what is left at the old place is not used
    assert copy.script() == str(copy.venv)
    activate = 'PATH=/usr/bin:/bin && . "$1"/bin/activate && command -v python'
    shell = subprocess.run(["bash", "-c", activate, "bash", copy.venv], capture_output=True, text=True)
    assert shell.stdout.strip() == str(copy.venv / "bin" / "python"), shell.stderr


def test_a_folder_that_is_moved(copy):
    assert copy.run()[0] == 0
    check_moved(copy)


def test_one_that_cannot_be_moved_is_made_again(copy):
    assert copy.run()[0] == 0
    (copy.folder / ".venv.lock").write_text("/where it was/.venv/bin/python")
    (copy.venv / "leftover").touch()
    status, out, err = copy.run()
    assert (status, out.splitlines()[-1]) == (0, copy.works()), err
    assert not (copy.venv / "leftover").exists()


@pytest.mark.parametrize("inside", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_was_broken_off_is_made_again(copy, inside):
    """Also where the half-made one is active."""
    status, _, err = copy.offline()
    assert status == 1
    assert "Traceback" not in err
    assert re.search(
        r"^error: can't install .*, see above: no network, or no disk space \([\d.]+ GB free\)\?$", err, re.M
    )
    assert "tiny-thing" in err
    (copy.venv / "leftover").touch()
    assert (copy.folder / ".venv.lock").read_text() == "unfinished"

    status, out, err = copy.run(python=copy.venv / "bin" / "python" if inside else sys.executable)
    assert (status, out.splitlines()[-1]) == (0, copy.works()), err
    assert not (copy.venv / "leftover").exists()
    assert (copy.folder / ".venv.lock").read_text() == ""


def test_two_at_once_where_the_old_python_is_gone(copy):
    (copy.venv / "bin").mkdir(parents=True)
    (copy.venv / "bin" / "python").symlink_to(copy.folder / "gone")
    ended = [(process.communicate(), process.returncode) for process in [copy.start(), copy.start()]]
    assert [status for _, status in ended] == [0, 0], ended
    assert [out.splitlines()[-1] for (out, _), _ in ended] == [copy.works()] * 2
    assert sum("Setting up" in out for (out, _), _ in ended) == 1


def test_a_disk_without_locks(copy):
    no_locks = "import fcntl\ndef flock(*_): raise OSError(37, 'No locks available')\nfcntl.flock = flock\n"
    status, out, err = copy.run(**copy.patch(no_locks))
    assert (status, out.splitlines()[-1]) == (0, copy.works())
    assert err.splitlines()[0].startswith(f"WARNING: can't lock {copy.folder} (No locks available)")


# --- Clear errors ----------------------------------------------------------------------------------------------------


def test_python_without_the_packages_is_a_clear_error(copy):
    status, out, err = copy.run(PYTHON=sys.executable)
    assert (status, out) == (1, "")
    assert err.startswith(f"error: PYTHON={sys.executable} lacks tiny-thing==1.0: `pip install -r ")
    assert not copy.venv.exists()


def interpreters():
    """Pythons on this machine that are older than 3.11."""
    installed = Path(sys.base_prefix).parent.glob("3.*/bin/python")  # where pyenv puts them side by side
    found = [str(path) for path in installed if re.search(r"/3\.([6-9]|10)\.", str(path))]
    return found or [path for minor in range(6, 11) if (path := shutil.which(f"python3.{minor}"))]


@pytest.mark.parametrize("script", [BASIC / "run.sh", ROOT / "run.sh", ROOT / "test.sh"])
@pytest.mark.parametrize("python", ["old", "missing", "not executable", "a folder"])
def test_a_python_that_cannot_be_used_is_one_sentence(script, python, tmp_path):
    if python == "old" and not interpreters():
        pytest.skip("there is no Python before 3.11 here")
    (tmp_path / "python").touch(mode=0o644)
    named = {"missing": "/nowhere/python3", "not executable": str(tmp_path / "python"), "a folder": str(tmp_path)}
    named = named.get(python) or interpreters()[0]
    done = subprocess.run([script], env={**os.environ, "PYTHON": named}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    fault = "is missing or older than Python 3.11" if python in ("old", "missing") else "can't be executed"
    assert line.startswith(f"error: {named} {fault}: ")


def test_a_python_without_venv_is_a_clear_error(copy, tmp_path):
    """As on a Debian without python3-venv: the module is there, and does not work."""
    copy.without_uv()
    (tmp_path / "broken" / "venv").mkdir(parents=True)
    (tmp_path / "broken" / "venv" / "__init__.py").write_text("raise ImportError('no ensurepip')\n")
    code, _, err = copy.run(PYTHONPATH=str(tmp_path / "broken"))
    assert code == 1
    assert f"can't make {copy.venv}, for the reason above" in err
    assert "python3-venv" in err


def test_a_folder_that_may_not_be_written_to(small_disk, tmp_path):
    copy = Copy(tmp_path, small_disk)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    status, out, err = copy.run()
    assert (status, out) == (1, "")
    assert err == f"error: can't write to {copy.folder}: copy it to a place of your own, and start it there\n"


def test_a_disk_that_is_full(small_disk, tmp_path):
    copy = Copy(tmp_path, small_disk)
    make_wheel(copy.wheels, "1.0", files={"big": "0" * 30_000_000})
    status, _, err = copy.run()
    assert status == 1
    assert os.strerror(errno.ENOSPC) in " ".join(err.split())  # uv breaks long lines
    assert err.splitlines()[-1].startswith("error: can't install")
    assert "Traceback" not in err
