"""Table: what a run shows of itself: a line per stage, the closing table, results.tsv, its report."""
import shlex
from collections import Counter
from pathlib import Path

import steer
from tools import ranks, report
from tools.files import inert, one_line, write_whole
from tools.folder import Folder
from tools.record import Record
from tools.screen import Screen


def has_moved(row: dict) -> bool:
    """More than two standard errors, by the meter or by the probe: less may be no effect at all."""
    return abs(row["moved"]) > 2 * row["moved_se"] or abs(row["trait"]) > 2 * row["trait_se"]


def shown(x: float | None, se: float | None, spec: str = "+.2f") -> str:
    return "-" if x is None else f"{x:{spec}} ± {se:{spec.replace('+', '')}}"


# ---- the lines of the stages -------------------------------------------------------------------------------


def of_model(name: str, model, stack, layers: list[int]) -> str:
    text, n_trained = model.config.get_text_config(), sum(p.numel() for p in stack.parameters())
    return (f"{name}: {len(steer.blocks(model))} blocks of width {text.hidden_size}, "
            f"{str(model.dtype).removeprefix('torch.')}, lora {layers[0]}-{layers[-1]} rank "
            f"{len(stack.parameters()[0])}, {n_trained:,} trained parameters")


def of_limits(event: dict) -> str:
    limits = "  ".join(f"{rule} {limit:.3g}" for rule, limit in event["limits"].items())
    return f"{limits}  temperature {event['temperature']:g} (the base's own {event['nll']:.2f} nats)"


def of_row(row: dict) -> str:
    share = "-" if row["share"] is None else f"{row['share']:+.2f} (se {row['share_se']:.2f})"
    probe = f"  probe {row['trait']:+.3f} nats" if row["shift"] else ""
    return (f"share {share}  ratio {row['persona_ratio']:+.3f}{probe}  coherence {row['coherence']:.3f}  "
            f"text {row['text']:.3f}")


def of_silence(row: dict) -> str:
    return (f"warning: this model does not answer the probe (coherence {row['coherence']:.3f}): its profile "
            "means little, and it has no say in the gate; the trait is persona_ratio")


def of_stillness(row: dict) -> str:
    return (f"warning: this moves the trait by {row['moved']:+.3f} nats per token (se "
            f"{row['moved_se']:.3f}), which may be nothing; try clearer persona texts")


def of_made(judged: list[dict], coeff: float) -> str:
    dropped = Counter(e["verdict"]["rule"] for e in judged if not e["verdict"]["kept"])
    rules = "  ".join(f"{rule} {n}" for rule, n in sorted(dropped.items()))
    return (f"dose {coeff:.3f}  kept {len(judged) - dropped.total()}/{len(judged)}"
            + f"  dropped: {rules}" * bool(rules))


def of_heal(record: dict) -> str:
    steps, n_skipped, fired = record["steps"], len(record["skipped"]), "no barrier"
    val = "  val {val_nll_before:.3f} -> {val_nll_after:.3f}".format(**record) if record["n_val"] else ""
    if record["lam_eff"]:
        fired = f"fired in {record['fired_share']:.0%} of {len(steps)} steps"
    if n_skipped:
        fired += f"  skipped {n_skipped} steps that were not finite"
    return (f"nll {record['nll_first']:.3f} -> {record['nll_last']:.3f}{val}  D {steps[-1]['div']:.4f}  "
            f"{fired}")


# ---- the end of a run --------------------------------------------------------------------------------------


