"""Train: InnerPiSSA on a chat model, and the two tables in which it stands beside its rivals.

    python innerpissa/train.py                          the embedded model: minutes on two cores
    python innerpissa/train.py HuggingFaceTB/SmolLM2-360M-Instruct --dilemmas FILE --methods "mean,InnerPiSSA"
    python innerpissa/train.py --ablate --cells FILE        one part changed at a time; goes on where it ended

Every method is trained and read once per seed: a seed draws the pairs, their split and the adapter's start.
The tables give means and the standard deviation over seeds. What is chosen, the scale of the dial, is chosen
on odd items and scored on even ones. At the end a run folder holds the first seed's adapter at --c, for
`python loop.py report | chat | export`. Its three rows are of few items: the tables are the result. With
--cells every finished (method, seed) goes to a file and is not measured again.
"""
import json
import math
import shlex
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch                                                    # noqa: E402

from innerpissa import contrast, dilemmas, dose, methods, spin  # noqa: E402
from innerpissa.dilemmas import table                           # noqa: E402
from innerpissa.methods import ABLATIONS, METHODS, VECTORS, Bench           # noqa: E402
from lora import check_ranges, opt                              # noqa: E402
from tools import folder, inputs, model as models, options, svg, template     # noqa: E402
from tools.begin import facts_of, surroundings                  # noqa: E402
from tools.rounds import Rounds, restack                        # noqa: E402
from tools.screen import Screen                                 # noqa: E402
from tools.student import Student                               # noqa: E402
from tools.table import show                                    # noqa: E402

HERE = Path(__file__).resolve().parent
KNOWN = {*METHODS, *VECTORS}
HOW = "a dial in the basis of each weight's singular vectors, trained on hidden states of pairs, set to {:g}."
CODE = ("steer", "lora", "heal", "evalmfv", *(f"innerpissa/{name}" for name in (
    "dial", "spin", "pairs", "contrast", "rivals", "methods", "dose", "dilemmas", "extract")))
COLOURS = ("#777", "#b58900", "#0072b2", "#111", "#d55e00", "#e69f00", "#cc79a7", "#56b4e9", "#009e73")


@dataclass(frozen=True)
class TrainConfig:
    """train: model, data, what is compared"""
    model: str = opt("pocket", "hub id or folder of a chat model; pocket = the embedded one")
    revision: str = opt("", "hub revision; empty = the default branch")
    dtype: str = opt("auto", "auto, float32 or bfloat16")
    device: str = opt("auto", "cpu, cuda, ...; auto = cuda if there is one")
    persona: str = opt("love", "name in data/personas.json, or a FILE.json")
    prompts: str = opt("", "text file, a prompt a line; empty = the persona's")
    dilemmas: str = opt("", "items of dilemmas.py, or DailyDilemmas; empty = the embedded world's")
    target: str = opt("", "the value that should move, of the items' tags; empty = the persona's name")
    n_pairs: int = opt(48, "pairs per seed", 16, 1e6)
    n_seeds: int = opt(3, "seeds of pairs, split and start", 1, 1e3)
    seed: int = opt(0, "the first seed", 0, 1e9)
    band: tuple[float, float] = opt((0.25, 0.6), "adapt the blocks of these depths (fractions)", 0, 1)
    modules: str = opt("o_proj,down_proj", "Linears to adapt, ends of their names; empty = all of a block")
    methods: str = opt(",".join(METHODS), "rows of the tables")
    ablate: bool = opt(False, "rows: InnerPiSSA with one part changed at a time, instead of --methods")
    cells: str = opt("", "file that finished cells are added to and taken from; empty = none")
    figure: str = opt("", "write the dose response as an SVG there")
    n_text: int = opt(32, "sampled answers behind the share of the persona prompt; 0 = none", 0, 1e6)
    c: float = opt(1.0, "the dial of the adapter that the run folder gets", -8, 8)
    out: str = opt("runs", "folder of the run folders; empty = write none")

    def __post_init__(self):
        check_ranges(self)
        unknown = [m for m in self.names() if m not in KNOWN]
        if unknown or not self.names():
            raise ValueError(f"--methods {', '.join(unknown) or 'is empty'}: there are {', '.join(METHODS)}")
        if not self.band[0] < self.band[1]:
            raise ValueError(f"--band {self.band}: expected the lower depth first")

    def names(self) -> list[str]:
        return [m.strip() for m in self.methods.split(",") if m.strip()]

    def rows(self) -> dict[str, tuple[str, dict]]:
        """Label of a row: the method, and what of the options is changed for it."""
        if not self.ablate:
            return {m: (m, {}) for m in self.names()}
        return {m: (m, {}) for m in methods.FLOOR} | {k: ("InnerPiSSA", v) for k, v in ABLATIONS.items()}


