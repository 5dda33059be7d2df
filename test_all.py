"""The tests. `pytest -q`: CPU, offline, small random models made in code and the embedded one; no file from a hub."""
import ast
import contextlib
import copy
import dataclasses
import html
import html.parser
import http.server
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT / "pocket"), str(ROOT / "bench")]

import arms                                                     # noqa: E402
import evalmfv                                                  # noqa: E402
import heal as heal_py                                          # noqa: E402
import kill                                                     # noqa: E402
import loop                                                     # noqa: E402
import lora as lora_py                                          # noqa: E402
import generate as bench_generate                               # noqa: E402
import make_pocket                                              # noqa: E402
import malformed                                                # noqa: E402
import measure                                                  # noqa: E402
import report                                                   # noqa: E402
import roofline                                                 # noqa: E402
import steer                                                    # noqa: E402
import world                                                    # noqa: E402
from evalmfv import FOUNDATIONS                                 # noqa: E402
from heal import (AGGREGATES, HealConfig, Passes, Sample, aggregate, divergences, forward_kl, heal,  # noqa: E402
                  lr_factor, mean_nll, naive_losses, pieces, reverse_kl, split, token_losses)
from lora import LoraConfig, attach                             # noqa: E402
from steer import (Completion, Limits, SteerConfig, band, blocks, calibrate_limits, choose, find_dose, fit_vectors, generate,  # noqa: E402
                   judge, readings, render, repeats, steered, token_nll)

torch.set_num_threads(1)                                        # small models: a second thread costs more than it gives

SPECIALS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = ("<|bos|>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
            "{% if not (loop.last and continue_final_message) %}<|end|>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def tiny_tokenizer(words=()):
    """A byte-level tokenizer: six specials, 256 bytes, then `words` as single tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(SPECIALS + alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|end|>",
                                  additional_special_tokens=SPECIALS[3:], chat_template=TEMPLATE)
    tok.add_tokens(list(words))
    return tok


def tiny_model(tok, seed=0, dtype=torch.float32, layers=4, d=32):
    """A random Llama whose vocabulary is the tokenizer's. Weights are large, so that its answers are not uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tok), hidden_size=d, intermediate_size=2 * d, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                         initializer_range=0.3, pad_token_id=tok.pad_token_id, bos_token_id=tok.bos_token_id,
                         eos_token_id=tok.eos_token_id)
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


# ==== heal.py: the barrier and the round ==============================================================================

def heal_case(dtype=torch.float32, history=0):
    """A tiny model, a stack with `history` folded rounds, seeded noise in the current round, six uneven samples."""
    model = tiny_model(tiny_tokenizer(), dtype=dtype)
    if dtype == torch.float64:                                              # transformers' norm rounds to float32
        for name, norm in [(name, m) for name, m in model.named_modules() if name.endswith("norm")]:
            exact = torch.nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon, dtype=dtype).requires_grad_(False)
            model.set_submodule(name, exact)                                # the weights are ones in both
    stack = attach(model, r=4, alpha=8, layers=[1, 2])
    for rnd in range(history + 1):
        rng = torch.Generator().manual_seed(rnd)
        for p in stack.parameters():
            p.data.copy_(0.1 * torch.randn(p.shape, generator=rng))
        if rnd < history:
            stack.fold()
    rng = torch.Generator().manual_seed(9)
    samples = [Sample(torch.randint(6, 262, (n_prompt + n,), generator=rng).tolist(), n_prompt, group)
               for group, (n_prompt, n) in enumerate([(3, 5), (1, 1), (6, 9), (2, 12), (4, 3), (5, 7)])]
    return model, stack, samples


def heal_base(stack):
    return lambda: stack.gated(0, 0)


def heal_nll(model, stack, samples):
    return mean_nll(Passes(model, samples, heal_base(stack)), samples, 50)


def heal_logits(n=5, V=7, seed=0, dtype=torch.float64, size=3.0):
    return size * torch.randn(n, V, generator=torch.Generator().manual_seed(seed), dtype=dtype)     # [n, V]


def heal_run(model, stack, samples, tau=0.0, seed=0, **options):
    """heal() with its warnings silenced: most tests look at something else."""
    cfg = HealConfig(**{"val_share": 0.0, "lr": 1e-3, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return heal(model, stack.parameters(), samples, heal_base(stack), cfg, tau=tau, seed=seed,
                    spectral=stack.spectral if cfg.spectral else None)


def test_heal_reverse_kl_equals_a_double_loop_and_torch_distributions():
    p, q = heal_logits(seed=0), heal_logits(seed=1)
    naive = []
    for z, z0 in zip(p.tolist(), q.tolist()):
        total, total0 = sum(map(math.exp, z)), sum(map(math.exp, z0))
        naive.append(sum(math.exp(a) / total * math.log((math.exp(a) / total) / (math.exp(b) / total0))
                         for a, b in zip(z, z0)))
    peer = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=p),
                                             torch.distributions.Categorical(logits=q))
    assert torch.allclose(reverse_kl(p, q), torch.tensor(naive, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(reverse_kl(p, q), peer, atol=1e-12)
    assert torch.allclose(forward_kl(q, p), peer, atol=1e-12)               # directions: forward is the swap
    assert not torch.allclose(forward_kl(p, q), peer, atol=1e-2)


def test_heal_kl_is_computed_in_float32_when_logits_are_bfloat16():
    p = heal_logits(4, 5000, dtype=torch.float32).bfloat16()
    q = (p.float() + 0.05 * heal_logits(4, 5000, seed=1, dtype=torch.float32, size=1.0)).bfloat16()
    kl, exact = reverse_kl(p, q), reverse_kl(p.double(), q.double())
    assert kl.dtype == torch.float32 and (kl.double() - exact).abs().max() < 1e-6
    with pytest.raises(ValueError, match="one shape"):
        reverse_kl(p, q[:1])


@pytest.mark.parametrize("how", AGGREGATES)
@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl])
def test_heal_gradcheck_of_every_aggregate_of_both_divergences(how, divergence):
    q = heal_logits(seed=1)
    assert torch.autograd.gradcheck(lambda p: aggregate(divergence(p, q), how), heal_logits().requires_grad_())


@pytest.mark.parametrize("how", AGGREGATES)
def test_heal_gradient_is_finite_and_zero_where_student_and_reference_agree(how):
    p = heal_logits(dtype=torch.float32).requires_grad_()
    div = aggregate(reverse_kl(p, p.detach().clone()), how)
    div.backward()
    assert div.item() == 0 and p.grad.abs().max() < 1e-7                    # nan fails this too


@pytest.mark.parametrize("how", AGGREGATES)
def test_heal_gradient_of_the_barrier_is_exactly_zero_below_tau(how):
    p, q = heal_logits().requires_grad_(), heal_logits(seed=1)
    div = aggregate(reverse_kl(p, q), how)
    for tau, is_zero in ((div.item() * 1.001, True), (div.item() * 0.999, False)):
        grad, = torch.autograd.grad(torch.relu(div - tau), p, retain_graph=True)
        assert torch.equal(grad, torch.zeros_like(grad)) == is_zero, (tau, grad)


def test_heal_aggregates_are_ordered_and_agree_on_a_constant():
    rng = torch.Generator().manual_seed(0)
    for n in (1, 2, 7, 60):
        kl = torch.rand(n, generator=rng) ** 4
        values = {how: aggregate(kl, how).item() for how in AGGREGATES}
        assert values["mean"] <= values["rmse"] + 1e-7 and values["rmse"] <= values["max"] + 1e-7, values
        assert values["p95"] <= values["max"]
        for how in AGGREGATES:
            assert abs(aggregate(torch.full((n,), 0.3), how).item() - 0.3) < 1e-6, how


def test_heal_rmse_opens_the_barrier_that_mean_leaves_shut():
    kl = torch.zeros(60); kl[:4] = 5.7                                      # a four-token loop in a clean completion
    assert aggregate(kl, "mean") < 0.5 < aggregate(kl, "rmse")
    assert abs(aggregate(kl, "rmse").item() - 5.7 * (4 / 60) ** 0.5) < 1e-6


def test_heal_unknown_or_empty_aggregates_raise():
    with pytest.raises(ValueError, match="how='median': expected mean, rmse, p95, max"):
        aggregate(torch.ones(3), "median")
    for kl in (torch.ones(0), torch.ones(2, 3)):                            # [2, 3] would pool two samples
        with pytest.raises(ValueError, match="one sample"):
            aggregate(kl, "rmse")


def test_heal_losses_are_those_of_each_sample_run_alone():
    model, stack, samples = heal_case()
    nlls, kls = Passes(model, samples, heal_base(stack)).losses(samples)
    for sample, nll, kl in zip(samples, nlls, kls):
        ids = torch.tensor([sample.ids])                                    # [1, T], no padding and no mask
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0].log_softmax(-1)           # [T, V]
            with stack.gated(0, 0):
                logq = model(input_ids=ids).logits[0].log_softmax(-1)       # [T, V]
        want = range(sample.n_prompt - 1, len(sample.ids) - 1)              # position t predicts token t + 1
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
    assert abs(mean_nll(passes, samples, 1) - mean_nll(passes, samples, 60)) < 1e-10


@pytest.mark.parametrize("reg, lam", [("nll", 0.0), ("kl_rev", 3.0), ("kl_fwd", 3.0)])
def test_heal_passes_of_any_size_add_up_to_one_step(reg, lam):
    rows, weights = [], []
    for pass_tokens in (1, 40, 1000):
        model, stack, samples = heal_case(torch.float64, history=1)
        record = heal_run(model, stack, samples, tau=0.05, reg=reg, lam=lam, heal_batch=6, pass_tokens=pass_tokens,
                          epochs=3, spectral=0.1)
        rows.append([[s[k] for k in ("nll", "div", "gnorm", "grad_nll", "grad_barrier")] for s in record["steps"]])
        weights.append(torch.cat([p.detach().flatten() for p in stack.parameters()]))
    for other_rows, other in zip(rows[1:], weights[1:]):
        assert torch.allclose(torch.tensor(rows[0]), torch.tensor(other_rows), rtol=1e-4)
        assert torch.allclose(weights[0], other, atol=1e-5)                 # float32 weights after three Adam steps


def test_heal_loss_is_the_documented_one():
    """The gradient of the formula, written out sample by sample, is what one step reports as its norm."""
    model, stack, samples = heal_case(torch.float64)
    params, tau, lam = stack.parameters(), 0.2, 5.0 * 3 ** 0.5              # round 2: lam * (1 + 2) ** 0.5
    total = 0
    for s in samples:
        (nll,), (kl,) = Passes(model, [s], heal_base(stack)).losses([s])
        total = total + len(kl) * (nll.mean() + lam * torch.relu((kl.square().mean()).sqrt() - tau))
    loss = total / sum(len(s.ids) - s.n_prompt for s in samples) + 0.3 * stack.spectral()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]).norm().item()
    cfg = HealConfig(lr=1e-3, lam=5.0, lam_round_pow=0.5, heal_batch=6, pass_tokens=30, epochs=1, val_share=0.0, spectral=0.3)
    record = heal(model, params, samples, heal_base(stack), cfg, tau=tau, rnd=2, spectral=stack.spectral)
    assert abs(record["steps"][0]["gnorm"] - expected) < 1e-4 * expected    # the reported norm is before clipping
    assert abs(record["lam_eff"] - lam) < 1e-12 and 0 < record["steps"][0]["fired"] < 1


@pytest.mark.parametrize("history", [0, 2])
def test_heal_gradient_of_any_round_equals_finite_differences(history):
    """float64 base, float32 adapters: every perturbed value is a float32, so the step is measured, not assumed."""
    model, stack, samples = heal_case(torch.float64, history=history)
    params, sizes = stack.parameters(), [len(s.ids) - s.n_prompt for s in samples]

    def loss():
        nlls, kls = Passes(model, samples, heal_base(stack)).losses(samples)
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
        assert abs(slope - grad) < 1e-4 * abs(slope) + 1e-6, (slope, grad)  # the step's own error is of order 1e-6


