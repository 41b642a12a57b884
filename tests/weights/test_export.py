"""What is exported is loaded by the libraries it is for, and gives there what it gives here."""

import json

import pytest
import torch
from conftest import untrained
from public import CLOSE, TAMING, E, Released, clip_weights, make_decoder, make_prior, make_upsampler
from safetensors.torch import save_file

from dalle.cli.export_weights import main
from dalle.errors import UserError
from dalle.nets.clip import CLIP, PIXEL_MEAN, PIXEL_STD
from dalle.run_dir import load_clip, load_image_tokenizer

CAPTIONS = ["a red square", "two small blue circles"]


def normalised(image: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return ((image + 1) / 2 - mean) / std


@pytest.fixture
def clip(tmp_path, imported):
    pytest.importorskip("open_clip", reason="CLIP's own tokenizer needs the package open_clip_torch")
    save_file(clip_weights(), tmp_path / "clip.safetensors")
    return imported("clip", tmp_path / "clip.safetensors", "activation=quick_gelu")


@torch.no_grad()
def test_clip_for_transformers(tmp_path, clip):
    transformers = pytest.importorskip("transformers")
    main(["clip", str(clip.path), str(tmp_path / "out")])
    theirs, report = transformers.CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours, image = load_clip(clip.path), torch.rand(2, 3, 32, 32) * 2 - 1
    made = ours.embed_captions(CAPTIONS)
    there = theirs.eval()(input_ids=made["text"], pixel_values=normalised(image))
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(made["text_embed"], dim=-1), there.text_embeds, **CLOSE)
    torch.testing.assert_close(unit(ours.embed_image(image), dim=-1), there.image_embeds, **CLOSE)


@torch.no_grad()
def test_a_clip_of_ones_own_for_transformers(tmp_path):
    """With a tokenizer of its own captions, whose end token is the largest id."""
    transformers = pytest.importorskip("transformers")
    run = untrained("clip", tmp_path / "logs", "model.net.vision=vit", "model.net.patch_size=8")
    main(["clip", str(run.path), str(tmp_path / "out")])
    ours, theirs = load_clip(run.path), transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
    made, image = ours.embed_captions(CAPTIONS), torch.rand(2, 3, 16, 16) * 2 - 1
    there = theirs(input_ids=made["text"], pixel_values=normalised(image))
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(made["text_embed"], dim=-1), there.text_embeds, **CLOSE)
    torch.testing.assert_close(unit(ours.embed_image(image), dim=-1), there.image_embeds, **CLOSE)


@pytest.fixture
def resnet(tmp_path, imported):
    """A CLIP with a ResNet, whose heads are not 64 wide."""
    pytest.importorskip("open_clip", reason="CLIP's own tokenizer needs the package open_clip_torch")
    torch.manual_seed(0)
    net = CLIP(64, 32, 8, [1, 2, 1, 1], E, 1, 77, 49408, E, 1, 8, "quick_gelu", vision="resnet")
    save_file(net.state_dict(), tmp_path / "resnet.safetensors")
    place = tmp_path / "resnet.safetensors"
    return imported("clip", place, "activation=quick_gelu", "vision_heads=8", name="resnet")


@pytest.mark.parametrize("kind", ["clip", "resnet"])
@torch.no_grad()
def test_clip_for_open_clip(tmp_path, request, kind):
    open_clip, clip = pytest.importorskip("open_clip"), request.getfixturevalue(kind)
    main(["clip", str(clip.path), str(tmp_path / "out"), "layout=open_clip"])
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    ours = load_clip(clip.path)
    image, made = torch.rand(2, 3, *[ours.net.image_size] * 2) * 2 - 1, ours.embed_captions(CAPTIONS)
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(CAPTIONS), made["text"])
    torch.testing.assert_close(theirs.encode_text(made["text"]), made["text_embed"], **CLOSE)
    torch.testing.assert_close(theirs.encode_image(normalised(image)), ours.embed_image(image), **CLOSE)


def equal(net, other) -> None:
    theirs, ours = net.state_dict(), other.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    # what a network does beside its weights is in its configuration
    told, here = (json.loads(n.to_json_string()) for n in (net, other))
    assert {k: v for k, v in told.items() if k[0] != "_"} == {k: v for k, v in here.items() if k[0] != "_"}


def test_karlos_stages_go_there_and_back(tmp_path, imported, clip):
    diffusers = pytest.importorskip("diffusers")
    text_proj = pytest.importorskip("diffusers.pipelines.deprecated.unclip.text_proj")
    place, prior, (unet, text), (first, last) = tmp_path / "k", make_prior(), make_decoder(), make_upsampler()
    parts = {"prior": prior, "decoder": unet, "text_proj": text, "super_res_first": first,
             "super_res_last": last}  # fmt: skip
    for name, net in parts.items():
        net.save_pretrained(place / name)
    runs = {
        "prior": imported("prior", place),  # the CLIP is the one of the same name
        "decoder": imported("decoder", place, "image_size=16"),
        "upsampler": imported("upsampler", place, "image_size=32", "factor=2"),
    }
    out = tmp_path / "out"
    for kind, run in runs.items():
        main([kind, str(run.path), str(out / kind)])
    equal(prior, diffusers.PriorTransformer.from_pretrained(out / "prior"))
    equal(unet, diffusers.UNet2DConditionModel.from_pretrained(out / "decoder" / "decoder"))
    equal(text, text_proj.UnCLIPTextProjModel.from_pretrained(out / "decoder" / "text_proj"))
    equal(first, diffusers.UNet2DModel.from_pretrained(out / "upsampler" / "super_res_first"))
    equal(last, diffusers.UNet2DModel.from_pretrained(out / "upsampler" / "super_res_last"))


@torch.no_grad()
def test_a_vqgan_for_diffusers(tmp_path, imported):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    released = Released(TAMING, 32, 64, gumbel=False)
    torch.nn.init.normal_(released.quantize.embedding.weight)
    torch.save(released.state_dict(), tmp_path / "w.pt")
    run = imported("vqgan", tmp_path / "w.pt", "image_size=32")
    main(["vqgan", str(run.path), str(tmp_path / "out")])
    theirs, report = diffusers.VQModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours, image = load_image_tokenizer(run.path), torch.rand(2, 3, 32, 32) * 2 - 1
    latents = theirs.eval().encode(image).latents
    torch.testing.assert_close(latents, ours.net.latents(image), **CLOSE)
    codes = theirs.quantize(latents)[2][2]
    assert torch.equal(codes.view(2, 64), ours.encode(image))
    torch.testing.assert_close(theirs.decode(latents).sample, ours.net(image)[0], **CLOSE)


@pytest.mark.parametrize("kind", ["clip", "prior", "decoder"])
def test_what_no_library_has_is_refused(untrained_stages, tmp_path, kind):
    with pytest.raises(UserError, match=r"tower of convolutions|is no architecture of diffusers"):
        main([kind, str(untrained_stages / "default" / kind), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_stays(tmp_path, clip):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="is there already"):
        main(["clip", str(clip.path), str(tmp_path / "out")])
