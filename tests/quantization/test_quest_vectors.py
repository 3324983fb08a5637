"""The estimators against the official code: codes and masks equal, values and gradients to 5e-6 of the largest."""

import pytest
import torch
import torch.nn.functional as F

from hfnoise.quantization import encode, hadamard_rotate, lsq_initial_step, lsq_quantize, quantize

CASES = ["n4x128", "n3x256", "out4x256", "lap2x3x128"]
KINDS = [
    "ste", "clip1", "clip1.25", "trust", "hadtrust", "halfhadtrust", "halfhadtrust0.3", "hadclip1.3", "halfhadclip1.3",
]  # fmt: skip
LINEAR = ["halfhadtrust", "hadtrust", "halfhadclip1.3", "trust", "ste"]
WIDTHS = [1, 2, 3, 4, 8]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_quantizers(vectors, correction, official, close, case, kind):
    file = vectors(f"quantizers_{case}")
    for bits in WIDTHS:
        name = f"{kind}_b{bits}"
        settings = official(name)
        factor = correction(name)
        x = file["x"].clone().requires_grad_()
        values = quantize(x, **settings)
        rotated_back = hadamard_rotate(values) if kind.startswith("had") else values
        rotated_back.backward(file["gy"])
        expected = file[f"{name}/y"] * factor
        gradient = file[f"{name}/gx"] * factor
        close(rotated_back, expected)
        close(x.grad, gradient)

        codes, scale, mask = encode(file["x"], **settings)
        rotated = hadamard_rotate(expected) if kind.startswith("had") else expected
        assert torch.equal(codes, (rotated / scale + (2**bits - 1) / 2).round().to(torch.uint8))
        # The gradient in the rotated space is mask * gy there: compare where the two differ measurably.
        inside = hadamard_rotate(gradient) if "had" in kind else gradient
        upstream = hadamard_rotate(file["gy"]) if kind.startswith("had") else file["gy"]
        measurable = upstream.abs() > 1e-4
        assert torch.equal(mask[measurable], (inside.abs() > upstream.abs() / 2)[measurable])
        assert measurable.float().mean() > 0.99


@pytest.mark.parametrize("file_name", ["linear_4x256x16", "linear_6x128x24"])
@pytest.mark.parametrize("kind", LINEAR)
def test_linear_layers(vectors, correction, official, close, file_name, kind):
    file = vectors(file_name)
    for bits in WIDTHS:
        settings, name, factor = official(f"{kind}_b{bits}"), f"{kind}_w{bits}a{bits}", correction(kind) ** 2
        x, weight, bias = (file[key].clone().requires_grad_() for key in ("x", "W", "bias"))
        y = F.linear(quantize(x, **settings), quantize(weight, **settings), bias)
        y.backward(file["gy"])
        close(y - bias, (file[f"{name}/y"] - file["bias"]) * factor)
        close(x.grad, file[f"{name}/gx"] * factor)
        close(weight.grad, file[f"{name}/gW"] * factor)
        close(bias.grad, file[f"{name}/gb"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("kind", "rule"), [("lsq", "lsq"), ("lsqplusw", "rms")])
def test_lsq(vectors, close, case, kind, rule):
    file = vectors(f"quantizers_{case}")
    for bits in (2, 3, 4, 8):
        name = f"{kind}_b{bits}"
        first = lsq_initial_step(file["x"], bits, rule)
        # The grid of the official LSQ+ is its early-stopped optimum: up to 1 % off at 8 bits.
        assert first.item() == pytest.approx(file[f"{name}/alpha"].item(), rel=0.01 if rule == "rms" else 1e-6)
        x, step = file["x"].clone().requires_grad_(), file[f"{name}/alpha"].clone().requires_grad_()
        values = lsq_quantize(x, step, bits)
        values.backward(file["gy"])
        close(values, file[f"{name}/y"])
        close(x.grad, file[f"{name}/gx"])
        # A sum of many terms that nearly cancel, to 1e-6 of what a single one can contribute.
        largest = file["gy"].abs().max() * 2 ** (bits - 1)
        assert (step.grad - file[f"{name}/galpha"]).abs() < 1e-6 * largest


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_rows_that_die_in_the_official_code_live(vectors, correction, official, close, bits):
    file, name = vectors("edge"), f"halfhadtrust_b{bits}"
    x = file["x"].clone().requires_grad_()
    values = quantize(x, **official(name))
    values.backward(file["gy"])
    zero, tiny, large = 0, 2, 4
    close(values[large], file[f"{name}/y"][large] * correction(name))
    close(x.grad[large], file[f"{name}/gx"][large] * correction(name))
    for row in (zero, tiny):
        assert file[f"{name}/gx"][row].abs().max() == 0  # the fault
        assert x.grad[row].abs().max() > 0
    assert values[zero].abs().max() == 0 and values[tiny].abs().max() > 0
    assert torch.equal(x.grad[zero], hadamard_rotate(file["gy"][zero]))
