"""Scores of the shapes teacher with the stock pipeline, and its picture for the documentation.

    python -m tests.shapes.evaluate --teacher configs/teachers/shapes                  # the whole table, 10-15 minutes
    python -m tests.shapes.evaluate --teacher configs/teachers/shapes --rows held_out --count 64
    python -m tests.shapes.evaluate --teacher configs/teachers/shapes --rows picture --grid docs/shapes_teacher.png

One frame, 20 steps, guidance 5 and 3.5, one seed a caption. Rows: `trained` (captions seen in training), `held_out`
(256 new combinations of seen pairs), `held_out_pairs` (colour and shape never seen together), then the held-out
captions again with the experts `swapped`, and with `high_alone` or `low_alone` over the whole range.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from PIL import Image, ImageDraw, ImageFont

from tests.shapes.draw import PIXELS, held_out_pair_scenes, held_out_scenes, shuffled, training_scenes
from tests.shapes.grade import Grade, grade

STEPS, BATCH = 20, 32
GUIDANCE = (5.0, 3.5)
"""Of the high-noise expert and of the low-noise one."""
ATTRIBUTES = ("background", "colour", "shape", "place", "size", "all")
CAPTIONS: dict[str, Callable[[], list[str]]] = {
    "trained": lambda: [scene.caption for scene in shuffled(training_scenes(), seed=4)[:256]],
    "held_out": lambda: [scene.caption for scene in held_out_scenes()],
    "held_out_pairs": lambda: [scene.caption for scene in held_out_pair_scenes()],
}
EXPERTS = ("swapped", "high_alone", "low_alone")


def open_teacher(folder: Path, experts: str = "both") -> WanPipeline:
    """The stock pipeline in fp32, with its experts as they are, swapped, or one of them in both places."""
    pipeline = WanPipeline.from_pretrained(folder, variant="fp16", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    high, low = pipeline.transformer, pipeline.transformer_2
    places = {"both": (high, low), "swapped": (low, high), "high_alone": (high, high), "low_alone": (low, low)}
    pipeline.transformer, pipeline.transformer_2 = places[experts]
    return pipeline


def draw_captions(
    pipeline: WanPipeline,
    captions: list[str],
    *,
    seed: int = 0,
    steps: int = STEPS,
    guidance: tuple[float, float] = GUIDANCE,
) -> np.ndarray:
    """uint8 [N, 128, 128, 3]; the noise of a picture depends on its number alone."""
    drawn = []
    for start in range(0, len(captions), BATCH):
        part = captions[start : start + BATCH]
        output = pipeline(
            part,
            height=PIXELS,
            width=PIXELS,
            num_frames=1,
            num_inference_steps=steps,
            guidance_scale=guidance[0],
            guidance_scale_2=guidance[1],
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(part))],
            output_type="np",
        )
        drawn.append(np.rint(output.frames[:, 0] * 255).astype(np.uint8))
    return np.concatenate(drawn)


def share_right(images: np.ndarray, captions: list[str]) -> dict[str, float]:
    grades = [grade(image, caption) for image, caption in zip(images, captions, strict=True)]
    return {name: float(np.mean([getattr(found, name) for found in grades])) for name in ATTRIBUTES}


def print_row(name: str, scores: dict[str, float], count: int) -> None:
    cells = " | ".join(f"{scores[attribute]:.3f}" for attribute in ATTRIBUTES)
    print(f"| {name} | {count} | {cells} |", flush=True)


def print_table(folder: Path, rows: list[str], count: int, guidance: tuple[float, float]) -> None:
    print(f"| captions, experts | pictures | {' | '.join(ATTRIBUTES)} |\n|---|---|" + "---|" * len(ATTRIBUTES))
    for row in rows:
        captions = CAPTIONS["held_out" if row in EXPERTS else row]()[:count]
        pipeline = open_teacher(folder, row if row in EXPERTS else "both")
        images = draw_captions(pipeline, captions, guidance=guidance)
        print_row(row, share_right(images, captions), len(captions))


def draw_grid(folder: Path, path: Path, columns: int = 8, count: int = 32) -> None:
    """The first held-out captions in their order, none chosen, each under its picture."""
    started = time.perf_counter()
    captions = CAPTIONS["held_out"]()[:count]
    images = draw_captions(open_teacher(folder), captions)
    print(f"loaded and drew {count} pictures in {time.perf_counter() - started:.1f} s", flush=True)
    right: list[Grade] = [grade(image, caption) for image, caption in zip(images, captions, strict=True)]
    print(f"all five right: {sum(found.all for found in right)} of {count}")
    compose(images, captions, columns).save(path, optimize=True)


def compose(images: np.ndarray, captions: list[str], columns: int) -> Image.Image:
    """A sheet of framed pictures at one and a half times their size."""
    side, gap, text_height = PIXELS * 3 // 2, 16, 46
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + gap + text_height) + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = gap + i % columns * (side + gap), gap + i // columns * (side + gap + text_height)
        sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS), (x, y))
        pen.rectangle((x - 1, y - 1, x + side, y + side), outline="#bbbbbb")
        first, second = caption.split(" on a ")
        pen.multiline_text(
            (x + side / 2, y + side + 5),
            f"{first}\non a {second}",
            fill="#222222",
            font=font,
            anchor="ma",
            align="center",
        )
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=[*CAPTIONS, *EXPERTS], choices=[*CAPTIONS, *EXPERTS, "picture"])
    parser.add_argument("--count", type=int, default=256, help="at most this many captions a row")
    parser.add_argument("--guidance", type=float, nargs=2, default=GUIDANCE, help="high-noise expert, low-noise expert")
    parser.add_argument("--grid", type=Path, help="write 32 pictures with their captions here")
    arguments = parser.parse_args()
    if arguments.grid:
        draw_grid(arguments.teacher, arguments.grid)
    rows = [row for row in arguments.rows if row != "picture"]
    if rows:
        print_table(arguments.teacher, rows, arguments.count, arguments.guidance)


if __name__ == "__main__":
    main()
