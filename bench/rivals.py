"""Rivals: what other methods make of one round's budget, beside a run's own rows, on the same fresh draws.

    python bench/rivals.py RUN [RUN ...] [--n 96] [--json FILE]      runs that differ by their seed

Every row answers the same held-out prompts with the same random numbers and is measured by bench/check.py. An
adapter below has the rank, blocks, epochs, learning rate and number of answers of the run's first round. Its
answers are not filtered; the run's were. In one sentence each:

    random vectors     as long as v in the same blocks at the same dose, the mean of several; and minus v
    prompt's answers   healed as a round is, on what the base says under the persona prompt
    weight steering    that adapter minus the same of the opposite prompt (Fierro and Roger, 2511.05408)
    preventative       Chen et al. (2507.21509) train on bad data with the bad vector on, so that the weights
                       need not move; here: nll on the base's own answers with -v on, which is then taken off,
                       so that the weights learn to supply +v
    KL to steering     KL(base steered by +v || student) on the base's own answers. KTS (Stickland et al.,
                       2406.15518) has the KL's two sides the other way: it teaches a steered model to stay
                       with the unsteered one
    sufficiency        Blank et al. (2606.00995): what the last accepted day added to the mean state of the
                       answers, after the last steered block, added to the base
    necessity          that day's model with this direction held, at that block, at what it is in the base:
                       the paper puts the base's value of each token there, here it is their mean; the base
                       held in the same way shows what the holding itself does
"""
import argparse
import contextlib
import dataclasses
import json
import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import check                                            # noqa: E402   finds the concept files
import torch                                            # noqa: E402
from torch import Tensor                                # noqa: E402

import heal                                             # noqa: E402
import lora                                             # noqa: E402
import steer                                            # noqa: E402
from experiment import check_apart                      # noqa: E402
from measure import table                               # noqa: E402
from tools import files, size                           # noqa: E402
from tools.record import read                           # noqa: E402
from tools.student import stage_seed                    # noqa: E402

N_RANDOM = 3                # random vectors: one alone can lie along the trait by chance
PURE = 1e3                  # nats of nll per nat of KL; Adam and the clipping take the scale out again


# ---- answers, vectors, adapters ------------------------------------------------------------------------


def lesson(bench, system: str = "") -> list[steer.Completion]:
    """As many answers of the base as the first round learned from, to train on without the system prompt."""
    train, healed = bench.run["items"]["train"], bench.record.of("heal")
    users = [train[i % len(train)] for i in range(healed["n_train"] + healed["n_val"])]
    seed = stage_seed(bench.run["options"]["seed"], bench.first, "make")
    made = bench.answers(users, seed=seed, system=system)
    bare = steer.encode(bench.tok, users, [""] * len(users))
    return [dataclasses.replace(c, prompt=i % len(train), prompt_ids=bare[i]) for i, c in enumerate(made)]


def as_long_as(vectors: dict[int, Tensor], seed: int) -> dict[int, Tensor]:
    """A random direction for each block, of the length that the vector has there."""
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for layer, v in sorted(vectors.items()):
        x = torch.randn(v.shape, generator=rng)                                         # [d]
        found[layer] = x * (v.norm() / x.norm())
    return found


def trained(bench, made: list[steer.Completion], teacher=contextlib.nullcontext, **more) -> lora.Stack:
    """One round of healing as the run's first; its gates are 0 afterwards, (1, 0) opens it.

    teacher: under which context the base is the reference. more: fields of HealConfig that are otherwise.
    """
    options, tau = bench.run["options"], bench.record.of("tau")
    same = {f.name: options[f.name] for f in dataclasses.fields(heal.HealConfig)}
    same["tau"] = tau["tau"] if tau else options["tau"] or 0.0              # no barrier, no tau
    stack = lora.attach(bench.model, r=options["r"], alpha=options["alpha"], seed=options["seed"],
                        layers=bench.record.of("layers")["lora"])

    @contextlib.contextmanager
    def reference():
        with stack.gated(0, 0), teacher():
            yield
    samples = [heal.Sample(c.prompt_ids + c.ids, len(c.prompt_ids), c.prompt) for c in made]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the barrier")    # a KL that is all of the loss fires always
        heal.heal(bench.model, stack.parameters(), samples, reference, heal.HealConfig(**same | more),
                  pad_id=bench.pad_id, seed=stage_seed(options["seed"], bench.first, "heal"),
                  spectral=(lambda: size.spectral(stack)) if same["spectral"] else None)
    stack.fold()
    stack.gates(0, 0)
    return stack


@torch.no_grad()
def mean_state(bench, made: list[steer.Completion], layer: int) -> Tensor:
    """The mean over all tokens of the answers of what a block puts out, of the model as it is: [d]."""
    rows = [c.prompt_ids + c.ids for c in made]

    def read(batch):
        caught = []                                                                     # [B, T, d]
        ids, attn, position_ids = steer.left_pad([rows[i] for i in batch], bench.pad_id,
                                                 steer.device_of(bench.model))
        with steer.hooked(bench.model, {layer: caught.append}):
            bench.model(input_ids=ids, attention_mask=attn, position_ids=position_ids, use_cache=False,
                        logits_to_keep=steer.last(1, bench.model))
        for i, h in zip(batch, caught[0]):
            yield i, h[-len(made[i].ids):].float().sum(0).cpu()                         # [d]
    sums = torch.stack(steer.in_batches(read, list(map(len, rows)), batch_size=32))     # [n, d]
    return sums.sum(0) / sum(len(c.ids) for c in made)                                  # [d]


