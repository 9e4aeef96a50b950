"""Renders video of a synthetic face from mouth movements by warping one photo.

The photo is the NASA portrait in the scikit-image wheel (extra `synth`; public domain, see data/README.txt there). Six mouth
parameters (visemes.py) move the lips: every pixel column around the mouth is stretched between nose, four lip curves, chin and
neck. Speakers differ in proportions, skin tone, background, and how far they open the mouth.

Points are (x, y). Photo pixels: in the full photo. Plate pixels: in the speaker's still image ("plate"), PLATE_SCALE per photo
pixel. Images are processed by OpenCV as uint8 only: its float32 and cubic maps give other bytes with and without AVX2.
"""

from __future__ import annotations

import dataclasses
import functools

import cv2
import numpy as np
from scipy import ndimage

from tfds_grid.visemes import ROUND, TONGUE

WIDTH, HEIGHT = 360, 288
LOOK_SEEDS = (6, 35, 37, 3, 27, 2)  # of 25 seeds tried, six dissimilar faces whose lips face/landmarks.py tracks well

PHOTO_LEFT, PHOTO_RIGHT, PHOTO_BOTTOM = 80, 380, 230  # used part of the photo's 512 x 512 pixels
PLATE_X, PLATE_Y, PLATE_WIDTH, PLATE_HEIGHT = 100, 2, 250, 202  # part of the photo shown in the plate, photo pixels
PLATE_SCALE = 2
# Measured once on the photo with a face mesh; photo pixels. The photo shows a smile with teeth.
# fmt: off
LIP_CURVES = np.array([  # from left to right corner: upper lip outside and inside, lower lip inside and outside
    [[202.5, 139.4], [204.7, 139.3], [207.7, 139.4], [211.6, 139.5], [217.4, 139.6], [223.7, 140.8],
     [230.2, 139.9], [236.2, 140.2], [240.2, 140.4], [243.3, 140.6], [245.5, 140.9]],
    [[204.0, 140.1], [206.6, 140.5], [209.7, 141.1], [213.3, 141.9], [217.9, 142.9], [223.7, 143.7],
     [229.6, 143.3], [234.4, 142.6], [238.2, 142.0], [241.3, 141.7], [244.0, 141.4]],
    [[204.0, 140.1], [207.2, 143.5], [209.8, 145.9], [213.4, 148.1], [217.9, 149.8], [223.4, 150.6],
     [229.0, 150.2], [233.7, 148.8], [237.5, 146.8], [240.3, 144.7], [244.0, 141.4]],
    [[202.5, 139.4], [204.8, 143.8], [207.6, 148.1], [211.7, 152.1], [216.9, 154.7], [223.2, 155.8],
     [229.7, 155.3], [235.2, 153.0], [239.6, 149.3], [242.9, 145.2], [245.5, 140.9]]])
# fmt: on
FACE_X, FACE_Y, NOSE_Y, CHIN_Y, NECK_Y = 224.0, 118.0, 131.5, 177.0, 197.0
DIMPLES = ((198.0, 139.0), (250.0, 140.5))
EYES = ((203.8, 101.5), (246.9, 103.8))
EYE_POINTS = np.array([  # left corner, right corner, upper lid, lower lid, brow
    [[193.3, 101.5], [214.3, 101.5], [203.8, 98.6], [203.8, 105.2], [203.8, 90.0]],
    [[236.4, 103.8], [257.4, 103.8], [246.9, 100.6], [246.9, 107.2], [246.9, 92.0]],
])  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- looks


@functools.cache
def _photo() -> tuple[np.ndarray, np.ndarray]:
    """The used part of the photo, RGB (230, 300, 3) uint8, with a softened smile; and its person mask (230, 300) uint8."""
    import skimage.data

    image = skimage.data.astronaut()[:PHOTO_BOTTOM, PHOTO_LEFT:PHOTO_RIGHT]
    person_mask = _person_mask(image)
    y, x = np.mgrid[:PHOTO_BOTTOM, PHOTO_LEFT:PHOTO_RIGHT]
    for dimple_x, dimple_y in DIMPLES:  # blurred: they would remain when the lips are rounded
        weight = 0.8 * np.exp(-(((x - dimple_x) / 4) ** 2 + ((y - dimple_y) / 7) ** 2))[..., None]
        image = np.round(image + weight * (cv2.GaussianBlur(image, (0, 0), 4.0).astype(np.float64) - image)).astype(np.uint8)
    return image, person_mask


