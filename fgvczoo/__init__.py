"""fgvczoo: a PyTorch Lightning model zoo for fine-grained visual classification."""

__version__ = "0.1.0"
