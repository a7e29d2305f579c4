"""more/traces.py: selection as the references do it, damage, what is kept; its command line.

The commands of the pages are in test_readme.py.
"""

import doctest
import json
import os
import re
import signal
import sys
import threading
from pathlib import Path
from random import Random

import pytest
from conftest import ThreadRanks, lines_of, nothing
from test_rewards import write

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "more")]
import traces  # noqa: E402

import rewards  # noqa: E402
import sft  # noqa: E402
from rewards import BadInput  # noqa: E402

FOLDER = Path(os.environ.get("VECTORS") or Path(__file__).parent / "vectors")
PATH = FOLDER / "sft_data.json"
VECTORS = json.loads(PATH.read_text(encoding="utf-8")) if PATH.is_file() else {}
SELECTION = VECTORS.get("selection", {"s1": None, "s1_length_weights": [], "limo": None})


def test_doctests():
    result = doctest.testmod(traces)
    assert result.attempted and not result.failed


# -------------------------------------------------------------------------- selection


class Turns:
    """For a random generator: domains in turn, of each the first trace. Notes its weights."""

    def __init__(self):
        self.last, self.weights = "", []

    def choice(self, names):
        self.last = next((name for name in names if name > self.last), names[0])
        return self.last

    def choices(self, population, weights):
        self.weights.append(weights)
        return [population[0]]


@pytest.mark.skipif(not SELECTION["s1"], reason="no vectors")
def test_s1_equals_the_reference():
    """The whole, then each filter alone: every item that is left when nothing limits the number."""
    case, items = SELECTION["s1"], []
    for item in SELECTION["s1"]["items"]:
        weak = item["small_correct"] + item["large_correct"]
        layout = float(not (item["api_error"] or item["bad_format"]))
        items.append(item | {"correct": item["teacher_correct"], "weak": weak, "format": layout})
    chosen = traces.s1_select(items, case["target_size"], Turns(), case["tau"])
    assert [item["id"] for item in chosen] == case["selected_in_order"]
    assert traces.s1_select(items, 1, Turns())[0]["id"] == case["preselected"][0]

    def left(**same):
        return {item["id"] for item in traces.s1_select([x | same for x in items], 1000, Random(0))}

    assert left() == set(case["after_difficulty"]) and left(weak=0) == set(case["after_format"])
    assert left(weak=0, format=1.0) == set(case["after_api_errors"])


@pytest.mark.parametrize("case", SELECTION["s1_length_weights"])
def test_s1_length_weights(case):
    """The first draw's weights, from the longest trace on, are the reference's probabilities."""
    turns = Turns()
    [first] = traces.s1_select([{"length": length} for length in case["lengths"]], 1, turns)
    assert first["length"] == max(case["lengths"])
    total = sum(turns.weights[0])
    expected = [p for _, p in sorted(zip(case["ranks"], case["probabilities"], strict=True))]
    assert [w / total for w in turns.weights[0]] == pytest.approx(expected, rel=1e-9)


@pytest.mark.skipif(not SELECTION["limo"], reason="no vectors")
def test_limo_equals_the_reference():
    """The counts of the vectors as texts with so many of the words."""
    case, items = SELECTION["limo"], []
    for question in case["questions"]:
        for number, c in enumerate(question["candidates"]):
            text = "check " * c["verify"] + "perhaps " * c["tentative"] + "since " * c["connective"]
            item = {"prompt": question["id"], "number": number, "completion": text, "attempts": 32}
            item |= {"length": c["n_words"], "weak": question["weak_correct_of_4"]}
            items.append(item | {"solved": question["strong_correct_of_32"]})
    kept = [item for item in items if item["prompt"] in case["after_fine"]]
    expected = [score for number in case["after_fine"] for score in case["scores"][str(number)]]
    assert traces.limo_scores(kept) == pytest.approx(expected, rel=1e-9)
    chosen = traces.limo_select(items, case["keep"])
    prompts = [item["prompt"] for item in chosen]
    assert prompts == case["selected"] == case["ranking"][: case["keep"]]
    assert all(item["number"] == case["best_candidate"][str(item["prompt"])] for item in chosen)
    assert traces.limo_select([], 3) == traces.limo_select([items[0] | {"weak": 1}], 3) == []


