"""Report: a run folder in, report.html and diary.md out: what came out, whether to trust it, where it hurts.

    python loop.py report RUN [RUN ...]      writes both again, of an unfinished run too

report.html is one file with its style and figures inside: no script, nothing fetched. A journal may be
damaged: `clean` turns it into values of known types once, as the run is read, and what draws them trusts
them. A stage that is missing leaves a sentence where its figure would be.

Everything that a model or a user wrote is untrusted. It passes files.inert on its way to HTML and Markdown;
a content security policy in the page forbids what an escape might have missed.

Known gaps: of a run with very many rounds the figures show a selection, and say so.
"""
import argparse
import math
import shlex
import statistics
import sys
import time
from pathlib import Path

from evalmfv import FOUNDATIONS, READABLE
from tools.files import inert, write_whole
from tools.record import read
from tools.svg import MARKS, Plot, esc, swatch

RULES = {"worst_window": "a stretch of tokens that the base finds too surprising (nats per token)",
         "loop": "tokens that go round in circles (share seen shortly before)", "words": "no words",
         "pattern": "refusal, or narration of the trait"}

# ---- what is in a run --------------------------------------------------------------------------------------

# Shapes for `clean`: a type, [items], {name: shape}, or {str: shape} for names that are not known beforehand.
RUN = dict(status=str, reason=str, command=str, started=float, seconds=float, stopped=str, tau=float, git=str,
           code=str, weights=str, options={str: object}, defaults={str: object}, versions={str: object},
           machine={str: object}, items=dict(train=[str]),
           persona=dict(name=str, target=str, direction=float, pos=[str], neg=[str]))
EVENTS = dict(
    layers=dict(steer=[float], lora=[float]), limits=dict(limits={str: float}), tau=dict(tau=float),
    row=dict(kind=str, trait=float, trait_se=float, share=float, share_se=float, text=float, text_se=float,
             coherence=float, shift=dict(off_target=float, moved={str: float}),
             diary=[dict(prompt=str, text=str, coherence=float)]),
    dose=dict(coeff=float),
    made=dict(completions=[dict(prompt=float, coeff=float, text=str, verdict=dict(
        kept=bool, rule=str, value=float, limit=float, match=str))]),
    heal=dict(steps=[dict(nll=float, div=float, div_max=float, fired=float)], skipped=[float], tau=float,
              lam_eff=float, val_nll_before=float, val_nll_after=float, fired_share=float, warning=str,
              worst=dict(tokens=[str], day=[float], before=[float], night=[float])),
    gate=dict(accepted=bool, reasons=[str]))


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
        self.events, self.rows = {stage: {} for stage in EVENTS}, []            # {stage: {round: event}}
        for e in record.events:
            if e["stage"] in EVENTS:
                event = clean(e, EVENTS[e["stage"]]) | dict(round=e["round"])
                if e["stage"] == "row" and event["kind"] in MARKS:
                    self.rows.append(event)
                self.events[e["stage"]][e["round"]] = event
        self.heals, self.gates, self.made = (self.events[stage] for stage in ("heal", "gate", "made"))
        self.accepted = [n for n, gate in self.gates.items() if gate["accepted"]]
        for r in self.rows:
            is_day, name = r["kind"] == "healed", {"steered": "night", "healed": "day"}.get(r["kind"])
            r["undone"] = is_day and r["round"] in self.gates and r["round"] not in self.accepted
            r["name"] = f"{name} {r['round']}" if name else r["kind"]
        self.nights, self.days = ({r["round"]: r for r in self.rows if r["kind"] == kind}
                                  for kind in ("steered", "healed"))
        self.base, self.prompted, self.night = (next((r for r in self.rows if r["kind"] == kind), None)
                                                for kind in ("base", "prompted", "steered"))
        self.final = next((self.days[n] for n in reversed(self.accepted) if n in self.days), None)
        self.shown = self.final or next(reversed(self.days.values()), None)     # refused, or not yet judged
        ended = self.record["status"] not in ("running", "interrupted")     # going on, it keeps its seconds
        self.done = ended and self.record["seconds"] is not None

        # ---- the persona, and how its trait is measured
        target = self.persona["target"]
        self.target = target if target in FOUNDATIONS else None
        self.wanted = {1: ", wanted up", -1: ", wanted down"}.get(self.persona["direction"], "")
        file = Path(clean(self.options.get("persona"), str) or "?").stem
        self.name = self.persona["name"] or ("custom" if self.options.get("pos") else file)
        has_share = bool(self.rows) and all(r["share"] is not None for r in self.rows)
        self.meter = "share" if has_share or not self.target else "nats"
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


