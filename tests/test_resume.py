"""A run of advanced_example that was killed goes on, and ends with the same model, bit for bit."""

import contextlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import ON_ONE_CORE, Launch, copy_example, finished

import launch
import resume
from launcher.arguments import parse
from launcher.project import UsageError
from rounds import history
from security import make_keys

# FedAdam has a state, two of three clients are sampled, and there are schedules: all of it must be carried over.
ARGUMENTS = (3, 2, 2, 3, "strategy=fedadam", "server-learning-rate=0.05", "warmup-rounds=2", "decay-rounds=3")
# A command that starts another one, and reads the first line of all that it says.
UNREAD = ("bash", "-c", '"$@" 2>&1 | head -1; exit ${PIPESTATUS[0]}', "-")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Launch:
    """The run that nothing happens to."""
    folder = copy_example("advanced_example", tmp_path_factory.mktemp("whole") / "advanced_example")
    run = finished(folder, *ARGUMENTS, data_dir=data_dir, through=ON_ONE_CORE, ENGINE="simulation")
    assert run.process.returncode == 0, run.stdout + run.stderr
    return run


@pytest.fixture
def advanced(tmp_path: Path) -> Path:
    return copy_example("advanced_example", tmp_path / "advanced_example")


# --- Killed, and resumed ---------------------------------------------------------------------------------------------


def kill_superlink(run: Launch) -> None:
    run.kill(r"flower-superlink")


def kill_server(run: Launch) -> None:
    """The process that server.py runs in."""
    run.kill({"simulation": r"flwr-simulation", "deployment": r"flwr-serverapp"}[run.history["engine"]])


def kill_launcher(run: Launch) -> None:
    run.process.kill()


def kill_everything(run: Launch) -> None:
    """The launcher first, or it would tidy up."""
    os.killpg(run.process.pid, signal.SIGKILL)
    for pid in run.pids(""):
        with contextlib.suppress(ProcessLookupError):  # it has ended with those that were killed before it
            os.kill(pid, signal.SIGKILL)


def interrupt(run: Launch) -> None:
    run.process.send_signal(signal.SIGINT)


def killed_in_round_2(
    folder: Path,
    data_dir: Path,
    kill: Callable[[Launch], None],
    engine: str = "simulation",
    rounds: int = 3,
    more: tuple[str, ...] = (),
) -> Launch:
    """Start a run, and kill something in the middle of round 2, where the clients of this copy wait for that."""
    hold, reached = folder / "hold", folder / "reached"
    client = folder / "client.py"
    text = client.read_text()
    line = "    # 2. Plain PyTorch.\n"
    assert text.count(line) == 1
    wait = f"""    while config["server-round"] == 2 and __import__("os").path.exists({str(hold)!r}):
        open({str(reached)!r}, "w").close()
        __import__("time").sleep(0.05)
"""
    client.write_text(text.replace(line, wait + line))
    hold.touch()
    with Launch(folder, *ARGUMENTS[:3], rounds, *ARGUMENTS[4:], *more, data_dir=data_dir, ENGINE=engine) as run:
        run.wait_until(reached.exists, timeout=150)
        kill(run)
        run.wait()  # in the deployment engine, Flower takes a minute to see that the server's process is gone
    assert run.process.returncode != 0
    hold.unlink()
    return run


def without_times(rounds: list[dict]) -> list[dict]:
    """The rounds, without what is not the same in two runs."""
    return json.loads(json.dumps(rounds), object_hook=lambda d: {key: d[key] for key in d if "seconds" not in key})


