"""Spin: an adapter in the basis of a weight's own singular vectors, with one dial that turns it both ways.

    W ~ U diag(S) V^T                                                  r directions of its SVD
    y = x W^T + x dW(c)^T        dW(c) = U M(c) V^T        M(c) = diag(s(c)) R(c)^T - diag(S)
    R(c) = (I - c A/2)^-1 (I + c A/2),    A = P - P^T, soft-clamped          Cayley: R(-c) = R(c)^T
    s(c) = S + c delta  ("add")   or   S exp(c lam)  ("mult")

M(0) = 0, so at c = 0 the model is the base bit for bit; W is never written, so a base packed to 4 bits is as
good. At a fixed c this is a LoRA of rank r, A = V^T and B = U M(c), which lora.py, export and chat take.

    M(c) = odd(c) + even(c)        odd: what the sign of the dial turns; even: what both signs do alike

The even part is the price of the rotation: second order in A and delta, and no dial takes it back. `sizes`
gives both norms before any forward pass. rotate="free" is the control: M = c K, exactly odd.

Needs torch, lora.py and dial.py.

References
  Cayley transform of a skew matrix, SVD basis, clamp: Clark 2026, AntiPaSTO, arXiv:2601.07473
  adapters from the principal singular vectors: Meng et al. 2024, PiSSA, arXiv:2404.02948
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from innerpissa.dial import Dialed, check_rank, linears, weight_of
from lora import check_ranges, opt

LIMIT = 0.3                 # entries of A stay within +-this (radians, about): the notes' soft clamp
STD = 0.002                 # of P, lam and K at the start: at zero, c = +1 and -1 coincide and nothing moves
STD_DELTA = 4e-4            # of delta / S at the start


@dataclass(frozen=True)
class SpinConfig:
    """spin: the adapter in the basis of each weight"""
    r: int = opt(32, "singular directions of each weight", 1, 1e6)
    rotate: Literal["V", "UV", "none", "free"] = opt("V", "what turns: V, both, none, or the control M = c K")
    scale: Literal["add", "mult", "none"] = opt("add", "S + c delta, S exp(c lam), or S as it is")
    select: Literal["states", "top", "difference"] = opt(
        "states", "directions by variance of both personas' states over S, the largest S, or the difference")

    def __post_init__(self):
        check_ranges(self)
        if self.rotate == "none" and self.scale == "none":
            raise ValueError("rotate=none and scale=none: nothing is left to train")


# ---- pure functions --------------------------------------------------------------------------------------

def cayley(P: Tensor, c: Tensor) -> Tensor:
    """R(c), a rotation for every c, R(-c) = R(c)^T. P: [r, r], free; c: [n]. Returns [n, r, r]."""
    A = LIMIT * torch.tanh((P - P.T) / LIMIT)               # [r, r]  still skew: tanh is odd
    X = c[:, None, None] * A / 2                            # [n, r, r]
    eye = torch.eye(len(P), dtype=P.dtype, device=P.device)
    return torch.linalg.solve(eye - X, eye + X)             # [n, r, r]  the two factors commute


def odd_even(M_plus: Tensor, M_minus: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of M(1): what the sign of c turns, and what it leaves. [r, r] each."""
    return (M_plus - M_minus) / 2, (M_plus + M_minus) / 2


