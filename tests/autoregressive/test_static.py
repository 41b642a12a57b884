"""Drawing over a cache of fixed size: the same codes, one graph for all of them, no word to the host."""

from typing import Any

import pytest
import torch
from test_sampling_codes import captions, grown, uniforms
from torch.utils._python_dispatch import TorchDispatchMode

from dalle.autoregressive import static as module
from dalle.autoregressive.sampling import generate
from dalle.autoregressive.static import Static
from dalle.nets.dalle import ATTENTION, STYLES

KEEP = torch.tensor([True, True, False])


def both(net, static, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Drawn over the static cache, and as ever."""
    text = options.pop("text", captions())
    made = [generate(net, text, uniform=uniforms(), static=s, **options) for s in (static, None)]
    return made[0], made[1]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("shift", [False, True])
def test_the_same_codes(attention, style, guidance, shift):
    """Again and again with one `Static`: what a batch leaves behind does not reach the next."""
    net, static = grown(attention=attention, style=style, shift=shift), Static()
    net.stride = 4  # several lengths of the cache
    options: dict[str, Any] = {"guidance": guidance, "keep_text": KEEP}
    known = torch.full((3, 9), -1)
    known[:, 2:5], known[1, 7] = 3, 4
    for more in (
        {"top_k": 8, "top_p": 0.95}, {"prefix": torch.arange(12).reshape(3, 4) % 11}, {"known": known},
        {"temperature": 0.0}, {}, {"text": captions(2), "keep_text": KEEP[:2]},
        {"text": captions(5), "keep_text": None},
    ):  # fmt: skip
        fast, usual = both(net, static, **options | more)
        assert torch.equal(fast, usual)
    assert len(fast.unique()) > 3


def test_what_memory_held_before_does_not_matter(monkeypatch):
    """Not even where it was no number: a cache is read beyond what is in it."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(torch.nan)
    )
    fast, usual = both(grown(), Static(), guidance=2.5)
    assert torch.equal(fast, usual)


def test_a_smaller_batch_is_filled_up():
    """Nothing is made anew for it, and its rows are what they are alone."""
    net, static = grown(), Static()
    both(net, static, text=captions(4))
    cache, steps = static.cache, dict(static.steps)
    fast, usual = both(net, static, text=captions(3))
    assert torch.equal(fast, usual)
    assert static.cache is cache
    assert static.steps == steps


def test_what_is_shown_on_the_way():
    def shown(static):
        seen = []
        generate(
            grown(), captions(), uniform=uniforms(), static=static,
            on_step=lambda i, codes: seen.append((i, codes.tolist())),
        )  # fmt: skip
        return seen

    assert shown(Static()) == shown(None)
    assert [i for i, _ in shown(Static())] == list(range(1, 10))


def test_a_network_that_knows_no_static_cache_draws_as_ever():
    net = grown()
    own: Any = type(
        "Own", (), {name: getattr(net, name) for name in ("prefill", "step", "image_vocab", "codes")}
    )
    own.step = lambda code, rank, cache: net.step(code, int(rank), cache)
    fast, usual = both(own, Static())
    assert torch.equal(fast, usual)


@pytest.mark.parametrize("attention", ["full", "dalle"])
def test_lengths_of_the_cache(attention):
    """Full attention reads no more than it needs, in steps; sparse layers pick what they read."""
    net = grown(attention=attention, grid=4)
    net.stride = 4
    reaches = [net.reach(rank) for rank in range(15)]
    assert all(net.text_length + rank < reach for rank, reach in enumerate(reaches))
    assert sorted(set(reaches)) == ([8, 12, 16, 20, 21] if attention == "full" else [21])


class Launches(TorchDispatchMode):
    """The operations of each step, with the sizes of what they read: what a graph would hold."""

    def __init__(self):
        super().__init__()
        self.made: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host asks for a number"
        sizes = [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]
        constants = [x for x in args if isinstance(x, int | float)]
        self.made.append((str(func), sizes, constants))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ["full", "dalle"])
@pytest.mark.parametrize("style", STYLES)
def test_every_step_is_the_same_work_on_the_same_memory(attention, style, monkeypatch):
    """So it can be recorded: operations and their constants do not depend on the rank, nor is it read."""
    steps: list[Any] = []

    def watched(run, *_):
        def step():
            with Launches() as launches:
                run()
            steps.append(launches.made)

        return step

    monkeypatch.setattr(module, "recorded", watched)
    net = grown(attention=attention, style=style, shift=True)
    generate(net, captions(), guidance=2.0, top_k=8, top_p=0.9, uniform=uniforms(), static=Static())
    assert len(steps) == 8
    assert all(made == steps[0] for made in steps)
    assert len(steps[0]) > 50


@pytest.mark.compile
@pytest.mark.parametrize("attention", ["full", "row"])
@pytest.mark.parametrize(("batch", "guidance"), [(3, 2.0), (1, 1.0)])
def test_all_layers_and_steps_are_one_compiled_graph(attention, batch, guidance):
    """Of one length of the cache, and the draw is another; the same codes come out."""
    torch.compiler.reset()
    net = grown(attention=attention, style="llama")
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    compile = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda f, **options: compile(f, fullgraph=True, backend=backend))
        options: dict[str, Any] = {"guidance": guidance, "top_k": 8, "top_p": 0.9}
        fast, usual = both(net, Static(compiled=True), text=captions(batch), **options)
    assert torch.equal(fast, usual)
    assert len(graphs) == 2
