"""run_isolated: whatever becomes of the child, the caller is told, and the child is gone."""

import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import child_work
import pytest
from edits import edit
from paths import ROOT

FOLDER = ROOT / "multiprocessing"
sys.path.append(str(FOLDER))  # behind basic, whose rooms are the same

from isolation import FORK_SERVER, ChildDied, run_isolated  # noqa: E402

CALLER = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with SIGINT ignored
sys.path[:0] = sys.argv[2:]
import child_work
from isolation import run_isolated
if __name__ == "__main__":
    run_isolated(child_work.hang, Path(sys.argv[1]))
"""


def start_server(*addresses: Path, at_once: int = 0, folder: Path = FOLDER) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(folder / "fork_server.py"), str(at_once), *map(str, addresses)])


def copy_server(folder: Path, *modules: str) -> Path:
    """Copy the fork server into a folder, and let it import other modules, or none, which takes no time."""
    for name in ("fork_server.py", "child.py"):
        shutil.copy(FOLDER / name, folder / name)
    edit(
        folder / "fork_server.py",
        ('MODULES = ("torch", "torch._dynamo", "cifar_utils", "work")', f"MODULES = {modules}"),
    )
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[bytes]]:
    """A fork server for all of these tests, as the launcher starts one for a run."""
    address = tmp_path_factory.mktemp("server") / "socket"
    process = start_server(address)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FORK_SERVER, str(address))
        yield process
    process.terminate()
    process.wait()


@pytest.fixture(autouse=True)
def no_child_is_left(server: subprocess.Popen[bytes]) -> Iterator[None]:
    """Neither a process that runs on nor a zombie: a child is gone as soon as the call has returned."""
    yield
    if server.poll() is None:
        assert children(server.pid) == []


def children(pid: int) -> list[int]:
    """The processes, zombies too, whose parent is `pid`."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- What comes back -------------------------------------------------------------------------------------------------


def test_the_result_comes_back_from_another_process() -> None:
    data, pid = run_isolated(child_work.echo, b"abc")
    assert data == b"abc"
    assert pid != os.getpid()
    assert not alive(pid)


def test_each_call_has_a_child_of_its_own() -> None:
    run_isolated(child_work.set_variable, "MARK")
    assert run_isolated(child_work.variable, "MARK") is None


def test_the_child_sees_the_callers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray may tell an actor by CUDA_VISIBLE_DEVICES which GPU is its own; the fork server can't know it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert run_isolated(child_work.variable, "CUDA_VISIBLE_DEVICES") == "5"
    given = {**os.environ, "MARK": "given"}
    assert run_isolated(child_work.variable, "MARK", environment=given) == "given"
    assert run_isolated(child_work.variable, "MARK") is None


def test_large_arguments_and_results_cross() -> None:
    data = os.urandom(2**20) * 64  # far more than a pipe or a socket holds
    assert run_isolated(child_work.echo, data)[0] == data


def test_calls_at_once() -> None:
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda i: run_isolated(child_work.add, i, 1), range(32))) == list(range(1, 33))


def test_a_process_that_the_child_leaves_does_not_hold_the_call_up() -> None:
    pid = run_isolated(child_work.leave_a_process_behind)
    assert alive(pid)
    os.kill(pid, signal.SIGKILL)


# --- What goes wrong in the child ------------------------------------------------------------------------------------


def test_an_exception_is_raised_with_the_childs_traceback() -> None:
    with pytest.raises(KeyError, match="lost") as caught:
        run_isolated(child_work.fail, KeyError("lost"))
    (note,) = caught.value.__notes__
    assert note.startswith("In the child process:\nTraceback")
    assert "child_work.py" in note
    assert "raise error" in note


def test_an_exception_that_can_not_be_made_again_keeps_its_words() -> None:
    with pytest.raises(RuntimeError, match=r"^Stubborn: 7: no") as caught:
        run_isolated(child_work.fail_stubbornly)
    assert "fail_stubbornly" in caught.value.__notes__[0]


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt()])
def test_what_was_meant_for_the_child_alone_does_not_end_the_caller(error: BaseException) -> None:
    with pytest.raises(RuntimeError, match=type(error).__name__):
        run_isolated(child_work.fail, error)


