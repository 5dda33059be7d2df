"""Malformed inputs on the command line: no traceback, no damaged folder, one sentence that says what is
wrong.

    python bench/malformed.py --n 300 --seed 0

Kinds of input: options, prompts files, vignettes files, the JSON files of data/, model folders, run folders
to resume, and what chat, export, plan and report are given. Half of them are written by hand, the others are
random mutations of valid ones. Everything runs in this process. A case that passes the checks before the
model is loaded is run for real, with one small round, until --limit seconds are over, when it gets a
SIGTERM's interruption; --no-real counts it as passed. What fails is printed with its argv.
"""
import argparse
import contextlib
import dataclasses
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import typing
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import loop                                                     # noqa: E402
from tools import folder, inputs                                # noqa: E402
from tools import model as models                               # noqa: E402
from tools import search                                        # noqa: E402

DATA = HERE.parent / "pocket" / "data"              # of the model that all cases run
SMALL = ("--rounds 1 --n-make 4 --n-text 2 --max-new-tokens 8 --think-tokens 1 --epochs 1 --no-gate "
         "--coeff 0.3 --steer-band 0.76 0.8").split()
DEEP = "[" * 100_000
HOSTILE = ["", " ", "\0", "\ud800", "\u202e", "\x1b[31m", "null", "nan", "-1", "../..", "/dev/null",
           "/proc/self/mem",
           "a" * 5000, "%s%n", "{}", "~"]
NUMBERS = ["nan", "inf", "-inf", "-1", "0", "1e308", "-1e308", "1e-320", "999999999999", "1.5", "", "abc",
           "0x10", "1_0",
           "--", "٣"]
VALUES = [None, True, -1, 0, 1e400, 10 ** 400, "", " ", "x", "\ud800", [], {}, [[]], [None], {"a": 1}, ["\0"],
          "nan"]


class Reached(BaseException):
    """The inputs were taken: the model would be loaded now."""


# ---- inputs ------------------------------------------------------------------------------------------------


def mutated(rng: random.Random, x):
    """x with one part, anywhere, replaced, dropped or doubled."""
    if isinstance(x, dict) and x and rng.random() < 0.8:
        key = rng.choice(list(x))
        if rng.random() < 0.25:
            return {k: v for k, v in x.items() if k != key}
        return x | {key: mutated(rng, x[key])}
    if isinstance(x, list) and x and rng.random() < 0.8:
        i = rng.randrange(len(x))
        return x[:i] + rng.choice(([], [x[i], x[i]], [mutated(rng, x[i])])) + x[i + 1:]
    return rng.choice(VALUES)


def broken(rng: random.Random, content: bytes) -> bytes:
    """A file with a cut, a hole, noise, or in another encoding."""
    at = rng.randrange(len(content) + 1)
    return rng.choice((content[:at], content[:at] + bytes(64) + content[at:],
                       content[:at] + rng.randbytes(9) + content[at:],
                       content.decode().encode("utf-16"), b"\xff" + content,
                       content[:at] + b"\xe9" + content[at:]))


def options(rng, work):
    known = [(f, typing.get_type_hints(cls)[f.name]) for cls in loop.GROUPS for f in dataclasses.fields(cls)
             if f.name != "resume"]
    f, kind = rng.choice(known)
    if kind is bool:
        return [rng.choice((f"--{f.name}=yes", f"--no-no-{f.name}", f"--no-{f.name}=1"))]
    return [f"--{f.name.replace('_', '-')}={rng.choice(HOSTILE if kind is str else NUMBERS)}"]


def contradictions(rng, work):
    return rng.choice(["--pos a", "--neg b", "--pos a --neg b", "--pos a --neg a", "--reg nll --tau 0.5",
                       "--tau 1 --tau-scale 2",
                       "--steer-band 0.5", "--steer-band 0.9 0.1", "--lora-band 0.8 0.2", "--lora-band nan 1",
                       "--lora-band 0 1 2",
                       "--n-make 0", "--rounds", "--nonsense 1", "a b", "--r 100000",
                       "--max-new-tokens 5000",
                       "--think-tokens 5000", "--persona", "--kl-agg median", "--=", "-", "--n 3",
                       "--coeff 0", "--persona ./mine.json",
                       "--prompts . --vignettes ."]).split()


def prompts(rng, work):
    path = work / f"prompts{rng.choice(['.txt', '.txt', '.jsonl', '.json', '.csv', '.yaml', ''])}"
    good = "".join(f"Question number {i}?\n" for i in range(12)).encode()
    path.write_bytes(rng.choice([b"", b"\n" * 50, b"   \n\t\n", b"one\n" * 7, b"\0" * 100,
                                 b"x" * 200_000 + b"\n" + good,
                                 b"\xef\xbb\xbf" + good, good.decode().encode("utf-16"),
                                 good.replace(b"?", b"\xe4"), good.replace(b"4", b"\0"), b"?\r" * 20,
                                 "\u2028".join("abcdefghij").encode(), broken(rng, good), broken(rng, good)]))
    return ["--prompts", rng.choice([str(path)] * 8 + [str(work), str(work / "nowhere"), str(path / "below"),
                                                       "\0"])]


