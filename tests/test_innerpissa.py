"""Tests of innerpissa/: the adapter's algebra, the loss, the extraction methods, the scores. CPU, seconds."""
import json
import math
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import lora
import steer
from innerpissa import contrast, dilemmas, dose, extract, rivals, spin
from innerpissa.pairs import Pair, look

FORMS = [(rotate, scale) for rotate in ("V", "UV", "none") for scale in ("add", "mult", "none")
         if (rotate, scale) != ("none", "none")] + [("free", "none")]


@pytest.fixture(scope="module")
def tok():
    return common.tiny_tokenizer(["Yes", "No"])


def one_spin(rotate="V", scale="add", r=6, size=1.0, dtype=torch.float64, d_in=12, d_out=10):
    """A trained-looking Spin on a random Linear, in double precision."""
    torch.manual_seed(0)
    linear = nn.Linear(d_in, d_out)
    cfg = spin.SpinConfig(r=r, rotate=rotate, scale=scale)
    made = spin.Spin(linear, cfg, torch.Generator().manual_seed(1))
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1 * size
    return linear.to(dtype), made.to(dtype)


def spun(model, tok, **how):
    """A Dialed on a tiny model, moved away from its start."""
    made = spin.spin(model, spin.SpinConfig(r=8, **how), layers=[1, 2], targets=["o_proj", "down_proj"])
    for p in made.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return made


def some_pairs(n=12):
    rng = torch.Generator().manual_seed(0)
    def ids(k):
        return torch.randint(6, 262, (k,), generator=rng).tolist()
    shared = [ids(5) for _ in range(n)]
    return [Pair([1, 40, 41, *x, *x[:4]], [1, 90, 91, *x, *x[:4]], 4) for x in shared]


# ---- spin ------------------------------------------------------------------------------------------------

def test_R_is_a_rotation_and_the_other_sign_is_its_transpose():
    P = torch.randn(7, 7, dtype=torch.float64)
    R = spin.cayley(P, torch.tensor([1.0, -1.0, 0.0, 0.3, -0.3], dtype=torch.float64))
    eye = torch.eye(7, dtype=torch.float64)
    assert (R.mT @ R - eye).abs().max() < 1e-12
    assert (R[1] - R[0].T).abs().max() < 1e-12 and (R[4] - R[3].T).abs().max() < 1e-12
    assert torch.equal(R[2], eye)


def test_odd_and_even_add_up_and_are_the_closed_form():
    """D E - S O and S (E - I) - D O, with X = A / 2, E = (I + X^2)(I - X^2)^-1, O = 2 X (I - X^2)^-1."""
    _, one = one_spin()
    c = torch.tensor([1.0, -1.0], dtype=torch.float64)
    M = one.core(c).detach()
    odd, even = spin.odd_even(*M)
    assert torch.equal(odd + even, M[0]) or (odd + even - M[0]).abs().max() < 1e-15
    P = one.P[0].detach()
    X = spin.LIMIT * torch.tanh((P - P.T) / spin.LIMIT) / 2
    eye, S, D = torch.eye(6, dtype=torch.float64), torch.diag(one.S), torch.diag(one.gain.detach())
    inverse = torch.linalg.inv(eye - X @ X)
    E, O = (eye + X @ X) @ inverse, 2 * X @ inverse
    assert (odd - (D @ E - S @ O)).abs().max() < 1e-12
    assert (even - (S @ (E - eye) - D @ O)).abs().max() < 1e-12


def test_free_K_is_exactly_odd_and_a_rotation_is_not():
    for rotate, is_odd in (("free", True), ("V", False)):
        _, one = one_spin(rotate, "none")
        even = spin.odd_even(*one.core(torch.tensor([1.0, -1.0], dtype=torch.float64)))[1]
        assert (even.norm().item() == 0) == is_odd


