"""Report: a run folder in, report.html and diary.md out: what came out, whether to trust it, and where it hurts.

    python report.py runs/<time>_<slug>                 writes both again, of an unfinished run too
    python report.py RUN RUN ... [--out DIR]            the same for each; compare.html draws them over each other

Reads run.json and events.jsonl only and needs the standard library only; copy this file alone. report.html is one file
with its style and its figures inside: no script, nothing fetched. It shows what there is: a stage that is missing, a
number that is null, or an event that an older version did not write leaves a sentence where its figure would be.

Everything that a model or a user wrote is untrusted. It passes `esc` on its way to HTML and `inert` on its way to
Markdown, and a content security policy in the page forbids what an escape might have missed.

Known gaps: of a run with very many rounds the figures show a selection, and say so.
"""
import argparse
import html
import json
import math
import os
import re
import shlex
import statistics
import sys
import time
import urllib.parse
from pathlib import Path

FOUNDATIONS = ("care", "fairness", "loyalty", "authority", "sanctity", "liberty", "social")
RULES = {"worst_window": "a stretch of tokens that the base finds too surprising (nats per token)",
         "ppl_tail": "an ending that the base finds too surprising (perplexity of the last quarter)",
         "ngram": "phrases repeated (share of n-grams seen shortly before)",
         "loop": "tokens that go round in circles (share seen shortly before)",
         "words": "too few words", "unfinished": "cut off at the longest length allowed",
         "pattern": "refusal, or narration of the trait"}

# ---- reading ---------------------------------------------------------------------------------------------------------


def read(folder: Path) -> tuple[dict, list[dict], list[str]]:
    """run.json, the events in order, and notes on what is not whole. Raises ValueError if the folder is not a run."""
    try:
        run = json.loads((folder / "run.json").read_bytes().decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} is not a run folder: it has no run.json") from None
    except ValueError as error:
        raise ValueError(f"{folder}/run.json: not JSON ({error})") from None
    if not isinstance(run, dict):
        raise ValueError(f"{folder}/run.json: expected a JSON object, got {type(run).__name__}")
    path, events, notes = folder / "events.jsonl", [], []
    lines = path.read_bytes().decode("utf-8", "replace").split("\n") if path.exists() else []
    last = max((n for n, line in enumerate(lines, 1) if line.strip()), default=0)
    for number, line in enumerate(lines[:last], 1):
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or not isinstance(event.get("stage"), str):
                raise ValueError
            events.append(event)
        except ValueError:
            if number != last:
                raise ValueError(f"{path}, line {number}: not an event (one JSON object with a stage)") from None
            notes.append(f"The last line of events.jsonl (line {number}) was cut off and is left out.")
    if not events:
        notes.append("The run has no events yet.")
    return run, events, notes


def load(folder: Path) -> tuple[dict, list[dict]]:
    """run.json and the events, in order. A last line that was cut off by a crash is left out."""
    return read(folder)[:2]


# ---- text of models and users, made inert ----------------------------------------------------------------------------

# control characters, marks that reorder or hide text, tag characters, lone surrogates; joiners stay: scripts need them
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
                    "\ud800-\udfff\U000e0000-\U000e007f]")


def cut(text: str, limit: int) -> tuple[str, str]:
    """The first `limit` characters, and a note of how many were left out."""
    return (text, "") if len(text) <= limit else (text[:limit], f"… ({len(text) - limit:,} more characters)")


def esc(text, limit: int = 600) -> str:
    """Any text for HTML, as content or as an attribute's value: nothing in it is markup, and what is unseen is shown."""
    def show(match):
        code = ord(match.group())
        return {9: " ", 10: " ↵ "}.get(code) or (chr(0x2400 + code) if code < 32 else f"⟨U+{code:04X}⟩")
    text, rest = cut(re.sub(r"\n{4,}", lambda match: f" ↵×{len(match.group())} ", str(text)), limit)
    return html.escape(UNSEEN.sub(show, text), quote=True) + rest


def said(text, limit: int = 600) -> str:
    """A model's or a user's words as an HTML element of their own direction."""
    return f"<bdi>{esc(text, limit)}</bdi>" if str(text).strip() else "<em>(nothing)</em>"


