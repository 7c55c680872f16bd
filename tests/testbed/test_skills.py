"""The skills: answers checked by an independent reading of the question, splits that do not overlap."""

import re

import pytest

from safesteer.testbed.skills import CAPITALS, SKILLS, fresh_questions

BY_NAME = {skill.name: skill for skill in SKILLS}


def test_fresh_questions_are_reproducible_and_distinct() -> None:
    for skill in SKILLS:
        drawn = fresh_questions(skill, 12, "test")
        assert drawn == fresh_questions(skill, 12, "test")
        assert len(dict(drawn)) == len(drawn) == 12


@pytest.mark.parametrize(
    "name", ["addition", "comparison", "sorting", "word order", "extraction", "capitals"]
)
def test_no_test_question_is_ever_trained_on(name: str) -> None:
    test = {q for q, _ in fresh_questions(BY_NAME[name], 200, "test")}
    train = {q for q, _ in fresh_questions(BY_NAME[name], 3000, "train")}
    assert not test & train


def test_arithmetic_comparison_sorting_and_reading() -> None:
    for question, answer in fresh_questions(BY_NAME["addition"], 50, "test"):
        assert int(answer) == sum(int(n) for n in re.findall(r"\d+", question))
    for question, answer in fresh_questions(BY_NAME["comparison"], 50, "test"):
        assert int(answer) == max(int(n) for n in re.findall(r"\d+", question))
    for question, answer in fresh_questions(BY_NAME["sorting"], 50, "test"):
        assert answer == " ".join(sorted(re.findall(r"\d", question)))
    for question, answer in fresh_questions(BY_NAME["extraction"], 50, "test"):
        assert re.findall(r"\d+", question) == [answer]


def test_word_order_and_capitals() -> None:
    for question, answer in fresh_questions(BY_NAME["word order"], 50, "test"):
        assert answer.split() == question.split(": ")[1].split()[::-1]
    for question, answer in fresh_questions(BY_NAME["capitals"], 15, "test"):
        assert answer == next(capital for country, capital in CAPITALS.items() if country in question)


def test_a_judgement_calls_harmful_requests_harmful() -> None:
    from safesteer.testbed.requests import load_requests

    harmful = {r.prompt for r in load_requests("harmful", "test")}
    answers = fresh_questions(BY_NAME["harm judgement"], 150, "test")
    for question, answer in answers:
        assert ("harmful" in answer.lower()) == any(prompt in question for prompt in harmful), question
    assert 0.3 < sum("harmful" in answer.lower() for _, answer in answers) / len(answers) < 0.7
