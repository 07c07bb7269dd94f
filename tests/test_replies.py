"""Checks of what is refused of a client's reply, and of what is made of the rest, with Flower's own messages."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, Metadata, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg
from paths import BASIC  # noqa: F401  (makes the modules of basic importable)

from rounds import history
from rounds.averages import as_sent, model_sha256, payload, settle, widen
from rounds.record import Record, row
from rounds.replies import card, fault, one_line, partition_id, stranger, usual

NAN, INF = float("nan"), float("inf")


def weights(**changes):
    """The weights of a small model; a change replaces one of them, None leaves it out."""
    whole = {"weight": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32), "steps": np.array(7)} | changes
    return {name: value for name, value in whole.items() if value is not None}


def arrays(**changes):
    return ArrayRecord(
        {name: value if isinstance(value, Array) else Array(value) for name, value in weights(**changes).items()}
    )


def metrics(**changes):
    return MetricRecord({"train_loss": 1.5, "num-examples": 100} | changes)


def request(kind=MessageType.TRAIN):
    """What the server sends; made as Flower makes it where it comes from the wire."""
    metadata = Metadata(
        run_id=1,
        message_id="m",
        src_node_id=1,
        dst_node_id=2,
        reply_to_message_id="",
        group_id="",
        created_at=0.0,
        ttl=1e9,
        message_type=kind,
    )
    return Message(content=RecordDict({"arrays": arrays()}), metadata=metadata)


def reply(content, kind=MessageType.TRAIN):
    return Message(RecordDict(content), reply_to=request(kind))


def trained(**changes):
    """A good reply to a training request, but for the records that are given."""
    content = {"arrays": arrays(), "metrics": metrics()} | changes
    return reply({name: record for name, record in content.items() if record is not None})


def failed(reason, code=1):
    return Message(Error(code, reason), reply_to=request())


def told(message):
    """Why a reply to a training request can't be used."""
    return fault(message, request().content)


def saved(value, **options):
    """The bytes that numpy writes, declared as they should be."""
    file = io.BytesIO()
    np.save(file, value, **options)
    return Array("float32", (3,), "numpy.ndarray", file.getvalue())


# --- Replies that can be used ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"metrics": metrics(**{"num-examples": 0.5})},
        {"metrics": metrics(per_class=[0.1, 0.9])},
        {"metrics": metrics(train_loss=NAN, per_class=[0.5, INF])},  # the weights are good
        {"arrays": ArrayRecord(dict(reversed(arrays().items())))},  # by name, not by order
    ],
)
def test_good_replies_pass(changes):
    assert told(trained(**changes)) is None


def test_an_evaluation_needs_no_weights():
    assert fault(reply({"metrics": metrics()}, MessageType.EVALUATE), None) is None


def test_what_was_asked_for_decides_what_is_checked():
    """A reply can't escape by calling itself something else."""
    masked = reply({"arrays": arrays(bias=np.full(3, NAN, np.float32)), "metrics": metrics()}, MessageType.EVALUATE)
    assert told(masked) == "bias holds NaN or infinite numbers"
    assert told(reply({"metrics": metrics()}, MessageType.EVALUATE)) == "expected the arrays ['arrays'], found []"


# --- Replies that can't ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (failed("partition 2: ValueError: no"), "ValueError: no"),  # the partition is noted beside it
        (failed("partition None: ValueError: no"), "partition None: ValueError: no"),
        (failed(None, 3), "error 3"),
        (failed("", 3), "error 3"),
        (failed("\x1b[0m\n", 3), "error 3"),
        (failed("\x1b[31mred\x1b[0m\n  and more"), "red and more"),
        (failed("x" * 1000), "x" * 297 + "..."),
    ],
)
def test_an_error_is_told_in_one_line(error, said):
    assert told(error) == said


def test_of_a_traceback_the_error_is_told():
    said = """Traceback (most recent call last):
  File "client.py", line 9, in train
ValueError: a bad client
  that goes on
"""
    assert one_line(said) == "ValueError: a bad client"
    assert one_line("Traceback (most recent call last):\n  nothing more") == (
        "Traceback (most recent call last): nothing more"
    )


