"""gear data: describe a source of images."""

from dataclasses import dataclass

from gear import data
from gear.cli.arguments import parse
from gear.cli.usage import Usage
from gear.config import Checked, UserError, Whole
from gear.runs.run import open_runs


@dataclass(frozen=True)
class DataOptions(Checked):
    # a text file that numbers the class folders, one folder or one "folder,number" per line;
    # "": numbered in the order of their names
    labels: str = ""
    count: Whole = 1_000  # number of images to open, sampled from all classes; 0: all
    moved: str = ""  # name or pattern of runs whose images have moved to SOURCE


USAGE = Usage(
    names="SOURCE",
    options=lambda names: DataOptions(),
    examples=("gear data ~/images", "gear data scenes", "gear data /new/images --moved 'mine-*'"),
    details=(
        "SOURCE is a folder, a zip, tar shards, 'scenes', 'cifar10' or 'cifar100'. --moved "
        "compares the images at SOURCE with those that the runs were trained on, and remembers "
        "SOURCE."
    ),
    choices=("scenes", "cifar10", "cifar100"),
)


def command(names, arguments):
    if len(names) != 1:
        raise UserError(
            "name one source: gear data SOURCE, where SOURCE is a folder, a zip, tar shards, "
            "'scenes', 'cifar10' or 'cifar100'."
        )
    options = parse(DataOptions(), arguments, "data")
    config = data.DataConfig(names[0], labels=options.labels or "class")
    print(data.data_report(config, options.count))
    for run in open_runs(options.moved) if options.moved else ():
        source = data.trained_on(run, names[0], options.labels).source
        print(f"{run.name}: its images lie in {source}")
