"""LoRA rounds behind gates: a stack of low-rank updates in which every round can be turned off again.

    y = W x  +  g_hist * sum_i g_i s_i B_i A_i x  +  g_now * s B A x        s = alpha / r

The sum runs over the folded rounds, A and B are the round in training. A term whose gate is 0 is skipped,
so with all gates at 0 the model is the base bit for bit. Nothing is ever written into W: in bfloat16 an
update of a percent of the weights would lose a fifth of itself to rounding. The layers are forward hooks, so
module names stay as they are too.

    stack = attach(model, r=8, alpha=16, layers=[3, 4, 5])
    ... train stack.parameters() ...
    with stack.gated(history=1, current=0): ...                 # the model before this round
    stack.fold()                                                # or drop(); unfold() takes the fold off
    stack.load_tensors(saved.tensors())                         # files are the caller's

Needs torch only; copy this file alone. Adapts nn.Linear and GPT-2's Conv1D, a Linear with its weight
transposed. The experts of a mixture are left out, since they are 3-D parameters and not modules.

Reference: LoRA: Hu et al. 2021, arXiv:2106.09685
"""
import hashlib
import math
import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def opt(default, help, low=None, high=None):
    return field(default=default, metadata={"help": help, "low": low, "high": high})


def check_ranges(cfg) -> None:
    """ValueError for the first number of a config that is outside the range which its option names."""
    for f in fields(cfg):
        value, low, high = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"]
        values = value if isinstance(value, tuple) else (value,)
        if low is not None and not all(x is None or low <= x <= high for x in values):    # false for nan too
            raise ValueError(f"{f.name}={value}: expected a number from {low:g} to {high:g}")


@dataclass(frozen=True)
class LoraConfig:
    """lora: the adapter of each round"""
    r: int = opt(8, "rank of one round's update", 1, 1e6)
    alpha: float = opt(16.0, "the update is alpha / r * B @ A", 1e-6, 1e6)
    lora_band: tuple[float, float] = opt((0.2, 0.8), "adapt the blocks of these depths (fractions)", 0, 1)

    def __post_init__(self):
        check_ranges(self)
        if not self.lora_band[0] < self.lora_band[1]:
            raise ValueError(f"lora_band={self.lora_band}: expected the lower depth first")


# ---- one adapted Linear ------------------------------------------------------------------------------

