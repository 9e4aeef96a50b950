"""Gaps as text: the same rules and messages for the command and for the page."""

import pytest

from avsi_jax.app import session
from avsi_jax.inpainting import cli, gap_text


@pytest.mark.parametrize(
    ("text", "gaps"),
    [
        ("0.93-1.73", [(0.93, 1.73)]),
        (" 2.1 - 2.3 , .5–1 ", [(0.5, 1.0), (2.1, 2.3)]),
        ("1-2s;3-4s,", [(1, 2), (3, 4)]),
        ("0:00.93-0:01.73", [(0.93, 1.73)]),
        ("59:30.5-1:00:01\n1-2", [(1.0, 2.0), (3570.5, 3601.0)]),
        ("5e-05-1e-1", [(5e-5, 0.1)]),
        ("0.5-1,2-3", [(0.5, 1.0), (2.0, 3.0)]),
        (" auto ", "auto"),
        ("", []),
        (None, []),
    ],
)
def test_gaps_are_parsed(text, gaps):
    assert gap_text.parse_gaps(text) == gaps


@pytest.mark.parametrize(
    "text", ["1", "1:2", "a-b", "2-1", "1-1", "-1-2", "nan-2", "1e999-2", "1-2-3", "<b>-2", "1:2:3:4-5", "9" * 5000]
)
def test_wrong_gaps_are_an_error_of_one_line(text):
    with pytest.raises(ValueError, match="expected START-END") as error:
        gap_text.parse_gaps(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 160


@pytest.mark.parametrize("text", ["9" * 10**6, "1" + " " * 10**6 + "x", "1:" * 10**6, ".5" * 10**6, "1e" + "5" * 10**6])
def test_long_wrong_texts_are_refused_in_linear_time(text):
    """In quadratic time, as with a pattern that goes back, each would take days."""
    with pytest.raises(ValueError, match="expected START-END"):
        gap_text.parse_gaps(text)


@pytest.mark.parametrize("text", ["0,93-1,73", "0,93-1,73, 2,1-2,3", "1-2,5", "0,5-1"])
def test_decimal_commas_are_named(text):
    with pytest.raises(ValueError, match="decimal comma"):
        gap_text.parse_gaps(text)


def test_auto_together_with_a_gap_is_an_error():
    with pytest.raises(ValueError, match="auto"):
        gap_text.parse_gaps("auto, 1-2")


@pytest.mark.parametrize("text", ["0,93-1,73", "1", "2-1", "a-b"])
def test_the_command_and_the_page_report_a_wrong_gap_in_the_same_words(text, capsys):
    with pytest.raises(ValueError) as by_page:
        session.parse_gaps(text)
    with pytest.raises(SystemExit):
        cli.main(["clip.wav", f"--gap={text}"])
    assert str(by_page.value) in capsys.readouterr().err
