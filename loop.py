"""Loop: steer, filter, heal, fold, evaluate, and again from the healed model.

    python loop.py --kl-agg rmse                    the embedded model, no network, minutes on a CPU
    python loop.py google/gemma-3-4b-it --kl-agg rmse      any chat model of the hub

One round, on the student = base + folded rounds:

    v      = fit_vectors(student)                       persona + minus persona -, where it is read
    coeff  = find_dose(...)                             the highest dose whose completions survive the filter
    kept   = [c for c in generate(student, v, coeff) if judge(c, base)]
    heal   : nll(kept) + lam * relu(D(student || base) - tau)
    gate   : finite, coherent on two scores, and more trait than the last accepted day; else the round is rolled back

Everything that depends on a model's scale is measured on the model itself and recorded: the filter's limits from the
base's own answers, bare and prompted; tau from how far the persona prompt alone takes the base from itself, on the
first kept completions; the steered blocks from where the persona is read; the dose by search; the learning rate from
the width. An explicit number on the command line overrides it.

Writes runs/<time>_<slug>/: run.json, events.jsonl, rounds/NN/{vectors,adapter}.safetensors, report.html and diary.md; and
one line in runs/results.tsv.
"""
import argparse
import contextlib
import dataclasses
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import typing
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save as pack

import evalmfv
import heal
import lora
import report
import steer

HERE = Path(__file__).resolve().parent


