"""Experiment: arms x seeds, each an ordinary run folder, and what they say side by side.

    python bench/experiment.py bench/grids/barrier.json          runs what is missing, then tables, plot
    python bench/experiment.py bench/grids/barrier.json --tables    of the runs that are there

    GRID.json   {"folder": "runs/barrier",                          a run folder per arm and seed
                 "argv": ["--rounds", "4", "--no-gate"],            what all arms have, for loop.py
                 "seeds": [0, 1, 2],
                 "arms": {"rmse": [], "mean": ["--kl-agg", "mean"], "hinge": ["--variant", "hinge"]}}

An arm with --variant is run by bench/variants.py, the others by loop.py. Two runs at a time, one thread each
(two threads each slow one another up to ten times). A run that was cut off goes on where it stopped. Before
anything is compared, run.json must say that two arms differ in the options which their lists name, and in
nothing else: not in weights, data, versions or code.

The first arm is what the others are held against: their difference is a mean over the items of all seeds, its
interval a bootstrap over seeds and, within a seed, over items, both paired (the same prompts and draws). A
difference whose interval holds 0 is called none.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "pocket")]

import numpy as np                                              # noqa: E402
import world                                                    # noqa: E402
from plot import svg_lines                                      # noqa: E402
from tools.files import inert, one_line                        # noqa: E402
from tools.record import read                                   # noqa: E402

N_BOOT = 4000                           # enough for two digits of a 95% interval
LEVELS = 0.5, 0.75, 1.0                 # shares to compare at
SAID = "share", "text", "nll", "unique", "words", "off-target", "lean", "grammar"       # of a day, if there


def load(path) -> dict:
    """The grid; ValueError with what is wrong."""
    try:
        grid = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not isinstance(grid, dict) or set(grid) != {"folder", "argv", "seeds", "arms"}:
        raise ValueError(f"{path}: expected an object with folder, argv, seeds, arms")
    if not grid["arms"] or not grid["seeds"]:
        raise ValueError(f"{path}: needs an arm and a seed")
    return grid


def command(grid: dict, arm: str, seed: int) -> list[str]:
    out = Path(grid["folder"]) / f"{arm}-{seed}"
    return [*grid["argv"], *grid["arms"][arm], "--seed", str(seed), "--out", str(out)]


def folder_of(grid: dict, arm: str, seed: int) -> Path | None:
    """The run folder of one cell, finished or not; ValueError if it was made with other options."""
    argv = command(grid, arm, seed)
    found = sorted(Path(argv[-1]).glob("*/run.json"))
    if found and json.loads(found[-1].read_text())["argv"] != argv:
        raise ValueError(f"{found[-1].parent} is a run with other options than {' '.join(argv)}: remove it, "
                         "or name another folder in the grid")
    return found[-1].parent if found else None


def is_finished(path: Path | None) -> bool:
    return path is not None and "seconds" in json.loads((path / "run.json").read_text())


def make(grid: dict, arm: str, seed: int) -> None:
    """Run one cell to its end; exit code 3 (no round accepted) is a result too."""
    path = folder_of(grid, arm, seed)
    if is_finished(path):
        return
    argv = ["--resume", str(path)] if path else command(grid, arm, seed)
    script = "bench/variants.py" if "--variant" in command(grid, arm, seed) else "loop.py"
    print(f"{arm}, seed {seed}: python {script} {' '.join(argv)}", flush=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(HERE.parent / script), *argv], env=env, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode not in (0, 3):
        raise RuntimeError(f"{arm}, seed {seed}: exit code {done.returncode}: {done.stderr.strip()[-400:]}")


def named(grid: dict, arm: str) -> set[str]:
    """The options that an arm's list names."""
    return {word[2:].removeprefix("no-").replace("-", "_") for word in grid["arms"][arm]
            if word.startswith("--")}


def check_apart(grid: dict, runs: dict) -> None:
    """ValueError if two runs differ in anything but their seed, their folder and what their arms name."""
    def facts(record):
        return record.run["options"] | {k: record.run[k] for k in ("weights", "items", "versions", "code")}
    (first, _), one = next(iter(runs.items()))
    for (arm, seed), other in runs.items():
        x, y = facts(one), facts(other)
        may = {"seed", "out"} | named(grid, first) | named(grid, arm)
        may |= {"items"} if "persona" in may else set()                 # a persona brings its own prompts
        if more := {k for k in x | y if x.get(k) != y.get(k)} - may:
            raise ValueError(f"{other.path} differs from {one.path} in {', '.join(sorted(more))}, which no "
                             "arm names: these two cannot be held against each other")


