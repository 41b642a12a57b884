"""Pictures as people see them: 8-bit quantisation, grids with the captions under the pictures, PNG files."""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dalle.files import atomic_path

MIN_CELL = 128  # pixels; smaller pictures are enlarged by a whole factor, so that their pixels stay squares
FONT_SIZE = 13
LINE_HEIGHT = 17
MAX_LINES = 6
GAP = 8
PAPER, INK = (255, 255, 255), (40, 40, 40)


def to_uint8(image: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """[-1, 1] -> 0..255 by rounding; values outside are clamped.

    The one quantisation used by PNGs and metrics alike. `(x * 255).byte()` truncates instead, and values
    that went from 8 bits to [-1, 1] would come back one level lower in 63 of 256 cases.
    """
    return ((image.float() + 1) / 2 * 255).round().clamp(0, 255).to(torch.uint8)


def from_uint8(image: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """0..255 -> [-1, 1], contiguous, the same numbers on every device; exactly undone by `to_uint8`."""
    numbers = image.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    # A plain 127.5 is multiplied by its rounded inverse on a GPU
    return numbers.div_(torch.full((), 127.5, device=image.device)).sub_(1)


def to_pil(image: Float[Tensor, "3 H W"]) -> Image.Image:
    """One picture in [-1, 1] as an 8-bit RGB PIL image."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).contiguous().cpu().numpy())


def grid(
    images: Float[Tensor, "B 3 H W"], captions: Sequence[str], columns: int | None = None
) -> Image.Image:
    """A labelled grid of pictures in [-1, 1].

    With one caption per picture, each stands under its picture, `columns` of them in a row (None: about
    square). With n pictures per caption (B = n * len(captions), those of one caption adjacent), each caption
    gets a row of its own with its n pictures, the caption once underneath.

    Raises:
        ValueError: the number of pictures is no multiple of the number of captions, or there are none.
    """
    if not captions or not len(images) or len(images) % len(captions):
        raise ValueError(f"{len(images)} pictures cannot be shared out among {len(captions)} captions")
    per_caption = len(images) // len(captions)
    if per_caption > 1:
        columns = per_caption
    columns = min(columns or _square(len(images)), len(images))
    factor = max(1, math.ceil(MIN_CELL / min(images.shape[-2:])))
    height, width = (side * factor for side in images.shape[-2:])
    label_width = width if per_caption == 1 else columns * (width + GAP) - GAP
    label_width = max(label_width, MIN_CELL)
    labels = [_wrap(caption, label_width) for caption in captions]

    rows = [list(range(i, min(i + columns, len(images)))) for i in range(0, len(images), columns)]
    row_labels = [labels[row[0] // per_caption : row[-1] // per_caption + 1] for row in rows]
    heights = [height + GAP + LINE_HEIGHT * max(map(len, texts)) + GAP for texts in row_labels]
    sheet_width = max(GAP + columns * (width + GAP), label_width + 2 * GAP)
    sheet = Image.new("RGB", (sheet_width, GAP + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)

    top = GAP
    for row, texts, row_height in zip(rows, row_labels, heights, strict=True):
        for column, index in enumerate(row):
            picture = to_pil(images[index]).resize((width, height), Image.Resampling.NEAREST)
            _place(sheet, picture, (GAP + column * (width + GAP), top))
        for column, lines in enumerate(texts):
            for number, line in enumerate(lines):
                place = (GAP + column * (width + GAP), top + height + GAP // 2 + number * LINE_HEIGHT)
                draw.text(place, line, fill=INK, font=_font())
        top += row_height
    return sheet


def save_png(image: Image.Image, path: str | Path, text: Mapping[str, str] | None = None) -> Path:
    """Writes a PNG beside its final name, then renames it: nobody ever sees half a file.

    `text` goes into the metadata (any Unicode), where `Image.open(path).text` and many viewers find it.
    """
    path = Path(path)
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    with atomic_path(path, sync=False) as hidden:  # it can be made again
        image.save(hidden, format="PNG", pnginfo=info)
    return path


def save_gif(images: Float[Tensor, "B 3 H W"], path: str | Path, milliseconds: int = 200) -> Path:
    """Writes pictures in [-1, 1] as an endless animation, there and back; small ones are enlarged."""
    factor = max(1, math.ceil(MIN_CELL / min(images.shape[-2:])))
    size = images.shape[-1] * factor, images.shape[-2] * factor
    frames = [to_pil(image).resize(size, Image.Resampling.NEAREST) for image in images]
    frames += frames[-2:0:-1]
    path = Path(path)
    with atomic_path(path, sync=False) as hidden:
        frames[0].save(hidden, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    return path


def _square(count: int) -> int:
    """Columns of a roughly square grid, preferring a full last row."""
    root = math.ceil(math.sqrt(count))
    return min(range(root, root + 3), key=lambda columns: (-count % columns, columns))


def _place(sheet: Image.Image, picture: Image.Image, corner: tuple[int, int]) -> None:
    left, top = corner
    sheet.paste(picture, corner)
    # A hairline around it: a picture on a white background would have no edge on white paper.
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((left - 1, top - 1, left + picture.width, top + picture.height), outline=(200, 200, 200))


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=FONT_SIZE)


def _wrap(caption: str, width: int) -> list[str]:
    """Lines of at most `width` pixels; longer words are broken, too many lines end in an ellipsis."""
    font = _font()
    lines = [""]
    for word in _printable(caption).split():
        candidate = f"{lines[-1]} {word}".lstrip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > MAX_LINES:
        last = lines[MAX_LINES - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: MAX_LINES - 1], last.rstrip() + "…"]
    return lines


def _printable(caption: str) -> str:
    """Without accents, which the built-in font lacks; it draws other unknown letters as an empty box."""
    letters = unicodedata.normalize("NFKD", caption)
    return "".join(letter for letter in letters if not unicodedata.combining(letter))
