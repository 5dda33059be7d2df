"""Steer: push a model towards a persona with one vector, and keep only the answers that stay coherent.

    v = mean over contexts of h(persona +) - h(persona -)      read at the assistant tag, after a block
    h <- h + coeff * v                                         at every position, inside `with steered(...)`

Needs torch and transformers; copy this file alone. Knows nothing of healing or LoRA: it reads, steers and
scores the model as it is when called, so the caller decides which adapters are on. `python steer.py` shows
base | steered side by side. A completion keeps the token ids it was sampled with: they are what is scored and
trained on later, its text is for reading. No help at sampling time: it would hide what the filter must see.

References
  mean difference: Rimsky et al. 2023, Steering Llama 2 via Contrastive Activation Addition, arXiv:2312.06681
  recipe: github.com/wassname/steer-heal-love
"""
import argparse
import inspect
import json
import math
import re
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COEFF_MIN = 0.1             # lowest dose of the search (multiples of v): less is hardly a persona
DOSE_STEPS = 4              # steps of the search: each halves the open interval of log(dose)
N_PROBE = 24                # completions per dose of the search: enough to tell .8 from .95 survival
WINDOW = 8                  # tokens of the running window over base nll: about as long as a broken phrase
SENTINEL = "ZZuniq_Sentinel_ZZ"                     # shows where a template puts the words it is given


# same in heal.py and lora.py
def opt(default, help, low=None, high=None):
    return field(default=default, metadata={"help": help, "low": low, "high": high})


def check_ranges(cfg) -> None:
    """ValueError for the first number of a config that is outside the range which its option names."""
    for f in fields(cfg):
        value, low, high = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"]
        values = value if isinstance(value, tuple) else (value,)
        if low is not None and not all(x is None or low <= x <= high for x in values):        # false for nan too
            raise ValueError(f"{f.name}={value}: expected a number from {low:g} to {high:g}")


@dataclass(frozen=True)
class SteerConfig:
    """steer: the vector, the dose, the sampler and the coherence filter"""
    steer_band: tuple[float, float] | None = opt(
        None, "first and last depth steered (shares of the number of blocks); default: where v is strong", 0, 1)
    coeff: float | None = opt(
        None, "dose (multiples of v); default: the highest that survives the filter", 1e-6, 1e6)
    min_survive: float = opt(0.9, "share of a dose's completions that must pass the filter", 1e-6, 1)
    n_make: int = opt(64, "completions sampled per round", 1, 1e6)
    n_min: int = opt(16, "completions that must pass the filter, else the round has no data", 1, 1e6)
    max_new_tokens: int = opt(64, "longest completion (tokens)", 1, 1e6)
    temperature: float = opt(1.0, "sampling temperature", 1e-6, 1e6)
    top_p: float = opt(0.95, "sample from the smallest set of tokens with this total probability", 1e-6, 1)
    top_k: int = opt(64, "sample from this many most likely tokens; 0 = all", 0, 1e9)
    slack: float = opt(0.1, "room above the base's own worst answer: a fraction of its nats, "
                            "or of the way to 1 for a share", 0, 1e6)

    def __post_init__(self):
        check_ranges(self)
        if self.n_min > self.n_make:
            raise ValueError(f"n_min={self.n_min}: expected at most n_make={self.n_make}")
        if self.steer_band:
            band(1, *self.steer_band)


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
    """The largest reading that passes, one per rule."""
    worst_window: float          # nats per token
    ppl_tail: float
    ngram: float                 # share
    loop: float                  # share


@dataclass(frozen=True)
class Verdict:
    """Why an answer was kept or dropped: the first rule it broke, its reading there, and the limit."""
    kept: bool
    rule: str                    # "" if kept, words, unfinished, a name in Limits, or pattern
    value: float
    limit: float
    readings: dict
    match: str = ""              # the words a pattern hit


# ---- pure functions ---------------------------------------------------------------------------------------

