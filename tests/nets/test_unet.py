"""Both U-Nets: what a decoder network promises, and what each is made of."""

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dalle.errors import UserError
from dalle.nets import small_unet, unet
from dalle.nets.small_unet import SmallUNet
from dalle.nets.unet import ResBlock, UNet

SMALL = {
    "image_size": 16,
    "channels": 3,
    "out_channels": 3,
    "width": 16,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention": (4,),
    "head_dim": 16,
    "embed_dim": 6,
    "text_width": 5,
    "patch": 2,
}
BLOCKS = {UNet: unet.Block, SmallUNet: small_unet.Block}
both = pytest.mark.parametrize("kind", [UNet, SmallUNet])


def made(kind: type = UNet, **changes) -> UNet | SmallUNet:
    sizes = SMALL | ({"blocks": (2, 1), "condition_width": 24} if kind is SmallUNet else {})
    return kind(**sizes | changes)


def grown(kind: type = UNet, **changes) -> UNet | SmallUNet:
    """A small network in which nothing is zero any more."""
    torch.manual_seed(0)
    net = made(kind, **changes)
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return net


def inputs(net: UNet, b: int = 3, length: int = 4) -> tuple[torch.Tensor, torch.Tensor, dict]:
    generator = torch.Generator().manual_seed(1)
    cond = {
        "image_embed": torch.randn(b, net.embed_dim, generator=generator),
        "text_embed": torch.randn(b, net.embed_dim, generator=generator),
        "text_hidden": torch.randn(b, length, net.text_width, generator=generator),
        "text_mask": torch.arange(length) < torch.arange(1, b + 1)[:, None],
    }
    x = torch.randn(b, net.channels, net.image_size, net.image_size, generator=generator)
    return x, torch.rand(b, generator=generator), cond


@settings(max_examples=12, deadline=None)
@given(
    patch=st.sampled_from([1, 2]),
    multipliers=st.sampled_from([(1,), (1, 2), (2, 1, 2)]),
    blocks=st.integers(1, 2),
    out_channels=st.sampled_from([3, 6]),
    resample=st.sampled_from(["conv", "block"]),
    attend=st.booleans(),
)
def test_is_zero_at_birth_at_any_size(patch, multipliers, blocks, out_channels, resample, attend):
    sizes = {"patch": patch, "multipliers": multipliers, "blocks": blocks, "out_channels": out_channels}
    lowest = 16 // patch >> (len(multipliers) - 1)
    net = UNet(**SMALL | sizes | {"attention": (lowest,) if attend else (), "resample": resample})
    x, t, cond = inputs(net)
    out = net(x, t, **cond)
    assert out.shape == (3, out_channels, 16, 16)
    assert not out.any()


@pytest.mark.parametrize(("patch", "multipliers"), [(1, (1,)), (2, (1, 2)), (1, (2, 1, 2))])
@pytest.mark.parametrize("out_channels", [3, 6])
def test_the_small_one_too(patch, multipliers, out_channels):
    lowest = 16 // patch >> (len(multipliers) - 1)
    blocks = (1, 2, 1)[: len(multipliers)]
    net = made(
        SmallUNet, patch=patch, multipliers=multipliers, blocks=blocks, attention=(lowest,),
        out_channels=out_channels,
    )  # fmt: skip
    x, t, cond = inputs(net)
    out = net(x, t, **cond)
    assert out.shape == (3, out_channels, 16, 16)
    assert not out.any()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (UNet, {"resample": "conv", "positions": True}),
        (UNet, {"resample": "block", "positions": False}),
        (SmallUNet, {}),
    ],
)
def test_every_parameter_is_trained(kind, options):
    net = grown(kind, **options)
    x, t, cond = inputs(net)
    keep = torch.tensor([True, False, True])
    net(x, t, **cond, keep_image=keep, keep_text=keep).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="image_size=1 cannot be folded"):
        UNet(**SMALL | {"image_size": 1})
    with pytest.raises(UserError, match="attention names"):
        UNet(**SMALL | {"attention": (16,)})
    with pytest.raises(UserError, match="head_dim 24"):
        UNet(**SMALL | {"head_dim": 24})
    with pytest.raises(UserError, match=r"blocks \[1\] needs a number for each of multipliers \[1, 2\]"):
        made(SmallUNet, blocks=(1,))
    with pytest.raises(UserError, match="attention names no feature map"):
        made(SmallUNet, attention=())
    with pytest.raises(UserError, match="resample"):
        UNet(**SMALL | {"resample": "stride"})


def test_papers_decoder_has_the_papers_size():
    """3.5B with its text encoder; without, "roughly 2.3 billion" (Nichol et al. 2021, GLIDE, sec. 4.1)."""
    with torch.device("meta"):
        net = UNet(
            64,
            3,
            6,
            512,
            (1, 2, 3, 4),
            3,
            (32, 16, 8),
            64,
            1024,
            2048,
            1,
            dropout=0.1,
            resample="block",
            positions=False,
        )
    assert sum(p.numel() for p in net.parameters()) == 2_259_067_398


def test_positions_are_learned_for_every_pixel():
    net = grown(positions=True)
    x, t, cond = inputs(net)
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = []
        net.down[0].register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
        net(x, t, **cond).float().square().sum().backward()
    assert dtypes == [torch.bfloat16]  # fp32 positions must not widen all that follows
    assert net.positions.grad.shape == (1, 16, 8, 8)
    assert net.positions.grad.all()


