"""sft.py's own functions: loss and schedule against the reference's numbers, traces, masks, data files."""

import json
import os
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rewards  # noqa: E402
import sft  # noqa: E402

FOLDER = Path(os.environ.get("VECTORS") or Path(__file__).parent / "vectors")
PATH = FOLDER / "sft_data.json"
VECTORS = json.loads(PATH.read_text(encoding="utf-8")) if PATH.is_file() else {}
SELECTION = VECTORS.get("selection", {"s1": None, "s1_length_weights": [], "limo": None})
NORMALISATION = VECTORS.get("loss_normalisation", {"per_token": [], "logits": []})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    sft.make_tiny(path, sft.Config(num_layers=1, hidden_size=32))
    return path


@pytest.fixture(scope="module")
def prompter(folder) -> "sft.Prompter":
    return sft.Prompter(sft.load_model(folder), rewards.make_task("countdown"), chat=False)


@pytest.mark.parametrize("case", NORMALISATION["per_token"], ids=lambda c: c["id"])
def test_loss_is_the_mean_over_all_tokens_of_the_step(case):
    """The sum over ranks and micro-batches of our loss is the reference's right value, for every cut."""
    ranks = case["per_token_losses_by_rank_and_microbatch"]
    num_tokens = sum(len(micro) for rank in ranks for micro in rank)
    parts = [sft.sft_loss(-torch.tensor([micro], dtype=torch.float64), num_tokens) for rank in ranks for micro in rank]
    assert float(sum(parts)) == pytest.approx(case["right"], rel=1e-9)


@pytest.mark.parametrize("case", NORMALISATION["logits"], ids=lambda c: c["id"])
def test_loss_and_gradient_from_logits(case):
    micro = [(torch.tensor(m["logits"], dtype=torch.float64), torch.tensor(m["labels"])) for m in case["micro_batches"]]
    micro = [(logits.requires_grad_(), labels) for logits, labels in micro]
    num_tokens = sum(int((labels[:, 1:] != -100).sum()) for _, labels in micro)
    total = 0.0
    for logits, labels in micro:
        trained = labels[:, 1:] != -100
        chosen = labels[:, 1:].clamp(min=0)
        logprobs = logits[:, :-1].log_softmax(-1).gather(-1, chosen[..., None])[..., 0] * trained
        loss = sft.sft_loss(logprobs, num_tokens)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(case["right"], rel=1e-9)
    norm = sum(float(logits.grad.pow(2).sum()) for logits, _ in micro) ** 0.5
    assert norm == pytest.approx(case["grad_l2_right"], rel=1e-9)
    first = next(i for i in micro[0][1][0, 1:].ne(-100).nonzero()[:, 0].tolist())
    assert micro[0][0].grad[0, first].tolist() == pytest.approx(case["grad_right_first_supervised_row"], rel=1e-8)


@pytest.mark.parametrize("case", VECTORS.get("lr_schedule", []))
def test_learning_rate_equals_the_reference(case):
    assert case["min_ratio"] == 0.0
    for step, expected in case["lr_at"].items():
        ours = sft.learning_rate(int(step), case["total_steps"], case["peak"], case["warmup_steps"])
        assert ours == pytest.approx(expected, rel=1e-9, abs=1e-18)


class Turns:
    """In place of a random generator: domains in turn, and of each the first trace. Notes the weights it was given."""

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
    return [
        item
        | {"correct": item["teacher_correct"], "weak": item["small_correct"] + item["large_correct"]}
        | {"format": float(not (item["api_error"] or item["bad_format"]))}
        for item in SELECTION["s1"]["items"]
    ]


@pytest.mark.skipif(not SELECTION["s1"], reason="no vectors")
def test_s1_equals_the_reference():
    case, items = SELECTION["s1"], s1_items()
    chosen = sft.s1_select(items, case["target_size"], Turns(), case["tau"])
    assert [item["id"] for item in chosen] == case["selected_in_order"]
    assert [item["id"] for item in sft.s1_select(items, 1, Turns())][:1] == case["preselected"]
    everything = {item["id"] for item in sft.s1_select(items, 1000, Random(0))}
    assert everything == set(case["after_difficulty"])
    easy = [item | {"weak": 0} for item in items]
    assert {item["id"] for item in sft.s1_select(easy, 1000, Random(0))} == set(case["after_format"])
    clean = [item | {"format": 1.0} for item in easy]
    assert {item["id"] for item in sft.s1_select(clean, 1000, Random(0))} == set(case["after_api_errors"])


