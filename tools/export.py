"""Export: what others can load of a run, each form read back and compared before it gets its name.

    python loop.py export RUN --to peft         an adapter: adapter_model.safetensors, adapter_config.json
    python loop.py export RUN --to merged       a whole checkpoint, W + sum_i B_i A_i rounded once
    python loop.py export RUN --to gguf         the steering vector of a round for llama.cpp, at its dose
    python loop.py export RUN --to vectors      the same as raw safetensors, dose and persona pair as metadata

A model is held against the run's own by its logits on held-out prompts, a file of vectors against the dose
that the run steered with, bit for bit. What is written stands in a folder of its own, whole or not at all, a
model with its card. The card is for strangers and shows no path of this disk; adapter_config.json and what is
printed name what loads.
"""
import argparse
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
import steer
from tools import model as models
from tools.card import Base, last_part, model_card, refusal, serve_line
from tools.files import inert, one_line, read_tensors, save_tensors, write_whole
from tools.gguf import dosed, read_gguf, save_gguf
from tools.record import Record, read
from tools.rounds import read_vectors, restack, save_vectors, total_rank

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FROM_BASE = ("generation_config.json", "processor_config.json", "preprocessor_config.json",
             "video_preprocessor_config.json")                  # what goes along with a merged checkpoint


# ---- the proof ---------------------------------------------------------------------------------------------

class Witness(NamedTuple):
    """What an export is held to: logits [T, V] float32 of the run's model and of its base, by prompt."""
    prompts: list[list[int]]
    run: list[Tensor]
    base: list[Tensor]


@torch.no_grad()
def logits_of(model, prompts: list[list[int]]) -> list[Tensor]:
    """[T, V] float32 on the CPU for each prompt of token ids, one at a time: no padding that could differ."""
    rows = (torch.tensor([ids], device=model.device) for ids in prompts)    # [1, T] each
    return [model(input_ids=row).logits[0].float().cpu() for row in rows]


def witness(stack: lora.Stack, model, prompts: list[list[int]]) -> Witness:
    with stack.gated(0, 0):
        base = logits_of(model, prompts)
    with stack.gated(next(iter(stack.layers.values())).history, 0):
        return Witness(prompts, logits_of(model, prompts), base)


def distance(a: list[Tensor], b: list[Tensor]) -> tuple[float, float]:
    """(largest |logit| difference, largest KL(a || b) in nats), over all positions of all prompts."""
    worst = []
    for x, y in zip(a, b):
        logp, logq = x.double().log_softmax(-1), y.double().log_softmax(-1)                     # [T, V] each
        kl = (logp.exp() * (logp - logq)).sum(-1)                                               # [T]
        worst.append(torch.stack([(x - y).abs().max().double(), kl.max()]))                     # [2]
    return tuple(torch.stack(worst).amax(0).tolist())           # torch keeps a nan, Python's max may drop it


def prove(proof: Witness, found: list[Tensor], dtype: torch.dtype, *, rounded: str,
          target: list[Tensor] | None = None) -> dict:
    """Hold what was loaded back against the run's own model; RuntimeError, with numbers, if it is not that.

    found: logits of the loaded export. rounded: "update" if only the adapter was rounded to `dtype`,
    "weights" if the sum was. target: logits that the file should give, if not the run's own (a lower rank).
    (1) The largest |logit| difference must be within a bound from the dtype: 4 roundings of what was rounded
    (the update's effect, or the logits), and 64 float32 roundings of the logits for the order of the sums.
    (2) KL(run || export) must be under half of KL(run || base): what does nothing fails, however loose (1).
    Returns {off, bound, logit, kl, effect_logit, effect_kl}: the difference of (1) and its bound, then how
    far the export is from the run's own model, and how far that is from its base.
    """
    logit, kl = distance(proof.run, found)
    effect_logit, effect_kl = distance(proof.run, proof.base)
    size = max(x.abs().max().item() for x in proof.run)
    bound = (4 * torch.finfo(dtype).eps * (size if rounded == "weights" else effect_logit)
             + 64 * torch.finfo(torch.float32).eps * size)
    off = logit if target is None else distance(target, found)[0]           # from what was to be written
    numbers = (f"largest |logit| difference {logit:.3g}, largest KL {kl:.3g} nats; "
               f"the run's own effect on the base is {effect_logit:.3g}, {effect_kl:.3g} nats")
    if not off <= bound:                                        # true for nan too
        raise RuntimeError(f"the export, loaded back, is off by {off:.3g}, over the bound of {bound:.3g} for "
                           f"{dtype}: {numbers}")
    if effect_logit > 0 and not kl < effect_kl / 2:
        raise RuntimeError("the export, loaded back, loses the run's effect (rounded away, or a low rank): "
                           f"{numbers}")
    return dict(off=off, bound=bound, logit=logit, kl=kl, effect_logit=effect_logit, effect_kl=effect_kl)