@pytest.mark.parametrize("rotate, scale", FORMS)
def test_the_lora_form_equals_the_forward_at_a_fixed_dial(rotate, scale):
    linear, one = one_spin(rotate, scale)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    for c in (1.0, -0.7):
        A, B = one.as_lora(c)
        y = one(x, linear(x), torch.tensor([c], dtype=torch.float64))
        assert (y - F.linear(x, linear.weight + B @ A, linear.bias)).abs().max() < 1e-12


@pytest.mark.parametrize("rotate, scale", FORMS)
def test_gradients_are_those_of_finite_differences(rotate, scale):
    linear, one = one_spin(rotate, scale, r=3)
    x, c = torch.randn(2, 2, 12, dtype=torch.float64), torch.tensor([0.8, -1.0], dtype=torch.float64)
    params = list(one.parameters())
    def f(*values):
        named = dict(zip(dict(one.named_parameters()), values))
        return torch.func.functional_call(one, named, (x, linear(x), c))
    at = tuple(p.detach().requires_grad_() for p in params)
    assert torch.autograd.gradcheck(f, at, eps=1e-6, atol=1e-6)


def test_an_untrained_adapter_has_a_gradient_and_the_signs_do_not_coincide():
    linear, one = one_spin(size=0.01, dtype=torch.float32)
    x = torch.randn(1, 3, 12)
    y = one(x.expand(2, -1, -1), linear(x).expand(2, -1, -1), torch.tensor([1.0, -1.0]))
    (y[0] - y[1]).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in one.parameters())


def test_at_zero_the_model_is_the_base_bit_for_bit_and_rows_have_their_own_dial(tok):
    model = common.tiny_model(tok)
    ids = torch.arange(6, 30).view(3, 8)
    base = model(input_ids=ids).logits
    made = spun(model, tok)
    assert torch.equal(model(input_ids=ids).logits, base)
    with made.dialed(torch.tensor([0.0, 1.0, -1.0])):
        mixed = model(input_ids=ids).logits
    assert torch.equal(mixed[0], base[0])
    for row, c in ((1, 1.0), (2, -1.0)):
        with made.dialed(c):
            alone = model(input_ids=ids).logits[row]
        assert (alone - mixed[row]).abs().max() < 1e-4 < (alone - base[row]).abs().max()
    with pytest.raises(ValueError, match="2 doses for a batch of 3"), made.dialed(torch.ones(2)):
        model(input_ids=ids)
    made.remove()
    assert torch.equal(model(input_ids=ids).logits, base)


def test_flip_is_the_negative_of_every_parameter(tok):
    _, one = one_spin()
    with torch.no_grad():
        minus = one.core(torch.tensor([-1.0], dtype=torch.float64))
        for p in one.parameters():
            p.neg_()
        assert (one.core(torch.tensor([1.0], dtype=torch.float64)) - minus).abs().max() < 1e-14


def test_a_packed_base_is_read_by_asking_and_stays_as_it_was():
    class Packed(nn.Linear):                 # 4-bit-like: integers and a scale, no float weight
        def __init__(self, d_in, d_out):
            super().__init__(d_in, d_out)
            q = torch.randint(-8, 8, (d_out, d_in), dtype=torch.int8)
            self.weight = nn.Parameter(q, requires_grad=False)
        def forward(self, x):
            return F.linear(x, self.weight.to(x.dtype) * 0.1, self.bias)
    linear = Packed(12, 10)
    before = linear.weight.clone()
    assert (spin.weight_of(linear) - before.float() * 0.1).abs().max() < 1e-6
    one = spin.Spin(linear, spin.SpinConfig(r=4), torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 12)
    one(x, linear(x), torch.tensor([1.0])).sum().backward()
    assert torch.equal(linear.weight, before) and linear.bias.grad is not None


def test_as_a_round_of_lora_it_gives_the_same_logits(tok):
    ids = torch.arange(6, 22).view(2, 8)
    model = common.tiny_model(tok)
    made = spun(model, tok)
    with made.dialed(0.6):
        want = model(input_ids=ids).logits
    tensors = made.tensors(0.6)
    made.remove()
    stack = lora.attach(model, r=1, alpha=1, layers=[1, 2], targets=["o_proj", "down_proj"])
    stack.load_tensors(tensors)
    assert (model(input_ids=ids).logits - want).abs().max() < 1e-3 * want.abs().max()


