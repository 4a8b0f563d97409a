"""`demo` with a few steps of a tiny encoder: what it reports, and that the numbers are those of the models."""

import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

import peft_fused
from peft_fused.cli import demo_adamix, demo_methods, demo_train
from peft_fused.cli.demo_data import Data, bundled, load
from peft_fused.cli.demo_methods import Settings
from peft_fused.cli.demo_train import Encoder
from peft_fused.methods.schedule import members_of
from peft_fused.registry import METHODS

WORDS = ["the", "a", "is", "was", "not", "good", "bad", "lamp", "film", "soup", "train", "and", "it", "i", "of"]
# The methods whose factors are LoRA's.
LORA = ("peft", "lora", "dylora")


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


def records(result) -> dict[str, dict]:
    """The objects that --json has printed, one a line, by method."""
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len({record["method"] for record in found}) == len(found)
    return {record["method"]: record for record in found}


NAMED = ("accuracy", "trainable", "step_ratio_to_peft", "peak_bytes")
COMMAND = ("demo", "--rank", 3, "--batch-size", 8)


def test_json_compares_all_methods(cli, model_path, tmp_path):
    result = cli(*COMMAND, "--model", model_path, "--steps", 4, "--seeds", 2, "--out", tmp_path, "--json")
    methods = records(result)
    assert list(methods) == ["peft", "lora", *METHODS]
    for record in methods.values():
        assert all(isinstance(record[name], int | float) and record[name] > 0 for name in NAMED)
        assert record["std"]["accuracy"] is not None and record["diverged_at"] is None
    counts = {name: record["trainable"] for name, record in methods.items()}
    head = 2 * (32 + 1)
    # Two layers, query and value; r = 3. SURM has two vectors of 32 for each, and ROSA factors of LoRA's shapes.
    assert counts["peft"] == counts["lora"] == counts["dylora"] == counts["rosa"] == head + 4 * 3 * 64
    assert counts["surm"] == head + 4 * 64
    # One block per layer: four down projections to 16 and their biases, and one up projection.
    assert counts["adamix"] == head + 2 * (4 * (32 * 16 + 16) + 16 * 32 + 32)
    # Six linear layers per block: vectors of all, and of the feed-forward's two, 32 -> 64 -> 32, also the matrices.
    vectors = 2 * (4 * (4 + 32) + (4 + 64) + (4 + 32))
    assert counts["aflora"] == head + vectors + 2 * 2 * 4 * (32 + 64)
    aflora = methods["aflora"]
    assert aflora["trainable_end"] == head + vectors < aflora["trainable_mean"] < counts["aflora"]
    errors = {name: record["max_relative_gradient_error"] for name, record in methods.items()}
    assert {name for name, error in errors.items() if error is not None} == set(LORA)
    assert errors["lora"] < 1e-3 and errors["dylora"] < 1e-3
    assert abs(methods["lora"]["final_loss_difference"]) < 1e-3
    assert methods["peft"]["step_ratio_to_peft"] == 1.0 and methods["peft"]["std"]["step_ratio_to_peft"] == 0.0
    assert "lowrank_linear" in methods["lora"]["path"] and "PEFT" in methods["peft"]["path"]
    assert methods["adamix"]["peak_bytes"] > methods["peft"]["peak_bytes"]
    assert methods["adamix"]["merged_accuracy"] == methods["adamix"]["accuracy"]
    assert len(methods["adamix"]["random_route_accuracies"]) == 8
    assert [entry["rank"] for entry in methods["dylora"]["ranks"]] == [1, 2, 3]
    assert methods["dylora"]["ranks"][-1]["dylora"] == methods["dylora"]["accuracy"]
    assert methods["dylora"]["ranks"][-1]["lora_truncated"] == methods["peft"]["accuracy"]
    assert aflora["learning_rate"] == pytest.approx(demo_methods.METHODS["aflora"].rate * Settings().lr)
    written = json.loads((tmp_path / "demo.json").read_text())
    assert written["methods"] == list(methods.values())
    assert [seed["seed"] for seed in written["seeds"]] == [0, 1]
    accuracies = [seed["methods"]["lora"]["accuracy"] for seed in written["seeds"]]
    assert methods["lora"]["accuracy"] == pytest.approx(sum(accuracies) / 2)
    log = json.loads((tmp_path / "aflora.json").read_text())
    assert log == written["seeds"][1]["methods"]["aflora"]["freezing"]
    for name in ("demo.png", "aflora.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_methods_can_be_chosen(cli, model_path, tmp_path):
    chosen = ("--method", "rosa", "--method", "lora", "--method", "rosa")
    command = (*COMMAND, "--model", model_path, "--steps", 2, "--eval-rows", 8, *chosen, "--out", tmp_path)
    assert list(records(cli(*command, "--json"))) == ["peft", "lora", "rosa"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "demo.png"]
    text = cli(*command).stdout
    assert "ROSA" in text and "accelerated LoRA" in text
    assert not any(word in text for word in ("DyLoRA runs", "SURM", "AdaMix", "AFLoRA", "ranks are kept"))


def test_table_on_a_file_of_ones_own(cli, model_path, tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("remark,verdict\n" + "".join(f"the film is {w},{w}\n" for w in ("good", "bad") * 10))
    columns = ("--text-column", "remark", "--label-column", "verdict")
    result = cli("demo", "--model", model_path, "--data", path, *columns, "--steps", 2, "--rank", 2, "--batch-size", 4)
    assert "16 rows, 4 of 4 evaluated, 2 classes" in result.stdout
    for method in demo_methods.METHODS.values():
        assert method.title in result.stdout
    for words in ("lowrank_linear", "alpha / b", "two passes a step", "8 random routes", "on average; its memory"):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "none.tsv"), "No such file"),
        (("--eval", "none.tsv"), "--eval needs --data"),
        (("--data", str(bundled("train")), "--text-column", "sentence"), "columns: text, label"),
        (("--model", "no/such/model/anywhere"), "--model no/such/model/anywhere: "),
        (("--model", "/no/such/folder"), "--model /no/such/folder: there is no such folder"),
        (("--steps", "0"), "steps"),
        (("--method", "lora", "--method", "vera"), f"must be all or one of {', '.join(['lora', *METHODS])}"),
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
    result = cli(*command, "--lr", "1e30", "--out", tmp_path, "--json")
    methods = records(result)
    assert len(methods) == 2 + len(METHODS)
    assert all(record["final_loss"] is None and record["diverged_at"] == 1 for record in methods.values())
    assert json.loads((tmp_path / "demo.json").read_text())["methods"] == list(methods.values())
    assert "ROSA diverged in step 1" in cli(*command, "--method", "rosa", "--lr", "1e30").stdout


