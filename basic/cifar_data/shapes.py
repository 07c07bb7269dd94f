"""Draws the stand-in for CIFAR-10: pictures of ten kinds of shape.

A shape is a function of the pixels' coordinates (u, v) around its own centre and of its half-width r: about the
distance to its outline, negative inside. Only + - * / % and square roots are used: they round alike on every machine.
"""

import numpy as np


def _box(u: np.ndarray, v: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - r


def _plus(u: np.ndarray, v: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.maximum(_box(u, v, r), np.minimum(np.abs(u), np.abs(v)) - 0.25 * r)


def _bars(u: np.ndarray, r: np.ndarray) -> np.ndarray:  # three bars across [-r, r], with two gaps between them
    return (np.abs((2.5 * u / r + 1) % 2 - 1) - 0.5) * r / 2.5


SHAPES = {  # in the order of their labels
    "disc": lambda u, v, r: np.sqrt(u * u + v * v) - r,
    "ring": lambda u, v, r: np.abs(np.sqrt(u * u + v * v) - 0.8 * r) - 0.2 * r,
    "square": lambda u, v, r: _box(u, v, 0.9 * r),
    "frame": lambda u, v, r: np.abs(_box(u, v, 0.8 * r)) - 0.2 * r,
    "triangle": lambda u, v, r: np.maximum(v - 0.8 * r, 0.9 * np.abs(u) - 0.45 * (v + r)),
    "plus": _plus,
    "cross": lambda u, v, r: _plus(0.7 * (u + v), 0.7 * (u - v), 1.1 * r),
    "rows": lambda u, v, r: np.maximum(_box(u, v, r), _bars(v, r)),
    "columns": lambda u, v, r: np.maximum(_box(u, v, r), _bars(u, r)),
    "checks": lambda u, v, r: np.maximum(_box(u, v, r), -_bars(u, r) * _bars(v, r)),
}


def _turn(x: np.ndarray, y: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotate by the angle whose half has tangent t: t = 0.1 is 11 degrees, t = 1 is 90."""
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    return cos * x + sin * y, cos * y - sin * x


def draw_shapes(num_examples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw images, uint8 (N, 3, 32, 32), and labels, int64 (N,): a bright shape on darker ground, two strokes, noise.

    Only the shape depends on the label. The same arguments give the same pictures, as long as numpy's generator stays.
    """
    rng = np.random.default_rng(seed)
    images = np.empty((num_examples, 3, 32, 32), dtype=np.uint8)
    labels = rng.permutation(np.arange(num_examples, dtype=np.int64) % len(SHAPES))
    y, x = np.mgrid[:32, :32].astype(np.float32) - 15.5  # pixels from the middle

    def draw(low: float, high: float, *size: int) -> np.ndarray:  # random numbers for each of the members
        return low + (high - low) * rng.random((len(members), *size), dtype=np.float32)

    for label, shape in enumerate(SHAPES.values()):
        members = np.flatnonzero(labels == label)
        ground, bright = draw(0, 0.5, 3, 1, 1), draw(0.5, 1, 3, 1, 1)
        colour = ground + draw(0.5, 1, 1, 1, 1) * (bright - ground)  # from faint to strong contrast
        u, v = _turn(x - draw(-4, 4, 1, 1), y - draw(-4, 4, 1, 1), draw(-0.1, 0.1, 1, 1))
        layers = [(shape(u, v, draw(7, 12, 1, 1)), colour)]
        for _ in range(2):  # strokes, 2.5 pixels wide
            _, across = _turn(x, y, draw(-1, 1, 1, 1))
            layers.append((np.abs(across - draw(-16, 16, 1, 1)) - 1.25, draw(0, 1, 3, 1, 1)))
        picture = ground
        for distance, paint in layers:
            cover = np.clip(0.5 - distance, 0, 1)[:, None]  # 0 outside, 1 inside, soft in between
            picture = picture + cover * (paint - picture)
        picture = picture + draw(-0.1, 0.1, 3, 32, 32)
        images[members] = (255 * np.clip(picture, 0, 1)).astype(np.uint8)
    return images, labels
