"""Tree rows: the padded rows of a micro-batch as one row that holds every shared prompt once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The label that the Hugging Face libraries ignore.
IGNORED = -100


@dataclass(frozen=True)
class TreeSegments:
    """Who may attend to whom in a tree row, as lengths: for each prompt its prefix, then its branches.

    Args:
        prefixes (`tuple[int, ...]`): tokens that the branches of a prompt share, 0 if they share at most one.
        branches (`tuple[tuple[int, ...], ...]`): tokens of each branch of each prompt.

    Example:
        >>> from hfnoise.preference.tree_rows import TreeSegments
        >>> segments = TreeSegments(prefixes=(3,), branches=((4, 2),))
        >>> segments.tokens, segments.longest_path
        (9, 7)
    """

    prefixes: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return sum(self.prefixes) + sum(map(sum, self.branches))

    @property
    def longest_path(self) -> int:
        """Tokens of the longest prefix and branch."""
        return max(prefix + max(own) for prefix, own in zip(self.prefixes, self.branches, strict=True))


@dataclass(frozen=True)
class TreeRow:
    """One row in the place of a padded micro-batch, and the way back.

    Args:
        input_ids (`torch.Tensor` of shape `(1, tokens)`): prefix, branch, branch, ..., prefix, branch, ...
        position_ids (`torch.Tensor` of shape `(1, tokens)`): those of the tokens in their own row.
        shift_labels (`torch.Tensor` of shape `(1, tokens)`): the next token where it is scored, else -100.
        segments (`TreeSegments`): the lengths that attention needs.
        scored (`torch.Tensor` of shape `(scored,)`): places of the labels in this row.
        targets (`torch.Tensor` of shape `(scored,)`): their places in the padded rows, flattened.
        padded_shape (`tuple[int, int]`): rows and width - 1 of the padded batch.
    """

    input_ids: Tensor
    position_ids: Tensor
    shift_labels: Tensor
    segments: TreeSegments
    scored: Tensor
    targets: Tensor
    padded_shape: tuple[int, int]

    def padded(self, values: Tensor) -> Tensor:
        """Return values per token, shape `(1, tokens)`, as `(rows, width - 1)`: 0 where nothing is scored."""
        flat = values.new_zeros(self.padded_shape[0] * self.padded_shape[1])
        return flat.index_copy(0, self.targets, values[0, self.scored]).view(self.padded_shape)


def tree_row(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, branches: int) -> TreeRow:
    """Return the tree row of a padded micro-batch: P - 1 + sum L tokens for a prompt of P in the place of sum (P + L).

    The layout of flash-preference (github.com/li-plus/flash-preference): the last shared token is repeated at the head
    of every branch, so that each position predicts one label and a stock language-model head can score the row. The
    shared prefix is the longest common beginning of the rows, up to the shortest prompt among them; branches may have
    prompt tokens of their own.

    Args:
        input_ids (`torch.Tensor` of shape `(branches * prompts, width)`, int64): rows i, i + prompts, i + 2 prompts,
            ... continue the same prompt.
        attention_mask (`torch.Tensor` of the same shape): 1 on tokens, 0 on padding, on either side.
        completion_mask (`torch.Tensor` of the same shape): 1 on the tokens that are scored.
        branches (`int`): rows per prompt, at least 1.

    Returns:
        `TreeRow`, on the device of `input_ids`; building it waits for that device once.

    Raises:
        ValueError: if the rows are no multiple of `branches`, or have padding between tokens.

    Example:
        >>> import torch
        >>> from hfnoise.preference.tree_rows import tree_row
        >>> ids = torch.tensor([[5, 6, 7, 1, 2], [5, 6, 7, 3, 0]])
        >>> row = tree_row(ids, (ids > 0).int(), torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 1, 0]]), branches=2)
        >>> row.input_ids.tolist(), row.shift_labels.tolist()
        ([[5, 6, 7, 1, 7]], [[-100, -100, 1, 2, 3]])
    """
    rows, width = input_ids.shape
    if branches < 1 or rows % branches:
        raise ValueError(f"{rows} rows are no multiple of branches={branches}; give every prompt all its branches.")
    real = attention_mask.bool()
    # A row without holes begins once.
    if bool(((real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0] > 1).any()):
        raise ValueError("attention_mask has padding between tokens; pad rows on the left or on the right only.")
    scored = completion_mask.bool() & real
    first, lengths = real.int().argmax(1), real.sum(1)
    shared = _shared_tokens(input_ids, real, scored, first, lengths, branches)

    prompts = rows // branches
    device = input_ids.device
    # Segments of a prompt: the prefix as it stands in the first row, then the branch of every row.
    row_of_branch = torch.arange(rows, device=device).view(branches, prompts).T
    segment_row = torch.cat([row_of_branch[:, :1], row_of_branch], 1).flatten()
    segment_start = torch.cat([torch.zeros_like(shared)[:, None], (shared - 1)[:, None].expand(-1, branches)], 1)
    branch_lengths = (lengths.view(branches, prompts).T - shared[:, None]).clamp(min=0)
    by_prompt = torch.cat([(shared - 1)[:, None], branch_lengths], 1)
    sizes = by_prompt.flatten()
    plan = by_prompt.tolist()

    segment = torch.repeat_interleave(sizes)
    place = torch.arange(segment.numel(), device=device) - (sizes.cumsum(0) - sizes)[segment]
    position = place + segment_start.flatten()[segment]
    row = segment_row[segment]
    column = first[row] + position
    is_scored = (segment % (branches + 1) > 0) & scored[row, column + 1]
    return TreeRow(
        input_ids=input_ids[row, column][None],
        position_ids=position[None],
        shift_labels=torch.where(is_scored, input_ids[row, column + 1], IGNORED)[None],
        segments=TreeSegments(tuple(own[0] for own in plan), tuple(tuple(own[1:]) for own in plan)),
        scored=is_scored.nonzero()[:, 0],
        targets=(row * (width - 1) + column)[is_scored],
        padded_shape=(rows, width - 1),
    )


def _shared_tokens(
    input_ids: Tensor, real: Tensor, scored: Tensor, first: Tensor, lengths: Tensor, branches: int
) -> Tensor:
    """Return how many leading tokens the rows of every prompt share, shape `(prompts,)`, at least 1.

    One shared token is no prefix, since it is repeated in every branch; so none is the same as one.
    """
    rows, width = input_ids.shape
    prompts = rows // branches
    place = torch.arange(width, device=input_ids.device).expand(rows, -1)
    aligned = input_ids.gather(1, (first[:, None] + place).clamp(max=width - 1))
    equal = (aligned == aligned[:prompts].repeat(branches, 1)) & (place < lengths[:, None])
    common = equal.int().cumprod(1).sum(1)
    prompt = torch.where(scored.any(1), scored.int().argmax(1) - first, lengths)
    return torch.minimum(common, prompt).view(branches, prompts).amin(0).clamp(min=1)
