"""Contrast: train an adapter with a dial on the hidden states of pairs, without a single label.

    s(c) = <h(c) - h(0), d>, over the base's <h+ - h-, d>       h+, h-: one unfinished answer, two personas
    loss = separation(s(1), s(-1)) + coherence(c = 1, -1) + monotone

    separation   linear: -(s(1) - s(-1)) ;   sigmoid: -log sig(b (s(1) - s(0))) - log sig(b (s(0) - s(-1)))
    coherence    logp: mean_t 75 log1p(relu(l_base - l - .2)) ;   rmse: lam relu(D - tau), heal.py's barrier
    monotone     the gap l+ - l- of the answer's log-probs rises at c = 1 and falls at c = -1, by .1 at least

d is fixed: the base's mean of h+ - h- (or its first principal component), projected on the left singular
vectors of the weight that writes to the block which is read. Three forwards a step: c = 0 without a
gradient, then both signs in one batch. The base is frozen, and checked to be what it was at the end.

h is read at the slot where the answer begins, since that is where it is decided; the notes read its last
tokens (at="end"). Their s is of h+(c) - h-(c) (against="pair"), which grows as well if a persona that is
there is heard louder, and says nothing of a model that has none: it cannot see a shift that both share.

Needs torch, steer.py, heal.py, lora.py, dial.py, pairs.py and dose.py; trains whatever dial.py can turn.
References
  contrastive hidden-state training of a dial: Clark 2026, AntiPaSTO, arXiv:2601.07473
  contrast pairs that differ in a persona: Zou et al. 2023, Representation Engineering, arXiv:2310.01405
"""

from dataclasses import dataclass
from typing import Callable, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import heal
import lora
import steer
from innerpissa.dial import Dialed, weight_of
from innerpissa.dose import symmetry_of
from innerpissa.pairs import Pair, Seen, both_sides, check_pairs, look
from lora import check_ranges, opt

SLACK, STEEP = 0.2, 75.0    # the log-prob barrier: nats that are free, and its weight
MARGIN = 0.1                # of the monotone term (nats per token)
LAM = 5.0                   # of the rmse barrier, as heal.py's default
CLIP = 1.0                  # largest gradient norm


@dataclass(frozen=True)
class ContrastConfig:
    """contrast: the loss on hidden states"""
    read: float = opt(0.75, "depth of the block whose states are read (share of the number of blocks)", 0, 1)
    n_read: int = opt(1, "tokens that are read, up to there", 1, 1e3)
    at: Literal["slot", "end"] = opt("slot", "read where the answer begins, or its last tokens")
    axis: Literal["mean", "pca"] = opt("mean", "d: mean or first principal component of h+ - h-")
    space: Literal["S", "activation"] = opt("S", "where d lives: in the span of the weight's U, or anywhere")
    separation: Literal["linear", "sigmoid"] = opt("linear", "how s becomes a loss")
    against: Literal["pair", "base"] = opt("base", "s from h+ - h-, or from what both moved by")
    barrier: Literal["logp", "rmse", "none"] = opt("rmse", "coherence: the notes', ours, or none")
    tau: float | None = opt(None, "rmse barrier: free nats; default: the two personas' distance", 0, 1e6)
    beta: float = opt(1.0, "steepness of the sigmoid (per base separation)", 0, 1e6)
    monotone: float = opt(1.0, "weight of the monotone term", 0, 1e6)
    lr: float = opt(6e-3, "peak learning rate: linear warm-up, then cosine to 0", 1e-12, 10)
    epochs: int = opt(4, "passes over the training pairs", 1, 1e4)
    batch: int = opt(8, "pairs per step", 1, 1e6)

    def __post_init__(self):
        check_ranges(self)


def block_of(model, depth: float) -> int:
    n_blocks = len(steer.blocks(model))
    return min(int(depth * n_blocks), n_blocks - 1)


def write_basis(model, block: int, r: int) -> Tensor:
    """U [d, r] of the last weight of a block that writes to the residual stream, its r largest directions."""
    width = model.config.get_text_config().hidden_size
    writers = [m for m in steer.blocks(model)[block].modules() if (lora.sizes(m) or (0, 0))[1] == width]
    if not writers:
        raise ValueError(f"block {block} has no Linear that writes to the stream: take space=activation")
    return torch.linalg.svd(weight_of(writers[-1]), full_matrices=False)[0][:, :r]


# ---- the loss --------------------------------------------------------------------------------------------

