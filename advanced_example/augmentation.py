"""The usual augmentation of CIFAR-10 for training: pictures shifted and mirrored at random (He et al., 2016)."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

PADDING = 4  # pixels that a picture may move in each direction


class Augmented:
    """The batches of a loader, their pictures shifted and mirrored anew in each pass."""

    def __init__(self, trainloader: DataLoader) -> None:
        self.trainloader = trainloader

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.trainloader:
            yield shift_and_mirror(images), labels


def shift_and_mirror(images: Tensor) -> Tensor:
    """Shift each picture of (B, C, H, W) by up to PADDING pixels, its border reflected, and mirror half of them."""
    count, _, height, width = images.shape
    padded = F.pad(images, [PADDING] * 4, mode="reflect").permute(0, 2, 3, 1)
    top, left = torch.randint(2 * PADDING + 1, (2, count, 1))
    rows, columns = top + torch.arange(height), left + torch.arange(width)  # (B, H) and (B, W)
    mirrored = torch.rand(count, 1) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    where = torch.arange(count).view(-1, 1, 1), rows[:, :, None], columns[:, None, :]
    return padded[where].permute(0, 3, 1, 2)
