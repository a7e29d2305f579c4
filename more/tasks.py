"""More tasks, for any script: --task knights:max_people=5, or more/tasks.py:KnightsAndKnaves:..

    generalpoints  GeneralPoints     reach a target with a hand of cards (arXiv:2501.17161 sec. 4.1)
    scene          Scene             a question on a picture, seen as codes (2504.15362)
    navigation     Navigation        follow a route in words (2501.17161 app. B)
    knights        KnightsAndKnaves  who always tells the truth? (2505.13718)
    multiplication Multiplication    products of two integers (TinyZero)
    affine         AffineChain       additions and multiplications, one after the other
    s3             S3                the word problem of the smallest group where order matters
    resolve        Resolve           definitions out of order, of which some lead to the answer
    prosqa         ProsQA            two concepts, one above a node of a graph (2412.06769 app. A.2)
    chains         Chains            problems with steps, from a file: ProsQA, ProntoQA, GSM8K-Aug
    plans          Plans             the same with a plan before the steps (R-Capsule, 2509.22131)
    notations      Notations         countdown in two notations (R1's language mixing, 2501.12948)
    patterns       Patterns          countdown by named operator patterns (2502.06772)
    code           Code              programs against tests, from a file (AceCode, 2502.01718)
    toycode        ToyCode           the program behind three inputs and outputs (its stand-in)

rewards.py says what a task is, and knows these by their short names. What stands here, one
experiment or one script uses: those of docs/sft_experiments.md, coconut.py, recurrent_depth.py,
more/r_capsule.py, more/reasonflux.py.
"""

import functools
import itertools
import json
import math
import operator
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from rewards import (
    ARITHMETIC,
    GSM8K,
    INSTRUCTION,
    MAX_ANSWER,
    BadInput,
    Countdown,
    clean,
    evaluate,
    expression_tokens,
    extract_answer,
    mean,
    number_text,
    random_tree,
    read_jsonl,
    read_rows,
    reading,
    score,
    split_of,
    text_of,
    to_postfix,
)

# ------------------------------------------------------------------- searches for countdown
# What rewards.Countdown.trace writes, and the solver.


Number = int | Fraction  # an int where it can be: much faster
Item = tuple[Number, str, int]  # value, expression, how tightly it binds: 1 sum, 2 product, 3


def apply_operator(op: str, a: Number, b: Number) -> Number | None:
    """a op b, exactly; None for a division by zero."""
    if op != "/":
        return ARITHMETIC[op](a, b)
    if b == 0:
        return None
    return a // b if a % b == 0 else Fraction(a) / b


def combinations(pool: list[Item], operators: str) -> Iterator[list[Item]]:
    """Every pool with two items of this one replaced by their combination, which is last."""
    for i, j in itertools.permutations(range(len(pool)), 2):
        (a, left, left_rank), (b, right, right_rank) = pool[i], pool[j]
        rest = [item for k, item in enumerate(pool) if k not in (i, j)]
        for op in operators:
            value, rank = apply_operator(op, a, b), 1 if op in "+-" else 2
            if value is not None:  # brackets only where precedence needs them
                x = f"({left})" if left_rank < rank else left
                same = right_rank == rank and op in "-/"
                y = f"({right})" if right_rank < rank or same else right
                yield [*rest, (value, x + op + y, rank)]


def operations(expression: str) -> Iterator[tuple[str, str]]:
    """The operations of an expression in reading order, each with what is left after it.

    >>> list(operations("2*(9-4)+7"))
    [('9-4', '2*5+7'), ('2*5', '10+7'), ('10+7', '17')]
    """
    while not expression.isdigit():
        done, expression = first_operation(expression)
        yield done, expression


@functools.lru_cache(maxsize=2**16)  # many expressions end alike
def first_operation(expression: str) -> tuple[str, str]:
    inner = re.search(r"\([^()]+\)|^[^()]+$", expression)[0]
    found = re.search(r"(\d+)([*/])(\d+)", inner) or re.search(r"(\d+)([+-])(\d+)", inner)
    value = apply_operator(found[2], int(found[1]), int(found[3]))
    expression = expression.replace(inner, inner.replace(found[0], str(value), 1), 1)
    return found[0], re.sub(r"\((\d+)\)", r"\1", expression)


@functools.lru_cache(maxsize=4096)
def countdown_attempts(numbers: tuple[int, ...], operators: str, limit: int) -> list[tuple]:
    """Every way to combine all `numbers` in 0..limit: (value, first operation, steps), by value.

    >>> countdown_attempts((2, 3), "-*", 99)
    [(1, '3-2', '3-2=1'), (6, '2*3', '2*3=6'), (6, '3*2', '3*2=6')]
    """
    pools, found, attempts = [[(n, str(n), 3) for n in numbers]], set(), []
    while pools:
        pool = pools.pop()
        if len(pool) == 1:
            found.add(pool[0][1])
        for after in combinations(pool, operators):
            value = after[-1][0]
            if value.denominator == 1 and 0 <= value <= limit:
                pools.append(after)
    for expression in sorted(found):
        done, left = zip(*operations(expression), strict=True)
        chain = "=".join([expression, *left])
        if all(int(n) <= limit for n in re.findall(r"\d+", chain)):  # 10*(10/5) reads 10*10/5
            attempts.append((int(left[-1]), done[0], chain))
    return sorted(attempts)


def solve_countdown(numbers: Sequence[int], target: int) -> str | None:
    """An expression over all the numbers that equals the target, None if there is none.

    Exhaustive and exact.

    >>> solve_countdown([3, 3, 8, 8], 24), solve_countdown([1, 1, 1, 1], 24)
    ('8/(3-8/3)', None)
    """
    visited = set()

    def search(pool: list[Item]) -> str | None:
        if len(pool) == 1:
            value, expression, _ = pool[0]
            return expression if value == target else None
        values = tuple(sorted(value for value, _, _ in pool))
        if values in visited:  # of all texts for these values, one is enough
            return None
        visited.add(values)
        for rest in combinations(pool, "+-*/"):
            found = search(rest)
            if found:
                return found
        return None

    return search([(n, str(n), 3) for n in numbers])


def try_line(value: int, chain: str, target: int) -> str:
    """A line of a trace: an expression, worked out in steps, and compared with the target."""
    sign = "="
    if value != target:
        sign = "<" if value < target else ">"
    return f"{chain}{sign}{target}\n"


def search_trace(task: Countdown, problem: dict, rng: random.Random) -> str:
    """A depth-first search: one try a line, then the answer, which repeats the last try.

    Tries with the same first operation stand together, in random order. Some end on a miss.
    """
    target, numbers = problem["target"], tuple(sorted(problem["numbers"]))
    attempts = countdown_attempts(numbers, task.operators, 99)  # up to 99 are single tokens
    firsts = sorted({first for _, first, _ in attempts})
    rank = dict(zip(firsts, rng.sample(range(len(firsts)), len(firsts)), strict=True))
    shuffled = sorted((rank[first], rng.random(), v, chain) for v, first, chain in attempts)
    attempts = [(value, chain) for _, _, value, chain in shuffled]
    misses = [attempt for attempt in attempts if attempt[0] != target]
    hits = [i for i, (value, _) in enumerate(attempts) if value == target]
    if not hits or (misses and rng.random() < task.give_up):
        tries = misses[: rng.randint(1, 4)]
    else:  # most of them are seen from shortly before their end
        wrong = rng.randint(0, 1) if rng.random() < 0.75 else 29
        tries = attempts[max(0, hits[0] - wrong) : hits[0] + 1]
    lines = [try_line(value, chain, target) for value, chain in tries]
    lines[1:] = [("wait" if rng.random() < 0.25 else "") + line for line in lines[1:]]
    answer = tries[-1][1].partition("=")[0]
    return f"{''.join(lines)}</think><answer>{answer}</answer>"


# --------------------------------------------------------------------------- GeneralPoints

RANKS = {rank: value for value, rank in enumerate("A 2 3 4 5 6 7 8 9 10 J Q K".split(), 1)}
POINTS = {"correct": 5, "wrong_value": -1, "wrong_numbers": -2, "illegal": -3, "limit": -1}


def points_verdict(formula: str, numbers: Sequence[int], target: int) -> str:
    """What the verifier says of a formula: the first fault that it has, else "correct".

    Faults in this order: "illegal", "wrong_numbers", "wrong_value". Signs in front of a number are
    illegal, what follows an = is not read, values are exact. That the first fault counts is the
    paper's reading; its code adds the penalties up and rounds. POINTS has the rewards.
    Source: arXiv:2501.17161 app. A.3.

    >>> formulas = "3*10-6*1=24", "(1+6)*3+10", "3*10-6", "3*("
    >>> [points_verdict(formula, [1, 3, 10, 6], 24) for formula in formulas]
    ['correct', 'wrong_value', 'wrong_numbers', 'illegal']
    """
    try:
        postfix = to_postfix(expression_tokens(formula.partition("=")[0]))
    except ValueError:
        return "illegal"
    if "neg" in postfix or "pos" in postfix:
        return "illegal"
    if Counter(int(token) for token in postfix if token.isdigit()) != Counter(numbers):
        return "wrong_numbers"
    try:
        value = evaluate(postfix, ARITHMETIC, Fraction)
    except ZeroDivisionError:
        return "wrong_value"
    return "correct" if value == target else "wrong_value"


def points_formula(text: str) -> str | None:
    """The first "formula" of an answer in JSON, however broken the rest; None without one.

    A text, also with a line break at its end, or a number, which is a formula of one numeral.

    >>> points_formula('{"formula": "3*8\\\\n"} {"formula": 24}'), points_formula('{"formula": 24}')
    ('3*8\\n', '24')
    """
    found = re.search(r'"formula"\s*:\s*("(?:[^"\\]|\\.)*"|[0-9.]+)', text[: MAX_ANSWER + 1])
    if found is None:
        return None
    try:
        return str(json.loads(found[1], strict=False))
    except ValueError:
        return found[1].strip('"')


