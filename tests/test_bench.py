"""Tests of bench/: what it counts is right, and every benchmark runs, at sizes whose times mean nothing."""
import importlib
import importlib.util
import json
import random
import shutil
import subprocess
import sys
import time

import heal
import pytest
import steer
import torch
from common import ROOT
from lora import attach
from tools import search
from transformers import LlamaConfig, LlamaForCausalLM

pytest_plugins = ["shared"]


@pytest.fixture
def bench(monkeypatch):
    """A file of bench/ by name, imported where it is tested: one that breaks fails its own tests only."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))

    def load(name):
        if name != "round":           # it has the name of a builtin, and is loaded by its path
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return load


def test_peak_bytes_counts_what_torch_held_at_once_temporaries_included(bench):
    measure = bench("measure")
    def by_hand():
        a = torch.empty(1000, 1000)                                         # 4 MB
        b = torch.empty(500, 1000)                                          # 2 MB more: the peak
        del a
        c = torch.zeros(250, 1000)                                          # 1 MB, after 4 MB were released
        return b, c
    assert measure.peak_bytes(by_hand) == 6_000_000
    x = torch.randn(1000, 1000)
    assert measure.peak_bytes(lambda: x.log_softmax(-1).exp().sum()) >= 8_000_000    # two of x's size at once
    assert measure.peak_bytes(lambda: x.sum()) < 100_000                    # x itself was live before


def test_interleaved_calls_take_turns_and_their_table_names_the_gain(bench):
    measure = bench("measure")
    calls = []
    seconds = measure.interleave({"one": lambda: calls.append("one"),
                                  "two": lambda: (calls.append("two"), time.sleep(0.01))}, 2)
    assert calls == ["one", "two", "one", "two", "two", "one"]    # a warm-up round, then each goes first once
    rows = measure.rows_of({"one": [1.0, 2.0, 4.0], "two": [0.5, 0.5, 9.0]}, "one", {"two": 3 * 2 ** 20})
    assert rows[1] == {"": "two", "median s": "0.500", "min s": "0.500", "gain": "x4.00", "peak MiB": "3.0"}
    assert [len(seconds[name]) for name in ("one", "two")] == [2, 2] and min(seconds["two"]) >= 0.01
    assert len({len(line) for line in measure.table(rows).splitlines()}) == 1


@pytest.mark.parametrize("attention", ["head_dim 16, grouped", "head_dim 8"])
def test_the_roofline_counts_the_operations_that_torch_counts(attention, bench):
    roofline = bench("roofline")
    from torch.utils.flop_counter import FlopCounterMode
    config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=5,
                         num_attention_heads=4,
                         num_key_value_heads=2 if "grouped" in attention else 4,
                         head_dim=16 if "grouped" in attention else 8)
    shape, L, rank, layers = roofline.shape_of(config), 24, 3, [1, 2, 3]
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    stack, ids = attach(model, r=rank, alpha=3, layers=layers), torch.zeros(1, L, dtype=torch.long)
    with FlopCounterMode(display=False) as forward, stack.gated(0, 0):
        model.model(ids, use_cache=False)
    with FlopCounterMode(display=False) as step:
        model(ids, use_cache=False).logits.logsumexp(-1).sum().backward()

    def split(counter):                                                     # (weights, attention) by operator
        counts = counter.get_flop_counts()
        ops = {str(op): n for op, n in counts["Global"].items()}
        # a product in 5.0.0
        rotary = sum(n for module, part in counts.items() if module.endswith("rotary_emb")
                     for n in part.values())
        attention = sum(n for op, n in ops.items() if "bmm" in op) - rotary
        return sum(n for op, n in ops.items() if "bmm" not in op), attention
    seen, NVd = roofline.keys_seen(L, None), L * 96 * 32
    assert seen == sum(range(1, L + 1))
    weights, square = split(forward)                                 # eager attention looks at all L * L keys
    assert weights == 2 * L * sum(shape["blocks"])
    assert square * seen == L * L * (roofline.forward_ops(shape, L) - weights)
    ours = roofline.heal_step(shape, L, L, layers=layers, rank=rank, head=4)["ops"]
    q, kv, d = shape["query"], shape["kv"], 32
    below = 2 * L * shape["blocks"][0]                                       # not cached in this plain step
    no_input = 2 * L * (q + kv) * d + 2 * L * rank * 3 * d   # the first adapted q, k, v need no gradient in x
    weights, square = split(step)
    attended = 4 * shape["query"] * seen                                     # a block's, forward
    ours_weights = sum(ours[k] for k in ("head", "body forward", "body backward", "LoRA")) - 4 * 3 * attended
    assert weights == ours_weights + below - no_input and ours["head"] == 4 * NVd
    assert square * seen == L * L * (5 + 4 * 2) * attended


def test_the_roofline_of_a_4b_model_is_the_one_computed_by_hand(bench):
    roofline = bench("roofline")
    shape = roofline.shape_of(roofline.load_config(ROOT / "bench" / "configs" / "gemma-3-4b.json"))
    assert sum(shape["blocks"]) == 34 * (2560 * (2 * 2048 + 2 * 1024) + 3 * 2560 * 10240) == 3_208_642_560
    layers, L, N = search.band(34, 0.2, 0.8), 576, 512
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
    assert roofline.keys_seen(10, 4) == 1 + 2 + 3 + 4 * 7 and roofline.decode_step(shape, 5000,
                                                                                   1)["bytes"] < \
        alone["bytes"] + 4680 * 34 * 2 * 4 * 256 * 2            # 29 of the blocks look back 1,024 tokens only


def test_the_generation_benchmark_runs_tiny_with_rows_as_hf_and_the_roofline_reads_it(tmp_path, capsys, bench,
                                                                                      monkeypatch):
    bench_generate, roofline = bench("generate"), bench("roofline")
    monkeypatch.setattr(steer, "end_ids", steer.end_ids)        # the benchmark replaces it
    bench_generate.main(["--tiny", "--dtype", "float64", "--json", str(tmp_path / "g.json")])
    found = json.loads((tmp_path / "g.json").read_text())["models"]["tiny"]
    identical = found["implementations"]["identical"]
    assert set(identical.values()) == {6} and len(identical) == 4
    assert all(x <= 1e-12 for x in found["probe"]["difference"].values())
    assert all(n > 0 for n in found["batch_sizes"]["peak_bytes"].values())
    (tmp_path / "tiny.json").write_text(json.dumps(bench_generate.TINY))
    record = roofline.main([str(tmp_path / "tiny.json"), "--measured", str(tmp_path / "g.json")])
    assert [row["measured"] for row in record["measured"]] == ["decoding, 1 rows", "decoding, 4 rows"]
    # a CPU against the floor of an H200
    assert all(float(row["times the floor"]) > 1 for row in record["measured"])
    with pytest.raises(ValueError, match="holds no run of"):
        roofline.main([str(ROOT / "bench" / "configs" / "gemma-3-4b.json"), "--measured",
                       str(tmp_path / "g.json")])


def test_the_bench_of_the_head_times_both_ways_in_both_dtypes(bench, capsys):
    bench("head").main(["pocket", "--answers", "2", "--new-tokens", "3", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and sum("MiB" in line for line in lines) == 4
    assert sum("a number" in line for line in lines) == 4


@pytest.mark.parametrize("name", ["losses", "round"])
def test_a_benchmark_runs_and_writes_every_number(name, tmp_path, capsys, bench, monkeypatch):
    monkeypatch.setattr(heal, "VAL_SHARE", heal.VAL_SHARE)      # the round's benchmark trains on every sample
    bench(name).main(["--tiny", "--json", str(tmp_path / "out.json"),
                      *(["--docs", str(tmp_path)] if name == "losses" else [])])
    assert capsys.readouterr().out.count("|") > 20
    result = json.loads((tmp_path / "out.json").read_text())
    if name == "round":
        assert set(result["seconds"]) == {"extract", "dose search", "generate", "filter", "heal",
                                          "probe"} and result["totals"]["ours"] > 0
        return
    exact = [x for key, x in result["accuracy"].items() if "bf16" not in key]
    assert all(x["value"] < 1e-10 and x["grad"] < 1e-10 for x in exact)
    assert {"ours", "naive autograd",
            "original"} <= set(result["memory"]["peak"]) and len(list(tmp_path.glob("*.svg"))) == 6
    losses = result["round"]["barrier on at every step"]["losses"]
    # the same steps, or nothing is compared
    assert len(losses) >= 5 and max(losses.values()) - min(losses.values()) < 1e-5
    for peer in ("TRL", "torchtune", "Liger"):           # a peer that cannot run says so instead of vanishing
        assert any(peer in key for key in [*result["memory"]["peak"], *result["memory"]["missing"]])


def test_rivals_stand_beside_the_rows_of_the_run_and_leave_the_base_as_it_was(finished, bench, tmp_path,
                                                                              capsys, monkeypatch):
    rivals, benches = bench("rivals"), []
    kept = rivals.check.Bench
    monkeypatch.setattr(rivals.check, "Bench", lambda *given: benches.append(kept(*given)) or benches[-1])
    rows = rivals.main([str(finished.path), "--n", "8", "--json", str(tmp_path / "rows.json")])
    found = {row["label"]: row for row in rows}
    assert len(found) == 14 == capsys.readouterr().out.count("\n| ") - 1
    assert (found["base"]["share"], found["persona prompt"]["share"]) == (0, 1)
    assert len(found["steering, 3 random vectors"]["texts"]) == 24
    assert found["first accepted day"]["texts"] == found["last accepted day"]["texts"]      # there is but one
    assert [c.text for c in benches[0].answers()] == found["base"]["texts"]
    assert [row["ratio"] for row in json.loads((tmp_path / "rows.json").read_text())] == [
        row["ratio"] for row in rows]


def test_rivals_are_as_long_as_v_hold_one_direction_and_average_over_seeds_only(finished, bench, tmp_path):
    rivals, rng = bench("rivals"), torch.Generator().manual_seed(0)
    vectors = {3: torch.randn(16, generator=rng), 4: 7 * torch.randn(16, generator=rng)}
    randoms = [rivals.as_long_as(vectors, seed) for seed in (0, 0, 1)]
    for layer, v in vectors.items():
        assert torch.allclose(randoms[0][layer].norm(), v.norm())
        assert torch.equal(randoms[0][layer], randoms[1][layer])
        assert torch.cosine_similarity(randoms[0][layer], randoms[2][layer], dim=0) < 0.9
    h, u = torch.randn(2, 5, 16, generator=rng), vectors[3] / vectors[3].norm()     # [B, T, d], [d]
    held = rivals.holding(u, 0.3)(h)
    assert torch.allclose(held @ u, torch.full((2, 5), 0.3), atol=1e-6)
    assert torch.allclose(held - (held @ u)[..., None] * u, h - (h @ u)[..., None] * u, atol=1e-6)
    seeds = [dict(share=0.2, se=0.1, text=0.9), dict(share=0.4, se=0.3, text=1.0)]
    assert rivals.cell(seeds, "share") == "0.30 ± 0.20 [0.20, 0.40]"
    assert rivals.cell(seeds[:1], "text") == "0.900"
    other = shutil.copytree(finished.path, tmp_path / "other")
    run = finished.run
    (other / "run.json").write_text(json.dumps(run | dict(options=run["options"] | dict(seed=9, lam=1.0))))
    with pytest.raises(ValueError, match="in lam, which no arm names"):
        rivals.main([str(finished.path), str(other)])


def test_the_bench_kills_a_real_process_and_finds_no_difference():
    command = [sys.executable, "bench/kill.py", "--kinds", "torn", "--every", "500"]        # one case of many
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0 and "different: 0" in out.stdout, out.stdout + out.stderr


def test_malformed_inputs_end_with_a_sentence_and_no_damage(tmp_path, bench):
    malformed = bench("malformed")
    (tmp_path / "vignettes.jsonl").write_text("")
    for i in range(5 * len(malformed.KINDS)):
        kind = malformed.KINDS[i % len(malformed.KINDS)]
        if kind not in (malformed.model, *malformed.OF_RUNS):   # those load a model: in the campaign
            outcome, wrong, text, argv = malformed.trial(random.Random(f"test/{i}"), kind, tmp_path / "case",
                                                         30, real=False)
            assert not wrong, (i, argv, outcome, wrong, text[-500:])
