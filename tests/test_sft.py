"""sft.py's own functions: loss and schedule against the reference's numbers, traces, masks, data files."""

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


def test_trace_row_masks_the_prompt_and_learns_the_end(prompter):
    ids, mask = sft.trace_row(prompter, 0, 3, "completion")
    given = prompter.encode(prompter.text(prompter.task.problem("train", 0, 3)))
    assert ids[: len(given)] == given and mask == [0] * len(given) + [1] * (len(ids) - len(given))
    assert ids[-1] == prompter.end[0] and prompter.decode(given).endswith("<think>")
    assert (ids, mask) == sft.trace_row(prompter, 0, 3, "completion")  # a pure function
    assert ids != sft.trace_row(prompter, 1, 3, "completion")[0]
    assert set(sft.trace_row(prompter, 0, 3, "all")[1]) == {1}


def test_traces_survive_the_tokenizer(prompter):
    """Every trace decodes to itself, has no unknown token, and its numbers up to 99 are single tokens."""
    for index in range(200):
        ids, _ = sft.trace_row(prompter, 0, index, "completion")
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


def test_file_rows(prompter, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    [(ids, mask)] = sft.file_rows(path, prompter, "completion")
    assert prompter.decode(ids) == "1+1=2<eos>" and mask == [0, 0, 0, 0, 1, 1]
    assert sft.file_rows(path, prompter, "all")[0][1] == [1] * 6


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "is empty"),
        ([{"prompt": "a"}], "line 1"),
        ([{"prompt": "a", "completion": "b"}, "not json\n"], "line 2"),
        ([{"prompt": "a", "completion": 3}], "line 1"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "need --chat"),
    ],
)
def test_bad_files(prompter, tmp_path, lines, message):
    with pytest.raises(sft.BadInput, match=message):
        sft.file_rows(write(tmp_path / "a.jsonl", lines), prompter, "completion")


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
