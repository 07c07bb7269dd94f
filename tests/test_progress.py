"""What a run shows while it is under way: on a terminal of 80 columns, with and without colour, and in a file."""

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
with screen.bar(Path(sys.argv[1]), 200) as show:
    show()
    screen.say(screen.row({"round": 1, "seconds": 60.0, "train": {"clients": 3, "failures": [], "loss": 2.125}}))
    print("WARNING: said on stderr", file=sys.stderr)
"""
COLOUR = re.compile(r"\x1b\[[\d;]*\d[\d;]*m")


def in_terminal(command: list[str], columns: int = 80, **env: str) -> tuple[int, str]:
    """Run a command on a terminal of its own; return (exit status, all that the terminal got)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
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


def plain(seen: str) -> list[str]:
    """The lines that a terminal got, those that were drawn over too, without the codes for colour and cursor."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*\w", "", seen))


def shown(folder: Path, **env: str) -> str:
    status, seen = in_terminal([sys.executable, "-c", SHOW, str(folder)], PYTHONPATH=str(BASIC), **env)
    assert status == 0, seen
    return seen


def test_a_run_on_a_terminal_shows_a_bar_and_a_line_a_round(tmp_path: Path, data_dir: Path) -> None:
    folder = copy_example("basic", tmp_path / "basic")
    env = environment(data_dir, ENGINE="deployment")
    status, seen = in_terminal([str(folder / "run.sh"), "1", "1", "1", "2"], **env)
    assert status == 0, seen
    assert "round 1 of 2, training" in seen
    assert COLOUR.search(seen)
    lines = [line for line in plain(seen) if re.match(r" +[12] +1 +0 ", line)]
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")  # the cursor is back


def test_the_bar_says_where_the_round_is_in_80_columns(folder: Path) -> None:
    seen = shown(folder)
    (text,) = {line for line in plain(seen) if "round 2" in line}
    assert re.fullmatch(r"round 2 of 200, training 12/100 ━*[╸╺]?━+ 0:00:0\d left: -:--:-- *", text)
    assert len(text) <= 80
    assert "WARNING: said on stderr" in seen


def test_the_bar_stands_a_phase_in_which_nobody_is_asked(folder: Path) -> None:
    history.tell_progress(folder, 2, "evaluate", 0, 0)
    assert "round 2 of 200, evaluating 0/0" in shown(folder)


@pytest.mark.parametrize(("env", "bar"), [({"NO_COLOR": "1"}, True), ({"TERM": "dumb"}, False)])
def test_no_colour_where_none_is_wanted(folder: Path, env: dict[str, str], bar: bool) -> None:
    seen = shown(folder, **env)
    assert not re.search(r"\x1b\[[\d;]*[34]\d", seen)  # no colour of text or ground
    assert ("round 2 of 200" in seen) == bar
    assert "    1        3       0       2.125         -         -     60.0" in seen


def test_no_control_characters_in_a_file(folder: Path) -> None:
    command = [sys.executable, "-c", SHOW, str(folder)]
    env = {**os.environ, "PYTHONPATH": str(BASIC), "TERM": "xterm-256color", "FORCE_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "WARNING: said on stderr\n")
    assert done.stdout.removesuffix("\n").isprintable()


def test_rich_is_not_imported_for_a_file() -> None:
    code = "import sys, launcher.run; sys.exit('rich' in sys.modules or 'matplotlib' in sys.modules)"
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
    printer = screen.Printer(tmp_path)
    for count in (0, 1, 1, 3):
        history.save(tmp_path, {"rounds": [entry(i + 1, train=failed, evaluate=failed) for i in range(count)]})
        printer.show()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == screen.HEADER
    assert lines[2] == "       client 2: ValueError: as always"
    assert [line.split()[0] for line in (lines[1], *lines[3:])] == ["1", "2", "3"]
    assert all(line.split()[2] == "2" for line in (lines[1], *lines[3:]))
