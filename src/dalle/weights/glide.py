"""GLIDE's base model (Nichol et al. 2021), the small one that OpenAI released: from its one file two runs,
the encoder of captions in the place of a CLIP, and the decoder.
"""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle.data.tokenizers import GlideBPE, tokenizer_facts
from dalle.errors import UserError, reason
from dalle.ranges import Place
from dalle.run_dir import load_clip
from dalle.weights.diffusion import ancestral, denoiser, of_clip
from dalle.weights.reading import ADVICE, PublicWeights
from dalle.weights.unet import unet_names, unet_sizes
from dalle.weights.writing import Imported, count, shape_of

WHAT = "model of GLIDE's"
HEAD = 64  # width of a head, where nothing else is said
PROJECTION = "transformer_proj."
TEXT = ("transformer.", "final_ln.", "token_embedding.", "positional_embedding", "padding_embedding")
WORDS, MERGES = "encoder.json", "vocab.bpe"  # as in its repository, or with .gz
LONGEST = 2**26  # bytes of either


def is_glide(found: Mapping[str, Tensor]) -> bool:
    return f"{PROJECTION}weight" in found


def import_glide_text(source: PublicWeights, tokenizer: Place | None, heads: int | None) -> Imported:
    """The encoder of captions of GLIDE, as a CLIP that embeds no pictures.

    Args:
        tokenizer: the folder with encoder.json and vocab.bpe, or both with .gz, as in its repository.
        heads: None: width / 64.

    Raises:
        UserError: not such an encoder, or no tokenizer of its.
    """
    path, found = source.path, source.without("module.")
    vocabulary, width = shape_of(found, "token_embedding.weight", 2, path, WHAT)
    length, _ = shape_of(found, "padding_embedding", 2, path, WHAT)
    if tokenizer is None:
        raise UserError(f"{path} needs its tokenizer: give tokenizer=FOLDER, with {WORDS}.gz and {MERGES}.gz")
    own = read_tokenizer(Path(tokenizer), length)
    if own.vocab_size != vocabulary:
        raise UserError(f"{path} reads {vocabulary} tokens, but {tokenizer} has {own.vocab_size}")
    net = {
        "_target_": "dalle.nets.glide.GlideText",
        "vocab_size": vocabulary,
        "context_length": length,
        "width": width,
        "layers": count(found, "transformer.resblocks.{}.ln_1.weight"),
        "heads": heads or max(1, width // HEAD),
    }
    model = {"_target_": "dalle.stages.clip.ClipStage", "classification_weight": 0.0, "net": net}
    tensors = {name: value for name, value in found.items() if name.startswith(TEXT)}
    facts = {"image_size": 64, "tokenizer": tokenizer_facts(own)}
    return Imported("clip", "glide", model, tensors, facts, own, licence="MIT")


def import_glide(source: PublicWeights, clip: Place, image_size: int, head_dim: int | None) -> Imported:
    """The decoder of GLIDE, also the one that is told what is known of pictures (`base-inpaint`).

    Args:
        clip: the run of its encoder of captions.
        image_size: side of its pictures.
        head_dim: width of an attention head; None: 64.

    Raises:
        UserError: not such a decoder, or of another encoder.
    """
    path, all_of_it = source.path, source.without("module.")
    context, _ = shape_of(all_of_it, "positional_embedding", 2, path, WHAT)
    width, text_width = shape_of(all_of_it, f"{PROJECTION}weight", 2, path, WHAT)
    rest = {name: value for name, value in all_of_it.items() if not name.startswith(TEXT)}
    unet = {name: value for name, value in rest.items() if not name.startswith(PROJECTION)}
    found = {f"decoder.{name}": v for name, v in unet_names(unet, path, head_dim or HEAD).items()}
    found |= {name: value for name, value in rest.items() if name.startswith(PROJECTION)}
    sizes = unet_sizes(found, "decoder.", path, WHAT)
    _, channels, *_ = shape_of(found, "decoder.conv_in.weight", 4, path, WHAT)
    if channels not in (3, 7) or width != 4 * sizes["width"]:
        raise UserError(f"{path} is no base model of GLIDE's: it reads pictures of {channels} channels")
    net = {
        "_target_": "dalle.nets.karlo.GlideDecoder",
        "image_size": image_size,
        "text_width": text_width,
        "context_length": context,
        **sizes,
        "head_dim": head_dim or HEAD,
        "inpaint": channels == 7,
        "dropout": 0.1,
    }
    frozen = load_clip(clip)
    reads: dict[str, Any] = {"embed_dim": text_width, "text_width": text_width, "context_length": context}
    facts, empty = of_clip(frozen, clip, reads, path)
    model = {
        "_target_": "dalle.stages.decoder.DecoderStage",
        "image_dropout": 1.0,
        "text_dropout": 0.2,
        "guidance": 3.0,
        "thresholding": "static",
        "sampler": ancestral(100),
        "denoiser": denoiser("eps", learned_variance=True),
        "net": net,
    }
    facts |= {"image_size": image_size, "image_embed_norm": {"kind": "none"}}
    return Imported("decoder", "glide", model, found | empty, facts, clip=Path(clip), licence="MIT")


def read_tokenizer(folder: Path, length: int) -> GlideBPE:
    """From the two files of the repository, packed or not.

    Raises:
        UserError: they are missing or damaged.
    """
    try:
        words = json.loads(_read(folder, WORDS))
        merges = _read(folder, MERGES).split("\n")[1:-1]  # after the version, up to the last line's end
        return GlideBPE.of_files(words, merges, length)
    except UserError:
        raise
    except Exception as error:  # the package raises bare ones, of whatever it cannot read
        raise UserError(f"{folder}: {WORDS} or {MERGES} is damaged ({reason(error)}); {ADVICE}") from None


def _read(folder: Path, name: str) -> str:
    for place in (folder / name, folder / f"{name}.gz"):
        if place.is_file():
            with (gzip.open if place.suffix == ".gz" else open)(place, "rb") as file:
                content = file.read(LONGEST + 1)
            if len(content) > LONGEST:
                raise ValueError(f"{place.name} is longer than any vocabulary")
            return content.decode("utf-8")
    raise UserError(f"{folder} lacks {name}, or {name}.gz, of GLIDE's tokenizer")
