import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    Trainer,
    TrainingArguments,
)

import peft_fused
from peft_fused import AdaMixConfig, AdaMixTrainerMixin, PeftFusedCallback
from peft_fused.integrations.peft.adamix import AdaMixPeftLinear, AdaMixPeftNorm

LORA = dict(kind="lora", target_modules=["query", "value"])


def base(**options):
    torch.manual_seed(0)
    config = BertConfig(
        initializer_range=0.5, vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, num_labels=3, **options,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def adapt(model=None, seed=1, **options):
    model = model or base()
    torch.manual_seed(seed)
    return get_peft_model(model, AdaMixConfig(**{"r": 4, "task_type": "SEQ_CLS", "init_weights": False, **options}))


def inputs():
    return {"input_ids": torch.randint(1, 40, (4, 6), generator=torch.Generator().manual_seed(0))}


class Rows(Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, i):
        ids = torch.randint(1, 40, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": i % 3}


class Tokens(Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, i):
        ids = torch.randint(1, 32, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": torch.where(torch.arange(6) < 3 + i % 4, ids, -100)}


class AdaMixTrainer(AdaMixTrainerMixin, Trainer):
    pass


def trainer(folder, model, data=None, cls=AdaMixTrainer, callbacks=None, **options):
    settings = dict(
        output_dir=str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=4, save_steps=2,
        learning_rate=1e-2, weight_decay=0.1, logging_steps=100, report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
    )  # fmt: skip
    arguments = TrainingArguments(**{**settings, **options})
    callbacks = [PeftFusedCallback()] if callbacks is None else callbacks
    return cls(model=model, args=arguments, train_dataset=data or Rows(), callbacks=callbacks)


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------- positions and sizes

HOUSES = [
    # (model, options, trained at once, merged), without heads: methods of the paper, by arithmetic
    (lambda: BertModel(BertConfig()), dict(r=48), 2_223_360, 894_528),
    (
        lambda: RobertaModel(RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                                           intermediate_size=4096)),
        dict(r=16), 1_992_192, 811_392,
    ),
    (
        lambda: GPT2Model(GPT2Config(n_embd=1024, n_layer=24, n_head=16)), dict(r=8),
        24 * (4 * (8 * 1024 + 8) + 8 * 1024 + 1024), 417_984,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "options", "training", "merged"), HOUSES)
def test_parameter_counts_are_the_published_ones(model, options, training, merged):
    with torch.device("meta"):
        for experts, expected in ((4, training), (1, merged)):
            net = get_peft_model(model(), AdaMixConfig(num_experts=experts, **options))
            assert sum(p.numel() for p in net.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({}, ["layer.0.output.dense", "layer.1.output.dense"]),
        (
            {"position": "houlsby"},
            [f"layer.{i}.{part}output.dense" for i in (0, 1) for part in ("attention.", "")],
        ),
        ({"position": "pfeiffer"}, ["layer.0.output.LayerNorm", "layer.1.output.LayerNorm"]),
        (LORA, [f"layer.{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "value")]),
    ],
)
def test_positions(options, ends):
    found = [name for name, m in adapt(**options).named_modules() if isinstance(m, AdaMixPeftLinear)]
    assert len(found) == len(ends)
    assert all(name.endswith(end) for name, end in zip(found, ends, strict=True))


def test_positions_are_known_by_model_type_or_asked_for():
    with pytest.raises(ValueError, match=r"target_modules must be given .*position 'adamix'.* known are bert"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), AdaMixConfig())
    with pytest.raises(TypeError, match=r"position='pfeiffer' adapts a torch\.nn\.LayerNorm"):
        adapt(position="pfeiffer", target_modules=["dense"])


def test_an_adapter_works_on_the_output_before_the_residual():
    model = adapt().eval()
    layer = model.base_model.model.bert.encoder.layer[0].output
    x, block = torch.randn(2, 5, 24), layer.dense.adamix_block["default"]
    h = layer.dense.base_layer(x)
    down, up = block.down.weight.mean(0), block.up.weight
    expected = h + F.gelu(h @ down.T + block.down.bias.mean(0)) @ up.T + block.up.bias
    torch.testing.assert_close(layer.dense(x), expected)


def test_pfeiffers_adapter_reads_the_norm_and_adds_before_it():
    """The released form: bottleneck of LayerNorm(h + input), residual h, then LayerNorm of that + input."""
    model = adapt(position="pfeiffer", activation="relu", num_experts=1).eval()
    output = model.base_model.model.bert.encoder.layer[0].output
    assert type(output.LayerNorm) is AdaMixPeftNorm
    hidden, residual = torch.randn(2, 5, 24), torch.randn(2, 5, 16)
    block, norm = output.LayerNorm.adamix_block["default"], output.LayerNorm.base_layer
    h = output.dense(hidden)
    adapted = F.relu(norm(h + residual) @ block.down.weight.T + block.down.bias) @ block.up.weight.T + block.up.bias
    torch.testing.assert_close(output(hidden, residual), norm(adapted + h + residual))
    with model.disable_adapter():
        torch.testing.assert_close(output(hidden, residual), norm(h + residual))


# ---------------------------------------------------------------------------------------------- saving, merging, export


def test_experts_merge_into_one_adapter_file(tmp_path):
    model = adapt(share_up=False)
    y = model.eval()(**inputs()).logits
    peft_fused.merge_experts(model)
    torch.testing.assert_close(model(**inputs()).logits, y)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs()).logits, y)
    assert loaded.peft_config["default"].num_experts == 1
    assert all(
        m.adamix_block["default"].down.weight.dim() == 2 for m in loaded.modules() if isinstance(m, AdaMixPeftLinear)
    )
    torch.testing.assert_close(loaded.train()(**inputs()).logits.shape, y.shape)
    with pytest.raises(ValueError, match="no AdaMix adapter"):
        peft_fused.merge_experts(base())
    with pytest.raises(ValueError, match="adapter_name must be one of"):
        peft_fused.merge_experts(model, adapter_name="other")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        peft_fused.merge_experts(None)


