"""Long-context serving by sparse-KV self-speculation (MagicDec, arXiv 2408.11049)."""

__version__ = "0.1.0"
