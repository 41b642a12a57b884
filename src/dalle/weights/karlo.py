"""Karlo, and the priors of Kandinsky 2, which are of its kind: from Karlo's own files and from diffusers'.

diffusers keeps a pipeline as a folder of parts; each importer takes those it needs, so that the pipeline as a
whole need not load. Karlo's own files say it in guided-diffusion's names, with query, key and value of each
head in a row.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle.data.embed_norm import EmbedNorm
from dalle.data.tokenizers import tokenizer_facts
from dalle.errors import UserError
from dalle.ranges import Place, Positive, PositiveInt, Side, Width
from dalle.run_dir import load_clip
from dalle.weights.reading import PublicWeights, read_weights
from dalle.weights.writing import Imported, count, shape_of

LICENCE = "CreativeML Open RAIL-M"
HEAD = 64  # width of a head, where nothing else is said
CLAMPS = {"karlo": 10.0, "diffusers": 5.0}  # of the prior's estimates, in each code
SCHEDULE = {"_target_": "dalle.diffusion.schedule.Schedule", "name": "cosine", "steps": 1000}
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
) -> Imported:
    """The prior of Karlo, or of Kandinsky 2.1 or 2.2 in diffusers' layout.

    Args:
        clip: the run of the CLIP whose embeddings it makes: ViT-L/14 of OpenAI's, of Kandinsky 2.2 ViT-bigG.
        stats: Karlo's ViT-L-14_stats.th: mean and standard deviation of image embeddings, which diffusers
            keeps among the weights.
        heads: None: as the configuration says, or width / 64.
        clamp: what holds estimates; None: 10 as in Karlo's code, 5 as in diffusers' pipeline.

    Raises:
        UserError: not such a prior, or of another CLIP.
    """
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
    """Karlo's decoder.

    Args:
        clip: the run of the CLIP whose embeddings it draws: ViT-L/14 of OpenAI's.
        image_size: side of its pictures.
        head_dim: width of an attention head; None: as the configuration says, or 64.

    Raises:
        UserError: not such a decoder, or of another CLIP.
    """
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


# What the stages share


def ancestral(steps: int) -> dict[str, Any]:
    return {"_target_": "dalle.diffusion.samplers.Sampler", "method": "ddpm", "steps": steps}


def denoiser(prediction: str, learned_variance: bool = False) -> dict[str, Any]:
    return {
        "_target_": "dalle.diffusion.denoiser.Denoiser",
        "_partial_": True,
        "prediction": prediction,
        "learned_variance": learned_variance,
        "schedule": dict(SCHEDULE),
    }


def of_clip(
    frozen: Any, clip: Place, net: Mapping[str, Any], path: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a manifest says of the CLIP, and what this makes of the empty caption.

    Raises:
        UserError: the network reads what another CLIP makes.
    """
    for name in ("embed_dim", "text_width", "context_length"):
        if net[name] != (has := getattr(frozen, name)):
            raise UserError(f"{path} works with a CLIP of {name}={net[name]}, but {clip} has {has}")
    empty = frozen.embed_captions([""])
    facts = {
        "clip": {"weights": frozen.weights_hash, "embed_dim": frozen.embed_dim},
        "tokenizer": tokenizer_facts(frozen.tokenizer),
    }
    return facts, {"empty_embed": empty["text_embed"][0], "empty_hidden": empty["text_hidden"][0]}


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


def unet_sizes(found: Mapping[str, Tensor], prefix: str, path: Path, what: str) -> dict[str, Any]:
    """What a U-Net's tensors say of its sizes."""
    first, *_ = shape_of(found, f"{prefix}conv_in.weight", 4, path, what)
    block = f"{prefix}down_blocks.{{}}.resnets.0.conv1.weight"
    levels = count(found, block)
    widths = [found[block.format(i)].shape[0] for i in range(levels)]
    if not levels or any(width % first for width in widths):
        raise UserError(f"{path} is another {what} than this version knows: its widths are {widths}")
    told_by, *_ = shape_of(found, f"{prefix}down_blocks.0.resnets.0.time_emb_proj.weight", 2, path, what)
    attention = f"{prefix}down_blocks.{{}}.attentions.0.to_q.weight"
    return {
        "width": first,
        "multipliers": [width // first for width in widths],
        "blocks": count(found, f"{prefix}down_blocks.0.resnets.{{}}.conv1.weight"),
        "attention": [i for i in range(levels) if attention.format(i) in found],
        "scale_shift": told_by == 2 * widths[0],
    }


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
UNET = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}


