"""Loop: steer, filter, heal, fold, evaluate, and again from the healed model.

    python loop.py --kl-agg rmse                         the embedded model, no network, minutes on a CPU
    python loop.py google/gemma-3-4b-it --kl-agg rmse    any chat model of the hub
    python loop.py plan | chat | export | report ...     what a run needs; talk to one, serve it, draw it

One round, on the student = base + folded rounds:

    vector   v = fit_vectors(student)              persona + minus persona -, where it is read
    dose     coeff = find_dose(...)                the most trait of which enough answers survive the filter
    made     kept = [c for c in generate(student, v, coeff) if judge(c, base)]
    night    the steered student is measured
    heal     nll(kept) + lam * relu(D(student || base) - tau), and the round is folded
    day      the healed student is measured
    gate     finite, coherent, more trait than the last accepted day; else the fold is undone

What depends on a model's scale is measured on the model itself and recorded: the filter's limits from the
base's own answers, bare and prompted; tau from how far the persona prompt alone takes the base from itself,
on the first kept answers; steered blocks and dose by what they do; the temperature from the base's own nats;
the learning rate from the width. An explicit number on the command line overrides it.

Writes runs/<time>_<slug>/ (tools/folder.py says what is in it) and one line in runs/results.tsv. A run that
was stopped at any point continues with the same numbers: python loop.py --resume RUN

Exit codes: 0 a round was accepted, 1 the run died (run.json says why), 2 bad usage, 3 no round was accepted,
130 interrupted.
"""
import dataclasses
import importlib
import math
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import evalmfv
import heal
import lora
import steer
from heal import check_ranges, opt
from tools import inputs, model as models, options, ranks, search, size, table, template
from tools.begin import begin, facts_of, surroundings
from tools.files import one_line
from tools.folder import Folder, check_out
from tools.record import Record, read
from tools.rounds import Rounds
from tools.screen import Screen, ended
from tools.student import Student, stage_seed, why_dropped

WORDS = ("plan", "chat", "export", "report")            # python loop.py WORD ...: tools/WORD.py
QUICK = dict(rounds=2, n_vignettes=14, think_tokens=8, n_text=24, n_make=64, max_new_tokens=32, epochs=3)
KEPT_LEAST = 0.25           # share of a round's answers that must pass the filter: less is no data


@dataclass(frozen=True)
class LoopConfig:
    """loop: model, data, rounds, gate"""
    model: str = opt("pocket", "hub id, folder or .gguf file of a chat model; pocket = the embedded one")
    revision: str = opt("", "hub revision (branch, tag or commit); empty = the default branch")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = opt(
        "auto", "of the base; auto = bfloat16 where the hardware has it (on a CPU: if stored so), or float32")
    device: str = opt("auto", "cpu, cuda:1, mps, ...; auto = cuda if there is one; balanced = over all GPUs")
    quantize: Literal["", "4bit"] = opt("", "load the base in 4 bits (needs bitsandbytes and accelerate)")
    persona: str = opt("authority", "authority, love, terse, honest (pocket has two), or a FILE.json")
    pos: str = opt("", "system prompt of the wanted persona (needs --neg); its trait is label-free")
    neg: str = opt("", "system prompt of its opposite")
    prompts: str = opt("", "text file, a prompt a line, every fourth held out; empty = the persona's")
    vignettes: str = opt("", "the probe's items, ours or the original's rows; empty = data/vignettes.jsonl")
    rounds: int = opt(6, "rounds of steer, filter, heal, fold, eval", 1, 1e6)
    seed: int = opt(0, "every stage draws from its own generator, seeded by (seed, round, stage)")
    teacher: Literal["steer", "prompt", "both"] = opt(
        "steer", "whose answers are learned: the steered student's, those under the persona prompt, or both")
    kl_ref: Literal["base", "prev"] = opt("base", "the barrier's reference: the base, or the student before")
    tau_scale: float = opt(1.5, "tau = this times the persona prompt's distance from the base; take less "
                           "with --kl-ref prev", 1e-6, 1e6)
    gate: bool = opt(True, "undo a round that fails its gate; --no-gate accepts every finite round")
    coh_floor: float = opt(0.95, "lowest coherence that is accepted, as a share of the base's", 1e-6, 1)
    patience: int = opt(2, "stop after this many refused rounds in a row", 1, 1e6)
    think_tokens: int = opt(128, "tokens the model may think before the probe interrupts it", 1, 1e6)
    n_text: int = opt(96, "sampled answers to held-out prompts behind trait meter and text coherence", 2, 1e6)
    n_vignettes: int = opt(0, "items of the probe, evenly spread through the file; 0 = all", 0, 1e6)
    quick: bool = opt(False, "a preset for small machines: other defaults of " + ", ".join(QUICK))
    batch_size: int = opt(152, "rows of a batch of answers or probe frames, fewer without memory", 1, 1e6)
    out: str = opt("runs", "folder of the run folders")
    resume: str = opt("", "run folder to continue with its own options; those of the gate may change, "
                      "--rounds and --patience may grow")

    def __post_init__(self):
        check_ranges(self)
        for name in ("model", "persona", "out"):
            if not getattr(self, name).strip():
                raise ValueError(f"--{name} is empty: leave it out for the default")