def test_decontaminated():
    """Eight words in a row of one held-out text; those that most of them share do not count."""
    template = "Please answer this question and think aloud for a while: "
    numbers = ("three", "four", "nine", "one")
    held = [template + f"what is the sum of {n} and two times seven" for n in numbers]
    items = [{"prompt": template + "name the capital of a country that you like"}]
    items += [{"prompt": "Tell me: what is the SUM, of three and two times seven"}]
    items += [{"prompt": "Now What is the SUM of three and two times seven, please?"}]
    assert traces.decontaminated(items, held, 8) == items[:2]  # a comma is a word
    assert traces.decontaminated(items, held, 4) == items[:1]
    short = [{"prompt": "a b"}, {"prompt": "a b c"}]
    assert traces.decontaminated(short, ["a b"], 8) == short[1:]


# ------------------------------------------------------------------------ what is kept


def completion(text: str, correct: bool, finished=True, layout=1.0, **score):
    score |= {"format": layout, "answer": "", "correct": correct, "total": float(correct)}
    return rewards.Completion(0, {}, [1], [5] * len(text), [], finished, text, score)


def test_kept():
    """Right, finished, in the layout, in one notation, each once; a cap; all; the shortest."""

    def texts(group, *how):
        return [c.text for c in traces.keep_right(group, *how)]

    bad = [completion("b", False), completion("c", True, False), completion("d", True, layout=0.0)]
    good = [completion("aaaa", True), completion("aa", True), completion("aa", True)]
    answers = [*good[:1], *bad, *good[1:], completion("e", True, mixed=True)]
    assert texts(answers, "correct", 0) == ["aaaa", "aa"]
    assert texts(answers, "all", 0) == ["aaaa", "b", "d", "aa", "e"]
    assert texts(answers, "shortest", 0) == ["aa", "aaaa"]
    assert texts(answers, "correct", 1) == ["aaaa"]
    right = [completion("x" * n, True) for n in (4, 1, 3, 2)]
    wrong = [completion("w", False)] * 4
    assert texts(right, "shortest", 1) == ["x"]
    assert texts(right + wrong, "shortest", 1) == ["xxx"]  # half of them right
    assert texts(right + 7 * wrong, "shortest", 1) == ["xxxx"]  # an eighth
    assert texts(wrong, "shortest", 2) == []


# ------------------------------------------------------------------------------ edits

TRACE = "1+2=3>2\n2-1=1<2\n2*1=2=2\n</think><answer>2*1-0</answer>"
THOUGHT, TAG, ANSWER = TRACE.partition("</think>")
LINES = THOUGHT.splitlines()


def test_perturbed():
    """Each rule damages what it names and leaves the rest; the same generator, the same damage."""

    def damaged(rule):
        texts = [traces.perturbed(TRACE, rule, Random(s), "other\n</think>z") for s in range(20)]
        assert texts[0] == traces.perturbed(TRACE, rule, Random(0), "other\n</think>z")
        parts = [text.partition("</think>") for text in texts]
        return [thought.splitlines() for thought, *_ in parts], {answer for *_, answer in parts}

    thoughts, answers = damaged("shuffle:1")
    assert all(sorted(lines) == sorted(LINES) for lines in thoughts) and answers == {ANSWER}
    assert len({*map(tuple, thoughts)}) > 1
    thoughts, answers = damaged("delete:.67")
    assert {*map(tuple, thoughts)} == {(line,) for line in LINES} and answers == {ANSWER}
    assert damaged("delete:1") == ([[]] * 20, {ANSWER})
    thoughts, answers = damaged("insert:0.67")
    assert all(lines.count("other") == 2 and len(lines) == 5 for lines in thoughts)
    thoughts, answers = damaged("digits:1")
    assert {re.sub("[0-9]", "", "".join(lines)) for lines in thoughts} == {"+=>-=<*=="}
    assert len({*map(tuple, thoughts)}) > 1 and answers == {ANSWER}
    assert damaged("answer:1") == ([LINES] * 20, {"<answer>3*2+1</answer>"})


