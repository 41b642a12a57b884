"""Public networks with random weights, small, of the packages in which they are: what imports are held to."""

import pytest
import torch
from torch import nn

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
