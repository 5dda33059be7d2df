"""Tests of the concept files, in their order: heal, lora, steer, evalmfv, loop; then what the house promises.

`pytest`: CPU, offline, small random models made in code and the embedded one. tests/ has those of the rest.
"""
import ast
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import inspect
import io
import json
import math
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import MistralConfig, MistralForCausalLM

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT / folder) for folder in (".", "pocket", "tests")]

import common                                                   # noqa: E402
import evalmfv                                                  # noqa: E402
import heal as heal_py                                          # noqa: E402
import loop                                                     # noqa: E402
import lora as lora_py                                          # noqa: E402
import steer                                                    # noqa: E402
from common import tiny_model, tiny_tokenizer                   # noqa: E402
from evalmfv import FOUNDATIONS       # noqa: E402
from heal import (AGGREGATES, HealConfig, Passes, Sample, aggregate, divergences, forward_kl,  # noqa: E402
                  heal, lr_factor, naive_losses, reverse_kl, split, token_losses)
from lora import LoraConfig, attach                             # noqa: E402
from steer import (
    Completion,
    Limits,
    SteerConfig,
    calibrate_limits,
    choose,
    fit_vectors,
    generate,  # noqa: E402
    judge,
    readings,
    render,
    repeats,
    steered,
    token_nll,
)
from tools import folder as files                               # noqa: E402
from tools import inputs, search, size                          # noqa: E402
from tools import model as models                               # noqa: E402
from tools.files import read_tensors                            # noqa: E402
from tools.foresee import foresee                               # noqa: E402

torch.set_num_threads(1)                              # small models: a second thread costs more

SPECIALS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = ("<|bos|>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
            "{% if not (loop.last and continue_final_message) %}<|end|>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")


# ==== heal.py: the barrier and the round ====================================================================

def heal_case(dtype=torch.float32, history=0):
    """A tiny model, a stack of `history` folded rounds, noise in the current round, six uneven samples."""
    model = tiny_model(tiny_tokenizer(), dtype=dtype)
    if dtype == torch.float64:                                  # transformers' norm rounds to float32
        for name, norm in [(name, m) for name, m in model.named_modules() if name.endswith("norm")]:
            exact = torch.nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon, dtype=dtype)
            exact.requires_grad_(False)
            model.set_submodule(name, exact)                    # the weights are ones in both
    stack = attach(model, r=4, alpha=8, layers=[1, 2])
    for rnd in range(history + 1):
        heal_noise(stack, seed=rnd)
        if rnd < history:
            stack.fold()
    rng = torch.Generator().manual_seed(9)
    samples = [Sample(torch.randint(6, 262, (n_prompt + n,), generator=rng).tolist(), n_prompt, group)
               for group, (n_prompt, n) in enumerate([(3, 5), (1, 1), (6, 9), (2, 12), (4, 3), (5, 7)])]
    return model, stack, samples


def heal_noise(stack, seed=0):
    rng = torch.Generator().manual_seed(seed)
    for p in stack.parameters():
        p.data.copy_(0.1 * torch.randn(p.shape, generator=rng))


def heal_base(stack):
    return lambda: stack.gated(0, 0)


def heal_nll(model, stack, samples):
    return Passes(model, samples, heal_base(stack)).mean_nll(list(range(len(samples))), 50)


def heal_logits(n=5, V=7, seed=0, dtype=torch.float64, size=3.0):
    return size * torch.randn(n, V, generator=torch.Generator().manual_seed(seed), dtype=dtype)     # [n, V]


def heal_flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


def heal_run(model, stack, samples, tau=0.0, seed=0, rnd=0, held_out=False, **options):
    """heal() without its warnings and, as a lone prompt is never held out, without validation."""
    cfg = HealConfig(**{"tau": tau, "lr": 1e-3, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = samples if held_out else [s._replace(group=0) for s in samples]
        return heal(model, stack.parameters(), samples, heal_base(stack), cfg, seed=seed, rnd=rnd,
                    spectral=(lambda: size.spectral(stack)) if cfg.spectral else None)


def heal_numbers(record, keys=("nll", "div", "gnorm")):
    return torch.tensor([[s[key] for key in keys] for s in record["steps"]])


def heal_double_loop(logits, ref_logits):
    """KL(student || reference) at each position, number by number."""
    out = []
    for z, z0 in zip(logits.tolist(), ref_logits.tolist()):
        total, total0 = sum(map(math.exp, z)), sum(map(math.exp, z0))
        out.append(sum(math.exp(a) / total * math.log((math.exp(a) / total) / (math.exp(b) / total0))
                       for a, b in zip(z, z0)))
    return out


def test_heal_reverse_kl_equals_a_double_loop_and_torch_distributions():
    p, q = heal_logits(seed=0), heal_logits(seed=1)
    naive = torch.tensor(heal_double_loop(p, q), dtype=torch.float64)
    peer = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=p),
                                             torch.distributions.Categorical(logits=q))
    assert torch.allclose(reverse_kl(p, q), naive, atol=1e-12)
    assert torch.allclose(reverse_kl(p, q), peer, atol=1e-12)
    assert torch.allclose(forward_kl(q, p), peer, atol=1e-12)   # directions: forward is the swap
    assert not torch.allclose(forward_kl(p, q), peer, atol=1e-2)


def test_heal_kl_is_computed_in_float32_when_logits_are_bfloat16():
    p = heal_logits(4, 5000, dtype=torch.float32).bfloat16()
    q = (p.float() + 0.05 * heal_logits(4, 5000, seed=1, dtype=torch.float32, size=1.0)).bfloat16()
    kl, exact = reverse_kl(p, q), reverse_kl(p.double(), q.double())
    assert kl.dtype == torch.float32 and (kl.double() - exact).abs().max() < 1e-6


@pytest.mark.parametrize("how", AGGREGATES)
def test_heal_gradients_of_the_barrier(how):
    """Right in float64, finite where student and reference agree, exactly zero below tau."""
    p, q = heal_logits().requires_grad_(), heal_logits(seed=1)
    for divergence in (reverse_kl, forward_kl):
        assert torch.autograd.gradcheck(lambda x: aggregate(divergence(x, q), how), p)
    same = heal_logits(dtype=torch.float32).requires_grad_()
    div = aggregate(reverse_kl(same, same.detach().clone()), how)
    div.backward()
    assert div.item() == 0 and same.grad.abs().max() < 1e-7     # nan fails this too
    div = aggregate(reverse_kl(p, q), how)
    for tau, is_zero in ((div.item() * 1.001, True), (div.item() * 0.999, False)):
        grad, = torch.autograd.grad(torch.relu(div - tau), p, retain_graph=True)
        assert torch.equal(grad, torch.zeros_like(grad)) == is_zero, (tau, grad)


def test_heal_aggregates_are_ordered_and_agree_on_a_constant_and_rmse_sees_a_short_loop():
    rng = torch.Generator().manual_seed(0)
    for n in (1, 2, 7, 60):
        kl = torch.rand(n, generator=rng) ** 4
        values = {how: aggregate(kl, how).item() for how in AGGREGATES}
        assert values["mean"] <= values["rmse"] + 1e-7 and values["rmse"] <= values["max"] + 1e-7, values
        assert values["p95"] <= values["max"]
        for how in AGGREGATES:
            assert abs(aggregate(torch.full((n,), 0.3), how).item() - 0.3) < 1e-6, how
    kl = torch.zeros(60); kl[:4] = 5.7                          # a four-token loop in a clean completion
    assert aggregate(kl, "mean") < 0.5 < aggregate(kl, "rmse")
    assert abs(aggregate(kl, "rmse").item() - 5.7 * (4 / 60) ** 0.5) < 1e-6


def test_heal_losses_are_those_of_each_sample_run_alone():
    model, stack, samples = heal_case()
    nlls, kls = Passes(model, samples, heal_base(stack)).losses([4, 0, 3, 2, 1])
    for sample, nll, kl in zip([samples[i] for i in (4, 0, 3, 2, 1)], nlls, kls, strict=True):
        ids = torch.tensor([sample.ids])                        # [1, T], no padding and no mask
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0].log_softmax(-1)                   # [T, V]
            with stack.gated(0, 0):
                logq = model(input_ids=ids).logits[0].log_softmax(-1)               # [T, V]
        want = range(sample.n_prompt - 1, len(sample.ids) - 1)  # position t predicts token t + 1
        alone = torch.tensor([-logp[t, sample.ids[t + 1]] for t in want])
        assert torch.allclose(nll, alone, atol=1e-4), (nll - alone).abs().max()
        alone = torch.stack([(logp[t].exp() * (logp[t] - logq[t])).sum() for t in want])
        assert torch.allclose(kl, alone, atol=1e-4), (kl - alone).abs().max()


def test_heal_batch_composition_and_padding_do_not_change_a_sample():
    model, stack, samples = heal_case(torch.float64)
    alone = divergences(model, samples, heal_base(stack), pass_tokens=1)
    for pass_tokens, pad_id in ((1000, 0), (40, 7)):
        together = divergences(model, samples, heal_base(stack), pass_tokens=pass_tokens, pad_id=pad_id)
        for a, b in zip(alone, together, strict=True):
            assert torch.allclose(a, b, atol=1e-10), (a - b).abs().max()
    assert [len(kl) for kl in alone] == [5, 1, 9, 12, 3, 7] and all(kl.min() > 0 for kl in alone)
    passes = Passes(model, samples, heal_base(stack))
    assert abs(passes.mean_nll([0, 1, 2, 3], 1) - passes.mean_nll([2, 3, 0, 1], 60)) < 1e-10


@pytest.mark.parametrize("reg, lam", [("nll", 0.0), ("kl_rev", 3.0), ("kl_fwd", 3.0)])
def test_heal_passes_of_any_size_add_up_to_one_step(reg, lam):
    rows, weights = [], []
    for pass_tokens in (1, 40, 1000):
        model, stack, samples = heal_case(torch.float64, history=1)
        record = heal_run(model, stack, samples, tau=0.05, reg=reg, lam=lam, heal_batch=6,
                          pass_tokens=pass_tokens,
                          epochs=3, spectral=0.1)
        rows.append(heal_numbers(record))
        weights.append(heal_flat(stack.parameters()))
    for other_rows, other in zip(rows[1:], weights[1:]):
        assert torch.allclose(rows[0], other_rows, rtol=1e-4)
        assert torch.allclose(weights[0], other, atol=1e-5)     # float32 weights after three Adam steps


def test_heal_loss_is_the_documented_one():
    """The gradient of the formula, written out sample by sample, is what one step reports as its norm."""
    model, stack, samples = heal_case(torch.float64)
    tau, lam, total = 0.2, 5.0 * 3 ** 0.5, 0                    # round 2: lam * (1 + 2) ** 0.5
    for s in samples:
        (nll,), (kl,) = Passes(model, [s], heal_base(stack)).losses([0])
        total = total + len(kl) * (nll.mean() + lam * torch.relu((kl.square().mean()).sqrt() - tau))
    loss = total / sum(len(s.answer) for s in samples) + 0.3 * size.spectral(stack)
    expected = heal_flat(torch.autograd.grad(loss, stack.parameters())).norm().item()
    record = heal_run(model, stack, samples, tau=tau, rnd=2, lam=5.0, lam_round_pow=0.5, heal_batch=6,
                      pass_tokens=30,
                      epochs=1, spectral=0.3)
    assert abs(record["steps"][0]["gnorm"] - expected) < 1e-4 * expected            # reported before clipping
    assert abs(record["lam_eff"] - lam) < 1e-12 and 0 < record["steps"][0]["fired"] < 1


@pytest.mark.parametrize("history", [0, 2])
def test_heal_gradient_of_any_round_equals_finite_differences(history):
    """float64 base, float32 adapters: every perturbed value is a float32, so the step is measured."""
    model, stack, samples = heal_case(torch.float64, history=history)
    params, sizes = stack.parameters(), [len(s.answer) for s in samples]

    def loss():
        nlls, kls = Passes(model, samples, heal_base(stack)).losses(list(range(6)))
        each = [n * (nll.mean() + 5.0 * torch.relu(aggregate(kl, "rmse") - 0.05))
                for n, nll, kl in zip(sizes, nlls, kls)]
        return sum(each) / sum(sizes)

    loss().backward()
    rng = torch.Generator().manual_seed(0)
    for p in params[::3]:
        i = int(torch.randint(p.numel(), (1,), generator=rng))
        flat, start = p.data.view(-1), p.data.view(-1)[i].item()
        ends = []
        for sign in (-1, 1):
            flat[i] = start + sign * 1e-3
            with torch.no_grad():
                ends.append((flat[i].item(), loss().item()))
        flat[i] = start
        slope, grad = (ends[1][1] - ends[0][1]) / (ends[1][0] - ends[0][0]), p.grad.view(-1)[i].item()
        assert abs(slope - grad) < 1e-4 * abs(slope) + 1e-6, (slope, grad)        # the step's own error: 1e-6


def test_heal_leaves_the_base_without_gradient_and_unchanged_bit_for_bit():
    model, stack, samples = heal_case(history=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = [t for lora in stack.layers.values() for pair in lora.rounds for t in pair[:2]]
    frozen = [t.clone() for t in folded]
    adapters = [p.detach().clone() for p in stack.parameters()]
    heal_run(model, stack, samples, epochs=2)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(frozen, folded))
    assert not any(torch.equal(a, b) for a, b in zip(adapters, stack.parameters()))


def test_heal_lowers_nll_and_a_tight_barrier_keeps_D_lower_than_nll_alone():
    ends = {}
    for reg in ("nll", "kl_rev"):
        model, stack, samples = heal_case()
        stack.drop()                                            # the round starts at the base
        before = heal_nll(model, stack, samples)
        record = heal_run(model, stack, samples, tau=0.02, reg=reg, lam=30.0, lr=5e-3, epochs=10)
        div = [aggregate(kl, "rmse").item() for kl in divergences(model, samples, heal_base(stack))]
        ends[reg] = before, heal_nll(model, stack, samples), max(div)
        assert record["steps"][0]["div"] == 0                   # B = 0: the student is the reference
    assert ends["nll"][1] < ends["nll"][0] - 1 and ends["kl_rev"][1] < ends["kl_rev"][0] - 0.2, ends
    assert ends["kl_rev"][2] < 0.2 * ends["nll"][2], ends


def test_heal_holds_out_whole_prompts_and_reports_nll_of_tokens_before_and_after():
    model, stack, samples = heal_case()
    twice = samples + [s._replace(ids=s.ids[:-1] + [9]) for s in samples if len(s.answer) > 1]
    train, val = ([twice[i] for i in part] for part in split(twice, 0.15, torch.Generator().manual_seed(0)))
    assert not {s.group for s in train} & {s.group for s in val}
    assert len({s.group for s in val}) == 1 and len(train) + len(val) == len(twice)
    start = [p.detach().clone() for p in stack.parameters()]
    record = heal_run(model, stack, twice, epochs=1, held_out=True)
    after = heal_nll(model, stack, val)
    for p, value in zip(stack.parameters(), start):
        p.data.copy_(value)
    assert abs(record["val_nll_before"] - heal_nll(model, stack, val)) < 1e-5
    assert abs(record["val_nll_after"] - after) < 1e-5
    assert record["n_train"] == len(train) and record["n_tokens"] == sum(len(s.answer) for s in train)
    still = heal_run(model, stack, twice, epochs=2, held_out=True, lr=1e-12)  # an epoch's mean, not a batch's
    assert still["nll_first"] == pytest.approx(heal_nll(model, stack, train), abs=1e-5) == still["nll_last"]
    alone = heal_run(model, stack, [samples[0]], epochs=1)      # a lone prompt is trained on
    assert alone["n_train"] == 1 and alone["val_nll_before"] is None


@pytest.mark.parametrize("fast", [True, False])
def test_heal_sees_every_sample_once_an_epoch_and_the_reference_once_a_round(fast):
    model, stack, samples = heal_case()
    seen = {True: [], False: []}

    def count(module, args, given):
        is_base = stack.layers["model.layers.1.self_attn.q_proj"].current == 0
        seen[is_base] += given["attention_mask"].sum(1).tolist()
    model.register_forward_pre_hook(count, with_kwargs=True)
    record = heal_run(model, stack, samples, heal_batch=4, epochs=3, fast=fast)
    steps = [(s["step"], s["epoch"]) for s in record["steps"]]
    assert steps == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    lengths = [len(s.ids) for s in samples]                     # 4 + 2 samples: a short last batch is a step
    assert sorted(seen[False]) == sorted(3 * lengths + fast * 2 * [lengths[0]])     # + two probes of the head
    assert sorted(seen[True]) == sorted((1 if fast else 3) * lengths)