@pytest.mark.parametrize("resample", ["", "down", "up"])
def test_residual_block_is_that_of_diffusers(resample):
    ours = ResBlock(32, 48, resample=resample)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.2)
    theirs = ResnetBlock2D(
        in_channels=32,
        out_channels=48,
        temb_channels=None,
        groups=ours.norm1.groups,
        groups_out=ours.norm2.groups,
        eps=1e-5,
        time_embedding_norm="scale_shift",
        up=resample == "up",
        down=resample == "down",
    )
    names = {"norm1": ours.norm1, "conv1": ours.conv1, "conv2": ours.conv2, "conv_shortcut": ours.skip}
    state = {f"{name}.{k}": v for name, module in names.items() for k, v in module.state_dict().items()}
    assert theirs.load_state_dict(state, strict=False).missing_keys == ["norm2.weight", "norm2.bias"]
    x, scale, shift = torch.randn(2, 32, 8, 8), torch.randn(2, 48), torch.randn(2, 48)
    expected = theirs(x, torch.cat((scale, shift), 1)[..., None, None])
    torch.testing.assert_close(ours(x, 1 + scale, shift), expected, rtol=1e-4, atol=1e-4)


@both
class TestConditions:
    def outputs(self, kind: type, change: dict, **keep) -> tuple[torch.Tensor, torch.Tensor]:
        net = grown(kind).eval()
        x, t, cond = inputs(net)
        return net(x, t, **cond, **keep), net(x, t, **cond | change, **keep)

    def test_all_of_them_matter(self, kind):
        for name in ("image_embed", "text_embed", "text_hidden"):
            before, after = self.outputs(kind, {name: torch.randn_like(inputs(grown())[2][name])})
            assert not torch.isclose(before, after).all(dim=(1, 2, 3)).any(), name

    def test_a_caption_that_is_not_pooled_is_read_as_tokens(self, kind):
        net = grown(kind, pooled_text=False).eval()
        x, t, cond = inputs(net)
        before = net(x, t, **cond)
        torch.testing.assert_close(net(x, t, **cond | {"text_embed": torch.randn(3, 6)}), before)
        after = net(x, t, **cond | {"text_hidden": torch.randn(3, 4, 5)})
        assert not torch.isclose(before, after).all(dim=(1, 2, 3)).any()

    def test_a_dropped_caption_has_no_influence(self, kind):
        new = {"text_embed": torch.randn(3, 6), "text_hidden": torch.randn(3, 4, 5)}
        new["text_mask"] = torch.tensor([[True] * 4] * 3)
        before, after = self.outputs(kind, new, keep_text=torch.tensor([False, True, False]))
        same = torch.isclose(before, after, atol=1e-6).all(dim=(1, 2, 3))
        assert same.tolist() == [True, False, True]

    def test_a_dropped_image_has_no_influence(self, kind):
        new = {"image_embed": torch.randn(3, 6)}
        before, after = self.outputs(kind, new, keep_image=torch.tensor([False, True, False]))
        same = torch.isclose(before, after, atol=1e-6).all(dim=(1, 2, 3))
        assert same.tolist() == [True, False, True]

    def test_pads_have_no_influence(self, kind):
        _, _, cond = inputs(grown())
        noisy = torch.where(cond["text_mask"][..., None], cond["text_hidden"], 9.0)
        before, after = self.outputs(kind, {"text_hidden": noisy})
        torch.testing.assert_close(before, after, rtol=0, atol=0)

    def test_keeping_all_is_the_default(self, kind):
        net = grown(kind).eval()
        x, t, cond = inputs(net)
        keep = torch.ones(3, dtype=torch.bool)
        torch.testing.assert_close(net(x, t, **cond), net(x, t, **cond, keep_image=keep, keep_text=keep))


@pytest.mark.parametrize(
    ("kind", "options"), [(UNet, {"resample": "conv"}), (UNet, {"resample": "block"}), (SmallUNet, {})]
)
def test_channels_last_changes_the_layout_only(kind, options):
    net = grown(kind, **options).eval()
    x, t, cond = inputs(net)
    expected = net(x, t, **cond)
    layouts = []
    hooks = [
        m.register_forward_hook(lambda _, __, out: layouts.append(out))
        for m in net.modules()
        if isinstance(m, BLOCKS[kind])
    ]
    out = net.to(memory_format=torch.channels_last)(
        x.contiguous(memory_format=torch.channels_last), t, **cond
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert len(hooks) == len(layouts)
    assert all(h.is_contiguous(memory_format=torch.channels_last) for h in layouts)


@both
def test_checkpointing_changes_no_gradient(kind):
    nets = [grown(kind, dropout=0.3, checkpoint=checkpoint) for checkpoint in (False, True)]
    grads = []
    for net in nets:
        x, t, cond = inputs(net)
        torch.manual_seed(2)
        net(x, t, **cond).square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


@both
def test_trains_in_bf16(kind):
    net = grown(kind)
    x, t, cond = inputs(net)
    exact = net(x, t, **cond)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, t, **cond)
    assert (out - exact).abs().mean() < 0.03 * exact.abs().mean()
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


@pytest.mark.compile
@both
def test_compiles_to_one_graph(kind):
    """Captured whole, forward and backward; without the minutes that inductor takes to make code of it."""
    net = grown(kind)
    x, t, cond = inputs(net)
    keep = {"keep_image": torch.tensor([True, False, True]), "keep_text": torch.tensor([True, True, False])}
    expected = net(x, t, **cond, **keep)
    grad = torch.autograd.grad(expected.square().mean(), net.conv_in.weight)[0]
    out = torch.compile(net, fullgraph=True, backend="aot_eager")(x, t, **cond, **keep)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().mean(), net.conv_in.weight)[0], grad, rtol=1e-3, atol=1e-4
    )
