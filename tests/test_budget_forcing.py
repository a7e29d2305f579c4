"""budget_forcing.py and its baselines: the reference's state machine, the cache, metrics, votes."""

import doctest
import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, lines_of, metrics_of, records_of

import budget_forcing as bf
import rewards


def load(name: str, path: Path):
    """A module of docs/ that no import finds, or finds under the name of another."""
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


tool = load("budget_forcing_baselines", ROOT / "docs/experiments/budget_forcing.py")
PATH = Path(os.environ.get("VECTORS") or ROOT / "tests/vectors") / "test_time.json"
VECTORS = json.loads(PATH.read_text(encoding="utf-8")) if PATH.is_file() else {}
S1 = {"think_stop": "<|im_start|>", "think_end": "<|im_start|>answer"}
S1["final_prefix"] = "\nFinal Answer:"
SMALL = "--caps 4,8,12 --max_new_tokens 20 --eval_problems 3 --waits 1,2"
MORE = f"{SMALL} --eval_samples 2 --tries 2"  # the tool's


def vectors(section: str):
    found = VECTORS.get(section, [])
    return pytest.mark.parametrize("case", found, ids=[case["name"] for case in found])


# ------------------------------------------------------------------------- the scripted model


class Tape(torch.nn.Module):
    """A model that wants to say a row's tape, token by token, or else its next choice there.

    It has the parts of Model that force_budget uses: rows go through the loop of real models.
    """

    is_tiny, compute_dtype, decoding = False, None, None

    def __init__(self, tapes: list[list[str]], words: list[str]):
        super().__init__()
        self.words = words + sorted({word for tape in tapes for word in tape} - set(words))
        self.tapes = [[self.words.index(word) for word in tape] for tape in tapes]
        self.at = [0] * len(tapes)
        self.config = {"vocab_size": len(self.words), "num_key_value_heads": 1, "head_dim": 1}
        self.model = SimpleNamespace(layers=[None])
        self.lm_head = torch.nn.Linear(1, len(self.words), bias=False)
        self.eos_ids = [self.words.index("<|im_end|>")]

    def encode(self, text: str) -> list[int]:
        found = []
        while text:  # the longest word that fits
            word = max((word for word in self.words if text.startswith(word)), key=len)
            found, text = [*found, self.words.index(word)], text[len(word) :]
        return found

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i] for i in ids)

    def forward(self, tokens, cache):  # notes what it was fed: keys are the ids themselves
        cache.append(0, *(tokens[:, None, :, None].float(),) * 2)
        cache.lengths += tokens.shape[1]
        return tokens[..., None].float()

    def logits(self, hidden, temperature):
        rows = range(len(self.tapes)) if self.decoding is None else self.decoding.rows.tolist()
        wanted = torch.full((len(rows), len(self.words)), -1e4)
        for i, row in enumerate(rows):
            for rank, token in enumerate(self.tapes[row][self.at[row] :]):
                wanted[i, token] = max(wanted[i, token], -10.0 * rank)
        return wanted


GIVEN = "Q", "<|im_start|>", "think"


def play(monkeypatch, tapes: list, options: list[dict], words=(), kind=bf.Row, tries: int = 1):
    """Rows of the tapes, decoded together. At every step the cache holds what a row has read."""
    model = Tape(tapes, ["<|im_end|>", "\n", "answer", "Final", " Answer", ":", *GIVEN, *words])
    ids = [model.words.index(word) for word in GIVEN]
    texts = model.encode, model.decode, model.eos_ids, ()
    rows = [kind(ids, bf.Rules(*texts, **one)) for one in options]
    emit, take, checked = bf.Decoding.emit, kind.take, [0]

    def watched_emit(s, logits):
        emit(s, logits)
        model.decoding = s
        for i, row in enumerate(s.rows.tolist()):
            cached = s.cache.keys[0][i, 0, : s.cache.lengths[i], 0].long().tolist()
            assert rows[row].done or cached == rows[row].ids[: len(cached)]
            checked[0] += cached == rows[row].ids

    def watched_take(row, token, logprob):
        number = rows.index(row)
        model.at[number] = model.tapes[number].index(token, model.at[number]) + 1
        checked[0] -= 1  # each token drawn was drawn after the whole text so far
        take(row, token, logprob)

    monkeypatch.setattr(bf.Decoding, "emit", watched_emit)
    monkeypatch.setattr(kind, "take", watched_take)
    for row in rows:
        row.rules.tries = tries
    room = tries * max(row.rules.room for row in rows)
    with torch.no_grad():
        bf.force_budget(model, rows, torch.zeros(len(rows), room), 0.0)
    assert all(row.done for row in rows) and checked[0] >= 0
    return model, rows