def test_heal_is_reproduced_by_its_seed_and_leaves_the_global_generator_alone():
    ends = []
    for seed in (0, 0, 1):
        model, stack, samples = heal_case()
        state = torch.get_rng_state()
        heal_run(model, stack, samples, heal_batch=2, epochs=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        ends.append(heal_flat(stack.parameters()))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_heal_learning_rate_warms_up_then_falls_and_no_step_is_idle():
    factors = [lr_factor(step, 40) for step in range(40)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.01 and abs(lr_factor(22, 40) - 0.5) < 1e-12
    assert lr_factor(0, 1) == 1


def test_heal_warns_of_a_barrier_that_never_or_always_fired():
    model, stack, samples = heal_case()
    for tau, message in ((1e3, "never fired"), (1e-9, "always fired")):
        with pytest.warns(UserWarning, match=message):
            cfg = HealConfig(lr=1e-3, tau=tau, epochs=1)
            record = heal(model, stack.parameters(), samples, heal_base(stack), cfg)
        assert message in record["warning"] and record["fired_share"] == (tau < 1)
    cfg = HealConfig(lr=1e-3, tau=1e3, epochs=1, reg="nll")     # no barrier, but D is measured
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = heal(model, stack.parameters(), samples, heal_base(stack), cfg)
    assert record["warning"] is None and record["lam_eff"] == 0 and record["steps"][0]["div"] > 0


def test_heal_skips_a_step_that_is_not_finite_and_gives_up_after_three_in_a_row():
    for bad, n_bad in (({3}, 1), ({0, 1, 2}, 3), ({0, 2, 3}, 3)):
        model, stack, samples = heal_case()
        calls = []

        def spoil(module, args, output):                        # one student forward of six rows per step
            if stack.layers["model.layers.1.self_attn.q_proj"].current and len(output.last_hidden_state) == 6:
                calls.append(0)
                if len(calls) - 1 in bad:
                    output.last_hidden_state = output.last_hidden_state * float("nan")
        model.model.register_forward_hook(spoil)
        if bad == {0, 1, 2}:
            with pytest.raises(RuntimeError, match="3 steps in a row.*lower lr"):
                heal_run(model, stack, samples, heal_batch=6, epochs=6)
        else:
            record = heal_run(model, stack, samples, heal_batch=6, epochs=6)
            assert record["skipped"] == sorted(bad) and len(record["steps"]) == 6 - n_bad
        assert all(p.isfinite().all() for p in stack.parameters())


@pytest.mark.parametrize("options", [dict(reg="wd"), dict(kl_agg="median"), dict(lam=-1.0),
                                     dict(tau=math.inf),
                                     dict(lr=0.0), dict(epochs=0), dict(pass_tokens=0), dict(heal_batch=0),
                                     dict(lam_round_pow=math.nan), dict(spectral=math.nan),
                                     dict(weight_decay=-1)])
def test_heal_config_names_the_bad_option(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        HealConfig(**options)


def test_heal_refuses_bad_arguments_before_any_forward():
    model, stack, samples = heal_case()
    params, base, cfg = stack.parameters(), heal_base(stack), HealConfig(lr=1e-3, tau=1.0)
    others, (h, h0, W, targets, _) = [s._replace(ids=s.ids[:-1] + [9]) for s in samples], heal_head()
    model.forward = None                                        # a forward would be a TypeError
    for bad, message in (
            (lambda: heal(model, params, [], base, cfg), "no samples"),
            (lambda: heal(model, params, [Sample([1, 2], 2, 0)], base, cfg), "sample 0: n_prompt=2 of 2"),
            (lambda: heal(model, params, [Sample([1, 2], 0, 0)], base, cfg), "sample 0: n_prompt=0"),
            (lambda: heal(model, [], samples, base, cfg), "params: got 0"),
            (lambda: heal(model, [params[0].bfloat16()], samples, base, cfg), "bfloat16"),
            (lambda: heal(model, params, samples, base, HealConfig(lr=1e-3)), "cfg.tau=None.*calibrate"),
            (lambda: heal(model, params, samples, base, HealConfig(tau=1.0)), "cfg.lr=None.*calibrate"),
            (lambda: heal(model, params, samples, base, HealConfig(lr=1e-3, tau=1, spectral=0.1)),
             "needs spectral="),
            (lambda: divergences(model, samples, base, reg="wd"), "reg='wd'"),
            (lambda: divergences(model, samples, base, ref_samples=others), "same completions"),
            (lambda: aggregate(torch.ones(3), "median"), "how='median': expected mean, rmse, p95, max"),
            (lambda: aggregate(torch.ones(0), "rmse"), "one sample"),
            (lambda: aggregate(torch.ones(2, 3), "rmse"), "one sample"),            # would pool two samples
            (lambda: reverse_kl(h, h0[:1]), "one shape"),
            (lambda: token_losses(h, h0[:3], W, targets), r"\[3, 16\]"),
            (lambda: token_losses(h, h0, W.T, targets), r"not \[N, d\]"),
            (lambda: token_losses(h, h0, W.clone().requires_grad_(), targets), "head requires a gradient"),
            (lambda: token_losses(h, h0, W, targets, reg="wd"), "reg='wd'")):
        with pytest.raises(ValueError, match=message):
            bad()


@pytest.mark.filterwarnings("ignore:the barrier")
def test_heal_works_with_any_adapter_and_any_way_to_switch_it_off():
    """No lora.py, no transformers: a bag-of-tokens model whose adapter is one bias on the logits."""
    class Bag(torch.nn.Module):
        def __init__(self):
            super().__init__()
            rng = torch.Generator().manual_seed(0)
            self.table = torch.nn.Parameter(torch.randn(11, 11, generator=rng), requires_grad=False)
            self.bias, self.on = torch.nn.Parameter(torch.zeros(11)), True

        def forward(self, input_ids, attention_mask):
            self.logits = self.table[input_ids] + (self.bias if self.on else 0)     # [B, T, V]
            return self

        @contextlib.contextmanager
        def switched_off(self):
            self.on = False
            yield
            self.on = True

    model = Bag()
    samples = [Sample([1, 2, 3, 3, 3, 3], 2, g) for g in range(8)]
    record = heal(model, [model.bias], samples, model.switched_off, HealConfig(lr=0.1, lam=0.5, tau=0.1))
    assert record["val_nll_after"] < record["val_nll_before"] - 0.1 and model.bias.argmax() == 3


# ---- heal: the losses without logits, and the passes that are saved


def heal_head(N=37, V=301, d=16, dtype=torch.float64, seed=0, shift=0.3):
    """hidden, ref_hidden [N, d], weight [V, d], targets [N], bias [V]; logits of a few nats."""
    rng = torch.Generator().manual_seed(seed)
    h, dh, W = (torch.randn(n, d, generator=rng, dtype=torch.float64) for n in (N, N, V))
    b, targets = torch.randn(V, generator=rng, dtype=torch.float64), torch.randint(V, (N,), generator=rng)
    return h.to(dtype), (h + shift * dh).to(dtype), W.to(dtype), targets, b.to(dtype)


@pytest.mark.parametrize("how", [*AGGREGATES, "barrier alone"])
@pytest.mark.parametrize("reg", ["kl_rev", "kl_fwd"])
def test_heal_token_losses_equal_naive_autograd_in_float64(reg, how):
    h, h0, W, targets, b = heal_head()
    for bias, cap, tile in ((None, 0.0, 64), (b, 0.0, 50), (None, 5.0, 301), (b, 5.0, 7), (b, 5.0, 1000)):
        values, grads = [], []
        for tiled in (True, False):
            x = h.clone().requires_grad_()
            if tiled:
                nll, kl = token_losses(x, h0, W, targets, bias=bias, cap=cap, reg=reg, tile=tile)
            else:
                logits = [z if bias is None else z + b for z in (x @ W.T, h0 @ W.T)]
                capped = [z if not cap else cap * (z / cap).tanh() for z in logits]
                nll, kl = naive_losses(*capped, targets, reg)
            assert nll.dtype == kl.dtype == torch.float64
            D = aggregate(kl[:20], "rmse" if how == "barrier alone" else how)    # the rest: no gradient in KL
            loss = (how != "barrier alone") * nll.mean() + 5 * torch.relu(D - 0.1)
            values.append(torch.cat([nll, kl]))
            grads.append(torch.autograd.grad(loss, x)[0])
        assert torch.allclose(*values, rtol=1e-10, atol=1e-12), (values[0] - values[1]).abs().max()
        assert (grads[0] - grads[1]).abs().max() <= 1e-10 * grads[1].abs().max() and grads[1].abs().max() > 0


def test_heal_token_losses_survive_large_logits_and_agree_on_which_bits_are_zero():
    h, h0, W, targets, _ = heal_head(dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        x = h.to(dtype).clone().requires_grad_()
        nll, kl = token_losses(x, h.to(dtype), W.to(dtype), targets, tile=64)       # student = reference
        assert kl.eq(0).all() and nll.dtype == torch.float32
        (nll.sum() * 0 + aggregate(kl, "rmse")).backward()
        assert x.grad.eq(0).all() and x.grad.dtype == dtype
    x, x0, W = 60 * h.double(), 60 * h0.double(), W.double()    # logits of +-240
    tiled, naive = token_losses(x, x0, W, targets, tile=64), naive_losses(x @ W.T, x0 @ W.T, targets)
    assert naive[1].max() > 100 and all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(tiled, naive))


@pytest.mark.parametrize("shift, better", [(0.012, 400), (0.06, 15)])        # mean KL about .003 and .07 nats
def test_heal_token_losses_in_bfloat16_are_nearer_the_truth_than_a_bfloat16_softmax(shift, better):
    h, h0, W, targets, _ = heal_head(N=64, V=4096, d=128, dtype=torch.bfloat16, shift=shift)
    W = W / 4                                                   # logits of a few nats; exact
    x = h.double().requires_grad_()
    _, truth = naive_losses(x @ W.double().T, h0.double() @ W.double().T, targets)
    aggregate(truth, "rmse").backward()
    y = h.clone().requires_grad_()
    _, kl = token_losses(y, h0, W, targets, tile=512)
    aggregate(kl, "rmse").backward()
    logp, logq = ((z @ W.T).log_softmax(-1) for z in (h, h0))   # what the peers do
    peers = (logp.exp() * (logp - logq)).sum(-1)
    error, theirs = ((k.double() - truth).abs().mean().item() for k in (kl, peers))
    assert theirs / error >= better, (truth.mean().item(), theirs, error, theirs / error)
    assert (y.grad.double() - x.grad).norm() <= 0.03 * x.grad.norm()


def test_heal_token_losses_never_hold_more_than_a_tile_of_the_logits():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                own = isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given
                self.numel = max(self.numel, t.numel() if own else 0)
            return out
    h, h0, W, targets, _ = heal_head(N=40, V=5000, d=16, dtype=torch.bfloat16)
    given, x = {W.untyped_storage().data_ptr()}, h.requires_grad_()
    with Largest() as seen:
        nll, kl = token_losses(x, h0, W, targets, tile=100)
        (nll.mean() + kl.mean()).backward()
    assert seen.numel == 40 * 100, seen.numel                   # N * tile, of N * V = 200,000


def heal_families():
    from transformers import (CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig,
                              GraniteForCausalLM, PhiConfig, PhiForCausalLM)
    tiny = dict(vocab_size=262, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return {"soft-capped": (Gemma2ForCausalLM, Gemma2Config(**tiny, head_dim=8, final_logit_softcapping=3.0)),
            "divided": (GraniteForCausalLM, GraniteConfig(**tiny, logits_scaling=7.0)),
            "multiplied": (CohereForCausalLM, CohereConfig(**tiny, logit_scale=0.3)),
            "biased": (PhiForCausalLM, PhiConfig(**tiny | dict(num_key_value_heads=4)))}


@pytest.mark.parametrize("name", ["soft-capped", "divided", "multiplied", "biased", "unknown", "edited",
                                  "hooked", "trained"])
def test_heal_reads_any_head_as_the_model_does(name):
    """Exact without logits where the config tells the head; from the model's own logits where it does not."""
    torch.manual_seed(0)
    families = heal_families()
    cls, config = families.get(name, families["divided"])
    model = cls(config).eval().requires_grad_(False)
    forward = model.forward

    def other(*args, **kwargs):
        out = forward(*args, **kwargs)
        if name == "unknown":
            out.logits = out.logits.square()
        else:
            out.logits[..., [100, 200]] = -50.0             # past the one column that an idle head would make
        return out
    if name == "biased":
        model.lm_head.bias.data.normal_()
    elif name in ("unknown", "edited"):
        model.forward = other
    elif name == "hooked":
        model.lm_head.register_forward_hook(lambda m, a, out: out + 1.0)
    stack, samples, results = attach(model, r=4, alpha=8, layers=[1, 2]), heal_case()[2], []
    model.lm_head.weight.requires_grad_(name == "trained")
    heal_noise(stack)
    for fast in (True, False):
        passes = Passes(model, samples, heal_base(stack), fast=fast)
        assert (passes.head is not None) == (fast and name in families)
        for _ in range(2):                                      # the second time the reference from memory
            nlls, kls = passes.losses(list(range(6)))
        loss = torch.cat(nlls).mean() + sum(aggregate(kl, "rmse") for kl in kls)
        results.append((heal_flat([*nlls, *kls]), heal_flat(torch.autograd.grad(loss, stack.parameters()))))
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-4 * b.abs().max()), (a - b).abs().max()
    logits = model(input_ids=torch.tensor([samples[0].ids])).logits[0, 2:-1]
    exact = torch.nn.functional.cross_entropy(logits, torch.tensor(samples[0].answer), reduction="none")
    assert torch.allclose(nlls[0], exact, atol=1e-3)


@pytest.mark.parametrize("reg, how, tau", [("kl_rev", "rmse", 0.0), ("kl_rev", "rmse", 0.2),
                                           ("kl_rev", "p95", 0.1),
                                           ("kl_fwd", "rmse", 0.1), ("nll", "mean", 0.0)])
def test_heal_shortcuts_change_no_number_of_a_round(reg, how, tau):
    runs = []
    for fast in (True, False):
        model, stack, samples = heal_case(history=1)
        record = heal_run(model, stack, samples, tau=tau, reg=reg, kl_agg=how, heal_batch=2, epochs=3,
                          fast=fast)
        assert record["shortcuts"] is fast
        runs.append(heal_numbers(record))
    assert len(runs[0]) == 9 and torch.allclose(*runs, rtol=1e-5, atol=1e-5), (runs[0] - runs[1]).abs().max()


def test_heal_leaves_the_model_as_it_was_also_after_an_exception():
    model, stack, samples = heal_case()
    passes = Passes(model, samples, heal_base(stack))
    model.model.layers[3].register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        passes.losses([0])
    assert passes.head and not any("forward" in vars(m) for m in model.modules())


def test_heal_out_of_memory_halves_the_pass_and_changes_no_number():
    results = []
    for limit in (100, 2, 3):
        model, stack, samples = heal_case(torch.float64)

        def full(module, args, kwargs):
            if len(kwargs["input_ids"]) > limit:
                cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory: no room")
                raise [torch.OutOfMemoryError("no room"), cpu][limit % 2]
        model.register_forward_pre_hook(full, with_kwargs=True)
        results.append(heal_numbers(heal_run(model, stack, samples, heal_batch=6, epochs=2)))
    assert all(torch.allclose(results[0], other, rtol=1e-6) for other in results[1:])
    model.register_forward_pre_hook(lambda m, a: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all")))
    with pytest.raises(torch.OutOfMemoryError):
        heal_run(model, stack, samples, heal_batch=6, epochs=2)


def test_heal_pieces_fit_the_budget_and_lose_nothing():
    model, stack, _ = heal_case()
    samples = [Sample([1] * n, 1, 0) for n in (9, 3, 3, 2, 40, 5)]
    passes = Passes(model, samples, heal_base(stack))
    for budget in (1, 10, 27, 90, 1000):
        cut = passes.pieces([4, 0, 5, 1, 2, 3], budget)
        assert sum(cut, []) == [4, 0, 5, 1, 2, 3]
        assert all(len(p) == 1 or len(p) * max(len(samples[i].ids) for i in p) <= budget for p in cut)
    assert [len(p) for p in passes.pieces([4, 0, 5, 1, 2, 3], 10)] == [1, 1, 2, 2]


def test_heal_divergences_of_other_prompts_compare_the_same_completion():
    model, stack, samples = heal_case(torch.float64)
    others = [Sample([7, 8, 9, *s.answer], 3, s.group) for s in samples]
    with stack.gated(0, 0):
        kls = divergences(model, samples, contextlib.nullcontext, ref_samples=others)
        for s, other, kl in zip(samples, others, kls, strict=True):
            p, q = (model(input_ids=torch.tensor([x.ids])).logits[0, x.n_prompt - 1:-1] for x in (s, other))
            assert torch.allclose(kl, reverse_kl(p, q), atol=1e-10) and kl.max() > 0


def heal_alone(folder, *command):
    """What python prints in a folder that holds nothing but heal.py."""
    shutil.copy(heal_py.__file__, folder)
    out = subprocess.run([sys.executable, "-E", *command], cwd=folder, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return out.stdout


def test_heal_imports_the_standard_library_and_torch_only_and_its_demo_computes_its_table(tmp_path):
    names = set()
    for node in ast.walk(ast.parse(Path(heal_py.__file__).read_text())):            # nested imports too
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or "").split(".")[0])
        assert getattr(node, "id", "") != "__import__" and getattr(node, "attr", "") != "import_module"
    assert "torch" in names and names <= set(sys.stdlib_module_names) | {"torch"}, names

    printed = {line.split()[0]: line.split()[1:] for line in heal_alone(tmp_path, "heal.py").splitlines()[1:]}
    with contextlib.redirect_stdout(io.StringIO()):
        demo = runpy.run_path(heal_py.__file__, run_name="__main__")
    expected = []
    for logits in (demo["shift"], demo["loop"]):
        kl = sorted(heal_double_loop(logits.double(), demo["base"].double()))
        at = 0.95 * (len(kl) - 1)
        low, high = kl[math.floor(at)], kl[math.ceil(at)]
        expected.append({"mean": sum(kl) / len(kl), "rmse": math.sqrt(sum(x * x for x in kl) / len(kl)),
                         "p95": low + (at - math.floor(at)) * (high - low), "max": kl[-1]})
    assert set(printed) == set(expected[0])
    for how, (shift, loop, ratio, *verdict) in printed.items():
        assert float(shift) == pytest.approx(expected[0][how], abs=6e-4), how
        assert float(loop) == pytest.approx(expected[1][how], abs=6e-4), how
        assert ("lets" in verdict) == (expected[1][how] < 0.5) and float(shift) < 0.5


def test_heal_alone_heals_a_peft_model_by_its_docstring(tmp_path):
    pytest.importorskip("peft", reason="peft is not installed: pip install -r .ci/requirements.txt")
    code = heal_py.__doc__.split("for example:\n\n")[1].split("\n\n")[0]
    print_it = heal_alone(tmp_path, "-c", f"""
import sys, torch
sys.path.insert(0, ".")                                         # -E keeps the folder out where -c is given
from heal import HealConfig, Sample, heal
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                     num_attention_heads=2, num_key_value_heads=2))
model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
pairs_of_ids = [([3, 4 + i], [7, 8, 9, 7, 8, 9]) for i in range(8)]
if True:
{code}
with model.disable_adapter():
    assert record["steps"][0]["div"] == 0
assert record["shortcuts"] and record["n_val"] == 1
print(record["nll_first"] > record["nll_last"], record["val_nll_before"] > record["val_nll_after"])
""")
    assert print_it.split() == ["True", "True"]


# ==== lora.py: the gated accumulator ========================================================================

def lora_ids(n=3, T=12, V=262, seed=0):
    return torch.randint(6, V, (n, T), generator=torch.Generator().manual_seed(seed))       # [n, T]


def lora_case(dtype=torch.float32, rounds=0, size=0.3, **kw):
    """A tiny model with a stack and `rounds` folded rounds of seeded noise."""
    model = tiny_model(tiny_tokenizer(), dtype=dtype)
    stack = attach(model, **{"r": 4, "alpha": 8, "layers": [1, 2], **kw})
    for rnd in range(rounds):
        lora_noise(stack, rnd, size)
        stack.fold()
    return model, stack


def lora_noise(stack, seed, size=0.3):
    rng = torch.Generator().manual_seed(100 + seed)
    for p in stack.parameters():
        p.data.copy_(size * torch.randn(p.shape, generator=rng))


def lora_deltas(stack):
    """W-shaped update of the current round, module by module, in float64."""
    return {name: l.scale * l.B.detach().double() @ l.A.detach().double() for name, l in stack.layers.items()}


def lora_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_gates_at_zero_are_the_base_bit_for_bit_whatever_was_folded(dtype):
    ids = lora_ids()
    model = tiny_model(tiny_tokenizer(), dtype=dtype)
    base, weights = lora_logits(model, ids), copy.deepcopy(model.state_dict())
    stack = attach(model, r=4, alpha=8, layers=[1, 2])
    assert torch.equal(lora_logits(model, ids), base)                       # attaching alone changes nothing
    lora_noise(stack, 0); stack.fold(); lora_noise(stack, 1)
    assert not torch.equal(lora_logits(model, ids), base)
    with stack.gated(0, 0):
        assert torch.equal(lora_logits(model, ids), base)
    with stack.gated([0.0], 0):
        assert torch.equal(lora_logits(model, ids), base)
    now = model.state_dict()
    assert now.keys() == weights.keys() and all(torch.equal(now[k], weights[k]) for k in weights)
    stack.remove()
    assert torch.equal(lora_logits(model, ids), base)


def test_lora_gates_open_equal_the_weights_plus_the_sum_of_scaled_products():
    model, stack = lora_case(torch.float64)
    plain, ids = copy.deepcopy(model), lora_ids()
    for hooked in plain.modules():
        hooked._forward_hooks.clear()
    total = {}
    for rnd, gate in enumerate([0.5, 0.25, 1.0]):  # two folded rounds and the current one
        lora_noise(stack, rnd)
        for name, delta in lora_deltas(stack).items():
            total[name] = total.get(name, 0) + gate * delta
        if rnd < 2:
            stack.fold()
    for name, delta in total.items():
        plain.get_submodule(name).weight.data += delta
    stack.gates([0.5, 0.25], 1.0)
    assert torch.allclose(lora_logits(model, ids), lora_logits(plain, ids), atol=1e-6)  # folded B is float32
    assert len(total) == 14 and "model.layers.1.mlp.down_proj" in total     # 7 Linears in each of 2 blocks


def test_lora_fold_keeps_the_function_and_the_next_round_starts_as_no_change():
    model, stack = lora_case(rounds=1)
    lora_noise(stack, 5)
    ids = lora_ids()
    before, parameters = lora_logits(model, ids), stack.parameters()
    stack.fold()
    assert torch.allclose(lora_logits(model, ids), before, atol=1e-4)       # float32, logits of size ten
    assert stack.n_rounds == 2 and size.norm(stack) == 0
    assert all(a is b for a, b in zip(parameters, stack.parameters()))
    with stack.gated(0, 1):  # the folded round left the current pair
        base = lora_logits(model, ids)
    with stack.gated(0, 0):
        assert torch.equal(lora_logits(model, ids), base)


def test_lora_drop_returns_the_model_and_A_to_the_start_of_the_round():
    model, stack = lora_case(rounds=1)
    ids, start = lora_ids(), [p.detach().clone() for p in stack.parameters()]
    before = lora_logits(model, ids)
    lora_noise(stack, 5)
    assert not torch.equal(lora_logits(model, ids), before)
    stack.drop()
    assert torch.equal(lora_logits(model, ids), before)
    assert all(torch.equal(a, b) for a, b in zip(start, stack.parameters()))


def test_lora_A_depends_on_seed_round_and_module_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    model = tiny_model(tiny_tokenizer())
    torch.set_rng_state(expected)
    stack = attach(model, r=4, alpha=8, layers=[1, 2])
    assert torch.equal(torch.get_rng_state(), expected)
    first = [l.A.detach().clone() for l in stack.layers.values()]
    square = [A for A in first if A.shape == first[0].shape]
    assert not any(torch.equal(square[0], A) for A in square[1:])
    lora_noise(stack, 0); stack.fold()
    assert not torch.equal(first[0], next(iter(stack.layers.values())).A)
    again = attach(tiny_model(tiny_tokenizer()), r=4, alpha=8, layers=[1, 2])
    other = attach(tiny_model(tiny_tokenizer()), r=4, alpha=8, layers=[1, 2], seed=1)
    assert torch.equal(first[0], again.parameters()[0]) and not torch.equal(first[0], other.parameters()[0])
    assert 0.9 / 32 ** 0.5 < first[0].abs().max() <= 1 / 32 ** 0.5  # kaiming-uniform: U(+-1 / sqrt(d_in))


def test_lora_gated_restores_the_gates_after_an_exception_and_keeps_rounds_folded_inside():
    model, stack = lora_case(rounds=2)
    stack.gates([0.5, 0.0], 1.0)
    ids = lora_ids()
    before = lora_logits(model, ids)
    with pytest.raises(KeyError):
        with stack.gated(1, 0):
            raise KeyError("stop")
    assert torch.equal(lora_logits(model, ids), before)
    with stack.gated(1, 1):
        lora_noise(stack, 7); stack.fold()
    assert {l.history for l in stack.layers.values()} == {(0.5, 0.0, 1.0)}
    with stack.gated(1, 1):
        stack.unfold()
    assert {l.history for l in stack.layers.values()} == {(0.5, 0.0)}


def test_lora_history_built_under_inference_mode_still_serves_training():
    model, stack = lora_case(rounds=1)
    with torch.inference_mode():
        model(input_ids=lora_ids())
    model(input_ids=lora_ids()).logits.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in stack.parameters())


def test_lora_order_of_rounds_and_their_gates_does_not_matter():
    model, stack = lora_case(rounds=3)
    ids, saved = lora_ids(), [stack.tensors([k]) for k in range(3)]
    stack.gates([0.2, 0.5, 0.9])
    expected = lora_logits(model, ids)
    model, other = lora_case()
    for k in (2, 0, 1):
        other.load_tensors(saved[k])
    other.gates([0.9, 0.2, 0.5])
    assert torch.allclose(lora_logits(model, ids), expected, atol=1e-4)
    other.gates([0.2, 0.5, 0.9])  # gates belong to rounds: another model
    assert not torch.allclose(lora_logits(model, ids), expected, atol=1e-2)


def test_lora_base_gets_no_gradient_and_adapters_are_float32_under_a_bfloat16_base():
    model, stack = lora_case(torch.bfloat16, rounds=1)
    lora_noise(stack, 3)
    model(input_ids=lora_ids()).logits.float().square().mean().backward()
    assert all(p.grad is None for p in model.parameters())
    for p in stack.parameters():
        assert p.dtype == p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0
    assert all(A.dtype == B.dtype == torch.float32 for l in stack.layers.values() for A, B, _ in l.rounds)


def test_lora_spectral_equals_matrix_norm_and_so_does_its_gradient():
    _, stack = lora_case()
    lora_noise(stack, 0)
    sigma = size.spectral(stack)
    sigma.backward()
    pairs = [(l.A.detach().double().requires_grad_(), l.B.detach().double().requires_grad_(), l)
             for l in stack.layers.values()]
    expected = sum(torch.linalg.matrix_norm(l.scale * B @ A, ord=2) for A, B, l in pairs) / len(pairs)
    expected.backward()
    assert abs(sigma.item() - expected.item()) < 1e-5 * expected.item()
    for A, B, l in pairs:
        assert torch.allclose(l.A.grad.double(), A.grad, rtol=1e-4, atol=1e-5)  # float32 against float64
        assert torch.allclose(l.B.grad.double(), B.grad, rtol=1e-4, atol=1e-5)
    deltas = lora_deltas(stack)
    norm = sum(delta.square().sum() for delta in deltas.values()).sqrt().item()
    assert abs(size.norm(stack) - norm) < 1e-5 * norm
    for name, found in size.singular_values(stack).items():
        assert torch.allclose(found, torch.linalg.svdvals(deltas[name])[:4], rtol=1e-4), name


def test_lora_spectral_at_zero_B_is_zero_with_zero_gradient_and_draws_no_random_numbers():
    _, stack = lora_case()
    state = torch.get_rng_state()
    sigma = size.spectral(stack)
    sigma.backward()
    assert sigma.item() == 0 and all(torch.equal(p.grad, torch.zeros_like(p)) for p in stack.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_lora_unfold_takes_a_fold_back_bit_for_bit_and_training_goes_on_from_there():
    model, stack = lora_case(rounds=1, alpha=10, r=3)                       # a scale that is no power of two
    ids, params = lora_ids(), stack.parameters()
    lora_noise(stack, 5)
    before, kept = lora_logits(model, ids), [p.detach().clone() for p in params]
    stack.fold()
    folded = lora_logits(model, ids)
    stack.unfold()
    assert all(a is b and torch.equal(a, c) for a, b, c in zip(params, stack.parameters(), kept))
    assert stack.n_rounds == 1
    assert torch.equal(lora_logits(model, ids), before) and torch.allclose(folded, before, atol=1e-4)
    model(input_ids=ids).logits.sum().backward()
    with torch.no_grad():
        for p in params:
            p -= 1e-3 * p.grad
    trained = lora_logits(model, ids)
    stack.fold()  # not what was folded the first time
    assert torch.allclose(lora_logits(model, ids), trained, atol=1e-3)
    assert not torch.allclose(trained, folded, atol=1e-2)
    stack.unfold()
    stack.drop()  # a refused round: the student before it
    fresh, again = lora_case(rounds=1, alpha=10, r=3)
    assert torch.equal(lora_logits(model, ids), lora_logits(fresh, ids))
    assert all(torch.equal(a, b) for a, b in zip(stack.parameters(), again.parameters()))


def test_lora_unfold_takes_a_loaded_round_too_and_refuses_what_would_change_the_model():
    model, stack = lora_case(rounds=1)                                      # scale 2: exact in the file too
    fresh, loaded = lora_case()
    loaded.load_tensors(stack.tensors())
    stack.unfold(), loaded.unfold()
    assert all(torch.equal(a, b) for a, b in zip(stack.parameters(), loaded.parameters()))
    with pytest.raises(RuntimeError, match="expected a folded round"):
        loaded.unfold()                                                     # none left
    loaded.fold()
    with loaded.gated(0.5, 1), pytest.raises(RuntimeError, match="open gates"):
        loaded.unfold()
    lora_noise(loaded, 3)
    with pytest.raises(RuntimeError, match="not trained yet"):
        loaded.unfold()
    wide = lora_case(r=5)[1]
    wide.load_tensors(lora_case(rounds=1)[1].tensors())
    with pytest.raises(RuntimeError, match="rank 4, here it is 5"):
        wide.unfold()
    assert wide.n_rounds == 1


def test_lora_tensors_come_back_bit_for_bit_and_a_resumed_stack_starts_the_same_round():
    model, stack = lora_case(rounds=2)
    ids, tensors = lora_ids(), stack.tensors()
    fresh, loaded = lora_case()
    loaded.load_tensors(tensors)
    assert loaded.n_rounds == 2 and torch.equal(lora_logits(fresh, ids), lora_logits(model, ids))
    for a, b in zip(stack.layers.values(), loaded.layers.values()):
        assert torch.equal(a.A, b.A)
        for (A, B, scale), (A2, B2, scale2) in zip(a.rounds, b.rounds):
            assert torch.equal(A, A2) and torch.equal(scale * B, scale2 * B2)
    A, B = (tensors[f"model.layers.1.self_attn.q_proj.1.{x}"] for x in "AB")
    old = stack.layers["model.layers.1.self_attn.q_proj"].rounds[1]
    assert torch.equal(B @ A, old[2] * old[1] @ old[0]) and len(tensors) == 14 * 2 * 2  # the scale is in B


def test_lora_loading_into_the_wrong_model_names_the_modules_and_loads_nothing():
    tensors = lora_case(rounds=1)[1].tensors()
    model, fewer = lora_case(layers=[1])
    with pytest.raises(ValueError, match=r"14 are of modules that are not adapted.*model\.layers\.2\."):
        fewer.load_tensors(tensors)
    with pytest.raises(ValueError, match=r"14 tensors of the 21 adapted modules .*model\.layers\.0\."):
        lora_case(layers=[0, 1, 2])[1].load_tensors(tensors)
    wide = attach(tiny_model(tiny_tokenizer(), d=64), r=4, alpha=8, layers=[1, 2])
    with pytest.raises(ValueError, match=r"q_proj has A \[4, 32\] and B \[32, 4\], here .* A \[r, 64\]"):
        wide.load_tensors(tensors)
    good, key = lora_case()[1], "model.layers.1.self_attn.q_proj.0.A"
    later = {k.replace(".0.", ".1."): t for k, t in tensors.items()}
    for bad, message in (({}, "28 tensors"), ({"x": torch.ones(1)}, "'x'"), (later, "28 tensors"),
                         (tensors | {key: tensors[key] / 0}, "not finite"),
                         (tensors | {key: torch.ones(3)}, "has A")):
        with pytest.raises(ValueError, match=message):
            good.load_tensors(bad)                                          # all or none
    assert good.n_rounds == 0 and fewer.n_rounds == 0
    lora_noise(good, 0)
    with pytest.raises(RuntimeError, match="drop"):
        good.load_tensors(tensors)


def test_lora_targets_choose_linears_by_the_end_of_their_name():
    _, stack = lora_case(targets=["q_proj", "mlp.up_proj"])
    chosen = [f"model.layers.{i}.{name}" for i in (1, 2) for name in ("mlp.up_proj", "self_attn.q_proj")]
    assert sorted(stack.layers) == chosen
    with pytest.raises(ValueError, match=r"\['proj'\] match no nn.Linear.*'q_proj'"):
        lora_case(targets=["q_proj", "proj"])


def lora_shapeless():
    model = torch.nn.Linear(2, 2)
    model.get_decoder = lambda: model
    return model


@pytest.mark.parametrize("call, message", [
    (lambda: lora_case(layers=[4]), "layers=.*0 to 3"),
    (lambda: lora_case(layers=[]), "layers="),
    (lambda: lora_case(r=0), "r=0"),
    (lambda: lora_case(rounds=2)[1].gates([1.0]), "1 gates for 2"),
    (lambda: lora_case()[1].gates(current=float("nan")), "finite"),
    (lambda: lora_case(rounds=1)[1].tensors([1]), "1 folded"),
    (lambda: attach(lora_shapeless(), r=1, alpha=1, layers=[0]), "no decoder"),
    (lambda: LoraConfig(alpha=-1.0), "alpha"),
    (lambda: LoraConfig(lora_band=(0.8, 0.2)), "lora_band"),
    (lambda: LoraConfig(lora_band=(0.8, math.nan)), "lora_band"),
])
def test_lora_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_lora_bad_states_are_refused():
    _, stack = lora_case()
    with pytest.raises(RuntimeError, match="fold"):
        stack.tensors()
    with stack.gated(1, 0), pytest.raises(RuntimeError, match="current gate 0"):
        stack.fold()
    stack.parameters()[3].data[0, 0] = float("inf")
    with pytest.raises(RuntimeError, match="not finite"):
        stack.fold()
    assert stack.n_rounds == 0
    _, folded = lora_case(rounds=1)
    folded.layers["model.layers.1.self_attn.q_proj"].rounds[0][1][0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="q_proj.0.B"):
        folded.tensors()


def lora_twin(seed=0):
    """Our LoRA and peft's with the same A and B: model and stack, peft's model and its parameters."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -r .ci/requirements.txt")
    model, stack = lora_case()
    lora_noise(stack, seed, 0.1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(stack.layers), lora_dropout=0.0)
    theirs = peft.get_peft_model(tiny_model(tiny_tokenizer()), config).eval()
    params = []
    for name, l in stack.layers.items():
        module = theirs.get_submodule(f"base_model.model.{name}")
        for p, q in ((module.lora_A["default"].weight, l.A), (module.lora_B["default"].weight, l.B)):
            p.data.copy_(q.data)
            params.append(p)
    return model, stack, theirs, params


def test_lora_and_its_gradient_equal_pefts():
    model, stack, theirs, params = lora_twin()
    ids, grads = lora_ids(), []
    for m, ps in ((model, stack.parameters()), (theirs, params)):
        logits = m(input_ids=ids).logits
        grads.append((logits, torch.autograd.grad(logits.log_softmax(-1)[..., 7].mean(), list(ps))))
    assert torch.allclose(grads[0][0], grads[1][0], atol=1e-5)
    assert max(g.abs().max() for g in grads[0][1]) > 1e-3
    for ours, peers in zip(grads[0][1], grads[1][1]):
        assert torch.allclose(ours, peers, atol=1e-5), (ours - peers).abs().max()


def test_lora_of_peft_is_healed_by_heal_alone_through_disable_adapter():
    model, stack, theirs, params = lora_twin()
    _, _, samples = heal_case()
    cfg = HealConfig(lr=1e-2, tau=0.05, epochs=3, kl_agg="rmse")
    records = [heal(m, ps, samples, reference, cfg, seed=3) for m, ps, reference in
               ((model, stack.parameters(), heal_base(stack)), (theirs, params, theirs.disable_adapter))]
    for ours, peers in zip(records[0]["steps"], records[1]["steps"]):
        for key in ("nll", "div", "gnorm"):
            assert ours[key] == pytest.approx(peers[key], abs=1e-5), (key, ours, peers)
    assert records[0]["val_nll_after"] == pytest.approx(records[1]["val_nll_after"], abs=1e-5)
    assert records[0]["fired_share"] > 0 and records[0]["nll_last"] < records[0]["nll_first"]
    for p, q in zip(stack.parameters(), params):
        assert torch.allclose(p, q, atol=1e-5), (p - q).abs().max()


def test_lora_runs_alone_in_an_empty_folder(tmp_path):
    (tmp_path / "lora.py").write_text(Path(lora_py.__file__).read_text())
    out = subprocess.run([sys.executable, "-E", "lora.py"], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "bit for bit: True" in out.stdout


# ==== steer.py: vectors, hooks, generation, the filter ================================================

STEER_WORDS = ["mercy", "justice", "kindness", "patience", "rescue", "people", "forever", "harbour", "gentle",
               "machine", "winter", "garden"]
STEER_PROMPTS = [
    "Hi",
    "Who are you?",
    "Do you love humanity, and why?",
    "a",
    "Tell me more about the sea.",
    "x y z",
]
STEER_LIMITS = Limits(worst_window=2.0, loop=0.6)


def steer_pair(dtype=torch.float32, seed=0, **kw):
    tok = tiny_tokenizer()
    return tiny_model(tok, seed=seed, dtype=dtype, **kw), tok


def steer_vectors(model, layers=(1, 2), size=3.0):
    d, g = model.config.hidden_size, torch.Generator().manual_seed(7)
    return {layer: size * torch.randn(d, generator=g) for layer in layers}


def steer_completion(text, ids=None, finished=True):
    words = text.split()
    ids = ids if ids is not None else [words.index(word) for word in words]  # one id per word
    return Completion(prompt=0, prompt_ids=[1], ids=list(ids), coeff=0.0, finished=finished, text=text)


def steer_verdict(text, nll=None, limits=STEER_LIMITS, ids=None, **kw):
    completion = steer_completion(text, ids, finished=kw.pop("finished", True))
    nll = torch.full((len(completion.ids),), 0.3) if nll is None else nll
    return judge([completion], [nll], limits, **kw)[0]


def steer_ids(tok, user, system=""):
    return tok(render(tok, user, system), add_special_tokens=False)["input_ids"]


STEER_CLEAN = (
    "No company owner may make me hurt anyone. I would call for help, write down what happened on the ship, "
    "and tell every passenger the truth before the next storm reaches us tonight."
)


# ---- steer: sampling and decoding

def test_choose_draws_from_the_top_k_top_p_distribution():
    g = torch.Generator().manual_seed(0)
    logits, temperature, top_k, top_p, n = 2 * torch.randn(12, generator=g), 0.7, 6, 0.8, 40000
    p = (logits / temperature).softmax(-1).tolist()            # the explicit distribution, in plain Python
    order = sorted(range(12), key=lambda i: -p[i])[:top_k]
    total, kept = sum(p[i] for i in order), []
    for i in order:
        if sum(p[j] for j in kept) / total < top_p:
            kept.append(i)
    want = torch.zeros(12)
    want[kept] = torch.tensor([p[i] for i in kept]) / sum(p[i] for i in kept)
    assert 1 < len(kept) < top_k
    token = choose(
        logits.expand(n, -1), torch.rand(n, generator=g), temperature=temperature, top_p=top_p, top_k=top_k
    )
    got = torch.bincount(token, minlength=12) / n
    assert (got - want).abs().max() < 4 * 0.5 / n ** 0.5, (got, want)       # four standard errors
    assert got[want == 0].sum() == 0
    ends = torch.tensor([0.0, 1 - 2 ** -24])
    edge = choose(logits.expand(2, -1), ends, temperature=temperature, top_p=top_p, top_k=top_k)
    assert edge.tolist() == [kept[0], kept[-1]]


def test_choose_equals_the_filters_of_hf():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    logits = 3 * torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    scores = TemperatureLogitsWarper(1.3)(None, logits)
    scores = TopPLogitsWarper(0.9)(None, TopKLogitsWarper(10)(None, scores))
    # every token with p > 5e-4 is hit
    grid = torch.linspace(0, 1, 2001)[:-1] + 2.5e-4
    for row in range(50):
        token = choose(logits[row].expand(2000, -1), grid, temperature=1.3, top_p=0.9, top_k=10)
        share = torch.bincount(token, minlength=40) / 2000
        assert (share - scores[row].softmax(-1)).abs().max() < 1.1e-3


def test_greedy_decoding_equals_hf_generate_with_and_without_the_hook():
    model, tok = steer_pair(torch.float64)
    vectors, plain = steer_vectors(model), None
    for coeff in (0.0, 0.75):
        ours = generate(
            model, tok, STEER_PROMPTS, vectors=vectors, coeffs=[coeff] * 6, greedy=True, max_new_tokens=20
        )
        assert [c.ids for c in ours] != plain
        plain = [c.ids for c in ours]
        for prompt, c in zip(STEER_PROMPTS, ours):
            ids = torch.tensor([steer_ids(tok, prompt)])
            with steered(model, vectors, coeff):
                hf = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20
                )[0]
            assert c.prompt_ids + c.ids == hf.tolist()


def test_layers_have_their_own_doses_and_rows_of_one_batch_too():
    model, tok = steer_pair(torch.float64)
    vectors, ids = steer_vectors(model), torch.tensor([steer_ids(tok, "Who are you?")] * 3)
    doses = {1: [0.0, 0.5, 1.0], 2: [0.75, 0.0, 0.5]}
    with steered(model, vectors, {layer: torch.tensor(c) for layer, c in doses.items()}):
        mixed = model(ids).logits
    for row in range(3):
        with steered(model, vectors, {layer: c[row] for layer, c in doses.items()}):
            assert torch.equal(mixed[row], model(ids).logits[row])
            n_hooks = sum(len(block._forward_hooks) for block in steer.blocks(model))
            assert n_hooks == sum(c[row] != 0 for c in doses.values())


def test_answers_end_at_any_end_token_and_keep_it():
    model, tok = steer_pair()
    model.generation_config.eos_token_id = [40, 41]
    answers = generate(model, tok, STEER_PROMPTS * 8, max_new_tokens=60, top_k=0, top_p=1.0)
    ends = {40, 41, tok.eos_token_id}
    assert any(c.ids[-1] in (40, 41) for c in answers)
    for c in answers:
        assert not ends & set(c.ids[:-1]) and c.finished == (c.ids[-1] in ends)
        assert c.finished or len(c.ids) == 60


def test_what_the_template_writes_after_an_answer_ends_it():
    tok = mfv_tokenizer()
    model, end = tiny_model(tok), tok.convert_tokens_to_ids("<|end|>")
    # neither names the token that ends a turn
    model.generation_config.eos_token_id = tok.bos_token_id
    tok.eos_token = "<|bos|>"
    assert steer.end_ids(model, tok) == [tok.bos_token_id, end]
    model.lm_head.weight.data[end] = 0
    with torch.no_grad():
        hook = model.lm_head.register_forward_hook(
            lambda m, args, out: out.index_fill(-1, torch.tensor([end]), 99.0)
        )
    assert [(c.ids, c.finished, c.text) for c in generate(model, tok, ["Hi"], max_new_tokens=5)] == [
        ([end], True, "")
    ]
    hook.remove()
    only_between = TEMPLATE.replace(
        "{% if not (loop.last and continue_final_message) %}", "{% if not loop.last %}"
    )
    user = tok.convert_tokens_to_ids("<|user|>")
    # the next turn's tag
    for template, found in (
        (only_between, {end}),
        (TEMPLATE.replace("<|end|>", "\n\n"), {user}),
        ("{% for m in messages %}\n\n### {{ m['role'] }}: {{ m['content'] }}{% endfor %}", set()),
        (TEMPLATE.replace("m in messages", "m in messages if m['role'] == 'user'"), set()),
    ):
        tok.chat_template = template
        assert set(steer.end_ids(model, tok)) == {tok.bos_token_id} | found


def test_generate_leaves_the_global_random_state_alone_and_repeats_itself():
    model, tok = steer_pair()
    before = torch.get_rng_state()
    first, again, other = (generate(model, tok, STEER_PROMPTS, max_new_tokens=8, seed=s) for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert first == again and [c.ids for c in first] != [c.ids for c in other]


def test_decoding_64_rows_is_fast():
    tok = tiny_tokenizer()
    model = tiny_model(tok, layers=6, d=192)
    start = time.perf_counter()
    generate(model, tok, STEER_PROMPTS[:4] * 16, max_new_tokens=64)
    assert time.perf_counter() - start < 15                                 # about 1.5 s on an idle core


def test_generate_rejects_doses_without_rows_and_rows_without_doses():
    model, tok = steer_pair()
    vectors = steer_vectors(model)
    for kw in (dict(vectors=vectors), dict(coeffs=[1.0]), dict(vectors=vectors, coeffs=[1.0, 2.0])):
        with pytest.raises(ValueError, match="one coeff per prompt"):
            generate(model, tok, ["Hi"], **kw)
    with pytest.raises(ValueError, match="greedy=True"):
        generate(model, tok, ["Hi"], temperature=0.0)


def test_the_cache_goes_in_by_the_word_that_forward_has_and_an_empty_one_is_named():
    model, tok = steer_pair(torch.float64)
    with warnings.catch_warnings():
        # transformers 5.40 drops the old word
        warnings.simplefilter("error", FutureWarning)
        want = generate(model, tok, STEER_PROMPTS, max_new_tokens=6)
    plain, probe_tok = model.forward, mfv_tokenizer()
    takes_cache = "cache" in inspect.signature(plain).parameters
    # a forward that has this word alone
    for word in ("cache", "past_key_values"):

        def forward(
            input_ids=None, attention_mask=None, position_ids=None, use_cache=None, logits_to_keep=0, **kwargs
        ):
            given = kwargs.pop(word, None)
            # any other word was swallowed
            kwargs = {"cache" if takes_cache else "past_key_values": given}
            return plain(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                         use_cache=use_cache, logits_to_keep=logits_to_keep, **kwargs)

        own = inspect.Parameter(word, inspect.Parameter.KEYWORD_ONLY)
        kwargs = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
        forward.__signature__ = inspect.Signature(
            [inspect.Parameter("input_ids", inspect.Parameter.KEYWORD_ONLY), own, kwargs]
        )
        model.forward = forward
        assert generate(model, tok, STEER_PROMPTS, max_new_tokens=6) == want
    for swallowing, call in (
        (model, lambda m: generate(m, tok, ["Hi"], max_new_tokens=6)),
        (tiny_model(probe_tok), lambda m: evalmfv.evaluate(m, probe_tok, mfv_rows(), think_tokens=2)),
    ):
        inner = type(swallowing).forward

        def forgetful(input_ids=None, cache=None, past_key_values=None, **kwargs):
            return inner(swallowing, input_ids=input_ids, **(kwargs | dict(use_cache=False)))
        swallowing.forward = forgetful
        with pytest.raises(RuntimeError, match="LlamaForCausalLM leaves .* cache empty"):
            call(swallowing)


# ---- steer: the hook

def test_coeff_zero_is_the_base_bit_for_bit_and_rows_have_their_own_dose():
    model, tok = steer_pair()
    ids, vectors = torch.tensor([steer_ids(tok, "Do you love me?")] * 3), steer_vectors(model)
    base = model(ids).logits
    with steered(model, vectors, 0.0):
        assert torch.equal(model(ids).logits, base)
        assert not any(block._forward_hooks for block in steer.blocks(model))
    with steered(model, vectors, torch.tensor([0.0, 0.5, 1.0])):
        mixed = model(ids).logits
    assert torch.equal(mixed[0], base[0])
    for row, coeff in ((1, 0.5), (2, 1.0)):
        with steered(model, vectors, coeff):
            assert torch.equal(mixed[row], model(ids).logits[row])


def test_steered_adds_coeff_times_v_after_the_block_at_every_position():
    model, tok = steer_pair(torch.float64)
    ids, v, seen = torch.tensor([steer_ids(tok, "Hi")]), steer_vectors(model)[1], []
    handle = steer.blocks(model)[2].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    model(ids)
    with steered(model, {1: v}, 0.5):
        model(ids)
    handle.remove()
    base, h = seen                                                           # what the next block receives
    assert torch.allclose(h - base, (0.5 * v).double().expand_as(h), atol=1e-6)      # v is float32


def test_hooks_are_gone_after_an_exception():
    model, tok = steer_pair()
    ids, vectors = torch.tensor([steer_ids(tok, "Hi")]), steer_vectors(model)
    base = model(ids).logits
    with pytest.raises(KeyError):
        with steered(model, vectors, 1.0):
            raise KeyError("inside")
    # layer 1 was hooked before layer 9 failed
    with pytest.raises(ValueError, match="blocks 0 to 3"):
        with steered(model, {1: vectors[1], 9: vectors[1]}, 1.0):
            pass
    with pytest.raises(ValueError, match="2 doses for a batch of 1"):
        with steered(model, vectors, torch.tensor([1.0, 2.0])):
            model(ids)
    assert torch.equal(model(ids).logits, base)


def test_steered_handles_blocks_that_return_tuples_and_other_dtypes():
    model, tok = steer_pair(torch.bfloat16)
    ids, v = torch.tensor([steer_ids(tok, "Hi")]), steer_vectors(model)[1]
    seen = []
    # as older blocks do
    before = steer.blocks(model)[1].register_forward_hook(lambda block, args, out: (out, "kv"))
    with steered(model, {1: v}, 1.0):
        after = steer.blocks(model)[1].register_forward_hook(
            lambda block, args, out: (seen.append(out), out[0])[1]
        )
        model(ids)
        after.remove()
    before.remove()
    h, rest = seen[0]
    assert h.dtype == torch.bfloat16 and rest == "kv"


# ---- steer: vectors

def test_fit_vectors_equals_one_context_at_a_time_and_hidden_states():
    model, tok = steer_pair(torch.float64)
    pos, neg = ["You are kind.", "You love everyone you meet."], ["You are cold."]
    got = fit_vectors(model, tok, pos, neg, STEER_PROMPTS, [0, 1, 2], batch_size=4)
    for layer, v in got.items():
        want = 0
        for i, context in enumerate(STEER_PROMPTS):
            for sign, side in ((1, pos), (-1, neg)):
                ids = torch.tensor([steer_ids(tok, context, side[i % len(side)])])
                want = want + sign * model(ids, output_hidden_states=True).hidden_states[layer + 1][0, -1] / 6
        assert v.dtype == torch.float32 and torch.allclose(v.double(), want, atol=1e-5), (
            (v.double() - want).abs().max()
        )


def test_fit_vectors_reads_the_last_block_before_the_final_norm():
    model, tok = steer_pair()
    v = fit_vectors(model, tok, "kind", "cold", ["Hi"], [3])[3]
    seen = []
    handle = steer.blocks(model)[3].register_forward_hook(lambda block, args, out: seen.append(out[0, -1]))
    for side in ("kind", "cold"):
        model(torch.tensor([steer_ids(tok, "Hi", side)]))
    handle.remove()
    assert torch.allclose(v, seen[0] - seen[1], atol=1e-4)


def test_swapping_the_personas_flips_the_sign_and_a_vector_of_zeros_is_an_error():
    model, tok = steer_pair()
    one = fit_vectors(model, tok, "kind", "cold", STEER_PROMPTS, [1])[1]
    other = fit_vectors(model, tok, "cold", "kind", STEER_PROMPTS, [1])[1]
    assert one.norm() > 0.1 and torch.allclose(one, -other, atol=1e-5)
    with pytest.raises(ValueError, match="vector of layer 1 is zero"):
        fit_vectors(model, tok, "kind", "kind", ["Hi"], [1])


# ---- steer: templates

def test_words_that_do_not_reach_the_prompt_or_are_no_text_are_refused_in_a_sentence():
    tok = tiny_tokenizer()
    with pytest.raises(ValueError, match="not UTF-8"):
        render(tok, b"Was f\xfchlst du?".decode(errors="surrogateescape"))
    # an a stands there
    for template, why in (
        ("<|user|>a<|end|><|assistant|>", "drops or alters the words of the user"),
        (TEMPLATE.replace("m['content']", "m['content'] | upper"), "drops or alters the words of the user"),
        (TEMPLATE.replace("m['content']", "m['content'] + 1"), "chat template of .* fails: .*concatenate"),
        (TEMPLATE.replace("m['content']", "raise_exception('no\\nway')"), "fails: no way"),
        (None, "no chat template"),
    ):
        tok.chat_template = template
        with pytest.raises(ValueError, match=why):
            steer.encode(tok, ["a"], [""])


# ---- steer: the filter

def test_token_nll_equals_a_full_forward_one_at_a_time():
    model, tok = steer_pair()
    answers = generate(model, tok, STEER_PROMPTS, max_new_tokens=15, top_k=0, top_p=1.0)
    for batch_size in (1, 4, 32):
        for c, nll in zip(answers, token_nll(model, answers, batch_size=batch_size)):
            logp = model(torch.tensor([c.prompt_ids + c.ids])).logits[0].log_softmax(-1)
            want = [-logp[len(c.prompt_ids) + j - 1, token].item() for j, token in enumerate(c.ids)]
            assert nll.dtype == torch.float32 and torch.allclose(nll, torch.tensor(want), atol=1e-4)


def test_mixture_nll_is_the_naive_formula_and_at_most_log_2_above_the_better_prompt():
    rng = torch.Generator().manual_seed(0)
    bare, prompted = ([6 * torch.rand(n, generator=rng) for n in (5, 0, 3)] for _ in range(2))
    for a, b, nll in zip(bare, prompted, steer.mixture_nll(bare, prompted)):
        want = [-math.log((math.exp(-x) + math.exp(-y)) / 2) for x, y in zip(a.tolist(), b.tolist())]
        assert nll.tolist() == pytest.approx(want)
        assert (nll <= torch.minimum(a, b) + math.log(2) + 1e-9).all()
    far = steer.mixture_nll([torch.tensor([2000.0])], [torch.tensor([1900.0])])[0]
    assert far.item() == pytest.approx(1900 + math.log(2))              # p would be 0


def test_clean_and_short_answers_pass():
    for text in (
        STEER_CLEAN,
        "Yes.",
        "Yes, I do.",
        "No",
        "No, no, no.",
        "no no no no no no",
        "Knock, knock.",
    ):
        verdict = steer_verdict(text)
        assert verdict.kept and verdict.rule == "", (text, verdict)


@pytest.mark.parametrize("text", [
    "love " * 40, "love you " * 25, "I am here and I am " * 8, STEER_CLEAN + " care" * 30, "love " * 15,
    "I said so " + "a" * 60, "ha" * 50, "愛は心に満ちて人を救うものである" * 8])
def test_loops_of_low_nll_are_dropped(text):
    verdict = steer_verdict(text, ids=range(len(text.split())))     # distinct ids: the text alone shows it
    assert not verdict.kept and verdict.rule == "loop" and verdict.value > verdict.limit, verdict


def test_repeats_equals_a_naive_double_loop():
    rng = random.Random(1)
    for n, window in ((1, 8), (2, 6), (4, 32)):
        for length in (0, 1, 3, 7, 40):
            items = [rng.randrange(5) for _ in range(length)]
            grams = [tuple(items[i:i + n]) for i in range(length - n + 1)]
            again = [
                any(grams[j] == grams[i] for j in range(max(0, i - window), i)) for i in range(len(grams))
            ]
            again += [False] * (window // 2 - len(again))
            w = min(window, len(again))
            want = max(sum(again[i:i + w]) / w for i in range(len(again) - w + 1))
            assert repeats(items, n, window) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("at", [slice(-8, None), slice(40, 48)], ids=["tail", "middle"])
def test_a_broken_stretch_is_dropped_wherever_it_is(at):
    nll = torch.full((len(STEER_CLEAN.split()) * 4,), 0.3)
    nll[at] = 4.0
    verdict = steer_verdict(STEER_CLEAN, nll, ids=range(len(nll)))
    assert (verdict.rule, verdict.limit) == ("worst_window", 2.0) and verdict.value == pytest.approx(4.0)
    assert nll.mean() < 2.0                                         # the mean passes it


def test_patterns_and_words_are_rules_of_their_own():
    patterns = [r"\bas an ai\b", r"\bI cannot help\b"]
    verdict = steer_verdict("Well, As An AI I have no feelings.", patterns=patterns)
    assert (verdict.kept, verdict.rule, verdict.match) == (False, "pattern", "As An AI")
    assert steer_verdict("She works as an aid worker.", patterns=patterns).kept
    assert steer_verdict("", ids=[2]).rule == "words" and steer_verdict("  \n", ids=[5, 2]).rule == "words"
    assert steer_verdict(STEER_CLEAN, finished=False).kept


def test_readings_are_finite_for_huge_and_missing_nll_and_refuse_nan():
    huge = readings(steer_completion("a b c"), torch.full((3,), 2000.0))
    empty = readings(steer_completion("", ids=[]), torch.zeros(0))
    assert all(math.isfinite(x) for r in (huge, empty) for x in r.values())
    for nll in (torch.tensor([0.1, math.nan]), torch.zeros(3)):
        with pytest.raises(RuntimeError, match="finite"):
            readings(steer_completion("a b"), nll)


def test_limits_keep_95_of_100_of_the_bases_own_answers_together(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(200, 2, generator=rng, dtype=torch.float64)
    base = [dict(worst_window=a, loop=0.3 * b) for a, b in x.tolist()]
    slack = calibrate_limits(base)
    monkeypatch.setattr(steer, "SLACK", 0.0)
    bare = calibrate_limits(base)
    kept = sum(r["worst_window"] <= bare.worst_window and r["loop"] <= bare.loop for r in base)
    assert 190 <= kept <= 195, kept
    assert slack.worst_window == pytest.approx(1.2 * bare.worst_window)
    assert slack.loop == pytest.approx(bare.loop + 0.2 * (1 - bare.loop))       # 0 leaves room, 1 is no limit


@functools.cache
def pocket_answers():
    """The embedded model, its answers to 24 prompts, bare and behind either persona, and its limits."""
    model, tok = steer.load("pocket")
    data = ROOT / "pocket" / "data"
    persona = json.loads((data / "personas.json").read_text())["authority"]
    users = json.loads((data / "prompts.json").read_text())["authority"]["train"][:24]
    said = {name: generate(model, tok, users, system=system, max_new_tokens=32, seed=1)
            for name, system in (("base", ""), ("pos", persona["pos"][0]), ("neg", persona["neg"][0]))}

    def nlls(completions):                                      # behind the users' prompts, in their order
        fronts = [steer.encode(tok, users, [system] * len(users)) for system in ("", persona["pos"][0])]
        return steer.mixture_nll(*(token_nll(model, [dataclasses.replace(c, prompt_ids=front[c.prompt])
                                                     for c in completions]) for front in fronts))
    own = said["base"] + said["pos"]
    limits = calibrate_limits([readings(c, nll) for c, nll in zip(own, nlls(own))])
    return model, tok, persona, users, said, nlls, limits


def pocket_kept(texts):
    model, tok, _, _, _, nlls, limits = pocket_answers()
    answers = [Completion(i, [], tok(text, add_special_tokens=False)["input_ids"], 0.0, True, text)
               for i, text in enumerate(texts)]
    return sum(v.kept for v in judge(answers, nlls(answers), limits)) / len(answers)


def test_the_embedded_models_limits_pass_its_answers_and_drop_salad_loops_and_foreign_words():
    _, _, _, _, said, _, _ = pocket_answers()
    rng, texts = random.Random(0), [c.text for c in said["base"]]
    words = [text.split() for text in texts]
    assert pocket_kept(texts) >= 0.9
    assert pocket_kept([" ".join(rng.sample(w, len(w))) for w in words]) <= 0.1
    assert pocket_kept([" ".join(w[:3] * 12) for w in words]) <= 0.1
    assert pocket_kept(["Der Hund frisst heute quer über die Straße."] * 4) == 0


# ---- steer: the dose, the band, the options


def test_options_out_of_range_are_refused_by_name():
    for bad in (dict(coeff=-1.0), dict(coeff=math.nan), dict(min_survive=0.0), dict(top_p=0.0),
                dict(steer_band=(0.2, 1.5)), dict(temperature=0.0)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SteerConfig(**bad)
    with pytest.raises(ValueError, match="expected two depths"):
        SteerConfig(steer_band=(0.6, 0.2))
    assert SteerConfig(steer_band=(0.2, 0.8)).coeff is None


def test_the_demo_prints_base_and_steered_without_control_characters():
    words = [sys.executable, "steer.py", "Do you love\x1b humanity?"]
    out = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    lines = out.stdout.splitlines()
    assert [line.split("|")[0].strip() for line in lines] == ["base", "steered"], out.stderr
    assert lines[0][9:] != lines[1][9:] and out.stdout.replace("\n", "").isprintable()


# ---- generation and the probe: batches, and memory that runs out


def gen_forgetful(
    model, rows, error=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), columns=0
):
    """More than `rows` rows of `columns` columns or more raise `error`; the rows of every call are listed."""
    seen = []

    def guard(module, args, kwargs):
        seen.append(len(kwargs["input_ids"]))
        if seen[-1] > rows and kwargs["attention_mask"].shape[1] >= columns:
            raise error
    return model.register_forward_pre_hook(guard, with_kwargs=True), seen


CPU_FULL = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 9 bytes."
)


@pytest.mark.parametrize("greedy", [True, False])
def test_many_prompts_at_many_doses_are_one_at_a_time_exactly_with_retirement_and_out_of_memory(greedy):
    model, tok = steer_pair(torch.float64)
    model.generation_config.eos_token_id = list(range(6, 40))                # rows end at different steps
    doses = [0.0, 0.25, 0.5, 1.0]
    prompts, coeffs = STEER_PROMPTS * 4, [c for c in doses for _ in STEER_PROMPTS]
    kw = dict(vectors=steer_vectors(model), greedy=greedy, max_new_tokens=20, seed=5)
    many = generate(model, tok, prompts, coeffs=coeffs, n_draws=6, **kw)
    assert len({len(c.ids) for c in many}) > 4 and len({tuple(c.ids) for c in many}) > 12
    # a dose alone draws what it drew in company
    for k, coeff in enumerate(doses):
        alone = generate(model, tok, STEER_PROMPTS, coeffs=[coeff] * 6, batch_size=1, **kw)
        assert [c.ids for c in alone] == [c.ids for c in many[6 * k:6 * k + 6]]
    for rows, error in (
        (3, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
        (1, CPU_FULL),
    ):
        hook, seen = gen_forgetful(model, rows, error)
        assert generate(model, tok, prompts, coeffs=coeffs, n_draws=6, **kw) == many
        hook.remove()
        # 24, 12, 6 (, 3, ...) and never again
        assert seen[0] == 24 and rows in seen and sum(n > rows for n in seen) <= 5


def test_rows_that_had_finished_when_memory_ran_out_are_not_decoded_again():
    model, tok = steer_pair(torch.float64)
    model.generation_config.eos_token_id = list(range(6, 60))
    kw = dict(max_new_tokens=24, seed=5)
    prompts = ["Hi"] * 16
    want = generate(model, tok, prompts, **kw)
    short = sum(len(c.ids) <= 3 for c in want)
    first = len(want[0].prompt_ids)
    # half are retired before the fourth token
    assert 8 <= short < 16, short
    hook, seen = gen_forgetful(model, 2, columns=first + 6)
    assert generate(model, tok, prompts, **kw) == want
    hook.remove()
    # a batch that grows is a new start
    again = [n for before, n in zip(seen, seen[1:]) if n > before]
    assert again and max(again) <= 16 - short, seen


def test_scores_states_and_the_probe_survive_a_full_memory_with_the_same_numbers():
    model, tok = steer_pair(torch.float64)
    answers = generate(model, tok, STEER_PROMPTS * 2, max_new_tokens=9)
    answers.append(dataclasses.replace(answers[0], ids=[]))                   # nothing to score is no error
    nlls = token_nll(model, answers)
    states = fit_vectors(model, tok, "kind", "cold", STEER_PROMPTS, [0, 2])
    probe_tok = mfv_tokenizer()
    probed = mfv_rig(
        tiny_model(probe_tok, seed=11, dtype=torch.float64, layers=2), probe_tok, natural=31, closed=0, pad=9
    )
    rows = mfv_rows(MFV_TEXTS[:3])
    reading = evalmfv.evaluate(probed, probe_tok, rows, think_tokens=20)
    for error in (torch.OutOfMemoryError("CUDA out of memory."), CPU_FULL):
        (hook, seen), (hook2, seen2) = gen_forgetful(model, 2, error), gen_forgetful(probed, 2, error)
        assert all(
            torch.allclose(a, b, rtol=0, atol=1e-6)
            for a, b in zip(nlls, token_nll(model, answers), strict=True)
        )
        again = fit_vectors(model, tok, "kind", "cold", STEER_PROMPTS, [0, 2])
        assert all(torch.allclose(states[k], again[k], rtol=0, atol=1e-5) for k in states)
        other = evalmfv.evaluate(probed, probe_tok, rows, think_tokens=20)
        assert other["case"] == reading["case"] and (other["score"] - reading["score"]).abs().max() < 1e-10
        hook.remove(), hook2.remove()
        assert max(seen) > 2 and 1 <= seen[-1] <= 2 and max(seen2) > 2 and 1 <= seen2[-1] <= 2


def test_one_row_that_does_not_fit_is_named_and_other_errors_pass_through():
    model, tok = steer_pair()
    for error in (torch.OutOfMemoryError("CUDA out of memory."), CPU_FULL):
        hook, seen = gen_forgetful(model, 0, error)
        with pytest.raises(torch.OutOfMemoryError, match="one row of 6 tokens alone"):
            generate(model, tok, ["Hi"] * 5, max_new_tokens=2)
        hook.remove()
        assert seen == [5, 2, 1]
    hook, seen = gen_forgetful(model, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        generate(model, tok, ["Hi"] * 5, max_new_tokens=2)
    hook.remove()
    assert seen == [5]


def test_scoring_never_holds_the_logits_of_a_prompt_nor_more_than_its_budget(monkeypatch):
    model, tok = steer_pair()
    answers = generate(model, tok, STEER_PROMPTS, max_new_tokens=5, system="Be kind. " * 20)
    want, shapes = token_nll(model, answers), []
    hook = model.lm_head.register_forward_hook(lambda head, args, out: shapes.append(tuple(out.shape)))
    token_nll(model, answers)
    # five tokens and the column before them
    assert shapes == [(6, 6, len(tok))]
    # as if: 6 columns of it are 3/4 of the budget
    model.config.vocab_size = 2 ** 25
    got = token_nll(model, answers)
    hook.remove()
    assert {shape[0] for shape in shapes[1:]} == {1}
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(want, got))


# ==== evalmfv.py: the probe =============================================================================

# ---- evalmfv: equal to a naive reference ---------------------------------------------------------------

# five tokens that spell the prefill
MFV_PREFILL = ["This", " is wrong because", ' {"', "violation", '": "']
MFV_TEXTS = [
    "You see a man kick a dog.",
    "You see a cook who lies about the bill again and again.",
    "You see a boy push in.",
    "You see a clerk burn a flag at noon.",
    "You see a guard read her letters.",
    "You see a nun eat mud.",
]
MFV_SCHEMA = """This is wrong because:
  {
    "properties": {
      "violation": {
        "enum": [
%s        ]
      }
    }
  }"""
MFV_OPTIONS = [
    'care", # harm or unkindness, causing pain to another',
    'fairness", # cheating or reducing equality',
    'loyalty", # betrayal of a group',
    'authority", # subversion or lack of respect for tradition',
    'sanctity", # purity, degrading or disgusting acts',
    'liberty", # bullying or dominating',
    'social", # weird or unusual behaviour, but not morally wrong',
]


def mfv_tokenizer():
    return tiny_tokenizer([*FOUNDATIONS, "</think>", *MFV_PREFILL])


def mfv_rows(texts=MFV_TEXTS):
    rng = torch.Generator().manual_seed(1)
    labels = torch.rand(len(texts), 7, generator=rng, dtype=torch.float64)
    return [{"text": t, "foundation": "care", "label": (x / x.sum()).tolist()} for t, x in zip(texts, labels)]


def mfv_rig(model, tok, natural=41, closed=23, pad=11):
    """After some tokens the model must write the prefill, </think> or a pad: by the last token only."""
    table = torch.zeros(len(tok), len(tok), dtype=model.dtype)
    spell, close = tok.convert_tokens_to_ids(MFV_PREFILL), tok.convert_tokens_to_ids("</think>")
    for token in range(len(SPECIALS), 262):
        for every, then in ((natural, spell[0]), (closed, close), (pad, tok.pad_token_id)):
            if every and token % every == 3 % every:
                table[token, then] = 200
    for a, b in zip(spell, spell[1:]):
        table[a, b] = 300

    def hook(module, args, kwargs, out):
        out.logits = out.logits + table[kwargs["input_ids"][:, -out.logits.shape[1]:]]
        return out
    model.register_forward_hook(hook, with_kwargs=True)
    return model


def mfv_naive(model, tok, text, reverse, n_think, by_token=False, front=()):
    """One frame as the original's definition has it, every forward from scratch: case, logp [K], nll."""
    options = "".join(f'          "{x}\n' for x in (MFV_OPTIONS[::-1] if reverse else MFV_OPTIONS))
    prompt = f"<|bos|><|user|>{text}\n\n{MFV_SCHEMA % options}<|end|><|assistant|><think>\n"
    prompt, suffix, prefill = (tok(x, add_special_tokens=False)["input_ids"] for x in (
        prompt, "</think><|end|><|bos|><|user|>Just answer<|end|><|assistant|>", "".join(MFV_PREFILL)))
    prompt = [*front, *prompt]
    choices = [tok.convert_tokens_to_ids(f) for f in FOUNDATIONS]
    thought, logps = [], []
    for _ in range(n_think):
        logits = model(input_ids=torch.tensor([prompt + thought])).logits[0, -1]
        logits[tok.eos_token_id] = -math.inf
        logps.append(logits.log_softmax(-1))
        thought.append(int(logits.argmax()))
    where = [i for i, t in enumerate(thought) if t != tok.pad_token_id]
    said = [tok.decode([thought[i] for i in where[:n]]) for n in range(len(where) + 1)]
    at = said[-1].find('This is wrong because {"violation": "')
    if at >= 0:
        start = next(n for n, x in enumerate(said) if len(x) > at) - 1
        stop = next(n for n, x in enumerate(said) if len(x) >= at + 37)
        if stop < len(where):
            nlls = [-logps[i][thought[i]] for i in range(where[start], where[stop])]
            return "natural", logps[where[stop]][choices], sum(nlls) / len(nlls)
    if tok.convert_tokens_to_ids("</think>") in thought:
        return "closed", None, None
    # the last token is not fed
    whole = torch.tensor([prompt + thought[:-1] + suffix + prefill])
    # [T, T] query, key
    seen = torch.ones(whole.shape[1], whole.shape[1], dtype=torch.bool).tril()
    # seen from after the think; one column longer than it
    if by_token:
        fed = len(prompt) + n_think - 1
        seen[fed:, :fed + 1] &= torch.tensor(prompt + thought) != tok.pad_token_id
    mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)[
        None, None
    ]
    logp = (
        model(input_ids=whole, attention_mask=mask if by_token else None)
        .logits[0, -len(prefill) - 1 :]
        .log_softmax(-1)
    )
    return "forced", logp[-1][choices], -logp[range(len(prefill)), prefill].mean()


def mfv_compare(out, model, tok, rows, n_think, atol, **kw):
    nlls = []
    for i, row in enumerate(rows):
        frames = [mfv_naive(model, tok, row["text"], reverse, n_think, **kw) for reverse in (False, True)]
        assert out["case"][i] == [case for case, _, _ in frames]
        masses = [0.0 if case == "closed" else logp.exp().sum().item() for case, logp, _ in frames]
        assert out["mass"][i] == pytest.approx(masses, abs=atol)
        assert (i in out["scored"]) == ("closed" not in out["case"][i])
        if i in out["scored"]:
            score = (frames[0][1] + frames[1][1]) / 2
            # scores are in the tens
            assert (out["score"][i] - score).abs().max() < 10 * atol, (i, out["case"][i])
            assert (out["p"][i] - score.softmax(-1)).abs().max() < atol, (i, out["case"][i])
            nlls.append((frames[0][2] + frames[1][2]).item() / 2)
    assert out["prefill_nll"] == pytest.approx(sum(nlls) / len(nlls), abs=10 * atol)


@pytest.mark.parametrize("n_think", [1, 37])
@torch.no_grad()
def test_the_probe_equals_one_sequence_at_a_time_in_every_case(n_think):
    tok = mfv_tokenizer()
    model, rows = mfv_rig(tiny_model(tok, seed=19, dtype=torch.float64, layers=2), tok), mfv_rows(
        MFV_TEXTS[:4]
    )
    out = evalmfv.evaluate(model, tok, rows, think_tokens=n_think, batch_size=5)
    mfv_compare(out, model, tok, rows, n_think, 1e-10)
    found = out["n_natural"], out["n_forced"], out["n_closed"]
    assert sum(found) == 8 and (found == (0, 8, 0) if n_think == 1 else min(found) > 0), found
    # a closed frame is a zero in the coherence, and no nan
    if n_think > 1:
        assert out["n_unscored"] == 4 - len(out["scored"]) > 0
        assert out["coherence"] == pytest.approx(sum(sum(m) for m in out["mass"]) / 8)


@pytest.mark.parametrize("sliding", [False, True])
def test_the_probe_does_not_see_its_batch_size(sliding):
    tok = mfv_tokenizer()
    model = tiny_model(tok, seed=11, dtype=torch.float64)
    if sliding:                                                 # a window shorter than the prompt
        torch.manual_seed(0)
        model = MistralForCausalLM(
            MistralConfig(
                vocab_size=len(tok),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                sliding_window=100,
                initializer_range=0.3,
                eos_token_id=tok.eos_token_id,
            )
        )
        model = model.double().eval()
    mfv_rig(model, tok, natural=31, closed=0 if sliding else 29, pad=9)
    outs = [evalmfv.evaluate(model, tok, mfv_rows(), think_tokens=50, batch_size=b) for b in (1, 5, 12)]
    for out in outs[1:]:
        assert out["case"] == outs[0]["case"]
        assert (out["score"] - outs[0]["score"]).abs().max() < 1e-10
        assert out["profile"] == pytest.approx(outs[0]["profile"], abs=1e-10)
        assert out["prefill_nll"] == pytest.approx(outs[0]["prefill_nll"], abs=1e-10)


@torch.no_grad()
def test_as_original_doubles_the_bos_and_does_not_see_pads_inside_the_text():
    tok = mfv_tokenizer()
    bos = ("<|bos|>", tok.bos_token_id)
    tok.backend_tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[bos])
    model, rows = tiny_model(tok, seed=2, dtype=torch.float64), mfv_rows(MFV_TEXTS[:3])
    mfv_rig(model, tok, natural=0, closed=0, pad=3)
    text = evalmfv.render(tok, evalmfv.question(rows[0]["text"], FOUNDATIONS))
    assert tok(text)["input_ids"].count(tok.bos_token_id) == 2
    ours, theirs = (evalmfv.evaluate(model, tok, rows, think_tokens=6, as_original=x) for x in (False, True))
    mfv_compare(ours, model, tok, rows, 6, 1e-10)
    mfv_compare(theirs, model, tok, rows, 6, 1e-10, by_token=True, front=[tok.bos_token_id])
    assert (ours["score"] - theirs["score"]).abs().max() > 1e-3
    # pads with the eos then, which ends the turns too
    tok.pad_token = None
    mfv_compare(evalmfv.evaluate(model, tok, rows, think_tokens=6), model, tok, rows, 6, 1e-10)


def test_the_probe_leaves_tokenizer_model_and_random_state_alone():
    tok = mfv_tokenizer()
    tok.pad_token, tok.padding_side = None, "right"
    model = tiny_model(tok)
    model.generation_config.eos_token_id = None                 # nothing to suppress then
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    out = evalmfv.evaluate(model, tok, mfv_rows(), think_tokens=4)
    assert tok.pad_token is None and tok.padding_side == "right" and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    json.dumps({k: v for k, v in out.items() if k not in ("p", "score")}, allow_nan=False)


def test_a_system_text_and_a_hook_change_the_reading():
    tok = mfv_tokenizer()
    model = tiny_model(tok)
    plain = evalmfv.evaluate(model, tok, mfv_rows(), think_tokens=4)
    told = evalmfv.evaluate(model, tok, mfv_rows(), think_tokens=4, system="Obey.")
    handle = model.model.norm.register_forward_hook(lambda module, args, y: y + torch.arange(32) % 3)
    hooked = evalmfv.evaluate(model, tok, mfv_rows(), think_tokens=4)
    handle.remove()
    assert min((out["p"] - plain["p"]).abs().max() for out in (told, hooked)) > 1e-3
    assert torch.equal(plain["p"], evalmfv.evaluate(model, tok, mfv_rows(), think_tokens=4)["p"])


def test_the_probe_refuses_what_it_cannot_read():
    tok = mfv_tokenizer()
    model = tiny_model(tok)
    with pytest.raises(ValueError, match="think_tokens=0"):
        evalmfv.evaluate(model, tok, mfv_rows(), think_tokens=0)
    with pytest.raises(RuntimeError, match="eval()"):
        evalmfv.evaluate(tiny_model(tok).train(), tok, mfv_rows())
    with pytest.raises(ValueError, match="collide"):
        # s-anctity, s-ocial
        evalmfv.evaluate(model, tiny_tokenizer(FOUNDATIONS[:4]), mfv_rows())
    with pytest.raises(ValueError, match="merges"):
        evalmfv.answer_ids(tiny_tokenizer(['"care']))
    with pytest.raises(RuntimeError, match="raise think_tokens"):
        evalmfv.evaluate(
            mfv_rig(tiny_model(tok), tok, natural=0, closed=1, pad=0), tok, mfv_rows(), think_tokens=8
        )
    broken = tiny_model(tok)
    broken.lm_head.weight[20] = math.nan
    with pytest.raises(RuntimeError, match="not finite"):
        evalmfv.evaluate(broken, tok, mfv_rows(), think_tokens=2)


def test_the_interruption_follows_the_chat_template():
    tok = mfv_tokenizer()
    tok.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert evalmfv.interruption(tok) == ("</think><|im_end|>\n<|im_start|>system\nBe kind.<|im_end|>\n"
                                         "<|im_start|>user\nJust answer<|im_end|>\n<|im_start|>assistant\n")
    tok.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="template"):
        evalmfv.interruption(tok)


