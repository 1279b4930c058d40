"""Run a study: train what is missing of its cells, score it, and say whether the paper's direction
holds.
"""

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

GPU_JOBS = 8  # at most: each holds libraries and kernels of its own, half a gigabyte


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
    """Train and score what is missing of a study, `jobs` at a time (0: see `_jobs`); returns its
    Members, see `members`.

    Tells the cost before it starts, and what a member measured as soon as it has. The same call
    goes on after a kill. Raises as `jobs.train_many` does.
    """
    device = find_device(runtime.device)
    found = members(name, preset, seeds, cells, transfer)
    scoring = of_study(name, preset, scoring)
    trained = {
        member.name
        for member in found
        if is_trained(Run(runs_dir() / member.name), member.planned[-1][1])
    }
    settled = {member.name for member in found if _is_settled(member, preset, scoring)}
    done_with = trained | settled  # no ancestor of theirs is needed
    planned = {n: config for m in found if m.name not in done_with for n, config in m.planned}
    missing = {
        n: config for n, config in planned.items() if not is_trained(Run(runs_dir() / n), config)
    }
    tasks = _tasks(found, settled, missing, preset, scoring, runtime)
    tell(_cost(name, found, missing, tasks))
    if not tasks:
        return found
    check_teachers(missing.values())
    check_writable(runs_dir(), "GEAR_RUNS")
    left = {
        m.name: {task.name for task in tasks if m.name in (task.name, task.needs)} for m in found
    }

    def done(task):
        for member in found:
            if task in left[member.name]:
                left[member.name].remove(task)
                if not left[member.name]:
                    tell(_line(member, preset, scoring))

    jobs = jobs or _jobs(missing.values(), device.type == "cuda")
    work(tasks, done_with | planned.keys() - missing.keys(), jobs, done)
    return found


def commands(name, preset="scenes", seeds=(0, 1, 2), cells=None, words=()):
    """Return one command for each cell and seed, to be run anywhere and in any order: what several
    share, the first one trains.

    `words` end each of them, as in ("--count", "5000").
    """
    found = members(name, preset, seeds, cells)
    chosen = dict.fromkeys(
        (key, member.seed) for member in found for key in [_key(name, member)] if key
    )
    end = " ".join(["--jobs 1", *words])
    return [
        f"gear sweep {name} --preset {preset} --seeds {seed} --cells {key} {end}"
        for key, seed in chosen
    ]


def _key(name, member):
    """Return a member's cell; the baseline that all cells share has none of its own."""
    shared = member.role == "baseline" and not study(name).own_baseline
    return None if shared else cell_name(member.cell)


def _is_settled(member, preset, scoring):
    """Say whether a member, a run or a record, has all its scores; a record of another
    configuration is another run.
    """
    name, config = member.planned[-1]
    try:
        run = Run.open(name)
    except MissingRuns:
        return False
    if isinstance(run, Record) and from_dict(Config, science(run.config)) != config:
        return False
    return measured(name, preset, scoring).keys() >= SCORED


def _tasks(found, settled, missing, preset, scoring, runtime):
    """Return what is left to do: the training of `missing`, and the scores of each member, as soon
    as it is trained.

    An ancestor that one member alone starts from is trained by that member's command: a process
    fewer to start.
    """
    words = {n: _words(member, n) for member in found for n, _ in member.planned}
    heirs = Counter(n for member in found if member.name in missing for n, _ in member.planned)
    own = {n for n in missing if heirs[n] == 1} - {member.name for member in found}
    planned, tasks = {member.name: member.planned for member in found}, []
    for n, config in missing.items():
        if n not in own:
            before = [(a, c) for a, c in planned.get(n, ()) if a in own]
            tasks.append(training([*before, (n, config)], (*words[n], "--wait"), runtime))
    for member in found:
        if member.name not in settled:
            words = scoring_words(preset, to_dict(member.planned[-1][1]), scoring)
            command = ("evaluate", member.name, *words, "--quiet")
            command += ("--device", runtime.device)
            tasks.append(Task(f"scores of {member.name}", command, member.name, 0))
    return tasks


