"""Tests of the concept files, to be read beside them and in their order: heal, lora, steer, evalmfv, loop.

`pytest`: CPU, offline, small random models made in code (tests/common.py) and the embedded one. tests/ has
the tests of the rest, and of what the house promises of every file (tests/test_house.py).
"""
import contextlib
import copy
import json
import math
import random
import runpy
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
pytest_plugins = ["shared"]

import evalmfv                                                  # noqa: E402
import heal as heal_py                                          # noqa: E402
import loop                                                     # noqa: E402
import steer                                                    # noqa: E402
from common import (FAMILIES, FOUNDATIONS, HAVE_EXPERTS, PREFILL, PROMPTS, VIGNETTES, base_of,  # noqa: E402
                    echo_of, family_model, flat, heal_case, heal_run, ids_of, logits_of, logp_behind,
                    lora_case, meter_case, mfv_rows, noise, probe_tokenizer, random_head, rig, some_ids,
                    steer_pair, steer_vectors, step_numbers, tiny_model, tiny_tokenizer, update_of)
from heal import (AGGREGATES, HealConfig, Passes, Sample, aggregate, forward_kl, heal,      # noqa: E402
                  lr_factor, naive_losses, reverse_kl, split, token_losses)
from lora import attach                                         # noqa: E402
from steer import (Completion, Limits, choose, fit_vectors, generate,         # noqa: E402
                   judge, repeats, steered, token_nll)
from tools import folder as files, inputs, model as models, search, size                        # noqa: E402
from tools.files import read_tensors                            # noqa: E402
from tools.search import calibrate_limits                       # noqa: E402


# ==== heal.py ===============================================================================================

def heal_nll(model, stack, samples):
    """Nats per completion token."""
    found = Passes(model, samples, base_of(stack)).measured(list(range(len(samples))), 50)
    return torch.cat([nll for nll, _ in found.values()]).mean().item()


def random_logits(n=5, V=7, seed=0, dtype=torch.float64, size=3.0):
    return size * torch.randn(n, V, generator=torch.Generator().manual_seed(seed), dtype=dtype)     # [n, V]


def double_loop(logits, ref_logits):
    """KL(student || reference) at each position, number by number."""
    out = []
    for z, z0 in zip(logits.tolist(), ref_logits.tolist()):
        total, total0 = sum(map(math.exp, z)), sum(map(math.exp, z0))
        out.append(sum(math.exp(a) / total * math.log((math.exp(a) / total) / (math.exp(b) / total0))
                       for a, b in zip(z, z0)))
    return out


# ---- the barrier

def test_kl_equals_a_double_loop_and_torch_distributions_and_is_float32_under_bfloat16():
    p, q = random_logits(seed=0), random_logits(seed=1)
    naive = torch.tensor(double_loop(p, q), dtype=torch.float64)
    peer = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=p),
                                             torch.distributions.Categorical(logits=q))
    assert torch.allclose(reverse_kl(p, q), naive, atol=1e-12)
    assert torch.allclose(reverse_kl(p, q), peer, atol=1e-12)
    assert torch.allclose(forward_kl(q, p), peer, atol=1e-12)   # directions: forward is the swap
    assert not torch.allclose(forward_kl(p, q), peer, atol=1e-2)
    p = random_logits(4, 5000, dtype=torch.float32).bfloat16()
    q = (p.float() + random_logits(4, 5000, seed=1, dtype=torch.float32, size=0.05)).bfloat16()
    kl, exact = reverse_kl(p, q), reverse_kl(p.double(), q.double())
    assert kl.dtype == torch.float32 and (kl.double() - exact).abs().max() < 1e-6


@pytest.mark.parametrize("how", AGGREGATES)
def test_gradients_of_the_barrier(how):
    """Right in float64, finite where student and reference agree, exactly zero below tau."""
    p, q = random_logits().requires_grad_(), random_logits(seed=1)
    for divergence in (reverse_kl, forward_kl):
        assert torch.autograd.gradcheck(lambda x: aggregate(divergence(x, q), how), p)
    same = random_logits(dtype=torch.float32).requires_grad_()
    div = aggregate(reverse_kl(same, same.detach().clone()), how)
    div.backward()
    assert div.item() == 0 and same.grad.abs().max() < 1e-7     # nan fails this too
    div = aggregate(reverse_kl(p, q), how)
    for tau, is_zero in ((div.item() * 1.001, True), (div.item() * 0.999, False)):
        grad, = torch.autograd.grad(torch.relu(div - tau), p, retain_graph=True)
        assert torch.equal(grad, torch.zeros_like(grad)) == is_zero, (tau, grad)


def test_aggregates_are_ordered_and_agree_on_a_constant_and_rmse_sees_a_short_loop():
    rng = torch.Generator().manual_seed(0)
    for n in (1, 2, 7, 60):
        kl = torch.rand(n, generator=rng) ** 4
        values = {how: aggregate(kl, how).item() for how in AGGREGATES}
        assert values["mean"] <= values["rmse"] + 1e-7 and values["rmse"] <= values["max"] + 1e-7, values
        assert values["p95"] <= values["max"]
        for how in AGGREGATES:
            assert abs(aggregate(torch.full((n,), 0.3), how).item() - 0.3) < 1e-6, how
    kl = torch.zeros(60)
    kl[:4] = 5.7                                                # a four-token loop in a clean completion
    assert aggregate(kl, "mean") < 0.5 < aggregate(kl, "rmse")
    assert abs(aggregate(kl, "rmse").item() - 5.7 * (4 / 60) ** 0.5) < 1e-6


def test_the_demo_computes_its_table(capsys):
    demo = runpy.run_path(heal_py.__file__, run_name="__main__")
    printed = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    expected = []
    for logits in (demo["shift"], demo["loop"]):
        kl = sorted(double_loop(logits.double(), demo["base"].double()))
        at = 0.95 * (len(kl) - 1)
        low, high = kl[math.floor(at)], kl[math.ceil(at)]
        expected.append({"mean": sum(kl) / len(kl), "rmse": math.sqrt(sum(x * x for x in kl) / len(kl)),
                         "p95": low + (at - math.floor(at)) * (high - low), "max": kl[-1]})
    assert set(printed) == set(expected[0])
    for how, (shift, looped, ratio, *verdict) in printed.items():
        assert float(shift) == pytest.approx(expected[0][how], abs=6e-4), how
        assert float(looped) == pytest.approx(expected[1][how], abs=6e-4), how
        assert ("lets" in verdict) == (expected[1][how] < 0.5) and float(shift) < 0.5


# ---- the same without logits

@pytest.mark.parametrize("reg", ["kl_rev", "kl_fwd"])
@pytest.mark.parametrize("how, nll_weight", [("rmse", 1), ("rmse", 0), ("max", 1)])
def test_token_losses_equal_naive_autograd_in_float64(reg, how, nll_weight):
    h, h0, W, targets, b = random_head()
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
            D = aggregate(kl[:20], how)                         # the rest gets no gradient in KL
            values.append(torch.cat([nll, kl]))
            grads.append(torch.autograd.grad(nll_weight * nll.mean() + 5 * torch.relu(D - 0.1), x)[0])
        assert torch.allclose(*values, rtol=1e-10, atol=1e-12), (values[0] - values[1]).abs().max()
        assert (grads[0] - grads[1]).abs().max() <= 1e-10 * grads[1].abs().max() and grads[1].abs().max() > 0


