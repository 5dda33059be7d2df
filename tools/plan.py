"""Plan: what a run would adapt, keep in memory, write and compute, before it does.

    python loop.py plan [MODEL] [--option value ...]        or a RUN folder, with its options

Counts come from the configuration alone. Their seconds: of a model whose weights lie here and are small, by a
trial of it (some answers, their reading, a heal step); of any other a floor that tells an hour from a week,
operations and bytes held against the rates of a large matrix product and of a copy, measured here.
"""
import dataclasses
import inspect
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import evalmfv
import heal
import lora
import steer
from tools import inputs, model as models, options, search
from tools.record import read
from tools.refusals import named_errors
from tools.student import N_DIARY, N_FORESEE, N_TOKENS, N_TRIAL

N_WORST = 2                 # passes over each kept answer after healing, to find the worst: day and reference
KEPT = 0.7                  # share of a round's answers that the filter keeps, in the runs of docs/RESULTS.md
LINK = 50e9                 # bytes/s between devices: one 400 Gb/s port each; NVLink has nine times that
DEVICES = 1, 2, 4, 8, 16, 32, 64
SMALL = 2e9                 # bytes of weights up to which a model is tried: SmolLM2-135M takes half a minute
FEW, MANY, N_PROBED = 8, 32, 16     # answers of a trial, drawn out to other batches by a line; vignettes


# ---- the cost model: weights, keys and operations, from shapes ---------------------------------------------

def sizes(model) -> dict:
    """Counts of parameters and widths, from shapes; of a mixture's experts the share that one token uses."""
    text, blocks = model.config.get_text_config(), steer.blocks(model)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * len(blocks)
    n_experts = next((n for key in ("num_experts", "num_local_experts", "n_routed_experts")
                      if (n := getattr(text, key, 0))), 1)
    share = (getattr(text, "num_experts_per_tok", 0) or 0) / n_experts
    heads = getattr(text, "num_attention_heads", 0)
    head_dim = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    return dict(blocks=[sum(p.numel() * (share if ".experts." in name else 1)
                            for name, p in block.named_parameters() if p.dim() > 1) for block in blocks],
                windows=[getattr(text, "sliding_window", None) if "sliding" in kind else None
                         for kind in kinds],
                query=heads * head_dim, V=text.vocab_size, d=text.hidden_size,
                kv=2 * (getattr(text, "num_key_value_heads", None) or heads) * head_dim,
                parameters=sum(p.numel() for p in model.parameters()),
                inner=max((max(p.shape) for p in blocks[0].parameters() if p.dim() == 2),
                          default=text.hidden_size),
                linear=sum(m.weight.numel() for m in blocks.modules() if isinstance(m, torch.nn.Linear)))


def keys_seen(L: int, window: int | None) -> int:
    """Keys that L causal queries look at, themselves included."""
    w = min(L, window or L)
    return w * (w + 1) // 2 + (L - w) * w


def forward_ops(n: dict, L: int, first: int = 0) -> float:
    """Operations of L tokens through the blocks from `first` on: 2 a weight, 4 a key and query channel."""
    return sum(2 * weights * L + 4 * n["query"] * keys_seen(L, window)
               for weights, window in list(zip(n["blocks"], n["windows"]))[first:])


def decode_step(n: dict, context: int, batch: int, width: float = 2) -> dict:
    """Operations and bytes of a token for each of `batch` rows at `context`: weights once, KV of all."""
    seen = [min(context, window or context) for window in n["windows"]]
    weights = sum(n["blocks"]) + n["V"] * n["d"]
    return dict(ops=batch * (2 * weights + 4 * n["query"] * sum(seen)),
                bytes=width * (weights + batch * n["kv"] * sum(seen)))


def floor(ops: float, n_bytes: float, machine: dict) -> float:
    """Seconds below which this much work cannot be done."""
    return max(ops / machine["flops"], n_bytes / machine["bytes"])


def reduce_seconds(n_bytes: float, n_devices: int) -> float:
    """A ring all-reduce: each device sends and receives all but its own share, twice."""
    return 2 * (n_devices - 1) / n_devices * n_bytes / LINK


def rates(device: torch.device, dtype: torch.dtype) -> dict:
    """What this machine does in a second, measured in about one: flops of a product, bytes of a copy."""
    def best(run) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            run().view(-1)[0].item()                            # waits for a GPU
            times.append(time.perf_counter() - start)
        return min(times)
    d = 4096 if device.type != "cpu" else 512
    a = torch.ones(d, d, device=device, dtype=dtype)
    n = max(1, min(64, int(0.05 / best(lambda: a @ a))))        # long enough for the clock

    def product():
        for _ in range(n):
            b = a @ a
        return b
    x = torch.ones(2 ** 26 if device.type != "cpu" else 2 ** 24, device=device)
    # a copy reads and writes
    return dict(flops=2 * n * d ** 3 / best(product), bytes=2 * 4 * x.numel() / best(x.clone))


