"""README.md: what it counts is counted, what it names is there."""

import importlib
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def lines_of(name):
    return len((REPOSITORY / name).read_text(encoding="utf-8").splitlines())


def test_file_table_counts_lines():
    """Every Python file outside tests stands in the tables with its length, the two sums are theirs, none is over 600."""
    tables = [
        dict(re.findall(r"^\| `?(\w+\.py)`? \| (\d+) \|", part, re.MULTILINE))
        for part in README.split("## Files")[1].split("\n## ")[0].split("Beside the path")
    ]
    assert len(tables) == 2 and not set(tables[0]) & set(tables[1])
    files = {path.name for path in REPOSITORY.glob("*.py")}
    assert set(tables[0]) | set(tables[1]) == files
    for table in tables:
        for name, count in table.items():
            assert (name, int(count)) == (name, lines_of(name)) and int(count) <= 600
    sums = [
        int(number.replace(",", ""))
        for number in re.findall(r"([\d,]+) lines", README.split("## Files")[1])[:2]
    ]
    assert sums == [sum(map(int, table.values())) for table in tables]


def test_steps_name_functions_that_exist():
    """Each `file.name` of the numbered steps is a name in that file."""
    steps = README.split("## The ladder, step by step")[1].split("\n## ")[0]
    named = re.findall(r"`(\w+)\.(\w+)(?:\.(\w+))?`", steps)
    assert len(named) > 15
    for file, *names in named:
        text = (REPOSITORY / f"{file}.py").read_text(encoding="utf-8")
        for name in filter(None, names):
            assert re.search(rf"^\s*(def|class) {name}\b|^{name} = ", text, re.MULTILINE), (
                f"{file}.{name}"
            )


def test_pictures_are_shown_and_whole():
    """Each file of figures/ is shown, nothing else is, and each can be read: a chart as XML, a map as a picture."""
    shown = re.findall(r'(?:]\(|src=")(figures/[^)"]*)', README)
    assert sorted(shown) == sorted(
        str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "figures").iterdir()
    )
    for name in shown:
        if name.endswith(".svg"):
            assert ElementTree.parse(REPOSITORY / name).getroot().tag.endswith("svg")
        else:
            Image.open(REPOSITORY / name).load()


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README


@pytest.mark.parametrize(
    "script",
    (
        "train_sft.py",
        "grpo.py",
        "eval.py",
        "scenes.py",
        "tiny.py",
        "report.py",
        "data.py",
        "ladder.py",
        "bench.py",
        "bench_grpo.py",
        "compare.py",
        "probes.py",
    ),
)
def test_scripts_know_the_flags_they_are_shown_with(script, call, capsys):
    """Every --flag that a command line of the README gives a script stands in that script's --help."""
    commands = re.findall(
        rf"^(?:python|torchrun --nproc-per-node \d+) {script} ([^#\n`]*(?:\\\n[^#\n`]*)*)",
        README,
        re.MULTILINE,
    )
    flags = {word for command in commands for word in command.split() if word.startswith("--")}
    modes = {"report.py": ["show"], "data.py": ["check"]}.get(script, [])
    name = (
        "check" if script == "data.py" else script.removesuffix(".py")
    )  # whose main `data.py check` calls
    for mode in [modes] if "--sample-cold-start" not in flags else [modes, ["--sample-cold-start"]]:
        with pytest.raises(SystemExit):
            call(importlib.import_module(name), *mode, "--help")
    helps = capsys.readouterr().out
    for flag in flags:
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", helps), flag
