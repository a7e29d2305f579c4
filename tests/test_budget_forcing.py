"""budget_forcing.py: the reference's state machine, its cache against recomputation, metrics, votes; the script."""

import doctest
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
from conftest import lines_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import budget_forcing as bf  # noqa: E402
import rewards  # noqa: E402

PATH = Path(os.environ.get("VECTORS") or Path(__file__).parent / "vectors") / "test_time.json"
VECTORS = json.loads(PATH.read_text(encoding="utf-8")) if PATH.is_file() else {}
S1 = {"think_stop": "<|im_start|>", "think_end": "<|im_start|>answer", "final_prefix": "\nFinal Answer:"}
SMALL = "--caps 4,8,12 --max_new_tokens 20 --eval_problems 3 --eval_samples 2 --waits 1,2 --tries 2"


def vectors(section: str):
    found = VECTORS.get(section, [])
    return pytest.mark.parametrize("case", found, ids=[case["name"] for case in found])


# ---------------------------------------------------------------------------------------- the scripted model


class Tape(torch.nn.Module):
    """A model that wants to say a row's tape, token by token; where one is forbidden it takes its next choice. It has
    the parts of Model that force_budget uses, so the rows go through the loop that decodes real models.
    """

    is_tiny, head_dim, compute_dtype, vocab_bias = False, 1, None, None

    def __init__(self, tapes: list[list[str]], words: list[str]):
        super().__init__()
        self.words = words + sorted({word for tape in tapes for word in tape} - set(words))
        self.tapes = [[self.words.index(word) for word in tape] for tape in tapes]
        self.at = [0] * len(tapes)
        self.config = {"vocab_size": len(self.words), "num_hidden_layers": 1, "num_key_value_heads": 1}
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

    def forward(self, tokens, cache):  # the cache notes what it was fed: keys are the ids themselves
        cache.append(0, *(tokens[:, None, :, None].float(),) * 2)
        cache.lengths += tokens.shape[1]
        return tokens[..., None].float()

    def logits(self, hidden, temperature):
        wanted = torch.full((len(self.rows), len(self.words)), -1e4)
        for i, row in enumerate(self.rows):
            for rank, token in enumerate(self.tapes[row][self.at[row] :]):
                wanted[i, token] = max(wanted[i, token], -10.0 * rank)
        return wanted


def play(monkeypatch, tapes: list[list[str]], options: list[dict], words=(), given=("Q", "<|im_start|>", "think")):
    """Rows of the tapes, decoded together; also asserts that the cache held each row's ids before every draw."""
    model = Tape(tapes, ["<|im_start|>", "<|im_end|>", "\n", "answer", "Final", " Answer", ":", *given, *words])
    ids = [model.words.index(word) for word in given]
    rows = [bf.Row(ids, bf.Rules(model.encode, model.decode, model.eos_ids, **o)) for o in options]
    emit, drop = bf.emit, bf.Decoding.drop_finished

    def watched_emit(s, logits):
        emit(s, logits)
        for i, (row, token) in enumerate(zip(s.rows.tolist(), s.last[:, 0].tolist(), strict=True)):
            if not rows[row].done:
                model.at[row] = model.tapes[row].index(token, model.at[row]) + 1
                cached = s.cache.keys[0, i, 0, : s.cache.lengths[i], 0]
                assert cached.long().tolist() == rows[row].ids  # nothing is missing, nothing is left over

    def watched_drop(s):
        drop(s)
        model.rows = s.rows.tolist()

    monkeypatch.setattr(bf, "emit", watched_emit)
    monkeypatch.setattr(bf.Decoding, "drop_finished", watched_drop)
    model.rows = list(range(len(rows)))  # those in the batch
    longest = max(row.rules.most_sampled for row in rows)
    bf.force_budget(model, rows, torch.zeros(len(rows), longest), temperature=0.0)
    assert all(row.done for row in rows)
    return model, rows


