"""gear reconstruct: images above their reconstructions on one sheet, and what was lost."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from gear.checkpoints import load_tokenizer, open_checkpoint
from gear.cli.arguments import parse
from gear.config import Checked, Count, Range, UserError, from_dict, given_by
from gear.data import DataConfig, load, trained_on
from gear.device import open_device
from gear.evaluation.sheets import reconstruction_sheet
from gear.files import check_target, write_atomically
from gear.images import check_divides
from gear.runs.run import Run


@dataclass(frozen=True)
class ReconstructOptions(Checked):
    # a folder, a zip, one image, "scenes" or "cifar10"; none given: the run's own validation images
    images: str = ""
    image_size: Annotated[int, Range(0, 16_384)] = 0  # pixels; 0: the run's, and 256 for a file
    # of the resize; "": the run's, else bicubic
    interpolation: Literal["", "bicubic", "bilinear", "box"] = ""
    count: Count = 16  # images on the sheet
    ema: bool = True  # averaged weights, where there are any
    device: str = "auto"  # "cpu", "cuda", "cuda:1", or "auto": the GPU if there is one
    out: Path = Path("reconstruct.png")  # and its metrics beside it, .json


def command(names, arguments):
    if len(names) != 1:
        raise UserError("name one run or file: gear reconstruct FILE --images PATH.")
    options = parse(ReconstructOptions(), arguments)
    with given_by("--out"):
        out = check_target(options.out, ".png")
        path = check_target(out.with_suffix(".json"))
    with given_by("--device"):
        device = open_device(options.device)
    checkpoint = open_checkpoint(names[0])
    config = DataConfig(source="", image_size=256)  # a file has no images of its own
    if checkpoint.container == "run":
        run = Run.open(names[0])  # where other images are looked at, its own need not be there
        config = from_dict(DataConfig, run.config["data"]) if options.images else trained_on(run)
    if not (options.images or config.source):
        raise UserError(
            "a file has no images of its own: give --images a folder, a zip or an image."
        )
    split = "all" if options.images else "val"
    size = options.image_size or config.image_size
    images_of = replace(
        config, source=options.images or config.source, image_size=size, labels="class",
        interpolation=options.interpolation or config.interpolation,
    )  # fmt: skip
    tokenizer = load_tokenizer(names[0], options.ema).to(device)
    check_divides((size, size), tokenizer.config.downsampling)
    with given_by(options.images and "--images"):
        images, _ = load(images_of, split, options.count)
    sheet, metrics = reconstruction_sheet(tokenizer, images)
    protocol = {
        "weights": tokenizer.source,
        "source": images_of.source,
        "split": split,
        "image_size": size,
        "crop": "centre",
        "interpolation": images_of.interpolation,
        "l1": "[0, 1] units",
        "psnr": "dB, mean over images, clamped, not rounded",
    }
    text = json.dumps(metrics | {"protocol": protocol}, indent=1) + "\n"
    write_atomically(out, lambda temporary: sheet.save(temporary, "PNG"))
    write_atomically(path, lambda temporary: temporary.write_text(text))
    print(
        f"{tokenizer.source}: PSNR {metrics['psnr']:.2f} dB, L1 {metrics['l1']:.4f}, usage "
        f"{metrics['usage_entropy']:.2f} "
        f"nats, {len(images)} images of {size} px: {out.resolve()}, {path.name}"
    )
