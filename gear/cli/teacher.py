"""gear teacher: package a run as the scenes teacher."""

from gear import data
from gear.cli.usage import Usage
from gear.runs.run import Run
from gear.teachers.scenes import ScenesTeacher, package
from gear.weights import load_module, load_networks, network

USAGE = Usage(
    names="[RUN]",
    examples=("gear teacher teacher-scenes",),
    details=(
        "RUN is teacher-scenes unless given. The file in the package is replaced. `make teacher` "
        "trains the run and calls this command."
    ),
    takes_runs=True,
)


def command(names, arguments):
    run = Run.open(names[0] if names else "teacher-scenes")
    teacher = load_module(
        ScenesTeacher(), network(load_networks(run), "teacher", run.name), run.name
    ).eval()
    images, _ = data.load(data.trained_on(run), "train", 4_000)
    variance = teacher.standardise(images)
    losses = run.metrics().iloc[-1].filter(like="val/").round(4).to_dict()
    package(
        teacher,
        {
            "recipe": run.config["recipe"],
            "config_hash": run.config_hash,
            "steps": run.step,
            "variance_kept": round(variance, 4),
            "validation_nats_a_patch": losses,
            "config": run.config,
            "made": (
                "supervised on the factors of gear/data/scenes.py, per patch; standardised, 64 "
                "principal components"
            ),
        },
    )
    print(f"packaged {run.name}: {variance:.1%} of the standardised variance in 64 components")
