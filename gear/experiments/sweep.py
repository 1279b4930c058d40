"""Run a study: train the missing runs of its cells and score them."""

import json
import os
from collections import Counter

import pandas as pd

from gear.config import MissingRuns, from_dict, to_dict
from gear.cost.price import GPUS, price
from gear.device import find_device
from gear.experiments.jobs import Task, training, work
from gear.experiments.recipes import check_teachers, run_name, with_parts
from gear.experiments.results import SCORED, TITLES, measured, scoring_words
from gear.experiments.studies import Scoring, cell_name, members, of_study, study
from gear.files import check_writable
from gear.runs.folder import runs_dir
from gear.runs.listing import readable, run_names
from gear.runs.records import science
from gear.runs.reference import Record
from gear.runs.run import Run
from gear.training.loop import Runtime, is_trained
from gear.training.settings import Config

GPU_JOBS = 8  # at most: each process holds half a gigabyte of libraries and kernels on the GPU


def sweep(
    name,
    preset="scenes",
    seeds=(0, 1, 2),
    cells=None,
    jobs=0,
    scoring=Scoring(),
    runtime=Runtime(),
    tell=print,
    transfer=False,
):
    """Train and score the missing runs of a study, `jobs` at a time (0: see `_jobs`); returns the
    study's Members.

    `tell` receives the cost before the work starts, and the measurements of a member as soon as
    they are complete. After an interruption, the same call continues. Raises as `jobs.train_many`
    does.
    """
    device = find_device(runtime.device)
    chosen = members(name, preset, seeds, cells, transfer)
    scoring = of_study(name, preset, scoring)
    trained = {
        member.name
        for member in chosen
        if is_trained(Run(runs_dir() / member.name), member.planned[-1][1])
    }
    settled = {member.name for member in chosen if _is_settled(member, preset, scoring)}
    without_training = trained | settled  # their ancestors are not needed either
    planned = {
        run: config
        for member in chosen
        if member.name not in without_training
        for run, config in member.planned
    }
    missing = {
        run: config
        for run, config in planned.items()
        if not is_trained(Run(runs_dir() / run), config)
    }
    tasks = _tasks(chosen, settled, missing, preset, scoring, runtime)
    tell(_cost(name, chosen, missing, tasks))
    if not tasks:
        return chosen
    check_teachers(missing.values())
    check_writable(runs_dir(), "GEAR_RUNS")
    remaining = {
        member.name: {task.name for task in tasks if member.name in (task.name, task.needs)}
        for member in chosen
    }

    def done(task_name):
        for member in chosen:
            if task_name in remaining[member.name]:
                remaining[member.name].remove(task_name)
                if not remaining[member.name]:
                    tell(_line(member, preset, scoring))

    jobs = jobs or _jobs(missing.values(), device.type == "cuda")
    work(tasks, without_training | planned.keys() - missing.keys(), jobs, done)
    return chosen


def commands(name, preset="scenes", seeds=(0, 1, 2), cells=None, words=()):
    """Return one command per cell and seed. The commands can run in any order and on any machine; a
    run that several of them need is trained by the first.

    `words` are appended to each command, e.g. ("--count", "5000").
    """
    has_shared_baseline = not study(name).own_baseline
    pairs = dict.fromkeys(
        (cell_name(member.cell), member.seed)
        for member in members(name, preset, seeds, cells)
        # the shared baseline belongs to no cell
        if not (has_shared_baseline and member.role == "baseline")
    )
    end = " ".join(["--jobs 1", *words])
    return [
        f"gear sweep {name} --preset {preset} --seeds {seed} --cells {cell} {end}"
        for cell, seed in pairs
    ]


def _is_settled(member, preset, scoring):
    """Return whether a member has all its scores, as a run or as a record.

    A record with another configuration belongs to another run and does not count.
    """
    name, config = member.planned[-1]
    try:
        run = Run.open(name)
    except MissingRuns:
        return False
    if isinstance(run, Record) and from_dict(Config, science(run.config)) != config:
        return False
    return measured(name, preset, scoring).keys() >= SCORED


def _tasks(chosen, settled, missing, preset, scoring, runtime):
    """Return the Tasks that remain: the training of the `missing` runs, and the scoring of each
    member that is not `settled`.

    An ancestor of only one missing member is trained by that member's command, which saves starting
    a process.
    """
    words = {run: _words(member, run) for member in chosen for run, _ in member.planned}
    num_uses = Counter(
        run for member in chosen if member.name in missing for run, _ in member.planned
    )
    unshared = {run for run in missing if num_uses[run] == 1} - {member.name for member in chosen}
    planned = {member.name: member.planned for member in chosen}
    tasks = []
    for run, config in missing.items():
        if run not in unshared:
            ancestors = [pair for pair in planned.get(run, ()) if pair[0] in unshared]
            tasks.append(training([*ancestors, (run, config)], (*words[run], "--wait"), runtime))
    for member in chosen:
        if member.name not in settled:
            options = scoring_words(preset, to_dict(member.planned[-1][1]), scoring)
            command = ("evaluate", member.name, *options, "--quiet", "--device", runtime.device)
            tasks.append(Task(f"scores of {member.name}", command, member.name, 0))
    return tasks


