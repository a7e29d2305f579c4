"""coconut.py's own functions: layouts, loss, logits and gradients of the reference, thoughts against recomputation."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import coconut  # noqa: E402

FOLDER = Path(os.environ.get("VECTORS") or Path(__file__).parent / "vectors")
VECTORS = json.loads((FOLDER / "latent.json").read_text(encoding="utf-8"))["coconut"]
TENSORS = load_file(FOLDER / "latent.safetensors")
VOCAB, IDS = VECTORS["vocab"], VECTORS["special"]
MARKERS = (IDS["start_latent"], IDS["latent"], IDS["end_latent"])
LLAMA = next(m for m in VECTORS["models"] if m["kind"] == "llama")
PLACE = MARKERS[1]


def words(text: str) -> list[int]:
    return [VOCAB[word] for word in text.split()]


def sample_pieces(sample: dict) -> tuple[list[int], list[list[int]], list[int]]:
    """Question, steps and answer of a sample as ids, cut as the reference does."""
    newline = [IDS["newline"]]
    steps = [words(step) + newline for step in sample["steps"]]
    return words(sample["question"]) + newline, steps, words("### " + sample["answer"]) + [IDS["eos"]]


def vector_row(sample: dict, mode: str, stage: int, c: int, max_stage: int, pad: bool) -> tuple[list[int], list[int]]:
    plan = coconut.stage_plan(mode, stage, len(sample["steps"]), c, max_stage, pad)
    return coconut.layout(*sample_pieces(sample), MARKERS if mode == "coconut" else None, *plan)


# ------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("case", VECTORS["layouts"], ids=lambda c: "{mode} {c} {stage} {pad_latent_to_max}".format(**c))
def test_layouts_equal_the_reference(case):
    """Ids, labels, positions and masks of every row, and the prompt of every evaluation."""
    key = (case["mode"], case["stage"], case["c"], case["max_latent_stage"], case["pad_latent_to_max"])
    assert len(VECTORS["samples"]) == len(case["train"]) == len(case["question_only"]) == 3
    for sample, row, asked in zip(VECTORS["samples"], case["train"], case["question_only"], strict=True):
        ids, mask = vector_row(sample, *key)
        assert ids == row["input_ids"]
        assert [i if learnt else -100 for i, learnt in zip(ids, mask, strict=True)] == row["labels"]
        assert row.get("attention_mask", [1] * len(ids)) == [1] * len(ids)  # nothing is hidden, and positions count on
        assert row.get("position_ids", list(range(len(ids)))) == list(range(len(ids)))
        _, thoughts = coconut.stage_plan(key[0], key[1], len(sample["steps"]), *key[2:], prompting=True)
        question, steps, answer = sample_pieces(sample)
        prompt, _ = coconut.layout(question, steps, [], MARKERS if key[0] == "coconut" else None, 99, thoughts)
        assert prompt == asked


def test_pause_has_the_layout_of_coconut():
    for stage in range(5):
        assert coconut.stage_plan("pause", stage, 3, 2, 3) == coconut.stage_plan("coconut", stage, 3, 2, 3)
        assert coconut.stage_plan("no_curriculum", 4, 3, 2, 3) == coconut.stage_plan("coconut", 4, 3, 2, 3)


# -------------------------------------------------------------------------- the model of the reference: same numbers


@pytest.fixture
def llama() -> "coconut.Model":
    config = {"model_type": "llama", "vocab_size": LLAMA["vocab"], "hidden_size": LLAMA["d_model"]}
    config |= {"num_attention_heads": LLAMA["n_heads"], "num_key_value_heads": LLAMA["n_kv_heads"]}
    config |= {"num_hidden_layers": LLAMA["n_layers"], "intermediate_size": LLAMA["intermediate"]}
    config |= {"rms_norm_eps": LLAMA["rms_norm_eps"], "rope_theta": LLAMA["rope_theta"], "tie_word_embeddings": True}
    model = coconut.Model(config | {"latent_token_id": PLACE})
    tensors = {name.removeprefix("llama."): t for name, t in TENSORS.items() if name.startswith("llama.model.")}
    missing, unknown = model.load_state_dict(tensors, strict=False)
    assert missing == ["lm_head.weight"] and not unknown
    model.eos_ids = [IDS["eos"]]
    return model


def batch_rows() -> list[tuple[list[int], list[int]]]:
    """The mixed batch of the vectors, with 4, 1, 3, 0 and 3 thoughts."""
    rows = []
    for about in VECTORS["batch_rows"]:
        sample = VECTORS["samples"][about["sample"]]
        rows.append(vector_row(sample, "coconut", about["stage"], about["c"], 3, about["pad_latent_to_max"]))
    return rows


def padded(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    cpu = torch.device("cpu")
    return coconut.pad_rows([r[0] for r in rows], cpu, torch.long), coconut.pad_rows(
        [r[1] for r in rows], cpu, torch.bool
    )


def test_batch_is_the_one_of_the_reference():
    """The reference pads on the left to align first thoughts; without the padding its rows are ours."""
    batch = VECTORS["batch"]
    for (ids, mask), theirs, seen, labels, positions in zip(
        batch_rows(), *(batch[n] for n in ("input_ids", "attention_mask", "labels", "position_ids")), strict=True
    ):
        real = [i for i, here in enumerate(seen) if here]
        assert [theirs[i] for i in real] == ids and [positions[i] for i in real] == list(range(len(ids)))
        assert [labels[i] for i in real] == [i if learnt else -100 for i, learnt in zip(ids, mask, strict=True)]
        assert all(labels[i] == -100 for i in range(len(seen)) if i not in real)
    assert sorted(ids.count(PLACE) for ids, _ in batch_rows()) == [0, 1, 3, 3, 4]


def test_logits_equal_the_reference(llama):
    tokens, _ = padded(batch_rows())
    logits = llama.logits(llama(tokens))
    for row, (ids, seen) in enumerate(zip(batch_rows(), VECTORS["batch"]["attention_mask"], strict=True)):
        theirs = TENSORS["llama.logits"][row][torch.tensor(seen).bool()]
        torch.testing.assert_close(logits[row, : len(ids[0])], theirs, atol=1e-4, rtol=0)
        first = ids[1].index(1)
        ours = logits[row, first - 1].tolist()
        assert ours == pytest.approx(LLAMA["logits_at_first_label_of_each_row"][row], abs=1e-4)


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_loss_and_gradient_norms_equal_the_reference(llama, splits):
    """Also when the batch is cut into micro-batches: the sum over all, divided by the tokens of all."""
    rows = batch_rows()
    num_tokens, total = sum(sum(mask) for _, mask in rows), 0.0
    for i in range(splits):
        logprobs, _ = coconut.completion_logprobs(llama, *padded(rows[i::splits]))
        loss = -logprobs.sum() / num_tokens
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(LLAMA["loss"], abs=1e-4)
    norms = {name: p.grad.norm().item() for name, p in llama.named_parameters() if name != "lm_head.weight"}
    assert norms.keys() == LLAMA["grad_norm"].keys()
    assert norms == pytest.approx(LLAMA["grad_norm"], rel=1e-3)


def test_pause_loss_equals_the_reference(llama):
    llama.config["latent_token_id"] = None
    logprobs, _ = coconut.completion_logprobs(llama, *padded(batch_rows()))
    num_tokens = sum(sum(mask) for _, mask in batch_rows())
    assert -logprobs.sum().item() / num_tokens == pytest.approx(LLAMA["pause_as_thought_loss_same_weights"], abs=1e-4)


def test_greedy_outputs_equal_the_reference(llama):
    """Both prompts in one batch, cached, with 2 and 4 thoughts."""
    cases = LLAMA["greedy"]
    done = coconut.generate(llama, [case["prompt"] for case in cases], torch.zeros(2, 8), temperature=0.0)
    for row, case in enumerate(cases):
        assert case["prompt"] + done.tokens[row, : done.lengths[row]].tolist() == case["output"]


def test_number_of_passes_is_that_of_the_reference(llama):
    calls, layer = [], llama.model.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[1]))
    tokens, _ = padded(batch_rows())
    llama(tokens)
    assert len(calls) == LLAMA["n_forward_passes"] == 5 and calls[1:4] == [1, 1, 1]


# --------------------------------------------------------------------------------- thoughts against recomputation


def naive(model: "coconut.Model", ids: list[int]) -> torch.Tensor:
    """Hidden states (T, C) of one row: a full pass without a cache for each thought, and one more."""
    embeddings = list(model.model.embed_tokens.weight[torch.tensor(ids)])
    for position in (i for i, token in enumerate(ids) if token == PLACE):
        embeddings[position] = model(torch.stack(embeddings)[None])[0, position - 1]
    return model(torch.stack(embeddings)[None])[0]


def random_rows(counts: list[int], seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Rows with questions of 2 to 14 tokens and these numbers of thoughts."""
    generator = torch.Generator().manual_seed(seed)

    def some(low: int, high: int) -> list[int]:
        n = int(torch.randint(low, high + 1, (1,), generator=generator))
        return torch.randint(3, 17, (n,), generator=generator).tolist()

    return [coconut.layout(some(2, 14), [some(1, 5)], some(1, 9), MARKERS, 0, n) for n in counts]


