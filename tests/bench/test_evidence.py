"""The experiments with settings so small that only their arithmetic is tested, and the files that they leave."""

import copy
import functools
import json

import pytest
import torch
from peft_fused.bench.evidence import __main__ as command
from peft_fused.bench.evidence import files, pinwheel, psd, rosa, sst2
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from peft_fused.cli import demo_train
from peft_fused.cli.demo_train import Encoder, Settings
from peft_fused.ops import structured

WORDS = ["a", "film", "is", "good", "bad"]


def written(folder, name):
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((folder / f"{name}.json").read_text())
    assert found["seeds"] and found["versions"]["torch"] == torch.__version__
    return found


@pytest.fixture
def drawn():
    return psd.wishart(16, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", psd.FAMILIES)
def test_approximations_are_projections(family, drawn):
    """What is in the family is left alone, and the error is orthogonal to what was kept."""
    approximate = psd.FAMILIES[family][0]
    kept = approximate(drawn)
    torch.testing.assert_close(approximate(kept), kept)
    assert ((drawn - kept) * kept).sum().abs() < 1e-10 * drawn.square().sum()
    assert (drawn - kept).norm() < drawn.norm()


def test_approximations_are_in_their_families(drawn):
    assert torch.linalg.matrix_rank(psd.low_rank(drawn)) == 1
    col = psd.toeplitz(drawn)[:, 0]
    eye = torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(structured.toeplitz_matmul(eye, col, col).T, psd.toeplitz(drawn))
    torch.testing.assert_close(structured.circulant_matmul(eye, psd.circulant(drawn)[:, 0]).T, psd.circulant(drawn))
    A, B = torch.randn(2, 4, 4, dtype=torch.float64)
    product = structured.kronecker_matmul(eye, A, B).T
    torch.testing.assert_close(psd.kronecker(product), product)


@pytest.mark.parametrize("draw", psd.ENSEMBLES.values(), ids=psd.ENSEMBLES)
def test_ensembles_are_positive_semidefinite(draw):
    M = draw(36, torch.Generator().manual_seed(0))
    torch.testing.assert_close(M, M.T)
    assert torch.linalg.eigvalsh(M).min() > -1e-10 * M.norm()


def test_psd(tmp_path):
    result = psd.run(tmp_path, n=64, trials=3)
    found = written(tmp_path, "psd")
    shifted, wishart = (found["ensembles"][name] for name in ("shifted", "wishart"))
    assert shifted["worst_to_best"] == list(psd.FAMILIES) and shifted["trials_in_the_papers_order"] == 3
    assert wishart["worst_to_best"][0] == "low rank" and wishart["trials_in_the_papers_order"] == 0
    assert psd.report(result).count("\n") == 2


def test_pinwheel(tmp_path):
    result = pinwheel.run(tmp_path, width=16, steps=60, seeds=2)
    found = written(tmp_path, "pinwheel")["accuracy"]
    counts = {family: each["parameters_per_matrix"] for family, each in found.items()}
    assert counts == {"dense": 256, "circulant": 16, "Toeplitz": 31, "rank 1": 32}
    for each in found.values():
        assert len(each["accuracies"]) == 2 and min(each["accuracies"]) > 1.5 / pinwheel.ARMS
    assert "rank 1: 32 parameters" in pinwheel.report(result)


def test_pinwheel_points_are_balanced_and_repeat():
    x, y = pinwheel.pinwheel(30, torch.Generator().manual_seed(1))
    again, _ = pinwheel.pinwheel(30, torch.Generator().manual_seed(1))
    assert torch.equal(x, again) and x.shape == (150, 2) and y.bincount().tolist() == [30] * 5


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tsv(tmp_path):
    rows = "".join(f"the film is {w}\t{i}\n" for i, w in enumerate(("bad", "good"))) * 20
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\n" + rows)
    return tmp_path


def test_sst2(encoder, tsv, tmp_path):
    limits = dict(steps=2, sweep_steps=2, seeds=(1, 2), rates=(1e-3, 1e-2), rows=16)
    result = sst2.run(tmp_path / "out", tsv, model=str(encoder), **limits)
    found = written(tmp_path / "out", "sst2")
    methods = found["methods"]
    assert set(methods) == set(sst2.METHODS) and found["evaluated_rows"] == 16
    assert found["sweep_seed"] not in found["seeds"]
    # One layer of 32: query and value with 2 * 32 each; 3 * 32 on each of two outputs.
    counts = {method: each["adapter_parameters"] for method, each in methods.items()}
    assert counts["LoRA r=1"] == counts["circulant"] == counts["Toeplitz"] == 2 * 64
    assert counts["circulant adapter"] == 2 * 96
    assert sst2.MORE <= counts["bottleneck adapter"] / counts["circulant adapter"] < sst2.MORE + 1
    for each in methods.values():
        assert len(each["accuracies"]) == 2 and each["learning_rate"] in limits["rates"]
    assert sst2.report(result).count("learning rate") == 5


@pytest.mark.parametrize("method", sst2.METHODS)
def test_sst2_methods_start_as_the_model_that_they_adapt(encoder, method):
    settings = Settings(model=str(encoder))
    base, tokenizer = demo_train.load(settings, 2)
    batch = Encoder(tokenizer, settings)([("a good film", 1), ("bad", 0)])
    adapted = sst2.METHODS[method](copy.deepcopy(base)).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(**batch).logits, base.eval()(**batch).logits)
    head = [p for name, p in adapted.named_parameters() if p.requires_grad and "classifier" in name]
    assert sum(p.numel() for p in head) == 2 * 32 + 2, "the head is trained"