def renamed(name: str, table: Mapping[str, str]) -> str | None:
    """By the entry of the table that is the name, or all of it but the last part."""
    if name in table:
        return table[name]
    layer, _, kind = name.rpartition(".")
    return f"{table[layer]}.{kind}" if layer in table else None


def per_head(value: Tensor, parts: int, head_dim: int, path: Path) -> list[Tensor]:
    """Query, key and value (or the latter two) of rows in which each head has its own after one another."""
    if len(value) % (parts * head_dim):
        raise UserError(f"{path}: {len(value)} rows are not {parts} of heads of {head_dim}; give the heads'")
    rows = value.unflatten(0, (-1, parts, head_dim))
    return [rows[:, i].flatten(0, 1) for i in range(parts)]


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


def unet_names(found: Mapping[str, Tensor], path: Path, head_dim: int) -> dict[str, Tensor]:
    """diffusers' names of a U-Net with guided-diffusion's, where blocks are numbered through all levels.

    A level has as many blocks on the way up as there are before the first that also enlarges, and one less on
    the way down, where shrinking is a block of its own.
    """
    ups = 1 + max((int(n.split(".")[1]) for n in found if n.startswith("output_blocks.")), default=0)
    enlarging = [
        int(name.split(".")[1])
        for name in found
        if name.startswith("output_blocks.") and name.split(".")[2] != "0" and ".in_layers.0." in name
    ]
    per_level = 1 + min(enlarging, default=ups - 1)
    middle = sorted({int(name.split(".")[1]) for name in found if name.startswith("middle_block.")})
    made: dict[str, Tensor] = {}
    for name, value in found.items():
        parts = name.split(".")
        if (new := renamed(name, UNET)) is not None:
            made[new] = value
        elif parts[0] == "input_blocks" and len(parts) > 4:
            level, i = divmod(int(parts[1]) - 1, per_level)
            inner = f"resnets.{i}" if i < per_level - 1 else "downsamplers.0"
            attention = f"attentions.{i}"
            made |= _block(f"down_blocks.{level}.", inner, attention, parts[3:], value, path, head_dim)
        elif parts[0] == "output_blocks" and len(parts) > 4:
            level, i = divmod(int(parts[1]), per_level)
            inner = "upsamplers.0" if parts[2] != "0" else f"resnets.{i}"
            made |= _block(f"up_blocks.{level}.", inner, f"attentions.{i}", parts[3:], value, path, head_dim)
        elif parts[0] == "middle_block" and len(parts) > 3:
            inner = f"resnets.{0 if int(parts[1]) == middle[0] else 1}"
            made |= _block("mid_block.", inner, "attentions.0", parts[2:], value, path, head_dim)
        else:
            made[name] = value
    return made


def _block(
    level: str, resnet: str, attention: str, parts: list[str], value: Tensor, path: Path, head_dim: int
) -> dict[str, Tensor]:
    """One weight of a residual block or of an attention: the latter's are convolutions of width 1."""
    name = ".".join(parts)
    if new := renamed(name, RESNET):
        return {f"{level}{resnet}.{new}": value}
    value = value.flatten(1) if value.ndim == 3 else value
    layer, _, kind = name.rpartition(".")
    for known, ones in (("qkv", ("to_q", "to_k", "to_v")), ("encoder_kv", ("add_k_proj", "add_v_proj"))):
        if layer == known:
            rows = per_head(value, len(ones), head_dim, path)
            return {f"{level}{attention}.{one}.{kind}": row for one, row in zip(ones, rows, strict=True)}
    return {f"{level}{attention}.{renamed(name, ATTENTION) or name}": value}
