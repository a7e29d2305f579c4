"""Verifiers, shaped rewards and tasks: text and arithmetic, the one module that scripts share.

The reward of a completion is rule based (arXiv:2501.12948 sec. 2.2), with a small weight on layout:

    total = correct + 0.1 * format                                  (eq. 1)

*format* is strict: one <think> block, white space, one non-empty <answer> block, the end. *correct*
is lenient about layout and exact about value: the last complete <answer> block after the last
</think> counts. Prompts end in <think>, so a completion starts inside the thinking block.

Model text is hostile input, optimised against these functions. Neither Python nor sympy's parsers
evaluate it: after limits on length and size, a tokenizer per grammar and one shunting-yard do.
Only the symbolic stage of `math_equal` leaves this process: it asks a child that ends when late.
"""

import faulthandler
import functools
import hashlib
import itertools
import json
import math
import operator
import os
import random
import re
import sys
import threading
import time
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from fractions import Fraction
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pickle import UnpicklingError
from statistics import stdev
from subprocess import DEVNULL, PIPE, Popen
from typing import get_type_hints

from jinja2 import TemplateError
from safetensors import SafetensorError

MODELS = Path(__file__).resolve().parent / "models"  # the tiny models that default runs start from


class BadInput(ValueError):
    """Something that the user gave is wrong; the message is one line: what, and what to do."""


UNREADABLE = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)
UNREADABLE += (SafetensorError, TemplateError, UnpicklingError)
ANYTHING = Exception, SystemExit  # what a user's file can raise while it is executed


@contextmanager
def reading(what: object, errors: tuple = UNREADABLE) -> Iterator[None]:
    """Where a library reads what the user gave: its error becomes one line, `what` and the text."""
    try:
        yield
    except errors as error:
        if isinstance(error, BadInput):
            raise
        text = " ".join(str(error).split())[:300]
        name = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__} "
        raise BadInput(f"{what}: {name}{text}") from None


def read_json(path: Path) -> dict:
    """The object in a JSON file; BadInput names the file."""
    with reading(path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def trim_log(path: Path, last: int) -> None:
    """Drop what a JSONL log holds of steps after `last`, and half a line at its end."""
    with reading(path):
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        kept = [line + "\n" for line in lines if json.loads(line)["step"] <= last]
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text("".join(kept), encoding="utf-8")
        unfinished.replace(path)  # whole, or as it was


def resolve_model(name: str) -> Path:
    """The folder of a model: itself, one of models/, or from the hub (OWNER/NAME, Qwen, SmolLM)."""
    for folder in (Path(name).expanduser(), MODELS / name):
        if folder.is_dir():
            return folder
    from huggingface_hub import snapshot_download  # slow to import

    owner = "Qwen" if name.startswith("Qwen") else "HuggingFaceTB"
    repo = name if "/" in name else f"{owner}/{name}"
    with reading(f"--model {name}: no folder here, and not on the hub"):
        return Path(snapshot_download(repo, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))


# ------------------------------------------------------------------------------------------ scorers


def score_countdown(text: str, numbers: Sequence[int], target: int, **kw) -> dict:
    """Score of an expression that must use every number exactly once and equal the target.

    All scorers take format_weight (eq. 1) and eos, the end-of-sequence text, removed once.

    >>> score_countdown("3*5=15, 15+7=22 </think> <answer>3 * 5 + 7</answer>", [3, 5, 7], 22)
    {'format': 1.0, 'answer': '3 * 5 + 7', 'correct': True, 'total': 1.1}
    """
    answer = extract_answer(text)
    try:
        value, numerals = parse_expression(plain_signs(answer or ""))
    except ValueError:
        value, numerals = None, []
    # A multiset, not a set: both copies of a 5 must be used. Exact: 8/(3-8/3) is 24, not 23.999.
    return score(text, answer, value == target and Counter(numerals) == Counter(numbers), **kw)


def score_gsm8k(text: str, gold: str, **kw) -> dict:
    """Score of a number after the last ####, else in the last \\boxed{} or <answer> block."""
    expected = plain_number(str(gold))
    if expected is None:
        raise BadInput(f"gsm8k: the gold answer {gold!r} is not a number; leave this row out")
    _, marker, tail = final_part(text.rstrip().removesuffix(kw.get("eos", ""))).rpartition("####")
    line = re.split(r"\n|</answer>|<\|", tail.lstrip(), maxsplit=1)[0].strip()
    candidates = (line if marker else None, extract_boxed(text), extract_answer(text))
    answer = next((candidate for candidate in candidates if candidate is not None), None)
    return score(text, answer, answer is not None and plain_number(answer) == expected, **kw)


def score_math(text: str, gold: str, **kw) -> dict:
    """Score by `math_equal` of a LaTeX answer in the last \\boxed{}, else in the <answer> block."""
    if gold is None or not clean(str(gold)):
        raise BadInput(f"math: the gold answer {gold!r} is empty, too long or has open brackets")
    boxed = extract_boxed(text)
    answer = extract_answer(text) if boxed is None else boxed
    return score(text, answer, answer is not None and math_equal(str(gold), answer), **kw)


def score(
    text: str, answer: str | None, correct: bool, format_weight: float = 0.1, eos: str = ""
) -> dict:
    """The parts of a reward and their sum (eq. 1)."""
    parts = {"format": float(strict_format(text, eos)), "answer": answer, "correct": correct}
    return parts | {"total": correct + format_weight * parts["format"]}


def strict_format(text: str, eos: str = "") -> bool:
    """Whether <think> + text is one think block, white space, a full answer block, and the end."""
    text = text.rstrip().removesuffix(eos).rstrip()
    head, _, content = text.removesuffix("</answer>").rpartition("<answer>")
    if not (text.endswith("</answer>") and content.strip() and head.rstrip().endswith("</think>")):
        return False
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    return [text.count(tag) for tag in tags] == [0, 1, 1, 1]


def final_part(text: str) -> str:
    """What follows the last </think>; the whole text if the thinking was never closed."""
    return text.rpartition("</think>")[2]


def extract_answer(text: str) -> str | None:
    """Content of the last complete <answer> block of the final part, stripped; None without one."""
    part = final_part(text)
    start = part.rfind("<answer>", 0, max(part.rfind("</answer>"), 0))
    if start < 0:
        return None
    return part[start + len("<answer>") : part.find("</answer>", start)].strip()


def extract_boxed(text: str) -> str | None:
    """Content of the last \\boxed{...} of the final part; None without one that is closed."""
    _, found, content = final_part(text).rpartition("\\boxed{")
    depths = itertools.accumulate((c == "{") - (c == "}") for c in content[: MAX_ANSWER + 1])
    end = next((i for i, depth in enumerate(depths) if depth < 0), None)
    return content[:end].strip() if found and end is not None else None


def plain_signs(text: str) -> str:
    """An expression in ASCII's signs, for ×, \\times, ÷, − and no-break spaces, without **bold**, $
    or a box around it. An = stays, and is an error: only the expression was asked for.
    """
    text = unwrap(text.translate(CHARACTERS)) if len(text) <= MAX_ANSWER else text
    return re.sub(r"\\(cdot|times|ast|div)(?![A-Za-z])", lambda m: SIGN_OF[m[1]], text)


def plain_number(text: str) -> Fraction | None:
    """The value of '$1,080.50', '-5', '1/2', '18 dollars.', 'x = 72'; 50 of '50%'; not '1 million'.

    None for anything but one number: a range, two quantities, a bound, an expression to work out.
    """
    value = number_text(text)
    try:
        return evaluate(to_postfix(math_tokens(value)), RATIONAL, Fraction) if value else None
    except ZeroDivisionError:
        return None


def number_text(text: str) -> str:
    """The number in an answer, without name, sentence and unit; "" if it is not just one."""
    text = unwrap(text) if len(text) <= MAX_ANSWER else ""
    start = re.match(r"[A-Za-z' ]+(?:\b(?:is|are|was|equals)\b|:)(?=[-+$£€*\s\\]*\.?[0-9])", text)
    if start and not (NO_UNIT - {"is", "was"}).intersection(start[0].lower().strip(" :").split()):
        text = text[start.end() :]
    _, kind, parts = read_form(clean(text), [0.0])
    value = split_unit(parts[0])[0].removesuffix("%") if kind == "value" else ""
    return value if re.fullmatch(PLAIN_NUMBER, value) else ""


PLAIN_NUMBER = (  # at most 40 digits each
    r"[-+]?(?:[0-9]{1,40}(?:\.[0-9]{1,40})?|\.[0-9]{1,40})"
    r"(?:/[0-9]{1,40}|\*10\^\{?-?[0-9]{1,2}\}?)?"
)


# ----------------------------------------------------------------------- shaped rewards and metrics


def cosine_reward(
    length: int, correct: bool, r0c: float, rLc: float, r0w: float, rLw: float,
    r_exceed: float, max_length: int, margin: int = 0,
) -> float:
    """Reward along half a cosine, from r0 at length 0 to rL at max_length; r_exceed there.

    c: correct, w: wrong. Source: arXiv:2502.03373 sec. 4.2 (App. C.1 swaps the arguments, which
    would reverse the curve). Paper: margin 0; its code: 16.
    """
    if length + margin >= max_length:  # before correctness: a right answer at the limit gets it too
        return r_exceed
    start, end = (r0c, rLc) if correct else (r0w, rLw)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * length / max_length))


