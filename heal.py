"""Heal: train an adapter on steered completions, without the incoherence that steering let in.

    loss = nll + lam * relu(D - tau)       D = rms over a sample's completion positions of KL(student || ref)

`nll` pulls the student to the completions. The barrier is silent while the student stays within `tau` nats of
the reference and pushes back beyond it. D is a root mean square and not a mean because incoherence is an
outlier: a short loop hides in the mean of a long and otherwise clean completion (`python heal.py`).

Needs torch only; copy this file alone. Knows nothing of steering, LoRA or chat templates: it gets token ids,
a model that answers `model(input_ids=, attention_mask=).logits`, the tensors to train, and a callable giving
a context manager under which the model IS the reference. With a peft model, for example:

    params = [p for p in model.parameters() if p.requires_grad]
    samples = [Sample(prompt + answer, len(prompt), i) for i, (prompt, answer) in enumerate(pairs_of_ids)]
    record = heal(model, params, samples, model.disable_adapter, HealConfig(lr=1e-4, tau=0.5))

All losses are float32, in nats; D belongs to one sample, whatever its batch and padding. They come from
hidden states, a tile of the vocabulary at a time; the reference reads a sample once (fast=False: plainly).

Known gaps: a reference logit of -inf gives a KL of nan; a trained, adapted or hooked head takes the plain
passes, with several float32 tensors of [N, V], N = the completion positions of one pass.

References
  reverse KL: Gu et al. 2023, arXiv:2306.08543; recipe: github.com/wassname/steer-heal-love
  online softmax: Milakov, Gimelshein 2018, arXiv:1805.02867; no logits: Wijmans et al. 2024, arXiv:2411.09009
"""
import math
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Callable, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WARMUP = 0.1                # share of the steps with a rising learning rate: Adam's first estimates are rough
CLIP = 1.0                  # largest gradient norm: one incoherent sample can push many times as hard as nll
VAL_SHARE = 0.15            # of the prompts, held out to measure nll
alone = lambda work, rows, params: work(rows)   # who does the rows of a step: one process, all of them
TILE = 8192                 # vocabulary rows at a time: the losses hold 12 * N * TILE bytes


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
class HealConfig:
    """heal: nll on the kept completions + KL barrier"""
    reg: Literal["kl_rev", "kl_fwd", "nll"] = opt("kl_rev", "KL(student || reference), its reverse, or none")
    kl_agg: Literal["mean", "rmse", "p95", "max"] = opt("rmse", "how KL becomes D (rmse: root mean square)")
    lam: float = opt(5.0, "barrier weight (nll per nat over tau, dimensionless)", 0, 1e6)
    tau: float | None = opt(None, "barrier is zero while D is below this (nats); none = calibrate", 0, 1e6)
    lam_round_pow: float = opt(0.0, "in round k (from 0) the weight is lam * (1 + k) ** this", -10, 10)
    spectral: float = opt(0.0, "weight of the update's mean largest singular value", 0, 1e6)
    weight_decay: float = opt(0.0, "AdamW weight decay (per unit of lr)", 0, 1e6)
    lr: float | None = opt(None, "peak learning rate, cosine to 0; none = 0.4 / the model's width", 1e-12, 1)
    epochs: int = opt(5, "passes over the training samples", 1, 1e4)
    heal_batch: int = opt(4, "samples per optimiser step", 1, 1e6)
    pass_tokens: int = opt(2048, "tokens per forward pass, at least a sample; moves memory only", 1, 1e9)
    fast: bool = opt(True, "no logits, and the reference read once; off = plain passes, same result")

    def __post_init__(self):
        check_ranges(self)
        for name, known in (("reg", DIVERGENCES), ("kl_agg", AGGREGATES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {', '.join(known)}")


class Sample(NamedTuple):
    """One prompt and its completion as one list of token ids; the completion starts at ids[n_prompt]."""
    ids: list[int]
    n_prompt: int
    group: int                                              # prompt index: validation holds out whole prompts

    @property
    def answer(self) -> list[int]:
        return self.ids[self.n_prompt:]


# ---- the barrier, as pure tensor functions -------------------------------------------------------

def wide(x: Tensor) -> Tensor:
    """float32, or float64 if it came as that: KL from a bfloat16 log_softmax is noisy and can go negative."""
    return x if x.dtype == torch.float64 else x.float()


def reverse_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(student || reference) at each position: large where the student does what the reference would not.

    logits, ref_logits: [N, V], finite; ValueError if the shapes differ. Returns [N] nats, float32 or float64.
    """
    if logits.shape != ref_logits.shape:
        raise ValueError(f"{list(logits.shape)} and {list(ref_logits.shape)}: expected one shape")
    logp = wide(logits).log_softmax(-1)                                     # [N, V]  student
    logq = wide(ref_logits).log_softmax(-1)                                 # [N, V]  reference
    return (logp.exp() * (logp - logq)).sum(-1)                             # [N]


def forward_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(reference || student) at each position: large where the student forgets the reference."""
    return reverse_kl(ref_logits, logits)                                   # [N]


DIVERGENCES = {"kl_rev": reverse_kl, "kl_fwd": forward_kl,
               "nll": reverse_kl}                           # no barrier, but D is measured: arms compare

AGGREGATES = {
    "mean": lambda kl: kl.mean(),
    "rmse": lambda kl: torch.linalg.vector_norm(kl) / kl.numel() ** 0.5,    # sqrt(mean): nan gradient at 0
    "p95": lambda kl: torch.quantile(kl, 0.95),             # linear between the two nearest positions
    "max": lambda kl: kl.max(),
}


def aggregate(kl: Tensor, how: str) -> Tensor:
    """One number for the KL of a sample's positions; mean <= rmse <= max, and all four agree on a constant.

    kl: [n], nats. Returns a scalar, nats, float32 (float64 stays float64). ValueError: unknown how, empty kl.
    """
    if how not in AGGREGATES:
        raise ValueError(f"how={how!r}: expected {', '.join(AGGREGATES)}")
    if kl.dim() != 1 or len(kl) == 0:
        raise ValueError(f"kl of shape {list(kl.shape)}: expected [n], n >= 1, the positions of one sample")
    return AGGREGATES[how](wide(kl))                                        # []


def naive_losses(logits: Tensor, ref_logits: Tensor, targets: Tensor, reg: str = "kl_rev"):
    """nll and KL at each position, [N] nats each, from logits [N, V]: the definition."""
    nll = F.cross_entropy(wide(logits), targets, reduction="none")          # [N]
    return nll, DIVERGENCES[reg](logits.detach() if reg == "nll" else logits, ref_logits)  # [N] each


# ---- the same without logits ---------------------------------------------------------------------

def token_losses(hidden: Tensor, ref_hidden: Tensor, weight: Tensor, targets: Tensor, *,
                 bias: Tensor | None = None, cap: float = 0.0, reg: str = "kl_rev", tile: int = TILE):
    """What `naive_losses` gives for logits = hidden @ weight.T + bias, holding a tile of [N, V] at a time.

    hidden, ref_hidden: [N, d], student and reference where they predict targets [N]. weight [V, d], bias [V]:
    the frozen head of both. cap: logits are cap * tanh(logits / cap); 0 = not. Returns nll and kl, [N] each,
    nats, float32 (float64 stays float64), exact. ValueError: unfit shapes, unknown reg, a head to be trained.

    With z, z0 the logits of student and reference, delta = z - z0, p and q their softmax:
        nll        = lse(z) - z[target]                     d nll / dh = E_p[W] - W[target]
        KL(p || q) = E_p[delta] - lse(z) + lse(z0)          d KL / dh  = E_p[(delta - E_p[delta]) W]
        KL(q || p) = lse(z) - lse(z0) - E_q[delta]          d KL / dh  = E_p[W] - E_q[W]
    All are softmax-weighted sums over the rows of W, which is attention with W as keys and values: a running
    lse carries them over the tiles. delta is W (h - h0), not a difference of two logits: where student and
    reference agree the KL is exactly 0, and in bfloat16 its error is that of delta, not that of the logits.
    The KL's gradient is computed in the backward pass, only at the positions where one is asked for.
    """
    N, d = hidden.shape
    if weight.shape[1:] != (d,) or targets.shape != (N,) or ref_hidden.shape != (N, d):
        shapes = [list(x.shape) for x in (hidden, ref_hidden, weight, targets)]
        raise ValueError(f"hidden, ref_hidden, weight, targets: {shapes}, not [N, d], [N, d], [V, d], [N]")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("the head requires a gradient, and this function has none for it: use naive_losses")
    if reg not in DIVERGENCES:
        raise ValueError(f"reg={reg!r}: expected {', '.join(DIVERGENCES)}")
    return TokenLosses.apply(hidden, ref_hidden, weight, bias, targets, cap, reg == "kl_fwd", tile)


def tiles(h: Tensor, dh: Tensor, weight: Tensor, bias: Tensor | None, cap: float, tile: int):
    """Yields W [T, d] with its z, delta and dz / d(W h), [N, T] each, the last 1 without a cap."""
    for at in range(0, len(weight), tile):
        W, slope = weight[at:at + tile], 1.0                                # [T, d]
        z, delta = wide(h @ W.T), wide(dh @ W.T)                            # [N, T] each
        z = z if bias is None else z.add_(bias[at:at + tile])
        if cap:
            uncapped, z = z, cap * (z / cap).tanh_()
            delta = z - cap * ((uncapped - delta) / cap).tanh_()
            slope = 1 - (z / cap) ** 2                                      # [N, T]
        yield W, z, delta, slope


def absorb(z: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax so far of a tile z [N, T], in its place; lse [N] with it; how older means shrink [N]."""
    top = lse.maximum(z.amax(1))                                            # [N]
    p = z.sub_(top[:, None]).exp_()                                         # [N, T]
    new = top + ((lse - top).exp() + p.sum(1)).log()                        # [N]
    return p.mul_((top - new).exp()[:, None]), new, (lse - new).exp()


class TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, h0, weight, bias, targets, cap, is_forward, tile):
        lse = lse0 = wide(h).new_full(h.shape[:1], -math.inf)               # [N] each
        mean, EW = torch.zeros_like(lse), torch.zeros_like(h, dtype=lse.dtype)  # [N] E[delta], [N, d] E_p[W]
        for W, z, delta, slope in tiles(h, h - h0, weight, bias, cap, tile):
            q, lse0, shrink = absorb(z - delta, lse0)                       # [N, T], [N], [N]
            if is_forward:
                mean = shrink * mean + (q * delta).sum(1)                   # [N]
            del q                                           # one tile less at the peak
            p, lse, shrink = absorb(z, lse)                                 # [N, T], [N], [N]
            if not is_forward:
                mean = shrink * mean + delta.mul_(p).sum(1)                 # [N]
            if ctx.needs_input_grad[0]:
                EW.mul_(shrink[:, None]).add_(wide((p.mul_(slope) if cap else p).to(W.dtype) @ W))    # [N, d]

        W_t, slope = weight[targets], 1.0                                   # [N, d]
        z_t = (wide(h) * wide(W_t)).sum(1) + (0 if bias is None else bias[targets])     # [N]
        if cap:
            z_t = cap * (z_t / cap).tanh()
            slope = (1 - (z_t / cap) ** 2)[:, None]                         # [N, 1]
        ctx.save_for_backward(EW.sub_(slope * W_t), weight, bias, h, h0, lse, lse0, mean)
        ctx.rest = cap, is_forward, tile
        return lse - z_t, (lse - lse0 - mean) if is_forward else (mean - lse + lse0)    # [N] each

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_nll, g_kl):
        d_nll, weight, bias, *known = ctx.saved_tensors
        (cap, is_forward, tile), grad = ctx.rest, g_nll[:, None] * d_nll    # [N, d]
        rows = g_kl.nonzero()[:, 0]                                         # [n]  where the barrier pushes
        if len(rows):
            h, h0, lse, lse0, mean = (x[rows] for x in known)               # [n, d] twice, [n] thrice
            d_kl = torch.zeros_like(grad[rows])                             # [n, d]
            for W, z, delta, slope in tiles(h, h - h0, weight, bias, cap, tile):
                p = (z - lse[:, None]).exp_()                               # [n, T]
                if is_forward:
                    p -= (z - delta - lse0[:, None]).exp_()                 # [n, T]  p - q
                else:
                    p *= delta - mean[:, None]                              # [n, T]
                d_kl += wide((p.mul_(slope) if cap else p).to(W.dtype) @ W)                   # [n, d]
            grad[rows] += g_kl[rows, None] * d_kl
        return grad.to(known[0].dtype), *(None,) * 7


# ---- from samples to losses ----------------------------------------------------------------------

def find_head(model) -> tuple[nn.Module, float, dict] | None:
    """(decoder, scale, {weight, bias, cap}) of a transformers model whose frozen head and config make its
    logits cap * tanh((W (scale * h) + bias) / cap) of the decoder's h; None if there is more to it."""
    linear = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if type(linear) is not nn.Linear or linear.weight.requires_grad or linear in decoder.modules() \
            or "forward" in vars(linear) or linear._forward_hooks or linear._forward_pre_hooks:
        return None
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    bias = linear.bias if linear.bias is None or scale == 1 else scale * linear.bias        # [V]
    cap = getattr(config, "final_logit_softcapping", None) or 0.0
    return decoder, scale, dict(weight=linear.weight, bias=bias, cap=cap)


class Passes:
    """The forward passes of one round, over samples that are known by their index.

    Where the model's head can be read (`head` is not None) only its decoder runs: token_losses gets what that
    gives, and the reference's is kept. ref_samples: what the reference reads, the same completions.
    """

    def __init__(self, model: nn.Module, samples: list[Sample], reference: Callable, *, reg: str = "kl_rev",
                 ref_samples: list[Sample] | None = None, pad_id: int = 0, fast: bool = True):
        if not samples:
            raise ValueError("no samples: nothing to measure or train on")
        for i, s in enumerate(samples):
            if not 1 <= s.n_prompt < len(s.ids):
                raise ValueError(f"sample {i}: n_prompt={s.n_prompt} of {len(s.ids)}: need prompt and answer")
        if ref_samples and [s.answer for s in samples] != [s.answer for s in ref_samples]:
            raise ValueError("samples and ref_samples: expected the same completions in the same order")
        self.model, self.samples, self.ref_samples = model, samples, ref_samples or samples
        self.reference, self.reg, self.pad_id = reference, reg, pad_id
        embeds = hasattr(model, "get_input_embeddings")     # in an image-text model not the first weight
        self.device = (model.get_input_embeddings().weight if embeds else next(model.parameters())).device
        self.extra = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
        self.ref_rows, self.head = {}, None                                 # index -> [n_i, d]
        if fast and (head := find_head(model)):
            self.head = self.proven(head, [Sample(samples[0].ids[:16], 1, 0)])

    @torch.no_grad()
    def proven(self, head: tuple, probe: list[Sample]) -> tuple | None:
        """The head if it makes the logits of student and reference, but for the order of sums: config, hooks
        and what the model does around its decoder may not tell all."""
        for context in (nullcontext, self.reference):
            with context():
                (logits,), self.head = self.rows(probe), head               # [n, V]
                (h,), self.head = self.rows(probe), None                    # [n, d]
            _, z, _, _ = next(tiles(h, h, **head[2], tile=logits.shape[1]))     # [n, V]
            tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(logits.dtype, 2e-2)
            if not (z - logits).abs().max() <= tolerance * logits.abs().max():
                return None
        return head

    def rows(self, batch: list[Sample]) -> list[Tensor]:
        """What predicts each sample's completion: the head's scaled input [n_i, d], or logits [n_i, V]."""
        T = max(len(s.ids) for s in batch)
        ids = [s.ids + [self.pad_id] * (T - len(s.ids)) for s in batch]     # right padded
        attn = [[1] * len(s.ids) + [0] * (T - len(s.ids)) for s in batch]
        ids, attn = torch.tensor([ids, attn], device=self.device)           # [B, T] each
        if self.head:
            decoder, scale, _ = self.head
            x = scale * decoder(input_ids=ids, attention_mask=attn, **self.extra)[0]        # [B, T, d]
        else:
            x = self.model(input_ids=ids, attention_mask=attn, **self.extra).logits         # [B, T, V]
        return [x[i, s.n_prompt - 1:len(s.ids) - 1] for i, s in enumerate(batch)]

    def reference_rows(self, batch: list[int]) -> list[Tensor]:
        """The same of the reference, without a gradient."""
        new = [i for i in batch if i not in self.ref_rows]
        if new:
            with torch.no_grad(), self.reference():
                rows = self.rows([self.ref_samples[i] for i in new])
            if not self.head:
                return rows                                 # logits would be too many to keep
            self.ref_rows |= {i: x.clone() for i, x in zip(new, rows)}      # [n_i, d] without the prompt
        return [self.ref_rows[i].to(self.device) for i in batch]            # another process's are on the CPU

    def losses(self, batch: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        """nll and KL at every completion position, in nats: one [n_i] per sample of the batch."""
        answers = [self.samples[i].answer for i in batch]
        ref = torch.cat(self.reference_rows(batch))                         # [N, d] or [N, V]
        rows = torch.cat(self.rows([self.samples[i] for i in batch]))       # [N, d] or [N, V]
        targets = torch.tensor(sum(answers, []), device=rows.device)        # [N]
        if self.head:
            nll, kl = token_losses(rows, ref, targets=targets, reg=self.reg, **self.head[2])
        else:
            nll, kl = naive_losses(rows, ref, targets, self.reg)            # [N] each
        return nll.split(list(map(len, answers))), kl.split(list(map(len, answers)))    # [n_i] each

    def pieces(self, batch: list[int], pass_tokens: int) -> list[list[int]]:
        """The batch in order, in pieces that, padded, have at most pass_tokens tokens or are one sample."""
        out = []
        while batch:
            n = max(1, pass_tokens // max(len(self.samples[i].ids) for i in batch))
            out, batch = [*out, batch[:n]], batch[n:]
        return out

    @torch.no_grad()
    def measured(self, batch: list[int], pass_tokens: int) -> dict[int, tuple[Tensor, Tensor]]:
        """{index: (nll, KL) at every completion position, [n_i] nats each} of the model as it is now."""
        return {i: (nll, kl) for piece in self.pieces(batch, pass_tokens)
                for i, nll, kl in zip(piece, *self.losses(piece))}


def split(samples: list[Sample], share: float, rng: torch.Generator) -> tuple[list[int], list[int]]:
    """Indices to train on and to validate with, no prompt in both; a lone prompt is trained on."""
    groups = sorted({s.group for s in samples})
    n_val = min(max(1, round(share * len(groups))), len(groups) - 1)
    held_out = {groups[i] for i in torch.randperm(len(groups), generator=rng)[:n_val].tolist()}
    train = [i for i, s in enumerate(samples) if s.group not in held_out]
    return train, [i for i, s in enumerate(samples) if s.group in held_out]


def lr_factor(step: int, n_steps: int) -> float:
    """Linear warm-up to 1, then half a cosine that would reach 0 one step after the last."""
    n_warm = math.ceil(WARMUP * n_steps)
    if step < n_warm:
        return (step + 1) / n_warm
    return 0.5 * (1 + math.cos(math.pi * (step - n_warm) / (n_steps - n_warm)))


# ---- one round -----------------------------------------------------------------------------------

def heal(model: nn.Module, params: list[Tensor], samples: list[Sample], reference: Callable, cfg: HealConfig,
         *, rnd: int = 0, seed: int = 0, spectral: Callable | None = None, pad_id: int = 0,
         log: Callable = lambda row: None, across: Callable = alone) -> dict:
    """Train `params` in place on `samples` for one round, behind the barrier.

    One optimiser step minimises, over its samples i with n_i completion tokens,
        sum_i n_i * (nll_i + lam_eff * relu(D_i - tau)) / sum_i n_i  +  cfg.spectral * spectral()
    reference: callable giving a context manager under which `model` is the reference. cfg.tau and cfg.lr must
    be numbers: who calls calibrates. rnd: the round, for lam_eff. spectral: gives the penalty's scalar. log:
    called with each step's record. across: gives {row: result} of all rows; over processes it deals them out
    and sums the gradients. `model` is put in eval mode: no dropout parts student and reference.

    Returns {steps, skipped, nll_first, nll_last, val_nll_before, val_nll_after, fired_share, lam_eff, tau,
    n_train, n_val, warning, shortcuts}. `steps` are dicts {step, epoch, tokens, lr, nll, div,
    div_max, fired, gnorm}: nll, div are means over the step's tokens, fired is the share of samples over tau.
    nll_first, nll_last: over the tokens of the first and last epoch. fired_share: steps in which any fired.
    warning (also issued): None, or the barrier never or always fired.
    shortcuts: whether those of cfg.fast were taken. Out of memory halves pass_tokens and repeats the step.
    Raises ValueError for bad arguments, RuntimeError after three steps in a row without finite numbers.
    """
    params, tau = list(params), cfg.tau
    if not params or not all(p.requires_grad and p.dtype in (torch.float32, torch.float64) for p in params):
        raise ValueError(f"params: got {len(params)} of {sorted({str(p.dtype) for p in params})}; expected "
                         "float32 with requires_grad (half precision rounds small updates away)")
    if tau is None or cfg.lr is None:
        raise ValueError(f"cfg.tau={tau}, cfg.lr={cfg.lr}: None is for the caller to calibrate, pass numbers")
    if cfg.spectral and spectral is None:
        raise ValueError(f"cfg.spectral={cfg.spectral} needs spectral=, a callable giving a scalar tensor")

    lam = 0.0 if cfg.reg == "nll" else cfg.lam * (1 + rnd) ** cfg.lam_round_pow
    model.eval()
    passes = Passes(model, samples, reference, reg=cfg.reg, pad_id=pad_id, fast=cfg.fast)
    rng, pass_tokens = torch.Generator().manual_seed(seed), cfg.pass_tokens
    train, val = split(samples, VAL_SHARE, rng)
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay)
    optimizer.zero_grad()

    def val_nll():                                          # nats per token
        found = across(lambda rows: passes.measured(rows, cfg.pass_tokens), val, params)
        return torch.cat([found[i][0] for i in val]).mean().item() if val else None

    def accumulate(rows):                                   # to .grad; {row: ([nll, D, share], reference)}
        nonlocal pass_tokens
        parts, pieces = {}, passes.pieces(rows, pass_tokens)
        try:
            for piece in pieces:
                nlls, kls = passes.losses(piece)
                nll = torch.stack([x.mean() for x in nlls])                 # [b of this piece]
                div = torch.stack([aggregate(x, cfg.kl_agg) for x in kls])  # [b of this piece]
                share = torch.tensor([len(x) / tokens for x in nlls]).to(nll)            # [b of this piece]
                loss = (share * nll).sum() + lam * (share * torch.relu(div - tau)).sum()
                loss.backward()                             # pieces add up to the token mean over the step
                parts |= zip(piece, torch.stack([nll, div, share], 1).detach())             # [3] each
            return {i: (x, None if epoch else passes.ref_rows.get(i)) for i, x in parts.items()}
        except RuntimeError as error:                       # the CPU has no class for it
            is_full = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
            if not is_full or len(pieces) == len(rows):
                raise                                       # one sample at a time is too much
        nlls = kls = nll = div = loss = None                # the graph is what fills the memory
        pass_tokens //= 2
        optimizer.zero_grad()
        return accumulate(rows)

    before, steps, skipped = val_nll(), [], []
    orders = [torch.randperm(len(train), generator=rng).tolist() for _ in range(cfg.epochs)]
    plan = [(epoch, [train[j] for j in order[at:at + cfg.heal_batch]])
            for epoch, order in enumerate(orders) for at in range(0, len(train), cfg.heal_batch)]
    for step, (epoch, batch) in enumerate(plan):
        batch.sort(key=lambda j: -len(samples[j].ids))      # pieces of similar length, the longest first
        tokens = sum(len(samples[j].answer) for j in batch)

        # ---- one optimiser step ----------------------------------------------------------------------------
        lr = optimizer.param_groups[0]["lr"] = cfg.lr * lr_factor(step, len(plan))
        found = across(accumulate, batch, params)
        passes.ref_rows = {i: ref for i, (_, ref) in found.items() if ref is not None} | passes.ref_rows
        nll, div, share = torch.stack([found[i][0].to(passes.device) for i in batch], 1)    # [b] each
        if cfg.spectral:
            (cfg.spectral * spectral()).backward()
        gnorm = torch.nn.utils.clip_grad_norm_(params, CLIP)
        is_finite = bool(torch.cat([nll, div, gnorm[None]]).isfinite().all())
        if is_finite:
            optimizer.step()
        optimizer.zero_grad()
        # ----------------------------------------------------------------------------------------------------

        if not is_finite:
            skipped.append(step)
            n_bad = min(3, len(plan))
            if skipped[-n_bad:] == list(range(step + 1 - n_bad, step + 1)):
                numbers = f"nll {nll.mean():.3g}, D {div.max():.3g}, gnorm {gnorm:.3g}"
                raise RuntimeError(f"step {step}: {n_bad} steps in a row with no finite gradient ({numbers})"
                                   f"; lower lr {cfg.lr}")
            continue                                        # nothing but the record below is left out
        values = [(share * nll).sum(), (share * div).sum(), div.max(), (div > tau).float().mean(), gnorm]
        row = dict(zip(("nll", "div", "div_max", "fired", "gnorm"), torch.stack(values).tolist()))
        steps.append({"step": step, "epoch": epoch, "tokens": tokens, "lr": lr, **row})
        log(steps[-1])

    first, last = ([s for s in steps if s["epoch"] == end["epoch"]] for end in (steps[0], steps[-1]))
    nll = [sum(s["tokens"] * s["nll"] for s in x) / sum(s["tokens"] for s in x) for x in (first, last)]
    warning = None                                          # always or never pushing is no constraint
    if lam > 0 and all(s["fired"] == 0 for s in steps):
        warning = (f"the barrier never fired: the largest D was {max(s['div_max'] for s in steps):.3g} nats, "
                   f"tau is {tau:.3g}; this was plain nll, lower tau")
    elif lam > 0 and all(s["fired"] == 1 for s in last):
        warning = f"the barrier always fired: all D of the last epoch > tau = {tau:.3g}; raise tau or lam"
    if warning:
        warnings.warn(warning, stacklevel=2)
    return {"steps": steps, "skipped": skipped, "nll_first": nll[0], "nll_last": nll[1],
            "val_nll_before": before, "val_nll_after": val_nll(), "n_train": len(train), "n_val": len(val),
            "fired_share": sum(s["fired"] > 0 for s in steps) / len(steps), "lam_eff": lam, "tau": tau,
            "warning": warning, "shortcuts": passes.head is not None}


if __name__ == "__main__":
    base = torch.randn(60, 256, generator=torch.Generator().manual_seed(0))     # [60, V]
    shift, loop = base.clone(), base.clone()
    shift[:, 0] += 1.6                                      # one word a little likelier at every position
    loop[-4:, 1] += 12.0                                    # four positions that can say one thing only
    kls = reverse_kl(shift, base), reverse_kl(loop, base)                       # [60] each
    print("D (nats)   coherent trait shift   4-token loop in 60   ratio   barrier at tau = 0.5")
    for how in AGGREGATES:
        low, high = (aggregate(kl, how).item() for kl in kls)
        verdict = "lets the loop through" if high < 0.5 else "stops it" + ", not the shift" * (low < 0.5)
        print(f"{how:8s} {low:22.3f} {high:20.3f} {high / low:6.0f}x   {verdict}")
