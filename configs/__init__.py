"""Runnable configurations, one per method; `train.py fit --config mose.yaml` finds them here."""

if __name__ != "lit_edit.configs":
    raise ImportError("Import 'lit_edit.configs' instead of 'configs': the folder is installed as part of lit_edit.")