def repetition_penalty(ids: Sequence[int], n: int = 40, penalty: float = -0.05) -> list[float]:
    """Per token: `penalty` in an n-gram that occurred before, else 0 (2502.03373 algorithm 1).

    Assigned, not added. A first time is free: 1 2 1 2 3 with n = 2 pays for the second 1 2.
    """
    rewards, seen = [0.0] * len(ids), set()
    for start in range(len(ids) - n + 1):
        gram = tuple(ids[start : start + n])
        if gram in seen:
            rewards[start : start + n] = [penalty] * n
        seen.add(gram)
    return rewards


def soft_overlong(length: int, max_length: int, cache: int) -> float:
    """0 up to max_length - cache, then linearly down to -1 at max_length. Source: DAPO eq. 13."""
    return -min(max(length - (max_length - cache), 0) / cache, 1.0)


SCRIPTS = {"en": "LATIN", "zh": "CJK", "ja": "CJK HIRAGANA KATAKANA", "ko": "HANGUL"}
SCRIPTS["ru"] = "CYRILLIC"
WORDS = re.compile("[\u3040-\u30ff\u3400-\u9fff]|[^\\W\\d_\u3040-\u30ff\u3400-\u9fff]+")


def language_consistency(text: str, language: str = "en") -> float:
    """Share of the words that are written in the language's script; 1.0 for a text without words.

    A word is a run of letters or one CJK character; LaTeX commands and code do not count.
    Source: arXiv:2501.12948 v1 sec. 2.3.2, which does not say how words are split.
    """
    if language not in SCRIPTS:
        raise BadInput(f"language {language!r} is not known; choose one of {', '.join(SCRIPTS)}")
    text = re.sub(r"```.*?```|\\[A-Za-z]+", " ", text, flags=re.DOTALL)
    first = Counter(word[0][0] for word in WORDS.finditer(text))  # no list: it could be large
    scripts = {letter: unicodedata.name(letter, "?").split()[0] for letter in first}
    matching = sum(first[x] for x in first if scripts[x] in SCRIPTS[language].split())
    return matching / first.total() if first else 1.0


# oat-zero's; "wait" is left out on purpose: it is not a reliable sign of reflection
REFLECTIONS = "recheck,rethink,reevaluate,re-evaluate,reevaluation,re-examine,reexamine".split(",")
REFLECTIONS += ["try again", "check again", "think again", "go over the steps"]


def reflection_count(text: str) -> int:
    """Number of self-reflection phrases, as oat-zero counts them (substrings, lower case)."""
    lowered = text.lower()
    return sum(lowered.count(word) for word in REFLECTIONS)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased probability that k draws out of n samples, c of them correct, hold a correct one.

    1 - C(n-c, k) / C(n, k) as a product, which never overflows. Source: arXiv:2107.03374 eq. 1.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n; got n={n}, c={c}, k={k}")
    return 1.0 - math.prod(max(0.0, 1 - k / j) for j in range(n - c + 1, n + 1))


# -------------------------------------------------------------------- what a batch of answers shows


@dataclass
class Completion:
    """One sampled answer and what the verifier says of it."""

    number: int  # of its problem
    problem: dict
    prompt: list[int]
    tokens: list[int]  # with the end token
    logprobs: list[float]
    finished: bool  # ended by itself; else truncated
    text: str
    score: dict  # {"format", "answer", "correct", "total"}
    reward: float = 0.0  # what the script makes of the score

    def line(self, step: int, advantage: float, decode: Callable[[list[int]], str]) -> dict:
        """What samples.jsonl keeps of it, token by token; decode turns ids into text."""
        return {
            "step": step,
            "group": self.number,
            "problem": self.problem,
            "prompt": decode(self.prompt),
            "tokens": self.tokens,
            "pieces": [decode([i]) for i in self.tokens],
            "mask": [1] * len(self.tokens),
            "logprobs": [round(p, 4) for p in self.logprobs],
            "rewards": self.score,
            "advantage": round(advantage, 4),
            "truncated": not self.finished,
        }


def mean(values: Iterable[float]) -> float:
    """The mean; nan of nothing."""
    values = list(values)
    return float(sum(values)) / len(values) if values else math.nan


def in_groups(values: list, size: int) -> list[list]:
    """The values cut into lists of `size`; the last may be shorter."""
    return [values[i : i + size] for i in range(0, len(values), size)]


def micro_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Row numbers, longest first, in batches of at most max_tokens padded tokens, or of one row.

    >>> micro_batches([3, 9, 4, 8], 18)
    [[1, 3], [2, 0]]
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > max_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def describe(done: list, task) -> dict[str, float]:
    """Means over answers, also of what the task has to say of them (task.describe)."""
    metrics = {
        "accuracy": mean(c.score["correct"] for c in done),
        "format": mean(c.score["format"] for c in done),
        "clipped_ratio": mean(not c.finished for c in done),
        "completion_length": mean(len(c.tokens) for c in done),
    }
    if hasattr(task, "describe"):
        details = [task.describe(c.text, c.problem) for c in done]
        metrics |= {name: mean(d[name] for d in details) for name in details[0]}
    return metrics


def describe_batch(done: list, group_size: int, task) -> dict[str, float]:
    """A step's answers in numbers: rewards, lengths by outcome, groups without signal."""
    groups = in_groups(done, group_size)
    correct = [sum(c.score["correct"] for c in group) for group in groups]
    spreads = [len({round(c.reward, 8) for c in group}) for group in groups]  # different rewards
    metrics = describe(done, task) | {
        "tokens": sum(len(c.tokens) for c in done),
        "reward": mean(c.reward for c in done),
        "reward_std": stdev(c.reward for c in done) if len(done) > 1 else 0.0,
        "frac_reward_zero_std": mean(spread == 1 for spread in spreads),
        "frac_all_right": mean(count == group_size for count in correct),
        "frac_all_wrong": mean(count == 0 for count in correct),
    }
    metrics["reward/format"] = metrics.pop("format")
    for name, outcome in (("correct", True), ("wrong", False)):
        some = [c for c in done if c.score["correct"] == outcome]
        metrics[f"completion_length/{name}"] = mean(len(c.tokens) for c in some)
        metrics[f"reflections/{name}"] = mean(reflection_count(c.text) for c in some)
    return metrics


def describe_evaluation(done: list, k: int, task) -> dict[str, float]:
    """k answers to each problem in numbers; the standard error is one over problems."""
    correct = [sum(c.score["correct"] for c in group) for group in in_groups(done, k)]
    spread = stdev(correct) if len(correct) > 1 else 0.0
    metrics = describe(done, task)
    metrics["accuracy_se"] = spread / k / math.sqrt(len(correct))
    metrics["entropy"] = -mean(p for c in done for p in c.logprobs)  # nats a token
    for n in [2**power for power in range(k.bit_length())]:
        metrics[f"pass@{n}"] = mean(pass_at_k(k, count, n) for count in correct)
    return {f"eval/{name}": value for name, value in metrics.items()}


