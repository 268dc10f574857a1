"""Generation: the sampler, its KV cache, and episodes."""

from .episodes import Episode, episode_metrics, sample_episodes
from .sampler import Completion, Sampler

__all__ = ["Completion", "Episode", "Sampler", "episode_metrics", "sample_episodes"]
