"""benchmarks.py: matchers and aggregates against the authors' own values, files as on the hub."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import benchmarks as evaluation
from benchmarks import BENCHES, OURS
from data import Sample
from files import UserError
from pictures import Media
from rewards import mean_relative_accuracy

RAW = "raw"  # the completion is the text as it is; otherwise the text stands in <answer>
# (type, answer, truth, score): values made by running the authors' scorers
VSI = [
    ("object_counting", RAW, "4", "4", 1.0),
    ("object_counting", "4", "4", 1.0),
    ("object_counting", "3", "4", 0.6),  # relative error .25: rounding decides on the threshold
    ("object_counting", "5", "4", 0.6),
    ("object_counting", "2", "4", 0.1),  # <=, not <
    ("object_counting", "6", "4", 0.1),
    ("object_counting", "1", "4", 0.0),
    ("object_counting", "-4", "4", 1.0),  # the sign is dropped
    ("object_counting", "four", "4", 1.0),
    ("object_counting", "a total of 4 chairs", "4", 0.0),  # "a" is 1
    ("object_counting", "twenty one", "21", 0.0),  # "one" is tried first
    ("object_abs_distance", "1.5", "1.5", 1.0),
    ("object_abs_distance", "1.5 meters", "1.5", 1.0),
    ("object_abs_distance", "1.45", "1.5", 1.0),
    ("object_abs_distance", "0.0", "1.5", 0.0),
    ("object_abs_distance", "2.0", "1.5", 0.4),
    ("object_abs_distance", "1,200", "1200", 0.0),  # the comma ends the number
    ("object_abs_distance", "1e1", "10", 0.0),
    ("object_abs_distance", "about 2", "2", 1.0),
    ("object_abs_distance", "0.95", "1.0", 1.0),
    ("object_abs_distance", "1.1", "1.0", 0.9),
    ("object_abs_distance", "1.2", "1.0", 0.7),
    ("object_abs_distance", "1.45", "1.0", 0.2),
    ("object_abs_distance", "0.5", "0", 0.0),  # truth 0 crashes there: 0 here
    ("object_abs_distance", "0.5", "-1", 0.0),  # a negative truth makes all right there
    ("object_size_estimation", "95", "100", 1.0),
    ("object_size_estimation", "90", "100", 0.9),
    ("object_size_estimation", "80", "100", 0.6),
    ("object_size_estimation", "75", "100", 0.6),
    ("object_size_estimation", "70", "100", 0.5),
    ("object_size_estimation", "65", "100", 0.4),
    ("object_size_estimation", "60", "100", 0.3),
    ("object_size_estimation", "55", "100", 0.1),
    ("object_size_estimation", RAW, "The length is about 85 cm.", "90", 0.9),
    ("room_size_estimation", "20.5", "22.3", 0.9),
    ("room_size_estimation", "30", "20", 0.1),
    ("object_rel_direction_easy", "A", "A", 1.0),
    ("object_rel_direction_hard", "A.", "A", 1.0),
    ("object_rel_direction_medium", "A. left", "A", 1.0),
    ("object_rel_distance", "B chair", "B", 1.0),
    ("object_rel_distance", "B, C", "B", 0.0),
    ("object_rel_distance", "b", "B", 1.0),
    ("object_rel_distance", "b. chair", "B", 0.0),
    ("object_rel_distance", "(B)", "B", 0.0),
    ("object_rel_distance", "B)", "B", 0.0),
    ("object_rel_distance", "", "B", 0.0),
    ("object_rel_distance", "Because", "B", 0.0),
    ("object_rel_distance", RAW, "Answer: B", "B", 1.0),
    ("object_rel_distance", RAW, "Answer:B. lamp", "B", 1.0),
    ("object_rel_distance", RAW, "Answer: B. lamp", "B", 0.0),  # the first token is empty
    ("object_rel_distance", "chair", "B", 0.0),
    ("object_rel_distance", "\nB\n", "B", 1.0),
    ("object_rel_distance", "B\nbecause", "B", 0.0),
    ("obj_appearance_order", "E", "E", 1.0),
    ("obj_appearance_order", RAW, "<think>I look at it.</think>\n<answer>C</answer>", "E", 0.0),
]
SPBENCH_SI = [
    ("object_abs_distance", "2.0", "2.4", 0.7),
    ("object_size_estimation", "120", "111", 0.9),
    ("object_rel_direction", "right-front", "C", 0.0),
    ("object_abs_distance", RAW, "1.3", "1.3", 1.0),
    ("object_size_estimation", RAW, "A. 45", "45", 0.0),  # "a" is 1
]
SPBENCH_MV = [
    ("object_counting", "2", "3", 0.4),
    ("object_abs_distance", "3.1", "2.9", 0.9),
    ("object_size_estimation", "200", "96", 0.0),
    ("object_rel_distance", "D", "B", 0.0),
    ("object_rel_direction", "B", "B", 1.0),
]
CV = [
    ("Count", "A", "(A)", 1.0),
    ("Relation", "b", "(B)", 1.0),  # any case, unlike the others
    ("Depth", "A. chair", "(A)", 1.0),
    ("Depth", "[C]", "(C)", 1.0),
    ("Distance", "B,", "(B)", 0.0),
    ("Distance", "B)", "(B)", 1.0),
    ("Distance", "E", "(E)", 0.0),  # A to D only are read
    ("Count", "(E)", "(E)", 1.0),  # so this is text equality
    ("Count", RAW, "The answer is (A)", "(A)", 0.0),
    ("Depth", "chair", "(A)", 0.0),
    ("Depth", "", "(B)", 0.0),
]
SPAR = [
    ("depth_prediction_oc", "1.5", "1.5", 1.0),
    ("depth_prediction_oc", "1.0 then 1.5", "1.5", 0.4),  # the first number
    ("depth_prediction_oc_mv", "1.0 then 1.5", "1.5", 1.0),  # the last
    ("depth_prediction_oo", "0.3", "0.0", 0.5),  # absolute error
    ("distance_prediction_oo", "no idea", "1.5", 0.0),
    ("distance_prediction_oo_mv", "no idea", "1.5", 0.0),
    ("distance_prediction_oo", "m^2 1.5", "1.5", 1.0),  # an exponent is no number
    ("obj_spatial_relation_oo", "A", "A", 1.0),
    ("obj_spatial_relation_oo", "a", "A", 1.0),
    ("spatial_imagination_oc", "Apple", "A", 1.0),  # begins with the letter
    ("spatial_imagination_oo", "", "B", 1.0),  # empty text is in every truth
    ("spatial_imagination_oo_mv", RAW, "", "B", 1.0),
    ("position_matching", "(B)", "B", 0.0),
    ("camera_motion_infer", "B)", "B", 1.0),
    ("distance_infer_center_oo_mv", RAW, "<think>..</think>B", "B", 0.0),
    ("distance_infer_center_oo", RAW, "Because A", "B", 1.0),
    ("view_change_infer", "move_right:0.5,rotate_left:30", "move_right:0.5,rotate_left:30", 1.0),
    (
        "view_change_infer",
        "move_right:0.4,rotate_left:30",
        "move_right:0.5,rotate_left:30",
        0.9199999999999999,
    ),
    ("view_change_infer", "move_left:0.5,rotate_right:30", "move_right:0.5,rotate_left:30", 0.6),
    ("view_change_infer", "move_forward:1", "move_right:0.5,rotate_left:30", 0.42000000000000004),
    ("view_change_infer", "I cannot tell", "move_right:0.5", 0.0),
    (
        "view_change_infer",
        "move_right: 0.5, rotate_left: 30",
        "move_right:0.5,rotate_left:30",
        0.8,
    ),  # " rotate_left"
    ("view_change_infer", "move_right:nan", "move_right:0.5", 0.8),
]
VIEWSPATIAL = [
    ("Camera perspective - Relative Direction", "A", "A. right", 1.0),
    ("Camera perspective - Relative Direction", "A. right", "A. right", 1.0),
    ("Person perspective - Relative Direction", "d", "D. right", 0.0),  # capitals only
    ("Person perspective - Object View Orientation", "(C)", "C. front", 0.0),
    ("Person perspective - Object View Orientation", "B)", "B. front", 0.0),
    ("Person perspective - Scene Simulation Relative Direction", RAW, "B", "B. back-left", 1.0),
    (
        "Person perspective - Scene Simulation Relative Direction",
        RAW,
        "<answer>B</answer>",
        "B. back-left",
        0.0,
    ),
]
TABLES = {
    "vsibench": VSI,
    "spbench-si": SPBENCH_SI,
    "spbench-mv": SPBENCH_MV,
    "cvbench": CV,
    "sparbench": SPAR,
    "viewspatial": VIEWSPATIAL,
}
VECTORS = [(name, row) for name, rows in TABLES.items() for row in rows]


def score(name, kind, completion, truth, scorer="spatialladder", thinking=True):
    row = {"question_type": kind, "completion": completion, "answer": truth}
    return next(evaluation.score_rows([row], BENCHES[name], scorer, thinking))["score"]


@pytest.mark.parametrize("name, vector", VECTORS)
def test_scores_equal_the_authors_to_the_bit(name, vector):
    """One changed matcher and our numbers no longer stand beside the paper's."""
    kind, *text, truth, expected = vector
    thinking = text[0] != RAW
    completion = (
        f"<think>I look at it.</think>\n<answer>{text[-1]}</answer>" if thinking else text[-1]
    )
    assert score(name, kind, completion, truth, thinking=thinking) == expected
    if name == "sparbench":  # its makers' matcher is the same
        assert score(name, kind, completion, truth, "official", thinking) == expected


