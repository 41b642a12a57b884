"""The discrete VAE: the released sizes and names, the pixel map, codes soft and hard."""

from typing import Any

import pytest
import torch

from dalle.errors import UserError
from dalle.nets.dvae import DVAE

SMALL = {"image_size": 16, "vocab_size": 12, "factor": 4, "width": 8, "code_dim": 8, "groups": 2, "blocks": 1}
RELEASED: dict[str, Any] = {"patch": 1, "gain": None, "logit_gain": None}


def make(**options) -> DVAE:
    torch.manual_seed(0)
    return DVAE(**(SMALL | RELEASED | options))


def pictures(n: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


class TestReleased:
    @pytest.fixture(scope="class")
    def net(self) -> DVAE:
        with torch.device("meta"):
            return DVAE(256, 8192, factor=8, width=256, code_dim=128, groups=4, blocks=2, **RELEASED)

    def test_parameters(self, net):
        assert sum(p.numel() for p in net.encoder.parameters()) == 53_786_240
        assert sum(p.numel() for p in net.decoder.parameters()) == 43_829_766
        assert net.grid == 32

    def test_names_and_shapes(self, net):
        """Those of the authors' encoder.pkl and decoder.pkl."""
        encoder = {k: tuple(v.shape) for k, v in net.encoder.state_dict().items()}
        decoder = {k: tuple(v.shape) for k, v in net.decoder.state_dict().items()}
        assert encoder["blocks.input.w"] == (256, 3, 7, 7)
        assert encoder["blocks.group_2.block_1.id_path.w"] == (512, 256, 1, 1)
        assert encoder["blocks.group_4.block_2.res_path.conv_3.w"] == (512, 512, 3, 3)
        assert encoder["blocks.group_4.block_2.res_path.conv_4.w"] == (2048, 512, 1, 1)
        assert encoder["blocks.output.conv.b"] == (8192,)
        assert decoder["blocks.input.w"] == (128, 8192, 1, 1)
        assert decoder["blocks.group_1.block_1.res_path.conv_1.w"] == (512, 128, 1, 1)
        assert decoder["blocks.group_1.block_1.res_path.conv_4.w"] == (2048, 512, 3, 3)
        assert decoder["blocks.output.conv.w"] == (6, 256, 1, 1)
        assert "blocks.group_1.block_2.id_path.w" not in encoder | decoder
        assert len(encoder) == 2 * (1 + 4 * 8 + 3 + 1)  # weights and biases; three groups change their width
        assert len(decoder) == 2 * (1 + 4 * 8 + 4 + 1)

    def test_gain_and_pooling(self, net):
        assert net.encoder.blocks.group_1.block_1.gain == 1 / 64
        assert [hasattr(net.encoder.blocks, f"group_{g}") for g in (1, 4, 5)] == [True, True, False]
        assert [hasattr(group, "pool") for group in list(net.encoder.blocks)[1:5]] == [True] * 3 + [False]
        assert [hasattr(g, "upsample") for g in list(net.decoder.blocks)[1:5]] == [True] * 3 + [False]


def test_initialisation():
    net = make(width=64, code_dim=64)
    kernel = net.encoder.blocks.group_1.block_1.res_path.conv_1.w
    assert kernel.std().item() == pytest.approx((64 * 9) ** -0.5, rel=0.05)
    assert all((p == 0).all() for name, p in net.named_parameters() if name.endswith(".b"))


def test_pixel_map():
    """0, 128 and 255 go where the paper's map sends them, and come back."""
    image = torch.tensor([0.0, 128, 255]).div(127.5).sub(1).expand(1, 3, 2, 3)
    y = DVAE.map_pixels(image)
    torch.testing.assert_close(y[0, 0, 0], torch.tensor([0.1, 0.5015686274509804, 0.9]))
    torch.testing.assert_close(DVAE.unmap_pixels(y), image)
    assert DVAE.unmap_pixels(torch.tensor([[0.01, 0.99]]).expand(1, 3, 1, 2))[0, 0, 0].tolist() == [-1, 1]


@pytest.mark.parametrize(("factor", "patch", "groups"), [(4, 1, 2), (4, 2, 2), (2, 1, 3), (4, 4, 1)])
def test_grids(factor, patch, groups):
    net = make(factor=factor, patch=patch, groups=groups)
    codes = net.encode(pictures())
    assert net.grid == 16 // factor
    assert codes.shape == (3, net.grid**2)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < 12
    image = net.decode(codes)
    assert image.shape == (3, 3, 16, 16)
    assert -1 <= image.min() <= image.max() <= 1


def test_codes_are_in_raster_order():
    net = make()
    logits = net.logits(pictures())
    codes = net.encode(pictures())
    assert codes[1, 1 * 4 + 2] == logits[1, :, 1, 2].argmax()


def test_hard_codes_draw_what_their_one_hot_maps_do():
    net = make(patch=2)
    codes = net.encode(pictures())
    hot = torch.nn.functional.one_hot(codes, 12).float().mT.unflatten(2, (4, 4))
    torch.testing.assert_close(torch.cat(net.likelihood(codes), 1), net.decoder(hot))
    torch.testing.assert_close(net.decode(codes), net.unmap_pixels(net.decoder(hot)[:, :3].sigmoid()))


def test_soft_codes_are_a_softmax_of_logits_with_gumbel_noise():
    net, image = make(), pictures()
    torch.manual_seed(5)
    (mean, ln_b), logits = net(image, torch.tensor(0.5))
    torch.manual_seed(5)
    uniform = torch.rand_like(logits)
    y = torch.softmax((logits - (-uniform.log()).log()) / 0.5, dim=1)
    torch.testing.assert_close(torch.cat((mean, ln_b), dim=1), net.decoder(y))


def test_soft_codes_become_hard_ones_at_low_temperature():
    """Drawn with probabilities softmax(logits), whatever the temperature (Gumbel-max)."""
    net = make(vocab_size=4)
    counts = torch.zeros(4)
    seen = []
    net.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = pictures(1)
    for _ in range(500):
        _, logits = net(image, torch.tensor(0.01))
        counts += torch.nn.functional.one_hot(seen[-1].argmax(1), 4).sum((0, 1, 2))
    assert seen[-1].amax(1).mean() > 0.95
    expected = logits.softmax(1).mean((0, 2, 3))
    torch.testing.assert_close(counts / counts.sum(), expected, atol=0.02, rtol=0)


def test_the_codebook_is_the_decoders_first_kernel():
    net = make()
    codes = torch.zeros(1, 16, dtype=torch.int64)
    before = net.decode(codes)
    with torch.no_grad():
        net.decoder.blocks.input.w[:, 5] += 1
    assert torch.equal(net.decode(codes), before)
    with torch.no_grad():
        net.decoder.blocks.input.w[:, 0] += 1
    assert not torch.equal(net.decode(codes), before)


def test_standardised_logits():
    net = make(logit_gain=4.0, vocab_size=32)
    logits = net.logits(pictures(64))
    torch.testing.assert_close(logits.mean((0, 2, 3)), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits.std((0, 2, 3)), torch.full((32,), 4.0), rtol=1e-2, atol=0)
    many = len(net.encode(pictures(64)).unique())
    assert many > len(make(vocab_size=32).encode(pictures(64)).unique())


def test_beside_the_relaxation_all_is_fp32():
    net = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (mean, ln_b), logits = net(pictures(), torch.tensor(1.0))
    assert mean.dtype == ln_b.dtype == logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 3}, "factor=3 must be patch=1 times a power of two"),
        ({"factor": 2, "patch": 4}, "factor=2 must be patch=4 times"),
        ({"factor": 8}, "halves pictures 3 times, but there are 2 groups"),
        ({"image_size": 3}, "image_size=3 cannot be folded by patch 4"),
        ({"width": 6}, "width=6 must be a multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_a_picture_of_another_size():
    with pytest.raises(UserError, match="takes pictures of 16 px, not 32 x 32"):
        make().encode(pictures(size=32))