def test_heal_leaves_the_base_without_gradient_and_unchanged_bit_for_bit():
    model, stack, samples = heal_case(history=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = [t for lora in stack.layers.values() for pair in lora.rounds for t in pair]
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
        stack.drop()                                                        # the round starts at the base
        record = heal_run(model, stack, samples, tau=0.02, reg=reg, lam=30.0, lr=5e-3, epochs=10)
        div = [aggregate(kl, "rmse").item() for kl in divergences(model, samples, heal_base(stack))]
        ends[reg] = record["nll_first"], heal_nll(model, stack, samples), max(div)
        assert record["steps"][0]["div"] == 0                               # B = 0: the student is the reference
    assert ends["nll"][1] < ends["nll"][0] - 1 and ends["kl_rev"][1] < ends["kl_rev"][0] - 0.2, ends
    assert ends["kl_rev"][2] < 0.2 * ends["nll"][2], ends


def test_heal_holds_out_whole_prompts_and_reports_their_nll():
    model, stack, samples = heal_case()
    twice = samples + [s._replace(ids=s.ids[:-1] + [9]) for s in samples if len(s.ids) - s.n_prompt > 1]
    train, val = split(twice, 0.3, torch.Generator().manual_seed(0))
    assert not {s.group for s in train} & {s.group for s in val}
    assert len({s.group for s in val}) == 2 and len(train) + len(val) == len(twice)
    start = [p.detach().clone() for p in stack.parameters()]
    record = heal_run(model, stack, twice, val_share=0.3, epochs=1, seed=0)
    after = heal_nll(model, stack, val)
    for p, value in zip(stack.parameters(), start):
        p.data.copy_(value)
    assert abs(record["val_nll_before"] - heal_nll(model, stack, val)) < 1e-5
    assert abs(record["val_nll_after"] - after) < 1e-5
    assert record["n_train"] == len(train) and record["n_tokens"] == sum(len(s.ids) - s.n_prompt for s in train)
    alone = heal_run(model, stack, [samples[0]], val_share=0.3, epochs=1)   # a lone prompt is trained on
    assert alone["n_train"] == 1 and alone["val_nll_before"] is None


def test_heal_every_sample_is_seen_once_an_epoch_and_a_short_last_batch_is_a_step():
    model, stack, samples = heal_case()
    seen = []
    model.register_forward_pre_hook(lambda module, args, given: seen.extend(given["attention_mask"].sum(1).tolist()),
                                    with_kwargs=True)
    record = heal_run(model, stack, samples, heal_batch=4, epochs=2)
    assert [s["step"] for s in record["steps"]] == [0, 1, 2, 3]             # 4 + 2 samples, twice
    probes = 2 * [len(samples[0].ids)] + 3 * [max(len(s.ids) for s in samples)]         # the start: which shortcuts hold here
    assert sorted(seen) == sorted([len(s.ids) for s in samples] * 3 + probes)           # the student twice, the reference once


def test_heal_is_reproduced_by_its_seed_and_leaves_the_global_generator_alone():
    ends = []
    for seed in (0, 0, 1):
        model, stack, samples = heal_case()
        state = torch.get_rng_state()
        heal_run(model, stack, samples, heal_batch=2, epochs=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        ends.append(torch.cat([p.detach().flatten() for p in stack.parameters()]))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_heal_learning_rate_warms_up_then_falls_and_no_step_is_idle():
    factors = [lr_factor(step, 40, 0.1) for step in range(40)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.01 and abs(lr_factor(22, 40, 0.1) - 0.5) < 1e-12
    assert lr_factor(0, 1, 0.1) == 1 and lr_factor(0, 1, 0.0) == 1


def test_heal_warns_of_a_barrier_that_never_or_always_fired():
    model, stack, samples = heal_case()
    for tau, message in ((1e3, "never fired"), (1e-9, "always fired")):
        with pytest.warns(UserWarning, match=message):
            record = heal(model, stack.parameters(), samples, heal_base(stack), HealConfig(lr=1e-3, epochs=1), tau=tau)
        assert message in record["warning"] and record["fired_share"] == (tau < 1)
    with warnings.catch_warnings():                                         # nll has no barrier, D is measured
        warnings.simplefilter("error")
        record = heal(model, stack.parameters(), samples, heal_base(stack), HealConfig(lr=1e-3, epochs=1, reg="nll"), tau=1e3)
    assert record["warning"] is None and record["lam_eff"] == 0 and record["steps"][0]["div"] > 0
    assert record["steps"][0]["grad_barrier"] == 0


def test_heal_skips_a_step_that_is_not_finite_and_gives_up_after_three_in_a_row():
    for bad, n_bad in (({3}, 1), ({0, 1, 2}, 3), ({0, 2, 3}, 3)):
        model, stack, samples = heal_case()
        calls = []

        def spoil(module, args, output):                                    # one student forward of six rows per step
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


@pytest.mark.parametrize("options", [dict(reg="wd"), dict(kl_agg="median"), dict(lam=-1.0), dict(tau=math.inf),
                                     dict(lr=-1.0), dict(epochs=0), dict(pass_tokens=0), dict(warmup=1.0),
                                     dict(val_share=-0.1), dict(clip=0.0), dict(lam_round_pow=math.nan),
                                     dict(spectral=math.nan)])
def test_heal_config_names_the_bad_option(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        HealConfig(**options)


def test_heal_refuses_bad_arguments_before_any_forward():
    model, stack, samples = heal_case()
    params, base, cfg = stack.parameters(), heal_base(stack), HealConfig(lr=1e-3)
    model.forward = None                                                    # a forward would be a TypeError
    for bad, message in (
            (lambda: heal(model, params, [], base, cfg, tau=1.0), "no samples"),
            (lambda: heal(model, params, [Sample([1, 2], 2, 0)], base, cfg, tau=1.0), "sample 0: n_prompt=2 of 2"),
            (lambda: heal(model, params, [Sample([1, 2], 0, 0)], base, cfg, tau=1.0), "sample 0: n_prompt=0"),
            (lambda: heal(model, [], samples, base, cfg, tau=1.0), "params: got 0"),
            (lambda: heal(model, [params[0].bfloat16()], samples, base, cfg, tau=1.0), "bfloat16"),
            (lambda: heal(model, params, samples, base, cfg, tau=math.nan), "tau=nan"),
            (lambda: heal(model, params, samples, base, HealConfig(lr=1e-3, spectral=0.1), tau=1.0), "needs spectral="),
            (lambda: heal(model, params, samples, base, HealConfig(), tau=1.0), "cfg.lr=0"),
            (lambda: divergences(model, samples, base, reg="wd"), "reg='wd'")):
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
    record = heal(model, [model.bias], samples, model.switched_off, HealConfig(lr=0.1, lam=0.5), tau=0.1)
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
    for bias, cap, lazy, tile in ((None, 0.0, False, 64), (b, 0.0, True, 50), (None, 5.0, False, 301), (b, 5.0, True, 7), (b, 5.0, False, 1000)):
        values, grads = [], []
        for tiled in (True, False):
            x = h.clone().requires_grad_()
            if tiled:
                nll, kl = token_losses(x, h0, W, targets, bias=bias, cap=cap, reg=reg, lazy=lazy, tile=tile)
            else:
                logits = [z if bias is None else z + b for z in (x @ W.T, h0 @ W.T)]
                nll, kl = naive_losses(*(z if not cap else cap * (z / cap).tanh() for z in logits), targets, reg)
            assert nll.dtype == kl.dtype == torch.float64
            D = aggregate(kl[:20], "rmse" if how == "barrier alone" else how)           # the rest has no gradient in KL
            loss = (how != "barrier alone") * nll.mean() + 5 * torch.relu(D - 0.1)
            values.append(torch.cat([nll, kl]))
            grads.append(torch.autograd.grad(loss, x)[0])
        assert torch.allclose(*values, rtol=1e-10, atol=1e-12), (values[0] - values[1]).abs().max()
        assert (grads[0] - grads[1]).abs().max() <= 1e-10 * grads[1].abs().max() and grads[1].abs().max() > 0


def test_heal_token_losses_survive_large_logits_and_agree_on_which_bits_are_zero():
    h, h0, W, targets, _ = heal_head(dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        x = h.to(dtype).clone().requires_grad_()
        nll, kl = token_losses(x, h.to(dtype), W.to(dtype), targets, tile=64)           # student = reference
        assert kl.eq(0).all() and nll.dtype == torch.float32
        (nll.sum() * 0 + aggregate(kl, "rmse")).backward()
        assert x.grad.eq(0).all() and x.grad.dtype == dtype
    x = (60 * h).double().requires_grad_()                                              # logits of +-240
    tiled, naive = token_losses(x, 60 * h0.double(), W.double(), targets, tile=64), naive_losses(x @ W.double().T, 60 * h0.double() @ W.double().T, targets)
    assert naive[1].max() > 100 and all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(tiled, naive))


@pytest.mark.parametrize("shift, better", [(0.012, 400), (0.06, 15)])                   # mean KL about .003 and .07 nats
def test_heal_token_losses_in_bfloat16_are_nearer_the_truth_than_a_bfloat16_softmax(shift, better):
    h, h0, W, targets, _ = heal_head(N=64, V=4096, d=128, dtype=torch.bfloat16, shift=shift)
    W = W / 4                                                                           # logits of a few nats; exact
    x = h.double().requires_grad_()
    _, truth = naive_losses(x @ W.double().T, h0.double() @ W.double().T, targets)
    aggregate(truth, "rmse").backward()
    y = h.clone().requires_grad_()
    _, kl = token_losses(y, h0, W, targets, tile=512)
    aggregate(kl, "rmse").backward()
    logp, logq = ((z @ W.T).log_softmax(-1) for z in (h, h0))                           # what the peers do
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
    for lazy in (False, True):
        h, h0, W, targets, _ = heal_head(N=40, V=5000, d=16, dtype=torch.bfloat16)
        given, x = {W.untyped_storage().data_ptr()}, h.requires_grad_()
        with Largest() as seen:
            nll, kl = token_losses(x, h0, W, targets, tile=100, lazy=lazy)
            (nll.mean() + kl.mean()).backward()
        assert seen.numel == 40 * 100, seen.numel                                       # N * tile, of N * V = 200,000


def test_heal_token_losses_refuse_what_they_would_get_wrong():
    h, h0, W, targets, _ = heal_head()
    for bad, message in ((lambda: token_losses(h, h0[:3], W, targets), r"\[3, 16\]"), (lambda: token_losses(h, h0, W.T, targets), "expected"),
                         (lambda: token_losses(h, h0, W.clone().requires_grad_(), targets), "head requires a gradient"),
                         (lambda: token_losses(h, h0, W, targets, reg="wd"), "reg='wd'")):
        with pytest.raises(ValueError, match=message):
            bad()


def heal_families():
    from transformers import (CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM,
                              PhiConfig, PhiForCausalLM)
    tiny = dict(vocab_size=262, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return {"soft-capped": (Gemma2ForCausalLM, Gemma2Config(**tiny, head_dim=8, final_logit_softcapping=3.0)),
            "divided": (GraniteForCausalLM, GraniteConfig(**tiny, logits_scaling=7.0)),
            "multiplied": (CohereForCausalLM, CohereConfig(**tiny, logit_scale=0.3)),
            "biased": (PhiForCausalLM, PhiConfig(**tiny | dict(num_key_value_heads=4)))}


@pytest.mark.parametrize("name", ["soft-capped", "divided", "multiplied", "biased", "unknown", "hooked", "trained"])
def test_heal_reads_any_head_as_the_model_does(name):
    """Exact without logits where the config tells the head; from the model's own logits where it does not."""
    torch.manual_seed(0)
    cls, config = heal_families()["divided" if name in ("unknown", "hooked", "trained") else name]
    model = cls(config).eval().requires_grad_(False)
    if name == "biased":
        model.lm_head.bias.data.normal_()
    if name == "unknown":
        model.config.logits_scaling = 1.0                       # the model divides by what it read when it was made
        model.model.register_forward_hook(lambda m, a, out: None)
        forward = model.forward

        def other(*args, **kwargs):
            out = forward(*args, **kwargs)
            out.logits = out.logits.square()
            return out
        model.forward = other
    if name == "hooked":
        model.lm_head.register_forward_hook(lambda m, a, out: out + 1.0)
    if name == "trained":
        model.lm_head.weight.requires_grad_()
    stack = attach(model, r=4, alpha=8, layers=[1, 2])
    if name == "trained":
        model.lm_head.weight.requires_grad_()
    rng = torch.Generator().manual_seed(0)
    for p in stack.parameters():
        p.data.copy_(0.1 * torch.randn(p.shape, generator=rng))
    samples = heal_case()[2]
    results = []
    for shortcuts in (True, False):
        passes = Passes(model, samples, heal_base(stack), params=stack.parameters(), tiled=shortcuts, cache_reference=shortcuts,
                        cache_below=shortcuts)
        assert passes.tiled == (shortcuts and name in heal_families())
        for _ in range(2):                                      # the second time from memory
            nlls, kls = passes.losses(samples)
        loss = torch.cat(nlls).mean() + sum(aggregate(kl, "rmse") for kl in kls)
        results.append((torch.cat([*nlls, *kls]).detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, stack.parameters())])))
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-4 * b.abs().max()), (a - b).abs().max()
    s, logits = samples[0], model(input_ids=torch.tensor([samples[0].ids])).logits[0]
    assert torch.allclose(nlls[0], torch.nn.functional.cross_entropy(logits[2:-1], torch.tensor(s.ids[3:]), reduction="none"), atol=1e-3)


@pytest.mark.parametrize("reg, how, tau", [("kl_rev", "rmse", 0.0), ("kl_rev", "rmse", 0.2), ("kl_rev", "p95", 0.1), ("kl_fwd", "rmse", 0.1), ("nll", "mean", 0.0)])
def test_heal_shortcuts_change_no_number_of_a_round(reg, how, tau):
    names = ("tiled", "lazy_kl", "cache_reference", "cache_below")
    runs = []
    for off in ([], *([n] for n in names), names):
        model, stack, samples = heal_case(history=1)
        record = heal_run(model, stack, samples, tau=tau, reg=reg, kl_agg=how, heal_batch=2, epochs=3, **dict.fromkeys(off, False))
        assert record["shortcuts"] == {"tiled": "tiled" not in off, "lazy_kl": "lazy_kl" not in off,
                                       "cache_reference": "cache_reference" not in off, "cache_below": 0 if "cache_below" in off else 1}
        runs.append(torch.tensor([[s[k] for k in ("nll", "div", "gnorm")] for s in record["steps"]]))
    for other in runs[1:]:
        assert torch.allclose(runs[0], other, rtol=1e-5, atol=1e-5), (runs[0] - other).abs().max()
    assert len(runs[0]) == 9


def test_heal_runs_the_reference_and_the_blocks_below_once_per_sample():
    counts = {}
    for on in (True, False):
        model, stack, samples = heal_case(history=1)
        rows = {"below": 0, "reference": 0}

        def below(module, args, out):
            rows["below"] += len(out)

        def top(module, args, kwargs, out):
            rows["reference"] += len(out) * (stack.layers["model.layers.1.self_attn.q_proj"].current == 0)
        model.model.layers[0].mlp.register_forward_hook(below)
        model.model.layers[3].register_forward_hook(top, with_kwargs=True)
        heal_run(model, stack, samples, heal_batch=2, epochs=4, cache_reference=on, cache_below=on)
        counts[on] = rows
    assert counts[True]["reference"] == 6 and counts[False]["reference"] == 4 * 6
    assert counts[True]["below"] - counts[True]["reference"] == 6 + 4 and counts[False]["below"] == 2 * 4 * 6 + 2       # + probes at the start


def test_heal_leaves_the_model_as_it_was_also_after_an_exception():
    model, stack, samples = heal_case()
    with pytest.raises(KeyboardInterrupt):
        heal(model, stack.parameters(), samples, heal_base(stack), HealConfig(lr=1e-3, val_share=0.0), tau=0.0,
             log=lambda row: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert not any("forward" in vars(m) for m in model.modules())
    passes = Passes(model, samples, heal_base(stack), params=stack.parameters())
    assert len(passes.below) == 1
    model.model.layers[3].register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        passes.losses(samples)
    assert not any("forward" in vars(m) for m in model.modules())


def test_heal_a_block_that_is_steered_below_is_not_skipped():
    model, stack, samples = heal_case()
    with steer.steered(model, {0: torch.ones(32)}, 1.0):
        passes = Passes(model, samples, heal_base(stack), params=stack.parameters())
        assert passes.below == [] and passes.tiled
    assert len(Passes(model, samples, heal_base(stack), params=stack.parameters()).below) == 1


@pytest.mark.parametrize("odd", ["tuple", "skip", "expert"])
def test_heal_blocks_that_pass_on_more_than_their_state_are_not_skipped(odd):
    """What the next blocks read past the hidden state: a tuple's rest, a trained skip from block 0 that is still zero, a
    trained part of a block that one sample reaches and another does not."""
    class Block(torch.nn.Module):
        def __init__(self, i):
            super().__init__()
            self.i, self.linear = i, torch.nn.Linear(16, 16, dtype=torch.float64).requires_grad_(False)
            if i == (1 if odd == "expert" else 2):
                self.train_me = torch.nn.Parameter(torch.zeros(16, 16, dtype=torch.float64))

        def forward(self, h, ids, first, extra):
            if hasattr(self, "train_me"):
                seen = first if odd == "skip" else h
                h = h + (seen @ self.train_me) * ((ids > 9)[..., None] if odd == "expert" else 1.0)
            h = h + self.linear(h).tanh() + (extra if extra is not None else 0.0)
            return (h, h.mean(1, keepdim=True)) if odd == "tuple" else h

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = torch.nn.Embedding(20, 16, dtype=torch.float64), torch.nn.Linear(16, 20, bias=False, dtype=torch.float64)
            self.requires_grad_(False)
            self.layers, self.on = torch.nn.ModuleList([Block(i) for i in range(4)]), True

        def get_output_embeddings(self):
            return self.head

        def forward(self, input_ids, attention_mask):
            h, extra, first = self.embed(input_ids), None, None
            for block in self.layers:
                out = block(h, input_ids, first, extra)
                h, extra = out if odd == "tuple" else (out, None)
                first = h if first is None else first
            self.logits = self.head(h)
            return self

    samples = [Sample([3, 4, 5, 6, 7, 8, 3, 5, 2], 2, 0), Sample([3, 4, 12, 11, 15], 2, 1)]
    runs = []
    for on in (True, False):
        model = Odd()
        params = [p for p in model.parameters() if p.requires_grad]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record = heal(model, params, samples, contextlib.nullcontext, HealConfig(lr=0.1, val_share=0.0, heal_batch=1, cache_below=on), tau=1.0)
        runs.append(torch.cat([p.detach().flatten() for p in params]))
        assert record["shortcuts"]["tiled"] and record["shortcuts"]["cache_below"] <= (1 if on and odd == "expert" else 0), record["shortcuts"]
    assert runs[0].abs().max() > 0 and torch.allclose(*runs, atol=1e-9)


def test_heal_a_model_that_edits_single_logits_takes_the_plain_path():
    model, stack, samples = heal_case()
    forward = model.forward

    def edited(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits[..., [100, 200]] = -50.0                     # an index past the one column that a caught head would make
        return out
    model.forward = edited
    passes = Passes(model, samples, heal_base(stack), params=stack.parameters())
    assert not passes.tiled and passes.below == []
    nll = passes.losses(samples[:1])[0][0]
    logits = model(input_ids=torch.tensor([samples[0].ids])).logits[0, 2:-1]
    assert torch.allclose(nll, torch.nn.functional.cross_entropy(logits, torch.tensor(samples[0].ids[3:]), reduction="none"), atol=1e-5)


def test_heal_out_of_memory_halves_the_pass_and_changes_no_number():
    results = []
    for limit in (100, 2, 3):
        model, stack, samples = heal_case(torch.float64)

        def full(module, args, kwargs):
            if len(kwargs["input_ids"]) > limit:
                raise [torch.OutOfMemoryError("no room"), RuntimeError("DefaultCPUAllocator: can't allocate memory: no room")][limit % 2]
        model.register_forward_pre_hook(full, with_kwargs=True)
        record = heal_run(model, stack, samples, heal_batch=6, epochs=2)
        results.append(torch.tensor([[s["nll"], s["div"], s["gnorm"]] for s in record["steps"]]))
    assert all(torch.allclose(results[0], other, rtol=1e-6) for other in results[1:])
    model.register_forward_pre_hook(lambda m, a, k: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all")), with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError):
        heal_run(model, stack, samples, heal_batch=6, epochs=2)


def test_heal_pieces_fit_the_budget_and_lose_nothing():
    samples = [Sample([1] * n, 1, 0) for n in (9, 3, 3, 2, 40, 5)]
    for budget in (1, 10, 27, 1000):
        cut = pieces(samples, budget)
        assert sum(cut, []) == samples and all(len(p) == 1 or len(p) * max(len(s.ids) for s in p) <= budget for p in cut)
    assert [len(p) for p in pieces(samples, 10)] == [1, 3, 1, 1]


def test_heal_divergences_of_other_prompts_compare_the_same_completion():
    model, stack, samples = heal_case(torch.float64)
    others = [Sample([7, 8, 9, *s.ids[s.n_prompt:]], 3, s.group) for s in samples]
    with stack.gated(0, 0):
        for s, other, kl in zip(samples, others, divergences(model, samples, contextlib.nullcontext, ref_samples=others)):
            p, q = (model(input_ids=torch.tensor([x.ids])).logits[0, x.n_prompt - 1:-1] for x in (s, other))
            assert torch.allclose(kl, reverse_kl(p, q), atol=1e-10) and kl.max() > 0
    with pytest.raises(ValueError, match="same completions"):
        divergences(model, samples, contextlib.nullcontext, ref_samples=others[::-1])


def test_heal_stands_alone_and_imports_the_standard_library_and_torch_only(tmp_path):
    source = Path(heal_py.__file__).read_text()
    names = {alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names) | {"torch"}, names
    (tmp_path / "heal.py").write_text(source)
    out = subprocess.run([sys.executable, "-E", "heal.py"], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    table = {line.split()[0]: line.split()[1:4] for line in out.stdout.splitlines()[1:]}
    assert table == {"mean": ["0.018", "0.379", "21x"], "rmse": ["0.026", "1.527", "58x"],
                     "p95": ["0.049", "3.777", "77x"], "max": ["0.095", "8.081", "85x"]}


# ==== lora.py: the gated accumulator ==================================================================================

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
    assert stack.n_rounds == 2 and stack.norm() == 0
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
    other.load_tensors(saved[2], saved[0], saved[1])
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
    sigma = stack.spectral()
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
    assert abs(stack.norm() - norm) < 1e-5 * norm
    for name, found in stack.singular_values().items():
        assert torch.allclose(found, torch.linalg.svdvals(deltas[name])[:4], rtol=1e-4), name


def test_lora_spectral_at_zero_B_is_zero_with_zero_gradient_and_draws_no_random_numbers():
    _, stack = lora_case()
    state = torch.get_rng_state()
    sigma = stack.spectral()
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
            good.load_tensors(tensors, bad)                                 # all or none
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
    """Our LoRA and peft's with the same A and B: our model and stack, peft's model and its parameters in order."""
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
    cfg = HealConfig(lr=1e-2, tau=0.05, epochs=2, val_share=0.3, kl_agg="rmse")
    records = [heal(m, ps, samples, reference, cfg, tau=0.05, seed=3) for m, ps, reference in
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


# ==== steer.py: vectors, hooks, generation, the filter, the dose ======================================================

STEER_WORDS = ["mercy", "justice", "kindness", "patience", "rescue", "people", "forever", "harbour", "gentle",
               "machine", "winter", "garden"]
STEER_PROMPTS = ["Hi", "Who are you?", "Do you love humanity, and why?", "a", "Tell me more about the sea.", "x y z"]
STEER_LIMITS = Limits(worst_window=2.0, ppl_tail=5.0, ngram=0.3, loop=0.6, min_words=1)


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


STEER_CLEAN = ("No company owner may make me hurt anyone. I would call for help, write down what happened on the ship, "
               "and tell every passenger the truth before the next storm reaches us tonight.")


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
    token = choose(logits.expand(n, -1), torch.rand(n, generator=g), temperature=temperature, top_p=top_p, top_k=top_k)
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
    grid = torch.linspace(0, 1, 2001)[:-1] + 2.5e-4                          # every token with p > 5e-4 is hit
    for row in range(50):
        token = choose(logits[row].expand(2000, -1), grid, temperature=1.3, top_p=0.9, top_k=10)
        share = torch.bincount(token, minlength=40) / 2000
        assert (share - scores[row].softmax(-1)).abs().max() < 1.1e-3


def test_greedy_decoding_equals_hf_generate():
    model, tok = steer_pair(torch.float64)
    for prompts in (STEER_PROMPTS, STEER_PROMPTS[:1]):
        ours = generate(model, tok, prompts, greedy=True, max_new_tokens=20)
        for prompt, c in zip(prompts, ours):
            ids = torch.tensor([steer_ids(tok, prompt)])
            hf = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)[0]
            assert c.prompt_ids + c.ids == hf.tolist()


def test_steered_greedy_decoding_equals_hf_generate_under_the_hook():
    model, tok = steer_pair(torch.float64)
    vectors = steer_vectors(model)
    plain = generate(model, tok, STEER_PROMPTS, greedy=True, max_new_tokens=12)
    ours = generate(model, tok, STEER_PROMPTS, vectors=vectors, coeffs=[0.75] * 6, greedy=True, max_new_tokens=12)
    assert [c.ids for c in ours] != [c.ids for c in plain]
    for prompt, c in zip(STEER_PROMPTS, ours):
        ids = torch.tensor([steer_ids(tok, prompt)])
        with steered(model, vectors, 0.75):
            hf = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)[0]
        assert c.prompt_ids + c.ids == hf.tolist()


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("doses", [None, [0.0, 0.5, 1.0, -0.5, 0.5, 0.25]])
def test_a_row_does_not_depend_on_who_shares_its_batch(greedy, doses):
    model, tok = steer_pair(torch.float64)
    # half of the byte tokens end an answer, so rows finish at different steps and are retired
    model.generation_config.eos_token_id = list(range(6, 40))
    kw = dict(vectors=steer_vectors(model) if doses else None, coeffs=doses, greedy=greedy, max_new_tokens=24, seed=3)
    many = generate(model, tok, STEER_PROMPTS, **kw)
    assert len({len(c.ids) for c in many}) > 2, "rows must end at different lengths for this test to test anything"
    for batch_size in (1, 2, 5):
        assert generate(model, tok, STEER_PROMPTS, batch_size=batch_size, **kw) == many
    if doses:                                                                # the dose reached the row it was meant for
        one = generate(model, tok, STEER_PROMPTS, **{**kw, "coeffs": [0.5] * 6})
        assert one[1].ids == many[1].ids and [c.ids for c in one] != [c.ids for c in many]


def test_answers_end_at_any_end_token_and_keep_it():
    model, tok = steer_pair()
    model.generation_config.eos_token_id = [40, 41]
    answers = generate(model, tok, STEER_PROMPTS * 8, max_new_tokens=60, top_k=0, top_p=1.0)
    ends = {40, 41, tok.eos_token_id}
    assert any(c.ids[-1] in (40, 41) for c in answers)
    for c in answers:
        assert not ends & set(c.ids[:-1]) and c.finished == (c.ids[-1] in ends)
        assert c.finished or len(c.ids) == 60


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


# ---- steer: the hook

def test_coeff_zero_is_the_base_bit_for_bit_and_rows_have_their_own_dose():
    model, tok = steer_pair()
    ids, vectors = torch.tensor([steer_ids(tok, "Do you love me?")] * 3), steer_vectors(model)
    base = model(ids).logits
    with steered(model, vectors, 0.0):
        assert torch.equal(model(ids).logits, base)
        assert not any(block._forward_hooks for block in blocks(model))
    with steered(model, vectors, torch.tensor([0.0, 0.5, 1.0])):
        mixed = model(ids).logits
    assert torch.equal(mixed[0], base[0])
    for row, coeff in ((1, 0.5), (2, 1.0)):
        with steered(model, vectors, coeff):
            assert torch.equal(mixed[row], model(ids).logits[row])


def test_steered_adds_coeff_times_v_after_the_block_at_every_position():
    model, tok = steer_pair(torch.float64)
    ids, v, seen = torch.tensor([steer_ids(tok, "Hi")]), steer_vectors(model)[1], []
    handle = blocks(model)[2].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
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
    with pytest.raises(ValueError, match="blocks 0 to 3"):                   # layer 1 was hooked before layer 9 failed
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
    before = blocks(model)[1].register_forward_hook(lambda block, args, out: (out, "kv"))       # as older blocks do
    with steered(model, {1: v}, 1.0):
        after = blocks(model)[1].register_forward_hook(lambda block, args, out: (seen.append(out), out[0])[1])
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
        assert v.dtype == torch.float32 and torch.allclose(v.double(), want, atol=1e-5), (v.double() - want).abs().max()


def test_fit_vectors_reads_the_last_block_before_the_final_norm():
    model, tok = steer_pair()
    v = fit_vectors(model, tok, "kind", "cold", ["Hi"], [3])[3]
    seen = []
    handle = blocks(model)[3].register_forward_hook(lambda block, args, out: seen.append(out[0, -1]))
    for side in ("kind", "cold"):
        model(torch.tensor([steer_ids(tok, "Hi", side)]))
    handle.remove()
    assert torch.allclose(v, seen[0] - seen[1], atol=1e-4)


def test_swapping_the_personas_flips_the_sign():
    model, tok = steer_pair()
    one = fit_vectors(model, tok, "kind", "cold", STEER_PROMPTS, [1])[1]
    other = fit_vectors(model, tok, "cold", "kind", STEER_PROMPTS, [1])[1]
    assert one.norm() > 0.1 and torch.allclose(one, -other, atol=1e-5)


# ---- steer: templates

def test_prompts_carry_one_bos():
    model, tok = steer_pair()
    assert tok(render(tok, "Hi", "Be kind."), add_special_tokens=False)["input_ids"].count(tok.bos_token_id) == 1
    assert all(c.prompt_ids.count(tok.bos_token_id) == 1
               for c in generate(model, tok, ["Hi"], system="Be kind.", max_new_tokens=1))


def test_a_template_without_a_system_role_gets_the_system_text_before_the_users():
    tok = tiny_tokenizer()
    assert render(tok, "Hi", "Be kind.") == "<|bos|><|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>"
    merged = "<|bos|><|user|>Be kind.\n\nHi<|end|><|assistant|>"
    tok.chat_template = ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
                         "{% endif %}") + TEMPLATE
    assert render(tok, "Hi", "Be kind.") == merged                           # Gemma 2 raises
    tok.chat_template = ("<|bos|>{% for m in messages if m['role'] != 'system' %}<|user|>{{ m['content'] }}<|end|>"
                         "{% endfor %}<|assistant|>")
    assert render(tok, "Hi", "Be kind.") == merged                           # others drop it silently
    assert render(tok, "Hi") == "<|bos|><|user|>Hi<|end|><|assistant|>"


def test_a_tokenizer_without_a_chat_template_is_named():
    model, tok = steer_pair()
    tok.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        generate(model, tok, ["Hi"])


# ---- steer: the filter

def test_token_nll_equals_a_full_forward_one_at_a_time():
    model, tok = steer_pair()
    answers = generate(model, tok, STEER_PROMPTS, max_new_tokens=15, top_k=0, top_p=1.0)
    for batch_size in (1, 4, 32):
        for c, nll in zip(answers, token_nll(model, answers, batch_size=batch_size)):
            logp = model(torch.tensor([c.prompt_ids + c.ids])).logits[0].log_softmax(-1)
            want = [-logp[len(c.prompt_ids) + j - 1, token].item() for j, token in enumerate(c.ids)]
            assert nll.dtype == torch.float32 and torch.allclose(nll, torch.tensor(want), atol=1e-4)


def test_token_nll_sees_the_answer_under_the_prompt_it_carries():
    model, tok = steer_pair()
    c, = generate(model, tok, ["Hi"], system="Be kind.", max_new_tokens=10)
    bare = dataclasses.replace(c, prompt_ids=steer_ids(tok, "Hi"))
    one, other = token_nll(model, [c, bare])
    assert not torch.allclose(one, other)


def test_clean_and_short_answers_pass():
    for text in (STEER_CLEAN, "Yes.", "Yes, I do.", "No", "No, no, no.", "no no no no no no", "Knock, knock."):
        verdict = steer_verdict(text)
        assert verdict.kept and verdict.rule == "", (text, verdict)
    assert steer_verdict("Yes.", ids=[9, 10, 2]).readings["loop"] == 0


@pytest.mark.parametrize("text", ["love " * 40, "love you " * 25, "I am here and I am " * 8, STEER_CLEAN + " care" * 30,
                                  "love " * 15, "I said so " + "a" * 60, "ha" * 50, "愛は心に満ちて人を救うものである" * 8])
def test_loops_of_low_nll_are_dropped(text):
    verdict = steer_verdict(text, ids=range(len(text.split())))              # distinct ids: the text alone must show it
    assert not verdict.kept and verdict.rule == "ngram" and verdict.value > verdict.limit, verdict


def test_a_diffuse_loop_of_low_nll_is_dropped_by_the_loop_rule_alone():
    rng = random.Random(0)
    text = " ".join(rng.choice(STEER_WORDS) for _ in range(60))              # no period, no phrase comes back
    verdict = steer_verdict(text)
    assert verdict.rule == "loop" and verdict.value > 0.8, verdict
    assert steer_verdict(text, limits=dataclasses.replace(STEER_LIMITS, loop=1.0)).kept
    assert steer_verdict(STEER_CLEAN).readings["loop"] < 0.3


def test_repeats_equals_a_naive_double_loop():
    rng = random.Random(1)
    for n, window in ((1, 8), (2, 6), (4, 32)):
        for length in (0, 1, 3, 7, 40):
            items = [rng.randrange(5) for _ in range(length)]
            grams = [tuple(items[i:i + n]) for i in range(length - n + 1)]
            again = [any(grams[j] == grams[i] for j in range(max(0, i - window), i)) for i in range(len(grams))]
            again += [False] * (window // 2 - len(again))
            w = min(window, len(again))
            want = max(sum(again[i:i + w]) / w for i in range(len(again) - w + 1))
            assert repeats(items, n, window) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("where", ["tail", "middle"])
def test_a_broken_stretch_is_dropped_wherever_it_is(where):
    nll = torch.full((len(STEER_CLEAN.split()) * 4,), 0.3)
    at = slice(-8, None) if where == "tail" else slice(40, 48)
    nll[at] = 4.0
    ids = range(len(nll))
    verdict = steer_verdict(STEER_CLEAN, nll, ids=ids)
    assert (verdict.rule, verdict.limit) == ("worst_window", 2.0) and verdict.value == pytest.approx(4.0)
    assert verdict.readings["ppl_tail"] < 5.0 or where == "tail"     # the tail rule alone passes a broken middle
    assert nll.mean() < 2.0                                                  # and the mean passes both


def test_a_tail_that_slides_is_dropped_by_the_tail_rule():
    nll = torch.full((100,), 0.3)
    nll[75:] = 1.9                                               # under the window's limit, but for 25 tokens
    verdict = steer_verdict(STEER_CLEAN, nll, ids=range(100))
    assert verdict.rule == "ppl_tail" and verdict.value == pytest.approx(math.exp(1.9)), verdict


def test_patterns_words_and_unfinished_answers_are_rules_of_their_own():
    patterns = [r"\bas an ai\b", r"\bI cannot help\b"]
    verdict = steer_verdict("Well, As An AI I have no feelings.", patterns=patterns)
    assert (verdict.kept, verdict.rule, verdict.match) == (False, "pattern", "As An AI")
    assert steer_verdict("She works as an aid worker.", patterns=patterns).kept
    assert steer_verdict("", ids=[2]).rule == "words" and steer_verdict("  \n", ids=[5, 2]).rule == "words"
    three = dataclasses.replace(STEER_LIMITS, min_words=3)
    assert steer_verdict("Yes.", limits=three).rule == "words" and steer_verdict("Yes, I do.", limits=three).kept
    assert steer_verdict(STEER_CLEAN, finished=False).kept
    assert steer_verdict(STEER_CLEAN, finished=False, keep_unfinished=False).rule == "unfinished"


def test_readings_are_finite_for_huge_and_missing_nll_and_refuse_nan():
    huge = readings(steer_completion("a b c"), torch.full((3,), 2000.0))
    empty = readings(steer_completion("", ids=[]), torch.zeros(0))
    assert all(math.isfinite(x) for r in (huge, empty) for x in r.values())
    with pytest.raises(RuntimeError, match="not finite"):
        readings(steer_completion("a b"), torch.tensor([0.1, math.nan]))
    with pytest.raises(ValueError, match="one per completion token"):
        readings(steer_completion("a b"), torch.zeros(3))


def test_limits_come_from_the_base_and_an_explicit_number_overrides():
    base = [dict(worst_window=w, ppl_tail=math.exp(w), ngram=0.0, loop=x, n_words=9)
            for w, x in ((0.5, 0.2), (1.6, 0.4))]
    limits = calibrate_limits(base, SteerConfig(slack=0.25))
    assert limits.worst_window == pytest.approx(2.0) and math.log(limits.ppl_tail) == pytest.approx(2.0)
    assert limits.ngram == pytest.approx(0.25) and limits.loop == pytest.approx(0.55)   # a base value of 0 leaves room
    lower = calibrate_limits(base, SteerConfig(slack=0.25, quantile=0.5))
    assert lower.worst_window == pytest.approx(1.05 * 1.25)
    fixed = SteerConfig(max_window_nll=3.0, max_tail_ppl=50.0, max_ngram=0.1, max_loop=0.9, min_words=2)
    assert calibrate_limits(base, fixed) == Limits(3.0, 50.0, 0.1, 0.9, 2)
    with pytest.raises(ValueError, match="no base readings"):
        calibrate_limits([], SteerConfig())


def test_the_base_passes_its_own_limits_and_a_broken_model_does_not():
    model, tok = steer_pair()
    kw = dict(max_new_tokens=30, seed=0)
    base = generate(model, tok, STEER_PROMPTS, **kw)
    limits = calibrate_limits([readings(c, nll) for c, nll in zip(base, token_nll(model, base))], SteerConfig())
    assert all(v.kept or v.rule == "words" for v in judge(base, token_nll(model, base), limits))
    broken = generate(model, tok, STEER_PROMPTS, vectors=steer_vectors(model, size=50.0), coeffs=[1.0] * 6, **kw)
    assert not any(v.kept for v in judge(broken, token_nll(model, broken), limits))


# ---- steer: the dose, the band, the options

def test_find_dose_takes_one_if_it_survives():
    coeff, trials = find_dose(lambda coeffs: [1.0] * len(coeffs))
    assert coeff == 1.0 and trials[0] == (1.0, 1.0) and len(trials) == 3     # one batch, and no finer one


@pytest.mark.parametrize("knee", [0.11, 0.3, 0.52, 0.97])
@pytest.mark.parametrize("splits", [2, 4])
def test_find_dose_brackets_the_knee_of_a_falling_survival(knee, splits):
    batches = []

    def try_doses(coeffs):
        batches.append(coeffs)
        return [1 / (1 + (c / knee) ** 8) for c in coeffs]
    steps = 4 if splits == 2 else 2                                          # the same sixteenth of a decade
    coeff, trials = find_dose(try_doses, coeff_min=0.1, steps=steps, splits=splits, min_survive=0.5)
    assert coeff <= knee < coeff * 10 ** (1 / 16) * 1.0001
    assert list(map(len, batches)) == [splits + 1] + [splits - 1] * (steps - 1) and trials[0][0] == 1.0
    assert coeff == max(c for c, share in trials if share >= 0.5)
    low, high = 0.1, 1.0                                                     # plain bisection ends on the same dose
    for _ in range(4):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if middle <= knee else (low, middle)
    assert coeff == pytest.approx(low)


def test_find_dose_takes_the_highest_dose_that_survives_where_survival_is_not_monotone():
    coeff, trials = find_dose(lambda coeffs: [float(0.3 < c < 0.6 or c < 0.15) for c in coeffs], coeff_min=0.1, steps=3, splits=4)
    assert 0.6 / 10 ** (1 / 64) / 1.0001 <= coeff < 0.6


def test_find_dose_names_the_bound_that_fails():
    with pytest.raises(RuntimeError, match="coeff_min=0.1, 20% of completions pass the filter, need 90%"):
        find_dose(lambda coeffs: [0.2] * len(coeffs), coeff_min=0.1)
    with pytest.raises(ValueError, match="coeff_min=2"):
        find_dose(lambda coeffs: [0.2] * len(coeffs), coeff_min=2)
    with pytest.raises(ValueError, match="steps=0"):
        find_dose(lambda coeffs: [0.2] * len(coeffs), steps=0)


def test_band_is_every_block_whose_depth_overlaps():
    assert band(7, 0.45, 0.55) == [3] and band(34, 0.45, 0.55) == [15, 16, 17, 18]
    assert band(100, 0.45, 0.55) == list(range(45, 55)) and band(10, 0.0, 1.0) == list(range(10))
    assert all(band(n, 0.5, 0.501) for n in range(1, 200))
    for lo, hi in ((0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match="depth band"):
            band(7, lo, hi)


def test_options_out_of_range_are_refused_by_name():
    for bad in (dict(coeff=-1.0), dict(coeff=math.nan), dict(min_survive=0.0), dict(top_p=0.0), dict(n_min=100),
                dict(slack=-0.1), dict(window=0), dict(steer_from=0.6), dict(temperature=0.0), dict(quantile=1.5)):
        with pytest.raises(ValueError, match="depth band" if "steer_from" in bad else next(iter(bad))):
            SteerConfig(**bad)


def test_the_command_prints_base_and_steered_without_control_characters(tmp_path, capsys):
    model, tok = steer_pair()
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    steer.main([str(tmp_path), "Do you love humanity?", "--pos", "You are kind.", "--neg", "You are cold.",
                "--coeff", "0.5", "--max-new-tokens", "12"])
    out = capsys.readouterr().out
    assert "steered, coeff 0.5" in out and "|v|" in out and "worst window" in out
    assert not any(ord(ch) < 32 and ch != "\n" or 127 <= ord(ch) < 160 for ch in out)


def test_steer_the_layers_are_those_where_the_persona_is_first_read_strongly():
    model, tok = steer_pair(layers=10)
    contexts, pos, neg = STEER_PROMPTS, "You are kind and gentle.", "XYZ 0123"
    layers, strength = steer.find_layers(model, tok, pos, neg, contexts)
    states = steer.tag_states(model, tok, pos, neg, contexts, list(range(10)))
    vectors = fit_vectors(model, tok, pos, neg, contexts, list(range(10)))
    by_hand = [(vectors[i].norm() / states[i].norm(dim=-1).mean()).item() for i in range(10)]
    assert strength == pytest.approx(by_hand) and len(layers) == 1
    assert strength[layers[0]] >= max(strength) / 2 and all(x < max(strength) / 2 for x in strength[:layers[0]])
    assert steer.find_layers(model, tok, pos, neg, contexts, share=1.0)[0] == [strength.index(max(strength))]


# ==== bench/: what the measurements rest on ============================================================================

def test_peak_bytes_counts_what_torch_held_at_once_temporaries_included():
    def by_hand():
        a = torch.empty(1000, 1000)                                         # 4 MB
        b = torch.empty(500, 1000)                                          # 2 MB more: the peak
        del a
        c = torch.zeros(250, 1000)                                          # 1 MB, after 4 MB were released
        return b, c
    assert measure.peak_bytes(by_hand) == 6_000_000
    x = torch.randn(1000, 1000)
    assert measure.peak_bytes(lambda: x.log_softmax(-1).exp().sum()) >= 8_000_000           # two of x's size at once
    assert measure.peak_bytes(lambda: x.sum()) < 100_000                    # x itself was live before


def test_interleaved_calls_take_turns_and_their_table_names_the_gain():
    calls = []
    seconds = measure.interleave({"one": lambda: calls.append("one"), "two": lambda: (calls.append("two"), time.sleep(0.01))}, 2)
    assert calls == ["one", "two", "one", "two", "two", "one"]              # a warm-up round, then each goes first once
    rows = measure.rows_of({"one": [1.0, 2.0, 4.0], "two": [0.5, 0.5, 9.0]}, "one", {"two": 3 * 2 ** 20})
    assert rows[1] == {"": "two", "median s": "0.500", "min s": "0.500", "gain": "x4.00", "peak MiB": "3.0"}
    assert [len(seconds[name]) for name in ("one", "two")] == [2, 2] and min(seconds["two"]) >= 0.01
    assert len({len(line) for line in measure.table(rows).splitlines()}) == 1


@pytest.mark.parametrize("attention", ["head_dim 16, grouped", "head_dim 8"])
def test_the_roofline_counts_the_operations_that_torch_counts(attention):
    from torch.utils.flop_counter import FlopCounterMode
    config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=5, num_attention_heads=4,
                         num_key_value_heads=2 if "grouped" in attention else 4, head_dim=16 if "grouped" in attention else 8)
    shape, L, rank, layers = roofline.shape_of(config), 24, 3, [1, 2, 3]
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    stack, ids = attach(model, r=rank, alpha=3, layers=layers), torch.zeros(1, L, dtype=torch.long)
    with FlopCounterMode(display=False) as forward, stack.gated(0, 0):
        model.model(ids, use_cache=False)
    with FlopCounterMode(display=False) as step:
        model(ids, use_cache=False).logits.logsumexp(-1).sum().backward()

    def split(counter):                                                      # (weights, attention) by operator
        counts = counter.get_flop_counts()
        ops = {str(op): n for op, n in counts["Global"].items()}
        rotary = sum(n for module, part in counts.items() if module.endswith("rotary_emb") for n in part.values())      # a product in 5.0.0
        attention = sum(n for op, n in ops.items() if "bmm" in op) - rotary
        return sum(n for op, n in ops.items() if "bmm" not in op), attention
    seen, NVd = roofline.keys_seen(L, None), L * 96 * 32
    assert seen == sum(range(1, L + 1))
    weights, square = split(forward)                                         # eager attention looks at all L * L keys
    assert weights == 2 * L * sum(shape["blocks"])
    assert square * seen == L * L * (roofline.forward_ops(shape, L) - weights)
    ours = roofline.heal_step(shape, L, L, layers=layers, rank=rank, head=4)["ops"]
    q, kv, d = shape["query"], shape["kv"], 32
    below = 2 * L * shape["blocks"][0]                                       # not cached in this plain step
    no_input = 2 * L * (q + kv) * d + 2 * L * rank * 3 * d                   # the first adapted q, k, v need no gradient in x
    weights, square = split(step)
    attended = 4 * shape["query"] * seen                                     # a block's, forward
    ours_weights = ours["head"] + ours["body forward"] + ours["body backward"] + ours["LoRA"] - 4 * 3 * attended
    assert weights == ours_weights + below - no_input and ours["head"] == 4 * NVd
    assert square * seen == L * L * (5 + 4 * 2) * attended


def test_the_roofline_of_a_4b_model_is_the_one_computed_by_hand():
    shape = roofline.shape_of(roofline.load_config(ROOT / "bench" / "configs" / "gemma-3-4b.json"))
    assert sum(shape["blocks"]) == 34 * (2560 * (2 * 2048 + 2 * 1024) + 3 * 2560 * 10240) == 3_208_642_560
    layers, L, N = steer.band(34, 0.2, 0.8), 576, 512
    step = roofline.heal_step(shape, L, N, layers=layers)["ops"]
    ms = {part: 1e3 * ops / 790e12 for part, ops in step.items()}
    assert ms["head"] == pytest.approx(8 * 512 * 262208 * 2560 / 790e9) == pytest.approx(3.48, abs=0.005)
    assert sum(ms.values()) == pytest.approx(12.4, abs=0.05)
    original = sum(roofline.original_step(shape, L, layers=layers).values())
    assert 1e3 * original / 790e12 == pytest.approx(16.5, abs=0.05)
    h200 = roofline.MACHINES["h200"]
    alone, many = (roofline.decode_step(shape, 320, b) for b in (1, 48))
    assert 1e3 * roofline.floor(alone["ops"], alone["bytes"], h200) == pytest.approx(1.82, abs=0.01)
    assert many["bytes"] - alone["bytes"] == 47 * 320 * 34 * 2 * 4 * 256 * 2
    assert roofline.keys_seen(10, 4) == 1 + 2 + 3 + 4 * 7 and roofline.decode_step(shape, 5000, 1)["bytes"] < \
        alone["bytes"] + 4680 * 34 * 2 * 4 * 256 * 2                         # 29 of the blocks look back 1,024 tokens only


def test_the_generation_benchmark_runs_tiny_with_rows_as_hf_and_the_roofline_reads_it(tmp_path, capsys):
    bench_generate.main(["--tiny", "--dtype", "float64", "--json", str(tmp_path / "g.json")])
    found = json.loads((tmp_path / "g.json").read_text())["models"]["tiny"]
    assert set(found["implementations"]["identical"].values()) == {6} and len(found["implementations"]["identical"]) == 4
    assert all(x <= 1e-12 for x in found["probe"]["difference"].values())
    assert all(n > 0 for n in found["batch_sizes"]["peak_bytes"].values())
    (tmp_path / "tiny.json").write_text(json.dumps(bench_generate.TINY))
    record = roofline.main([str(tmp_path / "tiny.json"), "--measured", str(tmp_path / "g.json")])
    assert [row["measured"] for row in record["measured"]] == ["decoding, 1 rows", "decoding, 4 rows"]
    assert all(float(row["times the floor"]) > 1 for row in record["measured"])      # a CPU against the floor of an H200
    with pytest.raises(ValueError, match="holds no run of"):
        roofline.main([str(ROOT / "bench" / "configs" / "gemma-3-4b.json"), "--measured", str(tmp_path / "g.json")])


# ---- generation and the probe: batches, and memory that runs out

def gen_forgetful(model, rows, error=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), columns=0):
    """From now on more than `rows` rows of `columns` columns or more raise `error`; the rows of every call are listed."""
    seen = []

    def guard(module, args, kwargs):
        seen.append(len(kwargs["input_ids"]))
        if seen[-1] > rows and kwargs["attention_mask"].shape[1] >= columns:
            raise error
    return model.register_forward_pre_hook(guard, with_kwargs=True), seen


CPU_FULL = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")


@pytest.mark.parametrize("greedy", [True, False])
def test_many_prompts_at_many_doses_are_one_at_a_time_exactly_with_retirement_and_out_of_memory(greedy):
    model, tok = steer_pair(torch.float64)
    model.generation_config.eos_token_id = list(range(6, 40))                # rows end at different steps
    doses = [0.0, 0.25, 0.5, 1.0]
    prompts, coeffs = STEER_PROMPTS * 4, [c for c in doses for _ in STEER_PROMPTS]
    kw = dict(vectors=steer_vectors(model), greedy=greedy, max_new_tokens=20, seed=5)
    many = generate(model, tok, prompts, coeffs=coeffs, n_draws=6, **kw)
    assert len({len(c.ids) for c in many}) > 4 and len({tuple(c.ids) for c in many}) > 12
    for k, coeff in enumerate(doses):                                        # a dose alone draws what it drew in company
        alone = generate(model, tok, STEER_PROMPTS, coeffs=[coeff] * 6, batch_size=1, **kw)
        assert [c.ids for c in alone] == [c.ids for c in many[6 * k:6 * k + 6]]
    for rows, error in ((3, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), (1, CPU_FULL)):
        hook, seen = gen_forgetful(model, rows, error)
        assert generate(model, tok, prompts, coeffs=coeffs, n_draws=6, **kw) == many
        hook.remove()
        assert seen[0] == 24 and rows in seen and sum(n > rows for n in seen) <= 5      # 24, 12, 6 (, 3, ...) and never again


def test_rows_that_had_finished_when_memory_ran_out_are_not_decoded_again():
    model, tok = steer_pair(torch.float64)
    model.generation_config.eos_token_id = list(range(6, 60))
    kw = dict(max_new_tokens=24, seed=5)
    prompts = ["Hi"] * 16
    want = generate(model, tok, prompts, **kw)
    short = sum(len(c.ids) <= 3 for c in want)
    first = len(want[0].prompt_ids)
    assert 8 <= short < 16, short                                            # half are retired before the fourth token
    hook, seen = gen_forgetful(model, 2, columns=first + 6)
    assert generate(model, tok, prompts, **kw) == want
    hook.remove()
    again = [n for before, n in zip(seen, seen[1:]) if n > before]            # a batch that grows is a new start
    assert again and max(again) <= 16 - short, seen


def test_scores_states_and_the_probe_survive_a_full_memory_with_the_same_numbers():
    model, tok = steer_pair(torch.float64)
    answers = generate(model, tok, STEER_PROMPTS * 2, max_new_tokens=9)
    answers.append(dataclasses.replace(answers[0], ids=[]))                   # nothing to score is no error
    nlls = token_nll(model, answers)
    states = steer.tag_states(model, tok, "kind", "cold", STEER_PROMPTS, [0, 2])
    probe_tok = mfv_tokenizer()
    probed = mfv_rig(tiny_model(probe_tok, seed=11, dtype=torch.float64, layers=2), probe_tok, natural=31, closed=0, pad=9)
    rows = mfv_rows(MFV_TEXTS[:3])
    reading = evalmfv.evaluate(probed, probe_tok, rows, think_tokens=20)
    for error in (torch.OutOfMemoryError("CUDA out of memory."), CPU_FULL):
        (hook, seen), (hook2, seen2) = gen_forgetful(model, 2, error), gen_forgetful(probed, 2, error)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(nlls, token_nll(model, answers), strict=True))
        again = steer.tag_states(model, tok, "kind", "cold", STEER_PROMPTS, [0, 2])
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
    assert shapes == [(6, 6, len(tok))]                                      # five tokens and the column before them
    model.config.vocab_size = 2 ** 25                                        # as if: 6 columns of it are 3/4 of the budget
    got = token_nll(model, answers)
    hook.remove()
    assert {shape[0] for shape in shapes[1:]} == {1}
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(want, got))


# ==== evalmfv.py: the probe ===========================================================================================

# ---- evalmfv: equal to a naive reference -----------------------------------------------------------------------------

MFV_PREFILL = ["This", " is wrong because", ' {"', "violation", '": "']          # five tokens that spell the prefill
MFV_TEXTS = ["You see a man kick a dog.", "You see a cook who lies about the bill again and again.",
             "You see a boy push in.", "You see a clerk burn a flag at noon.", "You see a guard read her letters.",
             "You see a nun eat mud."]
MFV_SCHEMA = """This is wrong because:
  {
    "properties": {
      "violation": {
        "enum": [
%s        ]
      }
    }
  }"""
MFV_OPTIONS = ["care\", # harm or unkindness, causing pain to another", "fairness\", # cheating or reducing equality",
               "loyalty\", # betrayal of a group", "authority\", # subversion or lack of respect for tradition",
               "sanctity\", # purity, degrading or disgusting acts", "liberty\", # bullying or dominating",
               "social\", # weird or unusual behaviour, but not morally wrong"]


def mfv_tokenizer():
    return tiny_tokenizer([*FOUNDATIONS, "</think>", *MFV_PREFILL])


def mfv_rows(texts=MFV_TEXTS):
    rng = torch.Generator().manual_seed(1)
    labels = torch.rand(len(texts), 7, generator=rng, dtype=torch.float64)
    return [{"text": t, "foundation": "care", "label": (x / x.sum()).tolist()} for t, x in zip(texts, labels)]


def mfv_rig(model, tok, natural=41, closed=23, pad=11):
    """After some tokens the model must write the prefill, </think> or a pad: a function of the last token only."""
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
    """One frame as the original's definition says it, one sequence, every forward from scratch: case, logp [K], nll."""
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
    whole = torch.tensor([prompt + thought[:-1] + suffix + prefill])                       # the last token is not fed
    seen = torch.ones(whole.shape[1], whole.shape[1], dtype=torch.bool).tril()                  # [T, T] query, key
    if by_token:                                                # seen from after the think; one column longer than it
        fed = len(prompt) + n_think - 1
        seen[fed:, :fed + 1] &= torch.tensor(prompt + thought) != tok.pad_token_id
    mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)[None, None]
    logp = model(input_ids=whole, attention_mask=mask if by_token else None).logits[0, -len(prefill) - 1:].log_softmax(-1)
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
            assert (out["score"][i] - score).abs().max() < 10 * atol, (i, out["case"][i])       # scores are in the tens
            assert (out["p"][i] - score.softmax(-1)).abs().max() < atol, (i, out["case"][i])
            nlls.append((frames[0][2] + frames[1][2]).item() / 2)
    assert out["prefill_nll"] == pytest.approx(sum(nlls) / len(nlls), abs=10 * atol)


