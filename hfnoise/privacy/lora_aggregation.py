"""Five ways to make one LoRA adapter from those of federated clients, with what each of them changes beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, overload

import torch
from jaxtyping import Float
from torch import Tensor

from hfnoise.privacy.lora_clients import LoraClients, read_clients, same_names, scaling_of_layer
from hfnoise.privacy.lora_factors import LoraA, LoraB, LoraFactors, stack_factors
from hfnoise.privacy.lora_rotation import rotate_lora

AGGREGATIONS = ("fedavg", "ffa", "flora", "fedex", "fedsvd")
# These average factors entry by entry, so all clients need the rank and the scaling of the server.
_AVERAGING = ("fedavg", "ffa", "fedex")


class AggregatedLora(NamedTuple):
    """What [`aggregate_lora`] returns for a layer.

    Args:
        lora_A (`torch.Tensor` of shape `(rank, inputs)`): of the server after the round.
        lora_B (`torch.Tensor` of shape `(outputs, rank)`): of the server after the round.
        residual (`LoraFactors`, *optional*): `residual.dense()` is to be **added to the base weight**, the scaling is
            in it. Of `"flora"` and `"fedex"`; None where the base weight stays as it is.
        rotation (`torch.Tensor` of shape `(rank, rank)`, float64, *optional*): of `"fedsvd"`: the new `lora_A` is
            `rotation.T` times the old one with orthonormal rows. None where clients brought rows of their own.
        truncation_error (`float`): Frobenius norm of the part of the average update that a truncation left out, in
            units of the weight (scaling included); 0 where nothing was truncated.
    """

    lora_A: LoraA
    lora_B: LoraB
    residual: LoraFactors | None = None
    rotation: Float[Tensor, "rank rank"] | None = None
    truncation_error: float = 0.0


@overload
def aggregate_lora(
    method: str,
    lora_A: Tensor,
    lora_B: Tensor,
    client_lora_A: Sequence[Tensor] | Tensor | None,
    client_lora_B: Sequence[Tensor] | Tensor,
    weights: Sequence[float] | Tensor | None = None,
    scaling: float | Sequence[float] = 1.0,
    *,
    server_scaling: float | None = None,
    residual_rank: int | None = None,
    generator: torch.Generator | None = None,
) -> AggregatedLora: ...


@overload
def aggregate_lora(
    method: str,
    lora_A: Mapping[str, Tensor],
    lora_B: Mapping[str, Tensor],
    client_lora_A: Sequence[Mapping[str, Tensor]] | None,
    client_lora_B: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float] | Tensor | None = None,
    scaling: float | Sequence[float] | Mapping[str, float] | Sequence[Mapping[str, float]] = 1.0,
    *,
    server_scaling: float | Mapping[str, float] | None = None,
    residual_rank: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, AggregatedLora]: ...


def aggregate_lora(  # type: ignore[no-untyped-def]
    method: str,
    lora_A,
    lora_B,
    client_lora_A,
    client_lora_B,
    weights=None,
    scaling=1.0,
    *,
    server_scaling=None,
    residual_rank=None,
    generator=None,
):
    r"""Return the server's factors after a round, from those that the clients trained.

    With p_k = n_k / sum of n_k over the clients given (all weights equal if hidden), s_k the clients' scalings, s the
    server's, and bars for averages with p_k:

    | method | new lora_A | new lora_B | added to the base weight |
    |---|---|---|---|
    | `"fedavg"` (arXiv 1602.05629 on the factors) | mean A | mean B | - |
    | `"ffa"` (FFA-LoRA, arXiv 2403.12313) | A, frozen | mean B | - |
    | `"flora"` (FLoRA, arXiv 2409.05976) | A, or drawn anew | 0 | sum p_k s_k B_k A_k |
    | `"fedex"` (FedEx-LoRA, arXiv 2410.09432) | mean A | mean B | s (sum p_k B_k A_k - mean B mean A) |
    | `"fedsvd"` (arXiv 2505.12805) | V^T | U Sigma | - |

    where U Sigma V^T is the singular value decomposition of sum p_k (s_k / s) B_k A_k, which is mean B A for clients
    that hold the server's A; taken by [`rotate_lora`]. The formulas are those of the official FedSVD code, which
    implements all five. Departures: `"flora"` keeps A unless `generator` is given (B is zero, so the product is not
    affected); the residual stays in factors, that of `"fedex"` as s sum p_k (B_k - mean B)(A_k - mean A), the same
    matrix without cancellation; sums are in float64.

    **Scaling and ranks.** The scaling alpha / r is no part of the factors: a layer adds s B A to its weight. The
    methods `"fedavg"`, `"ffa"` and `"fedex"` average factors entry by entry, so clients must have the server's rank
    and scaling. `"flora"` and `"fedsvd"` average products, and take clients of different ranks r_k and scalings s_k:
    factors are stacked, each B_k weighted by p_k s_k (for `"fedsvd"` by p_k s_k / s, since the server's layer
    multiplies by s), then truncated. `"flora"` truncates only if `residual_rank` is given, `"fedsvd"` to the server's
    rank. A client whose A_k is the first r_k rows of the server's A, the directions of largest singular value, fits
    into the server's rows: nothing is lost, and the row space stays. What a client does not hold counts as zero.

    Formal guarantee: none of its own. It is post-processing of what clients released, whose (epsilon, delta) each
    client's ledger states; nothing here adds noise, and `weights` are as public as the result.

    Args:
        method (`str`): one of the five above.
        lora_A (`torch.Tensor` of shape `(rank, inputs)`, or `dict` of them by layer): the server's before the round,
            float32 or float64.
        lora_B (`torch.Tensor` of shape `(outputs, rank)`, or `dict`): the same.
        client_lora_A (sequence of `torch.Tensor` or of `dict`, or a tensor of shape `(clients, rank, inputs)`): after
            local training. None for `"ffa"` and `"fedsvd"`, whose clients send B only: a client with r_k columns of B
            then holds the first r_k rows of `lora_A`.
        client_lora_B (sequence of `torch.Tensor` or of `dict`, or a tensor): after local training, not differences.
        weights (sequence of `float`, *optional*): n_k > 0, such as numbers of examples. None, for clients that hide
            them: all alike.
        scaling (`float` or sequence of `float`, defaults to `1.0`): alpha / r of the clients, or of each of them; of
            factors in dicts also a `dict` by layer, or one for each client (`rank_pattern`, `alpha_pattern`).
        server_scaling (`float` or `dict` by layer, *optional*): of the server's layer; needed if the clients' differ.
        residual_rank (`int`, *optional*): of the residual of `"flora"` and `"fedex"`, which is truncated to it; must
            not exceed what the residual has. Default: exact, in factors of rank sum r_k.
        generator (`torch.Generator`, *optional*): to draw A anew for `"flora"`, uniform in +-1 / sqrt(inputs) as PEFT.

    Returns:
        [`AggregatedLora`], or a `dict` of them by layer if `lora_A` is one.

    Raises:
        TypeError: for factors that are not float32 or float64.
        ValueError: for an unknown method; clients with other layers, shapes, or (where not supported) ranks; weights
            that are not positive and finite; factors that are not finite; and for `"ffa"` and `"fedsvd"` clients that
            trained A as well.

    Example:
        >>> import torch
        >>> from hfnoise.privacy import aggregate_lora
        >>> A, zero, one = torch.eye(1, 2), torch.zeros(2, 1), torch.ones(2, 1)
        >>> aggregate_lora("ffa", A, zero, [A, A], [one, zero], weights=[3, 1]).lora_B.tolist()
        [[0.75], [0.75]]
        >>> aggregate_lora("flora", A, zero, [A, A], [one, zero], [3, 1], scaling=2.0).residual.dense().tolist()
        [[1.5, 0.0], [1.5, 0.0]]
    """
    if method not in AGGREGATIONS:
        raise ValueError(f"method must be one of {', '.join(AGGREGATIONS)}; got {method!r}.")
    if residual_rank is not None and method not in ("flora", "fedex"):
        raise ValueError(f"residual_rank={residual_rank} belongs to 'flora' and 'fedex'; {method!r} has no residual.")
    if generator is not None and method != "flora":
        raise ValueError(f"generator belongs to 'flora', which may draw A anew; {method!r} draws nothing.")
    options = {"residual_rank": residual_rank, "generator": generator}
    if isinstance(lora_A, Mapping):
        same_names(lora_A, lora_B, client_lora_A, client_lora_B)
        return {
            name: aggregate_lora(
                method,
                lora_A[name],
                lora_B[name],
                None if client_lora_A is None else [client[name] for client in client_lora_A],
                [client[name] for client in client_lora_B],
                weights,
                scaling_of_layer(scaling, name),
                server_scaling=scaling_of_layer(server_scaling, name),
                **options,
            )
            for name in lora_A
        }
    clients = read_clients(method, lora_A, lora_B, client_lora_A, client_lora_B, weights, scaling, server_scaling)
    if method in _AVERAGING:
        clients.require_one_rank_and_scaling(method)
    if method == "flora":
        return _flora(clients, residual_rank, generator)
    if method == "fedsvd":
        return _fedsvd(clients)
    mean_B = clients.mean(clients.lora_B)
    if method == "ffa":
        clients.require_frozen_A(method)
        return AggregatedLora(clients.server.lora_A.clone(), mean_B.to(clients.dtype))
    mean_A = clients.mean(clients.lora_A)
    means = mean_A.to(clients.dtype), mean_B.to(clients.dtype)
    if method == "fedavg":
        return AggregatedLora(*means)
    parts = zip(clients.shares, clients.lora_A, clients.lora_B, strict=True)
    # sum p_k (B_k - mean B)(A_k - mean A) = sum p_k B_k A_k - mean B mean A, as the p_k sum to 1.
    deviations = [LoraFactors(a - mean_A, clients.server_scaling * share * (b - mean_B)) for share, a, b in parts]
    residual, error = _truncated(stack_factors(deviations), residual_rank)
    return AggregatedLora(*means, clients.cast(residual), truncation_error=error)


def average_lora_B(
    lora_A: LoraA,
    lora_B: LoraB,
    client_lora_B: Sequence[Tensor] | Tensor,
    weights: Sequence[float] | Tensor | None = None,
    scaling: float | Sequence[float] = 1.0,
    *,
    server_scaling: float | None = None,
) -> LoraB:
    """Return the average B of a layer whose A is frozen, before any rotation: what [`LoraRotation.advance`] takes.

    It is sum p_k (s_k / s) B_k, a client of lower rank r_k filled up with zeros: it holds the first r_k rows of A.
    `aggregate_lora("fedsvd", ...)` is this average, rotated. Arguments and errors are those of [`aggregate_lora`].

    Example:
        >>> import torch
        >>> from hfnoise.privacy import average_lora_B
        >>> average_lora_B(torch.eye(2, 3), torch.zeros(1, 2), [torch.ones(1, 2), torch.ones(1, 1)]).tolist()
        [[1.0, 0.5]]
    """
    clients = read_clients("fedsvd", lora_A, lora_B, None, client_lora_B, weights, scaling, server_scaling)
    return clients.mean_lora_B().to(clients.dtype)


def _flora(clients: LoraClients, residual_rank: int | None, generator: torch.Generator | None) -> AggregatedLora:
    residual, error = _truncated(clients.stacked(), residual_rank)
    fresh = clients.server.lora_A.clone()
    if generator is not None:
        fresh = (2 * torch.rand(fresh.shape, generator=generator, dtype=fresh.dtype) - 1) / fresh.shape[1] ** 0.5
    zero = torch.zeros_like(clients.server.lora_B)
    return AggregatedLora(fresh, zero, clients.cast(residual), truncation_error=error)


def _fedsvd(clients: LoraClients) -> AggregatedLora:
    server = clients.server
    outside = clients.holders_of_other_rows()
    if not outside:
        # The stack, summed in place: of the server's rank, so there is nothing to truncate.
        rows, columns, rotation = rotate_lora(server.lora_A.double(), clients.mean_lora_B())
        return AggregatedLora(rows.to(clients.dtype), columns.to(clients.dtype), rotation=rotation)
    if clients.have_one_rank:
        clients.require_frozen_A("fedsvd")
    stack = clients.stacked()
    # The server's rows with zeros: if the clients bring fewer directions than its rank, the others stay its own.
    own = LoraFactors(server.lora_A.double(), torch.zeros_like(server.lora_B, dtype=torch.float64))
    kept, error = stack_factors([stack, own]).truncated(server.rank)
    columns = kept.lora_B / clients.server_scaling
    return AggregatedLora(*clients.cast(LoraFactors(kept.lora_A, columns)), truncation_error=error)


def _truncated(factors: LoraFactors, rank: int | None) -> tuple[LoraFactors, float]:
    return (factors, 0.0) if rank is None else factors.truncated(rank)
