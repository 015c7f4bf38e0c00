#!/usr/bin/env python3
"""Draw docs/images/routing.svg: the key blocks to which full attention and MoBA attend, for each query block.

python3 tools/draw_routing.py
"""

import random
from pathlib import Path

BLOCKS, TOP_K, CELL = 16, 3, 15
SIDE = BLOCKS * CELL
LEFT, TOP, GAP = 40, 64, 90
INK, MUTED, OWN, SELECTED, UNSELECTED = "#24292f", "#6e7781", "#0969da", "#54aeff", "#eaeef2"


def text(x, y, words, size=13, colour=INK, anchor="start", extra=""):
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}" {extra}>{words}</text>'


def panel(x0, title, note, colour_of):
    """Return the elements of a triangle of query blocks (down) by key blocks (across), without future keys."""
    parts = [
        text(x0, TOP - 32, title, 15, extra='font-weight="600"'),
        text(x0, TOP - 13, note, 12, MUTED),
    ]
    for row in range(BLOCKS):
        for column in range(row + 1):
            parts.append(
                f'<rect x="{x0 + column * CELL}" y="{TOP + row * CELL}" width="{CELL - 2}" height="{CELL - 2}" '
                f'rx="2" fill="{colour_of(row, column)}"/>'
            )
    middle = TOP + SIDE / 2
    parts.append(text(x0 + SIDE / 2, TOP + SIDE + 18, "key blocks", 12, MUTED, "middle"))
    parts.append(
        text(
            x0 - 12,
            middle,
            "query blocks",
            12,
            MUTED,
            "middle",
            f'transform="rotate(-90 {x0 - 12} {middle})"',
        )
    )
    return parts


def legend(y):
    parts, x = [], LEFT
    for colour, words in (
        (OWN, "own block, up to the query itself"),
        (SELECTED, "selected"),
        (UNSELECTED, "not selected"),
    ):
        parts.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" rx="2" fill="{colour}"/>')
        parts.append(text(x + 18, y, words, 12))
        x += 40 + 7 * len(words)
    return parts


def main():
    generator = random.Random(3)
    selected = [set(generator.sample(range(row), min(TOP_K - 1, row))) for row in range(BLOCKS)]
    second = LEFT + SIDE + GAP
    width, height = second + SIDE + 30, TOP + SIDE + 62
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif">',
        f'<rect width="{width}" height="{height}" rx="8" fill="white"/>',
        *panel(
            LEFT,
            "Full attention",
            "every query attends to all earlier keys",
            lambda row, column: OWN if row == column else SELECTED,
        ),
        *panel(
            second,
            f"MoBA, top-k {TOP_K}",
            "its own and the best by mean key",
            lambda row, column: (
                OWN if row == column else SELECTED if column in selected[row] else UNSELECTED
            ),
        ),
        *legend(height - 16),
        "</svg>",
    ]
    out = Path(__file__).resolve().parents[1] / "docs/images/routing.svg"
    out.parent.mkdir(exist_ok=True)
    out.write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
