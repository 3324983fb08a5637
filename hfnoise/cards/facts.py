"""What every card states, whatever the family: a card that lacks one of these cannot be built."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import CardData, DatasetCard, DatasetCardData, ModelCard, ModelCardData

import hfnoise
from hfnoise.cards.figures import Metric
from hfnoise.cards.origin import Base, command_line, library_versions
from hfnoise.cards.rendering import plain, render_card

Rows = Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """The facts of a card; [`render`] makes the card of them.

    Args:
        name (`str`): headline.
        lead (`str`): what this is, in a sentence or two of Markdown.
        method (`str`): row of the table of methods, or the class; first in the block `hfnoise:`.
        base (`Base`): what the run began from, see [`base_of`].
        noise (rows): the noise: rates, epsilon, bits, evaluations saved.
        seeds (rows): every seed; where noise comes from a secret, that it does.
        snippet (`str`): Python that loads it.
        library_name (`str`): of the Hub.
        tags (iterable of `str`): of the Hub.
        noise_note, use_note, results_note (`str`, *optional*): what is to be said below.
        settings (rows, *optional*): of the training.
        metrics (sequence of `Metric`, *optional*): results, each with its spread.
        citation (`str`, *optional*): BibTeX.
        block (`dict`, *optional*): the rest of `hfnoise:`, for programs; it comes back from YAML as it is.
        metadata (`dict`, *optional*): more of the YAML block (`license`, `datasets`, ...); what is empty is left out.
        relation (`str`, defaults to `"finetune"`): `base_model_relation`, where the base is on the Hub.
        command (`str`, *optional*), versions (`str`, *optional*): those of this process by default.
    """

    name: str
    lead: str
    method: str
    base: Base
    noise: Rows
    seeds: Rows
    snippet: str
    library_name: str
    tags: Iterable[str]
    noise_note: str = ""
    use_note: str = ""
    results_note: str = ""
    settings: Rows = ()
    metrics: Sequence[Metric] = ()
    citation: str = ""
    block: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    relation: str = "finetune"
    command: str = field(default_factory=command_line)
    versions: str = field(default_factory=library_versions)

    def data(self, kind: type[CardData] = ModelCardData) -> CardData:
        """Return the YAML block.

        Args:
            kind (`type`, defaults to `ModelCardData`): or `DatasetCardData`.
        """
        base = {}
        if self.base.hub_id is not None:
            base = {"base_model": self.base.hub_id, "base_model_relation": self.relation}
        commit = {} if self.base.commit is None else {"base_revision": self.base.commit}
        block = {"method": self.method, **self.block, **commit, "version": hfnoise.__version__}
        library = {"library_name": self.library_name, **base} if issubclass(kind, ModelCardData) else {}
        return kind(
            **library,
            tags=list(dict.fromkeys(self.tags)),
            **{name: value for name, value in self.metadata.items() if value},
            hfnoise=plain(block),
        )

    def render(self, template: str = "card.md", **own: Any) -> ModelCard:
        """Return the card of a model.

        Args:
            template (`str`, defaults to `"card.md"`): of the family, which extends `card.md`.
            **own: variables of that template.

        Raises:
            ValueError: if something that the card would say was not known, see [`render_card`].
        """
        return self._render(ModelCard, self.data(), template, own)

    def render_dataset(self, template: str, **own: Any) -> DatasetCard:
        """Return the card of a dataset; arguments as of [`render`]."""
        return self._render(DatasetCard, self.data(DatasetCardData), template, own)

    def _render(self, card_class: type, data: CardData, template: str, own: dict[str, Any]) -> Any:
        # Nothing here is asked of the user twice: an empty table would be a heading without a word.
        for name in ("noise", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"a card states its {name}: give CardFacts at least one row of {name!r}.")
        fields = (
            "name", "lead", "method", "base", "noise", "seeds", "snippet", "noise_note", "use_note", "results_note",
            "settings", "metrics", "citation", "command", "versions",
        )  # fmt: skip
        values = {name: getattr(self, name) for name in fields}
        # A folder may be called anything: a run must not end because its card looks unfinished.
        verbatim = (self.command, self.snippet, f"# {self.name}\n")
        return render_card(template, data, verbatim, card_class, **values, **own)


def run_seeds(args: Any) -> list[tuple[str, str]]:
    """Return the seeds of a Trainer.

    Args:
        args (`transformers.TrainingArguments`): of the run.
    """
    # Of new weights, dropout and, without the other, of the order of the data.
    rows = [("seed", str(args.seed))]
    return rows if args.data_seed is None else [*rows, ("data_seed (order of the data)", str(args.data_seed))]


def setting_rows(args: Any, names: Iterable[str]) -> list[tuple[str, str]]:
    """Return those of some arguments of a Trainer that have a value, as rows; enums as what they stand for.

    Args:
        args (`transformers.TrainingArguments`): of the run.
        names (iterable of `str`): of arguments; those that this class lacks are left out.
    """
    values = {name: getattr(args, name, None) for name in names}
    return [(name, _text(getattr(value, "value", value))) for name, value in values.items() if value is not None]


def _text(value: Any) -> str:
    return " + ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