def limits(case: dict) -> dict:
    given = case["input"]
    cap = given["max_tokens_thinking"] or given["max_gen_toks"]
    options = {"max_thinking": cap, "max_answer": given["max_gen_toks"], "n_wait": given["n_ignore"]}
    return options | {"wait": given["ignore_str"] or "", "mode": "per_round"} | S1


def compare(model: Tape, row: "bf.Row", expected: dict) -> None:
    calls = [{"max_tokens": r.max_tokens, "min_tokens": r.min_tokens, "finish": r.finish} for r in row.rounds]
    emitted = [[model.words[i] for i in r.emitted] for r in row.rounds]
    assert "<|im_start|>think" + row.text() == expected["final_text"]
    assert [c | {"emitted": e} for c, e in zip(calls[:-1], emitted, strict=False)] == expected["thinking_calls"]
    assert len(calls) - 1 == expected["n_thinking_calls"] and emitted[-1] == expected["answer_tokens_emitted"]
    assert row.thinking_tokens == expected["tokens_sampled_in_thinking"]
    assert row.waits == expected["delimiters_suppressed"] and row.forced == expected["end_forced_by_budget"]
    assert calls[-1]["max_tokens"] == expected["answer_call_max_tokens"]
    # what the answer stage saw: all but what it wrote itself
    seen = [model.words[i] for i in row.ids[1 : len(row.ids) - len(emitted[-1])]]
    assert seen == expected["answer_prompt_tokens"]
    assert row.was_cut == expected["tokens_fed_to_answer_stage_were_cut"]
    assert len(row.sampled) == len(row.logprobs) == len(row.ids) - row.start


WORDS = ("Wait", "Hmm")


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
    options = {"max_thinking": given["max_tokens_thinking"], "n_wait": given["num_ignore"], "wait": given["wait"]}
    options |= {"max_answer": 32768, "think_stop": "<|im_start|>", "think_end": "", "final_prefix": ""}
    model, (row,) = play(monkeypatch, [given["tape"]], [options], WORDS)
    assert "<|im_start|>think" + row.text() == expected["generated_text"] and row.waits == expected["waits_inserted"]
    calls = [{"max_tokens": r.max_tokens, "min_tokens": r.min_tokens, "finish": r.finish} for r in row.rounds]
    emitted = [[model.words[i] for i in r.emitted] for r in row.rounds]
    assert [c | {"emitted": e} for c, e in zip(calls, emitted, strict=True)] == expected["calls"]


@vectors("rejection_sampling")
def test_reference_rejection(monkeypatch, case):
    options = {"max_thinking": case["input"]["max_tokens_thinking"], "max_answer": 9, "mode": "reject", "tries": 5} | S1
    _, (row,) = play(monkeypatch, [case["input"]["tape"]], [options])
    expected, tries = case["expected"], row.rounds[:-1]
    assert "<|im_start|>think" + row.text() == expected["final_text"]
    assert [len(r.emitted) for r in tries] == expected["tokens_per_try"] and len(tries) == expected["tries"]
    assert {r.max_tokens for r in tries} == {expected["call_max_tokens"]}


def test_rejection_gives_up(monkeypatch):
    options = {"max_thinking": 1, "max_answer": 9, "mode": "reject", "tries": 2} | S1
    _, (row,) = play(monkeypatch, [["a", "<|im_start|>", "b", "c", "d"]], [options])
    assert row.done and row.thinking and row.text() == "" and [len(r.emitted) for r in row.rounds] == [2, 2]


def test_delimiter_of_several_tokens(monkeypatch):
    """A delimiter of three tokens, the first of which also ends a sentence: what precedes the delimiter stays."""
    options = {"max_thinking": 20, "max_answer": 9, "n_wait": 1, "wait": "Wait", "think_end": "</think>"}
    tape = ["a", ".</", "think", ">", "b", "</", "think", ">", "<answer>", "c", "<|im_end|>"]
    model, (row,) = play(monkeypatch, [tape], [options], (*WORDS, "</", "think", ">", ".", "<answer>"))
    assert row.text() == "a.Waitb</think><answer>c"
    assert row.waits == 1 and row.thinking_tokens == 8 and not row.forced
    assert [model.words[i] for i in row.ids[row.start :]][:4] == ["a", ".", "Wait", "b"]


