"""Plan: what a run would adapt, keep in memory, write and compute, from a configuration and no weights.

    python loop.py plan [MODEL] [--option value ...]        or a RUN folder, with its options

Time: a model with random weights of the same shape takes a few real steps of each kind here, where there is
room for one; else operations and bytes are held against the rates of a large matrix product and of a copy.
Estimates, made to tell a run that fits from one that does not and an hour from a week.
"""
import inspect
import math
import os
import time
import warnings

import torch

import evalmfv
import heal
import lora
import steer
from tools import model as models
from tools import search
from tools.student import N_DIARY, N_FORESEE, N_TOKENS, N_TRIAL

N_WORST = 6                 # passes over each kept answer around healing: persona distance, worst of the kept
LINK = 50e9                 # bytes/s between devices: one 400 Gb/s port each; NVLink has nine times that
DEVICES = 1, 2, 4, 8, 16, 32, 64
TRIAL_SECONDS = 20.0        # longest trial with random weights, by the estimate from rates


# ---- the cost model: weights, keys and operations, from shapes ---------------------------------------------


def sizes(model) -> dict:
    """Counts of parameters and widths, all from shapes; of a mixture's experts the share that one token
    uses."""
    text, blocks = model.config.get_text_config(), steer.blocks(model)
    n_experts = next((n for key in ("num_experts", "num_local_experts", "n_routed_experts")
                      if (n := getattr(text, key, 0))), 1)
    share = (getattr(text, "num_experts_per_tok", 0) or 0) / n_experts
    heads = getattr(text, "num_attention_heads", 0)
    head_dim = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * len(blocks)
    return dict(blocks=[sum(p.numel() * (share if ".experts." in name else 1) for name,
                            p in block.named_parameters() if p.dim() > 1)
                        for block in blocks],
                windows=[getattr(text, "sliding_window", None) if "sliding" in kind else None
                         for kind in kinds],
                query=heads * head_dim, kv=2 * (getattr(text, "num_key_value_heads", None)
                                                or heads) * head_dim,
                V=text.vocab_size, d=text.hidden_size, parameters=sum(p.numel() for p in model.parameters()),
                inner=max((max(p.shape) for p in blocks[0].parameters() if p.dim() == 2),
                          default=text.hidden_size),
                linear=sum(m.weight.numel() for m in blocks.modules() if isinstance(m, torch.nn.Linear)))


def keys_seen(L: int, window: int | None) -> int:
    """Keys that L causal queries look at, themselves included."""
    w = min(L, window or L)
    return w * (w + 1) // 2 + (L - w) * w


def forward_ops(n: dict, L: int, first: int = 0) -> float:
    """Operations of one sequence through the blocks from `first` on: 2 a weight and token, 4 a key and query
    channel."""
    return sum(2 * weights * L + 4 * n["query"] * keys_seen(L, window)
               for weights, window in list(zip(n["blocks"], n["windows"]))[first:])


def decode_step(n: dict, context: int, batch: int, width: float = 2) -> dict:
    """Operations and bytes of one token for each of `batch` rows that stand at `context` tokens: weights
    once, KV of all."""
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
    """What this machine does in a second, measured in about one: flops of a large product, bytes of a large
    copy."""
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
    # read once, written once
    return dict(flops=2 * n * d ** 3 / best(product), bytes=2 * 4 * x.numel() / best(x.clone))