def test_merging_says_that_it_approximates_where_both_sides_are_routed():
    with pytest.warns(UserWarning, match="routes both sides"):
        adapt(share_up=False, **LORA).merge_adapter()


@pytest.mark.parametrize("shared", ["share_down", "share_up"])
def test_the_lora_kind_exports_to_lora(tmp_path, shared):
    model = adapt(**{"share_up": False, shared: True}, **LORA)
    y = model.eval()(**inputs()).logits
    assert peft_fused.export_lora(model, tmp_path) is None
    lora = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert isinstance(lora.peft_config["default"], LoraConfig)
    torch.testing.assert_close(lora(**inputs()).logits, y)


@pytest.mark.parametrize("other", [dict(r=5), dict(num_experts=3), dict(share_up=False), LORA])
def test_a_checkpoint_of_another_form_changes_nothing(tmp_path, other):
    adapt(**other).save_pretrained(tmp_path)
    model = adapt()
    config = copy.deepcopy(model.peft_config["default"])
    before = copy.deepcopy(model.state_dict())
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    with pytest.raises(ValueError, match="nothing was loaded"):
        set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors"))
    assert model.peft_config["default"] == config
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_adapters_switch_off_and_take_turns():
    plain, model = base().eval(), adapt().eval()
    torch.manual_seed(4)
    model.add_adapter("second", AdaMixConfig(r=3, kind="lora", target_modules=["query"], init_weights=False))
    first = model(**inputs()).logits
    model.set_adapter("second")
    second = model(**inputs()).logits
    assert (first - second).abs().max() > 1e-4
    with model.disable_adapter():
        assert torch.equal(model(**inputs()).logits, plain(**inputs()).logits)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(model(**inputs()).logits, first)


# -------------------------------------------------------------------------------------------------------------- Trainer


@pytest.mark.parametrize("options", [{}, {"routing": "sequence", **LORA}, {"strict_experts": True, "share_up": False}])
@pytest.mark.parametrize("doubled", [False, True])
def test_a_resumed_run_equals_the_straight_one_bit_for_bit(tmp_path, options, doubled):
    class Doubled(AdaMixTrainer):
        consistency_doubled = doubled

    straight, resumed = adapt(**options), adapt(**options)
    trainer(tmp_path / "straight", straight, cls=Doubled).train()
    run = trainer(tmp_path / "resumed", resumed, cls=Doubled)
    run.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert run.state.global_step == 4
    a, b, start = trained(straight), trained(resumed), trained(adapt(**options))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], start[name]) for name in a if "adamix" in name)


