"""Runs as folders that open_clip, transformers and diffusers read, where the architecture is theirs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from dalle.data.embed_norm import EmbedNorm
from dalle.data.tokenizers import ClipBPE
from dalle.errors import UserError
from dalle.files import atomic_folder, write_json
from dalle.nets.clip import CLIP, PIXEL_MEAN, PIXEL_STD, ConvTower, ResNetTower
from dalle.nets.karlo import KarloDecoder, KarloUNet, KarloUpsampler, PriorTransformer
from dalle.nets.taming import TamingVQGAN
from dalle.run_dir import IMAGE_TOKENIZERS, Run, load_stage
from dalle.weights.clip import LAYER, OUTER, TURNED

Layout = Literal["transformers", "open_clip"]
Part = tuple[dict[str, Any], Mapping[str, Tensor]]  # config.json and the weights of a network
WEIGHTS = "diffusion_pytorch_model.safetensors"


def export_clip(run: Run, out: Path, layout: Layout = "transformers") -> None:
    """A CLIP with a vision transformer or CLIP's ResNet. `layout`: for transformers' `CLIPModel`, which has
    no ResNets, or for open_clip's ``local-dir:``.
    """
    stage, _ = load_stage(run.path, "clip")
    net = stage.net
    if not isinstance(net, CLIP):
        raise UserError(f"{run} is no architecture of {layout}: only CLIPs with both towers are exported")
    if isinstance(net.visual, ConvTower):
        raise UserError(
            f"{run} is a CLIP with a tower of convolutions, which {layout} does not have; those with "
            "model.net.vision=vit can be exported"
        )
    if isinstance(net.visual, ResNetTower) and layout != "open_clip":
        raise UserError(f"{run} is a CLIP with a ResNet, which {layout} does not have; give layout=open_clip")
    tokenizer = run.load_tokenizer_of("CLIP", net.context_length, net.vocab_size)
    if layout == "open_clip" and not isinstance(tokenizer, ClipBPE):
        raise UserError(
            f"{run} has a tokenizer of its own, which open_clip does not; give layout=transformers"
        )
    weights = {name: value.contiguous() for name, value in net.state_dict().items()}
    sizes: Any = net.visual
    if isinstance(sizes, ResNetTower):
        vision = {"patch_size": None, "width": sizes.width, "layers": sizes.layers}
        width, heads = sizes.attnpool.k_proj.in_features, sizes.attnpool.heads
    else:
        vision = {"patch_size": sizes.patch, "width": sizes.proj.shape[0]}
        vision["layers"] = len(sizes.transformer.resblocks)
        width, heads = vision["width"], sizes.transformer.resblocks[0].attn.heads
    vision["image_size"] = net.image_size
    first: Any = net.transformer.resblocks[0]
    quick = type(first.mlp.gelu).__name__ == "QuickGELU"
    text: dict[str, Any] = {
        "context_length": net.context_length,
        "vocab_size": net.vocab_size,
        "width": net.text_width,
        "layers": len(net.transformer.resblocks),
        "heads": first.attn.heads,
    }
    with atomic_folder(out) as folder:
        if layout == "open_clip":
            model = {
                "embed_dim": net.embed_dim,
                "quick_gelu": quick,
                "vision_cfg": vision | {"head_width": width // heads},
                "text_cfg": text,
            }
            pixels = {"mean": PIXEL_MEAN, "std": PIXEL_STD, "interpolation": "bicubic"}
            write_json(folder / "open_clip_config.json", {"model_cfg": model, "preprocess_cfg": pixels})
            save_file(weights, folder / "open_clip_model.safetensors")
            return
        ids = {"bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.end_id, "pad_token_id": 0}
        config = {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": net.embed_dim,
            "vision_config": _tower(vision | {"heads": heads}, quick)
            | {"image_size": net.image_size, "patch_size": sizes.patch, "projection_dim": net.embed_dim},
            "text_config": _tower(text, quick)
            | {"max_position_embeddings": net.context_length, "vocab_size": net.vocab_size}
            | {"projection_dim": net.embed_dim, **ids},
        }
        size = {"shortest_edge": net.image_size}
        pixels = {
            "image_processor_type": "CLIPImageProcessor",
            "image_mean": PIXEL_MEAN,
            "image_std": PIXEL_STD,
            "size": size,
            "crop_size": {"height": net.image_size, "width": net.image_size},
        }
        write_json(folder / "config.json", config)
        write_json(folder / "preprocessor_config.json", pixels)
        save_file(transformers_names(weights), folder / "model.safetensors")


def _tower(sizes: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    return {
        "hidden_size": sizes["width"],
        "intermediate_size": 4 * sizes["width"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "hidden_act": "quick_gelu" if quick else "gelu",
    }


def transformers_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names of a CLIP with OpenAI's."""
    outer, inner = ({new: old for old, new in table.items()} for table in (OUTER, LAYER))
    made: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name in outer:
            made[outer[name]] = (value.T if name in TURNED else value).contiguous()
            continue
        tower = "vision_model" if name.startswith("visual.") else "text_model"
        number, rest = name.removeprefix("visual.").removeprefix("transformer.resblocks.").split(".", 1)
        layer = f"{tower}.encoder.layers.{number}"
        if rest.startswith("attn.in_proj_"):
            for one, rows in zip("qkv", value.chunk(3), strict=True):
                kind = rest.removeprefix("attn.in_proj_")
                made[f"{layer}.self_attn.{one}_proj.{kind}"] = rows.contiguous()
        else:
            part, _, kind = rest.rpartition(".")
            made[f"{layer}.{inner[part]}.{kind}"] = value
    return made


