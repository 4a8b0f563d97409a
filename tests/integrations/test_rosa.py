import copy

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from peft_fused.integrations.peft import RosaConfig, export_lora
from peft_fused.integrations.peft.rosa import RosaPeftLinear
from peft_fused.integrations.transformers import PeftFusedCallback
from peft_fused.layers.rosa.subspace import draw_directions
from peft_fused.methods import decay_groups, on_step

R = 3
IDS = torch.arange(20).reshape(2, 10)
LLAMA = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, pad_token_id=0,
)  # fmt: skip
# With down_proj, [16, 80], two draws leave factors of a change, with q_proj, [16, 16], a dense one.
TARGETS = ["q_proj", "down_proj"]


def llama(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA.to_dict() | options)).to(dtype).eval()


def gpt2(dtype=torch.float32):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).to(dtype).eval()


def config(**options):
    return RosaConfig(**dict(r=R, target_modules=TARGETS, resample_every=2) | options)


def adapted(base=None, **options):
    return get_peft_model(llama() if base is None else base, config(**options)).eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, RosaPeftLinear)}


def train(model, steps=5, first=0, optimizer=None, lr=1e-2):
    """Draws at steps 2 and 4."""
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for step in range(first, first + steps):
        on_step(model, step=step, optimizer=optimizer)
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def base_weights(model):
    """The weights of the model without its adapters, by its own names."""
    found = {}
    for name, p in model.named_parameters():
        if "rosa_" not in name:
            found[name.removeprefix("base_model.model.").replace("base_layer.", "")] = p.detach().clone()
    return found


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def by_hand(base, model, adapter="default"):
    """The base model with all that was learned added to its weights, from W_f and the factors."""
    for name, layer in layers(model).items():
        weight = base.get_submodule(name.removeprefix("base_model.model.")).weight
        A, B = (p.detach().double() for p in layer.factors(adapter))
        product = B @ A
        weight.data = (layer.base_weight().double() + (product.T if layer.transposed else product)).to(weight.dtype)
    return base


