"""Pictures: the losses in the log of training, and how often experts are chosen."""

from __future__ import annotations

import csv
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 48, 12, 28, 40
COLOURS = {"text": "#2f6fb0", "chat": "#c2571a"}
WORDS = {"text": "texts", "chat": "the model's words in conversations"}


def read_log(path: Path, columns: tuple[str, ...] = tuple(COLOURS)) -> dict[str, list[tuple[float, float]]]:
    """Millions of tokens and loss, for each column; steps whose batch had none of a kind are left out."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        column: [(int(row["tokens"]) / 1e6, float(row[column])) for row in rows if float(row[column]) > 0]
        for column in columns
    }


def smooth(points: list[tuple[float, float]], parts: int = 200) -> list[tuple[float, float]]:
    """Means of neighbouring points, so that about `parts` are left."""
    size = max(1, len(points) // parts)
    groups = [points[n : n + size] for n in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def draw(curves: dict[str, list[tuple[float, float]]]) -> str:
    """Losses over tokens as SVG, with axes and names."""
    points = [point for curve in curves.values() for point in curve]
    most_x, most_y = max(x for x, _ in points), max(y for _, y in points)
    inner_x, inner_y = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> str:
        return f"{LEFT + inner_x * x / most_x:.1f},{TOP + inner_y * (1 - y / most_y):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    ]
    for y in range(int(most_y) + 1):
        at = place(0, y).split(",")[1]
        parts.append(f'<path d="M{LEFT},{at}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at}" dy="4" text-anchor="end">{y}</text>')
    for n in range(5):
        x = most_x * n / 4
        at = place(x, 0).split(",")[0]
        parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:.1f}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">million tokens</text>')
    for n, (name, curve) in enumerate(curves.items()):
        line = " ".join(place(x, y) for x, y in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[name]}" stroke-width="1.5"/>')
        parts.append(f'<text x="{LEFT + 200 * n}" y="16" fill="{COLOURS[name]}">{WORDS[name]}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def draw_experts(shares: list[list[float]]) -> str:
    """How often each expert of each layer is chosen, as bars, and a line where all would be equal; as SVG."""
    columns, gap, high = 3, 16, 96
    wide = (WIDTH - LEFT - RIGHT - gap * (columns - 1)) / columns
    rows, most = -(-len(shares) // columns), max(max(layer) for layer in shares)
    height = TOP + rows * (high + TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{height}" fill="white"/>'
    ]
    for n, layer in enumerate(shares):
        left, floor = LEFT + (wide + gap) * (n % columns), TOP + (high + TOP) * (n // columns) + high
        parts.append(
            f'<text x="{left:.1f}" y="{floor - high - 6}">layer {n}: {min(layer):.3f} to {max(layer):.3f}</text>'
        )
        for m, share in enumerate(layer):
            x, size = left + wide * m / len(layer), high * share / most
            parts.append(
                f'<rect class="bar" x="{x:.1f}" y="{floor - size:.1f}" width="{wide / len(layer) - 2:.1f}" '
                f'height="{size:.1f}" fill="{COLOURS["text"]}"/>'
            )
        even = floor - high / len(layer) / most
        parts.append(f'<path d="M{left:.1f},{even:.1f}h{wide:.1f}" stroke="{COLOURS["chat"]}" stroke-dasharray="4 3"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def plot(log: Path, picture: Path) -> None:
    picture.write_text(draw({name: smooth(points) for name, points in read_log(log).items()}), encoding="utf-8")
