"""Tests of tools/model.py: a checkpoint that works is loaded as asked, and one that does not is one sentence
before any work."""
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from common import family_model, logits_of, probe_tokenizer, some_ids, tiny_model, tiny_tokenizer

import steer
from tools import model as models, template

ROOT = Path(__file__).resolve().parents[1]
DATED = ("{{ '<|system|>Today is ' }}{% if strftime_now is defined %}{{ strftime_now('%d %B %Y') }}{% endif "
         "%}{{ '<|end|>' }}"
         "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if "
         "add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder of a small model whose head is not tied."""
    folder, tok = tmp_path_factory.mktemp("plain"), tiny_tokenizer()
    tiny_model(tok).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(plain, tmp_path):
    return Path(shutil.copytree(plain, tmp_path / "copy"))


def refused(name, **how) -> str:
    with pytest.raises(ValueError) as error:
        models.load(str(name), **{"device": "cpu"} | how)
    text = str(error.value)
    assert len(text) < 450 and "\n" not in text
    return text


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def reweigh(folder, change):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors, "model.layers.1.self_attn.q_proj.weight")
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def halve(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:len(whole) // 2])


def damage(name, content):
    return lambda folder: (folder / name).write_bytes(content)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
BROKEN = {
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), "no chat template.*-it or -Instruct"),
    "template raises": (damage("chat_template.jinja", b"{{ raise_exception('no user here') }}"),
                        "its chat template.*no user here"),
    "template syntax": (damage("chat_template.jinja", b"{% if"), "its chat template: "),
    "half a file": (halve, "damaged.*download it again"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickle.*never loaded"),
    "adapter": (lambda f: (f / "config.json").rename(f / "adapter_config.json"),
                "LoRA adapter: name its base"),
    "adapter beside": (lambda f: shutil.copy(f / "config.json", f / "adapter_config.json"),
                       "an adapter .adapter_config.json. lies beside"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json; expected the folder"),
    "config": (damage("config.json", b"{ no"), "config.json is not a valid JSON"),
    "lfs weights": (damage("model.safetensors", LFS), "model.safetensors is a git-lfs pointer.*git lfs pull"),
    "lfs tokenizer": (damage("tokenizer.json", LFS), "tokenizer.json is a git-lfs pointer.*git lfs pull"),
    "html": (damage("tokenizer.json", b"\n<!DOCTYPE html><html>Please log in</html>"),
             "tokenizer.json is a web page"),
    "half a tokenizer": (damage("tokenizer.json", b'{"version": "1.0", "model": {'),
                         "tokenizer.json is not a valid JSON"),
    "odd tokenizer": (damage("tokenizer.json", b'{"model": 7}'), "its tokenizer .tokenizer.json"),
    "odd special token": (damage("tokenizer_config.json", b'{"pad_token": [[1]], "eos_token": {"a": 1}}'),
                          "its tokenizer|no chat template"),
    "own code": (lambda f: rewrite(f, model_type="odd",
                                   auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}),
                                   "code of its own.*never run"),
    "unknown": (lambda f: rewrite(f, model_type="odd"), "does not know its architecture; pip install -U"),
    "encoder": (lambda f: rewrite(f, model_type="t5", is_encoder_decoder=True), "an encoder and a decoder"),
    "config of no numbers": (lambda f: rewrite(f, hidden_size="wide"), "cannot be used: "),
    "missing": (lambda f: reweigh(f, lambda t, k: t.pop(k)),
                "lack 1 of the weights, such as model.layers.1.self_attn.q_proj.weight"),
    "shapes": (lambda f: reweigh(f, lambda t, k: t.update({k: torch.zeros(3, 3)})), "do not have the shapes"),
    "nan": (lambda f: reweigh(f, lambda t, k: t.update({k: t[k] * math.nan})),
            "not finite in float32; its weights are broken"),
    "vocabulary": (lambda f: rewrite(f, vocab_size=6) or reweigh(f, lambda t, k: t.update(
        {e: t[e][:6].clone() for e in t if len(t[e]) > 200})),
                   "its tokenizer writes token .*, the model has 6"),
    "quantized": (lambda f: rewrite(f, quantization_config=dict(quant_method="gptq", bits=4)),
                  "accelerate|optimum|gptqmodel|GPTQ")}


@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_that_cannot_be_used_is_one_sentence(name, copy, monkeypatch):
    change, message = BROKEN[name]
    change(copy)
    monkeypatch.setattr("builtins.input",
                        lambda *a: pytest.fail("asked whether to run the checkpoint's code"))
    assert re.search(message, refused(copy))


@pytest.mark.parametrize("kind, message", [
    ("GatedRepoError", "gated: accept its licence at https://huggingface.co/maker/model.*HF_TOKEN"),
    ("RepositoryNotFoundError", "the hub has no model of this name"),
    ("RevisionNotFoundError", "the hub has no --revision 'v9'"),
    ("LocalEntryNotFoundError", "cannot be reached")])
def test_what_the_hub_refuses_is_one_sentence(kind, message, monkeypatch):
    from huggingface_hub import errors

    def refuse(*args, **kwargs):
        # without the HTTP answer that its __init__ wants
        raise getattr(errors, kind).__new__(getattr(errors, kind), "no")
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)
    assert re.search(message, refused("maker/model", revision="v9"))


