"""CLIP score: a small random CLIP equals transformers' forward pass and preprocessing, and bad input
is refused.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import gear  # noqa: F401  before transformers
from gear.config import UserError
from gear.evaluation import clip
from gear.evaluation.clip import CLIP, preprocess, read_captions

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

START, END = "<|startoftext|>", "<|endoftext|>"
CAPTIONS = ["a cat", "a cat on a mat", "cat " * 200]


@pytest.fixture(scope="module")
def config():
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    vocabulary = len(words())
    text = dict(
        small,
        vocab_size=vocabulary,
        eos_token_id=vocabulary - 1,
        bos_token_id=vocabulary - 2,
        pad_token_id=vocabulary - 1,
    )
    return transformers.CLIPConfig(
        text_config=text, vision_config=dict(small, patch_size=32), projection_dim=16
    )


def words():
    return {word: i for i, word in enumerate(["[UNK]", "a", "cat", "on", "mat", START, END])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, config):
    """Files as in the hub: weights, with the buffers of old files, and a tokenizer."""
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    torch.save(
        model.state_dict() | {"text_model.embeddings.position_ids": torch.arange(77)[None]},
        path / "pytorch_model.bin",
    )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words(), unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, words()[START]), (END, words()[END])]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def images(*sizes):
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 256, (1, *size, 3), dtype=np.uint8)) for size in sizes]


def test_the_score_equals_the_cosine_of_transformers(folder, config):
    network = CLIP(str(folder), config=config)
    samples = torch.cat(images((32, 32), (32, 32), (32, 32)))
    model = transformers.CLIPModel(config).eval()
    model.load_state_dict(network.network.state_dict())
    for caption, image, ours in zip(CAPTIONS, samples, network(samples, CAPTIONS)):
        # a long caption is cut before its end token
        ids = [words()[START], *[words()[word] for word in caption.split()][:75], words()[END]]
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), pixel_values=preprocess(image[None]))
        scale = float(model.logit_scale.detach().exp())
        assert float(ours) == pytest.approx(float(out.logits_per_image) / scale, abs=1e-5)
    assert network(samples, CAPTIONS).std() > 1e-4


def test_preprocessing_equals_that_of_transformers():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    for image in images((256, 256), (300, 400), (32, 48), (500, 224)):
        expected = CLIPImageProcessorPil()(Image.fromarray(image[0].numpy()), return_tensors="pt")[
            "pixel_values"
        ]
        torch.testing.assert_close(preprocess(image), expected, rtol=0, atol=2e-6)


def test_the_default_is_vit_b_32():
    with torch.device("meta"):
        model = transformers.CLIPModel(transformers.CLIPConfig())
    assert sum(p.numel() for p in model.parameters()) == 151_277_313  # openai/clip-vit-base-patch32
    assert (
        model.vision_model.config.patch_size == 32
        and model.text_model.config.max_position_embeddings == clip.CONTEXT
    )


def test_missing_weights_are_named_and_nothing_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *_: pytest.fail("the network was used")
    )
    with pytest.raises(
        UserError,
        match=r"clip-b32.*pytorch_model.bin of huggingface.co/openai/clip-vit-base-patch32, 605 MB",
    ):
        CLIP(offline=True)
    with pytest.raises(UserError, match="clip-b32 does not exist"):
        CLIP(str(tmp_path))


def test_weights_that_do_not_fit(folder):
    with pytest.raises(UserError, match="CLIP ViT-B/32"):
        CLIP(str(folder))


@pytest.mark.parametrize("text", ["one\ntwo\n", "one\n\nthree\n"])
def test_one_caption_per_sample_is_needed(tmp_path, text):
    (tmp_path / "captions.txt").write_text(text)
    with pytest.raises(UserError, match="2 captions in . lines for 3 samples"):
        read_captions(tmp_path / "captions.txt", 3)
    with pytest.raises(UserError, match="cannot be read"):
        read_captions(tmp_path / "none.txt", 3)


@pytest.mark.parametrize("encoding", ("utf-8", "utf-8-sig", "utf-16"))
@pytest.mark.parametrize("ending", ("\n", "\r\n", "\r"))
def test_captions_of_every_usual_encoding(encoding, ending, tmp_path):
    (tmp_path / "captions.txt").write_bytes(
        f"un café {ending}eine\u2028Zeile{ending}{ending}".encode(encoding)
    )
    assert read_captions(tmp_path / "captions.txt", 2) == ["un café", "eine\u2028Zeile"]


def test_captions_of_another_encoding_are_not_guessed(tmp_path):
    (tmp_path / "captions.txt").write_bytes("un café".encode("cp1252"))
    with pytest.raises(UserError, match="is not in UTF-8: byte 0xe9 in line 1. Save it as UTF-8"):
        read_captions(tmp_path / "captions.txt")
    (tmp_path / "captions.txt").write_text("\n\n")
    with pytest.raises(UserError, match="0 captions in 0 lines for samples"):
        read_captions(tmp_path / "captions.txt")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 287\n"


@pytest.mark.parametrize("content", (b"{", b"", LFS, b"<html>", b'{"model": {}}', b"\0"))
def test_an_invalid_tokenizer_is_refused(content, folder, config, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(
            content if file.name == "tokenizer.json" else file.read_bytes()
        )
    reason = "a Git LFS pointer" if content == LFS else ""
    message = f"tokenizer.json is no tokenizer of CLIP .*{reason}.*: tokenizer.json of openai/clip"
    with pytest.raises(UserError, match=message):
        CLIP(str(tmp_path), config=config)


@pytest.mark.parametrize("prefix", ("", "module.", "model.clip."))
@pytest.mark.parametrize("wrapper", ("", "state_dict", "net"))
def test_wrapped_weights_are_loaded_and_nan_is_named(prefix, wrapper, folder, config, tmp_path):
    tensors = torch.load(folder / "pytorch_model.bin")
    wrapped = {f"{prefix}{name}": t for name, t in tensors.items()}
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    torch.save(
        {wrapper: wrapped, "epoch": 3} if wrapper else wrapped, tmp_path / "pytorch_model.bin"
    )
    samples = torch.cat(images((32, 32)))
    assert torch.equal(
        CLIP(str(tmp_path), config=config)(samples, ["a cat"]),
        CLIP(str(folder), config=config)(samples, ["a cat"]),
    )
    tensors["visual_projection.weight"][0, 0] = float("nan")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="visual_projection.weight holds NaN in 1 of"):
        CLIP(str(tmp_path), config=config)


def test_evaluate_with_captions(folder, config, tmp_path, monkeypatch, tiny):
    """`--samples FILE --captions FILE` gives 100 times the mean cosine, its interval, and CLIP's
    protocol.
    """
    from gear.evaluation.evaluate import EvaluateOptions, evaluate_run

    rng = np.random.default_rng(1)
    np.savez(tmp_path / "samples.npz", arr_0=rng.integers(0, 256, (70, 32, 32, 3), dtype=np.uint8))
    (tmp_path / "captions.txt").write_text("a cat\na mat\n" * 35)
    monkeypatch.setattr(clip.CLIP.__init__, "__defaults__", ("", False, config))
    options = EvaluateOptions(
        samples=str(tmp_path / "samples.npz"),
        captions=str(tmp_path / "captions.txt"),
        clip=str(folder),
        reference_count=70,
    )
    entry = next(r for r in evaluate_run("tiny", options) if r["metric"] == "clip_score")
    network = CLIP(str(folder), config=config)
    samples = torch.from_numpy(np.load(tmp_path / "samples.npz")["arr_0"])
    expected = 100 * network(samples, ["a cat", "a mat"] * 35)
    assert entry["value"] == pytest.approx(float(expected.mean()), abs=1e-4)
    low, high = entry["interval"]
    assert (low + high) / 2 == pytest.approx(entry["value"])
    assert high - low == pytest.approx(2 * 1.96 * float(expected.std()) / 70**0.5, rel=1e-3)
    assert entry["protocol"]["network"] == "clip-b32" and "reference" not in entry["protocol"]
    json.dumps(entry)
