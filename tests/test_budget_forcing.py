"""budget_forcing.py and its baselines: the reference's state machine, the cache, metrics, votes."""

import doctest
import importlib.util
import math
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, lines_of, metrics_of, records_of, vectors

import budget_forcing as bf
import rewards

PATH = ROOT / "docs/experiments/budget_forcing.py"  # of the script's name
spec = importlib.util.spec_from_file_location("budget_forcing_baselines", PATH)
tool = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
VECTORS = vectors("test_time")
S1 = {"think_stop": "<|im_start|>", "think_end": "<|im_start|>answer"}
S1["final_prefix"] = "\nFinal Answer:"


def cases(section: str):
    found = VECTORS.get(section, [])
    return pytest.mark.parametrize("case", found, ids=[case["name"] for case in found])


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
        self.model = SimpleNamespace(layers=[])
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

    def forward(self, tokens, cache):
        return tokens[..., None].float()

    def logits(self, hidden, temperature):
        rows = range(len(self.tapes)) if self.decoding is None else self.decoding.rows.tolist()
        wanted = torch.full((len(rows), len(self.words)), -1e4)
        for i, row in enumerate(rows):
            for rank, token in enumerate(self.tapes[row][self.at[row] :]):
                wanted[i, token] = max(wanted[i, token], -10.0 * rank)
        return wanted


GIVEN = "Q", "<|im_start|>", "think"
WORDS = "<|im_end|>", "\n", "answer", "Final", " Answer", ":", "Wait", "Hmm", *GIVEN


def play(monkeypatch, tapes: list, options: list[dict], words=(), kind=bf.Row, tries: int = 1):
    """Rows of the tapes, decoded together."""
    model = Tape(tapes, [*WORDS, *words])
    texts = model.encode, model.decode, model.eos_ids, ()
    rows = [kind(model.encode("".join(GIVEN)), bf.Rules(*texts, **one)) for one in options]
    emit, take = bf.Decoding.emit, kind.take

    def noted_emit(s, logits):
        emit(s, logits)
        model.decoding = s

    def noted_take(row, token, logprob):
        number = rows.index(row)
        model.at[number] = model.tapes[number].index(token, model.at[number]) + 1
        take(row, token, logprob)

    monkeypatch.setattr(bf.Decoding, "emit", noted_emit)
    monkeypatch.setattr(kind, "take", noted_take)
    for row in rows:
        row.rules.tries = tries
    room = tries * max(row.rules.room for row in rows)
    bf.force_budget(model, rows, torch.zeros(len(rows), room), 0.0)
    assert all(row.done for row in rows)
    return model, rows


def calls_of(model: Tape, row: bf.Row) -> list[dict]:
    calls = []
    for r in row.rounds:
        call = {name: getattr(r, name) for name in ("max_tokens", "min_tokens", "finish")}
        calls.append(call | {"emitted": [model.words[i] for i in r.emitted]})
    return calls


def test_sec31_evaluation_code_equals_the_reference(monkeypatch):
    """All cases as the rows of one batch: budgets, Waits and phases differ from row to row."""
    cases, options = VECTORS.get("budget_forcing", []), []
    for given in [case["input"] for case in cases]:
        cap, limit = given["max_tokens_thinking"], given["max_gen_toks"]
        one = {"max_thinking": cap or limit, "max_answer": limit, "n_wait": given["n_ignore"]}
        one |= {"wait": given["ignore_str"] or "", "budget_mode": "per_round"}
        options.append(one | S1)
    if not cases:
        pytest.skip("tests/vectors/test_time.json is not there")
    tapes = [case["input"]["tapes"]["Q0"] for case in cases]
    model, rows = play(monkeypatch, tapes, options)
    for case, row in zip(cases, rows, strict=True):
        *calls, answer = calls_of(model, row)
        record, expected, words = row.record(), case["expected"], answer["emitted"]
        found = {
            "final_text": "<|im_start|>think" + row.text(),
            "thinking_calls": calls,
            "answer_tokens_emitted": words,
            "answer_call_max_tokens": answer["max_tokens"],
            "tokens_sampled_in_thinking": record["thinking"],
            "delimiters_suppressed": record["waits"],
            "end_forced_by_budget": record["forced"],
            # what the answer stage saw: all but what it wrote itself
            "answer_prompt_tokens": [
                model.words[i] for i in row.ids[1 : len(row.ids) - len(words)]
            ],
        }
        assert found == {name: expected[name] for name in found}, case["name"]
        assert len(row.logprobs) == len(row.ids) - row.start


