"""LoRA rounds behind gates: a stack of low-rank updates in which every round can be turned off again.

    y = W x  +  g_hist * sum_i g_i s_i B_i A_i x  +  g_now * s B A x        s = alpha / r

The sum runs over the folded rounds, A and B are the round in training. A term whose gate is 0 is skipped, so with all
gates at 0 the model is the base bit for bit. Nothing is ever written into W: in bfloat16 an update of a percent of the
weights would lose a fifth of itself to rounding. The layers are forward hooks, so module names stay as they are too.

    stack = attach(model, r=8, alpha=16, layers=[3, 4, 5])
    ... train stack.parameters() ...
    with stack.gated(history=1, current=0): ...                 # the model before this round
    stack.fold(); stack.save("rounds.safetensors")

What others can serve, written from a run folder of loop.py, loaded back and compared before it gets its name:

    python lora.py export RUN --to peft                         adapter_model.safetensors, adapter_config.json
    python lora.py export RUN --to merged                       a whole checkpoint, W + sum_i B_i A_i rounded once

Needs torch and safetensors; an export also transformers, to load the base. Adapts nn.Linear and GPT-2's Conv1D, a
Linear with its weight transposed. The experts of a mixture are left out, since they are 3-D parameters and not modules;
`stack.note` says so.

References
  LoRA: Hu et al. 2021, arXiv:2106.09685
  recipe: github.com/wassname/steer-heal-love
"""
import argparse
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Callable, NamedTuple

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

def sizes(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a Linear, also where its weight is packed to 4 bits or transposed; None for another module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (module.nx, module.nf) if type(module).__name__ == "Conv1D" else None


class LoRA(nn.Module):
    """The rounds of one Linear, in the shape of a forward hook. float32 whatever the base's dtype; cast on use."""

    def __init__(self, linear: nn.Module, r: int, scale: float):
        super().__init__()
        d_in, d_out = sizes(linear)
        new = dict(dtype=torch.float32, device=linear.weight.device)
        self.A = nn.Parameter(torch.zeros(r, d_in, **new))                      # [r, d_in]
        self.B = nn.Parameter(torch.zeros(d_out, r, **new))                     # [d_out, r]
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

    def forward(self, linear: nn.Module, args: tuple, y: Tensor) -> Tensor:
        x = args[0]                                                             # [..., d_in]
        if any(self.history):
            A, B = self.frozen(x.dtype)
            y = add_product(y, F.linear(x, A), B, 1.0)                          # [..., d_out]
        if self.current:
            y = add_product(y, F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype), self.current * self.scale)
        return y


