"""Every notebook keeps the contract, and runs, with the runs of `tiny` in place of those it
names.
"""

import ast
import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import matplotlib.pyplot
import pandas as pd
import pytest
from helpers import record_judged, record_scored, record_study
from PIL import Image

from gear.__main__ import main
from gear.config import TrainingStopped, UserError
from gear.experiments.recipes import recipe
from gear.experiments.studies import STUDIES
from gear.figures import figure_path, render
from gear.runs.run import open_runs

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*/*.ipynb"))
ALLOWED = {"gear", "typing", "numpy", "pandas", "matplotlib", "seaborn"}
GENERATORS = dict.fromkeys(["baseline", "control", "method"], "tiny")
TOKENIZERS = dict.fromkeys(["warm_up", "control", "half"], "tiny-tokenizer")
SYSTEMS = {
    "llamagen": "tiny-llamagen-s[012]",
    "baseline": "tiny-llamagen-repa-s[012]",
    "control": "tiny-llamagen-repa-control-s[012]",
    "method": "tiny-gear-s[012]",
}
ON_TINY = {
    "pictures": {"run": "tiny-joint"},
    "train": {"recipe": "tiny", "device": "cpu"},
    "tour": {"run": "tiny", "warm_up": "tiny-tokenizer"},
    "runs": {"pattern": "tiny*"},
    "probe": {
        "checkpoint": "tiny-joint",
        "other": "tiny-tokenizer",
        "generator": "tiny",
        "count": 40,
        "k": 5,
    },
    "fig1_convergence": SYSTEMS
    | {
        "method": "tiny-joint-s[012]",
        "transfer": "tiny-gear-s[012]",
        "preset": "tiny",
        "count": 100,
        "at": "12,24",
    },
    "fig2_method": {},
    "fig3_training_dynamics": GENERATORS | {"half": "tiny"},
    "fig4_codebook_usage": {
        "joint": "tiny-joint",
        "control": "tiny-tokenizer",
        "half": "tiny-tokenizer",
    },
    "fig5_generator_alignment": GENERATORS | {"transfer": "", "images": 40, "k": 5},
    "tab1_system_comparison": SYSTEMS | {"count": 100},
    "tab2_3_text_to_image": {},
    "tab4_tokenizer_alignment": TOKENIZERS | {"method": "tiny-joint", "images": 40, "k": 5},
    "tab5_13_ablations": {"study": "temperature", "preset": "tiny", "count": 100},
    "tab14_19_guidance": {
        "baseline": "tiny-llamagen-repa-s[012]",
        "method": "tiny-joint-s[012]",
        "count": 100,
        "scales": "1,1.5,2",
    },
    "tab18_reconstruction": {
        "preset": "tiny",
        "count": 100,
        "control": "tiny-llamagen-repa-control-s[012]",
    },
    "alignment_sensitivity": GENERATORS
    | dict.fromkeys(["tokenizer_warm_up", "tokenizer_control"], "tiny-tokenizer")
    | {"tokenizer_method": "tiny-joint", "images": 40, "k": 5},
    "bridges": dict.fromkeys(
        ["soft", "control", "straight_through", "naive_inputs", "naive", "no_gan"], "tiny-joint"
    ),
    "probes": GENERATORS | {"images": 60},
    "protocols": {"run": "tiny", "count": 32},
    "rate_distortion": SYSTEMS
    | {
        "method": "tiny-joint-s[012]",
        "transfer": "tiny-gear-s[012]",
        "half": "",
        "naive_inputs": "",
        "no_warm_up": "",
        "images": 96,
    },
    "samples": {
        "llamagen": "",
        "baseline": "tiny-llamagen-repa-s0",
        "control": "tiny-llamagen-repa-control-s0",
        "method": "tiny-joint-s0",
        "transfer": "tiny-gear-s0",
        "at": "12,24",
    },
}


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def test_every_notebook_is_tried_on_tiny():
    assert set(ON_TINY) == {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_contract(path):
    cells = code_cells(path)
    sources = ["".join(cell["source"]) for cell in cells]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), (
        "strip it: make strip"
    )
    statements = [n for s in sources for n in ast.walk(ast.parse(s)) if isinstance(n, ast.stmt)]
    assert len(statements) <= 80
    tagged = [
        s for cell, s in zip(cells, sources) if "parameters" in cell["metadata"].get("tags", [])
    ]
    assert len(tagged) == 1
    for node, line in zip(ast.parse(tagged[0]).body, tagged[0].splitlines()):
        assert isinstance(node, ast.AnnAssign) and " # " in line, f"annotate and explain: {line}"
        assert node.annotation.id in render.TYPES, line
        ast.literal_eval(node.value)
    for node in ast.walk(ast.parse("\n".join(sources))):
        assert not isinstance(node, (ast.FunctionDef, ast.ClassDef)), "the library computes"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            assert {m.split(".")[0] for m in modules} <= ALLOWED
    calls = [s for s in sources if s.endswith("\n\nrender.check_parameters(globals())")]
    assert len(calls) == 1 and calls[0] == sources[1] and "import" in calls[0], (
        "papermill checks no parameter"
    )
    assert not any(line.startswith(("!", "%")) for s in sources for line in s.splitlines())
    if path.stem not in render.INTERACTIVE:
        calls = [n for n in ast.walk(ast.parse("\n".join(sources))) if isinstance(n, ast.Call)]
        saves = [call for call in calls if ast.unparse(call.func) == "figures.save"]
        name = ast.unparse(saves[0].args[1]).strip("'")
        is_named = name == path.stem or path.stem == render.ABLATIONS and name.startswith("f'tab{")
        assert is_named, "a figure bears its notebook's name"
        assert {"n", "interval"} <= {keyword.arg for keyword in saves[0].keywords}, (
            "a figure says what was measured, and what its bands are"
        )


SCORED = (
    "fig1_convergence",
    "tab1_system_comparison",
    "tab14_19_guidance",
    "tab5_13_ablations",
    "tab18_reconstruction",
    "rate_distortion",
    "samples",
)
WITHOUT_RUNS = ("fig2_method", "tab2_3_text_to_image")


def record_runs():
    """Runs with scores, by hand: what these notebooks do with numbers does not depend on how they
    came about.
    """
    for study in ("size", "temperature", "tokenizer"):
        record_study(study)
    for method in ("llamagen", "llamagen-repa-control", "gear"):
        for seed in range(3):
            record_scored(f"tiny-{method}-s{seed}", recipe(f"tiny-{method}-s{seed}"))
    for run in open_runs("tiny-*-s[012]"):
        record_judged(run)


IN_A_KERNEL = (
    *render.INTERACTIVE,
    "fig5_generator_alignment",
)  # in the quick tests: a kernel takes seconds to start
DRAWN = [path.stem for path in NOTEBOOKS if path.stem not in render.INTERACTIVE]


def run_here(name, parameters):
    """Run a notebook's cells in this process."""
    first, *others = ("".join(cell["source"]) for cell in code_cells(render.notebooks()[name]))
    namespace = {}
    with matplotlib.rc_context():
        exec(first, namespace)
        namespace |= parameters
        for source in others:
            exec(source, namespace)
    matplotlib.pyplot.close("all")


def check_figure(name):
    """Assert that a notebook has left a picture with its PDF and CSV, and where it comes from."""
    product = "tab5_temperature" if name == render.ABLATIONS else name
    assert matplotlib.image.imread(figure_path(product, "png")).std() > 0.05
    assert figure_path(product, "pdf").stat().st_size > 5_000
    head, *_ = figure_path(product, "csv").read_text().splitlines()
    provenance = json.loads(head.removeprefix("# "))
    assert {"tiny", "tiny-joint", "tiny-joint-s0", "tiny-gear-s0"} & provenance[
        "runs"
    ].keys() or name in WITHOUT_RUNS
    assert all(provenance["statistics"].values())
    assert len(pd.read_csv(figure_path(product, "csv"), comment="#")) > 5


@pytest.mark.parametrize("name", [name for name in DRAWN if name not in IN_A_KERNEL])
def test_its_cells_run_on_tiny(name, tiny, home):
    if name in SCORED:
        record_runs()
    run_here(name, ON_TINY[name])
    check_figure(name)


@pytest.mark.parametrize("name", render.INTERACTIVE)
def test_those_to_sit_before_run_on_tiny(name, tiny, home, monkeypatch):
    """From any working directory. What can be turned is there as a picture too, for those who only
    read.
    """
    monkeypatch.chdir(home)
    executed = render.execute(name, ON_TINY[name])
    shown = [
        output["data"]
        for cell in code_cells(executed)
        for output in cell["outputs"]
        if "data" in output
    ]
    pictures = [base64.b64decode(data["image/png"]) for data in shown if "image/png" in data]
    assert len(pictures) >= 2 and all(
        matplotlib.image.imread(io.BytesIO(p)).std() > 0.05 for p in pictures
    )


@pytest.mark.parametrize(
    "name", [n if n in IN_A_KERNEL else pytest.param(n, marks=pytest.mark.slow) for n in DRAWN]
)
def test_runs_on_tiny(name, tiny, home, monkeypatch):
    """From any working directory. One is drawn again from tables and metrics alone, byte for
    byte.
    """
    monkeypatch.chdir(home)
    if name in SCORED:
        record_runs()
    assert render.execute(name, ON_TINY[name]).exists()
    check_figure(name)
    if name == "fig5_generator_alignment":
        paths = [figure_path(name, suffix) for suffix in ("png", "pdf", "csv", "json")]
        files = [path.read_bytes() for path in paths]
        for weights in tiny.glob("*/checkpoints"):
            weights.rename(weights.with_name("gone"))
        render.execute(name, ON_TINY[name])
        assert [path.read_bytes() for path in paths] == files


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_every_study_is_drawn(study, home):
    record_study(study)
    render.execute(render.ABLATIONS, {"study": study, "preset": "tiny", "count": 100})
    table = pd.read_csv(figure_path(f"tab{STUDIES[study].table}_{study}", "csv"), comment="#")
    assert {"ours", "paper", "directions"} <= set(table.source)


