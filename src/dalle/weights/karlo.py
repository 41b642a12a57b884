"""Karlo, and the priors of Kandinsky 2, which are of its kind: from Karlo's own files and from diffusers'.

diffusers keeps a pipeline as a folder of parts; each importer takes those it needs, so that the pipeline as a
whole need not load. Karlo's own files say it in guided-diffusion's names, with query, key and value of each
head in a row.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dalle.data.embed_norm import EmbedNorm
from dalle.errors import UserError
from dalle.ranges import Place, Positive, PositiveInt, Side, Text, Width
from dalle.run_dir import load_clip
from dalle.weights.diffusion import ancestral, denoiser, of_clip
from dalle.weights.glide import import_glide, is_glide
from dalle.weights.laion import import_laion
from dalle.weights.reading import PublicWeights, read_weights
from dalle.weights.unet import per_head, renamed, unet_names, unet_sizes
from dalle.weights.writing import Imported, count, refuse_others, shape_of

LICENCE = "CreativeML Open RAIL-M"
HEAD = 64  # width of a head, where nothing else is said
CLAMPS = {"karlo": 10.0, "diffusers": 5.0}  # of the prior's estimates, in each code
PARTS = {  # of a pipeline in diffusers' layout
    "prior": ("prior",),
    "decoder": ("decoder", "text_proj"),
    "upsampler": ("super_res_first", "super_res_last"),
}


def import_prior(
    source: PublicWeights,
    clip: Place,
    stats: Place | None = None,
    heads: PositiveInt | None = None,
    clamp: Positive | None = None,
    version: Text | None = None,
) -> Imported:
    """The prior of Karlo, or of Kandinsky 2.1 or 2.2 in diffusers' layout, or LAION's.

    Args:
        clip: the run of the CLIP whose embeddings it makes: ViT-L/14 of OpenAI's, of Kandinsky 2.2 ViT-bigG.
        stats: Karlo's ViT-L-14_stats.th: mean and standard deviation of image embeddings, which diffusers
            keeps among the weights.
        heads: None: as the configuration says, or width / 64.
        clamp: what holds estimates; None: 10 as in Karlo's code, 5 as in diffusers' pipeline.
        version: of DALLE2-pytorch, for LAION's alone.

    Raises:
        UserError: not such a prior, or of another CLIP.
    """
    if any("causal_transformer.layers." in name for name in source.tensors):
        refuse_others(source.path, stats=stats, heads=heads, clamp=clamp)
        return import_laion(source, clip, version)
    refuse_others(source.path, version=version)
    path, found = source.path, source.without("module.", "prior.")
    layout = "karlo" if any(".c_qkv." in name for name in found) else "diffusers"
    if layout == "karlo":
        found = prior_names(source.without("module.", "model."), path, heads)
        mean, std = read_stats(stats, path)
    else:
        mean, std = (found.pop(name, None) for name in ("clip_mean", "clip_std"))
        if mean is None or std is None:
            raise UserError(f"{path} is no prior of Karlo's or Kandinsky's: it lacks clip_mean, clip_std")
    what = "prior of Karlo's or Kandinsky's"
    _, places, width = shape_of(found, "positional_embedding", 3, path, what)
    embed_dim, _ = shape_of(found, "proj_to_clip_embeddings.weight", 2, path, what)
    _, text_width = shape_of(found, "encoder_hidden_states_proj.weight", 2, path, what)
    net = {
        "_target_": "dalle.nets.karlo.PriorTransformer",
        "embed_dim": embed_dim,
        "text_width": text_width,
        "context_length": places - 4,
        "width": width,
        "depth": count(found, "transformer_blocks.{}.norm1.weight"),
        "heads": heads or told(source, "prior", "num_attention_heads") or max(1, width // HEAD),
    }
    norm = EmbedNorm("standardized", mean.flatten().float(), std.flatten().float())
    if not norm.fits(embed_dim):
        raise UserError(f"{stats or path}: mean and deviation are not those of {embed_dim} numbers above 0")
    model = {
        "_target_": "dalle.stages.prior.PriorStage",
        "text_dropout": 0.2,
        "guidance": 4.0,
        "candidates": 1,
        "clamp": clamp or CLAMPS[layout],
        "sampler": ancestral(25),
        "denoiser": denoiser("x0"),
        "net": net,
    }
    facts, more = of_clip(load_clip(clip), clip, net, path)
    facts |= {"image_embed_norm": norm.to_dict()}
    return Imported("prior", layout, model, found | more, facts, clip=Path(clip), licence=LICENCE)


def import_decoder(
    source: PublicWeights, clip: Place, image_size: Side = 64, head_dim: Width | None = None
) -> Imported:
    """Karlo's decoder, or GLIDE's base model.

    Args:
        clip: the run of the CLIP whose embeddings it draws: ViT-L/14 of OpenAI's; of GLIDE, its encoder.
        image_size: side of its pictures.
        head_dim: width of an attention head; None: as the configuration says, or 64.

    Raises:
        UserError: not such a decoder, or of another CLIP.
    """
    if is_glide(source.without("module.")):
        return import_glide(source, clip, image_size, head_dim)
    path, found = source.path, source.tensors
    head_dim = head_dim or told(source, "decoder", "attention_head_dim") or HEAD
    layout, what = "diffusers", "decoder of Karlo's"
    if not any(name.startswith("decoder.") for name in found):
        layout, found = "karlo", decoder_names(source.without("module.", "model."), path, head_dim)
    sizes = unet_sizes(found, "decoder.", path, what)
    context, _ = shape_of(found, "text_proj.encoder_hidden_states_proj.weight", 2, path, what)
    width, embed_dim = shape_of(found, "text_proj.clip_extra_context_tokens_proj.weight", 2, path, what)
    _, text_width = shape_of(found, "text_proj.encoder_hidden_states_proj.weight", 2, path, what)
    frozen = load_clip(clip)
    net = {
        "_target_": "dalle.nets.karlo.KarloDecoder",
        "image_size": image_size,
        "embed_dim": embed_dim,
        "text_width": text_width,
        "context_length": frozen.context_length,
        **sizes,
        "context": context,
        "head_dim": head_dim,
        "image_tokens": width // context,
        "dropout": 0.1,
    }
    model = {
        "_target_": "dalle.stages.decoder.DecoderStage",
        "image_dropout": 0.1,
        "text_dropout": 0.3,
        "guidance": 8.0,
        "thresholding": "static",
        "sampler": ancestral(25),
        "denoiser": denoiser("eps", learned_variance=True),
        "net": net,
    }
    facts, more = of_clip(frozen, clip, net, path)
    facts |= {"image_size": image_size, "image_embed_norm": EmbedNorm("none").to_dict()}
    return Imported("decoder", layout, model, found | more, facts, clip=Path(clip), licence=LICENCE)


def import_upsampler(source: PublicWeights, image_size: Side = 256, factor: Side = 4) -> Imported:
    """Karlo's upsampler, both of its networks: 64 px to 256.

    Args:
        image_size: side of the large pictures. factor: how many times that of the small ones.

    Raises:
        UserError: not such an upsampler.
    """
    path, found, layout = source.path, source.tensors, "diffusers"
    names = {"model_first_steps.": "super_res_first.", "model_last_step.": "super_res_last."}
    if any(name.startswith(tuple(names)) for name in found):
        layout, made = "karlo", dict[str, Tensor]()
        for old, new in names.items():
            part = {name.removeprefix(old): v for name, v in found.items() if name.startswith(old)}
            made |= {new + name: value for name, value in unet_names(part, path, HEAD).items()}
        found = made
    sizes = unet_sizes(found, "super_res_first.", path, "upsampler of Karlo's")
    if sizes.pop("attention"):
        raise UserError(f"{path} is another upsampler than this version knows: it has attention")
    net = {
        "_target_": "dalle.nets.karlo.KarloUpsampler",
        "image_size": image_size,
        "factor": factor,
        **sizes,
    }
    model = {
        "_target_": "dalle.stages.upsampler.UpsamplerStage",
        "noise_max": 0.0,
        "thresholding": "static",
        "sampler": ancestral(7),
        "denoiser": denoiser("eps"),
        "net": net,
    }
    facts = {"image_size": image_size, "factor": factor}
    return Imported("upsampler", layout, model, found, facts, licence=LICENCE)


def told(source: PublicWeights, part: str, key: str) -> int | None:
    """A number of a part's configuration, where it has one."""
    config = source.config.get(part, source.config)
    value = config.get(key) if isinstance(config, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def read_stats(stats: Place | None, path: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation from Karlo's file."""
    if stats is None:
        raise UserError(f"{path} needs the mean and deviation of embeddings: give stats=ViT-L-14_stats.th")
    values = list(read_weights(Path(stats)).tensors.values())
    if len(values) != 2:
        raise UserError(f"{stats} does not hold a mean and a deviation, but {len(values)} tensors")
    return values[0], values[1]


# Karlo's own names

PRIOR = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "clip_img_proj": "proj_in", "text_emb_proj": "embedding_proj",
    "text_enc_proj": "encoder_hidden_states_proj", "prd_emb": "prd_embedding", "final_ln": "norm_out",
    "out_proj": "proj_to_clip_embeddings",
}  # fmt: skip
LAYER = {
    "ln_1": "norm1", "ln_2": "norm3", "attn.c_proj": "attn1.to_out.0", "mlp.c_fc": "ff.net.0.proj",
    "mlp.c_proj": "ff.net.2",
}  # fmt: skip
TEXT = {
    "text_seq_proj.0": "encoder_hidden_states_proj", "text_seq_proj.1": "text_encoder_hidden_states_norm",
    "clip_tok_proj": "clip_extra_context_tokens_proj", "text_feat_proj": "embedding_proj",
    "clip_emb": "clip_image_embeddings_project_to_time_embeddings",
    "cf_param": "learned_classifier_free_guidance_embeddings",
}  # fmt: skip


def prior_names(found: Mapping[str, Tensor], path: Path, heads: int | None) -> dict[str, Tensor]:
    """diffusers' names of Karlo's prior."""
    made: dict[str, Tensor] = {}
    for name, value in found.items():
        if not name.startswith("transformer.resblocks."):
            made[renamed(name, PRIOR) or name] = value
            continue
        _, _, number, rest = name.split(".", 3)
        layer = f"transformer_blocks.{number}."
        if rest.startswith("attn.c_qkv."):
            head = value.shape[0] // 3 // heads if heads else HEAD
            for one, rows in zip("qkv", per_head(value, 3, head, path), strict=True):
                made[f"{layer}attn1.to_{one}.{rest.rpartition('.')[2]}"] = rows
        else:
            made[layer + (renamed(rest, LAYER) or rest)] = value
    return made


def decoder_names(found: Mapping[str, Tensor], path: Path, head_dim: int) -> dict[str, Tensor]:
    """diffusers' names of Karlo's decoder, in the parts it has there."""
    text = {new: name for name in found if (new := renamed(name, TEXT))}
    made = {f"text_proj.{new}": found[name] for new, name in text.items()}
    rest = {name: value for name, value in found.items() if name not in text.values()}
    return made | {f"decoder.{name}": value for name, value in unet_names(rest, path, head_dim).items()}
