"""The usual way to load pictures: a PIL picture each, ToTensor and Normalize for each, and a DataLoader around them."""

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


class PerPicture(Dataset):
    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = [Image.fromarray(image.transpose(1, 2, 0)) for image in images]
        self.labels = labels
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[row]), int(self.labels[row])


def load(images: np.ndarray, labels: np.ndarray, batch_size: int, shuffle: bool = True) -> DataLoader:
    return DataLoader(PerPicture(images, labels), batch_size, shuffle)
