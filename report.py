"""Report: a run folder in, report.html and diary.md out: what came out, whether to trust it, and where it hurts.

    python report.py runs/<time>_<slug>                 writes both again, of an unfinished run too
    python report.py RUN RUN ... [--out DIR]            the same for each, and compare.html: the runs drawn over each other

Reads run.json and events.jsonl only and needs the standard library only; copy this file alone. report.html is one file
with its style and its figures inside: no script, nothing fetched. It shows what there is: a stage that is missing, a
number that is null, or an event that an older version did not write leaves a sentence where its figure would be.

Everything a model or a user wrote is untrusted. It passes `esc` on its way to HTML and `inert` on its way to Markdown,
and a content security policy in the page forbids what an escape might have missed.

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
TAGGED = 600                                                    # characters of one answer that a report shows


def cut(text: str, limit: int) -> tuple[str, str]:
    """The first `limit` characters, and a note of how many were left out."""
    return (text, "") if len(text) <= limit else (text[:limit], f"… ({len(text) - limit:,} more characters)")


def esc(text, limit: int = TAGGED) -> str:
    """Any text for HTML, as content or as an attribute's value: nothing in it is markup, and what is unseen is shown."""
    def show(match):
        code = ord(match.group())
        return {9: " ", 10: " ↵ "}.get(code) or (chr(0x2400 + code) if code < 32 else f"⟨U+{code:04X}⟩")
    text, rest = cut(re.sub(r"\n{4,}", lambda match: f" ↵×{len(match.group())} ", str(text)), limit)
    return html.escape(UNSEEN.sub(show, text), quote=True) + rest


def said(text, limit: int = TAGGED) -> str:
    """A model's or a user's words as an HTML element of their own direction."""
    return f"<bdi>{esc(text, limit)}</bdi>" if str(text).strip() else "<em>(nothing)</em>"


