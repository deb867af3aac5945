#!/usr/bin/env python3
"""Draws the pictures of docs/kernels: which rows and keys a workgroup has, what it loops over, and what lies in which memory.

    scripts/draw-tiles.py          writes docs/kernels/*.svg
    scripts/draw-tiles.py --dark   the same in the colours of a dark theme, to look at them

Python's standard library is all it needs. The sizes in the pictures are those of src/tune/ for GPUs with 48 KiB of workgroup memory.
"""

import pathlib
import sys

# For each class: attributes in a light theme, and what changes in a dark one.
CLASSES = {
    "card": ("fill:#ffffff;stroke:#d0d7de", "fill:#0d1117;stroke:#30363d"),
    "ink": ("fill:#1f2328", "fill:#e6edf3"),
    "inverse": ("fill:#ffffff", "fill:#0d1117"),
    "soft": ("fill:#59636e", "fill:#9198a1"),
    "empty": ("fill:#f6f8fa;stroke:#afb8c1", "fill:#161b22;stroke:#3d444d"),
    "box": ("fill:none;stroke:#59636e", "fill:none;stroke:#9198a1"),
    "line": ("fill:none;stroke:#59636e", "fill:none;stroke:#9198a1"),
    "tip": ("fill:#59636e;stroke:none", "fill:#9198a1;stroke:none"),
    "own": ("fill:#b6d7ff;stroke:#3b7dd8", "fill:#1f3f6e;stroke:#58a6ff"),
    "step": ("fill:#ffd8a8;stroke:#c76b00", "fill:#5c3a10;stroke:#e3a04f"),
    "both": ("fill:#f2a65a;stroke:#a85200", "fill:#8f5a1c;stroke:#f0b871"),
    "mine": ("fill:#2f7d4f;stroke:#1d5c37", "fill:#3fb950;stroke:#a5e5b0"),
    "grid": ("fill:none;stroke:#ffffff;stroke-opacity:0.7", "fill:none;stroke:#0d1117;stroke-opacity:0.6"),
}
TEXT = "font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif"


def style(dark):
    light = "".join(f".{name}{{{look[dark]}}}" for name, look in CLASSES.items())
    night = "".join(f".{name}{{{look[1]}}}" for name, look in CLASSES.items())
    return f"<style>text{{{TEXT}}}{light}@media(prefers-color-scheme:dark){{{night}}}</style>"


class Picture:
    def __init__(self, width, height, title):
        self.width, self.height, self.title = width, height, title
        self.parts = []
        self.rect(0.5, 0.5, width - 1, height - 1, "card", radius=8)

    def rect(self, x, y, w, h, kind, radius=0, dash=""):
        dash = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius}" class="{kind}"{dash}/>')

    def text(self, x, y, words, kind="ink", size=13, anchor="start", bold=False, turned=False):
        words = words.replace("&", "&amp;").replace("<", "&lt;")
        more = ' font-weight="600"' if bold else ""
        more += f' transform="rotate(-90 {x:g} {y:g})"' if turned else ""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" class="{kind}"{more}>{words}</text>')

    def line(self, x0, y0, x1, y1, dash=""):
        dash = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<path d="M{x0:g} {y0:g}L{x1:g} {y1:g}" class="line"{dash}/>')

    def arrow(self, x0, y0, x1, y1):
        """Horizontal or vertical."""
        self.line(x0, y0, x1, y1)
        dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
        a, b = x1 - 8 * dx - 4 * dy, y1 - 8 * dy - 4 * dx
        c, d = x1 - 8 * dx + 4 * dy, y1 - 8 * dy + 4 * dx
        self.parts.append(f'<path d="M{x1:g} {y1:g}L{a:g} {b:g}L{c:g} {d:g}z" class="tip"/>')

    def cells(self, x, y, w, h, columns, rows, kind="grid"):
        for n in range(1, columns):
            self.parts.append(f'<path d="M{x + n * w / columns:g} {y:g}v{h:g}" class="{kind}"/>')
        for n in range(1, rows):
            self.parts.append(f'<path d="M{x:g} {y + n * h / rows:g}h{w:g}" class="{kind}"/>')

    def table(self, x, y, heading, lines):
        """A memory and what lies in it: names and sizes."""
        self.text(x, y, heading, bold=True)
        for n, line in enumerate(lines):
            self.text(x, y + 20 + 18 * n, line, "soft", 12)

    def legend(self, x, y, entries):
        for kind, words in entries:
            self.rect(x, y - 11, 14, 14, kind)
            self.text(x + 20, y, words, "soft", 12)
            x += 40 + 6.6 * len(words)

    def write(self, folder, name, dark):
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
                f'height="{self.height}" role="img"><title>{self.title}</title>')
        text = "\n".join([head, style(dark), *self.parts, "</svg>", ""])
        (folder / f"{name}.svg").write_text(text, encoding="utf-8")


