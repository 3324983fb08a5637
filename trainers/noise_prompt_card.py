"""The card of a network of golden noise."""

from __future__ import annotations

from typing import Any

from hfnoise.cards import ONE_RUN, Base, Metric, base_of, last_metrics, number, rate, rows_of
from hfnoise.citations import GOLDEN_NOISE_BIBTEX
from hfnoise.trainers.diffusion_card import DiffusionCardMixin, by_dataset

_OPTIONS = ("min_margin", "margin_temperature", "ema_decay")


class NoisePromptCardMixin(DiffusionCardMixin):
    """The part of [`~hfnoise.NoisePromptTrainer`] that writes `README.md`."""

    _card_tags = (*DiffusionCardMixin._card_tags, "golden-noise")
    _card_method = "golden-noise"
    _card_citation = GOLDEN_NOISE_BIBTEX

    def noise_rows(self) -> list[tuple[str, str]]:
        """Return what the card says of the loss and of the pairs."""
        args = self.args
        objective = {
            "pairs": "squared error of the change from noise to golden noise",
            "reward": "minus the reward of images from the refined noise",
        }[args.loss]
        rows = [("objective", objective), *self._pipeline_rows()]
        rows += [(f"`{name}`", f"{getattr(args, name):g}") for name in _OPTIONS if getattr(args, name) is not None]
        if args.loss == "reward":
            return [*rows, ("`delta_penalty`", f"{args.delta_penalty:g}")]
        diagnose = getattr(self.train_dataset, "diagnose", None)  # type: ignore[attr-defined]
        if diagnose is None:
            return rows
        count = rows_of(self.train_dataset)  # type: ignore[attr-defined]
        return [*rows, ("pairs for training", str(count)), ("what they hold", str(diagnose()))]

    def _noise_seed(self) -> tuple[str, str]:
        if self.args.loss == "reward":
            return super()._noise_seed()
        return "seeds of the noise", "those of the pairs, one each"

    def noise_block(self) -> dict[str, Any]:
        """Return the loss for the block `hfnoise:`."""
        args = self.args
        names = (*_OPTIONS, "delta_penalty") if args.loss == "reward" else _OPTIONS
        return {"loss": args.loss, **{name: getattr(args, name) for name in names if getattr(args, name) is not None}}

    def _base(self, given: str | None) -> Base:
        # That it goes on from; the pipeline is no base of the network.
        return base_of(given or self._denoiser().config.get("_name_or_path"))  # type: ignore[attr-defined]

    def _lead(self, base: Base, adapter: bool) -> str:
        network, pipeline = self._denoiser(), self._pipeline()  # type: ignore[attr-defined]
        place = "" if pipeline is None else f" for {pipeline.name}"
        return (
            "A network of golden noise ([arXiv 2411.09502](https://huggingface.co/papers/2411.09502)): it turns the "
            "noise that sampling starts from into noise that suits the prompt better, in one pass before the first "
            f"step. A {network.saved_class}{place}{self._source(base)}, trained with "
            "[`NoisePromptTrainer`](https://pypi.org/project/hfnoise) of hfnoise."
        )

    def _snippet(self, base: Base, adapter: bool) -> str:
        name = self.hub_model_id or self.args.output_dir
        imports, pipeline = self._loading(self._pipeline())
        lines = ["from hfnoise import GoldenNoisePipeline", *imports, ""]
        return "\n".join([*lines, f'pipe = GoldenNoisePipeline.from_pretrained({pipeline}, npnet="{name}")'])

    def _use_note(self) -> str:
        return (
            "It serves models whose text states and latents are those that it was trained on; a call costs no "
            "evaluation of the denoiser more. Refinement acts like more guidance: images follow the prompt better and "
            "differ less from each other."
        )

    def _card_metrics(self) -> list[Metric]:
        last = last_metrics(self.evaluation_log())
        images = int(last["images"]) if "images" in last else None
        found = super()._card_metrics()
        for dataset, value in by_dataset(last, "delta_r2").items():
            found.append(Metric(f"R² of the change{dataset and f' ({dataset})'}", number(value)))
        if "win_rate" in last:
            name = "images preferred over those of plain noise"
            found.append(rate(name, last["win_rate"], images, "pairs of images"))
        for name in [name.removesuffix("_plain") for name in last if name.endswith("_plain")]:
            for kind in ("plain", "refined"):
                shown, value = f"{name.replace('_', ' ')}, {kind}", last[f"{name}_{kind}"]
                is_share = name.endswith("accuracy")
                drawn = ONE_RUN if images is None else f"{ONE_RUN}, {images} images"
                found.append(rate(shown, value, images, "images") if is_share else Metric(shown, number(value), drawn))
        return found