@dataclass
class GeneralPoints:
    """Reach the target with the values of a hand of cards, each used once.

    J, Q and K count 10 under rule 10, and 11, 12, 13 under rule 13. The paper trains on rule 10 and
    tests on rule 13 with a face card on every hand (faces=1). The split goes by values and target,
    so it is the same under both rules. Source: arXiv:2501.17161 sec. 4.1, app. A.1.
    """

    cards: int = 3
    target: int = 0  # 0: another one for each hand, 1 to 99
    rule: int = 10
    faces: int = 0  # face cards on every hand, at least
    turns: int = 1  # so many attempts less one, at most, stand in the prompt, with their verdicts
    basics: float = 0.0  # share of easier training problems, to read a hand or with plain numbers
    images: bool = False  # cards as codes of a picture (more/pictures.py)
    suits: str = "both"  # black, red, both: of pictures to solve

    NATURAL = {"cards": 4, "target": 24}
    SUITS = {"black": ("spades", "clubs"), "red": ("hearts", "diamonds")}
    CHECKS = 5  # attempts that the verifier looks at; a sixth costs 1 point unseen
    MARKS = {"illegal": "#s", "wrong_numbers": "#n", "wrong_value": "#v"}  # syntax, numbers, value
    REASONS = {
        "illegal": "the formula is not legal",
        "wrong_numbers": "the numbers are not those of the cards",
        "wrong_value": "the value is not the target",
    }

    def __post_init__(self):
        if not (2 <= self.cards <= 4 and 0 <= self.faces <= self.cards and 0 <= self.target <= 99):
            allowed = "2 to 4 cards, at most so many faces, and a target up to 99 are allowed"
            raise BadInput(f"{self}: {allowed}")
        known = self.rule in (10, 13) and 1 <= self.turns <= self.CHECKS
        if not known or not 0 <= self.basics <= 1:
            allowed = f"rule 10 or 13, turns 1 to {self.CHECKS} and basics 0 to 1 are allowed"
            raise BadInput(f"{self}: {allowed}")
        if self.suits not in (*self.SUITS, "both"):
            raise BadInput(f"{self}: suits are black, red or both")

    def problem(self, split: str, seed: int, index: int) -> dict:
        rng = random.Random(f"generalpoints {split} {seed} {index}")
        easy = split == "train" and rng.random() < self.basics
        kind = rng.choice(["read", "plain"]) if easy else "solve"
        rules = {"read": rng.choice([10, 13]), "plain": 13, "solve": self.rule}
        for _ in range(10_000):
            problem = self.hand(kind, rules[kind], rng)
            if problem["target"] not in range(1, 100) and kind != "read":
                continue
            if split_of(self.key(problem)) != split:
                continue
            if self.target and kind != "read":  # the value of a random tree needs no proof
                if not solve_countdown(problem["numbers"], self.target):
                    continue
            for _ in range(rng.randrange(self.turns) if kind == "solve" else 0):
                problem = self.revise(problem, f"<answer>{self.failure(problem, rng)}</answer>")
            if self.images:
                some = self.SUITS.get(self.suits) if kind == "solve" else None
                suits = rng.choices(some or sum(self.SUITS.values(), ()), k=self.cards)
                problem |= {"suits": suits, "picture": rng.getrandbits(32)}
            return problem
        raise BadInput(f"no solvable hand found for {self}; take more cards or target=0")

    def hand(self, kind: str, rule: int, rng: random.Random) -> dict:
        """A random hand; its target may be one that no problem has."""
        cards = []
        for i in range(self.cards):
            cards.append(rng.choice("JQK" if i < self.faces else list(RANKS)))
        rng.shuffle(cards)
        numbers = [RANKS[card] if rule == 13 else min(10, RANKS[card]) for card in cards]
        target = 0
        if kind != "read":
            target = self.target or random_tree([Fraction(n) for n in numbers], "+-*/", rng)
            if target in range(1, 100):
                target = int(target)
        problem = {"kind": kind, "rule": rule, "cards": cards, "numbers": numbers}
        return problem | {"target": target, "failed": []}

    def failure(self, problem: dict, rng: random.Random) -> str:
        """A wrong attempt: over the hand's numbers, or with one of them misread."""
        numbers = problem["numbers"][:]
        numbers[0] = rng.choice([numbers[0], rng.randint(1, 13)])
        chains = [chain for _, _, chain in countdown_attempts(tuple(sorted(numbers)), "+-*/", 99)]
        for chain in rng.sample(chains, len(chains)):
            formula = chain.partition("=")[0]
            if points_verdict(formula, problem["numbers"], problem["target"]) != "correct":
                return formula
        return "1"

    def key(self, problem: dict) -> str:
        return f"{sorted(problem['numbers'])}={problem['target']}"  # as Countdown's

    def compact(self, problem: dict) -> str:
        hand = f"R{problem['rule']}|{','.join(problem['cards'])}"
        if "picture" in problem:
            from more.pictures import hand_tokens

            codes = hand_tokens(problem["cards"], problem["suits"], problem["picture"])
            hand = f"R{problem['rule']}|{codes}"
        if problem["kind"] == "read":
            return f"{hand}?<think>"
        if problem["kind"] == "plain":
            hand = ",".join(map(str, problem["numbers"]))
        failed = "".join(f" {f}{self.MARKS[verdict]}" for f, verdict in problem["failed"])
        return f"{hand}={problem['target']}{failed}<think>"

    def question(self, problem: dict) -> str:
        if self.images:
            raise BadInput("the codes of a picture are words of a tiny model alone")
        faces = "J counts as 11, Q as 12 and K as 13"
        if problem["rule"] == 10:
            faces = "J, Q and K each count as 10"
        given = f"Cards: [{', '.join(problem['cards'])}]. A counts as 1, {faces}."
        if problem["kind"] == "plain":
            given = f"Numbers: {problem['numbers']}."
        if problem["kind"] == "read":
            asked, example = "Which numbers are these?", "1,5,10"
        else:
            asked = "Using each number exactly once, with + - * / and parentheses, make "
            asked += f"{problem['target']}."
            for formula, verdict in problem["failed"]:
                asked += f" You tried {formula}, which failed: {self.REASONS[verdict]}."
            example = '{"cards": ["A", "5", "K"], "number": [1, 5, 10], "formula": "(10-5)*1"}'
        return f"{given} {asked} {INSTRUCTION}, for example <answer>{example}</answer>."

    def judge(self, text: str, problem: dict) -> tuple[str, str]:
        """The formula of a completion and its verdict; "limit" once CHECKS attempts have failed."""
        answer = extract_answer(text) or ""
        formula = points_formula(answer) or answer
        if len(problem["failed"]) >= self.CHECKS:
            return formula, "limit"
        return formula, points_verdict(formula, problem["numbers"], problem["target"])

    def score(self, text: str, problem: dict, **kw) -> dict:
        answer = extract_answer(text)
        if problem["kind"] == "read":
            return score(text, answer, answer == ",".join(map(str, problem["numbers"])), **kw)
        _, verdict = self.judge(text, problem)
        parts = score(text, answer, verdict == "correct", **kw)
        return parts | {"verdict": verdict, "points": POINTS[verdict]}

    def revise(self, problem: dict, text: str) -> dict:
        """The problem of the next turn: this one, a failed attempt and its verdict (app. A.2).

        After a right answer, or one that was not looked at, there is no next turn.
        """
        formula, verdict = self.judge(text, problem)
        if verdict not in self.MARKS:
            return problem
        shown = re.sub("[^-0-9+*/()=AJQK ]", "", formula)[:40]
        return problem | {"failed": [*problem["failed"], [shown, verdict]]}

    def trace(self, problem: dict, rng: random.Random) -> str:
        """The values of the cards, then Countdown's search.

        It ends on a miss where only fractions or numbers above 99 lead to the target.
        """
        values = ",".join(map(str, problem["numbers"]))
        if problem["kind"] == "read":
            return f"{values}\n</think><answer>{values}</answer>"
        search = search_trace(Countdown(give_up=0.0), problem, rng)
        return f"{values}\n{search}" if problem["kind"] == "solve" else search

    def describe(self, text: str, problem: dict) -> dict:
        return Countdown().describe(text, problem)


# ---------------------------------------------------------------------- questions on a picture


@dataclass
class Scene:
    """A question with four options on a picture of 4 x 4 cells, seen as codes (arXiv:2504.15362).

    The answer is the right option itself: a letter for it is a second task for a tiny model.

    The record, what is where, serves the question, the verdict and the reasoner that expands a
    thought (`expand`); the model sees the codes of more/pictures.py alone. Asked is how many are of
    a colour or shape, for the colour of the first of a shape, the shape of the last of a colour.
    """

    basics: float = 0.0  # share of training problems without options, which ask for a tally

    COLOURS = {"r": "red", "g": "green", "b": "blue", "y": "yellow"}
    SHAPES = {"o": "circle", "s": "square", "t": "triangle", "x": "cross"}

    def __post_init__(self):
        if not 0 <= self.basics <= 1:
            raise BadInput(f"{self}: basics is a share, 0 to 1")

    def problem(self, split: str, seed: int, index: int) -> dict:
        """cells: a letter for colour and one for shape, or ".." for nothing."""
        rng = random.Random(f"scene {split} {seed} {index}")
        easy = split == "train" and rng.random() < self.basics
        colours, shapes = list(self.COLOURS), list(self.SHAPES)
        while True:
            things = [rng.choice(colours) + rng.choice(shapes) for _ in range(16)]
            cells = [thing if rng.random() < 0.5 else ".." for thing in things]
            kind = rng.choice("nnfl")
            asked = rng.choice({"n": colours + shapes, "f": shapes, "l": colours}[kind])
            problem = {"cells": cells, "asked": kind + asked, "picture": rng.getrandbits(32)}
            if easy:
                return problem | {"options": []}
            gold = self.value(cells, problem["asked"])
            if gold == "-" or split_of(self.key(problem)) != split:
                continue
            others = {"f": colours, "l": shapes}.get(kind) or [str(n) for n in range(7)]
            others = rng.sample([value for value in others if value != gold], 3)
            return problem | {"options": rng.sample([gold, *others], 4)}

    def key(self, problem: dict) -> str:
        return f"{''.join(problem['cells'])} {problem['asked']}"

    def value(self, cells: list[str], asked: str) -> str:
        """What is asked for, of some cells; "-": there is none."""
        kind, what = asked
        found = [cell for cell in cells if what in cell]
        if kind == "n":
            return str(len(found))
        if not found:
            return "-"
        return found[0][0] if kind == "f" else found[-1][1]

    def compact(self, problem: dict) -> str:
        from more.pictures import scene_tokens

        names = self.COLOURS | self.SHAPES
        cells = [tuple(names[x] for x in cell if x != ".") for cell in problem["cells"]]
        codes = scene_tokens(cells, problem["picture"])
        options = "".join(problem["options"]) or "?"
        return f"{codes}{problem['asked']}{options:4}<think>"  # all as long: cells have places

    def question(self, problem: dict) -> str:
        raise BadInput("the codes of a picture are words of a tiny model alone")

    def answer(self, problem: dict) -> str:
        return self.value(problem["cells"], problem["asked"])

    def trace(self, problem: dict, rng: random.Random) -> str:
        """A short thought: the value alone; without options no guess, but a tally."""
        answer, cells = self.answer(problem), problem["cells"]
        if not problem["options"]:
            return "?" + self.expand(problem, cells, cells)
        return f"{answer}</think><answer>{answer}</answer>"

    def tally(self, cells: list[str], asked: str) -> str:
        """Each cell, what is looked for, the value so far: a comparison and a step at a time."""
        steps, what = "", asked[1]
        for i, cell in enumerate(cells):
            steps += f"{cell}{what}{self.value(cells[: i + 1], asked)}"
        return steps

    def expand(self, problem: dict, seen: list[str], concluded: list[str]) -> str:
        """A reasoner's thought: a tally, then the answer.

        seen and concluded are the cells of the tally and of the answer: this picture's or not.
        """
        value = self.value(concluded, problem["asked"])
        tally = self.tally(seen, problem["asked"])
        return f"wait{tally}\n{value}</think><answer>{value}</answer>"

    def score(self, text: str, problem: dict, **kw) -> dict:
        answer = extract_answer(text)
        return score(text, answer, answer == self.answer(problem), **kw)

    def describe(self, text: str, problem: dict) -> dict:
        """Is the first guess right, is it looked at again, is it put right?"""
        thought = text.partition("</think>")[0]
        first, again, _ = thought.partition("wait")
        guess = first.strip() == self.value(problem["cells"], problem["asked"])
        right = extract_answer(text) == self.answer(problem)
        marks = {"first_right": guess, "waits": again != "", "corrected": right and not guess}
        return {name: float(mark) for name, mark in marks.items()}


