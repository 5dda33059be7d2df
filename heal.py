"""Heal: train an adapter on steered completions, without the incoherence that steering let in.

    loss = nll + lam * relu(D - tau)        D = rms over a sample's completion positions of KL(student || reference)

`nll` pulls the student to the completions. The barrier is silent while the student stays within `tau` nats of the
reference and pushes back beyond it. D is a root mean square and not a mean because incoherence is an outlier: a short
loop hides in the mean of a long and otherwise clean completion (`python heal.py` prints the numbers).

Needs torch only; copy this file alone. Knows nothing of steering, LoRA or chat templates: it gets token ids, a model
that answers `model(input_ids=, attention_mask=).logits`, the tensors to train, and a callable giving a context manager
under which the model IS the reference. With a peft model, for example:

    params = [p for p in model.parameters() if p.requires_grad]
    samples = [Sample(prompt_ids + answer_ids, len(prompt_ids), group) for group, prompt_ids, answer_ids in ...]
    record = heal(model, params, samples, model.disable_adapter, HealConfig(lr=1e-4), tau=0.5)

All losses are float32 and in nats. D belongs to one sample: neither the batch it sits in nor its padding changes it.

Known gaps: a micro-batch holds several float32 tensors of [N, V], N = its completion positions, so lower `micro_batch`
where the vocabulary is large; a reference logit of -inf gives a KL of nan; the reference runs again in every epoch.

References
  reverse KL is mode-seeking: Gu et al. 2023, MiniLLM, arXiv:2306.08543
  recipe: github.com/wassname/steer-heal-love
"""
import math
import warnings
from dataclasses import dataclass, field
from typing import Callable, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def opt(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class HealConfig:
    """heal: nll on the kept completions + KL barrier"""
    reg: Literal["kl_rev", "kl_fwd", "nll"] = opt("kl_rev", "barrier: KL(student || reference), its reverse, or none")
    kl_agg: Literal["mean", "rmse", "p95", "max"] = opt("rmse", "how KL [n] becomes D (rmse: root mean square)")
    lam: float = opt(5.0, "barrier weight (nll per nat over tau, dimensionless)")
    tau: float = opt(0.0, "barrier is zero while D is below this (nats); 0 = calibrate")
    lam_round_pow: float = opt(0.0, "in round k (from 0) the weight is lam * (1 + k) ** this")
    spectral: float = opt(0.0, "weight of the update's mean largest singular value")
    weight_decay: float = opt(0.0, "AdamW weight decay (per unit of lr)")
    lr: float = opt(0.0, "peak learning rate, cosine to zero; 0 = 0.2 / the model's width")
    epochs: int = opt(5, "passes over the training samples")
    heal_batch: int = opt(4, "samples per optimiser step")
    micro_batch: int = opt(4, "samples per forward pass; changes memory, not the result")
    warmup: float = opt(0.1, "share of the steps with a rising learning rate")
    clip: float = opt(1.0, "largest gradient norm")
    val_share: float = opt(0.15, "share of the prompts held out to measure nll")

    def __post_init__(self):
        if self.reg not in DIVERGENCES:
            raise ValueError(f"reg={self.reg!r}: expected {', '.join(DIVERGENCES)}")
        if self.kl_agg not in AGGREGATES:
            raise ValueError(f"kl_agg={self.kl_agg!r}: expected {', '.join(AGGREGATES)}")
        for name in ("epochs", "heal_batch", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")
        for name in ("lam", "tau", "spectral", "weight_decay", "lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: expected a finite number, 0 or more")
        if not 0 < self.clip < math.inf:
            raise ValueError(f"clip={self.clip}: expected a finite number above 0")
        for name in ("warmup", "val_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share, 0 <= {name} < 1")
        if not abs(self.lam_round_pow) <= 10:
            raise ValueError(f"lam_round_pow={self.lam_round_pow}: expected a number from -10 to 10")


class Sample(NamedTuple):
    """One prompt and its completion as one list of token ids; the completion starts at ids[n_prompt]."""
    ids: list[int]
    n_prompt: int
    group: int                                                  # prompt index: validation holds out whole prompts


# ---- the barrier, as pure tensor functions ---------------------------------------------------------------------------

def wide(x: Tensor) -> Tensor:
    """float32, or float64 if it came as that: KL from a bfloat16 log_softmax is noisy and can go negative."""
    return x if x.dtype == torch.float64 else x.float()


def reverse_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(student || reference) at each position: large where the student does what the reference would not.

    logits, ref_logits: [N, V], any dtype, finite. Returns [N], nats, float32 (float64 stays float64).
    Raises ValueError if the shapes differ.
    """
    if logits.shape != ref_logits.shape:
        raise ValueError(f"logits {list(logits.shape)} and ref_logits {list(ref_logits.shape)}: expected one shape")
    logp = wide(logits).log_softmax(-1)                         # [N, V]  student
    logq = wide(ref_logits).log_softmax(-1)                     # [N, V]  reference
    return (logp.exp() * (logp - logq)).sum(-1)                 # [N]


def forward_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(reference || student) at each position: large where the student forgets what the reference would do."""
    return reverse_kl(ref_logits, logits)


DIVERGENCES = {"kl_rev": reverse_kl, "kl_fwd": forward_kl,
               "nll": reverse_kl}                               # no barrier, but D is still measured: arms compare

AGGREGATES = {
    "mean": lambda kl: kl.mean(),
    "rmse": lambda kl: torch.linalg.vector_norm(kl) / kl.numel() ** 0.5,  # sqrt(mean(kl**2)) has a nan gradient at 0
    "p95": lambda kl: torch.quantile(kl, 0.95),                 # linear between the two nearest positions
    "max": lambda kl: kl.max(),
}


def aggregate(kl: Tensor, how: str) -> Tensor:
    """One number for the KL of a sample's positions; mean <= rmse <= max, and all four agree on a constant.

    kl: [n], nats. how: mean, rmse, p95 or max. Returns a scalar, nats, float32 (float64 stays float64).
    Raises ValueError for an unknown `how` or an empty kl.
    """
    if how not in AGGREGATES:
        raise ValueError(f"how={how!r}: expected {', '.join(AGGREGATES)}")
    if kl.dim() != 1 or len(kl) == 0:
        raise ValueError(f"kl of shape {list(kl.shape)}: expected [n] with n >= 1, the positions of one sample")
    return AGGREGATES[how](wide(kl))


# ---- from samples to losses ------------------------------------------------------------------------------------------

def completion_rows(model, batch: list[Sample], pad_id: int = 0) -> tuple[Tensor, Tensor, list[int]]:
    """The logits that predict completion tokens, those tokens, and how many belong to each sample: [N, V], [N], [B]."""
    device = next(model.parameters()).device
    T = max(len(s.ids) for s in batch)
    ids = torch.tensor([s.ids + [pad_id] * (T - len(s.ids)) for s in batch], device=device)       # [B, T]  right padded
    lengths = torch.tensor([len(s.ids) for s in batch], device=device)[:, None]                   # [B, 1]
    starts = torch.tensor([s.n_prompt for s in batch], device=device)[:, None]                    # [B, 1]
    at = torch.arange(T, device=device)                                                           # [T]
    attn = (at < lengths).long()                                                                  # [B, T]
    mask = ((at >= starts) & (at < lengths))[:, 1:]                                               # [B, T-1]  targets
    logits = model(input_ids=ids, attention_mask=attn).logits[:, :-1][mask]     # [N, V]  rows before any float32 copy
    return logits, ids[:, 1:][mask], [len(s.ids) - s.n_prompt for s in batch]


def position_losses(model, batch: list[Sample], reference, reg: str, pad_id: int = 0):
    """nll and KL at every completion position, in nats: two lists of [n_i], one entry per sample."""
    with torch.no_grad(), reference():
        ref_logits, _, _ = completion_rows(model, batch, pad_id)                # [N, V]
    logits, targets, sizes = completion_rows(model, batch, pad_id)              # [N, V], [N]
    nll = F.cross_entropy(wide(logits), targets, reduction="none")              # [N]
    kl = DIVERGENCES[reg](logits.detach() if reg == "nll" else logits, ref_logits)      # [N]
    return nll.split(sizes), kl.split(sizes)


@torch.no_grad()
def divergences(model, samples: list[Sample], reference: Callable, *, reg: str = "kl_rev", batch_size: int = 8,
                pad_id: int = 0) -> list[Tensor]:
    """How far the model, as it is now, stands from its reference at each completion position.

    Returns one [n_i] per sample, nats, on the CPU: what tau is calibrated from and what a heat strip shows.
    Raises ValueError for an unknown reg or a sample without a completion.
    """
    if reg not in DIVERGENCES:
        raise ValueError(f"reg={reg!r}: expected {', '.join(DIVERGENCES)}")
    check(samples)
    batches = [samples[i:i + batch_size] for i in range(0, len(samples), batch_size)]
    return [kl.cpu() for batch in batches for kl in position_losses(model, batch, reference, reg, pad_id)[1]]


@torch.no_grad()
def mean_nll(model, samples: list[Sample], batch_size: int, pad_id: int = 0) -> float | None:
    """Nats per completion token over all samples; None if there are none."""
    total, count = 0.0, 0
    for i in range(0, len(samples), batch_size):
        logits, targets, _ = completion_rows(model, samples[i:i + batch_size], pad_id)
        total, count = total + F.cross_entropy(wide(logits), targets, reduction="sum").item(), count + len(targets)
    return total / count if count else None


def check(samples: list[Sample]) -> None:
    if not samples:
        raise ValueError("no samples: nothing to measure or train on")
    for i, s in enumerate(samples):
        if not 1 <= s.n_prompt < len(s.ids):
            raise ValueError(f"sample {i}: n_prompt={s.n_prompt} of {len(s.ids)} ids; it needs at least one prompt "
                             "token, which predicts the first completion token, and one completion token")


def split(samples: list[Sample], share: float, rng: torch.Generator) -> tuple[list[Sample], list[Sample]]:
    """Training and validation samples with no prompt in both; a lone prompt is trained on."""
    groups = sorted({s.group for s in samples})
    n_val = min(max(1, round(share * len(groups))), len(groups) - 1) if share else 0
    held_out = {groups[i] for i in torch.randperm(len(groups), generator=rng)[:n_val].tolist()}
    return [s for s in samples if s.group not in held_out], [s for s in samples if s.group in held_out]


def lr_factor(step: int, n_steps: int, warmup: float) -> float:
    """Linear warm-up to 1, then half a cosine that would reach 0 one step after the last."""
    n_warm = math.ceil(warmup * n_steps)
    if step < n_warm:
        return (step + 1) / n_warm
    return 0.5 * (1 + math.cos(math.pi * (step - n_warm) / (n_steps - n_warm)))


def flat_grad(loss: Tensor, params: list[Tensor]) -> Tensor:
    """The gradient of loss as one vector on the CPU; the graph stays for the backward pass proper."""
    if not loss.requires_grad:                                  # the barrier of reg = nll
        return torch.zeros(sum(p.numel() for p in params))
    grads = torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten().cpu() for g in grads])        # [number of trained values]


