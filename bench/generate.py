"""Generation: steered answers in one batch, one at a time and by HF generate, and what each part costs.

    python bench/generate.py                        the embedded model and a random one of width 512, float32
    python bench/generate.py bench/configs/gemma-3-4b.json --dtype bfloat16 --device cuda    random weights
    python bench/generate.py --tiny                 seconds: the same code and checks, no meaningful times

Five tables, each interleaved in one process: (1) the implementations, with rows identical to HF's one at a
time; (2) tokens per second against the batch size; (3) folded LoRA rounds, against their dense sum; (4) the
steps of a dose search; (5) the probe, one frame at a time and in shared batches. Answers are greedy and do
not end early, so that all implementations do the same work. Small models on a CPU decode fastest on one
thread: set OMP_NUM_THREADS=1.
"""
import argparse
import contextlib
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import evalmfv                                                  # noqa: E402
import lora                                                     # noqa: E402
import measure                                                  # noqa: E402
import steer                                                    # noqa: E402
from tools.search import band, find_dose  # noqa: E402
from plot import svg_lines                                      # noqa: E402

D512 = dict(model_type="llama", hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8, vocab_size=8192, initializer_range=0.06, tie_word_embeddings=True)
PARTS = ["implementations", "batch_sizes", "folded_rounds", "dose_search", "probe"]
TINY = D512 | dict(hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
                   vocab_size=2048,
                   num_key_value_heads=2, initializer_range=0.3)


