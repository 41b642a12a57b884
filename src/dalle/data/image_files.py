"""One picture file of any kind -> upright sRGB bytes of a given short side; a memory of pictures read."""

import contextlib
import hashlib
import mmap
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, features

MAX_PIXELS = 64_000_000  # of a picture, where nobody says another number: more would eat the memory
AVIF = (".avif",) if features.check("avif") else ()
SUFFIXES = (
    *(
        ".png",
        ".jpg",
        ".jpeg",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".jfif",
        ".jpe",
        ".jp2",
        ".apng",
        ".dib",
    ),
    *(".ppm", ".pgm", ".pbm", ".pnm", *AVIF),
)
UNREADABLE = (
    ".heic",
    ".heif",
    ".jxl",
    ".svg",
    ".psd",
    ".dng",
    ".cr2",
    ".nef",
    ".arw",
    ".tga",
    ".ico",
    ".avif",
)
# Pillow knows others, some of which start programs
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "PPM", "DIB", *(["AVIF"] if AVIF else []))
FILTER = Image.Resampling.BICUBIC  # Pillow widens it when shrinking, so it does not alias
EDGE = 1024  # bytes at the end of a file that tell whether it is whole
BYTES_PER_PIXEL = 16  # more than any picture needs: 64-bit RGBA is 8
SRGB = ImageCms.createProfile("sRGB")
SAME = 2  # of 255 levels: a profile that changes no colour by more is sRGB
SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of profiles: Pillow's modes

EMPTY, WHOLE, BROKEN = 0, 1, 2
Fit = Literal["crop", "pad", "squash"]


class BadPicture(Exception):
    """A picture that cannot be used; the message ends the sentence "3 pictures are ..."."""


class Look(NamedTuple):
    """What `inspect` sees of a file."""

    digest: str  # changes with the content
    width: int  # as it is seen, turned as its EXIF says
    height: int
    odd_profile: bool  # its colour profile is broken, and left aside


def inspect(where: Path | bytes, max_pixels: int) -> Look:
    """Reads a file, or what its bytes would be, but decodes it only where its end is suspicious.

    Raises:
        BadPicture: no file, empty, broken, cut short, or of more than `max_pixels`.
    """
    content = _content(where, max_pixels)
    with _open(content, max_pixels) as image:
        if not _has_an_end(str(image.format), content):
            _decode(image)  # odd, but often still readable
        profile = image.info.get("icc_profile")
        odd = bool(profile) and _to_srgb(profile) == "broken"
        return Look(hashlib.sha256(content).hexdigest()[:32], *_upright(image), odd)


def size_of(where: Path | bytes, max_pixels: int) -> tuple[int, int]:
    """Width and height as a file's head says, turned as its EXIF says. Raises BadPicture."""
    with _open(_content(where, max_pixels), max_pixels) as image:
        return _upright(image)


def _upright(image: Image.Image) -> tuple[int, int]:
    """Width and height of a picture that is not decoded yet."""
    if image.format == "TIFF" or "exif" not in image.info:  # Pillow turns the former by itself
        return image.size
    turned = False
    with contextlib.suppress(Exception):  # EXIF that cannot be read turns nothing
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    width, height = image.size
    return (height, width) if turned else (width, height)


def read(where: Path | bytes, size: int, aspect: int, max_pixels: int, fit: Fit = "crop") -> np.ndarray:
    """Reads a picture, turned as its EXIF says, in sRGB, over white where it is transparent.

    Returns:
        (H, W, 3) uint8 with min(H, W) = size. Of a picture longer than `aspect` times its short side the
        middle is kept, so `aspect=1` is the central square. Other fits give a square of the whole picture:
        `pad` puts white beside it, `squash` changes its shape.

    Raises:
        BadPicture: as `inspect`.
    """
    with _open(_content(where, max_pixels), max_pixels) as image:
        image.draft(None, (2 * size, 2 * size))  # JPEG: skips detail far below a pixel, several times faster
        rgb = _decode(image)
    if fit == "squash":
        return np.asarray(rgb.resize((size, size), FILTER))
    if fit == "pad":
        return np.asarray(ImageOps.pad(rgb, (size, size), FILTER, color="white"))
    short = min(rgb.size)
    kept = [min(side, aspect * short) for side in rgb.size]
    left, top = ((side - keep) / 2 for side, keep in zip(rgb.size, kept, strict=True))
    target = (max(size, round(kept[0] / short * size)), max(size, round(kept[1] / short * size)))
    box = (left, top, left + kept[0], top + kept[1])
    if box == (0, 0, *rgb.size) and target == rgb.size:
        return np.asarray(rgb)
    return np.asarray(rgb.resize(target, FILTER, box=box))


