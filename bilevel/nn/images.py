"""Augmentations of images whose strengths are hyperparameters: traced, and one for each image if need be.

Each draws one number for an image and scales it by the strength, so that a strength of zero leaves images as
they are. `affine` is differentiable by its strengths where they are above zero (at zero bilinear
interpolation has a kink at every pixel: start above it); `cutout` is not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bilevel.nn.noise import strength_of


def affine(images, key, degrees=0.0, scale=0.0, translate=0.0) -> jax.Array:
    """Random rotation, zoom and shift about the centre, in one resampling; what lies outside is zero.

    Args:
      images: floating, shape (images, height, width, channels).
      key: PRNG key.
      degrees: angles are uniform between minus and plus this many; a scalar or one for each image.
      scale: zoom factors are ``exp(u)``, u uniform between minus and plus this.
      translate: shifts along both axes are uniform between minus and plus this share of their length.

    Raises:
      TypeError, ValueError: images of another shape, strengths that are not one for each of them.
    """
    images = _images(images)
    given, images = images.dtype, images.astype(jnp.promote_types(images.dtype, jnp.float32))  # of positions
    count, height, width, _ = images.shape
    strengths = [
        strength_of(name, value, images).reshape(-1)
        for name, value in (("degrees", degrees), ("scale", scale), ("translate", translate))
    ]
    drawn = jax.random.uniform(key, (4, count), images.dtype, -1, 1)
    angle = drawn[0] * strengths[0] * (jnp.pi / 180)
    zoom = jnp.exp(-drawn[1] * strengths[1])  # where a pixel comes from
    shift = drawn[2:] * strengths[2][None] * jnp.array([[height], [width]], images.dtype)

    def one(image, angle, zoom, shift):
        y, x = jnp.meshgrid(*(jnp.arange(n, dtype=image.dtype) for n in (height, width)), indexing="ij")
        middle = jnp.array([(height - 1) / 2, (width - 1) / 2], image.dtype)
        dy, dx = y - middle[0] - shift[0], x - middle[1] - shift[1]
        sin, cos = jnp.sin(angle) * zoom, jnp.cos(angle) * zoom
        return _sampled(image, cos * dy - sin * dx + middle[0], sin * dy + cos * dx + middle[1])

    return jax.vmap(one)(images, angle, zoom, shift.T).astype(given)


def cutout(images, length, key, holes=1.0, most_holes: int = 1) -> jax.Array:
    """Squares set to zero, their centres anywhere in the image.

    Args:
      images: floating, shape (images, height, width, channels).
      length: side of a square in pixels, rounded; a scalar or one for each image.
      key: PRNG key.
      holes: number of squares, rounded; a scalar or one for each image, at most ``most_holes``.
      most_holes: a Python number, which the shapes of the program depend on; more are not made.

    Raises:
      TypeError, ValueError: images of another shape, lengths that are not one for each of them.
    """
    images = _images(images)
    count, height, width, _ = images.shape
    side = jnp.round(strength_of("length", length, images))[..., 0]  # (images or 1, 1, 1)
    wanted = jnp.round(strength_of("holes", holes, images))[..., 0]
    centres = jax.random.uniform(key, (2, most_holes, count, 1, 1), images.dtype)
    y, x = (jnp.arange(n, dtype=images.dtype) for n in (height, width))
    seen = jnp.ones((count, height, width), bool)
    for hole in range(most_holes):
        # Pixels whose centres lie within half a side.
        top, left = centres[0, hole] * height - 0.5, centres[1, hole] * width - 0.5
        tall, wide = jnp.abs(y[None, :, None] - top) < side / 2, jnp.abs(x[None, None, :] - left) < side / 2
        seen &= ~(tall & wide & (hole < wanted))
    return images * seen[..., None].astype(images.dtype)


def _images(images) -> jax.Array:
    images = jnp.asarray(images)
    if images.ndim != 4:
        raise ValueError(f"images must have shape (images, height, width, channels), got {images.shape}.")
    return images


def _sampled(image, y, x):
    """Bilinear interpolation at positions of shape (height, width), zero outside."""
    height, width = image.shape[:2]
    top, left = jnp.floor(y), jnp.floor(x)
    total = jnp.zeros_like(image)
    for down in (0, 1):
        for right in (0, 1):
            row, column = top + down, left + right
            weight = (1 - jnp.abs(y - row)) * (1 - jnp.abs(x - column))
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            rows = jnp.clip(row, 0, height - 1).astype(jnp.int32)
            columns = jnp.clip(column, 0, width - 1).astype(jnp.int32)
            total += jnp.where(inside, weight, 0)[..., None] * image[rows, columns]
    return total