def vignettes(rng, work):
    path = work / "vignettes.jsonl"
    rows = [json.loads(line) for line in (DATA / "vignettes.jsonl").read_text().splitlines()[::24]]
    lines = [json.dumps(row) for row in rows]
    at = rng.randrange(len(lines))
    lines[at] = rng.choice([*(json.dumps(mutated(rng, rows[at])) for _ in range(3)), DEEP, "{", "[]", "7",
                            '{"text": "a", "foundation": "care", "label": {"care": 1e999}}',
                            '{"text": "a", "foundation": ["care"]}'])
    content = "\n".join(lines).encode(errors="surrogatepass")
    path.write_bytes(rng.choice([content] * 6 + [broken(rng, content), b"", b"\n\n",
                                                 lines[0].encode(errors="surrogatepass")]))
    return ["--vignettes", rng.choice([str(path)] * 9 + [str(work)])]


def data(rng, work):
    """The JSON files that a user edits."""
    name = rng.choice(["personas", "prompts", "contexts"])
    path = inputs.POCKET / f"{name}.json"
    content = json.loads((DATA / f"{name}.json").read_text())
    if name != "contexts" and rng.random() < 0.7:  # most mutations inside the persona that is used
        content = {"authority": mutated(rng, content["authority"])}
    text = json.dumps(mutated(rng, content))
    path.write_bytes(rng.choice([text.encode()] * 5 + [broken(rng, text.encode()), DEEP.encode(), b"",
                                                       b"null"]))
    return []


def model(rng, work):
    """A checkpoint folder with a file missing, broken or changed."""
    code = shutil.ignore_patterns("*.py", "__pycache__")
    path = shutil.copytree(HERE.parent / "pocket", work / "model", ignore=code)
    file = path / rng.choice(["config.json", "tokenizer.json", "tokenizer_config.json",
                              "generation_config.json",
                              "chat_template.jinja", "model.safetensors"])
    what = rng.choice(["missing", "broken", "empty", "changed"])
    if what == "missing":
        file.unlink()
    elif what == "changed" and file.suffix == ".json":
        file.write_text(json.dumps(mutated(rng, json.loads(file.read_text()))))
    elif what == "broken" and file.suffix != ".safetensors":
        file.write_bytes(broken(rng, file.read_bytes()))
    else:
        file.write_bytes(b"" if what == "empty" else file.read_bytes()[:rng.randrange(9000)])
    return ["--model", rng.choice([str(path)] * 9 + [str(file)])]


def resume(rng, work):
    """A run folder that is damaged, or asked to go on as another run."""
    path = shutil.copytree(work.parent / "finished", work / "finished")
    what = rng.choice(["run.json", "run.json", "events.jsonl", "events.jsonl", "adapter", "options",
                       "nothing"])
    more = []
    if what == "run.json":
        record = json.loads((path / what).read_text())
        other = rng.choice((mutated(rng, record), record | {"options": mutated(rng, record["options"])}))
        content = json.dumps(other).encode()
        (path / what).write_bytes(rng.choice([content, content, broken(rng, content), b""]))
    elif what == "events.jsonl":
        lines = (path / what).read_bytes().splitlines(True)
        at = rng.randrange(len(lines))
        event = json.dumps(mutated(rng, json.loads(lines[at]))).encode() + b"\n"
        lines[at] = rng.choice([event, event, b"{\n", bytes(50) + b"\n", lines[at][:20]])
        (path / what).write_bytes(b"".join(lines))
    elif what == "adapter":
        file = path / "rounds" / "00" / "adapter.safetensors"
        file.write_bytes(file.read_bytes()[:rng.randrange(5000)]) if rng.random() < 0.7 else file.unlink()
    elif what == "options":
        more = rng.choice(["--seed 7", "--kl-agg mean", "--rounds 0", "--model nowhere", "--lr 0.5 --r 4",
                           "--persona love",
                           "--rounds x"]).split()
    return ["--resume", rng.choice([str(path)] * 9 + [str(path / "run.json"), str(path / "rounds"), "nowhere",
                                                      "\0"]), *more]


def words(rng, work):
    """A run folder that may be damaged, given to the other commands."""
    path = resume(rng, work)[1]
    return rng.choice([["chat", path, "Hi", "--max-new-tokens", "4"], ["report", path], ["plan", path],
                       ["export", path, "--to", "vectors"]])


KINDS = (options, options, contradictions, prompts, vignettes, data, model, resume, words)
OF_RUNS = (resume, words)


# ---- one case ----------------------------------------------------------------------------------------------


def call(argv: list[str], limit: float) -> tuple[int | str, str]:
    """loop.main's exit code, or what escaped from it; and what it printed. limit: seconds until a SIGTERM."""
    text, code = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace"), "nothing"
    old = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            code = loop.main(argv)
    except SystemExit as stop:
        code = stop.code
    except Reached:
        code = "reached"
    except BaseException as error:                              # the point of the campaign
        code = f"escaped: {type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    text.flush()
    return code, text.buffer.getvalue().decode("utf-8", "replace")