def barrier_warning(steps: list[dict], last_epoch: list[dict], tau: float) -> str | None:
    """A barrier that never or always pushes is not the constraint it is taken for."""
    if all(s["fired"] == 0 for s in steps):
        return (f"the barrier never fired: the largest D was {max(s['div_max'] for s in steps):.3g} nats, "
                f"tau is {tau:.3g}; this was plain nll, lower tau")
    if all(s["fired"] == 1 for s in last_epoch):
        div = sum(s["div"] for s in last_epoch) / len(last_epoch)
        return (f"the barrier always fired: every sample of the last epoch was over tau = {tau:.3g} nats, "
                f"their mean D was {div:.3g}; raise tau or lam")
    return None


# ---- one round -------------------------------------------------------------------------------------------------------

def heal(model: nn.Module, params: list[Tensor], samples: list[Sample], reference: Callable, cfg: HealConfig, *,
         tau: float, rnd: int = 0, seed: int = 0, spectral: Callable | None = None, pad_id: int = 0,
         log: Callable | None = None) -> dict:
    """Train `params` in place on `samples` for one round, behind the barrier.

    One optimiser step minimises, over its samples i with n_i completion tokens,
        sum_i n_i * (nll_i + lam_eff * relu(D_i - tau)) / sum_i n_i  +  cfg.spectral * spectral()
    reference: callable giving a context manager under which `model` is the reference. tau: nats, already calibrated
    (cfg.tau is for the caller). rnd: the round, for lam_eff. spectral: callable giving the penalty's scalar.
    log: called with each step's record. `model` is put in eval mode, where no dropout parts student and reference.

    Returns {steps, skipped, nll_first, nll_last, val_nll_before, val_nll_after, fired_share, lam_eff, tau, n_train,
    n_val, n_tokens, warning}. `steps` are dicts {step, epoch, nll, div, div_max, fired, gnorm, lr}, where nll and div
    are means weighted by tokens and fired is the share of samples over tau; the first and last step of an epoch also
    have the gradient norms {grad_nll, grad_barrier, grad_ratio}, ratio = barrier / nll. nll_first and nll_last are
    those of the first and last step, fired_share is the share of steps in which any sample fired, n_tokens counts the
    training completions, and warning (also issued) is None or says that the barrier never or always fired.

    Raises ValueError for bad arguments and RuntimeError after three steps in a row without a finite loss and gradient.
    """
    check(samples)
    params = list(params)
    if not params or any(not p.requires_grad or p.dtype not in (torch.float32, torch.float64) for p in params):
        raise ValueError(f"params: got {len(params)} tensors of {sorted({str(p.dtype) for p in params})}; expected one "
                         "or more, float32 with requires_grad (half precision rounds small updates away)")
    if not 0 <= tau < math.inf:
        raise ValueError(f"tau={tau}: expected a finite number of nats, 0 or more")
    if not cfg.lr:
        raise ValueError("cfg.lr=0 means calibrate, and only the caller knows the width: pass dataclasses.replace(cfg, lr=0.2 / width)")
    if cfg.spectral and spectral is None:
        raise ValueError(f"cfg.spectral={cfg.spectral} needs spectral=, a callable that gives a scalar tensor")

    rng = torch.Generator().manual_seed(seed)
    train, val = split(samples, cfg.val_share, rng)
    lam = 0.0 if cfg.reg == "nll" else cfg.lam * (1 + rnd) ** cfg.lam_round_pow
    model.eval()
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay)
    optimizer.zero_grad()
    steps_per_epoch = math.ceil(len(train) / cfg.heal_batch)
    n_steps = cfg.epochs * steps_per_epoch
    val_before = mean_nll(model, val, cfg.micro_batch, pad_id)

    steps, skipped, bad_in_a_row = [], [], 0
    for step in range(n_steps):
        epoch, i = divmod(step, steps_per_epoch)
        if i == 0:
            order = torch.randperm(len(train), generator=rng).tolist()
        batch = [train[j] for j in order[i * cfg.heal_batch:(i + 1) * cfg.heal_batch]]
        weigh = i in (0, steps_per_epoch - 1)                   # two more backward passes: only twice an epoch
        nlls, divs, grad_nll, grad_barrier = [], [], 0, 0

        # ---- one optimiser step --------------------------------------------------------------------------------------
        lr = optimizer.param_groups[0]["lr"] = cfg.lr * lr_factor(step, n_steps, cfg.warmup)
        n = torch.tensor([len(s.ids) - s.n_prompt for s in batch])                          # [b]  completion tokens
        share = (n / n.sum()).to(params[0].device)                                          # [b]  sums to 1
        for part in range(0, len(batch), cfg.micro_batch):
            piece = slice(part, part + cfg.micro_batch)
            nll_at, kl_at = position_losses(model, batch[piece], reference, cfg.reg, pad_id)
            nll = torch.stack([x.mean() for x in nll_at])                                   # [b of this micro-batch]
            div = torch.stack([aggregate(x, cfg.kl_agg) for x in kl_at])                    # [b of this micro-batch]
            fit = (share[piece] * nll).sum()                    # parts add up to the token mean over the whole step
            barrier = lam * (share[piece] * torch.relu(div - tau)).sum()
            if weigh:
                grad_nll, grad_barrier = grad_nll + flat_grad(fit, params), grad_barrier + flat_grad(barrier, params)
            (fit + barrier).backward()
            nlls.append(nll.detach())
            divs.append(div.detach())
        if cfg.spectral:
            (cfg.spectral * spectral()).backward()
        gnorm = torch.nn.utils.clip_grad_norm_(params, cfg.clip)
        nll, div = torch.cat(nlls), torch.cat(divs)                                         # [b], [b]
        is_finite = bool(torch.cat([nll, div, gnorm[None]]).isfinite().all())
        if is_finite:
            optimizer.step()
        optimizer.zero_grad()
        # --------------------------------------------------------------------------------------------------------------

        bad_in_a_row = 0 if is_finite else bad_in_a_row + 1
        if bad_in_a_row == 3 or (not is_finite and not steps and step == n_steps - 1):
            raise RuntimeError(f"step {step}: {bad_in_a_row} steps in a row without a finite loss and gradient "
                               f"(nll {nll.mean():.3g}, D {div.max():.3g}, gnorm {gnorm:.3g}); lower lr (now {cfg.lr})")
        if not is_finite:
            skipped.append(step)
            continue                                            # nothing but the record below is left out
        values = [(share * nll).sum(), (share * div).sum(), div.max(), (div > tau).float().mean(), gnorm]
        row = {"step": step, "epoch": epoch, "lr": lr,
               **dict(zip(("nll", "div", "div_max", "fired", "gnorm"), torch.stack(values).tolist()))}
        if weigh:
            row["grad_nll"], row["grad_barrier"] = grad_nll.norm().item(), grad_barrier.norm().item()
            row["grad_ratio"] = row["grad_barrier"] / max(row["grad_nll"], 1e-12)
        steps.append(row)
        if log:
            log(row)

    warning = None
    if lam > 0:
        warning = barrier_warning(steps, [s for s in steps if s["epoch"] == steps[-1]["epoch"]], tau)
    if warning:
        warnings.warn(warning, stacklevel=2)
    return {"steps": steps, "skipped": skipped, "nll_first": steps[0]["nll"], "nll_last": steps[-1]["nll"],
            "val_nll_before": val_before, "val_nll_after": mean_nll(model, val, cfg.micro_batch, pad_id),
            "fired_share": sum(s["fired"] > 0 for s in steps) / len(steps), "lam_eff": lam, "tau": tau,
            "n_train": len(train), "n_val": len(val), "n_tokens": sum(len(s.ids) - s.n_prompt for s in train),
            "warning": warning}


if __name__ == "__main__":
    # Two completions of 60 positions, as KL in nats. The shift is small everywhere: 42 positions hardly move, 14 more
    # so, 4 carry the trait. The loop is clean but for 4 positions in a row.
    shift = torch.tensor([0.0065] * 42 + [0.041] * 14 + [0.049] * 3 + [0.095])      # [60]
    loop = torch.tensor([0.005] * 56 + [3.77, 3.91, 6.71, 8.081])                   # [60]
    print("D (nats)   coherent trait shift   4-token loop in 60   ratio   barrier at tau = 0.5")
    for how in AGGREGATES:
        low, high = aggregate(shift, how).item(), aggregate(loop, how).item()
        verdict = "lets the loop through" if high < 0.5 else "stops the loop, not the shift"
        print(f"{how:8s} {low:22.3f} {high:20.3f} {high / low:6.0f}x   {verdict}")
