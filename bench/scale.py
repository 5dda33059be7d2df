"""What more processes bring: tokens/s of generation, frames/s of the probe, steps/s of healing.

    python -m torch.distributed.run --nproc-per-node 2 bench/scale.py [MODEL] [--repeats 3] [--json FILE]
    python bench/scale.py --paper       two of them by arithmetic, for 4B, 27B and 70B on 1, 8, 64 devices

Measured in one group of processes, interleaved: first rank 0 works alone while the others wait, then all do,
then all and alone, and so on. Both do the same work and give the same answers. Every process has one thread.
On a machine with other work the clock counts waiting for a core too; the CPU time of the busiest rank leaves
that out, and waiting for the others with it.
"""
import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import evalmfv                                                  # noqa: E402
import heal                                                     # noqa: E402
import lora                                                     # noqa: E402
import steer                                                    # noqa: E402
from measure import machine, table, write_json                  # noqa: E402
from tools import inputs, plan, ranks                           # noqa: E402
from tools import model as models                               # noqa: E402
from tools.search import band                                   # noqa: E402

# of one H100: 40% of the dense bfloat16 peak and three quarters of the memory's rate, as good kernels reach
H100 = dict(flops=400e12, bytes=2.5e12)
SHAPES = {  # blocks, width, inner, heads, key heads, head width, vocabulary
    "4B (Gemma 3)": (34, 2560, 10240, 8, 4, 256, 262208),
    "27B (Gemma 3)": (62, 5376, 21504, 32, 16, 128, 262208),
    "70B (Llama 3)": (80, 8192, 28672, 64, 8, 128, 128256)}