@pytest.mark.parametrize("make", [llama, gpt2])
def test_starts_as_the_pretrained_model_and_equals_the_dense_formula_after_training(make):
    model = adapted(make(), target_modules=["c_attn", "c_proj"] if make is gpt2 else TARGETS)
    torch.testing.assert_close(logits(model), logits(make()), rtol=0, atol=1e-6)
    trainable = {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"rosa_A", "rosa_B"}
    for layer in layers(model).values():
        A, B = layer.factors("default")
        W0 = layer._pretrained.values.T if layer.transposed else layer._pretrained.values
        U, S, V = torch.linalg.svd(W0, full_matrices=False)
        drawn = draw_directions(config().policy(), R, 16, 0, layer.rosa_state["default"].layer)
        torch.testing.assert_close(B @ A, U[:, drawn] * S[drawn] @ V[drawn], rtol=0, atol=1e-5)
    assert len({layer.rosa_state["default"].layer for layer in layers(model).values()}) == len(layers(model))
    train(model)
    expected = logits(by_hand(make(), model))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert (expected - logits(make())).abs().max() > 1e-2
    for name, layer in layers(model).items():
        weight = make().get_submodule(name.removeprefix("base_model.model.")).weight
        learned = by_hand(make(), model).get_submodule(name.removeprefix("base_model.model.")).weight - weight
        torch.testing.assert_close(layer.get_delta_weight("default"), learned, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_function_survives_draws_in_every_dtype(dtype):
    model = adapted(llama(dtype), resample_every=1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    assert all(p.dtype == torch.float32 for layer in layers(model).values() for p in layer.factors("default"))
    pointers = [layer.base_weight().data_ptr() for layer in layers(model).values()]
    for step in range(1, 11):
        on_step(model, step=step, optimizer=optimizer)
        for layer in layers(model).values():
            A, B = layer.factors("default")
            W0 = layer._pretrained.values.double()
            error = (layer.base_weight().double() + (B @ A).double() - W0).abs().max()
            assert error <= torch.finfo(dtype).eps * W0.abs().max() + 1e-7
    assert pointers == [layer.base_weight().data_ptr() for layer in layers(model).values()]
    with model.disable_adapter():
        assert same_weights(base_weights(model), dict(llama(dtype).named_parameters()))


def test_gradients_are_those_of_the_dense_weights():
    model = train(adapted()).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    reference = by_hand(llama(), model)
    reference(input_ids=IDS, labels=IDS).loss.backward()
    for name, layer in layers(model).items():
        grad = reference.get_submodule(name.removeprefix("base_model.model.")).weight.grad
        A, B = layer.factors("default")
        torch.testing.assert_close(A.grad, B.detach().T @ grad)
        torch.testing.assert_close(B.grad, grad @ A.detach().T)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merges_the_whole_change_rounded_once(make, dtype):
    model = train(adapted(make(dtype), target_modules=["c_attn"] if make is gpt2 else TARGETS))
    trained = base_weights(model)
    assert not same_weights(trained, base_weights(make(dtype)))
    with model.disable_adapter():
        assert on_step(model, step=9) == 0
    model.merge_adapter(safe_merge=True)
    for layer in layers(model).values():
        W0, delta = layer._pretrained.values, layer.adapter("default").change()
        assert torch.equal(layer.base_weight(), (W0.double() + (delta.T if layer.transposed else delta)).to(dtype))
    model.unmerge_adapter()
    assert same_weights(base_weights(model), trained)


def switched_while_disabled(model):
    with model.disable_adapter():
        model.set_adapter("second")


def merged_while_disabled(model):
    model.base_model.disable_adapter_layers()
    model.merge_adapter()
    model.base_model.enable_adapter_layers()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.set_adapter("second"),
        switched_while_disabled,
        lambda model: model.merge_adapter(),
        merged_while_disabled,
        lambda model: model.unload(),
    ],
    ids=["set_adapter", "switched while disabled", "merged", "merged while disabled", "unload"],
)
def test_other_changes_between_forward_and_backward_are_autograds_error(change):
    model = train(adapted())
    model.add_adapter("second", config(seed=3))
    embeddings = model.get_input_embeddings().weight.requires_grad_(True)
    model.train()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward(retain_graph=True)
    change(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, embeddings)


def test_several_adapters_take_turns():
    model = train(adapted())
    pretrained, first = base_weights(llama()), logits(model)
    frozen = base_weights(model)
    model.add_adapter("second", config(target_modules=["q_proj", "v_proj"], r=0.25, seed=3, sample="top"))
    assert not any(p.requires_grad for name, p in model.named_parameters() if "second" in name)
    assert torch.equal(logits(model), first) and same_weights(base_weights(model), frozen)

    model.set_adapter("second")
    torch.testing.assert_close(logits(model), logits(llama()), rtol=0, atol=1e-6)
    assert {
        p.shape[0] for layer in layers(model).values() if "second" in layer.rosa_A for p in layer.factors("second")[:1]
    } == {4, 2}
    train(model, 3)
    second = logits(model)
    phases = {
        name: {layer.rosa_state[name].phase for layer in layers(model).values() if name in layer.rosa_state}
        for name in ("default", "second")
    }
    assert phases == {"default": {2}, "second": {1}}, "only the active adapter draws"
    model.set_adapter("default")
    assert torch.equal(logits(model), first) and same_weights(base_weights(model), frozen)

    before = base_weights(model)
    for call in (
        lambda: model.base_model.set_adapter(["default", "second"]),
        lambda: model.merge_adapter(["default", "second"]),
        lambda: model.merge_and_unload(adapter_names=["second", "default"]),
    ):
        with pytest.raises(ValueError, match="only one ROSA adapter can be active or merged"):
            call()
        assert same_weights(base_weights(model), before) and torch.equal(logits(model), first)

    model.merge_adapter(["second"])
    for layer in layers(model).values():
        if "second" in layer.rosa_A:
            expected = layer._pretrained.values + layer.adapter("second").change()
            assert torch.equal(layer.base_weight(), expected.float())
    model.unmerge_adapter()
    assert torch.equal(logits(model), first)
    # Layers that have only the other adapter are unloaded as they were pretrained.
    whole = copy.deepcopy(model).merge_and_unload(adapter_names=["second"])
    torch.testing.assert_close(logits(whole), second, rtol=0, atol=1e-5)

    model.delete_adapter("default")
    assert model.active_adapters == ["second"] and torch.equal(logits(model), second)
    model.delete_adapter("second")
    assert same_weights(base_weights(model), pretrained)