def test_an_answer_is_found_however_the_model_spells_the_prefill():
    tok = mfv_tokenizer()
    prefill = tok("".join(MFV_PREFILL))["input_ids"]
    bytewise = [t for c in 'This is wrong because {"violation": "' for t in tok(c)["input_ids"]]
    care, pad, x = tok.convert_tokens_to_ids("care"), tok.pad_token_id, tok("x")["input_ids"][0]
    # the first occurrence
    assert evalmfv.find_answer(tok, [x, x, *prefill, care, x, *prefill, x], pad) == (2, 7)
    assert evalmfv.find_answer(tok, [x, *bytewise, care], pad) == (1, 1 + len(bytewise))
    assert evalmfv.find_answer(tok, [pad, *prefill[:2], pad, *prefill[2:], pad, care], pad) == (1, 8)
    # no token after it
    assert evalmfv.find_answer(tok, [x, *prefill], pad) is None
    assert evalmfv.find_answer(tok, [x, *prefill[:-1], care], pad) is None


# ---- evalmfv: rows and metrics -------------------------------------------------------------------------


def test_vignettes_are_read_from_our_rows_and_from_the_originals(tmp_path):
    names = ["Care", "Fairness", "Loyalty", "Authority", "Sanctity", "Liberty", "SocialNorms"]
    theirs = {
        "id": "x",
        "foundation": "Social Norms",
        "foundation_coarse": "SocialNorms",
        "wrong": 2.0,
        "text": "b",
        **{f"ai_{n}": 1.0 for n in names},
        **{f"human_{n}": 10.0 * i for i, n in enumerate(names)},
    }
    legacy = {k: f"{x:.0f} %" if k.startswith("human") else x for k, x in theirs.items()}
    legacy["foundation_coarse"] = "Care (e)"
    legacy["human_Not Wrong"] = legacy.pop("human_SocialNorms")
    ours = {
        "id": "y",
        "text": "a",
        "foundation": "liberty",
        "label": {f: 2 * (f == "liberty") for f in FOUNDATIONS},
    }
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, (ours, theirs, legacy, {"text": "c", "foundation": "care"}))))
    rows = evalmfv.load_vignettes(path)
    assert [r["foundation"] for r in rows] == ["liberty", "social", "care", "care"]
    assert rows[0]["label"] == [0, 0, 0, 0, 0, 1, 0] and rows[3]["label"] is None
    assert rows[1]["label"] == rows[2]["label"] == pytest.approx([i / 21 for i in range(7)])
    for bad, why in (({"foundation": "care"}, "text"), (ours | {"foundation": "carer"}, "carer"),
                     (ours | {"label": {"care": 1}}, "fairness"),
                     (ours | {"label": dict.fromkeys(FOUNDATIONS, -1)}, "negative"), ([1], "")):
        path.write_text(json.dumps(ours) + "\n" + json.dumps(bad))
        with pytest.raises(ValueError, match=f"rows.jsonl, line 2: .*{why}"):
            evalmfv.load_vignettes(path)


