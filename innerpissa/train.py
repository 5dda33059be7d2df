"""Train: InnerPiSSA on a chat model, and the two tables in which it stands beside its rivals.

    python innerpissa/train.py                          the embedded model: minutes on two cores
    python innerpissa/train.py HuggingFaceTB/SmolLM2-360M-Instruct --dilemmas FILE --methods "mean,InnerPiSSA"
    python innerpissa/train.py --methods InnerPiSSA --rotate none            one part of it changed

Every method is trained and read once per seed: a seed draws the pairs, their split and the adapter's start.
The tables give means and the standard deviation over seeds. What is chosen, the scale of the dial, is chosen
on odd items and scored on even ones. At the end a run folder holds the first seed's adapter at --c, for
`python loop.py report | chat | export`. Its three rows are of few items: the tables are the result.
"""
import dataclasses
import functools
import math
import shlex
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch                                                    # noqa: E402

import lora                                                     # noqa: E402
import steer                                                    # noqa: E402
from innerpissa import contrast, dilemmas, dose, extract, rivals, spin      # noqa: E402
from innerpissa.dilemmas import table                           # noqa: E402
from lora import check_ranges, opt                              # noqa: E402
from tools import folder, inputs, model as models, options, search, template  # noqa: E402
from tools.rounds import Rounds, restack                        # noqa: E402
from tools.screen import Screen                                 # noqa: E402
from tools.student import Student                               # noqa: E402
from tools.table import show                                    # noqa: E402

HERE = Path(__file__).resolve().parent
VECTORS = {"random": "random", "mean": "mean", "PCA": "pca_diff", "fisher dual": "fisher_reg2_dual"}
TRAINED = ("InnerPiSSA", "InnerPiSSA free K", "LoRA", "LoRA by nll", "DeLoRA", "VeRA", "IA3", "ROAD")
METHODS = (*VECTORS, "prompted", *TRAINED)
RATE = {"LoRA by nll": 1e-3, "LoRA": 1e-3, "DeLoRA": 1e-3}      # less than the rotation's, which is clamped
HOW = "a dial in the basis of each weight's singular vectors, trained on hidden states of pairs, set to {:g}."
CODE = ("steer", "lora", "innerpissa/spin", "innerpissa/contrast", "innerpissa/rivals")


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
    c: float = opt(1.0, "the dial of the adapter that the run folder gets", -8, 8)
    out: str = opt("runs", "folder of the run folders; empty = write none")

    def __post_init__(self):
        check_ranges(self)
        unknown = [m for m in self.names() if m not in METHODS]
        if unknown or not self.names():
            raise ValueError(f"--methods {', '.join(unknown) or 'is empty'}: there are {', '.join(METHODS)}")
        if not self.band[0] < self.band[1]:
            raise ValueError(f"--band {self.band}: expected the lower depth first")

    def names(self) -> list[str]:
        return [m.strip() for m in self.methods.split(",") if m.strip()]


GROUPS = (TrainConfig, spin.SpinConfig, contrast.ContrastConfig)


