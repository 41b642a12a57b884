"""Which classes a configuration may name.

What a user composes (command line, own config files) may name any class or function that is defined in
`PACKAGES`, or in a package that the same command trusts: ``trust=[mylab]``. What is read from a file (a run's
config, a recipe) is data from anybody, whatever `trust` it has itself: it may name only what is `LISTED`
here, the classes of ``torch.nn`` and ``torch.optim``, and of packages that the command trusts networks,
stages, metrics, optimizers, sources and tokenizers, but no function; anything else is refused before it is
imported. Neither is led through modules to what they import: ``torch.os.system`` is no class of torch.

`trust` is an ordinary setting: what a command starts (missing stages, ``-m``, ranks) is given it, too.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import nn, optim

from dalle.errors import UserError

Trust = Callable[[str], Any]  # a name -> the class or function; raises UserError where it is not trusted

PACKAGES = ("dalle", "torch", "lightning")
LISTED = {  # what runs and recipes are made of: the whole of it, a test says what is missing
    "stages": (
        "dalle.stages.ar_prior.ARPriorStage", "dalle.stages.clip.ClipStage", "dalle.stages.dalle.DalleStage",
        "dalle.stages.decoder.DecoderStage", "dalle.stages.dvae.DVAEStage", "dalle.stages.gan.GanStage",
        "dalle.stages.prior.PriorStage", "dalle.stages.upsampler.UpsamplerStage",
        "dalle.stages.vae.VAEStage", "dalle.stages.vqgan.VQGANStage",
    ),
    "networks": (
        "dalle.nets.ar_prior.ARPrior", "dalle.nets.clip.CLIP", "dalle.nets.dalle.DALLE",
        "dalle.nets.dalle_bart.DalleBart", "dalle.nets.dit.DiT",
        "dalle.nets.dvae.DVAE", "dalle.nets.gan.Discriminator", "dalle.nets.gan.Generator",
        "dalle.nets.glide.GlideText", "dalle.nets.karlo.GlideDecoder",
        "dalle.nets.karlo.KarloDecoder", "dalle.nets.karlo.KarloUpsampler",
        "dalle.nets.karlo.PriorTransformer", "dalle.nets.laion.LaionPrior",
        "dalle.nets.prior.Prior", "dalle.nets.rudalle.RuDalle", "dalle.nets.small_unet.SmallUNet",
        "dalle.nets.taming.TamingVQGAN", "dalle.nets.unet.UNet",
        "dalle.nets.upsampler.UpsamplerUNet", "dalle.nets.vae.VAE",
        "dalle.nets.vqgan.PatchDiscriminator", "dalle.nets.vqgan.VQGAN",
    ),
    "parts of stages": (
        "dalle.diffusion.denoiser.Denoiser", "dalle.diffusion.samplers.Sampler",
        "dalle.diffusion.schedule.Schedule", "dalle.metrics.perceptual.perceptual_distance",
        "dalle.metrics.retrieval.Retrieval", "dalle.stages.dvae.Ramp", "dalle.optim.muon.Muon",
        "dalle.optim.adamw_8bit.AdamW8bit", "dalle.optim.factory.OptimizerFactory",
    ),
    "frozen networks": (
        "dalle.data.open_clip.load_open_clip", "dalle.run_dir.load_clip",
        "dalle.run_dir.load_image_tokenizer",
    ),
    "sources": (
        "dalle.data.coco.Coco", "dalle.data.encoded.Encoded", "dalle.data.folder.Folder",
        "dalle.data.hf.HuggingFace", "dalle.data.hf.hugging_face", "dalle.data.idx.Idx",
        "dalle.data.imagefolder.ImageFolder", "dalle.data.mixture.Mixture",
        "dalle.data.shapes.Shapes", "dalle.data.table.Table",
        "dalle.data.webdataset.WebDataset",
    ),
    "parts of sources": ("dalle.data.filters.Filters",),
}  # fmt: skip
SOURCE = ("images", "captions", "fingerprint", "__len__")  # what tells a source: see dalle.data.sources
TOKENIZER = ("__call__", "too_long", "to_dict", "from_dict")  # and a tokenizer: see dalle.data.tokenizers
MOVED = {  # names in files of earlier versions -> what is called so today; modules, and classes in them
    "dalle.callbacks": "dalle.training.callbacks",
    "dalle.callbacks.Ema": "dalle.training.ema.Ema",
    "dalle.checkpoints": "dalle.training.checkpoints",
    "dalle.data.modules": "dalle.data.datamodules",
    "dalle.loggers": "dalle.training.loggers",
    "dalle.reconstructions": "dalle.training.reconstructions",
    "dalle.runs": "dalle.run_dir",
    "dalle.search": "dalle.launch.hparam_search",
    "dalle.training.callbacks.Ema": "dalle.training.ema.Ema",
    "dalle.stages.muon": "dalle.optim.muon",
    "dalle.stages.optim.Recipe": "dalle.optim.factory.OptimizerFactory",
}
ARGUMENTS = {"dalle.nets.dvae.DVAE": {"inlet": "code_dim"}}  # the same of arguments, by today's class
LACKED = {  # arguments that came later -> what runs that do not name them were made with
    "dalle.nets.clip.CLIP": {"vision": "vit"},
    "dalle.nets.dalle.DALLE": {"image_levels": None},
    "dalle.nets.prior.Prior": {"vocab_size": 2},  # which nothing reads without text_layers
    "dalle.nets.unet.UNet": {"positions": False},
    "dalle.stages.clip.ClipStage": {"classification_weight": 0.0},
}

_trusted: tuple[str, ...] = ()  # packages of the user's own, by `set_trusted`

LONGEST = 200  # letters of a name


def set_trusted(packages: Any) -> None:
    """What a command's own `trust` says (a list of names; None: none), for this process: each entry point
    calls this once, before it reads a run, and so does who loads runs from Python. Imports the packages, so
    that the samplers that they register (`dalle.diffusion.samplers.register`) are there.

    Raises:
        UserError: no name of a package, one that is not the user's own, or one that cannot be imported.
    """
    global _trusted
    packages = packages or ()
    if not isinstance(packages, list | tuple):
        raise UserError(f"trust={packages}: give names of packages, as trust=[mylab]")
    for name in packages:
        if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
            raise UserError(f"trust={name!r}: give names of packages, as trust=[mylab]")
        if name in sys.stdlib_module_names or name in PACKAGES:
            raise UserError(f"trust=[{name}]: give packages of your own; what is known of {name} is enough")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise UserError(f"trust=[{name}] needs the package {error.name}: install it") from None
            raise UserError(
                f"trust=[{name}]: there is no package {name}; install it, or put its folder on PYTHONPATH"
            ) from None
    _trusted = tuple(packages)


def composed(target: Any) -> Any:
    """The class or function that a user's own configuration calls `target` (``package.module.name``)."""
    parts, known = _parts(target), (*PACKAGES, *_trusted)
    if parts[0] not in known or len(parts) < 2:
        raise UserError(
            f"_target_ {target!r} is not of {', '.join(known)}; refusing to import it{_own(parts)}"
        )
    return _find(target, parts, known)


