"""more/traces.py: selection as the references do it, damage, what is kept; its command line."""

import re
from random import Random

import pytest
from conftest import lines_of
from test_rewards import write
from test_vectors import cases

import rewards
import sft
from more import traces


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


@cases("sft_data", "selection", "s1")
def test_s1_algorithm1_equals_the_reference(case):
    """The whole, then its filters: every item that is left when nothing limits the number."""
    items = []
    for item in case["items"]:
        weak = item["small_correct"] + item["large_correct"]
        layout = float(not (item["api_error"] or item["bad_format"]))
        items.append(item | {"correct": item["teacher_correct"], "weak": weak, "format": layout})
    chosen = traces.s1_select(items, case["target_size"], Turns(), case["tau"])
    assert [item["id"] for item in chosen] == case["selected_in_order"]
    assert traces.s1_select(items, 1, Turns())[0]["id"] == case["preselected"][0]
    left = traces.s1_select(items, 1000, Random(0))
    assert {item["id"] for item in left} == set(case["after_difficulty"])


@cases("sft_data", "selection", "s1_length_weights")
def test_s1_length_weights(case):
    """The first draw's weights, from the longest trace on, are the reference's probabilities."""
    turns = Turns()
    [first] = traces.s1_select([{"length": length} for length in case["lengths"]], 1, turns)
    assert first["length"] == max(case["lengths"])
    total = sum(turns.weights[0])
    expected = [p for _, p in sorted(zip(case["ranks"], case["probabilities"], strict=True))]
    assert [w / total for w in turns.weights[0]] == pytest.approx(expected, rel=1e-9)


@cases("sft_data", "selection", "limo")
def test_limo_score_equals_the_reference(case):
    """The counts of the vectors as texts with so many of the words."""
    items = []
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
    assert [item["prompt"] for item in chosen] == case["selected"]
    assert all(item["number"] == case["best_candidate"][str(item["prompt"])] for item in chosen)


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
    assert traces.decontaminated([{"prompt": "a b"}], ["a b"], 8) == []


def completion(text: str, correct: bool, finished=True, layout=1.0, **score):
    score |= {"format": layout, "answer": "", "correct": correct, "total": float(correct)}
    return rewards.Completion(0, {}, [1], [5] * len(text), [], finished, text, score)


def test_kept():
    """Right, finished, in the layout, in one notation, each once; a cap; all; the shortest."""
    bad = [completion("b", False), completion("c", True, False), completion("d", True, layout=0.0)]
    good = [completion("aaaa", True), completion("aa", True), completion("aa", True)]
    mixed = [*good[:1], *bad, *good[1:], completion("e", True, mixed=True)]
    right = [completion("x" * n, True) for n in (4, 1, 3, 2)]
    wrong = [completion("w", False)] * 4
    for answers, keep, cap, expected in [
        (mixed, "correct", 0, "aaaa aa"),
        (mixed, "all", 0, "aaaa b d aa e"),
        (mixed, "shortest", 0, "aa aaaa"),
        (right, "shortest", 1, "x"),
        (right + wrong, "shortest", 1, "xxx"),  # half of them right
        (right + 7 * wrong, "shortest", 1, "xxxx"),  # an eighth
    ]:
        assert [c.text for c in traces.keep_right(answers, keep, cap)] == expected.split()


TRACE = "1+2=3>2\n2-1=1<2\n2*1=2=2\n</think><answer>2*1-0</answer>"
THOUGHT, _, ANSWER = TRACE.partition("</think>")
LINES = THOUGHT.splitlines()


def damaged(rule: str) -> tuple[list[list[str]], set[str]]:
    """Twenty damaged thoughts, line by line, and the answers."""
    texts = [traces.perturbed(TRACE, rule, Random(s), "other\n</think>z") for s in range(20)]
    parts = [text.partition("</think>") for text in texts]
    return [thought.splitlines() for thought, *_ in parts], {answer for *_, answer in parts}


