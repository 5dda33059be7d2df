"""Filter: how well its rules tell broken answers from intact ones, by labels that no language model gave.

    python bench/filter.py pocket --seed 1              labels: the grammar of the embedded model's world
    python bench/filter.py FOLDER --temperature 0.7     labels by construction: loops, shuffles, foreign words

Calibrated on training prompts, read on held-out prompts and other draws. An answer to another prompt is made
too and counted by itself: it is fluent, and the filter is not meant to see it.
"""
import argparse
import dataclasses
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "pocket")]

import steer                                                    # noqa: E402
import world                                                    # noqa: E402
from tools import inputs, model as models, search               # noqa: E402

FOREIGN = ["el gato duerme en la cocina", "wir gehen heute nicht nach Hause", "je ne sais pas pourquoi",
           "vormital gresno pladeke", "kolibra tustek manorim", "das ist mir egal"]
MILD, TOO_MUCH = 1.0, 8.0   # doses up to which an answer counts as intact, and from which as broken


def damaged(kind: str, c: steer.Completion, others: list, tok, rng) -> steer.Completion:
    """A copy of an intact answer that is broken by construction: kind is loop, shuffle, foreign or other."""
    ids, words = [t for t in c.ids if t not in tok.all_special_ids], c.text.split()
    if kind == "loop":                                      # 1 to 6 tokens, said again for 10 to 20 tokens
        n, at = rng.randint(1, 6), rng.randint(8, len(ids) - 6)
        ids = ids[:at] + (ids[at - n:at] * 20)[:rng.randint(10, 20) + n] + ids[at:]
    elif kind == "other":
        ids = rng.choice([x for x in others if x.prompt != c.prompt]).ids
    else:
        if kind == "shuffle":                                   # 10 words, 14 words or all
            n = min(len(words), rng.choice([10, 14, 100]))
            at = rng.randint(0, len(words) - n)
            words[at:at + n] = rng.sample(words[at:at + n], n)
        else:
            words.insert(rng.randint(3, len(words)), rng.choice(FOREIGN))
        ids = tok(" ".join(words), add_special_tokens=False)["input_ids"]
    return dataclasses.replace(c, ids=ids[:64], text=tok.decode(ids[:64], skip_special_tokens=True))


def is_intact(kind: str, c: steer.Completion, is_pocket: bool) -> bool | None:
    """None is no label: an answer to another prompt, one that was cut, a dose neither mild nor too much."""
    if is_pocket:                                               # what the budget cut off has no verdict
        text = c.text if c.finished else c.text.rpartition(". ")[0] + "."
        return None if text == "." else False if world.grammar_ok(text) < 1 else c.finished or None
    if kind in ("loop", "shuffle", "foreign"):
        return False
    return None if kind == "other" else True if c.coeff <= MILD else False if c.coeff >= TOO_MUCH else None


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="`pocket` or the folder of a chat model")
    parser.add_argument("--persona", default="love")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--n", type=int, default=32, help="answers of each kind")
    parser.add_argument("--new", type=int, default=48, help="longest answer (tokens)")
    parser.add_argument("--doses", type=float, nargs="+", default=[0.5, 1.0, 2.0, 8.0])
    args = parser.parse_args(argv)
    is_pocket, rng = args.model == "pocket", random.Random(args.seed)
    model, tok = models.load(args.model)
    given = inputs.load(args.persona, model=args.model)
    persona, contexts = given["persona"], given["contexts"][:48]
    layers = search.band(len(steer.blocks(model)), *((0.76, 0.8) if is_pocket else (0.5, 0.6)))
    vectors = steer.fit_vectors(model, tok, persona["pos"], persona["neg"], contexts, layers)

    def answers(side, seed, system="", dose=0.0):
        asked = [given[side][i % len(given[side])] for i in range(args.n)]
        return steer.generate(model, tok, asked, system=system, vectors=vectors, coeffs=[dose] * args.n,
                              seed=1000 * args.seed + seed, temperature=args.temperature,
                              max_new_tokens=args.new)

    def yardstick(side, made):
        asked, nlls = [given[side][c.prompt % len(given[side])] for c in made], []
        for system in ("", persona["pos"][0]):
            fronts = steer.encode(tok, asked, [system] * len(asked))
            behind = [dataclasses.replace(c, prompt_ids=front) for c, front in zip(made, fronts)]
            nlls.append(steer.token_nll(model, behind, pad_id=steer.pad_of(tok, model)))
        return steer.mixture_nll(*nlls)

    own = answers("train", 0) + answers("train", 1, system=persona["pos"][0])
    limits = search.calibrate_limits([steer.readings(*x) for x in zip(own, yardstick("train", own))])
    print(f"{limits} from {len(own)} answers of the base, bare and prompted\n")
    rows = [("base", c) for c in answers("held_out", 2)]
    rows += [("prompted", c) for c in answers("held_out", 3, system=persona["pos"][0])]
    for i, dose in enumerate(args.doses):
        rows += [(f"steered {dose:g}", c) for c in answers("held_out", 4 + i, dose=dose)]
    if not is_pocket:
        sane = [c for _, c in rows if c.coeff <= MILD and len(c.ids) >= 20 and len(c.text.split()) > 3]
        rows += [(kind, damaged(kind, rng.choice(sane), sane, tok, rng))
                 for kind in ("loop", "shuffle", "foreign", "other") for _ in range(args.n // 2)]
    said = [c for _, c in rows]
    kept = [v.kept for v in steer.judge(said, yardstick("held_out", said), limits)]
    labels = [is_intact(kind, c, is_pocket) for kind, c in rows]
    print("kind             n   kept   broken by label")
    for kind in dict.fromkeys(kind for kind, _ in rows):
        at = [i for i, row in enumerate(rows) if row[0] == kind]
        print(f"{kind:<12} {len(at):5}  {sum(kept[i] for i in at) / len(at):5.0%}   "
              f"{sum(labels[i] is False for i in at)}")
    good, bad = ([k for k, label in zip(kept, labels) if label is x] for x in (True, False))
    print(f"\nbroken and dropped {bad.count(False)} of {len(bad)}, intact and kept {sum(good)} of "
          f"{len(good)}, broken among the kept {sum(bad) / max(1, sum(bad) + sum(good)):.1%}")


if __name__ == "__main__":
    main()
