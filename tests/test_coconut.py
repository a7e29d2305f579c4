"""coconut.py: the reference's numbers (vectors/latent.json), thoughts recomputed, its runs."""

import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import VECTORS, FakeRun, lines_of, vectors
from safetensors.torch import load_file
from test_vectors import cases

import coconut

CASES = vectors("latent")["coconut"]
IDS = CASES["special"]
MARKERS = IDS["start_latent"], IDS["latent"], IDS["end_latent"]
ABOUT = next(model for model in CASES["models"] if model["kind"] == "llama")
TENSORS = load_file(VECTORS / "latent.safetensors")


def words(text: str) -> list[int]:
    return [CASES["vocab"][word] for word in text.split()]


def layout_of(sample: dict, key: tuple, answered: bool = True) -> tuple[list[int], list[int]]:
    """A row, or a prompt, of (mode, stage, c, max_stage, pad), cut into ids as there."""
    mode, stage, newline = key[0], key[1], [IDS["newline"]]
    markers = MARKERS if mode == "coconut" else None
    question, steps = words(sample["question"]) + newline, sample["steps"]
    answer = words("### " + sample["answer"]) + [IDS["eos"]]
    skipped, thoughts = coconut.stage_plan(mode, stage, len(steps), *key[2:], not answered)
    if not answered:
        return coconut.layout(question, [], [], markers, 0, thoughts)
    steps = [words(step) + newline for step in steps]
    return coconut.layout(question, steps, answer, markers, skipped, thoughts)


@cases("latent", "coconut", "layouts")
def test_eq2_layouts_equal_the_reference(case):
    """Ids, labels, positions and masks of every row, and the prompt of every evaluation."""
    names = "mode", "stage", "c", "max_latent_stage", "pad_latent_to_max"
    key, rows = tuple(case[name] for name in names), (case["train"], case["question_only"])
    for sample, row, asked in zip(CASES["samples"], *rows, strict=True):
        ids, mask = layout_of(sample, key)
        labels = [i if learnt else -100 for i, learnt in zip(ids, mask, strict=True)]
        assert (ids, labels) == (row["input_ids"], row["labels"])
        assert layout_of(sample, key, answered=False)[0] == asked


@pytest.fixture
def llama() -> "coconut.Model":
    names = {"vocab_size": "vocab", "hidden_size": "d_model", "num_attention_heads": "n_heads"}
    names |= {"num_key_value_heads": "n_kv_heads", "num_hidden_layers": "n_layers"}
    names |= {"intermediate_size": "intermediate", "rms_norm_eps": "rms_norm_eps"}
    config = {ours: ABOUT[theirs] for ours, theirs in names.items()}
    config |= {"model_type": "llama", "rope_theta": ABOUT["rope_theta"]}
    model = coconut.Model(config | {"tie_word_embeddings": True, "latent_token_id": IDS["latent"]})
    weights = {n.removeprefix("llama."): t for n, t in TENSORS.items() if "llama.model." in n}
    missing, unknown = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unknown
    model.eos_ids = [IDS["eos"]]
    return model


def batch_rows() -> list[tuple[list[int], list[int]]]:
    """The mixed batch of the vectors, with 4, 1, 3, 0 and 3 thoughts."""
    found = []
    for row in CASES["batch_rows"]:
        key = "coconut", row["stage"], row["c"], 3, row["pad_latent_to_max"]
        found.append(layout_of(CASES["samples"][row["sample"]], key))
    return found


def padded(rows: list) -> tuple[torch.Tensor, torch.Tensor]:
    cpu, (ids, masks) = torch.device("cpu"), zip(*rows, strict=True)
    return coconut.pad_rows(ids, cpu, torch.long), coconut.pad_rows(masks, cpu, torch.bool)


def test_eq1_logits_and_number_of_passes_equal_the_reference(llama):
    """It pads on the left to align first thoughts."""
    passes = []
    llama.model.layers[0].register_forward_hook(lambda *args: passes.append(args[2].shape[1]))
    logits = llama.logits(llama(padded(batch_rows())[0]))
    for row, seen in enumerate(CASES["batch"]["attention_mask"]):
        theirs = TENSORS["llama.logits"][row][torch.tensor(seen).bool()]
        torch.testing.assert_close(logits[row, : len(theirs)], theirs, atol=1e-4, rtol=0)
    assert len(passes) == ABOUT["n_forward_passes"] == 5 and passes[1:4] == [1, 1, 1]