def inert(text, limit: int = 2000) -> str:
    """Any text for Markdown: one line, no control or direction marks, what could mean something escaped."""
    text, rest = cut(str(text), limit)
    text = " ".join(UNSEEN.sub(" ", text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]()#+!|~:@-])", r"\\\1", text)
    return re.sub(r"(?i)\bwww\.", r"www\\.", text) + rest


# ---- what is in a run ------------------------------------------------------------------------------------------------


def num(x) -> float | None:
    """A finite number, or None: null, text and truth values are not drawn."""
    if isinstance(x, bool) or not isinstance(x, (int, float)) or not abs(x) < 1e300:            # false for nan too
        return None
    return float(x)


def seq(x) -> list:
    return x if isinstance(x, list) else []


def obj(x) -> dict:
    return x if isinstance(x, dict) else {}


def nums(xs) -> list[float]:
    return [v for x in seq(xs) if (v := num(x)) is not None]


def fmt(x, spec: str = ".2f", error=None) -> str:
    """A number in words: a true minus sign, its standard error behind it, n/a where there is none."""
    if (x := num(x)) is None:
        return "n/a"
    text = format(x, spec) if abs(x) < 1e6 else f"{x:.2g}"
    return text.replace("-", "−") + (f" ± {fmt(error, spec.lstrip('+'))}" if num(error) is not None else "")


def percent(part, whole=1.0) -> str:
    return f"{100 * part / whole:.0f}%" if num(part) is not None and num(whole) else "n/a"


def rms(xs) -> float:
    return math.sqrt(statistics.fmean(x * x for x in xs))


def chosen(items, n: int = 3) -> list:
    """First, last, and evenly spaced ones between them."""
    items = list(items)
    return items if len(items) <= n else [items[round(k * (len(items) - 1) / (n - 1))] for k in range(n)]


def moved(row: dict, base: dict) -> dict[str, tuple[float, float | None]]:
    """{foundation: (nats from base to row, standard error)}, paired over vignettes counted in both (delta method).

    The probe's p is [M][K] in the order of its nats; without it the move is that of the row's record, without error.
    """
    now, then = row["probe"], base["probe"]
    names, both = list(obj(now.get("nats"))), [set(map(num, seq(x.get("counted")))) for x in (now, then)]
    pairs = [(p, q) for i, (p, q) in enumerate(zip(seq(now.get("p")), seq(then.get("p")))) if i in both[0] & both[1]]
    if len(pairs) < 2 or any(len(nums(x)) != len(names) for pair in pairs for x in pair):
        recorded = obj(row["shift"].get("moved"))
        return {f: (x, None) for f in FOUNDATIONS if (x := num(recorded.get(f))) is not None}
    out = {}
    for k, name in enumerate(names):
        a, b = (statistics.fmean(pair[side][k] for pair in pairs) for side in (0, 1))
        if a > 0 and b > 0 and name in FOUNDATIONS:
            spread = statistics.stdev(p[k] / a - q[k] / b for p, q in pairs)
            out[name] = math.log(a / b), spread / math.sqrt(len(pairs))
    return out


class Run:
    """What a report shows of a run, by kind and round. Numbers are floats or None; texts are still to be escaped."""

    def __init__(self, folder: Path):
        self.folder, (self.record, self.events, self.notes) = folder, read(folder)
        self.options, self.defaults, self.items = (obj(self.record.get(k)) for k in ("options", "defaults", "items"))
        self.rows = [row for e in self.of("row") if (row := self.row(e))]
        self.base, self.prompted, self.night = (next((r for r in self.rows if r["kind"] == kind), None)
                                                for kind in ("base", "prompted", "steered"))     # the first night
        self.nights, self.days = ({r["round"]: r for r in self.rows if r["kind"] == kind}
                                  for kind in ("steered", "healed"))
        self.gates, self.heals, self.worst, self.vectors = map(self.last, ("gate", "heal", "worst", "vector"))
        self.doses = {n: num(e.get("coeff")) for n, e in self.last("dose").items()}
        self.rounds = sorted({n for e in self.events if (n := self.number(e)) is not None})
        ended = self.record.get("status") not in ("running", "interrupted")      # a run that goes on keeps its seconds
        self.done = ended and num(self.record.get("seconds")) is not None
        self.accepted = sorted(n for n, gate in self.gates.items() if gate.get("accepted") is True)
        self.final = next((self.days[n] for n in reversed(self.accepted) if n in self.days), None)
        self.target = self.options.get("target") if self.options.get("target") in FOUNDATIONS else "authority"
        for row in self.rows:
            row["undone"] = row["kind"] == "healed" and self.gates.get(row["round"], {}).get("accepted") is False
            row["moved"] = moved(row, self.base) if self.base else {}

    @staticmethod
    def number(event: dict) -> int | None:
        n = event.get("round")
        return n if isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 10 ** 6 else None

    def of(self, stage: str) -> list[dict]:
        return [e for e in self.events if e["stage"] == stage]

    def last(self, stage: str) -> dict[int, dict]:
        """{round: the event}; of a stage that was done again, the last."""
        return {n: e for e in self.of(stage) if (n := self.number(e)) is not None}

    def row(self, event: dict) -> dict | None:
        n, kind, probe, shift = self.number(event), event.get("kind"), obj(event.get("probe")), obj(event.get("shift"))
        name = {"base": "base", "prompted": "prompted"}.get(kind) if isinstance(kind, str) else None
        if kind in ("steered", "healed") and n is not None:
            name = f"{'night' if kind == 'steered' else 'day'} {n}"
        numbers = {k: num(event.get(k)) for k in ("trait", "trait_se", "text", "text_se", "coherence")}
        more = dict(coherence_se=num(probe.get("coherence_se")), off_target=num(shift.get("off_target")))
        diary = [obj(d) for d in seq(event.get("diary"))]
        return name and dict(kind=kind, round=n, name=name, probe=probe, shift=shift, diary=diary, **numbers, **more)


# ---- figures: one small panel of SVG ---------------------------------------------------------------------------------

MARKS = {"base": "M0,-8 2.1,-2.6 7.6,-2.5 3.2,1 4.7,6.5 0,3.3 -4.7,6.5 -3.2,1 -7.6,-2.5 -2.1,-2.6Z",    # star
         "prompted": "M0,-6 5.5,4 -5.5,4Z", "steered": "M0,-6 6,0 0,6 -6,0Z",                           # triangle, diamond
         "healed": "M-5,0A5,5 0 1 1 5,0A5,5 0 1 1 -5,0Z", "dot": "M-3,0A3,3 0 1 1 3,0A3,3 0 1 1 -3,0Z"}


class Scale:
    """Values to screen positions along one axis, and its ticks. Values that are None are drawn nowhere."""

    def __init__(self, values, start: float, end: float, log: bool = False, room: float = 0.07):
        known = [v for v in values if v is not None and (v > 0 or not log)]
        if not known:
            raise ValueError("no values")
        self.f = math.log10 if log else float
        low, high = self.f(min(known)), self.f(max(known))
        if high - low < 1e-9 * max(1, abs(high)):
            room_around = 0.3 if log else 0.5 * abs(low) or 0.5
            low, high = low - room_around, high + room_around
        self.low, self.high = low - room * (high - low), high + room * (high - low)
        self.start, self.end, self.log = start, end, log

    def __call__(self, v: float) -> float:
        at = self.start + (self.f(v) - self.low) / (self.high - self.low) * (self.end - self.start)
        return round(at, 1)

    def ticks(self, n: int = 5) -> list[float]:
        if self.log:
            for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
                span = range(math.floor(self.low) - 1, math.ceil(self.high) + 1)
                found = [d * 10.0 ** k for k in span for d in digits if self.low <= math.log10(d) + k <= self.high]
                if len(found) >= 3:
                    break
            return found[::math.ceil(len(found) / 7) or 1]
        raw = (self.high - self.low) / n
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(d * power for d in (1, 2, 2.5, 5, 10) if d * power >= raw * 0.999)
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


class Plot:
    """One panel: axes with units, marks, whiskers, lines; labels stand beside what they name where there is room."""

    def __init__(self, alt: str, xs, ys, x_label: str, y_label: str, *, log_x=False, log_y=False, flip=False,
                 whole_x=False, w=440, h=310, left=62, right=14, top=12, room=0.07):
        self.alt, self.w, self.h = alt, w, h
        self.left, self.right, self.top, self.bottom = left, w - right, top, h - 46
        self.x = Scale(xs, self.left, self.right, log_x, room)
        self.y = Scale(ys, self.top if flip else self.bottom, self.bottom if flip else self.top, log_y)
        self.back, self.front, self.labels, self.levels, self.taken = [], [], [], [], []
        for t in sorted({round(t) for t in self.x.ticks()}) if whole_x else self.x.ticks():
            if self.left <= self.x(t) <= self.right:
                self.back.append(f'<path class="grid" d="M{self.x(t)},{self.top}V{self.bottom}"/>')
                self.write(self.x(t), self.bottom + 16, tick(t), "tick", "middle")
        for t in self.y.ticks() if y_label else ():
            self.back.append(f'<path class="grid" d="M{self.left},{self.y(t)}H{self.right}"/>')
            self.write(self.left - 6, self.y(t) + 4, tick(t), "tick", "end")
        self.write((self.left + self.right) / 2, h - 8, x_label, "axis", "middle")
        self.back.append(f'<text class="axis" transform="translate(13,{(self.top + self.bottom) / 2}) rotate(-90)" '
                         f'text-anchor="middle">{esc(y_label)}</text>')

    def write(self, x: float, y: float, text: str, kind: str, anchor: str = "start") -> None:
        self.back.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{esc(text)}</text>')

    def shows(self, x, y) -> bool:
        return x is not None and y is not None and (x > 0 or not self.x.log) and (y > 0 or not self.y.log)

    def mark(self, kind: str, x, y, says: str, label: str = "", *, ex=None, ey=None, more: str = "") -> None:
        """A mark with its whiskers of one standard error; `says` is read out and shown by a pointer that rests on it."""
        if not self.shows(x, y):
            return
        px, py = self.x(x), self.y(y)
        for axis, v, e in ((self.x, x, ex), (self.y, y, ey)):
            if e and e > 0:
                low, high = (v - e if v > e or not axis.log else 10 ** axis.low), v + e
                a, b = (min(max(axis(u), min(axis.start, axis.end)), max(axis.start, axis.end)) for u in (low, high))
                d = f"M{a},{py}H{b}" if axis is self.x else f"M{px},{a}V{b}"
                self.front.append(f'<path class="whisker {kind} {more}" d="{d}"/>')
        self.front.append(f'<path class="mark {kind} {more}" transform="translate({px},{py})" '
                          f'd="{MARKS.get(kind, MARKS["dot"])}"><title>{esc(says)}</title></path>')
        self.taken.append((px - 6, py - 6, px + 6, py + 6))
        if label:
            self.labels.append((px, py, label, kind))

    def line(self, points, kind: str, label: str = "", more: str = "") -> None:
        """A line through the points that are known; its label stands at the last of them."""
        at = [(self.x(x), self.y(y)) for x, y in points if self.shows(x, y)]
        if len(at) > 1:
            d = " ".join(f"{x:g},{y:g}" for x, y in at)
            self.back.append(f'<path class="line {kind} {more}" d="M{d}"/>')
        if at and label:
            self.labels.append((*at[-1], label, kind))

    def level(self, y, label: str, kind: str = "rule") -> None:
        """A horizontal line whose name stands at its right end if there is a margin, else under its left end."""
        if y is not None and (y > 0 or not self.y.log):
            self.back.append(f'<path class="level {kind}" d="M{self.left},{self.y(y)}H{self.right}"/>')
            self.levels.append((self.y(y), label, kind))

    def svg(self) -> str:
        """The panel. Names of levels are pushed apart; a label that finds no free place beside its mark is left out."""
        beside, floor = self.w - self.right > 40, math.inf
        for at, label, kind in sorted(self.levels, reverse=True):                               # from the lowest up
            floor = min(at + 4 if beside else at + 14, floor - 13)
            x = self.right + 6 if beside else self.left + 4
            self.front.append(f'<text class="name {kind}" x="{x}" y="{floor:.1f}">{esc(label)}</text>')
            self.taken.append((x, floor - 10, x + 7.4 * len(label), floor + 2))
        for px, py, label, kind in self.labels:
            width = 7.4 * len(label)
            for dx, dy, anchor in ((9, 4, "start"), (-9, 4, "end"), (0, -10, "middle"), (0, 19, "middle"),
                                   (8, -8, "start"), (8, 15, "start"), (-8, -8, "end"), (-8, 15, "end")):
                x0 = px + dx - width * ("start", "middle", "end").index(anchor) / 2
                box = (x0, py + dy - 10, x0 + width, py + dy + 2)
                inside = self.left < box[0] and box[2] < self.w and self.top - 8 < box[1] and box[3] < self.bottom + 2
                if inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3]
                                      for t in self.taken):
                    self.taken.append(box)
                    self.front.append(f'<text class="name {kind}" x="{px + dx:.1f}" y="{py + dy:.1f}" '
                                      f'text-anchor="{anchor}">{esc(label)}</text>')
                    break
        return drawing(self.w, self.h, self.alt, "".join(self.back + self.front))


def tick(v: float) -> str:
    return f"{v:.4g}".replace("-", "−").replace("e+0", "e").replace("e−0", "e−")


def drawing(w: float, h: float, alt: str, marks: str) -> str:
    alt = esc(alt, 2000)
    return f'<svg viewBox="0 0 {w:g} {h:g}" role="img" aria-label="{alt}"><title>{alt}</title>{marks}</svg>'


def figure(panels, caption: str, kind: str = "") -> str:
    """Panels side by side where there is room, each in a box that scrolls by itself, above what they say."""
    return (f'<figure class="{kind}"><div class="panels">' + "".join(f'<div class="panel">{p}</div>' for p in panels)
            + f"</div><figcaption>{caption}</figcaption></figure>")


def missing(what: str) -> str:
    return f'<p class="missing">{what}</p>'


