"""Clients of a federation from one dataset: skewed labels, or whole values of a column such as packages or authors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from hfnoise.worlds.code import code_texts

if TYPE_CHECKING:
    from datasets import Dataset

# A draw in which some client gets too little is repeated; with reasonable arguments a few draws are enough.
_DRAWS = 200


def dirichlet_split(
    dataset: Dataset, clients: int, alpha: float = 0.5, label_column: str = "label", seed: int = 0, min_rows: int = 1
) -> dict[str, Dataset]:
    """Return clients whose labels are skewed: the rows of every label are shared out by a Dirichlet draw of its own.

    The usual construction (Yurochkin et al., arXiv 1905.12022, section 4): for every label p ~ Dirichlet(alpha, ...,
    alpha) over the clients, and client j gets the share p_j of its rows. Every row is at exactly one client. FedSVD's
    experiments (arXiv 2505.12805) use alpha 0.5, and do not say how they share out.

    Args:
        dataset (`datasets.Dataset`): the rows of all clients.
        clients (`int`): how many, at least 1.
        alpha (`float`, defaults to `0.5`): above 0. Small: a client has few labels; large: all have the same mixture.
        label_column (`str`, defaults to `"label"`): column whose values are skewed; numbers or strings.
        seed (`int`, defaults to `0`): at least 0; of draw and order. The same seed gives the same clients everywhere.
        min_rows (`int`, defaults to `1`): of every client; the whole draw is repeated until it holds.

    Returns:
        `dict[str, datasets.Dataset]`: `client_0`, `client_1`, ... with their rows in random order.

    Raises:
        TypeError: for something that is no `datasets.Dataset`.
        ValueError: for arguments out of range, an unknown column, rows without a label, or if no draw gives every
            client `min_rows`.

    Example:
        >>> from datasets import Dataset
        >>> from hfnoise.worlds.federated import dirichlet_split
        >>> parts = dirichlet_split(Dataset.from_dict({"label": [0, 1] * 50}), clients=3, alpha=0.5)
        >>> list(parts), sum(map(len, parts.values()))
        (['client_0', 'client_1', 'client_2'], 100)
    """
    labels = _values(dataset, label_column)
    clients, min_rows = _count("clients", clients, 1), _count("min_rows", min_rows, 1)
    seed = _count("seed", seed, 0)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be a number above 0, got {alpha!r}. Use 0.5 for a strong skew, 100 for none.")
    if clients * min_rows > len(labels):
        raise ValueError(
            f"{clients} clients with min_rows={min_rows} need {clients * min_rows} rows, and there are {len(labels)}. "
            "Lower clients or min_rows."
        )
    import numpy

    # RandomState, whose stream is frozen: a split must not change with the version of numpy.
    random = numpy.random.RandomState(seed % 2**32)
    by_label = [[i for i, label in enumerate(labels) if label == value] for value in dict.fromkeys(labels)]
    largest_minimum = 0
    for _ in range(_DRAWS):
        parts: list[list[int]] = [[] for _ in range(clients)]
        for rows in by_label:
            shares = random.dirichlet([alpha] * clients)
            # A tiny alpha underflows to 0 / 0: then the label goes to one client, the limit of small alpha.
            if not numpy.isfinite(shares).all():
                shares = numpy.eye(clients)[random.randint(clients)]
            cuts = (numpy.cumsum(shares)[:-1] * len(rows)).round().astype(int).clip(0, len(rows))
            order = random.permutation(rows)
            for part, piece in zip(parts, numpy.split(order, cuts), strict=True):
                part.extend(int(row) for row in piece)
        smallest = min(map(len, parts))
        if smallest >= min_rows:
            return {f"client_{k}": dataset.select(random.permutation(part)) for k, part in enumerate(parts)}
        largest_minimum = max(largest_minimum, smallest)
    raise ValueError(
        f"none of {_DRAWS} draws with alpha={alpha:g} gave each of {clients} clients min_rows={min_rows} of the "
        f"{len(labels)} rows; at best the smallest had {largest_minimum}. Raise alpha, or lower min_rows or clients."
    )


def split_by_column(dataset: Dataset, column: str, clients: int | None = None) -> dict[str, Dataset]:
    """Return clients that own whole values of a column: authors, hospitals, packages.

    Args:
        dataset (`datasets.Dataset`): the rows of all clients.
        column (`str`): whose values are kept together; numbers or strings.
        clients (`int`, *optional*): how many; by default one for every value. With fewer clients than values, values
            are put together, each, from the largest to the smallest, where the fewest rows are: so large values stay
            alone and small ones share a client.

    Returns:
        `dict[str, datasets.Dataset]`: the larger the earlier, with rows in their old order; the name is the value, or
        its largest value and the number of others, as in `"email+3"`.

    Raises:
        TypeError: for something that is no `datasets.Dataset`.
        ValueError: for an unknown column, rows without a value, or more clients than values.

    Example:
        >>> from datasets import Dataset
        >>> from hfnoise.worlds.federated import split_by_column
        >>> parts = split_by_column(Dataset.from_dict({"author": list("aaaabbc")}), "author", clients=2)
        >>> {name: len(part) for name, part in parts.items()}
        {'a': 4, 'b+1': 3}
    """
    values = _values(dataset, column)
    counts = Counter(values)
    clients = len(counts) if clients is None else _count("clients", clients, 1)
    if clients > len(counts):
        raise ValueError(
            f"clients={clients} is more than the {len(counts)} values of {column!r}, each of which stays with one "
            f"client. Ask for at most {len(counts)}."
        )
    groups: list[list[Hashable]] = [[] for _ in range(clients)]
    sizes = [0] * clients
    for value in sorted(counts, key=lambda value: (-counts[value], str(value))):
        smallest = sizes.index(min(sizes))
        groups[smallest].append(value)
        sizes[smallest] += counts[value]
    owner = {value: group for group, members in enumerate(groups) for value in members}
    rows: list[list[int]] = [[] for _ in range(clients)]
    for row, value in enumerate(values):
        rows[owner[value]].append(row)
    largest_first = sorted(range(clients), key=lambda group: -sizes[group])
    return {_group_name(groups[group]): dataset.select(rows[group]) for group in largest_first}


def code_clients(count: int, rows_per_client: int | None = None) -> dict[str, Dataset]:
    """Return clients that own packages of the Python standard library, for language modelling: data that are not IID.

    Each large package is a client, small ones and single modules share clients ([`split_by_column`] on the training
    rows of [`~hfnoise.worlds.code.code_texts`]). The docstrings model has read none of the code; held-out rows, of
    other modules, are `code_texts("validation")`.

    Args:
        count (`int`): clients, from 1 to the number of packages (about 160).
        rows_per_client (`int`, *optional*): the first so many rows of each, which are of its functions in random
            order; all of them by default.

    Returns:
        `dict[str, datasets.Dataset]`: columns `text` (at most 128 bytes), `function`, `module` and `package`; all
        functions of a package are at one client.

    Raises:
        ValueError: for more clients than packages, or more rows than the smallest client has.

    Example:
        >>> from hfnoise.worlds.federated import code_clients
        >>> clients = code_clients(4, rows_per_client=100)
        >>> len(clients), next(iter(clients.values())).column_names
        (4, ['text', 'function', 'module', 'package'])
    """
    texts = code_texts("train")
    packages = [module.split(".")[0] for module in texts["module"]]
    clients = split_by_column(texts.add_column("package", packages), "package", count)
    if rows_per_client is None:
        return clients
    wanted, least = _count("rows_per_client", rows_per_client, 1), min(map(len, clients.values()))
    if wanted > least:
        raise ValueError(
            f"rows_per_client={wanted} is more than the {least} rows of the smallest of {count} clients. Ask for at "
            f"most {least}, or for fewer clients."
        )
    return {name: part.select(range(wanted)) for name, part in clients.items()}


def _group_name(members: Sequence[Hashable]) -> str:
    return str(members[0]) if len(members) == 1 else f"{members[0]}+{len(members) - 1}"


def _values(dataset: Any, column: str) -> list[Hashable]:
    """Return the values of a column, checked."""
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"dataset must be a datasets.Dataset, got {type(dataset).__name__}: rows are shared out by number. Take "
            "one split of a DatasetDict; load a stream without streaming=True."
        )
    if column not in dataset.column_names:
        raise ValueError(f"there is no column {column!r}. The dataset has {', '.join(dataset.column_names)}.")
    values = list(dataset[column])
    for value in values:
        if not isinstance(value, (int, str)):
            raise ValueError(
                f"column {column!r} holds {value!r}; whole numbers and strings are allowed, in every row. Drop rows "
                "without a value, and cast others to classes."
            )
    return values


def _count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return value