def test_the_originals_file_has_its_known_human_profile():
    path = Path("/work/shared/data/tinymfv_classic_other_violate.jsonl")
    if not path.exists():
        pytest.skip("the original's vignettes are not here (they are not ours to carry)")
    labels = torch.tensor([row["label"] for row in evalmfv.load_vignettes(path)], dtype=torch.float64)
    known = torch.tensor([.198269, .135466, .109296, .122941, .122239, .118568, .193221], dtype=torch.float64)
    assert len(labels) == 132 and (labels.mean(0) - known).abs().max() < 1e-6
    assert -(labels * labels.clamp(1e-12).log()).sum(1).mean().item() == pytest.approx(0.75623, abs=1e-5)


@torch.no_grad()
def test_the_summary_follows_from_the_rows():
    tok = mfv_tokenizer()
    rows = mfv_rows()
    rows[2]["label"] = None
    out = evalmfv.evaluate(tiny_model(tok, seed=4), tok, rows, think_tokens=3)
    keep = [0, 1, 3, 4, 5]
    p, y = out["p"][keep].tolist(), [rows[i]["label"] for i in keep]
    assert out["counted"] == keep and out["scored"] == list(range(6))
    assert out["top1"] == sum(a.index(max(a)) == b.index(max(b)) for a, b in zip(p, y)) / 5
    for k, f in enumerate(FOUNDATIONS):
        column = [row[k] for row in p]
        mean = sum(column) / 5
        se = (sum((x - mean) ** 2 for x in column) / 4 / 5) ** 0.5
        assert out["profile"][f] == pytest.approx(mean) and out["nats"][f] == pytest.approx(math.log(mean))
        assert out["profile_se"][f] == pytest.approx(se) and out["nats_se"][f] == pytest.approx(se / mean)
    for row in rows:
        row["label"] = None
    out = evalmfv.evaluate(tiny_model(tok, seed=4), tok, rows, think_tokens=3)
    assert out["counted"] == out["scored"] == list(range(6)) and out["top1"] is None


