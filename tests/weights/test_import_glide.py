"""GLIDE's base model, imported: its encoder of captions, its U-Net and its tokenizer, against diffusers' and
PyTorch's own modules and the published formulas, as the release is on no package index.
"""

import gzip
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from public import CLOSE, DECODER, FakeCLIP, chain, in_a_row, karlo_unet, same_draws, shaken
from torch import nn

from dalle.data.tokenizers import GlideBPE
from dalle.errors import UserError
from dalle.instantiate import instantiate
from dalle.pipelines.load import load_unclip
from dalle.run_dir import load_clip, load_stage
from dalle.weights import glide
from dalle.weights.clip import import_clip
from dalle.weights.karlo import import_decoder
from dalle.weights.reading import PublicWeights
from dalle.weights.writing import check_same

diffusers = pytest.importorskip("diffusers")
WIDTH, LENGTH, HEADS = 64, 12, 2
CAPTIONS = ["A red square", "it's 2 circles, they've said!"]
MERGES = [("\u0120", "r"), ("e", "d"), ("\u0120r", "ed"), ("c", "i"), ("\u0120", "s")]
SIZES = DECODER | {"cross_attention_dim": WIDTH}


class Text(nn.Module):
    """The encoder as `text2im_model.py` and `xf.py` describe it, of PyTorch's own layers."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int, channels: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.randn(length, width))
        self.padding_embedding = nn.Parameter(torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.transformer_proj = nn.Linear(width, 4 * channels)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding
        return self.layers(torch.where(mask[..., None], x, self.padding_embedding))

    def released(self, heads: int) -> dict[str, torch.Tensor]:
        """The release's names: query, key and value of each head in a row."""
        made = {}
        for name in ("token_embedding.weight", "positional_embedding", "padding_embedding"):
            made[name] = self.state_dict()[name]
        for kind in ("weight", "bias"):
            made[f"final_ln.{kind}"] = getattr(self.layers.norm, kind)
            made[f"transformer_proj.{kind}"] = getattr(self.transformer_proj, kind)
            for i, layer in enumerate(self.layers.layers):
                qkv = getattr(layer.self_attn, f"in_proj_{kind}").chunk(3)
                parts = {"attn.c_proj": layer.self_attn.out_proj, "ln_1": layer.norm1, "ln_2": layer.norm2,
                         "mlp.c_fc": layer.linear1, "mlp.c_proj": layer.linear2}  # fmt: skip
                made |= {f"transformer.resblocks.{i}.{n}.{kind}": getattr(p, kind) for n, p in parts.items()}
                made[f"transformer.resblocks.{i}.attn.c_qkv.{kind}"] = in_a_row(*qkv, heads=heads)
        return {name: value.detach().clone() for name, value in made.items()}


def make_glide(**changes) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(4)
    unet = shaken(diffusers.UNet2DConditionModel(**SIZES | changes))
    return unet, shaken(Text(len(words()), LENGTH, WIDTH, 2, HEADS, 64))


def letters() -> list[str]:
    """GPT-2's 256 letters for bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) for byte in kept] + [chr(256 + i) for i in range(len(others))]


def words() -> dict[str, int]:
    made = [*letters(), *(a + b for a, b in MERGES), "<|endoftext|>"]
    return {word: i for i, word in enumerate(made)}


@pytest.fixture
def files(tmp_path) -> Path:
    """A tokenizer as the repository has it, and the weights, in one folder."""
    place = tmp_path / "glide"
    place.mkdir()
    (place / "encoder.json.gz").write_bytes(gzip.compress(json.dumps(words()).encode()))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES), ""]
    (place / "vocab.bpe.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return place


def weights_of(unet, text) -> dict[str, torch.Tensor]:
    return karlo_unet(unet) | text.released(HEADS)


@pytest.fixture
def runs(files, imported):
    """Both runs of one file, and the networks that it is of."""
    unet, text = make_glide()
    torch.save(weights_of(unet, text), files / "base.pt")
    clip = imported("clip", files / "base.pt", f"tokenizer={files}", f"heads={HEADS}", name="glide")
    return clip, imported("decoder", files / "base.pt", "image_size=16", name="glide"), unet, text


def told(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of `padded_tokens_and_mask`."""
    ids = [list(reference_ids(caption))[:LENGTH] for caption in captions]
    mask = torch.tensor([[i < len(row) for i in range(LENGTH)] for row in ids])
    return torch.tensor([row + [len(words()) - 1] * (LENGTH - len(row)) for row in ids]), mask


