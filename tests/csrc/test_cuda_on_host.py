"""The device that test_lowrank.py and test_fft.py run on: what it computes, and that it sees what it has to see."""

import pytest
import torch
from cuda_on_host import HERE, ORDERS, DeviceError, Memory, Unit, bits, translate

INVALID_VALUE, INVALID_CONFIGURATION, ILLEGAL_ADDRESS, LAUNCH_FAILURE = 1, 9, 700, 719


@pytest.fixture
def library(compiled):
    return compiled(Unit(HERE / "probe.cu"))


def probe(
    library, name, source=None, *, grid=(1, 1, 1), threads=64, rows=1, shared=0, argument=0, size=None, writable=False
):
    """The `size` floats that a kernel of probe.cu writes; one per thread if not told."""
    memory = Memory(at_end=True)
    source = torch.arange(64.0) if source is None else source
    source, out = memory.lend(source, writable), memory.result(1, threads if size is None else size, torch.float32)
    library("probe", name.encode(), source, out, *grid, threads, rows, shared, argument)
    memory.check()
    return out[0]


@pytest.fixture(params=ORDERS)
def ordered(request, library):
    library.set_order(ORDERS[request.param])
    return library


def refusal(code, words=""):
    return pytest.raises(DeviceError, match=f"^{code}: .*{words}")


def test_every_thread_of_every_block_runs(ordered):
    out = probe(ordered, "number", grid=(5, 3, 2), threads=6, rows=7, size=5 * 3 * 2 * 6 * 7)
    assert torch.equal(out, torch.arange(len(out), dtype=torch.float32))


def test_shared_memory(ordered):
    source = torch.randn(100)
    assert torch.equal(probe(ordered, "rotate", source, threads=100, shared=400, argument=1), source.roll(-1))


def test_what_nobody_has_written_is_nan(ordered):
    assert probe(ordered, "unwritten", shared=256).isnan().all()
    assert probe(ordered, "uninitialised").isnan().all()


def test_a_race_shows(library):
    source, threads, blocks = torch.randn(64), {}, {}
    for name, order in ORDERS.items():
        library.set_order(order)
        threads[name] = bits(probe(library, "rotate", source, shared=256))
        blocks[name] = probe(library, "last_block", grid=(3, 1, 1))
    assert not torch.equal(threads["forwards"], threads["backwards"])
    assert not torch.equal(threads["forwards"], threads["shuffled"])
    assert (blocks["forwards"] == 2).all() and (blocks["backwards"] == 0).all()


def test_collectives(ordered):
    source = torch.randn(64)
    want = source
    for offset in (16, 8, 4, 2, 1):
        want = want + want.view(-1, 32)[:, torch.arange(32) ^ offset].flatten()
    assert torch.equal(probe(ordered, "sum", source, argument=-1), want)
    lanes = torch.arange(64.0).view(2, 32)
    assert torch.equal(probe(ordered, "reduce"), (lanes.amax(1) * 1000 + lanes.sum(1)).repeat_interleave(32))


def test_a_missing_lane_is_an_error(ordered):
    with refusal(LAUNCH_FAILURE, "others never reach"):
        probe(ordered, "sum", argument=37)
    with refusal(LAUNCH_FAILURE, "others never reach"):
        probe(ordered, "sum", threads=40, argument=-1)
    with refusal(LAUNCH_FAILURE, "others never reach"):
        probe(ordered, "diverged", argument=1)
    with refusal(LAUNCH_FAILURE, "different collectives"):
        probe(ordered, "diverged")
    with refusal(LAUNCH_FAILURE, "leaves out a lane that calls it"):
        probe(ordered, "half_warp", argument=0)
    with refusal(LAUNCH_FAILURE, "reads a lane that takes no part"):
        probe(ordered, "half_warp", argument=1)
    even = torch.arange(0, 64, 2)
    assert torch.equal(probe(ordered, "half_warp", argument=2)[even], (even ^ 2).float())


def test_threads_that_have_left_do_not_hold_up_a_barrier(ordered):
    out = probe(ordered, "leave", torch.zeros(64), writable=True)
    assert out[:5].isnan().all() and (out[5:] == 7).all()