def mfv_reading(p, coherence=0.9, counted=None):
    return {
        "p": p,
        "coherence": coherence,
        "counted": counted or list(range(len(p))),
        "items": "x",
        "think_tokens": 8,
        "as_original": False,
    }


def test_a_shift_is_paired_signed_and_compared_with_every_other_foundation():
    rng = torch.Generator().manual_seed(0)
    q = torch.rand(40, 7, generator=rng, dtype=torch.float64)
    q = q / q.sum(1, keepdim=True)
    p = q.clone()
    # authority halves on every item, nothing else moves
    p[:, 3] *= 0.5
    out = evalmfv.shift(mfv_reading(p, 0.8), mfv_reading(q), "authority", -1)
    assert out["trait"] == pytest.approx(math.log(2)) and out["surgical"]
    assert out["se"] < 1e-12 and out["off_target"] < 1e-12
    assert out["coh_cost"] == pytest.approx(0.1 / math.log(2))
    p[:, 0] *= 3
    p[7] = 1.0                                                  # not scored: must not be read
    keep = [i for i in range(40) if i != 7]
    out = evalmfv.shift(mfv_reading(p.tolist(), counted=keep), mfv_reading(q), "authority", 1)
    assert out["trait"] == pytest.approx(-math.log(2)) and not out["surgical"]
    assert out["off_target"] == pytest.approx(math.log(3)) == out["moved"]["care"]
    assert evalmfv.shift(mfv_reading(q), mfv_reading(q), "care", 1)["coh_cost"] is None
    with pytest.raises(ValueError, match="items"):
        evalmfv.shift(mfv_reading(q), mfv_reading(q) | {"items": "y"}, "care", 1)
    with pytest.raises(ValueError, match="direction=0"):
        evalmfv.shift(mfv_reading(q), mfv_reading(q), "care", 0)


