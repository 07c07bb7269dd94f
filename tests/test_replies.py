"""What is refused of a client's reply, and what is read from it; with Flower's own messages."""

import io
import time

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, Metadata, MetricRecord, RecordDict
from paths import BASIC  # noqa: F401  (makes the modules of basic importable)

from launcher.replies import busy, client_rows, fault, mean_metrics, model_sha256, odd_ones_out, payload

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


def told(message):
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
        {"arrays": arrays(bias=np.ones(3))},  # as FedAdam's server sends them
        {"arrays": arrays(steps=np.array(7.5))},  # an average of counts
        {"arrays": ArrayRecord(dict(reversed(arrays().items())))},  # by name, not by order
    ],
)
def test_good_replies_pass(changes):
    assert told(trained(**changes)) is None


def test_an_evaluation_needs_no_weights():
    assert told(reply({"metrics": metrics()}, MessageType.EVALUATE)) is None


# --- Replies that can't ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Error(1, "partition 2: ValueError: no"), "partition 2: ValueError: no"),
        (Error(3), "error 3"),
        (Error(3, ""), "error 3"),
    ],
)
def test_an_error_is_told_as_it_came(error, said):
    assert told(Message(error, reply_to=request())) == said


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
        (metrics(train_loss=NAN), "metric train_loss is nan"),
        (metrics(train_loss=-INF), "metric train_loss is -inf"),
        (metrics(per_class=[0.5, NAN]), "metric per_class is [0.5, nan]"),
    ],
)
@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE])
def test_bad_metrics_are_refused(record, said, kind):
    content = {"arrays": arrays(), "metrics": record}
    reason = told(reply({name: record for name, record in content.items() if record is not None}, kind))
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
        ({"arrays": ArrayRecord()}, "missing ['bias', 'steps', 'weight'], not asked for []"),
        ({"arrays": arrays(bias=None)}, "missing ['bias'], not asked for []"),
        ({"arrays": arrays(extra=np.ones(3))}, "missing [], not asked for ['extra']"),
        ({"arrays": arrays(bias=None, Bias=np.ones(3))}, "missing ['bias'], not asked for ['Bias']"),
        ({"arrays": arrays(bias=np.ones(1, np.float32))}, "bias has shape (1,), not (3,)"),
        ({"arrays": arrays(bias=np.ones((3, 1), np.float32))}, "bias has shape (3, 1), not (3,)"),
        ({"arrays": arrays(bias=np.array(1, np.float32))}, "bias has shape (), not (3,)"),
        ({"arrays": arrays(weight=np.ones((3, 2), np.float32))}, "weight has shape (3, 2), not (2, 3)"),
        ({"arrays": arrays(bias=saved(np.ones(1, np.float32)))}, "bias has shape (1,), not (3,)"),
        ({"arrays": arrays(bias=np.array([1, NAN, 1], np.float32))}, "bias holds NaN or infinite numbers"),
        ({"arrays": arrays(bias=np.array([1, 1, -INF], np.float32))}, "bias holds NaN or infinite numbers"),
        ({"arrays": arrays(bias=np.array([1, 1, 1j]))}, "bias holds complex128, not real numbers"),
        ({"arrays": arrays(bias=saved(np.array(["a", "b", "c"])))}, "bias holds <U1, not real numbers"),
        ({"arrays": arrays(bias=Array("float32", (3,), "numpy.ndarray", b"nonsense"))}, "unreadable reply: "),
        ({"arrays": arrays(bias=Array("float32", (3,), "numpy.ndarray", b""))}, "unreadable reply: "),
        ({"arrays": arrays(bias=Array("float32", (3,), "a.stranger", b"\0" * 12))}, "unreadable reply: "),
        ({"arrays": arrays(bias=saved(np.array([print] * 3, object), allow_pickle=True))}, "unreadable reply: "),
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


# --- Several replies -------------------------------------------------------------------------------------------------


