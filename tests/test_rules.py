import pytest

from circuits.rules import NAMES, rule_task


@pytest.mark.parametrize(
    ("name", "source", "target"),
    [
        ("copy", "river", "river"),
        ("capitalize", "river", "River"),
        ("uppercase", "river", "RIVER"),
        ("first_letter", "river", "r"),
        ("capitalize_last_letter", "table", "E"),
        ("word_length", "river", "5"),
        ("next_item", "monday", "tuesday"),
        ("next_item", "7", "8"),
        ("prev_item", "two", "one"),
    ],
)
def test_rules_map_words_to_answers(name, source, target):
    assert dict(rule_task(name).pairs)[source] == target


@pytest.mark.parametrize(("name", "index"), [("choose_first", 0), ("choose_middle", 2), ("choose_last", 4)])
def test_choices_take_the_word_at_a_place(name, index):
    task = rule_task(name, 40, words=5)
    assert len(task) == 40 and task.name == f"{name}_of_5"
    for source, target in task.pairs:
        words = source.split(", ")
        assert len(set(words)) == 5 and words[index] == target


def test_alphabetical_choices():
    for source, target in rule_task("alphabetically_first", 20).pairs:
        assert target == sorted(source.split(", "))[0]


def test_rows_are_seeded_and_every_rule_makes_a_task():
    for name in NAMES:
        assert (
            rule_task(name, 10, seed=1).pairs == rule_task(name, 10, seed=1).pairs != rule_task(name, 10, seed=2).pairs
        )


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="unknown rule 'spell'; choose from copy"):
        rule_task("spell")
    with pytest.raises(ValueError, match="n=9999; rule 'copy' has"):
        rule_task("copy", 9999)
    with pytest.raises(ValueError, match="n=0"):
        rule_task("copy", 0)
