"""CLIP score (Table 3): how near each sample is to its caption, in the space of OpenAI's
ViT-B/32.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from gear.config import UserError
from gear.evaluation.networks import as_pixels
from gear.files import read_lines
from gear.public.tensorfiles import first_line, what_else
from gear.teachers.networks import CLIP as NORM
from gear.teachers.networks import INSTALL, renamed
from gear.teachers.weights import file_hash, find_weights, named_for, read_tensors
from gear.weights import check_fit

REPO, NAME = "openai/clip-vit-base-patch32", "clip-b32"
# of the hub; a folder may hold model.safetensors instead
FILES = {"pytorch_model.bin": "605 MB", "tokenizer.json": "2 MB"}
SIDE, CONTEXT = 224, 77  # pixels, tokens


class CLIP:
    """CLIP ViT-B/32: `network(images, captions)` -> the cosine of each pair, (B,) float32.

    Images are uint8 (B, H, W, 3) or floats in [-1, 1], resized by Pillow's bicubic to a short side
    of 224 px and cropped at the centre; captions are cut at 77 tokens. `path` is a folder with the
    weights and tokenizer.json.
    """

    def __init__(self, path="", offline=False, config=None):
        try:
            import tokenizers
            import transformers
        except ImportError as error:
            raise UserError(f"the CLIP score needs transformers ({error}): {INSTALL}") from None
        weights, words = (_find(file, path, offline) for file in FILES)
        self.network = (
            transformers.CLIPModel(config or transformers.CLIPConfig()).eval().requires_grad_(False)
        )
        rename = lambda tensors: renamed(tensors, ((r".*position_ids$", None),))  # noqa: E731
        tensors = named_for(self.network, read_tensors(weights), rename)
        check_fit(self.network, tensors, weights, "CLIP ViT-B/32")
        self.network.load_state_dict(tensors)
        try:
            self.words = tokenizers.Tokenizer.from_file(str(words))
            self.words.enable_truncation(CONTEXT)
            self.words.enable_padding(
                pad_id=self.words.token_to_id("<|endoftext|>"), pad_token="<|endoftext|>"
            )
        except Exception as error:  # tokenizers raises plain ones
            what = what_else(words) or first_line(error)
            raise UserError(
                f"{words} is no tokenizer of CLIP ({what}): {FILES[words.name]} of {REPO} are "
                "expected."
            ) from None
        self.protocol = {
            "network": NAME,
            "weights": file_hash(weights)[:16],
            "input": SIDE,
            "interpolation": "bicubic, Pillow",
        }

    def to(self, device):
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images, captions):
        device = next(self.network.parameters()).device
        read = self.words.encode_batch(list(captions))
        ids, mask = (
            torch.tensor([getattr(r, what) for r in read], device=device)
            for what in ("ids", "attention_mask")
        )
        seen = self.network.vision_model(pixel_values=preprocess(images).to(device)).pooler_output
        told = self.network.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return F.cosine_similarity(
            self.network.visual_projection(seen), self.network.text_projection(told)
        )


def preprocess(images):
    """Return CLIP's input, (B, 3, 224, 224) float32, of images as the network takes them."""
    pixels = []
    for image in map(Image.fromarray, as_pixels(images).cpu().numpy()):
        scale = SIDE / min(image.size)
        image = image.resize(
            [max(SIDE, int(side * scale)) for side in image.size], Image.Resampling.BICUBIC
        )
        left, top = ((side - SIDE) // 2 for side in image.size)
        pixels.append(np.asarray(image.crop((left, top, left + SIDE, top + SIDE))))
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORM)
    return (x - mean) / std


def read_captions(path, count=None):
    """Return the lines of a text file, a caption each; see `home.read_lines`.

    Raises UserError where one is empty, or unless there are `count` of them.
    """
    captions = [line.strip() for line in read_lines(path)]
    if not (captions and all(captions)) or count not in (None, len(captions)):
        found = f"{sum(map(bool, captions))} captions in {len(captions)} lines"
        wanted = "samples" if count is None else f"{count} samples"
        raise UserError(
            f"'{path}' has {found} for {wanted}: one a line, in their order, is expected."
        )
    return captions


def _find(file, path, offline):
    about, path = f"{FILES[file]}, of openai/CLIP, MIT", Path(path).expanduser() if path else ""
    path = path.parent if path and path.is_file() else path
    if path and (path / "model.safetensors").exists() and file != "tokenizer.json":
        file = "model.safetensors"
    return find_weights(
        NAME, REPO, about, str(path / file) if path else "", offline, "--clip ", file
    )
