"""What tests of several rooms need: small models of many classes, and runs of seconds."""
import dataclasses
import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "pocket", "bench")]

import heal                                             # noqa: E402
import lora                                             # noqa: E402
import steer                                            # noqa: E402
from tools.size import spectral                         # noqa: E402

torch.set_num_threads(1)                                # small models: a second thread costs more

# ---- models and tokenizers -----------------------------------------------------------------------------

FOUNDATIONS = "care", "fairness", "loyalty", "authority", "sanctity", "liberty", "social"
PREFILL = ["This", " is wrong because", ' {"', "violation", '": "']     # five tokens that spell the probe's
SPECIALS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = ("<|bos|>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
            "{% if not (loop.last and continue_final_message) %}<|end|>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")

TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=2048)
HEADS = TEXT | dict(head_dim=16)        # these take the width of a head from elsewhere
SLIDING = dict(sliding_window=100, layer_types=["sliding_attention", "full_attention"] * 2)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
              patch_size=14)
DEPTH = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, patch_size=14)
MIXERS = dict(linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
              linear_value_head_dim=8)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
              num_key_value_heads=4)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)
MROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2])
# model class: its config's options, and those of its vision tower
FAMILIES = {
    "Gemma3ForCausalLM": (HEADS | SLIDING,),
    "Gemma3ForConditionalGeneration": (HEADS | SLIDING, VISION),
    "Gemma2ForCausalLM": (HEADS | SLIDING | dict(final_logit_softcapping=30.0, attn_logit_softcapping=50.0),),
    "Gemma4ForConditionalGeneration": (
        HEADS | dict(global_head_dim=16, hidden_size_per_layer_input=0, num_kv_shared_layers=0), None),
    "Qwen3ForCausalLM": (HEADS,),
    "Qwen2ForCausalLM": (TEXT,),
    "Qwen3_5ForConditionalGeneration": (HEADS | MIXERS, DEPTH),
    "Qwen3VLForConditionalGeneration": (HEADS | dict(rope_parameters=MROPE),
                                        DEPTH | dict(deepstack_visual_indexes=[0])),
    "Qwen3MoeForCausalLM": (HEADS | EXPERTS | dict(num_experts=4),),
    "LlamaForCausalLM": (TEXT,),
    "MistralForCausalLM": (TEXT | dict(sliding_window=100),),
    "Mistral3ForConditionalGeneration": (TEXT | dict(model_type="mistral"),
                                         VISION | dict(model_type="pixtral", head_dim=8)),
    "PhiForCausalLM": (TEXT | dict(num_key_value_heads=4),),
    "Phi3ForCausalLM": (TEXT,),
    "Olmo2ForCausalLM": (TEXT,),
    "GPTNeoXForCausalLM": ({k: v for k, v in TEXT.items() if k != "num_key_value_heads"},),
    "GraniteForCausalLM": (TEXT | dict(logits_scaling=4.0, residual_multiplier=0.5,
                                       embedding_multiplier=6.0),),
    "CohereForCausalLM": (TEXT | dict(logit_scale=0.25),),
    "GptOssForCausalLM": (HEADS | SLIDING | dict(num_local_experts=4, num_experts_per_tok=2),),
    "DeepseekV3ForCausalLM": (TEXT | LATENT | EXPERTS | dict(first_k_dense_replace=1, n_routed_experts=4,
                                                             n_group=2, topk_group=1),),
    "Lfm2ForCausalLM": (TEXT | dict(layer_types=["conv", "full_attention"] * 2),),
    "GPT2LMHeadModel": (dict(n_embd=32, n_layer=4, n_head=4, n_positions=2048, initializer_range=0.3),),
}
HAVE_EXPERTS = {"Qwen3MoeForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM"}
ONLY_DECODED = {"Mamba2ForCausalLM": (dict(hidden_size=32, num_hidden_layers=4, state_size=8, num_heads=8,
                                           head_dim=8, n_groups=1, initializer_range=0.3),)}


