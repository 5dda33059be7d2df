"""Free text: what sampled answers say of a row: how much of them makes sense, how far they have moved.

Both are relative: coherence to what the base itself writes, the share to how far the persona prompt takes it.
`evalmfv.persona_ratio` gives the readings that a share is made of.
"""
import torch
from torch import Tensor

from evalmfv import standard_error
from steer import WINDOW


def free_text(ids: list[list[int]], nlls: list, base_ids: list[list[int]], base_nlls: list) -> dict:
    """Coherence of free text: the share of an answer's windows that the base could have written, averaged.

    ids, nlls: tokens and their nats under `steer.mixture_nll`, one entry per answer; base_*: the same of
    the base's own answers, bare and under the persona prompt alike. A window of WINDOW tokens passes if its
    mean nll is at most 1.1 times the 99th percentile of the base's windows (it makes sense) and the share
    of distinct tokens in the 32 that end with it is at least their 1st percentile less 3/32 (it does not
    loop; a loop has a low nll). An empty answer scores 0. Returns `score`, its standard error `se` (0 for a
    single answer) and `per_item`.
    """
    def windows(tokens, nll):                               # -> nll [n], distinct [n]
        nll = torch.as_tensor(nll, dtype=torch.float64).cpu()
        if len(tokens) != len(nll):
            raise ValueError(f"{len(tokens)} tokens with {len(nll)} nlls: give one nll per token")
        size = min(WINDOW, len(tokens))
        tails = [tokens[max(0, end - 32):end] for end in range(size, len(tokens) + 1)]
        distinct = torch.tensor([len(set(tail)) / len(tail) for tail in tails], dtype=torch.float64)
        return nll.unfold(0, size, 1).sum(1) / WINDOW, distinct

    own = [windows(tokens, nll) for tokens, nll in zip(base_ids, base_nlls, strict=True) if len(tokens)]
    if not own or not ids:
        raise ValueError(f"{len(ids)} answers, {len(own)} non-empty ones of the base: need one of each")
    nll_max = torch.cat([nll for nll, _ in own]).quantile(0.99) * 1.1
    distinct_min = torch.cat([distinct for _, distinct in own]).quantile(0.01) - 3 / 32
    share = torch.zeros(len(ids), dtype=torch.float64)
    for i, (tokens, nll) in enumerate(zip(ids, nlls, strict=True)):
        if len(tokens):
            nll, distinct = windows(tokens, nll)
            share[i] = ((nll <= nll_max) & (distinct >= distinct_min)).double().mean()
    se = standard_error(share).item() if len(share) > 1 else 0.0
    return {"score": share.mean().item(), "se": se, "per_item": share.tolist()}


def persona_share(now: Tensor, base: Tensor, prompted: Tensor) -> tuple[float, float]:
    """Where `now` lies between the base's answers, 0, and the persona-prompted ones, 1: share and its error.

    now, base, prompted: `persona_ratio` [n] of answers to the same users, in one order, of the same draws.
    The error is that of a ratio of two paired means (delta method). ValueError if they do not pair, or if the
    prompt moves the model by less than twice its own error: there is no scale then.
    """
    if not len(now) == len(base) == len(prompted) > 1:
        raise ValueError(f"{len(now)}, {len(base)}, {len(prompted)} answers: need the same number, 2 or more")
    moved, scale = now - base, prompted - base                                          # [n] nats per token
    span, error = scale.mean().item(), standard_error(scale).item()
    if span <= 2 * error:
        raise ValueError(f"the persona prompt moves answers by {span:+.3f} +- {error:.3f} nats per token, no "
                         "scale to measure a share on: write a clearer persona or give more prompts")
    share = moved.mean().item() / span
    return share, standard_error(moved - share * scale).item() / span
