"""Generation: the sampler, its KV cache, and episodes."""

from .episodes import Episode, Scorer, in_groups, sample_episodes
from .groups import KEEP_GROUPS, collect_groups, episode_metrics
from .sampler import Completion, Sampler

__all__ = [
    "KEEP_GROUPS",
    "Completion",
    "Episode",
    "Sampler",
    "collect_groups",
    "episode_metrics",
    "in_groups",
    "Scorer",
    "sample_episodes",
]
