"""Whatever the user's shell, environment and folder are like, a run does the same and ends with its own status."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
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


# --- A user's own folder, variables and signals ----------------------------------------------------------------------

OWN = """seed = 2026
clients = 5
dataset = "mine"
engine = 2.5
values = "v"
keys = true
description = "d"
bound = inf
opt.lr = 0.1
opt.decay.steps = 10
"a key" = 1
"""
SEEN = """    seen = {key: repr(value) for key, value in context.run_config.items()}
    (run.folder / "seen.json").write_text(__import__("json").dumps(seen))
"""
# The name of a data set may hold what matplotlib takes for a formula.
DATASET = "price_$^$"


EXTENSION = """from pathlib import Path


def prepare(run):
    (run.run_dir / "hooks").write_text("prepare\\n")


def after_superlink(run):
    with (run.run_dir / "hooks").open("a") as file:
        file.write(f"after {[log.stem for log in (run.run_dir / 'logs').iterdir()]}\\n")


def supernode_arguments(run, partition_id):
    return ["--insecure", "--max-retries", str(10 + partition_id)]


def cleanup(run):
    with (run.run_dir / "hooks").open("a") as file:
        file.write(f"cleanup {run.history['status']} {len(run.history['rounds'])}\\n")
"""


def users_own(folder: Path) -> None:
    """Turn a copy into somebody's project, with keys, a data set, an extension and modules of their own."""
    edit(
        folder / "pyproject.toml",
        ("seed = 2026", OWN),
        ('dataset = "auto"', f'dataset = "{DATASET}"\nextension = "hooks"'),
    )
    (folder / "hooks.py").write_text(EXTENSION)
    for name in ("launch", "partitions", "preflight", "capacity", "security", "machines", "fork_server"):
        (folder / f"{name}.py").write_text("raise SystemExit('nobody has asked for this')\n")
    edit(folder / "cifar_utils.py", ("cifar_data.load_split(split)", "cifar_data.load_split(split, 'synthetic')"))
    with (folder / "server.py").open("a") as file:
        file.write(SEEN)
    (folder / "runs" / "latest").mkdir(parents=True)  # copies that follow links make a folder of it
    (folder / "runs" / "latest" / "mine").touch()


@pytest.fixture(scope="module", params=ENGINES)
def surrounded(request, tmp_path_factory, data_dir: Path) -> Iterator[SimpleNamespace]:
    """A run with other programs' variables, and with signals that its parent has set to be ignored."""
    folder = tmp_path_factory.mktemp("surrounded")
    example = copy_example("basic", folder / "my 'fine' project")
    users_own(example)
    (folder / "theirs").mkdir()
    (folder / "theirs" / "history.json").write_text("not yours")
    after = folder / "after.sh"
    after.write_text(f"#!/bin/sh\ntouch '{folder}/after'\n")
    after.chmod(0o755)
    long = folder / ("t" * 100)
    long.mkdir()
    short = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"), CLOSED)
    variables = {
        **{name.upper(): value for name, value in proxies.items()},
        **proxies,
        "NO_PROXY": "example.org",
        **{"RUN_DIR": str(folder / "theirs"), "AFTER_RUN": str(after), "FORK_SERVER": "/nonexistent"},
        **{"MPLBACKEND": "nonsense", "RAY_ADDRESS": "ray://127.0.0.1:9", "RAY_NAMESPACE": "x"},
        **{"FLWR_HOME": str(folder / "flwr-home"), "XDG_CACHE_HOME": "relative", "CDPATH": "/"},
        "MPLCONFIGDIR": str(data_dir.parent / "matplotlib"),  # it would take the relative path
        **{"PYTHONIOENCODING": "ascii", "TMPDIR": str(long if request.param == "simulation" else short)},
    }
    words = (*ONE_ROUND, "clients=7", "opt.lr=0.2", "a key=3")
    ignoring = ("bash", "-c", "trap '' INT HUP; exec \"$@\"", "-")
    options = {"data_dir": data_dir, "through": ignoring, "ENGINE": request.param, "DATASET": "", **variables}
    with Launch(example, *words, **options) as run:
        run.wait_until(lambda: run.pids("flower-superlink"))
        for number in (signal.SIGHUP, signal.SIGINT):  # as where a terminal closes, and to a job in the background
            os.killpg(run.process.pid, number)
        run.wait()
    yield SimpleNamespace(run=run, engine=request.param, folder=folder, example=example, temporary=(long, short))
    shutil.rmtree(short)


