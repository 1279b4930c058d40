"""gear pack: write finished runs as records without weights, in a folder of a few files."""

from dataclasses import dataclass
from pathlib import Path

from gear.cli.arguments import parse
from gear.cli.usage import Usage
from gear.config import Checked, UserError
from gear.experiments.recipes import run_name
from gear.files import check_writable
from gear.runs.reference import records, write_pack
from gear.runs.run import Run, open_runs


@dataclass(frozen=True)
class PackOptions(Checked):
    # name or pattern of the runs whose sample panels are packed too; "": no panels
    panels: str = ""
    # keep the records of an earlier pack in FOLDER that none of the runs replaces
    add: bool = False


USAGE = Usage(
    names="FOLDER [RUN ...]",
    options=lambda names: PackOptions(),
    examples=("gear pack runs/reference 'scenes-*' --panels 'scenes-joint*-s0'",),
    details=(
        "RUN is a name or a pattern; without one, all finished runs are packed. FOLDER is empty, "
        "or holds an earlier pack, which is replaced or, with --add, completed. `make reference` "
        "calls this command."
    ),
    takes_runs=True,
)


def command(names, arguments):
    if not names:
        raise UserError(
            "name a folder to write, and runs by name or pattern: gear pack FOLDER ['RUN' ...]."
        )
    options = parse(PackOptions(), arguments, "pack")
    panels = options.panels
    folder = Path(names[0])
    opened = {
        run.name: run
        for name in names[1:] or ["*"]
        for run in open_runs(name)
        if isinstance(run, Run)
    }
    runs = [run for _, run in sorted(opened.items()) if run.logged_step >= run.config["steps"]]
    if not runs:
        raise UserError("none of these runs is trained to its end: there is nothing to pack.")
    check_writable(folder.absolute(), "")
    with_panels = [run.name for run in open_runs(panels)] if panels else []
    if options.add:
        new_names = {run.name for run in runs}
        earlier_records = [record for record in records(folder) if record.name not in new_names]
        runs = sorted([*earlier_records, *runs], key=lambda run: run.name)
    write_pack(folder, runs, {run.name: run_name(run.name) for run in runs}, with_panels)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {len(runs)} records, {size / 1e6:.2f} MB")
