"""Every method in two processes against one process on the joint batch, in float64."""

import re

import pytest

METHODS = ["lora", "dylora", "surm", "adamix", "adamix_lora", "adamix_sequence", "aflora", "rosa"]


@pytest.mark.parametrize(
    ("method", "find_unused"),
    # What AFLoRA freezes is unused: see test_aflora_needs_a_reducer_that_looks.
    [(method, find_unused) for method in METHODS for find_unused in (True, False) if find_unused or method != "aflora"],
)
def test_ddp_equals_one_process(processes, method, find_unused):
    found = processes("ddp", method=method, find_unused=find_unused)
    assert found[0] == found[1] and found[0]["moved"] >= 4
    assert (found[0]["frozen"] > 0) == (method == "aflora")


@pytest.mark.parametrize("method", ["dylora", "adamix", "aflora", "rosa"])
def test_accumulated_steps_equal_one_process(processes, method):
    found = processes("ddp", method=method, find_unused=True, accumulate=2)
    assert found[0]["moved"] >= 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("unit", ["parent", "own"])
def test_fsdp2_equals_one_process(processes, method, unit):
    found = processes("fsdp2", method=method, unit=unit)
    assert found[0] == found[1] and found[0]["moved"] >= 4
    assert (found[0]["frozen"] > 0) == (method == "aflora")


@pytest.mark.parametrize("method", [m for m in METHODS if m != "lora"])
def test_what_fsdp2_saves_loads_without_it(processes, method):
    assert max(processes("saved_and_loaded", method=method, unit="parent")) < 1e-6  # files hold fp32 of a bf16 base


@pytest.mark.parametrize("method", ["dylora", "adamix", "aflora", "rosa"])
def test_a_resumed_run_equals_the_straight_one(processes, method):
    processes("resumed", method=method)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
@pytest.mark.parametrize("method", ["dylora", "adamix", "rosa"])
def test_processes_of_different_seeds_are_told(processes, method, wrap):
    for message in processes("other_seed_is_caught", method=method, wrap=wrap):
        assert f"differ from process 0 in what {method} chose" in message and "seed" in message


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