def refuse_existing(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is already there and not empty: take it away or choose another --out")


@contextmanager
def whole_folder(out):
    """A folder under a temporary name beside `out`, renamed at the end of the `with`; gone if that raises.

    OSError if `out` is there by then and not an empty folder: nothing is overwritten."""
    out = Path(out)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if out.exists():
            out.rmdir()                                         # which takes an empty one only
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)            # still there only if something went wrong


# ---- the peft adapter --------------------------------------------------------------------------------------

Pairs = dict[str, tuple[Tensor, Tensor]]                        # module -> A [R, d_in], B [d_out, R]


def concatenated(stack: lora.Stack) -> Pairs:
    """The folded rounds as one pair per Linear, float32 on the CPU; scales and gates are in B.

    R is the same for every Linear, with zero rows where the rounds of one have a lower rank, because vLLM and
    llama.cpp read no rank pattern.
    """
    pairs = {name: layer.frozen(torch.float32) for name, layer in stack.layers.items()}
    R = max(len(A) for A, _ in pairs.values())
    return {name: (F.pad(A, (0, 0, 0, R - len(A))).cpu(),                   # [R, d_in]
                   F.pad(B, (0, R - B.shape[1])).cpu()) for name, (A, B) in pairs.items()}      # [d_out, R]


def compress(pairs: Pairs, rank: int) -> tuple[Pairs, dict[int, float]]:
    """The nearest pairs of this rank, float32, and the relative Frobenius error at it and at other ranks.

    The error is that of all Linears together. By QR and an SVD of R x R, never of d_out x d_in. rank: 1 to R.
    """
    R = len(next(iter(pairs.values()))[0])
    small, squares = {}, torch.zeros(R, dtype=torch.float64)                # [R]  by place in order of size
    for name, (A, B) in pairs.items():
        Qb, Rb = torch.linalg.qr(B.double())                                # [d_out, k], [k, R]  k <= R
        Qa, Ra = torch.linalg.qr(A.double().T)                              # [d_in, k], [k, R]
        U, S, Vt = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)         # [k, k], [k], [k, k]
        squares[:len(S)] += S.square()
        root, gap = S[:rank].sqrt(), max(0, rank - len(S))                  # size shared evenly by both
        A = F.pad(root[:, None] * (Vt[:rank] @ Qa.T), (0, 0, 0, gap))       # [rank, d_in]
        B = F.pad(Qb @ U[:, :rank] * root, (0, gap))                        # [d_out, rank]
        small[name] = A.float(), B.float()
    total = squares.sum().clamp(min=torch.finfo(torch.float64).tiny)
    ranks = sorted({rank, R, *(2 ** i for i in range(10) if 2 ** i < R)})
    return small, {n: (squares[n:].sum() / total).sqrt().item() for n in ranks}


def renamed(pairs: Pairs, ours, theirs) -> Pairs:
    """The pairs under the names that the same Linears have in another class of the same checkpoint."""
    def prefix(model):
        return next(name for name, module in model.named_modules() if module is steer.blocks(model))
    before, after = prefix(ours), prefix(theirs)
    return {after + name.removeprefix(before): pair for name, pair in pairs.items()}


