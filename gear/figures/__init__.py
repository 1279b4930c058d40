"""Figures: how they look and are kept (`style`), the notebooks that draw them (`render`), the page
of all (`gallery`).
"""

from gear.figures.style import (
    METHODS,
    PALETTE,
    figure_path,
    focus,
    kept_words,
    legend,
    panel_rows,
    panels,
    rounded,
    runs_of,
    save,
    scale,
    show_panels,
    show_rows,
    use_style,
)

__all__ = [
    "METHODS",
    "PALETTE",
    "figure_path",
    "focus",
    "kept_words",
    "legend",
    "panel_rows",
    "panels",
    "rounded",
    "runs_of",
    "save",
    "scale",
    "show_panels",
    "show_rows",
    "use_style",
]