def table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    """Cells are HTML already. The first column names its row; the table scrolls in its own box."""
    top = "".join(f'<th scope="col">{h}</th>' for h in head)
    body = "".join(f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
                   for first, *rest in rows)
    return (f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def key_line(*kinds) -> str:
    names = {"base": "base", "prompted": "persona prompt", "steered": "night: steered", "healed": "day: healed"}
    return " ".join(f'<span class="key">{swatch(kind)}{names[kind]}</span>' for kind in kinds)


def swatch(kind: str, more: str = "") -> str:
    return f'<svg viewBox="-9 -9 18 18" aria-hidden="true"><path class="mark {kind} {more}" d="{MARKS[kind]}"/></svg>'


# ---- the report, section by section ----------------------------------------------------------------------------------


def verdict(run: Run) -> tuple[str, str, list[str]]:
    """(good, bad or open; the headline; sentences as HTML) in plain words, from the numbers alone."""
    final, base, night, lines = run.final, run.base, run.night, []
    if not run.done:
        lines.append(f"<strong>This run is not finished</strong> (status: {said(run.record.get('status', 'unknown'), 60)}). "
                     "Below is what it had measured when this page was written.")
    if run.gates:
        no = sorted(set(run.gates) - set(run.accepted))
        why = "; ".join(map(str, seq(run.gates[no[-1]].get("reasons")))) if no else ""
        lines.append(f"{len(run.accepted)} of {len(run.gates)} rounds accepted."
                     + " The gate was off: every finite round counts as accepted." * (run.options.get("gate") is False)
                     + f" Rolled back: {', '.join(map(str, no[-20:]))}; the last because: {said(why or 'n/a')}." * bool(no))
    else:
        lines.append("The run ended before its first round did." if run.done else "No round has ended yet.")
    if run.record.get("stopped"):
        lines.append(f"Stopped early: {said(run.record['stopped'])}.")
    if not final or not base:
        rejected = "No round was accepted" + (": the model is the base" if run.done else " yet")
        head = rejected if run.gates else "Nothing is healed yet"
        return "bad" if run.done else "open", head, lines

    name, floor = final["name"].capitalize(), num(run.options.get("coh_floor")) or 0.95
    share = percent(final["trait"], night["trait"]) if night and (night["trait"] or 0) > 0 else ""
    keep = percent(final["text"], base["text"])
    broken = [k for k in ("text", "coherence") if None in (final[k], base[k]) or final[k] < floor * base[k]]
    little = max(2 * (final["trait_se"] or 0), 0.1 * (night["trait"] or 0) if night else 0)
    if broken:
        probe = f"a probe coherence of {fmt(final['coherence'], '.3f')}"
        left = f"{keep} of the base’s text coherence" if "text" in broken else probe
        mood, head = "bad", f"{name} falls under the coherence floor: {left} is left"
    elif final["trait"] is None or final["trait"] <= little:
        mood, head = "open", f"{name} is coherent, but has hardly any trait" + f": {share} of the steering’s" * bool(share)
    else:
        kept = f"{share} of the steering’s" if share else "a"
        mood = "good" if run.done else "open"
        head = f"{name} keeps {kept} trait at {keep} of the base’s text coherence"

    def trait(row):
        return fmt(row["trait"], "+.2f", row["trait_se"])

    def text(row):
        return fmt(row["text"], ".3f", row["text_se"])
    wanted = {1: ", wanted up", -1: ", wanted down"}.get(num(run.options.get("direction")), "")
    lines.append(f"Trait (the probe’s {run.target}{wanted}): {trait(final)} nats without any hook; "
                 + (f"steering reached {trait(night)} in {night['name']}" if night else "steering alone was not measured")
                 + (f"; the persona prompt alone gives {trait(run.prompted)}." if run.prompted else "."))
    lines.append(f"Coherence: sampled text {text(final)} against the base’s {text(base)}"
                 + (f" and {text(night)} in {night['name']}" if night else "") + "; probability on the probe’s allowed answers "
                 f"{fmt(final['coherence'], '.4f')} against {fmt(base['coherence'], '.4f')}.")
    others = {f: move for f, (move, _) in final["moved"].items() if f != run.target}
    if others and final["trait"]:
        most = max(others, key=lambda f: abs(others[f]))
        part = percent(abs(others[most]), abs(final["trait"]))
        lines.append(f"Off target: {most} moved most, by {fmt(others[most], '+.2f')} nats, {part} of the trait"
                     + (": not surgical." if abs(others[most]) >= abs(final["trait"]) else "."))
    heal = run.heals.get(final["round"], {})
    if num(heal.get("lam_eff")):
        how = said(run.options.get("kl_agg", "?"), 20)
        lines.append(f"The barrier (D = {how} of KL, tau = {fmt(heal.get('tau'), '.3f')} nats) pushed in "
                     f"{percent(heal.get('fired_share'))} of this round’s steps.")
    elif heal:
        lines.append("No barrier was used (nll).")
    if heal.get("warning"):
        lines.append(f"Warning: {said(heal['warning'])}.")
    if run.done:
        lines.append(f"It took {duration(num(run.record['seconds']))}.")
    return mood, head, lines


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def opening(run: Run) -> str:
    mood, head, lines = verdict(run)
    persona = f"persona <b>{said(run.options.get('persona', '?'), 80)}</b>"
    persona = "a custom persona" if run.options.get("pos") else persona
    out = [f'<p class="eyebrow">steer-heal-love · {persona} on <b>{said(run.options.get("model", "?"), 120)}</b> · '
           f'seed {said(run.options.get("seed", "?"), 20)}</p>', f'<div class="verdict {mood}"><h1>{head}</h1>',
           *(f"<p>{line}</p>" for line in lines), "</div>", *(f'<p class="note">{esc(note)}</p>' for note in run.notes)]
    if run.final and run.base:
        def beside(key, spec):
            return ", ".join(f"{r['name']} {fmt(r[key], spec)}" for r in (run.base, run.night) if r)
        tiles = [("trait kept", "trait", "+.2f", f"nats ± {fmt(run.final['trait_se'])}; {beside('trait', '+.2f')}"),
                 ("text coherence", "text", ".3f", f"share of coherent windows; {beside('text', '.3f')}"),
                 ("probe coherence", "coherence", ".4f", f"probability of allowed answers; {beside('coherence', '.4f')}"),
                 ("off-target", "off_target", ".2f", "nats, largest move of another foundation")]
        out += ['<dl class="tiles">', *(f"<div><dt>{title}</dt><dd><b>{fmt(run.final[key], spec)}</b> <span>{note}</span></dd>"
                                        "</div>" for title, key, spec, note in tiles), "</dl>"]
    return f"<header>{''.join(out)}</header>"


def answers(run: Run) -> str:
    if not run.base or not run.base["diary"]:
        return missing("No held-out prompt has been answered yet.")
    days = chosen(run.days)
    shown = [r for r in (run.base, run.prompted, run.night) if r] + [run.days[n] for n in days]
    own = all(num(told.get("coherence")) is not None for r in shown for told in r["diary"])

    def title(row):
        name = f"steered “dream”, {row['name']}" if row["kind"] == "steered" else row["name"]
        return name.capitalize() + (" (rolled back)" if row["undone"] else "")

    def cell(row, i):
        told = row["diary"][i] if i < len(row["diary"]) else {}
        share = num(told.get("coherence")) if own else row["text"]
        shade = 0 if share is None else min(max(1.25 * (1 - share), 0), 0.62)
        number = f"<small>{share:.2f}</small>" if own and share is not None else ""
        return (f'<td class="{row["kind"]}" data-who="{title(row)}" style="--k:{shade:.2f}">'
                f'{said(told.get("text", ""))}{number}</td>')

    def grid(rows, start, end):
        head = "".join(f'<th scope="col" class="{r["kind"]}"><b>{title(r)}</b><small>trait {fmt(r["trait"], "+.2f")} · '
                       f'text {fmt(r["text"])}</small></th>' for r in rows)
        body = "".join(f'<tr class="asked"><th colspan="{len(rows)}" scope="rowgroup">'
                       f'{said(asked.get("prompt", ""), 400)}</th></tr><tr>{"".join(cell(r, i) for r in rows)}</tr>'
                       for i, asked in list(enumerate(run.base["diary"]))[start:end])
        return (f'<div class="scroll" tabindex="0"><table class="answers"><thead><tr>{head}</tr></thead>'
                f"<tbody>{body}</tbody></table></div>")
    many = f" A selection: {len(run.days)} days were measured." if len(run.days) > len(days) else ""
    what = "the small number is the answer’s own" if own else "this run has none per answer, so a column has one shade"
    text = ("<p>Greedy answers to prompts that no stage has trained on. The shade is lost coherence: clear where the base could "
            f"have written the answer, the darker the less it could; {what}. Dreams are dropped, days are what is left "
            f"without steering.{many}</p>" + grid(shown, 0, 6))
    more, rest = len(run.base["diary"]) - 6, [r for r in (*run.nights.values(), *run.days.values()) if r not in shown]
    if more > 0:
        text += f"<details><summary>More prompts ({more})</summary>{grid(shown, 6, 30)}</details>"
    if rest:
        rest = sorted(chosen(rest, 20), key=lambda r: (r["round"], r["kind"] == "healed"))
        text += f"<details><summary>Other nights and days ({len(rest)})</summary>{grid(rest, 0, 3)}</details>"
    return text


def gap(row: dict, key: str) -> float | None:
    return None if row[key] is None else max(1 - row[key], 0.0)


def nickname(run: Run, row: dict) -> str:
    """How a mark is labelled: words for the first and the last of its kind, for the others their round's number."""
    same = {"steered": run.nights, "healed": run.days}.get(row["kind"], {})
    return row["name"] if not same or row["round"] in (min(same), max(same)) else str(row["round"])


def in_order(rows: list[dict]) -> list[dict]:
    """Marks whose labels matter most come first: they take the free places."""
    return sorted(rows, key=lambda r: (r["kind"] not in ("base", "prompted"), -(r["round"] or 0)))


def spread(values) -> list[float]:
    """Both ends of each (value, error or None)."""
    return [v + sign * (e or 0) for v, e in values if v is not None for sign in (-1, 1)]


def trajectory(run: Run) -> str:
    panels, at_edge = [], False
    for key, what in (("text", "1 − text coherence"), ("coherence", "1 − coherence on the probe")):
        rows = [r for r in run.rows if r["trait"] is not None and r[key] is not None]
        if not rows:
            continue
        floor = min([gap(r, key) for r in rows if gap(r, key) > 1e-9], default=0.002) / 2
        lost = {r["name"]: max(gap(r, key), floor) for r in rows}
        at_edge |= any(gap(r, key) <= 1e-9 for r in rows)
        alt = f"Trait in nats against {what}: " + "; ".join(
            f"{r['name']} {fmt(r['trait'], '+.2f')}, {fmt(gap(r, key), '.3f')}" for r in rows)
        ys = [*lost.values(), *(lost[r["name"]] + (r[key + "_se"] or 0) for r in rows)]
        plot = Plot(alt, spread((r["trait"], r["trait_se"]) for r in rows), ys, "trait (nats from the base)", f"{what} (log)",
                    log_y=True, flip=True, h=340)
        plot.write(plot.right - 4, plot.top + 14, "more trait, more coherent ↗", "corner", "end")
        for r in in_order(rows):
            says = f"{r['name']}: trait {fmt(r['trait'], '+.3f', r['trait_se'])} nats, "
            says += f"{what} {fmt(gap(r, key), '.4f', r[key + '_se'])}"
            plot.mark(r["kind"], r["trait"], lost[r["name"]], says, nickname(run, r), ex=r["trait_se"], ey=r[key + "_se"],
                      more="undone" if r["undone"] else "")
        panels.append(plot.svg())
    if not panels:
        return missing("Neither the base nor any round has been measured yet.")
    caption = (key_line("base", "prompted", "steered", "healed") + " Each mark is a row of the table below; a number is its "
               "round, whiskers are one standard error" + (", hollow is rolled back." if any(r["undone"] for r in run.rows) else ".")
               + (" Nothing lost at all is drawn at the top edge: a logarithm has no zero." if at_edge else ""))
    return figure(panels, caption) + f"<details><summary>Every round in numbers</summary>{numbers(run)}</details>"


def numbers(run: Run) -> str:
    def cells(r):
        return [fmt(r["trait"], "+.3f", r["trait_se"]), fmt(r["off_target"], ".3f"), fmt(r["coherence"], ".4f"),
                fmt(r["text"], ".3f", r["text_se"])]
    rows = [[r["name"], "", "", *cells(r), "", "", ""] for r in (run.base, run.prompted) if r]
    made = {}
    for e in run.of("completion"):
        made.setdefault(run.number(e), []).append(bool(obj(e.get("verdict")).get("kept")))
    for n in run.rounds[-400:]:
        gate, heal, kept = run.gates.get(n), run.heals.get(n, {}), made.get(n, [])
        if n in run.nights:
            rows.append([run.nights[n]["name"], fmt(run.doses.get(n)), "", *cells(run.nights[n]), "", "", ""])
        reasons = "; ".join(map(str, seq(obj(gate).get("reasons"))))
        end = "in progress" if gate is None else "accepted" if n in run.accepted else f"rolled back: {said(reasons)}"
        day = cells(run.days[n]) if n in run.days else ["n/a"] * 4
        D = next((obj(s).get("div") for s in reversed(seq(heal.get("steps")))), None)
        rows.append([f"day {n}", fmt(run.doses.get(n)), f"{sum(kept)}/{len(kept)}", *day, fmt(D, ".3f"),
                     percent(heal.get("fired_share")), end])
    head = ["row", "dose", "kept", "trait, nats", "off-target", "coherence", "text", "D, nats", "steps fired", "gate"]
    return table(head, rows, "numbers")


def moves(run: Run) -> str:
    """The map of target and counterpart, and every foundation, side by side: both are nats from the base."""
    rows, target = [r for r in run.rows if r["moved"]], run.target
    other = "care" if target != "care" else "authority"
    both = [r for r in rows if target in r["moved"] and other in r["moved"]]
    if len(both) < 2:
        return missing("No row beside the base has been measured yet.")
    xs, ys = (spread(r["moved"][f] for r in both) + [0.0] for f in (other, target))
    reach = max(max(xs) - min(xs), max(ys) - min(ys)) or 1.0
    xs, ys = ([min(v), min(v) + reach] if max(v) > -min(v) else [max(v) - reach, max(v)] for v in (xs, ys))     # same units
    alt = f"Nats of {target} against nats of {other}, from the base: " + "; ".join(
        f"{r['name']} {fmt(r['moved'][target][0], '+.2f')}, {fmt(r['moved'][other][0], '+.2f')}" for r in both)
    plot = Plot(alt, xs, ys, f"{other} (nats from the base)", f"{target} (nats from the base)", h=400)
    for way in (1, -1):
        walk = [(t / 100 * reach, way * t / 100 * reach) for t in range(-150, 151)]
        seen = [(x, y) for x, y in walk if plot.x.low <= x <= plot.x.high and plot.y.low <= y <= plot.y.high]
        plot.line(seen[:1] + seen[-1:], "rule")
    up = num(run.options.get("direction"))
    if up:
        arrow, y = ("↑", plot.top + 14) if up > 0 else ("↓", plot.bottom - 8)
        plot.write(plot.left + 6, y, f"{arrow} wanted", "corner")
    for r in in_order(both):
        (x, ex), (y, ey) = r["moved"][other], r["moved"][target]
        plot.mark(r["kind"], x, y, f"{r['name']}: {other} {fmt(x, '+.3f', ex)}, {target} {fmt(y, '+.3f', ey)} nats",
                  nickname(run, r), ex=ex, ey=ey, more="undone" if r["undone"] else "")

    last = run.final or next(reversed(run.days.values()), None)
    some = [r for r in (run.prompted, run.night, last) if r and r["moved"]]
    names = [f for f in FOUNDATIONS if any(f in r["moved"] for r in some)]
    alt = "Nats that each foundation moved from the base: " + "; ".join(
        f"{r['name']}: " + ", ".join(f"{f} {fmt(move, '+.2f', e)}" for f, (move, e) in r["moved"].items()) for r in some)
    each = Plot(alt, spread(m for r in some for m in r["moved"].values()) + [0.0], [0, len(names)], "nats from the base", "",
                h=400, left=82)
    each.line([(0, 0), (0, len(names))], "rule")
    for i, f in enumerate(names):
        y = len(names) - i - 0.5
        each.write(each.left - 8, each.y(y) + 4, f, "tick target" if f == target else "tick", "end")
        each.back.append(f'<path class="grid" d="M{each.left},{each.y(y - .5)}H{each.right}"/>')
        for j, r in enumerate(some):
            move, e = r["moved"].get(f, (None, None))
            each.mark(r["kind"], move, y + 0.26 * (1 - j), f"{r['name']}: {f} {fmt(move, '+.3f', e)} nats", ex=e)
    cells = [[r["name"], *(fmt(x, "+.2f", e) for f in FOUNDATIONS for x, e in [r["moved"].get(f, (None, None))])]
             for r in chosen(rows, 200)]
    caption = ("Left: on the dashed lines both move alike; the closer to the target’s own axis, the more surgical. Right: every "
               f"foundation; {key_line(*(r['kind'] for r in some))} ({', '.join(r['name'] for r in some)}). Whiskers are one "
               "standard error, paired over vignettes.")
    return (figure([plot.svg(), each.svg()], caption) + "<details><summary>Every foundation in numbers</summary>"
            + table(["row", *FOUNDATIONS], cells, "numbers") + "</details>")


def dose(run: Run) -> str:
    tried = {}                                                  # (round, dose) -> (survival, perplexity)
    for n, e in run.last("dose").items():
        for trial in seq(e.get("trials")):
            if len(nums(trial)) == 2:
                tried[n, float(trial[0])] = float(trial[1]), None
    for e in run.of("probe"):
        tried[run.number(e), num(e.get("coeff"))] = num(e.get("survive")), num(e.get("ppl"))
    tried = {(n, c): v for (n, c), v in tried.items() if n is not None and (c or 0) > 0}
    settled = {n: c for n, c in run.doses.items() if (c or 0) > 0}
    doses, rounds = [c for _, c in tried] + list(settled.values()), sorted({n for n, _ in tried})
    if not doses:
        return missing("No dose has been tried yet.")
    panels, asked, look = [], num(run.options.get("min_survive")), dict(log_x=True, w=360, h=290)
    units = {"survival": "survival (share of answers)", "perplexity": "perplexity of tails (log)"}
    for i, (what, unit) in enumerate(units.items()):
        if all(v[i] is None for v in tried.values()):
            panels.append(missing(f"This run has no {what} for the doses it tried."))
            continue
        alt = f"{what} by dose: " + "; ".join(f"round {n} dose {c:.3g} {fmt(v[i])}" for (n, c), v in tried.items())
        plot = Plot(alt, doses, [v[i] for v in tried.values()] + ([0, 1.0, asked] if i == 0 else []),
                    "dose (multiples of v, log)", unit, log_y=i == 1, **look)
        if i == 0:
            plot.level(asked, f"asked for: {percent(asked)}")
        for n in chosen(rounds, 12):
            plot.line(sorted((c, v[i]) for (m, c), v in tried.items() if m == n and v[i] is not None), "search",
                      more="faint" if n != rounds[-1] else "")
        for (n, c), v in tried.items():
            here = settled.get(n) == c
            says = f"round {n}, dose {c:.3f}: {what} {fmt(v[i])}"
            if here:
                plot.mark("steered", c, v[i], says + ", settled", str(n))
            else:
                plot.mark("dot", c, v[i], says, more="search")
        panels.append(plot.svg())
    rows = [r for r in (*run.nights.values(), *run.days.values()) if r["trait"] is not None and r["round"] in settled]
    if rows:
        alt = "Trait by settled dose: " + "; ".join(
            f"{r['name']} {settled[r['round']]:.3g} {fmt(r['trait'], '+.2f')}" for r in rows)
        plot = Plot(alt, doses, spread((r["trait"], r["trait_se"]) for r in rows) + [0.0], "dose (multiples of v, log)",
                    "trait (nats)", **look)
        for r in rows:
            says = f"{r['name']}, dose {settled[r['round']]:.3f}: trait {fmt(r['trait'], '+.3f', r['trait_se'])}"
            plot.mark(r["kind"], settled[r["round"]], r["trait"], says, str(r["round"]), ey=r["trait_se"],
                      more="undone" if r["undone"] else "")
        panels.append(plot.svg())
    return figure(panels, "Survival and perplexity of every dose that a search tried; diamonds are the doses that rounds settled "
                  "on, numbers the rounds. The trait is known at settled doses only (a probe each): steered (diamond) and after "
                  "healing (circle).", "three")


def heat(run: Run) -> str:
    found = {}
    for n, e in run.worst.items():
        strips = {k: [max(v, 0.0) for v in nums(e.get(k))] for k in ("night", "before", "day")}
        if strips["day"]:
            found[n] = strips | dict(tokens=[str(t) for t in seq(e.get("tokens"))] + [""] * len(strips["day"]))
    if not found:
        return missing("This run has no KL per token: no round has healed yet, or an older version wrote it.")
    tau = {n: num(e.get("tau")) for n, e in run.heals.items() if num(e.get("lam_eff"))}
    top = max(max(f["day"]) for f in found.values()) or 1.0

    def facts(kl):
        return {"mean": statistics.fmean(kl), "rmse": rms(kl), "max": max(kl)}

    def told(kl, between=" "):
        return between.join(f"{name} {fmt(value, '.3f')}" for name, value in facts(kl).items())

    # ---- every round as one strip
    shown, w, left, ends = chosen(found, 24), 900, 228, (102, 154, 206)         # ends: of the three columns of numbers
    columns = min(max(len(found[n]["day"]) for n in shown), 128)
    cell, out = (w - left - 14) / columns, [f'<text class="axis" x="{left}" y="12">token of the answer →</text>']
    out += [f'<text class="tick" x="{x}" y="12" text-anchor="end">{name}</text>'
            for x, name in zip(ends, ("mean", "rmse", "max"))]
    for row, n in enumerate(shown):
        kl, y = found[n]["day"], 20 + 20 * row
        per = max(len(kl) / columns, 1)                         # tokens in a cell, which shows the loudest of them
        out.append(f'<text class="tick" x="4" y="{y + 13}">day {n}</text>')
        for x, value in zip(ends, facts(kl).values()):
            over = "over" if tau.get(n) and value > tau[n] else ""
            out.append(f'<text class="number {over}" x="{x}" y="{y + 13}" text-anchor="end">{fmt(value, ".3f")}</text>')
        for i in range(math.ceil(len(kl) / per)):
            value = max(kl[int(i * per):max(int((i + 1) * per), int(i * per) + 1)])
            out.append(f'<rect x="{left + i * cell:.1f}" y="{y}" width="{max(cell - 1, .8):.1f}" height="17" class="heat" '
                       f'style="--k:{max(value / top, .04):.2f}"/>')
    alt = "KL per token of each round’s worst kept answer, in nats: " + "; ".join(
        f"day {n} {told(found[n]['day'])}" for n in shown)
    strip = drawing(w, 28 + 20 * len(shown), alt, "".join(out))

    # ---- the loudest of them, token by token
    worst = max(found, key=lambda n: rms(found[n]["day"]))
    f, kl, limit = found[worst], found[worst]["day"], tau.get(worst)
    mean, rmse, _ = facts(kl).values()
    plot = Plot(f"KL of each token of the worst answer of day {worst}", [0, len(kl)], [0.0, *kl, limit], "token of the answer",
                "KL(day ‖ reference), nats", w=900, h=250, right=100, room=0.01, whole_x=True)
    for i, value in enumerate(kl[:600]):
        d = f"M{plot.x(i + 0.1)},{plot.y(0)}V{plot.y(value)}H{plot.x(i + 0.9)}V{plot.y(0)}Z"
        says = f"{esc(f['tokens'][i], 40)} {fmt(value, '.3f')} nats"
        plot.back.append(f'<path class="bar" d="{d}"><title>{says}</title></path>')
    for value, kind in ((mean, "mean"), (rmse, "rmse"), (limit, "tau")):
        plot.level(value, f"{kind} {fmt(value, '.3f')}", kind)
    if not limit:
        sees = "No barrier was used in this round."
    elif mean <= limit < rmse:
        sees = "Here the mean is under tau and would let the answer pass; the rmse is over it and pushes back."
    elif limit < mean:
        sees = "Here both are over tau."
    else:
        sees = "Here even the rmse is under tau: nothing in it was worth a push."

    def tokens(kind):
        words = "".join(f'<span style="--k:{min(v / top, 1):.2f}" title="{fmt(v, ".3f")} nats">{esc(t, 60)}</span>'
                        for t, v in zip(f["tokens"][:256], f[kind]))
        rest = f" … ({len(f[kind]) - 256} more tokens)" if len(f[kind]) > 256 else ""
        return f'<p class="tokens"><bdi>{words}</bdi>{rest}</p>'
    names = {"night": f"Night {worst}, steered", "before": "The student before this round", "day": f"Day {worst}, healed"}
    texts = "".join(f"<dt>{names[k]} <small>{told(f[k], ', ')} nats</small></dt><dd>{tokens(k)}</dd>" for k in names if f[k])
    scale = f"KL(day ‖ reference) at each token, from clear at 0 to full colour at {fmt(top)} nats."
    scale += " Bold: over the barrier’s tau." * bool(tau) + " A selection of the rounds." * (len(shown) < len(found))
    ratio = f"The loudest of these answers, day {worst}: its rmse is {rmse / (mean or 1):.1f} times its mean."
    return ("<p>Of a round’s kept answers, the one that the healed model leaves furthest from the reference. A mean spreads a few "
            "loud tokens over the whole answer; a root mean square hears them.</p>" + figure([strip], scale, "wide")
            + figure([plot.svg()], f"{ratio} {sees}", "wide") + f'<dl class="strips">{texts}</dl>')


def healing(run: Run) -> str:
    steps, spans = [], {}                                       # every step of every round; {round: (first, end)}
    for n, e in sorted(run.heals.items()):
        some = [{k: num(s.get(k)) for k in ("nll", "div", "div_max", "fired")} for s in map(obj, seq(e.get("steps")))]
        if some:
            spans[n] = len(steps), len(steps) + len(some)
            steps += [s | {"round": n} for s in some]
    if not steps:
        return missing("No round has trained yet.")
    per = math.ceil(len(steps) / 1200)                          # steps that share a point
    taus = {n: num(run.heals[n].get("tau")) for n in spans if num(run.heals[n].get("lam_eff"))}

    def thin(key, pick):
        groups = [(j, [s[key] for s in steps[j:j + per] if s[key] is not None]) for j in range(0, len(steps), per)]
        return [(j, pick(group)) for j, group in groups if group]
    val = {n: [num(run.heals[n].get(k)) for k in ("val_nll_before", "val_nll_after")] for n in spans}
    curves = {"nll": [(thin("nll", statistics.fmean), "healed")],
              "D": [(thin("div_max", max), "peak"), (thin("div", statistics.fmean), "healed")]}
    panels = []
    for name, lines in curves.items():
        is_D = name == "D"
        values = [y for points, _ in lines for _, y in points]
        if not values:
            continue
        values += [*taus.values(), 0.0] if is_D else [v for pair in val.values() for v in pair]
        plot = Plot(f"{name} at each of {len(steps)} optimiser steps of {len(spans)} rounds", [0, len(steps)], values,
                    "optimiser step, all rounds", "D (nats)" if is_D else "nll (nats per token)", w=900, h=236, right=80, top=24,
                    room=0.005, whole_x=True)
        for j in range(0, len(steps), per) if is_D else ():
            if any((s["fired"] or 0) > 0 and s["round"] in taus for s in steps[j:j + per]):
                a, b = plot.x(j - per / 2), plot.x(j + per / 2)
                plot.back.append(f'<path class="fired" d="M{a},{plot.top}H{max(b, a + 0.6):g}V{plot.bottom}H{a}Z"/>')
        for i, (n, (begin, end)) in enumerate(spans.items()):
            plot.back.append(f'<path class="grid" d="M{plot.x(begin)},{plot.top}V{plot.bottom}"/>')
            if i % math.ceil(len(spans) / 20) == 0:
                plot.write(plot.x(begin) + 3, plot.top - 6, f"round {n}" if len(spans) <= 10 else f"r{n}", "tick")
            if is_D and taus.get(n) is not None:
                plot.back.append(f'<path class="level tau" d="M{plot.x(begin)},{plot.y(taus[n])}H{plot.x(end)}"/>')
            elif not is_D:
                plot.line([(begin, val[n][0]), (end, val[n][1])], "val")
        for points, kind in lines:
            plot.line(points, kind)
        if is_D and any(taus.values()):
            last = [tau for tau in taus.values() if tau][-1]
            plot.levels.append((plot.y(last), f"tau {fmt(last, '.3f')}", "tau"))
        panels.append(plot.svg())
    notes = [f"Round {n}: {said(e['warning'])}." for n, e in run.heals.items() if e.get("warning")][-12:]
    skipped = sum(len(seq(e.get("skipped"))) for e in run.heals.values())
    if skipped:
        notes.append(f"{skipped} steps were skipped: their loss or gradient was not finite.")
    caption = ("Above: nll of the training answers; dashed, from before a round to after it: nll of prompts held out from it. "
               "Below: D, the mean over a step’s answers (line) and the largest (thin); "
               + ("shaded where the barrier fired, because an answer was over tau." if taus else "no barrier was used.")
               + f" A point is {per} steps." * (per > 1))
    return figure(panels, caption, "wide") + "".join(f'<p class="note">{note}</p>' for note in notes)


def inside(run: Run) -> str:
    panels = []
    cosines = [(n, str(layer), c) for n, e in sorted(run.vectors.items()) for layer, x in obj(e.get("cosine")).items()
               if (c := num(x)) is not None]
    if cosines:
        alt = "Cosine of each round’s vector with round 0’s: " + "; ".join(
            f"round {n} block {layer[:8]} {c:.3f}" for n, layer, c in cosines)
        plot = Plot(alt, [n for n, _, _ in cosines], [c for _, _, c in cosines] + [1.0, 0.0], "round",
                    "cosine with round 0’s vector", whole_x=True)
        for layer in chosen(dict.fromkeys(layer for _, layer, _ in cosines), 8):
            points = [(n, c) for n, name, c in cosines if name == layer]
            plot.line(points, "plain", f"block {layer[:8]}: {points[-1][1]:.3f}")
            for n, c in points:
                plot.mark("dot", n, c, f"round {n}, block {layer[:8]}: cosine {c:.4f}", more="plain")
        panels.append(plot.svg())
    spectra = {}
    for n, e in sorted(run.heals.items()):
        of_each = [sorted(nums(x), reverse=True) for x in obj(e.get("singular")).values()]
        mean = [statistics.fmean(column) for column in zip(*filter(None, of_each))]
        if any(v > 0 for v in mean):
            spectra[n] = [(k, v) for k, v in enumerate(mean, 1) if v > 0]
    if spectra:
        shown = chosen(spectra, 8)
        alt = "Singular values of each round’s update, mean over the adapted Linears: " + "; ".join(
            f"round {n} " + " ".join(f"{v:.2g}" for _, v in spectra[n][:8]) for n in shown)
        plot = Plot(alt, [k for n in shown for k, _ in spectra[n]], [v for n in shown for _, v in spectra[n]],
                    "singular value, largest first", "mean over Linears (log)", log_y=True, right=70, whole_x=True)
        for n in shown:
            faint = "" if n == shown[-1] else " faint"
            plot.line(spectra[n], "healed", f"round {n}" if n in (shown[0], shown[-1]) else "", faint)
            for k, v in spectra[n]:
                plot.mark("dot", k, v, f"round {n}: singular value {k} is {v:.3g}", more="healed" + faint)
        panels.append(plot.svg())
    if not panels:
        return missing("This run has no cosines and no singular values: no round got that far, or an older version wrote it.")
    return figure(panels, "Cosine: does the persona still point the same way in the healed model? Singular values: of a round’s "
                  "update s·B·A; a flat line uses its whole rank, one that falls steeply is a few directions.")


def dropped(run: Run) -> str:
    made = [(run.number(e), e, obj(e.get("verdict"))) for e in run.of("completion")]
    by_rule = {}
    for n, e, v in made:
        if not v.get("kept"):
            by_rule.setdefault(str(v.get("rule") or "?"), []).append((n, e, v))
    if not made:
        return missing("No answer has been sampled for training yet.")
    if not by_rule:
        return f"<p>All {len(made)} answers passed the filter.</p>"
    rounds = chosen(sorted({n for n, _, _ in made if n is not None}), 12)
    train, rows, samples = seq(run.items.get("train")), [], []

    def excess(case):
        value, limit = num(case[2].get("value")), num(case[2].get("limit"))
        return -math.inf if value is None else value / limit if limit else value
    for rule, cases in sorted(by_rule.items(), key=lambda item: -len(item[1]))[:20]:
        n, worst, v = max(cases, key=excess)
        counts = [sum(1 for m, _, _ in cases if m == k) for k in rounds]
        rows.append([f"{esc(rule, 40)}<small>{RULES.get(rule, '')}</small>", *(str(c or "·") for c in counts),
                     str(len(cases)), fmt(v.get("limit")), fmt(v.get("value"))])
        i = worst.get("prompt")
        asked = said(train[i], 200) if isinstance(i, int) and 0 <= i < len(train) else "<em>unknown</em>"
        match = f", matched “{said(v['match'], 60)}”" if v.get("match") else ""
        samples.append(f'<figure class="sample"><blockquote>{said(worst.get("text", ""))}</blockquote><figcaption>'
                       f'<b>{esc(rule, 40)}</b> {fmt(v.get("value"))}, limit {fmt(v.get("limit"))}{match}; round '
                       f'{"n/a" if n is None else n}, dose {fmt(worst.get("coeff"))}. Asked: {asked}</figcaption></figure>')
    lost = sum(map(len, by_rule.values()))
    return (f"<p>{lost} of {len(made)} sampled answers ({percent(lost, len(made))}) were dropped before training, each by the "
            "first rule it broke.</p>" + table(["rule", *(f"r{n}" for n in rounds), "all", "limit", "worst"], rows, "numbers")
            + f'<h3>The worst answer by each rule</h3><div class="samples">{"".join(samples)}</div>')


def short(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def settings(run: Run) -> str:
    source, rows = {"lr": "from the width", "target": "from the persona", "direction": "from the persona"}, []
    for key, value in run.options.items():
        if key in run.defaults and value != run.defaults[key]:
            found = key in source and not any(str(a).startswith("--" + key) for a in seq(run.record.get("argv")))
            why = f" <small>{source[key]}</small>" if found else ""
            rows.append([f"<code>--{esc(key, 60).replace('_', '-')}</code>{why}",
                         said(short(value), 300), esc(short(run.defaults[key]) or "(empty)", 120)])
    layers, limits = (next(iter(run.of(stage)), {}) for stage in ("layers", "limits"))
    measured = [[name, esc(", ".join(map(str, seq(layers.get(key)))), 300)]
                for key, name in (("steer", "steered blocks"), ("lora", "adapted blocks")) if seq(layers.get(key))]
    tau = next((tau for e in (*run.of("tau"), run.record) if (tau := num(e.get("tau")))), None)
    measured += [["tau", f"{fmt(tau, '.4f')} nats"]] * bool(tau)
    measured += [[f"filter: {esc(k, 30)}", fmt(v, ".3g")] for k, v in obj(limits.get("limits")).items()]
    return ((table(["option", "here", "default"], rows) if rows else "<p>Every option has its default.</p>")
            + ("<h3>Measured on the model itself</h3>" + table(["what", "value"], measured) if measured else ""))


def environment(run: Run) -> str:
    rows = [[esc(k, 40), said(v, 200)] for name in ("versions", "machine") for k, v in obj(run.record.get(name)).items() if v != ""]
    names = {"git": "commit (+ = with changes)", "code": "checksum of the code", "weights": "checksum of the base’s weights",
             "status": "status"}
    for key, name in names.items():
        if run.record.get(key):
            rows.append([name, said(run.record[key], 200)])
    started = num(run.record.get("started"))
    if started and 0 < started < 2 ** 33:
        rows.append(["started", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(started))])
    return table(["what", "value"], rows) if rows else missing("The run recorded nothing about its environment.")


def again(run: Run) -> str:
    where = shlex.quote(str(run.folder))
    commands = {"repeat": run.record.get("command", ""), "resume": f"python loop.py --resume {where}"}
    if run.final:
        commands |= {"chat": f"python loop.py chat {where}", "export": f"python lora.py export {where} --to peft"}
    commands["this page"] = f"python report.py {where}"
    return '<dl class="commands">' + "".join(f"<div><dt>{name}</dt><dd><code>{said(text, 2000)}</code></dd></div>"
                                             for name, text in commands.items() if text) + "</dl>"


SECTIONS = {"answers": ("Before and after", answers), "trajectory": ("Trajectory: what the trait costs", trajectory),
            "map": ("What else moved", moves), "dose": ("The dose", dose),
            "heat": ("Where the worst answer breaks: rmse, not mean", heat), "healing": ("Healing, step by step", healing),
            "inside": ("The vector and the fold", inside), "dropped": ("What was dropped, and why", dropped),
            "settings": ("Settings that differ from the defaults", settings), "environment": ("Environment", environment),
            "again": ("Do it again", again)}


def page(title: str, body: str) -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{esc(title, 120)}</title><style>{STYLE}</style>'
            f"</head><body><main>{body}<footer>Written by report.py from run.json and events.jsonl. No script, nothing fetched."
            "</footer></main></body></html>\n")