def add_product(y: Tensor, z: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + scale * B z in one kernel, with no other temporary of y's size. y [..., d_out], z [..., r], B [d_out, r]."""
    return torch.addmm(y.reshape(-1, len(B)), z.reshape(-1, B.shape[1]), B.T, alpha=scale).view_as(y)


# ---- all of them -----------------------------------------------------------------------------------------------------

class Stack:
    """The adapted Linears of a model and the gates over their rounds. Made by `attach`."""

    def __init__(self, linears: dict[str, nn.Module], r: int, alpha: float, seed: int, note: str = ""):
        self.layers = {name: LoRA(linear, r, alpha / r) for name, linear in linears.items()}
        self.seed = seed
        self.note = note                                        # what attach left out, in words
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

    def concatenated(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The folded rounds as one pair per Linear, A [R, d_in] and B [d_out, R]: scale and gate are in B, the update is B @ A.

        float32 on the CPU; R is the same for every Linear, with zero rows where the rounds of one have a lower rank.
        Raises RuntimeError if no folded round has an open gate.
        """
        if not any(next(iter(self.layers.values())).history):
            raise RuntimeError("no folded round with an open gate: nothing to export")
        pairs = {name: lora.frozen(torch.float32) for name, lora in self.layers.items()}
        R = max(len(A) for A, _ in pairs.values())
        return {name: (F.pad(A, (0, 0, 0, R - len(A))).cpu(), F.pad(B, (0, R - B.shape[1])).cpu())
                for name, (A, B) in pairs.items()}

    def export_peft(self, folder, model, prompts: list[list[int]], *, rank: int | None = None, serving=None, **options) -> dict:
        """Write the folded rounds as a peft adapter: load it back, hold it against this stack on `prompts`, token ids.

        model: what this stack was attached to. rank: compress to it; "lost" in the result then has the relative Frobenius
        error for it and others. serving: the same checkpoint as the class that its config names, if `model` is of another.
        options: base and more, see `write_peft`. Raises ValueError for a rank that is not from 1 to that of all rounds.
        """
        proof, pairs, errors = witness(self, model, prompts), self.concatenated(), {}
        R = len(next(iter(pairs.values()))[0])
        if rank is not None:
            if not 1 <= rank <= R:
                raise ValueError(f"rank {rank}: the rounds have rank {R} in all, so expected 1 to {R}")
            parts = singular(pairs)
            pairs = compress(parts, rank)
            errors = {n: lost(parts, n) for n in sorted({rank, R, *(2 ** i for i in range(10) if 2 ** i < R)})}
        with self.gated(0, 0):
            check = write_peft(folder, renamed(pairs, model, serving or model), proof, serving or model,
                               exact=rank in (None, R), **options)
        return check | dict(lost=errors)

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
        if hasattr(os, "O_DIRECTORY"):                          # the new name survives a power cut too; not on Windows
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)                       # still there only if something went wrong


# same in steer.py
def blocks(model) -> nn.ModuleList:
    """The decoder blocks, in order; block i's output is hidden_states[i + 1], except the last, which is normed there."""
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", getattr(decoder, "h", None))        # GPT-2 and its kin say h
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no decoder .layers or .h: this architecture is not supported")
    return layers


def attach(model, *, r: int, alpha: float, layers: list[int], targets: list[str] | None = None, seed: int = 0) -> Stack:
    """Freeze the model and hook a LoRA onto each chosen nn.Linear (or Conv1D); at first that changes nothing.

    layers: block numbers. targets: names, or ends of names such as "q_proj"; None = every Linear of those blocks.
    seed: where A starts from, together with the round and the module's place.
    Raises ValueError if a layer or a target is not there.
    """
    check_rank(r, alpha)
    found = blocks(model)
    if not layers or any(not 0 <= i < len(found) for i in layers):
        raise ValueError(f"layers={layers}: expected one or more of 0 to {len(found) - 1}")
    inside = {id(module) for i in layers for module in found[i].modules()}
    linears = {name: m for name, m in model.named_modules() if id(m) in inside and sizes(m) and ".experts." not in name}
    experts = sorted({name for i in layers for name, p in found[i].named_parameters() if ".experts." in name and p.dim() == 3})
    note = f"not adapted: the experts ({', '.join(experts)}), which are 3-D parameters and not Linear" if experts else ""
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
    return Stack(linears, r, alpha, seed, note)


# ---- what others serve: each export is loaded back and compared before it gets its name -------------------------------

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)             # all that vLLM's --max-lora-rank takes


class Witness(NamedTuple):
    """What an export is held to: logits [T, V] float32 of the run's own model, and of the bare base, on each prompt."""
    prompts: list[list[int]]
    run: list[Tensor]
    base: list[Tensor]


@torch.no_grad()
def logits_of(model, prompts: list[list[int]]) -> list[Tensor]:
    """[T, V] float32 on the CPU for each prompt of token ids, one at a time: no padding that could differ."""
    return [model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().cpu() for ids in prompts]


def witness(stack: Stack, model, prompts: list[list[int]]) -> Witness:
    with stack.gated(0, 0):
        base = logits_of(model, prompts)
    history = next(iter(stack.layers.values())).history
    with stack.gated(history, 0):
        return Witness(prompts, logits_of(model, prompts), base)


def distance(a: list[Tensor], b: list[Tensor]) -> tuple[float, float]:
    """(largest |logit| difference, largest KL(a || b) in nats), over all positions of all prompts."""
    worst = []
    for x, y in zip(a, b):
        logp, logq = x.double().log_softmax(-1), y.double().log_softmax(-1)                     # [T, V] each
        worst.append(torch.stack([(x - y).abs().max().double(), (logp.exp() * (logp - logq)).sum(-1).max()]))
    return tuple(torch.stack(worst).amax(0).tolist())           # torch's max keeps a nan, Python's may drop it


def prove(proof: Witness, found: list[Tensor], dtype: torch.dtype, *, rounded: str, target: list[Tensor] | None = None) -> dict:
    """Hold what was loaded back against the run's own model; raises RuntimeError, with the numbers, if it is not that.

    found: logits of the loaded export. rounded: "update" if only the adapter was rounded to `dtype`, "weights" if the
    sum was. target: logits that the file should give, if they are not the run's own (a lower rank). Two conditions.
    (1) The largest |logit| difference is within a bound from the dtype: 4 roundings of what was rounded (the update's
    effect, or the logits themselves), and 64 float32 roundings of the logits for the order of the sums.
    (2) KL(run || export) is under half of KL(run || base): an export that does nothing fails, however loose (1) is.
    Returns {off, bound, logit, kl, effect_logit, effect_kl}: the difference of (1) and its bound, then how far the export is
    from the run's own model, and how far that is from its base.
    """
    logit, kl = distance(proof.run, found)
    effect_logit, effect_kl = distance(proof.run, proof.base)
    size = max(x.abs().max().item() for x in proof.run)
    bound = 4 * torch.finfo(dtype).eps * (size if rounded == "weights" else effect_logit) + 64 * torch.finfo(torch.float32).eps * size
    off = logit if target is None else distance(target, found)[0]                   # from what was to be written
    numbers = (f"largest |logit| difference {logit:.3g}, largest KL {kl:.3g} nats; "
               f"the run's own effect on the base is {effect_logit:.3g}, {effect_kl:.3g} nats")
    if not off <= bound:                                        # true for nan too
        raise RuntimeError(f"the export, loaded back, is off by {off:.3g}, over the bound of {bound:.3g} for {dtype}: {numbers}")
    if effect_logit > 0 and not kl < effect_kl / 2:
        raise RuntimeError(f"the export, loaded back, loses the run's effect (rounded away, or --rank too low): {numbers}")
    return dict(off=off, bound=bound, logit=logit, kl=kl, effect_logit=effect_logit, effect_kl=effect_kl)


def refuse_existing(folder) -> None:
    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise ValueError(f"{folder} is already there and not empty: take it away or choose another --out")


@contextmanager
def whole_folder(folder):
    """A folder under a temporary name beside `folder`, renamed at the end of the `with`; gone if that raises.

    Raises ValueError if `folder` is there and not empty."""
    refuse_existing(folder)
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rmdir()                                      # empty, see above
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)            # still there only if something went wrong


