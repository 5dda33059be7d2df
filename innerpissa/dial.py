"""Dial: adapters of a model's Linears behind one number c, whatever they are made of.

    y <- layer(x, y, c)     at every adapted Linear;  c = 0 calls none of them, so the base is exact

c is one for all rows or one per row of a batch, so that many doses are one forward. Spin and the rivals are
layers; at a fixed c each that is linear gives its update as one round of lora.py, for export and chat.
Needs torch and lora.py.
"""
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import lora


@torch.no_grad()
def weight_of(linear: nn.Module) -> Tensor:
    """W [d_out, d_in] float32, by asking the module: what it stores may be packed or transposed."""
    d_in = lora.sizes(linear)[0]
    kind = dict(dtype=next((p.dtype for p in linear.parameters() if p.is_floating_point()), torch.float32),
                device=next(linear.parameters()).device)
    at_zero = linear(torch.zeros(1, d_in, **kind))                                              # [1, d_out]
    return torch.cat([linear(x) - at_zero for x in torch.eye(d_in, **kind).split(1024)]).T.float()


def linears(model, layers: list[int], targets: list[str] | None) -> dict[str, nn.Module]:
    """The Linears that lora.attach would adapt, by name; ValueError, with what there is, if it finds none."""
    found = lora.attach(model, r=1, alpha=1, layers=layers, targets=targets)
    found.remove()
    return {name: model.get_submodule(name) for name in found.layers}


def check_rank(chosen: dict[str, nn.Module], r: int) -> None:
    least = min(min(lora.sizes(linear)) for linear in chosen.values())
    if r > least:
        raise ValueError(f"r={r}: more than {least}, the smallest width of the adapted weights")


class Dialed:
    """layers: {module name: an nn.Module whose forward(x, y, c) gives the new output}. It starts at 0."""

    def __init__(self, model, layers: dict[str, nn.Module]):
        self.model, self.layers, self.c, self.sign = model, layers, 0.0, 1.0
        self.handles = [model.get_submodule(name).register_forward_hook(self.hook(layer))
                        for name, layer in layers.items()]

    def hook(self, layer):
        def forward_hook(linear, args, y):
            if not isinstance(self.c, Tensor):
                c = self.sign * self.c
                return layer(args[0], y, torch.tensor([c], device=y.device)) if c else None
            if len(self.c) not in (1, len(y)):
                raise ValueError(f"{len(self.c)} doses for a batch of {len(y)} rows: expected one per row")
            return layer(args[0], y, self.sign * self.c.to(y.device))
        return forward_hook

    @contextmanager
    def dialed(self, c: float | Tensor):
        """The dial inside the `with` only: a number, or a Tensor [B] with one c per row of the batch."""
        before = self.c
        try:
            self.c = c
            yield self.model
        finally:
            self.c = before

    def parameters(self) -> list[nn.Parameter]:
        return [p for layer in self.layers.values() for p in layer.parameters()]

    def flip(self) -> None:
        """Exchange c and -c, which for a Spin is the same as the negative of every parameter."""
        self.sign = -self.sign

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def tensors(self, c: float) -> dict[str, Tensor]:
        """The adapter at this c as one round of lora.py: keys {module}.0.A [r, d_in] and .0.B [d_out, r]."""
        found = {}
        for name, layer in self.layers.items():
            A, B = layer.as_lora(self.sign * c)
            found |= {f"{name}.0.A": A.cpu().contiguous(), f"{name}.0.B": B.cpu().contiguous()}
        return found