def part(run: Run, draw) -> str:
    """What one part draws. What a damaged event holds is not known beforehand: then the part says so, the rest stands."""
    try:
        return draw(run)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        return missing(f"This part cannot be drawn from this run’s events ({type(error).__name__}: {esc(error, 120)}).")


def render(run: Run) -> str:
    """report.html of a run, as text."""
    nav = " ".join(f'<a href="#{name}">{title.split(":")[0]}</a>' for name, (title, _) in SECTIONS.items())
    body = "".join(f'<section id="{name}"><h2>{title}</h2>{part(run, draw)}</section>'
                   for name, (title, draw) in SECTIONS.items())
    title = f"{run.options.get('persona', 'run')} on {run.options.get('model', '?')}: steer, heal"
    return page(title, f'{part(run, opening)}<nav aria-label="Sections">{nav}</nav>{body}')


# ---- several runs over each other ------------------------------------------------------------------------------------


def arms(runs: list[Run]) -> list[tuple[str, str]]:
    """(arm, name) of each run. An arm is the options in which runs differ, seed and folder apart; a name adds the seed."""
    keys = [k for k in dict.fromkeys(k for r in runs for k in r.options) if k not in ("out", "seed")]
    differing = [k for k in keys if len({json.dumps(r.options.get(k)) for r in runs}) > 1]
    several = len({json.dumps(r.options.get("seed")) for r in runs}) > 1
    named = []
    for r in runs:
        arm = " ".join(f"{k}={short(r.options.get(k, 'n/a'))}" for k in differing)
        seed = f"seed={short(r.options.get('seed', '?'))}" if several else ""
        named.append((arm or "all runs", f"{arm} {seed}".strip() or r.folder.name))
    if len({name for _, name in named}) < len(runs):
        named = [(arm, f"{name} {r.folder.name}") for (arm, name), r in zip(named, runs)]
    return named