# -------------------------------------------------------------------------------------------- tasks
# A task is a class, here, in more/tasks.py or in a file of yours (README.md has an example), with
#   problem(split, seed, index)  the index-th of an endless stream, a pure function of its arguments
#   score(text, problem, **kw)   one of the scorers above, or what `score` makes of your verdict
#   question(problem), or compact(problem) for a tiny tokenizer: the prompt
# and, if it has them,
#   key(problem)                 what makes two problems the same; here its hash decides the split
#   trace(problem, rng)          a completion for sft.py to imitate, its thought in lines
#   describe(text, problem)      numbers that say what a completion did
#   steps, answer, plan          (problem): for coconut.py, more/r_capsule.py; MARKER: answer's
# Fields of a dataclass are knobs (--task name:knob=value); NATURAL: defaults for real models.

INSTRUCTION = "Think inside <think> </think> tags, then give the final answer inside "
INSTRUCTION += "<answer> </answer> tags"


def random_tree(pool: list[Fraction], operators: str, rng: random.Random) -> Fraction | None:
    """The value of a random binary tree over all numbers in `pool`; None if it divides by zero."""
    while len(pool) > 1:
        a, b = (pool.pop(rng.randrange(len(pool))) for _ in range(2))
        op = rng.choice(operators)
        if op == "/" and b == 0:
            return None
        pool.append(ARITHMETIC[op](a, b))
    return pool[0]


@dataclass
class Countdown:
    """Reach the target with all the numbers, each used once (TinyZero; traces: 2404.03683)."""

    min_numbers: int = 3
    max_numbers: int = 3
    low: int = 1
    high: int = 10
    min_target: int = 1
    max_target: int = 99
    operators: str = "+-*/"
    give_up: float = 0.33  # share of the traces that stop early with a wrong answer

    NATURAL = {"max_numbers": 4, "high": 99, "min_target": 10}

    def __post_init__(self):
        numbers = 2 <= self.min_numbers <= self.max_numbers <= 6
        ranges = 0 < self.low <= self.high and 0 < self.min_target <= self.max_target
        operators = self.operators and set(self.operators) <= set("+-*/")
        if not (numbers and ranges and operators):
            raise BadInput(f"{self}: 2 to 6 numbers, ranges above 0, some of + - * / are allowed")

    def problem(self, split: str, seed: int, index: int) -> dict:
        """Expression first, so each problem has a solution; a division need not come out even."""
        rng = random.Random(f"countdown {split} {seed} {index}")
        for _ in range(10_000):
            count = rng.randint(self.min_numbers, self.max_numbers)
            numbers = [rng.randint(self.low, self.high) for _ in range(count)]
            value = random_tree([Fraction(n) for n in numbers], self.operators, rng)
            if value is None or value.denominator != 1:
                continue
            problem = {"numbers": numbers, "target": int(value)}
            if self.min_target <= value <= self.max_target and split_of(self.key(problem)) == split:
                return problem
        raise BadInput(f"no solvable countdown problem found for {self}; widen the ranges")

    def key(self, problem: dict) -> str:
        return f"{sorted(problem['numbers'])}={problem['target']}"  # in any order

    def compact(self, problem: dict) -> str:
        return f"{','.join(map(str, problem['numbers']))}={problem['target']}<think>"

    def question(self, problem: dict) -> str:
        return (
            f"Using the numbers {problem['numbers']}, write an expression that equals "
            f"{problem['target']}. You may use {' '.join(self.operators)} and parentheses, and "
            "must use each number exactly once. Show your work in <think> </think> tags and give "
            "only the final expression in <answer> </answer> tags, "
            "for example <answer>(1 + 2) * 3</answer>."
        )

    def score(self, text: str, problem: dict, **kw) -> dict:
        return score_countdown(text, problem["numbers"], problem["target"], **kw)

    def trace(self, problem: dict, rng: random.Random) -> str:
        from more.tasks import search_trace  # it imports this module

        return search_trace(self, problem, rng)

    def describe(self, text: str, problem: dict) -> dict:
        """What the completion did: tries, different ones, whether it stopped on a marked miss."""
        thought, closed, _ = text.partition("</think>")
        lines = [line.removeprefix("wait") for line in thought.split("\n") if "=" in line]
        hit = f"={problem['target']}={problem['target']}"
        return {
            "tries": len(lines),
            "distinct_tries": len({line.partition("=")[0] for line in lines}),
            "gave_up": bool(closed and lines) and not lines[-1].endswith(hit),
        }


@dataclass
class GSM8K:
    """Grade-school word problems: JSONL with the published fields `question` and `answer`."""

    data: str = ""

    FIELD, EXAMPLE, SCORER = "question", "42", staticmethod(score_gsm8k)

    def __post_init__(self):
        if not self.data:
            raise BadInput(f"{type(self).__name__.lower()} reads a file: give --data FILE.jsonl")
        self.streams = {"train": [], "test": []}
        for problem in read_jsonl(self.data, self.read):
            self.streams[split_of(self.key(problem))].append(problem)

    def read(self, row: dict) -> dict:
        """{"question", "answer"} of a row; BadInput if the scorer cannot read its answer."""
        question, answer = text_of(row, self.FIELD), text_of(row, "answer")
        answer = answer.rpartition("#### ")[2].strip()  # GSM8K's: ... #### 18
        self.SCORER("", answer)
        return {"question": question, "answer": answer}

    def problem(self, split: str, seed: int, index: int) -> dict:
        """Test in file order, train in a new order each epoch."""
        rows = self.streams[split]
        if not rows:
            raise BadInput(f"{self.data} has no {split} rows; give more")
        epoch, i = divmod(index, len(rows))
        return rows[i if split == "test" else epoch_order(len(rows), seed, epoch)[i]]

    def key(self, problem: dict) -> str:
        return " ".join(problem["question"].split())

    def question(self, problem: dict) -> str:
        return f"{problem['question']}\n{INSTRUCTION}, for example <answer>{self.EXAMPLE}</answer>."

    def score(self, text: str, problem: dict, **kw) -> dict:
        return self.SCORER(text, problem["answer"], **kw)


@dataclass
class Math(GSM8K):
    """Competition problems: JSONL with the published fields `problem` and `answer` (LaTeX)."""

    FIELD, EXAMPLE, SCORER = "problem", "\\frac{1}{2}", staticmethod(score_math)


def text_of(row: dict, name: str) -> str:
    """The text or number in a field of a row."""
    if not isinstance(row.get(name), (str, int, float)) or not str(row[name]).strip():
        raise BadInput(f'field "{name}" is missing or empty')
    return str(row[name])


def read_jsonl(path: str, read: Callable) -> list:
    """`read` of each JSON object of a file: one a line, or the items of one list."""

    def read_object(row: str | dict) -> object:
        row = json.loads(row) if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise BadInput("not a JSON object")
        return read(row)

    with reading(f"cannot read the data file {path}"):
        text = Path(path).read_text(encoding="utf-8-sig")  # without a mark of the byte order
    if not text.lstrip().startswith("["):
        lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        return read_rows(path, "line", lines, read_object)
    with reading(path):
        items = json.loads(text)
    return read_rows(path, "item", enumerate(items, 1), read_object)


def read_rows(path: str, kind: str, rows: Iterable[tuple], read: Callable) -> list:
    """`read` of each (number, row); BadInput tells the first fault, and where others are."""
    found, faults = [], []
    for number, row in rows:
        try:
            found.append(read(row))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            what = error if isinstance(error, ValueError) else repr(error)
            faults.append((number, f"{what}: {str(row)[:40]!r}"))
    if not found and not faults:
        raise BadInput(f"{path} is empty; it must hold one JSON object per line")
    if faults:
        (first, text), *others = faults
        if others:
            text += f"; {len(others)} more such {kind}{'s' if len(others) > 1 else ''}: "
            text += ", ".join(str(number) for number, _ in others[:5])
        raise BadInput(f"{path}, {kind} {first}: {text}")
    return found


SHAREGPT = {"human": "user", "gpt": "assistant"}  # its names of roles


def read_chat(row: dict) -> list[dict]:
    """The messages of a row, {"role", "content"}.

    Known are {"messages": [...]}, TRL's {"prompt": [...], "completion": [...]}, and ShareGPT's
    {"conversations": [{"from", "value"}, ...]}.
    """
    given = row.get("messages", row.get("conversations"))
    if given is None and isinstance(row.get("prompt"), list):
        given = [*row["prompt"], *(row.get("completion") or [])]
    if not isinstance(given, list) or not given:
        raise BadInput("prompt and completion, or a list of messages, are needed")
    messages = []
    for number, message in enumerate(given, 1):
        fields = message if isinstance(message, dict) else {}
        role = fields.get("role", fields.get("from"))
        content = fields.get("content", fields.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadInput(f"message {number} has no role or no content")
        messages.append({"role": SHAREGPT.get(role, role), "content": content})
    return messages


@functools.lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"epoch {seed} {epoch}").sample(range(count), count)


