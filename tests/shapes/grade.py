"""Does a picture show what its caption says? Answered from the pixels and the caption alone, without a network.

    grade(image, "a small yellow star at the left on a blue background").all

    border -> background colour -> which pixels differ from it -> their colour -> how much of each pixel is covered
           -> clean mask -> its box: place and size -> the mask seen in its box against every shape's own: shape

Soft edges cost nothing: coverage is measured between the two colours found and cut at a half. A second object, a torn
outline or a colour between two of the palette make the attribute wrong.
"""

import functools
from dataclasses import dataclass

import numpy as np

from tests.shapes.draw import COLOURS, PLACES, SHAPES, SIZES, coverage, parse

MAX_COLOUR_DISTANCE = 56.0  # in RGB; the nearest two colours of the palette are 114 apart
MAX_STAIN = 0.1  # part of the border that may differ from the background
CONTRAST = 45.0  # a pixel this far from the background belongs to something else
GRID = 40  # a mask in its box is compared on this many cells a side
MIN_OVERLAP = 0.78  # intersection over union with the right shape
MIN_RADIUS = 0.06
SMALLEST_LARGE = (SIZES["small"][0] + SIZES["large"][0]) / 2
MAX_PLACE_DISTANCE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    background: bool
    colour: bool
    shape: bool
    place: bool
    size: bool

    @property
    def all(self) -> bool:
        return self.background and self.colour and self.shape and self.place and self.size


def grade(image: object, caption: str) -> Grade:
    """image: a PIL picture, or an array [H, W, 3], uint8 or floats in 0..1."""
    scene, pixels = parse(caption), as_pixels(image)
    background = border_colour(pixels)
    seen_background = nearest_colour(background) if is_flat_border(pixels, background) else None
    found = find_object(pixels, background)
    if found is None:
        is_right = seen_background == scene.background
        return Grade(background=is_right, colour=False, shape=False, place=False, size=False)
    colour, mask = found
    (x, y), radius = centre_and_radius(mask)
    is_large = radius >= SMALLEST_LARGE
    return Grade(
        background=seen_background == scene.background,
        colour=nearest_colour(colour) == scene.colour,
        shape=nearest_shape(mask) == scene.shape,
        place=nearest_place(x, y) == scene.place,
        size=radius >= MIN_RADIUS and ("large" if is_large else "small") == scene.size,
    )


def as_pixels(image: object) -> np.ndarray:
    """float32 [H, W, 3] in 0..255."""
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"a picture must be [height, width, 3], found {pixels.shape}")
    scale = 1.0 if pixels.dtype == np.uint8 else 255.0
    return pixels.astype(np.float32) * scale


def border_of(pixels: np.ndarray) -> np.ndarray:
    """The outermost two pixels, [N, 3]."""
    inner = np.zeros(pixels.shape[:2], bool)
    inner[2:-2, 2:-2] = True
    return pixels[~inner]


def border_colour(pixels: np.ndarray) -> np.ndarray:
    return np.median(border_of(pixels), axis=0)


def is_flat_border(pixels: np.ndarray, background: np.ndarray) -> bool:
    return bool((distance(border_of(pixels), background) > CONTRAST).mean() <= MAX_STAIN)


def distance(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return np.sqrt(((pixels - colour) ** 2).sum(-1))


def nearest_colour(colour: np.ndarray) -> str | None:
    name = min(COLOURS, key=lambda known: float(distance(colour, np.array(COLOURS[known]))))
    return name if distance(colour, np.array(COLOURS[name])) <= MAX_COLOUR_DISTANCE else None


def find_object(pixels: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The colour and the mask of what stands on the background, or None where nothing does."""
    away = distance(pixels, background)
    if (away > CONTRAST).sum() < 12:
        return None
    # Pixels at the edge mix two colours; the inside is where the distance is largest.
    colour = np.median(pixels[away >= max(CONTRAST, 0.8 * np.quantile(away[away > CONTRAST], 0.9))], axis=0)
    direction = colour - background
    covered = ((pixels - background) @ direction) / (direction @ direction)
    mask = without_specks(covered > 0.5)
    return (colour, mask) if mask.any() else None


def without_specks(mask: np.ndarray) -> np.ndarray:
    """Drop pixels with fewer than three of nine neighbours set."""
    padded = np.pad(mask, 1).astype(np.int8)
    height, width = mask.shape
    neighbours = sum(padded[i : i + height, j : j + width] for i in range(3) for j in range(3))
    return mask & (neighbours >= 3)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def centre_and_radius(mask: np.ndarray) -> tuple[tuple[float, float], float]:
    top, bottom, left, right = box_of(mask)
    height, width = mask.shape
    radius = max((bottom - top) / height, (right - left) / width) / 2
    return ((left + right) / (2 * width), (top + bottom) / (2 * height)), radius


def nearest_place(x: float, y: float) -> str | None:
    name = min(PLACES, key=lambda known: np.hypot(x - PLACES[known][0], y - PLACES[known][1]))
    return name if np.hypot(x - PLACES[name][0], y - PLACES[name][1]) <= MAX_PLACE_DISTANCE else None


def in_its_box(mask: np.ndarray) -> np.ndarray:
    """bool [GRID, GRID]: the mask stretched over its own box."""
    top, bottom, left, right = box_of(mask)
    rows = top + ((np.arange(GRID) + 0.5) * (bottom - top) / GRID).astype(int)
    columns = left + ((np.arange(GRID) + 0.5) * (right - left) / GRID).astype(int)
    return mask[rows[:, None], columns[None, :]]


@functools.cache
def ideal(shape: str) -> tuple[np.ndarray, float]:
    """A shape in its box, and the ratio of the box's sides."""
    mask = coverage(shape, 0.5, 0.5, 0.4, 256) > 0.5
    top, bottom, left, right = box_of(mask)
    return in_its_box(mask), (bottom - top) / (right - left)


def nearest_shape(mask: np.ndarray) -> str | None:
    seen = in_its_box(mask)
    top, bottom, left, right = box_of(mask)
    overlaps = {shape: (seen & ideal(shape)[0]).sum() / (seen | ideal(shape)[0]).sum() for shape in SHAPES}
    name = max(overlaps, key=overlaps.__getitem__)
    stretched = ((bottom - top) / (right - left)) / ideal(name)[1]
    return name if overlaps[name] >= MIN_OVERLAP and 0.75 <= stretched <= 1.33 else None
