"""Aggregations: the golden vectors of the official code, clients of different ranks, and what is refused."""

import numpy
import pytest
import torch

from hfnoise.privacy import LoraFactors, aggregate_lora, rotate_lora
from hfnoise.privacy.lora_rotation import orthonormal_rows, orthonormality_error
from tests.privacy.lora_models import load_vectors

METHODS = ["fedavg", "ffa", "flora", "fedex", "fedsvd"]
CLOSE = {"atol": 1e-6, "rtol": 1e-6}


def federation(ranks=(4, 4, 4), frozen=True, rank=4, inputs=24, outputs=20, seed=0):
    """Return A and B of the server and of clients; frozen clients hold the first rows of the server's A."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    server_A, server_B = orthonormal_rows(draw(rank, inputs))[0].float(), draw(outputs, rank)
    client_A = [server_A[:each].clone() if frozen else draw(each, inputs) for each in ranks]
    return server_A, server_B, client_A, [draw(outputs, each) for each in ranks]


def weighted_sum(shares, client_A, client_B):
    return sum(share * b.double() @ a.double() for share, a, b in zip(shares, client_A, client_B, strict=True))


@pytest.mark.parametrize("method", ["ffa", "fedavg", "flora", "fedex"])
def test_golden_vectors(method):
    vectors = {key.removeprefix(f"{method}_"): value for key, value in load_vectors("fed_aggregate").items()}
    A, B, W0 = vectors["A"], vectors["B"], vectors["W0"]
    result = aggregate_lora(
        method, A, B, A + vectors["dA"], B + vectors["dB"], vectors["sizes"], float(vectors["scaling"])
    )
    torch.testing.assert_close(result.lora_B, vectors["B_agg"], **CLOSE)
    if "A_agg" in vectors and method != "flora":
        torch.testing.assert_close(result.lora_A, vectors["A_agg"], **CLOSE)
    base = W0 if result.residual is None else W0 + result.residual.dense()
    torch.testing.assert_close(base, vectors["W0_agg"], **CLOSE)
    assert (result.residual is None) == (method in ("ffa", "fedavg"))


def test_fedsvd_is_the_rotated_average():
    A, B, client_A, client_B = federation()
    result = aggregate_lora("fedsvd", A, B, client_A, client_B, [1, 2, 5], 2.0)
    mean = sum(weight / 8 * each.double() for weight, each in zip([1, 2, 5], client_B, strict=True))
    torch.testing.assert_close(result.lora_B @ result.lora_A, (mean @ A.double()).float(), **CLOSE)
    expected = rotate_lora(A, mean.float())
    torch.testing.assert_close(result.lora_A, expected.lora_A, **CLOSE)
    torch.testing.assert_close(result.lora_A, (result.rotation.mT @ A.double()).float(), **CLOSE)
    assert orthonormality_error(result.lora_A) < 1e-6
    # Clients that send B only.
    again = aggregate_lora("fedsvd", A, B, None, client_B, [1, 2, 5], 2.0)
    assert torch.equal(again.lora_A, result.lora_A) and torch.equal(again.lora_B, result.lora_B)


@pytest.mark.parametrize("method", METHODS)
def test_hidden_sizes_are_uniform_weights_and_layers_are_independent(method):
    A, B, client_A, client_B = federation()
    uniform = aggregate_lora(method, A, B, client_A, client_B)
    equal = aggregate_lora(method, A, B, torch.stack(client_A), torch.stack(client_B), numpy.array([7, 7, 7]))
    layered = aggregate_lora(
        method, {"q": A, "v": A}, {"v": B, "q": B}, [{"q": a, "v": a} for a in client_A],
        [{"q": b, "v": b} for b in client_B],
    )  # fmt: skip
    for other in (equal, layered["q"], layered["v"]):
        torch.testing.assert_close(other.lora_A, uniform.lora_A)
        torch.testing.assert_close(other.lora_B, uniform.lora_B)
    assert list(layered) == ["q", "v"]


@pytest.mark.parametrize("method", METHODS)
def test_one_client_alone_keeps_its_model(method):
    A, B, client_A, client_B = federation((4,))
    new_A, new_B, residual, _, error = aggregate_lora(method, A, B, client_A, client_B, [3], 0.5)
    total = 0.5 * new_B @ new_A + (residual.dense() if residual else 0)
    torch.testing.assert_close(total, 0.5 * client_B[0] @ client_A[0], **CLOSE)
    assert error == 0


@pytest.mark.parametrize("frozen", [True, False])
def test_flora_stacks_ranks_and_scalings(frozen):
    A, B, client_A, client_B = federation((2, 4, 3), frozen)
    result = aggregate_lora("flora", A, B, client_A, client_B, [1, 1, 2], [8.0, 4.0, 2.0], server_scaling=4.0)
    expected = weighted_sum([0.25 * 8, 0.25 * 4, 0.5 * 2], client_A, client_B)
    torch.testing.assert_close(result.residual.dense(), expected.float(), **CLOSE)
    assert result.residual.rank == 9 and not result.lora_B.any() and torch.equal(result.lora_A, A)
    cut = aggregate_lora(
        "flora", A, B, client_A, client_B, [1, 1, 2], [8.0, 4.0, 2.0], server_scaling=4.0, residual_rank=2,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    values = torch.linalg.svdvals(expected)
    assert cut.truncation_error == pytest.approx(float(values[2:].norm()), rel=1e-5)
    left_out = torch.linalg.matrix_norm(cut.residual.dense() - expected)
    assert float(left_out) == pytest.approx(cut.truncation_error, rel=1e-5)
    assert not torch.equal(cut.lora_A, A) and cut.lora_A.abs().max() <= 24**-0.5


def test_fedsvd_takes_clients_of_lower_rank_without_loss():
    A, B, client_A, client_B = federation((2, 4, 3))
    scalings = [4.0, 2.0, 8 / 3]  # one alpha, as PEFT's rank_pattern gives
    result = aggregate_lora("fedsvd", A, B, client_A, client_B, None, scalings, server_scaling=2.0)
    expected = weighted_sum([each / 3 for each in scalings], client_A, client_B)
    torch.testing.assert_close(2.0 * result.lora_B @ result.lora_A, expected.float(), **CLOSE)
    torch.testing.assert_close(result.rotation.mT @ A.double(), result.lora_A.double(), **CLOSE)
    assert result.truncation_error == 0
    again = aggregate_lora("fedsvd", A, B, None, client_B, None, scalings, server_scaling=2.0)
    assert torch.equal(again.lora_B, result.lora_B)


@pytest.mark.parametrize("ranks", [(6, 4, 3), (1, 2, 2), (1,)])
def test_fedsvd_truncates_what_does_not_fit(ranks):
    A, B, client_A, client_B = federation(ranks, frozen=False)
    result = aggregate_lora("fedsvd", A, B, client_A, client_B, None, 3.0)
    expected = 3.0 * weighted_sum([1 / len(ranks)] * len(ranks), client_A, client_B)
    values = torch.linalg.svdvals(expected)
    torch.testing.assert_close(3.0 * result.lora_B.norm(dim=0), values[:4].float(), atol=1e-5, rtol=1e-5)
    left_out = torch.linalg.matrix_norm(3.0 * result.lora_B.double() @ result.lora_A.double() - expected)
    assert float(left_out) == pytest.approx(float(values[4:].norm()), abs=2e-5)
    assert result.truncation_error == pytest.approx(float(values[4:].norm()), abs=2e-5)
    assert result.rotation is None and orthonormality_error(result.lora_A) < 1e-6


def test_fedex_residual_can_be_truncated():
    A, B, client_A, client_B = federation(frozen=False)
    exact = aggregate_lora("fedex", A, B, client_A, client_B, None, 2.0)
    total = exact.residual.dense() + 2.0 * exact.lora_B @ exact.lora_A
    torch.testing.assert_close(
        total, 2.0 * weighted_sum([1 / 3] * 3, client_A, client_B).float(), atol=5e-6, rtol=1e-6
    )
    # The deviations of three clients from their mean: rank 2 x 4.
    full = aggregate_lora("fedex", A, B, client_A, client_B, None, 2.0, residual_rank=8)
    torch.testing.assert_close(full.residual.dense(), exact.residual.dense(), atol=1e-5, rtol=1e-5)
    assert full.truncation_error < 1e-12 and full.residual.rank == 8


def test_truncation_needs_no_dense_matrix():
    generator = torch.Generator().manual_seed(0)
    # The product would have 4e10 entries, 160 GB.
    wide = LoraFactors(torch.randn(6, 200_000, generator=generator), torch.randn(200_000, 6, generator=generator))
    kept, error = wide.truncated(6)
    assert kept.rank == 6 and error == 0.0
    left, right = torch.randn(200_000, generator=generator), torch.randn(200_000, generator=generator)
    before = (left @ wide.lora_B) @ (wide.lora_A @ right)
    torch.testing.assert_close((left @ kept.lora_B) @ (kept.lora_A @ right), before, rtol=1e-3, atol=0)


BAD = {
    "method": ("fedavg ffa", {}, "method must be one of fedavg, ffa, flora, fedex, fedsvd; got 'fedavg ffa'"),
    "zero examples": ("fedavg", {"weights": [1, 0, 2]}, "client 1 has the weight n_k = 0.*without examples"),
    "negative": ("ffa", {"weights": [1, -1, 2]}, "client 1 has the weight"),
    "nan": ("flora", {"weights": [1, 1, float("nan")]}, "client 2 has the weight"),
    "infinite": ("flora", {"weights": [1, 1, float("inf")]}, "client 2 has the weight"),
    "too few weights": ("fedex", {"weights": [1, 1]}, "2 entries for 3 clients"),
    "scaling": ("fedex", {"scaling": 0.0}, "scaling.*above 0"),
    "scalings": ("flora", {"scaling": [1.0, 2.0, 3.0]}, "Give server_scaling"),
    "scalings averaged": ("fedavg", {"scaling": [1.0, 2.0, 3.0], "server_scaling": 1.0}, "'fedavg'.*one scaling"),
    "number of scalings": ("flora", {"scaling": [1.0]}, "1 entries for 3"),
    "residual_rank": ("ffa", {"residual_rank": 2}, "residual_rank=2 belongs to"),
    "residual_rank too high": ("flora", {"residual_rank": 13}, "between 1 and 12, got 13"),
    "generator": ("fedex", {"generator": torch.Generator()}, "'fedex' draws nothing"),
    "no A": ("fedavg", {"client_lora_A": None}, "train A and must hand it in"),
    "no clients": ("fedavg", {"client_lora_A": [], "client_lora_B": []}, "no client"),
    "fewer A": ("fedavg", {"client_lora_A": [torch.ones(4, 24)]}, "has 1 clients and client_lora_B 3"),
    "inputs": ("fedavg", {"client_lora_A": [torch.ones(4, 23)] * 3}, "client 0's layer has 23 inputs"),
    "outputs": ("fedavg", {"client_lora_B": [torch.ones(21, 4)] * 3}, "21 outputs"),
    "not finite": ("fedavg", {"client_lora_B": [torch.full((20, 4), float("inf"))] * 3}, "client 0's lora_B holds 80"),
    "server not finite": ("ffa", {"lora_B": torch.full((20, 4), float("nan"))}, "the server's lora_B holds"),
    "trained A": ("ffa", {"client_lora_A": [torch.ones(4, 24)] * 3}, "'ffa' freezes A.*trained both A and B"),
    "trained A, fedsvd": ("fedsvd", {"client_lora_A": [torch.ones(4, 24)] * 3}, "'fedsvd' freezes A"),
    "too wide without A": (
        "fedsvd", {"client_lora_A": None, "client_lora_B": [torch.ones(20, 5)] * 3}, "without their A"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    method, changes, message = BAD[case]
    A, B, client_A, client_B = federation()
    arguments = {"lora_A": A, "lora_B": B, "client_lora_A": client_A, "client_lora_B": client_B, **changes}
    with pytest.raises(ValueError, match=message):
        aggregate_lora(method, **arguments)


@pytest.mark.parametrize("method", ["fedavg", "ffa", "fedex"])
def test_different_ranks_are_refused_by_name(method):
    A, B, client_A, client_B = federation((2, 4, 3))
    with pytest.raises(ValueError, match=rf"'{method}'.*rank 4, got ranks \[2, 4, 3\].*'flora' and 'fedsvd'"):
        aggregate_lora(method, A, B, client_A, client_B)


@pytest.mark.parametrize("method", METHODS)
def test_low_precision_is_refused(method):
    A, B, client_A, client_B = federation()
    with pytest.raises(TypeError, match="client 0's.*bfloat16.*Keep adapters in float32"):
        aggregate_lora(method, A, B, [a.bfloat16() for a in client_A], [b.bfloat16() for b in client_B])


def test_other_layers_are_refused():
    A, B, client_A, client_B = federation()
    server = {"q": A, "v": A}, {"q": B, "v": B}
    with pytest.raises(ValueError, match=r"client 0's lora_B has other layers.*lacks \['v'\] \(1\).*adds \['k'\]"):
        aggregate_lora("fedsvd", *server, None, [{"q": b, "k": b} for b in client_B])
    with pytest.raises(TypeError, match="client 0's lora_B must be one too"):
        aggregate_lora("fedsvd", *server, None, client_B)
    with pytest.raises(ValueError, match="no layers"):
        aggregate_lora("fedsvd", {}, {}, None, [{}])
    with pytest.raises(ValueError, match="no client"):
        aggregate_lora("fedsvd", *server, None, [])


def test_scalings_by_layer():
    """Layers of another rank or alpha (rank_pattern) have another scaling, and so may each client."""
    A, B, one = torch.eye(1, 2), torch.zeros(2, 1), torch.ones(2, 1)
    layers, client = {"q": A, "v": A}, {"q": one, "v": one}
    given = ("flora", layers, {"q": B, "v": B}, [layers, layers], [client, client], None)
    out = aggregate_lora(*given, {"q": 2.0, "v": 4.0})
    assert [float(out[name].residual.dense()[0, 0]) for name in "qv"] == [2.0, 4.0]
    out = aggregate_lora(*given, [{"q": 2.0, "v": 4.0}, {"q": 4.0, "v": 0.5}], server_scaling={"q": 1.0, "v": 1.0})
    assert [float(out[name].residual.dense()[0, 0]) for name in "qv"] == [3.0, 2.25]
    with pytest.raises(ValueError, match="scaling is by layer, \\['q'\\], and lacks 'v'"):
        aggregate_lora(*given, {"q": 2.0})


@pytest.mark.parametrize("weights", [3, {"a": 1, "b": 2}, ["a", "b"]], ids=str)
def test_weights_that_are_no_numbers_by_client(weights):
    A, B = torch.eye(1, 2), torch.zeros(2, 1)
    with pytest.raises(ValueError, match="weights must be a sequence of numbers n_k"):
        aggregate_lora("ffa", A, B, None, [B, B], weights)