def reference_ids(caption: str) -> Iterator[int]:
    """GPT-2's algorithm (Radford et al. 2019) with the pattern that it was published with."""
    regex = pytest.importorskip("regex", reason="GPT-2's pattern needs the package regex")
    known, ranks = words(), {pair: i for i, pair in enumerate(MERGES)}
    alphabet = dict(zip([*range(33, 127), *range(161, 173), *range(174, 256)], letters(), strict=False))
    rest = iter(letters()[len(alphabet) :])
    alphabet |= {byte: next(rest) for byte in range(256) if byte not in alphabet}
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for word in regex.findall(pattern, caption.lower()):
        parts = [alphabet[byte] for byte in word.encode()]
        while True:
            pairs = [(ranks[p], i) for i, p in enumerate(pairwise(parts)) if p in ranks]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        yield from (known[part] for part in parts)


@torch.no_grad()
def test_captions(runs):
    clip, _, _, text = runs
    frozen = load_clip(clip.path)
    ids, mask = told([*CAPTIONS, ""])
    made = frozen.embed_captions([*CAPTIONS, ""])
    assert torch.equal(made["text"], ids)
    wanted = text(ids, mask)
    torch.testing.assert_close(made["text_hidden"], wanted, **CLOSE)
    torch.testing.assert_close(made["text_embed"], wanted[:, -1], **CLOSE)
    assert made["text_mask"].all()  # the U-Net attends to the pads, which are learned
    assert frozen.tokenizer.too_long("circles and squares and more")
    with pytest.raises(UserError, match="embeds no pictures; this needs a CLIP"):
        frozen.embed_image(torch.zeros(1, 3, 16, 16))


@torch.no_grad()
def test_decoder(runs):
    """One step with and without caption, and 10 of them, guided by 3, with learned variance."""
    clip, decoder, unet, text = runs
    stage, manifest = load_stage(decoder.path, "decoder")
    assert manifest["origin"]["licence"] == "MIT"
    batch = load_clip(clip.path).embed_captions(CAPTIONS)
    states = text(*told(["", "", *CAPTIONS]))  # the unconditional rows: nothing but pads

    def network(x, t):
        added = text.transformer_proj(states[:, -1])
        return unet(x, t, encoder_hidden_states=states, class_labels=added).sample

    x, keep = torch.randn(2, 3, 16, 16), torch.tensor([False, False, True, True])
    rows = {key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in batch.items() if key != "text"}
    ours = stage.net(x.repeat(2, 1, 1, 1), torch.full((4,), 0.437), image_embed=torch.randn(4, WIDTH),
                     keep_image=keep, keep_text=keep, **rows)  # fmt: skip
    torch.testing.assert_close(ours, network(x.repeat(2, 1, 1, 1), 436), **CLOSE)

    def estimate(x, t, i):
        uncond, cond = network(torch.cat([x, x]), t).chunk(2)
        eps = uncond[:, :3] + 3.0 * (cond[:, :3] - uncond[:, :3])
        return torch.cat([eps, cond[:, 3:]], dim=1)

    torch.set_default_dtype(torch.float64)
    try:
        for net in (stage, unet, text):
            net.double()
        states = states.double()
        batch = {key: v.double() if v.is_floating_point() else v for key, v in batch.items()}
        draw, generator = same_draws()
        assert stage.sampler.steps == 100
        made = stage.sample(batch, sampler=stage.sampler.__class__(method="ddpm", steps=10), randn=draw)
        noise = torch.randn(2, 3, 16, 16, generator=generator)
        wanted = chain(estimate, noise, 10, generator, variance_type="learned_range").clamp(-1, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(made, wanted, **CLOSE)


@torch.no_grad()
def test_the_one_that_fills_in(files, imported):
    """`base-inpaint` reads the known pixels and their mask beside the noised picture."""
    unet, text = make_glide(in_channels=7)
    torch.save(weights_of(unet, text), files / "inpaint.pt")
    clip = imported("clip", files / "inpaint.pt", f"tokenizer={files}", f"heads={HEADS}", name="glide")
    stage, _ = load_stage(imported("decoder", files / "inpaint.pt", "image_size=16", name="glide").path)
    batch, states = load_clip(clip.path).embed_captions(CAPTIONS), text(*told(CAPTIONS))
    rows = {key: value for key, value in batch.items() if key != "text"}
    x, picture, mask = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16), torch.zeros(2, 1, 16, 16)
    mask[..., :8] = 1
    for known in (None, torch.cat([picture * mask, mask], 1)):
        seen = torch.cat([x, torch.zeros(2, 4, 16, 16) if known is None else known], 1)
        added = text.transformer_proj(states[:, -1])
        wanted = unet(seen, 436, encoder_hidden_states=states, class_labels=added).sample
        made = stage.net(x, torch.full((2,), 0.437), image_embed=states[:, -1], known=known, **rows)
        torch.testing.assert_close(made, wanted, **CLOSE)


