"""Roofline: operations and bytes of a heal step and of decoding, from a model's config alone, and the floor
they set.

    python bench/roofline.py bench/configs/gemma-3-4b.json
    python bench/roofline.py pocket --machine here --dtype float32 --measured generate.json

    floor = max(operations / peak rate, bytes / bandwidth)          one sample of L = prompt + new tokens, N =
    new

A product of a weight matrix with one token costs 2 operations a weight; a frozen weight's backward is the
gradient in its input alone, 2 more. Attention is causal and windowed where the config says so: 4 heads *
head_dim a key forward, twice that backward. The head's loss over all N positions and V tokens of width d, by
what it computes:

    4 N V d     nll alone, or a barrier that is shut:           z = W h, and its gradient E_p[W]
    6 N V d     an open barrier, had its weight been known before:  + z0 or W (h - h0)
    8 N V d     an open barrier in one pass, any aggregate:     + E_p[(delta - E_p delta) W]

The reference's forward and its normaliser (2 N V d) are paid once a round, so divided by the epochs; blocks
below the lowest adapted one are cached; a LoRA costs 6 operations a parameter and token. Elementwise work,
activations moved between kernels and launches are not counted: a floor is not a forecast.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import measure                                                  # noqa: E402
import steer                                                    # noqa: E402
from tools import search                                        # noqa: E402
from tools.plan import decode_step, floor, forward_ops, keys_seen, rates, sizes      # noqa: E402

# bfloat16 products and copies; rates published by others for this card, not measured here: --machine here
# measures
MACHINES = {"h200": dict(flops=790e12, bytes=4.3e12)}


def load_config(name: str):
    """A config of text alone: from a JSON file, a checkpoint folder, or the hub's cache."""
    from transformers import AutoConfig
    path = HERE.parent / "pocket" if name == "pocket" else Path(name)
    if path.is_file():
        return AutoConfig.for_model(**json.loads(path.read_text(encoding="utf-8"))).get_text_config()
    return AutoConfig.from_pretrained(path if path.is_dir() else name).get_text_config()


def shape_of(config) -> dict:
    """What the counts need, read off the model built without weights."""
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()                         # transformers 5.0 leaves that out where nothing is loaded
    linears = [[m for m in block.modules() if isinstance(m, nn.Linear)] for block in steer.blocks(model)]
    # per rank
    return sizes(model) | dict(lora=[sum(m.in_features + m.out_features for m in block) for block in linears])


def backward_ops(shape: dict, L: int, first: int) -> int:
    """The gradient in the hidden states down to block `first`, with no gradient of a frozen weight."""
    return sum(2 * weights * L + 8 * shape["query"] * keys_seen(L, window)
               for weights, window in list(zip(shape["blocks"], shape["windows"]))[first:])


def heal_step(shape: dict, L: int, N: int, *, layers: list[int], rank: int = 32, epochs: int = 6,
              head: int = 8,
              batch: int = 1, width: int = 2) -> dict:
    """Operations {part: n} and bytes of weights of one sample's share of a heal step.

    layers: adapted blocks; head: 4, 6 or 8, see above; batch: samples per pass, which share one reading of
    the weights; width: bytes per weight.
    """
    first, Vd = min(layers), shape["V"] * shape["d"]
    ops = {"head": head * N * Vd, "body forward": forward_ops(shape, L, first),
           "body backward": backward_ops(shape, L, first),
           "reference": (forward_ops(shape, L) + 2 * N * Vd) / epochs,
           "LoRA": 6 * rank * L * sum(shape["lora"][i] for i in layers)}
    weights = 2 * sum(shape["blocks"][first:]) + Vd + (sum(shape["blocks"]) + Vd) / epochs
    return dict(ops=ops, bytes=width * weights / batch)


def original_step(shape: dict, L: int, *, layers: list[int], rank: int = 32) -> dict:
    """The original's: batch one, the reference in every step, both heads over the whole sequence, one head
    backward."""
    head = shape["V"] * shape["d"] * L
    return {"head": 6 * head, "body forward": forward_ops(shape, L),
            "body backward": backward_ops(shape, L, min(layers)),
            "reference": forward_ops(shape, L), "LoRA": 6 * rank * L * sum(shape["lora"][i] for i in layers)}