class Loss:
    """The three terms for one model. d, the base's separation and tau are fitted on the training pairs."""

    def __init__(self, adapter: Dialed, pairs: list[Pair], cfg: ContrastConfig, *, pad_id=0, r=32):
        self.adapter, self.model, self.cfg, self.pad_id = adapter, adapter.model, cfg, pad_id
        self.block = block_of(self.model, cfg.read)
        with torch.no_grad(), adapter.dialed(0.0):
            seen = [self.look(pairs[i:i + 16]) for i in range(0, len(pairs), 16)]
            moved = torch.cat([(p - q).mean(1) for x in seen for p, q in [x.h.chunk(2)]])       # [n, d]
            d = moved.mean(0)                                                                   # [d]
            if cfg.axis == "pca":
                top = torch.linalg.svd(moved - d, full_matrices=False)[2][0]                    # [d]
                d = top * torch.sign(top @ d)
            if cfg.space == "S":
                U = write_basis(self.model, self.block, r).to(d)                                # [d, r]
                d = U @ (U.T @ d)
            if not (d.isfinite().all() and d.norm() > 1e-6 * moved.norm(dim=1).mean() > 0):
                raise ValueError(f"the difference of the two personas at block {self.block} is zero or not "
                                 "finite: make their texts differ, or load the model in float32")
            self.d = d / d.norm()                                                               # [d]
            self.unit = (moved @ self.d).mean()             # the base's separation: s is in units of it
            self.tau = cfg.tau
            if cfg.barrier == "rmse" and cfg.tau is None:
                self.tau = torch.cat([self.divergence(p, q) for x in seen
                                      for p, q in [zip(*(t.chunk(2) for t in x))]
                                      for p, q in [(Seen(*p), Seen(*q))]]).mean().item()

    def look(self, pairs: list[Pair], n_times: int = 1) -> Seen:
        rows, n = both_sides(pairs)
        return look(self.model, rows * n_times, n * n_times, self.block, self.cfg.n_read, self.pad_id,
                    self.cfg.at)

    def s(self, seen: Seen, base: Seen) -> Tensor:
        """Separation of each pair in units of the base's mean, [b]."""
        pos, neg = ((x.mean(1) @ self.d) for x in seen.h.chunk(2))                              # [b] each
        if self.cfg.against == "base":
            was = base.h.mean(1) @ self.d                                                       # [2 b]
            return (torch.cat([pos, neg]) - was).view(2, -1).mean(0) / self.unit                # [b]
        return (pos - neg) / self.unit                                                          # [b]

    @staticmethod
    def divergence(seen: Seen, base: Seen) -> Tensor:
        """heal.py's D of each row's answer, rms over positions of KL(student || base), [B] nats."""
        return torch.stack([heal.aggregate(heal.reverse_kl(x[m], y[m]), "rmse")
                            for x, y, m in zip(seen.logits, base.logits, seen.mask)])           # [B]

    def coherence(self, seen: Seen, base: Seen) -> Tensor:
        if self.cfg.barrier == "logp":
            over = torch.relu(base.logp - seen.logp - SLACK)                                    # [B, K] nats
            return (STEEP * torch.log1p(over) * seen.mask).sum(1).div(seen.mask.sum(1)).mean()  # []
        if self.cfg.barrier == "rmse":
            return LAM * torch.relu(self.divergence(seen, base) - self.tau).mean()              # []
        return seen.logp.sum() * 0

    def terms(self, pairs: list[Pair]) -> dict[str, Tensor]:
        """The three terms over a batch, each [], and the mean s at c = 1 and -1."""
        b = len(pairs)
        with torch.no_grad(), self.adapter.dialed(0.0):
            base = self.look(pairs)                                                             # 2 b rows
        signs = torch.tensor([1.0, -1.0], device=base.h.device)                                 # [2]
        with self.adapter.dialed(signs.repeat_interleave(2 * b)):
            both = self.look(pairs, 2)                                                          # 4 b rows
        plus, minus = (Seen(*x) for x in zip(*(t.chunk(2) for t in both)))
        s_plus, s_minus, s_base = (self.s(x, base) for x in (plus, minus, base))                # [b] each
        if self.cfg.separation == "linear":
            separation = (s_minus - s_plus).mean()                                              # []
        else:
            gains = s_plus - s_base, s_base - s_minus                                           # [b] each
            separation = -sum(F.logsigmoid(self.cfg.beta * x).mean() for x in gains)            # []
        gaps = [p - q for x in (plus, base, minus) for p, q in [x.mean_logp().chunk(2)]]        # [b] each
        rises = gaps[0] - gaps[1], gaps[1] - gaps[2]                                            # [b] each
        monotone = torch.stack([sum(torch.relu(MARGIN - sign * x).mean() for x in rises) for sign in (1, -1)])
        return dict(separation=separation, coherence=self.coherence(plus, base) + self.coherence(minus, base),
                    monotone=self.cfg.monotone * monotone.min(), plus=s_plus.mean(), minus=s_minus.mean())

    @torch.no_grad()
    def held(self, pairs: list[Pair]) -> dict[str, float]:
        """Means of `terms` over pairs, none of them trained on here, with the base's s."""
        parts = [self.terms(pairs[i:i + 16]) for i in range(0, len(pairs), 16)]
        weight = [len(pairs[i:i + 16]) / len(pairs) for i in range(0, len(pairs), 16)]
        return {k: sum(w * part[k].item() for w, part in zip(weight, parts)) for k in parts[0]}