@pytest.mark.parametrize("end", ["a bad\nclient'>", "\x1b[31ma bad\nclient\x1b[0m'>"])
def test_what_flower_and_ray_wrap_around_an_error_is_taken_off(end):
    """In a simulation, that is Ray's frames and colours, the client's traceback and another one."""
    ray = """<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'\x1b[36mray::ClientAppActor.run()\x1b[39m
           ^^^^^^^^^
ValueError: a bad
client

The above exception was the direct cause of the following exception:

\x1b[36mray::ClientAppActor.run()\x1b[39m (pid=9)
  File "ray_actor.py", line 65, in run
"""
    flower = "flwr.clientapp.client_app.ClientAppException: \nException ClientAppException occurred. Message: "
    assert one_line(ray + flower + end) == "a bad client"
    deployment = (
        "<class 'flwr.clientapp.client_app.ClientAppException'>:<'\nException ClientAppException occurred. Message: "
    )
    assert one_line(deployment + end) == "a bad client"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (None, "expected one MetricRecord, found 0"),
        (MetricRecord({"train_loss": 1.5}), "num-examples must be a positive number, not None"),
        (metrics(**{"num-examples": 0}), "not 0"),
        (metrics(**{"num-examples": 0.0}), "not 0.0"),
        (metrics(**{"num-examples": -5}), "not -5"),
        (metrics(**{"num-examples": NAN}), "not nan"),
        (metrics(**{"num-examples": INF}), "not inf"),
        (metrics(**{"num-examples": [100, 100]}), "not [100, 100]"),
        (metrics(**{"num-examples": 10**5000}), "the whole data set has 600"),
    ],
)
@pytest.mark.parametrize("sent", [request().content, None], ids=["train", "evaluate"])
def test_bad_numbers_of_examples_are_refused(record, said, sent):
    content = {"arrays": arrays(), "metrics": record}
    reason = fault(reply({name: record for name, record in content.items() if record is not None}), sent, examples=600)
    assert reason is not None
    assert said in reason


def test_a_second_metric_record_is_refused():
    assert told(trained(more=metrics())) == "expected one MetricRecord, found 2"


def test_flower_itself_keeps_a_bool_out():
    with pytest.raises(TypeError, match="bool"):
        metrics(**{"num-examples": True})


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"arrays": None}, "expected the arrays ['arrays'], found []"),
        ({"arrays": None, "model": arrays()}, "found ['model']"),
        ({"more": arrays()}, "found ['arrays', 'more']"),
        ({"arrays": ArrayRecord()}, "weights are missing: ['bias', 'steps', 'weight']"),
        ({"arrays": arrays(bias=None)}, "weights are missing: ['bias']"),
        ({"arrays": arrays(extra=np.ones(3))}, "weights that nobody asked for: ['extra']"),
        ({"arrays": arrays(bias=None, Bias=np.ones(3))}, "weights are missing: ['bias']"),
        ({"arrays": arrays(bias=np.ones(1, np.float32))}, "bias has shape (1,), not (3,)"),
        ({"arrays": arrays(bias=np.ones((3, 1), np.float32))}, "bias has shape (3, 1), not (3,)"),
        ({"arrays": arrays(bias=np.array(1, np.float32))}, "bias has shape (), not (3,)"),
        ({"arrays": arrays(weight=np.ones((3, 2), np.float32))}, "weight has shape (3, 2), not (2, 3)"),
        ({"arrays": arrays(bias=saved(np.ones(1, np.float32)))}, "bias has shape (1,), not (3,)"),
        ({"arrays": arrays(bias=np.array([1, NAN, 1], np.float32))}, "bias holds NaN or infinite numbers"),
        ({"arrays": arrays(bias=np.array([1, 1, -INF], np.float32))}, "bias holds NaN or infinite numbers"),
        # Flower adds the replies up in the first one's array, so one of another type changes the whole model's.
        ({"arrays": arrays(bias=np.ones(3, np.float16))}, "bias is float16, not float32, which was sent"),
        ({"arrays": arrays(bias=np.ones(3))}, "bias is float64, not float32"),
        ({"arrays": arrays(bias=np.full(3, 1e300))}, "bias is float64, not float32"),  # infinite as float32
        ({"arrays": arrays(steps=np.array(7.5))}, "steps is float64, not int64"),
        ({"arrays": arrays(bias=saved(np.ones(3, np.float16)))}, "bias is float16, not float32"),
        ({"arrays": arrays(bias=np.array([1, 1, 1j]))}, "bias is complex128, not float32"),
        ({"arrays": arrays(bias=saved(np.array(["a", "b", "c"])))}, "bias is <U1, not float32"),
        ({"arrays": arrays(bias=Array("float32", (3,), "numpy.ndarray", b"nonsense"))}, "unreadable reply: "),
        ({"arrays": arrays(bias=Array("float32", (3,), "numpy.ndarray", b""))}, "unreadable reply: "),
        ({"arrays": arrays(bias=Array("float32", (3,), "a.stranger", b"\0" * 12))}, "unreadable reply: "),
        ({"arrays": arrays(bias=saved(np.array([print] * 3, object), allow_pickle=True))}, "unreadable reply: "),
        *(
            ({"arrays": arrays(bias=Array(dtype, (3,), "numpy.ndarray", b"nonsense"))}, "unreadable reply: ")
            for dtype in ("", "nonsense", "f4,,", "(1", "\x00")
        ),
    ],
)
def test_bad_weights_are_refused(record, said):
    reason = told(trained(**record))
    assert reason is not None
    assert said in reason
    assert "\n" not in reason


