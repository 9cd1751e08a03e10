"""Real grey pictures, those that scikit-image brings along, and noise drawn once from a seed.

Pictures to learn from and pictures held out are different photographs; each set has scenes and textures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TRAINING = ("coins", "brick", "moon", "text", "clock")
HELD_OUT = ("camera", "cell", "gravel", "page", "grass")


def whole(names: Sequence[str], size: int) -> np.ndarray:
    """The middle square of each picture, resized: shape (len(names), size, size), float64 in [0, 1]."""
    from skimage.transform import resize

    squares = []
    for name in names:
        picture = _grey(name)
        side = min(picture.shape)
        top, left = ((n - side) // 2 for n in picture.shape)
        square = picture[top : top + side, left : left + side]
        squares.append(resize(square, (size, size), anti_aliasing=True))
    return np.clip(np.stack(squares), 0, 1)


def crops(names: Sequence[str], size: int, each: int, seed: int, scale: float = 0.5) -> np.ndarray:
    """``each`` crops of every picture, at random places: shape (each * len(names), size, size).

    The pictures are scaled by ``scale`` first, which removes most of the noise of their own. Crops may
    overlap. Those of one picture follow one another.
    """
    from skimage.transform import rescale

    rng = np.random.default_rng(seed)
    found = []
    for name in names:
        picture = rescale(_grey(name), scale, anti_aliasing=True)
        if min(picture.shape) < size:
            raise ValueError(f"size must be at most {min(picture.shape)} for {name}, got {size}.")
        for _ in range(each):
            top, left = (rng.integers(0, n - size + 1) for n in picture.shape)
            found.append(picture[top : top + size, left : left + size])
    return np.clip(np.stack(found), 0, 1)


def noisy(clean: np.ndarray, sigma, seed: int) -> np.ndarray:
    """Normal noise added; ``sigma`` a number or one for each pixel. Not clipped."""
    return clean + sigma * np.random.default_rng(seed).standard_normal(clean.shape)


def _grey(name: str) -> np.ndarray:
    from skimage import data

    return getattr(data, name)() / 255
