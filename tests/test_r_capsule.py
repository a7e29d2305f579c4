"""more/r_capsule.py: capsules recomputed without a cache, both losses, what is saved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FakeRun
from safetensors.torch import load_file
from torch import nn

import sft
from more import r_capsule
from rewards import make_task

LINES = [["c", "b"], ["d", "1"], ["a", "3"], ["b", "a"], ["e", "a"]]
PROBLEM = {"lines": LINES, "asked": "c"}


def made(folder: Path, flags: str = "", source: str = "scratch") -> tuple:
    """(config, model, prompter) of a start, with biases that are not 0."""
    flags = f"--num_layers 2 --hidden_size 32 --lr 1e-3 --micro_batch_tokens 64 {flags}"
    cfg = r_capsule.parse_config(r_capsule.Config, flags.split())
    folder.mkdir(exist_ok=True)
    start = Path(source)
    if source == "scratch":
        start = folder / "new"
        r_capsule.make_scratch(cfg, start)
    if r_capsule.has_slots(cfg):
        r_capsule.add_capsule(start, folder / "marked", cfg)
        start = folder / "marked"
    model = r_capsule.load_model(start)
    if r_capsule.has_slots(cfg):
        cfg.bottleneck = model.config["capsule_size"]
        nn.init.normal_(model.capsule.project.bias)
        nn.init.normal_(model.capsule.widen.bias)
    return cfg, model, r_capsule.CapsulePrompter(model, make_task(cfg.task), cfg)


def rows_of(prompter) -> list[tuple]:
    """Of problems of unequal lengths."""
    return [prompter.row(prompter.task.problem("train", 0, i)) for i in range(12)]


def recomputed(model, ids: list[int], given=None) -> tuple:
    """Of a row: states (T, C), capsules (K, d), a full pass for each slot; or with `given` ones."""
    inputs = list(model.model.embed_tokens.weight[torch.tensor(ids)])
    places = [i for i, token in enumerate(ids) if token == model.config["latent_token_id"]]
    capsules = []
    for k, place in enumerate(places):
        if given is None:
            hidden = r_capsule.plain_forward(model, torch.stack(inputs)[None])[0, place - 1]
            weights = model.capsule.project.weight, model.capsule.project.bias
            capsules.append(weights[0] @ hidden + weights[1])
        else:
            capsules.append(given[k])
        inputs[place] = model.capsule.widen.weight @ capsules[-1] + model.capsule.widen.bias
    return r_capsule.plain_forward(model, torch.stack(inputs)[None])[0], torch.stack(capsules)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_eq1_a_batch_equals_rows_recomputed(tmp_path, k):
    """States, capsules and gradients, in float64; K + 2 passes; one pass with the capsules given."""
    _, model, prompter = made(tmp_path, f"--k {k}")
    model.double()
    rows = rows_of(prompter)
    tokens = r_capsule.pad_rows([row[0] for row in rows], torch.device("cpu"), torch.long)
    passes = []
    layer = model.model.layers[0]
    hook = layer.register_forward_hook(lambda *args: passes.append(args[2].shape[1]))
    hidden, capsules = r_capsule.capsule_forward(model, tokens)
    hook.remove()
    assert passes[1:-1] == [1] * k
    assert len({row[0].index(model.config["latent_token_id"]) for row in rows}) > 1
    found = torch.cat([x[: len(row[0])] for x, row in zip(hidden, rows, strict=True)])
    alone = [recomputed(model, row[0]) for row in rows]
    wanted = torch.cat([states for states, _ in alone])
    once = [recomputed(model, row[0], c)[0] for row, c in zip(rows, capsules, strict=True)]
    for ours, theirs in ((found, wanted), (torch.cat(once), found)):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)
    torch.testing.assert_close(capsules, torch.stack([c for _, c in alone]), atol=1e-11, rtol=0)
    weights = torch.arange(found.numel()).double().sin().view_as(found)
    trained = [*model.model.parameters(), *model.capsule.parameters()]
    ours, theirs = (torch.autograd.grad((x * weights).sum(), trained) for x in (found, wanted))
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_eq1_sampling_through_the_cache(tmp_path):
    """Prompts decoded together are continued as each alone without a cache."""
    _, model, prompter = made(tmp_path)
    texts = [prompter.text(prompter.task.problem("test", 0, i)) for i in range(6)]
    prompts = [prompter.encode(text) for text in texts]
    done = r_capsule.generate(model, prompts, torch.zeros(6, 5), temperature=0.0)
    rows = done.tokens.tolist(), done.lengths.tolist()
    for ids, tokens, length in zip(prompts, *rows, strict=True):
        for token in tokens[:length]:
            states, _ = recomputed(model, ids)
            assert model.logits(states[-1]).argmax() == token
            ids = [*ids, token]


def test_eq2_by_hand():
    """-log p of two tokens over 4, lambda times that of a plan's token over 5."""
    logs = torch.tensor([[0.5, 1.0], [0.25, 1.0]]).log(), torch.tensor([[0.1]]).log()
    terms = r_capsule.capsule_loss(*logs, (4, 5), 2.0)
    assert [term.item() for term in terms] == pytest.approx([0.51986, 0.92103], abs=1e-5)


def gradient_of(cfg, parts, prompter) -> tuple[dict, torch.Tensor]:
    run, optimizer = FakeRun(cfg), r_capsule.make_optimizer(cfg, parts)
    return r_capsule.update_parts(run, parts, optimizer, rows_of(prompter), 1e-3), run.gradients[0]


