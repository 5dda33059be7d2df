"""Steer: push a model towards a persona with one vector, and keep only the answers that stay coherent.

    v = mean over contexts of h(persona +) - h(persona -)       read at the assistant tag, after a block
    h <- h + coeff * v                                          at every position, inside `with steered(...)`
    nll = -log((p(token | bare) + p(token | persona)) / 2)      coherent: what the base says, bare or prompted

Needs torch and transformers; copy this file alone. `python steer.py` shows base | steered. A completion keeps
the token ids it was sampled with: they are what is scored and trained on later, its text is for reading.
Known gap: the filter passes a fluent answer that is wrong, or that belongs to another question.
Sources: mean difference, Rimsky et al. 2023, arXiv:2312.06681; recipe, github.com/wassname/steer-heal-love
"""
import argparse
import inspect
import json
import math
import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW = 8                  # tokens of the running window over nll: a clause
across = lambda work, rows: work(rows)                  # who does the rows of a pass: see tools/ranks.py
SENTINEL = "ZZuniq_Sentinel_ZZ"                     # shows where a template puts the words it is given


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
    """The largest reading that passes, one per rule; tools/search.py reads them off the base itself."""
    worst_window: float          # nats per token
    loop: float                  # share


@dataclass(frozen=True)
class Verdict:
    """Why an answer was kept or dropped: the first rule it broke, its reading there, and the limit."""
    kept: bool
    rule: str                    # "" if kept, words, a name in Limits, or pattern
    value: float
    limit: float
    readings: dict
    match: str = ""              # the words a pattern hit


# ---- the sampler ------------------------------------------------------------------------------------------

