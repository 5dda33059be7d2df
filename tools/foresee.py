"""Foresee: what steering would make the base say next, without sampling."""
import torch
from torch import Tensor

from evalmfv import echoes
from steer import Completion, device_of, encode, last, left_pad, pad_of, steered


@torch.no_grad()
def foresee(model, tok, answers: list[Completion], users: list[str], pos: list[str], neg: list[str],
            vectors: dict[int, Tensor], cells: list[tuple[list[int], float]]) -> list[tuple[float, float]]:
    """(effect, nll) per (band, dose), nats per token.

    At each position of the base's own `answers` to `users` the steered model gives every token a
    probability. Under it, effect is the mean of what `persona_ratio` counts for a token, nll the mean of
    the base's own nll: exact means, so a few short answers tell bands apart that as many samples could not.
    The first two entries are the base itself and the persona's prompt, pos[0]. For `search.find_band`.
    """
    n = max(len(c.ids) for c in answers)

    def logp(system=""):                                    # -> [N, V] float32: N tokens of all answers
        fronts = encode(tok, users, [system] * len(users))
        rows = [front + c.ids for front, c in zip(fronts, answers, strict=True)]
        ids, attn, position_ids = left_pad(rows, pad_of(tok, model), device_of(model))              # [B, T]
        logits = model(input_ids=ids, attention_mask=attn, position_ids=position_ids, use_cache=False,
                       logits_to_keep=last(n + 1, model)).logits[:, :-1]                           # [B, n, V]
        return torch.cat([z[-len(c.ids):].float().log_softmax(-1) for z, c in zip(logits, answers)])

    base = logp()                                                                                   # [N, V]
    floor = 1 / base.shape[1]
    plus, minus = (sum((logp(text).exp() + floor).log() for text in side) / len(side) for side in (pos, neg))
    worth = plus - minus                                                                         # [N, V] nats
    worth[:, echoes(tok, *pos, *neg)] = 0

    def read(now):
        p = now.exp()                                                                               # [N, V]
        return (p * worth).sum(-1).mean().item(), -(p * base).sum(-1).mean().item()
    found = [read(base), read(logp(pos[0]))]
    for band, dose in cells:
        with steered(model, {layer: vectors[layer] for layer in band}, dose):
            found.append(read(logp()))
    return found
