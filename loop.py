"""Loop: steer, filter, heal, fold, evaluate, and again from the healed model.

    python loop.py --kl-agg rmse                    the embedded model, no network, minutes on a CPU
    python loop.py google/gemma-3-4b-it --kl-agg rmse      any chat model of the hub
    python loop.py chat RUN --compare                      talk to a finished run: base | prompted | day N

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

Writes runs/<time>_<slug>/: run.json, events.jsonl, rounds/NN/{vectors,adapter}.safetensors, diary.md; and one line in
runs/results.tsv. What is measured goes through events.jsonl and is read back from there, so that a run which was killed
at any point continues with the same numbers: python loop.py --resume RUN

Exit codes: 0 a round was accepted, 1 the run died (run.json says why), 2 bad usage, 3 no round was accepted,
130 interrupted.
"""
import argparse
import contextlib
import dataclasses
import errno
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import typing
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from jinja2.exceptions import TemplateError
from safetensors import SafetensorError

import evalmfv
import heal
import lora
import report
import steer

try:
    import fcntl
except ImportError:                                             # not on Windows: there, nothing keeps a second process out
    fcntl = None

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"


def opt(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class LoopConfig:
    """loop: rounds, data, gate"""
    model: str = opt("pocket", "hub id or local folder of a chat model; pocket = the embedded one")
    revision: str = opt("", "hub revision (branch, tag or commit); empty = the default branch")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = opt("auto", "weights of the base; auto = bfloat16 on a GPU that has it, else float32")
    device: str = opt("auto", "cpu, cuda (ROCm too), cuda:1, mps, xpu, ...; auto = cuda if there is one")
    device_map: Literal["", "auto"] = opt("", "auto = spread the model over all GPUs (needs the package accelerate)")
    attn: str = opt("", "attention: eager, sdpa, flash_attention_2, ...; empty = what transformers chooses")
    quantize: Literal["", "4bit"] = opt("", "load the base in 4 bits (needs the packages bitsandbytes and accelerate)")
    dry_run: bool = opt(False, "say what the run would need, from the model's configuration alone, and stop")
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
    batch_size: int = opt(0, "rows of every batch of answers and probe frames, for exact repeats; 0 = --gen-batch and --eval-batch")
    n_text: int = opt(48, "sampled answers to held-out prompts behind the free-text coherence")
    n_diary: int = opt(6, "held-out prompts answered greedily for the diary")
    steered_rows: Literal["first", "all"] = opt("all", "measure steering alone in the first round only, or in every round")
    baselines: bool = opt(True, "measure prompting alone too")
    out: str = opt("runs", "folder of the run folders")
    resume: str = opt("", "run folder to continue, with its own options; only --rounds may be raised")

    def __post_init__(self):
        for name in ("rounds", "patience", "think_tokens", "eval_batch", "n_text", "n_diary"):
            if not 1 <= getattr(self, name) <= 1e6:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected a number from 1 to a million")
        for name in ("model", "persona", "out"):
            if not getattr(self, name).strip():
                raise ValueError(f"--{name} is empty: leave it out for the default")
        for name in ("pos", "neg"):
            if getattr(self, name):
                check_text(f"--{name}", getattr(self, name))
        if not 0 < self.tau_scale < math.inf:
            raise ValueError(f"--tau-scale {self.tau_scale}: expected a finite number above 0")
        if bool(self.pos) != bool(self.neg):
            raise ValueError("--pos and --neg come together: the vector is the difference of two personas")
        if self.pos and not (self.target and self.direction):
            raise ValueError("--pos/--neg need --target and --direction, which say what the trait is (say --target care --direction 1)")
        if self.pos and self.pos == self.neg:
            raise ValueError("--pos and --neg are the same text: their difference, the vector, would be zero")
        if not 0 < self.coh_floor <= 1:
            raise ValueError(f"--coh-floor {self.coh_floor}: expected a share of the base's coherence in (0, 1]")


GROUPS = (LoopConfig, steer.SteerConfig, lora.LoraConfig, heal.HealConfig)


def parse(argv=None) -> list:
    """The dataclasses of all rooms as one command line; --help shows one group per file."""
    parser = argparse.ArgumentParser(prog="loop.py", usage="python loop.py [MODEL] [--option value ...]    (--help lists them)",
                                     description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     epilog="python loop.py chat --help: talk to a finished run; python lora.py export --help: serve it")
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
    try:
        if args["resume"]:                                      # what is not given now stays as it was
            then = recorded_options(Path(args["resume"]))
            args = vars(parser.parse_args(argv, argparse.Namespace(**then)))
        if args["positional_model"] is not None:
            args["model"] = args["positional_model"]
        if args["resume"]:
            if args["dry_run"]:
                raise ValueError("--resume and --dry-run: a plan is for a run that has not begun; leave one out")
            refuse_other_options(then, args)
        for name, value in args.items():
            if isinstance(value, list) or isinstance(value, str) and "\0" in value:     # argparse makes [] of --name=--
                raise ValueError(f"--{name.replace('_', '-')} {value!r:.60}: not a value it can have")
        if args["batch_size"]:
            args["gen_batch"] = args["eval_batch"] = args["batch_size"]
        configs = [cls(**{f.name: args[f.name] for f in dataclasses.fields(cls)}) for cls in GROUPS]
        refuse_contradictions(*configs)
    except (ValueError, OSError) as error:
        parser.error(one_line(error))
    return configs


def refuse_contradictions(cfg, scfg, lcfg, hcfg) -> None:
    """Options that are each fine and together mean something else than they say."""
    if hcfg.reg == "nll" and hcfg.tau:
        raise ValueError(f"--reg nll and --tau {hcfg.tau}: without a barrier there is no tau; leave one of them out")
    if hcfg.tau and cfg.tau_scale != LoopConfig.tau_scale:
        raise ValueError(f"--tau {hcfg.tau} and --tau-scale {cfg.tau_scale}: the scale is for a calibrated tau, "
                         "leave one out")
    if scfg.min_words > scfg.max_new_tokens:
        raise ValueError(f"--min-words {scfg.min_words} and --max-new-tokens {scfg.max_new_tokens}: no answer is that long")


def recorded_options(folder: Path) -> dict:
    """The options of a run folder, checked as if they had been typed; ValueError if it is not a run."""
    if "\0" in str(folder) or not (folder / "run.json").is_file():
        raise ValueError(f"--resume {folder}: not a run folder, it has no run.json")
    options = load_json(folder / "run.json", dict).get("options")
    known = {f.name: (f.default, typing.get_type_hints(cls)[f.name]) for cls in GROUPS for f in dataclasses.fields(cls)}
    if not isinstance(options, dict):
        raise ValueError(f"{folder}/run.json: its options are missing; the file is damaged")
    for name, value in options.items():
        default, kind = known.get(name, (value, None))
        choices = typing.get_args(kind) or (value,)
        if type(value) is not type(default) or value not in choices:
            raise ValueError(f"{folder}/run.json: option {name} is {value!r:.60}; the file is damaged")
    return {name: value for name, value in options.items() if name in known} | {"resume": ""}


def refuse_other_options(then: dict, now: dict) -> None:
    names = [name for name in then if now[name] != then[name] and name not in ("rounds", "out", "resume")]
    if names:
        raise ValueError(f"--resume {now['resume']}: that run has another configuration: "
                         + ", ".join(f"{name} is {then[name]!r} there and {now[name]!r} here" for name in names)
                         + "; leave these out, or start a new run without --resume")
    if now["rounds"] < then.get("rounds", 0):
        raise ValueError(f"--rounds {now['rounds']}: the run was made for {then['rounds']}, which may only grow")


def one_line(error) -> str:
    """An error as one sentence for the terminal, whatever it quotes."""
    return steer.printable(" ".join(str(error).split()))[:1000] or type(error).__name__


# ---- seeds, numbers, versions ----------------------------------------------------------------------------------------


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


def fingerprint(model) -> str:
    """A checksum of the base's weights, from each tensor's name and sum: arms of one comparison have the same base."""
    def total(p):
        return p.detach().sum(dtype=torch.float32 if p.device.type == "mps" else torch.float64).item()      # mps has no doubles
    sums = "".join(f"{name} {total(p):.9e}\n" for name, p in model.named_parameters())
    return f"{zlib.crc32(sums.encode()):08x}"


def surroundings(model) -> dict:
    """What else a number depends on: versions, threads, device, this code."""
    from importlib.metadata import version                      # transformers itself is slow: imported with the model
    rooms = b"".join((HERE / f"{name}.py").read_bytes() for name in ("loop", "steer", "lora", "heal", "evalmfv"))
    versions = dict(python=platform.python_version(), torch=torch.__version__, transformers=version("transformers"))
    machine = dict(system=platform.platform(), device=str(model.device), dtype=str(model.dtype), threads=torch.get_num_threads(),
                   gpu=torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "")
    return dict(versions=versions, machine=machine, git=_git(), code=f"{zlib.crc32(rooms):08x}")


def _git() -> str:
    """Commit of this checkout, with + if files differ from it; "" outside git."""
    def ask(*words):
        return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True).stdout.strip()
    with contextlib.suppress(FileNotFoundError):
        return ask("rev-parse", "HEAD") + ("+" if ask("status", "--porcelain", "--untracked-files=no") else "")
    return ""


# ---- the terminal ----------------------------------------------------------------------------------------------------


