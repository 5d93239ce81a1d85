"""What a verification finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it should be, or that one should know.

    Attributes:
        kind: What it is about. Of files: ``manifest``, ``missing``, ``unexpected``, ``size``, ``header``, ``index``,
            ``rows``, ``digest``, ``records`` (the record list), ``rejected`` (the list of rejected images), ``counts``.
            Of rows: ``record`` (cannot be read), ``image`` (does not decode, or has another size), ``digest`` (decodes,
            and is not what was stored), ``label``, ``name``. As warnings: ``duplicate``, ``near_duplicate``.
        file: Relative to the records folder.
        detail: One line for a person.
        row: The row in the shard, where it is about one. name: Its file_name.
    """

    kind: str
    file: str
    detail: str
    row: int | None = None
    name: str | None = None

    def to_line(self, before: str = "") -> str:
        """Return it as a line: file, row, name, kind, detail."""
        where = self.file + ("" if self.row is None else f" row {self.row}") + (f" ({self.name})" if self.name else "")
        return f"{where}: {before}{self.kind}: {self.detail}"