@pytest.mark.parametrize(
    "completion, kind, truth, expected",
    [
        (
            "<think>x</think><answer>C</answer><answer>A</answer>",
            "route_planning",
            "C",
            1.0,
        ),  # the first answer counts
        (
            "<think>there is a table</think> 4",
            "object_counting",
            "4",
            0.0,
        ),  # without a tag all of it is read: "a" is 1
        ("<answer>4", "object_counting", "4", 0.0),
    ],
)  # a tag that is not closed leaves no answer
def test_which_text_a_benchmark_scores(completion, kind, truth, expected):
    assert score("vsibench", kind, completion, truth) == expected


@pytest.mark.parametrize(
    "kind, text, truth, expected",
    [
        ("object_counting", "4", "4", 1.0),
        ("object_counting", "4.", "4", 1.0),
        ("object_counting", "4 chairs", "4", 1.0),
        ("object_counting", "3 or 4", "4", 0.6),
        ("object_counting", "four", "4", 0.0),
        ("object_counting", "a 4", "4", 0.0),
        ("object_counting", "-4", "4", 0.0),
        ("object_abs_distance", "1e1", "10", 1.0),
        ("object_abs_distance", "1,200", "1200", 0.0),
        ("object_abs_distance", "nan", "10", 0.0),
        ("object_abs_distance", "1.5m", "1.5", 0.0),
        ("object_abs_distance", "", "1.5", 0.0),
        ("object_rel_distance", "B", "B", 1.0),
        ("object_rel_distance", "b. chair", "B", 1.0),
        ("object_rel_distance", "E. chair", "E", 1.0),
        ("object_rel_distance", "(B)", "B", 0.0),
        ("object_rel_distance", "Answer: B", "B", 0.0),
        ("object_rel_distance", "B, C", "B", 0.0),
    ],
)
def test_official_vsibench_reads_the_first_token_only(kind, text, truth, expected):
    """By hand from the makers' code: split(" ")[0].rstrip("."), then float() or equality."""
    assert score("vsibench", kind, text, truth, "official", thinking=False) == expected
    assert (
        score("vsibench", kind, f"<think>x</think><answer>{text}</answer>", truth, "official")
        == expected
    )


