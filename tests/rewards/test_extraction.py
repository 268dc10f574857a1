"""Finding the answer in a completion."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.rewards.extraction import extract_answer, find_boxes

BOXES = [
    (r"so it is $\boxed{5}$.", "5"),
    (r"\boxed{\frac{1}{2}} as claimed", r"\frac{1}{2}"),
    (r"first \boxed{1}. Then \boxed{2}.", "2"),
    (r"\boxed{x = \fbox{5}}", "x =  {5}"),
    (r"\boxed{73 \boxed{72}}", "73  {72}"),
    (r"\boxed{73 #### 72}", "73   72"),
    (r"so $\boxed{72}$, and the answer is $\boxed{72}$", "72"),
    (r"\boxed{}: \boxed{72}", "72"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{[0, 1)}", "[0, 1)"),
    (r"\fbox{9}", "9"),
    (r"The solutions are \boxed{3}, \boxed{5}, \boxed{7}", "3, 5, 7"),
    (r"$x=\boxed{1}$ or $x=\boxed{-2}$", "x=1, x=-2"),
    (r"$\boxed 7$.", "7"),
    (r"\boxed5", "5"),
    (r"an unclosed \boxed{1 and then \boxed{2}", "2"),
    (r"The answer is 3, \boxed{4}", "4"),
    (r"#### 3" + "\n" + r"\boxed{4}", "4"),
]
PHRASES = [
    ("She sells 9 * 2 = <<9*2=18>>18.\n#### 18", "18"),
    ("#### 1,234\n", "1,234"),
    ("Mark it with \\boxed . So 2+3=5.\nThe answer is 5.", "5"),
    ("#### -5", "-5"),
    ("#### Step 3: add them\nThe answer is 7.", "7"),
    ("The answer is 4", "4"),
    ("The answer is 3.5.", "3.5"),
    ("The answer is 3. The answer is 5.", "5"),
    ("The final answer is $\\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}"),
    ("Final Answer: The final answer is $28 \\%$. I hope it is correct.", r"28 \%"),
    ("**Answer:** 42", "42"),
    ("The answer is **42**.", "42"),
    ("Answer:\n\n5\n", "5"),
    ("The answer is:\n\\[\n 9 \n\\]", "9"),
    ("The answer to the question is 12, because 3*4 = 12.", "12"),
    ("The answer is 1, 2 and 3.", "1, 2 and 3"),
    ("The answer is (A).", "(A)"),
    ("The answer is $5", "$5"),
    ("The answer is 2/3 <|im_end|>", "2/3"),
]
REMARKS = [
    ("The answer is therefore 72, in total, so the farmer earns that much.", "72"),
    ("The answer is exactly 72 clips, altogether.", "72 clips"),
    ("The answer is 72 (see above).", "72"),
    ("The answer is 72!", "72"),
    ("The answer is approximately 72.", "72"),
    ('The answer is "72".', "72"),
    ("The answer is $5!$", "5!"),
    ("The answer is (sin x) (cos x).", "(sin x) (cos x)"),
    ("The answer is 2 (mod seven).", "2 (mod seven)"),
    ("The answer is 72, 73.", "72, 73"),
    ("The answer is not 72 but 73.", "not 72 but 73"),
    ("The answer is 72, or perhaps more.", "72, or perhaps more"),
    ("<answer>5</answer>", "5"),
    ("<answer>\nAdding up, the answer is 5.\n</answer>", "5"),
    ("<answer>5", "5"),
]
JAPANESE = [
    ("したがって、答えは12です。", "12"),
    ("答え：１２", "12"),
    ("【答え】 42", "42"),
    ("解答 15", "15"),
    ("**答え**: 7", "7"),
    ("最終的な答えは 3/4 である。", "3/4"),
    ("答えは x=3 となります。", "x=3"),
    ("答えは、5個です。", "5個"),
    ("したがって、答えは１，２３４円となります。", "1,234円"),
    ("答えは２万円です。", "2万円"),
    ("答えは－３．５です", "-3.5"),
    ("正解：\\boxed{１２}個", "12"),
    ("答案是12。", "12"),
    ("答案：12", "12"),
    ("答案为 12。", "12"),
    ("正解は $\\frac{1}{2}$", r"\frac{1}{2}"),
]
NONE = [
    "",
    "I think 5, perhaps 6",
    r"\boxed{}",
    r"\boxed{12",
    r"\boxed{3}, or rather \boxed{12",
    r"\framebox{12",
    "The answer is",
    "答えは",
]


@pytest.mark.parametrize(("text", "answer"), BOXES + PHRASES + REMARKS + JAPANESE)
def test_the_answer_is_found(text: str, answer: str):
    assert extract_answer(text) == answer


@pytest.mark.parametrize("text", NONE)
def test_no_answer_is_none(text: str):
    assert extract_answer(text) is None


def test_reasoning_does_not_count():
    assert extract_answer(r"<think>\boxed{4}</think> The answer is 5") == "5"
    assert extract_answer(r"<think>\boxed{4}</think> I am not sure") is None
    assert extract_answer(r"<think>\boxed{4}") == "4"
    for begin, end in [
        ("<thinking>", "</thinking>"),
        ("[THINK]", "[/THINK]"),
        ("◁think▷", "◁/think▷"),
        (
            "<|channel|>analysis<|message|>",
            "<|end|><|start|>assistant<|channel|>final<|message|>",
        ),
    ]:
        assert extract_answer(begin + r"\boxed{4}" + end + " The answer is 5") == "5"
    assert (
        extract_answer(r"\boxed{4} %% The answer is 5", reasoning_ends=["%%", ""])
        == "5"
    )
    assert (
        extract_answer(r"<think>\boxed{4}</think> The answer is 5", reasoning_ends=[])
        == "4"
    )


def test_lenient_takes_the_last_number_only_as_a_last_resort():
    assert extract_answer("it may be 5 or -1,234.5 then", lenient=True) == "-1,234.5"
    assert extract_answer("about 2/3", lenient=True) == "2/3"
    assert extract_answer("合計は1万2,000円です。", lenient=True) == "1万2,000"
    assert extract_answer(r"\boxed{5} and 6", lenient=True) == "5"
    assert extract_answer(r"\boxed{12", lenient=True) is None
    assert extract_answer(r"\framebox{12", lenient=True) is None
    assert extract_answer("no idea", lenient=True) is None
    assert extract_answer("The answer is below.\n\n72 clips", lenient=True) == "72"
    assert extract_answer("3 + 4: the answer is (A).", lenient=True) == "(A)"


@settings(deadline=None, max_examples=100)
@given(
    st.recursive(
        st.text("ab1 ", max_size=3),
        lambda inner: st.builds("{}{{{}}}{}".format, inner, inner, inner),
    )
)
def test_any_balanced_content_comes_back(content: str):
    boxes, cut = find_boxes(f"before {{ \\boxed{{{content}}} after }}")
    assert [box.content for box in boxes] == [content.strip()] and not cut
    assert find_boxes(f"\\boxed{{{content}") == ([], True)


@settings(deadline=None, max_examples=200)
@given(st.text(r"\boxedf{}$#答えは: 12is" + "\n", max_size=60), st.booleans())
def test_any_text_gives_a_stripped_answer_or_none(text: str, lenient: bool):
    answer = extract_answer(text, lenient=lenient)
    assert answer is None or answer == answer.strip() != ""


@pytest.mark.parametrize(
    "unit",
    [
        r"\boxed{",
        r"\boxed",
        r"\boxed ",
        "answer is ",
        "答え ",
        "$ ",
        "{",
        " ",
        "#### ",
        "1,",
    ],
)
def test_a_million_characters_do_no_harm(unit: str):
    text = "The answer is " + unit * (1_000_000 // len(unit))
    answer = extract_answer(text, lenient=True)
    assert answer is None or answer in text