def _jobs(configs, on_gpu):
    """Return how many runs go at once: one a core, on a GPU one; small ones, which leave most of it
    idle, one for two cores.
    """
    cores = len(os.sched_getaffinity(0))
    if not on_gpu:
        return cores
    return min(GPU_JOBS, max(1, cores // 2)) if all(config.is_small for config in configs) else 1


def _words(member, name):
    """Return what follows `gear train` for an ancestor of a member: the same words with its own
    recipe.
    """
    has_setting = member.cell.label and run_name(name).cell == member.cell.label
    return (with_parts(name, cell=""), *member.words[1:]) if has_setting else (name,)


def _cost(name, found, missing, tasks):
    """Say what is left, and what it takes: images, FLOPs, hours on a GPU, and on this machine as
    far as runs here tell.
    """
    scored = sum(task.name not in missing for task in tasks)
    head = (
        f"{name}: {len(found)} runs in all, {len(missing)} to train with their parents, {scored} "
        "sets of scores"
    )
    if not missing:
        return head
    stages = Counter(config.stage for config in missing.values())
    images = sum(config.steps * config.batch_size for config in missing.values())
    prices = {}
    for config in missing.values():
        prices.setdefault(_shape(to_dict(config)), [price(config), 0])[1] += (
            config.steps * config.batch_size
        )
    flop = sum(n * sum(p.training for p in cost.passes) for cost, n in prices.values())
    hours = sum(cost.hours(n, "h100", 0.4) for cost, n in prices.values())
    lines = [
        head,
        (
            f"  {', '.join(f'{n} {stage}' for stage, n in stages.items())}: {images:,} images, "
            f"{flop:.2g} FLOP"
        ),
    ]
    lines.append(
        f"  an h100 at 40 % of its {GPUS['h100'].bf16:g} TFLOP/s: {hours:.2g} hours, if nothing "
        "else holds it up"
    )
    return "\n".join([*lines, f"  here: {_here(missing)}"])


def _shape(config):
    """Return what a run's price and pace depend on, of its configuration as a dict: stage,
    networks, terms, images.
    """
    generator = {k: v for k, v in config["generator"].items() if k != "num_classes"}
    terms = {
        k: v > 0
        for k, v in config["objective"].items()
        if k in ("gan_weight", "align_weight", "lpips_weight")
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
    """Estimate the time on this machine from the pace of runs trained here, of the same shape."""
    seconds, unknown = 0.0, set()
    paces = {}
    for name in run_names():
        run = Run.open(name)
        timing, config = (
            readable(lambda run=run: run.metrics("timing.jsonl"), pd.DataFrame()),
            run.config,
        )
        if not timing.empty:
            paces.setdefault(_shape(config), []).append(timing.images_per_second.median())
    for config in missing.values():
        pace = paces.get(_shape(to_dict(config)))
        if pace is None:
            unknown.add(config.stage)
        else:
            seconds += config.steps * config.batch_size / (sum(pace) / len(pace))
    if unknown:
        return (
            f"not known before a run of the stage {', '.join(sorted(unknown))} was trained; the "
            "bar will tell"
        )
    return (
        f"about {seconds / 60:.0f} minutes on one core or GPU, as fast as earlier runs; scores not "
        "counted"
    )


def _line(member, preset, scoring):
    values = measured(member.name, preset, scoring)
    shown = [
        metric
        for metric in ("fd", "ntp_loss", "predictable", "align_loss", "psnr")
        if metric in values
    ]
    told = ", ".join(f"{TITLES[metric]} {values[metric]:.4g}" for metric in shown)
    return f"{member.cell.title}, {member.role}, seed {member.seed}: {told}"