def paper(n_answers=512, prompt=64, answer=256, batch=64, r=32) -> list[dict]:
    """One row per model and number of devices; weights of 2 bytes, of 70B half a byte."""
    rows = []
    for name, (n_blocks, d, inner, heads, kv, head_dim, V) in SHAPES.items():
        block = d * head_dim * (2 * heads + 2 * kv) + 3 * d * inner
        n = dict(blocks=[block] * n_blocks, windows=[None] * n_blocks, query=heads * head_dim,
                 kv=2 * kv * head_dim, V=V, d=d, inner=inner, linear=n_blocks * block,
                 parameters=n_blocks * block + V * d)
        shapes = [(d, heads * head_dim), (d, kv * head_dim), (d, kv * head_dim), (heads * head_dim, d),
                  (d, inner), (d, inner), (inner, d)]
        n_trained = round(0.6 * n_blocks) * sum(r * (a + b) for a, b in shapes)
        peaks = plan.peaks_of(n, n_trained, round(0.8 * n_blocks), width=2, quantized="70B" in name,
                              answer=answer, longest=prompt + answer, frame=500, rows=n_answers // 8,
                              probe_rows=64, heal_rows=4, n_samples=n_answers)
        _, step, train = plan.paces(n, H100, prompt + answer, peaks["weights"] / n["parameters"])
        one = None
        for n_devices in (1, 8, 64):
            share = -(-n_answers // n_devices)
            seconds = dict(decode=answer * step(share),
                           step=train * (prompt + answer) * max(1, batch // n_devices)
                           + plan.reduce_seconds(4 * n_trained, n_devices))
            one = one or seconds
            rows.append({"model": name, "devices": n_devices,
                         "GB a device": f"{max(peaks.values()) / 1e9:.0f}",
                         "tokens/s": f"{n_answers * answer / seconds['decode']:,.0f}",
                         "efficiency": f"{one['decode'] / n_devices / seconds['decode']:.0%}",
                         "MB reduced": f"{4 * n_trained / 1e6:.0f}" if n_devices > 1 else "",
                         "ms a step": f"{1e3 * seconds['step']:,.0f}",
                         "of it reduce": f"{1e3 * plan.reduce_seconds(4 * n_trained, n_devices):.1f}",
                         "efficiency ": f"{one['step'] / n_devices / seconds['step']:.0%}"})
    return rows


UNITS = dict(generation="tokens/s", probe="frames/s", healing="steps/s")


class Stages:
    """The three stages; each returns how much it did, in its unit."""

    def __init__(self, name: str, n: int, n_new: int, think: int, n_vignettes: int):
        self.model, self.tok = models.load(name, device="cpu", dtype="float32")
        given = inputs.load("authority", model=name, n_vignettes=n_vignettes)
        n_blocks, self.think = len(steer.blocks(self.model)), think
        self.vignettes, self.prompts = given["vignettes"], [given["train"][i % len(given["train"])]
                                                            for i in range(n)]
        self.stack = lora.attach(self.model, r=8, alpha=16, layers=band(n_blocks, 0.2, 0.8))
        self.n_new, rows = n_new, steer.encode(self.tok, self.prompts, [""] * n)
        rng = torch.Generator().manual_seed(0)
        self.samples = [heal.Sample(row + torch.randint(300, (n_new,), generator=rng).tolist(), len(row), 0)
                        for row in rows]
        self.cfg = heal.HealConfig(lr=1e-4, tau=1e-3, epochs=1, heal_batch=8)

    def generation(self):
        made = steer.generate(self.model, self.tok, self.prompts, max_new_tokens=self.n_new)
        return sum(len(c.ids) for c in made), [c.ids for c in made]

    def probe(self):
        found = evalmfv.evaluate(self.model, self.tok, self.vignettes, think_tokens=self.think)
        return 2 * len(self.vignettes), found["coherence"]

    def healing(self):
        self.stack.drop()                                       # all start where the first one did
        record = heal.heal(self.model, self.stack.parameters(), self.samples, lambda: self.stack.gated(0, 0),
                           self.cfg, pad_id=steer.pad_of(self.tok, self.model), across=ranks.spread)
        return len(record["steps"]), record["nll_last"]


def measured(stages: Stages, names: list[str], repeats: int) -> list[dict]:
    rows = []
    for name in names:
        work, rates, found = getattr(stages, name), {1: [], ranks.WORLD: []}, {}
        busy = {1: [], ranks.WORLD: []}                         # CPU seconds of the busiest rank
        for repeat in range(repeats + 1):                       # the first is to warm up
            for n in list(rates)[::1 if repeat % 2 else -1]:
                ranks.exchange(None)                            # all begin together
                start, used = time.perf_counter(), time.process_time()
                if n > 1:
                    done, found[n] = work()
                elif not ranks.RANK:
                    with ranks.alone():
                        done, found[n] = work()
                used = max(ranks.exchange(time.process_time() - used))
                if repeat and not ranks.RANK:
                    rates[n].append(done / (time.perf_counter() - start))
                    busy[n].append(used)
        if not ranks.RANK:
            one, all_ = (statistics.median(x) for x in rates.values())
            cpu = {n: statistics.median(x) for n, x in busy.items()}
            gains = sorted(b / a for a, b in zip(*rates.values()))
            rows.append({"stage": name, "unit": UNITS[name], "1 process": f"{one:.2f}",
                         f"{ranks.WORLD} processes": f"{all_:.2f}", "gain": f"x{all_ / one:.2f}",
                         "pairs": f"{gains[0]:.2f} to {gains[-1]:.2f}",
                         "by CPU time": f"x{cpu[1] / cpu[ranks.WORLD]:.2f}",
                         "same": str(found[1] == found[ranks.WORLD] or name != "generation" and abs(
                             found[1] - found[ranks.WORLD]) < 1e-4)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="pocket")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--think-tokens", type=int, default=32)
    parser.add_argument("--n-vignettes", type=int, default=16)
    parser.add_argument("--stages", nargs="+", default=list(UNITS), choices=list(UNITS))
    parser.add_argument("--json", default="")
    parser.add_argument("--paper", action="store_true", help="arithmetic alone")
    args = parser.parse_args()
    if args.paper:
        return print(table(paper()))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "the barrier")
    ranks.start()
    stages = Stages(args.model, args.answers, args.new_tokens, args.think_tokens, args.n_vignettes)
    rows = measured(stages, args.stages, args.repeats)
    if not ranks.RANK:
        n_bytes = sum(4 * p.numel() for p in stages.stack.parameters())
        print(f"{args.model}: {args.answers} answers of up to {args.new_tokens} tokens, {n_bytes / 1e6:.2f} "
              f"MB reduced a step of {stages.cfg.heal_batch} samples; load {machine()['load']:.1f}")
        print(table(rows))
        if args.json:
            write_json(args.json, rows=rows)
    sys.exit(ranks.end(0))


if __name__ == "__main__":
    main()
