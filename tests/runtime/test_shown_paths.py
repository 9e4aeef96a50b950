"""Pages name files, not the folders of the machine that they were made on."""

import pytest

from avsi_jax.runtime import shown_paths


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("avsi-inpaint /srv/anna/a.wav -o /srv/out", "avsi-inpaint a.wav -o out"),
        ("--workdir=/srv/anna/runs/x --raw='~/videos'", "--workdir=x --raw='videos'"),
        (
            "audio/video at 1/2, ~20 s, https://host.org/a/b, clips/a.wav",
            "audio/video at 1/2, ~20 s, https://host.org/a/b, clips/a.wav",
        ),
    ],
)
def test_folders_are_left_out_of_texts(text, shown):
    assert shown_paths.without_folders(text) == shown


def test_absolute_paths_are_shown_from_the_folder_that_they_share():
    paths = ["/srv/anna/clips/a/x.wav", "/srv/anna/clips/b/x.wav", "c/y.wav"]
    assert list(shown_paths.shortened(paths).values()) == ["a/x.wav", "b/x.wav", "c/y.wav"]
