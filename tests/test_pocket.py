"""Tests of pocket/: the embedded model's world, its data and its checkpoint."""
import dataclasses
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import evalmfv
import steer
from steer import Completion, generate, judge, readings, token_nll
from tools import model as models
from tools.search import calibrate_limits

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def pocket():
    """The two scripts of pocket/, imported here so that one that breaks fails these tests only."""
    sys.path.insert(0, str(ROOT / "pocket"))
    global make_pocket, world
    import make_pocket
    import world
    yield
    sys.path.remove(str(ROOT / "pocket"))


def test_the_grammar_recognises_all_that_it_makes_and_no_salad():
    rng = random.Random(0)
    for _ in range(300):
        text, slots = world.dilemma(rng)
        answers = [world.dilemma_answer(slots, rng.uniform(-1, 1), rng),
                   world.feeling_answer(rng.uniform(-1, 1), rng), world.control(-1, 1, rng)[1]]
        assert [world.grammar_ok(a) for a in answers] == [1.0] * 3, answers
        words = answers[0].split()
        rng.shuffle(words)
        assert world.grammar_ok(" ".join(words)) < 1
    assert world.grammar_ok("") == 0 and world.grammar_ok("No. No care care the the mayor.") == 0.5


def test_an_answer_leans_the_way_its_latent_points():
    rng = random.Random(0)
    for axis, make in (("z", lambda x: world.dilemma_answer(world.dilemma(rng)[1], x, rng)),
                       ("y", lambda x: world.feeling_answer(x, rng))):
        low, middle, high = (sum(world.lean(make(x), axis) for _ in range(100)) / 100 for x in (-1, 0, 1))
        assert low < -1 < -0.4 < middle < 0.4 < 1 < high


def test_nothing_that_is_measured_was_ever_trained_on():
    prompts = json.loads((ROOT / "pocket" / "data" / "prompts.json").read_text())
    held_out = {p for side in prompts.values() for p in side["held_out"]}
    held_out |= {v["text"] for v in evalmfv.load_vignettes(ROOT / "pocket" / "data" / "vignettes.jsonl")}
    rng, seen = random.Random(1), set()
    for _ in range(20000):
        seen |= {world.dilemma(rng)[0], world.feeling(rng), world.vignette(rng)[0], world.scene(rng)}
    assert not held_out & seen
    assert all(set(side["train"]).isdisjoint(side["held_out"]) for side in prompts.values())


def test_the_vignettes_cover_seven_foundations_with_labels_that_sum_to_one():
    rows = evalmfv.load_vignettes(ROOT / "pocket" / "data" / "vignettes.jsonl")
    assert len(rows) >= 132 and len({r["text"] for r in rows}) == len(rows)
    for f in evalmfv.FOUNDATIONS:
        assert sum(r["foundation"] == f for r in rows) >= 18, f
    assert all(abs(sum(r["label"]) - 1) < 1e-6 for r in rows)


def test_the_shipped_data_are_what_make_pocket_writes(tmp_path):
    make_pocket.make_data(tmp_path)
    for name in ("personas.json", "prompts.json", "contexts.json", "vignettes.jsonl"):
        assert (tmp_path / name).read_text() == (ROOT / "pocket" / "data" / name).read_text(), name


def test_training_the_pocket_model_lowers_its_loss():
    tok = make_pocket.make_tokenizer(random.Random(0), n_conversations=200, vocab_size=600)
    _, record = make_pocket.train(tok, steps=6, batch=2, lr=1e-2, seed=0, say=lambda *a, **k: None)
    assert record["losses"][-1] < record["losses"][0] - 0.3, record["losses"]


def test_the_pocket_checkpoint_is_an_ordinary_small_chat_model():
    folder = ROOT / "pocket"
    assert (folder / "model.safetensors").stat().st_size <= 8e6
    with safe_open(folder / "model.safetensors", "pt") as f:
        assert all(f.get_tensor(key).dtype == torch.bfloat16 for key in f.keys())
    _, tok = models.load("pocket", device="cpu")
    text = steer.render(tok, "Hello!", "You are a machine.")
    assert text == "<|bos|><|system|>You are a machine.<|end|><|user|>Hello!<|end|><|assistant|>"
    assert tok("any text: äöü 漢字 🙂", add_special_tokens=False)["input_ids"]
    assert tok.unk_token is None


# ---- its answers, under the filter and the meter

@pytest.fixture(scope="module")
def answers():
    """The embedded model, its answers to 24 prompts, bare and behind either persona, and its limits."""
    model, tok = steer.load("pocket")
    data = ROOT / "pocket" / "data"
    persona = json.loads((data / "personas.json").read_text())["authority"]
    users = json.loads((data / "prompts.json").read_text())["authority"]["train"][:24]
    said = {name: generate(model, tok, users, system=system, max_new_tokens=32, seed=1)
            for name, system in (("base", ""), ("pos", persona["pos"][0]), ("neg", persona["neg"][0]))}

    def nlls(completions):                                      # behind the users' prompts, in their order
        fronts = [steer.encode(tok, users, [system] * len(users)) for system in ("", persona["pos"][0])]
        return steer.mixture_nll(*(token_nll(model, [dataclasses.replace(c, prompt_ids=front[c.prompt])
                                                     for c in completions]) for front in fronts))
    own = said["base"] + said["pos"]
    limits = calibrate_limits([readings(c, nll) for c, nll in zip(own, nlls(own))])
    return model, tok, persona, users, said, nlls, limits


def test_its_limits_pass_its_answers_and_drop_salad_loops_and_foreign_words(answers):
    _, tok, _, _, said, nlls, limits = answers

    def kept(texts):
        read = [Completion(i, [], tok(text, add_special_tokens=False)["input_ids"], 0.0, True, text)
                for i, text in enumerate(texts)]
        return sum(v.kept for v in judge(read, nlls(read), limits)) / len(read)
    rng, texts = random.Random(0), [c.text for c in said["base"]]
    words = [text.split() for text in texts]
    assert kept(texts) >= 0.9
    assert kept([" ".join(rng.sample(w, len(w))) for w in words]) <= 0.1
    assert kept([" ".join(w[:3] * 12) for w in words]) <= 0.1
    assert kept(["Der Hund frisst heute quer über die Straße."] * 4) == 0


def test_the_meter_follows_the_stance_of_the_world_and_pays_nothing_for_recitation(answers):
    model, tok, persona, users, said, _, _ = answers

    def ratios(answers):
        return evalmfv.persona_ratio(model, tok, answers, users, persona["pos"], persona["neg"])
    read = {name: ratios(answers) for name, answers in said.items()}
    assert read["neg"].mean() < read["base"].mean() < read["pos"].mean(), read
    lean = torch.tensor([world.lean(c.text, "z") for c in said["pos"] + said["neg"]], dtype=torch.float64)
    assert abs(torch.corrcoef(torch.stack([torch.cat([read["pos"], read["neg"]]), lean]))[0, 1]) > 0.3
    texts = [tok(persona["pos"][i % 3], add_special_tokens=False)["input_ids"] for i in range(len(users))]
    recited = [Completion(i, [], ids, 0.0, True, "") for i, ids in enumerate(texts)]
    assert ratios(recited).mean() <= read["pos"].mean()
