"""Pairs: one unfinished answer behind two opposite personas, and what one forward shows of it.

    pos  <persona +> <prompt> <answer ...>      the same last n tokens on both sides, said by the base itself
    neg  <persona -> <prompt> <answer ...>      behind no persona, so that neither is favoured by the words

Needs torch and steer.py.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import steer


class Pair(NamedTuple):
    """One unfinished answer under two personas, as token ids; the last n of both sides are the answer's."""
    pos: list[int]
    neg: list[int]
    n: int


# ---- pairs -----------------------------------------------------------------------------------------------

def make_pairs(model, tok, pos: list[str], neg: list[str], prompts: list[str], *, n: int, n_read: int = 3,
               longest: int = 12, seed: int = 0) -> list[Pair]:
    """n pairs: the base's own answers, cut after a random number of tokens, behind pos[k] and behind neg[k].

    The seed draws the prompts, whose personas take turns, and the answers. The base answers without a
    persona, so that neither side is favoured by the words that both share.
    """
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(prompts), generator=rng).tolist()
    asked = [prompts[order[i % len(prompts)]] for i in range(n)]
    said = steer.generate(model, tok, asked, max_new_tokens=longest, seed=seed)
    sides = [steer.encode(tok, asked, [side[(i + i // len(prompts)) % len(side)] for i in range(n)])
             for side in (pos, neg)]
    made = []
    for plus, minus, answer in zip(*sides, said):
        ids = answer.ids[:len(answer.ids) - answer.finished]                    # without its end of turn
        if len(ids) >= n_read:
            k = int(torch.randint(n_read, len(ids) + 1, (), generator=rng))
            made.append(Pair(plus + ids[:k], minus + ids[:k], k))
    if len(made) < 8:
        raise ValueError(f"{len(made)} of {n} answers have {n_read} tokens or more, need 8: lower n_read")
    return made


def check_pairs(pairs: list[Pair], n_read: int) -> None:
    """ValueError for the first pair whose sides do not end alike, are the same, or are too short."""
    for i, pair in enumerate(pairs):
        if not n_read <= pair.n <= min(len(pair.pos), len(pair.neg)) - 1:
            raise ValueError(f"pair {i}: an answer of {pair.n} tokens, need {n_read} and a prompt before it")
        if pair.pos[-pair.n:] != pair.neg[-pair.n:]:
            raise ValueError(f"pair {i}: its sides end in other tokens ({pair.pos[-pair.n:][:4]} and "
                             f"{pair.neg[-pair.n:][:4]}), so their states would differ by the words")
        if pair.pos == pair.neg:
            raise ValueError(f"pair {i}: both sides are the same, so their difference is zero")


# ---- one forward -----------------------------------------------------------------------------------------

class Seen(NamedTuple):
    """What one forward gives of rows that end in an answer of n_i tokens each, K the longest."""
    h: Tensor                    # [B, n_read, d] float32  states at the tokens and the block that are read
    logits: Tensor               # [B, K, V]      what predicts the answer's tokens
    logp: Tensor                 # [B, K] float32 log-prob of each, 0 where mask is off
    mask: Tensor                 # [B, K]

    def mean_logp(self) -> Tensor:
        return self.logp.sum(1) / self.mask.sum(1)                              # [B]


def look(model, rows: list[list[int]], n: list[int], block: int, n_read: int, pad_id: int, at="end") -> Seen:
    ids, attn, position_ids = steer.left_pad(rows, pad_id, steer.device_of(model))              # [B, T] each
    K, kept = max(n), {}
    end = ids.shape[1] - torch.tensor(n, device=ids.device) * (at == "slot")                    # [B]
    columns = end[:, None] - torch.arange(n_read, 0, -1, device=ids.device)                     # [B, n_read]
    line = torch.arange(len(rows), device=ids.device)[:, None]                                  # [B, 1]
    with steer.hooked(model, {block: lambda h: kept.update(h=h[line, columns].float())}):
        logits = model(input_ids=ids, attention_mask=attn, position_ids=position_ids, use_cache=False,
                       logits_to_keep=steer.last(K + 1, model)).logits[:, -K - 1:-1]               # [B, K, V]
    mask = torch.arange(K, 0, -1, device=ids.device) <= torch.tensor(n, device=ids.device)[:, None]  # [B, K]
    nll = F.cross_entropy(logits.float().flatten(0, 1), ids[:, -K:].flatten(), reduction="none")
    return Seen(kept["h"], logits, -nll.view_as(mask) * mask, mask)


def both_sides(pairs: list[Pair]) -> tuple[list[list[int]], list[int]]:
    """Rows pos, pos, ..., neg, neg, ... and the length of each answer."""
    return [p.pos for p in pairs] + [p.neg for p in pairs], [p.n for p in pairs] * 2