def export_prior(run: Run, out: Path) -> None:
    """A prior of Karlo's or Kandinsky's kind, as diffusers' `PriorTransformer`."""
    stage, manifest = load_stage(run.path, "prior")
    net = _of_class(run, stage.net, PriorTransformer, "PriorTransformer")
    weights = {name: v for name, v in net.state_dict().items() if not name.startswith("empty_")}
    norm = EmbedNorm.from_dict(manifest["image_embed_norm"])
    if norm.mean is None or norm.std is None or norm.kind != "standardized":
        raise UserError(f"{run}: diffusers' prior works on standardized embeddings, not on {norm.kind} ones")
    weights |= {"clip_mean": norm.mean[None], "clip_std": norm.std[None]}
    heads = net.width // net.transformer_blocks[0].attn1.head_dim
    config = {
        "_class_name": "PriorTransformer",
        "num_attention_heads": heads,
        "attention_head_dim": net.width // heads,
        "num_layers": len(net.transformer_blocks),
        "embedding_dim": net.embed_dim,
        "num_embeddings": len(net.empty_hidden),
        "additional_embeddings": 4,
    }
    _write(out, {"": (config, weights)})


def export_decoder(run: Run, out: Path) -> None:
    """A decoder of Karlo's kind, as diffusers' `UNet2DConditionModel` and `UnCLIPTextProjModel`."""
    stage, _ = load_stage(run.path, "decoder")
    net = _of_class(run, stage.net, KarloDecoder, "UNet2DConditionModel")
    text = net.text_proj
    config = {
        "_class_name": "UnCLIPTextProjModel",
        "clip_extra_context_tokens": text.tokens,
        "clip_embeddings_dim": net.embed_dim,
        "time_embed_dim": text.embedding_proj.out_features,
        "cross_attention_dim": text.encoder_hidden_states_proj.out_features,
    }
    context = text.encoder_hidden_states_proj.out_features
    unet = unet_config(net.decoder, net.image_size, context)
    _write(out, {"decoder": (unet, net.decoder.state_dict()), "text_proj": (config, text.state_dict())})


def export_upsampler(run: Run, out: Path) -> None:
    """An upsampler of Karlo's kind, as two of diffusers' `UNet2DModel`."""
    stage, _ = load_stage(run.path, "upsampler")
    net = _of_class(run, stage.net, KarloUpsampler, "UNet2DModel")
    parts = {name: getattr(net, name) for name in ("super_res_first", "super_res_last")}
    _write(out, {name: (unet_config(u, net.image_size), u.state_dict()) for name, u in parts.items()})


