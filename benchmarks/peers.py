"""Networks of about the demo's size from other packages, for `speed.py`, in loops written here."""

from typing import Any

import torch
import torch.nn.functional as F
from cases import SAMPLED, Case, Demo, group_of_codes, group_of_sampling, sampling, training
from torch import Tensor, nn


def open_clip_cases(demo: Demo) -> list[Case]:
    from open_clip.model import CLIP as OpenCLIP
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    s, batch = demo.clip_sizes, demo.batches["clip"]
    vision = CLIPVisionCfg(
        layers=s["vision_layers"],
        width=s["vision_width"],
        head_width=s["vision_width"] // s["vision_heads"],
        patch_size=s["patch_size"],
        image_size=s["image_size"],
    )
    text = CLIPTextCfg(
        context_length=s["context_length"],
        vocab_size=s["vocab_size"],
        width=s["text_width"],
        heads=s["text_heads"],
        layers=s["text_layers"],
    )
    model = OpenCLIP(s["embed_dim"], vision, text)

    def loss() -> Tensor:
        image, caption, scale = model(batch["image"], batch["text"])[:3]
        logits, right = scale * image @ caption.T, torch.arange(len(image))
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2

    return [training(demo, "clip training", "open_clip", model, loss, len(batch["text"]))]


def diffusers_prior_cases(demo: Demo) -> list[Case]:
    from diffusers import DDIMScheduler, DDPMScheduler, PriorTransformer

    s, batch = demo.prior_sizes, demo.batches["prior"]
    model = PriorTransformer(
        num_attention_heads=s["heads"],
        attention_head_dim=s["width"] // s["heads"],
        num_layers=s["depth"],
        embedding_dim=s["embed_dim"],
        num_embeddings=s["context_length"],
        additional_embeddings=4,
    )
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(len(demo.prior.sampler))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        text, hidden, mask = (batch[key][: len(x)] for key in ("text_embed", "text_hidden", "text_mask"))
        return model(x, t, text, hidden, mask).predicted_image_embedding

    def loss() -> Tensor:
        x = batch["image_embed"]
        t = torch.randint(1000, x.shape[:1])
        return F.mse_loss(predict(noising.add_noise(x, torch.randn_like(x), t), t), x)

    def sample() -> Tensor:
        x = torch.randn(SAMPLED, s["embed_dim"])
        for t in scheduler.timesteps:
            x = scheduler.step(predict(x, t), t, x).prev_sample
        return x

    group = group_of_sampling("prior sampling", demo.prior.sampler)
    return [
        training(demo, "prior training", "diffusers", model, loss, len(batch["text"])),
        sampling(demo, group, "diffusers", model, sample),
    ]


def diffusers_unet(s: dict[str, Any]) -> nn.Module:
    """One layer per level and attention below full size, like ours, on pixels that are folded outside."""
    from diffusers import UNet2DConditionModel

    levels, channels = len(s["multipliers"]), s["channels"] * s["patch"] ** 2
    return UNet2DConditionModel(
        sample_size=s["image_size"] // s["patch"],
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (levels - 1)),
        up_block_types=(*["CrossAttnUpBlock2D"] * (levels - 1), "UpBlock2D"),
        block_out_channels=tuple(s["width"] * m for m in s["multipliers"]),
        layers_per_block=s["blocks"],
        cross_attention_dim=s["text_width"],
        attention_head_dim=tuple(s["width"] * m // s["head_dim"] for m in s["multipliers"]),  # heads, in fact
        norm_num_groups=8,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=s["embed_dim"],
        resnet_time_scale_shift="scale_shift",
    ).to(memory_format=torch.channels_last)


def diffusers_decoder_cases(demo: Demo) -> list[Case]:
    from diffusers import DDIMScheduler, DDPMScheduler

    s, batch = demo.unet_sizes, demo.batches["decoder"]
    model = diffusers_unet(s)
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(len(demo.decoder.sampler))

    embed, hidden = batch["image_embed"], batch["text_hidden"]
    twice = embed[:SAMPLED].repeat(2, 1), hidden[:SAMPLED].repeat(2, 1, 1)

    def predict(x: Tensor, t: Tensor, embed: Tensor, hidden: Tensor) -> Tensor:
        folded = F.pixel_unshuffle(x, s["patch"])
        out = model(folded, t, encoder_hidden_states=hidden, class_labels=embed).sample
        return F.pixel_shuffle(out, s["patch"])

    def loss() -> Tensor:
        x = batch["image"].contiguous(memory_format=torch.channels_last)
        t, noise = torch.randint(1000, x.shape[:1]), torch.randn_like(x)
        return F.mse_loss(predict(noising.add_noise(x, noise, t), t, embed, hidden), noise)

    def sample() -> Tensor:
        x = torch.randn_like(batch["image"][:SAMPLED]).contiguous(memory_format=torch.channels_last)
        for t in scheduler.timesteps:
            null, full = predict(x.repeat(2, 1, 1, 1), t, *twice).chunk(2)  # guided, as ours
            x = scheduler.step(null + demo.decoder.guidance * (full - null), t, x).prev_sample
        return x

    group = group_of_sampling("decoder sampling", demo.decoder.sampler)
    return [
        training(demo, "decoder training", "diffusers", model, loss, len(batch["text"])),
        sampling(demo, group, "diffusers", model, sample),
    ]


def transformers_cases(demo: Demo) -> list[Case]:
    """GPT-2 with one vocabulary for text and codes: the same blocks, its own cache and sampling loop."""
    from transformers import GPT2Config, GPT2LMHeadModel

    s, batch = demo.dalle_sizes, demo.batches["dalle"]
    config = GPT2Config(
        vocab_size=s["text_vocab"] + s["image_vocab"],
        n_positions=s["text_length"] + demo.codes,
        n_embd=s["width"],
        n_layer=s["depth"],
        n_head=s["heads"],
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    stream = torch.cat((batch["text"], s["text_vocab"] + batch["codes"]), dim=1)
    text = batch["text"][:SAMPLED]
    options = {"do_sample": True, "top_k": 0, "pad_token_id": 0}
    options |= {"min_new_tokens": demo.codes, "max_new_tokens": demo.codes}

    def loss() -> Tensor:
        return model(input_ids=stream, labels=stream, use_cache=False).loss

    def sample() -> Tensor:
        return model.generate(text, attention_mask=torch.ones_like(text), **options)

    return [
        training(demo, "dalle training", "transformers", model, loss, len(stream)),
        sampling(demo, group_of_codes(demo), "transformers", model, sample),
    ]


PEERS = {
    "open_clip": [open_clip_cases],
    "diffusers": [diffusers_prior_cases, diffusers_decoder_cases],
    "transformers": [transformers_cases],
}