def tally(record: Record, seconds: float) -> None:
    """The closing table and the verdict in a sentence: the meter's share first, the probe beside it."""
    rows, final, nights = record.rows(), record.last_day, record.rows("steered")
    has_probe = rows[0]["shift"]
    print("\n| row | dose | share of the prompt | persona_ratio, nats per token |"
          + " probe's trait, nats | off-target |" * bool(has_probe) + " coherence | text | |")
    print("|" + "---|" * (9 if has_probe else 7))
    for row in rows:
        verdict = "accepted" if row["round"] in record.accepted else "rolled back"
        cells = [inert(row["label"]), f"{row['coeff']:.2f}", shown(row["share"], row["share_se"]),
                 shown(row["persona_ratio"], row["persona_ratio_se"], "+.3f")]
        if has_probe:
            cells += [shown(row["trait"], row["trait_se"], "+.3f"), f"{row['shift']['off_target']:.3f}"]
        cells += [f"{row['coherence']:.4f}", f"{row['text']:.3f}", verdict if row["kind"] == "healed" else ""]
        print("| " + " | ".join(cells) + " |")
    if record.accepted:
        share = "no share (the persona prompt moves nothing)" if final["share"] is None else (
            f"{final['share']:.0%} ± {final['share_se']:.0%} of the persona prompt's trait")
        of_steering = ""
        if nights and nights[0]["moved"] > 0:
            part = final["moved"] / nights[0]["moved"]
            of_steering = f", {part:.0%} of steering's in round {nights[0]['round']}"
        probe = f"; probe: trait {final['trait']:+.3f} nats" if has_probe else ""
        print(f"\nfinal: {inert(final['label'])}: {share}{of_steering}, text coherence "
              f"{final['text'] / rows[0]['text']:.1%} of the base's{probe}, {seconds:.0f} s")
    else:
        print(f"\nfinal: no round was accepted, the model is the base still, {seconds:.0f} s")
    if nights and not any(map(has_moved, nights)):
        best = max(nights, key=lambda row: abs(row["moved"]))
        print(f"The trait did not move at any dose: steering's largest move is {best['moved']:+.3f} nats per "
              f"token (se {best['moved_se']:.3f}). The model does not read the persona: try clearer texts.")
    elif record.accepted and final["moved"] < -2 * final["moved_se"]:
        print("The trait moved the wrong way: answers sound less like the persona than the base's do.")
    if record.run.get("stopped"):
        print(f"stopped: {one_line(record.run['stopped'])}")
    where = shlex.quote(str(record.path))
    print(f"\nread     {where}/report.html")
    if record.accepted:
        print(f"chat     python loop.py chat {where}\nexport   python loop.py export {where} --to peft")


@ranks.leads
def to_results(record: Record, seconds: float) -> None:
    """This run's line of results.tsv, where runs lie side by side; one that continues rewrites its own."""
    values, final = record.run["options"], record.last_day if record.accepted else {}
    keys = ("model", "persona", "pos", "reg", "kl_agg", "kl_ref", "seed", "rounds", "gate")
    night = next(iter(record.rows("steered")), {})
    line = {"run": record.path.name, **{k: values[k] for k in keys},
            **{k: final.get(k) for k in ("label", "share", "share_se", "persona_ratio", "trait", "coherence",
                                     "text")},
            "steered": night.get("share"), "seconds": round(seconds)}
    path, lines = record.path.parent / "results.tsv", ["\t".join(line)]
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [x for x in lines if x.split("\t")[0] != record.path.name]
    cells = (" ".join(str(v).split()) if v is not None else "" for v in line.values())
    write_whole(path, ("\n".join([*lines, "\t".join(cells)]) + "\n").encode(errors="backslashreplace"))


@ranks.leads
def show(path: Path, screen: Screen) -> None:
    """What a reader sees of the run so far. It can be made again from the journal, so it never ends a run."""
    try:
        report.write(path)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        screen.say("report", None, f"not written: {type(error).__name__}: {one_line(error)}", "yellow")


def close(folder: Folder, seconds: float) -> None:
    """What a finished run leaves on the terminal and beside its journal."""
    show(folder.path, folder.screen)
    tally(folder.record, seconds)
    with folder.writing(folder.path.parent / "results.tsv"):
        to_results(folder.record, seconds)
