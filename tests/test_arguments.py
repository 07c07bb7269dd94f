"""What may be asked of a run: the many cases, straight to the parser. (test_commands.py goes through ./run.sh.)"""

import math
import shlex
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli_w
from paths import BASIC

from launcher import commands, extension
from launcher.arguments import parse
from launcher.project import UsageError

HUGE = "9" * 5000  # more digits than Python turns into a number


def parsed(*words, **environment):
    return parse(list(words), BASIC, environment)


def refused(*words, **environment):
    with pytest.raises(UsageError) as error:
        parse(list(words), BASIC, environment)
    return str(error.value)


def for_flower(settings):
    """The run config as Flower reads it from the file that is written for it."""
    run = SimpleNamespace(settings=settings, extension=extension.load(settings.project), run_dir=Path("run"))
    return tomllib.loads(tomli_w.dumps(commands.files(run, 1)[Path("run/run-config.toml")]))


def counts(settings):
    return settings.clients, settings.min_clients, settings.sampled, settings.config["num-server-rounds"]


@pytest.mark.parametrize(
    ("words", "environment", "command"),
    [
        ([], {}, "./run.sh"),
        (["5", "4", "seed=1"], {"DATASET": "auto", "ENGINE": "", "PORT": "80"}, "DATASET=auto ./run.sh 5 4 seed=1"),
        (["-v"], {"SECURE": "1", "ENGINE": "deployment"}, "ENGINE=deployment SECURE=1 ./run.sh -v"),
    ],
)
def test_the_command_that_was_typed(words, environment, command):
    assert parsed(*words, **environment).command == command


def test_the_command_can_be_pasted(other):
    words = ["opt.lr=0.2", "a key=3", "name=it's $HOME"]
    assert shlex.split(parse(words, other, {}).command) == ["./run.sh", *words]


def test_what_the_user_has_set_is_known():
    assert parsed().given == frozenset()
    assert parsed("5", "4", "seed=1").given == {"CLIENTS", "min-clients", "seed"}
    assert parsed(ENGINE="simulation", DATASET="auto").given == {"ENGINE"}


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


@pytest.mark.parametrize("word", ["0", "-1", "1.5", "1e3", "", " ", "0x3", "³", "nan"])
def test_a_count_is_a_whole_number(word):
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
        (["learning-rate=10.1"], "learning-rate must be a number from 0.0 to 10.0, not '10.1'"),
        (["learning-rate=-0.1"], "learning-rate must be a number from 0.0"),
        (["learning-rate=nan"], "learning-rate must be a number from 0.0 to 10.0, not 'nan'"),
        (["learning-rate=inf"], "learning-rate must be a number from 0.0 to 10.0, not 'inf'"),
        (["learning-rate="], "must be a number from 0.0 to 10.0, not ''"),
        (["learning-rate=0.1=0.2"], "not '0.1=0.2'"),
        (["learning-rate"], "CLIENTS must be a whole number"),
        (["batch-size=0"], "batch-size must be a whole number from 1 to 100000, not '0'"),
        (["batch-size=1.5"], "batch-size must be a whole number from 1 to 100000, not '1.5'"),
        (["batch-size=True"], "must be a whole number"),
        ([f"batch-size={HUGE}"], "must be a whole number"),
        (["seed=4294967296"], "seed must be a whole number from 0 to 4294967295"),
        (["seed=-1"], "seed must be a whole number from 0"),
        ([f"seed={'9' * 4000}"], "seed must be a whole number from 0 to 4294967295"),
        (["=1"], "unknown key ''"),
        (["Seed=1"], "unknown key 'Seed'; there are min-clients"),
        (["a\nb=1"], r"unknown key 'a\nb'"),
        (["--seed=1"], "unrecognized arguments: --seed=1"),
        (["-inf"], "unrecognized arguments: -inf"),
        (["--dry"], "unrecognized arguments: --dry"),  # not an abbreviation
        (["-a\nb"], "unrecognized arguments: -a b"),
        (["-" + "x" * 5000], "unrecognized arguments: -xxx"),
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


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "1.5", HUGE])
def test_a_port_is_a_number(port):
    said = refused(PORT=port)
    assert "PORT must be a whole number from 1 to 65535" in said
    assert len(said) < 200


