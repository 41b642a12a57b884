"""The autoencoder of VQGAN (Esser et al. 2021, sec. 3.1) and its discriminator.

Residual blocks with group norms; the codebook is VQ-VAE's moving average of the encoder's outputs (van den
Oord et al. 2017, App. A.1), and codes that died are drawn anew from them. Or there is none: finite scalar
quantization (Mentzer et al. 2023) rounds a few numbers, and no code can die. What differs from the release:
no attention; a code may be made of its own patch alone; and the discriminator has group norms for batch
norms, so that pictures do not see their neighbours and ranks need not agree.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, distributed, nn
from vector_quantize_pytorch import FSQ, VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import batched_sample_vectors

from dalle.errors import UserError
from dalle.nets.blocks import GroupNorm, grouped
from dalle.nets.sizes import cut, map_sides, multipliers_for, padded, patch_for
from dalle.ranges import Decay, Depth, Levels, Multipliers, NonNegative, Side, Vocabulary, Weight, Width


class Block(nn.Module):
    """id(x) + conv(norm(conv(norm(x)))) with SiLU; id is a 1x1 convolution where channels change."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.norm1, self.norm2 = GroupNorm(n_in), GroupNorm(n_out)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.skip = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O H W"]:
        return self.skip(x) + self.conv2(self.norm2(self.conv1(self.norm1(x))))


class PatchMLP(nn.Module):
    """A residual MLP for each patch by itself."""

    def __init__(self, n_in: int, width: int, n_out: int, blocks: int):
        super().__init__()
        self.proj_in = nn.Linear(n_in, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
            )
            for _ in range(blocks)
        )
        self.proj_out = nn.Linear(width, n_out)

    def forward(self, x: Float[Tensor, "B I h w"]) -> Float[Tensor, "B O h w"]:
        x = self.proj_in(x.permute(0, 2, 3, 1))
        for block in self.blocks:
            x = x + block(x)
        return self.proj_out(x).permute(0, 3, 1, 2)


