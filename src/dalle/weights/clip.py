"""CLIP as OpenAI, open_clip and transformers keep it (Radford et al. 2021).

The network is ours, whose names are OpenAI's. What tensors do not say is read from the configuration beside
them, or asked for: the activation (QuickGELU in OpenAI's weights, GELU in most others: pictures of one with
the other are near enough to go unnoticed) and, of wide towers, the heads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dalle.data.tokenizers import ClipBPE, tokenizer_facts
from dalle.errors import UserError
from dalle.nets.clip import EXPANSION, FACTOR, PIXEL_MEAN, PIXEL_STD
from dalle.ranges import Place, PositiveInt
from dalle.reading import read_json
from dalle.weights.glide import import_glide_text, is_glide
from dalle.weights.reading import ADVICE, PublicWeights
from dalle.weights.writing import Imported, count, refuse_others, shape_of

Activation = Literal["quick_gelu", "gelu"]
WHAT = "CLIP"
TOLD = ("input_resolution", "context_length", "vocab_size")  # numbers among OpenAI's weights
HEAD = 64  # width of a head, where nothing else is said

LAYER = {  # transformers' names of what is in a block -> OpenAI's
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
TOWERS = {"vision_model.": "visual.", "text_model.": ""}
OUTER = {  # and of what is outside
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
    "logit_scale": "logit_scale",
}
TURNED = ("visual.proj", "text_projection")  # x @ w here, a linear layer there


def import_clip(
    source: PublicWeights,
    activation: Activation | None = None,
    vision_heads: PositiveInt | None = None,
    tokenizer: Place | None = None,
    heads: PositiveInt | None = None,
) -> Imported:
    """CLIP with a vision transformer, or with a ResNet as OpenAI's; or GLIDE's encoder of captions.

    Args:
        activation: of the MLPs. None: what the configuration beside the weights says, or OpenAI's.
        vision_heads: None: as the configuration says, or 64 wide each.
        tokenizer, heads: of GLIDE: the folder of its tokenizer, and its heads (None: 64 wide each).

    Raises:
        UserError: not such a CLIP, or one of which this cannot be known.
    """
    if is_glide(source.without("module.")):
        refuse_others(source.path, activation=activation, vision_heads=vision_heads)
        return import_glide_text(source, tokenizer, heads)
    refuse_others(source.path, tokenizer=tokenizer, heads=heads)
    found, layout, openai = named(source)
    path = source.path
    vocabulary, text_width = shape_of(found, "token_embedding.weight", 2, path, WHAT)
    length, _ = shape_of(found, "positional_embedding", 2, path, WHAT)
    _, embed_dim = shape_of(found, "text_projection", 2, path, WHAT)
    vision = vision_sizes(found, path)
    told = _told(source)
    check_pixels(source)
    activation = activation or told.get("activation") or ("quick_gelu" if openai else None)
    if activation not in ("quick_gelu", "gelu"):
        raise UserError(
            f"{path} does not say its activation: give activation=quick_gelu for OpenAI's weights and those "
            "whose name ends in -quickgelu, activation=gelu for others"
        )
    vision_heads, width = vision_heads or told.get("vision_heads"), vision["vision_width"]
    if vision_heads is None and vision["vision"] == "vit":
        if width > 1024:
            raise UserError(
                f"{path} does not say how many heads its tower of pictures has, which is {width} wide; "
                "give vision_heads="
            )
        vision_heads = max(1, width // HEAD)
    net = {
        "_target_": "dalle.nets.clip.CLIP",
        **vision,
        "vision_heads": vision_heads,
        "text_width": text_width,
        "text_layers": count(found, "transformer.resblocks.{}.ln_1.weight"),
        "text_heads": told.get("text_heads") or max(1, text_width // HEAD),
        "context_length": length,
        "vocab_size": vocabulary,
        "embed_dim": embed_dim,
        "activation": activation,
    }
    bpe = ClipBPE(length)
    if bpe.vocab_size != vocabulary:
        raise UserError(
            f"{path} reads another vocabulary ({vocabulary} tokens) than CLIP's of {bpe.vocab_size}"
        )
    model = {"_target_": "dalle.stages.clip.ClipStage", "classification_weight": 0.0, "net": net}
    facts = {"image_size": net["image_size"], "tokenizer": tokenizer_facts(bpe)}
    return Imported("clip", layout, model, found, facts, bpe, licence="MIT" if layout == "openai" else None)


def vision_sizes(found: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """What the weights of the tower of pictures say of its sizes."""
    width, _, patch, _ = shape_of(found, "visual.conv1.weight", 4, path, WHAT)
    kind, pool, layers = "vit", "", count(found, "visual.transformer.resblocks.{}.ln_1.weight")
    if (first := "visual.layer1.0.conv1.weight") in found:
        kind, pool, width, patch = "resnet", "attnpool.", len(found[first]), FACTOR
        layers = [count(found, f"visual.layer{level}.{{}}.conv1.weight") for level in range(1, 5)]
    positions, _ = shape_of(found, f"visual.{pool}positional_embedding", 2, path, WHAT)
    side = round((positions - 1) ** 0.5)
    if side**2 != positions - 1:
        raise UserError(f"{path} reads pictures that are not square; only square ones are supported")
    return {
        "image_size": side * patch,
        "vision": kind,
        "patch_size": patch,
        "vision_width": width,
        "vision_layers": layers,
    }


def named(source: PublicWeights) -> tuple[dict[str, Tensor], str, bool]:
    """The tensors by OpenAI's names, whose names they had, and whether the file is OpenAI's own."""
    found = source.without("module.", "clip.", "model.")
    if any(name.startswith("vision_model.") for name in found):
        return from_transformers(found, source.path), "transformers", False
    own = all(name in found for name in TOLD)
    # beside OpenAI's numbers, what a program keeps of masks
    found = {k: v for k, v in found.items() if k not in TOLD and not k.endswith("attn_mask")}
    inner = ("text.transformer.", "text.ln_final.", "text.token_embedding.")
    if any(name.startswith(inner) for name in found):  # open_clip's CustomTextCLIP
        found = {name.removeprefix("text."): value for name, value in found.items()}
    return found, "openai" if own else "open_clip", own


def from_transformers(found: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """By OpenAI's names; of each layer query, key and value become one matrix."""
    made: dict[str, Tensor] = {}
    for name, value in found.items():
        if name.endswith("embeddings.position_ids"):
            continue
        today = openai_name(name)
        made[today] = value.T if today in TURNED else value
    for name in [name for name in made if ".q_proj." in name]:
        parts = [name.replace(".q_proj.", f".{one}_proj.") for one in "qkv"]
        if missing := [part for part in parts if part not in made]:
            raise UserError(f"{path} is no whole CLIP: it lacks {missing[0]}")
        joined = name.replace("attn.q_proj.", "attn.in_proj_")
        made[joined] = torch.cat([made.pop(part) for part in parts])
    return made