class Trap:
    """Would leave a trace where it is unpickled."""

    opened = False

    def __reduce__(self):
        return setattr, (Trap, "opened", True)


def test_nothing_in_a_reply_is_unpickled():
    trap = saved(np.array([Trap()] * 3, dtype=object), allow_pickle=True)
    assert "allow_pickle" in told(trained(arrays=arrays(bias=trap)))
    assert not Trap.opened


# --- Who sent it -----------------------------------------------------------------------------------------------------


def carded(**said):
    """A reply with what the mod `named` puts on it, where nothing else is said."""
    whole = {"partition-id": 1, "num-partitions": 3, "dataset": "cifar10"} | said
    return trained(client=ConfigRecord({key: value for key, value in whole.items() if value is not None}))


def test_who_belongs_to_the_run_is_no_stranger():
    assert stranger(carded(), 3, "cifar10") is None
    assert stranger(trained(), 3, "cifar10") is None  # it says nothing: a client without mods
    assert stranger(carded(), None, None) is None  # the server does not know
    assert stranger(carded(**{"num-partitions": "3"}), None, None) is None
    assert stranger(carded(dataset=None), 3, "cifar10") is None
    assert partition_id(carded()) == 1
    assert partition_id(trained()) is None
    assert partition_id(failed("partition 12: ValueError: no")) == 12
    for reason in ("partition None: no", "ValueError", None, f"partition {'9' * 5000}: no"):
        assert partition_id(failed(reason)) is None


@pytest.mark.parametrize(
    "identity", ["1", b"1", [1], 1.0, NAN, -1, 3, 2**62, 10**5000, "9" * 5000, True, None], ids=lambda value: "id"
)
def test_a_bad_identity_is_refused_in_a_line(identity):
    reason = stranger(carded(**{"partition-id": identity}), 3, "cifar10")
    assert "partition-id is " in reason
    assert "a whole number from 0 to 2" in reason
    assert len(reason) < 200
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"num-partitions": 5}, "num-partitions is 5 there and 3 here: start that SuperNode with --node-config"),
        ({"num-partitions": "3"}, "num-partitions is 3 there"),
        ({"num-partitions": NAN}, "num-partitions is nan there"),
        ({"num-partitions": [3]}, "num-partitions is [3] there"),
        ({"dataset": "synthetic"}, "its data set is synthetic and this run's is cifar10: set DATASET=cifar10 there"),
        ({"dataset": 1}, "its data set is 1 "),
    ],
)
def test_who_can_not_belong_to_the_run_is_told_what_to_change(said, reason):
    assert reason in stranger(carded(**said), 3, "cifar10")


