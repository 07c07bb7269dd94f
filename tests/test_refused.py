"""Tests what clients can do to a run, in one run in which nearly every client does something else: see odd.py."""

import json
import shutil
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from edits import edit
from odd import BUSY, COPY, HONEST, IDENTITIES, METRICS, NAMES, ODD_TIMES, OUTSIDE, SILENT, TWIN
from runs import ON_ONE_CORE, Launch, copy_example, finished

CLIENTS = len(NAMES)
ACCEPTED = [*NAMES[:HONEST], *METRICS, ODD_TIMES, SILENT]  # whose weights count
REASONS = {
    "NaN weights": "fc3.bias holds NaN or infinite numbers",
    "another shape": "fc3.bias is float32 (1,), not float32 (10,), which was sent",
    "half precision": "fc3.bias is float16 (10,), not float32 (10,), which was sent",
    "double precision": "fc3.bias is float64 (10,), not float32 (10,), which was sent",
    "another dtype said": "fc3.bias is float32, and is called torch.float32",
    BUSY: "RuntimeError: my GPU is busy",
    "a weight less": "weights have other names than those sent: ['fc3.bias']",
    "no weights": "expected the arrays ['arrays'], found []",
    "no examples": "num-examples must be a positive number, not 0",
    "a million examples": "num-examples is 1000000, and the whole data set has 600",
    "raises": "ZeroDivisionError: division by zero",
    "exits": "SystemExit: no data here",
    "raises in lines": "ValueError: a bad client",
    "no message": "TypeError: a function in client.py returned RecordDict in place of a Message",
    "another kind": "fc3.bias holds NaN or infinite numbers",
    "text": f"partition-id is {'9' * 77}..., not a whole number from 0 to {CLIENTS - 1}",
    "bytes": "partition-id is b'1', not a whole number",
    "a list": "partition-id is [1], not a whole number",
    "NaN": "partition-id is nan, not a whole number",
    "huge": f"partition-id is {2**62}, not a whole number",
    "negative": "partition-id is -1, not a whole number",
    "missing": "partition-id is None, not a whole number",
    "other partitions": f"num-partitions is 5 there and {CLIENTS} here",
    "other data": "its data set is cifar10 and this run's is synthetic",
    OUTSIDE: "raised outside",
    TWIN: "another client has partition-id 2 too",
    COPY: "another client has partition-id 0 too",
}
# By what partition id the history calls those that don't say their own; None: it is no whole number.
CALLED = {name: None for name in IDENTITIES if "partition-id" in IDENTITIES[name]} | {"huge": 2**62, TWIN: 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Launch:
    folder = copy_example("basic", tmp_path_factory.mktemp("odd") / "basic")
    shutil.copy(Path(__file__).with_name("odd.py"), folder)
    edit(
        folder / "client.py",
        ("import cifar_utils\n", "import cifar_utils\nfrom odd import broken, odd\n"),
        ("mods=[named, seeded]", "mods=[odd, named, seeded, broken]"),
    )
    return finished(folder, *[CLIENTS] * 3, 1, data_dir=data_dir, through=ON_ONE_CORE, ENGINE="simulation")


@pytest.fixture(scope="module")
def history(run: Launch) -> dict[str, Any]:
    def refuse(word: str) -> NoReturn:
        raise AssertionError(f"{word} is not JSON")

    return json.loads((run.run_dir / "history.json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def train(history: dict[str, Any]) -> dict[str, Any]:
    return history["rounds"][0]["train"]


def examples(name: str) -> int:
    """How many examples a client trains on: its share, but for a tenth."""
    share = len(np.array_split(np.arange(600), CLIENTS)[NAMES.index(name)])
    return share - share // 10


def mean(names: list[str]) -> float:
    """The mean of the clients' partition ids, weighted by examples: their weights, and ten times their metrics."""
    return sum(NAMES.index(name) * examples(name) for name in names) / sum(map(examples, names))


def test_the_run_completes(run: Launch, history: dict[str, Any]) -> None:
    assert run.process.returncode == 0, run.stdout + run.stderr
    assert history["status"] == "completed"
    assert run.nothing_left()


@pytest.mark.parametrize("name", list(REASONS))
def test_a_bad_reply_is_refused_for_what_is_wrong_with_it(name: str, train: dict[str, Any], run: Launch) -> None:
    called = CALLED.get(name, NAMES.index(name))
    found = [failure["reason"] for failure in train["failures"] if failure["partition-id"] == called]
    said = [reason for reason in found if REASONS[name] in reason]
    assert len(said) == 1
    assert REASONS[name] in said[0]
    assert "\n" not in said[0]
    assert "\x1b" not in said[0]
    assert len(said[0]) <= 300
    assert said[0] in run.log("run")


def test_the_others_count(train: dict[str, Any]) -> None:
    assert train["clients"] == len(ACCEPTED)
    assert len(train["failures"]) == CLIENTS - len(ACCEPTED)
    known = [NAMES.index(name) for name in ACCEPTED if name != SILENT]
    assert [row["partition-id"] for row in train["by_client"]] == [*known, None]
    assert [row["num-examples"] for row in train["by_client"]] == [examples(name) for name in ACCEPTED]


def test_the_weights_of_those_with_odd_metrics_count(run: Launch) -> None:
    bias = torch.load(run.run_dir / "model.pt", weights_only=True)["fc3.bias"]
    assert bias.tolist() == pytest.approx([mean(ACCEPTED)] * 10)


def test_a_metric_is_averaged_over_those_that_have_it(train: dict[str, Any], run: Launch) -> None:
    lack = ["NaN metric", "endless metric", "a metric less", "a metric in a list"]
    assert train["auc"] == pytest.approx(mean([name for name in ACCEPTED if name not in lack]) / 10)
    assert train["left_out"]["auc"] == [NAMES.index(name) for name in ACCEPTED if name in lack]
    assert f"no usable auc from partitions {train['left_out']['auc']}; the rest" in run.log("run")
    same = [name for name in ACCEPTED if name != "a longer list"]
    assert train["f1"] == [pytest.approx(mean(same) / 10), pytest.approx(1.0)]
    assert train["left_out"]["f1"] == [NAMES.index("a longer list")]
    losses = [row["train_loss"] * row["num-examples"] for row in train["by_client"]]
    assert train["train_loss"] == pytest.approx(sum(losses) / sum(map(examples, ACCEPTED)))


def test_no_metric_overwrites_what_the_history_says(train: dict[str, Any], run: Launch) -> None:
    """All send `loss` beside `train_loss`, and `clients` and `failures`; one sends the rest of the history's words."""
    assert train["loss"] == pytest.approx(2.0)
    assert isinstance(train["failures"], list)
    assert isinstance(train["by_client"], list)
    assert isinstance(train["left_out"], dict)
    for key in ("clients", "failures", "left_out", "by_client"):
        assert f"the metric {key} is left out of history.json" in run.log("run")


def test_what_a_client_says_of_its_time_and_device_may_be_anything(train: dict[str, Any], history: dict) -> None:
    (row,) = [row for row in train["by_client"] if row["partition-id"] == NAMES.index(ODD_TIMES)]
    assert "seconds" not in row
    assert history["device"] == "cpu"


def test_who_failed_in_training_can_evaluate(history: dict[str, Any]) -> None:
    evaluate = history["rounds"][0]["evaluate"]
    assert evaluate["clients"] == CLIENTS - len(IDENTITIES) - len([OUTSIDE, TWIN, COPY])
    assert len(evaluate["failures"]) == CLIENTS - evaluate["clients"]


def test_the_table_says_each_reason_once(run: Launch, train: dict[str, Any]) -> None:
    lines = run.stdout.splitlines()
    (row,) = [line.split() for line in lines if line.startswith("    1 ")]
    assert row[:3] == ["1", str(len(ACCEPTED)), str(len(train["failures"]) + len(IDENTITIES) + 3)]
    for failure in train["failures"]:
        assert sum(line.endswith(f": {failure['reason']}") for line in lines) == 1
    raised = NAMES.index("raises")
    assert f"client {raised}: ZeroDivisionError: division by zero" in [line.strip() for line in lines]
