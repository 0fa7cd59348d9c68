"""The networks of the paper and of its reproducibility report, to be counted and not to be trained.

``width`` multiplies every number of channels and rounds down, as the authors do for their small dense and big
sparse networks; the input and the classes stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import log_softmax, max_pool2d, relu


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1, and a shortcut that is projected where the shape changes."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential()
        if project:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample.extend((projection, nn.BatchNorm2d(outputs)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        y = relu(self.bn1(self.conv1(x)), inplace=True)
        y = relu(self.bn2(self.conv2(y)), inplace=True)
        return relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet50(nn.Module):
    """Version 1.5: the stride is in the 3 x 3 convolution. 25.5 million weights in 54 layers.

    Reference:
        He et al., *Deep Residual Learning for Image Recognition*, CVPR 2016, arXiv:1512.03385.
    """

    def __init__(self, width: float = 1.0, classes: int = 1000) -> None:
        super().__init__()
        channels = int(64 * width)
        self.conv1, self.bn1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels)
        for group, depth in enumerate((3, 4, 6, 3)):
            inner, outputs = int((64 << group) * width), int((256 << group) * width)
            first = Bottleneck(channels, inner, outputs, 2 if group else 1, project=True)
            rest = (Bottleneck(outputs, inner, outputs, 1, project=False) for _ in range(depth - 1))
            setattr(self, f"layer{group + 1}", nn.Sequential(first, *rest))
            channels = outputs
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, classes)."""
        x = max_pool2d(relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, 1)
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias, its batch norm and a ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class MobileNetV1(nn.Module):
    """Thirteen pairs of a depthwise and a pointwise convolution.

    Reference:
        Howard et al., *MobileNets*, 2017, arXiv:1704.04861.
    """

    def __init__(self, width: float = 1.0, classes: int = 1000) -> None:
        super().__init__()
        channels = [int(c * width) for c in (32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)]
        self.conv1 = convolution(3, channels[0], 3, 2)
        strides = [2 if i in (1, 3, 5, 11) else 1 for i in range(13)]
        self.dw = nn.ModuleList(convolution(c, c, 3, s, c) for c, s in zip(channels, strides, strict=False))
        self.pw = nn.ModuleList(convolution(a, b, 1) for a, b in pairwise(channels))
        self.fc = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, classes)."""
        x = self.conv1(x)
        for depthwise, pointwise in zip(self.dw, self.pw, strict=True):
            x = pointwise(depthwise(x))
        return self.fc(x.mean((2, 3)))


class InvertedResidual(nn.Module):
    """1 x 1 to more channels, depthwise 3 x 3, 1 x 1 to fewer, added to the input where the shape allows."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = convolution(inputs, inner, 1) if expansion > 1 else nn.Identity()
        self.dw = convolution(inner, inner, 3, stride, inner)
        self.project = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        y = self.bn(self.project(self.dw(self.expand(x))))
        return x + y if self.adds else y


class MobileNetV2(nn.Module):
    """Seventeen inverted residuals.

    Reference:
        Sandler et al., *MobileNetV2: Inverted Residuals and Linear Bottlenecks*, CVPR 2018, arXiv:1801.04381.
    """

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = convolution(3, 32, 3, 2)
        blocks, channels = [], 32
        groups = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2))
        for expansion, outputs, depth, stride in (*groups, (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)):
            for i in range(depth):
                blocks.append(InvertedResidual(channels, outputs, 1 if i else stride, expansion))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = convolution(channels, 1280, 1)
        self.fc = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, classes)."""
        return self.fc(self.last(self.blocks(self.conv1(x))).mean((2, 3)))


class WideBlock(nn.Module):
    """Norm, ReLU, 3 x 3, twice, and a shortcut that is projected where the number of channels changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = inputs == outputs
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        return self.conv2(relu(self.bn2(self.conv1(relu(self.bn1(x)))))) + self.skip(x)


class WideResNet22x2(nn.Module):
    """WRN-22-2 for CIFAR-10.

    Reference:
        Zagoruyko and Komodakis, *Wide Residual Networks*, BMVC 2016, arXiv:1605.07146.
    """

    def __init__(self, width: float = 1.0, classes: int = 10) -> None:
        super().__init__()
        channels = [int(c * width) for c in (16, *[32] * 3, *[64] * 3, *[128] * 3)]
        self.conv1 = nn.Conv2d(3, channels[0], 3, 1, 1, bias=False)
        pairs = enumerate(pairwise(channels))
        self.blocks = nn.Sequential(*(WideBlock(a, b, 2 if i in (3, 6) else 1) for i, (a, b) in pairs))
        self.bn, self.fc = nn.BatchNorm2d(channels[-1]), nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) -> (N, classes)."""
        return self.fc(relu(self.bn(self.blocks(self.conv1(x)))).mean((2, 3)))


class CharLM(nn.Module):
    """A GRU over characters and two layers of readout; the embedding is the last layer, too.

    Reference:
        Evci et al., *Rigging the Lottery*, ICML 2020, arXiv:1911.11134, app. I.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(128, 512, batch_first=True)
        self.r1, self.r2 = nn.Linear(512, 256), nn.Linear(256, 128)
        self.emb = nn.Embedding(256, 128)

    def forward(self, characters: Tensor) -> Tensor:
        """(N, T) -> log-probabilities of the following characters, (N, T, 256)."""
        y, _ = self.gru(self.emb(characters))
        return log_softmax(relu(self.r2(relu(self.r1(y)))) @ self.emb.weight.t(), -1)


def lenet(widths: Sequence[int] = (784, 300, 100)) -> nn.Sequential:
    """LeNet-300-100, or the same with other widths; ten classes."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((*widths, 10)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
