"""A sheet of images above their reconstructions: the tokenizer sees a few images at a time."""

from helpers import scenes, tiny_tokenizer

from gear.evaluation.sheets import reconstruction_sheet
from gear.measures.reconstruction import psnr
from gear.tokenizer.model import reconstruct


def test_chunks_give_what_all_images_at_once_give(monkeypatch):
    tokenizer, images = tiny_tokenizer().eval(), scenes(20)[0]
    decoded, indices = reconstruct(tokenizer, images)
    encode, counts = tokenizer.encode, []
    monkeypatch.setattr(
        tokenizer, "encode", lambda chunk: counts.append(len(chunk)) or encode(chunk)
    )
    picture, metrics = reconstruction_sheet(tokenizer, images)
    assert counts == [8, 8, 4]
    assert (
        metrics["psnr"] == float(psnr(decoded, images).mean())
        and metrics["tokens"] == indices.numel()
    )
    assert metrics["codes_used"] == len(indices.unique()) and picture.mode == "RGB"