@pytest.mark.parametrize("name, how, message", [
    ("pocket", dict(device="tpu9"), "--device tpu9"), ("a/b/c", {}, "neither a folder"),
    (__file__, {}, "neither a folder"),
    ("maker/model", {}, "hub cannot be reached"), ("nowhere.gguf", {}, "no such file"),
    ("pocket", dict(date="today"), "expected YYYY-MM-DD"),
    ("pocket", dict(device="balanced"), "needs the package accelerate"),
    ("pocket", dict(quantize="4bit"), "needs the package accelerate")])
def test_a_model_that_cannot_be_placed_is_one_sentence(name, how, message, monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda package: None)
    assert message in refused(name, **how)


def test_a_gguf_file_without_its_reader_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(models, "find_spec", lambda package: None)
    assert "pip install gguf" in refused(tmp_path / "m.gguf")


def test_a_gguf_file_that_is_none_is_one_sentence(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(16))
    assert "cannot be used: its header" in refused(tmp_path / "m.gguf")


BASE = dict(hidden_size=32, num_hidden_layers=4)
HEADS = BASE | dict(intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
UNFIT = {"MambaForCausalLM": BASE | dict(state_size=8), "FalconMambaForCausalLM": BASE | dict(state_size=8),
         "MiniMaxForCausalLM": HEADS | dict(num_local_experts=2, block_size=16),
         "RwkvForCausalLM": BASE | dict(context_length=64)}


@pytest.mark.parametrize("name", UNFIT)
def test_an_architecture_that_cannot_be_decoded_in_padded_batches_is_named(name, tmp_path):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    tok, kind = tiny_tokenizer(), getattr(transformers, name)
    torch.manual_seed(0)
    kind(kind.config_class(**UNFIT[name], vocab_size=len(tok), pad_token_id=0, bos_token_id=1,
                           eos_token_id=2)).save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    assert f"the architecture {name}" in refused(tmp_path)


def test_dtype_and_revision_reach_the_checkpoint(copy):
    model, tok = models.load(str(copy), dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16 and not model.training and models.commit_of(model) == ""
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):      # an old GPU has no bfloat16
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
            patch.setattr(torch, "empty", lambda *a, **k: None)
            assert models.placed("auto", "auto") == models.placed("balanced",
                                                                  "auto") == (torch.device("cuda"), dtype)
            patch.setattr(torch.cpu, "get_capabilities", lambda: dict(avx512_bf16=has_bf16), raising=False)
            for stored in (torch.float32, torch.bfloat16, None):                # a CPU keeps float32 as it is
                number = dtype if stored == torch.bfloat16 else torch.float32
                assert models.placed("cpu", "auto", stored) == (torch.device("cpu"), number)


def test_a_branch_of_the_hub_is_resolved_to_its_commit_for_every_file(plain, tmp_path, monkeypatch):
    commit = "0123456789" * 4
    repo = tmp_path / "models--maker--model"
    shutil.copytree(plain, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "v1").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    model, _ = models.load("maker/model", revision="v1", device="cpu")
    assert models.commit_of(model) == commit


def test_a_template_that_writes_the_date_writes_the_runs(copy):
    (copy / "chat_template.jinja").write_text(DATED)
    texts, ids = {}, {}
    for date in ("2026-07-04", "2026-07-05", "2026-07-04"):
        _, tok = models.load(str(copy), device="cpu", date=date)
        texts[date] = steer.render(tok, "Hi")
        ids.setdefault(date, set()).add(template.template_id(tok))
    assert texts["2026-07-04"] == "<|system|>Today is 04 July 2026<|end|><|user|>Hi<|end|><|assistant|>"
    assert "05 July" in texts["2026-07-05"]
    assert [len(x) for x in ids.values()] == [1, 1] and ids["2026-07-04"] != ids["2026-07-05"]
    calls = ("""{{ strftime_now("%Y-%m-%d") }}{{strftime_now( '%d %b' )}}{{ strftime_now(fmt) }}"""
             "{% if strftime_now is defined %}")
    assert template.frozen(calls, "2026-07-04") == (
        '{{ "2026-07-04" }}{{"04 Jul"}}{{ "2026-07-04" }}{% if strftime_now is defined %}')


def test_an_edited_tokenizer_has_another_id(plain, copy):
    content = json.loads((copy / "tokenizer.json").read_text())
    content["added_tokens"][4]["special"] = False
    (copy / "tokenizer.json").write_text(json.dumps(content))
    assert len({template.template_id(transformers.AutoTokenizer.from_pretrained(f))
                for f in (plain, plain, copy)}) == 2


def test_a_template_that_only_the_processor_keeps_is_read(copy):
    text = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    (copy / "chat_template.jinja").unlink()
    _, tok = models.load(str(copy), device="cpu")
    assert steer.render(tok, "Hi") == "<|bos|><|user|>Hi<|end|><|assistant|>"


def test_an_image_text_checkpoint_is_loaded_under_its_own_class(tmp_path):
    tok = probe_tokenizer()
    for name in ("Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration"):
        model = family_model(name, tok)
        model.save_pretrained(tmp_path / name)
        tok.save_pretrained(tmp_path / name)
        again, _ = models.load(str(tmp_path / name), device="cpu")
        assert type(again) is type(model)
        assert torch.equal(logits_of(again, some_ids()), logits_of(model, some_ids()))
