"""How the world, its files and its model are made: ``train``, ``files`` and ``card`` are run with ``python -m``."""