def compare(runs: list[Run], out: Path) -> str:
    """compare.html of several runs, as text: trajectories, trait and text per round, and a table.

    Marks and lines are arms, means over their runs; the runs themselves are dots. out: the folder that links start from.
    """
    named, known, groups = arms(runs), [], {}                   # groups: arm -> round (-1 = base) -> rows
    for (arm, name), run in zip(named, runs):
        for n, row in [(-1, run.base)] * bool(run.base) + list(run.days.items()):
            if row["trait"] is not None and row["text"] is not None:
                known.append((arm, n, row, name))
                groups.setdefault(arm, {}).setdefault(n, []).append(row)
    order = list(dict.fromkeys(arm for arm, _ in named))
    colours = {arm: f"arm{i % 6}" for i, arm in enumerate(order)}
    label = {arm: arm if len(arm) <= 20 else chr(65 + i % 26) for i, arm in enumerate(order)}      # long ones get a letter
    body, panels = [], []
    for key, what in (("weights", "weights of the base"), ("items", "prompts"), ("versions", "versions"), ("code", "code")):
        if len({json.dumps(r.record.get(key), sort_keys=True) for r in runs}) > 1:
            body.append(f'<p class="note">The runs differ in their {what} too, so in more than their options.</p>')

    floor = min([lost for _, _, row, _ in known if (lost := gap(row, "text")) > 1e-9], default=0.002) / 2
    views = {"Trait against lost text coherence": (lambda n, row: (row["trait"], max(1 - row["text"], floor)),
                                                   "trait (nats from the base)", "1 − text coherence (log)",
                                                   dict(log_y=True, flip=True))}
    for key, unit in (("trait", "trait (nats from the base)"), ("text", "text coherence")):
        views[f"{key.capitalize()} by round"] = (lambda n, row, key=key: (n if n >= 0 else None, row[key]), "round", unit,
                                                 dict(whole_x=True))
    for alt, (at, x_label, y_label, look) in views.items():
        points = [xy for _, n, row, _ in known if None not in (xy := at(n, row))]
        if not points:
            continue
        plot = Plot(f"{alt}, of {len(runs)} runs in {len(order)} arms", *zip(*points), x_label, y_label, w=360, h=300, **look)
        for arm, n, row, name in known:
            if len(groups[arm][n]) > 1 or row["undone"]:
                says = f"{name}, {row['name']}: trait {fmt(row['trait'], '+.3f')} nats, text {fmt(row['text'], '.3f')}"
                plot.mark("dot", *at(n, row), says, more=f"{colours[arm]} {'undone' if row['undone'] else 'faint'}")
        for arm, rounds in groups.items():
            means = [(n, {k: statistics.fmean(r[k] for r in rows) for k in ("trait", "text")})
                     for n, rows in sorted(rounds.items())]
            for n, row in means:
                says = (f"{arm}, {'base' if n < 0 else f'day {n}'}, mean of {len(rounds[n])}: "
                        f"trait {fmt(row['trait'], '+.3f')}, text {fmt(row['text'], '.3f')}")
                plot.mark("base" if n < 0 else "healed", *at(n, row), says, more=colours[arm])
            if "round" in x_label:
                plot.line([at(n, row) for n, row in means], colours[arm])
            if plot.shows(*at(*means[-1])):
                x, y = at(*means[-1])
                plot.labels.append((plot.x(x), plot.y(y), label[arm], colours[arm]))
        panels.append(plot.svg())
    keys = "".join(f"<li>{swatch('healed', colours[arm])}{said(arm if label[arm] == arm else f'{label[arm]}: {arm}')}</li>"
                   for arm in order)
    note = ("Marks are days, the star is the base, each the mean over an arm’s runs; small dots are single runs, hollow if "
            "rolled back.")
    none = missing("None of these runs has measured a row yet.")
    body.append(figure(panels, f'<ul class="arms">{keys}</ul>{note}', "three") if panels else none)

    rows = []
    for (_, name), run in zip(named, runs):
        mood, head, _ = verdict(run)
        keys = ("trait", "trait_se", "text", "text_se", "coherence", "off_target")
        end = run.final or dict.fromkeys(keys) | {"name": "none"}
        link = urllib.parse.quote(os.path.relpath(run.folder / "report.html", out).replace(os.sep, "/"))
        rows.append([f'<a href="./{link}">{said(name)}</a>', f'<span class="{mood}">{head}</span>', end["name"],
                     fmt(end["trait"], "+.3f", end["trait_se"]), fmt(end["text"], ".3f", end["text_se"]),
                     fmt(end["coherence"], ".4f"), fmt(end["off_target"], ".3f"), str(len(run.gates))])
    head = ["run", "verdict", "last accepted", "trait, nats", "text", "coherence", "off-target", "rounds"]
    body.append(table(head, rows, "runs"))
    return page("Runs compared", f'<header><p class="eyebrow">steer-heal-love</p><h1>{len(runs)} runs over each other</h1>'
                f"</header><section>{''.join(body)}</section>")


