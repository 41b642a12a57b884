"""Karlo's stages, imported, give what diffusers' networks and its scheduler of Karlo's kind give."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from public import (
    CLOSE,
    KARLO_DECODER,
    PRIOR,
    UPSAMPLER,
    E,
    FakeCLIP,
    chain,
    clip_weights,
    in_a_row,
    karlo_unet,
    make_decoder,
    make_prior,
    make_upsampler,
    same_draws,
)
from safetensors.torch import save_file

from dalle.instantiate import instantiate
from dalle.run_dir import load_clip, load_stage
from dalle.weights import karlo
from dalle.weights.reading import PublicWeights
from dalle.weights.writing import check_same

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("open_clip")
text_proj = pytest.importorskip("diffusers.pipelines.deprecated.unclip.text_proj")


@pytest.fixture
def clip(tmp_path, imported) -> Path:
    """The run of a CLIP with random weights."""
    save_file(clip_weights(), tmp_path / "clip.safetensors")
    return imported("clip", tmp_path / "clip.safetensors", "activation=quick_gelu", name="karlo").path


def captions_of(clip: Path) -> dict[str, torch.Tensor]:
    return load_clip(clip).embed_captions(["a red square", "two small blue circles"])


# Karlo's own names: a second way from those of diffusers, written by what Karlo's code does


def karlo_prior(net) -> dict[str, torch.Tensor]:
    theirs, made = dict(net.state_dict()), {}
    outer = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "proj_in": "clip_img_proj", "embedding_proj": "text_emb_proj", "norm_out": "final_ln",
        "encoder_hidden_states_proj": "text_enc_proj", "proj_to_clip_embeddings": "out_proj",
    }  # fmt: skip
    inner = {"norm1": "ln_1", "norm3": "ln_2", "attn1.to_out.0": "attn.c_proj", "ff.net.0.proj": "mlp.c_fc",
             "ff.net.2": "mlp.c_proj"}  # fmt: skip
    made["positional_embedding"], made["prd_emb"] = theirs["positional_embedding"], theirs["prd_embedding"]
    for kind in ("weight", "bias"):
        made |= {f"{new}.{kind}": theirs[f"{old}.{kind}"] for old, new in outer.items()}
        for i in range(PRIOR["num_layers"]):
            old, new = f"transformer_blocks.{i}.", f"transformer.resblocks.{i}."
            made |= {f"{new}{b}.{kind}": theirs[f"{old}{a}.{kind}"] for a, b in inner.items()}
            rows = [theirs[f"{old}attn1.to_{one}.{kind}"] for one in "qkv"]
            made[f"{new}attn.c_qkv.{kind}"] = in_a_row(*rows, heads=PRIOR["num_attention_heads"])
    return {f"model.{name}": value for name, value in made.items()}


def karlo_decoder(net, text) -> dict[str, torch.Tensor]:
    names = {
        "encoder_hidden_states_proj": "text_seq_proj.0", "embedding_proj": "text_feat_proj",
        "text_encoder_hidden_states_norm": "text_seq_proj.1",
        "clip_extra_context_tokens_proj": "clip_tok_proj",
        "clip_image_embeddings_project_to_time_embeddings": "clip_emb",
    }  # fmt: skip
    made = karlo_unet(net)
    for name, value in text.state_dict().items():
        layer, _, kind = name.rpartition(".")
        made["cf_param" if not layer else f"{names[layer]}.{kind}"] = value
    return {f"model.{name}": value for name, value in made.items()}


def karlo_upsampler(first, last) -> dict[str, torch.Tensor]:
    both = {"model_first_steps": first, "model_last_step": last}
    return {f"{part}.{name}": v for part, net in both.items() for name, v in karlo_unet(net).items()}


# What diffusers' pipeline does with them


LAYOUTS = pytest.mark.parametrize("layout", ["karlo", "diffusers"])


@LAYOUTS
@torch.no_grad()
def test_prior(tmp_path, imported, clip, layout):
    theirs, settings = make_prior(), [f"clip={clip}"]
    if layout == "karlo":
        torch.save({"state_dict": karlo_prior(theirs)}, place := tmp_path / "prior.ckpt")
        torch.save([theirs.clip_mean[0], theirs.clip_std[0]], tmp_path / "ViT-L-14_stats.th")
        settings.append(f"stats={tmp_path / 'ViT-L-14_stats.th'}")
    else:
        theirs.save_pretrained(place := tmp_path / "prior")
    stage, manifest = load_stage(imported("prior", place, *settings, name="karlo").path, "prior")
    assert manifest["origin"]["layout"] == layout
    text, (draw, generator) = captions_of(clip), same_draws()
    inputs = {key: text[key] for key in ("text_embed", "text_hidden", "text_mask")}
    x, t = torch.randn(2, E), torch.tensor([1.0, 0.437])
    wanted = theirs(
        x, torch.tensor([999, 436]), inputs["text_embed"], inputs["text_hidden"], inputs["text_mask"]
    )
    torch.testing.assert_close(stage.net(x, t, **inputs), wanted.predicted_image_embedding, **CLOSE)

    none = load_clip(clip).embed_captions(["", ""])  # the unconditional rows, which come first there
    both = {key: torch.cat([none[key], value]) for key, value in inputs.items()}

    def estimate(x, t, i):
        args = (t, both["text_embed"], both["text_hidden"], both["text_mask"])
        uncond, cond = theirs(torch.cat([x, x]), *args).predicted_image_embedding.chunk(2)
        return uncond + 4.0 * (cond - uncond)

    made = stage.sample(text, randn=draw)
    clip_range = 10.0 if layout == "karlo" else 5.0
    noise = torch.randn(2, E, generator=generator)
    wanted = chain(estimate, noise, 25, generator, prediction_type="sample", clip_sample_range=clip_range)
    torch.testing.assert_close(made, wanted, atol=1e-4, rtol=1e-4)  # 25 steps, guided by 4
    torch.testing.assert_close(stage.norm.decode(wanted), theirs.post_process_latents(wanted), **CLOSE)


@LAYOUTS
@torch.no_grad()
def test_decoder(tmp_path, imported, clip, layout):
    unet, text_net = make_decoder()
    if layout == "karlo":
        torch.save({"state_dict": karlo_decoder(unet, text_net)}, place := tmp_path / "decoder.ckpt")
    else:
        unet.save_pretrained((place := tmp_path / "pipe") / "decoder")
        text_net.save_pretrained(place / "text_proj")
    run = imported("decoder", place, f"clip={clip}", "image_size=16", name="karlo")
    stage, _ = load_stage(run.path, "decoder")
    text, embed = captions_of(clip), torch.randn(2, E)
    none = load_clip(clip).embed_captions([""])
    rows = {
        key: torch.cat([none[key], none[key], text[key]])
        for key in ("text_embed", "text_hidden", "text_mask")
    }

    def projected():
        return text_net(
            image_embeddings=embed, prompt_embeds=rows["text_embed"],
            text_encoder_hidden_states=rows["text_hidden"], do_classifier_free_guidance=True,
        )  # fmt: skip

    context, added = projected()
    mask = F.pad(rows["text_mask"], (4, 0), value=True)

    def network(x, t):
        return unet(x, t, encoder_hidden_states=context, class_labels=added, attention_mask=mask).sample

    x = torch.randn(2, 3, 16, 16)
    told = torch.tensor([False, False, True, True])
    ours = stage.net(
        x.repeat(2, 1, 1, 1), torch.full((4,), 0.437), image_embed=embed.repeat(2, 1), keep_image=told,
        keep_text=told, **{key: text[key].repeat(2, *[1] * (text[key].ndim - 1)) for key in rows},
    )  # fmt: skip
    torch.testing.assert_close(ours, network(x.repeat(2, 1, 1, 1), 436), **CLOSE)

    def estimate(x, t, i):
        uncond, cond = network(torch.cat([x, x]), t).chunk(2)
        eps = uncond[:, :3] + 8.0 * (cond[:, :3] - uncond[:, :3])
        return torch.cat([eps, cond[:, 3:]], dim=1)  # the variance is that of the told rows

    # in float64: 25 steps guided by 8 make of random weights' rounding what differences of code would make
    torch.set_default_dtype(torch.float64)
    try:
        for net in (stage, unet, text_net):
            net.double()
        rows, batch = (
            {key: v.double() if v.is_floating_point() else v for key, v in some.items()}
            for some in (rows, text)
        )
        embed = embed.double()
        context, added = projected()
        draw, generator = same_draws()
        made = stage.sample({**batch, "image_embed": embed}, randn=draw)
        noise = torch.randn(2, 3, 16, 16, generator=generator)
        wanted = chain(estimate, noise, 25, generator, variance_type="learned_range").clamp(-1, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(made, wanted, **CLOSE)


@LAYOUTS
@torch.no_grad()
def test_upsampler(tmp_path, imported, layout):
    first, last = make_upsampler()
    if layout == "karlo":
        torch.save({"state_dict": karlo_upsampler(first, last)}, place := tmp_path / "sr.ckpt")
    else:
        first.save_pretrained((place := tmp_path / "pipe") / "super_res_first")
        last.save_pretrained(place / "super_res_last")
    run = imported("upsampler", place, "image_size=32", "factor=2", name="karlo")
    stage, manifest = load_stage(run.path, "upsampler")
    assert manifest["factor"] == 2
    low = torch.rand(2, 3, 16, 16) * 2 - 1
    large = F.interpolate(low, (32, 32), mode="bicubic", align_corners=False, antialias=True)
    x, draw_level = torch.randn(2, 3, 32, 32), torch.zeros(2)
    for t, net in ((436, first), (0, last)):
        ours = stage.net(x, torch.full((2,), (t + 1) / 1000), low=low, level=draw_level)
        torch.testing.assert_close(ours, net(torch.cat([x, large], 1), t).sample, **CLOSE)

    draw, generator = same_draws()
    made = stage.sample({"low": low}, randn=draw)
    noise = torch.randn(2, 3, 32, 32, generator=generator)
    wanted = chain(
        lambda x, t, i: (last if i == 6 else first)(torch.cat([x, large], 1), t).sample, noise, 7, generator
    )
    torch.testing.assert_close(made, wanted.clamp(-1, 1), atol=1e-4, rtol=1e-4)


# The public shapes, without memory


def fits(found) -> None:
    with torch.device("meta"):
        net = instantiate(found.model["net"])
    check_same(found.tensors, net.state_dict(), Path("public"), found.stage)


@pytest.mark.parametrize("name", ["karlo", "kandinsky-2-1", "kandinsky-2-2"])
def test_the_public_priors(monkeypatch, name):
    size = 1280 if name == "kandinsky-2-2" else 768
    monkeypatch.setattr(karlo, "load_clip", lambda path: FakeCLIP(size))
    with torch.device("meta"):
        theirs = diffusers.PriorTransformer(embedding_dim=size)
    weights = {**theirs.state_dict(), "clip_mean": torch.zeros(1, size), "clip_std": torch.ones(1, size)}
    found = karlo.import_prior(PublicWeights(Path(name), weights), clip="clip")
    fits(found)
    net = found.model["net"]
    assert (net["depth"], net["heads"], net["width"]) == (20, 32, 2048)


def test_the_public_decoder(monkeypatch):
    monkeypatch.setattr(karlo, "load_clip", lambda path: FakeCLIP(768))
    cross = ("SimpleCrossAttnDownBlock2D",) * 3, ("SimpleCrossAttnUpBlock2D",) * 3
    sizes = KARLO_DECODER | {
        "sample_size": 64, "layers_per_block": 3, "block_out_channels": (320, 640, 960, 1280),
        "cross_attention_dim": 1536, "attention_head_dim": 64,
        "down_block_types": ("ResnetDownsampleBlock2D", *cross[0]),
        "up_block_types": (*cross[1], "ResnetUpsampleBlock2D"),
    }  # fmt: skip
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**sizes)
        text = text_proj.UnCLIPTextProjModel(time_embed_dim=1280, cross_attention_dim=1536)
    parts = {"decoder.": unet, "text_proj.": text}
    weights = {part + name: value for part, net in parts.items() for name, value in net.state_dict().items()}
    fits(karlo.import_decoder(PublicWeights(Path("karlo"), weights), clip="clip"))
    fits(karlo.import_decoder(PublicWeights(Path("karlo"), karlo_decoder(unet, text)), clip="clip"))


def test_the_public_upsampler():
    sizes = UPSAMPLER | {
        "sample_size": 256,
        "layers_per_block": 3,
        "block_out_channels": (320, 640, 960, 1280),
    }
    sizes["down_block_types"] = ("ResnetDownsampleBlock2D",) * 4
    sizes["up_block_types"] = ("ResnetUpsampleBlock2D",) * 4
    with torch.device("meta"):
        both = [diffusers.UNet2DModel(**sizes) for _ in range(2)]
    fits(karlo.import_upsampler(PublicWeights(Path("karlo"), karlo_upsampler(*both))))


# Refusals, and a picture


def test_what_does_not_fit(tmp_path, refused, imported, clip):
    theirs = make_prior()
    torch.save({"state_dict": karlo_prior(theirs)}, tmp_path / "prior.ckpt")
    assert "give stats=ViT-L-14_stats.th" in refused("prior", tmp_path / "prior.ckpt", f"clip={clip}")
    assert "prior needs clip: give it as clip=" in refused("prior", tmp_path / "prior.ckpt")
    other = diffusers.PriorTransformer(**PRIOR | {"embedding_dim": 32})
    other.clip_std.data += 1
    other.save_pretrained(tmp_path / "other")
    line = refused("prior", tmp_path / "other", f"clip={clip}")
    assert f"works with a CLIP of embed_dim=32, but {clip} has 64" in line
    first, last = make_upsampler()
    torch.save(karlo_upsampler(first, last), tmp_path / "sr.ckpt")
    assert "is no decoder of Karlo's" in refused("decoder", tmp_path / "sr.ckpt", f"clip={clip}")


def test_a_picture_from_random_weights_of_karlos_kind(tmp_path, imported, clip, command):
    """The whole ladder: caption, prior, decoder of 16 px, upsampler to 32, from one pipeline's folder."""
    place, ((unet, text), (first, last)) = tmp_path / "karlo", (make_decoder(), make_upsampler())
    parts = {"prior": make_prior(), "decoder": unet, "text_proj": text, "super_res_first": first,
             "super_res_last": last}  # fmt: skip
    for name, net in parts.items():
        net.save_pretrained(place / name)
    runs = {
        "prior": imported("prior", place, f"clip={clip}", name="karlo"),
        "decoder": imported("decoder", place, f"clip={clip}", "image_size=16", name="karlo"),
        "upsampler": imported("upsampler", place, "image_size=32", "factor=2", name="karlo"),
    }
    done = command(
        "sample.py", "prompt=a red square", f"paths.logs={clip.parents[1]}", "name=karlo", "device=cpu",
        f"upsamplers=[{runs['upsampler'].path}]", f"out={tmp_path / 'out'}", "sampler=ddpm", "steps=3",
        "pipeline.prior_sampler.method=ddpm", "pipeline.prior_sampler.steps=3",
    )  # fmt: skip
    assert done.code == 0, done.error
    from PIL import Image

    (picture,) = [p for p in (tmp_path / "out").rglob("*.png") if Image.open(p).size == (32, 32)]
    assert len(set(Image.open(picture).getdata())) > 50
    measured = command(
        "evaluate.py", "name=karlo", f"paths.logs={clip.parents[1]}", "n=2", "trainer=cpu", "data=shapes",
        "metrics=[clip_score]", "steps=2", "pipeline.prior_sampler.steps=2", f"out={tmp_path / 'figures'}",
    )  # fmt: skip
    assert measured.code == 0, measured.error
    assert "clip_score" in measured.out
    varied = command(
        "sample.py", "edit=variations", f"image='{picture}'", f"paths.logs={clip.parents[1]}", "name=karlo",
        "device=cpu", "n=1", "steps=2", f"out={tmp_path / 'varied'}",
    )  # fmt: skip
    assert varied.code == 0, varied.error
    assert (tmp_path / "varied" / "edit.json").is_file()