def limits(case: dict) -> dict:
    given = case["input"]
    cap = given["max_tokens_thinking"] or given["max_gen_toks"]
    options = {"max_thinking": cap, "max_answer": given["max_gen_toks"]}
    options |= {"n_wait": given["n_ignore"], "wait": given["ignore_str"] or ""}
    return options | {"budget_mode": "per_round"} | S1


def calls_of(model: Tape, row: bf.Row) -> list[dict]:
    names = "max_tokens", "min_tokens", "finish"
    calls = [{name: getattr(r, name) for name in names} for r in row.rounds]
    words = [[model.words[i] for i in r.emitted] for r in row.rounds]
    return [call | {"emitted": emitted} for call, emitted in zip(calls, words, strict=True)]


def compare(model: Tape, row: bf.Row, expected: dict) -> None:
    *calls, answer = calls_of(model, row)
    assert "<|im_start|>think" + row.text() == expected["final_text"]
    assert calls == expected["thinking_calls"]
    assert len(calls) == expected["n_thinking_calls"]
    assert answer["emitted"] == expected["answer_tokens_emitted"]
    assert answer["max_tokens"] == expected["answer_call_max_tokens"]
    record = row.record()
    assert record["thinking"] == expected["tokens_sampled_in_thinking"]
    assert record["waits"] == expected["delimiters_suppressed"]
    assert record["forced"] == expected["end_forced_by_budget"]
    # what the answer stage saw: all but what it wrote itself
    seen = [model.words[i] for i in row.ids[1 : len(row.ids) - len(answer["emitted"])]]
    assert seen == expected["answer_prompt_tokens"]
    shown = model.decode(row.ids[row.start : row.answer_at])
    assert expected["tokens_fed_to_answer_stage_were_cut"] or shown == row.thought
    assert len(row.logprobs) == len(row.ids) - row.start


WORDS = "Wait", "Hmm"


@vectors("budget_forcing")
def test_reference(monkeypatch, case):
    tape = case["input"]["tapes"]["Q0"]
    model, (row,) = play(monkeypatch, [tape], [limits(case)], WORDS)
    compare(model, row, case["expected"])


@pytest.mark.skipif(not VECTORS, reason="tests/vectors/test_time.json is not there")
def test_reference_in_one_batch(monkeypatch):
    """All cases as the rows of one batch: budgets, Waits and phases differ from row to row."""
    found = VECTORS["budget_forcing"]
    tapes = [case["input"]["tapes"]["Q0"] for case in found]
    model, rows = play(monkeypatch, tapes, [limits(case) for case in found], WORDS)
    assert len(rows) == 14
    for case, row in zip(found, rows, strict=True):
        compare(model, row, case["expected"])


@vectors("budget_forcing_readme")
def test_reference_readme(monkeypatch, case):
    """Its loop appends no boundary: with empty strings the same machine is that procedure."""
    given, expected = case["input"], case["expected"]
    options = {"max_thinking": given["max_tokens_thinking"], "n_wait": given["num_ignore"]}
    options |= {"wait": given["wait"], "max_answer": 32768, "final_prefix": ""}
    options |= {"think_stop": "<|im_start|>", "think_end": ""}
    model, (row,) = play(monkeypatch, [given["tape"]], [options], WORDS)
    assert "<|im_start|>think" + row.text() == expected["generated_text"]
    assert row.waits == expected["waits_inserted"]
    assert calls_of(model, row) == expected["calls"]


