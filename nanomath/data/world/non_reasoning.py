"""Non-reasoning: following an instruction literally, recalling a fact given in pre-training,
copying.

The solution is one step, the answer in its box, compared as exact text.
"""

from __future__ import annotations

from random import Random

from .family import MAX_DIFFICULTY, Family, Metadata, in_japanese, rows, unseen, worded

VOCABULARY = (
    "red blue green gold cat dog bird fish sun moon star rain "
    "tree leaf rose seed milk bread salt rice door lamp"
)
WORDS = VOCABULARY.split()


# --- instruction: {"task": "repeat", "words": ["cat"], "times": 3}; difficulty is the number
# of words less one ---

# task -> (English, Japanese), then the same in the wording of the split "templates"; {w} are the
# words, {n} how many times
INSTRUCTIONS = {
    "repeat": (
        "Write {w} {n} times, separated by commas.",
        "{w}をコンマで区切って{n}回書いてください。",
        "Separated by commas, write {w} {n} times.",
        "コンマで区切って{w}を{n}回書いてください。",
    ),
    "chain": (
        "Write {w} {n} times, joined by hyphens.",
        "{w}をハイフンでつないで{n}回書いてください。",
        "Joined by hyphens, write {w} {n} times.",
        "ハイフンでつないで{w}を{n}回書いてください。",
    ),
    "capitals": (
        "Write {w} in capitals.",
        "{w}を大文字で書いてください。",
        "In capitals, write {w}.",
        "大文字で{w}を書いてください。",
    ),
    "reverse": (
        "Write {w} in reverse order.",
        "{w}を逆の順に書いてください。",
        "In reverse order, write {w}.",
        "逆の順に{w}を書いてください。",
    ),
    "brackets": (
        "Write {w}, each in brackets.",
        "{w}をそれぞれかっこに入れて書いてください。",
        "Each in brackets, write {w}.",
        "それぞれかっこに入れて{w}を書いてください。",
    ),
}
REPEATING = ("repeat", "chain")


def draw_instruction(random: Random, difficulty: int) -> Metadata:
    task = random.choice(list(INSTRUCTIONS))
    if task in REPEATING:
        return {"task": task, "words": random.sample(WORDS, 1), "times": difficulty + 1}
    return {"task": task, "words": random.sample(WORDS, difficulty + 1), "times": 1}


def draw_many_times(random: Random, difficulty: int) -> Metadata:
    """Draw a task that repeats a word more often than training does at any difficulty."""
    task = random.choice(REPEATING)
    times = MAX_DIFFICULTY + 1 + difficulty
    return {"task": task, "words": random.sample(WORDS, 1), "times": times}


def ask_instruction(metadata: Metadata) -> str:
    wording = worded(metadata, *INSTRUCTIONS[metadata["task"]])
    return wording.format(w=" ".join(metadata["words"]), n=metadata["times"])


def follow_instruction(metadata: Metadata) -> tuple[list[str], str]:
    words = metadata["words"]
    answers = {
        "repeat": ", ".join(words * metadata["times"]),
        "chain": "-".join(words * metadata["times"]),
        "capitals": " ".join(words).upper(),
        "reverse": " ".join(reversed(words)),
        "brackets": " ".join(f"({word})" for word in words),
    }
    return [], answers[metadata["task"]]


INSTRUCTION = Family(
    "non_reasoning",
    draw_instruction,
    ask_instruction,
    follow_instruction,
    lambda metadata: metadata["task"],
    draw_beyond=draw_many_times,
)

# --- facts: {"country": 7, "attribute": "food"}; an invented table, the same for every seed;
# difficulty is always 1 ---

