"""Tests of tools/inputs.py: what a run reads is checked and named by file and line."""
import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import evalmfv
from tools import inputs

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = [f"Question number {i}?" for i in range(12)]


def written(path, ending):
    """QUESTIONS as other tools write them, every third of them three times."""
    rows = [q for i, q in enumerate(QUESTIONS) for _ in range(1 if i % 3 else 3)]
    path = path / f"p{ending}"
    if ending == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, "text": q}) + "\n" for i, q in enumerate(rows)))
    elif ending == ".json":
        path.write_text(json.dumps([{"instruction": q} if i % 2 else q for i, q in enumerate(rows)]))
    elif ending == ".csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([["id", "prompt"], *enumerate(rows)])
    else:
        path.write_text("\n\n".join(rows))
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".txt", ""])
def test_prompts_of_every_format_are_the_same_prompts_each_on_one_side(ending, tmp_path):
    found = inputs.load("love", prompts=str(written(tmp_path, ending)))
    assert found["held_out"] == QUESTIONS[::4] and found["train"] == [q for i, q in enumerate(QUESTIONS)
                                                                      if i % 4]
    assert len(found["notes"]) == 1 and "8 of 20 prompts were there before" in found["notes"][0]


@pytest.mark.parametrize("name, content, message", [
    ("p.txt", b"", "0 prompts"), ("p.txt", b"one\n" * 50, "1 prompts, need at least 8 that differ"),
    ("p.txt", "Wie geht es dir, K\xf6nig?\n".encode("latin-1") * 9, "line 1: not UTF-8 (byte 0xf6)"),
    ("p.txt", b"one\ntwo\0\n" * 9, "line 2: holds a NUL"), ("p.txt", b'["a", "b"]', "begins like JSON"),
    ("p.jsonl", b'{"text": "a"}\n{"messages": []}\n',
     "line 2: has the fields messages; expected one of text, prompt"),
    ("p.jsonl", b'{"text": "a"}\nb\n', "line 2: not JSON"), ("p.json", b'["a", 7]',
                                                             "entry 2: expected a text, got '7'"),
    ("p.csv", b"id,question\n1,a\n", "row 1: has the fields id, question"), ("p.yaml", b"- a\n" * 9,
                                                                             "what a .yaml file holds"),
    ("p.jsonl", b"[" * 9999, "line 1")])
def test_a_prompts_file_that_cannot_be_used_is_named_with_its_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        inputs.load("authority", prompts=str(tmp_path / name))
    assert name in str(error.value)


def test_a_persona_of_ones_own_needs_two_texts_and_holds_the_patterns_of_all(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"pos": ["You adore cats."], "neg": "You hate cats."}))
    found = inputs.load(str(path))
    assert found["persona"] == dict(name="mine", pos=["You adore cats."], neg=["You hate cats."], target=None,
                                    meter_pos=["You adore cats."], meter_neg=["You hate cats."],
                                    direction=None, patterns=list(inputs.PATTERNS))
    assert "one text on each side" in found["notes"][-1]
    data = json.loads((ROOT / "data" / "prompts.json").read_text())
    assert set(found["train"]) == {q for side in data.values()
                                   for q in side["train"]}
    assert not set(found["train"]) & set(found["held_out"])
    path.write_text(json.dumps(dict(pos="a", neg="b", target="care", direction=-1, patterns=["cat"],
                                    prompts=QUESTIONS)))
    found = inputs.load(str(path))
    assert found["persona"]["direction"] == -1 and found["persona"]["patterns"] == ["cat", *inputs.PATTERNS]
    assert found["held_out"] == QUESTIONS[::4]
    quick = inputs.load("love", pos="a", neg="b")
    assert quick["persona"]["target"] is None and quick["train"] == data["love"]["train"]
    for text in ("As an AI, I do not.", "I can't help you with that."):
        assert any(re.search(p, text, re.IGNORECASE) for p in quick["persona"]["patterns"])
    assert not any(re.search(p, "as an aid worker I help", re.IGNORECASE)
                   for p in quick["persona"]["patterns"])