def test_an_error_of_pytorchs_does_not_bring_pytorch_with_it() -> None:
    """To unpickle it, the caller would import PyTorch, some hundred MiB for good: it comes as a RuntimeError."""
    program = """
import sys
sys.path[:0] = sys.argv[1:]
import child_work
from isolation import run_isolated
for work in (child_work.fail_like_cuda, child_work.fail_with_a_tensor):
    try:
        run_isolated(work)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", "torch" in sys.modules, len(error.__notes__))
"""
    command = [sys.executable, "-c", program, str(FOLDER), str(ROOT / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        "RuntimeError: OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. False 1",
        "RuntimeError: ValueError: tensor([1.]) False 1",
    ]


def test_a_result_that_can_not_be_pickled() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError), match=r"make_function.*lambda"):
        run_isolated(child_work.make_function)


def test_a_function_that_can_not_be_pickled() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        run_isolated(lambda: None)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGTERM"])
def test_a_killed_child_is_an_error_that_names_the_signal(name: str) -> None:
    with pytest.raises(ChildDied, match=rf"^kill_itself: the child process was killed by {name}"):
        run_isolated(child_work.kill_itself, signal.Signals[name])


@pytest.mark.parametrize("status", [0, 3])
def test_a_child_that_leaves_without_a_result(status: int) -> None:
    with pytest.raises(ChildDied, match=rf"left with status {status}, without a result"):
        run_isolated(child_work.leave, status)


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of memory works on Linux alone")
def test_a_child_that_allocates_too_much() -> None:
    assert run_isolated(child_work.allocate, 50, memory=100) == 50 * 2**20
    with pytest.raises(MemoryError):
        run_isolated(child_work.allocate, 200, memory=100)
    with pytest.raises(RuntimeError, match="memory"):
        run_isolated(child_work.allocate_tensor, 200, memory=100)
    with pytest.raises(MemoryError):  # with nothing left to put the error into words
        run_isolated(child_work.fill_memory, memory=20)
    assert run_isolated(child_work.allocate, 200) == 200 * 2**20


def test_a_child_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"^hang was ended: it took longer than 0\.5 s$"):
        run_isolated(child_work.hang, tmp_path / "pid", timeout=0.5)


def test_a_time_limit_that_is_kept() -> None:
    assert run_isolated(child_work.add, 1, 2, timeout=60) == 3


# --- What goes wrong in the caller, and in the fork server -----------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_child_goes_with_its_caller(number: int, tmp_path: Path, server: subprocess.Popen[bytes]) -> None:
    """A SIGINT raises KeyboardInterrupt in the caller, which ends the child; after a SIGKILL the fork server does."""
    (tmp_path / "caller.py").write_text(CALLER)
    command = [sys.executable, str(tmp_path / "caller.py"), str(tmp_path / "pid"), str(FOLDER), str(ROOT / "tests")]
    with (tmp_path / "stderr").open("w") as stderr:
        caller = subprocess.Popen(command, stderr=stderr)
        wait_until((tmp_path / "pid").exists)
        child = int((tmp_path / "pid").read_text())
        assert children(server.pid) == [child]
        caller.send_signal(number)
        assert caller.wait(30) == -number
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in (tmp_path / "stderr").read_text()
        assert not alive(child)
    wait_until(lambda: not children(server.pid))


def test_without_a_fork_server_a_program_starts_one_and_stops_it(tmp_path: Path) -> None:
    program = """
import os, sys
sys.path[:0] = sys.argv[1:]
import child_work
from isolation import run_isolated
print(run_isolated(child_work.add, 1, 2), os.environ["FLOWER_EXAMPLE_FORK_SERVER"])
"""
    (tmp_path / "program.py").write_text(program)
    clean = {key: value for key, value in os.environ.items() if key != FORK_SERVER}
    command = [sys.executable, str(tmp_path / "program.py"), str(FOLDER), str(ROOT / "tests")]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=60)
    result, address = done.stdout.split()
    assert (done.returncode, result, done.stderr) == (0, "3", "")
    assert not Path(address).parent.exists()