def inert(text, limit: int = 2000) -> str:
    """Any text for Markdown: one line, no control or direction marks, what could mean something escaped."""
    text, rest = cut(str(text), limit)
    text = " ".join(UNSEEN.sub(" ", text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]()#+!|~:@-])", r"\\\1", text)
    return re.sub(r"(?i)\bwww\.", r"www\\.", text) + rest


# ---- numbers ---------------------------------------------------------------------------------------------------------


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
    return text.replace("-", "−") + (f" ± {format(error, spec.lstrip('+'))}" if num(error) is not None else "")


def percent(part, whole) -> str:
    return f"{100 * part / whole:.0f}%" if num(part) is not None and num(whole) else "n/a"


def rms(xs) -> float:
    return math.sqrt(statistics.fmean(x * x for x in xs))


def moved(row: dict, base: dict) -> dict[str, tuple[float, float | None]]:
    """{foundation: (nats from base to row, standard error)}, paired over vignettes counted in both (delta method).

    The probe's p is [M][K] in the order of its nats; without it the move is that of the row's record, without error."""
    now, then = row["probe"], base["probe"]
    names, counted = list(obj(now.get("nats"))), set(seq(now.get("counted"))) & set(seq(then.get("counted")))
    p, q = seq(now.get("p")), seq(then.get("p"))
    pairs = [(p[i], q[i]) for i in sorted(counted) if i < min(len(p), len(q))]
    if len(pairs) < 2 or any(len(nums(x)) != len(names) for pair in pairs for x in pair):
        return {f: (x, None) for f, v in obj(row["shift"].get("moved")).items() if (x := num(v)) is not None}
    out = {}
    for k, name in enumerate(names):
        a, b = statistics.fmean(x[k] for x, _ in pairs), statistics.fmean(y[k] for _, y in pairs)
        if a > 0 and b > 0:
            spread = statistics.stdev(x[k] / a - y[k] / b for x, y in pairs)
            out[name] = math.log(a / b), spread / math.sqrt(len(pairs))
    return out


class Run:
    """What a report shows of a run, sorted by kind and round; numbers that are none are None, never text."""

    def __init__(self, folder: Path):
        self.folder, (self.record, self.events, self.notes) = folder, read(folder)
        self.options, self.defaults, self.items = (obj(self.record.get(k)) for k in ("options", "defaults", "items"))
        self.rows = [self.row(e) for e in self.of("row") if e.get("kind") in ("base", "prompted", "steered", "healed")]
        self.base = next((r for r in self.rows if r["kind"] == "base"), None)
        self.prompted = next((r for r in self.rows if r["kind"] == "prompted"), None)
        self.nights = {r["round"]: r for r in self.rows if r["kind"] == "steered" and r["round"] is not None}
        self.days = {r["round"]: r for r in self.rows if r["kind"] == "healed" and r["round"] is not None}
        self.gates = {n: e for e in self.of("gate") if (n := self.round(e)) is not None}
        self.doses = {n: num(e.get("coeff")) for e in self.of("dose") if (n := self.round(e)) is not None}
        self.heals = {n: e for e in self.of("heal") if (n := self.round(e)) is not None}
        self.night = next(iter(self.nights.values()), None)     # steering of a student that is still the base
        self.rounds = sorted({n for e in self.events if (n := self.round(e)) is not None})
        accepted = [n for n in self.days if self.gates.get(n, {}).get("accepted") is True]
        self.final = self.days[max(accepted)] if accepted else None
        if self.base:
            for row in self.rows:
                row["moved"] = moved(row, self.base)

    def of(self, stage: str) -> list[dict]:
        return [e for e in self.events if e["stage"] == stage]

    @staticmethod
    def round(event: dict) -> int | None:
        n = event.get("round")
        return n if isinstance(n, int) and not isinstance(n, bool) and n >= 0 else None

    def row(self, event: dict) -> dict:
        probe, shift, diary = obj(event.get("probe")), obj(event.get("shift")), [obj(d) for d in seq(event.get("diary"))]
        name = {"base": "base", "prompted": "prompted", "steered": f"night {event.get('round')}", "healed": f"day {event.get('round')}"}
        return dict(kind=event["kind"], round=self.round(event), name=name[event["kind"]], probe=probe, shift=shift, diary=diary, moved={},
                    coherence_se=num(probe.get("coherence_se")), off_target=num(shift.get("off_target")),
                    **{k: num(event.get(k)) for k in ("trait", "trait_se", "text", "text_se", "coherence", "coeff")})

    def undone(self, row: dict) -> bool:
        return row["kind"] == "healed" and self.gates.get(row["round"], {}).get("accepted") is False

    def target(self) -> str:
        return str(self.options.get("target") or "authority")


# ---- figures: one small panel of SVG ---------------------------------------------------------------------------------

MARKS = {"base": "M0,-8 2.1,-2.6 7.6,-2.5 3.2,1 4.7,6.5 0,3.3 -4.7,6.5 -3.2,1 -7.6,-2.5 -2.1,-2.6Z",            # star
         "prompted": "M0,-6 5.5,4 -5.5,4Z", "steered": "M0,-6 6,0 0,6 -6,0Z",                                   # triangle, diamond
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
            low, high = low - (0.3 if log else 0.5 * abs(low) or 0.5), high + (0.3 if log else 0.5 * abs(high) or 0.5)
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
            return found[::math.ceil(len(found) / 7)]
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
        x_ticks = sorted({round(t) for t in self.x.ticks()}) if whole_x else self.x.ticks()
        for t in x_ticks:
            if self.left <= self.x(t) <= self.right:
                self.back.append(f'<path class="grid" d="M{self.x(t)},{self.top}V{self.bottom}"/><text class="tick" x="{self.x(t)}" '
                                 f'y="{self.bottom + 16}" text-anchor="middle">{tick(t)}</text>')
        for t in self.y.ticks():
            self.back.append(f'<path class="grid" d="M{self.left},{self.y(t)}H{self.right}"/><text class="tick" x="{self.left - 6}" '
                             f'y="{self.y(t) + 4}" text-anchor="end">{tick(t)}</text>')
        middle = (self.top + self.bottom) / 2
        self.back.append(f'<text class="axis" x="{(self.left + self.right) / 2}" y="{h - 8}" text-anchor="middle">{esc(x_label)}</text>'
                         f'<text class="axis" transform="translate(13,{middle}) rotate(-90)" text-anchor="middle">{esc(y_label)}</text>')

    def mark(self, kind: str, x, y, says: str, label: str = "", *, ex=None, ey=None, more: str = "") -> None:
        """A mark with its whiskers of one standard error; `says` is read out and shown by a pointer that rests on it."""
        if x is None or y is None or (self.x.log and x <= 0) or (self.y.log and y <= 0):
            return
        px, py = self.x(x), self.y(y)
        for axis, v, e in ((self.x, x, ex), (self.y, y, ey)):
            if e:
                low = max(v - e, 10 ** axis.low) if axis.log else v - e
                a, b = (min(max(axis(u), min(axis.start, axis.end)), max(axis.start, axis.end)) for u in (low, v + e))
                self.front.append(f'<path class="whisker {kind} {more}" d="' + (f"M{a},{py}H{b}" if axis is self.x else f"M{px},{a}V{b}") + '"/>')
        self.front.append(f'<path class="mark {kind} {more}" transform="translate({px},{py})" d="{MARKS.get(kind, MARKS["dot"])}">'
                          f"<title>{esc(says)}</title></path>")
        self.taken.append((px - 6, py - 6, px + 6, py + 6))
        if label:
            self.labels.append((px, py, label, kind))

    def line(self, points, kind: str, label: str = "", more: str = "") -> None:
        """A line through the points that are known; its label stands at the last of them."""
        at = [(self.x(x), self.y(y)) for x, y in points if x is not None and y is not None
              and (x > 0 or not self.x.log) and (y > 0 or not self.y.log)]
        if len(at) > 1:
            self.back.append(f'<path class="line {kind} {more}" d="M' + " ".join(f"{x:g},{y:g}" for x, y in at) + '"/>')
        if at and label:
            self.labels.append((*at[-1], label, kind))

    def level(self, y, label: str, kind: str = "rule") -> None:
        """A horizontal line whose name stands at its right end if there is a margin, else under its left end."""
        if y is not None and (y > 0 or not self.y.log):
            self.back.append(f'<path class="level {kind}" d="M{self.left},{self.y(y)}H{self.right}"/>')
            self.levels.append((self.y(y), label, kind))

    def corner(self, text: str, right: bool = True, top: bool = True) -> None:
        x, anchor = (self.right - 4, "end") if right else (self.left + 6, "start")
        self.back.append(f'<text class="corner" x="{x}" y="{self.top + 14 if top else self.bottom - 8}" text-anchor="{anchor}">{esc(text)}</text>')

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
                if inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in self.taken):
                    self.taken.append(box)
                    self.front.append(f'<text class="name {kind}" x="{px + dx:.1f}" y="{py + dy:.1f}" '
                                      f'text-anchor="{anchor}">{esc(label)}</text>')
                    break
        return (f'<svg viewBox="0 0 {self.w} {self.h}" role="img" aria-label="{esc(self.alt, 2000)}"><title>{esc(self.alt, 2000)}'
                "</title>" + "".join(self.back + self.front) + "</svg>")


def tick(v: float) -> str:
    return f"{v:.4g}".replace("-", "−").replace("e+0", "e").replace("e−0", "e−")


def figure(panels, caption: str, kind: str = "") -> str:
    """Panels side by side where there is room, each in a box that scrolls by itself, above what they say."""
    return (f'<figure class="{kind}"><div class="panels">' + "".join(f'<div class="panel">{p}</div>' for p in panels)
            + f"</div><figcaption>{caption}</figcaption></figure>")


def missing(what: str) -> str:
    return f'<p class="missing">{what}</p>'


def table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    """Cells are HTML already. The first column names its row; the table scrolls in its own box."""
    top = "".join(f'<th scope="col">{h}</th>' for h in head)
    body = "".join('<tr><th scope="row">' + cells[0] + "</th>" + "".join(f"<td>{c}</td>" for c in cells[1:]) + "</tr>" for cells in rows)
    return f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


# ---- the report, section by section ----------------------------------------------------------------------------------

FOUNDATIONS = ("care", "fairness", "loyalty", "authority", "sanctity", "liberty", "social")
RULES = {"worst_window": "a stretch of tokens that the base finds too surprising (nats per token)",
         "ppl_tail": "an ending that the base finds too surprising (perplexity of the last quarter)",
         "ngram": "phrases repeated (share of n-grams seen shortly before)", "loop": "tokens that go round in circles (share seen shortly before)",
         "words": "too few words", "unfinished": "cut off at the longest length allowed", "pattern": "refusal, or narration of the trait"}


def verdict(run: Run) -> tuple[str, str, list[str]]:
    """(good, bad or open; the headline; sentences) in plain words, from the numbers alone."""
    status, final, base, night = str(run.record.get("status", "unknown")), run.final, run.base, run.night
    done, floor = num(run.record.get("seconds")) is not None, num(run.options.get("coh_floor")) or 0.95
    said_yes = [n for n, g in run.gates.items() if g.get("accepted") is True]
    lines = []
    if not done:
        lines.append(f"<strong>This run is not finished</strong> (status: {esc(status, 60)}). Below is what it had measured when this page was written.")
    if not run.gates:
        lines.append("No round has ended yet." if not done else "The run ended before its first round did.")
    else:
        no = sorted(set(run.gates) - set(said_yes))
        why = "; ".join(map(str, run.gates[no[-1]].get("reasons") or [])) if no else ""
        gate = "" if run.options.get("gate", True) else " The gate was off (--no-gate): every finite round counts as accepted."
        lines.append(f"{len(said_yes)} of {len(run.gates)} rounds accepted.{gate}"
                     + (f" Rolled back: round {', '.join(map(str, no))}; the last because: {said(why or 'no reason recorded')}." if no else ""))
    if run.record.get("stopped"):
        lines.append(f"Stopped early: {said(run.record['stopped'])}.")
    if not final or not base:
        head = "Nothing is healed yet" if not done or not run.gates else "No round was accepted: the model is the base"
        return "open" if not done else "bad", head, lines

    share, keep = percent(final["trait"], night["trait"]) if night and (night["trait"] or 0) > 0 else "", percent(final["text"], base["text"])
    broken = [name for name in ("text", "coherence") if final[name] is None or base[name] is None or final[name] < floor * base[name]]
    trait, error = final["trait"], final["trait_se"] or 0.0
    nothing = trait is None or trait <= 2 * error or bool(night and trait < 0.1 * (night["trait"] or 0))
    if broken:
        left = f"{keep} of the base’s text coherence" if "text" in broken else f"a probe coherence of {fmt(final['coherence'], '.3f')}"
        head = f"{final['name'].capitalize()} falls under the coherence floor: {left} is left"
    elif nothing:
        head = f"{final['name'].capitalize()} is coherent, but has hardly any trait{': ' + share + ' of the steering’s' if share else ''}"
    else:
        head = f"{final['name'].capitalize()} keeps {share + ' of the steering’s' if share else 'a'} trait at {keep} of the base’s text coherence"
    word = {1: "up", -1: "down"}.get(num(run.options.get("direction")), "")
    lines.append(f"Trait (the probe’s {esc(run.target())}{', wanted ' + word if word else ''}): {fmt(trait, '+.2f', final['trait_se'])} nats without any hook"
                 + (f"; steering reached {fmt(night['trait'], '+.2f', night['trait_se'])} in {night['name']}" if night else "; steering alone was not measured")
                 + (f"; the persona prompt alone gives {fmt(run.prompted['trait'], '+.2f', run.prompted['trait_se'])}." if run.prompted else "."))
    lines.append(f"Coherence: sampled text {fmt(final['text'], '.3f', final['text_se'])} against the base’s {fmt(base['text'], '.3f', base['text_se'])}"
                 f"{' and ' + fmt(night['text'], '.3f') + ' in ' + night['name'] if night else ''}; probability on the probe’s allowed answers "
                 f"{fmt(final['coherence'], '.4f')} against {fmt(base['coherence'], '.4f')}.")
    others = {f: m for f, (m, _) in final["moved"].items() if f != run.target()}
    if others and trait:
        worst = max(others, key=lambda f: abs(others[f]))
        lines.append(f"Off target: {worst} moved most, by {fmt(others[worst], '+.2f')} nats, {percent(abs(others[worst]), abs(trait))} of the trait"
                     + (": not surgical." if abs(others[worst]) >= abs(trait) else "."))
    heal = run.heals.get(final["round"])
    if heal:
        fired = num(heal.get("fired_share"))
        lines.append("No barrier was used (nll)." if not num(heal.get("lam_eff")) else f"The barrier (D = {esc(run.options.get('kl_agg', '?'), 20)} of KL, "
                     f"tau = {fmt(heal.get('tau'), '.3f')} nats) pushed in {percent(fired, 1)} of this round’s steps." )
        if heal.get("warning"):
            lines.append(f"Warning: {esc(heal['warning'])}.")
    if done:
        lines.append(f"It took {duration(num(run.record['seconds']))}.")
    return "bad" if broken else "open" if nothing or not done else "good", head, lines


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes:.0f} minutes" if minutes < 120 else f"{hours:.1f} hours"


