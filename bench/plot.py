"""Plot: a small line chart as SVG, readable on light and dark pages. No packages."""
import html
import math
from pathlib import Path

# Okabe and Ito: safe for colour-blind readers
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def svg_lines(path, title: str, x_label: str, y_label: str, lines: dict[str, list[tuple[float, float]]],
              log: bool = True) -> None:
    """One line per name through its (x, y) points, labelled at its end; both axes logarithmic unless
    log=False."""
    width, height, left, right, top, bottom = 560, 320, 70, 150, 40, 50
    def scale(x):
        return math.log10(x) if log else x
    xs, ys = ([scale(p[i]) for line in lines.values() for p in line] for i in (0, 1))
    low, high = (min(ys), max(ys)) if log else (0.0, max(ys) * 1.05)
    low, high = (low - 0.1, high + 0.1) if log else (low, high)

    def at(p):
        x = left + (scale(p[0]) - min(xs)) / (max(xs) - min(xs) or 1) * (width - left - right)
        return x, height - bottom - (scale(p[1]) - low) / (high - low or 1) * (height - top - bottom)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
           'font-family="sans-serif" font-size="12">',
           f"<title>{html.escape(title)}</title>",
           "<style>text{fill:#333}line{stroke:#999}"
           "@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>",
           f'<text x="{left}" y="20" font-size="14">{html.escape(title)}</text>',
           f'<text x="{(left + width - right) / 2}" y="{height - 10}" '
           f'text-anchor="middle">{html.escape(x_label)}</text>',
           f'<text x="15" y="{height / 2}" text-anchor="middle" transform="rotate(-90 15 '
           f'{height / 2})">{html.escape(y_label)}</text>',
           f'<line x1="{left}" y1="{height - bottom}" x2="{width - right}" y2="{height - bottom}"/>',
           f'<line x1="{left}" y1="{top}" x2="{left}" y2="{height - bottom}"/>']
    for x in sorted({p[0] for line in lines.values() for p in line}):
        px = at((x, 10 ** high if log else high))[0]
        out.append(f'<text x="{px:.1f}" y="{height - bottom + 16}" text-anchor="middle">{x:g}</text>'
                   if x < 10000 else
                   f'<text x="{px:.1f}" y="{height - bottom + 16}" '
                   f'text-anchor="middle">{x / 1024:.0f}k</text>')
    ticks = [10.0 ** k * m for k in range(math.floor(low),
                                          math.ceil(high) + 1)
             for m in (1, 2, 5)] if log else [high * i / 4 for i in range(5)]
    for y in ticks:
        if low <= scale(y) <= high:
            py = at((min(p[0] for line in lines.values() for p in line), y))[1]
            out.append(f'<text x="{left - 6}" y="{py + 4:.1f}" text-anchor="end">{y:.3g}</text>')
            out.append(f'<line x1="{left - 3}" y1="{py:.1f}" x2="{left}" y2="{py:.1f}"/>')
    for (name, line), colour in zip(lines.items(), COLOURS):
        points = [at(p) for p in line]
        out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" '
                   f'points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        out.append(f'<text x="{points[-1][0] + 8:.1f}" y="{points[-1][1] + 4:.1f}" '
                   f'style="fill:{colour}">{html.escape(name)}</text>')
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join([*out, "</svg>"]) + "\n", encoding="utf-8")
