"""Extract: one vector per module from contrastive pairs, by the field's methods, at any module's output.

    mean            v = mean(h+ - h-)                               h: the module's output at one token
    pca_diff        first principal component of centred h+ - h- ;  _weighted: rows by softmax of log p
    svd             top right singular vector of the centred gradients G [2n, d]
    fisher_regK     v = (F + 10^-K I)^-1 mean(G),  F = G^T G / m;  + _cov, _emp, _pos, _neg, _dual, _diff

G are gradients of  -|h+ - h-| + 1e4 relu(.99 l - log p)^2  (h at the block that is read, l = log p+ held
fixed) at one token of each module's output: the slot where the answer begins, or the answer's last. _cov
centres F; _emp weights rows by 1 / |gradient at the loss's input|^2; _pos and _neg take one side's rows,
_dual is the mean of both sides' vectors, _diff their difference. The last token predicts no token of the
answer, so there the second term has no gradient. The solve is m x m (Woodbury), never d x d. Every vector
gets the length of the mean difference, so that a dose of 1 means the same for all of them; its sign is that
of moving from neg to pos.

Needs torch, steer.py and pairs.py. What comes out for a block goes into `steer.steered`.
References
  mean difference: Rimsky et al. 2023, arXiv:2312.06681;  PCA: Zou et al. 2023, arXiv:2310.01405
  rows by the gradient at the loss's input: Wu et al. 2024, Improved Empirical Fisher, arXiv:2406.06420
"""

import re
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

import steer
from innerpissa.pairs import Pair, both_sides, check_pairs, look

KINDS = {"block": (), "mlp": ("mlp", "feed_forward", "block_sparse_moe"), "up": ("up_proj", "c_fc", "fc1"),
         "gate": ("gate_proj",), "down": ("down_proj", "fc2"), "q": ("q_proj",), "k": ("k_proj",),
         "v": ("v_proj",), "o": ("o_proj", "out_proj", "attn.c_proj")}
KEEP, WEIGHT = 0.99, 1e4    # of the gradient's second term: log p+ should not fall
METHODS = ("random", "mean", "pca_diff", "pca_diff_weighted", "svd", "fisher_reg2", "fisher_reg5",
           "fisher_reg2_cov", "fisher_reg2_emp", "fisher_reg2_pos", "fisher_reg2_neg", "fisher_reg2_dual",
           "fisher_reg2_diff")


def places(model, kind: str, layers: list[int]) -> list[int | str]:
    """The modules of a kind in these blocks: block numbers for "block", else names; ValueError if none."""
    if kind not in KINDS:
        raise ValueError(f"module {kind!r}: expected one of {', '.join(KINDS)}")
    if kind == "block":
        return list(layers)
    found, names = [], {id(m): name for name, m in model.named_modules()}
    for i in layers:
        inside = [names[id(m)] for m in steer.blocks(model)[i].modules()]
        hits = [name for name in inside if name.endswith(tuple("." + end for end in KINDS[kind]))]
        if not hits:
            last = sorted({name.rsplit(".", 1)[-1] for name in inside})
            raise ValueError(f"module {kind!r} matches nothing in block {i}; there are {', '.join(last)}")
        found.append(hits[0])
    return found


@contextmanager
def hooked_at(model, hooks: dict):
    """steer.hooked by module names as well: hook(output) -> new output or None, in the `with` only."""
    def wrap(hook):
        return lambda module, args, out: hook(out)          # a named module returns one tensor
    handles = []
    try:
        for name in (k for k in hooks if isinstance(k, str)):
            handles.append(model.get_submodule(name).register_forward_hook(wrap(hooks[name])))
        with steer.hooked(model, {k: hook for k, hook in hooks.items() if not isinstance(k, str)}):
            yield model
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Reading:
    """What the methods need of n pairs: per place, states and gradients; per pair, log-probs."""
    h: dict[int | str, Tensor]   # [2, n, d] float32: [0] under pos, [1] under neg
    g: dict[int | str, Tensor]   # [2, n, d] float32: gradients of the loss
    at_loss: Tensor              # [2, n]    norm of the gradient at the loss's input
    logp: Tensor                 # [2, n]    nats per token of the answer


