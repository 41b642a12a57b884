"""U-Nets with guided-diffusion's names, which Karlo and GLIDE have, and with diffusers'.

In the former query, key and value of each head are in a row, and blocks are numbered through all levels.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle.errors import UserError
from dalle.weights.writing import count, shape_of

UNET = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}


def unet_sizes(found: Mapping[str, Tensor], prefix: str, path: Path, what: str) -> dict[str, Any]:
    """What a U-Net's tensors say of its sizes."""
    first, *_ = shape_of(found, f"{prefix}conv_in.weight", 4, path, what)
    block = f"{prefix}down_blocks.{{}}.resnets.0.conv1.weight"
    levels = count(found, block)
    widths = [found[block.format(i)].shape[0] for i in range(levels)]
    if not levels or any(width % first for width in widths):
        raise UserError(f"{path} is another {what} than this version knows: its widths are {widths}")
    told_by, *_ = shape_of(found, f"{prefix}down_blocks.0.resnets.0.time_emb_proj.weight", 2, path, what)
    attention = f"{prefix}down_blocks.{{}}.attentions.0.to_q.weight"
    return {
        "width": first,
        "multipliers": [width // first for width in widths],
        "blocks": count(found, f"{prefix}down_blocks.0.resnets.{{}}.conv1.weight"),
        "attention": [i for i in range(levels) if attention.format(i) in found],
        "scale_shift": told_by == 2 * widths[0],
    }


def renamed(name: str, table: Mapping[str, str]) -> str | None:
    """By the entry of the table that is the name, or all of it but the last part."""
    if name in table:
        return table[name]
    layer, _, kind = name.rpartition(".")
    return f"{table[layer]}.{kind}" if layer in table else None


def per_head(value: Tensor, parts: int, head_dim: int, path: Path) -> list[Tensor]:
    """Query, key and value (or the latter two) of rows in which each head has its own after one another."""
    if len(value) % (parts * head_dim):
        raise UserError(f"{path}: {len(value)} rows are not {parts} of heads of {head_dim}; give the heads'")
    rows = value.unflatten(0, (-1, parts, head_dim))
    return [rows[:, i].flatten(0, 1) for i in range(parts)]


def unet_names(found: Mapping[str, Tensor], path: Path, head_dim: int) -> dict[str, Tensor]:
    """diffusers' names of a U-Net with guided-diffusion's, where blocks are numbered through all levels.

    A level has as many blocks on the way up as there are before the first that also enlarges, and one less on
    the way down, where shrinking is a block of its own.
    """
    ups = 1 + max((int(n.split(".")[1]) for n in found if n.startswith("output_blocks.")), default=0)
    enlarging = [
        int(name.split(".")[1])
        for name in found
        if name.startswith("output_blocks.") and name.split(".")[2] != "0" and ".in_layers.0." in name
    ]
    per_level = 1 + min(enlarging, default=ups - 1)
    middle = sorted({int(name.split(".")[1]) for name in found if name.startswith("middle_block.")})
    made: dict[str, Tensor] = {}
    for name, value in found.items():
        parts = name.split(".")
        if (new := renamed(name, UNET)) is not None:
            made[new] = value
        elif parts[0] == "input_blocks" and len(parts) > 4:
            level, i = divmod(int(parts[1]) - 1, per_level)
            inner = f"resnets.{i}" if i < per_level - 1 else "downsamplers.0"
            attention = f"attentions.{i}"
            made |= _block(f"down_blocks.{level}.", inner, attention, parts[3:], value, path, head_dim)
        elif parts[0] == "output_blocks" and len(parts) > 4:
            level, i = divmod(int(parts[1]), per_level)
            inner = "upsamplers.0" if parts[2] != "0" else f"resnets.{i}"
            made |= _block(f"up_blocks.{level}.", inner, f"attentions.{i}", parts[3:], value, path, head_dim)
        elif parts[0] == "middle_block" and len(parts) > 3:
            inner = f"resnets.{0 if int(parts[1]) == middle[0] else 1}"
            made |= _block("mid_block.", inner, "attentions.0", parts[2:], value, path, head_dim)
        else:
            made[name] = value
    return made


def _block(
    level: str, resnet: str, attention: str, parts: list[str], value: Tensor, path: Path, head_dim: int
) -> dict[str, Tensor]:
    """One weight of a residual block or of an attention: the latter's are convolutions of width 1."""
    name = ".".join(parts)
    if new := renamed(name, RESNET):
        return {f"{level}{resnet}.{new}": value}
    value = value.flatten(1) if value.ndim == 3 else value
    layer, _, kind = name.rpartition(".")
    for known, ones in (("qkv", ("to_q", "to_k", "to_v")), ("encoder_kv", ("add_k_proj", "add_v_proj"))):
        if layer == known:
            rows = per_head(value, len(ones), head_dim, path)
            return {f"{level}{attention}.{one}.{kind}": row for one, row in zip(ones, rows, strict=True)}
    return {f"{level}{attention}.{renamed(name, ATTENTION) or name}": value}
