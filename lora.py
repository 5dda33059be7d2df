"""LoRA rounds behind gates: a stack of low-rank updates in which every round can be turned off again.

    y = W x  +  g_hist * sum_i g_i s_i B_i A_i x  +  g_now * s B A x        s = alpha / r

The sum runs over the folded rounds, A and B are the round in training. A term whose gate is 0 is skipped, so with all
gates at 0 the model is the base bit for bit. Nothing is ever written into W: in bfloat16 an update of a percent of the
weights would lose a fifth of itself to rounding. The layers are forward hooks, so module names stay as they are too.

    stack = attach(model, r=8, alpha=16, layers=[3, 4, 5])
    ... train stack.parameters() ...
    with stack.gated(history=1, current=0): ...                 # the model before this round
    stack.fold(); stack.save("rounds.safetensors")

Needs torch and safetensors. Does not adapt anything but nn.Linear: the experts of a mixture (3-D parameters) and
GPT-2's Conv1D are left out.

References
  LoRA: Hu et al. 2021, arXiv:2106.09685
  recipe: github.com/wassname/steer-heal-love
"""
import hashlib
import math
import os
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


def opt(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class LoraConfig:
    """lora: the adapter of each round"""
    r: int = opt(8, "rank of one round's update")
    alpha: float = opt(16.0, "the update is alpha / r * B @ A")
    lora_from: float = opt(0.2, "adapt the blocks from this depth on (fraction of their number)")
    lora_to: float = opt(0.8, "adapt the blocks up to this depth (fraction of their number)")

    def __post_init__(self):
        check_rank(self.r, self.alpha)
        if not 0 <= self.lora_from < self.lora_to <= 1:
            raise ValueError(f"lora_from={self.lora_from}, lora_to={self.lora_to}: expected 0 <= from < to <= 1")


def check_rank(r: int, alpha: float) -> None:
    if r < 1 or not 0 < alpha < math.inf:
        raise ValueError(f"r={r}, alpha={alpha}: expected r >= 1 and a finite alpha > 0")


# ---- one adapted Linear ----------------------------------------------------------------------------------------------

class LoRA(nn.Module):
    """The rounds of one Linear, in the shape of a forward hook. float32 whatever the base's dtype; cast on use."""

    def __init__(self, linear: nn.Linear, r: int, scale: float):
        super().__init__()
        new = dict(dtype=torch.float32, device=linear.weight.device)
        self.A = nn.Parameter(torch.zeros(r, linear.in_features, **new))        # [r, d_in]
        self.B = nn.Parameter(torch.zeros(linear.out_features, r, **new))       # [d_out, r]
        self.scale = scale
        self.rounds: list[tuple[Tensor, Tensor]] = []           # folded: A_i [r_i, d_in], s_i B_i [d_out, r_i]
        self.history: tuple[float, ...] = ()                    # a gate per folded round
        self.current = 1.0
        self.stacked_for = self.stacked = None

    @torch.no_grad()
    def restart(self, rng: torch.Generator) -> None:
        """Kaiming-uniform A and zero B: the round starts as no change at all, but with a gradient in B."""
        bound = self.A.shape[1] ** -0.5
        self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=rng))
        self.B.zero_()
        self.A.grad = self.B.grad = None

    @torch.inference_mode(False)                                # what is built while generating must serve training too
    def frozen(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All rounds whose gate is open as one wide pair, [R*r, d_in] and [d_out, R*r], rebuilt when gates change."""
        if self.stacked_for != (self.history, dtype):
            live = [(A, gate * B) for gate, (A, B) in zip(self.history, self.rounds, strict=True) if gate]
            self.stacked = (torch.cat([A for A, _ in live]).to(dtype), torch.cat([B for _, B in live], dim=1).to(dtype))
            self.stacked_for = (self.history, dtype)
        return self.stacked

    def forward(self, linear: nn.Linear, args: tuple, y: Tensor) -> Tensor:
        x = args[0]                                                             # [..., d_in]
        if any(self.history):
            A, B = self.frozen(x.dtype)
            y = y + F.linear(F.linear(x, A), B)                                 # [..., d_out]
        if self.current:
            z = self.current * self.scale * F.linear(x, self.A.to(x.dtype))     # [..., r]
            y = y + F.linear(z, self.B.to(x.dtype))                             # [..., d_out]
        return y


# ---- all of them -----------------------------------------------------------------------------------------------------

class Stack:
    """The adapted Linears of a model and the gates over their rounds. Made by `attach`."""

    def __init__(self, linears: dict[str, nn.Linear], r: int, alpha: float, seed: int):
        self.layers = {name: LoRA(linear, r, alpha / r) for name, linear in linears.items()}
        self.seed = seed
        self.n_rounds = 0                                       # folded or loaded; the one in training not counted
        self.drop()
        self.handles = [linear.register_forward_hook(self.layers[name]) for name, linear in linears.items()]

    def parameters(self) -> list[nn.Parameter]:
        """A and B of the current round, Linear by Linear; the same tensors for the life of the stack."""
        return [p for lora in self.layers.values() for p in (lora.A, lora.B)]

    def gates(self, history: float | Sequence[float] = 1.0, current: float = 1.0) -> None:
        """Set the gates from now on. history: one number for all folded rounds, or one per round. 0 = off, 1 = on."""
        each = tuple(history) if isinstance(history, Sequence) else (history,) * self.n_rounds
        if len(each) != self.n_rounds:
            raise ValueError(f"history={history}: got {len(each)} gates for {self.n_rounds} folded rounds")
        if not all(math.isfinite(g) for g in (*each, current)):
            raise ValueError(f"history={history}, current={current}: expected finite numbers")
        self._set(each, current)

    @contextmanager
    def gated(self, history: float | Sequence[float] = 1.0, current: float = 1.0):
        """The gates inside the `with` only: gated(0, 0) is the base, gated(1, 0) the model before this round."""
        some = next(iter(self.layers.values()))
        before, now = some.history, some.current
        try:
            self.gates(history, current)
            yield self
        finally:
            self._set(before + (1.0,) * (self.n_rounds - len(before)), now)     # rounds that came inside are on

    def _set(self, history: tuple[float, ...], current: float) -> None:
        for lora in self.layers.values():
            lora.history, lora.current = history, current

    def fold(self) -> None:
        """Freeze the current round behind a gate of 1 and start the next one. The model's function stays the same.

        Raises RuntimeError if the current gate is not 1, since folding would then change the model.
        """
        for name, lora in self.layers.items():
            if lora.current != 1:
                raise RuntimeError(f"fold at current gate {lora.current}: call gates(current=1) first")
            if not (lora.A.isfinite().all() and lora.B.isfinite().all()):
                raise RuntimeError(f"fold: {name} is not finite; drop() this round")
        self._append([{name: (lora.A.detach().clone(), lora.scale * lora.B.detach())
                       for name, lora in self.layers.items()}])

    def drop(self) -> None:
        """Roll the current round back to its start: no change to the model, the same A as at first."""
        for index, lora in enumerate(self.layers.values()):
            digest = hashlib.sha256(f"{self.seed} {self.n_rounds} {index}".encode()).digest()
            lora.restart(torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))

    def _append(self, rounds: list[dict[str, tuple[Tensor, Tensor]]]) -> None:
        for pairs in rounds:
            for name, lora in self.layers.items():
                lora.rounds.append(pairs[name])
                lora.history += (1.0,)
        self.n_rounds += len(rounds)
        self.drop()

    # ---- size of the current round

    @torch.no_grad()
    def _grams(self) -> tuple[Tensor, Tensor]:
        """A A^T and B^T B of every Linear, [M, r, r] in float64 on the CPU: all that singular values of B @ A need."""
        pairs = [(lora.A @ lora.A.T, lora.B.T @ lora.B) for lora in self.layers.values()]
        return torch.stack([a.cpu() for a, _ in pairs]).double(), torch.stack([b.cpu() for _, b in pairs]).double()

    def spectral(self) -> Tensor:
        """Mean over Linears of the largest singular value of s * B @ A, as a scalar with a gradient in A and B.

        sigma = u^T B A v holds to first order with the singular vectors u, v held constant, so they are found without a
        graph and without random numbers, from r x r matrices. At B = 0 value and gradient are 0.
        """
        AAt, BtB = self._grams()                                                # [M, r, r]
        w, Q = torch.linalg.eigh(AAt)
        root = Q * w.clamp(min=0).sqrt()[:, None] @ Q.mT                        # [M, r, r]  square root of A A^T
        top = (root @ torch.linalg.eigh(root @ BtB @ root)[1][..., -1:])[..., 0]        # [M, r]   u is along B @ top
        sigmas = []
        for lora, z in zip(self.layers.values(), top):
            A, B = lora.A.detach(), lora.B.detach()
            u = F.normalize(B @ z.to(B), dim=0, eps=1e-30)                      # [d_out]  stays 0 at B = 0
            v = F.normalize((u @ B) @ A, dim=0, eps=1e-30)                      # [d_in]
            sigmas.append((lora.scale * (u @ lora.B) @ (lora.A @ v)).to(self.parameters()[0].device))
        return torch.stack(sigmas).mean()

    def norm(self) -> float:
        """Frobenius norm of the current round over all Linears together, sqrt(sum ||s * B @ A||^2)."""
        AAt, BtB = self._grams()
        scales = torch.tensor([lora.scale for lora in self.layers.values()], dtype=torch.float64)       # [M]
        return ((AAt * BtB).sum((1, 2)) * scales ** 2).sum().clamp(min=0).sqrt().item()

    @torch.no_grad()
    def singular_values(self) -> dict[str, Tensor]:
        """Of the current round's update s * B @ A of every Linear, by module name: [r] float64, largest first."""
        AAt, BtB = self._grams()                                                # [M, r, r]
        w, Q = torch.linalg.eigh(AAt)
        root = Q * w.clamp(min=0).sqrt()[:, None] @ Q.mT                        # [M, r, r]  square root of A A^T
        squares = torch.linalg.eigvalsh(root @ BtB @ root).flip(-1).clamp(min=0)                # [M, r]
        return {name: lora.scale * row.sqrt() for (name, lora), row in zip(self.layers.items(), squares)}

    # ---- files

    def save(self, path, rounds: list[int] | None = None, metadata: dict[str, str] | None = None) -> None:
        """Write folded rounds (default: all) to one safetensors file: whole, or not at all.

        Keys `{module}.{k}.A` [r, d_in] and `{module}.{k}.B` [d_out, r], float32, k counting from 0 in the file; the
        scale is in B, so the update is B @ A. Raises RuntimeError if nothing is folded or a tensor is not finite.
        """
        rounds = list(range(self.n_rounds)) if rounds is None else list(rounds)
        if any(not 0 <= i < self.n_rounds for i in rounds):
            raise ValueError(f"rounds={rounds}: this stack has {self.n_rounds} folded rounds, counted from 0")
        if not rounds:
            raise RuntimeError("no folded round to save: call fold() first")
        tensors = {f"{name}.{k}.{which}": tensor.cpu().contiguous() for name, lora in self.layers.items()
                   for k, i in enumerate(rounds) for which, tensor in zip("AB", lora.rounds[i])}
        broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
        if broken:
            raise RuntimeError(f"{path}: not written, {len(broken)} tensors are not finite, first {broken[0]}")
        write_whole(path, safetensors.torch.save(tensors, metadata))

    def load(self, *paths) -> None:
        """Append the rounds of each file, in order, to the history, gates 1; all files or none.

        Raises ValueError that names modules missing from a file, foreign to this model, or of another shape, and
        RuntimeError if the current round is already in training.
        """
        if any(lora.B.any() for lora in self.layers.values()):
            raise RuntimeError("load into a round in training would restart it: fold() or drop() first")
        self._append([pairs for path in paths for pairs in self._read(path)])

    def _read(self, path) -> list[dict[str, tuple[Tensor, Tensor]]]:
        found: dict[tuple[str, str], dict[str, Tensor]] = {}    # (k, module) -> {"A": ..., "B": ...}
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    name, k, which = key.rsplit(".", 2) if key.count(".") >= 2 else (key, "", "")
                    found.setdefault((k, name), {})[which] = file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
        ks = sorted({k for k, _ in found}, key=lambda k: (len(k), k))
        extra = sorted({name for _, name in found} - set(self.layers))
        if extra or not ks or ks != [str(i) for i in range(len(ks))]:
            raise ValueError(f"{path}: {len(extra)} modules that this model does not adapt {extra[:4]}, rounds {ks}; "
                             f"it adapts {len(self.layers)}, such as {next(iter(self.layers))}")
        rounds = []
        for k in ks:
            missing = [name for name in self.layers if set(found.get((k, name), ())) != {"A", "B"}]
            if missing:
                raise ValueError(f"{path}: round {k} lacks A and B of {len(missing)} adapted modules {missing[:4]}")
            pairs = {name: (found[k, name]["A"], found[k, name]["B"]) for name in self.layers}
            for name, (A, B) in pairs.items():
                lora = self.layers[name]
                if (A.dim(), B.dim()) != (2, 2) or len(A) != B.shape[1] \
                        or (A.shape[1], len(B)) != (lora.A.shape[1], len(lora.B)):
                    raise ValueError(f"{path}: {name} has A {list(A.shape)} and B {list(B.shape)}, here it takes "
                                     f"A [r, {lora.A.shape[1]}] and B [{len(lora.B)}, r]")
                if not (A.isfinite().all() and B.isfinite().all()):
                    raise ValueError(f"{path}: {name} of round {k} is not finite")
                pairs[name] = A.to(lora.A), B.to(lora.B)        # its device, float32
            rounds.append(pairs)
        return rounds

    def remove(self) -> None:
        """Unhook: the model is the base again, and this stack no longer acts on it."""
        for handle in self.handles:
            handle.remove()


def write_whole(path, content: bytes) -> None:
    """Write to a temporary file beside `path` and rename it: a reader sees the old file or the new one, never half."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)                       # still there only if something went wrong


# same in steer.py
def blocks(model) -> nn.ModuleList:
    """The decoder blocks, in order; block i's output is hidden_states[i + 1], except the last, which is normed there."""
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no decoder .layers: this architecture is not supported yet")
    return layers


def attach(model, *, r: int, alpha: float, layers: list[int], targets: list[str] | None = None, seed: int = 0) -> Stack:
    """Freeze the model and hook a LoRA onto each chosen nn.Linear; at first that changes nothing.

    layers: block numbers. targets: names, or ends of names such as "q_proj"; None = every Linear of those blocks.
    seed: where A starts from, together with the round and the module's place.
    Raises ValueError if a layer or a target is not there.
    """
    check_rank(r, alpha)
    found = blocks(model)
    if not layers or any(not 0 <= i < len(found) for i in layers):
        raise ValueError(f"layers={layers}: expected one or more of 0 to {len(found) - 1}")
    inside = {id(module) for i in layers for module in found[i].modules()}
    linears = {name: m for name, m in model.named_modules() if id(m) in inside and isinstance(m, nn.Linear)}
    if targets is not None:
        def hits(name, target):
            return name == target or name.endswith("." + target)
        lost = [t for t in targets if not any(hits(name, t) for name in linears)]
        if lost or not targets:
            raise ValueError(f"targets={targets}: {lost} match no nn.Linear in blocks {layers}; there are "
                             f"{sorted({name.rsplit('.', 1)[-1] for name in linears})}")
        linears = {name: m for name, m in linears.items() if any(hits(name, t) for t in targets)}
    if not linears:
        raise ValueError(f"blocks {layers} of {type(model).__name__} hold no nn.Linear to adapt")
    model.requires_grad_(False)
    return Stack(linears, r, alpha, seed)


if __name__ == "__main__":
    class Tiny(nn.Module):                                      # as much of a model as attach asks for
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(16, 16)])
        def get_decoder(self):
            return self

    rng, model = torch.Generator().manual_seed(0), Tiny()
    linear, x = model.layers[0], torch.randn(5, 16, generator=rng)              # x [5, 16]
    base, stack = linear(x), attach(model, r=4, alpha=8, layers=[0])
    delta = torch.zeros(16, 16)                                 # what two rounds should add to W
    for rnd in range(2):
        A, B = stack.parameters()
        B.data.normal_(generator=rng)                           # "training"
        delta += 8 / 4 * (B @ A).detach()
        stack.fold()
    with stack.gated(history=0, current=0):
        print("gates (0, 0) are the base, bit for bit:", torch.equal(linear(x), base))
    error = (linear(x) - F.linear(x, linear.weight + delta, linear.bias)).abs().max().item()
    print(f"two folded rounds against W + sum s B A: largest difference {error:.0e}")
