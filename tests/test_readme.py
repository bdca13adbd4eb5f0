"""README.md and docs/: short enough, and what they name is there."""

import importlib
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from data import read_prompts, read_samples
from files import write_jsonl
from ladder import RECIPES
from pictures import Media
from rewards import CHOICE_TYPES, NUMBER_TYPES
from settings import SETTINGS

REPOSITORY = Path(__file__).parent.parent
README = REPOSITORY / "README.md"
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
PAGES = [README, *DOCS]
LINKS = re.compile(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LAUNCHED = re.compile(
    r"(?:python|torchrun)\s(?:.*?\s)?"  # torchrun's own flags stand before the script
    r"(?:-m (?P<module>(?:look|rooms)\.\w+)|(?P<file>(?:tests/)?\w+\.py))(?P<words>.*)"
)
TORCHRUN = {  # its flags, which no script of ours has
    *("--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--shutdown-timeout"),
}


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks_of(text, language=""):
    """The code blocks of a page that are marked with a language. `text`: of another commit."""
    return [code for marked, code in FENCED.findall(text) if marked == language]


def section(title):
    """The README between a heading and the next."""
    return text_of(README).split(f"\n## {title}\n")[1].split("\n## ")[0]


def commands(text):
    """Every command in a page's code blocks and inline code, a line each, without comments.

    >>> commands("Run `python a.py --x`:\\n```\\npython b.py \\\\\\n    --y 1    # why\\n```\\n")
    ['python b.py --y 1', 'python a.py --x']
    """
    lines = re.sub(r"\s*\\\n\s*", " ", "\n".join(blocks_of(text))).splitlines()
    inline = re.findall(r"`([^`]+)`", FENCED.sub("", text))
    words = [" ".join(line.split("  #")[0].split()) for line in lines + inline]
    return [command for command in words if command.startswith(("python ", "torchrun "))]


def launches():
    """(page, module, words after it) of every command that starts a script of this repository."""
    for page in PAGES:
        for command in commands(text_of(page)):
            match = LAUNCHED.match(command)
            if match:
                yield page.name, match["module"] or match["file"], match["words"].split()


# ---------------------------------------------------------------------------------- sizes


def test_readme_is_for_three_minutes():
    text = text_of(README)
    assert len(text.splitlines()) <= 250
    assert len(text.split()) <= 2200
    assert "@@" not in text


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_pages_are_short(page):
    """At most 150 lines; only tables, commands and pictures are wide."""
    lines = text_of(page).splitlines()
    assert len(lines) <= 150
    prose = FENCED.sub("", text_of(page)).splitlines()
    wide = [line for line in prose if len(line) > 130 and not line.startswith(("|", "<img", "!["))]
    assert not wide


def test_every_page_can_be_reached():
    """A link from the README, or from a page that the README links to."""
    reached = {README.resolve()}
    for _ in range(2):
        for page in list(reached):
            for target in link_targets(page):
                if target.suffix == ".md":
                    reached.add(target)
    assert {page.resolve() for page in DOCS} <= reached


# ---------------------------------------------------------------------------------- links, pictures


def link_targets(page):
    """The files that a page links to or shows."""
    targets = ["".join(groups).split("#")[0] for groups in LINKS.findall(text_of(page))]
    inside = [target for target in targets if target and "://" not in target]
    return [(page.parent / target).resolve() for target in inside]


def heading_anchor(heading):
    """A heading's anchor, as the code hosts make it.

    >>> heading_anchor("The real run: the 3B on GPUs")
    'the-real-run-the-3b-on-gpus'
    """
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in link_targets(page):
        assert target.exists(), target
    for groups in LINKS.findall(text_of(page)):
        path, _, anchor = "".join(groups).partition("#")
        if anchor and "://" not in path:
            text = text_of(page.parent / path) if path else text_of(page)
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            assert anchor in [heading_anchor(heading) for heading in headings], anchor


def test_pictures_are_shown_and_whole():
    """A page shows each file of docs/figures, which can be read: a chart as XML, else a picture."""
    shown = set()
    for page in PAGES:
        shown.update(link_targets(page))
    figures = sorted((REPOSITORY / "docs" / "figures").iterdir())
    assert figures
    for figure in figures:
        assert figure.resolve() in shown, figure
        if figure.suffix == ".svg":
            assert ElementTree.parse(figure).getroot().tag.endswith("svg")
        else:
            Image.open(figure).load()
    assert (REPOSITORY / "docs" / "figures" / "rung.png").stat().st_size < 60_000


# ---------------------------------------------------------------------------------- names


def test_steps_name_functions_that_exist():
    """Each `file.name` of the nine steps is defined in that file."""
    steps = section("The method in nine steps")
    assert len(re.findall(r"^\d\. ", steps, re.MULTILINE)) == 9
    named = re.findall(r"`(\w+)\.(\w+)`", steps)
    assert len(named) > 20
    for file, name in named:
        module = importlib.import_module(file)
        assert callable(getattr(module, name, None)), f"{file}.{name}"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_pages_name_what_exists(page):
    """`file.name` in a page is a name in that file, of the root, rooms/ or look/."""
    packages = {path.stem: f"{path.parent.name}." for path in REPOSITORY.glob("[rl]oo*/*.py")}
    files = packages | {path.stem: "" for path in REPOSITORY.glob("*.py")}
    for file, name in re.findall(r"`(\w+)\.(\w+)`", text_of(page)):
        if file in files and name not in ("py", "jsonl"):
            module = importlib.import_module(files[file] + file)
            assert hasattr(module, name), f"{file}.{name}"


def test_tree_names_every_file():
    """The tree of files names every Python file of the root, rooms/ and look/, and no other."""
    folder, named = "", set()
    for line in section("Files").splitlines():
        match = re.match(r"(  )?([\w.]+)(/?)(  |$)", line)
        if line and not line.startswith(" "):
            folder = match[2] + "/" if match and match[3] else ""
            assert not folder or (REPOSITORY / folder).is_dir(), line
        elif match:
            named.add(folder + match[2])
    there = {path.name for path in REPOSITORY.glob("*.py")}
    for package in ("rooms", "look"):
        files = (REPOSITORY / package).glob("*.py")
        there.update(f"{package}/{path.name}" for path in files if path.name != "__init__.py")
    assert named == there


# ---------------------------------------------------------------------------------- commands


def test_commands_are_read():
    assert len(list(launches())) > 30


@pytest.mark.parametrize("script", sorted({script for _, script, _ in launches()}))
def test_scripts_know_the_flags_they_are_shown_with(script, call, capsys, monkeypatch):
    """Every flag that a page gives a script stands in its --help, its subcommand's included."""
    monkeypatch.syspath_prepend(REPOSITORY / "tests")  # the timings import one another
    name = script.removesuffix(".py").removeprefix("tests/")
    module = importlib.import_module(name)
    for page, shown, words in launches():
        flags = [word for word in words if word.startswith("--")]
        if shown != script or not flags:
            continue
        subcommand = [word for word in words[:1] if re.fullmatch(r"[a-z_]+", word)]
        for mode in ([], subcommand):
            with pytest.raises(SystemExit):
                call(module, *mode, "--help")
        known = capsys.readouterr().out
        for flag in flags:
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", known), f"{page}: {script} {flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_in_sentences_exist(page, call, capsys):
    """A --flag in inline code is one of a trainer, of a script that is shown, or torchrun's."""
    mentioned = set()
    for code in re.findall(r"`([^`]+)`", FENCED.sub("", text_of(page))):
        mentioned.update(re.findall(r"(?<![\w-])--[a-z][a-z-]*", code))
    for name in ("train_sft", "grpo", "eval", "coldstart", "ladder", "look.check", "look.probes",
                 "look.plan", "rooms.scenes"):  # fmt: skip
        with pytest.raises(SystemExit):
            call(importlib.import_module(name), "--help")
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)) | TORCHRUN
    shown = {word for _, _, words in launches() for word in words if word.startswith("--")}
    assert mentioned <= known | shown | {"--help"}


