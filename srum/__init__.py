"""SRUM: a unified multimodal model looks at its own images, judges them region by region, and is trained on that."""

__version__ = "0.1.0"
