"""``python train.py locate``: where a model can be edited."""

from lit_edit.commands.locate.command import SUMMARY, main

__all__ = ["SUMMARY", "main"]