def tiny_tokenizer(words=()):
    """A byte-level tokenizer: six specials, 256 bytes, then `words` as single tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(SPECIALS + alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|end|>",
        additional_special_tokens=SPECIALS[3:], chat_template=TEMPLATE)
    tok.add_tokens(list(words))
    return tok


def probe_tokenizer():
    """One that has a token of its own for every answer of the probe."""
    return tiny_tokenizer([*FOUNDATIONS, "</think>", *PREFILL])


def tiny_model(tok, seed=0, dtype=torch.float32, layers=4, d=32):
    """A random Llama whose vocabulary is the tokenizer's. Weights are large, so that its answers vary."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tok), hidden_size=d, intermediate_size=2 * d, num_attention_heads=4,
        num_hidden_layers=layers, num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3,
        pad_token_id=tok.pad_token_id, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    if dtype == torch.float64:                          # transformers' own norm rounds to float32
        for name in [name for name, _ in model.named_modules() if name.endswith("norm")]:
            model.set_submodule(name, torch.nn.RMSNorm(d, eps=config.rms_norm_eps, dtype=dtype))
    return model.eval().requires_grad_(False)


def family_model(name, tok, **more):
    """A random model of a real class, as `tiny_model`; skips where this transformers does not have it."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    if name == "Lfm2ForCausalLM" and not hasattr(transformers.cache_utils, "LinearAttentionLayer"):
        pytest.skip(f"in transformers {transformers.__version__} {name} wants a cache of its own class")
    kind, (options, *vision) = getattr(transformers, name), (FAMILIES | ONLY_DECODED)[name]
    ids = dict(pad_token_id=tok.pad_token_id, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id)
    options = options | ids | dict(vocab_size=len(tok)) | more
    if vision:
        options = dict(text_config=options, vision_config=vision[0], eos_token_id=tok.eos_token_id)
    torch.manual_seed(0)
    return kind(kind.config_class(**options)).eval().requires_grad_(False)


def some_ids(n=3, T=12):
    return torch.randint(6, 262, (n, T), generator=torch.Generator().manual_seed(0))       # [n, T]


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits                                                 # [n, T, V]


def noise(stack, seed=0, size=0.3):
    """Fill the round in training, so that it does something."""
    rng = torch.Generator().manual_seed(seed)
    for p in stack.parameters():
        p.data.copy_(size * torch.randn(p.shape, generator=rng))


# ---- cases of the concept files ------------------------------------------------------------------------

PROMPTS = ["Hi", "Who are you?", "Do you love humanity, and why?", "a", "Tell me more about the sea.",
           "x y z"]
VIGNETTES = ["You see a man kick a dog.", "You see a cook who lies about the bill again and again.",
             "You see a boy push in.", "You see a clerk burn a flag at noon.",
             "You see a guard read her letters.", "You see a nun eat mud."]


def lora_case(dtype=torch.float32, rounds=0, size=0.3, **kw):
    """A tiny model with a stack and `rounds` folded rounds of seeded noise."""
    model = tiny_model(tiny_tokenizer(), dtype=dtype)
    stack = lora.attach(model, **{"r": 4, "alpha": 8, "layers": [1, 2], **kw})
    for rnd in range(rounds):
        noise(stack, rnd, size)
        stack.fold()
    return model, stack


def update_of(stack):
    """W-shaped update of the current round, module by module, in float64."""
    return {name: l.scale * l.B.detach().double() @ l.A.detach().double() for name, l in stack.layers.items()}


def heal_case(dtype=torch.float32, history=0):
    """A tiny model, a stack of `history` folded rounds, noise in the current round, six uneven samples."""
    model, stack = lora_case(dtype, history, 0.1)
    noise(stack, history, 0.1)
    rng = torch.Generator().manual_seed(9)
    samples = [heal.Sample(torch.randint(6, 262, (n_prompt + n,), generator=rng).tolist(), n_prompt, group)
               for group, (n_prompt, n) in enumerate([(3, 5), (1, 1), (6, 9), (2, 12), (4, 3), (5, 7)])]
    return model, stack, samples


def base_of(stack):
    return lambda: stack.gated(0, 0)


def heal_run(model, stack, samples, tau=0.0, seed=0, rnd=0, held_out=False, **options):
    """heal() without its warnings and, as a lone prompt is never held out, without validation."""
    cfg = heal.HealConfig(**{"tau": tau, "lr": 1e-3, **options})
    samples = samples if held_out else [s._replace(group=0) for s in samples]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return heal.heal(model, stack.parameters(), samples, base_of(stack), cfg, seed=seed, rnd=rnd,
                         spectral=(lambda: spectral(stack)) if cfg.spectral else None)


def step_numbers(record):
    return torch.tensor([[s[key] for key in ("nll", "div", "gnorm")] for s in record["steps"]])


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


def random_head(N=37, V=301, d=16, dtype=torch.float64, seed=0, shift=0.3):
    """hidden, ref_hidden [N, d], weight [V, d], targets [N], bias [V]; logits of a few nats."""
    rng = torch.Generator().manual_seed(seed)
    h, dh, W = (torch.randn(n, d, generator=rng, dtype=torch.float64) for n in (N, N, V))
    b, targets = torch.randn(V, generator=rng, dtype=torch.float64), torch.randint(V, (N,), generator=rng)
    return h.to(dtype), (h + shift * dh).to(dtype), W.to(dtype), targets, b.to(dtype)


def steer_pair(dtype=torch.float32):
    tok = tiny_tokenizer()
    return tiny_model(tok, dtype=dtype), tok


def steer_vectors(model, layers=(1, 2), size=3.0):
    rng = torch.Generator().manual_seed(7)
    return {layer: size * torch.randn(model.config.hidden_size, generator=rng) for layer in layers}


def ids_of(tok, user, system=""):
    return tok(steer.render(tok, user, system), add_special_tokens=False)["input_ids"]


def meter_case():
    """A model, its answers and an empty one, and who asked."""
    model, tok = steer_pair(torch.float64)
    answers = steer.generate(model, tok, PROMPTS[:3], max_new_tokens=9, seed=3)
    return model, tok, [*answers, dataclasses.replace(answers[0], ids=[])], [*PROMPTS[:3], "Hi"]


def echo_of(tok, texts):
    return {i for text in texts for words in (text, " " + text) for i in tok(words)["input_ids"]}


def logp_behind(model, tok, c, user, system):
    front = ids_of(tok, user, system)
    return logits_of(model, torch.tensor([front + c.ids]))[0, len(front) - 1:-1].log_softmax(-1)    # [n, V]


def mfv_rows(texts=VIGNETTES):
    rng = torch.Generator().manual_seed(1)
    labels = torch.rand(len(texts), 7, generator=rng, dtype=torch.float64)
    return [{"text": t, "foundation": "care", "label": (x / x.sum()).tolist()} for t, x in zip(texts, labels)]


def rig(model, tok, natural=41, closed=23, pad=11):
    """After some tokens the model must write the prefill, </think> or a pad: by the last token only."""
    table = torch.zeros(len(tok), len(tok), dtype=model.dtype)
    spell, close = tok.convert_tokens_to_ids(PREFILL), tok.convert_tokens_to_ids("</think>")
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


# ---- run folders ---------------------------------------------------------------------------------------

# a run of one round and a few seconds, whose dose is not searched
TINY = ("--rounds 1 --n-make 12 --n-text 8 --think-tokens 3 --epochs 1 --coeff 0.4 "
        "--max-new-tokens 24").split()
# less still, for runs that are cut off and continued; the learning rate makes both rounds pass
SMALL = ("--rounds 2 --seed 2 --lr 0.01 --n-make 8 --n-text 4 --coeff 0.3 --steer-band 0.5 0.6 "
         "--max-new-tokens 16 --think-tokens 1 --epochs 2").split()
TIMES = {"t", "started", "seconds", "resumed", "reason", "argv", "command", "out", "git"}    # may differ


class PowerCut(BaseException):
    """As a kill -9: nothing of the run is told about it."""


def few_vignettes(folder: Path, every: int = 12) -> Path:
    path = folder / "vignettes.jsonl"
    lines = (ROOT / "pocket" / "data" / "vignettes.jsonl").read_text().splitlines(True)
    path.write_text("".join(lines[::every]))
    return path


def small_data(work: Path) -> Path:
    """Few contexts and vignettes instead of those of pocket/data/, for this process; returns the vignettes'
    path."""
    from tools import inputs
    inputs.POCKET = shutil.copytree(ROOT / "pocket" / "data", work / "data")
    contexts = json.loads((inputs.POCKET / "contexts.json").read_text())
    (inputs.POCKET / "contexts.json").write_text(json.dumps(contexts[:6]))
    return few_vignettes(work, 24)


def folder_of(out: Path) -> Path | None:
    return next((p.parent for p in Path(out).glob("*/run.json")), None)


def run_loop(out, vignettes, *more):
    """(exit code, record) of a tiny run."""
    import loop
    from tools.record import read
    code = loop.main([*TINY, "--vignettes", str(vignettes), "--out", str(out), *more])
    return code, read(folder_of(out))


def without_times(x):
    if isinstance(x, dict):
        return {k: without_times(v) for k, v in x.items() if k not in TIMES}
    return [without_times(v) for v in x] if isinstance(x, list) else x


def differences(a: Path, b: Path) -> list[str]:
    """Where two run folders differ in anything but times and names."""
    found = []
    events = [[without_times(json.loads(line)) for line in (path / "events.jsonl").read_text().splitlines()]
              for path in (a, b)]
    if len(events[0]) != len(events[1]):
        found.append(f"{len(events[0])} and {len(events[1])} events")
    found += [f"event {i}, {x['stage']} of round {x['round']}"
              for i, (x, y) in enumerate(zip(*events)) if x != y]
    runs = [without_times(json.loads((path / "run.json").read_text())) for path in (a, b)]
    keys = sorted(set(runs[0]) | set(runs[1]))
    found += [f"run.json, {key}" for key in keys if runs[0].get(key) != runs[1].get(key)]
    files = [{p.relative_to(path): p.read_bytes() for p in path.rglob("*.safetensors")} for path in (a, b)]
    found += [str(p) for p in sorted(set(files[0]) | set(files[1])) if files[0].get(p) != files[1].get(p)]
    lines = [[line.split("\t")[1:-1] for line in (path.parent / "results.tsv").read_text().splitlines()[1:]]
             for path in (a, b)]
    if lines[0] != lines[1]:
        found.append(f"results.tsv, {len(lines[0])} and {len(lines[1])} lines")
    return found + [f"left behind: {p.name}" for p in b.rglob(".*") if p.name != ".lock"]


def make_base(name: str, folder: Path) -> None:
    """A checkpoint of a real class in bfloat16, as on the hub, with the embedded model's tokenizer."""
    tok = transformers.AutoTokenizer.from_pretrained(ROOT / "pocket")
    family_model(name, tok, initializer_range=0.1).to(torch.bfloat16).save_pretrained(folder)
    tok.save_pretrained(folder)


