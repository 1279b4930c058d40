"""The paper's ablations (Tables 5 to 13) as data. A study is one table; its cells are derived from
a preset by changing one axis only.

A cell is GEAR's joint stage at one setting of the axis. The generator and the tokenizer of that
stage are measured, as in the paper's ablations (Sec. 4.1). A cell is trained by its recipe with a
change and a label, e.g. `gear train scenes-joint-s0 --tau 0.05 --label tau-0.05`, or by a recipe
that has the setting already. If the setting also concerns the baseline (LlamaGen-REPA), every cell
has its own baseline; otherwise all cells share the preset's. The role "transfer" is a fresh
generator on the cell's tokenizer, as in Tables 1 to 3.
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
# Beginning of a preset's name: the network whose features the Fréchet distance compares. All other
# presets use Inception.
SPACES = {"scenes": "scenes", "tiny": "scenes", "cifar10": "efficientnet-lite0"}
# Samples per score: more than the network has features (64, 1,280 and 2,048); for Inception, the
# number that papers use.
SAMPLES = {"scenes": 1_000, "efficientnet-lite0": 2_000, "inception": 50_000}


@dataclass(frozen=True)
class Cell:
    """One setting of a study's axis."""

    title: str
    label: str = ""  # ends the names of the cell's runs; "": the runs of a recipe, unchanged
    published: str = ""  # the same setting's row in the paper's table; "": the paper has none
    changes: dict = field(default_factory=dict)  # to the preset's configuration
    family: str = ""  # ends the preset's name, e.g. "-lfq"
    variant: str = ""  # of the joint stage, a key of recipes.VARIANTS
    share_warm_up: bool = False  # the warm-up keeps the preset's image size


@dataclass(frozen=True)
class Study:
    """One ablation table of the paper."""

    table: int
    axis: str
    cells: Callable[[str], list]  # preset -> its Cells
    # published row of the cell that the others are compared with; "": each cell is compared with
    # its own baseline
    reference: str = ""
    # published row of the baseline that all cells share; "": the table has no such row
    published_baseline: str = ""
    short: bool = False  # the paper trains these cells for 100,000 steps

    @property
    def own_baseline(self):
        """Whether each cell has its own baseline."""
        return not self.reference


@dataclass(frozen=True)
class Member:
    """One run of a study."""

    cell: Cell
    role: str  # "gear", "baseline" or "transfer"
    seed: int
    name: str
    words: tuple  # `gear train WORDS` trains the run and its missing ancestors
    planned: list  # [(name, Config)] of its ancestors and of the run itself, in order of training


def _joint(preset):
    """Return the Config of a preset's joint stage."""
    return RECIPES[str(RunName(preset, "joint"))]


def _has(preset):
    """Return whether a preset has recipes."""
    return str(RunName(preset, "joint")) in RECIPES


