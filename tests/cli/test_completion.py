"""The script that `gear completion` prints is valid, and offers commands, names and options."""

import shlex
import shutil
import subprocess

import pytest

from gear.__main__ import main
from gear.cli.completion import SHELLS, script
from gear.cli.usage import COMMANDS
from gear.experiments.recipes import RECIPES
from gear.experiments.studies import STUDIES

BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(not BASH, reason="completion is tried in bash")


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "gear.bash"
    path.write_text(script("bash"))
    return path


@pytest.fixture
def complete(bash_script):
    """Return a function that gives the words that bash offers for the last word of a line."""

    def offered(*words):
        line = " ".join(map(shlex.quote, words))
        code = (
            f"source {bash_script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _gear; "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run([BASH, "-c", code], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.split()

    return offered


def test_the_script_of_each_shell_is_printed_and_valid(capsys, tmp_path):
    for shell in SHELLS:
        main(["completion", shell])
        text = capsys.readouterr().out
        assert text == script(shell) and "complete -o default -F _gear gear" in text
        (tmp_path / shell).write_text(text)
        if shutil.which(shell):
            assert subprocess.run([shell, "-n", tmp_path / shell]).returncode == 0
    assert "bashcompinit" in script("zsh") and "bashcompinit" not in script("bash")


def test_commands_and_recipes_are_completed(complete):
    assert complete("gear", "") == list(COMMANDS)
    assert complete("gear", "tr") == ["train"] and complete("gear", "nothing") == []
    assert complete("gear", "train", "scenes-llamagen-repa-c") == [
        "scenes-llamagen-repa-control",
        "scenes-llamagen-repa-control-s0",
    ]
    assert set(RECIPES) <= set(complete("gear", "train", ""))
    assert complete("gear", "train", "tiny", "teach") == [
        "teacher-scenes",
        "teacher-scenes-s0",
    ]
    assert complete("gear", "sweep", "") == list(STUDIES)
    assert complete("gear", "figures", "fig5") == ["fig5", "fig5_generator_alignment"]
    assert complete("gear", "completion", "") == list(SHELLS)


def test_options_and_their_choices_are_completed(complete):
    assert complete("gear", "train", "tiny", "--brid") == ["--bridge"]
    assert complete("gear", "train", "tiny", "--bridge", "naive") == ["naive_inputs", "naive"]
    assert complete("gear", "sample", "tiny", "--cf") == ["--cfg-scale"]
    assert complete("gear", "sample", "tiny", "--bridge") == []  # an option of another command
    assert complete("gear", "inspect", "-") == ["--help"]
    assert complete("gear", "train", "tiny", "--label", "") == []  # any text: the shell's files
    assert "tiny" in complete("gear", "train", "--quiet", "")  # takes no value


def test_runs_are_those_that_exist_when_a_name_is_completed(complete, home, monkeypatch):
    assert complete("gear", "sample", "") == []
    for folder in ("runs", "other runs"):
        (home / folder / "mine").mkdir(parents=True)
        (home / folder / "mine" / "config.json").touch()
    (home / "runs" / "empty").mkdir()
    assert complete("gear", "sample", "m") == complete("gear", "runs", "") == ["mine"]
    (home / "other runs" / "mine").rename(home / "other runs" / "yours")
    monkeypatch.setenv("GEAR_RUNS", str(home / "other runs"))
    assert complete("gear", "evaluate", "") == ["yours"]
    monkeypatch.setenv("GEAR_RUNS", "")  # the folder of the time when the script was printed
    assert "yours" not in complete("gear", "evaluate", "")


@pytest.mark.parametrize("words", ([], ["fish"], ["bash", "zsh"], ["bash", "--foo"], ["bsh"]))
def test_a_shell_that_is_not_known(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["completion", *words])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "SHELL is bash or zsh" in message
    assert ("Did you mean 'bash'?" in message) == (words == ["bsh"])