def test_without_capsules_the_loss_is_that_of_sft(tmp_path):
    """--k 0, in several micro-batches."""
    cfg, model, prompter = made(tmp_path, "--k 0 --recon 0")
    metrics, gradient = gradient_of(cfg, nn.ModuleDict({"model": model}), prompter)
    rows = [row[:2] for row in rows_of(prompter)]
    num_tokens = sum(sum(mask) for _, mask in rows)
    parts = sft.add_gradients(FakeRun(cfg), model, rows, num_tokens)
    assert metrics["loss"] == pytest.approx(sum(loss.item() for loss, _ in parts), abs=1e-6)
    theirs = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    torch.testing.assert_close(gradient, theirs, atol=1e-6, rtol=0)
    assert metrics["tokens"] == num_tokens and "plan_accuracy" not in metrics


def test_both_losses_reach_the_bottleneck(tmp_path):
    """W_p has a gradient from the first term of eq. 2, and lambda times one from the second."""
    found = []
    for recon in (0, 1, 3):
        cfg, model, prompter = made(tmp_path / str(recon), f"--recon {recon}")
        decoder = r_capsule.PlanDecoder(model.config, cfg.bottleneck, 0)
        parts = nn.ModuleDict({"model": model, "decoder": decoder})
        metrics, gradient = gradient_of(cfg, parts, prompter)
        shares = gradient.split([weight.numel() for weight in parts.parameters()])
        names = [name for name, _ in parts.named_parameters()]
        found.append((shares[names.index("model.capsule.project.weight")], metrics))
    (none, _), (once, one), (thrice, three) = found
    assert none.abs().max() > 1e-4 and (once - none).abs().max() > 1e-4
    torch.testing.assert_close(thrice - none, 3 * (once - none), atol=1e-5, rtol=1e-3)
    assert three["recon_loss"] == pytest.approx(3 * one["recon_loss"], rel=1e-5)


def test_the_decoder_is_one_layer_over_capsules_and_plan(tmp_path):
    """As a model of one layer that reads both as embeddings."""
    cfg, model, _ = made(tmp_path)
    one, decoder = r_capsule.Model(model.config), r_capsule.PlanDecoder(model.config, 16, 0)
    one.model.layers = one.model.layers[:1]
    one.model.layers[0].load_state_dict(decoder.layer.state_dict())
    capsules, plan = torch.randn(3, 2, 16), torch.randn(3, 4, 32)
    states = one(torch.cat([decoder.widen(capsules), plan], 1))
    torch.testing.assert_close(decoder(capsules, plan), states[:, 1:])


WRITTEN = {"capsule": "3\n0\n3\n3", "steps": "3\n0\n3\n3", "answer": "3"}
WRITTEN["plan"] = "a b c\n3\n0\n3\n3"


@pytest.mark.parametrize("mode", WRITTEN)
def test_rows_of_every_mode(tmp_path, mode):
    _, _, prompter = made(tmp_path, f"--mode {mode}")
    ids, mask, plan = prompter.row(PROBLEM)
    slots = "<bot><latent><latent><eot>" if mode == "capsule" else ""
    given = prompter.text(PROBLEM)
    assert given == "cb;d1;a3;ba;ea?c\n" + slots
    assert prompter.decode(ids) == given + WRITTEN[mode] + "<eos>"
    assert prompter.decode(ids[mask.index(1) :]) == WRITTEN[mode] + "<eos>" and mask[-1] == 1
    assert prompter.decode(plan) == "a b c<eos>"


def test_what_is_saved(run, cwd, small):
    """Eq. 1 with the model, which transformers opens, too; the decoder only to go on with."""
    flags = "--bottleneck 8 --eval_problems 0"
    assert run("more.r_capsule", f"{flags} --out a").code == 0
    last = r_capsule.checkpoints(cwd / "a")[-1]
    names = set(load_file(last / "model.safetensors"))
    more = sorted(names - set(load_file(small / "model.safetensors")))
    maps = "project.bias", "project.weight", "widen.bias", "widen.weight"
    assert more == [f"capsule.{name}" for name in maps]
    config = json.loads((last / "config.json").read_text())
    assert config["capsule_size"] == 8 and config["latent_token_id"] == 10
    from transformers import AutoModelForCausalLM

    theirs, ours = AutoModelForCausalLM.from_pretrained(last), r_capsule.load_model(last)
    tokens = torch.tensor([[46, 47, 3]])
    torch.testing.assert_close(theirs(tokens).logits, ours.lm_head(ours(tokens)), atol=1e-4, rtol=0)
    assert run("more.r_capsule", "--bottleneck 4", model=last).code == 2
    assert run("more.r_capsule", f"{flags} --out b", model=last).code == 0


def test_markers_for_a_vocabulary_without_them(tmp_path, small):
    other = Path(shutil.copytree(small, tmp_path / "other"))
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    text = text.replace("<bot>", "<a>").replace("<latent>", "<b>").replace("<eot>", "<c>")
    (other / "tokenizer.json").write_text(text, encoding="utf-8")
    _, model, prompter = made(tmp_path / "made", f"--model {other} --k 3", str(other))
    ids, size = prompter.encode(prompter.text(PROBLEM)), 230
    assert ids[-5:] == [size, *[size + 1] * 3, size + 2]
    assert r_capsule.capsule_forward(model, torch.tensor([ids]))[1].shape == (1, 3, 16)