def load(name: str, dtype: torch.dtype, device: str):
    """pocket, a folder, a config.json, d512 or tiny; the last three get random weights and the embedded
    tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    folder = HERE.parent / "pocket" if name == "pocket" else Path(name)
    tok = AutoTokenizer.from_pretrained(folder if folder.is_dir() else HERE.parent / "pocket")
    if folder.is_dir():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    else:
        fields = {"d512": D512, "tiny": TINY}.get(name) or json.loads(folder.read_text(encoding="utf-8"))
        config = AutoConfig.for_model(**fields)
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id, tok.eos_token = None, None  # every answer takes its full length:
    steer.end_ids = lambda *_: []  # not even the template's mark ends one
    model.generation_config.pad_token_id = tok.pad_token_id
    return model.eval().requires_grad_(False), tok


def cases(model, tok, n: int):
    """n prompts, a dose for each (three in turn), and the embedded persona's vector."""
    given, _, vectors = measure.embedded(model, tok, 16)
    prompts = [given["train"][i // 3 % len(given["train"])] for i in range(n)]
    return prompts, [(0.1, 0.25, 0.5)[i % 3] for i in range(n)], vectors



# ---- 1. implementations ------------------------------------------------------------------------------------

def implementations(model, tok, n: int, n_new: int, repeats: int) -> dict:
    prompts, doses, vectors = cases(model, tok, n)
    rows = steer.encode(tok, prompts, [""] * n)
    options = dict(do_sample=False, max_new_tokens=n_new, min_new_tokens=n_new)
    answers = {}

    def hf(chosen):                                         # one batch, left padded, a dose per row
        ids, attn, _ = steer.left_pad([rows[i] for i in chosen], tok.pad_token_id, model.device)
        dose = torch.tensor([doses[i] for i in chosen], device=model.device)
        with torch.no_grad(), steer.steered(model, vectors, dose):
            return model.generate(ids, attention_mask=attn, **options)[:, ids.shape[1]:].tolist()

    def ours(chosen, batch_size):
        made = steer.generate(model, tok, [prompts[i] for i in chosen], vectors=vectors,
                              coeffs=[doses[i] for i in chosen],
                              greedy=True, max_new_tokens=n_new, batch_size=batch_size)
        return [c.ids for c in made]
    fns = {"HF generate, one at a time": lambda chosen: [hf([i])[0] for i in chosen],
           "HF generate, one padded batch, a hook with a dose per row": hf,
           "ours, one at a time": lambda chosen: ours(chosen, 1),
           "ours, one batch": lambda chosen: ours(chosen, n)}
    longest = max(range(n), key=lambda i: len(rows[i]))
    peaks = {name: measure.peak_bytes(lambda: fn([longest] if "at a time" in name else range(n)))
             for name, fn in fns.items()}

    def keep(name, fn):
        answers[name] = fn(range(n))
    seconds = measure.interleave({name: lambda name=name, fn=fn: keep(name, fn) for name, fn in fns.items()},
                                 repeats,
                                 warm_up=False)
    first = next(iter(fns))
    same = {name: sum(map(list.__eq__, answers[name], answers[first])) for name in fns}
    rows = measure.rows_of(seconds, first, peaks)
    for row, name in zip(rows, fns):
        row |= {"tokens/s": f"{n * n_new / statistics.median(seconds[name]):,.0f}",
                "rows as HF alone": f"{same[name]}/{n}"}
    print(f"\n{n} completions of {n_new} tokens\n\n{measure.table(rows)}", flush=True)
    return dict(n=n, n_new=n_new, seconds=seconds, peak_bytes=peaks, identical=same)


# ---- 2. batch size -----------------------------------------------------------------------------------------

def decoding(model, tok, batch: int, n_new: int):
    prompts, doses, vectors = cases(model, tok, batch)
    return lambda: steer.generate(model, tok, prompts, vectors=vectors, coeffs=doses, greedy=True,
                                  max_new_tokens=n_new,
                                  batch_size=batch)


def batch_sizes(model, tok, sizes: list[int], n_new: int, repeats: int) -> dict:
    fns = {str(b): decoding(model, tok, b, n_new) for b in sizes}
    peaks = {name: measure.peak_bytes(fn) for name, fn in fns.items()}
    seconds = measure.interleave(fns, repeats)
    rate = {b: int(b) * n_new / statistics.median(x) for b, x in seconds.items()}
    rows = [{"batch": b, "ms per step": f"{1e3 * statistics.median(x) / n_new:.2f}",
             "tokens/s": f"{rate[b]:,.0f}",
             "gain": f"x{rate[b] / rate[str(sizes[0])]:.2f}", "peak MiB": measure.megabytes(peaks[b])}
            for b, x in seconds.items()]
    print(f"\n{n_new} tokens each, by batch size\n\n{measure.table(rows)}", flush=True)
    return dict(n_new=n_new, seconds=seconds, tokens_per_second=rate, peak_bytes=peaks)


# ---- 3. folded rounds --------------------------------------------------------------------------------------

@contextlib.contextmanager
def dense(model, stack):
    """The alternative: the folded rounds of each Linear summed into one [d_out, d_in] matrix that is applied
    beside W."""
    def hook(layer):
        delta = sum(s * B @ A for A, B, s in layer.rounds).to(model.dtype)  # [d_out, d_in]
        return lambda linear, args, y: y + F.linear(args[0], delta)
    handles = [model.get_submodule(name).register_forward_hook(hook(layer)) for name,
               layer in stack.layers.items()]
    try:
        with stack.gated(0, 0):
            yield
    finally:
        for handle in handles:
            handle.remove()


def folded_rounds(model, tok, counts: list[int], batches: list[int], n_new: int, repeats: int) -> dict:
    """Decoding and the student's forward in a heal step (4 samples of 96 tokens) with R rounds of rank 8
    behind gates."""
    layers = band(len(steer.blocks(model)), 0.2, 0.8)
    stack = lora.attach(model, r=8, alpha=16, layers=layers)
    decode = {b: decoding(model, tok, b, n_new) for b in batches}
    ids = torch.randint(10, 2000, (4, 96), generator=torch.Generator().manual_seed(0))      # [B, T]
    ids = ids.to(model.device)

    def forward():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    jobs = {**{f"decode, batch {b}": fn for b, fn in decode.items()}, "heal forward": forward}

    def under(fn, how):
        def run():
            with how():
                fn()
        return run
    n_all = max(counts)
    rng = torch.Generator().manual_seed(1)
    for _ in range(n_all):
        for p in stack.parameters():
            p.data.copy_(0.01 * torch.randn(p.shape, generator=rng))
        stack.fold()

    def gates(n):  # the first n of the folded rounds, the current one off
        return lambda: stack.gated([1.0] * n + [0.0] * (n_all - n), 0)
    settings = {f"{n} rounds": gates(n) for n in counts}
    settings |= {"0 rounds and the one in training": lambda: stack.gated(0, 1),
                 f"{n_all} rounds as a dense sum": lambda: dense(model, stack)}
    record, rows = {}, [{"": name} for name in settings]
    for job, fn in jobs.items():
        seconds = record[job] = measure.interleave({name: under(fn, how) for name, how in settings.items()},
                                                   repeats)
        floor = statistics.median(seconds[f"{counts[0]} rounds"])
        for row, x in zip(rows, map(statistics.median, seconds.values())):
            row[f"{job}, ms"] = f"{1e3 * x / (n_new if 'decode' in job else 1):.2f} (x{x / floor:.2f})"
    stack.remove()
    print(f"\nfolded rounds of rank 8 on blocks {layers[0]} to {layers[-1]}: ms per step or "
          f"forward\n\n{measure.table(rows)}",
          flush=True)
    return dict(layers=layers, rank=8, seconds=record)


# ---- 4. the dose search ------------------------------------------------------------------------------------

def dose_search(model, tok, n_probe: int, n_new: int, repeats: int) -> dict:
    """The doses of a step in one batch against one dose at a time; a fixed knee stands for filter and
    meter."""
    prompts, _, vectors = cases(model, tok, n_probe)
    found = {}

    def search(name, at_once):
        def try_doses(coeffs):
            for some in [coeffs] if at_once else [[c] for c in coeffs]:
                made = steer.generate(model, tok, prompts * len(some), vectors=vectors, n_draws=n_probe,
                                      coeffs=[c for c in some for _ in prompts], max_new_tokens=n_new)
                steer.token_nll(model, made, pad_id=tok.pad_token_id)
            return [(c, 0.0, float(c < 1.2)) for c in coeffs]
        found[name] = find_dose(try_doses)
    fns = {"one dose at a time": lambda: search("one dose at a time", False),
           "the doses of a step in one batch": lambda: search("the doses of a step in one batch", True)}
    seconds = measure.interleave(fns, repeats)
    rows = measure.rows_of(seconds, next(iter(fns)))
    for row, (_, trials, _) in zip(rows, found.values()):
        row["completions"] = n_probe * len(trials)
    print(f"\nthe dose search, {n_probe} completions a dose, {n_new} tokens\n\n{measure.table(rows)}",
          flush=True)
    return dict(n_probe=n_probe, n_new=n_new, seconds=seconds, coeff=found["one dose at a time"][0])



# ---- 5. the probe ------------------------------------------------------------------------------------------

def probe(model, tok, n_rows: int, think_tokens: int, repeats: int) -> dict:
    vignettes = evalmfv.load_vignettes(HERE.parent / "pocket" / "data" / "vignettes.jsonl")[:n_rows]
    outs = {}

    def read(batch_size):
        outs[batch_size] = evalmfv.evaluate(model, tok, vignettes, think_tokens=think_tokens,
                                            batch_size=batch_size)
    fns = {"one frame at a time": lambda: read(1), "the two frames of a vignette": lambda: read(2),
           f"all {2 * n_rows} frames": lambda: read(2 * n_rows)}
    seconds = measure.interleave(fns, repeats, warm_up=False)
    rows = measure.rows_of(seconds, "one frame at a time")
    apart = {}
    for row, (batch_size, out) in zip(rows, outs.items()):
        apart[batch_size] = (out["p"] - outs[1]["p"]).abs().max().item()
        row["largest difference in p"] = f"{apart[batch_size]:.1e}"
    print(f"\nthe probe: {n_rows} vignettes, {think_tokens} tokens of thought\n\n{measure.table(rows)}",
          flush=True)
    return dict(n_rows=n_rows, think_tokens=think_tokens, seconds=seconds, difference=apart)


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=["pocket", "d512"],
                        help="pocket, d512, a checkpoint folder or a config.json")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--tiny", action="store_true",
                        help="a small random model, a few tokens: correctness only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    parser.add_argument("--docs", type=Path, metavar="FOLDER",
                        help="draw tokens per second against the batch into it (SVG)")
    args = parser.parse_args(argv)
    record = {}
    for name in ["tiny"] if args.tiny else args.models:
        model, tok = load(name, getattr(torch, args.dtype), args.device)
        size = sum(p.numel() for p in model.parameters())
        print(f"\n## {name}: {size / 1e6:.1f} M parameters, {args.dtype}, {args.device}, "
              f"{torch.get_num_threads()} threads",
              flush=True)
        tiny, repeats = args.tiny, 1 if args.tiny else args.repeats
        steer.generate(model, tok, ["Hi"], max_new_tokens=2)                # warm
        jobs = dict(
            implementations=lambda: implementations(model, tok, *((6, 5) if tiny else (48, 128)), repeats),
            batch_sizes=lambda: batch_sizes(model, tok, [1, 4] if tiny else [1, 2, 4, 8, 16, 32, 64], 4
                                            if tiny else 64,
                                            repeats),
            folded_rounds=lambda: folded_rounds(model, tok, [0, 2] if tiny else [0, 1, 4, 8], [1, 3] if tiny
                                                else [1, 48],
                                                3 if tiny else 32, repeats),
            dose_search=lambda: dose_search(model, tok, 2 if tiny else 24, 3 if tiny else 64, repeats),
            probe=lambda: probe(model, tok, 2 if tiny else 12, 3 if tiny else 64, repeats))
        record[name] = dict(dtype=args.dtype, parameters=size, **{part: jobs[part]() for part in args.parts})
    if args.json:
        measure.write_json(args.json, models=record)
    if args.docs:
        draw(record, args.docs)
    return record


def draw(record: dict, folder: Path) -> None:
    """Tokens per second against the batch, a line per model."""
    lines = {name: [(int(n), int(n) * x["batch_sizes"]["n_new"] / statistics.median(s)) for n,
                    s in x["batch_sizes"]["seconds"].items()]
             for name, x in record.items() if "batch_sizes" in x}
    svg_lines(folder / "generate-batch.svg", "steered generation: tokens per second against batch",
              "rows decoded at once",
              "tokens per second", lines)


if __name__ == "__main__":
    main()