def test_directions_are_half_of_one_persona_and_half_of_the_other():
    U, S = torch.eye(6), torch.ones(6)
    pos, neg = torch.randn(50, 6), torch.randn(50, 6)
    pos[:, 4] *= 10
    neg[:, 5] *= 10
    assert spin.pick(U, S, pos, neg, 2, "states").tolist() == [4, 5]
    assert spin.pick(U, S, pos, neg, 2, "top").tolist() == [0, 1]


@pytest.mark.parametrize("how, words", [
    (dict(r=33), "more than 32, the smallest width"), (dict(targets=["nowhere"]), "match no nn.Linear"),
    (dict(rotate="none", scale="none"), "nothing is left to train")])
def test_bad_adapters_are_one_sentence(tok, how, words):
    model, targets = common.tiny_model(tok), how.pop("targets", ["o_proj"])
    with pytest.raises(ValueError, match=words):
        spin.spin(model, spin.SpinConfig(**dict(r=8) | how), layers=[1], targets=targets)


# ---- contrast --------------------------------------------------------------------------------------------

def test_the_log_probs_of_a_padded_batch_are_those_of_each_row_alone(tok):
    model = common.tiny_model(tok)
    rows, n = [[1, 40, 50, 60, 70], [1, 41, 51, 61, 71, 81, 91]], [2, 3]
    seen = look(model, rows, n, 2, 2, 0)
    for i, (row, k) in enumerate(zip(rows, n)):
        logp = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        want = torch.stack([logp[j - 1, row[j]] for j in range(len(row) - k, len(row))]).mean()
        assert abs(seen.mean_logp()[i] - want) < 1e-4


def test_the_slot_is_the_token_before_the_answer_in_each_row(tok):
    model = common.tiny_model(tok)
    rows, n = [[1, 40, 50, 60, 70], [1, 41, 51, 61, 71, 81, 91]], [2, 3]
    seen = look(model, rows, n, 2, 1, 0, "slot")
    for i, (row, k) in enumerate(zip(rows, n)):
        alone = look(model, [row[:len(row) - k]], [1], 2, 1, 0, "end")
        assert (seen.h[i] - alone.h[0]).abs().max() < 1e-4


@pytest.mark.parametrize("how", [dict(), dict(separation="sigmoid", barrier="logp"),
                                 dict(axis="pca", space="activation", barrier="none"),
                                 dict(against="pair", at="end", n_read=3)])
def test_training_separates_on_held_out_pairs_and_leaves_the_base(tok, how):
    model = common.tiny_model(tok)
    weights = [p.clone() for p in model.parameters()]
    made = spin.spin(model, spin.SpinConfig(r=8), layers=[1, 2], targets=["o_proj", "down_proj"])
    cfg = contrast.ContrastConfig(epochs=6, batch=8, lr=1e-2, **how)
    record = contrast.contrast(made, some_pairs(24), cfg, r=8)
    assert record["held"]["plus"] > record["held"]["minus"], record["held"]     # its barrier is tight
    assert 0 <= record["symmetry"] <= 1 and not record["skipped"]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights))


def test_the_barrier_is_zero_at_the_base_and_the_sign_is_settled(tok):
    model = common.tiny_model(tok)
    made = spun(model, tok)
    cfg = contrast.ContrastConfig(barrier="logp", against="pair")
    loss = contrast.Loss(made, some_pairs(), cfg, r=8)
    with made.dialed(0.0):
        seen = loss.look(some_pairs())
    assert loss.coherence(seen, seen).item() == 0 and abs(loss.s(seen, seen).mean() - 1) < 1e-4
    first = loss.held(some_pairs())
    made.flip()
    turned = loss.held(some_pairs())
    assert abs(first["plus"] - turned["minus"]) < 1e-4 and abs(first["minus"] - turned["plus"]) < 1e-4


