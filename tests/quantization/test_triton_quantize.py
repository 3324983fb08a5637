"""The fused Triton kernel, interpreted on the CPU: codes, steps and masks of `quantized_rows`."""

import os
import subprocess
import sys

import pytest
import torch

from hfnoise.quantization.kernels import triton_quantize
from hfnoise.quantization.kernels.triton_quantize import triton_quantize_rows
from hfnoise.quantization.row_quantizer import row_quantizer
from hfnoise.quantization.rows import quantized_rows

CHECK = """
import torch
from hfnoise.quantization.kernels.triton_quantize import triton_quantize_rows
from hfnoise.quantization.row_quantizer import row_quantizer
from hfnoise.quantization.rows import quantized_rows

entries = mismatches = 0
settings = [dict(bits=bits) for bits in (1, 1.58, 2, 3, 4, 8)]
settings += [dict(bits=2, trust_radius=0.3), dict(bits=1.58, trust_factor=1.1), dict(bits=4, estimator="ste")]
settings += [dict(bits=4, estimator="ste_absmax"), dict(bits=2, hadamard_group=None), dict(bits=1, hadamard_group=16)]
for shape in ((3, 256), (17, 128), (16, 96), (2, 24), (5, 7), (1, 512)):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])).to(dtype)
        x[-1] = 0  # a dead row: trusted, at the level above zero
        for given in settings:
            if shape[1] % 2 and given.get("hadamard_group", 0) is not None:
                given = {**given, "hadamard_group": None}
            quantizer = row_quantizer(x, **given)
            found, expected = triton_quantize_rows(x, quantizer), quantized_rows(x, quantizer)
            codes = expected.codes
            torch.testing.assert_close(found.step, expected.step, rtol=1e-6, atol=0)
            differ = found.codes != codes
            assert (found.mask is None) == (expected.mask is None)
            if found.mask is not None:
                differ = differ | (found.mask != expected.mask)
            entries, mismatches = entries + differ.numel(), mismatches + int(differ.sum())
            off = (found.codes.int() - codes.int()).abs().max()
            assert off <= 1, (shape, given)
print(entries, mismatches)
"""


def test_without_triton_it_says_so():
    try:
        import triton  # noqa: F401
    except ImportError:
        x = torch.zeros(1, 4)
        with pytest.raises(ImportError, match="pip install triton"):
            triton_quantize_rows(x, row_quantizer(x, 1))
    else:
        pytest.skip("Triton is installed")


@pytest.mark.parametrize(
    ("x", "group", "error", "message"),
    [
        (torch.zeros(1, 4, dtype=torch.float64), 128, TypeError, "float64"),
        (torch.zeros(4), 128, ValueError, r"shape \(4,\)"),
        (torch.zeros(1, 512), 256, ValueError, "group is 256"),
    ],
)
def test_bad_input(x, group, error, message):
    with pytest.raises(error, match=message):
        triton_quantize_rows(x, row_quantizer(x, 1, hadamard_group=group))


@pytest.mark.slow
def test_interpreted_kernel_equals_torch():
    pytest.importorskip("triton")
    # Whether kernels are interpreted is decided when Triton is imported, so in a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECK], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    entries, mismatches = map(int, done.stdout.split())
    print(f"{mismatches} of {entries} entries differ")
    # Ties to within the rounding of the rotation, about 1e-7 of all entries of normal rows.
    assert mismatches <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "group", "trust"), [("fp32", 128, "steps"), ("bf16", 8, "radius"), ("fp16", 1, "all")]
)
def test_compiles_without_a_gpu(dtype, group, trust, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"LENGTH": 4096, "LEVELS": 3 if trust == "radius" else 16, "GROUP": group, "ROWS": 16, "TINY": 1e-38}
    constants |= {"COLUMNS": 256 if group == 1 else group, "ABSMAX": trust == "all", "TRUST": trust}
    types = {"x_pointer": f"*{dtype}", "codes_pointer": "*u8", "step_pointer": "*fp32", "mask_pointer": "*u8"}
    types |= {
        "rows": "i32",
        **dict.fromkeys(("unit", "root_of_length", "factor", "trusted_steps", "trust_radius"), "fp32"),
    }
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(triton_quantize._kernel(), signature=types, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    assert "tf32" not in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 99 * 1024  # what a program may have on the smallest of these GPUs, sm_86


@pytest.mark.gpu
def test_kernel_on_a_gpu():
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x = torch.randn(300, 1024, device="cuda")
    quantizer = row_quantizer(x, 4)
    found, expected = triton_quantize_rows(x, quantizer), quantized_rows(x, quantizer)
    torch.testing.assert_close(found.step, expected.step, rtol=1e-6, atol=0)
    assert (found.codes != (expected.points + 7.5).to(torch.uint8)).sum() <= 10
