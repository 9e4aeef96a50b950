"""The speaker of every Grid id: each id belongs to one speaker of the corpus, independent of the folder that a clip is in.

The table `speakers_of_ids.txt` is made from the corpus' alignments (s1/bbaf2n.align and so on) in a .tar of any kind:

    python -m tfds_grid.grid_ids --alignments=alignments_all.tar.xz
"""

from __future__ import annotations

import base64
import functools
import itertools
import pathlib
import re
import sys
import tarfile
import textwrap
import zlib
from collections.abc import Iterable

from avsi_jax.data import grid_text
from avsi_jax.runtime.command_line import Parser

MIN_CLIPS = 33_000  # fewest alignments that a table is made from
TABLE = pathlib.Path(__file__).with_name("speakers_of_ids.txt")  # base64(zlib(one byte per id: n for speaker sn, 0 for none))


def all_ids() -> list[str]:
    """The 64,000 ids of the grammar, in the order of its words; the corpus holds 34,000 of them."""
    return ["".join(letters) for letters in itertools.product(*grid_text.SLOTS)]


def speaker_of(clip_id: str) -> str | None:
    """'s1' to 's34'; None where the id is not in the table."""
    return _speakers().get(clip_id)


def ids_of(speaker: str) -> list[str]:
    """The ids of a speaker, sorted (1000, minus those left out of the table)."""
    return sorted(clip_id for clip_id, name in _speakers().items() if name == speaker)


@functools.cache
def _speakers() -> dict[str, str]:
    table = zlib.decompress(base64.b64decode(TABLE.read_text()))
    return {clip_id: f"s{number}" for clip_id, number in zip(all_ids(), table, strict=True) if number}


def make_table(alignments: Iterable[str]) -> str:
    """Paths such as s1/bbaf2n.align -> the table's text. ValueError for another path, or an id with two speakers."""
    numbers: dict[str, int] = {}
    for path in alignments:
        match = re.search(r"(?:^|/)s([1-9]\d?)/([^/]+)\.align$", path)
        if not match or not grid_text.is_grid_id(match[2]):
            raise ValueError(f"{path}: expected paths such as s1/bbaf2n.align")
        number, clip_id = int(match[1]), match[2]
        if numbers.setdefault(clip_id, number) != number:
            raise ValueError(f"{clip_id} is found under s{numbers[clip_id]} and under s{number}: expected one speaker per id")
    packed = zlib.compress(bytes(numbers.get(clip_id, 0) for clip_id in all_ids()), 9)
    return "\n".join(textwrap.wrap(base64.b64encode(packed).decode(), 120)) + "\n"


def main(argv: list[str] | None = None) -> int:
    """The command `python -m tfds_grid.grid_ids`; returns the exit status."""
    parser = Parser("python -m tfds_grid.grid_ids", description="Makes the table of the speakers of Grid's ids.")
    parser.add_argument("--alignments", required=True, metavar="TAR", help="the corpus' alignments: s1/bbaf2n.align ... in a .tar")
    args = parser.parse_args(argv)
    try:
        with tarfile.open(args.alignments) as tar:
            names = [name for name in tar.getnames() if name.endswith(".align")]
        table = make_table(names)
        if len(names) < MIN_CLIPS:
            raise ValueError(f"{args.alignments}: found {len(names)} alignments, expected all 34,000 of the corpus")
        temporary = TABLE.with_suffix(".tmp")
        temporary.write_text(table)
        temporary.replace(TABLE)
    except (OSError, ValueError, tarfile.TarError, EOFError) as e:
        print(f"grid_ids: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    _speakers.cache_clear()
    print(f"{TABLE}: {len(_speakers())} ids of {len(set(_speakers().values()))} speakers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