def test_two_adapters_of_different_layers_may_be_active():
    model = adapted(target_modules=["q_proj"])
    model.add_adapter("second", config(target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(model), logits(llama()), rtol=0, atol=1e-6)
    assert on_step(model, step=0) == 4


def test_a_model_moved_and_cast_keeps_its_state():
    model = train(adapted()).to(torch.bfloat16)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama(torch.bfloat16)))
    layer = next(iter(layers(model).values()))
    assert layer.rosa_state["default"].A0.dtype == torch.float32


def test_adapters_in_the_base_dtype_if_asked():
    model = get_peft_model(llama(torch.bfloat16), config(), autocast_adapter_dtype=False).eval()
    for layer in layers(model).values():
        A, B = (p.detach().double() for p in layer.factors("default"))
        assert layer.factor("default").dtype == torch.bfloat16
        # The base weight has taken up what the factors lost.
        W0 = layer._pretrained.values.double()
        assert (layer.base_weight().double() + B @ A - W0).abs().max() <= 2**-8 * W0.abs().max()
        assert not layer.get_delta_weight("default").any()


# ------------------------------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved_as", ["disabled", "merged", "with another adapter"])
def test_a_whole_state_dict_is_read_however_it_was_saved(saved_as, dtype, make):
    def fresh(**options):
        net = adapted(make(dtype), target_modules=targets, **options)
        net.add_adapter("second", config(target_modules=targets, seed=3))
        return net

    targets = ["c_attn"] if make is gpt2 else TARGETS
    model = train(fresh())
    expected = logits(model)
    if saved_as == "disabled":
        with model.disable_adapter():
            saved = copy.deepcopy(model.state_dict())
    else:
        model.merge_adapter() if saved_as == "merged" else model.set_adapter("second")
        saved = copy.deepcopy(model.state_dict())
    other = fresh(seed=1)
    other.load_state_dict(saved)
    assert torch.equal(logits(other), expected)
    with other.disable_adapter():
        assert same_weights(base_weights(other), base_weights(make(dtype)))


def test_modules_to_save_biases_and_rank_patterns_travel(tmp_path):
    base = lambda: llama(attention_bias=True)  # noqa: E731
    model = adapted(
        base(),
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["lm_head"],
        bias="rosa_only",
        rank_pattern={"v_proj": 0.9, "layers.1.self_attn.q_proj": 5},
    )
    ranks = [layer.factors("default")[0].shape[0] for layer in layers(model).values()]
    assert ranks == [3, 7, 5, 7]
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("lm_head" in name for name in trainable) and any("q_proj.base_layer.bias" in name for name in trainable)
    train(model).save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), logits(model))
    _, spared = decay_groups(model, 0.1)
    spared = {id(p) for p in spared["params"]}
    assert all(id(p) in spared for layer in layers(model).values() for p in layer.factors("default"))
    assert any(id(p) not in spared for name, p in model.named_parameters() if "lm_head" in name)


def damage(folder, what):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if "q_proj.rosa_state._extra_state" in k)
    if what == "size of the state":
        tensors[key] = tensors[key][:-1]
    elif what == "not finite":
        tensors[key][9] = torch.nan
    elif what == "integers":
        tensors[key] = tensors[key].long()
    save_file(tensors, path)


MESSAGES = {
    "size of the state": r"must have 356 numbers for r = 3 on \[16, 16\], got 355",
    "not finite": "1 not finite: .*q_proj.rosa_state",
    "integers": "1 of another type",
}