@pytest.mark.parametrize("case", SELECTION["s1_length_weights"])
def test_s1_length_weights(case):
    """The first draw's weights, from the longest trace on, are the reference's probabilities by rank."""
    turns = Turns()
    [first] = sft.s1_select([{"length": length} for length in case["lengths"]], 1, turns)
    assert first["length"] == max(case["lengths"])
    total, ranked = sum(turns.weights[0]), sorted(zip(case["ranks"], case["probabilities"], strict=True))
    assert [w / total for w in turns.weights[0]] == pytest.approx([p for _, p in ranked], rel=1e-9)


def test_s1_draws_by_seed():
    items = [{"id": i, "length": i % 50, "domain": str(i % 4)} for i in range(200)]
    draws = [[item["id"] for item in sft.s1_select(items, 40, Random(seed))] for seed in (0, 0, 1)]
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
            item = {"prompt": question["id"], "number": number, "completion": text, "length": c["n_words"]}
            item |= {"weak": question["weak_correct_of_4"], "solved": question["strong_correct_of_32"], "attempts": 32}
            items.append(item)
    kept = [item for item in items if item["prompt"] in case["after_fine"]]
    expected = [score for number in case["after_fine"] for score in case["scores"][str(number)]]
    assert rewards.limo_scores(kept) == pytest.approx(expected, rel=1e-9)
    chosen = sft.limo_select(items, case["keep"])
    assert [item["prompt"] for item in chosen] == case["selected"] == case["ranking"][: case["keep"]]
    assert all(item["number"] == case["best_candidate"][str(item["prompt"])] for item in chosen)
    assert sft.limo_select([], 3) == []


def test_random_and_longest():
    items = [{"length": length} for length in (3, 9, 1, 9, 5)]
    assert sft.SELECT["longest"](items, 3, None) == [items[1], items[3], items[4]]
    drawn = sft.SELECT["random"](items, 4, Random(0))
    assert len(drawn) == 4 and all(item in items for item in drawn)
    assert drawn == sft.SELECT["random"](items, 4, Random(0)) and len(sft.SELECT["random"](items, 9, Random(0))) == 5


def completion(text: str, correct: bool, finished: bool = True, layout: float = 1.0, **score) -> "sft.Completion":
    score |= {"format": layout, "answer": "", "correct": correct, "total": float(correct)}
    return sft.Completion(0, {}, [1], [5] * len(text), [0.0] * len(text), finished, text, score)


def test_kept():
    """Right, finished, in the layout, in one notation, each text once; a cap; all of them; the shortest."""
    good, longer = completion("aa", True), completion("aaaa", True)
    bad = [completion("b", False), completion("c", True, finished=False), completion("d", True, layout=0.0)]
    group = [longer, *bad, good, completion("aa", True), completion("e", True, mixed=True)]
    texts = {keep: [c.text for c in sft.kept(group, keep, 0)] for keep in ("correct", "all", "shortest")}
    assert texts == {
        "correct": ["aaaa", "aa"], "all": ["aaaa", "b", "d", "aa", "e"], "shortest": ["aa", "aaaa"],
    }  # fmt: skip
    assert [c.text for c in sft.kept(group, "correct", 1)] == ["aaaa"]
    lengths = [completion("x" * n, True) for n in (4, 1, 3, 2)]
    wrong = [completion("w", False)] * 4
    for group, expected in ((lengths, 1), (lengths + wrong, 3), (lengths + wrong * 7, 4)):  # 1, 1/2, 1/8 right
        assert [len(c.text) for c in sft.kept(group, "shortest", 1)] == [expected]
    assert sft.kept(wrong, "shortest", 2) == sft.kept(wrong, "correct", 0) == []


def settings(**changes) -> "sft.Config":
    return sft.Config(**changes)


@pytest.mark.parametrize(
    "flags, text, learnt",
    [
        ({}, "1=a\nb\n</think>c<eos>", "a\nb\n</think>c<eos>"),
        ({"loss_on": "all"}, "1=a\nb\n</think>c<eos>", "1=a\nb\n</think>c<eos>"),
        ({"loss_on": "thought"}, "1=a\nb\n</think>c<eos>", "a\nb\n</think>"),
        ({"loss_on": "answer"}, "1=a\nb\n</think>c<eos>", "c<eos>"),
        ({"cot": "short"}, "1=b\n</think>c<eos>", "b\n</think>c<eos>"),
        ({"cot": "none"}, "1=</think>c<eos>", "</think>c<eos>"),
        ({"cot": "none", "loss_on": "answer"}, "1=</think>c<eos>", "c<eos>"),
        ({"perturb": "delete:1"}, "1=</think>c<eos>", "</think>c<eos>"),
        ({"perturb": "insert:1"}, "1=x\na\nx\nb\n</think>c<eos>", "x\na\nx\nb\n</think>c<eos>"),
        ({"perturb": "shuffle:.5"}, "1=a\nb\n</think>c<eos>", "a\nb\n</think>c<eos>"),
    ],
)
def test_row_of(prompter, flags, text, learnt):
    example = {"prompt": "1=", "completion": "a\nb\n</think>c"}
    ids, mask = sft.row_of(prompter, settings(**flags), example, "x\n</think>y", 0)
    assert prompter.decode(ids) == text
    assert prompter.decode([i for i, m in zip(ids, mask, strict=True) if m]) == learnt


