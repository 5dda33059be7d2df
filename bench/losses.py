"""Bench of heal.py: its losses against every peer's, a round in its fast and its plain passes, and how both
grow.

    python bench/losses.py                  all of it: accuracy, memory, time, round, scale (about 20 minutes,
    two cores)
    python bench/losses.py --only round     one part
    python bench/losses.py --tiny           seconds, for CI: the same code at sizes whose times mean nothing

Every table interleaves its entries in one process. Times are taken with malloc told to keep its pages, so
that they compare arithmetic and not page faults (measure.keep_pages). Peers are measured where they are
installed (bench/requirements.txt), through their own public functions and on their plain torch paths: Triton
kernels need a GPU. `original` is the structure that this project re-implements, written by us from a
description: one sample per pass, logits of the whole sequence, log_softmax in the model's dtype, then the
mask; the reference in every epoch.
"""
import argparse
import contextlib
import dataclasses
import importlib.metadata
import runpy
import sys
import warnings
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import heal  # noqa: E402
import lora  # noqa: E402
from heal_original import original_round  # noqa: E402
from measure import interleave, keep_pages, megabytes, peak_bytes, rows_of, table, write_json  # noqa: E402
from plot import svg_lines  # noqa: E402

LAM, TAU_OPEN, TAU_SHUT = 5.0, 0.0, 1e6


# ---- the head: hidden states in, a loss out ----------------------------------------------------------

class Case:
    """Hidden states [N, d] of a student and its reference, the head [V, d], targets [N]; mean KL near `kl`
    nats."""

    def __init__(self, N: int, V: int, d: int, dtype: torch.dtype, shift: float = 0.06, prompt: int = 64,
                 seed: int = 0):
        rng = torch.Generator().manual_seed(seed)
        # the prompt's rows come first: only `original` computes them
        full = torch.randn(prompt + N, d, generator=rng)
        other = full + shift * torch.randn(prompt + N, d, generator=rng)
        self.full, self.full_ref = full.to(dtype).requires_grad_(), other.to(dtype)             # [L, d]
        self.h, self.h0 = full[prompt:].to(dtype).requires_grad_(), other[prompt:].to(dtype)    # [N, d]
        self.W = (torch.randn(V, d, generator=rng) * (2 / d ** 0.5)).to(dtype)        # [V, d]  logits of sd 2
        self.targets, self.prompt, self.size = torch.randint(V, (N,), generator=rng), prompt, (N, V, d)


def barrier(nll, kl, how="rmse", tau=TAU_OPEN):
    return nll.mean() + LAM * torch.relu(heal.aggregate(kl, how) - tau)


def ours(c, how="rmse", tau=TAU_OPEN):
    barrier(*heal.token_losses(c.h, c.h0, c.W, c.targets), how, tau).backward()


def naive(c):
    barrier(*heal.naive_losses(c.h @ c.W.T, c.h0 @ c.W.T, c.targets)).backward()


def original(c):
    logp = (c.full @ c.W.T).log_softmax(-1)                      # [L, V]  the prompt's rows too, in c's dtype
    with torch.no_grad():
        logq = (c.full_ref @ c.W.T).log_softmax(-1)                             # [L, V]
    kl = (logp.exp() * (logp - logq)).sum(-1)[c.prompt:]                        # [N]
    nll = -logp[c.prompt:].gather(1, c.targets[:, None])[:, 0]                  # [N]
    barrier(nll.float(), kl.float()).backward()


def checkpointed(c, chunk=64):
    def part(h, h0, targets):
        return torch.stack(heal.naive_losses(h @ c.W.T, h0 @ c.W.T, targets))  # [2, n]
    parts = [checkpoint(part, c.h[i:i + chunk], c.h0[i:i + chunk], c.targets[i:i + chunk],
                        use_reentrant=False)
             for i in range(0, len(c.h), chunk)]
    barrier(*torch.cat(parts, 1)).backward()