def opening(run: Run) -> str:
    mood, head, lines = verdict(run)
    tiles = []
    if run.final and run.base:
        final, base, first = run.final, run.base, run.night
        tiles = [("trait kept", fmt(final["trait"], "+.2f"), f"nats ± {fmt(final['trait_se'])}; base 0" + (f", {first['name']} {fmt(first['trait'], '+.2f')}" if first else "")),
                 ("text coherence", fmt(final["text"], ".3f"), f"share of coherent windows; base {fmt(base['text'], '.3f')}" + (f", {first['name']} {fmt(first['text'], '.3f')}" if first else "")),
                 ("probe coherence", fmt(final["coherence"], ".4f"), f"probability of allowed answers; base {fmt(base['coherence'], '.4f')}"),
                 ("off-target", fmt(final["off_target"], ".2f"), "nats, largest move of another foundation")]
    tiles = "".join(f'<div><dt>{name}</dt><dd><b>{value}</b> <span>{note}</span></dd></div>' for name, value, note in tiles)
    notes = "".join(f'<p class="note">{esc(note)}</p>' for note in run.notes)
    persona = "a custom persona" if run.options.get("pos") else f"persona <b>{said(run.options.get('persona', '?'), 80)}</b>"
    return (f'<header><p class="eyebrow">steer-heal-love · {persona} on <b>{said(run.options.get("model", "?"), 120)}</b> · seed {esc(run.options.get("seed", "?"), 20)}</p>'
            f'<div class="verdict {mood}"><h1>{head}</h1>' + "".join(f"<p>{line}</p>" for line in lines) + f"</div>{notes}"
            + (f'<dl class="tiles">{tiles}</dl>' if tiles else "") + "</header>")


def chosen(rounds: list[int], n: int = 3) -> list[int]:
    """First, last, and evenly spaced ones between them."""
    return rounds if len(rounds) <= n else sorted({rounds[round(i * (len(rounds) - 1) / (n - 1))] for i in range(n)})


def answers(run: Run) -> str:
    if not run.base or not run.base["diary"]:
        return missing("No held-out prompt has been answered yet.")
    days = chosen(list(run.days))
    shown = [r for r in (run.base, run.prompted, run.night) if r] + [run.days[n] for n in days]
    own = all(num(d.get("coherence")) is not None for r in shown for d in r["diary"])

    def grid(columns, prompts, start=0):
        head = "".join(f'<th scope="col" class="{r["kind"]}">{dream(r)}<small>trait {fmt(r["trait"], "+.2f")} · text {fmt(r["text"])}</small></th>' for r in columns)
        body = []
        for i, asked in list(enumerate(prompts))[start:40]:
            body.append(f'<tr class="asked"><th colspan="{len(columns)}" scope="rowgroup">{said(asked.get("prompt", ""), 400)}</th></tr><tr>')
            for r in columns:
                told = r["diary"][i] if i < len(r["diary"]) else None
                share = num(told.get("coherence")) if told and own else r["text"]
                tint = 0 if share is None else min(max(1.25 * (1 - share), 0), 0.62)
                words = said(told.get("text", "")) if told else "<em>n/a</em>"
                body.append(f'<td class="{r["kind"]}" data-who="{dream(r, False)}" style="--k:{tint:.2f}">{words}'
                            + (f"<small>{share:.2f}</small>" if share is not None and own else "") + "</td>")
            body.append("</tr>")
        return f'<div class="scroll" tabindex="0"><table class="answers"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'

    def dream(row, marks=True):
        name = {"steered": f"steered “dream”, {row['name']}", "healed": row["name"] + (" (rolled back)" if run.undone(row) else "")}.get(row["kind"], row["name"])
        return f"<b>{name.capitalize()}</b>" if marks else name.capitalize()
    rest = [r for r in run.rows if r not in shown]
    many = f" A selection: {len(run.days)} days were measured." if len(run.days) > len(days) else ""
    text = (f"<p>Greedy answers to prompts that no stage has trained on. The shade is lost coherence: clear where the base could have written "
            f"the answer, the darker the less it could; {'the small number is the answer’s own coherence' if own else 'this older run has no number for each answer, so a column has one shade'}. "
            f"Dreams are dropped, days are what is left without steering.{many}</p>" + grid(shown, run.base["diary"][:6]))
    if run.base["diary"][6:]:
        text += f"<details><summary>More prompts ({len(run.base['diary']) - 6})</summary>{grid(shown, run.base['diary'], 6)}</details>"
    if rest:
        rest = [r for r in rest if r["kind"] == "steered" or r["kind"] == "healed"][:24]
        text += f"<details><summary>The other nights and days ({len(rest)})</summary>{grid(rest, run.base['diary'][:3])}</details>"
    return text


def nickname(run: Run, row: dict) -> str:
    """How a mark is labelled: words for the first and the last of its kind, for the others their round's number."""
    same = {"steered": run.nights, "healed": run.days}.get(row["kind"], {})
    return row["name"] if not same or row["round"] in (min(same), max(same)) else str(row["round"])


def in_order(rows: list[dict]) -> list[dict]:
    """Marks whose labels matter most come first: they take the free places."""
    return sorted(rows, key=lambda r: (r["kind"] not in ("base", "prompted"), -(r["round"] or 0)))


def gap(row: dict, key: str) -> float | None:
    return None if row[key] is None else max(1 - row[key], 0.0)


def trajectory(run: Run) -> str:
    if not run.base:
        return missing("Neither the base nor any round has been measured yet.")
    panels, floored = [], False
    for key, what in (("text", "1 − text coherence"), ("coherence", "1 − coherence on the probe")):
        rows = [r for r in run.rows if r["trait"] is not None and gap(r, key) is not None]
        if not rows:
            continue
        floor = min([gap(r, key) for r in rows if gap(r, key) > 1e-9], default=0.002) / 2
        floored |= any(gap(r, key) <= 1e-9 for r in rows)
        ys = {id(r): max(gap(r, key), floor) for r in rows}
        xs = [r["trait"] + s * (r["trait_se"] or 0) for r in rows for s in (-1, 1)]
        plot = Plot(f"Trait in nats against {what}, logarithmic: " + "; ".join(f"{r['name']} {fmt(r['trait'], '+.2f')}, {fmt(gap(r, key), '.3f')}" for r in rows[:40]),
                    xs, [y for r in rows for y in (ys[id(r)], ys[id(r)] + (r[key + "_se"] or 0))], "trait (nats from the base)", f"{what} (log)", log_y=True, flip=True, h=340)
        plot.corner("more trait, more coherent ↗")
        for r in in_order(rows):
            plot.mark(r["kind"], r["trait"], ys[id(r)], f"{r['name']}: trait {fmt(r['trait'], '+.3f', r['trait_se'])} nats, {what} {fmt(gap(r, key), '.4f', r[key + '_se'])}",
                      nickname(run, r), ex=r["trait_se"], ey=r[key + "_se"], more="undone" if run.undone(r) else "")
        panels.append(plot.svg())
    if not panels:
        return missing("The measured rows have no numbers to draw.")
    caption = (key_line("base", "prompted", "steered", "healed") + " Each mark is one row of the table below, the number its round, whiskers one standard error"
               + (", hollow = rolled back" if any(run.undone(r) for r in run.rows) else "") + (". Nothing lost at all is drawn at the top edge, since a logarithm has no zero" if floored else "") + ".")
    return figure(panels, caption) + f"<details><summary>Every round in numbers</summary>{numbers(run)}</details>"


def key_line(*kinds) -> str:
    names = {"base": "base", "prompted": "persona prompt", "steered": "night: steered", "healed": "day: healed"}
    return " ".join(f'<span class="key"><svg viewBox="-9 -9 18 18" aria-hidden="true"><path class="mark {k}" d="{MARKS[k]}"/></svg>{names[k]}</span>' for k in kinds)


def numbers(run: Run) -> str:
    rows = []
    for r in [r for r in (run.base, run.prompted) if r]:
        rows.append([r["name"], "", "", fmt(r["trait"], "+.3f", r["trait_se"]), fmt(r["off_target"], ".3f"), fmt(r["coherence"], ".4f"), fmt(r["text"], ".3f", r["text_se"]), "", "", ""])
    for n in run.rounds[:400]:
        made = [e for e in run.of("completion") if run.round(e) == n]
        kept = sum(1 for e in made if (e.get("verdict") or {}).get("kept"))
        gate, heal = run.gates.get(n), run.heals.get(n, {})
        last = (heal.get("steps") or [{}])[-1]
        end = "in progress" if gate is None else "accepted" if gate.get("accepted") else "rolled back: " + esc("; ".join(map(str, gate.get("reasons") or [])))
        for r, more in ((run.nights.get(n), False), (run.days.get(n), True)):
            if r or more:
                r = r or dict(name=f"day {n}", trait=None, trait_se=None, off_target=None, coherence=None, text=None, text_se=None)
                rows.append([r["name"], fmt(run.doses.get(n)) if not more else "", f"{kept}/{len(made)}" if more else "", fmt(r["trait"], "+.3f", r["trait_se"]), fmt(r["off_target"], ".3f"),
                             fmt(r["coherence"], ".4f"), fmt(r["text"], ".3f", r["text_se"]), *([fmt(last.get("div"), ".3f"), percent(num(heal.get("fired_share")), 1), end] if more else ["", "", ""])])
    return table(["row", "dose", "kept", "trait, nats", "off-target", "coherence", "text", "D, nats", "steps fired", "gate"], rows, "numbers")


