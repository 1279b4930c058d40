"""Tokenizers of files: a file gives the same numbers as the run it was exported from, and one
command sets public files beside Table 18.
"""

import json

import numpy as np
import pytest
import torch
from helpers import scenes
from joint_step import state_dict
from PIL import Image

from gear.__main__ import main
from gear.checkpoints import load_tokenizer
from gear.evaluation.evaluate import EvaluateOptions, evaluate_files, evaluate_run
from gear.evaluation.networks import load_network_by_name
from gear.evaluation.reconstruction import file_records, measure, table_18
from gear.evaluation.scores import extract
from gear.experiments.published import published
from gear.images import to_uint8
from gear.measures.frechet import frechet_distance
from gear.measures.reconstruction import l1, psnr, ssim
from gear.tokenizer.model import reconstruct

COUNT = 70  # more than a batch


@pytest.fixture
def photographs(home):
    """A folder of scenes as PNG files."""
    (home / "photographs").mkdir()
    for i, pixels in enumerate(to_uint8(scenes(COUNT)[0]).numpy()):
        Image.fromarray(pixels).save(home / "photographs" / f"{i:03d}.png")
    return home / "photographs"


@pytest.fixture
def file(tiny, home):
    main(["export", "tiny-joint", str(home / "tokenizer.safetensors")])
    return home / "tokenizer.safetensors"


def by_metric(records):
    return {entry["metric"]: entry for entry in records}


def test_a_file_is_measured_as_its_run_is(tiny, home, file, photographs):
    """Scores follow their definitions on all images of the folder; the run gives equal scores."""
    network = load_network_by_name("scenes")
    of_file = by_metric(file_records(file, photographs, network, 1_000, size=32))
    images = torch.stack(
        [torch.from_numpy(np.array(Image.open(p))) for p in sorted(photographs.iterdir())]
    )
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    decoded = reconstruct(load_tokenizer("tiny-joint"), x)[0].clamp(-1, 1)
    for name, function in (("psnr", psnr), ("ssim", ssim), ("l1", l1)):
        value, (low, high) = of_file[name]["value"], of_file[name]["interval"]
        assert value == pytest.approx(float(measure(function, decoded, x).mean()))
        assert low < value < high
    sets = [extract("", batch.split(64), network) for batch in (decoded, x)]
    distance = frechet_distance(*(features.moments["pool"] for features in sets))
    assert of_file["rfd_scenes"]["value"] == pytest.approx(distance, rel=1e-4)
    protocol = of_file["rfd_scenes"]["protocol"]
    assert protocol.items() >= {
        "source": "photographs", "split": "all", "images": COUNT, "rounding": "none",
        "image_size": 32, "resize": "bicubic",
    }.items()  # fmt: skip
    options = EvaluateOptions(
        network="scenes", reconstruction=True, images=str(photographs), quiet=True
    )
    of_run = by_metric(evaluate_run("tiny-joint", options))
    for name, entry in of_file.items():
        assert of_run[name]["value"] == pytest.approx(entry["value"], rel=1e-5)
    assert of_run["psnr"]["protocol"]["source"] == "photographs"


def test_another_resize_is_another_protocol(file, photographs, home):
    options = EvaluateOptions(
        network="scenes", reconstruction=True, images=str(photographs), image_size=16,
        out=str(home / "out.json"), quiet=True,
    )  # fmt: skip
    records = evaluate_files([str(file)], options, ("bicubic", "bilinear", "box"))
    values = [e["value"] for e in records if e["metric"] == "psnr"]
    assert len(set(values)) == 3
    assert len(json.loads((home / "out.json").read_text())) == len(records)


def test_the_command_reports_what_a_file_needs(tiny, home, file, photographs, capsys):
    words = ["evaluate", str(file), "--network", "scenes", "--quiet"]
    for more, message in (
        ([], "gear evaluate FILE --reconstruction --images PATH"),
        (["--reconstruction"], "gear evaluate FILE --reconstruction --images PATH"),
        (["--reconstruction", "--images", "nowhere"], "--images: there are no images at 'nowhere'"),
        (["--table", "18", "--images", str(photographs)], "none of Table 18's tokenizers"),
        (["--reconstruction", "--images", "x", "--sweep", "seed=1,2"], "--sweep is for runs, and"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*words, *more])
        output = capsys.readouterr().err
        assert stopped.value.code == 2 and message in output and "Traceback" not in output
    with pytest.raises(SystemExit):
        main(["evaluate", "tiny", str(file), "--reconstruction"])
    assert "'tiny' is no file" in capsys.readouterr().err
    out = str(home / "out.json")
    main(
        [
            *words,
            "--reconstruction",
            "--images",
            str(photographs),
            "--image-size",
            "32",
            "--out",
            out,
        ]
    )
    output = capsys.readouterr().out
    assert "psnr " in output and "rfd_scenes " in output and "images 70" in output
    assert len(json.loads((home / "out.json").read_text())) == 4
    main(
        [
            *words,
            "--reconstruction",
            "--images",
            str(photographs),
            "--image-size",
            "16",
            "--out",
            out,
        ]
    )
    assert len(json.loads((home / "out.json").read_text())) == 8, "earlier records are kept"
    for more, message in (
        (
            ["--reconstruction", "--interpolation", "bilinear"],
            "--interpolation applies to --images only",
        ),
        (["--images", str(photographs)], "--images are the images to reconstruct: add --recons"),
    ):
        with pytest.raises(SystemExit):
            main(["evaluate", "tiny", "--network", "scenes", *more])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", str(tiny / "tiny"), "--reconstruction"])
    assert "a run is opened by its name" in capsys.readouterr().err


def test_table_18_sets_the_papers_numbers_beside_ours():
    def entry(tokenizer, resize, metric, value):
        protocol = {"weights_of": "x.pt", "tokenizer": tokenizer, "resize": resize, "images": 9}
        return {"metric": metric, "value": value, "protocol": protocol}

    records = [
        entry("VQ-16", "bicubic", "psnr", 20.8), entry("VQ-16", "bilinear", "rfid", 2.1),
        entry("LFQ-16", "bicubic", "ssim", 0.5), entry("IBQ-16", "bilinear", "l1", 0.05),
        entry("VQ-16", "bicubic", "lpips", 0.2),
    ]  # fmt: skip
    table = table_18(records, published(18))
    expected = [20.79, 2.10, 0.58, 0.0542]
    assert table.paper.tolist() == expected and table.measured.tolist() == [20.8, 2.1, 0.5, 0.05]
    assert table.metric.tolist() == ["PSNR", "rFID", "SSIM", "L1"]


@pytest.mark.slow
def test_table_18_in_one_command(home, photographs, capsys):
    """A file in a public layout is measured with both resizes, beside the paper's numbers."""
    torch.save({"model": state_dict("vq16")}, home / "vq.pt")
    words = "--table 18 --image-size 32 --reference-count 3 --network scenes --quiet".split()
    main(
        [
            "evaluate",
            str(home / "vq.pt"),
            *words,
            "--images",
            str(photographs),
            "--out",
            str(home / "x.json"),
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines if "VQ-16" in line] == [
        ["VQ-16", resize, metric]
        for resize in ("bicubic", "bilinear")
        for metric in ("PSNR", "SSIM", "L1")
    ]
    assert "20.7900" in "".join(lines)