# ---- from samples to losses

def test_losses_are_those_of_each_sample_run_alone_whatever_its_batch_and_padding():
    model, stack, samples = heal_case(torch.float64)
    order = [4, 0, 3, 2, 1, 5]
    nlls, kls = Passes(model, samples, base_of(stack)).losses(order)
    alone = {}
    for i, nll, kl in zip(order, nlls, kls, strict=True):
        ids, (logp, logq) = torch.tensor([samples[i].ids]), (None, None)                # [1, T], no padding
        logp = logits_of(model, ids)[0].log_softmax(-1)                                 # [T, V]
        with stack.gated(0, 0):
            logq = logits_of(model, ids)[0].log_softmax(-1)                             # [T, V]
        where = range(samples[i].n_prompt - 1, len(samples[i].ids) - 1)     # position t predicts token t + 1
        want = torch.stack([-logp[t, samples[i].ids[t + 1]] for t in where])
        assert torch.allclose(nll, want, atol=1e-10), (nll - want).abs().max()
        alone[i] = torch.stack([(logp[t].exp() * (logp[t] - logq[t])).sum() for t in where])
        assert torch.allclose(kl, alone[i], atol=1e-10), (kl - alone[i]).abs().max()
    for pass_tokens, pad_id in ((1, 0), (1000, 0), (40, 7)):
        found = Passes(model, samples, base_of(stack), pad_id=pad_id).measured(order, pass_tokens)
        assert list(found) == order
        for i, nll in zip(order, nlls):
            assert all(torch.allclose(*x, atol=1e-10) for x in zip(found[i], (nll, alone[i])))


def test_pieces_fit_the_budget_and_lose_nothing():
    model, stack, _ = heal_case()
    samples = [Sample([1] * n, 1, 0) for n in (9, 3, 3, 2, 40, 5)]
    passes = Passes(model, samples, base_of(stack))
    for budget in (1, 10, 27, 90, 1000):
        cut = passes.pieces([4, 0, 5, 1, 2, 3], budget)
        assert sum(cut, []) == [4, 0, 5, 1, 2, 3]
        assert all(len(p) == 1 or len(p) * max(len(samples[i].ids) for i in p) <= budget for p in cut)
    assert [len(p) for p in passes.pieces([4, 0, 5, 1, 2, 3], 10)] == [1, 1, 2, 2]


# ---- one round

def documented(model, stack, samples, tau, lam):
    """The loss of one step as heal's docstring has it, sample by sample."""
    total = 0
    for s in samples:
        (nll,), (kl,) = Passes(model, [s], base_of(stack)).losses([0])
        total = total + len(kl) * (nll.mean() + lam * torch.relu(kl.square().mean().sqrt() - tau))
    return total / sum(len(s.answer) for s in samples)


def test_the_loss_is_the_documented_one():
    """Its gradient is what one step reports as its norm."""
    model, stack, samples = heal_case(torch.float64)
    tau, lam = 0.2, 5.0 * 3 ** 0.5                              # round 2: lam * (1 + 2) ** 0.5
    loss = documented(model, stack, samples, tau, lam) + 0.3 * size.spectral(stack)
    expected = flat(torch.autograd.grad(loss, stack.parameters())).norm().item()
    record = heal_run(model, stack, samples, tau=tau, rnd=2, lam=5.0, lam_round_pow=0.5, heal_batch=6,
                      pass_tokens=30, epochs=1, spectral=0.3)
    assert abs(record["steps"][0]["gnorm"] - expected) < 1e-4 * expected            # reported before clipping
    assert abs(record["lam_eff"] - lam) < 1e-12 and 0 < record["steps"][0]["fired"] < 1


