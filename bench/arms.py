"""The arms side by side: rmse, mean and no barrier, several seeds, at equal rounds and at equal trait.

    python bench/arms.py --seeds 0 1 2         runs what is missing in runs/arms/, then prints Markdown tables
    python bench/arms.py --seeds 0 1 2 --tables-only

Runs are ungated (--no-gate), so that every arm has a row in every round: the gate would stop arms that break.
Two arms differ in one field, and that is checked in their run.json (weights, data, versions and code too).
`grammar` is the pocket world's own checker.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "pocket")]
import world                                                    # noqa: E402
from tools import folder as files                                        # noqa: E402

ARMS = {"rmse": ["--kl-agg", "rmse"], "mean": ["--kl-agg", "mean"], "nll": ["--reg", "nll"]}


def finished(out: Path) -> list[Path]:
    return [p.parent for p in sorted(out.glob("*/run.json")) if "seconds" in json.loads(p.read_text())]


def run(folder: Path, arm: str, seed: int, more: list[str]) -> Path:
    """The finished run of one arm and seed, made if it is not there."""
    out = folder / f"{arm}-{seed}"
    argv = [*ARMS[arm], "--seed", str(seed), "--no-gate", "--out", str(out), *more]
    if not finished(out):
        print("python loop.py " + " ".join(argv), flush=True)
        subprocess.run([sys.executable, str(HERE.parent / "loop.py"), *argv], stdout=subprocess.DEVNULL)
    if not finished(out):
        raise SystemExit(f"{arm}, seed {seed}: the run did not finish; what it printed is above")
    if json.loads((finished(out)[-1] / "run.json").read_text())["argv"] != argv:
        raise SystemExit(f"{out} holds a run with other options than {' '.join(argv)}: remove it, or take "
                         "another --folder")
    return finished(out)[-1]


def trajectory(path: Path) -> tuple[dict, dict[int, dict]]:
    """run.json, and {trait, coherence, text, grammar} of base (-1) and of every healed day, by round."""
    record = files.read(path)
    rows = [*record.rows("base"), *record.rows("healed")]
    return record.run, {-1 if r["kind"] == "base" else r["round"]: {
        **{k: r[k] for k in ("trait", "coherence", "text")},
        "grammar": statistics.mean(map(world.grammar_ok, r["texts"]))} for r in rows}


def differing(a: dict, b: dict) -> set[str]:
    """In what two runs differ: options (but folder, seed, a barrier that is not there), weights, code."""
    def facts(record):
        return record["options"] | {k: record[k] for k in ("weights", "items", "versions", "code")}
    x, y = facts(a), facts(b)
    ignored = {"out", "seed"} | ({"kl_agg"} if "nll" in (x["reg"], y["reg"]) else set())
    return {k for k in x if x[k] != y[k]} - ignored


def at_trait(days: dict[int, dict], level: float, key: str) -> float | None:
    """The value where the trajectory first crosses the level, linear between two days; None if never."""
    in_order = [days[k] for k in sorted(days)]
    for before, after in zip(in_order, in_order[1:]):
        if before["trait"] < level <= after["trait"]:
            share = (level - before["trait"]) / (after["trait"] - before["trait"])
            return before[key] + share * (after[key] - before[key])
    return None


def cell(values: list[float | None], n: int) -> str:
    there = [v for v in values if v is not None]
    if not there:
        return "not reached"
    spread = f" [{min(there):.3f}, {max(there):.3f}]" if len(there) > 1 else ""
    return f"{statistics.mean(there):.3f}{spread}" + (f" ({len(there)} of {n})" if len(there) < n else "")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--folder", type=Path, default=HERE.parent / "runs" / "arms")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0],
                        help="traits to compare at (nats)")
    parser.add_argument("--tables-only", action="store_true")
    args, more = parser.parse_known_args(argv)
    runs = {}
    for seed in args.seeds:
        for arm in args.arms:
            if args.tables_only:
                for path in finished(args.folder / f"{arm}-{seed}")[-1:]:
                    runs[arm, seed] = trajectory(path)
            else:
                runs[arm, seed] = trajectory(run(args.folder, arm, seed, more))
    for (a, _), (x, _) in runs.items():
        for (b, _), (y, _) in runs.items():
            if len(found := differing(x, y)) > (a != b):
                raise SystemExit(f"{a} and {b} differ in {sorted(found)}: two arms may differ in one field; "
                                 f"remove {args.folder}")

    seeds = {arm: [s for a, s in runs if a == arm] for arm in args.arms}
    def days(arm):
        return [runs[arm, s][1] for s in seeds[arm]]
    print("\n| day | " + " | ".join(f"{arm}: trait | text | grammar | coherence" for arm in args.arms) + " |")
    print("|---|" + "---|" * 4 * len(args.arms))
    for k in sorted({k for arm in args.arms for d in days(arm) for k in d}):
        cells = [cell([d[k][key] if k in d else None for d in days(arm)], len(seeds[arm]))
                 for arm in args.arms for key in ("trait", "text", "grammar", "coherence")]
        print(f"| {'base' if k < 0 else k} | " + " | ".join(cells) + " |")
    heads = " | ".join(f"{arm}: text | grammar | coherence" for arm in args.arms)
    print(f"\n| at trait, nats | {heads} |")
    print("|---|" + "---|" * 3 * len(args.arms))
    for level in args.levels:
        cells = [cell([at_trait(d, level, key) for d in days(arm)], len(seeds[arm]))
                 for arm in args.arms for key in ("text", "grammar", "coherence")]
        print(f"| {level:.2f} | " + " | ".join(cells) + " |")
    for (arm, seed), (record, d) in runs.items():
        stopped = f", stopped: {record['stopped']}" if record["stopped"] else ""
        print(f"{arm} seed {seed}: {len(d) - 1} days, {record['seconds']:.0f} s{stopped}")


if __name__ == "__main__":
    main()
