"""The paper's ablations (Tables 5 to 13) as data: each study's cells, derived from a preset by
changing one axis only.

A cell is GEAR's joint stage at one setting of the axis: its own generator and its own tokenizer are
measured, as the paper does in its ablations (Sec. 4.1). The same name with a label (or a recipe of
its own) trains it: `gear train scenes-joint-s0 --tau 0.05 --label tau-0.05`. Where the setting
concerns the baseline too, the cell has a LlamaGen-REPA of its own; else all cells share the
preset's. A fresh generator on the cell's tokenizer, as in Tables 1 to 3, may stand beside them:
the role "transfer".
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from gear.config import Checked, Seed, UserError, Whole, flatten, nearest, read_numbers, require
from gear.evaluation.networks import reference_images
from gear.experiments.presets import change
from gear.experiments.recipes import RECIPES, plan, recipe
from gear.generator.config import GENERATORS
from gear.runs.names import RunName

PRESETS = ("scenes", "cifar10", "cifar10-smoke", "imagenet100-128", "imagenet256-l", "tiny")
# for Fréchet distances; else Inception
SPACES = {"scenes": "scenes", "tiny": "scenes", "cifar10": "efficientnet-lite0"}
# of a score: more than the space has features (64, 1,280 and 2,048), and the papers' number
SAMPLES = {"scenes": 1_000, "efficientnet-lite0": 2_000, "inception": 50_000}


@dataclass(frozen=True)
class Cell:
    """One setting of a study's axis."""

    title: str
    label: str = ""  # ends the names of its runs; "": the preset's own runs, or a recipe of its own
    published: str = ""  # the row of the paper's table that it is; "": the paper has none
    changes: dict = field(default_factory=dict)  # of the preset
    family: str = ""  # ends the preset's name
    variant: str = ""  # of the joint stage: one of recipes.VARIANTS
    share_warm_up: bool = False  # the warm-up keeps the preset's image size


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
    role: str  # "gear", "baseline" or "transfer"
    seed: int
    name: str
    words: tuple
    planned: list  # [(name, Config)] of ancestors and the run itself


def _joint(preset):
    """Return the recipe of a preset's joint stage."""
    return RECIPES[str(RunName(preset, "joint"))]


def _has(preset):
    """Say whether there are recipes of a preset."""
    return str(RunName(preset, "joint")) in RECIPES


def _values(preset, section, name, label, printed, rows):
    """Return one cell per value: the paper's, and the preset's own among them."""
    own = getattr(getattr(_joint(preset), section), name)
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
    own, cells = _joint(preset).objective.tau, []
    for quantizer, suffix in suffixes.items():
        if _has(f"{preset}{suffix}"):
            tau = _joint(f"{preset}{suffix}").objective.tau
            title = quantizer if tau == own else f"{quantizer}, tau = {tau:g}"
            row = f"{printed.get(quantizer, quantizer)}, +GEAR"
            cells.append(Cell(title, published=row, family=suffix))
    return cells


# three of a preset; elsewhere the public ones. As the paper's, they differ in width and depth, are
# aligned at a third of the depth, and share one width of the projector.
SIZES = {
    "scenes": {
        "B": dict(width=64, layers=3, heads=2, tap_layer=1),
        "L": {},
        "XL": dict(width=144, layers=9, heads=3, tap_layer=3),
    },
    "cifar10": {
        "B": dict(width=256, layers=6, heads=4, tap_layer=2),
        "L": {},
        "XL": dict(width=512, layers=12, heads=8, tap_layer=4),
    },
    "tiny": {"B": dict(width=16), "L": {}, "XL": dict(width=48, layers=6, tap_layer=2)},
}
SIZES["cifar10-smoke"] = SIZES["scenes"]


def _size(preset):
    own = _joint(preset).generator
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
    names = ("width", "layers", "heads", "tap_layer")
    return {
        name: getattr(other, name) for name in names if getattr(other, name) != getattr(own, name)
    }


