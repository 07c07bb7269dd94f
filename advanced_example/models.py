"""Models by name. A third is one line in MODELS: a function without arguments that returns a network.

The network takes pictures as float (B, 3, 32, 32) in [-1, 1] and returns one logit for each of ten classes, (B, 10).
"cnn", the default, is `Net` of cifar_utils.py, where YOUR MODEL goes.
"""

from collections.abc import Callable

from torch import nn

import cifar_utils


def resnet18() -> nn.Module:
    """ResNet-18 (He et al., 2016, arXiv:1512.03385) for 32x32 pictures, with GroupNorm: 11,173,962 parameters.

    A BatchNorm layer keeps the mean and variance of the data that it saw. On non-IID clients these differ, and their
    average fits none of them; GroupNorm keeps none (Hsieh et al., 2020, arXiv:1910.00189).
    """
    import torchvision  # takes 1.5 s, so only where this model is asked for

    net = torchvision.models.resnet18(
        num_classes=cifar_utils.NUM_CLASSES, norm_layer=lambda channels: nn.GroupNorm(32, channels)
    )
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)  # 7x7 with stride 2, for 224x224, would see next to nothing
    net.maxpool = nn.Identity()
    return net


MODELS: dict[str, Callable[[], nn.Module]] = {
    "cnn": cifar_utils.Net,
    "resnet18": resnet18,
}


def make_model(name: str) -> nn.Module:
    """Return a new network with random weights, drawn from PyTorch's global generator."""
    return MODELS[name]()
