"""The rows of A that a federated LoRA layer starts from: random, random orthonormal, or of the base weight."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from hfnoise.privacy.lora_factors import LoraA, check_finite, column_signs
from hfnoise.privacy.lora_rotation import orthonormal_rows

INIT_A = ("kaiming", "orthonormal", "w0_svd")


def initial_lora_A(
    init_A: str,
    rank: int,
    inputs: int | None = None,
    *,
    generator: torch.Generator | None = None,
    base_weight: Float[Tensor, "outputs inputs"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoraA:
    """Return the first A of a layer whose B starts at zero and whose base weight stays as it is.

    - `"kaiming"`: independent entries, uniform in +-1 / sqrt(inputs): PEFT's default (kaiming_uniform with
      a = sqrt(5)), what arXiv 2505.12805 starts from. Its spectral norm is about
      (1 + sqrt(rank / inputs)) / sqrt(3) < 1, not above 1 as the paper says.
    - `"orthonormal"`: rows of a random orthogonal matrix (Haar measure). Gradients of B are sqrt(3) times those of
      `"kaiming"`, and unclipped steps of the weight 3 times: tune the learning rate of each before comparing them.
    - `"w0_svd"`: right singular vectors of the base weight with the largest singular values. Reads no data. PEFT's
      `"pissa"` and `"olora"` start there as well, but change the base weight.

    Args:
        init_A (`str`): one of the three above.
        rank (`int`): rows, at least 1; at most `inputs` for orthonormal rows, at most `outputs` too for `"w0_svd"`.
        inputs (`int`, *optional*): columns; of `base_weight` if that is given.
        generator (`torch.Generator`, *optional*): on the CPU, for the random ones; they need it. Clients that hold its
            seed need not be sent A.
        base_weight (`torch.Tensor` of shape `(outputs, inputs)`, *optional*): W0, for `"w0_svd"`. Not quantised:
            clients with another rounding of W0 would compute other rows.
        dtype (`torch.dtype`, defaults to `torch.float32`): of the result.

    Returns:
        `torch.Tensor` of shape `(rank, inputs)`, on the CPU or where `base_weight` is.

    Raises:
        ValueError: for an unknown `init_A`, missing or superfluous arguments, or a rank out of range.

    Example:
        >>> import torch
        >>> from hfnoise.privacy import initial_lora_A
        >>> A = initial_lora_A("orthonormal", 2, 5, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(A @ A.T, torch.eye(2), atol=1e-6)
        True
        >>> initial_lora_A("w0_svd", 1, base_weight=torch.diag(torch.tensor([1.0, 3.0]))).tolist()
        [[0.0, 1.0]]
    """
    if init_A not in INIT_A:
        raise ValueError(f"init_A must be one of {', '.join(INIT_A)}; got {init_A!r}.")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}.")
    if (base_weight is not None) != (init_A == "w0_svd"):
        raise ValueError(f"base_weight belongs to init_A='w0_svd', and to it only; got init_A={init_A!r}.")
    if (generator is not None) != (init_A != "w0_svd"):
        raise ValueError(
            f"init_A={init_A!r} {'draws nothing' if base_weight is not None else 'needs a torch.Generator'}: random "
            "rows come from a generator that all parties can seed alike, not from torch's global one."
        )
    if base_weight is not None:
        if inputs not in (None, base_weight.shape[-1]):
            raise ValueError(f"inputs={inputs}, but base_weight has {base_weight.shape[-1]}. Leave inputs out.")
        return right_singular_rows(base_weight, rank).to(dtype)
    if inputs is None or inputs < 1:
        raise ValueError(f"inputs must be a whole number of at least 1, got {inputs!r}.")
    if init_A == "kaiming":
        entries = 2 * torch.rand(rank, inputs, generator=generator, dtype=torch.float64) - 1
        return (entries / math.sqrt(inputs)).to(dtype)
    return orthonormal_rows(torch.randn(rank, inputs, generator=generator, dtype=torch.float64))[0].to(dtype)


def right_singular_rows(
    weight: Float[Tensor, "outputs inputs"], count: int, skip: int = 0
) -> Float[Tensor, "count inputs"]:
    """Return right singular vectors of a base weight as rows, in float64: the first `count` after the first `skip`.

    From the eigenvectors of the smaller Gram matrix in float64, once per layer and run (0.4 s for 1024 x 1024 on one
    core). Signs: the entry of largest magnitude of each row is positive.

    Args:
        weight (`torch.Tensor` of shape `(outputs, inputs)`, floating, finite).
        count (`int`): at least 1.
        skip (`int`, defaults to `0`): `skip + count` is at most `outputs` and `inputs`.

    Raises:
        ValueError: if the weight is no floating matrix, as a packed quantised one, or the numbers are out of range.

    Example:
        >>> import torch
        >>> from hfnoise.privacy.lora_subspace import right_singular_rows
        >>> right_singular_rows(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 1, skip=1).tolist()
        [[0.0, 0.0, 1.0]]
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"the base weight must be a floating matrix (outputs, inputs), got {weight.dtype} of shape "
            f"{tuple(weight.shape)}. A quantised base has rounded singular vectors, of another shape or dtype: send "
            "the rows of the unquantised weight, or use init_A='orthonormal'."
        )
    if count < 1 or skip < 0 or skip + count > min(weight.shape):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} has {min(weight.shape)} singular vectors; cannot take {count} "
            f"after the first {skip}."
        )
    check_finite(weight, "the base weight")
    full = weight.detach().double()
    tall = full.shape[0] >= full.shape[1]
    vectors = torch.linalg.eigh(full.mT @ full if tall else full @ full.mT).eigenvectors.flip(1)[:, : skip + count]
    # QR restores what division by small singular values would lose; of leading vectors it keeps the order.
    rows = vectors.mT if tall else orthonormal_rows((full.mT @ vectors).mT)[0]
    rows = rows[skip:]
    signs = column_signs(rows.mT, rows.mT)
    return rows * signs[:, None]
