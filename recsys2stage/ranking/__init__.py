"""Second stage: ranker, scorers, ranking losses and signal features; candidate lists and the exported bundle."""