def test_a_model_that_a_method_cannot_adapt_is_a_message(cli, model_path):
    command = ("demo", "--model", model_path, "--method", "rosa", "--rank", 33)
    error = " ".join(cli(*command, code=2).stderr.split())
    assert "ROSA: " in error and "r must be in 1..32" in error


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
    factors = [demo_train.lora_factors(models[name]) for name in LORA]
    assert len(factors[0]) == 4
    for pairs in zip(*factors, strict=True):
        assert all(torch.equal(A, pairs[0][0]) and torch.equal(B, pairs[0][1]) for A, B in pairs)


def test_gradient_errors_see_a_wrong_layer_and_leave_the_factors_alone(built):
    models, _, batch = built
    right = demo_train.gradient_errors(models, batch, seed=0)
    assert right["peft"] == 0.0 and right["lora"] < 1e-4 and right["dylora"] < 1e-4
    assert all(not B.any() for name in LORA for _, B in demo_train.lora_factors(models[name]))
    for layer in demo_train.lora_layers(models["lora"]):
        layer.scaling["default"] *= 1.02
    assert demo_train.gradient_errors(models, batch, seed=0)["lora"] > 5e-3


def test_training_gives_every_method_the_same_batches_and_moves_only_what_trains(built, model_path, data):
    models, encode, _ = built
    frozen = {name: p.detach().clone() for name, p in models["lora"].named_parameters() if not p.requires_grad}
    steps = []
    trained = demo_train.train(models, data.train, encode, settings(model_path), 0, lambda: steps.append(1))
    assert len(steps) == 4
    # The first losses are equal: same batch, same start, same dropout masks. The rank that DyLoRA draws cannot matter
    # while B is zero.
    assert trained["lora"].losses[0] == pytest.approx(trained["peft"].losses[0], abs=1e-6)
    assert trained["dylora"].losses[0] == pytest.approx(trained["peft"].losses[0], abs=1e-6)
    for name in ("surm", "adamix", "aflora", "rosa"):
        assert trained[name].losses[0] == pytest.approx(trained["peft"].losses[0], abs=1e-5)
    assert trained["lora"].losses == pytest.approx(trained["peft"].losses, abs=1e-3)
    for name in LORA:
        assert all(B.abs().max() > 0 for _, B in demo_train.lora_factors(models[name]))
    assert all(p.any() for p in models["surm"].parameters() if p.requires_grad and p.dim() == 1)
    assert all(torch.equal(p, frozen[name]) for name, p in models["lora"].named_parameters() if name in frozen)