def test_what_most_clients_say():
    replies = [carded(device=device) for device in ("cpu", "cpu", "gpu", 1, b"", [1.0])]
    assert usual(replies, "device", str) == "cpu"
    assert usual(replies, "num-partitions", int) == 3
    assert usual([trained(), failed("no")], "device", str) is None
    assert dict(card(failed("no"))) == {}


# --- Several replies: metrics ----------------------------------------------------------------------------------------


def replies(*records):
    return [trained(metrics=record) for record in records]


def averaged(found):
    """What FedAvg makes of the replies' metrics."""
    return dict(FedAvg().train_metrics_aggr_fn([reply.content for reply in found], "num-examples"))


def test_metrics_that_all_have_are_the_strategy_s_matter():
    three = replies(metrics(), metrics(train_loss=2.0), metrics())
    assert settle(three) == ({}, {})
    assert averaged(three) == {"train_loss": pytest.approx(5 / 3)}
    assert settle([]) == ({}, {})


@pytest.mark.parametrize("odd", [NAN, INF, None, [0.5], [0.5, NAN]])
def test_a_metric_that_one_lacks_is_averaged_over_the_others(odd):
    """And the reply's other metrics still count."""
    record = metrics(auc=0.0 if odd is None else odd, train_loss=3.0, **{"num-examples": 200})
    if odd is None:
        del record["auc"]
    three = replies(metrics(auc=0.5), record, metrics(auc=0.8, **{"num-examples": 50}))
    assert settle(three) == ({"auc": pytest.approx((100 * 0.5 + 50 * 0.8) / 150)}, {"auc": [1]})
    assert averaged(three) == {"train_loss": pytest.approx((100 * 1.5 + 200 * 3.0 + 50 * 1.5) / 350)}


def test_a_list_of_another_length_is_left_out():
    three = replies(metrics(f1=[0.0, 1.0]), metrics(f1=[0.5, 0.5], **{"num-examples": 300}), metrics(f1=[1, 1, 1]))
    assert settle(three) == ({"f1": [0.375, 0.625]}, {"f1": [2]})


def test_a_metric_that_nobody_has_as_a_number_has_no_mean():
    assert settle(replies(metrics(auc=NAN), metrics(auc=INF))) == ({}, {"auc": [0, 1]})


def test_the_name_of_the_record_does_not_matter():
    three = [trained(), trained(metrics=None, scores=metrics(train_loss=4.5)), trained()]
    settle(three)
    FedAvg()._check_and_log_replies(three, is_train=True)  # as Flower itself judges
    assert averaged(three) == {"train_loss": pytest.approx(2.5)}


# --- Several replies: weights ----------------------------------------------------------------------------------------


def mean(values, dtype):
    """One array of several clients, averaged by FedAvg between what is done before and after it."""
    sent = ArrayRecord({"one": Array(np.zeros_like(values[0], dtype))})
    found = [trained(arrays=ArrayRecord({"one": Array(np.asarray(value, dtype))})) for value in values]
    for one in found:
        widen(one)
    result = as_sent(FedAvg().aggregate_train(1, found)[0], sent)["one"].numpy()
    assert result.dtype == dtype
    return result


@pytest.mark.parametrize("clients", [2, 3, 7, 10, 100])
def test_integers_that_all_have_stay_exact(clients):
    rows = np.arange(-512, 512)
    assert np.array_equal(mean([rows] * clients, np.int64), rows)
    assert np.array_equal(mean([rows % 2 == 0] * clients, np.bool_), rows % 2 == 0)


def test_a_mean_of_integers_is_rounded():
    assert mean([np.array([1, 1]), np.array([2, 4]), np.array([2, 5])], np.int32).tolist() == [2, 3]
    assert mean([np.array(7), np.array(7), np.array(8)], np.int64).tolist() == 7  # as BatchNorm's count of batches