def test_secure_goes_with_the_deployment_engine():
    assert "goes with ENGINE=deployment" in refused(SECURE="1", ENGINE="simulation")


# --- Other examples' types, and the file that Flower reads -----------------------------------------------------------


CONFIG = """\
min-clients = 1
sampled-clients = 1
num-server-rounds = 1
name = "plain"
strategy = "fedavg"
fast = false
bound = inf
# What the launcher might take for its own, and a table.
clients = 5
dataset = "mine"
engine = 2.5
values = "v"
keys = true
description = "d"
opt.lr = 0.1
opt.decay.steps = 10
"a key" = 1
"""
OTHER = f"""\
[project]
name = "other"
description = "An example with values of each type"
[tool.flwr.app.config]
{CONFIG}
[tool.launcher]
engine = "simulation"
clients = 1
dataset = "own"
[tool.launcher.values]
strategy = ["fedavg", "fedprox"]
opt.lr = [0.0, 1.0]
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
        ("fast=1", "fast must be true or false, not '1'"),
        ("fast=", "fast must be true or false"),
        ("strategy=fedsgd", "strategy must be one of fedavg, fedprox, not 'fedsgd'"),
        ("name=\udcff", "name must be"),  # what Python makes of an argument that is not UTF-8
        ("opt.lr=2", "opt.lr must be a number from 0.0 to 1.0, not '2'"),
        ("opt=2", "unknown key 'opt'; there are min-clients"),
        ("opt.decay=2", "unknown key 'opt.decay'"),
    ],
)
def test_wrong_values_of_other_types(other, pair, said):
    with pytest.raises(UsageError) as error:
        parse([pair], other, {})
    assert said in str(error.value)


def test_an_example_with_its_own_data(other):
    assert parse([], other, {}).dataset == "own"
    assert parse([], other, {"DATASET": "synthetic"}).dataset == "synthetic"
    with pytest.raises(UsageError, match="DATASET must be one of auto, cifar10, synthetic, own, not 'owm'"):
        parse([], other, {"DATASET": "owm"})


def test_a_user_s_own_keys_reach_flower_and_nothing_else(other):
    pairs = ["clients=7", "dataset=a b", "engine=1", "values=w", "keys=false", "description=e"]
    settings = parse(["1", *pairs], other, {})
    assert (settings.clients, settings.dataset, settings.engine) == (1, "own", "simulation")
    expected = {"clients": 7, "dataset": "a b", "engine": 1.0, "values": "w", "keys": False, "description": "e"}
    assert {key: for_flower(settings)[key] for key in expected} == expected
    assert for_flower(settings)["bound"] == math.inf


def test_a_table_s_key_is_set_by_its_path(other):
    """As Flower gives it to the app, too."""
    config = for_flower(parse(["opt.lr=0.2", "opt.decay.steps=5", "a key=3"], other, {}))
    assert (config["opt.lr"], config["opt.decay.steps"], config["a key"]) == (0.2, 5, 3)
    assert "opt" not in config


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_the_help_and_the_defaults_survive_any_text(other, words, capsys):
    """Also a percent sign, which argparse would take for a place to fill in."""
    text = (other / "pyproject.toml").read_text()
    (other / "pyproject.toml").write_text(text.replace('"plain"', '"100%s {} %"').replace('"An example', '"{1} %d'))
    if words:
        with pytest.raises(SystemExit) as left:
            parse(words, other, {})
        assert left.value.code == 0
        assert "name=100%s {} %" in capsys.readouterr().out
    else:
        assert parse(words, other, {}).config["name"] == "100%s {} %"


SPECIAL = ["'", '"', '"""', "\\", "\n", "\t", "#", "=", "ü", "\U0001f338", "\x01", "\x7f", "\x85", "\u2028", "\r\n"]