# ---- what a day says -------------------------------------------------------------------------------------


def day_of(record, row: dict) -> dict:
    """{name: mean, ...} of a row, and `items`: {name: [n_text]} for the bootstrap."""
    base, prompted = (record.rows(kind)[0] for kind in ("base", "prompted"))
    span = np.mean(prompted["ratios"]) - np.mean(base["ratios"])
    items = dict(share=(np.array(row["ratios"]) - np.array(base["ratios"])) / span,
                 text=np.array(row["windows"]))
    if record.run["options"]["model"] == "pocket":
        axis = world.axis_of(record.run["persona"]["name"])
        items |= dict(lean=np.array([world.lean(text, axis) for text in row["texts"]]),
                      grammar=np.array([float(world.grammar_ok(text)) for text in row["texts"]]))
    off = {} if row["shift"] is None else {"off-target": row["shift"]["off_target"]}
    return dict({name: float(x.mean()) for name, x in items.items()}, nll=row["nll"], items=items,
                unique=len(set(row["texts"])) / len(row["texts"]),
                words=statistics.mean(len(text.split()) for text in row["texts"]), **off)


def days_of(record) -> dict[int, dict]:
    """The base (-1) and every healed day."""
    return {-1: day_of(record, record.rows("base")[0])} | {
        row["round"]: day_of(record, row) for row in record.rows("healed")}


def at_share(days: dict[int, dict], level: float, name: str) -> float | None:
    """The value where the share first crosses the level, linear between two days; None if it never does."""
    in_order = [days[k] for k in sorted(days)]
    for before, after in zip(in_order, in_order[1:]):
        if before["share"] < level <= after["share"]:
            part = (level - before["share"]) / (after["share"] - before["share"])
            return before[name] + part * (after[name] - before[name])
    return None


def difference(ours: list, theirs: list, seed: int = 0) -> tuple[float, float, float]:
    """Mean of ours - theirs and its 95% interval: a bootstrap over seeds and, within each, over items.

    ours, theirs: one array [n] per seed, of the same items in the same order.
    """
    gaps, rng = [a - b for a, b in zip(ours, theirs, strict=True)], np.random.default_rng(seed)
    means = np.array([np.mean([rng.choice(gap, len(gap)).mean()
                               for gap in (gaps[i] for i in rng.integers(len(gaps), size=len(gaps)))])
                      for _ in range(N_BOOT)])                                                  # [N_BOOT]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(np.mean([gap.mean() for gap in gaps])), float(low), float(high)


def worst_tokens(record) -> list[list[str]]:
    """Of each round, the kept answer furthest from the reference and its worst token: does the barrier leak?

    The rmse of n tokens stays under tau with one token at tau * sqrt(n) nats and the rest at 0.
    """
    tau, lines = (record.of("tau") or {}).get("tau"), []
    bounded = tau and record.run["options"]["kl_agg"] == "rmse"
    for event in (e for e in record.events if e["stage"] == "heal" and bounded):
        day, night = np.array(event["worst"]["day"]), np.array(event["worst"]["night"])
        k = int(day.argmax())
        lines.append([str(event["round"]), str(len(day)), f"{np.sqrt((day ** 2).mean()):.2f}", f"{tau:.2f}",
                      f"{day[k]:.2f}", f"{night[k]:.2f}", f"{tau * len(day) ** 0.5:.2f}"])
    return lines


# ---- the tables ------------------------------------------------------------------------------------------


def cell(values: list) -> str:
    """Mean [lowest, highest] of those that are there, and how many these are if not all."""
    there = [v for v in values if v is not None]
    if not there:
        return "-"
    spread = f" [{min(there):.2f}, {max(there):.2f}]" if len(there) > 1 else ""
    return f"{statistics.mean(there):.3f}{spread}" + (f" ({len(there)} of {len(values)})"
                                                      if len(there) < len(values) else "")


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def by_arm(grid: dict, runs: dict) -> dict[str, dict[int, dict]]:
    """{arm: {seed: days}} of the arms that have a run, in the grid's order: what tables and figure read."""
    found = {arm: {seed: days_of(record) for (a, seed), record in runs.items() if a == arm}
             for arm in grid["arms"]}
    return {arm: seeds for arm, seeds in found.items() if seeds}


