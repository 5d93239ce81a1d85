"""Scoring: evaluation, the best guesses, several right labels an image, prediction."""