def test_perturbed():
    """Each rule damages what it names and leaves the rest."""
    thoughts, answers = damaged("shuffle:1")
    assert all(sorted(lines) == sorted(LINES) for lines in thoughts) and answers == {ANSWER}
    assert len({*map(tuple, thoughts)}) > 1
    pair = [{"completion": f"{i}\n</think>{i}"} for i in range(2)]
    assert traces.edit(pair, "long", "insert:1", 0)[0]["completion"] == "1\n0\n</think>0"
    thoughts, answers = damaged("delete:.67")
    assert {*map(tuple, thoughts)} == {(line,) for line in LINES} and answers == {ANSWER}
    thoughts, answers = damaged("insert:0.67")
    assert all(lines.count("other") == 2 and len(lines) == 5 for lines in thoughts)
    thoughts, answers = damaged("digits:0.5")
    texts = ["".join(lines) for lines in thoughts]
    assert {re.sub("[0-9]", "", text) for text in texts} == {"+=>-=<*=="} and answers == {ANSWER}
    changed = sum(a != b for text in texts for a, b in zip(text, "".join(LINES), strict=True))
    assert 0.35 < changed / 20 / 12 < 0.55  # a tenth of those drawn anew stays the same
    assert damaged("answer:1") == ([LINES] * 20, {"<answer>3*2+1</answer>"})


@pytest.fixture
def tool(cwd, small, capfd):
    """Run the tool with the small model; (exit code, the lines it wrote, what it said)."""

    def tool(flags: str):
        out = cwd / f"out-{len(list(cwd.glob('out-*')))}.jsonl"
        capfd.readouterr()
        code = traces.main(["--model", str(small), "--out", str(out), *flags.split()])
        return code, lines_of(out) if out.exists() else [], "".join(capfd.readouterr())

    return tool


def test_traces_are_those_that_sft_learns(tool, small):
    """--perturb damages them, the same way every time; --cot keeps the answer."""
    plain = tool("--traces 5")[1]
    prompter = sft.Prompter(sft.load_model(small), rewards.make_task("countdown"), chat=False)
    assert plain == [sft.trace_example(prompter, 0, i) for i in range(5)]
    assert traces.shortened(TRACE, "none") == "</think>" + ANSWER
    assert traces.shortened(TRACE, "short") == "2*1=2=2\n</think>" + ANSWER
    lines = tool("--traces 5 --perturb digits:1")[1]
    assert lines == tool("--traces 5 --perturb digits:1")[1] != plain


def test_lines_are_selected(tool, tmp_path):
    """By length, by what weaker models solved, away from held-out prompts; fields stay."""
    task = rewards.make_task("countdown")
    lines = [{"prompt": f"{i}=", "completion": "x" * i + "</think>", "id": i} for i in range(1, 9)]
    held = {"prompt": task.compact(rewards.heldout(task, 3)[1]), "completion": "z", "id": 9}
    plain, dirty = write(tmp_path / "a.jsonl", lines), write(tmp_path / "c.jsonl", [*lines, held])
    solved = [{"prompt": line["prompt"], "correct": line["id"] != 2} for line in lines]
    weak = write(tmp_path / "w.jsonl", solved)
    for flags, ids in [
        (f"--data {plain} --select longest:3 --max_length 10", [6, 5, 4]),  # with </think> and end
        (f"--data {plain} --select s1:5 --weak {weak}", [2]),
        (f"--data {dirty} --decontaminate 8 --heldout 3", [*range(1, 9)]),
    ]:
        code, chosen, _ = tool(flags)
        assert code == 0 and [line["id"] for line in chosen] == ids, flags
        assert all(line in lines for line in chosen)


def test_pairs_of_lines(tool, tmp_path):
    """Right over wrong for the same prompt, in a file that dpo.py reads; no more than --cap."""
    names, keys = ("prompt", "completion", "correct"), [(p, i) for i in range(4) for p in "ab"]
    rows = [*((p, f"{p}{i}", i < 2) for p, i in keys), ("c", "c", True)]
    data = write(tmp_path / "a.jsonl", [dict(zip(names, row, strict=True)) for row in rows])
    pairs = tool(f"--data {data} --pairs correct")[1]
    found = [(pair["prompt"], pair["chosen"], pair["rejected"], pair["kind"]) for pair in pairs]
    expected = {(p, f"{p}{w}", f"{p}{x}", "correct") for p in "ab" for w in (0, 1) for x in (2, 3)}
    assert len(found) == 8 and set(found) == expected
    assert [p["prompt"] for p in tool(f"--data {data} --pairs correct --cap 1")[1]] == ["a", "b"]


def test_ctrl_c_writes_what_there_is(tool, monkeypatch):
    monkeypatch.setattr(traces.Run, "gather", lambda self, value: [value or 2])  # SIGINT is 2
    code, lines, said = tool("--sample 70 --attempts 1 --keep all --max_new_tokens 30")
    assert code == 130 and "64 of 70" in said and "70 of 70" not in said
    assert f"wrote {len(lines)} of {len(lines)} lines" in said
