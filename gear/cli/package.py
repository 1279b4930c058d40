"""gear package: put the network of a run into the package, as the scenes teacher or detector."""

from gear import data
from gear.cli.usage import Usage
from gear.config import UserError
from gear.evaluation import detector, judge
from gear.runs.run import Run
from gear.teachers import scenes
from gear.weights import load_module, load_networks, network, write_packaged

USAGE = Usage(
    names="RUN",
    examples=("gear package teacher-scenes", "gear package detector-scenes"),
    details=(
        "RUN is a run of the recipe teacher-scenes or detector-scenes. The file in the package is "
        "replaced. `make teacher` and `make detector` train the run and call this command."
    ),
    takes_runs=True,
)


def command(names, arguments):
    if len(names) != 1 or arguments:
        raise UserError("name one run, and no option: gear package teacher-scenes.")
    run = Run.open(names[0])
    stage = run.config["stage"]
    if stage not in PACKAGERS:
        raise UserError(
            f"run '{run.name}' trains no network of the package (its stage is '{stage}'): name a "
            "run of the recipe teacher-scenes or detector-scenes."
        )
    path, module, measured, words = PACKAGERS[stage](run)
    card = {
        "recipe": run.config["recipe"],
        "config_hash": run.config_hash,
        "steps": run.step,
        "config": run.config,
        "validation": run.metrics().iloc[-1].filter(like="val/").round(4).to_dict(),
    }
    write_packaged(module, path, card | measured)
    print(f"packaged {run.name}: {words}")


def _teacher(run):
    """Return (path, network, entries of the card, words) of a run that trained the teacher."""
    teacher = _trained(run, scenes.ScenesTeacher(), "teacher")
    images, _ = data.load(data.trained_on(run), "train", 4_000)
    variance = teacher.standardise(images)
    made = (
        "supervised on the factors of gear/data/scenes.py, per patch; standardised, 64 principal "
        "components"
    )
    words = f"{variance:.1%} of the standardised variance in 64 components"
    return scenes.PACKAGED, teacher, {"variance_kept": round(variance, 4), "made": made}, words


def _detector(run):
    """Return (path, network, entries of the card, words) of a run that trained the detector."""
    module = _trained(run, detector.Detector(), "detector")
    error = {name: round(value, 4) for name, value in judge.unseen_error(module).items()}
    made = "supervised on the objects of gear/data/scenes.py, half of the images blurred or noisy"
    words = ", ".join(f"{name} {value:.3f}" for name, value in error.items())
    return detector.PACKAGED, module, {"error": error, "made": made}, words


PACKAGERS = {"teacher": _teacher, "detector": _detector}


def _trained(run, module, name):
    return load_module(module, network(load_networks(run), name, run.name), run.name).eval()
