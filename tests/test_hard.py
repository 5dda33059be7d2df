"""The concept files where it is hard: memory that runs out, templates of any shape, packed weights, several
devices, and what is refused in a sentence before any work."""
import dataclasses
import inspect
import math
import warnings

import pytest
import torch
from common import (FOUNDATIONS, TEMPLATE, logits_of, noise, probe_tokenizer, some_ids, tiny_model,
                    tiny_tokenizer)
from test_all import (CPU_FULL, GPU_FULL, PROMPTS, VIGNETTES, base_of, full_memory, heal_case, heal_run,
                      lora_case, mfv_rows, random_head, rig, steer_pair, steer_vectors, step_numbers)
from tokenizers.processors import TemplateProcessing

import evalmfv
import loop
import steer
from heal import HealConfig, Sample, aggregate, divergences, heal, reverse_kl, token_losses
from lora import LoraConfig, attach
from steer import SteerConfig, fit_vectors, generate, render, steered, token_nll
from tools import search
from tools.student import Student

pytest_plugins = ["shared"]


# ---- memory that runs out

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
            student.dose(0, None, {}, min_survive=0.5)
        assert raised.type is kind


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


# ---- devices, packed weights, pads and caches

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


# ---- templates

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


# ---- what is refused

def test_heal_refuses_bad_options_and_arguments_before_any_forward():
    for bad in (dict(reg="wd"), dict(kl_agg="median"), dict(lam=-1.0), dict(tau=math.inf), dict(lr=0.0),
                dict(epochs=0), dict(pass_tokens=0), dict(heal_batch=0), dict(lam_round_pow=math.nan),
                dict(spectral=math.nan), dict(weight_decay=-1)):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
            HealConfig(**bad)
    model, stack, samples = heal_case()
    params, base, cfg = stack.parameters(), base_of(stack), HealConfig(lr=1e-3, tau=1.0)
    others, (h, h0, W, targets, _) = [s._replace(ids=s.ids[:-1] + [9]) for s in samples], random_head()
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


def test_lora_names_bad_arguments_and_refuses_bad_states():
    shapeless = torch.nn.Linear(2, 2)
    shapeless.get_decoder = lambda: shapeless
    for bad, message in ((lambda: lora_case(layers=[4]), r"layers=\[4\].* has 4, counted from 0"),
                         (lambda: lora_case(layers=[]), "layers="),
                         (lambda: lora_case(r=0), "r=0"),
                         (lambda: lora_case(rounds=2)[1].gates([1.0]), "one for each of 2"),
                         (lambda: lora_case()[1].gates(current=float("nan")), "finite"),
                         (lambda: lora_case(rounds=1)[1].tensors([1]), "1 folded"),
                         (lambda: attach(shapeless, r=1, alpha=1, layers=[0]), "Linear has 0"),
                         (lambda: LoraConfig(alpha=-1.0), "alpha"),
                         (lambda: LoraConfig(lora_band=(0.8, 0.2)), "lora_band"),
                         (lambda: LoraConfig(lora_band=(0.8, math.nan)), "lora_band")):
        with pytest.raises(ValueError, match=message):
            bad()
    _, stack = lora_case()
    with pytest.raises(ValueError, match="0 folded"):
        stack.tensors()
    with stack.gated(1, 0), pytest.raises(RuntimeError, match="current gate 0"):
        stack.fold()
    assert stack.n_rounds == 0


def test_loading_into_the_wrong_model_names_the_modules_and_loads_nothing():
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
                         (tensors | {key: tensors[key] / 0}, "all finite"),
                         (tensors | {key: torch.ones(3)}, "has A")):
        with pytest.raises(ValueError, match=message):
            good.load_tensors(bad)                                          # all or none
    assert good.n_rounds == 0 and fewer.n_rounds == 0
    noise(good, 0)
    with pytest.raises(RuntimeError, match="drop"):
        good.load_tensors(tensors)


def test_generate_and_its_options_refuse_what_cannot_be_meant():
    model, tok = steer_pair()
    vectors = steer_vectors(model)
    for kw in (dict(vectors=vectors), dict(coeffs=[1.0]), dict(vectors=vectors, coeffs=[1.0, 2.0])):
        with pytest.raises(ValueError, match="one coeff per prompt"):
            generate(model, tok, ["Hi"], **kw)
    with pytest.raises(ValueError, match="greedy=True"):
        generate(model, tok, ["Hi"], temperature=0.0)
    for bad in (dict(coeff=-1.0), dict(coeff=math.nan), dict(min_survive=0.0), dict(top_p=0.0),
                dict(steer_band=(0.2, 1.5)), dict(temperature=0.0)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SteerConfig(**bad)
    with pytest.raises(ValueError, match="expected two depths"):
        SteerConfig(steer_band=(0.6, 0.2))
    assert SteerConfig(steer_band=(0.2, 0.8)).coeff is None


def test_the_probe_refuses_what_it_cannot_read():
    tok = probe_tokenizer()
    model = tiny_model(tok)
    with pytest.raises(ValueError, match="think_tokens=0"):
        evalmfv.evaluate(model, tok, mfv_rows(), think_tokens=0)
    with pytest.raises(RuntimeError, match="eval()"):
        evalmfv.evaluate(tiny_model(tok).train(), tok, mfv_rows())
    with pytest.raises(ValueError, match="collide"):            # s-anctity, s-ocial
        evalmfv.evaluate(model, tiny_tokenizer(FOUNDATIONS[:4]), mfv_rows())
    with pytest.raises(ValueError, match="merges"):
        evalmfv.answer_ids(tiny_tokenizer(['"care']))
    closed = rig(tiny_model(tok), tok, natural=0, closed=1, pad=0)
    with pytest.raises(RuntimeError, match="raise think_tokens"):
        evalmfv.evaluate(closed, tok, mfv_rows(), think_tokens=8)
    model.lm_head.weight[20] = math.nan
    with pytest.raises(RuntimeError, match="not finite"):
        evalmfv.evaluate(model, tok, mfv_rows(), think_tokens=2)


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
    (["--kl-agg", "x"], "kl-agg"), (["--pos", "You are kind."], "--neg"),
    (["--persona", "pirate"], "authority, love"), (["--coh-floor", "nan"], "coh_floor"),
    (["--kl_agg", "mean"], "kl_agg"), (["--model", ""], "--model is empty"),
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
    path = str(finished.path)
    err = refused(["--resume", path, "--kl-agg", "mean", "--seed", "3", "--n-make", "24"], capsys)
    assert "configuration: seed is 0 there and 3 here, kl_agg is 'rmse' there and 'mean' here; leave" in err
    assert "only grow" in refused(["--resume", path, "--patience", "1"], capsys)
    cfg, scfg, *_ = loop.parse(["--resume", path, "--rounds", "9", "--gate", "--coh-floor", "0.9"])
    assert (cfg.rounds, cfg.gate, cfg.coh_floor, scfg.n_make) == (9, True, 0.9, 24)