class Screen:
    """A line per event: time, round, stage, text. On a terminal also one live line that says how far a stage is."""

    def __init__(self):
        self.start = time.time()                                # of the run, in all its sittings
        self.is_live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.has_colour = self.is_live and not os.environ.get("NO_COLOR")

    def line(self, stage: str, rnd: int | None, text: str) -> str:
        return f"{time.time() - self.start:6.0f} s  {'setup' if rnd is None else f'r{rnd}':5s}  {stage:9s}  {text}"

    def say(self, stage: str, rnd: int | None, text: str, colour: str = "") -> None:
        code = {"green": 32, "red": 31, "yellow": 33}.get(colour) if self.has_colour else None
        print(self.line(stage, rnd, f"\x1b[{code}m{text}\x1b[0m" if code else text), flush=True)

    @contextlib.contextmanager
    def watch(self, stage: str, rnd: int | None, what: str, total: int, model=None):
        """The live line: `what`, how much of `total` is done, rate and time left if it takes more than five seconds.

        Gives a function to call at each step; with a model, its forward passes are the steps. total may be too high.
        """
        begin = shown = time.time()
        done, width = 0, shutil.get_terminal_size().columns - 1

        def tick(*_):
            nonlocal done, shown
            done, now = done + 1, time.time()
            if self.is_live and now - shown > 0.2:
                shown, left = now, max(total - done, 0) * (now - begin) / done
                pace = f"  {done / (now - begin):.1f}/s  {left:.0f} s left" if now - begin + left > 5 else ""
                line = self.line(stage, rnd, f"{what}  {done}/{total}{pace}")
                print("\r" + line[:width].ljust(width), end="", flush=True)
        handle = model.register_forward_hook(tick) if model is not None and self.is_live else None
        try:
            yield tick
        finally:
            if handle:
                handle.remove()
            if shown != begin:
                print("\r" + " " * width + "\r", end="", flush=True)


# ---- the run folder --------------------------------------------------------------------------------------------------


class RunDied(RuntimeError):
    """The run ended by an error after its folder was made: not a matter of usage, and it can be continued."""


class Folder:
    """The run folder. events.jsonl is the journal: one whole line per event, flushed; run.json is rewritten whole.

    Whatever later stages need of a stage is in its events, and is taken from there at once (`once`, `recall`). So a
    run that continues reads the same numbers as one that was never stopped. Inside its `with`, a first Ctrl-C or SIGTERM
    waits for the current write, a second one ends the process at once, and a run that stops early is marked in run.json.
    """

    def __init__(self, cfg: LoopConfig, screen: Screen):
        self.cfg, self.screen, self.events, self.run, self.old_handlers = cfg, screen, [], {}, {}
        self.path, self.lock = Path(cfg.resume) if cfg.resume else None, None
        self.is_writing = self.is_asked = self.is_pending = False

    # ---- signals, lock, the end

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                if hasattr(signal, name):                       # no SIGHUP on Windows
                    self.old_handlers[name] = signal.signal(getattr(signal, name), self._on_signal)
        try:
            if self.path:
                self._lock()
        except BaseException:
            self._leave()
            raise
        return self

    def _on_signal(self, *_):
        if self.is_asked:
            os._exit(130)
        self.is_asked = True
        if self.is_writing:
            self.is_pending = True
        else:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def writing(self, path: Path):
        """A signal waits until this is done; an error of the file system becomes one sentence."""
        self.is_writing = True
        try:
            yield
        except OSError as error:
            why = {errno.ENOSPC: "the disk is full", errno.EROFS: "the file system is read-only", errno.EACCES: "no permission",
                   errno.ENOENT: "the run folder or this file was removed"}.get(error.errno, error.strerror or str(error))
            raise OSError(f"{path} could not be written: {why}") from error
        finally:
            self.is_writing = False
        if self.is_pending:
            self.is_pending = False
            raise KeyboardInterrupt

    def _lock(self) -> None:
        """Keep other processes out for as long as this one lives; the system lets go of the lock when it dies."""
        with self.writing(self.path / ".lock"):
            lock = open(self.path / ".lock", "a+", encoding="utf-8", errors="replace")
            lock.seek(0)
            owner = steer.printable(lock.read(200))
            try:
                if fcntl:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise ValueError(f"{self.path} is in use by {owner}: wait for it, or end it and try again") from None
            except OSError as error:
                self.screen.say("lock", None, f"this file system keeps none ({error.strerror}): one process at a time, please")
            if owner:
                self.screen.say("lock", None, f"left behind by {owner}, which is gone: taken over")
            self.lock = lock
            lock.truncate(0)
            now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            lock.write(f"process {os.getpid()} on {platform.node()}, started {now}")
            lock.flush()

    def _leave(self) -> None:
        if self.lock:
            with contextlib.suppress(OSError):                  # a full disk or a deleted folder is no reason to stay
                self.lock.truncate(0)
            self.lock.close()
            self.lock = None
        for name, handler in self.old_handlers.items():
            signal.signal(getattr(signal, name), handler)

    def __exit__(self, kind, error, trace) -> None:
        """After an error or a signal: say in run.json how the run ended, keep an unexpected traceback, say how to go on."""
        try:
            if error is None or not self.run:
                return
            is_signal, why = kind is KeyboardInterrupt, one_line(error)
            with contextlib.suppress(OSError):                  # the reason itself may be a full disk
                if not isinstance(error, (ValueError, RuntimeError, OSError, KeyboardInterrupt)):
                    what = "its events.jsonl does not fit this code, or is damaged" if self.cfg.resume else "unexpected"
                    why = f"{what}: {kind.__name__} {why}; the traceback is in {self.path}/error.txt"
                    lines = traceback.format_exception(kind, error, trace)
                    lora.write_whole(self.path / "error.txt", "".join(lines).encode(errors="backslashreplace"))
                self.save(status="interrupted" if is_signal else "failed", reason="" if is_signal else why)
                self.report()
            if self.path.exists():
                again = f"python loop.py --resume {shlex.quote(str(self.path))}"
                print(f"\nwhat is finished is kept; continue with\n{again}", flush=True)
            if not is_signal:
                raise RunDied(why) from error
        finally:
            self._leave()

    # ---- the beginning

    def begin(self, options: dict, argv: list[str], around: dict, facts: dict) -> None:
        """Make a new folder, or read back the one to continue. facts: what must be the same, around: what should be."""
        facts = plain(facts)
        if not self.path:
            slug = f"{Path(self.cfg.model).name}-{'custom' if self.cfg.pos else self.cfg.persona}"
            slug = re.sub(r"[^A-Za-z0-9._-]+", "-", slug)
            stem = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + "_" + slug.strip("-.")[:80]
            for name in (stem, *(f"{stem}-{n}" for n in range(1, 1000))):
                path = Path(self.cfg.out) / name
                with self.writing(path), contextlib.suppress(FileExistsError):
                    path.mkdir(parents=True)
                    (path / "rounds").mkdir()
                    (path / "events.jsonl").touch()
                    self.path = path
                    break
            self._lock()
            self.save(status="running", argv=argv, command="python loop.py " + shlex.join(argv), options=options,
                      defaults={f.name: f.default for cls in GROUPS for f in dataclasses.fields(cls)},
                      seed=self.cfg.seed, started=time.time(), **around, **facts)
            return
        before = load_json(self.path / "run.json", dict)
        shape = dict(options=dict, argv=list, command=str, versions=dict, started=float, defaults=dict)
        if bad := [name for name, kind in shape.items() if not isinstance(before.get(name), kind)]:
            raise ValueError(f"{self.path}/run.json: {', '.join(bad)} missing or of another type; the file is damaged")
        differ = [name for name in facts if name in before and before[name] != facts[name]]
        if differ:
            raise ValueError(f"--resume {self.path}: that run was made with other {' and other '.join(differ)}; "
                             "start a new run")
        events = self._repaired(**{name: before["options"][name] for name in ("n_make", "gen_batch")})
        then, now = ({**x["versions"], **x.get("machine", {}), "code": x.get("code")} for x in (before, around))
        for name in [name for name in now if now[name] != then.get(name)]:
            self.screen.say("warning", None, f"{name} was {then.get(name)} and is {now[name]}: "
                            "numbers may differ from an unbroken run's", "yellow")
        if options["rounds"] != before["options"]["rounds"]:
            before["options"]["rounds"] = options["rounds"]
            before["argv"] += ["--rounds", str(options["rounds"])]
            before["command"] = "python loop.py " + shlex.join(before["argv"])
        self.run, self.events = before, events
        self.screen.start = time.time() - max((e["t"] for e in events), default=0)
        self.save(status="running", resumed=[*before.get("resumed", []), dict(time=time.time(), **around)], reason="")

    def _repaired(self, n_make: int, gen_batch: int) -> list[dict]:
        """The events to go on from, alone in events.jsonl; files that no gate stands for and temporary ones are removed."""
        path = self.path / "events.jsonl"
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        with self.writing(path):
            lora.write_whole(path, whole + b"\n" if whole else b"")
        if torn:
            self.screen.say("resume", None, f"events.jsonl: its last line was cut off after {len(torn)} bytes and is left out",
                            "yellow")
        events = report.load(self.path)[1]
        for n, e in enumerate(events, 1):
            if not (isinstance(e, dict) and {"t", "stage"} <= e.keys() and isinstance(e.get("round", ""), (int, type(None)))):
                raise ValueError(f"{path}, line {n}: no event of a run; the file is damaged")
        keep = to_continue(events, n_make, gen_batch)
        accepted = {f"{e['round']:02d}" for e in keep if e["stage"] == "gate" and e["accepted"]}
        with self.writing(path):
            lora.write_whole(path, "".join(json.dumps(e) + "\n" for e in keep).encode())
            for file in [*self.path.iterdir(), *self.path.glob("rounds/*/*")]:       # not what an export or a user has put there
                is_undone = file.parent.parent.name == "rounds" and file.parent.name not in accepted
                if file.is_file() and (is_undone or re.fullmatch(r"\..+\.\d+", file.name)):
                    file.unlink()
        n_done = sum(e["stage"] == "gate" for e in keep)
        self.screen.say("resume", None, f"{len(keep)} events read back, {n_done} rounds finished")
        return keep

    # ---- files

    def report(self) -> None:
        """What a reader sees of the run so far. It is made again from the journal at any time, so it never ends a run."""
        with self.writing(self.path / "diary.md"):
            try:
                report.write(self.path)
            except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
                why = f"{type(error).__name__}: {one_line(error)}"
                self.screen.say("report", None, f"warning: not written, {why}", "yellow")

    def save(self, **more) -> None:
        self.run |= plain(more)
        with self.writing(self.path / "run.json"):
            lora.write_whole(self.path / "run.json", json.dumps(self.run, indent=1).encode())

    def write(self, events: list[dict]) -> list[dict]:
        """Append events, all or none, and return them as a reader will see them."""
        lines = [json.dumps(plain(dict(t=round(time.time() - self.screen.start, 2)) | e)) + "\n" for e in events]
        path = self.path / "events.jsonl"
        with self.writing(path), open(path, "r+b", buffering=0) as file:       # r+: a removed file is not begun anew
            end = file.seek(0, os.SEEK_END)
            try:
                left = memoryview("".join(lines).encode())
                while left:
                    left = left[file.write(left):]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
        self.events += map(json.loads, lines)
        return self.events[-len(lines):]

    def event(self, stage: str, rnd: int | None = None, **more) -> dict:
        return self.write([dict(round=rnd, stage=stage) | more])[0]

    def recall(self, stage: str, rnd: int | None = None, **match) -> list[dict]:
        return [e for e in self.events if (e["stage"], e["round"]) == (stage, rnd) and match.items() <= e.items()]

    def once(self, stage: str, rnd: int | None, work) -> dict:
        """The event of a finished stage, or what work() gives, written down."""
        past = self.recall(stage, rnd)
        return past[0] if past else self.event(stage, rnd, **work())


