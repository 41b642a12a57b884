"""Types and ranges of arguments: what fits, and how it is said."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from annotated_types import Ge, Interval, Len, Lt
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dalle.errors import UserError
from dalle.instantiate import check
from dalle.ranges import (
    Decay,
    Fraction,
    Made,
    NonNegative,
    Number,
    Positive,
    PositiveInt,
    Rate,
    Seed,
    Text,
    describe,
    fits,
    misfit,
)


@pytest.mark.parametrize(
    ("value", "hint", "does"),
    [
        (1, int, True), (1.0, int, False), (True, int, False), ("1", int, False), (None, int, False),
        (1, float, True), (1.5, float, True), (True, float, False), ("1.5", float, False),
        (True, bool, True), (0, bool, False), ("true", bool, False),
        ("a", str, True), (1, str, False), (None, str, False),
        (None, int | None, True), ("x", int | None, False),
        ("a", Literal["a", "b"], True), ("c", Literal["a", "b"], False), (True, Literal[1], False),
        ([1, 2], list[int], True), ([1, "b"], list[int], False), (1, list[int], False),
        ("ab", Sequence[str], False), (["ab"], Sequence[str], True),
        ([1, 2.5], tuple[float, float], True), ([1], tuple[float, float], False),
        (["a"], tuple[float, ...], False), ([1], list, True),
        ("logs", str | Path, True), (3, str | Path, False),
        (None, nn.Module, False), ("net", nn.Module, False),
        (nn.Identity(), nn.Module, True), (object(), int, True),
        (3, Any, True), ({}, object, True), ({"a": 1}, dict[str, int], True),
        ({"a": "1"}, dict[str, int], False), ({1: 1}, dict[str, int], False), ({1: 1}, dict, True),
        ({"a": [1, "x"]}, Mapping[str, list[int]] | None, False), ({}, Mapping[str, int], True),
        (3, Callable[[int], int], False),
        (3, "a forward reference", True),
    ],
)  # fmt: skip
def test_fits(value, hint, does):
    assert fits(value, hint) is does


def test_types_in_a_users_words():
    assert describe(int | None) == "a whole number or null"
    assert describe(Literal["a", "b"]) == "one of a, b"
    assert describe(tuple[float, ...]) == describe(Sequence[int]) == "a list"
    assert describe(tuple[float, float]) == "a list of 2"
    assert describe(float) == describe(float | int) == "a number"
    assert describe(torch.Tensor) == "Tensor"


@pytest.mark.parametrize(
    ("value", "hint", "does"),
    [
        (1, PositiveInt, True), (0, PositiveInt, False), (True, PositiveInt, False),
        ("1", PositiveInt, False),
        (2**63 - 1, PositiveInt, True), (2**63, PositiveInt, False), (-(2**63) - 1, int, False),
        (1e-9, Positive, True), (0, Positive, False), (-1, Positive, False), (0.0, NonNegative, True),
        (0, Fraction, True), (1, Fraction, True), (1.01, Fraction, False), (-0.01, Fraction, False),
        (0.999, Decay, True), (1.0, Decay, False),
        (10**400, Number, False), (10**300, Number, True),
        (None, PositiveInt | None, True), (0, PositiveInt | None, False),
        ([1, 2], Sequence[PositiveInt], True), ([1, 0], Sequence[PositiveInt], False),
        ([], Annotated[Sequence[int], Len(1, 2)], False), ([1, 2, 3], Annotated[list[int], Len(1, 2)], False),
        ([1], Annotated[Sequence[int], Len(1, 2)], True),
        (2**32 - 1, Seed, True), (-1, Seed, False),
        ("", Text, False), ("a", Text, True),
        (5, Annotated[int, "(n,)"], True),  # what others write beside a type is not ours
        (3, Annotated[int, Interval(ge=2, lt=4)], True), (4, Annotated[int, Interval(ge=2, lt=4)], False),
        (Made(nn.Linear), nn.Module, True), (Made(dict), nn.Module, False), (Made(None), nn.Module, True),
        (Made(nn.Linear), PositiveInt, False), (Made(nn.Linear), Callable[[int], int], True),
    ],
)  # fmt: skip
def test_ranges(value, hint, does):
    assert fits(value, hint) is does


@pytest.mark.parametrize("hint", [float, Number, Positive, NonNegative, Fraction, Number | None, list[float]])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_is_nan_or_infinite(value, hint):
    assert not fits([value] if hint == list[float] else value, hint)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Positive, "a number above 0"), (PositiveInt, "a whole number of at least 1"),
        (Fraction, "a number from 0 to 1"), (Decay, "a number of at least 0 and below 1"),
        (Rate, "a number above 0 and at most 1000"),
        (PositiveInt | None, "a whole number of at least 1 or null"),
        (Text, "text that is not empty"), (Seed, "a whole number of at least 0 and below 4294967296"),
        (Annotated[list[int], Len(2, 3)], "a list of 2 to 3"),
    ],
)  # fmt: skip
def test_ranges_in_a_users_words(hint, words):
    assert describe(hint) == words


def test_what_is_wrong_inside_a_group_is_named_by_its_place():
    hint = Mapping[str, list[Number]] | None
    assert misfit({"a": [1], "b": [2, "x"]}, hint) == (".b[1]", "a number", "x")
    assert misfit({1: [2]}, hint) == ("", describe(hint), {1: [2]})
    assert misfit({1: [2]}, dict[str, Any]) == ("", "a group of settings whose names are text", {1: [2]})


def test_what_is_wrong_inside_a_list_is_named_by_its_place():
    pair = tuple[Decay, Decay]
    assert misfit([0.9, 2], pair) == ("[1]", "a number of at least 0 and below 1", 2)
    assert misfit([[3], [0]], Sequence[Sequence[PositiveInt]]) == (
        "[1][0]",
        "a whole number of at least 1",
        0,
    )
    assert misfit([3, 0], Sequence[PositiveInt] | None) == ("[1]", "a whole number of at least 1", 0)
    assert misfit(2**70, PositiveInt) == ("", "a whole number of at least 1 of 64 bits", 2**70)


def made(lr: Positive, betas: tuple[Decay, Decay] = (0.9, 0.99), net: nn.Module | None = None) -> nn.Linear:
    raise AssertionError("nothing is made")


@pytest.fixture
def optimizer(monkeypatch):
    monkeypatch.setattr(torch, "made", made, raising=False)
    monkeypatch.setattr(made, "__module__", "torch")
    return lambda **options: {"_target_": "torch.made", **options}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"lr": -1}, "optimizer.lr must be a number above 0, got -1"),
        ({"lr": math.nan}, "optimizer.lr must be a number, got nan"),
        ({"lr": 1, "betas": [0.9]}, r"optimizer.betas must be a list of 2, got \[0.9\]"),
        (
            {"lr": 1, "betas": [2, 3]},
            r"optimizer.betas\[0\] must be a number of at least 0 and below 1, got 2",
        ),
        ({"lr": 1, "net": {"_target_": "torch.Generator"}}, "optimizer.net must be Module or null, got an"),
        ({"lr": 1, "net": {"_target_": "torch.nn.ReLU", "_partial_": True}}, "got an object of partial"),
        ({"lr": "x" * 1000}, "got 'xxxx"),
    ],
)
def test_a_range_is_held_before_anything_is_built(optimizer, options, line):
    with pytest.raises(UserError, match=line) as raised:
        check(optimizer(**options), "optimizer")
    assert len(str(raised.value)) < 200


def test_what_is_made_must_be_of_its_kind(optimizer):
    check(optimizer(lr=1, net=optimizer(lr=1)), "net", nn.Module)
    with pytest.raises(UserError, match=r"^net must be Conv2d, got an object of Linear$"):
        check(optimizer(lr=1), "net", nn.Conv2d)
    with pytest.raises(UserError, match=r"^net must be Module, got 5$"):
        check(5, "net", nn.Module)


NUMBERS = st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=3), st.none())


@given(NUMBERS, st.integers(-5, 5), st.integers(-5, 5))
def test_a_bound_holds_for_whatever_is_given(value, low, high):
    hint = Annotated[int, Ge(low), Lt(high)]
    inside = type(value) is int and low <= value < high
    assert fits(value, hint) is inside
    assert fits([value], Sequence[hint]) is inside
    assert fits(value, hint | None) is (inside or value is None)


@given(st.recursive(NUMBERS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner)))
def test_nothing_makes_it_stumble(value: Any):
    for hint in (
        int,
        Positive,
        tuple[Decay, Decay],
        Sequence[PositiveInt] | None,
        Text,
        dict[str, int],
        Path,
    ):
        if wrong := misfit(value, hint):
            assert wrong.wanted