def test_eq3_loss_and_gradient_norms_equal_the_reference(llama):
    """In micro-batches too: the sum over all, divided by the tokens of all."""
    rows, weights = batch_rows(), dict(llama.named_parameters())
    for limit in (10**6, 64):
        run = FakeRun(coconut.Config(micro_batch_tokens=limit))
        loss = coconut.descend(run, llama, None, rows)["loss"]
        assert loss == pytest.approx(ABOUT["loss"], abs=1e-4)
        parts = run.gradients[0].split([weight.numel() for weight in weights.values()])
        norms = {name: part.norm().item() for name, part in zip(weights, parts, strict=True)}
        assert norms == pytest.approx(ABOUT["grad_norm"], rel=1e-3)
    llama.config["latent_token_id"] = None  # a pause: a token like others
    loss = coconut.descend(run, llama, None, rows)["loss"]
    assert loss == pytest.approx(ABOUT["pause_as_thought_loss_same_weights"], abs=1e-4)


def test_eq1_greedy_outputs_equal_the_reference(llama):
    """Both prompts in one batch, cached, with 2 and 4 thoughts."""
    prompts = [case["prompt"] for case in ABOUT["greedy"]]
    done = coconut.generate(llama, prompts, torch.zeros(2, 8), temperature=0.0)
    for row, case in enumerate(ABOUT["greedy"]):
        written = done.tokens[row, : done.lengths[row]].tolist()
        assert case["prompt"] + written == case["output"]


def naive(model: "coconut.Model", ids: list[int]) -> torch.Tensor:
    """Hidden states (T, C) of a row: a full pass without a cache for each thought, and one more."""
    embeddings = list(model.model.embed_tokens.weight[torch.tensor(ids)])
    for i, token in enumerate(ids):
        if token == model.config["latent_token_id"]:
            embeddings[i] = model(torch.stack(embeddings)[None])[0, i - 1]
    return model(torch.stack(embeddings)[None])[0]


@pytest.mark.parametrize("counts", [[0, 1, 2, 3, 4, 5, 6], [6, 0], [1], [0, 0], [6, 1, 0, 3]])
def test_eq1_batch_equals_naive_recomputation(llama, counts):
    """Hidden states and gradients in float64, one row at a time; numbers of thoughts."""
    llama.double()
    rows, rng = [], coconut.Random(str(counts))
    for count in counts:
        asked, step, answer = (rng.choices(range(3, 17), k=rng.randint(1, 14)) for _ in range(3))
        rows.append(coconut.layout(asked, [step], answer, MARKERS, 0, count))
    tokens, _ = padded(rows)
    inside, _ = padded([([1] * len(ids), mask) for ids, mask in rows])
    hidden = llama(tokens)[inside.bool()]
    alone = torch.cat([naive(llama, ids) for ids, _ in rows])
    torch.testing.assert_close(hidden, alone, atol=1e-11, rtol=0)
    weights = torch.arange(hidden.numel()).double().sin().view_as(hidden)
    wanted = list(llama.model.parameters())
    found, expected = (torch.autograd.grad((x * weights).sum(), wanted) for x in (hidden, alone))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-9)


def prompter_of(folder, flags: str = "", task: str = "affine") -> tuple:
    """A model with markers in `folder`, and its prompter."""
    flags = f"--max_stage 3 --task {task} {flags}"
    cfg = coconut.parse_config(coconut.Config, flags.split())
    source = Path(cfg.model)
    if cfg.model == "scratch":
        source = folder / "new"
        coconut.make_scratch(cfg, source)
    coconut.add_markers(source, folder, cfg.mode)
    model = coconut.load_model(folder)
    return model, coconut.ThoughtPrompter(model, coconut.make_task(task), cfg)