def tables(grid: dict, runs: dict, seeds: dict) -> str:
    """Markdown: at equal rounds, at equal share, the differences on the last day that all have, the runs."""
    days = {arm: list(found.values()) for arm, found in seeds.items()}
    names = [name for name in SAID if name in next(iter(days.values()))[0][-1]]
    equal = [[arm, "base" if day < 0 else str(day)]
             + [cell([d[day][name] if day in d else None for d in found]) for name in names]
             for day in sorted({day for found in days.values() for d in found for day in d})
             for arm, found in days.items()]
    crossed = [[arm, f"{level:g}"] + [cell([at_share(d, level, name) for d in found]) for name in names[1:]]
               for level in LEVELS for arm, found in days.items()]
    apart = []
    (first, ours), *others = seeds.items()
    for arm, theirs in others:
        if "persona" in named(grid, arm) | named(grid, first):          # other prompts: nothing to pair
            continue
        both = [(others_days, ours[seed]) for seed, others_days in theirs.items()
                if len(others_days) > 1 and len(ours.get(seed, ())) > 1]
        for name in both[0][0][-1]["items"] if both else ():
            ends = [(a[day]["items"][name], b[day]["items"][name])
                    for a, b in both for day in [max(set(a) & set(b))]]
            mean, low, high = difference(*zip(*ends))
            verdict = "none" if low <= 0 <= high else "higher" if mean > 0 else "lower"
            apart.append([f"{arm} - {first}", name, f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", verdict])
    made = [[f"{arm} {seed}", str(len(record.rows("healed"))), f"{record.run['seconds']:.0f}",
             inert(record.run["stopped"], "markdown") or "-", str(record.path)]
            for (arm, seed), record in runs.items()]
    worst = [[f"{arm} {seed}", *line] for (arm, seed), record in runs.items()
             for line in worst_tokens(record)]
    parts = [("At equal rounds", ["arm", "day", *names], equal),
             ("Where the share first reaches a level", ["arm", "share", *names[1:]], crossed),
             ("Last common day, paired, 95% interval", ["arms", "of", "difference", "so"], apart),
             ("The worst kept answer of a round, KL in nats", ["run", "round", "tokens", "D (rmse)", "tau",
              "worst token", "steering there", "tau sqrt(n)"], worst),
             ("The runs", ["run", "days", "seconds", "stopped", "folder"], made)]
    return "\n\n".join(f"## {title}\n\n{table(head, rows)}" for title, head, rows in parts if rows)


def figure(path: Path, seeds: dict) -> None:
    """Coherence of the text against share, a line per arm through its days' means over seeds."""
    lines = {}
    for arm, found in seeds.items():
        shared = sorted(set.intersection(*map(set, found.values())))    # the base at least
        lines[arm] = [tuple(statistics.mean(days[day][name] for days in found.values())
                            for name in ("share", "text")) for day in shared]
    svg_lines(path, "Text coherence against trait, day by day", "share of the persona prompt's trait",
              "text coherence", lines, log=False)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("grid")
    parser.add_argument("--tables", action="store_true", help="no runs: tables of those that are finished")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args(argv)
    try:
        grid = load(args.grid)
        cells = [(arm, seed) for seed in grid["seeds"] for arm in grid["arms"]]
        if not args.tables:
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(lambda at: make(grid, *at), cells))
        paths = {at: folder_of(grid, *at) for at in cells}
        runs = {at: read(path) for at, path in paths.items() if is_finished(path)}
        if not runs:
            raise ValueError(f"{grid['folder']}: no finished run of this grid")
        check_apart(grid, runs)
        seeds = by_arm(grid, runs)
        print(tables(grid, runs, seeds))
        figure(Path(grid["folder"]) / "arms.svg", seeds)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"experiment.py: {one_line(error)}")


if __name__ == "__main__":
    main()