def scores(p, x, y, w, h, rows=True, keys=True):
    """The scores of one head, rows down, keys across."""
    p.rect(x, y, w, h, "empty")
    if keys:
        p.text(x + w / 2, y - 10, "keys →", "soft", 12, "middle")
    if rows:
        p.text(x - 10, y + h / 2, "← rows (queries)", "soft", 12, "middle", turned=True)


def tile():
    p = Picture(920, 400, "The tile kernel: rows of a workgroup, tiles of keys, and what a thread holds")
    p.text(24, 30, "1  Scores of one head", bold=True)
    scores(p, 48, 66, 220, 220)
    p.rect(48, 142, 220, 44, "own")
    p.rect(136, 142, 44, 44, "both")
    for n in (1, 2, 3, 4):
        p.line(48 + 44 * n, 142, 48 + 44 * n, 186, "3 3")
    p.arrow(186, 164, 262, 164)
    p.text(48, 308, "A workgroup owns ROWS rows", "soft", 12)
    p.text(48, 326, "and loops over tiles of KEYS keys.", "soft", 12)

    x, y, side = 330, 66, 256
    p.text(306, 30, "2  One tile, by 256 threads", bold=True)
    p.line(180, 142, x, y, "2 4")
    p.line(180, 186, x, y + side, "2 4")
    p.rect(x, y, side, side, "both")
    ty, tx = 5, 3
    for r in range(2):
        p.rect(x, y + 2 * (4 * (ty + 16 * r)), side, 8, "own")
    for c in range(8):
        p.rect(x + 2 * (tx + 16 * c), y, 2, side, "step")
    for r in range(2):
        for c in range(8):
            p.rect(x + 2 * (tx + 16 * c) - 0.5, y + 2 * (4 * (ty + 16 * r)), 3, 8, "mine")
    p.text(x + side / 2, y - 10, "128 keys", "soft", 12, "middle")
    p.text(x - 10, y + side / 2, "128 rows", "soft", 12, "middle", turned=True)
    p.text(330, 344, "Thread (5, 3) holds 64 scores: twice 4 rows,", "soft", 12)
    p.text(330, 362, "rows 4(ty + 16r) to + 3, by 8 keys, tx + 16c.", "soft", 12)

    x = 640
    p.text(x, 30, "3  Where things lie (D = 64)", bold=True)
    p.table(x, 66, "registers of a thread", ["S, then P: 8 rows × 8 keys", "O: 8 rows × 4 columns, and a tile's sum", "l: 8 rows, its own keys only",
                                             "next chunk of Q, K or rows of V"])
    p.table(x, 174, "workgroup memory, for S", ["Q: 128 rows × CHUNK = 32 columns", "K: 128 keys × 32 columns", "as columns: vectors of 4 rows, of 4 keys"])
    p.table(x, 262, "workgroup memory, for P V", ["P: 128 rows × VALUE_KEYS = 32 keys", "V: 32 keys × D"])
    p.table(x, 332, "workgroup memory, always", ["m and exp(m − m′): 128 rows"])
    p.legend(24, 384, [("own", "rows of the workgroup, or of the thread"), ("step", "keys of the thread"), ("both", "the tile of this trip"), ("mine", "scores of the thread")])
    return p


