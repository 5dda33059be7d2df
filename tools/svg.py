"""SVG: one small panel of a figure, as text: axes with units, marks with whiskers, lines, and labels.

    plot = Plot("what is told to who cannot see it", xs, ys, "dose", "survival")
    plot.mark("steered", x, y, "shown by a pointer that rests on it", "label", ex=error)
    plot.svg()

A label stands where it hides nothing. Colours are classes, which the page's style sets (report.css).
"""
import math

from tools.files import inert

MARKS = {"base": "M0,-8 2.1,-2.6 7.6,-2.5 3.2,1 4.7,6.5 0,3.3 -4.7,6.5 -3.2,1 -7.6,-2.5 -2.1,-2.6Z",  # star
         "prompted": "M0,-6 5.5,4 -5.5,4Z", "steered": "M0,-6 6,0 0,6 -6,0Z",      # triangle, diamond
         "healed": "M-5,0A5,5 0 1 1 5,0A5,5 0 1 1 -5,0Z"}
# where a label may stand beside its mark
AROUND = ((1, 0), (-1, 0), (0, -1), (0, 1), (.7, -.7), (.7, .7), (-.7, -.7), (-.7, .7))


def esc(text, limit: int = 600) -> str:
    return inert(text, "html", limit)


class Scale:
    """Values to screen positions along one axis, and its ticks. Values that are None are drawn nowhere."""

    def __init__(self, values, start: float, end: float, room: float = 0.07):
        known = [v for v in values if v is not None]
        if not known:
            raise ValueError("no values")
        low, high = min(known), max(known)
        if high - low < 1e-9 * max(1, abs(high)):
            around = 0.5 * abs(low) or 0.5
            low, high = low - around, high + around
        self.low, self.high = low - room * (high - low), high + room * (high - low)
        self.start, self.end = start, end

    def __call__(self, v: float) -> float:
        return round(self.start + (v - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self, n: int = 5) -> list[float]:
        raw = (self.high - self.low) / n
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(d * power for d in (1, 2, 2.5, 5, 10) if d * power >= raw * 0.999)
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


class Plot:
    """One panel. xs, ys: all that will be drawn on each axis. Then come mark, line, level and write."""

    def __init__(self, alt: str, xs, ys, x_label: str, y_label: str, *, whole_x=False, w=440, h=310,
                 right=14, top=12, room=0.07):
        self.alt, self.w, self.h = alt, w, h
        self.left, self.right, self.top, self.bottom = 62, w - right, top, h - 46
        self.x = Scale(xs, self.left, self.right, room)
        self.y = Scale(ys, self.bottom, self.top)
        self.back, self.front, self.labels, self.taken, self.whiskers = ([] for _ in range(5))
        for t in sorted({round(t) for t in self.x.ticks()}) if whole_x else self.x.ticks():
            if self.left <= self.x(t) <= self.right:
                self.back.append(f'<path class="grid" d="M{self.x(t)},{self.top}V{self.bottom}"/>')
                self.write(self.x(t), self.bottom + 16, tick(t), "tick", "middle")
        for t in self.y.ticks():
            self.back.append(f'<path class="grid" d="M{self.left},{self.y(t)}H{self.right}"/>')
            self.write(self.left - 6, self.y(t) + 4, tick(t), "tick", "end")
        self.write((self.left + self.right) / 2, h - 8, x_label, "axis", "middle")
        middle = (self.top + self.bottom) / 2
        self.back.append(f'<text class="axis" transform="translate(13,{middle}) rotate(-90)" '
                         f'text-anchor="middle">{esc(y_label)}</text>')

    def write(self, x: float, y: float, text: str, kind: str, anchor: str = "start") -> None:
        place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
        self.back.append(f'<text class="{kind}" {place}>{esc(text)}</text>')

    def mark(self, kind: str, x, y, says: str, label: str = "", *, ex=None, ey=None, more: str = "") -> None:
        """A mark with its whiskers of one standard error; `says` is shown by a pointer that rests on it."""
        if x is None or y is None:
            return
        px, py = self.x(x), self.y(y)
        for axis, v, e in ((self.x, x, ex), (self.y, y, ey)):
            if e and e > 0:
                a, b = sorted((axis(v - e), axis(v + e)))
                d = f"M{a},{py}H{b}" if axis is self.x else f"M{px},{a}V{b}"
                self.back.append(f'<path class="whisker {kind} {more}" d="{d}"/>')
                self.whiskers.append((a, py - 1, b, py + 1) if axis is self.x else (px - 1, a, px + 1, b))
        self.front.append(f'<path class="mark {kind} {more}" transform="translate({px},{py})" '
                          f'd="{MARKS[kind]}"><title>{esc(says)}</title></path>')
        self.taken.append((px - 6, py - 6, px + 6, py + 6))
        if label:
            self.labels.append((px, py, label, f"{kind} {more}".strip()))

    def line(self, points, kind: str, label: str = "", more: str = "") -> None:
        """A line through the points that are known; its label stands at the last of them."""
        at = [(self.x(x), self.y(y)) for x, y in points if None not in (x, y)]
        if len(at) > 1:
            d = " ".join(f"{x:g},{y:g}" for x, y in at)
            self.back.append(f'<path class="line {kind} {more}" d="M{d}"/>')
        if at and label:
            self.labels.append((*at[-1], label, kind))

    def level(self, y, label: str, kind: str = "rule") -> None:
        """A horizontal line, its name under its left end."""
        if y is not None:
            x, below = self.left + 4, self.y(y) + 14
            self.back.append(f'<path class="level {kind}" d="M{self.left},{self.y(y)}H{self.right}"/>')
            self.front.append(f'<text class="name {kind}" x="{x}" y="{below:.1f}">{esc(label)}</text>')
            self.taken.append((x, below - 10, x + 7.8 * len(label), below + 2))

    def place(self, px: float, py: float, label: str, kind: str) -> None:
        """A label at the nearest free place around its mark; one that stands far off is led to it by a line.

        It hides no mark and no other label, and no whisker if it can; where nothing is free it is left out.
        """
        width = 7.8 * len(label)
        free = [(reach, self.taken + self.whiskers) for reach in (9, 17, 27, 39)]
        for reach, others in [*free, (9, self.taken), (27, self.taken)]:
            for dx, dy in AROUND:
                x = px + dx * reach - (width / 2 if dx == 0 else width if dx < 0 else 0)
                x0, y0, x1, y1 = box = x, py - 6 + dy * (reach + 4), x + width, py + 6 + dy * (reach + 4)
                inside = self.left < x0 and x1 < self.w and self.top - 8 < y0 and y1 < self.bottom + 2
                if not inside or any(x0 < t[2] and t[0] < x1 and y0 < t[3] and t[1] < y1 for t in others):
                    continue
                self.taken.append(box)
                if reach > 9:
                    to = f"{min(max(px, x0), x1):.1f},{min(max(py, y0 + 2), y1):.1f}"
                    self.back.append(f'<path class="lead" d="M{px},{py}L{to}"/>')
                where = f'class="name {kind}" x="{x0:.1f}" y="{y1 - 2:.1f}"'
                self.front.append(f"<text {where}>{esc(label)}</text>")
                return

    def svg(self) -> str:
        for label in self.labels:
            self.place(*label)
        alt = esc(self.alt, 2000)
        return (f'<svg viewBox="0 0 {self.w} {self.h}" role="img" aria-label="{alt}"><title>{alt}</title>'
                f"{''.join(self.back + self.front)}</svg>")


def tick(v: float) -> str:
    return f"{v:.4g}".replace("-", "−").replace("e+0", "e").replace("e−0", "e−")


def swatch(kind: str) -> str:
    """A mark for a figure's key."""
    return ('<svg viewBox="-9 -9 18 18" aria-hidden="true">'
            f'<path class="mark {kind}" d="{MARKS[kind]}"/></svg>')
