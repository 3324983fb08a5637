"""Who says which digit an image shows: a verifier and an independent judge, of other shape and from other images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from hfnoise.worlds.digits import IMAGE_SIZE, DigitImages, augment

KINDS = ("verifier", "judge")
_FEATURES = 64


class DigitClassifier(nn.Module):
    """A small convolutional classifier of the world's images.

    Args:
        kind (`str`): `"verifier"` (batch norm, max pooling) or `"judge"` (group norm, strides): what fools one of
            them need not fool the other.

    Raises:
        ValueError: for another kind.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.digits_judges import DigitClassifier
        >>> DigitClassifier("judge").eval()(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}.")
        self.kind = kind
        pixels = (IMAGE_SIZE // 4) ** 2
        if kind == "verifier":
            self.body = nn.Sequential(
                nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2),
                nn.Flatten(), nn.Dropout(0.25), nn.Linear(48 * pixels, _FEATURES), nn.ReLU(),
            )  # fmt: skip
        else:
            self.body = nn.Sequential(
                nn.Conv2d(1, 32, 5, stride=2, padding=2), nn.GroupNorm(4, 32), nn.SiLU(),
                nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.SiLU(),
                nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.SiLU(),
                nn.Flatten(), nn.Linear(64 * pixels, _FEATURES), nn.SiLU(),
            )  # fmt: skip
        self.head = nn.Linear(_FEATURES, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits of shape `(batch, 10)`."""
        return self.head(self.body(images))


def train_digit_classifier(kind: str, data: DigitImages, seed: int, epochs: int = 15) -> DigitClassifier:
    """Return a trained classifier: images are augmented and have noise of a random size.

    Args:
        kind (`str`): see [`DigitClassifier`].
        data ([`DigitImages`]): verifier and judge are given disjoint ones.
        seed (`int`): of weights and batches.
        epochs (`int`, defaults to `15`): passes over the images.
    """
    batch_size = min(64, len(data))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier(kind)
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
        steps = max(1, epochs * (len(data) // batch_size))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for _ in range(steps):
            batch = data[torch.randint(len(data), (batch_size,), generator=generator)]
            size = 0.1 * torch.rand(batch_size, 1, 1, 1, generator=generator)
            images = augment(batch.images, generator)
            images = images + size * torch.randn(images.shape, generator=generator)
            loss = F.cross_entropy(model(images), batch.digits, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: DigitClassifier, images: torch.Tensor, digits: torch.Tensor) -> float:
    """Return the share of images that the classifier takes for the digit that was asked for.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.digits_judges import DigitClassifier, accuracy
        >>> 0 <= accuracy(DigitClassifier("judge").eval(), torch.zeros(2, 1, 16, 16), torch.tensor([1, 2])) <= 0.5
        True
    """
    return float((model(images).argmax(1) == digits).float().mean())
