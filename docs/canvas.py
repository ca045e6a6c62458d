"""A drawing in SVG: boxes, arrows and text in pixels from the top left, in one palette with a dark counterpart.

The drawing is matplotlib's. Text stays text, so that it can be read aloud, searched and copied. A style sheet in the
file replaces every color of the palette by its dark counterpart where the reader's system asks for dark pages.
"""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any, Literal

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon
from matplotlib.path import Path as Outline

INK, QUIET, RULE, PAPER, CARD = "#1c1d20", "#5c5f66", "#d5d1c8", "#fbfaf7", "#ffffff"
BLUE, ORANGE, GREEN, RED = "#2c5fa8", "#b4651a", "#1f6b4f", "#a3231f"
BLUE_TINT, ORANGE_TINT, GREEN_TINT = "#e6eef9", "#fbefdf", "#e2f1ea"
DARK = {
    INK: "#e8e6e1",
    QUIET: "#a3a6ad",
    RULE: "#454a52",
    PAPER: "#191b1f",
    CARD: "#23272d",
    BLUE: "#8db7f0",
    ORANGE: "#eb9d66",
    GREEN: "#6fcaa3",
    RED: "#ff9c94",
    BLUE_TINT: "#21304a",
    ORANGE_TINT: "#3a2b1c",
    GREEN_TINT: "#1b352b",
}
SANS = "system-ui, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
MONO = "ui-monospace, 'SF Mono', Menlo, Consolas, monospace"
TEXT = 13.0
SCALE = 1.1  # of all text: pages show drawings at about two thirds of their size
DPI = 72  # one pixel is one point

Point = tuple[float, float]


class Canvas:
    """A drawing of a size in pixels, with a title for readers who cannot see it."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="none")
        FigureCanvasSVG(self.figure)
        self.axes: Any = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")
        self.box(0.5, 0.5, width - 1, height - 1, fill=PAPER, edge=RULE, radius=10)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        text: str = "",
        below: str = "",
        fill: str = CARD,
        edge: str = RULE,
        radius: float = 6,
        dashed: bool = False,
        ink: str = INK,
    ) -> None:
        """A rounded box from its top left corner, with a line of text and a smaller one below it."""
        shape = FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle=f"round,pad=0,rounding_size={radius}",
            facecolor=fill,
            edgecolor=edge,
            linewidth=1.2,
            linestyle=(0, (4, 3)) if dashed else "solid",
        )
        self.axes.add_patch(shape)
        middle = y + height / 2
        if text:
            self.text(x + width / 2, middle - (8 if below else 0), text, weight="bold", color=ink)
        if below:
            self.text(x + width / 2, middle + 9, below, size=11, color=QUIET)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = TEXT,
        color: str = INK,
        weight: Literal["normal", "bold"] = "normal",
        ha: Literal["left", "center", "right"] = "center",
        mono: bool = False,
    ) -> None:
        """Text, vertically centered on y. Lines are 1.35 times its size apart."""
        lines, size = text.split("\n"), SCALE * size
        for number, line in enumerate(lines):
            self.axes.text(
                x,
                y + (number - (len(lines) - 1) / 2) * size * 1.35,
                line,
                size=size,
                color=color,
                weight=weight,
                ha=ha,
                va="center_baseline",
                family="monospace" if mono else "sans-serif",
            )

    def arrow(self, points: Sequence[Point], color: str = QUIET, head: bool = True, dashed: bool = False) -> None:
        """A line through points, with a head at its end."""
        path = Outline(points, [Outline.MOVETO, *[Outline.LINETO] * (len(points) - 1)])
        style = {"linestyle": (0, (4, 3)) if dashed else "solid", "linewidth": 1.4, "color": color}
        arrow = FancyArrowPatch(
            path=path,
            arrowstyle="-|>,head_length=4.5,head_width=2.6" if head else "-",
            mutation_scale=1.6,
            shrinkA=0,
            shrinkB=0,
            joinstyle="round",
            **style,  # type: ignore[arg-type]  # one dict for arguments of several types
        )
        arrow.set_fill(False) if not head else None
        self.axes.add_patch(arrow)

    def area(self, points: Sequence[Point], fill: str) -> None:
        """A filled polygon."""
        self.axes.add_patch(Polygon(points, closed=True, facecolor=fill, edgecolor="none"))

    def dot(self, x: float, y: float, radius: float = 7, fill: str = QUIET, edge: str | None = None) -> None:
        """A circle; with an edge of another color it is a ring around its fill."""
        self.axes.plot(
            [x],
            [y],
            "o",
            markersize=2 * radius,
            markerfacecolor=fill,
            markeredgecolor=edge or fill,
            markeredgewidth=1.8 if edge else 0,
            clip_on=False,
        )

    def svg(self) -> str:
        """The drawing as an SVG document, the same bytes at each call."""
        file = io.StringIO()
        options: Any = {"svg.hashsalt": "recsys2stage", "svg.fonttype": "none", "path.simplify": False}
        without = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with matplotlib.rc_context(options):
            self.figure.savefig(file, format="svg", metadata=without)
        return self._finished(file.getvalue())

    def _finished(self, svg: str) -> str:
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r"\s*<!--.*?-->", "", svg, flags=re.DOTALL)
        svg = re.sub(r"font-family: [^;\"]*monospace[^;\"]*", f"font-family: {MONO}", svg)
        svg = re.sub(r"font-family: '?DejaVu[^;\"]*", f"font-family: {SANS}", svg)
        svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
        svg = re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)
        rules = [
            f'[style*="{what}: {light}"] {{ {what}: {dark} !important; }}'
            for light, dark in DARK.items()
            for what in ("fill", "stroke")
            if f"{what}: {light}" in svg
        ]
        style = "@media (prefers-color-scheme: dark) {\n" + "\n".join(rules) + "\n}"
        head, _, rest = svg.partition(">")
        head = re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', head)
        title = f" <title>{escape(self.title)}</title>"
        return f'{head} role="img">\n{title}\n <style>\n{style}\n </style>{rest.rstrip()}\n'
