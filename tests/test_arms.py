"""Tests of bench/arms.py."""
import common                                                   # noqa: F401   finds bench/
import arms
import pytest


def test_arms_are_compared_at_the_same_round_and_where_they_first_reach_a_trait():
    days = {-1: dict(trait=0.0, text=1.0), 0: dict(trait=0.4, text=0.9), 2: dict(trait=0.8, text=0.5),
            3: dict(trait=0.6, text=0.1)}
    assert arms.at_trait(days, 0.2, "text") == pytest.approx(0.95)
    assert arms.at_trait(days, 0.6, "text") == pytest.approx(0.7) and arms.at_trait(days, 0.9, "text") is None
    assert arms.cell([None, None], 2) == "not reached" and arms.cell([0.5, None], 2) == "0.500 (1 of 2)"


def test_two_arms_may_differ_in_one_field_only():
    def record(**options):
        options = dict(reg="kl_rev", kl_agg="rmse", seed=0, out="a", lam=5.0) | options
        return dict(options=options, weights="w", items=[], versions={}, code="c")
    assert arms.differing(record(), record(seed=1, out="b")) == set()
    assert arms.differing(record(), record(kl_agg="mean")) == {"kl_agg"}
    assert arms.differing(record(kl_agg="mean"), record(reg="nll")) == {"reg"}
    assert arms.differing(record(), record(kl_agg="mean", lam=1.0)) == {"kl_agg", "lam"}
    assert arms.differing(record(), record() | {"code": "d"}) == {"code"}


def test_a_trajectory_is_read_from_a_run(finished):
    record, days = arms.trajectory(finished[1].path)
    assert set(days) == {-1, 0} and 0 <= days[0]["grammar"] <= 1 and record["status"] == "accepted"