def write_peft(out, pairs: Pairs, proof: Witness, model, *, base: str, revision: str | None = None,
               dtype: torch.dtype = torch.float32, exact: bool = True,
               card: Callable[[dict], str] = lambda check: "") -> dict:
    """Write a peft adapter without peft; returns what `prove` measured on it.

    pairs: float32, all of one rank R; the scale is in B, so alpha = R. Their names are those of `model`, of
    the class that the base's config names: what matches no name is ignored by peft and vLLM without a word.
    model: that base, no gate open. base, revision: what peft and llama.cpp will load. exact: the pairs are
    the run's own, not of a lower rank. card: the measured numbers -> README.md.
    Raises OSError if `out` is not free, RuntimeError as `prove`: then nothing is left.
    """
    R, target = len(next(iter(pairs.values()))[0]), None
    if not exact:
        with adapted(model, pairs):
            target = logits_of(model, proof.prompts)
    tensors = {f"base_model.model.{name}.lora_{which}.weight": tensor.to(dtype)
               for name, pair in pairs.items() for which, tensor in zip("AB", pair)}
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise RuntimeError(f"{len(broken)} tensors are not finite in {dtype}, first {broken[0]}: "
                           "take another --dtype")
    is_transposed = any(type(m).__name__ == "Conv1D" for name, m in model.named_modules() if name in pairs)
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, revision=revision,
                  r=R, lora_alpha=R, lora_dropout=0.0, bias="none", target_modules=sorted(pairs),
                  inference_mode=True, fan_in_fan_out=is_transposed, use_rslora=False, use_dora=False,
                  modules_to_save=None, init_lora_weights=True, rank_pattern={}, alpha_pattern={},
                  layers_to_transform=None, layers_pattern=None, auto_mapping=None)
    with whole_folder(out) as temporary:
        save_tensors(temporary / "adapter_model.safetensors", tensors, format="pt")
        write_whole(temporary / "adapter_config.json", json.dumps(config, indent=1).encode())
        with adapted(model, read_peft(temporary)):
            found = logits_of(model, proof.prompts)
        check = prove(proof, found, dtype, rounded="update", target=target) | dict(rank=R)
        write_whole(temporary / "README.md", card(check).encode())
    return check


def read_peft(path) -> Pairs:
    """The adapter that `write_peft` wrote, as {module: (A [R, d_in], alpha / R * B [d_out, R])}, float32."""
    config = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(Path(path) / "adapter_model.safetensors")[0].items():
        name, which = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key).groups()
        found.setdefault(name, {})[which] = tensor.float()
    return {name: (pair["A"], config["lora_alpha"] / config["r"] * pair["B"]) for name, pair in found.items()}


@contextmanager
def adapted(model, pairs: Pairs):
    """Add B @ A @ x to each named Linear, inside the `with` only; ValueError for a name that is not there."""
    modules, handles = dict(model.named_modules()), []

    def adder(A, B):
        def add(linear, args, y):
            x = args[0]                                                     # [..., d_in]
            return y + x @ A.to(x).T @ B.to(x).T                            # [..., d_out]
        return add
    try:
        for name, (A, B) in pairs.items():
            if name not in modules or lora.sizes(modules[name]) != (A.shape[1], len(B)):
                raise ValueError(f"{type(model).__name__} has no nn.Linear {name} of {A.shape[1]} in, "
                                 f"{len(B)} out")
            handles.append(modules[name].register_forward_hook(adder(A, B)))
        yield model
    finally:
        for handle in handles:
            handle.remove()


# ---- the merged checkpoint ---------------------------------------------------------------------------------

