"""Small shards as img2dataset writes them: each sample has a picture of its own and a known caption."""

import json
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image


def picture(k: int, kind: str = "PNG", size: tuple[int, int] = (20, 24)) -> bytes:
    held = BytesIO()
    Image.fromarray(np.random.default_rng(k).integers(0, 256, (*size, 3), np.uint8)).save(held, kind)
    return held.getvalue()


def sample(k: int) -> dict[str, bytes]:
    facts = {"caption": f"thing {k}", "key": f"{k:05d}", "status": "success"}
    return {
        f"{k:05d}.png": picture(k),
        f"{k:05d}.txt": f"thing {k}".encode(),
        f"{k:05d}.json": json.dumps(facts).encode(),
    }


def tar(path: Path, *members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as file:
        for name, content in (pair for some in members for pair in some.items()):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, BytesIO(content))
    return path


def shards(folder: Path, n: int = 3, each: int = 8) -> str:
    """n shards of so many samples, numbered on; gives their pattern."""
    for k in range(n):
        tar(folder / f"{k:05d}.tar", *(sample(k * each + j) for j in range(each)))
    return f"{folder}/{{00000..{n - 1:05d}}}.tar"