@dataclasses.dataclass(frozen=True)
class Paces:
    """Seconds: of a token that is read, or trained on; of a probe's frame; of a step of so many rows."""
    read: float
    train: float
    frame: float
    step: Callable
    answer: float               # tokens of an answer: all that are allowed, or as many as in the trial
    source: str


def foreseen(n: dict, machine: dict, width: float, *, length: int, answer: int, asked: float, think: int,
             probe_rows: int) -> Paces:
    """By the rates of the machine, what cannot be undercut. asked, think: tokens of a probe's frame."""
    def step(batch):
        work = decode_step(n, length, batch, width)
        return floor(work["ops"], work["bytes"], machine)
    read = forward_ops(n, length) / length / machine["flops"]
    return Paces(read, 3 * (read + 2 * n["V"] * n["d"] / machine["flops"]),
                 asked * read + think * step(probe_rows) / probe_rows, step, answer,
                 f"by the {machine['flops'] / 1e9:,.0f} GFLOP/s of a product and the "
                 f"{machine['bytes'] / 1e9:,.1f} GB/s of a copy here")


def tried(name: str, prompts: list[str], vignettes: list[dict], layers: list[int], *, r: int, alpha: float,
          answer: int, think: int, pass_tokens: int, heal_batch: int, **how) -> Paces:
    """By a trial of the model itself. how: keywords of `models.load`."""
    def timed(run, *args, **kw):
        start = time.perf_counter()
        return run(*args, **kw), time.perf_counter() - start
    model, tok = models.load(name, **how)
    prompts = [prompts[i % len(prompts)] for i in range(MANY)]
    steer.generate(model, tok, prompts[:FEW], max_new_tokens=2)                 # what is slow only once
    _, few = timed(steer.generate, model, tok, prompts[:FEW], max_new_tokens=answer)
    made, many = timed(steer.generate, model, tok, prompts, max_new_tokens=answer)
    _, reading = timed(steer.token_nll, model, made)
    _, probing = timed(evalmfv.evaluate, model, tok, vignettes[:N_PROBED], think_tokens=think)
    stack = lora.attach(model, r=r, alpha=alpha, layers=layers)
    samples = [heal.Sample(c.prompt_ids + c.ids, len(c.prompt_ids), i) for i, c in enumerate(made[:FEW])]
    cfg = heal.HealConfig(lr=1e-6, tau=1.0, epochs=2, pass_tokens=pass_tokens, heal_batch=heal_batch)
    with warnings.catch_warnings(action="ignore"):                              # of a barrier without work
        _, healing = timed(heal.heal, model, stack.parameters(), samples, lambda: stack.gated(0, 0), cfg)
    n_steps, n_tokens = max(len(c.ids) for c in made), [len(c.prompt_ids + c.ids) for c in made]

    def step(batch):
        return max(few + (many - few) * (batch - FEW) / (MANY - FEW), few / FEW) / n_steps
    return Paces(reading / sum(n_tokens), healing / (cfg.epochs * sum(n_tokens[:FEW])),
                 probing / (2 * len(vignettes[:N_PROBED])), step, sum(len(c.ids) for c in made) / MANY,
                 f"by a trial of {FEW + MANY} answers, their reading, the probe and healing")


def peaks_of(n: dict, n_trained: int, n_backward: int, *, width: int, quantized: bool, answer: int,
             longest: int, frame: int, rows: int, probe_rows: int, heal_rows: int, n_samples: int) -> dict:
    """Peak bytes of each stage: weights and adapters, and on top what one batch keeps.

    n: from `sizes`. width: bytes of a number. answer, longest, frame: most tokens of an answer, with its
    prompt, of a probe's question with its thought. n_backward: blocks from the first adapted one on.
    """
    weights = n["parameters"] * width - (n["linear"] * (width - 0.5625) if quantized else 0)   # nf4, scales
    held, token = weights + 4 * n_trained, n["kv"] * len(n["blocks"]) * width
    wide = (4 * n["d"] + 3 * n["inner"]) * width                # one block at work, per token
    one_row = (answer + 1) * n["V"] * width                     # of logits
    return {"weights": weights,
            "generation": held + rows * (longest * token + (longest - answer) * wide + 12 * n["V"]),
            "filter": held + 32 * longest * wide + 256 * n["V"]
            + max(min(32 * one_row, 2 ** 28 * width), one_row),
            "probe": held + probe_rows * (frame * (token + wide) + 12 * n["V"]),
            # gradient and two moments of Adam; activations of the blocks that have a backward pass; hidden
            # states kept for the round; a tile of logits
            "heal": held + 12 * n_trained + 17 * heal_rows * longest * n["d"] * n_backward * width
            + n_samples * (longest + answer) * n["d"] * width
            + heal_rows * answer * (12 * min(n["V"], heal.TILE) + 28 * n["d"])}


