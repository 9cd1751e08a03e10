"""Hand-written torch: reverse mode for everything, or the fixed-point form that hypertorch takes."""

from __future__ import annotations

import torch

from benchmarks.peers import in_torch
from benchmarks.peers.contract import solver_peer
from benchmarks.peers.in_torch import INNER, OUTER, learning_rate


def conjugate_gradients(product, b, steps: int):
    x, r, p, rr = torch.zeros_like(b), b, b, torch.sum(b * b)
    for _ in range(steps):
        ap = product(p)
        alpha = rr / torch.sum(p * ap).clamp(min=1e-30)
        x, r = x + alpha * p, r - alpha * ap
        new = torch.sum(r * r)
        p, rr = r + new / rr.clamp(min=1e-30) * p, new
    return x


def implicit(kind: str, steps: int):
    inner, outer = INNER[kind], OUTER[kind]

    def call(w, h, train, valid):
        w, h = w.detach().requires_grad_(), h.detach().requires_grad_()
        b = torch.autograd.grad(outer(w, valid), w)[0]
        gradient = torch.autograd.grad(inner(w, h, train), w, create_graph=True)[0]

        def product(v):
            return torch.autograd.grad(gradient, w, v, retain_graph=True)[0]

        v = conjugate_gradients(product, b, steps)
        return -torch.autograd.grad(gradient, h, v)[0]

    return call


def fixed_point(kind: str, steps: int):
    """Of one gradient step ``u``: (I - d_w u) v = d_w outer, then d_h u applied to v."""
    inner, outer = INNER[kind], OUTER[kind]

    def call(w, h, train, valid):
        w, h = w.detach().requires_grad_(), h.detach().requires_grad_()
        b = torch.autograd.grad(outer(w, valid), w)[0]
        mapped = w - torch.autograd.grad(inner(w, h, train), w, create_graph=True)[0]

        def product(v):
            return v - torch.autograd.grad(mapped, w, v, retain_graph=True)[0]

        return torch.autograd.grad(mapped, h, conjugate_gradients(product, b, steps))[0]

    return call


def unrolled(kind: str, setting):
    steps, rate = setting
    inner, outer = INNER[kind], OUTER[kind]

    def call(w, h, train, valid):
        w, h = w.detach().requires_grad_(), h.detach().requires_grad_()
        size = learning_rate(kind, h, rate)
        for _ in range(steps):
            w = w - size * torch.autograd.grad(inner(w, h, train), w, create_graph=True)[0]
        return torch.autograd.grad(outer(w, valid), h)[0]

    return call


PEERS = (
    solver_peer("torch by hand", ("torch",), in_torch, implicit, unrolled),
    solver_peer("torch, hypertorch's form", ("torch",), in_torch, fixed_point, "the same as torch by hand"),
)