@pytest.mark.parametrize("busy", [True, False])
def test_the_fork_server_is_killed(busy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that is at work then has nobody who could tell its status: it is ended, and the caller is told."""
    monkeypatch.setenv(FORK_SERVER, str(tmp_path / "socket"))
    server = start_server(tmp_path / "socket", folder=copy_server(tmp_path))
    assert run_isolated(child_work.add, 1, 2) == 3
    with ThreadPoolExecutor(1) as threads:
        if busy:
            call = threads.submit(run_isolated, child_work.hang, tmp_path / "pid")
            wait_until((tmp_path / "pid").exists)
        server.kill()
        server.wait()
        if not busy:
            call = threads.submit(run_isolated, child_work.add, 1, 2)
        with pytest.raises(ChildDied, match="fork server"):
            call.result(30)
    if busy:
        wait_until(lambda: not alive(int((tmp_path / "pid").read_text())))


# --- GPUs: how many children at once, which GPU a child sees, and whether it could use one ---------------------------


def test_a_gpu_has_no_more_children_at_once_than_it_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each GPU has a socket of its own: `number` says which it is, and the child sees that one alone."""
    sockets = [tmp_path / "a", tmp_path / "b"]
    monkeypatch.setenv(FORK_SERVER, os.pathsep.join(map(str, sockets)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
    server = start_server(*sockets, at_once=2, folder=copy_server(tmp_path))
    try:
        with ThreadPoolExecutor(7) as threads:

            def call(number: int) -> tuple[int, str | None]:
                return run_isolated(child_work.count, tmp_path / str(number % 2), number=number, timeout=60)

            found = list(threads.map(call, [0, 2, 4, 1, 3]))
    finally:
        server.terminate()
        server.wait()
    assert [gpu for _, gpu in found] == ["3"] * 3 + ["GPU-abc"] * 2
    assert max(most for most, _ in found) == 2


def own_server(folder: Path, line: str, **environment: str) -> subprocess.Popen[str]:
    """Start a copy of the fork server that imports PyTorch and a module with one line."""
    copy_server(folder, "torch", "own_model")
    (folder / "own_model.py").write_text(f"import os\n\nimport torch\n\n{line}\n")
    (folder / "nvidia-smi").write_text("#!/bin/sh\necho 6000\n")  # where there is one, there may be a GPU
    (folder / "nvidia-smi").chmod(0o755)
    variables = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **environment}
    command = [sys.executable, str(folder / "fork_server.py"), "0", str(folder / "socket")]
    return subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)


ORDINARY = 'DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")'


def test_a_module_that_uses_cuda_while_it_is_imported_is_named(tmp_path: Path) -> None:
    """Each child would fail on a machine with a GPU. Without NVIDIA's library, as here, is_available() does it, too."""
    server = own_server(tmp_path, ORDINARY)
    _, said = server.communicate(timeout=120)
    assert server.returncode == 1
    assert "error: own_model, or what it imports, uses CUDA while it is imported" in said
    assert not (tmp_path / "socket").exists()


def test_it_does_no_harm_where_no_gpu_is_to_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it imports, the fork server asks the driver and not CUDA."""
    monkeypatch.setenv(FORK_SERVER, str(tmp_path / "socket"))
    check = "PYTORCH_NVML_BASED_CUDA_CHECK"
    line = f'{ORDINARY}\nos.environ["SEEN"] = os.environ["{check}"]'
    with own_server(tmp_path, line, CUDA_VISIBLE_DEVICES="") as server:
        wait_until((tmp_path / "socket").exists)
        assert run_isolated(child_work.variable, "SEEN") == "1"
        assert run_isolated(child_work.variable, check) is None
        server.terminate()


def test_the_folder_does_not_hide_pythons_own_module() -> None:
    """It is called multiprocessing, too: with an __init__.py it would be imported instead."""
    assert not (FOLDER / "__init__.py").exists()
    assert FOLDER not in Path(multiprocessing.__file__).parents
