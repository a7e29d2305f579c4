"""Pictures as codes (more/pictures.py), and the tasks of more/tasks.py that show them or err."""

import json
import random
import re

import numpy as np
import pytest

from more import pictures
from more.tasks import GeneralPoints, Scene
from rewards import BadInput, make_task


def test_codes_are_the_nearest_of_the_table():
    """argmin_c |patch - table[c]|^2, whose |patch|^2 is left out."""
    rng = np.random.default_rng(0)
    table, vectors = rng.normal(size=(32, 192)), rng.normal(size=(50, 192))
    distances = ((vectors[:, None] - table) ** 2).sum(2)
    assert (pictures.nearest(vectors, table) == distances.argmin(1)).all()


def test_patches_are_read_by_rows():
    image = np.zeros((24, 16, 3))
    image[8:16, 8:16] = 1.0  # right one of the second row
    assert pictures.patches(image).sum(1).tolist() == [0, 0, 0, 192, 0, 0]


def test_kmeans_finds_clusters():
    rng = np.random.default_rng(0)
    centres = 10 * rng.normal(size=(32, 192))
    vectors = centres.repeat(20, 0) + 0.01 * rng.normal(size=(640, 192))
    table = pictures.fit(rng.permutation(vectors), rng, starts=5)
    nearest = ((vectors - table[pictures.nearest(vectors, table)]) ** 2).mean()
    assert nearest < 0.25 * ((vectors - vectors.mean(0)) ** 2).mean()


@pytest.mark.parametrize("kind, make", [("cards", "random_card"), ("scenes", "random_scene")])
def test_the_codes_tell_what_is_seen(kind, make):
    """Ranks and colours, things: at least 97 % (less the noise of 500 pictures), in many forms."""
    rng = np.random.default_rng(1)
    right, forms = pictures.recognition(getattr(pictures, make), pictures.tables()[kind], rng)
    assert right >= 0.96 and forms > 1.5


def test_a_picture_is_the_same_again_and_another_for_each_problem():
    task = make_task("generalpoints:images=1")
    problem = task.problem("train", 0, 0)
    assert problem == task.problem("train", 0, 0)
    text = task.compact(problem)
    assert text == task.compact(problem)
    assert re.fullmatch(r"R10\|(<reserved_\d+>){18}=\d+<think>", text)
    again = {task.compact(problem | {"picture": i}) for i in range(5)}
    assert len(again) == 5


def test_pictures_leave_the_hands_as_they_are():
    plain, seen = make_task("generalpoints"), make_task("generalpoints:images=1,suits=red")
    for i in range(50):
        problem = seen.problem("train", 3, i)
        assert {"hearts", "diamonds"} >= set(problem.pop("suits")) and problem.pop("picture")
        assert problem == plain.problem("train", 3, i)


def test_hands_to_read_have_all_suits():
    task = GeneralPoints(images=True, suits="black", basics=1.0)
    problems = [task.problem("train", 0, i) for i in range(40)]
    read = [problem["suits"] for problem in problems if problem["kind"] == "read"]
    assert len(set(sum(read, []))) == 4


CELLS = "ro .. gs .. .. bo .. .. .. .. .. .. .. rt .. gx".split()  # a red and a blue circle, ...


ASKED = "nr2 no2 nx1 ny0 fsg for lrt lgx ly-".split()


@pytest.mark.parametrize("asked, value", [(x[:2], x[2]) for x in ASKED])
def test_what_is_asked_of_a_scene(asked, value):
    assert Scene().value(CELLS, asked) == value


def test_one_option_is_right():
    task = make_task("scene")
    for i in range(100):
        problem = task.problem("train", 0, i)
        gold = task.value(problem["cells"], problem["asked"])
        assert problem["options"].count(gold) == 1 and len(set(problem["options"])) == 4
        for option in problem["options"]:
            text = f"{gold}</think><answer>{option}</answer>"
            assert task.score(text, problem)["correct"] == (option == gold)


def test_an_expansion_reads_one_record_and_concludes_of_one():
    task, problem = Scene(), {"cells": CELLS, "asked": "nr", "options": ["1", "2", "0", "3"]}
    other = ["rx"] * 3 + [".."] * 13
    tally = "ror1..r1gsr1..r1..r1bor1..r1..r1..r1..r1..r1..r1..r1rtr2..r2gxr2"
    assert task.expand(problem, CELLS, CELLS) == f"wait{tally}\n2</think><answer>2</answer>"
    assert task.expand(problem, other, other).endswith("..r3\n3</think><answer>3</answer>")
    swapped = task.expand(problem, other, CELLS)
    assert swapped == f"wait{task.tally(other, 'nr')}\n2</think><answer>2</answer>"


