"""Reads weights that anybody may have written, and runs nothing that is in them.

What safetensors and `torch.load(weights_only=True)` read is read by those. Older files are pickles of whole
networks (OpenAI's dVAE), programs (the TorchScript archives of OpenAI's CLIP) or hold classes beside the
weights (Lightning). A pickle names what its reader is to call: here that is nothing but tensors and ordered
dicts, and whatever else is named becomes a `Husk`, which keeps what was stored for it.
"""

import hashlib
import math
import pickle
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dalle.errors import UserError, reason
from dalle.finite import check_finite
from dalle.reading import read_json

ADVICE = "get the file again"
WEIGHTS = (  # names of files of weights in a folder, the first that is there counts
    "model.safetensors", "open_clip_model.safetensors", "diffusion_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin", "pytorch_model.bin", "diffusion_pytorch_model.bin", "latest.pth",
)  # fmt: skip
CONFIGS = ("config.json", "open_clip_config.json", "prior_config.json")
HALVES, MINI = ("encoder", "decoder"), "_mini"  # files of OpenAI's dVAE, and of min-dalle, in a folder
ENDINGS = (".pkl", ".pt", f"{MINI}.pt", ".safetensors")
WRAPPERS = ("ema_model", "state_dict", "model", "module")  # where trainers keep weights, beside other things
STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
MAGIC = 0x1950A86A20F9469CFC6C  # of files of torch.save before 1.6
DEEPEST = 64  # parts in parts of a network
MOST = 50_000  # parts and tensors
PACKED = 2**26  # bytes that an archive may hold beyond twice its size


@dataclass
class PublicWeights:
    """What was found: tensors by name on the CPU, the configuration beside them in a folder, and what a
    trainer said in the file itself: `config` and `version`.
    """

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 by name
    said: dict[str, Any] = field(default_factory=dict)

    def without(self, *prefixes: str) -> dict[str, Tensor]:
        """The tensors, less what names begin with that trainers and wrappers have put in front of all."""
        found = self.tensors
        for prefix in prefixes:
            if found and all(name.startswith(prefix) for name in found):
                found = {name.removeprefix(prefix): value for name, value in found.items()}
        return found


def read_weights(path: Path, parts: tuple[str, ...] = ()) -> PublicWeights:
    """The weights in a file, or in a folder as Hugging Face's libraries write it.

    Args:
        parts: folders within it, each of a network, where it is one of a pipeline: their names come before
            those of their tensors, and their configurations are kept apart.

    Raises:
        UserError: nothing there, damaged, no weights, or numbers that are none.
    """
    if not path.exists():
        raise UserError(f"there is no {path}; give a file of weights or a folder that holds one")
    if parts and all((path / part).is_dir() for part in parts):
        whole = PublicWeights(path, {})
        for part in parts:
            found = read_weights(path / part)
            whole.tensors |= {f"{part}.{name}": value for name, value in found.tensors.items()}
            whole.files |= {f"{part}/{name}": digest for name, digest in found.files.items()}
            whole.config[part] = found.config
        return whole
    files, config = [path], dict[str, Any]()
    if path.is_dir():
        files = _files_in(path)
        for name in CONFIGS:
            if (path / name).is_file():
                config |= read_json(path / name, dict, ADVICE)
    tensors, said = dict[str, Tensor](), dict[str, Any]()
    halves = tuple(file.stem.removesuffix(MINI) for file in files) == HALVES
    for file in files:
        half = f"{file.stem.removesuffix(MINI)}." if halves else ""
        found, beside = _read(file)
        tensors |= {half + name: value for name, value in found.items()}
        said |= beside
    if not tensors:
        raise UserError(f"{path} holds no weights; give a file of weights or a folder that holds one")
    check_finite(tensors, path, "take another file")
    return PublicWeights(path, tensors, config, {file.name: _digest(file) for file in files}, said)


def _files_in(folder: Path) -> list[Path]:
    """The files of weights in a folder: one, those that an index of its lists, or two halves."""
    for ending in ENDINGS:
        halves = [folder / f"{half}{ending}" for half in HALVES]
        if all(half.is_file() for half in halves):
            return halves
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            listed = read_json(index, dict, ADVICE).get("weight_map")
            names = sorted({str(file) for file in listed.values()}) if isinstance(listed, dict) else []
            if not names or any(Path(file).name != file for file in names):
                raise UserError(f"{index} is damaged (weight_map names no files beside it); {ADVICE}")
            return [folder / file for file in names]
    raise UserError(f"{folder} holds none of {', '.join(WEIGHTS)}; give the file of weights itself")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():  # a pipe or a device may never end
        raise UserError(f"{path} is not there, or no file; {ADVICE}")
    try:
        with path.open("rb") as file:
            head = file.read(16)
        if path.suffix == ".safetensors" or head[8:10] == b'{"':  # a length, then JSON
            return load_file(path), {}
        _check_packed(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of TorchScript archives, which it then refuses
                content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError, AttributeError, EOFError):
            content = _read_inert(path)
        return dict(tensors_in(content, [MOST])), said_in(content)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({reason(error)}); {ADVICE}") from None
    except Exception as error:  # a damaged pickle raises whatever its halves lead to
        raise UserError(f"{path} holds no weights that can be read ({reason(error)}); {ADVICE}") from None


