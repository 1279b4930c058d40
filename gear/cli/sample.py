"""gear sample: images of a generator, a run's or a file's, on one sheet."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from PIL import Image

from gear.checkpoints import load_generator, load_tokenizer
from gear.cli.arguments import parse
from gear.config import Checked, Range, Seed, Share, UserError, Whole, given_by
from gear.device import open_device
from gear.files import check_target, write_atomically
from gear.generator.sampling import Guidance, Temperature, sample
from gear.images import image_grid, to_float, to_uint8


@dataclass(frozen=True)
class SampleOptions(Checked):
    tokenizer: str = ""  # a run or file that holds the tokenizer, if the generator's does not
    # tokens a side; 0: those of the run's images, and 16 for a file
    grid: Annotated[int, Range(0, 1_024)] = 0
    # a class for each image; none given: sixteen, from the first class on
    labels: tuple[Whole, ...] = ()
    cfg_scale: Guidance = 1.0  # guidance; 1 is none, 0 unconditional
    temperature: Temperature = 1.0  # 0 takes the likeliest
    top_k: Whole = 0  # 0 keeps all
    top_p: Share = 1.0  # 1 keeps all
    seed: Seed = 0
    device: str = "auto"  # "cpu", "cuda", "cuda:1", or "auto": the GPU if there is one
    out: Path = Path("samples.png")


def command(names, arguments):
    if len(names) != 1:
        raise UserError("name one generator, a run or a file: gear sample RUN.")
    options = parse(SampleOptions(), arguments)
    with given_by("--out"):
        out = check_target(options.out, ".png")
    with given_by("--device"):
        device = open_device(options.device)
    generator = load_generator(names[0]).to(device)
    if generator.config.text_slots:
        raise UserError(
            "this generator is conditioned on captions' features: give them to gear.sample, in "
            "Python."
        )
    with given_by(options.tokenizer and "--tokenizer"):
        tokenizer = load_tokenizer(options.tokenizer or names[0]).to(device)
    if generator.codebook_size != tokenizer.config.codebook_size:
        raise UserError(
            f"the generator knows {generator.codebook_size} codes, the tokenizer has "
            f"{tokenizer.config.codebook_size}: "
            f"give the one it was trained on."
        )
    classes = generator.config.num_classes
    labels = options.labels or tuple(i % classes for i in range(16))
    if wrong := [label for label in labels if not 0 <= label < classes]:
        raise UserError(f"labels {wrong}: this generator has classes 0 to {classes - 1}.")
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