def test_a_wrong_guess_put_right():
    task, problem = Scene(), {"cells": CELLS, "asked": "nr", "options": ["1", "2", "0", "3"]}
    expansion = task.expand(problem, CELLS, CELLS)
    cases = {"1" + expansion: (0, 1, 1), "2" + expansion: (1, 1, 0)}
    cases["2</think><answer>2</answer>"] = (1, 0, 0)
    cases["1</think><answer>1</answer>"] = (0, 0, 0)
    for text, marks in cases.items():
        assert tuple(task.describe(text, problem).values()) == marks


def test_a_picture_is_tallied_when_that_is_asked():
    task = make_task("scene:basics=1")
    problems = [task.problem("train", 0, i) for i in range(40)]
    assert {kind for kind, _ in (p["asked"] for p in problems)} == set("nfl")
    problem = problems[0] | {"cells": CELLS, "asked": "lr"}
    assert problem["options"] == [] and task.compact(problem).endswith(">lr?   <think>")
    trace = task.trace(problem, random.Random(0))
    assert task.score(trace, problem)["correct"]
    thought, _, rest = trace.partition("\n")
    assert thought.startswith("?waitroro..rogsro..ro..roboro") and thought.endswith("rtrt..rtgxrt")
    assert rest == "t</think><answer>t</answer>"


@pytest.mark.parametrize("task", ["scene", "generalpoints:images=1"])
def test_codes_are_no_words_of_a_large_model(task):
    task = make_task(task)
    with pytest.raises(BadInput, match="a tiny model alone"):
        task.question(task.problem("test", 0, 0))


def test_routes_in_the_other_space():
    plain, both = make_task("navigation"), make_task("navigation:other=0.2")
    spaces = []
    for i in range(200):
        problem = both.problem("train", 0, i)
        spaces.append(problem.pop("space"))
        assert problem == {k: v for k, v in plain.problem("train", 0, i).items() if k != "space"}
        assert both.problem("test", 0, i)["space"] == "absolute"
    assert 20 < spaces.count("relative") < 60


def test_turns_are_counted_without_the_moves():
    task = make_task("navigation")
    problem = {"start": 0, "legs": [[90, 2, 1, 6], [0, 1, 5, 2]], "space": "absolute"}
    assert task.actions(problem)[::3] == ["turn_direction(east)", "turn_direction(north)"]
    text = "</think><answer>e f f e f !</answer>"
    assert task.describe(text, problem) == {"right_actions": 5 / 6, "right_turns": 1 / 2}
    assert task.score(text, problem)["reward"] == 5 / 6
    assert task.describe("nothing", problem) == {"right_actions": 0, "right_turns": 0}


NOISY = "more/tasks.py:NoisyMultiplication"


def test_a_fixed_share_of_golds_is_wrong():
    """By the problem alone: the same in every epoch, stream and process; held-out ones are right."""
    task, clean = make_task(f"{NOISY}:noise=0.3"), make_task("multiplication")
    wrong = []
    for i in range(400):
        problem = task.problem("train", 5, i)
        product = problem["a"] * problem["b"]
        right = task.score(f"</think><answer>{product}</answer>", problem)["correct"]
        wrong.append("scored_as" in problem and not right)
        assert {name: problem[name] for name in "ab"} == clean.problem("train", 5, i)
        assert "scored_as" not in task.problem("test", 5, i)
    assert 90 < sum(wrong) < 150


@pytest.mark.parametrize("a, b, wrong", [(39, 79, 39 * 70), (9, 35, 9 * 30), (9, 40, 9 * 50)])
def test_a_plausible_mistake(a, b, wrong):
    other = make_task(NOISY).mistake({"a": a, "b": b})
    assert other["a"] * other["b"] == wrong


def test_what_a_filter_left_is_all_there_is(tmp_path):
    rows = [{"a": 3, "b": 5}, {"a": 4, "b": 5, "scored_as": {"a": 4, "b": 6}}]
    (tmp_path / "kept.json").write_text(json.dumps(rows))
    task = make_task(f"{NOISY}:kept={tmp_path / 'kept.json'}")
    assert [task.problem("train", 0, i) for i in range(3)] == [*rows, rows[0]]
    assert task.score("</think><answer>24</answer>", rows[1])["correct"]
    assert not task.score("</think><answer>20</answer>", rows[1])["correct"]


@pytest.mark.parametrize(
    "task, words",
    [
        (f"{NOISY}:noise=2", "noise is a share"),
        ("more/tasks.py:NoisyGSM8K:near=1,data=FILE", "near needs a task that knows its mistakes"),
        (f"{NOISY}:kept=nowhere.json", "nowhere.json"),
        ("generalpoints:suits=pink", "suits are black, red or both"),
        ("scene:basics=2", "basics is a share"),
        ("navigation:other=-1", "basics and other 0 to 1"),
    ],
)
def test_bad_knobs(task, words, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    with pytest.raises(BadInput, match=words):
        make_task(task.replace("FILE", str(tmp_path / "rows.jsonl")))
