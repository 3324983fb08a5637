"""The card of a trained denoiser, in the place of the one that transformers would write."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from hfnoise.cards import command_line, hub_name, library_versions, render_card

_TAGS = ("hfnoise", "diffusers", "diffusers-training")
_SETTINGS = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "max_grad_norm", "seed")
# How transformers calls the name of the dataset.
_DATASET_NAMES = ("dataset_name", "dataset_tags", "dataset")


class DiffusionCardMixin:
    """The part of [`~hfnoise.DiffusionTrainer`] that writes `README.md`."""

    args: Any
    model: Any
    state: Any
    # Hub id of the pipeline that the model is trained for, where a launcher knows it: the model has a folder's name.
    pipeline_name: str | None = None
    _card_tags: tuple[str, ...] = _TAGS

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card to `output_dir/README.md`; takes the arguments of the stock Trainer's method.

        `model_name`, `finetuned_from`, the name of the dataset, `license` and `tags` are read; the rest comes from the
        run.
        """
        stock: Any = super().create_model_card  # type: ignore[misc]
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return
        given = {**inspect.signature(stock).bind_partial(*args).arguments, **kwargs}
        names: Any = next((given[name] for name in _DATASET_NAMES if given.get(name)), [])
        tags = given.get("tags") or []
        folder = Path(self.args.output_dir)
        adapter = self._is_adapter()  # type: ignore[attr-defined]
        base = given.get("finetuned_from") or self._base_name()
        relation = {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"} if base else {}
        data = ModelCardData(
            library_name="diffusers",
            tags=sorted(
                {*self._card_tags, *(["lora"] if adapter else []), *([tags] if isinstance(tags, str) else tags)}
            ),
            **relation,
            **({"license": given["license"]} if given.get("license") else {}),
            **({"datasets": [names] if isinstance(names, str) else list(names)} if names else {}),
        )
        card = render_card(
            "diffusion.md",
            data,
            model_name=given.get("model_name") or folder.name,
            lead=self._lead(base, adapter),
            noise_rows=self.noise_rows(),
            snippet=self._snippet(base, adapter),
            use_note=self._use_note(),
            training_rows=self._training_rows(),
            command=command_line(),
            metric_rows=self._metric_rows(),
            versions=library_versions(),
        )
        folder.mkdir(parents=True, exist_ok=True)
        card.save(folder / "README.md")

    def noise_rows(self) -> list[tuple[str, str]]:
        """Return what the card says of the noise; for a subclass with another objective to override."""
        args, schedule = self.args, self.schedule  # type: ignore[attr-defined]
        rows = [
            ("prediction type", f"`{schedule.prediction_type}`"),
            ("noise levels", str(len(schedule.timesteps))),
            ("loss weighting", f"`{self.loss_weighting}`"),  # type: ignore[attr-defined]
            ("timestep sampling", f"`{args.timestep_sampling}`"),
        ]
        names = ("noise_offset", "input_perturbation", "prompt_dropout", "ema_decay")
        return rows + [(f"`{name}`", f"{getattr(args, name):g}") for name in names if getattr(args, name)]

    def _base_name(self) -> str | None:
        return self.pipeline_name or hub_name(self._denoiser().config.get("_name_or_path") or "")  # type: ignore[attr-defined]

    def _lead(self, base: str | None, adapter: bool) -> str:
        kind = type(self._denoiser()).__name__  # type: ignore[attr-defined]
        what = f"LoRA weights of a {kind}" if adapter else f"A {kind}"
        source = f", from [{base}](https://huggingface.co/{base})" if base else ""
        return f"{what}{source}, trained with [`DiffusionTrainer`](https://pypi.org/project/hfnoise) of hfnoise."

    def _snippet(self, base: str | None, adapter: bool) -> str:
        name = self.hub_model_id or self.args.output_dir  # type: ignore[attr-defined]
        kind = type(self._denoiser()).__name__  # type: ignore[attr-defined]
        start = f'DiffusionPipeline.from_pretrained("{base or "the base pipeline"}"'
        if adapter:
            return f'from diffusers import DiffusionPipeline\n\npipe = {start})\npipe.load_lora_weights("{name}")'
        slot = "unet" if "UNet" in kind else "transformer"
        return (
            f"from diffusers import DiffusionPipeline, {kind}\n\n"
            f'{slot} = {kind}.from_pretrained("{name}")\npipe = {start}, {slot}={slot})'
        )

    def _use_note(self) -> str:
        return "Stock diffusers loads it; hfnoise is not needed."

    def _training_rows(self) -> list[tuple[str, str]]:
        args = self.args
        rows = [(name, getattr(args, name)) for name in _SETTINGS]
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
        shown = [(name, str(getattr(value, "value", value))) for name, value in rows]
        steps = ("steps", str(self.state.global_step))
        return [*shown, steps, ("images per step", str(batch)), ("precision", precision)]

    def _metric_rows(self) -> list[tuple[str, str]]:
        history = self.state.log_history
        last = next((entry for entry in reversed(history) if "eval_loss" in entry), None)
        return [] if last is None else [("loss at fixed noise", f"{last['eval_loss']:.4f}")]
