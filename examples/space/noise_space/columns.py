"""The columns of the first page: what each adds to the stock pipeline, as objects and as Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from noise_space.inputs import LARGEST_SEED, number, repository, text, whole_number
from noise_space.models import NETWORKS, load_line

CFG = "CFG (stock)"
ADAPTIVE = "Adaptive Guidance"
PROJECTED = "APG"
GOLDEN = "Golden noise"
ONE_MORE_STEP = "One More Step"
PARTS = (ADAPTIVE, PROJECTED, GOLDEN, ONE_MORE_STEP)
TOGETHER = "All ticked, together"
COLUMNS = (CFG, *PARTS, TOGETHER)

RE_DENOISE = "ReDenoise"
# Shipped with hfnoise: a network of golden noise and a module of One More Step, below hfnoise.model_cards.
EMBEDDED_NETWORKS = ("digits-npnet", "shaded-digits-oms")
MOST_STEPS, MOST_PICTURES, LARGEST_SCALE = 100, 8, 50.0


@dataclass(frozen=True)
class Call:
    """A call of a public name of hfnoise, that can be made, or written down."""

    name: str
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        """Return what the call returns."""
        import hfnoise

        found: Any = hfnoise
        for part in self.name.split("."):
            found = getattr(found, part)
        return found(
            *(made(argument) for argument in self.arguments),
            **{key: made(value) for key, value in self.options.items()},
        )

    def __repr__(self) -> str:
        inside = [repr(argument) for argument in self.arguments]
        inside += [f"{key}={value!r}" for key, value in self.options.items()]
        return f"hfnoise.{self.name}({', '.join(inside)})"


@dataclass(frozen=True)
class Shipped:
    """The folder of a network that is shipped with hfnoise, wherever that is installed."""

    name: str

    def make(self) -> str:
        """Return the folder."""
        return str(files("hfnoise.model_cards") / self.name)

    def __repr__(self) -> str:
        return f'str(files("hfnoise.model_cards") / {self.name!r})'


def made(thing: Any) -> Any:
    """Return what a [`Call`] or [`Shipped`] makes, and anything else as it is."""
    return thing.make() if isinstance(thing, (Call, Shipped)) else thing


@dataclass(frozen=True)
class Drawing:
    """What the first page asks for, checked.

    Args:
        model (`str`): of `EMBEDDED_PIPELINES`, a Hub id or a folder.
        norm_threshold (`float`, *optional*): of APG; `None` is `"auto"`.
        golden (`str`): `"ReDenoise"`, or a network by name.
        one_more_step (`str`): a module by name.

    Raises:
        ValueError: for what cannot be drawn.
    """

    model: str
    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    pictures: int = 4
    steps: int = 20
    guidance_scale: float = 4.0
    threshold: float = 0.99
    eta: float = 0.0
    norm_threshold: float | None = None
    momentum: float = -0.5
    golden: str = RE_DENOISE
    one_more_step: str = "shaded-digits-oms"

    def __post_init__(self) -> None:
        checked = {
            "model": text(self.model, "The model"),
            "prompt": text(self.prompt, "The prompt"),
            "negative_prompt": (self.negative_prompt or "").strip(),
            "seed": whole_number(self.seed, "The seed", 0, LARGEST_SEED - MOST_PICTURES),
            "pictures": whole_number(self.pictures, "The number of pictures", 1, MOST_PICTURES),
            "steps": whole_number(self.steps, "The number of steps", 1, MOST_STEPS),
            "guidance_scale": number(self.guidance_scale, "The guidance scale", 0.0, LARGEST_SCALE),
            "golden": text(self.golden, "The network of golden noise"),
            "one_more_step": text(self.one_more_step, "The module of One More Step"),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def guider(self, parts: Sequence[str]) -> Call | None:
        """Return what guides, of the parts that do."""
        norm = "auto" if self.norm_threshold is None else self.norm_threshold
        options = {"eta": self.eta, "norm_threshold": norm, "momentum": self.momentum}
        projected = Call("ProjectedGuidance", options=options) if PROJECTED in parts else None
        if ADAPTIVE not in parts:
            return projected
        inner = {} if projected is None else {"inner": projected}
        return Call("AdaptiveGuidance", options={"threshold": self.threshold, **inner})

    def start(self, parts: Sequence[str]) -> list[Call]:
        """Return what makes the noise to start from, of the parts that do, in their order."""
        members = []
        if GOLDEN in parts:
            network = None if self.golden == RE_DENOISE else _network(self.golden, "The network of golden noise")
            members.append(Call("ReDenoise") if network is None else Call("load_noise_net", (network,)))
        if ONE_MORE_STEP in parts:
            module = _network(self.one_more_step, "The module of One More Step")
            members.append(Call("OneMoreStep.from_pretrained", (module,)))
        return members

    def call(self) -> dict[str, Any]:
        """Return the options of the pipeline's call, but for the noise."""
        negative = {"negative_prompt": [self.negative_prompt] * self.pictures} if self.negative_prompt else {}
        return negative | {"guidance_scale": self.guidance_scale, "num_inference_steps": self.steps}

    def seeds(self) -> range:
        """Return a seed for each picture."""
        return range(self.seed, self.seed + self.pictures)

    def python(self, parts: Sequence[str]) -> str:
        """Return a script that draws the same pictures: `images`."""
        guider, start = self.guider(parts), self.start(parts)
        given = ["pipe", *([] if guider is None else [repr(guider)])]
        given += [f"initial_noise={start!r}"] if start else []
        call = f"{[self.prompt]!r} * {self.pictures}, generator=noise"
        negative = f", negative_prompt={[self.negative_prompt]!r} * {self.pictures}" if self.negative_prompt else ""
        call += f"{negative}, guidance_scale={self.guidance_scale:g}, num_inference_steps={self.steps}"
        load = load_line(self.model)
        lines = ["from importlib.resources import files\n"] if "files(" in repr(start) else []
        lines += ["import hfnoise", "import torch"]
        lines += (
            ["from hfnoise.worlds.digits_checkpoints import load_digits_pipeline"] if "load_digits" in load else []
        )
        lines += ["", load, f"noise = [torch.Generator().manual_seed(seed) for seed in {self.seeds()!r}]"]
        if len(given) == 1:
            return "\n".join([*lines, f"images = pipe({call}).images"])
        return "\n".join([*lines, f"with hfnoise.guide({', '.join(given)}):", f"    images = pipe({call}).images"])