def peers() -> dict:
    """{name: fn(case)} for what is installed, {name: reason} for what is not: both end up in the tables."""
    fns, missing = {}, {}

    @contextlib.contextmanager
    def needs(name, package):
        try:
            yield
        except Exception as error:                              # a peer may break in any way at import
            why = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            missing[f"{name} {_version(package)}".strip()] = f"not run: {why}"
    with needs("TRL GKD", "trl"):
        from trl.experimental.gkd import GKDTrainer

        def trl(c):
            logits = c.h @ c.W.T                                                # [N, V]
            with torch.no_grad():
                ref = c.h0 @ c.W.T                                              # [N, V]
            kl = GKDTrainer.generalized_jsd_loss(logits[None], ref[None], labels=c.targets[None], beta=1.0)
            (F.cross_entropy(logits.float(), c.targets) + LAM * kl).backward()
        fns[f"TRL GKD {_version('trl')}"] = trl
    with needs("torchtune chunked reverse KL", "torchtune"):
        # the file alone: the package wants a torchao that peft refuses
        installed = importlib.metadata.distribution("torchtune")
        where = installed.locate_file("torchtune/modules/loss/kd_losses.py")
        ReverseKLWithChunkedOutputLoss = runpy.run_path(str(where))["ReverseKLWithChunkedOutputLoss"]
        reverse = ReverseKLWithChunkedOutputLoss()

        def torchtune(c):
            chunks = [h @ c.W.T for h in c.h.chunk(8)]                          # 8 of [N / 8, V]
            with torch.no_grad():
                ref = [h @ c.W.T for h in c.h0.chunk(8)]
            nll = sum(F.cross_entropy(z.float(), t,
                                      reduction="sum") for z, t in zip(chunks, c.targets.chunk(8))) / len(c.h)
            kl = reverse([z[None] for z in chunks], [z[None] for z in ref], c.targets[None])
            (nll + LAM * kl).backward()
        fns[f"torchtune chunked reverse KL {_version('torchtune')}"] = torchtune
    with needs("Liger fused linear JSD", "liger-kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        for name, kw in (("", dict(compiled=False)), (", compiled", dict(compiled=True)),
                         (", chunks of 64", dict(compiled=False, chunk_size=64))):
            fused = LigerFusedLinearJSDLoss(weight_hard_loss=1.0, weight_soft_loss=LAM, beta=1.0, **kw)

            def liger(c, fused=fused):
                fused(c.h, c.W, c.h0, c.W, c.targets).backward()
            fns[f"Liger fused linear JSD {_version('liger-kernel')}{name}"] = liger
    return fns, missing


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def everyone() -> tuple[dict, dict]:
    fns, missing = peers()
    return {"ours": ours, "ours, barrier shut": lambda c: ours(c, tau=TAU_SHUT),
            "ours, max": lambda c: ours(c, how="max"), "ours, p95": lambda c: ours(c, how="p95"),
            "naive autograd": naive, "original": original, "checkpoint, chunks of 64": checkpointed,
            **fns}, missing


def runs(fns: dict, case: Case, missing: dict) -> dict:
    """The entries that work at all: one that raises goes to `missing` with its reason."""
    able = {}
    for name, fn in fns.items():
        try:
            case.h.grad = case.full.grad = None
            fn(case)
            able[name] = fn
        except Exception as error:
            missing[name] = f"not run: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return able


# ---- accuracy ----------------------------------------------------------------------------------------


