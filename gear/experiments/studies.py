"""The paper's ablations (Tables 5 to 13) as data: each study's cells, derived from a preset by
changing one axis only.

A cell is a fresh generator on a tokenizer that GEAR trained, at one setting of the axis; the same
name with a label (or a recipe of its own) trains it: `gear train scenes-gear-s0 --tau 0.05 --label
tau-0.05`. Where the setting concerns the baseline too, the cell has a LlamaGen-REPA of its own;
else all cells share the preset's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from gear.config import Seed, UserError, flatten, nearest, read_numbers
from gear.experiments.presets import change
from gear.experiments.recipes import RECIPES, plan, recipe
from gear.generator.config import GENERATORS
from gear.runs.names import RunName

PRESETS = ("scenes", "cifar10", "cifar10-smoke", "imagenet100-128", "imagenet256-l", "tiny")
# for Fréchet distances; else Inception
SPACES = {"scenes": "scenes", "tiny": "scenes", "cifar10": "efficientnet-lite0"}
SAMPLES = 1_000  # drawn for a cell's scores, unless told otherwise


@dataclass(frozen=True)
class Cell:
    """One setting of a study's axis."""

    title: str
    label: str = ""  # ends the names of its runs; "": the preset's own runs, or a recipe of its own
    published: str = ""  # the row of the paper's table that it is; "": the paper has none
    changes: dict = field(default_factory=dict)  # of the preset
    family: str = ""  # ends the preset's name
    variant: str = "gear"  # the recipe's method


@dataclass(frozen=True)
class Study:
    """One of the paper's tables: `cells(preset)` are its settings."""

    table: int
    axis: str
    cells: Callable[[str], list]
    # the published row with which others are compared; "": each with its own baseline
    reference: str = ""
    # the row of LlamaGen-REPA that all cells share, where the table prints it
    published_baseline: str = ""
    short: bool = False  # the paper trains these for 100,000 steps

    @property
    def own_baseline(self):
        return not self.reference


@dataclass(frozen=True)
class Member:
    """One run of a study: `gear train WORDS` trains it, and what is missing of its ancestors, which
    are `planned` before it.
    """

    cell: Cell
    role: str  # "gear" or "baseline"
    seed: int
    name: str
    words: tuple
    planned: list  # [(name, Config)] of ancestors and the run itself


def _gear(preset):
    """Return the recipe of a preset's fresh generator on GEAR's tokenizer."""
    return RECIPES[str(RunName(preset, "gear"))]


def _has(preset):
    """Say whether there are recipes of a preset."""
    return str(RunName(preset, "gear")) in RECIPES


def _values(preset, section, name, label, printed, rows):
    """Return a cell a value: the paper's, and the preset's own among them."""
    own = getattr(getattr(_gear(preset), section), name)
    return [
        Cell(
            f"{rows} = {v:g}",
            "" if v == own else f"{label}-{v:g}",
            f"{rows}={v:g}" if v in printed else "",
            {} if v == own else {section: {name: v}},
        )
        for v in sorted({*printed, own}, reverse=True)
    ]


def _temperature(preset):
    return _values(preset, "objective", "tau", "tau", (0.5, 0.1, 0.05, 0.01, 0.005), "tau")


def _weight(preset):
    return _values(preset, "objective", "align_weight", "lambda", (0.25, 0.5, 0.75, 1.0), "lambda")


def _components(preset):
    return [
        Cell("soft bridge (GEAR)", published="GEAR"),
        Cell("straight-through", published="w/ STE", variant="straight-through"),
        Cell("no adversarial loss", published="w/o L_GAN", variant="no-gan"),
        Cell("NTP through inputs", variant="naive-inputs"),
        Cell("NTP through both", variant="naive"),
    ]


def _tokenizer(preset):
    suffixes = {"VQ": "", "LFQ": "-lfq", "IBQ": "-ibq"}
    printed = {"VQ": "VQVAE"}
    return [
        Cell(title, published=f"{printed.get(title, title)}, +GEAR", family=suffix)
        for title, suffix in suffixes.items()
        if _has(f"{preset}{suffix}")
    ]


# three of a preset, aligned at a third of the depth or so, as the paper's are; elsewhere the public
# ones
SIZES = {
    "scenes": {
        "B": dict(width=64, layers=3, heads=2, tap_layer=1, projector_dim=128),
        "L": {},
        "XL": dict(width=144, layers=6, heads=3, tap_layer=3, projector_dim=288),
    },
    "cifar10": {
        "B": dict(width=256, layers=6, heads=4, tap_layer=2, projector_dim=512),
        "L": {},
        "XL": dict(width=512, layers=12, heads=8, tap_layer=4, projector_dim=1024),
    },
    "tiny": {"B": dict(width=16, layers=2), "L": {}, "XL": dict(width=48)},
}
SIZES["cifar10-smoke"] = SIZES["scenes"]


def _size(preset):
    own = _gear(preset).generator
    public = {name: _difference(own, GENERATORS[name]) for name in ("B", "L", "XL")}
    return [
        Cell(
            f"size {name}",
            f"size-{name}" if changes else "",
            f"LlamaGen-REPA-{name}, +GEAR",
            dict(generator=changes),
        )
        for name, changes in SIZES.get(preset, public).items()
    ]


def _difference(own, other):
    names = ("width", "layers", "heads", "tap_layer", "projector_dim")
    return {
        name: getattr(other, name) for name in names if getattr(other, name) != getattr(own, name)
    }


