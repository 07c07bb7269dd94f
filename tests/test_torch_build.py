"""Which build of PyTorch is installed, from indexes on localhost, with packages of a few lines."""

import datetime
import http.server
import re
import ssl
import sys
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from environment_helpers import Copy, make_wheel

BUILD = "import torch; print(torch.BUILD)"


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


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
    said = out.splitlines()[1:]
    assert said[0] == "uv can't use PyTorch's own index: taking the usual build (on Linux, the one for GPUs)"
    assert said[-1] == "usual"


def test_a_build_that_was_asked_for_is_not_replaced(copy, index):
    index.pytorch = "refuses"
    status, _, err = copy.run(BUILD, **index.settings(), TORCH_BACKEND="cpu")
    assert status == 1
    assert err.startswith("error: can't install with TORCH_BACKEND=cpu:\n")
    assert "Failed to fetch: https://" in err  # uv's own reason
    assert not (copy.venv / "bin" / "torch").exists()


def test_the_user_s_index_is_pip_s_too(copy, index):
    settings = index.settings()
    settings["PIP_INDEX_URL"] = settings.pop("UV_DEFAULT_INDEX")
    status, out, err = copy.run(BUILD, **settings)
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] != "usual"