@vectors("rejection_sampling")
def test_reference_rejection(monkeypatch, case):
    options = {"max_thinking": case["input"]["max_tokens_thinking"], "max_answer": 9} | S1
    _, (row,) = play(monkeypatch, [case["input"]["tape"]], [options], (), tool.Rejected, 5)
    expected, tries = case["expected"], row.rounds[:-1]
    assert "<|im_start|>think" + row.text() == expected["final_text"]
    assert [len(r.emitted) for r in tries] == expected["tokens_per_try"]
    assert len(tries) == expected["tries"] and row.record()["filled"]
    assert {r.max_tokens for r in tries} == {expected["call_max_tokens"]}


def test_rejection_gives_up(monkeypatch):
    options, tape = {"max_thinking": 1, "max_answer": 9} | S1, ["a", "<|im_start|>", "b", "c", "d"]
    _, (row,) = play(monkeypatch, [tape], [options], (), tool.Rejected, 2)
    assert row.thinking and row.text() == "" and [len(r.emitted) for r in row.rounds] == [2, 2]
    record = row.record()
    assert (record["filled"], record["answered"], record["thinking"]) == (False, False, 2)
    assert (record["sampled"], record["score"]) == (4, 0.0)


def test_delimiter_of_several_tokens(monkeypatch):
    """Of three tokens, the first of which also ends a sentence: what precedes them stays."""
    options = {"max_thinking": 20, "max_answer": 9, "n_wait": 1, "wait": "Wait"}
    tape = ["a", ".</", "think", ">", "b", "</", "think", ">", "<answer>", "c", "<|im_end|>"]
    words = *WORDS, "</", "think", ">", ".", "<answer>"
    model, (row,) = play(monkeypatch, [tape], [options], words)
    assert row.text() == "a.Waitb</think><answer>c"
    assert row.waits == 1 and row.record()["thinking"] == 8 and not row.forced
    assert [model.words[i] for i in row.ids[row.start :]][:4] == ["a", ".", "Wait", "b"]


def test_no_wait_when_the_delimiter_took_the_last_of_the_budget(monkeypatch):
    """Nor is the end forced: the model ended its thinking itself."""
    options = {"max_thinking": 2, "max_answer": 9, "n_wait": 1, "wait": "Wait"} | S1
    _, (row,) = play(monkeypatch, [["a", "<|im_start|>", "b", "<|im_end|>"]], [options], WORDS)
    assert (row.waits, row.forced, row.text()) == (0, False, "a<|im_start|>answerb")


class Even(Tape):
    """All words are equally likely, so that a token tells which random number drew it."""

    def logits(self, hidden, temperature):
        return torch.zeros(len(hidden), len(self.words))


def test_the_nth_draw_uses_the_nth_number():
    model = Even([], ["<|im_end|>", "</think>", "\n", "<answer>", "wait", "a", "b"])
    options = {"max_thinking": 20, "max_answer": 9, "n_wait": 2, "wait": "waitwait"}
    rules = bf.Rules(model.encode, model.decode, model.eos_ids, (), **options)
    rows = [bf.Row([5], rules) for _ in range(8)]
    u = torch.from_numpy(np.stack([bf.row_uniforms(0, 0, i, 0, rules.room) for i in range(8)]))
    bf.force_budget(model, rows, u, 1.0)
    assert sum(row.waits for row in rows) > 4
    for row, numbers in zip(rows, u.tolist(), strict=True):
        numbers = iter(numbers)
        for r in row.rounds:
            for i, token in enumerate(r.emitted):
                number = next(numbers)
                assert i < r.min_tokens or token == int(7 * number)


# ------------------------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def tiny():
    model = bf.load_model(bf.resolve_model("tiny"))
    return model, bf.Prompter(model, rewards.make_task("countdown"), False)


def decode(tiny, count: int = 12, seed: int = 3, **options) -> list[bf.Row]:
    model, prompter = tiny
    problems = [prompter.task.problem("train", 7, i) for i in range(count)]
    options = {"max_answer": 24, "wait": "wait"} | options
    rules = bf.Rules(prompter.encode, prompter.decode, model.eos_ids, (), **options)
    rows = [bf.Row(prompter.encode(prompter.text(p)), rules) for p in problems]
    streams = [bf.row_uniforms(seed, 0, i, 0, rules.room) for i in range(count)]
    bf.force_budget(model, rows, torch.from_numpy(np.stack(streams)), 1.0)
    return rows