def test_notebooks_that_need_weights_belong_to_the_demo():
    """Those to sit before, and the probe, which saves a figure all the same; the Makefile names
    what the demo draws.
    """
    assert {path.stem for path in NOTEBOOKS} - set(render.figure_notebooks()) == set(
        render.NEEDS_WEIGHTS
    )
    assert set(render.NEEDS_WEIGHTS) - set(render.INTERACTIVE) == {"probe"}
    demo = re.search(r"^DEMO_FIGURES := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert set(render.NEEDS_WEIGHTS) < set(demo) <= set(render.notebooks())


def test_unknown_parameter_is_caught_before_anything_runs(home):
    with pytest.raises(UserError, match="no parameter 'metod'. Did you mean 'method'"):
        render.execute("fig3_training_dynamics", {"metod": "x"})
    assert not (home / "figures").exists()


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("images", "many", "expected int, given 'many'"),
        ("k", 2.5, "expected int, given 2.5"),
        ("k", True, "given True"),
    ],
)
def test_a_value_of_another_type_is_caught_before_anything_runs(key, value, said, home):
    with pytest.raises(
        UserError,
        match=f"notebook 'fig5_generator_alignment', parameter '{key}': {'' if key == 'k' else said}",
    ) as error:
        render.execute("fig5_generator_alignment", {key: value})
    assert said in str(error.value) and not (home / "figures").exists()


