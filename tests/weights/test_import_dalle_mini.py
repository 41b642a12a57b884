"""DALL-E mini, imported from min-dalle's files, gives min-dalle's logits, codes and ids of captions."""

import json
from pathlib import Path

import pytest
import torch
from public import CLOSE, TAMING, Released
from torch import nn

from dalle.autoregressive.sampling import generate
from dalle.instantiate import instantiate
from dalle.run_dir import Run, load_stage
from dalle.weights import dalle_mini
from dalle.weights.reading import PublicWeights
from dalle.weights.writing import check_same

threads = torch.get_num_threads()
models = pytest.importorskip("min_dalle.models", reason="the package min-dalle is not installed")
torch.set_grad_enabled(True)  # both of which the package changes for all that is in the process
torch.set_num_threads(threads)

MINI = {
    "layer_count": 2, "embed_count": 64, "attention_head_count": 2, "glu_embed_count": 96, "device": "cpu"
}  # fmt: skip
TEXT = {"text_vocab_count": 300, "text_token_count": 64}
WORDS = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    "\u0120",
    *"abcdefghijklmnopqrstuvwxyz,.",
    "\u0120c",
    "at",
    "\u0120cat",
]
MERGES = ["#version: 0.2", "\u0120 c", "a t", "\u0120c at"]


def make(sizes=MINI, text=TEXT, codes: int = 16384):
    torch.manual_seed(0)
    encoder = models.DalleBartEncoder(**sizes, **text)
    decoder = models.DalleBartDecoder(**sizes, image_vocab_count=codes)
    return encoder.eval(), decoder.eval()