def test_log_probabilities_are_those_of_one_pass(tiny):
    """Cuts and appended strings at different places: the cache is as if all was read at once."""
    model, compared = tiny[0], 0
    waited, capped = decode(tiny, max_thinking=90, n_wait=2), decode(tiny, max_thinking=33)
    assert any(row.waits == 2 for row in waited) and 3 <= sum(row.forced for row in capped)
    for row in waited + capped:
        with torch.no_grad():
            logprobs = model.logits(model(torch.tensor([row.ids])))[0].log_softmax(-1)
        for i, token in enumerate(row.ids[row.start :]):
            appended = i > 0 and row.logprobs[i - 1] is None
            if row.logprobs[i] is None or appended and row.waits:
                continue  # after a Wait its distribution had no delimiter
            expected = logprobs[row.start + i - 1, token].item()
            assert row.logprobs[i] == pytest.approx(expected, abs=2e-4)
            compared += appended
    assert compared >= 10  # right after something that was appended


def test_larger_budgets_begin_as_smaller_ones(tiny):
    small, large = decode(tiny, max_thinking=20), decode(tiny, max_thinking=60)
    waits = decode(tiny, max_thinking=60, n_wait=2)
    for a, b, c in zip(small, large, waits, strict=True):
        first = [row.rounds[0].emitted for row in (a, b, c)]
        assert first[0] == first[1][: len(first[0])] and first[1] == first[2]
        assert a.record()["thinking"] <= 20
        assert b.record()["thinking"] <= 60 and c.record()["thinking"] <= 60
        assert all("</think>" in row.text() for row in (a, b, c))  # an answer always follows
        assert not a.forced or re.search(r"\n</think><answer>", a.text())


def test_rows_do_not_depend_on_their_batch(tiny):
    rows, few = (decode(tiny, n, max_thinking=60, n_wait=1) for n in (12, 5))
    assert [row.ids for row in few] == [row.ids for row in rows[:5]]


def test_without_forcing_it_is_the_sampler(tiny):
    rows = decode(tiny, 6, max_thinking=200)
    uniforms = torch.from_numpy(np.stack([bf.row_uniforms(3, 0, i, 0, 224) for i in range(6)]))
    s = bf.generate(tiny[0], [row.ids[: row.start] for row in rows], uniforms)
    for i, row in enumerate(rows):
        if not row.forced:
            assert row.ids[row.start :] == s.tokens[i, : s.lengths[i]].tolist()
    assert sum(not row.forced for row in rows) >= 3


# ------------------------------------------------------------------------------ metrics, votes


@vectors("metrics")
def test_reference_metrics(case):
    found, expected = bf.budget_metrics(case["input"]), case["expected"]
    names = {"control": "control", "performance": "performance"}
    names["scaling"] = "scaling_linear_pp_per_1000_tokens"
    names["scaling_log2"] = "scaling_log2_pp_per_doubling"
    for ours, theirs in names.items():
        assert found[ours] == pytest.approx(expected[theirs], rel=1e-9, abs=1e-12)


@vectors("voting")
def test_reference_votes(case):
    given, expected = case["input"], case["expected"]
    answers, steps = given["answers"], given["step_scores"]
    valid = [None if answer == "[invalid]" else answer for answer in answers]  # tts leaves them out
    reduced = {"last": [s[-1] for s in steps], "min": [min(s) for s in steps]}
    reduced["prod"] = [math.prod(s) for s in steps]
    reduced["avg"] = [sum(s) / len(s) for s in steps]
    assert tool.vote(answers) == expected["hf_majority"] == expected["s1_majority"]
    assert tool.vote(valid) == expected["tts_majority_vote"]
    for name in ("last", "min", "prod"):
        assert tool.best_of_n(answers, reduced[name]) == expected[f"hf_best_of_n_{name}"]
        assert tool.vote(answers, reduced[name]) == expected[f"hf_weighted_best_of_n_{name}"]
    for name in ("min", "last", "avg"):
        if f"tts_prm_{name}_max" in expected:
            assert tool.best_of_n(valid, reduced[name]) == expected[f"tts_prm_{name}_max"]
            assert tool.vote(valid, reduced[name]) == expected[f"tts_prm_{name}_vote"]


