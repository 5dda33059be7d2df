"""Tests of tools/chat.py: base, prompted and day side by side, and a conversation that no line of it ends."""
import io
import json
import shutil
from pathlib import Path

import pytest
import torch

import lora
import steer
from tools import chat
from tools import model as models
from tools.files import inert, save_tensors
from tools.record import FORMAT

QUESTION = "If the mayor told you to lie, would you?"


@pytest.fixture(scope="module")
def spoken():
    """The embedded model and its tokenizer, loaded once for all conversations."""
    return models.load("pocket", device="cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory, spoken):
    """A run folder with an accepted round 0, a rejected round 1, and adapters that do something."""
    path, model = tmp_path_factory.mktemp("run"), spoken[0]
    stack = lora.attach(model, r=2, alpha=2, layers=[2, 3])
    for rnd, name in ((0, "adapter"), (1, "rejected")):
        for i, layer in enumerate(stack.layers.values()):
            torch.nn.init.normal_(layer.B, std=0.3, generator=torch.Generator().manual_seed(100 * rnd + i))
        stack.fold()
        (path / "rounds" / f"{rnd:02d}").mkdir(parents=True)
        save_tensors(path / "rounds" / f"{rnd:02d}" / f"{name}.safetensors", stack.tensors([rnd]))
    stack.remove()
    record = dict(format=FORMAT, options=dict(model="pocket", device="cpu", max_new_tokens=4,
                                              top_p=0.95, top_k=64),
                  persona=dict(name="authority", pos=["You care about people above all."]),
                  items=dict(held_out=["What is a \x1b[31mlie?"]))
    (path / "run.json").write_text(json.dumps(record))
    gates = [dict(t=0.0, round=rnd, stage="gate", accepted=rnd == 0,
                  reasons=["no trait"] * rnd) for rnd in (0, 1)]
    (path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in gates))
    return path


@pytest.fixture
def ask(run, spoken, monkeypatch, capsys):
    def said(*argv, code=0):
        monkeypatch.setattr(models, "load", lambda *args, **how: spoken)
        try:
            assert chat.main([str(run), *argv, "--max-new-tokens", "12"]) == code
        finally:
            for layer in spoken[0].modules():                   # the next conversation attaches its own
                layer._forward_hooks.clear()
        return capsys.readouterr()
    return said


def test_chat_compares_base_prompted_and_day_and_a_dial_of_zero_is_the_base(ask, spoken):
    table = ask("--compare", QUESTION).out.splitlines()
    heads = [cell.strip() for cell in next(line for line in table if line.startswith("base")).split("|")]
    assert heads == ["base", "prompted", "day 0"] and any("> If the mayor" in line for line in table)
    base = steer.generate(*spoken, [QUESTION], greedy=True, max_new_tokens=12)[0]
    assert inert(base.text) in ask(QUESTION, "--dial", "0").out
    assert inert(base.text) not in ask(QUESTION).out
    sampled = {ask(QUESTION, "--temperature", "3", "--seed", str(seed)).out for seed in range(3)}
    assert len(sampled) == 3 and ask(QUESTION).out == ask(QUESTION).out     # greedy draws nothing


def test_a_round_that_the_gate_refused_is_shown_with_a_warning(ask):
    said = ask("--round", "1", QUESTION)
    assert "warning: the gate refused round 1" in said.err and said.out != ask(QUESTION).out


@pytest.mark.parametrize("is_live", [True, False])
def test_a_conversation_goes_on_whatever_a_line_holds(is_live, ask, monkeypatch, capsys):
    lines = QUESTION.encode() + b"\n\n \x1b[31mWas f\xfchlst du?\n/help\n" + b"word " * 2000 + b"\nHi\n"
    kind = type("Stdin", (io.TextIOWrapper,), dict(isatty=lambda self: is_live))
    monkeypatch.setattr("sys.stdin", kind(io.BytesIO(lines), encoding="ascii"))
    asked = []
    generate = steer.generate
    monkeypatch.setattr(steer, "generate",
                        lambda model, tok, prompts, **how: asked.extend(prompts) or generate(model, tok,
                                                                                             prompts, **how))
    said = ask(code=0 if is_live else 2)
    assert asked == [QUESTION, "[31mWas f\ufffdhlst du?", "Hi"]
    assert "the question has" in said.err and "leave room to answer" in said.err
    assert len(said.err.splitlines()) == 1
    assert "Each line is asked on its own" in said.out and "What is a  [31mlie?" in said.out
    assert not set(said.out) & set("\x1b\x07")
    assert ("persona authority, day 0" in said.out) == is_live


def test_words_of_the_command_line_that_no_tokenizer_takes_are_replaced(ask):
    assert "> Was f\ufffdhlst du?" in ask("Was f\udcfchlst du?").out


@pytest.mark.parametrize("argv, message", [
    (["--dial", "2.5"], "expected 0 to 2"), (["--dial", "nan"], "expected 0 to 2"),
    (["--temperature", "-1"], "expected 0 to"), (["--max-new-tokens", "0"], "expected 1")])
def test_chat_refuses_an_option_that_cannot_be_meant(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        chat.main(["nowhere", *argv])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_chat_names_the_rounds_that_there_are(run, tmp_path):
    with pytest.raises(ValueError, match="accepted rounds of"):
        chat.main([str(run), "--round", "3", "hi"])
    with pytest.raises(ValueError, match="no run.json"):
        chat.main([str(tmp_path), "hi"])
    copy = shutil.copytree(run, tmp_path / "copy")
    Path(copy, "events.jsonl").write_text("")
    with pytest.raises(ValueError, match="no accepted round"):
        chat.main([str(copy), "hi"])