def steps_of(folder, model, data, cls, **options):
    """The first step's gradients, as the optimizer sees them."""
    found = {}

    class Watch(PeftFusedCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if not found:
                found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer(folder, model, data, cls=cls, callbacks=[Watch()], max_steps=1, max_grad_norm=0.0, **options).train()
    return found


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("kind", ["tokens", "classes"])
@pytest.mark.parametrize("doubled", [False, True])
def test_accumulation_averages_the_divergence_over_the_step(tmp_path, kind, doubled):
    """Against the plain function: of tokens the sum over the step divided by its tokens, of rows the mean of means."""

    class Weighted(AdaMixTrainer):
        consistency_weight = 100.0
        consistency_doubled = doubled

    class Without(AdaMixTrainer):
        consistency_weight = 0.0

    def fresh():
        if kind == "tokens":
            torch.manual_seed(0)
            net = get_peft_model(llama(), AdaMixConfig(r=4, share_up=False, init_weights=False, seed=2))
            return net
        return adapt(base(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), share_up=False, seed=1)

    data = Tokens() if kind == "tokens" else Rows()
    model = fresh()
    seen = []

    class Recording(Weighted):
        def training_step(self, model, inputs, num_items_in_batch=None):
            seen.append({name: value.clone() for name, value in inputs.items()})
            return super().training_step(model, inputs, num_items_in_batch)

    with_term = steps_of(tmp_path / "a", model, data, Recording, gradient_accumulation_steps=3)
    without = steps_of(tmp_path / "b", fresh(), data, Without, gradient_accumulation_steps=3)
    assert len(seen) == 3
    # The term alone, from the recorded micro-batches.
    net = fresh().train()
    labels = [batch["labels"] for batch in seen]
    tokens = sum((each[..., 1:] != -100).sum() for each in labels) if kind == "tokens" else None
    net.zero_grad()
    for micro, batch in enumerate(seen):
        peft_fused.on_step(net, step=0, micro=micro)
        plain = {name: value for name, value in batch.items() if name != "labels"}
        first = net(**plain).logits
        peft_fused.set_adamix_pass(net, 1)
        second = net(**plain).logits
        if kind == "tokens":
            kept = batch["labels"][:, 1:] != -100
            term = peft_fused.consistency_loss(first[:, :-1][kept], second[:, :-1][kept]) * kept.sum() / tokens
        else:
            term = peft_fused.consistency_loss(first, second) / 3
        (100.0 * term).backward()
    compared = 0
    for name, parameter in net.named_parameters():
        if parameter.grad is not None and name in with_term:
            torch.testing.assert_close(with_term[name] - without[name], parameter.grad, atol=3e-5, rtol=2e-3)
            compared += parameter.grad.any().item()
    assert compared >= 4
    # And the loss of the task beside it, of BERT too, whose own loss is summed over the micro-batches by the Trainer.
    net.zero_grad()
    for micro, batch in enumerate(seen):
        peft_fused.on_step(net, step=0, micro=micro)
        share = (batch["labels"][:, 1:] != -100).sum() / tokens if kind == "tokens" else 1 / 3
        (net(**batch).loss * share).backward()
    for name, parameter in net.named_parameters():
        if parameter.grad is not None and name in without:
            torch.testing.assert_close(without[name], parameter.grad, atol=3e-6, rtol=2e-3)


def test_items_counted_once_for_each_gpu_of_a_dataparallel(tmp_path):
    """The Trainer hands a DataParallel its count once for each GPU, (n_gpu, 1), of which every replica gets its row."""

    def scattered(module, args, kwargs):
        if "num_items_in_batch" in kwargs:
            kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"].flatten()[0]
        return args, kwargs

    def loss(items):
        model = get_peft_model(llama(), AdaMixConfig(r=4, share_up=False, init_weights=False, seed=2)).train()
        run = trainer(tmp_path, model, Tokens(), cls=AdaMixTrainer)
        run.current_gradient_accumulation_steps = 1
        peft_fused.on_step(model, step=0)
        model.register_forward_pre_hook(scattered, with_kwargs=True)
        return run.compute_loss(model, next(iter(run.get_train_dataloader())), num_items_in_batch=items)

    once, twice = loss(torch.tensor(7)), loss(torch.tensor([[7], [7]]))
    assert twice.shape == once.shape == () and torch.equal(once, twice)
    assert not torch.equal(once, loss(torch.tensor(14)))


def test_evaluation_in_the_trainer_is_merged_and_single(tmp_path):
    model = adapt()
    calls = []
    run = trainer(tmp_path, model, eval_strategy="no")
    run.eval_dataset = Rows()
    model.register_forward_pre_hook(lambda *_: calls.append(model.training))
    run.evaluate()
    assert calls and not any(calls) and len(calls) == len(run.get_eval_dataloader())


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_experts": 0}, ValueError, "num_experts must be at least 1, got 0"),
        ({"share_down": True, "share_up": True}, ValueError, "share_down and share_up must not both be True"),
        ({"kind": "prefix"}, ValueError, "kind must be one of 'adapter', 'lora', got 'prefix'"),
        ({"position": "middle"}, ValueError, "position must be one of"),
        ({"kind": "lora", "position": "houlsby"}, ValueError, "position is an option of kind='adapter'"),
        ({"lora_alpha": 3}, ValueError, "lora_alpha is an option of kind='lora'"),
        ({"activation": "softmax"}, ValueError, "activation must be one of"),
        ({"r": 300}, ValueError, r"r must be in 1\.\.256"),
        ({"adamix_dropout": -0.1}, ValueError, "adamix_dropout must be in"),
        ({"bias": "lora_only"}, ValueError, "bias must be one of"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        AdaMixConfig(**options)