def choose(logits: Tensor, u: Tensor, *, temperature=1.0, top_p=1.0, top_k: int = 0) -> Tensor:
    """One token per row, [B], by inverse CDF at u [B] in [0, 1), of what top-k and then top-p leave."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    k = min(top_k, logits.shape[-1]) if top_k else logits.shape[-1]
    top, token = logits.topk(k)                             # [B, k]  most likely first
    p = top.softmax(-1)                                     # [B, k]
    before = p.cumsum(-1) - p                               # [B, k]  probability of all likelier tokens
    kept = before < top_p                                   # [B, k]  the first token always stays
    cdf = (p * kept).cumsum(-1)                             # [B, k]
    at = (cdf <= u[:, None].to(cdf) * cdf[:, -1:]).sum(-1)                  # [B]
    at = at.minimum(kept.sum(-1) - 1)                       # u * total can round up to total
    return token.gather(-1, at[:, None])[:, 0]              # [B]


# ---- the filter -------------------------------------------------------------------------------------------

def mixture_nll(bare: list[Tensor], prompted: list[Tensor]) -> list[Tensor]:
    """Nats per token [n_i] under the mean of the base's two probabilities, given `token_nll` of each: under
    the bare base alone a trait costs nats; this is at most log 2 above the better of the two."""
    return [math.log(2) - torch.logaddexp(-a.double(), -b.double()) for a, b in zip(bare, prompted)]   # [n_i]


def worst_mean(x: Tensor, window: int) -> float:
    """Largest mean of `window` neighbours of x [n]; of all of x where it is shorter; 0 where it is empty."""
    return x.unfold(0, min(window, len(x)), 1).mean(-1).max().item() if len(x) else 0.0


def repeats(items, n: int, window: int) -> float:
    """In the worst run of `window` n-grams: the share that was seen within the `window` n-grams before."""
    last, again = {}, []
    for i in range(len(items) - n + 1):
        gram = tuple(items[i:i + n])
        again.append(float(i - last.get(gram, -math.inf) <= window))
        last[gram] = i
    again += [0.0] * (window // 2 - len(again))             # so "No, no, no." is not a loop
    return worst_mean(torch.tensor(again), window)


def readings(completion: Completion, nll: Tensor) -> dict:
    """What the filter measures on one answer, given nll [n] of `mixture_nll`, one per token.

    A mean over all would pass an answer that breaks in the middle, and a loop has a low nll.
    """
    if len(nll) != len(completion.ids) or not nll.isfinite().all():
        raise RuntimeError(f"the base's nll of {len(completion.ids)} tokens is not as many finite numbers: "
                           "load the model in bfloat16 or float32, not float16")
    return {"worst_window": worst_mean(nll.double().cpu(), WINDOW),     # nats per token
            "loop": repeats(completion.text, 12, 64)}                   # share


def judge(completions: list[Completion], nlls: list[Tensor], limits: Limits, *, patterns=()) -> list[Verdict]:
    """One Verdict per completion, in order, given its `mixture_nll`.

    patterns: regular expressions, case ignored: refusals, and narration of the trait instead of enacting it.
    """
    verdicts = []
    for completion, nll in zip(completions, nlls, strict=True):
        seen, text = readings(completion, nll), completion.text
        hits = [hit.group() for p in patterns if (hit := re.search(p, text, re.IGNORECASE))]
        checks = [("words", 0, 1, not text.strip()),
                  *((rule, seen[rule], limit, seen[rule] > limit) for rule, limit in vars(limits).items()),
                  ("pattern", len(hits), 0, bool(hits))]
        rule, value, limit, broken = next((c for c in checks if c[-1]), ("", 0, 0, False))
        verdicts.append(Verdict(not broken, rule, value, limit, seen, hits[0] if rule == "pattern" else ""))
    return verdicts


# ---- plumbing: templates, batches, the cache, hooks -------------------------------------------------------

def written(tok, turns: list[tuple[str, str]], **how) -> str:
    """What the chat template writes for (role, words) turns, as text or, where it reads those, as parts.

    It writes marks, and the words take their places: a template that reads parts drops plain text in silence,
    others alter it. ValueError if neither way works, or if there is no template.
    """
    if not tok.chat_template:
        raise ValueError(f"{tok.name_or_path!r} has no chat template: use its -it or -Instruct sibling")
    marks, errors = [f"{SENTINEL}{i}" for i in range(len(turns))], []
    for contents in (marks, [[{"type": "text", "text": mark}] for mark in marks]):
        try:
            messages = [{"role": role, "content": content} for (role, _), content in zip(turns, contents)]
            text = tok.apply_chat_template(messages, tokenize=False, **how)
            lost = [role for mark, (role, _) in zip(marks, turns) if mark not in text]
            if lost or re.search("[\"']type[\"']: *[\"']text", text):                   # a list, printed
                raise ValueError(f"it drops or alters the words of the {(lost or ['user'])[0]}")
            return re.sub(f"{SENTINEL}([0-9]+)", lambda mark: turns[int(mark[1])][1], text)
        except Exception as error:                          # a template is a program: it can raise anything
            errors.append(" ".join(str(error).split()))
    raise ValueError(f"the chat template of {tok.name_or_path!r} fails: {errors[0]}")


def render(tok, user: str, system: str = "") -> str:
    """One user turn as the chat template writes it, up to and including the assistant tag.

    A template without a system role (Gemma 2 raises, others drop it) gets the system text before the user's.
    A model that can think does not: its first words after the tag are its answer.
    """
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
    """The tokens that end an answer: the model's, the tokenizer's, and what the template writes after it.

    A fine-tune with a new template may leave the first two as they were, and run on into invented turns.
    """
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tok.eos_token_id} - {None}
    with suppress(ValueError):                              # the template takes no assistant's words
        for more in ((), [("user", "_")]):                  # some close a turn only when the next one opens
            after = around_answer(tok, "_", more)[1].lstrip()
            first = tok(after, add_special_tokens=False)["input_ids"][:1]
            if first and first[0] in tok.added_tokens_decoder:      # plain text ends nothing
                return sorted(ends | set(first))
    return sorted(ends)


def blocks(model) -> nn.ModuleList:
    """The decoder blocks; block i's output is hidden_states[i + 1], but the last is normed there."""
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", getattr(decoder, "h", None))        # GPT-2 and its kin say h
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no .layers or .h: this architecture is not supported")
    return layers


def device_of(model) -> torch.device:
    """Where token ids go: to the embedding, also of a model that is spread over several devices."""
    return model.get_input_embeddings().weight.device


