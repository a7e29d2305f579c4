"""sft.py's own functions: loss and schedule as the reference's, traces, masks, data files."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rewards  # noqa: E402
import sft  # noqa: E402

FOLDER = Path(os.environ.get("VECTORS") or Path(__file__).parent / "vectors")
PATH = FOLDER / "sft_data.json"
VECTORS = json.loads(PATH.read_text(encoding="utf-8")) if PATH.is_file() else {}
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
    parts = [
        sft.sft_loss(-torch.tensor([micro], dtype=torch.float64), num_tokens)
        for rank in ranks
        for micro in rank
    ]
    assert float(sum(parts)) == pytest.approx(case["right"], rel=1e-9)


@pytest.mark.parametrize("case", NORMALISATION["logits"], ids=lambda c: c["id"])
def test_loss_and_gradient_from_logits(case):
    micro = [
        (torch.tensor(m["logits"], dtype=torch.float64), torch.tensor(m["labels"]))
        for m in case["micro_batches"]
    ]
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
    assert micro[0][0].grad[0, first].tolist() == pytest.approx(
        case["grad_right_first_supervised_row"], rel=1e-8
    )


@pytest.mark.parametrize("case", VECTORS.get("lr_schedule", []))
def test_learning_rate_equals_the_reference(case):
    assert case["min_ratio"] == 0.0
    for step, expected in case["lr_at"].items():
        ours = sft.learning_rate(int(step), case["total_steps"], case["peak"], case["warmup_steps"])
        assert ours == pytest.approx(expected, rel=1e-9, abs=1e-18)


END = [1]


@pytest.mark.parametrize(
    "loss_on, learnt",
    [
        ("completion", "a\nb\n</think>c<eos>"),
        ("all", "1=a\nb\n</think>c<eos>"),
        ("thought", "a\nb\n</think>"),
        ("answer", "c<eos>"),
    ],
)
def test_make_row(prompter, loss_on, learnt):
    example = {"prompt": "1=", "completion": "a\nb\n</think>c"}
    ids, mask = sft.make_row(prompter, example, loss_on, END)
    assert prompter.decode(ids) == "1=a\nb\n</think>c<eos>" and len(mask) == len(ids)
    assert prompter.decode([i for i, m in zip(ids, mask, strict=True) if m]) == learnt


def trace_row(prompter, index: int, seed: int = 0) -> tuple:
    return sft.make_row(prompter, sft.trace_example(prompter, seed, index), "completion", END)


def test_a_trace_masks_the_prompt_and_learns_the_end(prompter):
    ids, mask = trace_row(prompter, 3)
    given = prompter.encode(prompter.text(prompter.task.problem("train", 0, 3)))
    assert ids[: len(given)] == given
    assert mask == [0] * len(given) + [1] * (len(ids) - len(given))
    assert ids[-1:] == END and prompter.decode(given).endswith("<think>")
    assert (ids, mask) == trace_row(prompter, 3)  # a pure function
    assert ids not in (trace_row(prompter, 3, seed=1)[0], trace_row(prompter, 4)[0])


def test_traces_survive_the_tokenizer(prompter):
    """Every trace decodes to itself, has no unknown token, and its numbers up to 99 are single tokens."""
    for index in range(200):
        ids, _ = trace_row(prompter, index)
        text = prompter.decode(ids[:-1])
        assert (
            prompter.encode(text) == ids[:-1] and prompter.tokenizer.token_to_id("<unk>") not in ids
        )
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
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines),
        "utf-8",
    )
    return str(path)


def rows_of(path: str, prompter, **flags) -> tuple[list, str]:
    """The rows of a file, and what was said."""
    said = []
    run = SimpleNamespace(cfg=sft.Config(data=path, **flags), say=said.append)
    return sft.file_rows(run, prompter, END), "\n".join(said)


def test_file_rows(prompter, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    [(ids, mask)], _ = rows_of(path, prompter)
    assert prompter.decode(ids) == "1+1=2<eos>" and mask == [0, 0, 0, 0, 1, 1]
    assert rows_of(path, prompter, loss_on="all")[0][0][1] == [1] * 6


def test_long_rows_are_dropped_and_counted(prompter, tmp_path):
    lines = [{"prompt": "1=", "completion": "x" * n} for n in range(1, 9)]
    path = write(tmp_path / "a.jsonl", lines)
    rows, said = rows_of(path, prompter, max_length=6)
    assert [len(ids) for ids, _ in rows] == [4, 5, 6]
    assert "8 examples, 5 longer than 6 tokens; 3 are learnt" in said
    with pytest.raises(sft.BadInput, match="nothing is left to learn of 8 examples, 8 longer"):
        rows_of(path, prompter, max_length=3)


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "is empty"),
        ([{"prompt": "a"}], "line 1"),
        ([{"prompt": "a", "completion": "b"}, "not json\n"], "line 2"),
        ([{"prompt": "a", "completion": 3}], "line 1"),
        (["[1]\n"], "item 1"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "need --chat"),
    ],
)
def test_bad_files(prompter, tmp_path, lines, message):
    with pytest.raises(sft.BadInput, match=message):
        rows_of(write(tmp_path / "a.jsonl", lines), prompter)


@pytest.mark.parametrize("loss_on", ["thought", "answer"])
def test_thoughts_are_needed(prompter, tmp_path, loss_on):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(sft.BadInput, match=f"line 1: --loss_on {loss_on} needs a completion"):
        rows_of(path, prompter, loss_on=loss_on)


class Template:
    """A chat template with visible turns, each on a line of its own."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        text = "".join(f"[{m['role']}]{m['content']}[end]\n" for m in messages)
        return text + "[assistant]" * add_generation_prompt