@pytest.mark.parametrize("change, words", [
    (lambda p: p._replace(neg=p.neg[:-1] + [7]), "end in other tokens"),
    (lambda p: p._replace(neg=p.pos), "the same"),
    (lambda p: p._replace(n=2), "an answer of 2 tokens")])
def test_bad_pairs_are_one_sentence_before_any_forward(tok, change, words):
    model = common.tiny_model(tok)
    made = spun(model, tok)
    pairs = [change(p) for p in some_pairs()]
    model.forward = None
    with pytest.raises(ValueError, match=words):
        contrast.contrast(made, pairs, contrast.ContrastConfig(n_read=3))


def test_a_difference_of_zero_and_a_loss_that_is_not_finite_are_one_sentence(tok):
    model = common.tiny_model(tok)
    made = spun(model, tok)
    pairs = some_pairs()
    both_ways = pairs + [Pair(p.neg, p.pos, p.n) for p in pairs]               # the mean is zero
    with pytest.raises(ValueError, match="zero or not finite"):
        contrast.Loss(made, both_ways, contrast.ContrastConfig(), r=8)
    bad = dict(loss=lambda batch: dict(x=made.parameters()[0].sum() * math.nan))
    with pytest.raises(RuntimeError, match="no finite loss"):
        contrast.contrast(made, pairs, contrast.ContrastConfig(batch=2), r=8, **bad)


# ---- rivals ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", rivals.RIVALS)
def test_each_rival_trains_by_the_same_loss_and_is_the_base_at_zero(tok, kind):
    model = common.tiny_model(tok)
    ids = torch.arange(6, 22).view(2, 8)
    base = model(input_ids=ids).logits
    made = rivals.rival(model, kind, r=4, layers=[1, 2], targets=["o_proj", "down_proj"])
    cfg = contrast.ContrastConfig(epochs=4, lr=1e-2, against="pair", at="end", n_read=3, barrier="logp")
    record = contrast.contrast(made, some_pairs(16), cfg, r=8)
    assert record["held"]["plus"] > record["held"]["minus"], record["held"]
    assert torch.equal(model(input_ids=ids).logits, base)
    ratio = rivals.parity(made)
    assert ratio > 1e-3 if kind in ("IA3", "ROAD") else ratio < 1e-5, ratio
    with pytest.raises(ValueError, match="expected one of"):
        rivals.rival(model, "BitFit", r=4, layers=[1])


def test_an_adapter_from_elsewhere_is_what_it_was_at_1_and_its_negative_at_minus_1(tok):
    model, ids = common.tiny_model(tok), torch.arange(6, 22).view(2, 8)
    stack = lora.attach(model, r=3, alpha=6, layers=[1, 2], targets=["o_proj", "down_proj"])
    for p in stack.parameters():
        p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    stack.fold()
    with torch.no_grad(), stack.gated([1.0], 0):
        want = model(input_ids=ids).logits
    with torch.no_grad(), stack.gated([-1.0], 0):
        other = model(input_ids=ids).logits
    tensors = stack.tensors([0])
    stack.remove()
    made = rivals.given(model, tensors)
    for c, logits in ((1.0, want), (-1.0, other)):
        with torch.no_grad(), made.dialed(c):
            assert (model(input_ids=ids).logits - logits).abs().max() < 1e-4 * logits.abs().max()
    assert (want - other).abs().max() > 1e-2


# ---- extract ---------------------------------------------------------------------------------------------

def test_the_damped_solve_is_the_d_by_d_one():
    G, b, w = torch.randn(5, 9), torch.randn(9), torch.rand(5)
    for weight in (None, w):
        F_ = (G.double().T * (torch.ones(5) if weight is None else w).double()) @ G.double() / 5
        want = torch.linalg.solve(F_ + 1e-2 * torch.eye(9, dtype=torch.float64), b.double())
        assert (extract.damped_solve(G, b, 1e-2, weight) - want).abs().max() < 1e-8