TASKS = {"countdown": Countdown, "gsm8k": GSM8K, "math": Math}  # below: more/tasks.py
TASKS |= {"multiplication": "Multiplication", "generalpoints": "GeneralPoints", "prosqa": "ProsQA"}
TASKS |= {"knights": "KnightsAndKnaves", "navigation": "Navigation", "notations": "Notations"}
TASKS |= {"affine": "AffineChain", "patterns": "Patterns", "toycode": "ToyCode", "chains": "Chains"}
TASKS |= {"resolve": "Resolve", "scene": "Scene", "plans": "Plans", "code": "Code", "s3": "S3"}


def task_class(spec: str) -> tuple[str, type, str]:
    """Name, class and knobs of a spec; a file is executed."""
    name, _, knobs = spec.partition(":")
    if name in TASKS:
        kind = TASKS[name]
        if isinstance(kind, str):
            with reading(f"task {name} is in more/tasks.py", ANYTHING):
                from more import tasks  # it imports this module

            kind = getattr(tasks, kind)
        return name, kind, knobs
    parts = re.fullmatch(r"(.+?\.py)(?::([^:]*))?(?::(.*))?", spec)
    if parts is None:
        raise BadInput(f"unknown task {name!r}: {', '.join(TASKS)} or FILE.py:Class")
    path, name, knobs = parts.groups("")
    file = max(Path(path), MODELS.parent / path, key=Path.is_file)  # more/ from any folder
    about = spec_from_file_location(f"task_{file.stem}", file)
    module = sys.modules[about.name] = module_from_spec(about)  # where dataclasses look for it
    with reading(path, ANYTHING):
        about.loader.exec_module(module)
    kind = getattr(module, name, None)
    if not isinstance(kind, type) or not hasattr(kind, "problem") or not hasattr(kind, "score"):
        raise BadInput(f"{path} has no class {name!r} with problem() and score()")
    return f"{path}:{name}", kind, knobs


KNOBS = {bool: int, int: int, float: float, str: str}  # bool("0") is True


def make_task(spec: str, data: str = "", natural: bool = False):
    """The task of a spec: NAME[:knobs] of TASKS, or FILE.py:Class[:knobs] of any file.

    natural: defaults for a real model. With the knob pool=N, which every task has, training knows
    N problems of its stream only, over and over.
    """
    name, kind, given = task_class(spec)
    with reading(name, ANYTHING):
        hints = get_type_hints(kind) if is_dataclass(kind) else {}
    types = {"pool": int} | {knob: KNOBS[hint] for knob, hint in hints.items() if hint in KNOBS}
    knobs = dict(getattr(kind, "NATURAL", {})) if natural else {}
    pairs = [f"data={data}"] if data else []
    for pair in [*pairs, *filter(None, given.split(","))]:
        knob, _, value = pair.partition("=")
        try:
            knobs[knob] = types[knob](value)
            if types[knob] is float and not math.isfinite(knobs[knob]):
                raise ValueError(value)
        except (KeyError, ValueError):
            known = ", ".join(f"{knob}={hint.__name__}" for knob, hint in types.items())
            raise BadInput(f"task {name}: {pair!r} is none of its knobs, {known}") from None
    pool = knobs.pop("pool", 0)
    if pool < 0:
        raise BadInput(f"task {name}: pool={pool} must be a number of problems, or 0 for all")
    with reading(name, ANYTHING):
        task = kind(**knobs)
        task.score = guarded(task.score)
        task.key = getattr(task, "key", repr)
    if pool:
        draw = task.problem
        task.problem = lambda split, seed, i: draw(split, seed, i % pool if split == "train" else i)
    return task


score_failures = 0  # answers that a verifier could not judge: wrong
# what a text can make a verifier raise; a full disk or a misspelt name end the run
ANSWER_FAULTS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError)
ANSWER_FAULTS += (ValueError, re.error)


def guarded(judge: Callable[..., dict]) -> Callable[..., dict]:
    """A verifier that ends no run: an answer on which it raises, or gives no number, is wrong."""

    @functools.wraps(judge)
    def judged(text: str, problem: dict, **options) -> dict:
        global score_failures
        try:
            parts = judge(text, problem, **options)
            if not math.isfinite(parts["total"] + parts["format"] + parts["correct"]):
                raise ValueError(f"the verifier gave {parts}")
            return parts | {"answer": parts["answer"]}
        except ANSWER_FAULTS:
            score_failures += 1
            if score_failures == 1:  # then the count alone, each time that it has doubled
                print(re.sub(r"[^\w\n -~]", "?", traceback.format_exc()), file=sys.stderr)
            if score_failures.bit_count() == 1:
                print(f"the verifier failed on {score_failures} answer(s): wrong", file=sys.stderr)
            return {"format": 0.0, "answer": None, "correct": False, "total": 0.0}

    return judged


def heldout(task, count: int, seed: int = 0) -> list[dict]:
    """The first `count` problems of the test stream with distinct keys."""
    found = {}
    for index in range(200 * count):
        if len(found) < count:
            problem = task.problem("test", seed, index)
            found.setdefault(task.key(problem), problem)
    if len(found) < count:
        raise BadInput(f"only {len(found)} held-out problems of {task}: ask for fewer than {count}")
    return list(found.values())


def split_of(key: str) -> str:
    """ "test" for about one key in ten, by its hash, so that a problem never changes sides."""
    return "train" if int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10 else "test"


ASSISTANT_PREFIX = "Let me solve this step by step.\n<think>"
PREAMBLE = "A conversation between User and Assistant. The user asks a question, and the Assistant "
PREAMBLE += "solves it. The assistant first thinks about the reasoning process and then provides "
PREAMBLE += "the user with the answer."  # TinyZero's, for base models


def fill_template(template, messages: list[dict], opens_reply: bool) -> str:
    """A chat as text, by a model's template (a tokenizer of transformers)."""
    with reading("--chat"):
        options = {"tokenize": False, "add_generation_prompt": opens_reply}
        return template.apply_chat_template(messages, **options)


def open_thinking(text: str) -> str:
    """A templated prompt that ends in <think>, as the templates of thinking models do."""
    return text if text.rstrip().endswith("<think>") else text + ASSISTANT_PREFIX


def prompt(task, problem: dict, style: str) -> str | list[dict]:
    """The prompt of a problem: "compact" (tiny models), "text" (base models) or "chat" (messages).

    The first two end in <think>; the caller of "chat" appends ASSISTANT_PREFIX to its text.
    """
    method, other = ("compact", "pre-trained") if style == "compact" else ("question", "tiny")
    if not hasattr(task, method):
        raise BadInput(f"{type(task).__name__} has no {method} prompt: give a {other} --model")
    asked = getattr(task, method)(problem)
    if style == "text":
        return f"{PREAMBLE}\nUser: {asked}\nAssistant: {ASSISTANT_PREFIX}"
    return [{"role": "user", "content": asked}] if style == "chat" else asked


# -------------------------------------------------------------------------------------- expressions
# Text -> tokens -> postfix list -> value. Nothing recurses on an expression; what can be computed
# is exactly the dict of operations that `evaluate` is given.

FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan log ln exp".split()
PREFIX = {"+": "pos", "-": "neg"} | {name: name for name in ["sqrt", "abs", *FUNCTIONS]}
INFIX = {"+": 1, "-": 1, "*": 2, "/": 2, "^": 4, "choose": 4}  # how tightly each binds
BINDING = INFIX | dict.fromkeys(PREFIX.values(), 5)  # sqrt(2)^2 is 2
BINDING |= {"pos": 3, "neg": 3}  # but -2^2 is -4


def parse_expression(text: str) -> tuple[Fraction, list[int]]:
    """Value and numerals of an expression over + - * / ( ) and integers; ValueError for others.

    At most 500 characters, 200 tokens (hence less than 100 nested parentheses) and 12 digits per
    numeral, without leading zeros. `**` and `//` are two operators in a row and so syntax errors.

    >>> parse_expression("7 / 2 * (4 - 1)")
    (Fraction(21, 2), [7, 2, 4, 1])
    """
    tokens = expression_tokens(text)
    try:
        value = evaluate(to_postfix(tokens), ARITHMETIC, Fraction)
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    return value, [int(token) for token in tokens if token.isdigit()]


