"""Whatever the user's shell, environment and folder are like, a run does the same and ends with its own status."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from paths import BASIC
from runs import UNPRIVILEGED, Launch, copy_example, environment

from launcher import ending, processes

CLOSED = "http://127.0.0.1:9"  # nothing listens there
ENGINES = ("deployment", "simulation")
ONE_ROUND = (2, 2, 2, 1)


@pytest.fixture
def basic(tmp_path: Path) -> Path:
    return copy_example("basic", tmp_path / "basic")


def edit(file: Path, *pairs: tuple[str, str]) -> None:
    text = file.read_text()
    for old, new in pairs:
        assert text.count(old) == 1, f"{old!r} is not once in {file.name}"
        text = text.replace(old, new)
    file.write_text(text)


# --- Output that nobody can read: of whole runs in test_faults.py and test_resume.py ----------------------------------


def shell(script: str, folder: Path, *words: object, data_dir: Path, **env: str) -> tuple[int, str]:
    """Run a shell's line in which "$@" is ./run.sh; return the exit status, and what came out of it."""
    command = ["bash", "-c", script, "-", folder / "run.sh", *map(str, words)]
    done = subprocess.run(command, env=environment(data_dir, **env), stdout=subprocess.PIPE, text=True, timeout=300)
    return done.returncode, done.stdout


@pytest.mark.parametrize("redirected", ["2>&1 | true", "<&- >&- 2>&-"])
def test_data_is_made_ready_though_nobody_hears(redirected: str, tmp_path: Path) -> None:
    """The launcher starts this with its own output and errors."""
    command = f"'{sys.executable}' '{BASIC}/cifar_data/prepare.py' synthetic {redirected}"
    script = f"sleep 0.1; {command}; exit ${{PIPESTATUS[0]}}"
    env = environment(tmp_path / "data", PYTHONUNBUFFERED="1")
    assert subprocess.run(["bash", "-c", script], env=env).returncode == 0
    assert json.loads((tmp_path / "data/synthetic/meta.json").read_text())["name"] == "synthetic"


@pytest.mark.parametrize(
    ("words", "redirected", "status"),
    [
        (["x"], "2>&-", 2),
        (["x"], "2>&1 | true; exit ${PIPESTATUS[0]}", 2),
        (["--help"], ">&-", 0),
        (["--dry-run"], ">&- 2>&-", 0),
        (["--dry-run"], "| true; exit ${PIPESTATUS[0]}", 0),
        (["1000000"], ">&- 2>&-", 1),
    ],
)
def test_what_is_said_in_place_of_a_run_changes_no_status(
    words, redirected, status, basic: Path, data_dir: Path
) -> None:
    assert shell(f'sleep 0.1; "$@" {redirected}', basic, *words, data_dir=data_dir) == (status, "")


# --- Signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param((signal.SIGINT, signal.SIGTERM), marks=pytest.mark.slow),
        (signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
    ],
)
def test_signals_close_together_end_a_run_once(numbers: tuple[int, ...], basic: Path, data_dir: Path) -> None:
    with Launch(basic, *ONE_ROUND, data_dir=data_dir) as run:
        run.wait_until(lambda: run.pids("flower-superlink"))
        for number in numbers:
            run.process.send_signal(number)
        assert run.wait(20) in [128 + number for number in numbers]
    assert run.history["status"] == "stopped"
    assert 128 + signal.Signals[run.history["reason"]] == run.process.returncode
    assert run.stderr == f"\n{run.history['reason']}: stopping\n"
    assert run.nothing_left()


