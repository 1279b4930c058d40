"""What can be said after each command: its options, with their defaults."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gear.config import Checked, Count, Jobs, Parallel, Range, Samples, Seed, Share, Whole
from gear.generator.sampling import Guidance, Temperature
from gear.price import Utilisation
from gear.training.loop import Runtime
from gear.training.settings import Config


@dataclass(frozen=True)
class TrainOptions(Checked):
    config: Config
    runtime: Runtime = field(default_factory=Runtime)
    name: str = ""  # the run's name, if not the recipe's
    label: str = ""  # ends the name of this run and of every parent that the changes concern
    jobs: Jobs = 1  # runs trained at once, where several are named
    wait: bool = False  # for the end of another process that trains this run; else that is an error
    dry_run: bool = False  # print what it would cost, and train nothing
    gpu: str = "h100"  # of a dry run: h100, h200, a100, rtx4090, or cpu
    utilisation: Utilisation = 0.4  # of a dry run: the share of the GPU's data sheet that is assumed


@dataclass(frozen=True)
class SweepOptions(Checked):
    preset: str = "scenes"  # scenes, cifar10, cifar10-smoke, imagenet100-128, imagenet256-l
    seeds: str = "0,1,2"
    cells: str = ""  # some of the study's, with commas between; "": all
    jobs: Parallel = 0  # at once; 0: one a core, and on a GPU one
    count: Samples = 1_000  # samples that a cell is scored by
    list: bool = False  # print one command a cell and seed for a scheduler, and run nothing
    device: str = "auto"  # or "cpu", "cuda", "cuda:1"
    workers: Parallel = 0  # processes that prepare images, a run


@dataclass(frozen=True)
class SampleOptions(Checked):
    tokenizer: str = ""  # a run or file that holds the tokenizer, if the generator's does not
    grid: Annotated[int, Range(0, 1_024)] = 0  # tokens a side; 0: those of the run's images, and 16 for a file
    labels: tuple[Whole, ...] = ()  # a class for each image; none given: sixteen, from the first class on
    cfg_scale: Guidance = 1.0  # guidance; 1 is none, 0 unconditional
    temperature: Temperature = 1.0  # 0 takes the likeliest
    top_k: Whole = 0  # 0 keeps all
    top_p: Share = 1.0  # 1 keeps all
    seed: Seed = 0
    out: Path = Path("samples.png")


@dataclass(frozen=True)
class ReconstructOptions(Checked):
    images: str = ""  # a folder, a zip, one image, "scenes" or "cifar10"; none given: the run's own validation images
    image_size: Annotated[int, Range(0, 16_384)] = 0  # pixels; 0: the run's, and 256 for a file
    interpolation: Literal["", "bicubic", "bilinear", "box"] = (
        ""  # of the resize of the short side; "": the run's, else bicubic
    )
    count: Count = 16
    ema: bool = True  # averaged weights, where there are any
    out: Path = Path("reconstruct.png")  # and its metrics beside it, .json


@dataclass(frozen=True)
class DataOptions(Checked):
    labels: str = ""  # a file that numbers the class folders: a folder a line, or "folder,number"; "": by their names
    count: Whole = 1_000  # images that are opened, a sample of all classes; 0: all
    moved: str = ""  # runs, by name or pattern, whose images lie at the source now


@dataclass(frozen=True)
class FigureOptions(Checked):
    force: bool = False  # redraw what is up to date too
    jobs: Jobs = 1  # notebooks executed at once
    seeds: str = ""  # of the runs that are drawn, as in 0 or 0,1; "": those that the notebooks name
    parameters: Annotated[tuple[tuple[str, str], ...], tyro.conf.UseAppendAction, tyro.conf.arg(aliases=["-p"])] = ()
    # ^ KEY VALUE of the one notebook that is named; may be repeated


@dataclass(frozen=True)
class ClaimOptions(Checked):
    label: str = ""  # of the runs, where they were trained with one
