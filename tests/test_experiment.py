"""Tests of bench/experiment.py."""
import json

import common                                                   # noqa: F401   finds bench/
import experiment
import numpy as np
import pytest

pytest_plugins = ["shared"]


def grid_of(folder, **more):
    arms = {"rmse": [], "mean": ["--kl-agg", "mean"]}
    return {"folder": str(folder), "argv": [], "seeds": [0], "arms": arms} | more


def test_where_the_share_first_crosses_a_level():
    days = {-1: dict(share=0.0, text=1.0), 0: dict(share=0.4, text=0.9), 2: dict(share=0.8, text=0.5),
            3: dict(share=0.6, text=0.1)}
    assert experiment.at_share(days, 0.2, "text") == pytest.approx(0.95)
    assert experiment.at_share(days, 0.6, "text") == pytest.approx(0.7)
    assert experiment.at_share(days, 0.9, "text") is None
    assert experiment.cell([None, None]) == "-" and experiment.cell([0.5, None]) == "0.500 (1 of 2)"


def test_the_bootstrap_pairs_items_and_knows_noise_from_a_difference():
    rng = np.random.default_rng(0)
    hard = [rng.normal(size=40) * 5 for _ in range(3)]              # items differ much more than arms do
    better = [x + 0.3 + 0.1 * rng.normal(size=40) for x in hard]
    mean, low, high = experiment.difference(better, hard)
    assert low > 0.2 and high < 0.4 and low < mean < high
    same = [x + rng.normal(size=40) for x in hard]
    mean, low, high = experiment.difference(same, hard)
    assert low < 0 < high and high - low == pytest.approx(2 * 1.96 * (1 / 120) ** 0.5, rel=0.5)
    seeds_disagree = [hard[0] + 1, hard[1] - 1, hard[2]]            # a difference of seeds, not of arms
    assert experiment.difference(seeds_disagree, hard)[1] < -0.5


def test_a_cell_with_other_options_is_not_taken_for_this_one(tmp_path):
    grid = grid_of(tmp_path)
    assert experiment.folder_of(grid, "mean", 0) is None
    run = tmp_path / "mean-0" / "x"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(dict(argv=experiment.command(grid, "mean", 0))))
    assert experiment.folder_of(grid, "mean", 0) == run and not experiment.is_finished(run)
    with pytest.raises(ValueError, match="other options"):
        experiment.folder_of(grid_of(tmp_path, argv=["--rounds", "3"]), "mean", 0)
    for bad in ("[]", "{", json.dumps(grid_of(tmp_path, seeds=[]))):
        (tmp_path / "grid.json").write_text(bad)
        with pytest.raises(ValueError, match="grid.json"):
            experiment.load(tmp_path / "grid.json")


def test_arms_differ_in_what_they_name_and_a_run_becomes_tables_and_a_figure(finished, tmp_path):
    import copy
    record = finished
    other = copy.deepcopy(record)
    other.run["options"] |= dict(kl_agg="mean", seed=1, out="elsewhere")
    grid, runs = grid_of(tmp_path), {("rmse", 0): record, ("mean", 0): other}
    experiment.check_apart(grid, runs)
    seeds = experiment.by_arm(grid, runs)
    text = experiment.tables(grid, runs, seeds)
    assert "| mean - rmse | share | +0.000 [+0.000, +0.000] | none |" in text and "| rmse 0 | 1 |" in text
    experiment.figure(tmp_path / "arms.svg", seeds)
    assert (tmp_path / "arms.svg").read_text().count("<polyline") == 2
    alone = {("rmse", 0): record, ("mean", 1): other}               # two seeds are no pair
    assert "mean - rmse" not in experiment.tables(grid, alone, experiment.by_arm(grid, alone))
    for change in (dict(lam=1.0), dict(rounds=9)):
        other.run["options"] |= change
        with pytest.raises(ValueError, match=next(iter(change))):
            experiment.check_apart(grid, runs)
        other.run["options"] |= {name: record.run["options"][name] for name in change}
    other.run["code"] = "another"
    with pytest.raises(ValueError, match="code"):
        experiment.check_apart(grid, runs)
