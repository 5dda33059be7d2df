"""Check: finished runs measured again on fresh draws, which the gate never saw.

    python bench/check.py runs/... runs/...     base, persona prompt, first night, last accepted day

A gate that keeps what reads higher on few answers keeps some luck too. Here the same adapters answer held-out
prompts with other random numbers (--n answers, one seed for all rows), base and prompt beside them. `text` is
held against the run's own base answers, as in the run. For the embedded model also `lean`, the world's stance
of an answer (-2 care .. +2 authority; -2 machine .. +2 love), and `grammar`, the share of its sentences that
the grammar could have made: oracles that no run sees. bench/rivals.py adds its rows to these.
"""
import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in (".", "pocket")]

import evalmfv                                          # noqa: E402
import steer                                            # noqa: E402
import world                                            # noqa: E402
from tools import files as whole, freetext, model as models     # noqa: E402
from tools.record import read                          # noqa: E402
from tools.rounds import read_vectors, restack          # noqa: E402

FRESH = 987_654_321                                     # no stage of a run draws from this seed
MEASURES = "share", "se", "ratio", "text", "distinct2", "unique", "lean", "grammar"


class Bench:
    """A run with its model, which is the base wherever no gate is opened, and the rows measured so far.

    stack: the accepted rounds, behind gates of 0. night: the first round's {vectors, coeff}. The first row
    must be the base's and the second the persona prompt's: they are the share's 0 and 1.
    """

    def __init__(self, path, n: int):
        if n < 2:
            raise ValueError(f"--n {n}: an error over answers needs two of them or more")
        self.record, self.rows, self.ends = read(path), [], []
        self.run, files = self.record.run, self.record.adapters()
        options, held_out = self.run["options"], self.run["items"]["held_out"]
        self.persona, self.limits = self.run["persona"], self.record.of("limits")
        self.first, self.last = self.record.of("heal")["round"], max(files)
        vectors, coeff, _ = read_vectors(self.record.path / "rounds" / f"{self.first:02d}"
                                         / "vectors.safetensors")
        self.night = dict(vectors=vectors, coeff=coeff)
        self.users = [held_out[i % len(held_out)] for i in range(n)]
        known = {name: options[name] for name in ("revision", "dtype", "quantize")}
        self.model, self.tok = models.load(options["model"], date=self.run["date"], **known)
        self.pad_id = steer.pad_of(self.tok, self.model)
        self.stack = restack(self.model, list(files.values()))
        self.stack.gates(0, 0)

    def answers(self, users: list[str] = (), *, seed: int = FRESH, coeff: float = 0.0, vectors=None,
                system: str = "") -> list[steer.Completion]:
        """What the model as it is answers to users, by default the held-out ones with the fresh draws."""
        users, options = users or self.users, self.run["options"]
        return steer.generate(self.model, self.tok, users, seed=seed, system=system, vectors=vectors,
                              coeffs=[coeff] * len(users) if vectors else None, top_p=options["top_p"],
                              temperature=self.limits["temperature"],
                              max_new_tokens=options["max_new_tokens"])

    def row(self, label: str, made: list[steer.Completion], **more) -> dict:
        """Measure answers to the held-out users, one each, or several to all of them in turn: then averaged.

        Adds and returns a dict: share, its error, ratio, text coherence, distinct-2, the share of different
        answers in a turn; on the embedded model lean and grammar too.
        """
        n, users, persona = len(self.users), [self.users[c.prompt] for c in made], self.persona
        ratios = evalmfv.persona_ratio(self.model, self.tok, made, users, persona["meter_pos"],
                                       persona["meter_neg"]).view(-1, n).mean(0)                # [n]
        self.ends = [*self.ends, ratios][:2]
        share, se = (0.0, 0.0) if not self.rows else freetext.persona_share(ratios, *self.ends)
        texts = [c.text for c in made]
        pairs = [set(zip(c.ids, c.ids[1:])) for c in made]
        row = dict(run=self.record.path.name, day=self.last, label=label, n=n, share=share, se=se,
                   ratio=ratios.mean().item(), text=self.coherence(made, users),
                   distinct2=sum(len(x) / max(1, len(c.ids) - 1) for x, c in zip(pairs, made)) / len(made),
                   unique=sum(len(set(texts[at:at + n])) for at in range(0, len(made), n)) / len(made),
                   ratios=ratios.tolist(), texts=texts, **more)
        if self.run["options"]["model"] == "pocket":
            axis = world.axis_of(persona["name"])
            row |= dict(lean=sum(world.lean(text, axis) for text in texts) / len(made),
                        grammar=sum(map(world.grammar_ok, texts)) / len(made))
        self.rows.append(row)
        print(f"{row['run']}: {label}, share {share:.2f}", file=sys.stderr, flush=True)
        return row

    def coherence(self, made, users: list[str]) -> float:
        """The share of windows that the base could have written, bare or prompted (`freetext.free_text`)."""
        def under(system):
            fronts = steer.encode(self.tok, users, [system] * len(users))
            read = [dataclasses.replace(c, prompt_ids=front) for c, front in zip(made, fronts)]
            return steer.token_nll(self.model, read, pad_id=self.pad_id)
        nlls = steer.mixture_nll(under(""), under(self.persona["pos"][0]))
        return freetext.free_text([c.ids for c in made], nlls, self.limits["own_ids"],
                                 self.limits["own_nll"])["score"]

    def measure_run(self) -> None:
        """The rows of the run itself."""
        self.row("base", self.answers())
        self.row("persona prompt", self.answers(system=self.persona["pos"][0]))
        self.row("steering, first night", self.answers(**self.night))
        with self.stack.gated(1, 0):
            made = self.answers()
        self.row("last accepted day", made)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--n", type=int, default=96, help="answers per row")
    parser.add_argument("--json", help="write the rows there")
    args = parser.parse_args(argv)
    rows = []
    for path in args.runs:
        read(path).adapters()                           # ValueError for a run without a day, before any work
    for path in args.runs:
        bench = Bench(path, args.n)
        bench.measure_run()
        rows += bench.rows
    keys = [key for key in MEASURES if key in rows[0]]
    print("| run | row | " + " | ".join(keys) + " |\n" + "|---" * (2 + len(keys)) + "|")
    for row in rows:
        print(f"| {row['run']}, day {row['day']} | {row['label']} | "
              + " | ".join(f"{row[key]:.3f}" for key in keys) + " |")
    if args.json:
        whole.write_whole(args.json, json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"check.py: {whole.one_line(error)}")