def test_perturbed_by_share():
    answers = [traces.perturbed(TRACE, "answer:0.3", Random(s)) != TRACE for s in range(500)]
    assert 0.23 < sum(answers) / 500 < 0.37
    digits = [traces.perturbed(TRACE, "digits:0.5", Random(seed)) for seed in range(500)]
    changed = sum(a != b for text in digits for a, b in zip(text, TRACE, strict=True))
    assert 0.4 < changed / 500 / 12 < 0.5  # a tenth of those drawn anew stays the same
    for rule in ("mix:0.5", "shuffle", "shuffle:2", ":0.5"):
        with pytest.raises(BadInput, match="--perturb .*shuffle, delete, insert, digits, answer"):
            traces.perturbed(TRACE, rule, Random(0))


def test_edit():
    lines = [{"prompt": str(i), "completion": f"{i}\n</think>{i}"} for i in range(3)]
    inserted = traces.edit(lines, "long", "insert:1", 0)
    assert [line["completion"][:4] for line in inserted] == ["1\n0\n", "2\n1\n", "0\n2\n"]
    with pytest.raises(BadInput, match="line 4: .* need a completion with </think>"):
        traces.edit([*lines, {"prompt": "", "completion": "4"}], "short", "", 0)


# --------------------------------------------------------------------------- the tool


@pytest.fixture
def tool(cwd, small, capfd):
    """Run the tool with the small model; (exit code, the lines it wrote, what it said)."""

    def tool(flags: str, model=small):
        out = cwd / f"out-{len(list(cwd.glob('out-*')))}.jsonl"
        capfd.readouterr()
        code = traces.main(["--model", str(model), "--out", str(out), *flags.split()])
        return code, lines_of(out) if out.exists() else [], "".join(capfd.readouterr())

    return tool


def test_traces_are_those_that_sft_learns(tool, small):
    """--cot keeps the answer of the same trace, --perturb damages it, the same way every time."""
    code, plain, _ = tool("--traces 5")
    prompter = sft.Prompter(sft.load_model(small), rewards.make_task("countdown"), chat=False)
    assert (code, plain) == (0, [sft.trace_example(prompter, 0, i) for i in range(5)])
    assert tool("--traces 5 --seed 1")[1] != plain
    code, lines, _ = tool("--traces 5 --cot none")
    for line, whole in zip(lines, plain, strict=True):
        answer = whole["completion"].partition("</think>")[2]
        assert line == whole | {"completion": "</think>" + answer}
    code, lines, _ = tool("--traces 5 --perturb digits:1")
    assert code == 0 and lines == tool("--traces 5 --perturb digits:1")[1] != plain


def test_lines_are_selected(tool, tmp_path):
    """By length, by what weaker models solved, away from held-out prompts; fields stay."""
    lines = [{"prompt": f"{i}=", "completion": "x" * i + "</think>", "id": i} for i in range(1, 9)]
    path = write(tmp_path / "a.jsonl", lines)

    def ids(flags, data=path):
        code, chosen, _ = tool(f"--data {data} {flags}")
        assert code == 0 and all(line in lines or data != path for line in chosen)
        return [line["id"] for line in chosen]

    assert ids("--select longest:3") == [8, 7, 6]
    assert len(ids("--select random:4")) == 4 and len(ids("--select random:9")) == 8
    assert ids("--select longest:3 --max_length 10") == [6, 5, 4]  # 2 + 6 + </think> + end
    solved = [{"prompt": f"{i}=", "correct": i > 2} for i in range(1, 9)]
    weak = write(tmp_path / "w1.jsonl", solved)
    assert sorted(ids(f"--select s1:5 --weak {weak}")) == [1, 2]
    more = write(tmp_path / "w2.jsonl", [{"prompt": "1=", "correct": True}])
    assert ids(f"--select s1:5 --weak {weak},{more}") == [2]
    code, _, said = tool(f"--data {path} --select limo:2")  # no line has "solved"
    assert code == 2 and "traces.py: error: of 8 lines none is left\n" in said
    limo = [line | {"solved": i % 3, "attempts": 16} for i, line in enumerate(lines)]
    assert len(ids("--select limo:9", write(tmp_path / "b.jsonl", limo))) == 3
    task = rewards.make_task("countdown")
    held = task.compact(rewards.heldout(task, 3)[1])
    dirty = write(tmp_path / "c.jsonl", [*lines, {"prompt": held, "completion": "z", "id": 9}])
    assert ids("--decontaminate 8 --heldout 3", dirty) == list(range(1, 9))
    assert ids("--decontaminate 8 --heldout 1", dirty) == list(range(1, 10))


