"""The losses in torch, and calls of functions of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from benchmarks.peers import cold
from benchmarks.peers.contract import Case
from benchmarks.peers.instances import CG_STEPS, L2, OUTER_RATE, Instance

torch.set_num_threads(1)


def logistic_inner(w, h, batch):
    return logistic_outer(w, batch) + 0.5 * torch.sum(torch.exp(h) * w**2)


def logistic_outer(w, batch):
    x, y = batch
    return torch.mean(functional.softplus(-y * (x @ w)))


def cleaning_inner(w, h, batch):
    x, y = batch
    losses = functional.cross_entropy(x @ w, y, reduction="none")
    return torch.mean(torch.sigmoid(h) * losses) + 0.5 * L2 * torch.sum(w**2)


def cleaning_outer(w, batch):
    x, y = batch
    return functional.cross_entropy(x @ w, y)


def rate_inner(w, h, batch):
    del h  # the update rule has it
    return logistic_outer(w, batch) + 0.5 * L2 * torch.sum(w**2)


INNER = {"logistic": logistic_inner, "cleaning": cleaning_inner, "rate": rate_inner}
OUTER = {"logistic": logistic_outer, "cleaning": cleaning_outer, "rate": logistic_outer}


def learning_rate(kind: str, h, given: float):
    """That of gradient descent; where it is learned, the one given does not matter."""
    return torch.exp(h) if kind == "rate" else given


class Params(torch.nn.Module):
    """Params as a module, which some peers ask for; called, it returns the inner loss."""

    def __init__(self, kind: str, w):
        super().__init__()
        self.w, self.kind = torch.nn.Parameter(w.clone()), kind

    def forward(self, h, batch):
        return INNER[self.kind](self.w, h, batch)


def along(maker: Callable[[str, int], Callable]):
    """Of a maker for the task "implicit": one point after the other."""

    def made(kind: str, setting):
        fn = maker(kind, setting)
        return lambda ws, hs, train, valid: torch.stack(
            [fn(w, h, train, valid) for w, h in zip(ws, hs, strict=True)]
        )

    return made


def outer_run(maker: Callable[[str, int], Callable]):
    """Of a maker for the task "implicit": the usual fixed schedule."""

    def made(kind: str, steps: int):
        hypergradient, inner, rate = maker(kind, CG_STEPS), INNER[kind], cold.INNER_RATE[kind]

        def run(instance: Instance):
            w, h, train, valid = arguments(instance, "float32")
            adam = torch.optim.Adam([h], OUTER_RATE)

            def advance():
                nonlocal w
                for _ in range(cold.INNER_STEPS):
                    w.requires_grad_()
                    w = (w - rate * torch.autograd.grad(inner(w, h, train), w)[0]).detach()
                h.grad = hypergradient(w, h, train, valid)
                adam.step()
                return h.detach()

            return cold.looked(steps, advance)

        return run

    return made


def arguments(instance: Instance, dtype: str):
    """``(w, h, train, valid)`` as tensors."""
    floating = getattr(torch, dtype)
    labels = torch.int64 if instance.kind == "cleaning" else floating
    w, h, x, valid_x = (torch.tensor(a, dtype=floating) for a in instance[1:4] + instance[5:6])
    y, valid_y = (torch.tensor(a, dtype=labels) for a in (instance.y, instance.valid_y))
    return w, h, (x, y), (valid_x, valid_y)


def prepared(fn: Callable, instance: Instance, dtype: str) -> Case:
    """Nothing is compiled."""
    args = arguments(instance, dtype)
    return Case(lambda: fn(*args).detach().numpy())
