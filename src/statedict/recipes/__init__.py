"""Tensors that are computed from others as they are read: cast, joined, folded, averaged."""
