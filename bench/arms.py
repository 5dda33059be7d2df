"""The arms side by side: rmse, mean and no barrier, several seeds, at equal rounds and at equal trait.

    python bench/arms.py --seeds 0 1 2                 runs what is missing in runs/arms/, then prints the tables (Markdown)
    python bench/arms.py --seeds 0 1 2 --tables-only

Runs are ungated (--no-gate), so that every arm has a row in every round: the gate would stop the arms that break. Two arms
differ in the named options only, and that is checked in their run.json. `grammar` is the pocket world's own checker.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "pocket")]
import report                                                   # noqa: E402
import world                                                    # noqa: E402

ARMS = {"rmse": ["--kl-agg", "rmse"], "mean": ["--kl-agg", "mean"], "nll": ["--reg", "nll"]}
MAY_DIFFER = {"kl_agg", "reg", "seed", "out"}


def run(folder: Path, arm: str, seed: int, more: list[str]) -> Path:
    """The finished run of one arm and seed, made if it is not there."""
    out = folder / f"{arm}-{seed}"
    done = [p.parent for p in sorted(out.glob("*/run.json")) if "seconds" in json.loads(p.read_text())]
    if not done:
        argv = [sys.executable, str(HERE.parent / "loop.py"), *ARMS[arm], "--seed", str(seed), "--no-gate", "--steered-rows", "first",
                "--out", str(out), *more]
        print("  ".join(argv), flush=True)
        subprocess.run(argv, check=False, stdout=subprocess.DEVNULL)
        done = [p.parent for p in sorted(out.glob("*/run.json")) if "seconds" in json.loads(p.read_text())]
    return done[-1]


def trajectory(folder: Path) -> tuple[dict, list[dict]]:
    """The options of a run, and {trait, coherence, text, grammar} of base (first) and of every healed day."""
    record, events = report.load(folder)
    rows = [e for e in events if e["stage"] == "row" and e["kind"] in ("base", "healed")]
    return record, [{k: r[k] for k in ("trait", "coherence", "text")} | {"grammar": statistics.mean(map(world.grammar_ok, r["texts"]))} for r in rows]


def at_trait(days: list[dict], level: float, key: str) -> float | None:
    """The value where the trajectory first crosses the level, linear between two days; None if it never does."""
    for before, after in zip(days, days[1:]):
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
    parser.add_argument("--levels", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0], help="traits to compare at (nats)")
    parser.add_argument("--tables-only", action="store_true")
    args, more = parser.parse_known_args(argv)
    runs = {}
    for seed in args.seeds:
        for arm in args.arms:
            if not args.tables_only or list((args.folder / f"{arm}-{seed}").glob("*/run.json")):
                runs[arm, seed] = trajectory(run(args.folder, arm, seed, more))
    options = [record["options"] for record, _ in runs.values()]
    differ = {k for o in options for k in o if o[k] != options[0][k]} - MAY_DIFFER
    if differ:
        raise SystemExit(f"the runs differ in {sorted(differ)} as well: they are no arms of one comparison; remove {args.folder}")

    seeds = {arm: [s for a, s in runs if a == arm] for arm in args.arms}
    def days(arm):
        return [runs[arm, s][1] for s in seeds[arm]]
    print("\n| day | " + " | ".join(f"{arm}: trait | text | grammar | coherence" for arm in args.arms) + " |")
    print("|---|" + "---|" * 4 * len(args.arms))
    for k in range(max(len(d) for arm in args.arms for d in days(arm))):
        cells = [cell([d[k][key] if k < len(d) else None for d in days(arm)], len(seeds[arm])) for arm in args.arms for key in ("trait", "text", "grammar", "coherence")]
        print(f"| {'base' if k == 0 else k - 1} | " + " | ".join(cells) + " |")
    print("\n| at trait, nats | " + " | ".join(f"{arm}: text | grammar | coherence" for arm in args.arms) + " |")
    print("|---|" + "---|" * 3 * len(args.arms))
    for level in args.levels:
        cells = [cell([at_trait(d, level, key) for d in days(arm)], len(seeds[arm])) for arm in args.arms for key in ("text", "grammar", "coherence")]
        print(f"| {level:.2f} | " + " | ".join(cells) + " |")
    for (arm, seed), (record, d) in runs.items():
        print(f"{arm} seed {seed}: {len(d) - 1} days, {record['seconds']:.0f} s{', stopped: ' + record['stopped'] if record['stopped'] else ''}")


if __name__ == "__main__":
    main()