@pytest.fixture
def run(tmp_path, imported):
    """The transformer's run, and min-dalle's two halves."""
    encoder, decoder = make()
    with torch.no_grad():
        for half in (encoder, decoder):
            for p in half.parameters():
                p += 0.1 * torch.randn(p.shape)
    place = tmp_path / "dalle_bart_mini"
    place.mkdir()
    torch.save(encoder.state_dict(), place / "encoder_mini.pt")
    torch.save(decoder.state_dict(), place / "decoder_mini.pt")
    (place / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
    (place / "merges.txt").write_text("\n".join(MERGES) + "\n")
    vqgan = Released(TAMING | {"ch_mult": (1, 1, 1, 1, 1), "attn_resolutions": []}, 256, 16384, False)
    torch.save(vqgan.state_dict(), tmp_path / "vqgan.pt")
    imported("vqgan", tmp_path / "vqgan.pt")
    return imported("dalle", place, "heads=2"), encoder, decoder


@torch.no_grad()
def test_equals_min_dalle(run):
    run, encoder, decoder = run
    stage, manifest = load_stage(run.path, "dalle")
    assert manifest["image_tokenizer"]["vocab_size"] == 16384
    text = torch.ones(2, 64, dtype=torch.int64)
    text[0, :2] = torch.tensor([0, 2])  # without a caption, which comes first there
    text[1, :6] = torch.tensor([0, 40, 41, 7, 8, 2])
    state = encoder(text)
    codes = torch.randint(16384, (1, 255), generator=torch.Generator().manual_seed(1))
    start = torch.full((1, 1), 2**14 - 1)
    mask = text.not_equal(1)[:, None, None, :]
    cache = torch.zeros(2, 4, 256, 64)
    theirs, _ = decoder(mask, state, cache, torch.cat([start, codes], 1), torch.arange(256))
    both, keep = text[1:].repeat(2, 1), torch.tensor([False, True])
    known = torch.cat([codes, codes[:, :1]], 1).repeat(2, 1)
    _, ours = stage.net(both, known, keep)
    torch.testing.assert_close(ours, theirs[..., : 2**14], **CLOSE)
    # one code at a time, with the cache
    logits, cache = stage.net.prefill(both, keep, known[:, :3])
    torch.testing.assert_close(logits, theirs[:, 3, : 2**14], **CLOSE)
    for rank in (3, 4, 5):
        logits = stage.net.step(known[:, rank], rank, cache)
        torch.testing.assert_close(logits, theirs[:, rank + 1, : 2**14], **CLOSE)


@torch.no_grad()
def test_the_likeliest_codes_are_min_dalles(run):
    """Guided by 16: super-conditioning there."""
    run, encoder, decoder = run
    stage, _ = load_stage(run.path, "dalle")
    text = torch.ones(2, 64, dtype=torch.int64)
    text[0, :2], text[1, :4] = torch.tensor([0, 2]), torch.tensor([0, 40, 41, 2])
    state, mask = encoder(text), text.not_equal(1)[:, None, None, :]
    cache, tokens = torch.zeros(2, 4, 256, 64), torch.full((1, 9), 2**14 - 1)
    for i in range(8):
        logits, cache = decoder(mask, state, cache, tokens[:, [i]], torch.tensor([i]))
        null, told = logits[:, -1, : 2**14]
        tokens[0, i + 1] = (null * (1 - 16) + told * 16).argmax()
    known = torch.cat([torch.full((1, 8), -1), torch.zeros(1, 248, dtype=torch.int64)], 1)
    ours = generate(stage.net, text[1:], temperature=0, guidance=16.0, known=known)
    assert torch.equal(ours[:, :8], tokens[:, 1:])


def test_ids_of_captions(run):
    run, _, _ = run
    tokenizer = Run(run.path).load_tokenizer()
    text_tokenizer = pytest.importorskip("min_dalle.text_tokenizer", reason="min-dalle's needs emoji")
    words = {word: i for i, word in enumerate(WORDS)}
    theirs = text_tokenizer.TextTokenizer(words, MERGES[1:])
    for caption in ("A cat", "caf\u00e9 cat,  scat!", "", "zebra " * 3):
        ids = theirs.tokenize(caption)
        assert tokenizer([caption])[0, : len(ids)].tolist() == ids
    assert tokenizer.too_long("a " * 63)
    assert tokenizer(["a " * 99])[0, -1] == 2


def test_start_of_dalle_mini(run, tmp_path, imported):
    """Two conventions: another row of the table before the first code gives other logits."""
    first, _, _ = run
    place = tmp_path / "dalle_bart_mini"
    vqgan = f"image_tokenizer={tmp_path / 'logs' / 'mine' / 'vqgan'}"
    other = imported("dalle", place, "heads=2", "start=16384", vqgan, name="other")
    text, none = torch.tensor([[0, 40, 2, *[1] * 61]]), torch.zeros(1, 0, dtype=torch.int64)
    made = [load_stage(r.path, "dalle")[0].net.prefill(text, None, none)[0] for r in (first, other)]
    assert not torch.allclose(*made)


@pytest.mark.parametrize("mega", [False, True])
def test_the_public_shapes(monkeypatch, mega):
    class Images:
        grid, vocab_size, image_size, weights_hash = 16, 16384, 256, "0" * 16

    monkeypatch.setattr(dalle_mini, "load_image_tokenizer", lambda path: Images)
    monkeypatch.setattr(dalle_mini, "read_tokenizer", lambda *_: None)
    monkeypatch.setattr(dalle_mini, "tokenizer_facts", lambda _: {})
    names = ("layer_count", "embed_count", "attention_head_count", "glu_embed_count")
    sizes = dict(zip(names, (24, 2048, 32, 4096) if mega else (12, 1024, 16, 2730), strict=True))
    with torch.device("meta"):
        text = {"text_vocab_count": 50272 if mega else 50264, "text_token_count": 64}
        halves = make(sizes | {"device": "meta"}, text, 16415 if mega else 16384)
    weights = {
        f"{half}.{name}": value
        for half, net in zip(("encoder", "decoder"), halves, strict=True)
        for name, value in net.state_dict().items()
    }
    found = dalle_mini.import_dalle(PublicWeights(Path("min-dalle"), weights), image_tokenizer="vqgan")
    with torch.device("meta"):
        net: nn.Module = instantiate(found.model["net"])
    check_same(found.tensors, net.state_dict(), Path("public"), "dalle")
    assert found.model["net"]["heads"] == sizes["attention_head_count"]


def test_it_trains(run):
    stage, _ = load_stage(run[0].path, "dalle")
    stage.train().requires_grad_(True)
    text = torch.tensor([[0, 40, 2, *[1] * 61]])
    out = stage.step({"text": text, "codes": torch.randint(16384, (1, 256))})
    out["loss"].backward()
    assert all(p.grad is not None for p in stage.net.parameters())