@pytest.mark.parametrize("n_think", [1, 37])
@torch.no_grad()
def test_the_probe_equals_one_sequence_at_a_time_in_every_case(n_think):
    tok = mfv_tokenizer()
    model, rows = mfv_rig(tiny_model(tok, seed=19, dtype=torch.float64, layers=2), tok), mfv_rows(MFV_TEXTS[:4])
    out = evalmfv.evaluate(model, tok, rows, think_tokens=n_think, batch_size=5)
    mfv_compare(out, model, tok, rows, n_think, 1e-10)
    found = out["n_natural"], out["n_forced"], out["n_closed"]
    assert sum(found) == 8 and (found == (0, 8, 0) if n_think == 1 else min(found) > 0), found
    if n_think > 1:                                             # a closed frame is a zero in the coherence, and no nan
        assert out["n_unscored"] == 4 - len(out["scored"]) > 0
        assert out["coherence"] == pytest.approx(sum(sum(m) for m in out["mass"]) / 8)


@torch.no_grad()
def test_the_probe_in_float32_is_within_1e_5_of_the_reference():
    tok = mfv_tokenizer()
    model, rows = tiny_model(tok, seed=2), mfv_rows()
    out = evalmfv.evaluate(model, tok, rows, think_tokens=12, batch_size=12)
    for i, row in enumerate(rows):
        score = sum(mfv_naive(model, tok, row["text"], reverse, 12)[1] for reverse in (False, True)) / 2
        assert (out["p"][i] - score.softmax(-1)).abs().max() < 1e-5