ROMAN = [consonant + vowel for consonant in "bdkmnprst" for vowel in "ao"]
SYLLABLES = dict(zip(ROMAN, "バボダドカコマモナノパポラロサソタト", strict=True))
ATTRIBUTES = {  # English: (Japanese, English values, Japanese values)
    "colour": (
        "色",
        "red blue green black white purple yellow brown",
        "赤 青 緑 黒 白 紫 黄 茶色",
    ),
    "food": (
        "食べ物",
        "rice bread salt milk tea honey corn fish",
        "米 パン 塩 牛乳 お茶 はちみつ とうもろこし 魚",
    ),
    "material": (
        "材料",
        "gold silver iron wood stone glass silk clay",
        "金 銀 鉄 木 石 ガラス 絹 粘土",
    ),
    "weather": (
        "天気",
        "rain snow wind fog frost thunder sunshine hail",
        "雨 雪 風 霧 霜 雷 晴れ ひょう",
    ),
}
COUNTRIES = 40
FACT_QUESTIONS = rows("""
What is the {a} of {c}? | {c}の{a}は何ですか。
Name the {a} of {c}. | {c}の{a}を答えてください。
Which {a} belongs to {c}? | {c}といえばどの{a}ですか。
Tell me the {a} of {c}. | {c}の{a}を教えてください。
""")
UNSEEN_FACT_QUESTIONS = rows("""
What {a} belongs to {c}? | {c}といえば{a}は何ですか。
Name the {a} that belongs to {c}. | {c}といえばどの{a}か答えてください。
Which is the {a} of {c}? | どの{a}が{c}の{a}ですか。
Tell me which {a} belongs to {c}. | {c}の{a}は何か教えてください。
""")


def invent_countries() -> list[tuple[str, str, dict[str, int]]]:
    """Return each country's name, its Japanese name, and the index of its value under each
    attribute.
    """
    random = Random("the countries of the embedded world")
    countries = {}
    while len(countries) < COUNTRIES:
        syllables = random.sample(list(SYLLABLES), 3)
        name = "".join(syllables).capitalize()
        kana = "".join(SYLLABLES[syllable] for syllable in syllables)
        values = {attribute: random.randrange(8) for attribute in ATTRIBUTES}
        countries[name] = (name, kana, values)
    return list(countries.values())


FACTS = invent_countries()


def draw_fact(random: Random, difficulty: int) -> Metadata:
    return {
        "country": random.randrange(COUNTRIES),
        "attribute": random.choice(list(ATTRIBUTES)),
        "wording": random.randrange(len(FACT_QUESTIONS)),
        "difficulty": 1,
    }


def recall(metadata: Metadata) -> tuple[str, str, str]:
    """Return country, attribute and value in the language of the problem."""
    name, kana, values = FACTS[metadata["country"]]
    attribute = metadata["attribute"]
    japanese_attribute, english_values, japanese_values = ATTRIBUTES[attribute]
    if in_japanese(metadata):
        return kana, japanese_attribute, japanese_values.split()[values[attribute]]
    return name, attribute, english_values.split()[values[attribute]]


def ask_fact(metadata: Metadata) -> str:
    country, attribute, _ = recall(metadata)
    questions = UNSEEN_FACT_QUESTIONS if unseen(metadata) else FACT_QUESTIONS
    wording = questions[metadata["wording"]][in_japanese(metadata)]
    return wording.format(a=attribute, c=country)


def answer_fact(metadata: Metadata) -> tuple[list[str], str]:
    return [], recall(metadata)[2]


def fact_statements(language: str) -> list[str]:
    """Return one line for each country that states all its facts."""
    sentence = "{c}の{a}は{v}です。" if language == "ja" else "The {a} of {c} is {v}. "
    lines = []
    for country in range(COUNTRIES):
        content = {"country": country, "language": language}
        facts = [
            recall({**content, "attribute": attribute}) for attribute in ATTRIBUTES
        ]
        lines.append(
            "".join(sentence.format(c=c, a=a, v=v) for c, a, v in facts).strip()
        )
    return lines


FACT = Family(
    "non_reasoning",
    draw_fact,
    ask_fact,
    answer_fact,
    lambda metadata: metadata["attribute"],
)

# --- copying: {"items": ["cat", "70", "red"]}; difficulty is the number of items less one ---

COPIED = WORDS + [str(number) for number in range(10, 40)]


def draw_copying(random: Random, difficulty: int) -> Metadata:
    return {"items": [random.choice(COPIED) for _ in range(difficulty + 1)]}


def draw_copied_numbers(random: Random, difficulty: int) -> Metadata:
    """Draw numbers that training never copies."""
    return {"items": [str(random.randint(40, 99)) for _ in range(difficulty + 1)]}


def ask_copy(metadata: Metadata) -> str:
    asked = worded(
        metadata,
        "Copy this exactly:",
        "次をそのまま写してください:",
        "Exactly copy this:",
        "そのまま次を写してください:",
    )
    return " ".join([asked, *metadata["items"]])


def copy_items(metadata: Metadata) -> tuple[list[str], str]:
    return [], " ".join(metadata["items"])


COPYING = Family(
    "non_reasoning",
    draw_copying,
    ask_copy,
    copy_items,
    lambda metadata: "copy",
    draw_beyond=draw_copied_numbers,
)