def replies(*records):
    return {node: trained(metrics=record) for node, record in enumerate(records)}


def test_replies_that_agree_have_no_odd_one():
    assert odd_ones_out(replies(metrics(), metrics(train_loss=2.0), metrics())) == {}
    assert odd_ones_out(replies(metrics())) == {}
    assert odd_ones_out({}) == {}


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (metrics(extra=1), "extra"),
        (MetricRecord({"num-examples": 100}), "num-examples"),
        (MetricRecord({"loss": 1.5, "num-examples": 100}), "loss"),
        (metrics(train_loss=[1.5]), "train_loss"),
    ],
)
def test_the_odd_one_is_named(odd, said):
    found = odd_ones_out(replies(metrics(), odd, metrics()))
    assert list(found) == [1]
    assert said in found[1]


def test_lists_of_another_length_are_odd():
    found = odd_ones_out(replies(metrics(per_class=[1, 2]), metrics(per_class=[1, 2]), metrics(per_class=[1, 2, 3])))
    assert list(found) == [2]


def test_another_name_for_the_metrics_is_odd():
    three = {node: trained() for node in range(3)} | {1: trained(metrics=None, scores=metrics())}
    assert list(odd_ones_out(three)) == [1]


def test_metrics_are_averaged_by_examples():
    found = mean_metrics(
        [
            trained(metrics=metrics(train_loss=1.0, **{"num-examples": 300})),
            trained(metrics=metrics(train_loss=2.0, **{"num-examples": 100})),
        ]
    )
    assert found == {"loss": pytest.approx(1.25)}


def test_other_metrics_keep_their_names_and_lists_are_left_out():
    found = mean_metrics([trained(metrics=MetricRecord({"accuracy": 0.5, "lists": [1, 2], "num-examples": 1}))])
    assert found == {"accuracy": 0.5}


def test_payload_is_the_bytes_of_the_weights():
    assert payload(trained()) == payload(request()) == 6 * 4 + 3 * 4 + 8
    assert payload(reply({"metrics": metrics()})) == 0
    assert payload(Message(Error(1, "no"), reply_to=request())) == 0


@pytest.mark.parametrize("dtype", ["", "nonsense", "f4,,", "(1", "\x00"])
def test_a_type_that_there_is_not_costs_nobody_a_round(dtype):
    strange = trained(arrays=arrays(bias=Array(dtype, (3,), "numpy.ndarray", b"nonsense")))
    assert told(strange).startswith("unreadable reply: ")
    assert isinstance(payload(strange), int)


# --- What a client says of its work ----------------------------------------------------------------------------------


def worked(**said):
    return trained(client=ConfigRecord({"partition-id": 1, **said}))


def test_busy_counts_each_second_once_and_none_outside_of_the_phase():
    start = time.time() - 100
    replies = [
        worked(began=start - 10, seconds=15.0),  # 5 seconds of it are within
        worked(began=start + 20, seconds=10.0),
        worked(began=start + 25, seconds=15.0),  # 5 seconds of it at the same time
        worked(began=start + 22, seconds=1.0),
        Message(Error(1, "no"), reply_to=request()),
    ]
    assert busy(replies, since=start) == pytest.approx(25)
    assert busy([worked(began=start, seconds=1e9)], since=start) == pytest.approx(100, abs=1)
    assert busy([], since=start) == 0


@pytest.mark.parametrize(
    "said", [{}, {"seconds": 5.0}, {"began": "now", "seconds": 5.0}, {"began": 0.0, "seconds": NAN}]
)
def test_what_a_client_says_of_its_time_may_be_anything(said):
    assert busy([worked(**said)], since=0) == 0


def test_a_row_for_each_client():
    said = client_rows([worked(seconds=1.234, memory=300.0), worked(seconds="long", memory=[1.0])])
    expected = {"partition-id": 1, "train_loss": 1.5, "num-examples": 100}
    assert said == [{**expected, "seconds": 1.23, "memory": 300.0}, expected]


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
