"""The concept files where it is hard: memory that runs out, numbers that break, heads, caches and templates
of any shape, packed weights, several devices."""
import contextlib
import dataclasses
import inspect
import math
import warnings
from unittest.mock import patch

import pytest
import torch
from common import (FOUNDATIONS, PROMPTS, TEMPLATE, VIGNETTES, base_of, family_model, flat, heal_case,
                    heal_run, logits_of, lora_case, mfv_rows, noise, probe_tokenizer, random_head, rig,
                    some_ids, steer_pair, steer_vectors, step_numbers, tiny_model, tiny_tokenizer)
from test_all import compare, completion
from tokenizers.processors import TemplateProcessing

import evalmfv
import steer
from heal import Passes, aggregate, naive_losses, token_losses
from lora import attach
from steer import fit_vectors, generate, readings, render, steered, token_nll
from tools import search
from tools.student import Student


# ---- memory that runs out

def full_memory(model, rows, error, columns=0):
    """More than `rows` rows of `columns` columns or more raise `error`; the rows of every call are listed."""
    seen = []

    def guard(module, args, kwargs):
        seen.append(len(kwargs["input_ids"]))
        if seen[-1] > rows and kwargs["attention_mask"].shape[1] >= columns:
            raise error
    return model.register_forward_pre_hook(guard, with_kwargs=True), seen


GPU_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
CPU_FULL = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you "
                        "tried to allocate 9 bytes.")


def test_token_losses_never_hold_more_than_a_tile_of_the_logits():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                own = isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given
                self.numel = max(self.numel, t.numel() if own else 0)
            return out
    h, h0, W, targets, _ = random_head(N=40, V=5000, d=16, dtype=torch.bfloat16)
    given, x = {W.untyped_storage().data_ptr()}, h.requires_grad_()
    with Largest() as seen:
        nll, kl = token_losses(x, h0, W, targets, tile=100)
        (nll.mean() + kl.mean()).backward()
    assert seen.numel == 40 * 100, seen.numel                   # N * tile, of N * V = 200,000


def test_out_of_memory_halves_the_pass_and_changes_no_number():
    results = []
    for limit in (100, 2, 3):
        model, stack, samples = heal_case(torch.float64)

        def full(module, args, kwargs):
            if len(kwargs["input_ids"]) > limit:
                cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory: no room")
                raise [torch.OutOfMemoryError("no room"), cpu][limit % 2]
        model.register_forward_pre_hook(full, with_kwargs=True)
        results.append(step_numbers(heal_run(model, stack, samples, heal_batch=6, epochs=2)))
    assert all(torch.allclose(results[0], other, rtol=1e-6) for other in results[1:])
    model.register_forward_pre_hook(lambda m, a: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all")))
    with pytest.raises(torch.OutOfMemoryError):
        heal_run(model, stack, samples, heal_batch=6, epochs=2)


def test_memory_that_runs_out_in_the_search_of_the_dose_is_no_refused_round(monkeypatch):
    student = Student.__new__(Student)
    student.seed, student.train = 0, ["Hi"]
    for kind in (torch.OutOfMemoryError, RuntimeError):         # the first ends the run, the second its round
        def fails(*_, **__):
            raise kind("too much")
        monkeypatch.setattr(search, "find_dose", fails)
        with pytest.raises(RuntimeError, match="too much") as raised:
            student.dose(0, None, {}, 1.0, min_survive=0.5)
        assert raised.type is kind


def test_generation_halves_its_batch_as_often_as_it_must_and_no_answer_changes():
    model, tok = steer_pair(torch.float64)
    model.generation_config.eos_token_id = list(range(6, 40))               # rows end at different steps
    want = generate(model, tok, PROMPTS * 4, max_new_tokens=20, seed=5)
    for rows, error in ((3, GPU_FULL), (1, CPU_FULL)):
        hook, seen = full_memory(model, rows, error)
        assert generate(model, tok, PROMPTS * 4, max_new_tokens=20, seed=5) == want
        hook.remove()                                           # 24, 12, 6 (, 3, ...) and never again
        assert seen[0] == 24 and rows in seen and sum(n > rows for n in seen) <= 5


def test_token_nll_makes_logits_of_answers_only_and_no_more_than_its_budget():
    model, tok = steer_pair()
    answers, shapes = generate(model, tok, PROMPTS, max_new_tokens=15, top_k=0, top_p=1.0), []
    model.lm_head.register_forward_hook(lambda head, args, out: shapes.append(tuple(out.shape)))
    whole = []                                                  # else torch copies a frozen head once per row
    model.lm_head.register_forward_pre_hook(lambda head, args: whole.append(args[0].is_contiguous()))
    want = token_nll(model, answers)
    assert all(whole)
    n = max(len(c.ids) for c in answers) + 1                    # the answers and the column before them
    assert shapes == [(6, 1, len(tok)), (6, n, len(tok))]       # the prompts, then what follows them
    model.config.vocab_size = 2 ** 28 // n                      # as if a row were all of the budget
    got = token_nll(model, answers)
    assert {shape[0] for shape in shapes[2:]} == {1}
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(want, got))