@pytest.mark.parametrize("what", MESSAGES)
def test_a_damaged_state_changes_nothing(tmp_path, what):
    train(adapted()).save_pretrained(tmp_path)
    damage(tmp_path, what)
    base = llama()
    tree = {name: type(module) for name, module in base.named_modules()}
    for given in ({}, {"config": PeftConfig.from_pretrained(tmp_path)}):
        with pytest.raises(ValueError, match=MESSAGES[what]):
            PeftModel.from_pretrained(base, tmp_path, **given)
        assert {name: type(module) for name, module in base.named_modules()} == tree
        assert same_weights(base_weights(base), base_weights(llama()))
    other = train(adapted(), 3)
    before, weights = logits(other), base_weights(other)
    for name in ("second", "default"):
        with pytest.raises(ValueError, match=MESSAGES[what]):
            other.load_adapter(tmp_path, name)
        assert list(other.peft_config) == ["default"]
        assert torch.equal(logits(other), before) and same_weights(base_weights(other), weights)


def test_export_and_conversion_to_lora(tmp_path):
    model = train(adapted(target_modules=["down_proj"], rank_pattern={"layers.0.mlp.down_proj": 1}))
    export_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert loaded.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert (logits(model) - logits(llama())).abs().max() > 1e-3
    with pytest.raises(ValueError, match="rank must be None"):
        export_lora(model, tmp_path, rank=2)
    dense = train(adapted())
    with pytest.raises(ValueError, match="no longer of low rank"):
        export_lora(dense, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    lora_config, state = convert_to_lora(dense, 16)
    lora = get_peft_model(llama(), lora_config).eval()
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(logits(lora), logits(dense), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ training


class Tokens(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        ids = torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def trainer(folder, net, accumulate=2, **arguments):
    """12 batches, 6 steps per epoch with accumulation, 3 epochs."""
    settings = dict(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=accumulate,
        num_train_epochs=3, learning_rate=1e-2, weight_decay=0.0, save_strategy="steps", save_steps=1,
        logging_steps=100, report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
    )  # fmt: skip
    args = TrainingArguments(**{**settings, **arguments})
    return Trainer(model=net, args=args, train_dataset=Tokens(), callbacks=[PeftFusedCallback()])


def everything(net):
    states = {name: layer.rosa_state["default"].get_extra_state() for name, layer in layers(net).items()}
    return states | {name: p.detach().clone() for name, p in net.named_parameters()}


def test_a_run_by_epochs_that_is_resumed_equals_the_straight_one_bit_for_bit(tmp_path):
    """Resumed within a phase, and at its end, before the next one's draw."""
    straight = adapted(resample_every="epoch")
    trainer(tmp_path / "straight", straight).train()
    expected = everything(straight)
    phases = {layer.rosa_state["default"].phase for layer in layers(straight).values()}
    assert phases == {2}
    for step in (4, 6, 14):
        resumed = adapted(resample_every="epoch")
        run = trainer(tmp_path / "resumed", resumed)
        run.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
        assert run.state.global_step == 18
        assert same_weights(everything(resumed), expected)


class Stream(IterableDataset):
    """Passes of 6 micro-batches. alike: every one the same, so that a run does not depend on where in a pass it is."""

    def __init__(self, alike=False):
        self.alike = alike

    def __iter__(self):
        data = Tokens()
        return iter([data[0 if self.alike else i] for i in range(12)])


class Phases(TrainerCallback):
    def __init__(self):
        self.seen = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.seen[state.global_step] = {layer.rosa_state["default"].phase for layer in layers(model).values()}


def stream_run(folder, stream, accumulate, resume=None, max_steps=14):
    net, phases = adapted(resample_every="epoch"), Phases()
    run = trainer(folder, net, accumulate, max_steps=max_steps)
    run.train_dataset = stream
    run.add_callback(phases)
    run.train(resume_from_checkpoint=resume)
    return net, phases.seen


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_passes_of_a_stream_are_counted_and_a_resumed_run_equals_the_straight_one(tmp_path, accumulate):
    per_pass = 6 // accumulate
    straight, seen = stream_run(tmp_path / "straight", Stream(), accumulate)
    assert seen == {step: {step // per_pass} for step in range(14)}
    # At the ends of passes, where the Trainer finds the data again, and within the first.
    for step in (per_pass - 1, per_pass, 2 * per_pass):
        resume = str(tmp_path / "straight" / f"checkpoint-{step}")
        resumed, again = stream_run(tmp_path / "resumed", Stream(), accumulate, resume)
        assert again == {at: phases for at, phases in seen.items() if at >= step}
        assert same_weights(everything(resumed), everything(straight))


def test_a_stream_resumed_anywhere_draws_at_the_same_steps(tmp_path):
    """Within a later pass the Trainer does not find the data again, so it is alike everywhere here."""
    straight, seen = stream_run(tmp_path / "straight", Stream(alike=True), 2)
    for step in range(1, 14):
        resume = str(tmp_path / "straight" / f"checkpoint-{step}")
        resumed, again = stream_run(tmp_path / "resumed", Stream(alike=True), 2, resume)
        assert again == {at: phases for at, phases in seen.items() if at >= step}
        assert same_weights(everything(resumed), everything(straight)), step
    # And what was resumed within a pass can be resumed again.
    stream_run(tmp_path / "twice", Stream(alike=True), 2, str(tmp_path / "straight" / "checkpoint-4"))
    resume = str(tmp_path / "twice" / "checkpoint-8")
    resumed, again = stream_run(tmp_path / "thrice", Stream(alike=True), 2, resume)
    assert again == {at: phases for at, phases in seen.items() if at >= 8}
    assert same_weights(everything(resumed), everything(straight))


def test_a_second_run_of_a_trainer_counts_anew(tmp_path):
    net, phases = adapted(resample_every="epoch"), Phases()
    run = trainer(tmp_path, net, 2, max_steps=7, save_strategy="no")
    run.train_dataset = Stream()
    run.add_callback(phases)
    run.train()
    assert phases.seen[6] == {2}
    run.train()  # on the same adapter, which goes on from the phase it has
    assert phases.seen == {0: {2}, 1: {2}, 2: {2}, 3: {3}, 4: {3}, 5: {3}, 6: {4}}


# ------------------------------------------------------------------------------------------------------------- refusals


def test_tied_weights_are_refused_by_name():
    base = llama(tie_word_embeddings=True)
    before = base_weights(base)
    with pytest.raises(ValueError, match=r"target module 'lm_head' shares its weight with 'model.embed_tokens'"):
        adapted(base, target_modules=["q_proj", "lm_head"])
    assert same_weights(base_weights(base), before) and not layers(base)
    assert layers(adapted(base, target_modules=["q_proj"]))


class Pair(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.a.weight, self.b.weight = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x):
        return self.b(self.a(x))


def test_weights_in_one_memory_are_tied():
    memory = torch.randn(16, 8)
    before = memory.clone()
    for a, b in ((memory[:8], memory[:8]), (memory[:8], memory[:8].T), (memory[4:12], memory[8:])):
        with pytest.raises(ValueError, match="target module 'a' shares its weight with 'b'"):
            get_peft_model(Pair(a, b), RosaConfig(r=2, target_modules=["a"]))
    buffer = nn.Sequential(nn.Linear(8, 8), nn.Module())
    buffer[1].register_buffer("copy", buffer[0].weight.data)
    with pytest.raises(ValueError, match="target module '0' shares its weight with '1'"):
        get_peft_model(buffer, RosaConfig(r=2, target_modules=["0"]))
    assert torch.equal(memory, before)
    # Beside each other they are not.
    pair, x = Pair(memory[:8], memory[8:]), torch.randn(2, 8)
    y = pair(x).detach()
    model = get_peft_model(pair, RosaConfig(r=2, target_modules=["a", "b"]))
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-5)
    assert not torch.equal(memory[:8], before[:8]) and not torch.equal(memory[8:], before[8:])


def test_weights_that_are_not_dense_or_no_parameters_are_refused():
    expanded = Pair(torch.randn(1, 8).expand(8, 8), torch.randn(8, 8))
    with pytest.raises(ValueError, match="target module 'a': elements of the weight share memory"):
        get_peft_model(expanded, RosaConfig(r=2, target_modules=["a"]))
    for computed in (parametrizations.weight_norm, lambda m: prune.l1_unstructured(m, "weight", amount=0.5)):
        net, x = Pair(torch.randn(8, 8), torch.randn(8, 8)), torch.randn(2, 8)
        computed(net.a)
        y, tree = net(x), [type(m) for m in net.modules()]
        with pytest.raises(TypeError, match=r"target module 'a': the weight of this \w+ is no parameter but computed"):
            get_peft_model(net, RosaConfig(r=2, target_modules=["a"]))
        assert torch.equal(net(x), y) and [type(m) for m in net.modules()] == tree


class Int8(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.weight = nn.Parameter(self.weight.data.mul(100).to(torch.int8), requires_grad=False)


def test_weights_that_cannot_be_changed_are_refused():
    with pytest.raises(TypeError, match=r"target module '0'.*Int8 is quantised.*torch.int8.*in place"):
        get_peft_model(nn.Sequential(Int8(6, 5)), RosaConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"target module '0'.*no values"):
        get_peft_model(nn.Sequential(nn.Linear(6, 5, device="meta")), RosaConfig(r=2, target_modules=["0"]))


def test_a_failing_start_gives_back_every_weight(monkeypatch):
    base = llama()
    base.model.layers[1].self_attn.q_proj.weight.data[0, 0] = torch.nan
    before = {name: type(m) for name, m in base.named_modules()}
    with pytest.raises(ValueError, match=r"target module 'model.layers.1.self_attn.q_proj': .*not finite"):
        adapted(base)
    assert {name: type(m) for name, m in base.named_modules()} == before
    base.model.layers[1].self_attn.q_proj.weight.data.copy_(llama().model.layers[1].self_attn.q_proj.weight)
    assert same_weights(base_weights(base), base_weights(llama()))

    model = train(adapted())
    weights, second, calls = base_weights(model), config(seed=2), []
    start = RosaPeftLinear.start

    def failing(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 3:
            raise RuntimeError("no convergence")
        start(self, *args, **kwargs)

    monkeypatch.setattr(RosaPeftLinear, "start", failing)
    with pytest.raises(RuntimeError, match="no convergence"):
        model.add_adapter("second", second)
    assert list(model.peft_config) == ["default"] and same_weights(base_weights(model), weights)
    calls.clear()
    with pytest.raises(RuntimeError, match="no convergence"):
        adapted(base)
    assert not layers(base) and same_weights(base_weights(base), base_weights(llama()))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, r"r must be in 1\.\.256, got 0"),
        ({"r": 1.5}, ValueError, r"r must be an int, or a fraction in \(0, 1\), got 1\.5"),
        ({"rank_pattern": {"q_proj": 0}}, ValueError, r"rank_pattern\['q_proj'\] must be in"),
        ({"rank_pattern": [4]}, TypeError, "rank_pattern must be a dict or None, got list"),
        ({"split": "usv"}, ValueError, "split must be one of"),
        ({"sample": "largest"}, ValueError, "sample must be one of"),
        ({"resample_every": 1.5}, TypeError, "resample_every must be an int, got 1.5"),
        ({"resample_every": "step"}, ValueError, "resample_every must be 'epoch' or a number of steps"),
        ({"seed": "x"}, TypeError, "seed must be an int"),
        ({"bias": "lora_only"}, ValueError, "bias must be one of 'none', 'all', 'rosa_only'"),
    ],
)
def test_bad_configurations_are_named(options, error, message):
    with pytest.raises(error, match=message):
        config(**options)


def test_a_rank_above_a_targets_size_names_the_target():
    base = llama()
    with pytest.raises(
        ValueError, match=r"target module 'model.layers.0.self_attn.v_proj': r must be in 1\.\.8 .* got 9"
    ):
        adapted(base, r=9, target_modules=["q_proj", "v_proj"])
    assert same_weights(base_weights(base), base_weights(llama())) and not layers(base)


def test_training_by_epochs_needs_the_epoch():
    model = adapted(resample_every="epoch")
    with pytest.raises(ValueError, match="epoch must be passed to on_step"):
        on_step(model, step=0)
