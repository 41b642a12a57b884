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


def test_the_card_can_be_read_first(untrained_stages, capsys):
    push.main([str(untrained_stages / "default" / "decoder"), "me/decoder", "card=true", "licence=mit"])
    said = capsys.readouterr().out
    assert "The decoder of a DALL-E pipeline" in said
    assert "Works with the clip whose weights have the hash" in said
    push.main([str(untrained_stages / "default" / "decoder"), "me/decoder", "card=true"])
    assert "## Licence\n\nnot said yet: dalle push needs licence=..." in capsys.readouterr().out