def write_merged(out, pairs: Pairs, proof: Witness, load: Callable, tok, *, dtype: str = "auto",
                 copies: Sequence[Path] = (), card: Callable[[dict], str] = lambda check: "") -> dict:
    """Write a whole checkpoint that needs no adapter; returns what `prove` measured on it.

    load(dtype, path=None) -> the base, or the checkpoint at `path`, as the class that its config names. The
    sum is taken in float32 from the untouched base and rounded once; dtype "auto" is the base's own, tensor
    by tensor, so what no round touches stays as it is, bit for bit. pairs: named as in that class. copies:
    what goes along. Raises as `write_peft`, and RuntimeError if the chat template or the tokenizer changed.
    """
    from transformers import AutoTokenizer
    with whole_folder(out) as temporary:
        model = load(dtype)
        modules = dict(model.named_modules())
        for name, (A, B) in pairs.items():
            W = modules[name].weight.data                       # [d_out, d_in], of a Conv1D [d_in, d_out]
            W.copy_(W.float() + (B @ A if isinstance(modules[name], nn.Linear) else (B @ A).T))
        written = W.dtype
        model.save_pretrained(temporary, max_shard_size="5GB")
        tok.save_pretrained(temporary)
        for path in copies:
            shutil.copyfile(path, temporary / path.name)
        del model, modules, W                                   # two copies of the base are enough
        back = AutoTokenizer.from_pretrained(temporary, trust_remote_code=False)
        ours, theirs = (steer.encode(t, ["Hello!"], [""]) for t in (tok, back))
        if ours != theirs:
            raise RuntimeError(f"the tokenizer, loaded back, gives {theirs} for a chat turn that was {ours}")
        check = prove(proof, logits_of(load("float32", temporary), proof.prompts), written, rounded="weights")
        write_whole(temporary / "README.md", card(check).encode())
    return check


def write_vectors(out, to: str, name: str, vectors: dict[int, Tensor], coeff: float, model_type: str,
                  notes: dict[str, str]) -> dict:
    """Write the vectors of a round as a file in a folder; RuntimeError if read back they differ."""
    with whole_folder(out) as temporary:
        if to == "gguf":
            save_gguf(temporary / f"{name}.gguf", vectors, coeff, model_type, notes)
            found = read_gguf(temporary / f"{name}.gguf")[0]
        else:
            save_vectors(temporary / f"{name}.safetensors", vectors, **notes, coeff=repr(coeff))
            found = dosed(*read_vectors(temporary / f"{name}.safetensors")[:2])
        want = dosed(vectors, coeff)
        if found.keys() != want.keys() or not all(torch.equal(found[layer], v) for layer, v in want.items()):
            raise RuntimeError(f"{name}: what was read back is not the dose that was written")
    return dict(off=0.0, coeff=coeff)


# ---- the base, the rounds, the names of folders ------------------------------------------------------------

def base_of(run: dict, moved: str = "") -> Base:
    """Where the base of a run is; `moved`: where it is now instead. ValueError if it is not there."""
    name, revision = moved or run["options"]["model"], "" if moved else run["options"]["revision"]
    try:
        where, config, _ = models.config_of(name, revision)
    except ValueError as error:
        raise ValueError(f"{error}. If the base has moved: --base DIR") from None
    if name == "pocket" or Path(name).exists():
        return Base(str(Path(where if name == "pocket" else name).resolve()), "", last_part(name), config)
    return Base(where, config._commit_hash or revision, where, config)


def folder_name(to: str, rank: int | None, last: int | None, dtype: str) -> str:
    """One folder for each way of exporting, so that no two meet in one."""
    parts = [to, f"r{rank}" if rank is not None else "", f"round{last}" if last is not None else "",
             dtype if dtype != "auto" else ""]
    return "-".join(filter(None, parts))


# ---- the command -------------------------------------------------------------------------------------------

def export(path, to: str, *, rank: int | None = None, last: int | None = None, out=None, dtype: str = "auto",
           base: str = "") -> dict:
    """Export a run; prints what was measured and how to serve it, returns the measures.

    A model takes the accepted rounds up to `last`, a file of vectors is that of round `last`; default: all,
    and the first accepted one. base: where the base is, if not where the run had it. Raises ValueError for
    bad input, and RuntimeError if what was written, loaded back, is not the run's: then nothing is left.
    """
    record, out = read(path), Path(out or Path(path) / folder_name(to, rank, last, dtype))
    if rank is not None and to != "peft":
        raise ValueError(f"--rank is for --to peft: {to} has no rank to choose")
    if dtype != "auto" and to not in ("peft", "merged"):
        raise ValueError(f"--dtype is for --to peft and merged: {to} is float32")
    refuse_existing(out)
    work = export_model if to in ("peft", "merged") else export_vectors
    return work(record, to, rank=rank, last=last, out=out, dtype=dtype, moved=base)


