"""Building blocks of the interactive notebooks: controls beside a picture that follows them, a
table that follows a control, and an index grid to click.
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

# dots per inch; an inch of a figure takes 100 pixels of the page, so dense screens show more detail
RESOLUTION = 150


class Panel(widgets.Box):
    """Controls beside a picture: `draw(**values)` draws it from their values, and again whenever a
    control changes.

    `controls` maps the arguments of `draw` to widgets. In an executed notebook or a web page, where
    widgets do not work, the panel shows as its picture. The message of a UserError is shown in
    place of the picture. (The output of ipywidgets' `interactive_output` needs a running kernel,
    and shows an error as its traceback.)
    """

    def __init__(self, draw, controls):
        self.draw = draw
        self.controls = controls
        self.is_held = False  # while it is true, a change of a control does not draw
        self.picture = widgets.Image(format="png", layout={"max_width": "100%"})
        self.message = widgets.HTML()
        for control in controls.values():
            control.observe(self.update, "value")
        self.column = widgets.VBox(list(controls.values()), layout={"width": "310px"})
        super().__init__(
            [self.column, self.picture, self.message],
            layout={"flex_flow": "row wrap", "align_items": "flex-start"},
        )
        self.update()

    def update(self, _=None):
        """Draw the picture for the current values of the controls."""
        if self.is_held:
            return
        try:
            figure = self.draw(**{name: control.value for name, control in self.controls.items()})
        except UserError as error:
            self.message.value = f"<pre>{html.escape(str(error))}</pre>"
            self.picture.layout.display = "none"
            return
        self.message.value = ""
        self.picture.layout.display = None
        self.picture.value = to_png(figure)
        self.picture.width = f"{100 * figure.get_figwidth():.0f}"

    @contextlib.contextmanager
    def at_once(self):
        """Let a `with` block change several controls, and draw only once after it."""
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False
        self.update()

    def place(self, above=(), below=()):
        """Put further widgets, which are no arguments of `draw`, above and below the controls."""
        self.column.children = (*above, *self.column.children, *below)

    def _repr_mimebundle_(self, **kwargs):
        picture = (
            {"image/png": base64.b64encode(self.picture.value).decode()}
            if self.picture.value
            else {}
        )
        return super()._repr_mimebundle_(**kwargs) | picture


class Table(widgets.HTML):
    """The table that `make(value)` returns for the value of a `control`, made again whenever the
    value changes.
    """

    def __init__(self, make, control):
        super().__init__()
        template = '<div class="jp-RenderedHTMLCommon">{}</div>'  # JupyterLab's style of tables
        show = lambda _=None: self.set_trait(
            "value", template.format(make(control.value).to_html(border=0))
        )
        control.observe(show, "value")
        show()

    def _repr_mimebundle_(self, **kwargs):
        return super()._repr_mimebundle_(**kwargs) | {"text/html": self.value}


class TokenGrid(widgets.GridBox):
    """An index grid of h x w buttons in the colours of their codes; `value` is the chosen position,
    in [0, h w).
    """

    value = traitlets.Int(0)

    def __init__(self, h, w, value=0):
        side = max(16, 264 // w)  # pixels
        template = dict(
            grid_template_columns=f"repeat({w}, {side}px)",
            grid_gap="1px",
            margin="8px 16px 8px 8px",
        )
        button_layout = dict(width=f"{side}px", height=f"{side}px", margin="0", padding="0")
        buttons = [
            widgets.Button(layout=button_layout, style={"font_size": f"{side // 3}px"})
            for _ in range(h * w)
        ]
        super().__init__(buttons, layout=template)
        for position, button in enumerate(buttons):
            button.on_click(lambda _, position=position: self.set_trait("value", position))
        self.observe(lambda change: self._mark(change.old, change.new), "value")
        self.value = value
        self._mark(0, value)

    def paint(self, indices, colours):
        """Write indices (h, w) on the buttons, and set their colours (h, w, 3) in [0, 1]."""
        for button, index, colour in zip(
            self.children, indices.flatten().tolist(), colours.flatten(0, 1).numpy()
        ):
            button.description = button.tooltip = str(index)
            button.style.button_color = to_hex(colour)
            button.style.text_color = text_colour(colour)

    def _mark(self, old, new):
        self.children[old].layout.border = None
        self.children[new].layout.border = f"3px solid {PALETTE['GEAR']}"


def text_colour(colour):
    """Return the colour of text, black or white, that is legible on an RGB colour in [0, 1]."""
    return "black" if colour.sum() > 1.4 else "white"


def to_png(figure):
    """Turn a figure into the bytes of a PNG file, and close it.

    A notebook would show an open figure a second time.
    """
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=RESOLUTION, pil_kwargs={"compress_level": 1})
    plt.close(figure)
    return out.getvalue()
