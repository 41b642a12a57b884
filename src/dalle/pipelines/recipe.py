"""What made some pictures, as a YAML file beside them: enough to make them again.

Bit for bit on the same machine; elsewhere up to the rounding of that machine's matrix products.
"""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

import dalle
from dalle import schemas
from dalle.errors import UserError
from dalle.files import write_text
from dalle.ranges import shown
from dalle.reading import Facts, migrated, read_yaml, shaped
from dalle.run_dir import Run


def _options_of_stages(facts: Facts) -> Facts:
    """Of unclip alone, whose options were keys of the recipe."""
    options = {name: facts.pop(name, {}) for name in ("prior", "decoder")}
    return {**facts, "options": options}


def _progress_strip(facts: Facts) -> Facts:
    return {"progress_strip" if key == "previews" else key: value for key, value in facts.items()}


MIGRATIONS = (_options_of_stages, _progress_strip)  # from schema 1 to 2, from 2 to 3
SCHEMA = len(MIGRATIONS) + 1


def environment() -> dict[str, str | int]:
    """What besides the recipe decides the last bits: versions, number of threads, processor."""
    return {
        "dalle": dalle.__version__,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


@dataclass
class SampleRecipe:
    """Everything that `sample.py` was told, resolved.

    Attributes:
        prompts: one row of pictures each; `n` pictures of each prompt.
        seed: with the numbers of prompt and picture, decides the noise.
        stages: by name (`clip`, `prior`, `decoder` ...), `path` of the run and `weights`, the hash of its
            weights.
        options: by the same names, what each stage was told: sampler, steps, guidance ...
        batch_size: pictures drawn at once; it moves the last bits of a product, nothing visible.
        precision: fp32 or bf16. `device`: cpu or cuda.
        compile: none, graphs or full; kernels that are fused round otherwise.
        pipeline: what put the stages together. `truncate`: whether long prompts were cut.
        progress_strip: whether pictures were also shown half done.
        edit: what was done to which picture (`dalle.pipelines.editing.Edit`); None: drawn from nothing.
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
    progress_strip: bool = False
    compile: str = "none"
    edit: dict[str, Any] | None = None
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
        facts = {key: value for key, value in asdict(self).items() if key != "edit" or value}
        return yaml.safe_dump(facts, sort_keys=False, allow_unicode=readable, width=100)

    @classmethod
    def read(cls, path: str | Path) -> "SampleRecipe":
        """What `write` wrote, perhaps edited since.

        Raises:
            UserError: no such file, no YAML, a missing or unknown key, a value of another type, another
                schema.
        """
        advice = "give the YAML file of a sampling"
        content = read_yaml(path, dict, advice)
        if "schema" not in content:
            raise UserError(f"{path} is no recipe (it has no `schema`); {advice}")
        if (found := migrated(content, MIGRATIONS)) is None:
            raise UserError(
                f"{path} is a recipe of schema {shown(content['schema'])}, this version reads {SCHEMA}; "
                "sample anew"
            )
        facts: Any = shaped(found, schemas.SampleRecipe, path, advice)
        return cls(**facts)

    def find_runs(self, recipe: Path, folder: Path, given: Mapping[str, str | None]) -> dict[str, str]:
        """Where the runs are now: where they were, else where they were moved to, known by their weights'
        hash.

        Args:
            recipe: the file, beside whose folder they may be.
            folder: logs/<name>. `given`: by stage, what the command line says.

        Raises:
            UserError: one is gone, and nobody says where to.
        """
        found = {}
        for name, stage in self.stages.items():
            then = stage["path"]
            usual = [folder / Path(then).name, recipe.parent / then]
            usual += [parent / Path(then).name for parent in recipe.absolute().parents[:3]]
            places = [then, given.get(name), *map(str, usual)]
            found[name] = next((p for p in places if p and _holds(p, stage["weights"])), then)
            if not Path(found[name]).exists() and name != "clip":  # that can be a public one, or the others'
                raise UserError(
                    f"{recipe}: its {name} is no longer at {then}; say where its runs are now with name= and "
                    f"paths.logs=, or pipeline.{name}="
                )
        return found

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


def _holds(path: str, weights: str) -> bool:
    """Whether a finished run has these weights."""
    try:
        return Run(Path(path)).manifest().get("weights") == weights
    except (UserError, OSError, ValueError):
        return False