def test_text_is_read_as_the_parameters_type():
    types = {"n": int, "x": float, "b": bool, "s": str}
    read = {
        key: render._typed("t", types, key, text)
        for key, text in {"n": "12", "x": "3", "b": "False", "s": "12"}.items()
    }
    assert read == {"n": 12, "x": 3.0, "b": False, "s": "12"} and type(read["x"]) is float


def test_check_parameters_names_what_is_wrong_and_takes_what_is_right():
    """Its own names as papermill injects them, a number for a float; never what a notebook computed
    before it runs again.
    """
    own = {
        "__annotations__": {"recipe": str, "scale": float},
        "recipe": "tiny",
        "scale": 2,
        "rows": 3,
        "In": ["", "rows = 3"],
    }
    render.check_parameters(own)
    render.check_parameters(own | {"In": ["", "# Parameters\nscale = 2\n"]})
    with pytest.raises(
        UserError, match="no parameter 'recipee'. Did you mean 'recipe'. It has: recipe, scale"
    ):
        render.check_parameters(
            own | {"In": ["", '# Parameters\nrecipee = "tiny"\n'], "recipee": "tiny"}
        )
    for key, value in {"recipe": 3, "scale": "2", "scale ": True}.items():
        with pytest.raises(
            UserError, match=f"'{key.strip()}': expected (str|float), given {value!r}"
        ):
            render.check_parameters(own | {key.strip(): value})