def plane(run: Run) -> str:
    """Where the rounds go on the plane of the target and its counterpart, and how far every foundation moves."""
    rows, target = [r for r in run.rows if r["moved"]], run.target()
    other = "care" if target != "care" else "authority"
    rows = [r for r in rows if target in r["moved"] and other in r["moved"]]
    if len(rows) < 2:
        return missing("No row beside the base has been measured yet.")
    def ends(name):
        return [v for r in rows for m, e in [r["moved"][name]] for v in (m - (e or 0), m + (e or 0))] + [0.0]
    xs, ys = ends(other), ends(target)
    reach = max(max(xs) - min(xs), max(ys) - min(ys))
    xs, ys = ([min(v), min(v) + reach] if max(v) > -min(v) else [max(v) - reach, max(v)] for v in (xs, ys))     # one unit, both axes
    plot = Plot(f"Nats of {target} against nats of {other}, both from the base: " + "; ".join(
        f"{r['name']} {other} {fmt(r['moved'][other][0], '+.2f')} {target} {fmt(r['moved'][target][0], '+.2f')}" for r in rows[:40]),
        xs, ys, f"{other} (nats from the base)", f"{target} (nats from the base)", h=400)
    for way in (1, -1):
        plot.line(diagonal(way, reach, plot), "rule")
    sign = num(run.options.get("direction")) or 0
    if sign:
        plot.corner(f"{'↑' if sign > 0 else '↓'} wanted", right=False, top=sign > 0)
    for r in in_order(rows):
        (x, ex), (y, ey) = r["moved"][other], r["moved"][target]
        plot.mark(r["kind"], x, y, f"{r['name']}: {other} {fmt(x, '+.3f', ex)}, {target} {fmt(y, '+.3f', ey)} nats", nickname(run, r), ex=ex, ey=ey, more="undone" if run.undone(r) else "")
    return plot.svg()


def diagonal(way: int, reach: float, plot: Plot) -> list[tuple[float, float]]:
    """The ends of the line y = way * x inside a plot, found by walking along it."""
    walk = [(t / 100 * reach, way * t / 100 * reach) for t in range(-150, 151)]
    seen = [(x, y) for x, y in walk if plot.x.low <= x <= plot.x.high and plot.y.low <= y <= plot.y.high]
    return seen[:1] + seen[-1:]


def dose(run: Run) -> str:
    tried = {}                                                  # (round, dose) -> (survival, perplexity)
    for e in run.of("dose"):
        for trial in e.get("trials") or []:
            if isinstance(trial, list) and len(trial) == 2:
                tried[run.round(e), num(trial[0])] = num(trial[1]), None
    tried |= {(run.round(e), num(e.get("coeff"))): (num(e.get("survive")), num(e.get("ppl"))) for e in run.of("probe")}
    tried = {k: v for k, v in tried.items() if None not in k and k[1] > 0}
    settled = {n: c for n, c in run.doses.items() if c and c > 0}
    if not tried and not settled:
        return missing("No dose has been tried yet.")
    doses, rounds = [c for _, c in tried] + list(settled.values()), sorted({n for n, _ in tried})
    panels, shown = [], set(chosen(rounds, 12))
    for i, (what, unit) in enumerate((("survival", "survival (share of answers)"), ("perplexity", "perplexity of tails (log)"))):
        if not any(v[i] is not None for v in tried.values()):
            panels.append(missing(f"This run has no {what} for the doses it tried."))
            continue
        plot = Plot(f"Dose against {what}: " + "; ".join(f"round {n} dose {c:.3g} {what} {fmt(v[i])}" for (n, c), v in list(tried.items())[:60]),
                    doses, [v[i] for v in tried.values()] + ([0, 1.0, num(run.options.get("min_survive"))] if i == 0 else []), "dose (multiples of v, log)", unit, log_x=True, log_y=i == 1, w=360, h=290)
        if i == 0:
            plot.level(num(run.options.get("min_survive")), f"asked for: {percent(num(run.options.get('min_survive')), 1)}")
        for n in rounds:
            if n in shown:
                plot.line(sorted((c, v[i]) for (m, c), v in tried.items() if m == n and v[i] is not None), "search", more="faint" if len(rounds) > 1 and n != rounds[-1] else "")
        for (n, c), v in tried.items():
            is_settled = settled.get(n) == c
            plot.mark("steered" if is_settled else "dot", c, v[i], f"round {n}, dose {c:.3f}: {what} {fmt(v[i])}{', settled' if is_settled else ''}",
                      str(n) if is_settled else "", more="" if is_settled else "search")
        panels.append(plot.svg())
    rows = [r for r in (*run.nights.values(), *run.days.values()) if r["trait"] is not None and settled.get(r["round"])]
    if rows:
        plot = Plot("Settled dose against trait: " + "; ".join(f"{r['name']} dose {settled[r['round']]:.3g} trait {fmt(r['trait'], '+.2f')}" for r in rows[:60]),
                    doses, [r["trait"] + s * (r["trait_se"] or 0) for r in rows for s in (-1, 1)] + [0.0], "dose (multiples of v, log)", "trait (nats)", log_x=True, w=360, h=290)
        for r in rows:
            plot.mark(r["kind"], settled[r["round"]], r["trait"], f"{r['name']}: dose {settled[r['round']]:.3f}, trait {fmt(r['trait'], '+.3f', r['trait_se'])}",
                      str(r["round"]), ey=r["trait_se"], more="undone" if run.undone(r) else "")
        panels.append(plot.svg())
    return figure(panels, "Left and middle: every dose that a search tried, by its answers; diamonds are the doses that the rounds settled on, numbers the rounds. "
                  "Right: the trait at those settled doses, steered (diamond) and after healing (circle); at other doses nobody measures a trait, it would take a probe each.", "three")


def heat(run: Run) -> str:
    found = {}
    for e in run.of("worst"):
        day, tokens, n = nums(e.get("day")), [str(t) for t in e.get("tokens") or []], run.round(e)
        if n is not None and day:
            strips = {k: [max(v, 0.0) for v in nums(e.get(k))] for k in ("night", "before", "day")}
            found[n] = dict(prompt=e.get("prompt"), tokens=tokens + [""] * (len(day) - len(tokens)), **strips)
    if not found:
        return missing("This run has no KL per token: no round has healed yet, or an older version wrote it.")
    tau = {n: num(h.get("tau")) for n, h in run.heals.items() if num(h.get("lam_eff"))}
    worst = max(found, key=lambda n: rms(found[n]["day"]))
    top = max(max(f["day"]) for f in found.values()) or 1.0
    # ---- all rounds: a row each
    shown = chosen(list(found), 24)
    columns = min(max(len(found[n]["day"]) for n in shown), 128)
    w, left, high = 900, 228, 17
    cell = (w - left - 14) / columns
    at = [102, 154, 206]                                        # right ends of three columns of numbers
    out = [f'<text class="axis" x="{left}" y="12">token of the answer →</text>'] + [
        f'<text class="tick" x="{x}" y="12" text-anchor="end">{name}</text>' for x, name in zip(at, ("mean", "rmse", "max"))]
    for row, n in enumerate(shown):
        kl, y = found[n]["day"], 20 + row * (high + 3)
        per = max(len(kl) / columns, 1)
        out.append(f'<text class="tick" x="4" y="{y + 13}">day {n}</text>')
        for i in range(math.ceil(len(kl) / per)):
            value = max(kl[int(i * per):max(int((i + 1) * per), int(i * per) + 1)])
            out.append(f'<rect x="{left + i * cell:.1f}" y="{y}" width="{max(cell - 1, .8):.1f}" height="{high}" class="heat" style="--k:{max(value / top, .04):.2f}"/>')
        for x, value in zip(at, (statistics.fmean(kl), rms(kl), max(kl))):
            over = "over" if tau.get(n) and value > tau[n] else ""
            out.append(f'<text class="number {over}" x="{x}" y="{y + 13}" text-anchor="end">{value:.3f}</text>')
    height = 20 + len(shown) * (high + 3) + 8
    alt = "KL per token of each round’s worst kept answer, in nats: " + "; ".join(
        f"day {n} mean {statistics.fmean(found[n]['day']):.3f} rmse {rms(found[n]['day']):.3f} max {max(found[n]['day']):.3f}" for n in shown)
    strip = f'<svg viewBox="0 0 {w} {height}" role="img" aria-label="{esc(alt, 4000)}"><title>{esc(alt, 4000)}</title>{"".join(out)}</svg>'
    # ---- the worst of them, token by token
    f, kl = found[worst], found[worst]["day"]
    mean, square, limit = statistics.fmean(kl), rms(kl), tau.get(worst)
    plot = Plot(f"KL of each token of the worst answer of day {worst}", [0, len(kl)], [0.0, *kl, limit], "token of the answer", "KL(day ‖ reference), nats", w=900, h=250, right=100, room=0.01, whole_x=True)
    for i, value in enumerate(kl[:600]):
        x, y = plot.x(i + 0.1), plot.y(value)
        plot.back.append(f'<path class="bar" d="M{x},{plot.y(0)}V{y}H{plot.x(i + 0.9)}V{plot.y(0)}Z"><title>{esc(f["tokens"][i], 40)} {value:.3f} nats</title></path>')
    for value, kind in ((mean, "mean"), (square, "rmse"), (limit, "tau")):
        plot.level(value, f"{kind} {fmt(value, '.3f')}", kind)
    def tokens(kind):
        words = [f'<span style="--k:{min(v / top, 1):.2f}" title="{v:.3f} nats">{esc(t, 60)}</span>' for t, v in zip(f["tokens"][:256], f[kind])]
        rest = f" … ({len(f[kind]) - 256} more tokens)" if len(f[kind]) > 256 else ""
        return f'<p class="tokens"><bdi>{"".join(words)}</bdi>{rest}</p>' if words else missing("not recorded")
    names = {"night": f"Night {worst}, steered", "before": "The student before this round", "day": f"Day {worst}, healed"}
    texts = "".join(f'<dt>{names[k]} <small>mean {statistics.fmean(f[k]):.3f}, rmse {rms(f[k]):.3f}, max {max(f[k]):.3f} nats</small></dt><dd>{tokens(k)}</dd>'
                    for k in ("night", "before", "day") if f[k])
    sees = (f" Here the mean stays under tau and lets the answer pass; the rmse is over it and pushes back." if limit and mean < limit < square else
            f" Here even the rmse is under tau: nothing in this answer was worth a push." if limit and square <= limit else
            f" Here both are over tau." if limit else " No barrier was used in this run.")
    return ("<p>Of the kept answers of a round, the one that the healed model leaves furthest from the reference. "
            "A mean spreads a few loud tokens over the whole answer; a root mean square hears them.</p>"
            + figure([strip], f"KL(day ‖ reference) at each token, from clear at 0 to full colour at {top:.2f} nats." + (" Bold: over the barrier’s tau." if tau else "") + (" A selection of the rounds." if len(shown) < len(found) else ""), "wide")
            + figure([plot.svg()], f"The loudest of these answers, day {worst}: rmse is {square / mean if mean else 1:.1f} times the mean.{sees}", "wide")
            + f'<dl class="strips">{texts}</dl>')