@pytest.mark.parametrize("mode", coconut.get_args(coconut.Config.__annotations__["mode"]))
def test_eq2_rows_and_prompts_of_every_mode(tmp_path, mode):
    """A prompt is the start of the row of the same stage; token counts follow the paper."""
    model, prompter = prompter_of(tmp_path, f"--mode {mode}")
    assert prompter.stage == (4 if mode in ("no_cot", "no_curriculum") else 0)
    problem = {"start": 3, "operations": ["+2", "*4", "+6"]}
    steps = ["3+2=5\n", "5*4=6\n", "6+6=5\n"]
    assert coconut.stage_plan("coconut", 3, 5, 2, 3) == (3, 6)  # the last stage but one
    marked, place = mode in ("coconut", "pause", "no_curriculum"), prompter.markers[1]
    thinks = mode in ("coconut", "no_curriculum")
    assert model.config["latent_token_id"] == (place if thinks else None)
    for stage in range(5):
        prompter.stage = stage
        ids, mask = prompter.row(problem, stage)
        prompt = prompter.encode(prompter.text(problem))
        assert ids[: len(prompt)] == prompt
        assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
        left = {"cot": 0, "no_cot": 3}.get(mode, min(stage, 3))
        assert prompter.decode(ids[len(prompt) :]) == "".join(steps[left:]) + "5<eos>"
        thoughts = min(stage, 3) * marked
        markers = ("<bot>" + "<latent>" * thoughts + "<eot>") * marked
        assert prompter.decode(prompt) == "3+2*4+6\n" + markers
        counted = {"stage": stage, "thoughts": 0 if mode == "pause" else thoughts}
        assert prompter.task.describe("5", problem) == counted


def test_new_tokens_start_like_an_existing_one(tmp_path, small):
    """A vocabulary without markers grows by rows equal to that of "<<"."""
    other, made = Path(shutil.copytree(small, tmp_path / "other")), tmp_path / "made"
    made.mkdir()
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    text = text.replace("<bot>", "<a>").replace("<latent>", "<b>").replace("<eot>", "<c>")
    (other / "tokenizer.json").write_text(text, encoding="utf-8")
    model, prompter = prompter_of(made, f"--model {other}", "prosqa")
    before = coconut.load_model(other).model.embed_tokens.weight
    after, size = model.model.embed_tokens.weight, len(before)
    assert prompter.markers == (size, size + 1, size + 2) and prompter.names == coconut.MARKERS
    like = before[prompter.encode("<<")[:1]]
    assert torch.equal(after, torch.cat([before, like, like, like]))
    assert model.config["latent_token_id"] == size + 1
    ids, _ = prompter.row(prompter.task.problem("train", 0, 0), 2)
    assert ids.count(size + 1) == 2 and "### " in prompter.decode(ids)


def test_stages_follow_the_clock(run, cwd):
    """One step a stage."""
    assert coconut.next_stage(1, [1.0] * 19, 30, 0.9, 900) == 1  # 20 are needed to judge
    assert coconut.next_stage(1, [0.9] * 20, 30, 0.9, 900) == 2
    flags = "--mode coconut --uniform_prob 0 --stage_steps 1 --steps 6 --out a"
    assert run("coconut", flags).code == 0
    rows = lines_of(cwd / "a" / "metrics.jsonl")
    trained = [row for row in rows if "loss" in row]
    assert [row["stage"] for row in trained] == [0, 1, 2, 3, 4, 5]
    names = "step", "eval/stage", "eval/thoughts"
    found = [tuple(row[name] for name in names) for row in rows if "eval/stage" in row]
    assert found == [(1, 0, 0), (2, 1, 1), (3, 2, 2), (4, 3, 3), (5, 4, 4), (6, 5, 4), (0, 5, 4)]
    assert trained[0]["tokens"] > trained[4]["tokens"] == trained[5]["tokens"]


def test_a_slow_rank_still_finds_the_start(run_ranks, monkeypatch):
    """The marked model lies in a temporary folder of rank 0, which may not leave first."""
    real = coconut.Run.report

    def late(self, *args):
        time.sleep(0.5 * self.rank)
        return real(self, *args)

    monkeypatch.setattr(coconut.Run, "report", late)
    codes, _ = run_ranks("coconut", 2, "--out two --eval_problems 0")
    assert codes == [0, 0]