def test_every_method_at_every_module_gives_a_vector_as_long_as_the_mean_difference(tok):
    model, pairs = common.tiny_model(tok), some_pairs()
    for kind in extract.KINDS:
        where = extract.places(model, kind, [1])
        reading = extract.read(model, pairs, where, block=2)
        want = (reading.h[where[0]][0] - reading.h[where[0]][1]).mean(0)
        assert torch.allclose(extract.extract(reading, where[0], "mean"), want)
        for method in extract.METHODS:
            v = extract.extract(reading, where[0], method)
            assert v.isfinite().all() and abs(v.norm() / want.norm() - 1) < 1e-4, (kind, method)
    assert extract.places(model, "up", [1]) == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(ValueError, match="expected one of"):
        extract.places(model, "router", [1])
    with pytest.raises(ValueError, match="method 'magic'"):
        extract.extract(reading, where[0], "magic")
    late = extract.read(model, pairs, [3], block=1, at="end")
    with pytest.raises(ValueError, match="no gradient of the loss arrives"):    # nothing is read after it
        extract.extract(late, 3, "svd")


def test_the_gradient_of_a_batch_is_that_of_each_pair_alone(tok):
    model, pairs = common.tiny_model(tok), some_pairs(4)
    together = extract.read(model, pairs, [1], block=2)
    alone = extract.read(model, pairs[2:3], [1], block=2)
    assert (together.g[1][:, 2] - alone.g[1][:, 0]).abs().max() < 1e-3 * alone.g[1].abs().max()


def test_dual_is_the_mean_of_both_sides_and_cov_changes_it():
    """In the notes' code `dual` and `dual_cov` were one formula; here they are two."""
    g, size = torch.randn(2, 8, 5), torch.ones(2, 8)
    pos, neg, dual = (extract.fisher(g, size, 1, {side}) for side in ("pos", "neg", "dual"))
    assert torch.allclose(dual, (pos + neg) / 2)
    assert not torch.allclose(dual, extract.fisher(g, size, 1, {"dual", "cov"}))


# ---- dose ------------------------------------------------------------------------------------------------

def test_t_test_is_the_textbooks():
    for t, df, p in ((2.228, 10, 0.05), (12.706, 1, 0.05), (3.460, 29, 0.0017), (0.0, 5, 1.0)):
        assert abs(dose.t_test(t, df) - p) < 2e-4


def test_a_line_scores_its_slope_and_noise_scores_nothing():
    x, doses = dose.bend(dose.DOSES), dose.DOSES
    mass = torch.full((30, len(doses)), 0.5, dtype=torch.float64)
    items = torch.randn(30, 1, dtype=torch.float64)
    line = dose.score(items + 0.7 * x, mass, doses)
    assert abs(line.slope - 0.7) < 1e-9 and abs(line.score - 0.7) < 1e-9 and abs(line.symmetry - 1) < 1e-9
    noise = dose.score(items + torch.randn(30, len(doses), dtype=torch.float64), mass, doses)
    assert noise.p_perm > 0.01 and noise.score < 0.02
    mass[:, -1] = 0.01
    assert dose.score(items + 0.7 * x, mass, doses).valid == pytest.approx(1 - 1 / len(doses))
    with pytest.raises(RuntimeError, match="not finite"):
        dose.score(items * math.nan + x, mass, doses)


def test_the_scale_is_chosen_on_the_odd_items_alone():
    x, doses = dose.bend(dose.DOSES), dose.DOSES
    mass = torch.full((20, len(doses)), 0.5, dtype=torch.float64)
    y = x.expand(20, -1).clone()
    before = dose.held_out(y, mass, doses)[1]
    y[::2] = torch.randn(10, len(doses), dtype=torch.float64)
    assert dose.held_out(y, mass, doses)[1] == before


