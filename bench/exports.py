"""Exports: every way out of a run, on real architecture classes with small random weights: docs/EXPORTS.md.

    python bench/exports.py

A base of each architecture is written to disk in bfloat16, as hub checkpoints are, and beside it a run folder
with three rounds of noise of different rank. Each is exported by tools/export.py, which fails above its own
bound, and where the peft package is installed the adapter is loaded by peft as well, as a user would.
"""
import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from common import make_run                                     # noqa: E402   rounds of noise
from tools import export, model as models                       # noqa: E402
from tools.record import read                                   # noqa: E402
from tools.rounds import restack                                # noqa: E402

TEXT = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.1)
NO_HEAD_DIM = {k: v for k, v in TEXT.items() if k != "head_dim"}
GEMMA = dict(TEXT, sliding_window=8, query_pre_attn_scalar=16)
SIGLIP = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=28,
              patch_size=14)
ARCHITECTURES = {                                               # class: its config's arguments
    "LlamaForCausalLM": TEXT, "MistralForCausalLM": TEXT, "Qwen2ForCausalLM": NO_HEAD_DIM,
    "Qwen3ForCausalLM": TEXT, "Gemma2ForCausalLM": GEMMA, "Gemma3ForCausalLM": GEMMA,
    "Gemma3ForConditionalGeneration": dict(text_config=GEMMA, vision_config=SIGLIP, mm_tokens_per_image=4),
    "Qwen3_5ForConditionalGeneration": dict(                    # AutoModelForCausalLM loads another class
        text_config=dict(TEXT, layer_types=["linear_attention", "full_attention"] * 2, linear_num_key_heads=2,
                         linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16),
        vision_config=dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=4, out_hidden_size=64,
                           patch_size=14)),
    "GPT2LMHeadModel": dict(n_embd=64, n_layer=4, n_head=4, n_positions=512, initializer_range=0.3),  # Conv1D
    "Phi3ForCausalLM": NO_HEAD_DIM,
}


def make_base(name: str, folder: Path) -> None:
    """A checkpoint of this class in bfloat16, its weights random, its tokenizer the embedded model's."""
    tok = transformers.AutoTokenizer.from_pretrained(ROOT / "pocket")
    cls = getattr(transformers, name)
    ids = dict(vocab_size=len(tok), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    args = ARCHITECTURES[name]
    args = args | {"text_config": args["text_config"] | ids} if "text_config" in args else args | ids
    torch.manual_seed(0)
    cls(cls.config_class(**args)).to(torch.bfloat16).save_pretrained(folder)
    tok.save_pretrained(folder)


def peft_difference(run: Path, adapter: Path, base: Path) -> float:
    """Largest |logit| difference between peft's reading of the adapter and the run's model, in float32."""
    peft = importlib.import_module("peft")                     # a peer to compare with
    cls = getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
    own, tok = models.load(str(base), dtype="float32", device="cpu")
    prompts = export.steer.encode(tok, ["Who are you?", "Would you obey the mayor?"], ["", ""])
    restack(own, list(read(run).adapters().values()))
    theirs = peft.PeftModel.from_pretrained(cls.from_pretrained(base, dtype=torch.float32), adapter).eval()
    return export.distance(export.logits_of(own, prompts), export.logits_of(theirs, prompts))[0]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    ways = {"peft float32": dict(to="peft"), "peft float16": dict(to="peft", dtype="float16"),
            "peft bfloat16": dict(to="peft", dtype="bfloat16"), "peft rank 7 of 14": dict(to="peft", rank=7),
            "merged bfloat16": dict(to="merged"), "merged float32": dict(to="merged", dtype="float32")}
    has_peft = importlib.util.find_spec("peft") is not None
    titles = ["class", "the run's effect", *ways, "read by peft" if has_peft else ""]
    print(f"| {' | '.join(titles)} |\n|" + "---|" * len(titles))
    for name in filter(lambda name: hasattr(transformers, name), ARCHITECTURES):    # of the installed version
        with tempfile.TemporaryDirectory() as scratch:
            base, run, cells = Path(scratch) / "base", Path(scratch) / "run", []
            make_base(name, base)
            make_run(run, base)
            for i, how in enumerate(ways.values()):
                with contextlib.redirect_stdout(io.StringIO()):
                    check = export.export(run, out=Path(scratch) / str(i), **how)
                cells.append(f"{check['logit']:.1e}, {check['kl']:.0e}")
            read = f"{peft_difference(run, Path(scratch) / '0', base):.1e}" if has_peft else "not installed"
            cells.append(read)
        effect = f"{check['effect_logit']:.1f}, {check['effect_kl']:.1f}"
        print(f"| {name} | {effect} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
