"""What `create_model_card` is given, in the names of transformers and of TRL."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class CardArguments:
    """What only the user knows of a run.

    Args:
        model_name (`str`, *optional*): headline; the name of the output folder by default.
        dataset_name (`str` or `list[str]`, *optional*): identifiers of the data, if they may be named.
        tags (`str` or `list[str]`, *optional*): more tags.
        language (`str`, *optional*), license (`str`, *optional*): identifiers of the Hub.
        finetuned_from (`str`, *optional*): the base, where the model does not know it.

    Example:
        >>> from hfnoise.cards import CardArguments
        >>> CardArguments(dataset_name=["someone/pairs", "more pairs"]).trained_on
        ' on `someone/pairs` and `more pairs`'
    """

    model_name: str | None = None
    dataset_name: str | list[str] | None = None
    tags: str | list[str] | None = None
    language: str | None = None
    license: str | None = None
    finetuned_from: str | None = None

    @property
    def datasets(self) -> list[str]:
        """The identifiers of the data."""
        return [self.dataset_name] if isinstance(self.dataset_name, str) else list(self.dataset_name or [])

    @property
    def trained_on(self) -> str:
        """What follows "trained" in a sentence; nothing where no data is named."""
        return f" on {' and '.join(f'`{name}`' for name in self.datasets)}" if self.datasets else ""

    @property
    def more_tags(self) -> list[str]:
        """The tags as a list."""
        return [self.tags] if isinstance(self.tags, str) else list(self.tags or [])

    @property
    def metadata(self) -> dict[str, Any]:
        """The part of the YAML block that is given; data whose name cannot be one of the Hub is left out."""
        datasets = [name for name in self.datasets if _HUB_NAME.fullmatch(name)]
        return {"datasets": datasets, "language": self.language, "license": self.license}
