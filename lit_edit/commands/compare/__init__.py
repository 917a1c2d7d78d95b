"""``compare``: the same edits by several methods, each run in a process of its own, then one table and one figure."""

from lit_edit.commands.compare.command import SUMMARY, main

__all__ = ["SUMMARY", "main"]