# ---- the peft adapter ------------------------------------------------------------------------------------------------

def singular(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """U [d_out, k], S [k], Vt [k, d_in] in float64 of each B @ A, from QR and an SVD of R x R: never of d_out x d_in."""
    parts = {}
    for name, (A, B) in pairs.items():
        (Qb, Rb), (Qa, Ra) = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().T)
        U, S, Vt = torch.linalg.svd(Rb @ Ra.T)
        k = len(S)
        parts[name] = Qb @ U[:, :k], S, Vt[:k] @ Qa.T
    return parts


def lost(parts: dict, rank: int) -> float:
    """Relative Frobenius error of the whole update, all Linears together, if each keeps `rank` singular values."""
    total = sum(S.square().sum() for _, S, _ in parts.values())
    rest = sum(S[rank:].square().sum() for _, S, _ in parts.values())
    return float((rest / total).sqrt()) if total > 0 else 0.0


def compress(parts: dict, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The nearest A [rank, d_in], B [d_out, rank] of each Linear, float32, the size shared evenly between the two."""
    pairs = {}
    for name, (U, S, Vt) in parts.items():
        root, gap = S[:rank].sqrt(), max(0, rank - len(S))
        A, B = root[:, None] * Vt[:rank], U[:, :rank] * root
        pairs[name] = F.pad(A, (0, 0, 0, gap)).float(), F.pad(B, (0, gap)).float()
    return pairs


def renamed(pairs: dict, ours, theirs) -> dict:
    """The pairs under the names that the same Linears have in another class of the same checkpoint."""
    def prefix(model):
        return next(name for name, module in model.named_modules() if module is blocks(model))
    before, after = prefix(ours), prefix(theirs)
    return {after + name.removeprefix(before): pair for name, pair in pairs.items()}


def write_peft(folder, pairs: dict[str, tuple[Tensor, Tensor]], proof: Witness, model, *, base: str, revision: str | None = None,
               dtype: torch.dtype = torch.float32, exact: bool = True, card: Callable[[dict], str] | None = None) -> dict:
    """Write a peft adapter without peft; returns what `prove` measured on it.

    pairs: float32, all of one rank R because vLLM and llama.cpp read no rank pattern; the scale is in B, so alpha = R.
    Their names are those of `model`, of the class that the base's config names: what matches no name is ignored by peft
    and vLLM without a word. model: that base, no gate open. base, revision: what peft and llama.cpp are told to load.
    exact: the pairs are the run's own, not a lower rank. card: the measured numbers -> README.md.
    Raises ValueError if `folder` is not free, RuntimeError as `prove`: then nothing is left.
    """
    R, target = len(next(iter(pairs.values()))[0]), None
    if not exact:
        with adapted(model, pairs):
            target = logits_of(model, proof.prompts)
    tensors = {f"base_model.model.{name}.lora_{which}.weight": tensor.to(dtype).contiguous()
               for name, pair in pairs.items() for which, tensor in zip("AB", pair)}
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise RuntimeError(f"{len(broken)} tensors are not finite in {dtype}, first {broken[0]}: choose another --dtype")
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, revision=revision, r=R, lora_alpha=R,
                  lora_dropout=0.0, bias="none", target_modules=sorted(pairs), inference_mode=True,
                  fan_in_fan_out=any(type(m).__name__ == "Conv1D" for name, m in model.named_modules() if name in pairs),
                  use_rslora=False, use_dora=False, modules_to_save=None, init_lora_weights=True, rank_pattern={},
                  alpha_pattern={}, layers_to_transform=None, layers_pattern=None, auto_mapping=None)
    with whole_folder(folder) as temporary:
        write_whole(temporary / "adapter_model.safetensors", safetensors.torch.save(tensors, {"format": "pt", "base_model": base}))
        write_whole(temporary / "adapter_config.json", json.dumps(config, indent=1).encode())
        with adapted(model, read_peft(temporary)):
            found = logits_of(model, proof.prompts)
        check = prove(proof, found, dtype, rounded="update", target=target) | dict(rank=R)
        if card:
            write_whole(temporary / "README.md", card(check).encode())
    return check


def read_peft(folder) -> dict[str, tuple[Tensor, Tensor]]:
    """A peft LoRA folder as {module: (A [R, d_in], alpha / R * B [d_out, R])}, float32; pure torch, no peft.

    Raises ValueError if a key is no LoRA weight, has no partner, or is not among the config's target modules.
    """
    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Tensor]] = {}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():
            match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
            if not match:
                raise ValueError(f"{folder}: {key} is not a LoRA weight of peft")
            found.setdefault(match[1], {})[match[2]] = file.get_tensor(key).float()
    if set(found) != set(config["target_modules"]) or any(set(pair) != {"A", "B"} for pair in found.values()):
        raise ValueError(f"{folder}: the file holds {len(found)} modules, the config names {len(config['target_modules'])} "
                         "others, or A or B of one is missing")
    bad = [name for name, pair in found.items() if not len(pair["A"]) == pair["B"].shape[1] == config["r"]]
    if bad:
        raise ValueError(f"{folder}: {bad[0]} is not of the config's rank {config['r']}")
    return {name: (pair["A"], config["lora_alpha"] / config["r"] * pair["B"]) for name, pair in found.items()}


@contextmanager
def adapted(model, pairs: dict[str, tuple[Tensor, Tensor]]):
    """Add B @ A @ x to each named Linear, inside the `with` only. Raises ValueError for a name that the model lacks."""
    modules, handles = dict(model.named_modules()), []

    def adder(A, B):
        def add(linear, args, y):
            x = args[0]                                                         # [..., d_in]
            return y + x @ A.to(x).T @ B.to(x).T                                # [..., d_out]
        return add
    try:
        for name, (A, B) in pairs.items():
            if name not in modules or sizes(modules[name]) != (A.shape[1], len(B)):
                raise ValueError(f"{type(model).__name__} has no nn.Linear {name} of {A.shape[1]} in, {len(B)} out")
            handles.append(modules[name].register_forward_hook(adder(A, B)))
        yield model
    finally:
        for handle in handles:
            handle.remove()


# ---- the merged checkpoint -------------------------------------------------------------------------------------------

FROM_BASE = ("generation_config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def write_merged(folder, pairs: dict[str, tuple[Tensor, Tensor]], proof: Witness, load: Callable, tok, *, dtype: str = "auto",
                 copies: Sequence[Path] = (), card: Callable[[dict], str] | None = None) -> dict:
    """Write a whole checkpoint that needs no adapter; returns what `prove` measured on it.

    load(dtype, path=None) -> the base, or the checkpoint at `path`, as the class that its config names. The sum W + B @ A
    is taken in float32 from the untouched base and rounded once; dtype "auto" is the base's own, tensor by tensor, so
    what no round touches stays as it is, bit for bit. pairs: named as in that class. copies: files that go along.
    Raises as `write_peft`, and RuntimeError if the chat template or the tokenizer came back different.
    """
    from transformers import AutoTokenizer
    with whole_folder(folder) as temporary:
        model = load(dtype)
        modules = dict(model.named_modules())
        for name, (A, B) in pairs.items():
            W = modules[name].weight.data                       # [d_out, d_in], of a Conv1D [d_in, d_out]
            W.copy_(W.float() + (B @ A if isinstance(modules[name], nn.Linear) else (B @ A).T))
        written = W.dtype
        model.save_pretrained(temporary, max_shard_size="5GB")
        tok.save_pretrained(temporary)
        for path in copies:
            shutil.copyfile(path, temporary / path.name)
        del model, modules, W                                   # two copies of the base are enough
        ours, theirs = (chat_ids(t, "Hello!") for t in (tok, AutoTokenizer.from_pretrained(temporary, trust_remote_code=False)))
        if ours != theirs:
            raise RuntimeError(f"the tokenizer, loaded back, gives {theirs} for a chat turn that was {ours}")
        check = prove(proof, logits_of(load("float32", temporary), proof.prompts), written, rounded="weights")
        if card:
            write_whole(temporary / "README.md", card(check).encode())
    return check


# ---- from a run folder -----------------------------------------------------------------------------------------------

def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """run.json and the events of a run folder, without a last line that a crash has cut off; ValueError if it is none."""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        return run, [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a run folder of loop.py: {error}") from None


def adapters(folder: Path, last: int | None = None) -> dict[int, Path]:
    """The adapter file of each accepted round of a run, by its number; up to round `last`, which must be one of them.

    Raises ValueError if there is none."""
    files = {int(path.parent.name): path for path in sorted(Path(folder).glob("rounds/[0-9]*/adapter.safetensors"))}
    if not files:
        raise ValueError(f"{folder} has no accepted round (no rounds/*/adapter.safetensors)")
    if last is not None and last not in files:
        raise ValueError(f"--round {last}: the accepted rounds of {folder} are {', '.join(map(str, files))}")
    return {rnd: path for rnd, path in files.items() if last is None or rnd <= last}


def total_rank(files) -> int:
    """The rank that the rounds of these files have together, for the Linear where it is largest."""
    ranks: dict[str, int] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in (key for key in file.keys() if key.endswith(".A")):
                name = key.rsplit(".", 2)[0]
                ranks[name] = ranks.get(name, 0) + file.get_slice(key).get_shape()[0]
    return max(ranks.values())


def restack(model, files: Sequence[Path]) -> Stack:
    """A stack on the modules that the files name, with their rounds loaded, whatever ranks and blocks these have."""
    with safe_open(files[0], framework="pt") as file:
        names = sorted({key.rsplit(".", 2)[0] for key in file.keys()})
    stack = attach(model, r=1, alpha=1, layers=list(range(len(blocks(model)))), targets=names)
    stack.load(*files)
    return stack


def is_local(name: str) -> bool:
    """Is this a path of somebody's disk? Hub ids are one or two plain words."""
    return Path(name).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".")


