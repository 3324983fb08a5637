"""The card of a module of One More Step."""

from __future__ import annotations

from typing import Any

from hfnoise.cards import Base, Metric, base_of, last_metrics, number
from hfnoise.citations import ONE_MORE_STEP_BIBTEX
from hfnoise.latents import ResidualStatistics
from hfnoise.latents.hf_time_free_unet import module_residuals
from hfnoise.trainers.diffusion_card import DiffusionCardMixin, by_dataset

_NOISES = ("prompt_dropout", "ema_decay")


class OneMoreStepCardMixin(DiffusionCardMixin):
    """The part of [`~hfnoise.OneMoreStepTrainer`] that writes `README.md`."""

    _card_tags = (*DiffusionCardMixin._card_tags, "one-more-step")
    _card_method = "one-more-step"
    _card_citation = ONE_MORE_STEP_BIBTEX

    def noise_rows(self) -> list[tuple[str, str]]:
        """Return what the card says of the noise, and of the terminal prior."""
        rows = [("objective", "minus the latents, from noise that is independent of them")]
        rows += [(f"`{name}`", f"{getattr(self.args, name):g}") for name in _NOISES if getattr(self.args, name)]
        rows += self._pipeline_rows()
        residuals: Any = module_residuals(self._denoiser())  # type: ignore[attr-defined]
        if residuals is None:
            return [*rows, ("terminal prior", "none")]
        rows.append(("terminal prior: spread of the channel means", _spread(residuals)))
        for place, part in enumerate(residuals.spectra, 1):
            down, across = divmod(place, residuals.frequencies)
            waves = f"{down} half periods down and {across} across"
            rows.append((f"terminal prior: spread of the wave of {waves}", _spread(part)))
        return rows

    def noise_block(self) -> dict[str, Any]:
        """Return the noise for the block `hfnoise:`."""
        block = {name: getattr(self.args, name) for name in _NOISES if getattr(self.args, name)}
        return {**block, "terminal_prior": module_residuals(self._denoiser()) is not None}  # type: ignore[attr-defined]

    def _base(self, given: str | None) -> Base:
        # That it goes on from; the pipeline is no base of the module.
        return base_of(given or self._denoiser().config.get("_name_or_path"))  # type: ignore[attr-defined]

    def _lead(self, base: Base, adapter: bool) -> str:
        return (
            "A module of One More Step ([arXiv 2311.15744](https://huggingface.co/papers/2311.15744)): put before the "
            "first step of a model of the Stable Diffusion family, it lets images be as dark and as bright as the "
            f"prompt says. A {type(self._denoiser()).__name__}{self._source(base)}, trained with "  # type: ignore[attr-defined]
            "[`OneMoreStepTrainer`](https://pypi.org/project/hfnoise) of hfnoise."
        )

    def _snippet(self, base: Base, adapter: bool) -> str:
        name = self.hub_model_id or self.args.output_dir
        imports, pipeline = self._loading(self._pipeline())
        lines = ["from hfnoise import OneMoreStep, OneMoreStepPipeline", *imports, ""]
        lines += [f'step = OneMoreStep.from_pretrained("{name}")']
        return "\n".join([*lines, f"pipe = OneMoreStepPipeline.from_pretrained({pipeline}, initial_noise=step)"])

    def _use_note(self) -> str:
        pipeline = self._pipeline()
        source = "" if pipeline is None else f", those of {pipeline.name}"
        return (
            "It serves every model and scheduler with the autoencoder and the text states that it was trained on"
            f"{source}. A call costs one evaluation of it more. Models that were trained down to pure noise have no "
            "gap for it to close."
        )

    def _card_metrics(self) -> list[Metric]:
        rows = by_dataset(last_metrics(self.state.log_history), "low_frequency_r2")
        name = "low-frequency R² (share of the brightness explained)"
        return super()._card_metrics() + [
            Metric(f"{name}{dataset and f' ({dataset})'}", number(value)) for dataset, value in rows.items()
        ]


def _spread(statistics: ResidualStatistics) -> str:
    """Return the standard deviations of the channels."""
    # A variance of 0 may come out a little below it.
    variances = (max(statistics.covariance[channel][channel], 0.0) for channel in range(statistics.channels))
    return ", ".join(f"{variance**0.5:.3g}" for variance in variances)
