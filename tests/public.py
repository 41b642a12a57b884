"""Public networks with random weights, small, of the packages in which they are: what imports are held to."""

import itertools
import math

import pytest
import torch
from torch import nn

from dalle.data.tokenizers import ClipBPE
from dalle.nets.clip import CLIP

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
E = 64  # of CLIP's embeddings and of its text states
PRIOR = {"num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 2, "embedding_dim": E}
KARLO_DECODER = {
    "in_channels": 3, "out_channels": 6, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "class_embed_type": "identity", "resnet_time_scale_shift": "scale_shift",
}  # fmt: skip
DECODER = KARLO_DECODER | {
    "sample_size": 16, "layers_per_block": 1, "block_out_channels": (64, 128), "cross_attention_dim": 48,
    "attention_head_dim": 64,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
}  # fmt: skip
UPSAMPLER = {
    "sample_size": 32, "layers_per_block": 1, "block_out_channels": (32, 64), "in_channels": 6,
    "out_channels": 3, "add_attention": False, "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
    "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
}  # fmt: skip


def shaken(net: torch.nn.Module) -> torch.nn.Module:
    """With no weight left at 0 or 1, so that none could be missed."""
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn(p.shape)
    return net.eval().requires_grad_(False)


def make_prior():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    net = shaken(diffusers.PriorTransformer(**PRIOR))
    net.clip_std.data = net.clip_std.abs() + 0.1
    return net


def make_decoder():
    diffusers = pytest.importorskip("diffusers")
    text_proj = pytest.importorskip("diffusers.pipelines.deprecated.unclip.text_proj")
    torch.manual_seed(2)
    net = shaken(diffusers.UNet2DConditionModel(**DECODER))
    text = text_proj.UnCLIPTextProjModel(clip_embeddings_dim=E, time_embed_dim=256, cross_attention_dim=48)
    return net, shaken(text)


def make_upsampler():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    return [shaken(diffusers.UNet2DModel(**UPSAMPLER)) for _ in range(2)]


def clip_weights() -> dict[str, torch.Tensor]:
    """Of a CLIP of these sizes, by OpenAI's names; `activation=quick_gelu` says the rest."""
    torch.manual_seed(0)
    return CLIP(32, 8, 64, 1, E, 1, 77, 49408, E, 1, activation="quick_gelu", vision="vit").state_dict()


TAMING = {"ch": 32, "ch_mult": (1, 1, 2), "num_res_blocks": 1, "attn_resolutions": [8], "z_channels": 32}


class Released(nn.Module):
    """The parts of taming's VQModel and GumbelVQ, put together as there."""

    def __init__(self, sizes, resolution: int, vocabulary: int, gumbel: bool) -> None:
        super().__init__()
        reason = "the package taming-transformers-rom1504 is not installed"
        parts = pytest.importorskip("taming.modules.diffusionmodules.model", reason=reason)
        books = pytest.importorskip("taming.modules.vqvae.quantize", reason=reason)
        more = {"in_channels": 3, "out_ch": 3, "resolution": resolution, "double_z": False}
        sizes = {"z_channels": 256, **sizes, **more}
        z = sizes["z_channels"]
        self.encoder, self.decoder = parts.Encoder(**sizes), parts.Decoder(**sizes)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z, z, 1), nn.Conv2d(z, z, 1)
        self.quantize: nn.Module = (
            books.GumbelQuantize(z, z, n_embed=vocabulary, kl_weight=1e-8)
            if gumbel
            else books.VectorQuantizer2(vocabulary, z, beta=0.25)
        )

    def forward(self, image):
        return self.quantize(self.quant_conv(self.encoder(image)))

    def decode(self, quantized):
        return self.decoder(self.post_quant_conv(quantized))


# guided-diffusion's names of U-Nets, which Karlo and GLIDE have, written by what that code does


