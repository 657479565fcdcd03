"""Compiled code is kept, never older than its sources; and everything works, slower, without a compiler."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from quantize8.ops import jit, reference

WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
import numpy as np, torch
from quantize8.ops import cpu, jit, reference
from quantize8.ops.reference import ColumnStats, Int8Weight
from quantize8 import Int8Linear
from quantize8.operations.convert import convert
from quantize8.operations.verify import verify

assert not jit.INSTALLED
folder, out = sys.argv[1:]
convert(folder, out, device="cpu")
verify(out)

weight = np.random.default_rng(0).normal(size=(70, 50)).astype(np.float32)
stats, expected = ColumnStats.empty(50), ColumnStats.empty(50)
codes, absmax = cpu.quantize_rowwise(weight, stats)
reference.column_stats(weight, codes, absmax, expected)
assert all(np.array_equal(getattr(stats, name), getattr(expected, name)) for name in vars(expected))
layer = Int8Linear(50, 70, bias=False)
layer.load_state_dict({"weight": torch.from_numpy(codes), "SCB": torch.from_numpy(absmax),
                       "weight_format": torch.zeros((), dtype=torch.uint8)})
x = torch.randn(30, 50) * 3
for tokens in (x[:3], x):
    exact = reference.linear(tokens.numpy(), Int8Weight(codes, absmax), None, 6.0)
    np.testing.assert_allclose(layer(tokens).detach().numpy(), exact, rtol=1e-4, atol=1e-4)
assert layer._packed is None
"""


def test_without_numba_the_same_artifact_and_products_come_out(minilm: Path, tmp_path: Path):
    from quantize8.operations.convert import convert

    command = [sys.executable, "-c", WITHOUT_NUMBA, str(minilm), str(tmp_path / "slow")]
    subprocess.run(command, check=True)
    convert(str(minilm), tmp_path / "fast", device="cpu")
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    names = sorted(path.relative_to(fast) for path in fast.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(slow) for path in slow.rglob("*") if path.is_file())
    for name in names:
        assert (fast / name).read_bytes() == (slow / name).read_bytes(), name


def test_a_change_in_any_file_of_the_folder_makes_kept_code_old(tmp_path: Path, monkeypatch):
    for path in Path(jit.__file__).parent.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(jit, "__file__", str(tmp_path / "jit.py"))
    before = jit._digest.__wrapped__()
    assert before == jit._digest()
    (tmp_path / "reference.py").write_text((tmp_path / "reference.py").read_text().replace("127", "126"))
    assert jit._digest.__wrapped__() != before


def test_names_of_kept_code_carry_the_digest():
    from quantize8.ops import cpu
    from quantize8.ops.rows import quantize_rows

    codes, _ = cpu.quantize_rowwise(np.ones((2, 3), np.float16))
    assert (codes == reference.INT8_MAX).all()
    assert quantize_rows.py_func.__qualname__.endswith(jit._digest())