def _own(parts: Sequence[str]) -> str:
    """How to say that a package is one's own, for one that may be."""
    known = {*PACKAGES, *_trusted, *sys.stdlib_module_names}
    return "" if parts[0] in known else f"; trust=[{parts[0]}] does, if it is yours"


def _find(target: str, parts: Sequence[str], known: tuple[str, ...]) -> Any:
    for cut in range(len(parts) - 1, 0, -1):  # the longest prefix that is a module; the rest are names in it
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if error.name and not target.startswith(error.name):
                raise UserError(
                    f"{target} needs the package {error.name}: pip install {error.name}"
                ) from None
            continue
        for name in parts[cut:]:
            found = getattr(found, name, None)
            if found is None:
                raise UserError(f"_target_ {target!r} does not exist")
            if not _defined_in(found, known):
                raise UserError(
                    f"_target_ {target!r} is not defined in {', '.join(known)}; refusing to use it"
                )
        return found
    raise UserError(f"_target_ {target!r} does not exist")


def listed(target: Any) -> Any:
    """The class or function that a file calls `target`."""
    parts = _parts(target)
    target = current(target)
    module, _, name = target.rpartition(".")
    if any(target in names for names in LISTED.values()):
        return getattr(importlib.import_module(module), name)
    if parts[:2] in (["torch", "nn"], ["torch", "optim"]) and module in sys.modules:
        found = vars(sys.modules[module]).get(name)
        kinds = (nn.Module, optim.Optimizer)
        if inspect.isclass(found) and issubclass(found, kinds) and _defined_in(found, ("torch",)):
            return found
    if parts[0] in _trusted and _is_part(found := _find(target, parts, _trusted)):
        return found
    raise UserError(
        f"_target_ {target!r} is not among the classes that a file may name (dalle.trust lists them); "
        f"refusing to use it{_own(parts)}"
    )


def _is_part(found: Any) -> bool:
    """Whether something is a class of a kind that runs are made of: an `nn.Module` (network, stage, metric),
    an optimizer, a source, a tokenizer, or derived from one of the listed parts of stages.
    """
    if not inspect.isclass(found):
        return False
    if issubclass(found, (nn.Module, optim.Optimizer)):
        return True
    if any(all(hasattr(found, name) for name in kind) for kind in (SOURCE, TOKENIZER)):
        return True
    parts = [listed(name) for name in LISTED["parts of stages"]]
    return issubclass(found, tuple(part for part in parts if inspect.isclass(part)))


def current(target: str) -> str:
    """Today's name of what a file of an earlier version calls `target`."""
    module, _, name = target.rpartition(".")
    return MOVED.get(target) or (f"{MOVED[module]}.{name}" if module in MOVED else target)


def renamed(node: Any) -> Any:
    """A configuration of an earlier version with today's names and arguments in it."""
    if isinstance(node, list):
        return [renamed(item) for item in node]
    if not isinstance(node, dict):
        return node
    if not isinstance(target := node.get("_target_"), str):
        return {key: renamed(value) for key, value in node.items()}
    target = current(target)
    arguments = ARGUMENTS.get(target, {})
    named = {arguments.get(k, k): target if k == "_target_" else renamed(v) for k, v in node.items()}
    return LACKED.get(target, {}) | named


def _parts(target: Any) -> list[str]:
    if not isinstance(target, str) or len(target) > LONGEST:
        raise UserError(f"_target_ must be the name of a class, got {str(target)[:LONGEST]!r}")
    parts = target.split(".")
    if not all(part.isidentifier() and not part.startswith("__") for part in parts):
        raise UserError(f"_target_ {target!r} is no name of a class; refusing to import it")
    return parts


def _defined_in(thing: Any, packages: tuple[str, ...]) -> bool:
    """Whether something is a class or function of these packages, and not one that they only import."""
    if isinstance(thing, ModuleType) or not (inspect.isclass(thing) or inspect.isroutine(thing)):
        return False
    home = f"{getattr(thing, '__module__', None)}."
    return home.startswith(tuple(f"{package}." for package in packages))