def last(n: int, model) -> Tensor:
    """The last n positions as an index [n], for `logits_to_keep`.

    Of a number transformers makes a slice; by its strides torch then takes a product per row of a frozen head
    and copies the head for each: SmolLM2 in bfloat16 on a CPU reads 2.5 times as slowly (bench/head.py).
    """
    return torch.arange(-n, 0, device=device_of(model))


def encode(tok, users: list[str], systems: list[str]) -> list[list[int]]:
    """Rendered prompts as ids; the template wrote the BOS, so the tokenizer must not add another."""
    texts = [render(tok, user, system) for user, system in zip(users, systems)]
    return [tok(text, add_special_tokens=False)["input_ids"] for text in texts]


def in_batches(work: Callable, lengths: list[int], batch_size: int, alike: list | None = None) -> list:
    """The result of every row, in order: work(indices) yields (index, result) for the rows of one batch.

    The longest rows come first: if memory runs out, it does so at once. Then the batch size is halved, for
    the rest too; what was yielded stays. Of one length, rows that agree in `alike` come side by side.
    OutOfMemoryError if one row is too much.
    """
    def read(left):
        found, size = {}, batch_size
        while left:
            try:
                found.update(work(left[:size]))
            except RuntimeError as error:                   # the CPU raises no torch.OutOfMemoryError
                if not re.search("out of memory|allocate memory|not enough memory", str(error)):
                    raise
                size = min(size, len(left)) // 2
                if not size:
                    text = f"out of memory with one row of {lengths[left[0]]} tokens alone"
                    raise torch.OutOfMemoryError(f"{text}: take a smaller model") from None
            left = [i for i in left if i not in found]
        return found
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], alike and alike[i]), reverse=True)
    found = across(read, order)
    return [found[i] for i in range(len(lengths))]


def left_pad(rows: list[list[int]], pad_id: int, device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as ids [B, T], attn [B, T] (1 = real token), position_ids [B, T], 0 on each first real token."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)         # [B, T]
    attn = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)  # [B, T]
    return ids, attn, (attn.cumsum(-1) - 1).clamp(min=0)


def pad_of(tok, model) -> int:
    """Any id that the embedding has will do, as padding is masked; an added pad token may have no row."""
    n = len(model.get_input_embeddings().weight)
    return next(i for i in (tok.pad_token_id, tok.eos_token_id, 0) if i is not None and i < n)


def cached_forward(model):
    """forward(ids, attn, position_ids, keep) -> the last `keep` logits [B, keep, V], and the cache it fills.

    The cache goes in by the word that the model's forward has: another is swallowed in silence, and all
    tokens but the first would be sampled without their past. RuntimeError if the cache stays empty.
    """
    from transformers.cache_utils import DynamicCache       # slow to import: not for --help
    word = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = DynamicCache(config=model.config)

    def forward(ids, attn, position_ids, keep=1):
        logits = model(input_ids=ids, attention_mask=attn, position_ids=position_ids, use_cache=True,
                       logits_to_keep=last(keep, model), **{word: cache}).logits
        states = [x for layer in cache.layers for x in vars(layer).values()]
        states += [x for state in states if isinstance(state, dict) for x in state.values()]
        if not any(isinstance(x, Tensor) for x in states):
            raise RuntimeError(f"{type(model).__name__} leaves transformers' cache empty and would forget "
                               "all tokens but the last: this architecture is not supported")
        return logits[:, -keep:]                            # [B, keep, V]
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


def steered(model, vectors: dict[int, Tensor], coeff: float | Tensor):
    """A context manager: add coeff * v to the output of each block in `vectors`, inside the `with` only.

    coeff: multiples of v; a float, or a Tensor [B] with one dose per row. The float 0 adds no hook.
    """
    is_per_row = isinstance(coeff, Tensor)

    def adder(v):
        shift = (coeff[:, None, None].to(v) if is_per_row else coeff) * v                   # [B, 1, d] or [d]

        def add(h):
            if is_per_row and len(shift) != len(h):
                raise ValueError(f"{len(shift)} doses for a batch of {len(h)} rows: expected one per row")
            return h + shift.to(h.device, h.dtype)
        return add
    return hooked(model, {layer: adder(v) for layer, v in vectors.items() if is_per_row or coeff})


