"""The command line: gear train | sample | figures | claims | runs | teacher."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image
from torchvision.utils import make_grid

from gear import data, figures, render
from gear.analysis import claims
from gear.checkpoints import load_generator, load_module, load_networks, load_tokenizer, network, token_grid
from gear.config import Interrupted, TrainingStopped, UserError, from_dict, nearest
from gear.generator.sampling import sample
from gear.home import check_writable, write_atomically
from gear.jobs import train_many
from gear.recipes import RECIPES, recipe, train_with_parents
from gear.run import Run, run_names
from gear.teachers.scenes import ScenesTeacher, package
from gear.training.loop import Runtime
from gear.training.state import Config


@dataclass(frozen=True)
class TrainOptions:
    config: Config
    runtime: Runtime = field(default_factory=Runtime)
    name: str = ""  # the run's name, if not the recipe's
    label: str = ""  # ends the name of this run and of every parent that the changes concern
    jobs: int = 1  # runs trained at once, where several are named


@dataclass(frozen=True)
class SampleOptions:
    labels: tuple[int, ...] = ()  # a class for each image; none given: sixteen, from the first class on
    cfg_scale: float = 1.0  # guidance; 1 is none
    temperature: float = 1.0
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0  # 1 keeps all
    seed: int = 0
    out: Path = Path("samples.png")


@dataclass(frozen=True)
class FigureOptions:
    force: bool = False  # redraw what is up to date too
    demo: bool = False  # the interactive notebooks too, which need weights
    jobs: int = 1  # notebooks executed at once
    parameters: Annotated[tuple[tuple[str, str], ...], tyro.conf.UseAppendAction, tyro.conf.arg(aliases=["-p"])] = ()
    # ^ KEY VALUE of the one notebook that is named; may be repeated


@dataclass(frozen=True)
class ClaimOptions:
    label: str = ""  # of the runs, where they were trained with one


def train_command(names, arguments):
    """Train runs by recipe name; parents that are missing come first. The same command resumes."""
    if not names:
        raise UserError(f"name a recipe: gear train NAME. Known: {', '.join(RECIPES)}.")
    base = recipe(names[0])
    options = _parse(TrainOptions(base), arguments)
    if options.config.seed != base.seed:  # the seed is part of the name
        seeded = [f"{name}-s{options.config.seed}" for name in names]
        return train_command(seeded, arguments)
    if len(names) > 1:
        if options.config != base:
            raise UserError("changes apply to one run: name a single recipe.")
        if options.name or options.label:
            raise UserError("--name and --label name one run: name a single recipe.")
        return train_many(names, options.jobs, options.runtime)
    name = options.name or (f"{names[0]}-{options.label}" if options.label else names[0])
    run = train_with_parents(options.config, name, base, options.label, options.runtime)
    print(f"{run.name}: step {run.step}, {run.path}")


def sample_command(names, arguments):
    """Draw samples of a generator run into a PNG."""
    if len(names) != 1:
        raise UserError("name one generator run: gear sample RUN.")
    options = _parse(SampleOptions(), arguments)
    generator, tokenizer = load_generator(names[0]), load_tokenizer(names[0])
    classes = generator.config.num_classes
    labels = options.labels or tuple(i % classes for i in range(16))
    if wrong := [label for label in labels if not 0 <= label < classes]:
        raise UserError(f"labels {wrong}: this run has classes 0 to {classes - 1}.")
    images = sample(
        generator, tokenizer, torch.tensor(labels), token_grid(Run.open(names[0]).config), cfg_scale=options.cfg_scale,
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed,
    )  # fmt: skip
    grid = make_grid(images.permute(0, 3, 1, 2), nrow=8, padding=2, pad_value=255)
    sheet = Image.fromarray(grid.permute(1, 2, 0).numpy())
    write_atomically(options.out, lambda path: sheet.save(path, "PNG"))
    print(f"{len(images)} samples of {names[0]}: {options.out.resolve()}")


def figures_command(names, arguments):
    """Execute the notebooks, or those named, and write their figures; skip what is up to date."""
    options = _parse(FigureOptions(), arguments)
    render.render(names or render.figure_notebooks(options.demo), options.force, dict(options.parameters), options.jobs)


def claims_command(names, arguments):
    """Judge the paper's claims on the runs of a preset (default: scenes); writes claims.csv beside the figures."""
    preset, label = names[0] if names else "scenes", _parse(ClaimOptions(), arguments).label
    presets = [recipe.removesuffix("-gear") for recipe in RECIPES if recipe.endswith("-gear")]
    if preset not in presets:
        raise UserError(f"unknown preset '{preset}'.{nearest(preset, presets)} Known: {', '.join(presets)}.")
    name = "claims" if (preset, label) == ("scenes", "") else "-".join(filter(None, ["claims", preset, label]))
    path = figures.figures_dir() / f"{name}.csv"
    check_writable(path.parent, "GEAR_FIGURES")
    table = figures.rounded(claims.evaluate(preset, label))
    write_atomically(path, lambda temporary: temporary.write_text(table.to_csv(index=False, lineterminator="\n")))
    for row in table.itertuples():
        print(f"{row.verdict:24} {row.claim}, against {row.against}" + (f" ({row.paper})" if row.paper else ""))
        if row.seeds:
            interval = f" [{row.low:+.3g}, {row.high:+.3g}]" if row.seeds > 1 else ""
            print(
                f"{'':24} {row.statistic}: {row.method:.4g} against {row.baseline:.4g}, {row.difference:+.3g}{interval}", end=""
            )
            print(f", {row.agree} of {row.seeds} seeds agree")
    print(f"{table.verdict.value_counts().to_dict()}, runs of {preset}, small scale; {path}")


