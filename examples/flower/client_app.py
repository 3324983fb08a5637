"""The client: a private Trainer on the code of one package, taking part in whatever rounds it is asked for."""

from pathlib import Path

from hfnoise.trainers.federated_flower import fedsvd_client_app


def make_trainer(context):
    """Return this client's Trainer; Flower calls it in a new process for every message."""
    import torch
    from task import client_data, make_model
    from trl import SFTConfig, SFTTrainer

    from hfnoise import DPConfig, DPSFTTrainer

    torch.set_num_threads(1)  # several clients share the cores of one machine here
    settings, node = context.run_config, context.node_config
    folder = Path(str(node["state-dir"]))
    arguments = SFTConfig(
        str(folder / "trainer"), per_device_train_batch_size=settings["batch-size"],
        learning_rate=settings["learning-rate"], lr_scheduler_type="constant", max_length=96, use_cpu=True,
        bf16=False, activation_checkpointing=False, report_to="none", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    data = client_data(int(node["partition-id"]), settings["rows"], folder / "data")
    if settings["target-epsilon"] == 0:
        return SFTTrainer(make_model(), args=arguments, train_dataset=data)
    # A real client leaves secret and ledger where they are by default: below the Hugging Face home folder, one ledger
    # for all that is ever released of its data. A demo that can be run twice starts with none in a new folder.
    privacy = DPConfig(
        target_epsilon=settings["target-epsilon"], secret_file=str(folder / "secret"),
        ledger_file=str(folder / "ledger.json"),
    )  # fmt: skip
    return DPSFTTrainer(make_model(), args=arguments, train_dataset=data, dp_config=privacy)


app = fedsvd_client_app(make_trainer)
