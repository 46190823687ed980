"""The commands: ``python -m train.<name>``."""
