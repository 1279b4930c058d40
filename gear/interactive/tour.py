"""The notebook `tour`: index grids, the soft read-out at any tau, nearest codes and guided samples.

The functions `draw_*` take tensors and return a figure; the functions `tokens`, `readout` and
`samples` put controls beside such a figure.
"""

import math

import ipywidgets as widgets
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle

from gear.config import UserError, check_value
from gear.figures.style import PALETTE, use_style
from gear.generator.sampling import Guidance, generate
from gear.images import to_uint8
from gear.interactive.widgets import Panel, TokenGrid, text_colour
from gear.measures.codes import row_entropies

NEAREST = 10  # codes drawn for a patch
SAMPLES = 8  # samples drawn of a class
HARD = 1e-6  # a tau so small that the read-out is hard
BRIGHT = 50  # upper end of the colour scale of exp H, in codes
NUMBERED = 12  # largest side of a grid, in tokens, on which indices are legible


# -- quantities ------------------------------------------------------------------------------------


@torch.no_grad()
def code_colours(tokenizer, indices):
    """Return a colour for each index, (h, w) -> (h, w, 3) in [0, 1].

    The colour of a code is the mean colour of the centre patch of a 3 x 3 grid of that code.
    """
    codes, inverse = indices.unique(return_inverse=True)
    f = tokenizer.config.downsampling
    # 32 codes at a time, because a large grid may hold as many codes as tokens
    fields = codes[:, None, None].expand(-1, 3, 3).split(32)
    # each (n, 3)
    middles = [tokenizer.decode(field)[:, :, f : 2 * f, f : 2 * f].mean((2, 3)) for field in fields]
    return (torch.cat(middles) / 2 + 0.5).clamp(0, 1)[inverse]


@torch.no_grad()
def decode_mixture(tokenizer, affinity, tau):
    """Decode the soft read-out of the codes, softmax(A / tau) C: affinity (L, K) -> (3, H, W).

    A tau of 0 gives the hard read-out.
    """
    codes = tokenizer.quantizer.codes().to(affinity.device)
    side = math.isqrt(len(affinity))
    rows = (affinity / tau).softmax(-1) @ codes if tau else codes[affinity.argmax(-1)]  # (L, D)
    return tokenizer.decode_latents(rows.T.reshape(1, -1, side, side))[0]


@torch.no_grad()
def variants(tokenizer, indices, position, codes):
    """Decode an index grid (h, w) with each of `codes` (n,) at `position`.

    The images (n, 3, H, W) are cropped to the patch at `position` and its neighbours.
    """
    row, column = divmod(position, indices.shape[1])
    grids = indices.repeat(len(codes), 1, 1)
    grids[:, row, column] = codes
    f = tokenizer.config.downsampling
    return tokenizer.decode(grids)[
        :, :, max(row - 1, 0) * f : (row + 2) * f, max(column - 1, 0) * f : (column + 2) * f
    ]


def changed_tokens(tokenizer, before, images):
    """Return which tokens differ between `tokenizer` and `before`: images (B, 3, H, W) -> (B, h, w)
    bool.

    The comparison is meaningful if the training of one tokenizer started from the other, because
    codes then keep their indices. Raises UserError for codebooks of different sizes.
    """
    if tokenizer.config.codebook_size != before.config.codebook_size:
        raise UserError(
            f"these tokenizers have different codes, {tokenizer.config.codebook_size} and "
            f"{before.config.codebook_size}: compare a tokenizer with the one from which its "
            "training started."
        )
    with torch.no_grad():
        return tokenizer.encode(images) != before.encode(images)


# -- figures ---------------------------------------------------------------------------------------


def draw_images(rows):
    """Draw {title: images (B, 3, H, W) in [-1, 1]}, one row per title; return the figure."""
    count = len(next(iter(rows.values())))
    fig, axes = _grid(len(rows), count, width=10, height=(10 / count + 0.3) * len(rows))
    for line, (title, images) in zip(axes, rows.items()):
        for axis, image in zip(line, images):
            _picture(axis, image)
        line[0].set_title(title)
    return fig


@torch.no_grad()
def draw_tokens(tokenizer, before, images, image):
    """Draw the image number `image` of `images`, its index grid, its reconstruction, and the tokens
    that differ from those of the tokenizer `before`; return the figure.
    """
    picture = images[image : image + 1]
    indices = tokenizer.encode(picture)
    changed = changed_tokens(tokenizer, before, picture)[0]
    colours = code_colours(tokenizer, indices[0])
    fig, axes = _grid(1, 4, width=9.4, height=2.6)
    _picture(axes[0, 0], picture[0], "image")
    _show(axes[0, 1], colours, "indices, in their codes' colours")
    _picture(axes[0, 2], tokenizer.decode(indices)[0], "reconstruction")
    faded = torch.where(changed[..., None], colours, torch.tensor(0.94))
    _show(axes[0, 3], faded, f"{int(changed.sum())} of {changed.numel()} tokens changed")
    for row, line in enumerate(indices[0].tolist() if len(colours) <= NUMBERED else []):
        for column, index in enumerate(line):
            axes[0, 1].text(
                column,
                row,
                index,
                ha="center",
                va="center",
                fontsize=56 / len(colours),
                color=text_colour(colours[row, column]),
            )
    return fig


