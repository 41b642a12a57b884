import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from dalle.nets import blocks
from dalle.nets.blocks import (
    Attention,
    Conditioning,
    GroupNorm,
    NormSiLU,
    attend,
    keep_or_null,
    time_embedding,
)

# t = 10, 8 features: cos and sin of 10 * 10000^(-k/4)
ANCHOR = [-0.8390715290764524, 0.5403023058681399, 0.9950041652780258, 0.9999500004166653]
ANCHOR += [-0.5440211108893698, 0.8414709848078964, 0.0998334166468281, 0.009999833334166658]


def test_time_embedding_has_the_known_values():
    torch.testing.assert_close(time_embedding(torch.tensor([0.01]), 8)[0], torch.tensor(ANCHOR))


def test_time_embedding_is_that_of_diffusers():
    t = torch.rand(16)
    theirs = get_timestep_embedding(1000 * t, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(time_embedding(t, 64), theirs, rtol=0, atol=2e-4)  # angles up to 1000 in fp32


def reference(attention: Attention) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(attention.width, attention.heads, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": attention.qkv.weight,
            "in_proj_bias": attention.qkv.bias,
            "out_proj.weight": attention.out.weight,
            "out_proj.bias": attention.out.bias,
        }
    )
    return theirs


@pytest.mark.parametrize("grad", [True, False], ids=["plain", "sdpa"])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_that_of_torch(causal, grad):
    attention, x = Attention(24, 3), torch.randn(2, 7, 24)
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    expected, _ = reference(attention)(x, x, x, attn_mask=mask, need_weights=False)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(attention(x, causal=causal)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grad", [True, False], ids=["plain", "sdpa"])
def test_causal_attention_goes_on_where_its_keys_end(grad):
    attention, x = Attention(24, 3), torch.randn(2, 7, 24)
    with torch.set_grad_enabled(grad):
        whole, _ = attention(x, causal=True)
        first, past = attention(x[:, :4], causal=True)
        rest, _ = attention(x[:, 4:], past, causal=True)
    torch.testing.assert_close(torch.cat((first, rest), 1), whole, rtol=1e-5, atol=1e-6)


def test_many_tokens_attend_as_few_do():
    """Above a size, training on the CPU leaves the plain formula for SDPA: the seam must not show."""
    q, kv = torch.randn(1, 300, 16, requires_grad=True), torch.randn(1, 300, 32)
    whole = attend(q, kv, heads=2)
    parts = torch.cat([attend(part, kv, heads=2) for part in q.split(100, 1)], 1)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)


def test_keep_or_null():
    value, null = torch.ones(3, 2), torch.tensor([5.0, 6.0])
    kept = keep_or_null(torch.tensor([True, False, True]), value, null)
    assert kept.tolist() == [[1, 1], [5, 6], [1, 1]]
    assert keep_or_null(None, value, null).tolist() == value.tolist()


def conditions(b: int = 3, e: int = 6, length: int = 5, s: int = 4) -> dict:
    mask = torch.arange(length) < torch.tensor([2, 5, 3])[:b, None]
    return {
        "image_embed": torch.randn(b, e),
        "text_embed": torch.randn(b, e),
        "text_hidden": torch.randn(b, length, s),
        "text_mask": mask,
    }


def test_conditioning_puts_image_tokens_first_and_one_learned_token_at_pads():
    net, cond = Conditioning(16, 8, 6, 4, image_tokens=2), conditions()
    vector, context = net(torch.rand(3), **cond)
    assert vector.shape == (3, 16)
    assert context.shape == (3, 2 + 5, 16)
    torch.testing.assert_close(context[:, :2].flatten(1), net.image_context(cond["image_embed"]))
    pads = context[:, 2:][~cond["text_mask"]]
    torch.testing.assert_close(pads, net.null_token.expand_as(pads))
    real = net.text_context(cond["text_hidden"])[cond["text_mask"]]
    torch.testing.assert_close(context[:, 2:][cond["text_mask"]], net.text_context_norm(real))


def test_conditioning_ignores_the_length_of_the_caption_embedding():
    net, cond = Conditioning(16, 8, 6, 4, image_tokens=2), conditions()
    t = torch.rand(3)  # beside long embeddings the norm's epsilon is nothing
    long, longer = (cond | {"text_embed": k * cond["text_embed"]} for k in (100, 700))
    torch.testing.assert_close(net(t, **long)[0], net(t, **longer)[0], rtol=1e-4, atol=1e-5)


def test_every_parameter_of_the_conditioning_gets_a_gradient():
    net = Conditioning(16, 8, 6, 4, image_tokens=2)
    vector, context = net(torch.rand(3), **conditions())
    (vector.sum() + context.square().sum()).backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.fixture(params=[False, True], ids=["plain", "fused"])
