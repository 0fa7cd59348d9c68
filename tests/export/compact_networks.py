"""Networks that `compact` is tried on: their weights are cut and their batch norms have seen something."""

import torch
from torch import nn
from torch.nn import functional


def cut(model, density, seed=0, rows=0.3):
    """Zero all but a share of each weight at random, and whole rows of it; give biases and norms values."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                size = module.num_features
                module.running_mean.copy_(draw(size) - 0.5)
                module.running_var.copy_(draw(size) + 0.5)
                module.weight.copy_(torch.where(draw(size) < 0.2, 0.0, draw(size) + 0.5))
                module.bias.copy_(draw(size) - 0.5)
            elif isinstance(weight, nn.Parameter) and weight.dim() > 1:
                weight.copy_(torch.where(draw(*weight.shape) < density, draw(*weight.shape) - 0.5, 0.0))
                weight[draw(len(weight)) < rows] = 0
    return model


class Residual(nn.Module):
    """A basic block; the stream keeps a channel as long as anyone needs it."""

    def __init__(self, before, after, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Identity()
        if stride > 1 or before != after:
            self.short = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.short(x)
        return self.relu(out)


class Squeeze(nn.Module):
    """Squeeze and excitation, written with sizes."""

    def __init__(self, width):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, width), nn.Sigmoid())

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.fc(self.pool(x).view(b, c)).view(b, c, 1, 1)
        return x * y.expand_as(x)


class Beside(nn.Module):
    """Two branches, one behind the other in the result."""

    def __init__(self, before, after):
        super().__init__()
        self.a = nn.Conv2d(before, after // 2, 1)
        self.b = nn.Conv2d(before, after - after // 2, 3, padding=1, padding_mode="reflect")

    def forward(self, x):
        return torch.cat([functional.relu(self.a(x)), functional.gelu(self.b(x))], 1)


class Scaled(nn.Module):
    """Factors of its own for each channel, some of them zero."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(
            torch.linspace(-1, 1, width)[:, None, None] * (torch.arange(width) % 3 > 0)[:, None, None]
        )

    def forward(self, x):
        return x + x.tanh() * self.gamma - 0.25


def block(kind, before, after):
    """A block by its name, and how many channels it gives."""
    made = {
        "conv": lambda: nn.Sequential(nn.Conv2d(before, after, 3), nn.LeakyReLU()),
        "padded": lambda: nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.ReLU()),
        "same": lambda: nn.Conv2d(before, after, (3, 1), padding="same", bias=False),
        "norm": lambda: nn.Sequential(nn.Conv2d(before, after, 1), nn.BatchNorm2d(after), nn.ReLU()),
        "residual": lambda: Residual(before, after, 2),
        "plain": lambda: Residual(before, before),
        "depthwise": lambda: nn.Conv2d(before, before, 3, padding=1, groups=before),
        "multiplied": lambda: nn.Conv2d(before, 2 * before, 3, groups=before),
        "grouped": lambda: nn.Conv2d(before, after, 3, padding=1, groups=2),
        "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(before, after, 2, stride=2), nn.ELU()),
        "squeeze": lambda: Squeeze(before),
        "beside": lambda: Beside(before, after),
        "scaled": lambda: Scaled(before),
        "prelu": lambda: nn.PReLU(before),
        "max": lambda: nn.MaxPool2d(3, 2, 1),
        "average": lambda: nn.AvgPool2d(3, 1, 1),
        "group_norm": lambda: nn.GroupNorm(2, before),
        "dropout": lambda: nn.Dropout2d(0.5),
        "resize": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    }[kind]()
    widths = {"multiplied": 2 * before}
    same = (
        "plain",
        "depthwise",
        "squeeze",
        "scaled",
        "prelu",
        "max",
        "average",
        "group_norm",
        "dropout",
        "resize",
    )
    return made, widths.get(kind, before if kind in same else after)


KINDS = (
    *(
        "conv",
        "padded",
        "same",
        "norm",
        "residual",
        "plain",
        "depthwise",
        "multiplied",
        "grouped",
        "transposed",
    ),
    *("squeeze", "beside", "scaled", "prelu", "max", "average", "group_norm", "dropout", "resize"),
)


def convolutional(kinds, width, head):
    """Blocks behind each other on images of 3 x 13 x 13, and a head."""
    layers, channels = [nn.Conv2d(3, width, 3, padding=1)], width
    for kind in kinds:
        made, channels = block(kind, channels, width)
        layers.append(made)
    layers.append(nn.AdaptiveAvgPool2d({"pool": 1, "flat": 3}[head]))
    layers += [nn.Flatten(), nn.Linear(channels * {"pool": 1, "flat": 9}[head], 5)]
    return nn.Sequential(*layers)