def openai_name(name: str) -> str:
    """``text_model.encoder.layers.0.mlp.fc1.bias`` -> ``transformer.resblocks.0.mlp.c_fc.bias``."""
    if name in OUTER:
        return OUTER[name]
    for tower, prefix in TOWERS.items():
        head = f"{tower}encoder.layers."
        if name.startswith(head):
            number, _, rest = name.removeprefix(head).partition(".")
            part, _, kind = rest.rpartition(".")
            part = LAYER.get(part) or part.replace("self_attn.", "attn.")
            return f"{prefix}transformer.resblocks.{number}.{part}.{kind}"
    return name


def _told(source: PublicWeights) -> dict[str, Any]:
    """Activation and heads, as far as a configuration of transformers or open_clip says them.

    Raises:
        UserError: it says something that a CLIP's does not.
    """
    config = source.config
    try:
        if "model_cfg" in config:
            cfg, quick = config["model_cfg"], config["model_cfg"].get("quick_gelu", False)
            vision, text = cfg["vision_cfg"], cfg["text_cfg"]
            width = vision["width"] * (1 if isinstance(vision["layers"], int) else 8 * EXPANSION)
            return {
                "activation": "quick_gelu" if quick else "gelu",
                "vision_heads": width // vision.get("head_width", HEAD),
                "text_heads": text.get("heads"),
            }
        if "vision_config" in config:
            vision, text = config["vision_config"], config["text_config"]
            acts = {part.get("hidden_act", "quick_gelu") for part in (vision, text)}  # transformers' default
            return {
                "activation": acts.pop() if len(acts) == 1 else None,
                "vision_heads": vision.get("num_attention_heads", 12),
                "text_heads": text.get("num_attention_heads", 8),
            }
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{source.path}: its configuration is damaged ({error!r}); {ADVICE}") from None
    return {}


def check_pixels(source: PublicWeights) -> None:
    """Refuses a model that reads pixels in another way than CLIP's, where a file beside it says so.

    Raises:
        UserError: another mean or standard deviation.
    """
    said = source.config.get("preprocess_cfg") or {}
    beside = source.path / "preprocessor_config.json"
    if source.path.is_dir() and beside.is_file():
        said = read_json(beside, dict, ADVICE)
    for known, names in ((PIXEL_MEAN, ("mean", "image_mean")), (PIXEL_STD, ("std", "image_std"))):
        for name in names:
            values = said.get(name) if isinstance(said, dict) else None
            if values and [round(float(v), 4) for v in values] != [round(v, 4) for v in known]:
                raise UserError(f"{source.path} reads pixels of another {name} ({values}) than CLIP's")
