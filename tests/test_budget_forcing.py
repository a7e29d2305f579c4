"""budget_forcing.py: the reference's state machine (vectors/test_time.json), cache, metrics."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import vectors
from test_vectors import cases

import budget_forcing as bf
import rewards

S1 = {"think_stop": "<|im_start|>", "think_end": "<|im_start|>answer"}
S1["final_prefix"] = "\nFinal Answer:"


class Tape(torch.nn.Module):
    """The parts of Model that force_budget uses; wants to say a row's tape, token by token, or
    else its next choice there."""

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


def play(monkeypatch, tapes: list, options: list[dict], words=()):
    """Rows of the tapes, decoded together."""
    model = Tape(tapes, [*WORDS, *words])
    texts = model.encode, model.decode, model.eos_ids, ()
    rows = [bf.Row(model.encode("".join(GIVEN)), bf.Rules(*texts, **one)) for one in options]
    emit, take = bf.Decoding.emit, bf.Row.take

    def noted_emit(s, logits):
        emit(s, logits)
        model.decoding = s

    def noted_take(row, token, logprob):
        number = rows.index(row)
        model.at[number] = model.tapes[number].index(token, model.at[number]) + 1
        take(row, token, logprob)

    monkeypatch.setattr(bf.Decoding, "emit", noted_emit)
    monkeypatch.setattr(bf.Row, "take", noted_take)
    bf.force_budget(model, rows, torch.zeros(len(rows), max(row.rules.room for row in rows)), 0.0)
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
    cases, options = vectors("test_time")["budget_forcing"], []
    for given in [case["input"] for case in cases]:
        limit = given["max_gen_toks"]
        one = {"max_thinking": given["max_tokens_thinking"] or limit, "max_answer": limit}
        one |= {"n_wait": given["n_ignore"], "wait": given["ignore_str"] or ""}
        options.append(one | S1 | {"budget_mode": "per_round"})
    model, rows = play(monkeypatch, [case["input"]["tapes"]["Q0"] for case in cases], options)
    for case, row in zip(cases, rows, strict=True):
        *calls, answer = calls_of(model, row)
        record, expected, words = row.record(), case["expected"], answer["emitted"]
        seen = row.ids[1 : len(row.ids) - len(words)]  # by the answer stage
        found = {
            "final_text": "<|im_start|>think" + row.text(),
            "thinking_calls": calls,
            "answer_tokens_emitted": words,
            "answer_call_max_tokens": answer["max_tokens"],
            "tokens_sampled_in_thinking": record["thinking"],
            "delimiters_suppressed": record["waits"],
            "end_forced_by_budget": record["forced"],
            "answer_prompt_tokens": [model.words[i] for i in seen],
        }
        assert found == {name: expected[name] for name in found}, case["name"]
        assert len(row.logprobs) == len(row.ids) - row.start


@cases("test_time", "budget_forcing_readme")
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


def test_the_nth_draw_uses_the_nth_number():
    """All words are equally likely, so that a token tells which random number drew it."""
    model = Tape([], ["<|im_end|>", "</think>", "\n", "<answer>", "wait", "a", "b"])
    model.logits = lambda hidden, temperature: torch.zeros(len(hidden), 7)
    options = {"max_thinking": 20, "max_answer": 9, "n_wait": 2, "wait": "waitwait"}
    rules = bf.Rules(model.encode, model.decode, model.eos_ids, (), **options)
    rows = [bf.Row([5], rules) for _ in range(8)]
    u = torch.from_numpy(np.stack([bf.row_uniforms(0, 0, i, 0, rules.room) for i in range(8)]))
    bf.force_budget(model, rows, u, 1.0)
    assert sum(row.waits for row in rows) > 4
    for row, numbers in zip(rows, map(iter, u.tolist()), strict=True):
        for r in row.rounds:
            expected = [int(7 * next(numbers)) for _ in r.emitted]
            assert r.emitted[r.min_tokens :] == expected[r.min_tokens :]


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


@cases("test_time", "metrics")
def test_eq1_to_eq3_metrics_equal_the_reference(case):
    theirs = "control", "performance", "scaling_linear_pp_per_1000_tokens"
    expected = [case["expected"][name] for name in (*theirs, "scaling_log2_pp_per_doubling")]
    found = list(bf.budget_metrics(case["input"]).values())
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_eq4_repair_and_flip_explain_the_gain():
    """2 of 3 wrong ones repaired, 1 of 3 right ones flipped; 3/6 becomes 4/6."""
    before, after = [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0]
    same = dict.fromkeys(("thinking", "sampled", "waits", "forced", "answered", "filled"), 1)
    found = bf.outcome(*([same | {"correct": c} for c in column] for column in (after, before)))
    assert found["repaired"] == pytest.approx(2 / 3) and found["flipped"] == pytest.approx(1 / 3)
    assert found["gain"] == pytest.approx(1 / 6)
    assert found["gain_se"] == pytest.approx((17 / 36 / 6) ** 0.5)  # of 0 0 -1 1 1 0
