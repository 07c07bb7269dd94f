"""./run.sh, as far as it must not start anything: wrong arguments, --help, --dry-run."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from paths import BASIC, ROOT
from runs import OURS, copy_example

from launcher import arguments, commands


def folders():
    return sorted([*BASIC.iterdir(), *BASIC.glob("runs/*")])


def ask(*words, script=ROOT / "run.sh", **environment):
    """Run a command that must not start anything; return (exit status, stdout, stderr)."""
    clean = {key: value for key, value in os.environ.items() if key not in OURS}
    before = folders()
    done = subprocess.run(
        [script, *words],
        env={**clean, "PYTHON": sys.executable, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert folders() == before
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["0"], "CLIENTS must be a whole number from 1 to 1000000, not '0'"),
        (["-1"], "CLIENTS must be a whole number from 1 to 1000000, not '-1'"),
        (["1.5"], "not '1.5'"),
        (["basic", "x"], "CLIENTS must be a whole number from 1 to 1000000, not 'x'"),
        (["3", "3", "3", "3", "3"], "5 numbers, but there are 4 to give: CLIENTS MIN_CLIENTS SAMPLED ROUNDS"),
        (["5", "3", "4"], "SAMPLED (4) is more than MIN_CLIENTS (3)"),
        (["3", "4"], "MIN_CLIENTS (4) is more than CLIENTS (3)"),
        (["learning_rate=0.1"], "unknown key 'learning_rate'; there are min-clients, sampled-clients"),
        (["batch-size=many"], "batch-size must be a whole number from 1 to 100000, not 'many'"),
        (["--fast"], "unrecognized arguments: --fast; ./run.sh --help lists what there is"),
        (["x"], "there is no example 'x'; there are: "),
        (["tests"], "there is no example 'tests'; there are: "),
        (["../basic"], "there is no example '../basic'; there are: "),
        (["3x"], "CLIENTS must be a whole number from 1 to 1000000, not '3x'"),
    ],
)
def test_wrong_arguments_end_with_2_before_anything_starts(words, said):
    status, out, err = ask(*words)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert len(err.splitlines()) == 1


def test_the_folder_s_own_command_says_the_same():
    status, out, err = ask("x", script=BASIC / "run.sh")
    assert (status, out, err) == (2, "", "error: CLIENTS must be a whole number from 1 to 1000000, not 'x'\n")


@pytest.mark.parametrize("words", [["--help"], ["basic", "-h"], ["0", "nonsense", "--help"]])
def test_help_goes_to_stdout(words):
    status, out, err = ask(*words)
    assert (status, err) == (0, "")
    assert out.startswith("usage: ./run.sh [CLIENTS]")
    assert "learning-rate=0." in out  # with its default
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ENGINE": "ray"}, "ENGINE must be one of deployment, simulation, not 'ray'"),
        ({"DATASET": "mnist"}, "DATASET must be one of auto, cifar10, synthetic, not 'mnist'"),
        ({"PORT": "http"}, "PORT must be a whole number from 1 to 65535, not 'http'"),
        ({"SECURE": "1"}, "SECURE=1 is for an example that makes keys: advanced_example"),
    ],
)
def test_a_wrong_environment_ends_with_2(environment, said):
    status, out, err = ask(**environment)
    assert (status, out) == (2, "")
    assert said in err


def test_the_ports_of_flower_s_own_superlink_are_left_to_it(monkeypatch):
    """Else a `flwr run` without the launcher would find this run's SuperLink there, and send it its app."""
    free = iter([40001, 39091, 40002, 39093, 40003])

    def create_server(address):
        name = "127.0.0.1", next(free)
        return contextlib.nullcontext(SimpleNamespace(getsockname=lambda: name))

    monkeypatch.setattr(commands.socket, "create_server", create_server)
    assert commands.ports(arguments.parse(["2"], BASIC, {})) == [40001, 40002, 40003]


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("engine", ["deployment", "simulation"])
def test_a_dry_run_prints_every_command_and_starts_nothing(tmp_path, engine, warm):
    variables = {"ENGINE": engine, "PORT": "12345", "DATA_DIR": str(tmp_path / "data"), "WARM": str(int(warm))}
    status, out, err = ask("4", "3", "2", "--dry-run", **variables)
    assert (status, err) == (0, "")
    commands = [line.split()[1:] for line in out.splitlines() if line.startswith("+ ")]
    clients = 4 if engine == "deployment" else 0
    programs = ["flower-superlink", *["flower-supernode"] * clients, "flwr"]
    assert [command[0] for command in commands[1:]] == programs
    assert "auto" in commands[0]
    assert "12345" in commands[1]
    assert "sampled-clients = 2" in out
    assert ("--simulation" in commands[1]) == (engine == "simulation")
    assert list(tmp_path.iterdir()) == []