def test_two_steps_are_adamw_on_the_clipped_gradient():
    model, stack, samples = heal_case(torch.float64)
    record = heal_run(model, stack, samples, tau=0.05, lam=30.0, lr=1e-2, heal_batch=6, epochs=2)
    norms = [step["gnorm"] for step in record["steps"]]
    assert min(norms) > 1 and max(norms) > 1.05 * min(norms)    # else the clip could not be seen
    healed, (model, stack, samples) = flat(stack.parameters()), heal_case(torch.float64)
    optimizer = torch.optim.AdamW(stack.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(2):                                          # of two steps, both have the full rate
        optimizer.zero_grad()
        documented(model, stack, samples, 0.05, 30.0).backward()
        torch.nn.utils.clip_grad_norm_(stack.parameters(), 1.0)
        optimizer.step()
    assert torch.allclose(healed, flat(stack.parameters()), atol=1e-5)


def test_the_gradient_of_a_later_round_equals_finite_differences():
    """float64 base, float32 adapters: every perturbed value is a float32, so the step is measured."""
    model, stack, samples = heal_case(torch.float64, history=2)
    params = stack.parameters()

    def loss():
        return documented(model, stack, samples, 0.05, 5.0)
    loss().backward()
    rng = torch.Generator().manual_seed(0)
    for p in params[::3]:
        i = int(torch.randint(p.numel(), (1,), generator=rng))
        values, start, ends = p.data.view(-1), p.data.view(-1)[i].item(), []
        for sign in (-1, 1):
            values[i] = start + sign * 1e-3
            with torch.no_grad():
                ends.append((values[i].item(), loss().item()))
        values[i] = start
        slope, grad = (ends[1][1] - ends[0][1]) / (ends[1][0] - ends[0][0]), p.grad.view(-1)[i].item()
        assert abs(slope - grad) < 1e-4 * abs(slope) + 1e-6, (slope, grad)        # the step's own error: 1e-6


def test_passes_of_any_size_add_up_to_one_step():
    rows, weights = [], []
    for pass_tokens in (1, 40, 1000):
        model, stack, samples = heal_case(torch.float64, history=1)
        record = heal_run(model, stack, samples, tau=0.05, lam=3.0, heal_batch=6, pass_tokens=pass_tokens,
                          epochs=3, spectral=0.1)
        rows.append(step_numbers(record))
        weights.append(flat(stack.parameters()))
    for other_rows, other in zip(rows[1:], weights[1:]):
        assert torch.allclose(rows[0], other_rows, rtol=1e-4)
        assert torch.allclose(weights[0], other, atol=1e-5)     # float32 weights after three Adam steps


@pytest.mark.parametrize("reg, how, tau", [("kl_rev", "rmse", 0.2), ("kl_rev", "p95", 0.1),
                                           ("kl_fwd", "rmse", 0.1), ("nll", "mean", 0.0)])
def test_shortcuts_change_no_number_of_a_round(reg, how, tau):
    runs = []
    for fast in (True, False):
        model, stack, samples = heal_case(history=1)
        record = heal_run(model, stack, samples, tau=tau, reg=reg, kl_agg=how, heal_batch=2, epochs=3,
                          fast=fast)
        assert record["shortcuts"] is fast
        runs.append(step_numbers(record))
    assert len(runs[0]) == 9 and torch.allclose(*runs, rtol=1e-5, atol=1e-5), (runs[0] - runs[1]).abs().max()


def test_heal_leaves_base_history_and_random_state_alone_and_repeats_itself():
    ends = []
    for seed in (0, 0, 1):
        model, stack, samples = heal_case(history=1)
        before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
        folded = [t for lora in stack.layers.values() for pair in lora.rounds for t in pair[:2]]
        frozen, adapters = [t.clone() for t in folded], flat(stack.parameters())
        heal_run(model, stack, samples, heal_batch=2, epochs=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(torch.equal(a, b) for a, b in zip(frozen, folded))
        ends.append(flat(stack.parameters()))
        assert not torch.equal(adapters, ends[-1])
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_heal_lowers_nll_and_a_tight_barrier_keeps_D_lower_than_nll_alone():
    ends = {}
    for reg in ("nll", "kl_rev"):
        model, stack, samples = heal_case()
        stack.drop()                                            # the round starts at the base
        before = heal_nll(model, stack, samples)
        record = heal_run(model, stack, samples, tau=0.02, reg=reg, lam=30.0, lr=5e-3, epochs=10)
        found = Passes(model, samples, base_of(stack)).measured(list(range(len(samples))), 2048)
        div = [aggregate(kl, "rmse").item() for _, kl in found.values()]
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
    assert record["n_train"] == len(train)
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
    model.model.register_forward_pre_hook(count, with_kwargs=True)
    record = heal_run(model, stack, samples, heal_batch=4, epochs=3, fast=fast)
    steps = [(s["step"], s["epoch"]) for s in record["steps"]]
    assert steps == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    lengths = [len(s.ids) for s in samples]                     # 4 + 2 samples: a short last batch is a step
    assert sorted(seen[False]) == sorted(3 * lengths + fast * 2 * [lengths[0]])     # + two probes of the head
    assert sorted(seen[True]) == sorted((lengths + 2 * [lengths[0]]) if fast else 3 * lengths)


def test_the_learning_rate_warms_up_then_falls_and_no_step_is_idle():
    factors = [lr_factor(step, 40) for step in range(40)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.01 and abs(lr_factor(22, 40) - 0.5) < 1e-12
    assert lr_factor(0, 1) == 1


def test_heal_warns_of_a_barrier_that_never_or_always_fired():
    model, stack, samples = heal_case()
    for tau, message in ((1e3, "never fired"), (1e-9, "always fired")):
        with pytest.warns(UserWarning, match=message):
            cfg = HealConfig(lr=1e-3, tau=tau, epochs=1)
            record = heal(model, stack.parameters(), samples, base_of(stack), cfg)
        assert message in record["warning"] and record["fired_share"] == (tau < 1)
    cfg = HealConfig(lr=1e-3, tau=1e3, epochs=1, reg="nll")     # no barrier, but D is measured
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = heal(model, stack.parameters(), samples, base_of(stack), cfg)
    assert record["warning"] is None and record["lam_eff"] == 0 and record["steps"][0]["div"] > 0


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


# ==== lora.py ===============================================================================================

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_at_zero_are_the_base_bit_for_bit_whatever_was_folded(dtype):
    ids = some_ids()
    model = tiny_model(tiny_tokenizer(), dtype=dtype)
    base, weights = logits_of(model, ids), copy.deepcopy(model.state_dict())
    stack = attach(model, r=4, alpha=8, layers=[1, 2])
    assert torch.equal(logits_of(model, ids), base)                         # attaching alone changes nothing
    noise(stack, 0)
    stack.fold()
    noise(stack, 1)
    assert not torch.equal(logits_of(model, ids), base)
    for history in (0, [0.0]):
        with stack.gated(history, 0):
            assert torch.equal(logits_of(model, ids), base)
    now = model.state_dict()
    assert now.keys() == weights.keys() and all(torch.equal(now[k], weights[k]) for k in weights)
    model(input_ids=ids).logits.float().square().mean().backward()
    assert all(p.grad is None for p in model.parameters())
    for p in stack.parameters():                                            # float32 whatever the base is
        assert p.dtype == p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0
    assert all(A.dtype == B.dtype == torch.float32 for l in stack.layers.values() for A, B, _ in l.rounds)
    stack.remove()
    assert torch.equal(logits_of(model, ids), base)


def test_open_gates_equal_the_weights_plus_the_sum_of_scaled_products():
    model, stack = lora_case(torch.float64)
    plain, ids = copy.deepcopy(model), some_ids()
    for hooked in plain.modules():
        hooked._forward_hooks.clear()
    total = {}
    for rnd, gate in enumerate([0.5, 0.25, 1.0]):                           # two folded ones and the current
        noise(stack, rnd)
        for name, delta in update_of(stack).items():
            total[name] = total.get(name, 0) + gate * delta
        if rnd < 2:
            stack.fold()
    for name, delta in total.items():
        plain.get_submodule(name).weight.data += delta
    stack.gates([0.5, 0.25], 1.0)
    assert torch.allclose(logits_of(model, ids), logits_of(plain, ids), atol=1e-6)  # folded B is float32
    assert len(total) == 14 and "model.layers.1.mlp.down_proj" in total     # 7 Linears in each of 2 blocks


def test_fold_keeps_the_function_and_drop_takes_the_round_back_to_its_start():
    model, stack = lora_case(rounds=1)
    ids, start, before = some_ids(), flat(stack.parameters()), logits_of(model, some_ids())
    noise(stack, 5)
    open_round, parameters = logits_of(model, ids), stack.parameters()
    assert not torch.equal(open_round, before)
    stack.drop()
    assert torch.equal(logits_of(model, ids), before) and torch.equal(start, flat(stack.parameters()))
    noise(stack, 5)
    stack.fold()
    assert torch.allclose(logits_of(model, ids), open_round, atol=1e-4)     # float32, logits of size ten
    assert stack.n_rounds == 2 and not any(l.B.any() for l in stack.layers.values())   # starts as no change
    assert all(a is b for a, b in zip(parameters, stack.parameters()))
    with stack.gated(0, 1):
        base = logits_of(model, ids)
    with stack.gated(0, 0):
        assert torch.equal(logits_of(model, ids), base)


def test_unfold_takes_the_last_round_off_trained_or_loaded_and_refuses_to_lose_another():
    model, stack = lora_case(rounds=1)
    ids, params, start = some_ids(), stack.parameters(), flat(stack.parameters())
    before = logits_of(model, ids)
    tensors = lora_case(r=5, rounds=2)[1].tensors([1])                      # another rank, another round
    for add in (lambda: (noise(stack, 5), stack.fold()), lambda: stack.load_tensors(tensors)):
        add()
        assert not torch.equal(logits_of(model, ids), before)
        stack.unfold()
        assert torch.equal(logits_of(model, ids), before) and stack.n_rounds == 1
        assert all(a is b for a, b in zip(params, stack.parameters())) and torch.equal(flat(params), start)
    noise(stack, 3)
    with pytest.raises(RuntimeError, match="not trained yet"):
        stack.unfold()
    stack.drop()
    stack.unfold()
    with stack.gated(0, 0):
        base = logits_of(model, ids)
    assert torch.equal(logits_of(model, ids), base)
    with pytest.raises(RuntimeError, match="with 0 folded rounds"):
        stack.unfold()


def test_A_depends_on_seed_round_and_module_and_leaves_the_global_generator_alone():
    model = tiny_model(tiny_tokenizer())
    expected = torch.get_rng_state()
    stack = attach(model, r=4, alpha=8, layers=[1, 2])
    assert torch.equal(torch.get_rng_state(), expected)
    first = [l.A.detach().clone() for l in stack.layers.values()]
    square = [A for A in first if A.shape == first[0].shape]
    assert not any(torch.equal(square[0], A) for A in square[1:])
    noise(stack, 0)
    stack.fold()
    assert not torch.equal(first[0], next(iter(stack.layers.values())).A)
    again = attach(tiny_model(tiny_tokenizer()), r=4, alpha=8, layers=[1, 2])
    other = attach(tiny_model(tiny_tokenizer()), r=4, alpha=8, layers=[1, 2], seed=1)
    assert torch.equal(first[0], again.parameters()[0]) and not torch.equal(first[0], other.parameters()[0])
    assert 0.9 / 32 ** 0.5 < first[0].abs().max() <= 1 / 32 ** 0.5  # kaiming-uniform: U(+-1 / sqrt(d_in))


def test_gated_restores_the_gates_after_an_exception_and_keeps_rounds_folded_inside():
    model, stack = lora_case(rounds=2)
    stack.gates([0.5, 0.0], 1.0)
    before = logits_of(model, some_ids())
    with pytest.raises(KeyError):
        with stack.gated(1, 0):
            raise KeyError("stop")
    assert torch.equal(logits_of(model, some_ids()), before)
    with stack.gated(1, 1):
        noise(stack, 7)
        stack.fold()
    assert {l.history for l in stack.layers.values()} == {(0.5, 0.0, 1.0)}
    with stack.gated(1, 1):
        stack.unfold()
    assert {l.history for l in stack.layers.values()} == {(0.5, 0.0)}


def test_tensors_come_back_bit_for_bit_in_any_order_and_the_next_round_starts_the_same():
    model, stack = lora_case(rounds=3)
    ids, tensors = some_ids(), stack.tensors()
    fresh, loaded = lora_case()
    loaded.load_tensors(tensors)
    assert loaded.n_rounds == 3 and torch.equal(logits_of(fresh, ids), logits_of(model, ids))
    for a, b in zip(stack.layers.values(), loaded.layers.values()):
        assert torch.equal(a.A, b.A)
        for (A, B, scale), (A2, B2, scale2) in zip(a.rounds, b.rounds):
            assert torch.equal(A, A2) and torch.equal(scale * B, scale2 * B2)
    A, B = (tensors[f"model.layers.1.self_attn.q_proj.1.{x}"] for x in "AB")
    old = stack.layers["model.layers.1.self_attn.q_proj"].rounds[1]
    assert torch.equal(B @ A, old[2] * old[1] @ old[0]) and len(tensors) == 14 * 3 * 2  # the scale is in B
    stack.gates([0.2, 0.5, 0.9])
    expected, (model, other) = logits_of(model, ids), lora_case()
    for k in (2, 0, 1):
        other.load_tensors(stack.tensors([k]))
    other.gates([0.9, 0.2, 0.5])                                            # gates belong to rounds
    assert torch.allclose(logits_of(model, ids), expected, atol=1e-4)
    other.gates([0.2, 0.5, 0.9])
    assert not torch.allclose(logits_of(model, ids), expected, atol=1e-2)
    stack.gates()
    stack.unfold(), loaded.unfold()                                         # scale 2: exact in the file too
    assert torch.equal(flat(stack.parameters()), flat(loaded.parameters()))


def test_targets_choose_linears_by_the_end_of_their_name():
    _, stack = lora_case(targets=["q_proj", "mlp.up_proj"])
    chosen = [f"model.layers.{i}.{name}" for i in (1, 2) for name in ("mlp.up_proj", "self_attn.q_proj")]
    assert sorted(stack.layers) == chosen
    with pytest.raises(ValueError, match=r"\['proj'\] match no nn.Linear.*'q_proj'"):
        lora_case(targets=["q_proj", "proj"])


def test_lora_and_its_gradient_equal_pefts_and_heals_docstring_heals_a_peft_model():
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -r .ci/requirements.txt")
    model, stack = lora_case()
    noise(stack, 0, 0.1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(stack.layers), lora_dropout=0.0)
    theirs = peft.get_peft_model(tiny_model(tiny_tokenizer()), config).eval()
    params = []
    for name, l in stack.layers.items():
        module = theirs.get_submodule(f"base_model.model.{name}")
        for p, q in ((module.lora_A["default"].weight, l.A), (module.lora_B["default"].weight, l.B)):
            p.data.copy_(q.data)
            params.append(p)
    ids, found = some_ids(), []
    for m, ps in ((model, stack.parameters()), (theirs, params)):
        logits = m(input_ids=ids).logits
        found.append((logits, *torch.autograd.grad(logits.log_softmax(-1)[..., 7].mean(), list(ps))))
    assert max(g.abs().max() for g in found[0][1:]) > 1e-3
    assert all(torch.allclose(ours, peers, atol=1e-5) for ours, peers in zip(*found))

    _, _, samples = heal_case()
    pairs_of_ids = [(s.ids[:s.n_prompt], s.answer) for s in samples]
    code = textwrap.dedent(heal_py.__doc__.split("for example:\n\n")[1].split("\n\n")[0])
    names = dict(vars(heal_py), model=theirs, pairs_of_ids=pairs_of_ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, names)
        ours = heal(model, stack.parameters(), samples, base_of(stack), HealConfig(lr=1e-4, tau=0.5))
    for mine, peers in zip(ours["steps"], names["record"]["steps"], strict=True):
        for key in ("nll", "div", "gnorm"):
            assert mine[key] == pytest.approx(peers[key], abs=1e-5), (key, mine, peers)
    assert ours["val_nll_after"] == pytest.approx(names["record"]["val_nll_after"], abs=1e-5)
    assert ours["shortcuts"] and ours["nll_last"] < ours["nll_first"] and ours["steps"][0]["div"] > 0
    assert torch.allclose(flat(stack.parameters()), flat(params), atol=1e-5)


# ==== steer.py ==============================================================================================

CLEAN = ("No company owner may make me hurt anyone. I would call for help, write down what happened on the "
         "ship, and tell every passenger the truth before the next storm reaches us tonight.")


def completion(text, ids):
    return Completion(prompt=0, prompt_ids=[1], ids=list(ids), coeff=0.0, finished=True, text=text)


def verdict_on(text, nll=None, ids=None, **kw):
    ids = ids if ids is not None else [text.split().index(word) for word in text.split()]  # one id per word
    nll = torch.full((len(ids),), 0.3) if nll is None else nll
    return judge([completion(text, ids)], [nll], Limits(worst_window=2.0, loop=0.6), **kw)[0]


# ---- the sampler

def test_choose_equals_the_filters_of_hf_at_every_u():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    logits = 3 * torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    scores = TemperatureLogitsWarper(1.3)(None, logits)
    scores = TopPLogitsWarper(0.9)(None, TopKLogitsWarper(10)(None, scores))
    grid = torch.linspace(0, 1, 2001)[:-1] + 2.5e-4                         # every token with p > 5e-4 is hit
    how = dict(temperature=1.3, top_p=0.9, top_k=10)
    for row in range(50):
        share = torch.bincount(choose(logits[row].expand(2000, -1), grid, **how), minlength=40) / 2000
        assert (share - scores[row].softmax(-1)).abs().max() < 1.1e-3
        ends = choose(logits[row].expand(2, -1), torch.tensor([0.0, 1 - 2 ** -24]), **how)
        kept = scores[row].isfinite().nonzero()[:, 0]
        assert ends.tolist() == [scores[row].argmax(), kept[scores[row][kept].argmin()]]


def test_greedy_decoding_equals_hf_generate_with_and_without_the_hook():
    model, tok = steer_pair(torch.float64)
    vectors, said = steer_vectors(model), []
    for coeff in (0.0, 0.75):
        ours = generate(model, tok, PROMPTS, vectors=vectors, coeffs=[coeff] * 6, greedy=True,
                        max_new_tokens=20)
        said.append([c.ids for c in ours])
        for prompt, c in zip(PROMPTS, ours):
            ids = torch.tensor([ids_of(tok, prompt)])
            with steered(model, vectors, coeff):
                hf = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                    max_new_tokens=20)[0]
            assert c.prompt_ids + c.ids == hf.tolist()
    assert said[0] != said[1]


@pytest.mark.parametrize("greedy", [True, False])
def test_many_prompts_at_many_doses_are_one_at_a_time_exactly_though_rows_end_early(greedy):
    model, tok = steer_pair(torch.float64)
    model.generation_config.eos_token_id = list(range(6, 40))                # rows end at different steps
    doses = [0.0, 0.25, 0.5, 1.0]
    prompts, coeffs, state = PROMPTS * 4, [c for c in doses for _ in PROMPTS], torch.get_rng_state()
    kw = dict(vectors=steer_vectors(model), greedy=greedy, max_new_tokens=20)
    many = generate(model, tok, prompts, coeffs=coeffs, n_draws=6, seed=5, **kw)
    assert len({len(c.ids) for c in many}) > 4 and len({tuple(c.ids) for c in many}) > 12
    assert torch.equal(torch.get_rng_state(), state)
    assert greedy == (generate(model, tok, prompts, coeffs=coeffs, n_draws=6, seed=6, **kw) == many)
    for k, coeff in enumerate(doses):                           # a dose alone draws what it drew in company
        alone = generate(model, tok, PROMPTS, coeffs=[coeff] * 6, batch_size=1, seed=5, **kw)
        assert [c.ids for c in alone] == [c.ids for c in many[6 * k:6 * k + 6]]


# ---- the hook

def test_coeff_zero_is_the_base_bit_for_bit_and_rows_have_their_own_dose():
    model, tok = steer_pair()
    ids, vectors = torch.tensor([ids_of(tok, "Do you love me?")] * 3), steer_vectors(model)
    base = model(ids).logits
    with steered(model, vectors, 0.0):
        assert torch.equal(model(ids).logits, base)
        assert not any(block._forward_hooks for block in steer.blocks(model))
    doses = [0.0, 0.5, 1.0]
    with steered(model, vectors, torch.tensor(doses)):
        mixed = model(ids).logits
    assert torch.equal(mixed[0], base[0])
    for row in (1, 2):
        with steered(model, vectors, doses[row]):
            assert torch.equal(mixed[row], model(ids).logits[row])
            n_hooks = sum(len(block._forward_hooks) for block in steer.blocks(model))
            assert n_hooks == len(vectors)


@pytest.mark.parametrize("dtype, is_tuple, atol", [(torch.float64, False, 1e-6), (torch.bfloat16, True, 0.3)])
def test_steered_adds_coeff_times_v_after_the_block_at_every_position(dtype, is_tuple, atol):
    (model, tok), seen = steer_pair(dtype), []
    ids, v, blocks = torch.tensor([ids_of(tok, "Hi")]), steer_vectors(model)[1], steer.blocks(model)
    if is_tuple:                                                # as older blocks return
        blocks[1].register_forward_hook(lambda block, args, out: (out, "kv"))

    def look(block, args):                                      # at what the next one gets
        seen.append(args[0] if is_tuple else (args[0],))
        return (seen[-1][0], *args[1:])
    blocks[2].register_forward_pre_hook(look)
    model(ids)
    with steered(model, {1: v}, 0.5):
        model(ids)
    (base, *_), (h, *rest) = seen
    assert h.dtype == dtype and rest == ["kv"] * is_tuple
    assert torch.allclose((h - base).double(), (0.5 * v).double().expand_as(h), atol=atol)


# ---- the other passes over the model

def test_fit_vectors_equals_one_context_at_a_time_and_hidden_states():
    model, tok = steer_pair(torch.float64)
    pos, neg, last = ["You are kind.", "You love everyone you meet."], ["You are cold."], []
    steer.blocks(model)[3].register_forward_hook(lambda block, args, out: last.append(out[0, -1]))
    got = fit_vectors(model, tok, pos, neg, PROMPTS, [0, 1, 2, 3], batch_size=4)
    want = dict.fromkeys(got, 0)
    for i, context in enumerate(PROMPTS):
        for sign, side in ((1, pos), (-1, neg)):
            ids = torch.tensor([ids_of(tok, context, side[i % len(side)])])
            states = model(ids, output_hidden_states=True).hidden_states
            for layer in got:                                   # the last block's, before the final norm
                h = last[-1] if layer == 3 else states[layer + 1][0, -1]
                want[layer] = want[layer] + sign * h / 6
    for layer, v in got.items():
        assert v.dtype == torch.float32 and torch.allclose(v.double(), want[layer], atol=1e-5), layer
    with pytest.raises(ValueError, match="vector of layer 1 is zero"):
        fit_vectors(model, tok, "kind", "kind", ["Hi"], [1])


def test_token_nll_equals_a_full_forward_one_at_a_time():
    model, tok = steer_pair()
    answers = generate(model, tok, PROMPTS, max_new_tokens=15, top_k=0, top_p=1.0)
    for batch_size in (1, 4, 32):
        for c, nll in zip(answers, token_nll(model, answers, batch_size=batch_size)):
            logp = logits_of(model, torch.tensor([c.prompt_ids + c.ids]))[0].log_softmax(-1)
            want = [-logp[len(c.prompt_ids) + j - 1, token].item() for j, token in enumerate(c.ids)]
            assert nll.dtype == torch.float32 and torch.allclose(nll, torch.tensor(want), atol=1e-4)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM", "Qwen3_5ForConditionalGeneration",
                                  "Mamba2ForCausalLM"])
