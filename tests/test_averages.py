"""What is made of several replies: means of metrics and weights in the types that were sent, and the model's hash."""

import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM
from reply_helpers import INF, NAN, arrays, metrics, replies, reply, request, trained, weights

from rounds.averages import align, as_sent, model_sha256, payload, settle

# --- Several replies: metrics ----------------------------------------------------------------------------------------


def averaged(found):
    """What FedAvg makes of the replies' metrics."""
    return dict(FedAvg().train_metrics_aggr_fn([reply.content for reply in found], "num-examples"))


def test_metrics_that_all_have_are_the_strategy_s_matter():
    three = replies(metrics(), metrics(train_loss=2.0), metrics())
    assert settle(three) == {}
    assert averaged(three) == {"train_loss": pytest.approx(5 / 3)}
    assert settle([]) == {}


@pytest.mark.parametrize("odd", [NAN, INF, None, [0.5], [0.5, NAN]])
def test_a_metric_that_one_lacks_is_averaged_over_the_others(odd):
    """And the reply's other metrics still count."""
    record = metrics(auc=0.0 if odd is None else odd, train_loss=3.0, **{"num-examples": 200})
    if odd is None:
        del record["auc"]
    three = replies(metrics(auc=0.5), record, metrics(auc=0.8, **{"num-examples": 50}))
    assert settle(three) == {"auc": [1]}
    assert averaged(three) == {
        "auc": pytest.approx((100 * 0.5 + 50 * 0.8) / 150),
        "train_loss": pytest.approx((100 * 1.5 + 200 * 3.0 + 50 * 1.5) / 350),
    }


def test_a_list_of_another_length_is_left_out():
    three = replies(metrics(f1=[0.0, 1.0]), metrics(f1=[0.5, 0.5], **{"num-examples": 300}), metrics(f1=[1, 1, 1]))
    assert settle(three) == {"f1": [2]}
    assert averaged(three)["f1"] == pytest.approx([0.375, 0.625])


def test_the_mean_of_a_metric_that_nobody_has_as_a_number_is_none():
    two = replies(metrics(auc=NAN), metrics(auc=INF), metrics(auc=[NAN, 1.0]))
    assert settle(two) == {"auc": [0, 1, 2]}
    assert math.isnan(averaged(two)["auc"])


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
        align(one, RecordDict({"arrays": sent}))
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


def test_weights_that_come_in_another_order_are_averaged_by_name():
    """Some strategies go by position, and broadcast one shape over the other."""
    sent, strategy = arrays(), FedAvgM(server_learning_rate=0.5)
    strategy.current_arrays = sent
    turned = {name: Array(value) for name, value in reversed(weights().items())}
    found = [trained(arrays=ArrayRecord(turned)) for _ in range(2)]
    for one in found:
        align(one, RecordDict({"arrays": sent}))
    result = as_sent(strategy.aggregate_train(1, found)[0], sent)
    assert {name: array.numpy().tolist() for name, array in result.items()} == {
        name: value.tolist() for name, value in weights().items()
    }


@pytest.mark.parametrize("made", [{"extra": np.ones(3)}, {"bias": np.ones((2, 3))}])
def test_an_array_that_was_not_sent_is_named(made):
    with pytest.raises(ValueError, match=f"the strategy made {next(iter(made))} .*, which was not sent like that"):
        as_sent(ArrayRecord({name: Array(value) for name, value in made.items()}), arrays())


def test_what_a_strategy_makes_of_finite_numbers_must_be_finite():
    sent = arrays()
    for bad in (NAN, 1e39):  # the second is infinite as float32
        with (
            np.errstate(over="ignore"),
            pytest.raises(ValueError, match="the strategy made NaN or infinite numbers in bias"),
        ):
            as_sent(ArrayRecord({"bias": Array(np.array([1, bad, 1]))}), sent)
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="NaN or infinite numbers in steps"):
        as_sent(ArrayRecord({"steps": Array(np.array(NAN))}), sent)


def test_payload_is_the_bytes_of_the_weights():
    assert payload([trained()]) == payload([request()]) == 6 * 4 + 3 * 4 + 8
    assert payload([request(), trained()]) == 2 * payload([request()])
    assert payload([reply({"metrics": metrics()})]) == payload([]) == 0


# --- The hash of a model ---------------------------------------------------------------------------------------------


def state(**changes):
    return {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0, 4.0]])} | changes


def test_the_hash_does_not_depend_on_order_or_layout():
    turned = torch.tensor([[3.0], [4.0]]).T  # (1, 2), not contiguous
    again = dict(reversed(state().items()))
    assert model_sha256(state()) == model_sha256(again) == model_sha256(state(b=turned))
    assert len(model_sha256(state())) == 64
    assert model_sha256({name: tensor.numpy() for name, tensor in state().items()}) == model_sha256(state())


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