def test_rows_that_had_finished_when_memory_ran_out_are_not_decoded_again():
    model, tok = steer_pair(torch.float64)
    model.generation_config.eos_token_id = list(range(6, 60))
    kw, prompts = dict(max_new_tokens=24, seed=5), ["Hi"] * 16
    want = generate(model, tok, prompts, **kw)
    short = sum(len(c.ids) <= 3 for c in want)
    assert 8 <= short < 16, short                               # half are retired before the fourth token
    hook, seen = full_memory(model, 2, GPU_FULL, columns=len(want[0].prompt_ids) + 6)
    assert generate(model, tok, prompts, **kw) == want
    hook.remove()
    again = [n for before, n in zip(seen, seen[1:]) if n > before]          # a batch that grows is new
    assert again and max(again) <= 16 - short, seen


def test_one_row_that_does_not_fit_is_named_and_other_errors_pass_through():
    model, tok = steer_pair()
    other = RuntimeError("shapes do not match")
    for error, message, rows in ((GPU_FULL, "one row of 6 tokens alone", [5, 2, 1]),
                                 (CPU_FULL, "one row of 6 tokens alone", [5, 2, 1]),
                                 (other, "shapes do not match", [5])):
        hook, seen = full_memory(model, 0, error)
        with pytest.raises(RuntimeError, match=message) as found:
            generate(model, tok, ["Hi"] * 5, max_new_tokens=2)
        hook.remove()
        assert seen == rows and (error is other or isinstance(found.value, torch.OutOfMemoryError))


def test_scores_states_and_the_probe_survive_a_full_memory_with_the_same_numbers():
    model, tok = steer_pair(torch.float64)
    answers = generate(model, tok, PROMPTS * 2, max_new_tokens=9)
    answers.append(dataclasses.replace(answers[0], ids=[]))                   # nothing to score is no error
    nlls = token_nll(model, answers)
    states = fit_vectors(model, tok, "kind", "cold", PROMPTS, [0, 2])
    probe_tok, rows = probe_tokenizer(), mfv_rows(VIGNETTES[:3])
    probed = tiny_model(probe_tok, seed=11, dtype=torch.float64, layers=2)
    rig(probed, probe_tok, natural=31, closed=0, pad=9)
    reading = evalmfv.evaluate(probed, probe_tok, rows, think_tokens=20)
    for error in (GPU_FULL, CPU_FULL):
        (hook, seen), (hook2, seen2) = full_memory(model, 2, error), full_memory(probed, 2, error)
        for a, b in zip(nlls, token_nll(model, answers), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-6)
        again = fit_vectors(model, tok, "kind", "cold", PROMPTS, [0, 2])
        assert all(torch.allclose(states[k], again[k], rtol=0, atol=1e-5) for k in states)
        other = evalmfv.evaluate(probed, probe_tok, rows, think_tokens=20)
        assert other["case"] == reading["case"] and (other["score"] - reading["score"]).abs().max() < 1e-10
        hook.remove(), hook2.remove()
        assert max(seen) > 2 and 1 <= seen[-1] <= 2 and max(seen2) > 2 and 1 <= seen2[-1] <= 2


# ---- numbers that are large, rough or none

def test_token_losses_survive_large_logits_and_agree_on_which_bits_are_zero():
    h, h0, W, targets, _ = random_head(dtype=torch.float32)
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
def test_token_losses_in_bfloat16_are_nearer_the_truth_than_a_bfloat16_softmax(shift, better):
    h, h0, W, targets, _ = random_head(N=64, V=4096, d=128, dtype=torch.bfloat16, shift=shift)
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