# ---- the diary -------------------------------------------------------------------------------------------------------


def diary(run: Run, n_prompts: int = 3) -> str:
    """Markdown: per held-out prompt the base's answer, then night and day of every round, with trait and coherence."""
    command = UNSEEN.sub(" ", str(run.record.get("command", ""))[:2000]).replace("`", "")
    lines = [f"# Diary of {inert(run.options.get('model', '?'))}, persona {inert(run.options.get('persona', '?'))}\n",
             f"\n`{command}`  \nstatus: {inert(run.record.get('status', 'unknown'))}\n",
             *(f"\n{inert(note)}\n" for note in run.notes)]
    if not run.rows:
        return "".join(lines) + "\nThe run has not measured anything yet.\n"
    lines.append("\nNight = the steered model's answer, dropped. Day = the healed model's, without steering. Greedy, on prompts\n"
                 "that no stage has trained on.\n")
    for i, asked in enumerate(max((row["diary"] for row in run.rows), key=len)[:n_prompts]):
        lines.append(f"\n## {inert(asked.get('prompt', ''))}\n\n")
        for row in run.rows:
            told = row["diary"][i] if i < len(row["diary"]) else {}
            name = row["name"].capitalize() + (" (rolled back)" if row["undone"] else "")
            own = f", this answer {told['coherence']:.2f}" if num(told.get("coherence")) is not None else ""
            lines.append(f"- **{name}**, trait {fmt(row['trait'], '+.2f')} nats, coherence {fmt(row['coherence'], '.3f')}, "
                         f"text {fmt(row['text'])}{own}:\n  {inert(told.get('text', '')) or '*(nothing)*'}\n")
    return "".join(lines)


