"""Text to batches; knows nothing of models or cohorts."""