def to_continue(events: list[dict], n_make: int, gen_batch: int) -> list[dict]:
    """The events that stay when a run goes on. A round without its gate loses what it healed, since an adapter is kept
    only with the gate, the piece of answers that was not written to its end, and a search without its dose."""
    ended = {e["round"] for e in events if e["stage"] == "gate"} | {None}
    settled = {e["round"] for e in events if e["stage"] == "dose"} | ended
    answers = [e for e in events if e["stage"] == "completion" and e["round"] not in ended]
    n_whole = len(answers) if len(answers) >= n_make else len(answers) // gen_batch * gen_batch
    lost = {id(e) for e in answers[n_whole:]}
    lost |= {id(e) for e in events if e["round"] not in ended and (e["stage"] in ("heal", "worst") or e.get("kind") == "healed")}
    lost |= {id(e) for e in events if e["stage"] == "probe" and e["round"] not in settled}
    return [e for e in events if id(e) not in lost]


# ---- what comes in ---------------------------------------------------------------------------------------------------


def load_json(path: Path, kind: type = dict):
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path}: expected a JSON {'object' if kind is dict else 'list'}, got {type(content).__name__}")
    return content


def check_text(where: str, text) -> str:
    """A text that a tokenizer can take, or a ValueError that says where it stands."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: expected a text, got {str(text)[:60]!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: half a surrogate pair, which no tokenizer can take: {text[:60]!a}") from None
    return text


def check_texts(where: str, texts, least: int = 1) -> list[str]:
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or len(texts) < least:
        got = len(texts) if isinstance(texts, list) else type(texts).__name__
        raise ValueError(f"{where}: expected {least} or more texts, got {got}")
    return [check_text(f"{where}, entry {i}", text) for i, text in enumerate(texts, 1)]


def load_persona(cfg: LoopConfig) -> dict:
    """pos and neg texts, target foundation, direction, patterns of narration; from the data or from --pos/--neg."""
    if cfg.pos:
        return dict(pos=[cfg.pos], neg=[cfg.neg], target=cfg.target, direction=cfg.direction, patterns=[])
    path = DATA / "personas.json"
    personas = load_json(path)
    if cfg.persona not in personas:
        raise ValueError(f"--persona {cfg.persona!r}: {path.name} has {', '.join(personas)}; or give --pos and --neg")
    persona, where = personas[cfg.persona], f"{path}, {cfg.persona!r}"
    keys = ("pos", "neg", "target", "direction")
    if missing := [key for key in keys if not isinstance(persona, dict) or key not in persona]:
        raise ValueError(f"{where}: lacks {', '.join(missing)}")
    persona = dict(pos=check_texts(f"{where}, pos", persona["pos"]), neg=check_texts(f"{where}, neg", persona["neg"]),
                   target=cfg.target or persona["target"], direction=cfg.direction or persona["direction"],
                   patterns=persona.get("patterns", []))
    if persona["target"] not in evalmfv.FOUNDATIONS or persona["direction"] not in (1, -1):
        raise ValueError(f"{where}: target {persona['target']!r}, direction {persona['direction']!r}; expected one of "
                         f"{', '.join(evalmfv.FOUNDATIONS)} and 1 or -1")
    try:
        for pattern in persona["patterns"]:
            re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{where}: {pattern!r} of its patterns is no regular expression ({error})"
                         if isinstance(persona["patterns"], list) else f"{where}: patterns is not a list") from None
    if persona["pos"] == persona["neg"]:
        raise ValueError(f"{where}: pos and neg are the same, so their difference, the vector, would be zero")
    return persona


def load_prompts(cfg: LoopConfig) -> tuple[list[str], list[str]]:
    """(training, held-out) prompts. Dose, filter and heal see the first; the tables and the diary show the second."""
    if cfg.prompts:
        path = Path(cfg.prompts)
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
        except OSError as error:
            raise ValueError(f"--prompts {path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            n = path.read_bytes()[:error.start].count(b"\n") + 1
            byte = f"{error.object[error.start]:#04x}"
            raise ValueError(f"--prompts {path}, line {n}: not UTF-8 (byte {byte}); save it as UTF-8") from None
        for n, line in enumerate(lines, 1):
            if "\0" in line:
                raise ValueError(f"--prompts {path}, line {n}: holds a NUL; it is not a plain text file, or UTF-16")
        lines = [line for line in lines if line]
        if len(lines) < 8:
            raise ValueError(f"--prompts {path}: {len(lines)} prompts, need at least 8 (every fourth is held out)")
        return [x for i, x in enumerate(lines) if i % 4], lines[::4]
    path = DATA / "prompts.json"
    everything = load_json(path)
    if cfg.persona not in everything:
        raise ValueError(f"--persona {cfg.persona!r}: {path.name} has {', '.join(everything)}; or give --prompts")
    entry = everything[cfg.persona] if isinstance(everything[cfg.persona], dict) else {}
    return tuple(check_texts(f"{path}, {cfg.persona!r}, {side}", entry.get(side), 2) for side in ("train", "held_out"))


def load_inputs(cfg: LoopConfig) -> dict:
    """Everything that is read from files, checked before the model is loaded."""
    persona, (train, held_out) = load_persona(cfg), load_prompts(cfg)
    path = Path(cfg.vignettes) if cfg.vignettes else DATA / "vignettes.jsonl"
    vignettes = evalmfv.load_vignettes(path)
    if len(vignettes) < 2:
        raise ValueError(f"{path}: one vignette, need at least 2 for a standard error")
    for n, vignette in enumerate(vignettes, 1):
        check_text(f"{path}, vignette {n}", vignette["text"])
    contexts = check_texts(str(DATA / "contexts.json"), load_json(DATA / "contexts.json", list))
    return dict(persona=persona, train=train, held_out=held_out, vignettes=vignettes, contexts=contexts)


def check_out(out: Path) -> None:
    """The run folder can be made: asked before hours of work, not after."""
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "read-only" if there.is_dir() else "a file, not a folder"
        raise ValueError(f"--out {out}: {there} is {what}; choose another folder")


def placed(cfg: LoopConfig) -> tuple[torch.device, torch.dtype]:
    """Where the base goes and as what. ValueError if this machine has no such device."""
    try:
        device = torch.device(cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:             # an AssertionError where torch was built without CUDA
        raise ValueError(f"--device {cfg.device}: {str(error).splitlines()[0]}") from None
    if cfg.dtype != "auto":
        return device, getattr(torch, cfg.dtype)
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return device, torch.bfloat16 if has_bf16 else torch.float32


# What is wrong with a checkpoint: a sign in the names or words of the exceptions, and the sentence for it.
LOAD_ERRORS = {
    "GatedRepoError": "it is gated: accept its licence at https://huggingface.co/{model}, then log in with `hf auth login` "
                      "or set HF_TOKEN",
    "RevisionNotFoundError": "the hub has no --revision {revision!r} of it",
    "RepositoryNotFoundError": "the hub has no model of this name, or it is private (then set HF_TOKEN)",
    "couldn't connect": "it is not in the local cache and the hub cannot be reached (no network, or HF_HUB_OFFLINE is set); "
                        "a local folder works without",
    "custom code": "it needs code of its own (trust_remote_code), which is never run here; take a model that transformers "
                   "itself knows, such as Qwen/Qwen3-4B-Instruct-2507",
    "does not recognize this architecture": "this version of transformers does not know its architecture; "
                                            "pip install -U transformers",
    "model.safetensors": "it has no safetensors weights, and pickle (pytorch_model.bin) is never loaded; take a revision or a "
                         "copy of it that has model.safetensors",
    "SafetensorError": "a weights file is damaged ({text}); download it again",
    "size mismatch": "its weights do not have the shapes that its config.json says",
    "ignore_mismatched_sizes": "its weights do not have the shapes that its config.json says",
    "OutOfMemoryError": "it does not fit on {device}; take a smaller one, --dtype bfloat16, --quantize 4bit or "
                        "--device-map auto",
}


def load_error(cfg: LoopConfig, error: Exception) -> ValueError:
    names, cause = "", error
    while cause:
        names, cause = f"{names} {type(cause).__name__}", cause.__cause__
    text = steer.printable(str(error).strip().split("\n")[0])
    reason = next((reason for sign, reason in LOAD_ERRORS.items() if sign in f"{names} {error}"), "{text}")
    return ValueError(f"model {cfg.model!r} cannot be used: " + reason.format(
        model=cfg.model, revision=cfg.revision, device=cfg.device, text=text))


@contextlib.contextmanager
def named_errors(cfg: LoopConfig):
    """Whatever transformers raises about a checkpoint becomes a ValueError with one sentence that says what to do."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError, TemplateError) as error:
        raise load_error(cfg, error) from None


