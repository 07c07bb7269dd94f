"""What may be asked of a run: the many cases, straight to the parser. (test_commands.py goes through ./run.sh.)"""

import shlex
import tomllib

import pytest
from paths import BASIC

from launcher.arguments import Settings, command, parse
from launcher.engine import toml
from launcher.values import UsageError

DEFAULTS = tomllib.loads((BASIC / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
RATE = DEFAULTS["learning-rate"]
HUGE = "9" * 5000  # more digits than Python turns into a number


def parsed(*words, **environment):
    settings = parse(list(words), BASIC, environment)
    assert isinstance(settings, Settings)
    return settings


def refused(*words, **environment):
    with pytest.raises(UsageError) as error:
        parse(list(words), BASIC, environment)
    return str(error.value)


def counts(settings):
    return settings.clients, settings.min_clients, settings.sampled, settings.config["num-server-rounds"]


@pytest.mark.parametrize(
    "words", [[], ["5", "4", "2", "7"], ["3", "learning-rate=0.5", "seed=1", "num-server-rounds=2"]]
)
def test_the_command_to_type_for_the_same_run(words):
    settings = parsed(*words, ENGINE="simulation")
    typed = shlex.split(command(settings, "cifar10"))
    assert typed[:3] == ["ENGINE=simulation", "DATASET=cifar10", "./run.sh"]
    repeated = parsed(*typed[3:], ENGINE="simulation")
    assert (repeated.clients, repeated.config) == (settings.clients, settings.config)


# --- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (3, 3, 3, 3)),
        (["1"], (1, 1, 1, 3)),
        (["2"], (2, 2, 2, 3)),
        (["10"], (10, 3, 3, 3)),
        (["10", "2"], (10, 2, 2, 3)),
        (["10", "8"], (10, 8, 3, 3)),
        (["10", "8", "5"], (10, 8, 5, 3)),
        (["10", "8", "5", "2"], (10, 8, 5, 2)),
        (["0010"], (10, 3, 3, 3)),
        (["5", "min-clients=4"], (5, 4, 3, 3)),
        (["2", "num-server-rounds=7"], (2, 2, 2, 7)),
        (["learning-rate=0.1", "5", "-v", "4", "seed=1", "2"], (5, 4, 2, 3)),
        (["1000000"], (1_000_000, 3, 3, 3)),
    ],
)
def test_numbers_and_what_follows_from_them(words, expected):
    assert counts(parsed(*words)) == expected


@pytest.mark.parametrize("word", ["0", "-1", "1.5", "1e3", "", " ", "3 ", "+3", "0x3", "1_0", "٣", "³", "nan", "-inf"])
def test_a_count_is_a_plain_whole_number(word):
    for place, name in enumerate(("CLIENTS", "MIN_CLIENTS", "SAMPLED", "ROUNDS")):
        assert f"{name} must be a whole number from 1 to 1000000" in refused(*["1"] * place, word)


@pytest.mark.parametrize("word", ["1000001", "9" * 30, HUGE, "-" + HUGE])
def test_a_huge_count_is_an_error_of_readable_length(word):
    said = refused(word)
    assert "CLIENTS must be a whole number" in said
    assert len(said) < 200


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["2", "3"], "MIN_CLIENTS (3) is more than CLIENTS (2)"),
        (["3", "min-clients=4"], "MIN_CLIENTS (4) is more than CLIENTS (3)"),
        (["5", "3", "4"], "SAMPLED (4) is more than MIN_CLIENTS (3)"),
        (["sampled-clients=4"], "SAMPLED (4) is more than MIN_CLIENTS (3)"),
        (["min-clients=0"], "min-clients must be a whole number from 1"),
        (["num-server-rounds=-3"], "num-server-rounds must be a whole number from 1"),
    ],
)
def test_counts_that_do_not_fit_together(words, said):
    assert said in refused(*words)


