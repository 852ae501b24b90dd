"""Evaluation of search agents. Knows nothing of trainers."""
