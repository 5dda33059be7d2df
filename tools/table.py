"""Table: what a run prints at its end, and its line of results.tsv."""
from tools.folder import Record, write_whole


def has_moved(row: dict) -> bool:
    """More than two standard errors: less than that may be no effect at all."""
    return abs(row["trait"]) > 2 * row["trait_se"]


def tally(record: Record, seconds: float) -> None:
    """The closing table and the verdict in a sentence."""
    rows, final, nights = record.rows(), record.last_day, record.rows("steered")
    print("\n| row | dose | trait, nats | target, nats | off-target | coherence | text | |\n|" + "---|" * 8)
    for row in rows:
        verdict, move = "accepted" if row["round"] in record.accepted else "rolled back", row["shift"]
        target = f"{row['nats'][move['target']]:.3f} | {move['off_target']:.3f}" if move else "- | -"
        trait = f"{row['trait']:+.3f} ± {row['trait_se']:.3f}"
        print(f"| {row['label']} | {row['coeff']:.2f} | {trait} | {target} | {row['coherence']:.4f} | "
              f"{row['text']:.3f} | {verdict if row['kind'] == 'healed' else ''} |")
    share = ""
    if nights and nights[0]["trait"] > 0:
        share = f", {final['trait'] / nights[0]['trait']:.0%} of steering's in round {nights[0]['round']}"
    print(f"\nfinal: {final['label']}: trait {final['trait']:+.3f} nats{share}, text coherence "
          f"{final['text'] / rows[0]['text']:.1%} of the base's, {seconds:.0f} s" if record.accepted else
          f"\nfinal: no round was accepted, the model is the base still, {seconds:.0f} s")
    if nights and not any(map(has_moved, nights)):
        best = max(nights, key=lambda row: abs(row["trait"]))
        print(f"The trait did not move at any dose: steering's largest move is {best['trait']:+.3f} nats (se "
              f"{best['trait_se']:.3f}). Either this model does not read the persona, or the probe does not "
              "see it: read the diary, or try another --persona.")


def to_results(record: Record, seconds: float) -> None:
    """This run's line of results.tsv, where runs lie side by side; one that continues rewrites its own."""
    values, final = record.run["options"], record.last_day if record.accepted else {}
    keys = ("model", "persona", "pos", "reg", "kl_agg", "kl_ref", "seed", "rounds", "gate")
    night = next(iter(record.rows("steered")), {})
    line = {"run": record.path.name, **{k: values[k] for k in keys},
            **{k: final.get(k) for k in ("label", "trait", "coherence", "text")},
            "steered": night.get("trait"), "seconds": round(seconds)}
    path, lines = record.path.parent / "results.tsv", ["\t".join(line)]
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [x for x in lines if x.split("\t")[0] != record.path.name]
    cells = (" ".join(str(v).split()) if v is not None else "" for v in line.values())
    write_whole(path, ("\n".join([*lines, "\t".join(cells)]) + "\n").encode(errors="backslashreplace"))
