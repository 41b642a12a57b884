"""Runs at the Hugging Face hub: a repository for each, with a card that says what the weights are.

What goes there is what others need to use the run: settings, weights, tokenizer, manifest. Paths of the
machine on which it was trained stay out of it.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from dalle.errors import UserError
from dalle.files import atomic_folder
from dalle.run_dir import Run, check_usable
from dalle.run_lock import claimed

FILES = ("config.yaml", "tokenizer.json", "model.safetensors", "manifest.json")  # the last makes a run whole
CARD = "README.md"


def push(run: Run, repository: str, licence: str | None = None, private: bool = True) -> str:
    """Uploads a finished run in one commit; gives the address.

    Raises:
        UserError: no token, no licence, no finished run, or the hub refuses.
    """
    manifest, hub = run.manifest("stage"), _hub()
    licence = licence or known_licence(manifest)
    if not licence:
        raise UserError(f"{run}: under which licence? Give it as licence=..., as apache-2.0")
    if not (token := hub.get_token()):
        raise UserError(
            "dalle push needs a token of the Hugging Face hub: set HF_TOKEN, or run `hf auth login`"
        )
    content: dict[str, Any] = {name: str(run.path / name) for name in FILES if (run.path / name).is_file()}
    content["config.yaml"] = shared_config(run).encode()
    content[CARD] = card(run, repository, licence).encode()
    api = hub.HfApi(token=token)
    with _explained(repository):
        url = api.create_repo(repository, private=private, exist_ok=True)
        operations = [hub.CommitOperationAdd(name, what) for name, what in content.items()]
        api.create_commit(repository, operations, commit_message=f"A {manifest['stage']} of dalle")
    return str(url)


def pull(repository: str, logs: Path, name: str, revision: str | None = None) -> Run:
    """Downloads a run that was pushed into ``logs/<name>/<stage>``.

    Raises:
        UserError: there is none, it is damaged or could not be used, or the directory holds a run already.
    """
    hub, kept = _hub(), logs / name / ".pulled"
    with atomic_folder(kept) as folder:
        with _explained(repository):
            hub.snapshot_download(repository, revision=revision, local_dir=folder, allow_patterns=[*FILES])
        found = Run(folder)
        if not found.finished:
            raise UserError(f"{repository} holds no run of dalle (manifest.json and model.safetensors)")
        stage = found.manifest("stage")["stage"]
        if not stage.isidentifier():
            raise UserError(f"{repository}: manifest.json is damaged (stage); tell who made it")
        try:
            check_usable(folder)
        except UserError as error:
            said = str(error).replace(str(folder), repository)
            raise UserError(f"{repository} at the Hugging Face hub cannot be used: {said}") from None
        run = Run(logs / name / stage)
        if run.occupied:
            raise UserError(f"{run} already holds a run; give another name=, or delete it")
        with claimed(run, overwrite=False):
            for file in FILES:
                if (folder / file).is_file():
                    shutil.move(folder / file, run.path / file)
    shutil.rmtree(kept, ignore_errors=True)
    return run


def shared_config(run: Run) -> str:
    """config.yaml without what says where things were on the machine: other runs are known by their stage."""
    config = {
        key: value for key, value in run.config().items() if key not in ("paths", "upstream", "command")
    }
    for key in ("clip", "image_tokenizer"):
        if isinstance(node := config.get(key), dict) and "path" in node:
            config[key] = {**node, "path": Path(node["path"]).name}
    config = {key: config[key] for key in ("name", "stage", "origin", "model", "clip", "image_tokenizer")
              if key in config}  # fmt: skip
    if isinstance(origin := config.get("origin"), dict):
        config["origin"] = {**origin, "path": Path(origin["path"]).name}
    config.setdefault("origin", {"layout": "dalle", "path": run.path.name, "files": {}, "licence": None})
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def known_licence(manifest: Mapping[str, Any]) -> str | None:
    """What an import noted."""
    return (manifest.get("origin") or {}).get("licence")


def card(run: Run, repository: str, licence: str | None) -> str:
    """The model card: data, figures and how they were measured, licence (None: the one an import noted)."""
    facts = run.manifest()
    licence = licence or known_licence(facts) or "not said yet: dalle push needs licence=..."
    stage, data, origin = facts.get("stage", "?"), facts.get("data"), facts.get("origin")
    known = {"licence": licence.lower()} if " " not in licence else {"licence": "other", "name": licence}
    head = {"license": known["licence"], "library_name": "dalle", "tags": ["dalle", str(stage)]}
    if "name" in known:
        head["license_name"] = known["name"]
    lines = [
        "---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "",
        f"# {repository.split('/')[-1]}", "",
        f"The {stage} of a DALL-E pipeline, {facts.get('parameters', 0):,} parameters. "
        f"`dalle pull {repository} name=NAME` makes it a run.", "",
    ]  # fmt: skip
    if origin:
        lines += [
            "## Origin",
            "",
            f"Imported from the layout {origin['layout']} ({Path(origin['path']).name}).",
            "",
        ]
        lines += [f"- `{name}`: SHA-256 `{digest}`" for name, digest in origin["files"].items()] + [""]
    if data:
        items = ", ".join(f"{count:,} {split}" for split, count in data["items"].items())
        prints = ", ".join(f"{split} `{value}`" for split, value in data["fingerprint"].items())
        lines += ["## Data", "", f"`{data['source']}`: items {items}. Fingerprints: {prints}.", ""]
    if facts.get("image_size"):
        lines += [f"Pictures of {facts['image_size']} px.", ""]
    if metrics := facts.get("metrics"):
        said = f"Of the test split, once, after {facts.get('steps', 0):,} steps, with the averaged weights."
        lines += ["## Figures", "", said, "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in metrics.items()] + [""]
    for name in ("clip", "image_tokenizer"):
        if isinstance(facts.get(name), dict):
            lines += [f"Works with the {name} whose weights have the hash `{facts[name]['weights']}`.", ""]
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    lines += ["## Licence", "", licence, "", f"Weights `{facts.get('weights')}`, written by {versions}.", ""]
    return "\n".join(lines)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError("the hub needs the package huggingface_hub: pip install huggingface_hub") from error
    return huggingface_hub


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turns what the hub, or the network on the way there, says into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of the hub's, of what it is reached by, and of what checks names
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{repository} at the Hugging Face hub: {said}") from error