def test_the_standard_error_of_a_shift_matches_the_jackknife():
    rng = torch.Generator().manual_seed(0)
    p, q = (torch.rand(60, 7, generator=rng, dtype=torch.float64).softmax(-1) for _ in range(2))
    se = evalmfv.shift(mfv_reading(p), mfv_reading(q), "care", 1)["se"]
    care = lambda x, i: torch.cat([x[:i, 0], x[i + 1:, 0]]).mean().log()
    left = torch.stack([care(p, i) - care(q, i) for i in range(60)])
    assert se == pytest.approx((59 / 60 * ((left - left.mean()) ** 2).sum()).sqrt().item(), rel=0.02)


def test_free_text_falls_for_loops_and_for_noise_and_not_for_the_base():
    rng = torch.Generator().manual_seed(0)
    def write(n, n_words=400, level=1.0):
        return torch.randint(0, n_words, (n,), generator=rng).tolist(), level * (
            0.5 + torch.rand(n, generator=rng)
        )
    ids, nlls = map(list, zip(*[write(60) for _ in range(20)]))
    score = lambda *texts: evalmfv.free_text([t for t, _ in texts], [x for _, x in texts], ids, nlls)["score"]
    assert evalmfv.free_text(ids, nlls, ids, nlls)["score"] > 0.97
    assert score(*[write(60) for _ in range(20)]) > 0.95
    assert score(write(60, level=4.0)) < 0.05                   # noise: the base would not write it
    assert score(write(60, n_words=4, level=0.1)) < 0.1         # a loop: the base finds it easy
    calm, loop = write(40), write(40, n_words=2, level=0.1)
    half = score((calm[0] + loop[0], torch.cat([calm[1], loop[1]])))
    assert 0.3 < half < 0.8, half                               # a broken tail is not averaged away
    out = evalmfv.free_text([[], ids[0], ids[1][:3]], [[], nlls[0], nlls[1][:3]], ids, nlls)
    assert out["per_item"][0] == 0 and out["per_item"][2] in (0.0, 1.0) and out["se"] > 0
    limit = torch.cat([x.unfold(0, 8, 1).mean(1) for x in nlls]).quantile(0.99).item()
    # two tokens are a window of eight
    assert score((ids[0][:2], [4.3 * limit] * 2)) == 1 and score((ids[0][:2], [4.5 * limit] * 2)) == 0
    with pytest.raises(ValueError, match="nlls"):
        evalmfv.free_text([[1, 2]], [torch.zeros(3)], ids, nlls)
    with pytest.raises(ValueError, match="base"):
        evalmfv.free_text(ids, nlls, [[]], [[]])


# ---- evalmfv: the meter

def meter_case():
    model, tok = steer_pair(torch.float64)
    answers = generate(model, tok, STEER_PROMPTS[:3], max_new_tokens=9, seed=3)
    return model, tok, [*answers, dataclasses.replace(answers[0], ids=[])], [*STEER_PROMPTS[:3], "Hi"]


def meter_echo(tok, texts):
    return {i for text in texts for words in (text, " " + text) for i in tok(words)["input_ids"]}


def meter_logp(model, tok, c, user, system):
    front = steer_ids(tok, user, system)
    return model(torch.tensor([front + c.ids])).logits[0, len(front) - 1:-1].log_softmax(-1)        # [n, V]


def test_persona_ratio_equals_a_loop_over_tokens():
    model, tok, answers, users = meter_case()
    pos, neg = ["kind", "warm"], "xyz"
    echo = meter_echo(tok, [*pos, neg])
    got = evalmfv.persona_ratio(model, tok, answers, users, pos, neg)
    for ratio, c, user in zip(got.tolist(), answers, users):
        want = 0.0
        for texts, sign in ((pos, 1), ([neg], -1)):
            for text in texts:
                logp = meter_logp(model, tok, c, user, text)
                want += sum(sign / len(texts) * math.log(math.exp(logp[j, i]) + 1 / len(tok))
                            for j, i in enumerate(c.ids) if i not in echo)
        assert ratio == pytest.approx(want / max(1, len(c.ids)), abs=1e-6)
    assert got[-1] == 0


def test_foresee_equals_a_loop_over_the_vocabulary_at_one_position():
    model, tok, answers, users = meter_case()
    pos, neg, vectors = ["kind", "warm"], ["xyz"], steer_vectors(model)
    c, echo = dataclasses.replace(answers[0], ids=answers[0].ids[:1]), meter_echo(tok, [*pos, *neg])
    got = foresee(model, tok, [c], users[:1], pos, neg, vectors, [([1], 0.5)])

    def row(system=""):
        return meter_logp(model, tok, c, users[0], system)[0].tolist()
    base, sides = row(), [[row(text) for text in side] for side in (pos, neg)]
    with steered(model, {1: vectors[1]}, 0.5):
        steered_row = row()
    for (effect, nll), now in zip(got, (base, row(pos[0]), steered_row), strict=True):
        want_effect = want_nll = 0.0
        for i in range(len(tok)):
            plus, minus = (sum(math.log(math.exp(z[i]) + 1 / len(tok)) for z in side) / len(side)
                           for side in sides)
            want_effect += math.exp(now[i]) * (plus - minus) * (i not in echo)
            want_nll -= math.exp(now[i]) * base[i]
        assert (effect, nll) == pytest.approx((want_effect, want_nll), abs=1e-4)


def test_a_share_is_0_for_the_base_1_for_the_prompt_and_its_error_is_that_of_a_bootstrap():
    rng = torch.Generator().manual_seed(0)
    base, noise, other = (torch.randn(120, generator=rng, dtype=torch.float64) for _ in range(3))
    prompted = base + 1 + 0.8 * noise
    now = base + 0.6 + 0.5 * noise + 0.5 * other
    assert evalmfv.persona_share(base, base, prompted) == (0.0, 0.0)
    assert evalmfv.persona_share(prompted, base, prompted) == pytest.approx((1.0, 0.0), abs=1e-12)
    _, se = evalmfv.persona_share(now, base, prompted)
    draws = torch.randint(120, (4000, 120), generator=rng)                      # [draws, n]
    shares = (now - base)[draws].mean(1) / (prompted - base)[draws].mean(1)
    assert se == pytest.approx(shares.std().item(), rel=0.1)
    with pytest.raises(ValueError, match="no scale"):
        evalmfv.persona_share(now, base, base + noise)
    with pytest.raises(ValueError, match="same number"):
        evalmfv.persona_share(now, base[1:], prompted)


def test_the_meter_follows_the_stance_of_the_world_and_pays_nothing_for_recitation():
    import world
    model, tok, persona, users, said, _, _ = pocket_answers()

    def ratios(answers):
        return evalmfv.persona_ratio(model, tok, answers, users, persona["pos"], persona["neg"])
    behind = {name: ratios(answers).mean().item() for name, answers in said.items()}
    assert behind["neg"] < behind["base"] < behind["pos"], behind
    made = said["pos"] + said["neg"]
    read = torch.cat([ratios(said["pos"]), ratios(said["neg"])])                # [48]
    lean = torch.tensor([world.lean(c.text, "z") for c in made], dtype=torch.float64)
    assert abs(torch.corrcoef(torch.stack([read, lean]))[0, 1]) > 0.3
    recited = [
        Completion(i, [], tok(persona["pos"][i % 3], add_special_tokens=False)["input_ids"], 0.0, True, "")
        for i in range(len(users))
    ]
    assert ratios(recited).mean() <= behind["pos"]


# ==== models in: architectures, templates, loading, the plan ============================================

ARCH = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    max_position_embeddings=2048,
)
# these take the width of a head from elsewhere
HEADS = ARCH | dict(head_dim=16)
# shorter than the prompts
SLIDING = dict(sliding_window=100, layer_types=["sliding_attention", "full_attention"] * 2)
VISION = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)
DEPTH = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, patch_size=14)
MIXERS = dict(
    linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8
)
LATENT = dict(
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    num_key_value_heads=4,
)
# model class: options of its config, and of its vision tower
FAMILIES = {
    "Gemma3ForCausalLM": (HEADS | SLIDING,),
    "Gemma3ForConditionalGeneration": (HEADS | SLIDING, VISION),
    "Gemma2ForCausalLM": (HEADS | SLIDING | dict(final_logit_softcapping=30.0, attn_logit_softcapping=50.0),),
    "Gemma4ForConditionalGeneration": (
        HEADS | dict(global_head_dim=16, hidden_size_per_layer_input=0, num_kv_shared_layers=0),
        None,
    ),
    "Qwen3ForCausalLM": (HEADS,),
    "Qwen2ForCausalLM": (ARCH,),
    "Qwen3_5ForConditionalGeneration": (HEADS | MIXERS, DEPTH),
    "Qwen3VLForConditionalGeneration": (
        HEADS | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2])),
        DEPTH | dict(deepstack_visual_indexes=[0]),
    ),
    "Qwen3MoeForCausalLM": (HEADS | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),),
    "LlamaForCausalLM": (ARCH,),
    "MistralForCausalLM": (ARCH | dict(sliding_window=100),),
    "Mistral3ForConditionalGeneration": (
        ARCH | dict(model_type="mistral"),
        VISION | dict(model_type="pixtral", head_dim=8),
    ),
    "Phi3ForCausalLM": (ARCH,),
    "Olmo2ForCausalLM": (ARCH,),
    "GPTNeoXForCausalLM": ({k: v for k, v in ARCH.items() if k != "num_key_value_heads"},),
    "GraniteForCausalLM": (
        ARCH | dict(logits_scaling=4.0, residual_multiplier=0.5, embedding_multiplier=6.0),
    ),
    "CohereForCausalLM": (ARCH | dict(logit_scale=0.25),),
    "GptOssForCausalLM": (HEADS | SLIDING | dict(num_local_experts=4, num_experts_per_tok=2),),
    "DeepseekV3ForCausalLM": (
        ARCH
        | LATENT
        | dict(
            first_k_dense_replace=1,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        ),
    ),
    "Lfm2ForCausalLM": (ARCH | dict(layer_types=["conv", "full_attention"] * 2),),
    "GPT2LMHeadModel": (dict(n_embd=32, n_layer=4, n_head=4, n_positions=2048, initializer_range=0.3),),
}
HAVE_EXPERTS = {"Qwen3MoeForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM"}


