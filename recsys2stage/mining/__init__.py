"""Mining: candidate lists for training the ranker, from an index and a dataset."""
