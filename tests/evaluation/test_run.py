"""evaluate.py on tiny stages with random weights: figures, protocol, what is kept, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import files_below, untrained
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image
from tiny import ROOT
from torchmetrics.image.fid import FrechetInceptionDistance

from dalle.data.shapes import Shapes
from dalle.diffusion.samplers import Sampler
from dalle.errors import UserError
from dalle.evaluation import run as evaluation
from dalle.evaluation.results import Result
from dalle.evaluation.targets import Pipeline
from dalle.images import from_uint8, to_uint8
from dalle.metrics.clip_score import CLIPScore
from dalle.metrics.features import effnet_features, random_features
from dalle.metrics.fid import FrechetDistance
from dalle.metrics.judge import Judge
from dalle.metrics.metric import update_all, values_of
from dalle.metrics.perceptual import RandomFeatures
from dalle.pipelines.load import load_unclip
from dalle.run_dir import load_clip, load_stage

FAST = ("steps=2", "pipeline.prior_sampler.steps=2")
COMMON = ("precision=fp32", "trainer=cpu", "n=12", "batch_size=8")
ALL = {
    "fid",
    "kid",
    "precision_recall",
    "clip_score",
    "retrieval",
    "hard_negatives",
    "judge",
    "speed",
    "flops",
}


@pytest.fixture
def measure(untrained_stages, tmp_path):
    """`measure("n=4")`: the result of evaluate.py with these settings on stages with random weights."""
    places = {"paths.logs": untrained_stages, "paths.cache": tmp_path / "cache", "out": tmp_path / "out"}

    def run(*overrides: str, fast: tuple[str, ...] = FAST) -> Result:
        usual = [*(f"{key}='{path}'" for key, path in places.items()), *COMMON, *fast]
        given = {override.split("=")[0] for override in overrides}
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            composed = compose(
                "evaluate", [o for o in usual if o.split("=")[0] not in given] + list(overrides)
            )
        config = OmegaConf.to_container(composed, resolve=True)
        assert isinstance(config, dict)
        folder = evaluation.evaluate(config)
        assert folder is not None
        return Result.read(folder)

    return run


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def values(result: Result) -> dict[str, float]:
    return {name: figure.value for name, figure in result.figures.items()}


def pictures_in(folder: Path) -> torch.Tensor:
    files = sorted((folder / "pictures").glob("*.png"))
    return torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])


def test_all_that_can_be_had(measure, out):
    result = measure("features=random", "save_pictures=true")
    assert set(result.metrics) == ALL
    names = set(result.figures)
    assert {"fid_random_biased", "kid_random", "precision_random", "recall_random"} <= names
    assert {"clip_score", "clip_score_real", "retrieval/image_to_text_r1", "judge/all"} <= names
    assert {"judge/seen/all", "judge/unseen/all", "gflops_per_image", "parameters"} <= names
    assert {"seconds_per_image", "images_per_second", "peak_memory_gb"} <= names
    for name, figure in result.figures.items():
        assert figure.low <= figure.value <= figure.high, name
    assert any("12 pictures are too few for 224 features" in note for note in result.notes)
    assert result.figures["parameters"].value == sum(result.parameters.values()) > 0
    assert result.figures["gflops_per_image"].value > 1e-4
    files = set(files_below(out / "001"))
    assert files == {
        "result.json",
        "grid.png",
        "pictures/metadata.jsonl",
        *(f"pictures/{i:06d}.png" for i in range(12)),
    }


def test_figures_are_those_of_the_saved_pictures(measure, out, untrained_stages):
    """Measured once more from the PNGs by the metrics that training itself uses."""
    found = values(measure("features=random", "save_pictures=true"))
    made, source = from_uint8(pictures_in(out / "001")), Shapes("test", image_size=16, size=32)
    captions, real = source.captions_of(range(12)), source.images(range(12))
    clip = load_clip(untrained_stages / "default" / "clip")
    metrics = [FrechetDistance(random_features(), intervals=False), CLIPScore(clip)]
    for rows in (range(5), range(5, 12)):
        update_all(metrics, made[rows], real[rows], captions[rows.start : rows.stop], rows)
    again = values_of(metrics)
    assert {name: found[name] for name in again} == pytest.approx(again, rel=1e-4)
    theirs = FrechetInceptionDistance(RandomFeatures())
    theirs.update(to_uint8(real), real=True)
    theirs.update(to_uint8(made), real=False)
    assert found["fid_random_biased"] == pytest.approx(theirs.compute().item(), rel=1e-3)
    verdicts = Judge()(made, captions)
    assert found["judge/all"] == verdicts["all"].mean().item()
    assert found["judge/colour"] == pytest.approx(verdicts["colour"].nanmean().item())
    unseen = source.unseen(range(12))
    assert found["judge/unseen/count"] == pytest.approx(verdicts["count"][unseen].mean().item())


def test_a_folder_of_the_same_pictures_gives_the_same_figures(measure, out, untrained_stages):
    first = values(measure("features=random", "save_pictures=true"))
    folder = (f"folder='{out / '001' / 'pictures'}'", f"scorer='{untrained_stages / 'default' / 'clip'}'")
    data = ("data=shapes", "data.size=32")
    again = values(measure("features=random", *folder, *data, "n=null", fast=()))
    shared = {name for name in first if not name.startswith(("judge/seen", "judge/unseen"))} & set(again)
    assert len(shared) > 12
    assert {name: again[name] for name in shared} == pytest.approx(
        {name: first[name] for name in shared}, rel=1e-5
    )


def test_a_folder_with_broken_pictures_and_without_captions(measure, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(5):
        Image.new("RGB", (16, 16), (50 * k, 0, 0)).save(folder / f"{k}.png")
    (folder / "2.png").write_bytes(b"no picture")
    given = (f"folder='{folder}'", "features=random", "n=null")
    with pytest.raises(UserError, match="compared with real ones; say which: data=folder"):
        measure(*given, fast=())
    with pytest.warns(UserWarning, match="4 pictures are used; 1 are broken"):
        result = measure(*given, "data=shapes", "data.size=32", fast=())
    assert result.figures["broken_pictures"].value == 1
    assert (result.protocol["pictures"], result.protocol["real_pictures"]) == (4, 4)
    assert {"fid", "kid", "precision_recall"} == set(result.metrics)
    with pytest.raises(UserError, match="clip_score cannot be measured here: not every picture has"):
        measure(given[0], "n=null", "data=shapes", "metrics=[clip_score]", fast=())


def test_a_folder_is_compared_with_own_pictures_without_a_judge(measure, tmp_path):
    """Without a stage, a CLIP, or scenes that a judge knows."""
    for name, count in (("made", 12), ("own", 400)):
        (tmp_path / name).mkdir()
        for k in range(count):
            Image.new("RGB", (12, 12), (k % 256, 255 - k % 256, 7 * k % 256)).save(
                tmp_path / name / f"{k:03d}.png"
            )
            (tmp_path / name / f"{k:03d}.txt").write_text(f"colour {k}")
    own = ("data=folder", f"data.root='{tmp_path / 'own'}'", f"paths.logs='{tmp_path / 'logs'}'")
    result = measure(f"folder='{tmp_path / 'made'}'", *own, "features=random", "n=null", fast=())
    assert set(result.metrics) == {"fid", "kid", "precision_recall"}
    assert any(name.startswith("fid") for name in result.figures)


def test_the_protocol_is_beside_the_figures(measure, out, untrained_stages):
    measure("features=random", "guidance=2", "sampler=dpmpp", "seed=3", "split=val")
    facts = json.loads((out / "001" / "result.json").read_text())
    protocol, target = facts["protocol"], facts["target"]
    assert (protocol["pictures"], protocol["real_pictures"], protocol["split"]) == (12, 12, "val")
    assert protocol["seed"] == 3
    assert protocol["data"]["fingerprint"] == Shapes("val", image_size=16, size=32).fingerprint()
    assert protocol["features"]["weights"] == random_features().facts["weights"]
    assert protocol["features"]["resize"] == "none"
    clip = load_clip(untrained_stages / "default" / "clip")
    assert protocol["scorer"] == {"clip": clip.weights_hash}
    assert {"time", "memory", "machine", "interval", "resize_of_real", "quantised"} <= protocol.keys()
    decoder = target["options"]["decoder"]
    assert (decoder["guidance"], decoder["sampler"]["method"], decoder["sampler"]["steps"]) == (2, "dpmpp", 2)
    assert set(target["weights"]) == {"clip", "prior", "decoder"}
    assert target["precision"] == "fp32"
    assert {"torch", "torch-fidelity", "dalle"} <= facts["environment"].keys()


def test_features_of_imagenet_are_stamped_as_such(measure):
    result = measure("features=effnet", "metrics=[fid,kid]")
    assert {"fid_effnet_biased", "kid_effnet"} <= set(result.figures)
    facts = result.protocol["features"]
    assert (facts["network"], facts["dimension"]) == ("effnet", 1280)
    assert facts["weights"] == effnet_features().facts["weights"]


def test_the_batch_size_changes_no_picture(measure, out):
    measure("metrics=[judge]", "save_pictures=true")
    measure("metrics=[judge]", "save_pictures=true", "batch_size=5")
    one, two = (pictures_in(out / name).int() for name in ("001", "002"))
    assert (one - two).abs().max() <= 1


def test_the_same_again_is_found_and_not_repeated(measure, out, monkeypatch, capsys):
    first = measure("metrics=[judge]")
    before = files_below(out)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "make_trainer", lambda _: pytest.fail("evaluated again"))
        assert measure("metrics=[judge]").id == first.id
    assert "this was evaluated before" in capsys.readouterr().out
    assert files_below(out) == before
    assert measure("metrics=[judge]", "guidance=3").path == out / "002"
    assert measure("metrics=[judge]", "overwrite=true").path == out / "001"
    assert sorted(path.name for path in out.iterdir()) == ["001", "002"]


def test_features_of_real_pictures_are_kept(measure, monkeypatch, tmp_path):
    first = values(measure("metrics=[fid,clip_score]", "features=random"))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(
            evaluation.Evaluator, "look_at_real", lambda *_: pytest.fail("looked at real pictures again")
        )
        again = values(measure("metrics=[fid,clip_score]", "features=random", "overwrite=true"))
        assert again == first
    for file in (tmp_path / "cache").rglob("*.npy"):  # damaged: computed anew
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert values(measure("metrics=[fid,clip_score]", "features=random", "overwrite=true")) == first


def test_an_interrupted_evaluation_leaves_nothing(measure, out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "speed", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            measure("metrics=[judge,speed]", "save_pictures=true")
    assert list(out.iterdir()) == []
    killed = out / f".{'0' * 16}.partial"
    killed.mkdir()  # of a process that could not clean up: it is in nobody's way
    assert measure("metrics=[judge]").path == out / "001"


def test_an_image_tokenizer_is_measured_by_its_reconstructions(measure, tmp_path):
    tokenizer = untrained("dvae", tmp_path / "logs")
    result = measure(f"run='{tokenizer.path}'", "features=random", fast=())
    assert {"rfid_random_biased", "rkid_random", "psnr", "ssim", "code_perplexity", "judge/all"} <= set(
        result.figures
    )
    assert result.target["kind"] == "dvae"
    assert -1 <= result.figures["ssim"].value <= 1
    assert 1 <= result.figures["code_perplexity"].value <= 32


def test_a_clip_is_measured_without_making_anything(measure, out, untrained_stages):
    clip = untrained_stages / "default" / "clip"
    result = measure(f"run='{clip}'", "n=30", fast=())
    assert result.protocol["pictures"] == 0
    assert {"retrieval/image_to_text_r1", "retrieval/text_to_image_r5", "zero_shot/top1"} <= set(
        result.figures
    )
    assert not (out / "001" / "grid.png").exists()


def test_classes_of_class_folders(measure, untrained_stages, tmp_path):
    """Colours that the embedding cannot but tell apart where each class is hardly more than one picture."""
    for name, red, blue in (("red_things", 255, 0), ("blue", 0, 255)):
        for k in range(3):
            path = tmp_path / "pictures" / name / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (red, k, blue)).save(path)  # equal ones stay in one split
    data = (
        "data=imagefolder",
        f"data.root='{tmp_path / 'pictures'}'",
        "data.test_fraction=0.9",
        "data.val_fraction=0.0",
    )
    clip = f"run='{untrained_stages / 'default' / 'clip'}'"
    result = measure(clip, *data, "n=null", "metrics=[zero_shot]", fast=())
    n = result.protocol["real_pictures"]
    assert result.figures["zero_shot/top1"].value * n in range(n + 1)
    assert f"zero_shot: {n} pictures of 2 classes" in result.notes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["metrics=[fid,fit]"], "there is no metric 'fit'; there are fid, kid"),
        (["metrics=[reconstruction]"], "reconstruction cannot be measured of this unclip; it has fid"),
        (["metrics=[inception]"], "inception cannot be measured here: it reads the logits of Inception"),
        (["metrics=[kid]", "n=1"], "kid needs at least 2 pictures, there are 1; give more"),
        (["n=0"], "n must be a whole number of at least 1 or null, got 0"),
        (["n=many"], "n must be a whole number of at least 1 or null, got 'many'"),
        (["n=33"], "n=33, but the split test has 32 items; give n=32"),
        (["split=exam"], "split must be one of train, val, test, got 'exam'"),
        (["features=inception"], "features=inception, but its weights are not on this machine"),
        (["features=open_clip/ViT"], "names no weights; give open_clip/NAME/PRETRAINED"),
        (["features=nowhere"], "nowhere holds no finished run"),
        (["inception=nowhere.pth"], "no Inception weights at nowhere.pth"),
        (["name=nobody"], "decoder holds no finished run"),
        (["run=nowhere"], "nowhere holds no finished run"),
        (["folder=nowhere", "data=shapes"], "folder=nowhere does not exist"),
        (["run=a", "folder=b"], "give run= or folder=, not both"),
        (["image_size=8"], "image_size is for a folder"),
        (["guidance=strong"], "guidance must be a number from 0 to 1000 or null"),
        (["save_pictures=maybe"], "save_pictures must be true or false, got 'maybe'"),
        (["trainer.strategy=fast"], "trainer: You selected an invalid strategy"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_write_nothing(measure, tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        measure(*settings)
    assert files_below(tmp_path) == {}


def test_notes_are_added_to_notes_alone(measure, out, tmp_path):
    note = tmp_path / "notes"
    for _ in range(2):
        measure("metrics=[judge]", f"note='{note}'", "n=4")
    assert note.read_text() == f"{out / '001'}\n" * 2
    for k, content in enumerate((b"model: 1\n", b"\x89PNG\0", b"\n")):
        (other := tmp_path / f"{k}").write_bytes(content)
        with pytest.raises(UserError, match="holds something else; give a new file"):
            measure(f"note='{other}'")
        assert other.read_bytes() == content


def test_a_stage_that_is_part_of_a_pipeline(measure, untrained_stages):
    with pytest.raises(
        UserError, match=r"holds a decoder, which is measured as part of a pipeline: give pipeline="
    ):
        measure(f"run='{untrained_stages / 'default' / 'decoder'}'")


@pytest.mark.parametrize(("stage", "option"), [("prior", "candidates"), ("ar_prior", "top_k")])
def test_a_prior_alone(measure, untrained_stages, stage, option):
    runs = untrained_stages / "default"
    result = measure(f"run='{runs / stage}'", f"pipeline.prior_{option}=2", "seed=3")
    assert result.target["kind"] == stage
    assert result.target["options"]["prior"][option] == 2
    assert result.parameters == {stage: sum(p.numel() for p in load_stage(runs / stage)[0].net.parameters())}
    assert set(result.metrics) == {"cosines", "retrieval"}
    found = values(result)
    assert {"retrieval/image_to_text_r1", "retrieval_of_data/image_to_text_r1"} <= found.keys()
    assert found["seconds_per_embedding"] > 0
    # the embeddings are those that a pipeline hands to its decoder
    pipeline = load_unclip(runs / "decoder", runs / stage).pipeline
    source = Shapes("test", image_size=16, size=32)
    batch = pipeline.embed([source.captions(item)[0] for item in range(12)])
    options = {option: 2} | ({"sampler": Sampler("ddim", 2)} if stage == "prior" else {})
    made = pipeline.imagine(batch, [(3, item, 0) for item in range(12)], options)["image_embed"]
    made = pipeline.decoder_norm.decode(made)
    image = pipeline.clip.embed_image(from_uint8(to_uint8(source.images(list(range(12))))))
    expected = {"cosine_image": (made, image), "cosine_caption": (made, batch["text_embed"])}
    expected["cosine_caption_of_data"] = (image, batch["text_embed"])
    for name, pair in expected.items():
        assert found[name] == pytest.approx(F.cosine_similarity(*pair).mean().item(), abs=1e-5)


def test_a_prior_of_another_clip_or_with_an_option_it_has_not(measure, untrained_stages, tmp_path):
    prior = f"run='{untrained_stages / 'default' / 'prior'}'"
    with pytest.raises(UserError, match=r"pipeline.prior_top_p=0.5 is for an autoregressive prior, which"):
        measure(prior, "pipeline.prior_top_p=0.5")
    with pytest.raises(UserError, match=r"judge cannot be measured of this prior; it has cosines, retrieval"):
        measure(prior, "metrics=[judge]")
    untrained("clip", tmp_path / "other", seed=5)
    with pytest.raises(UserError, match=r"clip and prior do not fit together: the CLIP \(hash"):
        measure(prior, f"pipeline.clip='{tmp_path / 'other' / 'default' / 'clip'}'")


def test_a_pipeline_with_an_autoregressive_prior(measure):
    result = measure("prior=ar_prior", "metrics=[judge]", "pipeline.prior_temperature=0.5")
    assert result.target["paths"]["prior"].endswith("ar_prior")
    assert result.target["options"]["prior"]["temperature"] == 0.5
    assert "judge/all" in result.figures


def test_a_pipeline_whose_stages_are_missing_or_do_not_fit(measure, untrained_stages, tmp_path):
    shutil.copytree(untrained_stages, tmp_path / "logs")
    shutil.rmtree(tmp_path / "logs" / "default" / "prior")
    with pytest.raises(UserError, match=r"prior holds no finished run"):
        measure(f"paths.logs='{tmp_path / 'logs'}'")
    untrained("clip", tmp_path / "other", seed=5)
    with pytest.raises(UserError, match=r"do not fit together"):
        measure(f"pipeline.clip='{tmp_path / 'other' / 'default' / 'clip'}'")


def test_too_few_pictures_leave_out_what_nobody_asked_for(measure):
    result = measure("n=3", "features=random")
    assert "precision_recall is left out: it needs 4 pictures, there are 3" in result.notes
    assert "precision_random" not in result.figures
    assert "kid_random" in result.figures


def test_features_that_are_not_finite(measure, out, monkeypatch):
    def broken(self, image):
        return torch.full((len(image), 224), torch.nan)

    monkeypatch.setattr(RandomFeatures, "forward", broken)
    with pytest.raises(UserError, match=r"the features of 12 of 12 real pictures are not finite"):
        measure("features=random", "metrics=[fid]")
    assert list(out.iterdir()) == []


def test_pictures_that_are_not_finite(measure, out, monkeypatch):
    monkeypatch.setattr(
        Pipeline, "make",
        lambda self, source, items, captions: (torch.full((len(items), 3, 16, 16), torch.nan), {}),
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"8 of 8 pictures hold values that are not finite; try precision=fp32"
    ):
        measure("metrics=[judge]")
    assert list(out.iterdir()) == []


def test_time_is_that_of_all_batches_but_the_first():
    slow_start = [(10.0, 2), (1.0, 2), (2.0, 2)]
    found = evaluation.speed([slow_start, slow_start], 2**30)
    assert found["seconds_per_image"].value == 0.75
    assert found["images_per_second"].value == pytest.approx(2 / 0.75)
    assert found["images_per_second"].low < 2 / 0.75 < found["images_per_second"].high
    assert found["peak_memory_gb"].value == 1
    assert evaluation.speed([[(10.0, 2)]], 0)["seconds_per_image"] == (5.0, 5.0, 5.0)


def test_sharded_networks_are_refused(measure, monkeypatch):
    monkeypatch.setattr(evaluation, "check_machine", lambda _: None)
    with pytest.raises(UserError, match="trainer=fsdp shards what is trained; evaluate with trainer=ddp"):
        measure("trainer=fsdp")