def sizes(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a Linear, its weight packed to 4 bits or transposed too; None of another module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (module.nx, module.nf) if type(module).__name__ == "Conv1D" else None


class LoRA(nn.Module):
    """The rounds of one Linear, in the shape of a forward hook. float32 whatever the base is; cast on use."""

    def __init__(self, linear: nn.Module, r: int, scale: float):
        super().__init__()
        d_in, d_out = sizes(linear)
        new = dict(dtype=torch.float32, device=linear.weight.device)
        self.A = nn.Parameter(torch.zeros(r, d_in, **new))                      # [r, d_in]
        self.B = nn.Parameter(torch.zeros(d_out, r, **new))                     # [d_out, r]
        self.scale = scale
        self.rounds: list[tuple[Tensor, Tensor, float]] = []    # A_i [r_i, d_in], B_i [d_out, r_i], s_i
        self.history: tuple[float, ...] = ()                    # a gate per folded round
        self.current = 1.0
        self.stacked_for = self.stacked = None

    @torch.inference_mode(False)                                # built at generation, it serves training too
    def frozen(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The rounds with open gates as one pair: A [R*r, d_in], B [d_out, R*r], gates and scales in B."""
        if self.stacked_for != (self.history, dtype):
            live = [(A, g * (s * B)) for g, (A, B, s) in zip(self.history, self.rounds, strict=True) if g]
            self.stacked = (torch.cat([A for A, _ in live]).to(dtype),          # [R*r, d_in]
                            torch.cat([B for _, B in live], dim=1).to(dtype))   # [d_out, R*r]
            self.stacked_for = (self.history, dtype)            # built again when a gate changes
        return self.stacked

    def forward(self, linear: nn.Module, args: tuple, y: Tensor) -> Tensor:
        x = args[0]                                                             # [..., d_in]
        if any(self.history):
            A, B = self.frozen(x.dtype)
            y = add_product(y, F.linear(x, A), B, 1.0)                          # [..., d_out]
        if self.current:
            z = F.linear(x, self.A.to(x.dtype))                                 # [..., r]
            y = add_product(y, z, self.B.to(x.dtype), self.current * self.scale)
        return y


def add_product(y: Tensor, z: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + scale * B z in one kernel, without a third tensor of y's size. y [..., d_out], z [..., r]."""
    return torch.addmm(y.reshape(-1, len(B)), z.reshape(-1, B.shape[1]), B.T, alpha=scale).view_as(y)


# ---- all of them -------------------------------------------------------------------------------------

class Stack:
    """The adapted Linears of a model and the gates over their rounds. Made by `attach`."""

    def __init__(self, linears: dict[str, nn.Module], r: int, alpha: float, seed: int):
        self.layers = {name: LoRA(linear, r, alpha / r) for name, linear in linears.items()}
        self.seed = seed
        self.n_rounds = 0                                       # folded or loaded, not the one in training
        self.drop()
        self.handles = [linear.register_forward_hook(self.layers[name]) for name, linear in linears.items()]

    def parameters(self) -> list[nn.Parameter]:
        """A and B of the current round, Linear by Linear; the same tensors for the life of the stack."""
        return [p for lora in self.layers.values() for p in (lora.A, lora.B)]

    def remove(self) -> None:
        """Unhook: the model is the base again, and this stack no longer acts on it."""
        for handle in self.handles:
            handle.remove()

    # ---- the gates

    def gates(self, history: float | Sequence[float] = 1.0, current: float = 1.0) -> None:
        """The gates from now on. history: one number, or one per folded round. 0 = off, 1 = on."""
        each = tuple(history) if isinstance(history, Sequence) else (history,) * self.n_rounds
        if len(each) != self.n_rounds or not all(math.isfinite(g) for g in (*each, current)):
            raise ValueError(f"history={history}, current={current}: expected finite numbers, one for all or "
                             f"one for each of {self.n_rounds} folded rounds")
        for lora in self.layers.values():
            lora.history, lora.current = each, current

    @contextmanager
    def gated(self, history: float | Sequence[float] = 1.0, current: float = 1.0):
        """The gates inside the `with` only: (0, 0) is the base, (1, 0) the model before this round."""
        some = next(iter(self.layers.values()))
        before, now = some.history, some.current
        try:
            self.gates(history, current)
            yield self
        finally:
            on = (1.0,) * (self.n_rounds - len(before))         # rounds that came inside
            self.gates((before + on)[:self.n_rounds], now)      # and without those that went

    # ---- rounds end, and come back

    def fold(self) -> None:
        """Freeze the current round behind a gate of 1 and start the next; the function stays the same.

        Raises RuntimeError if the current gate is not 1, since folding would then change the model.
        """
        for lora in self.layers.values():
            if lora.current != 1:
                raise RuntimeError(f"fold at current gate {lora.current}: call gates(current=1) first")
        self._append({name: (lora.A.detach().clone(), lora.B.detach().clone(), lora.scale)
                      for name, lora in self.layers.items()})

    def unfold(self) -> None:
        """Take the last folded round off again; the next starts where that one had started.

        Raises RuntimeError if there is none, or if another round is in training by now.
        """
        if not self.n_rounds or any(lora.B.any() for lora in self.layers.values()):
            raise RuntimeError(f"unfold with {self.n_rounds} folded rounds: expected one or more, and a "
                               "current round that is not trained yet")
        for lora in self.layers.values():
            lora.rounds.pop()
            lora.history, lora.stacked_for = lora.history[:-1], None
        self.n_rounds -= 1
        self.drop()

    @torch.no_grad()
    def drop(self) -> None:
        """Roll the current round back to its start: Kaiming-uniform A and zero B, no change to the model."""
        for index, lora in enumerate(self.layers.values()):
            digest = hashlib.sha256(f"{self.seed} {self.n_rounds} {index}".encode()).digest()
            rng = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            bound = lora.A.shape[1] ** -0.5
            lora.A.copy_(torch.empty(lora.A.shape).uniform_(-bound, bound, generator=rng))
            lora.B.zero_()
            lora.A.grad = lora.B.grad = None

    def _append(self, parts: dict[str, tuple[Tensor, Tensor, float]]) -> None:
        for name, lora in self.layers.items():
            lora.rounds.append(parts[name])
            lora.history += (1.0,)
        self.n_rounds += 1
        self.drop()

    def tensors(self, rounds: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Folded rounds (default: all) by name, float32 on the CPU, to be saved and given to `load_tensors`.

        Keys `{module}.{k}.A` [r, d_in] and `{module}.{k}.B` [d_out, r], k counting from 0; the scale is in B,
        so the update is B @ A. Raises ValueError if there is no such round.
        """
        rounds = list(range(self.n_rounds)) if rounds is None else rounds
        if not rounds or not set(rounds) <= set(range(self.n_rounds)):
            raise ValueError(f"rounds={rounds}: this stack has {self.n_rounds} folded rounds, counted from 0")
        found = {}
        for name, lora in self.layers.items():
            for k, (A, B, scale) in enumerate(lora.rounds[i] for i in rounds):
                found[f"{name}.{k}.A"] = A.cpu().contiguous()
                found[f"{name}.{k}.B"] = (scale * B).cpu().contiguous()
        return found

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Append the rounds of a dict of `tensors` to the history, in order, gates 1, each whole or not.

        Raises ValueError that names what is missing from it, foreign to this model, of another shape or not
        finite, and RuntimeError if the current round is already in training.
        """
        if any(lora.B.any() for lora in self.layers.values()):
            raise RuntimeError("load into a round in training would restart it: fold() or drop() first")
        n_rounds = max(1, len({tuple(key.split(".")[-2:-1]) for key in tensors}))
        wanted = {f"{name}.{k}.{which}" for name in self.layers for k in range(n_rounds) for which in "AB"}
        lost, extra = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
        if lost or extra:
            raise ValueError(f"{len(lost)} tensors of the {len(self.layers)} adapted modules are missing "
                             f"{lost[:2]}, {len(extra)} are of modules that are not adapted here {extra[:2]}")
        for k in range(n_rounds):
            parts = {}
            for name, lora in self.layers.items():
                A, B = (tensors[f"{name}.{k}.{which}"] for which in "AB")       # [r, d_in], [d_out, r]
                is_fit = A.shape[1:] == lora.A.shape[1:] and B.shape == (len(lora.B), len(A))
                if not (is_fit and A.isfinite().all() and B.isfinite().all()):
                    raise ValueError(f"{name} has A {list(A.shape)} and B {list(B.shape)}, here it takes "
                                     f"A [r, {lora.A.shape[1]}] and B [{len(lora.B)}, r], all finite")
                parts[name] = A.to(lora.A), B.to(lora.B), 1.0   # its device, float32
            self._append(parts)


def attach(model, *, r: int, alpha: float, layers: list[int], targets: list[str] | None = None,
           seed: int = 0) -> Stack:
    """Freeze the model and hook a LoRA onto each chosen nn.Linear (or Conv1D); at first that changes nothing.

    layers: block numbers. targets: names, or ends of names such as "q_proj"; None = every Linear of those
    blocks. seed: of A, with the round and the module's place. ValueError: no such layer or target.
    """
    LoraConfig(r=r, alpha=alpha)                                # for its check of the two
    chosen = set(layers)
    inside = {id(module): int(at[1]) for name, module in model.get_decoder().named_modules()
              if (at := re.match(r"(?:layers|h)\.(\d+)(?:\.|$)", name))}        # GPT-2 and its kin say h
    if not chosen or not chosen <= set(inside.values()):
        raise ValueError(f"layers={layers}: expected numbers of decoder blocks, .layers or .h, of which "
                         f"{type(model).__name__} has {len(set(inside.values()))}, counted from 0")
    linears = {name: m for name, m in model.named_modules()
               if inside.get(id(m)) in chosen and sizes(m) and ".experts." not in name}
    hits = {t: [name for name in linears if t is None or f".{name}".endswith(f".{t}")]
            for t in targets or [None]}
    lost = [t for t, names in hits.items() if not names]
    if lost:
        raise ValueError(f"targets={targets}: {lost} match no nn.Linear in blocks {layers}; there are "
                         f"{sorted({name.rsplit('.', 1)[-1] for name in linears})}")
    linears = {name: m for name, m in linears.items() if any(name in names for names in hits.values())}
    model.requires_grad_(False)
    return Stack(linears, r, alpha, seed)


if __name__ == "__main__":
    rng, model = torch.Generator().manual_seed(0), nn.Module()  # as much of a model as attach asks for
    model.layers, model.get_decoder = nn.ModuleList([nn.Linear(16, 16)]), lambda: model
    linear, x = model.layers[0], torch.randn(5, 16, generator=rng)              # x [5, 16]
    base, stack, W = linear(x), attach(model, r=4, alpha=8, layers=[0]), linear.weight.clone()
    for rnd in range(2):
        A, B = stack.parameters()
        B.data.normal_(generator=rng)                           # "training"
        W += 8 / 4 * (B @ A).detach()                           # what two rounds should make of it
        stack.fold()
    with stack.gated(history=0, current=0):
        print("gates (0, 0) are the base, bit for bit:", torch.equal(linear(x), base))
    error = (linear(x) - F.linear(x, W, linear.bias)).abs().max().item()
    print(f"two folded rounds against W + sum s B A: largest difference {error:.0e}")
