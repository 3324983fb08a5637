"""Builds a trainer of any class on the tiny model."""

import pytest


@pytest.fixture
def make_trainer(tiny_model_path, tokenizer, cpu_arguments, make_pairs):
    """Return `make(trainer_class, config_class, pairs, eval_pairs, peft_config, **settings)`."""

    def make(trainer_class, config_class, pairs=None, eval_pairs=None, peft_config=None, callbacks=None, **settings):
        return trainer_class(
            tiny_model_path,
            args=config_class(**cpu_arguments | settings),
            train_dataset=make_pairs(16) if pairs is None else pairs,
            eval_dataset=eval_pairs,
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=callbacks,
        )

    return make


@pytest.fixture
def losses_of():
    """Return the losses that a trainer logged, one per step."""
    return lambda trainer: [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def make_texts():
    """Return a function that makes a dataset of short texts of different lengths, deterministic."""
    import torch
    from datasets import Dataset

    from tests.conftest import WORDS

    def make(count=24, **columns):
        generator = torch.Generator().manual_seed(0)
        lines = [
            " ".join(WORDS[i] for i in torch.randint(len(WORDS), (4 + number % 7,), generator=generator).tolist())
            for number in range(count)
        ]
        return Dataset.from_dict({"text": lines, **columns})

    return make


@pytest.fixture
def make_private_trainer(tiny_model_path, tokenizer, cpu_arguments, make_texts, make_pairs):
    """Return `make(trainer_class, dp_config settings, data, peft, **training arguments)`: a private Trainer."""
    from peft import LoraConfig
    from trl import DPOConfig, SFTConfig

    from hfnoise import DPConfig, DPDPOTrainer, DPSFTTrainer

    def make(trainer_class=DPSFTTrainer, dp=None, data=None, peft=True, model=None, eval=None, **settings):
        pairs = issubclass(trainer_class, DPDPOTrainer)
        arguments = {name: value for name, value in cpu_arguments.items() if pairs or name != "beta"} | settings
        adapter = peft if isinstance(peft, LoraConfig) else LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        return trainer_class(
            tiny_model_path if model is None else model,
            args=(DPOConfig if pairs else SFTConfig)(**arguments),
            eval_dataset=eval,
            train_dataset=data if data is not None else make_pairs(24) if pairs else make_texts(24),
            processing_class=tokenizer,
            peft_config=adapter if peft else None,
            dp_config=DPConfig(**{"noise_multiplier": 1.0, "unsafe_seed": 5} | (dp or {})),
        )

    return make


@pytest.fixture
def trained_weights():
    """Return a function that gives the trainable weights of a trainer as one vector."""
    import torch

    return lambda trainer: torch.cat(
        [value.detach().flatten() for value in trainer.model.parameters() if value.requires_grad]
    )


@pytest.fixture
def make_federation(tiny_model_path, tokenizer, cpu_arguments, make_texts, tmp_path):
    """Return `make(config settings, clients, dp, rank, folder)`: a server, its clients, and the model they share.

    Without a folder (`False`) clients forget their rounds when they end.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from hfnoise import DPConfig, DPSFTTrainer, FedSVDClient, FedSVDConfig, FedSVDServer, freeze_lora_A

    def make(clients=3, dp=None, ranks=(2, 2, 2), folder=None, optim="sgd", steps=2, **settings):
        config = FedSVDConfig(**{"rounds": 3, "local_steps": steps} | settings)
        arguments = {name: value for name, value in cpu_arguments.items() if name != "beta"}
        arguments |= {"per_device_train_batch_size": 4, "learning_rate": 0.5, "optim": optim}

        def adapted(rank):
            base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
            model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"]))
            return freeze_lora_A(model) if config.aggregation in ("fedsvd", "ffa") else model

        server_model = adapted(max(ranks))
        made = []
        for number in range(clients):
            model = server_model if len(set(ranks)) == 1 else adapted(ranks[number])
            rows = make_texts(36).select(range(number, 36, 3))
            common = {"args": SFTConfig(**arguments), "train_dataset": rows, "processing_class": tokenizer}
            privacy = None if dp is None else DPConfig(**{"unsafe_seed": number} | dp)
            trainer = SFTTrainer(model, **common) if dp is None else DPSFTTrainer(model, dp_config=privacy, **common)
            state = None if folder is False else (folder or tmp_path) / f"client{number}"
            made.append(FedSVDClient(f"client{number}", trainer, config, clients=clients, state_dir=state))
        return FedSVDServer(server_model, config), made, server_model

    return make
