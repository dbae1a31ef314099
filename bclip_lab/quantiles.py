"""Numbers of many channels that come in batches: their maxima and quantiles, kept whole or counted in bins."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["EXACT", "Histogram", "Rows"]

EXACT = 2000  # images up to which all numbers are kept: 8 kB a channel, as a histogram of `_BINS` needs, too
_BINS = 2048
_NONE = -900  # the exponent of 0: below all of float32, and its power within float64


class Rows:
    """Numbers of C channels, all kept."""

    def __init__(self, channels: int) -> None:
        self.parts: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """float32 (n, C)."""
        self.parts.append(values)

    def joined(self) -> Tensor:
        """float32 (N, C)."""
        return torch.cat(self.parts)

    def maximum(self) -> Tensor:
        """float32 (C,)."""
        return self.joined().amax(0)

    def quantiles(self, levels: tuple[float, ...]) -> Tensor:
        """float32 (Q, C)."""
        return _quantiles(self.joined(), levels)


class Histogram:
    """Numbers of C channels, counted in bins whose width doubles whenever they no longer cover what has come.

    Widths are powers of two and bins begin at multiples of their width, so that two bins become one exactly. Each
    channel has the smallest width at which `_BINS` bins reach from its smallest to its largest number, which makes the
    counts independent of the batches in which the numbers came. A number is taken for the middle of its bin: off by
    less than 1 / (_BINS - 1) of the channel's range, or by the rounding of float32 where that is more.
    """

    def __init__(self, channels: int) -> None:
        self.low, self.high = torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf)
        self.exponent = torch.full((channels, 1), _NONE)  # a bin is 2**exponent wide
        self.first = torch.zeros(channels, 1, dtype=torch.int64)  # the first bin begins at first * 2**exponent
        self.counts = torch.zeros(channels, _BINS, dtype=torch.int32)

    def add(self, values: Tensor) -> None:
        """float32 (n, C)."""
        self.low, self.high = torch.minimum(self.low, values.amin(0)), torch.maximum(self.high, values.amax(0))
        low, high = (edge.double().nan_to_num(0, 0, 0)[:, None] for edge in (self.low, self.high))
        exponent = torch.maximum(
            _exponent(high - low) - _BINS.bit_length() + 1,  # fits, or is one too small
            _exponent(torch.maximum(high.abs(), low.abs())) - 24,  # float32 knows nothing finer
        ).clamp(min=_NONE)
        reach = _bin(high, exponent) - _bin(low, exponent)
        exponent = torch.where(reach < _BINS, exponent, exponent + 1)
        first = _bin(low, exponent)
        if not (torch.equal(exponent, self.exponent) and torch.equal(first, self.first)):
            moved = ((self.first + torch.arange(_BINS)) >> (exponent - self.exponent).clamp(0, 62)) - first
            # bins that would lie beyond the ends are empty
            counts = torch.zeros_like(self.counts).scatter_add_(1, moved.clamp(0, _BINS - 1), self.counts)
            self.exponent, self.first, self.counts = exponent, first, counts
        bins = (_bin(values.T.double().nan_to_num(0, 0, 0), exponent) - first).clamp(0, _BINS - 1)
        self.counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.int32))

    def maximum(self) -> Tensor:
        """float32 (C,)."""
        return self.high

    def quantiles(self, levels: tuple[float, ...]) -> Tensor:
        """float32 (Q, C), interpolated between neighbours in order as in `torch.quantile`; nan beside an infinity."""
        below = self.counts.cumsum(1)
        rank = torch.tensor(levels, dtype=torch.float64) * (below[0, -1] - 1)
        lower, upper = self._ranked(below, rank.floor().long()), self._ranked(below, rank.ceil().long())
        return torch.lerp(lower, upper, rank - rank.floor()).T.float()

    def _ranked(self, below: Tensor, rank: Tensor) -> Tensor:
        """The numbers of these ranks from 0 in every channel: float64 (C, Q)."""
        index = torch.searchsorted(below, rank.expand(len(below), -1).contiguous(), right=True)
        middle = _scaled((self.first + index).double() + 0.5, self.exponent)
        low, high = self.low.double()[:, None], self.high.double()[:, None]
        found = torch.where(rank == 0, low, torch.where(rank == below[:, -1:] - 1, high, middle))
        return torch.where(low.isfinite() & high.isfinite(), found.clamp(low, high), torch.nan)


def _exponent(values: Tensor) -> Tensor:
    """int64: the e for which |value| lies in [2**(e - 1), 2**e); `_NONE` for 0."""
    return torch.where(values > 0, torch.frexp(values).exponent.long(), _NONE)


def _scaled(values: Tensor, exponent: Tensor) -> Tensor:
    """float64 values times 2**exponent, exactly: torch.ldexp computes the power in float32."""
    return values * torch.from_numpy(np.ldexp(1.0, exponent.numpy()))


def _bin(values: Tensor, exponent: Tensor) -> Tensor:
    """int64: which multiple of 2**exponent each value lies on or above."""
    return _scaled(values, -exponent).floor().long()


def _quantiles(values: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Quantiles (Q, C) of (N, C) over N; a few channels at a time, as torch.quantile takes 2**24 numbers."""
    parts = values.split(max(1, 2**24 // len(values)), dim=1)
    return torch.cat([torch.quantile(part, torch.tensor(levels), dim=0) for part in parts], dim=1)
