"""`demo` with a few steps of a tiny encoder: what it reports, and that the numbers are those of the models."""

import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from peft_fused.cli import demo_train
from peft_fused.cli.demo_data import Data, bundled, load
from peft_fused.cli.demo_train import Encoder, Settings

WORDS = ["the", "a", "is", "was", "not", "good", "bad", "lamp", "film", "soup", "train", "and", "it", "i", "of"]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A BERT of two layers of 32 with its tokenizer, saved as a checkpoint."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def settings(model_path, **more):
    return Settings(**{"model": str(model_path), "steps": 4, "rank": 3, "batch_size": 8, "max_length": 16} | more)


@pytest.fixture(scope="module")
def data() -> Data:
    return load(bundled("train"), bundled("eval"), "text", "label")


@pytest.fixture
def built(model_path, data):
    """(models, encoder, a batch) of seed 0."""
    chosen = settings(model_path)
    torch.manual_seed(0)
    base, tokenizer = demo_train.load(chosen, 2)
    models = demo_train.build(base, chosen, demo_train.targets(base, None), 0)
    encode = Encoder(tokenizer, chosen)
    return models, encode, encode(data.train[:8])


def test_json_compares_the_methods(cli, model_path, tmp_path):
    found = cli.json(
        "demo", "--model", model_path, "--steps", 4, "--rank", 3, "--batch-size", 8, "--seeds", 2, "--out", tmp_path
    )
    methods = found["summary"]["methods"]
    assert set(methods) == {"peft", "fused", "dylora", "surm"}
    assert len({methods[name]["trainable_parameters"] for name in demo_train.LORA}) == 1
    # Two layers, query and value, two vectors of 32 beside the head; of the three ranks of LoRA each has 2 * 32.
    counts = [methods[name]["trainable_parameters"] for name in ("peft", "surm")]
    assert counts[0] - counts[1] == 4 * (3 - 1) * 64
    assert methods["surm"]["max_relative_gradient_error"] is None and "circulant" in methods["surm"]["path"]
    assert methods["fused"]["max_relative_gradient_error"] < 1e-3
    assert methods["dylora"]["max_relative_gradient_error"] < 1e-3
    assert abs(methods["fused"]["final_loss_difference"]["mean"]) < 1e-3
    assert methods["peft"]["step_ratio_to_peft"] == {"mean": 1.0, "std": 0.0}
    assert "lowrank_linear" in methods["fused"]["path"] and "PEFT" in methods["peft"]["path"]
    assert [entry["rank"] for entry in found["summary"]["ranks"]] == [1, 2, 3]
    assert [seed["seed"] for seed in found["seeds"]] == [0, 1]
    for result in found["seeds"]:
        assert result["ranks"][-1]["dylora"] == result["methods"]["dylora"]["accuracy"]
        assert result["ranks"][-1]["lora_truncated"] == result["methods"]["peft"]["accuracy"]
    accuracies = [result["methods"]["fused"]["accuracy"] for result in found["seeds"]]
    assert methods["fused"]["accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert json.loads((tmp_path / "demo.json").read_text()) == found
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_table_on_a_file_of_ones_own(cli, model_path, tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("remark,verdict\n" + "".join(f"the film is {w},{w}\n" for w in ("good", "bad") * 10))
    columns = ("--text-column", "remark", "--label-column", "verdict")
    result = cli("demo", "--model", model_path, "--data", path, *columns, "--steps", 2, "--rank", 2, "--batch-size", 4)
    assert "16 rows, 4 of 4 evaluated, 2 classes" in result.stdout
    for word in ("PEFT LoRA", "accelerated LoRA", "DyLoRA", "SURM", "lowrank_linear", "alpha / b"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "none.tsv"), "No such file"),
        (("--eval", "none.tsv"), "--eval needs --data"),
        (("--data", str(bundled("train")), "--text-column", "sentence"), "columns: text, label"),
        (("--model", "no/such/model/anywhere"), "--model no/such/model/anywhere: "),
        (("--model", "/no/such/folder"), "--model /no/such/folder: there is no such folder"),
        (("--steps", "0"), "steps"),
        (("--alpha", "nan"), "--alpha must be finite, got nan"),
        (("--lr", "inf"), "--lr must be finite, got inf"),
        (("--out", __file__), "--out must be a folder"),
    ],
)
def test_bad_input_is_a_message_and_exit_code_2(cli, arguments, message):
    result = cli("demo", *arguments, code=2)
    assert message in result.stderr.replace("\n", "")
    assert result.stdout == ""


def test_a_diverged_run_is_still_reported(cli, model_path, tmp_path):
    command = ("demo", "--model", model_path, "--steps", 3, "--rank", 2, "--batch-size", 4, "--eval-rows", 8)
    found = cli.json(*command, "--lr", "1e30", "--out", tmp_path)
    assert found["summary"]["methods"]["peft"]["final_loss"]["mean"] is None
    assert json.loads((tmp_path / "demo.json").read_text()) == found