def test_a_folder_that_can_t_be_written_any_more_keeps_the_status_of_a_signal(basic: Path, data_dir: Path) -> None:
    edit(
        basic / "client.py",
        (
            "    net = load_model(message)\n    config",
            "    __import__('time').sleep(60)\n    net = load_model(message)\n    config",
        ),
    )
    with Launch(basic, 1, 1, 1, 1, data_dir=data_dir, through=UNPRIVILEGED) as run:
        run.wait_until(lambda: "configure_train: Sampled" in run.log("run"))
        for folder in (run.run_dir, run.run_dir / "logs"):
            folder.chmod(0o555)
        run.process.send_signal(signal.SIGINT)
        assert run.wait(20) == 130, run.stderr
    for folder in (run.run_dir, run.run_dir / "logs"):
        folder.chmod(0o755)
    assert "WARNING: history.json could not be written: " in run.stderr
    assert run.nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_signals_at_any_time(engine: str, basic: Path, data_dir: Path) -> None:
    """The earlier, the less there is to look at: before the folder is made, only the status tells."""
    numbers = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
    for i in range(16):
        number = list(numbers)[i % 3]
        with Launch(basic, *ONE_ROUND, data_dir=data_dir, ENGINE=engine) as run:
            time.sleep(0.4 * (i + 1))
            run.process.send_signal(number)
            status = run.wait(30)
        early = {-number, numbers[number]} if number != signal.SIGINT else {-number, 130, 1}
        ended = [path for path in run.run_folders() if path not in run.before]
        if not ended:
            assert status in early, (i, run.stderr)
            continue
        assert status in (numbers[number], 0), (i, run.stderr)
        assert run.nothing_left(), i
        history = run.history
        assert history["status"] == ("completed" if status == 0 else "stopped"), i


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_machine_that_has_slept(engine: str, basic: Path, data_dir: Path) -> None:
    """As a laptop whose lid was closed for more than a minute; Flower gives the run up, or the run goes on."""
    with Launch(basic, 2, 2, 2, 50, data_dir=data_dir, ENGINE=engine) as run:
        run.wait_until(lambda: len(run.history["rounds"]) > 1)
        pids = run.pids("")
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in pids:
                os.kill(pid, number)
            time.sleep(75 if number == signal.SIGSTOP else 0)
        assert run.wait(200) in (0, 1)
    said = re.search(r"The machine was asleep for (\d+) s", run.stderr)
    assert 70 <= int(said[1]) <= 90
    assert run.nothing_left()


# --- Reports ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def ended(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A run that has ended, beside a collection's tools."""
    handlers = {number: signal.getsignal(number) for number in processes.SIGNALS}
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "report.jinja").touch()
    (tmp_path / "tools" / "report.py").write_text("raise SystemExit(3)\n")
    extension = SimpleNamespace(cleanup=lambda run: None)
    settings = SimpleNamespace(folder=tmp_path / "example")
    yield SimpleNamespace(settings=settings, run_dir=tmp_path, history={"rounds": []}, extension=extension)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_report_that_fails_is_only_that(ended: SimpleNamespace, capsys: pytest.CaptureFixture) -> None:
    ending.report(ended)
    assert capsys.readouterr().err == ""

    def fails(run: SimpleNamespace) -> None:
        raise RuntimeError("no")

    ended.extension.cleanup = fails
    ending.report(ended)
    assert capsys.readouterr().err == "WARNING: the picture or the report could not be made: no\n"


def test_a_report_can_be_interrupted_and_has_a_time_limit(ended: SimpleNamespace, capsys, monkeypatch) -> None:
    script = ended.run_dir / "tools" / "report.py"
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(ending, "REPORT_TIMEOUT", 0.5)
    began = time.monotonic()
    ending.report(ended)
    assert "could not be made: " in capsys.readouterr().err
    script.write_text(f"import os, signal, time\nos.kill({os.getpid()}, signal.SIGINT)\ntime.sleep(60)\n")
    monkeypatch.setattr(ending, "REPORT_TIMEOUT", 60)
    ending.report(ended)
    assert capsys.readouterr().err == "stopped before the picture and the report were made\n"
    assert time.monotonic() - began < 20
    assert all(signal.getsignal(number) is processes.ignore for number in processes.SIGNALS)  # the status stands


def test_a_user_s_own_tools_are_not_run(ended: SimpleNamespace) -> None:
    (ended.run_dir / "tools" / "report.jinja").unlink()
    (ended.run_dir / "tools" / "report.py").write_text(f"open('{ended.run_dir}/ran', 'w')\n")
    ending.report(ended)
    assert not (ended.run_dir / "ran").exists()