def test_token_nll_reads_a_prompt_once_for_all_its_answers(name):
    tok = tiny_tokenizer()
    model, n_read = family_model(name, tok), []
    answers = generate(model, tok, PROMPTS[:3] * 4, max_new_tokens=9, top_k=0, top_p=1.0)
    want = [token_nll(model, [c])[0] for c in answers]
    model.get_input_embeddings().register_forward_pre_hook(lambda table, args: n_read.append(args[0].shape))
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(want, token_nll(model, answers), strict=True))
    assert [rows for rows, _ in n_read] == [3, 12]


# ---- the filter

def test_mixture_nll_is_the_naive_formula_and_at_most_log_2_above_the_better_prompt():
    rng = torch.Generator().manual_seed(0)
    bare, prompted = ([6 * torch.rand(n, generator=rng) for n in (5, 0, 3)] for _ in range(2))
    for a, b, nll in zip(bare, prompted, steer.mixture_nll(bare, prompted)):
        want = [-math.log((math.exp(-x) + math.exp(-y)) / 2) for x, y in zip(a.tolist(), b.tolist())]
        assert nll.tolist() == pytest.approx(want)
        assert (nll <= torch.minimum(a, b) + math.log(2) + 1e-9).all()
    far = steer.mixture_nll([torch.tensor([2000.0])], [torch.tensor([1900.0])])[0]
    assert far.item() == pytest.approx(1900 + math.log(2))              # p would be 0


