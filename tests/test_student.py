"""Tests of tools/student.py and tools/table.py: seeds, and what a run says of its round and at its end."""
from tools import folder, table
from tools.student import stage_seed, why_dropped

pytest_plugins = ["shared"]


def test_stages_have_seeds_of_their_own():
    names = ("make", "heal", "probe")
    seeds = {stage_seed(s, r, name) for s in range(3) for r in range(3) for name in names}
    assert len(seeds) == 27 and stage_seed(1, 2, "make") == stage_seed(1, 2, "make")


def test_dropped_completions_are_told_by_rule_with_a_sample():
    def entry(rule, value, limit, text="ok"):
        return dict(text=text, verdict=dict(kept=not rule, rule=rule, value=value, limit=limit))
    told = why_dropped([entry("", 0, 0), entry("loop", 0.7, 0.5, "no \x1b[31mno\u202e no"),
                        entry("words", 0, 1, ""), entry("loop", 0.9, 0.5)])
    assert told == ('loop dropped 2, such as "no  [31mno  no" with 0.7 over a limit of 0.5; '
                    'words dropped 1, such as "" with 0 under a limit of 1')
    assert why_dropped([entry("", 0, 0)]) == ""


def test_a_trait_that_does_not_move_is_said(finished, capsys):
    events = [e | dict(trait=0.01, trait_se=0.02, moved=0.01, moved_se=0.02,
                  label=e["label"] + "\x1b[2J") for e in finished.rows()]
    table.tally(folder.Record(finished.path, finished.run, events, []), 1.0)
    out = capsys.readouterr().out
    assert "did not move at any dose" in out and "\x1b" not in out and "no round was accepted" in out
    still = dict(trait=0.1, trait_se=0.06, moved=0.01, moved_se=0.02)
    assert not table.has_moved(still) and table.has_moved(still | dict(moved=-0.05))
    assert table.has_moved(still | dict(trait=-0.5))
