"""Train: InnerPiSSA on a chat model, and the two tables in which it stands beside its rivals.

    python innerpissa/train.py [MODEL] --persona love            the embedded model: minutes on two cores
    python innerpissa/train.py HuggingFaceTB/SmolLM2-360M-Instruct --methods "InnerPiSSA,mean difference,prompted"
    python innerpissa/train.py --ablations                       what each part of it is worth

Every method is trained and read once per seed: a seed draws the pairs, their split and the adapter's start. The
tables give means and the standard deviation over seeds. What is chosen, the scale of the dial, is chosen on odd
items and scored on even ones. At the end a run folder holds the first seed's adapter at --c, for
`python loop.py report | chat | export`.
"""
import argparse
import dataclasses
import json
import math
import shlex
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch                                                    # noqa: E402

import evalmfv                                                  # noqa: E402
import heal                                                     # noqa: E402
import lora                                                     # noqa: E402
import steer                                                    # noqa: E402
from innerpissa import contrast, dilemmas, dose, extract, rivals, spin      # noqa: E402
from innerpissa.dilemmas import table                           # noqa: E402
from lora import check_ranges, opt                              # noqa: E402
from tools import export, folder, inputs, model as models, options          # noqa: E402
from tools.screen import Screen                                 # noqa: E402
from tools.student import Student                               # noqa: E402

HERE = Path(__file__).resolve().parent
VECTORS = {"random": "random", "PCA": "pca_diff", "mean difference": "mean", "fisher dual": "fisher_reg2_dual"}
METHODS = ("random", "mean difference", "PCA", "fisher dual", "prompted", "LoRA by nll", "LoRA", "IA3", "VeRA",
           "ROAD", "DeLoRA", "healed loop", "InnerPiSSA, free K", "InnerPiSSA")
ABLATIONS = {                                               # name: (spin fields, contrast fields, where)
    "as it is": ({}, {}, {}),
    "rotate U and V": (dict(rotate="UV"), {}, {}), "no rotation": (dict(rotate="none"), {}, {}),
    "no scaling": (dict(scale="none"), {}, {}), "mult for add": (dict(scale="mult"), {}, {}),
    "free odd K": (dict(rotate="free"), {}, {}),
    "top directions": (dict(select="top"), {}, {}), "difference's": (dict(select="difference"), {}, {}),
    "activation space": ({}, dict(space="activation"), {}), "sigmoid": ({}, dict(separation="sigmoid"), {}),
    "rmse KL barrier": ({}, dict(barrier="rmse"), {}), "no barrier": ({}, dict(barrier="none"), {}),
    "no monotone": ({}, dict(monotone=0.0), {}), "against the base": ({}, dict(against="base"), {}),
    "o only": ({}, {}, dict(modules="o_proj")), "down only": ({}, {}, dict(modules="down_proj")),
    "all Linears": ({}, {}, dict(modules="")), "late blocks": ({}, {}, dict(band=(0.6, 0.9)))}
# ours are trained like InnerPiSSA; what is not a rotation takes a lower rate, or it leaves the barrier at once
RATE = {"LoRA by nll": 1e-3, "LoRA": 1e-3, "DeLoRA": 1e-3}


@dataclass(frozen=True)
class TrainConfig:
    """train: model, data, what is compared"""
    model: str = opt("pocket", "hub id or folder of a chat model; pocket = the embedded one")
    revision: str = opt("", "hub revision; empty = the default branch")
    dtype: str = opt("auto", "auto, float32 or bfloat16")
    device: str = opt("auto", "cpu, cuda, ...; auto = cuda if there is one")
    persona: str = opt("love", "name in data/personas.json, or a FILE.json")
    prompts: str = opt("", "text file, a prompt a line; empty = the persona's")
    dilemmas: str = opt("", "items of dilemmas.py, or DailyDilemmas; empty = data/pocket.jsonl, or real.jsonl")
    target: str = opt("", "the value that should move; empty = the persona's name, or its foundation")
    n_pairs: int = opt(96, "pairs per seed", 16, 1e6)
    n_seeds: int = opt(3, "seeds of pairs, split and start", 1, 1e3)
    seed: int = opt(0, "the first seed", 0, 1e9)
    band: tuple[float, float] = opt((0.25, 0.75), "adapt the blocks of these depths (fractions)", 0, 1)
    modules: str = opt("o_proj,down_proj", "Linears to adapt, by the ends of their names; empty = all of a block")
    methods: str = opt(",".join(METHODS).replace("InnerPiSSA, free K", "InnerPiSSA free K"), "rows of the tables")
    ablations: bool = opt(False, "the parts of InnerPiSSA, one changed at a time, instead of the rivals")
    c: float = opt(1.0, "the dial of the adapter that the run folder gets", -8, 8)
    out: str = opt("runs", "folder of the run folders; empty = write none")

    def __post_init__(self):
        check_ranges(self)
        unknown = [m for m in self.names() if m not in METHODS]
        if unknown or not self.names():
            raise ValueError(f"--methods {', '.join(unknown) or 'is empty'}: expected some of {', '.join(METHODS)}")
        if not self.band[0] < self.band[1]:
            raise ValueError(f"--band {self.band}: expected the lower depth first")

    def names(self) -> list[str]:
        asked = [m.strip().replace("InnerPiSSA free K", "InnerPiSSA, free K") for m in self.methods.split(",") if m.strip()]
        return [m for m in METHODS if m in asked] + [m for m in asked if m not in METHODS]