def way(request, monkeypatch) -> None:
    """The operations that are fused on a GPU, too, which a compiler does not change."""
    monkeypatch.setattr(blocks, "worth_fusing", lambda x: request.param)
    monkeypatch.setattr(blocks, "compiled", lambda function: function)


@pytest.mark.usefixtures("way")
class TestNorm:
    @pytest.mark.parametrize("silu", [True, False])
    @pytest.mark.parametrize("shape", [(8,), (2, 8)])
    def test_gradients(self, shape, silu):
        x = torch.randn(2, 8, 2, 3, dtype=torch.float64, requires_grad=True)
        scale, shift = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
        assert torch.autograd.gradcheck(NormSiLU.apply, (x, scale, shift, 2, 1e-5, silu))
        assert torch.autograd.gradgradcheck(NormSiLU.apply, (x, scale, shift, 2, 1e-5, silu))

    def test_a_penalty_on_gradients_is_that_through_torchs_own_norm(self):
        """R1 (Mescheder et al. 2018) of a network with a norm in it, and its gradient in the weights."""
        norm, x = GroupNorm(8), torch.randn(2, 8, 3, 3, requires_grad=True)
        nn.init.normal_(norm.weight)

        def theirs(x: torch.Tensor) -> torch.Tensor:
            return F.silu(F.group_norm(x, norm.groups, norm.weight, norm.bias))

        penalties = []
        for made in (norm(x), theirs(x)):
            (gradient,) = torch.autograd.grad(made.square().sum(), x, create_graph=True)
            penalties.append(torch.autograd.grad(gradient.square().sum(), [x, *norm.parameters()]))
        torch.testing.assert_close(*penalties, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("offset", [1e2, 1e3, 1e4])
    def test_numbers_far_from_zero(self, offset):
        """As exact as float32 can tell such numbers apart, forward and backward."""
        x = torch.randn(2, 16, 16, 16) + offset
        norm, g = GroupNorm(16), torch.randn(2, 16, 16, 16)
        nn.init.normal_(norm.weight)
        made = []
        for dtype in (torch.float32, torch.float64):
            wide = x.to(dtype).requires_grad_()
            weights = [p.detach().to(dtype).requires_grad_() for p in norm.parameters()]
            out = NormSiLU.apply(wide, *weights, norm.groups, 1e-5, True)
            made.append([out, *torch.autograd.grad(out, [wide, *weights], g.to(dtype))])
        rounding = offset * torch.finfo(torch.float32).eps
        for ours, exact in zip(*made, strict=True):
            assert (ours - exact).abs().max() < 20 * rounding * exact.abs().max()

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_is_that_of_torch(self, memory_format):
        norm, x = GroupNorm(24), (3 * torch.randn(2, 24, 5, 4) + 1).contiguous(memory_format=memory_format)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        out = norm(x)
        torch.testing.assert_close(
            out, F.silu(F.group_norm(x, norm.groups, norm.weight, norm.bias)), rtol=1e-5, atol=1e-5
        )
        assert out.is_contiguous(memory_format=memory_format)

    @pytest.mark.parametrize("shape", [(24,), (2, 24)])
    def test_gradients_are_those_of_torch(self, shape):
        x = torch.randn(2, 24, 5, 4).to(memory_format=torch.channels_last).requires_grad_()
        scale, shift = (torch.randn(shape, requires_grad=True) for _ in range(2))
        theirs = F.group_norm(x, 6) * scale[..., None, None] + shift[..., None, None]
        g = torch.randn(2, 24, 5, 4)
        made = [
            torch.autograd.grad(out, [x, scale, shift], g)
            for out in (NormSiLU.apply(x, scale, shift, 6, 1e-5, True), F.silu(theirs))
        ]
        torch.testing.assert_close(*made, rtol=1e-4, atol=1e-4)

    def test_rounds_no_more_than_torch_in_bf16(self):
        x = torch.randn(4, 32, 8, 8).bfloat16()
        norm = GroupNorm(32)
        exact = F.silu(F.group_norm(x.float(), norm.groups))
        theirs = F.silu(F.group_norm(x, norm.groups)).float()
        assert norm(x).dtype == torch.bfloat16
        assert (norm(x).float() - exact).abs().mean() <= (theirs - exact).abs().mean()

    @pytest.mark.parametrize(
        ("channels", "groups"), [(3, 1), (32, 8), (48, 4), (128, 32), (1536, 32), (280, 2)]
    )
    def test_groups_divide_the_channels(self, channels, groups):
        assert GroupNorm(channels).groups == groups
        assert channels % groups == 0
