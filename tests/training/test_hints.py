"""Hints in training: what is sampled, judged, scored and learnt, and runs that stay the same."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plain_step import PlainStep, assert_same, new_step, token_logprobs, token_states

import train_grpo
from nanomath import settings
from nanomath.algorithms import PRESETS, credit
from nanomath.data.problem import Problem
from nanomath.data.prompts import PromptTemplate
from nanomath.process.prm import length_scores
from nanomath.process.rewards import ProcessReward, VerifiedReward
from nanomath.rewards import RewardSet
from nanomath.rollout import Completion, Episode, Sampler
from nanomath.rollout.difficulty import Difficulty
from nanomath.rollout.hints import Chooser, Hint, Ladder, Schedule
from nanomath.settings import Algorithm
from nanomath.training.build import encode_prompts
from nanomath.training.hints import Hints
from nanomath.training.rollout_log import record_of
from nanomath.training.runlog import read_jsonl
from nanomath.training.teacher import Teacher

TEMPLATE = PromptTemplate()
PROBLEMS = [
    Problem(
        f"p{i}",
        f"What is {i}+1+1?",
        f"{i + 2}",
        f"{i}+1={i + 1}.\n\nThen {i + 2}.\n\nDone.",
    )
    for i in range(4)
]
OF_RUN = {"seconds", "tokens_per_second", "sampling_seconds"}


class FakeSampler:
    """Draws the same samples of every prompt, of which `right(problem, prompt)` are right, and
    keeps what it was asked.
    """

    def __init__(self, tokenizer, right):
        self.tokenizer = tokenizer
        self.right = right
        self.asked = []

    def generate(self, prompts, n, seed, **rest):
        self.asked.append(
            (seed, [self.tokenizer.decode(p, skip_special=False) for p in prompts])
        )
        eos = self.tokenizer.eos_id
        return [
            Completion(i, k, [5 + k, eos], [-0.5, -0.25], [-0.5, -0.25], "so", "eos")
            for i in range(len(prompts))
            for k in range(n)
        ]

    def score(self, groups):
        for group in groups:
            for number, e in enumerate(group):
                ok = self.right(e.problem, self.tokenizer.decode(e.prompt)) > number
                e.rewards = {"accuracy": float(ok), "total": float(ok)}


@pytest.fixture
def hints(new_model, tokenizer):
    """hints(chooser, right, **keys of [hints]): over PROBLEMS, on a random model."""

    def make(chooser, right=lambda problem, prompt: 0, steps=10, **keys):
        model = new_model(0, torch.float64)
        config = SimpleNamespace(
            sampling=SimpleNamespace(temperature=1.0),
            grpo=SimpleNamespace(token_budget=0),
        )
        trainer = SimpleNamespace(model=model, tokenizer=tokenizer, config=config)
        return Hints(
            settings.Hints(chooser="ladder", **keys),
            trainer,
            FakeSampler(tokenizer, right),
            TEMPLATE,
            PROBLEMS,
            "blank_line",
            chooser,
            Difficulty(len(PROBLEMS), 32),
            0,
            steps,
        )

    return make


@pytest.fixture
def prompts(tokenizer):
    return encode_prompts(PROBLEMS, TEMPLATE, tokenizer, 128)


def draw(hints, prompts, seed=7):
    return hints.episodes(PROBLEMS, prompts, [hints.sampler.score], 4, seed=seed)


def test_the_ladder_samples_only_what_is_all_wrong_again(hints, prompts):
    """Problem 0 is solved by itself, 1 after one step, 2 after two; 3 never."""
    needed = {"p0": 0, "p1": 1, "p2": 2, "p3": 9}
    given = hints(
        Ladder([0.25, 0.5, 0.75]),
        lambda problem, prompt: 2 * (prompt.count("\n\n") >= needed[problem.id]),
    )
    groups = draw(given, prompts)
    seeds, asked = zip(*given.sampler.asked, strict=True)
    assert [len(texts) for texts in asked] == [4, 3, 2, 1] and len(set(seeds)) == 4
    begun = "<|user|>What is 3+1+1?<|assistant|>3+1=4.\n\n"
    assert [texts[-1] for texts in asked[1:]] == [begun, begun + "Then 5.\n\n"] + [
        begun + "Then 5.\n\n"
    ]
    levels = [group[0].hint.level if group[0].hint else 0 for group in groups]
    assert levels == [0, 0.25, 0.5, 0.75]
    metrics, again = given.learn()
    assert [group[0].problem.id for group in again] == [
        "p1",
        "p2",
        "p3",
        "p2",
        "p3",
        "p3",
    ]
    assert metrics["hints/again"] == 6 and metrics["hints/rate"] == 0.75
    assert metrics["hints/level"] == pytest.approx(1.5 / 4)
    assert metrics["hints/flat_groups"] == 0.25
    assert given.difficulty.tensors["right"].tolist() == [2, 0, 0, 0]
    assert given.difficulty.tensors["wrong"].tolist() == [2, 4, 4, 4]
    assert given.step == 1 and not given.tries


def test_a_ladder_of_zeros_is_the_control(hints, prompts):
    given = hints(Ladder([0.0, 0.0]))
    groups = draw(given, prompts)
    seeds, asked = zip(*given.sampler.asked, strict=True)
    assert len(set(seeds)) == 3 and asked[0] == asked[1] == asked[2]
    assert not any(episode.hint for group in groups for episode in group)
    assert given.learn()[0]["hints/rate"] == 0


def test_who_is_given_hints(hints, prompts):
    """From step `start` on, problems whose estimate is below the threshold."""
    given = hints(Schedule([0.5]), start=1, below=0.4)
    given.difficulty.tensors["right"][:2] = 100.0
    given.difficulty.tensors["wrong"][2:] = 100.0
    levels = []
    for _ in range(2):
        levels.append([bool(group[0].hint) for group in draw(given, prompts)])
        metrics, _ = given.learn()
    assert levels == [[False] * 4, [False, False, True, True]]
    assert metrics["hints/rate/0-0.25"] == 1 and metrics["hints/rate/0.75-1"] == 0
    assert metrics["hints/level/0-0.25"] == 0.5


def test_where_the_hint_stands(hints, prompts, tokenizer):
    for place in ("assistant", "user"):
        given = hints(
            Schedule([0.34]), place=place, template=" It begins: {hint} Go on."
        )
        (group, *_), (_, texts) = draw(given, prompts), *given.sampler.asked
        hint = group[0].hint
        if place == "user":
            text = "<|user|>What is 0+1+1? It begins: 0+1=1. Go on.<|assistant|>"
            assert hint.prefix == []
        else:
            text = "<|user|>What is 0+1+1?<|assistant|>0+1=1.\n\n"
            assert tokenizer.decode(hint.prefix) == "0+1=1.\n\n"
        assert texts[0] == text and hint.text == "0+1=1.\n\n"
        assert hint.bare == prompts[0]
        assert tokenizer.decode(group[0].prompt, skip_special=False) == text
        assert {"level": 0.34, "hint": "0+1=1.\n\n"}.items() <= record_of(
            group[0]
        ).items()


def test_scored_without_the_hint_its_prompt_is_the_bare_one(hints, prompts):
    given = hints(Schedule([0.34]), place="user", score="bare")
    groups = draw(given, prompts)
    assert [group[0].prompt for group in groups] == prompts
    assert all(group[0].hint for group in groups)


def test_the_verifier_sees_what_was_begun(tokenizer):
    problem = Problem("p", "q", "12", "a\n\n\\boxed{12}")
    completion = Completion(0, 0, [5], [0.0], [0.0], "{12}", "eos")
    hint = Hint(0.5, "So \\boxed", [4], tokenizer.encode("So \\boxed"))
    begun = Episode(problem, [4, *hint.prefix], completion, hint=hint)
    told = replace(begun, hint=replace(hint, prefix=[]))
    VerifiedReward(RewardSet({"accuracy": 1.0}))([[begun], [told]])
    assert (begun.rewards["accuracy"], told.rewards["accuracy"]) == (1, 0)
    assert begun.solution.tokens == [*hint.prefix, 5]
    assert told.solution is told.completion


@pytest.mark.parametrize("form", ["sum", "min", "delta"])
def test_steps_of_the_hint_are_read_and_not_paid(tokenizer, form):
    """The scorer sees all steps; scores and rewards are those of the completion's."""
    seen = []

    def scorer(solutions):
        seen.extend(steps for _, steps in solutions)
        return length_scores(solutions, longest=40)

    def episode(prefix: str, text: str) -> Episode:
        tokens = [*tokenizer.encode(text), tokenizer.eos_id]
        zeros = [0.0] * len(tokens)
        completion = Completion(0, 0, tokens, zeros, zeros, text, "eos")
        hint = Hint(0.5, prefix, [4], tokenizer.encode(prefix)) if prefix else None
        rewards = {"accuracy": 0.0, "total": 0.0}
        return Episode(PROBLEMS[0], [4], completion, rewards, hint=hint)

    begun = episode("ab\n\ncdef\n\n", "abcd.\n\nx")
    silent = episode("ab\n\n", "")
    group = [begun, silent, episode("", "abcd.\n\nx")]
    paid = lambda scores, ends: credit(scores, ends, form=form)  # noqa: E731
    ProcessReward(scorer, tokenizer, paid)([group])
    assert seen[0] == ["ab\n\n", "cdef\n\n", "abcd.\n\n", "x"]
    assert begun.step_scores == group[2].step_scores
    assert begun.step_ends == group[2].step_ends
    assert begun.step_rewards == group[2].step_rewards and len(begun.step_rewards) == 2
    assert silent.step_ends == [0] and len(silent.step_rewards) == 1


