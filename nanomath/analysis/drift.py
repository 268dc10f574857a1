"""How far a model has moved from the one it was trained from, and where: four measures.

Tokens (arXiv 2507.00432). The tuned model P answers prompts, and it and the base Q score what was
drawn, y_t after what stands before it:

    k1        log P(y_t) - log Q(y_t), whose mean over draws from P is KL(P || Q)
    forward   KL(P || Q) = sum_v P(v) log P(v)/Q(v), over the whole vocabulary at every token
    reverse   KL(Q || P)
    rank      how many tokens a model holds likelier than y_t; the shift is Q's less P's

each the mean over responses of the mean over their tokens. (For k1 this mean is biased where
lengths depend on what was drawn: a token that the base prefers and that ends a response soon is a
large share of a short one. The sums over responses have the same mean as those of forward.) Both
KLs are added up as

    KL(a || b) = sum_v a(v) (e^d - 1 - d),   d = log b(v) - log a(v)

the same number, since a and b sum to one, but no term is negative: it is right to rounding for
models that hardly differ, and exactly 0 for equal ones.

States, of each layer: a text's feature is the mean state of its first tokens. A plane is fitted to
the base's features by PCA, both models' are projected on it, and the shift is the distance between
their two centres. Its scale is that of the activations, which differs by orders of magnitude
between layers and models: divided by the base's spread in the plane (the root mean square distance
of its texts from their centre) it says by how many of the base's own differences between texts the
centre moved, and can be compared. Linear CKA (Kornblith et al., arXiv 1905.00414) of features X
and Y, centred, does not know about rotations or scale, nor need it equal widths:

    CKA = <X X^T, Y Y^T> / (|X X^T| |Y Y^T|)

Weights, of each matrix: |W_P - W_Q| / |W_Q| (Frobenius), the share that differs in bfloat16, and
the effective rank of the difference, exp of the entropy of its singular values over their sum (Roy
& Vetterli, EUSIPCO 2007).

Intervals are 95% bootstrap percentiles over responses, or over texts with the plane held.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nanomath.analysis.evaluation import (
    RESAMPLES,
    Score,
    interval,
    mean_score,
    with_percentiles,
)
from nanomath.analysis.runs import piece
from nanomath.models import Tokenizer, Transformer
from nanomath.models.batches import (
    Example,
    lay_out,
    layout_states,
    make_batch,
    micro_batches,
    response_states,
)
from nanomath.models.hf_names import hf_slices
from nanomath.models.scores import response_scores
from nanomath.rollout.known import encode_response

Array = NDArray[np.float64]

MEASURES = {
    "k1": "log P - log Q of the tokens that the tuned model P drew, Q the base, nats a token. "
    "Summed over a response it estimates KL(P || Q); its mean over tokens is below forward_kl "
    "where what is drawn decides how long the response is",
    "forward_kl": "KL(P || Q) of the whole vocabulary at these tokens, nats a token",
    "reverse_kl": "KL(Q || P) of the whole vocabulary at these tokens, nats a token",
    "rank_shift": "how many ranks a drawn token lies apart in the two models, mean of |shift|",
    "moved": "share of the drawn tokens whose rank is not the same in the two models",
    "text": "log P - log Q of a response's text, each model in its own tokens, nats a character",
    "distance": "between the centres of the two models' texts in the plane of the base's first "
    "two principal components, mean over layers, in the units of the activations",
    "relative_distance": "distance / the base's spread in that plane, mean over layers",
    "cka": "linear CKA of the two models' features, mean over layers; 1: the same but for "
    "rotation and scale. It is high for any two models where texts are fewer than the width",
    "change": "|W_P - W_Q| / |W_Q|, Frobenius",
    "changed": "share of the weights that are not the same in bfloat16",
    "effective_rank": "exp of the entropy of the difference's singular values, mean over the "
    "matrices that changed",
}
# Held at once, of each model: 16 MB, some of which stays in the cache.
CHUNK_LOGITS = 4_000_000
TOKENS = 4096  # of a micro-batch
FEWEST_TEXTS = 3  # two lie on a line, which is no plane

# Tokens that lead an argument rather than say what it is about, without spaces and capitals.
WORDS = """
    = + - * / × ÷ − < > ≈ ∴ ∵ ⇒ → ⟹ add adding added also although alternatively and answer
    as assume because but check conclude consider define denote divide equal equals finally first
    following for from given hence however if implies instead is let means minus multiply must
    next not now observe or otherwise plus recall second similarly since so solve step subtract
    sum suppose that then therefore third though thus times total unless verify wait we when
    whereas which while why
    したがって 従って よって ゆえに だから なので そこで そのため ため から ので なぜなら まず
    最初 次 次に つぎに さらに また そして それから つまり すなわち しかし ただし もし ならば
    とき とする すると 仮定 最後 最後に 結局 答え 合計 足す 引く 掛ける 割る 計算 確認