# ---- training --------------------------------------------------------------------------------------------

def contrast(adapter: Dialed, pairs: list[Pair], cfg: ContrastConfig, *, seed: int = 0, pad_id: int = 0,
             r: int = 32, loss: Callable | None = None, log: Callable | None = None) -> dict:
    """Train the adapter in place; 15% of the pairs are held out. r: directions of space="S".

    loss: terms of another kind, loss(pairs) -> {name: []}, with the same loop (the rivals'). log: called with
    each step's record. Which sign is plus is settled once, on training pairs, after training.
    Returns {steps, skipped, held, symmetry, n_train, n_val, flipped, block}. Raises ValueError for bad
    pairs or a zero difference before any step, RuntimeError after three steps in a row without finite
    numbers, or if the base is not bit for bit what it was.
    """
    check_pairs(pairs, cfg.n_read)
    params, model, rng = adapter.parameters(), adapter.model, torch.Generator().manual_seed(seed)
    model.eval()
    order = torch.randperm(len(pairs), generator=rng).tolist()
    n_val = max(1, round(heal.VAL_SHARE * len(pairs)))
    val, train = ([pairs[i] for i in some] for some in (order[:n_val], order[n_val:]))
    judge = Loss(adapter, train, cfg, pad_id=pad_id, r=r)
    terms = loss or judge.terms
    with torch.no_grad():
        before = judge.look(val[:4]).logits
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    orders = [torch.randperm(len(train), generator=rng).tolist() for _ in range(cfg.epochs)]
    batches = [[train[i] for i in some[at:at + cfg.batch]] for some in orders
               for at in range(0, len(train), cfg.batch)]
    steps, skipped, bad_in_a_row = [], [], 0
    for step, batch in enumerate(batches):
        # ---- one optimiser step ----------------------------------------------------------------------------
        lr = optimizer.param_groups[0]["lr"] = cfg.lr * heal.lr_factor(step, len(batches))
        parts = terms(batch)
        total = sum(v for k, v in parts.items() if k not in ("plus", "minus"))
        total.backward()
        gnorm = torch.nn.utils.clip_grad_norm_(params, CLIP)
        is_finite = bool(torch.stack([total.detach(), gnorm]).isfinite().all())
        if is_finite:
            optimizer.step()
        optimizer.zero_grad()
        # ----------------------------------------------------------------------------------------------------
        bad_in_a_row = 0 if is_finite else bad_in_a_row + 1
        if bad_in_a_row == 3 or (not is_finite and not steps and step == len(batches) - 1):
            raise RuntimeError(f"step {step}: {bad_in_a_row} steps in a row with no finite loss or gradient "
                               f"({total:.3g}, {gnorm:.3g}); lower lr {cfg.lr}")
        if not is_finite:
            skipped.append(step)
            continue
        steps.append(dict(step=step, lr=lr, gnorm=gnorm.item(), **{k: v.item() for k, v in parts.items()}))
        if log:
            log(steps[-1])

    ends = judge.held(train[:32])
    flipped = ends["plus"] < ends["minus"]
    if flipped:
        adapter.flip()
    with torch.no_grad():
        if not torch.equal(judge.look(val[:4]).logits, before):
            raise RuntimeError("at c = 0 the model is not what it was: the base was written to")
    held = judge.held(val)
    zero = 0.0 if cfg.against == "base" else 1.0            # the base's own s
    return dict(steps=steps, skipped=skipped, held=held, n_train=len(train), n_val=len(val), flipped=flipped,
                symmetry=symmetry_of(held["plus"] - zero, held["minus"] - zero), block=judge.block)
