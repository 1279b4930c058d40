"""`gear --help` and `gear COMMAND --help` describe every command, and what they say works."""

import importlib
import re
import shlex

import pytest

import gear
from gear.__main__ import main
from gear.cli import usage
from gear.cli.arguments import help_text, parse
from gear.cli.completion import flags
from gear.experiments.recipes import METHODS, PRESETS
from gear.experiments.studies import STUDIES

USAGES = {name: importlib.import_module(f"gear.cli.{name}").USAGE for name in usage.COMMANDS}


def printed(capsys, *arguments):
    """Return what a command prints before it exits with code 0."""
    try:
        main(list(arguments))
    except SystemExit as end:
        assert end.code == 0
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


def words_of(text):
    """Return a text on one line, so that it does not matter where a line ends."""
    return " ".join(text.split())


@pytest.mark.parametrize("arguments", ([], ["--help"], ["-h"], ["help"]))
def test_the_overview_has_every_command_in_a_group_and_says_where_to_go_next(arguments, capsys):
    lines = printed(capsys, *arguments).split("\n")
    assert lines[0].startswith("usage: gear COMMAND")
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles == [f"{title}:" for title in usage.GROUPS] and 3 <= len(titles) <= 4
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert listed == list(usage.COMMANDS)
    assert "gear COMMAND --help" in "\n".join(lines) and "README.md" in "\n".join(lines)
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("command", usage.COMMANDS)
def test_every_command_has_a_help_of_the_same_parts(command, capsys, home):
    text = printed(capsys, command, "--help")
    lines = text.split("\n")
    assert lines[0] == " ".join(f"usage: gear {command} {USAGES[command].names} [OPTIONS]".split())
    assert lines[2] == usage.COMMANDS[command]
    assert "\nExamples:\n  gear " in text and f"\n{USAGES[command].title}:\n  -h, --help" in text
    assert max(map(len, lines)) <= 100 and "╭" not in text
    assert text == printed(capsys, command, "-h") == printed(capsys, "help", command)
    assert list(home.iterdir()) == []  # help writes nothing


@pytest.mark.parametrize("command", usage.COMMANDS)
def test_a_help_lists_the_options_that_completion_offers_with_defaults(command, capsys):
    text = printed(capsys, command, "--help")
    listed = []
    for line in text.split("\n"):
        if line.startswith("  -"):
            listed += re.findall(r"--[\w-]+", re.split(" {2,}", line.strip())[0])
    options = USAGES[command].options
    expected = flags(type(options(()))) if options else {}
    assert sorted(listed) == sorted(["--help", *expected])
    with_default = [flag for flag in expected if not flag.startswith("--no-")]
    if "--parameters" in with_default:  # it may be repeated, and has no default
        with_default.remove("--parameters")
    assert words_of(text).count("(default:") == len(with_default)


EXAMPLES = [(name, example) for name in USAGES for example in USAGES[name].examples]


@pytest.mark.parametrize("command, example", EXAMPLES, ids=[example for _, example in EXAMPLES])
def test_the_options_of_an_example_exist_and_its_values_are_allowed(command, example):
    words = shlex.split(example.partition(" > ")[0])
    assert words[:2] == ["gear", command]
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    names, options = words[2:first], words[first:]
    if USAGES[command].options:
        default = USAGES[command].options(names)
        assert (parse(default, options, command) != default) == bool(options)
    else:
        assert not options
    choices = USAGES[command].choices
    assert not choices or command == "data" or set(names) <= {*choices, "scenes-gear-s1"}


def test_the_help_of_train_is_in_groups_and_lists_presets_and_methods(capsys):
    text = printed(capsys, "train", "--help")
    parts = re.split(r"(?m)^(\w[\w, ]*:)$", text)[1:]
    groups = dict(zip(parts[::2], parts[1::2]))
    science = [
        f"The science, {part}:"
        for part in ("data", "tokenizer", "generator", "objective", "optimizer")
    ]
    assert list(groups) == [
        "Examples:",
        "What to train:",
        "The science:",
        *science,
        "How it is run:",
    ]
    for names in (PRESETS, METHODS):
        assert f": {', '.join(names)}." in words_of(text)
    for title, option in (
        ("What to train:", "--label"),
        ("The science:", "--seed"),
        ("The science, objective:", "--tau"),
        ("How it is run:", "--device"),
    ):
        assert [name for name, lines in groups.items() if f"\n  {option} " in lines] == [title]


def test_the_help_of_train_shows_the_defaults_of_the_recipe_that_is_named(capsys):
    tiny = words_of(printed(capsys, "train", "tiny", "--help"))
    scenes = words_of(printed(capsys, "train", "scenes-gear-s3", "--help"))
    general = words_of(printed(capsys, "train", "--help"))
    assert "(default: tiny-joint)" in tiny and "(default: scenes-joint-s3)" in scenes
    assert "(default: scenes-joint)" in general and "those of scenes-gear." in general
    with pytest.raises(SystemExit) as stop:
        main(["train", "tiyn", "--help"])
    assert stop.value.code == 2 and "Did you mean 'tiny'?" in capsys.readouterr().err


def test_the_help_of_sweep_lists_the_studies(capsys):
    text = words_of(printed(capsys, "sweep", "--help"))
    assert all(f"{name} (Table {study.table})" in text for name, study in STUDIES.items())


@pytest.mark.parametrize("columns, longest", (("60", 60), ("100", 100), ("300", 100)))
def test_a_help_fits_the_terminal_in_one_column(columns, longest, monkeypatch):
    """In a wide terminal tyro would set groups side by side, and no title would be found."""
    monkeypatch.setenv("COLUMNS", columns)
    text = help_text("claims", usage.COMMANDS["claims"], USAGES["claims"])
    lines = text.split("\n")
    assert max(len(line) for line in lines if not line.startswith("  gear ")) <= longest
    assert lines.count("Options:") == lines.count("Scoring:") == 1
    assert gear.cli.arguments.os.environ["COLUMNS"] == columns  # as it was


def test_a_message_about_an_option_names_the_command_that_helps(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "tiny", "--lables", "3"])
    message = words_of(capsys.readouterr().err)
    assert "gear sample --help" in message and "--labels" in message


def test_help_of_an_unknown_command(capsys):
    for arguments in (["trian", "--help"], ["help", "trian"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2 and "Did you mean 'train'?" in capsys.readouterr().err