class Bench:
    """A model, its texts and items, and how each method becomes a dial on it."""

    def __init__(self, cfg: TrainConfig, scfg, ccfg, model, tok, given: dict, items, target: str):
        self.cfg, self.scfg, self.ccfg, self.model, self.tok = cfg, scfg, ccfg, model, tok
        self.given, self.items, self.target, self.screen = given, items, target, Screen()
        self.persona, self.pad_id = given["persona"], steer.pad_of(tok, model)
        n_blocks = len(steer.blocks(model))
        self.block = min(int(ccfg.read * n_blocks), n_blocks - 1)
        self.layers = search.band(n_blocks, *cfg.band)
        self.targets = [m.strip() for m in cfg.modules.split(",") if m.strip()] or None
        least = min(min(lora.sizes(m)) for m in spin.linears(model, self.layers, self.targets).values())
        if scfg.r > least:                                  # said before the model speaks
            raise ValueError(f"--r {scfg.r}: more than {least}, the smallest width of the adapted weights")
        said = steer.generate(model, tok, given["held_out"], max_new_tokens=32, seed=cfg.seed)
        self.texts = list(zip(given["held_out"], said))     # the base's own answers, for the change of nll
        tagged = [i for i in items if i.values.get(target) and i.options == ("Yes", "No")]
        self.questions = [i.text for i in tagged]
        self.signs = torch.tensor([[i.values[target]] for i in tagged], dtype=torch.float64)    # [n, 1]
        if len(self.questions) < 4:
            raise ValueError(f"--target {target!r}: {len(self.questions)} yes-or-no items have it, need 4")

    @functools.cache
    def pairs(self, seed: int) -> list[contrast.Pair]:
        persona = self.persona
        return contrast.make_pairs(self.model, self.tok, persona["pos"], persona["neg"], self.given["train"],
                                   n=self.cfg.n_pairs, n_read=self.ccfg.n_read, seed=seed)

    @functools.cache
    def reading(self, seed: int, *where) -> extract.Reading:
        return extract.read(self.model, self.pairs(seed), list(where), block=self.block, pad_id=self.pad_id)

    # ---- a method as a dial: (dialed, doses, systems, facts)

    @contextmanager
    def dial_of(self, method: str, seed: int):
        """Inside the `with`, the method is on the model, dial at 0; yields what turns it, and facts of it."""
        scfg, layers, targets, model, made = self.scfg, self.layers, self.targets, self.model, None
        pairs = self.pairs(seed)
        said = dict(systems=None, doses=dose.DOSES, adapter=None, record=None)
        if method in VECTORS:
            reading = self.reading(seed, self.block - 1)
            v = {self.block - 1: extract.extract(reading, self.block - 1, VECTORS[method], seed=seed)}
            yield lambda c: steer.steered(model, v, c), said
            return
        if method == "prompted":
            k = seed % min(len(self.persona["pos"]), len(self.persona["neg"]))
            systems = {1.0: self.persona["pos"][k], 0.0: "", -1.0: self.persona["neg"][k]}
            said |= dict(systems=systems, doses=(-1.0, 0.0, 1.0))
            yield lambda c: steer.steered(model, {}, 0.0), said
            return
        try:
            if method.startswith("InnerPiSSA"):
                if method.endswith("free K"):
                    scfg = dataclasses.replace(scfg, rotate="free")
                names = spin.linears(model, layers, targets)
                reading = self.reading(seed, *names)
                made = spin.spin(model, scfg, layers=layers, targets=targets, seed=seed,
                                 states={k: tuple(h) for k, h in reading.h.items()})
                odd, even = made.sizes()
                self.screen.say(method, seed, f"before training |odd| {odd:.4f}  |even| {even:.4f}")
            else:
                made = rivals.rival(model, method.split()[0], r=scfg.r, layers=layers, targets=targets,
                                    seed=seed)
            ccfg = dataclasses.replace(self.ccfg, lr=RATE.get(method, self.ccfg.lr))
            loss = rivals.nll_terms(made, pad_id=self.pad_id) if method.endswith("nll") else None
            n_steps = ccfg.epochs * math.ceil(0.85 * len(pairs) / ccfg.batch)
            with self.screen.watch(method, seed, "training, steps", n_steps) as tick:
                record = contrast.contrast(made, pairs, ccfg, seed=seed, pad_id=self.pad_id, r=scfg.r,
                                           loss=loss, log=tick)
            yield made.dialed, said | dict(adapter=made, record=record)
        finally:
            if made:
                made.remove()

    # ---- reading it

    def read(self, dialed, said: dict) -> tuple[dose.Score, float, dilemmas.Transfer]:
        """Dose response on the target's questions; transfer to all items at the scale of the odd ones."""
        y, mass = dose.log_odds(self.model, self.tok, self.questions, dialed, said["doses"],
                                systems=said["systems"])
        scored, scale = dose.held_out(y * self.signs, mass, said["doses"])
        moved = dilemmas.measure(self.model, self.tok, self.items, dialed, scale, self.target,
                                 texts=self.texts, systems=said["systems"])
        return scored, scale, moved


DOSE_HEAD = ("method", "score", "± seeds", "slope", "r2", "valid", "p (t)", "p (perm)", "scale", "symmetry",
             "even / odd")


def mean_sd(values) -> tuple[float, float]:
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), x.std().item() if len(x) > 1 else math.nan


def dose_row(method: str, scores: list[dose.Score], scales: list[float], parities: list) -> list[str]:
    mean, sd = mean_sd([s.score for s in scores])
    def of(name):
        return mean_sd([getattr(s, name) for s in scores])[0]
    ratio = f"{mean_sd(parities)[0]:.2f}" if parities and parities[0] is not None else "-"
    return [method, f"{mean:.3f}", "-" if math.isnan(sd) else f"{sd:.3f}", f"{of('slope'):+.3f}",
            f"{of('r2'):.2f}", f"{of('valid'):.2f}", f"{max(s.p for s in scores):.1g}",
            f"{max(s.p_perm for s in scores):.2g}",
            "/".join(f"{x:g}" for x in scales), f"{of('symmetry'):.2f}", ratio]