@pytest.mark.parametrize("value", ["", "two words", "true", "1", "x" * 100_000, *SPECIAL, "a".join(SPECIAL)])
def test_text_reaches_flower_as_it_was_typed(other, value):
    assert for_flower(parse([f"name={value}"], other, {}))["name"] == value


@pytest.mark.parametrize("pair", ["learning-rate=1e-300", "learning-rate=0.1", "learning-rate=1", "seed=4294967295"])
def test_numbers_reach_flower_as_they_were_typed(pair):
    config = parsed(pair).config
    found = for_flower(parsed(pair))
    assert found == config
    assert [type(value) for value in found.values()] == [type(value) for value in config.values()]


# --- A pyproject.toml that is not as it should be --------------------------------------------------------------------


def without(key):
    return "".join(line for line in OTHER.splitlines(True) if not line.startswith(key))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "can't be read: "),
        (b"", "lacks 'tool'"),
        (b"\xef\xbb\xbf" + OTHER.encode(), "can't be read: Invalid statement (at line 1, column 1)"),
        (OTHER.encode("utf-16"), "can't be read: "),
        (OTHER + "a = = 1", "can't be read: "),
        (OTHER.replace("inf", "infinite"), "can't be read: "),
        (without("clients = 1"), "lacks 'clients'"),
        (OTHER.replace("[tool.flwr", "[tool.flower"), "lacks 'flwr'"),
        (without("min-clients"), "lacks 'min-clients'"),
        (OTHER.replace("min-clients = 1", 'min-clients = "1"'), "min-clients must be a whole number from 1 to "),
        (OTHER.replace("min-clients = 1", "min-clients = true"), "min-clients must be a whole number from 1 to "),
        (OTHER.replace("min-clients = 1", "min-clients = 0"), "min-clients must be a whole number from 1 to "),
        (OTHER.replace("clients = 1\ndataset", "clients = 0\ndataset"), "clients must be a whole number from 1 to "),
        (OTHER.replace('name = "other"', "name = 3"), "name, engine, dataset and extension must be text"),
        (OTHER.replace('dataset = "own"', 'dataset = "own"\nextension = 3'), "and extension must be text"),
        (OTHER.replace('engine = "simulation"', 'engine = "ray"'), "ENGINE must be one of deployment, simulation"),
        (OTHER.replace("bound = inf", "bound = [1, 2]"), "bound must be text, a number, true or false, not "),
        (OTHER.replace("bound = inf", "bound = 2020-01-01"), "bound must be text, a number, true or false, not "),
        (OTHER.replace("opt.lr = [0.0, 1.0]", "opt.lt = [0.0, 1.0]"), "lacks 'opt.lt'"),
        (OTHER.replace("opt.lr = [0.0, 1.0]", "opt.lr = [0.0]"), "can't be read: "),
        (OTHER.replace("opt.lr = [0.0, 1.0]", 'opt.lr = ["a", "b"]'), "can't be read: "),
        (OTHER.replace("opt.lr = [0.0, 1.0]", "opt.lr = 5"), "can't be read: "),
        (OTHER.replace("opt.lr = 0.1", "opt.lr = 3.0"), "opt.lr must be a number from 0.0 to 1.0, not '3.0'"),
        (
            OTHER.replace('strategy = "fedavg"', 'strategy = "fed"'),
            "strategy must be one of fedavg, fedprox, not 'fed'",
        ),
        (OTHER.replace("[tool.launcher.values]", "[tool.launcher]\nvalues = 3"), "can't be read: "),
        ("tool = 3", "can't be read: "),
    ],
)
def test_a_broken_pyproject_is_an_error_and_no_traceback(other, content, said):
    path = other / "pyproject.toml"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UsageError) as error:
        parse([], other, {})
    assert said in str(error.value)
    assert "\n" not in str(error.value)
