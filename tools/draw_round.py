#!/usr/bin/env python3
"""Draws one round of federated averaging, for the README: `python tools/draw_round.py` writes pictures/round.svg.

The drawing takes its colours from the reader's light or dark mode.
"""

from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "pictures" / "round.svg"
STYLE = """
  text { font: 15px system-ui, sans-serif; fill: #1f2328 }
  .small { font-size: 13px; fill: #59636e }
  .bold { font-weight: 600 }
  .box { fill: #f6f8fa; stroke: #59636e; stroke-width: 1.5 }
  .data { fill: #ddf4ff; stroke: #0969da; stroke-width: 1.5 }
  .down { stroke: #0969da; fill: none; stroke-width: 2.5 }
  .up { stroke: #bc4c00; fill: none; stroke-width: 2.5 }
  .head-down { fill: #0969da } .head-up { fill: #bc4c00 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 }
    .box { fill: #151b23; stroke: #9198a1 } .data { fill: #0c2d6b; stroke: #4493f8 }
    .down { stroke: #4493f8 } .up { stroke: #f0883e } .head-down { fill: #4493f8 } .head-up { fill: #f0883e }
  }
"""
CLIENTS = 3
WIDTH, HEIGHT, BOX = 840, 400, 220


def text(x: float, y: float, words: str, style: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="middle" class="{style}">{words}</text>'


def arrow(x: float, start: float, end: float, style: str) -> str:
    tip = 12 if end > start else -12
    head = f"M{x - 7} {end - tip} L{x + 7} {end - tip} L{x} {end} Z"
    return f'<path class="{style}" d="M{x} {start} L{x} {end - tip}"/><path class="head-{style}" d="{head}"/>'


def client(number: int, x: float) -> list[str]:
    """Draw a client with its data, around the middle `x`."""
    left, top = x - BOX / 2, 236
    disk = f"M{x - 60} {top + 92} v32 a60 9 0 0 0 120 0 v-32"
    return [
        arrow(x - 50, 130, top - 4, "down"),
        arrow(x + 50, top, 134, "up"),
        f'<rect class="box" x="{left}" y="{top}" width="{BOX}" height="150" rx="10"/>',
        text(x, top + 26, f"client {number}", "bold"),
        text(x, top + 50, "2. trains the model"),
        text(x, top + 68, "on its own pictures"),
        f'<path class="data" d="{disk}"/><ellipse class="data" cx="{x}" cy="{top + 92}" rx="60" ry="9"/>',
        text(x, top + 122, "data: stays here", "small"),
    ]


def drawing() -> str:
    middles = [WIDTH * (2 * i + 1) / (2 * CLIENTS) for i in range(CLIENTS)]
    wide = middles[-1] - middles[0] + BOX
    parts = [
        f'<rect class="box" x="{middles[0] - BOX / 2}" y="20" width="{wide}" height="106" rx="10"/>',
        text(WIDTH / 2, 48, "server", "bold"),
        text(WIDTH / 2, 76, "1. sends the model's weights to the clients it has sampled"),
        text(WIDTH / 2, 100, "4. averages the weights that come back: the new model. On to the next round."),
    ]
    for number, middle in enumerate(middles):
        parts += client(number, middle)
        parts += [text(middle - 82, 188, "weights", "small"), text(middle + 92, 188, "3. weights", "small")]
    title = "A round: the server sends weights, each client trains on its own data, the server averages what returns"
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">', f"<title>{title}</title>"]
    return "\n".join([*lines, f"<style>{STYLE}</style>", *parts, "</svg>\n"])


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(drawing())
