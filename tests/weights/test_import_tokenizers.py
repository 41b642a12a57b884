"""OpenAI's dVAE and taming's VQGANs, imported, make the codes and the pictures of their releases' code."""

from pathlib import Path

import pytest
import torch
from public import CLOSE, TAMING, Released
from safetensors.torch import save_file
from torch import nn

from dalle.instantiate import instantiate
from dalle.run_dir import load_image_tokenizer, load_stage
from dalle.weights.reading import PublicWeights
from dalle.weights.tokenizers import import_dvae, import_vqgan
from dalle.weights.writing import check_same


def pictures(size: int, n: int = 2) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def fits(found) -> None:
    """Every tensor is one of the network's, and the network has no others; nothing is allocated."""
    with torch.device("meta"):
        net = instantiate(found.model["net"])
    check_same(found.tensors, net.state_dict(), Path("public"), found.stage)


# OpenAI's dVAE


def openai_halves(**sizes):
    dall_e = pytest.importorskip("dall_e", reason="OpenAI's package dall-e is not installed")
    torch.manual_seed(0)
    halves = dall_e.Encoder(**sizes), dall_e.Decoder(**sizes)
    for half in halves:
        for name, p in half.named_parameters():
            nn.init.normal_(p, std=0.3 if name.endswith("b") else p[0].numel() ** -0.5)
    return halves


@pytest.mark.parametrize("kind", ["pickles", "pickles before 1.6", "state dict"])
@torch.no_grad()
def test_openai_dvae(tmp_path, imported, kind):
    dall_e = pytest.importorskip("dall_e", reason="OpenAI's package dall-e is not installed")
    encoder, decoder = openai_halves(n_hid=64, vocab_size=512)
    place = tmp_path / "dall-e"
    place.mkdir()
    if kind == "state dict":
        halves = {"encoder.": encoder, "decoder.": decoder}
        place = place / "both.safetensors"
        save_file({h + name: v for h, half in halves.items() for name, v in half.state_dict().items()}, place)
    else:
        for name, half in (("encoder", encoder), ("decoder", decoder)):
            torch.save(half, place / f"{name}.pkl", _use_new_zipfile_serialization=kind == "pickles")
    ours = load_image_tokenizer(imported("dvae", place, "image_size=32").path)
    assert ours.grid == 4
    image = pictures(32)
    mapped = dall_e.map_pixels((image + 1) / 2)
    torch.testing.assert_close(ours.net.map_pixels(image), mapped, **CLOSE)
    logits = encoder(mapped)
    torch.testing.assert_close(ours.net.logits(image), logits, **CLOSE)
    codes = logits.argmax(dim=1)
    assert torch.equal(ours.encode(image), codes.flatten(1))
    one_hot = nn.functional.one_hot(codes, 512).permute(0, 3, 1, 2).float()
    stats = decoder(one_hot).float()
    torch.testing.assert_close(torch.cat(ours.net.likelihood(codes.flatten(1)), dim=1), stats, **CLOSE)
    theirs = dall_e.unmap_pixels(torch.sigmoid(stats[:, :3])) * 2 - 1
    torch.testing.assert_close(ours.decode(codes.flatten(1)), theirs, **CLOSE)


def test_the_public_dvae():
    with torch.device("meta"):
        encoder, decoder = openai_halves(device=None)
    halves = {"encoder.": encoder, "decoder.": decoder}
    weights = {h + name: v for h, half in halves.items() for name, v in half.state_dict().items()}
    found = import_dvae(PublicWeights(Path("dall-e"), weights))
    fits(found)
    net = found.model["net"]
    assert (net["vocab_size"], net["width"], net["code_dim"], net["factor"]) == (8192, 256, 128, 8)
    assert (net["groups"], net["blocks"]) == (4, 2)  # residual branches count 1 / 64


# taming's VQGANs

F16 = {"ch": 128, "ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2, "attn_resolutions": [16]}
F8 = {"ch": 128, "ch_mult": (1, 1, 2, 4), "num_res_blocks": 2, "attn_resolutions": [32]}
PUBLIC = {  # name -> sizes of the release's configuration, vocabulary, whether it is the Gumbel kind
    "f16-1024": (F16, 1024, False),
    "f16-16384": (F16, 16384, False),
    "gumbel-f8": (F8, 8192, True),
}


@pytest.mark.parametrize("gumbel", [False, True])
@torch.no_grad()
def test_taming(tmp_path, imported, gumbel):
    torch.manual_seed(0)
    theirs = Released(TAMING, 32, 64, gumbel).eval()
    if not gumbel:
        nn.init.normal_(theirs.quantize.embedding.weight)  # so that pictures have more than one code
    weights = {**theirs.state_dict(), "loss.discriminator.main.0.weight": torch.zeros(1)}
    torch.save({"state_dict": weights, "epoch": 3, "optimizer_states": [{}]}, tmp_path / "last.ckpt")
    run = imported("vqgan", tmp_path / "last.ckpt", "image_size=32")
    ours, image = load_image_tokenizer(run.path), pictures(32)
    z = theirs.quant_conv(theirs.encoder(image))
    torch.testing.assert_close(ours.net.latents(image), z, **CLOSE)
    if gumbel:
        codes = theirs.quantize.proj(z).argmax(dim=1)
        vectors = theirs.quantize.get_codebook_entry(codes.flatten(), (2, 8, 8, 32))
    else:
        vectors, loss, (_, _, codes) = theirs.quantize(z)
        torch.testing.assert_close(ours.net(image)[2], loss, **CLOSE)
    assert torch.equal(ours.encode(image), codes.view(2, 64))
    assert len(codes.unique()) > 3
    torch.testing.assert_close(ours.decode(codes.view(2, 64)), theirs.decode(vectors).clamp(-1, 1), **CLOSE)
    torch.testing.assert_close(ours.net(image)[0], theirs.decode(vectors), **CLOSE)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_vqgans(name):
    sizes, vocabulary, gumbel = PUBLIC[name]
    with torch.device("meta"):
        theirs = Released(sizes, 256, vocabulary, gumbel)
    found = import_vqgan(PublicWeights(Path(name), theirs.state_dict()))
    fits(found)
    assert found.model["net"]["gumbel"] is gumbel
    with torch.device("meta"):
        assert instantiate(found.model["net"]).grid == (32 if gumbel else 16)


@pytest.mark.parametrize("gumbel", [False, True])
def test_an_imported_vqgan_can_be_trained(tmp_path, imported, gumbel):
    torch.manual_seed(0)
    torch.save(Released(TAMING, 32, 64, gumbel).state_dict(), tmp_path / "w.pt")
    stage, _ = load_stage(imported("vqgan", tmp_path / "w.pt", "image_size=32").path, "vqgan")
    stage.net.train().requires_grad_(True)
    made, _, pull = stage.net(pictures(32))
    (made.square().mean() + pull).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.net.encoder.parameters())


def test_the_wrong_kind(tmp_path, refused):
    torch.manual_seed(0)
    torch.save(Released(TAMING, 32, 64, False).state_dict(), tmp_path / "w.pt")
    assert "is no dVAE of OpenAI's: it lacks encoder.blocks.input.w" in refused("dvae", tmp_path / "w.pt")
    assert "is no CLIP: it lacks token_embedding.weight" in refused("clip", tmp_path / "w.pt")
