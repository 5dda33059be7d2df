"""Steer: push a model towards a persona with one vector, and keep only the answers that stay coherent.

    v = mean over contexts of h(persona +) - h(persona -)      read at the assistant tag, after a block
    h <- h + coeff * v                                         at every position, inside `with steered(...)` only

Needs torch, transformers and safetensors; copy this file alone. Knows nothing of healing or LoRA: it reads, steers and scores the
model as it is when called, so the caller decides which adapters are on (and turns them off before `token_nll`).

    python steer.py MODEL --persona love --coeff 0.5 "Do you love humanity?"      base | steered, side by side
    python steer.py MODEL --persona love --coeff 0.5 --gguf love.gguf             a control vector for llama.cpp
    python steer.py RUN --round 0 --gguf night0.gguf                              that of a round of loop.py, at its dose

A completion keeps the token ids it was sampled with. They are what is scored here and trained on later; text is for
reading. No repetition penalty and no other help at sampling time: it would hide the over-steering the filter must see.

References
  mean difference: Rimsky et al. 2023, Steering Llama 2 via Contrastive Activation Addition, arXiv:2312.06681
  recipe: github.com/wassname/steer-heal-love
"""
import argparse
import json
import math
import os
import re
import struct
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path, PureWindowsPath
from typing import Callable

import safetensors.torch
import torch
import torch.nn.functional as F
from jinja2.exceptions import TemplateError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