# ---------------------------------------------------------------------------------- aggregates


def aggregate(name, rows, scorer="spatialladder"):
    """overall and groups of rows (type or source, score)."""
    strata = {key: [s for k, s in rows if k == key] for key in sorted({key for key, _ in rows})}
    means = {key: float(np.mean(scores)) for key, scores in strata.items()}
    return BENCHES[name].scorers[scorer][1](
        means, {key: len(scores) for key, scores in strata.items()}
    )


SPAR_ROWS = [
    ("single_view", "depth_prediction_oc", 0.4),
    ("single_view", "depth_prediction_oc", 0.8),
    ("multi_view", "distance_prediction_oo_mv", 0.1),
    ("multi_view", "view_change_infer", 0.6),
    ("multi_view", "position_matching", 1.0),
    ("multi_view", "position_matching", 0.0),
    ("single_view", "obj_spatial_relation_oo", 1.0),
    ("single_view", "obj_spatial_relation_oo", 1.0),
    ("single_view", "obj_spatial_relation_oo", 0.0),
]
SI_ROWS = [
    ("object_abs_distance", 0.5),
    ("object_size_estimation", 0.7),
    ("object_size_estimation", 0.9),
    ("object_rel_distance", 1.0),
    ("object_rel_direction", 1.0),
    ("object_rel_direction", 0.0),
]
MV_ROWS = [
    ("object_counting", 0.5),
    ("object_abs_distance", 0.4),
    ("object_size_estimation", 0.9),
    ("object_rel_distance", 1.0),
    ("object_rel_direction", 0.0),
]
CV_ROWS = [
    ("ADE20K", 1.0),
    ("ADE20K", 0.0),
    ("ADE20K", 1.0),
    ("COCO", 1.0),
    ("Omni3D", 0.0),
    ("Omni3D", 1.0),
]
VIEW_ROWS = [
    ("Camera perspective - Relative Direction", 1.0),
    ("Camera perspective - Relative Direction", 0.0),
    ("Camera perspective - Object View Orientation", 1.0),
    ("Person perspective - Relative Direction", 0.0),
    ("Person perspective - Scene Simulation Relative Direction", 1.0),
    ("Person perspective - Scene Simulation Relative Direction", 1.0),
    ("Person perspective - Object View Orientation", 0.0),
]
AGGREGATES = [  # values made by running the authors' aggregations
    (
        "vsibench",
        [("object_counting", 1.0)],
        {"overall": 0.5, "NQ": 1.0, "MCQ": 0.0},
    ),  # a direction of 0 joins in
    ("spbench-si", SI_ROWS, {"overall": 0.7, "NQ": 0.65, "MCQ": 0.75}),
    ("spbench-mv", MV_ROWS, {"overall": 0.5599999999999999, "NQ": 0.6, "MCQ": 0.5}),
    ("cvbench", CV_ROWS, {"overall": 0.6666666666666666, "2D": 0.8333333333333333, "3D": 0.5}),
    ("cvbench", CV_ROWS[4:], {"overall": 0.5, "2D": None, "3D": 0.5}),
    (
        "viewspatial",
        VIEW_ROWS,
        {
            "overall": 0.5714285714285714,
            "camera": 0.6666666666666666,
            "person": 0.5,
            "scannet": 0.75,
            "coco": 0.3333333333333333,
        },
    ),
    (
        "sparbench",
        [row[1:] for row in SPAR_ROWS],
        {
            "overall": 0.5444444444444445,
            "Low": 0.4333333333333334,
            "Middle": 0.5333333333333333,
            "High": 0.6666666666666666,
        },
    ),
    (
        "sparbench",
        [row[1:] for row in SPAR_ROWS if row[0] == "multi_view"],
        {"overall": 0.42500000000000004, "Low": 0.1, "Middle": 0.5333333333333333, "High": None},
    ),
    (
        "sparbench",
        [row[1:] for row in SPAR_ROWS if row[0] == "single_view"],
        {"overall": 0.64, "Low": 0.6000000000000001, "Middle": None, "High": 0.6666666666666666},
    ),
]


@pytest.mark.parametrize("name, rows, expected", AGGREGATES)
def test_aggregates_equal_the_authors_to_the_bit(name, rows, expected):
    """A weighted mean for an unweighted one moves a headline by points."""
    assert aggregate(name, rows) == expected


