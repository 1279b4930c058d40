"""Make the packaged scenes teacher from its run: python -m gear.teachers.package [RUN]."""

import sys

from gear import data
from gear.checkpoints import load_module, load_networks
from gear.config import from_dict
from gear.run import Run
from gear.teachers.scenes import ScenesTeacher, package


def main(name="teacher-scenes"):
    """Standardise the trained network over 4,000 training scenes and write weights and card into the package."""
    run = Run.open(name)
    teacher = load_module(ScenesTeacher(), load_networks(run)["teacher"], name).eval()
    images, _ = data.load(from_dict(data.DataConfig, run.config["data"]), "train", 4_000)
    kept = teacher.standardise(images)
    last = run.metrics().iloc[-1].to_dict()
    package(teacher, {
        "recipe": run.config["recipe"], "config_hash": run.config_hash, "steps": run.step,
        "made": "supervised on the factors of gear/scenes.py, per patch; standardised, 64 principal components",
        "variance_kept": round(kept, 4), "final_losses_nats": {k: round(v, 4) for k, v in last.items() if k != "step"},
    })  # fmt: skip
    print(f"packaged {name}: {kept:.1%} of the standardised variance in 64 components")


if __name__ == "__main__":
    main(*sys.argv[1:])
