"""One figure a method for the README's table: its error or cost, beside the stock class's and the best peer's."""

from __future__ import annotations

from hfnoise.benchmarks.comparison import PEER, STOCK
from hfnoise.benchmarks.published import published

# Name of the method -> benchmark, what of ours, quantity: of docs/benchmarks.md, which has all the others.
HEADLINES: dict[str, tuple[str, str, str]] = {
    "noise-dpo": (
        "preference_noise_features",
        "loss_type='sym', sym_temperature=4",
        "wrong held-out pairs on frozen features, 30% of labels flipped",
    ),
    "robust-dpo": ("preference_noise_trainer", "RobustDPOTrainer", "wrong held-out pairs, 30% of labels flipped"),
    "dr-dpo": ("preference_noise_trainer", "DrDPOTrainer", "wrong held-out pairs, 30% of labels flipped"),
    "bvpo": ("bvpo_gradients", "BVPOTrainer", "squared error of the gradient"),
    "dp-sft": ("dp_docstrings", "DPSFTTrainer, epsilon 8", "perplexity on held-out private code"),
    "dp-dpo": ("dp_step_time", "clipping per row", "time of a LoRA step"),
    "fedsvd": ("fedsvd", "FedSVD", "wrong answers, epsilon 6"),
    "qat": ("quantization_training", "QuEST W1A1", "held-out loss of a Llama from scratch"),
    "adaptive-guidance": ("guidance_digits", "AdaptiveGuidance(threshold=0.99)", "evaluations an image, digits"),
    "projected-guidance": ("guidance_saturation_digits", "ProjectedGuidance", "saturation at scale 15, digits"),
    "one-more-step": ("one_more_step", "OneMoreStep", "error of the brightness, exact base"),
    "golden-noise": ("golden_noise_digits", "NoisePromptNet", "wrong images, no guidance, digits"),
}


def headline(name: str) -> str:
    """Return the figure of a method: the quantity, ours, that of the stock class, that of the best peer.

    Args:
        name (`str`): of the method.

    Example:
        >>> from hfnoise.benchmarks.headlines import headline
        >>> headline("robust-dpo").split(":")[0]
        'wrong held-out pairs, 30% of labels flipped'
    """
    benchmark, ours, quantity = HEADLINES[name]
    found = [one for one in published()[benchmark].comparisons if (one.method, one.quantity) == (ours, quantity)]
    parts = [f"{quantity}: **{found[0].ours}**"]
    for kind in (STOCK, PEER):
        # The best of a kind is the one that leaves ours the least room.
        rivals = sorted((one for one in found if one.kind == kind), key=lambda one: -one.ratio.value)
        parts += [f"{one.theirs} ({one.against})" for one in rivals[:1]]
    return " / ".join(parts)