def coop():
    p = Picture(920, 430, "The coop kernel: rows of subgroups, matrices of scores, and what lies where")
    p.text(24, 30, "1  Scores of one head", bold=True)
    scores(p, 48, 66, 220, 220)
    p.rect(48, 126, 220, 88, "own")
    p.cells(48, 126, 220, 88, 1, 4)
    p.rect(136, 126, 22, 88, "both")
    p.cells(136, 126, 22, 88, 1, 4)
    p.arrow(164, 170, 262, 170)
    p.text(48, 308, "A workgroup owns 128 rows, and each of", "soft", 12)
    p.text(48, 326, "its 4 subgroups 32 of them. It loops", "soft", 12)
    p.text(48, 344, "over tiles of 32 keys, full ones first.", "soft", 12)

    x, y = 380, 96
    p.text(322, 30, "2  A subgroup's share of a tile (D = 64)", bold=True)
    p.rect(136, 126, 22, 22, "mine")

    def block(x, y, columns, rows, kind, name, size):
        p.rect(x, y, 26 * columns, 26 * rows, kind)
        p.cells(x, y, 26 * columns, 26 * rows, columns, rows)
        p.text(x + 13 * columns, y - 7, name, "ink", 12, "middle")
        p.text(x + 13 * columns, y + 26 * rows + 15, size, "soft", 11, "middle")

    block(336, 88, 4, 2, "own", "Q", "32 × 64, left")
    p.text(452, 119, "×", "ink", 16, "middle")
    block(470, 88, 2, 4, "step", "Kᵀ", "64 × 32, right")
    p.text(540, 119, "→", "ink", 16, "middle")
    block(558, 88, 2, 2, "both", "S", "32 × 32, f32")
    p.text(456, 246, "exp2, in the lanes where S lies", "soft", 12, "middle")
    block(336, 286, 2, 2, "both", "P", "32 × 32, left")
    p.text(405, 317, "×", "ink", 16, "middle")
    block(422, 286, 4, 2, "step", "V", "32 × 64, right")
    p.text(540, 317, "→", "ink", 16, "middle")
    block(558, 286, 4, 2, "own", "O", "32 × 64, f32")
    p.text(336, 374, "Each small square is a matrix of 16 × 16 elements.", "soft", 12)

    x = 700
    p.text(x, 30, "3  Where things lie", bold=True)
    p.table(x, 66, "registers of a subgroup", ["Q: left operands, f16", "S and P of this tile", "O: accumulators, f32", "m and l of 32 rows", "the next tile's loads"])
    p.table(x, 196, "workgroup memory", ["one tile of K and one of V,", "f16, shared by the subgroups"])
    p.table(x, 274, "device memory", ["Q read once,", "K and V once a workgroup"])
    p.text(x, 352, "No barrier between S and P V:", "soft", 12)
    p.text(x, 370, "a row is one subgroup's.", "soft", 12)
    p.legend(24, 412, [("own", "rows of the workgroup: Q, O"), ("step", "K and V of the tile"), ("both", "scores of the tile"), ("mine", "a subgroup's share of it")])
    return p


def parts():
    p = Picture(920, 236, "How an f32 product becomes three f16 products")
    p.text(24, 30, "An f32 in two parts of f16", bold=True)
    p.text(24, 62, "x · scale", "ink", 12)
    p.rect(110, 46, 12 * 24, 24, "own")
    p.text(110 + 144, 63, "24 bits of an f32", "ink", 12, "middle")
    p.text(24, 102, "a₀ (f16)", "ink", 12)
    p.rect(110, 86, 12 * 11, 24, "both")
    p.text(110 + 66, 103, "leading 11 bits", "ink", 12, "middle")
    p.text(24, 142, "a₁ (f16)", "ink", 12)
    p.rect(110 + 132, 126, 12 * 11, 24, "step")
    p.text(110 + 198, 143, "next 11 bits", "ink", 12, "middle")
    p.text(24, 182, "The scale is a power of two that brings the", "soft", 12)
    p.text(24, 200, "tile's largest element to between 2¹⁴ and 2¹⁵.", "soft", 12)
    x = 470
    p.text(x, 30, "x · y ≈ three products of matrices, the small ones first", bold=True)
    for n, (a, b) in enumerate([("a₁", "b₀"), ("a₀", "b₁"), ("a₀", "b₀")]):
        y = 46 + 40 * n
        p.rect(x, y, 60, 24, "both" if a == "a₀" else "step")
        p.text(x + 30, y + 17, a, "ink", 12, "middle")
        p.text(x + 75, y + 17, "×", "ink", 13, "middle")
        p.rect(x + 90, y, 60, 24, "both" if b == "b₀" else "step")
        p.text(x + 120, y + 17, b, "ink", 12, "middle")
        p.text(x + 165, y + 17, ("below 2⁻¹⁰ of x y", "below 2⁻¹⁰ of x y", "the leading product, added last")[n], "soft", 12)
    p.text(x, 182, "a₁ × b₁ is left out: it is below 2⁻²⁰ of x y.", "soft", 12)
    p.text(x, 200, "A bf16 has 8 bits, so it is one part and one product.", "soft", 12)
    return p