def rms(xs) -> float:
    return math.sqrt(statistics.fmean(x * x for x in xs))


def chosen(items, n: int) -> list:
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


def figure(panel: str, caption: str, kind: str = "") -> str:
    """A panel in a box that scrolls by itself, above what it says."""
    return (f'<figure class="{kind}"><div class="panel">{panel}</div>'
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
    if refused := [n for n in run.gates if n not in run.accepted]:
        why = said("; ".join(run.gates[refused[-1]]["reasons"]) or "no reason given")
        rounds = ", ".join(map(str, refused[-20:]))
        lines.append(f"Refused and rolled back: round {rounds}; the last because {why}.")
    if run.record["stopped"]:
        lines.append(f"Stopped early: {said(run.record['stopped'])}.")
    if run.record["seconds"] is not None:
        lines.append(f"It took {run.record['seconds'] / 60:.1f} minutes.")
    return lines


def verdict(run: Run) -> tuple[str, str, list[str]]:
    """(good, bad or open; the headline; sentences as HTML) in plain words, from the numbers alone."""
    lines, day, base = progress(run), run.final, run.base
    heal = run.heals.get(run.shown["round"]) if run.shown else None
    if heal and heal["warning"]:
        lines.append(f"Warning: {said(heal['warning'])}.")
    if run.unread:
        rest = "; the share does not need the probe." if run.meter == "share" else "."
        lines.append("The probe cannot read this model: its allowed answers have "
                     f"{fmt(base['coherence'])} of the base’s probability. Nats say nothing here{rest}")
    nights = [(*run.trait_of(r), r["name"]) for r in run.nights.values() if run.trait_of(r)[0] is not None]
    if nights and not any(has_moved(value, error) for value, error, _ in nights):
        value, error, name = max(nights, key=lambda night: abs(night[0]))
        most = fmt(value, "+.3f", error)
        lines.append(f"Steering alone did not move the trait: at most {most}, in {name}. Either the model "
                     "does not take up this persona, or the meter does not see it: read the answers.")
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


def tiles(run: Run, row: dict) -> str:
    """The numbers of a row, each beside those of base, persona prompt and first night."""
    def beside(of, spec):
        others = filter(None, (run.base, run.prompted, run.night))
        return ", ".join(f"{r['name']} {fmt(of(r), spec)}" for r in others)
    made, unit = [], dict(share=METERS["share"][1], nats=f"nats of the probe’s {run.target}" + run.wanted)
    for meter in METERS:
        value, error = trait_of(row, meter)
        if value is not None and (meter == "share" or run.target):
            made.append(("trait", fmt(value, "+.2f"), f"± {fmt(error)} {unit[meter]}; "
                         + beside(lambda r: trait_of(r, meter)[0], "+.2f")))
    made += [("text coherence", fmt(row["text"], ".3f"), f"± {fmt(row['text_se'], '.3f')} share of coherent "
              "windows; " + beside(lambda r: r["text"], ".3f")),
             ("probe coherence", fmt(row["coherence"], ".4f"), "probability of allowed answers; "
              + beside(lambda r: r["coherence"], ".4f"))]
    moves = {f: x for f, x in row["shift"]["moved"].items() if f in FOUNDATIONS and f != run.target}
    if moves and run.target and not run.unread:
        most = max(moves, key=lambda f: abs(moves[f]))
        wide = row["trait"] is not None and abs(moves[most]) >= abs(row["trait"])
        made.append(("off-target", fmt(moves[most], "+.2f"), f"nats: {most} moved most"
                     + ", as far as the trait or further: not surgical" * wide))
    state = "refused: the model is the base" if row["undone"] else "not judged yet"
    state = "accepted" if run.final else state
    boxes = "".join(f"<div><dt>{title}</dt><dd><b>{number}</b> <span>{note}</span></dd></div>"
                    for title, number, note in made)
    return f'<p class="which">{row["name"].capitalize()} ({state})</p><dl class="tiles">{boxes}</dl>'


def opening(run: Run) -> str:
    mood, head, lines = verdict(run)
    model, seed = said(run.options.get("model", "?"), 120), said(run.options.get("seed", "?"), 20)
    texts = {"Persona, for": run.persona["pos"], "against": run.persona["neg"]}
    quoted = "".join(f"<dt>{way}</dt><dd>{said(text, 400)}</dd>" for way, some in texts.items()
                     for text in some[:4])
    return (f'<header><p class="eyebrow">steer-heal-love · persona <b>{said(run.name, 80)}</b> on '
            f'<b>{model}</b> · seed {seed}</p><div class="verdict {mood}"><h1>{head}</h1>'
            + "".join(f"<p>{line}</p>" for line in lines) + "</div>"
            + "".join(f'<p class="note">{esc(note)}</p>' for note in run.notes)
            + (tiles(run, run.shown) if run.shown and run.base else "")
            + (f'<dl class="persona">{quoted}</dl>' if quoted else "") + "</header>")


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
    days = [r for r in rows if r["kind"] == "healed"]
    plot.line([(traits[r["name"]][0], r["text"]) for r in days], "healed", more="faint")
    # labels that matter most come first: they take the free places
    for r in sorted(rows, key=lambda r: (r["kind"] not in ("base", "prompted"), -(r["round"] or 0))):
        (value, error), same = traits[r["name"]], dict(steered=run.nights, healed=run.days).get(r["kind"], {})
        label = r["name"] if not same or r["round"] in (min(same), max(same)) else str(r["round"])
        text = fmt(r["text"], ".3f", r["text_se"])
        plot.mark(r["kind"], value, r["text"], f"{r['name']}: trait {fmt(value, '+.3f', error)}, text {text}",
                  label, ex=error, ey=r["text_se"], more="undone" * r["undone"])
    names = dict(base="base", prompted="persona prompt", steered="night: steered", healed="day: healed")
    keys = " ".join(f'<span class="key">{swatch(kind)}{name}</span>' for kind, name in names.items()
                    if any(r["kind"] == kind for r in rows))
    undone = ", hollow is rolled back" * any(r["undone"] for r in rows)
    caption = (f"{keys} Up and to the right is better. Each mark is a row of the table below, a number is "
               f"its round{undone}; whiskers are one standard error.")
    return figure(plot.svg(), caption) + folded("Every row in numbers", numbers(run))


def numbers(run: Run) -> str:
    """The table of all rows: what was measured, what training read, and how far every foundation moved."""
    meters = [m for m in METERS if any(trait_of(r, m)[0] is not None for r in run.rows)]
    names = [f for f in FOUNDATIONS if any(f in r["shift"]["moved"] for r in run.rows)]
    rows = []
    for r in run.rows[-800:]:
        n, end, trained = r["round"], "", ["", "", "", ""]
        if r["kind"] == "healed":
            gate, heal, made = run.gates.get(n), run.heals.get(n), run.made.get(n, {}).get("completions", [])
            end = "in progress" if gate is None else "accepted"
            if gate and not gate["accepted"]:
                end = f"rolled back: {said('; '.join(gate['reasons']))}"
            kept = f"{sum(c['verdict']['kept'] is True for c in made)}/{len(made)}"
            trained = [kept, "n/a", "n/a", "n/a"]
            if heal:
                nll = f"{fmt(heal['val_nll_before'], '.3f')} → {fmt(heal['val_nll_after'], '.3f')}"
                D = heal["steps"][-1]["div"] if heal["steps"] else None
                trained = [kept, nll, fmt(D, ".3f"), percent(heal["fired_share"])]
        dose = fmt(run.events["dose"].get(n, {}).get("coeff")) if r["kind"] == "steered" else ""
        rows.append([r["name"], dose, *(fmt(trait_of(r, m)[0], "+.3f", trait_of(r, m)[1]) for m in meters),
                     fmt(r["coherence"], ".4f"), fmt(r["text"], ".3f", r["text_se"]), *trained,
                     *(fmt(r["shift"]["moved"].get(f), "+.2f") for f in names), end])
    head = ["row", "dose", *(f"trait, {METERS[m][2]}" for m in meters), "coherence", "text", "kept",
            "held-out nll", "D, nats", "steps fired", *(f"{f}, nats" for f in names), "gate"]
    return table(head, rows, "numbers")


def answers(run: Run) -> str:
    if not run.base or not run.base["diary"]:
        return missing("No held-out prompt has been answered yet.")
    nights = [r for r in run.nights.values() if r["text"] is not None]
    worst = min(nights, key=lambda r: r["text"], default=run.night)
    shown = {r["name"]: r for r in (run.base, run.prompted, run.night, worst, run.shown) if r}.values()

    def title(row):
        name = row["name"].capitalize() + ", steered" * (row["kind"] == "steered")
        lowest = row is worst and len(nights) > 1
        return name + ", least coherent" * lowest + " (rolled back)" * row["undone"]

    def cell(row, i):
        told = row["diary"][i] if i < len(row["diary"]) else {"text": "", "coherence": None}
        share = told["coherence"]
        shade = 0 if share is None else min(max(1.25 * (1 - share), 0), 0.62)
        return (f'<td class="{row["kind"]}" data-who="{title(row)}" style="--k:{shade:.2f}">'
                f'{said(told["text"])}<small>{fmt(share)}</small></td>')

    def grid(which):
        head = "".join(f'<th scope="col" class="{r["kind"]}"><b>{title(r)}</b><small>trait '
                       f'{fmt(run.trait_of(r)[0], "+.2f")} · text {fmt(r["text"])}</small></th>'
                       for r in shown)
        body = "".join(f'<tr class="asked"><th colspan="{len(shown)}" scope="rowgroup">'
                       f'{said(run.base["diary"][i]["prompt"], 400)}</th></tr>'
                       f'<tr>{"".join(cell(r, i) for r in shown)}</tr>' for i in which)
        return (f'<div class="scroll" tabindex="0"><table class="answers"><thead><tr>{head}</tr></thead>'
                f"<tbody>{body}</tbody></table></div>")

    def left(i):                                                # of the least coherent night's answer
        share = worst["diary"][i]["coherence"] if worst and i < len(worst["diary"]) else None
        return 1 if share is None else share
    order = sorted(range(min(len(run.base["diary"]), 30)), key=left)
    what = ""
    if worst:
        what = (f" First come the prompts on which {worst['name']} breaks most." if left(order[0]) < 1 else
                f" No greedy answer of {worst['name']} broke: its text score is that of sampled ones.")
    text = ("<p>Greedy answers to prompts that no stage has trained on. Nights are steered and dropped; days "
            "are what is left without steering. The small number is the share of an answer that the base "
            f"could have written; the darker, the less.{what}</p>" + grid(order[:2]))
    more = folded(f"The other prompts ({len(order) - 2})", grid(order[2:])) if order[2:] else ""
    return text + more + "<p>diary.md has the first of these prompts in every round.</p>"


def dropped(run: Run) -> str:
    """What the filter dropped, by rule and round, and the worst answer by each rule."""
    made = [(n, c) for n, event in run.made.items() for c in event["completions"]]
    if not made:
        return missing("No answer has been sampled for training yet.")
    by_rule, rounds, train = {}, chosen(run.made, 12), run.record["items"]["train"]
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
                     *(str(c or "·") for c in counts), str(len(cases)), fmt(v["limit"]), fmt(v["value"])])
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
    facts, top = {"mean": statistics.fmean(worst["day"]), "rmse": rms(worst["day"])}, max(*worst["day"], 1e-9)
    words, over = worst["tokens"] + [""] * 256, "No barrier was used in this round."
    if tau is not None:
        names = [name for name, value in facts.items() if value > tau]
        names = "neither is" if not names else "both are" if names[1:] else f"only the {names[0]} is"
        how = said(run.options.get("kl_agg", "?"), 20)
        over = f"Of these two {names} over tau, {fmt(tau, '.3f')}. This run’s barrier went by {how}."

    def tokens(of):
        marked = "".join(f'<span style="--k:{min(max(v / top, 0), 1):.2f}" title="{fmt(v, ".3f")} nats">'
                         f"{esc(word, 60)}</span>" for word, v in zip(words, of[:256]))
        return f'<p class="tokens"><bdi>{marked}</bdi>{" …" * (len(of) > 256)}</p>'
    names = dict(night=f"Night {n}, steered", before="The student before this round", day=f"Day {n}, healed")
    texts = "".join(f"<dt>{name} <small>mean {fmt(statistics.fmean(of), '.3f')}, rmse {fmt(rms(of), '.3f')}, "
                    f"max {fmt(max(of), '.3f')} nats</small></dt><dd>{tokens(of)}</dd>"
                    for key, name in names.items() if (of := worst[key]))
    return ("<p>Of each round’s kept answers, the one that the healed model leaves furthest from the "
            f"reference; the loudest of them is day {n}’s. The redder a token, the larger its KL. "
            f"Healed, its rmse is {facts['rmse'] / (facts['mean'] or 1):.1f} times its mean. {over}</p>"
            f'<dl class="strips">{texts}</dl>')