"""
LOGICAL = frozenset(WORDS.split())


def estimate(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Return mean, standard error and 95% bootstrap interval of one value per response.
    ValueError where one is not finite, as in a dtype whose range is too small.
    """
    if not np.isfinite(values).all():
        raise ValueError("what the models say of the responses is not finite")
    score = mean_score(values, seed)
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return as_estimate(score, error)


def as_estimate(score: Score, error: float) -> dict[str, float]:
    """What drift.json holds of a mean."""
    return {
        "mean": score.mean,
        "stderr": float(error),
        "low": score.low,
        "high": score.high,
    }


# --- tokens ----------------------------------------------------------------------------------


@torch.no_grad()
def token_shift(
    base: Transformer,
    tuned: Transformer,
    examples: Sequence[Example],
    temperature: float = 1.0,
    token_budget: int = TOKENS,
) -> list[Array]:
    """Return for each response [5, R]: k1, forward and reverse KL, and the rank, from 0, of each
    of its tokens under the base and under the tuned model.

    The tokens mean the same in both models. Where one vocabulary is padded to more rows, the
    distributions are over the rows that both have.
    """
    found: list[Array] = [np.empty(0)] * len(examples)
    rows = min(base.config.vocab_size, tuned.config.vocab_size)
    largest = max(max(example.response) for example in examples)
    if largest >= rows:
        raise ValueError(f"token {largest} was drawn, of which one model has no row")
    heads = [model.lm_head.weight[:rows] for model in (base, tuned)]
    for micro in micro_batches(examples, token_budget):
        batch = make_batch([examples[i] for i in micro]).to(tuned.device)
        states = [response_states(model, batch) for model in (base, tuned)]
        size = max(1, CHUNK_LOGITS // rows)
        pieces = zip(*(x.split(size) for x in (*states, batch.target)), strict=True)
        numbers = torch.cat(
            [
                compare_logits(
                    F.linear(h, heads[0]), F.linear(g, heads[1]), target, temperature
                ).cpu()
                for h, g, target in pieces
            ],
            dim=1,
        )
        of_each = numbers.split(batch.lengths.tolist(), dim=1)
        for i, part in zip(micro, of_each, strict=True):
            found[i] = part.numpy()
    return found


def compare_logits(
    base: Tensor, tuned: Tensor, target: Tensor, temperature: float = 1.0
) -> Tensor:
    """Return the five numbers of `token_shift` [5, n] from logits [n, V] and tokens [n], in
    float64; computed in float32 at least.
    """
    at = target[:, None]
    logits = [
        z.to(torch.promote_types(z.dtype, torch.float32)) / temperature
        for z in (base, tuned)
    ]
    ranks = [(z > z.gather(1, at)).sum(1) for z in logits]
    q, p = (z.log_softmax(1) for z in logits)
    k1 = (p - q).gather(1, at)[:, 0]
    rows = [k1, divergence(p, q), divergence(q, p), *ranks]
    return torch.stack([row.double() for row in rows])


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """Return KL(a || b) [n] of logprobs [n, V]."""
    d = b - a
    likely = a.exp()
    terms = torch.where(d < 1, likely * (d.expm1() - d), b.exp() - likely * (1 + d))
    return terms.sum(1)


def token_measures(shifts: Sequence[Array], seed: int = 0) -> dict[str, Any]:
    """Return the estimates of the token measures over some responses."""
    columns = {
        "k1": [s[0].mean() for s in shifts],
        "forward_kl": [s[1].mean() for s in shifts],
        "reverse_kl": [s[2].mean() for s in shifts],
        "rank_shift": [np.abs(s[3] - s[4]).mean() for s in shifts],
        "moved": [(s[3] != s[4]).mean() for s in shifts],
    }
    return {name: estimate(values, seed) for name, values in columns.items()}


def moved_tokens(
    tokenizer: Tokenizer,
    responses: Sequence[Sequence[int]],
    shifts: Sequence[Array],
    most: int,
) -> dict[str, Any]:
    """Return the tokens that moved most, by how often they were drawn times their mean |rank
    shift|, and the share of all shifts that each kind of token has.
    """
    count: Counter[int] = Counter()
    total: Counter[int] = Counter()
    for tokens, shift in zip(responses, shifts, strict=True):
        count.update(tokens)
        moved = np.abs(shift[3] - shift[4]).tolist()
        for token, ranks in zip(tokens, moved, strict=True):
            total[token] += ranks
    of_kind: Counter[str] = Counter()
    rows = []
    for token, shifted in sorted(total.items(), key=lambda item: (-item[1], item[0])):
        text = piece(tokenizer.backend, token)
        kind = kind_of(tokenizer.decode([token]))
        of_kind[kind] += shifted
        rows.append(
            {
                "token": token,
                "text": text,
                "kind": kind,
                "count": count[token],
                "mean_shift": shifted / count[token],
                "score": shifted,
            }
        )
    whole = of_kind.total() or 1
    shares = {kind: of_kind[kind] / whole for kind in KINDS_OF_TOKENS}
    return {"shares": shares, "tokens": [row for row in rows[:most] if row["score"]]}


KINDS_OF_TOKENS = ("logical", "content", "number", "mark")


def kind_of(text: str) -> str:
    """Return the kind of a token's text: one of LOGICAL, a number, a word or a part of one, or
    any other mark (special tokens, spaces, pieces of a character).
    """
    word = text.strip().casefold()
    if word in LOGICAL:
        return "logical"
    if any(letter.isalpha() for letter in word):
        return "content"
    return "number" if any(letter.isnumeric() for letter in word) else "mark"


def text_shift(
    models: Sequence[tuple[Transformer, Tokenizer]],
    prompts: Sequence[Sequence[list[int]]],
    texts: Sequence[str],
    temperature: float = 1.0,
) -> list[float]:
    """Return log P - log Q of each response's text, a character, for a base Q and a tuned P
    whose tokens differ; each has prompts of its own. An empty text has 0.
    """
    sums = []
    for (model, tokenizer), asked in zip(models, prompts, strict=True):
        examples = [
            Example(p, encode_response(tokenizer, t))
            for p, t in zip(asked, texts, strict=True)
        ]
        logprobs, _ = response_scores(model, examples, TOKENS, temperature)
        sums.append(logprobs.double().sum(1).numpy())
    return ((sums[1] - sums[0]) / [max(1, len(text)) for text in texts]).tolist()


def text_measures(values: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Return the estimate of `text_shift` over some responses."""
    return {"text": estimate(values, seed)}


# --- states ----------------------------------------------------------------------------------


@torch.no_grad()
def features(
    model: Transformer, texts: Sequence[list[int]], token_budget: int = TOKENS
) -> Array:
    """Return the mean states of texts, float32 [L + 1, K, D]: of the embedding and of each of the
    L layers, the last after the final norm, as transformers gives them.

    Texts stand in one row one after the other: there is no padding to leave out.
    """
    parts = [model.model.embed_tokens, *model.model.layers[:-1], model.model.norm]
    found = torch.empty(len(parts), len(texts), model.config.hidden_size)
    examples = [Example(text, []) for text in texts]
    states: list[Tensor] = []
    hooks = [
        part.register_forward_hook(lambda _part, _in, out: states.append(out[0]))
        for part in parts
    ]
    try:
        for micro in micro_batches(examples, token_budget, share=False):
            layout, _ = lay_out([examples[i] for i in micro], share=False)
            layout = layout.to(model.device)
            layout_states(model, layout)
            lengths = [len(texts[i]) for i in micro]
            for layer, state in enumerate(states):
                means = [text.mean(0) for text in state.float().split(lengths)]
                found[layer, micro] = torch.stack(means).cpu()
            states.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return found.numpy()


def plane(x: Array) -> tuple[Array, float]:
    """Return the first two principal components [2, D] of features [K, D], and the spread of the
    features in their plane. ValueError where the features are all the same.
    """
    centred = x - x.mean(0)
    _, sizes, components = np.linalg.svd(centred, full_matrices=False)
    if not sizes[0] > 1e-6 * np.linalg.norm(x):
        raise ValueError(
            "the base's states are the same for all texts: they span no plane"
        )
    return components[:2], float(np.sqrt((sizes[:2] ** 2).sum() / len(x)))


def cka(x: Array, y: Array) -> float:
    """Return the linear CKA of features [K, D] and [K, E] of the same K texts."""
    k, m = ((c := z - z.mean(0)) @ c.T for z in (x, y))
    whole = np.sqrt((k * k).sum() * (m * m).sum())
    return float((k * m).sum() / whole) if whole else 0.0


def latent_shift(base: Array, tuned: Array, seed: int = 0) -> dict[str, Any]:
    """Return the measures of features [L + 1, K, D]: estimates of their means over layers, and
    each layer's own.

    Of another number of layers each is set against the base's at the same share of the depth.
    Where widths differ there is no distance, and "refused" says so. ValueError for fewer than
    FEWEST_TEXTS texts, or texts that are all the same.
    """
    if base.shape[1] < FEWEST_TEXTS:
        raise ValueError(f"{base.shape[1]} texts: a plane needs {FEWEST_TEXTS} of them")
    depths = np.linspace(0, len(base) - 1, len(tuned)).round().astype(int)
    base = base[depths].astype(np.float64)
    tuned = tuned.astype(np.float64)
    alike = [cka(b, t) for b, t in zip(base, tuned, strict=True)]
    names = ["embedding", *map(str, range(len(tuned) - 1))]
    layers = [{"layer": n, "cka": c} for n, c in zip(names, alike, strict=True)]
    found: dict[str, Any] = {"cka": {"mean": float(np.mean(alike))}, "layers": layers}
    if base.shape != tuned.shape:
        widths = f"{base.shape[2]} and {tuned.shape[2]}"
        refused = (
            f"distance: the widths are {widths}, and the base's plane is in its own"
        )
        return {**found, "refused": refused}
    planes, spread = map(np.array, zip(*map(plane, base), strict=True))
    moves = (tuned - base) @ planes.transpose(0, 2, 1)  # [L + 1, K, 2]
    distance = np.linalg.norm(moves.mean(1), axis=1)
    for row, raw, scale in zip(layers, distance.tolist(), spread.tolist(), strict=True):
        row |= {"distance": raw, "relative_distance": raw / scale, "spread": scale}
    count = base.shape[1]
    draws = np.random.default_rng(seed).multinomial(
        count, [1 / count] * count, RESAMPLES
    )
    drawn = np.linalg.norm(draws / count @ moves, axis=2)  # [L + 1, RESAMPLES]
    for name, scale in (
        ("distance", np.ones_like(spread)),
        ("relative_distance", spread),
    ):
        means = (drawn / scale[:, None]).mean(0)
        score = with_percentiles((distance / scale).mean(), means)
        found[name] = as_estimate(score, means.std())
    return found


# --- weights ---------------------------------------------------------------------------------


@torch.no_grad()
def weight_change(base: Transformer, tuned: Transformer) -> dict[str, Any]:
    """Return the measures of all weights, by layer, by kind of matrix, and of each matrix under
    its Hugging Face name.

    Embeddings that both models tie count once. ValueError where the shapes differ.
    """
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (base, tuned)]
    for name in sorted(shapes[0].keys() & shapes[1].keys()):
        one, other = (tuple(shape[name]) for shape in shapes)
        if one != other:
            raise ValueError(
                f"{name} is {one} in the base and {other} in the tuned model"
            )
    if extra := {
        n for n in shapes[0].keys() ^ shapes[1].keys() if n != "lm_head.weight"
    }:
        raise ValueError(f"only one of the models has {min(extra)}")
    wider = max(base, tuned, key=lambda model: len(list(model.parameters())))
    matrices = [
        matrix_change(name, *(m.get_parameter(own)[first:last] for m in (base, tuned)))
        for name, own, first, last in hf_slices(wider)
    ]
    kinds: dict[str, dict[str, Any]] = {}
    for key in ("layer", "kind"):
        values = dict.fromkeys(row[key] for row in matrices)
        kinds[f"{key}s"] = {
            value: summary([row for row in matrices if row[key] == value])
            for value in values
        }
    return {"all": summary(matrices), **kinds, "matrices": matrices}


def matrix_change(name: str, base: Tensor, tuned: Tensor) -> dict[str, Any]:
    """Return the measures of one matrix or vector, and what `summary` adds them up from."""
    layer = re.search(r"layers\.(\d+)\.", name)
    kind = name.split(".")[-2]
    change = tuned.float() - base.float()
    norms = [
        float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (base, change)
    ]
    differ = int((base.bfloat16() != tuned.bfloat16()).sum())
    return {
        "name": name,
        "layer": layer[1] if layer else kind.replace("embed_tokens", "embedding"),
        "kind": kind,
        "weights": base.numel(),
        "norm": norms[0],
        "norm_of_change": norms[1],
        "change": norms[1] / norms[0] if norms[0] else 0.0,
        "changed": differ / base.numel(),
        "effective_rank": effective_rank(change) if change.dim() == 2 else None,
    }


def effective_rank(matrix: Tensor) -> float:
    """Return exp of the entropy of the singular values over their sum, 0 for a zero matrix.

    They are roots of the eigenvalues of M^T M, in float64; eigenvalues below its rounding are 0.
    """
    rows, columns = matrix.shape
    tall = matrix if rows >= columns else matrix.T
    gram = sum(part.double().T @ part.double() for part in tall.split(TOKENS))
    squares = torch.linalg.eigvalsh(gram)
    largest = squares[-1]
    rounding = len(squares) * torch.finfo(torch.float64).eps * largest
    values = squares.where(squares > rounding, 0).sqrt()
    if not largest > 0:
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the measures of several matrices taken as one vector, their mean effective rank."""
    size = sum(row["weights"] for row in rows)
    norm, moved = (
        sum(row[name] ** 2 for row in rows) ** 0.5
        for name in ("norm", "norm_of_change")
    )
    ranks = [row["effective_rank"] for row in rows if row["effective_rank"]]
    return {
        "weights": size,
        "change": moved / norm if norm else 0.0,
        "changed": sum(row["changed"] * row["weights"] for row in rows) / size,
        "effective_rank": float(np.mean(ranks)) if ranks else 0.0,
    }


# --- all of it -------------------------------------------------------------------------------


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a terminal shows of a drift.json."""
    whole, *others = found["groups"].items()
    asked = found["asked"]
    counts = [f"{whole[1][n]} {n}" for n in ("responses", "texts") if n in whole[1]]
    yield f"{asked['tuned']} against {asked['base']}: {', '.join(counts)}"
    for name in MEASURES:
        if name in whole[1]:
            yield f"  {name:18}{_shown(whole[1][name])}"
    for name, value in found.get("weights", {}).get("all", {}).items():
        if name in MEASURES:
            yield f"  {name:18}{value:.4g}"
    if others:
        names = [n for n in MEASURES if any(n in group for _, group in others)]
        wide = max(len(name) for name, _ in others) + 2
        yield " " * wide + "".join(f"{n:>{max(len(n), 9) + 2}}" for n in names)
        for group, numbers in others:
            cells = [f"{_mean(numbers.get(n)):>{max(len(n), 9) + 2}}" for n in names]
            yield f"  {group:{wide - 2}}" + "".join(cells)
    yield from (f"  not measured: {reason}" for reason in found["refused"])


def _mean(value: Mapping[str, float] | None) -> str:
    return f"{value['mean']:.4g}" if value else "-"


def _shown(value: Mapping[str, float]) -> str:
    text = _mean(value)
    if "low" in value:
        text += f" ({interval(value['low'], value['high'], '.4g')})"
    return text
