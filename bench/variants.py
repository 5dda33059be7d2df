"""Variants: arms that no option of loop.py gives: its own main, with one thing exchanged.

    python bench/variants.py --variant hinge --rounds 4 --no-gate --out DIR         and all options of loop.py

The variant is an option of the run: run.json has it, --resume goes on with it, and an arm of
bench/experiment.py names it like any other: "hinge": ["--variant", "hinge"]. loop.py has no such option, nor
a hook for these, and refuses to go on with such a run: each variant exchanges a function of a module for as
long as its `with` lasts. One process only.
"""
import dataclasses
import math
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import torch                                            # noqa: E402

import heal                                             # noqa: E402
import loop                                             # noqa: E402
import steer                                            # noqa: E402
from tools.student import Student, stage_seed           # noqa: E402

OUTLIERS = 0.05             # share of a round's kept tokens that `mask` leaves out of nll


@contextmanager
def hinge():
    """loss = nll + lam * mean over positions of relu(KL - tau): no position pays for another.

    tau is the other arms': in D's root mean square. The journal's D is tau + that mean, so that a sample has
    fired if one of its positions is over tau.
    """
    plain = heal.heal

    def hinged(model, params, samples, reference, cfg, **how):
        def over(kl, _):
            return cfg.tau + torch.relu(heal.wide(kl) - cfg.tau).mean()                     # []
        with patch.object(heal, "aggregate", over):
            return plain(model, params, samples, reference, cfg, **how)
    with patch.object(heal, "heal", hinged):
        yield


@contextmanager
def falling():
    """The k-th of at most n tokens, k from 0, is sampled at the dose coeff * (1 - k / (n - 1)).

    In the search of the dose too, and in a night's texts. Not where a steered model reads: a night's probe
    and the journal's worst answer are at coeff throughout.
    """
    generate, cached_forward, steered = steer.generate, steer.cached_forward, steer.steered

    def falls(model, tok, prompts, *, max_new_tokens: int, **how):
        k = 0

        def begins(model):                              # a batch, with a cache of its own
            nonlocal k
            k = 0
            return cached_forward(model)

        def fades(model, vectors, doses):
            nonlocal k
            k += 1
            return steered(model, vectors, doses * (1 - (k - 1) / max(1, max_new_tokens - 1)))
        with patch.object(steer, "cached_forward", begins), patch.object(steer, "steered", fades):
            return generate(model, tok, prompts, max_new_tokens=max_new_tokens, **how)
    with patch.object(steer, "generate", falls):
        yield


@contextmanager
def mask():
    """nll counts 0 at the OUTLIERS of a round's kept tokens that are least likely under the filter's mixture.

    The barrier stays on all. What the journal says of nll in training is without them, val_nll with them.
    """
    plain, losses = loop.Run.heal, heal.Passes.losses

    def masked(run, rnd):
        kept = run.student.kept(run.folder.record.completions(rnd))
        nlls = run.student.yardstick(kept, run.student.train)                               # [n_i] each
        limit = torch.cat(nlls).quantile(1 - OUTLIERS)                                      # []
        counts = [(nll <= limit).float() for nll in nlls]                                   # [n_i] each

        def without(passes, batch):
            nll, kl = losses(passes, batch)                                                 # [n_i] each
            if torch.is_grad_enabled():                 # not where it is only measured
                nll = [x * counts[i].to(x) for i, x in zip(batch, nll)]
            return nll, kl
        with patch.object(heal.Passes, "losses", without):
            return plain(run, rnd) | dict(masked_over=limit)
    with patch.object(loop.Run, "heal", masked):
        yield


def cut_of(completion, nll, limits, patterns, decode) -> int:
    """How many tokens of a dropped answer stand before the first window that breaks a rule of the filter."""
    for n in range(min(steer.WINDOW, len(nll)), len(nll)):
        part = dataclasses.replace(completion, ids=completion.ids[:n], text=decode(completion.ids[:n]))
        if not steer.judge([part], [nll[:n]], limits, patterns=patterns)[0].kept:
            return max(0, n - steer.WINDOW)
    return max(0, len(nll) - steer.WINDOW)


@contextmanager
def repair():
    """A dropped answer is cut before its first incoherent window and goes on from there at half the dose.

    It is read anew at that dose, prompt included, may get no longer than any other, and is judged again.
    """
    plain, judged = loop.Run.made, Student.judged

    def mended(run, rnd):
        def judged_twice(student, made, limits):
            found, most = judged(student, made, limits), student.sampling["max_new_tokens"]
            bad = [i for i, e in enumerate(found) if not e["verdict"]["kept"]]
            if not bad:
                return found
            broken, decode = [made[i] for i in bad], partial(student.tok.decode, skip_special_tokens=True)
            cuts = [cut_of(c, nll, limits, student.persona["patterns"], decode)
                    for c, nll in zip(broken, student.yardstick(broken, student.train))]
            rows = [c.prompt_ids + c.ids[:n] for c, n in zip(broken, cuts)]
            with patch.object(steer, "encode", lambda *_: rows):        # it would write the prompts alone
                rest = steer.generate(student.model, student.tok, [""] * len(rows), **student.sampling,
                                      vectors=run.rounds.steering(rnd)["vectors"],
                                      coeffs=[c.coeff / 2 for c in broken],
                                      seed=stage_seed(student.seed, rnd, "repair"))
            whole = []
            for c, n, more in zip(broken, cuts, rest):
                ids, fits = (c.ids[:n] + more.ids)[:most], n + len(more.ids) <= most
                whole.append(dataclasses.replace(c, ids=ids, coeff=c.coeff / 2, text=decode(ids),
                                                 finished=more.finished and fits))
            again = dict(zip(bad, judged(student, whole, limits)))
            return [again.get(i, e) for i, e in enumerate(found)]
        with patch.object(Student, "judged", judged_twice):
            return plain(run, rnd)
    with patch.object(loop.Run, "made", mended):
        yield