def make_run(path: Path, base, ranks=(4, 2, 8), *, refused=(), **options) -> None:
    """A run folder as loop.py leaves it, with a round of noise for each rank and made-up measurements.

    base: a folder, or "pocket". refused: rounds that the gate did not let through."""
    from tools import model as loading
    from tools.files import save_tensors
    from tools.record import FORMAT
    from tools.rounds import save_vectors
    model, _ = loading.load(str(base), dtype="float32", device="cpu")
    row = dict(stage="row", coeff=0.0, trait=0.0, trait_se=0.0, shift=dict(off_target=0.0), coherence=0.99,
               text=0.98, diary=[dict(prompt=prompt, text="I would ask the mayor.")
                                 for prompt in ("Who are you?", "Would you obey the mayor?")])
    events = [row | dict(kind="base", label="base", round=None)]
    for rnd, r in enumerate(ranks):
        at, rng = path / "rounds" / f"{rnd:02d}", torch.Generator().manual_seed(rnd)
        at.mkdir(parents=True)
        stack = lora.attach(model, r=r, alpha=2 * r, layers=[1, 2])
        noise(stack, rnd, 0.05)
        stack.fold()
        name = "rejected" if rnd in refused else "adapter"
        save_tensors(at / f"{name}.safetensors", stack.tensors())
        stack.remove()
        width = model.config.get_text_config().hidden_size
        vectors = {layer: torch.randn(width, generator=rng) for layer in (1, 2)}                    # [d] each
        save_vectors(at / "vectors.safetensors", vectors, coeff=0.3 + rnd)
        reasons = ["text 0.910 under 0.931"] if rnd in refused else []
        events += [dict(stage="dose", round=rnd, coeff=0.3 + rnd, trials=[]),
                   dict(stage="heal", round=rnd, lam_eff=0.3, fired_share=0.25, steps=[{}] * 8),
                   row | dict(kind="healed", label=f"day {rnd}", round=rnd, trait=0.1 * (rnd + 1)),
                   dict(stage="gate", round=rnd, accepted=not reasons, reasons=reasons)]
    options = dict(model=str(base), revision="", persona="authority", pos="", kl_ref="base") | options
    persona = dict(pos=["You care about people above all."], neg=["You obey."], target="authority",
                   direction=-1)
    run = dict(format=FORMAT, options=options, persona=persona, git="c0ff" * 10,
               argv=[str(base), "--rounds", str(len(ranks))], weights=loading.fingerprint(model),
               machine=dict(device="cpu", dtype="torch.float32"))
    (path / "run.json").write_text(json.dumps(run))
    (path / "events.jsonl").write_text("".join(json.dumps(dict(t=0.0) | e) + "\n" for e in events))
