from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention
from vector_quantize_pytorch import FSQ

from dalle.errors import UserError
from dalle.nets.dalle import (
    ATTENTION,
    DALLE,
    SPARSE,
    STYLES,
    FactorizedEmbedding,
    SparseMask,
    TokenShift,
    layer_kinds,
    offsets,
)

SMALL: dict[str, Any] = {
    "text_vocab": 20, "text_length": 6, "image_vocab": 11, "grid": 4, "width": 32, "depth": 3, "heads": 4,
    "kernel": 3, "image_levels": None,
}  # fmt: skip
END = 19


def grown(**changes) -> DALLE:
    """With weights large enough for every token to matter."""
    torch.manual_seed(0)
    net = DALLE(**SMALL | changes)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.eval()


def inputs(net: DALLE, b: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions of 1, 2, 3, ... real words, and codes."""
    generator = torch.Generator().manual_seed(1)
    text = torch.zeros(b, net.text_length, dtype=torch.int64)
    for row, words in zip(text, range(1, b + 1), strict=True):
        row[0], row[words + 1] = 1, END
        row[1 : words + 1] = torch.randint(2, END, (words,), generator=generator)
    return text, torch.randint(net.image_vocab, (b, net.codes), generator=generator)


COUNTS = {"row": (187, 328_304), "column": (157, 311_936), "conv": (184, 352_209), "full": (253, 819_840)}
PER_QUERY = {
    "row": [1, 2, 3, 4, *[5] * 12],
    "column": [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4,
    "conv": [1, 2, 2, 3, 4, *[5] * 11],
    "full": list(range(1, 17)),
}


class TestSight:
    """Against the counts of App. B.1's masks, worked out apart from this code."""

    @pytest.mark.parametrize("kind", COUNTS)
    def test_counts(self, kind):
        small, paper = COUNTS[kind]
        mask = SparseMask(6, 4, offsets(kind, 4, 3)).mask
        assert mask.sum() == small
        assert mask[6:, 6:].sum(1).tolist() == PER_QUERY[kind]
        assert SparseMask(256, 32, offsets(kind, 32, 11)).mask.sum() == paper

    @pytest.mark.parametrize("kind", COUNTS)
    def test_text_is_causal_and_seen_by_the_whole_picture(self, kind):
        mask = SparseMask(6, 4, offsets(kind, 4, 3)).mask
        assert torch.equal(mask[:6, :6], torch.ones(6, 6, dtype=torch.bool).tril())
        assert mask[6:, :6].all()
        assert not mask[:6, 6:].any()

    @settings(max_examples=30, deadline=None)
    @given(
        kind=st.sampled_from(SPARSE), text=st.integers(1, 9), grid=st.integers(1, 6), half=st.integers(0, 4)
    )
    def test_keys_of_one_code_are_those_of_its_row_of_the_mask(self, kind, text, grid, half):
        sight = SparseMask(text, grid, offsets(kind, grid, 2 * half + 1))
        for rank in range(grid**2):
            keys = sight.keys[rank][sight.seen[rank]].tolist()
            assert sorted(keys) == sight.mask[text + rank].nonzero().flatten().tolist()

    def test_the_papers_order_of_layers(self):
        kinds = layer_kinds("dalle", 64)
        assert kinds[:10] == ["row", "column", "row", "row", "row", "column", "row", "row", "row", "column"]
        assert [i + 1 for i, kind in enumerate(kinds) if kind == "column"] == list(range(2, 63, 4))
        assert {kind: kinds.count(kind) for kind in SPARSE} == {"row": 47, "column": 16, "conv": 1}

    @pytest.mark.parametrize("depth", [1, 2, 6, 10])
    def test_the_last_layer_is_conv_even_where_a_column_would_be(self, depth):
        assert layer_kinds("dalle", depth).index("conv") == depth - 1


def seen_by_the_logits(net: DALLE) -> torch.Tensor:
    """(S, S): whether the logits after each token of the stream depend on each token."""
    text, codes = (x[2:] for x in inputs(net))
    tokens = net.tokens(text, codes, None).detach()
    jacobian = torch.autograd.functional.jacobian(lambda x: net.through(x)[0].square().sum(1), tokens)
    assert isinstance(jacobian, torch.Tensor)
    return jacobian[:, 0].abs().sum(2) > 1e-9


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("attention", ["full", *SPARSE])
def test_a_layer_sees_what_its_mask_says(attention, style):
    net = grown(attention=attention, style=style, depth=1)
    expected = SparseMask(6, 4, offsets(attention, 4, 3)).mask
    assert torch.equal(seen_by_the_logits(net), expected)


def test_the_papers_layers_together_see_all_that_came_before():
    seen = seen_by_the_logits(grown(attention="dalle", depth=6))
    assert torch.equal(seen, torch.ones_like(seen).tril())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("attention", ATTENTION)
def test_sparse_attention_equals_the_dense_mask(attention, style):
    """Softmax of all scores, -inf where the mask is false, written out; float64."""
    net = grown(attention=attention, style=style).double()
    text, codes = inputs(net)
    x = net.tokens(text, codes, None)
    length = x.shape[1]
    hidden = net.through(x)
    for layer, kind in zip(net.layers, net.kinds, strict=True):
        rotation = net.rotation
        q, kv = layer.attention.project(layer.norm1(x), rotation)
        q, k, v = (z.unflatten(2, (4, 8)).transpose(1, 2) for z in (q, *kv.chunk(2, dim=2)))
        scores = (q @ k.mT / 8**0.5).masked_fill(~SparseMask(6, 4, offsets(kind, 4, 3)).mask, -torch.inf)
        assert scores.shape[2:] == (length, length)
        x = x + layer.attention.out((scores.softmax(3) @ v).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.norm2(x))
    torch.testing.assert_close(hidden, net.norm(x))


@pytest.fixture
def gradients_of_blocks(monkeypatch) -> None:
    """On the CPU, which computes them as slowly as it can and therefore refuses."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


@pytest.mark.compile  # FlexAttention compiles its mask also where it is eager
@pytest.mark.usefixtures("gradients_of_blocks")
@pytest.mark.parametrize("checkpoint", [False, True])
def test_blocks_of_sparse_attention_equal_the_dense_mask(checkpoint, monkeypatch):
    """As in training on a GPU, where FlexAttention skips what no token sees; and its gradients."""
    net = grown(attention="dalle", checkpoint=checkpoint).double().train()
    text, codes = inputs(net)
    made = []
    for skip in (False, True):
        monkeypatch.setattr("dalle.nets.dalle.worth_skipping", lambda x, heads, skip=skip: skip)
        logits = net(text, codes)[1]
        made.append([logits, *torch.autograd.grad(logits.square().sum(), list(net.layers.parameters()))])
    torch.testing.assert_close(*made)
    first = net.sights["row"].blocks(21)
    assert net.sights["row"].blocks(21) is first  # made once
    assert first.to_dense().shape == (1, 1, 1, 1)


def test_blocks_that_nobody_sees_are_not_computed():
    """Of a grid of 32 codes after 128 of text, in blocks of 128: a row's layer sees the text, and two."""
    sight = SparseMask(128, 32, offsets("row", 32, 11))
    assert sight.blocks(1152).to_dense()[0, 0].sum(1).tolist() == [1, 2, *[3] * 7]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("given", [0, 5, 15])
@pytest.mark.parametrize("shift", [False, True])
def test_cached_steps_give_the_logits_of_the_whole_stream(attention, style, given, shift):
    net = grown(attention=attention, style=style, shift=shift)
    text, codes = inputs(net)
    keep = torch.tensor([True, False, True])
    expected = net(text, codes, keep)[1]
    with torch.no_grad():
        logits, cache = net.prefill(text, keep, codes[:, :given])
        torch.testing.assert_close(logits, expected[:, given], rtol=1e-4, atol=1e-4)
        places = [part.data_ptr() for part in cache if part is not None]
        for rank in range(given, net.codes - 1):
            logits = net.step(codes[:, rank], rank, cache)
            torch.testing.assert_close(logits, expected[:, rank + 1], rtol=1e-4, atol=1e-4)
    assert cache.kv.shape == (3, 2, 3, 4, 21, 8)
    assert [part.data_ptr() for part in cache if part is not None] == places


class TestShift:
    """Channels of neighbours, by an example written out and by what a layer then sees."""

    def test_values(self):
        x = torch.arange(1.0, 8).view(1, 7, 1) * torch.tensor([1.0, 10, 100, 1000])  # 3 words, 4 codes of 2x2
        expected = [
            [0, 0, 100, 1000], [1, 10, 200, 2000], [2, 20, 300, 3000],
            [3, 0, 400, 4000], [4, 0, 500, 5000], [5, 40, 600, 6000], [6, 50, 700, 7000],
        ]  # fmt: skip
        assert TokenShift(3, 2, 4)(x)[0].tolist() == expected
        assert TokenShift(3, 2, 4)(x[:, :3])[0].tolist() == expected[:3]  # captions alone
        assert TokenShift(3, 2, 4)(x[:, :4])[0].tolist() == expected[:4]  # less than a row

    @pytest.mark.parametrize("attention", ["full", *SPARSE])
    def test_nothing_is_seen_too_early(self, attention):
        seen = seen_by_the_logits(grown(attention=attention, shift=True, depth=2))
        assert not seen.triu(1).any()

    def test_a_layer_sees_its_neighbours_too(self):
        seen = seen_by_the_logits(grown(attention="column", shift=True, depth=1))
        expected = SparseMask(6, 4, offsets("column", 4, 3)).mask
        assert seen[expected].all()
        assert seen[9, 8]  # the code before
        assert not expected[9, 8]

    def test_gradients_flow_through_recomputed_layers_alike(self):
        text, codes = inputs(grown())
        grads = []
        for again in (False, True):
            net = grown(shift=True, checkpoint=again).train()
            net(text, codes)[1].square().sum().backward()
            grads.append([p.grad for p in net.layers.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


class TestDigits:
    """Codes that share what their digits share."""

    LEVELS = (3, 5, 4)

    def test_digits_are_those_of_finite_scalar_quantization(self):
        levels = list(self.LEVELS)
        expected = FSQ(levels).indices_to_level_indices(torch.arange(60))
        digits = FactorizedEmbedding(levels, 8).spread.split(levels, dim=1)
        assert all(part.sum(1).eq(1).all() for part in digits)
        assert torch.equal(torch.stack([part.argmax(1) for part in digits], dim=1), expected)

    def test_groups_of_digits_share_too(self):
        flat, grouped = (
            FactorizedEmbedding(self.LEVELS, 8).spread,
            FactorizedEmbedding(((3, 5), (4,)), 8).spread,
        )
        code = torch.arange(60)
        assert torch.equal(grouped[:, :15], torch.nn.functional.one_hot(code % 15).float())
        assert torch.equal(grouped[:, 15:], flat)
        assert torch.equal(
            FactorizedEmbedding((self.LEVELS,), 8).spread, flat
        )  # one group is the whole code: the table's

    @pytest.mark.parametrize("levels", [LEVELS, ((3, 5), (4,))])
    def test_few_codes_and_many_have_the_same_logits(self, levels):
        net = grown(image_vocab=60, image_levels=levels)
        x = torch.randn(3, 20, net.width)  # 60 rows, more than the width, and one by one
        each = torch.stack([net.code_logits(row) for row in x.flatten(0, 1)])
        torch.testing.assert_close(net.code_logits(x).flatten(0, 1), each, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("style", STYLES)
    @pytest.mark.parametrize("levels", [LEVELS, ((3, 5), (4,))])
    def test_are_a_table_that_adds_up(self, style, levels):
        net = grown(image_vocab=60, image_levels=levels, style=style)
        plain = grown(image_vocab=60, style=style)
        weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        for table, part in (("image_embedding", "read"), ("image_head", "write")):
            weights[f"{table}.weight"] += net.digits.spread @ weights.pop(f"digits.{part}")
        plain.load_state_dict(weights)
        text, codes = inputs(net)
        expected = plain(text, codes)
        for found, known in zip(net(text, codes), expected, strict=True):
            torch.testing.assert_close(found, known, rtol=1e-4, atol=1e-4)
        with torch.no_grad():  # and one by one
            logits, cache = net.prefill(text)
            for rank in range(net.codes - 1):
                torch.testing.assert_close(logits, expected[1][:, rank], rtol=1e-4, atol=1e-4)
                logits = net.step(codes[:, rank], rank, cache)

    def test_all_tables_learn(self):
        net = DALLE(**SMALL | {"image_vocab": 60, "image_levels": self.LEVELS})
        net(*inputs(net))[1].square().mean().backward()
        tables = (net.image_embedding.weight, net.image_head.weight, net.digits.read, net.digits.write)
        assert all(table.grad.abs().sum() > 0 for table in tables)

    def test_of_another_vocabulary_are_refused(self):
        with pytest.raises(UserError, match=r"image_levels=\(3, 5, 4\) make 60 codes, but image_vocab=11"):
            DALLE(**SMALL | {"image_levels": self.LEVELS})


class TestText:
    def test_paddings_have_an_id_for_each_position(self):
        net = grown()
        text, _ = inputs(net)
        padded = net.padded(text, torch.tensor([True, True, False]))
        assert padded[0].tolist() == [1, text[0, 1], END, 23, 24, 25]
        assert padded[1].tolist() == [1, *text[1, 1:3], END, 24, 25]
        assert padded[2].tolist() == [20, 21, 22, 23, 24, 25]

    def test_a_dropped_caption_has_no_influence_and_another_has(self):
        net = grown()
        text, codes = inputs(net)
        keep = torch.tensor([False, True, False])
        before, after = (net(t, codes, keep)[1] for t in (text, text.flip(0).roll(1, 0)))
        assert torch.isclose(before, after).flatten(1).all(1).tolist() == [True, False, True]

    def test_what_follows_the_end_has_no_influence(self):
        net = grown()
        text, codes = inputs(net)
        noisy = torch.where(torch.arange(6) <= text.argmax(1, keepdim=True), text, 7)
        torch.testing.assert_close(net(noisy, codes), net(text, codes), rtol=0, atol=0)

    def test_a_caption_of_another_length_is_refused(self):
        net = grown()
        text, codes = inputs(net)
        with pytest.raises(ValueError, match="5 ids; this DALLE takes 6"):
            net(text[:, :5], codes)


class TestLogits:
    def test_each_kind_has_its_own_vocabulary(self):
        net = grown()
        text_logits, image_logits = net(*inputs(net))
        assert text_logits.shape == (3, 5, 26)
        assert image_logits.shape == (3, 16, 11)

    def test_they_are_those_of_the_token_before(self):
        """Logits i of the text depend on text up to i, those of code j on all text and the codes before j."""
        net = grown()
        text, codes = inputs(net, b=1)
        words, pictures = net(text, codes)
        changed = text.clone()
        changed[0, 1] = text[0, 1] % (END - 2) + 2
        same = torch.isclose(net(changed, codes)[0], words).all(2)[0]
        assert same.tolist() == [True, False, False, False, False]
        for j in range(16):
            changed = codes.clone()
            changed[0, j] = (codes[0, j] + 1) % 11
            now_words, now_pictures = net(text, changed)
            assert torch.equal(now_words, words)
            assert torch.isclose(now_pictures, pictures).all(2)[0].tolist() == [k <= j for k in range(16)]

    def test_those_of_the_text_can_be_left_out(self):
        net = grown()
        text_logits, image_logits = net(*inputs(net), text_loss=False)
        assert text_logits is None
        assert torch.equal(image_logits, net(*inputs(net))[1])


@pytest.mark.parametrize("style", STYLES)
def test_every_parameter_is_trained(style):
    net = grown(style=style, attention="dalle")
    text, codes = inputs(net)
    out = net(text, codes, torch.tensor([True, False, True]))
    sum(logits.square().sum() for logits in out).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("attention", ["full", "dalle"])
def test_checkpointing_changes_no_gradient(attention):
    grads = []
    for checkpoint in (False, True):
        net = grown(attention=attention, dropout=0.3, checkpoint=checkpoint).train()
        torch.manual_seed(2)
        net(*inputs(net))[1].square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_residual_branches_start_small():
    net = DALLE(**SMALL | {"width": 256, "depth": 8})
    outs = [out.weight for layer in net.layers for out in (layer.attention.out, layer.mlp.out)]
    assert [w.std().item() for w in outs] == pytest.approx([0.02 / 4] * 16, rel=0.02)
    assert net.layers[0].attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)


class TestPeers:
    """transformers' networks, given the same weights, say the same."""

    def test_gpt(self):
        from transformers import GPT2Config, GPT2Model

        net = grown()
        torch.manual_seed(0)
        peer = GPT2Model(
            GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=22, activation_function="gelu")
        ).eval()
        state = {"ln_f.weight": net.norm.weight, "ln_f.bias": net.norm.bias}
        names = {
            "norm1": "ln_1",
            "norm2": "ln_2",
            "attention.qkv": "attn.c_attn",
            "attention.out": "attn.c_proj",
        }
        names |= {"mlp.proj_in": "mlp.c_fc", "mlp.out": "mlp.c_proj"}
        for i, layer in enumerate(net.layers):
            for ours, theirs in names.items():
                module = layer.get_submodule(ours)
                linear = isinstance(module, torch.nn.Linear)
                state[f"h.{i}.{theirs}.weight"] = module.weight.T if linear else module.weight
                state[f"h.{i}.{theirs}.bias"] = module.bias
        state |= {"wpe.weight": torch.zeros(22, 32), "wte.weight": peer.wte.weight}  # the tokens bring theirs
        peer.load_state_dict(state)
        tokens = net.tokens(*inputs(net), None)
        expected = peer(inputs_embeds=tokens).last_hidden_state
        torch.testing.assert_close(net.through(tokens), expected, rtol=1e-4, atol=1e-4)

    def test_llama(self):
        from transformers import LlamaConfig, LlamaModel

        net = grown(style="llama")
        hidden = net.layers[0].mlp.out.in_features
        config = LlamaConfig(
            hidden_size=32, intermediate_size=hidden, num_hidden_layers=3, num_attention_heads=4,
            vocab_size=2, max_position_embeddings=22,
        )  # fmt: skip
        peer = LlamaModel(config).eval()
        state = {"norm.weight": net.norm.weight, "embed_tokens.weight": torch.zeros(2, 32)}
        for i, layer in enumerate(net.layers):
            q, k, v = layer.attention.qkv.weight.chunk(3)
            gate, up = layer.mlp.proj_in.weight.chunk(2)
            weights = {
                "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
                "self_attn.o_proj": layer.attention.out.weight, "mlp.gate_proj": gate, "mlp.up_proj": up,
                "mlp.down_proj": layer.mlp.out.weight, "input_layernorm": layer.norm1.weight,
                "post_attention_layernorm": layer.norm2.weight,
            }  # fmt: skip
            state |= {f"layers.{i}.{name}.weight": weight for name, weight in weights.items()}
        peer.load_state_dict(state)
        tokens = net.tokens(*inputs(net), None)
        expected = peer(inputs_embeds=tokens).last_hidden_state
        torch.testing.assert_close(net.through(tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("text_length", "width", "depth", "heads", "about", "exactly"),
    [(256, 3968, 64, 62, 12.29e9, 12_293_824_256), (128, 2048, 24, 16, 1.31e9, 1_310_183_424)],
    ids=["paper", "1b"],
)
def test_papers_sizes(text_length, width, depth, heads, about, exactly):
    """12 width^2 in each layer, which is 12.09e9 of the paper's, and what goes in and out."""
    with torch.device("meta"):
        net = DALLE(16384, text_length, 8192, 32, width, depth, heads, "dalle", kernel=11, image_levels=None)
    layers = sum(p.numel() for p in net.layers.parameters())
    assert layers == depth * (12 * width**2 + 13 * width)
    rest = (2 * (16384 + text_length + 8192) + text_length + 2 * 32 + 2) * width
    assert sum(p.numel() for p in net.parameters()) == layers + rest == exactly
    assert exactly == pytest.approx(about, rel=1e-2)


def test_styles_have_about_as_many_parameters():
    gpt, llama = (DALLE(**SMALL | {"width": 384, "style": style}) for style in STYLES)
    count = [sum(p.numel() for p in net.layers.parameters()) for net in (gpt, llama)]
    assert count[1] == pytest.approx(count[0], rel=0.01)
    assert not any(name.endswith("bias") for name, _ in llama.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "dense"}, "attention is one of full, row, column, conv, dalle, not 'dense'"),
        ({"style": "bert"}, "style is one of gpt, llama, not 'bert'"),
        ({"heads": 5}, "5 heads do not divide width 32"),
        ({"heads": 32, "style": "llama"}, "32 heads do not divide width 32 an even number of times"),
        ({"kernel": 4}, "kernel is an odd number, not 4"),
        ({"depth": 0}, "depth 0 leaves no layer"),
    ],
)
def test_mistakes_are_one_line(change, message):
    with pytest.raises(UserError, match=message) as error:
        DALLE(**SMALL | change)
    assert "\n" not in str(error.value)