GROUPS = (LoopConfig, steer.SteerConfig, lora.LoraConfig, heal.HealConfig)
FIRST = ("model", "persona", "rounds", "seed", "kl_agg", "coeff", "gate", "batch_size", "out", "resume")
FREE = ("rounds", "patience", "gate", "coh_floor")      # what a run that continues may have anew


def parse(argv: list[str]) -> list:
    """The dataclasses of all rooms as one command line; exits with 2 for what cannot be meant."""
    how = dict(prog="loop.py", usage="python loop.py [MODEL] [--option value ...]",
               description=__doc__.split("\n")[0],
               epilog="; ".join(f"python loop.py {word} --help" for word in WORDS))
    try:
        args = options.command(GROUPS, FIRST, FREE, argv, preset=QUICK, **how,
                               recorded_of=lambda path: read(path).run.get("options"))
        if args["tau"] is not None and args["reg"] == "nll":
            raise ValueError("--reg nll and --tau: without a barrier there is no tau; leave one out")
        if args["tau"] is not None and args["tau_scale"] != LoopConfig.tau_scale:
            raise ValueError("--tau and --tau-scale: the scale is for a calibrated tau; leave one out")
        return options.configs(GROUPS, args)
    except (ValueError, OSError) as error:
        options.parser(GROUPS, FIRST, **how).error(one_line(error))


# ---- the gate ------------------------------------------------------------------------------------------


def is_readable(base: dict, prompted: dict, cfg: LoopConfig) -> bool:
    """Does the base answer the probe, bare and prompted? Else it has no say in the gate."""
    floor = cfg.coh_floor * base["coherence"]
    return base["coherence"] >= evalmfv.READABLE and prompted["coherence"] >= floor


@ranks.leads
def gate(now: dict, last: dict, base: dict, prompted: dict, cfg: LoopConfig) -> list[str]:
    """Why this day is not accepted, each reason with the option that moves it; floors come first."""
    scores = ("persona_ratio", "trait", "coherence", "text")
    if bad := [name for name in scores if now[name] is None or not math.isfinite(now[name])]:
        return [f"{', '.join(bad)} not finite"]
    reasons, reads = [], is_readable(base, prompted, cfg)
    for name in ("coherence", "text") if reads else ("text",):
        floor = cfg.coh_floor * base[name]
        if now[name] < floor:
            reasons.append(f"{name} {now[name]:.3f} under {floor:.3f}, the base's {base[name]:.3f} times "
                           f"--coh-floor {cfg.coh_floor:g}")
    gain = torch.tensor(now["ratios"]).double() - torch.tensor(last["ratios"]).double()     # [n_text] paired
    mean, se = gain.mean().item(), evalmfv.standard_error(gain).item()
    by_probe = now["trait"] - last["trait"] if reads and now["shift"] else 0.0
    if mean <= se and by_probe <= now["trait_se"]:
        reasons.append(f"no movement beyond noise: persona_ratio {mean:+.3f} ± {se:.3f} nats per token over "
                       "the last accepted day (a larger --n-text lowers the noise, --no-gate accepts all)")
    return reasons if cfg.gate else []


def n_standing(record: Record, cfg: LoopConfig) -> int:
    """How many events stand if the gates are asked again with these options: all before the first to turn."""
    base, prompted = (next(iter(record.rows(kind)), None) for kind in ("base", "prompted"))
    last = base
    for n, e in enumerate(record.events):
        days = [row for row in record.rows("healed") if row["round"] == e["round"]]
        if e["stage"] == "gate" and days:               # a round that broke before its day stays refused
            if bool(gate(days[0], last, base, prompted, cfg)) == e["accepted"]:
                return n
            last = days[0] if e["accepted"] else last
    return len(record.events)