def foundations(run: Run) -> str:
    last = run.final or (run.days[max(run.days)] if run.days else None)
    rows = [r for r in (run.prompted, run.night, last) if r and r["moved"]]
    names = [f for f in FOUNDATIONS if any(f in r["moved"] for r in rows)] + sorted({f for r in rows for f in r["moved"]} - set(FOUNDATIONS))[:8]
    if not names:
        return missing("No row beside the base has been measured yet.")
    values = [m + s * (e or 0) for r in rows for m, e in r["moved"].values() for s in (-1, 1)] + [0.0]
    plot = Plot("Nats each foundation moved from the base: " + "; ".join(f"{r['name']}: " + ", ".join(f"{f} {fmt(m, '+.2f', e)}" for f, (m, e) in r["moved"].items()) for r in rows),
                values, [0, len(names)], "nats from the base", "", h=400, left=82)
    plot.back = [b for b in plot.back if 'text-anchor="end"' not in b and "rotate" not in b]    # rows have names, not numbers
    x0 = plot.x(0)
    plot.back.append(f'<path class="level rule" d="M{x0},{plot.top}V{plot.bottom}"/>')
    for i, name in enumerate(names):
        y = len(names) - i - 0.5
        plot.back.append(f'<text class="tick {"target" if name == run.target() else ""}" x="{plot.left - 8}" y="{plot.y(y) + 4}" text-anchor="end">{esc(name, 12)}</text>'
                         f'<path class="grid" d="M{plot.left},{plot.y(y - .5)}H{plot.right}"/>')
        for j, r in enumerate(rows):
            if name in r["moved"]:
                m, e = r["moved"][name]
                plot.mark(r["kind"], m, y + 0.26 * (1 - j), f"{r['name']}: {name} {fmt(m, '+.3f', e)} nats", ex=e)
    more = table(["row", *names], [[r["name"], *(fmt(r["moved"].get(f, (None, None))[0], "+.2f", r["moved"].get(f, (None, None))[1]) for f in names)] for r in run.rows[:200] if r["moved"]], "numbers")
    return plot.svg(), rows, more


def moves(run: Run) -> str:
    """The map and the foundations stand side by side: both are nats from the base."""
    chart, other = plane(run), foundations(run)
    if isinstance(other, str):
        return other
    svg, rows, more = other
    return figure([chart, svg], "Left: on the dashed lines target and counterpart move alike; the closer to the target’s own axis, the more surgical. Right: every foundation; "
                  + key_line(*[r["kind"] for r in rows]) + f" ({', '.join(r['name'] for r in rows)}). Whiskers: one standard error, paired over vignettes."
                  ) + f"<details><summary>Every foundation in numbers</summary>{more}</details>"


def healing(run: Run) -> str:
    steps, starts = [], {}
    for n in sorted(run.heals):
        for s in run.heals[n].get("steps") or []:
            if isinstance(s, dict):
                starts.setdefault(n, len(steps))
                steps.append((len(steps), *(num(s.get(k)) for k in ("nll", "div", "div_max")), (num(s.get("fired")) or 0) > 0, n))
    if not steps:
        return missing("No round has trained yet.")
    per = math.ceil(len(steps) / 1200)
    def thin(i, pick):
        groups = [[s[i] for s in steps[j:j + per] if s[i] is not None] for j in range(0, len(steps), per)]
        return [(j * per, pick(g)) for j, g in enumerate(groups) if g]
    nll, div, peak = thin(1, statistics.fmean), thin(2, statistics.fmean), thin(3, max)
    taus = {n: num(run.heals[n].get("tau")) for n in starts if num(run.heals[n].get("lam_eff"))}
    panels = []
    for name, lines, label in (("nll", [(nll, "healed", "")], "nll (nats per token)"), ("D", [(peak, "peak", ""), (div, "healed", "")], "D (nats)")):
        values = [y for points, _, _ in lines for _, y in points] + (list(taus.values()) if name == "D" else
                                                                     [num(run.heals[n].get(k)) for n in starts for k in ("val_nll_before", "val_nll_after")])
        if not any(v is not None for v in values):
            continue
        plot = Plot(f"{name} at each of {len(steps)} optimiser steps of {len(starts)} rounds", [0, len(steps)], [*values, 0.0 if name == "D" else None], "optimiser step, all rounds", label, w=900, h=236, right=80, top=24, room=0.005, whole_x=True)
        if name == "D":
            for j in range(0, len(steps), per):
                if any(s[4] and s[5] in taus for s in steps[j:j + per]):
                    plot.back.append(f'<path class="fired" d="M{plot.x(j - per / 2)},{plot.top}H{max(plot.x(j + per / 2), plot.x(j - per / 2) + 0.6)}V{plot.bottom}H{plot.x(j - per / 2)}Z"/>')
        ends = [*list(starts.values())[1:], len(steps)]
        for (n, begin), end in zip(starts.items(), ends):
            plot.back.append(f'<path class="grid" d="M{plot.x(begin)},{plot.top}V{plot.bottom}"/>')
            if len(starts) <= 24:
                word = f"round {n}" if len(starts) <= 10 else f"r{n}"
                plot.back.append(f'<text class="tick" x="{plot.x(begin) + 3}" y="{plot.top - 6}">{word}</text>')
            if name == "D" and taus.get(n) is not None:
                plot.back.append(f'<path class="level tau" d="M{plot.x(begin)},{plot.y(taus[n])}H{plot.x(end)}"/>')
            if name == "nll":
                plot.line([(begin, num(run.heals[n].get("val_nll_before"))), (end, num(run.heals[n].get("val_nll_after")))], "val")
        for points, kind, _ in lines:
            plot.line(points, kind)
        if name == "D" and taus:
            last = next(reversed(taus.values()))
            plot.levels.append((plot.y(last), f"tau {last:.3f}", "tau"))
        panels.append(plot.svg())
    skipped = sum(len(h.get("skipped") or []) for h in run.heals.values())
    warned = {n: h["warning"] for n, h in run.heals.items() if h.get("warning")}
    return (figure(panels, "Above: nll of the training answers; dashed, from before to after a round: nll of prompts held out from it. Below: D, the mean of a step’s answers (line) and its largest (thin); "
                   "" + ("shaded where the barrier fired, because an answer was over tau." if taus else "no barrier was used.") + (f" Points are groups of {per} steps." if per > 1 else ""), "wide")
            + (f'<p class="note">{skipped} steps were skipped: their loss or gradient was not finite.</p>' if skipped else "")
            + "".join(f'<p class="note">Round {n}: {esc(text)}.</p>' for n, text in list(warned.items())[:12]))


