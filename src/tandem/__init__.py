"""Tandem serves large language models with separate prefill and decode worker pools."""

__version__ = "0.1.0"