def peaks_of(n: dict, n_trained: int, lora_blocks: int, *, width: int, quantized: bool, answer: int,
             prompt: int, frame: int,
             gen_rows: int, nll_rows: int, probe_rows: int, heal_rows: int,
             n_samples: int) -> dict[str, float]:
    """Peak bytes of each stage: weights and adapters, and on top what one batch keeps.

    n: from `sizes`. width: bytes of a number. answer, prompt, frame: longest length in tokens of an answer,
    of its prompt, of a probe's question with its think. *_rows: rows of a batch. lora_blocks: blocks from the
    first adapted one to the last of the model, which keep activations for the backward pass.
    """
    # nf4, a scale per 64
    weights = n["parameters"] * width - (n["linear"] * (width - 0.5625) if quantized else 0)
    held = weights + 4 * n_trained
    token, logit = n["kv"] * len(n["blocks"]) * width, n["V"] * width
    wide = (4 * n["d"] + 3 * n["inner"]) * width                                # one block at work, per token
    heal_tokens = heal_rows * (prompt + answer)
    return {"weights": weights,
            "generation": held + gen_rows * ((prompt + answer) * token + prompt * wide + 3 * 4 * n["V"]),
            "filter": held + nll_rows * (prompt + answer) * wide + 4 * 64 * n["V"]
            + max(min(nll_rows * (answer + 1) * logit, 2 ** 28 * width), (answer + 1) * logit),
            "probe": held + probe_rows * (frame * (token + wide) + 3 * 4 * n["V"]),
            # gradient and two moments of Adam; hidden states kept for the round; a tile of logits and
            # gradients of hidden states
            "heal": held + 12 * n_trained + 17 * heal_tokens * n["d"] * lora_blocks * width
            + n_samples * (prompt + 2 * answer) * n["d"] * width
            + heal_rows * answer * (12 * min(n["V"], heal.TILE) + 28 * n["d"])}


# ---- seconds of a token read, of a decoding step and of a round's training ---------------------------------


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    names = {"SC_AVPHYS_PAGES", "SC_PAGE_SIZE"}
    return math.prod(map(os.sysconf, names)) if names <= set(getattr(os, "sysconf_names", ())) else 0


def by_rates(n: dict, machine: dict, weights: float, *, rows: int, length: int, trained: int) -> dict:
    """The same as `by_trial`, from operations and bytes alone."""
    def step(batch):
        work = decode_step(n, length, batch, weights / n["parameters"])
        return floor(work["ops"], work["bytes"], machine)
    read = forward_ops(n, length) / length / machine["flops"]
    return dict(read=read, step=step, train=3 * trained * (read + 2 * n["V"] * n["d"] / machine["flops"]))


def by_trial(model, stack, *, rows: int, length: int, cfg: heal.HealConfig, n_samples: int,
             answer: int) -> dict:
    """dict(read, step, train) measured: seconds of a token read, step(rows) of one token decoded, of a
    round's training."""
    device, vocab = steer.device_of(model), model.config.get_text_config().vocab_size

    @torch.no_grad()
    def decode(batch):
        ids = torch.randint(vocab, (batch, length), device=device)              # [B, T]
        forward, _ = steer.cached_forward(model)
        times, attn = [], torch.ones(batch, length + 4, dtype=torch.long, device=device)         # [B, T + 4]
        for i in range(5):                                      # the prompt, then four tokens
            past, start = (0, time.perf_counter()) if i == 0 else (length + i - 1, time.perf_counter())
            at = torch.arange(past, length + i, device=device).expand(batch, -1)  # [B, T] or [B, 1]
            ids = forward(ids, attn[:, :length + i], at)[:, -1:].argmax(-1)                      # [B, 1]
            ids[0, 0].item()                                    # waits for a GPU
            times.append(time.perf_counter() - start)
        return times[0] / batch / length, sorted(times[1:])[1]
    with stack.gated(0, 0):
        decode(1)                                               # warm
        (_, one), (read, many) = decode(1), decode(rows)
    slope = max(many - one, 0.0) / max(rows - 1, 1)
    samples = [heal.Sample(torch.randint(vocab, (length,)).tolist(), length - answer, i)
               for i in range(cfg.heal_batch)]
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the barrier")        # of no meaning here
        heal.heal(model, stack.parameters(), samples, lambda: stack.gated(0, 0), cfg)
    return dict(read=read, step=lambda batch: one + slope * (batch - 1),
                train=(time.perf_counter() - start) * n_samples / len(samples))


# ---- the plan ----------------------------------------------------------------------------------------------


def tokens_of(text: str) -> int:
    """Four characters to a token, and sixteen tokens of chat template."""
    return len(text) // 4 + 16