# ------------------------------------------------------------------------------------------------ a real model


@pytest.fixture(scope="module")
def tiny():
    model = bf.load_model(bf.resolve_model("tiny"))
    return model, bf.Prompter(model, rewards.make_task("countdown"), False)


def decode(tiny, count: int = 12, seed: int = 3, **options) -> list["bf.Row"]:
    model, prompter = tiny
    problems = [prompter.task.problem("train", 7, i) for i in range(count)]
    rules = bf.Rules(prompter.encode, prompter.decode, model.eos_ids, **({"max_answer": 24, "wait": "wait"} | options))
    rows = [bf.Row(prompter.encode(prompter.text(p)), rules) for p in problems]
    streams = [bf.row_uniforms(seed, 0, i, 0, rules.most_sampled) for i in range(count)]
    bf.force_budget(model, rows, torch.from_numpy(np.stack(streams)))
    return rows


def test_log_probabilities_are_those_of_one_pass(tiny):
    """Cuts, appended strings and several tokens at different offsets: the cache is as if all had been read at once."""
    model, compared = tiny[0], 0
    waited, capped = decode(tiny, max_thinking=90, n_wait=2), decode(tiny, max_thinking=33)
    assert any(row.waits == 2 for row in waited) and 3 <= sum(row.forced for row in capped)
    for row in waited + capped:
        with torch.no_grad():
            logprobs = model.logits(model(torch.tensor([row.ids])))[0].log_softmax(-1)
        for i, token in enumerate(row.ids[row.start :]):
            held = row.waits and i and not row.sampled[i - 1]  # its distribution had no delimiter
            if row.sampled[i] and not held:
                assert row.logprobs[i] == pytest.approx(logprobs[row.start + i - 1, token].item(), abs=2e-4)
                compared += not row.sampled[i - 1]
    assert compared >= 10  # right behind something appended


def test_larger_budgets_begin_as_smaller_ones(tiny):
    small, large = decode(tiny, max_thinking=20), decode(tiny, max_thinking=60)
    waits = decode(tiny, max_thinking=60, n_wait=2)
    for a, b, c in zip(small, large, waits, strict=True):
        first = [r.rounds[0].emitted for r in (a, b, c)]
        assert first[0] == first[1][: len(first[0])] and first[1] == first[2]
        assert a.thinking_tokens <= 20 and b.thinking_tokens <= 60 and c.thinking_tokens <= 60
        assert all("</think>" in row.text() for row in (a, b, c))  # an answer always follows
        assert not a.forced or re.search(r"\n</think><answer>", a.text())


def test_rows_do_not_depend_on_their_batch(tiny):
    rows = decode(tiny, max_thinking=60, n_wait=1)
    assert [row.ids for row in decode(tiny, 5, max_thinking=60, n_wait=1)] == [row.ids for row in rows[:5]]


def test_without_forcing_it_is_the_sampler(tiny):
    model, prompter = tiny
    rows = decode(tiny, 6, max_thinking=400, max_answer=24)
    uniforms = torch.from_numpy(np.stack([bf.row_uniforms(3, 0, i, 0, 424) for i in range(6)]))
    s = bf.generate(model, [row.ids[: row.start] for row in rows], uniforms)
    for i, row in enumerate(rows):
        if not row.forced:
            assert row.ids[row.start :] == s.tokens[i, : s.lengths[i]].tolist()
    assert sum(not row.forced for row in rows) >= 4


# -------------------------------------------------------------------------------------------- metrics and votes