def expression_tokens(text: str) -> list[str]:
    """Numerals, operators and parentheses of such an expression; ValueError for anything else."""
    tokens = re.findall(r"[0-9]+|[-+*/()]", text[:501])
    plain = "".join(tokens) == re.sub(r"[ \t\r\n]", "", text[:501])
    if len(text) > 500 or len(tokens) > 200 or not plain:
        raise ValueError("too long, or characters other than digits, + - * / ( ) and spaces")
    if any(re.fullmatch(r"0[0-9]+|[0-9]{13,}", token) for token in tokens):
        raise ValueError("a numeral has more than 12 digits or a leading zero")
    return tokens


def to_postfix(tokens: list[str]) -> list[str]:
    """Postfix order of infix tokens (Dijkstra's shunting-yard); ValueError if they are none.

    >>> to_postfix(["-", "2", "*", "(", "3", "+", "4", ")"])
    ['2', 'neg', '3', '4', '+', '*']
    """
    output, stack, operand_next = [], [], True
    for token in tokens:
        if operand_next and (token in PREFIX or token == "("):
            stack.append(PREFIX.get(token, token))
        elif operand_next:
            if token in INFIX or token in (")", "!"):
                raise ValueError(f"{token!r} where a number should stand")
            output.append(token)
            operand_next = False
        elif token in INFIX:
            least = BINDING[token] + (token == "^")  # only ^ groups to the right: 2^3^2 is 2^(3^2)
            while stack and stack[-1] != "(" and BINDING[stack[-1]] >= least:
                output.append(stack.pop())
            stack.append(token)
            operand_next = True
        elif token == "!":
            output.append(token)
        elif token == ")" and "(" in stack:
            while stack[-1] != "(":
                output.append(stack.pop())
            stack.pop()
            if stack and BINDING.get(stack[-1]) == 5:  # sqrt(4)! is (sqrt(4))!
                output.append(stack.pop())
        else:
            raise ValueError(f"{token!r} where an operator should stand")
    if operand_next or "(" in stack:
        raise ValueError("the expression is not complete")
    return output + stack[::-1]


def evaluate(postfix: list[str], operations: dict[str, Callable], atom: Callable):
    """Value of a postfix list: `atom` makes one of a numeral or symbol, `operations` combine."""
    stack = []
    for token in postfix:
        if token in operations:
            arity = 2 if token in INFIX else 1
            stack[-arity:] = [operations[token](*stack[-arity:])]
        else:
            stack.append(atom(token))
    return stack.pop()


def small_power(base: Fraction, exponent: Fraction) -> Fraction:
    """base ** exponent for an integer; refused before it is computed if the result were large."""
    bits = base.numerator.bit_length() + base.denominator.bit_length()
    if exponent.denominator != 1 or abs(exponent) * bits > MAX_BITS or base == exponent == 0:
        raise ValueError("a power that is not rational, too large, or 0^0")
    return base**exponent.numerator


def small_integer(value: Fraction) -> int:
    if value not in range(501):
        raise ValueError("not an integer from 0 to 500")
    return int(value)


MAX_ANSWER = 500  # characters of an answer to `math`; more is wrong unread
MAX_BITS = 20_000  # of a power's result, about 6000 digits
ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
ARITHMETIC |= {"neg": operator.neg, "pos": operator.pos}
RATIONAL = ARITHMETIC | {
    "^": small_power,
    "abs": abs,
    "!": lambda n: Fraction(math.factorial(small_integer(n))),
    "choose": lambda n, k: Fraction(math.comb(small_integer(n), small_integer(k))),
}


# ------------------------------------------------------------------------ equality of LaTeX answers
# An answer is cleaned (one spelling for each sign, \text{cm} becomes "cm"), then read by its form:
# a list, an interval, a matrix, ... Parts are compared one by one, values exactly.


def math_equal(gold: str, pred: str) -> bool:
    """Whether two LaTeX answers are equal. Nothing is rounded: 0.333 is not 1/3.

    Names and units count where both have them: x = 5 cm is 5, but not y = 5 cm or 5 m. A percent
    sign is dropped, but 50% is also 0.5. Tuples, intervals and matrices are ordered, lists and sets
    are not. Empty, unbalanced or long text equals nothing, and so does a form that is not read.

    >>> math_equal("7/3", "2\\\\frac13"), math_equal("x=1,2", "2 or 1"), math_equal("0.33", "1/3")
    (True, True, False)
    """
    gold, pred = clean(gold), clean(pred)  # the seconds are shared by all parts of the answer
    return bool(gold and pred) and equal_answers(gold, pred, [SYMBOLIC_SECONDS])


def equal_answers(gold: str, pred: str, seconds: list[float]) -> bool:
    """Equality of two cleaned answers, by their form."""
    if gold == pred:
        return True
    name, kind, left = read_form(gold, seconds)
    other_name, other_kind, right = read_form(pred, seconds)
    kinds = {kind, other_kind}

    def equal(x: str, y: str) -> bool:
        return equal_answers(x, y, seconds)

    if name and other_name and name != other_name:
        return False
    if kinds in ({"set"}, {"union"}, {"set", "list"}, {"set", "value"}):  # repetitions are nothing
        found = all(any(equal(x, y) for y in right) for x in left)
        return found and all(any(equal(x, y) for x in left) for y in right)
    if len(left) != len(right):
        return False
    if kinds == {"value"}:
        return equal_values(left[0], right[0], seconds)
    if kinds in ({"list"}, {"equation"}):  # in any order
        for x in left:  # equality is transitive, so the first partner that fits may be taken
            partner = next((y for y in right if equal(x, y)), None)
            if partner is None:
                return False
            right.remove(partner)
        return True
    no_interval = not re.search("[<>≤≥≠∞]", gold + pred)
    vector = kinds == {"()", f"matrix {len(left)}x1"} and no_interval
    record = kinds in ({"record", "()"}, {"record", "list"})  # x = 1, y = 2 against (1, 2)
    return (len(kinds) == 1 or vector or record) and all(map(equal, left, right))


def equal_values(gold: str, pred: str, seconds: list[float]) -> bool:
    """Equality of two single values, each perhaps with a unit or a percent sign."""
    if re.fullmatch(PLAIN_WORDS, gold) or re.fullmatch(PLAIN_WORDS, pred):  # no products
        return gold.strip('"').lower() == pred.strip('"').lower()
    (gold, unit), (pred, other_unit) = split_unit(gold), split_unit(pred)
    share, other_share = gold.endswith("%"), pred.endswith("%")
    one_share = share != other_share
    if (unit and other_unit and unit != other_unit) or (one_share and (unit or other_unit)):
        return False
    try:
        left, right = (to_postfix(math_tokens(side.removesuffix("%"))) for side in (gold, pred))
    except ValueError:
        return gold == pred
    try:
        x, y = (evaluate(side, RATIONAL, Fraction) for side in (left, right))
    except (ValueError, ZeroDivisionError):  # a root, a symbol, pi
        return not one_share and symbolic_equal(left, right, seconds)
    if not one_share:
        return x == y
    percent, number = (x, y) if share else (y, x)  # MATH drops the sign, but 1/2% is not 1/2
    return percent == 100 * number or (x == y and abs(number) >= 1)


# Cleaning. A sign for a command: ∨ or, ∪ union, ∈ in, ¤ dollar; "..." words; ⟦1&2;3&4⟧ a matrix.

