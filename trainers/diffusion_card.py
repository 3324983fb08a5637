"""The card of a trained denoiser, in the place of the one that transformers would write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfnoise.cards import (
    ONE_RUN,
    Base,
    CardArguments,
    CardFacts,
    Metric,
    base_of,
    embedded_name,
    last_metrics,
    number,
    rows_of,
    run_seeds,
    setting_rows,
)
from hfnoise.trainers.run_card import RunCardMixin

_TAGS = ("hfnoise", "diffusers", "diffusers-training")
_SETTINGS = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "max_grad_norm")
_NOISES = ("noise_offset", "input_perturbation", "prompt_dropout", "ema_decay")


class DiffusionCardMixin(RunCardMixin):
    """The part of [`~hfnoise.DiffusionTrainer`] that writes `README.md`."""

    model: Any
    state: Any
    # The pipeline that the model is trained for, as `from_pretrained` takes it, where a launcher knows it.
    pipeline_name: str | None = None
    pipeline_revision: str | None = None
    _card_tags: tuple[str, ...] = _TAGS
    _card_method = "diffusion"
    _card_citation = ""

    def run_card(self, **given: Any) -> Any:
        """Return the card: the noise of the training, how the weights are loaded, and the loss at fixed noise."""
        user, args, adapter = CardArguments(**given), self.args, self._is_adapter()  # type: ignore[attr-defined]
        base = self._base(user.finetuned_from)
        return CardFacts(
            name=user.model_name or Path(args.output_dir).name,
            lead=self._lead(base, adapter),
            method=self._card_method,
            base=base,
            relation="adapter" if adapter else "finetune",
            library_name="diffusers",
            tags=sorted({*self._card_tags, *(["lora"] if adapter else []), *user.more_tags}),
            metadata=user.metadata,
            block={**self.noise_block(), "seed": args.seed},
            noise=self.noise_rows(),
            seeds=[*run_seeds(args), self._noise_seed()],
            settings=self._training_rows(),
            snippet=self._snippet(base, adapter),
            use_note=self._use_note(),
            metrics=self._card_metrics(),
            citation=self._card_citation,
        ).render()

    def noise_block(self) -> dict[str, Any]:
        """Return the noise for the block `hfnoise:` of the card; for a subclass with another objective to override."""
        args = self.args
        block = {name: getattr(args, name) for name in _NOISES if getattr(args, name)}
        if self.schedule is None:  # type: ignore[attr-defined]
            return block
        return {
            "prediction_type": self.schedule.prediction_type,  # type: ignore[attr-defined]
            "loss_weighting": str(self.loss_weighting),  # type: ignore[attr-defined]
            "timestep_sampling": args.timestep_sampling,
            **block,
        }

    def noise_rows(self) -> list[tuple[str, str]]:
        """Return what the card says of the noise; for a subclass with another objective to override."""
        args, schedule = self.args, self.schedule  # type: ignore[attr-defined]
        if schedule is None:
            return [("objective", f"that of `{type(self).__name__}`, without noise levels")]
        rows = [
            ("prediction type", f"`{schedule.prediction_type}`"),
            ("noise levels", str(len(schedule.timesteps))),
            ("loss weighting", f"`{self.loss_weighting}`"),  # type: ignore[attr-defined]
            ("timestep sampling", f"`{args.timestep_sampling}`"),
        ]
        return rows + [(f"`{name}`", f"{getattr(args, name):g}") for name in _NOISES if getattr(args, name)]

    def _noise_seed(self) -> tuple[str, str]:
        return "seed of the noise", "the same, with the step and the place of the example in the batch"

    def _base(self, given: str | None) -> Base:
        pipeline = self._pipeline()
        if given or pipeline is None:
            return base_of(given or self._denoiser().config.get("_name_or_path"))  # type: ignore[attr-defined]
        return pipeline

    def _pipeline(self) -> Base | None:
        """Return the pipeline that the weights are for, where it is known."""
        return None if self.pipeline_name is None else base_of(self.pipeline_name, revision=self.pipeline_revision)

    def _pipeline_rows(self) -> list[tuple[str, str]]:
        pipeline = self._pipeline()
        rows = None if pipeline is None else [("pipeline", pipeline.name), ("its revision", pipeline.revision)]
        return rows or []

    def _source(self, base: Base) -> str:
        """Return what a network goes on from, for the first sentence; nothing for one that was made anew."""
        return f", from {base.name}" if self._denoiser().config.get("_name_or_path") else ""  # type: ignore[attr-defined]

    def _loading(self, pipeline: Base | None) -> tuple[list[str], str]:
        """Return the imports, and the first argument, by which a pipeline is loaded."""
        path = self.pipeline_name or ""
        if pipeline is not None and pipeline.hub_id is not None:
            return [], f'"{pipeline.hub_id}"'
        if path and embedded_name(path):
            imports = ["from hfnoise.worlds.digits_checkpoints import checkpoint_path"]
            return imports, f'checkpoint_path("{Path(path).name}")'
        return [], f'"{path or "YOUR-PIPELINE"}"'

    def _lead(self, base: Base, adapter: bool) -> str:
        kind = type(self._denoiser()).__name__  # type: ignore[attr-defined]
        what = f"LoRA weights of a {kind}" if adapter else f"A {kind}"
        source = f", from {base.name}" if self._pipeline() is not None else self._source(base)
        return f"{what}{source}, trained with [`DiffusionTrainer`](https://pypi.org/project/hfnoise) of hfnoise."

    def _snippet(self, base: Base, adapter: bool) -> str:
        name = self.hub_model_id or self.args.output_dir
        kind = type(self._denoiser()).__name__  # type: ignore[attr-defined]
        imports, pipeline = self._loading(base)
        start = f"DiffusionPipeline.from_pretrained({pipeline}"
        if adapter:
            lines = ["from diffusers import DiffusionPipeline", *imports, "", f"pipe = {start})"]
            return "\n".join([*lines, f'pipe.load_lora_weights("{name}")'])
        slot = "unet" if "UNet" in kind else "transformer"
        lines = [f"from diffusers import DiffusionPipeline, {kind}", *imports, ""]
        return "\n".join([*lines, f'{slot} = {kind}.from_pretrained("{name}")', f"pipe = {start}, {slot}={slot})"])

    def _use_note(self) -> str:
        return "Stock diffusers loads it; hfnoise is not needed."

    def _training_rows(self) -> list[tuple[str, str]]:
        args = self.args
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
        steps, images = ("steps", self.steps_text()), ("images per step", str(batch))
        processes = ("processes", str(args.world_size))
        return [*setting_rows(args, _SETTINGS), steps, images, processes, ("precision", precision)]

    def _card_metrics(self) -> list[Metric]:
        """Return the results; for a subclass to add to."""

        def spread(name: str) -> str:
            rows = rows_of(self.eval_dataset, name)  # type: ignore[attr-defined]
            return ONE_RUN if rows is None else f"{ONE_RUN}, {rows} rows"

        return [
            Metric(f"loss at fixed noise{name and f' ({name})'}", number(value), spread(name))
            for name, value in by_dataset(last_metrics(self.evaluation_log()), "loss").items()
        ]


def by_dataset(metrics: dict[str, float], metric: str) -> dict[str, float]:
    """Return the values of one metric by the name of the dataset, which is empty where there is only one.

    Args:
        metrics (`dict[str, float]`): from [`~hfnoise.cards.last_metrics`].
        metric (`str`): of the Trainer.

    Example:
        >>> from hfnoise.trainers.diffusion_card import by_dataset
        >>> by_dataset({"new_loss": 0.5, "seen_loss": 0.4}, "loss")
        {'new': 0.5, 'seen': 0.4}
    """
    found = {name.removesuffix(metric): value for name, value in metrics.items() if name.endswith(metric)}
    return {name.rstrip("_"): value for name, value in found.items() if not name or name.endswith("_")}