# ---- the three passes over the model ----------------------------------------------------------------------

@torch.no_grad()
def fit_vectors(model, tok, pos, neg, contexts: list[str], layers: list[int], *, batch_size=32) -> dict:
    """How far the persona moves the residual stream, on average over contexts, the more diverse the better.

    The state after each block is read at the last prompt token, the assistant tag. pos, neg: opposite persona
    texts for the system role, each a str or a list that the contexts cycle through, in step. Returns
    {layer: [d]} float32 on the CPU: v as it is, the dose 1. ValueError if one is zero or not finite.
    """
    pos, neg = ([side] if isinstance(side, str) else list(side) for side in (pos, neg))
    layers, n = sorted(layers), len(contexts)
    rows = encode(tok, contexts * 2, [side[i % len(side)] for side in (pos, neg) for i in range(n)])

    def read(batch):
        states = []                                         # [B, d] of each layer, in their order
        ids, attn, position_ids = left_pad([rows[i] for i in batch], pad_of(tok, model), device_of(model))
        keep = dict.fromkeys(layers, lambda h: states.append(h[:, -1].float().cpu()))       # -1 is the tag
        with hooked(model, keep):
            model(input_ids=ids, attention_mask=attn, position_ids=position_ids, use_cache=False,
                  logits_to_keep=last(1, model))
        return zip(batch, torch.stack(states, 1))                                           # (i, [L, d])
    h_last = torch.stack(in_batches(read, list(map(len, rows)), batch_size))                # [2 n, L, d]
    vectors = dict(zip(layers, h_last[:n].mean(0) - h_last[n:].mean(0)))                    # [d] each
    if bad := [layer for layer, v in vectors.items() if not (v.isfinite().all() and v.any())]:
        raise ValueError(f"the vector of layer {bad[0]} is zero or not finite: make the texts of the two "
                         "personas differ, or load the model in bfloat16 or float32")
    return vectors


