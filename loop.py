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
runs/results.tsv.
"""
import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
import typing
import warnings
import zlib
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from jinja2.exceptions import TemplateError
from safetensors import SafetensorError
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
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
    def total(p):
        return p.detach().sum(dtype=torch.float32 if p.device.type == "mps" else torch.float64).item()      # mps has no doubles
    sums = "".join(f"{name} {total(p):.9e}\n" for name, p in model.named_parameters())
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
        if system:
            texts = self.bare(texts, self.held_out)
        free = evalmfv.free_text([c.ids for c in texts], self.base_nll(texts), [c.ids for c in self.own[0]], self.own[1])
        row = dict(label=label, probe=probe, nats=probe["nats"], coherence=probe["coherence"], coeff=coeff,
                   text=free["score"], text_se=free["se"], texts=[c.text for c in texts],
                   diary=[dict(prompt=self.held_out[c.prompt], text=c.text) for c in diary])
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


def persona_distance(model, tok, kept, prompts: list[str], system: str, how: str, reg: str) -> float:
    """How far the persona prompt alone takes the base from itself, on the kept completions: mean D, in nats.

    It makes tau a set point: a healed model may stand about as far from the base as the prompted base does. Both
    readings are of the same completion tokens; only the system prompt in front of them differs.
    """
    def behind(front):
        heads = steer.encode(tok, [prompts[c.prompt] for c in kept], [front] * len(kept))
        return [heal.Sample(ids + c.ids, len(ids), c.prompt) for ids, c in zip(heads, kept)]
    kls = heal.divergences(model, behind(system), contextlib.nullcontext, ref_samples=behind(""), reg=reg, pad_id=steer.pad_of(tok))
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
    persona, (train, held_out) = load_persona(cfg), load_prompts(cfg)
    vignettes = evalmfv.load_vignettes(cfg.vignettes or HERE / "data" / "vignettes.jsonl")
    contexts = load_json(HERE / "data" / "contexts.json")
    device, dtype = placed(cfg)
    _, config, kind = load_config(cfg)
    with named_errors(cfg), torch.device("meta"):
        model = getattr(kind, "from_config", kind)(config)      # the Auto class, or the model's own
        model.tie_weights()                                     # transformers 5.0 leaves that out where nothing is loaded
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
    n_doses = 1 if scfg.coeff else scfg.dose_steps + 2
    n_answers = 2 * scfg.n_make + cfg.rounds * (n_doses * scfg.n_probe + scfg.n_make) + n_rows * (cfg.n_text + cfg.n_diary)
    n_frames, answer = 2 * len(vignettes) * n_rows, scfg.max_new_tokens
    n_steps = cfg.rounds * hcfg.epochs * math.ceil(scfg.n_make / hcfg.heal_batch)
    decoded = n_answers * answer + n_frames * cfg.think_tokens
    read = (n_answers * 2 * (prompt + answer) + n_frames * (frame - cfg.think_tokens)
            + (cfg.rounds + 1) * 2 * len(contexts) * (system + prompt))
    trained = cfg.rounds * hcfg.epochs * scfg.n_make * (prompt + answer)

    size = torch.empty(0, dtype=dtype).element_size()
    peaks = peaks_of(n, n_trained, len(found) - layers[0], bytes_each=size, quantized=bool(cfg.quantize), answer=answer,
                        prompt=system + prompt, frame=system + frame, gen_rows=min(scfg.gen_batch, scfg.n_make), nll_rows=32,
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
    folder.save(weights=fingerprint(model), items=dict(train=train, held_out=held_out))
    print(folder.run["command"])
    n_trained, dtype = sum(p.numel() for p in stack.parameters()), str(next(model.parameters()).dtype).removeprefix("torch.")
    folder.say("model", None, f"{cfg.model}: {n_blocks} blocks of width {width}, {dtype}, steer {steer_layers}, "
               f"lora {lora_layers[0]}-{lora_layers[-1]} rank {lcfg.r}, {n_trained:,} trained parameters")

    for note in [*template_notes(tok), stack.note]:
        if note:
            folder.say("note", None, note)
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

    def one_round(rnd) -> tuple[dict, dict, float]:
        """(the day's row, vectors, dose). RuntimeError: no dose survives, too little is kept, a number is not finite."""
        nonlocal tau
        vectors = steer.fit_vectors(model, tok, persona["pos"], persona["neg"], contexts, steer_layers)
        rng = torch.Generator().manual_seed(stage_seed(cfg.seed, rnd, "probed prompts"))
        probed = [train[i] for i in torch.randperm(len(train), generator=rng).tolist()[:scfg.n_probe]]

        def survival(coeffs):                                   # all doses of a step in one batch, with the same draws
            each = [c for c in coeffs for _ in probed]
            tried = steer.generate(model, tok, probed * len(coeffs), vectors=vectors, coeffs=each, n_draws=len(probed),
                                   seed=stage_seed(cfg.seed, rnd, "probe"), **sampling)
            kept = torch.tensor([float(v.kept) for v in verdicts(tried)])
            return kept.view(len(coeffs), -1).mean(1).tolist()
        coeff, trials = (scfg.coeff, []) if scfg.coeff else steer.find_dose(
            survival, coeff_min=scfg.coeff_min, steps=scfg.dose_steps, min_survive=scfg.min_survive)
        folder.event("dose", rnd, coeff=coeff, trials=trials, norm={k: v.norm().item() for k, v in vectors.items()})

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
        folder.event("heal", rnd, norm=stack.norm(), **record)
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
            raise RuntimeError(f"out of memory in round {rnd}: lower --gen-batch, --eval-batch or --pass-tokens") from None
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
        columns = {"base": (0, ""), "prompted": (0, load_persona(cfg)["pos"][0])} | columns
    sampling = {name: run["options"][name] for name in ("max_new_tokens", "temperature", "top_p", "top_k")}
    sampling["max_new_tokens"] = args.max_new_tokens or sampling["max_new_tokens"]
    width = shutil.get_terminal_size((120, 24)).columns // len(columns) - 3

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
    argv = sys.argv[1:] if argv is None else argv
    is_chat = argv[:1] == ["chat"]
    configs = [] if is_chat else parse(argv)
    try:
        return chat(argv[1:]) if is_chat else dry_run(*configs) if configs[0].dry_run else loop(*configs, argv)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"loop.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("loop.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