def pick(U: Tensor, S: Tensor, pos: Tensor | None, neg: Tensor | None, r: int, how: str) -> Tensor:
    """Which r singular directions, as indices [r] in descending order of S.

    pos, neg: [n, d_out], the module's outputs under both personas, row i of both from one pair. "states":
    half by the variance of pos along each u, half by that of neg, over S; "difference": that of pos - neg.
    """
    if r > len(S):
        raise ValueError(f"r={r}: a weight of {U.shape[0]} outputs has {len(S)} singular directions only")
    if how == "top" or pos is None:
        return torch.arange(r)
    def order(h):                                           # -> [k], the most varied direction first
        return ((h.float() @ U).var(0) / S.clamp(min=1e-12)).argsort(descending=True).tolist()
    if how == "difference":
        return torch.tensor(sorted(order(pos - neg)[:r]))
    chosen = order(pos)[:(r + 1) // 2]
    chosen += [i for i in order(neg) if i not in chosen][:r - len(chosen)]
    return torch.tensor(sorted(chosen))


# ---- one adapted Linear ----------------------------------------------------------------------------------

class Spin(nn.Module):
    """The adapter of one Linear. float32 whatever the base is; cast on use."""

    def __init__(self, linear: nn.Module, cfg: SpinConfig, rng: torch.Generator, pos=None, neg=None):
        super().__init__()
        U, S, Vt = torch.linalg.svd(weight_of(linear), full_matrices=False)     # [d_out, k], [k], [k, d_in]
        at = pick(U, S, pos, neg, cfg.r, cfg.select).to(S.device)               # [r]
        for name, value in (("U", U[:, at]), ("S", S[at]), ("Vt", Vt[at])):     # [d_out, r], [r], [r, d_in]
            self.register_buffer(name, value.contiguous())
        self.rotate, self.scale, r = cfg.rotate, cfg.scale, cfg.r

        def start(*shape):
            return nn.Parameter(torch.randn(shape, generator=rng).to(self.S))
        n = {"V": 1, "UV": 2, "none": 0, "free": 1}[cfg.rotate]
        self.P = nn.ParameterList([start(r, r) for _ in range(n)])              # P of V (and of U), or K
        self.gain = start(r) if cfg.scale != "none" and cfg.rotate != "free" else None      # delta or lam
        with torch.no_grad():
            for P in self.P:
                P.mul_(STD)
            if self.gain is not None:
                self.gain.mul_(STD_DELTA * self.S if cfg.scale == "add" else STD)

    def core(self, c: Tensor) -> Tensor:
        """M(c). c: [n]. Returns [n, r, r]; exactly 0 at c = 0."""
        if self.rotate == "free":
            return c[:, None, None] * self.P[0]                                 # [n, r, r]
        s = self.S.expand(len(c), -1)                                           # [n, r]
        if self.gain is not None:
            s = s + c[:, None] * self.gain if self.scale == "add" else s * torch.exp(c[:, None] * self.gain)
        M = torch.diag_embed(s)                                                 # [n, r, r]
        if self.rotate != "none":
            M = M @ cayley(self.P[0], c).mT
        if self.rotate == "UV":
            M = cayley(self.P[1], c) @ M
        return M - torch.diag(self.S)

    def forward(self, x: Tensor, y: Tensor, c: Tensor) -> Tensor:
        """y + x dW(c)^T. x: [B, T, d_in] or [..., d_in], y: the same of d_out; c: [1], or one per row [B]."""
        doses, row = c.unique(return_inverse=True)                              # few doses in many rows
        M = self.core(doses).to(x.dtype)                                        # [n, r, r]
        z = F.linear(x, self.Vt.to(x.dtype))                                    # [..., r]
        z = z @ M[0].T if len(c) == 1 else z @ M[row].mT                        # [..., r]
        return y + F.linear(z, self.U.to(x.dtype))                              # [..., d_out]

    @torch.no_grad()
    def as_lora(self, c: float) -> tuple[Tensor, Tensor]:
        """A [r, d_in] and B [d_out, r] of the update at this c: dW(c) = B A."""
        return self.Vt.clone(), self.U @ self.core(self.S.new_tensor([c]))[0]


# ---- all of them -----------------------------------------------------------------------------------------

@torch.no_grad()
def sizes(adapter: Dialed) -> tuple[float, float]:
    """Frobenius norms of the odd and the even part of dW(1), over all modules; U, V change neither."""
    one = adapter.parameters()[0].new_tensor([1.0, -1.0])
    parts = [odd_even(*layer.core(one.to(layer.S))) for layer in adapter.layers.values()]       # [r, r] each
    return tuple(torch.stack([x.norm() for x in side]).norm().item() for side in zip(*parts))


def spin(model, cfg: SpinConfig, *, layers: list[int], targets: list[str] | None = None, seed: int = 0,
         states: dict[str, tuple[Tensor, Tensor]] | None = None) -> Dialed:
    """Freeze the model and put a Spin on the chosen Linears of these blocks, dial at 0.

    states: {module name: its outputs [n, d_out] under both personas}, by which directions are chosen; without
    them the largest S are. Raises ValueError for a target that matches nothing, or r over the width.
    """
    chosen = linears(model, layers, targets)
    check_rank(chosen, cfg.r)
    rng = torch.Generator().manual_seed(seed)
    return Dialed(model, {name: Spin(linear, cfg, rng, *(states or {}).get(name, (None, None)))
                          for name, linear in chosen.items()})
