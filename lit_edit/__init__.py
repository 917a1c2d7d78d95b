"""Sequential knowledge editing of language models as ordinary PyTorch Lightning."""
