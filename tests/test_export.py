"""Tests of tools/export.py and card.py: each way out of a run is read back, by us and by others' packages."""
import contextlib
import copy
import io
import json
import math
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import safetensors.torch
import torch
import transformers

from common import ROOT, family_model, make_base, make_run, tiny_tokenizer
from lora import attach
from steer import steered
from tools import card as cards, export
from tools.files import read_tensors
from tools.record import read

PROMPTS = [torch.randint(6, 262, (9,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(4)]
CLASSES = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration",
           "GPT2LMHeadModel")


def weights_of(path):
    return safetensors.torch.load_file(path / "model.safetensors")


def case(name, ranks=(4, 2)):
    """A base of this class in float32, and a copy with a stack on it: a round of noise for each rank."""
    model = family_model(name, tiny_tokenizer(), initializer_range=0.1)
    base, stack = copy.deepcopy(model), attach(model, r=ranks[0], alpha=6, layers=[1, 2])
    for rnd, r in enumerate(ranks):
        rng = torch.Generator().manual_seed(rnd)
        stack.load_tensors({f"{name}.0.{which}": 0.1 * torch.randn(shape, generator=rng)
                            for name, l in stack.layers.items()
                            for which, shape in (("A", (r, l.A.shape[1])), ("B", (len(l.B), r)))})
    return base, model, stack


def write(out, model, stack, rank=None, base="somebody/base", **options):
    """What `export.export` does with a stack, without a run folder."""
    proof, pairs = export.witness(stack, model, PROMPTS), export.concatenated(stack)
    R, errors = len(next(iter(pairs.values()))[0]), {}
    if rank is not None:
        pairs, errors = export.compress(pairs, rank)
    with stack.gated(0, 0):
        check = export.write_peft(out, pairs, proof, model, base=base, exact=rank in (None, R), **options)
    return check | dict(lost=errors)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run on the embedded model, exported in both forms: (run folder, what was printed)."""
    path, said = tmp_path_factory.mktemp("run") / "run", io.StringIO()
    make_run(path, "pocket", (4, 2, 2), refused=[2])
    with contextlib.redirect_stdout(said):
        codes = [export.main([str(path), "--to", to]) for to in ("peft", "merged")]
    assert codes == [0, 0]
    return path, said.getvalue()


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run on a tiny base, rounds 0 and 1 accepted and round 2 refused: (base folder, run folder)."""
    path = tmp_path_factory.mktemp("small")
    make_base("LlamaForCausalLM", path / "base")
    make_run(path / "run", path / "base", (4, 2, 2), refused=[2])
    return path / "base", path / "run"


# ---- what others read ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", CLASSES)
def test_peft_reads_our_adapter_as_the_same_model(name, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -r .ci/requirements.txt")
    base, model, stack = case(name)
    check = write(tmp_path / "adapter", model, stack)
    assert check["rank"] == 6 and check["effect_logit"] > 0.1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*adapter keys")  # "Found missing adapter keys": it does none
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ours, read = export.logits_of(model, PROMPTS), export.logits_of(theirs, PROMPTS)
    with theirs.disable_adapter():
        bare = export.logits_of(theirs, PROMPTS)
    assert export.distance(ours, read)[0] < 1e-5 < 0.1 < export.distance(read, bare)[0]
    # and the other way: our reader on what peft itself writes
    theirs.save_pretrained(tmp_path / "by_peft")
    mine, peers = (dict(sorted(export.read_peft(tmp_path / d).items())) for d in ("adapter", "by_peft"))
    assert mine.keys() == peers.keys()
    for (A, B), (A2, B2) in zip(mine.values(), peers.values()):
        assert torch.allclose(B @ A, B2 @ A2, atol=1e-6)


@pytest.mark.parametrize("name", ["Gemma3ForConditionalGeneration", "Qwen3_5ForConditionalGeneration"])
def test_names_follow_the_class_that_the_config_names_and_no_tower_is_lost(name, tmp_path):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    make_base(name, tmp_path / "base")
    make_run(tmp_path / "run", tmp_path / "base", (4, 2))
    images = '{"image_processor_type": "made up"}'
    (tmp_path / "base" / "preprocessor_config.json").write_text(images)
    assert export.export(tmp_path / "run", "peft", out=tmp_path / "peft")["effect_logit"] > 0.1
    names = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["target_modules"]
    assert all(name.startswith("model.language_model.layers.") for name in names) and len(names) >= 14
    export.export(tmp_path / "run", "merged", out=tmp_path / "merged")
    weights, base = (weights_of(tmp_path / d) for d in ("merged", "base"))
    assert weights.keys() == base.keys() and any("vision" in key or "visual" in key for key in weights)
    assert 0 < sum(not torch.equal(weights[key], base[key]) for key in base) == len(names)
    assert (tmp_path / "merged" / "preprocessor_config.json").read_text() == images


def test_gguf_is_byte_identical_to_the_gguf_packages_and_reads_back(tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install -r .ci/requirements.txt")
    vectors = {layer: torch.randn(37, generator=torch.Generator().manual_seed(layer)) for layer in (3, 7, 11)}
    notes = dict(operation="add", pos='["Sei \u00e4hnlich."]', model="")
    export.save_gguf(tmp_path / "ours.gguf", vectors, 0.3, "gemma3", notes)
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "gemma3")
    writer.add_uint32("controlvector.layer_count", 3)
    for key, value in {**notes, "coeff": "0.3"}.items():
        writer.add_string(f"steering.{key}", value)
    for layer, v in vectors.items():
        writer.add_tensor(f"direction.{layer}", (0.3 * v).numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    found, fields = export.read_gguf(tmp_path / "theirs.gguf")
    assert len(found) == 3 and all(torch.equal(found[layer], 0.3 * v) for layer, v in vectors.items())
    assert fields["steering.pos"] == notes["pos"]


def test_a_rounds_vector_becomes_files_with_its_dose_and_persona_pair(small_run, tmp_path):
    base, path = small_run
    vectors = export.read_vectors(path / "rounds" / "01" / "vectors.safetensors")[0]
    for to in ("gguf", "vectors"):
        assert export.main([str(path), "--to", to, "--round", "1", "--out", str(tmp_path / to)]) == 0
    directions, fields = export.read_gguf(tmp_path / "gguf" / "night1.gguf")
    raw, dose, notes = export.read_vectors(tmp_path / "vectors" / "night1.safetensors")
    assert dose == 1.3 and all(torch.equal(raw[layer], v) for layer, v in vectors.items())
    assert fields["controlvector.model_hint"] == "llama" and fields["steering.coeff"] == "1.3"
    for key, value in dict(pos='["You care about people above all."]', neg='["You obey."]', model="base",
                           hook="block_output", fitted_on="base + the adapters of rounds 0").items():
        assert notes[key] == fields[f"steering.{key}"] == value
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    logits = []
    for found, coeff in ((vectors, 1.3), (directions, 1.0), (raw, dose), (vectors, 0.0)):
        with steered(model, found, coeff):
            logits.append(export.logits_of(model, PROMPTS[:1])[0])
    assert [torch.equal(logits[0], other) for other in logits] == [True, True, True, False]


def test_vectors_that_cannot_serve_are_refused_and_leave_nothing(small_run, tmp_path, monkeypatch, capsys):
    v = torch.ones(8)
    for vectors, coeff, message in (({0: v}, 0.7, "block 0"), ({1: v}, 0.0, "zero or not finite"),
                                    ({1: v / 0}, 1.0, "zero or not finite")):
        with pytest.raises(ValueError, match=message):
            export.write_vectors(tmp_path / "x", "gguf", "v", vectors, coeff, "llama", {})
    with pytest.raises(ValueError, match="not a GGUF"):
        export.read_gguf(small_run[1] / "rounds" / "00" / "vectors.safetensors")
    monkeypatch.setattr(export, "read_gguf", lambda path: ({1: v}, {}))
    assert export.main([str(small_run[1]), "--to", "gguf", "--out", str(tmp_path / "x")]) == 1
    assert "not the dose that was written" in capsys.readouterr().err and os.listdir(tmp_path) == []


# ---- the proof -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("factor", [0, 1.01, math.nan])
def test_what_is_not_the_runs_model_fails_and_leaves_nothing(factor, tmp_path, monkeypatch):
    _, model, stack = case("LlamaForCausalLM")
    read = export.read_peft
    monkeypatch.setattr(export, "read_peft",
                        lambda path: {name: (A, factor * B) for name, (A, B) in read(path).items()})
    with pytest.raises(RuntimeError, match="off by"):
        write(tmp_path / "x", model, stack)
    assert os.listdir(tmp_path) == []


def test_a_mismatch_is_exit_code_one(small_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "read_peft", lambda path: {})
    assert export.main([str(small_run[1]), "--to", "peft", "--out", str(tmp_path / "x")]) == 1
    assert "nothing was written" in capsys.readouterr().err and os.listdir(tmp_path) == []


def test_a_nan_in_one_prompt_is_not_lost():
    x = [torch.zeros(2, 5) for _ in range(3)]
    for i in range(3):
        bad = [y + float("nan") if i == j else y for j, y in enumerate(x)]
        assert all(math.isnan(number) for number in export.distance(x, bad)), i
        with pytest.raises(RuntimeError, match="off by nan"):
            export.prove(export.Witness([], x, x), bad, torch.float32, rounded="update")


def test_what_does_nothing_fails_even_where_the_dtypes_bound_is_loose():
    run = [torch.randn(5, 9, generator=torch.Generator().manual_seed(0))]
    base = [run[0] + 1e-3 * torch.randn(5, 9, generator=torch.Generator().manual_seed(1))]
    proof = export.Witness([], run, base)
    with pytest.raises(RuntimeError, match="loses the run's effect"):
        export.prove(proof, base, torch.bfloat16, rounded="weights")
    assert export.prove(proof, run, torch.bfloat16, rounded="weights")["logit"] == 0
    proof = export.Witness([], run, run)                        # a run of no effect
    assert export.prove(proof, run, torch.float32, rounded="update")["effect_kl"] == 0


def test_an_adapter_named_for_another_class_is_refused_and_leaves_nothing(tmp_path):
    _, model, stack = case("LlamaForCausalLM")
    other, _, _ = case("Gemma3ForConditionalGeneration")
    with pytest.raises(ValueError, match="Gemma3ForConditionalGeneration has no nn.Linear model.layers.1"):
        proof = export.witness(stack, model, PROMPTS)
        export.write_peft(tmp_path / "x", export.concatenated(stack), proof, other, base="b")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype, roundoff", [("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 8e-3)])