def accuracy(tiny: bool) -> dict:
    """float64 against autograd, then bfloat16 against float64 on the same bfloat16 inputs."""
    rows, out = [], {}
    N, V, d = (16, 300, 16) if tiny else (64, 5000, 64)
    for how in [*heal.AGGREGATES, "barrier alone"]:
        for reg in ("kl_rev", "kl_fwd"):
            c = Case(N, V, d, torch.float64, shift=0.3)
            agg = "rmse" if how == "barrier alone" else how
            got = heal.token_losses(c.h, c.h0, c.W, c.targets, reg=reg, tile=V // 7)            # [N], [N]
            want = heal.naive_losses(c.h @ c.W.T, c.h0 @ c.W.T, c.targets, reg)                 # [N], [N]
            grads = [torch.autograd.grad((how != "barrier alone") * nll.mean()
                                         + LAM * heal.aggregate(kl, agg), c.h)[0]
                     for nll, kl in (got, want)]                                                # [N, d] each
            worst_value = max((a - b).abs().max().item() for a, b in zip(got, want))
            worst_grad = ((grads[0] - grads[1]).abs().max() / grads[1].abs().max()).item()
            rows.append({"float64": how, "reg": reg, "value, largest error": f"{worst_value:.0e}",
                         "gradient, relative": f"{worst_grad:.0e}"})
            out[f"{how} {reg}"] = dict(value=worst_value, grad=worst_grad)
    print(table(rows), "\n")
    rows = []
    N, V, d = (32, 1000, 64) if tiny else (128, 32768, 640)
    for shift in (0.0, 0.006, 0.03, 0.15, 0.45):
        c = Case(N, V, d, torch.bfloat16, shift=shift * 2)
        x = c.h.detach().double().requires_grad_()
        truth = heal.naive_losses(x @ c.W.double().T, c.h0.double() @ c.W.double().T, c.targets)[1]     # [N]
        heal.aggregate(truth, "rmse").backward()

        def half(c):
            logp, logq = (c.h @ c.W.T).log_softmax(-1), (c.h0 @ c.W.T).log_softmax(-1)
            return (logp.exp() * (logp - logq)).sum(-1)
        ways = {"ours": lambda c: heal.token_losses(c.h, c.h0, c.W, c.targets)[1],
                "softmax in float32": lambda c: heal.naive_losses(c.h @ c.W.T, c.h0 @ c.W.T, c.targets)[1],
                "softmax in bfloat16": half}
        row, errors = {"bfloat16, mean KL": f"{truth.mean():.4f}"}, {}
        for name, way in ways.items():
            c.h.grad = None
            kl = way(c)
            heal.aggregate(kl.float(), "rmse").backward()
            error = (kl.double() - truth).abs().mean().item()
            grad = ((c.h.grad.double() - x.grad).norm() / x.grad.norm()).item() if shift else float("nan")
            errors[name] = dict(value=error, grad=grad, lowest=kl.min().item())
            row[f"{name}: KL error, gradient"] = f"{error:.1e}, {grad:.1%}" if shift else f"{error:.1e}"
        ratio = errors["softmax in bfloat16"]["value"] / max(errors["ours"]["value"], 1e-30)
        row["bfloat16 / ours"] = f"{ratio:.0f}x" if shift else "KL is 0"
        rows.append(row)
        out[f"bf16 {truth.mean():.4f}"] = errors
    print(table(rows), "\n")
    return out


# ---- memory and time of the head ---------------------------------------------------------------------


def memory(tiny: bool) -> dict:
    sizes = [(32, 500, 16), (32, 4000, 16)] if tiny else [(512, 32768, 2560), (512, 262208, 2560)]
    fns, missing = everyone()
    rows = {name: {"MiB above the inputs": name} for name in fns}
    out: dict = {}
    for N, V, d in sizes:
        c = Case(N, V, d, torch.bfloat16)
        for name, fn in runs(fns, c, missing).items():
            c.h.grad = c.full.grad = None
            peak = peak_bytes(lambda: fn(c))
            rows[name][f"N {N}, V {V:,}, d {d}"] = megabytes(peak)
            out.setdefault(name, {})[str((N, V, d))] = peak
            print(f"  {name}: {megabytes(peak)}", file=sys.stderr, flush=True)
    print(table([row for name, row in rows.items() if name not in missing]))
    print("\n".join(f"{name}: {why}" for name, why in missing.items()), "\n")
    return {"peak": out, "missing": missing}


def times(tiny: bool, repeats: int) -> dict:
    out = {}
    for N, V, d in [(32, 2000, 16)] if tiny else [(256, 262208, 640), (256, 32768, 640)]:
        fns, missing = everyone()
        c = Case(N, V, d, torch.bfloat16)
        able = runs(fns, c, missing)

        def fresh(fn):
            def call():
                c.h.grad = c.full.grad = None
                fn(c)
            return call
        seconds = interleave({name: fresh(fn) for name, fn in able.items()}, repeats)
        rows = rows_of(seconds, "ours")
        for row, name in zip(rows, seconds):
            row[f"N {N}, V {V:,}, d {d}, bfloat16"] = row.pop("")
            del row["gain"]
            row["time / ours"] = f"{median(seconds[name]) / median(seconds['ours']):.2f}"
        print(table([{list(r)[-2]: r[list(r)[-2]], **{k: v for k, v in r.items()}} for r in rows]))
        print("\n".join(f"{name}: {why}" for name, why in missing.items()), "\n")
        out[str((N, V, d))] = dict(seconds=seconds, missing=missing)
    return out


# ---- a round -----------------------------------------------------------------------------------------


def small_llama(vocabulary: int, width: int, n_blocks: int, seed: int = 0):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width,
                         num_hidden_layers=n_blocks,
                         num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True,
                         pad_token_id=0, bos_token_id=1,
                         eos_token_id=2)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def make_samples(n: int, n_prompt: int, n_new: int, vocabulary: int) -> list:
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (n, n_prompt + n_new), generator=rng)                    # [n, T]
    return [heal.Sample(row, n_prompt, 0) for row in ids.tolist()]      # one prompt: nothing is held out


