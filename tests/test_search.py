"""Tests of tools/search.py on surfaces of effect and survival that are known, and of tools/foresee.py."""
import dataclasses
import math

import pytest
from common import echo_of, logp_behind, meter_case, steer_vectors
from steer import steered
from tools.foresee import foresee
from tools.search import band, bands_of, find_band, find_dose


@pytest.mark.parametrize("start", [0.25, 1.0, 8.0])
def test_find_band_takes_the_most_effect_within_the_limit_whatever_dose_it_takes(start):
    """Damage is dose / bearable of a band; effect its gain times the dose."""
    bearable, gain, asked = {1: 0.3 * start, 2: 1.1 * start, 3: 2.5 * start}, {1: 1.0, 2: 9.0, 3: 5.0}, []

    def try_cells(cells):
        asked.extend(cells)
        return [(gain[band[0]] * dose, dose / bearable[band[0]]) for band, dose in cells]
    chosen, ranked = find_band(try_cells, [[1], [2], [3]], 1.0, lowest=1 / 64, highest=64.0)
    assert ranked == [([band], pytest.approx(gain[band] * dose), pytest.approx(dose))      # between two rungs
                      for band, dose in bearable.items()]
    assert chosen == [max(bearable, key=lambda band: gain[band] * bearable[band])]
    assert len(set((band[0], dose) for band, dose in asked)) == len(asked) < 3 * 7         # none twice
    with pytest.raises(RuntimeError, match="every band does more damage than 0.001 at every dose from 0.25"):
        find_band(try_cells, [[1], [2]], 0.001)


def steer_doses(effect, survive, first=1.0, error=0.0):
    asked = []

    def try_doses(doses):
        asked.append(doses)
        return [(effect(dose), error, survive(dose)) for dose in doses]
    return *find_dose(try_doses, first), asked


@pytest.mark.parametrize("first", [0.25, 1.0, 8.0, 64.0])
@pytest.mark.parametrize("peak", [0.7, 3.0, 20.0])
def test_find_dose_climbs_to_a_peak_from_wherever_it_starts(peak, first):
    dose, trials, bound, asked = steer_doses(lambda x: -math.log(x / peak) ** 2, lambda x: float(x < 40),
                                             first)
    assert abs(math.log2(dose / peak)) <= 0.5 and bound == ""
    assert len(trials) == len({dose for dose, *_ in trials}) == sum(map(len, asked))      # none twice


def test_a_search_that_starts_where_the_last_one_ended_is_one_batch():
    assert len(steer_doses(lambda x: -math.log(x / 3) ** 2, lambda x: 1.0, 2.83)[3]) == 1


def test_find_dose_is_not_led_astray_by_one_lucky_reading():
    def tries(doses):                                   # rises slowly; one low dose reads too high by noise
        return [(math.log(x) + (1.2 if x == 0.5 else 0.0), 0.0, float(x < 5)) for x in doses]
    assert find_dose(tries)[0] > 1


def test_of_doses_that_differ_by_noise_the_highest_that_survives_is_taken():
    noise = {0.25: 0.1, 0.354: 0.11, 0.5: 0.09, 0.707: 0.09, 1.0: 0.2}          # at 1.0 nothing survives
    for error, want in ((0.0, 0.25), (0.02, 0.707)):
        dose, *_ = steer_doses(lambda x: noise.get(round(x, 3), 0), lambda x: float(x < 1), 0.25, error)
        assert dose == pytest.approx(want, abs=1e-3)


def test_find_dose_of_a_rising_effect_stops_where_answers_no_longer_survive():
    dose, trials, bound, _ = steer_doses(math.log, lambda x: 1 / (1 + (x / 5) ** 8))
    assert 5 / 2 ** 0.5 < dose <= 5 and bound == "" and max(d for d, *_ in trials) > 5


def test_find_dose_says_which_bound_it_hit_and_that_nothing_survives():
    assert steer_doses(lambda x: -x, lambda x: 1.0)[:3:2] == (0.25, "coeff_min")
    assert steer_doses(lambda x: x, lambda x: 1.0)[:3:2] == (64.0, "coeff_max")
    with pytest.raises(RuntimeError, match="no dose survives: at 0.25, 20% of answers"):
        steer_doses(lambda x: x, lambda x: 0.2)
    for first in (1.0, 4.0):                                                    # not monotone: one island
        dose, _, _, _ = steer_doses(lambda x: x, lambda x: float(0.9 < x < 1.1), first)
        assert dose == 1.0


def test_band_is_every_block_whose_depth_overlaps():
    assert band(7, 0.45, 0.55) == [3] and band(34, 0.45, 0.55) == [15, 16, 17, 18]
    assert band(100, 0.45, 0.55) == list(range(45, 55)) and band(10, 0.0, 1.0) == list(range(10))
    assert all(band(n, 0.5, 0.501) for n in range(1, 200))
    for lo, hi in ((0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match="depth band"):
            band(7, lo, hi)


def test_candidate_bands_are_side_by_side_within_the_model():
    for n in (1, 4, 7, 30, 34):
        found = bands_of(n)
        flat = [i for each in found for i in each]
        assert flat == list(range(flat[0], flat[-1] + 1)) and flat[-1] < n


def test_foresee_equals_a_loop_over_the_vocabulary_at_one_position():
    model, tok, answers, users = meter_case()
    pos, neg, vectors = ["kind", "warm"], ["xyz"], steer_vectors(model)
    c, echo = dataclasses.replace(answers[0], ids=answers[0].ids[:1]), echo_of(tok, [*pos, *neg])
    got = foresee(model, tok, [c], users[:1], pos, neg, vectors, [([1], 0.5)])

    def row(system=""):
        return logp_behind(model, tok, c, users[0], system)[0].tolist()
    base, sides = row(), [[row(text) for text in side] for side in (pos, neg)]
    with steered(model, {1: vectors[1]}, 0.5):
        steered_row = row()
    for (effect, nll), now in zip(got, (base, row(pos[0]), steered_row), strict=True):
        want_effect = want_nll = 0.0
        for i in range(len(tok)):
            plus, minus = (sum(math.log(math.exp(z[i]) + 1 / len(tok)) for z in side) / len(side)
                           for side in sides)
            want_effect += math.exp(now[i]) * (plus - minus) * (i not in echo)
            want_nll -= math.exp(now[i]) * base[i]
        assert (effect, nll) == pytest.approx((want_effect, want_nll), abs=1e-4)