def test_the_example_of_a_reward_runs(monkeypatch):
    """docs/grpo.md's reward of one's own: its code, as it stands there."""
    import rewards

    (code,) = blocks_of(text_of(REPOSITORY / "docs" / "grpo.md"), "python")
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
    exec(code, {"REWARDS": rewards.REWARDS})
    assert rewards.REWARDS["short"](["a" * 399, "a" * 400], None) == [1.0, 0.0]


# ---------------------------------------------------------------------------------- docs/data.md


def data_block(word):
    """The code block of docs/data.md in which a word stands."""
    blocks = blocks_of(text_of(REPOSITORY / "docs" / "data.md"))
    (block,) = [block for block in blocks if word in block]
    return block


@pytest.fixture
def pictures(tmp_path):
    """The names of three pictures in tmp_path/images."""
    (tmp_path / "images").mkdir()
    names = ["a.png", "b.png", "c.png"]
    for name in names:
        Image.new("RGB", (56, 56)).save(tmp_path / "images" / name)
    return names


def test_rows_of_other_projects_are_read(tmp_path, pictures):
    """The three examples, as they stand there, are the chat row above them."""
    (tmp_path / "images" / pictures[0]).rename(tmp_path / "images" / "a.jpg")
    rows = re.split(r"\n(?=\{)", data_block("conversations").strip())
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [json.loads(row) for row in rows])
    samples = read_samples(path, tmp_path / "images")
    chat = (
        ("user", (Media("image", str(tmp_path / "images" / "a.jpg")), "How wide?")),
        ("assistant", ("85",)),
    )
    assert [sample.messages for sample in samples] == [
        chat,
        (("system", ("Be brief.",)), *chat),
        chat,
    ]