# ------------------------------------------------------------------------ Knights & Knaves

PEOPLE = "Ada Ben Cleo Dan Eve Fay Gus Hal".split()  # written A to H
VERDICTS = {1: "+", 0: "-"}


def truth(statement: list, roles: Sequence[float]) -> float:
    """1 if the statement is true, 0 if false, 0.5 if what is known of the roles leaves it open.

    roles: 1 knight, 0 knave; of those that are missing nothing is known (Kleene's strong logic).
    A statement is [knight, i], [knave, i], [not, s], [and | or | implies | iff, s, t], or
    [exactly, k, s, t, ...]: k of these are true.

    >>> [truth([kind, ["knight", 0], ["knave", 1]], [1]) for kind in ("or", "iff")]
    [1, 0.5]
    >>> [truth(["exactly", k, ["knight", 0], ["knave", 1]], [1]) for k in (0, 1, 2)]
    [0, 0.5, 0.5]
    """
    kind, *parts = statement
    if kind == "exactly":
        values = [truth(part, roles) for part in parts[1:]]
        least, most = sum(v == 1 for v in values), sum(v > 0 for v in values)
        if not least <= parts[0] <= most:
            return 0
        return 1 if least == most else 0.5
    if kind in ("knight", "knave"):
        role = roles[parts[0]] if parts[0] < len(roles) else 0.5
        return role if kind == "knight" else 1 - role
    a, b = truth(parts[0], roles), truth(parts[-1], roles)
    if kind == "not":
        return 1 - a
    if kind == "and":
        return min(a, b)
    if kind == "or":
        return max(a, b)
    if kind == "implies":
        return max(1 - a, b)
    return min(max(1 - a, b), max(1 - b, a))


def solve_knights(statements: list[list]) -> list[tuple[int, ...]]:
    """All roles with which everybody is a knight if his statement is true and only then.

    Knights come first.
    """
    found = []
    for world in itertools.product((1, 0), repeat=len(statements)):
        if all(truth(s, world) == role for s, role in zip(statements, world, strict=True)):
            found.append(world)
    return found


def contradiction(statements: list[list], roles: list[int]) -> int | None:
    """The first of those with a role whose statement contradicts it."""
    for i, role in enumerate(roles):
        if truth(statements[i], roles) == 1 - role:
            return i
    return None


def letters_of(roles: Sequence[int]) -> str:
    """Roles in a few characters.

    >>> letters_of([0, 1])
    'A-B+'
    """
    return "".join(letter(i) + ("+" if role else "-") for i, role in enumerate(roles))


def letter(person: int) -> str:
    """A for the first one, whatever the name."""
    return chr(65 + person)


@dataclass
class KnightsAndKnaves:
    """Who is a knight and only says what is true, who a knave and only says what is false?

    Puzzles with exactly one solution; statements as in the data of arXiv:2505.13718: a claim, or
    not, and, or, implies, iff over claims. A problem of another source may also count ("exactly",
    see truth) and give the people other "names"; the short form writes A, B, C for them.
    """

    min_people: int = 2
    max_people: int = 3
    check: bool = False  # traces of small steps: worlds, each with what every statement is worth
    kinds: str = "claim/not/and/or/implies/iff"

    NATURAL = {"min_people": 3, "max_people": 7}
    SIGNS = {"and": "&", "or": "|", "implies": ">", "iff": "="}
    WORDS = {
        "and": "{} and {}",
        "or": "{} or {}",
        "implies": "if {} then {}",
        "iff": "{} if and only if {}",
        "not": "it is not true that {}",
    }

    def __post_init__(self):
        if not 2 <= self.min_people <= self.max_people <= len(PEOPLE):
            counts = f"{self.min_people} to {self.max_people}"
            raise BadInput(f"{self}: 2 to {len(PEOPLE)} people are allowed, not {counts}")
        if not {*self.kinds.split("/")} <= {"claim", "not", *self.SIGNS}:
            raise BadInput(f"{self}: kinds are some of claim/not/{'/'.join(self.SIGNS)}")

    def problem(self, split: str, seed: int, index: int) -> dict:
        rng = random.Random(f"knights {split} {seed} {index}")
        while True:  # half of the puzzles have exactly one solution
            count = rng.randint(self.min_people, self.max_people)
            statements = [self.statement(count, rng) for _ in range(count)]
            problem = {"statements": statements}
            if split_of(self.key(problem)) == split and len(solve_knights(statements)) == 1:
                return problem

    def statement(self, count: int, rng: random.Random) -> list:
        claims = [[rng.choice(["knight", "knave"]), rng.randrange(count)] for _ in range(2)]
        kind = rng.choice(self.kinds.split("/"))
        if kind == "claim":
            return claims[0]
        return [kind, claims[0]] if kind == "not" else [kind, *claims]

    def key(self, problem: dict) -> str:
        said = enumerate(problem["statements"])
        return ";".join(f"{letter(i)}:{self.signs(s)}" for i, s in said) + "?<think>"

    def compact(self, problem: dict) -> str:
        """
        >>> statements = [["and", ["knight", 1], ["knave", 0]], ["not", ["knight", 0]]]
        >>> problem = {"statements": statements}
        >>> [KnightsAndKnaves(check=check).compact(problem) for check in (False, True)]
        ['A:(B+&A-);B:~A+?<think>', '1&Ba2~A?<think>']
        """
        if not self.check:
            return self.key(problem)
        said = enumerate(problem["statements"], 1)
        return "".join(f"{i}{self.cased(s)}" for i, s in said) + "?<think>"

    def cased(self, statement: list, roles: Sequence[int] = ()) -> str:
        """A problem's statement; A: Ada is a knight, a: a knave. With roles, each claim's value.

        A claim is true where the same letter stands in the world, so no sign is to be copied or
        turned round, and the connective comes first, right behind the speaker's number: what a
        small model takes long to learn is to copy from the middle of look-alike statements.

        >>> KnightsAndKnaves().cased(["or", ["knight", 0], ["knave", 1]], [1, 1])
        '|A+b-'
        """
        kind, *parts = statement
        if kind in ("knight", "knave"):
            name = letter(parts[0]) if kind == "knight" else letter(parts[0]).lower()
            return name + VERDICTS[truth(statement, roles)] if roles else name
        inner = "".join(self.cased(part, roles) for part in parts)
        return ("~" if kind == "not" else self.SIGNS[kind]) + inner

    def signs(self, statement: list) -> str:
        """
        >>> KnightsAndKnaves().signs(["exactly", 1, ["knight", 0], ["not", ["knave", 1]]])
        '1(A+,~B-)'
        """
        kind, *parts = statement
        if kind in ("knight", "knave"):
            return letter(parts[0]) + ("+" if kind == "knight" else "-")
        if kind == "exactly":
            return f"{parts[0]}({','.join(self.signs(part) for part in parts[1:])})"
        inner = [self.signs(part) for part in parts]
        return f"~{inner[0]}" if kind == "not" else f"({self.SIGNS[kind].join(inner)})"

    def words(self, statement: list, names: list[str]) -> str:
        kind, *parts = statement
        if kind in ("knight", "knave"):
            return f"{names[parts[0]]} is a {kind}"
        if kind == "exactly":
            inner = "; ".join(self.words(part, names) for part in parts[1:])
            return f"exactly {parts[0]} of these are true: {inner}"
        return self.WORDS[kind].format(*(self.words(part, names) for part in parts))

    def names(self, problem: dict) -> list[str]:
        return problem.get("names") or PEOPLE[: len(problem["statements"])]

    def puzzle(self, problem: dict) -> str:
        names, said = self.names(problem), []
        for name, statement in zip(names, problem["statements"], strict=True):
            said.append(f'{name} says: "{self.words(statement, names)}."')
        return (
            f"There are {len(names)} people: {', '.join(names)}. Each is either a knight, who only "
            "says true things, or a knave, who only says false things. "
            f"{' '.join(said)} Who is what?"
        )

    def question(self, problem: dict) -> str:
        first, second = self.names(problem)[:2]
        example = f"<answer>{first}: knight; {second}: knave</answer>"
        return f"{self.puzzle(problem)} {INSTRUCTION}, for example {example}."

    def score(self, text: str, problem: dict, **kw) -> dict:
        """Ada: knight; Ben: knave and A+B- both count; everybody must be named once."""
        answer, [roles] = extract_answer(text), solve_knights(problem["statements"])
        said = (answer or "")[: MAX_ANSWER + 1].replace("knight", "+").replace("knave", "-")
        letters = {name: letter(i) for i, name in enumerate(self.names(problem))}
        longest_first = sorted(letters, key=len, reverse=True)  # Anna before Ann
        pattern = "|".join(re.escape(name) for name in longest_first)
        said = re.sub(pattern, lambda found: letters[found[0]], said)
        said = re.sub(r"[\s,;.:]|\bis an?\b|\band\b", "", said)
        pairs = re.findall("[A-Z][-+]", said)
        right = "".join(sorted(pairs)) == letters_of(roles) and "".join(pairs) == said
        return score(text, answer, right, **kw)

    def search(self, statements: list[list]) -> tuple[str, list[int]]:
        """Assume one role after the other, knight first: the text, the roles in the end or none.

        A+ knight, A- knave, !B: B's statement contradicts B's role, so the last role that can
        changes. A line ends where an assumption fails.
        """
        text, roles = "", []
        while len(roles) < len(statements):
            roles.append(1)
            text += f"{letter(len(roles) - 1)}+"
            wrong = contradiction(statements, roles)
            while wrong is not None:
                text += f"!{letter(wrong)}\n"
                while roles and not roles[-1]:
                    roles.pop()
                if not roles:
                    return text, []
                roles[-1] = 0
                text += f"{letter(len(roles) - 1)}-"
                wrong = contradiction(statements, roles)
        return text, roles

    def checked(self, statements: list[list], roles: Sequence[int], stop: bool = True) -> str:
        """A world, a letter a person, small for knaves, and what the statements are worth in it.

        Behind its number each is copied with the value of its claims and = its own, + or -, as
        far as the first that contradicts its speaker's role: !
        """
        world = (["knight" if role else "knave", i] for i, role in enumerate(roles))
        text = "".join(map(self.cased, world))
        for i, statement in enumerate(statements):
            worth = truth(statement, roles)
            text += f"{i + 1}{self.cased(statement, roles)}={VERDICTS[worth]}"
            if stop and worth != roles[i]:
                return text + "!"
        return text

    def checks(self, statements: list[list]) -> tuple[str, Sequence[int]]:
        """World by world, knights first, a line each: the text, the roles of the one that passes.

        >>> print(KnightsAndKnaves().checks([["knave", 1], ["not", ["knight", 0]]])[0])
        AB1b-=-!
        Ab1b+=+2~A+=-
        """
        lines = []
        for roles in itertools.product((1, 0), repeat=len(statements)):
            lines.append(self.checked(statements, roles))
            if not lines[-1].endswith("!"):
                return "\n".join(lines), roles
        return "\n".join(lines), []

    def trace(self, problem: dict, rng: random.Random) -> str:
        search = self.checks if self.check else self.search
        thought, roles = search(problem["statements"])
        return f"{thought}\n</think><answer>{letters_of(roles)}</answer>"