def unet_config(net: KarloUNet, image_size: int, context: int | None = None) -> dict[str, Any]:
    """diffusers' configuration of a U-Net with attention to a context, or without any attention."""
    downs, ups = list(net.down_blocks), list(net.up_blocks)
    attending = [hasattr(level, "attentions") for level in downs]

    def kinds(way: str, levels: list[bool]) -> list[str]:
        return [f"SimpleCrossAttn{way}Block2D" if one else f"Resnet{way}sampleBlock2D" for one in levels]

    first: Any = downs[0].resnets[0]  # pyright: ignore[reportIndexIssue]  # of a ModuleList
    config: dict[str, Any] = {
        "_class_name": "UNet2DModel" if context is None else "UNet2DConditionModel",
        "sample_size": image_size,
        "in_channels": net.conv_in.in_channels,
        "out_channels": net.conv_out.out_channels,
        "layers_per_block": len(downs[0].resnets),  # pyright: ignore[reportArgumentType]  # a ModuleList
        "block_out_channels": [level.resnets[0].conv1.out_channels for level in downs],  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]  # the same
        "down_block_types": kinds("Down", attending),
        "up_block_types": kinds("Up", [hasattr(level, "attentions") for level in ups]),
        "resnet_time_scale_shift": "scale_shift" if first.scale_shift else "default",
    }
    if context is None:
        return config | {"add_attention": False}
    middle: Any = net.mid_block.part("attentions")
    return config | {
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "cross_attention_dim": context,
        "class_embed_type": "identity",
        "attention_head_dim": middle.head_dim,
    }


def export_vqgan(run: Run, out: Path) -> None:
    """A VQGAN of taming-transformers' kind with a codebook, as diffusers' `VQModel`."""
    stage, _ = load_stage(run.path, *IMAGE_TOKENIZERS)
    net = _of_class(run, stage.net, TamingVQGAN, "VQModel")
    if net.gumbel:
        raise UserError(f"{run} is of the Gumbel kind, which diffusers' VQModel is not")
    downs: Any = net.encoder.down
    attending = [len(level.attn) > 0 for level in downs]
    config = {
        "_class_name": "VQModel",
        "sample_size": net.image_size,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": len(downs[0].block),
        "block_out_channels": [level.block[0].conv1.out_channels for level in downs],
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attending],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attending)],
        "latent_channels": net.quant_conv.in_channels,
        "num_vq_embeddings": net.vocab_size,
        "vq_embed_dim": net.code_dim,
        "norm_num_groups": 32,
    }
    _write(out, {"": (config, vqmodel_names(net.state_dict(), len(downs)))})


VQ = {  # taming's names of what is in a level -> diffusers'
    "block": "resnets", "attn": "attentions", "norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v",
    "proj_out": "to_out.0", "nin_shortcut": "conv_shortcut", "downsample": "downsamplers.0",
    "upsample": "upsamplers.0", "norm_out": "conv_norm_out", "mid": "mid_block", "block_1": "resnets.0",
    "block_2": "resnets.1", "attn_1": "attentions.0", "down": "down_blocks", "up": "up_blocks",
}  # fmt: skip


def vqmodel_names(weights: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """diffusers' names of a VQGAN's weights; attention is linear layers there, and levels go up from the
    smallest.
    """
    made: dict[str, Tensor] = {}
    for name, value in weights.items():
        parts = name.split(".")
        if parts[1] == "up":
            parts[2] = str(levels - 1 - int(parts[2]))
        if any(part in ("q", "k", "v", "proj_out") for part in parts) and value.ndim == 4:
            value = value.flatten(1)
        made[".".join(VQ.get(part, part) for part in parts)] = value
    return made


def _of_class(run: Run, net: Any, kind: type, theirs: str) -> Any:
    if not isinstance(net, kind):
        raise UserError(
            f"{run} has a {type(net).__name__}, which is no architecture of diffusers'; {theirs} is what a "
            f"{kind.__name__} is exported as, which dalle import makes"
        )
    return net


def _write(out: Path, parts: Mapping[str, Part]) -> None:
    """A folder of diffusers' for each part, or the folder itself where there is one of no name."""
    with atomic_folder(out) as folder:
        for name, (config, weights) in parts.items():
            place = folder / name
            place.mkdir(exist_ok=True)
            write_json(place / "config.json", config)
            save_file({key: value.contiguous() for key, value in weights.items()}, place / WEIGHTS)


EXPORTERS: dict[str, Callable[..., None]] = {  # by stage
    "clip": export_clip,
    "vqgan": export_vqgan,
    "prior": export_prior,
    "decoder": export_decoder,
    "upsampler": export_upsampler,
}
