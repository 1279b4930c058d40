"""gear data: what a source of images holds."""

from dataclasses import dataclass

from gear import data
from gear.cli.arguments import parse
from gear.config import Checked, UserError, Whole
from gear.runs.run import open_runs


@dataclass(frozen=True)
class DataOptions(Checked):
    # a file that numbers the class folders: a folder a line, or "folder,number"; "": by their names
    labels: str = ""
    count: Whole = 1_000  # images that are opened, a sample of all classes; 0: all
    moved: str = ""  # runs, by name or pattern, whose images lie at the source now


def command(names, arguments):
    if len(names) != 1:
        raise UserError(
            "name one source: gear data SOURCE, a folder, a zip, tar shards, 'scenes' or a data "
            "set's name."
        )
    options = parse(DataOptions(), arguments)
    print(
        data.data_report(data.DataConfig(names[0], labels=options.labels or "class"), options.count)
    )
    for run in open_runs(options.moved) if options.moved else ():
        print(
            f"{run.name}: its images lie in {data.trained_on(run, names[0], options.labels).source}"
        )