@pytest.mark.parametrize(
    "parameters, said",
    [
        ({"cfg_scale": "abc"}, "parameter 'cfg_scale': expected float, given 'abc'"),
        pytest.param(
            {"recipee": "tiny"},
            "no parameter 'recipee'. Did you mean 'recipe'?",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_papermill_itself_stops_before_a_run_is_made(parameters, said, home):
    """Without gear's own check in between: `papermill train.ipynb out.ipynb -p ...`."""
    given = [word for key, value in parameters.items() for word in ("-p", key, value)]
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(ROOT / "notebooks" / "start" / "train.ipynb"),
        str(home / "out.ipynb"),
        *given,
    ]
    done = subprocess.run([*command, "-p", "device", "cpu"], capture_output=True, text=True)
    assert done.returncode != 0 and said in done.stderr
    assert not (home / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ("False", "True"))
def test_papermill_drives_a_run_from_its_first_step_to_its_samples(compiled, home, device):
    """`papermill train.ipynb out.ipynb -p device cuda`: progress, losses, pictures and the last
    numbers are in its outputs.
    """
    given = {"recipe": "tiny-joint-no-init", "device": device, "compile": compiled}
    words = [word for key, value in given.items() for word in ("-p", key, value)]
    notebook, out = ROOT / "notebooks" / "start" / "train.ipynb", home / "out.ipynb"
    done = subprocess.run(
        [sys.executable, "-m", "papermill", notebook, out, *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = [output for cell in code_cells(out) for output in cell["outputs"]]
    shown = [
        output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})
    ]
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert len(shown) == 2 and "100%" in text and "images/s" in text
    assert "tiny-joint-no-init: step 24, validation next-token loss" in text


def test_figures_takes_parameters_and_draws_again_when_they_change(tiny, home, capsys, monkeypatch):
    given = [word for key in ("joint", "control", "half") for word in ("-p", key, "tiny-joint")]
    main(["figures", "fig4_codebook_usage", *given])
    assert "tiny-joint" in figure_path("fig4_codebook_usage", "csv").read_text()
    main(["figures", "fig4_codebook_usage", *given])
    assert "fig4_codebook_usage: up to date" in capsys.readouterr().out
    monkeypatch.setattr(
        render, "execute", lambda name, parameters: print("drawn again", parameters)
    )
    main(["figures", "fig4_codebook_usage", *given[:3]])
    assert "drawn again {'joint': 'tiny-joint'}" in capsys.readouterr().out


def test_a_file_that_a_parameter_names_is_an_input(home, capsys, monkeypatch):
    """Its content may change under one name; a parameter that names nothing on the disk is a value
    like any other.
    """
    monkeypatch.chdir(home)
    (home / "figures").mkdir()
    Image.new("L", (1, 1)).save(home / "figures" / "probe.png")
    monkeypatch.setattr(render, "execute", lambda name, parameters: print("drawn"))
    for change, said in (
        (lambda: (home / "x.pt").write_text("one"), "drawn"),
        (lambda: None, "up to date"),
        (lambda: (home / "x.pt").write_text("other"), "drawn"),
        (lambda: None, "up to date"),
        (
            lambda: (home / "new.pt").touch(),
            "up to date",
        ),  # the folder one stands in is no parameter
    ):
        change()
        main(["figures", "probe", "-p", "checkpoint", "x.pt", "-p", "other", ""])
        assert said in capsys.readouterr().out


@pytest.mark.slow
def test_a_parameter_that_is_a_path_to_nothing_is_named(tiny, home, capsys):
    given = {"checkpoint": "tiny-tokenizer", "other": "", "generator": "", "images": "nowhere"}
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "figures",
                "probe",
                *(word for key, value in given.items() for word in ("-p", key, value)),
            ]
        )
    assert stop.value.code == 1 and ", -p images: UserError: " in capsys.readouterr().err


