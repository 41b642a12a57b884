"""Image tokenizers: OpenAI's dVAE (Ramesh et al. 2021) and the VQGANs of taming-transformers (Esser et al.
2021).
"""

from typing import Any

from dalle.errors import UserError
from dalle.ranges import Side
from dalle.weights.reading import PublicWeights
from dalle.weights.writing import Imported, count, shape_of

DVAE, VQGAN = "dVAE of OpenAI's", "VQGAN of taming-transformers"
KL_WEIGHT = 1e-8  # of the Gumbel kind


def import_dvae(source: PublicWeights, image_size: Side = 256) -> Imported:
    """OpenAI's dVAE: a folder with encoder.pkl and decoder.pkl, or both state dicts in one file under
    ``encoder.`` and ``decoder.``.

    Args:
        image_size: side of the pictures, a multiple of 8; those of DALL-E have 256.

    Raises:
        UserError: not such a dVAE.
    """
    found, path = source.without("module."), source.path
    first = "encoder.blocks.group_{}.block_1.res_path.conv_1.w"
    width, *_ = shape_of(found, "encoder.blocks.input.w", 4, path, DVAE)
    code_dim, vocabulary, *_ = shape_of(found, "decoder.blocks.input.w", 4, path, DVAE)
    groups = sum(first.format(number) in found for number in range(1, 17))
    blocks = sum(first.format(1).replace("block_1", f"block_{n}") in found for n in range(1, 17))
    net = {
        "_target_": "dalle.nets.dvae.DVAE",
        "image_size": image_size,
        "vocab_size": vocabulary,
        "factor": 1 << max(0, groups - 1),
        "width": width,
        "code_dim": code_dim,
        "groups": groups,
        "blocks": blocks,
        "patch": 1,
        "gain": None,
        "logit_gain": None,
    }
    ramp = "dalle.stages.dvae.Ramp"
    model = {
        "_target_": "dalle.stages.dvae.DVAEStage",
        "likelihood": "laplace",
        "ln_b": None,
        "temperature": {"_target_": ramp, "start": 1.0, "end": 0.0625, "steps": 150_000},  # App. A.2
        "kl_weight": {"_target_": ramp, "start": 0.0, "end": 6.6, "steps": 5_000},
        "net": net,
    }
    return Imported("dvae", "openai", model, found, {"image_size": image_size}, licence="MIT, modified")


def import_vqgan(source: PublicWeights, image_size: Side = 256) -> Imported:
    """A VQGAN of taming-transformers, with vectors or the Gumbel kind; what its training needed is left out.

    Args:
        image_size: side of the pictures.

    Raises:
        UserError: not such a VQGAN.
    """
    path = source.path
    found = {k: v for k, v in source.without("module.").items() if not k.startswith("loss.")}
    gumbel = "quantize.proj.weight" in found
    table = "quantize.embed.weight" if gumbel else "quantize.embedding.weight"
    vocabulary, code_dim = shape_of(found, table, 2, path, VQGAN)
    width, *_ = shape_of(found, "encoder.conv_in.weight", 4, path, VQGAN)
    z_channels, *_ = shape_of(found, "encoder.conv_out.weight", 4, path, VQGAN)
    levels = count(found, "encoder.down.{}.block.0.conv1.weight")
    widths = [found[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    if not levels or any(n % width for n in widths):
        raise UserError(f"{path} is another {VQGAN} than this version knows: its widths are {widths}")
    net = {
        "_target_": "dalle.nets.taming.TamingVQGAN",
        "image_size": image_size,
        "vocab_size": vocabulary,
        "width": width,
        "multipliers": [n // width for n in widths],
        "blocks": count(found, "encoder.down.0.block.{}.conv1.weight"),
        "attention": [i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in found],
        "z_channels": z_channels,
        "code_dim": code_dim,
        "gumbel": gumbel,
        "commitment": KL_WEIGHT if gumbel else 0.25,
    }
    return Imported("vqgan", "taming", vqgan_stage(net), found, {"image_size": image_size}, licence="MIT")


def vqgan_stage(net: dict[str, Any]) -> dict[str, Any]:
    """The stage with the release's losses and a discriminator of its size, which begins anew."""
    return {
        "_target_": "dalle.stages.vqgan.VQGANStage",
        "disc_start": 0,
        "perceptual": {"_target_": "dalle.metrics.perceptual.perceptual_distance", "_partial_": True},
        "discriminator": {"_target_": "dalle.nets.vqgan.PatchDiscriminator", "width": 64, "layers": 3},
        "net": net,
    }