def test_unknown_target_modules_are_named(cli, model_path):
    result = cli("demo", "--model", model_path, "--target-modules", "query,nothing", code=2)
    assert "no layer named nothing" in result.stderr and "'value'" in result.stderr


def test_models_start_equal(built):
    models, _, batch = built
    for model in models.values():
        model.eval()
    logits = [model(**batch).logits for model in models.values()]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0])
    factors = [demo_train.lora_factors(models[name]) for name in demo_train.LORA]
    assert len(factors[0]) == 4
    for pairs in zip(*factors, strict=True):
        assert all(torch.equal(A, pairs[0][0]) and torch.equal(B, pairs[0][1]) for A, B in pairs)


def test_gradient_errors_see_a_wrong_layer_and_leave_the_factors_alone(built):
    models, _, batch = built
    right = demo_train.gradient_errors(models, batch, seed=0)
    assert right["peft"] == 0.0 and right["fused"] < 1e-4 and right["dylora"] < 1e-4
    assert all(not B.any() for name in demo_train.LORA for _, B in demo_train.lora_factors(models[name]))
    for layer in demo_train.lora_layers(models["fused"]):
        layer.scaling["default"] *= 1.02
    assert demo_train.gradient_errors(models, batch, seed=0)["fused"] > 5e-3


def test_training_gives_every_method_the_same_batches_and_moves_only_what_trains(built, model_path, data):
    models, encode, _ = built
    frozen = {name: p.detach().clone() for name, p in models["fused"].named_parameters() if not p.requires_grad}
    steps = []
    trained = demo_train.train(models, data.train, encode, settings(model_path), 0, lambda: steps.append(1))
    assert len(steps) == 4
    # The first losses are equal: same batch, same start, same dropout masks. The rank that DyLoRA draws cannot matter
    # while B is zero.
    assert trained["fused"].losses[0] == pytest.approx(trained["peft"].losses[0], abs=1e-6)
    assert trained["dylora"].losses[0] == pytest.approx(trained["peft"].losses[0], abs=1e-6)
    assert trained["surm"].losses[0] == pytest.approx(trained["peft"].losses[0], abs=1e-6)
    assert trained["fused"].losses == pytest.approx(trained["peft"].losses, abs=1e-3)
    for name in demo_train.LORA:
        assert all(B.abs().max() > 0 for _, B in demo_train.lora_factors(models[name]))
    assert all(p.any() for p in models["surm"].parameters() if p.requires_grad and p.dim() == 1)
    assert all(torch.equal(p, frozen[name]) for name, p in models["fused"].named_parameters() if name in frozen)


def test_dylora_trains_at_drawn_ranks(built, model_path, data):
    models, encode, _ = built
    ranks = set()
    state = demo_train.members_of(models["dylora"])["dylora"][0].state

    def note():
        ranks.add(state.train_value)

    demo_train.train(models, data.train, encode, settings(model_path, steps=12), 0, note)
    assert len(ranks) > 1, "one rank for twelve steps is no schedule"


def test_truncation_keeps_the_first_components_and_comes_back(built):
    model = built[0]["peft"]
    with torch.no_grad():
        for _, B in demo_train.lora_factors(model):
            B.normal_()
    before = [B.detach().clone() for _, B in demo_train.lora_factors(model)]
    with demo_train.truncated(model, 2):
        for (_, B), old in zip(demo_train.lora_factors(model), before, strict=True):
            assert torch.equal(B[:, :2], old[:, :2]) and not B[:, 2:].any()
    assert all(torch.equal(B, old) for (_, B), old in zip(demo_train.lora_factors(model), before, strict=True))


def test_accuracy_counts_every_row_once(data):
    class Says1(torch.nn.Module):
        def forward(self, input_ids):
            logits = torch.zeros(len(input_ids), 2)
            logits[:, 1] = 1
            return type("Output", (), {"logits": logits})

    rows = data.evaluation[:7]
    batches = demo_train.evaluation_batches(
        rows, lambda part: {"input_ids": torch.zeros(len(part), 3), "labels": torch.tensor([y for _, y in part])}, 3
    )
    assert [len(batch["labels"]) for batch in batches] == [3, 3, 1]
    assert demo_train.accuracy(Says1(), batches) == pytest.approx(sum(y for _, y in rows) / 7)


def test_step_ratio_leaves_the_first_steps_out():
    slow_start = demo_train.Times([100.0] * 3 + [1.0] * 6)
    assert demo_train.step_ratio(slow_start, demo_train.Times([2.0] * 9)) == 0.5


def test_a_large_file_is_not_tokenised_as_a_whole(model_path, data):
    seen = []

    class Counting:
        def __call__(self, texts, **kwargs):
            seen.append(len(texts))
            return {"input_ids": torch.ones(len(texts), 2)}

    class Model(torch.nn.Linear):
        def forward(self, input_ids, labels):
            return type("Output", (), {"loss": super().forward(input_ids).mean()})

    model = Model(2, 2)
    encode = Encoder(Counting(), settings(model_path))
    demo_train.train({"one": model}, data.train * 200, encode, settings(model_path, steps=3), 0, lambda: None)
    assert seen == [8, 8, 8]