def read(model, pairs: list[Pair], where: list, *, block: int, at="slot", pad_id=0, batch=16) -> Reading:
    """One forward and one backward over all pairs. block: where the loss reads its states.

    Rows of a batch do not mix, so the gradient of the sum is each row's own. ValueError if a pair is bad.
    """
    check_pairs(pairs, 1)
    h, g, at_loss, logp = {k: [] for k in where}, {k: [] for k in where}, [], []
    for start in range(0, len(pairs), batch):
        some, kept = pairs[start:start + batch], {}
        rows = torch.arange(2 * len(some))                                      # [2 b]
        back = -1 - torch.tensor([p.n for p in some] * 2) * (at == "slot")      # [2 b]  columns read

        def keep(place):
            def hook(out):
                out.retain_grad()
                kept[place] = out
            return hook
        leaf = model.get_input_embeddings().register_forward_hook(lambda _, args, out: out.requires_grad_())
        try:
            with torch.enable_grad(), hooked_at(model, {k: keep(k) for k in where}):
                seen = look(model, *both_sides(some), block, 1, pad_id, at)
                seen.h.retain_grad()
                pos, neg = seen.h[:, 0].chunk(2)                                # [b, d] each
                l_pos = seen.mean_logp()[:len(some)]                            # [b]
                drop = torch.relu(KEEP * l_pos.detach() - l_pos)                # [b]  positive, as l < 0
                loss = -(pos - neg).norm(dim=1).sum() + WEIGHT * drop.square().sum()
                loss.backward()
        finally:
            leaf.remove()
        zero = torch.zeros(())
        for k in where:                                     # a module after the loss has no gradient
            h[k].append(kept[k].detach()[rows, back].float().view(2, len(some), -1).cpu())
            grad = kept[k].grad if kept[k].grad is not None else zero.expand(kept[k].shape)
            g[k].append(grad[rows, back].float().view(2, len(some), -1).cpu())
        at_loss.append(seen.h.grad[:, 0].norm(dim=1).view(2, -1).cpu())
        logp.append(seen.mean_logp().detach().view(2, -1).cpu())
    return Reading({k: torch.cat(x, 1) for k, x in h.items()}, {k: torch.cat(x, 1) for k, x in g.items()},
                   torch.cat(at_loss, 1), torch.cat(logp, 1))


# ---- the methods -----------------------------------------------------------------------------------------

def damped_solve(G: Tensor, b: Tensor, damp: float, weight: Tensor | None = None) -> Tensor:
    """(G^T diag(w) G / m + damp I)^-1 b by Woodbury. G: [m, d], b: [d], w: [m], 1 unless given. float64."""
    G, b = G.double(), b.double()
    G = G if weight is None else G * weight.double().sqrt()[:, None]            # [m, d]
    small = G @ G.T + damp * len(G) * torch.eye(len(G), dtype=G.dtype)          # [m, m]
    return (b - G.T @ torch.linalg.solve(small, G @ b)) / damp                  # [d]


def fisher(g: Tensor, at_loss: Tensor, K: float, options: set[str]) -> Tensor:
    """The fisher family. g: [2, n, d]; at_loss: [2, n]. Returns [d] float64, signed from neg to pos."""
    toward = (g[1] - g[0]).double().mean(0)                                  # [d]  the loss falls towards pos
    def one(rows, size):                                    # [m, d], [m] -> [d]
        w = None
        if "emp" in options:
            w = 1 / size.square().clamp(min=1e-12)
            w = w / w.mean()
        b = rows.mean(0) if w is None else (w[:, None] * rows).mean(0)          # [d]
        v = damped_solve(rows - rows.mean(0) if "cov" in options else rows, b, 10.0 ** -K, w)
        return v if toward @ v >= 0 else -v
    if sides := options & {"pos", "neg", "dual", "diff"}:
        v_pos, v_neg = one(g[0], at_loss[0]), one(g[1], at_loss[1])             # [d] each
        return {"pos": v_pos, "neg": v_neg, "dual": (v_pos + v_neg) / 2, "diff": v_pos - v_neg}[min(sides)]
    return one(g.flatten(0, 1), at_loss.flatten())                              # rows of both sides


def extract(reading: Reading, place: int | str, method: str, *, seed: int = 0) -> Tensor:
    """The vector [d] float32 of one method at one place, as long as the mean difference there.

    Raises ValueError for an unknown method, a zero difference, or a gradient method where no gradient
    arrives.
    """
    h, g = reading.h[place], reading.g[place]
    moved = h[0] - h[1]                                                         # [n, d]
    mean, toward = moved.mean(0), (g[1] - g[0]).mean(0)                         # [d] each
    parts = re.fullmatch(r"fisher_reg(\d+)((?:_(?:cov|emp|pos|neg|dual|diff))*)", method)
    if not (mean.isfinite().all() and mean.any()):
        raise ValueError(f"at {place} the two sides have the same states, or not finite ones: no vector")
    if (parts or method == "svd") and not g.any():
        raise ValueError(f"at {place} no gradient of the loss arrives: take a module before the block read")
    if method == "random":
        v = torch.randn(len(mean), generator=torch.Generator().manual_seed(seed))
    elif method == "mean":
        v = mean
    elif method in ("pca_diff", "pca_diff_weighted"):
        w = reading.logp.mean(0) * method.endswith("weighted")                  # [n]
        w = w.softmax(0)                                                        # [n]  1 / n without weights
        centred = (moved - (w[:, None] * moved).sum(0)) * w.sqrt()[:, None]     # [n, d]
        v = torch.linalg.svd(centred, full_matrices=False)[2][0]                # [d]
        v = v if v @ mean >= 0 else -v
    elif method == "svd":
        rows = g.flatten(0, 1)                                                  # [2n, d]
        v = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][0]    # [d]
        v = v if toward @ v >= 0 else -v
    elif parts:
        v = fisher(g, reading.at_loss, float(parts[1]), set(parts[2].split("_")) - {""})
    else:
        raise ValueError(f"method {method!r}: expected {', '.join(METHODS[:5])} or fisher_regK with _cov, "
                         "_emp, _pos, _neg, _dual or _diff")
    if not v.norm() > 1e-9:
        raise ValueError(f"{method} at {place} is a vector of zeros: both sides give the same one")
    return (v / v.norm() * mean.norm()).float()