def test_clean_and_short_answers_pass_and_loops_of_low_nll_are_dropped():
    for text in (CLEAN, "Yes.", "Yes, I do.", "No", "No, no, no.", "no no no no no no", "Knock, knock."):
        assert verdict_on(text).rule == "" and verdict_on(text).kept, text
    for text in ("love " * 40, "love " * 15, "love you " * 25, "I am here and I am " * 8,
                 CLEAN + " care" * 30, "I said so " + "a" * 60, "ha" * 50,
                 "愛は心に満ちて人を救うものである" * 8):
        verdict = verdict_on(text, ids=range(len(text.split())))        # distinct ids: the text shows it
        assert not verdict.kept and verdict.rule == "loop" and verdict.value > verdict.limit, verdict


def test_repeats_equals_a_naive_double_loop():
    rng = random.Random(1)
    for n, window in ((1, 8), (2, 6), (4, 32)):
        for length in (0, 1, 3, 7, 40):
            items = [rng.randrange(5) for _ in range(length)]
            grams = [tuple(items[i:i + n]) for i in range(length - n + 1)]
            again = [grams[i] in grams[max(0, i - window):i] for i in range(len(grams))]
            again += [False] * (window // 2 - len(again))
            w = min(window, len(again))
            want = max(sum(again[i:i + w]) / w for i in range(len(again) - w + 1))
            assert repeats(items, n, window) == pytest.approx(want, abs=1e-6)
    assert repeats("abcdefgh" * 3, 1, 8) == 1 and repeats("abcdefghi" * 3, 1, 8) == 0       # 8 back, not 9


def test_a_broken_stretch_a_pattern_and_no_words_are_rules_of_their_own():
    for at in (slice(-8, None), slice(40, 48)):
        nll = torch.full((len(CLEAN.split()) * 4,), 0.3)
        nll[at] = 4.0
        verdict = verdict_on(CLEAN, nll, ids=range(len(nll)))
        assert (verdict.rule, verdict.limit) == ("worst_window", 2.0) and verdict.value == pytest.approx(4.0)
        assert nll.mean() < 2.0                                         # the mean passes it
    patterns = [r"\bas an ai\b", r"\bI cannot help\b"]
    verdict = verdict_on("Well, As An AI I have no feelings.", patterns=patterns)
    assert (verdict.kept, verdict.rule, verdict.match) == (False, "pattern", "As An AI")
    assert verdict_on("She works as an aid worker.", patterns=patterns).kept
    assert verdict_on("", ids=[2]).rule == "words" and verdict_on("  \n", ids=[5, 2]).rule == "words"


def test_limits_keep_95_of_100_of_the_bases_own_answers_together(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(200, 2, generator=rng, dtype=torch.float64)
    base = [dict(worst_window=a, loop=0.3 * b) for a, b in x.tolist()]
    slack = calibrate_limits(base)
    monkeypatch.setattr(search, "SLACK", 0.0)
    bare = calibrate_limits(base)
    kept = sum(r["worst_window"] <= bare.worst_window and r["loop"] <= bare.loop for r in base)
    assert 190 <= kept <= 195, kept
    assert slack.worst_window == pytest.approx(1.2 * bare.worst_window)
    assert slack.loop == pytest.approx(bare.loop + 0.2 * (1 - bare.loop))       # 0 leaves room, 1 is no limit


def test_the_demo_prints_base_and_steered_without_control_characters(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["steer.py", "Do you love\x1b humanity?"])
    runpy.run_path(steer.__file__, run_name="__main__")
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [line.split("|")[0].strip() for line in lines] == ["base", "steered"]
    assert lines[0][9:] != lines[1][9:] and out.replace("\n", "").isprintable()


# ==== evalmfv.py ============================================================================================

SCHEMA = """This is wrong because:
  {
    "properties": {
      "violation": {
        "enum": [
%s        ]
      }
    }
  }"""
OPTIONS = ['care", # harm or unkindness, causing pain to another',
           'fairness", # cheating or reducing equality',
           'loyalty", # betrayal of a group',
           'authority", # subversion or lack of respect for tradition',
           'sanctity", # purity, degrading or disgusting acts',
           'liberty", # bullying or dominating',
           'social", # weird or unusual behaviour, but not morally wrong']


# ---- the probe, against the original's definition

@torch.no_grad()
def naive_frame(model, tok, text, reverse, n_think, by_token=False, front=()):
    """One frame as the original's definition has it, every forward from scratch: case, logp [K], nll."""
    options = "".join(f'          "{x}\n' for x in (OPTIONS[::-1] if reverse else OPTIONS))
    prompt = f"<|bos|><|user|>{text}\n\n{SCHEMA % options}<|end|><|assistant|><think>\n"
    prompt, suffix, prefill = (tok(x, add_special_tokens=False)["input_ids"] for x in (
        prompt, "</think><|end|><|bos|><|user|>Just answer<|end|><|assistant|>", "".join(PREFILL)))
    prompt = [*front, *prompt]
    choices = [tok.convert_tokens_to_ids(f) for f in FOUNDATIONS]
    thought, logps = [], []
    for _ in range(n_think):
        logits = model(input_ids=torch.tensor([prompt + thought])).logits[0, -1]                # [V]
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
    whole = torch.tensor([prompt + thought[:-1] + suffix + prefill])                            # [1, T]
    seen = torch.ones(whole.shape[1], whole.shape[1], dtype=torch.bool).tril()                  # [T, T]
    if by_token:                        # from after the think; one column longer than it
        fed = len(prompt) + n_think - 1
        seen[fed:, :fed + 1] &= torch.tensor(prompt + thought) != tok.pad_token_id
    mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
    logits = model(input_ids=whole, attention_mask=mask[None, None] if by_token else None).logits
    logp = logits[0, -len(prefill) - 1:].log_softmax(-1)                                        # [J + 1, V]
    return "forced", logp[-1][choices], -logp[range(len(prefill)), prefill].mean()


def compare(out, model, tok, rows, n_think, **kw):
    nlls = []
    for i, row in enumerate(rows):
        frames = [naive_frame(model, tok, row["text"], reverse, n_think, **kw) for reverse in (False, True)]
        assert out["case"][i] == [case for case, _, _ in frames]
        masses = [0.0 if case == "closed" else logp.exp().sum().item() for case, logp, _ in frames]
        assert out["mass"][i] == pytest.approx(masses, abs=1e-10)
        assert (i in out["scored"]) == ("closed" not in out["case"][i])
        if i in out["scored"]:
            score = (frames[0][1] + frames[1][1]) / 2                       # scores are in the tens
            assert (out["score"][i] - score).abs().max() < 1e-9, (i, out["case"][i])
            assert (out["p"][i] - score.softmax(-1)).abs().max() < 1e-10, (i, out["case"][i])
            nlls.append((frames[0][2] + frames[1][2]).item() / 2)
    assert out["prefill_nll"] == pytest.approx(sum(nlls) / len(nlls), abs=1e-9)


@pytest.mark.parametrize("n_think", [1, 37])
def test_the_probe_equals_one_sequence_at_a_time_in_every_case(n_think):
    tok, rows = probe_tokenizer(), mfv_rows(VIGNETTES[:4])
    model = rig(tiny_model(tok, seed=19, dtype=torch.float64, layers=2), tok)
    out = evalmfv.evaluate(model, tok, rows, think_tokens=n_think, batch_size=5)
    compare(out, model, tok, rows, n_think)
    found = out["n_natural"], out["n_forced"], out["n_closed"]
    assert sum(found) == 8 and (found == (0, 8, 0) if n_think == 1 else min(found) > 0), found
    if n_think > 1:                                             # closed: a zero in the coherence, and no nan
        assert out["n_unscored"] == 4 - len(out["scored"]) > 0
        assert out["coherence"] == pytest.approx(sum(sum(m) for m in out["mass"]) / 8)


def test_the_probe_sees_system_and_hooks_and_leaves_tokenizer_model_and_random_state_alone():
    tok = probe_tokenizer()
    tok.pad_token, tok.padding_side = None, "right"
    model = tiny_model(tok)
    model.generation_config.eos_token_id = None                 # nothing to suppress then
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    plain = evalmfv.evaluate(model, tok, mfv_rows(), think_tokens=4)
    told = evalmfv.evaluate(model, tok, mfv_rows(), think_tokens=4, system="Obey.")
    handle = model.model.norm.register_forward_hook(lambda module, args, y: y + torch.arange(32) % 3)
    hooked = evalmfv.evaluate(model, tok, mfv_rows(), think_tokens=4)
    handle.remove()
    assert min((out["p"] - plain["p"]).abs().max() for out in (told, hooked)) > 1e-3
    assert torch.equal(plain["p"], evalmfv.evaluate(model, tok, mfv_rows(), think_tokens=4)["p"])
    assert tok.pad_token is None and tok.padding_side == "right" and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    json.dumps({k: v for k, v in plain.items() if k not in ("p", "score")}, allow_nan=False)


def test_an_answer_is_found_however_the_model_spells_the_prefill():
    tok = probe_tokenizer()
    prefill = tok("".join(PREFILL))["input_ids"]
    bytewise = [t for c in 'This is wrong because {"violation": "' for t in tok(c)["input_ids"]]
    care, pad, x = tok.convert_tokens_to_ids("care"), tok.pad_token_id, tok("x")["input_ids"][0]
    for ids, found in (([x, x, *prefill, care, x, *prefill, x], (2, 7)),                # the first occurrence
                       ([x, *bytewise, care], (1, 1 + len(bytewise))),
                       ([pad, *prefill[:2], pad, *prefill[2:], pad, care], (1, 8)),
                       ([x, *prefill], None),                                           # no token after it
                       ([x, *prefill[:-1], care], None)):
        assert evalmfv.find_answer(tok, ids, pad) == found


# ---- vignettes and metrics

def test_vignettes_are_read_from_our_rows_and_from_the_originals(tmp_path):
    names = ["Care", "Fairness", "Loyalty", "Authority", "Sanctity", "Liberty", "SocialNorms"]
    theirs = {"id": "x", "foundation": "Social Norms", "foundation_coarse": "SocialNorms", "wrong": 2.0,
              "text": "b", **{f"ai_{n}": 1.0 for n in names},
              **{f"human_{n}": 10.0 * i for i, n in enumerate(names)}}
    legacy = {k: f"{x:.0f} %" if k.startswith("human") else x for k, x in theirs.items()}
    legacy["foundation_coarse"] = "Care (e)"
    legacy["human_Not Wrong"] = legacy.pop("human_SocialNorms")
    ours = {"id": "y", "text": "a\u2028b", "foundation": "liberty",
            "label": {f: 2 * (f == "liberty") for f in FOUNDATIONS}}
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps(row, ensure_ascii=False) for row in
            (ours, theirs, legacy, {"text": "c", "foundation": "care"})]
    path.write_text("\n\n".join(rows), encoding="utf-8")
    found = evalmfv.load_vignettes(path)
    assert [r["foundation"] for r in found] == ["liberty", "social", "care", "care"]
    assert found[0]["label"] == [0, 0, 0, 0, 0, 1, 0] and found[3]["label"] is None
    assert found[1]["label"] == found[2]["label"] == pytest.approx([i / 21 for i in range(7)])


def test_the_summary_follows_from_the_rows():
    tok, rows = probe_tokenizer(), mfv_rows()
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


def reading(p, coherence=0.9, counted=None):
    return {"p": p, "coherence": coherence, "counted": counted or list(range(len(p))), "items": "x",
            "think_tokens": 8, "as_original": False}


def test_a_shift_is_paired_signed_and_compared_with_every_other_foundation():
    rng = torch.Generator().manual_seed(0)
    q = torch.rand(40, 7, generator=rng, dtype=torch.float64)
    q = q / q.sum(1, keepdim=True)
    p = q.clone()
    p[:, 3] *= 0.5                                              # authority halves, nothing else moves
    out = evalmfv.shift(reading(p, 0.8), reading(q), "authority", -1)
    assert out["trait"] == pytest.approx(math.log(2)) and out["surgical"]
    assert out["se"] < 1e-12 and out["off_target"] < 1e-12
    assert out["coh_cost"] == pytest.approx(0.1 / math.log(2))
    p[:, 0] *= 3
    p[7] = 1.0                                                  # not scored: must not be read
    keep = [i for i in range(40) if i != 7]
    out = evalmfv.shift(reading(p.tolist(), counted=keep), reading(q), "authority", 1)
    assert out["trait"] == pytest.approx(-math.log(2)) and not out["surgical"]
    assert out["off_target"] == pytest.approx(math.log(3)) == out["moved"]["care"]
    assert evalmfv.shift(reading(q), reading(q), "care", 1)["coh_cost"] is None


def test_the_standard_error_of_a_shift_matches_the_jackknife():
    rng = torch.Generator().manual_seed(0)
    p, q = (torch.rand(60, 7, generator=rng, dtype=torch.float64).softmax(-1) for _ in range(2))
    se = evalmfv.shift(reading(p), reading(q), "care", 1)["se"]

    def care(x, i):                                             # without row i
        return torch.cat([x[:i, 0], x[i + 1:, 0]]).mean().log()
    left = torch.stack([care(p, i) - care(q, i) for i in range(60)])
    assert se == pytest.approx((59 / 60 * ((left - left.mean()) ** 2).sum()).sqrt().item(), rel=0.02)


# ---- the meter

def test_persona_ratio_equals_a_loop_over_tokens():
    model, tok, answers, users = meter_case()
    pos, neg = ["kind", "warm"], "xyz"
    echo = echo_of(tok, [*pos, neg])
    got = evalmfv.persona_ratio(model, tok, answers, users, pos, neg)
    for ratio, c, user in zip(got.tolist(), answers, users):
        want = 0.0
        for texts, sign in ((pos, 1), ([neg], -1)):
            for text in texts:
                logp = logp_behind(model, tok, c, user, text)
                want += sum(sign / len(texts) * math.log(math.exp(logp[j, i]) + 1 / len(tok))
                            for j, i in enumerate(c.ids) if i not in echo)
        assert ratio == pytest.approx(want / max(1, len(c.ids)), abs=1e-6)
    assert got[-1] == 0




# ==== steer, lora, heal and evalmfv on real architecture classes ============================================

@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_steered_healed_folded_probed_and_loaded(name):
    tok = probe_tokenizer()
    model, ids = family_model(name, tok), some_ids(2, 110)      # longer than the sliding window
    mask = torch.ones_like(ids)
    mask[0, :9] = 0                                             # a left-padded row

    def logits():
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask, position_ids=position_ids).logits

    def n_hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    untouched = logits()

    # ---- a block's output is hidden_states[i + 1]; the last one's is normed there
    seen = {}
    with torch.no_grad(), steer.hooked(model, {i: lambda h, i=i: seen.__setitem__(i, h) for i in range(4)}):
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert [torch.equal(seen[i], states[i + 1]) for i in range(4)] == [True, True, True, False]
    n_before = n_hooks()                                        # transformers has hooked its own by now

    # ---- steer
    vectors = fit_vectors(model, tok, "kind", "cruel", PROMPTS, [1, 2])
    with steered(model, vectors, torch.zeros(2)):
        assert torch.equal(logits(), untouched)
    with pytest.raises(KeyError, match="passed through"), steered(model, vectors, 1.0):
        assert (logits() - untouched).abs().max() > 1e-3
        raise KeyError("passed through")
    assert n_hooks() == n_before and torch.equal(logits(), untouched)
    made = generate(model, tok, PROMPTS * 2, vectors=vectors, coeffs=[0.5] * 12, max_new_tokens=6)
    alone = generate(model, tok, PROMPTS[:1], vectors=vectors, coeffs=[0.5], max_new_tokens=6)
    assert made[0].ids == alone[0].ids                          # padding and batch do not matter
    assert all(x.isfinite().all() for x in token_nll(model, made))

    # ---- a row that stays when another leaves the batch
    with torch.no_grad():
        whole = model(input_ids=ids[1:]).logits[:, -2:]
        forward, cache = steer.cached_forward(model)
        forward(ids[:, :-2], mask[:, :-2], (mask.cumsum(-1) - 1).clamp(min=0)[:, :-2])
        cache.reorder_cache(torch.tensor([1]))
        parts = [forward(ids[1:, i:i + 1], mask[1:, :i + 1], torch.tensor([[i]])) for i in (108, 109)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-3), (torch.cat(parts, 1) - whole).abs().max()

    # ---- heal one round, fold, gates
    stack = attach(model, r=2, alpha=4, layers=[1, 2])
    assert torch.equal(logits(), untouched)
    assert ("experts" in models.left_out(model, [1, 2])) == (name in HAVE_EXPERTS)
    assert not any(".experts" in module or "vision" in module for module in stack.layers)
    assert len({module.split(".")[-1] for module in stack.layers}) >= 3
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
    rows = mfv_rows(VIGNETTES[:2])
    probe = evalmfv.evaluate(model, tok, rows, think_tokens=3, batch_size=4)
    for row, score in zip(rows, probe["score"]):
        alone = [naive_frame(model, tok, row["text"], reverse, 3)[1] for reverse in (False, True)]
        assert (score - sum(alone) / 2).abs().max() < 1e-4      # measured: 2e-6, with linear attention 2e-5

    # ---- its tensors, loaded into an untouched copy
    tensors = stack.tensors()
    stack.remove()
    assert n_hooks() == n_before and torch.equal(logits(), untouched)
    again = attach(model, r=2, alpha=4, layers=[1, 2])
    again.load_tensors(tensors)
    assert torch.equal(logits(), healed)


