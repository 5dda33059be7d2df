"""Bench of one whole round on the embedded model: the original's structure against ours, stage by stage.

    python bench/round.py                   about ten minutes on two cores
    python bench/round.py --tiny            seconds, for CI

Both sides do the same work: the same contexts, prompts, training samples, optimiser steps and probe frames,
and a search for a dose: ours is find_dose with its answers judged, theirs tries as many doses as ours
did and scores each answer. The original's structure, written by us from a description: everything one at a
time (a context, a completion, an nll, a sample, a probe frame), decoding by transformers' generate() under
the steering hook, logits of the whole sequence, the reference in every epoch. What both sides share runs once
before the clock starts: the filter's limits among it.
"""
import argparse
import dataclasses
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import evalmfv  # noqa: E402
import heal  # noqa: E402
import lora  # noqa: E402
import steer  # noqa: E402
from measure import embedded, seconds_of, table, write_json  # noqa: E402
from tools import model  # noqa: E402
from tools.search import N_PROBE, band, calibrate_limits, find_dose  # noqa: E402

DOSE = 0.487  # of the answers that both sides score and train on


class Work:
    """What a round of either kind starts from."""

    def __init__(self, tiny: bool):
        self.model, self.tok = model.load("pocket", device="cpu")
        given, self.layers, self.vectors = embedded(self.model, self.tok, 4 if tiny else 96)
        self.persona, self.train, self.contexts, self.vignettes = (
            given[key] for key in ("persona", "train", "contexts", "vignettes"))
        adapted = band(len(steer.blocks(self.model)), 0.2, 0.8)
        self.stack = lora.attach(self.model, r=8, alpha=16, layers=adapted)
        sizes = (2, 4, 8, 4) if tiny else (N_PROBE, 64, 64, 128)
        self.n_probe, self.n_make, self.n_new, self.think = sizes
        self.refine = 0 if tiny else 2
        if tiny:
            self.vignettes, self.contexts = self.vignettes[:2], self.contexts[:4]
        heal.VAL_SHARE = 0.0                                    # both sides train on every sample
        self.cfg = heal.HealConfig(lr=1e-3, tau=0.1, epochs=2 if tiny else 5)
        self.pad = steer.pad_of(self.tok, self.model)
        own = steer.generate(self.model, self.tok, self.prompts(self.n_make), max_new_tokens=self.n_new)
        self.limits = calibrate_limits(list(map(steer.readings, own, self.yardstick(own))))
        self.made = self.answers(self.n_make, DOSE)             # trained on and scored by both sides
        self.samples = [heal.Sample(c.prompt_ids + c.ids, len(c.prompt_ids), c.prompt) for c in self.made]
        self.samples = self.samples[:len(self.samples) // 4 * 4]
        self.tried = []                                         # the doses of our last search

    def prompts(self, n):
        return [self.train[i % len(self.train)] for i in range(n)]

    def answers(self, n, coeff):
        return steer.generate(self.model, self.tok, self.prompts(n), vectors=self.vectors, coeffs=[coeff] * n,
                              max_new_tokens=self.n_new)

    def reference(self):
        return self.stack.gated(0, 0)

    def users(self, completions):
        return [self.train[c.prompt % len(self.train)] for c in completions]

    def yardstick(self, completions):
        """Nats per token under the base's two prompts: two readings of every answer."""
        fronts = steer.encode(self.tok, self.users(completions), [self.persona["pos"][0]] * len(completions))
        voiced = [dataclasses.replace(c, prompt_ids=front) for c, front in zip(completions, fronts)]
        with self.reference():
            return steer.mixture_nll(*(steer.token_nll(self.model, x, pad_id=self.pad)
                                       for x in (completions, voiced)))


# ---- ours --------------------------------------------------------------------------------------------------


def extract(w):
    steer.fit_vectors(w.model, w.tok, w.persona["pos"], w.persona["neg"], w.contexts, w.layers)


def search(w):
    """The search of a round: what is tried is generated, judged and metered, and find_dose decides what is
    next."""
    w.tried.clear()

    def try_doses(doses):
        w.tried.extend(doses)
        made = steer.generate(w.model, w.tok, w.prompts(w.n_probe) * len(doses), vectors=w.vectors,
                              n_draws=w.n_probe, coeffs=[dose for dose in doses for _ in range(w.n_probe)],
                              max_new_tokens=w.n_new)
        made = [dataclasses.replace(c, prompt=c.prompt % w.n_probe) for c in made]
        kept = torch.tensor([v.kept for v in steer.judge(made, w.yardstick(made), w.limits,
                                                         patterns=w.persona["patterns"])]).double()
        with w.reference():
            ratios = evalmfv.persona_ratio(w.model, w.tok, made, w.users(made), w.persona["meter_pos"],
                                           w.persona["meter_neg"])
        ratios, kept = (x.view(-1, w.n_probe) for x in (ratios, kept))                      # [doses, n_probe]
        read = ratios.mean(1), evalmfv.standard_error(ratios.T), kept.mean(1)               # [doses] each
        return list(zip(*(x.tolist() for x in read)))
    try:
        find_dose(try_doses, min_survive=0.5)
    except RuntimeError:                # none survives, as at the sizes for CI: the work was done
        pass


def make(w):
    w.answers(w.n_make, DOSE)


def score(w):
    w.yardstick(w.made)


def train(w):
    w.stack.drop()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        heal.heal(w.model, w.stack.parameters(), w.samples, w.reference, w.cfg, pad_id=w.pad)


def probe(w):
    evalmfv.evaluate(w.model, w.tok, w.vignettes, think_tokens=w.think, batch_size=152)


# ---- the original's structure ------------------------------------------------------------------------------


@torch.no_grad()
def extract_one_by_one(w):
    from heal_original import last_states
    for context in w.contexts:
        for side in (w.persona["pos"], w.persona["neg"]):
            last_states(w.model, steer.encode(w.tok, [context], [side[0]])[0], w.layers)


@torch.no_grad()
def answers_one_by_one(w, n, coeff):
    made = []
    with steer.steered(w.model, w.vectors, coeff):
        for front in steer.encode(w.tok, w.prompts(n), [""] * n):
            ids = torch.tensor([front])                                         # [1, T]
            out = w.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0,
                                   top_p=0.95, top_k=64,
                             max_new_tokens=w.n_new, pad_token_id=w.pad)[0].tolist()
            made.append((front, out[len(front):]))
    return made