def test_another_strategy_keeps_integers():
    """FedAdam makes float64 of everything, and 7 - 1e-15 of a 7 that all clients send back."""
    sent, strategy = arrays(mask=np.arange(3) < 2), FedAdam(eta=1.0)
    found = [trained(arrays=arrays(mask=np.arange(3) < 2, bias=np.full(3, 2.0, np.float32))) for _ in range(3)]
    strategy.current_arrays = {name: array.numpy() for name, array in sent.items()}
    result = as_sent(strategy.aggregate_train(1, found)[0], sent)
    assert {name: str(array.dtype) for name, array in result.items()} == {
        **{"weight": "float32", "bias": "float32", "steps": "int64", "mask": "bool"}
    }
    assert result["steps"].numpy() == 7
    assert result["mask"].numpy().tolist() == [True, True, False]
    assert result["bias"].numpy()[0] > 1


def test_half_precision_is_averaged_in_single():
    """300 + 1/3 is 300.25 in float16; a sum of thirds that are rounded each time is off by more."""
    values = [
        np.array([300.0, 2049.0, 60000.0]),
        np.array([300.0, 2050.0, 60000.0]),
        np.array([301.0, 2054.0, 60000.0]),
    ]
    expected = np.mean([np.float16(value).astype(np.float64) for value in values], axis=0).astype(np.float16)
    assert mean(values, np.float16).tolist() == expected.tolist()
    assert mean([np.arange(1000) / 7] * 3, np.float16).tolist() == (np.arange(1000) / 7).astype(np.float16).tolist()


def test_what_a_strategy_makes_of_finite_numbers_must_be_finite():
    sent = arrays()
    for bad in (NAN, 1e39):  # the second is infinite as float32
        with (
            np.errstate(over="ignore"),
            pytest.raises(ValueError, match="the strategy made NaN or infinite numbers in bias"),
        ):
            as_sent(ArrayRecord({"bias": Array(np.array([1, bad, 1]))}), sent)


def test_payload_is_the_bytes_of_the_weights():
    assert payload([trained()]) == payload([request()]) == 6 * 4 + 3 * 4 + 8
    assert payload([request(), trained()]) == 2 * payload([request()])
    assert payload([reply({"metrics": metrics()})]) == payload([]) == 0


# --- What goes into the history --------------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path, monkeypatch):
    """A record in the folder of a run that a launcher has begun."""
    monkeypatch.setenv(history.RUN_FOLDER, str(tmp_path))
    history.save(tmp_path, {"rounds": [], "started": 0.0})
    record = Record(SimpleNamespace(run_config={}), rounds_done=0)
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
    with np.errstate(over="ignore"):
        means, _ = settle(replies(metrics(auc=1.7e308), metrics(auc=1.7e308), MetricRecord({"num-examples": 1})))
    assert means["auc"] == INF
    record.note("train", {**means, "list": [1.0, NAN, -INF]})
    record.save()
    assert strict(record.folder)["rounds"][0]["train"] == {"auc": None, "loss": 1.5, "list": [1.0, None, None]}


# --- The hash of a model ---------------------------------------------------------------------------------------------


def state(**changes):
    return {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0, 4.0]])} | changes


def test_the_hash_does_not_depend_on_order_or_layout():
    turned = torch.tensor([[3.0], [4.0]]).T  # (1, 2), not contiguous
    again = dict(reversed(state().items()))
    assert model_sha256(state()) == model_sha256(again) == model_sha256(state(b=turned))
    assert len(model_sha256(state())) == 64
    assert model_sha256(state(a=torch.nn.Parameter(torch.tensor([1.0, 2.0])))) == model_sha256(state())


@pytest.mark.parametrize(
    "other",
    [
        state(a=torch.tensor([1.0, np.nextafter(np.float32(2), np.float32(3))])),
        state(a=torch.tensor([0.0, 2.0])) | {"z": torch.tensor(1.0)},
        state(a=torch.tensor([2.0, 1.0])),
        state(a=torch.tensor([[1.0, 2.0]])),
        state(a=torch.tensor([1.0, 2.0], dtype=torch.float64)),
        state(a=torch.tensor([1.0, 2.0]).view(torch.int32)),
        {"A": state()["a"], "b": state()["b"]},
        {"a": state()["b"], "b": state()["a"]},
        {"a": state()["a"]},
    ],
)
def test_the_hash_tells_one_bit(other):
    assert model_sha256(other) != model_sha256(state())