def test_dylora_trains_at_drawn_ranks(built, model_path, data):
    models, encode, _ = built
    ranks = set()
    state = members_of(models["dylora"])["dylora"][0].state

    def note():
        ranks.add(state.train_value)

    demo_train.train(models, data.train, encode, settings(model_path, steps=12), 0, note)
    assert len(ranks) > 1, "one rank for twelve steps is no schedule"


def test_rosa_draws_subspaces_four_times_a_run(model_path, data):
    chosen = settings(model_path, steps=8, methods=("rosa",))
    base, tokenizer = demo_train.load(chosen, 2)
    model = demo_train.build(base, chosen, ["query", "value"], 0)["rosa"]
    weight = next(p for name, p in model.named_parameters() if name.endswith("query.base_layer.weight"))
    seen = []
    encode = Encoder(tokenizer, chosen)
    demo_train.train({"rosa": model}, data.train, encode, chosen, 0, lambda: seen.append(weight.detach().clone()))
    assert [step for step in range(1, 8) if not torch.equal(seen[step], seen[step - 1])] == [2, 4, 6]


def test_adamix_runs_two_passes_and_the_others_one(built, model_path, data):
    models, encode, _ = built
    passes = dict.fromkeys(models, 0)

    def count(name):
        def hook(*_):
            passes[name] += 1

        return hook

    for name, model in models.items():
        model.base_model.register_forward_hook(count(name))
    demo_train.train(models, data.train, encode, settings(model_path, steps=3), 0, lambda: None)
    assert passes == {name: 6 if name == "adamix" else 3 for name in models}


def test_random_routes_are_drawn_and_the_average_comes_back(built):
    models, _, batch = built
    model = models["adamix"].eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "adamix_block" in name:
                p.normal_(std=0.5)
    merged = model(**batch).logits
    logits = []

    def accuracy(model, batches):
        logits.append(model(**batches[0]).logits)
        return float(len(logits))

    assert demo_adamix.random_route_accuracies(model, [batch], accuracy) == [float(i) for i in range(1, 9)]
    assert not any(torch.allclose(found, merged) for found in logits)
    assert len({found.sum().item() for found in logits}) > 4
    assert torch.equal(model(**batch).logits, merged)


def test_learning_rates_are_multiples_of_that_of_lora(built, model_path, data):
    models, encode, _ = built
    trained = demo_train.train(models, data.train, encode, settings(model_path, steps=1, lr=0.5), 0, lambda: None)
    for name, state in trained.items():
        assert state.optimizer.param_groups[0]["lr"] == 0.5 * demo_methods.METHODS[name].rate
    assert len({method.rate for method in demo_methods.METHODS.values()}) > 1
    trained = demo_train.train({"own": models["rosa"]}, data.train, encode, settings(model_path), 0, lambda: None)
    assert trained["own"].optimizer.param_groups[0]["lr"] == settings(model_path).lr


def test_what_diverged_is_trained_no_further(built, model_path, data):
    models, encode, _ = built
    wild = {**demo_methods.METHODS, "surm": demo_methods.Method("", None, rate=1e30)}
    few = {name: models[name] for name in ("peft", "surm")}
    trained = demo_train.train(few, data.train, encode, settings(model_path), 0, lambda: None, wild)
    assert trained["surm"].diverged_at == 1 and len(trained["surm"].times.ms) == 1
    assert trained["peft"].diverged_at is None and len(trained["peft"].losses) == 4
    assert demo_train.step_ratio(trained["surm"].times, trained["peft"].times) > 0
    assert demo_train.diverged(models["lora"], float("nan")) and not demo_train.diverged(models["lora"], 1.0)


def test_targets_of_ones_own_are_those_of_every_method(model_path):
    chosen = settings(model_path, target_modules=["key"])
    base, _ = demo_train.load(chosen, 2)
    models = demo_train.build(base, chosen, demo_train.targets(base, ["key"]), 0)
    for name, model in models.items():
        # PEFT calls the layer in a LoRA layer so, and ours are named as PEFT's.
        adapted = {key.rsplit(".", 1)[0] for key, _ in model.named_modules() if key.endswith(".base_layer")}
        assert len(adapted) == 2 and all(key.endswith("key") for key in adapted), name
    # What is in the attention is then frozen by and by, too.
    assert all(step is None for _, _, step in peft_fused.freezing_history(models["aflora"]))


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
