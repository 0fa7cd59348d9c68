"""Published FLOPs of sparse training, as printed; a letter behind a number names the note that explains it.

Sources: Evci et al., *Rigging the Lottery: Making All Tickets Winners*, ICML 2020, arXiv:1911.11134 (figures,
tables) and its repository, google-research/rigl (README, notebooks); Sundar and Dwaraknath, *[Reproducibility
Report] Rigging the Lottery: Making All Tickets Winners*, 2021, arXiv:2103.15767 (report).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Published(NamedTuple):
    """One row of a published table: sparsity -> (inference, training), as shares of the dense network."""

    source: str
    system: str
    shares: Mapping[float, tuple[str, str]]


RESNET50 = (
    Published("Fig. 2", "Static", {0.8: (".23", ".23"), 0.9: (".10 a", ".10 a")}),
    Published("Fig. 2", "RigL", {0.8: (".23", ".23"), 0.9: (".10 a", ".10 a")}),
    Published("Fig. 2", "RigL 5x", {0.8: (".23", "1.14"), 0.9: (".10 a", ".52 a")}),
    Published("Fig. 2", "Small-Dense", {0.8: (".20 b", ".20 b"), 0.9: (".12", ".12")}),
    Published("Fig. 2", "Small-Dense 5x", {0.8: (".20 b", "1.01 b"), 0.9: (".12", ".60")}),
    Published("Fig. 2", "Pruning", {0.8: (".23", ".56 c"), 0.9: (".10 a", ".51 c")}),
    Published("Fig. 2", "Pruning 1.5x", {0.8: (".23", ".84 c"), 0.9: (".10 a", ".76 c")}),
    Published("Fig. 2", "Static (ERK)", {0.8: (".42", ".42"), 0.9: (".24", ".24")}),
    Published("Fig. 2", "RigL (ERK)", {0.8: (".42", ".42"), 0.9: (".24", ".25")}),
    Published("Fig. 2", "RigL 5x (ERK)", {0.8: (".42", "2.09"), 0.9: (".24", "1.23")}),
    Published("Fig. 2", "SNFS (ERK)", {0.8: (".42", ".61"), 0.9: (".24", ".50")}),
    Published("Table 3", "RigL", {0.8: ("", ".23")}),
    Published("Table 3", "RigL 2x", {0.8: ("", ".46")}),
    Published("Table 4", "Static", {0.95: (".08", ".23 d"), 0.965: (".07", ".13 d")}),
    Published("Table 4", "RigL", {0.95: (".08", ".23 d"), 0.965: (".07", ".13 d")}),
    Published("Table 4", "Pruning", {0.95: (".08", ".56 d"), 0.965: (".07", ".51 d")}),
    Published("Table 4", "Static (ERK)", {0.95: (".42 d", ".42 d"), 0.965: (".24 d", ".24 d")}),
    Published("Table 4", "RigL (ERK)", {0.95: (".12", ".42 d"), 0.965: (".11 e", ".25 d")}),
    Published("Table 4", "SNFS (ERK)", {0.95: (".12", ".61 d"), 0.965: (".11 e", ".50 d")}),
    Published("notebook", "Small-Dense", {0.95: ("", ""), 0.965: ("", "")}),
    Published("README", "RigL", {0.8: (".23", ".23"), 0.9: (".13", ".13")}),
    Published("README", "RigL (ERK)", {0.8: (".42", ".42"), 0.9: (".24", ".24 f")}),
    Published(
        "README",
        "RigL 5x",
        {0.8: (".23", "1.14"), 0.9: (".13", ".66"), 0.95: (".08", ".42"), 0.965: (".07", ".34")},
    ),
    Published(
        "README",
        "RigL 5x (ERK)",
        {0.8: (".42", "2.09"), 0.9: (".24", "1.23"), 0.95: (".12", ".63"), 0.965: (".09", ".45")},
    ),
    Published("README", "RigL 5x (ERK*)", {0.99: (".05", ".29")}),
    Published("README", "RigL 10x (ERK*)", {0.99: (".05", ".58")}),
    Published("README", "RigL 40x (ERK*)", {0.99: (".05", "2.32")}),
    Published("README", "RigL 100x (ERK*)", {0.99: (".05", "5.8")}),
)
RESNET50_NOTES = {
    "ERK*": "The first convolution is dense and outside the pool.",
    "a": "The first convolution is sparse, too: 0.1012, and RigL trains at 0.1042, 5x at 0.521. The text "
    "says that it is dense; the README has .13 and .66.",
    "b": "Width .445. The width in the authors' notebook, .465, matches the bits of ERK and gives 0.2218.",
    "c": "The mean over 33 points, both ends included. The mean over the steps is 0.571 at .8, 0.517 at .9.",
    "d": "Table 4 repeats the training columns of .8 and .9, and all of the row Static (ERK).",
    "e": "ERK with a dense first convolution, 0.1125. The README has plain ERK: .09, and .45 for 5x.",
    "f": "The inference share; figure 2 has .25.",
}

MOBILENET_V1 = (
    Published("Fig. 3", "RigL", {0.75: (".27 a", ""), 0.9: (".12 a", "")}),
    Published("Fig. 3", "RigL (ERK)", {0.75: (".52 a", ""), 0.9: (".27 a", "")}),
    Published("Fig. 3", "RigL, dw sparse", {0.75: (".27", ""), 0.9: (".12", "")}),
    Published("Fig. 3", "RigL (ERK), dw sparse", {0.75: (".52", ""), 0.9: (".27", "")}),
    Published("Fig. 3", "Small-Dense", {0.75: (".23", ""), 0.9: (".09", "")}),
    Published("Fig. 3", "Big-Sparse", {0.75: (".98", "")}),
    Published("Fig. 3", "Big-Sparse (ERK)", {0.75: ("1.91", "")}),
)
MOBILENET_V1_NOTES = {
    "a": "Depthwise layers are sparse, too, as in the rows `dw sparse`. The text says that they are dense.",
}
# What the notebook prints, in MFLOPs: distribution and which layers stay dense, sparsity -> inference.
MOBILENET_V1_MFLOPS = {
    "dense": {0.0: "1141.544"},
    "uniform, depthwise dense": {0.75: "330.769", 0.85: "222.666", 0.9: "168.614", 0.95: "114.563"},
    "ERK, depthwise dense": {0.75: "599.144", 0.85: "439.152", 0.9: "334.134", 0.95: "205.281"},
    "ERK, depthwise sparse": {0.75: "588.355", 0.85: "422.419", 0.9: "312.956", 0.95: "180.359"},
    "small dense": {0.75: "266.539", 0.85: "154.770", 0.9: "103.825", 0.95: "56.617"},
    "big sparse, uniform": {0.75: "1122.572", 0.9: "1058.478"},
    "big sparse, ERK": {0.75: "2180.140", 0.85: "2442.726", 0.9: "2452.785", 0.95: "2132.954"},
}

WRN22X2 = (
    Published("report", "Small-Dense", {0.8: (".20 a", ".20 a"), 0.9: (".11 a", ".11 a")}),
    Published("report", "Static", {0.8: (".20", ".20"), 0.9: (".11 a", ".11 a")}),
    Published("report", "RigL", {0.8: (".20", ".20"), 0.9: (".11 a", ".11")}),
    Published("report", "Static 2x", {0.8: (".20", ".40")}),
    Published("report", "SET 2x", {0.8: (".20", ".41 b")}),
    Published("report", "RigL 2x", {0.8: (".20", ".41")}),
    Published("report", "Static (ERK)", {0.8: (".35", ".35"), 0.9: (".17", ".17")}),
    Published("report", "RigL (ERK)", {0.8: (".35", ".35"), 0.9: (".17", ".17 c")}),
    Published("report", "RigL 2x (ERK)", {0.8: (".35", ".70 c"), 0.9: (".17", ".34 c")}),
    Published("report", "Pruning", {0.8: (".27 d", ".41 d"), 0.9: (".13 d", ".32 d")}),
)
WRN22X2_NOTES = {
    "a": "One cell stands for Small-Dense, Static, SET and RigL; it is RigL's training share.",
    "b": "RigL's value; SET needs no dense gradient.",
    "c": "Without RigL's dense gradients: 0.1736, and 0.7042 and 0.34 (twice .17) for 2x.",
    "d": "Counted on the masks of a global criterion, which are not uniform. So are its rows SNFS and "
    "Lottery, which cannot be derived.",
    "e": "3 f_D. The report leaves out the gradient of the images, as `train_actual` does: 945,495,552.",
}

CHAR_LM_NOTES = {"": "Each layer runs once a character, so that every distribution costs the same."}

# Appendix B, table 2: inputs and widths, sparsity -> KFLOPs of inference.
LENET_KFLOPS = {
    "245-160-55 (SBP)": {0.0: "97.1"},
    "266-88-33 (L0)": {0.0: "53.3"},
    "97-71-33 (VIB)": {0.0: "19.1"},
    "408-100-69 (RigL)": {0.87: "12.6"},
    "375-62-51 (RigL+)": {0.886: "6.2 a"},
}
LENET_NOTES = {
    "a": "The sparsity is rounded: .8855 gives 6.16. The training GFLOPs of appendix B cannot be derived.",
}
