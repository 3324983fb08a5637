"""Log-probabilities that are not finite, put where a bad cache or an overflow would put them."""

import math


def poisoned(trainer, row):
    """Give one pair of the precomputed reference a NaN; return the trainer."""
    values = list(trainer.train_dataset["ref_chosen_logps"])
    values[row] = math.nan
    trainer.train_dataset = trainer.train_dataset.remove_columns("ref_chosen_logps").add_column(
        "ref_chosen_logps", values
    )
    return trainer
