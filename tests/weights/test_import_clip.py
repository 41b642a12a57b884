"""A CLIP that was imported gives what the library gives that its weights come from."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dalle.errors import UserError
from dalle.nets.clip import CLIP, PIXEL_MEAN, PIXEL_STD
from dalle.run_dir import load_clip, load_stage
from dalle.weights.clip import import_clip
from dalle.weights.reading import PublicWeights

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")
VISION = {"layers": 2, "width": 128, "patch_size": 8, "image_size": 32}
RESNET = {"layers": (1, 2, 1, 1), "width": 16, "image_size": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
CAPTIONS = ["a red square", "", "two small blue circles on a green field"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def of_open_clip(seed: int = 0, quick_gelu: bool = True, **vision):
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(
        32,
        open_clip.model.CLIPVisionCfg(**VISION | vision),
        open_clip.model.CLIPTextCfg(**TEXT),
        quick_gelu=quick_gelu,
    )
    return model.eval()


def of_transformers(seed: int = 0, act: str = "quick_gelu"):
    torch.manual_seed(seed)
    vision = {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 8, "hidden_act": act,
    }  # fmt: skip
    text = {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": act,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    return transformers.CLIPModel(config).eval()


def pictures(size: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def normalised(image: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return ((image + 1) / 2 - mean) / std


def as_openai(model) -> dict[str, torch.Tensor]:
    """A state dict as OpenAI's files hold it: in half precision, with three numbers beside the weights."""
    half = {name: value.half() for name, value in model.state_dict().items()}
    return half | {
        "input_resolution": torch.tensor(32), "context_length": torch.tensor(77),
        "vocab_size": torch.tensor(49408),
    }  # fmt: skip


@torch.no_grad()
def assert_equals_open_clip(run, model, image_size: int = 32) -> None:
    ours = load_clip(run.path)
    text = open_clip.tokenize(CAPTIONS)
    made = ours.embed_captions(CAPTIONS)
    assert torch.equal(made["text"], text)  # 77 tokens of CLIP's own BPE
    torch.testing.assert_close(made["text_embed"], model.encode_text(text), **CLOSE)
    image = pictures(image_size)
    torch.testing.assert_close(ours.embed_image(image), model.encode_image(normalised(image)), **CLOSE)


def of_open_clip_with_resnet(seed: int = 0, **vision):
    """No weight or statistic of a norm is left at 0 or 1, so that none could be missed."""
    model = of_open_clip(seed, **RESNET | vision)
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.visual.state_dict().items():
        if value.is_floating_point() and value.ndim == 1:
            shake = torch.rand(value.shape, generator=generator)
            value.copy_(shake + 0.5 if name.endswith(("weight", "var")) else shake - 0.5)
    return model


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_open_clip(tmp_path, imported, quick_gelu):
    model = of_open_clip(quick_gelu=quick_gelu)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    activation = "activation=" + ("quick_gelu" if quick_gelu else "gelu")
    assert_equals_open_clip(imported("clip", tmp_path / "w.safetensors", activation), model)


def test_a_folder_of_open_clip_says_activation_and_heads(tmp_path, imported, capsys):
    model = of_open_clip(quick_gelu=False, head_width=32)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    cfg = {"embed_dim": 32, "vision_cfg": VISION | {"head_width": 32}, "text_cfg": TEXT}
    config = {"model_cfg": cfg, "preprocess_cfg": {"mean": PIXEL_MEAN, "std": PIXEL_STD}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    run = imported("clip", tmp_path, "licence=MIT")
    assert_equals_open_clip(run, model)
    assert run.manifest("origin")["origin"]["licence"] == "MIT"
    assert "careful" not in capsys.readouterr().out
    assert load_file(run.path / "model.safetensors").keys() == model.state_dict().keys()


class Program(torch.nn.Module):
    """Weights and numbers under OpenAI's names, to be made a TorchScript archive of."""

    def __init__(self, model) -> None:
        super().__init__()
        self.visual, self.transformer = model.visual, model.transformer
        self.token_embedding, self.ln_final = model.token_embedding, model.ln_final
        self.positional_embedding, self.text_projection = model.positional_embedding, model.text_projection
        self.logit_scale = model.logit_scale
        for name, number in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
            self.register_buffer(name, torch.tensor(number))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image * self.logit_scale


@pytest.mark.parametrize("image_size", [32, 64])
def test_a_resnet(tmp_path, imported, image_size):
    """Its activation is ReLU; QuickGELU is in the tower of captions alone."""
    model = of_open_clip_with_resnet(image_size=image_size)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    run = imported("clip", tmp_path / "w.safetensors", "activation=quick_gelu")
    assert_equals_open_clip(run, model, image_size)
    gelu = imported("clip", tmp_path / "w.safetensors", "activation=gelu", name="gelu")
    image, (a, b) = pictures(image_size), (load_clip(r.path) for r in (run, gelu))
    assert torch.equal(a.embed_image(image), b.embed_image(image))
    assert not torch.allclose(
        a.embed_captions(CAPTIONS)["text_embed"], b.embed_captions(CAPTIONS)["text_embed"]
    )


def test_a_folder_of_open_clip_says_the_heads_of_a_resnet(tmp_path, imported):
    model = of_open_clip_with_resnet(head_width=32)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    cfg = {"embed_dim": 32, "quick_gelu": True, "vision_cfg": RESNET | {"head_width": 32}, "text_cfg": TEXT}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
    assert_equals_open_clip(imported("clip", tmp_path), model)


def test_a_resnet_learns_further(tmp_path, imported):
    save_file(of_open_clip_with_resnet().state_dict(), tmp_path / "w.safetensors")
    run = imported("clip", tmp_path / "w.safetensors", "activation=quick_gelu")
    stage, _ = load_stage(run.path, "clip")
    stage.train().requires_grad_(True)
    text = open_clip.tokenize(CAPTIONS[:2])
    stage.step({"image": pictures(), "text": text})["loss"].backward()
    assert [name for name, p in stage.net.visual.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", ["state dict", "before 1.6", "TorchScript", "ResNet"])
def test_openai(tmp_path, imported, kind, capsys):
    model, place = of_open_clip(seed=3), tmp_path / "ViT-T-8.pt"
    if kind == "ResNet":
        model, kind = of_open_clip_with_resnet(seed=3), "TorchScript"
    model.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})
    if kind == "TorchScript":
        torch.jit.save(torch.jit.trace(Program(model).eval(), pictures()), place)
    else:
        new = kind == "state dict"
        torch.save({"state_dict": as_openai(model)}, place, _use_new_zipfile_serialization=new)
    run = imported("clip", place)
    assert_equals_open_clip(run, model)
    origin = run.manifest("origin")["origin"]
    assert origin["layout"] == "openai"
    assert origin["licence"] == "MIT"
    assert list(origin["files"]) == [place.name]
    assert load_clip(run.path).net.transformer.resblocks[0].mlp.gelu.__class__.__name__ == "QuickGELU"
    assert "careful" not in capsys.readouterr().out


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_transformers(tmp_path, imported, act):
    model = of_transformers(act=act)
    model.save_pretrained(tmp_path / "hf")
    ours = load_clip(imported("clip", tmp_path / "hf").path)
    made, image = ours.embed_captions(CAPTIONS), pictures()
    theirs = model(input_ids=made["text"], pixel_values=normalised(image))
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(made["text_embed"], dim=-1), theirs.text_embeds, **CLOSE)
    torch.testing.assert_close(unit(ours.embed_image(image), dim=-1), theirs.image_embeds, **CLOSE)
    torch.testing.assert_close(
        made["text_hidden"], model.text_model(input_ids=made["text"]).last_hidden_state, **CLOSE
    )