@pytest.mark.parametrize("counts", [[0, 1, 2, 3, 4, 5, 6], [6, 0], [1], [2, 2, 2], [0, 0], [6, 1, 0, 3]], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_batch_equals_naive_recomputation(llama, counts, seed):
    """Forward and gradient in float64: rows with unequal questions and 0 to 6 thoughts against one row at a time."""
    llama.double()
    rows = random_rows(counts, seed)
    tokens, mask = padded(rows)
    weights = torch.randn(*tokens.shape, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden = llama(tokens)
    total = 0.0
    for row, (ids, _) in enumerate(rows):
        alone = naive(llama, ids)
        torch.testing.assert_close(hidden[row, : len(ids)], alone, atol=1e-11, rtol=0)
        total = total + (alone * weights[row, : len(ids)]).sum()
    total.backward()
    expected = {name: p.grad.clone() for name, p in llama.named_parameters()}
    llama.zero_grad()
    inside = coconut.pad_rows([[1] * len(ids) for ids, _ in rows], tokens.device, torch.bool)
    (hidden * weights)[inside].sum().backward()
    for name, p in llama.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-10, rtol=1e-9, msg=name)
    llama.zero_grad()
    logprobs, _ = coconut.completion_logprobs(llama, tokens, mask)
    assert torch.isfinite(logprobs).all() and ((logprobs != 0) == mask[:, 1:]).all()


@pytest.mark.parametrize("counts", [[0, 1, 2, 3, 4, 5, 6], [3, 3], [6, 0]], ids=str)
def test_cached_generation_equals_recomputation(llama, counts):
    """Prompts of unequal lengths and thoughts, greedy, each token by a naive pass over everything before it."""
    llama.double()
    prompts = [ids[: ids.index(MARKERS[2]) + 1] for ids, _ in random_rows(counts)]
    with torch.no_grad():
        llama.model.norm.weight.mul_(3)  # logits far apart: no tie that rounding decides
    done = coconut.generate(llama, prompts, torch.zeros(len(prompts), 6), temperature=0.0)
    for row, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(6):
            if ids[-1] != IDS["eos"]:
                ids.append(int(llama.logits(naive(llama, ids)[-1]).argmax()))
        assert prompt + done.tokens[row, : done.lengths[row]].tolist() == ids


def test_padding_changes_nothing(llama):
    tokens, _ = padded(random_rows([3, 1]))
    wide = F.pad(tokens, (0, 5))
    torch.testing.assert_close(llama(wide)[:, : tokens.shape[1]], llama(tokens), atol=1e-5, rtol=0)


def test_the_place_itself_is_never_read(llama):
    """A thought replaces the embedding of its place; as a pause token the embedding counts."""
    tokens, mask = padded(random_rows([2, 3]))
    llama.model.embed_tokens.weight = torch.nn.Parameter(
        llama.model.embed_tokens.weight.detach().clone()
    )  # untied

    def loss() -> float:
        return coconut.completion_logprobs(llama, tokens, mask)[0].sum().item()

    for place, changes in ((PLACE, False), (None, True)):
        llama.config["latent_token_id"] = place
        before = loss()
        with torch.no_grad():
            llama.model.embed_tokens.weight[PLACE] += 1
        assert (loss() != before) == changes


def test_gradient_reaches_the_question_through_the_thoughts_alone(llama):
    """Behind the thoughts nothing sees the question, so that only the chain of thoughts is left to carry gradient."""
    llama.double()
    ids = [5, 6, 7, MARKERS[0], *[PLACE] * 3, MARKERS[2], 9]
    embeddings = llama.model.embed_tokens.weight.detach()[torch.tensor(ids)].requires_grad_()
    states = list(embeddings)
    for position in (4, 5, 6):
        states[position] = llama(torch.stack(states)[None])[0, position - 1]
    alone = llama(states[6][None, None])[0, 0]
    (gradient,) = torch.autograd.grad(alone.sum(), embeddings)
    assert (gradient[:4].norm(dim=1) > 1e-8).all() and (gradient[4:] == 0).all()
    # and in the script's own passes the gradient of the question differs from that with thoughts held fixed
    tokens, mask = torch.tensor([ids]), torch.tensor([[0] * 8 + [1]])
    coconut.completion_logprobs(llama, tokens, mask)[0].sum().backward()
    through = llama.model.layers[0].self_attn.q_proj.weight.grad.clone()
    llama.zero_grad()
    fixed = torch.stack([s.detach() if ids[i] == PLACE else s for i, s in enumerate(states)])
    F.cross_entropy(llama.logits(llama(fixed[None])[0, -2:-1]), tokens[0, -1:], reduction="sum").neg().backward()
    assert not torch.allclose(through, llama.model.layers[0].self_attn.q_proj.weight.grad, rtol=1e-3)


# --------------------------------------------------------------------------------------------------- the whole script


def run_of(cfg_flags: str, folder: Path) -> "coconut.Config":
    return coconut.parse_config(coconut.Config, f"--device cpu --out {folder} {cfg_flags}".split())


def prompter_of(
    folder: Path, flags: str = "", task: str = "affine"
) -> tuple["coconut.Model", "coconut.ThoughtPrompter"]:
    cfg = run_of(f"--max_stage 3 --task {task} {flags}", folder)
    source = folder / "new"
    if cfg.model == "scratch":
        coconut.make_scratch(cfg, source)
    else:
        source = coconut.resolve_model(cfg.model)
    coconut.add_markers(source, folder, cfg.mode)
    model = coconut.load_model(folder)
    return model, coconut.ThoughtPrompter(model, coconut.make_task(task), cfg)


@pytest.mark.parametrize("mode", ["coconut", "cot", "no_cot", "no_thoughts", "pause", "no_curriculum"])
def test_rows_and_prompts_of_every_mode(tmp_path, mode):
    """A prompt is the start of the row of the same stage; token counts follow the paper."""
    model, prompter = prompter_of(tmp_path, f"--mode {mode}")
    problem, steps = {"start": 3, "operations": ["+2", "*4", "+6"]}, ["3+2=5\n", "5*4=6\n", "6+6=5\n"]
    marked, place = mode in ("coconut", "pause", "no_curriculum"), prompter.markers[1]
    assert model.config["latent_token_id"] == (place if mode in ("coconut", "no_curriculum") else None)
    for stage in range(5):
        prompter.stage = stage
        ids, mask = prompter.row(problem, stage)
        prompt = prompter.encode(prompter.text(problem))
        assert ids[: len(prompt)] == prompt and mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
        left = {"cot": 0, "no_cot": 3}.get(mode, min(stage, 3))
        assert prompter.decode(ids[len(prompt) :]) == "".join(steps[left:]) + "5<eos>"
        thoughts = min(stage, 3) * marked
        assert prompter.decode(prompt) == "3+2*4+6\n" + ("<bot>" + "<latent>" * thoughts + "<eot>") * marked
        counted = 0 if mode == "pause" else thoughts
        assert prompter.task.describe("5", problem) == {"stage": stage, "thoughts": counted}


def test_generated_tokens_by_hand(monkeypatch):
    """Three thoughts; one answer is a token and the end, another two tokens without an end."""
    logged = []
    monkeypatch.setattr(coconut, "plain_log", lambda run, *args: logged.append(args))
    evaluation = {"eval/thoughts": 3.0, "eval/completion_length": 2.0, "eval/clipped_ratio": 0.5}
    coconut.log_tokens(None, 7, evaluation, ("eval/accuracy",))
    coconut.log_tokens(None, 8, {"loss": 1.0})
    assert logged[0][0] == 7 and logged[0][2] == ("eval/accuracy",)
    assert logged[0][1]["eval/generated_tokens"] == ((3 + 1) + (3 + 2)) / 2
    assert logged[1][1] == {"loss": 1.0}


def test_new_tokens_start_like_an_existing_one(tmp_path, small):
    """A vocabulary without markers grows by three rows, equal to that of "<<"; the folder opens elsewhere."""
    other = tmp_path / "other"
    other.mkdir()
    for path in small.iterdir():
        text = path.read_bytes() if path.suffix != ".json" else path.read_text(encoding="utf-8")
        if path.name == "tokenizer.json":
            for word in ("bot", "latent", "eot"):
                text = text.replace(f"<{word}>", f"<other_{word}>")
        (other / path.name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "made").mkdir()
    model, prompter = prompter_of(tmp_path / "made", f"--model {other}", "prosqa")
    before = coconut.load_model(other).model.embed_tokens.weight
    after = model.model.embed_tokens.weight
    like = prompter.encode("<<")[0]
    assert after.shape[0] == before.shape[0] + 3 and torch.equal(after[: len(before)], before)
    assert prompter.markers == tuple(range(len(before), len(before) + 3))
    assert all(torch.equal(after[i], before[like]) for i in prompter.markers)
    assert prompter.names == coconut.MARKERS and model.config["latent_token_id"] == prompter.markers[1]
    prompter.stage = 2
    ids, _ = prompter.row(prompter.task.problem("train", 0, 0), 2)
    assert ids.count(prompter.markers[1]) == 2 and "### " in prompter.decode(ids)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "made")("<|latent|>")["input_ids"] == [prompter.markers[1]]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "made").float()
    plain = torch.tensor([prompter.encode("Every cat is a dog.")])
    torch.testing.assert_close(
        model.logits(model(plain)).nan_to_num(neginf=0)[..., 44:], theirs(plain).logits[..., 44:]
    )