class Rewriting(Template):
    """It drops the first turn of a longer chat."""

    def apply_chat_template(self, messages, **options):
        return super().apply_chat_template(messages[len(messages) > 2 :], **options)


ROLES = [("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
CHAT = [{"role": role, "content": content} for role, content in ROLES]


def test_chat_learns_every_assistant_turn_and_nothing_else():
    """The prompt of a reply is given, the reply and its end token are learnt, no newline behind."""

    def parts(template) -> list:
        decode = {7: "[other]", 8: "[end]"}.__getitem__
        given = SimpleNamespace(style="chat", chat=template, decode=lambda ids: decode(ids[0]))
        return sft.chat_parts(given, CHAT, [7, 8])

    assert [text for text, learnt in parts(Template()) if learnt] == ["a1[end]", "a2[end]"]
    whole = Template().apply_chat_template(CHAT, False, False)
    assert "".join(text for text, _ in parts(Template())) == whole.removesuffix("\n")
    with pytest.raises(sft.BadInput, match="rewrites earlier turns"):
        parts(Rewriting())


def test_an_epoch_is_every_line_in_a_new_order(prompter, folder, tmp_path, monkeypatch):
    """Of 5 lines in batches of 4: the first five rows are all, the next five in another order."""
    lines = [{"prompt": "1=", "completion": "x" * n} for n in range(1, 6)]
    seen = []

    def update_model(run, model, optimizer, rows, lr):
        seen.extend(len(ids) - 3 for ids, _ in rows)
        return {"tokens": 1}

    monkeypatch.setattr(sft, "update_model", update_model)
    flags = f"--model {folder} --data {write(tmp_path / 'a.jsonl', lines)} --steps 5 --batch_size 4"
    flags += f" --eval_problems 0 --out {tmp_path / 'run'}"
    assert sft.main(sft.train, sft.Config, flags.split()) == 0
    epochs = [tuple(seen[i : i + 5]) for i in range(0, 20, 5)]
    assert all(sorted(epoch) == [1, 2, 3, 4, 5] for epoch in epochs)
    assert len(set(epochs)) > 1


def test_a_new_model_starts_from_scratch_and_is_resumed(cwd):
    """As run.json says; two and two steps are four, by the weights."""
    flags = "--num_layers 1 --hidden_size 32 --batch_size 4 --eval_problems 0 --warmup_steps 10"

    def run(more):
        return sft.main(sft.train, sft.Config, [*flags.split(), *more.split()])

    assert run("--steps 2 --out a") == run("--steps 4 --out b") == 0
    assert json.loads(Path("a/run.json").read_text())["config"]["model"] == "scratch"
    assert sft.main(sft.train, sft.Config, "--resume a --steps 4".split()) == 0
    weights = [sft.load_file(f"{name}/step-000004/model.safetensors") for name in "ab"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_make_tiny_is_reproducible(folder, tmp_path):
    made = []
    for seed in (0, 1):
        path = tmp_path / str(seed)
        path.mkdir()
        sft.make_tiny(path, sft.Config(num_layers=1, hidden_size=32, seed=seed))
        made.append((path / "model.safetensors").read_bytes())
    assert made[0] == (folder / "model.safetensors").read_bytes() != made[1]


def test_the_schedule_moves_both_groups(folder, tmp_path, monkeypatch):
    """Norms too: the learning rate of every parameter is that of the step."""
    rates = []

    def step(optimizer):
        rates.append([group["lr"] for group in optimizer.param_groups])

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    flags = f"--model {folder} --steps 2 --batch_size 2 --eval_problems 0 --out {tmp_path / 'run'}"
    assert sft.main(sft.train, sft.Config, flags.split()) == 0
    assert rates == [[2e-3 / 50] * 2, [2 * 2e-3 / 50] * 2]