def test_variables_and_ignored_signals_change_nothing(surrounded: SimpleNamespace) -> None:
    run = surrounded.run
    assert run.process.returncode == 0, run.stdout + run.stderr
    assert "WARNING" not in run.stderr
    assert run.history["status"] == "completed"
    assert run.history["rounds"][-1]["evaluate"]["clients"] == 2
    assert run.nothing_left()


def test_it_stays_out_of_other_folders(surrounded: SimpleNamespace) -> None:
    assert sorted(
        path.name for path in surrounded.folder.iterdir() if not re.search(r"\.(out|err)\d+$", path.name)
    ) == [
        "after.sh",
        surrounded.example.name,
        "theirs",
        "t" * 100,
    ]
    assert (surrounded.folder / "theirs" / "history.json").read_text() == "not yours"
    left = [path.name for folder in surrounded.temporary for path in folder.iterdir()]
    assert [name for name in left if not name.startswith("torchinductor_")] == []  # PyTorch keeps that for next time


def test_a_folder_in_the_place_of_the_link_is_left_alone(surrounded: SimpleNamespace) -> None:
    latest = surrounded.example / "runs" / "latest"
    assert [path.name for path in latest.iterdir()] == ["mine"]
    assert sorted(path.name for path in latest.parent.iterdir()) == [surrounded.run.run_dir.name, "latest"]


def test_a_user_s_own_keys_reach_the_app(surrounded: SimpleNamespace) -> None:
    seen = json.loads((surrounded.run.run_dir / "seen.json").read_text())
    expected = {"clients": 7, "dataset": "mine", "engine": 2.5, "values": "v", "keys": True, "description": "d"}
    expected |= {"bound": math.inf, "opt.lr": 0.2, "opt.decay.steps": 10, "a key": 3, "min-clients": 2}
    assert {key: seen.get(key) for key in expected} == {key: repr(value) for key, value in expected.items()}
    assert surrounded.run.history["config"]["bound"] is None  # JSON has no word for infinity
    assert (surrounded.run.history["clients"], surrounded.run.history["engine"]) == (2, surrounded.engine)


def test_the_extension_is_called_in_its_turn(surrounded: SimpleNamespace) -> None:
    hooks = (surrounded.run.run_dir / "hooks").read_text().splitlines()
    assert hooks == ["prepare", "after ['superlink']", "cleanup completed 1"]
    started = [line for line in surrounded.run.stdout.splitlines() if line.startswith("+ flower-supernode")]
    assert ["--max-retries 10" in line for line in started] == [True] * (surrounded.engine == "deployment")


def test_a_name_that_looks_like_a_formula_is_drawn(surrounded: SimpleNamespace) -> None:
    assert surrounded.run.history["dataset"] == DATASET
    assert (surrounded.run.run_dir / "history.png").read_bytes().startswith(b"\x89PNG")


# --- Output that nobody can read -------------------------------------------------------------------------------------


def shell(script: str, folder: Path, *words: object, data_dir: Path, **env: str) -> tuple[int, str]:
    """Run a shell's line in which "$@" is ./run.sh; return the exit status, and what came out of it."""
    command = ["bash", "-c", script, "-", folder / "run.sh", *map(str, words)]
    done = subprocess.run(command, env=environment(data_dir, **env), stdout=subprocess.PIPE, text=True, timeout=300)
    return done.returncode, done.stdout


def only_run(folder: Path) -> dict:
    (found,) = (folder / "runs").glob("2*/history.json")
    return json.loads(found.read_text())


@pytest.mark.parametrize(
    ("script", "lines"),
    [('"$@" <&- >&- 2>&-', 0), ('"$@" 2>&1 | head -1; exit ${PIPESTATUS[0]}', 1)],
    ids=["closed", "pipe"],
)
def test_a_run_that_nobody_hears_completes(script: str, lines: int, basic: Path, data_dir: Path) -> None:
    status, out = shell(script, basic, 1, 1, 1, 1, data_dir=data_dir)
    assert (status, len(out.splitlines())) == (0, lines)
    history = only_run(basic)
    assert (history["status"], len(history["rounds"])) == ("completed", 1)


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
    with Launch(basic, *ONE_ROUND, data_dir=data_dir, through=UNPRIVILEGED) as run:
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
    assert bool(said) == (run.process.returncode == 1), run.stderr
    assert said is None or 70 <= int(said[1]) <= 90
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
