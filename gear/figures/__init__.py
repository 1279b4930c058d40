"""Figures: their style and files (`style`), what panels share (`draw`), the method as a picture
(`method`), the notebooks that draw figures (`render`), and the page of all figures (`gallery`).
"""

from gear.figures.draw import (
    bars,
    dots,
    focus,
    legend,
    lines,
    named,
    panel_rows,
    sheet_rows,
    show_rows,
    speedup_dots,
    speedup_title,
    speedup_words,
)
from gear.figures.style import (
    METHODS,
    PALETTE,
    figure_path,
    kept_words,
    panels,
    rounded,
    runs_of,
    save,
    scale,
    use_style,
)

__all__ = [
    "METHODS",
    "PALETTE",
    "bars",
    "dots",
    "figure_path",
    "focus",
    "kept_words",
    "legend",
    "lines",
    "named",
    "panel_rows",
    "panels",
    "rounded",
    "runs_of",
    "save",
    "scale",
    "sheet_rows",
    "show_rows",
    "speedup_dots",
    "speedup_title",
    "speedup_words",
    "use_style",
]