def _teacher(preset):
    printed = {
        "dinov2-b": "DINOv2-B",
        "dinov3-b": "DINOv3-B",
        "siglip2-b": "SigLIPv2-B",
        "vjepa2.1-b": "V-JEPA2.1-B",
    }
    own = _joint(preset).teacher
    names = (
        ("scenes", "efficientnet-lite0") if preset == "scenes" else dict.fromkeys([own, *printed])
    )
    return [
        Cell(
            name,
            "" if name == own else name,
            f"{printed[name]}, +GEAR" if name in printed else "",
            {} if name == own else dict(teacher=name),
        )
        for name in names
    ]


def _depth(preset):
    generator = _joint(preset).generator
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
    own = _joint(preset).data.image_size
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
            share_warm_up=True,
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


@dataclass(frozen=True)
class Scoring(Checked):
    """How the samples of a preset's runs are scored."""

    count: Whole = 0  # samples; 0: as many as the feature space asks for
    # as `gear evaluate` takes it, told from others by its name; "": the run's own training images
    reference: str = ""
    weights: str = ""  # the feature network's weight file, if not in a cache
    sample_size: Whole = 0  # px of a side to which samples of another size are resized; 0: none

    def __post_init__(self):
        super().__post_init__()
        require(self.count != 1, "count is 1: a score is of two samples at least.")

    def samples(self, preset):
        """Return how many samples are drawn of a run of a preset."""
        return self.count or SAMPLES[space(preset)]

    def resized_to(self, config):
        """Return to which side the samples of a run with `config`, a dict, are resized; 0: none."""
        return 0 if self.sample_size == config["data"]["image_size"] else self.sample_size


def of_study(name, preset, scoring):
    """Return how a study is scored: samples of Table 13 are resized to the preset's size."""
    if name != "resolution":
        return scoring
    return replace(scoring, sample_size=_joint(preset).data.image_size)


def num_real(preset):
    """Return how many images a preset's samples are compared with, and as many are
    reconstructed.
    """
    return reference_images(space(preset))


def seeds_of(text):
    """Read "0,1,2"; raises UserError for anything else."""
    return sorted(set(read_numbers("seeds", text, Seed)))


def members(name, preset, seeds, labels=None, transfer=False):
    """List the Members of a study: of every cell (or those of `labels`) and seed, GEAR's run, its
    baseline's and, with `transfer`, that of a fresh generator on GEAR's tokenizer.

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
    chosen_runs = {}
    for key, cell in cells.items():
        for seed in seeds if labels is None or key in labels else ():
            baseline = cell if chosen.own_baseline else Cell("LlamaGen-REPA")
            runs = [("baseline", baseline, "llamagen-repa"), ("gear", cell, _joint_method(cell))]
            if transfer:
                runs.append(("transfer", cell, cell.variant or "gear"))
            for role, one, method in runs:
                member = _member(one, role, RunName(f"{stem}{one.family}", method, one.label, seed))
                chosen_runs.setdefault(member.name, member)
    return list(chosen_runs.values())


def _joint_method(cell):
    return f"joint-{cell.variant}" if cell.variant else "joint"


def cell_name(cell):
    """Return what a cell is called on the command line."""
    return cell.label or cell.family.lstrip("-") or cell.variant or "default"


def _member(cell, role, name):
    base_name = str(replace(name, cell=""))
    base = recipe(base_name)
    changed, label = change(base, cell.changes), cell.label or None
    planned = plan(changed, str(name), base, label, dry=True, share_warm_up=cell.share_warm_up)
    return Member(cell, role, name.seed, str(name), words(base_name, cell), planned)


def words(base_name, cell):
    """Return what follows `gear train` for a recipe at a cell's setting."""
    flags = {
        key.rpartition(".")[2].replace("_", "-"): value
        for key, value in flatten(cell.changes).items()
    }
    changed = [word for key, value in flags.items() for word in (f"--{key}", f"{value}")]
    changed += ["--share-warm-up"] if cell.share_warm_up and cell.changes else []
    return (base_name, *changed, *(("--label", cell.label) if cell.label else ()))
