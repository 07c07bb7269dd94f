"""What of a round's replies goes into history.json: a row for each client, means, and nothing that JSON can't hold."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord
from reply_helpers import INF, NAN, carded, metrics, replies, trained

from rounds import history
from rounds.averages import settle
from rounds.record import Record, row


@pytest.fixture
def record(tmp_path, monkeypatch):
    """A record in the folder of a run that a launcher has begun."""
    monkeypatch.setenv(history.RUN_FOLDER, str(tmp_path))
    history.save(tmp_path, {"rounds": [], "started": 0.0})
    record = Record(SimpleNamespace(run_config={}))
    record.begin_round(1)
    return record


def strict(folder):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads((folder / "history.json").read_text(), parse_constant=refuse)


def test_a_row_for_each_client():
    said = row(carded(seconds=1.234))
    assert said == {"partition-id": 1, "seconds": 1.234, "train_loss": 1.5, "num-examples": 100}


@pytest.mark.parametrize("seconds", ["long", b"long", [1.0], NAN, True, None])
def test_what_a_client_says_of_its_time_may_be_anything(record, seconds):
    said = row(carded(seconds=seconds))
    assert said == {"partition-id": 1, "train_loss": 1.5, "num-examples": 100}
    record.entry["train"] = {"by_client": [said]}
    record.save()
    assert strict(record.folder)["rounds"][0]["train"]["by_client"] == [said]


def test_no_metric_takes_the_place_of_what_the_row_says():
    said = row(
        trained(client=ConfigRecord({"partition-id": 1, "seconds": 2.0}), metrics=metrics(**{"partition-id": 7}))
    )
    assert said["partition-id"] == 1
    assert said["seconds"] == 2.0


def test_metrics_of_the_same_name_do_not_overwrite_one_another(record):
    record.entry["train"] = {"clients": 3, "failures": []}
    record.note("train", {"train_loss": 1.0, "loss": 2.0, "clients": 9.0, "train_failures": 8.0, "train_auc": 0.5})
    assert record.entry["train"] == {
        **{"clients": 3, "failures": []},
        **{"train_loss": 1.0, "loss": 2.0, "train_failures": 8.0, "auc": 0.5},
    }
    record.note("train", {"auc": 0.75})
    assert record.entry["train"]["auc"] == 0.5
    record.note("evaluate", {"loss": 2.0})
    record.note("evaluate", None)
    assert record.entry["evaluate"] == {"loss": 2.0}


def test_the_history_is_strict_json(record):
    """A mean may overflow: two of 1.7e308 have none."""
    three = replies(metrics(auc=1.7e308), metrics(auc=1.7e308), MetricRecord({"num-examples": 1}))
    with np.errstate(over="ignore"):
        settle(three)
    assert three[2].content["metrics"] == {"auc": INF, "train_loss": 1.5, "num-examples": 1}
    record.note("train", {**three[2].content["metrics"], "list": [1.0, NAN, -INF]})
    record.save()
    assert strict(record.folder)["rounds"][0]["train"] == {
        **{"auc": None, "loss": 1.5, "num-examples": 1},
        **{"list": [1.0, None, None]},
    }
