"""Which importer is for which kind of public weights."""

from collections.abc import Callable

from dalle.weights.clip import import_clip
from dalle.weights.dalle_mini import import_dalle
from dalle.weights.karlo import PARTS, import_decoder, import_prior, import_upsampler
from dalle.weights.tokenizers import import_dvae, import_vqgan
from dalle.weights.writing import Imported

__all__ = ["IMPORTERS", "PARTS"]

IMPORTERS: dict[str, Callable[..., Imported]] = {  # by stage
    "clip": import_clip,
    "dvae": import_dvae,
    "vqgan": import_vqgan,
    "dalle": import_dalle,
    "prior": import_prior,
    "decoder": import_decoder,
    "upsampler": import_upsampler,
}