# ---- the run -------------------------------------------------------------------------------------------


class Run:
    """A run's rounds. A stage takes what it needs from the journal and the files, and returns its event."""

    def __init__(self, cfg, scfg, lcfg, hcfg, model, tok, folder: Folder, given: dict):
        self.cfg, self.scfg, self.folder, self.screen = cfg, scfg, folder, folder.screen
        self.rounds = Rounds(folder)
        models.check_rank(lcfg.r, model)
        n_blocks, width = len(steer.blocks(model)), model.config.get_text_config().hidden_size
        self.hcfg = dataclasses.replace(hcfg, lr=0.4 / width if hcfg.lr is None else hcfg.lr)
        persona = given["persona"]
        self.read = model, tok, persona["pos"], persona["neg"], given["contexts"]
        self.system = "" if cfg.teacher == "steer" else persona["pos"][0]
        self.bands = search.bands_of(n_blocks)
        if scfg.steer_band:
            self.bands = [search.band(n_blocks, *scfg.steer_band)]
        self.adapted = search.band(n_blocks, *lcfg.lora_band)
        self.stack = lora.attach(model, r=lcfg.r, alpha=lcfg.alpha, layers=self.adapted, seed=cfg.seed)
        with self.stack.gated(0, 0):                    # what every round's vector is compared with
            self.origin = steer.fit_vectors(*self.read, sorted({k for band in self.bands for k in band}))
        sampling = {name: getattr(scfg, name) for name in ("max_new_tokens", "temperature", "top_p")}
        self.student = Student(model, tok, self.stack, self.screen, **given, seed=cfg.seed, n_text=cfg.n_text,
                               think_tokens=cfg.think_tokens,
                               sampling=sampling | dict(batch_size=cfg.batch_size))

    # ---- what needs no round

    def measure_base(self) -> None:
        student, scfg = self.student, self.scfg
        event = self.folder.once("limits", None, lambda: student.calibrate(scfg.n_make, scfg.temperature))
        self.limits, self.own = steer.Limits(**event["limits"]), (event["own_ids"], event["own_nll"])
        student.sampling["temperature"] = event["temperature"]
        self.screen.say("limits", None, table.of_limits(event))
        self.base = self.row("base", None, "base")
        self.prompted = self.row("prompted", None, "prompted", system=student.persona["pos"][0])
        if not is_readable(self.base, self.prompted, self.cfg):
            self.screen.say("probe", None, f"warning: this model does not answer the probe (coherence "
                            f"{self.base['coherence']:.3f}): its profile means little, and it has no say in "
                            "the gate; the trait is persona_ratio", "yellow")
        event = self.folder.once("layers", None, lambda: dict(student.band(self.bands, self.origin),
                                                              lora=self.adapted))
        self.steered_at = event["steer"]
        self.foreseen = next((e["coeff"] for e in event["trials"] if e["band"] == event["steer"]), 1.0)
        self.screen.say("layers", None, f"steer {self.steered_at}, the best of {len(self.bands)} bands")

    def row(self, kind: str, rnd: int | None, label: str, **how) -> dict:
        """A row of the table, from the journal or measured now."""
        there = {e["kind"]: e for e in self.folder.record.rows()}

        def measure():
            row = self.student.measured(kind, rnd, label, own=self.own, base=there.get("base"),
                                        prompted=there.get("prompted"), **how)
            self.screen.say(kind, rnd, table.of_row(row))
            return row
        return self.folder.once("row", rnd, measure, kind=kind)

    # ---- one round

    def one_round(self, rnd: int) -> dict:
        """Steer, filter, heal, fold, measure; returns the gate's event. A stage is in the journal, or done.

        A round refused or broken leaves the student as it was. What breaks one is a RuntimeError: no dose
        survives, too little is kept, a number is not finite.
        """
        once, stack, n_before, reasons = self.folder.once, self.stack, self.stack.n_rounds, []
        if past := self.folder.recall("gate", rnd):     # it ended in an earlier sitting
            if past["accepted"]:
                self.stack.load_tensors(self.rounds.adapter(rnd))
            return past
        try:
            # ---- one round: each stage reads what it needs from the events and files of those before ---
            with stack.gated(1, 0):                     # the round in training is zero: skip its products
                once("vector", rnd, lambda: self.vector(rnd))
                once("dose", rnd, lambda: self.dose(rnd))
                once("made", rnd, lambda: self.made(rnd))
            self.night(rnd)
            once("heal", rnd, lambda: self.heal(rnd))
            day = self.day(rnd, n_before)
            reasons = gate(day, self.folder.record.last_day, self.base, self.prompted, self.cfg)
            # --------------------------------------------------------------------------------------------
        except torch.OutOfMemoryError as error:         # batches were halved already
            raise RuntimeError(f"out of memory in round {rnd}: {error}") from None
        except RuntimeError as error:
            reasons = [str(error)]
        if reasons:
            if stack.n_rounds > n_before:
                stack.unfold()
            stack.drop()
        return once("gate", rnd, lambda: self.rounds.settle(rnd, not reasons)
                    or dict(accepted=not reasons, reasons=reasons))

    def vector(self, rnd: int) -> dict:
        """The persona's vectors on the student as it is: before the first accepted round, the base's."""
        vectors = {k: self.origin[k] for k in self.steered_at}
        if self.stack.n_rounds:
            vectors = steer.fit_vectors(*self.read, self.steered_at)
        self.rounds.save_vectors(rnd, vectors)
        return dict(norm={k: v.norm() for k, v in vectors.items()},
                    cosine={k: torch.cosine_similarity(v, self.origin[k], dim=0) for k, v in vectors.items()})

    def dose(self, rnd: int) -> dict:
        """The dose with the most trait of which enough survives, and all [{coeff, ratio, survive}]."""
        vectors = self.rounds.steering(rnd)["vectors"]
        found = dict(coeff=0.0 if self.cfg.teacher == "prompt" else self.scfg.coeff, trials=[])
        if found["coeff"] is None:
            past = [e["coeff"] for e in self.folder.record.events if e["stage"] == "dose"]
            found = self.student.dose(rnd, self.limits, vectors, (past or [self.foreseen])[-1],
                                      min_survive=self.scfg.min_survive, system=self.system)
        self.rounds.save_vectors(rnd, vectors, coeff=repr(found["coeff"]))
        return found

    def made(self, rnd: int) -> dict:
        """Steered answers to the training prompts, each with the filter's verdict."""
        steering, student, n_make = self.rounds.steering(rnd), self.student, self.scfg.n_make
        made = student.answers(student.spread(n_make), "make", rnd, system=self.system, **steering)
        made = student.judged(made, self.limits)
        self.screen.say("filter", rnd, table.of_made(made, steering["coeff"]))
        n_kept, n_min = sum(e["verdict"]["kept"] for e in made), math.ceil(KEPT_LEAST * n_make)
        if n_kept < n_min:
            raise RuntimeError(f"{n_kept}/{n_make} completions passed the filter at dose "
                               f"{steering['coeff']:.3f}, need {n_min}; raise --n-make. {why_dropped(made)}")
        return dict(completions=made)

    def night(self, rnd: int) -> None:
        what = dict(steer="steered", prompt="prompted", both="steered and prompted")[self.cfg.teacher]
        steering = self.rounds.steering(rnd)
        row = self.row("steered", rnd, f"{what}, night {rnd}", system=self.system, **steering)
        if not table.has_moved(row):
            self.screen.say("steered", rnd, f"warning: this moves the trait by {row['moved']:+.3f} nats per "
                            f"token (se {row['moved_se']:.3f}), which may be nothing; try clearer persona "
                            "texts", "yellow")

    def tau(self, rnd: int, kept: list[steer.Completion]) -> float:
        """The barrier's set point in nats, calibrated in the first round that gets here."""
        if self.hcfg.tau is not None or self.hcfg.reg == "nll":
            return self.hcfg.tau or 0.0
        if past := self.folder.record.of("tau"):
            return past["tau"]
        how, scale = self.hcfg.kl_agg, self.cfg.tau_scale
        distance = self.student.persona_distance(kept, how, self.hcfg.reg)
        self.screen.say("tau", rnd, f"{scale * distance:.4f} nats ({how}): {scale:g} of the persona prompt's "
                        f"distance {distance:.4f}")
        return self.folder.event("tau", rnd, tau=scale * distance, distance=distance, kl_agg=how)["tau"]

    def heal(self, rnd: int) -> dict:
        """Train the adapter of this round on what was kept, and fold it."""
        cfg, stack, student = self.cfg, self.stack, self.student
        kept = student.kept(self.folder.record.completions(rnd))
        hcfg = dataclasses.replace(self.hcfg, tau=self.tau(rnd, kept))
        samples = [heal.Sample(c.prompt_ids + c.ids, len(c.prompt_ids), c.prompt) for c in kept]
        n_steps = hcfg.epochs * math.ceil(len(samples) / hcfg.heal_batch)

        def reference():
            return stack.gated(history=0 if cfg.kl_ref == "base" else 1, current=0)
        with warnings.catch_warnings(), self.screen.watch("heal", rnd, "training, steps", n_steps) as tick:
            warnings.filterwarnings("ignore", "the barrier")            # said below, in a line of its own
            record = heal.heal(student.model, stack.parameters(), samples, reference, hcfg, rnd=rnd, log=tick,
                               pad_id=student.pad_id, seed=stage_seed(cfg.seed, rnd, "heal"),
                               spectral=(lambda: size.spectral(stack)) if hcfg.spectral else None,
                               across=ranks.spread)
        self.screen.say("heal", rnd, table.of_heal(record))
        if record["warning"]:
            by = "--tau" if self.hcfg.tau is not None else f"--tau-scale, now {cfg.tau_scale:g}"
            self.screen.say("heal", rnd, f"warning: {record['warning']} ({by})", "yellow")
        worst = student.worst_kept(samples, reference, **self.rounds.steering(rnd), reg=hcfg.reg,
                                   pass_tokens=hcfg.pass_tokens)
        event = dict(record, worst=worst)
        stack.fold()
        self.rounds.save(rnd, "adapter", stack.tensors([stack.n_rounds - 1]))
        return event

    def day(self, rnd: int, n_before: int) -> dict:
        if self.stack.n_rounds == n_before:             # healed in an earlier sitting
            self.stack.load_tensors(self.rounds.adapter(rnd))
        return self.row("healed", rnd, f"day {rnd}")