GROUPS = (TrainConfig, spin.SpinConfig, contrast.ContrastConfig)


# ---- the tables --------------------------------------------------------------------------------------------

DOSE_HEAD = ("method", "score", "± seeds", "slope", "r2", "valid", "p (t)", "p (perm)", "scale", "symmetry",
             "even / odd", "s(1), s(-1)")
TEXT_HEAD = ("method", "share", "± seeds", "± answers", "coherence")


def mean_sd(values) -> tuple[float, float]:
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), x.std().item() if len(x) > 1 else math.nan


def pm(sd: float) -> str:
    return "-" if math.isnan(sd) else f"{sd:.3f}"


def dose_row(label: str, cells: list[dict]) -> list[str]:
    """Means over seeds, p of the worst seed. s: held-out separation at both ends, in the base's own."""
    scores, parity, held = ([c[k] for c in cells] for k in ("score", "parity", "held"))
    def of(name):
        return mean_sd([s[name] for s in scores])[0]
    mean, sd = mean_sd([s["score"] for s in scores])
    ends = [mean_sd([h[k] for h in held])[0] for k in ("plus", "minus")] if held[0] else None
    return [label, f"{mean:.3f}", pm(sd), f"{of('slope'):+.3f}", f"{of('r2'):.2f}", f"{of('valid'):.2f}",
            f"{max(s['p'] for s in scores):.1g}", f"{max(s['p_perm'] for s in scores):.2g}",
            "/".join(f"{c['scale']:g}" for c in cells), f"{of('symmetry'):.2f}",
            "-" if parity[0] is None else f"{mean_sd(parity)[0]:.2f}",
            "{:+.2f}, {:+.2f}".format(*ends) if ends else "-"]


def text_row(label: str, cells: list[dict]) -> list[str]:
    share, se, coherence = ([c["text"][k] for c in cells] for k in ("share", "se", "coherence"))
    mean, sd = mean_sd(share)
    return [label, f"{mean:+.2f}", pm(sd), f"{mean_sd(se)[0]:.2f}", f"{mean_sd(coherence)[0]:.3f}"]


def tables(done: dict[str, list[dict]], target: str, n_asked: int, n_items: int) -> str:
    """Both tables and the text's, of the rows that have all of their seeds or some of them."""
    moved = [dilemmas.row(k, [dilemmas.Transfer(**c["transfer"]) for c in cells], target)
             for k, cells in done.items()]
    spoken = [text_row(k, cells) for k, cells in done.items() if all("text" in c for c in cells)]
    said = f"\n\ntext at that scale, share of the persona prompt's trait\n{table(TEXT_HEAD, spoken)}"
    n = "/".join(sorted({str(len(cells)) for cells in done.values()}))
    return (f"\ndose response of {target}, {n} seeds, {n_asked} items, nats\n"
            f"{table(DOSE_HEAD, [dose_row(k, cells) for k, cells in done.items()])}\n\n"
            f"transfer to {n_items} items at the scale that was chosen\n{table(dilemmas.COLUMNS, moved)}"
            f"{said if spoken else ''}")