def test_a_parameter_that_is_no_utf8_is_caught_before_anything_runs(home):
    with pytest.raises(UserError, match="parameter 'checkpoint': .* is no UTF-8"):
        render.execute("probe", {"checkpoint": "caf\udce9.pt"})
    assert not (home / "figures").exists()


def test_a_folder_that_is_no_run_is_no_input(home):
    (home / "runs" / "d" / "config.json").mkdir(parents=True)
    (home / "runs" / "caf\udce9").mkdir()
    (home / "runs" / "caf\udce9" / "config.json").write_text("{}")
    assert render._inputs("probe", {"checkpoint": "x"})["parameters"] == {"checkpoint": "x"}


@pytest.mark.parametrize(
    "name, products",
    [
        ("fig5", ["fig5_generator_alignment"]),
        ("generator_alignment", ["fig5_generator_alignment"]),
        ("tab19", ["tab14_19_guidance"]),
        ("tab3", ["tab2_3_text_to_image"]),
        ("tab5", ["tab5_temperature"]),
        ("temperature", ["tab5_temperature"]),
        ("bridges", ["bridges"]),
    ],
)
def test_a_figure_is_found_by_its_place_in_the_paper_and_by_its_title(name, products):
    assert list(render._targets([name], {})) == products


def test_a_notebook_says_what_to_train_if_runs_are_missing():
    """The first cell of each has its claim or question, its runs, and commands of known recipes."""
    for name, path in render.notebooks().items():
        head = "".join(json.loads(path.read_text())["cells"][0]["source"])
        assert "**Runs.**" in head or name in ("train", "runs"), name
        for command in re.findall(r"`gear train ([^`-][^`]*)`", head.replace("\n", " ")):
            for word in command.split():
                recipe(word)


def test_several_notebooks_take_each_its_own_parameters(home, capsys):
    targets = render._targets(
        ["fig4_codebook_usage", "fig3_training_dynamics"], {"half": "", "joint": "x"}
    )
    assert targets["fig4_codebook_usage"] == ("fig4_codebook_usage", {"half": "", "joint": "x"})
    assert targets["fig3_training_dynamics"] == ("fig3_training_dynamics", {"half": ""})
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "figures",
                "fig4_codebook_usage",
                "fig3_training_dynamics",
                "-p",
                "joynt",
                "tiny-joint",
            ]
        )
    assert stop.value.code == 2
    assert "none of these notebooks has a parameter 'joynt'" in capsys.readouterr().err
    assert not (home / "figures").exists()


def test_a_failed_notebook_names_its_cell_and_the_others_still_run(tiny, home, capsys):
    """No runs of the names the notebooks expect: each fails with the reason, none hides the
    others.
    """
    with pytest.raises(TrainingStopped) as failed:
        render.render(["fig4_codebook_usage", "fig3_training_dynamics"])
    for name in ("fig4_codebook_usage", "fig3_training_dynamics"):
        assert f"notebook '{name}', cell" in str(failed.value)
    assert "no run 'scenes-joint-s0'" in str(failed.value)


def test_up_to_date_figures_are_not_drawn_again(tiny, home, capsys, monkeypatch):
    def draw(product, parameters):
        assert product == "fig4_codebook_usage" and parameters == {
            "joint": "scenes-joint-s0",
            "control": "scenes-control-s0",
            "half": "scenes-tokenizer-half-s0",
        }
        (home / "figures").mkdir(exist_ok=True)
        Image.new("L", (1, 1)).save(home / "figures" / "fig4_codebook_usage.png")
        print("drawn")

    monkeypatch.setattr(render, "execute", draw)
    for said in ("drawn", "up to date", "drawn"):
        render.render(["fig4_codebook_usage"], seeds=[0])
        assert said in capsys.readouterr().out
        if said == "up to date":
            (tiny / "tiny" / "metrics.jsonl").open("a").write('{"step": 25}\n')
