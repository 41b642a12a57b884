"""evaluate.py edit=...: real pictures, spoilt or masked, edited and held against what they were."""

import json

import pytest
import torch

from dalle.data.scenes import parse
from dalle.data.shapes import Shapes
from dalle.evaluation.edited import KINDS, Edited, Job, mask_of
from dalle.images import from_uint8, to_uint8
from dalle.metrics.judge import compare
from dalle.metrics.reconstruction import likeness

FAST = ("trainer=cpu", "precision=fp32", "n=4", "steps=2", "pipeline.prior_sampler.steps=2")
EDITS = {
    "denoise": ("editing.noise=0.3", "editing.prompted=true"),
    "restore": ("editing.blur=1.0",),
    "restore hole": ("editing.mask=box",),
    "enhance": ("editing.factor=2",),
    "inpaint": ("editing.mask=half", "editing.resamplings=1"),
    "restyle": ("editing.strength=0.5",),
    "text_diff": (),
    "variations": ("editing.eta=0.5",),
}


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_has_figures(untrained_stages, command, tmp_path, name):
    words = (f"edit={name.split()[0]}", *EDITS[name], f"paths.logs='{untrained_stages}'", "metrics=[judge]")
    ended = command("evaluate.py", *FAST, *words, f"paths.cache='{tmp_path}'", f"out='{tmp_path / 'out'}'")
    assert ended.code == 0, ended
    (path,) = (tmp_path / "out").rglob("result.json")
    result = json.loads(path.read_text())
    found = {key: figure["value"] for key, figure in result["figures"].items()}
    kind = KINDS[name.split()[0]]
    assert {"psnr", "ssim", "to_original", "to_caption", "judge/all"} <= found.keys()
    assert ({"before_psnr", "better"} <= found.keys()) == kind.repairs
    assert ("kept/objects" in found) == ("mask" in str(EDITS[name]))
    assert ("kept/all" in found) == (not kind.repairs and name != "inpaint")
    assert result["target"]["edit"] == name.split()[0]
    if name == "denoise":  # what the noise was, and what each picture was before
        source = Shapes("test", image_size=16, size=32)
        assert found["before_psnr"] == pytest.approx(17, abs=3)
        assert source.image_size == result["protocol"]["image_size"]


def job(**settings) -> Job:
    rng = torch.Generator().manual_seed(0)
    return Job(torch.zeros(3, 32, 32), "a red ring", "a blue ring", rng, settings, {})


def test_masks_hide_what_they_say():
    assert mask_of(job(mask="half")).float().mean() == 0.5
    assert mask_of(job(mask="box")).sum() == 12 * 12
    assert mask_of(job(mask="pixels")).float().mean() == pytest.approx(0.7, abs=0.05)


def test_noise_is_of_the_size_that_is_told():
    class Same:
        def denoise(self, image, prompt, *, noise):
            self.told = prompt, noise
            return image[None]

    pipeline = Same()
    made, spoilt, _ = KINDS["denoise"].do(pipeline, job(noise=0.2, prompted=True))
    assert pipeline.told == ("a red ring", 0.2)
    assert torch.equal(made[0], spoilt)
    assert torch.equal(spoilt, from_uint8(to_uint8(spoilt)))
    assert likeness(made, torch.zeros(1, 3, 32, 32))["psnr"].item() == pytest.approx(20, abs=0.3)


def test_a_changed_caption_says_one_thing_otherwise():
    target = Edited.__new__(Edited)
    target.seed = 0
    for item, caption in enumerate(Shapes("test", 32, 32).captions_of(range(32))):
        other = target.changed(caption, item)
        marks = compare(parse(caption), parse(other))
        assert [name for name, same in marks.items() if same is False] in (["colour"], ["shape"], [])
        assert target.changed(caption, item) == other


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["edit=paint"], "edit=paint is not measured; there are denoise, restore"),
        (["edit=denoise"], "edit=denoise needs editing.noise="),
        (["edit=restore"], "edit=restore needs editing.blur= or editing.mask="),
        (["edit=restore", "editing.blur=1", "editing.mask=box"], "undoes one thing at a time"),
        (["edit=inpaint", "editing.mask=most"], "editing.mask must be"),
        (["edit=denoise", "editing.noise=-1"], "editing.noise must be a number above 0, got -1"),
        (["edit=denoise", "editing.blur=1"], "editing.blur is no setting of edit=denoise; its settings are"),
        (["editing.blur=1"], "editing is of an edit: say which with edit="),
        (["edit=inpaint", "editing.mask=box", "run=a"], "edits are measured of pipeline=unclip"),
        (
            ["edit=inpaint", "editing.mask=box", "upsamplers=[a]"],
            "at the decoder's size; leave out",
        ),
    ],
)
def test_mistakes_are_one_line(untrained_stages, command, words, message):
    error = command("evaluate.py", *FAST, f"paths.logs='{untrained_stages}'", *words).error
    assert message in error