def _network(name: str, what: str) -> str | Shipped:
    return Shipped(name) if name in EMBEDDED_NETWORKS else repository(name, what)


def chosen_columns(ticked: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the columns in the order of the page, each with the parts that it adds to the stock pipeline.

    Raises:
        ValueError: if there is nothing to draw, or nothing to put together.
    """
    unknown = sorted(set(ticked) - set(COLUMNS))
    if unknown or not ticked:
        given = ", ".join(unknown) if unknown else "nothing"
        raise ValueError(f"tick at least one of {', '.join(COLUMNS)}; got {given}.")
    parts = tuple(part for part in PARTS if part in ticked)
    if TOGETHER in ticked and len(parts) < 2:
        raise ValueError(f"{TOGETHER!r} joins what is ticked: tick at least two of {', '.join(PARTS)}.")
    found: dict[str, tuple[str, ...]] = {CFG: ()} if CFG in ticked else {}
    found |= {part: (part,) for part in parts}
    return found | ({TOGETHER: parts} if TOGETHER in ticked else {})


def start_network(call: Call) -> Any:
    """Return the member of the initial noise that a call makes; those with weights are kept for the next run."""
    if call.name == "ReDenoise":
        return call.make()
    with NETWORKS.use(repr(call), call.make) as member:
        return member