def test_a_picture(runs):
    clip, decoder, _, _ = runs
    loaded = load_unclip(decoder.path)
    assert loaded.paths == {"clip": str(clip.path), "decoder": str(decoder.path)}
    sampler = loaded.pipeline.decoder.sampler.__class__(method="ddpm", steps=2)
    made = loaded.pipeline.sample(["a red square"], decoder={"sampler": sampler})
    assert made.shape == (1, 3, 16, 16)
    assert made.std() > 0


def test_what_does_not_fit(runs, files, refused, tmp_path):
    _, decoder, unet, text = runs
    assert "give tokenizer=FOLDER" in refused("clip", files / "base.pt", name="other")
    assert "lacks encoder.json" in refused("clip", files / "base.pt", f"tokenizer={tmp_path}", name="other")
    more = weights_of(unet, text)
    more["token_embedding.weight"] = torch.zeros(999, WIDTH)
    torch.save(more, tmp_path / "more.pt")
    line = refused("clip", tmp_path / "more.pt", f"tokenizer={files}", name="other")
    assert f"reads 999 tokens, but {files} has {len(words())}" in line
    (files / "vocab.bpe.gz").write_bytes(gzip.compress(b"#version: 0.2\nno pair here\n"))
    line = refused("clip", files / "base.pt", f"tokenizer={files}", name="other")
    assert "is damaged (a line of the merges is no pair)" in line
    less = {name: value for name, value in weights_of(unet, text).items() if "encoder_kv" not in name}
    torch.save(less, tmp_path / "less.pt")
    assert "is no whole decoder: it lacks decoder." in refused(
        "decoder", tmp_path / "less.pt", f"clip={decoder.path.parent / 'clip'}", name="other"
    )


def test_the_public_shapes(monkeypatch):
    """Without memory: 192 channels, 3 blocks, attention at 32, 16 and 8; 16 layers of 512; 50,257 tokens."""
    cross = ("SimpleCrossAttnDownBlock2D",) * 3, ("SimpleCrossAttnUpBlock2D",) * 3
    sizes = SIZES | {
        "sample_size": 64, "layers_per_block": 3, "block_out_channels": (192, 384, 576, 768),
        "cross_attention_dim": 512, "down_block_types": ("ResnetDownsampleBlock2D", *cross[0]),
        "up_block_types": (*cross[1], "ResnetUpsampleBlock2D"),
    }  # fmt: skip
    with torch.device("meta"):
        unet, text = diffusers.UNet2DConditionModel(**sizes), Text(50257, 128, 512, 16, 8, 192)
        weights = karlo_unet(unet) | text.released(8)

    monkeypatch.setattr(glide, "load_clip", lambda path: FakeCLIP(512, 128))
    bpe = GlideBPE.of_files(words(), [" ".join(pair) for pair in MERGES], 128)
    bpe.vocab_size = 50257
    monkeypatch.setattr(glide, "read_tokenizer", lambda folder, length: bpe)
    source = PublicWeights(Path("base.pt"), weights)
    both = import_clip(source, tokenizer="glide"), import_decoder(source, clip="clip")
    used = []
    for found in both:
        with torch.device("meta"):
            net = instantiate(found.model["net"])
        check_same(found.tensors, net.state_dict(), Path("public"), found.stage)
        used += [name for name in found.tensors if "empty_" not in name]
    assert len(used) == len(weights) + sum(".qkv." in n for n in weights) * 2 + sum(
        "_kv." in n for n in weights
    )
    assert both[0].model["net"]["heads"] == 8