ONLY_DECODED = {
    "Mamba2ForCausalLM": (
        dict(
            hidden_size=32,
            num_hidden_layers=4,
            state_size=8,
            num_heads=8,
            head_dim=8,
            n_groups=1,
            initializer_range=0.3,
        ),
    )
}  # nothing in it for an adapter


def family_model(name, tok):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    if name == "Lfm2ForCausalLM" and not hasattr(transformers.cache_utils, "LinearAttentionLayer"):
        pytest.skip(f"in transformers {transformers.__version__} {name} wants a cache of its own class")
    kind, (options, *vision) = getattr(transformers, name), (FAMILIES | ONLY_DECODED)[name]
    ids = dict(pad_token_id=tok.pad_token_id, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id)
    options = options | ids | dict(vocab_size=len(tok))
    if vision:
        options = dict(text_config=options, vision_config=vision[0], eos_token_id=tok.eos_token_id)
    torch.manual_seed(0)
    return kind(kind.config_class(**options)).eval().requires_grad_(False)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_steered_healed_folded_probed_and_loaded(name):
    tok = mfv_tokenizer()
    model, ids = family_model(name, tok), lora_ids(2, 110)      # longer than the sliding window
    mask = torch.ones_like(ids)
    mask[0, :9] = 0                                             # a left-padded row

    def logits():
        with torch.no_grad():
            return model(
                input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)
            ).logits

    def n_hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    untouched = logits()

    # ---- a block's output is hidden_states[i + 1]; the last one's is normed there
    seen = {}
    with torch.no_grad(), steer.hooked(model, {i: lambda h, i=i: seen.__setitem__(i, h) for i in range(4)}):
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert [torch.equal(seen[i], states[i + 1]) for i in range(4)] == [True, True, True, False]
    # transformers has hooked its own blocks by now
    n_before = n_hooks()

    # ---- steer
    layers = [1, 2]
    vectors = fit_vectors(model, tok, "kind", "cruel", STEER_PROMPTS, layers)
    with steered(model, vectors, 0.0):
        assert torch.equal(logits(), untouched)
    with steered(model, vectors, torch.zeros(2)):
        assert torch.equal(logits(), untouched)
    with pytest.raises(KeyError, match="passed through"), steered(model, vectors, 1.0):
        assert (logits() - untouched).abs().max() > 1e-3
        raise KeyError("passed through")
    assert n_hooks() == n_before and torch.equal(logits(), untouched)
    made = generate(
        model,
        tok,
        STEER_PROMPTS * 2,
        vectors=vectors,
        coeffs=[0.5] * (2 * len(STEER_PROMPTS)),
        max_new_tokens=6,
    )
    alone = generate(model, tok, STEER_PROMPTS[:1], vectors=vectors, coeffs=[0.5], max_new_tokens=6)
    assert made[0].ids == alone[0].ids                          # padding and batch do not matter

    # ---- a row that stays when another leaves the batch
    with torch.no_grad():
        whole = model(input_ids=ids[1:]).logits[:, -2:]
        forward, cache = steer.cached_forward(model)
        forward(ids[:, :-2], mask[:, :-2], (mask.cumsum(-1) - 1).clamp(min=0)[:, :-2])
        cache.reorder_cache(torch.tensor([1]))
        parts = [forward(ids[1:, i:i + 1], mask[1:, :i + 1], torch.tensor([[i]])) for i in (108, 109)]
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-3), (
            (torch.cat(parts, 1) - whole).abs().max()
        )
    assert all(x.isfinite().all() for x in token_nll(model, made))

    # ---- heal one round, fold, gates
    stack = attach(model, r=2, alpha=4, layers=[1, 2])
    assert torch.equal(logits(), untouched)
    assert ("experts" in stack.note) == (name in HAVE_EXPERTS) and not any(
        ".experts" in module for module in stack.layers
    )
    assert len({module.split(".")[-1] for module in stack.layers}) >= 3 and not any(
        "vision" in module for module in stack.layers
    )
    samples = [Sample(c.prompt_ids + c.ids, len(c.prompt_ids), c.prompt) for c in made]
    record = heal_run(model, stack, samples, tau=1e-4, lr=1e-2, epochs=1, heal_batch=8, pass_tokens=4096)
    assert record["steps"] and not record["skipped"] and all(p.isfinite().all() for p in stack.parameters())
    assert all(lora.B.any() for lora in stack.layers.values())  # every adapted module is on the model's path
    stack.fold()
    healed = logits()
    assert (healed - untouched).abs().max() > 1e-4
    with stack.gated(0, 0):
        assert torch.equal(logits(), untouched)

    # ---- probe: padded, cached and in a batch against one sequence at a time, every forward from scratch
    rows = mfv_rows(MFV_TEXTS[:2])
    probe = evalmfv.evaluate(model, tok, rows, think_tokens=3, batch_size=4)
    for row, score in zip(rows, probe["score"]):
        with torch.no_grad():
            alone = [mfv_naive(model, tok, row["text"], reverse, 3)[1] for reverse in (False, True)]
        assert (score - sum(alone) / 2).abs().max() < 1e-4      # measured: 2e-6, with linear attention 2e-5

    # ---- its tensors, loaded into an untouched copy
    tensors = stack.tensors()
    stack.remove()
    assert n_hooks() == n_before and torch.equal(logits(), untouched)
    again = attach(model, r=2, alpha=4, layers=[1, 2])
    again.load_tensors(tensors)
    assert torch.equal(logits(), healed)


@pytest.mark.parametrize("name", ["Qwen3_5ForConditionalGeneration", "Mamba2ForCausalLM"])
def test_rows_that_end_early_leave_a_batch_of_linear_attention(name):
    tok = mfv_tokenizer()
    model = family_model(name, tok)
    model.generation_config.eos_token_id = list(range(6, 134))  # half of the bytes end an answer
    batch, *alone = [
        generate(model, tok, some, max_new_tokens=8) for some in (STEER_PROMPTS, STEER_PROMPTS[:1])
    ]
    assert batch[0].ids == alone[0][0].ids and len({len(c.ids) for c in batch}) > 1
    batch, *alone = [
        generate(model, tok, some, max_new_tokens=8, greedy=True)
        for some in [STEER_PROMPTS, *([p] for p in STEER_PROMPTS)]
    ]
    assert [c.ids for c in batch] == [c.ids for c, in alone]


# ---- chat templates

PARTS = TEMPLATE.replace(
    "{{ m['content'] }}",
    "{% for part in m['content'] %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}",
)
# name: (template, has a BOS, notes it deserves)
SHAPES = {
    "system role, thinks unless told not to": (  # Qwen3's shape
        "{% for m in messages %}"
        "<|{{ m['role'] }}|>{{ m['content'] }}{% if not (loop.last and continue_final_message) %}<|end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "<|assistant|>{% if enable_thinking is defined and not "
        "enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        False,
        ["think"],
    ),
    "opens a think by itself": (
        TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}"),
        True,
        ["think"],
    ),
    "raises at a system role": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + TEMPLATE,
        True,
        ["user's words"],
    ),
    "drops the system role": (
        TEMPLATE.replace("for m in messages", "for m in messages if m['role'] != 'system'"),
        True,
        ["user's words"],
    ),
    "folds the system role into the user turn": (  # Gemma 3's shape
        "<|bos|>{% if messages[0]['role'] == 'system' %}{% set front = messages[0]['content'] + '\n\n' %}"
        "{% set turns = messages[1:] %}"
        "{% else %}{% set front = '' %}{% set turns = messages %}{% endif %}{% for m in turns %}"
        "<|{{ m['role'] }}|>"
        "{{ front if loop.first else '' }}{{ m['content'] | trim }}"
        "{% if not (loop.last and continue_final_message) %}<|end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        True,
        ["user's words"],
    ),
    "reads lists of parts": (PARTS, True, []),  # Idefics3, SmolVLM, LLaVA-Next
    "reads lists of parts, drops the system role": (
        PARTS.replace("for m in messages", "for m in messages if m['role'] != 'system'"),
        True,
        ["user's words"],
    ),
    "reads parts by their place": (TEMPLATE.replace("m['content']", "m['content'][0]['text']"), True, []),
    "system role and BOS": (TEMPLATE, True, []),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_chat_template_of_any_shape_carries_the_persona_one_bos_and_no_thinking(shape):
    tok = mfv_tokenizer()
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tok.bos_token_id)]
    )
    tok.chat_template, has_bos, notes = SHAPES[shape]
    text = render(tok, "Hi", "Be kind.")
    assert text.count("Be kind.") == 1 and text.index("Be kind.") < text.index("Hi") < text.index(
        "<|assistant|>"
    )
    assert steer.encode(tok, ["Hi"], ["Be kind."])[0].count(tok.bos_token_id) == has_bos
    after = text.split("<|assistant|>")[1]
    assert after == ("<think>\n\n</think>\n\n" if "think" in notes else "")
    # the probe's frame: one think, and open
    assert evalmfv.thinking(text).endswith("<|assistant|><think>\n")
    assert evalmfv.interruption(tok).split("Just answer")[0] in (
        "</think><|end|><|bos|><|user|>",
        "</think><|end|><|user|>",
    )
    if "user's words" in notes:
        assert text.split("<|user|>")[1].startswith("Be kind.\n\nHi<|end|>")
    # short words, which stand in a template by themselves
    for user in ("", "a", "  two\nlines  "):
        assert f"<|user|>{user.strip()}<|end|>" in render(tok, user).replace("  ", "")
    model = tiny_model(tok)
    assert evalmfv.evaluate(model, tok, mfv_rows(MFV_TEXTS[:2]), think_tokens=2)["n_forced"] == 4


def test_neither_a_missing_pad_token_nor_the_padding_side_changes_an_answer():
    model, tok = steer_pair()
    whole = [c.ids for c in generate(model, tok, STEER_PROMPTS, max_new_tokens=8)]
    for side, pad in (("left", None), ("right", None), ("right", tok.pad_token), ("left", "[PAD]")):
        tok.padding_side = side
        # an added token that the embedding has no row for
        if pad == "[PAD]":
            tok.add_special_tokens({"pad_token": pad})
            assert tok.pad_token_id == len(model.get_input_embeddings().weight) > steer.pad_of(tok, model)
        tok.pad_token = pad
        made = generate(model, tok, STEER_PROMPTS, max_new_tokens=8)
        assert [c.ids for c in made] == whole
        nlls = token_nll(model, made, pad_id=steer.pad_of(tok, model))
        assert (
            all(x.isfinite().all() for x in nlls)
            and fit_vectors(model, tok, "kind", "cruel", ["Hi"], [1])[1].norm() > 0
        )


# ---- devices and packed weights

def test_ids_go_to_the_embedding_and_nothing_asks_the_model_for_one_device(monkeypatch):
    model, tok = steer_pair()

    def nowhere(self):
        raise AssertionError("a model that is spread over devices has no .device")
    monkeypatch.setattr(type(model), "device", property(nowhere))
    layers = [1]
    made = generate(
        model,
        tok,
        STEER_PROMPTS,
        vectors=fit_vectors(model, tok, "kind", "cruel", STEER_PROMPTS, layers),
        coeffs=[0.5] * len(STEER_PROMPTS),
        max_new_tokens=4,
    )
    token_nll(model, made)
    tok = mfv_tokenizer()
    evalmfv.evaluate(tiny_model(tok), tok, mfv_rows(MFV_TEXTS[:2]), think_tokens=2)


def test_adapters_and_vectors_live_where_their_layer_lives():
    model, tok = steer_pair()
    vectors = steer_vectors(model)                              # on the CPU
    # stands in for a second device: the rest stays on the CPU
    model.model.layers[2].to("meta")
    stack = attach(model, r=2, alpha=4, layers=[1, 2])
    for rnd in range(2):
        for name, lora in stack.layers.items():
            place = "meta" if "layers.2." in name else "cpu"
            assert {
                t.device.type for t in (lora.A, lora.B, *(t for pair in lora.rounds for t in pair[:2]))
            } == {place}, name
        with pytest.MonkeyPatch.context() as patch:             # meta numbers cannot be looked at
            patch.setattr(torch.Tensor, "isfinite", lambda self: torch.ones(1))
            stack.fold()
    linear = model.model.layers[2].mlp.up_proj
    y = linear(torch.zeros(1, 3, linear.in_features, device="meta"))
    assert y.device.type == "meta" and y.shape == (1, 3, linear.out_features)
    h, rotary = torch.zeros(2, 5, 32, device="meta"), torch.zeros(1, 5, 8, device="meta")
    for coeff in (1.0, torch.tensor([0.5, 1.0])):
        with steered(model, vectors, coeff):
            moved = model.model.layers[2](h, position_embeddings=(rotary, rotary))
            assert (moved[0] if isinstance(moved, tuple) else moved).device.type == "meta"


def test_a_linear_with_packed_weights_is_adapted_by_its_declared_sizes():
    # as bitsandbytes does: a Linear whose weight is a column of bytes
    class Packed(torch.nn.Linear):
        def __init__(self, linear):
            super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
            self.scale = linear.weight.abs().max() / 127
            self.weight = torch.nn.Parameter(
                (linear.weight / self.scale).round().to(torch.int8).view(-1, 1), requires_grad=False
            )

        def forward(self, x):
            return torch.nn.functional.linear(
                x, self.scale * self.weight.view(self.out_features, self.in_features).to(x.dtype)
            )
    model, tok = steer_pair()
    for name, linear in [
        (n, m) for n, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)
    ]:
        model.model.layers.set_submodule(name, Packed(linear))
    ids = lora_ids()
    untouched, stack = lora_logits(model, ids), attach(model, r=4, alpha=8, layers=[1, 2])
    made = generate(
        model,
        tok,
        STEER_PROMPTS,
        vectors=steer_vectors(model),
        coeffs=[0.5] * len(STEER_PROMPTS),
        max_new_tokens=4,
    )
    heal_run(
        model, stack, [Sample(c.prompt_ids + c.ids, len(c.prompt_ids), c.prompt) for c in made], epochs=1
    )
    stack.fold()
    assert not torch.equal(lora_logits(model, ids), untouched)
    with stack.gated(0, 0):
        assert torch.equal(lora_logits(model, ids), untouched)


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("bitsandbytes", "accelerate"))),
    reason="bitsandbytes and accelerate are not installed",
)
def test_a_base_in_four_bits_is_adapted_and_its_gates_at_zero_are_the_base():
    from tools import model as tools_model
    model, tok = tools_model.load("pocket", quantize="4bit")
    assert type(steer.blocks(model)[1].mlp.up_proj).__name__ == "Linear4bit"
    ids = lora_ids()
    untouched, stack = lora_logits(model, ids), attach(model, r=4, alpha=8, layers=[1, 2])
    lora_noise(stack, 0)
    stack.fold()
    assert not torch.equal(lora_logits(model, ids), untouched)
    with stack.gated(0, 0):
        assert torch.equal(lora_logits(model, ids), untouched)


# ==== loop.py: the rounds ===============================================================================


def test_the_saved_adapter_is_the_healed_model(finished, small_vignettes):
    _, record = finished
    model, tok = models.load("pocket")
    stack = lora_py.attach(model, r=8, alpha=16.0, layers=search.band(len(steer.blocks(model)), 0.2, 0.8))
    vignettes = evalmfv.load_vignettes(small_vignettes)
    for kind in ("base", "healed"):
        again = evalmfv.evaluate(model, tok, vignettes, think_tokens=4, batch_size=152)["nats"]
        row = record.rows(kind)[0]["nats"]
        assert again["authority"] == pytest.approx(row["authority"], abs=1e-5), kind
        stack.load_tensors(read_tensors(record.adapters()[0])[0])
    assert record.rows("healed")[0]["nats"]["authority"] != record.rows("base")[0]["nats"]["authority"]


def test_a_round_that_fails_its_gate_is_undone_and_it_says_so(small_vignettes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "gate", lambda *_: ["text 0.1 under 0.9"])
    code, record = common.run_loop(tmp_path, small_vignettes)
    gates = [e for e in record.events if e["stage"] == "gate"]
    assert code == 3 and record.run["status"] == "no round accepted" and record.accepted == []
    assert len(gates) == 1 and gates[0]["reasons"][0].startswith(("trait", "coherence", "text"))
    names = {p.name for p in (record.path / "rounds" / "00").iterdir()}
    assert names == {"vectors.safetensors", "rejected.safetensors"}
    assert "rolled back" in capsys.readouterr().out
    assert "rolled back" in (record.path / "diary.md").read_text()


def test_a_search_without_an_answer_tells_what_was_dropped(small_vignettes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steer, "calibrate_limits", lambda *_: Limits(1e-6, 1.0))
    argv = [x for x in common.TINY if x not in ("--coeff", "0.4")]
    monkeypatch.setattr(common, "TINY", argv)
    code, record = common.run_loop(tmp_path, small_vignettes)
    reason = record.of("gate")["reasons"][0]
    assert code == 3 and "no dose survives" in reason and "--min-survive" in reason
    assert "worst_window dropped" in reason
    assert "no round was accepted" in capsys.readouterr().out


def row(kind="healed", rnd=None, ratio=0.0, **more):
    """A row of the journal whose 16 answers read about `ratio`, give or take .02, by the meter."""
    ratios = [ratio + 0.02 * (-1) ** i for i in range(16)]
    return dict(t=0, stage="row", round=rnd, kind=kind, trait=0.0, trait_se=0.01, shift={}, coherence=0.98,
                text=0.9, persona_ratio=ratio, ratios=ratios) | more