def test_vsibench_is_the_mean_of_eight_types_with_the_directions_as_one():
    levels = [
        ("object_rel_direction_easy", 1.0),
        ("object_rel_direction_medium", 0.5),
        ("object_rel_direction_hard", 0.0),
    ]
    rest = [("route_planning", 0.25), ("object_rel_distance", 1.0), ("obj_appearance_order", 0.0)]
    numbers = [
        ("object_counting", 0.5),
        ("object_abs_distance", 0.5),
        ("object_size_estimation", 1.0),
        ("room_size_estimation", 0.0),
    ]
    rows = levels + [levels[0]] * 3 + rest + numbers  # more rows of a type change nothing
    for scorer in ("spatialladder", "official"):
        assert aggregate("vsibench", rows, scorer) == {
            "overall": 3.75 / 8,
            "NQ": 0.5,
            "MCQ": 1.75 / 4,
        }


def test_a_missing_direction_level_is_where_the_two_vsibench_scorers_differ():
    """spatialladder: the direction is 0, easy is lost, hard a type of its own.

    official: the level counts 0.
    """
    rows = [
        ("object_rel_direction_easy", 1.0),
        ("object_rel_direction_hard", 0.5),
        ("object_counting", 1.0),
    ]
    assert aggregate("vsibench", rows) == {"overall": 0.5, "NQ": 1.0, "MCQ": 0.25}
    assert aggregate("vsibench", rows, "official") == {"overall": 0.75, "NQ": 1.0, "MCQ": 0.5}


def test_official_sparbench_is_unweighted_and_loses_view_changes_in_middle():
    expected = {
        "overall": np.mean([0.6, 0.1, 0.6, 0.5, 2 / 3]),
        "Low": 0.35,
        "Middle": 0.5,
        "High": 2 / 3,
    }
    assert aggregate("sparbench", [row[1:] for row in SPAR_ROWS], "official") == pytest.approx(
        expected, abs=1e-15
    )


def test_each_type_is_in_the_groups_of_its_makers():
    """Groups are patterns: one that caught a neighbour would move a mean without a sign."""
    members = {
        "vsibench": {
            "NQ": [
                "object_abs_distance",
                "object_counting",
                "object_size_estimation",
                "room_size_estimation",
            ],
            "MCQ": [
                "obj_appearance_order",
                "object_rel_direction",
                "object_rel_distance",
                "route_planning",
            ],
        },
        "sparbench": {
            "Low": [
                f"{what}_prediction_{of}{mv}"
                for what in ("depth", "distance")
                for of in ("oc", "oo")
                for mv in ("", "_mv")
            ],
            "Middle": ["camera_motion_infer", "position_matching", "view_change_infer"],
            "High": [
                "distance_infer_center_oo",
                "distance_infer_center_oo_mv",
                "obj_spatial_relation_oc_mv",
                "obj_spatial_relation_oo",
                "obj_spatial_relation_oo_mv",
                "spatial_imagination_oc",
                "spatial_imagination_oc_mv",
                "spatial_imagination_oo",
                "spatial_imagination_oo_mv",
            ],
        },
        "viewspatial": {
            "camera": [VIEW_ROWS[n][0] for n in (0, 2)],
            "person": [VIEW_ROWS[n][0] for n in (3, 4, 6)],
            "scannet": [VIEW_ROWS[n][0] for n in (0, 4)],
            "coco": [VIEW_ROWS[n][0] for n in (2, 3, 6)],
        },
    }
    for name, groups in members.items():
        types = sorted({kind for kinds in groups.values() for kind in kinds})
        for kind in types:
            means = aggregate(name, [(other, float(other == kind)) for other in types])
            assert {g for g in groups if means[g] > 0} == {
                g for g, kinds in groups.items() if kind in kinds
            }


# ---------------------------------------------------------------------------------- readers


def jpg(color=(200, 30, 30)):
    file = io.BytesIO()
    Image.new("RGB", (64, 48), color).save(file, "JPEG")
    return file.getvalue()