def figure(done: dict[str, list[dict]], target: str) -> str:
    """The target's log-odds over the dial c, a line a method, means over seeds; bars are their sd."""
    lines = {}
    for label, cells in done.items():
        y = torch.tensor([c["y"] for c in cells], dtype=torch.float64)          # [seeds, k]
        sd = y.std(0) if len(y) > 1 else torch.zeros(y.shape[1])
        lines[label] = list(zip(dose.bend(cells[0]["doses"]).tolist(), y.mean(0).tolist(), sd.tolist()))
    flat = [point for line in lines.values() for point in line]
    plot = svg.Plot(f"log-odds of yes on {target} against the dial, a line a method", [x for x, *_ in flat],
                    [y + side * e for _, y, e in flat for side in (1, -1)], "sign(c) log(1 + |c|)",
                    "log p(Yes) - log p(No), signed (nats)", w=760, h=440, right=150)
    style = "text{font:12px sans-serif;fill:#555}.grid{stroke:#8884}.line,.whisker{fill:none;stroke-width:2}"
    for i, (label, line) in enumerate(lines.items()):
        plot.line([point[:2] for point in line], f"m{i}", label)
        for x, y, e in line:
            plot.mark("healed", x, y, f"{label} {y:+.2f} ± {e:.2f}", ey=e, more=f"m{i}")
        colour = COLOURS[i % len(COLOURS)]
        style += f".line.m{i},.whisker.m{i}{{stroke:{colour}}}.mark.m{i},.name.m{i}{{fill:{colour}}}"
    drawn = plot.svg().replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return drawn.replace("</title>", f"</title><style>{style}</style>", 1) + "\n"


# ---- the run folder ----------------------------------------------------------------------------------------

def write_run(bench: Bench, tensors: dict, argv: list[str], values: dict, date: str) -> Path:
    """A run folder of one accepted round, the adapter at --c, with rows of base, prompted and this model."""
    cfg, model, tok, given, screen = bench.cfg, bench.model, bench.tok, bench.given, bench.screen
    with folder.Folder(None, screen) as run:
        run.make(Path(cfg.out), f"{Path(cfg.model).name}-{Path(cfg.persona).stem}-innerpissa", argv=argv,
                 command="python innerpissa/train.py " + shlex.join(argv), options=values,
                 defaults=options.values(GROUPS), how=HOW.format(cfg.c), **surroundings(model, CODE),
                 **facts_of(model, tok, given, date))
        rounds = Rounds(run)
        rounds.save(0, "adapter", tensors, c=cfg.c)
        stack = restack(model, [rounds.path(0, "adapter")])
        sampling = dict(max_new_tokens=32, temperature=1.0, top_p=0.95, batch_size=128)
        student = Student(model, tok, stack, screen, **given, seed=cfg.seed, sampling=sampling,
                          think_tokens=8, n_text=24)
        rows = {}
        with stack.gated(0, 0):
            found = run.event("limits", None, **student.calibrate(24, None))
            own = found["own_ids"], [torch.tensor(nll) for nll in found["own_nll"]]
            for kind, system in (("base", ""), ("prompted", given["persona"]["pos"][0])):
                rows[kind] = run.event("row", None, kind=kind, **student.measured(
                    kind, None, kind, own=own, base=rows.get("base"), prompted=None, system=system))
        with stack.gated(1, 0):
            row = student.measured("healed", 0, f"c = {cfg.c:g}", own=own, **rows)
            run.event("row", 0, kind="healed", **row)
        run.event("gate", 0, accepted=True, reasons=[])
        run.save(status="accepted", accepted=[0], stopped="", seconds=time.time() - screen.start)
        stack.remove()
        show(run.path, screen)
        return run.path


# ---- the command -------------------------------------------------------------------------------------------

def key_of(groups, method: str, seed: int, changes: dict, code: str) -> str:
    """What a cell depends on: its options, the texts it was given and the code."""
    free = {"out", "methods", "n_seeds", "seed", "c", "cells", "ablate", "figure"}
    held = {name: value for name, value in options.values(groups).items() if name not in free}
    return f"{zlib.crc32(json.dumps([held, method, seed, changes, code]).encode()):08x}"


def read_cells(path: str) -> dict[str, dict]:
    """{key: cell} of a file of cells. A line that a kill cut off is no JSON and is measured again."""
    found = {}
    for line in Path(path).read_text().splitlines() if path and Path(path).exists() else ():
        try:
            cell = json.loads(line)
        except ValueError:
            continue
        if not (isinstance(cell, dict) and {"key", "score", "transfer"} <= cell.keys()):
            raise ValueError(f"--cells {path}: {line[:60]!r} is no cell of this command; give another file")
        found[cell["key"]] = cell
    return found