def decode():
    p = Picture(920, 430, "Decoding: the keys are split over workgroups, and their results are merged")
    p.text(24, 30, "1  decode_split: few rows, many keys", bold=True)
    x, y, w = 56, 66, 400
    p.text(x + w / 2, 56, "keys of one key-value head →", "soft", 12, "middle")
    p.rect(x, y, w, 32, "empty")
    for n in range(5):
        p.rect(x + 80 * n, y, 80, 32, "own")
        p.text(x + 80 * n + 40, y + 21, f"share {n}", "ink", 12, "middle")
    p.rect(x + 160, y, 16, 32, "both")
    p.text(44, 86, "rows", "soft", 12, "end")
    for n in range(5):
        p.arrow(x + 80 * n + 40, y + 34, x + 80 * n + 40, y + 66)
        p.rect(x + 80 * n + 8, y + 68, 64, 30, "step")
        p.text(x + 80 * n + 40, y + 88, "O, m, l", "ink", 12, "middle")
    p.text(x, 190, "The rows are the queries of all heads that share the key-value", "soft", 12)
    p.text(x, 208, "head, at most 16 a workgroup. A workgroup loops over the tiles", "soft", 12)
    p.text(x, 226, "of its share of the keys and leaves O, m and l in the workspace.", "soft", 12)

    p.text(24, 264, "2  decode_combine: merges the shares", bold=True)
    for n in range(5):
        p.rect(x + 80 * n + 8, 282, 64, 30, "step")
        p.text(x + 80 * n + 40, 302, "O, m, l", "ink", 12, "middle")
        p.line(x + 80 * n + 40, 312, x + 80 * n + 40, 328)
    p.line(x + 40, 328, x + 360, 328)
    p.arrow(x + 200, 328, x + 200, 348)
    p.rect(x + 150, 350, 100, 30, "both")
    p.text(x + 200, 370, "o, lse", "ink", 12, "middle")

    x = 520
    p.text(x, 30, "3  A tile: 64 keys by 128 threads (D = 128, f16)", bold=True)
    p.text(x, 60, "S = Q Kᵀ: 8 threads share 4 keys", "ink", 12)
    p.rect(x, 70, 360, 56, "empty")
    p.cells(x, 70, 360, 56, 8, 4, "box")
    p.rect(x + 45 * 2, 70, 45, 56, "mine")
    p.cells(x + 45 * 2, 70, 45, 56, 1, 4)
    p.text(x, 144, "4 keys down, columns of K across. A thread takes every", "soft", 12)
    p.text(x, 162, "8th vector of 4 columns. 8 neighbours add up their sums.", "soft", 12)
    p.text(x, 200, "softmax: one thread a key", "ink", 12)
    p.text(x, 238, "O += P V: 4 slices by 32 columns of threads", "ink", 12)
    p.rect(x, 248, 360, 64, "empty")
    p.cells(x, 248, 360, 64, 32, 8, "box")
    for n in range(2):
        p.rect(x + 11.25 * 9, 248 + 8 + 32 * n, 11.25, 8, "mine")
    p.text(x, 330, "8 of 64 keys down, columns of V across. A thread holds", "soft", 12)
    p.text(x, 348, "4 columns of O, for every 4th key. The slices are added", "soft", 12)
    p.text(x, 366, "up once, after the last tile.", "soft", 12)
    p.legend(24, 412, [("own", "keys of a workgroup"), ("both", "the tile of this trip"), ("step", "workspace, f32"), ("mine", "what one thread reads")])
    return p


def opponent(j, n, r):
    """As in backward_fused_tile.wgsl."""
    if r == 0:
        return j
    t, last = r - 1, n - 1
    if j == last:
        return (t if t % 2 == 0 else t + last) // 2
    i = (t + last - j) % last
    return last if i == j else i


