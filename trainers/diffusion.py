"""[`DiffusionTrainer`]: a denoiser of diffusers, trained by the Trainer of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer

from hfnoise.latents import LossWeighting, UniformWeighting
from hfnoise.trainers.checkpoints import NoiseRunState
from hfnoise.trainers.diffusion_arguments import DiffusionTrainingArguments
from hfnoise.trainers.diffusion_average import WeightAverage
from hfnoise.trainers.diffusion_card import DiffusionCardMixin
from hfnoise.trainers.diffusion_model import prepare_denoiser, refuse_sharded, stock_arguments
from hfnoise.trainers.diffusion_noise import TrainingNoise, draw_levels, draw_training_noise, offset_noise
from hfnoise.trainers.diffusion_rows import LATENTS, DenoiserInputs, DiffusionCollator, check_rows, flow_time_scale
from hfnoise.trainers.diffusion_saving import DiffusionSavingMixin
from hfnoise.trainers.diffusion_schedule import NoiseSchedule
from hfnoise.trainers.evaluated_before import train_in_step


@dataclass(frozen=True)
class NoisedBatch:
    """What the model is shown, and what it is to answer; all float32.

    Args:
        sample (`Tensor` of shape `(batch, ...)`): noisy latents.
        timestep (`Tensor` of shape `(batch,)`, *optional*): what the model is told of the noise.
        target (`Tensor` of shape `(batch, ...)`): of the prediction.
        weight (`Tensor` of shape `(batch,)`, *optional*): of the squared error; `None` is 1.
    """

    sample: Tensor
    timestep: Tensor | None
    target: Tensor
    weight: Tensor | None = None


class DiffusionTrainer(DiffusionCardMixin, DiffusionSavingMixin, Trainer):
    """Trains a denoiser of diffusers (UNet or transformer) with the Trainer of transformers.

    Rows have `latents` and the columns that the denoiser's forward takes (`encoder_hidden_states`, ...), as
    [`~hfnoise.trainers.diffusion_latents.precompute_latents`] makes them. The loss is the squared error of the
    prediction at a random noise level, in float32. Noise, noise level and prompt dropout of an example depend on
    (seed, step, place in the global batch) only: a run is the same on any number of processes, for any split by
    gradient accumulation (up to the order of sums), and after a resume (to the bit).

    `save_model` and `push_to_hub` write what stock diffusers loads: `from_pretrained` a full model,
    `pipe.load_lora_weights` an adapter.

    ```python
    trainer = DiffusionTrainer(pipe.unet, args=args, scheduler=pipe.scheduler, train_dataset=rows)
    trainer.train()
    ```

    Departure from diffusers' scripts: latents are encoded before training, so an image has one sample of its
    posterior in all epochs.

    Args:
        model (`diffusers.ModelMixin`, *optional*): the denoiser, in float32 where it is trained; or `model_init`.
        args ([`DiffusionTrainingArguments`]): arguments.
        scheduler (`diffusers.SchedulerMixin`): names the noise levels and the prediction type: any scheduler with
            `alphas_cumprod`, or of flow matching.
        train_dataset, eval_dataset (`datasets.Dataset` or any dataset of rows): latents and conditions.
        empty_prompt (`dict[str, Tensor]`, *optional*): columns of the empty prompt, for `prompt_dropout`: see
            [`~hfnoise.trainers.diffusion_latents.encode_prompts`].
        loss_weighting ([`LossWeighting`], *optional*): in place of the one that `args` names.
        peft_config (`peft.LoraConfig`, *optional*): train this adapter instead of the model.
        **kwargs: of the Trainer.

    Raises:
        TypeError: for a model, scheduler or arguments of another kind.
        ValueError: for rows that the model does not take, and settings that contradict each other.

    Example:
        >>> from hfnoise import DiffusionTrainer
        >>> issubclass(DiffusionTrainer, __import__("transformers").Trainer)
        True
    """

    # False in a subclass whose denoiser has no timestep.
    _takes_timestep = True
    _time_scale = 1.0
    # None in a subclass whose `set_schedule` reads none.
    schedule: Any = None
    loss_weighting: Any = None

    def __init__(
        self,
        model: Any = None,
        args: DiffusionTrainingArguments | None = None,
        *,
        scheduler: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        empty_prompt: dict[str, Tensor] | None = None,
        loss_weighting: LossWeighting | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        training = args if args is not None else DiffusionTrainingArguments(output_dir="tmp_trainer")
        stock = stock_arguments(training)
        for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is not used: the loss is that of denoising, and is all that is evaluated.")
        self._training, self._peft_config = training, peft_config
        if model is not None:
            model = prepare_denoiser(model, training, peft_config)
        self.average = None if training.ema_decay is None else WeightAverage(training.ema_decay)
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = DiffusionCollator()
        super().__init__(model, stock, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        # A forward with **kwargs makes the Trainer take the loss for one that is divided by the accumulation already.
        self.model_accepts_loss_kwargs = False
        self._micro_step = self._eval_step = 0
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # by accelerate's configuration
            refuse_sharded()
        self.inputs = self.denoiser_inputs()
        for dataset, where in ((train_dataset, "train_dataset"), (eval_dataset, "eval_dataset")):
            check_rows(dataset, where, self.inputs, self._denoiser())
        self.empty_prompt = self._check_empty_prompt(empty_prompt)
        self.set_schedule(scheduler, loss_weighting)
        self.add_callback(NoiseRunState(self.identity()))
        if self.average is not None:
            self.add_callback(self.average)

    def call_model_init(self, trial: Any = None) -> Any:
        """Return a new model of `model_init`, prepared."""
        return prepare_denoiser(super().call_model_init(trial), self._training, self._peft_config)

    def denoiser_inputs(self) -> DenoiserInputs:
        """Return which columns the denoiser takes."""
        return DenoiserInputs.of(self._denoiser(), self._takes_timestep)

    def set_schedule(self, scheduler: Any, loss_weighting: LossWeighting | None) -> None:
        """Read the noise levels off the scheduler, and the weight of each.

        A subclass with another objective overrides this, `noised_batch`, `identity` and `noise_rows`.

        Raises:
            TypeError: for a scheduler that says nothing about training, or a weighting that is none.
            ValueError: if the loss has no finite weight on it, or the arguments are for another kind.
        """
        if scheduler is None:
            raise TypeError("scheduler is missing: it says which noise to train on. Give pipe.scheduler.")
        if not (loss_weighting is None or isinstance(loss_weighting, LossWeighting)):
            raise TypeError(
                f"loss_weighting is {loss_weighting!r}; give a LossWeighting, such as LossWeighting.named('min_snr'), "
                "or name it in args."
            )
        if loss_weighting is not None and not isinstance(self.args.weighting(), UniformWeighting):
            raise ValueError("loss_weighting is given to the trainer and in args; give one of the two.")
        weighting = loss_weighting or self.args.weighting()
        schedule = NoiseSchedule.of(scheduler)
        if self.args.timestep_sampling == "logit_normal" and schedule.prediction_type != "flow_prediction":
            raise ValueError(
                f"timestep_sampling='logit_normal' is for flow matching, and {type(scheduler).__name__} is not. Use "
                "'uniform'."
            )
        weights = weighting.weights(schedule.snr, schedule.prediction_type).float()
        self.loss_weighting = weighting
        if schedule.prediction_type == "flow_prediction" and type(self).denoise is DiffusionTrainer.denoise:
            self._time_scale = flow_time_scale(self._denoiser())
        self.schedule = schedule.to(self.args.device)
        self._weights = None if isinstance(weighting, UniformWeighting) else weights.to(self.args.device)

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint must agree on with the run that it is resumed by."""
        names = ("seed", "noise_offset", "input_perturbation", "prompt_dropout", "ema_decay", "timestep_sampling")
        values = {name: getattr(self.args, name) for name in (*names, "logit_mean", "logit_std")}
        return {
            "trainer": type(self).__name__,
            "prediction_type": self.schedule.prediction_type,
            "loss_weighting": str(self.loss_weighting),
            **values,
        }

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, also on several processes after an evaluation."""
        train_in_step(self)
        return super().train(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the micro-batches of one optimizer step, as the Trainer does; they are counted from here."""
        self._micro_step = 0
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss of a micro-batch at fresh noise; see the class for what the noise depends on.

        Raises:
            ValueError: if it is not finite.
        """
        self.inputs.check_columns(list(inputs), "a batch")  # of a stream, whose columns nobody knew before
        positions = self._positions(self._micro_step, self._train_batch_size, len(inputs[LATENTS]))
        self._micro_step += 1
        draws = self._draw(inputs, positions, self.state.global_step, "train")
        loss = self.denoising_loss(model, self._with_dropped_prompts(inputs, draws), draws)
        if not bool(loss.isfinite()):
            raise ValueError(
                f"the loss of step {self.state.global_step} is {loss.item()}. The weights diverged: lower "
                "learning_rate, set max_grad_norm, or use bf16=True in place of fp16=True."
            )
        return (loss, {"loss": loss}) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate at noise that is the same each time, on the averaged weights where they are kept."""
        self._eval_step = 0
        with self.average.in_place_of(self._denoiser()) if self.average is not None else nullcontext():
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Return the loss of a batch; nothing is predicted."""
        inputs = self._prepare_inputs(inputs)
        draws = self._draw_for_evaluation(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.denoising_loss(model, inputs, draws).detach(), None, None

    def denoising_loss(self, model: Any, inputs: dict[str, Tensor], draws: TrainingNoise) -> Tensor:
        """Return the mean over the batch of the weighted squared error of the prediction, a scalar in float32.

        Args:
            model (`torch.nn.Module`): the denoiser, wrapped or not.
            inputs (`dict[str, Tensor]`): the batch, prompts dropped.
            draws ([`TrainingNoise`]): of its rows, on its device.

        Raises:
            ValueError: if the prediction has another shape than the target.
        """
        conditions = dict(inputs)
        batch = self.noised_batch(conditions.pop(LATENTS).float(), draws)
        prediction = self.denoise(model, batch.sample, batch.timestep, conditions)
        if prediction.shape != batch.target.shape:
            raise ValueError(
                f"{self.inputs.name} predicts {tuple(prediction.shape)} for a target of {tuple(batch.target.shape)}. "
                "Override `denoise` to return what is to be compared."
            )
        if batch.weight is None:
            return F.mse_loss(prediction.float(), batch.target)
        errors = (prediction.float() - batch.target).square().flatten(1).mean(1)
        return (errors * batch.weight).mean()

    def noised_batch(self, latents: Tensor, draws: TrainingNoise) -> NoisedBatch:
        """Return what the model is shown and is to answer; for a subclass with another objective to override."""
        if self.args.noise_offset and latents.ndim < 4:
            raise ValueError(
                f"noise_offset={self.args.noise_offset} is for each channel, and latents of the shape "
                f"{tuple(latents.shape[1:])} are packed: their channels do not come first. Use noise_offset=0."
            )
        mean = self.args.logit_mean if self.args.timestep_sampling == "logit_normal" else None
        levels = draw_levels(draws.level, len(self.schedule.timesteps), mean, self.args.logit_std)
        levels = levels.to(latents.device)
        noise = (
            offset_noise(draws.noise, draws.offset, self.args.noise_offset) if self.args.noise_offset else draws.noise
        )
        seen = noise if draws.perturbation is None else noise + self.args.input_perturbation * draws.perturbation
        return NoisedBatch(
            self.schedule.noised(latents, seen, levels),
            self.schedule.timesteps[levels],
            self.schedule.target(latents, noise, levels),
            None if self._weights is None else self._weights[levels],
        )

    def denoise(self, model: Any, sample: Tensor, timestep: Tensor | None, conditions: dict[str, Tensor]) -> Tensor:
        """Return the prediction of the denoiser; for models with a forward of their own, override it.

        At flow matching the models of Stable Diffusion 3, Flux (with packed latents), Wan, LTX-Video, HunyuanVideo,
        CogView4, Chroma, Qwen-Image, AuraFlow and Sana are given the time in their own unit; others are refused at
        construction unless this is overridden.

        Args:
            model (`torch.nn.Module`): the denoiser, wrapped or not.
            sample (`Tensor` of shape `(batch, ...)`): noisy latents, float32.
            timestep (`Tensor` of shape `(batch,)`, *optional*): of the schedule.
            conditions (`dict[str, Tensor]`): the other columns.
        """
        # Of a frozen base, maybe not float32.
        dtype = next(one.dtype for one in model.parameters() if one.is_floating_point())
        cast = {name: one.to(dtype) if one.is_floating_point() else one for name, one in conditions.items()}
        call = {self.inputs.input_name: sample.to(dtype), **self.inputs.arguments(cast)}
        if timestep is not None:
            call["timestep"] = timestep if self._time_scale == 1 else timestep * self._time_scale
        prediction = model(**call, return_dict=False)[0]
        # As diffusers' scripts do with models that predict a variance too (DiT, PixArt): it is left as it is.
        return prediction[:, : sample.shape[1]] if prediction.shape[1] == 2 * sample.shape[1] else prediction

    def _positions(self, micro_step: int, batch_size: int, rows: int) -> list[int]:
        """Return the places in the global batch of the rows of a micro-batch of this process."""
        processes = self.accelerator.num_processes
        per_device = batch_size // (processes if self.accelerator.split_batches else 1)
        first = (micro_step * processes + self.accelerator.process_index) * per_device
        return list(range(first, first + rows))

    def _draw(self, inputs: dict[str, Tensor], positions: list[int], step: int, stream: str) -> TrainingNoise:
        latents = inputs[LATENTS]
        perturbed = self.args.input_perturbation > 0
        draws = draw_training_noise(self.args.seed, step, positions, tuple(latents.shape[1:]), perturbed, stream)
        return draws.to(latents.device)

    def _draw_for_evaluation(self, inputs: dict[str, Tensor]) -> TrainingNoise:
        self.inputs.check_columns(list(inputs), "a batch")  # of rows that `evaluate` or `predict` is given
        positions = self._positions(self._eval_step, self.args.eval_batch_size, len(inputs[LATENTS]))
        self._eval_step += 1
        return self._draw(inputs, positions, 0, "eval")

    def _with_dropped_prompts(self, inputs: dict[str, Tensor], draws: TrainingNoise) -> dict[str, Tensor]:
        if not self.args.prompt_dropout:
            return inputs
        dropped = (draws.dropout < self.args.prompt_dropout).to(inputs[LATENTS].device)
        result = dict(inputs)
        for name, empty in self.empty_prompt.items():
            value = result[name]
            if empty.shape != value.shape[1:]:
                raise ValueError(
                    f"empty_prompt[{name!r}] has the shape {tuple(empty.shape)}, a row {tuple(value.shape[1:])}; "
                    "encode both with the same settings."
                )
            keep = dropped.reshape(-1, *[1] * (value.ndim - 1))
            result[name] = torch.where(keep, empty.to(value.device, value.dtype), value)
        return result

    def _check_empty_prompt(self, empty: dict[str, Tensor] | None) -> dict[str, Tensor]:
        if not self.args.prompt_dropout:
            return {}
        if empty is not None and not isinstance(empty, Mapping):
            raise TypeError(
                f"empty_prompt is a {type(empty).__name__}; give columns by name: encode_prompts(pipe, ['']) of "
                "hfnoise.trainers.diffusion_latents."
            )
        if not empty:
            raise ValueError(
                f"prompt_dropout is {self.args.prompt_dropout} and empty_prompt is missing. Give "
                "encode_prompts(pipe, ['']) of hfnoise.trainers.diffusion_latents."
            )
        self.inputs.check_columns([LATENTS, *empty], "empty_prompt")
        rows = {name: torch.as_tensor(value) for name, value in empty.items()}
        # As encode_prompts returns it: a batch of one prompt.
        return {name: value[0] if value.shape[:1] == (1,) else value for name, value in rows.items()}