@cases("budget_forcing_readme")
def test_sec31_global_budget_equals_the_reference(monkeypatch, case):
    """Its loop appends no boundary: with empty strings the same machine is that procedure."""
    given, expected = case["input"], case["expected"]
    options = {"max_thinking": given["max_tokens_thinking"], "n_wait": given["num_ignore"]}
    options |= {"wait": given["wait"], "max_answer": 32768, "final_prefix": ""}
    options |= {"think_stop": "<|im_start|>", "think_end": ""}
    model, (row,) = play(monkeypatch, [given["tape"]], [options])
    assert "<|im_start|>think" + row.text() == expected["generated_text"]
    assert row.waits == expected["waits_inserted"]
    assert calls_of(model, row) == expected["calls"]


@cases("rejection_sampling")
def test_rejection_sampling_equals_the_reference(monkeypatch, case):
    options = {"max_thinking": case["input"]["max_tokens_thinking"], "max_answer": 9} | S1
    _, (row,) = play(monkeypatch, [case["input"]["tape"]], [options], kind=tool.Rejected, tries=5)
    expected, tries = case["expected"], row.rounds[:-1]
    assert "<|im_start|>think" + row.text() == expected["final_text"]
    assert [len(r.emitted) for r in tries] == expected["tokens_per_try"]
    assert len(tries) == expected["tries"] and row.record()["filled"]
    assert {r.max_tokens for r in tries} == {expected["call_max_tokens"]}


def test_delimiter_of_several_tokens(monkeypatch):
    """Of three tokens, the first of which also ends a sentence: what precedes them stays."""
    options = {"max_thinking": 20, "max_answer": 9, "n_wait": 1, "wait": "Wait"}
    tape = ["a", ".</", "think", ">", "b", "</", "think", ">", "<answer>", "c", "<|im_end|>"]
    words = "</", "think", ">", ".", "<answer>"
    model, (row,) = play(monkeypatch, [tape], [options], words)
    assert row.text() == "a.Waitb</think><answer>c"
    assert row.waits == 1 and row.record()["thinking"] == 8 and not row.forced
    assert [model.words[i] for i in row.ids[row.start :]][:4] == ["a", ".", "Wait", "b"]


def test_sec31_the_budget_ends(monkeypatch):
    """By a delimiter, which gets no Wait then; appended Waits are no thinking."""
    tape, end = ["a", "<|im_start|>", "b", "<|im_start|>", *"cdef"], ["<|im_end|>"]
    options = {"max_thinking": 2, "max_answer": 9, "n_wait": 2, "wait": "WaitWait"} | S1
    _, (row, other) = play(monkeypatch, [tape + end] * 2, [options, options | {"max_thinking": 6}])
    assert (row.waits, row.forced) == (0, False) and row.text().startswith("a<|im_start|>answerb")
    assert (other.waits, other.forced, other.record()["thinking"]) == (2, True, 6)


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
    for row, numbers in zip(rows, map(iter, u.tolist()), strict=True):
        for r in row.rounds:
            for i, token in enumerate(r.emitted):
                number = next(numbers)
                assert i < r.min_tokens or token == int(7 * number)


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
    cut = decode(tiny, max_thinking=20, n_wait=2, budget_mode="per_round")
    for row in waited + capped + cut:
        with torch.no_grad():
            logprobs = model.logits(model(torch.tensor([row.ids])))[0].log_softmax(-1)
        for i, token in enumerate(row.ids[row.start :]):
            appended = i > 0 and row.logprobs[i - 1] is None
            if row.logprobs[i] is None or appended and row.waits:
                continue  # after a Wait its distribution had no delimiter
            expected = logprobs[row.start + i - 1, token].item()
            assert row.logprobs[i] == pytest.approx(expected, abs=1e-3)
            compared += appended
    assert compared >= 10  # right after something that was appended


