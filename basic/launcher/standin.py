"""Stand-in pictures: ten classes of drawn shapes, for when CIFAR-10 can't be downloaded.

Every number comes from a seeded generator and from + - * / and square roots, which round the
same way on every machine. (Sines, cosines and normally distributed noise need not.)
"""

from collections.abc import Callable

import numpy as np

SIDE = 32  # pixels


def _bars(x: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Negative on three bars across [-r, r], positive on the two gaps between them."""
    return (np.abs((x / r * 2.5 + 1) % 2 - 1) - 0.5) * r / 2.5


def _xor(a, b):
    return np.maximum(np.minimum(a, b), -np.maximum(a, b))


def _box(u: np.ndarray, v: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - r


def _arms(u, v, r):
    return np.maximum(_box(u, v, r), np.minimum(np.abs(u), np.abs(v)) - 0.25 * r)


SHAPES: dict[str, Callable] = {
    "disc": lambda u, v, r: np.sqrt(u * u + v * v) - r,
    "ring": lambda u, v, r: np.abs(np.sqrt(u * u + v * v) - 0.8 * r) - 0.2 * r,
    "square": lambda u, v, r: _box(u, v, 0.9 * r),
    "frame": lambda u, v, r: np.abs(_box(u, v, 0.8 * r)) - 0.2 * r,
    "triangle": lambda u, v, r: np.maximum(v - 0.8 * r, 0.89 * np.abs(u) - 0.45 * (v + r)),
    "plus": _arms,
    "cross": lambda u, v, r: _arms((u + v) * 0.7071, (u - v) * 0.7071, 1.1 * r),
    "horizontal bars": lambda u, v, r: np.maximum(_box(u, v, r), _bars(v, r)),
    "vertical bars": lambda u, v, r: np.maximum(_box(u, v, r), _bars(u, r)),
    "checkerboard": lambda u, v, r: np.maximum(_box(u, v, r), _xor(_bars(u, r), _bars(v, r))),
}


def draw_shapes(
    num_examples: int,
    seed: int,
    noise=0.15,
    rmin=7.0,
    rspan=5.0,
    shift=10.0,
    tilt=0.2,
    cmin=0.3,
    clutter=1.0,
    bmax=0.5,
    fmin=0.5,
    lmax=0.5,
    wmin=0.3,
    below=1,
    above=0,
):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num_examples) % len(SHAPES))
    images = np.empty((num_examples, 3, SIDE, SIDE), dtype=np.uint8)
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2

    for label, shape in enumerate(SHAPES.values()):
        rows = np.flatnonzero(labels == label)

        def draw(low, high, *dims):
            return low + (high - low) * rng.random((len(rows), *(dims or (1, 1))))

        r = draw(rmin, rmin + rspan)
        cx, cy = draw(-shift / 2, shift / 2), draw(-shift / 2, shift / 2)
        t = draw(-tilt / 2, tilt / 2)
        c, s = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
        u, v = c * (x - cx) + s * (y - cy), c * (y - cy) - s * (x - cx)
        cover = np.clip(0.5 - shape(u, v, r), 0, 1)[:, None]
        back = draw(0, bmax, 3, 1, 1)
        fore = draw(fmin, 1, 3, 1, 1) if fmin >= 0 else (back + draw(cmin, 1 - cmin, 3, 1, 1)) % 1

        w = draw(wmin, 1)[..., None, None].reshape(-1, 1, 1, 1)
        fore = back + w * (fore - back)

        def strokes(p, n):
            for _ in range(int(n)):
                t = draw(-1, 1)
                off = draw(-16, 16)
                c, s = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
                stroke = np.clip(1.5 - np.abs(c * x + s * y - off), 0, 1)[:, None]
                p = p + stroke * (draw(0, lmax, 3, 1, 1) - p)
            return p

        p = strokes(back, below)
        p = p + cover * (fore - p)
        p = strokes(p, above)
        p = p + draw(-noise, noise, 3, SIDE, SIDE)
        images[rows] = np.clip(p, 0, 1) * 255
    return images, labels