def load_config(cfg: LoopConfig):
    """(folder or hub id, its configuration, its model class); reads no weights."""
    import transformers                                         # slow: not for --help
    where = str(HERE / "pocket") if cfg.model == "pocket" else cfg.model
    if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
        hint = ("it is a LoRA adapter: name its base model" if (Path(where) / "adapter_config.json").is_file()
                else "expected the folder of a checkpoint that transformers saved")
        raise ValueError(f"model {cfg.model!r} cannot be used: this folder has no config.json; {hint}")
    if not Path(where).is_dir() and (Path(where).exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", where)):
        raise ValueError(f"model {cfg.model!r} cannot be used: neither a folder nor a hub id such as google/gemma-3-4b-it")
    with named_errors(cfg):
        config = transformers.AutoConfig.from_pretrained(where, revision=cfg.revision or "main", trust_remote_code=False)
    if config.is_encoder_decoder:
        raise ValueError(f"model {cfg.model!r} cannot be used: {config.model_type} is an encoder and a decoder, and the "
                         "blocks that are steered and adapted here are those of a decoder alone")
    # an image-text model under its own class, so that modules have the names that the checkpoint gives them
    name = (config.architectures or [""])[0]
    is_own = name.endswith("ForConditionalGeneration") and hasattr(transformers, name)
    return where, config, getattr(transformers, name) if is_own else transformers.AutoModelForCausalLM


def check_rank(lcfg, config) -> int:
    """The model's width; ValueError if the adapter's rank is more."""
    width = config.get_text_config().hidden_size
    if lcfg.r > width:
        raise ValueError(f"--r {lcfg.r}: more than the model's width {width}, which a rank cannot pass")
    return width


def load_model(cfg: LoopConfig):
    """(model, tokenizer): on its device, in eval mode, its first logits finite. ValueError says in a sentence if not."""
    device, dtype = placed(cfg)
    where, config, kind = load_config(cfg)
    is_quantized = bool(cfg.quantize or getattr(config, "quantization_config", None))
    for package, is_needed in {"accelerate": is_quantized or cfg.device_map, "bitsandbytes": cfg.quantize}.items():
        if is_needed and not find_spec(package):
            why = "a quantized base" if is_quantized else f"--device-map {cfg.device_map}"
            raise ValueError(f"model {cfg.model!r}: {why} needs the package {package}, which is not installed: "
                             f"pip install {package}")
    from transformers import AutoTokenizer, BitsAndBytesConfig
    from transformers.utils import logging
    if not sys.stderr.isatty():
        logging.disable_progress_bar()                          # a bar in a log file is a hundred lines
    same = dict(revision=cfg.revision or "main", trust_remote_code=False)       # the default asks, and runs it on a yes
    with named_errors(cfg):
        tok = AutoTokenizer.from_pretrained(where, **same)
    if not tok.chat_template:
        raise ValueError(f"model {cfg.model!r} has no chat template: a persona needs one; try its -it or -Instruct sibling")
    more = dict(attn_implementation=cfg.attn) if cfg.attn else {}
    if cfg.device_map or is_quantized:                          # the two cases in which accelerate places the modules
        more["device_map"] = cfg.device_map or {"": device}
    if cfg.quantize:
        more["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                                         bnb_4bit_compute_dtype=dtype)
    with named_errors(cfg):
        model, report = kind.from_pretrained(where, dtype=dtype, use_safetensors=True, output_loading_info=True, **same, **more)
        model = model.eval() if "device_map" in more else model.to(device).eval()
    if report["missing_keys"]:
        raise ValueError(f"model {cfg.model!r} cannot be used: its files lack {len(report['missing_keys'])} of the weights, "
                         f"such as {min(report['missing_keys'])}; download it again")
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ValueError(f"model {cfg.model!r} does not fit on the GPUs: --device-map auto has put a part of it on the CPU or "
                         "the disk, where it cannot be adapted; take a smaller one or --quantize 4bit")

    # ---- one token: what is wrong with the numbers is seen here and not after an hour
    with named_errors(cfg):
        ids = steer.encode(tok, ["What is 1 + 1?"], [""])
    n_tokens = model.get_input_embeddings().num_embeddings
    if max(ids[0]) >= n_tokens:
        raise ValueError(f"model {cfg.model!r} cannot be used: its tokenizer writes token {max(ids[0])}, the model has {n_tokens}")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(ids, device=steer.device_of(model)), logits_to_keep=1).logits
    if not logits.isfinite().all():
        hint = "its weights are broken: download it again" if dtype == torch.float32 else "try --dtype float32"
        raise ValueError(f"model {cfg.model!r}: its first logits are not finite in {str(dtype).removeprefix('torch.')}; {hint}")
    return model, tok


def template_notes(tok) -> list[str]:
    """What the reader of a run should know of its chat template."""
    notes = []
    if steer.render(tok, "user", "persona") == steer.render(tok, "persona\n\nuser"):
        notes.append("the chat template has no system role: the persona goes in front of the user's words")
    turn = [{"role": "user", "content": "user"}]
    if steer.render(tok, "user") != tok.apply_chat_template(turn, tokenize=False, add_generation_prompt=True):
        notes.append("the model can think, and does not here: thinking is switched off, or closed where the template opens it")
    return notes


# ---- the run ---------------------------------------------------------------------------------------------------------


OPTION_OF = {"words": "--min-words", "unfinished": "--max-new-tokens or --keep-unfinished",
             "pattern": "the persona's patterns", "worst_window": "--max-window-nll or --slack", "ppl_tail": "--max-tail-ppl or --slack",
             "ngram": "--max-ngram or --slack", "loop": "--max-loop or --slack"}


def why_dropped(judged: list[dict]) -> str:
    """Which rule dropped how many, with a sample of each and the option that moves the rule; "" if nothing was."""
    parts = []
    for rule in dict.fromkeys(e["verdict"]["rule"] for e in judged if not e["verdict"]["kept"]):
        hits = [e for e in judged if e["verdict"]["rule"] == rule]
        verdict, sample = hits[0]["verdict"], steer.printable(hits[0]["text"])[:80]
        side = "under" if rule == "words" else "over"
        parts.append(f"{rule} dropped {len(hits)}, such as \"{sample}\" with {verdict['value']:.3g} {side} a limit of "
                     f"{verdict['limit']:.3g} ({OPTION_OF[rule]})")
    return "; ".join(parts)


def has_moved(row: dict) -> bool:
    """More than two standard errors: less than that may be no effect at all."""
    return abs(row["trait"]) > 2 * row["trait_se"]


def gate(now: dict, last: dict, base: dict, cfg: LoopConfig) -> list[str]:
    """Why this day is not accepted; empty if it is. Absolute conditions come before the relative one."""
    bad = [name for name in ("trait", "coherence", "text") if now[name] is None or not math.isfinite(now[name])]
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


def persona_distance(model, tok, kept, prompts: list[str], system: str, how: str, reg: str) -> float:
    """How far the persona prompt alone takes the base from itself, on the kept completions: mean D, in nats.

    It makes tau a set point: a healed model may stand about as far from the base as the prompted base does. Both
    readings are of the same completion tokens; only the system prompt in front of them differs.
    """
    def behind(front):
        heads = steer.encode(tok, [prompts[c.prompt] for c in kept], [front] * len(kept))
        return [heal.Sample(ids + c.ids, len(ids), c.prompt) for ids, c in zip(heads, kept)]
    kls = heal.divergences(model, behind(system), contextlib.nullcontext, ref_samples=behind(""), reg=reg, pad_id=steer.pad_of(tok, model))
    return sum(heal.aggregate(kl, how).item() for kl in kls) / len(kls)


# ---- the plan: what a run will need, from the shapes of a model without weights -----------------------------------------
#
# Estimates, made to tell a run that fits from one that does not and an hour from a week. Keys and values are counted for
# full attention in every block; what a step costs beside arithmetic, most of the time of a tiny model, is not counted.


def tokens_of(text: str) -> int:
    """Four characters to a token, and sixteen tokens of chat template."""
    return len(text) // 4 + 16


def sizes(model, blocks) -> dict:
    """What the estimates need to know: counts of parameters, widths, all from shapes."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    experts = sum(p.numel() for name, p in blocks.named_parameters() if ".experts." in name)
    n_experts = next((n for key in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(text, key, 0))), 1)
    idle = experts * (1 - (getattr(text, "num_experts_per_tok", 0) or 0) / n_experts)
    head = text.vocab_size * text.hidden_size
    return dict(n_blocks=len(blocks), width=text.hidden_size, vocab=text.vocab_size, head=head,
                total=sum(p.numel() for p in model.parameters()),
                inner=max((max(p.shape) for p in blocks[0].parameters() if p.dim() == 2), default=text.hidden_size),
                active=sum(p.numel() for p in blocks.parameters()) - idle + head,       # used for one token
                linear=sum(m.weight.numel() for m in blocks.modules() if isinstance(m, torch.nn.Linear)),
                kv=2 * len(blocks) * heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads))


def peaks_of(n: dict, n_trained: int, lora_blocks: int, *, bytes_each: int, quantized: bool, answer: int, prompt: int, frame: int,
           gen_rows: int, nll_rows: int, probe_rows: int, heal_rows: int, n_samples: int) -> dict[str, float]:
    """Peak bytes of each stage: weights and adapters, and on top what one batch keeps.

    n: from `sizes`. answer, prompt, frame: longest length in tokens of an answer, of its prompt, of a probe's question with
    its think. *_rows: rows of a batch. lora_blocks: blocks from the first adapted one to the last of the model, which are
    the ones that keep activations for the backward pass.
    """
    weights = n["total"] * bytes_each - (n["linear"] * (bytes_each - 0.5625) if quantized else 0)  # nf4, a scale per 64
    held = weights + 4 * n_trained
    token, logit = n["kv"] * bytes_each, n["vocab"] * bytes_each
    wide = (4 * n["width"] + 3 * n["inner"]) * bytes_each                       # one block at work, per token
    heal_tokens = heal_rows * (prompt + answer)
    return {"weights": weights,
            "generation": held + gen_rows * ((prompt + answer) * token + prompt * wide + 3 * 4 * n["vocab"]),
            "filter": held + nll_rows * (prompt + answer) * wide + max(min(nll_rows * (answer + 1) * logit, 2 ** 28 * bytes_each),
                                                                       (answer + 1) * logit) + 4 * 64 * n["vocab"],
            "probe": held + probe_rows * (frame * (token + wide) + 3 * 4 * n["vocab"]),
            # gradient and two moments of Adam; hidden states kept for the round; a tile of logits and gradients of hidden states
            "heal": held + 12 * n_trained + 17 * heal_tokens * n["width"] * lora_blocks * bytes_each
            + n_samples * (prompt + 2 * answer) * n["width"] * bytes_each
            + heal_rows * answer * (12 * min(n["vocab"], heal.TILE) + 28 * n["width"])}


def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """What this machine does in a second, measured in about one: (multiplications and additions, bytes read)."""
    def best(run) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            run().view(-1)[0].item()                            # waits for a GPU
            times.append(time.perf_counter() - start)
        return min(times)
    d = 4096 if device.type != "cpu" else 512
    a = torch.ones(d, d, device=device, dtype=dtype)
    once = best(lambda: a @ a)
    n = max(1, min(64, int(0.05 / once)))                       # long enough for the clock

    def product():
        for _ in range(n):
            b = a @ a
        return b
    x = torch.ones(2 ** 26 if device.type != "cpu" else 2 ** 24, device=device)
    return 2 * n * d ** 3 / best(product), 2 * 4 * x.numel() / best(x.clone)            # read once, written once


def hours_of(n: dict, weights: float, *, read: int, trained: int, decoded: int, rows: int, rate: float, bandwidth: float) -> float:
    """Time of a run. read: tokens of forward passes; trained: of training steps (student, reference and the gradient of
    the activations, three passes); decoded: tokens written one by one, `rows` at once."""
    step = max(rows * 2 * n["active"] / rate, weights / bandwidth)
    return ((read + 3 * trained) * 2 * n["active"] / rate + math.ceil(decoded / rows) * step) / 3600


def dry_run(cfg: LoopConfig, scfg, lcfg, hcfg) -> int:
    """Prints what this run would adapt, keep in memory, write and compute; reads the model's configuration and no weights."""
    persona, train, held_out, vignettes, contexts = load_inputs(cfg).values()
    check_out(Path(cfg.out))
    device, dtype = placed(cfg)
    _, config, kind = load_config(cfg)
    with named_errors(cfg), torch.device("meta"):
        model = getattr(kind, "from_config", kind)(config)      # the Auto class, or the model's own
        model.tie_weights()                                     # transformers 5.0 leaves that out where nothing is loaded
    check_rank(lcfg, config)
    found = steer.blocks(model)
    layers = steer.band(len(found), lcfg.lora_from, lcfg.lora_to)
    stack = lora.attach(model, r=lcfg.r, alpha=lcfg.alpha, layers=layers)
    n, n_trained = sizes(model, found), sum(p.numel() for p in stack.parameters())

    # ---- counts: rounds as if each were accepted, searches as if each took all its steps, answers as if none ended early
    system = max(tokens_of(text) for text in persona["pos"] + persona["neg"])
    prompt = max(map(tokens_of, train + held_out))
    frame = max(tokens_of(evalmfv.question(v["text"], evalmfv.FOUNDATIONS)) for v in vignettes) + cfg.think_tokens + 32
    n_steered = cfg.rounds if cfg.steered_rows == "all" else 1
    n_rows = 1 + cfg.baselines + n_steered + cfg.rounds                             # of the table
    n_doses = 0 if scfg.coeff else scfg.dose_steps + 2
    n_answers = 2 * scfg.n_make + cfg.rounds * (n_doses * scfg.n_probe + scfg.n_make) + n_rows * (cfg.n_text + cfg.n_diary)
    n_frames, answer = 2 * len(vignettes) * n_rows, scfg.max_new_tokens
    n_steps = cfg.rounds * hcfg.epochs * math.ceil(scfg.n_make / hcfg.heal_batch)
    decoded = n_answers * answer + n_frames * cfg.think_tokens
    read = (n_answers * 2 * (prompt + answer) + n_frames * (frame - cfg.think_tokens)
            + (cfg.rounds + 1) * 2 * len(contexts) * (system + prompt))
    trained = cfg.rounds * hcfg.epochs * scfg.n_make * (prompt + answer)

    size = torch.empty(0, dtype=dtype).element_size()
    peaks = peaks_of(n, n_trained, len(found) - layers[0], bytes_each=size, quantized=bool(cfg.quantize), answer=answer,
                        prompt=system + prompt, frame=system + frame, gen_rows=min(scfg.gen_batch, max(scfg.n_make, 0 if scfg.coeff else 3 * scfg.n_probe)), nll_rows=32,
                        probe_rows=min(cfg.eval_batch, 2 * len(vignettes)), heal_rows=max(1, min(hcfg.heal_batch, hcfg.pass_tokens // (prompt + answer))), n_samples=scfg.n_make)
    rate, bandwidth = rates(device, dtype)
    hours = hours_of(n, peaks["weights"], read=read, trained=trained, decoded=decoded, rows=scfg.gen_batch, rate=rate,
                       bandwidth=bandwidth)
    name, modules = str(dtype).removeprefix("torch."), sorted({name.rsplit(".", 1)[-1] for name in stack.layers})
    lines = {
        "model": f"{cfg.model}: {type(model).__name__}, {n['n_blocks']} blocks of width {n['width']}, vocabulary {n['vocab']:,}, "
                 f"{n['total']:,} parameters",
        "adapted": f"{len(stack.layers)} modules ({', '.join(modules)}) in blocks {layers[0]}-{layers[-1]}, rank {lcfg.r}: "
                   f"{n_trained:,} trained parameters",
        "note": stack.note,
        "memory": f"peak on {device.type} in {'4 bits' if cfg.quantize else name}, GB: "
                  + "  ".join(f"{stage} {peak / 1e9:.2f}" for stage, peak in peaks.items()),
        "disk": f"{4 * n_trained / 1e6:.1f} MB per accepted round, {4 * n_trained * cfg.rounds / 1e6:.1f} MB for {cfg.rounds}",
        "work": f"{n_answers:,} answers, {n_frames:,} probe frames, {n_steps:,} training steps; thousands of tokens: decoded "
                f"{decoded / 1e3:,.0f}  read {read / 1e3:,.0f}  trained {trained / 1e3:,.0f}",
        "time": f"about {f'{hours:.1f} hours' if hours > 2 else f'{60 * hours:.0f} minutes'} on this {device.type}, at the "
                f"{rate / 1e9:,.0f} GFLOP/s of a {name} product and the {bandwidth / 1e9:,.0f} GB/s of a copy, measured just now",
        "assumed": f"every round accepted, every answer {answer} tokens long, four characters to a token, attention to all of "
                   "the text; only matrix products and reading weights take time"}
    for word, line in lines.items():
        if line:
            print(f"{word:9s} {line}")
    return 0


def tail_ppl(judged: list[dict]) -> float:
    """Perplexity of the answers' tails under the base, the geometric mean over answers."""
    return math.exp(sum(math.log(max(e["verdict"]["readings"]["ppl_tail"], 1.0)) for e in judged) / len(judged))


def worst_kept(model, tok, samples, reference, before, vectors, coeff, hcfg) -> dict:
    """The kept completion that the healed model leaves furthest from the reference (rmse), with its KL at every token.

    before: a context manager under which the model is the student as the round began; `night` is that student steered.
    Returns {prompt, tokens, day, before, night}, the last three [n] in nats.
    """
    @contextlib.contextmanager
    def dreaming():
        with before(), steer.steered(model, vectors, coeff):
            yield

    def kl(of, against, reg):
        return heal.divergences(model, of, against, reg=reg, pass_tokens=hcfg.pass_tokens, pad_id=steer.pad_of(tok, model))
    kls = kl(samples, reference, hcfg.reg)
    worst = max(range(len(kls)), key=lambda i: heal.aggregate(kls[i], "rmse").item())
    sample, ids = samples[worst], samples[worst].ids[samples[worst].n_prompt:]
    with before():
        start = kl([sample], reference, hcfg.reg)[0]                                # [n]
    with reference():                                           # the other way round, so that only the dream is steered
        night = kl([sample], dreaming, "kl_rev" if hcfg.reg == "kl_fwd" else "kl_fwd")[0]       # [n]
    texts = [tok.decode(ids[:n]) for n in range(len(ids) + 1)]              # a token decoded alone may lose its space
    return dict(prompt=sample.group, tokens=[b[len(a):] for a, b in zip(texts, texts[1:])], day=kls[worst],
                before=start, night=night)


class Run:
    """The student and what is done to it: answers, measured rows, rounds. Results go to the folder's journal."""

    def __init__(self, cfg, scfg, lcfg, hcfg, model, tok, folder, screen, *, persona, train, held_out, vignettes,
                 contexts):
        self.cfg, self.scfg, self.model, self.tok, self.folder, self.screen = cfg, scfg, model, tok, folder, screen
        self.persona, self.train, self.held_out = persona, train, held_out
        self.vignettes, self.contexts = vignettes, contexts
        self.fronts = steer.encode(tok, train, [""] * len(train))
        self.check_room()
        n_blocks, width = len(steer.blocks(model)), check_rank(lcfg, model.config)
        self.hcfg = dataclasses.replace(hcfg, lr=hcfg.lr or 0.2 / width)
        self.lora_layers = steer.band(n_blocks, lcfg.lora_from, lcfg.lora_to)
        self.steer_layers, self.strength = steer.find_layers(model, tok, persona["pos"], persona["neg"], contexts)
        if scfg.steer_to:
            self.steer_layers = steer.band(n_blocks, scfg.steer_from, scfg.steer_to)
        self.stack = lora.attach(model, r=lcfg.r, alpha=lcfg.alpha, layers=self.lora_layers, seed=cfg.seed)
        with self.stack.gated(0, 0):                            # what every round's vector is compared with
            self.origin = steer.fit_vectors(model, tok, persona["pos"], persona["neg"], contexts, self.steer_layers)
        self.sampling = dict(max_new_tokens=scfg.max_new_tokens, temperature=scfg.temperature, top_p=scfg.top_p, top_k=scfg.top_k,
                             batch_size=scfg.gen_batch)

    def check_room(self) -> None:
        """Room for the longest text that will be asked for."""
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        probe = evalmfv.question(max((v["text"] for v in self.vignettes), key=len), evalmfv.FOUNDATIONS)
        for option, asked, n_new in (("max-new-tokens", self.train + self.held_out, self.scfg.max_new_tokens),
                                     ("think-tokens", [probe], self.cfg.think_tokens)):
            n_asked = max(map(len, steer.encode(self.tok, asked, [self.persona["pos"][0]] * len(asked))))
            if n_asked + n_new > room:
                raise ValueError(f"--{option} {n_new}: with the longest question of {n_asked} tokens it does not fit "
                                 f"into the model's {room}")

    # ---- answers and their scores

    def pieces(self, prompts, stage, rnd, *, draws=None, start=0, system="", vectors=None, coeff=0.0, greedy=False):
        """Completions, gen_batch prompts at a time. Each piece has draws of its own, by default (stage, round)'s, so that
        a run which was stopped goes on with the next piece."""
        scfg, size, (name, of) = self.scfg, self.scfg.gen_batch, draws or (stage, rnd or 0)
        for at in range(start, len(prompts), size):
            some = prompts[at:at + size]
            what = f"answers {at + 1} to {at + len(some)} of {len(prompts)}, tokens"
            with self.screen.watch(stage, rnd, what, scfg.max_new_tokens, self.model):
                made = steer.generate(self.model, self.tok, some, system=system, vectors=vectors, greedy=greedy,
                                      coeffs=[coeff] * len(some) if vectors else None, **self.sampling,
                                      seed=stage_seed(self.cfg.seed, of, name + (f" from {at}" if at else "")))
            yield [dataclasses.replace(c, prompt=at + c.prompt) for c in made]

    def answers(self, prompts, stage, rnd, **how) -> list[steer.Completion]:
        return [c for piece in self.pieces(prompts, stage, rnd, **how) for c in piece]

    def spread(self, n: int) -> list[str]:
        return [self.train[i % len(self.train)] for i in range(n)]

    def base_nll(self, completions) -> list[torch.Tensor]:
        """nats per completion token under the untouched model, whatever is folded: the one yardstick of coherence."""
        with self.stack.gated(0, 0):
            return steer.token_nll(self.model, completions, pad_id=steer.pad_of(self.tok, self.model))

    def bare(self, completions, prompts) -> list:
        """Answers given under a system prompt, to be judged as answers to the bare question."""
        fronts = steer.encode(self.tok, prompts, [""] * len(prompts))
        return [dataclasses.replace(c, prompt_ids=fronts[c.prompt % len(fronts)]) for c in completions]

    def judged(self, completions) -> list[dict]:
        """Each completion with its verdict, as it stands in the journal."""
        found = steer.judge(completions, self.base_nll(completions), self.limits, window=self.scfg.window,
                            patterns=self.persona["patterns"], keep_unfinished=self.scfg.keep_unfinished)
        return [plain(dict(prompt=c.prompt % len(self.train), coeff=c.coeff, finished=c.finished, ids=c.ids, text=c.text,
                           verdict=v)) for c, v in zip(completions, found)]

    # ---- what the base itself does: the filter's limits, then the rows of the table that need no round

    def measure_base(self) -> None:
        layers = dict(steer=self.steer_layers, lora=self.lora_layers, strength=self.strength)
        self.folder.once("layers", None, lambda: layers)
        own = self.answers(self.spread(self.scfg.n_make), "own", None)
        self.own = own, self.base_nll(own)

        def calibrate():
            # the trait itself is no incoherence: what the prompted base says must pass the filter too
            voiced = self.answers(self.spread(self.scfg.n_make), "own", None, system=self.persona["pos"][0])
            seen = zip(own + voiced, self.own[1] + self.base_nll(self.bare(voiced, self.train)))
            limits = steer.calibrate_limits([steer.readings(c, nll, window=self.scfg.window) for c, nll in seen], self.scfg)
            return dict(limits=limits, own=[c.text for c in own], voiced=[c.text for c in voiced])
        self.limits = steer.Limits(**self.folder.once("limits", None, calibrate)["limits"])
        self.screen.say("limits", None, "  ".join(f"{k} {v:.3g}" for k, v in dataclasses.asdict(self.limits).items()))
        self.base = None
        self.base = self.row("base", None, "base")
        if self.cfg.baselines:
            self.row("prompted", None, "prompted", system=self.persona["pos"][0])

    def row(self, kind: str, rnd: int | None, label: str, **how) -> dict:
        """A row of the table, from the journal or measured now."""
        if past := self.folder.recall("row", rnd, kind=kind):
            return past[0]
        row = self.folder.event("row", rnd, kind=kind, **self.measured(kind, rnd, label, **how))
        self.screen.say(kind, rnd, f"trait {row['trait']:+.3f} nats (se {row['trait_se']:.3f})  "
                        f"coherence {row['coherence']:.4f}  text {row['text']:.3f} (se {row['text_se']:.3f})")
        return row

    def measured(self, kind, rnd, label, *, system="", vectors=None, coeff=0.0) -> dict:
        """What is measured on held-out items, the same for every row: the probe, free text, the diary."""
        cfg, sampler = self.cfg, dict(draws=("text", 0), system=system, vectors=vectors, coeff=coeff)
        n_passes = math.ceil(2 * len(self.vignettes) / cfg.eval_batch) * (cfg.think_tokens + 1)
        with (steer.steered(self.model, vectors, coeff) if vectors else contextlib.nullcontext(),
              self.screen.watch(kind, rnd, "probe, tokens", n_passes, self.model)):
            probe = evalmfv.evaluate(self.model, self.tok, self.vignettes, think_tokens=cfg.think_tokens,
                                     batch_size=cfg.eval_batch, system=system)
        # the same draws for every row: rows differ by their model
        texts = self.answers([self.held_out[i % len(self.held_out)] for i in range(cfg.n_text)], kind, rnd, **sampler)
        diary = self.answers(self.held_out[:cfg.n_diary], kind, rnd, greedy=True, **sampler)

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

    # ---- one round

    def dream(self, rnd: int) -> tuple[dict, float, list[steer.Completion]]:
        """Vectors of the student as it is, its dose, and the completions that pass the filter."""
        scfg, folder = self.scfg, self.folder
        vectors = steer.fit_vectors(self.model, self.tok, self.persona["pos"], self.persona["neg"], self.contexts,
                                    self.steer_layers)
        cosine = {k: torch.cosine_similarity(v, self.origin[k], dim=0) for k, v in vectors.items()}
        folder.once("vector", rnd, lambda: dict(norm={k: v.norm() for k, v in vectors.items()}, cosine=cosine))
        rng = torch.Generator().manual_seed(stage_seed(self.cfg.seed, rnd, "probed prompts"))
        probed = [self.train[i] for i in torch.randperm(len(self.train), generator=rng).tolist()[:scfg.n_probe]]
        asked = []

        def survival(coeffs):                                   # all doses of a step in one batch, with the same draws
            each = [coeff for coeff in coeffs for _ in probed]
            with self.screen.watch("dose", rnd, f"{len(coeffs)} doses, tokens", self.scfg.max_new_tokens, self.model):
                tried = steer.generate(self.model, self.tok, probed * len(coeffs), vectors=vectors, coeffs=each, n_draws=len(probed),
                                       seed=stage_seed(self.cfg.seed, rnd, "probe"), **self.sampling)
            found, n = self.judged(tried), len(probed)
            groups = [found[i:i + n] for i in range(0, len(found), n)]
            asked[:] = groups[-1]
            shares = [sum(e["verdict"]["kept"] for e in group) / n for group in groups]
            folder.write([dict(round=rnd, stage="probe", coeff=coeff, survive=share, ppl=tail_ppl(group))
                          for coeff, share, group in zip(coeffs, shares, groups)])
            return shares

        def search():
            try:
                coeff, trials = (scfg.coeff, []) if scfg.coeff else steer.find_dose(
                    survival, coeff_min=scfg.coeff_min, steps=scfg.dose_steps, min_survive=scfg.min_survive)
            except RuntimeError as error:
                raise RuntimeError(f"{error}. {why_dropped(asked)}") from error
            return dict(coeff=coeff, trials=trials)
        coeff = folder.once("dose", rnd, search)["coeff"]

        made = folder.recall("completion", rnd)
        for piece in self.pieces(self.spread(scfg.n_make), "make", rnd, start=len(made), vectors=vectors, coeff=coeff):
            made += folder.write([dict(round=rnd, stage="completion") | e for e in self.judged(piece)])
        kept = [e for e in made if e["verdict"]["kept"]]
        rules = Counter(e["verdict"]["rule"] for e in made if not e["verdict"]["kept"])
        dropped = "  ".join(f"{rule} {n}" for rule, n in sorted(rules.items()))
        self.screen.say("filter", rnd, f"dose {coeff:.3f}  kept {len(kept)}/{len(made)}  {dropped and 'dropped: ' + dropped}")
        if len(kept) < scfg.n_min:
            raise RuntimeError(f"{len(kept)} of {len(made)} completions passed the filter at dose {coeff:.3f}, need "
                               f"{scfg.n_min}; raise --n-make, or move a rule. {why_dropped(made)}")
        return vectors, coeff, [steer.Completion(e["prompt"], self.fronts[e["prompt"]], e["ids"], coeff, e["finished"],
                                                 e["text"]) for e in kept]

    def tau(self, rnd: int, kept: list[steer.Completion]) -> float:
        """The barrier's set point in nats, calibrated in the first round that gets here."""
        past = [e for e in self.folder.events if e["stage"] == "tau"]
        if self.hcfg.tau or past or self.hcfg.reg == "nll":
            return self.hcfg.tau or (past[0]["tau"] if past else 0.0)
        with self.stack.gated(0, 0):
            distance = persona_distance(self.model, self.tok, kept, self.train, self.persona["pos"][0], self.hcfg.kl_agg,
                                        self.hcfg.reg)
        tau = self.cfg.tau_scale * distance
        self.screen.say("tau", rnd, f"{tau:.4f} nats ({self.hcfg.kl_agg}): {self.cfg.tau_scale:g} of the persona prompt's "
                        f"distance {distance:.4f}")
        return self.folder.event("tau", rnd, tau=tau, distance=distance, kl_agg=self.hcfg.kl_agg)["tau"]

    def heal_round(self, rnd: int, kept: list[steer.Completion], vectors: dict, coeff: float) -> None:
        """Train the adapter of this round on what was kept."""
        cfg, hcfg, tau = self.cfg, self.hcfg, self.tau(rnd, kept)
        samples = [heal.Sample(c.prompt_ids + c.ids, len(c.prompt_ids), c.prompt) for c in kept]
        n_steps = hcfg.epochs * math.ceil(len(samples) / hcfg.heal_batch)

        def reference():
            return self.stack.gated(history=0 if cfg.kl_ref == "base" else 1, current=0)
        with warnings.catch_warnings(), self.screen.watch("heal", rnd, "training, steps", n_steps) as tick:
            warnings.filterwarnings("ignore", "the barrier")                # said below, in a line of its own
            record = heal.heal(self.model, self.stack.parameters(), samples, reference, hcfg, tau=tau, rnd=rnd, log=tick,
                               pad_id=steer.pad_of(self.tok, self.model), seed=stage_seed(cfg.seed, rnd, "heal"),
                               spectral=self.stack.spectral if hcfg.spectral else None)
        self.folder.event("heal", rnd, norm=self.stack.norm(), singular=self.stack.singular_values(), **record)
        self.folder.event("worst", rnd, **worst_kept(self.model, self.tok, samples, reference, lambda: self.stack.gated(1, 0), vectors,
                                                     coeff, hcfg))
        val = f"  val {record['val_nll_before']:.3f} -> {record['val_nll_after']:.3f}" if record["n_val"] else ""
        fired = f"fired in {record['fired_share']:.0%} of {len(record['steps'])} steps" if record["lam_eff"] else "no barrier"
        skipped = f"  skipped {len(record['skipped'])} steps that were not finite" if record["skipped"] else ""
        self.screen.say("heal", rnd, f"nll {record['nll_first']:.3f} -> {record['nll_last']:.3f}{val}  "
                        f"D {record['steps'][-1]['div']:.4f}  {fired}{skipped}")
        if record["warning"]:
            by = f"--tau, now {hcfg.tau:g}" if hcfg.tau else f"--tau-scale, now {cfg.tau_scale:g}"
            self.screen.say("heal", rnd, f"warning: {record['warning']} ({by})", "yellow")

    def one_round(self, rnd: int) -> list[str]:
        """Steer, filter, heal, measure, and fold if the gate lets it; returns why it does not.

        RuntimeError: no dose survives, too little is kept, a number is not finite.
        """
        with self.stack.gated(1, 0):                            # the round in training is zero still: skip its products
            vectors, coeff, kept = self.dream(rnd)
        if self.cfg.steered_rows == "all" or not any(row["kind"] == "steered" for row in self.rows()):
            night = self.row("steered", rnd, f"steered, night {rnd}", vectors=vectors, coeff=coeff)
            if not has_moved(night):
                self.screen.say("steered", rnd, f"warning: dose {coeff:.3f} moves the trait by {night['trait']:+.3f} nats "
                                f"(se {night['trait_se']:.3f}), which may be nothing; another persona, --target or "
                                "--steer-from with --steer-to may do more", "yellow")
        self.heal_round(rnd, kept, vectors, coeff)
        day = self.row("healed", rnd, f"day {rnd}")
        reasons = gate(day, self.last_day(), self.base, self.cfg)
        if not reasons:
            self.stack.fold()
            path = self.folder.path / "rounds" / f"{rnd:02d}"
            with self.folder.writing(path):
                path.mkdir(exist_ok=True)
                steer.save_vectors(path / "vectors.safetensors", vectors, coeff, {})
                self.stack.save(path / "adapter.safetensors", rounds=[self.stack.n_rounds - 1])
        return reasons

    # ---- what the journal says so far

    def rows(self) -> list[dict]:
        return [e for e in self.folder.events if e["stage"] == "row"]

    def accepted(self) -> list[int]:
        return [e["round"] for e in self.folder.events if e["stage"] == "gate" and e["accepted"]]

    def last_day(self) -> dict:
        """The row of the last accepted day; before there is one, the base's."""
        accepted = self.accepted()
        days = [row for row in self.rows() if row["kind"] == "healed" and row["round"] in accepted]
        return days[-1] if days else self.base


# ---- the loop --------------------------------------------------------------------------------------------------------


def loop(cfg: LoopConfig, scfg, lcfg, hcfg, argv: list[str]) -> int:
    """Runs the rounds, prints the table, returns the exit code: 0 if a round was accepted, 3 if none was."""
    inputs = load_inputs(cfg)
    check_out(Path(cfg.resume or cfg.out))
    screen = Screen()
    with Folder(cfg, screen) as folder:
        model, tok = load_model(cfg)
        run = Run(cfg, scfg, lcfg, hcfg, model, tok, folder, screen, **inputs)
        options = {f.name: getattr(c, f.name) for c in (cfg, scfg, lcfg, run.hcfg) for f in dataclasses.fields(c)}
        options |= dict(target=run.persona["target"], direction=run.persona["direction"], resume="")
        texts = json.dumps([run.persona, run.contexts, run.vignettes]).encode()
        facts = dict(weights=fingerprint(model), texts=f"{zlib.crc32(texts):08x}", persona=run.persona,
                     items=dict(train=run.train, held_out=run.held_out))
        folder.begin(options, argv, surroundings(model), facts)
        print(folder.run["command"])
        dtype, n_trained = str(model.dtype).removeprefix("torch."), sum(p.numel() for p in run.stack.parameters())
        screen.say("model", None, f"{cfg.model}: {len(steer.blocks(model))} blocks of width "
                   f"{model.config.get_text_config().hidden_size}, {dtype}, steer {run.steer_layers}, lora {run.lora_layers[0]}-"
                   f"{run.lora_layers[-1]} rank {lcfg.r}, {n_trained:,} trained parameters")
        for note in [*template_notes(tok), run.stack.note]:
            if note:
                screen.say("note", None, note)
        run.measure_base()

        in_a_row, stopped = 0, ""
        for rnd in range(cfg.rounds):
            # ---- one round: accept and fold, or roll back ----------------------------------------------------------------
            if past := folder.recall("gate", rnd):              # it ended before this sitting
                reasons = past[0]["reasons"]
                if past[0]["accepted"]:
                    run.stack.load(folder.path / "rounds" / f"{rnd:02d}" / "adapter.safetensors")
            else:
                try:
                    reasons = run.one_round(rnd)
                except torch.OutOfMemoryError as error:         # batches were halved already
                    raise RuntimeError(f"out of memory in round {rnd}: {error}") from None
                except RuntimeError as error:
                    reasons = [str(error)]
                if reasons:
                    run.stack.drop()
                folder.event("gate", rnd, accepted=not reasons, reasons=reasons)
                folder.report()
            # --------------------------------------------------------------------------------------------------------------
            if reasons:
                screen.say("gate", rnd, "rolled back: " + one_line("; ".join(reasons)), "red")
            else:
                screen.say("gate", rnd, "accepted", "green")
            in_a_row = in_a_row + 1 if reasons else 0
            if in_a_row == cfg.patience:
                stopped = f"{cfg.patience} rounds in a row were rolled back, the last because: {'; '.join(reasons)}"
                break

        accepted, seconds = run.accepted(), time.time() - screen.start
        tau = next((e["tau"] for e in folder.events if e["stage"] == "tau"), hcfg.tau)
        folder.save(status="accepted" if accepted else "no round accepted", accepted=accepted, stopped=stopped, seconds=seconds,
                    tau=tau, limits=run.limits)
        folder.report()
        tally(run, seconds)
        with folder.writing(folder.path.parent / "results.tsv"):
            to_results(folder, run, seconds)
        if stopped:
            print(f"stopped: {one_line(stopped)}")
        where = shlex.quote(str(folder.path))
        print(f"\nread     {where}/report.html")
        if accepted:
            print(f"chat     python loop.py chat {where}\nexport   python lora.py export {where} --to peft")
    return 0 if accepted else 3


def tally(run: Run, seconds: float) -> None:
    """The closing table and the verdict in a sentence."""
    rows, final, accepted = run.rows(), run.last_day(), run.accepted()
    print("\n| row | dose | trait, nats | target, nats | off-target | coherence | text | |\n|" + "---|" * 8)
    for row in rows:
        move, verdict = row["shift"], "accepted" if row["round"] in accepted else "rolled back"
        verdict = verdict if row["kind"] == "healed" else ""
        print(f"| {row['label']} | {row['coeff']:.2f} | {row['trait']:+.3f} ± {row['trait_se']:.3f} | {row['nats'][move['target']]:.3f} | "
              f"{move['off_target']:.3f} | {row['coherence']:.4f} | {row['text']:.3f} | {verdict} |")
    nights = [row for row in rows if row["kind"] == "steered"]
    if final is not run.base:
        share = ""
        if nights and nights[0]["trait"] > 0:
            share = f", {final['trait'] / nights[0]['trait']:.0%} of steering's in round {nights[0]['round']}"
        print(f"\nfinal: {final['label']}: trait {final['trait']:+.3f} nats{share}, "
              f"text coherence {final['text'] / rows[0]['text']:.1%} of the base's, {seconds:.0f} s")
    else:
        print(f"\nfinal: no round was accepted, the model is the base still, {seconds:.0f} s")
    if nights and not any(map(has_moved, nights)):
        best = max(nights, key=lambda row: abs(row["trait"]))
        print(f"The trait did not move at any dose: steering's largest move is {best['trait']:+.3f} nats (se "
              f"{best['trait_se']:.3f}). Either this model does not read the persona, or the probe does not see it: "
              "read the diary, try other --pos and --neg, or another --target.")


def to_results(folder: Folder, run: Run, seconds: float) -> None:
    """This run's line of results.tsv, where arms and seeds lie side by side; a run that continues rewrites its own."""
    options, final = folder.run["options"], run.last_day() if run.accepted() else {}
    keys = ("model", "persona", "pos", "reg", "kl_agg", "kl_ref", "seed", "rounds", "gate")
    night = next((row for row in run.rows() if row["kind"] == "steered"), {})
    line = {"run": folder.path.name, **{k: options[k] for k in keys},
            **{k: final.get(k) for k in ("label", "trait", "coherence", "text")},
            "steered": night.get("trait"), "seconds": round(seconds)}
    path = folder.path.parent / "results.tsv"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ["\t".join(line)]
    lines = [x for x in lines if x.split("\t")[0] != folder.path.name]
    cells = (" ".join(str(v).split()) if v is not None else "" for v in line.values())
    lora.write_whole(path, ("\n".join([*lines, "\t".join(cells)]) + "\n").encode(errors="backslashreplace"))


# ---- chat with a finished run ----------------------------------------------------------------------------------------


def chat_options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="loop.py chat", description="Ask a finished run; each line is a conversation of its own.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder")
    parser.add_argument("prompts", nargs="*", help="what to ask; none = read lines, from a terminal or a pipe")
    parser.add_argument("--compare", action="store_true", help="base | prompted | day N side by side, from the same random draws")
    parser.add_argument("--round", type=int, default=None, help="the day: rounds after this one are left out; None = the last accepted")
    parser.add_argument("--gate", type=float, default=1.0, help="dials all folded rounds, 0 (the base) to 2")
    parser.add_argument("--max-new-tokens", type=int, default=None, help="longest answer; None = the run's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_intermixed_args(argv)                               # options may stand between RUN and the prompts
    if not 0 <= args.gate <= 2:
        parser.error(f"--gate {args.gate}: expected 0 to 2")
    return args


def asked(prompts: list[str]):
    """The prompts, or else lines of standard input until it ends; a mark in front of each only on a terminal."""
    yield from prompts
    while not prompts:
        try:
            line = input("\n> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


def chat(argv: list[str]) -> int:
    """Answers of a run's model, by the sampler and the stop tokens that it was made with; control characters are dropped."""
    args = chat_options(argv)
    run, _ = report.load(args.run)
    files = lora.adapters(args.run, args.round)
    known = {name: value for name, value in run["options"].items() if name in {f.name for f in dataclasses.fields(LoopConfig)}}
    cfg = LoopConfig(**known)
    model, tok = load_model(cfg)
    stack, day = lora.restack(model, list(files.values())), f"day {max(files)}" + (f", gate {args.gate:g}" if args.gate != 1 else "")
    columns = {day: (args.gate, "")}                            # name -> gate of all rounds, system prompt
    if args.compare:
        columns = {"base": (0, ""), "prompted": (0, run["persona"]["pos"][0])} | columns
    sampling = {name: run["options"][name] for name in ("max_new_tokens", "temperature", "top_p", "top_k")}
    sampling |= {"max_new_tokens": args.max_new_tokens} if args.max_new_tokens is not None else {}
    width = max(8, shutil.get_terminal_size((120, 24)).columns // len(columns) - 3)

    for n, prompt in enumerate(asked(args.prompts)):
        answers = []
        for history, system in columns.values():
            with stack.gated(history, 0):
                answers += steer.generate(model, tok, [prompt], system=system, seed=args.seed + n, **sampling)
        if args.prompts or not sys.stdin.isatty():
            print(f"\n> {steer.printable(prompt)}")
        texts = [steer.printable(c.text) + ("" if c.finished else " ...") for c in answers]
        if not args.compare:
            print(texts[0], flush=True)
            continue
        cells = [[name, "-" * len(name), *textwrap.wrap(text, width)] for name, text in zip(columns, texts)]
        for line in itertools.zip_longest(*cells, fillvalue=""):
            print(" | ".join(cell.ljust(width) for cell in line).rstrip(), flush=True)
    return 0


def main(argv=None) -> int:
    for stream in (sys.stdout, sys.stderr):                     # a model does not care about the terminal's alphabet
        if hasattr(stream, "reconfigure"):                      # a notebook's streams have no alphabet to set
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["chat"]:
            return chat(argv[1:])
        configs = parse(argv)
        return dry_run(*configs) if configs[0].dry_run else loop(*configs, argv)
    except KeyboardInterrupt:
        print("loop.py: interrupted", file=sys.stderr)
        return 130
    except RunDied as error:
        print(f"loop.py: {one_line(error)}", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        print(f"loop.py: {one_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:                                  # not foreseen, and no run folder yet to keep its traceback
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{at.filename}, line {at.lineno}"
        print(f"loop.py: unexpected {type(error).__name__} in {where}: {one_line(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