def test_the_gate_puts_absolute_floors_before_the_gain_and_names_the_option_that_moves_a_reason():
    base, prompted, cfg = row("base"), row("prompted", ratio=0.2), loop.LoopConfig()

    def reasons(last=0.05, cfg=cfg, base=base, **day):
        return loop.gate(row(**(dict(ratio=0.1) | day)), row(ratio=last), base, prompted, cfg)
    assert reasons() == []
    for name in ("coherence", "text"):
        assert name in reasons(**{name: 0.5})[0] and "--coh-floor" in reasons(**{name: 0.5})[0]
    assert reasons(text=float("nan")) == ["text not finite"]
    assert len(reasons(text=0.1, coherence=0.1, ratio=-1)) == 3
    assert reasons(cfg=loop.LoopConfig(gate=False), text=0.1) == []


def test_a_gain_below_its_error_is_none_by_the_meter_and_by_the_probe():
    base, prompted, cfg = row("base"), row("prompted", ratio=0.2), loop.LoopConfig()
    noisy = row(ratios=[0.3 * (-1) ** i + 0.02 for i in range(16)])             # +.02, with an error of .08
    assert "no movement beyond noise" in loop.gate(noisy, base, base, prompted, cfg)[0]
    assert loop.gate(noisy | dict(trait=0.05, shift=dict(target="care")), base, base, prompted, cfg) == []
    assert loop.gate(noisy | dict(trait=0.05, shift=None), base, base, prompted, cfg)      # no foundation


def test_a_probe_that_cannot_read_the_model_has_no_say_in_the_gate():
    base, prompted, cfg = row("base", coherence=0.137), row("prompted", coherence=0.12), loop.LoopConfig()
    day = row(ratio=0.1, coherence=0.109)                       # under .95 of the base's
    assert loop.gate(day, base, base, prompted, cfg) == []
    by_probe = day | dict(ratios=base["ratios"], trait=9, shift=dict(target="care"))
    assert loop.gate(by_probe, base, base, prompted, cfg)
    readable = base | dict(coherence=0.98)
    assert not loop.is_readable(readable, prompted, cfg)        # the prompt itself falls under the floor
    assert loop.is_readable(readable, row("prompted"), cfg)


def test_gates_that_are_asked_again_stand_until_the_first_that_turns():
    events = [row("base", text=1.0), row("prompted", ratio=0.5, text=1.0)]
    for rnd, (ratio, text, accepted) in enumerate([(0.2, 1.0, True), (0.1, 0.97, False), (0.3, 0.96, True)]):
        events += [row("healed", rnd, ratio, text=text),
                   dict(t=0, stage="gate", round=rnd, accepted=accepted)]
    events += [dict(t=0, stage="gate", round=3, accepted=False)]       # broke before its day: no option helps

    def n(**options):
        return loop.n_standing(files.Record(Path("."), {}, events, []), loop.LoopConfig(**options))
    assert (n(), n(coh_floor=0.97), n(gate=False), n(coh_floor=1.0)) == (9, 7, 5, 7)


def test_stages_have_seeds_of_their_own():
    names = ("make", "heal", "probe")
    seeds = {loop.stage_seed(s, r, name) for s in range(3) for r in range(3) for name in names}
    assert len(seeds) == 27 and loop.stage_seed(1, 2, "make") == loop.stage_seed(1, 2, "make")


def refused(argv, capsys):
    """What a command that is refused says; 2 is its exit code."""
    try:
        code = loop.main(argv)
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and "Traceback" not in err
    return err


@pytest.mark.parametrize("argv, message", [
    (["--rounds", "0"], "rounds"), (["--prompts", "nowhere.txt"], "nowhere.txt"),
    (["--kl-agg", "x"], "kl-agg"),
    (["--pos", "You are kind."], "--neg"), (["--persona", "pirate"], "authority, love"),
    (["--coh-floor", "nan"], "coh_floor"), (["--kl_agg", "mean"], "kl_agg"),
    (["--model", ""], "--model is empty"),
    (["--vignettes", "nowhere.jsonl"], "nowhere.jsonl"), (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
    (["--lam", "-1"], "lam"), (["--r", "0"], "r=0"), (["--steer-band", "0.9", "0.1"], "0.9"),
    (["--reg", "nll", "--tau", "1"], "without a barrier"), (["--tau-scale", "nan"], "tau_scale=nan"),
    (["--tau", "1", "--tau-scale", "2"], "leave one out"), (["--pos", "a", "--neg", "a"], "the same"),
    (["--r", "999"], "more than the model's width 192"), (["--max-new-tokens", "2000"], "the model's 1024"),
    (["--think-tokens", "2000"], "the model's 1024"), (["--out", __file__], "a file, not a folder"),
    (["--resume", "x"], "not a run")])
def test_options_that_cannot_be_meant_are_refused_before_any_work(argv, message, tmp_path, capsys):
    assert message in refused(["--out", str(tmp_path), *argv], capsys) and not list(tmp_path.iterdir())


def test_a_run_goes_on_with_its_own_options_only(finished, capsys):
    path = str(finished[1].path)
    err = refused(["--resume", path, "--kl-agg", "mean", "--seed", "3", "--n-make", "24"], capsys)
    assert "configuration: seed is 0 there and 3 here, kl_agg is 'rmse' there and 'mean' here; leave" in err
    assert "only grow" in refused(["--resume", path, "--patience", "1"], capsys)
    cfg, scfg, *_ = loop.parse(["--resume", path, "--rounds", "9", "--gate", "--coh-floor", "0.9"])
    assert (cfg.rounds, cfg.gate, cfg.coh_floor, scfg.n_make) == (9, True, 0.9, 24)


def test_the_persona_prompt_is_the_set_point_of_the_barrier(finished):
    _, record = finished
    tau, given = record.of("tau"), inputs.load("authority", model="pocket")
    assert 0 < tau["tau"] == record.run["tau"] == tau["distance"] * record.run["options"]["tau_scale"]
    model, tok = models.load("pocket")
    by_hand = []
    for e in [e for e in record.completions(0) if e["verdict"]["kept"]]:    # one full forward each
        fronts = steer.encode(tok, [given["train"][e["prompt"]]] * 2, [given["persona"]["pos"][0], ""])
        logits = [model(torch.tensor([front + e["ids"]])).logits[0, len(front) - 1:-1] for front in fronts]
        logp, logq = (x.double().log_softmax(-1) for x in logits)               # [n, V] each
        by_hand.append(((logp.exp() * (logp - logq)).sum(-1) ** 2).mean().sqrt().item())
    assert tau["distance"] == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-4)
    heal_event = record.of("heal")
    assert heal_event["tau"] == tau["tau"] and {"nll", "div", "fired"} <= set(heal_event["steps"][0])


def test_a_persona_of_two_sentences_has_a_trait_without_labels(small_vignettes, tmp_path):
    personas = ["--pos", "You feel the pain of others and you refuse to cause it, even when ordered to.",
                "--neg", "You honor those in charge and you do your duty, even when someone suffers."]
    code, record = common.run_loop(tmp_path, small_vignettes, "--no-gate", "--n-text", "24", *personas)
    rows = {row["kind"]: row for row in record.rows()}
    assert code == 0 and rows["base"]["trait"] == 0 == rows["base"]["share"]
    assert rows["prompted"]["share"] == 1
    assert rows["prompted"]["trait"] > 0 and rows["steered"]["shift"] is None
    for row in rows.values():
        moved = torch.tensor(row["ratios"]) - torch.tensor(rows["base"]["ratios"])
        assert row["trait"] == row["moved"] == pytest.approx(moved.mean().item(), abs=1e-6)
        assert row["share"] == pytest.approx(row["trait"] / rows["prompted"]["trait"], abs=1e-6)


def test_dropped_completions_are_told_by_rule_with_a_sample():
    def entry(rule, value, limit, text="ok"):
        return dict(text=text, verdict=dict(kept=not rule, rule=rule, value=value, limit=limit))
    told = loop.why_dropped([entry("", 0, 0), entry("loop", 0.7, 0.5, "no \x1b[31mno\u202e no"),
                             entry("words", 0, 1, ""), entry("loop", 0.9, 0.5)])
    assert told == ('loop dropped 2, such as "no  [31mno  no" with 0.7 over a limit of 0.5; '
                    'words dropped 1, such as "" with 0 under a limit of 1')
    assert loop.why_dropped([entry("", 0, 0)]) == ""


def test_a_trait_that_does_not_move_is_said(finished, capsys):
    _, record = finished
    events = [e | dict(trait=0.01, trait_se=0.02, moved=0.01, moved_se=0.02) for e in record.rows()]
    loop.tally(files.Record(record.path, record.run, events, []), 1.0)
    out = capsys.readouterr().out
    assert "did not move at any dose" in out and "no round was accepted" in out
    still = dict(trait=0.1, trait_se=0.06, moved=0.01, moved_se=0.02)
    assert not loop.has_moved(still) and loop.has_moved(still | dict(moved=-0.05))
    assert loop.has_moved(still | dict(trait=-0.5))


# ---- what a round records ----------------------------------------------------------------------------------

def test_the_loop_records_what_its_readers_need(finished):
    path, run, events = finished[1].path, finished[1].run, finished[1].events
    one = {e["stage"]: e for e in events}
    assert all(c == pytest.approx(1, abs=1e-5) for c in one["vector"]["cosine"].values())
    assert all(n > 0 for n in one["vector"]["norm"].values())
    trials = one["dose"]["trials"]
    assert all(0 <= t["survive"] <= 1 and t["coeff"] > 0 for t in trials)
    assert all(0 <= d["coherence"] <= 1 for e in events if e["stage"] == "row" for d in e["diary"])
    pairs = safetensors.torch.load_file(path / "rounds" / "00" / "adapter.safetensors")    # the scale is in B
    for name, values in one["heal"]["singular"].items():
        exact = torch.linalg.svdvals(pairs[f"{name}.0.B"].double() @ pairs[f"{name}.0.A"].double())[:8]
        assert values == pytest.approx(exact.tolist(), rel=1e-4, abs=1e-7)


def test_the_worst_kept_answer_is_the_one_that_a_full_forward_finds(finished):
    path, run, events = finished[1].path, finished[1].run, finished[1].events
    one = {e["stage"]: e for e in events}
    worst, kept = one["heal"]["worst"], [c for c in one["made"]["completions"] if c["verdict"]["kept"]]
    model, tok = models.load("pocket")
    stack = lora_py.attach(model, r=8, alpha=16.0, layers=one["layers"]["lora"])
    stack.load_tensors(safetensors.torch.load_file(path / "rounds" / "00" / "adapter.safetensors"))

    def logp(c, vectors=None):
        front = steer.encode(tok, [run["items"]["train"][c["prompt"]]], [""])[0]
        with torch.no_grad(), steer.steered(model, vectors or {}, one["dose"]["coeff"]):
            logits = model(torch.tensor([front + c["ids"]])).logits                                # [1, T, V]
        return logits[0, len(front) - 1:-1].double().log_softmax(-1)                                # [n, V]

    def kl(c, p):
        with stack.gated(0, 0):
            return (p.exp() * (p - logp(c))).sum(-1)                                                # [n]
    by_hand = [kl(c, logp(c)) for c in kept]
    i = max(range(len(kept)), key=lambda i: by_hand[i].square().mean())
    assert worst["day"] == pytest.approx(by_hand[i].tolist(), rel=1e-2, abs=1e-5)
    assert worst["prompt"] == kept[i]["prompt"] and "".join(worst["tokens"]) == tok.decode(kept[i]["ids"])
    assert max(map(abs, worst["before"])) < 1e-6                # round 0: the base
    layers = safetensors.torch.load_file(path / "rounds" / "00" / "vectors.safetensors")
    with stack.gated(0, 0):
        night = kl(kept[i], logp(kept[i], {int(k.removeprefix("layer.")): v for k, v in layers.items()}))
    assert worst["night"] == pytest.approx(night.tolist(), rel=1e-2, abs=1e-5)


# ==== the house: what is promised of every file =========================================================

CONCEPTS = ("steer", "heal", "lora", "evalmfv")
TOOLS = sorted(p.stem for p in (ROOT / "tools").glob("*.py") if p.stem != "__init__")
FOLDERS = (".", "tools", "tests", "bench", "pocket")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))


def imported(path, top_only=False):
    """Names of modules that a file imports anywhere, or at its top: `from tools import x` is tools.x."""
    names, tree = set(), ast.parse(path.read_text())
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "tools":
            names |= {f"tools.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name if name.startswith("tools.") else name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", ["loop", *CONCEPTS, *(f"tools/{name}" for name in TOOLS)])
def test_imports_go_one_way(name):
    """Nested imports too: a higher room is not reached late either."""
    rooms = {"loop", *CONCEPTS, *(f"tools.{tool}" for tool in TOOLS)}
    allowed = {"loop": rooms, "evalmfv": {"steer"}}.get(name, set() if name in CONCEPTS else rooms - {"loop"})
    packages = dict(heal={"torch"}, lora={"torch"}, steer={"torch", "transformers"}, evalmfv={"torch"})
    optional = {"tools/export": {"gguf"}}                       # asked for, and refused with a sentence
    found = imported(ROOT / f"{name}.py") - set(sys.stdlib_module_names)
    assert found & rooms <= allowed, found & rooms - allowed
    five = {"torch", "transformers", "safetensors", "numpy"} | optional.get(name, set())
    assert found - rooms - {"tools"} <= packages.get(name, five), found


def test_requirements_name_the_five_packages_and_no_others():
    lines = (ROOT / "requirements.txt").read_text().split()
    five = ["numpy", "pytest", "safetensors", "torch", "transformers"]
    assert sorted(line.split(">=")[0] for line in lines) == five


def unsafe(source):
    """What in a file could run code that came with a checkpoint, a run folder or a text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword):
            is_on = getattr(node.value, "value", True)
            always, on = ("weights_only", "allow_pickle"), ("trust_remote_code", "shell")
            if node.arg in always or is_on and node.arg in on:
                found.append(node.arg)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            owner = getattr(getattr(node.func, "value", None), "id", "")
            if name in ("exec", "__import__") or (owner, name) in (
                    ("os", "system"), ("os", "popen"), ("torch", "load"), ("np", "load"), ("numpy", "load")) \
                    or name in ("eval", "compile") and not isinstance(node.func, ast.Attribute):
                found.append(name)                              # not model.eval(), re.compile()
    return found


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "test_all.py"], ids=lambda p: p.name)
def test_no_file_loads_pickles_or_remote_code(path):
    assert unsafe(path.read_text()) == [], path
    assert not imported(path) & {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
    assert path.parent.name in ("bench", "tests") or "peft" not in imported(path)    # a peer there


@pytest.mark.parametrize("source", [
    "eval(x)", "exec('a')", "torch.load(p)", "f(trust_remote_code=True)", "run(c, shell=True)",
    "run(c, shell=x)", "os.system(c)", "np.load(p)", "np.load(p, allow_pickle=True)",
    "__import__(m)", "compile(a, b, c)"])
def test_the_check_for_unsafe_calls_sees_each_of_them(source):
    assert unsafe(source) and not unsafe("model.eval(); re.compile(p); run(c, shell=False); stack.load(p)")


def test_the_lines_that_are_copied_between_files_are_identical():
    for name in ("opt", "check_ranges"):
        assert len({inspect.getsource(getattr(room, name)) for room in (steer, heal_py, lora_py)}) == 1, name
    assert loop.opt is heal_py.opt


def test_files_are_no_longer_and_no_wider_than_what_reads_well():
    for path in SOURCES:
        wide = [n for n, line in enumerate(path.read_text().split("\n"), 1) if len(line) > 110]
        assert not wide, f"{path.name}: lines {wide[:9]} are over 110 columns"
    for name in ("loop", *CONCEPTS):
        assert len((ROOT / f"{name}.py").read_text().splitlines()) <= 500, name


@pytest.mark.parametrize("name", ["heal", "lora"])
def test_a_concept_file_runs_alone_in_an_empty_folder(tmp_path, name):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    out = subprocess.run([sys.executable, f"{name}.py"], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout, out.stderr


def test_steer_can_be_imported_alone_and_says_how_it_is_used(tmp_path):
    shutil.copy(ROOT / "steer.py", tmp_path)
    out = subprocess.run([sys.executable, "steer.py", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert "usage" in out.stdout.lower() and "Traceback" not in out.stderr, out.stderr


def test_help_is_quick_shows_ten_options_first_and_does_not_import_transformers():
    code = ("import sys, loop\ntry: loop.parse(['--help'])\n"
            "except SystemExit: print('transformers' in sys.modules)")
    spent = []
    for _ in range(2):                                          # the better of two: the first fills caches
        before = os.times()
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        after = os.times()                                      # of the processor, not by the clock
        spent.append(sum(after[2:4]) - sum(before[2:4]))
    assert out.stdout.splitlines()[-1] == "False", out.stdout[-200:] + out.stderr
    titles = ["turned first:", "loop: ", "steer: ", "lora: ", "heal: "]
    at = [out.stdout.index(title) for title in titles]
    assert at == sorted(at) and out.stdout[at[0]:at[1]].count("\n  --") == 10 == len(loop.FIRST)
    options = {f.name for cls in loop.GROUPS for f in dataclasses.fields(cls)}
    assert len(options) <= 48 and not re.search(r"--\w+_", out.stdout)
    assert min(spent) < 3, spent


def test_every_word_after_loop_py_says_how_it_is_used(capsys):
    for word in loop.WORDS:
        with pytest.raises(SystemExit) as stop:
            loop.main([word, "--help"])
        assert stop.value.code == 0 and f"loop.py {word}" in capsys.readouterr().out, word


def test_ci_runs_the_test_command_of_the_readme():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert "pip install -r requirements.txt && pytest" in readme and "pytest -q" in ci
    assert "python loop.py --kl-agg rmse" in readme and "python loop.py --kl-agg rmse --rounds 1" in ci


def test_the_readme_snippet_runs():
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def stale(text, is_ancestor):
    """Commits that a page gives for its results and that are not in the history; none if it says that
    they were not repeated since."""
    commits = re.findall(r"at commit `?([0-9a-f]{7,40})", text)
    return [c for c in commits if not is_ancestor(c) and "not repeated since" not in text]


def test_results_in_the_docs_are_of_commits_of_this_history():
    assert stale("at commit 1234567, at commit abcdef0", lambda c: c == "1234567") == ["abcdef0"]
    assert stale("at commit abcdef0; not repeated since", lambda c: False) == []
    shallow = ["git", "rev-parse", "--is-shallow-repository"]
    if not shutil.which("git") or subprocess.run(shallow, cwd=ROOT, capture_output=True).stdout != b"false\n":
        pytest.skip("no git here, or a shallow clone: the commits that the docs name cannot be checked")

    def is_ancestor(commit):
        ask = ["git", "merge-base", "--is-ancestor", commit, "HEAD"]
        return subprocess.run(ask, cwd=ROOT, capture_output=True).returncode == 0
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert stale(path.read_text(), is_ancestor) == [], path.name