def warn_if_refused(record: Record, rnd: int) -> None:
    if why := refusal(record, rnd):
        print(f"warning  round {rnd} did not pass the run's acceptance check: {inert(why)}")


def export_vectors(record: Record, to: str, *, last: int | None, out: Path, moved: str, **_) -> dict:
    """The steering vector of a round, at the dose that the run settled on."""
    found = sorted(record.path.glob("rounds/[0-9]*/vectors.safetensors"))
    files = {int(path.parent.name): path for path in found}
    rnd = next((rnd for rnd in record.accepted if rnd in files), None) if last is None else last
    if rnd not in files:
        what = "no accepted round" if rnd is None else f"no vectors of round {rnd}"
        there = ", ".join(map(str, files)) or "none"
        raise ValueError(f"{record.path} has {what}; rounds with vectors: {there}")
    vectors, coeff, _ = read_vectors(files[rnd])
    if coeff is None:
        raise ValueError(f"round {rnd} of {record.path} has no dose: it ended before its search did")
    base, persona = base_of(record.run, moved), record.run["persona"]
    before = ", ".join(str(i) for i in record.accepted if i < rnd)
    notes = {"operation": "add", "hook": "block_output", "positions": "all",
             "layers": json.dumps(list(vectors)),
             **{side: json.dumps(persona[side], ensure_ascii=False) for side in ("pos", "neg")},
             "model": base.name, "revision": base.commit,
             "fitted_on": "base" + (f" + the adapters of rounds {before}" if before else "")}
    check = write_vectors(out, to, f"night{rnd}", vectors, coeff, base.config.model_type, notes)
    warn_if_refused(record, rnd)
    first, last = min(vectors), max(vectors)
    print(f"wrote    {out}: the vector of round {rnd}, fitted on the {notes['fitted_on']}, blocks {first} to "
          f"{last}, dose {coeff:.4g}\nproved   read back: equal to what the run steered with")
    if to == "gguf":
        file = shlex.quote(str(out / f"night{rnd}.gguf"))
        print(f"serve    llama-server -m MODEL.gguf --control-vector {file} "
              f"--control-vector-layer-range {first} {last}")
    return check


