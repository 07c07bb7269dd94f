"""Checks of what is refused of a client's reply, and who it says that it is from, with Flower's own messages."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MessageType, MetricRecord
from reply_helpers import INF, NAN, arrays, carded, failed, metrics, reply, request, saved, told, trained

from rounds.replies import card, fault, one_line, partition_id, stranger, usual

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
        (metrics(**{"num-examples": 601}), "num-examples is 601, and the whole data set has 600"),
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
        ({"arrays": ArrayRecord()}, "weights have other names than those sent: ['bias', 'steps', 'weight']"),
        ({"arrays": arrays(bias=None)}, "weights have other names than those sent: ['bias']"),
        ({"arrays": arrays(extra=np.ones(3))}, "weights have other names than those sent: ['extra']"),
        ({"arrays": arrays(bias=None, Bias=np.ones(3))}, "weights have other names than those sent: ['Bias', 'bias']"),
        ({"arrays": arrays(bias=np.ones(1, np.float32))}, "bias is float32 (1,), not float32 (3,)"),
        ({"arrays": arrays(bias=np.ones((3, 1), np.float32))}, "bias is float32 (3, 1), not float32 (3,)"),
        ({"arrays": arrays(bias=np.array(1, np.float32))}, "bias is float32 (), not float32 (3,)"),
        ({"arrays": arrays(weight=np.ones((3, 2), np.float32))}, "weight is float32 (3, 2), not float32 (2, 3)"),
        ({"arrays": arrays(bias=saved(np.ones(1, np.float32)))}, "bias is float32 (1,), not float32 (3,)"),
        ({"arrays": arrays(bias=np.array([1, NAN, 1], np.float32))}, "bias holds NaN or infinite numbers"),
        ({"arrays": arrays(bias=np.array([1, 1, -INF], np.float32))}, "bias holds NaN or infinite numbers"),
        # Flower adds the replies up in the first one's array, so one of another type changes the whole model's.
        ({"arrays": arrays(bias=np.ones(3, np.float16))}, "bias is float16 (3,), not float32 (3,), which was sent"),
        ({"arrays": arrays(bias=np.ones(3))}, "bias is float64 (3,), not float32 (3,)"),
        ({"arrays": arrays(bias=np.full(3, 1e300))}, "bias is float64 (3,), not float32 (3,)"),  # infinite as float32
        ({"arrays": arrays(steps=np.array(7.5))}, "steps is float64 (), not int64 ()"),
        ({"arrays": arrays(bias=saved(np.ones(3, np.float16)))}, "bias is float16 (3,), not float32 (3,)"),
        ({"arrays": arrays(bias=np.array([1, 1, 1j]))}, "bias is complex128 (3,), not float32 (3,)"),
        ({"arrays": arrays(bias=saved(np.array(["a", "b", "c"])))}, "bias is <U1 (3,), not float32 (3,)"),
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
    "identity", ["1", b"1", [1], 1.0, NAN, -1, 3, 2**62, "9" * 5000, True, None], ids=lambda value: "id"
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