@vectors("metrics")
def test_reference_metrics(case):
    found, expected = bf.budget_metrics(case["input"]), case["expected"]
    for ours, theirs in (
        ("control", "control"), ("performance", "performance"), ("scaling", "scaling_linear_pp_per_1000_tokens"),
        ("scaling_log2", "scaling_log2_pp_per_doubling"),
    ):  # fmt: skip
        assert found[ours] == pytest.approx(expected[theirs], rel=1e-9, abs=1e-12)


@vectors("voting")
def test_reference_votes(case):
    answers, steps, expected = case["input"]["answers"], case["input"]["step_scores"], case["expected"]
    valid = [None if answer == "[invalid]" else answer for answer in answers]  # the tts code leaves them out
    reduced = {"last": [s[-1] for s in steps], "min": [min(s) for s in steps], "prod": [math.prod(s) for s in steps]}
    reduced["avg"] = [sum(s) / len(s) for s in steps]
    assert bf.vote(answers) == expected["hf_majority"] == expected["s1_majority"]
    assert bf.vote(valid) == expected["tts_majority_vote"]
    for name in ("last", "min", "prod"):
        assert bf.best_of_n(answers, reduced[name]) == expected[f"hf_best_of_n_{name}"]
        assert bf.vote(answers, reduced[name]) == expected[f"hf_weighted_best_of_n_{name}"]
    for name in ("min", "last", "avg"):
        if f"tts_prm_{name}_max" in expected:
            assert bf.best_of_n(valid, reduced[name]) == expected[f"tts_prm_{name}_max"]
            assert bf.vote(valid, reduced[name]) == expected[f"tts_prm_{name}_vote"]


def test_repair_and_flip_explain_the_gain():
    """Eq. 4 by hand: 1 of 3 wrong ones repaired, 1 of 2 right ones flipped; 2/5 stays 2/5."""
    base = {"thinking": 1, "sampled": 1, "waits": 0, "forced": False, "answered": True, "filled": True}
    before, after = [1, 1, 0, 0, 0], [1, 0, 1, 0, 0]
    records = [[base | {"correct": bool(c)} for c in column] for column in (after, before)]
    found = bf.outcome(*records)
    assert found["repaired"] == pytest.approx(1 / 3) and found["flipped"] == 0.5 and found["gain"] == 0
    f0 = 2 / 5
    assert found["gain"] == pytest.approx((1 - f0) * found["repaired"] - f0 * found["flipped"])


def test_doctests():
    failed, tried = doctest.testmod(bf)
    assert tried and not failed


# -------------------------------------------------------------------------------------------------- the script


def start(small, cwd, capfd, flags: str):
    capfd.readouterr()
    code = bf.main(bf.solve, bf.Config, ["--model", str(small), *SMALL.split(), *flags.split()])
    return SimpleNamespace(code=code, **dict(zip(("out", "err"), capfd.readouterr(), strict=True)))


def without_times(folder: Path) -> list[dict]:
    rows = lines_of(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in rows]


def test_run_and_resume(small, cwd, capfd, monkeypatch):
    """Control is 100 % by construction; a run that is interrupted and resumed equals one that was not."""
    done = start(small, cwd, capfd, "--out a")
    assert (done.code, done.err) == (0, "")
    for word in ("Control 100 %", "per doubling", "Performance", "docs/report.py a", "repaired", "CPU time"):
        assert word in done.out, word
    rows = without_times(cwd / "a")
    sides = [re.search(r"accuracy/small/(\w+)", " ".join(row))[1] for row in rows]
    assert sides == ["cap"] * 3 + ["vote", "best", "any"] + ["wait"] * 2 + ["none", "word", "reject"]
    assert rows[0]["thinking_tokens/small/cap"] <= 4
    sys.path.insert(0, str(bf.Path(bf.__file__).parent / "docs"))
    import report

    report.main(["a"])
    page = (cwd / "a" / "report.html").read_text(encoding="utf-8")
    assert page.count('class="panels one"') == 2 and "budgets below" in page and "extended, or k samples" in page

    log = bf.Run.log

    def stopped(run, step, *args, **options):
        log(run, step, *args, **options)
        run.signal = 2 * (step == 5)

    monkeypatch.setattr(bf.Run, "log", stopped)
    done = start(small, cwd, capfd, "--out b")
    assert done.code == 130 and "--resume b" in done.out
    monkeypatch.setattr(bf.Run, "log", log)
    (cwd / "b" / "step-000005" / "records.json").write_text("{")  # cut off: the one before counts
    assert bf.main(bf.solve, bf.Config, ["--resume", "b"]) == 0
    assert without_times(cwd / "b") == rows
    assert (cwd / "a" / "samples.jsonl").read_bytes() == (cwd / "b" / "samples.jsonl").read_bytes()