def write_parquet(path, rows):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_mp4(path, frames=8):
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(frames):
            frame = av.VideoFrame.from_ndarray(
                np.full((48, 64, 3), 20 * n, np.uint8), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_file(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_vsibench(root):
    row = {
        "dataset": "scannet",
        "scene_name": "scene0050_00",
        "question": "How many?",
        "options": None,
    }
    write_parquet(
        root / "test-00000-of-00001.parquet",
        [
            row | {"id": 0, "question_type": "object_counting", "ground_truth": "4"},
            row
            | {
                "id": 1,
                "question_type": "object_rel_distance",
                "ground_truth": "A",
                "options": ["A. sofa", "B. lamp"],
            },
            row
            | {
                "id": 7,
                "question_type": "object_rel_direction_easy",
                "ground_truth": "B",
                "options": ["A. left", "B. right"],
                "dataset": "arkitscenes",
                "scene_name": "41069025",
            },
        ],
    )
    write_mp4(root / "scannet" / "scene0050_00.mp4")
    write_mp4(root / "arkitscenes" / "41069025.mp4")


def write_spbench(root, name, images, nested=""):
    row = {
        "dataset": "scannet",
        "scene_name": "scene0011_00",
        "question": "How long?",
        "images": images,
    }
    write_parquet(
        root / f"{name}.parquet",
        [
            row
            | {
                "id": 1,
                "question_type": "object_size_estimation",
                "ground_truth": "120",
                "options": None,
            },
            row
            | {
                "id": 2,
                "question_type": "object_rel_direction",
                "ground_truth": "C",
                "options": ["A. a", "B. b", "C. c", "D. d"],
            },
        ],
    )
    for image in images:
        write_file(root / nested / "scene0011_00" / image, jpg())


def write_cvbench(root):
    row = {
        "prompt": "",
        "filename": "",
        "choices": ["3", "2", "1", "0"],
        "question": "How many organs?",
        "image": {"bytes": jpg(), "path": None},
        "type": "2D",
        "task": "Count",
    }
    write_parquet(
        root / "test_2d.parquet",
        [
            row | {"idx": 0, "answer": "(C)", "source": "ADE20K"},
            row | {"idx": 1, "answer": "(A)", "source": "COCO"},
        ],
    )
    write_parquet(
        root / "test_3d.parquet",
        [
            row
            | {
                "idx": 2,
                "answer": "(B)",
                "source": "Omni3D",
                "type": "3D",
                "task": "Depth",
                "choices": ["bed", "lamp"],
            }
        ],
    )


SPAR_CHOICE = (
    "Where is the bed?\nPick one of these.\nA. left, above, \nB. right, , front\n"
    "Your answer is A or B."
)


def write_sparbench(root):
    def row(number, task, img_type, question, answer, images):
        return {
            "id": number,
            "img_type": img_type,
            "format_type": "fill",
            "task": task,
            "source": "scannet",
            "image": [{"bytes": jpg(), "path": None}] * images,
            "question": question,
            "answer": answer,
        }

    write_parquet(
        root / "data" / "test-00000-of-00002.parquet",
        [
            row(3, "depth_prediction_oc", "single_view", "How deep is it?", "1.5", 1),
            row(4, "spatial_imagination_oc_mv", "multi_view", SPAR_CHOICE, "B", 3),
        ],
    )
    write_parquet(
        root / "data" / "test-00001-of-00002.parquet",
        [
            row(
                5,
                "view_change_infer",
                "multi_view",
                "How did the camera move?",
                "move_right:0.5",
                2,
            ),
            row(6, "camera_motion_infer", "multi_view", SPAR_CHOICE, "A", 2),
        ],
    )


def write_viewspatial(root):
    views = [
        "ViewSpatial-Bench/scannetv2_val/scene0011_00/original_images/280.jpg",
        "ViewSpatial-Bench/val2017/000000001.jpg",
    ]
    write_file(
        root / "ViewSpatial-Bench.json",
        json.dumps(
            [
                {
                    "question_type": "Camera perspective - Relative Direction",
                    "image_path": views[:1],
                    "question": "Where?",
                    "answer": "A. right",
                    "choices": "A. right\nB. left\nC. front\nD. back",
                },
                {
                    "question_type": "Person perspective - Object View Orientation",
                    "image_path": views,
                    "question": "Where?",
                    "answer": "B. left",
                    "choices": "A. right\nB. left",
                },
            ]
        ).encode(),
    )
    for view in views:
        write_file(root / view.removeprefix("ViewSpatial-Bench/"), jpg())


LAYOUTS = {  # name -> (writer, completions, headline by hand)
    "vsibench": (
        write_vsibench,
        ["3", "A. sofa", "B"],
        0.6 / 3 + 1 / 3 + 0,
    ),  # one direction level of three: 0
    "spbench-si": (
        lambda root: write_spbench(root, "SPBench-SI", ["1760.jpg"], "images"),
        ["120", "A"],
        0.5,
    ),
    "spbench-mv": (
        lambda root: write_spbench(root, "SPBench-MV", [f"{n}.jpg" for n in range(8)]),
        ["96", "C"],
        0.8,
    ),
    "cvbench": (write_cvbench, ["(C)", "B", "b"], ((1 + 0) / 2 + 1) / 2),
    "sparbench": (write_sparbench, ["1.0 m", "B", "move_right:0.5", "B"], (0.4 + 1 + 1 + 0) / 4),
    "viewspatial": (write_viewspatial, ["A", "b"], 0.5),
}


def rows_of(samples, extras, completions):
    return [
        {
            "id": s.id,
            "where": s.where,
            "question_type": s.question_type,
            "answer": s.answer,
            "completion": f"<think>x</think><answer>{text}</answer>",
        }
        | extra
        for s, extra, text in zip(samples, extras, completions, strict=True)
    ]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_benchmark_in_its_distributed_layout_reaches_its_headline(name, tmp_path):
    """Files as on the hub -> samples -> scores -> headline, which is computed by hand above."""
    write, completions, headline = LAYOUTS[name]
    write(tmp_path)
    samples, extras = evaluation.read_bench(name, tmp_path)
    rows = list(evaluation.score_rows(rows_of(samples, extras, completions), BENCHES[name]))
    rows = list(evaluation.add_baselines(rows, samples, BENCHES[name].scorers["spatialladder"][0]))
    scores = evaluation.summarize(rows, BENCHES[name])
    assert scores["overall"] == pytest.approx(headline, abs=1e-12) and scores["n"] == len(samples)
    assert scores["low"] <= scores["overall"] <= scores["high"] and scores["well_formed"] == 1.0
    text = evaluation.table(name, scores, BENCHES[name])
    ours, base = f"{100 * headline:.1f}", str(BENCHES[name].paper["overall"][0])
    assert ours in text and base in text
    assert all(kind in text for kind in scores["types"])


def test_the_pictures_of_a_benchmark_open(tmp_path):
    """Paths exist, bytes are whole files: what the model will be given."""
    from films import read_video
    from pictures import open_picture

    for name, (write, *_) in LAYOUTS.items():
        root = tmp_path / name
        write(root)
        for media in (media for s in evaluation.read_bench(name, root)[0] for media in s.media):
            pictures = (
                read_video(media.source, 4, None)[0]
                if media.kind == "video"
                else [open_picture(media.source)]
            )
            assert all(picture.size == (64, 48) for picture in pictures)


def test_vsibench_rows(tmp_path):
    write_vsibench(tmp_path)
    first, second, third = evaluation.read_bench("vsibench", tmp_path)[0]
    assert first == Sample(
        f"{tmp_path}/test-00000-of-00001.parquet:1",
        "0",
        "How many?",
        "object_counting",
        "4",
        (),
        (Media("video", str(tmp_path / "scannet" / "scene0050_00.mp4")),),
    )
    assert second.options == ("A. sofa", "B. lamp") and third.id == "7"
    assert third.media[0].source.endswith("arkitscenes/41069025.mp4")


def test_spar_options_are_taken_out_of_the_question(tmp_path):
    """They would stand in the prompt twice, and without them chance is unknown."""
    write_sparbench(tmp_path)
    (depth, choice, view, motion), extras = evaluation.read_bench("sparbench", tmp_path)
    assert choice.question == "Where is the bed?\nPick one of these.\nYour answer is A or B."
    assert choice.options == ("A. left, above, ", "B. right, , front") and len(choice.media) == 3
    assert motion.question.startswith(choice.question) and "0 to 1000" in motion.question
    assert depth.options == view.options == () and extras[0] == {}


def test_cv_options_have_the_letters_of_the_answer(tmp_path):
    write_cvbench(tmp_path)
    samples, extras = evaluation.read_bench("cvbench", tmp_path)
    assert samples[0].options == ("(A) 3", "(B) 2", "(C) 1", "(D) 0") and samples[2].options == (
        "(A) bed",
        "(B) lamp",
    )
    assert [extra["source"] for extra in extras] == ["ADE20K", "COCO", "Omni3D"]


def test_reading_decodes_nothing(tmp_path, monkeypatch):
    """5,130 questions are listed before the first of 288 videos is opened."""
    for name, (write, *_) in LAYOUTS.items():
        write(tmp_path / name)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("a picture was opened"))
    monkeypatch.setitem(sys.modules, "decord", None)
    for name in LAYOUTS:
        assert evaluation.read_bench(name, tmp_path / name)[0]


@pytest.mark.parametrize(
    "name, missing, words",
    [
        ("vsibench", "test-00000-of-00001.parquet", ["nyu-visionx/VSI-Bench"]),
        ("vsibench", "arkitscenes/41069025.mp4", ["parquet:3", "nyu-visionx/VSI-Bench"]),
        ("spbench-si", "images/scene0011_00/1760.jpg", ["parquet:1", "hongxingli/SPBench"]),
        ("cvbench", "test_3d.parquet", ["nyu-visionx/CV-Bench"]),
        ("viewspatial", "val2017/000000001.jpg", ["json:2", "lidingm/ViewSpatial-Bench"]),
    ],
)
def test_a_missing_file_is_one_line_with_its_name_and_origin(name, missing, words, tmp_path):
    """The authors skip such rows: the score is then over fewer questions without a word."""
    LAYOUTS[name][0](tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError) as error:
        evaluation.read_bench(name, tmp_path)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in [missing.split("/")[-1], *words])


