"""Who holds what: partitions, and what a client loads of them."""

import json
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, MessageType, RecordDict
from paths import BASIC

import cifar_utils
from cifar_data import load_split
from cifar_utils import MIN_EXAMPLES, load_client_data, partition
from rounds.mods import seeded

LABELS = np.random.default_rng(0).permutation(np.arange(4000) % 10)
ROWS = 400  # of the data set on disk
CASES = [
    ("iid", 1, {}),
    ("iid", 7, {}),
    ("iid", 400, {}),
    ("shards", 1, {}),
    ("shards", 7, {}),
    ("shards", 100, {}),
    ("dirichlet", 1, {"alpha": 0.5}),
    ("dirichlet", 7, {"alpha": 0.3}),
    ("dirichlet", 20, {"alpha": 1.0}),
]


def counts(parts, labels=LABELS):
    """(partitions, classes): how many examples of each class each client has."""
    return np.array([np.bincount(labels[part], minlength=10) for part in parts])


def skew(parts):
    """How far the clients' class shares are from the whole's: 0 is the same, 0.9 is one class each."""
    shares = counts(parts) / counts(parts).sum(1, keepdims=True)
    return np.abs(shares - 0.1).sum(1).mean() / 2


# --- The partitioners ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "clients", "options"), CASES)
def test_partitions_are_disjoint_covering_and_large_enough(name, clients, options):
    parts = partition(LABELS, clients, seed=1, name=name, **options)
    assert len(parts) == clients
    assert sorted(np.concatenate(parts)) == list(range(len(LABELS)))
    assert min(len(part) for part in parts) >= MIN_EXAMPLES


