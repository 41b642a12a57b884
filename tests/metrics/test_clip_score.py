import pytest
import torch

from dalle.images import from_uint8, to_uint8
from dalle.metrics.clip_score import CLIPScore


class FakeCLIP:
    """A picture's embedding is its mean colour times 7; a caption's is the vector it spells out."""

    def embed_image(self, image):
        return 7 * image.mean((2, 3))

    def embed_captions(self, captions):
        return {"text_embed": torch.tensor([[float(x) for x in caption.split()] for caption in captions])}


def picture(*colour):
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 4, 4)


PAIRS = [
    (picture(1.0, 0.0, 0.0), "2 0 0", 100.0),
    (picture(1.0, 0.0, 0.0), "0 5 0", 0.0),
    (picture(1.0, 0.0, 0.0), "-1 0 0", 0.0),  # negative: clamped by itself, not in the mean
    (picture(0.6, 0.8, 0.0), "1 0 0", 60.0),
]


def test_the_mean_is_over_pairs_clamped_one_by_one():
    metric = CLIPScore(FakeCLIP())
    for item, (image, caption, _) in enumerate(PAIRS):
        metric.update(image, [caption], [item])
    assert metric.compute()["clip_score"].value == pytest.approx(40.0, abs=0.5)


@pytest.mark.parametrize(("image", "caption", "expected"), PAIRS)
def test_single_pairs(image, caption, expected):
    metric = CLIPScore(FakeCLIP())
    metric.update(image, [caption], [0])
    assert metric.compute()["clip_score"].value == pytest.approx(expected, abs=0.5)  # in 8 bits


def test_pictures_and_captions_must_pair_up():
    with pytest.raises(ValueError, match="1 pictures, but 2 captions"):
        CLIPScore(FakeCLIP()).update(picture(1.0, 0.0, 0.0), ["1 0 0", "0 1 0"], [0])


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_without_pictures_there_is_no_figure():
    assert CLIPScore(FakeCLIP()).compute() == {}


def test_bf16_pictures_are_those_that_are_saved():
    figures = []
    for dtype in (torch.float32, torch.bfloat16):
        metric = CLIPScore(FakeCLIP())
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            metric.update(picture(0.25, -0.5, 1.0).to(dtype), ["1 2 3"], [0])
        figures.append(metric.compute())
    assert figures[0] == figures[1]


def test_parity_with_open_clip_on_an_untrained_model():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    net = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        text_cfg={"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    ).eval()
    ids = {f"caption {i}": torch.randint(1, 64, (8,)) for i in range(6)}

    class Wrapped:
        def embed_image(self, image):
            return net.encode_image(image)

        def embed_captions(self, captions):
            return {"text_embed": net.encode_text(torch.stack([ids[caption] for caption in captions]))}

    images = from_uint8(to_uint8(torch.rand(6, 3, 16, 16) * 2 - 1))
    metric = CLIPScore(Wrapped())
    metric.update(images[:4], list(ids)[:4], range(4))
    metric.update(images[4:], list(ids)[4:], range(4, 6))
    with torch.no_grad():
        u = net.encode_image(images, normalize=True)
        v = net.encode_text(torch.stack(list(ids.values())), normalize=True)
    expected = (100 * (u * v).sum(-1).clamp(min=0)).mean().item()
    assert expected > 0
    assert metric.compute()["clip_score"].value == pytest.approx(expected, rel=1e-4)