@contextmanager
def online():
    """Each step's samples are new: what the student as it is by then answers, steered, and the filter keeps.

    As many steps as heal would take with the round's kept answers, 2 * heal_batch answers for each. v and
    dose are the round's, its `made` sets tau and the number of steps; no prompt is held out.
    """
    plain = loop.Run.heal

    def healed(run, rnd):
        with patch.object(heal, "heal", partial(climb, run)):
            return plain(run, rnd)
    with patch.object(loop.Run, "heal", healed):
        yield


def climb(run, model, params, samples, reference, cfg, *, rnd, log, pad_id, seed, **_) -> dict:
    """heal.heal's loss, optimiser and record, with samples of the moment."""
    params, student, rng = list(params), run.student, torch.Generator().manual_seed(seed)
    lam = 0.0 if cfg.reg == "nll" else cfg.lam * (1 + rnd) ** cfg.lam_round_pow
    n_steps, steps = cfg.epochs * math.ceil(len(samples) / cfg.heal_batch), []
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay)
    model.eval()
    for step in range(n_steps):
        asked = torch.randperm(len(student.train), generator=rng)[:2 * cfg.heal_batch].tolist()
        users = [student.train[i] for i in asked]
        made = student.answers(users, f"online {step}", rnd, system=run.system, **run.rounds.steering(rnd))
        judged = [e | dict(prompt=asked[e["prompt"]]) for e in student.judged(made, run.limits, users)]
        fresh = [heal.Sample(c.prompt_ids + c.ids, len(c.prompt_ids), c.prompt) for c in student.kept(judged)]
        if not fresh:
            continue                                    # nothing passed: nothing to learn in this step
        passes = heal.Passes(model, fresh, reference, reg=cfg.reg, pad_id=pad_id, fast=cfg.fast)
        nlls, kls = passes.losses(list(range(len(fresh))))                                  # [n_i] each
        tokens = sum(map(len, nlls))
        nll, share = torch.stack([x.mean() for x in nlls]), torch.tensor([len(x) / tokens for x in nlls])
        div, share = torch.stack([heal.aggregate(x, cfg.kl_agg) for x in kls]), share.to(nll)   # [b] each
        lr = optimizer.param_groups[0]["lr"] = cfg.lr * heal.lr_factor(step, n_steps)
        (share * (nll + lam * torch.relu(div - cfg.tau))).sum().backward()
        gnorm = torch.nn.utils.clip_grad_norm_(params, heal.CLIP, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        values = [(share * nll).sum(), (share * div).sum(), div.max(), (div > cfg.tau).float().mean(), gnorm]
        row = dict(zip(("nll", "div", "div_max", "fired", "gnorm"), torch.stack(values).tolist()))
        steps.append(dict(step=step, epoch=step * cfg.epochs // n_steps, tokens=tokens, lr=lr, **row))
        log(steps[-1])
    if not steps:
        raise RuntimeError(f"none of {n_steps} batches of answers passed the filter: take a lower --coeff")
    ends = [[s for s in steps if s["epoch"] == end["epoch"]] for end in (steps[0], steps[-1])]
    first, last = (sum(s["tokens"] * s["nll"] for s in x) / sum(s["tokens"] for s in x) for x in ends)
    return dict(steps=steps, skipped=[], nll_first=first, nll_last=last, val_nll_before=None,
                val_nll_after=None, fired_share=sum(s["fired"] > 0 for s in steps) / len(steps), lam_eff=lam,
                tau=cfg.tau, n_train=2 * cfg.heal_batch * n_steps, n_val=0, warning=None,
                shortcuts=passes.head is not None)


VARIANTS = dict(none=nullcontext, hinge=hinge, falling=falling, mask=mask, repair=repair, online=online)


@dataclasses.dataclass(frozen=True)
class VariantConfig(loop.LoopConfig):
    """loop: model, data, rounds, gate, and what is exchanged"""
    variant: Literal[tuple(VARIANTS)] = loop.opt("none", "what is exchanged in the loop")


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    with patch.object(loop, "GROUPS", (VariantConfig, *loop.GROUPS[1:])):
        with VARIANTS[loop.parse(argv)[0].variant]():
            return loop.main(argv)


if __name__ == "__main__":
    sys.exit(main())
