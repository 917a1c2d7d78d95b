"""A language model to edit: where it keeps its parts, how it is asked, and its editable weights."""
