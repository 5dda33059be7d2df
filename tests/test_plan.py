"""Tests of tools/plan.py: it reads a configuration only, and its counts are those of the model."""
import re
from pathlib import Path

import pytest
import torch
import transformers
from common import VISION, family_model, probe_tokenizer, some_ids, tiny_model, tiny_tokenizer

import steer
from tools import inputs, plan

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = dict(revision="", dtype="auto", device="cpu", quantize="", rounds=8, n_text=48, think_tokens=128,
               batch_size=152, n_make=64,
               coeff=None, max_new_tokens=64, r=8, alpha=16, lora_band=(0.2, 0.8), epochs=5, heal_batch=4,
               pass_tokens=2048)


def planned(model, **how) -> dict:
    lines = plan.plan(inputs.load("authority", model="pocket"), model=str(model), **OPTIONS | how)
    return {line.split()[0]: line for line in lines}


def test_a_plan_reads_a_configuration_and_nothing_else(tmp_path):
    text = dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, num_attention_heads=8,
                num_key_value_heads=4,
                head_dim=256, vocab_size=262208)  # Gemma 3 4B: a folder with its shape and no weights
    transformers.Gemma3Config(text_config=text, vision_config=VISION,
                              architectures=["Gemma3ForConditionalGeneration"]
                              ).save_pretrained(tmp_path)
    out = planned(tmp_path, dtype="bfloat16")
    assert set(out) == {"model", "adapted", "memory", "disk", "work", "time", "devices", "link", "assumed"}
    hours = [float(x) for x in re.findall(r"\d: (\S+) \(", out["devices"])]      # 1, 2, 4, ... 64 devices
    assert len(hours) == 7 and sorted(hours, reverse=True) == hours and hours[6] > hours[0] / 64
    assert "1: " in out["devices"] and "(100%)" in out["devices"] and "heal-batch 4" in out["link"]
    # q; k and v; o; gate, up and down
    sizes = [2560 + 2048, 2 * (2560 + 1024), 2048 + 2560, 3 * (2560 + 10240)]
    trained = 8 * sum(sizes) * 22                               # rank 8, blocks 6 to 27
    assert "154 modules" in out["adapted"] and "blocks 6-27" in out["adapted"]
    assert f"{trained:,} trained" in out["adapted"]
    weights = 262208 * 2560 + 34 * (2560 * (2 * 2048 + 2 * 1024) + 3 * 2560 * 10240)
    found = float(re.search(r"weights (\S+)", out["memory"])[1])
    assert found == pytest.approx(2 * weights / 1e9, rel=0.01)
    stages = dict(re.findall(r"(\w+) ([0-9.]+)", out["memory"].split("GB: ")[1]))
    assert set(stages) == {"weights", "generation", "filter", "probe", "heal"}
    assert all(float(x) >= found for x in stages.values())
    assert f"{4 * trained / 1e6:.1f} MB per" in out["disk"]
    assert f"a step of {4 * trained / 1e6:.3g} MB" in out["link"]
    assert "5,472 probe frames" in out["work"] and "GFLOP/s" in out["time"]
    # 3 trials of 16, 8 for the band, 2 x 64 of the base, a round's 5 doses of 24, two more in the first, and
    # 64, 18 rows of 48 and 6
    assert f"{48 + 8 + 128 + 48 + 8 * (120 + 64) + 18 * 54:,} answers" in out["work"]


def test_a_small_model_that_lies_here_is_tried():
    out = planned("pocket", rounds=1, epochs=1, n_make=16, n_text=8, think_tokens=2, max_new_tokens=6)
    assert "by a trial" in out["time"] and "each 6 tokens long" in out["assumed"]
    parts = [int(x) for x in re.findall(r"(\d+)%", out["time"])]
    assert len(parts) == 4 and min(parts) > 0 and 98 <= sum(parts) <= 102


def test_a_rank_that_is_too_large_is_refused(tmp_path):
    tiny_model(tiny_tokenizer()).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--r 99: more than the model's width 32"):
        planned(tmp_path, r=99)


def test_a_plan_of_a_mixture_says_what_it_does_not_adapt(tmp_path):
    options = dict(hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=4,
                   num_attention_heads=4,
                   num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, vocab_size=300)
    transformers.Qwen3MoeConfig(**options, architectures=["Qwen3MoeForCausalLM"]).save_pretrained(tmp_path)
    assert "not adapted: the experts (mlp.experts." in planned(tmp_path, rounds=1, epochs=1)["note"]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "Gemma4ForConditionalGeneration",
                                  "Qwen3MoeForCausalLM"])
def test_the_plan_counts_parameters_and_keys_and_values_as_the_model_has_them(name):
    tok = probe_tokenizer()
    model = family_model(name, tok)
    n, blocks = plan.sizes(model), steer.blocks(model)
    forward, cache = steer.cached_forward(model)
    with torch.no_grad():
        forward(some_ids(1, 10), torch.ones(1, 10, dtype=torch.long), torch.arange(10)[None])
    stored = sum(x.numel() for layer in cache.layers for x in (layer.keys, layer.values))
    assert (n["kv"] * len(blocks) * 10, n["parameters"], n["V"]) == (stored,
                                                                     sum(p.numel()
                                                                         for p in model.parameters()),
                                                                     len(tok))
    inside = sum(p.numel() for p in blocks.parameters() if p.dim() > 1)
    # half of four experts of three matrices, in four blocks
    idle = 4 * 3 * 32 * 16 * 4 / 2 if "Moe" in name else 0
    assert sum(n["blocks"]) == inside - idle
