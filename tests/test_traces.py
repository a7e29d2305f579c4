"""more/traces.py: selection as the references do it, damage, what is kept; every documented command."""

import json
import os
import random
import re
import signal
import sys
import threading
from pathlib import Path
from random import Random

import pytest
from conftest import ThreadRanks, nothing

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
    import doctest

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


def s1_items() -> list[dict]:
    """The pool of the vectors in our fields."""
    items = []
    for item in SELECTION["s1"]["items"]:
        ours = {
            "correct": item["teacher_correct"],
            "weak": item["small_correct"] + item["large_correct"],
            "format": float(not (item["api_error"] or item["bad_format"])),
        }
        items.append(item | ours)
    return items


@pytest.mark.skipif(not SELECTION["s1"], reason="no vectors")
def test_s1_equals_the_reference():
    case, items = SELECTION["s1"], s1_items()
    chosen = traces.s1_select(items, case["target_size"], Turns(), case["tau"])
    assert [item["id"] for item in chosen] == case["selected_in_order"]
    assert [item["id"] for item in traces.s1_select(items, 1, Turns())] == case["preselected"][:1]
    everything = {item["id"] for item in traces.s1_select(items, 1000, Random(0))}
    assert everything == set(case["after_difficulty"])
    easy = [item | {"weak": 0} for item in items]
    kept = {item["id"] for item in traces.s1_select(easy, 1000, Random(0))}
    assert kept == set(case["after_format"])
    clean = [item | {"format": 1.0} for item in easy]
    kept = {item["id"] for item in traces.s1_select(clean, 1000, Random(0))}
    assert kept == set(case["after_api_errors"])


@pytest.mark.parametrize("case", SELECTION["s1_length_weights"])
def test_s1_length_weights(case):
    """The first draw's weights, from the longest trace on, are the reference's probabilities."""
    turns = Turns()
    [first] = traces.s1_select([{"length": length} for length in case["lengths"]], 1, turns)
    assert first["length"] == max(case["lengths"])
    total = sum(turns.weights[0])
    expected = [p for _, p in sorted(zip(case["ranks"], case["probabilities"], strict=True))]
    assert [w / total for w in turns.weights[0]] == pytest.approx(expected, rel=1e-9)


def test_s1_draws_by_seed():
    items = [{"id": i, "length": i % 50, "domain": str(i % 4)} for i in range(200)]
    draws = []
    for seed in (0, 0, 1):
        draws.append([item["id"] for item in traces.s1_select(items, 40, Random(seed))])
    assert draws[0] == draws[1] != draws[2] and len(set(draws[0])) == 40
    lengths = [items[i]["length"] for i in draws[0]]
    assert sum(lengths) / 40 > 35  # the longer the likelier: the mean of all is 24.5
    shares = [sum(items[i]["domain"] == d for i in draws[0]) for d in "0123"]
    assert min(shares) >= 4


@pytest.mark.skipif(not SELECTION["limo"], reason="no vectors")
def test_limo_equals_the_reference():
    """The counts of the vectors as texts with so many of the words."""
    case, items = SELECTION["limo"], []
    for question in case["questions"]:
        for number, c in enumerate(question["candidates"]):
            text = "check " * c["verify"] + "perhaps " * c["tentative"] + "since " * c["connective"]
            items.append(
                {
                    "prompt": question["id"],
                    "number": number,
                    "completion": text,
                    "length": c["n_words"],
                    "weak": question["weak_correct_of_4"],
                    "solved": question["strong_correct_of_32"],
                    "attempts": 32,
                }
            )
    kept = [item for item in items if item["prompt"] in case["after_fine"]]
    expected = [score for number in case["after_fine"] for score in case["scores"][str(number)]]
    assert traces.limo_scores(kept) == pytest.approx(expected, rel=1e-9)
    chosen = traces.limo_select(items, case["keep"])
    prompts = [item["prompt"] for item in chosen]
    assert prompts == case["selected"] == case["ranking"][: case["keep"]]
    assert all(item["number"] == case["best_candidate"][str(item["prompt"])] for item in chosen)
    assert traces.limo_select([], 3) == []


def test_random_and_longest():
    items = [{"length": length} for length in (3, 9, 1, 9, 5)]
    assert traces.select(items, "longest", 3, None) == [items[1], items[3], items[4]]
    drawn = traces.select(items, "random", 4, Random(0))
    assert len(drawn) == 4 and all(item in items for item in drawn)
    assert drawn == traces.select(items, "random", 4, Random(0))
    assert len(traces.select(items, "random", 9, Random(0))) == 5