def damage(out: Path, before: dict | None, code) -> list[str]:
    """What is wrong with a folder of run folders. before: the files of a folder that a refusal must leave
    alone."""
    found = [f"left behind {p.name}" for p in out.rglob(".*") if p.name != ".lock"]
    if before is not None and code == 2:
        now = {p: p.read_bytes() for p in before if p.exists()}
        found += [f"{p.name} was changed by a refusal" for p in before if p.name != ".lock"
                  and now.get(p) != before[p]]
    elif before is None:
        for path in out.iterdir():
            if path.is_dir():
                with contextlib.suppress(ValueError):
                    record = folder.read(path).run
                    if record["status"] not in ("accepted", "no round accepted", "interrupted", "failed"):
                        found.append(f"status {record['status']}")
    return found


def trial(rng: random.Random, kind, work: Path, limit: float, real: bool) -> tuple:
    """One input: (outcome, what is wrong with how it was met, the printed text, argv)."""
    shutil.rmtree(work, ignore_errors=True)
    (work / "out").mkdir(parents=True)
    (work / "far" / "down").mkdir(parents=True)
    cwd = os.getcwd()
    os.chdir(work / "far" / "down")                             # where paths such as ../.. end up
    inputs.POCKET = shutil.copytree(DATA, work / "data")
    argv = kind(rng, work)
    small = work.parent / "vignettes.jsonl"
    front = [] if kind in OF_RUNS else [*SMALL, *([] if kind is vignettes else ["--vignettes", str(small)]),
                                        "--out", str(work / "out")]
    load, meets_model = models.load, argv[:1] in (["--r"], ["--max-new-tokens"], ["--think-tokens"])

    def reached(*args, **how):
        raise Reached
    runs = work / "finished"
    before = {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()} if kind in OF_RUNS else None
    models.load = load if meets_model or kind in (model, *OF_RUNS) else reached
    try:
        code, text = call(front + argv, limit)
        if code == "reached" and real:
            models.load = load
            code, text = call(front + argv, limit)
    finally:
        models.load, inputs.POCKET = load, DATA
        os.chdir(cwd)
    wrong = damage(runs if kind in OF_RUNS else work / "out", before, code)
    if code not in (0, 1, 2, 3, 130, "reached"):
        wrong.append(str(code))
    if "Traceback" in text or "loop.py: unexpected" in text:
        wrong.append("a traceback")
    last = text.strip().splitlines()[-1] if text.strip() else ""
    if code in (1, 2) and not (re.search(r"loop\.py( \w+)?: ", last) and len(last) > 30):
        wrong.append("no sentence at the end")
    if set(text) & set("\0\x1b\u202e"):
        wrong.append("control characters on the terminal")
    return str(code), wrong, text, argv


def prepare(work: Path) -> None:
    """A finished run of one small round, and few vignettes."""
    lines = (DATA / "vignettes.jsonl").read_text().splitlines(True)
    (work / "vignettes.jsonl").write_text("".join(lines[::24]))
    code, text = call([*SMALL, "--vignettes", str(work / "vignettes.jsonl"), "--out", str(work / "first")],
                      120)
    if code != 0:
        raise SystemExit(f"the valid run did not pass: {code}\n{text}")
    next(p.parent for p in (work / "first").glob("*/run.json")).rename(work / "finished")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds that one case may run")
    parser.add_argument("--real", action=argparse.BooleanOptionalAction, default=True,
                        help="run what passes the checks")
    parser.add_argument("--verbose", action="store_true", help="print the sentence that every case ends with")
    args = parser.parse_args()
    search.N_PROBE = 2                                           # small, as all else
    work, begin = Path(tempfile.mkdtemp(prefix="malformed-")), time.time()
    prepare(work)
    outcomes, failed = {kind.__name__: Counter() for kind in KINDS}, 0
    for i in range(args.n):
        kind = KINDS[i % len(KINDS)]
        outcome, wrong, text, argv = trial(random.Random(f"{args.seed}/{i}"), kind, work / "case", args.limit,
                                           args.real)
        outcomes[kind.__name__][outcome] += 1
        failed += bool(wrong)
        if wrong or args.verbose:
            last = text.strip().splitlines()[-1] if text.strip() else ""
            print(f"{i} {kind.__name__} {[a[:80] for a in argv]!a}: {'; '.join(wrong) or 'ok'}: exit "
                  f"{outcome}: {last[:400]!a}",
                  flush=True)
    for kind, counts in outcomes.items():
        print(f"{kind:15s} " + "  ".join(f"exit {code}: {n}" for code, n in sorted(counts.items())))
    print(f"{args.n} inputs, seed {args.seed}: {failed} with a traceback, a damaged folder or no sentence; "
          f"{time.time() - begin:.0f} s")
    shutil.rmtree(work)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
