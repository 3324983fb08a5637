"""The card of a module of One More Step."""

from __future__ import annotations

from typing import Any

from hfnoise.cards import hub_name
from hfnoise.latents import ResidualStatistics
from hfnoise.latents.hf_time_free_unet import module_residuals
from hfnoise.trainers.diffusion_card import DiffusionCardMixin


class OneMoreStepCardMixin(DiffusionCardMixin):
    """The part of [`~hfnoise.OneMoreStepTrainer`] that writes `README.md`."""

    _card_tags = (*DiffusionCardMixin._card_tags, "one-more-step")

    def noise_rows(self) -> list[tuple[str, str]]:
        """Return what the card says of the noise, and of the terminal prior."""
        names = ("prompt_dropout", "ema_decay")
        rows = [("objective", "minus the latents, from noise that is independent of them")]
        rows += [(f"`{name}`", f"{getattr(self.args, name):g}") for name in names if getattr(self.args, name)]
        residuals: Any = module_residuals(self._denoiser())  # type: ignore[attr-defined]
        if residuals is None:
            return [*rows, ("terminal prior", "none")]
        rows.append(("terminal prior: spread of the channel means", _spread(residuals)))
        for number, part in enumerate(residuals.spectra, 1):
            down, across = divmod(number, residuals.frequencies)
            waves = f"{down} half periods down and {across} across"
            rows.append((f"terminal prior: spread of the wave of {waves}", _spread(part)))
        return rows

    def _base_name(self) -> str | None:
        # That it goes on from; the pipeline is no base of the module.
        return hub_name(self._denoiser().config.get("_name_or_path") or "")  # type: ignore[attr-defined]

    def _lead(self, base: str | None, adapter: bool) -> str:
        source = f", from [{base}](https://huggingface.co/{base})" if base else ""
        return (
            "A module of One More Step ([arXiv 2311.15744](https://huggingface.co/papers/2311.15744)): put before the "
            "first step of a model of the Stable Diffusion family, it lets images be as dark and as bright as the "
            f"prompt says. A {type(self._denoiser()).__name__}{source}, trained with "  # type: ignore[attr-defined]
            "[`OneMoreStepTrainer`](https://pypi.org/project/hfnoise) of hfnoise."
        )

    def _snippet(self, base: str | None, adapter: bool) -> str:
        name = self.hub_model_id or self.args.output_dir  # type: ignore[attr-defined]
        pipeline = self.pipeline_name or "the base pipeline"
        return (
            "from hfnoise import OneMoreStep, OneMoreStepPipeline\n\n"
            f'step = OneMoreStep.from_pretrained("{name}")\n'
            f'pipe = OneMoreStepPipeline.from_pretrained("{pipeline}", initial_noise=step)'
        )

    def _use_note(self) -> str:
        name = self.pipeline_name
        source = f", those of [{name}](https://huggingface.co/{name})" if name else ""
        return (
            "It serves every model and scheduler with the autoencoder and the text states that it was trained on"
            f"{source}."
        )

    def _metric_rows(self) -> list[tuple[str, str]]:
        name = "eval_low_frequency_r2"
        last = next((entry[name] for entry in reversed(self.state.log_history) if name in entry), None)
        shown = [] if last is None else [("low-frequency R² (share of the brightness explained)", f"{last:.4f}")]
        return super()._metric_rows() + shown


def _spread(statistics: ResidualStatistics) -> str:
    """Return the standard deviations of the channels."""
    # A variance of 0 may come out a little below it.
    variances = (max(statistics.covariance[channel][channel], 0.0) for channel in range(statistics.channels))
    return ", ".join(f"{variance**0.5:.3g}" for variance in variances)