def test_decontaminated():
    """Eight words in a row of one held-out text; those that most of them share do not count."""
    template = "Please answer this question and think aloud for a while: "
    numbers = ("three", "four", "nine", "one")
    held = [template + f"what is the sum of {n} and two times seven" for n in numbers]
    items = [{"prompt": template + "name the capital of a country that you like"}]
    items += [{"prompt": "Tell me: what is the SUM, of three and two times seven"}]
    items += [{"prompt": "Now what is the sum of three and two times seven, please?"}]
    assert traces.decontaminated(items, held, 8) == items[:2]  # a comma is a word
    assert traces.decontaminated(items, held, 4) == items[:1]
    short = [{"prompt": "a b"}, {"prompt": "a b c"}]
    assert traces.decontaminated(short, ["a b"], 8) == short[1:]


# ------------------------------------------------------------------------ what is kept


def completion(text: str, correct: bool, finished=True, layout=1.0, **score):
    score |= {"format": layout, "answer": "", "correct": correct, "total": float(correct)}
    tokens = [5] * len(text)
    return rewards.Completion(0, {}, [1], tokens, [0.0] * len(text), finished, text, score)


def test_kept():
    """Right, finished, in the layout, in one notation, each once; a cap; all; the shortest."""
    good, longer = completion("aa", True), completion("aaaa", True)
    bad = [completion("b", False), completion("c", True, False), completion("d", True, layout=0.0)]
    mixed = completion("e", True, mixed=True)
    answers = [longer, *bad, good, completion("aa", True), mixed]

    def texts(group, *how):
        return [c.text for c in traces.keep_right(group, *how)]

    assert texts(answers, "correct", 0) == ["aaaa", "aa"]
    assert texts(answers, "all", 0) == ["aaaa", "b", "d", "aa", "e"]
    assert texts(answers, "shortest", 0) == ["aa", "aaaa"]
    assert texts(answers, "correct", 1) == ["aaaa"]
    right = [completion("x" * n, True) for n in (4, 1, 3, 2)]
    wrong = [completion("w", False)] * 4
    assert texts(right, "shortest", 1) == ["x"]
    assert texts(right + wrong, "shortest", 1) == ["xxx"]  # half of them right
    assert texts(right + 7 * wrong, "shortest", 1) == ["xxxx"]  # an eighth
    assert texts(wrong, "shortest", 2) == texts(wrong, "correct", 0) == []


# ------------------------------------------------------------------------------ edits

TRACE = "1+2=3>2\n2-1=1<2\n2*1=2=2\n</think><answer>2*1-0</answer>"
LINES = TRACE.splitlines(True)[:3]


@pytest.mark.parametrize(
    "rule, check",
    [
        ("shuffle:1", lambda lines, end: sorted(lines) == sorted(LINES) and end in TRACE),
        ("delete:.67", lambda lines, end: len(lines) == 1 and lines[0] in TRACE and end in TRACE),
        ("delete:1", lambda lines, end: not lines and end in TRACE),
        ("insert:0.67", lambda lines, end: lines.count("other\n") == 2 and len(lines) == 5),
        ("digits:1", lambda lines, end: [re.sub("[0-9]", "", x) for x in lines] == NO_DIGITS),
        ("answer:1", lambda lines, end: lines == LINES and end == "</think><answer>3*2+1</answer>"),
    ],
)
def test_perturbed(rule, check):
    def damaged():
        return [traces.perturbed(TRACE, rule, Random(s), "other\n</think>z") for s in range(20)]

    texts = damaged()
    for text in texts:
        thought, tag, answer = text.partition("</think>")
        assert check(thought.splitlines(keepends=True), tag + answer), text
    assert texts == damaged()
    assert (len(set(texts)) > 1) == (rule not in ("delete:1", "answer:1"))


NO_DIGITS = ["+=>\n", "-=<\n", "*==\n"]


def test_perturbed_by_share():
    answers = [traces.perturbed(TRACE, "answer:0.3", Random(s)) != TRACE for s in range(500)]
    assert 0.23 < sum(answers) / 500 < 0.37
    digits = [traces.perturbed(TRACE, "digits:0.5", Random(seed)) for seed in range(500)]
    changed = sum(a != b for text in digits for a, b in zip(text, TRACE, strict=True))
    assert 0.4 < changed / 500 / 12 < 0.5  # a tenth of those drawn anew stays the same
    for rule in ("mix:0.5", "shuffle", "shuffle:2", "shuffle:x", ":0.5"):
        with pytest.raises(BadInput, match="--perturb .*shuffle, delete, insert, digits, answer"):
            traces.perturbed(TRACE, rule, random.Random(0))


def test_shortened():
    assert traces.shortened(TRACE, "long") == TRACE
    assert traces.shortened(TRACE, "short") == "2*1=2=2\n</think><answer>2*1-0</answer>"
    assert traces.shortened(TRACE, "none") == "</think><answer>2*1-0</answer>"
    assert traces.shortened("</think>x", "short") == "</think>x"


