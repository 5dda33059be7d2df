"""Tests of tools/student.py, table.py and size.py: seeds, the worst answer, the size of a round, and what a
run says of its round and at its end."""
import pytest
import safetensors.torch
import torch
from common import lora_case, noise
from lora import attach
from steer import encode, steered
from tools import folder, model as models, size, table
from tools.files import read_tensors
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


def test_the_worst_answer_is_what_a_full_forward_finds(finished):
    one, (model, tok) = {e["stage"]: e for e in finished.events}, models.load("pocket")
    worst, kept = one["heal"]["worst"], [c for c in one["made"]["completions"] if c["verdict"]["kept"]]
    stack = attach(model, r=8, alpha=16.0, layers=one["layers"]["lora"])
    stack.load_tensors(read_tensors(finished.adapters()[0])[0])

    def logp(c, vectors=None):
        front = encode(tok, [finished.run["items"]["train"][c["prompt"]]], [""])[0]
        with torch.no_grad(), steered(model, vectors or {}, one["dose"]["coeff"]):
            logits = model(torch.tensor([front + c["ids"]])).logits                                # [1, T, V]
        return logits[0, len(front) - 1:-1].double().log_softmax(-1)                                # [n, V]

    def kl(c, p):
        with stack.gated(0, 0):
            return (p.exp() * (p - logp(c))).sum(-1)                                                # [n]
    by_hand = [kl(c, logp(c)) for c in kept]
    i = max(range(len(kept)), key=lambda i: by_hand[i].square().mean())
    assert worst["day"] == pytest.approx(by_hand[i].tolist(), rel=1e-2, abs=1e-5)
    assert worst["prompt"] == kept[i]["prompt"] and "".join(worst["tokens"]) == tok.decode(kept[i]["ids"])
    assert max(map(abs, worst["before"])) < 1e-6                # round 0: the base
    layers = safetensors.torch.load_file(finished.path / "rounds" / "00" / "vectors.safetensors")
    with stack.gated(0, 0):
        night = kl(kept[i], logp(kept[i], {int(k.removeprefix("layer.")): v for k, v in layers.items()}))
    assert worst["night"] == pytest.approx(night.tolist(), rel=1e-2, abs=1e-5)


def test_the_spectral_norm_and_its_gradient_equal_those_of_matrix_norm():
    _, stack = lora_case()
    state, at_zero = torch.get_rng_state(), size.spectral(stack)                # B = 0
    at_zero.backward()
    assert at_zero.item() == 0 and all(p.grad.eq(0).all() for p in stack.parameters())
    assert torch.equal(torch.get_rng_state(), state)                        # draws no random numbers
    noise(stack, 0)
    for p in stack.parameters():
        p.grad = None
    sigma = size.spectral(stack)
    sigma.backward()
    pairs = [(l.A.detach().double().requires_grad_(), l.B.detach().double().requires_grad_(), l)
             for l in stack.layers.values()]
    expected = sum(torch.linalg.matrix_norm(l.scale * B @ A, ord=2) for A, B, l in pairs) / len(pairs)
    expected.backward()
    assert abs(sigma.item() - expected.item()) < 1e-5 * expected.item()
    for A, B, l in pairs:
        assert torch.allclose(l.A.grad.double(), A.grad, rtol=1e-4, atol=1e-5)  # float32 against float64
        assert torch.allclose(l.B.grad.double(), B.grad, rtol=1e-4, atol=1e-5)
