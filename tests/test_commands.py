"""./run.sh, as far as it must not start anything: wrong arguments, --help, --dry-run."""

import os
import subprocess
import sys

import pytest
from paths import BASIC, ROOT


def folders():
    return sorted([*BASIC.iterdir(), *BASIC.glob("runs/*")])


def ask(*words, script=ROOT / "run.sh", **environment):
    """Run a command that must not start anything; return (exit status, stdout, stderr)."""
    clean = {key: value for key, value in os.environ.items() if key not in ("ENGINE", "DATASET", "PORT", "SECURE")}
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
        (["batch-size=many"], "batch-size must be a whole number, such as"),
        (["--fast"], "unknown option --fast; ./run.sh --help lists them"),
        (["x"], "there is no example 'x'; there are: "),
        (["tests"], "there is no example 'tests'; there are: "),
        (["../basic"], "there is no example '../basic'; there are: "),
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
        ({"ENGINE": "ray"}, "ENGINE=ray: there are deployment and simulation"),
        ({"DATASET": "mnist"}, "DATASET=mnist: there are auto, cifar10, synthetic"),
        ({"PORT": "http"}, "PORT=http: a port is a number from 1 to 65535"),
        (
            {"SECURE": "1"},
            "SECURE=1 needs a security.py in this folder: copy the one of advanced_example",
        ),
    ],
)
def test_a_wrong_environment_ends_with_2(environment, said):
    status, out, err = ask(**environment)
    assert (status, out) == (2, "")
    assert said in err


@pytest.mark.parametrize("engine", ["deployment", "simulation"])
def test_a_dry_run_prints_every_command_and_starts_nothing(tmp_path, engine):
    status, out, err = ask("4", "3", "2", "--dry-run", ENGINE=engine, PORT="12345", DATA_DIR=str(tmp_path / "data"))
    assert (status, err) == (0, "")
    commands = [line.split()[1:] for line in out.splitlines() if line.startswith("+ ")]
    programs = ["flower-superlink", *["flower-supernode"] * (4 if engine == "deployment" else 0), "flwr"]
    assert [command[0] for command in commands[1:]] == programs
    assert commands[0][-2:] == [str(BASIC / "cifar_utils.py"), "auto"]
    assert "12345" in commands[1]
    assert "sampled-clients = 2" in out
    assert ("--simulation" in commands[1]) == (engine == "simulation")
    assert list(tmp_path.iterdir()) == []