RESNETS = ["RN50-quickgelu", "RN101-quickgelu", "RN50x4-quickgelu", "RN50x16-quickgelu", "RN50x64-quickgelu"]


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", *RESNETS])
def test_the_public_shapes(name):
    """Without memory: names, shapes and the sizes that are read off them."""
    with torch.device("meta"):
        config = open_clip.get_model_config(name)
        config.pop("quick_gelu", None)
        model = open_clip.model.CLIP(**config)
    found = import_clip(PublicWeights(Path(name), model.state_dict()), "quick_gelu")
    with torch.device("meta"):
        ours = CLIP(**{key: value for key, value in found.model["net"].items() if key != "_target_"})
    wanted = {key: value.shape for key, value in ours.state_dict().items()}
    assert {key: value.shape for key, value in found.tensors.items()} == wanted
    assert ours.text_width // 64 == model.transformer.resblocks[0].attn.num_heads
    assert ours.image_size == config["vision_cfg"]["image_size"]
    if name in RESNETS:
        assert ours.visual.attnpool.heads == model.visual.attnpool.num_heads


# What is refused, each in one line


def test_what_cannot_be_known_is_asked_for(tmp_path, refused):
    save_file(of_open_clip().state_dict(), tmp_path / "w.safetensors")
    assert "give activation=quick_gelu" in refused("clip", tmp_path / "w.safetensors")
    line = refused("clip", tmp_path / "w.safetensors", "activation=gelu", "tokenizer=here")
    assert "holds weights of another kind than tokenizer= is for" in line
    wide = of_open_clip(width=1280, layers=1, head_width=80)
    save_file(wide.state_dict(), tmp_path / "wide.safetensors")
    assert "vision_heads=" in refused("clip", tmp_path / "wide.safetensors", "activation=gelu")
    date = refused("clip", tmp_path / "wide.safetensors", "activation=gelu", "vision_heads=2020-01-01")
    assert "vision_heads must be" in date


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda w: w.pop("ln_final.bias"), "no whole clip: it lacks ln_final.bias"),
        (lambda w: w.update(extra=torch.zeros(1)), "it also holds extra"),
        (lambda w: w.update({"ln_final.bias": torch.zeros(3)}), "ln_final.bias is (3,), not (64,)"),
        (lambda w: w.update({"ln_final.bias": torch.full((64,), torch.nan)}), "no numbers (ln_final.bias)"),
        (lambda w: w.pop("visual.conv1.weight"), "is no CLIP: it lacks visual.conv1.weight"),
        (lambda w: w.update({"token_embedding.weight": torch.zeros(99, 64)}), "another vocabulary (99"),
        (lambda w: w.update({"visual.layer1.0.conv1.weight": torch.zeros(2)}), "lacks visual.attnpool"),
        (lambda w: w.update({"visual.positional_embedding": torch.zeros(19, 128)}), "not square"),
    ],
)
def test_other_tensors(tmp_path, refused, change, line):
    weights = dict(of_open_clip().state_dict())
    change(weights)
    torch.save(weights, tmp_path / "w.pt")
    assert line in refused("clip", tmp_path / "w.pt", "activation=gelu")


def test_other_pixels(tmp_path, refused):
    of_transformers().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    assert "another image_mean" in refused("clip", tmp_path)


def test_a_run_that_is_there_stays(tmp_path, imported):
    save_file(of_open_clip().state_dict(), tmp_path / "w.safetensors")
    run = imported("clip", tmp_path / "w.safetensors", "activation=gelu")
    before = (run.path / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="already holds a run; give another name="):
        imported("clip", tmp_path / "w.safetensors", "activation=quick_gelu")
    assert (run.path / "manifest.json").read_bytes() == before
