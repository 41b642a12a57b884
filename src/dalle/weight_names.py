"""Names of weights in files: those of earlier versions are read, and hashes know no others.

Layers were called something else at first. Runs are known by the hash of their weights, which stands in the
manifests of all runs that were made from them; so the hash is over first names, whatever a layer is called.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

FIRST = {  # today's name of a layer -> what it was called first
    "conv_in": "inlet",
    "conv_norm_out": "outlet_norm",
    "conv_out": "outlet",
    "proj_in": "inlet",
    "proj_out": "outlet",
}


def first_name(name: str) -> str:
    """What a weight was called first: ``net.conv_in.bias`` -> ``net.inlet.bias``."""
    return ".".join(FIRST.get(part, part) for part in name.split("."))


def as_today(weights: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """The same values, under the names that the weights of `module` have today; others stay."""
    today = {first_name(name): name for name in module.state_dict()}
    return {today.get(first_name(name), name): value for name, value in weights.items()}
