"""Head: what an index in place of a number of last positions saves a frozen model, and bfloat16 on a CPU.

    python bench/head.py FOLDER [--dtype bfloat16 float32] [--answers 32]

`steer.last` gives transformers the positions whose logits are wanted. The other entry of each pair gives it
their number, as everybody does: of the slice that this makes, with a head that takes no gradient, torch
makes a product per row and copies the head for each.
"""
import argparse
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import measure                                                  # noqa: E402
import steer                                                    # noqa: E402
from tools import inputs, model as models                       # noqa: E402


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder of a chat model")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--answers", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    asked = inputs.load("love", model=args.model)["train"]
    asked = [asked[i % len(asked)] for i in range(args.answers)]
    fns = {"reading": {}, "generation": {}}
    for dtype in args.dtype:
        model, tok = models.load(args.model, dtype=dtype, device="cpu")
        model.requires_grad_(False)                             # as with an adapter on it
        made = steer.generate(model, tok, asked, max_new_tokens=args.new_tokens)

        def by_number(run):
            with patch.object(steer, "last", lambda n, model: n):
                return run()
        read = partial(steer.token_nll, model, made)
        generate = partial(steer.generate, model, tok, asked, max_new_tokens=args.new_tokens)
        for how, wrap in (("an index", lambda run: run()), ("a number", by_number)):
            fns["reading"][f"{dtype}, {how}"] = partial(wrap, read)
            fns["generation"][f"{dtype}, {how}"] = partial(wrap, generate)
    for stage in ("reading", "generation"):
        seconds = measure.interleave(fns[stage], args.repeats)
        first = sorted(seconds[next(iter(seconds))])[args.repeats // 2]
        for name, found in seconds.items():
            middle = sorted(found)[args.repeats // 2]
            peak = f", peak {measure.peak_bytes(fns[stage][name]) / 2 ** 20:,.0f} MiB" * (stage == "reading")
            print(f"{stage:10s}  {name:20s}  {middle:6.2f} s  x{middle / first:.2f}{peak}", flush=True)


if __name__ == "__main__":
    main()
