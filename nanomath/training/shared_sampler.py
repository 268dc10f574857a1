"""Sampling shared out among ranks: each rank draws for some of the prompts, and all ranks
get the completions that one rank alone would have drawn.

A sample is a function of (seed, prompt, number of the sample), so it does not matter which
rank draws it. Only the copies of a prompt that land on different ranks have to be told
which numbers are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from nanomath.data.problem import Problem
from nanomath.rollout.episodes import Episode, Scorer, in_groups, sample_episodes
from nanomath.rollout.sampler import Completion, Sampler, first_samples
from nanomath.training import ranks
from nanomath.training.sharding import whole

T = TypeVar("T")


@dataclass
class SharedSampler:
    """Runs `generate` and `episodes` on all ranks together.

    Every rank gives the same arguments and gets the same result.

    refresh: brings the sampler's weights up to date, where they are not the trainer's own.
    """

    sampler: Sampler
    refresh: Callable[[], None] | None = None

    def generate(
        self, prompts: Sequence[list[int]], n: int = 1, **sampling: Any
    ) -> list[Completion]:
        """Draw `n` completions of every prompt, in prompt-major order; `sampling` is as in
        `Sampler.generate`.
        """

        def draw(which: Sequence[int], first: Sequence[int]) -> list[list[Completion]]:
            mine = self.sampler.generate(
                [prompts[i] for i in which], n=n, first=first, **sampling
            )
            return in_groups(mine, n)

        groups = self._share(prompts, n, draw)
        return [
            replace(c, prompt_index=index)
            for index, group in enumerate(groups)
            for c in group
        ]

    def episodes(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[list[int]],
        scorers: Sequence[Scorer],
        group_size: int,
        **sampling: Any,
    ) -> list[list[Episode]]:
        """Sample and score episodes as `sample_episodes` does.

        A rank scores the completions that it drew, so that a grader's timeout is the same
        for all.
        """

        def draw(which: Sequence[int], first: Sequence[int]) -> list[list[Episode]]:
            mine = [problems[i] for i in which], [prompts[i] for i in which]
            return sample_episodes(
                self.sampler, *mine, scorers, group_size, first=first, **sampling
            )

        groups = self._share(prompts, group_size, draw)
        for index, group in enumerate(groups):
            for episode in group:
                episode.completion = replace(episode.completion, prompt_index=index)
        return groups

    def _share(
        self,
        prompts: Sequence[list[int]],
        n: int,
        draw: Callable[[Sequence[int], Sequence[int]], list[list[T]]],
    ) -> list[list[T]]:
        """Return the groups of all prompts.

        draw(which, first) draws those of some prompts, whose samples begin at the numbers
        `first`.
        """
        which = ranks.share(range(len(prompts)))
        first = ranks.share(first_samples(prompts, n))
        if self.refresh:
            self.refresh()
        with whole(self.sampler.model):
            groups = draw(which, first) if which else []  # fewer prompts than ranks
        return ranks.gather(groups)
