"""`make bench`: every comparison, with its peers, as tables and as one JSON.

Commands::

    python -m benchmarks
    python -m benchmarks --images my-photos --json mine.json
    python -m benchmarks --short

Without ``--images``, photographs are made from pictures that scikit-learn and scikit-image ship. Each comparison also
runs alone as ``python -m benchmarks.<name>``, with the name `train_cpu`, `pipeline`, `convert` or `download`; its
docstring says what is measured, and `rounds.py` how.
"""

from __future__ import annotations

from benchmarks import convert, download, pipeline, train_cpu
from benchmarks.setting import parser, run


def main() -> None:
    args = parser(__doc__).parse_args()
    run(args, [convert.measure, download.measure, pipeline.measure, train_cpu.measure])


if __name__ == "__main__":
    main()
