import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dalle.errors import UserError
from dalle.nets.dit import DiT, positions

SMALL = {
    "image_size": 16,
    "channels": 3,
    "out_channels": 3,
    "patch": 4,
    "width": 32,
    "depth": 2,
    "heads": 4,
    "embed_dim": 6,
    "text_width": 5,
}


def grown(**changes) -> DiT:
    """A small network in which nothing is zero any more."""
    torch.manual_seed(0)
    net = DiT(**SMALL | changes)
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return net


def inputs(net: DiT, b: int = 3, length: int = 4) -> tuple[torch.Tensor, torch.Tensor, dict]:
    generator = torch.Generator().manual_seed(1)
    cond = {
        "image_embed": torch.randn(b, net.embed_dim, generator=generator),
        "text_embed": torch.randn(b, net.embed_dim, generator=generator),
        "text_hidden": torch.randn(b, length, net.text_width, generator=generator),
        "text_mask": torch.arange(length) < torch.arange(1, b + 1)[:, None],
    }
    x = torch.randn(b, net.channels, net.image_size, net.image_size, generator=generator)
    return x, torch.rand(b, generator=generator), cond


@settings(max_examples=10, deadline=None)
@given(
    patch=st.sampled_from([2, 4, 8]),
    depth=st.integers(1, 3),
    heads=st.sampled_from([1, 4]),
    out_channels=st.sampled_from([3, 6]),
)
def test_is_zero_at_birth_at_any_size(patch, depth, heads, out_channels):
    sizes = {"patch": patch, "depth": depth, "heads": heads, "out_channels": out_channels}
    net = DiT(**SMALL | sizes)
    x, t, cond = inputs(net)
    out = net(x, t, **cond)
    assert out.shape == (3, out_channels, 16, 16)
    assert not out.any()


def test_every_block_is_the_identity_at_birth():
    net = DiT(**SMALL)
    x, modulation, context = torch.randn(2, 16, 32), torch.zeros(2, 192), torch.randn(2, 7, 64)
    assert not net.modulation.weight.any()
    assert not net.modulation.bias.any()
    for block in net.blocks:
        torch.testing.assert_close(block(x, modulation, context), x, rtol=0, atol=0)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="cannot be folded by patch 50"):
        DiT(**SMALL | {"patch": 50})
    with pytest.raises(UserError, match="multiple of heads 5"):
        DiT(**SMALL | {"heads": 5})


def test_xl_2_has_the_published_size():
    """DiT-XL/2: 675M with its class table and fixed positions; conditions and context keys come on top."""
    with torch.device("meta"):
        net = DiT(32, 4, 8, 2, 1152, 28, 16, 1024, 1024)
    extra = sum(p.numel() for p in (*net.conditioning.parameters(), *net.context.parameters()))
    published = 675_129_632
    theirs = 1001 * 1152 + 256 * 1152 + (256 + 1) * 1152 + (1152 + 1) * 1152  # class table, positions, time
    assert sum(p.numel() for p in net.parameters()) - extra == published - theirs


def test_positions_differ_and_neighbours_are_alike():
    table = positions(6, 6, 32)
    assert table.shape == (36, 32)
    nearness = table @ table.T
    torch.testing.assert_close(nearness.diagonal(), torch.full((36,), 16.0))
    assert (nearness - 100 * torch.eye(36)).max() < 15.9
    torch.testing.assert_close(nearness[0, 1], nearness[0, 6])  # one step right, one step down


def test_patches_go_back_where_they_came_from():
    """With the identity in the place of the two linear layers, pixels must not move: blocks are idle yet."""
    net = DiT(**SMALL | {"width": 48})
    x, t, cond = inputs(net)
    net.position.zero_()
    net.norm = nn.Identity()
    for layer in (net.proj_in, net.proj_out):
        nn.init.eye_(layer.weight)
    torch.testing.assert_close(net(x, t, **cond), x)


class TestConditions:
    def outputs(self, change: dict, **keep) -> tuple[torch.Tensor, torch.Tensor]:
        net = grown().eval()
        x, t, cond = inputs(net)
        return net(x, t, **cond, **keep), net(x, t, **cond | change, **keep)

    def test_all_of_them_matter(self):
        for name in ("image_embed", "text_embed", "text_hidden"):
            before, after = self.outputs({name: torch.randn_like(inputs(grown())[2][name])})
            assert not torch.isclose(before, after).all(dim=(1, 2, 3)).any(), name

    def test_a_dropped_caption_has_no_influence(self):
        new = {"text_embed": torch.randn(3, 6), "text_hidden": torch.randn(3, 4, 5)}
        new["text_mask"] = torch.ones(3, 4, dtype=torch.bool)
        before, after = self.outputs(new, keep_text=torch.tensor([False, True, False]))
        same = torch.isclose(before, after, atol=1e-6).all(dim=(1, 2, 3))
        assert same.tolist() == [True, False, True]

    def test_a_dropped_image_has_no_influence(self):
        before, after = self.outputs(
            {"image_embed": torch.randn(3, 6)}, keep_image=torch.tensor([False, True, False])
        )
        same = torch.isclose(before, after, atol=1e-6).all(dim=(1, 2, 3))
        assert same.tolist() == [True, False, True]


def test_every_parameter_is_trained():
    net = grown()
    x, t, cond = inputs(net)
    keep = torch.tensor([True, False, True])
    net(x, t, **cond, keep_image=keep, keep_text=keep).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_checkpointing_changes_no_gradient():
    grads = []
    for checkpoint in (False, True):
        net = grown(dropout=0.3, checkpoint=checkpoint)
        x, t, cond = inputs(net)
        torch.manual_seed(2)
        net(x, t, **cond).square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.compile
def test_compiles_to_one_graph():
    """Captured whole, forward and backward; without the minutes that inductor takes to make code of it."""
    net = grown()
    x, t, cond = inputs(net)
    expected = net(x, t, **cond)
    out = torch.compile(net, fullgraph=True, backend="aot_eager")(x, t, **cond)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