def test_larger_budgets_begin_as_smaller_ones(tiny):
    """Waits too; and a row does not depend on the others of its batch."""
    small, large = decode(tiny, max_thinking=20), decode(tiny, max_thinking=60)
    waits, few = (decode(tiny, n, max_thinking=60, n_wait=2) for n in (12, 5))
    assert [row.ids for row in few] == [row.ids for row in waits[:5]]
    for a, b, c in zip(small, large, waits, strict=True):
        first = [row.rounds[0].emitted for row in (a, b, c)]
        assert first[0] == first[1][: len(first[0])] and first[1] == first[2]
        for row, limit in ((a, 20), (b, 60), (c, 60)):
            assert row.record()["thinking"] <= limit
            assert "</think>" in row.text()  # an answer always follows
        assert not a.forced or re.search(r"\n</think><answer>", a.text())


def test_without_forcing_it_is_the_sampler(tiny):
    rows = decode(tiny, 6, max_thinking=100)
    uniforms = torch.tensor(np.stack([bf.row_uniforms(3, 0, i, 0, 124) for i in range(6)]))
    s = bf.generate(tiny[0], [row.ids[: row.start] for row in rows], uniforms)
    assert sum(not row.forced for row in rows) >= 2
    for i, row in enumerate(rows):
        written = s.tokens[i, : s.lengths[i]].tolist()
        assert row.forced or row.ids[row.start :] == written


@cases("metrics")
def test_eq1_to_eq3_metrics_equal_the_reference(case):
    found, expected = bf.budget_metrics(case["input"]), case["expected"]
    names = "control", "performance", "scaling", "scaling_log2"
    theirs = "control", "performance", "scaling_linear_pp_per_1000_tokens"
    for name, other in zip(names, (*theirs, "scaling_log2_pp_per_doubling"), strict=True):
        assert found[name] == pytest.approx(expected[other], rel=1e-9, abs=1e-12)


@cases("voting")
def test_votes_equal_the_reference(case):
    given, expected = case["input"], case["expected"]
    answers, steps = given["answers"], given["step_scores"]
    valid = [None if answer == "[invalid]" else answer for answer in answers]  # tts leaves them out
    reduced = {"last": [s[-1] for s in steps], "min": [min(s) for s in steps]}
    reduced["prod"] = [math.prod(s) for s in steps]
    assert tool.vote(answers) == expected["hf_majority"]
    assert tool.vote(valid) == expected["tts_majority_vote"]
    for name, scores in reduced.items():
        assert tool.best_of_n(answers, scores) == expected[f"hf_best_of_n_{name}"]
        assert tool.vote(answers, scores) == expected[f"hf_weighted_best_of_n_{name}"]
        if f"tts_prm_{name}_max" in expected:
            assert tool.best_of_n(valid, scores) == expected[f"tts_prm_{name}_max"]
            assert tool.vote(valid, scores) == expected[f"tts_prm_{name}_vote"]


BASE = {"thinking": 1, "sampled": 1, "waits": 0, "forced": False, "answered": True, "filled": True}


def test_eq4_repair_and_flip_explain_the_gain():
    """2 of 3 wrong ones repaired, 1 of 2 right ones flipped; 2/5 becomes 3/5."""
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


def start(module, small, capfd, flags: str) -> SimpleNamespace:
    given = "--caps 4,8,12 --max_new_tokens 20 --eval_problems 3 --waits 1,2"
    if module is tool:
        given += " --eval_samples 2 --tries 2"
    argv = ["--model", str(small), *given.split(), *flags.split()]
    capfd.readouterr()
    code = bf.main(module.solve, module.Config, argv)
    return SimpleNamespace(code=code, **dict(zip(("out", "err"), capfd.readouterr(), strict=True)))


