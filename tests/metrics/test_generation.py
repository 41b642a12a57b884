"""What generated pictures are measured by in training; as saved, on any number of ranks."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from dalle.data.scenes import draw
from dalle.data.shapes import prompts
from dalle.files import write_json
from dalle.images import to_uint8
from dalle.metrics.intervals import exact
from dalle.metrics.metric import EvaluationMetric, update_all, values_of
from dalle.training.callbacks import usual_metrics


class FakeCLIP:
    """Colour as embedding: a picture's mean colour, a caption's colour word."""

    embed_dim, image_size = 3, 4
    words = ("red", "green", "blue")

    def embed_image(self, image):
        return image.mean((2, 3)) + 1

    def embed_captions(self, captions):
        said = [[word in caption for word in self.words].index(True) for caption in captions]
        return {"text_embed": torch.eye(3)[said]}


def pictures(*channels):
    return torch.eye(3)[list(channels)].mul(2).sub(1).view(-1, 3, 1, 1).expand(-1, 3, 4, 4)


@pytest.fixture(autouse=True)
def no_inception(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))


CAPTIONS = ["red", "green", "blue", "blue circle"]


def test_without_a_clip_there_is_only_the_number():
    metrics = usual_metrics(None, judged=False)
    update_all(metrics, pictures(0, 2), pictures(0, 2), ["red", "green"], [0, 1])
    assert values_of(metrics) == {"pictures": 2}


def test_the_table_of_a_small_example():
    metrics = usual_metrics(FakeCLIP(), judged=False)
    update_all(metrics, pictures(0, 1), pictures(0, 1), CAPTIONS[:2], [0, 1])
    update_all(metrics, pictures(0, 2), pictures(2, 2), CAPTIONS[2:], [2, 3])
    found = values_of(metrics)
    assert found.pop("fid_clip") > 0
    assert found == pytest.approx({"clip_score": 75.0, "clip_score_real": 100.0, "pictures": 4}, abs=1e-4)
    assert all(type(value) in (float, int) for value in found.values())
    json.dumps(found)


def test_generated_equal_to_real_is_at_distance_zero():
    metrics = usual_metrics(FakeCLIP(), judged=False)
    images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    update_all(metrics, images, images, ["red"] * 16, range(16))
    found = values_of(metrics)
    assert found["fid_clip"] == pytest.approx(0, abs=1e-6)
    assert found["clip_score"] == found["clip_score_real"]


def test_the_judge_judges_by_groups():
    captions, scenes = prompts("one", True, 10)
    unseen, others = prompts("one", False, 10)
    images = torch.cat([draw(scenes, 32), -draw(others, 32)])
    metrics = usual_metrics(None, judged=True)
    update_all(metrics, images, images, captions + unseen, range(20))
    found = values_of(metrics)
    assert (found["judge/seen/all"], found["judge/unseen/all"], found["judge/all"]) == (1, 0, 0.5)
    assert not any(name.startswith("chance") for name in found)
    assert found["judge_residual"] > 0


@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16])
def test_everything_is_measured_on_the_pictures_as_saved(cast):
    torch.manual_seed(0)
    generated, real = torch.randn(8, 3, 8, 8).to(cast), torch.rand(8, 3, 8, 8) * 2 - 1  # beyond [-1, 1] too
    tables = []
    for images in (generated, to_uint8(generated)):
        metrics = usual_metrics(FakeCLIP(), judged=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast == torch.bfloat16):
            for metric in metrics:
                metric.update(images, ["a red circle"] * 8, range(8))
                metric.update(real, ["a red circle"] * 8, range(8), real=True)
        tables.append(values_of(metrics))
    assert tables[0] == tables[1]
    assert tables[0]["fid_clip"] > 0


def test_reset_forgets():
    metrics = usual_metrics(FakeCLIP(), judged=False)
    update_all(metrics, pictures(1, 1), pictures(0, 0), CAPTIONS[:2], [0, 1])
    for metric in metrics:
        metric.reset()
    update_all(metrics, pictures(0, 1), pictures(0, 1), CAPTIONS[:2], [0, 1])
    assert values_of(metrics)["pictures"] == 2
    assert values_of(metrics)["clip_score"] == pytest.approx(100)


def test_inference_tensors_are_taken():
    metrics = usual_metrics(FakeCLIP(), judged=False)
    with torch.inference_mode():
        generated = pictures(0, 1).clone()
        update_all(metrics, generated, pictures(0, 1), CAPTIONS[:2], [0, 1])
    assert values_of(metrics)["clip_score"] == pytest.approx(100)


class Shade(EvaluationMetric):
    """A vector and a number of each picture, and the order in which captions come."""

    columns = ("shade", "corner")

    def rows(self, image, captions):
        return {"shade": image.float().mean((1, 2, 3)), "corner": image[:, :, 0, 0]}

    def figures(self, made, real, captions):
        order = sum(k * float(caption) for k, caption in enumerate(captions))
        return super().figures(made | {"corner": made["corner"].double().mean(1)}, real, captions) | {
            "order": exact(order)
        }


def shades(items: Sequence[int]) -> dict[str, list[float]]:
    """The figures of these and of whatever other ranks hold."""
    metric = Shade()
    if items:
        image = torch.tensor(items, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        metric.update(image, [str(item) for item in items], items)
    return {name: list(figure) for name, figure in metric.compute().items()}


def on_one_of_two_ranks(rank: int, place: str, given: list[tuple[list[int], list[int]]]) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
    write_json(Path(place, f"{rank}.json"), [shades(parts[rank]) for parts in given])
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(tmp_path):
    """Also where one has no pictures."""
    given = [([0, 2, 4, 6, 8], [1, 3, 5, 7]), ([3, 2, 1, 0, 4, 5, 6, 7, 8], [])]
    multiprocessing.spawn(on_one_of_two_ranks, (str(tmp_path), given), nprocs=2)
    whole = shades(range(9))
    assert whole["shade"][0] == 4
    assert whole["order"][0] == sum(k * k for k in range(9))
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [whole, whole]