def test_edit():
    lines = [{"prompt": str(i), "completion": f"{i}\n</think>{i}"} for i in range(3)]
    cut = traces.edit(lines, "none", "", 0)
    assert cut == [{"prompt": str(i), "completion": f"</think>{i}"} for i in range(3)]
    inserted = traces.edit(lines, "long", "insert:1", 0)
    assert [line["completion"][:4] for line in inserted] == ["1\n0\n", "2\n1\n", "0\n2\n"]
    with pytest.raises(BadInput, match="line 4: .* need a completion with </think>"):
        traces.edit([*lines, {"prompt": "", "completion": "4"}], "short", "", 0)


# --------------------------------------------------------------------------- the tool


def write(path: Path, lines: list) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return str(path)


@pytest.fixture
def tool(cwd, small, capfd):
    """Run the tool with the small model; (exit code, the lines it wrote, what it said)."""

    def tool(flags: str, model=small):
        out = cwd / f"out-{len(list(cwd.glob('out-*')))}.jsonl"
        capfd.readouterr()
        code = traces.main(["--model", str(model), "--out", str(out), *flags.split()])
        lines = out.read_text("utf-8").splitlines() if out.exists() else []
        return code, [json.loads(line) for line in lines], "".join(capfd.readouterr())

    return tool


def test_traces_are_those_that_sft_learns(tool, small):
    """--cot keeps the answer of the same trace, --perturb damages it, the same way every time."""
    code, plain, _ = tool("--traces 5")
    prompter = sft.Prompter(sft.load_model(small), rewards.make_task("countdown"), chat=False)
    assert (code, plain) == (0, [sft.trace_example(prompter, 0, i) for i in range(5)])
    edited = {}
    for flags in ("--cot none", "--perturb digits:1", "--perturb answer:1", "--perturb insert:1"):
        code, lines, _ = tool(f"--traces 5 {flags}")
        assert code == 0 and lines == tool(f"--traces 5 {flags}")[1] != plain
        assert [line["prompt"] for line in lines] == [line["prompt"] for line in plain]
        edited[flags] = [line["completion"] for line in lines]

    def answers(texts):
        return [text.partition("</think>")[2] for text in texts]

    plain_texts = [line["completion"] for line in plain]
    assert edited["--cot none"] == ["</think>" + answer for answer in answers(plain_texts)]
    assert answers(edited["--perturb digits:1"]) == answers(plain_texts)
    assert not set(answers(edited["--perturb answer:1"])) & set(answers(plain_texts))
    for text, before in zip(edited["--perturb insert:1"], plain_texts, strict=True):
        assert text.count("\n") == 2 * before.count("\n")
    assert tool("--traces 5 --seed 1")[1] != plain


def test_lines_are_selected(tool, tmp_path):
    """By length, by what weaker models solved, away from held-out prompts; fields stay."""
    lines = [{"prompt": f"{i}=", "completion": "x" * i + "</think>", "id": i} for i in range(1, 9)]
    path = write(tmp_path / "a.jsonl", lines)

    def ids(flags, data=path):
        code, chosen, _ = tool(f"--data {data} {flags}")
        assert code == 0 and all(line in lines or data != path for line in chosen)
        return [line["id"] for line in chosen]

    assert ids("--select longest:3") == [8, 7, 6]
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
    for line in lines:
        assert (line["attempts"], line["solved"], line["correct"]) == (2, 0, False)
    assert "3 of 3 problems: accuracy 0.000, completion_length 8, kept 3" in said
    assert tool(flags)[1] == lines != tool(flags + " --seed 1")[1]
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
    assert [json.loads(line) for line in out.read_text("utf-8").splitlines()] == alone


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
    "--sample 2 --traces 2": "not allowed with",
    "--sample 2 --pertub x": "unrecognized arguments: --pertub",
    "--traces 2 --keep all": "--keep and --cap need --sample",
    "--traces 2 --perturb mix:1": "--perturb mix:1: one of shuffle",
    "--traces 2 --select s1": "--select s1: one of random",
    "--traces 2 --select s1:0": "--select s1:0: one of random",
    "--traces 2 --select random:1 --weak a": "--weak needs --select s1 or limo",
    "--traces -1": "--traces -1 is below 0",
    "--sample 1 --attempts 0": "--attempts 0 is below 1",
    "--traces 2 --temperature nan": "--temperature nan",
    "--traces 2 --task gsm8k": "gsm8k and math read a file",
    "--traces 2 --out .": "--out . is there already",
    "--data missing.jsonl": "cannot read the data file missing.jsonl",
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
