"""gear sample: draw images from the generator of a run or a file, on one sheet."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from PIL import Image

from gear.checkpoints import load_generator, load_tokenizer
from gear.cli.arguments import parse
from gear.cli.usage import Usage
from gear.config import Checked, Range, Seed, Share, UserError, Whole, given_by
from gear.device import open_device
from gear.files import check_target, write_atomically
from gear.generator.sampling import Guidance, Temperature, sample
from gear.images import image_grid, to_float, to_uint8


@dataclass(frozen=True)
class SampleOptions(Checked):
    # run or file that holds the tokenizer; "": the generator's own run or file
    tokenizer: str = ""
    # tokens per side of an image; 0: as in the run's images, or 16 for a file
    grid: Annotated[int, Range(0, 1_024)] = 0
    # one class per image; without it, sixteen images of the first classes
    labels: tuple[Whole, ...] = ()
    cfg_scale: Guidance = 1.0  # classifier-free guidance; 1: none, 0: unconditional
    temperature: Temperature = 1.0  # sampling temperature; 0: always the most likely token
    top_k: Whole = 0  # sample from the k most likely tokens; 0: from all
    # sample from the most likely tokens that have this probability together; 1: from all
    top_p: Share = 1.0
    seed: Seed = 0  # the same seed draws the same images
    device: str = "auto"  # "cpu", "cuda", "cuda:1", or "auto": the GPU if there is one
    out: Path = Path("samples.png")  # the PNG to write


USAGE = Usage(
    names="RUN_OR_FILE",
    options=lambda names: SampleOptions(),
    examples=(
        "gear sample scenes-gear-s0 --cfg-scale 1.5 --out samples.png",
        "gear sample c2i_L_256.pt --tokenizer gear-vq.pt --labels 207 360 --cfg-scale 1.5",
    ),
    takes_runs=True,
)


def command(names, arguments):
    if len(names) != 1:
        raise UserError("name one run or file that holds a generator: gear sample RUN_OR_FILE.")
    options = parse(SampleOptions(), arguments, "sample")
    with given_by("--out"):
        out = check_target(options.out, ".png")
    with given_by("--device"):
        device = open_device(options.device)
    generator = load_generator(names[0]).to(device)
    if generator.config.text_slots:
        raise UserError(
            "this generator is conditioned on features of captions: sample from it in Python, "
            "with gear.sample."
        )
    with given_by(options.tokenizer and "--tokenizer"):
        tokenizer = load_tokenizer(options.tokenizer or names[0]).to(device)
    if generator.codebook_size != tokenizer.config.codebook_size:
        raise UserError(
            f"the generator knows {generator.codebook_size} codes, the tokenizer has "
            f"{tokenizer.config.codebook_size}: give the tokenizer that the generator was trained "
            "on (--tokenizer)."
        )
    classes = generator.config.num_classes
    labels = options.labels or tuple(i % classes for i in range(16))
    if unknown := [label for label in labels if not 0 <= label < classes]:
        raise UserError(f"labels {unknown}: this generator has classes 0 to {classes - 1}.")
    images = sample(
        generator,
        tokenizer,
        torch.tensor(labels),
        (options.grid,) * 2 if options.grid else None,
        cfg_scale=options.cfg_scale,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    sheet = Image.fromarray(to_uint8(image_grid(to_float(images.cpu()), 8)[None])[0].numpy())
    write_atomically(out, lambda path: sheet.save(path, "PNG"))
    print(f"{len(images)} samples of {names[0]}: {out.resolve()}")
