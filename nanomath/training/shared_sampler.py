"""Sampling and scoring shared out among ranks: each rank draws for some of the prompts and scores
some of the groups, and all ranks get what one rank alone would have made.

A sample is a function of (seed, prompt, number of the sample), so it does not matter which
rank draws it. Only the copies of a prompt that land on different ranks have to be told
which numbers are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanomath.rollout.episodes import Groups, Scorer, in_groups
from nanomath.rollout.sampler import Completion, Sampler, first_samples
from nanomath.training import ranks
from nanomath.training.sharding import whole


class SharedSampler(Sampler):
    """Runs `generate` on all ranks together.

    Every rank gives the same arguments and gets the same result. refresh: brings the
    sampler's weights up to date, where they are not the trainer's own.
    """

    refresh: Callable[[], None] | None = None

    def generate(
        self, prompts: Sequence[list[int]], n: int = 1, **sampling: Any
    ) -> list[Completion]:
        """Draw `n` completions of every prompt, in prompt-major order; `sampling` is as in
        `Sampler.generate`.
        """
        first = ranks.share(first_samples(prompts, n))
        if self.refresh:
            self.refresh()
        with whole(self.model):
            mine = super().generate(ranks.share(prompts), n, first=first, **sampling)
        groups = ranks.gather(in_groups(mine, n))
        return [
            replace(completion, prompt_index=index)
            for index, group in enumerate(groups)
            for completion in group
        ]


@dataclass
class SharedScorer:
    """A scorer of which each rank scores its share of the groups, so that a grader's timeout
    is the same for all.
    """

    scorer: Scorer

    def __call__(self, groups: Groups) -> None:
        mine = ranks.share(groups)
        if mine:  # fewer groups than ranks
            self.scorer(mine)
        for group, scored in zip(groups, ranks.gather(mine), strict=True):
            group[:] = scored

    def metrics(self, groups: Groups) -> dict[str, float]:
        return self.scorer.metrics(groups)