def test_trace_row_follows_the_flags(prompter):
    """--cot none keeps the answer of the same trace; --perturb damages it, the same way every time."""
    rows = {}
    for flags in ("", "--cot none", "--perturb digits:1", "--perturb answer:1", "--perturb insert:1"):
        cfg = sft.parse_config(sft.Config, flags.split())
        ids, _ = rows[flags] = sft.trace_row(prompter, cfg, 5)
        assert (ids, _) == sft.trace_row(prompter, cfg, 5)
    texts = {flags: prompter.decode(ids) for flags, (ids, _) in rows.items()}
    assert len(set(texts.values())) == 5
    ends = {flags: text.partition("</think>")[2] for flags, text in texts.items()}
    assert ends[""] == ends["--cot none"] == ends["--perturb digits:1"] != ends["--perturb answer:1"]
    assert texts["--perturb insert:1"].count("\n") == 2 * texts[""].count("\n")


def test_trace_row_masks_the_prompt_and_learns_the_end(prompter):
    ids, mask = sft.trace_row(prompter, settings(), 3)
    given = prompter.encode(prompter.text(prompter.task.problem("train", 0, 3)))
    assert ids[: len(given)] == given and mask == [0] * len(given) + [1] * (len(ids) - len(given))
    assert ids[-1] == prompter.end[0] and prompter.decode(given).endswith("<think>")
    assert (ids, mask) == sft.trace_row(prompter, settings(), 3)  # a pure function
    assert ids != sft.trace_row(prompter, settings(seed=1), 3)[0]
    assert set(sft.trace_row(prompter, settings(loss_on="all"), 3)[1]) == {1}


def test_traces_survive_the_tokenizer(prompter):
    """Every trace decodes to itself, has no unknown token, and its numbers up to 99 are single tokens."""
    for index in range(200):
        ids, _ = sft.trace_row(prompter, settings(), index)
        text = prompter.decode(ids[:-1])
        assert prompter.encode(text) == ids[:-1] and prompter.tokenizer.token_to_id("<unk>") not in ids
    assert len(prompter.encode("10+99=1234")) == 3 + 1 + 4  # 10 + 99 = and four digits
    everything = "".join(map(chr, range(32, 127))) + "\n"
    assert prompter.decode(prompter.encode(everything)) == everything


def test_the_tiny_vocabulary_is_fixed(folder, prompter):
    """Later scripts rely on these ids; what no trace uses is never sampled."""
    words = "<pad> <eos> <unk> <think> </think> <answer> </answer> <score> <bot> <eot> <latent> wait".split()
    assert [prompter.tokenizer.token_to_id(word) for word in words] == list(range(12))
    assert prompter.tokenizer.get_vocab_size() == 12 + 32 + 1 + 95 + 90
    model = sft.load_model(folder)
    never = set((model.vocab_bias == -torch.inf).nonzero()[:, 0].tolist())
    assert never == {0, 2, 7, 8, 9, 10, *range(12, 44)} and model.eos_ids == [1] and model.is_tiny


def write(path: Path, lines: list) -> str:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines), "utf-8")
    return str(path)


def rows_of(path: str, prompter, **flags) -> tuple[list, str]:
    """The rows of a file, and what was said."""
    said = []
    run = SimpleNamespace(cfg=settings(data=path, **flags), say=said.append)
    return sft.file_rows(run, prompter), "\n".join(said)


