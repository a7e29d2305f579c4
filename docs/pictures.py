"""The pictures of docs/experiments.md that show what docs/results/*.json holds.

    pip install matplotlib
    python docs/pictures.py

A line or a dot is the mean of the seeds, a bar reaches from the lowest to the highest of them.
"""

import json
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent
rcParams.update({"svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False})


def results(name: str) -> dict[str, list[float]]:
    """The measured values of docs/results/NAME.json: what was measured, seed by seed."""
    return json.loads((DOCS / "results" / f"{name}.json").read_text())["values"]


def draw(ax, label: str, xs: list[float], values: list[list[float]], style: str = "o-") -> None:
    """Mean and range of the seeds' values at each x."""
    means = [sum(seeds) / len(seeds) for seeds in values]
    pairs = list(zip(means, values, strict=True))
    below = [max(0.0, mean - min(seeds)) for mean, seeds in pairs]  # equal ones round below 0
    above = [max(0.0, max(seeds) - mean) for mean, seeds in pairs]
    ax.errorbar(xs, means, (below, above), fmt=style, markersize=4, elinewidth=1, label=label)


def powers(ax, xs: list[int], label: str) -> None:
    """A logarithmic axis whose ticks are the points that were measured."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(xs, [str(x) for x in xs])
    ax.set_xlabel(label)


def save(figure: Figure, name: str) -> None:
    figure.savefig(DOCS / f"{name}.svg", metadata={"Date": None})


def nsr() -> None:
    """pass@k of the methods, where four of five answers are wrong at first, and where most are right;
    64 samples for each of 100 problems.
    """
    figure = Figure((10, 4), layout="constrained")
    wrong, right = figure.subplots(1, 2)
    methods = "base", "nsr", "w_reinforce", "reinforce", "grpo", "psr"
    for ax, name, ks in (
        (wrong, "nsr", [1, 2, 4, 8, 16, 64]),
        (right, "nsr_coverage", [1, 4, 16, 64]),
    ):
        values = results(name)
        for color, method in enumerate(methods):
            arm = method if name == "nsr" or method == "base" else f"{method}_60"
            if f"{arm}_pass_at_1" in values:
                points = [values[f"{arm}_pass_at_{k}"] for k in ks]
                label = method if method == "base" else method.replace("_", "-").upper()
                draw(ax, label, ks, points, f"C{color}o-")
        powers(ax, ks, "k (samples per problem)")
        ax.set_ylim(0, 1.02)
        ax.legend(frameon=False, loc="lower right")
    wrong.set_ylabel("pass@k (share of problems)")
    wrong.set_title("a fifth is right at first, answers cut off at 48 tokens", fontsize=10)
    right.set_title("learnt from easy problems, most right at first; 60 updates", fontsize=10)
    save(figure, "nsr")


def ppo() -> None:
    """Answers of at most 96 tokens: how many run into the limit, and how many are right; and which
    way a cosine reward moves the length of answers with room, by where accuracy starts.
    """
    values, moved = results("ppo_length"), results("ppo_direction")
    arms = {"base": "before", "plain": "plain reward", "cosine": "cosine reward"}
    figure = Figure((9, 3.4), layout="constrained")
    ax, lengths = figure.subplots(1, 2)
    for arm, label in arms.items():
        ax.plot(values[f"{arm}_exceeds"], values[f"{arm}_accuracy"], "o", label=label)
    ax.set_xlim(0, 0.5)
    ax.set_ylim(0, 0.5)
    ax.set_xlabel("share of answers cut off at 96 tokens")
    ax.set_ylabel("accuracy, a dot a seed")
    ax.legend(frameon=False, loc="lower right")
    starts = {"low": "a fifth right", "high": "more than half right"}
    for place, start in enumerate(starts):
        for shift, (arm, label) in enumerate(arms.items()):
            found = moved[f"{start}_length" if arm == "base" else f"{start}_{arm}_length"]
            xs = [place + 0.2 * (shift - 1)] * len(found)
            lengths.plot(xs, found, "o", color=f"C{shift}", label=label if place == 0 else None)
    lengths.set_xticks(range(2), list(starts.values()))
    lengths.set_xlim(-0.5, 1.5)
    lengths.set_ylim(0)
    lengths.set_ylabel("tokens of an answer")
    lengths.legend(frameon=False, loc="lower left")
    save(figure, "ppo")


def coconut() -> None:
    """Accuracy of what stands in the place of written steps, after 4000 and 6000 updates."""
    values = results("coconut")
    arms = {"answer at once": "no_cot", "4 pauses": "pause", "4 thoughts": "coconut"}
    figure = Figure((6, 2.4), layout="constrained")
    ax = figure.subplots()
    for row, arm in enumerate(arms.values()):
        for shift, ending, color in ((-0.1, "", "C0"), (0.1, "_6000", "C1")):
            dots = values[arm + ending]
            label = f"{ending[1:] or 4000} updates" if row == 0 else None
            ax.plot(dots, [row + shift] * len(dots), "o", color=color, label=label)
    ax.plot(values["cot"], [len(arms)] * len(values["cot"]), "o", color="C0")
    ax.axvline(1 / 3, color="gray", linewidth=1, linestyle=":")
    ax.set_yticks(range(len(arms) + 1), [*arms, "in words, 1000"])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.03)
    ax.set_xlabel("accuracy, a dot a seed (dotted: even from odd alone)")
    ax.legend(frameon=False, loc="lower left")
    save(figure, "coconut")


def recurrent_depth() -> None:
    """Accuracy over the iterations at test time, trained with random or with fixed depth."""
    depths = [1, 2, 4, 8, 16, 32, 64]
    figure = Figure((8, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for ax, name, trained in zip(panels, ("shallow", "recurrent_depth"), (2, 5), strict=True):
        values = results(name)
        for arm in ("random", "fixed"):
            points = [values[f"{arm}_{depth}"] for depth in depths]
            draw(ax, f"{arm} depth in training", depths, points)
        ax.axvline(trained, color="gray", linewidth=1, linestyle=":")
        ax.set_title(f"{trained} iterations in training, on average", fontsize="medium")
        powers(ax, depths, "r (iterations at test time)")
    panels[0].set_ylabel("accuracy (share of labels)")
    panels[0].legend(frameon=False)
    save(figure, "recurrent_depth")


def budget_forcing() -> None:
    """Less thinking by a cap, more by "Wait": accuracy of a model that gives up, and of one that
    stops when it has found something.
    """
    values = results("budget_forcing")
    caps, waits = [16, 32, 64, 128, 256, 512], ["cap512", "wait1", "wait2", "wait4"]
    models = {"tiny": "models/tiny: gives up", "rl": "models/tiny-rl: stops on hits"}
    figure = Figure((8, 3.4), layout="constrained")
    less, more = figure.subplots(1, 2, sharey=True)
    for model, label in models.items():
        draw(less, label, caps, [values[f"{model}_cap{cap}"] for cap in caps])
        draw(more, label, [0, 1, 2, 4], [values[f"{model}_{name}"] for name in waits])
    powers(less, caps, "cap (thinking tokens)")
    more.set_xticks([0, 1, 2, 4])
    more.set_xlabel("Waits (times the end of thinking is refused)")
    less.set_ylabel("accuracy (share of problems)")
    less.set_ylim(0)
    less.legend(frameon=False)
    save(figure, "budget_forcing")


def specreason() -> None:
    """How fast each way to write is with a base of 6 and of 14 layers, and what was predicted."""
    rows = {
        "SpecReason (a step)": ("speedup", "speedup"),
        "predicted, eq. 6": ("predicted", "predicted"),
        "speculative decoding (a token)": ("decoding_speedup", "spec_decode_speedup"),
        "both": ("hierarchical_speedup", "hierarchical_speedup"),
    }
    figure = Figure((8, 2.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    bases = {"6 layers": "specreason", "14 layers": "specreason_deep"}
    for column, (ax, (base, experiment)) in enumerate(zip(axes, bases.items(), strict=True)):
        values = results(experiment)
        for row, (label, names) in enumerate(rows.items()):
            color = "gray" if label.startswith("predicted") else "C0"
            found = values[names[column]]
            ax.plot(found, [row] * len(found), "o", color=color, alpha=0.6)
        ax.axvline(1, color="gray", linewidth=1, linestyle=":")
        ax.set_xlim(0.9, 3.6)
        ax.set_xlabel(f"speed-up over a base of {base}")
    axes[0].set_yticks(range(len(rows)), list(rows))
    axes[0].invert_yaxis()
    save(figure, "specreason")


def best_of_n() -> None:
    """Accuracy by the tokens of 1 to 16 answers, for easy, medium and hard problems."""
    values, sizes = results("best_of_n_bins"), [1, 2, 4, 8, 16]
    ways = {
        "one of them right": "best_rule",
        "vote weighted by likelihood": "vote_likelihood",
        "vote weighted by reward model": "vote_model",
        "majority": "majority",
        "best by reward model": "best_model",
        "likeliest": "best_likelihood",
    }
    bins = {"easy": "easy: half right or more", "medium": "medium", "hard": "hard: less than 0.1"}
    figure = Figure((9, 3.8), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for ax, (name, title) in zip(axes, bins.items(), strict=True):
        tokens = sum(values[f"tokens_{name}"]) / len(values[f"tokens_{name}"])
        for label, way in ways.items():
            points = [values[f"{way}_{size}_{name}"] for size in sizes]
            style = "k:" if way == "best_rule" else "o-"
            draw(ax, label, [tokens * size for size in sizes], points, style)
        ax.set_xscale("log", base=2)
        ax.set_xticks([tokens * size for size in sizes], [f"{tokens * n:.0f}" for n in sizes])
        ax.set_title(title, fontsize=10)
    axes[0].set_ylabel("accuracy (share of problems)")
    axes[0].set_ylim(0, 1.02)
    axes[1].set_xlabel("sampled tokens: of 1, 2, 4, 8 and 16 answers")
    lines = axes[0].get_legend_handles_labels()
    figure.legend(*lines, frameon=False, ncols=3, loc="outside lower center")
    save(figure, "best_of_n")


def sft() -> None:
    """R1's four stages on a student: what each data set gives."""
    values = results("data_r1_stages")
    stages = {
        "base": "base",
        "1: SFT on\n2000 traces": "stage1",
        "2: RL": "stage2",
        "3: SFT of the base\non its samples": "stage3",
        "4: RL": "stage4",
    }
    figure = Figure((7, 3.4), layout="constrained")
    ax = figure.subplots()
    draw(ax, "right", range(5), [values[stage] for stage in stages.values()])
    mixed = [values[f"mixed_{stage}"] for stage in stages.values()]
    draw(ax, "mixes two notations", range(5), mixed, "s--")
    ax.set_xticks(range(5), list(stages))
    ax.set_ylabel("share of answers")
    ax.set_ylim(0)
    ax.legend(frameon=False)
    save(figure, "sft")


if __name__ == "__main__":
    for picture in (nsr, ppo, coconut, recurrent_depth, budget_forcing, specreason, best_of_n, sft):
        picture()
