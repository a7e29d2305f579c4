"""rewards.py on answers that people and models write: tests/answers.jsonl, a pair a line.

A line is kind, gold, answer, whether the answer is right, and why where the verdict could be argued.
"refused": right, but not paid, since its form is not read; no line may be paid that is not right.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rewards  # noqa: E402
from more import tasks  # noqa: E402

LINES = (ROOT / "tests" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
PAIRS = [json.loads(line) for line in LINES]


def verdict(pair: dict) -> bool:
    gold, answer = pair["gold"], pair["answer"]
    if pair["kind"] == "countdown":
        text, problem = f"</think><answer>{answer}</answer>", json.loads(gold)
        return rewards.score_countdown(text, **problem)["correct"]
    if pair["kind"] == "multiplication":
        text = f"</think><answer>{answer}</answer>"
        return tasks.score_multiplication(text, **json.loads(gold))["correct"]
    if pair["kind"] == "gsm8k":
        return rewards.score_gsm8k(f"#### {answer}", gold)["correct"]
    return rewards.math_equal(gold, answer)


@pytest.mark.parametrize("kind", dict.fromkeys(pair["kind"] for pair in PAIRS))
def test_answers(kind):
    for pair in PAIRS:
        if pair["kind"] == kind:
            expected = pair["right"] and not pair.get("refused")
            assert verdict(pair) == expected, pair
            if kind not in ("countdown", "gsm8k", "multiplication"):  # equality has no direction
                assert rewards.math_equal(pair["answer"], pair["gold"]) == expected, pair


def test_the_table_is_large_and_mostly_read():
    kinds = Counter(pair["kind"] for pair in PAIRS)
    assert all(count >= 8 for count in kinds.values()) and kinds.total() >= 500
    right = [pair for pair in PAIRS if pair["right"]]
    assert sum("refused" in pair for pair in right) < 0.25 * len(right)  # rare forms, most of them
    assert len({(pair["gold"], pair["answer"]) for pair in PAIRS}) == len(PAIRS)


def test_verdicts_are_fast(monkeypatch):
    """The median within 2 ms and 99 % within 50 ms, the symbolic stage apart."""
    monkeypatch.setattr(rewards, "symbolic_equal", lambda *args: False)
    seconds = []
    for pair in PAIRS:
        started = time.process_time()
        verdict(pair)
        seconds.append(time.process_time() - started)
    seconds.sort()
    assert seconds[len(seconds) // 2] < 0.002 and seconds[int(0.99 * len(seconds))] < 0.05
