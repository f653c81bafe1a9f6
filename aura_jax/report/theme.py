"""The colours of the report's figures, and its ways out: PNG on white, and SVG that follows the page's theme.

Figures are drawn with matplotlib's objects (no pyplot, no global state) in the light theme's colours. Inside the page
each of these colours becomes the CSS variable of its role, which is why no two roles may share a colour. One unit of
length is one CSS pixel of the page and one point of matplotlib.
"""

import io
import math
import re
from pathlib import Path

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure

WIDE, NARROW = 840, 358  # of a figure on a screen, and on a phone
TEXT, SMALL = 13.0, 12.0  # sizes of type in figures

INK, SOFT, FAINT, LINE, BAND = "#1b1f24", "#5a636e", "#96a0aa", "#d8dde2", "#f3f5f7"
ACCENT, TINT, WARM, WARM_TINT, PAGE = "#0e6a70", "#d9ecec", "#b0521b", "#fbe9dc", "#fffffe"
MARK = "#f47b20"  # on heat maps, in both themes
ROLES = {
    "ink": INK,
    "soft": SOFT,
    "faint": FAINT,
    "line": LINE,
    "band": BAND,
    "accent": ACCENT,
    "tint": TINT,
    "warm": WARM,
    "warm-tint": WARM_TINT,
    "page": PAGE,
}


def _from_oklch(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
    """Returns sRGB in [0, 1] of an OKLCH colour (https://bottosson.github.io/posts/oklab/); hue in degrees."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    cone = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    )
    long, medium, short = (cone @ (lightness, a, b)) ** 3
    linear = np.array(
        [
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        ]
    ).clip(0, 1)
    red, green, blue = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return float(red), float(green), float(blue)


def _heat() -> LinearSegmentedColormap:
    """Returns a map of even steps in perceived lightness around one hue; neither end is lost on white or on black."""
    place = np.linspace(0, 1, 33)
    colours = [_from_oklch(0.25 + 0.69 * t, 0.045 + 0.05 * math.sin(math.pi * t), 225 - 55 * t) for t in place]
    return LinearSegmentedColormap.from_list("aura", colours)


HEAT = _heat()


def shades(n: int) -> list[str]:
    """Returns n colours for the parts of a whole, from dark to light, which are the same in both themes."""
    return [to_hex(HEAT(t)) for t in np.linspace(0.3, 0.9, max(n, 1))][:n]


def series(n: int) -> list[str]:
    """Returns n colours for things that stand beside each other, the first the accent; the same in both themes."""
    hues = (55, 285, 135, 355, 250, 90, 320)
    return [ACCENT, *(to_hex(_from_oklch(0.64, 0.13, hues[i % len(hues)])) for i in range(n - 1))][:n]


def literal(name: str, longest: int = 34) -> str:
    """Returns a name for a figure: cut if it is long, and with no dollar read as mathematics."""
    return (name if len(name) <= longest else name[: longest - 1] + "…").replace("$", r"\$")


def figure(width: float, height: float) -> Figure:
    """Returns an empty figure of so many CSS pixels."""
    return Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")


def axes(owner: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Returns axes whose box is given in pixels from the figure's upper left corner, dressed as the report's are."""
    full_width, full_height = owner.get_size_inches() * 72
    bottom = full_height - top - height
    ax = owner.add_axes((left / full_width, bottom / full_height, width / full_width, height / full_height))
    ax.set_facecolor("none")
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LINE)
        spine.set_linewidth(1)
    ax.tick_params(colors=LINE, labelcolor=SOFT, labelsize=SMALL, length=3, width=1, pad=4)
    ax.tick_params(which="minor", length=0)
    ax.xaxis.label.set(color=SOFT, size=SMALL)
    ax.yaxis.label.set(color=SOFT, size=SMALL)
    return ax


def png(of: Figure, path: Path) -> None:
    """Writes the figure on white at two pixels a point, to a temporary name first."""
    partial = path.with_name(path.name + ".partial")
    of.savefig(partial, format="png", dpi=144, facecolor=PAGE)
    partial.replace(path)


def inline_svg(of: Figure, name: str, label: str) -> Markup:
    """Returns the figure as an <svg> element for the page: its colours are the page's variables, its type the page's.

    Args:
      name: of the figure, unique in the page: ids begin with it.
      label: what a screen reader says.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        # The resolution is that of the pictures inside (heat maps); lines and text have none.
        of.savefig(
            buffer, format="svg", dpi=144, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    body = buffer.getvalue()
    body = body[body.index("<g id=") : body.rindex("</svg>")]
    body = body.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))
    keep = lambda found: f' id="{name}-{found.group(1)}"' if found.group(1) in used else ""
    body = re.sub(r' id="([^"]+)"', keep, body)
    body = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 inherit", body)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    for role, colour in ROLES.items():
        body = body.replace(colour, f"var(--{role})")
    body = re.sub(r"\s*\n\s*", "\n", body)
    width, height = of.get_size_inches() * 72
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
    return Markup(f"{head}\n{body}</svg>")
