"""One picture's bytes as the RGB that a VAE is fed, or why they cannot be read.

image = still(data, frame, height, width)        a PIL image of that size, or a str
why = require_still(found, frame)                a film is refused, unless one of its frames is named
"""

import hashlib
import io
import itertools
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.errors import BadUsage

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")
ANIMATED = ("GIF", "WEBP", "PNG")
"""Formats whose further frames are a film; a TIFF's or a camera's MPO are not."""
CHANNELS = {"1": "L", "L": "L", "LA": "L", "La": "L", "CMYK": "CMYK"}
"""Of a mode, those that a colour profile is of; RGB of all others."""
LEVELS, SAME_WITHIN = (0, 8, 24, 64, 112, 160, 208, 255), 3
"""A colour profile that moves no colour of these by more than so much is sRGB, approximately written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A picture as it lies there."""

    name: str
    data: bytes
    caption: str
    """Empty where there is none."""


def seed_of_picture(data: bytes, frame: int | None) -> int:
    return int.from_bytes(hashlib.sha256(data + f"\n{frame or 0}".encode()).digest()[:8], "little") >> 1


def still(data: bytes, frame: int | None, height: int, width: int, *, by_profile: bool = True) -> Any:
    from PIL import Image, ImageOps

    try:
        image: Any = Image.open(io.BytesIO(data))
        if frame is not None and _is_film(image):
            image.seek(frame)
        _require_shallow(image)
        image = ImageOps.exif_transpose(image)
        image = in_srgb(image) if by_profile else image.convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return ImageOps.fit(flat, (width, height), method=Image.Resampling.LANCZOS)
    except _unreadable() as error:
        return _why(error)


def in_srgb(image: Any) -> Any:
    """RGBA as a viewer shows it: by the colour profile that the file brings (a phone's Display P3, a print's CMYK). One
    that means sRGB changes nothing, nor does one that cannot be read or is of other channels."""
    whole, channels = image.convert("RGBA"), CHANNELS.get(image.mode, "RGB")
    transform = _to_srgb(image.info.get("icc_profile") or b"", channels)
    if transform is None:
        return whole
    opaque = whole.convert("RGB") if channels == "RGB" else image.convert(channels)
    seen = transform.apply(opaque)
    seen.putalpha(whole.getchannel("A"))
    return seen


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, channels: str) -> Any:
    """A transform into RGB; None where there is nothing to change."""
    from PIL import Image, ImageChops, ImageCms

    if not profile:
        return None
    try:
        own: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(own).lower():
            return None
        srgb: Any = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(own, srgb, channels, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if channels == "RGB":  # some say sRGB with numbers alone
        colours = Image.frombytes(
            "RGB", (len(LEVELS) ** 2, len(LEVELS)), bytes(itertools.chain(*itertools.product(LEVELS, repeat=3)))
        )
        changed: Any = ImageChops.difference(transform.apply(colours), colours).getextrema()
        if max(most for _, most in changed) <= SAME_WITHIN:
            return None
    return transform


def _unreadable() -> tuple[type[BaseException], ...]:
    """What Pillow raises for a damaged, truncated or overlarge file."""
    from PIL import Image

    return (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, KeyError, struct.error, zlib.error,
            Image.DecompressionBombError)  # fmt: skip


def _is_film(image: Any) -> bool:
    return image.format in ANIMATED and bool(getattr(image, "is_animated", False))


def require_still(found: Found, frame: int | None) -> str:
    """Why it cannot be read, as far as its first bytes tell; or nothing. A film is refused before a weight is read,
    unless one of its frames is named."""
    if Path(found.name).suffix.lower() in VIDEOS:
        raise BadUsage(wrong="images.path holds a video", found=found.name,
                       mend="take a frame out of it: ffmpeg -i VIDEO -vf 'select=eq(n\\,0)' -frames:v 1 VIDEO.png, or "
                       "name one of an animated GIF, WebP or PNG with images.frame")  # fmt: skip
    from PIL import Image

    try:
        image: Any = Image.open(io.BytesIO(found.data))
        film = _is_film(image)
        _require_shallow(image)
    except _unreadable() as error:
        return _why(error)  # it will be quarantined by name
    if film and frame is None:
        raise BadUsage(wrong="images.path holds a video", found=f"{found.name} has several frames",
                       mend="set images.frame: 0, or another one")  # fmt: skip
    return ""


def _require_shallow(image: Any) -> None:
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"more than 8 bits a channel ({image.mode})")


def _why(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
