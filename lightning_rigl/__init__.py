"""Dynamic sparse training for PyTorch Lightning."""

try:
    import lightning.pytorch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("lightning", "lightning.pytorch"):
        raise
    raise ModuleNotFoundError(
        "lightning_rigl needs the package lightning, whose lightning.pytorch has the same names as "
        "pytorch_lightning: pip install lightning",
        name=error.name,
    ) from error

from lightning_rigl.callbacks.flops import FLOPsCallback
from lightning_rigl.callbacks.rigl import RigLCallback
from lightning_rigl.compute.optimizers import ActiveAdamW, ActiveSGD
from lightning_rigl.flops.plan import FLOPsPlan
from lightning_rigl.flops.planning import plan_flops, sparsity_for_ratio, steps_for_budget
from lightning_rigl.flops.report import FLOPsReport
from lightning_rigl.methods.base import Connections, Method, Moment, Probe
from lightning_rigl.methods.cigl import CigL
from lightning_rigl.methods.deepr import DeepR
from lightning_rigl.methods.dnw import DNW
from lightning_rigl.methods.dsr import DSR
from lightning_rigl.methods.edge_popup import EdgePopup, GlobalEdgePopup
from lightning_rigl.methods.gem_miner import GemMiner
from lightning_rigl.methods.gradual import Gradual, GradualGlobal
from lightning_rigl.methods.grasp import GraSP
from lightning_rigl.methods.rigl import RigL
from lightning_rigl.methods.rigl_inverted import RigLInverted
from lightning_rigl.methods.rigl_sg import RigLSG
from lightning_rigl.methods.rigl_sm import RigLSM
from lightning_rigl.methods.set import SET
from lightning_rigl.methods.snfs import SNFS
from lightning_rigl.methods.snfs_original import SNFSOriginal
from lightning_rigl.methods.snip import SNIP, SNIPGlobal
from lightning_rigl.methods.static import Static
from lightning_rigl.methods.synflow import SynFlow
from lightning_rigl.model.mask_controls import shuffled
from lightning_rigl.model.mask_files import load_masks
from lightning_rigl.model.sparsifier import Sparsifier
from lightning_rigl.tickets.driver import LotteryTickets
from lightning_rigl.tickets.folder import Ticket
from lightning_rigl.topology.distributions import ER, ERK, Distribution, PerLayer, Uniform
from lightning_rigl.topology.ends import Ends
from lightning_rigl.topology.growth import Growth
from lightning_rigl.topology.patterns import Pattern, Unstructured
from lightning_rigl.topology.schedules import UpdateSchedule
from lightning_rigl.topology.smart_ratio import SmartRatio
from lightning_rigl.topology.str_resnet50 import STR

__all__ = [
    "DNW",
    "DSR",
    "ER",
    "ERK",
    "SET",
    "SNFS",
    "SNIP",
    "STR",
    "ActiveAdamW",
    "ActiveSGD",
    "CigL",
    "Connections",
    "DeepR",
    "Distribution",
    "EdgePopup",
    "Ends",
    "FLOPsCallback",
    "FLOPsPlan",
    "FLOPsReport",
    "GemMiner",
    "GlobalEdgePopup",
    "GraSP",
    "Gradual",
    "GradualGlobal",
    "Growth",
    "LotteryTickets",
    "Method",
    "Moment",
    "Pattern",
    "PerLayer",
    "Probe",
    "RigL",
    "RigLCallback",
    "RigLInverted",
    "RigLSG",
    "RigLSM",
    "SNFSOriginal",
    "SNIPGlobal",
    "SmartRatio",
    "Sparsifier",
    "Static",
    "SynFlow",
    "Ticket",
    "Uniform",
    "Unstructured",
    "UpdateSchedule",
    "load_masks",
    "plan_flops",
    "shuffled",
    "sparsity_for_ratio",
    "steps_for_budget",
]