@pytest.mark.parametrize(("name", "clients", "options"), CASES)
def test_partitions_follow_from_the_seed(name, clients, options):
    one, same, other = (partition(LABELS, clients, seed, name, **options) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_iid_shares_are_equal_and_alike():
    parts = partition(LABELS, 7, seed=1)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert skew(parts) < 0.1


@pytest.mark.parametrize(("clients", "most"), [(10, 2), (20, 2), (7, 4), (33, 4)])
def test_shards_hold_few_classes(clients, most):
    classes = (counts(partition(LABELS, clients, seed=1, name="shards")) > 0).sum(1)
    assert classes.max() <= most  # two shards, each of which may lie across a border between classes
    assert np.median(classes) <= 3


def test_a_smaller_alpha_is_more_skewed():
    skews = [
        np.mean([skew(partition(LABELS, 5, seed, "dirichlet", alpha=alpha)) for seed in range(5)])
        for alpha in (0.1, 1.0, 10.0, 1000.0)
    ]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.4


def test_a_huge_alpha_comes_near_iid():
    parts = partition(LABELS, 5, seed=1, name="dirichlet", alpha=1e6)
    assert skew(parts) < 0.02
    assert np.ptp([len(part) for part in parts]) < 0.05 * len(LABELS) / 5


def test_as_many_clients_as_there_are_examples_for():
    assert len(partition(LABELS[:100], 10, seed=1)) == 10


@pytest.mark.parametrize(
    ("labels", "clients", "name", "options", "said"),
    [
        (LABELS[:100], 11, "iid", {}, ["100 examples", "11 clients", "fewer clients"]),
        (LABELS, 401, "shards", {}, ["4000 examples", "401 clients"]),
        (LABELS[:200], 10, "dirichlet", {"alpha": 0.01}, ["'dirichlet'", "larger alpha"]),
        (LABELS, 3, "Iid", {}, ["unknown partitioner 'Iid'", "iid, shards, dirichlet"]),
    ],
)
def test_impossible_partitions_are_clear_errors(labels, clients, name, options, said):
    with pytest.raises(ValueError, match=r"clients|partitioner") as error:
        partition(labels, clients, seed=1, name=name, **options)
    assert all(words in str(error.value) for words in said)


# --- What a client loads ---------------------------------------------------------------------------------------------


def write_data(folder, images, labels):
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        np.save(folder / f"{split}_images.npy", images)
        np.save(folder / f"{split}_labels.npy", labels)
    (folder / "meta.json").write_text(json.dumps({"name": folder.name, "source": "a test"}))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data set whose pictures carry their row in their first two pixels."""
    images = np.zeros((ROWS, 3, 32, 32), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.divmod(np.arange(ROWS), 256)
    write_data(tmp_path / "cifar10", images, np.arange(ROWS) % 10)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.setenv("DATASET", "cifar10")
    return tmp_path


def rows(loader):
    images = loader.dataset.images
    return (images[:, 0, 0, 0].long() * 256 + images[:, 0, 0, 1].long()).tolist()


def load(partition_id=0, clients=7, seed=1, **options):
    return load_client_data(partition_id, clients, 16, seed, **options)


def order(loader):
    return [int(label) for _, labels in loader for label in labels]


def asked(client, server_round, kind=MessageType.TRAIN, seed=1):
    """The order in which a client that is asked takes its own examples, and what three generators say then."""
    content = RecordDict({"config": ConfigRecord({"server-round": server_round})})
    message = SimpleNamespace(content=content, metadata=SimpleNamespace(message_type=kind))
    context = Context(1, 1, {"partition-id": client, "num-partitions": 7}, RecordDict(), {"seed": seed})

    def answer(message, context):
        training, _ = load(client)
        return order(training), torch.rand(1).item(), np.random.random(), random.random()

    return seeded(message, context, answer)


def test_a_tenth_is_kept_for_evaluation(data):
    held = {}
    for client in range(7):
        training, evaluation = load(client)
        held[client] = set(rows(training)) | set(rows(evaluation))
        assert not set(rows(training)) & set(rows(evaluation))
        assert len(evaluation.dataset) == len(held[client]) // 10
        assert training.dataset.labels.tolist() == [row % 10 for row in rows(training)]
    assert sorted(row for client in held.values() for row in client) == list(range(ROWS))


def test_the_smallest_partition_still_evaluates_on_one_example(data):
    training, evaluation = load(clients=ROWS // MIN_EXAMPLES)
    assert (len(training.dataset), len(evaluation.dataset)) == (9, 1)


def test_a_client_of_seven_keeps_one_for_evaluation(data, monkeypatch):
    """As in a copy that has lowered MIN_EXAMPLES; a tenth of seven would be none."""
    monkeypatch.setattr(cifar_utils, "MIN_EXAMPLES", 7)
    training, evaluation = load(56, clients=57)  # 400 examples: one client has 8
    assert (len(training.dataset), len(evaluation.dataset)) == (6, 1)


def test_the_same_examples_in_every_round_in_another_order(data):
    one, same, later = asked(0, 1), asked(0, 1), asked(0, 2)
    assert one == same
    assert sorted(one[0]) == sorted(later[0])
    assert one[0] != later[0]


def test_the_random_numbers_differ_by_run_round_client_and_phase(data):
    asks = [asked(0, 1), asked(0, 2), asked(1, 1), asked(0, 1, MessageType.EVALUATE), asked(0, 1, seed=2)]
    for generator in (1, 2, 3):
        assert len({numbers[generator] for numbers in asks}) == len(asks)


def test_what_is_kept_for_evaluation_is_not_shuffled(data):
    _, evaluation = load()
    assert order(evaluation) == order(evaluation) == [row % 10 for row in rows(evaluation)]


def test_the_seed_changes_the_examples(data):
    assert rows(load(seed=1)[0]) != rows(load(seed=2)[0])


def test_options_reach_the_partitioner(data):
    sizes = [len(load(client, name="dirichlet", alpha=0.5)[0].dataset) for client in range(7)]
    assert max(sizes) - min(sizes) > 5
    with pytest.raises(ValueError, match="unknown partitioner"):
        load(name="none")


def test_pictures_are_mapped_not_read(data):
    images, labels = load_split("train")
    assert isinstance(images, np.memmap)
    assert images.shape == (ROWS, 3, 32, 32)
    assert not images.flags.writeable
    assert labels.dtype == np.int64
    assert load()[0].dataset.images.shape[0] < ROWS / 6  # a copy of this client's rows, and of no others


def test_a_client_does_without_torchvision(data):
    code = (
        "import sys, client, cifar_utils\n"
        "cifar_utils.load_client_data(0, 3, 16, seed=1)\n"
        "print([name for name in ('torchvision', 'PIL', 'matplotlib', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=BASIC, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


@pytest.mark.parametrize("dataset", ["cifar10", "synthetic", None])
def test_data_that_is_not_ready_is_a_clear_error(tmp_path, monkeypatch, dataset):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    if dataset:
        monkeypatch.setenv("DATASET", dataset)
    else:
        monkeypatch.delenv("DATASET", raising=False)
    with pytest.raises(FileNotFoundError, match=r"python cifar_utils\.py"):
        load_split("train")