@pytest.mark.parametrize(
    ("kill", "rounds", "engine"),
    [
        (kill_everything, 2, "deployment"),  # and it goes on to the end of round 3
        pytest.param(kill_everything, 2, "simulation", marks=pytest.mark.slow),
        pytest.param(kill_superlink, 3, "simulation", marks=pytest.mark.slow),
        pytest.param(kill_server, 3, "simulation", marks=pytest.mark.slow),
        pytest.param(kill_launcher, 3, "simulation", marks=pytest.mark.slow),
        pytest.param(interrupt, 3, "simulation", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_as_if_nothing_had_been(
    kill, rounds: int, engine: str, whole: Launch, advanced: Path, data_dir: Path, tmp_path: Path
) -> None:
    """By whatever name it is called; from another place, too, and though nobody reads on what it says."""
    killed = killed_in_round_2(advanced, data_dir, kill, engine, rounds=rounds)
    assert [entry["round"] for entry in killed.history["rounds"]][:2] == [0, 1]
    assert "model_sha256" not in killed.history
    command = f"To go on after its last whole round: ./run.sh resume={killed.run_dir.name}\n"
    assert (command in killed.stderr) == (kill not in (kill_everything, kill_launcher))
    shutil.rmtree(killed.run_dir / "logs")  # tidied away
    # What clients, server and launcher had begun in round 2 is not there. ROUNDS is the total.
    words = ("resume=latest",) if rounds == 3 else (*ARGUMENTS[:4], f"resume={killed.run_dir.name}")
    variables = {"DATASET": "auto", "ENGINE": engine}
    resumed = finished(advanced, *words, data_dir=data_dir, cwd=tmp_path, through=UNREAD, **variables)
    assert (resumed.process.returncode, len(resumed.stdout.splitlines())) == (0, 1), killed.history
    assert killed.run_folders() == [killed.run_dir]  # the same folder
    assert killed.history["status"] == "completed"
    assert "reason" not in killed.history
    assert without_times(killed.history["rounds"]) == without_times(whole.history["rounds"])
    assert killed.history["model_sha256"] == whole.history["model_sha256"]
    for name in ("best.pt", "model.pt"):
        assert (killed.run_dir / name).read_bytes() == (whole.run_dir / name).read_bytes()
    assert killed.nothing_left()


@pytest.mark.slow
def test_it_goes_on_in_the_deployment_engine(whole: Launch, advanced: Path, data_dir: Path) -> None:
    killed = killed_in_round_2(advanced, data_dir, kill_server, "deployment")
    resumed = finished(advanced, "resume=latest", data_dir=data_dir)
    assert resumed.process.returncode == 0, resumed.stdout + resumed.stderr
    assert killed.history["engine"] == "deployment"
    assert killed.history["model_sha256"] == whole.history["model_sha256"]
    assert (killed.run_dir / "logs-1").is_dir()


@pytest.mark.slow
def test_two_resumes_at_once(advanced: Path, data_dir: Path) -> None:
    """One goes on; the other is refused while that lives, or because nothing is left to do."""
    killed_in_round_2(advanced, data_dir, kill_everything)
    with (
        Launch(advanced, "resume=latest", data_dir=data_dir) as one,
        Launch(advanced, "resume=latest", data_dir=data_dir) as two,
    ):
        assert sorted([one.wait(), two.wait()]) == [0, 2]
        refused = two if two.process.returncode else one
    assert re.fullmatch(r"error: resume: \S+ (is still running|has completed its 3 rounds; .*)\n", refused.stderr)


@pytest.mark.slow
def test_a_completed_run_goes_on_with_more_rounds(whole: Launch, tmp_path: Path, data_dir: Path) -> None:
    """By the folder's name, and from another place; what it has done stays as it was. Nobody else may go on then."""
    folder = shutil.copytree(whole.folder, tmp_path / "copy", symlinks=True)
    name = whole.run_dir.name
    (folder / "resume.py").write_text((folder / "resume.py").read_text().replace("PATIENCE = 15.0", "PATIENCE = 0.5"))
    words = (3, 2, 2, 4, f"resume={name}")
    with Launch(folder, *words, data_dir=data_dir, cwd=tmp_path, ENGINE="simulation") as run:
        run.wait_until(lambda: "+ flwr run" in run.stdout)
        second = finished(folder, *words, data_dir=data_dir, ENGINE="simulation")
        assert run.wait() == 0, run.stdout + run.stderr
    assert (second.process.returncode, second.stderr) == (2, f"error: resume: {name} is still running\n")
    record = json.loads((folder / "runs" / name / "history.json").read_text())
    assert [entry["round"] for entry in record["rounds"]] == [0, 1, 2, 3, 4]
    assert record["rounds"][:4] == whole.history["rounds"]
    assert record["rounds"][4]["train"]["config"]["learning-rate"] == pytest.approx(0.002)  # decay-rounds was 3
    assert record["model_sha256"] != whole.history["model_sha256"]


# --- What is refused -------------------------------------------------------------------------------------------------


def check(folder: Path, *words: object, **environment: str):
    """The settings that these words ask for, as the launcher takes them; then it ends, and with it the lock."""
    locks, claim = [], history.claim
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "claim", lambda folder: locks.append(claim(folder)) or locks[-1])
        try:
            return launch.check(parse([*map(str, words)], folder, environment))
        finally:
            for lock in filter(None, locks):
                os.close(lock)


@pytest.fixture
def copy(whole: Launch, tmp_path: Path) -> Path:
    """A copy of the folder with the run that has completed, which follows links: runs/latest is a folder in it."""
    return shutil.copytree(whole.folder, tmp_path / "copy")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("seed=3",), "seed was 2026"),
        (("strategy=fedavg",), "strategy was fedadam"),
        ((4, 2, 2, 3), "CLIENTS was 3"),
        ((3, 2, 2, 2), "ROUNDS, the total, was 3"),
        ((), "has completed its 3 rounds"),
    ],
)
def test_changed_settings_are_refused(arguments: tuple, words: str, whole: Launch) -> None:
    before = whole.history
    with pytest.raises(UsageError, match=words):
        check(whole.folder, *arguments, "resume=latest")
    assert whole.history == before


