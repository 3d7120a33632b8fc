"""One picture's bytes as the RGB that a VAE is fed, or why they cannot be read.

image = still(data, frame, height, width)        a PIL image of that size, or a str
require_still(found, frame)                      a film is refused, unless one of its frames is named
"""

import hashlib
import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import BadUsage

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")
ANIMATED = ("GIF", "WEBP", "PNG")
"""Formats whose further frames are a film; a TIFF's or a camera's MPO are not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A picture as it lies there."""

    name: str
    data: bytes
    caption: str
    """Empty where there is none."""


def seed_of_picture(data: bytes, frame: int | None) -> int:
    return int.from_bytes(hashlib.sha256(data + f"\n{frame or 0}".encode()).digest()[:8], "little") >> 1


def still(data: bytes, frame: int | None, height: int, width: int) -> Any:
    from PIL import Image, ImageOps

    try:
        image: Any = Image.open(io.BytesIO(data))
        if frame is not None and _is_film(image):
            image.seek(frame)
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"more than 8 bits a channel ({image.mode})")
        image = ImageOps.exif_transpose(image).convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return ImageOps.fit(flat, (width, height), method=Image.Resampling.LANCZOS)
    except _unreadable() as error:
        return f"{type(error).__name__}: {error}"


def _unreadable() -> tuple[type[BaseException], ...]:
    """What Pillow raises for a damaged, truncated or overlarge file."""
    from PIL import Image

    return (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, KeyError, struct.error, zlib.error,
            Image.DecompressionBombError)  # fmt: skip


def _is_film(image: Any) -> bool:
    return image.format in ANIMATED and bool(getattr(image, "is_animated", False))


def require_still(found: Found, frame: int | None) -> None:
    """A film is refused before a weight is read, unless one of its frames is named."""
    if Path(found.name).suffix.lower() in VIDEOS:
        raise BadUsage(wrong="images.path holds a video", found=found.name,
                       mend="take a frame out of it: ffmpeg -i VIDEO -vf 'select=eq(n\\,0)' -frames:v 1 VIDEO.png, or "
                       "name one of an animated GIF, WebP or PNG with images.frame")  # fmt: skip
    if frame is not None:
        return
    from PIL import Image

    try:
        film = _is_film(Image.open(io.BytesIO(found.data)))
    except _unreadable():
        return  # it will be quarantined by name
    if film:
        raise BadUsage(wrong="images.path holds a video", found=f"{found.name} has several frames",
                       mend="set images.frame: 0, or another one")  # fmt: skip
