"""The quantization configuration that users give to `from_pretrained`, in transformers and in diffusers."""

from __future__ import annotations

from enum import Enum
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from hfnoise.quantization.linear import LinearQuantization

# Of the checkpoint format (docs/quantization.md): raised when a reader of this one would misread a file of the next.
FORMAT_VERSION = 1


class QuantizationMethod(str, Enum):  # noqa: UP042  (not StrEnum: transformers' own is of this kind)
    """The name under which transformers and diffusers know this method (diffusers reads `.value` of it)."""

    QUEST = "quest"


class QuestConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Quantise the linear layers of a model with QuEST (arXiv 2502.05003), to be trained or only to be run.

    `from_pretrained(name, quantization_config=QuestConfig(weight_bits=1, activation_bits=1))` gives a model that any
    Trainer trains: float master weights, quantised in every forward. With `store_master_weights=False` the weights are
    packed while they are loaded, at `weight_bits` + 32 / K bits each. Checkpoints remember which they are.

    Args:
        weight_bits (`int` or `float`, *optional*): of weights: 1, 1.58 (ternary), 2 to 8. Default 4.
        activation_bits (`int` or `float`, *optional*): of the inputs of linear layers, from the same list; `None`:
            they are not quantised. Default 4 if nothing is given, `None` if `weight_bits` is.
        bits (`int` or `float`, *optional*): sets both.
        trust_factor (`float`, *optional*): entries beyond it times the outermost level have no gradient. `None`: 1.30
            at 1 bit, half a step beyond the outermost level otherwise (`hfnoise.quantization.grid_for`).
        hadamard_group (`int`, *optional*, defaults to 128): rows are rotated in groups of the largest power of two up
            to it that divides them; `None`: not at all.
        store_master_weights (`bool`, defaults to `True`): keep the float weights, to be trained; `False`: pack.
        grid (`str`, defaults to `"exact"`): or `"upstream"`, the constants of the official code.
        estimator (`str`, defaults to `"quest"`): or a baseline: `"ste"` (same grid, all gradients pass),
            `"ste_absmax"` (range up to the largest entry), `"lsq"` (learned step; trained, not packed).
        modules_to_not_convert (`list[str]`, *optional*): names, suffixes or regular expressions of modules to leave
            as they are, beside the output embedding, which is always left. One that matches nothing is an error.
        dequantize (`bool`, defaults to `False`): load a packed checkpoint as float weights in stock layers.
        version (`int`, *optional*): of the format, written by `save_pretrained`; a newer one is refused.

    Raises:
        ValueError: for values outside of what is listed, options that exclude each other, unknown names.

    Example:
        >>> from hfnoise import QuestConfig
        >>> config = QuestConfig(bits=2)
        >>> config.weight_bits, config.activation_bits, config.store_master_weights
        (2, 2, True)
    """

    def __init__(
        self,
        weight_bits: float | None = None,
        activation_bits: float | None = None,
        bits: float | None = None,
        trust_factor: float | None = None,
        hadamard_group: int | None = 128,
        store_master_weights: bool = True,
        grid: str = "exact",
        estimator: str = "quest",
        modules_to_not_convert: list[str] | None = None,
        dequantize: bool = False,
        version: int = FORMAT_VERSION,
        **unknown: Any,
    ) -> None:
        method = unknown.pop("quant_method", QuantizationMethod.QUEST)
        if str(getattr(method, "value", method)) != QuantizationMethod.QUEST.value:
            raise ValueError(f"quant_method is {method!r}; a QuestConfig is 'quest'.")
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise ValueError(f"version is {version!r}; it is a whole number, {FORMAT_VERSION} for this hfnoise.")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"The checkpoint has version {version} of the format; this hfnoise reads up to {FORMAT_VERSION}. "
                "Update it: pip install -U hfnoise."
            )
        if unknown:
            raise ValueError(f"QuestConfig has no {', '.join(sorted(unknown))}; it has {', '.join(self._names())}.")
        if bits is not None and (weight_bits is not None or activation_bits is not None):
            raise ValueError("bits sets weight_bits and activation_bits; give it alone, or the two of them.")
        if bits is None and weight_bits is None:
            if activation_bits is not None:
                raise ValueError(f"activation_bits is {activation_bits} without weight_bits; give both, or bits.")
            bits = 4  # where the paper finds the best use of a given memory
        self.quant_method = QuantizationMethod.QUEST
        self.version = version
        self.weight_bits: float = bits if weight_bits is None else weight_bits  # type: ignore[assignment]  # one is there
        self.activation_bits = activation_bits if bits is None else bits
        self.trust_factor = trust_factor
        self.hadamard_group = hadamard_group
        self.store_master_weights = store_master_weights
        self.grid = grid
        self.estimator = estimator
        self.modules_to_not_convert = modules_to_not_convert
        self.dequantize = dequantize
        self.post_init()

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return the settings that a caller of `from_pretrained` may give for a checkpoint that has its own."""
        return {"dequantize": True} if self.dequantize else {}

    @staticmethod
    def _names() -> list[str]:
        return [name for name in QuestConfig.__init__.__annotations__ if name not in ("unknown", "return")]

    def post_init(self) -> None:
        """Raise for what is not allowed; YAML and JSON come here as the command line does."""
        LinearQuantization(
            self.weight_bits, self.activation_bits, self.estimator, self.hadamard_group, self.grid, self.trust_factor
        ).check()
        for name in ("store_master_weights", "dequantize"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; give True or False.")
        if self.estimator == "lsq" and not self.store_master_weights:
            raise ValueError("estimator='lsq' is a baseline to train: it has no packed form. Choose 'quest' to pack.")
        modules = self.modules_to_not_convert
        if modules is not None and (isinstance(modules, str) or not all(isinstance(name, str) for name in modules)):
            raise ValueError(f"modules_to_not_convert is {modules!r}; give a list of names.")
        if self.dequantize and self.store_master_weights:
            # A master checkpoint is float already; packed ones overwrite this from their config.json.
            self.store_master_weights = False