def test_another_engine_is_refused(whole: Launch) -> None:
    with pytest.raises(UsageError, match="ENGINE was simulation"):
        check(whole.folder, "resume=latest", ENGINE="deployment")


def test_kept_keys_are_checked_where_they_are_used(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_dir,) = copy.glob("runs/2*")
    history.save(run_dir, {**history.load(run_dir), "engine": "deployment", "secure": True})
    make_keys(run_dir / "keys", 3)
    (run_dir / "keys/server.key").unlink()
    assert check(copy, 3, 2, 2, 5, "resume=latest").secure
    monkeypatch.setattr(resume, "KEEP_KEYS", True)
    with pytest.raises(UsageError, match=r"resume: .*server\.key is missing"):
        check(copy, 3, 2, 2, 5, "resume=latest")


@pytest.mark.parametrize(
    ("status", "checkpoint", "said"),
    [("failed", True, True), ("stopped", True, True), ("completed", True, False), ("failed", False, False)],
)
def test_the_command_that_goes_on_is_said(
    status, checkpoint, said, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = SimpleNamespace(run_dir=tmp_path, history={"status": status, "rounds": []})
    if checkpoint:
        (tmp_path / "checkpoint.pt").touch()
    launch.cleanup(run)
    command = f"To go on after its last whole round: ./run.sh resume={tmp_path.name}\n"
    assert capsys.readouterr() == ("", command if said else "")


def test_a_simulation_can_not_become_secure(copy: Path) -> None:
    (run_dir,) = copy.glob("runs/2*")
    history.save(run_dir, {**history.load(run_dir), "engine": "simulation"})
    with pytest.raises(UsageError, match="which has no connections to secure"):
        check(copy, 3, 2, 2, 5, "resume=latest", SECURE="1")


def test_it_is_said_in_one_line(copy: Path, data_dir: Path) -> None:
    """Of a history.json that was cut off, for one, which no run leaves, but a full disk or a bad copy does."""
    (run_dir,) = copy.glob("runs/2*")
    path = run_dir / "history.json"
    path.write_text(path.read_text()[:-200])
    run = finished(copy, "resume=latest", data_dir=data_dir)
    assert (run.process.returncode, run.stdout) == (2, "")
    assert re.fullmatch(rf"error: resume: {run_dir.name} has no whole history\.json \(.+\), and .*\n", run.stderr)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: [], "has no whole history.json"),
        (lambda record: {**record, "rounds": 3}, "has no whole history.json"),
        (lambda record: {**record, "example": "basic"}, "is a run of basic"),
        (lambda record: {**record, "config": None}, "was not started by ./run.sh, .* lacks config"),
        (lambda record: {k: record[k] for k in record if k not in ("engine", "clients")}, "lacks clients, engine"),
    ],
)
def test_a_history_that_is_no_run_s_is_refused(change: Callable, words: str, copy: Path) -> None:
    (run_dir,) = copy.glob("runs/2*")
    record = history.load(run_dir)
    (run_dir / "history.json").write_text(json.dumps(change(record)))
    with pytest.raises(UsageError, match=words):
        check(copy, 3, 2, 2, 5, "resume=latest")


