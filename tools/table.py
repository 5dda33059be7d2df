"""Table: what a run shows of itself: the closing table, its line of results.tsv, its report."""
import shlex
from pathlib import Path

from tools import ranks, report
from tools.files import inert, one_line, write_whole
from tools.record import Record
from tools.screen import Screen


def has_moved(row: dict) -> bool:
    """More than two standard errors, by the meter or by the probe: less may be no effect at all."""
    return abs(row["moved"]) > 2 * row["moved_se"] or abs(row["trait"]) > 2 * row["trait_se"]


def shown(x: float | None, se: float | None, spec: str = "+.2f") -> str:
    return "-" if x is None else f"{x:{spec}} ± {se:{spec.replace('+', '')}}"


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