EXTENSION = """import dataclasses


def check(settings):
    return dataclasses.replace(settings, config={**settings.config, "seed": 7})


def dry_run(run):
    print(f"and then {run.settings.example}")


def superlink_arguments(run):
    return ["--for-the", "server"]


def supernode_arguments(run, partition_id):
    return ["--client", str(partition_id)]


def connection(run):
    return {"root-certificates": "ca.crt"}


def federation(run):
    return {"client-resources-num-cpus": 3, "init-args-num-cpus": None}
"""


@pytest.mark.parametrize("engine", ["deployment", "simulation"])
def test_an_extension_changes_what_is_started(tmp_path, engine):
    folder = copy_example("basic", tmp_path / "mine")
    (folder / "more.py").write_text(EXTENSION)
    path = folder / "pyproject.toml"
    path.write_text(path.read_text().replace("[tool.launcher]", '[tool.launcher]\nextension = "more"'))
    status, out, err = ask("2", "--dry-run", script=folder / "run.sh", ENGINE=engine)
    assert (status, err) == (0, "")
    assert out.endswith("\nand then basic\n")
    for line in ("seed = 7", 'root-certificates = "ca.crt"'):
        assert line in out.splitlines()
    started = "\n".join(line for line in out.splitlines() if line.startswith("+ "))
    assert "flower-superlink --for-the server --host" in started
    if engine == "deployment":
        assert re.findall("flower-supernode --client (.) ", started) == ["0", "1"]
        assert ask("2", "--dry-run", script=folder / "run.sh", SECURE="1")[0] == 0  # it says how to trust
    else:
        assert "--federation-config 'num-supernodes=2 client-resources-num-cpus=3'" in started


# --- Folders that a user has made or changed -------------------------------------------------------------------------


@pytest.fixture
def collection(tmp_path):
    """The collection's run.sh, with an example of the user's own beside it: 2nd_try."""
    shutil.copy(ROOT / "run.sh", tmp_path)
    return copy_example("basic", tmp_path / "2nd_try").parent


def test_an_example_s_name_may_begin_with_a_digit(collection):
    status, out, err = ask("2nd_try", "5", "--dry-run", script=collection / "run.sh")
    assert (status, err) == (0, "")
    assert f"flwr run {collection / '2nd_try'}" in out
    assert out.count("+ flower-supernode") == 5
    assert ask("2nd", script=collection / "run.sh")[2].startswith("error: there is no example ")


@pytest.mark.parametrize("name", ["\N{BLACK SPADE SUIT}", "a 'b' \"c\" $HOME;#", "--help", "n=1"])
def test_a_folder_s_name_may_be_anything(tmp_path, name):
    folder = copy_example("basic", tmp_path / name)
    status, out, err = ask("2", "--dry-run", script=folder / "run.sh", DATASET="synthetic")
    assert (status, err) == (0, "")
    assert out.count("+ flower-supernode") == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: "\ufeff" + text, "can't be read: Invalid statement (at line 1, column 1)"),
        (lambda text: text.replace("learning-rate = 0.02", "learning-rate = 0,02"), "can't be read: "),
        (lambda text: text.replace("min-clients = 3", ""), "lacks 'min-clients': compare it with the one of `basic`"),
        (lambda text: text.replace("seed = 2026", 'seed = "s"'), "can't be read: "),
        (lambda text: text.replace("[tool.launcher]", '[tool.launcher]\nextension = "none"'), "there is no none.py"),
        (lambda text: text.replace("[tool.launcher.values]", "[tool.launcher.values]\nsead = [1, 2]"), "lacks 'sead'"),
    ],
)
def test_a_broken_pyproject_ends_with_2_and_one_line(tmp_path, change, said):
    folder = copy_example("basic", tmp_path / "mine")
    path = folder / "pyproject.toml"
    text = path.read_text()
    path.write_text(change(text))
    assert path.read_text() != text
    status, out, err = ask(script=folder / "run.sh")
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("key", ["clients", "dataset", "engine", "values", "keys", "description", "opt.lr", "runs"])
def test_a_key_of_the_user_s_own_is_only_that(tmp_path, key):
    folder = copy_example("basic", tmp_path / "mine")
    path = folder / "pyproject.toml"
    path.write_text(path.read_text().replace("seed = 2026", f"seed = 2026\n{key} = 7"))
    plain = ask("2", "--dry-run", script=folder / "run.sh", PORT="12345")[1]
    status, out, err = ask("2", f"{key}=8", "--dry-run", script=folder / "run.sh", PORT="12345")
    assert (status, err) == (0, "")
    changed = set(out.splitlines()) ^ set(plain.splitlines())
    name = f'"{key}"' if "." in key else key
    ports = {line for line in changed if "flower-super" in line}  # free ones, drawn anew
    assert changed - ports == {f"{name} = 7", f"{name} = 8"}