COMMANDS = {  # sign: the commands that it stands for
    " ": "left right displaystyle textstyle limits big Big bigl bigr Bigl Bigr hline quad qquad",
    "\\frac": "dfrac tfrac cfrac", "\\binom": "dbinom tbinom", "(": "langle", ")": "rangle",
    "\\text": "textbf textit textrm textnormal mathrm mathbf mathit mathsf mbox operatorname",
    "*": "cdot times ast", "/": "div", "±": "pm", "∓": "mp", "°": "degree", "∞": "infty",
    "≤": "le leq leqslant", "≥": "ge geq geqslant", "≠": "ne neq", "<": "lt", ">": "gt",
    "∪": "cup", "∈": "in", "∨": "lor vee", "|": "vert lvert rvert mid", "\\{": "lbrace",
    "\\}": "rbrace", "\\{\\}": "emptyset varnothing",
}  # fmt: skip
SIGN_OF = {name: sign for sign, names in COMMANDS.items() for name in names.split()}
CHARACTERS = str.maketrans(
    {"−": "-", "×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "\xa0": " ", "\u2009": " "}
    | {"`": " ", '"': " ", "²": "^2", "³": "^3", "π": "\\pi ", "θ": "\\theta ", "∅": "\\{\\}"}
    | {"\u200b": "", "\ufeff": ""}
)
WRAPPERS = (  # around a whole answer
    r"\\f?boxed\s*\{(.*)\}", r"\{(.*)\}", r"\*\*(.*)\*\*", r"\\\[(.*)\\\]", r"\\\((.*)\\\)",
    r"\$+([^$]*)\$+", r"\[\s*['\"]([^'\"]*)['\"]\s*\]",
    r"(?:\*\*)?(?:[Tt]he )?(?:[Ff]inal )?[Aa]nswer(?:\s*:|\s+is:?)(?:\*\*)?\s*(.*)",
)  # fmt: skip
MATRIX = r"\\begin\{([bpB]?matrix|smallmatrix|array)\}(?:\{[^{}]*\})?([^⟦⟧]*?)\\end\{\1\}"
SHORT_UNIT = r"(?:[ckm]m|kg|m[lL]|ft|mi|oz|lb|mph|m/s|km/h)(?![A-Za-z])"
UNIT_WORD = rf"(?!mod|choose|and|or)(?:{SHORT_UNIT}|of|in|[A-Za-z]{{3,}})(?:\^\{{?[23]\}}?)?"
# 1,000 is a number unless it stands in brackets, where (1,000) would be a pair
THOUSANDS = r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])(?![^(\[]*(?:[)\]]|\\\}))"
CLEANING = (  # in this order
    (r"(?<=\d)(?:\\[,!;]|\{,\}|,\\!|\u202f)(?=\d{3}(?!\d))", ""),  # 13\,535 and 1{,}000
    (r"(?<!\\)\\!", ""),
    (r"(?<=[\w)}])\s*\*\*\s*(?=[-\w({\\])", "^"),  # a Python power
    (r"(?<!\\)\\[,;: ()\[\]]|\u202f|(?<=[\w}])~(?=[\\A-Za-z])", " "),
    (r"\\\$", "¤"),
    (r"\$([^$]*)\$", r" \1 "),  # a pair is mathematics, one alone is money
    (r"(?<![\d.])[¤$£€]\s*([-+]?[\d.,]*\d)", lambda m: f'{m[1]}"{m[0][0]}"'),
    (r"(?<=\d) ?([€£])\s*$", r'"\1"'),
    ("<=", "≤"),
    (">=", "≥"),
    (r"\\not\s*=", "≠"),
    (r"\^\s*\{?\s*(?:\\circ|°)\s*\}?", "°"),
    (r"\\mathbb\s*\{?R\}?", "(-∞,∞)"),
    (r"\\text\s*\{([^{}]*)\}", lambda m: mark_text(m[1])),
    (r"(?<=\d) and (?=\d+/\d)", " "),  # 2 and 1/2
    (r"(?:\s*,)?\s+and\s+", ","),  # also a comma before it
    (r"(?:\s*,)?(?:\s+or\s+|\s*∨\s*)", "∨"),
    (r'°\s*"?([CF])\b"?', r'"degree \1"'),
    (r"°(?=\s*(?:[,∨)}\]\"]|$))", '"degree"'),
    ("°", " "),
    (r'\\%|"percent"|(?<=\d) ?percent\b', "%"),
    (r"[\s,;:]*(?<!\.)\.?[\s,;:]*$", ""),
    (rf'(?:(?<=\d) +|(?<=\d)(?={SHORT_UNIT}))((?:{UNIT_WORD} *)+)(?=$|[,∨])', r'"\1"'),
    (THOUSANDS, lambda m: m[0].replace(",", "")),
    (r"([_^])\{(\w)\}(?!\s*\d)", r"\1\2"),
    (r"\\(frac|binom)\s*(\d)", r"\\\1{\2}"),  # \frac12
    (r"(\\(?:frac|binom)\{[^{}]*\})\s*(\w)", r"\1{\2}"),
    (r"√\s*(\d+|\w|\([^()]*\))", r"\\sqrt{\1}"),
    (r"\\sqrt(?:\s*(?=\d)|\s+)(\w)(?!\d)", r"\\sqrt{\1}"),
    (r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d+)\}(?!\d)", lambda m: repeating(*m.groups())),
    (r"\s+", " "),
    (r"(?<!\w) | (?!\w)", ""),  # a space stays only where it separates: 1 0 is not 10
    (r"^([-+]?[\d.]+)[eE]([-+]?\d{1,3})$", r"\1*10^{\2}"),
    (r"^\+|\+(?=∞)", ""),
    (r"^\(([A-Z])\)$", r"\1"),  # the choice (A)
)


def clean(text: str | None) -> str:
    """The answer in one spelling; "" if it is too long or its brackets do not match.

    >>> clean("$x = \\\\dfrac12 \\\\text{ cm}^2$.")
    'x=\\\\frac{1}{2}"cm"^2'
    """
    if text is None or len(text) > MAX_ANSWER:
        return ""
    text = re.sub(r"\\(?:left|right)\s*\.", " ", unwrap(text).translate(CHARACTERS))
    text = re.sub(r"\\([A-Za-z]+)", lambda m: SIGN_OF.get(m[1], m[0]), text)
    text = re.sub(MATRIX, lambda m: mark_matrix(m[2]), text)
    for pattern, replacement in CLEANING:
        text = re.sub(pattern, replacement, text)
    return unwrap(text) if split_at(text, ",") else ""


def unwrap(text: str) -> str:
    """The answer without what stands around the whole of it: a box, bold, $, Answer:, ['...']."""
    before = None
    while before != text:
        before = text
        for pattern in WRAPPERS:
            match = re.fullmatch(pattern, text.strip(), re.DOTALL)
            text = match[1] if match and split_at(match[1], ",") else text
    return text.strip()


def mark_text(content: str) -> str:
    """What stands in \\text: words in quotes; and, or and a comma behind them go on."""
    joint = re.search(r"(?:,|\band|\bor)\s*$", content)
    words = content[: joint.start() if joint else None].strip(" ,.")
    mark = {"": "", "or": "∨"}.get(joint[0].strip() if joint else "", ",")
    is_word = re.fullmatch(r"[A-Za-z][^\d(]+|[mgshL]", words)
    return (f'"{words}"' if is_word else f" {words} ") + mark


def mark_matrix(body: str) -> str:
    rows = re.split(r"\\\\(?:\s*\[[^][]*\])?|\\cr(?![A-Za-z])", body)
    return f"⟦{';'.join(row.strip() for row in rows).strip(' ;')}⟧"


def repeating(whole: str, digits: str, cycle: str) -> str:
    """0.1666..., given as "0", "1", "6", as a fraction."""
    start = int(whole + digits or "0")
    top = int(whole + digits + cycle) - start
    return f"({top}/{10 ** len(digits) * (10 ** len(cycle) - 1)})"


# Units: words after a number that are known, or in the plural, unless they carry value.

NO_UNIT = {
    *"about above all almost always and approximately around as at below but cannot crore cube "
    "cubed double dozen except fails false fewer gross half halves has hence incorrect is its lakh "
    "less maybe minus more most negative never no none nor not of opposite or over perhaps plus "
    "point power quarter ratio root short sometimes square squared than that third this time times "
    "to triple twice under unless upwards versus was wrong zero one two three four five six seven "
    "eight nine ten eleven twelve twenty thirty forty fifty sixty seventy eighty ninety hundred "
    "thousand".split()
}
ORDINAL = (
    r".*(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|teen|tie|hundred|thousand|illion)th"
    r"|.*teen|.*illion"
)
UNITS = {  # the other spellings of each
    "hour": "hr h", "minute": "min", "second": "sec s", "millimeter": "mm", "centimeter": "cm",
    "meter": "m", "kilometer": "km", "inch": "in inche", "foot": "ft feet", "mile": "mi",
    "mile / hour": "mph", "kilometer / hour": "km/h", "meter / second": "m/s", "/": "per",
    "gram": "g", "kilogram": "kg", "pound": "lb", "ounce": "oz", "liter": "l", "milliliter": "ml",
    "dollar": "¤ $", "euro": "€", "sterling": "£", "people": "person", "unit": "", "degree": "c f",
    "day": "", "week": "", "month": "", "year": "", "cup": "", "cent": "¢", "radian": "rad",
}  # fmt: skip
UNIT_OF = {other: name for name, others in UNITS.items() for other in [name, *others.split()]}


