"""What each stage asks of its network: to bring one of your own, give it these attributes and methods.

Stages, pipelines and evaluation use nothing else of a network. Each stage holds its own against them when it
is built (`check_interface`), so that what is missing is said before anything trains. No class has to be
inherited from; any `nn.Module` that fits will do. Sizes that the data say (image_size, embed_dim ...) are
arguments of its constructor that a configuration leaves at ``auto``.
"""

import inspect
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from dalle.errors import UserError


@runtime_checkable
class Called(Protocol):
    """A network is called as any `nn.Module`, by whose `__call__` its `forward` is reached."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@runtime_checkable
class DecoderNet(Called, Protocol):
    """Of `model=decoder`: noised pictures and what they are to show -> the denoiser's prediction.

    image_size: side of the pictures; channels: of x, 3; embed_dim: E, of CLIP's embeddings. `forward` gives
    (B, O, H, W), O = channels, or twice that with learned_variance. keep_image, keep_text: False where the
    condition is dropped, so that it can be guided. A network that also draws oblong pictures has `whole`, of
    which their sides are best multiples.
    """

    image_size: int
    channels: int
    embed_dim: int

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        *,
        image_embed: Float[Tensor, "B E"],
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        text_mask: Bool[Tensor, "B T"],
        keep_image: Bool[Tensor, "B"] | None = None,
        keep_text: Bool[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B O H W"]: ...


@runtime_checkable
class InpaintingNet(DecoderNet, Protocol):
    """A `DecoderNet` whose `inpaint` is true: it may also be given what is known of the pictures.

    known: the pictures, 0 where nothing is known, and as a last channel 1 where something is (K = channels +
    1); None: nothing is.
    """

    inpaint: bool

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        *,
        image_embed: Float[Tensor, "B E"],
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        text_mask: Bool[Tensor, "B T"],
        keep_image: Bool[Tensor, "B"] | None = None,
        keep_text: Bool[Tensor, "B"] | None = None,
        known: Float[Tensor, "B K H W"] | None = None,
    ) -> Float[Tensor, "B O H W"]: ...


@runtime_checkable
class UpsamplerNet(Called, Protocol):
    """Of `model=upsampler`: noised large pictures and the small ones -> the denoiser's prediction.

    image_size: side of whole large pictures; factor: how many times that of the small ones. It is called
    with pictures of other sizes, too: crops, and tiles, which begin at multiples of `whole`. level: of the
    noise that `low` was augmented with, 0 to 1.
    """

    image_size: int
    factor: int
    channels: int
    whole: int

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        *,
        low: Float[Tensor, "B C h w"],
        level: Float[Tensor, "B"],
    ) -> Float[Tensor, "B O H W"]: ...


@runtime_checkable
class PriorNet(Called, Protocol):
    """Of `model=prior`: noised image embeddings and the caption -> the denoiser's prediction (B, E).

    A network may also have `prefix(text_embed, text_hidden, text_mask, keep_text=None) -> cache` for what is
    the same at all sampling steps; its `forward` is then given `cache=` in place of the text. One with an
    attribute `text_layers` that is not empty is given the token ids, too: text (B, T), int64.
    """

    embed_dim: int

    def forward(
        self,
        x: Float[Tensor, "B E"],
        t: Float[Tensor, "B"],
        *,
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        text_mask: Bool[Tensor, "B T"],
        keep_text: Bool[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B E"]: ...


@runtime_checkable
class ARPriorNet(Called, Protocol):
    """Of `model=ar_prior`: codes (B, 1 + D) after a caption -> logits of the last D (B, D, K).

    codes: the module that makes them of image embeddings (`nets.ar_prior.EmbeddingCodes`), of the dot product
    with the caption's first; dims: D; buckets: K. Drawing reads a caption and the first code once (`prefill`)
    and then writes a code at a time (`step`), with a cache of the network's own.
    """

    embed_dim: int
    dims: int
    buckets: int
    codes: Any

    def forward(
        self,
        codes: Int64[Tensor, "B C"],
        *,
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        text_mask: Bool[Tensor, "B T"],
        keep_text: Bool[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B N K"]: ...

    def prefill(
        self,
        codes: Int64[Tensor, "B P"],
        *,
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        text_mask: Bool[Tensor, "B T"],
        keep_text: Bool[Tensor, "B"] | None = None,
    ) -> tuple[Float[Tensor, "B K"], Any]: ...

    def step(self, code: Int64[Tensor, "B"], rank: int, cache: Any) -> Float[Tensor, "B K"]: ...


@runtime_checkable
class CLIPNet(Called, Protocol):
    """Of `model=clip`, and frozen in the DataModules of prior and decoder.

    embed_dim: E; text_width: S, of the text states; context_length: T; vocab_size: of the ids; logit_scale:
    the parameter ln(1 / temperature). `forward` gives unit embeddings of both and exp(logit_scale).
    """

    image_size: int
    embed_dim: int
    text_width: int
    context_length: int
    vocab_size: int
    logit_scale: nn.Parameter

    def encode_image(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]: ...

    def encode_text(
        self, text: Int[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b e"], Float[Tensor, "b t s"], Bool[Tensor, "b t"]]: ...

    def forward(
        self, image: Float[Tensor, "b 3 h w"], text: Int[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b e"], Float[Tensor, "b e"], Float[Tensor, ""]]: ...


@runtime_checkable
class ImageTokenizerNet(Called, Protocol):
    """Of `model=dvae` and `model=vqgan` as the transformer sees it; codes are in [0, vocab_size), in rows.

    grid: side of the square of N = grid^2 codes. Where codes are digits, `levels` says of how many values.
    """

    image_size: int
    vocab_size: int
    grid: int

    def encode(self, image: Float[Tensor, "B 3 H W"]) -> Int64[Tensor, "B N"]: ...

    def decode(self, codes: Int64[Tensor, "B N"]) -> Float[Tensor, "B 3 H W"]: ...


@runtime_checkable
class DVAENet(ImageTokenizerNet, Protocol):
    """Of `model=dvae`: `forward(image, temperature)` gives means and ln scales of soft codes, and logits."""

    def forward(
        self, image: Float[Tensor, "B 3 H W"], temperature: Float[Tensor, ""]
    ) -> tuple[tuple[Tensor, Tensor], Float[Tensor, "B K h w"]]: ...

    def logits(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K h w"]: ...

    def likelihood(self, codes: Int64[Tensor, "B N"]) -> tuple[Tensor, Tensor]: ...

    def map_pixels(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]: ...

    def unmap_pixels(self, y: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]: ...


@runtime_checkable
class VQGANNet(ImageTokenizerNet, Protocol):
    """Of `model=vqgan` and `model=vqvae`: `forward` gives the picture through its codes, these codes, and the
    commitment loss.

    conv_out: the last layer, by whose gradients the discriminator is weighed. synchronise: called when
    training on several ranks begins, to make codebooks the same on all.
    """

    conv_out: nn.Module

    def forward(
        self, image: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B 3 H W"], Int64[Tensor, "B N"], Float[Tensor, ""]]: ...

    def synchronise(self) -> None: ...


@runtime_checkable
class VAENet(Called, Protocol):
    """Of `model=vae`: `forward` gives a reconstruction, and mean and log variance (B, Z) of the latent."""

    image_size: int
    latent_dim: int

    def decode(self, z: Float[Tensor, "B Z"]) -> Float[Tensor, "B 3 H W"]: ...

    def forward(
        self, image: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B Z"], Float[Tensor, "B Z"]]: ...


@runtime_checkable
class GeneratorNet(Called, Protocol):
    """Of `model=gan`: noise z and the caption -> a picture in [-1, 1]. latent_dim: Z."""

    image_size: int
    latent_dim: int
    embed_dim: int
    text_width: int

    def forward(
        self,
        z: Float[Tensor, "B Z"],
        *,
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        text_mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B 3 H W"]: ...


@runtime_checkable
class TransformerNet(Called, Protocol):
    """Of `model=dalle`: captions (B, T), codes (B, N) -> logits of the next text token (None: it learns no
    text) and of the next code.

    text_vocab, image_vocab: of the ids; codes: N. Drawing reads a caption once (`prefill`) and then writes a
    code at a time (`step`), with a cache of the network's own.
    """

    text_vocab: int
    image_vocab: int
    codes: int

    def padded(self, text: Int64[Tensor, "B T"], keep_text: Bool[Tensor, "B"] | None = None) -> Tensor: ...

    def forward(
        self,
        text: Int64[Tensor, "B T"],
        codes: Int64[Tensor, "B N"],
        keep_text: Bool[Tensor, "B"] | None = None,
    ) -> tuple[Tensor | None, Tensor]: ...

    def prefill(
        self,
        text: Int64[Tensor, "B T"],
        keep_text: Bool[Tensor, "B"] | None,
        codes: Int64[Tensor, "B P"],
    ) -> tuple[Float[Tensor, "B K"], Any]: ...

    def step(self, code: Int64[Tensor, "B"], rank: int, cache: Any) -> Float[Tensor, "B K"]: ...


def check_interface(net: Any, interface: Any, where: str = "model.net") -> Any:
    """The network itself, if it has all of `interface`: one of the Protocols above.

    Raises:
        UserError: what it lacks: attributes, methods, or arguments of a method.
    """
    lacks = []
    for name in _members(interface):
        if not hasattr(net, name):
            lacks.append(name)
        elif inspect.isfunction(wanted := getattr(interface, name, None)):
            lacks += _arguments_missing(name, wanted, getattr(net, name))
    if lacks:
        raise UserError(
            f"{where}: {type(net).__name__} lacks {', '.join(lacks)}; "
            f"dalle.nets.interfaces.{interface.__name__} says what a network must have here"
        )
    return net


def _arguments_missing(name: str, wanted: Any, given: Any) -> list[str]:
    """What a method is called with and does not take."""
    _, *asked = inspect.signature(wanted).parameters.values()  # without self
    keywords = [p.name for p in asked if p.kind is p.KEYWORD_ONLY]
    signature = inspect.signature(given)
    takes = signature.parameters
    if any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        missing = []
    else:
        missing = [keyword for keyword in keywords if keyword not in takes]
    if missing:
        return [f"{name}({keyword}=)" for keyword in missing]
    try:
        signature.bind(*[None] * (len(asked) - len(keywords)), **dict.fromkeys(keywords))
    except TypeError as error:
        return [f"{name}({', '.join(p.name for p in asked)}): {error}"]
    return []


def _members(interface: type) -> list[str]:
    """What a Protocol and those it extends declare, in the order in which they do."""
    found: dict[str, None] = {}
    for base in reversed(interface.__mro__):
        if getattr(base, "_is_protocol", False) and base is not Protocol:
            found |= dict.fromkeys(getattr(base, "__annotations__", {}))
            found |= {name: None for name, value in vars(base).items() if inspect.isfunction(value)}
    return [name for name in found if not name.startswith("_")]