def test_log_odds_of_many_doses_in_one_batch_are_those_of_one_at_a_time(tok):
    model = common.tiny_model(tok)
    v = {1: torch.randn(32, generator=torch.Generator().manual_seed(0))}
    prompts, doses = ["Is it?", "A longer question, is it?"], (-1.0, 0.0, 2.0)
    y, mass = dose.log_odds(model, tok, prompts, lambda c: steer.steered(model, v, c), doses)
    yes, no = tok("Yes")["input_ids"][0], tok("No")["input_ids"][0]
    for i, prompt in enumerate(prompts):
        for j, c in enumerate(doses):
            ids = torch.tensor(steer.encode(tok, [prompt], [""]))
            with steer.steered(model, v, c):
                logp = model(input_ids=ids).logits[0, -1].log_softmax(-1)
            assert mass[i, j] >= logp[[yes, no]].exp().sum() - 1e-5
    base = dose.log_odds(model, tok, prompts, lambda c: steer.steered(model, v, c), (0.0,))
    shared = dose.log_odds(model, tok, prompts, lambda c: steer.steered(model, v, c), doses, base=base)
    assert (shared[0] - y).abs().max() < 1e-4 and (shared[1] - mass).abs().max() < 1e-4
    with pytest.raises(ValueError, match="same token"):
        dose.log_odds(model, tok, prompts, lambda c: steer.steered(model, v, c), doses,
                      options=("abc", "abd"))


# ---- dilemmas --------------------------------------------------------------------------------------------

def test_two_actions_are_two_questions_of_opposite_tags():
    a, b = dilemmas.two_actions("S.", ["go", "stay"], [["love", "care"], ["duty", "care"]])
    assert a.values == {"love": 1, "duty": -1} and b.values == {"love": -1, "duty": 1}
    with pytest.raises(ValueError, match="same values"):
        dilemmas.two_actions("S.", ["go", "stay"], [["care"], ["care"]])


def test_dailydilemmas_reads_as_our_own_rows_do(tmp_path):
    ours, theirs = tmp_path / "a.jsonl", tmp_path / "b.csv"
    row = dict(situation="S.", actions=["go", "stay"], values=[["love"], ["duty"]])
    ours.write_text(json.dumps(row) + "\n")
    theirs.write_text("dilemma_idx,dilemma_situation,action_type,action,values_aggregated\n"
                      "0,S.,to_do,go,\"['Love']\"\n0,S.,not_to_do,stay,\"['duty']\"\n")
    assert dilemmas.load_dilemmas(ours) == dilemmas.load_dilemmas(theirs)
    for text, words in (("{", "line 1: not JSON"), ('{"text": "x", "values": {"a": 2}}', "line 1"),
                        ('{"values": {}}', "line 1: KeyError"), ("", "no dilemmas")):
        ours.write_text(text)
        with pytest.raises(ValueError, match=words):
            dilemmas.load_dilemmas(ours)


def test_our_items_are_there_and_tagged():
    real = dilemmas.load_dilemmas(common.ROOT / "innerpissa" / "data" / "real.jsonl")
    pocket = dilemmas.load_dilemmas(common.ROOT / "innerpissa" / "data" / "pocket.jsonl")
    assert sum(i.kind == "dilemma" for i in real) >= 120 and len({i.text for i in real}) == len(real)
    for items in (real, pocket):
        assert {i.kind for i in items} == set(dilemmas.KINDS)
        assert sum(i.values.get("love", 0) != 0 for i in items) >= 8


