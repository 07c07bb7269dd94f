"""What a run shows while it is under way: on a terminal, and in a file."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from paths import BASIC
from runs import copy_example, environment

from launcher import screen
from rounds import history

SHOW = """
import sys
from pathlib import Path
from launcher import screen
printer = screen.Printer(Path(sys.argv[1]), 200)
printer.show_progress()
printer.show_progress()
screen.say(screen.row({"round": 1, "seconds": 60.0, "train": {"clients": 3, "failures": [], "loss": 2.125}}))
printer.show_progress()
screen.say("WARNING: said on stderr", error=True)
"""
ROW = "    1        3       0       2.125         -         -     60.0"


def in_terminal(command: list[str], columns: int = 80, **env: str) -> tuple[int, str]:
    """Run a command on a terminal of its own; return (exit status, all that the terminal got)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**kept, "TERM": "xterm-256color", **env}
    )
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while chunk := os.read(ours, 65536):
            seen += chunk
    os.close(ours)
    return process.wait(), seen.decode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run: 12 of 100 clients have trained in the second round."""
    (tmp_path / "logs").mkdir()
    history.tell_progress(tmp_path, 1, "train", 0, 100)
    history.tell_progress(tmp_path, 2, "train", 12, 100)
    return tmp_path


def shown(folder: Path, **env: str) -> str:
    status, seen = in_terminal([sys.executable, "-c", SHOW, str(folder)], PYTHONPATH=str(BASIC), **env)
    assert status == 0, seen
    return seen


def test_a_run_on_a_terminal_says_how_far_it_is_and_prints_a_line_a_round(tmp_path: Path, data_dir: Path) -> None:
    folder = copy_example("basic", tmp_path / "basic")
    env = environment(data_dir, ENGINE="deployment")
    status, seen = in_terminal([str(folder / "run.sh"), "1", "1", "1", "2"], **env)
    assert status == 0, seen
    written = re.split(r"(?<=[\r\n])\x1b\[K", seen.replace("\r\n", "\n"))
    passing = [text for text in written if text.endswith("\r")]
    assert any(text.startswith("round 1 of 2, training 0/1, ") for text in passing)
    lines = [text for text in written if text.endswith("\n")]
    assert [line.split()[0] for line in lines if re.match(r" +[12] +1 +0 ", line)] == ["1", "2"]
    assert "basic: 2 rounds" in lines[-1]


def test_the_line_is_cleared_by_the_next_and_written_only_if_it_is_new(folder: Path) -> None:
    clear, progress = "\x1b[K", r"round 2 of 200, training 12/100, \d s\r"
    seen = shown(folder)
    expected = rf"{progress}{ROW}\r\n({progress})?WARNING: said on stderr\r\n"  # a second may be over in the meantime
    assert re.fullmatch(expected, seen.replace(clear, ""))
    assert all(part == "" or part.startswith(clear) for part in re.split(r"(?<=[\r\n])(?!\n)", seen))


def test_it_fits_into_a_narrow_terminal(folder: Path) -> None:
    status, seen = in_terminal([sys.executable, "-c", SHOW, str(folder)], columns=20, PYTHONPATH=str(BASIC))
    assert status == 0
    assert seen.startswith("\x1b[Kround 2 of 200, tra\r")


def test_a_phase_in_which_nobody_is_asked(folder: Path) -> None:
    history.tell_progress(folder, 2, "evaluate", 0, 0)
    assert "round 2 of 200, evaluating 0/0" in shown(folder)


def test_a_terminal_that_can_t_clear_a_line_gets_none(folder: Path) -> None:
    assert shown(folder, TERM="dumb") == f"{ROW}\r\nWARNING: said on stderr\r\n"


def test_no_control_characters_in_a_file(folder: Path) -> None:
    command = [sys.executable, "-c", SHOW, str(folder)]
    env = {**os.environ, "PYTHONPATH": str(BASIC), "TERM": "xterm-256color"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr, done.stdout) == (0, "WARNING: said on stderr\n", f"{ROW}\n")


def test_matplotlib_is_not_imported_before_a_run_is_over() -> None:
    code = "import sys, launcher.run; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(BASIC)}).returncode == 0


@pytest.mark.parametrize("text", ["", "\n", "1 train", "1 train x y\n"])
def test_notes_that_are_not_whole_are_left_out(tmp_path: Path, text: str) -> None:
    assert history.progress(tmp_path) is None
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/progress.log").write_text(text)
    assert history.progress(tmp_path) is None


def entry(number: int, seconds: float = 1.0, **parts: dict) -> dict:
    failures = {"clients": 3, "failures": []}
    return {"round": number, "seconds": seconds, **{phase: {**failures, **said} for phase, said in parts.items()}}


def test_the_columns_of_a_round() -> None:
    """A metric that no JSON can hold is called by its name; one that isn't there is a dash."""
    first = entry(1, 2.0, train={"loss": None}, evaluate={"loss": 1.25, "accuracy": None})
    assert screen.row(first).split() == ["1", "3", "0", "nan", "1.250", "nan", "2.0"]
    server = {**entry(2, train={"loss": 0.5}), "server": {"loss": 9.0}}
    assert screen.row(server).split() == ["2", "3", "0", "0.500", "9.000", "-", "1.0"]
    assert len(screen.HEADER) == len(screen.row(first))


def test_why_a_client_failed_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    failed = {"failures": [{"partition-id": 2, "reason": "ValueError: as always"}]}
    printer = screen.Printer(tmp_path, 3)
    for count in (0, 1, 1, 3):
        history.save(tmp_path, {"rounds": [entry(i + 1, train=failed, evaluate=failed) for i in range(count)]})
        printer.show()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == screen.HEADER
    assert lines[2] == "       client 2: ValueError: as always"
    assert [line.split()[0] for line in (lines[1], *lines[3:])] == ["1", "2", "3"]
    assert all(line.split()[2] == "2" for line in (lines[1], *lines[3:]))