# ---- the run folder ----------------------------------------------------------------------------------------

def write_run(bench: Bench, tensors: dict, argv: list[str], values: dict, date: str) -> Path:
    """A run folder of one accepted round, the adapter at --c, with rows of base, prompted and this model."""
    cfg, model, tok, given, screen = bench.cfg, bench.model, bench.tok, bench.given, bench.screen
    with folder.Folder(None, screen) as run:
        run.make(Path(cfg.out), f"{Path(cfg.model).name}-{Path(cfg.persona).stem}-innerpissa", argv=argv,
                 command="python innerpissa/train.py " + shlex.join(argv), options=values,
                 defaults={f.name: f.default for cls in GROUPS for f in fields(cls)}, date=date,
                 **folder.surroundings(model, CODE), commit=models.commit_of(model),
                 weights=models.fingerprint(model), template=template.template_id(tok),
                 persona=given["persona"], how=HOW.format(cfg.c),
                 items={side: given[side] for side in ("train", "held_out")})
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

def rows_of(bench: Bench, method: str) -> tuple[list, list, dict | None]:
    """What all seeds of a method gave: (score, scale, transfer) each, even / odd, the first one's adapter."""
    cfg, found, parities, first = bench.cfg, [], [], None
    for seed in range(cfg.seed, cfg.seed + cfg.n_seeds):
        with bench.dial_of(method, seed) as (dialed, said):
            found.append(bench.read(dialed, said))
            if adapter := said["adapter"]:
                parities.append(rivals.parity(adapter))
            if method == "InnerPiSSA" and first is None:
                first = adapter.tensors(cfg.c)
        score, scale, moved = found[-1]
        flipped = "  flipped" * bool(said["record"] and said["record"]["flipped"])
        bench.screen.say(method, seed, f"score {score.score:.3f}  slope {score.slope:+.3f}  scale {scale:g}  "
                         f"symmetry {score.symmetry:.2f}  "
                         f"transfer {moved.slopes[bench.target]:+.3f}{flipped}")
    return found, parities, first


def train(cfg: TrainConfig, scfg: spin.SpinConfig, ccfg: contrast.ContrastConfig, argv: list[str]) -> int:
    """Prints the two tables; writes the run folder if InnerPiSSA is among the methods."""
    given = inputs.load(cfg.persona, prompts=cfg.prompts, model=cfg.model, n_vignettes=14)
    notes = given.pop("notes")
    if not cfg.dilemmas and cfg.model != "pocket":
        raise ValueError("--dilemmas FILE is needed: the items that come with this are the embedded world's")
    items = dilemmas.load_dilemmas(cfg.dilemmas or HERE / "data" / "pocket.jsonl")
    target, known = cfg.target or given["persona"]["name"], sorted({v for item in items for v in item.values})
    if target not in known:
        raise ValueError(f"--target {target!r}: no item is tagged with it; there are {', '.join(known)}")
    if cfg.out:
        folder.check_out(Path(cfg.out))
    date = template.today()
    model, tok = models.load(cfg.model, revision=cfg.revision, dtype=cfg.dtype, device=cfg.device, date=date)
    bench, scores, moves, first = Bench(cfg, scfg, ccfg, model, tok, given, items, target), [], [], None
    for note in notes:
        bench.screen.say("note", None, note)
    try:
        for method in cfg.names():
            found, parities, tensors = rows_of(bench, method)
            first = tensors if method == "InnerPiSSA" else first
            results, scales, transfers = (list(x) for x in zip(*found))
            scores.append(dose_row(method, results, scales, parities))
            moves.append(dilemmas.row(method, transfers, target))
    finally:                                                # what is finished is shown, whatever ends it
        if scores:
            print(f"\ndose response of {target}, {cfg.n_seeds} seeds, {len(bench.questions)} items, nats\n"
                  f"{table(DOSE_HEAD, scores)}\n\n"
                 f"transfer to {len(items)} items at the scale that was chosen\n"
                  f"{table(dilemmas.COLUMNS, moves)}", flush=True)
    if first and cfg.out:
        values = {f.name: getattr(c, f.name) for c in (cfg, scfg, ccfg) for f in fields(c)}
        values |= dict(quantize="", pos="", neg="")         # what the readers of a run expect
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
        return train(*[cls(**{f.name: args[f.name] for f in fields(cls)}) for cls in GROUPS], argv)
    except KeyboardInterrupt:
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"innerpissa/train.py: {folder.one_line(error)}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2


if __name__ == "__main__":
    sys.exit(main())
