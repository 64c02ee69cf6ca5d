"""Vectors that torch made (`tools/embedding_vectors.py`)."""