def backward():
    p = Picture(920, 430, "The backward pass: who owns keys, who owns rows, and the rounds of the fused kernel")
    p.text(24, 30, "1  dK and dV: a workgroup owns keys", bold=True)
    scores(p, 48, 66, 220, 220)
    p.rect(136, 66, 44, 220, "own")
    p.rect(136, 132, 44, 22, "both")
    p.arrow(158, 160, 158, 280)
    p.text(48, 308, "It walks over the rows of all query heads", "soft", 12)
    p.text(48, 326, "that share the key-value head.", "soft", 12)
    p.text(48, 344, "Registers: dK and dV of its keys.", "soft", 12)

    x = 344
    p.text(x - 24, 30, "2  dQ: a workgroup owns rows", bold=True)
    scores(p, x, 66, 220, 220)
    p.rect(x, 132, 220, 44, "own")
    p.rect(x + 66, 132, 22, 44, "both")
    p.arrow(x + 94, 154, x + 214, 154)
    p.text(x, 308, "It walks over the keys that its rows see.", "soft", 12)
    p.text(x, 326, "Registers: dQ of its rows. S and dP are", "soft", 12)
    p.text(x, 344, "computed a second time.", "soft", 12)

    x, n = 652, 6
    p.text(x - 34, 30, "3  Fused, in f32: blocks meet in rounds", bold=True)
    side = 222
    scores(p, x, 66, side, side)
    cell = side / n
    for r in range(n):
        for j in range(n):
            i = opponent(j, n, r)
            kind = "both" if r == 2 else "own" if r == 0 else "empty"
            p.rect(x + cell * j, 66 + cell * i, cell, cell, kind)
            p.text(x + cell * (j + 0.5), 66 + cell * (i + 0.5) + 5, str(r), "ink", 13, "middle")
    p.text(x - 34, 308, "The number is the round of a pair of blocks.", "soft", 12)
    p.text(x - 34, 326, "A round is a dispatch. No row and no column", "soft", 12)
    p.text(x - 34, 344, "has a number twice, so no two workgroups", "soft", 12)
    p.text(x - 34, 362, "of a dispatch add to one element.", "soft", 12)
    p.legend(24, 412, [("own", "what a workgroup owns; in 3, round 0"), ("both", "the tile of this trip; in 3, round 2")])
    return p


def layout():
    p = Picture(920, 400, "Which lane holds which element of a 16 by 16 matrix on NVIDIA")
    p.text(24, 30, "Which lane holds an element: 16 × 16 on NVIDIA, 32 lanes of 8 elements", bold=True)
    x, y, cell = 48, 62, 19
    p.text(x + 8 * cell, y - 10, "columns", "soft", 12, "middle")
    p.text(x - 10, y + 8 * cell, "rows", "soft", 12, "middle", turned=True)
    for row in range(16):
        for column in range(16):
            lane = (column >> 1 & 1) | (column >> 2 & 1) << 1 | (row & 7) << 2
            kind = "mine" if lane == 5 else "own" if lane >> 2 == 1 else "empty"
            p.rect(x + cell * column, y + cell * row, cell, cell, kind)
            p.text(x + cell * (column + 0.5), y + cell * (row + 0.5) + 4, str(lane), "inverse" if lane == 5 else "ink", 9, "middle")
    x = 400
    p.table(x, 80, "Lane 5 holds eight elements", ["rows 1 and 9, columns 2, 3, 10 and 11", "LANE_ROWS = 2, LANE_COLUMNS = 4"])
    p.table(x, 156, "Lanes 4 to 7 share rows 1 and 9", ["A row's maximum takes two steps of subgroupShuffleXor: with 1, then with 2.",
                                                       "LANE_COLUMN_BITS has these two bits: it is 3."])
    p.table(x, 232, "Bits, lowest first", ["row: lane bit 2, 3, 4, element bit 2", "column: element bit 0, lane bit 0, 1, element bit 1"])
    p.table(x, 308, "Why a lane can make P where S lies", ["Accumulators (f32) and left operands (f16) have this one layout."])
    p.legend(24, 384, [("mine", "lane 5"), ("own", "lanes 4, 6 and 7")])
    return p


def main():
    dark = sys.argv[1:] == ["--dark"]
    folder = pathlib.Path(__file__).resolve().parent.parent / "docs" / "kernels"
    pictures = {"tile": tile, "coop": coop, "parts": parts, "decode": decode, "backward": backward, "element-access": layout}
    for name, draw in pictures.items():
        draw().write(folder, name, int(dark))


main()
