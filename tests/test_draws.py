import subprocess
import sys
from collections import Counter

import pytest

from peft_fused.draws import draw_bits, draw_float, draw_geometric, draw_int

N = 20000


def test_bits_are_fixed_for_ever():
    # A change of these numbers would make resumed runs differ from straight ones.
    assert draw_bits(0, 0, purpose="rank") == 13393732953487344701
    assert [draw_int(1, 8, 0, step, purpose="dylora rank") for step in range(8)] == [3, 1, 6, 8, 6, 6, 2, 4]


def test_every_field_matters_and_names_do_not_run_together():
    base = dict(seed=1, step=2, layer=3, purpose="a", index=4)
    keys = [base, *({**base, name: 9} for name in ("seed", "step", "layer", "index")), {**base, "purpose": "b"}]
    keys += [{**base, "layer": "3"}, {**base, "layer": "x', 'a"}, {**base, "layer": "x", "purpose": "a', 'a"}]
    assert len({draw_bits(**key) for key in keys}) == len(keys)


def test_another_process_draws_the_same():
    code = "from peft_fused.draws import draw_bits; print(draw_bits(5, 6, layer='q', purpose='p', index=7))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) == draw_bits(5, 6, layer="q", purpose="p", index=7)


def chi_square(counts, expected):
    return sum((counts[k] - e) ** 2 / e for k, e in expected.items())


def test_ints_are_uniform():
    counts = Counter(draw_int(3, 10, 0, step, purpose="test") for step in range(N))
    assert set(counts) == set(range(3, 11))
    # 24.3 is the 0.1 % point of chi-square with 7 degrees of freedom.
    assert chi_square(counts, dict.fromkeys(range(3, 11), N / 8)) < 24.3


def test_geometric_has_the_ratio_1_minus_p():
    p = 0.15
    weights = {2 + k: (1 - p) ** k for k in range(8)}
    total = sum(weights.values())
    counts = Counter(draw_geometric(2, 9, p, 0, step, purpose="test") for step in range(N))
    assert set(counts) == set(weights)
    assert chi_square(counts, {k: N * w / total for k, w in weights.items()}) < 24.3


def test_floats_fill_the_unit_interval():
    values = [draw_float(0, step, purpose="test") for step in range(N)]
    assert 0.0 <= min(values) < 0.001 and 0.999 < max(values) < 1.0
    assert abs(sum(values) / N - 0.5) < 0.01


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="low must not exceed high"):
        draw_int(3, 2, 0, 0, purpose="x")
    with pytest.raises(ValueError, match=r"p must be in \(0, 1\)"):
        draw_geometric(1, 2, 0.0, 0, 0, purpose="x")
    with pytest.raises(TypeError, match="step must be an int"):
        draw_bits(0, 1.0, purpose="x")
