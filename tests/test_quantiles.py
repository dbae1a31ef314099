from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bclip_lab.quantiles import Histogram, Rows


def test_quantiles_of_many_images_are_those_of_torch() -> None:
    values = torch.rand(2**20, 17, generator=torch.Generator().manual_seed(0))
    rows = Rows(17)
    rows.add(values)
    found = rows.quantiles((0.5,))
    assert found.shape == (1, 17)
    assert torch.equal(found[:, 16], torch.quantile(values[:, 16], torch.tensor([0.5])))


LEVELS = (0.0, 0.01, 0.25, 0.5, 0.9, 0.999, 1.0)


@given(
    rows=st.integers(1, 400),
    seed=st.integers(0, 999),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e9]),
    shift=st.sampled_from([0.0, 1.0, -1e3]),
    cuts=st.lists(st.integers(1, 399), max_size=4),
)
def test_quantiles_from_a_histogram_are_those_of_all_numbers(
    rows: int, seed: int, scale: float, shift: float, cuts: list[int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, 4, generator=generator)
    # even, heavy-tailed, mostly silent, constant
    values = torch.stack([normal[:, 0], normal[:, 1].mul(5).exp(), normal[:, 2].clamp(min=0), torch.ones(rows)], 1)
    values = scale * (values + shift)
    found = Histogram(4)
    for part in values.tensor_split(sorted(cuts)):
        if len(part):
            found.add(part)
    once = Histogram(4)
    once.add(values)
    assert torch.equal(found.counts, once.counts) and (found.counts.sum(1) == rows).all()
    assert torch.equal(found.quantiles(LEVELS), once.quantiles(LEVELS))
    assert torch.equal(found.maximum(), values.amax(0))
    expected = torch.quantile(values.double(), torch.tensor(LEVELS, dtype=torch.float64), dim=0)
    error = (found.quantiles(LEVELS).double() - expected).abs()
    allowed = (values.amax(0) - values.amin(0)) / 2000 + 1e-6 * values.abs().amax(0)
    assert (error <= allowed).all()
    assert torch.equal(found.quantiles((0.0, 1.0)), torch.stack([values.amin(0), values.amax(0)]))


def test_a_histogram_knows_the_numbers_that_it_can_tell_apart() -> None:
    histogram = Histogram(3)
    for _ in range(5):  # 5000 numbers; a gap, where a median lies between two; an infinity
        values = torch.arange(1000.0) % 100
        histogram.add(torch.stack([values, (values >= 50) * 8.0, values.where(values < 99, torch.inf)], 1))
    median = histogram.quantiles((0.5,))[0]
    assert float(median[0]) == pytest.approx(49.5, abs=99 / 2000) and float(median[1]) == pytest.approx(4, abs=8 / 2000)
    assert median[2].isnan() and histogram.maximum().tolist() == [99, 8, torch.inf]
    assert histogram.counts.shape == (3, 2048)
