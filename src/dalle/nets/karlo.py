"""The networks of Karlo (Lee et al. 2022, KakaoBrain's unCLIP), and the prior that Kandinsky 2 shares: for
their weights.

Names of weights are diffusers' (`PriorTransformer`, `UNet2DConditionModel` and `UnCLIPTextProjModel`,
`UNet2DModel`). What differs from the networks beside it: pads are masked, not learned; all projections have
biases; and without a caption these networks are told the empty one. What CLIP makes of that stays with the
weights: `empty_embed` and `empty_hidden`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.machine import precise
from dalle.nets.sizes import map_sides
from dalle.ranges import Depth, Dropout, Length, Multipliers, NonNegativeInt, PositiveInt, Side, Steps, Width

GROUPS = 32  # of all norms
EMPTY = 2  # tokens of the empty caption: start and end
SNAP = 1e-3  # of a level: what rounding of t moves it by


def time_features(t: Float[Tensor, "B"], width: int, steps: int) -> Float[Tensor, "B D"]:
    """Cosines and sines of the discrete level, 0 to steps - 1, that t = (level + 1) / steps means."""
    level = precise(t) * steps
    level = torch.where((level - level.round()).abs() < SNAP, level.round(), level) - 1
    # in this order: float32 turns another into another angle of the last levels
    exponents = -math.log(10_000) * torch.arange(width // 2, dtype=torch.float32, device=t.device)
    angles = level.float()[:, None] * torch.exp(exponents / (width // 2))
    return torch.cat((angles.cos(), angles.sin()), dim=1)


class TimeEmbedding(nn.Module):
    """Two layers with SiLU between."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(n_in, n_out), nn.Linear(n_out, n_out)

    def forward(self, x: Float[Tensor, "B I"]) -> Float[Tensor, "B O"]:
        return self.linear_2(F.silu(self.linear_1(x)))