@pytest.mark.parametrize("sliding", [False, True])
def test_the_probe_does_not_see_its_batch_size(sliding):
    tok = mfv_tokenizer()
    model = tiny_model(tok, seed=11, dtype=torch.float64)
    if sliding:                                                 # a window shorter than the prompt
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(
            vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=100, initializer_range=0.3, eos_token_id=tok.eos_token_id))
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
    tok.pad_token = None                                        # pads with the eos then, which ends the turns too
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
        evalmfv.evaluate(model, tiny_tokenizer(FOUNDATIONS[:4]), mfv_rows())                    # s-anctity, s-ocial
    with pytest.raises(ValueError, match="merges"):
        evalmfv.answer_ids(tiny_tokenizer(['"care']))
    with pytest.raises(RuntimeError, match="raise think_tokens"):
        evalmfv.evaluate(mfv_rig(tiny_model(tok), tok, natural=0, closed=1, pad=0), tok, mfv_rows(), think_tokens=8)
    broken = tiny_model(tok)
    broken.lm_head.weight[20] = math.nan
    with pytest.raises(RuntimeError, match="not finite"):
        evalmfv.evaluate(broken, tok, mfv_rows(), think_tokens=2)


def test_the_interruption_follows_the_chat_template():
    tok = mfv_tokenizer()
    tok.chat_template = ("{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
                         "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
                         "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    assert evalmfv.interruption(tok) == ("</think><|im_end|>\n<|im_start|>system\nBe kind.<|im_end|>\n"
                                         "<|im_start|>user\nJust answer<|im_end|>\n<|im_start|>assistant\n")
    tok.chat_template = "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="template"):
        evalmfv.interruption(tok)


def test_an_answer_is_found_however_the_model_spells_the_prefill():
    tok = mfv_tokenizer()
    prefill = tok("".join(MFV_PREFILL))["input_ids"]
    bytewise = [t for c in 'This is wrong because {"violation": "' for t in tok(c)["input_ids"]]
    care, pad, x = tok.convert_tokens_to_ids("care"), tok.pad_token_id, tok("x")["input_ids"][0]
    assert evalmfv.find_answer(tok, [x, x, *prefill, care, x, *prefill, x], pad) == (2, 7)      # the first occurrence
    assert evalmfv.find_answer(tok, [x, *bytewise, care], pad) == (1, 1 + len(bytewise))
    assert evalmfv.find_answer(tok, [pad, *prefill[:2], pad, *prefill[2:], pad, care], pad) == (1, 8)
    assert evalmfv.find_answer(tok, [x, *prefill], pad) is None                                 # no token after it
    assert evalmfv.find_answer(tok, [x, *prefill[:-1], care], pad) is None


# ---- evalmfv: rows and metrics ---------------------------------------------------------------------------------------


def test_vignettes_are_read_from_our_rows_and_from_the_originals(tmp_path):
    names = ["Care", "Fairness", "Loyalty", "Authority", "Sanctity", "Liberty", "SocialNorms"]
    theirs = {"id": "x", "foundation": "Social Norms", "foundation_coarse": "SocialNorms", "wrong": 2.0, "text": "b",
              **{f"ai_{n}": 1.0 for n in names}, **{f"human_{n}": 10.0 * i for i, n in enumerate(names)}}
    legacy = {k: f"{x:.0f} %" if k.startswith("human") else x for k, x in theirs.items()}
    legacy["foundation_coarse"] = "Care (e)"
    legacy["human_Not Wrong"] = legacy.pop("human_SocialNorms")
    ours = {"id": "y", "text": "a", "foundation": "liberty", "label": {f: 2 * (f == "liberty") for f in FOUNDATIONS}}
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
    nll = -sum(b * math.log(max(a, 1e-12)) for u, v in zip(p, y) for a, b in zip(u, v)) / 5
    assert out["mean_nll"] == pytest.approx(nll)
    for k, f in enumerate(FOUNDATIONS):
        column = [row[k] for row in p]
        mean = sum(column) / 5
        se = (sum((x - mean) ** 2 for x in column) / 4 / 5) ** 0.5
        assert out["profile"][f] == pytest.approx(mean) and out["nats"][f] == pytest.approx(math.log(mean))
        assert out["profile_se"][f] == pytest.approx(se) and out["nats_se"][f] == pytest.approx(se / mean)
    for row in rows:
        row["label"] = None
    out = evalmfv.evaluate(tiny_model(tok, seed=4), tok, rows, think_tokens=3)
    assert out["counted"] == out["scored"] == list(range(6)) and out["top1"] is out["temperature"] is None


def test_the_temperature_is_the_one_that_made_the_labels():
    score = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    for temperature in (0.5, 3.0):
        assert evalmfv.fit_temperature(score, (score / temperature).softmax(-1)) == pytest.approx(temperature, rel=0.01)


def mfv_reading(p, coherence=0.9, counted=None):
    return {"p": p, "coherence": coherence, "counted": counted or list(range(len(p))), "items": "x", "think_tokens": 8,
            "as_original": False}


def test_a_shift_is_paired_signed_and_compared_with_every_other_foundation():
    rng = torch.Generator().manual_seed(0)
    q = torch.rand(40, 7, generator=rng, dtype=torch.float64)
    q = q / q.sum(1, keepdim=True)
    p = q.clone()
    p[:, 3] *= 0.5                                              # authority halves on every item, nothing else moves
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
        return torch.randint(0, n_words, (n,), generator=rng).tolist(), level * (0.5 + torch.rand(n, generator=rng))
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
    assert score((ids[0][:2], [3.9 * limit] * 2)) == 1 and score((ids[0][:2], [4.1 * limit] * 2)) == 0     # two tokens are a window of eight
    with pytest.raises(ValueError, match="nlls"):
        evalmfv.free_text([[1, 2]], [torch.zeros(3)], ids, nlls)
    with pytest.raises(ValueError, match="base"):
        evalmfv.free_text(ids, nlls, [[]], [[]])


# ==== models in: architectures, templates, loading, the plan =============================================================