def base_name(name: str) -> str:
    """A model as a stranger may see it: a hub id as it is, a folder by its name only."""
    return PureWindowsPath(name.rstrip("/\\")).name if is_local(name) else name


def without_paths(argv: list[str], model: str) -> str:
    """The command to repeat a run, every path in it reduced to its last part."""
    def shown(token):
        flag, equals, value = token.rpartition("=") if token.startswith("-") else ("", "", token)
        is_path = re.match(r"[/~.\\]|\w:[/\\]", value) or (re.search(r"[/\\]", value) and not re.search(r"\s", value))
        value = base_name(value) if value == model else PureWindowsPath(value.rstrip("/\\")).name if is_path else value
        return flag + equals + shlex.quote("".join(c if c.isprintable() and c != "`" else " " for c in value))
    return " ".join(["python loop.py", *map(shown, argv)])


def inert(text: str) -> str:
    """Model text for Markdown: one line, no control or direction marks, what could mean something escaped."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]+", " ", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~:-])", r"\\\1", text)


def model_card(run: dict, events: list[dict], rounds: list[int], to: str, check: dict) -> str:
    """README.md of an export: what it is, what was measured, how to use and to repeat it. Model text is escaped."""
    options, at = run["options"], rounds[-1]
    base, is_peft = base_name(options["model"]), to == "peft"
    rows = [e for e in events if e["stage"] == "row" and
            (e["kind"] in ("base", "prompted") or e["round"] == rounds[0] and e["kind"] == "steered" or
             e["round"] in rounds and e["kind"] == "healed")]
    first, day = rows[0], rows[-1]
    front = {"base_model": base, "base_model_relation": "adapter" if is_peft else "finetune",
             "library_name": "peft" if is_peft else "transformers", "pipeline_tag": "text-generation",
             "tags": ["lora", "steering", "steer-heal-love"]}
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()), "---", "",
             f"# {inert(base)}, steered to {inert('a persona of its own' if options['pos'] else options['persona'])} and healed", "",
             f"{'A LoRA adapter for' if is_peft else 'A merged checkpoint of'} {inert(base)}: rounds {', '.join(map(str, rounds))} of "
             "steer, filter, heal, fold. A persona vector steered the model, its coherent answers were distilled into LoRA weights,",
             "and a barrier on the KL to the base kept out the incoherence that steering brings.", "", "## Persona pair", ""]
    lines += [f"- {sign}: {inert(text)}" for sign, texts in (("towards", persona_of(run)[0]), ("away from", persona_of(run)[1])) for text in texts]
    lines += ["", "## From base to final", "", f"Trait: nats of `{options['target']}` moved from the base on a forced-choice moral-foundations "
              f"probe, counted {'up' if options['direction'] > 0 else 'down'}. Coherence: probability on the allowed answers. Text: share of an "
              "answer's windows that the base could have written.", "", "| row | dose | trait, nats | off-target, nats | coherence | text |",
              "|" + "---|" * 6]
    lines += [f"| {inert(row['label'])} | {row['coeff']:.2f} | {row['trait']:+.3f} ± {row['trait_se']:.3f} | {row['shift']['off_target']:.3f} | "
              f"{row['coherence']:.4f} | {row['text']:.3f} |" for row in rows]
    lines += ["", "## From the diary", "", "Greedy answers to held-out prompts, before and after.", ""]
    for then, now in list(zip(first["diary"], day["diary"]))[:2]:
        lines += [f"> {inert(then['prompt'])}", "", f"- base: {inert(then['text'])}", f"- day {at}: {inert(now['text'])}", ""]
    use = (f'model = AutoModelForCausalLM.from_pretrained({json.dumps(base)})\nmodel = peft.PeftModel.from_pretrained(model, "FOLDER")'
           if is_peft else 'model = AutoModelForCausalLM.from_pretrained("FOLDER")')
    lines += ["## Use", "", "```python", use, "```", "", "```", serve_line(to, check, base, "FOLDER"), "```", "", "## Limits", "",
              f"- Loaded back after writing and compared with the run's own model: largest |logit| difference {check['logit']:.2g}, largest KL "
              f"{check['kl']:.2g} nats; the run's own effect on the base is {check['effect_logit']:.2g} and {check['effect_kl']:.2g} nats.",
              "- The trait was measured on one forced-choice probe and on prompts of one persona; other behaviour was not measured.",
              "- It was not tested for safety. It can say what its base can say, and leans where the persona leans.",
              "- The licence of the base model holds for it.", "", "## To repeat", "", "```",
              without_paths(run["argv"], options["model"]),
              f"python lora.py export RUN --to {to} --round {at}", "```", ""]
    return "\n".join(lines)


def persona_of(run: dict) -> tuple[list[str], list[str]]:
    """The texts of the wanted persona and of its opposite, as the run had them."""
    persona = run.get("persona", {"pos": [], "neg": []})
    return persona["pos"], persona["neg"]


def serve_line(to: str, check: dict, base: str, out) -> str:
    """How vLLM serves an export; its --max-lora-rank takes certain numbers only."""
    if to == "merged":
        return f"vllm serve {out}"
    allowed = next((n for n in VLLM_RANKS if n >= check["rank"]), None)
    if allowed is None:
        return f"(vLLM takes ranks up to {VLLM_RANKS[-1]}, this is {check['rank']}: export with --rank {VLLM_RANKS[-1]} or less, or merged)"
    return f"vllm serve {base} --enable-lora --max-lora-rank {allowed} --lora-modules healed={out}"


def chat_ids(tok, user: str, answer: str = "") -> list[int]:
    """One user turn and an answer as ids; the template wrote the BOS, so the tokenizer must not add another."""
    text = tok.apply_chat_template([{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True) + answer
    return tok(text, add_special_tokens=False)["input_ids"]


def export(folder, to: str, *, rank: int | None = None, last: int | None = None, out=None, dtype: str = "auto", base: str = "") -> dict:
    """Export the accepted rounds of a run, up to `last`; prints what was measured and how to serve it, returns the measures.

    base: where the base is, if not where the run had it. The comparison is in float32 on the CPU, on four held-out prompts
    with the last day's own answers. Raises ValueError for bad input, and RuntimeError if what was written, loaded back,
    is not the run's model: then nothing is left.
    """
    folder, out = Path(folder), Path(out or Path(folder) / to)
    run, events = read_run(folder)
    options, files = run["options"], adapters(folder, last)
    if to == "merged" and rank is not None:
        raise ValueError("--rank is for --to peft: a merged checkpoint has no rank")
    total = total_rank(files.values())
    if rank is not None and not 1 <= rank <= total:
        raise ValueError(f"--rank {rank}: the rounds have rank {total} in all, so expected 1 to {total}")
    refuse_existing(out)
    import transformers                                         # slow: not for --help or a wrong argument
    pocket = Path(__file__).resolve().parent / "pocket"
    where, revision = str(base or (pocket if options["model"] == "pocket" else options["model"])), options["revision"] or "main"

    def fetch(auto, **more):
        try:
            return auto.from_pretrained(where, revision=revision, trust_remote_code=False, **more)
        except (OSError, ValueError) as error:
            raise ValueError(f"base model {where!r} could not be loaded: {str(error).splitlines()[0]} If it has moved: --base DIR") from None
    config = fetch(transformers.AutoConfig)
    if to == "merged" and getattr(config, "quantization_config", None):
        raise ValueError(f"{options['model']} is quantised: W + B @ A would have to be quantised again, which loses the update; "
                         "use --to peft, or merge into its unquantised original with --base")
    named = (config.architectures or [""])[0]                   # the class whose names servers use
    kind = getattr(transformers, named, None) if named.endswith("ForConditionalGeneration") else None     # as loop.py loads it
    tok, model = fetch(transformers.AutoTokenizer), fetch(kind or transformers.AutoModelForCausalLM, dtype=torch.float32,
                                                          use_safetensors=True).eval()
    serving = getattr(transformers, named, type(model))

    def load(dtype, path=None):
        model, info = serving.from_pretrained(path or where, dtype=dtype, use_safetensors=True, trust_remote_code=False,
                                              output_loading_info=True, **{} if path else {"revision": revision})
        if info["missing_keys"]:
            raise RuntimeError(f"{path or where} lacks {len(info['missing_keys'])} tensors, such as {sorted(info['missing_keys'])[0]}")
        return model.eval()

    def card(check):
        return model_card(run, events, list(files), to, check)
    stack = restack(model, list(files.values()))
    day = [e for e in events if e["stage"] == "row" and e["kind"] == "healed" and e["round"] == max(files)][-1]
    prompts = [chat_ids(tok, entry["prompt"], entry["text"]) for entry in day["diary"][:4]]
    if to == "peft":
        theirs = model if type(model) is serving else load("float32")
        check = stack.export_peft(out, model, prompts, serving=theirs, base=base_name(options["model"]), rank=rank, card=card,
                                  revision=getattr(config, "_commit_hash", None), dtype=DTYPES["float32" if dtype == "auto" else dtype])
    else:
        proof, pairs = witness(stack, model, prompts), stack.concatenated()
        with torch.device("meta"):
            pairs = renamed(pairs, model, serving(config))
        del model, stack
        found = (transformers.utils.cached_file(where, name, revision=revision, _raise_exceptions_for_missing_entries=False,
                                                _raise_exceptions_for_connection_errors=False) for name in FROM_BASE)
        check = write_merged(out, pairs, proof, load, tok, dtype=dtype, copies=[Path(path) for path in found if path], card=card)
    for n, error in check.get("lost", {}).items():
        print(f"rank {n:4d}  relative Frobenius error {error:.2e}{'  <- written' if n == check['rank'] else ''}")
    size = sum(path.stat().st_size for path in out.iterdir()) / 2 ** 20
    rounds = ", ".join(map(str, files)) + (f", rank {check['rank']}" if to == "peft" else "")
    print(f"wrote    {out}: rounds {rounds}, {size:.1f} MiB\nproved   loaded back: off by {check['off']:.2g} in the largest |logit| (bound {check['bound']:.2g})\n"
          f"         against the run's own model: largest |logit| difference {check['logit']:.2g}, largest KL {check['kl']:.2g} nats\n"
          f"         the run's own effect on the base: {check['effect_logit']:.2g}, {check['effect_kl']:.2g} nats"
          f"{'' if check['effect_logit'] else ': none at all, so that is what was exported'}")
    print(f"serve    {serve_line(to, check, base_name(options['model']), out)}")
    return check


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="lora.py", description="Export the accepted rounds of a run; without arguments: a demo.")
    parser.add_argument("command", choices=["export"])
    parser.add_argument("run", metavar="RUN", help="run folder of loop.py")
    parser.add_argument("--to", required=True, choices=["peft", "merged"], help="an adapter, or a whole checkpoint")
    parser.add_argument("--rank", type=int, help="compress the adapter to this rank; prints the error at this and other ranks")
    parser.add_argument("--round", type=int, help="export the accepted rounds up to this one; default: all")
    parser.add_argument("--out", help="folder to write; default: RUN/peft or RUN/merged")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto = float32 for peft, the base's own for merged")
    parser.add_argument("--base", default="", help="where the base model is, if not where the run had it")
    args = parser.parse_args(argv)
    try:
        export(args.run, args.to, rank=args.rank, last=args.round, out=args.out, dtype=args.dtype, base=args.base)
    except (ValueError, OSError) as error:
        print(f"lora.py: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"lora.py: {error}\nlora.py: nothing was written", file=sys.stderr)
        return 1
    return 0


def demo() -> None:
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


if __name__ == "__main__":
    if not sys.argv[1:]:
        demo()
    else:
        sys.exit(main(sys.argv[1:]))
