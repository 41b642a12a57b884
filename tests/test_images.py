import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dalle.images import MAX_LINES, _wrap, from_uint8, grid, save_png, to_pil, to_uint8


def test_every_8_bit_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    through_unit = from_uint8(levels).add(1).div(2)
    lost = (through_unit * 255).byte() != levels
    assert lost.sum() > 0  # truncation loses levels: the reason for rounding


@pytest.mark.parametrize(("value", "level"), [(-1, 0), (0, 128), (1, 255), (-3, 0), (3, 255), (1 / 255, 128)])
def test_quantisation_rounds_and_clamps(value, level):
    assert to_uint8(torch.tensor([float(value)])).item() == level


def test_bfloat16_is_quantised_in_float():
    image = torch.tensor([0.5], dtype=torch.bfloat16)
    assert to_uint8(image).item() == 191


def test_small_pictures_become_cells_of_whole_factors():
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sheet = grid(images, [f"picture {i}" for i in range(6)], columns=3)
    assert sheet.width == 8 + 3 * (128 + 8)
    for index, (left, top) in {0: (8, 8), 2: (8 + 2 * 136, 8)}.items():
        cell = sheet.crop((left, top, left + 128, top + 128))
        assert cell.tobytes() == to_pil(images[index]).resize((128, 128), Image.Resampling.NEAREST).tobytes()


def test_large_pictures_keep_their_size():
    sheet = grid(torch.zeros(1, 3, 200, 300), ["wide"])
    assert sheet.width == 300 + 16
    assert sheet.getpixel((8, 8)) == (128, 128, 128)


def test_several_pictures_per_caption_stand_in_one_row_each():
    images = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 3, 64, 64)
    sheet = grid(images, ["first", "second"])
    assert sheet.width == 8 + 3 * 136
    second_row = (sheet.height - 8) // 2 + 8
    row = [sheet.getpixel((8 + 136 * i + 60, second_row + 60))[0] for i in range(3)]
    assert row == to_uint8(images[3:, 0, 0, 0]).tolist()


def test_pictures_that_cannot_be_shared_out_are_refused():
    for count, captions in [(5, ["a", "b"]), (0, ["a"]), (2, [])]:
        with pytest.raises(ValueError, match="shared out"):
            grid(torch.zeros(count, 3, 8, 8), captions)


@settings(deadline=None)
@given(st.text(max_size=300), st.integers(30, 400))
def test_any_caption_wraps_into_the_width(caption, width):
    from PIL import ImageFont

    font = ImageFont.load_default(size=13)
    lines = _wrap(caption, width)
    assert 1 <= len(lines) <= MAX_LINES
    assert all(font.getlength(line) <= width for line in lines)


def test_wrapping_keeps_every_word_of_a_normal_caption():
    caption = "a small red circle above a big blue square on a white background"
    lines = _wrap(caption, 128)
    assert " ".join(lines) == caption
    assert len(lines) > 1


@pytest.mark.parametrize("caption", ["", "\n", "naïve café", "一只猫 😀", "x" * 500, "two\nlines"])
def test_grids_take_any_caption(caption):
    assert grid(torch.zeros(1, 3, 16, 16), [caption]).width == 128 + 16


def test_png_round_trip_with_metadata(tmp_path):
    image = to_pil(torch.rand(3, 9, 7) * 2 - 1)
    path = save_png(image, tmp_path / "new" / "a.png", {"recipe": "prompt: 一只猫"})
    with Image.open(path) as read:
        assert read.tobytes() == image.tobytes()
        assert read.text["recipe"] == "prompt: 一只猫"
    assert os.listdir(path.parent) == ["a.png"]


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = save_png(to_pil(torch.zeros(3, 4, 4)), tmp_path / "a.png")
    before = path.read_bytes()

    def half(self, file, **_):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save_png(to_pil(torch.ones(3, 4, 4)), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]
