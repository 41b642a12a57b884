"""Imported weights are trained further as one's own are: `init_from=` an imported run."""

import pytest
import yaml
from conftest import untrained
from public import clip_weights, make_prior
from safetensors.torch import save_file
from tiny import configure, weights

from dalle.errors import UserError
from dalle.run_dir import Run, load_stage
from dalle.training import fit, init_from
from dalle.weights.hub import shared_config


@pytest.fixture
def prior(tmp_path, imported) -> Run:
    """A prior of Karlo's kind with random weights, and its CLIP."""
    pytest.importorskip("open_clip", reason="CLIP's own tokenizer needs the package open_clip_torch")
    save_file(clip_weights(), tmp_path / "clip.safetensors")
    imported("clip", tmp_path / "clip.safetensors", "activation=quick_gelu")
    make_prior().save_pretrained(tmp_path / "prior")
    return imported("prior", tmp_path / "prior")


def learn(tmp_path, prior: Run, *words: str) -> Run:
    clip = prior.path.parent / "clip"
    settings = (f"init_from='{prior.path}'", f"upstream.clip='{clip}'", "name=more", "batch_size=16", *words)
    config = configure("prior", tmp_path / "logs", *settings, net=False)
    fit.train(config)
    return Run(tmp_path / "logs" / "more" / "prior")


def test_a_prior_gains_on_a_few_pictures(tmp_path, prior, capsys):
    pytest.importorskip("diffusers")
    run = learn(tmp_path, prior, "trainer.max_steps=30", "optimizer.lr=5e-3", "callbacks.ema.decay=0.5")
    said = capsys.readouterr().out
    assert f"init_from={prior.path}:" in said
    assert "transformer_blocks" in said
    assert "32 of 32 weights taken" in said
    assert run.config()["model"]["net"]["_target_"] == "dalle.nets.karlo.PriorTransformer"
    assert run.config()["model"]["guidance"] == 4.0
    # the space of the embeddings is the one that the weights know
    assert run.manifest()["image_embed_norm"] == prior.manifest()["image_embed_norm"]
    losses = list(run.metrics()["train/loss"].values())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    stage, _ = load_stage(run.path, "prior")
    assert stage.clamp == 5.0


def test_without_steps_that_move_it_stays_the_same(tmp_path, prior):
    run = learn(tmp_path, prior, "trainer.max_steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0")
    before, after = weights(prior), weights(run)
    assert all((before[name] - after[name]).abs().max() < 1e-6 for name in before)


def test_a_run_that_names_what_a_file_may_not_is_refused(tmp_path, prior):
    place = prior.path / "config.yaml"
    config = yaml.safe_load(place.read_text())
    config["model"]["net"] = {"_target_": "torch.hub.load", "repo_or_dir": str(tmp_path)}
    place.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"torch.hub.load' is not among the classes that a file may name"):
        learn(tmp_path, prior, "trainer.max_steps=1")


def test_a_network_that_can_be_shown_masks_learns_to_inpaint(tmp_path):
    untrained("clip", tmp_path)
    run = untrained("decoder", tmp_path)
    place = run.path / "config.yaml"
    place.write_text(shared_config(run))  # as `dalle pull` writes it
    asked = {"init_from": str(run.path), "stage": "decoder", "inpaint": True, "model": {"optimizer": None}}
    config = dict(asked)
    init_from.settings(config)
    assert config["model"]["net"]["inpaint"] is True
    known = yaml.safe_load(place.read_text())
    del known["model"]["net"]["inpaint"]
    place.write_text(yaml.safe_dump(known))
    with pytest.raises(UserError, match="has a network that learns no inpainting"):
        init_from.settings(dict(asked))