def read_oblong(where: Path | bytes, height: int, width: int, max_pixels: int, fit: Fit) -> np.ndarray:
    """The same as (height, width, 3) uint8: the middle of the picture (crop), or the whole of it.

    Raises:
        BadPicture: as `inspect`.
    """
    with _open(_content(where, max_pixels), max_pixels) as image:
        most = 2 * max(height, width)
        image.draft(None, (most, most))
        rgb = _decode(image)
    if fit == "squash":
        return np.asarray(rgb.resize((width, height), FILTER))
    if fit == "pad":
        return np.asarray(ImageOps.pad(rgb, (width, height), FILTER, color="white"))
    return np.asarray(ImageOps.fit(rgb, (width, height), FILTER))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to sRGB: more than 8 bits are scaled, not cut; transparency shows white."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.mode == "LAB":
        image = ImageCms.applyTransform(image, _from_lab()) or image
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        alpha = image.getchannel("A")
        image = _in_srgb(image, profile)
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        profile = None
    return _in_srgb(image, profile)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 or 32 bits, or in floating point: its range is 1, 255 or 65535, or what it reaches."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
    ranges = (1, 255, 65535) if image.mode == "F" else (65535,)
    top = next((top for top in ranges if values.max() <= top), values.max())
    gray = (values / top * 255).clip(0, 255).round().astype(np.uint8)
    if isinstance(hole := image.info.get("transparency"), int):
        gray[values == hole] = 255
    return Image.fromarray(gray)


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB, by the picture's colour profile where it has one of its own kind that differs from sRGB."""
    found = _to_srgb(profile) if profile else None
    if isinstance(found, tuple):
        mode, transform = found
        gray = {"1": "L", "LA": "L", "L": "L", "CMYK": "CMYK"}
        if gray.get(image.mode, "RGB") == mode:
            return ImageCms.applyTransform(image.convert(mode), transform) or image.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=64)
def _to_srgb(profile: bytes) -> tuple[str, Any] | Literal["sRGB", "broken"]:
    """The mode of a profile's pictures, and how they become sRGB."""
    try:
        source: Any = ImageCms.ImageCmsProfile(BytesIO(profile))
        mode = SPACES[source.profile.xcolor_space]
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        transform = ImageCms.buildTransform(source, SRGB, mode, "RGB", intent, flags)
    except Exception:  # Pillow passes on what the library and the file give rise to
        return "broken"
    levels = np.arange(0, 256, 51, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    if mode == "CMYK":
        return mode, transform
    before = Image.fromarray(grid).convert(mode)
    after = ImageCms.applyTransform(before, transform)
    change = np.abs(np.asarray(after, np.int16) - np.asarray(before.convert("RGB"), np.int16)).max()
    return (mode, transform) if change > SAME else "sRGB"


@lru_cache(maxsize=1)
def _from_lab() -> Any:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), SRGB, "LAB", "RGB")


def _content(where: Path | bytes, max_pixels: int) -> bytes:
    """All bytes of a file; never waits for a pipe, never reads a device."""
    largest = BYTES_PER_PIXEL * max_pixels + 2**20
    if isinstance(where, bytes):
        if len(where) > largest:
            raise BadPicture(f"larger than {max_pixels} pixels can be")
        if not where:
            raise BadPicture("empty")
        return where
    try:
        handle = os.open(where, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(handle, "rb", buffering=0) as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise BadPicture("no regular files")
            if status.st_size > largest:
                raise BadPicture(f"larger than {max_pixels} pixels can be")
            content = file.readall()
    except OSError as error:
        raise BadPicture(f"not readable ({error.strerror})") from None
    if not content:
        raise BadPicture("empty")
    return content


def _open(content: bytes, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # max_pixels is our own guard; other remarks help nobody
            image = Image.open(BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError:
        limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        raise BadPicture(f"larger than {limit} pixels") from None
    except Exception:
        raise BadPicture("broken") from None
    if image.width * image.height > max_pixels:
        image.close()
        raise BadPicture(f"larger than {max_pixels} pixels")
    _scale_transparency(image)
    return image


def _scale_transparency(image: Image.Image) -> None:
    """The transparent colour of a PNG is given in the file's bits; Pillow scales the pixels only."""
    tile = getattr(image, "tile", None)
    hole, args = image.info.get("transparency"), tile[0][3] if tile else None
    match args, hole:
        case "L;2" | "L;4", int():
            image.info["transparency"] = hole * {"L;2": 85, "L;4": 17}[args]
        case "RGB;16B", tuple():
            image.info["transparency"] = tuple(value >> 8 for value in hole)


def _decode(image: Image.Image) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            with contextlib.suppress(Exception):  # EXIF that cannot be read turns nothing
                if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else it would be copied
                    image = ImageOps.exif_transpose(image)
            return to_rgb(image)
    except Exception:  # decoders raise OSError, SyntaxError, ValueError, struct.error ... on damaged data
        raise BadPicture("broken") from None


def _has_an_end(kind: str, content: bytes) -> bool:
    """Whether a file ends as its format says; a download that broke off does not."""
    tail = content[-EDGE:]
    match kind:
        case "PNG":
            return b"IEND" in tail
        case "JPEG" | "MPO":
            return b"\xff\xd9" in tail  # cannot occur inside the coded data
        case "GIF":
            return tail.rstrip(b"\0").endswith(b";")
        case "WEBP":
            return len(content) >= 8 + int.from_bytes(content[4:8], "little")
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
        self._turn: Any = -1  # a file without a name, whose lock tells whose turn it is
        with contextlib.suppress(OSError):  # no place for temporary files
            self._turn = tempfile.TemporaryFile()  # noqa: SIM115

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

    def give_up(self, item: int) -> int:
        """Marks a picture as broken -> how many are so by now; 0 where another process was first."""
        with self._alone():
            if self.state[item] == BROKEN:
                return 0
            self.state[item] = BROKEN
            return int((self.state == BROKEN).sum())

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time, where the system knows locks; that of one that dies is free again."""
        try:
            import fcntl

            fcntl.lockf(self._turn, fcntl.LOCK_EX)
        except (ImportError, OSError, ValueError):  # Windows, some network disks, no file
            yield
            return
        try:
            yield
        finally:
            fcntl.lockf(self._turn, fcntl.LOCK_UN)
