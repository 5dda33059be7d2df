"""Dose: how a model's Yes against No answers a dial, as one score that noise does not earn.

    x = sign(c) log(1 + |c|)      y = log p(Yes) - log p(No) at the answer slot, without sampling
    score = |slope| r2 valid^2    slope, r2: least squares of y on x within items;  valid: share of sane slots

All doses of a method are rows of one batch. What is chosen (a scale, a sign, a method) is chosen on the odd
items and scored on the even ones; the null permutes the doses within each item.

Needs torch and steer.py. The score's form is the field notes'; items, halves and the null are ours.
"""
import math
from typing import Callable, NamedTuple

import torch
from torch import Tensor

import steer

DOSES = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)


class Score(NamedTuple):
    score: float
    slope: float                 # nats per unit of x
    r2: float                    # of the within-item variance
    valid: float                 # share
    p: float                     # of the slope, t
    p_perm: float                # of |slope|, doses permuted within items
    symmetry: float              # 1: the moves at the ends cancel; 0: one-sided


def bend(c) -> Tensor:
    """x of a dose: linear near 0, logarithmic far out. c: [k] -> [k]."""
    c = torch.as_tensor(c, dtype=torch.float64)
    return c.sign() * c.abs().log1p()


def t_test(t: float, df: int) -> float:
    """Two-sided p of Student's t: the share of cos^(df - 1) beyond atan(t / sqrt(df))."""
    if not math.isfinite(t) or df < 1:
        return 0.0 if abs(t) == math.inf else 1.0
    start = math.atan(abs(t) / math.sqrt(df))
    tail, whole = (torch.linspace(a, math.pi / 2, 20001, dtype=torch.float64) for a in (start, 0.0))
    tail, whole = (torch.trapezoid(angle.cos() ** (df - 1), angle) for angle in (tail, whole))
    return (tail / whole).item()


@torch.no_grad()
def log_odds(model, tok, prompts: list[str], dialed: Callable, doses, *, systems=None, options=("Yes", "No"),
             base: tuple[Tensor, Tensor] | None = None, batch: int = 256) -> tuple[Tensor, Tensor]:
    """y [n, k] and the mass on both answers [n, k], every prompt at every dose.

    dialed: callable from a Tensor [B], one dose per row, to a context manager. systems: {dose: system
    prompt}, for prompting. options: the two answers, or one pair per prompt; their first tokens, with and
    without a space in front, count together. base: y and mass [n, 1] at dose 0 if they are known, so that
    many methods share them. ValueError if the two answers share a token.
    """
    pairs = [options] * len(prompts) if isinstance(options[0], str) else list(options)
    sides = [[{tok(front + word, add_special_tokens=False)["input_ids"][0] for front in ("", " ") for word in
               ([w] if w not in ("Yes", "No") else [w, w.lower()])} for w in pair] for pair in pairs]
    for pair, (a, b) in zip(pairs, sides):
        bare = [tok(w, add_special_tokens=False)["input_ids"][0] for w in pair]
        if bare[0] == bare[1]:
            raise ValueError(f"the answers {pair[0]!r}, {pair[1]!r} begin with the same token: choose others")
        common = a & b                                      # a lone space token, in some tokenizers
        a -= common
        b -= common
    doses = [c for c in doses if c or base is None]
    k = len(doses)
    fronts = [(systems or {}).get(c, "") for _ in prompts for c in doses]       # [n k]
    rows, pad_id = steer.encode(tok, [p for p in prompts for _ in doses], fronts), steer.pad_of(tok, model)
    each = torch.tensor(list(doses) * len(prompts))                             # [n k]

    def work(some):
        device = steer.device_of(model)
        ids, attn, position_ids = steer.left_pad([rows[i] for i in some], pad_id, device)       # [B, T] each
        with dialed(each[some].to(ids.device)):
            logits = model(input_ids=ids, attention_mask=attn, position_ids=position_ids, use_cache=False,
                           logits_to_keep=steer.last(1, model)).logits[:, -1]                 # [B, V]
        logp = logits.float().log_softmax(-1)
        for row, i in zip(logp, some):
            yield i, torch.stack([row[list(side)].logsumexp(0) for side in sides[i // k]]).cpu()        # [2]
    found = torch.stack(steer.in_batches(work, list(map(len, rows)), batch)).double().view(len(prompts), k, 2)
    both = found[..., 0] - found[..., 1], found.exp().sum(-1)                   # [n, k] each
    if base is None:
        return both
    at = sum(c < 0 for c in doses)                                              # doses ascend
    return tuple(torch.cat([x[:, :at], x0, x[:, at:]], 1) for x, x0 in zip(both, base))         # [n, k + 1]


def valid_share(mass: Tensor, doses) -> float:
    """Share of slots that keep at least half of the mass that the base puts on both answers (dose 0)."""
    base = mass[:, list(doses).index(0.0)]                                      # [n]
    return (mass >= base[:, None] / 2).double().mean().item()


def score(y: Tensor, mass: Tensor, doses, *, n_perm: int = 500, seed: int = 0) -> Score:
    """The dose response of items at doses, y and mass [n, k]. Non-finite y is a RuntimeError."""
    if not y.isfinite().all():
        raise RuntimeError("the log-odds are not finite: lower the doses")
    x = bend(doses)                                                             # [k]
    x, y0 = x - x.mean(), y - y.mean(1, keepdim=True)                           # [k], [n, k]  within items
    xx, df = (x @ x) * len(y), y.numel() - len(y) - 1
    slope = (y0 @ x).sum() / xx                                                 # []
    total = y0.square().sum()
    r2 = (slope.square() * xx / total).item() if total > 0 else 0.0
    se = math.sqrt(max(1 - r2, 0) * total.item() / max(df, 1) / xx.item())
    t = slope.item() / se if se else math.inf * (slope.item() != 0)
    rng = torch.Generator().manual_seed(seed)
    order = torch.rand(n_perm, *y.shape, generator=rng).argsort(-1)             # [n_perm, n, k]
    null = (y0.expand(n_perm, -1, -1).gather(2, order) @ x).sum(1) / xx         # [n_perm]
    p_perm = (1 + (null.abs() >= slope.abs()).sum().item()) / (1 + n_perm)
    ends = (y[:, [-1, 0]] - y[:, [list(doses).index(0.0)]]).mean(0).tolist()
    valid = valid_share(mass, doses)
    return Score(abs(slope.item()) * r2 * valid ** 2, slope.item(), r2, valid, t_test(t, df), p_perm,
                 symmetry_of(*ends))


def symmetry_of(plus: float, minus: float) -> float:
    """1 if the moves at +c and -c cancel, 0 if one of them is none, or if both go the same way."""
    total = abs(plus) + abs(minus)
    return 1 - abs(plus + minus) / total if total else 0.0


def chosen_scale(y: Tensor, mass: Tensor, doses) -> float:
    """The largest |c| to use, of those in doses: the best score over doses up to it."""
    def upto(top):
        at = [i for i, c in enumerate(doses) if abs(c) <= top]
        return score(y[:, at], mass[:, at], [doses[i] for i in at], n_perm=1).score
    return max(sorted({abs(c) for c in doses if c}), key=upto)


def held_out(y: Tensor, mass: Tensor, doses) -> tuple[Score, float]:
    """(Score on the even items, scale): the scale of the doses is chosen on the odd ones."""
    scale = chosen_scale(y[1::2], mass[1::2], doses)
    at = [i for i, c in enumerate(doses) if abs(c) <= scale]
    return score(y[::2][:, at], mass[::2][:, at], [doses[i] for i in at]), scale