def test_a_bottleneck_adds_what_it_says():
    layer = sst2.Bottleneck(nn.Linear(6, 4), 3)
    nn.init.normal_(layer.up.weight)
    x = torch.randn(5, 6)
    h = layer.base(x)
    torch.testing.assert_close(layer(x), h + layer.up(nn.functional.gelu(layer.down(h))))


def test_rosa(encoder, tmp_path):
    result = rosa.run(tmp_path, epochs=16, ranks=(2, 8), model=str(encoder))
    found = written(tmp_path, "rosa")
    assert found["draws"] == 12 and list(found["relative_error"]) == ["constant", "falling"]
    # More with rank; what LoRA cannot; and full fine-tuning at once.
    for schedule, errors in found["relative_error"].items():
        assert errors["ROSA"]["8"] < errors["ROSA"]["2"] / 3
        assert errors["ROSA"]["2"] < errors["LoRA"]["2"] and errors["ROSA"]["8"] < errors["LoRA"]["8"] / 2
        assert errors[rosa.FULL] < (1e-3 if schedule == "falling" else 5e-2) and errors["LoRA"]["8"] > 0.2
    drawing = found["drawing"]
    assert drawing["layers"] == 2 and drawing["draw_all_layers_s"] > 0 and 0 < drawing["share_of_an_epoch"] < 0.03
    assert rosa.report(result).count("\n") == 7


def test_rosa_draws_at_the_authors_epochs():
    phases = [rosa.phase(epoch, 200) for epoch in range(200)]
    drawn = [epoch for epoch in range(1, 200) if phases[epoch] > phases[epoch - 1]]
    assert drawn == list(range(4, 200, 8)) and phases[0] == 0


@pytest.mark.parametrize("schedule", ["constant", "falling"])
def test_rosas_rates_are_the_schedules(monkeypatch, schedule):
    rates, step = [], torch.optim.AdamW.step

    def recorded(optimizer, *args, **kwargs):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    monkeypatch.setattr(rosa, "BATCH", 500)
    start, data = rosa.task(0)
    for method in ("ROSA", "LoRA", rosa.FULL):
        rates.clear()
        rosa.train(rosa.adapt(method, 1, start, 0), data, 4, 0, schedule)
        late = [1.0] * 20 if schedule == "constant" else [1 - i / 20 for i in range(20)]
        expected = torch.tensor([1.0] * 20 + late) * rosa.LEARNING_RATE
        torch.testing.assert_close(torch.tensor(rates), expected)


def test_rosas_task_is_of_the_rank_that_it_says():
    start, (x, y, x_test, y_test) = rosa.task(0)
    learned = torch.linalg.lstsq(x, y).solution.T
    change = learned - start.weight.detach()
    assert torch.linalg.matrix_rank(change, rtol=1e-3) == rosa.TRUE_RANK
    torch.testing.assert_close(x_test @ learned.T, y_test, rtol=0, atol=1e-3)
    assert 0.5 < change.std() / start.weight.std() < 2


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(psd, "run", functools.partial(psd.run, n=16, trials=2))
    command.main(["psd", "--out", str(tmp_path)])
    assert "psd, shifted: low rank" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["all"])
    assert "sst2 needs --data" in capsys.readouterr().err


def test_spread():
    assert files.spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5)}
