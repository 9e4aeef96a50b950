"""Pages name files, not the folders of the machine that they were made on."""

import pytest

from avsi_jax.runtime import shown_paths


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("avsi-inpaint /home/anna/a.wav -o /tmp/out", "avsi-inpaint a.wav -o out"),
        ("--workdir=/home/anna/runs/x --raw='~/videos'", "--workdir=x --raw='videos'"),
        (
            "audio/video at 1/2, ~20 s, https://host.org/a/b, clips/a.wav",
            "audio/video at 1/2, ~20 s, https://host.org/a/b, clips/a.wav",
        ),
    ],
)
def test_folders_are_left_out_of_texts(text, shown):
    assert shown_paths.without_folders(text) == shown


def test_absolute_paths_are_shown_from_the_folder_that_they_share():
    paths = ["/home/anna/clips/a/x.wav", "/home/anna/clips/b/x.wav", "c/y.wav"]
    assert list(shown_paths.shortened(paths).values()) == ["a/x.wav", "b/x.wav", "c/y.wav"]
