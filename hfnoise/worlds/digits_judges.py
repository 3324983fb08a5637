"""Who says what an image shows: a verifier and an independent judge, of other shape and from other images."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hfnoise.worlds.digit_world import IMAGE_SIZE, LabelledImages, augment

KINDS = ("verifier", "judge")
_FEATURES = 64
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


class DigitClassifier(nn.Module):
    """A small convolutional classifier of the images of a world.

    Args:
        kind (`str`): `"verifier"` (batch norm, max pooling) or `"judge"` (group norm, strides): what fools one of
            them need not fool the other.
        channels (`int`, defaults to `1`): of the images.
        classes (`tuple[int, ...]`, defaults to `(10,)`): how many values each attribute has.

    Raises:
        ValueError: for another kind.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.digits_judges import DigitClassifier
        >>> DigitClassifier("judge").eval()(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(self, kind: str, channels: int = 1, classes: tuple[int, ...] = (10,)) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}.")
        self.kind, self.channels, self.classes = kind, channels, tuple(classes)
        pixels = (IMAGE_SIZE // 4) ** 2
        if kind == "verifier":
            self.body = nn.Sequential(
                nn.Conv2d(channels, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2),
                nn.Flatten(), nn.Dropout(0.25), nn.Linear(48 * pixels, _FEATURES), nn.ReLU(),
            )  # fmt: skip
        else:
            self.body = nn.Sequential(
                nn.Conv2d(channels, 32, 5, stride=2, padding=2), nn.GroupNorm(4, 32), nn.SiLU(),
                nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.SiLU(),
                nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.SiLU(),
                nn.Flatten(), nn.Linear(64 * pixels, _FEATURES), nn.SiLU(),
            )  # fmt: skip
        self.head = nn.Linear(_FEATURES, sum(self.classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits of shape `(batch, sum(classes))` for images in [-1, 1]: those of the attributes in a row."""
        return self.head(self.body(images))

    def log_probability(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the log-probability of shape `(batch,)` that images show labels of shape `(batch, attributes)`."""
        heads = self(images).split(self.classes, dim=1)
        per_head = [-F.cross_entropy(h, column, reduction="none") for h, column in _pairs(heads, labels)]
        return torch.stack(per_head).sum(dim=0)

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Return the labels of shape `(batch, attributes)` that images most probably have."""
        return torch.stack([head.argmax(dim=1) for head in self(images).split(self.classes, dim=1)], dim=1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into a folder, made if it is missing."""
        from safetensors.torch import save_file

        config = {"kind": self.kind, "channels": self.channels, "classes": self.classes}
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(self.state_dict(), Path(folder) / _WEIGHTS)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> DigitClassifier:
        """Return what [`save_pretrained`] wrote, ready to judge."""
        from safetensors.torch import load_file

        model = cls(**json.loads((Path(folder) / _CONFIG).read_text(encoding="utf-8")))
        model.load_state_dict(load_file(Path(folder) / _WEIGHTS))
        return model.eval().requires_grad_(False)


def train_digit_classifier(
    kind: str, data: LabelledImages, classes: tuple[int, ...], seed: int, epochs: int = 15
) -> DigitClassifier:
    """Return a trained classifier: images are augmented and have noise of a random size.

    Args:
        kind (`str`): see [`DigitClassifier`].
        data ([`LabelledImages`]): verifier and judge are given disjoint ones.
        classes (`tuple[int, ...]`): how many values each attribute has.
        seed (`int`): of weights and batches.
        epochs (`int`, defaults to `15`): passes over the images.
    """
    batch_size = min(64, len(data))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier(kind, data.images.shape[1], classes)
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
        steps = max(1, epochs * (len(data) // batch_size))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for _ in range(steps):
            batch = data[torch.randint(len(data), (batch_size,), generator=generator)]
            size = 0.1 * torch.rand(batch_size, 1, 1, 1, generator=generator)
            images = augment(batch.images, generator)
            images = images + size * torch.randn(images.shape, generator=generator)
            heads = model(images).split(model.classes, dim=1)
            losses = [F.cross_entropy(h, column, label_smoothing=0.05) for h, column in _pairs(heads, batch.labels)]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def accuracy(model: DigitClassifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of images in [-1, 1] in which the classifier finds everything that was asked for.

    Args:
        model ([`DigitClassifier`]): verifier or judge.
        images (`torch.Tensor` of shape `(count, channels, 16, 16)`): in [-1, 1].
        labels (`torch.Tensor` of shape `(count, attributes)`): what was asked for.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.digits_judges import DigitClassifier, accuracy
        >>> labels = torch.tensor([[1], [2]])
        >>> 0 <= accuracy(DigitClassifier("judge").eval(), torch.zeros(2, 1, 16, 16), labels) <= 0.5
        True
    """
    return float((model.predict(images) == labels).all(dim=1).float().mean())


def _pairs(heads: tuple[torch.Tensor, ...], labels: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(heads, labels.unbind(dim=1), strict=True))