def test_a_missing_column_a_broken_file_and_a_missing_pyarrow_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "test_3d.parquet").touch()
    write_parquet(tmp_path / "test_2d.parquet", [{"idx": 0, "question": "?"}])
    with pytest.raises(UserError, match=r"parquet:1: task is None, expected str"):
        evaluation.read_bench("cvbench", tmp_path)
    write_file(tmp_path / "test_2d.parquet", b"not parquet")
    with pytest.raises(UserError, match=r"test_2d.parquet: not a readable parquet file"):
        evaluation.read_bench("cvbench", tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow \(pip install pyarrow\)"):
        evaluation.read_bench("cvbench", tmp_path)


def tables(root, monkeypatch):
    """{file name: its rows}: what read_table gives from here on, for a test to change."""
    held = {}
    original = evaluation.read_table

    def read_table(path):
        if path.name not in held:
            held[path.name] = original(path)
        return held[path.name]

    monkeypatch.setattr(evaluation, "read_table", read_table)
    return held


JUNK = (
    None,
    "",
    5,
    1.5,
    True,
    [],
    {},
    ["x"],
    [5],
    {"x": 1},
    b"x",
    "x" * 999,
    "a\nb",
    "\0",
    "/",
    "..",
)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_row_with_junk_is_scored_or_refused_by_its_place(name, tmp_path, monkeypatch):
    """Each column of the first row in turn: missing, or of another kind."""
    write, completions, _ = LAYOUTS[name]
    write(tmp_path)
    held = tables(tmp_path, monkeypatch)
    samples, extras = evaluation.read_bench(name, tmp_path)
    file = Path(samples[0].where).name.split(":")[0]
    good = held[file][0]
    changes = [good | {key: junk} for key in good for junk in JUNK]
    changes += [{key: good[key] for key in good if key != left} for left in good]
    refused = 0
    for row in changes:
        held[file][0] = row
        try:
            samples, extras = evaluation.read_bench(name, tmp_path)
        except UserError as error:
            refused += 1
            message = str(error)
            assert f"{file}:1: " in message and "\n" not in message
            assert len(message.replace(str(tmp_path), "")) < 300
        else:
            rows = rows_of(samples, extras, completions)
            rows = list(evaluation.score_rows(rows, BENCHES[name]))
            rows = evaluation.add_baselines(
                rows, samples, BENCHES[name].scorers["spatialladder"][0]
            )
            evaluation.summarize(list(rows), BENCHES[name])
    assert refused > len(changes) / 4


ONE_VIEW = {
    "question_type": "Camera perspective - Relative Direction",
    "image_path": ["ViewSpatial-Bench/val2017/x[1]*.jpg"],
    "question": "Where?",
    "answer": "A. right",
    "choices": "A. right\nB. left",
}
ABSOLUTE = "ABSOLUTE"  # of the picture's path


@pytest.mark.parametrize(
    "content, message",
    [
        ([ONE_VIEW], None),  # brackets and stars in a name are no pattern
        ([ONE_VIEW | {"image_path": [ABSOLUTE]}], None),
        ([ONE_VIEW | {"image_path": [""]}], r"json:1: viewspatial: no '' in"),
        ([ONE_VIEW | {"image_path": ["val2017"]}], r"json:1: viewspatial: no 'val2017' in"),
        ([ONE_VIEW | {"image_path": ["*"]}], r"json:1: viewspatial: no '\*' in"),
        (
            [ONE_VIEW | {"image_path": "val2017/a.jpg"}],
            r"json:1: image_path is 'val2017/a.jpg', exp",
        ),
        (
            [ONE_VIEW, ONE_VIEW | {"choices": ["A. left"]}],
            r"json:2: choices is \['A. left'\], expe",
        ),
        ([ONE_VIEW, ONE_VIEW | {"answer": ""}], r"json:2: answer is '', expected"),
        ([ONE_VIEW, 5], r"json:2: expected an object, found int"),
        ({"rows": [ONE_VIEW]}, r"json:1: question is None, expected str"),
        ([], r"no rows in ViewSpatial-Bench.json"),
    ],
    ids=range(11),
)
def test_rows_of_a_json_list(content, message, tmp_path):
    folder = tmp_path / "any [name]*"
    picture = folder / "val2017" / "x[1]*.jpg"
    write_file(picture, jpg())
    text = json.dumps(content).replace(ABSOLUTE, str(picture))
    write_file(folder / "ViewSpatial-Bench.json", text.encode())
    if message is None:
        [sample] = evaluation.read_bench("viewspatial", folder)[0]
        assert sample.media == (Media("image", str(picture)),) and sample.id == "1"
        return
    with pytest.raises(UserError, match=message):
        evaluation.read_bench("viewspatial", folder)


def test_a_prediction_may_leave_its_answer_null(tmp_path):
    """As an engine's table with a column for it writes it."""
    sample = Sample("b:1", "7", "How many?", "object count", "3")
    row = {"id": 7, "question_type": "object count", "completion": "3", "answer": None}
    write_file(tmp_path / "p.jsonl", json.dumps(row).encode())
    [answer] = evaluation.given_answers(tmp_path / "p.jsonl", [sample], [sample])
    assert (answer["answer"], answer["completion"], answer["skipped"]) == ("3", "3", False)


@pytest.mark.parametrize("key", ["id", "question_type", "completion", "answer"])
@pytest.mark.parametrize("junk", [j for j in JUNK if not isinstance(j, bytes)], ids=repr)
def test_a_prediction_with_junk_is_read_or_refused_by_its_place(key, junk, tmp_path):
    sample = Sample("b:1", "7", "How many?", "object count", "3")
    row = {"id": 7, "question_type": "object count", "completion": "3", "answer": "3"}
    write_file(tmp_path / "p.jsonl", b"\n" + json.dumps(row | {key: junk}).encode())
    try:
        evaluation.given_answers(tmp_path / "p.jsonl", [sample], [sample])
    except UserError as error:
        assert str(error).startswith(f"{tmp_path / 'p.jsonl'}:2: ") and "\n" not in str(error)
        assert len(str(error).replace(str(tmp_path), "")) < 300
    else:
        assert key == "completion" or (key, junk) == ("answer", None)


# ------------------------------------------------------------------------- our rows and baselines


def box(*corners, label="bed"):
    return {"bbox_2d": list(corners), "label": label}


def sample(question, kind, answer, options=()):
    return Sample("f:1", "1", question, kind, answer, options)


def test_our_rows_are_scored_by_the_training_reward():
    """Training and evaluation must agree on what is right: the LAST answer, the strict parser."""
    rows = [
        {"question_type": kind, "completion": text, "answer": truth, "where": "f:1"}
        for kind, text, truth in (
            ("relative distance", "<answer>A</answer><answer>(B) chair</answer>", "B"),
            ("object count", "a 3", "3"),
            ("object count", "<answer>3</answer>", "4"),
            ("localization", json.dumps([box(0, 0, 10, 5)]), [box(0, 0, 10, 10)]),
            ("localization", "no boxes", [box(0, 0, 10, 10)]),
        )
    ]
    scored = list(evaluation.score_rows(rows, OURS, thinking=False))
    assert [row["score"] for row in scored] == [1.0, 0.0, 0.6, 0.5, 0.0]
    assert [row["prediction"] for row in scored] == [
        "(B) chair",
        "a 3",
        "3",
        [box(0, 0, 10, 5)],
        None,
    ]
    scores = evaluation.summarize(scored, OURS)
    assert scores["overall"] == pytest.approx((1.0 + 0.3) / 2)
    assert set(scores["types"]) == {"relative distance", "object count"}
    expected = {"n": 2, "mean_iou": 0.25, "valid_json": 0.5, "precision": 0.5, "recall": 0.5}
    assert scores["localization"] | expected == scores["localization"]
    assert "localization" in evaluation.table("rooms", scores, OURS)
    assert evaluation.summarize(scored[3:], OURS)["overall"] == 0.25


def test_blind_baseline_by_hand():
    """Numbers: 4 is best in mean MRA, 1 is as frequent.

    Choices: the text most often right, whatever its letter.
    """
    count = [
        sample("How many beds?", "object count", answer)
        for answer in ("1", "1", "4", "4", "5", "3")
    ]
    near = [
        sample("Nearest?", "relative distance", "A", ("A. sofa", "B. lamp")),
        sample("Nearest?", "relative distance", "B", ("A. bed", "B. sofa")),
        sample("Nearest?", "relative distance", "B", ("A. sofa", "B. bed")),
    ]
    asked = [
        count[0],
        sample("How many lamps?", "object count", "9"),
        sample("Nearest?", "relative distance", "A", ("A. lamp", "B. sofa")),
        sample("Nearest?", "relative distance", "A", ("A. bed", "B. lamp")),
        sample("Far?", "room size", "9"),
        sample("First?", "appearance order", "B", ("A. x", "B. y")),
    ]
    assert evaluation.blind_baseline(count + near, asked) == ["4", "4", "B", "A", "None", "A"]


def test_blind_baseline_reads_letters_as_rows_are_read():
    """Any option that data.letters_of accepts: it ended in a traceback where there is no dot."""
    near = sample("Nearest?", "relative distance", "B", ("(A) bed", "B sofa"))
    asked = sample("Nearest?", "relative distance", "A", ("A sofa", "(B) bed"))
    assert evaluation.blind_baseline([near], [near, asked]) == ["B", "A"]


@pytest.mark.parametrize("seed", range(5))
def test_blind_baseline_is_the_best_single_answer(seed):
    """An oracle: try every training answer on the training answers."""
    truths = np.random.default_rng(seed).integers(1, 30, 40).tolist()
    train = [sample("Q", "object size", str(truth)) for truth in truths]
    best = max(
        np.mean([mean_relative_accuracy(guess, truth) for truth in truths]) for guess in truths
    )
    [answer] = evaluation.blind_baseline(train, train[:1])
    assert np.mean(
        [mean_relative_accuracy(float(answer), truth) for truth in truths]
    ) == pytest.approx(best)


def test_baselines_are_paired_with_rows():
    samples = [
        sample("Q", "object count", "2"),
        sample("Q", "object count", "2"),
        sample("Q", "object count", "4"),
        sample("N", "relative distance", "B", ("A. x", "B. y", "C. z", "D. w")),
        Sample("f:1", "1", "L", "localization", (box(0, 0, 10, 10), box(10, 0, 20, 10))),
    ]
    train = [
        sample("Q", "object count", "4"),
        sample("N", "relative distance", "B", ("A. y", "B. x")),
        sample("L", "object count", "9"),  # the localization rows share their questions with others
        Sample("f:1", "1", "L", "localization", (box(0, 0, 10, 5), box(0, 0, 10, 15))),
    ]
    rows = [
        {
            "question_type": s.question_type,
            "answer": s.answer,
            "completion": "",
            "prediction": None,
            "score": 0.0,
        }
        for s in samples
    ]
    match = OURS.scorers["spatialladder"][0]
    rows = list(evaluation.add_baselines(rows, samples, match, train))
    assert [row.get("chance") for row in rows] == [None, None, None, 0.25, None]
    assert [row["blind"] for row in rows] == [
        0.0,
        0.0,
        1.0,
        0.0,
        0.5,
    ]  # the mean box is (0, 0, 10, 10)
    types = evaluation.summarize(rows, OURS)["types"]
    assert (
        types["object count"]["blind"] == pytest.approx(1 / 3)
        and types["relative distance"]["chance"] == 0.25
    )
    assert evaluation.summarize(rows, OURS)["localization"]["blind"] == 0.5
    assert [row.get("blind") for row in evaluation.add_baselines(rows[:1], samples[:1], match)] == [
        None
    ]


def test_bootstrap_interval():
    """Near the normal interval for many scores; a seed repeats it; a headline's from its strata."""
    scores = np.random.default_rng(0).random(4000)
    low, high = evaluation.bootstrap_interval(scores, seed=1)
    half = 1.96 * scores.std() / 4000**0.5
    assert (low, high) == pytest.approx(
        (scores.mean() - half, scores.mean() + half), abs=0.1 * half
    )
    assert (
        (low, high)
        == evaluation.bootstrap_interval(scores, seed=1)
        != evaluation.bootstrap_interval(scores, seed=2)
    )
    strata = {"object_counting": [0.5] * 9, "object_rel_direction": [1.0]}
    assert evaluation.bootstrap_interval(strata, 0, evaluation.vsi_means) == (0.75, 0.75)


def test_the_papers_means_are_those_of_its_parts():
    """A misread number would be laid beside ours.

    VSI and SPBench: 4 + 4, 2 + 2 and 3 + 2 types; CV: 2D and 3D; SPAR: 8 + 3 + 9 tasks;
    ViewSpatial: 2,769 and 2,943 rows.
    """
    weights = {
        "vsibench": (4, 4),
        "spbench-si": (2, 2),
        "spbench-mv": (3, 2),
        "cvbench": (1, 1),
        "sparbench": (8, 3, 9),
        "viewspatial": (2769, 2943),
    }
    for name, bench in BENCHES.items():
        for model in (0, 1):
            overall, *parts = (values[model] for values in bench.paper.values())
            assert np.average(parts, weights=weights[name]) == pytest.approx(overall, abs=0.11), (
                name,
                model,
            )
    in_domain = [
        BENCHES[name].paper["overall"][0] for name in ("vsibench", "spbench-si", "spbench-mv")
    ]
    assert round(float(np.mean(in_domain)), 1) == 35.4