def healing(run: Run) -> str:
    """D at every optimiser step of every round, with the barrier's tau and the steps in which it pushed."""
    heals, steps, starts = {n: e for n, e in run.heals.items() if e["steps"]}, [], []
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
            plot.write(plot.x(begin) + 3, plot.top - 6, f"r{n}", "tick")
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
    return figure(plot.svg(), caption, "wide") + "".join(f'<p class="note">{note}</p>' for note in notes)


def setting(run: Run) -> str:
    """What differs from the defaults, what was measured on the model, where it ran, and how to go on."""
    defaults, first = run.record["defaults"], {
        stage: next(iter(events.values()), clean({}, EVENTS[stage])) for stage, events in run.events.items()}
    rows = [[f"<code>--{esc(key, 60).replace('_', '-')}</code>", said(value, 300),
             esc(defaults[key], 120) or "(empty)"]
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
    lines = "".join(f"<div><dt>{name}</dt><dd><code>{said(text, 2000)}</code></dd></div>"
                    for name, text in commands.items() if text)
    return "".join(out) + f'<h3>Do it again</h3><dl class="commands">{lines}</dl>'


# ---- the page ----------------------------------------------------------------------------------------------

SECTIONS = {"trajectory": ("What the trait costs", trajectory), "answers": ("Before and after", answers),
            "dropped": ("What was dropped, and why", dropped),
            "heat": ("The worst answer, token by token", heat), "healing": ("Healing, step by step", healing),
            "setting": ("Settings and commands", setting)}


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
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    title = f"{run.name} on {run.options.get('model', '?')}: steer, heal"
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{esc(title, 120)}</title>'
            f"<style>{style}</style></head><body><main>{part(run, opening)}"
            f'<nav aria-label="Sections">{nav}</nav>{body}<footer>Written by loop.py report from run.json '
            "and events.jsonl. No script, nothing fetched.</footer></main></body></html>\n")


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
            lines.append(f"- **{name}**, trait {fmt(run.trait_of(row)[0], '+.2f')} {unit}, coherence "
                         f"{fmt(row['coherence'], '.3f')}, text {fmt(row['text'])}, this answer "
                         f"{fmt(told['coherence'])}:\n  {mark(told['text']) or '*(nothing)*'}\n")
    return "".join(lines)


# ---- writing -----------------------------------------------------------------------------------------------


def write(folder) -> Path:
    """report.html and diary.md of a run folder, into it; returns the path of report.html."""
    run = Run(Path(folder))
    write_whole(run.path / "diary.md", diary(run).encode("utf-8", "replace"))
    write_whole(run.path / "report.html", render(run).encode("utf-8", "replace"))
    return run.path / "report.html"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="loop.py report", description="Write report.html and diary.md.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    try:
        for name in parser.parse_args(argv).runs:
            print(write(name))
    except (ValueError, OSError) as error:
        print(f"loop.py report: {inert(error)}", file=sys.stderr)
        return 2
    return 0