def runs_command(names, arguments):
    """List the runs: name, stage, step, and whether they are finished."""
    for name in run_names(names[0] if names else "*"):
        run = Run.open(name)
        weights = "" if run.checkpoint_steps() else "  (no weights)"
        print(f"{name:36} {run.config['stage']:10} {run.step:>7} / {run.config['steps']}{weights}")


def teacher_command(names, arguments):
    """Package a run of the recipe teacher-scenes as the scenes teacher (make teacher)."""
    run = Run.open(names[0] if names else "teacher-scenes")
    teacher = load_module(ScenesTeacher(), network(load_networks(run), "teacher", run.name), run.name).eval()
    images, _ = data.load(from_dict(data.DataConfig, run.config["data"]), "train", 4_000)
    kept = teacher.standardise(images)
    losses = run.metrics().iloc[-1].filter(like="val/").round(4).to_dict()
    package(teacher, {
        "recipe": run.config["recipe"], "config_hash": run.config_hash, "steps": run.step, "variance_kept": round(kept, 4),
        "validation_nats_a_patch": losses, "config": run.config,
        "made": "supervised on the factors of gear/scenes.py, per patch; standardised, 64 principal components",
    })  # fmt: skip
    print(f"packaged {run.name}: {kept:.1%} of the standardised variance in 64 components")


COMMANDS = {
    "train": train_command,
    "sample": sample_command,
    "figures": figures_command,
    "claims": claims_command,
    "runs": runs_command,
    "teacher": teacher_command,
}


def _parse(default, arguments):
    return tyro.cli(type(default), default=default, args=arguments, config=(tyro.conf.OmitArgPrefixes,))


def main(arguments=None):
    """Run one command; a user's mistake prints one message and exits with code 2, a stopped run with code 1."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("\n".join(f"gear {name:8} {c.__doc__.splitlines()[0]}" for name, c in COMMANDS.items()))
        return
    name, rest = arguments[0], arguments[1:]
    positional = next((i for i, a in enumerate(rest) if a.startswith("-")), len(rest))
    try:
        if name not in COMMANDS:
            raise UserError(f"unknown command '{name}'.{nearest(name, COMMANDS)} Known: {', '.join(COMMANDS)}.")
        COMMANDS[name](rest[:positional], rest[positional:])
    except UserError as error:
        print(f"gear: {error}", file=sys.stderr)
        sys.exit(2)
    except TrainingStopped as error:
        print(f"gear: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:  # a full disk, a folder without access
        print(f"gear: {error}. Make room or restore access, and give the same command again.", file=sys.stderr)
        sys.exit(1)
    except Interrupted as error:
        print(f"gear: {error}", file=sys.stderr)
        sys.exit(128 + error.number)
    except KeyboardInterrupt:
        print("gear: interrupted. The same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