def opt(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class LoopConfig:
    """loop: rounds, data, gate"""
    model: str = opt("pocket", "hub id or local folder of a chat model; pocket = the embedded one")
    revision: str = opt("", "hub revision (branch, tag or commit); empty = the default branch")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = opt("auto", "weights of the base; auto = bfloat16 on a GPU, else float32")
    device: str = opt("auto", "cpu, cuda, mps, ...; auto = cuda if there is one")
    persona: str = opt("authority", "name in data/personas.json: authority (care over authority) or love")
    pos: str = opt("", "system prompt of the wanted persona (needs --neg); the prompts stay those of --persona or --prompts")
    neg: str = opt("", "system prompt of its opposite")
    target: Literal["", *evalmfv.FOUNDATIONS] = opt("", "foundation whose nats are the trait; empty = the persona's own")
    direction: Literal[-1, 0, 1] = opt(0, "+1 or -1: which way the trait counts; 0 = the persona's own")
    prompts: str = opt("", "text file, one prompt per line, every fourth held out; empty = the persona's in data/prompts.json")
    vignettes: str = opt("", "the probe's items, ours or the original's row format; empty = data/vignettes.jsonl")
    rounds: int = opt(8, "rounds of steer, filter, heal, fold, eval")
    seed: int = opt(0, "every stage draws from its own generator, seeded by (seed, round, stage)")
    kl_ref: Literal["base", "prev"] = opt("base", "the barrier's reference: the untouched model, or the student before the round")
    tau_scale: float = opt(1.5, "tau = this times the persona prompt's distance from the base; take less with --kl-ref prev")
    gate: bool = opt(True, "roll back a round that fails its gate; --no-gate accepts every finite round")
    coh_floor: float = opt(0.95, "lowest accepted coherence, on both scores, as a share of the base's")
    patience: int = opt(3, "stop after this many rejected rounds in a row")
    think_tokens: int = opt(128, "tokens the model may think before the probe interrupts it")
    eval_batch: int = opt(152, "probe frames per forward pass")
    n_text: int = opt(48, "sampled answers to held-out prompts behind the free-text coherence")
    n_diary: int = opt(6, "held-out prompts answered greedily for the diary")
    steered_rows: Literal["first", "all"] = opt("all", "measure steering alone in the first round only, or in every round")
    baselines: bool = opt(True, "measure prompting alone too")
    out: str = opt("runs", "folder of the run folders")

    def __post_init__(self):
        for name in ("rounds", "patience", "think_tokens", "eval_batch", "n_text", "n_diary"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        if bool(self.pos) != bool(self.neg):
            raise ValueError("--pos and --neg come together: the vector is the difference of two personas")
        if self.pos and not (self.target and self.direction):
            raise ValueError("--pos/--neg need --target and --direction, which say what the trait is (say --target care --direction 1)")
        if not 0 < self.coh_floor <= 1:
            raise ValueError(f"--coh-floor {self.coh_floor}: expected a share of the base's coherence in (0, 1]")


GROUPS = (LoopConfig, steer.SteerConfig, lora.LoraConfig, heal.HealConfig)


def parse(argv=None) -> list:
    """The dataclasses of all rooms as one command line; --help shows one group per file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help="the same as --model")
    for cls in GROUPS:
        group, hints = parser.add_argument_group(cls.__doc__), typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            kind, kw = hints[f.name], dict(default=f.default, help=f.metadata["help"])
            if kind is bool:
                kw["action"] = argparse.BooleanOptionalAction
            elif typing.get_origin(kind) is Literal:
                kw.update(choices=typing.get_args(kind), type=type(f.default))
            else:
                kw["type"] = kind
            names = dict.fromkeys(["--" + f.name.replace("_", "-"), "--" + f.name])
            group.add_argument(*names, **kw)
    args = vars(parser.parse_args(argv))
    if args["positional_model"]:
        args["model"] = args["positional_model"]
    try:
        return [cls(**{f.name: args[f.name] for f in dataclasses.fields(cls)}) for cls in GROUPS]
    except ValueError as error:
        parser.error(str(error))


# ---- files, seeds, lines ---------------------------------------------------------------------------------------------


def stage_seed(seed: int, rnd: int, stage: str) -> int:
    """One seed per stage: an evaluation that is added or left out changes no other stage's samples."""
    return zlib.crc32(f"{seed}/{rnd}/{stage}".encode())


def plain(x):
    """Tensors as lists, non-finite numbers as null: what JSON can hold."""
    if isinstance(x, torch.Tensor):
        x = x.tolist()
    if isinstance(x, dict):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if dataclasses.is_dataclass(x):
        return plain(dataclasses.asdict(x))
    return None if isinstance(x, float) and not math.isfinite(x) else x


class Folder:
    """The run folder. events.jsonl gets one whole line per event, flushed; run.json is rewritten whole."""

    def __init__(self, cfg: LoopConfig, options: dict, argv: list[str]):
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{Path(cfg.model).name}-{'custom' if cfg.pos else cfg.persona}").strip("-.")
        stem = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + "_" + slug
        self.path = next(p for n in range(1000) if not (p := Path(cfg.out) / (stem + (f"-{n}" if n else ""))).exists())
        (self.path / "rounds").mkdir(parents=True)
        self.start = time.time()
        rooms = b"".join((HERE / f"{name}.py").read_bytes() for name in ("loop", "steer", "lora", "heal", "evalmfv"))
        versions = dict(python=platform.python_version(), torch=torch.__version__, transformers=_version("transformers"))
        self.run = dict(status="running", argv=argv, command="python loop.py " + shlex.join(argv), options=options,
                        defaults={f.name: f.default for cls in GROUPS for f in dataclasses.fields(cls)},
                        seed=cfg.seed, started=time.time(), versions=versions, git=_git(), code=f"{zlib.crc32(rooms):08x}")
        self.save()

    def save(self, **more) -> None:
        self.run |= plain(more)
        lora.write_whole(self.path / "run.json", json.dumps(self.run, indent=1).encode())

    def event(self, stage: str, rnd: int | None = None, **more) -> None:
        with open(self.path / "events.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(plain(dict(t=round(time.time() - self.start, 2), round=rnd, stage=stage) | more)) + "\n")
            f.flush()
            os.fsync(f.fileno())

    def say(self, stage: str, rnd: int | None, line: str) -> None:
        print(f"{time.time() - self.start:6.0f} s  {'setup' if rnd is None else f'r{rnd}':5s}  {stage:9s}  {line}", flush=True)


def _version(package: str) -> str:
    from importlib.metadata import version                      # transformers itself is slow: imported with the model
    return version(package)


def fingerprint(model) -> str:
    """A checksum of the base's weights, from each tensor's name and sum: arms of one comparison have the same base."""
    sums = "".join(f"{name} {p.detach().double().sum().item():.9e}\n" for name, p in model.named_parameters())
    return f"{zlib.crc32(sums.encode()):08x}"


def _git() -> str:
    """Commit of this checkout, with + if files differ from it; "" outside git."""
    def ask(*words):
        return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True).stdout.strip()
    with contextlib.suppress(FileNotFoundError):
        return ask("rev-parse", "HEAD") + ("+" if ask("status", "--porcelain", "--untracked-files=no") else "")
    return ""


# ---- what comes in ---------------------------------------------------------------------------------------------------


def load_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None


def load_persona(cfg: LoopConfig) -> dict:
    """pos and neg texts, target foundation, direction, patterns of narration; from the data or from --pos/--neg."""
    if cfg.pos:
        return dict(pos=[cfg.pos], neg=[cfg.neg], target=cfg.target, direction=cfg.direction, patterns=[])
    personas = load_json(HERE / "data" / "personas.json")
    if cfg.persona not in personas:
        raise ValueError(f"--persona {cfg.persona!r}: data/personas.json has {', '.join(personas)}; or give --pos and --neg")
    persona = dict(personas[cfg.persona])
    return persona | dict(target=cfg.target or persona["target"], direction=cfg.direction or persona["direction"])


def load_prompts(cfg: LoopConfig) -> tuple[list[str], list[str]]:
    """(training, held-out) prompts. Dose, filter and heal see the first; the tables and the diary show the second."""
    if cfg.prompts:
        lines = [line.strip() for line in Path(cfg.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
        if len(lines) < 8:
            raise ValueError(f"--prompts {cfg.prompts}: {len(lines)} prompts, need at least 8 (every fourth is held out)")
        return [x for i, x in enumerate(lines) if i % 4], lines[::4]
    everything = load_json(HERE / "data" / "prompts.json")
    if cfg.persona not in everything:
        raise ValueError(f"--persona {cfg.persona!r}: data/prompts.json has {', '.join(everything)}; or give --prompts")
    return everything[cfg.persona]["train"], everything[cfg.persona]["held_out"]


def load_model(cfg: LoopConfig):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, cfg.dtype if cfg.dtype != "auto" else "bfloat16" if device == "cuda" else "float32")
    where = str(HERE / "pocket") if cfg.model == "pocket" else cfg.model
    more = {"revision": cfg.revision} if cfg.revision else {}
    try:
        tok = AutoTokenizer.from_pretrained(where, **more)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **more).to(device).eval()
    except OSError as error:
        raise ValueError(f"model {cfg.model!r} could not be loaded: {str(error).splitlines()[0]}") from None
    if not tok.chat_template:
        raise ValueError(f"model {cfg.model!r} has no chat template: a persona needs one; try its -it or -Instruct sibling")
    return model, tok


# ---- the measured rows -----------------------------------------------------------------------------------------------


class Bench:
    """What is measured on held-out items, the same for every row of the table: the probe, free text, the diary."""

    def __init__(self, model, tok, stack, cfg, sampling, persona, vignettes, held_out):
        self.model, self.tok, self.stack, self.cfg, self.sampling, self.persona = model, tok, stack, cfg, sampling, persona
        self.vignettes, self.held_out = vignettes, held_out
        self.base = self.own = None             # the base's row; its own answers to training prompts, with their nll

    def base_nll(self, completions) -> list[torch.Tensor]:
        """nats per completion token under the untouched model, whatever is folded: the one yardstick of coherence."""
        with self.stack.gated(0, 0):
            return steer.token_nll(self.model, completions, pad_id=steer.pad_of(self.tok))

    def bare(self, completions, prompts) -> list:
        """Answers given under a system prompt, to be judged as answers to the bare question."""
        fronts = steer.encode(self.tok, prompts, [""] * len(prompts))
        return [dataclasses.replace(c, prompt_ids=fronts[c.prompt % len(fronts)]) for c in completions]

    def row(self, label: str, *, system="", vectors=None, coeff=0.0) -> dict:
        cfg, tok = self.cfg, self.tok
        with steer.steered(self.model, vectors, coeff) if vectors else contextlib.nullcontext():
            probe = evalmfv.evaluate(self.model, tok, self.vignettes, think_tokens=cfg.think_tokens,
                                     batch_size=cfg.eval_batch, system=system)

        def answers(prompts, greedy=False):                     # the same draws for every row: rows differ by their model
            return steer.generate(self.model, tok, prompts, system=system, vectors=vectors, greedy=greedy,
                                  coeffs=[coeff] * len(prompts) if vectors else None,
                                  seed=stage_seed(cfg.seed, 0, "text"), **self.sampling)
        texts = answers([self.held_out[i % len(self.held_out)] for i in range(cfg.n_text)])
        diary = answers(self.held_out[:cfg.n_diary], greedy=True)

        def coherent(said):
            read = self.bare(said, self.held_out) if system else said
            return evalmfv.free_text([c.ids for c in read], self.base_nll(read), [c.ids for c in self.own[0]], self.own[1])
        free, told = coherent(texts), coherent(diary)
        row = dict(label=label, probe=probe, nats=probe["nats"], coherence=probe["coherence"], coeff=coeff,
                   text=free["score"], text_se=free["se"], texts=[c.text for c in texts],
                   diary=[dict(prompt=self.held_out[c.prompt], text=c.text, coherence=share)
                          for c, share in zip(diary, told["per_item"])])
        move = evalmfv.shift(probe, (self.base or row)["probe"], self.persona["target"], self.persona["direction"])
        return row | dict(trait=move["trait"] + 0.0, trait_se=move["se"], shift=move)      # -0.0 + 0.0 is 0.0


def gate(now: dict, last: dict, base: dict, cfg: LoopConfig) -> list[str]:
    """Why this day is not accepted; empty if it is. Absolute conditions come before the relative one."""
    numbers = {"trait": now["trait"], "coherence": now["coherence"], "text": now["text"]}
    bad = [name for name, x in numbers.items() if not math.isfinite(x)]
    if bad:
        return [f"{', '.join(bad)} not finite"]
    reasons = []
    for name in ("coherence", "text"):
        floor = cfg.coh_floor * base[name]
        if now[name] < floor:
            reasons.append(f"{name} {now[name]:.3f} under {floor:.3f} ({cfg.coh_floor:g} of the base's {base[name]:.3f})")
    if now["trait"] <= last["trait"]:
        reasons.append(f"trait {now['trait']:+.3f} nats is no more than the last accepted {last['trait']:+.3f}")
    return reasons if cfg.gate else []


def persona_distance(model, tok, kept, prompts: list[str], system: str, how: str, direction: str) -> float:
    """How far the persona prompt alone takes the base from itself, on the kept completions: mean D, in nats.

    It makes tau a set point: a healed model may stand about as far from the base as the prompted base does. Both
    readings are of the same completion tokens; only the system prompt in front of them differs.
    """
    def logits(completion, front):
        ids = steer.encode(tok, [prompts[completion.prompt]], [front])[0] + completion.ids
        ids = torch.tensor([ids], device=model.device)                              # [1, T]
        return model(input_ids=ids).logits[0, -len(completion.ids) - 1:-1]           # [N, V]
    divergence = heal.forward_kl if direction == "kl_fwd" else heal.reverse_kl
    with torch.no_grad():
        distances = [heal.aggregate(divergence(logits(c, system), logits(c, "")), how).item() for c in kept]
    return sum(distances) / len(distances)


def tail_ppl(verdicts) -> float:
    """Perplexity of the answers' tails under the base, the geometric mean over answers."""
    return math.exp(sum(math.log(max(v.readings["ppl_tail"], 1.0)) for v in verdicts) / len(verdicts))


@torch.no_grad()
def worst_kept(model, tok, samples, reference, before, vectors, coeff, hcfg) -> dict:
    """The kept completion that the healed model leaves furthest from the reference (rmse), with its KL at every token.

    before: a context manager under which the model is the student as the round began; `night` is that student steered.
    Returns {prompt, tokens, day, before, night}, the last three [n] in nats.
    """
    pad_id = steer.pad_of(tok)
    kls = heal.divergences(model, samples, reference, reg=hcfg.reg, batch_size=hcfg.micro_batch, pad_id=pad_id)
    worst = max(range(len(kls)), key=lambda i: heal.aggregate(kls[i], "rmse").item())

    def logits():
        return heal.completion_rows(model, samples[worst:worst + 1], pad_id)[0]                 # [n, V]
    with reference():
        ref = logits()
    with before():
        start = heal.DIVERGENCES[hcfg.reg](logits(), ref)                                       # [n]
        with steer.steered(model, vectors, coeff):
            night = heal.DIVERGENCES[hcfg.reg](logits(), ref)                                   # [n]
    ids = samples[worst].ids[samples[worst].n_prompt:]
    texts = [tok.decode(ids[:n]) for n in range(len(ids) + 1)]              # a token decoded alone may lose its space
    return dict(prompt=samples[worst].group, tokens=[b[len(a):] for a, b in zip(texts, texts[1:])], day=kls[worst],
                before=start, night=night)


# ---- the loop --------------------------------------------------------------------------------------------------------


def loop(cfg: LoopConfig, scfg, lcfg, hcfg, argv: list[str]) -> int:
    """Runs the rounds, prints the table, returns the exit code: 0 if a round was accepted, 3 if none was."""
    persona, (train, held_out) = load_persona(cfg), load_prompts(cfg)
    vignettes = evalmfv.load_vignettes(cfg.vignettes or HERE / "data" / "vignettes.jsonl")
    contexts = load_json(HERE / "data" / "contexts.json")
    model, tok = load_model(cfg)
    n_blocks, width = len(steer.blocks(model)), model.config.get_text_config().hidden_size
    lora_layers = steer.band(n_blocks, lcfg.lora_from, lcfg.lora_to)
    steer_layers, strength = steer.find_layers(model, tok, persona["pos"], persona["neg"], contexts)
    if scfg.steer_to:
        steer_layers = steer.band(n_blocks, scfg.steer_from, scfg.steer_to)
    hcfg = dataclasses.replace(hcfg, lr=hcfg.lr or 0.2 / width)
    stack = lora.attach(model, r=lcfg.r, alpha=lcfg.alpha, layers=lora_layers, seed=cfg.seed)
    sampling = dict(max_new_tokens=scfg.max_new_tokens, temperature=scfg.temperature, top_p=scfg.top_p, top_k=scfg.top_k,
                    batch_size=scfg.gen_batch)

    options = {f.name: getattr(c, f.name) for c in (cfg, scfg, lcfg, hcfg) for f in dataclasses.fields(c)}
    options |= dict(target=persona["target"], direction=persona["direction"])
    folder = Folder(cfg, options, argv)
    machine = dict(system=platform.platform(), device=str(model.device), dtype=str(model.dtype), threads=torch.get_num_threads(),
                   gpu=torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "")
    folder.save(weights=fingerprint(model), items=dict(train=train, held_out=held_out), machine=machine)
    print(folder.run["command"])
    n_trained, dtype = sum(p.numel() for p in stack.parameters()), str(next(model.parameters()).dtype).removeprefix("torch.")
    folder.say("model", None, f"{cfg.model}: {n_blocks} blocks of width {width}, {dtype}, steer {steer_layers}, "
               f"lora {lora_layers[0]}-{lora_layers[-1]} rank {lcfg.r}, {n_trained:,} trained parameters")

    folder.event("layers", steer=steer_layers, lora=lora_layers, strength=strength)

    # ---- what the base itself does: the filter's limits, then the rows of the table that need no round
    bench = Bench(model, tok, stack, cfg, sampling, persona, vignettes, held_out)

    def spread(n):
        return [train[i % len(train)] for i in range(n)]

    def make(prompts, stage, rnd, vectors=None, coeff=0.0, system=""):
        return steer.generate(model, tok, prompts, system=system, vectors=vectors, seed=stage_seed(cfg.seed, rnd, stage),
                              coeffs=[coeff] * len(prompts) if vectors else None, **sampling)
    own = make(spread(scfg.n_make), "own", 0)
    # the trait itself is no incoherence: what the prompted base says must pass the filter too
    voiced = bench.bare(make(spread(scfg.n_make), "own", 0, system=persona["pos"][0]), train)
    bench.own = own, bench.base_nll(own)
    seen = zip(own + voiced, bench.own[1] + bench.base_nll(voiced))
    limits = steer.calibrate_limits([steer.readings(c, nll, window=scfg.window) for c, nll in seen], scfg)
    folder.event("limits", limits=limits, own=[c.text for c in own], voiced=[c.text for c in voiced])
    folder.say("limits", None, "  ".join(f"{k} {v:.3g}" for k, v in dataclasses.asdict(limits).items()))

    def verdicts(completions):
        return steer.judge(completions, bench.base_nll(completions), limits, window=scfg.window,
                           patterns=persona["patterns"], keep_unfinished=scfg.keep_unfinished)

    rows = []

    def measured(kind, rnd, label, **how):
        row = bench.row(label, **how) | dict(round=rnd, kind=kind)
        rows.append(row)
        folder.event("row", rnd, **{k: v for k, v in row.items() if k != "round"})
        folder.say(kind, rnd, f"trait {row['trait']:+.3f} nats (se {row['trait_se']:.3f})  coherence {row['coherence']:.4f}  "
                   f"text {row['text']:.3f} (se {row['text_se']:.3f})")
        return row
    base = bench.base = measured("base", None, "base")
    if cfg.baselines:
        measured("prompted", None, "prompted", system=persona["pos"][0])

    def reference():
        return stack.gated(history=0 if cfg.kl_ref == "base" else 1, current=0)
    tau = hcfg.tau
    with stack.gated(0, 0):                                     # what every round's vector is compared with
        origin = steer.fit_vectors(model, tok, persona["pos"], persona["neg"], contexts, steer_layers)

    def one_round(rnd) -> tuple[dict, dict, float]:
        """(the day's row, vectors, dose). RuntimeError: no dose survives, too little is kept, a number is not finite."""
        nonlocal tau
        vectors = steer.fit_vectors(model, tok, persona["pos"], persona["neg"], contexts, steer_layers)
        folder.event("vector", rnd, norm={k: v.norm() for k, v in vectors.items()},
                     cosine={k: torch.cosine_similarity(v, origin[k], dim=0) for k, v in vectors.items()})
        rng = torch.Generator().manual_seed(stage_seed(cfg.seed, rnd, "probed prompts"))
        probed = [train[i] for i in torch.randperm(len(train), generator=rng).tolist()[:scfg.n_probe]]

        def survival(coeff):
            found = verdicts(make(probed, "probe", rnd, vectors, coeff))
            share = sum(v.kept for v in found) / len(found)
            folder.event("probe", rnd, coeff=coeff, survive=share, ppl=tail_ppl(found))
            return share
        coeff, trials = (scfg.coeff, []) if scfg.coeff else steer.find_dose(
            survival, coeff_min=scfg.coeff_min, steps=scfg.dose_steps, min_survive=scfg.min_survive)
        folder.event("dose", rnd, coeff=coeff, trials=trials)

        made = make(spread(scfg.n_make), "make", rnd, vectors, coeff)
        found = verdicts(made)
        kept = [c for c, v in zip(made, found) if v.kept]
        for c, v in zip(made, found):
            folder.event("completion", rnd, prompt=c.prompt % len(train), coeff=c.coeff, finished=c.finished, ids=c.ids, text=c.text,
                         verdict=v)
        rules = [v.rule for v in found if not v.kept]
        dropped = "  ".join(f"{rule} {rules.count(rule)}" for rule in sorted(set(rules)))
        folder.say("filter", rnd, f"dose {coeff:.3f}  kept {len(kept)}/{len(made)}  {dropped and 'dropped: ' + dropped}")
        if len(kept) < scfg.n_min:
            raise RuntimeError(f"{len(kept)} of {len(made)} completions passed the filter at dose {coeff:.3f}, need {scfg.n_min} "
                               f"(dropped: {dropped}); raise --n-make or --slack")
        if cfg.steered_rows == "all" or not any(row["kind"] == "steered" for row in rows):
            measured("steered", rnd, f"steered, night {rnd}", vectors=vectors, coeff=coeff)

        if not tau and hcfg.reg != "nll":
            with stack.gated(0, 0):
                distance = persona_distance(model, tok, kept, spread(scfg.n_make), persona["pos"][0], hcfg.kl_agg, hcfg.reg)
            tau = cfg.tau_scale * distance
            folder.event("tau", rnd, tau=tau, distance=distance, kl_agg=hcfg.kl_agg)
            folder.say("tau", rnd, f"{tau:.4f} nats ({hcfg.kl_agg}): {cfg.tau_scale:g} of the persona prompt's distance {distance:.4f}")
        samples = [heal.Sample(c.prompt_ids + c.ids, len(c.prompt_ids), c.prompt % len(train)) for c in kept]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the barrier")                # said below, in a line of its own
            record = heal.heal(model, stack.parameters(), samples, reference, hcfg, tau=tau, rnd=rnd, pad_id=steer.pad_of(tok),
                               seed=stage_seed(cfg.seed, rnd, "heal"), spectral=stack.spectral if hcfg.spectral else None)
        folder.event("heal", rnd, norm=stack.norm(), singular=stack.singular_values(), **record)
        folder.event("worst", rnd, **worst_kept(model, tok, samples, reference, lambda: stack.gated(1, 0), vectors, coeff, hcfg))
        val = f"  val {record['val_nll_before']:.3f} -> {record['val_nll_after']:.3f}" if record["n_val"] else ""
        fired = f"fired in {record['fired_share']:.0%} of {len(record['steps'])} steps" if record["lam_eff"] else "no barrier"
        folder.say("heal", rnd, f"nll {record['nll_first']:.3f} -> {record['nll_last']:.3f}{val}  "
                   f"D {record['steps'][-1]['div']:.4f}  {fired}")
        if record["warning"]:
            folder.say("heal", rnd, f"warning: {record['warning']}")
        return measured("healed", rnd, f"day {rnd}"), vectors, coeff

    accepted, in_a_row, stopped, last = [], 0, "", base
    for rnd in range(cfg.rounds):
        # ---- one round: accept and fold, or roll back ------------------------------------------------------------------------
        try:
            day, vectors, coeff = one_round(rnd)
            reasons = gate(day, last, base, cfg)
            day["accepted"] = not reasons
        except torch.OutOfMemoryError:
            raise RuntimeError(f"out of memory in round {rnd}: lower --gen-batch, --eval-batch or --micro-batch") from None
        except RuntimeError as error:
            reasons = [str(error)]
        if reasons:
            stack.drop()
        else:
            stack.fold()
            path = folder.path / "rounds" / f"{rnd:02d}"
            path.mkdir()
            packed = pack({f"layer.{k}": v.contiguous() for k, v in vectors.items()}, {"coeff": repr(coeff)})
            lora.write_whole(path / "vectors.safetensors", packed)
            stack.save(path / "adapter.safetensors", rounds=[stack.n_rounds - 1])
            accepted.append(rnd)
            last = day
        # -------------------------------------------------------------------------------------------------------------
        folder.event("gate", rnd, accepted=not reasons, reasons=reasons)
        folder.say("gate", rnd, "accepted" if not reasons else "rolled back: " + "; ".join(reasons))
        in_a_row = in_a_row + 1 if reasons else 0
        if in_a_row == cfg.patience:
            stopped = f"{cfg.patience} rounds in a row were rolled back, the last because: {'; '.join(reasons)}"
            break

    seconds = time.time() - folder.start
    folder.save(status="accepted" if accepted else "no round accepted", accepted=accepted, stopped=stopped, seconds=seconds,
                tau=tau, limits=limits)
    report.write(folder.path)
    tally(folder, rows, last if accepted else None, seconds)
    if stopped:
        print(f"stopped: {stopped}")
    print(f"\nrepeat   {folder.run['command']}\nread     {folder.path}/diary.md")
    return 0 if accepted else 3


def tally(folder: Folder, rows: list[dict], final: dict | None, seconds: float) -> None:
    """The closing table, and this run's line of results.tsv, where arms and seeds lie side by side."""
    print("\n| row | dose | trait, nats | target, nats | off-target | coherence | text | |\n|" + "---|" * 8)
    for row in rows:
        move, verdict = row["shift"], {True: "accepted", False: "rolled back"}.get(row.get("accepted"), "")
        print(f"| {row['label']} | {row['coeff']:.2f} | {row['trait']:+.3f} ± {row['trait_se']:.3f} | {row['nats'][move['target']]:.3f} | "
              f"{move['off_target']:.3f} | {row['coherence']:.4f} | {row['text']:.3f} | {verdict} |")
    first = next((r for r in rows if r["kind"] == "steered"), None)
    if final:
        share = f", {final['trait'] / first['trait']:.0%} of steering's in round {first['round']}" if first and first["trait"] > 0 else ""
        print(f"\nfinal: {final['label']}: trait {final['trait']:+.3f} nats{share}, "
              f"text coherence {final['text'] / rows[0]['text']:.1%} of the base's, {seconds:.0f} s")
    options = folder.run["options"]
    keys = ("model", "persona", "pos", "reg", "kl_agg", "kl_ref", "seed", "rounds", "gate")
    day = {key: final[key] if final else None for key in ("label", "trait", "coherence", "text")}
    line = {"run": folder.path.name, **{k: options[k] for k in keys}, **day, "steered": first["trait"] if first else None, "seconds": round(seconds)}
    path = folder.path.parent / "results.tsv"
    with open(path, "a", encoding="utf-8") as f:
        if not f.tell():
            f.write("\t".join(line) + "\n")
        f.write("\t".join("" if v is None else str(v) for v in line.values()) + "\n")


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    configs = parse(argv)
    try:
        return loop(*configs, argv)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"loop.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("loop.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
