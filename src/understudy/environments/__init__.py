"""Environments answer the student: a task makes one for each episode, and `play` has the student and its environment talk."""

from understudy.environments.base import SINGLE_TURN, Environment, SingleTurn, Step, single_turn

# not `play`: tasks import this package, and `play` imports tasks
__all__ = ["SINGLE_TURN", "Environment", "SingleTurn", "Step", "single_turn"]
