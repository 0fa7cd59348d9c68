"""What STR found for ResNet-50: the sparsity of each layer, at sixteen overall sparsities."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lightning_rigl.topology.distributions import Distribution, Shapes, check_sparsity

# sparsities in hundredths of a per cent, as printed; a column is one network of the paper
_TABLE = """
overall 7955 8127 8770 9023 9055 9480 9503 9515 9611 9653 9778 9805 9822 9879 9898 9910
conv1 5146 5140 6302 5980 5983 6487 6736 6696 7211 6946 7329 7347 7205 7512 7612 7775
layer1.0.conv1 6936 7324 8757 8328 8518 8960 9141 9111 9238 9175 9446 9451 9460 9595 9653 9651
layer1.0.conv2 7785 7626 9087 8948 8731 9479 9427 9504 9569 9607 9736 9777 9835 9851 9859 9884
layer1.0.conv3 7481 7465 8652 8580 8525 9185 9278 9367 9413 9469 9661 9703 9737 9804 9821 9847
layer1.0.downsample.0 7095 7296 8353 8334 8256 8913 9062 9017 9183 9269 9548 9489 9568 9698 9756 9772
layer1.1.conv1 8027 7958 8982 8989 8851 9456 9664 9578 9581 9681 9879 9890 9898 9913 9962 9947
layer1.1.conv2 8136 8095 9175 9060 8961 9470 9578 9618 9642 9726 9865 9907 9940 9911 9931 9956
layer1.1.conv3 8445 8011 9122 9170 9021 9517 9705 9581 9634 9723 9868 9876 9890 9916 9957 9946
layer1.2.conv1 7823 7979 9012 8807 8936 9462 9594 9474 9623 9675 9796 9841 9872 9938 9935 9946
layer1.2.conv2 7601 8153 9106 8703 8827 9390 9563 9426 9624 9611 9754 9827 9844 9932 9919 9939
layer1.2.conv3 8447 8328 9495 9099 9264 9576 9695 9601 9687 9731 9838 9860 9872 9938 9927 9951
layer2.0.conv1 7374 7396 8678 8595 8590 9232 9479 9386 9462 9564 9719 9822 9852 9848 9884 9892
layer2.0.conv2 8256 8570 9131 9391 9403 9754 9743 9765 9838 9862 9924 9923 9940 9961 9967 9963
layer2.0.conv3 8470 8355 9304 9313 9213 9661 9737 9721 9759 9814 9880 9895 9918 9929 9947 9943
layer2.0.downsample.0 8510 8766 9278 9496 9513 9807 9797 9815 9870 9888 9937 9935 9940 9969 9968 9971
layer2.1.conv1 8542 8579 9404 9531 9494 9792 9853 9821 9884 9906 9946 9953 9972 9978 9981 9980
layer2.1.conv2 7695 8275 8763 9150 9176 9559 9722 9607 9732 9780 9824 9824 9860 9924 9966 9933
layer2.1.conv3 8476 8471 9310 9366 9323 9700 9818 9735 9806 9841 9896 9921 9932 9955 9958 9959
layer2.2.conv1 8430 8534 9270 9461 9476 9772 9791 9821 9854 9898 9924 9935 9950 9962 9963 9977
layer2.2.conv2 8428 8543 9299 9486 9490 9752 9721 9811 9819 9904 9928 9937 9946 9963 9959 9972
layer2.2.conv3 8219 8421 9112 9338 9353 9689 9714 9759 9777 9866 9896 9915 9925 9949 9951 9957
layer2.3.conv1 8337 8441 9046 9326 9350 9671 9789 9699 9814 9836 9910 9923 9933 9953 9975 9960
layer2.3.conv2 8283 8403 9144 9321 9325 9683 9802 9696 9845 9830 9897 9906 9926 9931 9981 9968
layer2.3.conv3 8293 8565 9102 9414 9356 9720 9797 9704 9816 9836 9888 9897 9920 9932 9967 9962
layer3.0.conv1 7663 7798 8599 8885 8860 9426 9507 9497 9621 9659 9775 9804 9830 9872 9911 9906
layer3.0.conv2 8735 8868 9439 9614 9619 9851 9877 9872 9911 9923 9953 9959 9964 9973 9980 9981
layer3.0.conv3 8122 8322 9058 9319 9305 9682 9738 9732 9798 9828 9888 9903 9916 9939 9955 9953
layer3.0.downsample.0 8975 9099 9605 9720 9716 9896 9921 9920 9950 9958 9978 9982 9986 9991 9994 9993
layer3.1.conv1 8588 8735 9343 9536 9612 9864 9877 9887 9922 9933 9964 9967 9972 9982 9988 9984
layer3.1.conv2 8506 8624 9274 9506 9530 9809 9828 9836 9875 9908 9946 9948 9954 9969 9976 9976
layer3.1.conv3 8434 8679 9215 9484 9490 9775 9815 9811 9856 9894 9930 9936 9945 9965 9979 9970
layer3.2.conv1 8751 8915 9415 9677 9646 9881 9883 9896 9919 9944 9967 9971 9974 9982 9985 9989
layer3.2.conv2 8715 8867 9409 9559 9614 9886 9869 9891 9921 9920 9964 9972 9976 9985 9984 9990
layer3.2.conv3 8486 8690 9240 9499 9499 9819 9819 9842 9876 9897 9942 9956 9962 9976 9975 9988
layer3.3.conv1 8662 8946 9406 9608 9588 9870 9871 9877 9901 9927 9958 9966 9969 9983 9987 9987
layer3.3.conv2 8652 8797 9356 9610 9611 9870 9882 9889 9919 9931 9968 9973 9977 9988 9987 9993
layer3.3.conv3 8419 8681 9232 9494 9491 9820 9837 9843 9882 9900 9951 9957 9964 9981 9981 9987
layer3.4.conv1 8585 8840 9355 9549 9586 9835 9844 9855 9879 9896 9954 9959 9960 9982 9986 9987
layer3.4.conv2 8596 8738 9327 9566 9563 9841 9858 9856 9919 9926 9964 9969 9967 9987 9990 9992
layer3.4.conv3 8345 8576 9175 9449 9435 9767 9809 9799 9865 9894 9949 9952 9948 9977 9986 9985
layer3.5.conv1 8333 8577 9179 9509 9424 9746 9789 9792 9871 9890 9935 9952 9958 9976 9979 9983
layer3.5.conv2 8498 8667 9248 9492 9513 9788 9814 9832 9891 9900 9944 9958 9969 9980 9983 9987
layer3.5.conv3 7978 8223 8939 9314 9276 9659 9704 9730 9810 9841 9903 9925 9944 9961 9971 9975
layer4.0.conv1 7783 7961 8711 9032 9064 9539 9584 9592 9717 9735 9836 9860 9883 9920 9937 9942
layer4.0.conv2 8618 8800 9353 9566 9578 9831 9847 9855 9908 9916 9954 9963 9969 9981 9985 9986
layer4.0.conv3 7843 8048 8785 9114 9127 9600 9640 9647 9753 9792 9881 9900 9915 9945 9957 9961
layer4.0.downsample.0 8849 8998 9503 9679 9690 9891 9906 9911 9945 9951 9977 9982 9985 9992 9994 9994
layer4.1.conv1 8207 8402 9034 9369 9372 9715 9756 9776 9845 9875 9927 9936 9954 9967 9976 9980
layer4.1.conv2 8342 8523 9116 9398 9393 9726 9758 9771 9836 9867 9925 9934 9950 9968 9976 9980
layer4.1.conv3 7808 7996 8666 9048 9022 9522 9576 9589 9688 9765 9870 9885 9913 9945 9958 9966
layer4.2.conv1 7634 7793 8498 8757 8847 9390 9387 9416 9555 9591 9766 9797 9815 9888 9908 9922
layer4.2.conv2 7357 7497 8232 8437 8601 9192 9166 9222 9402 9416 9665 9713 9729 9844 9874 9900
layer4.2.conv3 6878 7038 7811 8029 8173 8964 8943 8965 9140 9265 9602 9672 9693 9847 9883 9915
fc 5065 5246 6048 6450 6512 7520 7573 7580 7857 8069 8596 8726 8803 9111 9215 9287
"""
_ROWS = {name: [int(value) for value in values] for name, *values in map(str.split, _TABLE.split("\n")[1:-1])}
_OVERALL = _ROWS.pop("overall")


@dataclass(frozen=True)
class STR(Distribution):
    """The sparsities that soft threshold reparameterization learned for the layers of ResNet-50.

    Only for ResNet-50 with 1,000 classes and torchvision's layer names, whatever stands before them, and only
    for the overall sparsities of the paper: 0.7955, 0.8127, 0.877, 0.9023, 0.9055, 0.948, 0.9503, 0.9515,
    0.9611, 0.9653, 0.9778, 0.9805, 0.9822, 0.9879, 0.9898, 0.991. The paper prints two decimals of a per
    cent, so the sum of the layers differs from the overall sparsity by up to 0.0001.

    Reference:
        Kusupati et al., *Soft Threshold Weight Reparameterization for Learnable Sparsity*, ICML 2020,
        arXiv:2002.03231.

    Example:
        >>> counts = STR().counts({f"net.{name}.weight": shape for name, shape in resnet50().items()}, 0.9023)
        >>> counts["net.conv1.weight"], counts["net.layer4.2.conv3.weight"], counts["net.fc.weight"]
        (3783, 206675, 727040)
    """

    def counts(self, shapes: Shapes, sparsity: float) -> dict[str, int]:
        """N - floor(s_l N) with the table's s_l.

        Raises:
            ValueError: a sparsity that the paper does not have (the nearest is named), or a model that is not
                its ResNet-50.
        """
        column = _column(sparsity)
        layers = _layers(shapes)
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        zeros = {name: math.floor(_ROWS[layers[name]][column] / 10_000 * sizes[name]) for name in shapes}
        return {name: sizes[name] - zeros[name] for name in shapes}


def resnet50() -> dict[str, tuple[int, ...]]:
    """Layer name as in torchvision -> shape of its weight, in module order.

    Example:
        >>> len(resnet50()), resnet50()["layer4.0.downsample.0"]
        (54, (2048, 1024, 1, 1))
    """
    shapes: dict[str, tuple[int, ...]] = {"conv1": (64, 3, 7, 7)}
    inputs = 64
    for group, depth in enumerate((3, 4, 6, 3)):
        inner, outputs = 64 << group, 256 << group
        for block in range(depth):
            at = f"layer{group + 1}.{block}"
            shapes[f"{at}.conv1"] = (inner, inputs, 1, 1)
            shapes[f"{at}.conv2"] = (inner, inner, 3, 3)
            shapes[f"{at}.conv3"] = (outputs, inner, 1, 1)
            if block == 0:
                shapes[f"{at}.downsample.0"] = (outputs, inputs, 1, 1)
            inputs = outputs
    return {**shapes, "fc": (1000, 2048)}


def _column(sparsity: float) -> int:
    check_sparsity(sparsity)
    off = [abs(overall / 10_000 - sparsity) for overall in _OVERALL]
    nearest = off.index(min(off))
    if off[nearest] > 1e-9:
        known = ", ".join(str(overall / 10_000) for overall in _OVERALL)
        raise ValueError(
            f"distribution str: the paper has no network of sparsity {sparsity!r}, the nearest has "
            f"{_OVERALL[nearest] / 10_000}; it has {known}"
        )
    return nearest


def _layers(shapes: Shapes) -> dict[str, str]:
    """Parameter name -> layer of the table; ValueError unless the shapes are those of ResNet-50."""
    found = (re.fullmatch(r"(|.*?\.)layer\d\.\d\..+", name) for name in shapes)
    prefix = next((match[1] for match in found if match), "")
    layers = {f"{prefix}{layer}.weight": layer for layer in _ROWS}
    wanted = dict(zip(layers, resnet50().values(), strict=True))
    missing = [name for name in layers if name not in shapes]
    unexpected = [name for name in shapes if name not in layers]
    other = [
        f"{name} with {tuple(shapes[name])} instead of {shape}"
        for name, shape in wanted.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", other)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                "distribution str: the sparse layers are not those of ResNet-50 with torchvision's names and "
                f"1,000 classes; {what}: {', '.join(names[:3])}{more}; choose another distribution, or give "
                "each layer its own with sparsity={pattern: value}"
            )
    return layers
