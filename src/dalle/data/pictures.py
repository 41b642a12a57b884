"""One picture file of any kind -> upright RGB bytes of a given short side; a memory of pictures read."""

import mmap
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # Pillow knows others, some of which start programs
FILTER = Image.Resampling.BICUBIC  # Pillow widens it when shrinking, so it does not alias
EDGE = 1024  # bytes at both ends of a file that tell whether it is whole, and the same as before

EMPTY, WHOLE, BROKEN = 0, 1, 2


class BadPicture(Exception):
    """A picture that cannot be used; the message ends the sentence "3 pictures are ..."."""


def inspect(path: Path, max_pixels: int) -> str:
    """Looks at both ends of a file only, unless they are suspicious.

    Returns:
        A digest that changes with the content.

    Raises:
        BadPicture: empty, broken, cut short, or of more than `max_pixels`.
    """
    with path.open("rb") as file:
        head = file.read(EDGE)
        size = file.seek(0, 2)
        file.seek(-min(EDGE, size), 2)
        tail = file.read(EDGE)
    if not size:
        raise BadPicture("empty")
    with _open(path, max_pixels) as image:
        if not _has_an_end(str(image.format), head, tail, size):
            _decode(image)  # odd, but often still readable
    return f"{size:x}-{zlib.crc32(tail, zlib.crc32(head)):08x}"


def read(path: Path, size: int, aspect: int, max_pixels: int) -> np.ndarray:
    """Reads a picture, turned as its EXIF says, over white where it is transparent.

    Returns:
        (H, W, 3) uint8 with min(H, W) = size. Of a picture longer than `aspect` times its short side the
        middle is kept, so `aspect=1` is the central square.

    Raises:
        BadPicture: as `inspect`.
    """
    with _open(path, max_pixels) as image:
        image.draft(None, (2 * size, 2 * size))  # JPEG: skips detail far below a pixel, several times faster
        rgb = _decode(image)
    short = min(rgb.size)
    kept = [min(side, aspect * short) for side in rgb.size]
    left, top = ((side - keep) / 2 for side, keep in zip(rgb.size, kept, strict=True))
    target = (max(size, round(kept[0] / short * size)), max(size, round(kept[1] / short * size)))
    box = (left, top, left + kept[0], top + kept[1])
    return np.asarray(rgb.resize(target, FILTER, box=box))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: 16-bit gray is scaled, not clipped; transparency shows white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _open(path: Path, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is our own guard
            image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadPicture(f"larger than {max_pixels} pixels") from None
    except Exception:
        raise BadPicture("broken") from None
    if image.width * image.height > max_pixels:
        image.close()
        raise BadPicture(f"larger than {max_pixels} pixels")
    return image


def _decode(image: Image.Image) -> Image.Image:
    try:
        return to_rgb(ImageOps.exif_transpose(image))
    except Exception:  # decoders raise OSError, SyntaxError, ValueError, struct.error ... on damaged data
        raise BadPicture("broken") from None


def _has_an_end(kind: str, head: bytes, tail: bytes, size: int) -> bool:
    """Whether a file ends as its format says; a download that broke off does not."""
    match kind:
        case "PNG":
            return b"IEND" in tail
        case "JPEG" | "MPO":
            return b"\xff\xd9" in tail  # cannot occur inside the coded data
        case "GIF":
            return tail.rstrip(b"\0").endswith(b";")
        case "WEBP":
            return size >= 8 + int.from_bytes(head[4:8], "little")
        case _:
            return False


class Memory:
    """Pictures already read, in memory that forked worker processes share.

    Args:
        items: how many pictures there can be.
        slot: bytes for one; 0 = keep no pictures, only whether they can be read.
    """

    def __init__(self, items: int, slot: int):
        self.items, self.slot = items, slot
        # Anonymous shared memory: physical pages come with use, and the size of /dev/shm does not matter.
        self.state = np.frombuffer(mmap.mmap(-1, max(4, items)), np.uint8)
        self.sides = np.frombuffer(mmap.mmap(-1, max(4, 4 * items)), np.uint16)
        self.bytes = np.frombuffer(mmap.mmap(-1, max(4, slot * items)), np.uint8)

    def __reduce__(self) -> tuple[Any, ...]:
        return Memory, (self.items, self.slot)  # a spawned process starts with its own, empty

    def get(self, item: int) -> np.ndarray | None:
        if not self.slot or self.state[item] != WHOLE:
            return None
        h, w = map(int, self.sides[2 * item : 2 * item + 2])
        return self.bytes[item * self.slot : item * self.slot + 3 * h * w].reshape(h, w, 3)

    def put(self, item: int, picture: np.ndarray) -> None:
        if self.slot:
            self.bytes[item * self.slot : item * self.slot + picture.size] = picture.reshape(-1)
            self.sides[2 * item : 2 * item + 2] = picture.shape[:2]
            self.state[item] = WHOLE  # last: another process may be looking