@pytest.mark.parametrize("name", ["20200101-000000-1", "../../..", "/", "~nosuch/x", "a" * 5000, "latest\n", "loop"])
def test_a_run_that_is_not_there_is_refused(name: str, copy: Path) -> None:
    (copy / "runs" / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="there is no such run"):
        check(copy, f"resume={name}")


def test_no_run_at_all_is_refused(advanced: Path) -> None:
    with pytest.raises(UsageError, match="there is no such run"):
        check(advanced, "resume=latest")
    assert not (advanced / "runs").exists()


# --- What is found, and made ready -----------------------------------------------------------------------------------


def test_latest_is_the_newest_where_it_is_a_folder(copy: Path) -> None:
    """Else a run would go on in the copy that a copy of a link is."""
    assert (copy / "runs/latest").is_dir()
    assert not (copy / "runs/latest").is_symlink()
    (old,) = copy.glob("runs/2*")
    newer = shutil.copytree(old, copy / "runs/29991231-000000-1")
    assert check(copy, 3, 2, 2, 5, "resume=latest").run_dir == newer
    assert check(copy, 3, 2, 2, 5, f"resume={old.name}").run_dir == old
    assert check(copy, 3, 2, 2, 6, f"resume={newer}").run_dir == newer


def test_a_new_run_starts_all_the_same(copy: Path) -> None:
    before = set((copy / "runs").iterdir())
    folder = history.make_run_folder(copy / "runs")
    assert (folder / "logs").is_dir()
    assert set((copy / "runs").iterdir()) == {*before, folder}


def test_what_the_ended_processes_left_is_out_of_the_way(copy: Path) -> None:
    """Logs stay, under another name; what was half-written goes."""
    (run_dir,) = copy.glob("runs/2*")
    (run_dir / "logs-1").mkdir()
    (run_dir / "logs/mark").touch()
    (run_dir / ".checkpoint.pt-123").mkdir()
    settings = check(copy, 3, 2, 2, 5, "resume=latest")
    assert settings.lock is not None
    assert (settings.engine, settings.dataset, settings.clients) == ("simulation", "synthetic", 3)
    assert (settings.rounds, settings.config["resume"], settings.config["strategy"]) == (5, "", "fedadam")
    assert settings.command == history.load(run_dir)["command"]  # not the one with resume=latest
    assert (run_dir / "logs-2/mark").exists()
    assert list((run_dir / "logs").iterdir()) == []
    assert not any((run_dir / name).exists() for name in (".checkpoint.pt-123", "flwr-home"))


def test_a_dry_run_changes_nothing(copy: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in copy.rglob("*"))
    assert check(copy, 3, 2, 2, 5, "resume=latest", "--dry-run").rounds == 5
    assert sorted((path, path.stat().st_mtime_ns) for path in copy.rglob("*")) == before


def test_a_run_whose_processes_are_being_ended_is_waited_for(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_dir,) = copy.glob("runs/2*")
    holder = history.claim(run_dir)
    monkeypatch.setattr(resume, "PATIENCE", 0.2)
    with pytest.raises(UsageError, match="is still running"):
        check(copy, 3, 2, 2, 5, "resume=latest")
    monkeypatch.setattr(resume, "PATIENCE", 10.0)
    threading.Timer(0.3, os.close, [holder]).start()
    assert check(copy, 3, 2, 2, 5, "resume=latest").run_dir == run_dir