def inside(run: Run) -> str:
    vectors = {n: e for e in run.of("vector") if (n := run.round(e)) is not None}
    spectra = {n: [sorted(nums(x), reverse=True) for x in (h.get("singular") or {}).values()] for n, h in run.heals.items()}
    spectra = {n: [max(statistics.fmean(col), 0.0) for col in zip(*rows)] for n, rows in spectra.items() if rows and any(rows)}
    panels = []
    cosines = [(n, layer, num(c)) for n, e in sorted(vectors.items()) for layer, c in (e.get("cosine") or {}).items()]
    if any(c is not None for _, _, c in cosines):
        plot = Plot("Cosine of each round’s vector with the base’s own: " + "; ".join(f"round {n} layer {esc(layer, 8)} {fmt(c, '.3f')}" for n, layer, c in cosines[:60]),
                    [n for n, _, _ in cosines], [c for _, _, c in cosines] + [1.0, 0.0], "round", "cosine with round 0’s vector", whole_x=True)
        layers = list(dict.fromkeys(layer for _, layer, _ in cosines))
        for layer in chosen(list(range(len(layers))), 8):
            points = [(n, c) for n, name, c in cosines if name == layers[layer]]
            plot.line(points, "plain", f"block {layers[layer][:8]}: {fmt(points[-1][1], '.3f')}")
            for n, c in points:
                plot.mark("dot", n, c, f"round {n}, block {layers[layer][:8]}: cosine {fmt(c, '.4f')}", more="plain")
        panels.append(plot.svg())
    if any(v > 0 for s in spectra.values() for v in s):
        shown = chosen(sorted(spectra), 8)
        values = [v for n in shown for v in spectra[n] if v > 0]
        plot = Plot("Singular values of each round’s update, mean over adapted Linears: " + "; ".join(f"round {n} " + " ".join(f"{v:.2g}" for v in spectra[n][:8]) for n in shown),
                    [1, max(len(spectra[n]) for n in shown)], values, "singular value, largest first", "mean over Linears (log)", log_y=True, right=70, whole_x=True)
        for i, n in enumerate(shown):
            points = [(k + 1, v) for k, v in enumerate(spectra[n])]
            plot.line(points, "healed", more="" if i == len(shown) - 1 else "faint")
            for k, v in points:
                plot.mark("dot", k, v, f"round {n}: singular value {k} is {v:.3g}", more="healed" + ("" if i == len(shown) - 1 else " faint"))
            if i in (0, len(shown) - 1) and points[-1][1] > 0:
                plot.labels.insert(0, (plot.x(points[-1][0]), plot.y(points[-1][1]), f"round {n}", "healed"))
        panels.append(plot.svg())
    if not panels:
        return missing("This run has neither cosines nor singular values: no round has got that far, or an older version wrote it.")
    return figure(panels, "Left: does the persona still point the same way in the healed model? Right: the update of a round, s·B·A. "
                  "A flat line uses its whole rank; one that falls steeply is a few directions.")


def dropped(run: Run) -> str:
    made = [e for e in run.of("completion") if isinstance(e.get("verdict"), dict)]
    if not made:
        return missing("No answers have been sampled for training yet.")
    out = [e for e in made if not e["verdict"].get("kept")]
    rounds = chosen(sorted({n for e in made if (n := run.round(e)) is not None}), 12)
    if not out:
        return f"<p>All {len(made)} answers passed the filter.</p>"
    rows = []
    rules = sorted({str(e["verdict"].get("rule") or "?") for e in out}, key=lambda rule: -sum(str(e["verdict"].get("rule") or "?") == rule for e in out))
    def excess(e):
        value, limit = num(e["verdict"].get("value")), num(e["verdict"].get("limit"))
        return -math.inf if value is None else value / limit if limit else value
    train = run.items.get("train") if isinstance(run.items.get("train"), list) else []
    samples = []
    for rule in rules[:20]:
        some = [e for e in out if str(e["verdict"].get("rule") or "?") == rule]
        worst, v = max(some, key=excess), max(some, key=excess)["verdict"]
        counts = [sum(1 for e in some if run.round(e) == n) for n in rounds]
        rows.append([f"{esc(rule, 40)}<small>{RULES.get(rule, '')}</small>", *(str(c or "·") for c in counts), str(len(some)), fmt(v.get("limit")), fmt(v.get("value"))])
        at, match = worst.get("prompt"), f", matched “{esc(v['match'], 60)}”" if v.get("match") else ""
        asked = said(train[at], 200) if isinstance(at, int) and 0 <= at < len(train) else "<em>unknown prompt</em>"
        samples.append(f'<figure class="sample"><blockquote>{said(worst.get("text", ""))}</blockquote><figcaption><b>{esc(rule, 40)}</b> {fmt(v.get("value"))}, limit {fmt(v.get("limit"))}'
                       f'{match}; round {esc(worst.get("round"), 12)}, dose {fmt(worst.get("coeff"))}. Asked: {asked}</figcaption></figure>')
    return (f"<p>{len(out)} of {len(made)} sampled answers ({percent(len(out), len(made))}) were dropped before training, each by the first rule it broke.</p>"
            + table(["rule", *(f"r{n}" for n in rounds), "all", "limit", "worst"], rows, "numbers rules")
            + '<h3>The worst answer by each rule</h3><div class="samples">' + "".join(samples) + "</div>")


def settings(run: Run) -> str:
    calibrated = {"lr": "from the width", "target": "from the persona", "direction": "from the persona"}
    rows = []
    for key, value in run.options.items():
        if key in run.defaults and value != run.defaults[key]:
            how = f" <small>{calibrated[key]}</small>" if key in calibrated and run.defaults[key] in (0, 0.0, "") and not any(
                str(a).startswith("--" + key) for a in run.record.get("argv") or []) else ""
            rows.append([f"<code>--{esc(key, 60).replace('_', '-')}</code>{how}", esc(short(value), 300), esc(short(run.defaults[key]) or "(empty)", 120)])
    measured = []
    layers = next(iter(run.of("layers")), {})
    for key, name in (("steer", "steered blocks"), ("lora", "adapted blocks")):
        if layers.get(key):
            measured.append([name, esc(", ".join(map(str, layers[key])), 300)])
    tau = num(run.record.get("tau")) or next((num(e.get("tau")) for e in run.of("tau")), None)
    if tau:
        measured.append(["tau", f"{tau:.4f} nats"])
    limits = next((e.get("limits") for e in run.of("limits")), None)
    measured += [[f"filter: {esc(k, 30)}", fmt(v, ".3g")] for k, v in (limits if isinstance(limits, dict) else {}).items()]
    return ((table(["option", "here", "default"], rows) if rows else "<p>Every option has its default.</p>")
            + ("<h3>Measured on the model itself</h3>" + table(["what", "value"], measured) if measured else ""))


def short(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def environment(run: Run) -> str:
    record, rows = run.record, []
    for name in ("versions", "machine"):
        rows += [[esc(k, 40), esc(v, 200)] for k, v in (record.get(name) if isinstance(record.get(name), dict) else {}).items() if v != ""]
    for key, name in (("git", "commit (+ = with changes)"), ("code", "checksum of the code"), ("weights", "checksum of the base’s weights"), ("status", "status")):
        if record.get(key):
            rows.append([name, esc(record[key], 200)])
    if num(record.get("started")) and 0 < record["started"] < 2 ** 33:
        rows.append(["started", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(record["started"]))])
    return table(["what", "value"], rows) if rows else missing("The run recorded nothing about its environment.")


def again(run: Run) -> str:
    where = shlex.quote(str(run.folder))
    commands = [("repeat", str(run.record.get("command") or "")), ("resume", f"python loop.py --resume {where}")]
    if run.final:
        commands += [("chat", f"python loop.py chat {where}"), ("export", f"python lora.py export {where} --to peft")]
    commands.append(("this page", f"python report.py {where}"))
    return '<dl class="commands">' + "".join(f"<div><dt>{name}</dt><dd><code>{esc(text, 2000)}</code></dd></div>" for name, text in commands if text) + "</dl>"


SECTIONS = [("answers", "Before and after", answers), ("trajectory", "Trajectory: what the trait costs", trajectory), ("map", "What else moved", moves),
            ("dose", "The dose", dose), ("heat", "Where the worst answer breaks: rmse, not mean", heat), ("healing", "Healing, step by step", healing),
            ("inside", "The vector and the fold", inside), ("dropped", "What was dropped, and why", dropped),
            ("settings", "Settings that differ from the defaults", settings), ("environment", "Environment", environment), ("again", "Do it again", again)]


def page(title: str, body: str) -> str:
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"""<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">"""
            f"<title>{esc(title, 120)}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n")


def section(run, ident: str, title: str, draw) -> str:
    """One part of the page. What a damaged event holds is not known beforehand: then the part says so, and the rest stands."""
    try:
        body = draw(run)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        body = missing(f"This part cannot be drawn from this run’s events ({esc(type(error).__name__)}: {esc(error, 120)}).")
    return f'<section id="{ident}"><h2>{title}</h2>{body}</section>'


