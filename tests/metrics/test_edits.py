"""What stayed of edited pictures: exact on drawings of the data set."""

import pytest
import torch

from dalle.data.scenes import Scenes, draw
from dalle.metrics.edits import changes, kept_beside, kept_outside, similarities
from dalle.metrics.judge import Judge

RED, BLUE, CIRCLE, SQUARE, SMALL = 0, 2, 0, 1, 0


def scenes(*things: tuple[int, int, float, float], background: int = 2) -> Scenes:
    """One picture of one or two small things: colour, shape, x, y."""
    table = [*things, (-1, -1, 0.0, 0.0)][:2]
    colour, shape, x, y = zip(*table, strict=True)
    size = tuple(SMALL if kind >= 0 else -1 for kind in shape)
    columns = (colour, shape, size, x, y)
    return Scenes(torch.tensor([background]), *(torch.tensor([column]) for column in columns))


def read(*things, **options):
    return Judge().read(draw(scenes(*things, **options), 32))


LEFT, RIGHT = (RED, CIRCLE, 0.25, 0.5), (BLUE, SQUARE, 0.75, 0.5)
MASK = torch.zeros(1, 32, 32, dtype=torch.bool)
MASK[..., 16:] = True


@pytest.mark.parametrize(
    ("after", "background", "objects", "ground"),
    [
        ((LEFT, RIGHT), 2, 1.0, 1.0),
        ((LEFT, (RED, CIRCLE, 0.75, 0.5)), 2, 1.0, 1.0),  # what the mask hides may become anything
        ((RIGHT, LEFT), 2, 1.0, 1.0),
        (((BLUE, CIRCLE, 0.25, 0.5), RIGHT), 2, 0.0, 1.0),
        (((RED, SQUARE, 0.25, 0.5), RIGHT), 2, 0.0, 1.0),
        (((RED, CIRCLE, 0.25, 0.8), RIGHT), 2, 0.0, 1.0),
        ((RIGHT,), 2, 0.0, 1.0),
        ((LEFT, RIGHT), 0, 1.0, 0.0),
    ],
)
def test_objects_outside_the_mask_should_stay(after, background, objects, ground):
    rows = kept_outside(read(LEFT, RIGHT), read(*after, background=background), MASK)
    assert rows["kept/objects"].tolist() == [objects]
    assert rows["kept/background"].tolist() == [ground]


def test_nothing_is_said_where_nothing_stands_outside_or_the_original_is_no_drawing():
    assert kept_outside(read(RIGHT), read(LEFT), MASK)["kept/objects"].isnan().all()
    before = read(LEFT, RIGHT)
    unsound = before._replace(sound=torch.zeros(1, dtype=torch.bool))
    assert all(values.isnan().all() for values in kept_outside(unsound, before, MASK).values())
    assert kept_beside(unsound, before, [""], [""])["kept/all"].isnan().all()


def test_what_the_captions_do_not_change_should_stay():
    before = read(LEFT)
    rows = kept_beside(before, read((BLUE, CIRCLE, 0.25, 0.5)), ["a red circle"], ["a blue circle"])
    assert rows["kept/colour"].isnan().all()
    assert [rows[f"kept/{name}"].item() for name in ("shape", "size", "position", "background", "all")] == [
        1
    ] * 5
    rows = kept_beside(before, read((BLUE, SQUARE, 0.25, 0.5)), ["a red circle"], ["a blue circle"])
    assert rows["kept/shape"].item() == rows["kept/all"].item() == 0
    rows = kept_beside(before, read((BLUE, CIRCLE, 0.25, 0.5)), [""], [""])  # a variation changes nothing
    assert rows["kept/colour"].item() == 0


@pytest.mark.parametrize(
    ("source", "caption", "changed"),
    [
        ("a red circle", "a blue circle", {"colour"}),
        ("a red circle", "a small red circle", {"size"}),
        ("a red circle", "a circle", set()),
        ("", "a blue circle", {"colour", "shape", "count"}),
        ("", "", set()),
        ("a dog", "a cat", {"colour", "shape", "size", "position", "relation", "background", "count"}),
    ],
)
def test_captions_change_what_they_say_otherwise(source, caption, changed):
    assert changes(source, caption) == changed


def test_similarities_are_cosines():
    class Eye:
        def embed_image(self, image):
            return image.flatten(1)[:, :2]

        def embed_captions(self, captions):
            return {"text_embed": torch.tensor([[0.0, 2.0]] * len(captions))}

    made = torch.zeros(2, 3, 1, 1)
    made[0, 0], made[1, :2] = 3.0, 1.0
    original = torch.zeros(1, 3, 1, 1)
    original[0, 0] = 5.0
    rows = similarities(Eye(), made, original, ["a"])
    assert rows["to_original"].tolist() == pytest.approx([1, 0.5**0.5])
    assert rows["to_caption"].tolist() == pytest.approx([0, 0.5**0.5])
    assert "to_caption" not in similarities(Eye(), made, original)
