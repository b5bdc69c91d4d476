"""Offline corpus builders: convert raw files to arrays for training. Does not import torch."""
