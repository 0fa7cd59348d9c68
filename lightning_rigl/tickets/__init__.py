"""Lottery tickets: training, pruning and rewinding in rounds, around ``trainer.fit``."""

from lightning_rigl.tickets.driver import LotteryTickets
from lightning_rigl.tickets.folder import Ticket

__all__ = ["LotteryTickets", "Ticket"]