class PatchEncoder(nn.Module):
    """An MLP on patches that know nothing of each other: equal patches have equal codes.

    Convolutions hide much of a picture's detail in the codes of plain background beside it; those are then
    as hard to predict for a transformer as the rest. What a patch does not say the decoder sees around it.
    """

    def __init__(self, patch: int, width: int, code_dim: int):
        super().__init__()
        self.fold = nn.PixelUnshuffle(patch)
        self.mlp = PatchMLP(3 * patch**2, width, code_dim, blocks=2)

    def forward(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        return self.mlp(self.fold(image))


class PatternEncoder(nn.Module):
    """As `PatchEncoder`, but some numbers say how a patch is laid out and the others in which colours.

    As in block truncation coding (Delp and Mitchell 1979): the pattern is the patch in grays, its mean taken
    off and its contrast made one; the colours are those of its darkest and its lightest pixel. So an edge has
    the same pattern in all colours, and who predicts codes learns it once instead of once for each of them.
    """

    LUMA = (0.299, 0.587, 0.114)  # BT.601

    def __init__(self, patch: int, width: int, patterns: int, colours: int):
        super().__init__()
        self.fold = nn.PixelUnshuffle(patch)
        self.pattern = PatchMLP(patch**2, width, patterns, blocks=2)
        self.colours = PatchMLP(6, width, colours, blocks=2)

    def forward(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        pixels = self.fold(image).unflatten(1, (3, -1))  # (B, 3, P, h, w)
        gray = sum(part * pixels[:, i] for i, part in enumerate(self.LUMA))
        assert isinstance(gray, Tensor)
        deviation = gray - gray.mean(1, keepdim=True)
        contrast = (deviation.square().mean(1, keepdim=True) + 1e-4).sqrt()  # of a plain patch 0.01, not 0
        ends = torch.stack((gray.argmin(1), gray.argmax(1)), dim=1)[:, None].expand(-1, 3, -1, -1, -1)
        colours = pixels.gather(2, ends).flatten(1, 2)
        return torch.cat((self.pattern(deviation / contrast), self.colours(colours)), dim=1)


class VQGAN(nn.Module):
    """Pictures to codes and back.

    Args:
        image_size: side of the pictures.
        vocab_size: K, how many codes there are.
        width: channels of the first feature map; `multipliers` give those of all, each of half the side
            before, and the last is that of the codes.
        blocks: residual blocks of each feature map.
        code_dim: length of a code's vector.
        patch: fold patch x patch pixels into channels first; 1 leaves them.
        commitment: weight of the pull of the encoder's outputs to their codes.
        decay: of the moving average that the codebook is.
        dead_below: codes whose average use in a batch falls below are drawn anew; 0: never.
        levels: of finite scalar quantization, whose product is `vocab_size`; the four before are of a
            codebook, so `code_dim` is then only what the rounded numbers are projected from and to. In two
            lists: of the numbers for a patch's pattern and of those for its colours (`PatternEncoder`).
        patchwise: width of a `PatchEncoder` in place of the convolutions on the way to the codes, and of an
            MLP that reads each code before the decoder.

    Raises:
        UserError: levels of another vocabulary, or pictures of another size.
    """

    def __init__(
        self,
        image_size: Side,
        vocab_size: Vocabulary,
        width: Width,
        multipliers: Multipliers,
        blocks: Depth,
        code_dim: Width,
        patch: Side,
        commitment: Weight = 0.25,
        decay: Decay = 0.99,
        dead_below: NonNegative = 1.0,
        levels: Levels | None = None,
        patchwise: Width | None = None,
    ):
        super().__init__()
        self.grid = map_sides(image_size, patch, len(multipliers))[-1]
        factor = patch << len(multipliers) - 1
        self.image_size, self.vocab_size = image_size, vocab_size
        self.patch, self.factor, self.levels = patch, factor, levels
        widths = [width * m for m in multipliers]
        pixels = 3 * patch**2

        groups = grouped(levels or ())
        numbers = [n for group in groups for n in group]
        if levels is not None and (min(numbers, default=0) < 3 or math.prod(numbers) != vocab_size):
            raise UserError(
                f"levels={levels} make {math.prod(numbers)} codes, but vocab_size={vocab_size}; "
                "each level is at least 3 and their product the vocabulary."
            )
        if len(groups) > 1 and (patchwise is None or len(groups) > 2 or not all(groups)):
            raise UserError(f"levels={levels}: two lists, of patterns and of colours, only with patchwise.")
        down: list[nn.Module] = [nn.PixelUnshuffle(patch), nn.Conv2d(pixels, widths[0], 3, padding=1)]
        for level, n in enumerate(widths):
            if level:
                down.append(nn.Conv2d(widths[level - 1], n, 3, stride=2, padding=1))
            down += [Block(n, n) for _ in range(blocks)]
        down += [GroupNorm(widths[-1]), nn.Conv2d(widths[-1], code_dim, 1)]
        if patchwise is None:
            self.encoder: nn.Module = nn.Sequential(*down)
        elif len(groups) == 1:
            self.encoder = PatchEncoder(factor, patchwise, code_dim)
        else:
            code_dim = len(numbers)  # each is made by its own part of the encoder
            self.encoder = PatternEncoder(factor, patchwise, *map(len, groups))

        if levels is None:
            self.codebook: Any = VectorQuantize(
                dim=code_dim,
                codebook_size=vocab_size,
                decay=decay,
                commitment_weight=commitment,
                threshold_ema_dead_code=dead_below,  # pyright: ignore[reportArgumentType]  # a mean count need not be whole
                kmeans_init=True,
                rotation_trick=False,
                accept_image_fmap=True,
            )
        else:
            with torch.device("cpu"):  # it reads its own tensors, which a network without memory has not
                self.codebook = FSQ(numbers, dim=code_dim)

        up: list[nn.Module] = []
        if patchwise is not None:
            up.append(PatchMLP(code_dim, patchwise, widths[-1], blocks=1))
        up.append(nn.Conv2d(code_dim if patchwise is None else widths[-1], widths[-1], 3, padding=1))
        for level, n in reversed(list(enumerate(widths))):
            up += [Block(n, n) for _ in range(blocks)]
            if level:
                up += [nn.Upsample(scale_factor=2.0), nn.Conv2d(n, widths[level - 1], 3, padding=1)]
        self.decoder = nn.Sequential(*up, GroupNorm(widths[0]))
        self.conv_out = nn.Conv2d(widths[0], pixels, 3, padding=1)

    @staticmethod
    def suited(image_size: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """What `auto` is for pictures of this size, beside the settings that are `given`."""
        factor = patch_for(image_size, most=20, least=4)
        halvings = len(given.get("multipliers") or ()) - 1
        patch = given.get("patch") or (factor >> halvings if halvings >= 0 else min(factor // 2, 4))
        levels = max(1, (factor // max(patch, 1)).bit_length())
        made = math.prod(n for group in grouped(given.get("levels") or ()) for n in group)
        return {
            "patch": patch,
            "multipliers": multipliers_for(levels),
            "vocab_size": made
            if made > 1
            else 256
            if image_size <= 32
            else 512
            if image_size <= 64
            else 1024,
        }

    def synchronise(self) -> None:
        """Has the codebooks of all ranks start and move alike, by what all of them see. For when there is a
        process group, of which the library wants to know too early.
        """
        if isinstance(self.codebook, VectorQuantize):
            book: Any = self.codebook._codebook
            book.sample_fn = book.replace_sample_fn = sample_of_ranks
            book.all_reduce_fn = book.kmeans_all_reduce_fn = distributed.all_reduce

    def latents(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        """What is looked up in the codebook."""
        height, width = image.shape[2:]
        if (height, width) != (self.image_size, self.image_size):
            raise UserError(f"this VQGAN takes pictures of {self.image_size} px, not {width} x {height}.")
        image = padded(image, self.factor).contiguous(memory_format=torch.channels_last)
        return self.encoder(image).float()

    def draw(self, z: Float[Tensor, "B D h w"]) -> Float[Tensor, "B 3 H W"]:
        image = F.pixel_shuffle(self.conv_out(self.decoder(z)).float(), self.patch)
        return cut(image, self.image_size)

    def forward(
        self, image: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B 3 H W"], Int64[Tensor, "B N"], Float[Tensor, ""]]:
        """The picture through its codes (gradients pass straight), the codes, and the commitment loss.

        In training the codebook moves.
        """
        z = self.latents(image)
        with torch.autocast(image.device.type, enabled=False):
            found: Any = self.learned(z) if self.levels is None else self.codebook(z)
        quantized, codes, *commitment = found
        pull = commitment[0].sum() if commitment else z.new_zeros(())
        return self.draw(quantized), codes.long().flatten(1), pull

    @torch.compiler.disable()
    def learned(self, z: Float[Tensor, "B D h w"]) -> Any:
        """A learned codebook asks for numbers, which would break a compiled network into many graphs, and
        into others once it has begun.
        """
        return self.codebook(z)

    def encode(self, image: Float[Tensor, "B 3 H W"]) -> Int64[Tensor, "B N"]:
        """The nearest code of every place, row by row; the codebook stays as it is."""
        z = self.latents(image)
        with torch.autocast(image.device.type, enabled=False):
            if isinstance(self.codebook, FSQ):
                return self.codebook(z)[1].long().flatten(1)
            z, table = z.flatten(2).mT, self.codebook.codebook.expand(len(z), -1, -1)
            return torch.cdist(z, table).argmin(dim=2)

    def decode(self, codes: Int64[Tensor, "B N"]) -> Float[Tensor, "B 3 H W"]:
        codes = codes.unflatten(1, (self.grid, self.grid))
        if isinstance(self.codebook, FSQ):
            return self.draw(self.codebook.indices_to_codes(codes)).clamp(-1, 1)
        z = F.embedding(codes, self.codebook.codebook)
        return self.draw(z.permute(0, 3, 1, 2)).clamp(-1, 1)


def sample_of_ranks(vectors: Float[Tensor, "1 N D"], count: int) -> Float[Tensor, "1 K D"]:
    """Some of the vectors of all ranks, the same on each."""
    gathered = [torch.empty_like(vectors) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, vectors.contiguous())
    chosen = batched_sample_vectors(torch.cat(gathered, dim=1), count)
    distributed.broadcast(chosen, src=0)
    return chosen


class PatchDiscriminator(nn.Module):
    """Says of every patch whether it is true (Isola et al. 2017): 4x4 convolutions, `layers` halving ones."""

    def __init__(self, width: Width, layers: Depth):
        super().__init__()
        self.smallest = 3 << layers  # px: two kernels of 4 follow the halvings
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        n = width
        for layer in range(1, layers + 1):
            last, wider = layer == layers, width << min(layer, 3)
            parts.append(nn.Conv2d(n, wider, 4, stride=1 if last else 2, padding=1, bias=False))
            parts += [GroupNorm(wider, silu=False), nn.LeakyReLU(0.2)]
            n = wider
        self.parts = nn.Sequential(*parts, nn.Conv2d(n, 1, 4, padding=1))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0.0, 0.02)

    def forward(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B h w"]:
        *parts, last = self.parts
        x = nn.Sequential(*parts)(image.contiguous(memory_format=torch.channels_last))
        with torch.autocast(x.device.type, enabled=False):  # logits are fp32
            return last(x.to(next(last.parameters()).dtype))[:, 0].float()