def _person_mask(image: np.ndarray) -> np.ndarray:
    """255 for the person, 0 for the background: GrabCut from a rough ellipse, largest component, interior filled."""
    y, x = np.mgrid[:PHOTO_BOTTOM, PHOTO_LEFT:PHOTO_RIGHT]
    ellipse = lambda cx, cy, rx, ry: ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
    mask = np.full(image.shape[:2], cv2.GC_PR_BGD, np.uint8)
    mask[ellipse(224, 100, 62, 88) | (y > 168)] = cv2.GC_PR_FGD
    mask[ellipse(224, 110, 44, 66)] = cv2.GC_FGD
    mask[((x < 120) | (x >= 325)) & (y < 150)] = cv2.GC_BGD
    cv2.setRNGSeed(1)
    bgr = np.ascontiguousarray(image[..., ::-1])
    cv2.grabCut(bgr, mask, None, np.zeros((1, 65)), np.zeros((1, 65)), 4, cv2.GC_INIT_WITH_MASK)
    person = _largest_piece(np.isin(mask, (cv2.GC_FGD, cv2.GC_PR_FGD)))
    person = ~_largest_piece(~person)
    return cv2.GaussianBlur(cv2.erode(person * np.uint8(255), np.ones((3, 3))), (0, 0), 1.0)


def _largest_piece(mask: np.ndarray) -> np.ndarray:
    _, labels, pieces, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    return labels == 1 + pieces[1:, cv2.CC_STAT_AREA].argmax()


@dataclasses.dataclass(frozen=True)
class _Proportions:
    """Relative differences between a face and the photo's, each about -0.1 to 0.1."""

    width: float
    taper: float
    length: float
    eyes: float
    nose: float
    jaw: float

    def to_photo(self, x, y):
        """Points of this face -> points of the photo, in photo pixels; far from the face they are unchanged."""
        bump = lambda dx, dy: np.exp(-(dx**2) - dy**2)
        near = np.exp(-(((x - FACE_X) / 62) ** 4 + ((y - 125) / 85) ** 4))
        photo_x = x - (x - FACE_X) * near * (self.width + self.taper * (y - 125) / 55)
        photo_y = y - (y - 112) * near * self.length
        photo_x = photo_x - (x - FACE_X) * self.nose * bump((x - FACE_X) / 12, (y - 122) / 16)
        for eye_x, eye_y in EYES:
            near_eye = self.eyes * bump((x - eye_x) / 14, (y - eye_y) / 10)
            photo_x, photo_y = photo_x - (x - eye_x) * near_eye, photo_y - (y - eye_y) * near_eye
        photo_x = photo_x - (x - FACE_X) * self.jaw * np.exp(-(((y - 172) / 16) ** 2) - ((x - FACE_X) / 70) ** 4)
        return photo_x, photo_y

    def to_plate(self, points: np.ndarray) -> np.ndarray:
        """Points (..., 2) of the photo -> plate pixels of this face (to_photo inverted by iteration)."""
        face_points = points.copy()
        for _ in range(20):
            face_points += points - np.stack(self.to_photo(face_points[..., 0], face_points[..., 1]), -1)
        return (face_points - [PLATE_X, PLATE_Y]) * PLATE_SCALE