def milliseconds(ops: float, machine: dict) -> str:
    return f"{1e3 * ops / machine['flops']:,.4g}"


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config",
                        help="pocket, a checkpoint folder, a config.json, or a hub name in the cache")
    parser.add_argument("--machine", default="h200", choices=[*MACHINES, "here"], help="here = measured now")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--new", type=int, default=512, help="completion tokens")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--lora-from", type=float, default=0.2)
    parser.add_argument("--lora-to", type=float, default=0.8)
    parser.add_argument("--train-batch", type=int, default=4,
                        help="samples that share a reading of the weights")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 48], help="rows decoded at once")
    parser.add_argument("--measured", type=Path, metavar="FILE",
                        help="JSON of bench/generate.py (its `batch_sizes`), or "
                        "one with heal_step: [{name, L, N, seconds}], seconds of one sample's step")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    shape, dtype = shape_of(load_config(args.config)), getattr(torch, args.dtype)
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = rates(here, dtype) if args.machine == "here" else MACHINES[args.machine]
    layers = search.band(len(shape["blocks"]), args.lora_from, args.lora_to)
    L, width = args.prompt + args.new, dtype.itemsize
    print(f"{args.config}: body {sum(shape['blocks']) / 1e9:.3g} B weights in {len(shape['blocks'])} "
          "blocks, head "
          f"{shape['V'] * shape['d'] / 1e9:.3g} B; {args.machine}: {machine['flops'] / 1e12:.4g} TFLOP/s, "
          f"{machine['bytes'] / 1e12:.4g} TB/s")

    options = dict(layers=layers, rank=args.rank, epochs=args.epochs, batch=args.train_batch, width=width)
    steps = {"the original": dict(ops=original_step(shape, L, layers=layers, rank=args.rank), bytes=0.0)}
    steps["the original"]["bytes"] = width * (3 * sum(shape["blocks"]) + 3 * shape["V"] * shape["d"])
    for name, head in (("barrier open, one pass: 8NVd", 8), ("exact, weight known before: 6NVd", 6),
                       ("barrier shut, p95 or max: 4NVd", 4)):
        steps[name] = heal_step(shape, L, args.new, head=head, **options)
    rows = []
    for name, step in steps.items():
        total = sum(step["ops"].values())
        rows.append({"heal step": name,
                     **{part: milliseconds(ops, machine) for part, ops in step["ops"].items()},
                     "sum": milliseconds(total, machine), "weights read, GB": f"{step['bytes'] / 1e9:.3g}",
                     "floor, ms": f"{1e3 * floor(total, step['bytes'], machine):,.4g}"})
        step["floor"] = floor(total, step["bytes"], machine)
    print(f"\nms a sample, L {L}, N {args.new}, adapters of rank {args.rank} on blocks {layers[0]} to "
          f"{layers[-1]}, "
          f"{args.epochs} epochs, {args.train_batch} samples a pass\n\n{measure.table(rows)}")

    record, rows = dict(config=args.config, machine=machine, heal=steps, decode={}), []
    context = args.prompt + args.new // 2                   # tokens before the one decoded, on average
    for batch in args.batches:
        step = decode_step(shape, context, batch, width)
        seconds = floor(step["ops"], step["bytes"], machine)
        record["decode"][batch] = step | dict(floor=seconds)
        rows.append({"rows": batch, "operations, G": f"{step['ops'] / 1e9:.4g}",
                     "bytes, GB": f"{step['bytes'] / 1e9:.4g}",
                     "floor, ms": f"{1e3 * seconds:.4g}", "tokens/s": f"{batch / seconds:,.0f}"})
    print(f"\none decoding step at {context} tokens a row\n\n{measure.table(rows)}")

    if args.measured:
        found = json.loads(args.measured.read_text(encoding="utf-8"))
        record["measured"] = distances(found, shape, machine, width, args, options)
        print(f"\n{args.measured}\n\n{measure.table(record['measured'])}")
    if args.json:
        measure.write_json(args.json, **record)
    return record


def distances(found: dict, shape: dict, machine: dict, width: int, args, options: dict) -> list[dict]:
    """How far a measured run stands above its floor. ValueError if the file holds nothing that this can
    compare."""
    rows = []
    for model in found.get("models", {}).values():
        if model["parameters"] != shape["parameters"]:
            continue                                        # another model's numbers
        for batch, rate in model.get("batch_sizes", {"tokens_per_second": {}})["tokens_per_second"].items():
            step = decode_step(shape, args.prompt + model["batch_sizes"]["n_new"] // 2, int(batch), width)
            least = floor(step["ops"], step["bytes"], machine)
            rows.append({"measured": f"decoding, {batch} rows", "ms": f"{1e3 * int(batch) / rate:.3f}",
                         "floor, ms": f"{1e3 * least:.3f}",
                         "times the floor": f"{int(batch) / rate / least:.2f}"})
    for step in found.get("heal_step", []):
        ops = heal_step(shape, step["L"], step["N"], **options)
        least = floor(sum(ops["ops"].values()), ops["bytes"], machine)
        rows.append({"measured": step["name"], "ms": f"{1e3 * step['seconds']:.3f}",
                     "floor, ms": f"{1e3 * least:.3f}",
                     "times the floor": f"{step['seconds'] / least:.2f}"})
    if not rows:
        raise ValueError(f"{args.measured}: holds no run of {args.config}: expected bench/generate.py's "
                         "JSON of the same "
                         "model, or heal_step")
    return rows


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"roofline.py: {error}")
