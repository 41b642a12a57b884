"""A pretrained CLIP of the open_clip collection in the place of one's own (the `open_clip` extra).

What differs from open_clip's loader: OpenAI's weights get the QuickGELU they were trained with, whatever the
name says (open_clip only warns), images are resized as tensors, and text states come with the embedding.
"""

import difflib
import importlib
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from dalle.data.frozen import FrozenCLIP
from dalle.data.tokenizers import ClipBPE
from dalle.errors import UserError
from dalle.finite import check_finite
from dalle.ranges import Text

CLIP_VOCABULARY = 49408


class OpenClipNet(nn.Module):
    """An open_clip model behind the interface of `dalle.nets.clip.CLIP`.

    Raises:
        UserError: not CLIP's text tower (causal, CLIP's BPE, read at the end token): SigLIP, CoCa.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        open_clip = _open_clip()
        standard = isinstance(model, open_clip.CLIP) and model.text_pool_type == "argmax"
        if not standard or model.vocab_size != CLIP_VOCABULARY or model.attn_mask is None:
            raise UserError(
                "this open_clip model's text tower is not CLIP's own; use a CLIP model, e.g. ViT-B-32."
            )
        self.model = model
        preprocessing = open_clip.get_model_preprocess_cfg(model)
        size = preprocessing["size"]
        self.image_size = int(size if isinstance(size, int) else size[0])
        if not isinstance(size, int) and size[0] != size[1]:
            raise UserError(
                f"this open_clip model reads {size[0]}x{size[1]} pictures; only square ones are supported."
            )
        self.interpolation = preprocessing.get("interpolation", "bicubic")
        for name in ("mean", "std"):
            values = torch.tensor(preprocessing[name]).view(3, 1, 1)
            self.register_buffer(f"pixel_{name}", values, persistent=False)
        self.embed_dim = int(model.text_projection.shape[1])
        self.text_width = int(model.ln_final.weight.shape[0])
        self.context_length = int(model.context_length)

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale

    def encode_image(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        """Images in [-1, 1], resized where their size is another one -> embeddings, not normalised."""
        size = (self.image_size, self.image_size)
        if image.shape[-2:] != size:
            image = F.interpolate(image, size, mode=self.interpolation, antialias=True).clamp(-1, 1)
        return self.model.encode_image(((image + 1) / 2 - self.pixel_mean) / self.pixel_std)

    def encode_text(
        self, text: Int[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b e"], Float[Tensor, "b t d"], Bool[Tensor, "b t"]]:
        """Ids (B, context_length) -> embeddings (raw), states after the last norm, which ids are real."""
        states: list[Tensor] = []
        hook = self.model.ln_final.register_forward_hook(lambda *call: states.append(call[-1]))
        try:
            embed = self.model.encode_text(text)
        finally:
            hook.remove()
        mask = torch.arange(text.shape[1], device=text.device) <= text.argmax(dim=1, keepdim=True)
        return embed, states[0], mask


def load_open_clip(
    name: Text, pretrained: Text, cache_dir: Text | None = None, bf16: bool = False
) -> FrozenCLIP:
    """A pretrained model by its open_clip name, e.g. `load_open_clip("ViT-B-32", "openai")`.

    Args:
        name: of the architecture. With a weights file of OpenAI's, the `-quickgelu` one.
        pretrained: a tag of open_clip's (downloaded once), or a file of weights (.safetensors, .pt, .bin).
        cache_dir: where downloads are kept; None: open_clip's own place.
        bf16: compute in bf16.

    Raises:
        UserError: open_clip, the name, the tag or the file is missing, cannot be had, or does not fit.
    """
    open_clip = _open_clip()
    if name not in open_clip.list_models():
        raise _unknown(name, open_clip.list_models())
    tags = open_clip.list_pretrained_tags_by_model(name)
    is_tag = pretrained in tags
    if not is_tag and not Path(pretrained).is_file():
        known = ", ".join(tags) or "none"
        raise UserError(
            f"{pretrained!r} is neither a file nor a tag of open_clip's {name}; its tags: {known}."
        )
    options: dict[str, Any] = {}
    if is_tag:
        _say(f"open_clip {name} ({pretrained}): its weights are downloaded unless they are already here.")
        options["quick_gelu"] = bool(open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")  # settled by the option
            model = open_clip.create_model(name, pretrained=pretrained, cache_dir=cache_dir, **options)
    except Exception as error:  # open_clip passes on whatever its downloaders, unpicklers and models raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        advice = (
            "give clip.pretrained=PATH to a weights file on this machine"
            if is_tag
            else "is it of this model?"
        )
        raise UserError(f"cannot load open_clip {name} from {pretrained!r}: {advice} ({reason})") from error
    check_finite(model.state_dict(), pretrained, "take another file")
    net = OpenClipNet(model)
    return FrozenCLIP(net, ClipBPE(net.context_length), bf16)


def without_weights(name: str) -> FrozenCLIP:
    """The model of such a name on the meta device: its sizes. Raises UserError where it is not known."""
    open_clip = _open_clip()
    if name not in open_clip.list_models():
        raise _unknown(name, open_clip.list_models())
    logging.disable(logging.WARNING)  # that it has no weights
    with torch.device("meta"):
        model = open_clip.create_model(name, load_weights=False, device="meta")
    logging.disable(logging.NOTSET)
    net = OpenClipNet(model).to("meta")
    return FrozenCLIP(net, ClipBPE(net.context_length))


def _unknown(name: str, models: list[str]) -> UserError:
    close = ", ".join(difflib.get_close_matches(name, models, n=5, cutoff=0.3))
    others = f"close to it: {close}." if close else "open_clip.list_models() in Python names all."
    return UserError(f"open_clip knows no model {name!r}; {others}")


def _open_clip() -> Any:
    try:
        return importlib.import_module("open_clip")
    except ImportError as error:
        raise UserError("a pretrained CLIP needs open_clip: pip install dalle[open_clip]") from error


@rank_zero_only
def _say(line: str) -> None:
    print(line, flush=True)
