"""Check: finished runs measured again on fresh draws, which the gate never saw.

    python bench/check.py runs/... runs/...     base, persona prompt, first night, last accepted day

A gate that keeps what reads higher on 48 answers keeps some luck too. Here the same adapters answer held-out
prompts with other random numbers (--n answers, one seed for all rows), base and prompt beside them. For the
embedded model also `lean`, the world's stance of an answer (-2 care .. +2 authority; -2 machine .. +2 love),
and `grammar`, the share of its sentences that the grammar could have made: oracles that no run sees.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in (".", "pocket")]

import evalmfv                                          # noqa: E402
import lora                                             # noqa: E402
import steer                                            # noqa: E402
import world                                            # noqa: E402
from tools import files as whole, model as models           # noqa: E402
from tools.record import read                               # noqa: E402
from tools.rounds import restack                            # noqa: E402
from tools.rounds import read_vectors                   # noqa: E402

FRESH = 987_654_321                                     # no stage of a run draws from this seed


def answers(model, tok, record, users: list[str], **how) -> list[steer.Completion]:
    options = record.run["options"]
    return steer.generate(model, tok, users, seed=FRESH, top_p=options["top_p"],
                          temperature=record.of("limits")["temperature"],
                          max_new_tokens=options["max_new_tokens"], **how)


def check(path: str, n: int) -> list[dict]:
    """A dict per row: share, its error, ratio, distinct-2; on the embedded model lean and grammar too."""
    record = read(path)
    run, persona = record.run, record.run["persona"]
    model, tok = models.load(run["options"]["model"], revision=run["options"]["revision"], date=run["date"])
    files = record.adapters()
    stack = restack(model, list(files.values())) if files else lora.attach(model, r=1, alpha=1, layers=[0])
    first = min(int(p.name) for p in (record.path / "rounds").iterdir())
    night, coeff, _ = read_vectors(record.path / "rounds" / f"{first:02d}" / "vectors.safetensors")
    rows = {"base": (0, {}), "persona prompt": (0, dict(system=persona["pos"][0])),
            f"steering, night {first}": (0, dict(vectors=night, coeffs=[coeff] * n))}
    if files:
        rows[f"day {max(files)}"] = (1, {})
    asked, found, base, prompted = run["items"]["held_out"], [], None, None
    users = [asked[i % len(asked)] for i in range(n)]
    for label, (history, how) in rows.items():
        with stack.gated(history, 0):
            made = answers(model, tok, record, users, **how)
        with stack.gated(0, 0):
            ratios = evalmfv.persona_ratio(model, tok, made, users, persona["meter_pos"],
                                           persona["meter_neg"])                        # [n]
        base, prompted = (ratios, None) if base is None else (base, ratios if prompted is None else prompted)
        share, se = (0.0, 0.0) if ratios is base else evalmfv.persona_share(ratios, base, prompted)
        texts = [c.text for c in made]
        row = dict(run=record.path.name, label=label, n=n, share=share, se=se, ratio=ratios.mean().item(),
                   distinct2=sum(len(set(zip(c.ids, c.ids[1:]))) / max(1, len(c.ids) - 1) for c in made) / n,
                   unique=len(set(texts)) / n, texts=texts)
        if run["options"]["model"] == "pocket":
            axis = "y" if persona["name"] == "love" else "z"
            row |= dict(lean=sum(world.lean(text, axis) for text in texts) / n,
                        grammar=sum(map(world.grammar_ok, texts)) / n)
        found.append(row)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--n", type=int, default=96, help="answers per row")
    parser.add_argument("--json", help="write the rows there")
    args = parser.parse_args()
    rows = [row for path in args.runs for row in check(path, args.n)]
    names = ("share", "se", "ratio", "distinct2", "unique", "lean", "grammar")
    keys = [name for name in names if name in rows[0]]
    print("| run | row | " + " | ".join(keys) + " |\n" + "|---" * (2 + len(keys)) + "|")
    for row in rows:
        print(f"| {row['run']} | {row['label']} | " + " | ".join(f"{row[key]:.3f}" for key in keys) + " |")
    if args.json:
        whole.write_whole(args.json, json.dumps(rows, indent=1).encode())