def test_readings_are_finite_for_huge_and_missing_nll_and_refuse_nan():
    huge = readings(completion("a b c", range(3)), torch.full((3,), 2000.0))
    empty = readings(completion("", []), torch.zeros(0))
    assert all(math.isfinite(x) for r in (huge, empty) for x in r.values())
    for nll in (torch.tensor([0.1, math.nan]), torch.zeros(3)):
        with pytest.raises(RuntimeError, match="finite"):
            readings(completion("a b", range(2)), nll)


# ---- heads, devices, packed weights, pads and caches

HEADED = {"soft-capped": "Gemma2ForCausalLM", "divided": "GraniteForCausalLM",
          "multiplied": "CohereForCausalLM", "biased": "PhiForCausalLM"}


@pytest.mark.parametrize("name", [*HEADED, "unknown", "edited", "hooked", "trained", "reread", "swapped"])
def test_any_head_is_read_as_the_model_does(name):
    """Exact without logits where the config tells the head; from the model's own logits where it does not."""
    model = family_model(HEADED.get(name, "GraniteForCausalLM"), tiny_tokenizer())
    forward = model.forward

    def other(*args, **kwargs):
        out = forward(*args, **kwargs)
        if name == "unknown":
            out.logits = out.logits.square()
        else:
            out.logits[..., [100, 200]] = -50.0
        return out
    if name == "biased":
        model.lm_head.bias.data.normal_()
    elif name in ("unknown", "edited"):
        model.forward = other
    elif name == "hooked":
        model.lm_head.register_forward_hook(lambda m, a, out: out + 1.0)
    elif name == "reread":                                      # before the decoder, not behind it
        model.register_forward_pre_hook(
            lambda m, a, given: (a, given | dict(input_ids=given["input_ids"] + 1)), with_kwargs=True)
    stack, samples, results = attach(model, r=4, alpha=8, layers=[1, 2]), heal_case()[2], []
    model.lm_head.weight.requires_grad_(name == "trained")
    noise(stack, 0, 0.1)
    base = base_of(stack)

    @contextlib.contextmanager
    def swapped():                                              # only the reference's forward is another one
        with base(), patch.object(model, "forward", other):
            yield
    for fast in (True, False):
        passes = Passes(model, samples, swapped if name == "swapped" else base, fast=fast)
        assert (passes.head is not None) == (fast and name in HEADED)
        for _ in range(2):                                      # the second time the reference from memory
            nlls, kls = passes.losses(list(range(6)))
        loss = torch.cat(nlls).mean() + sum(aggregate(kl, "rmse") for kl in kls)
        results.append((flat([*nlls, *kls]), flat(torch.autograd.grad(loss, stack.parameters()))))
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-4 * b.abs().max()), (a - b).abs().max()
    logits = model(input_ids=torch.tensor([samples[0].ids])).logits[0, 2:-1]
    exact = torch.nn.functional.cross_entropy(logits, torch.tensor(samples[0].answer), reduction="none")
    assert torch.allclose(nlls[0], exact, atol=1e-3)


def test_history_built_under_inference_mode_still_serves_training():
    model, stack = lora_case(rounds=1)
    with torch.inference_mode():
        model(input_ids=some_ids())
    model(input_ids=some_ids()).logits.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in stack.parameters())


@pytest.mark.parametrize("name", ["Qwen3_5ForConditionalGeneration", "Mamba2ForCausalLM"])
def test_rows_that_end_early_leave_a_batch_of_linear_attention(name):
    tok = probe_tokenizer()
    model = family_model(name, tok)
    model.generation_config.eos_token_id = list(range(6, 134))  # half of the bytes end an answer
    for greedy in (False, True):
        together = generate(model, tok, PROMPTS, max_new_tokens=8, greedy=greedy)
        assert together[0].ids == generate(model, tok, PROMPTS[:1], max_new_tokens=8, greedy=greedy)[0].ids
        assert len({len(c.ids) for c in together}) > 1
    alone = [generate(model, tok, [p], max_new_tokens=8, greedy=True)[0].ids for p in PROMPTS]
    assert [c.ids for c in together] == alone