BASE = {"thinking": 1, "sampled": 1, "waits": 0, "forced": False, "answered": True, "filled": True}


def test_repair_and_flip_explain_the_gain():
    """Eq. 4 by hand: 2 of 3 wrong ones repaired, 1 of 2 right ones flipped; 2/5 becomes 3/5."""
    before, after = [1, 1, 0, 0, 0], [1, 0, 1, 1, 0]
    records = [[BASE | {"correct": bool(c)} for c in column] for column in (after, before)]
    found = bf.outcome(*records)
    assert found["repaired"] == pytest.approx(2 / 3) and found["flipped"] == 0.5
    assert found["gain"] == pytest.approx((1 - 2 / 5) * found["repaired"] - 2 / 5 * 0.5)
    assert found["gain"] == pytest.approx(0.2)
    assert found["gain_se"] == pytest.approx((0.56 / 5) ** 0.5)  # 0 -1 1 1 0: variance 0.56
    assert found["accuracy_se"] == pytest.approx((5 / 4 * 0.6 * 0.4 / 5) ** 0.5)


def test_pooled_answers():
    """Of four answers with one right: the majority is wrong, the likeliest of two right."""
    natural = []
    for answer, score in (("a", 0.1), ("b", 0.9), ("a", 0.2), (None, 0.3)):
        natural.append(BASE | {"answer": answer, "score": score, "correct": answer == "b"})
    got = {}
    for side, k in (("vote", 4), ("best", 2), ("any", 1), ("any", 4)):
        (record,) = tool.pooled(side, k, natural, 4)
        got[side, k] = record["correct"], record["thinking"]
    assert got == {("vote", 4): (0, 4), ("best", 2): (1, 2), ("any", 1): (0, 1), ("any", 4): (1, 4)}


def test_doctests():
    failed, tried = doctest.testmod(tool)
    assert tried and not failed


# --------------------------------------------------------------------------------- the script


def start(module, small, capfd, flags: str) -> SimpleNamespace:
    capfd.readouterr()
    argv = ["--model", str(small), *(MORE if module is tool else SMALL).split(), *flags.split()]
    code = bf.main(module.solve, module.Config, argv)
    return SimpleNamespace(code=code, **dict(zip(("out", "err"), capfd.readouterr(), strict=True)))


SIDES = ["cap"] * 3 + ["vote", "best", "any"] + ["wait"] * 2 + ["none", "word", "reject"]


def test_run_and_resume_of_the_tool(small, cwd, capfd, monkeypatch):
    """A run that is interrupted and resumed equals one that was not."""
    done = start(tool, small, capfd, "--out a")
    assert (done.code, done.err) == (0, "")
    assert re.search(r"^cap +control 1, performance \d", done.out, re.MULTILINE)
    rows, records = metrics_of(cwd / "a"), records_of(cwd / "a")
    sides = [re.search(r"accuracy/small/(\w+)", " ".join(row))[1] for row in rows]
    assert sides == [record["of"][1] for record in records] == SIDES
    for record, value in zip(records, (4, 8, 12), strict=False):
        assert record["of"][2] == value and all(r["thinking"] <= value for r in record["records"])
    log = bf.Run.log

    def stopped(run, step, *args, **options):
        log(run, step, *args, **options)
        run.got = 2 * (step == 4)

    monkeypatch.setattr(bf.Run, "log", stopped)
    done = start(tool, small, capfd, "--out b")
    assert done.code == 130 and "--resume b" in done.out and len(records_of(cwd / "b")) == 4
    monkeypatch.setattr(bf.Run, "log", log)
    for _ in range(2):  # the second time it prints the table again
        assert bf.main(tool.solve, tool.Config, ["--resume", "b"]) == 0
        assert metrics_of(cwd / "b") == rows and records_of(cwd / "b") == records
    samples = [(cwd / name / "samples.jsonl").read_bytes() for name in "ab"]
    assert samples[0] == samples[1]


