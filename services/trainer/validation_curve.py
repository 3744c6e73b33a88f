"""The validation curve as one SVG file that needs nothing else: no script, no font, no network."""

from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 720, 320
LEFT, RIGHT, TOP, BOTTOM = 48, 32, 40, 36
COLOURS = ("#1f5fbf", "#2e8b57", "#c2651a")
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)


def validation_svg(curves: Mapping[str, Points], *, title: str) -> str:
    """Up to three named curves of (step, share between 0 and 1); the first is drawn strongest."""
    last = max((step for points in curves.values() for step, _ in points), default=0) or 1

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - value)

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>']
    for level in LEVELS:
        parts.append(f'<path d="M{LEFT} {y(level):.1f}H{WIDTH - RIGHT}" stroke="#e3e6ea"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(level) + 4:.1f}" text-anchor="end">{level:g}</text>')
    for step in sorted({0, last // 2, last}):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 14}" text-anchor="middle">step {step:g}</text>')
    for index, ((name, points), colour) in enumerate(zip(curves.items(), COLOURS, strict=False)):
        parts.append(f'<text x="{LEFT + 165 * index}" y="22" fill="{colour}" font-weight="600">{escape(name)}</text>')
        line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        width = 1.4 if index else 2.6
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        parts += [
            f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="{width}" fill="{colour}"/>' for step, value in points
        ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="sans-serif" font-size="12" fill="#444b55"><title>{escape(title)}</title>'
        f"{''.join(parts)}</svg>\n"
    )
