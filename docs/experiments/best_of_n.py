"""What a search says of itself as a score (failed-step fraction, arXiv:2509.19284), beside votes.

A run is one of more/best_of_n.py, same records and random numbers, whose answers have four more
scores; they are read from the thought alone, never from the answer, the verdict or a model:

    fsf     -(steps from which no way leads to the answer's step) / steps                   (8)
    review  -(share of the thought in lines that begin with wait)
    claim   1 if the last try says that it hits the target, else 0
    tries   -(number of tries)

An answer without a claimed hit has no useful step: its FSF is 1. On three numbers a hit has two
steps, so FSF counts tries and says whether the last one claims; `claim` is the control for that,
and so is the AUC among answers that all claim.

    python docs/experiments/best_of_n.py --seed 0
    python docs/experiments/best_of_n.py --resume out/A        # only the tables, again
    python docs/experiments/best_of_n.py --verifier FOLDER     # with a reward model's votes

Claims, written down before the runs of seeds 0, 1, 2 (names as in docs/results/best_of_n.json) are
in CLAIMS; the ends of their lines say what a prototype (one seed, 120 problems) led to expect. What
is chosen by difficulty (optimal, single) is chosen among ways without a reward model.
"""

import math
import re
import sys
from pathlib import Path
from statistics import stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from docs.results import holds
from more import best_of_n
from more.best_of_n import Config, Verifier, checkpoints, compare_ways, main, outcomes, solve
from more.reward_model import auc_within
from rewards import Completion, mean, read_json

CLAIMS = [
    "majority_16 >= mean + 0.10",  # 0.955 against 0.659
    "vote_likelihood_8 >= majority_8",  # 0.944, 0.930
    "best_likelihood_16 <= majority_16 - 0.05",  # 0.842: likelihood is no verifier
    "abs(best_shuffled_16 - mean) <= 0.06",  # two standard errors
    "optimal_16 >= single_16 - 0.01",
    "fsf_16 >= mean + 0.15",  # 0.903
    "fsf_16 >= shortest_16 + 0.05",  # 0.801
    "abs(fsf_16 - claim_16) <= 0.03",  # 0.907: what FSF knows is the claim
    "auc_fsf_claiming >= 0.60",  # 0.561: no
]
MODEL_CLAIMS = [  # with --verifier, a checkpoint of python more/reward_model.py --seed S
    "vote_model_8 >= majority_8",  # 0.940, 0.930
    "best_model_16 >= mean + 0.15",  # 0.917, 0.661
    "best_model_16 <= majority_16",  # 0.955
]
PICTURE = "majority", "vote_likelihood", "vote_model", "best_likelihood", "best_model", "best_rule"
MORE = {f"best_{name}": name for name in ("fsf", "review", "claim", "tries")}


def graph_of(text: str) -> tuple[list[list[int]], int | None]:
    """The steps of a countdown search: for each those it builds on, and the step of the answer.

    A step is an operation; tries with the same first one share it. The answer's step is the last
    of the last try, if this claims a hit. Only the thought is read, and no verdict is needed.

    >>> graph_of("(1+2)*4=3*4=12<15\\n1+2*4=1+8=9<15\\n(1+2)*5=3*5=15=15\\n</think>")
    ([[], [0], [], [2], [0]], 4)
    """
    parents, firsts, answer = [], {}, None
    thought = text.partition("</think>")[0]
    for line in thought.split("\n"):
        states = line.removeprefix("wait").split("=")
        inner = re.search(r"\([^()]+\)|^[^()]+$", states[0])
        found = inner and (re.search(r"\d+[*/]\d+", inner[0]) or re.search(r"\d+[+-]\d+", inner[0]))
        if len(states) < 2 or not found:
            continue
        claims = len(states) > 2 and states[-1] == states[-2]
        steps = len(states) - 1 - claims  # after the first, each state follows an operation
        if found[0] not in firsts:
            firsts[found[0]] = len(parents)
            parents.append([])
        last = firsts[found[0]]
        for _ in range(steps - 1):
            parents.append([last])
            last = len(parents) - 1
        answer = last if claims else None
    return parents, answer


def fsf(parents: list[list[int]], answer: int | None) -> float:
    """Eq. 8: the share of steps from which no way leads to the answer's step.

    >>> fsf([[], [0], [], [2], [0]], 4), fsf([[], [0]], None)
    (0.6, 1.0)
    """
    useful, todo = set(), [answer] if answer is not None else []
    while todo:
        step = todo.pop()
        if step not in useful:
            useful.add(step)
            todo += parents[step]
    return 1 - len(useful) / len(parents) if parents else 1.0


def search_scores(text: str) -> dict[str, float]:
    """What the text of a search says of itself; higher is better."""
    parents, answer = graph_of(text)
    thought = text.partition("</think>")[0]
    reviews = sum(len(line) for line in thought.split("\n") if line.startswith("wait"))
    return {
        "fsf": -fsf(parents, answer),
        "review": -reviews / max(1, len(thought)),
        "claim": float(answer is not None),
        "tries": -sum("=" in line for line in thought.split("\n")),
    }