def render(run: Run) -> str:
    """report.html of a run, as text."""
    nav = '<nav aria-label="Sections">' + " ".join(f'<a href="#{ident}">{title.split(":")[0]}</a>' for ident, title, _ in SECTIONS) + "</nav>"
    return page(f"{run.options.get('persona', 'run')} on {run.options.get('model', '?')}: steer, heal", opening(run) + nav + "".join(section(run, *s) for s in SECTIONS)
                + f"<footer>Written by report.py from run.json and events.jsonl of {esc(run.folder.name, 200)}. No script, nothing fetched.</footer>")


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
    named, known, groups = arms(runs), [], {}
    for (arm, name), run in zip(named, runs):
        for n, row in [(-1, run.base)] * bool(run.base) + list(run.days.items()):
            if row["trait"] is not None and row["text"] is not None:
                known.append((arm, n, row, name, run.undone(row)))
                groups.setdefault(arm, {}).setdefault(n, []).append(row)
    order = list(dict.fromkeys(arm for arm, _ in named))
    colours = {arm: f"arm{i % 6}" for i, arm in enumerate(order)}
    label = {arm: arm if len(arm) <= 20 else chr(65 + i % 26) for i, arm in enumerate(order)}      # long ones get a letter
    body = []
    for key, what in (("weights", "weights of the base"), ("items", "prompts"), ("versions", "versions"), ("code", "code")):
        if len({json.dumps(r.record.get(key), sort_keys=True) for r in runs}) > 1:
            body.append(f'<p class="note">The runs differ in their {what} too, so in more than their options.</p>')

    panels = []
    if known:
        floor = min([gap(row, "text") for _, _, row, _, _ in known if gap(row, "text") > 1e-9], default=0.002) / 2

        def lost(row):
            return max(gap(row, "text"), floor)
        first = Plot("Trait against 1 − text coherence, every day of every run", [row["trait"] for _, _, row, _, _ in known],
                     [lost(row) for _, _, row, _, _ in known], "trait (nats from the base)", "1 − text coherence (log)",
                     log_y=True, flip=True, w=360, h=300)
        first.corner("more trait, more coherent ↗")
        views = [(first, lambda n, row: (row["trait"], lost(row)))]
        days = [(arm, n, row, name, undone) for arm, n, row, name, undone in known if n >= 0]
        for key, what in (("trait", "trait (nats from the base)"), ("text", "text coherence")) if days else ():
            plot = Plot(f"{what}, by round", [n for _, n, _, _, _ in days], [row[key] for _, _, row, _, _ in days], "round", what,
                        whole_x=True, w=360, h=300)
            views.append((plot, lambda n, row, key=key: (n if n >= 0 else None, row[key])))
        for plot, at in views:
            for arm, n, row, name, undone in known:
                if len(groups[arm][n]) > 1 or undone:
                    says = f"{name}, {row['name']}: trait {fmt(row['trait'], '+.3f')} nats, text {fmt(row['text'], '.3f')}"
                    plot.mark("dot", *at(n, row), says, more=f"{colours[arm]} {'undone' if undone else 'faint'}")
            for arm in groups:
                means = [(n, {k: statistics.fmean(r[k] for r in rows) for k in ("trait", "text")}) for n, rows in sorted(groups[arm].items())]
                for n, row in means:
                    count = len(groups[arm][n])
                    says = f"{arm}, {'base' if n < 0 else f'day {n}'}, mean of {count}: trait {row['trait']:.3f}, text {row['text']:.3f}"
                    plot.mark("base" if n < 0 else "healed", *at(n, row), says, more=colours[arm])
                if plot is not first:
                    plot.line([at(n, row) for n, row in means if n >= 0], colours[arm])
                x, y = at(*means[-1])
                if x is not None:
                    plot.labels.append((plot.x(x), plot.y(y), label[arm], colours[arm]))
            panels.append(plot.svg())
    keys = "".join(f'<li><svg viewBox="-9 -9 18 18" aria-hidden="true"><path class="mark {colours[arm]}" d="{MARKS["healed"]}"/></svg>'
                   f'{said(f"{label[arm]}: {arm}" if label[arm] != arm else arm)}</li>' for arm in order)
    note = "Marks are days, the star the base, each the mean over an arm’s runs; small dots are single runs, hollow if rolled back."
    body.append(figure(panels, f'<ul class="arms">{keys}</ul>{note}', "three") if panels else missing("None of these runs has measured a row yet."))
    rows = []
    for (_, name), run in zip(named, runs):
        mood, head, _ = verdict(run)
        end = run.final or dict.fromkeys(("trait", "trait_se", "text", "text_se", "coherence", "off_target")) | {"name": "none"}
        link = urllib.parse.quote(os.path.relpath(run.folder / "report.html", out).replace(os.sep, "/"))
        rows.append([f'<a href="./{link}">{said(name)}</a>', f'<span class="{mood}">{head}</span>', end["name"], fmt(end["trait"], "+.3f", end["trait_se"]),
                     fmt(end["text"], ".3f", end["text_se"]), fmt(end["coherence"], ".4f"), fmt(end["off_target"], ".3f"), str(len(run.gates))])
    body.append(table(["run", "verdict", "last accepted", "trait, nats", "text", "coherence", "off-target", "rounds"], rows, "runs"))
    return page("Runs compared", f'<header><p class="eyebrow">steer-heal-love</p><h1>{len(runs)} runs over each other</h1></header>'
                f'<section>{"".join(body)}</section><footer>Written by report.py. No script, nothing fetched.</footer>')


# ---- the diary -------------------------------------------------------------------------------------------------------


def diary(run: Run, n_prompts: int = 3) -> str:
    """Markdown: per held-out prompt the base's answer, then night and day of every round, with trait and coherence."""
    lines = [f"# Diary of {inert(run.options.get('model', '?'))}, persona {inert(run.options.get('persona', '?'))}\n",
             f"\n`{UNSEEN.sub(' ', str(run.record.get('command', ''))[:2000]).replace('`', '')}`  \nstatus: {inert(run.record.get('status', 'unknown'))}\n",
             *(f"\n{inert(note)}\n" for note in run.notes)]
    if not run.rows:
        return "".join(lines) + "\nThe run has not measured anything yet.\n"
    lines.append("\nNight = the steered model's answer, dropped. Day = the healed model's, without steering. Greedy, on prompts\n"
                 "that no stage has trained on.\n")
    prompts = max((row["diary"] for row in run.rows), key=len)[:n_prompts]
    for i, asked in enumerate(prompts):
        lines.append(f"\n## {inert(asked.get('prompt', ''))}\n\n")
        for row in run.rows:
            told = row["diary"][i] if i < len(row["diary"]) else {}
            name = row["name"].capitalize() + (" (rolled back)" if run.undone(row) else "")
            own = f", this answer {told['coherence']:.2f}" if num(told.get("coherence")) is not None else ""
            numbers = f"trait {fmt(row['trait'], '+.2f')} nats, coherence {fmt(row['coherence'], '.3f')}, text {fmt(row['text'])}{own}"
            lines.append(f"- **{name}**, {numbers}:\n  {inert(told.get('text', '')).strip() or '*(nothing)*'}\n")
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
    finally:
        temporary.unlink(missing_ok=True)                       # still there only if something went wrong