def test_ranks(small, cwd, monkeypatch):
    """Two ranks give the metrics of one."""
    assert bf.main(bf.solve, bf.Config, ["--model", str(small), *SMALL.split(), "--out", "a"]) == 0
    ranks, codes = conftest.ThreadRanks(2), [None] * 2

    class Run(bf.Run):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.rank, self.world = ranks.local.rank, 2

    def work(rank: int) -> None:
        ranks.local.rank = rank
        codes[rank] = bf.main(bf.solve, bf.Config, ["--model", str(small), *SMALL.split(), "--out", "b"])

    monkeypatch.setattr(bf, "dist", ranks)
    monkeypatch.setattr(bf, "Run", Run)
    monkeypatch.setenv("WORLD_SIZE", "2")
    threads = [conftest.threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0] and without_times(cwd / "a") == without_times(cwd / "b")


@pytest.mark.slow
def test_torchrun_with_two_ranks(small, cwd):
    """Two processes share the problems; the rows are those of one."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = conftest.finish(conftest.start("budget_forcing", f"--model {small} {SMALL} --out two", cwd, launch))
    assert done.code == 0 and done.out.count("folder two") == 1, done.err
    assert bf.main(bf.solve, bf.Config, ["--model", str(small), *SMALL.split(), "--out", "one"]) == 0
    assert without_times(cwd / "one") == without_times(cwd / "two")
    assert json.loads((cwd / "two" / "run.json").read_text(encoding="utf-8"))["ranks"] == 2


def test_check_and_modes(small, cwd, capfd):
    done = start(small, cwd, capfd, "--check --budget_mode per_round --temperature 0")
    assert (done.code, done.err) == (0, "") and "check passed" in done.out and not list(cwd.iterdir())


def test_canonical_expressions():
    same = ["(7+5)*1-2", "1*(5+7)-2", "(7+5-2/1)", "-2+(5+7)*1"]
    keys = [rewards.canonical_expression(text) for text in same]
    assert keys[0] == keys[1] == keys[3] != keys[2]
    assert rewards.canonical_expression("8/(2*3)") == rewards.canonical_expression("8/3/2")
    assert rewards.canonical_expression("8-2-3") == rewards.canonical_expression("8-(3+2)")
    assert rewards.canonical_expression("8-2") != rewards.canonical_expression("2-8")
    assert rewards.canonical_expression("1/0") is rewards.canonical_expression("7*") is None


SMOLLM2 = os.environ.get("SMOLLM2", "")


@pytest.mark.skipif(not SMOLLM2, reason="SMOLLM2 names no folder: python tests/smollm2.py DIR")
def test_smollm2(cwd, capfd):
    """A delimiter of several tokens, "Wait" and a forced answer on a real model."""
    flags = "--caps 6,12 --max_new_tokens 20 --eval_problems 1 --eval_samples 1 --waits 1 --tries 1 --length_prompt"
    assert bf.main(bf.solve, bf.Config, ["--model", SMOLLM2, *flags.split(), "--out", "a"]) == 0
    rows = lines_of(cwd / "a" / "samples.jsonl")
    forced = [row for row in rows if "</think><answer>" in "".join(row["pieces"])]
    assert len(forced) >= 2 and "Control 100 %" in capfd.readouterr().out
