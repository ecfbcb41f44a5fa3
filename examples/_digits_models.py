"""The networks of examples/train_digits.py, in plain torch.nn, for scans of 32 x 32 pixels in one channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

CLASSES = 10


def lenet() -> nn.Sequential:
    """LeNet-5 (LeCun, Bottou, Bengio, Haffner, 1998) with overlapping max pooling, ReLU, and a LayerNorm."""
    return nn.Sequential(  # the two poolings halve the side: 32, 16, 8
        nn.Conv2d(1, 6, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        nn.Conv2d(6, 16, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        nn.Flatten(),
        nn.LayerNorm(16 * 8 * 8),
        nn.Linear(16 * 8 * 8, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, CLASSES),
    )


class BasicBlock(nn.Module):
    """Two convolutions of 3 x 3 and what they add to their input; a stride of 2 halves the side.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        stride: of the first convolution; where it or the channels change the shape, so does a 1 x 1 convolution beside.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet() -> nn.Sequential:
    """A residual network (He, Zhang, Ren, Sun, 2016): a stem with max pooling, three stages of two basic blocks."""
    return nn.Sequential(  # the sides: 32 in the stem, then 16, 8 and 4
        nn.Conv2d(1, 16, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        BasicBlock(16, 16, stride=1),
        BasicBlock(16, 16, stride=1),
        BasicBlock(16, 32, stride=2),
        BasicBlock(32, 32, stride=1),
        BasicBlock(32, 64, stride=2),
        BasicBlock(64, 64, stride=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


def response_norm() -> nn.LocalResponseNorm:
    """The paper's constants; torch divides alpha by the size, the paper does not."""
    return nn.LocalResponseNorm(size=5, alpha=5 * 1e-4, beta=0.75, k=2.0)


def alexnet() -> nn.Sequential:
    """AlexNet (Krizhevsky, Sutskever, Hinton, 2012) in small: its layers in its order, a tenth of its channels."""
    layers = nn.Sequential(  # the overlapping poolings make the sides 32, 15, 7, 3
        nn.Conv2d(1, 8, kernel_size=5, padding=2),
        nn.ReLU(),
        response_norm(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(8, 24, kernel_size=5, padding=2),
        nn.ReLU(),
        response_norm(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(24, 48, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(48, 48, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(48, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(32 * 3 * 3, 256),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, CLASSES),
    )
    for layer in layers:
        # nothing else keeps the gradients alive through eight layers (He, Zhang, Ren, Sun, 2015)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return layers


@dataclass(frozen=True)
class Recipe:
    """How to train a network, at length and quickly, and the share of the test digits that it must read right."""

    build: Callable[[], nn.Module]
    epochs: int
    min_accuracy: float
    quick_epochs: int
    quick_min_accuracy: float


RECIPES = {
    "lenet": Recipe(lenet, 10, 0.97, 4, 0.85),
    "resnet": Recipe(resnet, 6, 0.95, 2, 0.85),
    "alexnet": Recipe(alexnet, 10, 0.95, 2, 0.6),
}