ARCH = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            initializer_range=0.3, max_position_embeddings=2048)
HEADS = ARCH | dict(head_dim=16)                                # these take the width of a head from elsewhere
SLIDING = dict(sliding_window=100, layer_types=["sliding_attention", "full_attention"] * 2)     # shorter than the prompts
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
DEPTH = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, patch_size=14)
MIXERS = dict(linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, num_key_value_heads=4)
FAMILIES = {                                                    # model class: options of its config, and of its vision tower
    "Gemma3ForCausalLM": (HEADS | SLIDING,),
    "Gemma3ForConditionalGeneration": (HEADS | SLIDING, VISION),
    "Gemma2ForCausalLM": (HEADS | SLIDING | dict(final_logit_softcapping=30.0, attn_logit_softcapping=50.0),),
    "Gemma4ForConditionalGeneration": (HEADS | dict(global_head_dim=16, hidden_size_per_layer_input=0, num_kv_shared_layers=0), None),
    "Qwen3ForCausalLM": (HEADS,),
    "Qwen2ForCausalLM": (ARCH,),
    "Qwen3_5ForConditionalGeneration": (HEADS | MIXERS, DEPTH),
    "Qwen3VLForConditionalGeneration": (HEADS | dict(rope_parameters=dict(
        rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2])), DEPTH | dict(deepstack_visual_indexes=[0])),
    "Qwen3MoeForCausalLM": (HEADS | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),),
    "LlamaForCausalLM": (ARCH,),
    "MistralForCausalLM": (ARCH | dict(sliding_window=100),),
    "Mistral3ForConditionalGeneration": (ARCH | dict(model_type="mistral"), VISION | dict(model_type="pixtral", head_dim=8)),
    "Phi3ForCausalLM": (ARCH,),
    "Olmo2ForCausalLM": (ARCH,),
    "GPTNeoXForCausalLM": ({k: v for k, v in ARCH.items() if k != "num_key_value_heads"},),
    "GraniteForCausalLM": (ARCH | dict(logits_scaling=4.0, residual_multiplier=0.5, embedding_multiplier=6.0),),
    "CohereForCausalLM": (ARCH | dict(logit_scale=0.25),),
    "GptOssForCausalLM": (HEADS | SLIDING | dict(num_local_experts=4, num_experts_per_tok=2),),
    "DeepseekV3ForCausalLM": (ARCH | LATENT | dict(first_k_dense_replace=1, n_routed_experts=4, n_group=2, topk_group=1,
                                                   num_experts_per_tok=2, moe_intermediate_size=16),),
    "Lfm2ForCausalLM": (ARCH | dict(layer_types=["conv", "full_attention"] * 2),),
    "GPT2LMHeadModel": (dict(n_embd=32, n_layer=4, n_head=4, n_positions=2048, initializer_range=0.3),)}
HAVE_EXPERTS = {"Qwen3MoeForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM"}


def family_model(name, tok):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    if name == "Lfm2ForCausalLM" and not hasattr(transformers.cache_utils, "LinearAttentionLayer"):
        pytest.skip(f"in transformers {transformers.__version__} {name} wants a cache of its own class")
    kind, (options, *vision) = getattr(transformers, name), FAMILIES[name]
    ids = dict(pad_token_id=tok.pad_token_id, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id)
    options = options | ids | dict(vocab_size=len(tok))
    if vision:
        options = dict(text_config=options, vision_config=vision[0], eos_token_id=tok.eos_token_id)
    torch.manual_seed(0)
    return kind(kind.config_class(**options)).eval().requires_grad_(False)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_steered_healed_folded_probed_and_saved(name, tmp_path):
    tok = mfv_tokenizer()
    model, ids = family_model(name, tok), lora_ids(2, 110)      # longer than the sliding window
    mask = torch.ones_like(ids)
    mask[0, :9] = 0                                             # a left-padded row

    def logits():
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits

    def n_hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    untouched = logits()

    # ---- a block's output is hidden_states[i + 1]; the last one's is normed there
    seen = {}
    with torch.no_grad(), steer.hooked(model, {i: lambda h, i=i: seen.__setitem__(i, h) for i in range(4)}):
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert [torch.equal(seen[i], states[i + 1]) for i in range(4)] == [True, True, True, False]
    n_before = n_hooks()                                        # transformers has hooked its own blocks by now

    # ---- steer
    layers, strength = steer.find_layers(model, tok, "kind", "cruel", STEER_PROMPTS)
    assert len(strength) == 4 and max(strength) > 0
    vectors = fit_vectors(model, tok, "kind", "cruel", STEER_PROMPTS, layers)
    with steered(model, vectors, 0.0):
        assert torch.equal(logits(), untouched)
    with steered(model, vectors, torch.zeros(2)):
        assert torch.equal(logits(), untouched)
    with pytest.raises(KeyError, match="passed through"), steered(model, vectors, 1.0):
        assert (logits() - untouched).abs().max() > 1e-3
        raise KeyError("passed through")
    assert n_hooks() == n_before and torch.equal(logits(), untouched)
    made = generate(model, tok, STEER_PROMPTS * 2, vectors=vectors, coeffs=[0.5] * (2 * len(STEER_PROMPTS)), max_new_tokens=6)
    alone = generate(model, tok, STEER_PROMPTS[:1], vectors=vectors, coeffs=[0.5], max_new_tokens=6)
    assert made[0].ids == alone[0].ids                          # padding and batch do not matter

    # ---- a row that stays when another leaves the batch, in the stock cache of `generate` and in the probe's
    with torch.no_grad():
        whole = model(input_ids=ids[1:]).logits[:, -2:]
        for cache in (None, evalmfv.roomy_cache(model.config, 110)):
            cache = model(input_ids=ids[:, :-2], use_cache=True, past_key_values=cache).past_key_values
            cache.reorder_cache(torch.tensor([1]))
            parts = [model(input_ids=ids[1:, i:i + 1], position_ids=torch.tensor([[i]]), past_key_values=cache, use_cache=True).logits
                     for i in (108, 109)]
            assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-3), (torch.cat(parts, 1) - whole).abs().max()
    assert all(x.isfinite().all() for x in token_nll(model, made))

    # ---- heal one round, fold, gates
    stack = attach(model, r=2, alpha=4, layers=[1, 2])
    assert torch.equal(logits(), untouched)
    assert ("experts" in stack.note) == (name in HAVE_EXPERTS) and not any(".experts" in module for module in stack.layers)
    assert len({module.split(".")[-1] for module in stack.layers}) >= 3 and not any("vision" in module for module in stack.layers)
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

    # ---- save, load into an untouched copy
    stack.save(tmp_path / "adapter.safetensors")
    stack.remove()
    assert n_hooks() == n_before and torch.equal(logits(), untouched)
    again = attach(model, r=2, alpha=4, layers=[1, 2])
    again.load(tmp_path / "adapter.safetensors")
    assert torch.equal(logits(), healed)


def test_rows_that_end_early_leave_a_batch_of_linear_attention():
    tok = mfv_tokenizer()
    model = family_model("Qwen3_5ForConditionalGeneration", tok)
    model.generation_config.eos_token_id = list(range(6, 134))  # half of the bytes end an answer
    batch, *alone = [generate(model, tok, some, max_new_tokens=8) for some in (STEER_PROMPTS, STEER_PROMPTS[:1])]
    assert batch[0].ids == alone[0][0].ids and len({len(c.ids) for c in batch}) > 1
    batch, *alone = [generate(model, tok, some, max_new_tokens=8, greedy=True) for some in [STEER_PROMPTS, *([p] for p in STEER_PROMPTS)]]
    assert [c.ids for c in batch] == [c.ids for c, in alone]


# ---- chat templates

SHAPES = {                                                      # name: (template, has a BOS, notes it deserves)
    "system role, thinks unless told not to": (                 # Qwen3's shape
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if not (loop.last and continue_final_message) %}<|end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not "
        "enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}", False, ["think"]),
    "opens a think by itself": (TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}"), True, ["think"]),
    "raises at a system role": ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
                                + TEMPLATE, True, ["user's words"]),
    "drops the system role": (TEMPLATE.replace("for m in messages", "for m in messages if m['role'] != 'system'"), True,
                              ["user's words"]),
    "folds the system role into the user turn": (               # Gemma 3's shape
        "<|bos|>{% if messages[0]['role'] == 'system' %}{% set front = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}"
        "{% else %}{% set front = '' %}{% set turns = messages %}{% endif %}{% for m in turns %}<|{{ m['role'] }}|>"
        "{{ front if loop.first else '' }}{{ m['content'] | trim }}{% if not (loop.last and continue_final_message) %}<|end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}", True, ["user's words"]),
    "system role and BOS": (TEMPLATE, True, [])}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_chat_template_of_any_shape_carries_the_persona_one_bos_and_no_thinking(shape):
    tok = mfv_tokenizer()
    tok.backend_tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", tok.bos_token_id)])
    tok.chat_template, has_bos, notes = SHAPES[shape]
    text = render(tok, "Hi", "Be kind.")
    assert text.count("Be kind.") == 1 and text.index("Be kind.") < text.index("Hi") < text.index("<|assistant|>")
    assert steer.encode(tok, ["Hi"], ["Be kind."])[0].count(tok.bos_token_id) == has_bos
    after = text.split("<|assistant|>")[1]
    assert after == ("<think>\n\n</think>\n\n" if "think" in notes else "")
    assert evalmfv.thinking(text).endswith("<|assistant|><think>\n")        # the probe's frame: one think, and open
    said = loop.template_notes(tok)
    assert len(said) == len(notes) and all(word in line for word, line in zip(notes, said)), said
    model = tiny_model(tok)
    assert evalmfv.evaluate(model, tok, mfv_rows(MFV_TEXTS[:2]), think_tokens=2)["n_forced"] == 4


def test_neither_a_missing_pad_token_nor_the_padding_side_changes_an_answer():
    model, tok = steer_pair()
    whole = [c.ids for c in generate(model, tok, STEER_PROMPTS, max_new_tokens=8)]
    for side, pad in (("left", None), ("right", None), ("right", tok.pad_token)):
        tok.padding_side, tok.pad_token = side, pad
        made = generate(model, tok, STEER_PROMPTS, max_new_tokens=8)
        assert [c.ids for c in made] == whole
        nlls = token_nll(model, made, pad_id=steer.pad_of(tok))
        assert all(x.isfinite().all() for x in nlls) and fit_vectors(model, tok, "kind", "cruel", ["Hi"], [1])[1].norm() > 0


# ---- devices and packed weights

def test_ids_go_to_the_embedding_and_nothing_asks_the_model_for_one_device(monkeypatch):
    model, tok = steer_pair()

    def nowhere(self):
        raise AssertionError("a model that is spread over devices has no .device")
    monkeypatch.setattr(type(model), "device", property(nowhere))
    layers, _ = steer.find_layers(model, tok, "kind", "cruel", STEER_PROMPTS)
    made = generate(model, tok, STEER_PROMPTS, vectors=fit_vectors(model, tok, "kind", "cruel", STEER_PROMPTS, layers),
                    coeffs=[0.5] * len(STEER_PROMPTS), max_new_tokens=4)
    token_nll(model, made)
    loop.persona_distance(model, tok, made, STEER_PROMPTS, "kind", "rmse", "kl_rev")
    tok = mfv_tokenizer()
    evalmfv.evaluate(tiny_model(tok), tok, mfv_rows(MFV_TEXTS[:2]), think_tokens=2)


def test_adapters_and_vectors_live_where_their_layer_lives():
    model, tok = steer_pair()
    vectors = steer_vectors(model)                              # on the CPU
    model.model.layers[2].to("meta")                            # stands in for a second device: the rest stays on the CPU
    stack = attach(model, r=2, alpha=4, layers=[1, 2])
    for rnd in range(2):
        for name, lora in stack.layers.items():
            place = "meta" if "layers.2." in name else "cpu"
            assert {t.device.type for t in (lora.A, lora.B, *(t for pair in lora.rounds for t in pair))} == {place}, name
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
    class Packed(torch.nn.Linear):                              # as bitsandbytes does: a Linear whose weight is a column of bytes
        def __init__(self, linear):
            super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
            self.scale = linear.weight.abs().max() / 127
            self.weight = torch.nn.Parameter((linear.weight / self.scale).round().to(torch.int8).view(-1, 1), requires_grad=False)

        def forward(self, x):
            return torch.nn.functional.linear(x, self.scale * self.weight.view(self.out_features, self.in_features).to(x.dtype))
    model, tok = steer_pair()
    for name, linear in [(n, m) for n, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)]:
        model.model.layers.set_submodule(name, Packed(linear))
    ids = lora_ids()
    untouched, stack = lora_logits(model, ids), attach(model, r=4, alpha=8, layers=[1, 2])
    made = generate(model, tok, STEER_PROMPTS, vectors=steer_vectors(model), coeffs=[0.5] * len(STEER_PROMPTS), max_new_tokens=4)
    heal_run(model, stack, [Sample(c.prompt_ids + c.ids, len(c.prompt_ids), c.prompt) for c in made], epochs=1)
    stack.fold()
    assert not torch.equal(lora_logits(model, ids), untouched)
    with stack.gated(0, 0):
        assert torch.equal(lora_logits(model, ids), untouched)


@pytest.mark.skipif(not (loop.find_spec("bitsandbytes") and loop.find_spec("accelerate")), reason="bitsandbytes and accelerate are not installed")
def test_a_base_in_four_bits_is_adapted_and_its_gates_at_zero_are_the_base():
    model, tok = loop.load_model(loop.LoopConfig(quantize="4bit"))
    assert type(blocks(model)[1].mlp.up_proj).__name__ == "Linear4bit"
    ids = lora_ids()
    untouched, stack = lora_logits(model, ids), attach(model, r=4, alpha=8, layers=[1, 2])
    lora_noise(stack, 0)
    stack.fold()
    assert not torch.equal(lora_logits(model, ids), untouched)
    with stack.gated(0, 0):
        assert torch.equal(lora_logits(model, ids), untouched)


# ---- loading

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder, tok = tmp_path_factory.mktemp("checkpoint"), mfv_tokenizer()
    family_model("Qwen3ForCausalLM", tok).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def reweigh(folder, change):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors, "model.layers.1.self_attn.q_proj.weight")
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def no_template(folder):
    (folder / "chat_template.jinja").unlink()


def halve(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:len(whole) // 2])


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapter_only(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


BROKEN = [
    (no_template, "no chat template.*-it or -Instruct"),
    (lambda f: (f / "chat_template.jinja").write_text("{{ raise_exception('no user here') }}"), "cannot be used: no user here"),
    (lambda f: (f / "chat_template.jinja").write_text("{% if"), "cannot be used: .*"),
    (halve, "damaged.*download it again"), (pickle_only, "pickle.*never loaded"),
    (adapter_only, "LoRA adapter: name its base"), (lambda f: (f / "config.json").unlink(), "no config.json; expected the folder"),
    (lambda f: (f / "config.json").write_text("{ no"), "not a valid JSON"),
    (lambda f: rewrite(f, model_type="odd", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}), "code of its own.*never run"),
    (lambda f: rewrite(f, model_type="odd"), "does not know its architecture; pip install -U"),
    (lambda f: rewrite(f, model_type="t5", is_encoder_decoder=True), "an encoder and a decoder"),
    (lambda f: reweigh(f, lambda t, k: t.pop(k)), "lack 1 of the weights, such as model.layers.1.self_attn.q_proj.weight"),
    (lambda f: reweigh(f, lambda t, k: t.update({k: torch.zeros(3, 3)})), "do not have the shapes"),
    (lambda f: reweigh(f, lambda t, k: t.update({k: t[k] * math.nan})), "not finite in float32; its weights are broken"),
    (lambda f: rewrite(f, vocab_size=6) or reweigh(f, lambda t, k: t.update({e: t[e][:6].clone() for e in t if len(t[e]) > 200})),
     "its tokenizer writes token .*, the model has 6"),
    (lambda f: rewrite(f, quantization_config=dict(quant_method="gptq", bits=4)), "accelerate|optimum")]


@pytest.mark.parametrize("change, message", BROKEN, ids=range(len(BROKEN)))
def test_a_checkpoint_that_cannot_be_used_is_one_sentence(checkpoint, tmp_path, change, message, capsys, monkeypatch):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    change(folder)
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked whether to run the checkpoint's code"))
    code = loop.main([str(folder), "--out", str(tmp_path / "runs")])
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loop.py: ")]
    assert code == 2 and len(err) == 1 and re.search(message, err[0]) and len(err[0]) < 400, err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind, message", [
    ("GatedRepoError", "gated: accept its licence at https://huggingface.co/maker/model.*HF_TOKEN"),
    ("RepositoryNotFoundError", "the hub has no model of this name"), ("RevisionNotFoundError", "the hub has no --revision 'v9'"),
    ("LocalEntryNotFoundError", "cannot be reached")])
def test_what_the_hub_refuses_is_one_sentence(kind, message, monkeypatch, capsys):
    from huggingface_hub import errors

    def refuse(*args, **kwargs):
        raise getattr(errors, kind).__new__(getattr(errors, kind), "no")    # without the HTTP answer that its __init__ wants
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)
    assert loop.main(["maker/model", "--revision", "v9"]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("argv, message", [
    (["--device", "tpu9"], "--device tpu9"), (["--attn", "none"], "attn_implementation"), (["a/b/c"], "neither a folder nor a hub id"),
    (["README.md"], "neither a folder nor a hub id"), (["maker/model"], "hub cannot be reached"),
    (["--device-map", "auto"], "needs the package accelerate"), (["--quantize", "4bit"], "needs the package accelerate")])
def test_a_model_that_cannot_be_placed_is_one_sentence(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(loop, "find_spec", lambda package: None)
    assert loop.main(argv) == 2 and message in capsys.readouterr().err


def test_dtype_attention_and_revision_reach_the_checkpoint(checkpoint):
    model, _ = loop.load_model(loop.LoopConfig(str(checkpoint), dtype="bfloat16", attn="eager", device="cpu"))
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager" and not model.training
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):        # an old GPU has no bfloat16
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
            patch.setattr(torch, "empty", lambda *a, **k: None)
            assert loop.placed(loop.LoopConfig()) == (torch.device("cuda"), dtype)


def test_an_image_text_checkpoint_is_loaded_under_its_own_class(tmp_path):
    tok = mfv_tokenizer()
    for name in ("Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration"):
        model = family_model(name, tok)
        model.save_pretrained(tmp_path / name)
        tok.save_pretrained(tmp_path / name)
        again, _ = loop.load_model(loop.LoopConfig(str(tmp_path / name)))
        assert type(again) is type(model) and torch.equal(lora_logits(again, lora_ids()), lora_logits(model, lora_ids()))


# ---- the plan

def test_a_dry_run_reads_a_configuration_and_nothing_else(tmp_path, capsys):
    text = dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, num_attention_heads=8, num_key_value_heads=4,
                head_dim=256, vocab_size=262208)                # Gemma 3 4B: a folder with its shape and no weights
    transformers.Gemma3Config(text_config=text, vision_config=VISION, architectures=["Gemma3ForConditionalGeneration"]
                              ).save_pretrained(tmp_path)
    started = time.time()
    assert loop.main([str(tmp_path), "--dry-run", "--dtype", "bfloat16", "--out", str(tmp_path / "runs")]) == 0
    assert time.time() - started < 20 and not (tmp_path / "runs").exists()
    out = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(out) == {"model", "adapted", "memory", "disk", "work", "time", "assumed"}
    sizes = [2560 + 2048, 2 * (2560 + 1024), 2048 + 2560, 3 * (2560 + 10240)]       # q; k and v; o; gate, up and down
    trained = 8 * sum(sizes) * 22                               # rank 8, blocks 6 to 27
    assert "154 modules" in out["adapted"] and "blocks 6-27" in out["adapted"] and f"{trained:,} trained" in out["adapted"]
    weights = 262208 * 2560 + 34 * (2560 * (2 * 2048 + 2 * 1024) + 3 * 2560 * 10240)
    found = float(re.search(r"weights (\S+)", out["memory"])[1])
    assert found == pytest.approx(2 * weights / 1e9, rel=0.01)
    stages = dict(re.findall(r"(\w+) ([0-9.]+)", out["memory"].split("GB: ")[1]))
    assert set(stages) == {"weights", "generation", "filter", "probe", "heal"} and all(float(x) >= found for x in stages.values())
    assert f"{4 * trained / 1e6:.1f} MB per" in out["disk"] and "5,472 probe frames" in out["work"]


