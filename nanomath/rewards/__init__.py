"""Rewards: find the answer in a completion, compare it with the gold one, and turn that into
numbers.
"""

from nanomath.rewards.equality import answers_equal
from nanomath.rewards.extraction import extract_answer
from nanomath.rewards.functions import REWARDS, Response, RewardSet, is_correct

__all__ = [
    "REWARDS",
    "Response",
    "RewardSet",
    "answers_equal",
    "extract_answer",
    "is_correct",
]
