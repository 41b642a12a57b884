"""The autoencoder of VQGAN as it was released (Esser et al. 2021, taming-transformers): for its weights.

What differs from `vqgan.VQGAN`: attention where feature maps are small and in the middle, a codebook that
moves by gradients, and the release's names. `gumbel` is its second kind, in which the encoder gives logits of
the codes, as DALL-E's dVAE does.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.nets.sizes import map_sides
from dalle.ranges import Depth, Multipliers, NonNegativeInt, Side, Vocabulary, Weight, Width

GROUPS = 32  # of all norms


def norm(channels: int) -> nn.GroupNorm:
    if channels % GROUPS:
        raise UserError(f"TamingVQGAN: widths are multiples of {GROUPS}, not {channels}.")
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(norm(conv(norm(x)))) with SiLU; a 1x1 convolution of x where channels change."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.norm1, self.norm2 = norm(n_in), norm(n_out)
        self.conv1, self.conv2 = nn.Conv2d(n_in, n_out, 3, padding=1), nn.Conv2d(n_out, n_out, 3, padding=1)
        if n_in != n_out:
            self.nin_shortcut = nn.Conv2d(n_in, n_out, 1)

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O H W"]:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """x + attention of all places over all, with one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


class Resample(nn.Module):
    """Half the size, padded at right and bottom alone, or twice the size, and a convolution."""

    def __init__(self, channels: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        if self.up:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def level(n_in: int, n_out: int, blocks: int, attention: bool, resample: str) -> nn.Module:
    """The blocks of one size, and what leads to the next."""
    made = nn.Module()
    made.block = nn.ModuleList(ResnetBlock(n_in if i == 0 else n_out, n_out) for i in range(blocks))
    made.attn = nn.ModuleList(AttnBlock(n_out) for _ in range(blocks if attention else 0))
    if resample:
        setattr(made, f"{resample}sample", Resample(n_out, up=resample == "up"))
    return made


def middle(channels: int) -> nn.Module:
    made = nn.Module()
    made.block_1, made.block_2 = ResnetBlock(channels, channels), ResnetBlock(channels, channels)
    made.attn_1 = AttnBlock(channels)
    return made


def run_level(x: Tensor, part: Any) -> Tensor:
    for i, block in enumerate(part.block):
        x = block(x)
        x = part.attn[i](x) if len(part.attn) else x
    return x


def run_middle(x: Tensor, part: Any) -> Tensor:
    return part.block_2(part.attn_1(part.block_1(x)))


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) -> (B, z_channels, h, w)."""

    def __init__(self, widths: Sequence[int], blocks: int, attention: Sequence[int], z_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        ins, last = [widths[0], *widths[:-1]], len(widths) - 1
        self.down = nn.ModuleList(
            level(n_in, n, blocks, i in attention, "down" if i < last else "")
            for i, (n_in, n) in enumerate(zip(ins, widths, strict=True))
        )
        self.mid = middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B Z h w"]:
        x = self.conv_in(image)
        part: Any
        for part in self.down:
            x = run_level(x, part)
            x = part.downsample(x) if hasattr(part, "downsample") else x
        return self.conv_out(F.silu(self.norm_out(run_middle(x, self.mid))))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> pictures (B, 3, H, W)."""

    def __init__(self, widths: Sequence[int], blocks: int, attention: Sequence[int], z_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1])
        ins = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            level(n_in, n, blocks + 1, i in attention, "up" if i else "")
            for i, (n_in, n) in enumerate(zip(ins, widths, strict=True))
        )
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B 3 H W"]:
        x = run_middle(self.conv_in(z), self.mid)
        part: Any
        for part in reversed(self.up):
            x = run_level(x, part)
            x = part.upsample(x) if hasattr(part, "upsample") else x
        return self.conv_out(F.silu(self.norm_out(x)))