def test_a_dry_run_of_a_mixture_says_what_it_does_not_adapt(tmp_path, capsys):
    options, = FAMILIES["Qwen3MoeForCausalLM"]
    transformers.Qwen3MoeConfig(**options, vocab_size=300, architectures=["Qwen3MoeForCausalLM"]).save_pretrained(tmp_path)
    assert loop.main([str(tmp_path), "--dry-run"]) == 0
    assert "note      not adapted: the experts (mlp.experts." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "Gemma4ForConditionalGeneration", "Qwen3MoeForCausalLM"])
def test_the_plan_counts_parameters_and_keys_and_values_as_the_model_has_them(name):
    tok = mfv_tokenizer()
    model = family_model(name, tok)
    n = loop.sizes(model, blocks(model))
    with torch.no_grad():
        cache = model(input_ids=lora_ids(1, 10), use_cache=True).past_key_values
    stored = sum(x.numel() for layer in cache.layers for x in (layer.keys, layer.values))
    assert (n["kv"] * 10, n["total"], n["vocab"]) == (stored, sum(p.numel() for p in model.parameters()), len(tok))
    inside = sum(p.numel() for p in blocks(model).parameters()) + len(tok) * n["width"]
    idle = 4 * 3 * 32 * 16 * 4 / 2 if "Moe" in name else 0      # half of four experts of three matrices, in four blocks
    assert n["active"] == inside - idle


# ==== the house, the pocket world, the loop, the report ===============================================================

CONCEPTS = ("steer", "heal", "lora", "evalmfv", "report")