# ------------------------------------------------------------------------------ Navigation

COMPASS = "north northeast east southeast south southwest west northwest".split()
BEARINGS = "ahead,ahead right,right,behind right,behind,behind left,left,ahead left".split(",")
LANDMARKS = (  # written A to T
    "Alder Inn,Birch Hall,Cedar Bank,Dune Cafe,Elm School,Fern Bakery,Grove Museum,Hill Tower,"
    "Iris Hotel,Jade Market,Kite Shop,Lake House,Moss Library,New Gate,Oak Theatre,Pine Court,"
    "Quay Station,Rose Garden,Stone Bridge,Tulip Bar"
).split(",")
TURNS = {"left": "<<", "slightly left": "<", "slightly right": ">", "right": ">>"}
ACTIONS = {"forward()": "f", "stop()": "!"}  # in full, and in a few characters
ACTIONS |= {f"turn_direction({word})": word[0] + word[5:6] for word in COMPASS}
ACTIONS |= {f"turn_direction({word})": sign for word, sign in TURNS.items()}
IN_FULL = {short: action for action, short in ACTIONS.items()}


def turn_word(previous: int, heading: int, space: str) -> str:
    """What turns a walker from one heading to another (degrees clockwise from north).

    "absolute": the compass word of the new heading's 45-degree sector; "relative": left or right by
    the sign of the turn in (-180, 180], slightly up to 45 degrees.
    Source: arXiv:2501.17161 app. B, whose code forgets to wrap the turn (350 to 10 is left there).

    >>> turn_word(350, 10, "absolute"), turn_word(350, 10, "relative")
    ('north', 'slightly right')
    """
    if space == "absolute":
        return COMPASS[round(heading / 45) % 8]
    turn = 180 - (previous - heading + 180) % 360
    side = "right" if turn > 0 else "left"
    return f"slightly {side}" if abs(turn) <= 45 else side


def mark_of(view: tuple | None) -> str:
    """What is seen, in two characters: the landmark's letter and its bearing; a dot for nothing."""
    return f"{chr(65 + view[0])}{view[1]}" if view else "."


@dataclass
class Navigation:
    """Follow a route through a town in words: turn, walk on to the intersection with the landmark,
    and so on (arXiv:2501.17161 app. B, text only).

    An instruction names each turn both ways; the space of actions decides which counts. The paper
    trains on absolute actions and tests on relative ones. All is seen at once; the split ignores
    the space.
    """

    min_legs: int = 1
    max_legs: int = 3
    max_steps: int = 3  # forward moves of a leg
    grain: int = 45  # headings are multiples of so many degrees
    space: str = "absolute"
    basics: float = 0.0  # share of easier training problems: one turn and stop, in either space
    other: float = 0.0  # share of the other training routes that want the other space

    NATURAL = {"min_legs": 2, "max_legs": 6}

    def __post_init__(self):
        legs = 1 <= self.min_legs <= self.max_legs <= 20
        if not legs or not 1 <= self.max_steps <= 100 or not 1 <= self.grain <= 180:
            allowed = "1 <= min_legs <= max_legs <= 20, max_steps 1 to 100, grain 1 to 180"
            raise BadInput(f"{self}: {allowed} are allowed")
        shares = 0 <= self.basics <= 1 and 0 <= self.other <= 1
        if self.space not in ("absolute", "relative") or not shares:
            raise BadInput(f"{self}: space is absolute or relative, basics and other 0 to 1")

    def problem(self, split: str, seed: int, index: int) -> dict:
        """Each leg is heading, forward moves, landmark and its bearing at the end."""
        rng = random.Random(f"navigation {split} {seed} {index}")
        easy = split == "train" and rng.random() < self.basics
        headings, steps = range(0, 360, self.grain), 0 if easy else self.max_steps
        while True:
            count = 1 if easy else rng.randint(self.min_legs, self.max_legs)
            legs = []
            for place in rng.sample(range(20), count):
                heading, moves = rng.choice(headings), rng.randint(min(1, steps), steps)
                legs.append([heading, moves, place, rng.randrange(8)])
            problem = {"start": rng.choice(headings), "legs": legs}
            problem["space"] = rng.choice(["absolute", "relative"]) if easy else self.space
            if easy or split_of(self.key(problem)) == split:
                if split == "train" and not easy and rng.random() < self.other:
                    problem["space"] = {"absolute": "relative", "relative": "absolute"}[self.space]
                return problem

    def key(self, problem: dict) -> str:
        return self.compact(problem)[1:]

    def turns(self, problem: dict, space: str) -> list[str]:
        """The turn at the beginning of each leg, in words."""
        headings = [problem["start"], *(leg[0] for leg in problem["legs"])]
        return [turn_word(*pair, space) for pair in itertools.pairwise(headings)]

    def seen(self, problem: dict) -> list[list[tuple | None]]:
        """Of each leg, the view after each move: nothing, but (landmark, bearing) at its end."""
        views = []
        for _, moves, place, bearing in problem["legs"]:
            end = [(place, bearing)] if moves else []
            views.append([None] * (moves - 1) + end)
        return views

    def actions(self, problem: dict) -> list[str]:
        """The expert's actions, in full."""
        actions = []
        turns = self.turns(problem, problem["space"])
        for turn, (_, moves, _, _) in zip(turns, problem["legs"], strict=True):
            actions += [f"turn_direction({turn})", *["forward()"] * moves]
        return [*actions, "stop()"]

    def compact(self, problem: dict) -> str:
        """The space, the instructions, and what is seen on the way.

        >>> route = {"start": 0, "legs": [[90, 2, 1, 6], [0, 1, 5, 2]], "space": "relative"}
        >>> Navigation().compact(route)
        'R>>e B6;<<n F2|.B6F2<think>'
        """
        told, marks = [], ["".join(map(mark_of, views)) for views in self.seen(problem)]
        relative, absolute = (self.turns(problem, space) for space in ("relative", "absolute"))
        for turn, to, mark in zip(relative, absolute, marks, strict=True):
            short = ACTIONS[f"turn_direction({turn})"] + ACTIONS[f"turn_direction({to})"]
            told.append(f"{short} {mark.lstrip('.')}".rstrip())
        return f"{problem['space'][0].upper()}{';'.join(told)}|{''.join(marks)}<think>"

    def question(self, problem: dict) -> str:
        lines, views = [], []
        relative, absolute = (self.turns(problem, space) for space in ("relative", "absolute"))
        legs = zip(relative, absolute, self.seen(problem), strict=True)
        for number, (turn, to, seen) in enumerate(legs, 1):
            lines.append(f"{'First' if number == 1 else 'Then'}, turn {turn} to face {to}.")
            for view in seen:
                mark = f"{LANDMARKS[view[0]]} is {BEARINGS[view[1]]}" if view else ""
                views.append(f"{mark}; an intersection." if mark else "No landmarks nearby.")
            if seen:
                last = number == len(problem["legs"])
                where = "the destination" if last else "the next intersection"
                lines.append(f"Move forward until you reach {where}, where {mark}.")
        space = ", ".join(TURNS if problem["space"] == "relative" else COMPASS)
        return (
            f"Follow the instructions: {' '.join(lines)} After each move forward you see, in this "
            f"order: {' '.join(views) or 'nothing.'} Your actions are forward(), stop() and "
            f"turn_direction(x), where x is one of {space}. {INSTRUCTION}, all actions in order: "
            "<answer>turn_direction(x), forward(), stop()</answer>."
        )

    def said(self, text: str) -> list[str]:
        """The actions of a completion's answer, in full; both forms count."""
        answer = (extract_answer(text) or "")[:10_000]
        words = re.findall(r"[a-z_]+\([a-z ]*\)|[^\s,;]+", answer)
        return [IN_FULL.get(word, word) for word in words]

    def score(self, text: str, problem: dict, **kw) -> dict:
        """The reward of grpo.py is the share of right actions: the paper rewards each."""
        right = self.said(text) == self.actions(problem)
        parts = score(text, extract_answer(text), right, **kw)
        return parts | {"reward": self.describe(text, problem)["right_actions"]}

    def describe(self, text: str, problem: dict) -> dict:
        """The shares of the expert's actions and turns at their place."""
        right = self.actions(problem)
        said = [*self.said(text), *[""] * len(right)]  # too short: the rest is wrong
        turns = [i for i, action in enumerate(right) if action.startswith("turn")]
        shares = {"right_actions": range(len(right)), "right_turns": turns}
        return {name: mean(said[i] == right[i] for i in at) for name, at in shares.items()}

    def trace(self, problem: dict, rng: random.Random) -> str:
        """A line per leg, its actions and what is seen after each; then the actions."""
        actions = [ACTIONS[action] for action in self.actions(problem)]
        rest, lines = iter(actions), []
        for views in self.seen(problem):
            words = [next(rest)]
            words += [next(rest) + mark_of(view) for view in views]
            lines.append(" ".join(words) + "\n")
        return f"{''.join(lines)}</think><answer>{' '.join(actions)}</answer>"


