"""Recording what a GPU does: on other devices fixed shapes are left of it, and no number changes."""

import pytest
import torch

from dalle.graphs import Recorded


def run(x, t, *, text, more):
    return x * t[:, None] + text["a"].sum(1, keepdim=True), [more[0] * 2]


def inputs(b: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(b, 4, generator=g), torch.rand(b, generator=g)), {
        "text": {"a": torch.randn(b, 3, generator=g)},
        "more": [torch.randn(b, generator=g), None],
    }


def test_the_same_numbers_for_batches_up_to_the_first_ones_size():
    seen = []
    recorded = Recorded(lambda *args, **kwargs: (seen.append(len(args[0])), run(*args, **kwargs))[1])
    for b, seed in ((4, 1), (4, 2), (3, 3), (1, 4), (4, 5)):
        args, kwargs = inputs(b, seed)
        for got, expected in zip(recorded(*args, **kwargs), run(*args, **kwargs), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert seen == [4] * 5


def test_a_larger_batch_is_a_graph_of_its_own_and_so_is_another_shape():
    sizes = []
    recorded = Recorded(lambda x: (sizes.append(tuple(x.shape)), x + 1)[1], most=2)
    for shape in ((2, 3), (5, 3), (4, 3), (5, 4), (3, 4), (2, 5), (1, 3)):
        assert torch.equal(recorded(torch.ones(shape)), torch.full(shape, 2.0))
    assert sizes == [
        (2, 3),
        (5, 3),
        (5, 3),
        (5, 4),
        (5, 4),
        (2, 5),
        (1, 3),
    ]  # the first was not used for longest
    assert len(recorded.graphs) == 2


def test_what_comes_out_is_kept():
    """The next call writes into the same memory; what came out before stays."""
    buffer = torch.zeros(2, 3)
    recorded = Recorded(lambda x: buffer.copy_(x))
    first, second = recorded(torch.ones(2, 3)), recorded(torch.full((2, 3), 2.0))
    assert first.unique().item() == 1
    assert second.unique().item() == 2


def test_what_is_given_by_name_is_copied_once():
    x, text = torch.zeros(2, 3), torch.ones(2, 3)
    recorded = Recorded(lambda x, text: x + text)
    assert recorded(x, text=text).sum() == 6
    x += 1
    text += 1  # nobody does: a condition is the same tensor over all steps
    assert recorded(x, text=text).sum() == 12
    assert recorded(x, text=text.clone()).sum() == 18


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_graph_runs_on_new_numbers_without_asking_the_host():
    recorded = Recorded(run)
    for b, seed in ((4, 1), (3, 2), (4, 3)):
        args, kwargs = inputs(b, seed)
        expected = run(*args, **kwargs)
        args = tuple(x.cuda() for x in args)
        kwargs = {"text": {"a": kwargs["text"]["a"].cuda()}, "more": [kwargs["more"][0].cuda(), None]}
        recorded(*args, **kwargs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = recorded(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(
                one[0].cpu() if isinstance(one, list) else one.cpu(),
                other[0] if isinstance(other, list) else other,
            )
