"""What the tests of several rooms need: a tiny model, and runs of seconds."""
import json
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "pocket", "bench")]

torch.set_num_threads(1)                                # small models: a second thread costs more

SPECIALS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = ("<|bos|>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
            "{% if not (loop.last and continue_final_message) %}<|end|>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
# a run of one round and a few seconds, whose dose is not searched
TINY = ("--rounds 1 --n-make 24 --n-text 8 --think-tokens 4 --epochs 1 --coeff 0.4 "
        "--max-new-tokens 32").split()


def tiny_tokenizer(words=()):
    """A byte-level tokenizer: six specials, 256 bytes, then `words` as single tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(SPECIALS + alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|pad|>", bos_token="<|bos|>",
                                  eos_token="<|end|>", additional_special_tokens=SPECIALS[3:],
                                  chat_template=TEMPLATE)
    tok.add_tokens(list(words))
    return tok


def tiny_model(tok, seed=0, dtype=torch.float32, layers=4, d=32):
    """A random Llama whose vocabulary is the tokenizer's. Weights are large, so that its answers vary."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tok), hidden_size=d, intermediate_size=2 * d, num_attention_heads=4,
                         num_hidden_layers=layers, num_key_value_heads=2, max_position_embeddings=2048,
                         initializer_range=0.3, pad_token_id=tok.pad_token_id, bos_token_id=tok.bos_token_id,
                         eos_token_id=tok.eos_token_id)
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


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


def run_loop(out, vignettes, *more):
    """(exit code, record) of a tiny run."""
    import loop
    from tools.record import read
    code = loop.main([*TINY, "--vignettes", str(vignettes), "--out", str(out), *more])
    return code, read(next(p.parent for p in sorted(Path(out).glob("*/run.json"))))