def split_unit(text: str) -> tuple[str, str]:
    """A value and its unit: '5"cm"^2' is ("5", "centimeter ^2"); 5 million and 6A have none."""
    match = re.fullmatch(r'([^"]*[^"\s])((?:"[^"]*"(?:\^[23])?[*/]?)+)', text)
    if not match:
        return text, ""
    value, unit = match[1], re.sub(r"\b(?:square|sq) (\w+)", r"\1^2", match[2].lower())
    unit = re.sub(r"\bcubic (\w+)", r"\1^3", unit)
    words = re.findall(r"\^[23]|m/s|km/h|[a-z]+|[^a-z\s\".*{}^]", unit)
    singular = [word if word in UNIT_OF else word.removesuffix("s") for word in words]
    names = [word for word in words if word[0] not in "^/"]
    known = names[:1] == words[:1] != [] and (names[-1] in UNIT_OF or names[-1].endswith("s"))
    carries = any(word in NO_UNIT or re.fullmatch(ORDINAL, word) for word in words + singular)
    if not known or carries or re.search(r"\\(sin|cos|tan)", value):  # degrees of a sine
        return text, ""
    return value, " ".join(UNIT_OF.get(word, word) for word in singular)


GREEK = "alpha beta gamma delta epsilon theta phi lambda mu omega".split()
SYMBOL = rf"(?:[A-Za-z](?![A-Za-z])|\\(?:{'|'.join(GREEK)})|[A-Za-z]{{4,}}|\"[A-Za-z]+\")"
NAME = (  # of what an answer gives: x, x_1, f(2), P(A), (x,y), "Area"
    rf"(?:m?\\angle ?)?{SYMBOL}(?:_\w|_\{{[\w,]*\}}|')*|m?\\angle ?[A-Z]+|\\overline\{{[A-Z]+\}}"
    r"|[fghFGP](?:\^\{-1\})?\((?:-?[\d.]+|[A-Za-z][^()=<>+*]*)\)"
    r"|\((?:x,y(?:,z)?|a,b(?:,c)?|m,n|p,q|r,\\theta)\)"
)
PLAIN_WORDS = r'"[^"]*"|[Nn]o|[Oo]n|(?=.{3})[A-Za-z]+(?: [A-Za-z]+)*'
BOUNDS = {"<": "(-∞,{})", "≤": "(-∞,{}]", ">": "({},∞)", "≥": "[{},∞)", "≠": "(-∞,{0})∪({0},∞)"}


def read_form(text: str, seconds: list[float]) -> tuple[str, str, list[str]]:
    """Name, kind and parts of a cleaned answer.

    >>> read_form("x=1,x=2", [0.0]), read_form("x>3", [0.0])
    (('x', 'list', ['1', '2']), ('x', '()', ['3', '∞']))
    """
    choices = split_at(text, "∨")
    elements = [element for choice in choices for element in split_at(choice, ",")]
    if len(elements) > 1:
        return read_list(choices, both_signs(elements))
    name, value = split_name(interval(text), seconds)
    if name:
        return name, *read_form(value, seconds)[1:]
    if len(split_at(value, "=")) == 2:
        return "", "equation", split_at(value, "=")
    if len(split_at(value, "∪")) > 1:
        return "", "union", split_at(value, "∪")
    if value.startswith("\\{") and value.endswith("\\}"):
        return "", "set", both_signs(split_at(value[2:-2], ","))
    matrix = re.fullmatch(r"[(\[]?⟦([^⟦⟧]*)⟧[)\]]?", value)
    if matrix:
        rows = [row.split("&") for row in matrix[1].split(";")]
        width = max(len(row) for row in rows)
        return "", f"matrix {len(rows)}x{width}", [cell for row in rows for cell in row]
    inner = split_at(value[1:-1], ",")
    if len(inner) > 1 and value[0] in "([" and value[-1] in ")]":
        return "", value[0] + value[-1], inner
    both = both_signs([value])
    return "", "list" if len(both) > 1 else "value", both


def read_list(choices: list[str], elements: list[str]) -> tuple[str, str, list[str]]:
    """x < 1 or x > 2 is a union, a = 1, b = 2 a record, anything else a list."""
    bounds = [interval(choice).split("∈") for choice in choices]
    if len(bounds) > 1 and {len(bound) for bound in bounds} == {2}:
        if len({name for name, _ in bounds}) == 1:
            return bounds[0][0], "union", [part for _, s in bounds for part in split_at(s, "∪")]
    if len(choices) > 1 and len(split_at(choices[-1], ",")) > 1:  # pairs of values
        return "", "list", choices
    names, values = [], []
    for element in elements:
        name, value = split_name(element, [0.0])
        if not name and names and not re.search("[=∈<>≤≥≠]", element):
            name = names[-1]  # x = 1, 2
        names.append(name)
        values.append(value)
    if len(set(names)) == 1:
        return names[0], "list", values
    if "" in names:
        return "", "list", elements
    if len(set(names)) < len(names) or len(choices) > 1:  # x = 1 or y = 2
        return "", "value", ["∨".join(choices)]
    pairs = sorted(zip(names, values, strict=True))
    return f"({','.join(sorted(names))})", "record", [value for _, value in pairs]


def split_name(text: str, seconds: list[float]) -> tuple[str, str]:
    """The name of a value and the value, also of 5 = x and of a true chain, x = 2 + 3 = 5."""
    parts = split_at(text, "=∈")
    if len(parts) < 2 or not all(parts):
        return "", text
    if len(parts) == 2 and is_name(parts[1]) and not is_name(parts[0]):
        parts.reverse()
    letters = re.sub(r'\\[a-z]+|"[^"]*"', "", " ".join(parts[1:]))
    name = parts.pop(0) if is_name(parts[0]) and parts[0] not in letters else ""  # x = 2x + 1
    same_sign = len({part.endswith("%") for part in parts}) == 1
    if same_sign and all(equal_answers(part, parts[-1], seconds) for part in parts[:-1]):
        return name, parts[-1]
    return "", text


def is_name(text: str) -> bool:
    return bool(re.fullmatch(NAME, text)) and text.strip('"').lower() not in NO_UNIT


def interval(text: str) -> str:
    """An inequality as a set: 3 < x is "x∈(3,∞)"; other texts as they are."""
    parts, signs = split_at(text, "<>≤≥≠"), re.findall("[<>≤≥≠]", text)
    if not signs or len(parts) != len(signs) + 1 or not all(parts):
        return text
    names = [is_name(part) for part in parts]
    if names == [False, True] or (len(parts) == 3 and {*signs} <= {">", "≥"}):  # mirror it
        parts, names = parts[::-1], names[::-1]
        signs = ["><≥≤≠"["<>≤≥≠".index(sign)] for sign in reversed(signs)]
    if names == [True, False]:
        return f"{parts[0]}∈{BOUNDS[signs[0]].format(parts[1])}"
    if names == [False, True, False] and {*signs} <= {"<", "≤"}:
        start, end = "(" if signs[0] == "<" else "[", ")" if signs[1] == "<" else "]"
        return f"{parts[1]}∈{start}{parts[0]},{parts[2]}{end}"
    return text


def both_signs(elements: list[str]) -> list[str]:
    """Elements with one ± or ∓ become two; two in one element stay: which belongs to which?"""
    found = []
    for element in elements:
        signs = re.findall("[±∓]", element)
        found += [element.replace(signs[0], s) for s in "+-"] if len(signs) == 1 else [element]
    return found