def export_model(record: Record, to: str, *, rank: int | None, last: int | None, out: Path, dtype: str,
                 moved: str) -> dict:
    """The run's model, as an adapter or a whole checkpoint; compared in float32 on the CPU, on four held-out
    prompts with the last day's own answers."""
    run, files = record.run, record.adapters(last)
    total = total_rank(list(files.values()))
    if rank is not None and not 1 <= rank <= total:
        raise ValueError(f"--rank {rank}: the rounds have rank {total} in all, so expected 1 to {total}")
    import transformers                                         # slow: not for --help or a wrong argument
    base = base_of(run, moved)
    if to == "merged" and (getattr(base.config, "quantization_config", None) or base.where.endswith(".gguf")):
        raise ValueError(f"{base.name} is quantised: W + B @ A would have to be quantised again, which loses "
                         "the update; use --to peft, or merge into its unquantised original with --base")
    model, tok = models.load(base.where, revision=base.commit, dtype="float32", device="cpu",
                             date=run.get("date", ""))
    machine, exact = run.get("machine", {}), ("torch.float32", str(base.config.dtype))
    is_sure = machine.get("device") == "cpu" and machine.get("dtype") in exact    # a GPU sums otherwise
    if is_sure and run.get("weights") not in (None, models.fingerprint(model)):
        raise ValueError(f"{base.where}: its weights are not those of the run; name those with --base")
    days = [row for row in record.rows("healed") if row["round"] == max(files)] or record.rows("base")
    diary = days[-1]["diary"][:4]
    fronts = steer.encode(tok, [entry["prompt"] for entry in diary], [""] * len(diary))
    answers = [tok(entry["text"], add_special_tokens=False)["input_ids"] for entry in diary]
    prompts = [front + answer for front, answer in zip(fronts, answers)]
    stack = restack(model, list(files.values()))
    proof, pairs, errors = witness(stack, model, prompts), concatenated(stack), {}
    stack.remove()
    if rank is not None:
        pairs, errors = compress(pairs, rank)

    serving = getattr(transformers, (base.config.architectures or [""])[0], type(model))    # it has the names
    pinned = dict(revision=base.commit or "main", trust_remote_code=False)

    def load(dtype, path=None):
        model, info = serving.from_pretrained(path or base.where, dtype=dtype, use_safetensors=True,
                                              output_loading_info=True, **{} if path else pinned)
        if info["missing_keys"]:
            raise RuntimeError(f"{path or base.where} lacks {len(info['missing_keys'])} tensors, such as "
                               f"{min(info['missing_keys'])}")
        return model.eval()

    def card(check):
        words = ["--to", to, *(["--rank", str(rank)] if rank is not None else []),
                 *(["--dtype", dtype] if dtype != "auto" else []), "--round", str(max(files))]
        return model_card(record, base, list(files), words, to, check)
    if to == "peft":
        theirs = model if type(model) is serving else load("float32")
        check = write_peft(out, renamed(pairs, model, theirs), proof, theirs, base=base.where, card=card,
                           revision=base.commit or None, exact=rank in (None, total),
                           dtype=DTYPES["float32" if dtype == "auto" else dtype])
    else:
        with torch.device("meta"):
            pairs = renamed(pairs, model, serving(base.config))
        del model, stack
        tok = transformers.AutoTokenizer.from_pretrained(base.where, **pinned)       # as on the disk, undated
        quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
        found = (transformers.utils.cached_file(base.where, name, revision=pinned["revision"], **quiet)
                 for name in FROM_BASE)
        copies = [Path(file) for file in found if file]
        check = write_merged(out, pairs, proof, load, tok, dtype=dtype, copies=copies, card=card)
    for n, error in errors.items():
        print(f"rank {n:4d}  relative Frobenius error {error:.2e}{'  <- written' if n == rank else ''}")
    warn_if_refused(record, max(files))
    size = sum(file.stat().st_size for file in out.iterdir()) / 2 ** 20
    rounds = ", ".join(map(str, files)) + (f", rank {check['rank']}" if to == "peft" else "")
    print(f"wrote    {out}: rounds {rounds}, {size:.1f} MiB\n"
          f"proved   loaded back: off by {check['off']:.2g} in the largest |logit|, "
          f"bound {check['bound']:.2g}\n"
          f"         against the run's own model: largest |logit| difference {check['logit']:.2g}, "
          f"largest KL {check['kl']:.2g} nats\n         the run's own effect on the base: "
          f"{check['effect_logit']:.2g}, {check['effect_kl']:.2g} nats"
          f"{'' if check['effect_logit'] else ': none at all, so that is what was exported'}\n"
          f"serve    {serve_line(to, check, base, out)}")
    return check | dict(lost=errors)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="loop.py export", description="What others can load of a run.")
    parser.add_argument("run", metavar="RUN", help="run folder of loop.py")
    parser.add_argument("--to", required=True, choices=["peft", "merged", "gguf", "vectors"],
                        help="an adapter; a whole checkpoint; a steering vector for llama.cpp, or raw")
    parser.add_argument("--rank", type=int, help="compress the adapter to it; prints the errors of others")
    parser.add_argument("--round", type=int, help="a model: the accepted rounds up to this one, default all; "
                        "a vector: of this round, default the first. Takes a refused round too")
    parser.add_argument("--out", help="folder to write; default: one in RUN, named after what is asked for")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto",
                        help="auto = float32 for peft, the base's own for merged")
    parser.add_argument("--base", default="", help="where the base model is, if not where the run had it")
    args = parser.parse_args(argv)
    try:
        export(args.run, args.to, rank=args.rank, last=args.round, out=args.out, dtype=args.dtype,
               base=args.base)
    except (ValueError, OSError) as error:
        print(f"loop.py export: {one_line(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"loop.py export: {one_line(error)}; nothing was written", file=sys.stderr)
        return 1
    return 0
