"""Fixtures that the tests of training share."""

from training_tools import puzzle_corpus, run_training, text_corpus, text_run

__all__ = ["puzzle_corpus", "run_training", "text_corpus", "text_run"]
