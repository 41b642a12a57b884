"""Retrieval: against counting by hand, and what must not be called found."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle.metrics import retrieval
from dalle.metrics.retrieval import Retrieval, ranks


def recalls(image, text, caption, batches: int = 1, **options) -> dict[str, float]:
    metric = Retrieval(**options)
    for parts in zip(*(x.chunk(batches) for x in (image, text, caption)), strict=True):
        metric.update(*parts)
    return {name: value.item() for name, value in metric.compute().items()}


def by_hand(image, text, caption, k: int) -> tuple[float, float]:
    """Sorts every query's candidates, one at a time, wrong ones first where similarities are equal."""
    names = sorted(set(caption.tolist()))
    candidates = {name: text[caption.tolist().index(name)] for name in names}
    to_text = to_image = 0
    for i, own in enumerate(caption.tolist()):
        order = sorted(names, key=lambda n: (-float(image[i] @ candidates[n]), n == own))
        to_text += own in order[:k]
    for name in names:
        order = sorted(
            range(len(image)), key=lambda i: (-float(image[i] @ candidates[name]), caption[i] == name)
        )
        to_image += any(caption[i] == name for i in order[:k])
    return to_text / len(image), to_image / len(names)


@given(seed=st.integers(0, 10_000), items=st.integers(1, 30), kinds=st.integers(1, 30), k=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_equals_counting_by_hand(seed, items, kinds, k):
    generator = torch.Generator().manual_seed(seed)
    caption = torch.randint(kinds, (items,), generator=generator)
    # Whole numbers: similarities are exact, and ties are frequent.
    text = torch.randint(-2, 3, (kinds, 3), generator=generator).float()[caption]
    image = torch.randint(-2, 3, (items, 3), generator=generator).float()
    found = recalls(image, text, caption, ks=(k,))
    expected = by_hand(image, text, caption, k)
    assert (found[f"image_to_text_r{k}"], found[f"text_to_image_r{k}"]) == pytest.approx(expected)


def test_equal_captions_are_one_candidate_and_all_their_images_are_right():
    text = torch.eye(3)[[0, 0, 1, 2]]
    image = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0.9, 0], [0, 0, 1]])
    found = recalls(image, text, torch.tensor([7, 7, 8, 9]), ks=(1,))
    # Image 1 has caption 7 but looks like 8, which therefore finds it before its own.
    assert found == pytest.approx({"image_to_text_r1": 3 / 4, "text_to_image_r1": 2 / 3})


@pytest.mark.parametrize("broken", [torch.zeros(8, 4), torch.full((8, 4), torch.nan), torch.ones(8, 4)])
def test_constant_or_broken_embeddings_find_nothing(broken):
    assert set(recalls(broken, broken, torch.arange(8)).values()) == {0.0}


def test_batches_and_blocks_of_rows_change_nothing(monkeypatch):
    torch.manual_seed(0)
    image = torch.randn(40, 8)
    text, caption = image + 1.5 * torch.randn(40, 8), torch.arange(40) % 31
    whole = recalls(image, text, caption)
    monkeypatch.setattr(retrieval, "ROWS", 7)
    assert recalls(image, text, caption, batches=4) == whole
    assert 0 < whole["image_to_text_r1"] <= whole["image_to_text_r5"] < 1


def test_reset_forgets():
    metric = Retrieval()
    metric.update(torch.eye(3), torch.eye(3).flip(0), torch.arange(3))
    metric.reset()
    metric.update(torch.eye(3), torch.eye(3), torch.arange(3))
    assert metric.compute()["image_to_text_r1"] == 1


def test_ranks():
    right = torch.tensor([[False, True, False], [True, False, True]])
    candidates = torch.tensor([[0.5], [0.2], [0.9]])
    assert ranks(torch.ones(2, 1), candidates, right).tolist() == [2, 0]
