"""What made some pictures, as a YAML file beside them: enough to make them again.

Bit for bit on the same machine; elsewhere up to the rounding of that machine's matrix products.
"""

import platform
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin

import torch
import yaml

import dalle
from dalle.errors import UserError
from dalle.files import write_text

SCHEMA = 2


def environment() -> dict[str, str | int]:
    """What besides the recipe decides the last bits: versions, number of threads, processor."""
    return {
        "dalle": dalle.__version__,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


@dataclass
class Recipe:
    """Everything that `sample.py` was told, resolved.

    Attributes:
        prompts: one row of pictures each; `n` pictures of each prompt.
        seed: with the numbers of prompt and picture, decides the noise.
        stages: by name (`clip`, `prior`, `decoder` ...), `path` of the run and `weights`, the hash of its
            weights.
        options: by the same names, what each stage was told: sampler, steps, guidance ...
        batch_size: pictures drawn at once; it moves the last bits of a product, nothing visible.
        precision: fp32 or bf16. `device`: cpu or cuda.
        pipeline: what put the stages together. `truncate`: whether long prompts were cut. `previews`: whether
            pictures were also shown half done.
        made_with: the `environment` at the time.
    """

    prompts: list[str]
    n: int
    seed: int
    stages: dict[str, dict[str, str]]
    options: dict[str, dict[str, Any]]
    batch_size: int
    precision: str
    device: str
    pipeline: str = "unclip"
    truncate: bool = False
    previews: bool = False
    made_with: dict[str, Any] = field(default_factory=environment)
    schema: int = SCHEMA

    def write(self, path: str | Path) -> Path:
        """Writes the YAML beside its final name, then renames it. Makes missing folders."""
        write_text(path, self.to_yaml())
        return Path(path)

    def to_yaml(self) -> str:
        """The file's text; also fit for a PNG's metadata."""
        # PyYAML folds exotic line breaks into blanks unless it may escape them
        readable = all(prompt.isprintable() for prompt in self.prompts)
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=readable, width=100)

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """What `write` wrote, perhaps edited since.

        Raises:
            UserError: no such file, no YAML, a missing or unknown key, a value of another type, another
                schema.
        """
        path = Path(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"the recipe {path} cannot be read ({reason}); give the YAML file of a sampling"
            ) from None
        if not isinstance(content, dict) or "schema" not in content:
            raise UserError(f"{path} is no recipe (it has no `schema`); give the YAML file of a sampling")
        if content["schema"] == 1:  # of unclip alone, whose options were keys of the recipe
            content["options"] = {name: content.pop(name, {}) for name in ("prior", "decoder")}
            content["schema"] = SCHEMA
        if content["schema"] != SCHEMA:
            raise UserError(
                f"{path} is a recipe of schema {content['schema']}, this version reads {SCHEMA}; sample anew"
            )
        _check_keys(path, content)
        return cls(**content)

    def check_stages(self, found: Mapping[str, str]) -> None:
        """Whether these stages (name -> hash of weights) are those the pictures were made with.

        Raises:
            UserError: naming the first that is missing, new, or has other weights.
        """
        for name in [*self.stages, *(name for name in found if name not in self.stages)]:
            then, now = self.stages.get(name, {}).get("weights"), found.get(name)
            if then != now:
                where = self.stages.get(name, {}).get("path", "nowhere")
                raise UserError(
                    f"the recipe was made with {name} weights {then or '(none)'} from {where}, but found are "
                    f"{now or 'none'}; give that run back, or sample anew without the recipe"
                )

    def differences(self) -> dict[str, tuple[Any, Any]]:
        """What is different from the environment then, as (then, now): last bits may differ with it."""
        now = environment()
        return {k: (self.made_with.get(k), v) for k, v in now.items() if self.made_with.get(k) != v}


def _check_keys(path: Path, content: Mapping[str, Any]) -> None:
    known = {f.name: f for f in fields(Recipe)}
    for name in content:
        if name not in known:
            raise UserError(f"{path}: `{name}` is not a key of a recipe; it has {', '.join(known)}")
    for name, f in known.items():
        required = f.default is MISSING and f.default_factory is MISSING
        if required and name not in content:
            raise UserError(f"{path}: the key `{name}` is missing")
        if name in content and not _fits(content[name], f.type):
            words = str(f.type) if get_origin(f.type) else getattr(f.type, "__name__", str(f.type))
            raise UserError(f"{path}: `{name}` must be of type {words}, got {content[name]!r}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from YAML is of a field's type, down to the items of lists and dicts."""
    if hint is Any:
        return True
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if get_origin(hint) is dict:
        key, item = get_args(hint)
        return isinstance(value, dict) and all(_fits(k, key) and _fits(v, item) for k, v in value.items())
    return type(value) is hint