@torch.no_grad()
def draw_taus(tokenizer, image, position, taus):
    """Draw the soft read-out of an image (3, H, W) at each of `taus`, and the hard one; return the
    figure.

    The upper row shows the decoded images, the lower row the assignment of the patch at `position`.
    """
    affinity = tokenizer.affinity(image[None]).dense[0]  # (L, K)
    fig, axes = _grid(2, len(taus) + 1, width=10, height=2.7, left=0.05, bottom=0.1)
    for (above, below), tau in zip(axes.T, [*taus, 0]):
        _picture(
            above, decode_mixture(tokenizer, affinity, tau), rf"$\tau$ = {tau:g}" if tau else "hard"
        )
        _outline(above, position, tokenizer.config.downsampling)
        masses, size = _masses(affinity[position], tau or HARD)
        _bars(below, masses.values, PALETTE["GEAR"] if tau else PALETTE["teacher"])
        below.set(box_aspect=0.7, xlabel=f"exp H = {size:.3g}")
        below.tick_params(labelleft=above is axes[0, 0])
    axes[1, 0].set_ylabel(r"$\pi_k$", labelpad=-8)
    return fig


@torch.no_grad()
def draw_readout(tokenizer, images, image, position, tau):
    """Draw the soft read-out of one patch at `tau`; return the figure.

    It shows the masses of the nearest codes, the patch decoded with each of them, and the image
    decoded from the hard and the soft read-out.
    """
    picture = images[image : image + 1]
    f = tokenizer.config.downsampling
    affinity = tokenizer.affinity(picture).dense[0]  # (L, K)
    indices = tokenizer.encode(picture)[0]
    masses, size = _masses(affinity[position], tau)
    use_style()
    fig = plt.figure(figsize=(6.4, 4.2))
    axis = fig.add_axes([0.1, 0.7, 0.89, 0.23])
    strip = fig.add_axes([0.1, 0.49, 0.89, 0.155])
    _bars(axis, masses.values, PALETTE["GEAR"])
    axis.set_ylabel(r"$\pi_k$")
    axis.set_title(
        rf"nearest codes of the patch: H = {math.log(size):.3g} nats, exp H = {size:.3g} codes",
        y=1.0,
    )
    for i, patch in enumerate(to_uint8(variants(tokenizer, indices, position, masses.indices))):
        strip.imshow(patch.numpy(), extent=(i - 0.44, i + 0.44, 0, 1))
    strip.set(xlim=axis.get_xlim(), yticks=[], aspect="auto", frame_on=False)
    strip.set_xticks(range(len(masses.indices)), masses.indices.tolist(), fontsize=8)
    strip.tick_params(length=0)
    strip.grid(False)
    panels = [fig.add_axes([0.1 + 0.2255 * i, 0, 0.2135, 0.34]) for i in range(4)]
    _picture(panels[0], picture[0], "image")
    _picture(panels[1], decode_mixture(tokenizer, affinity, 0), "hard")
    _picture(panels[2], decode_mixture(tokenizer, affinity, tau), rf"soft, $\tau$ = {tau:.3g}")
    sizes = row_entropies(affinity, tau).exp().view(indices.shape)
    _show(panels[3], sizes, f"exp H, 1 to {BRIGHT}", norm=LogNorm(1, BRIGHT), cmap="magma")
    for panel, pixels in zip(panels, (f, f, f, 1)):
        _outline(panel, position, pixels)
    return fig


@torch.no_grad()
def draw_samples(generator, tokenizer, grid, label, cfg_scale, temperature, seed):
    """Draw samples of a class with and without guidance, from the same random numbers; return the
    figure.

    The third row shows the entropy with which each token of the guided samples was predicted.
    """
    labels = torch.full((SAMPLES,), label)
    options = dict(temperature=temperature, seed=seed)
    guided = generate(generator, labels, grid, cfg_scale=cfg_scale, **options)
    plain = generate(generator, labels, grid, cfg_scale=1.0, **options)
    entropy = row_entropies(generator(guided, labels), 1.0).view(guided.shape)
    max_entropy = math.log(generator.codebook_size)
    fig, axes = _grid(3, SAMPLES, width=6.4, height=3.2)
    for column, guided_image, plain_image, entropies in zip(
        axes.T, tokenizer.decode(guided), tokenizer.decode(plain), entropy
    ):
        _picture(column[0], guided_image)
        _picture(column[1], plain_image)
        _show(column[2], entropies, vmin=0, vmax=max_entropy, cmap="magma")
    axes[0, 0].set_title(f"guided, cfg_scale = {cfg_scale:g}")
    axes[1, 0].set_title("the same random numbers without guidance")
    axes[2, 0].set_title(
        f"entropy of the first row's tokens given those before: 0 to ln K = {max_entropy:.2f} nats"
    )
    return fig