def peft_twin(model, layers, stack):
    """(a peft model over a copy of the same base, its params), with the A that our stack starts from."""
    import copy

    from peft import LoraConfig, get_peft_model
    stack.remove()                                              # copy the base without our hooks
    twin = get_peft_model(copy.deepcopy(model),
                          LoraConfig(r=8, lora_alpha=16, target_modules=[name for name in stack.layers]))
    stack.handles = [model.get_submodule(name).register_forward_hook(x) for name, x in stack.layers.items()]
    wrapped = dict(twin.base_model.model.named_modules())
    for name, x in stack.layers.items():
        wrapped[name].lora_A["default"].weight.data.copy_(x.A)
    return twin.eval(), [p for p in twin.parameters() if p.requires_grad]


def a_round(tiny: bool, repeats: int) -> dict:
    """Where a round's time goes: the same optimiser steps in plain and in fast passes, one sample and several
    a pass."""
    V, width, n_blocks, n_samples, n_prompt, n_new = (300, 32, 5, 8, 4, 6) if tiny else (16384, 256, 8, 16,
                                                                                         32, 64)
    model = small_llama(V, width, n_blocks)
    layers = list(range(n_blocks // 5, n_blocks - n_blocks // 5))
    stack = lora.attach(model, r=8, alpha=16, layers=layers)
    samples = make_samples(n_samples, n_prompt, n_new, V)
    cfg = heal.HealConfig(lr=2e-3, lam=LAM, epochs=2 if tiny else 5, heal_batch=4)
    steps = {"hooks of ours, plain passes": dict(fast=False, pass_tokens=1),
             "+ no logits, reference once": dict(fast=True, pass_tokens=1),
             "+ several samples per pass (the default)": dict(fast=True, pass_tokens=2048),
             "several samples per pass alone": dict(fast=False, pass_tokens=2048)}
    out, missing = {}, {}
    try:
        twin, twin_params = peft_twin(model, layers, stack)
        start = [p.detach().clone() for p in twin_params]
    except ImportError as error:
        missing["peft, completion rows"] = f"not run: {error}"
    for title, tau in (("barrier on at every step", TAU_OPEN), ("barrier shut", TAU_SHUT)):
        losses = {}

        def run_ours(name, options):
            def go():
                stack.drop()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    last = heal.heal(model, stack.parameters(), samples, lambda: stack.gated(0, 0),
                                     dataclasses.replace(cfg, tau=tau, **options))["steps"][-1]
                losses[name] = last["nll"] + LAM * max(last["div"] - tau, 0.0)
            return go

        def run_original():
            stack.drop()
            losses["original"] = original_round(model, stack.parameters(), samples, lambda: stack.gated(0, 0),
                                                cfg, tau)

        def run_peft():
            for p, value in zip(twin_params, start):
                p.data.copy_(value)
            losses[f"peft {_version('peft')}, completion rows"] = original_round(
                twin, twin_params, samples, twin.disable_adapter, cfg, tau, False)
        fns = {"original": run_original}
        if not missing:
            fns[f"peft {_version('peft')}, completion rows"] = run_peft
        fns |= {name: run_ours(name, options) for name, options in steps.items()}
        seconds = interleave(fns, repeats, warm_up=not tiny)
        rows = rows_of(seconds, "original",
                       None if tiny else {name: peak_bytes(fn) for name, fn in fns.items()})
        for row in rows:
            row["last loss"] = f"{losses[row['']]:.6f}"
            if not missing:
                row["over peft"] = f"x{median(seconds[list(fns)[1]]) / median(seconds[row['']]):.2f}"
            row[title] = row.pop("")
        print(table([{title: r[title], **r} for r in rows]))
        spread = max(losses.values()) - min(losses.values())
        print(f"largest difference of the last loss: {spread:.1e}")
        print("\n".join(f"{name}: {why}" for name, why in missing.items()), "\n")
        # same steps, or the table compares different things
        assert spread < 1e-4 * max(losses.values()), losses
        out[title] = dict(seconds=seconds, losses=losses, missing=missing)
    return out


# ---- scale -------------------------------------------------------------------------------------------


def scale(tiny: bool, repeats: int, docs: Path | None) -> dict:
    """Time and peak of the losses against N and V, and of a step against samples and folded rounds."""
    out, d = {}, 64 if tiny else 640
    grid = {"V": [(64, V) for V in ((500, 1000) if tiny else (8192, 16384, 32768, 65536, 131072, 262208))],
            "N": [(N, 1000 if tiny else 32768) for N in ((16, 32) if tiny else (64, 128, 256, 512, 1024))]}
    for axis, sizes in grid.items():
        lines: dict = {"ours": [], "naive autograd": []}
        for N, V in sizes:
            c = Case(N, V, d, torch.bfloat16)
            fns = {"ours": lambda: ours(c), "naive autograd": lambda: naive(c)}
            seconds = interleave(fns, repeats)
            for name, fn in fns.items():
                lines[name].append(dict(N=N, V=V, s=median(seconds[name]), peak=peak_bytes(fn)))
        out[axis] = lines
        print(table([{axis: f"{a[axis]:,}", "ours s": f"{a['s']:.3f}", "naive s": f"{b['s']:.3f}",
                      "ours MiB": megabytes(a["peak"]),
                      "naive MiB": megabytes(b["peak"])} for a, b in zip(*lines.values())]), "\n")
    V, width, n_blocks = (300, 32, 5) if tiny else (8192, 256, 8)
    cfg = heal.HealConfig(lr=1e-3, tau=0.1, epochs=1, heal_batch=64)
    model = small_llama(V, width, n_blocks)
    stack = lora.attach(model, r=8, alpha=16, layers=list(range(1, n_blocks - 1)))

    def step_of(n):
        samples = make_samples(n, 16, 48, V)

        def go():
            stack.drop()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                heal.heal(model, stack.parameters(), samples, lambda: stack.gated(0, 0), cfg)
        return go
    ns = (2, 4) if tiny else (4, 8, 16, 32, 64)
    seconds = interleave({str(n): step_of(n) for n in ns}, repeats)
    out["samples"] = [dict(n=n, s=median(seconds[str(n)]), peak=peak_bytes(step_of(n))) for n in ns]
    print(table([{"samples in one optimiser step": x["n"], "s": f"{x['s']:.3f}",
                  "MiB": megabytes(x["peak"])} for x in out["samples"]]), "\n")
    out["folded"] = []
    for n_folded in range(3 if tiny else 9):
        if n_folded in (0, 1, 2, 4, 8):
            seconds = interleave({"s": step_of(8)}, repeats)
            out["folded"].append(dict(rounds=n_folded, s=median(seconds["s"]), peak=peak_bytes(step_of(8))))
        for lo in stack.layers.values():
            lo.B.data.normal_(std=0.01)
        stack.fold()
    print(table([{"folded rounds": x["rounds"], "s": f"{x['s']:.3f}",
                  "MiB": megabytes(x["peak"])} for x in out["folded"]]), "\n")
    if docs:
        for axis, label in (("V", "vocabulary V"), ("N", "completion positions N")):
            for key, unit, factor in (("s", "seconds", 1), ("peak", "MiB above the inputs", 2 ** -20)):
                svg_lines(docs / f"heal-{key}-{axis}.svg", f"losses and gradient: {unit}, against {label}",
                          label, unit,
                          {name: [(x[axis],
                                   factor * x[key]) for x in line] for name, line in out[axis].items()})
        svg_lines(docs / "heal-samples.svg", "one optimiser step: seconds against samples", "samples",
                  "seconds",
                  {"heal step": [(x["n"], x["s"]) for x in out["samples"]]})
        svg_lines(docs / "heal-folded.svg", "a round of 8 samples: seconds against folded rounds",
                  "folded rounds", "seconds",
                  {"heal": [(x["rounds"], x["s"]) for x in out["folded"]]}, log=False)
    return out


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("accuracy", "memory", "time", "round", "scale"), help="one part")
    parser.add_argument("--tiny", action="store_true", help="sizes for CI: correctness, not timing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--docs", type=Path, help="write the scale plots (SVG) into this folder")
    args = parser.parse_args(argv)
    repeats = 1 if args.tiny else args.repeats
    parts = {"accuracy": lambda: accuracy(args.tiny), "memory": lambda: memory(args.tiny),
             "time": lambda: times(args.tiny, repeats),
             "round": lambda: a_round(args.tiny, repeats),
             "scale": lambda: scale(args.tiny, repeats, args.docs)}
    if not args.tiny:
        keep_pages()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    results = {}
    for name, part in parts.items():
        if args.only in (None, name):
            print(f"== {name}\n", flush=True)
            results[name] = part()
    if args.json:
        write_json(args.json, **results)


if __name__ == "__main__":
    main()