def plan(inputs: dict, *, model: str, revision: str, dtype: str, device: str, quantize: str, rounds: int,
         n_text: int,
         think_tokens: int, batch_size: int, n_make: int, coeff: float | None, max_new_tokens: int, r: int,
         alpha: float,
         lora_band: tuple[float, float], epochs: int, heal_batch: int, pass_tokens: int,
         reg: str) -> list[str]:
    """Lines to print. inputs: what `inputs.load` gave; the others are the run's options. ValueError if it
    cannot be."""
    place, number = models.placed(device, dtype)
    _, config, kind = models.config_of(model, revision)
    with models.named_errors(model, "its config.json"):
        with torch.device("meta"):
            made = getattr(kind, "from_config", kind)(config)   # the Auto class, or the model's own
        made.tie_weights()  # transformers 5.0 leaves that out where nothing is loaded
        n, n_blocks = sizes(made), len(steer.blocks(made))
    if r > n["d"]:
        raise ValueError(f"--r {r}: more than the model's width {n['d']}, which a rank cannot pass")
    layers = search.band(n_blocks, *lora_band)
    stack = lora.attach(made, r=r, alpha=alpha, layers=layers)
    n_trained = sum(p.numel() for p in stack.parameters())

    # ---- counts: rounds as if each were accepted, searches as if each took all its steps, answers as if none
    # ended early
    persona, prompts, answer = inputs["persona"], inputs["train"] + inputs["held_out"], max_new_tokens
    system, prompt = (sum(map(tokens_of, x)) // len(x) for x in (persona["pos"] + persona["neg"], prompts))
    longest = max(map(tokens_of, persona["pos"] + persona["neg"])) + max(map(tokens_of, prompts))
    asked = [tokens_of(evalmfv.question(v["text"], evalmfv.FOUNDATIONS)) for v in inputs["vignettes"]]
    n_rows = 2 + 2 * rounds                                                         # of the table
    # as find_dose asks while its bound is not met
    searched = [] if coeff else [4 * search.N_PROBE] + [2 * search.N_PROBE] * 3
    measured = n_rows * [n_text, N_DIARY]
    batches = ([min(n_make, N_TRIAL)] * len(search.TEMPERATURES) + [n_make] * 2 + [N_FORESEE]
               + rounds * (searched + [n_make]) + measured)  # answers asked for at once
    n_answers, n_frames = sum(batches), 2 * len(asked) * n_rows
    n_steps = rounds * epochs * math.ceil(n_make / heal_batch)
    decoded = n_answers * answer + n_frames * think_tokens
    n_meter = len(persona["meter_pos"]) + len(persona["meter_neg"])
    short, long = prompt + answer, system + prompt + answer  # tokens, bare and prompted
    n_metered = rounds * sum(searched) + n_rows * n_text
    n_foreseen = N_FORESEE * (2 + n_meter + 6 * len(search.bands_of(n_blocks)))      # six doses of each band
    read = (n_answers * (prompt + short + long) + n_metered * n_meter * long        # asked, scored, metered
            + rounds * N_WORST * n_make * short + n_foreseen * (prompt + N_TOKENS) + 2 * n_rows * sum(asked)
            + (rounds + 1) * 2 * len(inputs["contexts"]) * (system + prompt))
    trained = epochs * n_make * (prompt + answer)                                   # a round's

    rows, probe_rows = min(batch_size, max(batches)), min(batch_size, 2 * len(asked))
    width = torch.empty(0, dtype=number).element_size()
    peaks = peaks_of(n, n_trained, n_blocks - layers[0], width=width, quantized=bool(quantize), answer=answer,
                     prompt=longest,
                     frame=max(asked) + think_tokens + 32, gen_rows=rows, nll_rows=32, probe_rows=probe_rows,
                     heal_rows=max(1, min(heal_batch, pass_tokens // (longest + answer))), n_samples=n_make)

    # ---- seconds: a trial where one fits
    machine, sample = rates(place, number), prompt + answer
    pace, how = by_rates(n, machine, peaks["weights"], rows=rows, length=sample, trained=trained), (
        f"by the {machine['flops'] / 1e9:,.0f} GFLOP/s of a product and the {machine['bytes'] / 1e9:,.0f} "
        f"GB/s of a copy here")
    trial = rows * sample * pace["read"] + 8 * pace["step"](rows) + pace["train"] * heal_batch / n_make
    has_room = 1.2 * max(peaks.values()) < free_bytes(place)
    if not quantize and device != "balanced" and has_room and trial < TRIAL_SECONDS:
        real = getattr(kind, "from_config", kind)(config).to(place, number).eval()
        cfg = heal.HealConfig(lr=1e-5, tau=1e-3, reg=reg, epochs=epochs, heal_batch=heal_batch,
                              pass_tokens=pass_tokens)
        pace = by_trial(real, lora.attach(real, r=r, alpha=alpha, layers=layers), rows=rows, length=sample,
                        cfg=cfg, n_samples=n_make,
                        answer=answer)
        how = "by a trial of random weights here"

    def parts_on(n_devices):
        """Seconds of each part on so many devices, each with a whole replica and its share of the rows."""
        mine, probed = (max(1, math.ceil(x / n_devices)) for x in (heal_batch, 2 * len(asked)))
        shares = [math.ceil(size / n_devices) for size in batches]
        return {"answers": answer * sum(math.ceil(size / rows) * pace["step"](min(size, rows))
                                        for size in shares),
                "probe": think_tokens * n_rows
                * math.ceil(probed / probe_rows) * pace["step"](min(probed, probe_rows)),
                "reading": read / n_devices * pace["read"],
                "healing": rounds * pace["train"] * mine / heal_batch
                + n_steps * reduce_seconds(4 * n_trained, n_devices)}
    parts = parts_on(1)
    seconds = sum(parts.values())
    on_all = {n: sum(parts_on(n).values()) for n in DEVICES}
    name, modules = str(number).removeprefix("torch."), sorted({name.rsplit(".", 1)[-1]
                                                                for name in stack.layers})
    duration = f"{seconds / 3600:.1f} hours" if seconds > 7200 else f"{math.ceil(seconds / 60)} minutes"
    lines = {
        "model": f"{model}: {type(made).__name__}, {n_blocks} blocks of width {n['d']}, vocabulary "
                 f"{n['V']:,}, {n['parameters']:,} parameters",
        "adapted": f"{len(stack.layers)} modules ({', '.join(modules)}) in blocks {layers[0]}-{layers[-1]}, "
                   f"rank {r}: "
                   f"{n_trained:,} trained parameters",
        "note": stack.note,
        "memory": f"peak on {place.type} in {'4 bits' if quantize else name}, GB: "
                  + "  ".join(f"{stage} {peak / 1e9:.2f}" for stage, peak in peaks.items()),
        "disk": f"{4 * n_trained / 1e6:.1f} MB per accepted round, {4 * n_trained * rounds / 1e6:.1f} MB for "
                f"{rounds}",
        "work": f"{n_answers:,} answers, {n_frames:,} probe frames, {n_steps:,} training steps; thousands of "
                f"tokens: decoded "
                f"{decoded / 1e3:,.0f}  read {read / 1e3:,.0f}  trained {rounds * trained / 1e3:,.0f}",
        "time": f"about {duration} on this "
                f"{place.type}, {how}: " + "  ".join(f"{part} {x / seconds:.0%}" for part,
                                                     x in parts.items()),
        "devices": "under torchrun each holds a whole replica, the memory above; hours (and efficiency): "
                   + "  ".join(f"{n}: {x / 3600:.2g} ({seconds / n / x:.0%})" for n, x in on_all.items()),
        "link": f"an all-reduce a step of {4 * n_trained / 1e6:.3g} MB at {LINK / 1e9:g} GB/s, "
            f"{1e3 * reduce_seconds(4 * n_trained, 64):.2g} ms at 64; a step shards over its --heal-batch "
            f"{heal_batch} answers; loading, AdamW and the report do not",
        "assumed": f"every round accepted, every answer {answer} tokens long, four characters to a token, "
                   f"attention to all of the text"}
    return [f"{word:9s} {line}" for word, line in lines.items() if line]


# the names of what a caller takes from a run's options
OPTIONS = tuple(inspect.signature(plan).parameters)[1:]
