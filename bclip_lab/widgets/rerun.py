"""Logits of the same images again and again, computed from the changed bound onwards."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from bclip_lab.clipping import Clip, ClippedModel
from bclip_lab.data.images import to_float
from bclip_lab.models import device_of, evaluating, images_at_once

__all__ = ["Rerun"]

_Values = dict[fx.Node, Any]


@dataclass(frozen=True, eq=False)
class _Kept:
    """What the network had computed, for every batch, when it came to the clip of a site."""

    upstream: tuple[Tensor, ...]  # the bounds of the sites before, under which that holds
    weights: Any
    batches: list[_Values]

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for values in self.batches for value in values.values() if isinstance(value, Tensor))


class Rerun:
    """The logits of fixed images under the bounds that a clipped model has at the time.

    The values that the network holds when it comes to a site (the activation before its clip, and what a
    shortcut carries past it) are kept. As long as no bound before the site changes, only the network from
    there on is computed. The batches are always the same, so that the logits equal those of a whole pass
    (`bclip_lab.models.logits` with the same `batch_size`) to the last bit.

    What is kept is dropped when a weight has changed, where the network works in place on it, and when another
    `Rerun` is called: a widget whose cell is run again stays in the kernel's memory, and with it all that it keeps.

    Parameters
    ----------
    clipped
        The model; call this after `set_bounds`.
    images
        Sets of images (N, C, H, W), uint8 or float32 in [0, 1].
    memory
        Bytes that may be kept. A site that needs more is computed from the nearest one before it that fits.
    batch_size
        Images at once; by default as `bclip_lab.models.images_at_once` has it.

    Attributes
    ----------
    start
        Index of the site at whose clip the latest call began; -1 where it began with the images.

    Examples
    --------
    >>> from torch import nn
    >>> clipped = ClippedModel(nn.Sequential(nn.Flatten(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU()))
    >>> rerun = Rerun(clipped, [torch.rand(5, 3, 1, 1)])
    >>> starts = []
    >>> for bound in (2.0, 1.0, 0.5):
    ...     clipped.set_bounds({"4": bound})
    ...     (logits,) = rerun()
    ...     starts.append(rerun.start)
    >>> logits.shape, starts
    (torch.Size([5, 2]), [-1, -1, 1])
    """

    _latest: ClassVar[weakref.ref[Rerun] | None] = None  # the one that was called last, and so may keep something

    def __init__(
        self,
        clipped: ClippedModel,
        images: Sequence[Tensor],
        *,
        memory: int = 200_000_000,
        batch_size: int | None = None,
    ) -> None:
        self._clipped = clipped
        split = [each.split(batch_size or images_at_once(each.shape)) for each in images]
        self._sizes = [len(batches) for batches in split]
        self._images = [batch for batches in split for batch in batches]
        self._memory = memory
        self._runner = fx.Interpreter(clipped.network, garbage_collect_values=False)
        self._nodes: list[fx.Node] = list(clipped.network.graph.nodes)
        order = {node: position for position, node in enumerate(self._nodes)}
        self._last = {node: max((order[user] for user in node.users), default=-1) for node in order}  # its last reader
        modules = dict(clipped.network.named_modules())
        self._clips = [
            order[node]
            for node in self._nodes
            if node.op == "call_module" and isinstance(modules[str(node.target)], Clip)
        ]
        self._kept: dict[int, _Kept] = {}  # of sites by their index, the latest made last
        self._before: tuple[Tensor, ...] | None = None  # the bounds of the latest call
        self._refused: set[int] = set()  # sites that need too much memory, or whose values change in place
        self.start = -1

    @property
    def kept(self) -> int:
        """Bytes that are kept."""
        return sum(kept.nbytes for kept in self._kept.values())

    @torch.no_grad()
    def __call__(self) -> list[Tensor]:
        """Logits (N, K) of every set of images: float32, on the CPU."""
        bounds = tuple(self._clipped.bounds.values())
        changed = None
        if self._before is not None:
            pairs = enumerate(zip(self._before, bounds, strict=True))
            changed = next((index for index, (old, new) in pairs if not torch.equal(old, new)), None)
        self._before = bounds
        return self._run(bounds, changed, self._usable(bounds, len(bounds)))

    @torch.no_grad()
    def prepare(self, site: str) -> None:
        """Keep what a change at this site needs, so that already the first one is quick."""
        index = self._clipped.sites.index(site)
        bounds = tuple(self._clipped.bounds.values())
        start = self._usable(bounds, index)
        if start != index:
            self._run(bounds, index, start)

    def _usable(self, bounds: tuple[Tensor, ...], furthest: int) -> int:
        """The last site, up to `furthest`, whose values hold under these bounds; -1 for none."""
        weights = self._weights()
        for index in sorted(self._kept, reverse=True):
            kept = self._kept[index]
            same = all(torch.equal(old, new) for old, new in zip(kept.upstream, bounds[:index], strict=True))
            if index <= furthest and same and kept.weights == weights:
                return index
        return -1

    def _weights(self) -> Any:
        """What tells whether a weight or a buffer has changed; the bounds do not count."""
        state = self._clipped.original.state_dict(keep_vars=True).values()
        return tuple((value.data_ptr(), value._version) for value in state)

    def _run(self, bounds: tuple[Tensor, ...], keep: int | None, start: int) -> list[Tensor]:
        latest = None if Rerun._latest is None else Rerun._latest()
        if latest is not None and latest is not self:
            latest._kept.clear()
        Rerun._latest = weakref.ref(self)
        self.start = start
        if keep is not None and (keep <= self.start or keep in self._refused):
            keep = None
        begun: list[_Values] = self._kept[self.start].batches if self.start >= 0 else [{} for _ in self._images]
        versions = [_versions(values) for values in begun]
        parts, taken = [], []
        with evaluating(self._clipped):
            for images, values in zip(self._images, begun, strict=True):
                part, at_site = self._forward(images, values, keep)
                parts.append(part)
                taken.append(at_site)
        if versions != [_versions(values) for values in begun]:
            self._refused.add(self.start)  # the logits are right, but what was kept is no more
            del self._kept[self.start]
        if keep is not None:
            self._keep(keep, _Kept(bounds[:keep], self._weights(), [values for values in taken if values is not None]))
        logits = iter(parts)
        return [torch.cat([next(logits) for _ in range(count)]) for count in self._sizes]

    def _forward(self, images: Tensor, values: _Values, keep: int | None) -> tuple[Tensor, _Values | None]:
        """The logits of a batch, from `values` on, and the values at the site `keep`, if nothing changes them."""
        runner, start = self._runner, self._clips[self.start] if self.start >= 0 else 0
        runner.env, at_site, versions = dict(values), None, {}
        if self.start < 0:
            x = to_float(images.to(device_of(self._clipped))).contiguous(memory_format=torch.channels_last)
            runner.args_iter = iter((x,))
        for position, node in enumerate(self._nodes[start:], start):
            if keep is not None and position == self._clips[keep]:
                at_site = {node: value for node, value in runner.env.items() if self._last[node] >= position}
                versions = _versions(at_site)
            runner.env[node] = runner.run_node(node)
            for read in node.all_input_nodes:
                if self._last[read] <= position:
                    del runner.env[read]
        part = runner.env[node].float().cpu()
        runner.env = {}
        plain = at_site is not None and all(isinstance(value, (Tensor, int)) for value in at_site.values())
        return part, at_site if plain and versions == _versions(at_site or {}) else None

    def _keep(self, index: int, kept: _Kept) -> None:
        if len(kept.batches) < len(self._images) or kept.nbytes > self._memory:
            self._refused.add(index)
            return
        self._kept.pop(index, None)
        self._kept[index] = kept
        while self.kept > self._memory:
            del self._kept[next(iter(self._kept))]


def _versions(values: _Values) -> dict[fx.Node, int]:
    """Counters that work in place adds to."""
    return {node: value._version for node, value in values.items() if isinstance(value, Tensor)}