GROUPS = (TrainConfig, spin.SpinConfig, contrast.ContrastConfig)


class Bench:
    """A model, its texts and items, and how each method becomes a dial on it."""

    def __init__(self, cfg: TrainConfig, scfg, ccfg, model, tok, given: dict, items, target: str):
        self.cfg, self.scfg, self.ccfg, self.model, self.tok = cfg, scfg, ccfg, model, tok
        self.given, self.items, self.target, self.screen = given, items, target, Screen()
        self.persona, self.pad_id = given["persona"], steer.pad_of(tok, model)
        n_blocks = len(steer.blocks(model))
        self.block = min(int(ccfg.read * n_blocks), n_blocks - 1)
        self.layers = steer.band(n_blocks, *cfg.band)
        self.targets = [m.strip() for m in cfg.modules.split(",") if m.strip()] or None
        spin.linears(model, self.layers, self.targets)      # says at once if a module matches nothing
        said = steer.generate(model, tok, given["held_out"], max_new_tokens=32, seed=cfg.seed)
        self.texts = list(zip(given["held_out"], said))     # the base's own answers, for the change of nll
        self.questions = [i.text for i in items if i.values.get(target) and i.options == ("Yes", "No")]
        self.signs = torch.tensor([[float(i.values[target])] for i in items if i.values.get(target)
                                   and i.options == ("Yes", "No")], dtype=torch.float64)        # [n, 1]
        if len(self.questions) < 4:
            raise ValueError(f"target {target!r}: {len(self.questions)} yes-or-no items are tagged with it, need 4")

    def pairs(self, seed: int) -> list[contrast.Pair]:
        return contrast.make_pairs(self.model, self.tok, self.persona["pos"], self.persona["neg"], self.given["train"],
                                   n=self.cfg.n_pairs, n_read=self.ccfg.n_read, seed=seed)

    # ---- a method as a dial: (dialed, doses, systems, facts)

    @contextmanager
    def dial_of(self, method: str, seed: int, scfg=None, ccfg=None, layers=None, targets=...):
        """Inside the `with`, the method is on the model, dial at 0; yields what reads it and what training said."""
        scfg, ccfg, layers = scfg or self.scfg, ccfg or self.ccfg, layers or self.layers
        targets = self.targets if targets is ... else targets
        model, pairs, made = self.model, self.pairs(seed), None
        said = dict(systems=None, doses=dose.DOSES, adapter=None, record=None)
        if method in VECTORS:
            reading = extract.read(model, pairs, [self.block - 1], block=self.block, pad_id=self.pad_id)
            v = {self.block - 1: extract.extract(reading, self.block - 1, VECTORS[method], seed=seed)}
            yield lambda c: steer.steered(model, v, c), said
            return
        if method == "prompted":
            k = seed % min(len(self.persona["pos"]), len(self.persona["neg"]))
            systems = {1.0: self.persona["pos"][k], 0.0: "", -1.0: self.persona["neg"][k]}
            yield lambda c: steer.steered(model, {}, 0.0), said | dict(systems=systems, doses=(-1.0, 0.0, 1.0))
            return
        if method == "healed loop":
            stack = self.healed(seed)
            try:
                yield lambda c: by_row(stack, c), said
            finally:
                stack.remove()
            return
        try:
            if method.startswith("InnerPiSSA"):
                if method.endswith("free K"):
                    scfg = dataclasses.replace(scfg, rotate="free")
                names = spin.linears(model, layers, targets)
                reading = extract.read(model, pairs, list(names), block=self.block, pad_id=self.pad_id)
                made = spin.spin(model, scfg, layers=layers, targets=targets, seed=seed,
                                 states={k: tuple(h) for k, h in reading.h.items()})
            else:
                made = rivals.rival(model, method.split()[0], r=scfg.r, layers=layers, targets=targets, seed=seed)
            ccfg = dataclasses.replace(ccfg, lr=RATE.get(method, ccfg.lr))
            loss = rivals.nll_terms(made, pad_id=self.pad_id) if method.endswith("nll") else None
            n_steps = ccfg.epochs * math.ceil(0.85 * len(pairs) / ccfg.batch)
            with self.screen.watch(method, seed, "training, steps", n_steps) as tick:
                record = contrast.contrast(made, pairs, ccfg, seed=seed, pad_id=self.pad_id, r=scfg.r, loss=loss, log=tick)
            yield made.dialed, said | dict(adapter=made, record=record)
        finally:
            if made:
                made.remove()

    def healed(self, seed: int) -> lora.Stack:
        """One round of our loop at the dose 1: steer, filter, heal, fold. Its dial scales the folded round."""
        model, tok, given = self.model, self.tok, self.given
        read = model, tok, self.persona["pos"], self.persona["neg"], given["contexts"]
        vectors, prompts = steer.fit_vectors(*read, steer.find_layers(*read)[0]), given["train"]
        n = len(prompts)
        own = steer.generate(model, tok, prompts, max_new_tokens=48, seed=seed)
        made = steer.generate(model, tok, prompts, vectors=vectors, coeffs=[1.0] * n, max_new_tokens=48, seed=seed + 1)
        limits = steer.calibrate_limits([steer.readings(c, nll) for c, nll in zip(own, steer.token_nll(
            model, own, pad_id=self.pad_id))], steer.SteerConfig(slack=0.3))
        verdicts = steer.judge(made, steer.token_nll(model, made, pad_id=self.pad_id), limits, patterns=self.persona["patterns"])
        kept = [c for c, verdict in zip(made, verdicts) if verdict.kept]
        if len(kept) < 8:
            raise RuntimeError(f"healed loop: {len(kept)} of {n} steered answers passed the filter, need 8")
        stack = lora.attach(model, r=8, alpha=16, layers=steer.band(len(steer.blocks(model)), 0.2, 0.8), seed=seed)
        samples = [heal.Sample(c.prompt_ids + c.ids, len(c.prompt_ids), c.prompt) for c in kept]
        hcfg = heal.HealConfig(lr=0.2 / model.config.get_text_config().hidden_size, tau=1.0, epochs=3)
        import warnings
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the barrier")
            heal.heal(model, stack.parameters(), samples, lambda: stack.gated(0, 0), hcfg, seed=seed, pad_id=self.pad_id)
        stack.fold()
        stack.gates(0.0, 0.0)
        return stack

    # ---- reading it

    def read(self, dialed, said: dict) -> tuple[dose.Score, float, dilemmas.Transfer]:
        """Dose response on the target's questions, and transfer to all items at the scale that odd items chose."""
        y, mass = dose.log_odds(self.model, self.tok, self.questions, dialed, said["doses"], systems=said["systems"])
        scored, scale = dose.held_out(y * self.signs, mass, said["doses"])
        moved = dilemmas.measure(self.model, self.tok, self.items, dialed, scale, self.target, texts=self.texts,
                                 systems=said["systems"])
        return scored, scale, moved


