"""Report: a run folder in, report.html and diary.md out: what came out, whether to trust it, where it hurts.

    python loop.py report RUN                writes both again, of an unfinished run too
    python loop.py report RUN RUN ...        the same for each; compare.html draws them over each other

report.html is one file with its style and figures inside: no script, nothing fetched. A journal may be
damaged or another version's: `clean` turns it into values of known types once, as the run is read, and what
draws them trusts them. A stage that is missing leaves a sentence where its figure would be.

Everything that a model or a user wrote is untrusted. It passes folder.inert on its way to HTML and Markdown;
a content security policy in the page forbids what an escape might have missed.

Known gaps: of a run with very many rounds the figures show a selection, and say so.
"""
import argparse
import json
import math
import os
import shlex
import statistics
import sys
import time
import urllib.parse
from pathlib import Path

from evalmfv import FOUNDATIONS, READABLE
from tools.folder import inert, read, write_whole
from tools.svg import MARKS, Plot, esc, swatch

RULES = {"worst_window": "a stretch of tokens that the base finds too surprising (nats per token)",
         "ppl_tail": "an ending that the base finds too surprising (perplexity of the last quarter)",
         "ngram": "phrases repeated (share of n-grams seen shortly before)",
         "loop": "tokens that go round in circles (share seen shortly before)",
         "words": "too few words", "unfinished": "cut off at the longest length allowed",
         "pattern": "refusal, or narration of the trait"}

# ---- what is in a run --------------------------------------------------------------------------------------

# Shapes for `clean`: a type, [items], {name: shape}, or {str: shape} for names that are not known beforehand.
RUN = dict(status=str, reason=str, command=str, started=float, seconds=float, stopped=str, tau=float, git=str,
           code=str, weights=str, options={str: object}, defaults={str: object}, versions={str: object},
           machine={str: object}, items=dict(train=[str]),
           persona=dict(name=str, target=str, direction=float, pos=[str], neg=[str]))
EVENTS = dict(
    layers=dict(steer=[float], lora=[float]), limits=dict(limits={str: float}), tau=dict(tau=float),
    row=dict(kind=str, trait=float, trait_se=float, share=float, share_se=float, persona_ratio=float,
             persona_ratio_se=float, text=float, text_se=float, coherence=float,
             shift=dict(off_target=float, moved={str: float}),
             probe=dict(p=[[float]], counted=[float], nats={str: float}),
             diary=[dict(prompt=str, text=str, coherence=float)]),
    dose=dict(coeff=float), made={},
    heal=dict(steps=[dict(nll=float, div=float, div_max=float, fired=float)], skipped=[float], tau=float,
              lam_eff=float, val_nll_before=float, val_nll_after=float, fired_share=float, warning=str,
              worst=dict(tokens=[str], day=[float], before=[float], night=[float])),
    gate=dict(accepted=bool, reasons=[str]))
TRIAL = dict(coeff=float, survive=float)
VERDICT = dict(kept=bool, rule=str, value=float, limit=float, match=str)
ANSWER = dict(prompt=float, coeff=float, text=str, verdict=VERDICT)


def clean(x, shape):
    """x in the types of its shape. What does not fit is None (number, truth) or empty; lists drop None."""
    if shape is float:                                                      # nan and infinities do not fit
        is_number = isinstance(x, (int, float)) and not isinstance(x, bool)
        return float(x) if is_number and abs(x) < 1e100 else None
    if shape is str:
        return x if isinstance(x, str) else ""
    if shape is bool:
        return x if isinstance(x, bool) else None
    if shape is object:
        return x
    if isinstance(shape, list):
        items = x if isinstance(x, list) else []
        return [y for item in items if (y := clean(item, shape[0])) is not None]
    x = x if isinstance(x, dict) else {}
    if str in shape:
        return {k: y for k, item in x.items() if (y := clean(item, shape[str])) is not None}
    return {k: clean(x.get(k), of) for k, of in shape.items()}


def moved(row: dict, base: dict) -> dict[str, tuple[float, float | None]]:
    """{foundation: (nats from base to row, standard error)}, paired over vignettes counted in both.

    The probe's p is [M][K] in the order of its nats; the error is the delta method's. Without p the recorded
    move, which has none.
    """
    now, then, names = row["probe"], base["probe"], list(row["probe"]["nats"])
    both = set(now["counted"]) & set(then["counted"])
    pairs = [(p, q) for i, (p, q) in enumerate(zip(now["p"], then["p"])) if i in both]
    if len(pairs) < 2 or any(len(x) != len(names) for pair in pairs for x in pair):
        recorded = row["shift"]["moved"]
        return {f: (recorded[f], None) for f in FOUNDATIONS if f in recorded}
    out = {}
    for k, name in enumerate(names):
        a, b = (statistics.fmean(pair[side][k] for pair in pairs) for side in (0, 1))
        if a > 0 and b > 0 and name in FOUNDATIONS:
            spread = statistics.stdev(p[k] / a - q[k] / b for p, q in pairs)
            out[name] = math.log(a / b), spread / math.sqrt(len(pairs))
    return out


# How a trait is measured: its axis, what a number of it is called in a sentence, and in a table.
METERS = {"share": ("trait (share: base 0, persona prompt 1)", "of what the persona prompt does", "share"),
          "nats": ("trait (nats from the base)", "nats", "nats")}


def trait_of(row: dict, meter: str) -> tuple[float | None, float | None]:
    """What is drawn as a row's trait, and its standard error: the label-free share, or the target's nats."""
    return (row["share"], row["share_se"]) if meter == "share" else (row["trait"], row["trait_se"])