def _teacher(preset):
    printed = {
        "dinov2-b": "DINOv2-B",
        "dinov3-b": "DINOv3-B",
        "siglip2-b": "SigLIPv2-B",
        "vjepa2-l": "V-JEPA2.1-B",
    }
    own = _gear(preset).teacher
    names = (
        ("scenes", "efficientnet-lite0") if preset == "scenes" else dict.fromkeys([own, *printed])
    )
    titles = {"vjepa2-l": "vjepa2-l (the paper: V-JEPA 2.1 B)"}  # whose weights we can open
    return [
        Cell(
            titles.get(name, name),
            "" if name == own else name,
            f"{printed[name]}, +GEAR" if name in printed else "",
            {} if name == own else dict(teacher=name),
        )
        for name in names
    ]


def _depth(preset):
    generator = _gear(preset).generator
    step = max(1, generator.layers // 12)  # 2 of 24 layers
    rows = {-step: "6th layer, +GEAR", 0: "8th layer, +GEAR", step: "10th layer, +GEAR"}
    return [
        Cell(
            f"layer {generator.tap_layer + d} of {generator.layers}",
            f"tap-{generator.tap_layer + d}" if d else "",
            row,
            dict(generator=dict(tap_layer=generator.tap_layer + d)) if d else {},
        )
        for d, row in rows.items()
    ]


def _initialisation(preset):
    return [Cell("from the warm-up", published="GEAR, w/ init."),
            Cell("from nothing", published="GEAR, w/o init.", variant="no-init")]  # fmt: skip


def _resolution(preset):
    own = _gear(preset).data.image_size
    sizes = {
        own: "resolution 256, +GEAR",
        own * 3 // 2: "resolution 384, +GEAR",
        own * 2: "resolution 512, +GEAR",
    }
    return [
        Cell(
            f"{size} px",
            f"{size}px" if size != own else "",
            row,
            dict(data=dict(image_size=size)) if size != own else {},
        )
        for size, row in sizes.items()
    ]


STUDIES = {
    "temperature": Study(5, "guidance temperature", _temperature, "tau=0.1"),
    "weight": Study(6, "alignment coefficient", _weight, "lambda=0.5"),
    "components": Study(7, "components", _components, "GEAR"),
    "tokenizer": Study(8, "VQ tokenizer", _tokenizer),
    "size": Study(9, "generator size", _size),
    "teacher": Study(10, "representation encoder", _teacher, short=True),
    "depth": Study(11, "alignment depth", _depth, short=True),
    "initialisation": Study(
        12, "tokenizer initialisation", _initialisation, "GEAR, w/ init.", "LlamaGen-REPA-L"
    ),
    "resolution": Study(13, "resolution", _resolution, short=True),
}


def study(name):
    """Return the Study `name`; raises UserError with the nearest one where there is none."""
    if name not in STUDIES:
        raise UserError(
            f"unknown study '{name}'.{nearest(name, STUDIES)} Known: {', '.join(STUDIES)}."
        )
    return STUDIES[name]


def space(preset):
    """Return the feature network in which a preset's samples are compared."""
    return next(
        (network for prefix, network in SPACES.items() if preset.startswith(prefix)), "inception"
    )


def seeds_of(text):
    """Read "0,1,2"; raises UserError for anything else."""
    return sorted(set(read_numbers("seeds", text, Seed)))


def members(name, preset, seeds, labels=None):
    """List the Members of a study: of every cell (or those of `labels`) and seed, GEAR's run and
    its baseline's.

    Raises UserError for an unknown study, preset or label.
    """
    chosen = study(name)
    if preset not in PRESETS:
        raise UserError(
            f"no study of preset '{preset}'.{nearest(preset, PRESETS)} Known: {', '.join(PRESETS)}."
        )
    cells = {cell_name(cell): cell for cell in chosen.cells(preset)}
    if unknown := set(labels or ()) - cells.keys():
        raise UserError(
            f"study '{name}' has no cell {', '.join(sorted(unknown))}. It has: {', '.join(cells)}."
        )
    stem = f"{preset}-100k" if chosen.short and _has(f"{preset}-100k") else preset
    found = {}
    for key, cell in cells.items():
        for seed in seeds if labels is None or key in labels else ():
            baseline = cell if chosen.own_baseline else Cell("LlamaGen-REPA")
            for role, one, method in (
                ("baseline", baseline, "llamagen-repa"),
                ("gear", cell, cell.variant),
            ):
                member = _member(one, role, RunName(f"{stem}{one.family}", method, one.label, seed))
                found.setdefault(member.name, member)
    return list(found.values())


def cell_name(cell):
    """Return what a cell is called on the command line."""
    return (
        cell.label
        or cell.family.lstrip("-")
        or (cell.variant if cell.variant != "gear" else "default")
    )


def _member(cell, role, name):
    base_name = str(replace(name, cell=""))
    base = recipe(base_name)
    planned = plan(change(base, cell.changes), str(name), base, cell.label or None, dry=True)
    return Member(cell, role, name.seed, str(name), words(base_name, cell), planned)


def words(base_name, cell):
    """Return what follows `gear train` for a recipe at a cell's setting."""
    flags = {
        key.rpartition(".")[2].replace("_", "-"): value
        for key, value in flatten(cell.changes).items()
    }
    changed = [word for key, value in flags.items() for word in (f"--{key}", f"{value}")]
    return (base_name, *changed, *(("--label", cell.label) if cell.label else ()))