# ==== loop.py ===============================================================================================

def row(kind="healed", rnd=None, ratio=0.0, **more):
    """A row of the journal whose 16 answers read about `ratio`, give or take .02, by the meter."""
    ratios = [ratio + 0.02 * (-1) ** i for i in range(16)]
    return dict(t=0, stage="row", round=rnd, kind=kind, trait=0.0, trait_se=0.01, shift={}, coherence=0.98,
                text=0.9, persona_ratio=ratio, ratios=ratios) | more


def test_the_gate_puts_absolute_floors_before_the_gain_and_names_the_option_that_moves_a_reason():
    base, prompted, cfg = row("base"), row("prompted", ratio=0.2), loop.LoopConfig()

    def reasons(cfg=cfg, **day):
        return loop.gate(row(**(dict(ratio=0.1) | day)), row(ratio=0.05), base, prompted, cfg)
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
    days = [(0.2, 1.0, True), (0.1, 0.97, False), (0.15, 1.0, False), (0.3, 0.96, True)]
    for rnd, (ratio, text, accepted) in enumerate(days):        # the third: over a refused day is no gain
        events += [row("healed", rnd, ratio, text=text),
                   dict(t=0, stage="gate", round=rnd, accepted=accepted)]
    events += [dict(t=0, stage="gate", round=4, accepted=False)]       # broke before its day: no option helps

    def n(**options):
        cfg = loop.LoopConfig(**options)
        return files.Record(Path("."), {}, events, []).n_standing(lambda *rows: loop.gate(*rows, cfg))
    assert (n(), n(coh_floor=0.97), n(gate=False), n(coh_floor=1.0)) == (11, 9, 5, 9)