class Run:
    """What a report shows of a run, by kind and round, in known types; its texts are not yet inert."""

    def __init__(self, folder: Path):
        record = read(folder)
        self.path, self.notes, self.record = Path(folder), record.notes, clean(record.run, RUN)
        self.options, self.persona = self.record["options"], self.record["persona"]
        self.first, last = {}, {stage: {} for stage in EVENTS}      # {stage: {round: event}}
        for e in record.events:
            n, stage = e["round"], e["stage"]
            if stage in EVENTS and (n is None or 0 <= n < 10 ** 6):
                event = clean(e, EVENTS[stage])
                self.first.setdefault(stage, event)
                last[stage][(n, event["kind"]) if stage == "row" else n] = event
        self.heals, self.gates, doses = ({n: e for n, e in last[stage].items() if n is not None}
                                         for stage in ("heal", "gate", "dose"))
        self.doses = {n: e["coeff"] for n, e in doses.items() if (e["coeff"] or 0) > 0}
        self.trials = {n: clean(record.trials(n), [TRIAL]) for n in doses}
        self.made = {n: clean(record.completions(n), [ANSWER]) for n in last["made"] if n is not None}

        self.rows = []
        for (n, kind), row in last["row"].items():
            name = {"steered": "night", "healed": "day"}.get(kind)
            if kind in ("base", "prompted") or name and n is not None:
                undone = kind == "healed" and n in self.gates and not self.gates[n]["accepted"]
                self.rows.append(row | dict(round=n, name=f"{name} {n}" if name else kind, undone=undone))
        by_kind = {kind: {r["round"]: r for r in self.rows if r["kind"] == kind} for kind in MARKS}
        self.nights, self.days = by_kind["steered"], by_kind["healed"]
        self.base, self.prompted, self.night = (next(iter(by_kind[kind].values()), None)     # the first night
                                                for kind in ("base", "prompted", "steered"))
        self.rounds = sorted({*self.nights, *self.days, *self.gates, *self.doses})
        self.accepted = [n for n in sorted(self.gates) if self.gates[n]["accepted"]]
        self.final = next((self.days[n] for n in reversed(self.accepted) if n in self.days), None)
        self.shown = self.final or next(reversed(self.days.values()), None)     # refused, or not yet judged
        ended = self.record["status"] not in ("running", "interrupted")     # going on, it keeps its seconds
        self.done = ended and self.record["seconds"] is not None

        # ---- the persona, and how its trait is measured
        target = self.persona["target"] or self.options.get("target")
        self.target = target if target in FOUNDATIONS else None
        self.wanted = {1: "up", -1: "down"}.get(self.persona["direction"] or self.number("direction"), "")
        file = Path(clean(self.options.get("persona"), str) or "?").stem
        self.name = self.persona["name"] or ("custom" if self.options.get("pos") else file)
        has_share = bool(self.rows) and all(r["share"] is not None for r in self.rows)
        self.meter = "share" if has_share or not self.target else "nats"
        for r in self.rows:
            r["moved"] = moved(r, self.base) if self.base else {}
        canary = self.base["coherence"] if self.base and self.target else None
        self.unread = canary is not None and canary < READABLE

    def number(self, option: str) -> float | None:
        return clean(self.options.get(option), float)

    def trait_of(self, row: dict) -> tuple[float | None, float | None]:
        return trait_of(row, self.meter)


# ---- numbers and texts in words ----------------------------------------------------------------------------


def said(text, limit: int = 600) -> str:
    """A model's or a user's words as an HTML element of their own direction."""
    return f"<bdi>{esc(text, limit)}</bdi>" if str(text).strip() else "<em>(nothing)</em>"


def fmt(x: float | None, spec: str = ".2f", error: float | None = None) -> str:
    """A number in words: a true minus sign, its standard error behind it, n/a where there is none."""
    if x is None:
        return "n/a"
    text = format(x, spec) if abs(x) < 1e6 else f"{x:.2g}"
    return text.replace("-", "−") + (f" ± {fmt(error, spec.lstrip('+'))}" if error is not None else "")


