"""Search: which blocks to steer, how much, and what passes the filter, by what that does on this model.

The filter's limits are read off the base's own answers. The band is chosen once a run, by what steering would
make the base say next (`foresee`, exact means); the dose in every round, by sampled answers and the share of
them that survives the filter. There is no ceiling at 1.0: a vector may be a hundredth of the state that it is
added to. Pure functions: the caller tries.
"""
import math
from typing import Callable

import torch

from steer import Limits

NEAR = 1.3                  # doses so close are read together: one step of the finest grid, 2 ** (1/4)
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
              doses=(0.25, 0.5, 1.0, 2.0, 4.0, 8.0)) -> tuple[list[int], list]:
    """The band that buys the most effect at a damage of at most `limit`, whatever dose that takes.

    try_cells([(band, dose), ...]) -> one (effect, damage) per cell. Returns (band, [(band, effect, dose),
    ...]): the most that each band buys, and at which dose. RuntimeError if no cell stays within the limit.
    """
    found, best = iter(try_cells([(band, dose) for band in bands for dose in doses])), []
    for band in bands:
        within = [(effect, dose) for dose, (effect, damage) in zip(doses, found) if damage <= limit]
        best += [(band, *max(within))] if within else []
    if not best:
        raise RuntimeError(f"every band does more damage than {limit:.3g} at every dose from {doses[0]}: "
                           "give --steer-band and a small --coeff, or personas closer to each other")
    return max(best, key=lambda cell: cell[1])[0], best


def find_dose(try_doses: Callable[[list[float]], list], *, min_survive: float = 0.5, coeff_min: float = 0.25,
              coeff_max: float = 64.0) -> tuple[float, list, str]:
    """The dose with the most effect among those that survive, from coeff_min up to where the filter stops it.

    try_doses(doses) -> one (effect, share that survives) per dose: one batch. Doses double while the highest
    survives, then the gaps beside the best are halved twice, in log(dose). A dose is held against others by
    the mean effect of all survivors within a factor of NEAR: on few answers neighbours differ by noise.
    Returns (dose, [(dose, effect, share), ...], the bound it is: "coeff_min", "coeff_max" or "").
    RuntimeError if none survives.
    """
    def effect(dose):
        near = [trials[other][0] for other in alive if dose / NEAR <= other <= dose * NEAR]
        return sum(near) / len(near)

    trials, doses = {}, [coeff_min * 2 ** i for i in range(4)]
    while doses:
        trials |= zip(doses, try_doses(doses), strict=True)
        top = max(trials)
        doses = [2 * top, 4 * top] if trials[top][1] >= min_survive and 4 * top <= coeff_max else []
    for step in range(3):
        alive = [dose for dose, (_, survive) in trials.items() if survive >= min_survive]
        if not alive:
            raise RuntimeError(f"no dose survives: at {coeff_min:g}, {trials[coeff_min][1]:.0%} of answers "
                               f"pass the filter, need {min_survive:.0%}; lower --min-survive, give --coeff")
        best, tried = max(alive, key=effect), sorted(trials)
        if step < 2:
            doses = [math.sqrt(a * b) for a, b in zip(tried, tried[1:]) if best in (a, b)]
            trials |= zip(doses, try_doses(doses), strict=True)
    bound = {tried[0]: "coeff_min", tried[-1]: "coeff_max"}.get(best, "")
    return best, [(dose, *found) for dose, found in trials.items()], bound


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