def in_a_row(*parts: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in which each head has its own query, key and value: one view (heads, 3, d) of the product."""
    return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 2)


def karlo_resnet(net) -> dict[str, torch.Tensor]:
    parts = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    }  # fmt: skip
    split = {name: name.rsplit(".", 1) for name in net.state_dict()}
    return {f"{parts[split[name][0]]}.{split[name][1]}": v for name, v in net.state_dict().items()}


def karlo_attention(net) -> dict[str, torch.Tensor]:
    made, w = {}, net.state_dict()
    for kind in ("weight", "bias"):
        made[f"norm.{kind}"] = w[f"group_norm.{kind}"]
        made[f"qkv.{kind}"] = in_a_row(*(w[f"to_{one}.{kind}"] for one in "qkv"), heads=net.heads)
        made[f"encoder_kv.{kind}"] = in_a_row(*(w[f"add_{one}_proj.{kind}"] for one in "kv"), heads=net.heads)
        made[f"proj_out.{kind}"] = w[f"to_out.0.{kind}"]
    return {name: value[..., None] if value.ndim == 2 else value for name, value in made.items()}


def karlo_unet(net) -> dict[str, torch.Tensor]:
    """Blocks numbered through, as they are run."""
    ins, outs, middle = [[net.conv_in]], [], [net.mid_block.resnets[0]]
    for level in net.down_blocks:
        attentions = getattr(level, "attentions", [None] * len(level.resnets))
        ins += [[r] if a is None else [r, a] for r, a in zip(level.resnets, attentions, strict=True)]
        ins += [[d] for d in level.downsamplers or ()]
    for level in net.up_blocks:
        attentions = getattr(level, "attentions", [None] * len(level.resnets))
        outs += [[r] if a is None else [r, a] for r, a in zip(level.resnets, attentions, strict=True)]
        outs[-1] += level.upsamplers or []
    middle += [a for a in net.mid_block.attentions if a is not None] + [net.mid_block.resnets[1]]
    blocks = {f"input_blocks.{i}": b for i, b in enumerate(ins)} | {
        f"output_blocks.{i}": b for i, b in enumerate(outs)
    }
    found = {f"{name}.{j}": part for name, row in blocks.items() for j, part in enumerate(row)}
    found |= {f"middle_block.{i}": part for i, part in enumerate(middle)}
    found |= {"time_embed.0": net.time_embedding.linear_1, "time_embed.2": net.time_embedding.linear_2,
              "out.0": net.conv_norm_out, "out.2": net.conv_out}  # fmt: skip
    made = {}
    for name, part in found.items():
        kind = type(part).__name__
        rows = {"ResnetBlock2D": karlo_resnet, "Attention": karlo_attention}.get(
            kind, lambda p: p.state_dict()
        )
        made |= {f"{name}.{inner}": value for inner, value in rows(part).items()}
    return made


class FakeCLIP:
    """Sizes alone: of OpenAI's ViT-L/14, of ViT-bigG, of GLIDE's encoder."""

    def __init__(self, size: int, length: int = 77) -> None:
        self.embed_dim = self.text_width = size
        self.context_length, self.weights_hash = length, "0" * 16
        self.tokenizer = ClipBPE(77)

    def embed_captions(self, captions):
        shape = (1, self.embed_dim), (1, self.context_length, self.embed_dim)
        return {"text_embed": torch.zeros(shape[0]), "text_hidden": torch.zeros(shape[1])}


def same_draws(seed: int = 5):
    """The same noise for both: as a function of a tensor, and as a generator."""
    ours, theirs = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=ours), theirs


@torch.no_grad()
def chain(estimate, noise, steps: int, draw, **scheduler):
    """diffusers' scheduler of Karlo's from noise to the end, its numbers in float64 as Karlo has them: in
    float32 the last of them, divided by, are off by a thousandth.
    """
    diffusers = pytest.importorskip("diffusers")
    made = diffusers.UnCLIPScheduler(**scheduler)
    kept = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    ratios = [max(after / before, 0.001) for before, after in itertools.pairwise(kept)]
    made.alphas = torch.tensor(ratios, dtype=torch.float64)
    made.betas, made.alphas_cumprod = 1 - made.alphas, made.alphas.cumprod(0)
    made.set_timesteps(steps)
    x = noise
    for i, t in enumerate(made.timesteps):
        before = made.timesteps[i + 1] if i + 1 < steps else None
        x = made.step(estimate(x, t, i), t, x, prev_timestep=before, generator=draw).prev_sample
    return x
