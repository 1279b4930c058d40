"""What the interactive notebooks are built of: controls beside a picture that follows them, and an
index grid to click.
"""

import base64
import contextlib
import html
import io

import ipywidgets as widgets
import matplotlib.pyplot as plt
import traitlets
from matplotlib.colors import to_hex

from gear.config import UserError
from gear.figures.style import PALETTE

# dots an inch of a picture; an inch is 100 pixels of the page, so that dense screens have their
# share
RESOLUTION = 150


class Panel(widgets.Box):
    """Controls beside the picture that `draw(**values)` makes of their values, drawn again whenever
    one changes.

    `controls` maps the arguments of `draw` to widgets. Where no widgets live (an executed notebook,
    a page on the web) the panel shows as its picture. What is asked for in vain (UserError) is said
    in the picture's place. (Output of ipywidgets' `interactive_output` lives in a running kernel
    alone, and shows an error as its traceback.)
    """

    def __init__(self, draw, controls):
        self.draw, self.controls, self.held = draw, controls, False
        self.picture, self.message = (
            widgets.Image(format="png", layout={"max_width": "100%"}),
            widgets.HTML(),
        )
        for control in controls.values():
            control.observe(self.update, "value")
        self.column = widgets.VBox(list(controls.values()), layout={"width": "310px"})
        super().__init__(
            [self.column, self.picture, self.message],
            layout={"flex_flow": "row wrap", "align_items": "flex-start"},
        )
        self.update()

    def update(self, _=None):
        """Draw the picture of the controls' present values."""
        if self.held:
            return
        try:
            figure = self.draw(**{name: control.value for name, control in self.controls.items()})
        except UserError as error:
            self.message.value, self.picture.layout.display = (
                f"<pre>{html.escape(str(error))}</pre>",
                "none",
            )
            return
        self.message.value, self.picture.layout.display = "", None
        self.picture.value, self.picture.width = (
            to_png(figure),
            f"{100 * figure.get_figwidth():.0f}",
        )

    @contextlib.contextmanager
    def at_once(self):
        """Change several controls, and draw once."""
        self.held = True
        try:
            yield
        finally:
            self.held = False
        self.update()

    def place(self, above=(), below=()):
        """Put more widgets above and below the controls: they are no arguments of `draw`."""
        self.column.children = (*above, *self.column.children, *below)

    def _repr_mimebundle_(self, **kwargs):
        picture = (
            {"image/png": base64.b64encode(self.picture.value).decode()}
            if self.picture.value
            else {}
        )
        return super()._repr_mimebundle_(**kwargs) | picture


class Table(widgets.HTML):
    """The table that `make(value)` returns for the value of a `control`, made again whenever it
    changes.
    """

    def __init__(self, make, control):
        super().__init__()
        look = '<div class="jp-RenderedHTMLCommon">{}</div>'  # JupyterLab's own, for tables
        show = lambda _=None: self.set_trait(
            "value", look.format(make(control.value).to_html(border=0))
        )
        control.observe(show, "value")
        show()

    def _repr_mimebundle_(self, **kwargs):
        return super()._repr_mimebundle_(**kwargs) | {"text/html": self.value}


class TokenGrid(widgets.GridBox):
    """An index grid of h x w buttons in their codes' colours; `value` is the position chosen, in
    [0, h w).
    """

    value = traitlets.Int(0)

    def __init__(self, h, w, value=0):
        side = max(16, 264 // w)  # pixels
        template = dict(
            grid_template_columns=f"repeat({w}, {side}px)",
            grid_gap="1px",
            margin="8px 16px 8px 8px",
        )
        sized = dict(width=f"{side}px", height=f"{side}px", margin="0", padding="0")
        buttons = [
            widgets.Button(layout=sized, style={"font_size": f"{side // 3}px"})
            for _ in range(h * w)
        ]
        super().__init__(buttons, layout=template)
        for position, button in enumerate(buttons):
            button.on_click(lambda _, position=position: self.set_trait("value", position))
        self.observe(lambda change: self._mark(change.old, change.new), "value")
        self.value = value
        self._mark(0, value)

    def paint(self, indices, colours):
        """Write indices (h, w) on the buttons, in colours (h, w, 3) of [0, 1]."""
        for button, index, colour in zip(
            self.children, indices.flatten().tolist(), colours.flatten(0, 1).numpy()
        ):
            button.description = button.tooltip = str(index)
            button.style.button_color, button.style.text_color = to_hex(colour), ink(colour)

    def _mark(self, old, new):
        self.children[old].layout.border = None
        self.children[new].layout.border = f"3px solid {PALETTE['GEAR']}"


def ink(colour):
    """Return the colour of writing that is legible on an RGB colour in [0, 1]."""
    return "black" if colour.sum() > 1.4 else "white"


def to_png(figure):
    """Turn a figure into the bytes of a PNG, and close it: a notebook shows every figure left open
    once more.
    """
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=RESOLUTION, pil_kwargs={"compress_level": 1})
    plt.close(figure)
    return out.getvalue()
