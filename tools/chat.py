"""Chat: talk to a finished run, alone or beside its base.

    python loop.py chat RUN                       lines of a terminal or a pipe; /help says what can be asked
    python loop.py chat RUN --compare "Who are you?"         base | prompted | day N, side by side

Each line is a conversation of its own. Greedy unless --temperature is given, so that two columns differ by
their model alone.
"""
import argparse
import itertools
import math
import re
import shutil
import sys
import textwrap
from pathlib import Path

import steer
from tools import model as models
from tools.files import inert, one_line
from tools.record import read
from tools.rounds import restack

HELP = """Each line is asked on its own: the model remembers nothing of the lines before.
/help shows this; the end of input (Ctrl-D) or Ctrl-C leaves. Options of the command: --compare shows base,
persona prompt and this day side by side, --round K an earlier day, --dial 0..2 turns what was learnt down or
up, --temperature T samples.
Prompts that the run never trained on:"""


def options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="loop.py chat",
                                     description="Ask a finished run; each line is a conversation of its "
                                                 "own.",
                                     usage="python loop.py chat RUN [prompts ...] [--option value ...]",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder")
    parser.add_argument("prompts", nargs="*", metavar="prompts",
                        help="what to ask (optional); none = read lines, from a terminal or a pipe")
    parser.add_argument("--compare", action="store_true",
                        help="base | prompted | day N side by side, from the same random draws")
    parser.add_argument("--round", type=int, default=None,
                        help="the day: rounds after this one are left out, a rejected one is shown "
                        "with a warning; None = the last accepted")
    parser.add_argument("--dial", type=float, default=1.0, help="dials all rounds, 0 (the base) to 2")
    parser.add_argument("--temperature", type=float, default=0.0,
                        help="sample at this temperature; 0 = always the likeliest token")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (tokens)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_intermixed_args(argv)                  # options may stand between RUN and the prompts
    for name, low, high in (("dial", 0, 2), ("temperature", 0, 1e6), ("max_new_tokens", 1, 1e6)):
        if not low <= getattr(args, name) <= high:                          # false for nan too
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {low} to {high:g}")
    return args


def clean(prompt: str) -> str:
    """What a tokenizer can take: bytes that were no UTF-8 become the replacement mark, control characters
    go."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", re.sub("[\ud800-\udfff]", "\ufffd", prompt)).strip()


def asked(prompts: list[str]):
    """The prompts, or else lines of standard input until it ends; a mark in front of each only on a
    terminal."""
    yield from map(clean, prompts)
    if not prompts and hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    while not prompts:
        try:
            line = clean(input("\n> " if sys.stdin.isatty() else ""))
        except EOFError:
            return
        if line:
            yield line


def answers(model, tok, stack, prompt: str, columns: dict, args, **sampling) -> list[str]:
    """One answer per column; ValueError if there is no room for one."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    systems = [system for _, system in columns.values()]
    n_asked = max(map(len, steer.encode(tok, [prompt] * len(systems), systems)))
    if n_asked >= room:
        raise ValueError(f"the question has {n_asked} tokens, more than the model's {room} leave room to "
                         "answer")
    found = []
    for history, system in columns.values():
        with stack.gated(history, 0):
            found += steer.generate(model, tok, [prompt], system=system, greedy=not args.temperature,
                                    temperature=args.temperature or 1.0,
                                    max_new_tokens=min(args.max_new_tokens, room - n_asked), **sampling)
    return [inert(c.text) + ("" if c.finished else " ...") for c in found]


def main(argv: list[str]) -> int:
    """Answers of a run's model, by the stop tokens that it was made with; control characters are dropped."""
    args = options(argv)
    record = read(args.run)
    run, files = record.run, record.adapters(args.round)
    if args.round is not None and args.round not in record.accepted:
        print(f"loop.py chat: warning: the gate refused round {args.round}, and no other round has it "
              "underneath", file=sys.stderr)
    opts, persona = run.get("options", {}), run.get("persona", {})
    known = {name: opts[name] for name in ("revision", "dtype", "device", "quantize") if name in opts}
    model, tok = models.load(opts.get("model", "pocket"), **known, date=run.get("date", ""))
    stack = restack(model, list(files.values()))
    day = f"day {max(files)}" + (f", dial {args.dial:g}" if args.dial != 1 else "")
    columns = {day: (args.dial, "")}                            # name -> scale of all rounds, system prompt
    if args.compare:
        columns = {"base": (0, ""), "prompted": (0, persona["pos"][0])} | columns
    sampling = {name: opts[name] for name in ("top_p", "top_k") if name in opts}
    width = max(8, shutil.get_terminal_size((120, 24)).columns // len(columns) - 3)
    is_live, n_failed = not args.prompts and sys.stdin.isatty(), 0
    examples = [inert(text) for text in (run.get("items") or {}).get("held_out", [])[:3]]
    if is_live:
        how = f"sampled at temperature {args.temperature:g}" if args.temperature else "greedy"
        print(f"{inert(opts.get('model', ''))}, persona "
              f"{inert(persona.get('name') or opts.get('persona', ''))}, {' | '.join(columns)} "
              f"(rounds {', '.join(map(str, files))}); {how}, at most {args.max_new_tokens} tokens. /help "
              "says more; try:\n"
              + "\n".join(f"  {text}" for text in examples))

    for n, prompt in enumerate(asked(args.prompts)):
        if prompt == "/help":
            print(HELP, *examples, sep="\n  ", flush=True)
            continue
        if not is_live:
            print(f"\n> {inert(prompt)}")
        try:
            texts = answers(model, tok, stack, prompt, columns, args, seed=args.seed + n, **sampling)
        except (ValueError, RuntimeError) as error:             # this line's; the next may be fine
            print(f"loop.py chat: {one_line(error)}", file=sys.stderr, flush=True)
            n_failed += 1
            continue
        if not args.compare:
            print(texts[0], flush=True)
            continue
        cells = [[name, "-" * len(name), *textwrap.wrap(text, width)] for name, text in zip(columns, texts)]
        for line in itertools.zip_longest(*cells, fillvalue=""):
            print(" | ".join(cell.ljust(width) for cell in line).rstrip(), flush=True)
    return 2 if n_failed and not is_live else 0