def test_the_difference_is_that_of_the_files_dtype(dtype, roundoff, tmp_path):
    _, model, stack = case("Qwen3ForCausalLM")
    stack.gates([1.0, 0.5])                                     # they are in the file, and do not count twice
    check = write(tmp_path / "x", model, stack, dtype=export.DTYPES[dtype])
    effect = check["effect_logit"]
    assert check["logit"] < roundoff * effect
    assert check["logit"] < check["bound"] < 5 * roundoff * effect + 1e-4
    assert next(iter(stack.layers.values())).history == (1.0, 0.5)


def test_rank_compresses_to_the_best_of_that_rank_and_its_error_is_the_frobenius_one(tmp_path):
    _, model, stack = case("LlamaForCausalLM")
    pairs = export.concatenated(stack)
    for rank in (1, 3, 6):
        small, errors = export.compress(pairs, rank)
        delta, near = ([(B @ A).double() for A, B in ps.values()] for ps in (pairs, small))
        best = []
        for d in delta:
            U, S, Vt = torch.linalg.svd(d)
            best.append(U[:, :rank] * S[:rank] @ Vt[:rank])
        off = sum((d - n).square().sum() for d, n in zip(delta, near)) / sum(d.square().sum() for d in delta)
        assert errors[rank] == pytest.approx(off.sqrt().item(), abs=1e-6)
        assert all(torch.allclose(b, n, atol=1e-6) for b, n in zip(best, near))
    check = write(tmp_path / "x", model, stack, rank=4)
    assert list(check["lost"]) == [1, 2, 4, 6] and check["rank"] == 4
    assert check["lost"][6] < 1e-6 < check["lost"][4] < check["lost"][1]
    assert 1e-4 < check["logit"] < check["effect_logit"]
    assert {len(A) for A, _ in export.read_peft(tmp_path / "x").values()} == {4}


