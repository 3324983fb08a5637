"""Searches of the noise: what they share. Candidates are run, verifiers compare their images, the best one is kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import ModularPipeline
from torch import Tensor

from hfnoise.latents import EvaluationBudget, candidate_noise, mean_ranks, noise_seeds
from hfnoise.pipelines.candidate_runs import CandidateRuns
from hfnoise.pipelines.initial_noise import InitialNoise, StartState
from hfnoise.pipelines.redenoise import check_count
from hfnoise.pipelines.search_trace import SearchTrace, next_noise
from hfnoise.pipelines.start_context import StartContext, check_words, repeated_words
from hfnoise.pipelines.start_report import StartReport
from hfnoise.pipelines.verifiers import Verifier, check_verifier, verified

NO_PARENT = -1


@dataclass(frozen=True)
class Round:
    """Candidates that can be made at once.

    Args:
        parents (sequence of sequences of `int`): a row a sample: of each candidate what it is made of, or -1.
        size (`float`, defaults to `0.0`): of the step from the parent.

    Example:
        >>> from hfnoise.pipelines.noise_search import Round
        >>> len(Round([[-1, -1, -1]]))
        3
    """

    parents: Sequence[Sequence[int]]
    size: float = 0.0

    def __len__(self) -> int:
        return len(self.parents[0])


class NoiseSearch(InitialNoise):
    """Base of the searches: which candidates come next is left to the subclass, by `_round`.

    A candidate is scored by the image that the call would make of it: by the same guider, the members of the chain
    that come after the search, and the same random numbers of the sampler; see
    [`~hfnoise.pipelines.candidate_runs.CandidateRuns`]. Candidate 0 is the noise that the search is given, so that by
    its own verifiers it never does worse than the plain run. The others are functions of that noise and of their
    numbers, so that a sample is searched alike in every batch, and any candidate can be drawn again from the trace.
    The best of all candidates is kept, whatever a subclass goes on with.

    Departure from arXiv 2501.09732: the budget is for the candidates of a sample, and exact: what would go beyond it
    is not begun. The call then draws the chosen noise, which is one more image; where that matters, `images` holds the
    chosen images of the search, and `latents` the noise without another run.
    """

    method: ClassVar[str]

    def __init__(
        self,
        verifier: Verifier | Mapping[str, Verifier],
        budget: int,
        *,
        judge: Verifier | None = None,
        batch_size: int = 1,
        preview_steps: int | None = None,
        prompts: str | Sequence[str] | None = None,
    ) -> None:
        self.verifier, self.budget, self.judge = verifier, budget, judge
        self.batch_size, self.preview_steps, self.prompts = batch_size, preview_steps, prompts
        self.trace: SearchTrace | None = None
        self.images: Tensor | None = None
        self.report: StartReport | None = None
        self._check()

    def _check(self) -> None:
        # Again at every call: the options are plain attributes, to be changed between calls.
        if not self._verifiers:
            raise ValueError("verifier is an empty mapping: a search needs at least one to compare by.")
        for one in self._verifiers.values():
            check_verifier(one)
        if self.judge is not None:
            check_verifier(self.judge, "judge")
        EvaluationBudget(self.budget)  # refuses
        check_count("batch_size", self.batch_size, 1)
        if self.preview_steps is not None:
            check_count("preview_steps", self.preview_steps, 1)
        check_words(self.prompts, "prompts")

    @property
    def _verifiers(self) -> dict[str, Verifier]:
        if isinstance(self.verifier, Mapping):
            return dict(self.verifier)
        return {getattr(self.verifier, "__name__", type(self.verifier).__name__): self.verifier}

    @abstractmethod
    def _round(self, values: Tensor, left: int) -> Round:
        """Return which candidates come next.

        Args:
            values (`torch.Tensor` of shape `(batch, candidates)`): of those until now, more being better.
            left (`int`): how many more the budget has, at least 1; of a longer round the first ones are made.
        """

    def check_pipeline(self, pipeline_class: type) -> None:
        """Raise ValueError if the runs of a pipeline cannot be made beside its call."""
        if issubclass(pipeline_class, ModularPipeline):
            raise ValueError(
                f"{type(self).__name__} runs the pipeline for each candidate, and {pipeline_class.__name__} is "
                "modular: search with a classic pipeline of the same parts, and give latents=search.latents(pipe, "
                "...)."
            )

    def refine(self, unit_noise: Tensor, context: StartContext) -> StartState:
        """Return the noise of the best candidate of each sample."""
        # What an earlier call found is not this one's, if this one fails.
        self.trace = self.images = self.report = None
        self._check()
        self._check_call(context)
        search = _Search(self, unit_noise, context)
        with context.pipe.progress_bar(total=self.budget) as bar:
            bar.set_description("searching noise")
            search.run(bar)
        self.trace, self.images = search.trace(), search.images
        chosen = search.chosen_noise() if any(self.trace.chosen) else unit_noise
        self.report = StartReport.of(unit_noise, chosen, self.trace.evaluations)
        return StartState(chosen, evaluations=self.trace.evaluations)

    def _check_call(self, context: StartContext) -> None:
        self.check_pipeline(type(context.pipe))
        if any(isinstance(member, NoiseSearch) for member in context.following):
            raise ValueError(
                "a chain has two searches, and the second would be made anew for each candidate of the first. Use one "
                "with the budget of both."
            )
        components = getattr(context.pipe, "components", {})
        if "vae" in components and components["vae"] is None:
            raise ValueError(
                f"this {context.name} has no vae, so that there are no images to compare: load it with its vae."
            )
        generator = context.generator
        if isinstance(generator, list) and len(generator) != context.batch:
            raise ValueError(f"there are {len(generator)} generators, and {context.batch} samples: give one a sample.")

    def _words(self, context: StartContext) -> list[str]:
        words = repeated_words(self.prompts, context.batch, "prompts") or context.prompts
        if words is not None:
            return words
        if "prompt" in context.arguments:
            raise ValueError(
                f"this call of {context.name} has embeddings and no prompt, so that a verifier cannot be told what "
                f"the images are to show. Give the words: {type(self).__name__}(..., prompts=...)."
            )
        return [""] * context.batch  # a pipeline without words


class _Search:
    """One search, of all samples of a call side by side."""

    def __init__(self, member: NoiseSearch, base: Tensor, context: StartContext) -> None:
        self.member, self.base, self.words = member, base.float(), member._words(context)
        self.budget = EvaluationBudget(member.budget, context.batch)
        self.runs = CandidateRuns(context, self.budget, member.preview_steps)
        self.seeds = noise_seeds(base)
        self.parents: list[list[int]] = [[] for _ in self.seeds]
        self.sizes: list[float] = []
        self.scores: dict[str, list[Tensor]] = {name: [] for name in member._verifiers}
        self.judged: list[Tensor] = []
        # The noise of candidates that others may be made of, and of those that are chosen: latents are small.
        self.noises: list[Tensor] = []
        self._pictures: list[dict[int, Tensor]] = [{} for _ in self.seeds]
        self.values = torch.empty(len(self.seeds), 0)

    def run(self, bar: Any) -> None:
        if not self._try([[NO_PARENT]] * len(self.seeds), 0.0, self.base[:, None], bar):
            raise ValueError(self._too_small())
        cost = self.budget.spent
        while (left := self.budget.affordable(cost)) > 0:
            chosen = self.member._round(self.values, left)
            for start in range(0, min(len(chosen), left), size := self.runs.together(self.member.batch_size)):
                parents = [list(row[start : min(start + size, left)]) for row in chosen.parents]
                before, count = self.budget.spent, len(parents[0])
                if not self._try(parents, chosen.size, self._made(parents, chosen.size), bar):
                    return
                cost = max(cost, -(-(self.budget.spent - before) // count))

    def _made(self, parents: list[list[int]], size: float) -> Tensor:
        first, shape = len(self.noises), tuple(self.base.shape[1:])
        columns = []
        for column in range(len(parents[0])):
            fresh = torch.stack([candidate_noise(seed, first + column, shape) for seed in self.seeds])
            fresh = fresh.to(self.base.device)
            origins = [row[column] for row in parents]
            if origins[0] != NO_PARENT:
                near = torch.stack([self.noises[origin][sample] for sample, origin in enumerate(origins)])
                fresh = next_noise(self.member.method, near, fresh, size)
            columns.append(fresh)
        return torch.stack(columns, 1)

    def _try(self, parents: list[list[int]], size: float, noise: Tensor, bar: Any) -> bool:
        """Return whether candidates could be run to their end; if so they are scored and kept."""
        before = self.budget.per_sample_spent
        images = self.runs.images(noise)
        bar.update(self.budget.per_sample_spent - before)
        if images is None:
            return False
        first, count = len(self.noises), noise.shape[1]
        for row, own in zip(self.parents, parents, strict=True):
            row.extend(own)
        self.sizes += [size] * count
        self.noises += noise.unbind(1)
        words = [word for word in self.words for _ in range(count)]
        flat = images.flatten(0, 1)

        def scored(verifier: Verifier) -> Tensor:
            return verified(verifier, flat, words).detach().unflatten(0, (len(images), count))

        for name, verifier in self.member._verifiers.items():
            self.scores[name].append(scored(verifier))
        if self.member.judge is not None:
            self.judged.append(scored(self.member.judge))
        every = torch.stack([torch.cat(found, 1) for found in self.scores.values()])
        self.values = every[0] if len(every) == 1 else mean_ranks(every)
        self._keep(images, first)
        return True

    def _keep(self, images: Tensor, first: int) -> None:
        for sample, (pictures, best) in enumerate(zip(self._pictures, self.chosen(), strict=True)):
            # Copies: a view would keep all images of its batch.
            pictures.update(enumerate((one.clone() for one in images[sample]), first))
            # With ranks a new candidate may turn the order of two old ones, so that all images may be needed.
            if len(self.scores) == 1:
                self._pictures[sample] = {best: pictures[best]}

    @property
    def images(self) -> Tensor:
        return torch.stack([row[best] for row, best in zip(self._pictures, self.chosen(), strict=True)])

    def chosen(self) -> list[int]:
        return best_candidates(self.values)

    def chosen_noise(self) -> Tensor:
        return torch.stack([self.noises[best][sample] for sample, best in enumerate(self.chosen())])

    def trace(self) -> SearchTrace:
        return SearchTrace(
            self.member.method, tuple(self.base.shape[1:]), tuple(self.seeds),
            tuple(map(tuple, self.parents)), tuple(self.sizes),
            {name: _table(torch.cat(found, 1)) for name, found in self.scores.items()}, _table(self.values),
            _table(torch.cat(self.judged, 1)) if self.judged else None, tuple(self.chosen()),
            self.budget.per_sample, self.budget.per_sample_spent, self.member.preview_steps,
        )  # fmt: skip

    def _too_small(self) -> str:
        previews = self.member.preview_steps
        steps = len(self.runs.context.timesteps) if previews is None else previews
        return (
            f"budget is {self.budget.per_sample} evaluations a sample, which is below one image: {steps} steps of one "
            "prediction, or of two with guidance. Raise the budget, or set a smaller preview_steps."
        )


def best_candidates(values: Tensor) -> list[int]:
    """Return the best candidate of each sample, the first of equal ones, so that a draw changes nothing.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.noise_search import best_candidates
        >>> best_candidates(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]))
        [1, 0]
    """
    return [max(range(len(row)), key=row.__getitem__) for row in values.tolist()]


def _table(values: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, values.tolist()))
