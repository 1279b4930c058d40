"""The command line: gear COMMAND ..., the commands being those of `COMMANDS`."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from PIL import Image
from tqdm import tqdm

from gear import data, figures, gallery, render
from gear.analysis import claims
from gear.catalogue import readable
from gear.checkpoints import describe, load_generator, load_tokenizer, open_checkpoint
from gear.cli.teacher import teacher_command
from gear.config import TrainingStopped, UserError, __version__, from_dict, given_by, nearest
from gear.console import console
from gear.containers import export
from gear.dry_run import dry_run
from gear.evaluation.evaluate import EvaluateOptions, evaluate, report
from gear.evaluation.sheets import reconstruction_sheet
from gear.generator.sampling import sample
from gear.home import check_target, check_writable, write_atomically
from gear.images import check_divides, image_grid
from gear.jobs import train_many
from gear.options import ClaimOptions, DataOptions, FigureOptions, ReconstructOptions, SampleOptions, SweepOptions, TrainOptions
from gear.recipes import RECIPES, check_teachers, known, plan, recipe, train_with_parents
from gear.results import directions, results, summary, told
from gear.run import Run, open_runs, run_names, run_path
from gear.studies import STUDIES, seeds_of
from gear.sweep import commands, sweep
from gear.training.loop import Runtime


def train_command(names, arguments):
    """Train runs by recipe name; parents that are missing come first. The same command resumes."""
    if not names:
        raise UserError(f"name a recipe: gear train NAME. Known: {known()}.")
    base = recipe(names[0])
    options = _parse(TrainOptions(base), arguments)
    if options.config.seed != base.seed:  # the seed is part of the name
        if named := [name for name in names if name not in RECIPES]:
            raise UserError(f"--seed {options.config.seed}: '{named[0]}' names a seed already. Give one of the two.")
        seeded = [f"{name}-s{options.config.seed}" for name in names]
        return train_command(seeded, arguments)
    if len(names) > 1:
        if options.config != base:
            raise UserError("changes apply to one run: name a single recipe.")
        if options.name or options.label:
            raise UserError("--name and --label name one run: name a single recipe.")
        if options.dry_run:
            planned = {n: c for name in names for n, c in plan(recipe(name), name, dry=True)}  # a shared parent once
            return dry_run(planned.items(), options.gpu, options.utilisation, options.runtime.accumulate)
        return train_many(names, options.jobs, options.runtime)
    name = options.name or (f"{names[0]}-{options.label}" if options.label else names[0])
    with given_by("--name" if options.name else "--label"):
        run_path(name)
    _check_parent(options.config, base)
    if options.dry_run:
        planned = plan(options.config, name, base, options.label, dry=True)
        return dry_run(planned, options.gpu, options.utilisation, options.runtime.accumulate)
    if options.config.teacher != base.teacher:
        with given_by("--teacher"):
            check_teachers([options.config])
    run = train_with_parents(options.config, name, base, options.label, options.runtime, options.wait)
    print(f"{run.name}: step {run.step}, {run.path}")


def _check_parent(config, base):
    """Raise UserError unless the parent that --tokenizer-run names is a recipe, or there."""
    if config.tokenizer_run and config.tokenizer_run != base.tokenizer_run:
        with given_by("--tokenizer-run"):
            try:
                recipe(config.tokenizer_run)
            except UserError:
                Run.open(config.tokenizer_run)


def sweep_command(names, arguments):
    """Run one of the paper's ablations: train and score what is missing, and say where it goes as the paper's table does."""
    if len(names) != 1:
        raise UserError(f"name one study: gear sweep STUDY. Known: {', '.join(STUDIES)}.")
    options = _parse(SweepOptions(), arguments)
    with given_by("--seeds"):
        seeds = seeds_of(options.seeds)
    cells = [c for c in options.cells.split(",") if c] or None
    if options.list:
        given = {"count": options.count, "device": options.device, "workers": options.workers}
        more = [w for key, value in given.items() if value != getattr(SweepOptions, key) for w in (f"--{key}", str(value))]
        print("\n".join(commands(names[0], options.preset, seeds, cells, more)))
        return
    runtime = Runtime(device=options.device, workers=options.workers)
    sweep(names[0], options.preset, seeds, cells, options.jobs, options.count, runtime, tqdm.write)
    if cells is None:
        table = results(names[0], options.preset, seeds, options.count)
        print(f"\n{summary(table).to_string(na_rep='')}\n\n{told(directions(table, names[0], options.preset))}")
        given = {"preset": options.preset, "seeds": options.seeds, "count": options.count}
        more = "".join(f" -p {key} {value}" for key, value in given.items() if value != getattr(SweepOptions, key))
        print(f"small scale, seeds {options.seeds}; drawn by: gear figures ablations -p study {names[0]}{more}")


def sample_command(names, arguments):
    """Draw samples of a generator, a run's or a file's, into a PNG."""
    if len(names) != 1:
        raise UserError("name one generator, a run or a file: gear sample RUN.")
    options = _parse(SampleOptions(), arguments)
    with given_by("--out"):
        out = check_target(options.out, ".png")
    generator = load_generator(names[0])
    if generator.config.text_slots:
        raise UserError("this generator is conditioned on captions' features: give them to gear.sample, in Python.")
    with given_by(options.tokenizer and "--tokenizer"):
        tokenizer = load_tokenizer(options.tokenizer or names[0])
    if generator.codebook_size != tokenizer.config.codebook_size:
        known, there = generator.codebook_size, tokenizer.config.codebook_size
        raise UserError(f"the generator knows {known} codes, the tokenizer has {there}: give the one it was trained on.")
    classes = generator.config.num_classes
    labels = options.labels or tuple(i % classes for i in range(16))
    if wrong := [label for label in labels if not 0 <= label < classes]:
        raise UserError(f"labels {wrong}: this generator has classes 0 to {classes - 1}.")
    images = sample(
        generator, tokenizer, torch.tensor(labels), (options.grid,) * 2 if options.grid else None,
        cfg_scale=options.cfg_scale, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        seed=options.seed,
    )  # fmt: skip
    sheet = Image.fromarray(data.to_uint8(image_grid(data.to_float(images), 8)[None])[0].numpy())
    write_atomically(out, lambda path: sheet.save(path, "PNG"))
    print(f"{len(images)} samples of {names[0]}: {out.resolve()}")


def reconstruct_command(names, arguments):
    """Write a sheet of images above their reconstructions, and what was lost, of a run or a checkpoint file."""
    if len(names) != 1:
        raise UserError("name one run or file: gear reconstruct FILE --images PATH.")
    options = _parse(ReconstructOptions(), arguments)
    with given_by("--out"):
        out = check_target(options.out, ".png")
        path = check_target(out.with_suffix(".json"))
    checkpoint = open_checkpoint(names[0])
    own = data.DataConfig(source="", image_size=256)  # a file has no images of its own
    if checkpoint.container == "run":
        run = Run.open(names[0])  # where other images are looked at, its own need not be there
        own = from_dict(data.DataConfig, run.config["data"]) if options.images else data.trained_on(run)
    if not (options.images or own.source):
        raise UserError("a file has no images of its own: give --images a folder, a zip or an image.")
    split, size = "all" if options.images else "val", options.image_size or own.image_size
    changes = {"source": options.images or own.source, "interpolation": options.interpolation or own.interpolation}
    images_of = replace(own, image_size=size, labels="class", **changes)
    tokenizer = load_tokenizer(names[0], options.ema)
    check_divides((size, size), tokenizer.config.downsampling)
    with given_by(options.images and "--images"):
        images, _ = data.load(images_of, split, options.count)
    sheet, metrics = reconstruction_sheet(tokenizer, images)
    protocol = {
        "weights": tokenizer.source, "source": images_of.source, "split": split, "image_size": size, "crop": "centre",
        "interpolation": images_of.interpolation, "l1": "[0, 1] units",
        "psnr": "dB, mean over images, clamped, not rounded",
    }  # fmt: skip
    text = json.dumps(metrics | {"protocol": protocol}, indent=1) + "\n"
    write_atomically(out, lambda temporary: sheet.save(temporary, "PNG"))
    write_atomically(path, lambda temporary: temporary.write_text(text))
    print(
        f"{tokenizer.source}: PSNR {metrics['psnr']:.2f} dB, L1 {metrics['l1']:.4f}, usage {metrics['usage_entropy']:.2f} "
        f"nats, {len(images)} images of {size} px: {out.resolve()}, {path.name}"
    )


def inspect_command(names, arguments):
    """Say what a checkpoint file or a run holds: layout, sizes, parameters of each part, training step."""
    if len(names) != 1 or arguments:
        raise UserError("name one run or file: gear inspect FILE.")
    print(describe(open_checkpoint(names[0])))


def export_command(names, arguments):
    """Write a run's or a file's networks to OUT: .safetensors with a card, or .pt in the public layout they have."""
    if len(names) != 2 or arguments:
        raise UserError("name what to export and where to: gear export FILE OUT.safetensors, or OUT.pt.")
    if Path(names[1]).suffix not in (".safetensors", ".pt"):
        raise UserError(f"'{names[1]}' ends in neither .safetensors nor .pt: which of the two is asked for?")
    left_out = export(open_checkpoint(names[0]), names[1])
    print(Path(names[1]).resolve(), f"without {', '.join(left_out)}: no public layout has names for them" if left_out else "")


def data_command(names, arguments):
    """Say what a source of images holds: classes with their numbers, counts, sizes, modes, and what is left out."""
    if len(names) != 1:
        raise UserError("name one source: gear data SOURCE, a folder, a zip, tar shards, 'scenes' or a data set's name.")
    options = _parse(DataOptions(), arguments)
    print(data.data_report(data.DataConfig(names[0], labels=options.labels or "class"), options.count))
    for run in open_runs(options.moved) if options.moved else ():
        print(f"{run.name}: its images lie in {data.trained_on(run, names[0], options.labels).source}")


def figures_command(names, arguments):
    """Execute the notebooks, or those named, and write their figures; skip what is up to date. Then the page of all figures."""
    options, stopped = _parse(FigureOptions(), arguments), None
    with given_by("--seeds"):
        seeds = seeds_of(options.seeds) if options.seeds else ()
    try:
        render.render(names, options.force, dict(options.parameters), options.jobs, seeds)
    except TrainingStopped as failures:  # what could be drawn is shown all the same
        stopped = failures
    print(f"gallery: {gallery.write_gallery()}")
    if stopped:
        raise stopped


def evaluate_command(names, arguments):
    """Score runs: sample, compare with a reference, reconstruct; metrics.json keeps every number with its protocol."""
    if not names:
        raise UserError("name a run, or several: gear evaluate RUN.")
    options, runs = _parse(EvaluateOptions(), arguments), [run for name in names for run in open_runs(name)]
    for run in runs:
        evaluate(run.name, options)
    report(runs)


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
    print(claims.told(table))
    print(f"{table.verdict.value_counts().to_dict()}, runs of {preset}, small scale; {path}")


def runs_command(names, arguments):
    """List the runs: name, stage, step, and whether they are finished."""
    if arguments:
        raise UserError(f"gear runs takes names or patterns of runs, and no {arguments[0]}.")
    for run in [run for name in names for run in open_runs(name)] if names else map(Run.open, run_names()):
        weights = "" if run.checkpoint_steps() else "  (no weights)"
        step = readable(lambda run=run: run.step, "?")
        print(f"{run.name:36} {run.config.get('stage', ''):10} {step:>7} / {run.config['steps']}{weights}")


COMMANDS = {
    "train": train_command,
    "sweep": sweep_command,
    "sample": sample_command,
    "reconstruct": reconstruct_command,
    "inspect": inspect_command,
    "export": export_command,
    "data": data_command,
    "evaluate": evaluate_command,
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
    if arguments == ["--version"]:
        print(f"gear {__version__}")
        return
    name, rest = arguments[0], arguments[1:]
    first = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    last = rest.index("--") if "--" in rest else len(rest)  # names follow it, which may begin with a dash
    with console():
        if name not in COMMANDS:
            raise UserError(f"unknown command '{name}'.{nearest(name, COMMANDS)} Known: {', '.join(COMMANDS)}.")
        COMMANDS[name](rest[:first] + rest[last + 1 :], rest[first:last])


if __name__ == "__main__":
    main()
