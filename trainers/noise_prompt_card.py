"""The card of a network of golden noise."""

from __future__ import annotations

from pathlib import Path

from hfnoise.cards import hub_name
from hfnoise.trainers.diffusion_card import DiffusionCardMixin
from hfnoise.worlds.pipeline_names import EMBEDDED

_R2 = "delta_r2"


class NoisePromptCardMixin(DiffusionCardMixin):
    """The part of [`~hfnoise.NoisePromptTrainer`] that writes `README.md`."""

    _card_tags = (*DiffusionCardMixin._card_tags, "golden-noise")
    # The pipeline that the network is for, where it is known.
    base_pipeline: str | None = None

    def noise_rows(self) -> list[tuple[str, str]]:
        """Return what the card says of the loss and of the pairs."""
        args = self.args
        objective = {
            "pairs": "squared error of the change from noise to golden noise",
            "reward": "minus the reward of images from the refined noise",
        }[args.loss]
        names = ("min_margin", "margin_temperature", "ema_decay")
        rows = [("objective", objective)]
        rows += [("pipeline", f"`{Path(self.base_pipeline).name}`")] if self.base_pipeline else []
        rows += [(f"`{name}`", f"{getattr(args, name):g}") for name in names if getattr(args, name) is not None]
        if args.loss == "reward":
            return [*rows, ("`delta_penalty`", f"{args.delta_penalty:g}")]
        diagnose = getattr(self.train_dataset, "diagnose", None)  # type: ignore[attr-defined]
        return rows if diagnose is None else [*rows, ("pairs", str(diagnose()))]

    def _hub_pipeline(self) -> str | None:
        name = self.base_pipeline or ""
        return None if name.removeprefix("hfnoise:") in EMBEDDED else hub_name(name)

    def _lead(self, base: str | None, adapter: bool) -> str:
        network = self._denoiser()  # type: ignore[attr-defined]
        source = f", from [{base}](https://huggingface.co/{base})" if base else ""
        own = self._hub_pipeline()
        place = f" for [{own}](https://huggingface.co/{own})" if own else ""
        return (
            "A network of golden noise ([arXiv 2411.09502](https://huggingface.co/papers/2411.09502)): it turns the "
            "noise that sampling starts from into noise that suits the prompt better, in one pass before the first "
            f"step. A {network.saved_class}{place}{source}, trained with "
            "[`NoisePromptTrainer`](https://pypi.org/project/hfnoise) of hfnoise."
        )

    def _snippet(self, base: str | None, adapter: bool) -> str:
        name = self.hub_model_id or self.args.output_dir  # type: ignore[attr-defined]
        place = self._hub_pipeline() or "the base pipeline"
        return (
            "from hfnoise import GoldenNoisePipeline\n\n"
            f'pipe = GoldenNoisePipeline.from_pretrained("{place}", npnet="{name}")'
        )

    def _use_note(self) -> str:
        return (
            "It serves models whose text states and latents are those that it was trained on. Refinement acts like "
            "more guidance: images follow the prompt better and differ less from each other."
        )

    def _metric_rows(self) -> list[tuple[str, str]]:
        last: dict[str, float] = {}
        for entry in self.state.log_history:
            last |= entry
        shown = []
        for name, value in last.items():
            if name.startswith("eval_") and name.endswith(_R2):
                # Of each dataset, where there are several: eval_..._delta_r2.
                dataset = name.removeprefix("eval_").removesuffix(_R2).rstrip("_")
                shown.append((f"R² of the change{f' ({dataset})' if dataset else ''}", f"{value:.4f}"))
        if "eval_win_rate" in last:
            shown.append(("images preferred over those of plain noise", f"{last['eval_win_rate']:.4f}"))
        for name in last:
            what = name.removeprefix("eval_").removesuffix("_plain")
            if name.endswith("_plain"):
                refined = last[f"eval_{what}_refined"]
                shown.append((f"{what.replace('_', ' ')}, plain and refined", f"{last[name]:.4g}, {refined:.4g}"))
        return super()._metric_rows() + shown
