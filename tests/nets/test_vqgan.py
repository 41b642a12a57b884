"""VQGAN's autoencoder: the codebook against formulas and the library, sizes, the discriminator."""

import pytest
import torch

from dalle.errors import UserError
from dalle.nets.vqgan import VQGAN, PatchDiscriminator

SMALL = {
    "image_size": 16,
    "vocab_size": 12,
    "width": 8,
    "multipliers": [1, 2],
    "blocks": 1,
    "code_dim": 6,
    "patch": 2,
    "dead_below": 0.0,
}


BLUE_YELLOW = ([-0.9, -0.9, 0.5], [0.9, 0.8, -0.6])
GREEN_WHITE = ([-0.8, 0.2, -0.7], [1.0, 1.0, 1.0])


def make(**options) -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(**(SMALL | options))


def pictures(n: int = 4, size: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def seeded(**options) -> VQGAN:
    """After one batch, which gave the codebook its first codes."""
    net = make(**options).train()
    net(pictures(16))
    return net


class TestCodebook:
    def test_nearest_codes(self):
        net = seeded().eval()
        z = net.latents(pictures())
        table = net.codebook.codebook
        distance = (z.permute(0, 2, 3, 1)[..., None, :] - table).square().sum(-1)
        assert torch.equal(net.encode(pictures()), distance.argmin(-1).flatten(1))

    def test_codes_are_the_librarys(self):
        net = seeded().eval()
        _, codes, _ = net(pictures())
        assert torch.equal(net.encode(pictures()), codes)
        torch.testing.assert_close(net.decode(codes), net(pictures())[0].clamp(-1, 1))

    def test_the_commitment_weight_is_on_the_encoders_side(self):
        """beta |z - sg(e)|^2: a gradient for z, none for the codebook, which follows by its average."""
        net = seeded(commitment=0.25).train()
        z = net.latents(pictures()).detach().requires_grad_()
        before = net.codebook.codebook.clone()
        with torch.no_grad():
            codes = net.encode(pictures())
        _, found, loss = net.codebook(z)
        assert torch.equal(found.flatten(1), codes)
        e = before[codes].mT.unflatten(2, (4, 4))
        torch.testing.assert_close(loss.sum(), 0.25 * (z - e).square().mean())
        (grad,) = torch.autograd.grad(loss.sum(), z)
        torch.testing.assert_close(grad, 0.5 * (z - e) / z.numel())
        assert not any(p.requires_grad for p in net.codebook.parameters())

    def test_gradients_pass_straight(self):
        net = seeded().eval()
        z = net.latents(pictures()).detach().requires_grad_()
        quantized, _, _ = net.codebook.train()(z)
        weight = torch.randn_like(quantized)
        (grad,) = torch.autograd.grad((quantized * weight).sum(), z)
        torch.testing.assert_close(grad, weight)

    def test_follows_as_a_moving_average(self):
        """N <- d N + (1 - d) n and m <- d m + (1 - d) sum z; codes m / N, counts smoothed by 1e-5."""
        net = seeded(decay=0.9).train()
        book = net.codebook._codebook
        z, codes = net.latents(pictures()).detach(), net.encode(pictures())
        hot = torch.nn.functional.one_hot(codes.flatten(), 12).float()
        counts = 0.9 * book.cluster_size[0] + 0.1 * hot.sum(0)
        sums = 0.9 * book.embed_avg[0] + 0.1 * hot.T @ z.permute(0, 2, 3, 1).flatten(0, 2)
        net.codebook(z)
        smooth = (counts + 1e-5) / (counts.sum() + 12e-5) * counts.sum()
        torch.testing.assert_close(net.codebook.codebook, sums / smooth[:, None], rtol=1e-4, atol=1e-5)

    def test_dead_codes_are_drawn_anew(self):
        net = seeded(dead_below=0.5, decay=0.5)
        with torch.no_grad():
            net.codebook._codebook.embed[0, 3] = 1e3  # nothing is near it
            net.codebook._codebook.embed_avg[0, 3] = 1e3 * net.codebook._codebook.cluster_size[0, 3]
        for _ in range(12):
            net(pictures(16))
        assert net.codebook.codebook.abs().max() < 100
        kept = seeded(dead_below=0.0, decay=0.5)
        with torch.no_grad():
            kept.codebook._codebook.embed[0, 3] = 1e3
            kept.codebook._codebook.embed_avg[0, 3] = 1e3 * kept.codebook._codebook.cluster_size[0, 3]
        for _ in range(12):
            kept(pictures(16))
        assert kept.codebook.codebook.abs().max() > 100

    def test_stands_still_in_use(self):
        net = seeded().eval()
        before = net.codebook.codebook.clone()
        net(pictures())
        net.train().encode(pictures())
        assert torch.equal(net.codebook.codebook, before)


class TestFiniteScalars:
    """Mentzer et al. 2023: a code is the mixed-radix number of a few rounded ones."""

    LEVELS = (3, 4)

    def test_codes_and_pictures(self):
        net = make(levels=self.LEVELS).train()
        made, codes, commitment = net(pictures())
        assert commitment == 0
        assert codes.shape == (4, 16)
        assert 0 <= codes.min() <= codes.max() < 12
        assert torch.equal(net.encode(pictures()), codes)
        torch.testing.assert_close(net.decode(codes), made.clamp(-1, 1))

    def test_every_code_is_a_point_of_the_grid(self):
        table = make(levels=self.LEVELS).codebook.implicit_codebook
        assert table.shape == (12, 2)
        assert [len(column.unique()) for column in table.T] == list(self.LEVELS)
        assert len(table.unique(dim=0)) == 12

    def test_gradients_reach_the_encoder(self):
        net = make(levels=self.LEVELS).train()
        net(pictures())[0].square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.encoder.parameters())