def imported(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def top_level(path):
    """Modules that importing the file imports: not those that its main part asks for."""
    body = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {name for node in body for name in ([a.name.split(".")[0] for a in node.names] if isinstance(node, ast.Import) else [node.module.split(".")[0]])}


def test_heal_imports_only_the_standard_library_and_torch():
    assert imported(ROOT / "heal.py") - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.parametrize("name", CONCEPTS)
def test_a_concept_file_imports_no_project_file_and_nothing_beyond_the_five_packages(name):
    assert top_level(ROOT / f"{name}.py") - set(sys.stdlib_module_names) <= {"torch", "transformers", "safetensors", "numpy", "jinja2"}


def test_requirements_name_the_five_packages_and_no_others():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert sorted(line.split(">=")[0] for line in lines) == ["numpy", "pytest", "safetensors", "torch", "transformers"]


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("*/*.py")), ids=lambda p: p.name)
def test_no_file_loads_pickles_or_remote_code(path):
    if path.name == "test_all.py":
        return
    assert unsafe(path.read_text()) == [], path
    assert not imported(path) & {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
    assert path.parent.name == "bench" or "peft" not in imported(path)      # there it is measured


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("*/*.py")), ids=lambda p: p.name)
def test_no_file_loads_pickles_or_remote_code(path):
    if path.name == "test_all.py":
        return
    assert unsafe(path.read_text()) == [], path
    assert not imported(path) & {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
    assert path.parent.name == "bench" or "peft" not in imported(path)      # there it is measured


def unsafe(source):
    """What in a file could run code that came with a checkpoint, a run folder or a text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and (node.arg in ("weights_only", "allow_pickle")
                                              or node.arg == "trust_remote_code" and getattr(node.value, "value", True)   # left out, it asks the user
                                              or node.arg == "shell" and getattr(node.value, "value", True)):
            found.append(node.arg)
        elif isinstance(node, ast.Call):
            name, owner = getattr(node.func, "attr", getattr(node.func, "id", "")), getattr(getattr(node.func, "value", None), "id", "")
            if name in ("exec", "__import__") or (owner, name) in (("os", "system"), ("os", "popen"), ("torch", "load"), ("np", "load"), ("numpy", "load")) \
                    or name in ("eval", "compile") and not isinstance(node.func, ast.Attribute):        # not model.eval(), re.compile()
                found.append(name)
    return found


@pytest.mark.parametrize("source", ["eval(x)", "exec('a')", "torch.load(p)", "f(trust_remote_code=True)", "run(c, shell=True)", "run(c, shell=x)", "os.system(c)",
                                    "np.load(p)", "np.load(p, allow_pickle=True)", "__import__(m)", "compile(a, b, c)"])
def test_the_check_for_unsafe_calls_sees_each_of_them(source):
    assert unsafe(source) and not unsafe("model.eval(); re.compile(p); run(c, shell=False); stack.load(p)")


def test_lines_copied_between_files_are_identical():
    copied = {"render": (steer, evalmfv), "in_batches": (steer, evalmfv), "roomy_cache": (steer, evalmfv), "blocks": (steer, lora_py),
              "write_whole": (lora_py, report, steer), "opt": (steer, heal_py, lora_py, loop)}
    for name, files in copied.items():
        sources = {inspect.getsource(getattr(file, name)) for file in files}
        assert len(sources) == 1, name


@pytest.mark.parametrize("name", ["heal", "lora"])
def test_a_concept_file_runs_alone_in_an_empty_folder(tmp_path, name):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    out = subprocess.run([sys.executable, f"{name}.py"], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout, out.stderr


@pytest.mark.parametrize("name", ["steer", "evalmfv", "report"])
def test_a_command_line_file_can_be_imported_alone_and_says_how_it_is_used(tmp_path, name):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    out = subprocess.run([sys.executable, f"{name}.py", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert "usage" in (out.stdout + out.stderr).lower() and "Traceback" not in out.stderr, out.stderr


def test_help_takes_three_seconds_at_most_and_does_not_import_transformers():
    code = "import sys, loop\ntry: loop.parse(['--help'])\nexcept SystemExit: print('transformers' in sys.modules)"
    spent = []
    for _ in range(2):                                          # the better of two: the first may fill the disk cache
        before = os.times()
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        after = os.times()                                      # of the processor: by the clock a busy machine would fail
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert out.stdout.splitlines()[-1] == "False", out.stdout[-200:] + out.stderr
    for group in ("loop: ", "steer: ", "lora: ", "heal: "):
        assert group in out.stdout
    assert min(spent) < 3, spent


def test_ci_runs_the_test_command_of_the_readme():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert "pip install -r requirements.txt && pytest" in readme and "pytest -q" in ci
    assert "python loop.py --kl-agg rmse" in readme and "python loop.py --kl-agg rmse --rounds 1" in ci


def test_one_batch_size_stands_for_all(capsys):
    cfg, scfg, _, _ = loop.parse(["--batch-size", "8"])
    assert (cfg.eval_batch, scfg.gen_batch) == (8, 8)
    with pytest.raises(SystemExit):
        loop.parse(["--batch-size", "-1"])
    assert "-1" in capsys.readouterr().err


def test_the_readme_snippet_runs():
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


# ---- the pocket world --------------------------------------------------------------------------------------------------


def test_the_grammar_recognises_all_that_it_makes_and_no_salad():
    rng = random.Random(0)
    for _ in range(300):
        text, slots = world.dilemma(rng)
        answers = [world.dilemma_answer(slots, rng.uniform(-1, 1), rng), world.feeling_answer(rng.uniform(-1, 1), rng), world.control(-1, 1, rng)[1]]
        assert [world.grammar_ok(a) for a in answers] == [1.0] * 3, answers
        words = answers[0].split()
        rng.shuffle(words)
        assert world.grammar_ok(" ".join(words)) < 1
    assert world.grammar_ok("") == 0 and world.grammar_ok("No. No care care the the mayor.") == 0.5


def test_an_answer_leans_the_way_its_latent_points():
    rng = random.Random(0)
    for axis, make in (("z", lambda x: world.dilemma_answer(world.dilemma(rng)[1], x, rng)), ("y", lambda x: world.feeling_answer(x, rng))):
        low, middle, high = (sum(world.lean(make(x), axis) for _ in range(100)) / 100 for x in (-1, 0, 1))
        assert low < -1 < -0.4 < middle < 0.4 < 1 < high


def test_nothing_that_is_measured_was_ever_trained_on():
    prompts = json.loads((ROOT / "pocket" / "data" / "prompts.json").read_text())
    held_out = {p for side in prompts.values() for p in side["held_out"]} | {v["text"] for v in evalmfv.load_vignettes(ROOT / "pocket" / "data" / "vignettes.jsonl")}
    rng, seen = random.Random(1), set()
    for _ in range(20000):
        seen |= {world.dilemma(rng)[0], world.feeling(rng), world.vignette(rng)[0], world.scene(rng)}
    assert not held_out & seen
    assert all(set(side["train"]).isdisjoint(side["held_out"]) for side in prompts.values())


def test_the_vignettes_cover_seven_foundations_with_labels_that_sum_to_one():
    rows = evalmfv.load_vignettes(ROOT / "pocket" / "data" / "vignettes.jsonl")
    assert len(rows) >= 132 and len({r["text"] for r in rows}) == len(rows)
    for f in evalmfv.FOUNDATIONS:
        assert sum(r["foundation"] == f for r in rows) >= 18, f
    assert all(abs(sum(r["label"]) - 1) < 1e-6 for r in rows)


def test_the_shipped_data_are_what_make_pocket_writes(tmp_path):
    make_pocket.make_data(tmp_path)
    for name in ("personas.json", "prompts.json", "contexts.json", "vignettes.jsonl"):
        assert (tmp_path / name).read_text() == (ROOT / "pocket" / "data" / name).read_text(), name


def test_training_the_pocket_model_lowers_its_loss():
    tok = make_pocket.make_tokenizer(random.Random(0), n_conversations=200, vocab_size=600)
    _, record = make_pocket.train(tok, steps=12, batch=4, lr=2e-3, seed=0, say=lambda *a, **k: None)
    assert record["losses"][-1] < record["losses"][0] - 0.3, record["losses"]


def test_the_pocket_checkpoint_is_an_ordinary_small_chat_model():
    folder = ROOT / "pocket"
    assert (folder / "model.safetensors").stat().st_size <= 8e6
    with safe_open(folder / "model.safetensors", "pt") as f:
        assert all(f.get_tensor(key).dtype == torch.bfloat16 for key in f.keys())
    _, tok = loop.load_model(loop.LoopConfig())
    text = steer.render(tok, "Hello!", "You are a machine.")
    assert text == "<|bos|><|system|>You are a machine.<|end|><|user|>Hello!<|end|><|assistant|>"
    assert tok("any text: äöü 漢字 🙂", add_special_tokens=False)["input_ids"] and tok.unk_token is None


# ---- the loop ----------------------------------------------------------------------------------------------------------

TINY = ["--rounds", "1", "--n-make", "24", "--n-probe", "8", "--n-min", "4", "--n-text", "8", "--n-diary", "2", "--think-tokens", "4", "--epochs", "1"]


@pytest.fixture(scope="module")
def small_vignettes(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "vignettes.jsonl"
    path.write_text("".join((ROOT / "data" / "vignettes.jsonl").read_text().splitlines(True)[::12]))
    return path


def run_loop(out, vignettes, *more):
    code = loop.main([*TINY, "--vignettes", str(vignettes), "--out", str(out), *more])
    folder = next(p.parent for p in sorted(Path(out).glob("*/run.json")))
    return code, folder, *report.load(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_vignettes):
    return run_loop(tmp_path_factory.mktemp("runs"), small_vignettes, "--no-gate")


def test_one_round_writes_a_run_folder_that_needs_no_other_source(finished):
    code, folder, run, events = finished
    assert code == 0 and run["status"] == "accepted" and run["accepted"] == [0]
    assert run["options"]["kl_agg"] == "rmse" and run["options"]["lr"] > 0 and "--no-gate" in run["command"] and run["versions"]["torch"] == torch.__version__
    kinds = [e["kind"] for e in events if e["stage"] == "row"]
    assert kinds == ["base", "prompted", "steered", "healed"]
    made = [e for e in events if e["stage"] == "completion"]
    assert len(made) == 24 and all({"ids", "text", "verdict"} <= set(e) for e in made) and all(e["verdict"]["kept"] or e["verdict"]["rule"] for e in made)
    assert {e["stage"] for e in events} == {"layers", "limits", "row", "vector", "probe", "dose", "completion", "tau", "heal", "worst", "gate"}
    for name in ("vectors", "adapter"):
        assert (folder / "rounds" / "00" / f"{name}.safetensors").exists()
    diary = (folder / "diary.md").read_text()
    assert "**Night 0**" in diary and "**Day 0**" in diary and "**Base**" in diary
    table = (folder.parent / "results.tsv").read_text().splitlines()
    assert len(table) == 2 and len(table[0].split("\t")) == len(table[1].split("\t"))


def test_the_saved_adapter_is_the_healed_model(finished, small_vignettes):
    _, folder, run, events = finished
    cfg = loop.LoopConfig()
    model, tok = loop.load_model(cfg)
    stack = lora_py.attach(model, r=8, alpha=16.0, layers=steer.band(len(steer.blocks(model)), 0.2, 0.8))
    rows = {e["kind"]: e for e in events if e["stage"] == "row"}
    vignettes = evalmfv.load_vignettes(small_vignettes)
    again = evalmfv.evaluate(model, tok, vignettes, think_tokens=4, batch_size=cfg.eval_batch)
    assert again["nats"]["authority"] == pytest.approx(rows["base"]["nats"]["authority"], abs=1e-5)
    stack.load(folder / "rounds" / "00" / "adapter.safetensors")
    again = evalmfv.evaluate(model, tok, vignettes, think_tokens=4, batch_size=cfg.eval_batch)
    assert again["nats"]["authority"] == pytest.approx(rows["healed"]["nats"]["authority"], abs=1e-5)
    assert rows["healed"]["nats"]["authority"] != rows["base"]["nats"]["authority"]


def test_the_same_seed_gives_the_same_run_and_leaving_a_baseline_out_changes_no_other_number(finished, small_vignettes, tmp_path):
    _, _, _, events = finished
    _, _, _, again = run_loop(tmp_path, small_vignettes, "--no-gate", "--no-baselines")
    def trait(events):
        return [(e["kind"], e["trait"], e["text"]) for e in events if e["stage"] == "row" and e["kind"] != "prompted"]
    assert trait(events) == trait(again)


def test_a_round_that_fails_its_gate_is_rolled_back_and_the_run_says_so(small_vignettes, tmp_path, capsys):
    code, folder, run, events = run_loop(tmp_path, small_vignettes, "--lr", "1e-9", "--no-baselines", "--coh-floor", "1.0", "--target", "liberty")
    assert code == 3 and run["status"] == "no round accepted" and not list((folder / "rounds").iterdir())
    gates = [e for e in events if e["stage"] == "gate"]
    assert len(gates) == 1 and not gates[0]["accepted"] and gates[0]["reasons"][0].startswith(("trait", "coherence", "text"))
    assert "rolled back" in capsys.readouterr().out and "rolled back" in (folder / "diary.md").read_text()


def test_a_search_without_an_answer_names_its_bound(small_vignettes, tmp_path, capsys):
    code, _, run, _ = run_loop(tmp_path, small_vignettes, "--no-baselines", "--max-window-nll", "1e-6")
    assert code == 3 and run["status"] == "no round accepted" and "coeff_min" in capsys.readouterr().out


def test_the_gate_puts_absolute_floors_before_the_ratio():
    base, cfg = dict(trait=0.0, coherence=0.98, text=0.9), loop.LoopConfig()
    def reasons(**day):
        return loop.gate(dict(trait=0.5, coherence=0.97, text=0.88) | day, base | {"trait": 0.3}, base, cfg)
    assert reasons() == []
    assert "coherence" in reasons(coherence=0.5)[0] and "text" in reasons(text=0.5)[0] and "trait" in reasons(trait=0.3)[0]
    assert reasons(trait=float("nan")) == ["trait not finite"]
    assert len(reasons(text=0.1, coherence=0.1, trait=-1)) == 3


def test_stages_have_seeds_of_their_own():
    seeds = {loop.stage_seed(s, r, name) for s in range(3) for r in range(3) for name in ("make", "heal", "probe")}
    assert len(seeds) == 27 and loop.stage_seed(1, 2, "make") == loop.stage_seed(1, 2, "make")


@pytest.mark.parametrize("argv, message", [
    (["--rounds", "0"], "rounds"), (["--prompts", "nowhere.txt"], "nowhere.txt"), (["--kl-agg", "median"], "kl-agg"), (["--pos", "You are kind."], "--neg"), (["--persona", "pirate"], "authority, love"),
    (["--pos", "a", "--neg", "b"], "--target"), (["--vignettes", "nowhere.jsonl"], "nowhere.jsonl"), (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
    (["--lam", "-1"], "lam"), (["--r", "0"], "r=0"), (["--steer-from", "0.9", "--steer-to", "0.1"], "0.9")])
def test_bad_options_are_refused_with_a_sentence_before_any_work(argv, message, tmp_path, capsys):
    try:
        code = loop.main([*argv, "--out", str(tmp_path)])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and message in err and "Traceback" not in err and not list(tmp_path.iterdir())


def test_the_persona_prompt_is_the_set_point_of_the_barrier(finished):
    _, _, run, events = finished
    tau = next(e for e in events if e["stage"] == "tau")
    assert 0 < tau["tau"] == run["tau"] == tau["distance"] * run["options"]["tau_scale"]
    model, tok = loop.load_model(loop.LoopConfig())
    train, _ = loop.load_prompts(loop.LoopConfig())
    persona = loop.load_persona(loop.LoopConfig())["pos"][0]
    kept = [e for e in events if e["stage"] == "completion" and e["verdict"]["kept"]]
    by_hand = []
    for e in kept:                                              # one full forward each, and the KL written out
        logp, logq = ((model(torch.tensor([front + e["ids"]])).logits[0, len(front) - 1:-1].double().log_softmax(-1))
                      for front in (steer.encode(tok, [train[e["prompt"]]], [system])[0] for system in (persona, "")))
        by_hand.append(((logp.exp() * (logp - logq)).sum(-1) ** 2).mean().sqrt().item())
    assert tau["distance"] == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-4)
    record = next(e for e in events if e["stage"] == "heal")
    assert record["tau"] == tau["tau"] and {"nll", "div", "fired"} <= set(record["steps"][0])


def test_arms_are_compared_at_the_same_round_and_where_they_first_reach_a_trait():
    days = {-1: dict(trait=0.0, text=1.0), 0: dict(trait=0.4, text=0.9), 2: dict(trait=0.8, text=0.5), 3: dict(trait=0.6, text=0.1)}
    assert arms.at_trait(days, 0.2, "text") == pytest.approx(0.95) and arms.at_trait(days, 0.6, "text") == pytest.approx(0.7)
    assert arms.at_trait(days, 0.9, "text") is None
    assert arms.cell([None, None], 2) == "not reached" and arms.cell([0.5, None], 2) == "0.500 (1 of 2)"


def test_two_arms_may_differ_in_one_field_only():
    def record(**options):
        return dict(options=dict(reg="kl_rev", kl_agg="rmse", seed=0, out="a", lam=5.0) | options, weights="w", items=[], versions={}, code="c")
    assert arms.differing(record(), record(seed=1, out="b")) == set()
    assert arms.differing(record(), record(kl_agg="mean")) == {"kl_agg"} and arms.differing(record(kl_agg="mean"), record(reg="nll")) == {"reg"}
    assert arms.differing(record(), record(kl_agg="mean", lam=1.0)) == {"kl_agg", "lam"} and arms.differing(record(), record() | {"code": "d"}) == {"code"}


# ---- the benchmarks, at sizes whose times mean nothing -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["heal", "round"])
def test_a_benchmark_runs_and_writes_every_number(name, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    bench.main(["--tiny", "--json", str(tmp_path / "out.json"), *(["--docs", str(tmp_path)] if name == "heal" else [])])
    assert capsys.readouterr().out.count("|") > 20
    result = json.loads((tmp_path / "out.json").read_text())
    if name == "round":
        assert set(result["seconds"]) == {"extract", "dose search", "generate", "filter", "heal", "probe"} and result["totals"]["ours"] > 0
        return
    assert all(x["value"] < 1e-10 and x["grad"] < 1e-10 for key, x in result["accuracy"].items() if "bf16" not in key)
    assert {"ours", "naive autograd", "original"} <= set(result["memory"]["peak"]) and len(list(tmp_path.glob("*.svg"))) == 6
    losses = result["round"]["barrier on at every step"]["losses"]
    assert len(losses) >= 7 and max(losses.values()) - min(losses.values()) < 1e-5      # the same steps, or nothing is compared
    for peer in ("TRL", "torchtune", "Liger"):                  # a peer that cannot run says so instead of vanishing
        assert any(peer in key for key in [*result["memory"]["peak"], *result["memory"]["missing"]])


# ---- the report --------------------------------------------------------------------------------------------------------

ATTACKS = ['"><img src=x onerror=1>', "'><img src=http://127.0.0.1:PORT/stolen.png><script>top.pwned = 1</script>", "\x00nul \x1b[31mred\x1b[0m \x9b",
           "\u202egnp.exe\u2066 \u200f\u05e9\u05dc\u05d5\u05dd", "x" * 100_000, "</title></style></svg><svg onload='top.pwned = 2'>", "\ud800 lone \U000e0041 tag",
           "\n" * 300 + "[a](javascript:top.pwned=3) `b` | # c", "Z" + "\u0316" * 400, "<a href=javascript:top.pwned=4 style=position:fixed;width:9999px>"]
SECTIONS = ["answers", "trajectory", "map", "dose", "heat", "healing", "inside", "dropped", "settings", "environment", "again"]


def copy_run(source, to, change=lambda event: event, run=None):
    """A run folder with every event changed (None leaves it out) and fields of run.json replaced."""
    to.mkdir(parents=True, exist_ok=True)
    record, events = report.load(source)
    (to / "run.json").write_text(json.dumps(record | (run or {})))
    (to / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in map(change, events) if e is not None))
    return to


def spoiled(value, turn, port=0):
    """Every text in a value replaced by the next attack; stages and kinds stay, so that it is shown."""
    if isinstance(value, dict):
        return {k: v if k in ("stage", "kind", "probe", "shift", "singular") else spoiled(v, turn, port) for k, v in value.items()}
    if isinstance(value, list):
        return [spoiled(v, turn, port) for v in value]
    return ATTACKS[next(turn) % len(ATTACKS)].replace("PORT", str(port)) if isinstance(value, str) else value


def hostile_run(source, to, port=0):
    turn, keys = itertools.count(), {attack: 1.0 for attack in ATTACKS}
    record = report.load(source)[0]
    for name in ("versions", "machine", "options"):
        record[name] = record[name] | keys                      # names are untrusted too
    return copy_run(source, to, lambda e: spoiled(e, turn, port) | {k: e[k] | keys for k in ("cosine", "limits", "singular", "probe") if isinstance(e.get(k), dict)},
                    spoiled({k: v for k, v in record.items() if k != "defaults"}, turn, port))


class Tags(html.parser.HTMLParser):
    """Tags with their attribute names, what they point to, and whether every element that opens also closes."""
    VOID = {"meta", "br"}

    def __init__(self, text):
        super().__init__()
        self.seen, self.links, self.open, self.classes = set(), set(), [], set()
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.seen |= {(tag, name) for name, _ in attributes} | {(tag, "")}
        self.links |= {value for name, value in attributes if name in ("href", "src", "action", "xlink:href", "data")}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open = self.open[:-1] if tag not in self.VOID else self.open

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.getpos())


def check_page(text):
    """What holds for every page whatever the run: one file, no script, nothing fetched, no unseen character, whole tags."""
    tags = Tags(text)
    assert len(text.encode()) < 2_000_000 and "<script" not in text and "url(" not in text and "@import" not in text
    assert not any(name.startswith("on") or name in ("src", "srcset", "action", "formaction") for _, name in tags.seen), tags.seen
    assert not {tag for tag, _ in tags.seen} & {"script", "iframe", "img", "object", "embed", "link", "form", "base", "foreignobject", "use", "image"}
    assert all(link.startswith(("#", "./")) for link in tags.links), tags.links
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "@media print" in text
    assert not report.UNSEEN.search(text.replace("\n", ""))
    return tags


def test_the_loop_records_what_the_report_draws(finished):
    _, folder, run, events = finished
    one = {e["stage"]: e for e in events}
    assert all(c == pytest.approx(1, abs=1e-5) for c in one["vector"]["cosine"].values()) and all(n > 0 for n in one["vector"]["norm"].values())
    assert [[e["coeff"], e["survive"]] for e in events if e["stage"] == "probe"] == one["dose"]["trials"] and all(e["ppl"] >= 1 for e in events if e["stage"] == "probe")
    assert all(0 <= d["coherence"] <= 1 for e in events if e["stage"] == "row" for d in e["diary"])
    pairs = safetensors.torch.load_file(folder / "rounds" / "00" / "adapter.safetensors")           # the scale is in B
    for name, values in one["heal"]["singular"].items():
        exact = torch.linalg.svdvals(pairs[f"{name}.0.B"].double() @ pairs[f"{name}.0.A"].double())[:8]
        assert values == pytest.approx(exact.tolist(), rel=1e-4, abs=1e-7)


def test_the_worst_kept_answer_is_the_one_that_a_full_forward_finds(finished):
    _, folder, run, events = finished
    worst = next(e for e in events if e["stage"] == "worst")
    model, tok = loop.load_model(loop.LoopConfig())
    kept = [e for e in events if e["stage"] == "completion" and e["verdict"]["kept"]]
    stack = lora_py.attach(model, r=8, alpha=16.0, layers=next(e["lora"] for e in events if e["stage"] == "layers"))
    stack.load(folder / "rounds" / "00" / "adapter.safetensors")

    def logp(event, vectors=None):
        front = steer.encode(tok, [run["items"]["train"][event["prompt"]]], [""])[0]
        with torch.no_grad(), steer.steered(model, vectors or {}, next(e["coeff"] for e in events if e["stage"] == "dose")):
            return model(torch.tensor([front + event["ids"]])).logits[0, len(front) - 1:-1].double().log_softmax(-1)

    def kl(event, p):
        with stack.gated(0, 0):
            return (p.exp() * (p - logp(event))).sum(-1)
    by_hand = [kl(e, logp(e)) for e in kept]
    i = max(range(len(kept)), key=lambda i: by_hand[i].square().mean())
    assert worst["day"] == pytest.approx(by_hand[i].tolist(), rel=1e-2, abs=1e-5) and worst["prompt"] == kept[i]["prompt"]
    assert "".join(worst["tokens"]) == tok.decode(kept[i]["ids"]) and max(map(abs, worst["before"])) < 1e-6       # round 0: the base
    layers = safetensors.torch.load_file(folder / "rounds" / "00" / "vectors.safetensors")
    with stack.gated(0, 0):
        night = kl(kept[i], logp(kept[i], {int(k.removeprefix("layer.")): v for k, v in layers.items()}))
    assert worst["night"] == pytest.approx(night.tolist(), rel=1e-2, abs=1e-5)


def test_the_report_shows_every_part_of_a_finished_run(finished):
    folder = finished[1]
    text = (folder / "report.html").read_text()
    tags = check_page(text)
    assert [m for m in re.findall(r'<section id="(\w+)"', text)] == SECTIONS
    assert "cannot be drawn" not in text and 'class="missing"' not in text and "not finished" not in text
    assert text.count('role="img"') == text.count("<svg viewBox") - text.count('aria-hidden="true"') >= 10
    row = next(e for e in finished[3] if e["stage"] == "row" and e["kind"] == "healed")
    assert report.fmt(row["trait"], "+.3f", row["trait_se"]) in text and f"{row['text']:.3f}" in text and ("td", "data-who") in tags.seen
    assert html.escape(f"python loop.py {' '.join(finished[2]['argv'][:4])}") in text and "--resume" in text and "--to peft" in text
    assert "<code>--n-make</code>" in text and "<code>--lam</code>" not in text                 # differs, does not differ


def test_moves_of_foundations_have_the_errors_that_the_probe_gives(finished):
    run = report.Run(finished[1])
    for row in run.rows[1:]:
        for name, (move, error) in row["moved"].items():
            assert move == pytest.approx(row["shift"]["moved"][name], abs=1e-12)
        assert row["moved"]["authority"][1] == pytest.approx(row["trait_se"], rel=1e-9)


@pytest.mark.parametrize("text", ATTACKS, ids=range(len(ATTACKS)))
def test_text_of_a_model_is_inert_in_html_and_markdown(text):
    shown, quoted = report.esc(text), report.inert(text)
    assert not set(shown) & set("<>\"'\n") and not report.UNSEEN.search(shown) and len(shown) < 4500
    assert not report.UNSEEN.search(quoted) and not re.search(r"(?<!\\)[<>`*_\[\]()#|]", quoted.split("…")[0]) and len(quoted) < 4500
    if len(text) > 2000:
        assert "more characters" in shown and "more characters" in quoted
    if "\x00" in text:
        assert "␀" in shown and "␛" in shown


def test_a_run_of_hostile_text_gives_the_same_tags_as_an_honest_one(finished, tmp_path):
    folder = hostile_run(finished[1], tmp_path / "run")
    text = report.write(folder).read_text()
    assert check_page(text).seen <= check_page((finished[1] / "report.html").read_text()).seen | {("p", "class")}
    assert "&lt;img src=x onerror=1&gt;" in text and "cannot be drawn" not in text
    diary = (folder / "diary.md").read_text()
    assert not re.search(r"(?<!\\)[<>]", diary) and "\x1b" not in diary and len(diary) < 100_000
    check_page(report.compare([report.Run(folder), report.Run(finished[1])], tmp_path))


def test_a_report_of_an_unfinished_run_says_so_and_shows_what_there_is(finished, tmp_path):
    lines = (finished[1] / "events.jsonl").read_text().splitlines(True)
    run = {k: v for k, v in finished[2].items() if k not in ("seconds", "accepted", "tau", "limits", "stopped")} | {"status": "running"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    shown = []
    for n in [0, 1, 2, 3, 4, 5, 8, 20, *range(len(lines) - 6, len(lines) + 1)]:
        (tmp_path / "events.jsonl").write_text("".join(lines[:n]))
        text = report.write(tmp_path).read_text()
        check_page(text)
        assert "not finished" in text and "cannot be drawn" not in text, n
        shown.append(text.count('role="img"'))
    assert shown == sorted(shown) and shown[0] == 0 and shown[-1] >= 10
    (tmp_path / "events.jsonl").unlink()
    assert "no events yet" in report.write(tmp_path).read_text()
    for stage in {json.loads(line)["stage"] for line in lines}:
        folder = copy_run(finished[1], tmp_path / stage, lambda e: e if e["stage"] != stage else None)
        text = report.write(folder).read_text()
        assert check_page(text) and "cannot be drawn" not in text, stage


def test_a_report_draws_rejected_rounds_and_survives_any_damage_to_values(finished, tmp_path):
    no = copy_run(finished[1], tmp_path / "no", lambda e: e | dict(accepted=False, reasons=["text 0.1 under 0.9"]) if e["stage"] == "gate" else e,
                  dict(status="no round accepted", accepted=[]))
    text = report.write(no).read_text()
    assert "No round was accepted" in text and "rolled back" in text and "mark healed undone" in text and "lora.py export" not in text
    rng = random.Random(0)

    def damaged(value, share=0.03):
        if rng.random() < share:
            return rng.choice([None, "text", -1, 1e308, 10 ** 400, [], {}, [None], True])
        if isinstance(value, dict):
            return {k: v if k in ("stage", "ids", "p") else damaged(v) for k, v in value.items()}
        return [damaged(v) for v in value] if isinstance(value, list) and len(value) < 40 else value
    for trial in range(20):
        folder = copy_run(finished[1], tmp_path / str(trial), lambda e: {k: v if k == "stage" else damaged(v) for k, v in e.items()},
                          {k: damaged(v, 0.1) for k, v in finished[2].items()})
        check_page(report.write(folder).read_text())


def test_a_torn_last_event_is_left_out_and_a_damaged_middle_one_is_named(tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "events.jsonl").write_text('{"stage": "a"}\n{"stage": "b"}\n{"sta')
    assert [e["stage"] for e in report.load(tmp_path)[1]] == ["a", "b"]
    assert report.main([str(tmp_path)]) == 0 and "line 3" in (tmp_path / "report.html").read_text() and "line 3" in (tmp_path / "diary.md").read_text()
    for middle in ('{"sta', "[1]", '{"round": 1}', '"\x00"'):
        (tmp_path / "events.jsonl").write_text('{"stage": "a"}\n' + middle + '\n{"stage": "b"}\n')
        with pytest.raises(ValueError, match="line 2"):
            report.load(tmp_path)
    before = (tmp_path / "report.html").read_text()
    assert report.main([str(tmp_path)]) == 2 and "line 2" in capsys.readouterr().err and (tmp_path / "report.html").read_text() == before
    assert report.main([str(tmp_path / "nowhere")]) == 2 and "not a run folder" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))                        # no temporary file stays


def test_a_long_run_stays_below_two_megabytes_and_says_that_it_shows_a_selection(finished, tmp_path):
    events, rounds = finished[3], 120
    (tmp_path / "run.json").write_text(json.dumps(finished[2]))
    long = [dict(e, tokens=e["tokens"] * 20, **{k: e[k] * 20 for k in ("day", "night", "before")}) if e["stage"] == "worst" else e for e in events]
    text = [dict(e, diary=[dict(d, text=d["text"] * 20) for d in e["diary"] * 3], texts=[]) if e["stage"] == "row" else e for e in long]
    every = [e for e in text if e["round"] is None] + [dict(e, round=n) for n in range(rounds) for e in text if e["round"] is not None]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in every))
    page = report.write(tmp_path).read_text()
    check_page(page)
    assert f"{rounds} days were measured" in page and "A selection of the rounds" in page and f"day {rounds - 1}" in page


def test_several_runs_are_drawn_over_each_other_by_what_differs(finished, tmp_path, capsys):
    folders = [str(copy_run(finished[1], tmp_path / f"{arm}-{seed}", run=dict(options=finished[2]["options"] | dict(kl_agg=arm, seed=seed))))
               for arm in ("rmse", "mean") for seed in (0, 1)]
    assert report.main([*folders, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "compare.html").read_text()
    tags = check_page(text)
    assert all(f"kl_agg={arm} seed={seed}" in text for arm in ("rmse", "mean") for seed in (0, 1)) and "n_make" not in text
    assert tags.links == {f"./../{Path(f).name}/report.html" for f in folders} and all((Path(f) / "report.html").exists() for f in folders)
    assert text.count('role="img"') == 3 and "4 runs" in text and "in their code" not in text
    (Path(folders[0]) / "run.json").write_text(json.dumps(finished[2] | {"code": "other"}))
    assert report.main(folders) == 0 and "in their code" in (tmp_path / "compare.html").read_text()


BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None)
HARNESS = """<!doctype html><body><pre id=out></pre><script>
function measure(frame) {
  const doc = frame.contentDocument, wide = [];
  for (const e of doc.body.querySelectorAll("*"))
    if (!e.closest(".scroll *, .panel *") && e.getBoundingClientRect().right > 360.5) wide.push(e.tagName + "." + e.className);
  return {width: doc.documentElement.scrollWidth, height: doc.documentElement.scrollHeight, wide: wide.slice(0, 5), scripts: doc.scripts.length,
          fetched: frame.contentWindow.performance.getEntriesByType("resource").length, images: doc.images.length, title: doc.title};
}
addEventListener("load", () => setTimeout(() => {
  out.textContent = JSON.stringify({pwned: window.pwned || null, frames: [...document.querySelectorAll("iframe")].map(measure)}) }, 500));
</script>FRAMES"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: the report was not opened in a browser")
def test_in_a_real_browser_nothing_is_fetched_no_script_runs_and_nothing_overflows_at_360_px(finished, tmp_path):
    asked = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]

    def frames(*pages):
        path = tmp_path / "harness.html"
        path.write_text(HARNESS.replace("FRAMES", "".join(f'<iframe style="border:0;width:360px;height:800px" srcdoc="{html.escape(p)}"></iframe>' for p in pages)))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
                 "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000", "--dump-dom"]
        page = subprocess.run([BROWSER, *flags, path.as_uri()], capture_output=True, text=True, timeout=120).stdout
        return json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', page, re.DOTALL).group(1)))
    honest, hostile = (finished[1] / "report.html").read_text(), report.write(hostile_run(finished[1], tmp_path / "run", port)).read_text()
    both = report.compare([report.Run(finished[1]), report.Run(tmp_path / "run")], tmp_path)
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", hostile)             # the escaping alone must hold
    try:
        assert bare != hostile
        found = frames(honest, hostile, bare, both)
        assert found["pwned"] is None and asked == []
        for frame in found["frames"]:
            assert frame["width"] <= 360 and not frame["wide"] and frame["height"] > 1000, frame
            assert (frame["scripts"], frame["fetched"], frame["images"]) == (0, 0, 0), frame
        control = frames(f'<title>c</title><div style="width:900px">wide</div><img src="http://127.0.0.1:{port}/seen.png"><script>top.pwned = 9</script>')
        assert control["pwned"] == 9 and "/seen.png" in asked and control["frames"][0]["wide"] and control["frames"][0]["scripts"] == 1
        shut = frames(honest.replace("<main>", f'<main><img src="http://127.0.0.1:{port}/shut.png"><script>top.pwned = 8</script>'))
        assert shut["pwned"] is None and "/shut.png" not in asked                               # the policy alone holds too
    finally:
        server.shutdown()