# ------------------------------------------------------------------------ Multiplication


def score_multiplication(text: str, a: int, b: int, **kw) -> dict:
    """Score of an integer answer to a * b; an unevaluated product is wrong, and so is 408.0."""
    answer = extract_answer(text)
    number = number_text(answer or "")
    is_integer = re.fullmatch(r"-?[0-9]+", number) and "*" not in clean(answer)
    return score(text, answer, bool(is_integer) and int(number) == a * b, **kw)


@dataclass
class Multiplication:
    """Products of two integers, as in TinyZero's `multiply`; a * b and b * a are the same."""

    min_digits: int = 1
    max_digits: int = 2
    at_once: float = 0.0  # share of traces that answer without working it out

    NATURAL = {"min_digits": 2, "max_digits": 3}

    def __post_init__(self):
        if not 1 <= self.min_digits <= self.max_digits <= 18:
            raise BadInput(f"{self}: give 1 <= min_digits <= max_digits <= 18")
        if not 0 <= self.at_once <= 1:
            raise BadInput(f"{self}: at_once is a share, 0 to 1")

    def problem(self, split: str, seed: int, index: int) -> dict:
        rng = random.Random(f"multiplication {split} {seed} {index}")
        while True:  # one-digit operands already have keys on both sides, so this ends
            digits = [rng.randint(self.min_digits, self.max_digits) for _ in "ab"]
            a, b = (rng.randint(10 ** (n - 1), 10**n - 1) for n in digits)
            if split_of(self.key({"a": a, "b": b})) == split:
                return {"a": a, "b": b}

    def key(self, problem: dict) -> str:
        return "{}*{}".format(*sorted((problem["a"], problem["b"])))

    def question(self, problem: dict) -> str:
        asked = f"What is {problem['a']} * {problem['b']}?"
        return f"{asked} {INSTRUCTION}, for example <answer>42</answer>."

    def compact(self, problem: dict) -> str:
        return f"{problem['a']}*{problem['b']}=<think>"

    def trace(self, problem: dict, rng: random.Random) -> str:
        """Long multiplication: a product for each digit of one operand, then their sums."""
        few, many = sorted((problem["a"], problem["b"]))
        digits = enumerate(reversed(str(many)))
        parts = [int(digit) * 10**i for i, digit in digits if digit != "0"][::-1]
        lines = [f"{few}*{part}={few * part}" for part in parts]
        total = few * parts[0]
        for part in parts[1:]:
            lines.append(f"{total}+{few * part}={total + few * part}")
            total += few * part
        thought = "" if rng.random() < self.at_once else "\n".join(lines)
        return f"{thought}</think><answer>{total}</answer>"

    def score(self, text: str, problem: dict, **kw) -> dict:
        return score_multiplication(text, problem["a"], problem["b"], **kw)


# ----------------------------------------------------------------------------- wrong golds


@dataclass
class Noisy:
    """A task that scores a share of its training problems by a wrong gold (arXiv:2502.03373, 5).

    Which ones depends on the problem alone. near: the gold is that of a plausible `mistake`, else
    that of any other problem. kept: JSONL of the training problems that a filter left.
    """

    noise: float = 0.3
    near: bool = False
    kept: str = ""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.noise <= 1:
            raise BadInput(f"{self}: noise is a share, 0 to 1")
        if self.near and not hasattr(self, "mistake"):
            raise BadInput(f"{self}: near needs a task that knows its mistakes")
        if self.kept:
            self.left = read_jsonl(self.kept, dict)

    def problem(self, split: str, seed: int, index: int) -> dict:
        if split == "train" and self.kept:
            return self.left[index % len(self.left)]
        problem = super().problem(split, seed, index)
        rng = random.Random(f"noise {self.key(problem)}")
        if split == "train" and rng.random() < self.noise:
            other = super().problem(split, 0, rng.randrange(10**6))
            return problem | {"scored_as": self.mistake(problem) if self.near else other}
        return problem

    def score(self, text: str, problem: dict, **kw) -> dict:
        return super().score(text, problem.get("scored_as", problem), **kw)


