"""The Grid grammar against the corpus' own alignments, and the characters."""

import numpy as np
import pytest

from avsi_jax import text


def test_words_of_known_ids():
    # The two examples of the corpus' paper and README (Cooke et al. 2006): bbaf2n and swwp2s.
    assert text.words_of("bbaf2n") == ("bin", "blue", "at", "f", "two", "now")
    assert text.words_of("swwp2s") == ("set", "white", "with", "p", "two", "soon")
    assert text.words_of("lgazzp")[3:5] == ("z", "zero")


@pytest.mark.parametrize("name", ["", "bbaf2", "bbaf2nn", "bbaw2n", "bbaf0n", "xbaf2n", "unknown1a", "BBAF2N"])
def test_other_names_are_refused(name):
    assert not text.is_grid_id(name)
    with pytest.raises(ValueError, match="no Grid id"):
        text.words_of(name)


def test_grammar_counts():
    # Table I of Cooke et al. 2006: 4, 4, 4, 25 (no w), 10, 4.
    assert [len(slot) for slot in text.SLOTS] == [4, 4, 4, 25, 10, 4]
    assert "w" not in text.LETTERS


def test_ids_say_what_the_alignments_say(grid_dir):
    alignments = sorted((grid_dir / "alignments").glob("s*/*.align"))
    assert len(alignments) > 200
    for path in alignments:
        words = [line.split()[2] for line in path.read_text().splitlines() if line.split()[2:]]
        assert tuple(w for w in words if w not in ("sil", "sp")) == text.words_of(path.stem), path.name


def test_labels_go_there_and_back():
    sentence = " ".join(text.words_of("pwbj8s"))
    labels = text.encode(sentence)
    assert labels.dtype == np.int32 and labels.min() >= 1 and labels.max() <= 27
    assert text.decode(labels) == sentence
    assert text.decode(np.pad(labels, (0, text.MAX_LABELS - len(labels)))) == sentence
    assert text.encode("a z").tolist() == [2, 1, 27]


def test_every_sentence_fits_the_labels():
    longest = " ".join(max(slot.values(), key=len) for slot in text.SLOTS)
    assert len(longest) <= text.MAX_LABELS < text.NUM_LABELS and len(text.CHARACTERS) <= text.NUM_LABELS
    assert text.CHARACTERS[text.BLANK] == ""


def test_foreign_characters_are_named():
    with pytest.raises(ValueError, match="'!1'"):
        text.encode("bin 1!")
    with pytest.raises(ValueError, match="0 to 27"):
        text.decode([3, 28])