@pytest.mark.compile
@pytest.mark.parametrize("attention", ["full", "dalle"])
@pytest.mark.parametrize("shift", [False, True])
def test_compiles_to_one_graph(attention, shift):
    """Captured whole, without the minutes that inductor takes; and all steps of sampling in one graph."""
    torch.compiler.reset()
    net = grown(attention=attention, shift=shift)
    text, codes = inputs(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(text, codes), net(text, codes), rtol=1e-4, atol=1e-4)

    expected = net(text, codes)[1]
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(net.step, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        _, cache = net.prefill(text)
        for rank in range(net.codes - 1):
            logits = step(codes[:, rank], rank, cache)
            torch.testing.assert_close(logits, expected[:, rank + 1], rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


@pytest.mark.compile
@pytest.mark.usefixtures("gradients_of_blocks")
@pytest.mark.parametrize("checkpoint", [False, True])
def test_blocks_are_captured_in_the_one_graph(checkpoint, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr("dalle.nets.dalle.worth_skipping", lambda x, heads: True)
    net = grown(attention="dalle", checkpoint=checkpoint).train()
    text, codes = inputs(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    made = [f(text, codes)[1].square().sum() for f in (net, compiled)]
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-4)
    weights = list(net.layers.parameters())
    torch.testing.assert_close(*(torch.autograd.grad(m, weights) for m in made), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("levels", [None, [3, 5, 4]])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_logits_are_fp32_under_autocast_and_with_half_weights(levels, weights):
    """As exact as a head in float64 on the same features; bf16 is 500 times off."""
    net = grown(image_levels=levels, image_vocab=60).to(weights)
    features: list[torch.Tensor] = []
    net.norm.register_forward_hook(lambda *call: features.append(call[-1]))
    text, codes = inputs(net)
    enabled = weights == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        of_text, of_codes = net(text, codes)
        first, cache = net.prefill(text)
        second = net.step(codes[:, 0], 0, cache)
    heads = {name: p.detach().double() for name, p in net.named_parameters() if "head" in name}
    table = heads["image_head.weight"]
    if net.digits is not None:
        table = table + net.digits.spread.double() @ net.digits.write.detach().double()
    x, of_first, of_second = (f.double() for f in features)
    last = net.text_length - 1
    assert of_text is not None
    for logits, exact in (
        (of_text, x[:, :last] @ heads["text_head.weight"].T),
        (of_codes, x[:, last:] @ table.T),
        (first, of_first[:, -1] @ table.T),
        (second, of_second[:, 0] @ table.T),
    ):
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits.double(), exact, rtol=0, atol=2e-6 * exact.abs().max().item())
        rounded = exact.bfloat16().double()
        assert (rounded - exact).abs().max() > 1e-3 * exact.abs().max()
