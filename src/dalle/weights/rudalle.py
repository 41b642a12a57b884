"""ruDALL-E (Sber AI 2021): Malevich and what was made of it, and Kandinsky of 12 billion parameters.

The image tokenizer is Sber's VQGAN of taming-transformers' Gumbel kind, imported by itself.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dalle.data.tokenizers import YttmBPE, tokenizer_facts
from dalle.errors import UserError, reason
from dalle.nets.rudalle import Version, sparse_mask
from dalle.ranges import Place
from dalle.reading import read_text
from dalle.run_dir import load_image_tokenizer
from dalle.weights.reading import ADVICE, PublicWeights
from dalle.weights.writing import Imported, count, shape_of

WHAT = "transformer of ruDALL-E's"
HEADS = {2048: 16, 3840: 60}  # of Malevich and Kandinsky, by their widths
MASKS = {"row": "transformer.row_mask", "column": "transformer.col_mask", "conv": "transformer.conv_mask"}
VERSIONS: tuple[Version, ...] = ("v2", "v3")


def is_rudalle(found: Mapping[str, Tensor]) -> bool:
    return "image_row_embeddings.weight" in found


def import_rudalle(
    source: PublicWeights,
    image_tokenizer: Place,
    heads: int | None,
    tokenizer: Place | None,
    version: Version | None,
) -> Imported:
    """ruDALL-E: pytorch_model*.bin of a release.

    Args:
        image_tokenizer: the run of the VQGAN that its codes are of.
        heads: None: those of Malevich or Kandinsky.
        tokenizer: its bpe.model.
        version: v2 or v3, which the masks in the file tell where it has them.

    Raises:
        UserError: not such a transformer, of another image tokenizer or tokenizer, or of an unknown version.
    """
    path, found = source.path, dict(source.without("module."))
    rows, width = shape_of(found, "text_embeddings.weight", 2, path, WHAT)
    codes, _ = shape_of(found, "image_embeddings.weight", 2, path, WHAT)
    places, _ = shape_of(found, "text_pos_embeddings.weight", 2, path, WHAT)
    grid, _ = shape_of(found, "image_row_embeddings.weight", 2, path, WHAT)
    length, images = places - 1, load_image_tokenizer(image_tokenizer)
    if (images.grid, images.vocab_size) != (grid, codes):
        raise UserError(
            f"{path} writes {grid**2} codes of {codes}, but {image_tokenizer} has {images.grid**2} codes of "
            f"{images.vocab_size} in a picture; give the one it was trained with"
        )
    if heads is None and width not in HEADS:
        raise UserError(f"{path} does not say how many heads it has, and is {width} wide; give heads=")
    if tokenizer is None:
        raise UserError(f"{path} needs its tokenizer: give tokenizer=bpe.model")
    own = read_tokenizer(Path(tokenizer), length)
    if own.vocab_size != rows - length:
        raise UserError(f"{path} reads {rows - length} tokens, but {tokenizer} has {own.vocab_size}")
    net = {
        "_target_": "dalle.nets.rudalle.RuDalle",
        "text_vocab": rows - length,
        "text_length": length,
        "image_vocab": codes,
        "grid": grid,
        "width": width,
        "depth": count(found, "transformer.layers.{}.input_layernorm.weight"),
        "heads": heads or HEADS[width],
        "version": take_masks(found, length, grid, version, path),
    }
    model = {
        "_target_": "dalle.stages.dalle.DalleStage",
        "text_weight": 0.0,
        "image_weight": 1.0,
        "text_dropout": 0.0,
        "temperature": 1.0,
        "top_k": min(2048, codes),
        "top_p": 0.995,
        "guidance": 1.0,
        "net": net,
    }
    facts = {
        "image_size": images.image_size,
        "image_tokenizer": {"weights": images.weights_hash, "vocab_size": codes, "grid": grid},
        "tokenizer": tokenizer_facts(own),
    }
    return Imported(
        "dalle",
        "rudalle",
        model,
        found,
        facts,
        own,
        image_tokenizer=Path(image_tokenizer),
        licence="Apache-2.0",
    )


def take_masks(
    found: dict[str, Tensor], length: int, grid: int, version: Version | None, path: Path
) -> Version:
    """Takes the masks out of the weights, if they are there; the version that they, or `version`, say.

    Raises:
        UserError: they are other masks, or nothing says the version.
    """
    kept = {kind: found.pop(name).bool() for kind, name in MASKS.items() if name in found}
    able: list[Version] = [
        one
        for one in VERSIONS
        if all(mask.equal(sparse_mask(kind, length, grid, one)) for kind, mask in kept.items())
    ]
    if not able or (version or able[0]) not in able:
        raise UserError(f"{path} has other masks than those of version {version or ' or '.join(VERSIONS)}")
    if version is None and len(able) > 1:
        raise UserError(
            f"{path} does not say of which version it is: give version=v3 for Malevich and Surrealist_XL, or "
            "version=v2 for Emojich and Malevich_v2"
        )
    return version or able[0]


def read_tokenizer(path: Path, length: int) -> YttmBPE:
    """From YouTokenToMe's file.

    Raises:
        UserError: it is missing or damaged.
    """
    text = read_text(path, ADVICE)
    try:
        return YttmBPE(text, length)
    except Exception as error:  # of whatever stands in the place of numbers
        raise UserError(f"{path} is no model of YouTokenToMe ({reason(error)}); {ADVICE}") from None