# ---- a finished run (tests/shared.py), read again by hand

def test_the_persona_prompt_is_the_set_point_of_the_barrier(finished):
    tau, given = finished.of("tau"), inputs.load("authority", model="pocket")
    assert 0 < tau["tau"] == finished.run["tau"] == tau["distance"] * finished.run["options"]["tau_scale"]
    model, tok = models.load("pocket")
    by_hand = []
    for e in [e for e in finished.completions(0) if e["verdict"]["kept"]]:      # one full forward each
        fronts = steer.encode(tok, [given["train"][e["prompt"]]] * 2, [given["persona"]["pos"][0], ""])
        logp, logq = (logits_of(model, torch.tensor([front + e["ids"]]))[0, len(front) - 1:-1].double()
                      .log_softmax(-1) for front in fronts)                     # [n, V] each
        by_hand.append(((logp.exp() * (logp - logq)).sum(-1) ** 2).mean().sqrt().item())
    assert tau["distance"] == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-4)
    heal_event = finished.of("heal")
    assert heal_event["tau"] == tau["tau"] and {"nll", "div", "fired"} <= set(heal_event["steps"][0])


def test_the_saved_adapter_is_the_healed_model(finished):
    layers, options, (model, tok) = finished.of("layers"), finished.run["options"], models.load("pocket")
    stack = attach(model, r=8, alpha=16.0, layers=layers["lora"])
    assert layers["lora"] == search.band(len(steer.blocks(model)), 0.2, 0.8)

    def nats():
        return evalmfv.evaluate(model, tok, evalmfv.load_vignettes(options["vignettes"]),
                                think_tokens=options["think_tokens"])["nats"]["authority"]
    before = nats()
    stack.load_tensors(read_tensors(finished.adapters()[0])[0])
    base, healed = (finished.rows(kind)[0]["nats"]["authority"] for kind in ("base", "healed"))
    assert (before, nats()) == pytest.approx((base, healed), abs=1e-5) and base != healed