def write(folder, out=None) -> Path:
    """report.html and diary.md of a run folder, into it or into `out`; returns the path of report.html."""
    run, out = Run(Path(folder)), Path(out or folder)
    write_whole(out / "diary.md", diary(run).encode("utf-8", "replace"))
    write_whole(out / "report.html", render(run).encode("utf-8", "replace"))
    return out / "report.html"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="write report.html and diary.md of runs again; of several also compare.html")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, help="folder to write to; default: the run's own, for compare.html the first run's parent")
    args = parser.parse_args(argv)
    try:
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
        for name in args.runs:
            print(write(name, args.out if len(args.runs) == 1 else None))
        if len(args.runs) > 1:
            out = args.out or Path(args.runs[0]).resolve().parent
            write_whole(out / "compare.html", compare([Run(Path(name)) for name in args.runs], out).encode("utf-8", "replace"))
            print(out / "compare.html")
    except (ValueError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    return 0


# ---- the page's style: light, dark, narrow, paper --------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --card: #fff; --ink: #1c1e21; --soft: #5b6066; --line: #dcd8cf; --grid: #ebe8e1;
  --red: #b8431a; --green: #00735a; --blue: #3a5fa8; --warn: 214 122 22; --heat: 196 62 20;
  --arm0: #0072b2; --arm1: #b8431a; --arm2: #00735a; --arm3: #a2397c; --arm4: #806000; --arm5: #444a52 }
@media (prefers-color-scheme: dark) { :root { --paper: #141619; --card: #1b1e22; --ink: #e7e5e0; --soft: #a3a7ad; --line: #363b42; --grid: #272b30;
  --red: #ff9468; --green: #4bd2a5; --blue: #93b7f5; --warn: 222 140 40; --heat: 200 74 30;
  --arm0: #6cb8f0; --arm1: #ff9468; --arm2: #4bd2a5; --arm3: #ee8fc6; --arm4: #e3c04a; --arm5: #c5cad1 } }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 72rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; overflow-wrap: anywhere }
h1, h2, h3, blockquote, .answers td, .asked th, .tokens { font-family: Charter, "Bitstream Charter", "Iowan Old Style", "Source Serif 4", Georgia, "Liberation Serif", serif }
h1 { font-size: clamp(1.5rem, 1.1rem + 2vw, 2.3rem); line-height: 1.18; font-weight: 600; margin: 0 0 .8rem; text-wrap: balance; letter-spacing: -.01em }
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
.note { border: 1px solid rgb(var(--warn)); border-radius: 6px; padding: .45rem .8rem; font-size: .92rem; max-width: none }
.missing { color: var(--soft); font-style: italic }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1px; background: var(--line); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; margin: 0 }
.tiles div { background: var(--card); padding: .8rem 1rem }
.tiles dt { color: var(--soft); font-size: .85rem } .tiles dd { margin: 0 }
.tiles b { display: block; font-size: 1.75rem; line-height: 1.25; font-weight: 600; font-variant-numeric: tabular-nums; letter-spacing: -.01em }
.tiles span { font-size: .85rem; color: var(--soft) }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 1.4rem 0 0; font-size: .9rem }
a { color: var(--blue); text-underline-offset: .2em; text-decoration-thickness: 1px }
section { margin-top: 2.2rem; padding-top: 2rem; border-top: 1px solid var(--line) }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--soft); font-size: .85rem }
figure { margin: 1rem 0 1.2rem }
figcaption { color: var(--soft); font-size: .9rem; max-width: 52rem; margin-top: .5rem }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem 1.5rem; align-items: start }
.three .panels { grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)) }
.wide .panels { grid-template-columns: minmax(0, 1fr) }
.panel { overflow-x: auto; min-width: 0 } .panel > svg { display: block; width: 100%; height: auto } .wide .panel > svg { min-width: 40rem }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--soft); font-variant-numeric: tabular-nums }
svg .axis { fill: var(--soft) } svg .corner { font-style: italic; font-size: 11.5px } svg .target { font-weight: 700; fill: var(--ink) }
svg .name { fill: var(--ink); font-weight: 600; paint-order: stroke; stroke: var(--paper); stroke-width: 3px; stroke-linejoin: round }
svg .number { fill: var(--soft) } svg .number.over { fill: var(--ink); font-weight: 700 }
.grid { stroke: var(--grid); fill: none } .level { stroke: var(--soft); stroke-dasharray: 5 4; fill: none } .line { fill: none; stroke-width: 1.4; stroke-linejoin: round }
.line.rule { stroke: var(--soft); stroke-dasharray: 5 4; stroke-width: 1 } .line.thin { stroke-width: 1; opacity: .45 } .line.faint { opacity: .3 }
.line.search { stroke: var(--red); stroke-width: 1.2 } .line.val { stroke: var(--blue); stroke-dasharray: 4 3 } .line.peak { stroke: var(--green); stroke-width: .8; opacity: .45 } .line.plain { stroke: var(--blue) }
.mark { stroke: var(--paper); stroke-width: 1 } .whisker { stroke-width: 1.3; fill: none; opacity: .75 }
.mark.base { fill: var(--ink) } .mark.prompted { fill: var(--blue) } .mark.steered { fill: var(--red) } .mark.healed { fill: var(--green) } .mark.plain { fill: var(--blue) } .mark.search { fill: var(--red); opacity: .55 } .mark.faint { opacity: .4 }
.whisker.base { stroke: var(--ink) } .whisker.prompted { stroke: var(--blue) } .whisker.steered { stroke: var(--red) } .whisker.healed, .line.healed { stroke: var(--green) }
svg .name.steered { fill: var(--red) } svg .name.healed { fill: var(--green) } svg .name.prompted { fill: var(--blue) }
.mark.undone { fill: var(--paper); stroke: var(--green); stroke-width: 1.8 }
.heat { fill: rgb(var(--heat) / var(--k)) } .bar { fill: rgb(var(--heat)) } .fired { fill: rgb(var(--warn) / .28) }
.level.tau { stroke: var(--ink) } .level.rmse { stroke: var(--red); stroke-dasharray: none; stroke-width: 1.6 } .level.mean { stroke: var(--blue); stroke-dasharray: none; stroke-width: 1.6 }
svg .name.rmse { fill: var(--red) } svg .name.mean { fill: var(--blue) }
.key { white-space: nowrap; margin-right: .6em; color: var(--ink) } .key svg { width: 1em; height: 1em; vertical-align: -.12em; margin-right: .25em }
.arms { list-style: none; margin: 0 0 .5rem; padding: 0; color: var(--ink) } .arms svg { width: 1em; height: 1em; vertical-align: -.12em; margin-right: .4em } .runs td { white-space: nowrap } .runs tbody th, .runs td:nth-child(2) { white-space: normal; min-width: 13rem }
.scroll { overflow-x: auto; margin: .8rem 0 } .scroll:focus-visible { outline: 2px solid var(--blue) }
table { border-collapse: collapse; font-size: .92rem } th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; font-weight: 400 }
thead th { color: var(--soft); font-size: .85rem; border-bottom: 1px solid var(--soft); white-space: nowrap; vertical-align: bottom }
.numbers td { font-variant-numeric: tabular-nums; white-space: nowrap } .numbers td:last-child { white-space: normal; min-width: 7rem } .numbers th { white-space: nowrap } .numbers small { display: block; white-space: normal; width: 20rem; max-width: 60vw }
.answers { width: 100%; min-width: 52rem; table-layout: fixed; border-collapse: separate; border-spacing: 3px 0 } .answers th, .answers td { border: 0; padding: .5rem .6rem }
.answers thead th { border-top: 4px solid var(--soft); white-space: normal; color: var(--ink); line-height: 1.3; vertical-align: top } .answers thead small { display: block; color: var(--soft) }
.answers th.steered { border-color: var(--red) } .answers th.healed { border-color: var(--green) } .answers th.prompted { border-color: var(--blue) }
.asked th { padding: .9rem .6rem .35rem 0; font-style: italic; color: var(--soft); font-size: .98rem }
.answers td { background: linear-gradient(rgb(var(--warn) / var(--k, 0)) 0 0), var(--card); border-radius: 4px; font-size: .97rem; line-height: 1.42; overflow: clip } .answers td small { display: block; text-align: right; font: .75rem system-ui, sans-serif; color: inherit; opacity: .75 }
.tokens { white-space: pre-wrap; line-height: 1.9; max-width: none; margin: 0 } .tokens span { background: rgb(var(--heat) / var(--k)); border-radius: 2px; padding: .12em 0 }
.strips dt { font-weight: 600; margin-top: .8rem } .strips dd { margin: .15rem 0 0 } .strips small { font-weight: 400; margin-left: .5em }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem } .sample { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem; overflow: clip } blockquote { margin: 0 }
details { margin: .6rem 0 } summary { cursor: pointer; color: var(--blue) }
code { font: .9em ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace }
.commands { margin: 0 } .commands div { display: grid; grid-template-columns: 6rem minmax(0, 1fr); gap: .2rem 1rem; padding: .4rem 0; border-bottom: 1px solid var(--line) } .commands dt { color: var(--soft) } .commands dd { margin: 0 }
bdi { unicode-bidi: isolate }
""" + "".join(f".mark.arm{i} {{ fill: var(--arm{i}) }} .line.arm{i} {{ stroke: var(--arm{i}) }} svg .name.arm{i} {{ fill: var(--arm{i}) }} "
              f".mark.undone.arm{i} {{ fill: var(--paper); stroke: var(--arm{i}) }}\n" for i in range(6)) + """
@media (max-width: 40rem) { main { padding: 1.4rem .9rem 3rem } .tiles { grid-template-columns: 1fr 1fr } .tiles div { padding: .6rem .7rem } .tiles b { font-size: 1.4rem } .verdict { padding-left: .9rem }
  .commands div { grid-template-columns: minmax(0, 1fr) }
  .answers, .answers tbody, .answers tr, .answers td, .answers th { display: block; min-width: 0 } .answers thead { display: none }
  .answers td { margin: 0 0 4px; border-left: 4px solid var(--soft) } .answers td.steered { border-color: var(--red) } .answers td.healed { border-color: var(--green) } .answers td.prompted { border-color: var(--blue) }
  .answers td::before { content: attr(data-who); display: block; font: 600 .78rem system-ui, sans-serif; color: var(--soft) } }
@media print { :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --grid: #ddd; --red: #b8431a; --green: #00735a; --blue: #3a5fa8; --warn: 214 122 22; --heat: 196 62 20; color-scheme: light }
  @page { margin: 13mm } html { font-size: 9.5pt } .tiles { grid-template-columns: repeat(4, 1fr) } section { margin-top: 1.2rem; padding-top: 1.2rem } main { max-width: none; padding: 0 } nav, summary { display: none } details::details-content { content-visibility: visible; block-size: auto }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact } .scroll, .panel { overflow: visible } .answers, .wide .panel > svg { min-width: 0 } .answers td { font-size: 8.5pt }
  figure, tr, .tiles, .verdict, .sample, dd { break-inside: avoid } h2, h3, dt { break-after: avoid } }
"""

if __name__ == "__main__":
    sys.exit(main())