# --- key=value -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("learning-rate=0.02", 0.02),
        ("learning-rate=1", 1.0),
        ("learning-rate=1e-5", 1e-5),
        ("learning-rate=0", 0.0),
        ("learning-rate=10", 10.0),
        ("seed=0", 0),
        ("seed=4294967295", 4294967295),
        ("batch-size=1", 1),
    ],
)
def test_a_value_takes_the_type_of_its_default(pair, value):
    key = pair.partition("=")[0]
    found = parsed(pair).config[key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["learning-rate=10.1"], "learning-rate must be from 0.0 to 10.0, not 10.1"),
        (["learning-rate=-0.1"], "learning-rate must be from 0.0"),
        (["learning-rate=nan"], f"learning-rate must be a number, such as {RATE}, not 'nan'"),
        (["learning-rate=inf"], "must be a number"),
        (["learning-rate="], f"must be a number, such as {RATE}, not ''"),
        (["learning-rate=0.1=0.2"], "not '0.1=0.2'"),
        (["learning-rate"], "CLIENTS must be a whole number"),
        (["batch-size=0"], "batch-size must be from 1 to 100000, not 0"),
        (["batch-size=1.5"], "batch-size must be a whole number, such as"),
        (["batch-size=True"], "must be a whole number"),
        ([f"batch-size={HUGE}"], "must be a whole number"),
        (["seed=4294967296"], "seed must be from 0 to 4294967295"),
        (["seed=-1"], "seed must be from 0"),
        (["seed=1", "seed=1"], "seed is given twice"),
        (["5", "4", "min-clients=4"], "min-clients is given twice"),
        (["1", "1", "1", "1", "num-server-rounds=2"], "num-server-rounds is given twice"),
        (["=1"], "unknown key ''"),
        (["Seed=1"], "unknown key 'Seed'; there are min-clients"),
        (["a\nb=1"], r"unknown key 'a\nb'"),
        (["--seed=1"], "unknown option --seed=1"),
    ],
)
def test_wrong_values(words, said):
    text = refused(*words)
    assert said in text
    assert "\n" not in text
    assert len(text) < 300


# --- The environment -------------------------------------------------------------------------------------------------


def test_the_environment_is_read_and_empty_means_unset():
    assert parsed(ENGINE="simulation", DATASET="synthetic", PORT="65535").port == 65535
    unset = parsed(ENGINE="", DATASET="", PORT="", SECURE="")
    assert (unset.engine, unset.dataset, unset.port) == ("deployment", "auto", None)
    assert parsed(SECURE="0").engine == "deployment"


@pytest.mark.parametrize("port", ["0", "65536", "-1", "80 ", "٨٠", "1.5", HUGE])
def test_a_port_is_a_number(port):
    said = refused(PORT=port)
    assert "a port is a number from 1 to 65535" in said
    assert len(said) < 200


def test_secure_goes_with_the_deployment_engine():
    assert "goes with ENGINE=deployment" in refused(SECURE="1", ENGINE="simulation")


# --- Other examples' types, and the file that Flower reads -----------------------------------------------------------


OTHER = """\
[project]
name = "other"
description = "An example with values of each type"
[tool.flwr.app.config]
min-clients = 1
sampled-clients = 1
num-server-rounds = 1
name = "plain"
strategy = "fedavg"
fast = false
[tool.launcher]
engine = "simulation"
clients = 1
dataset = "own"
[tool.launcher.values]
strategy = ["fedavg", "fedprox"]
"""


@pytest.fixture
def other(tmp_path):
    (tmp_path / "pyproject.toml").write_text(OTHER)
    return tmp_path


@pytest.mark.parametrize(("word", "value"), [("true", True), ("True", True), ("false", False), ("FALSE", False)])
def test_truth_values(other, word, value):
    assert parse([f"fast={word}"], other, {}).config["fast"] is value


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("fast=1", "fast must be true or false, such as false, not '1'"),
        ("fast=", "fast must be true or false"),
        ("strategy=fedsgd", "strategy must be one of fedavg, fedprox, not 'fedsgd'"),
        ("name=\udcff", "name must be"),  # what Python makes of an argument that is not UTF-8
    ],
)
def test_wrong_values_of_other_types(other, pair, said):
    with pytest.raises(UsageError) as error:
        parse([pair], other, {})
    assert said in str(error.value)


def test_an_example_with_its_own_data(other):
    assert parse([], other, {}).dataset == "own"
    assert parse([], other, {"DATASET": "synthetic"}).dataset == "synthetic"


SPECIAL = ["'", '"', '"""', "\\", "\n", "\t", "#", "=", "ü", "\U0001f338", "\x01", "\x7f", "\x85", "\u2028"]


@pytest.mark.parametrize("value", ["", "two words", "true", "1", "x" * 100_000, *SPECIAL, "a".join(SPECIAL)])
def test_text_reaches_flower_as_it_was_typed(other, value):
    config = parse([f"name={value}"], other, {}).config
    assert tomllib.loads(toml(config)) == config


@pytest.mark.parametrize("pair", ["learning-rate=1e-300", "learning-rate=0.1", "learning-rate=1", "seed=4294967295"])
def test_numbers_reach_flower_as_they_were_typed(pair):
    config = parsed(pair).config
    found = tomllib.loads(toml(config))
    assert found == config
    assert [type(value) for value in found.values()] == [type(value) for value in config.values()]