def _grid(rows, columns, width, height, left=0.005, bottom=0.005):
    """Make a grid of axes that fills a figure.

    Fixed positions are several times faster than a layout engine, which matters under a slider.
    """
    use_style()
    return plt.subplots(
        rows,
        columns,
        figsize=(width, height),
        squeeze=False,
        gridspec_kw=dict(
            left=left,
            right=0.995,
            bottom=bottom,
            top=1 - 0.27 / height,
            wspace=0.06,
            hspace=0.3 * rows / height,
        ),
    )


def _picture(axis, image, title=""):
    """Put an image, (3, H, W) in [-1, 1], on an axis without ticks or frame."""
    _show(axis, to_uint8(image[None])[0], title)


def _show(axis, image, title="", **options):
    """Put a grid, (h, w) or (h, w, 3), on an axis without ticks or frame."""
    axis.imshow(image.numpy(), **options)
    # with y given, matplotlib need not search for a position, which takes half the drawing time
    axis.set_title(title, y=1.0)
    axis.set_axis_off()


def _outline(axis, position, f):
    """Outline the patch at `position` in the square image of an axis, at `f` pixels per token."""
    row, column = divmod(position, axis.get_images()[0].get_array().shape[1] // f)
    axis.add_patch(
        Rectangle(
            (column * f - 0.5, row * f - 0.5), f, f, fill=False, edgecolor=PALETTE["GEAR"], lw=1.5
        )
    )


def _masses(affinity, tau):
    """Return the largest masses of softmax(A / tau) with their codes, and exp H: affinity (K,)."""
    masses = (affinity / tau).softmax(-1).topk(min(NEAREST, len(affinity)))
    return masses, float(row_entropies(affinity, tau).exp())


def _bars(axis, masses, colour):
    """Draw masses on a logarithmic axis, because those of a very soft read-out are all small."""
    axis.bar(range(len(masses)), masses.clamp(min=1e-9).numpy(), color=colour, width=0.86)
    axis.set(xlim=(-0.5, len(masses) - 0.5), yscale="log", ylim=(1e-3, 1), xticks=[])
    axis.minorticks_off()


# -- panels with controls --------------------------------------------------------------------------


def tokens(tokenizer, before, images):
    """Return a Panel that shows any of `images` as tokens, with the control `image`."""
    return Panel(
        lambda image: draw_tokens(tokenizer, before, images, image),
        {"image": _image_slider(images)},
    )


def readout(tokenizer, images, tau, position=0):
    """Return a Panel that shows the soft read-out of any patch at any tau, with the controls
    `image`, `tau` and `position`.
    """
    h, w = tokenizer.encode(images[:1]).shape[1:]
    controls = {
        "image": _image_slider(images),
        "tau": widgets.FloatLogSlider(
            tau, min=-3, max=0.5, step=0.05, description="τ", readout_format=".3g"
        ),
        "position": TokenGrid(h, w, position),
    }

    def paint(_=None):
        indices = tokenizer.encode(images[controls["image"].value][None])[0]
        controls["position"].paint(indices, code_colours(tokenizer, indices))

    paint()
    controls["image"].observe(paint, "value")
    return Panel(lambda **values: draw_readout(tokenizer, images, **values), controls)


def samples(generator, tokenizer, grid, classes, cfg_scale=1.5):
    """Return a Panel that shows samples of any class, with the controls `label`, `cfg_scale`,
    `temperature` and `seed`.
    """
    check_value("cfg_scale", cfg_scale, Guidance)
    scales = dict(min=0, max=max(6, cfg_scale), step=0.25)
    controls = {
        "label": widgets.Dropdown(
            options=[(name, i) for i, name in enumerate(classes)], description="class c"
        ),
        "cfg_scale": widgets.FloatSlider(
            cfg_scale, **scales, description="cfg_scale", continuous_update=False
        ),
        "temperature": widgets.FloatSlider(
            1, min=0, max=1.5, step=0.05, description="temp.", continuous_update=False
        ),
        "seed": widgets.BoundedIntText(0, min=0, max=2**31, description="seed"),
    }
    panel = Panel(lambda **values: draw_samples(generator, tokenizer, grid, **values), controls)
    button = widgets.Button(
        description="Sample again", icon="refresh", tooltip="take the next seed"
    )
    button.on_click(lambda _: controls["seed"].set_trait("value", controls["seed"].value + 1))
    panel.place(below=[button])
    return panel


def _image_slider(images):
    return widgets.IntSlider(0, min=0, max=len(images) - 1, description="image")
