"""gear reconstruct: draw images above their reconstructions, and measure the error."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from gear.checkpoints import load_tokenizer, open_checkpoint
from gear.cli.arguments import parse
from gear.cli.usage import Usage
from gear.config import Checked, Count, Range, UserError, from_dict, given_by
from gear.data import DataConfig, load, trained_on
from gear.device import open_device
from gear.evaluation.sheets import reconstruction_sheet
from gear.files import check_target, write_atomically
from gear.images import check_divides
from gear.runs.run import Run


@dataclass(frozen=True)
class ReconstructOptions(Checked):
    # a folder, a zip, one image, "scenes" or "cifar10"; "": the run's own validation images
    images: str = ""
    # side of the images in pixels; 0: the run's image size, or 256 for a file
    image_size: Annotated[int, Range(0, 16_384)] = 0
    # how images are resized; "": as for the run, or bicubic for a file
    interpolation: Literal["", "bicubic", "bilinear", "box"] = ""
    count: Count = 16  # number of images on the sheet
    ema: bool = True  # use averaged weights if the checkpoint has them
    device: str = "auto"  # "cpu", "cuda", "cuda:1", or "auto": the GPU if there is one
    out: Path = Path("reconstruct.png")  # the PNG to write; metrics go to a .json beside it


USAGE = Usage(
    names="RUN_OR_FILE",
    options=lambda names: ReconstructOptions(),
    examples=(
        "gear reconstruct scenes-gear-s0",
        "gear reconstruct gear-vq.pt --images photos --out sheet.png",
    ),
    takes_runs=True,
)


def command(names, arguments):
    if len(names) != 1:
        raise UserError("name one run or file: gear reconstruct RUN_OR_FILE --images PATH.")
    options = parse(ReconstructOptions(), arguments, "reconstruct")
    with given_by("--out"):
        out = check_target(options.out, ".png")
        metrics_path = check_target(out.with_suffix(".json"))
    with given_by("--device"):
        device = open_device(options.device)
    checkpoint = open_checkpoint(names[0])
    config = DataConfig(source="", image_size=256)  # a file has no images of its own
    if checkpoint.container == "run":
        run = Run.open(names[0])  # with --images, the run's own images need not exist
        config = from_dict(DataConfig, run.config["data"]) if options.images else trained_on(run)
    if not (options.images or config.source):
        raise UserError(
            "a file has no images of its own: give --images a folder, a zip or an image."
        )
    split = "all" if options.images else "val"
    size = options.image_size or config.image_size
    data = replace(
        config, source=options.images or config.source, image_size=size, labels="class",
        interpolation=options.interpolation or config.interpolation,
    )  # fmt: skip
    tokenizer = load_tokenizer(names[0], options.ema).to(device)
    check_divides((size, size), tokenizer.config.downsampling)
    with given_by(options.images and "--images"):
        images, _ = load(data, split, options.count)
    sheet, metrics = reconstruction_sheet(tokenizer, images)
    protocol = {
        "weights": tokenizer.source,
        "source": data.source,
        "split": split,
        "image_size": size,
        "crop": "centre",
        "interpolation": data.interpolation,
        "l1": "[0, 1] units",
        "psnr": "dB, mean over images, clamped, not rounded",
    }
    text = json.dumps(metrics | {"protocol": protocol}, indent=1) + "\n"
    write_atomically(out, lambda temporary: sheet.save(temporary, "PNG"))
    write_atomically(metrics_path, lambda temporary: temporary.write_text(text))
    print(
        f"{tokenizer.source}: PSNR {metrics['psnr']:.2f} dB, L1 {metrics['l1']:.4f}, usage "
        f"{metrics['usage_entropy']:.2f} nats, {len(images)} images of {size} px: {out.resolve()}, "
        f"{metrics_path.name}"
    )
