"""Kill -9 a small run at every boundary of its stages and at random moments, continue it, compare.

    python bench/kill.py --kinds after torn rename moment longer --moments 20 --seed 0
    python bench/kill.py --kinds rank           one round of two ranks, of which one dies in each stage

Boundaries: after each event of the journal, in the middle of its line, and before each rename of a file. A
case of the random moments is killed once or twice. `longer` continues a finished run of one round to two.
Equal means: every event but its time, run.json but for times and the command, the bytes of every adapter and
vector, the exit code, and one line of results.tsv. Runs are forked from one process that has imported
everything and made no tensor yet, so this needs a system with fork.
"""
import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
import loop                                                     # noqa: E402
import transformers.models.llama.modeling_llama                 # noqa: E402, F401   slow: before the forks
from common import SMALL, differences, folder_of, small_data    # noqa: E402
from tools import folder as files                               # noqa: E402
from tools import ranks                                         # noqa: E402


def die_at(case: tuple[str, int]) -> None:
    """In a child: be killed at the n-th passage of a boundary."""
    kind, n = case
    count = 0
    event, replace, exchange = files.Folder.event, os.replace, ranks.exchange
    stages = []

    def now() -> bool:
        nonlocal count
        count += 1
        return count == n

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def dying_event(folder, stage, rnd=None, **more):
        is_last = kind not in ("rename", "rank") and now()
        if is_last and kind == "torn":
            text = json.dumps(files.plain(dict(t=0, round=rnd, stage=stage) | more)) + "\n"
            with open(folder.path / "events.jsonl", "a") as file:
                file.write(text[:len(text) * 2 // 3])
            kill()
        made = event(folder, stage, rnd, **more)
        if is_last:
            kill()
        return made

    def dying_replace(*paths):
        if kind == "rename" and now():
            kill()
        replace(*paths)

    def dying_exchange(*what):
        stages.extend([ranks.stage] if ranks.stage not in stages else [])
        if kind == "rank" and len(stages) > n:                  # the first is before any stage
            print("killed in", ranks.stage, time.time(), file=sys.__stderr__, flush=True)
            kill()
        return exchange(*what)
    files.Folder.event, os.replace, ranks.exchange = dying_event, dying_replace, dying_exchange


def start(argv: list[str], log: Path, case=None) -> int:
    """loop.main(argv) in a child process; returns its pid."""
    if pid := os.fork():
        return pid
    with contextlib.suppress(BaseException):
        sys.stdout = sys.stderr = open(log, "a", encoding="utf-8")
        if case:
            die_at(case)
        code = loop.main(argv)
        sys.stdout.flush()
        os._exit(code)
    os._exit(99)


def start_ranks(argv: list[str], log: Path, case=None, world: int = 2) -> list[int]:
    """The same as processes of one run, without torchrun, which would end the others; the last one dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(world):
        os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=str(port),
                           MASTER_ADDR="localhost")
        pids.append(start(argv, log, case if rank == world - 1 else None))
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    return pids


def rank_cases(work: Path, argv, first: int, every: int) -> int:
    """Kill the last of two ranks in each stage of a round, continue with two, compare; how many differ."""
    codes = list(map(wait, start_ranks(argv(work / "ranks"), work / "ranks.log")))
    whole, failed, n_equal, slowest = folder_of(work / "ranks"), 0, 0, 0.0
    print(f"two ranks, unbroken: exit codes {codes}", flush=True)
    for n in range(first, 100, every):
        out, log = work / f"rank-{n}", work / f"rank-{n}.log"
        other, victim = start_ranks(argv(out), log, ("rank", n))
        if wait(victim) != -signal.SIGKILL:
            wait(other)
            break                                               # past the last stage
        begin = time.time()
        ended = wait(other)
        slowest = max(slowest, time.time() - begin)
        folder = folder_of(out)
        again = [wait(pid) for pid in start_ranks(["--resume", str(folder)] if folder else argv(out), log)]
        found = differences(whole, folder_of(out)) + ([f"exit codes {ended}, {again}"] if (
            ended, again) != (1, codes) else [])
        failed, n_equal = failed + bool(found), n_equal + (not found)
        print(f"rank {n}: {'; '.join(found[:4]) or 'equal'}, {time.time() - begin:.0f} s", flush=True)
    print(f"a rank killed in {n_equal + failed} stages: {n_equal} equal to the unbroken run of two; the "
          f"other ended {slowest:.1f} s after the kill at most")
    return failed


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def resume(out: Path, argv: list[str], log: Path) -> int:
    """Continue what is there; where nothing had been begun, begin."""
    folder = folder_of(out)
    if folder is None:
        shutil.rmtree(out, ignore_errors=True)
    return start(["--resume", str(folder), "--rounds", "2"] if folder else argv, log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--moments", type=int, default=20, help="cases that are killed at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="take every n-th boundary only")
    parser.add_argument("--first", type=int, default=1, help="with --kinds rank: begin with this stage")
    kinds = ["after", "torn", "rename", "moment", "longer"]
    parser.add_argument("--kinds", nargs="+", default=kinds, choices=[*kinds, "rank"])
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="kill-"))
    vignettes = small_data(work)

    def argv(out):
        return [*SMALL, "--vignettes", str(vignettes), "--out", str(out)]
    if args.kinds == ["rank"]:
        sys.exit(rank_cases(work, lambda out: [*argv(out), "--rounds", "1"], args.first, args.every))
    begin = time.time()
    code = wait(start(argv(work / "unbroken"), work / "unbroken.log"))
    seconds, whole = time.time() - begin, folder_of(work / "unbroken")
    events = [json.loads(line) for line in (whole / "events.jsonl").read_text().splitlines()]
    gates = [e["accepted"] for e in events if e["stage"] == "gate"]
    print(f"unbroken: exit code {code}, {len(events)} events, gates {gates}, {seconds:.1f} s, in {work}",
          flush=True)

    cases, failed, rng = [], 0, random.Random(args.seed)
    for kind in args.kinds:              # boundaries: as many as the run passes, until none is hit
        cases += [(kind, n) for n in
                  {"moment": range(args.moments), "longer": (1,)}.get(kind, range(1, 200, args.every))]
    passed, ended = {}, set()
    for kind, n in cases:
        if kind in ended:
            continue
        out, log = work / f"{kind}-{n}", work / f"{kind}-{n}.log"
        if kind == "longer":                                    # a finished run of n rounds goes on to two
            wait(start([*argv(out), "--rounds", str(n)], log))
        elif kind == "moment":
            for _ in range(rng.choice((1, 2))):
                pid = resume(out, argv(out), log)
                time.sleep(rng.uniform(0, seconds))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                if wait(pid) >= 0:                              # it was done before its moment came
                    break
        elif wait(start(argv(out), log, (kind, n))) != -signal.SIGKILL:
            ended.add(kind)                                     # past its last boundary
            continue
        again = wait(resume(out, argv(out), log))
        found = differences(whole, folder_of(out)) if folder_of(out) else ["no run folder"]
        if again != code:
            found.append(f"exit code {again}")
        passed[kind] = passed.get(kind, 0) + (not found)
        failed += bool(found)
        if found:
            print(f"{kind} {n}: {'; '.join(found[:4])}; see {log}", flush=True)
        else:
            shutil.rmtree(out)
    equal = ", ".join(f"{n} {kind}" for kind, n in passed.items())
    print(f"equal to the unbroken run: {equal}; different: {failed}; {time.time() - begin:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
