"""Frames are shown as players do. Oracles: a quarter turn by hand, and OpenCV's resampling of the same picture."""

from fractions import Fraction

import numpy as np
import pytest

from avsi_jax.media import clip_io, clip_source, frame_geometry

WIDTH, HEIGHT = 96, 64


def picture():
    """(H, W, 3): a bright top left quarter of the frame, dark elsewhere."""
    rgb = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
    rgb[: HEIGHT // 2, : WIDTH // 2] = 220
    return rgb


class Frame:
    """In place of av.VideoFrame, with a display matrix of 16.16 numbers whose upper left part is (a, b), (c, d)."""

    width, height = WIDTH, HEIGHT

    def __init__(self, a=1.0, b=0.0, c=0.0, d=1.0):
        matrix = np.array([a, b, 0, c, d, 0, 0, 0, 2**14]) * 2**16
        self.side_data = {"DISPLAYMATRIX": matrix.astype(np.int32).tobytes()}

    def to_ndarray(self, format):
        return picture()


def corner(rgb):
    """Which quarter is bright: (row, column), 0 or 1 each."""
    height, width = rgb.shape[:2]
    levels = [[rgb[y * height // 4, x * width // 4].mean() for x in (1, 3)] for y in (1, 3)]
    return np.unravel_index(np.argmax(levels), (2, 2))


@pytest.mark.parametrize(
    "matrix, size, bright",
    [
        ((1, 0, 0, 1), (WIDTH, HEIGHT), (0, 0)),
        ((0, 1, -1, 0), (HEIGHT, WIDTH), (0, 1)),  # a quarter turn clockwise, as an upright phone writes it
        ((-1, 0, 0, -1), (WIDTH, HEIGHT), (1, 1)),
        ((0, -1, 1, 0), (HEIGHT, WIDTH), (1, 0)),
        ((-1, 0, 0, 1), (WIDTH, HEIGHT), (0, 1)),  # mirrored, as a front camera
        ((1, 0, 0, -1), (WIDTH, HEIGHT), (1, 0)),
        ((0, 1, 1, 0), (HEIGHT, WIDTH), (0, 0)),
        ((2, 0, 0, 2), (WIDTH, HEIGHT), (0, 0)),  # scales are not applied
        ((0, 0, 0, 0), (WIDTH, HEIGHT), (0, 0)),  # no valid matrix
    ],
)
def test_quarter_turns_and_mirror_images_move_whole_pixels(matrix, size, bright):
    rgb = frame_geometry.shown_rgb(Frame(*matrix), None)
    assert frame_geometry.shown_size(Frame(*matrix), None) == size == rgb.shape[1::-1]
    assert corner(rgb) == bright and set(np.unique(rgb)) == {40, 220}


def test_another_angle_turns_the_frame_into_a_larger_one():
    angle = np.deg2rad(30)
    a, b = np.cos(angle), np.sin(angle)
    frame = Frame(a, b, -b, a)
    rgb = frame_geometry.shown_rgb(frame, None)
    size = int(np.ceil(WIDTH * a + HEIGHT * b)), int(np.ceil(WIDTH * b + HEIGHT * a))
    assert frame_geometry.shown_size(frame, None) == size == rgb.shape[1::-1]
    top_left, top_right = np.array([HEIGHT * b, 0]), np.array([HEIGHT * b + WIDTH * a, WIDTH * b])
    inside = top_left + 0.25 * (top_right - top_left) + [-0.1 * HEIGHT * b, 0.1 * HEIGHT * a]  # clockwise on the screen
    assert rgb[int(inside[1]), int(inside[0])].mean() > 200
    dark = top_left + 0.75 * (top_right - top_left) + [-0.1 * HEIGHT * b, 0.1 * HEIGHT * a]
    assert abs(rgb[int(dark[1]), int(dark[0])].mean() - 40) < 5 and not rgb[0, 0].any()


def write(path, *, turn=0, aspect=None):
    """A video of five frames of the picture."""
    import av

    with av.open(str(path), "w") as out:
        codec, stream_format = {".mov": ("png", "rgb24"), ".mkv": ("ffv1", "bgr0"), ".mp4": ("mpeg4", "yuv420p")}[path.suffix]
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, stream_format
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if turn:
            stream.set_display_rotation(turn)
        for k in range(5):
            frame = av.VideoFrame.from_ndarray(picture(), format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def shown(path):
    """The first frame; read_clip and a Source agree on all."""
    video = clip_io.read_clip(path).video
    with clip_source.open_source(path) as source:
        assert source.size == video.rgb.shape[2:0:-1]
        np.testing.assert_array_equal(source.video(0, 9).rgb, video.rgb)
    return video.rgb[0]


@pytest.mark.parametrize("suffix", [".mov", ".mkv"])
def test_the_display_matrix_of_a_file_is_applied(tmp_path, suffix):
    rgb = shown(write(tmp_path / f"a{suffix}", turn=-90))
    assert rgb.shape == (WIDTH, HEIGHT, 3)
    assert corner(rgb) in ((0, 1), (1, 0))
    opposite = shown(write(tmp_path / f"b{suffix}", turn=90))
    np.testing.assert_array_equal(opposite, rgb[::-1, ::-1])


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    import cv2

    rgb = shown(write(tmp_path / "a.mp4", aspect=Fraction(4, 3)))
    expected = cv2.resize(picture(), (128, HEIGHT))
    assert rgb.shape == expected.shape and np.abs(rgb.astype(int) - expected).mean() < 6  # the codec is lossy
    assert shown(write(tmp_path / "b.mp4", aspect=Fraction(1, 1))).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("aspect", [Fraction(1, 100), Fraction(1000, 1)])
def test_an_absurd_pixel_aspect_is_ignored(aspect):
    assert frame_geometry.shown_size(Frame(), aspect) == (WIDTH, HEIGHT)