@dataclass
class NoisyMultiplication(Noisy, Multiplication):
    """Its traces stay right: only the verdict errs."""

    def mistake(self, problem: dict) -> dict:
        """The last product forgotten; if it is the only one, the next in the table."""
        few, many = sorted((problem["a"], problem["b"]))
        step = 10 ** (len(str(many)) - len(str(many).rstrip("0")))
        single = many // step < 10
        return {"a": few, "b": many + step if single else many - many // step % 10 * step}


@dataclass
class NoisyGSM8K(Noisy, GSM8K):
    """Lines of GSM8K of which some want the answer to another."""


# ---------------------------------------------------------------- chains of small steps


def score_last_line(text: str, gold: str, format_weight: float = 0.1, eos: str = "") -> dict:
    """Score of a chain of steps: what stands on the last line, after the last # there.

    Commas do not count. There is no layout to reward: format says whether there is an answer.

    >>> score_last_line("3*4=12\\n12*90=1080\\n### 1,080", "1080")["correct"]
    True
    """
    line = text.rstrip().removesuffix(eos).strip().rpartition("\n")[2]
    answer = line.rpartition("#")[2].replace(",", "").strip()
    correct = answer == str(gold).replace(",", "").strip()
    parts = {"format": float(answer != ""), "answer": answer, "correct": correct}
    return parts | {"total": correct + format_weight * parts["format"]}


@dataclass
class AffineChain:
    """A start value, then `length` operations + d or * d modulo `modulus`: 3+2=5, 5*4=6, .."""

    length: int = 3
    modulus: int = 7

    def __post_init__(self):
        if not (1 <= self.length <= 50 and 3 <= self.modulus <= 10):
            raise BadInput(f"{self}: length 1 to 50, modulus 3 to 10: a value is one digit")

    def problem(self, split: str, seed: int, index: int) -> dict:
        """Easy operations, + 0, * 0 and * 1, are among the hard ones: every fourth answer is 0."""
        rng = random.Random(f"affine {split} {seed} {index}")
        while True:  # the shortest chains have problems on both sides, so this ends
            signs = [rng.choice("+*") for _ in range(self.length)]
            operations = [sign + str(rng.randrange(self.modulus)) for sign in signs]
            problem = {"start": rng.randrange(self.modulus), "operations": operations}
            if split_of(self.key(problem)) == split:
                return problem

    def compact(self, problem: dict) -> str:
        return str(problem["start"]) + "".join(problem["operations"])

    key = compact

    def question(self, problem: dict) -> str:
        start, operations = problem["start"], ", then ".join(problem["operations"])
        return f"Start with {start} and apply {operations}, each time modulo {self.modulus}."

    def steps(self, problem: dict) -> list[str]:
        value, steps = problem["start"], []
        for operation in problem["operations"]:
            result = ARITHMETIC[operation[0]](value, int(operation[1:])) % self.modulus
            steps.append(f"{value}{operation}={result}")
            value = result
        return steps

    def answer(self, problem: dict) -> str:
        return self.steps(problem)[-1].rpartition("=")[2]

    def trace(self, problem: dict, rng: random.Random) -> str:
        """A step a line, then the answer; first a line break, as a digit ends the prompt."""
        return "\n".join(["", *self.steps(problem), self.answer(problem)])

    def score(self, text: str, problem: dict, **kw) -> dict:
        return score_last_line(text, self.answer(problem), **kw)


PERMUTATIONS = list(itertools.permutations(range(3)))  # written a to f; a is the identity


@dataclass
class S3:
    """The word problem of S3, the smallest group where order matters: a product of permutations."""

    elements: int = 5

    def __post_init__(self):
        if not 2 <= self.elements <= 100:
            raise BadInput(f"s3 takes 2 to 100 elements, not {self.elements}")

    def problem(self, split: str, seed: int, index: int) -> dict:
        rng = random.Random(f"s3 {split} {seed} {index}")
        while True:  # as above
            problem = {"elements": "".join(rng.choice("abcdef") for _ in range(self.elements))}
            if split_of(self.key(problem)) == split:
                return problem

    def compact(self, problem: dict) -> str:
        return problem["elements"]

    key = compact

    def question(self, problem: dict) -> str:
        meaning = ", ".join(f"{x} = {p}" for x, p in zip("abcdef", PERMUTATIONS, strict=True))
        elements = ", ".join(problem["elements"])
        return f"With {meaning}, apply {elements} from left to right. Which letter is the result?"

    def products(self, problem: dict) -> str:
        """The product up to each element, as letters: bacfc for bbcde."""
        product, letters = PERMUTATIONS[0], ""
        for element in problem["elements"]:
            after = PERMUTATIONS["abcdef".index(element)]
            product = tuple(after[i] for i in product)  # first the product, then this element
            letters += "abcdef"[PERMUTATIONS.index(product)]
        return letters

    def steps(self, problem: dict) -> list[str]:
        left = self.products(problem)
        return [f"{left[i]}*{y}={left[i + 1]}" for i, y in enumerate(problem["elements"][1:])]

    def answer(self, problem: dict) -> str:
        return self.products(problem)[-1]

    def score(self, text: str, problem: dict, **kw) -> dict:
        return score_last_line(text, self.answer(problem), **kw)


OPERATIONS = {"a": "+1", "b": "+2", "c": "+3", "d": "+4", "e": "*2", "f": "*3"}


@dataclass
class Resolve:
    """Definitions out of order, and a variable to resolve, here c: a = 3, b = a + 2, c = b + 3.

    The plan is the order in which they are needed, a b c. The steps are values alone, 3, 0, 3, so
    that the order cannot be read in them. A variable is always made by the same operation, so that
    models/ need not be told. One definition is not needed, which may be a constant.
    """

    min_variables: int = 2  # that are needed
    max_variables: int = 3
    modulus: int = 5

    def __post_init__(self):
        if not 1 <= self.min_variables <= self.max_variables < len(OPERATIONS):
            raise BadInput(f"{self}: 1 to 5 variables, the first number at most the second")
        if not 3 <= self.modulus <= 10:
            raise BadInput(f"{self}: modulus 3 to 10: a value is one digit")

    def problem(self, split: str, seed: int, index: int) -> dict:
        rng = random.Random(f"resolve {split} {seed} {index}")
        while True:  # as above
            count = rng.randint(self.min_variables, self.max_variables)
            *names, other = rng.sample(list(OPERATIONS), count + 1)
            first, second = (str(rng.randrange(self.modulus)) for _ in range(2))
            sources = [first, *names[:-1], rng.choice([second, *names])]
            lines = [list(line) for line in zip([*names, other], sources, strict=True)]
            rng.shuffle(lines)
            problem = {"lines": lines, "asked": names[-1]}
            if split_of(self.key(problem)) == split:
                return problem

    def compact(self, problem: dict) -> str:
        """a3 is a = 3, cb is c = b + 3: cb;a3;ba;db?c."""
        lines = [name + source for name, source in problem["lines"]]
        return f"{';'.join(lines)}?{problem['asked']}"

    key = compact

    def question(self, problem: dict) -> str:
        lines = []
        for name, source in problem["lines"]:
            sign, number = OPERATIONS[name]
            lines.append(f"{name} = {source}" + ("" if source.isdigit() else f" {sign} {number}"))
        return f"{', '.join(lines)}, all modulo {self.modulus}. What is {problem['asked']}?"

    def order(self, problem: dict) -> list[str]:
        """The constant, then the variables from the first to the one that is asked for."""
        sources, found = dict(problem["lines"]), [problem["asked"]]
        while found[-1] in sources:
            found.append(sources[found[-1]])
        return found[::-1]

    def plan(self, problem: dict) -> str:
        return " ".join(self.order(problem)[1:])

    def steps(self, problem: dict) -> list[str]:
        constant, _, *names = self.order(problem)
        values = [int(constant)]
        for name in names:
            sign, number = OPERATIONS[name]
            values.append(ARITHMETIC[sign](values[-1], int(number)) % self.modulus)
        return [str(value) for value in values]

    def answer(self, problem: dict) -> str:
        return self.steps(problem)[-1]

    def score(self, text: str, problem: dict, **kw) -> dict:
        return score_last_line(text, self.answer(problem), **kw)


# ---------------------------------------------------------------------------------- ProsQA


@dataclass
class ProsQA:
    """Is a node of a random graph of concepts below one concept or below another?

    The published constants do not give the released data; these do. `nodes` are drawn, those
    without an edge go. Source: arXiv:2412.06769 app. A.2.
    """

    nodes: int = 28

    MARKER = "### "
    ENTITIES = (
        "Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom Wren"
    ).split()
    CONCEPTS = [
        syllable + "pus"
        for syllable in (
            "bom boom brim chor dum fel fom ger gor grim gwom hil im jel jom ker lem lor num quim "
            "rem rom ror scrom shum ster stor ter tim tum vum wor wum yer yim yum zhor zum"
        ).split()
    ]

    def __post_init__(self):
        if not 10 <= self.nodes <= 36:
            raise BadInput(f"{self}: 10 to 36 nodes are allowed, as many as there are names for")

    def problem(self, split: str, seed: int, index: int) -> dict:
        rng = random.Random(f"prosqa {split} {seed} {index}")
        while True:  # nine graphs in ten will do, and one in ten is a test problem
            problem = self.dress(self.graph(rng), rng)
            if problem and split_of(self.key(problem)) == split:
                return problem

    def graph(self, rng: random.Random) -> dict:
        """Labels and parents of a random graph.

        Nodes 0 and 1 are the roots of two families (labels 1 and 2), which label 3 has in common
        and label 0 is outside of. Nearly all parents of a node come from one family.
        """
        labels, depths, parents = [1, 2], [0, 0], [[], []]
        for _ in range(2, self.nodes):
            u, family = rng.random(), 0
            if u <= 0.8:
                family = 1 if u <= 0.35 else 2
            pool = [i for i, label in enumerate(labels) if not family or label == family]
            chosen = []
            for _ in range(min(poisson(1.5, rng), len(pool))):  # the deeper the likelier
                chosen += rng.choices(pool, [1.5 * depths[i] + 1 for i in pool])
                pool.remove(chosen[-1])
            parents.append(sorted(chosen))
            labels.append(functools.reduce(operator.or_, (labels[i] for i in chosen), 0))
            depths.append(1 + min(depths[i] for i in chosen) if chosen else 0)
        return {"labels": labels, "parents": parents}

    def dress(self, graph: dict, rng: random.Random) -> dict | None:
        """A question about a graph: a root, a deepest leaf below it, a leaf of the other family."""
        labels, children = graph["labels"], [[] for _ in graph["labels"]]
        for child, parents in enumerate(graph["parents"]):
            for parent in parents:
                children[parent].append(child)
        distance = distances(children, 0)
        distance |= {i: d for i, d in distances(children, 1).items() if labels[i] == 2}
        leaves = [i for i in range(2, len(labels)) if labels[i] in (1, 2) and not children[i]]
        deepest = max((distance[i] for i in leaves), default=0)
        if deepest < 3 or len({labels[i] for i in leaves}) < 2:
            return None
        target = rng.choice([i for i in leaves if distance[i] == deepest])
        other = rng.choice([i for i in leaves if labels[i] != labels[target]])
        kept = [i for i, below in enumerate(children) if below or graph["parents"][i]]
        entities = rng.sample(self.ENTITIES, len(self.ENTITIES))
        concepts = rng.sample(self.CONCEPTS, len(self.CONCEPTS))
        names = {i: (concepts if graph["parents"][i] else entities).pop() for i in kept}
        edges = [[names[p], names[i]] for i in kept for p in graph["parents"][i]]
        return {
            "edges": edges,
            "order": rng.sample(range(len(edges)), len(edges)),  # of the sentences
            "roots": [names[0], names[1]],
            "root": names[labels[target] - 1],
            "target": names[target],
            "other": names[other],
            "path": rng.random(),  # which of the shortest paths
            "swap": rng.random() < 0.5,
        }

    def sentence(self, parent: str, child: str) -> str:
        if parent in self.ENTITIES:
            return f"{parent} is a {child}."
        return f"Every {parent} is a {child}."

    def key(self, problem: dict) -> str:
        edges = sorted("-".join(edge) for edge in problem["edges"])
        return f"{problem['root']} {sorted((problem['target'], problem['other']))} {edges}"

    def question(self, problem: dict) -> str:
        facts = " ".join(self.sentence(*problem["edges"][i]) for i in problem["order"])
        first, second = problem["target"], problem["other"]
        if problem["swap"]:
            first, second = second, first
        return f"{facts} Is {problem['root']} a {first} or {second}?"

    def steps(self, problem: dict) -> list[str]:
        """One of the shortest paths from the root to the target, an edge a step."""
        edges, paths, found = problem["edges"], [[problem["root"]]], []
        while not found:
            paths = [[*path, child] for path in paths for node, child in edges if node == path[-1]]
            found = [path for path in paths if path[-1] == problem["target"]]
        path = found[int(problem["path"] * len(found))]
        return [self.sentence(*edge) for edge in itertools.pairwise(path)]

    def answer(self, problem: dict) -> str:
        return f"{problem['root']} is a {problem['target']}."

    def score(self, text: str, problem: dict, **kw) -> dict:
        return score_last_line(text, self.answer(problem), **kw)


def poisson(mean: float, rng: random.Random) -> int:
    """A Poisson number: how many uniform factors keep the product above e^-mean (Knuth)."""
    count, product = 0, rng.random()
    while product > math.exp(-mean):
        count, product = count + 1, product * rng.random()
    return count


def distances(children: list[list[int]], root: int) -> dict[int, int]:
    """Steps from the root to each node that can be reached."""
    found, frontier = {root: 0}, [root]
    for node in frontier:  # it grows while it is read: breadth first
        for child in children[node]:
            if child not in found:
                found[child] = found[node] + 1
                frontier.append(child)
    return found


# ------------------------------------------------------------------------ steps from a file


@dataclass
class Chains(GSM8K):
    """Problems with steps from a file, `test` from another one, else a tenth of the file.

    Read are ProsQA's JSON (a list of {"question", "steps", "answer"}) and the same as JSONL,
    ProntoQA's JSON, and the lines of GSM8K-Aug, question||step step ...#### answer.
    """

    test: str = ""

    MARKER = "### "
    needs = ()

    def __post_init__(self):
        test = read_chains(self.test, self.needs) if self.test else []
        self.streams = {"train": [], "test": test}
        for problem in read_chains(self.data, self.needs):
            split = "train" if self.test else split_of(self.key(problem))
            self.streams[split].append(problem)

    def question(self, problem: dict) -> str:
        return problem["question"]

    def steps(self, problem: dict) -> list[str]:
        return problem["steps"]

    def answer(self, problem: dict) -> str:
        return problem["answer"]

    def score(self, text: str, problem: dict, **kw) -> dict:
        return score_last_line(text, problem["answer"], **kw)


@dataclass
class Plans(Chains):
    """Chains whose problems have a plan: JSON {"question", "plan", "steps", "answer"}."""

    needs = ("plan",)

    def plan(self, problem: dict) -> str:
        return problem["plan"]


def read_chains(path: str, needs: Sequence[str] = ()) -> list[dict]:
    """{"question", "steps", "answer"} of each problem in a file, and what a task needs more."""
    if not path:
        raise BadInput("Chains reads a file: give --data FILE, or the knob data=FILE")
    with reading(f"cannot read the data file {path}"):
        text = Path(path).read_text(encoding="utf-8-sig")
    return read_rows(path, *items_of(text), functools.partial(read_chain, needs=needs))


def items_of(text: str) -> tuple[str, list[tuple]]:
    """The problems of a file, each with its number: items of one JSON value, else lines."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        lines = enumerate(text.split("\n"), 1)
        return "line", [(number, line) for number, line in lines if line.strip()]
    if isinstance(whole, dict) and "question" not in whole:  # by name, as ProntoQA's
        return "item", list(whole.items())
    return "item", list(enumerate(whole if isinstance(whole, list) else [whole], 1))


def read_chain(item: str | dict, needs: Sequence[str] = ()) -> dict:
    """One problem of `read_chains`.

    >>> read_chain("2 and 3?||<<2+3=5>> <<5*2=10>> #### 10")
    {'question': '2 and 3?', 'steps': ['<<2+3=5>>', '<<5*2=10>>'], 'answer': '10'}
    """
    if isinstance(item, str) and item.lstrip().startswith("{"):
        item = json.loads(item)
    elif isinstance(item, str):  # GSM8K-Aug
        question, _, rest = item.partition("||")
        steps, _, answer = rest.partition("##")
        answer = answer.lstrip("#").strip()
        item = {"question": question.strip(), "steps": steps.split(), "answer": answer}
    if isinstance(item, dict) and isinstance(item.get("test_example"), dict):
        item = from_prontoqa(item["test_example"])
    if not isinstance(item, dict) or not strings(item.get("steps")):
        raise BadInput('"steps" must be a list of texts')
    question, answer = text_of(item, "question"), text_of(item, "answer")
    problem = {"question": question, "steps": item["steps"], "answer": answer}
    for name in needs:
        if not isinstance(item.get(name), str) or not item[name].strip():
            raise BadInput(f"{name} is missing or empty")
        problem[name] = item[name]
    return problem


def from_prontoqa(item: dict) -> dict:
    """An example of ProntoQA with "question" and "steps" as we have them: two sentences a step."""
    thought, question = item.get("chain_of_thought"), [item.get("question"), item.get("query")]
    steps = None
    if strings(thought):
        steps = [" ".join(thought[i : i + 2]) for i in range(0, len(thought), 2)]
    return item | {"question": " ".join(question) if strings(question) else None, "steps": steps}


def strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


# ------------------------------------------------------------------------ programs and tests


@dataclass
class Code(GSM8K):
    """Python programs, right if all tests pass: lines {"question", "test_cases": [assert, ...]}.

    It runs what a model wrote, behind the fence of more/sandbox.py: hence allow=1. AceCode's own
    lines are of this form; the first `max_tests` of a problem count (arXiv:2502.01718 sec. 3).
    """

    allow: bool = False
    max_tests: int = 16

    def __post_init__(self):
        if not self.allow:
            raise BadInput("code runs programs that a model wrote: in a container, give allow=1")
        super().__post_init__()

    def read(self, row: dict) -> dict:
        from more.sandbox import read_test

        tests = row.get("test_cases")
        if not tests or not strings(tests):
            raise BadInput('"test_cases" must be a list of asserts')
        for test in tests:
            read_test(test)  # complains
        return {"question": text_of(row, "question"), "tests": tests[: self.max_tests]}

    def question(self, problem: dict) -> str:
        return f"{problem['question']}\n{INSTRUCTION}, a Python program in a ```python block."

    def score(self, text: str, problem: dict, **kw) -> dict:
        """Also how many of the tests passed: dpo.py's --pairs rate asks for it."""
        from more.sandbox import program_of, run_tests

        answer, passed = extract_answer(text), [False]
        if answer is not None:
            passed, _ = run_tests(program_of(answer), problem["tests"])
        counts = {"passed": sum(passed), "tests": len(passed)}
        return score(text, answer, all(passed), **kw) | counts


# ------------------------------------------------------------------------------- toy programs

ARITY = {"neg": 1, "abs": 1, "min": 2, "max": 2, "lt": 2, "eq": 2, "if": 3}
MEANING = ARITHMETIC | {"/": operator.floordiv, "%": operator.mod, "min": min, "max": max}
MEANING |= {"neg": operator.neg, "abs": abs, "lt": operator.lt, "eq": operator.eq}


def parse_toy(program: str) -> tuple[list[str], object]:
    """Variables and body of a toy program, the body as nested tuples; ValueError if it is none.

    f(x)=, f(x,y)= or f(x,y,z)=, then a number of 0 to 99, a variable, (a+b) with one of + - * / %,
    or a function of ARITY; at most 64 characters, and 12 levels of which the body is the first.

    >>> parse_toy("f(x)=if(lt(x,0),neg(x),x)")
    (['x'], ('if', ('lt', 'x', 0), ('neg', 'x'), 'x'))
    """
    head = re.match(r"f\((x|x,y|x,y,z)\)=", program)
    if head is None or len(program) > 64:
        raise ValueError("no head, or longer than 64 characters")
    tokens = re.findall(r"[0-9]+|[a-z]+|.", program[head.end() :], re.DOTALL)[::-1]
    names = head[1].split(",")
    body = read_toy(tokens, names, 1)
    if tokens:
        raise ValueError("more than one expression")
    return names, body


def read_toy(tokens: list[str], names: list[str], depth: int) -> object:
    """The expression at the end of the reversed tokens, which are used up."""
    token = tokens.pop() if tokens and depth <= 12 else ""
    if token in names:
        return token
    if re.fullmatch("0|[1-9][0-9]?", token):
        return int(token)
    if token == "(":
        left = read_toy(tokens, names, depth + 1)
        sign = tokens.pop() if tokens else ""
        parts = [left, read_toy(tokens, names, depth + 1)]
        if sign not in ("+", "-", "*", "/", "%"):
            raise ValueError("no sign between two expressions")
        token = sign
    elif token in ARITY:
        parts, opening = [], "("
        for _ in range(ARITY[token]):
            if not tokens or tokens.pop() != opening:
                raise ValueError(f"{opening} is missing")
            parts.append(read_toy(tokens, names, depth + 1))
            opening = ","
    else:
        raise ValueError("no expression")
    if not tokens or tokens.pop() != ")":
        raise ValueError(") is missing")
    return token, *parts


def toy_value(body: object, values: dict[str, int]) -> int:
    """The value of a body; only one branch of an if counts. Above 10^6 an OverflowError."""
    if not isinstance(body, tuple):
        return values.get(body, body)
    kind, *parts = body
    if kind == "if":
        condition, then, other = parts
        return toy_value(then if toy_value(condition, values) else other, values)
    found = int(MEANING[kind](*(toy_value(part, values) for part in parts)))
    if abs(found) > 10**6:
        raise OverflowError("above 10^6")
    return found


def run_toy(program: str, args: Sequence[int]) -> tuple[str, int | str]:
    """("ok", value) or ("error", kind): syntax, arity, zero_div, overflow. It always ends.

    >>> run_toy("f(x)=(x/2)", [-3]), run_toy("f(x)=(x/0)", [1]), run_toy("f(x)=x+1", [3])
    (('ok', -2), ('error', 'zero_div'), ('error', 'syntax'))
    """
    try:
        names, body = parse_toy(program)
    except ValueError:
        return "error", "syntax"
    if len(names) != len(args):
        return "error", "arity"
    try:
        return "ok", toy_value(body, dict(zip(names, args, strict=True)))
    except ZeroDivisionError:
        return "error", "zero_div"
    except OverflowError:
        return "error", "overflow"


def toy_text(body: object) -> str:
    """
    >>> toy_text(("if", ("lt", "x", 0), ("-", 0, "x"), "x"))
    'if(lt(x,0),(0-x),x)'
    """
    if not isinstance(body, tuple):
        return str(body)
    kind, *parts = body
    texts = [toy_text(part) for part in parts]
    return f"{kind}({','.join(texts)})" if kind in ARITY else f"({texts[0]}{kind}{texts[1]})"


SEEN, UNSEEN = range(-5, 10), range(-9, 21)  # inputs that a prompt may show; of hidden tests


@functools.cache
def toy_pool() -> tuple[list[list[str]], dict]:
    """Programs in x of two levels, by operation, and those with the output y at x: {(x, y): [..]}.

    Of programs that agree on all of SEEN the first stays; constants are out.
    """
    found, by_kind, at = set(), {}, {}
    for kind in "+ - * / % neg abs min max lt eq if".split():
        for parts in itertools.product(["x", *range(10)], repeat=ARITY.get(kind, 2)):
            program = f"f(x)={toy_text((kind, *parts))}"
            outputs = tuple(run_toy(program, [x]) for x in SEEN)
            if outputs in found or len({y for y in outputs if y[0] == "ok"}) < 2:
                continue
            found.add(outputs)
            by_kind.setdefault(kind, []).append(program)
            for x, (_, y) in zip(SEEN, outputs, strict=True):
                at.setdefault((x, y), []).append(program)
    return list(by_kind.values()), at


@dataclass
class ToyCode:
    """The program behind three shown inputs and outputs, right if all hidden tests pass.

    A stand-in for AceCode's problems (arXiv:2502.01718): programs of a small language (parse_toy),
    run by `run_toy` and nothing else; hidden ones have one variable and one operation. Tests on
    which the hidden program fails are left out, as there; a problem has at least 5.
    """

    give_up: float = 0.33  # share of the traces that end on a program that fails a shown test

    SHOWN, TESTS = 3, 8

    def __post_init__(self):
        if not 0 <= self.give_up <= 1:
            raise BadInput(f"{self}: give_up 0 to 1 is allowed")

    def problem(self, split: str, seed: int, index: int) -> dict:
        rng, (by_kind, _) = random.Random(f"toycode {split} {seed} {index}"), toy_pool()
        while True:
            program = rng.choice(rng.choice(by_kind))
            inputs = rng.sample(SEEN, self.SHOWN)
            shown = self.tests(program, inputs)
            left = [x for x in UNSEEN if x not in inputs]
            asked = set(rng.sample(left, self.TESTS - 2))  # and 0 and a negative one
            asked |= {x for x in (0, rng.randint(-9, -1)) if x in left}
            tests = self.tests(program, sorted(asked))
            problem = {"program": program, "shown": shown, "tests": tests}
            fits = len(shown) == self.SHOWN
            varied = len({y for _, y in shown + tests}) > 1
            if fits and varied and len(tests) >= 5 and split_of(self.key(problem)) == split:
                return problem

    def tests(self, program: str, inputs: Iterable[int]) -> list[list]:
        """[[x], y] of the inputs on which the program does not fail."""
        runs = [([x], run_toy(program, [x])) for x in inputs]
        return [[args, value] for args, (status, value) in runs if status == "ok"]

    def passed(self, program: str, tests: list) -> list[bool]:
        return [run_toy(program, args) == ("ok", value) for args, value in tests]

    def key(self, problem: dict) -> str:
        return self.compact(problem)

    def compact(self, problem: dict) -> str:
        return ",".join(f"{x}:{y}" for [x], y in problem["shown"]) + "?<think>"

    def question(self, problem: dict) -> str:
        shown = "; ".join(f"f({x}) = {y}" for [x], y in problem["shown"])
        return (
            f"Find the function f of one integer with {shown}. Write it as f(x)= and an expression "
            "of x, integers from 0 to 99, (a+b), (a-b), (a*b), (a/b) rounded down, (a%b), neg(a), "
            "abs(a), min(a,b), max(a,b), lt(a,b) and eq(a,b), which are 1 or 0, and if(a,b,c), "
            f"which is b unless a is 0. {INSTRUCTION}, for example <answer>f(x)=((x*x)-1)</answer>."
        )

    def score(self, text: str, problem: dict, **kw) -> dict:
        """Also how many hidden tests passed, and how many of those in the prompt."""
        answer = extract_answer(text)
        passed = self.passed(answer or "", problem["tests"])
        shown = sum(self.passed(answer or "", problem["shown"]))
        counts = {"passed": sum(passed), "tests": len(passed), "shown": shown}
        return score(text, answer, all(passed), **kw) | counts

    def trace(self, problem: dict, rng: random.Random) -> str:
        """Programs that fit the first shown pair, each run on the shown inputs up to a miss.

        The last line, which is the answer, is the hidden program, or a miss after which it stops.
        """
        ([x], y), (_, at) = problem["shown"][0], toy_pool()
        draws = rng.sample(at[x, y], min(8, len(at[x, y])))
        misses = [p for p in draws if not all(self.passed(p, problem["shown"]))]
        if misses and rng.random() < self.give_up:
            tries = misses[: rng.randint(1, 2)]
        else:
            tries = [*misses[: rng.choice([0, 0, 1, 2])], problem["program"]]
        lines = [self.checked(program, problem["shown"]) for program in tries]
        return f"{''.join(lines)}</think><answer>{tries[-1]}</answer>"

    def checked(self, program: str, shown: list) -> str:
        """A line of a trace: the program, then each shown input put in, + or - behind the value.

        >>> ToyCode().checked("f(x)=(x+1)", [[[3], 4], [[-2], 5]])
        'f(x)=(x+1);3:(3+1)=4+;-2:(-2+1)=-1-\\n'
        """
        line, body = program, program.partition("=")[2]
        for [x], y in shown:
            status, value = run_toy(program, [x])
            line += f";{x}:" + re.sub(r"\bx\b", str(x), body)
            line += f"={value if status == 'ok' else 'e'}"
            if value != y or status != "ok":
                return line + "-\n"
            line += "+"
        return line + "\n"

    def describe(self, text: str, problem: dict) -> dict:
        """Programs tried; shares of tests passed; whether the last mark says what is true."""
        parts, thought = self.score(text, problem), text.partition("</think>")[0].rstrip()
        return {
            "tries": sum("f(" in line for line in thought.split("\n")),
            "pass_rate": parts["passed"] / parts["tests"],
            "shown_passed": parts["shown"] / self.SHOWN,
            "mark_true": thought.endswith("+") == (parts["shown"] == self.SHOWN),
        }


# ----------------------------------------------------------------- countdown in two notations


@dataclass
class Notations(Countdown):
    """Countdown whose traces write some tries in a second notation, 7x3e21 for 7*3=21.

    It stands for the mixed languages of R1-Zero, and `consistency` for R1's remedy: a reward for
    the share of the tries in the first notation, added to the score (arXiv:2501.12948 sec. 2.3.2).
    """

    worded: float = 0.5  # share of the tries that traces write in the second notation
    consistency: float = 0.0  # weight of that reward

    SIGNS = str.maketrans("+-*/=", "pmxde")
    BACK = str.maketrans("pmxde", "+-*/=")

    def trace(self, problem: dict, rng: random.Random) -> str:
        thought, *end = super().trace(problem, rng).partition("</think>")
        lines = []
        for line in thought.splitlines(keepends=True):
            lines.append(line.translate(self.SIGNS) if rng.random() < self.worded else line)
        return "".join(lines + end)

    def score(self, text: str, problem: dict, **kw) -> dict:
        parts, seen = super().score(text, problem, **kw), self.describe(text, problem)
        parts["total"] += self.consistency * seen["first_notation"]
        return parts | {"mixed": seen["mixed"]}

    def describe(self, text: str, problem: dict) -> dict:
        """Also the share of the first notation among the tries, and whether both occur."""
        thought, *end = text.partition("</think>")
        tries = [line for line in thought.split("\n") if re.search("[=e]", line)]
        worded = [re.search("[pmxde]", line) is not None for line in tries]
        seen = super().describe("".join([thought.translate(self.BACK), *end]), problem)
        seen["first_notation"] = 1 - sum(worded) / max(1, len(worded))
        seen["mixed"] = len(set(worded)) == 2
        return seen


# ---------------------------------------------------------------- countdown by operator patterns


@functools.lru_cache(maxsize=2**16)
def pattern_attempts(numbers: tuple[int, ...], first: str, second: str) -> list[tuple[int, str]]:
    """(value, chain) of the ways to join two of three numbers by `first`, the third by `second`.

    In the order of the numbers; a sum or product in one order only. All values are from 0 to 99.

    >>> pattern_attempts((7, 1, 5), "-", "*")[:2], pattern_attempts((7, 1, 5), "*", "-")[0]
    ([(30, '(7-1)*5=6*5=30'), (2, '(7-5)*1=2*1=2')], (2, '7*1-5=7-5=2'))
    """
    found, rank = [], {"+": 1, "-": 1, "*": 2, "/": 2}
    for i, j in itertools.permutations(range(3), 2):
        a, b, c = numbers[i], numbers[j], numbers[3 - i - j]
        value = apply_operator(first, a, b)
        if value not in range(100) or (first in "+*" and i > j):
            continue
        inner = f"{a}{first}{b}"
        in_front = behind = inner
        if rank[first] < rank[second]:
            in_front = behind = f"({inner})"
        elif rank[first] == rank[second] and second in "-/":
            behind = f"({inner})"
        ways = [(value, c, f"{in_front}{second}{c}={value}{second}{c}")]
        if second in "-/":
            ways.append((c, value, f"{c}{second}{behind}={c}{second}{value}"))
        for left, right, chain in ways:
            result = apply_operator(second, left, right)
            if result in range(100):
                found.append((int(result), f"{chain}={result}"))
    return found


@dataclass
class Patterns(Countdown):
    """Countdown for ReasonFlux (arXiv:2502.06772): a template is a pattern of two operators.

    A problem with a "template" has its letter in the prompt, A for ++ to P for //, and its trace
    tries what fits that pattern and nothing else; then it gives up.
    """

    guided: float = 0.0  # above 0: all have a template; the share of those that reach the target

    NATURAL = {"high": 99, "min_target": 10}
    LETTERS = "ABCDEFGHIJKLMNOP"

    def __post_init__(self):
        super().__post_init__()
        if self.max_numbers != 3 or not 0 <= self.guided <= 1:
            raise BadInput(f"{self}: three numbers, guided 0 to 1 are allowed")

    def attempts(self, problem: dict, template: int) -> list[tuple[int, str]]:
        first, second = "+-*/"[template // 4], "+-*/"[template % 4]
        return pattern_attempts(tuple(problem["numbers"]), first, second)

    def reaching(self, problem: dict) -> list[int]:
        """The places of the patterns that reach the target."""
        target = problem["target"]
        return [place for place in range(16) if target in dict(self.attempts(problem, place))]

    def problem(self, split: str, seed: int, index: int) -> dict:
        """That of countdown, or, where no pattern reaches its target, a later one."""
        while True:
            problem = super().problem(split, seed, index)
            reaching = self.reaching(problem)
            if reaching:
                break
            index += 1_000_003
        if self.guided:
            rng = random.Random(f"template {split} {seed} {index}")
            others = [place for place in range(16) if place not in reaching]
            problem["template"] = rng.choice(reaching if rng.random() < self.guided else others)
        return problem

    def similar(self, problem: dict, count: int) -> list[dict]:
        """At most `count` others of the same numbers and split that one of its patterns solves."""
        rng = random.Random(f"similar {self.key(problem)}")
        ways = self.attempts(problem, rng.choice(self.reaching(problem)))
        values = sorted({value for value, _ in ways})
        found = [{"numbers": problem["numbers"], "target": value} for value in values]
        split = split_of(self.key(problem))
        fits = range(self.min_target, self.max_target + 1)
        found = [x for x in found if x["target"] in fits and x["target"] != problem["target"]]
        found = [x for x in found if split_of(self.key(x)) == split]
        return rng.sample(found, min(count, len(found)))

    def compact(self, problem: dict) -> str:
        asked = super().compact(problem)
        if "template" not in problem:
            return asked
        return asked.replace("<think>", self.LETTERS[problem["template"]] + "<think>")

    def trace(self, problem: dict, rng: random.Random) -> str:
        """One try a line, in a fixed order, up to a hit."""
        if "template" not in problem:
            return super().trace(problem, rng)
        lines, answer = [], "0"  # the answer is the last try
        for value, chain in self.attempts(problem, problem["template"]):
            lines.append(try_line(value, chain, problem["target"]))
            answer = chain.partition("=")[0]
            if value == problem["target"]:
                break
        return f"{''.join(lines)}</think><answer>{answer}</answer>"
