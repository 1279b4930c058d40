"""gear pack: finished runs as records without weights, many in one folder of a few files."""

from dataclasses import dataclass
from pathlib import Path

from gear.cli.arguments import parse
from gear.config import Checked, UserError
from gear.experiments.recipes import run_name
from gear.files import check_writable
from gear.runs.reference import write_pack
from gear.runs.run import Run, open_runs


@dataclass(frozen=True)
class PackOptions(Checked):
    panels: str = ""  # runs whose sample panels are kept too, by name or pattern; "": of none


def command(names, arguments):
    if not names:
        raise UserError(
            "name a folder to write and runs, by name or pattern: gear pack FOLDER ['RUN' ...]."
        )
    panels, folder = parse(PackOptions(), arguments).panels, Path(names[0])
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
    write_pack(folder, runs, {run.name: run_name(run.name) for run in runs}, with_panels)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {len(runs)} records, {size / 1e6:.2f} MB")