def test_prompts_and_the_chat_row_are_read(tmp_path, pictures):
    (tmp_path / "prompts.json").write_text(data_block("You look at pictures"))
    assert read_prompts(tmp_path / "prompts.json")["system"] == "You look at pictures of rooms."

    (tmp_path / "images" / pictures[0]).rename(tmp_path / "images" / "a.jpg")
    row = json.loads(data_block('{"type": "image", "image": "a.jpg"}'))
    write_jsonl(tmp_path / "rows.jsonl", [row])
    (sample,) = read_samples(tmp_path / "rows.jsonl", tmp_path / "images")
    assert sample.media[0].kind == "image"
    assert sample.messages[1] == ("assistant", ("85",))


def test_the_rate_of_a_model_without_the_paper_preset():
    """README says how much higher the tiny preset's is, for its command with --stage 2."""
    times = re.search(r"a learning rate (\d+) times as high", text_of(README))[1]
    rate = RECIPES["tiny"]["2"]["learning_rate"]
    assert "learning_rate" not in RECIPES["paper"]["2"]
    assert rate == pytest.approx(int(times) * SETTINGS["learning_rate"].default)


def test_the_rows_are_read(tmp_path):
    """A question, boxes and a chain as printed, and the table of the seven types beside them."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (56, 56)).save(tmp_path / "images" / "a.jpg")
    (tmp_path / "rows.jsonl").write_text(data_block('"question_id"'))
    question, boxes, chain = read_samples(tmp_path / "rows.jsonl", tmp_path / "images")
    assert (question.id, question.answer, len(question.options)) == ("7", "B", 2)
    assert boxes.question_type == "localization" and boxes.answer[0]["label"] == "lamp"
    assert chain.answer == "1" and chain.solution == "<think>One.</think><answer>1</answer>"

    rows = text_of(REPOSITORY / "docs" / "data.md").split("| `question_type` | `answer` |\n")[1]
    numbers, choices = [re.findall(r"`(\w+ \w+)`", row) for row in rows.splitlines()[1:3]]
    assert sorted(numbers) == sorted(NUMBER_TYPES)
    assert sorted(choices) == sorted(CHOICE_TYPES)