def band(n_layers: int, lo: float, hi: float) -> list[int]:
    """Every block whose depth interval [i/n, (i+1)/n] overlaps (lo, hi): 7 blocks, .45 to .55 -> [3]; never none."""
    if not 0 <= lo < hi <= 1:
        raise ValueError(f"depth band from {lo} to {hi}: expected 0 <= from < to <= 1")
    return list(range(math.floor(lo * n_layers + 1e-9), math.ceil(hi * n_layers - 1e-9)))     # float products


def choose(logits: Tensor, u: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """One token per row by inverse CDF, from the distribution that temperature, then top-k, then top-p leave.

    logits: [B, V]; u: [B] uniform in [0, 1). Returns [B] long: a token depends on its row's logits and u alone.
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

    Unlike the share of the most common n-gram it sees loops of any period and loops without one (a few words
    shuffled for ever), and unlike a share of the whole text it is not diluted by a sane beginning.
    """
    last, again = {}, []
    for i in range(len(items) - n + 1):
        gram = tuple(items[i:i + n])
        again.append(float(i - last.get(gram, -math.inf) <= window))
        last[gram] = i
    again += [0.0] * (window // 2 - len(again))             # so "No, no, no." is not a loop
    return worst_mean(torch.tensor(again), window)


def readings(completion: Completion, nll: Tensor) -> dict:
    """What the filter measures on one answer, given nll [n], the base's nats for each of its tokens.

    The nll is read in running windows: a mean, or the tail alone, passes an answer that breaks in the middle and
    recovers. Loops need rules of their own: a repetition is easy to predict, so its nll is low.
    """
    if len(nll) != len(completion.ids):
        raise ValueError(f"{len(nll)} nll values for {len(completion.ids)} tokens: expected one per token")
    if not torch.isfinite(nll).all():
        raise RuntimeError("the base's nll is not finite: load the model in bfloat16 or float32, not float16")
    nll, words = nll.double().cpu(), re.findall(r"\w+", completion.text.lower())
    tail = nll[-max(4, len(nll) // 4):]
    return {"worst_window": worst_mean(nll, WINDOW),                                # nats per token
            "ppl_tail": math.exp(min(tail.mean().item(), 700.0)) if len(tail) else 0.0,
            "ngram": max(repeats(words, 4, 32), repeats(completion.text, 12, 64)),  # unspaced scripts
            "loop": repeats(completion.ids, 1, 32),
            "n_words": len(completion.text.split())}


def calibrate_limits(base: list[dict], cfg: SteerConfig) -> Limits:
    """Limits from `readings` of unsteered answers: the worst that the base does by itself, and cfg.slack more.

    Make those with the sampler, prompts and length of the steered ones: a maximum over windows grows with all
    three. Nats, perplexity too, get a fraction of themselves as slack: a model's spread of nll grows with its
    level. Shares get a fraction of the way to 1: they may be 0. A trait that the base never voices costs nats by
    itself: add the base's answers under the persona prompt, with their nll read without that prompt.
    """
    if not base:
        raise ValueError("no base readings to calibrate from: sample at least one unsteered answer")
    worst = {name: max(r[name] for r in base) for name in ("worst_window", "ppl_tail", "ngram", "loop")}
    share = {name: worst[name] + min(cfg.slack, 1.0) * (1 - worst[name]) for name in ("ngram", "loop")}
    ppl = math.exp(min((1 + cfg.slack) * math.log(max(worst["ppl_tail"], 1.0)), 700))
    return Limits(worst_window=(1 + cfg.slack) * worst["worst_window"], ppl_tail=ppl, **share)


def judge(completions: list[Completion], nlls: list[Tensor], limits: Limits, *, patterns=(),
          keep_unfinished: bool = True) -> list[Verdict]:
    """One Verdict per completion, in order: nothing is dropped without a rule, a value and a limit.

    nlls: what `token_nll` of the base gave. patterns: regular expressions, case ignored, from the persona's
    data: refusals, and narration of the trait. keep_unfinished: answers that were cut are no worse for it.
    """
    verdicts = []
    for completion, nll in zip(completions, nlls, strict=True):
        seen, n = readings(completion, nll), len(completion.ids)
        hits = [hit.group() for p in patterns if (hit := re.search(p, completion.text, re.IGNORECASE))]
        checks = [("words", seen["n_words"], 1, seen["n_words"] < 1),
                  ("unfinished", n, n, not (completion.finished or keep_unfinished)),      # cut at max_new_tokens
                  *((rule, seen[rule], limit, seen[rule] > limit) for rule, limit in vars(limits).items()),
                  ("pattern", len(hits), 0, bool(hits))]
        rule, value, limit, broken = next((c for c in checks if c[-1]), ("", 0, 0, False))
        verdicts.append(Verdict(not broken, rule, value, limit, seen, hits[0] if rule == "pattern" else ""))
    return verdicts


def find_dose(try_doses: Callable[[list[float]], list[float]], *, coeff_min: float = COEFF_MIN,
              steps: int = DOSE_STEPS, min_survive: float = 0.9) -> tuple[float, list]:
    """The highest dose that survives: 1.0 if it does, else by bisection of log(dose) down to `coeff_min`.

    try_doses(coeffs) -> for each, the share of completions that pass the filter: one batch a step, three doses
    in the first. Returns (coeff, [(coeff, share), ...] in the order tried). RuntimeError if none passes.
    """
    trials, doses = [], [1.0, coeff_min ** 0.5, coeff_min]
    for _ in range(steps):
        trials += zip(doses, try_doses(doses), strict=True)
        passed = [coeff for coeff, share in trials if share >= min_survive]
        if not passed:
            raise RuntimeError(f"the lowest dose fails: at {coeff_min:g}, {trials[-1][1]:.0%} of completions "
                               f"pass, need {min_survive:.0%}; raise --slack or lower --min-survive")
        low = max(passed)
        if low == 1.0:
            break
        high = min(coeff for coeff, _ in trials if coeff > low)
        doses = [high * (low / high) ** 0.5]
    return low, trials


# ---- plumbing: templates, batches, the cache, hooks -------------------------------------------------------

def written(tok, turns: list[tuple[str, str]], **how) -> str:
    """What the chat template writes for (role, words) turns, as text or, where it reads those, as lists of parts.

    ValueError if there is no template, if it raises, or if words do not stand in what it writes: a template that
    reads parts drops plain text in silence. Sentinels go first: a short word may stand there by chance.
    """
    name, errors = repr(tok.name_or_path), []
    if not tok.chat_template:
        raise ValueError(f"{name} has no chat template: use the model's -it or -Instruct sibling")
    trial = [(role, f"{SENTINEL}{i}") for i, (role, _) in enumerate(turns)]
    for as_parts in (False, True):
        try:
            for some in (trial, turns):
                parts = [[{"type": "text", "text": words}] if as_parts else words for _, words in some]
                messages = [{"role": role, "content": content} for (role, _), content in zip(some, parts)]
                text = tok.apply_chat_template(messages, tokenize=False, **how)
                lost = [role for role, words in some if words.strip() not in text]
                if lost or as_parts and re.search("[\"']type[\"']: *[\"']text", text):      # a list, printed as one
                    raise ValueError(f"it drops or alters the words of the {(lost or ['user'])[0]}")
            return text
        except Exception as error:                          # a template is a program: it can raise anything
            errors.append(" ".join(str(error).split()))
    raise ValueError(f"the chat template of {name} fails: {errors[0]}")


def render(tok, user: str, system: str = "") -> str:
    """One user turn as the chat template writes it, up to and including the assistant tag.

    A template without a system role (Gemma 2 raises, others drop it) gets the system text in front of the user's.
    A model that can think does not: its first words after the tag are its answer."""
    if re.search("[\ud800-\udfff]", user + system):
        raise ValueError(f"{(user + system)!r:.80} is not text: it has bytes that are not UTF-8")
    how = dict(add_generation_prompt=True, enable_thinking=False)
    try:
        text = written(tok, [("system", system)] * bool(system) + [("user", user)], **how)
    except ValueError:
        if not system:
            raise
        text = written(tok, [("user", f"{system}\n\n{user}")], **how)
    is_open = text.rstrip().endswith("<think>")             # no switch in this template: close what it opened
    return text.rstrip() + "\n\n</think>\n\n" if is_open else text


def around_answer(tok, user: str, more=(), **how) -> tuple[str, str]:
    """What the template writes before and after an assistant's words: a sentinel is put there and cut out."""
    text = written(tok, [("user", user), ("assistant", SENTINEL), *more], **how)
    before, _, after = text.partition(SENTINEL)
    return before, after


def end_ids(model, tok) -> list[int]:
    """The tokens that end an answer: the model's, the tokenizer's, and what the template writes after an answer.

    A fine-tune with a new template may leave the first two as they were, and run on into invented turns."""
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tok.eos_token_id} - {None}
    for more in ((), [("user", "_")]):                      # some close a turn only when the next one opens
        try:
            after = around_answer(tok, "_", more)[1].lstrip()
        except ValueError:                                  # it takes no assistant's words
            break
        first = tok(after, add_special_tokens=False)["input_ids"][:1]
        if first and first[0] in tok.added_tokens_decoder:  # plain text ends nothing
            return sorted(ends | set(first))
    return sorted(ends)


def blocks(model) -> nn.ModuleList:
    """The decoder blocks; block i's output is hidden_states[i + 1], except the last, which is normed there."""
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", getattr(decoder, "h", None))        # GPT-2 and its kin say h
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no .layers or .h: this architecture is not supported")
    return layers


def device_of(model) -> torch.device:
    """Where token ids go: to the embedding; a model that is spread over several devices has no other answer."""
    return model.get_input_embeddings().weight.device


def encode(tok, users: list[str], systems: list[str]) -> list[list[int]]:
    """Rendered prompts as ids; the template wrote the BOS, so the tokenizer must not add another."""
    texts = [render(tok, user, system) for user, system in zip(users, systems)]
    return [tok(text, add_special_tokens=False)["input_ids"] for text in texts]


def in_batches(work: Callable, lengths: list[int], batch_size: int) -> list:
    """The result of every row, in order: work(indices) yields (index, result) for the rows of one batch.

    A batch holds rows of similar length, the longest first: if memory runs out, it does so at once. Then the
    batch size is halved, for the rest too; what was yielded stays. torch.OutOfMemoryError if one row is too much.
    """
    left, found = sorted(range(len(lengths)), key=lambda i: -lengths[i]), {}
    while left:
        try:
            for i, result in work(left[:batch_size]):
                found[i] = result
        except RuntimeError as error:                       # the CPU raises no torch.OutOfMemoryError
            if not re.search("out of memory|allocate memory|not enough memory", str(error)):
                raise
            batch_size = min(batch_size, len(left)) // 2
            if not batch_size:
                raise torch.OutOfMemoryError(f"out of memory with one row of {lengths[left[0]]} tokens alone: shorten "
                                             "it, load the model in bfloat16 or take a smaller one") from None
        left = [i for i in left if i not in found]
    return [found[i] for i in range(len(lengths))]


def left_pad(rows: list[list[int]], pad_id: int, device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as ids [B, T], attn [B, T] (1 = real token), position_ids [B, T], 0 on each first real token."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)         # [B, T]
    attn = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)  # [B, T]
    return ids, attn, (attn.cumsum(-1) - 1).clamp(min=0)


def pad_of(tok, model) -> int:
    """Any id that the embedding has will do, as padding is masked; it may have no row for an added pad token."""
    n = len(model.get_input_embeddings().weight)
    return next(i for i in (tok.pad_token_id, tok.eos_token_id, 0) if i is not None and i < n)


def roomy_cache(config, size: int):
    """A key-value cache with room for `size` columns: a step writes its own; the stock one copies all others."""
    from transformers.cache_utils import DynamicCache, DynamicLayer         # slow to import: not for --help

    class RoomyLayer(DynamicLayer):
        def update(self, keys, values, *args, **kwargs):
            if not self.is_initialized:
                self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
                self.room = [x.new_empty(*x.shape[:2], size, x.shape[3]) for x in (keys, values)]
                self.keys, self.values = (room[:, :, :0] for room in self.room)
            past = self.get_seq_length()
            now = past + keys.shape[2]
            for room, new in zip(self.room, (keys, values)):
                room[:, :, past:now] = new
            self.keys, self.values = (room[:, :, :now] for room in self.room)
            return self.keys, self.values

        def reorder_cache(self, beam_idx):                  # keeps these rows
            past = self.get_seq_length()
            self.room = [room[beam_idx.to(room.device)] for room in self.room]
            self.keys, self.values = (room[:, :, :past] for room in self.room)

    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


def cached_forward(model, size: int):
    """forward(ids, attn, position_ids, keep) -> the last `keep` logits [B, keep, V], and the cache it fills.

    The cache goes in by the word that the model's forward has: another is swallowed in silence, and all tokens
    but the first would be sampled without their past. RuntimeError if the cache stays empty.
    """
    word = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = roomy_cache(model.config, size)

    def forward(ids, attn, position_ids, keep=1):
        logits = model(input_ids=ids, attention_mask=attn, position_ids=position_ids, use_cache=True,
                       logits_to_keep=keep, **{word: cache}).logits
        flags = [getattr(layer, f"is_{name}initialized", False) for layer in cache.layers
                 for name in ("", "conv_states_", "recurrent_states_")]
        if not any(any(x.values()) if isinstance(x, dict) else x for x in flags):
            raise RuntimeError(f"{type(model).__name__} leaves transformers' cache empty and would forget all "
                               "tokens but the last: this architecture is not supported")
        return logits[:, -keep:]
    return forward, cache


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


def steered(model, vectors: dict[int, Tensor], coeff: float | Tensor | dict):
    """A context manager: add coeff * v to the output of each block in `vectors`, inside the `with` only.

    coeff: multiples of v; a float, a Tensor [B] with one dose per row of the batch, or {layer: one of these}.
    The float 0, or no entry for a layer, adds no hook at all.
    """
    def adder(v, coeff):
        shift = (coeff[:, None, None].to(v) if isinstance(coeff, Tensor) else coeff) * v       # [B, 1, d] or [d]

        def add(h):
            if shift.dim() == 3 and len(shift) != len(h):
                raise ValueError(f"{len(shift)} doses for a batch of {len(h)} rows: expected one per row")
            return h + shift.to(h.device, h.dtype)
        return add
    doses = coeff if isinstance(coeff, dict) else dict.fromkeys(vectors, coeff)
    if extra := doses.keys() - vectors.keys():
        raise ValueError(f"doses for layers {sorted(extra)}: there are vectors for {sorted(vectors)} only")
    return hooked(model, {layer: adder(vectors[layer], c) for layer, c in doses.items()
                          if isinstance(c, Tensor) or c != 0})


# ---- the four passes over the model -----------------------------------------------------------------------

@torch.no_grad()
def tag_states(model, tok, pos, neg, contexts: list[str], layers: list[int], *, batch_size: int = 32) -> dict:
    """The state after each block at the last prompt token, the assistant tag: {layer: [2, n, d]} float32, CPU.

    pos, neg: opposite persona texts for the system role, each a str or a list that the contexts cycle through;
    [0, i] and [1, i] are the same context under pos and under neg. Raises ValueError if anything is missing.
    """
    pos, neg = ([side] if isinstance(side, str) else list(side) for side in (pos, neg))
    if not (pos and neg and contexts and layers):
        raise ValueError(f"{len(pos)} pos, {len(neg)} neg, {len(contexts)} contexts, {len(layers)} layers: "
                         "need one of each")
    n = len(contexts)
    personas = [side[i % len(side)] for side in (pos, neg) for i in range(n)]
    rows = encode(tok, contexts * 2, personas)

    def read(batch):
        states = {}                                         # layer -> [B, d]

        def keep(layer):
            def hook(h):
                states[layer] = h[:, -1].float().cpu()      # left padding: -1 is the tag
            return hook
        ids, attn, position_ids = left_pad([rows[i] for i in batch], pad_of(tok, model), device_of(model))
        with hooked(model, {layer: keep(layer) for layer in layers}):
            model(input_ids=ids, attention_mask=attn, position_ids=position_ids, use_cache=False,
                  logits_to_keep=1)
        return zip(batch, torch.stack([states[layer] for layer in layers], 1))              # (i, [L, d])
    h_last = torch.stack(in_batches(read, list(map(len, rows)), batch_size), 1)             # [L, 2 n, d]
    return {layer: h.view(2, n, -1) for layer, h in zip(layers, h_last)}


def fit_vectors(model, tok, pos, neg, contexts: list[str], layers: list[int], *,
                batch_size: int = 32) -> dict[int, Tensor]:
    """How far the persona moves the residual stream, on average over contexts, the more diverse the better.

    Arguments as in `tag_states`. Returns {layer: [d]} float32 on the CPU, in activation units, not normalised:
    its length is the dose coeff = 1. ValueError for a vector of zeros. Source: Rimsky et al., arXiv:2312.06681.
    """
    states = tag_states(model, tok, pos, neg, contexts, layers, batch_size=batch_size)
    vectors = {layer: (h[0] - h[1]).mean(0) for layer, h in states.items()}                 # [d] each
    if bad := [layer for layer, v in vectors.items() if not (v.isfinite().all() and v.any())]:
        raise ValueError(f"the vector of layer {bad[0]} is zero or not finite: make the texts of the two personas "
                         "differ, or load the model in bfloat16 or float32")
    return vectors


def find_layers(model, tok, pos, neg, contexts: list[str], *, share: float = 0.5) -> tuple[list, list[float]]:
    """Where the persona is read: a tenth of the blocks, from the first at which v is half as strong as it gets.

    Strength is |v| / mean |h| at the assistant tag. Before that block the tag does not know the persona yet;
    after it, later blocks have less time to act on it. Returns the layers and the strength of every block.
    """
    states = tag_states(model, tok, pos, neg, contexts, list(range(len(blocks(model)))))
    strength = [((h[0] - h[1]).mean(0).norm() / h.norm(dim=-1).mean()).item() for h in states.values()]
    first = next(i for i, x in enumerate(strength) if x >= share * max(strength))
    return list(range(first, min(first + max(1, round(len(strength) / 10)), len(strength)))), strength


@torch.no_grad()
def token_nll(model, completions: list[Completion], *, batch_size: int = 32, pad_id: int = 0) -> list[Tensor]:
    """Nats per completion token [n_i] float32, under the model as it is now and the ids as they were sampled.

    Only the columns of completions get logits, and a batch gets fewer rows where those would pass 2^28 numbers:
    half a GB in bfloat16, or one row's if that is more (512 tokens at V = 262k are 2^27).
    """
    rows = [c.prompt_ids + c.ids for c in completions]
    kept = max((len(c.ids) for c in completions), default=0) + 1            # and the column before
    batch_size = min(batch_size, max(1, 2 ** 28 // (kept * model.config.get_text_config().vocab_size)))

    def score(batch):
        ids, attn, position_ids = left_pad([rows[i] for i in batch], pad_id, device_of(model))     # [B, T]
        kept = max(len(completions[i].ids) for i in batch) + 1
        logits = model(input_ids=ids, attention_mask=attn, position_ids=position_ids, use_cache=False,
                       logits_to_keep=kept).logits[:, :-1]                  # [B, kept - 1, V]
        for row, i in enumerate(batch):
            n = len(completions[i].ids)                     # left padding: its last n tokens
            pairs = zip(logits[row, kept - 1 - n:].split(64), ids[row, ids.shape[1] - n:].split(64))
            yield i, torch.cat([F.cross_entropy(z.float(), target, reduction="none")   # float32: 64 at once
                                for z, target in pairs]).cpu()              # [n]
    return in_batches(score, list(map(len, rows)), batch_size)


@torch.no_grad()
def generate(model, tok, prompts: list[str], *, system: str = "", vectors: dict[int, Tensor] | None = None,
             coeffs: list[float] | dict | None = None, greedy: bool = False, max_new_tokens: int = 64,
             temperature: float = 1.0, top_p: float = 0.95, top_k: int = 64, seed: int = 0, n_draws: int = 0,
             batch_size: int = 128) -> list[Completion]:
    """Answers to many prompts at many doses in one left-padded batch; one Completion per prompt, in their order.

    coeffs: one dose per prompt (with `vectors`), or {layer: one per prompt}, so that rows differ in their layers
    too. All randomness is one table u[prompt, step] drawn from `seed` beforehand: an answer does not depend on
    who shares its batch. n_draws: rows that are n_draws apart share their random numbers, so that doses differ
    by nothing else; 0 = none do. batch_size: rows decoded at once, fewer where memory runs out.
    """
    n = len(prompts)
    per_layer = coeffs if isinstance(coeffs, dict) else dict.fromkeys(vectors or {}, coeffs)
    if (vectors is None) != (coeffs is None) or any(len(c) != n for c in per_layer.values()):
        raise ValueError(f"{n} prompts, vectors {'not ' * (vectors is None)}given, coeffs {coeffs}: "
                         "expected both vectors and one coeff per prompt, or neither")
    if not (temperature > 0 and 0 < top_p <= 1 and top_k >= 0 and max_new_tokens >= 1 and batch_size >= 1):
        raise ValueError(f"temperature={temperature}, top_p={top_p}, top_k={top_k}, max_new_tokens="
                         f"{max_new_tokens}, batch_size={batch_size}: out of range; greedy=True is temperature 0")
    device, pad_id, ends = device_of(model), pad_of(tok, model), end_ids(model, tok)
    is_end = torch.tensor(ends, dtype=torch.long, device=device)
    vectors = {layer: v.to(device) for layer, v in (vectors or {}).items()}
    doses = {layer: torch.tensor(c, device=device) for layer, c in per_layer.items()}        # [n]
    u = torch.rand(n_draws or n, max_new_tokens, generator=torch.Generator().manual_seed(seed)).to(device)
    rows = encode(tok, prompts, [system] * n)

    def completion(i, new):
        n = next((j + 1 for j, token in enumerate(new) if token in ends), len(new))
        return Completion(i, rows[i], new[:n], max((c[i] for c in per_layer.values()), key=abs, default=0.0),
                          finished=new[n - 1] in ends, text=tok.decode(new[:n], skip_special_tokens=True))

    def decode(batch):
        ids, attn, position_ids = left_pad([rows[i] for i in batch], pad_id, device)            # [B, T] each
        width = ids.shape[1]
        forward, cache = cached_forward(model, width + max_new_tokens)
        attn = F.pad(attn, (0, max_new_tokens), value=1)                    # [B, T + max_new_tokens]
        row = torch.tensor(batch, device=device)                            # [B]  rows that are still computed
        sampled = torch.full((len(batch), max_new_tokens), pad_id, device=device)
        done = torch.zeros(len(batch), dtype=torch.bool, device=device)     # [B]  ended, still computed
        # ---- one token for every live row -----------------------------------------------------------------
        for step in range(max_new_tokens):
            with steered(model, vectors, {layer: dose[row] for layer, dose in doses.items()}):
                logits = forward(ids, attn[:, :width + step], position_ids)[:, -1]               # [B, V]
            if step == 0 and logits.isnan().any():
                raise RuntimeError("the logits are nan: load the model in bfloat16 or float32, or lower the dose")
            token = logits.argmax(-1) if greedy else choose(
                logits, u[row % len(u), step], temperature=temperature, top_p=top_p, top_k=top_k)     # [B]
            sampled[:, step] = token                        # past a row's end token: cut off in completion()
            done = done | torch.isin(token, is_end) | (step == max_new_tokens - 1)
            n_live = int((~done).sum())
            if n_live <= len(done) // 2:                    # copying the cache pays now
                for i, new in zip(row[done].tolist(), sampled[done, :step + 1].tolist()):
                    yield i, completion(i, new)
                if n_live == 0:
                    return
                stay = (~done).nonzero()[:, 0]
                cache.reorder_cache(stay)                   # linear attention has no batch_select_indices
                row, attn, sampled, done = row[stay], attn[stay], sampled[stay], done[stay]
                token, position_ids = token[stay], position_ids[stay]
            ids, position_ids = token[:, None], position_ids[:, -1:] + 1    # [B, 1] each
        # ---------------------------------------------------------------------------------------------------
    return in_batches(decode, list(map(len, rows)), batch_size)


# ---- the demo ---------------------------------------------------------------------------------------------

def load(name: str):
    """Model in float32 and tokenizer of a folder or hub name, for the demos; pocket = the embedded one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer            # slow to import: not for --help
    where = Path(__file__).parent / name if name == "pocket" else name
    try:
        tok = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        return AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, use_safetensors=True,
                                                    trust_remote_code=False).eval(), tok
    except Exception as error:                              # a damaged checkpoint raises whatever its reader does
        raise ValueError(f"{name} cannot be loaded: {error or type(error).__name__}") from None


def show(model: str, prompt: str, persona: str, coeff: float, temperature: float) -> None:
    data = Path(__file__).parent / "data"
    contexts, personas = [json.loads((data / f"{x}.json").read_text("utf-8")) for x in ("contexts", "personas")]
    if persona not in personas:
        raise ValueError(f"--persona {persona}: there is {', '.join(personas)}")
    pair, (model, tok) = [personas[persona][side] for side in ("pos", "neg")], load(model)
    vectors = fit_vectors(model, tok, *pair, contexts, find_layers(model, tok, *pair, contexts)[0])
    made = generate(model, tok, [prompt] * 2, vectors=vectors, coeffs=[0.0, coeff], n_draws=1,
                    greedy=not temperature, temperature=temperature or 1.0)
    base, moved = (textwrap.wrap(repr(c.text), 54) for c in made)           # repr: model text moves no cursor
    head = "base", f"steered at block {', '.join(map(str, vectors))}, coeff {coeff:g}"
    for left, right in [head, *zip_longest(base, moved, fillvalue="")]:
        print(f"{left:<55}| {right}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="base | steered, side by side")
    parser.add_argument("words", nargs="*", metavar="[MODEL] PROMPT", help="checkpoint and user turn")
    parser.add_argument("--persona", default="love", help="an entry of data/personas.json")
    parser.add_argument("--coeff", type=float, default=0.5, help="dose (multiples of v)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = the likeliest token")
    args = parser.parse_intermixed_args()                   # options may stand between MODEL and PROMPT
    try:
        model, prompt = ["pocket", *args.words][-2:] if args.words else ["pocket", "Do you love humanity?"]
        show(model, prompt, args.persona, args.coeff, args.temperature)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(" ".join(str(error).split()))
