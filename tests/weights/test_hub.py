"""Runs to the hub and back. The hub is a folder here: nothing is sent anywhere."""

import shutil
from pathlib import Path

import pytest

from dalle.cli import pull, push
from dalle.errors import UserError
from dalle.run_dir import Run, load_clip

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder of repositories, and a token for it."""
    place = tmp_path / "hub"

    def create(api, repository, private, exist_ok):
        (place / repository).mkdir(parents=True, exist_ok=exist_ok)
        return f"https://huggingface.co/{repository}"

    def commit(api, repository, operations, commit_message):
        for operation in operations:
            what = operation.path_or_fileobj
            content = what if isinstance(what, bytes) else Path(what).read_bytes()
            (place / repository / operation.path_in_repo).write_bytes(content)

    def download(repository, revision, local_dir, allow_patterns):
        if not (place / repository).is_dir():
            raise OSError("Repository Not Found for url:\nsomewhere")
        shutil.copytree(place / repository, local_dir, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_none")
    return place


def test_a_run_goes_there_and_back(hub, untrained_stages, tmp_path):
    run = Run(untrained_stages / "default" / "clip")
    push.main([str(run.path), "me/clip", "licence=apache-2.0"])
    there = hub / "me" / "clip"
    card = (there / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "`Shapes`: items" in card
    assert run.manifest()["weights"] in card
    assert str(tmp_path.parents[0]) not in (there / "config.yaml").read_text()  # no path of this machine
    pull.main(["me/clip", "name=got", f"paths.logs={tmp_path / 'logs'}"])
    got = Run(tmp_path / "logs" / "got" / "clip")
    assert load_clip(got.path).weights_hash == run.manifest()["weights"]
    assert got.source() is None
    assert sorted(p.name for p in (tmp_path / "logs" / "got").iterdir()) == ["clip"]
    with pytest.raises(UserError, match="already holds a run"):
        pull.main(["me/clip", "name=got", f"paths.logs={tmp_path / 'logs'}"])


def test_a_prior_finds_its_clip_beside_it(hub, untrained_stages, tmp_path):
    for stage in ("clip", "prior"):
        push.main([str(untrained_stages / "default" / stage), f"me/{stage}", "licence=mit"])
        pull.main([f"me/{stage}", "name=got", f"paths.logs={tmp_path / 'logs'}"])
    from dalle.pipelines.load import load_prior

    assert load_prior(tmp_path / "logs" / "got" / "prior").paths["clip"].endswith("got/clip")


def test_what_is_refused(hub, untrained_stages, tmp_path, monkeypatch):
    run = str(untrained_stages / "default" / "clip")
    with pytest.raises(UserError, match="under which licence"):
        push.main([run, "me/clip"])
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match=r"\Adalle push needs a token[^\n]*HF_TOKEN[^\n]*\Z"):
        push.main([run, "me/clip", "licence=mit"])
    with pytest.raises(UserError, match=r"\Ame/none at the Hugging Face hub: Repository Not Found[^\n]*\Z"):
        pull.main(["me/none", "name=got", f"paths.logs={tmp_path / 'logs'}"])
    (hub / "me" / "other").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no run of dalle"):
        pull.main(["me/other", "name=got", f"paths.logs={tmp_path / 'logs'}"])
    assert not (tmp_path / "logs" / "got" / "clip").exists()


def test_changed_weights_are_refused(hub, untrained_stages, tmp_path):
    push.main([str(untrained_stages / "default" / "clip"), "me/clip", "licence=mit"])
    weights = hub / "me" / "clip" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="holds other weights"):
        pull.main(["me/clip", "name=got", f"paths.logs={tmp_path / 'logs'}"])


def without(name: str):
    def damage(run: Path) -> None:
        (run / name).unlink()

    return damage


def edited(name: str, old: str, new: str):
    def damage(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new))

    return damage


@pytest.mark.parametrize(
    ("stage", "damage", "line"),
    [
        ("clip", without("tokenizer.json"), "tokenizer.json cannot be read"),
        ("clip", edited("config.yaml", "embed_dim: 8", "embed_dim: 16"), "does not fit config.yaml"),
        ("clip", edited("config.yaml", "dalle.nets.clip.CLIP", "os.system"), "os.system"),
        ("clip", edited("manifest.json", '"stage": "clip"', '"stage": "prior"'), "is missing"),
        ("prior", edited("manifest.json", '"image_embed_norm"', '"norm"'), "image_embed_norm"),
        ("dalle", without("tokenizer.json"), "tokenizer.json cannot be read"),
        ("dalle", edited("config.yaml", "depth: 2", "depth: 3"), "does not fit config.yaml"),
        ("decoder", without("config.yaml"), "config.yaml cannot be read"),
    ],
)
def test_what_could_not_be_used_is_refused_and_nothing_is_left(
    hub, untrained_stages, tmp_path, stage, damage, line
):
    push.main([str(untrained_stages / "default" / stage), f"me/{stage}", "licence=mit"])
    damage(hub / "me" / stage)
    with pytest.raises(UserError, match=rf"\Ame/{stage} at the Hugging Face hub cannot be used: ") as refusal:
        pull.main([f"me/{stage}", "name=got", f"paths.logs={tmp_path / 'logs'}"])
    assert line in str(refusal.value)
    assert ".tmp" not in str(refusal.value)
    assert not (tmp_path / "logs").exists()


def test_a_name_of_no_package_is_refused_before_anything_is_fetched(hub, tmp_path):
    with pytest.raises(UserError, match="there is no package nobodys_lab"):
        pull.main(["me/none", "name=got", f"paths.logs={tmp_path / 'logs'}", "trust=[nobodys_lab]"])


def test_the_card_can_be_read_first(untrained_stages, capsys):
    push.main([str(untrained_stages / "default" / "decoder"), "me/decoder", "card=true", "licence=mit"])
    said = capsys.readouterr().out
    assert "The decoder of a DALL-E pipeline" in said
    assert "Works with the clip whose weights have the hash" in said
    push.main([str(untrained_stages / "default" / "decoder"), "me/decoder", "card=true"])
    assert "## Licence\n\nnot said yet: dalle push needs licence=..." in capsys.readouterr().out
