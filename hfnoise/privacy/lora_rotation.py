"""FedSVD's refactorisation as a rotation of r x r numbers: the singular value decomposition of B A without B A.

For orthonormal rows A, the right singular vectors of B A are V^T A, with V the eigenvectors of B^T B. So the step
that arXiv 2505.12805 takes by a full SVD per layer needs the eigenvectors of an r x r matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hfnoise.privacy.lora_factors import LoraA, LoraB, check_factors, check_finite, column_signs

# Rows count as orthonormal up to this. Rotations of float32 rows drift by about 1e-8 each, float32 rows straight from
# an orthonormalisation are within 5e-7; A A^T = I is promised to 1e-6.
ORTHONORMAL_TOLERANCE = 1e-6


class RotatedLora(NamedTuple):
    """What [`rotate_lora`] returns: `lora_A`, `lora_B` and the `rotation`, a matrix of shape `(rank, rank)`, float64.

    The new `lora_A` is `rotation.T @ Q`, Q the old one if its rows were orthonormal, else [`orthonormal_rows`] of it.
    """

    lora_A: LoraA
    lora_B: LoraB
    rotation: Float[Tensor, "rank rank"]


def rotate_lora(lora_A: LoraA, lora_B: LoraB) -> RotatedLora:
    """Return the factors of the same product with orthonormal rows of A, sorted by singular value, and the rotation.

    The refactorisation of FedSVD (arXiv 2505.12805, algorithm 1: A = V^T, B = U Sigma of the SVD of B A). Departures
    from the official code: no matrix of outputs x inputs is formed; signs follow a rule (in every column of the new B
    the entry of largest magnitude is positive); and the new rows always span what the old ones did. The official code
    lets LAPACK choose when B is zero or has dependent columns, and A then leaves its row space.

    B^T B is summed and decomposed in float64, so the rotation is orthogonal to 1e-15 whatever the rank of B, and
    singular values come out to about 1e-8 of the largest. For B = 0 it is the identity. Rows that are not orthonormal
    to 1e-6 (a first round, an imported adapter, drift) are made so first, by [`orthonormal_rows`].

    Formal guarantee: none of its own, and none is lost: it is a function of released factors (post-processing).

    Args:
        lora_A (`torch.Tensor` of shape `(rank, inputs)`, float32 or float64): rank at most `inputs`.
        lora_B (`torch.Tensor` of shape `(outputs, rank)`, same dtype). The scaling alpha / r stays outside.

    Returns:
        [`RotatedLora`], which unpacks as `lora_A, lora_B, rotation`: factors detached and in their dtype, the rotation
        in float64. Column norms of the new `lora_B` are the singular values of the product, descending.

    Raises:
        TypeError: for other dtypes, bfloat16 among them.
        ValueError: if shapes do not match, the rank exceeds `inputs`, or values are not finite.

    Example:
        >>> import torch
        >>> from hfnoise.privacy import rotate_lora
        >>> A, B = torch.eye(2, 3), torch.tensor([[1.0, 0.0], [0.0, -2.0]])
        >>> new_A, new_B, rotation = rotate_lora(A, B)
        >>> new_B.norm(dim=0).tolist(), bool((new_B @ new_A == B @ A).all())
        ([2.0, 1.0], True)
    """
    check_factors(lora_A, lora_B)
    rows, columns = lora_A.detach().double(), lora_B.detach().double()
    deviation = orthonormality_error(rows)
    if not deviation <= ORTHONORMAL_TOLERANCE:  # NaN included
        check_finite(lora_A, "lora_A")
        rows, triangle = orthonormal_rows(rows)
        columns = columns @ triangle
    rotation, columns = gram_rotation(columns)
    return RotatedLora((rotation.mT @ rows).to(lora_A.dtype), columns.to(lora_B.dtype), rotation)


def gram_rotation(
    columns: Float[Tensor, "outputs rank"],
) -> tuple[Float[Tensor, "rank rank"], Float[Tensor, "outputs rank"]]:
    """Return an orthogonal V and `columns @ V`, whose columns are orthogonal to each other, longest first.

    V holds the eigenvectors of the Gram matrix, with the signs of [`rotate_lora`]; the identity for a zero matrix.

    Args:
        columns (`torch.Tensor` of shape `(outputs, rank)`, float64).

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: of shapes `(rank, rank)` and `(outputs, rank)`, float64.

    Raises:
        ValueError: if values are not finite, or so large that their squares are not.

    Example:
        >>> import torch
        >>> from hfnoise.privacy.lora_rotation import gram_rotation
        >>> gram_rotation(torch.zeros(5, 2, dtype=torch.float64))[0].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    gram = columns.mT @ columns
    size = float(gram.trace())
    if size == 0:
        return torch.eye(len(gram), dtype=torch.float64, device=columns.device), columns.clone()
    if not size < float("inf"):
        check_finite(columns, "lora_B")
        raise ValueError(
            f"lora_B holds values up to {float(columns.abs().max()):.1e}, whose squares overflow float64."
        )
    # On the CPU: r x r is too small for an accelerator, and all devices then agree on the algorithm.
    rotation = torch.linalg.eigh(gram.cpu()).eigenvectors.flip(1).to(columns.device)
    turned = columns @ rotation
    signs = column_signs(turned, rotation)
    return rotation * signs, turned.mul_(signs)


def orthonormality_error(rows: Tensor) -> float:
    """Return the largest entry of |A A^T - I|, in float64.

    Example:
        >>> import torch
        >>> from hfnoise.privacy.lora_rotation import orthonormality_error
        >>> orthonormality_error(2 * torch.eye(2, 3))
        3.0
    """
    rows = rows.detach().double()
    gram = rows @ rows.mT
    gram.diagonal().sub_(1)
    return float(gram.abs().max())


def orthonormal_rows(lora_A: LoraA) -> tuple[Float[Tensor, "rank inputs"], Float[Tensor, "rank rank"]]:
    """Return Q and L of A = L Q: Q with orthonormal rows, L lower triangular with a diagonal that is not negative.

    With that sign rule Q is A itself when its rows are orthonormal already. B A = (B L) Q, so B L takes the place of
    B. If rows of A depend on each other, Q has arbitrary (yet repeatable) rows in their place, and L zeros.

    Args:
        lora_A (`torch.Tensor` of shape `(rank, inputs)`, floating and finite): rank at most `inputs`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Q of shape `(rank, inputs)` and L of shape `(rank, rank)`, float64.

    Raises:
        ValueError: if there are more rows than columns, which cannot be orthonormal.

    Example:
        >>> import torch
        >>> from hfnoise.privacy.lora_rotation import orthonormal_rows
        >>> rows, triangle = orthonormal_rows(torch.tensor([[3.0, 4.0]]))
        >>> [round(entry, 6) for entry in rows[0].tolist()], round(triangle.item(), 6)
        ([0.6, 0.8], 5.0)
    """
    rank, inputs = lora_A.shape
    if rank > inputs:
        raise ValueError(
            f"lora_A has rank {rank} and only {inputs} inputs: {rank} rows of length {inputs} cannot be orthonormal. "
            f"Use a rank of at most {inputs} for this layer (rank_pattern of LoraConfig)."
        )
    basis, triangle = torch.linalg.qr(lora_A.detach().double().mT)
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).double()
    return (basis * signs).mT.contiguous(), (triangle * signs[:, None]).mT.contiguous()