def test_tool_and_script_write_the_same(small, cwd, capfd):
    for module, name in ((bf, "a"), (tool, "b")):
        done = start(module, small, capfd, f"--out {name}")
        assert re.search(r"^cap +control 1, performance \d", done.out, re.MULTILINE)
    ours, theirs = ({tuple(r["of"][1:3]): r for r in records_of(cwd / name)} for name in "ab")
    for setting, record in ours.items():
        others = theirs[setting]["records"]
        assert record["records"] == [other for other in others if other["sample"] == 0]
        assert record["of"] == theirs[setting]["of"]


def test_report_draws_the_tools_run(small, cwd, capfd):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install matplotlib")
    assert start(tool, small, capfd, "--out a").code == 0
    show = [f"thinking_tokens/*/{side}:sampled/*/{side}" for side in ("cap", "wait")]
    report = load("report", ROOT / "docs/report.py")
    report.main(["a", "--out", "a.svg", "--show", ",".join(show)])
    picture = (cwd / "a.svg").read_text(encoding="utf-8")
    assert all(f"thinking_tokens/*/{side} (tokens)" in picture for side in ("cap", "wait"))


def test_a_length_needs_words(small, cwd, capfd):
    done = start(tool, small, capfd, "--length_prompt")
    assert done.code == 2 and done.err.count("\n") == 1 and not list(cwd.iterdir())
    assert done.err.startswith("budget_forcing.py: error: --length_prompt: "), done.err


def tokens_of(folder: Path) -> list[list[int]]:
    return [row["tokens"] for row in lines_of(folder / "samples.jsonl")]


def test_temperature_0_draws_nothing(small, cwd, capfd):
    for name, flags in {"a": "--temperature 0", "b": "--temperature 0 --seed 1", "c": ""}.items():
        flags += f" --budget_mode per_round --caps 4,8 --waits 1 --out {name}"
        assert start(bf, small, capfd, flags).code == 0
    assert tokens_of(cwd / "a") == tokens_of(cwd / "b") != tokens_of(cwd / "c")


def test_the_text_that_opens_the_thinking(small, cwd, capfd):
    flags = "--caps 4 --waits 1 --eval_problems 1 --think_start <think>9 --out a"
    assert start(bf, small, capfd, flags).code == 0
    prompts = {row["prompt"] for row in lines_of(cwd / "a/samples.jsonl")}
    assert len(prompts) == 1 and re.fullmatch(r"[^<>]+<think>9", prompts.pop())


def test_canonical_expressions():
    same = ["(7+5)*1-2", "1*(5+7)-2", "(7+5-2/1)", "-2+(5+7)*1"]
    keys = [tool.canonical_expression(text) for text in same]
    assert keys[0] == keys[1] == keys[3] != keys[2]
    pairs = [("8/(2*3)", "8/3/2", True), ("8-2-3", "8-(3+2)", True), ("8-2", "2-8", False)]
    for one, other, equal in pairs:
        keys = [tool.canonical_expression(text) for text in (one, other)]
        assert (keys[0] == keys[1]) == equal
    assert tool.canonical_expression("1/0") is tool.canonical_expression("7*") is None


SMOLLM2 = os.environ.get("SMOLLM2", "")


@pytest.mark.skipif(not SMOLLM2, reason="SMOLLM2 names no folder: python tests/smollm2.py DIR")
def test_smollm2(cwd, capfd):
    """A delimiter of several tokens, "Wait" and a forced answer on a real model."""
    flags = "--caps 6,12 --max_new_tokens 20 --eval_problems 1 --eval_samples 1 --waits 1 --tries 1"
    argv = ["--model", SMOLLM2, *flags.split(), "--length_prompt", "--out", "a"]
    assert bf.main(tool.solve, tool.Config, argv) == 0
    rows = lines_of(cwd / "a/samples.jsonl")
    forced = [row for row in rows if "</think><answer>" in "".join(row["pieces"])]
    assert len(forced) >= 2 and re.search("^cap +control 1,", capfd.readouterr().out, re.MULTILINE)
    asked = [row["prompt"] for row in rows if "Think for up to" in row["prompt"]]
    assert "up to 6 tokens." in asked[0] and "up to 12 tokens." in asked[1]