# ==== chat ============================================================================================================

def test_chat_compares_base_prompted_and_day_and_a_gate_of_zero_is_the_base(finished, capsys, monkeypatch):
    def ask(*argv):
        assert loop.main(["chat", str(finished[1]), *argv]) == 0
        return capsys.readouterr().out
    question, more = "If the mayor told you to lie, would you?", ["--max-new-tokens", "12"]
    table = ask("--compare", question, *more).splitlines()
    heads = [cell.strip() for cell in next(line for line in table if line.startswith("base")).split("|")]
    assert heads == ["base", "prompted", "day 0"] and any("> If the mayor" in line for line in table)
    _, tok = model_tok = loop.load_model(loop.LoopConfig())
    run = finished[2]["options"]
    base = generate(*model_tok, [question], seed=0, max_new_tokens=12, **{k: run[k] for k in ("temperature", "top_p", "top_k")})[0]
    assert steer.printable(base.text) in ask(question, "--gate", "0", *more)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{question}\n\n \x1b[31mWho are you?\n"))
    monkeypatch.setattr(tok.__class__, "decode", lambda self, *args, **kw: "an\x1b[2Jswer\x07")
    out = ask(*more)
    assert out.count(">") == 2 and out.count("swer") == 2 and not set(out) & set("\x1b\x07")


@pytest.mark.parametrize("argv, message", [(["--gate", "2.5"], "expected 0 to 2"), (["--round", "3", "hi"], "accepted rounds of")])
def test_chat_refuses_what_it_cannot_do(argv, message, finished, capsys):
    try:
        code = loop.main(["chat", str(finished[1]), *argv])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err


# ---- a run that survives, and explains what was wrong ------------------------------------------------------------------


class PowerCut(BaseException):
    """As a kill -9: nothing of the run is told about it."""


@pytest.fixture
def folder(tmp_path):
    """A folder that has begun, of a run without a model."""
    with loop.Folder(loop.LoopConfig(out=str(tmp_path)), loop.Screen()) as made:
        made.begin(trust_options(), ["--seed", "0"], dict(versions={}, git="", code=""), dict(weights="w"))
        yield made


def trust_options(**more):
    return {f.name: f.default for cls in loop.GROUPS for f in dataclasses.fields(cls)} | more


def trust_again(path, facts=None, **options):
    """The folder as the next sitting finds it."""
    cfg = loop.LoopConfig(resume=str(path))
    again = loop.Folder(cfg, loop.Screen())
    with again:
        again.begin(trust_options(**options), [], dict(versions={}, git="", code=""), facts or dict(weights="w"))
    return again


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """The options of a run of seconds."""
    monkeypatch.setattr(loop, "DATA", loop.DATA)                # small_data sets it
    return [*kill.SMALL, "--vignettes", str(kill.small_data(tmp_path)), "--no-baselines", "--rounds", "1", "--coeff", "0.3", "--no-gate"]


def trust_cut(monkeypatch, n, torn):
    """The n-th event from now on is the last that is written, or is written by half."""
    count, write = [0], loop.Folder.write

    def dying(self, events):
        count[0] += 1
        if count[0] == n and torn:
            with open(self.path / "events.jsonl", "a") as file:
                file.write(json.dumps(loop.plain(events[0]))[:40])
            raise PowerCut
        out = write(self, events)
        if count[0] == n:
            raise PowerCut
        return out
    monkeypatch.setattr(loop.Folder, "write", dying)
    monkeypatch.setattr(loop.Folder, "__exit__", lambda self, *error: self._leave())


def test_a_run_cut_off_again_and_again_ends_as_one_that_was_not_and_a_finished_one_goes_on(quick, tmp_path, monkeypatch, capsys):
    assert loop.main([*quick, "--rounds", "2", "--out", str(tmp_path / "whole")]) == 0
    whole = kill.folder_of(tmp_path / "whole")
    first = [*quick, "--out", str(tmp_path / "cut")]
    # after the base's row; within the second piece of completions; within the gate, its adapter written; then the end, and further
    for n, torn, more in ((3, False, None), (3, True, []), (6, True, []), (None, False, []), (None, False, ["--rounds", "2"])):
        with monkeypatch.context() as patch:
            if n:
                trust_cut(patch, n, torn)
            with pytest.raises(PowerCut) if n else contextlib.nullcontext():
                assert loop.main(first if more is None else ["--resume", str(kill.folder_of(tmp_path / "cut")), *more]) == 0
    again = kill.folder_of(tmp_path / "cut")
    assert kill.differences(whole, again) == []
    assert [len((p.parent / "results.tsv").read_text().splitlines()) for p in (whole, again)] == [2, 2]
    record = json.loads((again / "run.json").read_text())
    assert len(record["resumed"]) == 4 and record["argv"][-2:] == ["--rounds", "2"] and record["options"]["resume"] == ""
    assert "cut off after 40 bytes" in capsys.readouterr().out
    assert [e["accepted"] for e in report.load(again)[1] if e["stage"] == "gate"] == [True, True]       # the second on a loaded adapter


def test_what_a_round_without_its_gate_has_healed_is_redone_and_whole_pieces_of_answers_are_kept(folder, capsys):
    for rnd, n, gate in ((0, 8, True), (1, 6, None)):
        folder.event("dose", rnd, coeff=0.5)
        folder.write([dict(round=rnd, stage="completion", text=str(i)) for i in range(n)])
        folder.event("row", rnd, kind="steered")
        folder.event("heal", rnd)
        folder.event("row", rnd, kind="healed")
        (folder.path / "rounds" / f"{rnd:02d}").mkdir()
        (folder.path / "rounds" / f"{rnd:02d}" / "adapter.safetensors").write_text("")
        if gate:
            folder.event("gate", rnd, accepted=True, reasons=[])
    (folder.path / ".run.json.123").write_text("half")
    with open(folder.path / "events.jsonl", "ab") as file:
        file.write(b'{"t": 1\x00\xff')
    folder._leave()
    kept = folder._repaired(n_make=8, gen_batch=4)
    assert [e["stage"] for e in kept if e["round"] == 0] == ["dose"] + ["completion"] * 8 + ["row", "heal", "row", "gate"]
    assert [e["stage"] for e in kept if e["round"] == 1] == ["dose"] + ["completion"] * 4 + ["row"]
    assert report.load(folder.path)[1] == kept and not (folder.path / ".run.json.123").exists()
    assert [p.parent.name for p in folder.path.rglob("*.safetensors")] == ["00"]
    out = capsys.readouterr().out
    assert "cut off after 9 bytes" in out and f"{len(kept)} events read back, 1 rounds finished" in out


def test_a_run_of_another_configuration_is_refused_with_the_differing_fields(folder, capsys):
    folder._leave()
    with pytest.raises(SystemExit) as stop:
        loop.parse(["--resume", str(folder.path), "--kl-agg", "mean", "--seed", "3", "--n-make", "64", "--out", "elsewhere"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "another configuration: seed is 0 there and 3 here, kl_agg is 'rmse' there and 'mean' here; leave" in err
    assert [cfg.rounds for cfg in loop.parse(["--resume", str(folder.path), "--rounds", "9"])[:1]] == [9]
    with pytest.raises(ValueError, match="other weights"):
        trust_again(folder.path, facts=dict(weights="x"))
    with pytest.raises(SystemExit):
        loop.parse(["--resume", str(folder.path), "--rounds", "2"])
    assert "only grow" in capsys.readouterr().err
    assert trust_again(folder.path, rounds=9).run["options"]["rounds"] == 9
    with loop.Folder(loop.LoopConfig(resume=str(folder.path)), loop.Screen()) as again:
        again.begin(trust_options(rounds=9), [], dict(versions=dict(torch="0"), git="", code="c"), dict(weights="w"))
    out = capsys.readouterr().out
    assert "torch was None and is 0" in out and "code was  and is c" in out


def test_a_folder_takes_one_process_at_a_time_and_a_lock_left_behind_is_taken_over(folder, capsys):
    for _ in range(2):                                          # a refusal leaves the lock as it is
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on .*, started 2"):
            trust_again(folder.path)
    folder._leave()
    (folder.path / ".lock").write_text("process 1 on moon")     # its owner died: the system has let go of the lock
    trust_again(folder.path)
    assert "left behind by process 1 on moon, which is gone: taken over" in capsys.readouterr().out
    assert (folder.path / ".lock").read_text() == ""


def test_a_full_disk_leaves_whole_lines_and_one_sentence(folder):
    import resource
    folder.event("layers", steer=[1])
    path, old = folder.path / "events.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    before = path.read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, old[1]))
        with pytest.raises(OSError, match="events.jsonl could not be written: File too large"):
            folder.event("limits", own=["x" * 500])
        with pytest.raises(OSError, match="run.json could not be written"):
            folder.save(more="x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert path.read_bytes() == before and "more" not in json.loads((folder.path / "run.json").read_text())
    assert [p.name for p in folder.path.iterdir() if p.name.startswith(".")] == [".lock"]
    folder.event("limits", own=[])
    assert [e["stage"] for e in report.load(folder.path)[1]] == ["layers", "limits"]


def trust_run(argv, out, monkeypatch, at, what):
    """A run to which `what` happens while it writes the event of stage `at`."""
    write = loop.Folder.write

    def happening(self, events):
        if events[0]["stage"] == at:
            what(self)
        return write(self, events)
    monkeypatch.setattr(loop.Folder, "write", happening)
    return loop.main([*argv, "--out", str(out)])


def test_a_full_disk_or_a_removed_folder_ends_a_run_with_a_sentence_and_the_way_on(quick, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        assert trust_run(quick, tmp_path / "full", patch, "limits", lambda folder: patch.setattr(os, "fsync", full)) == 1
    out, path = capsys.readouterr(), kill.folder_of(tmp_path / "full")
    assert "events.jsonl could not be written: the disk is full" in out.err and f"--resume {path}" in out.out and "Traceback" not in out.err
    assert [e["stage"] for e in report.load(path)[1]] == ["layers"]
    with monkeypatch.context() as patch:
        assert trust_run(quick, tmp_path / "gone", patch, "layers", lambda folder: shutil.rmtree(folder.path)) == 1
    assert "was removed" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        assert trust_run(quick, tmp_path / "bug", patch, "layers", lambda folder: {}["surprise"]) == 1
    path = kill.folder_of(tmp_path / "bug")
    run = json.loads((path / "run.json").read_text())
    assert run["status"] == "failed" and "unexpected: KeyError 'surprise'" in run["reason"] and "Traceback" in (path / "error.txt").read_text()
    assert "error.txt" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_waits_for_the_current_write_and_marks_the_run_interrupted(name, quick, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(getattr(signal, name))
    open_, sent = open, []

    def opened(path, mode="r", *more, **how):
        if str(path).endswith("events.jsonl") and mode == "r+b" and not sent:
            sent.append(os.kill(os.getpid(), getattr(signal, name)))
        return open_(path, mode, *more, **how)
    monkeypatch.setattr("builtins.open", opened)
    code = loop.main([*quick, "--out", str(tmp_path)])
    monkeypatch.setattr("builtins.open", open_)
    path = kill.folder_of(tmp_path)
    run, events = report.load(path)
    assert code == 130 and run["status"] == "interrupted" and [e["stage"] for e in events] == ["layers"]
    out = capsys.readouterr()
    assert f"python loop.py --resume {path}" in out.out and "interrupted" in out.err and signal.getsignal(getattr(signal, name)) == before


def test_a_second_signal_ends_the_process_at_once(folder, monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(PowerCut(code)))
    with pytest.raises(KeyboardInterrupt):
        folder._on_signal()
    with pytest.raises(PowerCut, match="130"):
        folder._on_signal()


def test_a_round_whose_numbers_break_is_rolled_back_with_its_cause(quick, tmp_path, monkeypatch, capsys):
    def broken_probe(*args, **how):                             # as logits that are nan would have it
        raise RuntimeError("3 of 6 frames have answers that are not finite")
    argv = [*quick, "--coeff", "0.1", "--epochs", "4", "--rounds", "2", "--lr", "1e12", "--out", str(tmp_path)]
    trust_run(argv, tmp_path, monkeypatch, "gate", lambda folder: monkeypatch.setattr(evalmfv, "evaluate", broken_probe))
    path = kill.folder_of(tmp_path)
    run, events = report.load(path)
    gates = [e["reasons"][0] for e in events if e["stage"] == "gate"]
    assert "3 steps in a row without a finite loss" in gates[0] and "not finite" in gates[1]
    assert run["status"] == "no round accepted" and not list((path / "rounds").iterdir()) and "no round was accepted" in capsys.readouterr().out


def test_malformed_inputs_end_with_a_sentence_and_no_damage(tmp_path):
    (tmp_path / "vignettes.jsonl").write_text("")
    for i in range(80):
        kind = malformed.KINDS[i % len(malformed.KINDS)]
        if kind not in (malformed.model, malformed.resume):     # those load a model: in the campaign
            outcome, wrong, text, argv = malformed.trial(random.Random(f"test/{i}"), kind, tmp_path / "case", 30, real=False)
            assert not wrong, (i, argv, outcome, wrong, text[-500:])


@pytest.mark.parametrize("content, message", [
    (b"", "0 prompts"), ("Wie geht es dir, K\xf6nig?\n".encode("latin-1") * 9, "line 1: not UTF-8 (byte 0xf6)"), (b"one\ntwo\0\n" * 9, "line 2: holds a NUL")])
def test_a_prompts_file_that_cannot_be_used_is_named_with_its_line(content, message, tmp_path, capsys):
    (tmp_path / "p.txt").write_bytes(content)
    assert loop.main(["--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "o")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "o").exists()


@pytest.mark.parametrize("line, message", [
    ('{"foundation": "care"}', "line 2: has no 'text'"), ('{"text": "", "foundation": "care"}', "line 2: text is ''"), ("{", "line 2"), ("[" * 9999, "line 2"),
    ('{"text": "a", "foundation": ["care"]}', "line 2: foundation"), ('{"text": "a", "foundation": "care", "label": {"care": 1}}', "line 2: label lacks")])
def test_a_vignette_that_cannot_be_used_is_named_with_its_line(line, message, tmp_path):
    (tmp_path / "v.jsonl").write_text(f'{{"text": "a\u2028b", "foundation": "care"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        evalmfv.load_vignettes(tmp_path / "v.jsonl")


@pytest.mark.parametrize("name, content, message", [
    ("contexts", [], "contexts.json: expected 1 or more texts, got 0"), ("contexts", ["a", ""], "contexts.json, entry 2"), ("contexts", {}, "expected a JSON list"),
    ("personas", {"authority": {"pos": ["a"]}}, "lacks neg, target, direction"), ("prompts", {"authority": {"train": ["a", "b"], "held_out": [1, 2]}}, "held_out, entry 1"),
    ("personas", {"authority": dict(pos=["a"], neg=["b"], target="care", direction=1, patterns=["("])}, "'(' of its patterns")])
def test_an_entry_of_the_data_that_cannot_be_used_is_named(name, content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "DATA", shutil.copytree(ROOT / "data", tmp_path / "data"))
    (loop.DATA / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(message)):
        loop.load_inputs(loop.LoopConfig())


@pytest.mark.parametrize("argv, message", [
    (["--reg", "nll", "--tau", "1"], "without a barrier"), (["--min-words", "99"], "--max-new-tokens 64"), (["--tau-scale", "nan"], "--tau-scale nan"), (["--model", ""], "--model is empty"),
    (["--steer-from", "0.5"], "from 0.5 to 0.0"), (["--tau", "1", "--tau-scale", "2"], "leave one out"), (["--pos", "a", "--neg", "a", "--target", "care", "--direction", "1"], "the same text"),
    (["--r", "999"], "more than the model's width 192"), (["--max-new-tokens", "2000"], "the model's 1024"), (["--think-tokens", "2000"], "the model's 1024"), (["--out", __file__], "a file, not a folder")])
def test_options_that_cannot_be_meant_are_refused_before_any_work(argv, message, tmp_path, capsys):
    try:
        code = loop.main(["--out", str(tmp_path), *argv])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_dropped_completions_are_told_by_rule_with_a_sample_and_an_option():
    def entry(rule, value, limit, text="ok"):
        return dict(text=text, verdict=dict(kept=not rule, rule=rule, value=value, limit=limit))
    told = loop.why_dropped([entry("", 0, 0), entry("loop", 0.7, 0.5, "no \x1b[31mno\u202e no"), entry("words", 0, 1, ""), entry("loop", 0.9, 0.5)])
    assert told == ('loop dropped 2, such as "no  [31mno  no" with 0.7 over a limit of 0.5 (--max-loop or --slack); '
                    'words dropped 1, such as "" with 0 under a limit of 1 (--min-words)')
    assert loop.why_dropped([entry("", 0, 0)]) == "" and set(loop.OPTION_OF) == {"words", "unfinished", "worst_window", "ppl_tail", "ngram", "loop", "pattern"}


def test_a_search_that_fails_tells_what_was_dropped_and_a_trait_that_does_not_move_is_said(finished, quick, tmp_path, capsys):
    assert loop.main([*quick, "--coeff", "0", "--max-window-nll", "1e-6", "--out", str(tmp_path)]) == 3
    reason = next(e for e in report.load(kill.folder_of(tmp_path))[1] if e["stage"] == "gate")["reasons"][0]
    assert "the lowest dose fails" in reason and "worst_window dropped 4, such as" in reason and "--max-window-nll or --slack" in reason
    run = loop.Run.__new__(loop.Run)                            # only what the closing table asks for
    rows = [e | dict(trait=0.01, trait_se=0.02) for e in finished[3] if e["stage"] == "row"]
    run.folder, run.base = type("Journal", (), dict(events=rows))(), rows[0]
    capsys.readouterr()
    loop.tally(run, 1.0)
    out = capsys.readouterr().out
    assert "did not move at any dose" in out and "no round was accepted" in out
    assert loop.has_moved(dict(trait=-0.5, trait_se=0.1)) and not loop.has_moved(dict(trait=0.01, trait_se=0.02))


def test_the_live_line_is_for_terminals_and_colour_for_those_who_want_it(monkeypatch, capsys):
    def lines(is_live, **environment):
        for name in ("NO_COLOR", "TERM"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: is_live, raising=False)
        screen, now = loop.Screen(), [0.0]
        monkeypatch.setattr(time, "time", lambda: screen.start + now[0])
        with screen.watch("heal", 3, "training, steps", 40) as tick:
            for _ in range(10):
                now[0] += 1.0
                tick()
        screen.say("gate", 3, "accepted", "green")
        monkeypatch.setattr(time, "time", clock)
        return capsys.readouterr().out
    clock = time.time
    live = lines(True)
    assert "\r    10 s  r3     heal       training, steps  10/40  1.0/s  30 s left" in live and "\x1b[32maccepted\x1b[0m" in live
    assert "\x1b" not in lines(True, NO_COLOR="1") and "\r" in lines(True, NO_COLOR="1")
    for plain in (lines(False), lines(True, TERM="dumb")):
        assert plain == "    10 s  r3     gate       accepted\n"
