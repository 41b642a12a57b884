"""DALL-E mini and mega, as min-dalle keeps them (kuprel/min-dalle): the transformer of captions and codes.

The image tokenizer is the VQGAN f16-16384 of taming-transformers, imported by itself.
"""

from pathlib import Path

from dalle.data.tokenizers import DalleMiniBPE, tokenizer_facts
from dalle.errors import UserError, reason
from dalle.nets.rudalle import Version
from dalle.ranges import NonNegativeInt, Place, PositiveInt
from dalle.reading import read_json, read_text
from dalle.run_dir import load_image_tokenizer
from dalle.weights.reading import ADVICE, PublicWeights
from dalle.weights.rudalle import import_rudalle, is_rudalle
from dalle.weights.writing import Imported, count, refuse_others, shape_of

WHAT = "transformer of min-dalle's"
START = 16383  # the row of the table before the first code, in min-dalle
HEAD = 64  # width of a head, where nothing else is said


def import_dalle(
    source: PublicWeights,
    image_tokenizer: Place,
    heads: PositiveInt | None = None,
    start: NonNegativeInt | None = None,
    tokenizer: Place | None = None,
    version: Version | None = None,
) -> Imported:
    """DALL-E mini or mega: a folder with encoder.pt, decoder.pt, vocab.json and merges.txt; or ruDALL-E.

    Args:
        image_tokenizer: the run of the VQGAN that its codes are of.
        heads: None: width / 64.
        start: the row of the table before the first code: 16383 in min-dalle (None), 16384 in dalle-mini.
        tokenizer, version: of ruDALL-E: its bpe.model, and v2 or v3.

    Raises:
        UserError: not such a transformer, or of another image tokenizer.
    """
    if is_rudalle(source.without("module.")):
        refuse_others(source.path, start=start)
        return import_rudalle(source, image_tokenizer, heads, tokenizer, version)
    refuse_others(source.path, tokenizer=tokenizer, version=version)
    path, found = source.path, source.tensors
    text_vocab, width = shape_of(found, "encoder.embed_tokens.weight", 2, path, WHAT)
    text_length, _ = shape_of(found, "encoder.embed_positions.weight", 2, path, WHAT)
    image_rows, _ = shape_of(found, "decoder.lm_head.weight", 2, path, WHAT)
    places, _ = shape_of(found, "decoder.embed_positions.weight", 2, path, WHAT)
    inner, _ = shape_of(found, "decoder.layers.0.glu.fc0.weight", 2, path, WHAT)
    images = load_image_tokenizer(image_tokenizer)
    if images.grid**2 != places or images.vocab_size > image_rows:
        raise UserError(
            f"{path} writes {places} codes of at most {image_rows}, but {image_tokenizer} has "
            f"{images.grid**2} codes of {images.vocab_size} in a picture; give the one it was trained with"
        )
    bpe = read_tokenizer(path, text_vocab, text_length)
    net = {
        "_target_": "dalle.nets.dalle_bart.DalleBart",
        "text_vocab": text_vocab,
        "text_length": text_length,
        "image_vocab": images.vocab_size,
        "grid": images.grid,
        "width": width,
        "depth": count(found, "decoder.layers.{}.glu.fc0.weight"),
        "heads": heads or max(1, width // HEAD),
        "inner": inner,
        "image_rows": image_rows,
        "start": START if start is None else start,
    }
    model = {
        "_target_": "dalle.stages.dalle.DalleStage",
        "text_weight": 0.0,
        "image_weight": 1.0,
        "temperature": 1.0,
        "top_k": min(256, images.vocab_size),
        "guidance": 16.0,
        "net": net,
    }
    codes = {"weights": images.weights_hash, "vocab_size": images.vocab_size, "grid": images.grid}
    facts = {
        "image_size": images.image_size,
        "image_tokenizer": codes,
        "tokenizer": tokenizer_facts(bpe),
    }
    return Imported("dalle", "min-dalle", model, found, facts, bpe, image_tokenizer=Path(image_tokenizer))


def read_tokenizer(folder: Path, vocab_size: int, length: int) -> DalleMiniBPE:
    """From vocab.json and merges.txt beside the weights, with or without `_mini` in their names.

    Raises:
        UserError: they are missing or damaged.
    """
    for ending in ("", "_mini"):
        words, merges = folder / f"vocab{ending}.json", folder / f"merges{ending}.txt"
        if words.is_file() and merges.is_file():
            lines = read_text(merges, ADVICE).splitlines()
            try:
                return DalleMiniBPE.of_files(read_json(words, dict, ADVICE), lines, vocab_size, length)
            except Exception as error:  # the package raises bare ones, of whatever it cannot read
                raise UserError(f"{words} or {merges.name} is damaged ({reason(error)}); {ADVICE}") from None
    raise UserError(f"{folder} lacks vocab.json and merges.txt, the tokenizer of its captions")
