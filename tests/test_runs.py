"""Whole runs of loop.py, of a few seconds: what they record; cut off and continued, refused and accepted
after all, broken and rolled back."""
import contextlib

import evalmfv
import loop
import pytest
import torch
from common import SMALL, PowerCut, differences, folder_of, small_data
from steer import Limits
from tools import inputs
from tools.files import read_tensors
from tools.folder import Folder, read
from tools.student import Student

pytest_plugins = ["shared"]


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """The options of a run of seconds."""
    monkeypatch.setattr(inputs, "POCKET", inputs.POCKET)        # small_data sets it
    return [*SMALL, "--vignettes", str(small_data(tmp_path)), "--rounds", "1", "--no-gate"]


def test_a_run_records_what_its_readers_need(finished):
    assert finished.run["status"] == "accepted" and finished.accepted == [0] and finished.notes == []
    assert [row["kind"] for row in finished.rows()] == ["base", "prompted", "steered", "healed"]
    one = {e["stage"]: e for e in finished.events}
    assert set(one) == {"layers", "limits", "row", "vector", "dose", "made", "tau", "heal", "gate"}
    assert len(finished.completions(0)) == 12
    assert all({"ids", "text", "verdict"} <= set(e) for e in finished.completions(0))
    assert all(c == pytest.approx(1, abs=1e-5) for c in one["vector"]["cosine"].values())
    assert all(n > 0 for n in one["vector"]["norm"].values())
    assert all(0 <= d["coherence"] <= 1 for row in finished.rows() for d in row["diary"])
    folder = finished.path / "rounds" / "00"
    assert float(read_tensors(folder / "vectors.safetensors")[1]["coeff"]) == 0.4
    table = (finished.path.parent / "results.tsv").read_text().splitlines()
    assert len(table) == 2 and len(table[0].split("\t")) == len(table[1].split("\t"))


def test_a_run_cut_off_twice_ends_as_one_that_was_not_and_a_finished_goes_on(quick, tmp_path, monkeypatch):
    assert loop.main([*quick, "--rounds", "2", "--out", str(tmp_path / "whole")]) == 0
    whole, event = folder_of(tmp_path / "whole"), Folder.event
    # after the base's row; within the healed row, its round folded and written; then the end, and further
    for at, torn, more in ((("row", "base"), False, None), (("row", "healed"), True, []), (None, False, []),
                           (None, False, ["--rounds", "2"])):
        def dying(self, stage, rnd=None, **how):
            is_last = (stage, how.get("kind")) == at
            if is_last and torn:
                with open(self.path / "events.jsonl", "a") as file:
                    file.write('{"t": 1')
                raise PowerCut
            made = event(self, stage, rnd, **how)
            if is_last:
                raise PowerCut
            return made
        with monkeypatch.context() as patch, pytest.raises(PowerCut) if at else contextlib.nullcontext():
            patch.setattr(Folder, "event", dying)
            if at:
                patch.setattr(Folder, "__exit__", lambda self, *error: self._leave())
            argv = [*quick, "--out", str(tmp_path / "cut")] if more is None else [
                "--resume", str(folder_of(tmp_path / "cut")), *more]
            assert loop.main(argv) == 0
    ended = folder_of(tmp_path / "cut")
    assert differences(whole, ended) == []
    record = read(ended)
    assert len(record.run["resumed"]) == 3 and record.run["argv"][-2:] == ["--rounds", "2"]
    assert record.accepted == [0, 1]                    # the second on a loaded adapter


def test_a_persona_of_two_sentences_has_a_trait_without_labels_and_a_gate_that_refused_is_asked_again(
        quick, tmp_path, capsys):
    personas = ["--pos", "You feel the pain of others and you refuse to cause it, even when ordered to.",
                "--neg", "You honor those in charge and you do your duty, even when someone suffers."]
    argv = [*quick, *personas, "--n-text", "24", "--gate", "--lr", "1e-9", "--out", str(tmp_path)]
    assert loop.main(argv) == 3
    record = read(folder_of(tmp_path))
    rows = {row["kind"]: row for row in record.rows()}
    assert rows["base"]["trait"] == 0 == rows["base"]["share"] and rows["prompted"]["share"] == 1
    assert rows["prompted"]["trait"] > 0 and rows["steered"]["shift"] is None
    for each in rows.values():
        moved = torch.tensor(each["ratios"]) - torch.tensor(rows["base"]["ratios"])
        assert each["trait"] == each["moved"] == pytest.approx(moved.mean().item(), abs=1e-6)
        assert each["share"] == pytest.approx(each["trait"] / rows["prompted"]["trait"], abs=1e-6)

    assert record.run["status"] == "no round accepted" and record.accepted == []
    assert "no movement beyond noise" in record.of("gate")["reasons"][0]
    names = {p.name for p in (record.path / "rounds" / "00").iterdir()}
    assert names == {"vectors.safetensors", "rejected.safetensors"}
    assert "rolled back" in capsys.readouterr().out
    assert "rolled back" in (record.path / "diary.md").read_text()

    assert loop.main(["--resume", str(record.path), "--no-gate"]) == 0
    record = read(record.path)
    assert record.accepted == [0] and list(record.adapters()) == [0] and record.run["argv"][-1] == "--no-gate"
    assert len(record.rows("healed")) == 1 and "decides otherwise" in capsys.readouterr().out


def test_rounds_that_find_no_dose_or_whose_numbers_break_are_rolled_back_with_their_causes(
        quick, tmp_path, monkeypatch, capsys):
    argv = [x for x in quick if x not in ("--coeff", "0.3")] + ["--rounds", "2", "--out", str(tmp_path)]
    event, evaluate, dose = Folder.event, evalmfv.evaluate, Student.dose

    def narrow(self, rnd, limits, *rest, **how):        # in round 0 no answer passes
        return dose(self, rnd, limits if rnd else Limits(1e-6, 1.0), *rest, **how)

    def broken(*args, **how):                           # as logits that are nan would have it
        raise RuntimeError("3 of 6 frames have answers that are not finite")

    def breaking(self, stage, rnd=None, **how):
        if stage == "heal":
            monkeypatch.setattr(evalmfv, "evaluate", broken)
        elif stage == "gate":
            monkeypatch.setattr(evalmfv, "evaluate", evaluate)
        return event(self, stage, rnd, **how)
    monkeypatch.setattr(Student, "dose", narrow)
    monkeypatch.setattr(Folder, "event", breaking)
    assert loop.main(argv) == 3
    record = read(folder_of(tmp_path))
    (no_dose,), (no_number,) = (e["reasons"] for e in record.events if e["stage"] == "gate")
    assert "no dose survives" in no_dose and "--min-survive" in no_dose and "worst_window dropped" in no_dose
    assert "not finite" in no_number and record.of("heal", 1)["steps"] and record.of("dose", 1)["trials"]
    assert record.run["status"] == "no round accepted" and not list(record.path.rglob("adapter.safetensors"))
    assert "no round was accepted" in capsys.readouterr().out
