"""A product of two thin matrices, kept as such: checked, made dense on demand, truncated without becoming dense."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

LoraA = Float[Tensor, "rank inputs"]
LoraB = Float[Tensor, "outputs rank"]

FACTOR_DTYPES = (torch.float32, torch.float64)


class LoraFactors(NamedTuple):
    """The product `lora_B @ lora_A` of a LoRA layer, or a sum of such products, as its two factors.

    Args:
        lora_A (`torch.Tensor` of shape `(rank, inputs)`): as PEFT's `lora_A.weight`.
        lora_B (`torch.Tensor` of shape `(outputs, rank)`): as PEFT's `lora_B.weight`.

    Example:
        >>> import torch
        >>> from hfnoise.privacy import LoraFactors
        >>> factors = LoraFactors(lora_A=torch.ones(2, 3), lora_B=torch.ones(4, 2))
        >>> factors.rank, tuple(factors.dense().shape)
        (2, (4, 3))
    """

    lora_A: LoraA
    lora_B: LoraB

    @property
    def rank(self) -> int:
        """The number of rows of `lora_A`; the product may have a lower rank."""
        return self.lora_A.shape[0]

    def dense(self) -> Float[Tensor, "outputs inputs"]:
        """Return the product, multiplied in float64, in the dtype of the factors: of the size of a base weight."""
        return (self.lora_B.double() @ self.lora_A.double()).to(self.lora_B.dtype)

    def truncated(self, rank: int) -> tuple[LoraFactors, float]:
        """Return the best factors of a lower rank, and the Frobenius norm of what they leave out.

        By QR of both factors and the singular values of a core of `self.rank` rows (float64): no matrix of
        outputs x inputs is formed. By Eckart and Young no product of that rank is nearer.

        Args:
            rank (`int`): at least 1 and at most the rank, `outputs` and `inputs`.

        Returns:
            `tuple[LoraFactors, float]`: `lora_A` with orthonormal rows, and `lora_B` whose column norms are the
            singular values, descending, signs as in [`rotate_lora`]; and the norm of the rest.

        Raises:
            ValueError: if the rank is out of range.

        Example:
            >>> import torch
            >>> from hfnoise.privacy import LoraFactors
            >>> wide = LoraFactors(lora_A=torch.eye(2, 3), lora_B=torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
            >>> kept, left_out = wide.truncated(1)
            >>> kept.lora_B.tolist(), round(left_out, 6)
            ([[0.0], [4.0]], 3.0)
        """
        most = min(self.rank, self.lora_B.shape[0], self.lora_A.shape[1])
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
            raise ValueError(
                f"rank must be a whole number between 1 and {most}, got {rank!r}: the product of factors of shapes "
                f"{tuple(self.lora_B.shape)} and {tuple(self.lora_A.shape)} has at most {most} singular values."
            )
        left, left_core = torch.linalg.qr(self.lora_B.detach().double())
        right, right_core = torch.linalg.qr(self.lora_A.detach().double().mT)
        u, values, v = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
        columns = left @ (u[:, :rank] * values[:rank])
        rows = v[:rank] @ right.mT
        signs = column_signs(columns, rows.mT)
        kept = LoraFactors((rows * signs[:, None]).to(self.lora_A.dtype), (columns * signs).to(self.lora_B.dtype))
        return kept, float(values[rank:].norm())


def stack_factors(parts: list[LoraFactors]) -> LoraFactors:
    """Return factors whose product is the sum of the products, of the sum of the ranks.

    Example:
        >>> import torch
        >>> from hfnoise.privacy.lora_factors import LoraFactors, stack_factors
        >>> one = LoraFactors(torch.ones(1, 2), torch.ones(2, 1))
        >>> stack_factors([one, one]).dense().tolist()
        [[2.0, 2.0], [2.0, 2.0]]
    """
    return LoraFactors(torch.cat([part.lora_A for part in parts]), torch.cat([part.lora_B for part in parts], dim=1))


def column_signs(columns: Float[Tensor, "outputs rank"], backup: Float[Tensor, "size rank"]) -> Float[Tensor, " rank"]:
    """Return the sign of the entry of largest magnitude of each column; of a column that is zero, that of `backup`.

    Eigenvectors and singular vectors have no sign of their own: without a rule the same matrices would give other
    factors with another LAPACK. A column of rounding errors has no sign worth following, hence the second matrix.

    Example:
        >>> import torch
        >>> from hfnoise.privacy.lora_factors import column_signs
        >>> column_signs(torch.tensor([[1.0, 0.0], [-3.0, 0.0]]), torch.tensor([[1.0, -1.0]])).tolist()
        [-1.0, -1.0]
    """
    pivots, spare = _largest_entries(columns), _largest_entries(backup)
    sizes = pivots.abs()
    # Below the square root of the precision, what a Gram matrix leaves of a zero column.
    zero = sizes <= torch.finfo(columns.dtype).eps ** 0.5 * sizes.max()
    return torch.where(torch.where(zero, spare, pivots) < 0, -1.0, 1.0).to(columns.dtype)


def _largest_entries(columns: Tensor) -> Tensor:
    low, high = torch.aminmax(columns, dim=0)
    return torch.where(high >= -low, high, low)


def check_factors(lora_A: Tensor, lora_B: Tensor, what: str = "lora_A and lora_B") -> None:
    """Raise an error unless these are the two factors of a LoRA layer, in a dtype that can carry a rotation.

    Whether they are finite is not looked at; see [`check_finite`].

    Raises:
        TypeError: if they are no tensors, or not both float32 or both float64.
        ValueError: if their shapes are not those of a product.
    """
    for factor in (lora_A, lora_B):
        if not isinstance(factor, Tensor):
            raise TypeError(f"{what} must be torch tensors, got {type(factor).__name__}.")
    if lora_A.dtype not in FACTOR_DTYPES or lora_A.dtype != lora_B.dtype:
        raise TypeError(
            f"{what} must both be float32 or both float64, got {lora_A.dtype} and {lora_B.dtype}: rounded to 16 bits "
            "the rows of A are orthonormal to 2.5e-4 only and products are not preserved. Keep adapters in float32 "
            "(PEFT does so by default, autocast_adapter_dtype=True)."
        )
    if (
        lora_A.dim() != 2
        or lora_B.dim() != 2
        or lora_A.shape[0] != lora_B.shape[1]
        or 0 in lora_A.shape + lora_B.shape
    ):
        raise ValueError(
            f"{what} must have the shapes (rank, inputs) and (outputs, rank) of PEFT's lora_A.weight and "
            f"lora_B.weight, got {tuple(lora_A.shape)} and {tuple(lora_B.shape)}."
        )


def check_finite(factor: Tensor, what: str) -> None:
    """Raise ValueError if a factor holds NaN or infinity."""
    if not factor.isfinite().all():
        raise ValueError(
            f"{what} holds {int((~factor.isfinite()).sum())} values that are not finite: training diverged, or the "
            "array was damaged on its way. Leave this client or round out; one NaN would spread to every weight."
        )
