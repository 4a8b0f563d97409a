"""Training on a CUDA device by every method: as on a CPU, without making the host wait, and in CUDA graphs."""

import sys
from contextlib import nullcontext
from pathlib import Path

import contract
import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch._inductor import config as inductor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import peft_fused
from peft_fused.layers import AdaMixLinear, DyLoraLinear, SurmAdapterLinear
from peft_fused.methods.schedule import members_of

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
import cases

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# None is the automatic choice.
every_backend = pytest.mark.parametrize("backend", [None, "triton"], ids=["automatic", "triton"])
every_method = pytest.mark.parametrize("method", cases.METHODS)
# Every variant that a registration names, with dropout if it has that, and options that take other paths.
VARIANTS = {
    "lora": {"lora_dropout": 0.1},
    **{variant.name: variant.dropout for variant in contract.VARIANTS},
    "dylora, strict": {"frozen": True, "strict_frozen": True},
    "surm, adapter": {"kind": "adapter", "structure": "circulant"},
    "adamix, strict": {"strict_experts": True},
    "aflora": {"lora_dropout": 0.1, "t_i": 6, "t_f": 2, "window": 2},
    "rosa": {"resample_every": 4},
}


def build(variant, **options):
    return cases.build(variant.split(",")[0], **VARIANTS[variant] | options).to(DEVICE)


def on_device(batch):
    return tuple(tensor.to(DEVICE) for tensor in batch)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def tell(model, step, optimizer):
    peft_fused.on_step(model, step=step, total_steps=cases.TOTAL, epoch=step, optimizer=optimizer)


def loss_of(model, x, labels):
    if "adamix" in members_of(model):
        return peft_fused.adamix_loss(model, {"x": x, "labels": labels}, weight=0.5)[0]
    return model(x, labels)["loss"]


def decides(variant, step):
    """Whether the schedule reads scores or draws a subspace in a step, for which the host has to wait."""
    return {"aflora": 6 < step <= 10 and step % 2 == 0, "rosa": step % 4 == 0}.get(variant, False)


@every_backend
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_host_sync_in_training(variant, autocast, backend, no_sync):
    """Schedule, loss, backward, clipping and optimizer, after two steps in which state and kernels are made."""
    model = build(variant)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3, fused=True)
    batches = [on_device(cases.batch(step)) for step in range(cases.TOTAL)]
    for step, batch in enumerate(batches):
        waits = step < 2 or decides(variant, step)
        with peft_fused.use_backend(backend), nullcontext() if waits else no_sync():
            tell(model, step, optimizer)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
                loss = loss_of(model, *batch)
            loss.backward()
            nn.utils.clip_grad_norm_(trained(model), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert all(p.isfinite().all() for p in model.parameters())
    assert variant != "aflora" or cases.frozen(model) == 8


@every_backend
@every_method
def test_trains_as_on_a_cpu(method, backend):
    """The same adapter, by what it computes: subspaces have no sign."""
    x, _ = cases.batch(99)
    found = []
    for device, name in (("cpu", None), (DEVICE, backend)):
        model = cases.build(method).to(device)
        with peft_fused.use_backend(name):
            before = model.eval()(x.to(device))["logits"].detach()
            cases.train(model.train(), method, lambda t, device=device: t.to(device))
            after = model.eval()(x.to(device))["logits"].detach()
        assert (after - before).abs().max() > 0.05
        found.append((before.cpu(), after.cpu(), torch.tensor(cases.frozen(model))))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


@every_method
def test_adapts_a_model_that_is_on_the_device(method):
    model = get_peft_model(cases.Net().to(DEVICE), cases.METHODS[method]())
    if method == "lora":
        peft_fused.accelerate(model)
    assert all(t.device.type == DEVICE for t in (*model.parameters(), *model.buffers()))
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    tell(model, 0, optimizer)
    loss_of(model, *on_device(cases.batch(0))).backward()
    assert all(p.grad.isfinite().all() for p in trained(model))


@every_backend
@every_method
def test_a_cuda_graph_of_a_step_follows_the_schedule(method, backend, capture):
    """Ranks, experts and subspaces change between replays; their tensors stay where they are."""
    model = cases.build(method).to(DEVICE)
    parameters = trained(model)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    x, labels = on_device(cases.batch(0))

    def step():
        loss = model(x, labels)["loss"]
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    with peft_fused.use_backend(backend):
        tell(model, 0, optimizer)
        replay, found = capture(step)
        for i in range(1, 5):
            tell(model, i, optimizer)
            x.copy_(on_device(cases.batch(i))[0])
            replay()
            for a, b in zip(found, step(), strict=True):
                assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-6


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("variant", [name for name, options in VARIANTS.items() if "dropout" in "".join(options)])
def test_checkpointed_gradients_are_the_same_to_the_bit(variant, reentrant):
    model = build(variant)
    tell(model, 0, torch.optim.SGD(trained(model), lr=0.1))
    x = on_device(cases.batch(0))[0].requires_grad_()

    def gradients(forward, seed=3):
        model.zero_grad()
        torch.manual_seed(seed)
        forward(x).square().mean().backward()
        return [p.grad.clone() for p in trained(model)]

    forward = lambda x: model(x)["logits"]  # noqa: E731
    plain, other = gradients(forward), gradients(forward, seed=4)
    again = gradients(lambda x: checkpoint(forward, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize("make", [DyLoraLinear, AdaMixLinear, SurmAdapterLinear], ids=lambda make: make.__name__)
def test_layers_compile_into_one_graph_for_all_choices(make):
    layer = make.from_linear(nn.Linear(96, 80)).to(DEVICE)
    for parameter in trained(layer):
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(67, 96, device=DEVICE, requires_grad=True)
    inputs = [x, *trained(layer)]
    compiled = torch.compile(layer, fullgraph=True)

    def check(step):
        peft_fused.on_step(layer, step=step)
        results = [(y, *torch.autograd.grad(y.sum(), inputs)) for y in (compiled(x), layer(x))]
        for a, b in zip(*results, strict=True):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-6

    with inductor.patch(compile_threads=1):  # no pool of processes for each one that runs tests
        check(0)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(1, 6):
            check(step)


class Rows(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        ids = torch.randint(1, 40, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": i % 3}


class AdaMixTrainer(peft_fused.AdaMixTrainerMixin, Trainer):
    pass


@every_method
def test_trainer(method, tmp_path):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    base = BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=3, **sizes))
    config = cases.METHODS[method]()
    config.target_modules, config.modules_to_save = ["intermediate.dense", "output.dense"], ["classifier"]
    model = get_peft_model(base, config)
    callbacks = [peft_fused.PeftFusedCallback()]
    if method == "lora":
        peft_fused.accelerate(model)
    if method in ("lora", "surm"):
        callbacks = []
    before = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=12, learning_rate=1e-2, bf16=True,
        save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    kind = AdaMixTrainer if method.startswith("adamix") else Trainer
    result = kind(model=model, args=arguments, train_dataset=Rows(), callbacks=callbacks).train()
    after = dict(model.named_parameters())
    assert all(after[name].device.type == DEVICE and after[name].isfinite().all() for name in before)
    assert all(not torch.equal(after[name].cpu(), value) for name, value in before.items())
    assert 0 < result.training_loss < 3
