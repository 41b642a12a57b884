"""Drawing codes: what filters keep, how draws are distributed, and that a cache changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle.autoregressive.draws import draw, keep_top_k, keep_top_p
from dalle.autoregressive.sampling import generate
from dalle.errors import UserError
from dalle.nets.dalle import ATTENTION, DALLE, STYLES


def grown(**changes) -> DALLE:
    """With weights so large that every token matters."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "text_vocab": 20,
        "text_length": 6,
        "image_vocab": 11,
        "grid": 3,
        "image_levels": None,
    }
    net = DALLE(**sizes | {"width": 32, "depth": 3, "heads": 4} | changes)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return net.eval()


def captions(b: int = 3) -> torch.Tensor:
    text = torch.randint(2, 19, (b, 6), generator=torch.Generator().manual_seed(1))
    text[:, 0], text[:, 4] = 1, 19
    return text


def uniforms(seed: int = 2) -> Callable[[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.rand(like.shape, generator=generator)


def drawn(logits: torch.Tensor, *options) -> torch.Tensor:
    return draw(logits, uniforms()(logits), *options)


LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(logits=LOGITS, data=st.data())
def test_top_k_keeps_the_k_largest(logits, data):
    k = data.draw(st.integers(1, len(logits)))
    kept = keep_top_k(torch.tensor([logits]), k)[0].tolist()
    least = sorted(logits, reverse=True)[k - 1]
    assert kept == [x if x >= least else -torch.inf for x in logits]


@settings(max_examples=100, deadline=None)
@given(logits=LOGITS, p=st.floats(0.01, 1.0))
def test_top_p_keeps_the_fewest_that_reach_p(logits, p):
    x = torch.tensor([logits], dtype=torch.float64)
    kept = keep_top_p(x, p)[0]
    probs = x.softmax(1)[0]
    on = kept > -torch.inf
    assert on.any()
    assert torch.equal(kept[on], x[0, on])
    assert on.all() or x[0, on].min() > x[0, ~on].max()  # logits: probabilities may round alike
    assert probs[on].sum() >= p - 1e-9
    above = x[0] > x[0, on].min()  # without the last one (and what equals it), too little is left
    assert probs[above].sum() < p + 1e-9


def test_filters_are_off_by_default_and_at_their_ends():
    logits = torch.randn(4, 9)
    for same in (
        keep_top_k(logits, None),
        keep_top_k(logits, 9),
        keep_top_p(logits, None),
        keep_top_p(logits, 1),
    ):
        assert torch.equal(same, logits)
    largest = logits.argmax(1)
    for one in (keep_top_k(logits, 1), keep_top_p(logits, 1e-6)):
        assert torch.equal((one > -torch.inf).sum(1), torch.ones(4, dtype=torch.int64))
        assert torch.equal(one.argmax(1), largest)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_have_the_probabilities_of_the_tempered_softmax(temperature):
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0])
    n = 40_000
    codes = drawn(logits.expand(n, -1), temperature, None, None)
    expected = (logits / temperature).softmax(0)
    torch.testing.assert_close(codes.bincount(minlength=4) / n, expected, rtol=0, atol=0.012)


def test_the_temperature_comes_before_top_p_and_top_k_before_both_see_each_other():
    """At temperature 4 the two largest hold less than 0.9 of all, and 0.9 of the three that top-k leaves."""
    logits = torch.tensor([[4.0, 3.0, -2.0, -2.1, -2.2]])
    few, more = (drawn(logits.expand(4000, -1), t, None, 0.9) for t in (1, 4))
    assert set(few.tolist()) == {0, 1}
    assert len(set(more.tolist())) > 2
    assert set(drawn(logits.expand(4000, -1), 4, 3, 0.8).tolist()) == {0, 1}


def test_the_smallest_uniforms_draw_nothing_that_was_left_out():
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert draw(logits, torch.zeros(1, 3), 1.0, 1, None).item() == 1


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("given", [0, 4])
def test_the_cache_changes_no_code(attention, style, guidance, given):
    net = grown(attention=attention, style=style)
    keep, prefix = torch.tensor([True, True, False]), torch.arange(3 * given).reshape(3, given) % 11
    options: dict[str, Any] = {"guidance": guidance, "prefix": prefix, "top_k": 8, "top_p": 0.95}
    fast, slow = (
        generate(net, captions(), keep, cached=cached, uniform=uniforms(), **options)
        for cached in (True, False)
    )
    assert torch.equal(fast, slow)
    assert torch.equal(fast[:, :given], prefix)
    assert fast.shape == (3, 9)
    assert len(fast.unique()) > 3


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_codes_follow_the_logits_of_the_whole_stream(guidance):
    """At temperature 0, each is the likeliest of null + guidance (caption - null)."""
    net = grown(attention="dalle")
    text = captions()
    codes = generate(net, text, temperature=0, guidance=guidance)
    told, null = (net(text, codes, torch.full((3,), keep))[1] for keep in (True, False))
    assert torch.equal((null + guidance * (told - null)).argmax(2), codes)