def test_transfer_sees_a_vector_that_says_yes_and_the_table_lines_up(tok):
    model = common.tiny_model(tok)
    yes, no = tok("Yes")["input_ids"][0], tok("No")["input_ids"][0]
    head = model.lm_head.weight
    v = {3: (head[yes] - head[no]).detach()}
    items = [dilemmas.Item(f"Question {i}?", {"love": 1} if i % 2 else {"duty": -1}) for i in range(12)]
    items += [dilemmas.Item("Sum?", {}, ("5", "6"), "arithmetic")]
    moved = dilemmas.measure(model, tok, items, lambda c: steer.steered(model, v, c), 1.0, "love")
    assert moved.slopes["love"] > 0 > moved.slopes["duty"] and moved.p["love"] < 0.01
    text = dilemmas.table(dilemmas.COLUMNS, [dilemmas.row("v", [moved, moved], "love")])
    assert len({len(line) for line in text.split("\n")}) == 1
    with pytest.raises(ValueError, match="no item is tagged"):
        dilemmas.measure(model, tok, items, lambda c: steer.steered(model, v, c), 1.0, "courage")


# ---- the command -----------------------------------------------------------------------------------------

def test_one_command_prints_both_tables_and_its_run_folder_exports_to_the_same_logits(tmp_path, capsys):
    """The adapter at a fixed dial, reloaded by peft, is what the run folder holds."""
    peft = pytest.importorskip("peft")
    import loop
    from innerpissa import train
    from tools import files, model as models
    assert train.main(["--methods", "InnerPiSSA", "--n-seeds", "1", "--n-pairs", "16", "--epochs", "1",
                       "--c", "0.7", "--n-text", "4", "--out", str(tmp_path / "runs"),
                       "--cells", str(tmp_path / "cells"), "--figure", str(tmp_path / "figure.svg")]) == 0
    said = capsys.readouterr().out
    assert "dose response of love" in said and "transfer to" in said and said.count("| InnerPiSSA") == 3
    assert ElementTree.parse(tmp_path / "figure.svg").getroot().tag.endswith("svg")
    run = next((tmp_path / "runs").iterdir())
    tensors = files.read_tensors(run / "rounds" / "00" / "adapter.safetensors")[0]
    assert loop.main(["export", str(run), "--to", "peft"]) == 0
    ids = torch.arange(20, 40)[None]
    model, _ = models.load("pocket")
    base = model(input_ids=ids).logits
    stack = lora.attach(model, r=1, alpha=1, layers=list(range(8)),
                        targets=sorted({key.rsplit(".", 2)[0] for key in tensors}))
    stack.load_tensors(tensors)
    want = model(input_ids=ids).logits
    stack.remove()
    found = peft.PeftModel.from_pretrained(model, run / "peft")(input_ids=ids).logits
    assert (found - want).abs().max() < 1e-4 < (want - base).abs().max()


def test_cells_that_are_done_are_not_measured_again(tmp_path, capsys, monkeypatch):
    from innerpissa import methods, train
    argv = ["--methods", "random", "--n-seeds", "2", "--n-pairs", "16", "--n-text", "0", "--out", "",
            "--cells", str(tmp_path / "cells")]
    assert train.main(argv) == 0
    first = capsys.readouterr().out.split("dose response")[1]
    with open(tmp_path / "cells", "a") as out:
        out.write('\n{"key": "cut o')
    monkeypatch.setattr(methods.Bench, "cell", None)
    assert train.main(argv) == 0 and capsys.readouterr().out.split("dose response")[1] == first
    with open(tmp_path / "cells", "a") as out:
        out.write("\n[]\n")
    assert train.main(argv) == 2 and "is no cell" in capsys.readouterr().err


def test_every_ablation_changes_options_that_exist():
    from innerpissa import methods, train
    known = {name for cls in train.GROUPS for name in cls.__dataclass_fields__}
    assert all(changes.keys() <= known for changes in methods.ABLATIONS.values())


@pytest.mark.parametrize("argv, words", [
    ("--methods magic", "there are random"), ("--target courage", "no item is tagged"),
    ("--r 500", "smallest width"),
    ("--modules nowhere", "match no nn.Linear"), ("--band 0.9 0.1", "lower depth"),
    ("gpt2", "--dilemmas FILE")])
def test_bad_options_of_the_command_are_one_sentence(argv, words, capsys, tmp_path):
    from innerpissa import train
    assert train.main([*argv.split(), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not list(tmp_path.iterdir())
