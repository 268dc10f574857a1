"""A byte-level BPE tokenizer for the embedded world, trained on the fly on its own text
(Sennrich et al., 1508.07909).

Any text round-trips. A digit is always one token, a common word is one token with its leading
space, and the blank line that separates steps is one token that nothing merges with.
"""

from __future__ import annotations

from functools import cache

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from .family import LANGUAGES
from .generator import generate, pretraining_documents

# ids 0, 1, 2; the first ends every answer, and begins plain text
SPECIAL_TOKENS = ["<|endoftext|>", "<|user|>", "<|assistant|>"]
VOCABULARY_SIZE = 1024
TRAINING_DOCUMENTS = 3000

# One alternative for each kind of piece. In Japanese a change of script is the nearest thing
# to a word boundary.
WORD = r"\p{Hiragana}+|\p{Han}+| ?[\p{L}&&[^\p{Hiragana}\p{Han}]]+"
PIECES = rf"\n\n|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+|[^\S\n]+|\n"

# <|user|>question<|assistant|>solution<|endoftext|>; a system message precedes the first
# question on its own line.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>"
    "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + '\n' }}{% endif %}"
    "{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "<|assistant|>{{ message['content'] }}<|endoftext|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def world_tokenizer() -> Tokenizer:
    """Train the tokenizer: at most 1024 tokens, the same in every process.

    It is trained once in each process, in well under a second.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Maths counts a second time: the vocabulary should hold its words and names whole before
    # any of the other families.
    maths = generate("maths", "train", TRAINING_DOCUMENTS, languages=LANGUAGES)
    texts = [f"{problem.question}\n{problem.solution}" for problem in maths]
    tokenizer.train_from_iterator(
        pretraining_documents(TRAINING_DOCUMENTS) + texts, trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return tokenizer