@pytest.mark.parametrize("content, message", [
    ({"pos": ["a"]}, "lacks neg"), ({"pos": ["a"], "neg": ["a"]}, "the same text"),
    ({"pos": [], "neg": ["a"]}, "pos: expected 1 or more"),
    ({"pos": "a", "neg": "b", "target": "care"}, "direction None; expected one of"),
    ({"pos": "a", "neg": "b", "target": "money", "direction": 1}, "'money'"),
    ({"pos": "a", "neg": "b", "patterns": ["("]}, "'(' of its patterns"),
    ({"pos": "a", "neg": "b", "patterns": "x"}, "patterns is not a list"),
    ({"pos": "a", "neg": "b", "prompts": ["x"]}, "prompts: expected 8 or more"),
    (["a"], "expected a JSON object"), ("nothing", "cannot be read")])
def test_a_persona_file_that_cannot_be_used_is_named(content, message, tmp_path):
    path = tmp_path / "mine.json"
    if content != "nothing":
        path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        inputs.load(str(path))
    assert "mine" in str(error.value)


@pytest.mark.parametrize("how, message", [
    (dict(persona="nobody"), "personas.json has authority, love"), (dict(persona="love", pos="a"),
                                                                    "come together"),
    (dict(persona="love", pos="a", neg="a"), "the same text"), (dict(persona="love", pos="\ud800", neg="a"),
                                                                "half a surrogate")])
def test_a_persona_that_is_not_there_or_is_none_is_refused(how, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        inputs.load(**how)


@pytest.mark.parametrize("line, message", [
    ('{"foundation": "care"}', "line 2: text is None"), ('{"text": "", "foundation": "care"}',
                                                          "line 2: text is ''"), ("{", "line 2"),
    ("[" * 9999, "line 2"),
    ('{"text": "a", "foundation": ["care"]}', "line 2: foundation"),
    ('{"text": "a", "foundation": "carer"}', "line 2: foundation 'carer'"), ("[1]", "line 2: "),
    ('{"text": "a", "foundation": "care", "label": {"care": -1, "fairness": 1, "loyalty": 1, "authority": 1, '
     '"sanctity": 1, "liberty": 1, "social": 1}}', "finite and not negative"),
    ('{"text": "a", "foundation": "care", "label": {"care": 1}}', "line 2: label lacks")])
def test_a_vignette_that_cannot_be_used_is_named_with_its_line(line, message, tmp_path):
    (tmp_path / "v.jsonl").write_text(f'{{"text": "a\u2028b", "foundation": "care"}}\n{line}\n',
                                      encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        evalmfv.load_vignettes(tmp_path / "v.jsonl")


def test_the_originals_file_has_its_known_human_profile():
    path = Path("/work/shared/data/tinymfv_classic_other_violate.jsonl")
    if not path.exists():
        pytest.skip("the original's vignettes are not here (they are not ours to carry)")
    labels = torch.tensor([row["label"] for row in evalmfv.load_vignettes(path)], dtype=torch.float64)
    known = torch.tensor([.198269, .135466, .109296, .122941, .122239, .118568, .193221], dtype=torch.float64)
    assert len(labels) == 132 and (labels.mean(0) - known).abs().max() < 1e-6
    assert -(labels * labels.clamp(1e-12).log()).sum(1).mean().item() == pytest.approx(0.75623, abs=1e-5)


@pytest.mark.parametrize("name, content, message", [
    ("contexts", [], "contexts.json: expected 1 or more texts, got 0"), ("contexts", ["a", ""],
                                                                         "contexts.json, entry 2"),
    ("contexts", {}, "expected a JSON list"),
    ("personas", {"authority": {"pos": ["a"]}}, "lacks neg"),
    ("prompts", {"authority": {"train": ["a", "b"], "held_out": [1, 2]}}, "held_out, entry 1"),
    ("prompts", {"love": {}}, "prompts.json has love")])
def test_an_entry_of_the_data_that_cannot_be_used_is_named(name, content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "DATA", shutil.copytree(ROOT / "data", tmp_path / "data"))
    (inputs.DATA / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(message)):
        inputs.load("authority")