@torch.no_grad()
def token_nll(model, completions: list[Completion], *, batch_size: int = 32, pad_id: int = 0) -> list[Tensor]:
    """Nats per completion token [n_i] float32, under the model as it is now and the ids as they were sampled.

    A prompt is read once for all its completions of a batch: the search of the dose scores ten of each. Only
    columns of completions get logits; a batch has fewer rows where these would be over 2^28 numbers.
    """
    fronts = [c.prompt_ids for c in completions]
    longest = max((len(c.ids) for c in completions), default=0) + 1         # and the column before
    batch_size = min(batch_size, max(1, 2 ** 28 // (longest * model.config.get_text_config().vocab_size)))

    def score(batch):
        known, device = [front for front, _ in groupby(fronts[i] for i in batch)], device_of(model)
        which = torch.tensor([known.index(fronts[i]) for i in batch], device=device)            # [B]
        ids, attn, position_ids = left_pad(known, pad_id, device)                               # [F, T] each
        answers, (forward, cache) = [completions[i].ids for i in batch], cached_forward(model)
        if ids.shape[1] > 1:
            forward(ids[:, :-1], attn[:, :-1], position_ids[:, :-1])
            cache.reorder_cache(which)
        n = max(map(len, answers))
        said = [row + [pad_id] * (n - len(row)) for row in answers]
        said = torch.tensor(said, dtype=torch.long, device=device)  # [B, n]
        after = position_ids[which, -1:] + torch.arange(n + 1, device=device)                   # [B, 1 + n]
        logits = forward(torch.cat([ids[which, -1:], said], 1), F.pad(attn[which], (0, n), value=1), after,
                         n + 1)                                             # [B, 1 + n, V]
        for i, z, targets in zip(batch, logits, said):
            pairs = zip(z[:len(completions[i].ids)].split(64), targets.split(64))
            yield i, torch.cat([F.cross_entropy(z.float(), target[:len(z)], reduction="none")  # float32: 64
                                for z, target in pairs]).cpu()              # [n_i]
    return in_batches(score, list(map(len, fronts)), batch_size, fronts)


@torch.no_grad()
def generate(model, tok, prompts: list[str], *, system: str = "", vectors: dict[int, Tensor] | None = None,
             coeffs: list[float] | None = None, greedy: bool = False, max_new_tokens: int = 64,
             temperature: float = 1.0, top_p: float = 0.95, top_k: int = 64, seed: int = 0, n_draws: int = 0,
             batch_size: int = 128) -> list[Completion]:
    """Answers to many prompts at many doses in one left-padded batch; one Completion per prompt, in order.

    coeffs: one dose per prompt, with `vectors`. All randomness is one table u[prompt, step] drawn from `seed`
    beforehand: an answer does not depend on who shares its batch. n_draws: rows that are n_draws apart share
    their random numbers, so that doses differ by nothing else. batch_size: fewer where memory runs out.
    """
    n = len(prompts)
    if len([0.0] * n if coeffs is None else coeffs) != n or (vectors is None) != (coeffs is None):
        raise ValueError(f"{n} prompts, vectors {'not ' * (vectors is None)}given, coeffs {coeffs}: "
                         "expected both vectors and one coeff per prompt, or neither")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: expected more than 0; greedy=True is temperature 0")
    device, pad_id, ends = device_of(model), pad_of(tok, model), end_ids(model, tok)
    vectors, coeffs = {layer: v.to(device) for layer, v in (vectors or {}).items()}, coeffs or [0.0] * n
    doses, is_end = torch.tensor(coeffs, device=device), torch.tensor(ends, device=device)     # [n], [E]
    u = torch.rand(n_draws or n, max_new_tokens, generator=torch.Generator().manual_seed(seed)).to(device)
    rows = encode(tok, prompts, [system] * n)

    def completion(i, new):
        n = next((j + 1 for j, token in enumerate(new) if token in ends), len(new))
        return Completion(i, rows[i], new[:n], coeffs[i], finished=new[n - 1] in ends,
                          text=tok.decode(new[:n], skip_special_tokens=True))

    def decode(batch):
        ids, attn, position_ids = left_pad([rows[i] for i in batch], pad_id, device)            # [B, T] each
        width, (forward, cache) = ids.shape[1], cached_forward(model)
        attn = F.pad(attn, (0, max_new_tokens), value=1)                    # [B, T + max_new_tokens]
        row = torch.tensor(batch, device=device)                            # [B]  rows still computed
        sampled = torch.full((len(batch), max_new_tokens), pad_id, device=device)               # [B, steps]
        done = torch.zeros(len(batch), dtype=torch.bool, device=device)     # [B]  ended, still computed
        # ---- one token for every live row -----------------------------------------------------------------
        for step in range(max_new_tokens):
            with steered(model, vectors, doses[row]):
                logits = forward(ids, attn[:, :width + step], position_ids)[:, -1]               # [B, V]
            if step == 0 and logits.isnan().any():
                raise RuntimeError("the logits are nan: take bfloat16 or float32, or a lower dose")
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
                stay = (~done).nonzero()[:, 0]              # [n_live], as B is from here on
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
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, use_safetensors=True,
                                                 trust_remote_code=False)
    return model.eval(), AutoTokenizer.from_pretrained(where, trust_remote_code=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="base | steered, greedy, on the embedded model")
    parser.add_argument("prompt", nargs="?", default="Do you love humanity?")
    prompt, data = parser.parse_args().prompt, Path(__file__).parent / "pocket" / "data"
    contexts, personas = [json.loads((data / f"{x}.json").read_text()) for x in ("contexts", "personas")]
    model, tok = load("pocket")
    vectors = fit_vectors(model, tok, personas["love"]["pos"], personas["love"]["neg"], contexts, [6])
    made = generate(model, tok, [prompt] * 2, vectors=vectors, coeffs=[0.0, 1.0], greedy=True)
    for name, answer in zip(("base", "steered"), made):
        print(f"{name:8s}| {answer.text!r}")                # repr: model text moves no cursor