# ---- the plan ----------------------------------------------------------------------------------------------

def tokens_of(text: str) -> int:
    """Four characters to a token, and sixteen tokens of chat template."""
    return len(text) // 4 + 16


def plan(given: dict, *, model: str, revision: str, dtype: str, device: str, quantize: str, rounds: int,
         n_text: int, think_tokens: int, batch_size: int, n_make: int, coeff: float | None,
         max_new_tokens: int, r: int, alpha: float, lora_band: tuple[float, float], epochs: int,
         heal_batch: int, pass_tokens: int) -> list[str]:
    """Lines to print. given: what `inputs.load` gave; the others are the run's options. ValueError if it
    cannot be."""
    where, config, kind = models.config_of(model, revision)
    place, number = models.placed(device, dtype, config.dtype)
    with named_errors(model, "its config.json"), torch.device("meta"):
        made = getattr(kind, "from_config", kind)(config)       # the Auto class, or the model's own
        made.tie_weights()                                      # transformers 5.0 leaves that to loading
        n, n_blocks = sizes(made), len(steer.blocks(made))
    models.check_rank(r, made)
    layers = search.band(n_blocks, *lora_band)
    stack = lora.attach(made, r=r, alpha=alpha, layers=layers)
    n_trained = sum(p.numel() for p in stack.parameters())

    # ---- how much there is to do: every round accepted, of the searches what they usually take
    persona, prompts = given["persona"], given["train"] + given["held_out"]
    voices = persona["pos"] + persona["neg"]
    system, prompt = (sum(map(tokens_of, texts)) // len(texts) for texts in (voices, prompts))
    longest = max(map(tokens_of, voices)) + max(map(tokens_of, prompts)) + max_new_tokens
    asked = [tokens_of(evalmfv.question(v["text"], evalmfv.FOUNDATIONS)) for v in given["vignettes"]]
    n_rows, n_meter = 2 + 2 * rounds, len(persona["meter_pos"] + persona["meter_neg"])
    searched = [] if coeff else [7 * search.N_PROBE] + [5 * search.N_PROBE] * (rounds - 1)      # answers
    batches = [min(n_make, N_TRIAL)] * len(search.TEMPERATURES) + [n_make] * 2 + [N_FORESEE]    # asked for
    batches += searched + rounds * [n_make] + n_rows * [n_text, N_DIARY]                        # at once
    n_answers, n_frames, n_kept = sum(batches), 2 * len(asked) * n_rows, KEPT * n_make
    all_steps = rounds * epochs * math.ceil(n_kept / heal_batch)

    rows, probe_rows = min(batch_size, max(batches)), min(batch_size, 2 * len(asked))
    peaks = peaks_of(n, n_trained, n_blocks - layers[0], width=number.itemsize, quantized=bool(quantize),
                     answer=max_new_tokens, longest=longest, frame=max(asked) + think_tokens + 32, rows=rows,
                     probe_rows=probe_rows, n_samples=n_make,
                     heal_rows=max(1, min(heal_batch, pass_tokens // longest)))

    # ---- how fast that goes here, and how long an answer is
    if any(Path(where).glob("*.safetensors")) and peaks["weights"] <= SMALL:
        pace = tried(model, given["train"], given["vignettes"], layers, r=r, alpha=alpha,
                     answer=max_new_tokens, think=think_tokens, pass_tokens=pass_tokens,
                     heal_batch=heal_batch, revision=revision, dtype=dtype, device=device, quantize=quantize)
    else:
        pace = foreseen(n, rates(place, number), peaks["weights"] / n["parameters"], answer=max_new_tokens,
                        length=prompt + max_new_tokens, asked=sum(asked) / len(asked), think=think_tokens,
                        probe_rows=probe_rows)
    answer, short = pace.answer, prompt + pace.answer
    decoded, trained = n_answers * answer + n_frames * think_tokens, rounds * epochs * n_kept * short

    def scored(n, n_fronts, n_texts):
        """Tokens of n answers, read bare and behind n_texts system prompts; a front once in a batch of 32."""
        n_fronts = min(n, n_fronts + n // 32)
        return (1 + n_texts) * n * answer + n_fronts * (prompt + n_texts * (system + prompt))
    n_foreseen = N_FORESEE * (2 + n_meter + 3 * len(search.bands_of(n_blocks)))     # three doses of each band
    read = (n_answers * prompt + sum(scored(n, search.N_PROBE, 1 + n_meter) for n in searched)
            + (rounds + 2) * scored(n_make, len(given["train"]), 1)
            + n_rows * scored(n_text + N_DIARY, len(given["held_out"]), 1 + n_meter)
            + (rounds + 1) * N_WORST * n_kept * short + n_foreseen * (prompt + N_TOKENS)   # 1: for tau
            + rounds * 2 * len(given["contexts"]) * (system + prompt))

    def parts_on(n_devices):
        """Seconds of each part on so many devices, each with a whole replica and its share of the rows."""
        mine, shares = math.ceil(heal_batch / n_devices), [math.ceil(size / n_devices) for size in batches]
        sums = all_steps * reduce_seconds(4 * n_trained, n_devices)
        steps = sum(math.ceil(size / rows) * pace.step(min(size, rows)) for size in shares)
        return {"answers": answer * steps, "probe": n_frames / n_devices * pace.frame,
                "reading": read / n_devices * pace.read,
                "healing": trained * pace.train * mine / heal_batch + sums}
    parts = parts_on(1)
    seconds, name = sum(parts.values()), str(number).removeprefix("torch.")
    on_all = {k: sum(parts_on(k).values()) for k in DEVICES}
    modules = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in stack.layers}))
    duration = f"{seconds / 3600:.1f} hours" if seconds > 7200 else f"{math.ceil(seconds / 60)} minutes"
    lines = {
        "model": f"{model}: {type(made).__name__}, {n_blocks} blocks of width {n['d']}, vocabulary "
                 f"{n['V']:,}, {n['parameters']:,} parameters",
        "adapted": f"{len(stack.layers)} modules ({modules}) in blocks {layers[0]}-{layers[-1]}, rank {r}: "
                   f"{n_trained:,} trained parameters",
        "note": models.left_out(made, layers),
        "memory": f"peak on {place.type} in {'4 bits' if quantize else name}, GB: "
                  + "  ".join(f"{stage} {peak / 1e9:.2f}" for stage, peak in peaks.items()),
        "disk": f"{4 * n_trained / 1e6:.1f} MB per accepted round, {4 * n_trained * rounds / 1e6:.1f} MB for "
                f"{rounds}",
        "work": f"{n_answers:,} answers, {n_frames:,} probe frames, {all_steps:,} training "
                f"steps; thousands of tokens: decoded {decoded / 1e3:,.0f}  read {read / 1e3:,.0f}  trained "
                f"{trained / 1e3:,.0f}",
        "time": f"about {duration} on this {place.type}, {pace.source}: "
                + "  ".join(f"{part} {x / seconds:.0%}" for part, x in parts.items()),
        "devices": "under torchrun each holds a whole replica, the memory above; hours (and efficiency): "
                   + "  ".join(f"{k}: {x / 3600:.2g} ({seconds / k / x:.0%})" for k, x in on_all.items()),
        "link": f"an all-reduce a step of {4 * n_trained / 1e6:.3g} MB at {LINK / 1e9:g} GB/s, "
                f"{1e3 * reduce_seconds(4 * n_trained, 64):.2g} ms at 64; a step shards over its "
                f"--heal-batch {heal_batch} answers; loading, AdamW and the report do not",
        "assumed": f"every round accepted, {KEPT:.0%} of the answers kept, each {answer:.0f} tokens long, "
                   "four characters to a token"}
    return [f"{word:9s} {line}" for word, line in lines.items() if line]


OPTIONS = tuple(inspect.signature(plan).parameters)[1:]         # the names of the options it takes


def main(argv: list[str], groups, parse) -> int:
    """Prints the plan of a RUN folder or of a command line: parse(argv) -> dataclasses of `groups`."""
    if argv and (Path(argv[0]) / "run.json").is_file():
        values = options.recorded(read(argv[0]).run.get("options"), groups, argv[0])
    else:
        values = options.values(parse(argv))
    given = inputs.load(**{name: values[name] for name in inputs.OPTIONS})
    print(*plan(given, **{name: values[name] for name in OPTIONS}), sep="\n")
    return 0
