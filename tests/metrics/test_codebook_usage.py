"""Code use by hand: perplexity, shares, and what is said of a collapse."""

import math

import pytest
import torch

from dalle.metrics.codebook_usage import CodeUse, code_use, diagnose, perplexity


def test_perplexity():
    assert perplexity(torch.tensor([5, 5, 5, 5])).item() == pytest.approx(4)
    assert perplexity(torch.tensor([7, 0, 0])).item() == pytest.approx(1)
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert perplexity(torch.tensor([3, 0, 1])).item() == pytest.approx(expected)


def test_counts_over_batches():
    metric = CodeUse(6)
    metric.update(torch.tensor([[0, 1], [1, 1]]))
    metric.update(torch.tensor([[5, 0]]))
    assert metric.compute().tolist() == [2, 3, 0, 0, 0, 1]
    table = code_use(metric.compute())
    assert table["codes_used"] == 0.5
    assert table["codes_dead"] == 3
    metric.reset()
    assert metric.counts.sum() == 0


def test_a_collapse_is_told_with_what_to_do():
    counts = torch.zeros(100, dtype=torch.int64)
    counts[:4] = 1000
    line = diagnose(counts, "raise it")
    assert line == "the codebook has collapsed: 4 of 100 codes are in use (perplexity 4.0); raise it"
    counts[4] = 1
    assert diagnose(counts, "raise it") is None  # five of a hundred


def test_nothing_is_said_of_few_pictures():
    counts = torch.zeros(100, dtype=torch.int64)
    counts[0] = 999
    assert diagnose(counts, "") is None
    counts[0] = 1000
    assert diagnose(counts, "")
