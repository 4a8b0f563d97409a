"""Every method in two processes against one process on the joint batch, in float64."""

import re

import cases
import contract
import pytest

METHODS = list(cases.METHODS)
SCHEDULED = [variant.name for variant in contract.VARIANTS if variant.method.schedule]
SEEDED = [v.name for v in contract.VARIANTS if v.method.schedule and hasattr(v.config(), "seed")]
# What freezes in training is then unused: see test_aflora_needs_a_reducer_that_looks.
FREEZES = [v.name for v in contract.VARIANTS if cases.frozen(contract.midway(v))]


@pytest.mark.parametrize(
    ("method", "find_unused"),
    [(method, find_unused) for method in METHODS for find_unused in (True, False)
     if find_unused or method not in FREEZES],
)  # fmt: skip
def test_ddp_equals_one_process(processes, method, find_unused):
    found = processes("ddp", method=method, find_unused=find_unused)
    assert found[0] == found[1] and found[0]["moved"] >= 4
    assert (found[0]["frozen"] > 0) == (method in FREEZES)


@pytest.mark.parametrize("method", SCHEDULED)
def test_accumulated_steps_equal_one_process(processes, method):
    found = processes("ddp", method=method, find_unused=True, accumulate=2)
    assert found[0]["moved"] >= 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("unit", ["parent", "own"])
def test_fsdp2_equals_one_process(processes, method, unit):
    found = processes("fsdp2", method=method, unit=unit)
    assert found[0] == found[1] and found[0]["moved"] >= 4
    assert (found[0]["frozen"] > 0) == (method in FREEZES)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "lora"])
def test_what_fsdp2_saves_loads_without_it(processes, method):
    assert max(processes("saved_and_loaded", method=method, unit="parent")) < 1e-6  # files hold fp32 of a bf16 base


@pytest.mark.parametrize("method", SCHEDULED)
def test_a_resumed_run_equals_the_straight_one(processes, method):
    processes("resumed", method=method)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
@pytest.mark.parametrize("method", SEEDED)
def test_processes_of_different_seeds_are_told(processes, method, wrap):
    for message in processes("other_seed_is_caught", method=method, wrap=wrap):
        assert (
            f"differ from process 0 in what {cases.REGISTRATIONS[method].name} chose" in message and "seed" in message
        )


@pytest.mark.parametrize(
    ("what", "message"),
    [("value", "in the values of .*dylora_B"), ("rank", "in what dylora chose"), ("layers", "different adapters")],
)
def test_check_sync_finds_a_process_that_strayed(processes, what, message):
    for text in processes("strays_are_caught", what=what):
        assert re.search(message, text), text
    assert processes("strays_are_caught", what="nothing") == ["nothing", "nothing"]


def test_processes_of_different_lengths_are_told(processes):
    for message in processes("other_total_is_caught"):
        assert "differ from process 0 in the arguments of on_step" in message and "total_steps" in message


def test_check_sync_answers_where_one_process_trains_nothing(processes):
    for message in processes("one_trains_nothing"):
        assert "different adapters" in message


def test_aflora_needs_a_reducer_that_looks(processes):
    for message in processes("refuses_static_reducer"):
        assert "find_unused_parameters=True" in message


def test_subspaces_are_computed_once(processes):
    first, second = processes("subspaces_come_from_process_0")
    assert first == 8 and second == 0  # 4 layers at steps 2 and 4