def test_sampled_lines(tool, small, tmp_path, monkeypatch):
    """The file holds what was kept of the first problems; sft.py learns it."""
    # a random model writes nothing right
    monkeypatch.setattr(traces, "keep_right", lambda group, keep, cap: group[:cap])
    flags = "--sample 3 --attempts 2 --cap 1 --keep all --max_new_tokens 8"
    code, lines, said = tool(flags)
    task = rewards.make_task("countdown")
    prompts = [task.compact(task.problem("train", 0, i)) for i in range(3)]
    assert code == 0 and [line["prompt"] for line in lines] == prompts
    first = lines[0]
    assert (first["attempts"], first["solved"], first["correct"]) == (2, 0, False)
    assert "3 of 3 problems: accuracy 0.000, completion_length 8, kept 3" in said
    other = [line["prompt"] for line in tool(flags + " --seed 1")[1]]
    assert other == [task.compact(task.problem("train", 1, i)) for i in range(3)]
    learn = ["--model", str(small), "--data", write(tmp_path / "a.jsonl", lines), "--steps", "1"]
    learn += ["--batch_size", "2", "--eval_problems", "0", "--out", str(tmp_path / "run")]
    assert sft.main(sft.train, sft.Config, learn) == 0


def test_two_ranks_write_what_one_writes(tool, small, tmp_path, monkeypatch):
    """Ranks that are threads; --keep all keeps the answers that ended by themselves."""
    flags = "--sample 5 --attempts 8 --keep all --max_new_tokens 120"
    _, alone, _ = tool(flags)
    assert len(alone) > 5
    ranks, codes, out = ThreadRanks(2), [None, None], tmp_path / "two.jsonl"

    class Run(sft.Run):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.rank, self.world = ranks.local.rank, 2

    def work(rank):
        ranks.local.rank = rank
        codes[rank] = traces.main(["--model", str(small), "--out", str(out), *flags.split()])

    monkeypatch.setattr(sft, "dist", ranks)
    monkeypatch.setattr(traces, "dist", ranks)
    monkeypatch.setattr(traces, "Run", Run)
    monkeypatch.setattr(signal, "signal", nothing)  # a thread may not set a handler
    monkeypatch.setenv("WORLD_SIZE", "2")
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0]
    assert lines_of(out) == alone


def test_ctrl_c_writes_what_there_is(tool, monkeypatch):
    real = traces.rollout

    def rollout(run, *args, **options):
        run.got = 2
        return real(run, *args, **options)

    monkeypatch.setattr(traces, "rollout", rollout)
    code, lines, said = tool("--sample 70 --attempts 1 --keep all --max_new_tokens 30")
    assert code == 130 and "64 of 70" in said and "70 of 70" not in said
    assert f"wrote {len(lines)} of {len(lines)} lines" in said


BAD = {
    "": "one of the arguments --sample --traces --data is required",
    "--sample 2 --pertub x": "unrecognized arguments: --pertub",
    "--traces 2 --keep all": "--keep and --cap need --sample",
    "--traces 2 --perturb mix:1 --model missing": "--perturb mix:1: one of shuffle",
    "--traces 2 --select s1": "--select s1: one of random",
    "--traces 2 --select s1:0": "--select s1:0: one of random",
    "--traces 2 --select random:1 --weak a": "--weak needs --select s1 or limo",
    "--traces -1": "--traces -1 is below 0",
    "--sample 1 --attempts 0": "--attempts 0 is below 1",
    "--traces 2 --temperature nan": "--temperature nan",
    "--traces 2 --out .": "--out . is there already",
    "--data bad.jsonl": "bad.jsonl, line 2: prompt and completion are needed",
    "--data good.jsonl --select s1:1 --weak good.jsonl": "good.jsonl, line 1: KeyError",
    "--data good.jsonl --cot none": "line 1: --cot and --perturb need a completion",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line(tool, cwd, capfd, flags):
    good = {"prompt": "a", "completion": "b"}
    write(cwd / "good.jsonl", [good])
    write(cwd / "bad.jsonl", [good, {"prompt": "a"}])
    try:
        code, lines, said = tool(flags)
    except SystemExit as left:
        code, lines, said = left.code, [], capfd.readouterr().err
    assert (code, lines) == (2, []) and BAD[flags] in said
    assert said.count("\n") == 1 and said.startswith("traces.py: error: ")