class Caption(nn.Module):
    """What networks know of captions: also what CLIP makes of the empty one, which stands for none."""

    empty_embed: Tensor
    empty_hidden: Tensor

    def __init__(self, embed_dim: int, text_width: int, context_length: int):
        super().__init__()
        self.register_buffer("empty_embed", torch.zeros(embed_dim))
        self.register_buffer("empty_hidden", torch.zeros(context_length, text_width))

    def or_empty(
        self,
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        text_mask: Bool[Tensor, "B T"],
        keep_text: Bool[Tensor, "B"] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same, with the empty caption's where no caption is kept."""
        length = text_hidden.shape[1]
        if length != len(self.empty_hidden):
            raise ValueError(f"text of {length} tokens; this network reads {len(self.empty_hidden)}.")
        if keep_text is None:
            return text_embed, text_hidden, text_mask
        said = torch.arange(length, device=text_mask.device) < EMPTY
        return (
            torch.where(keep_text[:, None], text_embed, self.empty_embed.to(text_embed.dtype)),
            torch.where(keep_text[:, None, None], text_hidden, self.empty_hidden.to(text_hidden.dtype)),
            torch.where(keep_text[:, None], text_mask, said),
        )


def heads_of(x: Float[Tensor, "B N D"], head_dim: int) -> Float[Tensor, "B H N d"]:
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


# The prior


class SelfAttention(nn.Module):
    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Float[Tensor, "B N D"], mask: Bool[Tensor, "B 1 N N"]) -> Float[Tensor, "B N D"]:
        q, k, v = (heads_of(layer(x), self.head_dim) for layer in (self.to_q, self.to_k, self.to_v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class GELULayer(nn.Module):
    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.proj = nn.Linear(n_in, n_out)

    def forward(self, x: Float[Tensor, "B N I"]) -> Float[Tensor, "B N O"]:
        return F.gelu(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, width: int, dropout: float):
        super().__init__()
        layers = [GELULayer(width, 4 * width), nn.Dropout(dropout), nn.Linear(4 * width, width)]
        self.net = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return self.net(x)


class Layer(nn.Module):
    """Pre-norm attention and MLP; the names skip the norm of a cross-attention that is not there."""

    def __init__(self, width: int, head_dim: int, dropout: float):
        super().__init__()
        self.norm1, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn1, self.ff = SelfAttention(width, head_dim), FeedForward(width, dropout)

    def forward(self, x: Float[Tensor, "B N D"], mask: Bool[Tensor, "B 1 N N"]) -> Float[Tensor, "B N D"]:
        x = x + self.attn1(self.norm1(x), mask)
        return x + self.ff(self.norm3(x))


class PriorTransformer(Caption):
    """x_t (B, E), t (B,) and the text -> the prediction (B, E); a `PriorNet`.

    Sequence: text states | caption embedding | time | noised image embedding | learned query, where the
    answer is read; causal, and without the pads.

    Raises:
        UserError: the heads do not divide the width.
    """

    def __init__(
        self,
        embed_dim: Width,
        text_width: Width,
        context_length: Length,
        width: Width,
        depth: Depth,
        heads: PositiveInt,
        dropout: Dropout = 0.0,
        steps: Steps = 1000,
    ):
        super().__init__(embed_dim, text_width, context_length)
        if width % heads or width % 2:
            raise UserError(f"PriorTransformer: {heads} heads do not divide width {width}, or it is odd.")
        self.embed_dim, self.width, self.steps = embed_dim, width, steps
        self.time_embedding = TimeEmbedding(width, width)
        self.proj_in, self.embedding_proj = nn.Linear(embed_dim, width), nn.Linear(embed_dim, width)
        self.encoder_hidden_states_proj = nn.Linear(text_width, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(1, context_length + 4, width))
        self.prd_embedding = nn.Parameter(0.01 * torch.randn(1, 1, width))
        self.transformer_blocks = nn.ModuleList(Layer(width, width // heads, dropout) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = nn.Linear(width, embed_dim)

    def forward(
        self,
        x: Float[Tensor, "B E"],
        t: Float[Tensor, "B"],
        *,
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        text_mask: Bool[Tensor, "B T"],
        keep_text: Bool[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B E"]:
        text_embed, text_hidden, text_mask = self.or_empty(text_embed, text_hidden, text_mask, keep_text)
        time = self.time_embedding(time_features(t, self.width, self.steps).to(x.dtype))
        last = (self.embedding_proj(text_embed), time, self.proj_in(x))
        tokens = [self.encoder_hidden_states_proj(text_hidden), *(token[:, None] for token in last)]
        tokens.append(self.prd_embedding.expand(len(x), -1, -1).to(tokens[0].dtype))
        h = torch.cat([token.to(tokens[0].dtype) for token in tokens], dim=1)
        h = h + self.positional_embedding.to(h.dtype)
        real = F.pad(text_mask, (0, 4), value=True)
        mask = real[:, None, None] & real.new_ones(h.shape[1], h.shape[1]).tril()
        for layer in self.transformer_blocks:
            h = layer(h, mask)
        return self.proj_to_clip_embeddings(self.norm_out(h)[:, -1])


# The U-Nets


class ResnetBlock(nn.Module):
    """norm, SiLU, (resample,) conv; time; norm, SiLU, dropout, conv; plus the input.

    The time is added before the second norm, or with `scale_shift` gives its scale and shift.
    """

    def __init__(
        self, n_in: int, n_out: int, time: int, scale_shift: bool, dropout: float, resample: str = ""
    ):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, n_in), nn.GroupNorm(GROUPS, n_out)
        self.conv1, self.conv2 = nn.Conv2d(n_in, n_out, 3, padding=1), nn.Conv2d(n_out, n_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, (1 + scale_shift) * n_out)
        self.dropout = nn.Dropout(dropout)
        self.conv_shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else None

    def resize(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x

    def forward(self, x: Float[Tensor, "B C H W"], time: Float[Tensor, "B T"]) -> Float[Tensor, "B D h w"]:
        h = self.conv1(self.resize(F.silu(self.norm1(x))))
        told = self.time_emb_proj(F.silu(time))[:, :, None, None].to(h.dtype)
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + told)
        x = self.resize(x)
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return x + self.conv2(self.dropout(F.silu(h)))


class ContextAttention(nn.Module):
    """x + attention of the pixels over context and pixels."""

    def __init__(self, channels: int, head_dim: int, context: int):
        super().__init__()
        if channels % head_dim:
            raise UserError(f"KarloUNet: heads of {head_dim} do not divide {channels} channels.")
        self.head_dim = head_dim
        self.group_norm = nn.GroupNorm(GROUPS, channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.add_k_proj, self.add_v_proj = (nn.Linear(context, channels) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(
        self, x: Float[Tensor, "B C H W"], context: Float[Tensor, "B M K"], real: Bool[Tensor, "B M"]
    ) -> Float[Tensor, "B C H W"]:
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        k = torch.cat((self.add_k_proj(context), self.to_k(h)), dim=1)
        v = torch.cat((self.add_v_proj(context), self.to_v(h)), dim=1)
        q, k, v = (heads_of(part, self.head_dim) for part in (self.to_q(h), k, v))
        mask = F.pad(real, (0, h.shape[1]), value=True)[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return x + self.to_out[0](out).transpose(1, 2).unflatten(2, x.shape[2:])


class Level(nn.Module):
    """Residual blocks of one size, attention behind each where there is any, and what leads to the next."""

    def __init__(
        self, blocks: list[nn.Module], attentions: list[nn.Module], way: str, next: nn.Module | None
    ):
        super().__init__()
        self.resnets = nn.ModuleList(blocks)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        if next is not None:
            setattr(self, f"{way}samplers", nn.ModuleList([next]))

    def part(self, name: str, i: int = 0) -> Any:
        parts: Any = getattr(self, name, None)
        return None if parts is None else parts[i]


class KarloUNet(nn.Module):
    """(B, C, H, W) and the level's time -> (B, O, H, W), of the widths of each level.

    attention: which levels attend to the context, by number; None: none of them, nor the middle.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        widths: Sequence[int],
        blocks: int,
        scale_shift: bool,
        dropout: float,
        steps: int,
        attention: Sequence[int] | None = None,
        head_dim: int = 64,
        context: int = 1,
    ):
        super().__init__()
        if any(width % GROUPS for width in widths):
            raise UserError(f"KarloUNet: widths are multiples of {GROUPS}, not {list(widths)}.")
        self.steps, self.features = steps, widths[0]
        time = 4 * widths[0]

        def block(n_in: int, n_out: int, resample: str = "") -> nn.Module:
            return ResnetBlock(n_in, n_out, time, scale_shift, dropout, resample)

        def attend(width: int, many: int) -> list[nn.Module]:
            return [ContextAttention(width, head_dim, context) for _ in range(many)]

        self.time_embedding = TimeEmbedding(widths[0], time)
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        skips, last = [widths[0]], len(widths) - 1
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            made = [block(skips[-1] if j == 0 else width, width) for j in range(blocks)]
            skips += [width] * (blocks + (i < last))
            attending = attend(width, blocks if i in (attention or ()) else 0)
            self.down_blocks.append(
                Level(made, attending, "down", block(width, width, "down") if i < last else None)
            )
        c = widths[-1]
        self.mid_block = Level([block(c, c), block(c, c)], attend(c, 0 if attention is None else 1), "", None)
        for i, width in reversed(list(enumerate(widths))):
            made = []
            for _ in range(blocks + 1):
                made.append(block(c + skips.pop(), width))
                c = width
            attending = attend(width, blocks + 1 if i in (attention or ()) else 0)
            self.up_blocks.append(Level(made, attending, "up", block(width, width, "up") if i else None))
        self.conv_norm_out = nn.GroupNorm(GROUPS, c)
        self.conv_out = nn.Conv2d(c, out_channels, 3, padding=1)

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        added: Float[Tensor, "B T"] | None = None,
        context: Float[Tensor, "B M K"] | None = None,
        real: Bool[Tensor, "B M"] | None = None,
    ) -> Float[Tensor, "B O H W"]:
        """`added` is added to the time's embedding; `real` says which tokens of the context are."""
        time = self.time_embedding(time_features(t, self.features, self.steps).to(x.dtype))
        time = time if added is None else time + added

        def run(level: Any, i: int, h: Tensor) -> Tensor:
            h = level.resnets[i](h, time)
            attention = level.part("attentions", i)
            return h if attention is None else attention(h, context, real)

        h = self.conv_in(x)
        skips = [h]
        downs: Any = self.down_blocks
        ups: Any = self.up_blocks
        for level in downs:
            for i in range(len(level.resnets)):
                h = run(level, i, h)
                skips.append(h)
            if (smaller := level.part("downsamplers")) is not None:
                h = smaller(h, time)
                skips.append(h)
        h = run(self.mid_block, 0, h)
        h = self.mid_block.resnets[1](h, time)
        for level in ups:
            for i in range(len(level.resnets)):
                h = run(level, i, torch.cat((h, skips.pop()), dim=1))
            if (larger := level.part("upsamplers")) is not None:
                h = larger(h, time)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class TextProjection(nn.Module):
    """Image embedding, caption and text states -> what is added to the time, and the context: the image
    embedding as `tokens` tokens, then the text.
    """

    def __init__(self, embed_dim: int, text_width: int, time: int, context: int, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.learned_classifier_free_guidance_embeddings = nn.Parameter(torch.zeros(embed_dim))
        self.embedding_proj = nn.Linear(embed_dim, time)
        self.clip_image_embeddings_project_to_time_embeddings = nn.Linear(embed_dim, time)
        self.clip_extra_context_tokens_proj = nn.Linear(embed_dim, tokens * context)
        self.encoder_hidden_states_proj = nn.Linear(text_width, context)
        self.text_encoder_hidden_states_norm = nn.LayerNorm(context)

    def forward(
        self,
        image_embed: Float[Tensor, "B E"],
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        keep_image: Bool[Tensor, "B"] | None,
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B M K"]]:
        if keep_image is not None:
            null = self.learned_classifier_free_guidance_embeddings.to(image_embed.dtype)
            image_embed = torch.where(keep_image[:, None], image_embed, null)
        added = self.embedding_proj(text_embed)
        added = added + self.clip_image_embeddings_project_to_time_embeddings(image_embed)
        # the number of the token is the axis that runs fastest
        image = self.clip_extra_context_tokens_proj(image_embed).unflatten(1, (-1, self.tokens)).mT
        text = self.text_encoder_hidden_states_norm(self.encoder_hidden_states_proj(text_hidden))
        return added, torch.cat((image.to(text.dtype), text), dim=1)


class KarloDecoder(Caption):
    """x_t, t and conditions -> noise and variance (B, 6, image_size, image_size); a `DecoderNet`.

    Args:
        width: channels of the first level; `multipliers` give those of all, each of half the side.
        blocks: residual blocks of each level on the way down; one more on the way up.
        attention: which levels attend, by number; the middle always does.
        context: width of the context's tokens. image_tokens: how many of them the image embedding makes.
        steps: of the noise schedule.

    Raises:
        UserError: widths that are no multiples of 32, or of the heads'.
    """

    def __init__(
        self,
        image_size: Side,
        embed_dim: Width,
        text_width: Width,
        context_length: Length,
        width: Width,
        multipliers: Multipliers,
        blocks: Depth,
        attention: Sequence[NonNegativeInt],
        context: Width,
        channels: PositiveInt = 3,
        head_dim: Width = 64,
        image_tokens: Length = 4,
        dropout: Dropout = 0.0,
        scale_shift: bool = True,
        steps: Steps = 1000,
    ):
        super().__init__(embed_dim, text_width, context_length)
        self.image_size, self.channels, self.embed_dim = image_size, channels, embed_dim
        map_sides(image_size, 1, len(multipliers))
        widths = [width * m for m in multipliers]
        sizes = (channels, 2 * channels, widths, blocks, scale_shift, dropout, steps)
        self.decoder = KarloUNet(*sizes, attention, head_dim, context)
        self.text_proj = TextProjection(embed_dim, text_width, 4 * width, context, image_tokens)

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        *,
        image_embed: Float[Tensor, "B E"],
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        text_mask: Bool[Tensor, "B T"],
        keep_image: Bool[Tensor, "B"] | None = None,
        keep_text: Bool[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B O H W"]:
        text_embed, text_hidden, text_mask = self.or_empty(text_embed, text_hidden, text_mask, keep_text)
        added, context = self.text_proj(image_embed, text_embed, text_hidden, keep_image)
        real = F.pad(text_mask, (self.text_proj.tokens, 0), value=True)
        return self.decoder(x, t, added, context, real)


class GlideDecoder(Caption):
    """GLIDE's base model (Nichol et al. 2021): x_t, t and states of a caption -> noise and variance; an
    `InpaintingNet`. It knows no image embeddings.

    Args:
        width, multipliers, blocks, attention, head_dim, steps: as of `KarloDecoder`.
        text_width: of the states, whose last one is added to the time.
        inpaint: whether it is told what is known of pictures.

    Raises:
        UserError: widths that are no multiples of 32, or of the heads'.
    """

    def __init__(
        self,
        image_size: Side,
        text_width: Width,
        context_length: Length,
        width: Width,
        multipliers: Multipliers,
        blocks: Depth,
        attention: Sequence[NonNegativeInt],
        inpaint: bool = False,
        channels: PositiveInt = 3,
        head_dim: Width = 64,
        dropout: Dropout = 0.0,
        scale_shift: bool = True,
        steps: Steps = 1000,
    ):
        super().__init__(text_width, text_width, context_length)
        self.image_size, self.channels, self.embed_dim = image_size, channels, text_width
        self.inpaint = inpaint
        map_sides(image_size, 1, len(multipliers))
        seen = 2 * channels + 1 if inpaint else channels
        widths = [width * m for m in multipliers]
        sizes = (seen, 2 * channels, widths, blocks, scale_shift, dropout, steps)
        self.decoder = KarloUNet(*sizes, attention, head_dim, text_width)
        self.transformer_proj = nn.Linear(text_width, 4 * width)

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        *,
        image_embed: Float[Tensor, "B E"],
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        text_mask: Bool[Tensor, "B T"],
        keep_image: Bool[Tensor, "B"] | None = None,
        keep_text: Bool[Tensor, "B"] | None = None,
        known: Float[Tensor, "B K H W"] | None = None,
    ) -> Float[Tensor, "B O H W"]:
        text_embed, text_hidden, _ = self.or_empty(text_embed, text_hidden, text_mask, keep_text)
        if self.inpaint:
            nothing = x.new_zeros(len(x), self.channels + 1, *x.shape[2:])
            x = torch.cat((x, nothing if known is None else known.to(x.dtype)), dim=1)
        real = torch.ones_like(text_mask)  # pads are learned, and attended to
        return self.decoder(x, t, self.transformer_proj(text_embed), text_hidden, real)


class KarloUpsampler(nn.Module):
    """x_t, t and the small picture -> noise (B, 3, H, W); an `UpsamplerNet`.

    Two U-Nets without attention: `super_res_first` for all levels of noise but the last, for which
    `super_res_last` was trained on, against a discriminator. `level`, of noise in the small picture, is
    nothing that they are told.
    """

    def __init__(
        self,
        image_size: Side,
        factor: Side,
        width: Width,
        multipliers: Multipliers,
        blocks: Depth,
        channels: PositiveInt = 3,
        dropout: Dropout = 0.0,
        scale_shift: bool = False,
        steps: Steps = 1000,
    ):
        super().__init__()
        if image_size % factor:
            raise UserError(f"factor={factor} does not divide the side of {image_size} pixels.")
        self.image_size, self.factor, self.channels, self.steps = image_size, factor, channels, steps
        self.whole = 1 << len(multipliers) - 1
        widths = [width * m for m in multipliers]
        sizes = (2 * channels, channels, widths, blocks, scale_shift, dropout, steps)
        self.super_res_first, self.super_res_last = KarloUNet(*sizes), KarloUNet(*sizes)

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        *,
        low: Float[Tensor, "B C h w"],
        level: Float[Tensor, "B"],
    ) -> Float[Tensor, "B C H W"]:
        height, width = x.shape[-2:]
        base = F.interpolate(low.float(), (height, width), mode="bicubic", antialias=True).to(x.dtype)
        more = -height % self.whole, -width % self.whole
        both = torch.cat((x, base), dim=1)
        both = F.pad(both, (0, more[1], 0, more[0]), mode="replicate") if any(more) else both
        last = t * self.steps < 1 + SNAP
        number = int(last.sum())  # the one question to the device: only `t` says which network is meant
        if number in (0, len(t)):
            return (self.super_res_last if number else self.super_res_first)(both, t)[..., :height, :width]
        out = torch.empty_like(both[:, : self.channels])
        for net, rows in ((self.super_res_first, ~last), (self.super_res_last, last)):
            out[rows] = net(both[rows], t[rows]).to(out.dtype)
        return out[..., :height, :width]