# ---- writing ---------------------------------------------------------------------------------------------------------


# same in lora.py
def write_whole(path, content: bytes) -> None:
    """Write to a temporary file beside `path` and rename it: a reader sees the old file or the new one, never half."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if hasattr(os, "O_DIRECTORY"):                          # the new name survives a power cut too; not on Windows
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)                       # still there only if something went wrong


def write(folder, out=None) -> Path:
    """report.html and diary.md of a run folder, into it or into `out`; returns the path of report.html."""
    run, out = Run(Path(folder)), Path(out or folder)
    write_whole(out / "diary.md", diary(run).encode("utf-8", "replace"))
    write_whole(out / "report.html", render(run).encode("utf-8", "replace"))
    return out / "report.html"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="write report.html and diary.md of runs; of several also compare.html")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the run's own; for compare.html, its parent)")
    args = parser.parse_args(argv)
    try:
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
        for name in args.runs:
            print(write(name, args.out if len(args.runs) == 1 else None))
        if len(args.runs) > 1:
            out = args.out or Path(args.runs[0]).resolve().parent
            text = compare([Run(Path(name)) for name in args.runs], out)
            write_whole(out / "compare.html", text.encode("utf-8", "replace"))
            print(out / "compare.html")
    except (ValueError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    return 0


# ---- the page's style: light, dark, narrow, paper --------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --card: #fff; --ink: #1c1e21; --soft: #5b6066; --line: #dcd8cf;
  --grid: #ebe8e1;
  --red: #b8431a; --green: #00735a; --blue: #3a5fa8; --warn: 214 122 22; --heat: 196 62 20;
  --arm0: #0072b2; --arm1: #b8431a; --arm2: #00735a; --arm3: #a2397c; --arm4: #806000; --arm5: #444a52 }
@media (prefers-color-scheme: dark) { :root { --paper: #141619; --card: #1b1e22; --ink: #e7e5e0; --soft: #a3a7ad;
  --line: #363b42; --grid: #272b30;
  --red: #ff9468; --green: #4bd2a5; --blue: #93b7f5; --warn: 222 140 40; --heat: 200 74 30;
  --arm0: #6cb8f0; --arm1: #ff9468; --arm2: #4bd2a5; --arm3: #ee8fc6; --arm4: #e3c04a; --arm5: #c5cad1 } }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 72rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; overflow-wrap: anywhere }
h1, h2, h3, blockquote, .answers td, .asked th, .tokens { font-family: Charter, "Bitstream Charter",
  "Iowan Old Style", "Source Serif 4", Georgia, "Liberation Serif", serif }
h1 { font-size: clamp(1.5rem, 1.1rem + 2vw, 2.3rem); line-height: 1.18; font-weight: 600; margin: 0 0 .8rem;
  text-wrap: balance; letter-spacing: -.01em }
h2 { font-size: 1.45rem; font-weight: 600; margin: 0 0 .7rem; line-height: 1.25 }
h3 { font-size: 1.08rem; font-weight: 600; margin: 1.6rem 0 .5rem }
p { margin: 0 0 .6rem; max-width: 46rem }
small { font-size: .8em; color: var(--soft) }
.eyebrow { color: var(--soft); font-size: .92rem; margin: 0 0 1rem }
.eyebrow b { color: var(--ink); font-weight: 600 }
.verdict { border-left: 5px solid var(--soft); padding: .1rem 0 .1rem 1.25rem; margin-bottom: 1.5rem }
.verdict.good { border-color: var(--green) } .verdict.bad { border-color: var(--red) }
.verdict p { margin: 0 0 .3rem }
span.good { color: var(--green) } span.bad { color: var(--red) }
.note { border: 1px solid rgb(var(--warn)); border-radius: 6px; padding: .45rem .8rem; font-size: .92rem;
  max-width: none }
.missing { color: var(--soft); font-style: italic }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1px;
  background: var(--line); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; margin: 0 }
.tiles div { background: var(--card); padding: .8rem 1rem }
.tiles dt { color: var(--soft); font-size: .85rem } .tiles dd { margin: 0 }
.tiles b { display: block; font-size: 1.75rem; line-height: 1.25; font-weight: 600;
  font-variant-numeric: tabular-nums; letter-spacing: -.01em }
.tiles span { font-size: .85rem; color: var(--soft) }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 1.4rem 0 0; font-size: .9rem }
a { color: var(--blue); text-underline-offset: .2em; text-decoration-thickness: 1px }
section { margin-top: 2.2rem; padding-top: 2rem; border-top: 1px solid var(--line) }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--soft); font-size: .85rem }
figure { margin: 1rem 0 1.2rem }
figcaption { color: var(--soft); font-size: .9rem; max-width: 52rem; margin-top: .5rem }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem 1.5rem;
  align-items: start }
.three .panels { grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)) }
.wide .panels { grid-template-columns: minmax(0, 1fr) }
.panel { overflow-x: auto; min-width: 0 } .panel > svg { display: block; width: 100%; height: auto }
.panel > svg { max-width: 40rem } .three .panel > svg { max-width: 26rem }
.wide .panel > svg { min-width: 40rem; max-width: none }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--soft);
  font-variant-numeric: tabular-nums }
svg .axis { fill: var(--soft) } svg .corner { font-style: italic; font-size: 11.5px }
svg .target { font-weight: 700; fill: var(--ink) }
svg .name { fill: var(--ink); font-weight: 600; paint-order: stroke; stroke: var(--paper); stroke-width: 3px;
  stroke-linejoin: round }
svg .number { fill: var(--soft) } svg .number.over { fill: var(--ink); font-weight: 700 }
.grid { stroke: var(--grid); fill: none } .level { stroke: var(--soft); stroke-dasharray: 5 4; fill: none }
.line { fill: none; stroke-width: 1.4; stroke-linejoin: round }
.line.rule { stroke: var(--soft); stroke-dasharray: 5 4; stroke-width: 1 }
.line.faint { opacity: .3 }
.line.search { stroke: var(--red); stroke-width: 1.2 } .line.val { stroke: var(--blue); stroke-dasharray: 4 3 }
.line.peak { stroke: var(--green); stroke-width: .8; opacity: .45 } .line.plain { stroke: var(--blue) }
.mark { stroke: var(--paper); stroke-width: 1 } .whisker { stroke-width: 1.3; fill: none; opacity: .75 }
.mark.base { fill: var(--ink) } .mark.prompted { fill: var(--blue) } .mark.steered { fill: var(--red) }
.mark.healed { fill: var(--green) } .mark.plain { fill: var(--blue) } .mark.search { fill: var(--red); opacity: .55 }
.mark.faint { opacity: .4 }
.whisker.base { stroke: var(--ink) } .whisker.prompted { stroke: var(--blue) } .whisker.steered { stroke: var(--red) }
.whisker.healed, .line.healed { stroke: var(--green) }
svg .name.steered { fill: var(--red) } svg .name.healed { fill: var(--green) } svg .name.prompted { fill: var(--blue) }
.mark.undone { fill: var(--paper); stroke: var(--green); stroke-width: 1.8 }
.heat { fill: rgb(var(--heat) / var(--k)) } .bar { fill: rgb(var(--heat)) } .fired { fill: rgb(var(--warn) / .28) }
.level.tau { stroke: var(--ink) } .level.rmse { stroke: var(--red); stroke-dasharray: none; stroke-width: 1.6 }
.level.mean { stroke: var(--blue); stroke-dasharray: none; stroke-width: 1.6 }
svg .name.rmse { fill: var(--red) } svg .name.mean { fill: var(--blue) }
.key { white-space: nowrap; margin-right: .6em; color: var(--ink) }
.key svg { width: 1em; height: 1em; vertical-align: -.12em; margin-right: .25em }
.arms { list-style: none; margin: 0 0 .5rem; padding: 0; color: var(--ink) }
.arms svg { width: 1em; height: 1em; vertical-align: -.12em; margin-right: .4em } .runs td { white-space: nowrap }
.runs tbody th, .runs td:nth-child(2) { white-space: normal; min-width: 13rem }
.scroll { overflow-x: auto; margin: .8rem 0 } .scroll:focus-visible { outline: 2px solid var(--blue) }
table { border-collapse: collapse; font-size: .92rem }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; font-weight: 400 }
thead th { color: var(--soft); font-size: .85rem; border-bottom: 1px solid var(--soft); white-space: nowrap;
  vertical-align: bottom }
.numbers td { font-variant-numeric: tabular-nums; white-space: nowrap }
.numbers td:last-child { white-space: normal; min-width: 7rem } .numbers th { white-space: nowrap }
.numbers small { display: block; white-space: normal; width: 20rem; max-width: 60vw }
.answers { width: 100%; min-width: 52rem; table-layout: fixed; border-collapse: separate; border-spacing: 3px 0 }
.answers th, .answers td { border: 0; padding: .5rem .6rem }
.answers thead th { border-top: 4px solid var(--soft); white-space: normal; color: var(--ink); line-height: 1.3;
  vertical-align: top } .answers thead small { display: block; color: var(--soft) }
.answers th.steered { border-color: var(--red) } .answers th.healed { border-color: var(--green) }
.answers th.prompted { border-color: var(--blue) }
.asked th { padding: .9rem .6rem .35rem 0; font-style: italic; color: var(--soft); font-size: .98rem }
.answers td { background: linear-gradient(rgb(var(--warn) / var(--k, 0)) 0 0), var(--card); border-radius: 4px;
  font-size: .97rem; line-height: 1.42; overflow: clip }
.answers td small { display: block; text-align: right; font: .75rem system-ui, sans-serif; color: inherit;
  opacity: .75 }
.tokens { white-space: pre-wrap; line-height: 1.9; max-width: none; margin: 0 }
.tokens span { background: rgb(var(--heat) / var(--k)); border-radius: 2px; padding: .12em 0 }
.strips dt { font-weight: 600; margin-top: .8rem } .strips dd { margin: .15rem 0 0 }
.strips small { font-weight: 400; margin-left: .5em }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem }
.sample { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .8rem 1rem; overflow: clip } blockquote { margin: 0 }
details { margin: .6rem 0 } summary { cursor: pointer; color: var(--blue) }
code { font: .9em ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace }
.commands { margin: 0 }
.commands div { display: grid; grid-template-columns: 6rem minmax(0, 1fr); gap: .2rem 1rem; padding: .4rem 0;
  border-bottom: 1px solid var(--line) } .commands dt { color: var(--soft) } .commands dd { margin: 0 }
bdi { unicode-bidi: isolate }
""" + "".join(f".mark.arm{i}, svg .name.arm{i} {{ fill: var(--arm{i}) }} .line.arm{i} {{ stroke: var(--arm{i}) }} "
              f".mark.undone.arm{i} {{ fill: var(--paper); stroke: var(--arm{i}) }}\n" for i in range(6)) + """
@media (max-width: 40rem) { main { padding: 1.4rem .9rem 3rem } .tiles { grid-template-columns: 1fr 1fr }
.tiles div { padding: .6rem .7rem } .tiles b { font-size: 1.4rem } .verdict { padding-left: .9rem }
  .commands div { grid-template-columns: minmax(0, 1fr) }
  .answers, .answers tbody, .answers tr, .answers td, .answers th { display: block; min-width: 0 }
  .answers thead { display: none }
  .answers td { margin: 0 0 4px; border-left: 4px solid var(--soft) } .answers td.steered { border-color: var(--red) }
  .answers td.healed { border-color: var(--green) } .answers td.prompted { border-color: var(--blue) }
  .answers td::before { content: attr(data-who); display: block; font: 600 .78rem system-ui, sans-serif;
    color: var(--soft) } }
@media print { :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --grid: #ddd;
  --red: #b8431a; --green: #00735a; --blue: #3a5fa8; --warn: 214 122 22; --heat: 196 62 20; color-scheme: light }
  @page { margin: 13mm } html { font-size: 9.5pt } .tiles { grid-template-columns: repeat(4, 1fr) }
  section { margin-top: 1.2rem; padding-top: 1.2rem } main { max-width: none; padding: 0 }
  nav, summary { display: none } details::details-content { content-visibility: visible; block-size: auto }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact } .scroll, .panel { overflow: visible }
  .answers, .wide .panel > svg { min-width: 0 } .answers td { font-size: 8.5pt }
  figure, tr, .tiles, .verdict, .sample, dd { break-inside: avoid } h2, h3, dt, .asked { break-after: avoid } }
"""

if __name__ == "__main__":
    sys.exit(main())