# --- which policy is scored ------------------------------------------------------------------


def hinted_episodes(model, score: str) -> list[Episode]:
    """Two groups of four; the samples of the first were told a hint in the user's turn."""
    generator = torch.Generator().manual_seed(2)
    episodes = []
    for i in range(8):
        told, bare = [9, 11, 3, 8, 4], [9, 4]
        tokens = torch.randint(1, 300, (1 + i % 4,), generator=generator).tolist()
        sampled = told if i < 4 else bare
        with torch.no_grad():
            logprobs, _ = token_logprobs(
                model, token_states(model, sampled, tokens), tokens, 1.0
            )
        rewards = {"accuracy": float(i % 2), "total": float(i % 2)}
        logprobs = logprobs.tolist()
        completion = Completion(i // 4, i % 4, tokens, logprobs, logprobs, "", "eos")
        hint = Hint(0.5, "x", bare, []) if i < 4 else None
        prompt = bare if score == "bare" else sampled
        episodes.append(
            Episode(Problem(f"p{i // 4}", "q", "a"), prompt, completion, rewards)
        )
        episodes[-1].hint = hint
    return episodes


def brute_force(model, episodes, bare: bool) -> dict[str, torch.Tensor]:
    """- grad of 1/8 sum_i 1/|o_i| sum_t pi(o_t | q) / pi(o_t | q, h) A_i, without a clip."""
    loss = torch.zeros((), dtype=torch.float64)
    for i, episode in enumerate(episodes):
        group = torch.tensor(
            [e.rewards["total"] for e in episodes[i // 4 * 4 : i // 4 * 4 + 4]]
        )
        advantage = episode.rewards["total"] - float(group.mean())
        tokens = episode.completion.tokens
        prompt = [9, 11, 3, 8, 4] if i < 4 and not bare else [9, 4]
        ours, _ = token_logprobs(
            model, token_states(model, prompt, tokens), tokens, 1.0
        )
        ratio = (
            ours - torch.tensor(episode.completion.logprobs, dtype=torch.float64)
        ).exp()
        loss = loss - (ratio * advantage).mean() / 8
    slopes = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    names = [name for name, _ in model.named_parameters()]
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    return zeros | {n: g for n, g in zip(names, slopes, strict=True) if g is not None}


@pytest.mark.parametrize("score", ["bare", "hinted"])
def test_the_gradient_is_that_of_the_policy_that_is_scored(new_model, recorder, score):
    model = new_model(1, torch.float64)
    episodes = hinted_episodes(model, score)
    keys = {"old_logprobs": "sampler", "clip": "off", "scale": "off"}
    optimizer = recorder(model)
    new_step(model, copy.deepcopy(model), optimizer, **keys).step(episodes, 0, 0.1)
    expected = brute_force(model, episodes, score == "bare")
    assert_same(optimizer.gradients[0], expected)
    other = brute_force(model, episodes, score != "bare")
    with pytest.raises(AssertionError):
        assert_same(optimizer.gradients[0], other)


def test_what_was_found_with_a_hint_is_learnt_without_it(new_model, recorder):
    """method sft, score bare: the mean of -log pi(y | q) over the tokens of right samples."""
    model = new_model(1, torch.float64)
    episodes = hinted_episodes(model, "bare")
    optimizer = recorder(model)
    new_step(model, copy.deepcopy(model), optimizer, **PRESETS["sft"]).step(
        episodes, 0, 0.1
    )
    found = []
    for episode in episodes[1::2]:
        tokens = episode.completion.tokens
        states = token_states(model, [9, 4], tokens)
        found.append(token_logprobs(model, states, tokens, 1.0)[0])
    names, weights = zip(*model.named_parameters(), strict=True)
    slopes = torch.autograd.grad(-torch.cat(found).mean(), weights)
    assert_same(optimizer.gradients[0], dict(zip(names, slopes, strict=True)))


def test_clipped_ratios_without_the_hint_are_those_of_a_plain_step(new_model, recorder):
    model = new_model(1, torch.float64)
    episodes = hinted_episodes(model, "bare")
    keys = {"old_logprobs": "sampler", "kl_coef": 0.1}
    optimizer = recorder(model)
    new_step(model, copy.deepcopy(model), optimizer, **keys).step(episodes, 0, 0.1)
    plain = PlainStep(copy.deepcopy(model), copy.deepcopy(model), Algorithm(**keys))
    plain.step(copy.deepcopy(episodes), [list(range(8))], 0.0)
    assert_same(optimizer.gradients[0], plain.gradients[0])


def test_a_teacher_reads_the_beginning_that_was_given(hints, prompts, tokenizer):
    """A completion that goes on with a hint is scored after it; one that was told it in the
    question is scored after what the teacher is shown. Where that is too long, it is shown nothing.
    """
    for place, ending in (
        ("assistant", "<|assistant|>0+1=1.\n\n"),
        ("user", "<|assistant|>"),
    ):
        given = hints(Schedule([0.34]), lambda problem, prompt: 2, place=place)
        episodes = [e for group in draw(given, prompts) for e in group]
        model = SimpleNamespace(config=SimpleNamespace(max_positions=200))
        for shows in "solution", "sibling":
            asks = "{question} As: {demonstration}"
            teacher = Teacher(model, tokenizer, TEMPLATE, shows, asks)
            example = teacher.examples(episodes, 4)[0]
            assert example.response == episodes[0].completion.tokens
            read = tokenizer.decode(example.prompt, skip_special=False)
            assert " As: " in read and read.endswith(ending)
            assert ("As: 0+1=1" in read) == (
                shows == "solution" or place == "assistant"
            )
        model.config.max_positions = len(example)
        assert teacher.examples(episodes, 4)[0] == example
        model.config.max_positions -= 1
        assert teacher.examples(episodes, 4)[0].prompt == episodes[0].prompt


def test_reliance_is_what_the_hint_explains(hints):
    """Per token: of the completion after a hint in the user's turn, of hint and completion
    where it begins the assistant's.
    """
    given = hints(Chooser())
    model = given.trainer.model
    bare, prefix, tokens = [9, 4], [11, 3, 8], [7, 20]
    completion = Completion(0, 0, tokens, [-1.0, -2.0], [0.0, 0.0], "", "eos")
    episodes = [
        Episode(PROBLEMS[0], [9, 1, 4], completion, hint=Hint(0.5, "x", bare, [])),
        Episode(
            PROBLEMS[0], bare + prefix, completion, hint=Hint(0.5, "x", bare, prefix)
        ),
    ]
    with torch.no_grad():
        alone, _ = token_logprobs(model, token_states(model, bare, tokens), tokens, 1.0)
        both = prefix + tokens
        whole, _ = token_logprobs(model, token_states(model, bare, both), both, 1.0)
    expected = [(-3.0 - float(alone.sum())) / 2, (-3.0 - float(whole.sum())) / 5]
    assert given.reliance(episodes) == pytest.approx(expected, abs=1e-5)
    assert given.reliance([]) == []


def test_states_are_those_of_the_last_token_whatever_the_budget(hints, prompts):
    given = hints(Chooser())
    found = given.states(prompts)
    for prompt, state in zip(prompts, found, strict=True):
        expected = given.trainer.model.hidden(torch.tensor([prompt]))[0, -1]
        assert torch.allclose(state, expected, atol=1e-9)
    given.trainer.config.grpo.token_budget = 20
    assert torch.allclose(given.states(prompts), found, atol=1e-9)


# --- whole runs ------------------------------------------------------------------------------


@pytest.fixture
def train(model_directory, tmp_path):
    """train(name, *words): the directory of a run of four steps on six problems."""
    words = [
        *(
            f"model.path={model_directory}",
            "model.device=cpu",
            f"run.directory={tmp_path}",
        ),
        *("train.limit=6", "heldout.limit=3", "evaluation.samples=2", "run.steps=4"),
        *("train.world.difficulty=3,3", "heldout.world.difficulty=3,3"),
        *("sampling.max_new_tokens=8", "grpo.prompts=4", "grpo.group_size=4"),
        *("reward.weights.random=1", "optim.lr=0.003", "grpo.logged_groups=4"),
    ]

    def train(name: str, *more: str) -> Path:
        assert train_grpo.main([*words, f"run.name={name}", *more]) == 0
        return tmp_path / name

    return train


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [
        {
            k: v
            for k, v in line.items()
            if k not in OF_RUN and not k.startswith("hints/")
        }
        for line in read_jsonl(run / name)
    ]


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / "step-4" / "model.safetensors").read_bytes()


SOLVED = "hints.levels=[0.5,1]"  # such a model is right where it is told the answer
CHOOSERS = {
    "ladder": (SOLVED,),
    "schedule": ("hints.levels=[1,0.5]",),
    "controller": ("hints.most=1",),
    "learned": ("hints.levels=[0,0.5,1]", "hints.upper_rate=5"),
}


@pytest.mark.parametrize(
    "words",
    [
        ("hints.chooser=schedule", "hints.levels=[0]"),
        ("hints.chooser=controller", "hints.most=0"),
        ("hints.chooser=learned", "hints.levels=[0,0]"),
        ("hints.chooser=learned", "hints.below=0"),
        ("hints.chooser=ladder", "hints.start=4"),
    ],
    ids=" ".join,
)
def test_level_0_everywhere_is_training_without_hints(train, words):
    plain, hinted = train("plain"), train("hinted", *words)
    assert weights(plain) == weights(hinted)
    for name in ("metrics.jsonl", "rollouts.jsonl", "groups.jsonl", "heldout.jsonl"):
        assert lines(plain, name) == lines(hinted, name)


@pytest.mark.parametrize("chooser", CHOOSERS)
def test_a_resumed_run_is_the_unbroken_one(train, tmp_path, chooser):
    words = (f"hints.chooser={chooser}", *CHOOSERS[chooser], "run.save_every=2")
    whole = train("whole", *words, "run.keep_last=0")
    metrics = list(read_jsonl(whole / "metrics.jsonl"))
    assert any(line.get("hints/rate") for line in metrics)
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step-4")
    train("parts", *words, "run.keep_last=0", "--resume")
    names = ("model.safetensors", "trainer.safetensors")
    for name in names:
        place = Path("checkpoints") / "step-4" / name
        assert (parts / place).read_bytes() == (whole / place).read_bytes()
    of_steps = [
        line for line in read_jsonl(parts / "metrics.jsonl") if "reward" in line
    ]
    expected = [line for line in metrics if "reward" in line]
    for line in (*of_steps, *expected):
        for name in OF_RUN:
            del line[name]
    assert of_steps == expected
    assert lines(parts, "rollouts.jsonl") == lines(whole, "rollouts.jsonl")


def test_a_run_tells_what_was_told(train):
    run = train("run", "hints.chooser=ladder", SOLVED)
    metrics = [line for line in read_jsonl(run / "metrics.jsonl") if "reward" in line]
    # Nothing is solved without one
    assert all(line["hints/rate"] == 1 for line in metrics)
    for line in metrics:
        assert line["groups"] == 4 and line["groups_sampled"] == 4 + line["hints/again"]
        assert 0 < line["hints/brier"] < 1 and 0 <= line["hints/ece"] < 1
        assert line["hints/reliance"] > 0
    rollouts = list(read_jsonl(run / "rollouts.jsonl"))
    assert {line["level"] for line in rollouts} == {1.0}
    assert all(line["rewards"]["accuracy"] and line["hint"] for line in rollouts)
    groups = list(read_jsonl(run / "groups.jsonl"))
    assert {level for line in groups for level in line["levels"]} == {0.0, 0.5, 1.0}


def test_held_out_problems_never_have_a_hint(train, monkeypatch, tokenizer):
    seen = []
    measure = train_grpo.evaluate

    def evaluate(sampler, problems, prompts, *rest, **options):
        seen.append((problems, prompts))
        assert type(sampler) is Sampler
        return measure(sampler, problems, prompts, *rest, **options)

    monkeypatch.setattr(train_grpo, "evaluate", evaluate)
    train("run", "hints.chooser=schedule", "hints.levels=[1]", "run.eval_every=1")
    assert len(seen) == 5
    for problems, prompts in seen:
        assert prompts == encode_prompts(problems, TEMPLATE, tokenizer, 192)


@pytest.mark.parametrize(
    "words",
    [
        ("algorithm.method=process_grpo",),
        ("algorithm.method=ppo", "algorithm.credit=clip_delta"),
        ("algorithm.method=dapo", "algorithm.keep_groups=uneven"),
        ("hints.place=user", "hints.score=bare", "algorithm.old_logprobs=sampler"),
        ("hints.place=user", "lora.rank=4"),
        ("hints.place=user", "hints.score=bare", "algorithm.method=sft"),
        ("algorithm.method=dpo", "hints.levels=[0.5]"),
        ("algorithm.method=opd", "teacher.path=start", "teacher.shows=solution"),
        (
            *("algorithm.method=opd", "algorithm.advantage=teacher_full"),
            *("teacher.path=policy", "teacher.shows=sibling", "lora.rank=2"),
        ),
    ],
    ids=" ".join,
)
def test_hints_go_with_what_else_there_is(train, words):
    run = train("run", "process.prm=oracle", "hints.chooser=ladder", SOLVED, *words)
    metrics = [line for line in read_jsonl(run / "metrics.jsonl") if "reward" in line]
    assert all(line["hints/rate"] > 0 for line in metrics)
    # This model finds no answer after half of a solution, and then no sample is taught.
    assert all(line["grad_norm"] > 0 or line["taught"] == 0 for line in metrics)
    told = [line for line in read_jsonl(run / "rollouts.jsonl") if "hint" in line]
    for line in told:
        assert all(0 <= end < len(line["tokens"]) for end in line["step_ends"])
        assert len(line["step_ends"]) == len(line["step_scores"])
    assert told


def test_token_budgets_do_not_matter(train):
    runs = [
        train(
            f"run-{budget}", "hints.chooser=controller", f"grpo.token_budget={budget}"
        )
        for budget in (0, 150, "auto")
    ]
    of_runs = [list(read_jsonl(run / "metrics.jsonl")) for run in runs]
    for one, *others in zip(*of_runs, strict=True):
        for name in one.keys() - OF_RUN:
            for other in others:
                assert one[name] == pytest.approx(other[name], abs=1e-4), name
