"""A sheet of images above their reconstructions, which the tokenizer computes in chunks."""

from helpers import scenes, tiny_tokenizer

from gear.evaluation.sheets import reconstruction_sheet
from gear.measures.reconstruction import psnr
from gear.tokenizer.model import reconstruct


def test_a_sheet_does_not_depend_on_chunks(monkeypatch):
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