def _toned(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image with random lighting and skin tone."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(np.float64)
    lab[..., 0] = 255 * (lab[..., 0] / 255) ** rng.uniform(0.8, 1.45)
    for channel, low, high in ((1, -3, 3), (2, -4, 6)):
        lab[..., channel] += (lab[..., channel] - 128) * rng.uniform(-0.3, 0.3) + rng.uniform(low, high)
    return cv2.cvtColor(np.clip(lab, 0, 255).astype(np.uint8), cv2.COLOR_LAB2RGB)


def _paint_plate(proportions: _Proportions, rng: np.random.Generator) -> np.ndarray:
    """The speaker's still image (404, 500, 3) uint8, in front of a plain background."""
    image, person_mask = _photo()
    size = PLATE_WIDTH * PLATE_SCALE, PLATE_HEIGHT * PLATE_SCALE
    x, y = np.meshgrid(np.arange(size[0]) / PLATE_SCALE + PLATE_X, np.arange(size[1]) / PLATE_SCALE + PLATE_Y)
    photo_x, photo_y = proportions.to_photo(x, y)
    four = lambda pixel: ((pixel + 0.5) * 4 - 0.5).astype(np.float32)  # coordinates in an image four times as large
    enlarge = lambda photo: cv2.resize(photo, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
    maps = four(photo_x - PHOTO_LEFT), four(photo_y)
    take = lambda photo: cv2.remap(enlarge(photo), *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    person, alpha = take(_toned(image, rng)), take(person_mask)[..., None] / 255
    hsv = np.uint8([[[rng.integers(95, 125), rng.integers(20, 90), rng.integers(110, 190)]]])
    shading = 1.05 - 0.25 * (y - PLATE_Y) / PLATE_HEIGHT + 0.08 * np.sin(x / 40 + rng.uniform(-3, 3))
    background = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0] * shading[..., None]
    return np.clip(person * alpha + background * (1 - alpha), 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------------ face


def _falling(x, start, end):
    """1 below start, 0 above end, smooth in between."""
    t = np.clip((end - x) / (end - start), 0, 1)
    return t * t * (3 - 2 * t)


@dataclasses.dataclass(frozen=True)
class _Stretch:
    """A mouth's shape by columns (X of them): current and wanted rows of seven levels, from nose to neck."""

    columns: np.ndarray  # (X,) source column in the plate
    source: np.ndarray  # (7, X) rows: nose, upper lip outside and inside, lower lip inside and outside, chin, neck
    target: np.ndarray  # (7, X)
    half_width: float  # of the mouth; plate pixels, like all lengths here
    lip_distance: float  # largest distance between the lips
    across: np.ndarray  # (X,) -1 to 1 from corner to corner


class Head:
    """A synthetic speaker's face; `index` 0 to 5 selects its appearance."""

    def __init__(self, index: int):
        rng = np.random.default_rng([77, LOOK_SEEDS[index]])
        self._proportions = _Proportions(*(rng.uniform(-a, a) for a in (0.09, 0.10, 0.07, 0.10, 0.12, 0.10)))
        self._lip_width, self._lip_height, self.gain = (m + rng.uniform(-a, a) for m, a in ((1, 0.07), (0.93, 0.07), (1, 0.12)))
        self._plate = _paint_plate(self._proportions, rng)
        self._measure()

    def _measure(self) -> None:
        """Computes what is the same in all frames, in plate pixels."""
        self._curves = self._proportions.to_plate(LIP_CURVES)
        levels = self._proportions.to_plate(np.array([[FACE_X, NOSE_Y], [FACE_X, CHIN_Y], [FACE_X, NECK_Y]]))
        self._nose, self._chin, self._neck = levels[:, 1]
        left, right = self._curves[1, 0], self._curves[1, -1]
        (self._x, corner_y), self._half = (left + right) / 2, (right[0] - left[0]) / 2
        upper, lower_inside, lower = (self._curves[i, 5, 1] for i in (0, 2, 3))
        self._seam = corner_y + 0.42 * (lower_inside - corner_y) + 1  # where closed lips meet
        reach = 2.35 * self._half
        self._xs = np.arange(int(self._x - reach), int(self._x + reach), dtype=np.float32)
        self._ys = np.arange(int(self._nose - 2), int(self._neck + 2), dtype=np.float32)[:, None]
        aside = np.abs(self._xs - self._x) / self._half
        self._lips_follow, self._jaw_follows = _falling(aside, 0.95, 2.3), _falling(aside, 0.3, 2.3)
        below_nose = (self._ys - self._nose) / (0.5 * (upper - self._nose))
        above_chin = (self._chin - self._ys) / (0.75 * (self._chin - lower))
        self._sideways = ((1 - _falling(below_nose, 0, 1)) * (1 - _falling(above_chin, 0, 1))).astype(np.float32)
        self._eye_points = self._proportions.to_plate(EYE_POINTS)

    def image(self, mouth: np.ndarray, blink: float = 0.0) -> np.ndarray:
        """The plate (404, 500, 3) uint8 with the given mouth (6,); `blink`: how far the eyelids are closed, 0 to 1."""
        stretch = self._stretch(mouth)
        box = self._warp(stretch)
        self._paint_inside(box, stretch, mouth)
        plate = self._plate.copy()
        x, y = int(self._xs[0]), int(self._ys[0, 0])
        plate[y : y + box.shape[0], x : x + box.shape[1]] = box
        if blink:
            self._close_eyes(plate, blink)
        return plate

    def _stretch(self, mouth: np.ndarray) -> _Stretch:
        """The lip curves for six mouth parameters."""
        opening, spread, rounding, press, tuck, _ = mouth
        k, xs = PLATE_SCALE, self._xs
        lip_distance = 12.5 * k * opening
        half = self._half * 0.80 * self._lip_width * (1 + 0.20 * spread - 0.40 * rounding - 0.05 * opening)
        upper = 4.0 * k * self._lip_height * (1 + 0.22 * rounding) * (1 - 0.30 * press)
        lower = 5.4 * k * self._lip_height * (1 + 0.22 * rounding) * (1 - 0.28 * press) * (1 - 0.55 * tuck)
        across = np.clip((xs - self._x) / half, -1, 1)
        arch = 1 - across**2
        seam = self._seam - 0.9 * k * across**2 * (1 + 0.8 * spread)
        inside = arch ** (0.80 - 0.25 * rounding)
        upper_inside = seam - (0.20 * lip_distance + 1.1 * k * tuck) * inside
        lower_inside = seam + (0.80 * lip_distance - 0.4 * k * tuck) * inside
        upper_outside = upper_inside - upper * arch**0.62 * (1 - 0.16 * np.exp(-((across / 0.13) ** 2)))
        lower_outside = lower_inside + lower * arch**0.55
        columns = self._columns(half)
        level = lambda y: np.full_like(xs, y)
        lips = [np.interp(columns, curve[:, 0], curve[:, 1]) for curve in self._curves]
        source = np.stack([level(self._nose), *lips, level(self._chin), level(self._neck)])
        wanted = np.stack([upper_outside, upper_inside, lower_inside, lower_outside])
        target = source.copy()
        target[1:5] += (wanted - source[1:5]) * self._lips_follow
        target[5] += 0.62 * lip_distance * self._jaw_follows
        for i in range(1, 7):
            target[i] = np.maximum(target[i], target[i - 1] + (0 if i == 3 else 0.05))
        return _Stretch(columns, source.astype(np.float32), target.astype(np.float32), half, lip_distance, across)

    def _columns(self, half: float) -> np.ndarray:
        """Source column of each column: the mouth gets the half width `half`, and its surroundings are compressed."""
        aside, reach = np.abs(self._xs - self._x), 2.3 * self._half
        outside = self._half + (aside - half) * (reach - self._half) / (reach - half)
        taken = np.where(aside < half, aside * self._half / half, outside)
        return np.where(aside < reach, self._x + np.sign(self._xs - self._x) * taken, self._xs)

    def _warp(self, stretch: _Stretch) -> np.ndarray:
        """The box around the mouth, RGB uint8: piecewise linear by rows between the seven levels."""
        source, target, ys = stretch.source, stretch.target, self._ys
        rows = source[0] + np.minimum(ys - target[0], 0) + np.maximum(ys - target[6], 0)
        for i in range(6):
            length = target[i + 1] - target[i]
            if i == 2:  # between the lips: cut here, painted over later
                rows += np.where(ys > (target[2] + target[3]) / 2, source[3] - source[2], 0)
            else:
                rows += np.clip(ys - target[i], 0, length) * ((source[i + 1] - source[i]) / length)
        columns = self._xs + (stretch.columns - self._xs).astype(np.float32) * self._sideways
        return cv2.remap(self._plate, columns, rows, cv2.INTER_LINEAR)

    def _paint_inside(self, box: np.ndarray, stretch: _Stretch, mouth: np.ndarray) -> None:
        """Draws the visible inside of the mouth into the box: teeth from the photo, a dark cavity, tongue; a seam if closed."""
        k, ending = PLATE_SCALE, stretch.half_width + 2
        left, right = np.searchsorted(self._xs, [self._x - ending, self._x + ending])
        upper, lower = stretch.target[2:4, left:right]
        top, bottom = int(max(upper.min() - 3 - self._ys[0, 0], 0)), int(lower.max() + 4 - self._ys[0, 0])
        ys, aside = self._ys[top:bottom], np.abs(stretch.across[left:right])
        inside = self._cavity(ys, upper, lower, aside, mouth[TONGUE], stretch.lip_distance)
        edge = (
            self._seam + k * (1.2 - 1.6 * aside**2) + 0.12 * stretch.lip_distance
        )  # of the upper teeth, which do not move with the jaw
        teeth = self._teeth(ys, ys - edge, self._xs[left:right], stretch.source[2:4, left:right])
        teeth *= (0.62 + 0.30 * np.clip((ys - upper) / (3 * k), 0, 1))[..., None]
        showing = np.clip((edge - ys) / k + 0.5, 0, 1) * np.clip(1.5 - 1.35 * aside, 0, 1) * (1 - 0.5 * mouth[ROUND])
        inside += showing[..., None] * (teeth - inside)
        inside *= np.clip(0.45 + (ys - upper) / (2.2 * k), 0.45, 1)[..., None]  # the lip's shadow
        patch = box[top:bottom, left:right].astype(np.float32)
        shut = np.exp(-(((ys - (upper + lower) / 2) / (0.55 * k)) ** 2)) * np.clip(1 - (lower - upper) / 3, 0, 1)
        patch += (0.55 * shut * np.clip((1 - aside) * 6, 0, 1))[..., None] * (np.float32([70, 30, 32]) - patch)
        opened = np.clip((ys - upper) / 1.2 + 0.3, 0, 1) * np.clip((lower - ys) / 1.2 + 0.3, 0, 1)
        patch += (opened * np.clip((lower - upper) / 1.5, 0, 1))[..., None] * (inside - patch)
        box[top:bottom, left:right] = np.clip(patch, 0, 255)

    @staticmethod
    def _cavity(ys, upper, lower, aside, tongue: float, lip_distance: float) -> np.ndarray:
        """Colours of the dark cavity with the tongue at its bottom."""
        tip = lower - (2.0 + 4.5 * tongue) * PLATE_SCALE * (1 - aside**2)
        shown = np.clip((ys - tip) / (1.6 * PLATE_SCALE), 0, 1) * (0.35 + 0.45 * tongue) * (lip_distance > 1)
        dark = np.float32([52, 22, 22])
        return dark + shown[..., None].astype(np.float32) * (np.float32([165, 82, 80]) - dark)

    def _teeth(self, ys, below_edge, xs, lips) -> np.ndarray:
        """The photo's teeth, aligned at their lower edge."""
        k, (upper, lower) = PLATE_SCALE, lips
        rows = np.clip(lower - 1.2 * k + below_edge, upper + 0.8 * k, lower - 0.9 * k).astype(np.float32)
        columns = np.broadcast_to(self._x + (xs - self._x) * 0.95, rows.shape).astype(np.float32)
        return cv2.remap(self._plate, columns, rows, cv2.INTER_LINEAR).astype(np.float32)

    def _close_eyes(self, plate: np.ndarray, blink: float) -> None:
        """Stretches the skin between brow and eyelid over the eye."""
        for (left, _), (right, _), (_, lid), (_, low), (x, brow) in self._eye_points:
            half = (right - left) / 2
            box = slice(int(brow - 2), int(low + 4)), slice(int(x - 1.5 * half), int(x + 1.5 * half))
            xs, ys = np.arange(box[1].start, box[1].stop), np.arange(box[0].start, box[0].stop)[:, None]
            lowered = lid + blink * (low - lid) * np.clip(1 - ((xs - x) / (1.35 * half)) ** 2, 0, 1)
            rows = np.where((ys < lowered) & (ys > brow), brow + (ys - brow) * (lid - brow) / (lowered - brow), ys)
            columns = np.broadcast_to(xs, rows.shape).astype(np.float32)
            plate[box] = cv2.remap(self._plate, columns, rows.astype(np.float32), cv2.INTER_LINEAR)

    def render(self, mouths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Mouths (T, 6) -> frames (T, 432, 360) uint8, planar yuv420p, with head movement, blinks and luma noise."""
        num_frames = len(mouths)
        views, blinks = _views(num_frames, rng), _blinks(num_frames, rng)
        noise = np.clip(np.round(rng.normal(8, 2, (HEIGHT + 64, WIDTH + 64))), 0, 16).astype(np.uint8)
        frames = np.empty((num_frames, HEIGHT * 3 // 2, WIDTH), np.uint8)
        for t in range(num_frames):
            rgb = _camera_view(self.image(mouths[t], blinks[t]), views[t])
            frames[t] = cv2.cvtColor(rgb, cv2.COLOR_RGB2YUV_I420)  # BT.601, video range: the colours of MPEG-1
            y, x = rng.integers(0, 64, 2)
            frames[t, :HEIGHT] = cv2.subtract(cv2.add(frames[t, :HEIGHT], noise[y : y + HEIGHT, x : x + WIDTH]), 8)
        return frames


def _views(num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """(T, 2, 3) affine maps from plate to frame, with slow head movement."""
    sway = lambda reach, smooth: _wander(num_frames, reach, smooth, rng)
    dx, dy, roll, zoom = sway(4, 12), sway(3, 12), np.radians(sway(1.8, 14)), 1 + sway(0.015, 16)
    scale = WIDTH / (PLATE_WIDTH * PLATE_SCALE) * zoom
    cos, sin = scale * np.cos(roll), scale * np.sin(roll)
    centre = (np.array([FACE_X, FACE_Y]) - [PLATE_X, PLATE_Y]) * PLATE_SCALE
    turn = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], 1)
    shift = np.stack([WIDTH / 2 + dx, 0.56 * HEIGHT + dy], -1) - turn @ centre
    views = np.concatenate([turn, shift[..., None]], -1)
    views[:, 0] *= -1  # mirrored: face/landmarks.py tracks these lips better this way
    views[:, 0, 2] += WIDTH - 1
    return views


def _wander(num_frames: int, reach: float, smooth: float, rng: np.random.Generator) -> np.ndarray:
    """(T,) a smooth path within -reach to reach."""
    path = ndimage.gaussian_filter1d(rng.standard_normal(num_frames + 60), smooth)[30:-30]
    return reach * path / np.abs(path).max()


def _blinks(num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """(T,) how far the eyelids are closed: none, one or two blinks of four frames."""
    blinks = np.zeros(num_frames)
    for t in rng.integers(4, num_frames - 4, rng.integers(0, 3)):
        blinks[t - 1 : t + 3] = np.maximum(blinks[t - 1 : t + 3], [0.5, 1, 0.8, 0.3])
    return blinks


def _camera_view(plate: np.ndarray, view: np.ndarray) -> np.ndarray:
    """The plate through an affine map -> RGB (288, 360, 3). Uses remap: warpAffine rounds differently with and without AVX2."""
    back = cv2.invertAffineTransform(view)
    x, y = np.arange(WIDTH), np.arange(HEIGHT)[:, None]
    columns, rows = ((b[0] * x + b[1] * y + b[2]).astype(np.float32) for b in back)
    return cv2.remap(plate, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
