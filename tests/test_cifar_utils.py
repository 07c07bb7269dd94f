"""The model, its loops and its data loaders, each against the plainest computation of the same thing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from paths import BASIC  # noqa: F401  (makes the modules of basic importable)
from torch import nn

import cifar_utils
from cifar_utils import Net, Pictures

torch.set_num_threads(1)  # as in a run; several threads for such small batches only wait for one another
UNEVEN = 70  # examples: batches of 32 leave a last one of 6


def pictures(count, seed=0):
    """Pictures that are easy to learn: each class is one colour, under noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    colours = np.random.default_rng(99).integers(0, 200, (10, 3, 1, 1))
    return (colours[labels] + rng.integers(0, 56, (count, 3, 32, 32))).astype(np.uint8), labels


def batches(count=UNEVEN, batch_size=32, shuffle=False):
    return Pictures(*pictures(count)).loader(batch_size, shuffle)


def everything(loader):
    """All examples of a loader in one batch."""
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def make_net(seed=0):
    torch.manual_seed(seed)
    return Net()


class Observer(nn.Module):
    """A model with everything that training and testing treat differently; it notes how it was called."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
        self.seen = []

    def forward(self, x):
        self.seen.append((self.training, torch.is_grad_enabled()))
        return self.layers(x)


# --- The model -------------------------------------------------------------------------------------------------------


def test_the_net_has_the_lenet_number_of_parameters():
    assert sum(p.numel() for p in Net().parameters()) == 62_006


@pytest.mark.parametrize("batch", [1, 7])
def test_the_net_gives_ten_logits_a_picture(batch):
    assert Net()(torch.zeros(batch, 3, 32, 32)).shape == (batch, 10)


def test_the_net_tells_one_picture_from_another():
    with torch.no_grad():
        one, other = make_net()(everything(batches())[0][:2])
    assert not torch.allclose(one, other)


# --- test ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 32, 69, 70, 1000])
def test_loss_and_accuracy_are_means_over_examples(batch_size):
    net = make_net()
    images, labels = everything(batches())
    logits = net(images)
    expected_accuracy = (logits.argmax(1) == labels).float().mean().item()

    found = cifar_utils.test(net, batches(batch_size=batch_size))

    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx(expected_accuracy)
    assert {name: type(value) for name, value in found.items()} == {"loss": float, "accuracy": float}


@pytest.mark.parametrize(("right", "accuracy"), [(True, 1.0), (False, 0.0)])
def test_accuracy_is_a_fraction(right, accuracy):
    class Oracle(nn.Module):
        """Is sure of class 3."""

        def forward(self, x):
            return F.one_hot(torch.full((len(x),), 3), 10).float()

    images, _ = pictures(UNEVEN)
    labels = np.full(UNEVEN, 3 if right else 4)
    assert cifar_utils.test(Oracle(), Pictures(images, labels).loader(32))["accuracy"] == accuracy


def test_testing_changes_nothing_and_leaves_no_gradients():
    model = Observer()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    first = cifar_utils.test(model, batches())
    second = cifar_utils.test(model, batches())

    assert first == second  # neither dropout nor batch statistics
    assert set(model.seen) == {(False, False)}  # eval mode, no gradients
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- train -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_training_loss_is_the_mean_over_examples(epochs):
    net = make_net()
    images, labels = everything(batches())
    expected = F.cross_entropy(net(images), labels).item()
    # Without a step the model stays as it is, so that every batch's loss can be compared.
    found = cifar_utils.train(net, batches(shuffle=True), epochs=epochs, learning_rate=0.0)
    assert found == pytest.approx(expected, rel=1e-5)


def test_training_learns():
    net = make_net()
    before = cifar_utils.test(net, batches(320))
    cifar_utils.train(net, batches(320, shuffle=True), epochs=15, learning_rate=0.01)
    after = cifar_utils.test(net, batches(320))
    assert after["loss"] < before["loss"] / 2
    assert after["accuracy"] > 0.6


def test_training_uses_training_mode():
    model = Observer()
    model.eval()
    cifar_utils.train(model, batches(), epochs=1, learning_rate=0.01)
    assert set(model.seen) == {(True, True)}


def test_training_is_repeatable():
    states = []
    for _ in range(2):
        net = make_net()
        cifar_utils.train(net, batches(shuffle=True), epochs=2, learning_rate=0.01)
        states.append(net.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


# --- The data loaders ------------------------------------------------------------------------------------------------


def order(loader):
    """The rows of one pass; each picture's row stands in its label."""
    return [int(label) for _, labels in loader for label in labels]


def numbered(shuffle=True, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    return Pictures(pictures(UNEVEN)[0], np.arange(UNEVEN)).loader(32, shuffle)


def test_each_pass_is_a_new_permutation():
    loader = numbered(seed=1)
    first, second = order(loader), order(loader)
    assert sorted(first) == sorted(second) == list(range(UNEVEN))
    assert first != second


def test_the_order_follows_from_the_seed():
    orders = {}
    for seed in (1, 2):
        for _ in range(2):
            loader = numbered(seed=seed)
            orders.setdefault(seed, []).append([order(loader), order(loader)])
    assert orders[1][0] == orders[1][1]
    assert orders[1][0] != orders[2][0]


def test_without_shuffling_the_order_stays():
    loader = numbered(shuffle=False)
    assert order(loader) == order(loader) == list(range(UNEVEN))


@pytest.mark.parametrize(("count", "sizes"), [(70, [32, 32, 6]), (64, [32, 32]), (5, [5])])
def test_the_last_batch_holds_the_rest(count, sizes):
    loader = batches(count)
    assert [len(labels) for _, labels in loader] == sizes
    assert len(loader.dataset) == count


def test_a_batch_is_fetched_whole():
    """One by one, a pass over CIFAR-10 takes many times as long."""
    asked = []

    class Noting(Pictures):
        def __getitems__(self, rows):
            asked.append(len(rows))
            return super().__getitems__(rows)

    images, labels = everything(Noting(*pictures(UNEVEN)).loader(32, shuffle=True))
    assert asked == [32, 32, 6]
    assert (images.shape, labels.shape) == ((UNEVEN, 3, 32, 32), (UNEVEN,))


def test_pixels_are_scaled_to_minus_one_to_one():
    images = np.zeros((3, 3, 32, 32), dtype=np.uint8)
    images[1], images[2] = 255, 51
    ((scaled, labels),) = Pictures(images, np.array([7, 8, 9])).loader(32)
    assert scaled.dtype == torch.float32
    assert labels.tolist() == [7, 8, 9]
    assert scaled[:, 0, 0, 0].tolist() == pytest.approx([-1.0, 1.0, -0.6])
    assert images[1].min() == 255  # the pictures themselves are not touched


def test_pictures_keep_their_labels_when_shuffled():
    count = 50
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 3, 32, 32)).copy()
    for scaled, labels in Pictures(images, np.arange(count)).loader(16, shuffle=True):
        assert ((scaled[:, 0, 0, 0] + 1) * 127.5).round().long().tolist() == labels.tolist()
