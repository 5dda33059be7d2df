"""Plot: a small line chart as SVG, readable on light and dark pages. Scales and ticks are the report's."""
import html
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.svg import Scale, tick                               # noqa: E402

# Okabe and Ito: safe for colour-blind readers
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLE = ("<style>text{fill:#333}line{stroke:#999}@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>")


def svg_lines(path, title: str, x_label: str, y_label: str, lines: dict[str, list[tuple[float, float]]],
              log: bool = True) -> None:
    """One line per name through its (x, y) points, labelled at its end; both axes are logarithmic if log."""
    width, height, left, right, top, bottom = 560, 320, 70, 150, 40, 50
    points, f = [p for line in lines.values() for p in line], math.log10 if log else float
    on_x = Scale([f(p[0]) for p in points], left, width - right, 0.0)
    on_y = Scale([f(p[1]) for p in points], height - bottom, top)
    floor, middle = height - bottom, (top + height - bottom) / 2

    def x(v):
        return on_x(f(v))

    def y(v):
        return on_y(f(v))

    def ticks(scale):
        digits = [d * 10.0 ** k for k in range(math.floor(scale.low), math.ceil(scale.high) + 1)
                  for d in (1, 2, 5)] if log else scale.ticks()
        return [v for v in digits if scale.low <= f(v) <= scale.high]

    def text(at_x, at_y, words, more="", anchor="middle"):
        at = f'x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}" {more}'
        return f"<text {at}>{html.escape(words)}</text>"
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
           'font-family="sans-serif" font-size="12">', f"<title>{html.escape(title)}</title>", STYLE,
           text(left, 20, title, 'font-size="14"', "start"),
           text((left + width - right) / 2, height - 10, x_label),
           text(15, middle, y_label, f'transform="rotate(-90 15 {middle})"'),
           f'<line x1="{left}" y1="{floor}" x2="{width - right}" y2="{floor}"/>']
    for v in ticks(on_x):
        out.append(text(x(v), floor + 16, tick(v) if v < 10_000 else f"{v / 1024:.0f}k"))
    for v in ticks(on_y):
        out += [text(left - 6, y(v) + 4, tick(v), anchor="end"),
                f'<line x1="{left - 3}" y1="{y(v)}" x2="{left}" y2="{y(v)}"/>']
    for (name, line), colour in zip(lines.items(), COLOURS):
        at = [(x(a), y(b)) for a, b in line]
        path_of = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
        out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path_of}"/>')
        out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in at]
        out.append(text(at[-1][0] + 8, at[-1][1] + 4, name, f'style="fill:{colour}"', "start"))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join([*out, "</svg>"]) + "\n", encoding="utf-8")