@torch.no_grad()
def scores_one_by_one(w, pairs):
    with w.reference():
        for front, answer in pairs:
            ids = torch.tensor([front + answer])                                # [1, T]
            logits = w.model(input_ids=ids).logits[0, len(front) - 1:-1]        # [n, V]
            F.cross_entropy(logits, torch.tensor(answer), reduction="none")     # [n]


def search_one_by_one(w):
    for dose in w.tried or [DOSE]:
        scores_one_by_one(w, answers_one_by_one(w, w.n_probe, dose))


def make_one_by_one(w):
    answers_one_by_one(w, w.n_make, DOSE)


def score_one_by_one(w):
    scores_one_by_one(w, [(c.prompt_ids, c.ids) for c in w.made])


def train_one_by_one(w):
    from heal_original import original_round
    w.stack.drop()
    original_round(w.model, w.stack.parameters(), w.samples, w.reference, w.cfg, tau=0.1)


def probe_one_by_one(w):
    evalmfv.evaluate(w.model, w.tok, w.vignettes, think_tokens=w.think, batch_size=1)


STAGES = {"extract": (extract_one_by_one, extract,
                      "contexts and personas share left-padded batches; only the tag's state is kept"),
          "dose search": (search_one_by_one, search,
                          "the answers of a dose are one batch; the first three doses too; the same number "
                          "of doses"),
          "generate": (make_one_by_one, make, "all completions are one batch; finished rows leave it"),
          "filter": (score_one_by_one, score, "batches of similar length, completion rows only"),
          "heal": (train_one_by_one, train,
                    "no logits, reference and lower blocks once, four samples a pass"),
          "probe": (probe_one_by_one, probe, "frames of both option orders share batches")}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="sizes for CI: correctness, not timing")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write every number here")
    args = parser.parse_args(argv)
    w = Work(args.tiny)
    seconds = {stage: {"original": [], "ours": []} for stage in STAGES}
    search(w)                                                   # the doses that theirs tries
    for _ in range(1 if args.tiny else args.repeats):
        for stage, (theirs, mine, _) in STAGES.items():  # the two sides of a stage run one after the other
            seconds[stage]["original"].append(seconds_of(lambda: theirs(w)))
            seconds[stage]["ours"].append(seconds_of(lambda: mine(w)))
    rows, totals = [], {"original": 0.0, "ours": 0.0}
    for stage, times in seconds.items():
        a, b = (sorted(times[side])[len(times[side]) // 2] for side in ("original", "ours"))
        totals["original"], totals["ours"] = totals["original"] + a, totals["ours"] + b
        rows.append({"stage": stage, "original s": f"{a:.2f}", "ours s": f"{b:.2f}", "gain": f"x{a / b:.1f}",
                     "where it comes from": STAGES[stage][2]})
    rows.append({"stage": "round", "original s": f"{totals['original']:.1f}",
                 "ours s": f"{totals['ours']:.1f}",
                 "gain": f"x{totals['original'] / totals['ours']:.1f}", "where it comes from": ""})
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(table(rows))
    if args.json:
        write_json(args.json, seconds=seconds, totals=totals)


if __name__ == "__main__":
    main()