@pytest.mark.parametrize("levels", [(3, 4), ((3,), (4,))])
def test_a_patchwise_code_is_of_its_own_patch_alone(levels):
    net = make(levels=levels, patchwise=16)
    image, other = pictures(2)[:1], pictures(2)[1:]
    image[:, :, 4:8, 8:12] = other[:, :, 4:8, 8:12]  # row 1, column 2 of a grid of 4
    before, same, mixed = net.latents(pictures(2)[:1]), net.latents(other), net.latents(image)
    torch.testing.assert_close(mixed[:, :, 1, 2], same[:, :, 1, 2])
    mixed[:, :, 1, 2] = before[:, :, 1, 2]
    torch.testing.assert_close(mixed, before)


PATTERNS = {"vocab_size": 4096, "levels": ((8, 8), (8, 8)), "patchwise": 16}


class TestPatterns:
    """Edges between two colours: what is a pattern's and what the colours'."""

    @staticmethod
    def edge(dark: list[float], light: list[float]) -> torch.Tensor:
        """(1, 3, 16, 16), from dark to light over the width of every patch of 4."""
        cover = torch.tensor([0.0, 0.3, 0.8, 1.0]).repeat(4)
        low, high = torch.tensor([dark, light])[..., None]
        return (low + cover * (high - low))[None, :, None].expand(-1, -1, 16, -1)

    def test_an_edge_has_one_pattern_in_all_colours(self):
        net = make(**PATTERNS)
        one, two = (net.latents(self.edge(*ends)) for ends in (BLUE_YELLOW, GREEN_WHITE))
        torch.testing.assert_close(one[:, :2], two[:, :2], rtol=1e-2, atol=1e-3)
        assert (one[:, 2:] - two[:, 2:]).abs().min() > 1e-4

    def test_patterns_in_the_same_colours_have_one_colour(self):
        net = make(**PATTERNS)
        edge = self.edge(*BLUE_YELLOW)
        one, two = net.latents(edge), net.latents(edge.mT)
        assert not torch.allclose(one[:, :2], two[:, :2])
        torch.testing.assert_close(one[:, 2:], two[:, 2:])

    def test_a_plain_patch_is_its_colour(self):
        net = make(**PATTERNS)
        plain = [net.latents(torch.full((1, 3, 16, 16), value)) for value in (-0.5, 0.7)]
        torch.testing.assert_close(plain[0][:, :2], plain[1][:, :2])

    @pytest.mark.parametrize(
        "wrong", [{"levels": ((8, 8), (8,), (8,))}, {"levels": ((8, 8, 8, 8), ())}, {"patchwise": None}]
    )
    def test_what_does_not_fit(self, wrong):
        with pytest.raises(UserError, match="two lists, of patterns and of colours, only with patchwise"):
            make(**PATTERNS | wrong)


@pytest.mark.parametrize(("multipliers", "patch", "grid"), [([1], 1, 16), ([1, 2], 2, 4), ([1, 1, 2], 1, 4)])
def test_grids(multipliers, patch, grid):
    net = make(multipliers=multipliers, patch=patch).train()
    image, codes, commitment = net(pictures())
    assert net.grid == grid
    assert codes.shape == (4, grid**2)
    assert image.shape == (4, 3, 16, 16)
    assert commitment.shape == ()
    net.eval()
    decoded = net.decode(net.encode(pictures()))
    assert decoded.shape == image.shape
    assert decoded.abs().max() <= 1


def test_codes_and_their_distances_are_fp32():
    net = seeded().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image, _, commitment = net(pictures())
    assert image.dtype == commitment.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 3}, "image_size=3 cannot be folded by patch 2 and then halved 1 times"),
        ({"multipliers": []}, "halved -1 times"),
        ({"levels": [4, 4]}, r"levels=\[4, 4\] make 16 codes, but vocab_size=12"),
        ({"levels": [2, 6]}, "each level is at least 3"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_a_picture_of_another_size():
    with pytest.raises(UserError, match="takes pictures of 16 px, not 32 x 32"):
        make().encode(pictures(size=32))


def test_discriminator():
    torch.manual_seed(0)
    net = PatchDiscriminator(width=32, layers=2)
    logits = net(pictures(size=32))
    assert logits.shape == (4, 6, 6)
    torch.testing.assert_close(net(pictures(size=32)[:1]), logits[:1])  # pictures do not see their neighbours
    assert net.parts[2].weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_logits_of_patches_are_fp32_under_autocast():
    net, image = PatchDiscriminator(8, 1), torch.randn(2, 3, 16, 16)
    seen: list[torch.Tensor] = []
    net.parts[-1].register_forward_hook(lambda layer, given, made: seen.extend((*given, made)))
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(image)
    assert seen[0].dtype == seen[1].dtype == logits.dtype == torch.float32