@pytest.fixture
def experiments():
    """docs/experiments/coconut.py, which has the name of the script."""
    path = Path(coconut.__file__).parent / "docs" / "experiments" / "coconut.py"
    spec = importlib.util.spec_from_file_location("coconut_experiments", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_probe_by_hand(tmp_path, experiments):
    """Thoughts that are the head's rows of the results themselves decode to them."""
    model, prompter = prompter_of(tmp_path)
    prompter.stage = 3
    problems = [prompter.task.problem("test", 0, i) for i in range(20)]
    results = [[int(step[-1]) for step in prompter.task.steps(p)] for p in problems]
    digits = torch.tensor([prompter.encode(str(d))[0] for d in range(7)])
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[digits, digits - digits[0]] = 50.0

    def forward(tokens):
        hidden = torch.zeros(*tokens.shape, model.config["hidden_size"])
        at = (tokens == prompter.markers[1]).int().argmax(1)
        for row, values in enumerate(results):
            for i in range(3):  # thought 1 holds result 1, thoughts 2 and 3 both hold result 2
                hidden[row, at[row] - 1 + i, values[min(i, 1)]] = 1.0
        return hidden

    model.forward = forward
    probs, first = experiments.probe(model, prompter, problems)
    assert probs.shape == first.shape == (3, 3)
    torch.testing.assert_close(probs, first)
    assert first[0, 0] == first[1, 1] == first[2, 1] == 1.0
    same = sum(r[0] == r[2] for r in results) / 20
    assert first[0, 2] == pytest.approx(same)


def test_stages_follow_the_clock_and_the_gate(run, cwd):
    """One step a stage by the clock; a gate of almost 0 would need GATE_STEPS steps."""
    from conftest import lines_of

    assert run("coconut", "--mode coconut --uniform_prob 0 --stage_steps 1 --steps 5 --out a").code == 0
    rows = [row for row in lines_of(cwd / "a" / "metrics.jsonl") if "loss" in row]
    assert [row["stage"] for row in rows] == [0, 1, 2, 3, 4]
    evaluations = [row for row in lines_of(cwd / "a" / "metrics.jsonl") if "eval/stage" in row]
    assert [(row["step"], row["eval/stage"], row["eval/thoughts"]) for row in evaluations] == [
        (1, 0, 0), (2, 1, 1), (3, 2, 2), (4, 3, 3), (5, 4, 3), (0, 4, 3),
    ]  # fmt: skip
    assert rows[0]["tokens"] > rows[3]["tokens"] == rows[4]["tokens"]


def test_mixed_batches_are_of_any_stage(run, cwd):
    from conftest import lines_of

    assert run("coconut", "--mode pause --uniform_prob 1 --steps 30 --eval_problems 0 --out a").code == 0
    assert {row["stage"] for row in lines_of(cwd / "a" / "metrics.jsonl")} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("mode", ["cot", "no_cot", "no_thoughts", "pause"])
def test_controls_run_and_go_on(run, cwd, mode):
    assert run("coconut", f"--mode {mode} --out a").code == 0
    done = run("coconut", "--resume a --steps 3", base=False)
    assert done.code == 0, done.err


def test_tables_of_a_run(run, cwd, experiments, capfd):
    """What the tool prints of a run is what its log says; a run without thoughts has no probe."""
    flags = "--mode coconut --uniform_prob 0 --stage_steps 1 --steps 4 --out a"
    assert run("coconut", flags).code == 0
    assert run("coconut", "--mode no_cot --out b").code == 0
    assert experiments.main(["a"]) == experiments.main(["b"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines[:5]] == [
        "step 1: stage 0", "step 2: stage 1", "step 3: stage 2", "step 4: stage 3",
        "step 4: stage 4",
    ]  # fmt: skip
    probe = [line.split() for line in lines[5:8]]
    assert [row[:2] for row in probe] == [["thought", "1"], ["thought", "2"], ["thought", "3"]]
    assert all(0 <= float(row[2]) <= 1 and len(row) == 8 for row in probe)
    assert lines[8].startswith("step 2: stage 4") and lines[9].startswith("no thoughts")


def test_a_file_by_epochs(run, cwd):
    """Eight rows a step: two epochs of 24 rows or so are the stage."""
    chains = [
        {"question": f"{i}+1", "steps": [f"{i}+1={i + 1}"] * (1 + i % 3), "answer": str(i + 1)} for i in range(30)
    ]
    (cwd / "data.json").write_text(json.dumps(chains), encoding="utf-8")
    flags = "--mode coconut --data data.json --epochs_per_stage 2 --gate 0 --uniform_prob 0 --c 2 --steps 9 --out a"
    done = run("coconut", flags)
    assert done.code == 0, done.err
    about = json.loads((cwd / "a" / "run.json").read_text(encoding="utf-8"))
    assert about["config"]["max_stage"] == 3 and 6 <= about["config"]["stage_steps"] <= 8


@pytest.mark.skipif(
    not os.environ.get("SMOLLM2"), reason="SMOLLM2 names no folder; python tests/smollm2.py DIR makes it"
)
def test_a_real_model_thinks(tmp_path):
    """SmolLM2-135M with three new tokens: a ProsQA row with thoughts equals recomputation; one step trains it."""
    model, prompter = prompter_of(tmp_path, f"--model {os.environ['SMOLLM2']} --c 2", "prosqa")
    assert prompter.names == coconut.MARKERS and prompter.markers == (49152, 49153, 49154)
    rows = [prompter.row(prompter.task.problem("train", 0, 0), 1)]
    tokens, mask = padded(rows)
    assert [ids.count(49153) for ids, _ in rows] == [2]
    with torch.no_grad():
        hidden = model(tokens)
        for row, (ids, _) in enumerate(rows):
            embeddings = list(model.model.embed_tokens.weight[torch.tensor(ids)])
            for position in (i for i, token in enumerate(ids) if token == 49153):
                embeddings[position] = model(torch.stack(embeddings)[None])[0, position - 1]
            alone = model(torch.stack(embeddings)[None])[0]
            torch.testing.assert_close(hidden[row, : len(ids)], alone, atol=2e-3, rtol=1e-3)
    logprobs, _ = coconut.completion_logprobs(model, tokens, mask)
    (-logprobs.sum() / mask.sum()).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert 0 < float(norm) < float("inf")