def _jobs(configs, on_gpu):
    """Return how many runs to train at once: on a CPU, one per core; on a GPU, one, or, because
    small runs leave most of the GPU idle, one per two cores if all runs are small.
    """
    cores = len(os.sched_getaffinity(0))
    if not on_gpu:
        return cores
    return min(GPU_JOBS, max(1, cores // 2)) if all(config.is_small for config in configs) else 1


def _words(member, name):
    """Return the words after `gear train` for an ancestor of a member: the member's words, with the
    ancestor's recipe.
    """
    has_setting = member.cell.label and run_name(name).cell == member.cell.label
    return (with_parts(name, cell=""), *member.words[1:]) if has_setting else (name,)


def _cost(name, chosen, missing, tasks):
    """Return a text on the remaining work and its cost: images, FLOPs, hours on a GPU, and the time
    on this machine if earlier runs allow an estimate.
    """
    num_to_score = sum(task.name not in missing for task in tasks)
    head = (
        f"{name}: {len(chosen)} runs in all, {len(missing)} to train with their parents, "
        f"{num_to_score} sets of scores to compute"
    )
    if not missing:
        return head
    stages = Counter(config.stage for config in missing.values())
    num_images = Counter()  # kind of run (see _shape) -> training images
    prices = {}  # kind of run -> Price
    for config in missing.values():
        kind = _shape(to_dict(config))
        num_images[kind] += config.steps * config.batch_size
        if kind not in prices:
            prices[kind] = price(config)
    flop = sum(
        num_images[kind] * sum(one_pass.training for one_pass in cost.passes)
        for kind, cost in prices.items()
    )
    hours = sum(cost.hours(num_images[kind], "h100", 0.4) for kind, cost in prices.items())
    runs = ", ".join(f"{count} {stage}" for stage, count in stages.items())
    return (
        f"{head}\n"
        f"  {runs}: {num_images.total():,} images, {flop:.2g} FLOP\n"
        f"  an h100 at 40 % of its {GPUS['h100'].bf16:g} TFLOP/s: {hours:.2g} hours, if nothing "
        "else slows it down\n"
        f"  here: {_here(missing)}"
    )


def _shape(config):
    """Return the part of a configuration (a dict) on which a run's price and speed depend, as a
    text: stage, batch and image size, networks, loss terms.
    """
    generator = {name: v for name, v in config["generator"].items() if name != "num_classes"}
    terms = {
        name: weight > 0
        for name, weight in config["objective"].items()
        if name in ("gan_weight", "align_weight", "lpips_weight")
    }
    sizes = (
        config["stage"],
        config["batch_size"],
        config["data"]["image_size"],
        config["objective"]["bridge"],
    )
    return json.dumps(
        [sizes, config["teacher"], config["tokenizer"], generator, terms], sort_keys=True
    )


def _here(missing):
    """Return a text with the estimated training time on this machine, from the speed of earlier
    runs of the same shape.
    """
    speeds = {}  # shape -> images per second of each run
    for name in run_names():
        run = Run.open(name)
        timing = readable(lambda run=run: run.metrics("timing.jsonl"), pd.DataFrame())
        if not timing.empty:
            speeds.setdefault(_shape(run.config), []).append(timing.images_per_second.median())
    seconds = 0.0
    unknown_stages = set()
    for config in missing.values():
        of_shape = speeds.get(_shape(to_dict(config)))
        if of_shape is None:
            unknown_stages.add(config.stage)
        else:
            seconds += config.steps * config.batch_size / (sum(of_shape) / len(of_shape))
    if unknown_stages:
        stages = ", ".join(sorted(unknown_stages))
        return (
            f"not known before a run of the stage {stages} is trained here; the progress bar will "
            "show it"
        )
    return (
        f"about {seconds / 60:.0f} minutes on one core or GPU at the speed of earlier runs, "
        "scoring not included"
    )


def _line(member, preset, scoring):
    """Return the measurements of a member in one line of text."""
    values = measured(member.name, preset, scoring)
    metrics = ("fd", "ntp_loss", "predictable", "align_loss", "psnr")
    numbers = ", ".join(f"{TITLES[key]} {values[key]:.4g}" for key in metrics if key in values)
    return f"{member.cell.title}, {member.role}, seed {member.seed}: {numbers}"