def test_the_probe_of_a_model_with_a_short_window_does_not_see_its_batch_size():
    tok = probe_tokenizer()
    model = rig(family_model("MistralForCausalLM", tok).double(), tok, natural=61, closed=0, pad=9)
    one, *others = [evalmfv.evaluate(model, tok, mfv_rows(VIGNETTES[:4]), think_tokens=18, batch_size=b)
                    for b in (1, 5, 8)]
    assert len(set(sum(one["case"], []))) > 1                   # some rows leave the batch early
    for out in others:
        assert out["case"] == one["case"] and (out["score"] - one["score"]).abs().max() < 1e-10
        assert out["profile"] == pytest.approx(one["profile"], abs=1e-10)
        assert out["prefill_nll"] == pytest.approx(one["prefill_nll"], abs=1e-10)


def test_adapters_and_vectors_live_where_their_layer_lives():
    model, tok = steer_pair()
    vectors = steer_vectors(model)                              # on the CPU
    model.model.layers[2].to("meta")                            # stands in for a second device
    stack = attach(model, r=2, alpha=4, layers=[1, 2])
    for rnd in range(2):
        for name, lora in stack.layers.items():
            there = [lora.A, lora.B, *(t for pair in lora.rounds for t in pair[:2])]
            assert {t.device.type for t in there} == {"meta" if "layers.2." in name else "cpu"}, name
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