def split_at(text: str, marks: str) -> list[str]:
    """Pieces between the marks outside brackets; [] for no text or unmatched or deep brackets."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character in "([{⟦") - (character in ")]}⟧")
        if not 0 <= depth <= 20:
            return []
        if character in marks and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces] if text and depth == 0 else []


def mixed_number(match: re.Match) -> str:
    """2 1/3 as (2+1/3); 5 6/6 stays, two numbers side by side, which is no expression."""
    whole, top, bottom = match.groups()
    return f"({whole}+{top}/{bottom})" if 0 < int(top) < int(bottom) else match[0]


LATEX = (  # innermost braces first, repeated until nothing changes
    (r"(?<![\w.^_}/])(?<!\d )(\d+) ?\\frac\{(\d+)\}\{(\d+)\}", mixed_number),  # 2\frac13
    (r"(?<![\w.^_}/])(?<!\d )(\d+) (\d+)/(\d+)(?![\w.])", mixed_number),
    (r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\binom\{([^{}]*)\}\{([^{}]*)\}", r"((\1) choose (\2))"),
    (r"\\sqrt\[([^][{}]*)\]\{([^{}]*)\}", r"((\2)^(1/(\1)))"),
    (r"\\sqrt\{([^{}]*)\}", r" sqrt(\1)"),
    (r"\\log_(\w|\{[^{}]*\}) ?(\d+|[a-z]|\([^()]*\)|\{[^{}]*\})(?![\w(.])", r"(\\ln(\2)/\\ln(\1))"),
    (r"\\(sin|cos|tan)\^\{?2\}? ?(\([^()]*\)|[a-zA-Z]|\\[a-z]+)(?![\w(^])", r"(\\\1(\2))^2"),
    (r"\|([^|]*)\|", r" abs(\1)"),
    (r"\^\{([^{}]*)\}", r"^(\1)"),
)
NUMERAL = r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
NAMES = {*PREFIX, *INFIX, "pi", *GREEK}


def math_tokens(text: str) -> list[str]:
    """Infix tokens of a LaTeX expression with the silent * made explicit.

    ValueError outside the whitelist, and where an argument ends who knows where, as in sin 2x.

    >>> math_tokens("2\\\\sqrt{3}x"), math_tokens("\\\\ln x")
    (['2', '*', 'sqrt', '(', '3', ')', '*', 'x'], ['ln', '(', 'x', ')'])
    """
    before = None
    while before != text:
        before = text
        for pattern, replacement in LATEX:
            text = re.sub(pattern, replacement, text)
    plain = text.replace("{", "(").replace("}", ")")
    words = re.findall(rf"{NUMERAL}|\\?[A-Za-z]+|[-+*/^()!]", plain)
    if len(words) > 300 or "".join(words) != plain.replace(" ", "") or re.search(r"\d\{", text):
        raise ValueError("too many tokens, or one that is not in the grammar")
    tokens, bare = [], False  # bare: behind the argument of a function without brackets
    for word in itertools.chain.from_iterable(map(split_word, words)):
        last = tokens[-1] if tokens else "("
        is_operator = word in INFIX or word in (")", "!")
        if (bare and (word in "^!(" or not (is_operator or word in PREFIX))) or word == last == "!":
            raise ValueError("sin 2x, sin x^2 or 3!!")
        bare = last in FUNCTIONS and word != "("
        if bare and (is_operator or word in PREFIX):
            raise ValueError("a function without an argument")
        if last not in INFIX and last not in PREFIX and last != "(":
            is_digit = word[0] in "0123456789."
            if (is_digit and last[-1].isalnum()) or (word == "(" and last in ("f", "g", "h", "P")):
                raise ValueError("1 0, x2, or f(2), which is no product")
            tokens += [] if is_operator else ["*"]
        tokens += ["(", word, ")"] if bare else [word]
    return tokens


def split_word(word: str) -> list[str]:
    """A known name, numeral or sign as it is; up to three other letters as separate symbols."""
    name = word.removeprefix("\\")
    if name in NAMES or not name.isalpha():
        return [name]
    if word != name or len(name) > 3:
        raise ValueError(f"{word!r} is not in the grammar")
    return list(name)


# ----------------------------------------------------------------------------------- symbolic stage
# sympy runs in a child process: this file, started by its path, so that the user's script is never
# run again. To a line of JSON [postfix, postfix, seconds] it replies "r", which starts the clock,
# and then "1" or "0".

SYMBOLIC_SECONDS = 1.5  # per answer; a hundredth is enough for most
symbolic_timeouts = 0  # answers judged wrong because the child was late or died
_children = {}  # by process id: a forked process must not write into its parent's pipe
_one_request = threading.Lock()


def symbolic_equal(left: list[str], right: list[str], seconds: list[float]) -> bool:
    """The child's verdict; False when it needs more than seconds[0], which loses what was used."""
    global symbolic_timeouts
    if seconds[0] <= 0:
        return False
    with _one_request:
        child, verdict = running_child(), b""
        try:
            child.stdin.write(json.dumps([left, right, seconds[0]]).encode() + b"\n")
            if child.stdout.read(1) != b"r":  # not timed: the child imports sympy first
                raise OSError(f"the symbolic stage does not start: {' '.join(child.args)}")
            started = time.monotonic()
            verdict = child.stdout.read(1)
            seconds[0] -= time.monotonic() - started
        finally:
            if not verdict:  # late, dead or Ctrl-C: no reply may be left for the next request
                child.kill()
                child.wait()
        if not verdict:
            symbolic_timeouts += 1
            running_child()  # the next one imports sympy while the caller goes on
    return verdict == b"1"


def running_child() -> Popen:
    child = _children.get(os.getpid())
    if child is None or child.poll() is not None:
        command = [sys.executable, os.path.abspath(__file__), "--symbolic-child"]
        # not in our process group: Ctrl-C is for the script, which goes on to save
        pipes = {"stdin": PIPE, "stdout": PIPE, "stderr": DEVNULL, "bufsize": 0}
        child = _children[os.getpid()] = Popen(command, **pipes, start_new_session=True)
    return child


def serve_symbolic() -> None:
    """The child's loop; it ends with its input, that is with its parent, or when it is late."""
    faulthandler.dump_traceback_later(60, exit=True)  # a thread in C: it also ends a huge product
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    operations, atom = sympy_grammar()
    postfix = to_postfix(math_tokens("sqrt(x^2-1)-1"))  # sympy imports more on first use
    is_zero(evaluate(postfix, operations, atom))
    faulthandler.cancel_dump_traceback_later()
    for line in sys.stdin:
        left, right, seconds = json.loads(line)
        faulthandler.dump_traceback_later(seconds, exit=True)
        os.write(1, b"r")
        try:
            left, right = (evaluate(side, operations, atom) for side in (left, right))
            verdict = is_zero(left - right)
        except (ArithmeticError, AttributeError, MemoryError, RuntimeError, TypeError, ValueError):
            verdict = False
        faulthandler.cancel_dump_traceback_later()
        os.write(1, b"1" if verdict else b"0")


def is_zero(difference) -> bool:
    """Whether a sympy expression is 0: tried at one point, which settles most, then proved."""
    symbols = sorted(difference.free_symbols, key=str)
    point = {x: Fraction(10 + i, 7) for i, x in enumerate(symbols)}
    return not abs(difference.subs(point).evalf(30)) > 1e-15 and difference.equals(0) is True


def sympy_grammar() -> tuple[dict[str, Callable], Callable]:
    """Operations and atoms of sympy for `evaluate`: everything that an answer can make it do."""
    import sympy

    def atom(token: str) -> sympy.Expr:
        if token[0] in ".0123456789":
            return sympy.Rational(*Fraction(token).as_integer_ratio())
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I}.get(token) or sympy.Symbol(token)

    def power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
        bits = 20 if base.is_Atom else 1000  # (x+y+z)^n grows fast: n at most 20, 1000 in x^n
        if base.is_Rational:
            bits = base.p.bit_length() + base.q.bit_length()
        if exponent.is_Rational and (abs(exponent) * bits > MAX_BITS or base == exponent == 0):
            raise ValueError("too large a power, or 0^0")
        if base.is_negative and exponent.is_Rational and exponent.q % 2 and exponent.q > 1:
            return (-1) ** exponent.p * (-base) ** exponent  # the real root of a negative number
        return base**exponent

    operations = {name: getattr(sympy, name) for name in "sqrt sin cos tan cot sec csc exp".split()}
    operations |= {"arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan}
    operations |= {"ln": sympy.log, "log": lambda x: sympy.log(x, 10), "abs": sympy.Abs}
    operations |= {"^": power, "!": lambda n: sympy.factorial(small_integer(n))}
    operations["choose"] = lambda n, k: sympy.binomial(small_integer(n), small_integer(k))
    return ARITHMETIC | operations, atom


if __name__ == "__main__" and sys.argv[1:] == ["--symbolic-child"]:
    serve_symbolic()
