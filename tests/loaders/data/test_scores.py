import pytest

from regrad_loaders.data.scores import accuracy, chosen, exact_match, f1, words_found


def test_exact_match_ignores_case_articles_and_punctuation():
    assert exact_match("The Eiffel Tower.", ["eiffel tower"]) == 1
    assert exact_match("Eiffel", ["eiffel tower", "Eiffel"]) == 1
    assert exact_match("Eiffel", ["eiffel tower"]) == 0


def test_f1_counts_shared_tokens_and_takes_the_best_answer():
    assert f1("a cat named Tango", ["a cat named Tango"]) == 1
    assert f1("cat named Rocket", ["a cat named Tango"]) == pytest.approx(2 / 3)
    assert f1("dog", ["cat", "dog"]) == 1
    assert f1("", ["cat"]) == 0


def test_accuracy_reads_the_first_word():
    assert accuracy("Yes, it is.", ["yes"]) == 1
    assert accuracy("yesterday", ["yes"]) == 0
    assert accuracy("No.", ["yes"]) == 0


def test_of_a_sentence_the_share_of_the_answers_words_counts():
    assert words_found("Ida was born in Aalborg, in the north.", ["Aalborg"]) == 1
    assert words_found("Ida was born.", ["Ida Corvand", "Aalborg"]) == 0.5
    assert words_found("", ["Aalborg"]) == 0


def test_a_letter_means_its_choice():
    choices = ("Paris", "London")
    assert [chosen(text, choices) for text in ("B", "b)", "B) London", "London", "C", "A small town")] == [
        "London", "London", "London", "London", "C", "A small town",
    ]  # fmt: skip
    initials = ("B", "C. Darwin", "A. Huxley")
    assert [chosen(text, initials) for text in ("B", "A. Huxley", "C. Darwin", "C")] == [
        "B", "A. Huxley", "C. Darwin", "A. Huxley",
    ]  # fmt: skip
