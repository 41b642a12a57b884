"""What ``auto`` in a configuration becomes: the defaults that follow the pictures' size and number.

Three kinds: lengths (batch, steps) follow how many pictures there are, and above 64 px the batch of a network
that sees them also their side; sizes that the data say (image size,
vocabulary) are theirs; and a network itself says what suits the picture's size (`suited` of its class). A
number that is given stays. What a run was trained with is in its config.yaml, without an ``auto``.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dalle.errors import UserError
from dalle.trust import composed

Config = dict[str, Any]

FEWEST = 8  # pictures in a batch, where there are so many
BATCHES = 4  # in an epoch of few pictures
EPOCHS, STEPS = 200, 1000  # no training is longer than so many epochs, unless that were fewer steps
USUAL = 32  # px, of `shapes`: what differs at other sizes is said
LARGE = 64  # px, above which a batch is smaller: twice the side, half the pictures
CHOICES = ("vocab_size", "image_levels")  # sizes that a network may have otherwise than the data


def fill_lengths(config: Config, items: int, world: int = 1, saved: Config | None = None) -> dict[str, Any]:
    """Replaces ``auto`` in the lengths of a training, and gives those that are shorter than the stage's own.

    Args:
        items: pictures to train on.
        world: ranks, each of which has a batch of its own.
        saved: the configuration of a run that is resumed, which goes on as it was.

    Raises:
        UserError: `at_most`, which is taken out, has no number for an ``auto``.
    """
    at_most, trainer, model = config.pop("at_most", {}), config["trainer"], config["model"]
    for name, most in at_most.items():
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise UserError(f"at_most.{name} must be a whole number, at least 1, got {most!r}")
    keep(config, saved or {}, ("batch_size",))
    keep(trainer, (saved or {}).get("trainer"), ("max_steps",))
    keep(model, (saved or {}).get("model"), ("disc_start",))
    shorter: dict[str, Any] = {}

    def settle(node: Config, key: str, name: str, value: int) -> None:
        if node.get(key) == "auto":
            if key not in at_most:
                raise UserError(f"{name}=auto, but there is no at_most.{key}; give a number")
            node[key] = min(value, at_most[key])
            if node[key] < at_most[key]:
                shorter[name] = node[key]

    own = items // world
    most = min(max(FEWEST, own // BATCHES), largest_batch(config, at_most.get("batch_size", 1)))
    settle(config, "batch_size", "batch_size", max(1, min(own, most)))
    batch = config["batch_size"]
    if config["datamodule"].get("batch_size") == "auto":
        config["datamodule"]["batch_size"] = batch
    settle(trainer, "max_steps", "trainer.max_steps", max(STEPS, EPOCHS * max(1, own // max(1, batch))))
    settle(model, "disc_start", "model.disc_start", trainer["max_steps"] // 2)
    for node in nodes(model):  # of a ramp as long as the training
        if node.get("steps") == "auto":
            node["steps"] = trainer["max_steps"]
    return shorter


def largest_batch(config: Config, at_most: int) -> int:
    """What is at most in a batch; of a network that sees pictures fewer of large ones, which take longer."""
    sees = "image_size" in (config["model"].get("net") or {})
    side = config["data"].get("image_size") if sees else None
    if not isinstance(side, int) or side <= LARGE:
        return at_most
    return max(min(FEWEST, at_most), at_most * LARGE // side)


def fill_sizes(config: Config, sizes: Mapping[str, Any], saved: Config | None = None) -> dict[str, Any]:
    """Replaces ``auto`` in the model by the sizes that the data and their CLIP have, and by what suits the
    networks; gives those of the latter that are others than at 32 px.

    Args:
        sizes: of the data, by the names that networks have for them.
        saved: the configuration of a run that is resumed, whose network it keeps.

    Raises:
        UserError: a size that is given is not that of the data, or nobody can say it.
    """
    net = config["model"]["net"]
    for key, value in net.items():
        if value == "auto" and key in sizes:
            net[key] = sizes[key]
        elif value != "auto" and key in sizes and key not in CHOICES and value != sizes[key]:
            raise UserError(
                f"model.net.{key}={value} does not fit the data, which has {sizes[key]}; "
                f"leave it at auto, or change the data"
            )
    unusual = {}
    for part in ("net", "discriminator"):
        node = config["model"].get(part) or {}
        keep(node, ((saved or {}).get("model") or {}).get(part), node)
        missing = [key for key, value in node.items() if value == "auto"]
        suited = {size: suit(node, size) for size in (sizes.get("image_size"), USUAL) if size}
        for key in missing:
            if key not in suited.get(sizes.get("image_size"), {}):
                raise UserError(f"model.{part}.{key}=auto, but the data does not say it; give a number")
            node[key] = suited[sizes["image_size"]][key]
            if node[key] != suited[USUAL].get(key):
                unusual[f"model.{part}.{key}"] = node[key]
    return unusual


def keep(node: Config, saved: Any, keys: Iterable[str]) -> None:
    """Puts what a saved configuration says in the place of ``auto``."""
    for key in keys:
        if node.get(key) == "auto" and isinstance(saved, Mapping) and key in saved:
            node[key] = saved[key]


def suit(node: Config, image_size: int) -> dict[str, Any]:
    """What a network says of its own sizes for pictures of this one, beside those that are given."""
    kind = composed(node["_target_"]) if "_target_" in node else None
    if kind is None or not hasattr(kind, "suited"):
        return {}
    takes = inspect.signature(kind).parameters
    return kind.suited(image_size, {k: v for k, v in node.items() if k in takes and v != "auto"})


def nodes(node: Any) -> Iterator[Config]:
    """All dicts in a nest of dicts."""
    if isinstance(node, dict):
        yield node
        for inner in node.values():
            yield from nodes(inner)


def said(config: Config, items: int, followed: Mapping[str, Any]) -> str | None:
    """One line on what has followed the pictures' size and number, ready to be given otherwise."""
    if not followed:
        return None
    given = " ".join(f"{key}={str(value).replace(' ', '')}" for key, value in followed.items())
    size = config["data"].get("image_size")
    of = f" of {size} px" if size else ""  # what is encoded has none
    return f"for {items:,} pictures{of}: {given} (each can be given)"
