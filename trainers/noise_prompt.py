"""[`NoisePromptTrainer`]: networks that turn noise into better noise for a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction

from hfnoise.latents.hf_noise_net import NoiseNetModel
from hfnoise.trainers.diffusion import DiffusionTrainer
from hfnoise.trainers.diffusion_noise import TrainingNoise
from hfnoise.trainers.diffusion_rows import LATENTS, DenoiserInputs
from hfnoise.trainers.noise_prompt_arguments import NoisePromptTrainingArguments
from hfnoise.trainers.noise_prompt_card import NoisePromptCardMixin
from hfnoise.trainers.noise_prompt_rows import DELTA, MARGIN, MASK, PROMPT_INDEX, STATES, margins_of

Reward = Callable[[Tensor, dict[str, Tensor]], Tensor]


class NoisePromptTrainer(NoisePromptCardMixin, DiffusionTrainer):
    """Trains a network of golden noise, [`NoisePromptNet`] or [`NPNet`], from pairs or from a reward.

    Golden noise (arXiv 2411.09502): for pairs of noise x and golden noise x' = x + delta, the loss is the squared
    error of the delta that the network gives for x and the prompt, in float32. `eval_delta_r2` is the share of the
    energy of the deltas that it explains, 1 - |delta_hat - delta|^2 / |delta|^2, 0 for a network that changes nothing.
    With `loss="reward"` there are no pairs: the loss is minus the reward of images drawn from the refined noise,
    through the sampler, plus `delta_penalty` |delta|^2 / 2 (HyperNoise, arXiv 2508.09968, equation 7).

    Departures from the official code: every pair is trained with its own prompt, where that encodes the first one of a
    batch of 64 for all of it; the network is deterministic; margins can weigh pairs in place of throwing them away;
    all parameters are trained, so that it runs on several processes.

    ```python
    pairs = collect_noise_pairs(pipe, prompts, output_dir="pairs", verifier=verifier)
    rows = NoisePairRows.from_pairs(pairs, pipe)
    trainer = NoisePromptTrainer(NoisePromptNet(encoder_hid_dim=64), args, train_dataset=rows)
    trainer.train()
    trainer.save_model("npnet")
    ```

    Args:
        model ([`NoisePromptNet`] or [`NPNet`], *optional*): the network; or `model_init`.
        args ([`NoisePromptTrainingArguments`]): arguments.
        train_dataset, eval_dataset ([`NoisePairRows`] or any dataset of such rows): `latents` (the noise),
            `prompt_embeds`, with pairs `delta`, and where they are known `attention_mask` and `margin`.
        reward (`Callable`, *optional*): of `loss="reward"`: takes the refined noise, of shape `(batch, channels,
            height, width)`, and the other columns of the batch, and returns a differentiable reward for each; see
            [`~hfnoise.pipelines.few_step_reward`].
        **kwargs: of the Trainer.

    Raises:
        TypeError: for a model or arguments of another kind, a scheduler, or a reward that is missing or has no use.
        ValueError: for rows that the network does not take.

    Example:
        >>> from hfnoise.trainers.diffusion import DiffusionTrainer
        >>> from hfnoise.trainers.noise_prompt import NoisePromptTrainer
        >>> issubclass(NoisePromptTrainer, DiffusionTrainer)
        True
    """

    _takes_timestep = False

    def __init__(
        self,
        model: Any = None,
        args: NoisePromptTrainingArguments | None = None,
        *,
        reward: Reward | None = None,
        **kwargs: Any,
    ) -> None:
        training = args if args is not None else NoisePromptTrainingArguments(output_dir="tmp_trainer")
        if not isinstance(training, NoisePromptTrainingArguments):
            raise TypeError(f"args is a {type(training).__name__}; give NoisePromptTrainingArguments.")
        if kwargs.get("scheduler") is not None or kwargs.get("loss_weighting") is not None:
            raise TypeError(
                "scheduler and loss_weighting are about noise levels, and the network sees noise alone. Leave them "
                "out."
            )
        if (training.loss == "reward") != callable(reward):
            raise TypeError(
                f"loss is {training.loss!r} and reward is {reward!r}: loss='reward' takes a function of the refined "
                "noise, such as hfnoise.pipelines.few_step_reward(pipe, verifier), and loss='pairs' none."
            )
        if kwargs.get("peft_config") is not None:
            raise ValueError("the networks of golden noise are small: train all of it, without peft_config.")
        self.reward = reward
        self._margin_scale = 1.0
        super().__init__(model, training, **kwargs)
        for where in ("train_dataset", "eval_dataset"):
            self._check_first_row(getattr(self, where), where)
        if training.loss == "pairs":
            self.compute_metrics = _explained

    def denoiser_inputs(self) -> DenoiserInputs:
        """Return which columns a row may have, and which it must."""
        network = self._denoiser()
        if not isinstance(network, NoiseNetModel):
            raise TypeError(
                f"model is a {type(network).__name__}; give a network of golden noise: hfnoise.NoisePromptNet(...) or "
                "hfnoise.NPNet(...)."
            )
        pairs = self.args.loss == "pairs"
        required = {STATES} | ({DELTA} if pairs else set()) | ({MARGIN} if self._is_weighted else set())
        return DenoiserInputs(
            type(network).__name__,
            "noise",
            frozenset({STATES, MASK, DELTA, MARGIN, PROMPT_INDEX}),
            frozenset(required),
            "hfnoise.trainers.noise_prompt_rows.NoisePairRows makes them from pairs, with margins where a verifier "
            "has scored them, and PromptRows from prompts.",
        )

    def set_schedule(self, scheduler: Any, loss_weighting: Any) -> None:
        """Find the scale of the weights, so that their mean over the training set is 1; there is no schedule.

        Raises:
            ValueError: if margins are to weigh a stream, whose mean weight nobody knows, or leave no pair.
        """
        if not self._is_weighted or self.train_dataset is None:
            return
        margins = margins_of(self.train_dataset)
        mean = float(self._weights_of(margins.double()).mean())
        if not mean > 0:
            raise ValueError(
                f"min_margin={self.args.min_margin} leaves none of {len(margins)} pairs; the largest margin is "
                f"{float(margins.max()):.4g}. Lower it, or collect better pairs."
            )
        self._margin_scale = 1.0 / mean

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint must agree on with the run that it is resumed by."""
        names = ("seed", "ema_decay", "loss", "min_margin", "margin_temperature", "delta_penalty")
        return {"trainer": type(self).__name__, **{name: getattr(self.args, name) for name in names}}

    def denoising_loss(self, model: Any, inputs: dict[str, Tensor], draws: TrainingNoise) -> Tensor:
        """Return the loss of a batch, a scalar in float32; see the class."""
        if self.args.loss == "reward":
            return self._reward_loss(model, inputs, draws.noise)
        errors = self._left(model, inputs).mean(1)
        return (errors * self._weights(inputs, errors)).mean()

    def prediction_step(
        self, model: Any, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """Return the loss of a batch, and of pairs what is left of each delta, and its size, squared."""
        inputs = dict(self._prepare_inputs(inputs))
        positions = self._positions(self._eval_step, self.args.eval_batch_size, len(inputs[LATENTS]))
        self._eval_step += 1
        draws = self._draw(inputs, positions, 0, "eval")
        with torch.no_grad(), self.compute_loss_context_manager():
            if self.args.loss == "reward":
                return self._reward_loss(model, inputs, draws.noise), None, None
            left = self._left(model, inputs)
            loss = (left.mean(1) * self._weights(inputs, left)).mean()
            return loss, left.sum(1), inputs[DELTA].float().square().flatten(1).sum(1)

    def _left(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Return what is left of the change, squared, one row a sample."""
        if inputs[DELTA].shape != inputs[LATENTS].shape:
            raise ValueError(
                f"{DELTA} is of shape {tuple(inputs[DELTA].shape)} and {LATENTS} of {tuple(inputs[LATENTS].shape)}: a "
                "change is of the shape of its noise."
            )
        return (
            (self._refined(model, inputs, inputs[LATENTS].float()).delta - inputs[DELTA].float()).square().flatten(1)
        )

    def _refined(self, model: Any, inputs: dict[str, Tensor], noise: Tensor) -> Any:
        return model(noise, inputs[STATES].float(), inputs.get(MASK))

    def _reward_loss(self, model: Any, inputs: dict[str, Tensor], noise: Tensor) -> Tensor:
        refined = self._refined(model, inputs, noise)
        assert self.reward is not None  # by the constructor
        reward = self.reward(refined.noise, {name: one for name, one in inputs.items() if name != LATENTS})
        if not isinstance(reward, Tensor) or reward.shape != (len(noise),):
            raise ValueError(
                f"the reward must return a tensor with a number for each of {len(noise)} samples, got "
                f"{tuple(reward.shape) if isinstance(reward, Tensor) else type(reward).__name__}."
            )
        if torch.is_grad_enabled() and not reward.requires_grad:
            raise ValueError(
                "the reward does not depend on the noise in a way that can be differentiated: it must be computed "
                "without torch.no_grad and detach, through the sampler and the verifier."
            )
        return -reward.float().mean() + self.args.delta_penalty * refined.delta.square().flatten(1).sum(1).mean() / 2

    @property
    def _is_weighted(self) -> bool:
        return self.args.min_margin is not None or self.args.margin_temperature is not None

    def _check_first_row(self, dataset: Any, where: str) -> None:
        """Raise ValueError if the network does not take the first row; a stream is not read."""
        if isinstance(dataset, dict):
            for name, one in dataset.items():
                self._check_first_row(one, f"{where}[{name!r}]")
            return
        if not hasattr(dataset, "__len__"):
            return
        network = self._denoiser()
        device, was_training = next(network.parameters()).device, network.training
        inputs = {name: one.to(device) for name, one in self.data_collator([dataset[0]]).items()}
        try:
            with torch.no_grad():
                network.eval()
                if self.args.loss == "pairs":
                    self._left(network, inputs)
                else:
                    self._refined(network, inputs, inputs[LATENTS].float())
        except ValueError as error:
            raise ValueError(f"the first row of {where}: {error}") from error
        finally:
            network.train(was_training)

    def _weights(self, inputs: dict[str, Tensor], like: Tensor) -> Tensor:
        if not self._is_weighted:
            return torch.ones(len(like), device=like.device)
        return self._weights_of(inputs[MARGIN].float()) * self._margin_scale

    def _weights_of(self, margins: Tensor) -> Tensor:
        if self.args.margin_temperature is not None:
            return torch.sigmoid(margins / self.args.margin_temperature)
        return (margins > self.args.min_margin).to(margins.dtype)


def _explained(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of the energy of the deltas that the network explains."""
    left, energy = (
        float(sum(part.sum() for part in (values if isinstance(values, list) else [values])))
        for values in (prediction.predictions, prediction.label_ids)
    )
    return {"delta_r2": 1.0 - left / energy if energy > 0 else float("nan")}
