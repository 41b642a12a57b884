"""How steady a training was: spikes counted by hand, numbers that are none, several seeds."""

import json
import math

import pytest

from dalle.evaluation.stability import spikes, stability
from dalle.run_dir import Run


def run(folder, losses, norms=(), seconds=10.0, finished=True) -> Run:
    folder.mkdir(parents=True)
    norms = norms or [1.0] * len(losses)
    rows = "\n".join(f"{k},{loss},{norm}" for k, (loss, norm) in enumerate(zip(losses, norms, strict=True)))
    (folder / "metrics.csv").write_text(f"step,train/loss,train/grad_norm\n{rows}\n999,,\n")
    if finished:
        (folder / "manifest.json").write_text(json.dumps({"schema": 1, "seconds_training": seconds}))
        (folder / "model.safetensors").write_bytes(b"")
    return Run(folder)


def wave(n=100):
    return [1 + 0.01 * (k % 5) for k in range(n)]


def test_spikes():
    assert spikes(wave()) == 0
    jumps = wave()
    jumps[40] = jumps[70] = 5.0
    assert spikes(jumps) == 2
    assert spikes([5.0, *wave(15)]) == 0  # too little before it to say
    assert spikes([3 - k / 50 for k in range(100)]) == 0  # falls all the time


def test_figures_of_one_run(tmp_path):
    losses = wave()
    losses[50] = 9.0
    run(tmp_path / "decoder", [*losses[:-1], math.nan], norms=[1.0] * 90 + [4.0] * 10)
    run(tmp_path / "prior", wave(), seconds=5.0)
    run(tmp_path / "clip", wave(), seconds=99.0)
    found = stability([tmp_path], "decoder", ["prior", "decoder", "ViT-B-32"])
    assert found["training/spikes"].value == pytest.approx(1000 / 100)
    assert found["training/not_finite"].value == 1
    assert found["training/grad_spread"].value == 4.0
    assert found["training/seconds"].value == 15.0


def test_several_seeds_give_mean_least_and_most(tmp_path):
    for k in (1, 2, 6):
        run(tmp_path / str(k) / "gan", wave(), seconds=10.0 * k)
    run(tmp_path / "not done" / "gan", wave(), seconds=1e6, finished=False)
    found = stability(sorted(tmp_path.iterdir()), "gan", ["gan"])
    assert found["training/seconds"] == (30.0, 10.0, 60.0)


def test_a_run_without_a_log_has_its_time_only(tmp_path):
    one = run(tmp_path / "gan", wave())
    (one.path / "metrics.csv").unlink()
    assert set(stability([tmp_path], "gan", ["gan"])) == {"training/seconds"}
