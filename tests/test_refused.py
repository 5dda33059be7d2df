"""What the concept files and the command refuse, in a sentence and before any work."""
import math

import pytest
import torch
from common import (FOUNDATIONS, base_of, heal_case, logits_of, lora_case, mfv_rows, noise, probe_tokenizer,
                    random_head, rig, some_ids, steer_pair, steer_vectors, tiny_model, tiny_tokenizer)
from test_all import reading

import evalmfv
import loop
from heal import HealConfig, Sample, Passes, aggregate, heal, reverse_kl, token_losses
from lora import LoraConfig, attach
from steer import generate, steered
from tools.freetext import free_text, persona_share
from tools.search import SteerConfig

pytest_plugins = ["shared"]


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
            (lambda: Passes(model, samples, base, ref_samples=others), "same completions"),
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
    ids = some_ids()
    base, (v, *_) = logits_of(model, ids), vectors.values()
    for layers, doses, why in (({1: v, 9: v}, 1.0, "layer 9: the model has blocks 0 to 3"),    # after layer 1
                               (vectors, torch.ones(2), "2 doses for a batch of 3")):
        with pytest.raises(ValueError, match=why), steered(model, layers, doses):
            logits_of(model, ids)
        assert torch.equal(logits_of(model, ids), base)


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


def test_metrics_refuse_what_does_not_pair_or_has_no_scale():
    rng = torch.Generator().manual_seed(0)
    q, base, noise = torch.rand(40, 7, generator=rng), *torch.randn(2, 120, generator=rng).double()
    share, text, ids = persona_share, free_text, [[1, 2]]
    for bad, why in ((lambda: evalmfv.shift(reading(q), reading(q) | {"items": "y"}, "care", 1), "items"),
                     (lambda: text(ids, [torch.zeros(3)], ids, [torch.zeros(2)]), "2 tokens with 3 nlls"),
                     (lambda: text(ids, [torch.zeros(2)], [[]], [[]]), "1 answers, 0 non-empty ones of the"),
                     (lambda: share(base, base, base + noise), "no scale"),
                     (lambda: share(base, base[1:], base), "same number")):
        with pytest.raises(ValueError, match=why):
            bad()


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
    err = refused(["--resume", path, "--kl-agg", "mean", "--seed", "3", "--n-make", "12"], capsys)
    assert "configuration: seed is 0 there and 3 here, kl_agg is 'rmse' there and 'mean' here; leave" in err
    assert "only grow" in refused(["--resume", path, "--patience", "1"], capsys)
    cfg, scfg, *_ = loop.parse(["--resume", path, "--rounds", "9", "--gate", "--coh-floor", "0.9"])
    assert (cfg.rounds, cfg.gate, cfg.coh_floor, scfg.n_make) == (9, True, 0.9, 12)
