"""The measurements of parts: rows and what is derived in them, budget, errors, and the GPU's grid without a GPU."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from peft_fused.bench import part_groups, parts, roofline
from peft_fused.bench.part_groups import CUDA, PARTS, TINY, Call, Entry, Work, groups
from peft_fused.bench.shapes import BF16, Shape
from peft_fused.bench.timing import CudaClock, Times
from peft_fused.triton_kernels.problem import Gpu

from peft_fused.ops import structured

CPU = torch.device("cpu")
CEILINGS = roofline.Ceilings(copy_gb_s=2000.0, gemm_gflop_s={"float32": 100.0, "bfloat16": 1000.0, "float16": 1000.0})
WORK = Work(8e6, 3e9, torch.float32)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Of a whole run, without Triton."""
    folder = tmp_path_factory.mktemp("parts")
    assert parts.main(["cpu", "--out", str(folder), "--seconds", "600"]) == 0
    return read(folder / "parts.jsonl")


def interpreted(path: Path, *chosen: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """A run in Triton's interpreter, which takes a process of its own."""
    command = [sys.executable, "-P", "-m", "peft_fused.bench.parts", "cpu", "--out", str(path), "--seconds", "600"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--only", *chosen], env=environment, capture_output=True, text=True)
    return done, read(path)


# ---------------------------------------------------------------------------------------------------------------- rows


def check_rows(rows: list[dict]) -> None:
    """Every row is well-formed, and what follows from other numbers does."""
    for row in rows:
        assert list(row)[: len(parts.FIELDS)] == list(parts.FIELDS)
        assert row.keys() - set(parts.FIELDS) <= {"note", "skipped", "error", "about"}
        told = [
            row["us"] is not None,
            row["gb_s"] is not None,
            row["tflop_s"] is not None,
            "skipped" in row,
            "error" in row,
        ]
        assert any(told) or "about" in row
        if row["us"] is None:
            continue
        assert row["us"] > 0 and row["iqr_us"] >= 0
        if row["bytes"] is not None:
            assert row["gb_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3, rel=1e-3)
            assert row["tflop_s"] == pytest.approx(row["flops"] / row["us"] / 1e6, rel=1e-3)
            assert row["share_of_ceiling"] == pytest.approx(row["predicted_us"] / row["us"], rel=1e-3)
        assert (row["ratio"] is None) == (row["against"] is None)
        if row["against"]:
            others = [
                other for other in rows
                if all(other[key] == row[key] for key in ("part", "shape", "dtype")) and other["what"] == row["against"]
            ]  # fmt: skip
            assert len(others) == 1 and others[0]["us"] is not None and others[0] is not row


def names(rows: list[dict], state: str = "us") -> set[str]:
    """What there is a time of, or another state."""
    return {row["what"] for row in rows if row.get(state) is not None}


def test_every_part_has_its_rows_in_order(rows):
    check_rows(rows)
    assert "about" in rows[0] and rows[0]["about"]["versions"]["torch"] == torch.__version__
    order = list(dict.fromkeys(row["part"] for row in rows[1:]))
    assert order == list(PARTS) == list(parts.SHARES)
    found = {(row["part"], row["what"].split(":")[0], row["shape"]) for row in rows}
    assert {(p, group.what, group.shape) for p in PARTS for group in groups(p, TINY, CPU)} <= found


def test_without_a_gpu_what_needs_one_says_why_it_is_left_out(rows):
    assert not names(rows, "error")
    skipped = {row["what"]: row["skipped"] for row in rows if "skipped" in row}
    for what, why in (
        ("linear: single kernel", "TRITON_INTERPRET=1"),
        ("grad_b: one pass", "TRITON_INTERPRET=1"),
        ("bottleneck: triton", "TRITON_INTERPRET=1"),
        ("dropout: thin op, cuda", "CUDA"),
        ("host: cuda", "CUDA"),
        ("graph torch: torch", "CUDA"),
    ):
        assert why in skipped[what] or "the plan has none" in skipped[what]
    measured = {"gemm: beta 1", "shrink: torch", "host: torch, Python node, both", "circulant: dense, backward"}
    measured |= {"dylora: rank 1, both", "bottleneck experts: 16 experts, both", "q/k/v of lora: one pass, both"}
    assert measured <= names(rows)


def test_ceilings_come_first(rows):
    copy, *gemms = rows[1:4]
    assert copy["what"] == "copy" and copy["gb_s"] > 0.1
    assert [row["dtype"] for row in gemms] == ["fp32", "fp16"] and all(row["tflop_s"] > 0 for row in gemms)


def test_kernels_run_in_the_interpreter(tmp_path):
    """With the launchers' arguments as they are on a GPU, and results that are checked."""
    triton, numpy = (pytest.importorskip(name) for name in ("triton", "numpy"))
    if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
        pytest.skip("that interpreter needs an older numpy, or mending as in tests/triton_kernels/conftest.py")
    done, rows = interpreted(tmp_path / "rows", *(part for part in PARTS if part not in ("ceilings", "methods")))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    check_rows(rows)
    kernels = {
        "linear: single kernel", "linear: adapter first", "shrink: triton", "shrink: thin op, triton", "expand: triton",
        "grad_b: two passes", "grad_b: one pass", "grad_a: apart", "grad_a: fused", "bottleneck: triton",
        "bottleneck_bwd: triton", "dropout: shrink, dropout", "dropout: grad_a, dropout", "host: Triton launcher",
        "host: triton, both", "circulant: triton, forward", "toeplitz: triton, backward",
        "kronecker: triton, both",
    }  # fmt: skip
    assert kernels <= names(rows)
    assert "one pass" in done.stdout


# --------------------------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize(
    ("work", "us"),
    [
        (Work(8e6, 0, torch.float32), 4.0),  # 8 MB at 2000 GB/s
        (Work(8e6, 3e9, torch.float32), 3e4),  # 3 GFLOP at 100 GFLOP/s
        (Work(8e6, 3e9, BF16), 3e3),
    ],
)
def test_prediction_is_the_larger_of_traffic_and_arithmetic(work, us):
    found = parts.measured(Times([2 * us / 1e3] * 3), work, CEILINGS)
    assert found["predicted_us"] == pytest.approx(us) and found["share_of_ceiling"] == pytest.approx(0.5)
    assert found["us"] == pytest.approx(2 * us) and found["iqr_us"] == 0
    assert found["gb_s"] == pytest.approx(work.bytes / found["us"] / 1e3)


def test_no_prediction_of_host_time():
    assert parts.measured(Times([0.5]), None, CEILINGS) == {"us": 500.0, "iqr_us": 0.0}


def problem(kind: str, *sizes: int, m: int = 2, dtype: str = "bfloat16") -> structured.StructuredProblem:
    k, n = part_groups.cases.structured_features(kind, sizes)
    return structured.StructuredProblem(m, n, k, dtype, "float32", "cuda", Gpu(), kind, sizes, False)


def test_arithmetic_of_transforms():
    # 32 x 32: a pair of rows takes a transform each way, of 1024 points times 32 + 32 complex multiply-adds.
    once = 2 * 8 * 1024 * (32 + 32)
    forward, backward = part_groups._triton_flops(problem("circulant", 1024))
    assert forward == once
    assert backward == 3 * 1.5 * once, "three transforms, of operands in two halves"
    assert part_groups._triton_flops(problem("circulant", 1024, dtype="float32"))[0] == 3 * once
    assert part_groups._triton_flops(problem("circulant", 1024, m=7))[0] == 4 * once, "pairs, the last one half empty"
    # 8192 in split precision is too large for dx beside the sums: the backward ends with a convolution of its own.
    large = part_groups._triton_flops(problem("circulant", 8192, dtype="float32"))
    assert large[1] > large[0]
    # 3 x 16 x 32: a sum of three rows, and two products.
    assert part_groups._triton_flops(problem("circulant", 1536))[0] == 2 * 8 * 1536 * (16 + 32)
    # 23 x 32 for 500 x 200: neither the 200 inputs nor the 500 outputs fill more than half of 32 leading rows.
    assert structured.plan_structured(problem("toeplitz", 500, 200)).length <= 32 * 32
    assert part_groups._triton_flops(problem("toeplitz", 500, 200))[0] == 2 * 8 * 1024 * (16 + 32)


def test_arithmetic_of_a_kronecker_map():
    # 2 x 3 by 5 x 7: X A^T first is 7 * 3 * 2 + 5 * 7 * 2 multiply-adds a row, B X first 5 * 7 * 3 + 5 * 3 * 2.
    assert part_groups._triton_flops(problem("kronecker", 2, 3, 5, 7, m=10))[0] == 2 * 10 * (42 + 70)


def test_bytes_are_those_of_the_operands():
    shape = Shape(64, 48, 48, 4)
    work = part_groups._shrink(shape, CPU)["torch"].work["forward"]
    assert work.bytes == 4 * (64 * 48 + 4 * 48 + 64 * 4) and work.flops == 2 * 64 * 48 * 4
    work = part_groups._grad_a(shape, CPU)["torch"].work["forward"]
    assert work.bytes == 4 * (2 * 64 * 48 + 2 * 4 * 48 + 64 * 4) and work.flops == 4 * 64 * 48 * 4
    gemm = part_groups._gemm(replace(shape, r=0), CPU)
    assert gemm["beta 1"].work["forward"].bytes - gemm["beta 0"].work["forward"].bytes == 4 * 64 * 48


def test_ceilings_are_measured_on_random_data(monkeypatch):
    copied = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source: copied.append(source) or copy(self, source))
    roofline.measure(CPU, (torch.float32,), repeats=1, size=8)
    assert len(copied[0][:4096].unique()) > 200


def test_ceilings_of_a_gpu_are_timed_by_events_while_it_is_busy(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            self.name = f"event {len(made)}"
            made.append(self)

        def record(self):
            done.append(self.name)

        def synchronize(self):
            done.append(f"wait for {self.name}")

        def elapsed_time(self, end):
            return 5.0

    made = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert roofline._seconds(lambda: done.append("run"), torch.device("cuda")) == 0.005
    assert done == ["run", "event 0", "run", "event 1", "wait for event 1"]


# -------------------------------------------------------------------------------------------------------------- timing


def test_beta_1_accumulates_in_place():
    call = part_groups._gemm(Shape(4, 8, 6, 0), CPU)["beta 1"].variant.run
    first = call().clone()
    second = call()
    product = second - first
    assert torch.equal(call(), second) and torch.allclose(second - first, 2 * product) and product.abs().min() > 0


def test_settings_hold_while_an_entry_is_timed_and_no_longer(monkeypatch):
    seen, active = [], []

    @contextlib.contextmanager
    def settings():
        active.append(1)
        yield
        active.pop()

    def timed(clock, run):
        run()
        return 1.0, None

    entry = Entry(Call(lambda: seen.append(len(active))), {"forward": None}, settings=settings)
    assert set(parts.HostClock().measure(entry)) == {"forward", "backward", "both"}
    monkeypatch.setattr(CudaClock, "__init__", lambda clock, device: None)
    monkeypatch.setattr(CudaClock, "_timed", timed)
    clock = parts.DeviceClock(CPU)
    assert clock.measure(entry) == {"forward": 1.0}, "a kernel has no backward to wait for"
    assert seen == [1, 1] and not active
    both = replace(entry, work=dict.fromkeys(("forward", "backward", "both")))
    assert clock.measure(both) == dict.fromkeys(("forward", "backward", "both"), 1.0)


# ------------------------------------------------------------------------------------------------------ errors, budget


def only(monkeypatch, build, part: str = "dropout", entries: tuple[str, ...] = ("one",)) -> None:
    """Makes a part consist of groups with a builder of a test."""
    monkeypatch.setitem(PARTS, part, {name: lambda shape, device: build() for name in entries})


def call(value: float = 1.0, **more) -> Entry:
    return Entry(Call(lambda: torch.full((4,), value)), {"forward": WORK}, **more)


def broken() -> Entry:
    def fail():
        raise RuntimeError("out of luck\nin two lines")

    return Entry(Call(fail), {"forward": WORK})


def run(tmp_path, *arguments: str) -> tuple[int, list[dict]]:
    path = tmp_path / "rows.jsonl"
    return parts.main(["cpu", "--out", str(path), *arguments]), read(path)


def test_an_error_is_reported_and_the_rest_measured(monkeypatch, tmp_path, capsys):
    wrong, right = call(1.02, equals="good"), call(1.0, equals="good", against="good")
    only(monkeypatch, lambda: {"good": call(), "bad": broken(), "wrong": wrong, "right": right})
    status, rows = run(tmp_path, "--only", "dropout", "host")
    assert status == 1
    check_rows(rows)
    errors = {row["what"]: row["error"] for row in rows if "error" in row}
    assert errors.keys() == {"one: bad", "one: wrong"}
    assert "RuntimeError: out of luck" in errors["one: bad"] and "WrongResult" in errors["one: wrong"]
    assert {"one: good", "one: right", "host: at::addmm"} <= names(rows)
    shown = capsys.readouterr().out
    assert "error in one: bad" in shown and "out of luck" in shown


def test_nothing_is_measured_in_a_lost_context(monkeypatch, tmp_path):
    """An error that the device reports late is that of the entry that made it, and the last."""
    done = []

    def settle():
        if "bad" in done:
            raise RuntimeError("illegal memory access")

    def entry(name):
        return Entry(Call(lambda: done.append(name)), {"forward": WORK})

    monkeypatch.setattr(parts, "_settle", settle)
    only(monkeypatch, lambda: {name: entry(name) for name in ("good", "bad", "next")})
    status, rows = run(tmp_path, "--only", "dropout", "host")
    errors = [(row["what"], row["error"]) for row in rows if "error" in row]
    assert status == 1 and "next" not in done and "host: at::addmm" not in names(rows)
    assert [what for what, _ in errors] == ["one: bad", "one", "one"]
    assert "illegal memory access" in errors[0][1] and "nothing after this" in errors[-1][1]


@pytest.mark.parametrize("late", [False, True])
def test_an_error_of_a_whole_group_is_reported(monkeypatch, tmp_path, late):
    """While its inputs are made, or while it is timed after a first run that went well."""
    left = iter([torch.ones(4)])

    def build():
        if late:
            return {"one": Entry(Call(lambda: next(left)), {"forward": WORK})}
        raise RuntimeError("no inputs")

    only(monkeypatch, build, entries=("one", "two") if not late else ("one",))
    status, rows = run(tmp_path, "--only", "dropout", "host")
    errors = [row for row in rows if "error" in row]
    assert status == 1 and [row["what"] for row in errors] == (["one"] if late else ["one", "two"])
    assert "host: at::addmm" in names(rows)


def test_all_is_well_without_errors(monkeypatch, tmp_path):
    only(monkeypatch, lambda: {"good": call(), "absent": "no such machine"})
    status, rows = run(tmp_path, "--only", "dropout")
    assert status == 0 and names(rows, "skipped") == {"one: absent"}


def test_a_run_that_is_stopped_leaves_what_it_has(monkeypatch, tmp_path, capsys):
    found = set()

    def stop():
        found.update(names(read(tmp_path / "rows.jsonl")))
        raise KeyboardInterrupt

    only(monkeypatch, stop, "host")
    only(monkeypatch, lambda: {"good": call()})
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--only", "dropout", "host")
    assert "one: good" in found, "what is measured is written, not kept for the end"
    assert "good" in capsys.readouterr().out


def test_no_time_leaves_everything_out_and_says_so(tmp_path, capsys):
    status, rows = run(tmp_path, "--seconds", "0")
    assert status == 0 and not names(rows)
    left_out = [row for row in rows if "skipped" in row]
    assert len(left_out) == sum(len(groups(part, TINY, CPU)) for part in PARTS)
    assert {row["skipped"] for row in left_out} == {"the time for this part is spent"}
    assert "the time for this part is spent" in capsys.readouterr().out


class FakeTime:
    def __init__(self):
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_a_part_that_takes_too_long_leaves_the_others_their_share(monkeypatch):
    now = FakeTime()

    def build():
        now.seconds += 4.0
        return {"good": call()}

    monkeypatch.setattr(parts, "SHARES", {"dropout": 1, "host": 2})
    only(monkeypatch, build, entries=("one", "two", "three", "four"))
    only(monkeypatch, build, "host", entries=("five", "six", "seven"))
    found = parts.rows_of(CPU, TINY, CEILINGS, ["dropout", "host"], parts.Budget(15.0, ["dropout", "host"], now))
    states = [(row["what"].split(":")[0], "skipped" in row) for row in found]
    # A third of 15 seconds is 5: the group that begins at 4 is the last. Of the other 7, two begin.
    assert states == list(
        zip(("one", "two", "three", "four", "five", "six", "seven"), (0, 0, 1, 1, 0, 0, 1), strict=True)
    )


def test_what_a_part_leaves_over_goes_to_the_later_ones():
    now = FakeTime()
    budget = parts.Budget(60.0, ["ceilings", "structured"], now)
    assert budget.begin() == pytest.approx(100 + 60 * 3 / 8)
    now.seconds += 10
    assert budget.begin() == pytest.approx(160)


# --------------------------------------------------------------------------------------------------- compiling, output


def test_groups_are_shared_out_for_compiling(monkeypatch):
    ran = []

    def build():
        ran.append("built")
        return {"bad": broken(), "good": Entry(Call(lambda: ran.append("ran")), {}), "absent": "no such machine"}

    only(monkeypatch, build, entries=("one", "two", "three"))
    only(monkeypatch, build, "host", entries=("four", "five"))
    counts = []
    for index in range(2):
        ran.clear()
        assert parts.main(["cpu", "--only", "dropout", "host", "--once", str(index), "2"]) == 0
        assert ran.count("ran") == ran.count("built"), "an entry that fails does not keep the others"
        counts.append(len(ran) // 2)
    assert counts == [3, 2]


def test_kernels_are_compiled_by_processes_within_a_time(monkeypatch, tmp_path):
    started = []

    class Process:
        def __init__(self, command, **options):
            self.command, self.options, self.state = command, options, "runs"
            started.append(self)

        def wait(self, timeout=None):
            if self.state == "runs":
                assert timeout <= 0.4 * 600
                raise subprocess.TimeoutExpired(self.command, timeout)

        def kill(self):
            self.state = "killed"

    stand_in = SimpleNamespace(Popen=Process, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(parts, "subprocess", stand_in)
    only(monkeypatch, lambda: {"good": call()})
    status, _ = run(tmp_path, "--only", "dropout", "--processes", "2", "--seconds", "600")
    assert status == 0 and [process.state for process in started] == ["killed"] * 2
    for index, process in enumerate(started):
        assert process.command[:3] == [sys.executable, "-m", "peft_fused.bench.parts"]
        assert process.command[3:] == ["cpu", "--only", "dropout", "--once", str(index), "2"]
        assert parts.main(process.command[3:]) == 0


def row(part: str, what: str, us: float | None = None, **values) -> dict:
    return parts.make_row(part, what, "4096x4096x4096 r16", "bf16+fp32", us=us, iqr_us=0.1, **values)


def test_summary_has_a_line_per_group_and_stays_short():
    rows = [
        row("kernels", "shrink: torch", 10.0, share_of_ceiling=0.5),
        row("kernels", "shrink: triton", 8.0, ratio=0.8, against="shrink: torch", share_of_ceiling=0.625),
        row("structured", "circulant: triton, backward", 9.0),
        row("structured", "circulant: triton, both", 7.7),
        row("linear", "linear: triton", error="RuntimeError: \n" + "x" * 500),
        row("linear", "linear: cuda", skipped="no GPU"),
    ]
    text = parts.summary(rows)
    assert "torch 10 50%; triton 8 x0.80 62%" in text
    assert "circulant backward" in text and "7.7" not in text
    assert text.splitlines()[-2].startswith("error in linear: triton") and text.splitlines()[-1].endswith("no GPU")
    many = [row("kernels", f"kernel {i}: {'long ' * 20}", 1.0) for i in range(300)] + 60 * rows[-2:]
    text = parts.summary(many)
    assert len(text) <= parts.SUMMARY < 9_000 and "... and more in the file" in text
    assert "kernel 0" in text and "error in linear: triton" in text


# ------------------------------------------------------------------------------------------------------ the GPU's grid


def test_shapes_are_those_that_the_plans_are_for():
    gemms = {(shape.m, shape.k, shape.n) for shape in CUDA.shapes["ceilings"]}
    assert len(gemms) == 9 and {(1, 4096, 4096), (4096, 4096, 14336), (16384, 8192, 8192)} <= gemms
    sizes = [shape.sizes for shape in CUDA.shapes["structured"] if shape.op == "circulant" and shape.dtype == BF16]
    assert sorted(sizes) == [(768,), (1536,), (3072,), (4096,), (8192,)]
    assert all(shape.k == shape.n for shape in CUDA.shapes["kernels"]), "dB's launch stands for dA's"
    for shape in (shape for each in CUDA.shapes.values() for shape in each):
        assert (shape.m * (shape.k + shape.n) + shape.n * shape.k) * shape.dtype.itemsize < 1 << 30


def test_every_group_of_the_gpu_builds_and_launches(monkeypatch):
    """On meta tensors that pass for those of an H200: every launch has a grid and arguments that its kernel takes."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "triton_kernels"))
    from launches import recording

    meta, failed = torch.device("meta"), []
    with recording() as recorder:
        for part in PARTS:
            for group in groups(part, CUDA, meta):
                for name, entry in group.build().items():
                    if isinstance(entry, str) or "cuda" in name:
                        continue
                    try:
                        entry.results()
                    except Exception as error:
                        failed.append(f"{group.what}: {name}, {group.shape} {group.dtype}: {error!r}")
    assert not failed
    ran = {launch.compilation.name for launch in recorder.launches}
    assert {f"lowrank_kernels.{name}_kernel" for name in ("linear", "shrink", "expand", "grad_a", "grad_b")} <= ran
    assert {"bottleneck_kernels.rows_kernel", "structured_kernels.backward_kernel"} <= ran