class SearchReader(Verifier):
    """The script's scores, and those of the search."""

    def scores(self, group: list[Completion]) -> list[dict[str, float]]:
        found = super().scores(group)
        for score, completion in zip(found, group, strict=True):
            score |= search_scores(completion.text)
        return found


def auc_of(records: list[dict], score: str, keep) -> float:
    """Within-problem AUC of a score among the answers that `keep` lets through."""
    groups = []
    for record in records:
        some = [answer["score"] for answer in record["answers"] if keep(answer)]
        groups.append(([x[score] for x in some], [x["rule"] > 0 for x in some]))
    return auc_within(groups)


def is_finished(answer: dict) -> bool:
    return answer["finished"]


def claims_hit(answer: dict) -> bool:
    return answer["finished"] and answer["score"]["claim"] > 0


def every(answer: dict) -> bool:
    return True


def without_model(record: dict) -> dict:
    """The record of a run without --verifier."""
    answers = []
    for answer in record["answers"]:
        scores = {name: r for name, r in answer["score"].items() if name != "model"}
        answers.append(answer | {"score": scores})
    return record | {"answers": answers}


def bins_of(records: list[dict], n: int) -> dict[str, float]:
    """The values of docs/results/best_of_n_bins.json of a seed: those of docs/best_of_n.svg."""
    metrics, values = compare_ways(records, n), {}
    for name in best_of_n.BINS:
        some = [r["answers"] for r in records if bin_of(r) == name]
        values[f"problems_{name}"] = len(some)
        values[f"tokens_{name}"] = mean(answer["tokens"] for group in some for answer in group)
        for way in PICTURE:
            for size in [2**power for power in range(n.bit_length())]:
                key = f"eval/accuracy/{way}@{size}/{name}"
                if key in metrics:
                    values[f"{way}_{size}_{name}"] = metrics[key]
    return values


def bin_of(record: dict) -> str:
    """As compare_ways tells it."""
    return next(name for name, least in best_of_n.BINS.items() if record["share"] >= least)


def values_of(records: list[dict], n: int) -> dict[str, float]:
    """The values of docs/results/best_of_n.json of a seed."""
    before = compare_ways([without_model(record) for record in records], n)
    best_of_n.WAYS.update(MORE)
    rows = [outcomes(record, n) for record in records]
    answers = [answer for record in records for answer in record["answers"]]
    claiming = [answer for answer in answers if claims_hit(answer)]
    values = {"mean": mean(row["majority@1"][0] for row in rows)}
    values["tokens_1"] = mean(row["majority@1"][1] for row in rows)
    values["finished"] = mean(answer["finished"] for answer in answers)
    values["claiming"] = len(claiming) / len(answers)
    values["claims_right"] = mean(answer["score"]["rule"] for answer in claiming)
    for way in best_of_n.WAYS:
        name = way.removeprefix("best_") if way in MORE or way == "best_shortest" else way
        for size in [2**power for power in range(1, n.bit_length())]:
            key = f"{way}@{size}"
            if key in rows[0] and (size == n or not way.startswith("best")):
                values[f"{name}_{size}"] = mean(row[key][0] for row in rows)
    for method in [key for key in rows[0] if key.startswith(("beam", "dvts"))]:
        values[method.replace("@", "_")] = mean(row[method][0] for row in rows)
        values[method.replace("@", "_tokens_")] = mean(row[method][1] for row in rows)
    for size in (4, n):
        for name in ("optimal", "single"):
            values[f"{name}_{size}"] = before[f"eval/{name}@{size}"]
    scores = ["likelihood", "sum", "shortest", "fsf", "model"]
    for score in [name for name in scores if name in answers[0]["score"]]:
        values[f"auc_{score}"] = auc_of(records, score, every)
        values[f"auc_{score}_finished"] = auc_of(records, score, is_finished)
        values[f"auc_{score}_claiming"] = auc_of(records, score, claims_hit)
    for name in ("best_fsf", "best_claim", "best_likelihood", "best_shortest"):
        gaps = [row[f"{name}@{n}"][0] - row[f"majority@{n}"][0] for row in rows]
        values[f"{name.removeprefix('best_')}_gap_se"] = stdev(gaps) / math.sqrt(len(gaps))
    for part in records[0]["seconds"]:
        values[f"seconds_{part}"] = sum(record["seconds"][part] for record in records)
    return values


def run_and_read(cfg: Config) -> int:
    """The run, then its values and what became of the claims."""
    before = set(Path("out").glob("*"))
    code = solve(cfg, SearchReader)
    if code:
        return code
    folder = Path(cfg.resume or cfg.out or max(set(Path("out").glob("*")) - before))
    records = read_json(checkpoints(folder)[-1] / "records.json")["records"]
    values = values_of(records, cfg.N)
    for name, value in (values | bins_of(records, cfg.N)).items():
        print(f"{name:28}{value:9.3f}")
    claims = [*CLAIMS, *(MODEL_CLAIMS if cfg.verifier else [])]
    for claim in claims if cfg.N == 16 else []:
        print(f"{'held' if holds(claim, values) else 'NOT held':9}{claim}")
    return 0


if __name__ == "__main__":
    sys.exit(main(run_and_read, Config))