def holding(direction: Tensor, value: float):
    """A hook that sets a state's component along a unit direction to one value."""
    def hold(h):
        u = direction.to(h)                                                             # [d]
        return h + (value - h @ u)[..., None] * u                                       # [B, T, d]
    return hold


# ---- the rows ------------------------------------------------------------------------------------------


def measure_rivals(bench) -> None:
    """Adds a row for each rival to the bench, whose first rows are the run's."""
    vectors, dose, persona = bench.night["vectors"], bench.night["coeff"], bench.persona
    if not dose:
        raise ValueError(f"{bench.record.path}: its first round steered with nothing, and the rivals are "
                         "given its dose; take a run with --teacher steer or both")
    own, model = lesson(bench), bench.model

    with bench.stack.gated([1.0] + [0.0] * (bench.stack.n_rounds - 1), 0):
        made = bench.answers()
    bench.row("first accepted day", made)                   # the day that had an adapter's budget below

    randoms = [as_long_as(vectors, stage_seed(bench.run["options"]["seed"], i, "random vector"))
               for i in range(N_RANDOM)]
    bench.row(f"steering, {N_RANDOM} random vectors",
              [c for x in randoms for c in bench.answers(vectors=x, coeff=dose)])
    bench.row("steering, minus v", bench.answers(vectors=vectors, coeff=-dose))

    plus = trained(bench, lesson(bench, persona["pos"][0]))
    with plus.gated(1, 0):
        made = bench.answers()
    bench.row("adapter of the prompt's answers", made)

    minus = trained(bench, lesson(bench, persona["neg"][0]))
    with plus.gated(1, 0), minus.gated([-1.0], 0):
        made = bench.answers()
    bench.row("weight steering", made)
    plus.remove()
    minus.remove()

    with steer.steered(model, vectors, -dose):
        stack = trained(bench, own, reg="nll")
    with stack.gated(1, 0):
        made = bench.answers()
    bench.row("preventative", made)
    stack.remove()

    stack = trained(bench, own, lambda: steer.steered(model, vectors, dose), reg="kl_fwd", kl_agg="mean",
                    tau=0.0, lam=PURE, lam_round_pow=0.0)
    with stack.gated(1, 0):
        made = bench.answers()
    bench.row("KL to steering", made)
    stack.remove()

    last = max(vectors)                                     # a shift of a block before is in this one's too
    before = mean_state(bench, own, last)                                               # [d]
    with bench.stack.gated(1, 0):
        shift = mean_state(bench, own, last) - before                                   # [d]
    along = shift / shift.norm()                                                        # [d]
    cosine = torch.cosine_similarity(shift, vectors[last], dim=0).item()
    bench.row("sufficiency: base + the day's vector", bench.answers(vectors={last: shift}, coeff=1.0),
              cosine=cosine, dose=(shift.norm() / vectors[last].norm()).item())
    held = {last: holding(along, (before @ along).item())}
    with steer.hooked(model, held), bench.stack.gated(1, 0):
        made = bench.answers()
    bench.row("necessity: the day without it", made)
    with steer.hooked(model, held):
        made = bench.answers()
    bench.row("the base without it", made)


# ---- the table -----------------------------------------------------------------------------------------


def cell(rows: list[dict], key: str) -> str:
    """The mean over runs, and their lowest and highest where there are several.

    The error of a share is that of one run, over prompts: runs share these and their draws, so it does not
    shrink with their number.
    """
    values, digits = [row[key] for row in rows], 2 if key == "share" else 3
    error = f" ± {sum(row['se'] for row in rows) / len(rows):.2f}" if key == "share" else ""
    spread = f" [{min(values):.2f}, {max(values):.2f}]" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{error}{spread}"


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished run folders; seeds of one run")
    parser.add_argument("--n", type=int, default=96, help="answers per row")
    parser.add_argument("--json", type=Path, help="write the rows there, answers included")
    args = parser.parse_args(argv)
    check_apart({"arms": {"": []}}, {("", i): read(path) for i, path in enumerate(args.runs)})
    if args.json and not args.json.parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no folder {args.json.parent}")
    by_run = []
    for path in args.runs:
        bench = check.Bench(path, args.n)
        bench.measure_run()
        measure_rivals(bench)
        by_run.append(bench.rows)
    keys = [key for key in check.MEASURES if key in by_run[0][0] and key != "se"]
    print(table([{"row": rows[0]["label"]} | {key: cell(rows, key) for key in keys}
                 for rows in zip(*by_run)]))
    rows = [row for rows in by_run for row in rows]
    for row in rows:
        if "cosine" in row:
            print(f"\n{row['run']}, day {row['day']}: the day's vector has a cosine of {row['cosine']:.2f} "
                  f"with v and {row['dose']:.2f} of its length")
    if args.json:
        files.write_whole(args.json, json.dumps(rows, indent=1).encode())
    return rows


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"rivals.py: {files.one_line(error)}")