def test_bad_accesses_are_errors(ordered):
    assert (probe(ordered, "read_at", argument=63) == 63).all()
    for at in (64, 99999, -1025):
        with refusal(ILLEGAL_ADDRESS, "no access"):
            probe(ordered, "read_at", argument=at)
    with refusal(ILLEGAL_ADDRESS, "thread 63, no access"):
        probe(ordered, "past_shared", shared=256, argument=1)
    with refusal(ILLEGAL_ADDRESS, "thread 5, no access"):
        probe(ordered, "leave")  # its input is not writable
    assert (probe(ordered, "read_four", argument=4) == 7).all()
    with refusal(LAUNCH_FAILURE, "misaligned"):
        probe(ordered, "read_four", argument=1)
    assert (probe(ordered, "overflow", argument=4) == 4e9).all()
    with refusal(LAUNCH_FAILURE, "undefined"):
        probe(ordered, "overflow", argument=5)


@pytest.mark.parametrize("at_end", [False, True])
def test_memory_is_that_of_the_view_alone(at_end):
    memory = Memory(at_end)
    wide = torch.randn(4, 9).half()
    lent = memory.lend(wide[:, 3:])
    assert torch.equal(lent, wide[:, 3:]) and lent.stride() == (9, 1) and lent.data_ptr() % 16 == 6
    whole = lent.as_strided((3 * 9 + 6,), (1,))
    assert whole.isnan().sum() == 3 * 3
    edge = whole.data_ptr() + 2 * len(whole) if at_end else lent.data_ptr() - 6
    assert edge % 16 == 2 * (3 * 9 + 9) % 16 if at_end else edge % 4096 == 0
    out = memory.result(3, 5, torch.float16, stride=7, unaligned=3)
    assert out.stride() == (7, 1) and out.data_ptr() % 16 == 6 and out.isnan().all()
    out.fill_(1)
    memory.check()
    out.as_strided((3, 7), (7, 1), out.storage_offset())[1, 6] = 1
    with pytest.raises(AssertionError, match="beside its output"):
        memory.check()


@pytest.mark.parametrize(
    ("code", "launch"),
    [
        (INVALID_CONFIGURATION, {"threads": 1025}),
        (INVALID_CONFIGURATION, {"threads": 0}),
        (INVALID_CONFIGURATION, {"grid": (0, 1, 1)}),
        (INVALID_CONFIGURATION, {"grid": (1, 65536, 1)}),
        (INVALID_CONFIGURATION, {"grid": (1, 1, 65536)}),
        (INVALID_CONFIGURATION, {"grid": (-(2**31), 1, 1)}),
        (INVALID_VALUE, {"shared": 49153}),
    ],
    ids=str,
)
def test_refused_launches(library, code, launch):
    with refusal(code):
        probe(library, "leave", **launch)


def test_shared_memory_has_to_be_opted_in_to(library):
    for allowed in (60000, 166912):
        library("opt_in", b"unwritten", allowed)
        assert probe(library, "unwritten", threads=1024, shared=allowed).isnan().all()
        with refusal(INVALID_VALUE, "too much shared memory"):
            probe(library, "unwritten", shared=allowed + 1)
    for refused in (-1, 166913):
        with pytest.raises(DeviceError, match=f"^{INVALID_VALUE}: "):
            library("opt_in", b"unwritten", refused)


@pytest.mark.parametrize(("name", "dtype"), [("to_half", torch.float16), ("to_bf16", torch.bfloat16)])
def test_conversions_are_those_of_torch(library, name, dtype):
    """Of every number of the type, of what lies halfway between neighbours, and a little beside that."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    halfway = (every.double() + every.roll(1).double()).div(2).float()
    infinity = torch.full((), float("inf"))
    source = torch.cat([every, halfway, halfway.nextafter(infinity), halfway.nextafter(-infinity)])
    out = probe(library, name, source, argument=len(source), size=len(source))
    want = source.to(dtype).float()
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(bits(out)[~want.isnan()], bits(want)[~want.isnan()])  # and the sign of zero


def test_a_launch_that_is_not_recognised_is_an_error():
    launch = "k<A, 3><<<f<B>(n), 32, 0, s>>>(g(a), b);"
    assert translate(launch) == "cuda_on_host::Launch(f<B>(n), 32, 0, s)(k<A, 3>, g(a), b);"
    with pytest.raises(AssertionError, match="not recognised"):
        translate("(k)<<<1, 32>>>(a);")
