"""Which classes a configuration may name.

What a user composes (command line, own config files) may name any class or function that is defined in
`PACKAGES`. What is read from a file (a run's config, a recipe) is data from anybody: it may name only what is
`LISTED` here and the classes of ``torch.nn`` and ``torch.optim``; anything else is refused before it is
imported. Neither is led through modules to what they import: ``torch.os.system`` is no class of torch.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn, optim

from dalle.errors import UserError

Trust = Callable[[str], Any]  # a name -> the class or function; raises UserError where it is not trusted

PACKAGES = ("dalle", "torch", "lightning")
LISTED = {  # what runs and recipes are made of: the whole of it, a test says what is missing
    "stages": (
        "dalle.stages.clip.ClipStage", "dalle.stages.dalle.DalleStage", "dalle.stages.decoder.DecoderStage",
        "dalle.stages.dvae.DVAEStage", "dalle.stages.gan.GanStage", "dalle.stages.prior.PriorStage",
        "dalle.stages.vae.VAEStage", "dalle.stages.vqgan.VQGANStage",
    ),
    "networks": (
        "dalle.nets.clip.CLIP", "dalle.nets.dalle.DALLE", "dalle.nets.dit.DiT", "dalle.nets.dvae.DVAE",
        "dalle.nets.gan.Discriminator", "dalle.nets.gan.Generator", "dalle.nets.prior.Prior",
        "dalle.nets.small_unet.SmallUNet", "dalle.nets.unet.UNet", "dalle.nets.vae.VAE",
        "dalle.nets.vqgan.PatchDiscriminator", "dalle.nets.vqgan.VQGAN",
    ),
    "parts of stages": (
        "dalle.diffusion.denoiser.Denoiser", "dalle.diffusion.samplers.Sampler",
        "dalle.diffusion.schedule.Schedule", "dalle.metrics.perceptual.perceptual_distance",
        "dalle.metrics.retrieval.Retrieval", "dalle.stages.dvae.Ramp", "dalle.optim.muon.Muon",
        "dalle.optim.factory.OptimizerFactory",
    ),
    "frozen networks": (
        "dalle.data.open_clip.load_open_clip", "dalle.run_dir.load_clip",
        "dalle.run_dir.load_image_tokenizer",
    ),
    "sources": (
        "dalle.data.folder.Folder", "dalle.data.imagefolder.ImageFolder", "dalle.data.shapes.Shapes",
    ),
}  # fmt: skip
MOVED = {  # names in files of earlier versions -> what is called so today; modules, and classes in them
    "dalle.callbacks": "dalle.training.callbacks",
    "dalle.checkpoints": "dalle.training.checkpoints",
    "dalle.data.modules": "dalle.data.datamodules",
    "dalle.loggers": "dalle.training.loggers",
    "dalle.reconstructions": "dalle.training.reconstructions",
    "dalle.runs": "dalle.run_dir",
    "dalle.search": "dalle.launch.hparam_search",
    "dalle.stages.muon": "dalle.optim.muon",
    "dalle.stages.optim.Recipe": "dalle.optim.factory.OptimizerFactory",
}
ARGUMENTS = {"dalle.nets.dvae.DVAE": {"inlet": "code_dim"}}  # the same of arguments, by today's class

LONGEST = 200  # letters of a name


def composed(target: Any) -> Any:
    """The class or function that a user's own configuration calls `target` (``package.module.name``)."""
    parts = _parts(target)
    if parts[0] not in PACKAGES or len(parts) < 2:
        raise UserError(f"_target_ {target!r} is not of {', '.join(PACKAGES)}; refusing to import it")
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
            if not _defined_in(found, PACKAGES):
                raise UserError(
                    f"_target_ {target!r} is not defined in {', '.join(PACKAGES)}; refusing to use it"
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
    raise UserError(
        f"_target_ {target!r} is not among the classes that a file may name (dalle.trust lists them); "
        "refusing to use it"
    )


def current(target: str) -> str:
    """Today's name of what a file of an earlier version calls `target`."""
    module, _, name = target.rpartition(".")
    return MOVED.get(target) or (f"{MOVED[module]}.{name}" if module in MOVED else target)


def renamed(node: Any) -> Any:
    """A configuration of an earlier version with today's names in it."""
    if isinstance(node, list):
        return [renamed(item) for item in node]
    if not isinstance(node, dict):
        return node
    if not isinstance(target := node.get("_target_"), str):
        return {key: renamed(value) for key, value in node.items()}
    target = current(target)
    arguments = ARGUMENTS.get(target, {})
    return {arguments.get(k, k): target if k == "_target_" else renamed(v) for k, v in node.items()}


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
