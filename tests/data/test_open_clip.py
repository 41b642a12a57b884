"""An open_clip model in place of our own: the embeddings open_clip gives, from weights on disk."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from torchvision.transforms.functional import to_pil_image

open_clip = pytest.importorskip("open_clip")

from dalle.data.frozen import weights_hash  # noqa: E402
from dalle.data.open_clip import OpenClipNet, load_open_clip  # noqa: E402
from dalle.errors import UserError  # noqa: E402

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
CONFIGS = {
    "test-vit": {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": TEXT,
    },
    "test-resnet": {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
        "text_cfg": TEXT,
    },
    "test-pooled-last": {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": TEXT | {"pool_type": "last"},
    },
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of tiny models by name, their architectures made known to open_clip."""
    folder = tmp_path_factory.mktemp("open_clip")
    paths = {}
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
        torch.manual_seed(1)
        paths[name] = folder / f"{name}.safetensors"
        save_file(open_clip.create_model(name).state_dict(), paths[name])
    return paths


@pytest.mark.parametrize("name", ["test-vit", "test-resnet"])
def test_embeddings_equal_open_clip_with_its_own_preprocessing(weights, name):
    frozen = load_open_clip(name, str(weights[name]))
    model, preprocess = open_clip.create_model_from_pretrained(name, str(weights[name]))
    model.eval()
    size = frozen.image_size
    picture = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    captions = ["a red circle", "A photo of two cats " * 8]
    with torch.no_grad():
        image_embed = model.encode_image(preprocess(to_pil_image(picture))[None])
        text_embed = model.encode_text(open_clip.get_tokenizer(name)(captions))
    torch.testing.assert_close(
        frozen.embed_image(picture[None] / 127.5 - 1), image_embed, atol=1e-5, rtol=1e-5
    )
    out = frozen.embed_captions(captions)
    torch.testing.assert_close(out["text_embed"], text_embed, atol=1e-5, rtol=1e-5)
    assert out["text_mask"].sum(1).tolist() == [5, 16]
    assert (frozen.embed_dim, frozen.text_width, frozen.context_length) == (12, 16, 16)
    assert out["text_hidden"].shape == (2, 16, 16)
    end = out["text_hidden"][torch.arange(2), out["text"].argmax(1)]
    torch.testing.assert_close(end @ model.text_projection.detach(), text_embed, atol=1e-5, rtol=1e-5)


def test_resizing_is_that_of_open_clip(weights):
    frozen = load_open_clip("test-vit", str(weights["test-vit"]))
    model, preprocess = open_clip.create_model_from_pretrained("test-vit", str(weights["test-vit"]))
    ramp = torch.linspace(0, 255, 80).round().to(torch.uint8)
    picture = torch.stack([ramp.expand(80, 80), ramp[:, None].expand(80, 80), ramp.flip(0).expand(80, 80)])
    with torch.no_grad():
        expected = model.encode_image(preprocess(to_pil_image(picture))[None])
    ours = frozen.embed_image(picture[None] / 127.5 - 1)
    assert torch.cosine_similarity(ours, expected).item() > 0.9999  # PIL rounds to whole grey levels


def test_saved_with_torch_or_safetensors_is_the_same_clip(weights, tmp_path):
    original = load_open_clip("test-vit", str(weights["test-vit"]))
    path = tmp_path / "weights.pt"
    torch.save(original.net.model.state_dict(), path)
    copy = load_open_clip("test-vit", str(path))
    assert copy.weights_hash == original.weights_hash == weights_hash(OpenClipNet(original.net.model))
    assert not any(p.requires_grad for p in copy.parameters())


def test_a_tag_of_openai_brings_its_activation(weights, monkeypatch, capsys):
    """With "ViT-B-32" (exact GELU) and OpenAI's weights open_clip warns, and computes something else."""
    made = {}

    def create(name, pretrained, **options):
        made.update(options, name=name, pretrained=pretrained)
        return open_clip.model.CLIP(12, **{k: CONFIGS["test-vit"][k] for k in ("vision_cfg", "text_cfg")})

    monkeypatch.setattr(open_clip, "create_model", create)
    monkeypatch.setattr(
        open_clip, "get_model_preprocess_cfg", lambda _: {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    )
    for tag, quick in (("openai", True), ("laion2b_s34b_b79k", False)):
        load_open_clip("ViT-B-32", tag)
        assert made["quick_gelu"] is quick
        said = capsys.readouterr().out
        assert said.count("\n") == 1
        assert f"ViT-B-32 ({tag})" in said


def test_no_network_is_said_in_one_line(monkeypatch):
    def offline(*_, **__):
        raise RuntimeError("Failed to download weights for tag 'openai': no route to host\nlong explanation")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(UserError, match=r"clip\.pretrained=PATH.*no route to host\)$"):
        load_open_clip("ViT-B-32", "openai")


def test_mistakes_are_said(weights, tmp_path, monkeypatch):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(weights["test-vit"].read_bytes()[:1000])
    for name, pretrained, message in [
        ("ViT-B-23", "openai", "close to it: .*ViT-B-32"),
        ("ViT-B-32", "opneai", "neither a file nor a tag.*openai"),
        ("test-vit", str(broken), "is it of this model"),
        ("test-vit", str(weights["test-resnet"]), "is it of this model"),
        ("test-pooled-last", str(weights["test-pooled-last"]), "text tower is not CLIP's own"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load_open_clip(name, pretrained)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"pip install dalle\[open_clip\]"):
        load_open_clip("test-vit", str(broken))
