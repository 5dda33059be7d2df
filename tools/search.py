"""Search: which blocks to steer, how much, and what passes the filter, by what that does on this model.

The filter's limits are read off the base's own answers. The band is chosen once a run, by what steering would
make the base say next (`foresee`, exact means); the dose in every round, by sampled answers and the share of
them that survives the filter. There is no ceiling at 1.0: a vector may be a hundredth of the state that it is
added to. Pure functions: the caller tries.
"""
import math
from itertools import pairwise
from typing import Callable

import torch

from steer import Limits

N_PROBE = 24                # answers per dose of the search: enough to tell .8 from .95 survival
TEMPERATURES = 1.0, 0.7, 0.5        # the default is the first at which the base's own answers cost it at
MAX_NLL = 1.5                       # most so many nats per token; SmolLM2-135M at 1.0: 1.9, and much nonsense

KEEP = 0.95                 # share of the base's own answers that is within the limits, all rules together
SLACK = 0.2                 # room above that, for prompts and draws not seen: of the nats, or of the way to 1
MOST_LOOP = 0.5             # highest limit on loops: a base that loops by itself is no yardstick for them


def band(n_layers: int, lo: float, hi: float) -> list[int]:
    """Every block whose depth [i/n, (i+1)/n] overlaps (lo, hi): 7 blocks, .45 to .55 -> [3]; never none."""
    if not 0 <= lo < hi <= 1:
        raise ValueError(f"depth band from {lo} to {hi}: expected 0 <= from < to <= 1")
    return list(range(math.floor(lo * n_layers + 1e-9), math.ceil(hi * n_layers - 1e-9)))     # float products


def bands_of(n_layers: int) -> list[list[int]]:
    """Candidate bands, side by side from a fifth to nine tenths of the depth: a tenth of the blocks each."""
    width, first = max(1, round(n_layers / 10)), round(n_layers / 5)
    starts = range(first, max(round(0.9 * n_layers), first + 1), width)
    return [list(range(i, min(i + width, n_layers))) for i in starts]


def find_band(try_cells: Callable[[list], list], bands: list[list[int]], limit: float, *,
              lowest: float = 0.25, highest: float = 8.0) -> tuple[list[int], list]:
    """The band that buys the most effect at a damage of at most `limit`, whatever dose that takes.

    try_cells([(band, dose), ...]) -> one (effect, damage) per cell. Each band starts at dose 1; where that is
    within the limit the dose doubles until it no longer is, else it halves until it is; between the last two
    the effect at the limit is interpolated, so that no band wins by where its doses happened to lie. Returns
    (band, [(band, effect, dose), ...]): the most that each band buys, and at which dose. RuntimeError if no
    cell stays within the limit.
    """
    tried, cells = [[] for _ in bands], [(i, 1.0) for i in range(len(bands))]
    while cells:
        found, after = try_cells([(bands[i], dose) for i, dose in cells]), []
        for (i, dose), (effect, damage) in zip(cells, found, strict=True):
            tried[i].append((dose, effect, damage))
            then = dose * 2 if damage <= limit else dose / 2
            if lowest <= then <= highest and (dose == 1 or (then > dose) == (dose > 1)):    # never back
                after.append((i, then))
        cells = after

    best = []
    for band, doses in zip(bands, map(sorted, tried)):
        bought = [(effect, dose) for dose, effect, damage in doses if damage <= limit]
        for (low, effect, damage), (high, more, most) in pairwise(doses):
            if damage <= limit < most:
                t = (limit - damage) / (most - damage)
                bought.append((effect + t * (more - effect), low + t * (high - low)))
        if bought:
            best.append((band, *max(bought)))
    if not best:
        raise RuntimeError(f"every band does more damage than {limit:.3g} at every dose from {lowest}: "
                           "give --steer-band and a small --coeff, or personas closer to each other")
    return max(best, key=lambda cell: cell[1])[0], best


def find_dose(try_doses: Callable[[list[float]], list], first: float = 1.0, *, min_survive: float = 0.5,
              coeff_min: float = 0.25, coeff_max: float = 64.0) -> tuple[float, list, str]:
    """The dose with the most effect among those that survive: a climb on a ladder of factor sqrt(2).

    try_doses(doses) -> one (effect, its standard error, share that survives) per dose: one batch. Tries
    `first` and two rungs to either side; two more above while the best is one of the two highest and that
    survives, or below while the best is the lowest or none survives. A dose is held against others by the
    mean effect of itself and its neighbours that survive, and of those within a standard error of the best
    the highest is taken: few answers differ by noise, and what the filter lets through rises with the dose.
    Returns (dose, [(dose, effect, error, share), ...], the bound it is: "coeff_min", "coeff_max" or "").
    RuntimeError if none survives.
    """
    def effect(rung):
        near = [trials[other][0] for other in alive if abs(other - rung) <= 1]
        return sum(near) / len(near)

    n_rungs, start = (round(2 * math.log2(dose / coeff_min)) for dose in (coeff_max, first))
    low = min(max(start - 2, 0), n_rungs - 4)
    trials, rungs = {}, range(low, low + 5)
    while rungs := [rung for rung in rungs if 0 <= rung <= n_rungs]:
        doses = [coeff_min * 2 ** (rung / 2) for rung in rungs]
        trials |= zip(rungs, try_doses(doses), strict=True)
        alive = [rung for rung, (_, _, survive) in trials.items() if survive >= min_survive]
        low, top, best = min(trials), max(trials), max(alive, key=effect, default=min(trials))
        best = max((rung for rung in alive if effect(rung) >= effect(best) - trials[best][1]), default=best)
        is_rising = top in alive and best > top - 2
        rungs = (top + 1, top + 2) if is_rising else (low - 2, low - 1) if best == low else ()
    if not alive:
        raise RuntimeError(f"no dose survives: at {coeff_min:g}, {trials[0][2]:.0%} of answers "
                           f"pass the filter, need {min_survive:.0%}; lower --min-survive, give --coeff")
    dose_of = {rung: coeff_min * 2 ** (rung / 2) for rung in sorted(trials)}
    bound = {0: "coeff_min", n_rungs: "coeff_max"}.get(best, "")
    return dose_of[best], [(dose, *trials[rung]) for rung, dose in dose_of.items()], bound


def calibrate_limits(base: list[dict]) -> Limits:
    """The largest readings of the usual KEEP of the base's own answers, with SLACK.

    base: `steer.readings` of the untouched base's answers, half of them bare and half under the persona
    prompt, with the sampler, prompts and length of what will be judged: a maximum over windows grows with
    all three.
    An answer is as unusual as its most unusual reading: the share of answers that read less.
    """
    x = torch.tensor([[r["worst_window"], r["loop"]] for r in base], dtype=torch.float64)   # [n, 2]
    unusual = (x < x[:, None]).double().mean(1).amax(1)                                     # [n]
    usual = unusual.argsort(stable=True)[:math.ceil(KEEP * len(base))]                      # [KEEP * n]
    worst_window, loop = x[usual].amax(0).tolist()
    return Limits((1 + SLACK) * worst_window, min(loop + SLACK * (1 - loop), MOST_LOOP))