def test_guidance_pulls_towards_the_caption():
    """At guidance 0 the caption is not heard; elsewhere the result is another one."""
    net, text = grown(), captions()
    dropped = torch.zeros(3, dtype=torch.bool)
    results = {s: generate(net, text, guidance=s, uniform=uniforms()) for s in (0.0, 1.0, 4.0)}
    assert torch.equal(results[0.0], generate(net, text, dropped, uniform=uniforms()))
    assert not torch.equal(results[1.0], results[0.0])
    assert not torch.equal(results[4.0], results[1.0])
    assert torch.equal(generate(net, text, dropped, guidance=4.0, uniform=uniforms()), results[0.0])


def test_temperature_0_takes_no_noise():
    def refuse(like):
        raise AssertionError("noise was drawn")

    assert generate(grown(), captions(), temperature=0, uniform=refuse).shape == (3, 9)


def test_previews_see_the_codes_so_far():
    seen = []
    codes = generate(
        grown(),
        captions(),
        prefix=torch.full((3, 5), 7),
        on_step=lambda n, codes: seen.append((n, codes.clone())),
    )
    assert [n for n, _ in seen] == list(range(6, 10))
    for n, so_far in seen:
        assert torch.equal(so_far[:, :n], codes[:, :n])
        assert not so_far[:, n:].any()


def test_a_whole_picture_as_prefix_comes_back():
    prefix = torch.randint(11, (3, 9))
    assert torch.equal(generate(grown(), captions(), prefix=prefix), prefix)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shift", [False, True])
def test_the_cache_knows_codes_that_are_kept_anywhere(style, guidance, shift):
    net, hole = grown(attention="dalle", style=style, shift=shift), [2, 3, 6]
    known = torch.arange(27).reshape(3, 9) % 11
    known[:, hole] = -1
    fast, slow = (
        generate(net, captions(), known=known, cached=cached, uniform=uniforms(), guidance=guidance)
        for cached in (True, False)
    )
    assert torch.equal(fast, slow)
    kept = known >= 0
    assert torch.equal(fast[kept], known[kept])
    assert len(fast[~kept].unique()) > 2


def test_known_codes_are_seen_by_those_after_them_alone():
    net, text = grown(), captions()
    known = generate(net, text, temperature=0)
    known[:, 4] = -1
    assert generate(net, text, temperature=0, known=known)[0, 4] == generate(net, text, temperature=0)[0, 4]
    before, after = known.clone(), known.clone()
    before[:, 3], after[:, 5] = (known[:, 3] + 1) % 11, (known[:, 5] + 1) % 11
    logits = {}
    for name, codes in (("as it is", known), ("before", before), ("after", after)):
        logits[name] = net(text, codes.clamp(min=0))[1][:, 4]
        assert torch.equal(generate(net, text, temperature=0, known=codes)[:, 4], logits[name].argmax(1))
    assert not torch.allclose(logits["before"], logits["as it is"])
    torch.testing.assert_close(logits["after"], logits["as it is"])


def test_each_picture_may_know_other_codes_and_one_that_knows_all_costs_nothing():
    net, text = grown(), captions()
    whole = generate(net, text, temperature=0)
    known = whole.clone()
    known[0, 1:3], known[2, 7:] = -1, -1
    assert torch.equal(generate(net, text, temperature=0, known=known), whole)

    def refuse(*_):
        raise AssertionError("the network was asked")

    net.prefill = refuse  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(generate(net, text, known=whole), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 12}, "top_k is 1 to 11, the codes there are, not 12"),
        ({"top_k": 0}, "top_k is 1 to 11"),
        ({"top_p": 0.0}, "top_p is more than 0 and at most 1, not 0.0"),
        ({"top_p": 1.1}, "top_p is more than 0 and at most 1, not 1.1"),
        ({"temperature": -1}, "temperature is 0 .* or more, not -1"),
        ({"temperature": float("nan")}, "temperature is 0 .* or more, not nan"),
        ({"prefix": torch.zeros(3, 10, dtype=torch.int64)}, "prefix: 10 codes, but a picture has 9"),
        ({"prefix": torch.full((3, 1), 11)}, "prefix: codes go from 0 to 10, and one is 11"),
        ({"prefix": torch.full((3, 1), -1)}, "prefix: codes go from 0 to 10, and one is -1"),
        ({"known": torch.full((3, 9), 11)}, "known: codes go from 0 to 10, and one is 11"),
        ({"known": torch.full((3, 8), 1)}, "known: 8 codes, but a picture has 9"),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        generate(grown(), captions(), **options)
    assert "\n" not in str(error.value)


def test_under_autocast_the_cache_is_as_small_as_the_keys():
    net = grown()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, cache = net.prefill(captions())
        assert cache.kv.dtype == torch.bfloat16
        assert net.step(logits.argmax(1), 0, cache).shape == (3, 11)
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(net, captions(), guidance=2.0).shape == (3, 9)