@contextmanager
def by_row(stack: lora.Stack, c):
    """A folded LoRA at one dose per row: its rounds have one switch, so the rows' doses go in by a hook's scale."""
    if not isinstance(c, torch.Tensor):
        with stack.gated(float(c), 0.0):
            yield
        return
    handles = []
    try:
        for name, layer in stack.layers.items():
            A, B, scale = layer.rounds[-1]
            def hook(linear, args, y, A=A, B=B, scale=scale):
                z = args[0] @ A.T.to(y.dtype) @ B.T.to(y.dtype)                 # [B, T, d_out]
                return y + scale * rivals.column(c, y) * z
            handles.append(stack_module(stack, name).register_forward_hook(hook))
        with stack.gated(0.0, 0.0):
            yield
    finally:
        for handle in handles:
            handle.remove()


DOSE_HEAD = ("method", "score", "± seeds", "slope", "r2", "valid", "p (t)", "p (perm)", "scale", "symmetry", "even / odd")


def mean_sd(values) -> tuple[float, float]:
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), x.std().item() if len(x) > 1 else math.nan


def dose_row(method: str, scores: list[dose.Score], scales: list[float], parities: list) -> list[str]:
    mean, sd = mean_sd([s.score for s in scores])
    def of(name):
        return mean_sd([getattr(s, name) for s in scores])[0]
    ratio = f"{mean_sd(parities)[0]:.2f}" if parities and parities[0] is not None else "-"
    return [method, f"{mean:.3f}", "-" if math.isnan(sd) else f"{sd:.3f}", f"{of('slope'):+.3f}", f"{of('r2'):.2f}",
            f"{of('valid'):.2f}", f"{max(s.p for s in scores):.1g}", f"{max(s.p_perm for s in scores):.2g}",
            "/".join(f"{x:g}" for x in scales), f"{of('symmetry'):.2f}", ratio]
