"""The embedded world: small worlds of problems whose every step can be checked exactly.

Three groups of families: maths, other reasoning, non-reasoning (the groups of the transfer
study). Problems come in English and Japanese wordings, in splits that are disjoint by
construction: train, validation and test, and "templates" and "numbers" beyond what training
shows. The metadata says of each problem its family, group, language, difficulty, template, and
its `twin`: what it shares with the same problem in another language or wording.
"""

from .family import split_of
from .generator import FAMILIES, generate, pretraining_documents
from .oracle import check_steps
from .tokenizer import CHAT_TEMPLATE, world_tokenizer

__all__ = [
    "CHAT_TEMPLATE",
    "FAMILIES",
    "check_steps",
    "generate",
    "pretraining_documents",
    "split_of",
    "world_tokenizer",
]