def measure(bench: Bench, groups, known: dict[str, dict], code: str) -> tuple[dict, dict | None]:
    """({row: its cells}, the first adapter of InnerPiSSA). A seed of all rows comes before the next seed."""
    cfg, screen, first = bench.cfg, bench.screen, None
    done = {label: [] for label in cfg.rows()}
    try:
        for seed in range(cfg.seed, cfg.seed + cfg.n_seeds):
            for label, (method, changes) in cfg.rows().items():
                key = key_of(groups, method, seed, changes, code)
                if key not in known:                        # another process may work on the same file
                    known |= read_cells(cfg.cells)
                if key not in known:
                    cell, adapter = bench.cell(method, seed, changes)
                    known[key] = dict(key=key, label=label, **cell)
                    if method == "InnerPiSSA" and not changes and first is None:
                        first = adapter.tensors(cfg.c)
                    if cfg.cells:
                        with open(cfg.cells, "a") as out:
                            out.write("\n" + json.dumps(known[key]))    # a line that was cut off stays alone
                cell = known[key]
                done[label].append(cell)
                score = cell["score"]
                screen.say(label, seed, f"score {score['score']:.3f}  slope {score['slope']:+.3f}  scale "
                           f"{cell['scale']:g}  symmetry {score['symmetry']:.2f}  transfer "
                           f"{cell['transfer']['slopes'][bench.target]:+.3f}{'  flipped' * cell['flipped']}  "
                           f"{cell['cpu']:g} s of CPU")
    finally:                                                # what is finished is shown, whatever ends it
        if done := {label: cells for label, cells in done.items() if cells}:
            print(tables(done, bench.target, len(bench.questions), len(bench.items)), flush=True)
    return done, first


def train(cfg: TrainConfig, scfg: spin.SpinConfig, ccfg: contrast.ContrastConfig, argv: list[str]) -> int:
    """Prints the tables; writes the run folder if InnerPiSSA was trained."""
    groups = cfg, scfg, ccfg
    given = inputs.load(cfg.persona, prompts=cfg.prompts, model=cfg.model, n_vignettes=14)
    notes = given.pop("notes")
    if not cfg.dilemmas and cfg.model != "pocket":
        raise ValueError("--dilemmas FILE is needed: the items that come with this are the embedded world's")
    items = dilemmas.load_dilemmas(cfg.dilemmas or HERE / "data" / "pocket.jsonl")
    target, tags = cfg.target or given["persona"]["name"], sorted({v for item in items for v in item.values})
    if target not in tags:
        raise ValueError(f"--target {target!r}: no item is tagged with it; there are {', '.join(tags)}")
    known = read_cells(cfg.cells)
    if cfg.out:
        folder.check_out(Path(cfg.out))
    date = template.today()
    model, tok = models.load(cfg.model, revision=cfg.revision, dtype=cfg.dtype, device=cfg.device, date=date)
    bench = Bench(*groups, model, tok, given, items, target, Screen())
    for note in notes:
        bench.screen.say("note", None, note)
    done, first = measure(bench, groups, known, surroundings(model, CODE)["code"])
    if cfg.figure:
        folder.write_whole(cfg.figure, figure(done, target).encode())
    if first and cfg.out:
        values = options.values(groups) | dict(quantize="", pos="", neg="")     # what the readers expect
        where = shlex.quote(str(write_run(bench, first, argv, values, date)))
        print(f"\nread     {where}/report.html\nchat     python loop.py chat {where}\n"
              f"export   python loop.py export {where} --to peft")
    return 0


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    first = ("model", "persona", "methods", "n_seeds", "out")
    made = options.parser(GROUPS, first, prog="innerpissa/train.py", description=__doc__.split("\n")[0])
    made.add_argument("positional_model", nargs="?", metavar="MODEL", help="the same as --model")
    args = vars(made.parse_args(argv))
    given = args.pop("positional_model")
    try:
        args = options.tidy(args if given is None else args | dict(model=given))
        return train(*options.configs(GROUPS, args), argv)
    except KeyboardInterrupt:
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"innerpissa/train.py: {folder.one_line(error)}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2


if __name__ == "__main__":
    sys.exit(main())