def _check_packed(path: Path) -> None:
    """Raises ValueError of an archive that stands for far more than it is: weights are stored as they are, in
    TorchScript's archives only the program is packed.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            whole = sum(member.file_size for member in archive.infolist())
        if whole > PACKED + 2 * path.stat().st_size:
            raise ValueError(f"{whole / 2**30:,.1f} GiB are packed in it, as in no file of weights")


def said_in(content: Any) -> dict[str, Any]:
    """What trainers say beside the weights: their configuration, and the version of their package."""
    if not isinstance(content, Mapping):
        return {}
    config, version = content.get("config"), content.get("version")
    if isinstance(version, Husk) and isinstance(version.state, dict):  # of the package packaging
        _, release, *_ = (*getattr(version.state.get("_version"), "given", ()), None, None)
        version = ".".join(map(str, release)) if isinstance(release, tuple) else None
    said = {"config": config if isinstance(config, dict) else None,
            "version": version if isinstance(version, str) else None}  # fmt: skip
    return {key: value for key, value in said.items() if value is not None}


def tensors_in(content: Any, room: list[int], name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors in what a file held, by their names in the network.

    Args:
        room: how many things may still be looked at; a few bytes can stand for any number of them.
    """
    room[0] -= 1
    if depth > DEEPEST or room[0] < 0:
        raise ValueError("it is nested deeper, or stands for more, than any network")
    if isinstance(content, Tensor):
        if content.layout != torch.strided or content.is_quantized or content.device.type != "cpu":
            raise ValueError(f"{name} is no plain tensor")
        if content.nbytes > content.untyped_storage().nbytes():  # a few bytes that stand for gigabytes
            raise ValueError(f"{name} is larger than what was stored for it")
        yield name, content.detach()
    if isinstance(content, Husk):
        content = content.parts()
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    if not isinstance(content, Mapping):
        return
    if not depth:
        inner = [content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping | Husk)]
        content = inner[0] if inner else content
        content = content.parts() if isinstance(content, Husk) else content
    for key, value in content.items():
        yield from tensors_in(value, room, f"{name}.{key}" if name else str(key), depth + 1)


class Husk:
    """What stands for an object of a class that is not to be imported: its state, and nothing it could do."""

    state: Any = None
    given: tuple[Any, ...] = ()

    def __new__(cls, *given: Any, **__: Any) -> "Husk":
        made = super().__new__(cls)
        made.given = given
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> "Husk":
        return Husk()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass

    def parts(self) -> dict[str, Any]:
        """The parameters, buffers and parts of a module; of a program's object all it holds."""
        state = self.state if isinstance(self.state, dict) else {}
        groups = [state.get(key) for key in ("_parameters", "_buffers", "_modules")]
        groups = [group for group in groups if isinstance(group, dict)] or [state]
        return {str(key): value for group in groups for key, value in group.items()}


def _rebuilt(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    """A tensor in its storage; PyTorch refuses what would reach beyond."""
    if math.prod(size) > max(1, storage.numel()):
        raise ValueError("a tensor is larger than what was stored for it")
    return torch.as_strided(storage, size, stride, offset)


KNOWN = {  # the only names in a pickle that stand for what they name
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuilt,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}


class Inert(pickle.Unpickler):
    """An unpickler that imports nothing: see the top."""

    def __init__(self, file: Any, stored: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self.stored = stored

    def find_class(self, module: str, name: str) -> Any:
        return KNOWN.get((module, name), Husk)

    def persistent_load(self, pid: Any) -> Any:
        kind, *rest = pid
        if kind == "module":  # a class with its source, as files before 1.6 have it
            return rest[0]
        dtype, key, _, count, *_ = rest
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError("it has storage of an unknown kind")
        return self.stored(dtype, str(key), count)


def _read_inert(path: Path) -> Any:
    if not zipfile.is_zipfile(path):
        return _read_before_1_6(path)
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        (main,) = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        folder, made = main.removesuffix("data.pkl"), dict[str, Tensor]()
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != sys.byteorder.encode():
            raise ValueError("it was written on a machine of another byte order")

        def stored(dtype: torch.dtype, key: str, count: int) -> Tensor:
            if key not in made:
                content = bytearray(archive.read(f"{folder}data/{key}"))
                made[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            return made[key]

        with archive.open(main) as file:
            return Inert(file, stored).load()


def _read_before_1_6(path: Path) -> Any:
    """Pickles in a row, the last of them a list of the storages, whose bytes follow."""
    largest, made = path.stat().st_size, dict[str, Tensor]()

    def stored(dtype: torch.dtype, key: str, count: int) -> Tensor:
        if key not in made:
            if not 0 <= count * dtype.itemsize <= largest:
                raise ValueError("it says of more numbers than it holds")
            made[key] = torch.empty(count, dtype=dtype)
        return made[key]

    with path.open("rb") as file:

        def load() -> Any:
            return Inert(file, stored).load()

        if load() != MAGIC:
            raise ValueError("it is no file of torch.save")
        _, _, content, keys = load(), load(), load(), load()
        for key in keys:
            storage = made[key]
            if int.from_bytes(file.read(8), "little") != storage.numel():
                raise ValueError("a part of it is missing")
            if len(content_bytes := file.read(storage.nbytes)) != storage.nbytes:
                raise ValueError("a part of it is missing")
            if content_bytes:
                storage.copy_(torch.frombuffer(bytearray(content_bytes), dtype=storage.dtype))
    return content


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
