"""The pictures of a folder at their own sizes, known by their content."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dalle.data.image_files import MAX_PIXELS, SUFFIXES, BadPicture, inspect, read
from dalle.errors import UserError
from dalle.images import from_uint8

LONG = 10_000  # longer than its short side by no more than this is any picture


def seen_pictures(folder: str) -> dict[str, str]:
    """A digest for each picture's name, in order.

    Raises:
        UserError: no folder, no picture in it, or one that cannot be read.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"images={folder} {'is not a folder' if root.exists() else 'does not exist'}")
    paths = sorted(p for p in root.iterdir() if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(
            f"images={folder} holds no pictures; give a folder with {', '.join(SUFFIXES[:4])} ..."
        )
    found, bad = {}, []
    for path in paths:
        try:
            found[path.name] = inspect(path, MAX_PIXELS).digest
        except BadPicture as error:
            bad.append(f"{path.name} is {error}")
    if bad:
        more = f" and {len(bad) - 1} more cannot be read either" if len(bad) > 1 else ""
        raise UserError(f"images={folder}: {bad[0]}{more}; take out what is no picture")
    return found


def read_pictures(folder: str, digests: Mapping[str, str]) -> list[Tensor]:
    """Those of these names, (3, H, W) in [-1, 1].

    Raises:
        UserError: one is gone, cannot be read, or is another than its digest says.
    """
    pictures = []
    for name, digest in digests.items():
        path = Path(folder).expanduser() / name
        try:
            seen = inspect(path, MAX_PIXELS)
            if seen.digest != digest:
                raise UserError(f"{path} is another picture than it was; give the one that the recipe is of")
            pixels = read(path, min(seen.width, seen.height), LONG, MAX_PIXELS)
        except BadPicture as error:
            raise UserError(f"{path} is {error}; give a picture") from None
        pictures.append(from_uint8(torch.from_numpy(pixels.copy()).permute(2, 0, 1)))
    return pictures
