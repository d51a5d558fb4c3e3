"""Where words begin in bash, and what of them it replaces."""

import pytest

from vmbus.cli.bash_completion import split_line


@pytest.mark.parametrize(
    ("text", "words", "word", "kept", "quote"),
    [
        ("", [], "", 0, ""),
        ("vmbus se", ["vmbus"], "se", 0, ""),
        ("vmbus serve ", ["vmbus", "serve"], "", 0, ""),
        ("v  --disk raw:d", ["v", "--disk"], "raw:d", 4, ""),
        ("v a=b:c", ["v"], "a=b:c", 4, ""),
        ("v 'raw:[ro]a b", ["v"], "raw:[ro]a b", 0, "'"),
        ("v raw:'a b", ["v"], "raw:a b", 4, "'"),
        ("v 'raw:'a", ["v"], "raw:a", 0, ""),
        ("v x:'a b' ", ["v", "x:a b"], "", 0, ""),
        ('v "a\\"b\\c', ["v"], 'a"b\\c', 0, '"'),
        ("v a\\ b\\:c", ["v"], "a b:c", 0, ""),
        ("v '' a", ["v", ""], "a", 0, ""),
        ("v a\\", ["v"], "a", 0, ""),
        ('v "a\\', ["v"], "a", 0, '"'),
    ],
)
def test_a_line_is_cut_as_bash_cuts_it(text, words, word, kept, quote):
    assert split_line(text, " =:") == (words, word, kept, quote)
