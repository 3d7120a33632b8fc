"""Captioned scenes: one flat shape on a flat background, drawn with soft one-pixel edges.

    scene = parse("a small yellow star at the left on a blue background")
    image = draw(scene, seed=7)                      # uint8 [128, 128, 3]

A scene has five attributes (size, colour, shape, place, background) and one caption; the seed moves it by a few
pixels and changes its radius a little. Two kinds of scene never enter training:

- held-out captions (`is_held_out_caption`): this very combination of five is new, every pair in it has been seen;
- held-out pairs (`HELD_OUT_PAIRS`): this colour and this shape have never been seen together.

`python -m tests.shapes.draw --out configs/prompts` writes the two prompt lists.
"""

import argparse
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PIXELS = 128
SIZES = {"small": (0.13, 0.008), "large": (0.235, 0.012)}  # radius and its spread, as parts of the picture
COLOURS = {
    "red": (214, 48, 49),
    "yellow": (250, 204, 50),
    "green": (46, 160, 78),
    "blue": (45, 98, 220),
    "purple": (150, 66, 190),
    "white": (246, 246, 246),
    "black": (24, 24, 28),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart")
PLACES = {
    "at the left": (0.28, 0.5),
    "at the right": (0.72, 0.5),
    "at the top": (0.5, 0.28),
    "at the bottom": (0.5, 0.72),
    "in the centre": (0.5, 0.5),
}
PLACE_JITTER = 0.02
HELD_OUT_PAIRS = frozenset({("purple", "star"), ("green", "ring"), ("white", "cross"), ("red", "heart")})
SUPERSAMPLING = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a caption says."""

    size: str
    colour: str
    shape: str
    place: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} {self.place} on a {self.background} background"


def parse(caption: str) -> Scene:
    """The scene of a caption of this grammar; any other text is refused."""
    words = caption.split()
    if len(words) != 11:
        raise ValueError(f"not a caption of a scene: {caption!r}; say for example {next(scenes()).caption!r}")
    scene = Scene(size=words[1], colour=words[2], shape=words[3], place=" ".join(words[4:7]), background=words[9])
    known = (scene.size in SIZES, scene.colour in COLOURS, scene.shape in SHAPES, scene.place in PLACES)
    if not all(known) or scene.background not in COLOURS or scene.caption != caption:
        raise ValueError(f"not a caption of a scene: {caption!r}; say for example {next(scenes()).caption!r}")
    return scene


def scenes() -> Iterator[Scene]:
    """Every scene, in a fixed order."""
    for size, colour, shape, place, background in itertools.product(SIZES, COLOURS, SHAPES, PLACES, COLOURS):
        if colour != background:
            yield Scene(size=size, colour=colour, shape=shape, place=place, background=background)


def is_held_out_pair(scene: Scene) -> bool:
    return (scene.colour, scene.shape) in HELD_OUT_PAIRS


def is_held_out_caption(scene: Scene) -> bool:
    return zlib.crc32(scene.caption.encode()) % 9 == 0


def training_scenes() -> list[Scene]:
    return [scene for scene in scenes() if not is_held_out_pair(scene) and not is_held_out_caption(scene)]


def shuffled(found: list[Scene], seed: int) -> list[Scene]:
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(found))
    return [found[i] for i in order]


def held_out_scenes(count: int = 256) -> list[Scene]:
    """The evaluation list: combinations that training never saw, made of pairs that it did see."""
    return shuffled([s for s in scenes() if is_held_out_caption(s) and not is_held_out_pair(s)], seed=1)[:count]


def held_out_pair_scenes(count: int = 96) -> list[Scene]:
    """The harder list: the colour and the shape have never been seen together."""
    return shuffled([s for s in scenes() if is_held_out_pair(s)], seed=2)[:count]


def draw(scene: Scene, seed: int, pixels: int = PIXELS) -> np.ndarray:
    """The picture, uint8 [pixels, pixels, 3]; the seed decides the few pixels of freedom."""
    alpha = coverage_of(scene, seed, pixels)[..., None]
    shape, background = np.array(COLOURS[scene.colour], float), np.array(COLOURS[scene.background], float)
    return np.rint(background + alpha * (shape - background)).astype(np.uint8)


def coverage_of(scene: Scene, seed: int, pixels: int = PIXELS) -> np.ndarray:
    """How much of each pixel the shape covers, float32 [pixels, pixels] in 0..1."""
    random = np.random.Generator(np.random.Philox(key=seed))
    middle, spread = SIZES[scene.size]
    radius = middle + spread * random.uniform(-1, 1)
    x, y = PLACES[scene.place] + PLACE_JITTER * random.uniform(-1, 1, 2)
    return coverage(scene.shape, x, y, radius, pixels)


def coverage(shape: str, x: float, y: float, radius: float, pixels: int) -> np.ndarray:
    """Supersampled inside test around one centre; x, y and radius are parts of the picture."""
    alpha = np.zeros((pixels, pixels), np.float32)
    top, bottom, left, right = (
        int(np.clip(np.floor(edge * pixels), 0, pixels))
        for edge in (y - radius, y + radius + 1 / pixels, x - radius, x + radius + 1 / pixels)
    )
    rows = (np.arange(top * SUPERSAMPLING, bottom * SUPERSAMPLING) + 0.5) / (SUPERSAMPLING * pixels)
    columns = (np.arange(left * SUPERSAMPLING, right * SUPERSAMPLING) + 0.5) / (SUPERSAMPLING * pixels)
    hit = inside(shape, (columns[None, :] - x) / radius, (rows[:, None] - y) / radius)
    folded = hit.reshape(bottom - top, SUPERSAMPLING, right - left, SUPERSAMPLING)
    alpha[top:bottom, left:right] = folded.mean((1, 3))
    return alpha


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """True where (x, y) lies in the shape, which fills about -1..1 on both axes; y points down."""
    if shape == "circle":
        return x**2 + y**2 <= 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.9
    if shape == "triangle":
        return (y <= 0.88) & (abs(x) <= (y + 0.92) / 1.8)
    if shape == "star":
        return inside_star(x, y)
    if shape == "ring":
        return (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.5**2)
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) <= 0.33) & (np.maximum(abs(x), abs(y)) <= 0.97)
    assert shape == "heart", shape
    a, b = 1.16 * x, 0.12 - 1.16 * y
    return (a**2 + b**2 - 1) ** 3 - a**2 * b**3 <= 0


def inside_star(x: np.ndarray, y: np.ndarray, inner: float = 0.47) -> np.ndarray:
    """Five points. Folded onto one half point by symmetry, the outline is a single straight line."""
    y = y - 0.09  # the star's box is centred, not its circle
    fifth = 2 * np.pi / 5
    angle = abs((np.arctan2(x, -y) + fifth / 2) % fifth - fifth / 2)
    radius = np.hypot(x, y)
    u, v = radius * np.cos(angle), radius * np.sin(angle)
    tip, notch = np.array([1.0, 0.0]), inner * np.array([np.cos(fifth / 2), np.sin(fifth / 2)])
    edge = notch - tip
    return (u - tip[0]) * edge[1] - v * edge[0] <= 0


def write_prompt_lists(out_dir: Path, num_training: int = 400) -> None:
    """shapes.txt (seen in training, for harvests and demos) and shapes_heldout.txt (the evaluation list)."""
    lists = {"shapes.txt": shuffled(training_scenes(), seed=3)[:num_training], "shapes_heldout.txt": held_out_scenes()}
    for name, found in lists.items():
        (out_dir / name).write_text("".join(scene.caption + "\n" for scene in found), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="write the prompt lists of the drawn scenes")
    parser.add_argument("--out", type=Path, required=True)
    write_prompt_lists(parser.parse_args().out)
