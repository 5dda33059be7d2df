"""Tests of bench/experiment.py and of the arms in bench/variants.py."""
import json
from types import SimpleNamespace

import common                                                   # finds bench/
import experiment
import heal
import loop
import numpy as np
import pytest
import steer
import torch
import variants
from lora import attach
from tools import inputs
from tools.record import read

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


# ---- bench/variants.py


def test_hinge_is_a_mean_over_positions_of_what_each_is_over_tau(monkeypatch):
    kl = torch.tensor([0.0, 1.0, 3.0], requires_grad=True)                                          # [3]

    def barrier(model, params, samples, reference, cfg, **how):         # as heal's step has it
        return torch.relu(heal.aggregate(kl, "rmse") - cfg.tau)
    monkeypatch.setattr(heal, "heal", barrier)
    with variants.hinge():
        found = heal.heal(None, [], [], None, heal.HealConfig(tau=0.5))
    assert found.item() == pytest.approx((0 + 0.5 + 2.5) / 3)
    found.backward()
    assert kl.grad.tolist() == pytest.approx([0, 1 / 3, 1 / 3])         # none pays for another
    assert heal.aggregate(kl, "rmse").item() == pytest.approx((10 / 3) ** 0.5)  # tau's own, as ever


def test_falling_begins_at_the_dose_and_ends_at_none(monkeypatch):
    tok, doses = common.tiny_tokenizer(), []
    model, hooked = common.tiny_model(tok), steer.hooked

    def seen(model, hooks):
        doses.append([add(torch.zeros(2, 1, 32))[:, 0, 0].tolist() for add in hooks.values()])      # [2]
        return hooked(model, hooks)
    monkeypatch.setattr(steer, "hooked", seen)
    monkeypatch.setattr(steer, "end_ids", lambda model, tok: [10 ** 6])                 # no answer ends
    with variants.falling():
        for _ in range(2):                              # the second call begins anew
            steer.generate(model, tok, ["a", "b"], vectors={1: torch.ones(32)}, coeffs=[2.0, 1.0],
                           max_new_tokens=5)
    assert doses == 2 * [[[2.0 * part, 1.0 * part]] for part in (1, 0.75, 0.5, 0.25, 0)]


def test_mask_leaves_the_unlikeliest_tokens_out_of_nll_and_not_out_of_the_barrier(monkeypatch):
    tok = common.tiny_tokenizer()
    model, ids = common.tiny_model(tok), common.some_ids(1, 24)[0].tolist()
    stack = attach(model, r=2, alpha=4, layers=[1])
    common.noise(stack)
    passes = heal.Passes(model, [heal.Sample(ids, 4, 0)], lambda: stack.gated(0, 0))
    unlikely = torch.arange(20) == 7                                                                # [20]
    student = SimpleNamespace(kept=list, train=[], yardstick=lambda kept, train: [9.0 * unlikely])
    record = SimpleNamespace(completions=lambda rnd: [])
    run = SimpleNamespace(student=student, folder=SimpleNamespace(record=record))
    monkeypatch.setattr(loop.Run, "heal", lambda run, rnd: dict(training=passes.losses([0]),
                                                                measured=torch.no_grad()(passes.losses)([0])))
    with variants.mask():
        found = loop.Run.heal(run, 0)
    ((nll,), (kl,)), ((all_nll,), (all_kl,)) = found["training"], found["measured"]
    assert torch.equal(nll, all_nll * ~unlikely) and all_nll[7] > 0 and torch.equal(kl, all_kl)
    nll[7].backward()
    assert not any(p.grad.any() for p in stack.parameters())


def test_repair_cuts_before_the_first_window_that_breaks_a_rule():
    limits, letters = steer.Limits(worst_window=1.0, loop=0.5), "abcdefghijklmnopqrstuvwxyzABCDEF"
    said = steer.Completion(0, [1], list(range(32)), 1.0, True, letters)

    def decode(ids):
        return "".join(letters[i] for i in ids)
    nll = torch.zeros(32)
    nll[20:22] = 5.0                                    # the window that ends with the second: 10 / 8 nats
    assert variants.cut_of(said, nll, limits, (), decode) == 22 - steer.WINDOW
    assert variants.cut_of(said, nll, steer.Limits(2.0, 0.5), ["f$"], decode) == 32 - steer.WINDOW
    nll[1:3] = 5.0
    assert variants.cut_of(said, nll, limits, (), decode) == 0


@pytest.mark.parametrize("name", ["repair", "online"])
def test_a_variant_makes_an_ordinary_run_folder_that_loop_py_does_not_go_on_with(
        name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inputs, "POCKET", inputs.POCKET)                # small_data changes it
    vignettes, out = common.small_data(tmp_path), tmp_path / "runs"
    more = ("--coeff .5 --n-make 12 --n-text 2 --think-tokens 1 --max-new-tokens 24 "
            f"--steer-band .76 .8 --no-gate --variant {name}").split()
    argv = [*common.TINY, "--vignettes", str(vignettes), "--out", str(out), *more]
    assert variants.main(argv) == 0
    record = read(common.folder_of(out))
    assert record.run["options"]["variant"] == name and len(record.rows("healed")) == 1
    made, steps = record.completions(0), record.of("heal")["steps"]
    if name == "repair":
        halves = [e for e in made if e["coeff"] == 0.25]
        assert any(e["verdict"]["kept"] for e in halves) and max(len(e["ids"]) for e in made) <= 24
        assert all(e["verdict"]["kept"] for e in made if e["coeff"] == 0.5)             # the rest were mended
    else:
        kept = sum(len(e["ids"]) for e in made if e["verdict"]["kept"])
        assert steps and sum(s["tokens"] for s in steps) not in (0, kept) and steps[-1]["div"] > 0
    experiment.check_apart({"arms": {name: more}}, {(name, 0): record})
    with pytest.raises(SystemExit):
        loop.main(["--resume", str(record.path)])
    assert "option variant is none that this program has" in capsys.readouterr().err