def _values(preset, section, field_name, label, printed, symbol):
    """Return one cell per value of a configuration field: the values that the paper prints, and the
    preset's own value.
    """
    default = getattr(getattr(_joint(preset), section), field_name)
    return [
        Cell(
            f"{symbol} = {value:g}",
            "" if value == default else f"{label}-{value:g}",
            f"{symbol}={value:g}" if value in printed else "",
            {} if value == default else {section: {field_name: value}},
        )
        for value in sorted({*printed, default}, reverse=True)
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
    default_tau = _joint(preset).objective.tau
    cells = []
    for quantizer, suffix in suffixes.items():
        if _has(f"{preset}{suffix}"):
            tau = _joint(f"{preset}{suffix}").objective.tau
            title = quantizer if tau == default_tau else f"{quantizer}, tau = {tau:g}"
            row = f"{printed.get(quantizer, quantizer)}, +GEAR"
            cells.append(Cell(title, published=row, family=suffix))
    return cells


# Three sizes per preset; a preset that is not listed has the public sizes. As in the paper, sizes
# differ in width and depth, are aligned at a third of the depth, and have projectors of one width.
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
    default = _joint(preset).generator
    public = {name: _difference(default, GENERATORS[name]) for name in ("B", "L", "XL")}
    return [
        Cell(
            f"size {name}",
            f"size-{name}" if changes else "",
            f"LlamaGen-REPA-{name}, +GEAR",
            dict(generator=changes),
        )
        for name, changes in SIZES.get(preset, public).items()
    ]


def _difference(default, changed):
    """Return {field: value} of the sizes in which two GeneratorConfigs differ, with `changed`'s."""
    sizes = {name: getattr(changed, name) for name in ("width", "layers", "heads", "tap_layer")}
    return {name: value for name, value in sizes.items() if value != getattr(default, name)}


def _teacher(preset):
    printed = {
        "dinov2-b": "DINOv2-B",
        "dinov3-b": "DINOv3-B",
        "siglip2-b": "SigLIPv2-B",
        "vjepa2.1-b": "V-JEPA2.1-B",
    }
    default = _joint(preset).teacher
    if preset == "scenes":
        names = ["scenes", "efficientnet-lite0"]
    else:
        names = list(dict.fromkeys([default, *printed]))
    return [
        Cell(
            name,
            "" if name == default else name,
            f"{printed[name]}, +GEAR" if name in printed else "",
            {} if name == default else dict(teacher=name),
        )
        for name in names
    ]


def _depth(preset):
    generator = _joint(preset).generator
    step = max(1, generator.layers // 12)  # the paper moves the tap by 2 of 24 layers
    rows = {-step: "6th layer, +GEAR", 0: "8th layer, +GEAR", step: "10th layer, +GEAR"}
    return [
        Cell(
            f"layer {generator.tap_layer + offset} of {generator.layers}",
            f"tap-{generator.tap_layer + offset}" if offset else "",
            row,
            dict(generator=dict(tap_layer=generator.tap_layer + offset)) if offset else {},
        )
        for offset, row in rows.items()
    ]


def _initialisation(preset):
    return [Cell("from the warm-up", published="GEAR, w/ init."),
            Cell("from nothing", published="GEAR, w/o init.", variant="no-init")]  # fmt: skip


def _resolution(preset):
    default = _joint(preset).data.image_size
    sizes = {
        default: "resolution 256, +GEAR",
        default * 3 // 2: "resolution 384, +GEAR",
        default * 2: "resolution 512, +GEAR",
    }
    return [
        Cell(
            f"{size} px",
            f"{size}px" if size != default else "",
            row,
            dict(data=dict(image_size=size)) if size != default else {},
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
    """Return the Study `name`. Raises UserError, with a suggestion, if there is none."""
    if name not in STUDIES:
        raise UserError(
            f"unknown study '{name}'.{nearest(name, STUDIES)} Known: {', '.join(STUDIES)}."
        )
    return STUDIES[name]


def space(preset):
    """Return the name of the network whose features compare a preset's samples with images."""
    return next(
        (network for prefix, network in SPACES.items() if preset.startswith(prefix)), "inception"
    )


@dataclass(frozen=True)
class Scoring(Checked):
    """How the samples of a preset's runs are scored."""

    count: Whole = 0  # number of samples; 0: the number for the feature network
    # what samples are compared with, as in `gear evaluate --reference`; scores against different
    # references differ by the reference's file name; "": the run's training images
    reference: str = ""
    weights: str = ""  # weight file of the feature network, if it is not in a cache
    sample_size: Whole = 0  # side in px to which samples of another size are resized; 0: never

    def __post_init__(self):
        super().__post_init__()
        require(self.count != 1, "count is 1: a score needs at least two samples.")

    def samples(self, preset):
        """Return the number of samples drawn from a run of a preset."""
        return self.count or SAMPLES[space(preset)]

    def resized_to(self, config):
        """Return the side in px to which the samples of a run with `config` (a dict) are resized; 0
        if they are not.
        """
        return 0 if self.sample_size == config["data"]["image_size"] else self.sample_size


def of_study(name, preset, scoring):
    """Return the Scoring of a study: the resolution study (Table 13) resizes all samples to the
    preset's image size.
    """
    if name != "resolution":
        return scoring
    return replace(scoring, sample_size=_joint(preset).data.image_size)


def num_real(preset):
    """Return the number of real images that a preset's samples are compared with; as many images
    are reconstructed.
    """
    return reference_images(space(preset))


def seeds_of(text):
    """Parse seeds such as "0,1,2" to a sorted list of ints. Raises UserError for other text."""
    return sorted(set(read_numbers("seeds", text, Seed)))


def members(name, preset, seeds, labels=None, transfer=False):
    """List the Members of a study: for every cell and seed, GEAR's run, the baseline's run and,
    with `transfer`, the run of a fresh generator on GEAR's tokenizer.

    labels: names of the cells to list (default: all), as `cell_name` returns them. Raises UserError
    for an unknown study, preset or label.
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
    by_name = {}  # a run that several cells share, such as the baseline, is listed once
    for key, cell in cells.items():
        for seed in seeds if labels is None or key in labels else ():
            baseline = cell if chosen.own_baseline else Cell("LlamaGen-REPA")
            runs = [("baseline", baseline, "llamagen-repa"), ("gear", cell, _joint_method(cell))]
            if transfer:
                runs.append(("transfer", cell, cell.variant or "gear"))
            for role, run_cell, method in runs:
                name = RunName(f"{stem}{run_cell.family}", method, run_cell.label, seed)
                member = _member(run_cell, role, name)
                by_name.setdefault(member.name, member)
    return list(by_name.values())


def _joint_method(cell):
    return f"joint-{cell.variant}" if cell.variant else "joint"


def cell_name(cell):
    """Return the name of a cell on the command line, as `gear sweep --cells` takes it."""
    return cell.label or cell.family.lstrip("-") or cell.variant or "default"


def _member(cell, role, name):
    base_name = str(replace(name, cell=""))
    base = recipe(base_name)
    changed = change(base, cell.changes)
    label = cell.label or None
    planned = plan(changed, str(name), base, label, dry=True, share_warm_up=cell.share_warm_up)
    return Member(cell, role, name.seed, str(name), words(base_name, cell), planned)


def words(base_name, cell):
    """Return the words after `gear train` that train the recipe `base_name` at a cell's setting."""
    flags = {
        key.rpartition(".")[2].replace("_", "-"): value
        for key, value in flatten(cell.changes).items()
    }
    options = [word for flag, value in flags.items() for word in (f"--{flag}", f"{value}")]
    if cell.share_warm_up and cell.changes:
        options.append("--share-warm-up")
    if cell.label:
        options += ["--label", cell.label]
    return (base_name, *options)