# ---- the loop ------------------------------------------------------------------------------------------


def loop(cfg: LoopConfig, scfg, lcfg, hcfg, argv: list[str]) -> int:
    """Runs the rounds, prints the table, returns the exit code: 0 if a round was accepted, 3 if none was."""
    values = options.values([cfg, scfg, lcfg, hcfg])
    given = ranks.lead(inputs.load, **{name: values[name] for name in inputs.OPTIONS})
    notes = given.pop("notes")
    ranks.lead(check_out, Path(cfg.resume or cfg.out))
    date = ranks.lead(lambda: read(cfg.resume).run.get("date", "") if cfg.resume else template.today())
    screen = Screen()
    with Folder(Path(cfg.resume) if cfg.resume else None, screen, lambda x: table.show(x, screen)) as folder:
        model, tok = ranks.shared(models.load, cfg.model, revision=cfg.revision, dtype=cfg.dtype,
                                  device=cfg.device, quantize=cfg.quantize, date=date)
        run = Run(cfg, scfg, lcfg, hcfg, model, tok, folder, given)
        begin(folder, facts_of(model, tok, given, date), surroundings(model), argv,
              values | options.values([run.hcfg]), defaults=options.values(GROUPS), free=FREE,
              standing=lambda record: n_standing(record, cfg))
        screen.say("model", None, table.of_model(cfg.model, model, run.stack, run.adapted))
        notes += [*template.template_notes(tok), models.left_out(model, run.adapted)]
        for note in filter(None, notes):
            screen.say("note", None, note)
        run.measure_base()

        in_a_row, stopped = 0, ""
        for rnd in range(cfg.rounds):
            is_new = not folder.recall("gate", rnd)
            reasons = run.one_round(rnd)["reasons"]
            if is_new:
                table.show(folder.path, screen)
            text = "rolled back: " + one_line("; ".join(reasons)) if reasons else "accepted"
            screen.say("gate", rnd, text, "red" if reasons else "green")
            in_a_row = in_a_row + 1 if reasons else 0
            if in_a_row == cfg.patience:
                stopped = f"{in_a_row} rounds in a row were rolled back; the last: {'; '.join(reasons)}"
                break

        record, seconds = folder.record, time.time() - screen.start
        folder.save(status="accepted" if record.accepted else "no round accepted", accepted=record.accepted,
                    stopped=stopped, seconds=seconds, tau=(record.of("tau") or {}).get("tau", hcfg.tau),
                    limits=run.limits)
        table.close(folder, seconds)
    return 0 if record.accepted else 3


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv

    def command() -> int:
        if argv[:1] and argv[0] in WORDS:
            word = importlib.import_module(f"tools.{argv[0]}").main
            return word(argv[1:], GROUPS, parse) if argv[0] == "plan" else word(argv[1:])
        ranks.start()
        return ranks.end(loop(*ranks.lead(parse, argv), argv))
    return ended(command)


if __name__ == "__main__":
    sys.exit(main())
