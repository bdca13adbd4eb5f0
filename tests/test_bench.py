"""tests/bench.py: its models have the sizes that it says, and its commands run."""

import re
from types import SimpleNamespace

import bench
import pytest
import torch

from checkpoint import build_model, parse_config


def test_the_models_have_the_sizes_they_are_said_to_have():
    """They are tiny.CONFIG but for a few values: a change of its depth once passed to them."""
    sizes = []
    for config in (bench.SMALL, bench.MIDDLE, bench.LARGE):
        model = build_model(parse_config(config))
        sizes.append(round(sum(p.numel() for p in model.parameters()) / 1e6))
    assert sizes == [44, 113, 611]


def test_help_names_every_command(call, capsys):
    with pytest.raises(SystemExit) as ended:
        call(bench, "--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(f"bench.py {command}" in text for command in set(bench.COMMANDS) - {"side"})


def test_load(tiny_model, call, capsys):
    call(bench, "load", "--model", tiny_model, "--repeat", 1)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["load", "prefill", "decode", "peak", "copy"]
    assert all(float(line[1]) > 0 for line in lines[1:4])


@pytest.mark.slow
@pytest.mark.parametrize("task", ("video", "sample", "train"))
def test_both_sides_of_a_task_run(task, tiny_model):
    """On the tiny model and the same input."""
    pytest.importorskip("transformers")
    for work in (bench.our_work, bench.their_work):
        work(tiny_model, task, torch.float32)()
    config = bench.load_model(tiny_model).config
    one, two = (bench.example_of(task, config) for _ in range(2))
    assert one.ids.equal(two.ids)
    assert one.patches.equal(two.patches)


@pytest.mark.slow
def test_a_side_reports_seconds_and_memory(tiny_model, call, capsys):
    """From a process of its own to the line of the table."""
    flags = ("--side", "ours", "--task", "decode", "--model", tiny_model, "--repeat", 1)
    call(bench, "peers", *flags)
    title, line = capsys.readouterr().out.splitlines()
    assert title == bench.TASKS["decode"]
    seconds, peak = re.fullmatch(r" +ours +(\d+\.\d\d) s +(\d+\.\d\d) GiB", line).groups()
    assert float(seconds) > 0
    assert 0.1 < float(peak) < 20


def test_data_on_a_share_of_the_rows(tmp_path):
    """The rows are SpatialLadder-26k's, and can be read."""
    files = bench.write_data_set(tmp_path, 0.001)
    kinds = [(s.question_type, s.data_type) for s in bench.read_all(files, None)]
    assert kinds.count(("localization", "single_image")) == 5
    for kind, count in (("single_image", 5), ("multi_view", 5), ("video", 9)):
        assert kinds.count(("relative direction", kind)) == count


@pytest.fixture
def little(monkeypatch):
    """The tiny model in place of SMALL, and few short completions."""
    monkeypatch.setattr(bench, "SMALL", bench.CONFIG | {"vocab_size": 512})
    monkeypatch.setattr(bench, "LENGTH", 8)
    monkeypatch.setattr(bench, "GROUP", 2)
    monkeypatch.setattr(bench, "GROUPS", (1, 2))


def test_a_step_of_grpo(little, call, tmp_path):
    """No completion ends before it is as long as it may be: our_step asserts it."""
    seconds = []

    def step():
        bench.write_random(tmp_path, bench.SMALL)
        bench.write_questions(tmp_path)
        seconds.append(bench.our_step(tmp_path, tmp_path))

    call(SimpleNamespace(__name__="grpo", main=step))
    assert seconds[0] > 0


@pytest.mark.slow
def test_a_shared_prompt_and_copies(little, call, capsys):
    call(bench, "shared", "--repeat", 1)
    *_, heads, one, two = capsys.readouterr().out.splitlines()
    assert heads.split() == ["G", "prefill", "copies", "update", "copies"]
    for G, line in ((1, one), (2, two)):
        numbers = [float(cell) for cell in line.split()]
        assert len(numbers) == 5
        assert numbers[0] == G
