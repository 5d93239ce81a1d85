"""Write the sections on speed of README.md and README_CN.md from a result of `make bench`.

Commands::

    python -m benchmarks.readme build/bench/result.json --name 2-cores-epyc
    python -m benchmarks.readme

The first keeps the result as ``benchmarks/results/<name>.json`` and writes the sections from it; the second writes them
anew from the result that they name. `tests/benchmarks/test_readme.py` fails where a section is not what this writes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rounds import MARK, Line, Result, figure, result_from_json

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
NAMED = re.compile(r"<!-- speed: (\S+) -->")


@dataclass(frozen=True, slots=True)
class Language:
    """The words of a README.

    Attributes:
        page: The file.
        heading: That of the section.
        head: The sentence before the table; the fields are those of the result.
        columns: The heads of the table.
        made: What the made photographs are called, or None for the words of the result.
        rows: The comparisons that are shown, in this order, and what they are called.
        comma: Its punctuation.
    """

    page: str
    heading: str
    head: str
    columns: tuple[str, str, str]
    made: str | None
    rows: dict[str, str]
    comma: str = ", "


ENGLISH = Language(
    "README.md",
    "How fast",
    "Images/s on {cores} cores of {cpu}: medians of {rounds} rounds, in which all contenders of a row took turns.\n"
    "{mark} marks rounds more than 15 % apart. The photographs are {source}. `make bench` repeats the measurements\n"
    "on your machine; [docs/bench.md](docs/bench.md) says how.",
    ("", "ours", "others"),
    None,
    {
        "convert": "class folders to 4 shards; ours reads and hashes every bit, `ImageNetToMR` checks nothing",
        "download-256": "download from a server on the same machine, stored at short side 256",
        "download": "the same, stored as the images come; the other fetches and decodes, and stores nothing",
        "load-originals-train": "training batches at 224 px",
        "load-originals-eval": "evaluation batches, antialiased",
        "load-short256-train": "training batches from images of short side 256",
        "train-224": "MobileNetV2 1.0, a whole training step at 224 px, batch 32",
        "train-64": "the same at 64 px, batch 64",
        "eval-224": "inference at 224 px, batch 32",
    },
)
CHINESE = Language(
    "README_CN.md",
    "有多快",
    "在 {cpu} 的 {cores} 个核上的每秒图片数：每行的各方轮流运行，取 {rounds} 轮的中位数；\n"
    "{mark} 表示各轮相差超过 15 %。"
    "照片：{source}。`make bench` 可在您的机器上重测，方法见 [docs/bench.md](docs/bench.md)。",
    ("", "我们", "其他"),
    "由 scikit-learn 和 scikit-image 自带的照片裁剪而成，尺寸和字节数与 ImageNet 相同",
    {
        "convert": "按类别分的文件夹转 4 个分片；我们读取每个压缩比特并求哈希，`ImageNetToMR` 不做任何检查",
        "download-256": "从本机的服务器下载，以短边 256 存储",
        "download": "同上，按原样存储；另一方只抓取和解码，不存储",
        "load-originals-train": "224 像素的训练批次",
        "load-originals-eval": "评估批次，带抗锯齿",
        "load-short256-train": "从短边 256 的图片取训练批次",
        "train-224": "MobileNetV2 1.0 在 224 像素、批大小 32 的完整训练步",
        "train-64": "同上，64 像素、批大小 64",
        "eval-224": "224 像素、批大小 32 的推理",
    },
    "，",
)
LANGUAGES = (ENGLISH, CHINESE)
OURS = "ours"  # what the names of our lines begin with
NOT_SHOWN = {"convert": ("OpenCV decodes at 1/8",)}  # no converter


def table(result: dict[str, Any], language: Language) -> str:
    """Return the sentence and the table of a README, in Markdown."""
    machine, photographs = result["machine"], result["photographs"]
    source = photographs["source"]
    if "cuttings" in source and language.made:
        source = language.made
    head = language.head.format(
        cores=machine["cores"], cpu=machine["cpu"], rounds=result["rounds"], source=source, mark=MARK
    )
    found = {one["case"]: result_from_json(one) for one in result["results"]}
    rows = [language.columns, ("---",) * 3]
    rows += [_row(found[case], what, language) for case, what in language.rows.items() if case in found]
    return head + "\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in rows).replace("|  |", "| |")


def _row(result: Result, what: str, language: Language) -> tuple[str, str, str]:
    hidden = NOT_SHOWN.get(result.name, ())
    ours = [_named(line) for line in result.lines if line.name.startswith(OURS)]
    others = [_named(line) for line in result.lines if not line.name.startswith((OURS, *hidden))]
    return what, language.comma.join(ours), language.comma.join(others)


def _named(line: Line) -> str:
    name = line.name.removeprefix(OURS).removeprefix(", ").replace(", ", " ")
    return f"{name} {figure(line.median)}".lstrip() + ("" if line.steady else f" {MARK}")


def written(page: str, language: Language, name: str | None = None) -> str:
    """Return a README with its section written anew, from the result that it names or from another one."""
    before, heading, rest = page.partition(f"\n## {language.heading}\n\n")
    section, next_heading, after = rest.partition("\n## ")
    named = NAMED.match(section)
    if name is None and named is None:
        sys.exit(
            f"no result: expected '<!-- speed: {RESULTS}/NAME.json -->' in {language.page}; got none; give a result"
        )
    name = name or named[1]  # type: ignore[index]
    result = json.loads((ROOT / name).read_text(encoding="utf-8"))
    return f"{before}{heading}<!-- speed: {name} -->\n{table(result, language)}{next_heading}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", help="a JSON of make bench")
    parser.add_argument("--name", help="what to keep it as: the machine")
    args = parser.parse_args()
    name = None
    if args.result:
        text = args.result.read_text(encoding="utf-8")
        if json.loads(text)["trial"]:
            sys.exit(f"a trial: expected five rounds in full; got {args.result}, which is short; run make bench")
        if not args.name:
            sys.exit("no name: expected one for the machine; got none; give --name, e.g. 2-cores-epyc")
        name = f"{RESULTS}/{args.name}.json"
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_text(text, encoding="utf-8")
    for language in LANGUAGES:
        page = ROOT / language.page
        page.write_text(written(page.read_text(encoding="utf-8"), language, name), encoding="utf-8")


if __name__ == "__main__":
    main()
