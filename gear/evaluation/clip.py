"""CLIP score (Table 3): the cosine between each sample and its caption in the space of OpenAI's
CLIP ViT-B/32.
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
# files of the hub and their sizes; a folder may hold model.safetensors instead of the first
FILES = {"pytorch_model.bin": "605 MB", "tokenizer.json": "2 MB"}
SIDE, CONTEXT = 224, 77  # pixels, tokens


class CLIP:
    """CLIP ViT-B/32: `network(images, captions)` returns the cosine of each pair, (B,) float32.

    Images are uint8 (B, H, W, 3) or floats (B, 3, H, W) in [-1, 1]. They are resized with Pillow's
    bicubic filter to a short side of 224 px and cropped at the centre. Captions are cut after 77
    tokens. `path` is a folder with the weights and tokenizer.json.
    """

    def __init__(self, path="", offline=False, config=None):
        try:
            import tokenizers
            import transformers
        except ImportError as error:
            raise UserError(f"the CLIP score needs transformers ({error}): {INSTALL}") from None
        weights, vocabulary = (_find(file, path, offline) for file in FILES)
        self.network = (
            transformers.CLIPModel(config or transformers.CLIPConfig()).eval().requires_grad_(False)
        )
        rename = lambda tensors: renamed(tensors, ((r".*position_ids$", None),))  # noqa: E731
        tensors = named_for(self.network, read_tensors(weights), rename)
        check_fit(self.network, tensors, weights, "CLIP ViT-B/32")
        self.network.load_state_dict(tensors)
        try:
            self.text_tokenizer = tokenizers.Tokenizer.from_file(str(vocabulary))
            self.text_tokenizer.enable_truncation(CONTEXT)
            self.text_tokenizer.enable_padding(
                pad_id=self.text_tokenizer.token_to_id("<|endoftext|>"), pad_token="<|endoftext|>"
            )
        except Exception as error:  # the package raises errors of the type Exception itself
            reason = what_else(vocabulary) or first_line(error)
            raise UserError(
                f"{vocabulary} is no tokenizer of CLIP ({reason}): {vocabulary.name} of {REPO}, "
                f"{FILES[vocabulary.name]}, is expected."
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
        encodings = self.text_tokenizer.encode_batch(list(captions))
        ids = torch.tensor([encoding.ids for encoding in encodings], device=device)
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], device=device)
        pixels = preprocess(images).to(device)
        image_features = self.network.vision_model(pixel_values=pixels).pooler_output
        text_features = self.network.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return F.cosine_similarity(
            self.network.visual_projection(image_features),
            self.network.text_projection(text_features),
        )


def preprocess(images):
    """Turn images, as `CLIP` takes them, into CLIP's input (B, 3, 224, 224) float32."""
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
    """Return the captions of a text file with one caption per line; see `files.read_lines`.

    Raises UserError where a line is empty, and where the file does not have `count` captions.
    """
    captions = [line.strip() for line in read_lines(path)]
    if not (captions and all(captions)) or count not in (None, len(captions)):
        content = f"{sum(map(bool, captions))} captions in {len(captions)} lines"
        expected = "samples" if count is None else f"{count} samples"
        raise UserError(
            f"'{path}' has {content} for {expected}: one caption per line is expected, in the "
            "order of the samples."
        )
    return captions


def _find(file, path, offline):
    """Return the path of one of `FILES`: in the folder `path` or beside the file `path` if one is
    given, else in the hub's cache or from the hub.
    """
    about = f"{FILES[file]}, of openai/CLIP, MIT"
    folder = Path(path).expanduser() if path else None
    if folder and folder.is_file():
        folder = folder.parent
    if folder and (folder / "model.safetensors").exists() and file != "tokenizer.json":
        file = "model.safetensors"
    return find_weights(
        NAME, REPO, about, str(folder / file) if folder else "", offline, "--clip ", file
    )