class TamingVQGAN(nn.Module):
    """Pictures to codes and back; an `ImageTokenizerNet` and a `VQGANNet`.

    Args:
        image_size: side of the pictures.
        vocab_size: K, how many codes there are.
        width: channels of the first feature map; `multipliers` give those of all, each of half the side.
        blocks: residual blocks of each feature map of the encoder; the decoder has one more.
        attention: which feature maps attend, by number; the middle always does.
        z_channels: of what encoder and decoder share.
        code_dim: length of a code's vector.
        gumbel: codes are the largest of logits, not the nearest vectors.
        commitment: beta, of the release's loss of vectors; of `gumbel` the weight of the KL divergence.

    Raises:
        UserError: widths that are no multiples of 32, or pictures of another size.
    """

    def __init__(
        self,
        image_size: Side,
        vocab_size: Vocabulary,
        width: Width,
        multipliers: Multipliers,
        blocks: Depth,
        attention: Sequence[NonNegativeInt],
        z_channels: Width,
        code_dim: Width,
        gumbel: bool = False,
        commitment: Weight = 0.25,
    ):
        super().__init__()
        self.image_size, self.vocab_size, self.gumbel = image_size, vocab_size, gumbel
        self.grid = map_sides(image_size, 1, len(multipliers))[-1]
        self.commitment, self.code_dim = commitment, code_dim
        widths = [width * m for m in multipliers]
        self.encoder = Encoder(widths, blocks, attention, z_channels)
        self.decoder = Decoder(widths, blocks, attention, z_channels)
        self.quant_conv = nn.Conv2d(z_channels, code_dim, 1)
        self.post_quant_conv = nn.Conv2d(code_dim, z_channels, 1)
        self.quantize = nn.Module()
        table = nn.Embedding(vocab_size, code_dim)
        if gumbel:
            self.quantize.proj, self.quantize.embed = nn.Conv2d(z_channels, vocab_size, 1), table
        else:
            nn.init.uniform_(table.weight, -1 / vocab_size, 1 / vocab_size)
            self.quantize.embedding = table

    @property
    def conv_out(self) -> nn.Module:
        return self.decoder.conv_out

    @property
    def table(self) -> Tensor:
        """The codes' vectors (K, D)."""
        held: Any = self.quantize.embed if self.gumbel else self.quantize.embedding
        return held.weight

    def synchronise(self) -> None:
        """Nothing: the codebook moves by gradients."""

    def latents(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        height, width = image.shape[2:]
        if (height, width) != (self.image_size, self.image_size):
            raise UserError(f"this VQGAN takes pictures of {self.image_size} px, not {width} x {height}.")
        return self.quant_conv(self.encoder(image)).float()

    def draw(self, z: Float[Tensor, "B D h w"]) -> Float[Tensor, "B 3 H W"]:
        return self.decoder(self.post_quant_conv(z)).float()

    def nearest(self, z: Float[Tensor, "B D h w"]) -> Int64[Tensor, "B h w"]:
        """The code of every place."""
        if self.gumbel:
            proj: Any = self.quantize.proj
            return proj(z).argmax(dim=1)
        rows, table = z.permute(0, 2, 3, 1).flatten(1, 2), self.table.float()
        distances = table.square().sum(1) - 2 * rows @ table.T  # and |z|^2, the same for all codes
        return distances.argmin(dim=2).unflatten(1, tuple(z.shape[2:]))

    def forward(
        self, image: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B 3 H W"], Int64[Tensor, "B N"], Float[Tensor, ""]]:
        """The picture through its codes (gradients pass straight), the codes, and the loss of the vectors."""
        z = self.latents(image)
        if self.gumbel:
            proj: Any = self.quantize.proj
            logits = proj(z)
            chosen = F.one_hot(logits.argmax(1), self.vocab_size).permute(0, 3, 1, 2).to(logits.dtype)
            chosen = F.gumbel_softmax(logits, dim=1, hard=True) if self.training else chosen
            quantized = torch.einsum("bkhw,kd->bdhw", chosen, self.table)
            share = logits.softmax(1)
            pull = (share * (share * self.vocab_size + 1e-10).log()).sum(1).mean() * self.commitment
            return self.draw(quantized), chosen.argmax(1).flatten(1), pull
        codes = self.nearest(z)
        vectors = F.embedding(codes, self.table).permute(0, 3, 1, 2)
        pull = F.mse_loss(z, vectors.detach()) + self.commitment * F.mse_loss(vectors, z.detach())
        return self.draw(z + (vectors - z).detach()), codes.flatten(1), pull

    def encode(self, image: Float[Tensor, "B 3 H W"]) -> Int64[Tensor, "B N"]:
        """The codes of a picture, row by row."""
        with torch.autocast(image.device.type, enabled=False):
            return self.nearest(self.latents(image)).flatten(1)

    def decode(self, codes: Int64[Tensor, "B N"]) -> Float[Tensor, "B 3 H W"]:
        z = F.embedding(codes.unflatten(1, (self.grid, self.grid)), self.table)
        return self.draw(z.permute(0, 3, 1, 2)).clamp(-1, 1)
