"""PyTorch's optimisers without the compiler that they load."""

from __future__ import annotations

import inspect

import torch
from torch.optim import Optimizer

__all__ = ["SGD", "Adam"]

# torch.optim hides these from torch.compile, and loads the compiler to do so: more than a second for the first
# optimiser of every session, of a lab that compiles nothing.
_add_param_group = inspect.unwrap(Optimizer.add_param_group)
_zero_grad = inspect.unwrap(Optimizer.zero_grad)


class Adam(torch.optim.Adam):
    """`torch.optim.Adam`, computed by the same code, but for `differentiable=True`: no gradient flows through a step.

    Examples
    --------
    >>> x = torch.zeros(1, requires_grad=True)
    >>> optimiser = Adam([x], lr=0.1)
    >>> (x - 1).square().backward()
    >>> optimiser.step()
    >>> round(x.item(), 3)
    0.1
    """

    add_param_group, zero_grad = _add_param_group, _zero_grad
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


class SGD(torch.optim.SGD):
    """`torch.optim.SGD`, computed by the same code, but for `differentiable=True`: no gradient flows through a step."""

    add_param_group, zero_grad = _add_param_group, _zero_grad
    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))