SIDES = ["cap"] * 3 + ["vote", "best", "any"] + ["wait"] * 2 + ["none", "word", "reject"]


def test_runs_of_the_tool(small, cwd, capfd, monkeypatch):
    """One that is interrupted and resumed equals one that was not; the script writes the same."""
    done = start(tool, small, capfd, "--out a")
    assert (done.code, done.err) == (0, "")
    refused = start(tool, small, capfd, "--length_prompt")
    assert refused.code == 2 and "error: --length_prompt: " in refused.err  # it has no words
    assert re.search(r"^cap +control 1, performance \d", done.out, re.MULTILINE)
    records = records_of(cwd / "a")
    assert [record["of"][1] for record in records] == SIDES
    for record in records[:3]:
        assert all(r["thinking"] <= record["of"][2] for r in record["records"])

    log = bf.Run.log

    def stopped(run, step, *args, **options):
        log(run, step, *args, **options)
        run.got = 2 * (step == 4)

    with monkeypatch.context() as patch:
        patch.setattr(bf.Run, "log", stopped)
        assert start(tool, small, capfd, "--out b").code == 130
    assert len(records_of(cwd / "b")) == 4
    assert bf.main(tool.solve, tool.Config, ["--resume", "b"]) == 0
    assert metrics_of(cwd / "b") == metrics_of(cwd / "a") and records_of(cwd / "b") == records
    samples = [(cwd / name / "samples.jsonl").read_bytes() for name in "ab"]
    assert samples[0] == samples[1]

    assert start(bf, small, capfd, "--out c").code == 0
    others = {tuple(record["of"][1:3]): record for record in records}
    for record in records_of(cwd / "c"):
        other = others[tuple(record["of"][1:3])]
        assert record["of"] == other["of"]
        assert record["records"] == [r for r in other["records"] if r["sample"] == 0]


def test_temperature_0_draws_nothing_and_another_opening_of_the_thinking(small, cwd, capfd):
    tokens, runs = {}, {"a": "--temperature 0", "b": "--temperature 0 --seed 1", "c": ""}
    for name, flags in runs.items():
        flags += " --budget_mode per_round --caps 4,8 --waits 1 --think_start <think>9"
        assert start(bf, small, capfd, f"{flags} --out {name}").code == 0
        rows = lines_of(cwd / name / "samples.jsonl")
        tokens[name] = [row["tokens"] for row in rows]
        assert all(re.fullmatch(r"[^<>]+<think>9", row["prompt"]) for row in rows)
    assert tokens["a"] == tokens["b"] != tokens["c"]


def test_canonical_expressions():
    key = tool.canonical_expression
    assert key("(7+5)*1-2") == key("-2+(5+7)*1") != key("(7+5-2/1)")
    assert key("8/(2*3)") == key("8/3/2") and key("8-2-3") == key("8-(3+2)")
    assert key("8-2") != key("2-8") and key("1/0") is key("7*") is None


SMOLLM2 = os.environ.get("SMOLLM2", "")


@pytest.mark.skipif(not SMOLLM2, reason="SMOLLM2 names no folder: python tests/smollm2.py DIR")
def test_smollm2(cwd):
    """A delimiter of several tokens, "Wait" and a forced answer on a real model."""
    flags = "--caps 6,12 --max_new_tokens 20 --eval_problems 1 --eval_samples 1 --waits 1 --tries 1"
    argv = ["--model", SMOLLM2, *flags.split(), "--length_prompt", "--out", "a"]
    assert bf.main(tool.solve, tool.Config, argv) == 0
    rows = lines_of(cwd / "a/samples.jsonl")
    assert sum("</think><answer>" in "".join(row["pieces"]) for row in rows) >= 2
    asked = [row["prompt"] for row in rows if "Think for up to" in row["prompt"]]
    assert "up to 6 tokens." in asked[0] and "up to 12 tokens." in asked[1]