# ---- from a run folder -----------------------------------------------------------------------------------

def test_export_writes_what_is_needed_and_prints_what_was_measured(exported):
    path, said = exported
    assert said.count("largest |logit| difference") == 2
    assert "--max-lora-rank 8 " in said and "rounds 0, 1, rank 6" in said
    assert set(os.listdir(path / "peft")) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {"config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json",
            "model.safetensors"} <= set(os.listdir(path / "merged"))
    config = json.loads((path / "peft" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 6 and not config["use_rslora"]
    keys = read_tensors(path / "peft" / "adapter_model.safetensors")[0].keys()
    names = config["target_modules"]
    assert keys == {f"base_model.model.{name}.lora_{x}.weight" for name in names for x in "AB"}
    ours, theirs = (at / "generation_config.json" for at in (path / "merged", ROOT / "pocket"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert not [name for name in os.listdir(path) if name[0] == "."]                    # nothing temporary


def test_merged_is_the_sum_rounded_once_and_the_rest_bit_for_bit(exported):
    path = exported[0]
    weights, base = weights_of(path / "merged"), weights_of(ROOT / "pocket")
    pairs = [read_tensors(path / "rounds" / rnd / "adapter.safetensors")[0] for rnd in ("00", "01")]
    assert weights.keys() == base.keys()
    for key, W in base.items():
        A, B = f"{key.removesuffix('.weight')}.0.A", f"{key.removesuffix('.weight')}.0.B"
        if A in pairs[0]:
            update = torch.cat([p[B] for p in pairs], 1) @ torch.cat([p[A] for p in pairs])
            want = (W.float() + update).to(W.dtype)
            assert torch.equal(weights[key], want) and not torch.equal(weights[key], W)
        else:
            assert torch.equal(weights[key], W), key


def test_a_local_base_is_written_as_the_path_that_loads_and_the_card_names_it_only(
        small_run, tmp_path, monkeypatch, capsys):
    base, path = small_run
    shutil.copytree(path, tmp_path / "run")
    meta = json.loads((tmp_path / "run" / "run.json").read_text())
    given = f"{base.parent.name}/base"                          # below where the run began, like a hub id
    meta["options"]["model"] = meta["argv"][0] = given
    (tmp_path / "run" / "run.json").write_text(json.dumps(meta))
    monkeypatch.chdir(base.parent.parent)
    assert export.main([str(tmp_path / "run"), "--to", "peft"]) == 0
    config = json.loads((tmp_path / "run" / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["revision"] is None
    assert f"vllm serve {base} " in capsys.readouterr().out
    card = (tmp_path / "run" / "peft" / "README.md").read_text()
    assert "local folder" in card and "python loop.py base --rounds 3" in card
    assert str(base) not in card and "/tmp" not in card
    monkeypatch.chdir(tmp_path)                                         # from anywhere else
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -r .ci/requirements.txt")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "peft")
    assert sum(name.endswith("lora_A.default.weight") for name, _ in theirs.named_parameters()) == 14


def test_a_hub_base_is_pinned_to_its_commit_wherever_it_is_named(small_run, tmp_path):
    base, path = small_run
    first, second = "a" * 40, "b" * 40
    cache = tmp_path / "hub" / "models--somebody--base"
    for commit, ref in ((first, "v1"), (second, "main")):
        shutil.copytree(base, cache / "snapshots" / commit)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / ref).write_text(commit)
    moved = {key: W + 1 if key.endswith("norm.weight") else W for key, W in weights_of(base).items()}
    safetensors.torch.save_file(moved, cache / "snapshots" / second / "model.safetensors", {"format": "pt"})
    shutil.copytree(path, tmp_path / "run")
    run = json.loads((path / "run.json").read_text())
    run["options"] |= dict(model="somebody/base", revision="v1")
    run["argv"] = ["somebody/base", "--revision", "v1"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    code = ("import sys; from tools import export; "
            "sys.exit(max(export.main([sys.argv[1], '--to', to]) for to in ('peft', 'vectors')))")
    around = os.environ | dict(HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], cwd=ROOT, capture_output=True,
                         text=True, env=around)
    assert out.returncode == 0, out.stderr
    assert f"vllm serve somebody/base --revision {first} " in out.stdout
    config = json.loads((tmp_path / "run" / "peft" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("somebody/base", first)
    card = (tmp_path / "run" / "peft" / "README.md").read_text()
    assert f'from_pretrained("somebody/base", revision="{first}")' in card and f"--revision {first}" in card
    assert "python loop.py somebody/base --revision v1" in card and f"at revision {first}" in card
    notes = export.read_vectors(tmp_path / "run" / "vectors" / "night0.safetensors")[2]
    assert (notes["model"], notes["revision"]) == ("somebody/base", first)


def test_each_way_of_exporting_has_a_folder_of_its_own(small_run, tmp_path):
    shutil.copytree(small_run[1], tmp_path / "run")
    ways = [[], ["--rank", "5"], ["--round", "0"], ["--dtype", "float16"], ["--rank", "3", "--round", "0"]]
    assert [export.main([str(tmp_path / "run"), "--to", "peft", *way]) for way in ways] == [0] * 5
    names = {"peft", "peft-r5", "peft-round0", "peft-float16", "peft-r3-round0"}
    assert names <= set(os.listdir(tmp_path / "run"))
    assert export.folder_name("merged", None, 2, "auto") == "merged-round2"
    assert export.main([str(tmp_path / "run"), "--to", "peft", "--rank", "5"]) == 2     # the same again


def test_a_refused_round_is_exported_where_it_is_named_and_says_so(small_run, tmp_path, capsys):
    _, path = small_run
    assert export.main([str(path), "--to", "peft", "--round", "2", "--out", str(tmp_path / "x")]) == 0
    said, card = capsys.readouterr().out, (tmp_path / "x" / "README.md").read_text()
    for words in ("warning  round 2 did not pass", "text 0.910 under 0.931", "rounds 0, 1, 2, rank 8"):
        assert words in said
    assert "Round 2 did not pass the run's own acceptance check" in card and "| day 2 |" in card
    assert export.main([str(path), "--to", "gguf", "--round", "2", "--out", str(tmp_path / "y")]) == 0
    assert "warning  round 2" in capsys.readouterr().out


# ---- the card --------------------------------------------------------------------------------------------

CHECK = dict(logit=0.0, kl=0.0, effect_logit=1.0, effect_kl=1.0, rank=8)


def card_of(small_run, change=lambda record: None, to="peft"):
    record = read(small_run[1])
    change(record)
    base = cards.Base("/home/me/models/base", "", "base", None)
    return cards.model_card(record, base, record.accepted, ["--to", to, "--round", "1"], to, CHECK)


def test_the_card_has_front_matter_and_table_and_no_local_path(exported):
    for to, relation in (("peft", "adapter"), ("merged", "finetune")):
        card = (exported[0] / to / "README.md").read_text()
        front = dict(line.split(": ", 1) for line in card.split("---\n")[1].splitlines())
        assert front["base_model"] == '"pocket"' and front["base_model_relation"] == f'"{relation}"'
        assert front["pipeline_tag"] == '"text-generation"' and "| day 1 | 0.00 | +0.200 " in card
        assert "You care about people above all" in card and "python loop.py pocket --rounds 3\n" in card
        assert f"python loop.py export RUN --to {to} --round 1\n" in card
        assert str(exported[0].parent) not in card and "/tmp" not in card and str(ROOT) not in card


def test_the_card_says_what_the_barrier_did(small_run):
    def heals(**values):
        return lambda record: [e.update(values) for e in record.events if e["stage"] == "heal"]
    assert "fired in 25% of 16 training steps" in card_of(small_run)
    silent = card_of(small_run, heals(fired_share=0.0))
    none = card_of(small_run, heals(fired_share=0.0, lam_eff=0.0))
    assert "never fired, so it has changed nothing" in silent and "without a barrier" in none


def test_the_card_of_a_trait_that_no_foundation_stands_for_leaves_it_out(small_run):
    def bare(record):
        record.run["persona"] |= dict(target=None, direction=None)
        for row in record.rows():
            row.update(trait=None, trait_se=None, shift=None)
    card = card_of(small_run, bare)
    assert "Trait: nats" not in card and "| day 1 | 0.00 | - ± - | - | 0.9900 |" in card


def test_the_card_escapes_model_text(small_run):
    evil = "\"><img src=x onerror=1> [a](javascript:x)\x1b[31m\u202e\x00\n---\n# b {base}"

    def poison(record):
        for row in record.rows():
            row["label"] = evil
            for entry in row["diary"]:
                entry["text"] = entry["prompt"] = evil
        record.run["persona"] |= dict(pos=[evil], neg=[evil])
        record.run["options"] |= dict(persona=evil)
        record.run["argv"] += ["--pos", evil + "```"]
    card = card_of(small_run, poison)
    text = "".join(part for i, part in enumerate(card.split("```")) if i % 2 == 0)      # outside the fences
    assert card.count("```") == 6 and "<img" not in text and "](java" not in text
    assert not set(card) & set("\x00\x1b\u202e")


@pytest.mark.parametrize("argv, model, shown", [
    (["--out", "/home/me/runs", "--seed", "1"], "pocket", "--out runs --seed 1"),
    (["--prompts=../mine/p.txt", "C:\\models\\llama"], "C:\\models\\llama", "--prompts=p.txt llama"),
    (["google/gemma-3-4b-it", "--out", "~/x y/z"], "google/gemma-3-4b-it", "google/gemma-3-4b-it --out z"),
    (["/data/base/", "--pos", "You weigh and/or."], "/data/base/", "base --pos 'You weigh and/or.'")])
def test_the_command_to_repeat_shows_no_path(argv, model, shown):
    is_hub = model.startswith("google")
    base = cards.Base(model, "", model if is_hub else cards.last_part(f"./{model}"), None)
    assert cards.without_paths(argv, base, model) == "python loop.py " + shown


@pytest.mark.parametrize("rank, flag", [(1, "--max-lora-rank 1 "), (16, "--max-lora-rank 16 "),
                                        (257, "--max-lora-rank 320 "), (513, "vLLM takes ranks up to 512")])
def test_the_serve_line_names_the_rank_that_vllm_allows(rank, flag):
    assert flag in cards.serve_line("peft", dict(rank=rank), cards.Base("b", "", "b", None), "x")


# ---- wrong inputs ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def places(small_run, tmp_path_factory):
    """Bases and runs with one thing wrong, by name."""
    (base, path), top = small_run, tmp_path_factory.mktemp("wrong")
    found = {name: top / name for name in
             "full empty other adapted base4 rejected moved quantised torn".split()}
    for name in ("full", "empty", "base4"):
        found[name].mkdir()
    (found["full"] / "mine.txt").write_text("keep me")
    for name in ("other", "adapted"):
        shutil.copytree(base, found[name])
    weights = {key: W * 1.5 for key, W in weights_of(base).items()}
    safetensors.torch.save_file(weights, found["other"] / "model.safetensors", {"format": "pt"})
    (found["adapted"] / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    quantised = dict(quantization_config=dict(quant_method="bitsandbytes", load_in_4bit=True))
    config = json.loads((base / "config.json").read_text()) | quantised
    (found["base4"] / "config.json").write_text(json.dumps(config))
    for name, model in (("rejected", base), ("moved", top / "gone" / "base"), ("quantised", found["base4"]),
                        ("torn", base)):
        shutil.copytree(path, found[name])
        run = json.loads((found[name] / "run.json").read_text())
        run["options"]["model"] = str(model)
        (found[name] / "run.json").write_text(json.dumps(run))
    events = (path / "events.jsonl").read_text().replace('"accepted": true', '"accepted": false')
    (found["rejected"] / "events.jsonl").write_text(events)
    adapter = found["torn"] / "rounds" / "01" / "adapter.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-50])
    return found


@pytest.mark.parametrize("argv, message", [
    (["--rank", "0"], "--rank 0: the rounds have rank 6"), (["--rank", "7"], "1 to 6"),
    (["--round", "3"], "--round 3"), (["--out", "{full}"], "not empty"), (["--base", "{empty}"], "cannot be"),
    (["--base", "{other}"], "not those of the run"), (["--base", "{adapted}"], "adapter"),
    (["--to", "merged", "--rank", "4"], "--rank is for --to peft"),
    (["--to", "gguf", "--dtype", "float16"], "--dtype is for"),
    (["--to", "vectors", "--round", "7"], "rounds with vectors: 0, 1, 2"), (["{empty}"], "not a run folder"),
    (["{rejected}"], "no accepted round"), (["{moved}"], "If the base has moved: --base"),
    (["{torn}"], "adapter.safetensors"), (["{quantised}", "--to", "merged"], "is quantised")])
def test_wrong_inputs_are_named_and_leave_nothing(argv, message, small_run, places, tmp_path, capsys):
    argv = [word.format(**places) for word in argv]
    run = argv.pop(0) if argv[0].startswith("/") else str(small_run[1])
    to = [] if "--to" in argv else ["--to", "peft"]
    out = [] if "--out" in argv else ["--out", str(tmp_path / "out")]
    code = export.main([run, *to, *out, *argv])
    err = capsys.readouterr().err
    assert code == 2 and message in err and "Traceback" not in err, err
    assert os.listdir(tmp_path) == [] and os.listdir(places["full"]) == ["mine.txt"]