def percent(part: float | None, whole: float | None = 1.0) -> str:
    return f"{100 * part / whole:.0f}%".replace("-", "−") if part is not None and whole else "n/a"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def short(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def rms(xs) -> float:
    return math.sqrt(statistics.fmean(x * x for x in xs))


def chosen(items, n: int = 3) -> list:
    """First, last, and evenly spaced ones between them."""
    items = list(items)
    return items if len(items) <= n else [items[round(k * (len(items) - 1) / (n - 1))] for k in range(n)]


def spread(values) -> list[float]:
    """Both ends of each (value, error or None)."""
    return [v + sign * (e or 0) for v, e in values if v is not None for sign in (-1, 1)]


def has_moved(value: float | None, error: float | None) -> bool:
    """More than two standard errors: less than that may be no effect at all."""
    return value is not None and abs(value) > 2 * (error or 0)


# ---- pieces of the page ------------------------------------------------------------------------------------


def figure(panels, caption: str, kind: str = "") -> str:
    """Panels side by side where there is room, each in a box that scrolls by itself, above what they say."""
    boxes = "".join(f'<div class="panel">{p}</div>' for p in panels)
    return (f'<figure class="{kind}"><div class="panels">{boxes}</div>'
            f"<figcaption>{caption}</figcaption></figure>")


def missing(what: str) -> str:
    return f'<p class="missing">{what}</p>'


def folded(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


def table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    """Cells are HTML already. The first column names its row; the table scrolls in its own box."""
    top = "".join(f'<th scope="col">{h}</th>' for h in head)
    body = "".join(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
                   for first, *rest in rows)
    return (f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def key_line(rows) -> str:
    names = dict(base="base", prompted="persona prompt", steered="night: steered", healed="day: healed")
    kinds = dict.fromkeys(r["kind"] for r in rows)
    return " ".join(f'<span class="key">{swatch(kind)}{names[kind]}</span>' for kind in kinds)


# ---- the verdict and the tiles -----------------------------------------------------------------------------


def progress(run: Run) -> list[str]:
    """How far the run came and what its gate said, as HTML sentences."""
    lines = []
    if not run.done:
        status = said(run.record["status"] or "unknown", 60)
        why = run.record["reason"] and said(run.record["reason"])
        lines.append(f"<strong>This run is not finished</strong> (status: {status}). "
                     f"Below is what it had measured so far.{why and f' It ended with: {why}'}")
    if run.gates:
        lines.append(f"{len(run.accepted)} of {len(run.gates)} rounds accepted."
                     + " The gate was off: every finite round counts." * (run.options.get("gate") is False))
    else:
        lines.append("The run ended before its first round did." if run.done else "No round has ended yet.")
    if refused := [n for n in sorted(run.gates) if n not in run.accepted]:
        why = said("; ".join(run.gates[refused[-1]]["reasons"]) or "no reason given")
        rounds = ", ".join(map(str, refused[-20:]))
        lines.append(f"Refused and rolled back: round {rounds}; the last because {why}.")
    if run.record["stopped"]:
        lines.append(f"Stopped early: {said(run.record['stopped'])}.")
    return lines


def compared(run: Run, row: dict) -> list[str]:
    """Trait, coherence, what else moved and what the barrier did on the way to a row, as HTML sentences."""
    lines, wanted = [], f", wanted {run.wanted}" if run.wanted else ""
    names = {"share": "label-free, as a share of the persona prompt’s",
             "nats": f"nats of the probe’s {run.target}{wanted}"}
    for meter in METERS:
        value, error = trait_of(row, meter)
        if value is not None and (meter == "share" or run.target):
            beside = "".join(f", {r['name']} {fmt(trait_of(r, meter)[0], '+.2f')}"
                             for r in (run.night, run.prompted) if r)
            lines.append(f"Trait ({names[meter]}): {row['name']} {fmt(value, '+.2f', error)}{beside}.")
    beside = "".join(f", {r['name']} {fmt(r['text'], '.3f')}" for r in (run.night, run.base) if r)
    probe = [fmt(r["coherence"], ".4f") for r in (row, run.base)]
    text = fmt(row["text"], ".3f", row["text_se"])
    lines.append(f"Text coherence: {row['name']} {text}{beside}. On the probe: {probe[0]}, base {probe[1]}.")
    moves = {f: move for f, (move, _) in row["moved"].items() if f != run.target}
    if moves and run.target and not run.unread:
        most = max(moves, key=lambda f: abs(moves[f]))
        wide = row["trait"] is not None and abs(moves[most]) >= abs(row["trait"])
        lines.append(f"Off target: {most} moved most, by {fmt(moves[most], '+.2f')} nats"
                     + (", as far as the trait or further: not surgical." if wide else "."))
    heal = run.heals.get(row["round"])
    if heal and heal["lam_eff"]:
        how = said(run.options.get("kl_agg", "?"), 20)
        lines.append(f"The barrier ({how} of KL against a tau of {fmt(heal['tau'], '.3f')} nats) pushed in "
                     f"{percent(heal['fired_share'])} of the round’s steps.")
    elif heal:
        lines.append("No barrier was used (nll).")
    if heal and heal["warning"]:
        lines.append(f"Warning: {said(heal['warning'])}.")
    return lines


def verdict(run: Run) -> tuple[str, str, list[str]]:
    """(good, bad or open; the headline; sentences as HTML) in plain words, from the numbers alone."""
    lines, day, base = progress(run), run.final, run.base
    if base and run.shown:
        lines += compared(run, run.shown)
    if run.unread:
        rest = "; the share does not need the probe." if run.meter == "share" else "."
        lines.append("The probe cannot read this model: its allowed answers have "
                     f"{fmt(base['coherence'])} of the base’s probability. Nats "
                      f"and foundations say nothing "
                     f"here{rest}")
    nights = [(*run.trait_of(r), r["name"]) for r in run.nights.values() if run.trait_of(r)[0] is not None]
    if nights and not any(has_moved(value, error) for value, error, _ in nights):
        value, error, name = max(nights, key=lambda night: abs(night[0]))
        most = fmt(value, "+.3f", error)
        lines.append(f"Steering alone did not move the trait: at most {most}, in {name}. Either the model "
                     "does not take up this persona, or the meter does not see it: read the answers.")
    if run.done:
        lines.append(f"It took {duration(run.record['seconds'])}.")
    if not day or not base:
        none = "No round was accepted" + (": the model is the base" if run.done else " yet")
        return "bad" if run.done else "open", none if run.gates else "Nothing is healed yet", lines

    name, floor = day["name"].capitalize(), run.number("coh_floor") or 0.95
    (value, error), steered = run.trait_of(day), run.trait_of(run.night)[0] if run.night else None
    share = percent(value, steered) if steered and steered > 0 else ""
    keep = f"{percent(day['text'], base['text'])} of the base’s text coherence"
    broken = [k for k in ("text", "coherence")
              if base[k] is not None and (day[k] is None or day[k] < floor * base[k])]
    if run.meter == "nats" and run.unread:
        return "bad", "The probe cannot read this model", lines
    if broken:
        left = keep if "text" in broken else f"{fmt(day['coherence'])} on the probe"
        return "bad", f"{name} falls under the coherence floor: {left} is left", lines
    if not has_moved(value, error):
        return "open", f"{name} is coherent, but the trait did not move", lines
    if value < 0:
        return "bad", f"{name}: the trait moved the wrong way", lines
    if share and value < 0.1 * steered:
        return "open", f"{name} is coherent, but has hardly any trait: {share} of the steering’s", lines
    kept = f"{share} of the steering’s trait" if share else "a trait"
    return "good" if run.done else "open", f"{name} keeps {kept} at {keep}", lines


def persona(run: Run) -> str:
    """The prompts that the vector is made of, for and against, as they were given."""
    pos, neg = run.persona["pos"], run.persona["neg"]
    pairs = "".join(f"<dt>{way}</dt><dd>{said(texts[0], 400)}</dd>"
                    for way, texts in (("Persona, for", pos), ("against", neg)) if texts)
    rest = "".join(f"<p>{said(text, 400)}</p>" for pair in zip(pos[1:20], neg[1:20]) for text in pair)
    shown = f'<dl class="persona">{pairs}</dl>' if pairs else ""
    return shown + (folded("More of it", rest) if rest else "")


def opening(run: Run) -> str:
    mood, head, lines = verdict(run)
    model, seed = said(run.options.get("model", "?"), 120), said(run.options.get("seed", "?"), 20)
    out = [f'<p class="eyebrow">steer-heal-love · persona <b>{said(run.name, 80)}</b> on <b>{model}</b> · '
           f'seed {seed}</p><div class="verdict {mood}"><h1>{head}</h1>',
           *(f"<p>{line}</p>" for line in lines), "</div>",
           *(f'<p class="note">{esc(note)}</p>' for note in run.notes)]
    if run.shown and run.base:
        row, (value, error) = run.shown, run.trait_of(run.shown)

        def beside(of, spec):
            return ", ".join(f"{r['name']} {fmt(of(r), spec)}" for r in (run.base, run.night) if r)
        unit = f"± {fmt(error)} {METERS[run.meter][1]}"
        tiles = [("trait", fmt(value, "+.2f"), f"{unit}; {beside(lambda r: run.trait_of(r)[0], '+.2f')}")]
        for key, spec, unit in (("text", ".3f", "share of coherent windows"),
                                ("coherence", ".4f", "probability of allowed answers")):
            title = {"text": "text coherence", "coherence": "probe coherence"}[key]
            tiles.append((title, fmt(row[key], spec), f"{unit}; {beside(lambda r: r[key], spec)}"))
        if run.target:
            off = row["shift"]["off_target"]
            tiles.append(("off-target", fmt(off), "nats, the largest move of another foundation"))
        state = "accepted" if run.final else "not judged yet"
        state = "refused: the model is the base" if row["undone"] else state
        out += [f'<p class="which">{row["name"].capitalize()} ({state})</p><dl class="tiles">',
                *(f"<div><dt>{title}</dt><dd><b>{number}</b> <span>{note}</span></dd></div>"
                  for title, number, note in tiles), "</dl>"]
    return f"<header>{''.join(out)}{persona(run)}</header>"


# ---- the sections ------------------------------------------------------------------------------------------


def trajectory(run: Run) -> str:
    unit, rows = METERS[run.meter][0], [r for r in run.rows if None not in (run.trait_of(r)[0], r["text"])]
    if not rows:
        return missing("Neither the base nor any round has been measured yet.")
    traits, floor = {r["name"]: run.trait_of(r) for r in rows}, run.number("coh_floor")
    floor = floor * run.base["text"] if floor and run.base and run.base["text"] else None
    alt = "Trait against text coherence: " + "; ".join(
        f"{r['name']} {fmt(traits[r['name']][0], '+.2f')}, {fmt(r['text'], '.3f')}" for r in rows)
    texts = spread((r["text"], r["text_se"]) for r in rows)
    plot = Plot(alt, spread(traits.values()), [*texts, floor], unit, "text coherence", h=360)
    plot.level(floor, "floor of the gate")
    plot.write(plot.right - 4, plot.top + 12, "more trait, more coherent ↗", "corner", "end")
    days = [r for r in rows if r["kind"] == "healed"]
    plot.line([(traits[r["name"]][0], r["text"]) for r in days], "healed", more="faint")
    # labels that matter most come first: they take the free places
    for r in sorted(rows, key=lambda r: (r["kind"] not in ("base", "prompted"), -(r["round"] or 0))):
        (value, error), same = traits[r["name"]], dict(steered=run.nights, healed=run.days).get(r["kind"], {})
        label = r["name"] if not same or r["round"] in (min(same), max(same)) else str(r["round"])
        text = fmt(r["text"], ".3f", r["text_se"])
        plot.mark(r["kind"], value, r["text"], f"{r['name']}: trait {fmt(value, '+.3f', error)}, text {text}",
                  label, ex=error, ey=r["text_se"], more="undone" * r["undone"])
    panels = [plot.svg()]

    if rounds := [r for r in rows if r["round"] is not None]:
        plot = Plot("Trait by round", [r["round"] for r in rounds], spread(traits.values()), "round", unit,
                    whole_x=True, h=360)
        for r in rows:
            if r["round"] is None:
                plot.level(traits[r["name"]][0], r["name"])
        for kind in ("steered", "healed"):
            some = sorted((r for r in rounds if r["kind"] == kind), key=lambda r: r["round"])
            plot.line([(r["round"], traits[r["name"]][0]) for r in some], kind)
            for r in some:
                value, error = traits[r["name"]]
                says = f"{r['name']}: trait {fmt(value, '+.3f', error)}"
                plot.mark(kind, r["round"], value, says, ey=error, more="undone" * r["undone"])
        panels.append(plot.svg())
    undone = ", hollow is rolled back" * any(r["undone"] for r in rows)
    caption = (f"{key_line(rows)} Up and to the right is better. Each mark is a row of the table below, a "
               f"number is its round{undone}; whiskers are one standard error.")
    return figure(panels, caption) + folded("Every round in numbers", numbers(run))


def numbers(run: Run) -> str:
    meters = [m for m in METERS if any(trait_of(r, m)[0] is not None for r in run.rows)]

    def cells(r):
        traits = [fmt(trait_of(r, m)[0], "+.3f", trait_of(r, m)[1]) for m in meters]
        return [*traits, fmt(r["shift"]["off_target"], ".3f"), fmt(r["coherence"], ".4f"),
                fmt(r["text"], ".3f", r["text_se"])]
    rows = [[r["name"], "", "", *cells(r), *[""] * 4] for r in (run.base, run.prompted) if r]
    for n in run.rounds[-400:]:
        gate, heal, made = run.gates.get(n), run.heals.get(n), run.made.get(n, [])
        if n in run.nights:
            rows.append([f"night {n}", fmt(run.doses.get(n)), "", *cells(run.nights[n]), *[""] * 4])
        end = "in progress" if gate is None else "accepted"
        if gate and not gate["accepted"]:
            end = f"rolled back: {said('; '.join(gate['reasons']))}"
        day = cells(run.days[n]) if n in run.days else ["n/a"] * (len(meters) + 3)
        kept = f"{sum(c['verdict']['kept'] is True for c in made)}/{len(made)}"
        D = heal["steps"][-1]["div"] if heal and heal["steps"] else None
        fired = percent(heal["fired_share"]) if heal else "n/a"
        ends = "val_nll_before", "val_nll_after"
        nll = " → ".join(fmt(heal[k], ".3f") for k in ends) if heal else "n/a"
        rows.append([f"day {n}", fmt(run.doses.get(n)), kept, *day, nll, fmt(D, ".3f"), fired, end])
    head = ["row", "dose", "kept", *(f"trait, {METERS[m][2]}" for m in meters), "off-target", "coherence",
            "text", "held-out nll", "D, nats", "steps fired", "gate"]
    return table(head, rows, "numbers")


def answers(run: Run) -> str:
    if not run.base or not run.base["diary"]:
        return missing("No held-out prompt has been answered yet.")
    nights = [r for r in run.nights.values() if r["text"] is not None]
    worst = min(nights, key=lambda r: r["text"], default=run.night)
    shown = [run.base, run.prompted, run.night, worst, *chosen(run.days.values(), 2)]
    shown = list({r["name"]: r for r in shown if r}.values())
    own = all(told["coherence"] is not None for r in shown for told in r["diary"])

    def title(row):
        name = row["name"].capitalize() + ", steered" * (row["kind"] == "steered")
        lowest = row is worst and len(nights) > 1
        return name + ", least coherent" * lowest + " (rolled back)" * row["undone"]

    def cell(row, i):
        told = row["diary"][i] if i < len(row["diary"]) else {"text": "", "coherence": None}
        share = told["coherence"] if own else row["text"]
        shade = 0 if share is None else min(max(1.25 * (1 - share), 0), 0.62)
        number = f"<small>{share:.2f}</small>" if own and share is not None else ""
        return (f'<td class="{row["kind"]}" data-who="{title(row)}" style="--k:{shade:.2f}">'
                f'{said(told["text"])}{number}</td>')

    def grid(rows, which):
        head = "".join(f'<th scope="col" class="{r["kind"]}"><b>{title(r)}</b><small>trait '
                       f'{fmt(run.trait_of(r)[0], "+.2f")} · text {fmt(r["text"])}</small></th>'
                       for r in rows)
        body = "".join(f'<tr class="asked"><th colspan="{len(rows)}" scope="rowgroup">'
                       f'{said(run.base["diary"][i]["prompt"], 400)}</th></tr>'
                       f'<tr>{"".join(cell(r, i) for r in rows)}</tr>' for i in which)
        return (f'<div class="scroll" tabindex="0"><table class="answers"><thead><tr>{head}</tr></thead>'
                f"<tbody>{body}</tbody></table></div>")

    def left(i):                                                # of the least coherent night's answer
        return worst["diary"][i]["coherence"] if own and worst and i < len(worst["diary"]) else 1
    order = sorted(range(min(len(run.base["diary"]), 30)), key=left)
    what = "the small number is the answer’s own" if own else "it has none per answer: one shade a column"
    if own and worst:
        what += (f". First come the prompts on which {worst['name']} breaks most" if left(order[0]) < 1 else
                 f". No greedy answer of {worst['name']} broke: its text score is that of sampled ones")
    text = ("<p>Greedy answers to prompts that no stage has trained on. Nights are steered and dropped; days "
            "are what is left without steering. The shade is lost coherence, the darker the less the base "
            f"could have written the answer; {what}.</p>" + grid(shown, order[:2]))
    if order[2:]:
        text += folded(f"The other prompts ({len(order) - 2})", grid(shown, order[2:]))
    if rest := [r for r in (*run.nights.values(), *run.days.values()) if r not in shown]:
        some = sorted(chosen(rest, 20), key=lambda r: (r["round"], r["kind"] == "healed"))
        text += folded(f"Other nights and days ({len(some)} of {len(rest)})", grid(some, order[:2]))
    return text


def moves(run: Run) -> str:
    """Every foundation: nats from the base when prompted, steered and healed."""
    some = [r for r in (run.prompted, run.night, run.shown) if r and r["moved"]]
    names = [f for f in FOUNDATIONS if any(f in r["moved"] for r in some)]
    if not names:
        return missing("No row beside the base has been measured on the probe yet.")

    def words(row):
        moves = [row["moved"].get(f, (None, None)) for f in FOUNDATIONS]
        return [fmt(move, "+.2f", error) for move, error in moves]
    alt = "Nats that each foundation moved from the base: " + "; ".join(
        f"{r['name']}: {', '.join(map(' '.join, zip(FOUNDATIONS, words(r))))}" for r in some)
    ends = spread(move for r in some for move in r["moved"].values())
    plot = Plot(alt, [*ends, 0.0], [0, len(names)], "nats from the base", "", h=380, left=82)
    plot.line([(0, 0), (0, len(names))], "rule")
    for i, f in enumerate(names):
        y = len(names) - i - 0.5
        plot.write(plot.left - 8, plot.y(y) + 4, f, "tick target" if f == run.target else "tick", "end")
        plot.back.append(f'<path class="grid" d="M{plot.left},{plot.y(y - .5)}H{plot.right}"/>')
        for j, r in enumerate(some):
            move, error = r["moved"].get(f, (None, None))
            says = f"{r['name']}: {f} {fmt(move, '+.3f', error)} nats"
            plot.mark(r["kind"], move, y + 0.26 * (1 - j), says, ex=error)
    cells = [[r["name"], *words(r)] for r in chosen([r for r in run.rows if r["moved"]], 200)]
    aim = f"{run.target.capitalize()} is wanted {run.wanted}. " if run.target and run.wanted else ""
    unread = "The probe cannot read this model: read nothing into this figure. " * run.unread
    caption = (f"{unread}{aim}{key_line(some)} ({', '.join(r['name'] for r in some)}). Whiskers are one "
               "standard error, paired over vignettes.")
    return figure([plot.svg()], caption) + folded("Every foundation in numbers",
                                                  table(["row", *FOUNDATIONS], cells, "numbers"))


def dose(run: Run) -> str:
    tried = {(n, t["coeff"]): t["survive"] for n, trials in run.trials.items() for t in trials
             if (t["coeff"] or 0) > 0 and t["survive"] is not None}
    if not tried:
        given = ", ".join(f"{c:.3g}" for c in dict.fromkeys(run.doses.values()))
        none = f"No dose was searched: it was given as {given}." if given else "No dose has been tried yet."
        return missing(none)
    asked, rounds = run.number("min_survive"), sorted({n for n, _ in tried})
    alt = "Survival by dose: " + "; ".join(f"round {n} dose {c:.3g} {fmt(v)}" for (n, c), v in tried.items())
    plot = Plot(alt, [c for _, c in tried], [0, 1.0, *tried.values(), asked], "dose (multiples of v, log)",
                "survival (share of answers)", log_x=True)
    plot.level(asked, f"asked for: {percent(asked)}")
    for n in chosen(rounds, 12):
        points = sorted((c, v) for (m, c), v in tried.items() if m == n)
        plot.line(points, "search", more="faint" if n != rounds[-1] else "")
    for (n, c), survive in tried.items():
        says = f"round {n}, dose {c:.3f}: survival {fmt(survive)}"
        if run.doses.get(n) == c:
            plot.mark("steered", c, survive, says + ", settled", str(n))
        else:
            plot.mark("dot", c, survive, says, more="search")
    return figure([plot.svg()], "The share of answers that pass the filter, at every dose that a search "
                  "tried; diamonds are the doses that rounds settled on, numbers the rounds.")


def dropped(run: Run) -> str:
    made = [(n, c) for n, answers in sorted(run.made.items()) for c in answers]
    if not made:
        return missing("No answer has been sampled for training yet.")
    by_rule, rounds, train = {}, chosen(dict.fromkeys(n for n, _ in made), 12), run.record["items"]["train"]
    for n, c in made:
        if not c["verdict"]["kept"]:
            by_rule.setdefault(c["verdict"]["rule"] or "?", []).append((n, c))
    if not by_rule:
        return f"<p>All {len(made)} answers passed the filter.</p>"

    def excess(case):
        value, limit = case[1]["verdict"]["value"], case[1]["verdict"]["limit"]
        return -math.inf if value is None else value / limit if limit else value
    rows, samples = [], []
    for rule, cases in sorted(by_rule.items(), key=lambda item: -len(item[1]))[:20]:
        n, worst = max(cases, key=excess)
        v, i = worst["verdict"], worst["prompt"]
        counts = [sum(m == k for m, _ in cases) for k in rounds]
        rows.append([f"{esc(rule, 40)}<small>{RULES.get(rule, '')}</small>",
                     *(str(c or "·") for c in counts),
                     str(len(cases)), fmt(v["limit"]), fmt(v["value"])])
        asked = said(train[int(i)], 200) if i is not None and 0 <= i < len(train) else "<em>unknown</em>"
        match = f", matched “{said(v['match'], 60)}”" if v["match"] else ""
        why = f"<b>{esc(rule, 40)}</b> {fmt(v['value'])}, limit {fmt(v['limit'])}{match}"
        samples.append(f'<figure class="sample"><blockquote>{said(worst["text"])}</blockquote><figcaption>'
                       f"{why}; round {n}, dose {fmt(worst['coeff'])}. Asked: {asked}</figcaption></figure>")
    lost = sum(map(len, by_rule.values()))
    return (f"<p>{lost} of {len(made)} sampled answers ({percent(lost, len(made))}) were dropped before "
            "training, each by the first rule it broke.</p>"
            + table(["rule", *(f"r{n}" for n in rounds), "all", "limit", "worst"], rows, "numbers")
            + folded("The worst answer by each rule", f'<div class="samples">{"".join(samples)}</div>'))


def heat(run: Run) -> str:
    """The loudest of the rounds' worst kept answers, token by token."""
    heals = {n: e for n, e in run.heals.items() if e["worst"]["day"]}
    if not heals:
        return missing("This run has no KL per token: no round has healed yet.")
    n = max(heals, key=lambda n: rms(heals[n]["worst"]["day"]))
    worst, tau = heals[n]["worst"], heals[n]["tau"] if heals[n]["lam_eff"] else None
    kl, words = worst["day"], worst["tokens"] + [""] * len(worst["day"])
    mean, rmse, top = statistics.fmean(kl), rms(kl), max(*kl, 1e-9)

    plot = Plot(f"KL of each token of the worst answer of day {n}", [0, len(kl)], [0.0, *kl, tau],
                "token of the answer", "KL(day ‖ reference), nats", whole_x=True, w=900, h=250, right=100,
                room=0.01)
    for i, value in enumerate(kl[:600]):
        d = f"M{plot.x(i + 0.1)},{plot.y(0)}V{plot.y(value)}H{plot.x(i + 0.9)}V{plot.y(0)}Z"
        says = f"{esc(words[i], 40)} {fmt(value, '.3f')} nats"
        plot.back.append(f'<path class="bar" d="{d}"><title>{says}</title></path>')
    for value, kind in ((mean, "mean"), (rmse, "rmse"), (tau, "tau")):
        plot.level(value, f"{kind} {fmt(value, '.3f')}", kind)
    caption = f"Its rmse is {rmse / (mean or 1):.1f} times its mean. "
    if tau is None:
        caption += "No barrier was used in this round."
    else:
        over = [name for name, value in (("mean", mean), ("rmse", rmse)) if value > tau]
        over = {0: "neither is", 1: f"only the {''.join(over)} is", 2: "both are"}[len(over)]
        how = said(run.options.get("kl_agg", "?"), 20)
        caption += f"Of these two {over} over tau. This run’s barrier went by {how}."

    def tokens(of):
        marked = "".join(f'<span style="--k:{min(max(v / top, 0), 1):.2f}" title="{fmt(v, ".3f")} nats">'
                         f"{esc(word, 60)}</span>" for word, v in zip(words[:256], of))
        return f'<p class="tokens"><bdi>{marked}</bdi>{" …" if len(of) > 256 else ""}</p>'
    names = dict(night=f"Night {n}, steered", before="The student before this round", day=f"Day {n}, healed")
    texts = ""
    for key, name in names.items():
        if of := worst[key]:
            facts = dict(mean=statistics.fmean(of), rmse=rms(of), max=max(of))
            facts = ", ".join(f"{what} {fmt(value, '.3f')}" for what, value in facts.items())
            texts += f"<dt>{name} <small>{facts} nats</small></dt><dd>{tokens(of)}</dd>"
    return ("<p>Of each round’s kept answers, the one that the healed model leaves furthest from the "
            f"reference; the loudest of them is day {n}’s.</p>" + figure([plot.svg()], caption, "wide")
            + f'<dl class="strips">{texts}</dl>')


def healing(run: Run) -> str:
    """D at every optimiser step of every round, with the barrier's tau and the steps in which it pushed."""
    heals, steps, starts = {n: e for n, e in sorted(run.heals.items()) if e["steps"]}, [], []
    for e in heals.values():
        starts.append(len(steps))
        steps += e["steps"]
    every, taus = chosen(range(len(steps)), 1500), {n: e["tau"] for n, e in heals.items() if e["lam_eff"]}
    values = [steps[i][key] for i in every for key in ("div", "div_max")]
    if all(v is None for v in values):
        return missing("No round has trained yet.")
    plot = Plot(f"D at each of {len(steps)} optimiser steps of {len(heals)} rounds", [0, len(steps)],
                [*values, *taus.values(), 0.0], "optimiser step, all rounds", "D (nats)", whole_x=True, w=900,
                h=236, right=80, top=24, room=0.005)
    for i, (n, begin, end) in enumerate(zip(heals, starts, [*starts[1:], len(steps)])):
        plot.back.append(f'<path class="grid" d="M{plot.x(begin)},{plot.top}V{plot.bottom}"/>')
        if i % math.ceil(len(heals) / 20) == 0:
            plot.write(plot.x(begin) + 3, plot.top - 6, f"round {n}" if len(heals) <= 10 else f"r{n}", "tick")
        if (tau := taus.get(n)) is not None:
            fired = [j for j in every if begin <= j < end and (steps[j]["fired"] or 0) > 0]
            plot.back += [f'<path class="fired" d="M{plot.x(j)},{plot.top}V{plot.bottom}"/>' for j in fired]
            plot.line([(begin, tau), (end, tau)], "rule", f"tau {fmt(tau, '.3f')}" * (end == len(steps)))
    for key, kind in (("div_max", "peak"), ("div", "healed")):
        plot.line([(i, steps[i][key]) for i in every], kind)
    notes = [f"Round {n}: {said(e['warning'])}." for n, e in run.heals.items() if e["warning"]][-12:]
    if skipped := sum(len(e["skipped"]) for e in run.heals.values()):
        notes.append(f"{skipped} steps were skipped: their loss or gradient was not finite.")
    barrier = "shaded where the barrier fired, an answer being over tau" if taus else "no barrier was used"
    caption = (f"D: the mean over a step’s answers (line) and the largest (thin); {barrier}."
               + f" A selection: {len(every)} of {len(steps)} steps." * (len(every) < len(steps)))
    return figure([plot.svg()], caption, "wide") + "".join(f'<p class="note">{note}</p>' for note in notes)


def setting(run: Run) -> str:
    """What differs from the defaults, what was measured on the model, where it ran, and how to go on."""
    defaults, first = run.record["defaults"], {k: run.first.get(k) or clean({}, EVENTS[k]) for k in EVENTS}
    rows = [[f"<code>--{esc(key, 60).replace('_', '-')}</code>", said(short(value), 300),
             esc(short(defaults[key]) or "(empty)", 120)]
            for key, value in run.options.items() if key in defaults and value != defaults[key]]
    out = [table(["option", "here", "default"], rows) if rows else "<p>Every option has its default.</p>"]

    blocks = {"steered blocks": first["layers"]["steer"], "adapted blocks": first["layers"]["lora"]}
    measured = [[name, ", ".join(f"{i:.0f}" for i in some[:200])] for name, some in blocks.items() if some]
    if tau := first["tau"]["tau"] or run.record["tau"]:
        measured.append(["tau", f"{fmt(tau, '.4f')} nats"])
    measured += [[f"filter: {esc(k, 30)}", fmt(v, ".3g")] for k, v in first["limits"]["limits"].items()]
    if measured:
        out.append("<h3>Measured on the model itself</h3>" + table(["what", "value"], measured))

    where = run.record["versions"] | run.record["machine"]
    where |= {"commit (+ = with changes)": run.record["git"], "checksum of the code": run.record["code"],
              "checksum of the base’s weights": run.record["weights"], "status": run.record["status"]}
    if 0 < (run.record["started"] or 0) < 2 ** 33:
        where["started"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(run.record["started"]))
    rows = [[esc(k, 40), said(v, 200)] for k, v in where.items() if v != ""]
    out.append(folded("Environment", table(["what", "value"], rows)) if rows else "")

    folder = shlex.quote(str(run.path))
    commands = {"repeat": run.record["command"], "resume": f"python loop.py --resume {folder}"}
    if run.final:
        commands |= {"chat": f"python loop.py chat {folder}",
                     "export": f"python loop.py export {folder} --to peft"}
    commands["this page"] = f"python loop.py report {folder}"
    lines = "".join(f"<div><dt>{name}</dt><dd><code>{said(text, 2000)}</code></dd></div>"
                    for name, text in commands.items() if text)
    return "".join(out) + f'<h3>Do it again</h3><dl class="commands">{lines}</dl>'


# ---- the page ----------------------------------------------------------------------------------------------

SECTIONS = {"trajectory": ("What the trait costs", trajectory), "answers": ("Before and after", answers),
            "moves": ("What else moved", moves), "dose": ("The dose", dose),
            "dropped": ("What was dropped, and why", dropped),
            "heat": ("The worst answer, token by token", heat), "healing": ("Healing, step by step", healing),
            "setting": ("Settings and commands", setting)}


def page(title: str, body: str) -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{esc(title, 120)}</title>'
            f"<style>{style}</style></head><body><main>{body}<footer>Written by loop.py report from run.json "
            "and events.jsonl. No script, nothing fetched.</footer></main></body></html>\n")


def part(run: Run, draw) -> str:
    """What one part draws. One that fails on values nobody foresaw says so; the rest of the page stands."""
    try:
        return draw(run)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        why = f"{type(error).__name__}: {esc(error, 120)}"
        return missing(f"This part cannot be drawn from this run’s events ({why}).")


def render(run: Run) -> str:
    """report.html of a run, as text."""
    nav = " ".join(f'<a href="#{name}">{title}</a>' for name, (title, _) in SECTIONS.items())
    body = "".join(f'<section id="{name}"><h2>{title}</h2>{part(run, draw)}</section>'
                   for name, (title, draw) in SECTIONS.items())
    title = f"{run.name} on {run.options.get('model', '?')}: steer, heal"
    return page(title, f'{part(run, opening)}<nav aria-label="Sections">{nav}</nav>{body}')


# ---- several runs over each other --------------------------------------------------------------------------


def arms(runs: list[Run]) -> list[tuple[str, str]]:
    """(arm, name) of each run. An arm is the options in which runs differ but the seed, which a name adds."""
    keys = [k for k in dict.fromkeys(k for r in runs for k in r.options) if k not in ("out", "seed")]
    differing = [k for k in keys if len({json.dumps(r.options.get(k)) for r in runs}) > 1]
    several = len({json.dumps(r.options.get("seed")) for r in runs}) > 1
    named = []
    for r in runs:
        arm = " ".join(f"{k}={short(r.options.get(k, 'n/a'))}" for k in differing)
        seed = f"seed={short(r.options.get('seed', '?'))}" if several else ""
        named.append((arm or "all runs", f"{arm} {seed}".strip() or r.path.name))
    if len({name for _, name in named}) < len(runs):
        named = [(arm, f"{name} {r.path.name}") for (arm, name), r in zip(named, runs)]
    return named


def compare(runs: list[Run], out: Path) -> str:
    """compare.html of several runs, as text: their trajectories over each other, and a table.

    Marks and lines are arms, means over their runs; single runs are dots. out: the folder of the page.
    """
    meter = "share" if all(r.meter == "share" for r in runs) else "nats"
    named, known, groups = arms(runs), [], {}
    for (arm, name), run in zip(named, runs):           # groups: arm -> round (-1 = base) -> [(trait, text)]
        for n, row in [(-1, run.base)] * bool(run.base) + list(run.days.items()):
            at = trait_of(row, meter)[0], row["text"]
            if None not in at:
                known.append((arm, n, at, f"{name}, {row['name']}", row["undone"]))
                groups.setdefault(arm, {}).setdefault(n, []).append(at)
    order = list(dict.fromkeys(arm for arm, _ in named))
    colours = {arm: f"arm{i % 6}" for i, arm in enumerate(order)}
    label = {arm: arm if len(arm) <= 20 else chr(65 + i % 26) for i, arm in enumerate(order)}   # or a letter
    body, panels = [], []
    facts = dict(weights="weights of the base", items="prompts", versions="versions", code="code")
    for key, what in facts.items():
        if len({json.dumps(r.record[key], sort_keys=True) for r in runs}) > 1:
            body.append(f'<p class="note">The runs differ in their {what} too, not only in options.</p>')

    if known:
        alt = f"Trait against text coherence, of {len(runs)} runs in {len(order)} arms"
        xs, ys = zip(*(at for _, _, at, _, _ in known))
        plot = Plot(alt, xs, ys, METERS[meter][0], "text coherence", w=560, h=380)
        for arm, n, (trait, text), name, undone in known:
            if len(groups[arm][n]) > 1 or undone:
                says = f"{name}: trait {fmt(trait, '+.3f')}, text {fmt(text, '.3f')}"
                plot.mark("dot", trait, text, says, more=f"{colours[arm]} {'undone' if undone else 'faint'}")
        for arm, rounds in groups.items():
            means = [(n, *map(statistics.fmean, zip(*ats))) for n, ats in sorted(rounds.items())]
            plot.line([(trait, text) for _, trait, text in means], colours[arm])
            for n, trait, text in means:
                says = (f"{arm}, {'base' if n < 0 else f'day {n}'}, mean of {len(rounds[n])}: "
                        f"trait {fmt(trait, '+.3f')}, text {fmt(text, '.3f')}")
                name = label[arm] if n == means[-1][0] else ""
                plot.mark("base" if n < 0 else "healed", trait, text, says, name, more=colours[arm])
        panels.append(plot.svg())
    names = {arm: arm if label[arm] == arm else f"{label[arm]}: {arm}" for arm in order}
    keys = "".join(f"<li>{swatch('healed', colours[arm])}{said(names[arm])}</li>" for arm in order)
    note = ("Up and to the right is better. Marks are days, the star is the base, each the mean over an "
            "arm’s runs; small dots are single runs, hollow if rolled back.")
    none = missing("None of these runs has measured a row yet.")
    body.append(figure(panels, f'<ul class="arms">{keys}</ul>{note}') if panels else none)

    rows = []
    for (_, name), run in zip(named, runs):
        mood, head, _ = verdict(run)
        link = urllib.parse.quote(os.path.relpath(run.path / "report.html", out).replace(os.sep, "/"))
        cells = ["none", *["n/a"] * 4]
        if end := run.final:
            cells = [end["name"], fmt(trait_of(end, meter)[0], "+.3f", trait_of(end, meter)[1]),
                     fmt(end["text"], ".3f", end["text_se"]), fmt(end["coherence"], ".4f"),
                     fmt(end["shift"]["off_target"], ".3f")]
        rows.append([f'<a href="./{link}">{said(name)}</a>', f'<span class="{mood}">{head}</span>', *cells,
                     str(len(run.gates))])
    head = ["run", "verdict", "last accepted", f"trait, {meter}", "text", "coherence", "off-target", "rounds"]
    body.append(table(head, rows, "runs"))
    head = f'<p class="eyebrow">steer-heal-love</p><h1>{len(runs)} runs over each other</h1>'
    return page("Runs compared", f"<header>{head}</header><section>{''.join(body)}</section>")


# ---- the diary ---------------------------------------------------------------------------------------------


def diary(run: Run, n_prompts: int = 3) -> str:
    """Markdown: per held-out prompt the base's answer, then night and day of every round."""
    def mark(text, limit=2000):
        return inert(text, "markdown", limit)
    command = " ".join(inert(run.record["command"], "terminal", 2000).split()).replace("`", "'")
    lines = [f"# Diary of {mark(run.options.get('model', '?'))}, persona {mark(run.name)}\n",
             f"\n`{command or '?'}`  \nstatus: {mark(run.record['status'] or 'unknown')}\n",
             *(f"\n{mark(note)}\n" for note in run.notes)]
    for way, texts in (("for", run.persona["pos"]), ("against", run.persona["neg"])):
        lines += [f"\n> {way}: {mark(text, 400)}\n" for text in texts[:1]]
    if not run.rows:
        return "".join(lines) + "\nThe run has not measured anything yet.\n"
    lines.append("\nNight = the steered model's answer, dropped. Day = the healed model's, not steered.\n"
                 "Greedy, on prompts that no stage has trained on.\n")
    unit = METERS[run.meter][2]
    for i, asked in enumerate(max((row["diary"] for row in run.rows), key=len)[:n_prompts]):
        lines.append(f"\n## {mark(asked['prompt'])}\n\n")
        for row in run.rows:
            told = row["diary"][i] if i < len(row["diary"]) else {"text": "", "coherence": None}
            name = row["name"].capitalize() + " (rolled back)" * row["undone"]
            own = f", this answer {told['coherence']:.2f}" if told["coherence"] is not None else ""
            lines.append(f"- **{name}**, trait {fmt(run.trait_of(row)[0], '+.2f')} {unit}, coherence "
                         f"{fmt(row['coherence'], '.3f')}, text {fmt(row['text'])}{own}:\n"
                         f"  {mark(told['text']) or '*(nothing)*'}\n")
    return "".join(lines)


# ---- writing -----------------------------------------------------------------------------------------------


def write(folder) -> Path:
    """report.html and diary.md of a run folder, into it; returns the path of report.html."""
    run = Run(Path(folder))
    write_whole(run.path / "diary.md", diary(run).encode("utf-8", "replace"))
    write_whole(run.path / "report.html", render(run).encode("utf-8", "replace"))
    return run.path / "report.html"


def main(argv=None) -> int:
    what = "write report.html and diary.md of runs; of several also compare.html, beside the first"
    parser = argparse.ArgumentParser(prog="loop.py report", description=what)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    args = parser.parse_args(argv)
    try:
        for name in args.runs:
            print(write(name))
        if len(args.runs) > 1:
            out = Path(args.runs[0]).resolve().parent
            text = compare([Run(Path(name)) for name in args.runs], out)
            write_whole(out / "compare.html", text.encode("utf-8", "replace"))
            print(out / "compare.html")
    except (ValueError, OSError) as error:
        print(f"loop.py report: {inert(error)}", file=sys.stderr)
        return 2
    return 0