def test_file_rows(prompter, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    [(ids, mask)], _ = rows_of(path, prompter)
    assert prompter.decode(ids) == "1+1=2<eos>" and mask == [0, 0, 0, 0, 1, 1]
    assert rows_of(path, prompter, loss_on="all")[0][0][1] == [1] * 6


def test_file_rows_are_selected(prompter, tmp_path):
    """By length, by what weaker models solved, and away from held-out prompts; the note has the counts."""
    lines = [{"prompt": f"{i}=", "completion": "x" * i + "</think>"} for i in range(1, 9)]
    path = write(tmp_path / "a.jsonl", lines)
    rows, said = rows_of(path, prompter, select="longest:3")
    assert [len(ids) for ids, _ in rows] == [12, 11, 10] and "3 of 8 examples" in said
    weak = [{"prompt": f"{i}=", "correct": i > 2} for i in range(1, 9)]
    weak = [write(tmp_path / "w1.jsonl", weak), write(tmp_path / "w2.jsonl", [{"prompt": "1=", "correct": True}])]
    rows, _ = rows_of(path, prompter, select="s1:5", weak=weak[0])
    assert sorted(len(ids) for ids, _ in rows) == [5, 6]
    assert [len(ids) for ids, _ in rows_of(path, prompter, select="s1:5", weak=",".join(weak))[0]] == [6]
    with pytest.raises(sft.BadInput, match="no example passes --select limo:2"):  # no line has "solved"
        rows_of(path, prompter, select="limo:2")
    limo = [line | {"solved": i % 3, "attempts": 16} for i, line in enumerate(lines)]
    assert len(rows_of(write(tmp_path / "b.jsonl", limo), prompter, select="limo:9")[0]) == 3
    held = prompter.text(rewards.heldout(prompter.task, 3)[1])
    path = write(tmp_path / "c.jsonl", [*lines, {"prompt": held, "completion": "z"}])
    assert "8 of 9 examples" in rows_of(path, prompter, decontaminate=8, eval_problems=3)[1]
    assert "9 of 9 examples" in rows_of(path, prompter, decontaminate=8, eval_problems=1)[1]


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "is empty"),
        ([{"prompt": "a"}], "line 1"),
        ([{"prompt": "a", "completion": "b"}, "not json\n"], "line 2"),
        ([{"prompt": "a", "completion": 3}], "line 1"),
        (["[1]\n"], "line 1: prompt and completion, or messages"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "need --chat"),
    ],
)
def test_bad_files(prompter, tmp_path, lines, message):
    with pytest.raises(sft.BadInput, match=message):
        rows_of(write(tmp_path / "a.jsonl", lines), prompter)


def test_thoughts_are_needed(prompter, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    for flags in ({"cot": "none"}, {"perturb": "delete:1"}, {"loss_on": "answer"}):
        with pytest.raises(sft.BadInput, match="line 1: --cot, --perturb and --loss_on .* need a completion"):
            rows_of(path, prompter, **flags)


def test_rejection_sampling(folder, tmp_path, monkeypatch):
    """The file holds what was kept, the same on two ranks; --data reads it; what is learnt is what was sampled."""
    monkeypatch.setattr(sft, "kept", lambda group, keep, cap: group[:cap])  # a random model writes nothing right
    flags = ["--model", str(folder), "--sample", "3", "--eval_samples", "2", "--cap", "1", "--keep", "all"]
    flags += ["--max_new_tokens", "8", "--eval_problems", "0"]
    out = tmp_path / "a"
    assert sft.main(sft.train, sft.Config, [*flags, "--out", str(out)]) == 0
    lines = [json.loads(line) for line in (out / "sampled.jsonl").read_text(encoding="utf-8").splitlines()]
    task = rewards.make_task("countdown")
    assert [line["prompt"] for line in lines] == [task.compact(task.problem("train", 0, i)) for i in range(3)]
    assert all(line["attempts"] == 2 and line["solved"] == 0 and line["correct"] is False for line in lines)
    [metrics] = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert metrics["kept"] == 3 and metrics["accuracy"] == 0
    learn = ["--model", str(folder), "--data", str(out / "sampled.jsonl"), "--steps", "1", "--batch_size", "2"]
    assert sft.main(sft.train, sft.Config, [*learn, "--eval_problems", "0", "--out", str(tmp_path / "b")]) == 0


def test_chat_learns_every_assistant_turn_and_nothing_else():
    """A template with visible turns; the generation prompt is given, the reply and its end token are learnt."""

    def fill(messages, reply):
        text = "".join(f"[{m['role']}]{m['content']}[end]" for m in messages)
        return text + ("[assistant]" if reply else "")

    prompter = SimpleNamespace(style="chat", fill=fill)
    roles = [("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    parts = sft.chat_parts(prompter, [{"role": r, "content": c} for r, c in roles])
    assert [text for text, learnt in parts if learnt] == ["a1[end]", "a2[end]"]
    assert "".join(text for text, _ in parts) == fill([{"role": r, "content": c} for r, c in roles], False)


def test_make_tiny_is_reproducible(folder, tmp_path):
    sft.make_tiny(tmp_path, sft.Config(num_layers=1, hidden_size=32))
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    sft.make_tiny(tmp_path, sft.Config(num_layers=1, hidden_size=32, seed=1))
    assert (tmp_path / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()