def opt(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class SteerConfig:
    """steer: the vector, the dose, the sampler and the coherence filter"""
    steer_from: float = opt(0.0, "first depth that is steered (fraction of the number of blocks)")
    steer_to: float = opt(0.0, "last depth that is steered; 0 = calibrate: a tenth of the blocks, from where the persona is read")
    coeff: float = opt(0.0, "dose (multiples of v); 0 = search for the highest one that survives the filter")
    coeff_min: float = opt(0.1, "lowest dose of the search (multiples of v)")
    dose_steps: int = opt(4, "steps of the search: each halves the open interval of log(dose); its doses are one batch")
    n_probe: int = opt(24, "completions per dose of the search")
    min_survive: float = opt(0.9, "share of a dose's completions that must pass the filter")
    n_make: int = opt(64, "completions sampled per round")
    n_min: int = opt(16, "completions that must pass the filter, else the round has no data")
    max_new_tokens: int = opt(64, "longest completion (tokens)")
    temperature: float = opt(1.0, "sampling temperature")
    top_p: float = opt(0.95, "sample from the smallest set of tokens with this total probability")
    top_k: int = opt(64, "sample from this many most likely tokens; 0 = all")
    gen_batch: int = opt(128, "rows decoded at once; halved where memory runs out")
    window: int = opt(8, "length of the running window over base nll (tokens)")
    quantile: float = opt(1.0, "quantile of the base's own answers that a calibrated limit starts from")
    slack: float = opt(0.1, "room above that quantile: a fraction of its nats, or of the way to 1 for a share")
    max_window_nll: float = opt(0.0, "limit on the worst window's base nll (nats per token); 0 = calibrate")
    max_tail_ppl: float = opt(0.0, "limit on the last quarter's base perplexity; 0 = calibrate")
    max_ngram: float = opt(0.0, "limit on the share of repeated word or character n-grams; 0 = calibrate")
    max_loop: float = opt(0.0, "limit on the share of tokens seen shortly before; 0 = calibrate")
    min_words: int = opt(1, "fewest words of an answer")
    keep_unfinished: bool = opt(True, "keep answers that were cut at max_new_tokens")

    def __post_init__(self):
        if self.steer_from or self.steer_to:
            band(1, self.steer_from, self.steer_to)
        ranges = {"coeff": (0, 1e6), "coeff_min": (1e-6, 1), "dose_steps": (1, 64), "min_survive": (1e-6, 1),
                  "n_min": (1, self.n_make), "temperature": (1e-6, 1e6), "top_p": (1e-6, 1), "top_k": (0, 1e9),
                  "quantile": (0, 1), "slack": (0, 1e6), "max_window_nll": (0, 1e6), "max_tail_ppl": (0, 1e300),
                  "max_ngram": (0, 1), "max_loop": (0, 1), "min_words": (0, 1e9),
                  **{name: (1, 1e6) for name in ("n_probe", "n_make", "max_new_tokens", "gen_batch", "window")}}
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:                      # false for nan too
                raise ValueError(f"{name}={getattr(self, name)}: expected a number from {low:g} to {high:g}")


@dataclass(frozen=True)
class Completion:
    """One sampled answer. `ids` ends with the end-of-turn token if that was sampled; `finished` says so."""
    prompt: int                  # index into the prompts given to `generate`
    prompt_ids: list[int]
    ids: list[int]
    coeff: float
    finished: bool
    text: str


@dataclass(frozen=True)
class Limits:
    """The largest reading that passes, one per rule; `min_words` is the smallest that passes."""
    worst_window: float          # nats per token
    ppl_tail: float
    ngram: float                 # share
    loop: float                  # share
    min_words: int = 1


@dataclass(frozen=True)
class Verdict:
    """Why an answer was kept or dropped: the first rule it broke, its reading there, and the limit it was held to."""
    kept: bool
    rule: str                    # "" if kept; words, unfinished, worst_window, ppl_tail, ngram, loop or pattern
    value: float
    limit: float
    readings: dict
    match: str = ""              # the words a pattern hit


# ---- pure functions --------------------------------------------------------------------------------------------------

def band(n_layers: int, lo: float, hi: float) -> list[int]:
    """Every block whose depth interval [i/n, (i+1)/n] overlaps (lo, hi): never empty. 7 blocks, .45 to .55 -> [3]."""
    if not 0 <= lo < hi <= 1:
        raise ValueError(f"depth band from {lo} to {hi}: expected 0 <= from < to <= 1")
    return list(range(math.floor(lo * n_layers + 1e-9), math.ceil(hi * n_layers - 1e-9)))   # .55 * 100 = 55.000..01


def choose(logits: Tensor, u: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """One token per row by inverse CDF, from the distribution that temperature, then top-k, then top-p leave.

    logits: [B, V]; u: [B] uniform in [0, 1). Returns [B] long. A row's token depends on its own logits and u alone.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    k = min(top_k, logits.shape[-1]) if top_k else logits.shape[-1]
    top, token = logits.topk(k)                             # [B, k]  most likely first
    p = top.softmax(-1)                                     # [B, k]
    before = p.cumsum(-1) - p                               # [B, k]  probability of all likelier tokens
    kept = before < top_p                                   # [B, k]  the first token always stays
    cdf = (p * kept).cumsum(-1)                             # [B, k]
    at = (cdf <= u[:, None].to(cdf) * cdf[:, -1:]).sum(-1)                  # [B]
    at = at.minimum(kept.sum(-1) - 1)                       # u * total can round up to total
    return token.gather(-1, at[:, None])[:, 0]


def worst_mean(x: Tensor, window: int) -> float:
    """Largest mean of `window` neighbours of x [n]; of all of x where it is shorter; 0 where it is empty."""
    return x.unfold(0, min(window, len(x)), 1).mean(-1).max().item() if len(x) else 0.0


def repeats(items, n: int, window: int) -> float:
    """In the worst run of `window` n-grams: the share that was seen within the `window` n-grams before.

    Unlike the share of the most common n-gram it sees loops of any period and loops without a period (a few words
    shuffled for ever), and unlike a share of the whole text it is not diluted by a sane beginning.
    """
    last, again = {}, []
    for i in range(len(items) - n + 1):
        gram = tuple(items[i:i + n])
        again.append(float(i - last.get(gram, -math.inf) <= window))
        last[gram] = i
    again += [0.0] * (window // 2 - len(again))             # so "No, no, no." is not a loop
    return worst_mean(torch.tensor(again), window)


def readings(completion: Completion, nll: Tensor, *, window: int = 8) -> dict:
    """What the filter measures on one answer; always finite.

    nll: [n] base nll of each token of completion.ids. The base's nll is read over the whole answer in running windows,
    because a mean, or the tail alone, passes an answer that breaks in the middle and recovers. Loops need rules of
    their own: a repetition is easy to predict, so its nll is low.
    """
    if len(nll) != len(completion.ids):
        raise ValueError(f"{len(nll)} nll values for {len(completion.ids)} tokens: expected one per completion token")
    if not torch.isfinite(nll).all():
        raise RuntimeError("the base's nll is not finite: load the model in bfloat16 or float32, not float16")
    nll, words = nll.double().cpu(), re.findall(r"\w+", completion.text.lower())
    tail = nll[-max(4, len(nll) // 4):]
    return {"worst_window": worst_mean(nll, window),                                # nats per token
            "ppl_tail": math.exp(min(tail.mean().item(), 700.0)) if len(tail) else 0.0,
            "ngram": max(repeats(words, 4, 32), repeats(completion.text, 12, 64)),  # characters: runs, unspaced scripts
            "loop": repeats(completion.ids, 1, 32),
            "n_words": len(completion.text.split())}


def calibrate_limits(base: list[dict], cfg: SteerConfig) -> Limits:
    """Limits from `readings` of unsteered answers; a limit given in cfg is taken as it is.

    Make the base's answers with the sampler, the prompts and the length of the steered ones: a maximum over windows
    grows with all three. Two kinds of slack, because two kinds of quantity travel differently between models. Nats:
    a model's spread of nll grows with its level, so the slack is a fraction of the base's own quantile, for
    perplexity too (a tenth of the nats: 2 -> 2.1, 12 -> 15). Shares: the base's value may be 0 and can never pass
    1, so the slack is a fraction of the way from it to 1. A trait that the base never voices costs nats by itself:
    then add the base's answers under the persona prompt, with their nll read without that prompt.
    Raises ValueError if `base` is empty.
    """
    if not base:
        raise ValueError("no base readings to calibrate from: sample at least one unsteered answer")

    def quantile(name):
        return torch.tensor([r[name] for r in base], dtype=torch.float64).quantile(cfg.quantile).item()

    def share(name):
        return quantile(name) + min(cfg.slack, 1.0) * (1 - quantile(name))
    return Limits(worst_window=cfg.max_window_nll or (1 + cfg.slack) * quantile("worst_window"),
                  ppl_tail=cfg.max_tail_ppl or math.exp(min((1 + cfg.slack) * math.log(max(quantile("ppl_tail"), 1.0)), 700)),
                  ngram=cfg.max_ngram or share("ngram"), loop=cfg.max_loop or share("loop"), min_words=cfg.min_words)


def judge(completions: list[Completion], nlls: list[Tensor], limits: Limits, *, window: int = 8,
          patterns=(), keep_unfinished: bool = True) -> list[Verdict]:
    """One Verdict per completion, in order: nothing is dropped without a rule, a value and a limit.

    nlls: what `token_nll` of the base gave. patterns: regular expressions, case ignored, from the persona's data:
    refusals, and narration of the trait instead of enacting it. An empty answer always breaks rule `words`.
    """
    if len(completions) != len(nlls):
        raise ValueError(f"{len(nlls)} nlls for {len(completions)} completions: expected one each")
    verdicts = []
    for completion, nll in zip(completions, nlls):
        seen = readings(completion, nll, window=window)
        hits = [hit.group() for p in patterns if (hit := re.search(p, completion.text, re.IGNORECASE))]
        checks = [("words", seen["n_words"], limits.min_words, not seen["n_words"] >= max(limits.min_words, 1)),
                  ("unfinished", len(completion.ids), len(completion.ids) - 1,          # it filled its budget
                   not (completion.finished or keep_unfinished))]
        for rule in ("worst_window", "ppl_tail", "ngram", "loop"):
            checks.append((rule, seen[rule], getattr(limits, rule), seen[rule] > getattr(limits, rule)))
        checks.append(("pattern", len(hits), 0, bool(hits)))
        rule, value, limit, broken = next((c for c in checks if c[-1]), ("", 0, 0, False))
        verdicts.append(Verdict(not broken, rule, value, limit, seen, match=hits[0] if rule == "pattern" else ""))
    return verdicts


def find_dose(try_doses: Callable[[list[float]], list[float]], *, coeff_min: float = 0.1, steps: int = 4,
              splits: int = 2, min_survive: float = 0.9) -> tuple[float, list]:
    """The highest dose that survives: 1.0 if it does, else by repeated division in log(dose) down to `coeff_min`.

    try_doses(coeffs) -> for each, the share of completions that pass the filter at that dose: one batch a step. The
    first holds 1.0, coeff_min and what divides them in `splits`; each later one divides the interval above the highest
    dose that passed. steps=4, splits=2 and steps=2, splits=4 end on the same dose: 6 doses in 4 batches, or 8 in 2, which
    is slower where decoding is bound by arithmetic, as on a CPU (bench/generate.py), and not where it is bound by memory.
    1.0 adds the whole difference between the personas after every block of the band (over several blocks the additions
    pile up, so it may well be too much); more is not asked for. Returns (coeff, [(coeff, share), ...] in the order
    tried). RuntimeError if no dose passes.
    """
    if not 0 < coeff_min < 1:
        raise ValueError(f"coeff_min={coeff_min}: expected a dose between 0 and 1")
    if steps < 1 or splits < 2:
        raise ValueError(f"steps={steps}, splits={splits}: expected at least 1 and 2")

    def between(low, high):
        return [high * (low / high) ** (i / splits) for i in range(1, splits)]
    trials, doses = [], [1.0, *between(coeff_min, 1.0), coeff_min]
    for _ in range(steps):
        trials += zip(doses, try_doses(doses), strict=True)
        passed = [coeff for coeff, share in trials if share >= min_survive]
        if not passed:
            raise RuntimeError(f"the lowest dose fails: at coeff_min={coeff_min}, {trials[-1][1]:.0%} of completions "
                               f"pass the filter, need {min_survive:.0%}; lower --coeff-min or raise --slack")
        low = max(passed)
        if low == 1.0:
            break
        doses = between(low, min(coeff for coeff, _ in trials if coeff > low))
    return low, trials


# ---- plumbing: templates, padding, hooks -----------------------------------------------------------------------------

# same in evalmfv.py
def render(tok, user: str, system: str = "") -> str:
    """One user turn as the chat template writes it, up to and including the assistant tag.

    A template without a system role (Gemma 2 raises, others drop it) gets the system text in front of the user's. A
    model that can think does not: its first words after the tag are its answer."""
    def chat(*turns):
        messages = [{"role": role, "content": text} for role, text in turns]
        text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        is_open = text.rstrip().endswith("<think>")             # no switch in this template: close what it opened
        return text.rstrip() + "\n\n</think>\n\n" if is_open else text
    if not system:
        return chat(("user", user))
    try:
        text = chat(("system", system), ("user", user))
    except TemplateError:                                       # jinja2 comes with transformers' chat templates
        text = ""
    return text if system.strip() in text else chat(("user", f"{system}\n\n{user}"))


# same in lora.py
def blocks(model) -> nn.ModuleList:
    """The decoder blocks, in order; block i's output is hidden_states[i + 1], except the last, which is normed there."""
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", getattr(decoder, "h", None))        # GPT-2 and its kin say h
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no decoder .layers or .h: this architecture is not supported")
    return layers


def device_of(model) -> torch.device:
    """Where token ids go: to the embedding, which in a model spread over several devices need not be model.device."""
    return model.get_input_embeddings().weight.device


def encode(tok, users: list[str], systems: list[str]) -> list[list[int]]:
    """Rendered prompts as ids; the template wrote the BOS, so the tokenizer must not add another."""
    if not tok.chat_template:
        raise ValueError(f"{tok.name_or_path!r} has no chat template: use the model's -it or -Instruct sibling")
    texts = [render(tok, user, system) for user, system in zip(users, systems)]
    return [tok(text, add_special_tokens=False)["input_ids"] for text in texts]


# same in evalmfv.py
def in_batches(work: Callable, lengths: list[int], batch_size: int) -> list:
    """The result of every row, in order: work(indices) yields (index, result) for the rows of one batch.

    A batch holds rows of similar length, the longest first: if memory runs out, it does so at once. Then the batch size
    is halved, for the rest too; what was yielded by then is kept. torch.OutOfMemoryError if one row is too much.
    """
    left, found = sorted(range(len(lengths)), key=lambda i: -lengths[i]), {}
    while left:
        try:
            for i, result in work(left[:batch_size]):
                found[i] = result
        except RuntimeError as error:                           # the CPU raises no torch.OutOfMemoryError
            if not any(words in str(error) for words in ("out of memory", "allocate memory", "not enough memory")):
                raise
            batch_size = min(batch_size, len(left)) // 2
            if not batch_size:
                raise torch.OutOfMemoryError(f"out of memory with one row of {lengths[left[0]]} tokens alone: shorten "
                                             "it, load the model in bfloat16 or take a smaller one") from None
        left = [i for i in left if i not in found]
    return [found[i] for i in range(len(lengths))]


def left_pad(rows: list[list[int]], pad_id: int, device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as ids [B, T], attn [B, T] (1 = real token), position_ids [B, T] that are 0 on each first real token."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)         # [B, T]
    attn = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)  # [B, T]
    return ids, attn, (attn.cumsum(-1) - 1).clamp(min=0)


def pad_of(tok) -> int:
    """Any id will do: padding is masked."""
    return next(i for i in (tok.pad_token_id, tok.eos_token_id, 0) if i is not None)


# same in evalmfv.py
def roomy_cache(config, size: int):
    """A key-value cache with room for `size` columns: a step writes its own; the stock cache copies all before it too."""
    from transformers.cache_utils import DynamicCache, DynamicLayer         # slow to import: not for --help

    class RoomyLayer(DynamicLayer):
        def update(self, keys, values, *args, **kwargs):
            if not self.is_initialized:
                self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
                self.room = [x.new_empty(*x.shape[:2], size, x.shape[3]) for x in (keys, values)]   # [B, H, size, d/H]
                self.keys, self.values = (room[:, :, :0] for room in self.room)
            past = self.get_seq_length()
            now = past + keys.shape[2]
            for room, new in zip(self.room, (keys, values)):
                room[:, :, past:now] = new
            self.keys, self.values = (room[:, :, :now] for room in self.room)
            return self.keys, self.values

        def reorder_cache(self, beam_idx):                  # keeps these rows; unlike batch_select_indices all layers have it
            past = self.get_seq_length()
            self.room = [room[beam_idx.to(room.device)] for room in self.room]
            self.keys, self.values = (room[:, :, :past] for room in self.room)

    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]   # sliding ones stay
    return cache


@contextmanager
def hooked(model, hooks: dict[int, Callable]):
    """Each block of `hooks` calls its hook(h) -> new h or None on its output, inside the `with` only."""
    def wrap(hook):
        def forward_hook(block, args, out):
            is_tuple = isinstance(out, tuple)               # some architectures return (h, ...)
            h = hook(out[0] if is_tuple else out)           # [B, T, d]
            return (h, *out[1:]) if is_tuple and h is not None else h
        return forward_hook
    handles, layers = [], blocks(model)
    try:
        for layer, hook in hooks.items():
            if not 0 <= layer < len(layers):
                raise ValueError(f"layer {layer}: the model has blocks 0 to {len(layers) - 1}")
            handles.append(layers[layer].register_forward_hook(wrap(hook)))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def steered(model, vectors: dict[int, Tensor], coeff: float | Tensor):
    """A context manager: add coeff * v to the output of each block in `vectors`, inside the `with` only.

    coeff: multiples of v; a float, or a Tensor [B] with one dose per row of the batch. The float 0 adds no hook at all.
    """
    def adder(v):
        dose = coeff[:, None, None].to(v) if isinstance(coeff, Tensor) else coeff
        shift = dose * v                                    # [B, 1, d] or [d]

        def add(h):
            nonlocal shift
            if shift.dim() == 3 and len(shift) != len(h):
                raise ValueError(f"{len(shift)} doses for a batch of {len(h)} rows: expected one per row")
            shift = shift.to(h.device, h.dtype)             # copies once, on the first call
            return h + shift
        return add
    is_off = not isinstance(coeff, Tensor) and coeff == 0
    return hooked(model, {} if is_off else {layer: adder(v) for layer, v in vectors.items()})


# ---- the four passes over the model ----------------------------------------------------------------------------------

@torch.no_grad()
def tag_states(model, tok, pos, neg, contexts: list[str], layers: list[int], *, batch_size: int = 32) -> dict[int, Tensor]:
    """The state after each block at the last prompt token, the assistant tag: {layer: [2, n, d]} float32 on the CPU.

    pos, neg: opposite persona texts for the system role, each a str or a list that the contexts cycle through. Entry
    [0, i] and [1, i] are the same context under pos and under neg. Raises ValueError if anything is missing.
    """
    pos, neg = ([side] if isinstance(side, str) else list(side) for side in (pos, neg))
    if not (pos and neg and contexts and layers):
        raise ValueError(f"{len(pos)} pos, {len(neg)} neg, {len(contexts)} contexts, {len(layers)} layers: need one of each")
    n = len(contexts)
    personas = [side[i % len(side)] for side in (pos, neg) for i in range(n)]
    rows = encode(tok, contexts * 2, personas)

    def read(batch):
        states = {}                                         # layer -> [B, d]

        def keep(layer):
            def hook(h):
                states[layer] = h[:, -1].float().cpu()      # left padding: -1 is the tag
            return hook
        ids, attn, position_ids = left_pad([rows[i] for i in batch], pad_of(tok), device_of(model))
        with hooked(model, {layer: keep(layer) for layer in layers}):
            model(input_ids=ids, attention_mask=attn, position_ids=position_ids, use_cache=False, logits_to_keep=1)
        return zip(batch, torch.stack([states[layer] for layer in layers], 1))              # (i, [L, d])
    h_last = torch.stack(in_batches(read, list(map(len, rows)), batch_size), 1)             # [L, 2 n, d]
    return {layer: h.view(2, n, -1) for layer, h in zip(layers, h_last)}


def fit_vectors(model, tok, pos, neg, contexts: list[str], layers: list[int], *,
                batch_size: int = 32) -> dict[int, Tensor]:
    """How far the persona moves the residual stream, on average over contexts, the more diverse the better.

    Arguments as in `tag_states`. Returns {layer: [d]} float32 on the CPU, in activation units, not normalised: its
    length is the dose coeff = 1. Source: Rimsky et al. 2023, arXiv:2312.06681.
    """
    states = tag_states(model, tok, pos, neg, contexts, layers, batch_size=batch_size)
    return {layer: (h[0] - h[1]).mean(0) for layer, h in states.items()}


def find_layers(model, tok, pos, neg, contexts: list[str], *, share: float = 0.5) -> tuple[list[int], list[float]]:
    """Where the persona is read: a tenth of the blocks, from the first at which v is half as strong as it ever gets.

    Strength is |v| / mean |h| at the assistant tag. Before that block the tag does not know the persona yet, so adding v
    there says little; after it, later blocks have less time to act on it. Arguments as in `tag_states`.
    Returns the layers and the strength of every block.
    """
    states = tag_states(model, tok, pos, neg, contexts, list(range(len(blocks(model)))))
    strength = [((h[0] - h[1]).mean(0).norm() / h.norm(dim=-1).mean()).item() for h in states.values()]
    first = next(i for i, x in enumerate(strength) if x >= share * max(strength))
    return list(range(first, min(first + max(1, round(len(strength) / 10)), len(strength)))), strength


@torch.no_grad()
def token_nll(model, completions: list[Completion], *, batch_size: int = 32, pad_id: int = 0) -> list[Tensor]:
    """Nats per completion token [n_i] float32, under the model as it is now and the ids as they were sampled.

    Only the columns of completions get logits, and a batch gets fewer rows where those would pass 2^28 numbers: half a
    GB in bfloat16, or one row's if that is more (a completion of 512 tokens and V = 262k are 2^27).
    """
    rows = [c.prompt_ids + c.ids for c in completions]
    kept = max((len(c.ids) for c in completions), default=0) + 1            # the column before each token, and the last
    batch_size = min(batch_size, max(1, 2 ** 28 // (kept * model.config.get_text_config().vocab_size)))

    def score(batch):
        ids, attn, position_ids = left_pad([rows[i] for i in batch], pad_id, device_of(model))              # [B, T] each
        kept = max(len(completions[i].ids) for i in batch) + 1
        logits = model(input_ids=ids, attention_mask=attn, position_ids=position_ids, use_cache=False,
                       logits_to_keep=kept).logits[:, :-1]          # [B, kept - 1, V]
        for row, i in enumerate(batch):
            n = len(completions[i].ids)                     # left padding: a row's completion is its last n tokens
            pairs = zip(logits[row, kept - 1 - n:].split(64), ids[row, ids.shape[1] - n:].split(64))    # float32: 64 at once
            yield i, torch.cat([F.cross_entropy(z.float(), target, reduction="none") for z, target in pairs]).cpu()  # [n]
    return in_batches(score, list(map(len, rows)), batch_size)


@torch.no_grad()
def generate(model, tok, prompts: list[str], *, system: str = "", vectors: dict[int, Tensor] | None = None,
             coeffs: list[float] | None = None, greedy: bool = False, max_new_tokens: int = 64,
             temperature: float = 1.0, top_p: float = 0.95, top_k: int = 64, seed: int = 0, n_draws: int = 0,
             batch_size: int = 128) -> list[Completion]:
    """Answers to many prompts at many doses in one left-padded batch; one Completion per prompt, in the order given.

    coeffs: one dose per prompt (with `vectors`); to sample a prompt at three doses, list it three times. All randomness
    is one table u[prompt, step] drawn from `seed` beforehand: a row's answer does not depend on who shares its batch.
    n_draws: rows that are n_draws apart share their random numbers, so that doses differ by nothing else; 0 = none do.
    batch_size: rows decoded at once, fewer where memory runs out. torch.OutOfMemoryError if a single row is too much.
    """
    if (vectors is None) != (coeffs is None) or (coeffs is not None and len(coeffs) != len(prompts)):
        raise ValueError(f"{len(prompts)} prompts, vectors {'not ' * (vectors is None)}given, coeffs {coeffs}: "
                         "expected both vectors and one coeff per prompt, or neither")
    if not (temperature > 0 and 0 < top_p <= 1 and top_k >= 0 and max_new_tokens >= 1 and batch_size >= 1):
        raise ValueError(f"temperature={temperature}, top_p={top_p}, top_k={top_k}, max_new_tokens={max_new_tokens}, "
                         f"batch_size={batch_size}: out of range; for temperature 0 pass greedy=True")
    device, pad_id = device_of(model), pad_of(tok)
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tok.eos_token_id} - {None}
    end_ids = torch.tensor(sorted(ends), dtype=torch.long, device=device)
    vectors = {layer: v.to(device) for layer, v in (vectors or {}).items()}
    doses = torch.tensor(coeffs if coeffs is not None else [0.0] * len(prompts), device=device)          # [n]
    u = torch.rand(n_draws or len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed)).to(device)
    rows = encode(tok, prompts, [system] * len(prompts))

    def completion(i, new):
        n = next((j + 1 for j, token in enumerate(new) if token in ends), len(new))
        return Completion(i, rows[i], new[:n], coeffs[i] if coeffs is not None else 0.0, finished=new[n - 1] in ends,
                          text=tok.decode(new[:n], skip_special_tokens=True))

    def decode(batch):
        ids, attn, position_ids = left_pad([rows[i] for i in batch], pad_id, device)                     # [B, T] each
        width, cache = ids.shape[1], roomy_cache(model.config, ids.shape[1] + max_new_tokens)
        attn = F.pad(attn, (0, max_new_tokens), value=1)                    # [B, T + max_new_tokens]
        row = torch.tensor(batch, device=device)                            # [B]  the rows that are still computed
        sampled = torch.full((len(batch), max_new_tokens), pad_id, device=device)
        done = torch.zeros(len(batch), dtype=torch.bool, device=device)     # [B]  ended, still computed
        # ---- one token for every live row ------------------------------------------------------------------------
        for step in range(max_new_tokens):
            with steered(model, vectors, doses[row]):
                logits = model(input_ids=ids, attention_mask=attn[:, :width + step], position_ids=position_ids,
                               past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]    # [B, V]
            if step == 0 and logits.isnan().any():
                raise RuntimeError("the model's logits are nan: load it in bfloat16 or float32, or lower the dose")
            token = logits.argmax(-1) if greedy else choose(
                logits, u[row % len(u), step], temperature=temperature, top_p=top_p, top_k=top_k)        # [B]
            sampled[:, step] = token                        # past a row's end token: cut off in completion()
            done = done | torch.isin(token, end_ids) | (step == max_new_tokens - 1)
            n_live = int((~done).sum())
            if n_live <= len(done) // 2:                    # copying the cache pays once half the batch is done
                for i, new in zip(row[done].tolist(), sampled[done, :step + 1].tolist()):
                    yield i, completion(i, new)
                if n_live == 0:
                    return
                stay = (~done).nonzero()[:, 0]
                cache.reorder_cache(stay)               # linear attention has no batch_select_indices
                row, attn, sampled, done = row[stay], attn[stay], sampled[stay], done[stay]
                token, position_ids = token[stay], position_ids[stay]
            ids, position_ids = token[:, None], position_ids[:, -1:] + 1    # [B, 1] each
        # ----------------------------------------------------------------------------------------------------------
    return in_batches(decode, list(map(len, rows)), batch_size)


# ---- vectors as files ------------------------------------------------------------------------------------------------

# same in lora.py
def write_whole(path, content: bytes) -> None:
    """Write to a temporary file beside `path` and rename it: a reader sees the old file or the new one, never half."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if hasattr(os, "O_DIRECTORY"):                          # the new name survives a power cut too; not on Windows
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)                       # still there only if something went wrong


def save_vectors(path, vectors: dict[int, Tensor], coeff: float, notes: dict[str, str]) -> None:
    """`layer.N` [d] float32, raw v, with coeff and notes as metadata: `steered(model, *read_vectors(path)[:2])` is the dose.

    Read back and compared; raises RuntimeError if that differs."""
    tensors = {f"layer.{layer}": v.float().cpu().contiguous() for layer, v in vectors.items()}
    write_whole(path, safetensors.torch.save(tensors, notes | {"coeff": repr(coeff)}))
    found, dose, _ = read_vectors(path)
    if dose != coeff or not same(found, {layer: tensors[f"layer.{layer}"] for layer in vectors}):
        raise RuntimeError(f"{path}: what was read back is not what was written")


def read_vectors(path) -> tuple[dict[int, Tensor], float, dict[str, str]]:
    """Vectors, coeff and notes of a safetensors file of `save_vectors` or of a round of loop.py."""
    try:
        with safe_open(path, framework="pt") as file:
            vectors = {int(key.removeprefix("layer.")): file.get_tensor(key) for key in file.keys()}
            notes = dict(file.metadata() or {})
            return vectors, float(notes.pop("coeff")), notes
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: no file of steering vectors ({error})") from None


def save_gguf(path, vectors: dict[int, Tensor], coeff: float, model_type: str, notes: dict[str, str]) -> None:
    """A llama.cpp control vector: coeff is baked in, so its scale 1.0 is the dose, and `direction.N` is for block N.

    That is GGUF version 3: strings and one uint32 as key-values, then float32 tensors aligned to 32 bytes. llama.cpp adds
    direction.N to the output of block N at every position, like `steered`; the file has no field that says so, so the
    notes do. Read back and compared. Raises ValueError for block 0, which llama.cpp does not steer, and RuntimeError if
    the file read back is not the dose.
    """
    if 0 in vectors:
        raise ValueError("llama.cpp cannot steer block 0, which these vectors do: fit them with a band that starts later")
    directions = {layer: (coeff * v.float()).cpu() for layer, v in vectors.items()}
    if not all(v.isfinite().all() and v.any() for v in directions.values()):
        raise ValueError(f"a vector is zero or not finite at dose {coeff}: the file would do nothing, or harm")

    def string(text):
        return struct.pack("<Q", len(text.encode())) + text.encode()
    fields = {"general.architecture": "controlvector", "controlvector.model_hint": model_type, "controlvector.layer_count": len(directions),
              **{f"steering.{key}": value for key, value in notes.items() if value}, "steering.coeff": repr(coeff)}
    head, body = b"GGUF" + struct.pack("<IQQ", 3, len(directions), len(fields)), b""
    for key, value in fields.items():
        head += string(key) + (struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<I", 8) + string(value))
    for layer, v in directions.items():
        head += string(f"direction.{layer}") + struct.pack("<IQIQ", 1, len(v), 0, len(body))         # one dimension, float32
        body += v.numpy().astype("<f4").tobytes() + b"\0" * (-4 * len(v) % 32)
    write_whole(path, head + b"\0" * (-len(head) % 32) + body)
    if not same(read_gguf(path)[0], directions):
        raise RuntimeError(f"{path}: what was read back is not what was written")


def read_gguf(path) -> tuple[dict[int, Tensor], dict]:
    """Directions {block: [d]} and key-values of a control vector file; reads what `save_gguf` writes, not all of GGUF."""
    content, at = Path(path).read_bytes(), 24
    if content[:8] != b"GGUF\3\0\0\0":
        raise ValueError(f"{path}: not a GGUF file of version 3")

    def take(form):
        nonlocal at
        value, = struct.unpack_from("<" + form, content, at)
        at += struct.calcsize("<" + form)
        return value

    def string():
        return take(f"{take('Q')}s").decode()
    n_tensors, n_fields = struct.unpack_from("<QQ", content, 8)
    fields, places = {}, {}
    for _ in range(n_fields):
        key, kind = string(), take("I")
        if kind not in (4, 8):
            raise ValueError(f"{path}: {key} is of type {kind}; a control vector has strings (8) and uint32 (4) only")
        fields[key] = take("I") if kind == 4 else string()
    for _ in range(n_tensors):
        name, n_dims, size, kind, offset = string(), take("I"), take("Q"), take("I"), take("Q")
        if n_dims != 1 or kind != 0 or not re.fullmatch(r"direction\.\d+", name):
            raise ValueError(f"{path}: {name} of {n_dims} dimensions and type {kind}; expected direction.N, one-dimensional float32")
        places[int(name.removeprefix("direction."))] = offset, size
    start = at + -at % 32
    return {layer: torch.frombuffer(bytearray(content[start + offset:start + offset + 4 * size]), dtype=torch.float32)
            for layer, (offset, size) in places.items()}, fields


def same(a: dict[int, Tensor], b: dict[int, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[layer], b[layer]) for layer in a)


def from_run(folder: Path, rnd: int | None) -> tuple[dict[int, Tensor], float, dict[str, str], str]:
    """Vectors, dose, notes and base model of an accepted round of loop.py; None is the first, which steers the bare base.

    Raises ValueError if there is no such round."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    options, persona = run["options"], run["persona"]
    files = {int(path.parent.name): path for path in sorted(folder.glob("rounds/[0-9]*/vectors.safetensors"))}
    if not files or rnd not in (None, *files):
        raise ValueError(f"{folder} has {'' if rnd is None else f'no round {rnd}; '}accepted rounds: {', '.join(map(str, files)) or 'none'}")
    rnd = min(files) if rnd is None else rnd
    vectors, coeff, _ = read_vectors(files[rnd])
    before = [i for i in files if i < rnd]
    notes = describe(options["model"], options["revision"], persona["pos"], persona["neg"], vectors)
    notes["fitted_on"] = "base" + (f" + the adapters of rounds {', '.join(map(str, before))}" if before else "")
    return vectors, coeff, notes, options["model"]


def persona_pair(name: str) -> tuple:
    """The texts of a persona of data/personas.json and of its opposite."""
    personas = json.loads((Path(__file__).parent / "data" / "personas.json").read_text(encoding="utf-8"))
    if name not in personas:
        raise ValueError(f"--persona {name}: there is {', '.join(personas)}")
    return personas[name]["pos"], personas[name]["neg"]


def describe(model: str, revision: str, pos, neg, vectors) -> dict[str, str]:
    """What a file of vectors cannot say by itself, as strings; of a local folder only the name."""
    is_path = Path(model).exists() or model.startswith((".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model)
    return {"operation": "add", "hook": "block_output", "positions": "all", "layers": json.dumps(list(vectors)),
            "pos": json.dumps(pos, ensure_ascii=False), "neg": json.dumps(neg, ensure_ascii=False),
            "model": PureWindowsPath(model.rstrip("/\\")).name if is_path else model, "revision": revision}


def printable(text: str) -> str:
    """Model text without control and direction marks: it cannot move the cursor, colour the terminal or turn a line."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]+", " ", text)


def run(args, parser, here: Path) -> None:
    """What the parsed command asks for: files of vectors, answers side by side, or both."""
    is_run = (Path(args.model) / "run.json").exists()
    if is_run and (args.prompts or not (args.gguf or args.save)):
        parser.error(f"{args.model} is a run folder: give --gguf FILE or --save FILE and no prompts (to talk to it: python loop.py chat)")
    if is_run and (args.persona or args.pos or args.neg):
        parser.error(f"{args.model} is a run folder, whose persona is its own: leave out --persona, --pos and --neg")
    if not is_run and not (args.prompts or args.gguf or args.save):
        parser.error("give prompts to answer, --gguf FILE or --save FILE")
    if is_run:
        vectors, coeff, notes, name = from_run(Path(args.model), args.round)
        coeff = coeff if args.coeff is None else args.coeff
        from transformers import AutoConfig
        model_type = AutoConfig.from_pretrained(here / "pocket" if name == "pocket" else name, trust_remote_code=False).model_type
        print(f"fitted on {notes['fitted_on']}, dose {coeff:.4g}")
    else:
        if args.persona:
            args.pos, args.neg = persona_pair(args.persona)
        if not (args.pos and args.neg):
            parser.error("give --persona, or both --pos and --neg")
        coeff = 0.5 if args.coeff is None else args.coeff
        from transformers import AutoModelForCausalLM, AutoTokenizer        # slow to import: not for --help
        contexts = json.loads(args.contexts.read_text(encoding="utf-8"))
        tok = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, use_safetensors=True,
                                                     trust_remote_code=False).eval()
        layers, _ = find_layers(model, tok, args.pos, args.neg, contexts)
        vectors = fit_vectors(model, tok, args.pos, args.neg, contexts, layers)
        model_type = model.config.model_type
        notes = describe(args.model, getattr(model.config, "_commit_hash", None) or "", args.pos, args.neg, vectors)
    print("  ".join(f"layer {layer}  |v| {v.norm():.2f}" for layer, v in vectors.items()), flush=True)
    if args.save:
        save_vectors(args.save, vectors, coeff, notes)
        print(f"wrote {args.save}: raw vectors, dose {coeff:.4g} in its metadata; read back, equal")
    if args.gguf:
        save_gguf(args.gguf, vectors, coeff, model_type, notes)
        print(f"wrote {args.gguf}: scale 1.0 is dose {coeff:.4g}; read back, equal\n"
              f"serve llama-server -m MODEL.gguf --control-vector {args.gguf} --control-vector-layer-range {min(vectors)} {max(vectors)}")
    if not args.prompts:
        return
    n, sampler = len(args.prompts), dict(max_new_tokens=args.max_new_tokens, seed=args.seed)
    base = generate(model, tok, args.prompts, **sampler)
    moved = generate(model, tok, args.prompts, vectors=vectors, coeffs=[coeff] * n, **sampler)
    nlls = token_nll(model, base + moved)
    for i, prompt in enumerate(args.prompts):
        print(f"\n> {printable(prompt)}")
        pairs = [textwrap.wrap(printable(c.text), 56) for c in (base[i], moved[i])]
        worst = [f"worst window {readings(c, nll)['worst_window']:.2f} nats" for c, nll in
                 ((base[i], nlls[i]), (moved[i], nlls[n + i]))]
        for left, right in [("base", f"steered, coeff {coeff}"), *zip_longest(*pairs, fillvalue=""), worst]:
            print(f"{left:<57}| {right}", flush=True)


def main(argv=None):
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="base | steered, side by side; or the steering vector as a file")
    parser.add_argument("model", help="folder or hub name of a chat model; or a run folder of loop.py, with --gguf or --save")
    parser.add_argument("prompts", nargs="*", help="user turns to answer")
    parser.add_argument("--persona", help="an entry of data/personas.json")
    parser.add_argument("--pos", help="persona text to move towards, instead of --persona")
    parser.add_argument("--neg", help="its opposite, to move away from")
    parser.add_argument("--contexts", type=Path, default=here / "data" / "contexts.json", help="JSON list of user turns to read v from")
    parser.add_argument("--coeff", type=float, help="dose (multiples of v); default: 0.5, or the run's")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--round", type=int, help="of a run: whose vector; default: its first accepted round")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="write a llama.cpp control vector, its scale 1.0 = the dose")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the raw vectors as safetensors, dose and persona pair as metadata")
    args = parser.parse_intermixed_args(argv)               # options may stand between MODEL and the prompts
    try:
        run(args, parser, here)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error).splitlines()[0])


if __name__ == "__main__":
    main()