class Packed(torch.nn.Linear):
    """As bitsandbytes does: a Linear whose weight is a column of bytes."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.scale = linear.weight.abs().max() / 127
        packed = (linear.weight / self.scale).round().to(torch.int8).view(-1, 1)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        W = self.scale * self.weight.view(self.out_features, self.in_features).to(x.dtype)
        return torch.nn.functional.linear(x, W)


def test_a_linear_with_packed_weights_is_adapted_by_its_declared_sizes():
    model, tok = steer_pair()
    for name, linear in [(n, m) for n, m in model.model.layers.named_modules()
                         if isinstance(m, torch.nn.Linear)]:
        model.model.layers.set_submodule(name, Packed(linear))
    ids = some_ids()
    untouched, stack = logits_of(model, ids), attach(model, r=4, alpha=8, layers=[1, 2])
    heal_run(model, stack, heal_case()[2], epochs=1)
    stack.fold()
    assert not torch.equal(logits_of(model, ids), untouched)
    with stack.gated(0, 0):
        assert torch.equal(logits_of(model, ids), untouched)


def test_ids_go_to_the_embedding_and_nothing_asks_the_model_for_one_device(monkeypatch):
    tok = probe_tokenizer()
    model = tiny_model(tok)
    monkeypatch.setattr(type(model), "device", property(lambda self: 1 / 0))    # it is on several
    vectors = fit_vectors(model, tok, "kind", "cruel", PROMPTS, [1])
    token_nll(model, generate(model, tok, PROMPTS, vectors=vectors, coeffs=[0.5] * 6, max_new_tokens=4))
    evalmfv.evaluate(model, tok, mfv_rows(VIGNETTES[:2]), think_tokens=2)


def test_neither_a_missing_pad_token_nor_the_padding_side_changes_an_answer():
    model, tok = steer_pair()
    whole = [c.ids for c in generate(model, tok, PROMPTS, max_new_tokens=8)]
    for side, pad in (("left", None), ("right", None), ("right", tok.pad_token), ("left", "[PAD]")):
        tok.padding_side = side
        if pad == "[PAD]":                                      # added, and the embedding has no row for it
            tok.add_special_tokens({"pad_token": pad})
            assert tok.pad_token_id == len(model.get_input_embeddings().weight) > steer.pad_of(tok, model)
        tok.pad_token = pad
        made = generate(model, tok, PROMPTS, max_new_tokens=8)
        assert [c.ids for c in made] == whole
        assert all(x.isfinite().all() for x in token_nll(model, made, pad_id=steer.pad_of(tok, model)))
        assert fit_vectors(model, tok, "kind", "cruel", ["Hi"], [1])[1].norm() > 0


def test_the_cache_goes_in_by_the_word_that_forward_has_and_an_empty_one_is_named():
    model, tok = steer_pair(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)           # transformers 5.40 drops the old word
        want = generate(model, tok, PROMPTS, max_new_tokens=6)
    plain, probe_tok = model.forward, probe_tokenizer()
    takes_cache = "cache" in inspect.signature(plain).parameters
    for word in ("cache", "past_key_values"):                   # a forward that has this word alone
        def forward(*, input_ids, **kwargs):
            given = {"cache" if takes_cache else "past_key_values": kwargs.pop(word, None)}
            kwargs.pop("past_key_values" if word == "cache" else "cache", None)         # swallowed
            return plain(input_ids=input_ids, **kwargs, **given)
        parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("input_ids", word)]
        forward.__signature__ = inspect.Signature(parameters)
        model.forward = forward
        assert generate(model, tok, PROMPTS, max_new_tokens=6) == want
    for broken, call in (
            (model, lambda m: generate(m, tok, ["Hi"], max_new_tokens=6)),
            (tiny_model(probe_tok), lambda m: evalmfv.evaluate(m, probe_tok, mfv_rows(), think_tokens=2))):
        def forgetful(input_ids=None, cache=None, past_key_values=None, broken=broken, **kwargs):
            return type(broken).forward(broken, input_ids=input_ids, **(kwargs | dict(use_cache=False)))
        broken.forward = forgetful
        with pytest.raises(RuntimeError, match="LlamaForCausalLM leaves .* cache empty"):
            call(broken)


# ---- templates and tokenizers

def test_answers_end_at_any_end_token_and_at_what_the_template_writes_after_them():
    model, tok = steer_pair()
    model.generation_config.eos_token_id = [40, 41]
    answers = generate(model, tok, PROMPTS * 8, max_new_tokens=60, top_k=0, top_p=1.0)
    ends = {40, 41, tok.eos_token_id}
    assert any(c.ids[-1] in (40, 41) for c in answers)
    for c in answers:
        assert not ends & set(c.ids[:-1]) and c.finished == (c.ids[-1] in ends)
        assert c.finished or len(c.ids) == 60
    end, user = tok.convert_tokens_to_ids(["<|end|>", "<|user|>"])
    model.generation_config.eos_token_id = tok.bos_token_id     # neither names the token that ends a turn
    tok.eos_token = "<|bos|>"
    hook = model.lm_head.register_forward_hook(
        lambda m, args, out: out.index_fill(-1, torch.tensor([end]), 99.0))
    said = generate(model, tok, ["Hi"], max_new_tokens=5)
    hook.remove()
    assert [(c.ids, c.finished, c.text) for c in said] == [([end], True, "")]
    between = TEMPLATE.replace("not (loop.last and continue_final_message)", "not loop.last")
    for template, found in (
            (TEMPLATE, {end}), (between, {end}),                # the second closes a turn when the next opens
            (TEMPLATE.replace("<|end|>", "\n\n"), {user}),      # the next turn's tag
            ("{% for m in messages %}\n\n### {{ m['role'] }}: {{ m['content'] }}{% endfor %}", set()),
            (TEMPLATE.replace("m in messages", "m in messages if m['role'] == 'user'"), set())):
        tok.chat_template = template
        assert set(steer.end_ids(model, tok)) == {tok.bos_token_id} | found


def test_the_interruption_follows_the_chat_template():
    tok = probe_tokenizer()
    tok.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    assert evalmfv.interruption(tok) == ("</think><|im_end|>\n<|im_start|>system\nBe kind.<|im_end|>\n"
                                         "<|im_start|>user\nJust answer<|im_end|>\n<|im_start|>assistant\n")
    tok.chat_template = "{% for m in messages if m['role'] == 'user' %}[{{ m['content'] }}]{% endfor %}"
    with pytest.raises(ValueError, match="template"):
        evalmfv.interruption(tok)


def test_as_original_doubles_the_bos_and_does_not_see_pads_inside_the_text():
    tok = probe_tokenizer()
    bos = ("<|bos|>", tok.bos_token_id)
    tok.backend_tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[bos])
    model, rows = tiny_model(tok, seed=2, dtype=torch.float64), mfv_rows(VIGNETTES[:3])
    rig(model, tok, natural=0, closed=0, pad=3)
    text = evalmfv.render(tok, evalmfv.question(rows[0]["text"], FOUNDATIONS))
    assert tok(text)["input_ids"].count(tok.bos_token_id) == 2
    ours, theirs = (evalmfv.evaluate(model, tok, rows, think_tokens=6, as_original=x) for x in (False, True))
    compare(ours, model, tok, rows, 6)
    compare(theirs, model, tok, rows, 6, by_token=True, front=[tok.bos_token_id])
    assert (ours["score"] - theirs["score"]).abs().max() > 1e-3
    tok.pad_token = None                                        # the eos pads then, which ends the turns too
    compare(evalmfv.evaluate(model, tok, rows, think_tokens=6), model, tok, rows, 6)


PARTS = TEMPLATE.replace("{{ m['content'] }}", "{% for part in m['content'] %}{% if part.type == 'text' %}"
                         "{{ part.text }}{% endif %}{% endfor %}")
SHAPES = {                              # name: (template, has a BOS, what it deserves)
    "system role, thinks unless told not to": (                 # Qwen3's
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
        "{% if not (loop.last and continue_final_message) %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
        "{% endif %}", False, "think"),
    "opens a think by itself": (
        TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}"), True, "think"),
    "raises at a system role": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + TEMPLATE, True, "user's words"),
    "drops the system role": (
        TEMPLATE.replace("for m in messages", "for m in messages if m['role'] != 'system'"), True,
        "user's words"),
    "folds the system role into the user turn": (               # Gemma 3's
        "<|bos|>{% if messages[0]['role'] == 'system' %}{% set front = messages[0]['content'] + '\n\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set front = '' %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}<|{{ m['role'] }}|>{{ front if loop.first else '' }}{{ m['content'] | trim }}"
        "{% if not (loop.last and continue_final_message) %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}", True, "user's words"),
    "reads lists of parts": (PARTS, True, ""),                  # Idefics3, SmolVLM, LLaVA-Next
    "reads lists of parts, drops the system role": (
        PARTS.replace("for m in messages", "for m in messages if m['role'] != 'system'"), True,
        "user's words"),
    "reads parts by their place": (TEMPLATE.replace("m['content']", "m['content'][0]['text']"), True, ""),
    "system role and BOS": (TEMPLATE, True, ""),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_chat_template_of_any_shape_carries_the_persona_one_bos_and_no_thinking(shape):
    tok = probe_tokenizer()
    bos = ("<|bos|>", tok.bos_token_id)
    tok.backend_tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[bos])
    tok.chat_template, has_bos, note = SHAPES[shape]
    text = render(tok, "Hi", "Be kind.")
    assert text.count("Be kind.") == 1
    assert text.index("Be kind.") < text.index("Hi") < text.index("<|assistant|>")
    assert steer.encode(tok, ["Hi"], ["Be kind."])[0].count(tok.bos_token_id) == has_bos
    assert text.split("<|assistant|>")[1] == "<think>\n\n</think>\n\n" * (note == "think")
    assert evalmfv.thinking(text).endswith("<|assistant|><think>\n")        # the probe's: one think, and open
    ended = evalmfv.interruption(tok).split("Just answer")[0]
    assert ended in ("</think><|end|><|bos|><|user|>", "</think><|end|><|user|>")
    if note == "user's words":
        assert text.split("<|user|>")[1].startswith("Be kind.\n\nHi<|end|>")
    for user in ("", "a", "  two\nlines  "):                    # short words stand in templates anyway
        assert f"<|user|>{user.strip()}<|end|>" in render(tok, user).replace("  ", "")
    assert evalmfv.evaluate(tiny_model(tok), tok, mfv_rows(VIGNETTES[:2]), think_tokens=2)["n_forced"] == 4


def test_words_that_do_not_reach_the_prompt_or_are_no_text_are_refused_in_a_sentence():
    tok = tiny_tokenizer()
    with pytest.raises(ValueError, match="not UTF-8"):
        render(tok, b"Was f\xfchlst du?".decode(errors="surrogateescape"))
    for template, why in (
            ("<|user|>a<|end|><|assistant|>", "drops or alters the words"),         # an a stands there
            (TEMPLATE.replace("m['content']", "m['content'] | upper"), "drops or alters the words"),
            (TEMPLATE.replace("m['content']", "m['content'] + 1"), "template of .* fails: .*concatenate"),
            (TEMPLATE.replace("m['content']", "raise_exception('no\\nway')"), "fails: no way"),
            (None, "no chat template")):
        tok.chat_template = template
        with pytest.raises(ValueError, match=why):
            steer.encode(tok, ["a"], [""])
